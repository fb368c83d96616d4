"""Structural commands: nobody may be writing any model while they work (spec §9.4).

Wait until no model lock is held, take the global lock, and wait once more: a writer may have taken its model lock
between the first look and the global lock. After that no new one can come, because writers look at the global lock
again once they have theirs. On an object store the locks are found by listing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from swampfs.errors import AbsentError, LockTimeoutError
from swampfs.names import Keyspace
from swampfs.provider import DistributedLock
from swampfs.records import LockInfo
from swampfs.sync.locks import Lock, Sighting, decode_lock, is_free, wait_until_free
from swampfs.sync.remote import Remote

T = TypeVar("T")

_POLL_S = 1.0


class ModelLocks:
    """The model locks of one namespace, as others hold them."""

    def __init__(self, remote: Remote, keys: Keyspace, *, poll_s: float = _POLL_S) -> None:
        self._remote = remote
        self._keys = keys
        self._poll_s = poll_s
        self._sightings: dict[str, Sighting] = {}

    async def drain(self, max_wait_s: float) -> None:
        """Return when none is held. Raises LockTimeoutError naming a holder."""
        started = time.monotonic()
        while True:
            held = await self.held()
            if not held:
                return
            waited = time.monotonic() - started
            if waited >= max_wait_s:
                key, holder = next(iter(held.items()))
                text = f'Lock "per-model locks" held by {holder.holder} (pid {holder.pid}), among them {key}'
                raise LockTimeoutError(
                    f"{text} — timed out after {int(waited * 1000)}ms",
                    lock_key="per-model locks",
                    holder=holder,
                    waited_ms=int(waited * 1000),
                )
            await trio.sleep(min(self._poll_s, max_wait_s - waited))

    async def held(self, *, all_of_them: bool = False) -> dict[str, LockInfo]:
        """Path → holder of those that are alive; ``all_of_them``: also that of the process which started us."""
        found = {}
        for info in await self._remote.list(self._keys.data("data/")):
            if not info.key.endswith("/.lock"):
                continue
            try:
                blob = await self._remote.get(info.key)
            except AbsentError:
                continue
            holder = decode_lock(blob.body) if blob is not None else None
            if holder is None or blob is None or not self._is_live(info.key, blob.info.etag, holder):
                continue
            if all_of_them or not self._is_ours(holder):
                found[self._keys.rel(info.key) or info.key] = holder
        return found

    def _is_ours(self, holder: LockInfo) -> bool:
        """A lock of the swamp process that started us: it waits for us, so we must not wait for it (lesson 33)."""
        return holder.hostname == socket.gethostname() and str(holder.pid) == os.environ.get("SWAMP_LOCK_HOLDER_PID")

    def _is_live(self, key: str, etag: str, holder: LockInfo) -> bool:
        """Live while it moves within its TTL on our own clock (H30)."""
        now = time.monotonic()
        sighting = self._sightings.get(key)
        if sighting is None or sighting.etag != etag:
            sighting = self._sightings[key] = Sighting(etag, now)
        return now - sighting.since <= holder.ttl_ms / 1000


async def structurally(
    locks: ModelLocks, global_lock: DistributedLock, max_wait_s: float, fn: Callable[[], Awaitable[T]]
) -> T:
    """Drain, take the global lock, drain again, work, release."""
    await locks.drain(max_wait_s)

    async def work() -> T:
        await locks.drain(max_wait_s)
        return await fn()

    return await global_lock.with_lock(work)


async def as_writer(
    model_lock: DistributedLock, global_lock: Lock, max_wait_s: float, fn: Callable[[], Awaitable[T]]
) -> T:
    """Hold a model's lock while nobody holds the global one, work, release (spec §9.4)."""
    while True:
        await wait_until_free(global_lock, max_wait_s)
        await model_lock.acquire()
        try:
            if await is_free(global_lock):
                return await fn()
        finally:
            await model_lock.release()
