"""Swamp's lock contract, retries, timeouts, aborts and the verifier (spec §9, §10, §13: 111–122)."""

from __future__ import annotations

import time

import pytest
import trio

from swampfs.backends.retry import RetryingStore
from swampfs.errors import (
    AbortedError,
    AbsentError,
    AccessDeniedError,
    LockTimeoutError,
    PreconditionError,
    StoreBusyError,
    StoreUnreachableError,
)
from swampfs.names import Keyspace, ModelRef, model_of
from swampfs.provider import ABSENT, AbortSignal, LockOptions, matching
from swampfs.settings import s3_source
from swampfs.sync.locks import decode_lock, encode_lock
from swampfs.testing.memory import MemoryStore
from tests.caches import MODEL, World
from tests.engine import Store

KEY = ".datastore.lock"
FAST = LockOptions(ttl_ms=60_000, retry_interval_ms=20, max_wait_ms=150)


def test_a_lock_is_seen_with_all_its_fields_while_it_is_held(world):
    async def live() -> None:
        lock = world.provider().create_lock("/d")
        assert await lock.inspect() is None
        await lock.acquire()
        info = await world.provider().create_lock("/d").inspect()
        assert set(info.as_json()) == {"holder", "hostname", "pid", "acquiredAt", "ttlMs", "nonce"}
        assert all(info.as_json().values())
        assert world.body(KEY) == encode_lock(info)
        await lock.release()
        await lock.release()
        assert await lock.inspect() is None

    trio.run(live)


def test_the_second_acquirer_is_told_who_holds_the_lock(world):
    async def contend() -> None:
        first, second = world.provider().create_lock("/d"), world.provider().create_lock("/d", FAST)
        await first.acquire()
        with pytest.raises(LockTimeoutError) as refusal:
            await second.acquire()
        holder = (await first.inspect()).holder
        assert str(refusal.value).startswith(f'Lock "{KEY}" held by {holder} (pid ')
        assert f"timed out after {refusal.value.waited_ms}ms" in str(refusal.value)
        assert (refusal.value.lock_key, refusal.value.holder.holder) == (KEY, holder)
        assert refusal.value.waited_ms >= 150
        await first.release()

    trio.run(contend)


def test_the_wait_of_two_who_back_off_is_bounded(world):
    """Lesson 29: a ``continue`` skipped the timeout, and the wait never ended."""
    world.put(KEY, b'{"not": "a lock"}')

    async def wait() -> None:
        with trio.fail_after(5), pytest.raises(LockTimeoutError, match="timed out after"):
            await world.provider().create_lock("/d", FAST).acquire()

    trio.run(wait)


def test_a_stale_lock_is_taken_over_with_a_pause_and_by_one_only(world):
    dead = decode_lock(
        b'{"holder":"x@y","hostname":"y","pid":1,"acquiredAt":"2026-01-01T00:00:00.000Z","ttlMs":100,"nonce":"n"}'
    )
    world.put(KEY, encode_lock(dead))
    options = LockOptions(ttl_ms=60_000, retry_interval_ms=20, max_wait_ms=3_000)

    async def steal() -> None:
        locks = [world.provider().create_lock("/d", options) for _ in range(4)]
        winners = []
        started = time.monotonic()

        async def try_one(lock) -> None:
            try:
                await lock.acquire()
                winners.append((lock, time.monotonic() - started))
            except LockTimeoutError:
                pass

        async with trio.open_nursery() as nursery:
            for lock in locks:
                nursery.start_soon(try_one, lock)
        assert len(winners) == 1
        assert winners[0][1] >= 0.1  # not before the TTL had passed on our own clock
        await winners[0][0].release()

    trio.run(steal)


def test_a_clock_that_is_ahead_steals_no_live_lock(world):
    """H30, lesson 37: ``acquiredAt`` is a year old, but its holder renews it."""

    async def contend() -> None:
        holder = world.provider().create_lock("/d", LockOptions(ttl_ms=300))
        await holder.acquire()
        waiting = world.provider().create_lock("/d", LockOptions(retry_interval_ms=20, max_wait_ms=900))
        with pytest.raises(LockTimeoutError):
            await waiting.acquire()
        assert not holder.lost
        await holder.release()

    trio.run(contend)


def test_release_and_heartbeat_leave_a_successors_lock_alone(world):
    """Lesson 32."""

    async def overtake() -> None:
        first = world.provider().create_lock("/d", LockOptions(ttl_ms=300))
        await first.acquire()
        world.bucket.delete(KEY)
        second = world.provider().create_lock("/d")
        await second.acquire()
        theirs = world.body(KEY)
        await trio.sleep(0.25)
        assert first.lost
        await first.release()
        assert world.body(KEY) == theirs
        await second.release()

    trio.run(overtake)


