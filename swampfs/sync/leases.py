"""Leases: the locks this mount holds while its users write (architecture §4, §5).

The first write below a lock takes it, looks at the global lock once more and refreshes the tree; then the writer goes
on. The lock is kept alive until what was written is pushed, lingers for the next write, and is given back. Locks that
users take as files (:mod:`swampfs.fs.lockfiles`) are in the same registry, so the mount never waits for its own users.
Readers come nowhere near this module.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Any

import trio

from swampfs.errors import (
    ConflictingWriteError,
    LeaseLostError,
    LockTimeoutError,
    StoreBusyError,
    StoreUnreachableError,
    SwampfsError,
)
from swampfs.names import GLOBAL_LOCK_FILE, Keyspace, RelPath, is_model_lock, lease_path
from swampfs.records import LockInfo
from swampfs.state.schema import is_disk_full
from swampfs.sync.lease import ANSWER_S, CLOSE_S, LONGEST_S, Flight, Lease, LeftOver, Reach, acquire, tell_next
from swampfs.sync.locks import Lock, lock_timeout
from swampfs.sync.parallel import for_each

log = logging.getLogger(__name__)

TICK_S = 0.05
_PATIENCE_S = 5.0  # of a push; it is repeated anyway
_AT_ONCE = 8


class Leases:
    """All locks of one mount. Lives on the loop; requests run in the lock lane."""

    def __init__(
        self,
        keys: Keyspace,
        *,
        make_lock: Callable[[str], Lock],
        refresh: Callable[[Sequence[RelPath]], Awaitable[object]],
        before_release: Callable[[RelPath], Awaitable[None]],
        prove_exclusive: Callable[[Lock], Awaitable[None]],
        start_soon: Callable[..., Any],
        wait_s: float,
        queue_offline: bool = True,
    ) -> None:
        """``wait_s`` bounds a writer's wait for a lock; ``queue_offline``: if the store is away it goes on without."""
        self._keys = keys
        self._make_lock = make_lock
        self._refresh = refresh
        self._before_release = before_release
        self._prove_exclusive = prove_exclusive
        self._start_soon = start_soon
        self._wait_s, self._close_s = wait_s, min(CLOSE_S, wait_s)
        self._held: dict[RelPath, Lease] = {}
        self._flights: dict[RelPath, Flight] = {}
        self._leaving: dict[RelPath, trio.Event] = {}
        self._courtesy: dict[RelPath, float] = {}
        self.left_over = LeftOver(lambda: self._wake.set())
        self._wake = trio.Event()
        self.global_gate = trio.Lock()
        """Held by whoever of us works with the global lock."""
        self.is_pending: Callable[[str], bool] = lambda name: False
        """Whether changes under a lock wait for their push; set by the composition root."""
        self.is_written: Callable[[str], bool] = lambda name: False
        """Whether a changed file under a lock is still open."""
        self.hurry: Callable[[str], None] = lambda name: None
        self.is_family: Callable[[int, LockInfo], bool] = lambda pid, holder: False
        """Whether a process works on behalf of a lock's holder (``SWAMP_LOCK_HOLDER_PID``)."""
        self.longest_s = LONGEST_S
        self.reach = Reach(queue=queue_offline)
        self._is_closed = False
        self.lost = 0
        self.borrowed: dict[RelPath, str | None] = {}  # the nonce of a lock whose holder's child writes through us

    # --- for writers --------------------------------------------------------------------------------------

    def covers(self, path: str) -> bool:
        """Whether a path may be written at once. No request, no wait."""
        lease = self._held.get(lease_path(path))
        if lease is None or not lease.lets_in():
            return False
        lease.used = time.monotonic()
        return True

    @contextmanager
    def staying(self, paths: Iterable[str]) -> Iterator[None]:
        """For something done in several steps: the locks that cover ``paths`` now are not given back in between."""
        with self._pinning({lease_path(path) for path in paths}):
            yield

    @contextmanager
    def _pinning(self, names: Iterable[RelPath]) -> Iterator[None]:
        leases = [lease for name in names if (lease := self._held.get(name)) is not None]
        for lease in leases:
            lease.pins += 1
        try:
            yield
        finally:
            for lease in leases:
                lease.pins -= 1

    async def guard(self, pid: int, *paths: str) -> None:
        """Return when this mount holds the locks of ``paths`` and has seen the latest state below them.

        Also returns, without them, if the datastore is out of reach and changes are queued (architecture §5, rule 2).
        ``pid`` is the process that wants to write; it may be a child of the lock's holder.

        Raises:
            LockTimeoutError: somebody else holds one, named.
            StoreError: the store refused, or is out of reach and changes are not queued.
        """
        deadline = trio.current_time() + self._wait_s
        borrowed: set[RelPath] = set()
        while True:
            missing = sorted({lease_path(path) for path in paths if not self.covers(path)} - borrowed)
            if not missing:
                return
            if trio.current_time() >= deadline:
                raise lock_timeout(missing[0], None, self._wait_s)
            # One after the other in an order all machines share, so that nobody waits for one who waits for him.
            with ExitStack() as kept:
                for name in missing:
                    if self.reach.is_lost():
                        return
                    if await self._wait_for(name, pid, deadline, refresh=len(missing) == 1):
                        kept.enter_context(self._pinning([name]))
                    elif name in self.borrowed:
                        borrowed.add(name)  # another's, on whose behalf we write
                    else:
                        return  # out of reach
                if len(missing) > 1:
                    await self._refresh_held(set(missing) - borrowed)
                if all(self.covers(path) or lease_path(path) in borrowed for path in paths):
                    return

    async def _refresh_held(self, names: Collection[RelPath]) -> None:
        """One look at the datastore for all of them."""
        leases = [lease for name in names if (lease := self._held.get(name)) is not None]
        try:
            await self._refresh([lease.name for lease in leases])
        except StoreUnreachableError as error:
            self.reach.give_up(error)
            return
        for lease in leases:
            lease.fresh = True

    async def _wait_for(self, name: RelPath, pid: int, deadline: float, *, refresh: bool) -> bool:
        """Returns whether the lock may be ours now; ``False`` = go on without it."""
        flight = self._flight(name, self._wait_s, refresh=refresh)
        while not flight.done.is_set():
            if flight.waits and flight.holder is not None and self.is_family(pid, flight.holder):
                self.borrowed[name] = flight.holder.nonce
                return False
            until = deadline
            if flight.asked_at is not None and not flight.waits and not flight.acquired:
                until = min(deadline, flight.asked_at + ANSWER_S)  # the store says nothing at all
                if trio.current_time() >= until:
                    return self.reach.give_up(None)
            if trio.current_time() >= deadline:
                if flight.acquired and not flight.waits:  # nobody's fault but the store's
                    return self.reach.give_up(None)
                raise lock_timeout(name, flight.holder, self._wait_s)
            with trio.move_on_at(until):
                await flight.moved.wait()
        error = flight.error
        is_early = trio.current_time() < deadline - self._wait_s + ANSWER_S
        if is_early and isinstance(error, LockTimeoutError | ConflictingWriteError | StoreBusyError):
            await trio.sleep(TICK_S)
            return True  # it ran out of the time of an earlier writer, or the store is busy
        if isinstance(error, StoreUnreachableError | StoreBusyError):
            return self.reach.give_up(error)
        if error is not None:
            raise error
        return True

    # --- for pushes ---------------------------------------------------------------------------------------

    @asynccontextmanager
    async def pinned(self, names: Sequence[RelPath]) -> AsyncIterator[tuple[list[Lock], set[RelPath]]]:
        """Hold the given locks for a push: those we have stay, the others are acquired and given back after it.

        Yields the locks, and the names of those that somebody else holds.
        """
        pinned: list[Lease] = []
        waiting: set[RelPath] = set()
        deadline = trio.current_time() + _PATIENCE_S + ANSWER_S
        try:
            for name in names:
                if name not in self._held and name not in self.borrowed:
                    self._flight(name, _PATIENCE_S, refresh=False)  # all at once: each may have to be waited for
            for name in sorted(names):
                lease = self._held.get(name)
                if lease is None or not lease.lock.is_sure:
                    if name in self.borrowed and await self._still_borrowed(name):
                        continue
                    try:
                        lease = await self._acquire_for_push(name, deadline)
                    except LockTimeoutError:
                        waiting.add(name)
                        continue
                lease.pins += 1
                pinned.append(lease)
            yield [lease.lock for lease in pinned], waiting
        finally:
            for lease in pinned:
                lease.pins -= 1
            with trio.CancelScope(shield=True), trio.move_on_after(self._close_s):
                await self._give_back_after_push(name for name in names if name not in waiting)

    async def _give_back_after_push(self, names: Iterable[RelPath]) -> None:
        """What was acquired for a push and has no writer."""
        for name in names:
            if name in self._flights and name not in self._held:
                await self._flights[name].done.wait()
            lease = self._held.get(name)
            if lease is not None and not (lease.fresh or lease.user or lease.pins or name in self._flights):
                await self._give_back(lease)

    async def _acquire_for_push(self, name: RelPath, deadline: float) -> Lease:
        flight = self._flight(name, _PATIENCE_S, refresh=False)
        with trio.move_on_at(deadline):
            await flight.done.wait()
        if flight.error is not None:
            raise flight.error
        lease = self._held.get(name)
        if lease is None:
            raise lock_timeout(name, flight.holder, _PATIENCE_S)
        return lease

    async def _still_borrowed(self, name: RelPath) -> bool:
        holder = await self._make_lock(self._keys.lock(name)).inspect()
        if holder is not None and name in self.borrowed and holder.nonce == self.borrowed[name]:
            return True
        self.borrowed.pop(name, None)  # it may be ours by now
        return False

    def taken_global(self) -> Lock | None:
        """The global lock, if a user of this mount holds it."""
        lease = self._held.get(RelPath(GLOBAL_LOCK_FILE))
        return lease.lock if lease is not None and lease.user and lease.lock.is_sure else None

    async def give_way(self) -> None:
        """A structural command holds the global lock and waits for the model locks to go (spec §9.4)."""
        for lease in list(self._held.values()):
            if not lease.user and not lease.pins and is_model_lock(lease.name):
                await self._give_back(lease)

    # --- for users who lock by files ----------------------------------------------------------------------

    def taken(self, name: RelPath) -> Lease | None:
        """The lease of a lock that a user of this mount took as a file."""
        lease = self._held.get(name)
        return lease if lease is not None and lease.user else None

    def taken_names(self) -> list[RelPath]:
        return [name for name, lease in self._held.items() if lease.user]

    def lock_over(self, path: str) -> Lock | None:
        """The lock that keeps everybody else from a path, if we or a user of ours surely hold it."""
        lease = self._held.get(lease_path(path))
        return lease.lock if lease is not None and lease.lock.is_sure else None

    def holds(self, name: RelPath) -> bool:
        """Whether we hold a lock for our own writers."""
        lease = self._held.get(name)
        return lease is not None and not lease.user and lease.lock.held

    async def settled(self, name: RelPath) -> None:
        """Return when a release of ours that is under way is over."""
        if name in self._leaving:
            await self._leaving[name].wait()

    async def take(self, name: RelPath) -> Lease | None:
        """Take a lock for a user, at once or not at all; a lease of our own becomes the user's.

        ``None`` if somebody else has it. Raises StoreError.
        """
        while name in self._flights or name in self._leaving:
            event = self._flights[name].done if name in self._flights else self._leaving[name]
            await event.wait()
        lease = self._held.get(name)
        if lease is not None and lease.user and lease.lock.is_sure:
            return None
        flight = self._flights[name] = Flight()
        try:
            if lease is not None and not lease.user and lease.lock.is_sure:
                lock = lease.lock
                lease.user, lease.closing = True, False
            else:
                await self.left_over.give_back(name)
                lock = self._make_lock(self._keys.lock(name))
                lease = self._keep(name, lock, user=True) if await lock.take() else None
            if lease is not None:
                await self._refresh([name])
                lease.fresh = True
            return lease
        except BaseException:
            if lease is not None and lease.lock is lock:
                self._drop(name)
            with trio.CancelScope(shield=True), trio.move_on_after(self._close_s):
                await lock.abandon()
            self.left_over.note(name, lock)
            raise
        finally:
            del self._flights[name]
            flight.done.set()
            flight.tell()

    async def untake(self, lease: Lease) -> None:
        """The user removed the file. Raises LeaseLostError if the lock was somebody else's by then, StoreError."""
        if self._held.get(lease.name) is not lease:
            return
        gone = self._part(lease)
        try:
            await tell_next(lease, self._before_release)
            if not await lease.lock.give_up():
                raise LeaseLostError(f"the lock {lease.name} had been lost to another machine")
        finally:
            del self._leaving[lease.name]
            gone.set()

    def forsake(self, lease: Lease) -> None:
        """A user's lock turned out to be somebody else's."""
        if self._held.get(lease.name) is lease:
            self.lost += 1
            log.info("the lock %s was lost to another machine", lease.name)
            self._drop(lease.name)

    # --- acquiring ----------------------------------------------------------------------------------------

    def _flight(self, name: RelPath, wait_s: float, *, refresh: bool = True) -> Flight:
        flight = self._flights.get(name)
        if flight is None:
            if self._is_closed:
                raise LockTimeoutError("the mount is ending", lock_key=name)
            flight = self._flights[name] = Flight()
            self._start_soon(self._fly, name, flight, wait_s, refresh)
        return flight

    async def _fly(self, name: RelPath, flight: Flight, wait_s: float, refresh: bool) -> None:
        try:
            await self._fly_to_the_end(name, flight, wait_s, refresh)
        except Exception as error:
            flight.error = error
            if not (isinstance(error, SwampfsError) or is_disk_full(error)):
                log.exception("acquiring %s failed", name)
        finally:
            del self._flights[name]
            flight.done.set()
            flight.tell()

    async def _fly_to_the_end(self, name: RelPath, flight: Flight, wait_s: float, refresh: bool) -> None:
        while name in self._leaving or ((lease := self._held.get(name)) is not None and lease.closing):  # noqa: ASYNC110
            await trio.sleep(TICK_S)
        pause = self._courtesy.pop(name, 0.0) - time.monotonic()
        if refresh and pause > 0:  # we had it; now it is the others' turn
            await trio.sleep(pause)
        lease = self._held.get(name)
        flight.asked_at = trio.current_time()
        flight.tell()
        if lease is not None and not lease.user and not lease.lock.is_sure:
            await lease.lock.renew()  # a broken connection, perhaps: nobody need have noticed
            lease.fresh = False
            if lease.lock.is_sure:
                self.reach.found()
        if lease is None or not lease.lock.is_sure:
            lease = self._keep(name, await self._acquire(name, flight, wait_s))
        flight.acquired = True
        flight.tell()
        if refresh:
            await self._refresh([name])
            lease.fresh, lease.used = True, time.monotonic()

    async def _acquire(self, name: RelPath, flight: Flight, wait_s: float) -> Lock:
        await self.left_over.give_back(name)  # nobody shall wait for what is our own
        lock = self._make_lock(self._keys.lock(name))
        beside = is_model_lock(name) and self.taken_global() is None
        global_lock = self._make_lock(self._keys.global_lock) if beside else None
        with self.left_over.unless_done(name, lock):
            await acquire(lock, flight, (wait_s, self._close_s), global_lock=global_lock, prove=self._prove_exclusive)
        return lock

    def _keep(self, name: RelPath, lock: Lock, *, user: bool = False) -> Lease:
        self._drop(name)  # of somebody whose lock expired
        now = time.monotonic()
        lease = self._held[name] = Lease(name, lock, now, now, user=user)
        self.borrowed.pop(name, None)
        self.reach.found()
        self._start_soon(self._beat, lease)
        self._wake.set()
        return lease

    async def _beat(self, lease: Lease) -> None:
        """Keep a lock alive; a user's that has content of the user's own is the user's to renew."""
        with lease.beat:
            while lease.lock.held:
                await trio.sleep(lease.lock.beat_s)
                if not lease.user or (lease.lock.content is None and lease.alive()):
                    try:
                        await lease.lock.renew()
                    except Exception:  # as if it had not been answered: `is_sure` says how long that is good for
                        log.exception("renewing %s failed", lease.name)
            self.lost += 1
            log.info("the lock %s was lost to another machine", lease.name)
            if self._held.get(lease.name) is lease and not lease.user:
                del self._held[lease.name]

    # --- giving back --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Give back what is not needed any more, for ever."""
        while True:
            if not self._held and not self.left_over:
                self._wake = trio.Event()
                await self._wake.wait()
            await trio.sleep(TICK_S)
            self.left_over.tick(self._start_soon)
            for lease in list(self._held.values()):
                if not lease.user and self._is_done(lease):
                    self._start_soon(self._finish, lease, self._part(lease))

    def _is_done(self, lease: Lease) -> bool:  # a flight during its closing waits for that
        if lease.pins or lease.name in self._leaving or (lease.name in self._flights and not lease.closing):
            return False
        if not self.is_pending(lease.name):
            return lease.has_lingered()
        if lease.is_stuck():
            return True  # what cannot be pushed keeps nobody out: its base decides when it can
        if lease.close(self.longest_s, is_written=self.is_written(lease.name)):
            self.hurry(lease.name)
        return False

    async def _give_back(self, lease: Lease) -> None:
        if self._held.get(lease.name) is lease:
            await self._finish(lease, self._part(lease))

    def _part(self, lease: Lease) -> trio.Event:
        """From here on nobody writes under it."""
        del self._held[lease.name]
        lease.beat.cancel()
        gone = self._leaving[lease.name] = trio.Event()
        if lease.closing or lease.lock.contended:
            self._courtesy[lease.name] = time.monotonic() + random.uniform(0.3, 0.6)  # noqa: S311
        return gone

    async def _finish(self, lease: Lease, gone: trio.Event) -> None:
        try:
            with trio.CancelScope(shield=True), trio.move_on_after(self._close_s):
                await tell_next(lease, self._before_release)
                await lease.lock.release()
            self.left_over.note(lease.name, lease.lock)
        except Exception:  # a background task that fails takes the mount down
            log.exception("giving back %s failed", lease.name)
        finally:
            del self._leaving[lease.name]
            gone.set()

    def _drop(self, name: RelPath) -> None:
        lease = self._held.pop(name, None)
        if lease is not None:
            lease.beat.cancel()

    async def give_back_idle(self) -> None:
        """Everything is pushed and nobody writes: do not linger, and wait for those that are being given back."""
        with trio.move_on_after(self._close_s):
            for gone in [*self._leaving.values()]:
                await gone.wait()
            await self.left_over.give_back_all()
        held = [lease for lease in self._held.values() if not (lease.user or lease.pins)]
        idle = [lease for lease in held if lease.name not in self._flights and not self.is_pending(lease.name)]
        await for_each(idle, self._give_back, at_once=_AT_ONCE)

    async def close(self) -> None:
        """Give back every lock of our own; a user's stays, for the user may go on after us."""
        self._is_closed = True
        with trio.move_on_after(self._close_s):
            await for_each(
                [lease for lease in self._held.values() if not lease.user], self._give_back, at_once=_AT_ONCE
            )
            for gone in list(self._leaving.values()):
                await gone.wait()
            await self.left_over.give_back_all()

    # --- for status ---------------------------------------------------------------------------------------

    def as_json(self) -> list[dict[str, Any]]:
        """Locks held by this mount or its users, and those it waits for with their holders."""
        waits = [flight.as_json(name) for name, flight in self._flights.items() if flight.waits]
        return [lease.as_json() for lease in self._held.values()] + waits
