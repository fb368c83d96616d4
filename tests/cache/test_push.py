"""Push (spec §7, §13: 49–73): what is pushed, what is deleted, what is left alone."""

from __future__ import annotations

import hashlib
import os
import shutil

import pytest

from swampfs.errors import StoreUnreachableError, TransferError
from swampfs.names import partition_key
from swampfs.records import IndexEntry
from swampfs.sync.cache.decide import needs_push
from tests.caches import LATER, MODEL, STAMP, World, compact, entry

FILES = {f"{MODEL}/1/raw": b"one", f"{MODEL}/1/metadata.yaml": b"v: 1", f"{MODEL}/latest": b"1"}


@pytest.fixture(params=["v1", "v2"])
def cache(request, world: World):
    """A cache in step with a loaded datastore."""
    world.load({**FILES, "audit/a.jsonl": b"{}"}, request.param)
    cache = world.cache("a")
    cache.pull()
    cache.version = request.param
    return cache


def test_new_changed_and_rewritten_files_are_pushed_and_touched_ones_are_not(cache):
    cache.mark()
    cache.put("audit/new.jsonl", b"new")
    cache.put(f"{MODEL}/1/raw", b"longer than before")
    cache.put(f"{MODEL}/latest", b"2")
    os.utime(cache.path("audit/a.jsonl"))
    assert cache.push() == 3
    cache.world.check()


def test_a_rewrite_with_the_same_size_and_time_is_found_by_its_hash(cache):
    path = cache.path(f"{MODEL}/latest")
    before = path.stat()
    cache.mark()
    path.write_bytes(b"2")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.push() == 1
    assert cache.world.body(f"{MODEL}/latest") == b"2"


@pytest.mark.parametrize(
    ("size", "mtime", "listed", "pushed"),
    [
        (3, STAMP, None, True),
        (4, STAMP, {"size": 3, "mtime": STAMP, "sha": "a"}, True),
        (3, STAMP, {"size": 3, "mtime": STAMP, "sha": "b"}, True),
        (3, STAMP, {"size": 3, "mtime": STAMP, "sha": "a"}, False),
        (3, STAMP, {"size": 3, "mtime": STAMP, "sha": None}, False),
        (3, STAMP, {"size": 3, "mtime": None, "sha": None}, False),
        (3, None, {"size": 3, "mtime": STAMP, "sha": None}, False),
        (3, LATER, {"size": 3, "mtime": STAMP, "sha": "a"}, False),
        (3, LATER, {"size": 3, "mtime": STAMP, "sha": "b"}, True),
        (3, None, {"size": 3, "mtime": None, "sha": "b"}, True),
        (3, LATER, {"size": 3, "mtime": STAMP, "sha": None}, True),
    ],
)
def test_the_change_detection_table_row_by_row(size, mtime, listed, pushed):
    found = IndexEntry("x", listed["size"], STAMP, listed["mtime"], listed["sha"]) if listed else None
    assert needs_push(size, mtime, "a", found) is pushed


def test_without_a_hash_equal_size_and_time_are_taken_for_the_same(world):
    world.load({"audit/a.jsonl": b"one"}, "v1")
    index = world.document(".datastore-index.json")
    del index["entries"]["audit/a.jsonl"]["sha256"]
    world.put(".datastore-index.json", index)
    cache = world.cache("a")
    cache.mark()
    cache.put("audit/a.jsonl", b"two")
    stamp_ns = 1785748462401 * 1_000_000
    os.utime(cache.path("audit/a.jsonl"), ns=(stamp_ns, stamp_ns))
    from swampfs.records import timestamp

    index["entries"]["audit/a.jsonl"]["localMtime"] = timestamp(stamp_ns)
    world.put(".datastore-index.json", index)
    assert cache.push() == 0


