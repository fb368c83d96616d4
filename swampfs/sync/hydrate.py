"""Fetching one file's content: single-flight, verified, atomic (spec §8.2 BETTER, H35).

The bytes go to ``staging/``, are checked against the index entry's size and hash, and only then renamed into
``files/``. Bytes that do not match are most often a push in progress — its content lands before its index entry — so
the index is polled again until the two agree or the caller's patience ends.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Awaitable, Callable

import trio
from cachetools import LRUCache

from swampfs.errors import AbsentError, IntegrityError, SwampfsError
from swampfs.names import RelPath
from swampfs.records import IndexEntry, Residency
from swampfs.sync.parts import Parts
from swampfs.sync.room import Room, is_full
from swampfs.threads import Lane

_MISMATCH_PAUSE_S = 0.25
_REMEMBERED = 1000  # failures


def hash_file(path: str) -> str:
    """SHA-256 of a file, lowercase hex."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Flight:
    """A download under way and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.error: Exception | None = None


class Hydrator:
    """Brings files to this machine. All state is on the loop; only the transfer and the hash are in threads."""

    def __init__(
        self,
        parts: Parts,
        *,
        refresh: Callable[[], Awaitable[object]],
        start_soon: Callable[[Callable[[RelPath], Awaitable[None]], RelPath], None],
        timeout_s: float,
    ) -> None:
        self._remote = parts.remote
        self._keys = parts.keys
        self._catalog = parts.catalog
        self._cache = parts.cache
        self._refresh = refresh
        self._start_soon = start_soon
        self._timeout_s = timeout_s
        self._flights: dict[RelPath, _Flight] = {}
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
        flight = self._flights.get(path)
        if flight is None:
            flight = self._flights[path] = _Flight()
            self._start_soon(self._fly, path)
        await flight.done.wait()
        if flight.error is not None:
            raise flight.error

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
            await self._fetch(path)
            self.failures.pop(path, None)
        except Exception as error:
            flight.error = error
            self.failures[path] = error.line() if isinstance(error, SwampfsError) else str(error)
        finally:
            del self._flights[path]
            flight.done.set()

    async def _fetch(self, path: RelPath) -> None:
        give_up = time.monotonic() + self._timeout_s * 0.8
        while True:
            node = self._catalog.at(path)
            if node is None or node.base is None:
                raise AbsentError(f"{path} is not in the datastore")
            if node.residency is not Residency.STUB:
                return
            staged = self._cache.stage()
            try:
                try:
                    self.room.check()
                    problem = await self._download(node.base, staged)
                except OSError as error:
                    if os.path.lexists(staged):
                        os.unlink(staged)
                    if not is_full(error) or not await self.room.make_room(node.base.size):
                        raise
                    continue
                if problem is None:
                    if self._admit(node.base, staged):
                        return
                    continue  # the index moved while we read
            finally:
                if os.path.lexists(staged):
                    os.unlink(staged)
            if time.monotonic() > give_up:
                raise problem
            await self._refresh()
            current = self._catalog.at(path)
            if current is not None and current.base == node.base:
                await trio.sleep(_MISMATCH_PAUSE_S)

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
