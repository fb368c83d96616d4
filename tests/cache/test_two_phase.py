"""Two-phase push (spec §7.3, §13: 74–81) and fencing."""

from __future__ import annotations

import pytest
import trio

from swampfs.errors import (
    ConflictingWriteError,
    IndexCorruptError,
    LeaseLostError,
    StoreUnreachableError,
    TransferError,
)
from swampfs.provider import LockOptions
from tests.caches import MODEL, World

FILES = {f"{MODEL}/1/raw": b"one", f"{MODEL}/latest": b"1", "audit/a.jsonl": b"{}"}


@pytest.fixture(params=["v1", "v2"])
def cache(request, world: World):
    world.load(FILES, request.param)
    cache = world.cache("a")
    cache.pull()
    return cache


def index_of(world):
    return {key: body for key, (body, _) in world.bucket.objects.items() if "ndex" in key}


def test_preparing_writes_no_index_and_keeps_every_mark(cache):
    cache.write(f"{MODEL}/2/raw", b"two")
    cache.remove("audit/a.jsonl")
    before, sidecar = index_of(cache.world), cache.sidecar()
    manifest = cache.prepare()
    assert (manifest.pushed, manifest.deleted) == (1, 1)
    assert set(manifest.new_entries) == {f"{MODEL}/2/raw"}
    assert manifest.deleted_keys == ("audit/a.jsonl",)
    assert manifest.dirty_partition_keys == {"data--test--m1", "audit"}
    assert (index_of(cache.world), cache.sidecar()) == (before, sidecar)
    assert cache.world.body("audit/a.jsonl") is not None


def test_a_commit_merges_into_the_index_as_it_is_then(cache):
    other = cache.world.cache("b")
    other.pull()
    cache.write(f"{MODEL}/2/raw", b"from a")
    other.write(f"{MODEL}/3/raw", b"from b")
    mine, theirs = cache.prepare(), other.prepare()
    assert (other.commit(theirs), cache.commit(mine)) == (1, 1)
    assert {f"{MODEL}/2/raw", f"{MODEL}/3/raw"} <= set(cache.world.entries())
    cache.world.check()


def test_preparing_and_committing_equals_one_push(tmp_path, cache):
    single = World(tmp_path / "single")
    single.bucket.objects = dict(cache.world.bucket.objects)
    other = single.cache("a")
    other.pull()
    for machine in (cache, other):
        machine.write(f"{MODEL}/2/raw", b"two")
        machine.remove("audit/a.jsonl")
    assert other.push() == cache.commit(cache.prepare()) == 2
    one, two = single.entries(), cache.world.entries()
    assert set(one) == set(two)
    assert single.keys() == cache.world.keys()


def test_an_empty_manifest_is_nothing_and_makes_no_incomplete_cache_clean(cache):
    other = cache.world.cache("b")
    assert other.commit(other.prepare()) == 0
    assert "commitSeq" not in other.sidecar()
    assert other.sidecar()["remoteIndexETag"] == ""
    assert other.pull() == len(FILES)


def test_creating_and_deleting_in_one_manifest_gives_the_right_shard(cache):
    cache.write("audit/b.jsonl", b"b")
    cache.remove("audit/a.jsonl")
    assert cache.commit(cache.prepare()) == 2
    assert set(cache.world.entries()) == {f"{MODEL}/1/raw", f"{MODEL}/latest", "audit/b.jsonl"}
    assert list(cache.world.document("_index/audit.json")["entries"]) == ["audit/b.jsonl"]


def test_many_partitions_are_one_commit(world):
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.write(f"{MODEL}/2/raw", b"two")
    cache.write("audit/b.jsonl", b"b")
    cache.write("logs/x", b"x")
    assert cache.commit(cache.prepare()) == 3
    assert world.document("_index/_meta.json") == {
        "version": 2,
        "partitions": ["audit", "data--test--m1", "data--test--m1--state", "logs"],
        "commitSeq": 2,
    }


