"""Swamp's lock on an object store (spec §9), fenced by conditional writes and free of clocks.

A lock is stale when its version has not moved for its own TTL on *our* monotonic clock (H30); on a directory also
when its process is dead on this very host. Renewal and release name the exact version they replace, so they can
never touch a successor's lock (H18).
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
import trio

from swampfs.errors import (
    AbsentError,
    ConflictingWriteError,
    LeaseLostError,
    LockTimeoutError,
    PreconditionError,
    PreconditionsUnsupportedError,
    StoreError,
)
from swampfs.provider import ABSENT, ObjectInfo, matching
from swampfs.records import LockInfo, timestamp
from swampfs.sync.remote import Remote
from swampfs.threads import Lane

log = logging.getLogger(__name__)

TTL_MS = 30_000
RETRY_S = 1.0
FIRST_RETRY_S = 0.05


def decode_lock(body: bytes) -> LockInfo | None:
    """``None`` for a body that is not (yet) a lock: a heartbeat in place may be read half-written."""
    try:
        raw: Any = msgspec.json.decode(body)
        return LockInfo(
            holder=str(raw["holder"]),
            hostname=str(raw["hostname"]),
            pid=int(raw["pid"]),
            acquired_at=str(raw["acquiredAt"]),
            ttl_ms=max(1, min(int(raw["ttlMs"]), 24 * 3_600_000)),
            nonce=raw["nonce"] if isinstance(raw.get("nonce"), str) else None,
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError):
        return None


def encode_lock(info: LockInfo) -> bytes:
    """Pretty JSON without a trailing newline (spec §1.8)."""
    return msgspec.json.format(msgspec.json.encode(info.as_json()), indent=2)


def _pid_is_dead(info: LockInfo) -> bool:
    if info.hostname != socket.gethostname():
        return False
    try:
        os.kill(info.pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return False


@dataclass(slots=True)
class Sighting:
    """A foreign lock's version and since when, on our clock, it has not moved."""

    etag: str
    since: float


