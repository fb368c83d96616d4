"""One lock that a mount holds, and one it is about to (:mod:`swampfs.sync.leases`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from swampfs.errors import LockTimeoutError, StoreError, StoreUnreachableError
from swampfs.names import RelPath
from swampfs.records import LockInfo
from swampfs.state.schema import is_disk_full
from swampfs.sync.locks import Lock, is_free, wait_until_free

LINGER_S = 1.0
CROWDED_S = 0.3  # how long a lock that others waited for before is used, then handed on
LONGEST_S = 5.0  # what is pushed by then is handed on even if more is written
_STUCK_S = 30.0
CLOSE_S = 10.0  # for giving back what is ours
ANSWER_S = 5.0  # a store that says nothing for so long is taken to be out of reach; it is asked again as often

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Lease:
    """One lock this mount holds."""

    name: RelPath
    lock: Lock
    since: float
    used: float
    fresh: bool = False  # the tree was refreshed after it was acquired: what is written starts from the latest
    pins: int = 0  # pushes under way
    closed_at: float = 0.0
    closing: bool = False  # no new writer is let in; it goes as soon as everything is pushed
    user: bool = False  # taken by a user as a file; only that file's removal ends it
    alive: Callable[[], bool] = lambda: True  # a user's lock is renewed for as long as its process lives
    beat: trio.CancelScope = field(default_factory=trio.CancelScope)

    def as_json(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "lock": self.name,
            "state": "held" if self.lock.is_sure else "unsure",
            "by": "user" if self.user else "mount",
            "heldS": round(time.monotonic() - self.since, 1),
        }

    @property
    def _spell_s(self) -> float:
        return CROWDED_S if self.lock.contended else LINGER_S

    def has_lingered(self) -> bool:
        """Whether nobody has used it for a while, or nobody new is let in."""
        return self.closing or time.monotonic() - self.used >= self._spell_s

    def is_stuck(self) -> bool:
        """Whether what was written under it could not be pushed for long after it was to go."""
        return self.closing and time.monotonic() - self.closed_at > _STUCK_S

    def close(self, longest_s: float, *, is_written: bool) -> bool:
        """Let no new writer in once it was held for long, unless a changed file is open. Returns whether it is news."""
        now = time.monotonic()
        too_long = now - self.since > (CROWDED_S if self.lock.contended else longest_s)
        was_closing, self.closing = self.closing, too_long and not is_written
        if self.closing and not was_closing:
            self.closed_at = now
            return True
        return False

    def lets_in(self) -> bool:
        return self.fresh and not self.closing and self.lock.is_sure


class Flight:
    """An acquisition under way and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.moved = trio.Event()  # set at each news: somebody else holds the lock, or it is ours
        self.asked_at: float | None = None  # since when the store owes us an answer
        self.acquired = False
        self.holder: LockInfo | None = None
        self.waits = False  # the store has answered: somebody else holds it
        self.error: Exception | None = None

    def tell(self) -> None:
        self.moved.set()
        self.moved = trio.Event()

    def as_json(self, name: RelPath) -> dict[str, Any]:
        """For ``status``: who it waits for."""
        return {
            "lock": name,
            "state": "waiting",
            "by": self.holder.holder if self.holder else None,
            "hostname": self.holder.hostname if self.holder else None,
            "pid": self.holder.pid if self.holder else None,
        }


async def acquire(
    lock: Lock,
    flight: Flight,
    patience_s: tuple[float, float],
    *,
    global_lock: Lock | None,
    prove: Callable[[Lock], Awaitable[None]],
) -> None:
    """Spec §9.4: with a model lock in hand the global one must be free; while it is not, we hold neither.

    ``patience_s`` is for others to let go, and for giving back what we could not use.
    Raises LockTimeoutError, StoreError; whatever ends it early gives back what may have been taken.
    """

    def wait(holder: LockInfo | None) -> None:
        flight.waits, flight.holder = True, holder
        flight.tell()

    wait_s, close_s = patience_s
    lock.on_wait = wait
    while True:
        try:
            await lock.acquire(wait_s)
            await prove(lock)
            if global_lock is None or await is_free(global_lock):
                return
        except LockTimeoutError:
            raise
        except BaseException:
            with trio.CancelScope(shield=True), trio.move_on_after(close_s):
                await lock.abandon()  # also if its put was applied and not answered
            raise
        await lock.release()
        wait(await global_lock.inspect())
        await wait_until_free(global_lock, wait_s)


async def tell_next(lease: Lease, tell: Callable[[RelPath], Awaitable[None]]) -> None:
    """Leave what the next holder must know; not when the lock may be a successor's already.

    The lock is given back whether it could be left or not.
    """
    if not (lease.fresh and lease.lock.is_sure):
        return
    try:
        await tell(lease.name)
    except Exception as error:
        if isinstance(error, StoreError) or is_disk_full(error):
            log.info("the empty directories under %s could not be recorded: %s", lease.name, error)
        else:
            log.exception("recording the empty directories under %s failed", lease.name)


class LeftOver:
    """Locks that could not be given back when they were to: it is tried again, so that nobody waits for their TTL."""

    def __init__(self, on_note: Callable[[], None]) -> None:
        self._on_note = on_note
        self._locks: dict[RelPath, Lock] = {}
        self._tried_at = 0.0

    def __bool__(self) -> bool:
        return bool(self._locks)

    def note(self, name: RelPath, lock: Lock) -> None:
        """Remember a lock, if something of it may be left in the store."""
        if not lock.is_settled:
            self._locks[name] = lock
            self._on_note()

    @contextmanager
    def unless_done(self, name: RelPath, lock: Lock) -> Iterator[None]:
        """Remember it if the block fails."""
        try:
            yield
        except BaseException:
            self.note(name, lock)
            raise

    def tick(self, start_soon: Callable[..., Any]) -> None:
        """Try again with all of them, if it is time."""
        if self._locks and time.monotonic() - self._tried_at >= ANSWER_S:
            start_soon(self.give_back, *self._locks)

    async def give_back(self, *names: RelPath) -> None:
        """Try it now, one after the other. What does not succeed is remembered still."""
        for name in names:
            lock = self._locks.pop(name, None)
            if lock is not None:
                self._tried_at = time.monotonic()
                try:
                    await lock.abandon()
                except Exception:  # a background task that fails takes the mount down
                    log.exception("giving back %s failed", name)
                finally:
                    if name not in self._locks:
                        self.note(name, lock)

    async def give_back_all(self) -> None:
        await self.give_back(*self._locks)


class Reach:
    """Whether the store can be asked for locks; ``queue``: writers go on without if it cannot (architecture §5)."""

    def __init__(self, *, queue: bool) -> None:
        self._queue = queue
        self.lost_since: float | None = None
        self._asked_at = 0.0

    def is_lost(self) -> bool:
        """Whether it was out of reach a moment ago."""
        return self.lost_since is not None and time.monotonic() - self._asked_at < ANSWER_S

    def give_up(self, error: Exception | None) -> Literal[False]:
        """It did not answer. Raises that, if changes are not queued."""
        if not self._queue:
            raise error or StoreUnreachableError("the datastore does not answer, and changes are not queued")
        self._asked_at = time.monotonic()
        if self.lost_since is None:
            log.info("the datastore is out of reach: changes are queued on this machine")
            self.lost_since = self._asked_at
        return False

    def found(self) -> None:
        """It answered."""
        if self.lost_since is not None:
            log.info("the datastore answers again")
            self.lost_since = None
