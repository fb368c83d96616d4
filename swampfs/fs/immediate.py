"""What can be done without a wait: operations of :class:`FileSystem` that are plain functions, when they can be.

``None`` is the answer where something may have to be waited for, a lock, content, room on the disk; it has changed
nothing then, and the ``async`` operation of the same name does it.
"""

from __future__ import annotations

from collections.abc import Callable

from swampfs.fs.attributes import LOCAL_BASE, Attributes, Caller, as_stored
from swampfs.fs.handles import CHANGING
from swampfs.fs.vfs import FileSystem
from swampfs.fs.views import VIEW_BASE
from swampfs.records import Change, Node, Residency


class Immediate:
    """Of one mount. Raises what the operations of :class:`FileSystem` raise."""

    def __init__(self, fs: FileSystem) -> None:
        self._fs = fs
        self.write: Callable[[int, int, memoryview], int | None] = fs.files.write_now
        """Handle, offset, data; returns the bytes that were written, which may be fewer."""

    def open(self, ino: int, flags: int, pid: int) -> int | None:
        """Handle of a file whose content is here, and whose lock is, if it is opened for writing."""
        fs = self._fs
        if ino >= VIEW_BASE or fs.close_to_open is not None or (flags & CHANGING and fs.is_read_only):
            return None
        return fs.files.open_now(fs.inodes.resolve(ino), flags, pid)

    def create(self, parent: int, name: str, mode: int, flags: int, caller: Caller) -> tuple[int, Attributes] | None:
        """Handle and attributes of a file that nobody made meanwhile."""
        fs = self._fs
        if fs.lock_path(parent, name) is not None:
            return None
        directory, path = fs.place(parent, name)
        if directory is not None and (
            not fs.guard.lets(path) or fs.sync.catalog.child(directory.ino, name) is not None
        ):
            return None
        return fs.make(directory, path, mode, flags, caller)

    def mkdir(self, parent: int, name: str, mode: int, caller: Caller) -> Attributes | None:
        """A directory whose lock, and that of what is to be in it, is held."""
        fs = self._fs
        directory, path = fs.place(parent, name)
        if directory is not None and not fs.guard.lets(path, f"{path}/"):
            return None
        return fs.make_directory(directory, path, mode, caller)

    def setattr(self, ino: int, change: Change) -> Attributes | None:
        """Of what is in the datastore; a size only where the content is here and surely whole."""
        fs = self._fs
        ino = fs.inodes.resolve(ino)
        if fs.is_read_only or ino >= LOCAL_BASE or ino in fs.inodes.orphans:
            return None
        node = fs.sync.catalog.node(ino)
        if node is None or (node.is_dir and not self._may_change_directory(node, change)):
            return None
        if change.size is not None:
            if node.residency is not Residency.DIRTY or node.links > 1 or not fs.guard.lets(node.path):
                return None
            fs.files.truncate(node, change.size)
        fs.tree.set_attributes(node, as_stored(change, fs.owner, node.mode))
        return fs.getattr(ino)

    def _may_change_directory(self, node: Node, change: Change) -> bool:
        is_free = not change.is_of_access or not node.path or self._fs.guard.lets(node.path)
        return change.size is None and is_free

    def is_listing_cacheable(self, ino: int) -> bool:
        """Whether the kernel may keep what it reads of a directory: nothing appears in it without its being told."""
        locks = self._fs.locks
        return ino < VIEW_BASE and (locks is None or not locks.shows_any())
