"""Fetching what will be opened next, so that a loop over many small files does not wait for each of them.

Who opens two files that are neighbours, for one of the reasons in :mod:`swampfs.state.traversal`, is expected to go
on. How far ahead of them we are grows with every guess that was right; a wrong one costs a few small files. What is
demanded has threads that nothing fetched ahead can take.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

import trio
from cachetools import LRUCache

from swampfs.names import RelPath
from swampfs.records import Node, TreeChange
from swampfs.state.traversal import Walk, following
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)

LARGEST = 4 << 20  # bytes of a file that is fetched ahead
_AT_ONCE = 16  # of the threads that hydrate; the others are for what is demanded
_FIRST, _FARTHEST = 8, 96  # files ahead of a walker
_LOOK = 200  # files that are considered at once
_MOST_BYTES = 64 << 20  # ahead of all of them
_WALKERS = 32
_PROCESSES = 256
_RECENT = 3
_MISSES = 4  # in a row, after which somebody does not go where we thought
_SAME_S = 2.0  # within which another process is most likely the next step of the same loop
_TELL_S = 1.0


@dataclass(eq=False, slots=True)
class _Walker:
    """Somebody who opens one file after another."""

    recent: deque[RelPath] = field(default_factory=lambda: deque(maxlen=_RECENT))  # what they opened last
    at: float = 0.0  # and when, on the monotonic clock
    walks: list[Walk] = field(default_factory=list)  # a marker, then what it names: that is two of them
    window: int = _FIRST
    misses: int = 0
    ahead: dict[int, int] = field(default_factory=dict)  # inode of what they are expected to open → its size


class Prefetch:
    """Of one mount. On the loop; costs a warm open one look into a dict."""

    def __init__(self, sync: SyncService) -> None:
        self._sync = sync
        self._processes: LRUCache[int, _Walker] = LRUCache(_PROCESSES)  # several may be one walker
        self._latest: list[_Walker] = []  # the one that opened something last comes last
        self._expected: dict[int, _Walker] = {}
        self.expected: Mapping[int, object] = self._expected
        """Inodes that somebody is expected to open: each is to be told by :meth:`opened`."""
        self._queue: deque[Node] = deque()
        self._nursery: trio.Nursery | None = None
        self._at_work = 0
        self._bytes = 0  # ahead of everybody
        self._arrived: dict[int, TreeChange] = {}
        self._some_arrived = trio.Event()
        self.fetched = 0
        self.used = 0

    def as_json(self) -> dict[str, int]:
        """``status``: files fetched ahead, those of them that were opened, and bytes expected to be."""
        return {"fetched": self.fetched, "used": self.used, "bytesAhead": self._bytes}

    def opened(self, node: Node) -> None:
        """What was expected happens: go on."""
        walker = self._expected.get(node.ino)
        if walker is None:
            return
        self._drop(walker, node.ino)
        self._arrived.pop(node.ino, None)
        self.used += 1
        walker.recent.append(node.path)
        walker.at, walker.misses = time.monotonic(), 0
        walker.window = min(walker.window + 1, _FARTHEST)
        if len(walker.ahead) <= walker.window * 3 // 4:
            self._go_on(walker)

    def demanded(self, node: Node, pid: int) -> None:
        """A process opens something that is not here."""
        if node.ino in self._expected:
            self.opened(node)
            return
        walker = self._walker(pid)
        walk = self._walk_to(walker, node)
        walker.recent.append(node.path)
        walker.at = time.monotonic()
        if walk is not None:
            others = [other for other in walker.walks if other.tails != walk.tails]
            walker.walks, walker.misses = [*others[-_RECENT + 1 :], walk], 0
            self._go_on(walker)
        elif walker.walks:
            walker.misses += 1
            if walker.misses >= _MISSES:
                self._give_up(walker)

    def _walk_to(self, walker: _Walker, node: Node) -> Walk | None:
        for last in reversed(walker.recent):
            walk = following(self._sync.catalog, last, node)
            if walk is not None:
                return walk
        return None

    def _walker(self, pid: int) -> _Walker:
        """A loop in a shell opens each file from another process."""
        walker = self._processes.get(pid)
        if walker is None:
            recent = self._latest[-1] if self._latest else None
            walker = recent if recent is not None and time.monotonic() - recent.at < _SAME_S else _Walker()
            self._processes[pid] = walker
        if walker in self._latest:
            self._latest.remove(walker)
        self._latest.append(walker)
        if len(self._latest) > _WALKERS:
            self._give_up(self._latest.pop(0))
        return walker

    def _go_on(self, walker: _Walker) -> None:
        walks = deque(walker.walks)
        for _ in range(_LOOK):
            if not walks or len(walker.ahead) >= walker.window or self._bytes >= _MOST_BYTES:
                return
            if self._sync.room.spare() <= self._bytes + LARGEST:
                return
            walks.rotate()
            node = walks[0].next()
            if node is None:
                walks.popleft()
            elif node.size <= LARGEST and node.ino not in self._expected:
                walker.ahead[node.ino] = node.size
                self._expected[node.ino] = walker
                self._bytes += node.size
                self._order(node)

    def _order(self, node: Node) -> None:
        self._queue.append(node)
        if self._at_work < _AT_ONCE and self._nursery is not None:
            self._at_work += 1
            self._nursery.start_soon(self._fetch_all)

    def _drop(self, walker: _Walker, ino: int) -> None:
        del self._expected[ino]
        self._bytes -= walker.ahead.pop(ino)

    def _give_up(self, walker: _Walker) -> None:
        for ino in list(walker.ahead):
            self._drop(walker, ino)
        walker.walks, walker.window, walker.misses = [], _FIRST, 0

    async def run(self) -> None:
        """Fetch, for ever."""
        async with trio.open_nursery() as self._nursery:
            while True:
                await self._some_arrived.wait()
                await trio.sleep(_TELL_S)
                # What is opened in time has its attributes asked for anyway.
                arrived, self._arrived, self._some_arrived = self._arrived, {}, trio.Event()
                self._sync.announce(list(arrived.values()))

    async def _fetch_all(self) -> None:
        while self._queue:
            node = self._queue.popleft()
            if node.ino in self._expected:  # not opened meanwhile, and not given up
                await self._fetch(node)
        self._at_work -= 1

    async def _fetch(self, node: Node) -> None:
        try:
            await self._sync.hydrate_file(node.path)
        except Exception as error:  # whatever it is, who opens the file is told
            log.debug("%s was not fetched ahead: %s", node.path, error)
            return
        self.fetched += 1
        if node.ino in self._expected:
            self._arrived[node.ino] = TreeChange(node.parent, "", node.ino)
            self._some_arrived.set()