def test_force_release_needs_the_nonce_and_with_lock_always_releases(world):
    async def force() -> None:
        lock, other = world.provider().create_lock("/d"), world.provider().create_lock("/d")
        assert await other.force_release("n") is False
        await lock.acquire()
        nonce = (await other.inspect()).nonce
        assert await other.force_release("wrong") is False
        assert await other.force_release(nonce) is True
        assert await other.inspect() is None
        await lock.release()

        async def fail() -> None:
            assert await other.inspect() is not None
            raise KeyError("inside")

        with pytest.raises(KeyError):
            await lock.with_lock(fail)
        assert await other.inspect() is None

    trio.run(force)


def test_a_network_error_is_not_an_unlocked_lock(world):
    """H17."""

    async def look() -> None:
        lock = world.provider().create_lock("/d")
        world.fail("get", KEY, times=9)
        with pytest.raises(StoreUnreachableError):
            await lock.inspect()

    trio.run(look)


def test_an_acquisition_whose_answer_was_lost_is_recognised(world):
    """H28."""
    from swampfs.testing.faults import When

    async def acquire() -> None:
        world.fail("put", KEY, when=When.AFTER)
        lock = world.provider().create_lock("/d", FAST)
        await lock.acquire()
        await lock.release()
        assert world.body(KEY) is None

    trio.run(acquire)


@pytest.mark.parametrize("rel", ["test/m1", "aws/ec2/vpc/m1", "@acme/echo/m1"])
@pytest.mark.parametrize("namespace", ["", "infra"])
def test_model_lock_keys_round_trip(rel, namespace):
    kind, _, number = rel.rpartition("/")
    model = ModelRef(kind, number)
    key = Keyspace("team", namespace).model_lock(model)
    assert key == "team/" + (f"{namespace}/" if namespace else "") + f"data/{kind}/{number}/.lock"
    parts = Keyspace("team", namespace).rel(key).split("/")
    assert (ModelRef("/".join(parts[1:-2]), parts[-2]), parts[-1]) == (model, ".lock")
    assert model_of(f"data/{kind}/{number}/state/3/raw") == model


def test_a_prefix_is_joined_to_lock_keys_too(world):
    lock = world.provider(prefix="team").create_lock("/d", LockOptions(lock_key="data/t/m/.lock"))

    async def hold() -> None:
        await lock.acquire()
        assert world.keys() == {"team/data/t/m/.lock"}
        await lock.release()

    trio.run(hold)


# --- structural commands -----------------------------------------------------------------------------------


def test_a_structural_command_waits_for_a_model_lock_taken_between_its_looks(world, monkeypatch):
    """Lesson 35: the first drain saw none, and then a writer came."""
    monkeypatch.setattr("swampfs.sync.drain._POLL_S", 0.02)
    world.load({f"{MODEL}/latest": b"1"}, "v1")
    order: list[str] = []

    async def scenario() -> None:
        provider = world.provider()
        writer = world.provider().create_lock("/d", LockOptions(lock_key="data/test/m1/.lock"))
        # The writer takes its model lock just before the command has the global one.
        world.fail("put", KEY, action=lambda: world.put("data/test/m1/.lock", theirs))
        await writer.acquire()
        theirs = world.body("data/test/m1/.lock")
        await writer.release()

        async def finish_writing() -> None:
            await trio.sleep(0.3)
            order.append("written")
            world.bucket.delete("data/test/m1/.lock")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(finish_writing)
            await provider.structurally("", LockOptions(max_wait_ms=5_000), lambda: _note(order, "restructured"))

    async def _note(order: list[str], word: str) -> None:
        order.append(word)

    trio.run(scenario)
    assert order == ["written", "restructured"]
    assert KEY not in world.keys()


def test_a_structural_command_gives_up_naming_who_writes(world):
    world.put("data/test/m1/.lock", encode_lock(_lock_of("ana@build-7", 4711)))
    with pytest.raises(LockTimeoutError, match=r'"per-model locks" held by ana@build-7 \(pid 4711\), among them data/'):
        trio.run(world.provider().migrate_index, "", LockOptions(max_wait_ms=100))
    assert world.keys() == {"data/test/m1/.lock"}


def test_the_locks_of_the_process_that_started_us_are_not_waited_for(world, monkeypatch):
    """Lesson 33: swamp holds a model's lock and runs a command that waits for all of them."""
    import socket

    world.load({f"{MODEL}/latest": b"1"}, "v1")
    monkeypatch.setenv("SWAMP_LOCK_HOLDER_PID", "4711")
    world.put("data/test/m1/.lock", encode_lock(_lock_of("me", 4711)._replace(hostname=socket.gethostname())))
    assert trio.run(world.provider().migrate_index, "", LockOptions(max_wait_ms=100)).commit_seq == 1


