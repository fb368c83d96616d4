"""What pull, push and the single-file calls of a cache share, and the reading of the index they all begin with."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import NamedTuple

import trio

from swampfs.errors import IndexCorruptError
from swampfs.names import Keyspace
from swampfs.provider import RemoteIndex
from swampfs.records import Finding, IndexDelta, IndexMode, Watermark
from swampfs.state.manifest import Manifest
from swampfs.state.sidecar import Sidecar
from swampfs.sync.cache.tree import CacheTree
from swampfs.sync.remote import Remote
from swampfs.threads import Lane

log = logging.getLogger(__name__)

MakeIndex = Callable[[Keyspace], RemoteIndex]

_SHARD_ATTEMPTS = 3
_SHARD_PAUSE_S = 0.3


class Refreshed(NamedTuple):
    """Outcome of reading the index."""

    moved: bool
    current: bool  # all of the mirror is in step, not just what was asked for


@dataclass(frozen=True, slots=True)
class CacheParts:
    """One cache bound to one namespace of one datastore."""

    remote: Remote
    keys: Keyspace
    index: RemoteIndex
    tree: CacheTree
    manifest: Manifest
    sidecar: Sidecar
    pull_width: int
    push_width: int

    async def refresh(self, covers: Callable[[str], bool] | None = None) -> Refreshed:
        """Bring the mirror of the index up to date, wholly or for some partitions.

        Raises:
            IndexCorruptError: a listed shard stays missing or unreadable. The monolith is never asked instead (H37).
            IndexVersionError: an index from the future.
        """
        while True:
            known = self.manifest.watermark()
            delta = await self._read(known, covers)
            if delta is None:
                return Refreshed(moved=False, current=True)
            self._check_not_emptied(delta)
            if await self.remote.threads.write(Lane.DISK, self.manifest.apply, delta, known, covers):
                return Refreshed(moved=True, current=delta.complete)

    def _check_not_emptied(self, delta: IndexDelta) -> None:
        """A datastore that lost everything, its index too, is more likely the wrong place than a thousand deletions.

        An index that lists nothing is a definite answer; a missing one beside an empty listing is not (rule 5).
        """
        if delta.watermark.mode is IndexMode.LISTING and not any(p.entries for p in delta.changed.values()):
            known = self.manifest.watermark().mode
            if known is not IndexMode.UNKNOWN and not self.manifest.is_empty():
                raise IndexCorruptError(
                    f"{self.remote.name} has neither an index nor files any more; nothing was changed here",
                    remedy="check bucket, prefix or mount; if this was done on purpose, delete the cache's _index/*.db",
                )

    async def _read(self, known: Watermark, covers: Callable[[str], bool] | None) -> IndexDelta | None:
        attempts = _SHARD_ATTEMPTS
        while True:
            delta = await self._poll(known, covers)
            broken = _broken_shard(delta)
            if broken is None:
                return delta
            attempts -= 1
            if attempts == 0:
                raise IndexCorruptError(f"index is corrupt: {broken.path} is {broken.detail.partition(';')[0]}")
            await trio.sleep(_SHARD_PAUSE_S)  # a writer that deletes before it delists: gone in a moment

    def _poll(self, known: Watermark, covers: Callable[[str], bool] | None) -> Awaitable[IndexDelta | None]:
        partitions = self.manifest.partitions()
        if covers is None:
            return self.index.poll(known, partitions)
        return self.index.poll_some(known, partitions, covers)


def _broken_shard(delta: IndexDelta | None) -> Finding | None:
    findings = delta.findings if delta is not None else ()
    return next((finding for finding in findings if finding.kind == "index-shard"), None)