def test_size_and_hash_of_an_entry_are_of_the_uploaded_bytes(cache):
    body = os.urandom(70_000)
    cache.write(f"{MODEL}/2/raw", body)
    cache.push()
    found = cache.world.entries()[f"{MODEL}/2/raw"]
    assert (found["size"], found["sha256"]) == (70_000, hashlib.sha256(body).hexdigest())
    assert list(found) == ["key", "size", "lastModified", "localMtime", "sha256"]


def test_a_large_file_is_sent_from_a_copy_of_one_moment(cache, monkeypatch):
    monkeypatch.setattr("swampfs.sync.cache.tree.IN_MEMORY", 1000)
    body = os.urandom(50_000)
    cache.write(f"{MODEL}/2/raw", body)
    assert cache.push() == 1
    assert cache.world.body(f"{MODEL}/2/raw") == body
    assert not list((cache.directory / "_index/staging").iterdir())


def test_a_scoped_push_touches_only_what_is_marked(world):
    files = {f"data/test/m{number}/state/1/raw": b"x" for number in range(1000)}
    world.load(files, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.write("data/test/m4/state/1/raw", b"changed")
    cache.push()  # the first one proves that the store honours preconditions
    cache.put("data/test/m7/state/1/raw", b"unmarked")
    cache.write("data/test/m5/state/1/raw", b"changed")
    count, log = world.requests(cache.push)
    assert count == 1
    assert [key for op, key in log if op == "put"] == [
        "data/test/m5/state/1/raw",
        "_index/data--test--m5.json",
        "_index/_meta.json",
    ]
    assert len(log) <= 8


def test_marked_files_and_marked_directories_both_work(cache):
    cache.mark(MODEL)
    cache.put(f"{MODEL}/2/raw", b"two")
    cache.put(f"{MODEL}/2/metadata.yaml", b"v: 2")
    cache.write("audit/b.jsonl", b"b")
    assert cache.push() == 3


def test_remote_entries_that_are_absent_here_survive_a_push(cache):
    other = cache.world.cache("b")
    other.write("audit/b.jsonl", b"b")
    assert other.push() == 1
    other.mark()
    other.put("audit/c.jsonl", b"c")
    assert other.push() == 1
    assert set(cache.world.entries()) == {*FILES, "audit/a.jsonl", "audit/b.jsonl", "audit/c.jsonl"}


def test_remote_only_entries_keep_a_cache_from_being_verified_until_they_are_pulled(cache):
    """Lesson 4: marking clean a cache that lacks files made the next pull skip them."""
    other = cache.world.cache("b")
    other.write("audit/b.jsonl", b"b")
    other.push()
    assert "commitSeq" not in other.sidecar()
    assert other.sidecar()["remoteIndexETag"] == ""
    assert other.pull() == 4
    assert other.sidecar()["localDirty"] is False
    assert other.sidecar().get("commitSeq") or other.sidecar()["remoteIndexETag"]


def test_a_complete_cache_without_sidecar_becomes_clean_without_an_upload(cache):
    cache.forget_databases()
    cache.sidecar_path.unlink()
    cache.restart()
    count, log = cache.world.requests(cache.push)
    assert count == 0
    assert not [op for op, _ in log if op == "put"]
    assert cache.sidecar()["localDirty"] is False
    assert len(cache.world.requests(cache.push)[1]) <= 2


def test_a_failed_upload_names_files_and_reasons_and_the_retry_succeeds(cache):
    for number in range(6):
        cache.write(f"audit/{number}.jsonl", b"x")
    before = {key: body for key, (body, _) in cache.world.bucket.objects.items() if "ndex" in key}
    faults = [cache.world.fail("put", f"audit/{number}.jsonl", times=99) for number in range(5)]
    with pytest.raises(TransferError) as failure:
        cache.push()
    lines = str(failure.value).splitlines()
    assert lines[0].startswith("Failed to push 5 file(s) to memory: ")
    assert all(f"audit/{number}.jsonl" in lines[0] for number in range(5))
    assert [line.startswith("  - audit/") for line in lines[1:4]] == [True] * 3
    assert lines[4] == "  ... and 2 more"
    assert {key: body for key, (body, _) in cache.world.bucket.objects.items() if "ndex" in key} == before
    for fault in faults:
        fault.times = 0
    assert cache.push() == 6
    cache.world.check()


def test_what_is_gone_where_it_was_marked_is_deleted(cache):
    cache.remove("audit/a.jsonl")
    cache.mark(f"{MODEL}/1")
    shutil.rmtree(cache.path(f"{MODEL}/1"))
    assert cache.push() == 3
    assert set(cache.world.entries()) == {f"{MODEL}/latest"}
    assert not [key for key in cache.world.keys() if key.startswith("audit") or "/1/" in key]


@pytest.mark.parametrize("bulk", [False, True])
def test_a_file_gone_from_a_marked_directory_that_exists_is_deleted(cache, bulk):
    """Also while everything is invalidated: the no-path mark must not hide a deletion (H19)."""
    if bulk:
        cache.mark()
    cache.mark(MODEL)
    cache.path(f"{MODEL}/1/raw").unlink()
    assert cache.push() == 1
    assert f"{MODEL}/1/raw" not in cache.world.entries()
    assert cache.world.body(f"{MODEL}/1/raw") is None


def test_an_overflowed_walk_deletes_what_was_here_and_a_bulk_walk_does_not(cache):
    cache.mark()
    cache.path("audit/a.jsonl").unlink()
    assert cache.push() == 0
    assert "audit/a.jsonl" in cache.world.entries()
    for number in range(201):
        cache.mark(f"data/none/{number}/x")
    assert cache.push() == 1
    assert set(cache.world.entries()) == set(FILES)


def test_an_overflowed_walk_deletes_nothing_that_was_never_here(cache):
    other = cache.world.cache("b")
    for number in range(201):
        other.mark(f"data/none/{number}/x")
    assert other.push() == 0
    assert set(cache.world.entries()) == {*FILES, "audit/a.jsonl"}


def test_a_push_of_a_lazy_cache_never_deletes_and_forgets_no_deletion(cache):
    """Lesson 3: an un-hydrated ``raw`` looks deleted. What may not be carried out stays marked."""
    lazy = cache.world.cache("b")
    lazy.pull(metadata_only=True)
    lazy.mark(MODEL)
    for number in range(201):
        lazy.mark(f"data/none/{number}/x")
    lazy.path(f"{MODEL}/latest").unlink()
    assert lazy.push() == 0
    assert set(cache.world.entries()) == {*FILES, "audit/a.jsonl"}
    lazy.pull()
    assert lazy.push() == 1
    assert f"{MODEL}/latest" not in cache.world.entries()


def test_an_error_other_than_absence_never_deletes(cache, monkeypatch, caplog):
    from swampfs.sync.cache.tree import CacheTree

    real = CacheTree.stat

    def failing(self, rel):
        if rel == "audit/a.jsonl":
            raise PermissionError(13, "Permission denied")
        return real(self, rel)

    cache.mark("audit/a.jsonl")
    cache.path("audit/a.jsonl").unlink()
    monkeypatch.setattr(CacheTree, "stat", failing)
    assert cache.push() == 0
    assert "audit/a.jsonl" in cache.world.entries()
    assert "cannot be looked at" in caplog.text
    caplog.clear()
    monkeypatch.undo()
    assert cache.push() == 1, "the mark still stands"


def test_a_walk_that_missed_something_never_deletes(cache, monkeypatch, caplog):
    """H4: one unreadable directory, an overflow, and everything behind it was deleted remotely."""
    real = os.scandir

    def failing(path):
        if str(path).endswith("/audit"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    for number in range(201):
        cache.mark(f"data/none/{number}/x")
    cache.path(f"{MODEL}/1/raw").unlink()
    monkeypatch.setattr("swampfs.sync.cache.tree.os.scandir", failing)
    assert cache.push() == 0
    assert set(cache.world.entries()) == {*FILES, "audit/a.jsonl"}
    caplog.clear()


def test_the_result_counts_pushed_and_deleted(cache):
    cache.remove("audit/a.jsonl")
    cache.write("audit/b.jsonl", b"b")
    cache.write("audit/c.jsonl", b"c")
    assert cache.push() == 3


def test_version_1_writes_the_monolith_before_the_shards_whose_failure_does_not_matter(world):
    world.load(FILES, "v1")
    cache = world.cache("a")
    cache.pull()
    cache.write("audit/b.jsonl", b"b")
    _, log = world.requests(cache.push)
    puts = [key for op, key in log if op == "put" and "ndex" in key]
    assert puts[0] == ".datastore-index.json"
    assert puts[-1] == "_index/_meta.json"
    world.fail("put", "_index/", error=StoreUnreachableError("no"), times=99)
    cache.write("audit/c.jsonl", b"c")
    assert cache.push() == 1
    assert "audit/c.jsonl" in world.entries()


def test_version_1_meta_lists_every_partition_though_one_shard_was_written(world):
    world.load({**FILES, "audit/a.jsonl": b"", "logs/x": b""}, "v1")
    cache = world.cache("a")
    cache.pull()
    cache.write("logs/y", b"y")
    cache.push()
    _, log = world.requests(lambda: (cache.write("logs/z", b"z"), cache.push()))
    assert [key for op, key in log if op == "put" and key.startswith("_index/")] == ["_index/logs.json"]
    meta = world.document("_index/_meta.json")
    assert meta["version"] == 1
    assert set(meta["partitions"]) == {partition_key(rel) for rel in world.entries()}
    assert {f"_index/{name}.json" for name in meta["partitions"]} <= world.keys()


def test_a_version_1_writer_never_replaces_a_version_2_meta(world):
    """H14, H37: between reading and writing, another machine migrated."""
    world.load(FILES, "v1")
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    two.pull()
    one.write("audit/b.jsonl", b"b")
    manifest = one.prepare()
    two.do("migrate_monolith_to_shards")
    assert one.commit(manifest) == 1
    assert world.document("_index/_meta.json")["version"] == 2
    assert "audit/b.jsonl" in world.entries()


def test_version_2_never_touches_the_monolith(world):
    world.load(FILES, "v2")
    stale = compact({"version": 1, "entries": {}})
    world.put(".datastore-index.json", stale)
    cache = world.cache("a")
    cache.pull()
    cache.write("audit/b.jsonl", b"b")
    cache.push()
    cache.write("audit/c.jsonl", b"c")
    cache.commit(cache.prepare())
    cache.commit(cache.prepare())
    cache.mark()
    cache.push()
    assert [key for _, key in world.recorder.log if key == ".datastore-index.json"] == []
    assert world.body(".datastore-index.json") == stale


def test_an_emptied_shard_is_deleted_and_delisted(world):
    world.load({**FILES, "audit/a.jsonl": b"{}"}, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.remove("audit/a.jsonl")
    cache.push()
    assert "_index/audit.json" not in world.keys()
    assert world.document("_index/_meta.json")["partitions"] == ["data--test--m1", "data--test--m1--state"]


def test_meta_is_written_last_and_a_crash_before_it_leaves_a_readable_store(world):
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.write(f"{MODEL}/2/raw", b"two")
    cache.write("audit/b.jsonl", b"b")
    fault = world.fail("put", "_index/_meta.json", times=99)
    with pytest.raises(StoreUnreachableError):
        cache.push()
    assert world.recorder.log[-1] == ("put", "_index/_meta.json")
    reader = world.cache("r")
    assert reader.pull() >= len(FILES)
    fault.times = 0
    cache.restart()
    cache.push()
    world.check()
    assert {f"{MODEL}/2/raw", "audit/b.jsonl"} <= set(world.entries())
    reader.pull()
    assert reader.read("audit/b.jsonl") == b"b"


def test_a_machine_that_pulled_has_nothing_to_push(cache):
    """Lesson 10: the pusher's times differ from the puller's; nobody uploads it all again."""
    other = cache.world.cache("b")
    other.pull()
    other.mark()
    count, log = cache.world.requests(other.push)
    assert count == 0
    assert not [op for op, _ in log if op == "put"]


def test_temporary_files_and_links_neither_break_nor_pollute_a_push(cache, caplog):
    """H23, H24."""
    outside = cache.directory.parent / "secret"
    outside.write_bytes(b"outside")
    cache.put("data/test/m1/old/1/raw", b"1")
    cache.put("data/test/m1/old/.0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp", b"half")
    cache.path("data/test/m1/old/latest").symlink_to("1")
    cache.path("data/test/m1/old/dangling").symlink_to("nowhere")
    cache.path("data/test/m1/old/loop").symlink_to(".")
    cache.path("audit/link.jsonl").symlink_to(outside)
    cache.mark()
    assert cache.push() == 2
    assert cache.world.body("data/test/m1/old/latest") == b"1"
    new = set(cache.world.entries()) - {*FILES, "audit/a.jsonl"}
    assert new == {"data/test/m1/old/1/raw", "data/test/m1/old/latest"}
    assert "symbolic link" in caplog.text
    caplog.clear()


def test_a_file_changed_during_its_upload_stays_dirty(cache):
    """H26."""
    cache.write(f"{MODEL}/1/raw", b"first")
    cache.world.fail("put", f"{MODEL}/1/raw", action=lambda: cache.path(f"{MODEL}/1/raw").write_bytes(b"second!"))
    cache.mark(f"{MODEL}/1/raw")
    assert cache.push() == 1
    cache.world.check()
    cache.mark(f"{MODEL}/1/raw")
    assert cache.push() == 1
    assert cache.world.body(f"{MODEL}/1/raw") == b"second!"


def test_stale_content_is_not_pushed_over_newer(cache):
    """H1: everything is invalidated, and this machine still has the old ``latest``."""
    other = cache.world.cache("b")
    other.pull()
    other.write(f"{MODEL}/latest", b"2")
    other.push()
    cache.mark()
    assert cache.push() == 0
    assert cache.world.body(f"{MODEL}/latest") == b"2"
    assert cache.pull() == 1


def test_deleted_content_is_not_brought_back_by_a_full_walk(cache):
    """H19."""
    other = cache.world.cache("b")
    other.pull()
    other.remove("audit/a.jsonl")
    other.push()
    cache.mark()
    assert cache.push() == 0
    assert "audit/a.jsonl" not in cache.world.entries()


def test_a_deletion_takes_no_newer_content_of_others_with_it(cache):
    other = cache.world.cache("b")
    other.pull()
    other.write(f"{MODEL}/latest", b"2")
    other.push()
    cache.remove(f"{MODEL}/latest")
    assert cache.push() == 0
    assert cache.pull() == 1
    assert cache.read(f"{MODEL}/latest") == b"2"


def test_both_versions_of_a_file_changed_here_and_there_are_kept(cache):
    other = cache.world.cache("b")
    other.pull()
    other.write(f"{MODEL}/1/raw", b"theirs")
    other.push()
    cache.write(f"{MODEL}/1/raw", b"ours")
    assert cache.push() == 1
    assert cache.world.body(f"{MODEL}/1/raw") == b"ours"
    assert cache.asides() == [b"theirs"]


def test_objects_are_deleted_after_the_index_was_committed(cache):
    """H20: a crash in between leaves an unlisted object, never an entry without one."""
    cache.remove("audit/a.jsonl")
    _, log = cache.world.requests(cache.push)
    commits = [at for at, (op, key) in enumerate(log) if op == "put" and "ndex" in key]
    deletes = [at for at, (op, key) in enumerate(log) if op == "delete" and key == "audit/a.jsonl"]
    assert max(commits) < min(deletes)


def test_a_delete_that_failed_is_done_by_the_next_push(cache):
    cache.remove("audit/a.jsonl")
    fault = cache.world.fail("delete", "audit/a.jsonl", times=99)
    with pytest.raises(TransferError, match=r"Failed to delete 1 file\(s\) from memory"):
        cache.push()
    assert "audit/a.jsonl" not in cache.world.entries()
    fault.times = 0
    cache.push()
    assert cache.world.body("audit/a.jsonl") is None


def test_files_without_a_partition_are_found_by_fresh_readers_of_version_2(world):
    """H6: they are parked in ``_root``, and put back when a writer that does not know drops them."""
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.write("definitions-evaluated/test/my.yaml", b"x: 1")
    assert cache.push() == 1
    assert world.cache("b").pull() == len(FILES) + 1
    meta = world.document("_index/_meta.json")
    meta["partitions"].remove("_root")
    meta["commitSeq"] += 1
    world.put("_index/_meta.json", meta)
    world.bucket.delete("_index/_root.json")
    cache.pull()
    assert cache.read("definitions-evaluated/test/my.yaml") == b"x: 1"
    cache.write("audit/x.jsonl", b"x")
    cache.push()
    assert "definitions-evaluated/test/my.yaml" in world.entries()


def test_an_upload_that_was_never_committed_leaves_no_orphan(cache):
    cache.write("audit/b.jsonl", b"b")
    cache.prepare()
    assert cache.world.body("audit/b.jsonl") == b"b"
    cache.remove("audit/b.jsonl")
    cache.restart()
    cache.push()
    assert cache.world.body("audit/b.jsonl") is None


def test_losing_our_databases_reverts_nobody(cache):
    other = cache.world.cache("b")
    other.pull()
    other.write(f"{MODEL}/latest", b"2")
    other.push()
    cache.forget_databases()
    cache.push()
    assert cache.world.body(f"{MODEL}/latest") == b"2"
    cache.pull()
    assert cache.read(f"{MODEL}/latest") == b"2"


def test_entries_are_those_of_the_helper(cache):
    """The comparison above is worth what its own reading of the format is worth."""
    found = cache.world.entries()["audit/a.jsonl"]
    assert found == entry("audit/a.jsonl", b"{}")


def test_a_marked_directory_that_cannot_be_walked_deletes_nothing(cache, monkeypatch, caplog):
    """H4, for one directory."""
    real = os.scandir

    def failing(path):
        if str(path).endswith("/state/1"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    cache.mark(MODEL)
    cache.path(f"{MODEL}/latest").unlink()
    monkeypatch.setattr("swampfs.sync.cache.tree.os.scandir", failing)
    assert cache.push() == 0
    assert set(cache.world.entries()) == {*FILES, "audit/a.jsonl"}
    caplog.clear()


def test_a_lazy_cache_is_never_verified_by_a_push(cache):
    """The existing extensions would take the fast path past content that is not here (H10)."""
    lazy = cache.world.cache("b")
    lazy.pull(metadata_only=True)
    lazy.write("audit/b.jsonl", b"b")
    lazy.push()
    assert "commitSeq" not in lazy.sidecar()
    assert lazy.sidecar()["remoteIndexETag"] == ""


def test_marks_of_another_namespace_are_not_cleared(world):
    infra, security = world.cache("shared", "infra"), world.cache("shared", "security")
    infra.write("audit/a", b"i")
    security.write("audit/a", b"s")
    assert infra.push() == 1
    security.restart()
    assert security.service._log.marked()[0].keys() == {"security/audit/a"}
    assert security.push() == 1