def _lock_of(holder: str, pid: int):
    from swampfs.records import LockInfo

    return LockInfo(holder, holder.partition("@")[2] or "h", pid, "2026-11-21T00:00:00.000Z", 30_000, "n")


def test_a_pid_means_nothing_on_another_host(tmp_path):
    """H29: a live lock of another machine was judged dead because this machine has no such process."""
    import socket

    from swampfs.datastore import FILESYSTEM

    (tmp_path / "datastore").mkdir()
    provider = FILESYSTEM.create_provider({"path": str(tmp_path / "datastore")})
    lock_file = tmp_path / "datastore/.datastore.lock"
    options = LockOptions(max_wait_ms=100, retry_interval_ms=20)
    lock_file.write_bytes(encode_lock(_lock_of("ana@elsewhere", 2**22 - 1)))
    with pytest.raises(LockTimeoutError):
        trio.run(provider.create_lock("", options).acquire)
    lock_file.write_bytes(encode_lock(_lock_of("ana@here", 2**22 - 1)._replace(hostname=socket.gethostname())))

    async def take_over() -> None:
        lock = provider.create_lock("", LockOptions(max_wait_ms=3_000, retry_interval_ms=20))
        await lock.acquire()
        await lock.release()

    trio.run(take_over)


def test_a_holder_that_could_not_renew_in_time_counts_as_lost(world):
    """Even if nobody took the lock over yet: somebody may, at any moment."""

    async def hold() -> None:
        lock = world.provider().create_lock("/d", LockOptions(ttl_ms=150))
        await lock.acquire()
        world.fail("put", KEY, times=99)
        await trio.sleep(0.4)
        assert lock.lost
        world.faulty.faults.clear()
        await lock.release()

    trio.run(hold)


def test_a_lock_lost_and_taken_again_does_not_haunt_later_pushes(world):
    cache = world.cache("a")
    cache.write("audit/a", b"1")

    async def live() -> None:
        lock = cache.provider.create_lock("/d", LockOptions(ttl_ms=60_000))
        await lock.acquire()
        world.bucket.delete(KEY)
        await lock._lock.renew()
        await lock.acquire()
        await lock.release()
        assert await cache.service.push_changed() == 1

    trio.run(live)


def test_a_loop_that_ends_with_a_lock_held_does_not_disturb_the_next(world):
    cache = world.cache("a")
    trio.run(cache.provider.create_lock("/d").acquire)
    cache.write("audit/a", b"1")
    assert cache.push() == 1


def test_a_cancelled_acquisition_leaves_no_lock(world):
    from swampfs.testing.faults import When

    async def cancel() -> None:
        lock = world.provider().create_lock("/d")
        with trio.CancelScope() as scope:
            world.fail("put", KEY, when=When.BEFORE, action=lambda: trio.from_thread.run_sync(scope.cancel))
            await lock.acquire()
        assert scope.cancelled_caught or await lock.inspect() is None or not lock.lost
        await lock.release()
        assert world.body(KEY) is None

    trio.run(cancel)


def test_a_cancelled_pull_stops_soon(world):
    import time as clock

    world.load({f"audit/{n}.jsonl": b"x" for n in range(100)}, "v2")
    cache = world.cache("a", pull_concurrency=1)
    world.fail("get", "audit/", action=lambda: clock.sleep(0.02), times=200)

    async def cancel() -> None:
        with trio.move_on_after(0.2):
            await cache.service.pull_changed()

    trio.run(cancel)
    assert 0 < len(cache.files()) < 100


# --- retries -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (StoreBusyError("503"), 3),
        (StoreUnreachableError("timed out"), 3),
        (AccessDeniedError("403"), 1),
        (AbsentError("404"), 1),
        (PreconditionError("412"), 1),
    ],
)
def test_what_is_worth_retrying_is_tried_three_times_and_nothing_else(world, error, attempts):
    world.fail("get", "x", error=error, times=99)
    store = RetryingStore(world.recorder)
    with pytest.raises(type(error)):
        store.get("x")
    assert len(world.recorder.log) == attempts