class Lock:
    """One lock object. :class:`~swampfs.provider.DistributedLock`, plus :meth:`check` for fencing."""

    def __init__(
        self,
        remote: Remote,
        key: str,
        *,
        ttl_ms: int = TTL_MS,
        max_wait_s: float = 60.0,
        retry_s: float = RETRY_S,
        trust_pids: bool = False,
        sightings: MutableMapping[str, Sighting] | None = None,
        note: Callable[[str, str | None], None] = lambda key, nonce: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._remote = remote
        self.key = key
        self._ttl_ms = ttl_ms
        self._max_wait_s = max_wait_s
        self._retry_s = retry_s
        self._trust_pids = trust_pids
        self._clock = clock
        self._note = note
        self.content: bytes | None = None
        """What a user wrote into the lock, as a file; ``None`` = a body of ours."""
        self.contended = False
        """Whether somebody else held it when it was last asked for."""
        self.on_wait: Callable[[LockInfo | None], None] = lambda holder: None
        self._turn = trio.Lock()  # a heartbeat under way must not make our own next write look like a stranger's
        self._sent: list[bytes] = []  # what we wrote since the last answer: finding it means the lock is ours
        self.writes = 0
        """Moves whenever a write of ours begins or ends."""
        self._etag = ""
        self._nonce: str | None = None
        self._wanted = ""  # of the acquisition last begun
        self._renewed = 0.0
        # Shared by the locks of one datastore: a short wait must not start the TTL of a dead holder anew.
        self._sightings: MutableMapping[str, Sighting] = {} if sightings is None else sightings

    @property
    def held(self) -> bool:
        return self._nonce is not None

    @property
    def is_settled(self) -> bool:
        """Whether nothing of ours can be left in the store: what we put, if anything, is surely gone."""
        return self._nonce is None and not self._wanted

    @property
    def beat_s(self) -> float:
        """Seconds between two renewals."""
        return self._ttl_ms / 3000

    @property
    def is_sure(self) -> bool:
        """Whether the lock is ours beyond doubt: held, and renewed within its TTL."""
        return self._nonce is not None and self._clock() - self._renewed <= self._ttl_ms / 1000

    def check(self) -> None:
        """Raises LeaseLostError unless the lock is surely still ours. Call right before what it guards."""
        if self._nonce is None:
            raise LeaseLostError(f"the lock {self.key} was lost to another machine")
        if self._clock() - self._renewed > self._ttl_ms / 1000:
            raise LeaseLostError(f"the lock {self.key} could not be renewed in time")

    async def acquire(self, max_wait_s: float | None = None) -> None:
        """Raises LockTimeoutError after ``max_wait_s``, StoreError if the store does not answer."""
        started = self._clock()
        patience = self._max_wait_s if max_wait_s is None else max_wait_s
        nonce = self._wanted = str(uuid.uuid4())
        self._note(self.key, nonce)
        pause = FIRST_RETRY_S
        self.contended = False
        while True:
            if await self._try_create(nonce):
                return
            holder = await self._inspect()
            if holder is not None and await self._steal_if_stale(*holder):
                continue
            self.contended = True
            self.on_wait(holder[0] if holder else None)
            waited = self._clock() - started
            if waited >= patience:
                self._settle()
                raise lock_timeout(self.key, holder[0] if holder else None, waited)
            await trio.sleep(min(pause, max(0.0, patience - waited)) * random.uniform(0.75, 1.25))  # noqa: S311
            pause = min(pause * 2, self._retry_s)

    async def take(self) -> bool:
        """Acquire without waiting, breaking a stale lock. Returns whether it is ours; raises StoreError."""
        nonce = self._wanted = str(uuid.uuid4())
        for _ in range(2):
            if await self._try_create(nonce):
                return True
            holder = await self._inspect()
            if holder is not None and not await self._steal_if_stale(*holder):
                break
        self._settle()
        return False

    async def rewrite(self, content: bytes | None) -> None:
        """Renew with other content: fenced, so that it is never a successor's lock.

        Raises LeaseLostError if the lock is not ours any more, StoreError if the store does not answer.
        """
        async with self._turn:
            if self._nonce is None:
                raise LeaseLostError(f"the lock {self.key} was lost to another machine")
            self.content = content
            record = decode_lock(content) if content is not None else None
            if record is not None:
                self._ttl_ms = record.ttl_ms
            await self._put_over(self._body(self._nonce))

    async def _put_over(self, body: bytes) -> None:
        """Replace our version of the lock. Raises LeaseLostError if it is not ours any more, StoreError."""
        assert self._nonce is not None
        before = self._clock()
        self._sent.append(body)
        self.writes += 1
        try:
            for _ in range(2):
                try:
                    info = await self._remote.put(self.key, body, matching(self._etag), Lane.LOCK)
                    break
                except (PreconditionError, AbsentError):
                    found = await self.look()
                    if found is None or not self._is_ours(self._nonce, found[0], found[1]):
                        self._nonce, self._wanted = None, ""
                        raise LeaseLostError(f"the lock {self.key} was lost to another machine") from None
                    info = found[2]
                    if found[1] == body:
                        break  # applied, and not answered
                    self._etag = info.etag  # so was an earlier one
            else:
                raise ConflictingWriteError(f"the lock {self.key} could not be renewed")
        finally:
            self.writes += 1
        self._etag, self._renewed, self._sent = info.etag, before, [body]

    def _is_ours(self, nonce: str, holder: LockInfo | None, body: bytes) -> bool:
        return body in self._sent or (self.content is None and holder is not None and holder.nonce == nonce)

    async def release(self) -> None:
        """Remove our lock, and only ours. Idempotent; a store that does not answer leaves it to the TTL."""
        try:
            if not await self.give_up():
                log.info("lock %s was taken over before we released it", self.key)
        except StoreError as error:
            log.info("lock %s stays until its TTL: %s", self.key, error)

    async def give_up(self) -> bool:
        """As :meth:`release`; returns whether it still was ours. Raises StoreError."""
        async with self._turn:
            nonce, self._nonce = self._nonce, None
            if nonce is None:
                return False
            self.writes += 1
            try:
                gone = await self.break_version(self._etag)
                if not gone:
                    found = await self.look()  # the last renewal may have been applied without our knowing
                    if found is not None and self._is_ours(nonce, found[0], found[1]):
                        gone = await self.break_version(found[2].etag)
            except BaseException:
                self._nonce = nonce  # it may be there still: to be tried again, if need be by the next process
                raise
            self._settle()
            return gone

    def _settle(self) -> None:
        self._wanted = ""
        self._note(self.key, None)

    @property
    def is_busy(self) -> bool:
        """Whether a renewal is under way, so that what the store shows may be ours without our knowing yet."""
        return self._turn.locked()

    def is_version(self, etag: str) -> bool:
        """Whether this version of the lock is the one we wrote."""
        return self._nonce is not None and etag == self._etag

    async def abandon(self) -> None:
        """An acquisition was cancelled: if it had succeeded all the same, give the lock back."""
        if self.is_settled:
            return
        with contextlib.suppress(StoreError):
            if self.held or await self._adopt(self._wanted):
                await self.give_up()
            self._settle()

    async def inspect(self) -> LockInfo | None:
        found = await self._inspect()
        return found[0] if found else None

    async def look(self) -> tuple[LockInfo | None, bytes, ObjectInfo] | None:
        """Holder, content and version as they are now; ``None`` if there definitely is no lock. Raises StoreError."""
        try:
            blob = await self._remote.get(self.key, lane=Lane.LOCK)
        except AbsentError:
            self._sightings.pop(self.key, None)
            return None
        assert blob is not None
        self._sight(blob.info.etag)
        return decode_lock(blob.body), blob.body, blob.info

    def unmoved_s(self, etag: str) -> float:
        """For how long, on our own clock, this version of somebody's lock has been seen not to move."""
        return self._clock() - self._sight(etag).since

    async def break_version(self, etag: str) -> bool:
        """Remove the lock if it still is this very version of it."""
        try:
            await self._remote.delete(self.key, matching(etag), Lane.LOCK)
        except (PreconditionError, AbsentError) as error:
            return error.retried and await self.look() is None  # the first attempt did it, unanswered
        return True

    async def force_release(self, nonce: str) -> bool:
        """Remove somebody's lock, if it still is that acquisition's."""
        found = await self._inspect()
        if found is None or found[0] is None or found[0].nonce != nonce:
            return False
        return await self.break_version(found[1].etag)

    async def renew(self) -> None:
        """One heartbeat. Marks the lock lost if its version is not the one we wrote."""
        async with self._turn:
            if self._nonce is not None:
                await self._renew(self._nonce)

    async def _renew(self, nonce: str) -> None:
        try:
            await self._put_over(self._body(nonce))
        except LeaseLostError:
            log.info("the lock %s belongs to somebody else by now", self.key)
        except StoreError as error:  # unknown: `check` decides by the time since the last renewal
            log.info("heartbeat of %s failed, retrying: %s", self.key, error)

    async def heartbeat(self) -> None:
        """Renew every third of the TTL until cancelled or lost."""
        while self.held:
            await trio.sleep(self.beat_s)
            await self.renew()

    # --- parts --------------------------------------------------------------------------------------------

    async def _try_create(self, nonce: str) -> bool:
        before = self._clock()
        body = self._body(nonce)
        self._sent = [body]
        try:
            info = await self._remote.put(self.key, body, ABSENT, Lane.LOCK)
        except (PreconditionError, ConflictingWriteError):
            return await self._adopt(nonce)
        except StoreError:
            with contextlib.suppress(StoreError):
                if await self._adopt(nonce):
                    return True
            raise
        self._etag, self._nonce, self._renewed = info.etag, nonce, before
        return True

    async def _adopt(self, nonce: str) -> bool:
        """A put that was refused, or not answered, may have been applied: then the lock carries our nonce (H28)."""
        before = self._clock()
        found = await self.look()
        if found is None:
            return False
        holder, body, info = found
        ours = self._is_ours(nonce, holder, body)
        if ours:
            self._etag, self._nonce, self._renewed = info.etag, nonce, before
        return ours

    async def _inspect(self) -> tuple[LockInfo | None, ObjectInfo] | None:
        found = await self.look()
        return (found[0], found[2]) if found else None

    def _sight(self, etag: str) -> Sighting:
        sighting = self._sightings.get(self.key)
        if sighting is None or sighting.etag != etag:
            sighting = self._sightings[self.key] = Sighting(etag, self._clock())
        return sighting

    def is_stale(self, holder: LockInfo | None, etag: str) -> bool:
        """Nobody has moved the lock for its own TTL, on our clock; or its process is dead on this very host."""
        ttl_ms = holder.ttl_ms if holder else self._ttl_ms
        dead = self._trust_pids and holder is not None and _pid_is_dead(holder)
        return dead or self.unmoved_s(etag) > ttl_ms / 1000

    async def _steal_if_stale(self, holder: LockInfo | None, info: ObjectInfo) -> bool:
        if not self.is_stale(holder, info.etag) or not await self.break_version(info.etag):
            return False  # it is alive; or it moved after all, or another one stole it first
        await trio.sleep(random.uniform(0.2, 0.5))  # noqa: S311
        return True

    def _body(self, nonce: str) -> bytes:
        if self.content is not None:
            return self.content
        user = os.environ.get("USER") or os.environ.get("USERNAME") or "unknown"
        host = socket.gethostname()
        info = LockInfo(f"{user}@{host}", host, os.getpid(), timestamp(time.time_ns()), self._ttl_ms, nonce)
        return encode_lock(info)


def lock_timeout(key: str, holder: LockInfo | None, waited_s: float) -> LockTimeoutError:
    who = f" held by {holder.holder} (pid {holder.pid})" if holder else ""
    waited_ms = int(waited_s * 1000)
    text = f'Lock "{key}"{who} — timed out after {waited_ms}ms'
    return LockTimeoutError(text, lock_key=key, holder=holder, waited_ms=waited_ms)


@asynccontextmanager
async def hold(lock: Lock) -> AsyncIterator[Lock]:
    """Acquire, keep alive, always release — also when the body is cancelled."""
    await lock.acquire()
    failure: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lock.heartbeat)
            try:
                yield lock
            except Exception as error:  # re-raised below: the nursery would wrap it in a group
                failure = error
            nursery.cancel_scope.cancel()
    finally:
        with trio.CancelScope(shield=True), trio.move_on_after(10):
            await lock.release()
    if failure is not None:
        raise failure


