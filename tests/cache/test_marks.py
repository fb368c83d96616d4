"""``mark_dirty`` and the sidecar (spec §4, §13: 37–48), shared with the existing extensions."""

from __future__ import annotations

import json
import multiprocessing

import pytest

from swampfs.errors import TransferError
from swampfs.state.sidecar import Sidecar
from tests.caches import MODEL, STAMP, Cache, World


@pytest.fixture
def cache(world: World) -> Cache:
    cache = world.cache("a")
    cache.write(f"{MODEL}/latest", b"1")
    cache.push()
    return cache


def test_a_mark_is_durable_before_it_returns_and_survives_a_restart(cache):
    cache.mark(f"{MODEL}/2/raw")
    sidecar = cache.sidecar()
    assert (sidecar["localDirty"], sidecar["dirtyPaths"]) == (True, [f"{MODEL}/2/raw"])
    cache.restart()
    cache.put(f"{MODEL}/2/raw", b"two")
    assert cache.push() == 1


def test_a_mark_asks_nothing_of_the_store(cache):
    _, log = cache.world.requests(lambda: [cache.mark(), cache.mark("data/x"), cache.mark("../../etc/passwd")])
    assert log == []


def test_a_mark_made_twice_writes_once_but_never_leaves_the_cache_clean(cache):
    """H5: a commit cleared ``localDirty`` and left the path behind; the same mark again must count."""
    cache.mark("data/x")
    before = cache.sidecar_path.stat().st_ino
    cache.mark("data/x")
    assert cache.sidecar_path.stat().st_ino == before
    cache.write_sidecar(dirtyPaths=["data/x"], localDirty=False)
    cache.mark("data/x")
    assert cache.sidecar()["localDirty"] is True
    cache.write_sidecar(bulkInvalidated=True, localDirty=False)
    cache.mark("data/y")
    assert cache.sidecar()["localDirty"] is True


def test_the_cap_of_200_paths_turns_into_bulk_and_overflow(cache):
    for number in range(200):
        cache.mark(f"data/test/n{number}")
    sidecar = cache.sidecar()
    assert len(sidecar["dirtyPaths"]) == 200
    assert not sidecar["bulkInvalidated"]
    assert not sidecar["dirtyPathsOverflowed"]
    cache.mark("data/test/n200")
    sidecar = cache.sidecar()
    assert len(sidecar["dirtyPaths"]) == 200
    assert sidecar["bulkInvalidated"]
    assert sidecar["dirtyPathsOverflowed"]


@pytest.mark.parametrize("rel", [None, "", "../outside", "/etc/passwd", "a/../../b"])
def test_a_mark_without_path_or_outside_the_cache_is_bulk_and_no_overflow(cache, rel):
    cache.do("mark_dirty", rel_path=rel)
    sidecar = cache.sidecar()
    assert sidecar["bulkInvalidated"]
    assert sidecar["localDirty"]
    assert not sidecar["dirtyPathsOverflowed"]
    assert sidecar["dirtyPaths"] == []


def test_paths_are_stored_normalised(cache):
    cache.mark("./data//swamp/echo/")
    assert cache.sidecar()["dirtyPaths"] == ["data/swamp/echo"]


@pytest.mark.parametrize("two_phase", [False, True])
def test_after_any_commit_the_same_path_marked_again_is_pushed_again(cache, two_phase):
    for number in range(3):
        cache.write(f"{MODEL}/latest", f"again {number}".encode())
        assert (cache.commit(cache.prepare()) if two_phase else cache.push()) == 1
        assert cache.world.body(f"{MODEL}/latest") == f"again {number}".encode()


def test_after_a_bulk_two_phase_commit_marks_of_paths_still_work(cache):
    cache.mark()
    cache.put("audit/a.jsonl", b"1")
    assert cache.commit(cache.prepare()) == 1
    cache.write("audit/a.jsonl", b"2")
    assert cache.sidecar()["dirtyPaths"] == ["audit/a.jsonl"]
    assert cache.push() == 1


def test_a_clean_version_1_sidecar_is_accepted_and_rewritten_as_version_2(cache):
    v1 = {"version": 1, "remoteIndexETag": "x", "lastVerifiedAt": STAMP, "localDirty": False}
    cache.sidecar_path.write_text(json.dumps(v1))
    cache.restart()
    assert cache.push() == 0
    cache.mark("data/x")
    assert cache.sidecar()["version"] == 2
    assert cache.sidecar()["remoteIndexETag"] == "x"