def test_pauses_are_half_a_second_then_three_times_that_give_or_take_a_quarter(world, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr("swampfs.backends.retry._sleep", pauses.append)
    for _ in range(20):
        world.fail("get", "x", times=3)
        with pytest.raises(StoreUnreachableError):
            RetryingStore(world.recorder).get("x")
    first, second = pauses[::2], pauses[1::2]
    assert all(0.375 <= pause <= 0.625 for pause in first)
    assert all(1.125 <= pause <= 1.875 for pause in second)
    assert len(set(pauses)) > 10


def test_an_abort_stops_before_the_next_file_and_says_why(world):
    world.load({f"audit/{n}.jsonl": b"x" for n in range(200)}, "v2")
    cache = world.cache("a", pull_concurrency=2)
    signal = AbortSignal()
    world.fail("get", "audit/5.jsonl", action=lambda: signal.abort("enough"))
    with pytest.raises(AbortedError, match="enough"):
        cache.pull(signal=signal)
    assert len(cache.files()) < 200
    with pytest.raises(AbortedError):
        cache.pull(signal=signal)
    assert cache.pull() == 200 - len([name for name in cache.files() if name]) or cache.pull() == 0


def test_an_aborted_push_keeps_its_marks(world):
    cache = world.cache("a", push_concurrency=2)
    for number in range(50):
        cache.write(f"audit/{number}.jsonl", b"x")
    signal = AbortSignal()
    world.fail("put", "audit/", action=signal.abort)
    with pytest.raises(AbortedError, match="Aborted"):
        cache.push(signal=signal)
    assert world.entries() == {}
    assert cache.sidecar()["localDirty"]
    assert cache.push() == 50


def test_an_abort_wakes_a_retry_pause(world, monkeypatch):
    monkeypatch.undo()  # real pauses: half a second and more
    cache = world.cache("a")
    signal = AbortSignal()

    async def abort_soon() -> float:
        world.fail("get", "ndex", times=99)
        started = time.monotonic()
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(0.05)
                signal.abort()

            nursery.start_soon(later)
            try:
                await cache.service.pull_changed(signal=signal)
            except AbortedError:
                return time.monotonic() - started
        raise AssertionError("it was not aborted")

    assert trio.run(abort_soon) < 0.35


def test_the_environment_beats_the_configured_timeout_and_nonsense_is_ignored():
    config = {"bucket": "bucket", "requestTimeoutMs": 5000}
    for value, seconds in (("7000", 7), ("999", 5), ("600001", 5), ("x", 5), ("", 5), ("-1", 5), ("7000.5", 5)):
        assert s3_source(config, "test", {"SWAMP_S3_REQUEST_TIMEOUT_MS": value}).request_timeout_s == seconds
    assert s3_source({"bucket": "bucket"}, "test").request_timeout_s == 30


# --- the verifier ------------------------------------------------------------------------------------------


def test_the_verifier_reports_and_never_raises(world):
    verifier = world.provider().create_verifier()
    result = trio.run(verifier.verify)
    assert (result.healthy, result.message, result.datastore_type) == (
        True,
        "memory bucket 'memory' is accessible",
        "@swampfs/memory",
    )
    assert result.details == {"bucket": "memory"}
    for error in (AccessDeniedError("HTTP 403"), RuntimeError("odd")):
        world.fail("verify", error=error)
        result = trio.run(verifier.verify)
        assert result.healthy is False
        assert result.message.startswith("Cannot access memory bucket 'memory': ")
    world.fail("verify", error=AccessDeniedError("HTTP 403"))
    assert "credentials" in trio.run(verifier.verify).message


def test_two_writers_under_a_models_lock_take_turns(world):
    """What swamp does: lock, scoped pull, write, push under the global lock, release. No increment is lost."""
    world.load({f"{MODEL}/latest": b"0"}, "v2")
    caches = [world.cache(name) for name in ("a", "b")]

    async def work(cache, times: int) -> None:
        options = LockOptions(lock_key="data/test/m1/.lock", retry_interval_ms=10, max_wait_ms=20_000)
        for _ in range(times):
            lock = cache.provider.create_lock("/d", options)
            async with trio.open_nursery():
                await lock.acquire()
                await cache.service.pull_changed()
                value = int(cache.read(f"{MODEL}/latest"))
                await cache.service.mark_dirty(rel_path=f"{MODEL}/latest")
                cache.put(f"{MODEL}/latest", str(value + 1).encode())
                await cache.provider.create_lock("/d", options._replace(lock_key="")).with_lock(
                    cache.service.push_changed
                )
                await lock.release()

    async def both() -> None:
        async with trio.open_nursery() as nursery:
            for cache in caches:
                nursery.start_soon(work, cache, 10)

    trio.run(both)
    assert world.body(f"{MODEL}/latest") == b"20"
    assert KEY not in world.keys()


def test_preconditions_of_the_store_in_memory_are_those_of_the_port():
    store = MemoryStore()
    info = store.put("x", b"1")
    with pytest.raises(PreconditionError):
        store.put("x", b"2", ABSENT)
    with pytest.raises(PreconditionError):
        store.delete("x", matching("other"))
    store.delete("x", matching(info.etag))
    assert Store(store).keys() == []


def test_a_world_starts_empty(world: World):
    assert world.keys() == set()
