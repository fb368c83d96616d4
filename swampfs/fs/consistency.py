"""Close-to-open consistency: what one machine has closed, another sees at its next open (as NFS promises)."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence

import trio

from swampfs.errors import StoreError
from swampfs.names import RelPath
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)


class CloseToOpen:
    """Asks the datastore at each open, and publishes at each close. One request per open."""

    def __init__(self, sync: SyncService, publish: Callable[[Sequence[RelPath]], Awaitable[None]]) -> None:
        self._sync = sync
        self.publish = publish
        """Commit a file under its names, though it is still open. Raises PushPendingError."""
        self._turn = trio.Lock()
        self._begun = 0

    async def ask(self) -> None:
        """Return when the tree is as of a poll that began after this call; callers at the same time share it.

        A datastore out of reach leaves the tree as it is: what is here keeps working (architecture §5, rule 6).
        """
        asked = self._begun
        async with self._turn:
            if self._begun > asked:
                return  # another caller's poll began after we asked, and is over
            self._begun += 1
            try:
                await self._sync.pull_changed()
            except StoreError as error:
                log.info("the datastore could not be asked at an open: %s", error)