async def is_free(lock: Lock) -> bool:
    """Whether nobody holds a lock, breaking one that is stale."""
    found = await lock._inspect()
    return found is None or await lock._steal_if_stale(*found)


async def wait_until_free(lock: Lock, max_wait_s: float) -> None:
    """Spec §9.4: a writer waits while the global lock is held, and breaks it when it is stale."""
    started = time.monotonic()
    while True:
        if await is_free(lock):
            return
        waited = time.monotonic() - started
        if waited >= max_wait_s:
            raise lock_timeout(lock.key, await lock.inspect(), waited)
        await trio.sleep(min(RETRY_S, max_wait_s))


async def prove_preconditions(remote: Remote, key: str) -> None:
    """Refuse a store that ignores preconditions, with one request and without leaving anything behind.

    Asks to replace a version that cannot exist: an honest store refuses (412, or 404), a careless one stores it.

    Raises:
        PreconditionsUnsupportedError: the store took the write, or does not know the header.
    """
    try:
        await remote.put(key, b"swampfs precondition probe\n", matching("1"), Lane.LOCK)
    except (PreconditionError, AbsentError):
        return
    await remote.delete(key, lane=Lane.LOCK)
    raise PreconditionsUnsupportedError(f"{remote.name} ignores conditional writes: two writers would both win")


async def prove_exclusive_create(remote: Remote, lock: Lock) -> None:
    """With a lock in hand, make sure that creating it once more is refused. One request.

    Raises PreconditionsUnsupportedError; the caller still releases the lock.
    """
    try:
        await remote.put(lock.key, b"{}", ABSENT, Lane.LOCK)
    except PreconditionError:
        return
    await remote.delete(lock.key, lane=Lane.LOCK)
    raise PreconditionsUnsupportedError(f"{remote.name} lets two writers create the same object")
