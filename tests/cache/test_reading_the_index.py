"""Index loading, discovery and the fast path (spec §13, 10–36), and the hazards behind them."""

from __future__ import annotations

import json
import os

import pytest

from swampfs.errors import AccessDeniedError, IndexCorruptError, IndexVersionError, StoreBusyError, TransferError
from tests.caches import MODEL, STAMP, World, compact, entry

FILES = {f"{MODEL}/1/raw": b"one", f"{MODEL}/1/metadata.yaml": b"v: 1", f"{MODEL}/latest": b"1", "audit/a.jsonl": b"{}"}
INTERNAL = [
    "data/_catalog.db",
    "data/_catalog.db-wal",
    "data/x/_catalog.db-shm",
    ".push-queue.json",
    "data/test/m1/.lock",
    "infra/.namespace.json",
    "_control/tokens/a",
    ".0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp",
]


@pytest.fixture(params=["v1", "v2"])
def loaded(request, world: World) -> World:
    world.load(FILES, request.param)
    return world


def bodies(log):
    """Requests that transferred an index document."""
    return [key for op, key in log if op == "get" and (key.startswith("_index/") or key.endswith("index.json"))]


@pytest.mark.parametrize("name", INTERNAL)
def test_internal_files_are_never_pushed_nor_pulled(world, name):
    cache = world.cache("a")
    cache.mark()
    cache.put(name, b"internal")
    cache.put("audit/a.jsonl", b"{}")
    assert cache.push() == 1
    assert set(world.entries()) == {"audit/a.jsonl"}
    assert name not in world.keys()
    # In an index that somebody else polluted, they are neither downloaded nor deleted.
    world.put(name, b"theirs")
    index = world.document(".datastore-index.json")
    index["entries"][name] = entry(name, b"theirs")
    world.put(".datastore-index.json", index)
    other = world.cache("b")
    other.pull()
    assert other.read(name) is None
    assert world.body(name) == b"theirs"


def test_a_polluted_version_1_index_is_scrubbed_once_and_then_quiet(world):
    world.load(FILES, "v1")
    index = world.document(".datastore-index.json")
    index["entries"]["data/_catalog.db-wal"] = entry("data/_catalog.db-wal", b"x")
    world.put(".datastore-index.json", index)
    cache = world.cache("a")
    cache.pull()
    assert cache.push() == 0
    assert set(world.entries()) == set(FILES)
    _, log = world.requests(cache.push)
    assert not [op for op, _ in log if op == "put"]


def test_internal_entries_injected_after_a_scrub_are_skipped_all_the_same(world):
    world.load(FILES, "v1")
    cache = world.cache("a")
    cache.pull()
    index = world.document(".datastore-index.json")
    index["entries"]["data/m/.lock"] = entry("data/m/.lock", b"x")
    world.put(".datastore-index.json", index)
    world.put("data/m/.lock", b"x")
    assert cache.pull() == 0
    assert cache.read("data/m/.lock") is None


def test_a_local_index_of_the_existing_extensions_is_left_alone_and_not_believed(world):
    world.load(FILES, "v1")
    cache = world.cache("a")
    stale = compact(
        {"version": 1, "lastPulled": STAMP, "entries": {"data/_catalog.db": entry("data/_catalog.db", b"")}}
    )
    local = cache.directory / ".datastore-index.json"
    local.write_bytes(stale)
    assert cache.pull() == len(FILES)
    assert local.read_bytes() == stale


def test_an_empty_bucket_is_an_empty_index_and_nothing_is_written(world):
    cache = world.cache("a")
    count, log = world.requests(cache.pull)
    assert count == 0
    assert {op for op, _ in log} <= {"get", "list"}
    assert world.keys() == set()


