"""One lock that a mount holds, and one it is about to (:mod:`swampfs.sync.leases`)."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import trio

from swampfs.errors import LockTimeoutError, StoreUnreachableError
from swampfs.names import RelPath
from swampfs.records import LockInfo
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
    lock: Lock, flight: Flight, wait_s: float, *, global_lock: Lock | None, prove: Callable[[Lock], Awaitable[None]]
) -> None:
    """Spec §9.4: with a model lock in hand the global one must be free; while it is not, we hold neither.

    Raises LockTimeoutError, StoreError; whatever ends it early gives back what may have been taken.
    """

    def wait(holder: LockInfo | None) -> None:
        flight.waits, flight.holder = True, holder
        flight.tell()

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
            with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_S):
                await lock.abandon()  # also if its put was applied and not answered
            raise
        await lock.release()
        wait(await global_lock.inspect())
        await wait_until_free(global_lock, wait_s)


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
