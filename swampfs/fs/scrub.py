"""Looking after what lies on this machine's disk: content that no longer has its hash is fetched again.

Hydration verifies what comes; this verifies what stayed. Only clean content can be healed, because only that is in the
datastore as well.
"""

from __future__ import annotations

import errno
import logging
import time
from dataclasses import asdict, dataclass

import trio

from swampfs.fs.background import repeat
from swampfs.records import Change, Node, Residency, TreeChange
from swampfs.sync.hashing import hash_file
from swampfs.sync.service import SyncService
from swampfs.threads import Lane

log = logging.getLogger(__name__)

_LAST = "scrubbed"  # when the last pass ended, in seconds since the epoch
_LOOK_S = 600.0  # how often it is seen whether another is due
_AT_ONCE = 100  # rows
_RATE = 20 << 20  # bytes a second: a disk has other work, too
_BETWEEN_S = 0.01  # files
_BAD_SECTOR = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)


@dataclass(slots=True)
class Report:
    """For ``status``. Counts are since the mount."""

    passes: int = 0
    checked: int = 0
    damaged: int = 0
    last_damaged: str | None = None


class Scrub:
    """Hashes every clean file once per ``interval_s``; ``inf``: never."""

    def __init__(self, sync: SyncService, interval_s: float) -> None:
        self._sync = sync
        self._interval_s = interval_s
        self.report = Report()

    def as_json(self) -> dict[str, int | str | None]:
        return asdict(self.report)

    async def run(self) -> None:
        """For ever; time without a mount counts."""
        await repeat(min(self._interval_s, _LOOK_S), self._if_due, "verifying what is on this machine")

    async def _if_due(self) -> None:
        last = float(self._sync.catalog.fact(_LAST) or 0)
        if not 0 <= time.time() - last < self._interval_s:  # due, or the clock was set back
            await self.once()
            self._sync.catalog.set_fact(_LAST, str(time.time()))

    async def once(self) -> None:
        """One pass over everything that is clean at its beginning."""
        last = 0
        while nodes := self._sync.catalog.clean_files(last, _AT_ONCE):
            for node in nodes:
                await self._check(node)
                await trio.sleep(_BETWEEN_S + node.size / _RATE)
            last = nodes[-1].ino
        self.report.passes += 1

    async def _check(self, node: Node) -> None:
        if node.base is None or node.base.sha256 is None:
            return
        try:
            found = await self._sync.remote.threads.read(Lane.DISK, hash_file, self._sync.cache.path(node.path))
        except FileNotFoundError:
            return  # evicted meanwhile; or lost, which its next open finds out
        except OSError as error:
            if error.errno not in _BAD_SECTOR:
                return  # out of descriptors, perhaps
            found = str(error)
        self.report.checked += 1
        if found != node.base.sha256 and self._is_as_it_was(node):
            self._heal(node)

    def _is_as_it_was(self, node: Node) -> bool:
        now = self._sync.catalog.node(node.ino)
        return (
            now is not None
            and now.residency is Residency.CLEAN
            and (now.path, now.base) == (node.path, node.base)
            and now.path not in self._sync.journal  # a mode that is not published yet: the next pass heals
        )

    def _heal(self, node: Node) -> None:
        """A new inode, so that no page of the damaged one is served, without content, so that its next open fetches."""
        assert node.base is not None
        log.warning("%s was damaged on this machine's disk: it will be fetched again", node.path)
        self.report.damaged += 1
        self.report.last_damaged = node.path
        catalog = self._sync.catalog
        catalog.epoch += 1
        with catalog.transaction():
            catalog.remove(node)
            self._sync.drop_content(node)
            parent = catalog.make_parents(node.path)
            ino = catalog.add_remote(parent, node.base, node.partition or "", time.time_ns())
            catalog.set_attributes(ino, Change(mode=node.mode, uid=node.uid, gid=node.gid, mtime_ns=node.mtime_ns))
        self._sync.announce([TreeChange(node.parent, node.name, node.ino)])