def test_a_bucket_without_index_is_read_from_its_listing(world):
    world.load(FILES, "none")
    cache = world.cache("a")
    count, log = world.requests(cache.pull)
    assert count == len(FILES)
    assert [op for op, key in log if key.startswith("_index") or key.endswith("index.json") or op == "list"] == [
        "get",
        "get",
        "list",
    ]
    # Better than the reference: a pull is a reader and publishes nothing; the first commit does.
    assert world.keys() == set(FILES)


def test_discovery_leaves_out_internal_keys_foreign_namespaces_and_directory_markers(world):
    world.load(FILES, "none")
    for key in ("infra/.namespace.json", "infra/data/x/y/z/1/raw", "data/", "", ".locks/infra.lock", "a/_index/x.json"):
        world.put(key, b"")
    cache = world.cache("a")
    assert cache.pull() == len(FILES)
    assert cache.files() == set(FILES)


def test_a_push_against_an_unindexed_bucket_yields_a_complete_merged_index(world):
    world.load(FILES, "none")
    cache = world.cache("a")
    cache.write("outputs/test/run/x-1.yaml", b"new")
    assert cache.push() == 1
    assert set(world.entries()) == {*FILES, "outputs/test/run/x-1.yaml"}
    world.check()


@pytest.mark.parametrize("error", [AccessDeniedError("403"), StoreBusyError("503")], ids=["403", "503"])
def test_a_failing_index_stops_everything_and_writes_nothing(loaded, error):
    cache = loaded.cache("a")
    cache.write(f"{MODEL}/latest", b"9")
    before = dict(loaded.bucket.objects)
    loaded.fail("get", "ndex", error=error, times=99)
    for call in (cache.pull, cache.push):
        with pytest.raises(type(error)):
            call()
    assert loaded.bucket.objects == before


def test_an_unreadable_index_stops_everything_and_writes_nothing(world):
    world.load(FILES, "v1")
    world.put(".datastore-index.json", b'{"version":1,"entries"')
    cache = world.cache("a")
    cache.write(f"{MODEL}/latest", b"9")
    before = dict(world.bucket.objects)
    for call in (cache.pull, cache.push):
        with pytest.raises(IndexCorruptError):
            call()
    assert world.bucket.objects == before


def test_slow_paths_ask_the_remote_however_fresh_the_local_copy_is(loaded):
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    two.write(f"{MODEL}/latest", b"2")
    two.push()
    assert one.pull() == 1
    assert one.read(f"{MODEL}/latest") == b"2"


def test_a_transient_shard_failure_is_retried_and_a_lasting_one_never_downgrades(world):
    world.load(FILES, "v2")
    meta = world.body("_index/_meta.json")
    cache = world.cache("a")
    world.fail("get", "_index/audit", times=2)
    assert cache.pull() == len(FILES)
    fresh = world.cache("b")
    fresh.write("audit/b.jsonl", b"{}")
    world.fail("get", "_index/audit", times=99)
    for call in (fresh.pull, fresh.push):
        with pytest.raises(Exception, match="no answer"):
            call()
    assert world.body("_index/_meta.json") == meta
    assert ".datastore-index.json" not in world.keys()


def test_a_listed_but_missing_shard_is_corruption_and_the_monolith_is_not_asked(world):
    world.load(FILES, "v2")
    world.put(".datastore-index.json", compact({"version": 1, "entries": {}}))
    world.bucket.delete("_index/audit.json")
    cache = world.cache("a")
    with pytest.raises(IndexCorruptError, match=r"index is corrupt: _index/audit\.json"):
        cache.pull()
    assert ("get", ".datastore-index.json") not in world.recorder.log


@pytest.mark.parametrize("meta", [{"version": 3, "partitions": []}, {"version": 2}, {"version": "2", "partitions": []}])
def test_an_unknown_meta_raises_and_nothing_is_written(world, meta):
    world.load(FILES, "v1")
    world.put("_index/_meta.json", meta)
    cache = world.cache("a")
    cache.write(f"{MODEL}/latest", b"9")
    before = dict(world.bucket.objects)
    for call in (cache.pull, cache.push):
        with pytest.raises(IndexVersionError):
            call()
    assert world.bucket.objects == before


