"""How much content stays on this machine: clean files nobody has open go, the longest unused first.

What is dirty, open or has several names is never evicted, so the limit can be exceeded, but nothing is ever lost by it.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import trio
import trio.lowlevel

from swampfs.fs.files import Files
from swampfs.records import Node, Residency, TreeChange
from swampfs.state.ballast import Ballast
from swampfs.sync.room import Room
from swampfs.sync.service import SyncService
from swampfs.threads import Lane

log = logging.getLogger(__name__)

_LOW = 0.9  # of the limit: how far an eviction goes, so that it is not needed again at once
_AT_ONCE = 256  # files between two looks at the loop
_CHECK_AFTER = 0.01  # of the limit: content that came since the last check
_AGAIN_S = 1.0  # while what is too much cannot go


class CacheLimit(Room):
    """Evicts. ``limit`` in bytes."""

    def __init__(self, sync: SyncService, files: Files, limit: int, ballast: Ballast) -> None:
        self._sync = sync
        self._files = files
        self._ballast = ballast
        self.limit = limit
        self.evicted = 0  # files, since the mount
        self.is_pinned: Callable[[str], bool] = lambda path: False
        """Whether a user wants to have it here; set by :class:`swampfs.fs.keeping.Keeping`."""
        self._level = self.used  # at the last check
        self._came = 0  # since then
        self._keepers = 0
        self._wake = trio.Event()

    @property
    def used(self) -> int:
        """Bytes of content on this machine, as files say they have."""
        return self._sync.catalog.local_bytes()

    def spare(self) -> int:
        disk = self._sync.cache.free_bytes()
        free = (disk.f_bavail - int(disk.f_blocks * (1 - _LOW))) * disk.f_frsize
        return min(int(self.limit * _LOW) - self._level - self._came, free)

    def came(self, size: int) -> None:
        self._came += size
        if self._came >= self.limit * _CHECK_AFTER:
            self._wake.set()

    async def run(self) -> None:
        """Keep to the limit, for ever."""
        while True:
            self._wake, self._came, self._level = trio.Event(), 0, self.used
            if self._level > self.limit and not self._keepers:
                await self.free(self._level - int(self.limit * _LOW))
                with trio.move_on_after(_AGAIN_S if self.used > self.limit else float("inf")):
                    await self._wake.wait()
            else:
                await self._wake.wait()

    def check(self) -> None:
        if not self._ballast.held and not self._ballast.hold():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def keeping(self) -> Iterator[None]:
        self._keepers += 1
        try:
            yield
        finally:
            self._keepers -= 1
            self._wake.set()

    async def make_room(self, size: int) -> bool:
        """Evict at least so much, whatever the limit. Else what is left goes to the databases."""
        freed = 0 if self._keepers else await self.free(max(size, int(self.used * (1 - _LOW))))
        log.info("the disk of the state directory is full; %d bytes of clean content were evicted", freed)
        if not freed:
            self._ballast.release()
        return freed > 0

    def databases_need_room(self) -> None:
        self._ballast.release()

    async def free(self, size: int) -> int:
        """Evict files of so many bytes together, as far as there are any. Returns what went."""
        candidates = await self._by_age(self._sync.catalog.clean_files())
        freed = 0
        for start in range(0, len(candidates), _AT_ONCE):
            if freed >= size:
                break
            freed += self._evict(candidates[start : start + _AT_ONCE], size - freed)
            await trio.lowlevel.checkpoint()
        return freed

    def evict(self, nodes: Sequence[Node]) -> int:
        """These, as far as they may go. Returns the bytes that went."""
        return self._evict(nodes, sum(node.size for node in nodes) + 1)

    async def _by_age(self, nodes: list[Node]) -> list[Node]:
        """The longest unused first. Of what was not opened since the mount, the file itself says."""
        uses = self._files.handles.last_use
        unknown = [node for node in nodes if node.ino not in uses]
        paths = [self._sync.cache.path(node.path) for node in unknown]
        read_at = await self._sync.remote.threads.read(Lane.DISK, _access_times, paths)
        ages = dict(zip((node.ino for node in unknown), read_at, strict=True))
        nodes.sort(key=lambda node: uses.get(node.ino) or ages[node.ino])
        return nodes

    def _evict(self, nodes: Sequence[Node], size: int) -> int:
        freed, changes = 0, []
        with self._sync.catalog.transaction():
            for node in nodes:
                if freed >= size:
                    break
                if self._may_go(node):
                    # Content first: a crash in between leaves a clean file that is fetched when it is opened.
                    self._sync.cache.remove(node.path)
                    self._sync.catalog.evicted(node.ino)
                    self._files.handles.last_use.pop(node.ino, None)
                    changes.append(TreeChange(node.parent, "", node.ino))
                    freed += node.size
                    self.evicted += 1
        self._sync.announce(changes)
        return freed

    def _may_go(self, node: Node) -> bool:
        """As it is now: anything may have happened since it was chosen."""
        now = self._sync.catalog.node(node.ino)
        return (
            now is not None
            and now.residency is Residency.CLEAN
            and now.path == node.path
            and now.base is not None
            and now.links == 1
            and now.path not in self._sync.journal
            and not self.is_pinned(now.path)
            and not self._files.handles.is_open(now.ino)
        )


def _access_times(paths: list[str]) -> list[float]:
    """On the clock that uses are counted by, as if the files had been used then."""
    offset = time.time() - time.monotonic()
    return [_access_time(path) - offset for path in paths]


def _access_time(path: str) -> float:
    try:
        found = os.lstat(path)
    except OSError:
        return 0.0
    return max(found.st_atime, found.st_ctime)
