"""Swamp's lock contract over :class:`~swampfs.sync.locks.Lock`: acquired now, kept alive until released.

The heartbeat is a system task of the trio loop, so a lock can be held across calls without a nursery of the caller's.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from swampfs.errors import LeaseLostError
from swampfs.provider import LockOptions
from swampfs.records import LockInfo
from swampfs.sync.locks import Lock
from swampfs.sync.remote import Remote

T = TypeVar("T")

log = logging.getLogger(__name__)

_GIVE_BACK_S = 10.0


class HeldLocks:
    """Locks of one provider that are held now; a commit asks whether all of them still are (H18)."""

    def __init__(self) -> None:
        self._held: list[Lock] = []

    def add(self, lock: Lock) -> None:
        self._held.append(lock)

    def discard(self, lock: Lock) -> None:
        if lock in self._held:
            self._held.remove(lock)

    def check(self) -> None:
        """Raises LeaseLostError."""
        for lock in self._held:
            lock.check()


class DatastoreLock:
    """:class:`~swampfs.provider.DistributedLock` of one key."""

    def __init__(self, remote: Remote, key: str, options: LockOptions, held: HeldLocks, *, trust_pids: bool) -> None:
        self._lock = Lock(
            remote,
            key,
            ttl_ms=options.ttl_ms,
            max_wait_s=options.max_wait_ms / 1000,
            retry_s=options.retry_interval_ms / 1000,
            trust_pids=trust_pids,
        )
        self._held = held
        self._beating: trio.CancelScope | None = None

    @property
    def lost(self) -> bool:
        """Whether it was acquired, not released, and is not ours any more."""
        if self._beating is None:
            return False
        try:
            self._lock.check()
        except LeaseLostError:
            return True
        return False

    async def acquire(self) -> None:
        if self._beating is not None:  # acquired before, and lost
            await self.release()
        try:
            await self._lock.acquire()
        except trio.Cancelled:
            with trio.CancelScope(shield=True), trio.move_on_after(_GIVE_BACK_S):
                await self._lock.abandon()  # the put may have been applied all the same
            raise
        scope = trio.CancelScope()
        self._beating = scope
        self._held.add(self._lock)

        async def beat() -> None:
            with scope:
                try:
                    await self._lock.heartbeat()
                except trio.Cancelled:
                    if not scope.cancel_called:  # the loop ends, and with it what this lock was held for
                        self._held.discard(self._lock)
                    raise
                except Exception:  # a system task that fails takes the whole loop down
                    log.exception("the heartbeat of %s ended", self._lock.key)

        trio.lowlevel.spawn_system_task(beat)

    async def release(self) -> None:
        if self._beating is None:
            return
        self._beating.cancel()
        self._beating = None
        self._held.discard(self._lock)
        with trio.CancelScope(shield=True):
            await self._lock.release()

    async def with_lock(self, fn: Callable[[], Awaitable[T]]) -> T:
        await self.acquire()
        try:
            return await fn()
        finally:
            await self.release()

    async def inspect(self) -> LockInfo | None:
        return await self._lock.inspect()

    async def force_release(self, nonce: str) -> bool:
        return await self._lock.force_release(nonce)
