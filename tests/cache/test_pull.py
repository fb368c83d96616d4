"""Pull (spec §6, §13: 82–94)."""

from __future__ import annotations

import os

import pytest

from swampfs.errors import AccessDeniedError, TransferError
from swampfs.names import ModelRef
from swampfs.provider import SyncContext
from tests.caches import MODEL, World, compact, entry

FILES = {
    f"{MODEL}/1/raw": b"one",
    f"{MODEL}/1/metadata.yaml": b"v: 1",
    f"{MODEL}/latest": b"1",
    "data/test/m2/state/1/raw": b"other",
    "outputs/test/run/m1-2026.yaml": b"out",
    "outputs/test/run/m2-2026.yaml": b"out",
    "definitions-evaluated/@acme/echo/x.yaml": b"def",
    "audit/a.jsonl": b"{}",
}


@pytest.fixture(params=["v1", "v2"])
def loaded(request, world: World) -> World:
    world.load(FILES, request.param)
    world.version = request.param
    return world


def test_missing_and_different_files_are_downloaded_and_equal_ones_left_alone(loaded):
    cache = loaded.cache("a")
    cache.put(f"{MODEL}/1/raw", b"one")
    cache.put("audit/a.jsonl", b"different")
    before = cache.path(f"{MODEL}/1/raw").stat()
    assert cache.pull() == len(FILES) - 1
    assert cache.path(f"{MODEL}/1/raw").stat().st_ino == before.st_ino
    assert {rel: cache.read(rel) for rel in FILES} == FILES
    # Nobody said that it was unpushed work, and nobody could know: it is not thrown away.
    assert b"different" in [*cache.asides(), cache.read("audit/a.jsonl")]


def test_content_of_the_same_size_that_changed_is_downloaded(loaded):
    """H1."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.write(f"{MODEL}/latest", b"2")
    one.push()
    assert two.pull() == 1
    assert two.read(f"{MODEL}/latest") == b"2"


def test_dirty_files_are_not_overwritten_and_new_ones_are_pushed_later(loaded):
    """H13."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    two.write(f"{MODEL}/latest", b"mine, longer")
    two.write(f"{MODEL}/2/raw", b"new")
    one.write("audit/a.jsonl", b"theirs")
    one.push()
    two.restart()
    assert two.pull() == 1
    assert two.read(f"{MODEL}/latest") == b"mine, longer"
    assert two.push() == 2


def test_a_pull_clears_no_mark(loaded):
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    one.write("audit/b.jsonl", b"b")
    before = one.sidecar()["dirtyPaths"]
    two.write("audit/c.jsonl", b"c")
    two.push()
    one.pull()
    one.pull(context=SyncContext((ModelRef("test", "m1"),)))
    sidecar = one.sidecar()
    assert (sidecar["localDirty"], sidecar["dirtyPaths"]) == (True, before)


def test_an_object_that_is_gone_is_one_files_matter(loaded):
    """Lesson 21: 9 956 dangling entries aborted every command. The next commit takes the entry out."""
    loaded.bucket.delete("audit/a.jsonl")
    cache = loaded.cache("a")
    assert cache.pull() == len(FILES) - 1
    assert cache.pull() == 0
    cache.write("logs/x", b"x")
    cache.push()
    assert "audit/a.jsonl" not in loaded.entries()
    assert cache.sidecar()["localDirty"] is False


def test_any_other_failure_is_fatal_but_what_came_is_kept(loaded):
    cache = loaded.cache("a")
    loaded.fail("get", "audit/a.jsonl", error=AccessDeniedError("403"), times=9)
    with pytest.raises(TransferError, match=r"pull 1 file\(s\) from memory: audit/a\.jsonl"):
        cache.pull()
    assert cache.files() == set(FILES) - {"audit/a.jsonl"}


def test_a_metadata_only_pull_leaves_out_raw_content_alone_and_makes_its_directories(loaded):
    cache = loaded.cache("a")
    raw = {rel for rel in FILES if rel.endswith("/raw")}
    assert cache.pull(metadata_only=True) == len(FILES) - len(raw)
    assert cache.files() == set(FILES) - raw
    assert cache.path("data/test/m2/state/1").is_dir()
    assert cache.sidecar()["lazyPullActive"] is True