def test_a_shard_missing_at_commit_is_never_written_empty(world):
    """H7."""
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.write("audit/b.jsonl", b"b")
    manifest = cache.prepare()
    world.bucket.delete("_index/audit.json")
    before = index_of(world)
    with pytest.raises(IndexCorruptError, match="listed but missing"):
        cache.commit(manifest)
    assert index_of(world) == before


def test_a_commit_after_its_lock_was_lost_writes_nothing(cache):
    """H18."""
    cache.write(f"{MODEL}/2/raw", b"two")
    before = index_of(cache.world)

    async def paused() -> None:
        lock = cache.provider.create_lock("/d", LockOptions(ttl_ms=60_000))
        await lock.acquire()
        manifest = await cache.service.prepare_push()
        cache.world.bucket.delete(".datastore.lock")  # taken over, and given back, while we were away
        await lock._lock.renew()
        assert lock.lost
        with pytest.raises(LeaseLostError):
            await cache.service.commit_push(manifest)
        await lock.release()

    trio.run(paused)
    assert index_of(cache.world) == before
    assert cache.push() == 1


def test_a_paused_holder_cannot_overwrite_its_successors_commit(cache):
    """H18: every index document is put conditionally, so both changes are in the result."""
    other = cache.world.cache("b")
    other.pull()
    cache.write("audit/b.jsonl", b"from a")
    manifest = cache.prepare()
    other.write("audit/c.jsonl", b"from b")
    fault = cache.world.fail("put", "ndex", action=lambda: _elsewhere(other.push))
    assert cache.commit(manifest) == 1
    assert fault.times == 0
    assert {"audit/b.jsonl", "audit/c.jsonl"} <= set(cache.world.entries())


def _elsewhere(fn):
    import threading

    thread = threading.Thread(target=fn)
    thread.start()
    thread.join()


def test_the_same_path_committed_by_another_between_the_phases_is_noticed(cache):
    other = cache.world.cache("b")
    other.pull()
    cache.write(f"{MODEL}/latest", b"from a")
    manifest = cache.prepare()
    other.write(f"{MODEL}/latest", b"from b")
    other.push()
    with pytest.raises(ConflictingWriteError, match="committed by another machine"):
        cache.commit(manifest)
    assert cache.sidecar()["localDirty"]
    cache.push()
    cache.pull()
    cache.world.check()
    kept = {cache.world.body(f"{MODEL}/latest"), *cache.asides()}
    assert {b"from a", b"from b"} <= kept


def test_a_deletion_overtaken_by_a_commit_is_noticed(cache):
    other = cache.world.cache("b")
    other.pull()
    cache.remove(f"{MODEL}/latest")
    manifest = cache.prepare()
    other.write(f"{MODEL}/latest", b"new")
    other.push()
    with pytest.raises(ConflictingWriteError):
        cache.commit(manifest)
    cache.push()
    assert cache.world.body(f"{MODEL}/latest") == b"new"


def test_committing_on_a_service_that_is_not_bound_goes_to_the_namespace_named(world):
    """H27."""
    cache = world.cache("a", "infra")
    cache.write(f"{MODEL}/latest", b"1")
    manifest = cache.prepare()
    assert cache.commit(manifest) == 1
    assert all(key.startswith("infra/") for key in world.keys())


def test_a_preview_changes_nothing_anywhere(cache):
    cache.write(f"{MODEL}/2/raw", b"two")
    cache.write(f"{MODEL}/latest", b"2")
    cache.remove("audit/a.jsonl")
    before, sidecar = dict(cache.world.bucket.objects), cache.sidecar()
    assert cache.do("preview_push") == (3, 1, 1, 1)
    assert (cache.world.bucket.objects, cache.sidecar()) == (before, sidecar)
    assert cache.push() == 3
    assert cache.do("preview_push") == (0, 0, 0, 0)


def test_a_first_prepare_in_a_namespace_that_fails_leaves_the_work_marked(world):
    """H38: the reference stores "clean" before it uploads."""
    cache = world.cache("a", "infra")
    cache.write("audit/a.jsonl", b"1")
    fault = world.fail("put", "audit/a.jsonl", times=99)
    with pytest.raises(TransferError):
        cache.prepare()
    assert cache.sidecar()["localDirty"] is True
    fault.times = 0
    cache.mark("audit/a.jsonl")
    cache.restart()
    assert cache.commit(cache.prepare()) == 1


