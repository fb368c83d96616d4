"""What users want to have on this machine, or not: fetching ahead, giving room back, pinning.

A pin is a file or a directory whose content stays, and is fetched when others change it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from swampfs.errors import SwampfsError
from swampfs.fs.background import repeat
from swampfs.fs.cache_limit import CacheLimit
from swampfs.names import RelPath
from swampfs.records import Node, Residency, TreeChange, Watermark
from swampfs.sync.parallel import for_each
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)

_AT_ONCE = 12  # with what is fetched ahead, less than there are threads for small files: a demanded one finds one
_PIN = "pin"
_TOLD = 20  # failures, by name


@dataclass(slots=True, eq=False)
class Job:
    """Content that is being fetched because somebody asked for it."""

    files: int
    bytes: int
    files_done: int = 0
    bytes_done: int = 0


class Keeping:
    """Of one mount. ``look_s``: how often it is seen whether others changed what is pinned."""

    def __init__(self, sync: SyncService, cache: CacheLimit, look_s: float) -> None:
        self._sync = sync
        self._cache = cache
        self._look_s = look_s
        self._pins = set(sync.catalog.facts(_PIN))
        self._jobs: list[Job] = []
        self._seen: Watermark | None = None  # of the index, when all that was pinned was here
        cache.is_pinned = self.is_pinned

    def progress(self) -> dict[str, int]:
        """Of all that is being fetched now, together."""
        return {
            "files": sum(job.files for job in self._jobs),
            "bytes": sum(job.bytes for job in self._jobs),
            "filesDone": sum(job.files_done for job in self._jobs),
            "bytesDone": sum(job.bytes_done for job in self._jobs),
        }

    @property
    def pins(self) -> list[str]:
        return sorted(self._pins)

    def is_pinned(self, path: str) -> bool:
        """Whether a path, or a directory above it, is pinned."""
        while path:
            if path in self._pins:
                return True
            path = path.rpartition("/")[0]
        return "" in self._pins

    async def hydrate(self, paths: Sequence[RelPath]) -> dict[str, Any]:
        """Bring content here. Returns how many files and bytes came, and why others did not."""
        came: list[Node] = []
        failed: dict[str, str] = {}
        stubs = [node for node in self._files(paths) if node.residency is Residency.STUB and node.base is not None]
        job = Job(len(stubs), sum(node.size for node in stubs))

        async def one(node: Node) -> None:
            try:
                await self._sync.hydrate_file(node.path)
                came.append(node)
            except (SwampfsError, OSError) as error:
                failed[node.path] = error.line() if isinstance(error, SwampfsError) else str(error)
            job.files_done += 1
            job.bytes_done += node.size

        self._jobs.append(job)
        try:
            await for_each(stubs, one, at_once=_AT_ONCE)
        finally:
            self._jobs.remove(job)
        self._sync.announce([TreeChange(node.parent, "", node.ino) for node in came])  # they have blocks now
        told = dict(sorted(failed.items())[:_TOLD])
        return {"files": len(came), "bytes": sum(node.size for node in came), "failed": len(failed), "errors": told}

    def evict(self, paths: Sequence[RelPath]) -> dict[str, Any]:
        """Give room back. What is pinned, open, or not in the datastore, stays."""
        clean = [node for node in self._files(paths) if node.residency is Residency.CLEAN]
        before = self._cache.evicted
        freed = self._cache.evict(clean)
        gone = self._cache.evicted - before
        return {"files": gone, "bytes": freed, "kept": len(clean) - gone}

    async def pin(self, paths: Sequence[RelPath]) -> dict[str, Any]:
        """Fetch, and keep. It holds over remounts."""
        for path in paths:
            self._sync.catalog.set_fact(f"{_PIN}:{path}", "")
            self._pins.add(path)
        return await self.hydrate(paths)

    def unpin(self, paths: Sequence[RelPath]) -> dict[str, Any]:
        """Returns how many were pinned, each by just this path."""
        found = [path for path in paths if path in self._pins]
        for path in found:
            self._sync.catalog.drop_fact(f"{_PIN}:{path}")
            self._pins.discard(path)
        return {"unpinned": len(found)}

    async def run(self) -> None:
        """Fetch what others change below a pin, for ever."""
        await repeat(self._look_s, self._follow, "fetching what is pinned")

    async def _follow(self) -> None:
        now = self._sync.catalog.watermark()
        if not self._pins or now == self._seen:
            return
        report = await self.hydrate([RelPath(path) for path in self.pins])
        if report["failed"]:
            log.info("%d pinned file(s) could not be fetched: %s", report["failed"], report["errors"])
        else:
            self._seen = now

    def _files(self, paths: Sequence[RelPath]) -> Iterator[Node]:
        for path in paths:
            yield from self._sync.catalog.files_below(path)
