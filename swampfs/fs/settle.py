"""Content that was closed some seconds ago reaches the disk, so that a power cut finds it whole (sync/replay.py).

Most is pushed before; this is for what waits: offline, or with a long ``--push-delay``.
"""

from __future__ import annotations

from swampfs.fs.background import repeat
from swampfs.fs.files import Files
from swampfs.fs.handles import sync_content
from swampfs.names import RelPath
from swampfs.sync.parallel import for_each
from swampfs.sync.service import SyncService
from swampfs.threads import Lane

EVERY_S = 5.0
_AT_ONCE = 4
_BATCH = 256


class Settle:
    """Of one mount."""

    def __init__(self, sync: SyncService, files: Files) -> None:
        self._sync = sync
        self._files = files
        self._waiting: set[str] = set()

    async def run(self) -> None:
        """For ever."""
        await repeat(EVERY_S, self._round, "making content durable")

    async def _round(self) -> None:
        """What was closed at the last round, too."""
        self._files.mapped.end()
        self._files.mapped.announce()
        unsynced = [path for path in self._sync.journal.unsynced() if not self._sync.is_open(path)]
        old = [path for path in unsynced if path in self._waiting]
        self._waiting = set(unsynced)
        for start in range(0, len(old), _BATCH):
            await self._settle(old[start : start + _BATCH])

    async def _settle(self, paths: list[str]) -> None:
        sync = self._sync

        async def one(path: str) -> None:
            await sync.remote.threads.write(Lane.DISK, sync_content, sync.cache.path(RelPath(path)))

        errors = await for_each(paths, one, at_once=_AT_ONCE)
        if errors:
            raise errors[0]
        sync.journal.note_synced(*(path for path in paths if path in sync.journal and not sync.is_open(path)))