def test_the_lazy_flag_is_cleared_by_a_full_pull_only_and_survives_a_restart(loaded):
    cache = loaded.cache("a")
    cache.pull(metadata_only=True)
    cache.restart()
    cache.pull(context=SyncContext((ModelRef("test", "m1"),)))
    assert cache.sidecar()["lazyPullActive"] is True
    assert cache.pull() == 1
    assert cache.sidecar()["lazyPullActive"] is False


@pytest.mark.parametrize("fails", [False, True])
def test_the_lazy_flag_is_on_record_before_anything_is_left_out(loaded, fails):
    cache = loaded.cache("a")
    options = {"context": SyncContext((ModelRef("test", "m1"),))}
    if fails:
        loaded.fail("get", f"{MODEL}/latest", error=AccessDeniedError("403"), times=9)
        with pytest.raises(TransferError):
            cache.pull(metadata_only=True, **options)
    else:
        cache.pull(metadata_only=True, **options)
    assert cache.sidecar()["lazyPullActive"] is True


def test_a_scoped_pull_reads_the_models_shards_only(world):
    world.load({**FILES, **{f"data/other/m{n}/x/1/raw": b"x" for n in range(50)}}, "v2")
    cache = world.cache("a")
    count, log = world.requests(lambda: cache.pull(context=SyncContext((ModelRef("test", "m1"),))))
    assert count == 4
    assert cache.files() == {
        f"{MODEL}/1/raw",
        f"{MODEL}/1/metadata.yaml",
        f"{MODEL}/latest",
        "outputs/test/run/m1-2026.yaml",
    }
    assert not [key for _, key in log if "other" in key]


def test_a_scoped_pull_of_a_version_1_store_reads_the_monolith(world):
    world.load(FILES, "v1")
    cache = world.cache("a")
    assert cache.pull(context=SyncContext((ModelRef("test", "m1"),))) == 4
    assert cache.pull() == len(FILES) - 4


@pytest.mark.parametrize(
    ("model", "latest"),
    [
        (ModelRef("test", "m1"), "data/test/m1/state/latest"),
        (ModelRef("@acme/echo", "m1"), "data/@acme/echo/m1/state/latest"),
        (ModelRef("aws/ec2/vpc", "m1"), "data/aws/ec2/vpc/m1/state/latest"),
    ],
)
def test_a_scoped_pull_brings_the_latest_marker(world, model, latest):
    """H2: it lives in another shard than the versions, and in which one depends on the depth of the type."""
    raw = latest.replace("latest", "1/raw")
    world.load({latest: b"1", raw: b"x", "audit/a": b""}, "v2")
    cache = world.cache("a")
    assert cache.pull(context=SyncContext((model,))) == 2
    assert cache.read(latest) == b"1"


def test_a_pull_of_version_2_merges_all_shards_and_never_sees_half_a_commit(world):
    world.load(FILES, "v2")
    one, two = world.cache("a"), world.cache("b")
    two.pull()
    two.write("audit/b.jsonl", b"b")
    two.write(f"{MODEL}/2/raw", b"two")

    def push_elsewhere() -> None:
        import threading

        thread = threading.Thread(target=two.push)
        thread.start()
        thread.join()

    world.fail("get", "_index/data--test--m1.json", action=push_elsewhere)
    one.pull()
    assert {"audit/b.jsonl", f"{MODEL}/2/raw"} <= one.files()
    assert one.sidecar()["commitSeq"] == 2


