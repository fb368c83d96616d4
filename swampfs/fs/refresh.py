"""Following the others: one conditional request per interval, and a kernel that forgets exactly what changed."""

from __future__ import annotations

import logging
import time

import trio

from swampfs.errors import SwampfsError
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)


class Refresh:
    """The poll task. A store that does not answer leaves the tree as it is; the age is visible in ``status``."""

    def __init__(self, sync: SyncService, interval_s: float) -> None:
        self._sync = sync
        self._interval_s = interval_s
        self._now = trio.Event()
        self.last_error: str | None = None

    def soon(self) -> None:
        """Poll without waiting for the interval."""
        self._now.set()

    async def run(self) -> None:
        while True:
            with trio.move_on_after(self._interval_s):
                await self._now.wait()
            self._now = trio.Event()
            await self.once()

    async def once(self) -> None:
        """One poll; failures are kept for ``status`` and logged when they begin and end."""
        try:
            await self._sync.pull_changed()
        except SwampfsError as error:
            if self.last_error is None:
                log.info("refresh failed: %s", error.line())
            self.last_error = error.line()
        except Exception as error:  # this task must outlive whatever a poll meets
            self.last_error = f"refresh failed: {error!r}"
            log.exception("refresh failed")
        else:
            if self.last_error is not None:
                log.info("refresh works again")
            self.last_error = None
            self._sync.leases.reach.found()

    def age_ms(self) -> int | None:
        """Since the last answer of the datastore; ``None`` if there was none."""
        at = self._sync.refreshed_at
        return None if at is None else int((time.monotonic() - at) * 1000)