@pytest.mark.parametrize("step", ["_index/audit.json", "_index/_meta.json"])
def test_a_migration_does_not_replace_what_was_committed_meanwhile(world, step):
    """H12, H18: somebody commits without our lock, or after we lost it."""
    world.load(FILES, "v2")
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    two.pull()
    two.write("audit/b.jsonl", b"b")
    two.write("logs/new", b"n")
    world.fail("put", step, action=lambda: _elsewhere(two.push))
    with pytest.raises(ConflictingWriteError, match="written by another machine meanwhile"):
        one.do("migrate_monolith_to_shards")
    assert {"audit/b.jsonl", "logs/new"} <= set(world.entries())
    assert world.cache("c").pull() == len(FILES) + 2


def test_a_leftover_shard_that_is_needed_again_is_not_swept(world):
    """Between our look and our delete, another machine's commit listed it again."""
    world.load(FILES, "v2")
    world.put("_index/logs.json", {"version": 1, "entries": {}})  # of a commit that died before its meta
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    two.pull()
    two.write("logs/x", b"x")
    one.write("logs/y", b"y")
    one.push()
    one.remove("logs/y")
    world.fail("put", "_index/_meta.json", action=lambda: _elsewhere(two.push))
    with pytest.raises(ConflictingWriteError):
        one.push()
    assert world.cache("c").pull() >= len(FILES) + 1
    one.push()
    assert {"logs/x"} | set(FILES) == set(world.entries())
    assert world.cache("d").pull() == len(FILES) + 1


def test_a_late_version_1_commit_leaves_the_shards_of_a_migration_alone(world):
    world.load(FILES, "v1")
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    two.pull()
    one.write("audit/b.jsonl", b"b")
    two.write("audit/c.jsonl", b"c")

    def migrate_and_push() -> None:
        two.do("migrate_monolith_to_shards")
        two.push()

    world.fail("put", ".datastore-index.json", action=lambda: _elsewhere(migrate_and_push))
    one.push()
    assert "audit/c.jsonl" in world.entries()


def test_an_object_sent_and_not_committed_gives_way_to_what_others_committed(world):
    """The answer of our commit was lost, another machine went on from there: publishing ours again would revert it."""
    from swampfs.testing.faults import When

    world.load(FILES, "v2")
    one, two = world.cache("a"), world.cache("b")
    one.pull()
    one.write(f"{MODEL}/latest", b"5")
    world.fail("put", "_index/_meta.json", when=When.AFTER, times=99)
    with pytest.raises((StoreUnreachableError, ConflictingWriteError)):
        one.push()
    world.faulty.faults.clear()
    two.pull()
    two.write(f"{MODEL}/latest", b"6")
    two.push()
    one.restart()
    one.push()
    assert world.body(f"{MODEL}/latest") == b"6"
    one.pull()
    assert one.read(f"{MODEL}/latest") == b"6"
    assert b"5" in one.asides()


def test_what_is_uploaded_unmarked_counts_as_dirty_until_it_is_committed(world):
    """An object newer than its entry: until the commit no client may take this cache for clean."""
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    other = world.cache("b")
    other.write("logs/x", b"x")
    other.push()
    cache.put("audit/unmarked.jsonl", b"u")  # found by the walk that a remote change causes
    cache.prepare()
    assert cache.sidecar()["localDirty"] is True
    cache.restart()
    assert cache.push() == 1


def test_a_file_with_the_same_hashless_entry_is_published_when_it_was_marked(world):
    """Lost otherwise: a listing put our uncommitted upload into the index, and then we wrote again."""
    world.put(f"{MODEL}/latest", b"1")
    cache = world.cache("a")
    cache.write(f"{MODEL}/latest", b"2")
    assert cache.push() == 1
    assert world.body(f"{MODEL}/latest") == b"2"
    world.check()