def test_a_download_is_verified_and_a_crash_leaves_the_old_file(loaded):
    """H35."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.write(f"{MODEL}/1/raw", b"the second version")
    one.push()
    loaded.put(f"{MODEL}/1/raw", b"truncat")
    with pytest.raises(TransferError, match="bytes in the datastore"):
        two.pull()
    assert two.read(f"{MODEL}/1/raw") == b"one"
    assert not list((two.directory / "_index/staging").iterdir())
    loaded.put(f"{MODEL}/1/raw", b"the second version")
    assert two.pull() == 1


def test_a_remote_deletion_removes_an_untouched_copy_and_stays(loaded):
    """H19."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    two.put("outputs/test/run/m1-2026.yaml", b"changed without a mark")
    for rel in ("audit/a.jsonl", "outputs/test/run/m1-2026.yaml"):
        one.remove(rel)
    one.push()
    two.pull()
    assert two.read("audit/a.jsonl") is None
    assert not two.path("audit").exists()
    assert two.read("outputs/test/run/m1-2026.yaml") == b"changed without a mark"
    two.mark()
    two.push()
    assert "audit/a.jsonl" not in loaded.entries()


def test_a_deletion_in_a_model_reaches_a_scoped_pull_also_after_a_migration(world):
    world.load(FILES, "v1")
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    two.pull()
    one.do("migrate_monolith_to_shards")
    one.pull()
    one.remove(f"{MODEL}/latest")
    one.push()
    two.pull(context=SyncContext((ModelRef("test", "m1"),)))
    assert two.read(f"{MODEL}/latest") is None


@pytest.mark.parametrize("rel", ["../evil", "/etc/evil", "data/../../evil", "a//b", "a\\b", "a/\0b"])
def test_hostile_keys_are_rejected_and_the_rest_is_pulled(loaded, rel):
    key = ".datastore-index.json" if loaded.version == "v1" else "_index/audit.json"
    document = loaded.document(key)
    document["entries"][rel] = entry(rel, b"evil")
    loaded.put(key, document)
    cache = loaded.cache("a")
    assert cache.pull() == len(FILES)
    assert not (cache.directory.parent / "evil").exists()
    assert cache.files() == set(FILES)


def test_nothing_is_written_through_a_planted_link(loaded, tmp_path):
    cache = loaded.cache("a")
    outside = tmp_path / "outside"
    outside.mkdir()
    cache.directory.joinpath("audit").symlink_to(outside)
    with pytest.raises(TransferError, match="symbolic link"):
        cache.pull()
    assert list(outside.iterdir()) == []


def test_a_file_written_while_it_is_downloaded_stays(loaded):
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.write(f"{MODEL}/latest", b"2")
    one.push()

    def write_here() -> None:
        two.service._book.mark(f"{MODEL}/latest")
        two.put(f"{MODEL}/latest", b"mine")

    loaded.fail("get", f"{MODEL}/latest", action=write_here)
    assert two.pull() == 0
    assert two.read(f"{MODEL}/latest") == b"mine"
    assert two.push() == 1


def test_a_file_becomes_a_directory_and_back(loaded):
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.remove("audit/a.jsonl")
    one.write("audit/a.jsonl/inside", b"x")
    one.push()
    two.pull()
    assert two.read("audit/a.jsonl/inside") == b"x"
    one.remove("audit/a.jsonl/inside")
    one.path("audit/a.jsonl").rmdir()
    one.write("audit/a.jsonl", b"file again")
    one.push()
    two.pull()
    assert two.read("audit/a.jsonl") == b"file again"


def test_mtimes_are_those_of_the_writer(loaded):
    cache = loaded.cache("a")
    cache.pull()
    from swampfs.records import timestamp

    listed = loaded.entries()["audit/a.jsonl"]["localMtime"]
    assert timestamp(cache.path("audit/a.jsonl").stat().st_mtime_ns) == listed


def test_a_local_copy_of_another_clients_index_changes_nothing(loaded):
    cache = loaded.cache("a")
    (cache.directory / ".datastore-index.json").write_bytes(compact({"version": 1, "entries": {}}))
    assert cache.pull() == len(FILES)