def test_under_a_version_1_meta_the_monolith_is_the_truth(world):
    """H11: an old client updated the monolith only, so its shards are stale."""
    world.load(FILES, "v1")
    stale = {"version": 1, "entries": {"audit/zombie.jsonl": entry("audit/zombie.jsonl", b"")}}
    world.put("_index/audit.json", stale)
    world.put("_index/_meta.json", {"version": 1, "partitions": ["audit"]})
    cache = world.cache("a")
    assert cache.pull() == len(FILES)
    assert cache.files() == set(FILES)


# --- the fast path -----------------------------------------------------------------------------------------


def test_a_second_pull_or_push_transfers_no_index(loaded):
    cache = loaded.cache("a")
    cache.pull()
    for call in (cache.pull, cache.push):
        count, log = loaded.requests(call)
        assert count == 0
        # Version 1 asks twice, conditionally: meta may say that the store was migrated (H41).
        assert len(log) == (1 if "_index/_meta.json" in loaded.keys() else 2)
        assert bodies([pair for pair in log if pair[0] == "get" and loaded.body(pair[1]) is not None]) == []


def test_a_remote_change_defeats_the_fast_path(loaded):
    one, two = loaded.cache("a"), loaded.cache("b")
    one.pull()
    two.pull()
    one.write("audit/b.jsonl", b"2")
    one.push()
    assert (two.pull(), two.pull()) == (1, 0)


@pytest.mark.parametrize(("field", "etag"), [("remoteIndexETag", "abc-3"), ("remoteIndexGeneration", "0")])
def test_fingerprints_of_parts_and_generation_zero_are_never_stored(tmp_path, field, etag):
    from swampfs.records import IndexMode, Watermark
    from swampfs.state.sidecar import Sidecar, is_usable_fingerprint

    sidecar = Sidecar(str(tmp_path), field)
    sidecar.verify(Watermark(IndexMode.MONOLITH, 0, "", etag), STAMP)
    assert json.loads((tmp_path / ".datastore-sync-state.json").read_text())[field] == ""
    assert not is_usable_fingerprint(field, etag)
    assert is_usable_fingerprint(field, "5f2b1c0e9d8a-x")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"version":3,"remoteIndexETag":"","lastVerifiedAt":"","localDirty":false}',
     '{"version":2,"remoteIndexETag":1,"lastVerifiedAt":"","localDirty":false}',
     '{"version":2,"remoteIndexETag":"","lastVerifiedAt":"","localDirty":"no"}',
     '{"version":2,"remoteIndexGeneration":"1","lastVerifiedAt":"","localDirty":false}'],
)  # fmt: skip
def test_a_damaged_sidecar_means_the_full_path_and_no_exception(loaded, text):
    cache = loaded.cache("a")
    cache.pull()
    cache.sidecar_path.write_text(text)
    cache.restart()
    cache.put("audit/unmarked.jsonl", b"found by the walk")
    assert cache.pull() == 0
    assert cache.push() == 1
    assert "audit/unmarked.jsonl" in loaded.entries()


def test_the_recorded_state_is_of_the_bytes_that_were_read(loaded):
    """Lesson 5: a commit between our reading and our bookkeeping must not be taken for seen."""
    one, two = loaded.cache("a"), loaded.cache("b")
    two.pull()
    two.write("audit/b.jsonl", b"2")
    loaded.fail("get", "audit/a.jsonl", action=two.service and (lambda: None))
    loaded.faulty.faults.clear()
    loaded.fail("get", f"{MODEL}/latest", action=lambda: _in_a_thread(two.push))
    one.pull()
    assert one.pull() == 1
    assert one.read("audit/b.jsonl") == b"2"


def _in_a_thread(fn):
    """Another machine's doing while a worker of ours waits: it brings its own loop."""
    import threading

    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


