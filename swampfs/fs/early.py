"""Reading large files of which not all is here (:mod:`swampfs.sync.incoming`)."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import trio

from swampfs.errors import AbsentError, PreconditionError, SwampfsError
from swampfs.fs.attributes import stale
from swampfs.fs.handles import Handle
from swampfs.records import Node, Residency
from swampfs.sync.incoming import Incoming
from swampfs.sync.service import SyncService

_SHARE = 0.5  # of an operation's time, for what others read to be here


class EarlyReads:
    """Of the handles of one mount. ``make_local`` has all of a file here."""

    def __init__(
        self, sync: SyncService, handles: Mapping[int, Handle], make_local: Callable[[Node], Awaitable[Node]]
    ) -> None:
        self._sync = sync
        self._handles = handles
        self._make_local = make_local
        self._inodes: set[int] = set()  # opened before all of them was here

    def note(self, handle: Handle, coming: Incoming) -> None:
        """What a handle reads is on its way."""
        handle.coming = coming
        self._inodes.add(handle.ino)

    def has_pages(self, number: int, ino: int) -> bool:
        """Whether the kernel may have pages of a file from before all of it was known to be right."""
        if ino not in self._inodes:
            return False
        if self._handles[number].coming is None:
            self._inodes.discard(ino)
        return True

    async def read(self, number: int, offset: int, size: int) -> bytes:
        """Wait for a part of a file that is on its way. Raises ESTALE if it is another file in the datastore by now."""
        handle = self._handles[number]
        if handle.coming is not None:
            try:
                await handle.coming.wait_for(offset, size)
            except (AbsentError, PreconditionError):
                raise stale(handle.ino) from None
            if handle.coming.wants_all:
                self._sync.hydrator.want_all(handle.coming)
        return os.pread(handle.fd, size, offset)

    async def finish(self, node: Node | None) -> bool:
        """What is about to lose its name, or its content, stays readable for who has it open.

        Returns whether anything was waited for, so that it may all be different now. Who reads what cannot be had in
        time is answered ESTALE.
        """
        if node is None or node.residency is not Residency.STUB:
            return False
        handles = [handle for handle in self._handles.values() if handle.ino == node.ino]
        reading = [handle.coming for handle in handles if handle.coming is not None]
        if all(coming.is_abandoned for coming in reading):
            return False
        with suppress(SwampfsError, OSError), trio.move_on_after(self._sync.hydrator.timeout_s * _SHARE):
            await self._make_local(node)
            return True
        for coming in reading:
            coming.abandon(stale(node.ino))
        return True

    async def finished(self, node: Node) -> Node:
        """A file as it is after :meth:`finish`. Raises ESTALE."""
        if not await self.finish(node):
            return node
        again = self._sync.catalog.node(node.ino)
        if again is None:
            raise stale(node.ino)
        return again