def test_a_file_marked_while_it_is_downloaded_stays(loaded):
    """Its writer has announced to write in place, into the file that a rename would take away."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.write(f"{MODEL}/latest", b"2")
    one.push()
    loaded.fail("get", f"{MODEL}/latest", action=lambda: two.service._book.mark(f"{MODEL}/latest"))
    assert two.pull() == 0
    assert two.read(f"{MODEL}/latest") == b"1"


def test_a_file_written_without_a_mark_while_it_is_downloaded_stays(loaded):
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.write(f"{MODEL}/latest", b"2")
    one.push()
    loaded.fail("get", f"{MODEL}/latest", action=lambda: two.put(f"{MODEL}/latest", b"mine"))
    assert two.pull() == 0
    assert two.read(f"{MODEL}/latest") == b"mine"


def test_a_full_disk_never_leaves_half_a_file(loaded, monkeypatch):
    """A raw write may be short; what was admitted would be pushed over the whole one some day."""
    real = os.write
    begun: set[int] = set()

    def short(fd, body):
        if os.readlink(f"/proc/self/fd/{fd}").startswith(str(loaded.directory)):
            if fd in begun:
                begun.discard(fd)
                raise OSError(28, "No space left on device")
            begun.add(fd)
            return real(fd, body[:1])
        return real(fd, body)

    cache = loaded.cache("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", short)
        with pytest.raises(TransferError, match="No space left"):
            cache.pull()
    assert all(cache.read(rel) == FILES[rel] for rel in cache.files())
    assert not list((cache.directory / "_index/staging").iterdir())
    cache.pull()
    assert cache.files() == set(FILES)


def test_a_file_rewritten_within_one_tick_of_the_clock_is_looked_at(loaded):
    """Lesson 9: the same size and the same times, because the clock is coarse."""
    cache = loaded.cache("a")
    cache.pull()
    row = cache.service._bound.parts.manifest.row(f"{MODEL}/latest")
    found = cache.path(f"{MODEL}/latest").stat()
    assert not row._replace(stat_at=max(found.st_ctime_ns, found.st_mtime_ns) + 1_000_000).is_untouched(found)
    assert row._replace(stat_at=max(found.st_ctime_ns, found.st_mtime_ns) + 10**9).is_untouched(found)


def test_an_older_reading_never_replaces_a_newer_one(loaded):
    """Two processes on one cache: the slower one's answer is of before the faster one's."""
    import trio

    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    parts = one.service._bound.parts
    known = parts.manifest.watermark()
    two.write("audit/b.jsonl", b"b")
    two.push()
    old = trio.run(parts._read, known, None)
    two.write("audit/c.jsonl", b"c")
    two.push()
    loaded.cache("a").pull()
    assert parts.manifest.apply(old, known) is False
    assert one.pull() == 0
    assert one.read("audit/c.jsonl") == b"c"


def test_a_marked_file_is_not_moved_for_a_directory_of_the_same_name(loaded):
    cache = loaded.cache("a")
    cache.write(f"{MODEL}", b"a file where the datastore has a directory")
    with pytest.raises(TransferError, match="is a file here with changes to push"):
        cache.pull()
    assert cache.read(MODEL) == b"a file where the datastore has a directory"
    assert "audit/a.jsonl" in cache.files()


@pytest.mark.parametrize("marked", [False, True])
def test_a_file_written_while_its_removal_is_planned_stays(loaded, monkeypatch, marked):
    """Deleted there, untouched here, and then its writer comes between our look and our removal."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.remove("audit/a.jsonl")
    one.push()
    puller = two.service._bound.puller
    real = puller._plan

    def plan_and_write(*args, **options):
        plan = real(*args, **options)
        if marked:
            two.service._book.mark("audit/a.jsonl")
        else:
            two.put("audit/a.jsonl", b"mine")
        return plan

    monkeypatch.setattr(puller, "_plan", plan_and_write)
    two.pull()
    assert two.read("audit/a.jsonl") == (b"{}" if marked else b"mine")


def test_a_file_that_cannot_be_read_is_not_taken_for_the_old_one(loaded, monkeypatch):
    """An error is not a hash: without one on either side, nothing says that the file is unchanged."""
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    two.service._bound.parts.manifest.db.execute("UPDATE file SET base_sha256 = NULL, stat = ''")
    one.remove("audit/a.jsonl")
    one.push()
    monkeypatch.setattr(two.service._bound.puller, "_local_hash", lambda rel: None)
    two.pull()
    assert two.read("audit/a.jsonl") == b"{}"