def test_a_failing_probe_is_not_an_answer(loaded):
    cache = loaded.cache("a")
    cache.pull()
    loaded.fail("get", "ndex", error=StoreBusyError("503"), times=2)
    assert cache.pull() == 0


def test_an_equal_commit_sequence_is_no_work_and_a_different_one_is(world):
    world.load(FILES, "v2")
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    assert one.sidecar()["commitSeq"] == 1
    two.pull()
    two.write("audit/b.jsonl", b"2")
    two.push()
    assert one.pull() == 1
    assert (one.sidecar()["commitSeq"], one.pull()) == (2, 0)


def test_a_verified_sync_is_later_than_the_local_index(world):
    """So that the existing extensions, whose local index we do not touch, may take their fast path after us."""
    world.load(FILES, "v1")
    cache = world.cache("a")
    (cache.directory / ".datastore-index.json").write_bytes(world.body(".datastore-index.json") or b"")
    cache.pull()
    sidecar = cache.sidecar()
    assert sidecar["remoteIndexETag"] == world.bucket.head(".datastore-index.json").etag
    from swampfs.records import timestamp_ns

    assert (
        timestamp_ns(sidecar["lastVerifiedAt"])
        >= os.stat(cache.directory / ".datastore-index.json").st_mtime_ns - 1_000_000
    )


def test_dirty_work_is_pushed_though_nothing_moved_remotely(loaded):
    cache = loaded.cache("a")
    cache.pull()
    cache.write("audit/b.jsonl", b"2")
    cache.restart()
    assert cache.push() == 1


def test_after_a_lazy_pull_a_full_pull_in_a_new_process_brings_the_content(loaded):
    """H10."""
    cache = loaded.cache("a")
    assert cache.pull(metadata_only=True) == len(FILES) - 1
    assert cache.sidecar()["lazyPullActive"] is True
    cache.restart()
    assert cache.pull() == 1
    assert cache.read(f"{MODEL}/1/raw") == b"one"
    assert cache.sidecar()["lazyPullActive"] is False


def test_a_first_scoped_pull_of_a_model_without_shard_leaves_the_next_pull_working(world):
    """H41: on version 2 an unlisted shard means "no entries", and the frozen monolith is never consulted."""
    world.load(FILES, "v2")
    world.put(".datastore-index.json", compact({"version": 1, "entries": {"audit/ghost": entry("audit/ghost", b"")}}))
    from swampfs.names import ModelRef
    from swampfs.provider import SyncContext

    one, two = world.cache("a"), world.cache("b")
    assert one.pull(context=SyncContext((ModelRef("test", "new"),))) == 0
    assert ("get", ".datastore-index.json") not in world.recorder.log
    two.pull()
    two.write("audit/b.jsonl", b"2")
    two.push()
    assert one.pull() == len(FILES) + 1
    assert "audit/ghost" not in one.files()


def test_unknown_fields_survive_reading_and_writing(loaded):
    cache = loaded.cache("a")
    keys = [".datastore-index.json"] if ".datastore-index.json" in loaded.keys() else ["_index/audit.json"]
    for key in keys:
        document = loaded.document(key)
        document["note"] = {"x": 1}
        document["entries"]["audit/a.jsonl"]["flavour"] = "salt"
        loaded.put(key, document)
    cache.pull()
    cache.write("audit/a.jsonl", b"changed")
    assert cache.push() == 1
    for key in keys:
        assert loaded.document(key)["note"] == {"x": 1}
    assert loaded.entries()["audit/a.jsonl"]["flavour"] == "salt"


def test_a_mismatch_that_stays_names_the_file_and_the_rest_is_pulled(loaded):
    loaded.put(f"{MODEL}/latest", b"7")
    cache = loaded.cache("a")
    with pytest.raises(TransferError, match=r"Failed to pull 1 file\(s\) from memory: data/test/m1/state/latest"):
        cache.pull()
    assert cache.files() == set(FILES) - {f"{MODEL}/latest"}
