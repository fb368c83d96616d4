"""A large file on its way: parts of it can be read before all of it is here.

A whole file is known to be right by its hash. A part that is given out before that is known by one of two things: the
way to the store authenticates what it carries, or two requests, for different ranges, had the same bytes there. All
parts are of one version of the object (by its ETag), of the size that the index says, and stored no later than the
index says; where that is not so, nothing is given out early. When all parts are here the whole is hashed, as ever,
before it is kept.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import trio

from swampfs.errors import AbsentError, IntegrityError, PreconditionError, SwampfsError
from swampfs.provider import AbortSignal, Blob
from swampfs.records import IndexEntry, timestamp_ns
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote
from swampfs.sync.room import Room, is_full
from swampfs.threads import Lane, abort_signal

T = TypeVar("T")

LARGE = 8 << 20
"""Bytes from which on a file is fetched in parts."""
PART = 256 << 10
_RUN = 16  # parts in one request when all are wanted
_AT_ONCE = 12  # such requests
_SHIFT = 4096  # bytes by which the range of a second request differs
_COPIES = 4  # that are asked for until two agree
_PATIENCE_S = 2.0  # for the whole to be here, before parts of it are asked for twice
_SEQUENTIAL = 2  # requests for further parts in order, after which all are wanted
_SOON = 64 << 20  # bytes that are hashed in no time worth mentioning
_AT_A_TIME = 16 << 20  # bytes that are hashed
_BEHIND = 256 << 20  # bytes by which the hash may be behind where readers do not wait for it, but for a processor
_TOLERANCE_NS = 5_000_000_000  # between the clocks of the store and of who wrote the index

_HERE, _SURE = 1, 2


class StoppedError(SwampfsError):
    """The last reader left."""


class Incoming:
    """One version of one file. On the loop; transfers are in threads. ``staged`` is where it grows."""

    def __init__(self, remote: Remote, key: str, entry: IndexEntry, staged: str, room: Room) -> None:
        self._remote = remote
        self._room = room
        self._key = key
        self.entry = entry
        self.staged = staged
        self.fd = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._parts = bytearray()  # 0, _HERE or _SURE, each; of none until the object has the size that is said
        self._beginning = trio.Lock()
        self._digest, self._hashed, self._is_hashing = hashlib.sha256(), 0, False  # up to an offset
        self._flights: dict[int, trio.lowlevel.ParkingLot] = {}  # part → who waits for something of its request
        self._etag = ""
        self.may_be_early = False
        """Whether parts may be given out before the whole is here."""
        self._next = 0  # part that a sequential reader wants next
        self._in_order = 0
        self._began: float | None = None  # to fetch all of it
        self._fetching = trio.CancelScope()
        self._given_up = AbortSignal()  # for the threads, so that they repeat nothing
        self.is_stopped = False
        """Threads may still write to ``staged``, so that it must not become content any more."""
        self.done = trio.Event()
        """All of it is here and right, or :attr:`problem` says why not."""
        self.problem: Exception | None = None
        self.is_abandoned = False
        self.closed = False
        self.readers = 0
        """Who has it open; see :meth:`swampfs.sync.hydrate.Hydrator.leave`."""

    def close(self) -> None:
        """Nobody reads it, and what is not complete is given up."""
        if self.closed:
            return
        self.closed = True
        os.close(self.fd)
        with suppress(OSError):  # it has its place by now; or it goes at the next mount
            os.unlink(self.staged)

    def abandon(self, problem: Exception) -> None:
        """Nothing more of it is given out."""
        self.is_abandoned = True
        self.problem = problem
        self.done.set()
        self.stop()

    @property
    def is_fetching(self) -> bool:
        """Whether all of it is being fetched."""
        return self._began is not None

    @property
    def is_complete(self) -> bool:
        return self.done.is_set() and self.problem is None

    @property
    def is_fetched(self) -> bool:
        """Whether all of it is here, be it known to be right or not."""
        return bool(self._parts) and 0 not in self._parts

    @property
    def is_complete_soon(self) -> bool:
        """Whether there is nothing to wait for but a short computation."""
        return self.is_fetched and self.entry.size - self._hashed <= _SOON

    async def begin(self) -> None:
        """Fetch the first part, once.

        Raises IntegrityError if the object is not what the index says, and what the store raises.
        """
        async with self._beginning:
            if not self._etag:
                await self._fetch_first()

    async def _fetch_first(self) -> None:
        answers = await self._gather([self._get(0, PART + shift * _SHIFT) for shift in range(self._need)])
        first = answers[0]
        size, said = first.info.size, self.entry.size
        if size != said:
            raise IntegrityError(f"{self.entry.path} has {size} bytes in the datastore; its index says {said}")
        os.ftruncate(self.fd, size)
        self._parts = bytearray(-(-size // PART))
        agreed = all(one.body[:PART] == first.body[:PART] and one.info.etag == first.info.etag for one in answers)
        await self._write(0, first.body[:PART], self._need if agreed else _HERE)
        stored, meant = timestamp_ns(first.info.last_modified), timestamp_ns(self.entry.last_modified)
        self.may_be_early = stored is not None and meant is not None and stored <= meant + _TOLERANCE_NS
        self._etag = first.info.etag

    def is_here(self, offset: int, size: int) -> bool:
        """Whether a range may be given out now."""
        if self.is_complete:
            return True
        touched, need = _touched(offset, size, len(self._parts)), self._need
        return self.problem is None and all(self._parts[part] >= need for part in touched)

    async def wait_for(self, offset: int, size: int) -> None:
        """Return when a range may be given out. Raises what keeps it from being so."""
        touched = _touched(offset, size, len(self._parts))
        while not self.is_here(offset, size):  # while one is waited for, all may turn out to be wrong, and come again
            failed = await for_each(touched, self._wait_for, at_once=len(touched) or 1)
            if failed:
                raise failed[0]
            if self.problem is not None:
                raise self.problem

    @property
    def _need(self) -> int:
        return _HERE if self._remote.store.authenticated else _SURE

    @property
    def wants_all(self) -> bool:
        """Whether somebody reads it from one end to the other."""
        return self._in_order >= _SEQUENTIAL

    def note_reader(self, offset: int, size: int) -> None:
        """Somebody wants this range. Told in the order of asking, before any wait."""
        touched = _touched(offset, size, len(self._parts))
        if not touched:
            return
        if touched.start not in (self._next - 1, self._next):
            self._next, self._in_order = touched.stop, 0
        elif touched.stop > self._next:
            self._next, self._in_order = touched.stop, self._in_order + 1

    async def _wait_for(self, part: int) -> None:
        if self._began is not None and not self._remote.store.authenticated:
            with trio.move_on_after(max(0.0, self._began + _PATIENCE_S - time.monotonic())):
                await self.done.wait()
        while not self.is_complete:
            if self.problem is not None:
                raise self.problem
            if self._parts[part] >= self._need:
                return
            flight = self._flights.get(part)
            if flight is not None:
                await flight.park()
                continue
            with self._flying(range(part, part + 1)):
                await self._make_sure(part)

    async def _make_sure(self, part: int) -> None:
        """Have a part as surely as is needed to give it out."""
        copies = [os.pread(self.fd, PART, part * PART)] if self._parts[part] else []
        while len(copies) < _COPIES:
            missing = max(1, self._need - len(copies))
            shifts = [(len(copies) + number) * _SHIFT for number in range(missing)]
            copies += await self._gather([self._copy(part, shift) for shift in shifts])
            agreed = next((copy for copy in copies if copies.count(copy) >= self._need), None)
            if agreed is not None:
                if self._parts[part] and agreed == copies[0]:
                    self._parts[part] = self._need
                else:
                    await self._write(part, agreed, self._need)
                return
        raise IntegrityError(f"{self.entry.path} is never the same when it is read from the datastore")

    async def _copy(self, part: int, shift: int) -> bytes:
        """A part, by a request for a little more than it."""
        start = max(0, part * PART - shift)
        end = min(self.entry.size, (part + 1) * PART + shift)
        blob = await self._get(start, end - start)
        skipped = part * PART - start
        return blob.body[skipped : skipped + PART]

    async def _gather(self, asked: Sequence[Awaitable[T]]) -> list[T]:
        """All of it at once. Raises the first failure."""
        answers: list[T] = []

        async def ask(one: Awaitable[T]) -> None:
            answers.append(await one)

        failed = await for_each(asked, ask, at_once=len(asked))
        if failed:
            raise failed[0]
        return answers

    async def _get(self, offset: int, size: int) -> Blob:
        store, key = self._remote.store, self._key
        blob = await self._remote.threads.read(Lane.HYDRATE, lambda: store.part(key, offset, size, etag=self._etag))
        if len(blob.body) != size:
            raise IntegrityError(self._other_bytes)
        return blob

    async def _write(self, part: int, body: bytes, level: int) -> None:
        while True:
            try:
                self._room.check()
                await self._remote.threads.write(Lane.DISK, _write_at, self.fd, body, part * PART)
                break
            except OSError as error:
                if not is_full(error) or not await self._room.make_room(len(body)):
                    raise
        if part * PART < self._hashed:
            self._digest, self._hashed = hashlib.sha256(), 0
        for number in range(part, part + -(-len(body) // PART)):
            self._parts[number] = max(level, self._parts[number])

    # --- all of it ----------------------------------------------------------------------------------------

    async def fetch_all(self) -> None:
        """Return when all of it is here and right. Raises what keeps it from being so, or StoppedError."""
        if not self.done.is_set():
            if self.is_stopped:
                raise StoppedError(f"{self.entry.path} is not fetched any more")
            self._began, self._fetching = time.monotonic(), trio.CancelScope()
            before = abort_signal.set(self._given_up)
            try:
                with self._fetching:
                    await self._fetch_and_verify()
                    self.done.set()
            except (AbsentError, IntegrityError, PreconditionError) as error:
                self.problem = error
                self.done.set()
            finally:
                self._began = None
                abort_signal.reset(before)  # what the task does after it is not given up with it
            if not self.done.is_set():
                raise StoppedError(f"{self.entry.path} is not fetched any more: nobody reads it")
        if self.problem is not None:
            raise self.problem

    def stop(self) -> None:
        """Do not fetch all of it any more. Who wants it has to begin anew."""
        self.is_stopped = True
        self._fetching.cancel()
        self._given_up.abort()

    async def _fetch_and_verify(self) -> None:
        await self.begin()
        await self._fetch_runs()
        if not self._is_right():
            self._parts = bytearray(len(self._parts))  # once more: the network may have done it
            self._digest, self._hashed = hashlib.sha256(), 0
            await self._fetch_runs()
            if not self._is_right():
                raise IntegrityError(f"{self.entry.path} in the datastore does not have the hash its index says")

    async def _fetch_runs(self) -> None:
        runs = -(-len(self._parts) // _RUN)
        failed: list[Exception] = []

        async def fetch(run: int) -> None:
            try:
                if not failed:
                    await self._fetch_run(run * _RUN)
            except Exception as error:
                failed.append(error)

        await for_each([(self._next // _RUN + number) % runs for number in range(runs)], fetch, at_once=_AT_ONCE)
        if failed:
            raise failed[0]
        await self._hash_on()  # what readers fetched

    async def _fetch_run(self, first: int) -> None:
        last = min(first + _RUN, len(self._parts))
        while first < last:
            if self._parts[first]:
                first += 1
            elif first in self._flights:
                await self._flights[first].park()
            else:
                async with self._remote.threads.slot(Lane.LARGE):  # until then, who wants a part asks for it alone
                    end = next((part for part in range(first, last) if not self._is_missing(part)), last)
                    if end > first:
                        with self._flying(range(first, end)) as flight:
                            await self._stream(first, end, flight)
                await self._hash_on(behind=_BEHIND if self.readers and self._need == _HERE else 0)

    def _is_missing(self, part: int) -> bool:
        return not self._parts[part] and part not in self._flights

    async def _stream(self, first: int, end: int, flight: trio.lowlevel.ParkingLot) -> None:
        """Fetch parts by one request; each is here as soon as it has come. If the disk is full, only some may be."""
        loop = trio.lowlevel.current_trio_token()
        store, start, stop = self._remote.store, first * PART, min(self.entry.size, end * PART)
        came = written = start

        def transfer() -> None:
            with open(self.staged, "r+b", buffering=0) as file:  # nobody else closes it

                def take(offset: int, piece: memoryview) -> None:
                    nonlocal came, written
                    if self.is_stopped:
                        raise StoppedError(f"{self.entry.path} is not fetched any more")
                    came = offset + len(piece)
                    if came > stop:
                        raise IntegrityError(self._other_bytes)
                    if came > written:  # again from the first, if the request is repeated: what is here may be hashed
                        _write_at(file.fileno(), piece[max(0, written - offset) :], max(written, offset))
                        written = came
                        loop.run_sync_soon(self._came, flight, first, end if came == stop else came // PART)

                store.part(self._key, start, stop - start, etag=self._etag, take=take)

        try:
            self._room.check()
            await self._remote.threads.read_in_slot(transfer)
        except OSError as error:
            if not is_full(error) or not await self._room.make_room(stop - start):
                raise
        else:
            if came != stop:
                raise IntegrityError(self._other_bytes)

    @property
    def _other_bytes(self) -> str:
        return f"{self.entry.path} has other bytes in the datastore than its index says"

    def _came(self, flight: trio.lowlevel.ParkingLot, first: int, end: int) -> None:
        for part in range(first, end):
            self._parts[part] = max(_HERE, self._parts[part])
        flight.unpark_all()

    @contextmanager
    def _flying(self, parts: range) -> Iterator[trio.lowlevel.ParkingLot]:
        flight = trio.lowlevel.ParkingLot()
        self._flights.update(dict.fromkeys(parts, flight))
        try:
            yield flight
        finally:
            for part in parts:
                del self._flights[part]
            flight.unpark_all()

    async def _hash_on(self, behind: int = 0) -> None:
        """As far as there is no gap, but for so many bytes; one at a time."""
        if self._is_hashing:
            return
        self._is_hashing = True
        try:
            while (until := self._whole_until() - behind) > self._hashed:
                end = min(until, self._hashed + _AT_A_TIME)
                digest, start, self._hashed = self._digest, self._hashed, end
                await self._remote.threads.write(Lane.DISK, _hash_range, digest, self.fd, start, end)
        except BaseException:
            self._digest, self._hashed = hashlib.sha256(), 0
            raise
        finally:
            self._is_hashing = False

    def _whole_until(self) -> int:
        gap = self._parts.find(0)
        return self.entry.size if gap < 0 else gap * PART

    def _is_right(self) -> bool:
        return self.entry.sha256 in (None, self._digest.hexdigest())


def _touched(offset: int, size: int, count: int) -> range:
    return range(min(offset // PART, count), min(-(-(offset + size) // PART), count))


def _hash_range(digest: Any, fd: int, start: int, end: int) -> None:
    with memoryview(bytearray(min(end - start, 1 << 20))) as buffer:
        while start < end:
            got = os.preadv(fd, [buffer[: end - start]], start)
            if not got:
                return  # cut short by somebody: the hash will not be right
            digest.update(buffer[:got])
            start += got


def _write_at(fd: int, body: bytes | memoryview, offset: int) -> None:
    view = memoryview(body)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done