def test_a_dirty_version_1_sidecar_means_a_full_walk(cache):
    v1 = {"version": 1, "remoteIndexETag": "x", "lastVerifiedAt": STAMP, "localDirty": True}
    cache.sidecar_path.write_text(json.dumps(v1))
    cache.restart()
    cache.put("audit/somewhere.jsonl", b"x")
    assert cache.push() == 1
    assert cache.sidecar()["version"] == 2


def test_a_version_2_sidecar_with_only_the_first_fields_is_accepted(cache):
    cache.write_sidecar(localDirty=True, dirtyPaths=["audit/a.jsonl"], bulkInvalidated=False)
    cache.restart()
    cache.put("audit/a.jsonl", b"x")
    cache.put("audit/unmarked.jsonl", b"x")
    assert cache.push() == 1


def test_every_write_of_the_sidecar_keeps_what_it_does_not_set(cache):
    """H3, H31: dropping ``dataKeyMigrated`` let one tenant take over another's data."""
    cache.pull()
    kept = {"commitSeq": 42, "dataKeyMigrated": True, "lastCatalogHash": "f" * 64, "future": [1]}
    cache.write_sidecar(**kept, lazyPullActive=True)
    sidecar = Sidecar(str(cache.directory))
    for write in (
        lambda: sidecar.mark_path("data/x"),
        sidecar.mark_bulk,
        sidecar.mark_unsettled,
        lambda: sidecar.retire(["data/x"], [], None, STAMP, bulk_done=True),
    ):
        write()
        now = cache.sidecar()
        assert {name: now[name] for name in kept} == kept
        assert now["lazyPullActive"] is True
    cache.restart()
    cache.pull(metadata_only=True)
    cache.push()
    now = cache.sidecar()
    assert (now["dataKeyMigrated"], now["lastCatalogHash"], now["future"]) == (True, "f" * 64, [1])


def test_a_mark_made_during_a_push_survives_it(cache):
    """H25."""
    cache.write(f"{MODEL}/latest", b"2")
    manifest = cache.prepare()
    cache.write(f"{MODEL}/latest", b"3")
    cache.write("audit/a.jsonl", b"1")
    assert cache.commit(manifest) == 1
    assert set(cache.sidecar()["dirtyPaths"]) == {f"{MODEL}/latest", "audit/a.jsonl"}
    cache.restart()
    assert cache.push() == 2
    assert cache.world.body(f"{MODEL}/latest") == b"3"


def test_overlapping_pushes_of_one_cache_lose_no_mark(cache):
    cache.write(f"{MODEL}/latest", b"2")
    first, second = cache.prepare(), cache.prepare()
    cache.commit(second)
    cache.write(f"{MODEL}/latest", b"3")
    cache.commit(first)
    assert cache.push() == 1
    assert cache.world.body(f"{MODEL}/latest") == b"3"


def _mark_many(directory: str, name: str, count: int) -> None:
    import trio

    from swampfs.datastore import ObjectStoreProvider
    from swampfs.testing.memory import MemoryStore

    service = ObjectStoreProvider(MemoryStore(), "@swampfs/memory", "memory").create_sync_service("/", directory)

    async def mark() -> None:
        for number in range(count):
            await service.mark_dirty(rel_path=f"data/{name}/{number}")

    trio.run(mark)
    service.close()


def test_two_processes_marking_at_once_lose_nothing(cache):
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_mark_many, args=(str(cache.directory), name, 60)) for name in ("x", "y")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(cache.sidecar()["dirtyPaths"]) == 120
    assert len(cache.service._log.marked()[0]) == 120


def test_a_failed_push_leaves_every_mark(cache):
    cache.write(f"{MODEL}/latest", b"2")
    cache.write("audit/a.jsonl", b"1")
    before = cache.sidecar()
    fault = cache.world.fail("put", "audit/a.jsonl", times=99)
    with pytest.raises(TransferError):
        cache.push()
    assert cache.sidecar() == before
    fault.times = 0
    assert cache.push() == 2


def test_a_mark_whose_write_is_still_to_come_outlives_a_push_in_between(cache):
    """Parallel model steps share a cache: one's push must not take the other's announcement away."""
    cache.mark(f"{MODEL}/5/raw")
    cache.write("audit/a.jsonl", b"1")
    assert cache.push() == 1
    cache.put(f"{MODEL}/5/raw", b"late")
    assert cache.push() == 1


def test_marks_are_cheap_in_bulk(cache):
    """Linear by construction: over the cap a mark writes one row and replaces no file (lesson 50)."""
    for number in range(201):
        cache.mark(f"data/test/n{number}")
    before = cache.sidecar_path.stat().st_ino
    for number in range(300):
        cache.mark(f"data/test/more{number}")
    assert cache.sidecar_path.stat().st_ino == before
