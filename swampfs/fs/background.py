"""Work that a mount does again and again by itself; no failure of it is the mount's end."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

from swampfs.state.schema import is_local_fault

log = logging.getLogger(__name__)


async def repeat(every_s: float, work: Callable[[], Awaitable[None]], what: str) -> None:
    """For ever, with a pause before each time. ``what`` is for the log."""
    while True:
        await trio.sleep(every_s)
        try:
            await work()
        except Exception as error:
            if is_local_fault(error):
                log.info("%s: %s", what, error)  # a full disk, perhaps: the next time it may go
            else:
                log.exception("%s failed", what)
