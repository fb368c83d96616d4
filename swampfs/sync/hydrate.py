"""Fetching one file's content: single-flight, verified, atomic (spec §8.2 BETTER, H35).

The bytes go to ``staging/``, are checked against the index entry's size and hash, and only then renamed into
``files/``. Bytes that do not match are most often a push in progress — its content lands before its index entry — so
the index is polled again until the two agree or the caller's patience ends.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable

import trio
from cachetools import LRUCache

from swampfs.errors import AbsentError, IntegrityError, PreconditionError, SwampfsError
from swampfs.names import RelPath
from swampfs.records import IndexEntry, Node, Residency
from swampfs.spans import span
from swampfs.sync.hashing import hash_file
from swampfs.sync.incoming import LARGE, Incoming, StoppedError
from swampfs.sync.parts import Parts
from swampfs.sync.room import Room, is_full
from swampfs.threads import Lane

_MISMATCH_PAUSE_S = 0.25
_REMEMBERED = 1000  # failures
_LINGER_S = 5.0  # for which parts that nobody reads any more are kept


class _Flight:
    """A download under way and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None
        self.waiting = 0


class Hydrator:
    """Brings files to this machine. All state is on the loop; only the transfer and the hash are in threads."""

    def __init__(
        self,
        parts: Parts,
        *,
        refresh: Callable[[], Awaitable[object]],
        start_soon: Callable[..., object],
        timeout_s: float,
    ) -> None:
        self._remote = parts.remote
        self._keys = parts.keys
        self._catalog = parts.catalog
        self._cache = parts.cache
        self._refresh = refresh
        self._start_soon = start_soon
        self.timeout_s = timeout_s
        self._flights: dict[RelPath, _Flight] = {}
        self._coming: dict[RelPath, Incoming] = {}
        self.room = Room()
        """Where content goes; the composition root may set a limit."""
        self.failures: LRUCache[str, str] = LRUCache(_REMEMBERED)
        """Path → why its content could not be brought here, the last time."""

    async def hydrate(self, path: RelPath) -> None:
        """Return when the content of ``path`` is local.

        The download belongs to no caller: one that gives up leaves it running for the next.

        Raises:
            AbsentError: the index does not know the path, or its object is gone.
            IntegrityError: the object's bytes do not match the index.
            StoreError: the store did not answer.
        """
        while True:
            flight = self._begin(path)
            flight.waiting += 1
            try:
                await flight.done.wait()
            finally:
                flight.waiting -= 1
            if not isinstance(flight.error, StoppedError):
                break
        if flight.error is not None:
            raise flight.error

    def _begin(self, path: RelPath) -> _Flight:
        flight = self._flights.get(path)
        if flight is None:
            flight = self._flights[path] = _Flight()
            self._start_soon(self._fly, path)
        return flight

    async def open_early(self, node: Node) -> Incoming | None:
        """A large file of which parts can be read before all of it is here; ``None``: the whole is to be waited for.

        Raises what the store raises. Whoever gets one gives it back with :meth:`leave`.
        """
        if node.size < LARGE or node.base is None:
            return None
        coming = self._incoming(node.base)
        if coming.is_complete_soon:
            return None  # and then the kernel can read it by itself
        coming.readers += 1
        try:
            await coming.begin()
        except (IntegrityError, AbsentError, PreconditionError):
            self.leave(coming)  # perhaps a push in progress: who waits for the whole waits for that too
            return None
        except BaseException:
            self.leave(coming)
            raise
        if coming.may_be_early:
            return coming
        self.leave(coming)
        return None

    def want_all(self, coming: Incoming) -> None:
        """Somebody reads it from one end to the other."""
        if self._coming.get(coming.entry.path) is coming:
            self._begin(coming.entry.path)

    def leave(self, coming: Incoming) -> None:
        """A reader is done. What nobody wants to read any more is forgotten after a while."""
        coming.readers -= 1
        if coming.readers == 0:
            self._start_soon(self._forget, coming)

    async def _forget(self, coming: Incoming) -> None:
        path = coming.entry.path
        if self._coming.get(path) is coming:
            flight = self._flights.get(path)
            if flight is not None and not flight.waiting and not coming.readers and not coming.is_fetched:
                coming.stop()
            await trio.sleep(_LINGER_S)
        if not coming.readers and not coming.is_fetching:
            self._drop(coming)

    def _drop(self, coming: Incoming) -> None:
        """No more readers come to it; the last of those it has closes it."""
        if self._coming.get(coming.entry.path) is coming:
            del self._coming[coming.entry.path]
        if not coming.readers:
            coming.close()

    def _incoming(self, entry: IndexEntry) -> Incoming:
        """The one under way, or a new one."""
        coming = self._coming.get(entry.path)
        if coming is None or coming.entry != entry or coming.problem is not None or coming.is_stopped:
            key, staged = self._keys.data(entry.path), self._cache.stage()
            coming = self._coming[entry.path] = Incoming(self._remote, key, entry, staged, self.room)
        return coming

    async def fetch_aside(self, entry: IndexEntry) -> str:
        """Content of an entry that no longer has a name here, into ``staging/``; returns where.

        Raises StoreError if the datastore no longer has it.
        """
        staged = self._cache.stage()
        problem = await self._download(entry, staged)
        if problem is not None:
            os.unlink(staged)
            raise problem
        return staged

    async def _fly(self, path: RelPath) -> None:
        flight = self._flights[path]
        try:
            with span("hydrate", path=path):
                await self._fetch(path)
            self.failures.pop(path, None)
        except StoppedError as error:
            flight.error = error  # who waits begins again
        except Exception as error:
            flight.error = error
            self.failures[path] = error.line() if isinstance(error, SwampfsError) else str(error)
        finally:
            del self._flights[path]
            flight.done.set()

    async def _fetch(self, path: RelPath) -> None:
        give_up = time.monotonic() + self.timeout_s * 0.8
        while True:
            node = self._catalog.at(path)
            if node is None or node.base is None:
                raise AbsentError(f"{path} is not in the datastore")
            if node.residency is not Residency.STUB:
                return
            if node.base.size >= LARGE:
                problem = await self._fetch_in_parts(node.base)
            else:
                problem = await self._fetch_whole(node.base)
            if problem is None:
                continue  # it is here, or the index moved while we read
            if time.monotonic() > give_up:
                raise problem
            await self._refresh()
            current = self._catalog.at(path)
            if current is not None and current.base == node.base:
                await trio.sleep(_MISMATCH_PAUSE_S)

    async def _fetch_whole(self, entry: IndexEntry) -> SwampfsError | None:
        """Returns what is wrong with the content, if anything is."""
        staged = self._cache.stage()
        try:
            self.room.check()
            problem = await self._download(entry, staged)
            if problem is None:
                self._admit(entry, staged)
        except OSError as error:
            if os.path.lexists(staged):
                os.unlink(staged)
            if not is_full(error) or not await self.room.make_room(entry.size):
                raise
            return None
        finally:
            if os.path.lexists(staged):
                os.unlink(staged)
        return problem

    async def _fetch_in_parts(self, entry: IndexEntry) -> SwampfsError | None:
        """As :meth:`_fetch_whole`, of a large file."""
        coming = self._incoming(entry)
        try:
            await coming.fetch_all()
            self._admit(entry, coming.staged)
        except AbsentError as error:
            return AbsentError(f"{entry.path} is in the index but its object is gone: {error}")
        except (IntegrityError, PreconditionError) as error:
            return error
        finally:
            if coming.done.is_set() or not coming.readers:
                self._drop(coming)
        return None

    async def _download(self, entry: IndexEntry, staged: str) -> SwampfsError | None:
        """Fetch and verify; returns what is wrong with the content, if anything is."""
        key = self._keys.data(entry.path)

        def transfer() -> SwampfsError | None:
            try:
                self._remote.store.download(key, staged)
            except AbsentError as error:
                return AbsentError(f"{entry.path} is in the index but its object is gone: {error}")
            size = os.stat(staged).st_size
            if size != entry.size:
                return IntegrityError(f"{entry.path} has {size} bytes in the datastore; its index says {entry.size}")
            if entry.sha256 is not None and hash_file(staged) != entry.sha256:
                return IntegrityError(f"{entry.path} in the datastore does not have the hash its index says")
            return None

        return await self._remote.threads.read(Lane.HYDRATE, transfer)

    def _admit(self, entry: IndexEntry, staged: str) -> bool:
        """Put verified content in place if the path still stands for it."""
        node = self._catalog.at(entry.path)
        if node is None or not entry.same_content(node.base):
            return False
        if node.residency is not Residency.STUB:
            return True
        self._cache.admit(staged, entry.path, node.mtime_ns)
        self._catalog.set_residency(node.ino, Residency.CLEAN)
        self.room.came(entry.size)
        return True
