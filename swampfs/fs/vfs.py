"""The file system as the kernel asks for it: inode numbers in, attributes out, each routed to its tier.

A name belongs to the datastore tier if it is there; else to the local tier if its name is an always-local one; and
what is created goes where its name belongs. ``swampfs/fuse`` is a thin adapter of this class.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from swampfs.errors import FileError, ReadOnlyError
from swampfs.fs.attributes import LOCAL_BASE, Attributes, Change, Owner, fail, of_node, of_stat, stale
from swampfs.fs.files import Files
from swampfs.fs.inodes import Inodes
from swampfs.fs.localtier import LocalTier
from swampfs.fs.tree import Tree
from swampfs.names import RelPath, check_name, join
from swampfs.records import Node, TreeChange
from swampfs.sync.service import SyncService

_BATCH = 256


class FileSystem:
    """One mounted datastore. All methods are on the loop; only those that may wait are ``async``."""

    def __init__(
        self,
        sync: SyncService,
        local: LocalTier,
        *,
        owner: Owner,
        read_only: bool,
        on_dirty: Callable[[RelPath], None],
        invalidate: Callable[[list[TreeChange]], None],
    ) -> None:
        self.sync = sync
        self.inodes = Inodes()
        self.files = Files(sync, local, self.inodes, owner, on_dirty)
        sync.is_open = self.files.is_being_written
        self.tree = Tree(sync, self.files, self.inodes, on_dirty)
        sync.drop_content = self.tree.replaced_remotely
        self._catalog = sync.catalog
        self._local = local
        self._owner = owner
        self._read_only = read_only
        self._invalidate = invalidate

    def _require_writable(self) -> None:
        if self._read_only:
            raise ReadOnlyError("the datastore is mounted read-only")

    # --- looking ------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: str) -> Attributes | None:
        """``None`` = no such name. Counts a look-up of what it finds."""
        if parent >= LOCAL_BASE:
            found = self._local.lookup(join(self._local.rel(parent), name))
        else:
            node = self._catalog.child(parent, name)
            if node is not None:
                found = self.files.attributes(node)
            else:
                directory = self.tree.directory(parent)
                path = join(directory.path, name)
                found = self._local.lookup(path) if self._local.owns(path) else None
        if found is not None:
            self.inodes.looked_up(found.ino)
        return found

    def getattr(self, ino: int) -> Attributes:
        ino = self.inodes.resolve(ino)
        if ino in self.inodes.orphans:
            return self._orphan_attributes(ino)
        if ino >= LOCAL_BASE:
            try:
                return self._local.attributes(ino)
            except FileError:
                return of_stat(self._fstat(ino), ino)
        node = self._catalog.node(ino)
        if node is None:
            raise stale(ino)
        return self.files.attributes(node)

    def _fstat(self, ino: int) -> os.stat_result:
        """Of an open file without a name. Raises ESTALE if it is not open."""
        descriptor = self.files.descriptor(ino)
        if descriptor is None:
            raise stale(ino)
        return os.fstat(descriptor)

    def _orphan_attributes(self, ino: int) -> Attributes:
        orphan = self.inodes.orphans[ino]
        attributes = of_node(orphan.node, self._owner, nlink=0)
        descriptor = self.files.descriptor(ino)
        if descriptor is not None:
            found = os.fstat(descriptor)
        elif orphan.content is not None and os.path.exists(orphan.content):
            found = os.stat(orphan.content)
        else:
            return attributes
        return attributes._replace(size=found.st_size, blocks=found.st_blocks, mtime_ns=found.st_mtime_ns)

    def readdir(self, ino: int, after: int) -> Iterator[tuple[str, Attributes]]:
        """Entries whose inode is greater than ``after``, in inode order: positions survive concurrent change."""
        if ino in self.inodes.orphans:
            return  # removed while open
        if ino >= LOCAL_BASE:
            children = self._local.children(self._local.rel(ino))
        else:
            directory = self.tree.directory(ino)
            seen = after
            while seen < LOCAL_BASE:
                batch = self._catalog.children(ino, seen, _BATCH)
                for node in batch:
                    yield node.name, self.files.attributes(node)
                    seen = node.ino
                if len(batch) < _BATCH:
                    break
            children = [
                (name, found)
                for name, found in self._local.children(directory.path)
                if self._catalog.child(ino, name) is None
            ]
        for name, found in children:
            if found.ino > after:
                yield name, found

    def forget(self, ino: int, count: int) -> None:
        if self.inodes.forget(ino, count) and ino >= LOCAL_BASE:
            self._local.forget(ino)

    def readlink(self, ino: int) -> str:
        if ino < LOCAL_BASE:
            raise fail(errno.EINVAL, "not a symbolic link")
        return self._local.readlink(ino)

    # --- making and removing ------------------------------------------------------------------------------

    def _place(self, parent: int, name: str) -> tuple[Node | None, RelPath]:
        """Where a new name goes: its datastore directory, or ``None`` for the local tier; and its path."""
        self._require_writable()
        check_name(name)
        if parent >= LOCAL_BASE:
            return None, join(self._local.rel(parent), name)
        directory = self.tree.directory(parent)
        path = self.tree.child_path(directory, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            return None, path
        return directory, path

    def mkdir(self, parent: int, name: str, mode: int, owner: tuple[int, int]) -> Attributes:
        directory, path = self._place(parent, name)
        if directory is None:
            found = self._local.mkdir(path, mode, owner)
        else:
            found = self.files.attributes(self.tree.mkdir(directory, name, mode, owner))
        self.inodes.looked_up(found.ino)
        return found

    def create(self, parent: int, name: str, mode: int, flags: int, owner: tuple[int, int]) -> tuple[int, Attributes]:
        """Make and open a file. Returns handle and attributes."""
        directory, path = self._place(parent, name)
        if directory is None:
            number, found = self.files.create_local(path, flags, mode, owner)
        else:
            node = self.tree.create(directory, name, mode, owner)
            number = self.files.create(node, flags)
            found = self.files.attributes(node)
        self.inodes.looked_up(found.ino)
        return number, found

    def symlink(self, parent: int, name: str, target: str) -> Attributes:
        """Only the local tier can hold a link: the datastore format has none (spec §5.3)."""
        directory, path = self._place(parent, name)
        if directory is not None:
            raise fail(errno.EPERM, f"{path}: a datastore holds no symbolic links")
        found = self._local.symlink(path, target)
        self.inodes.looked_up(found.ino)
        return found

    def unlink(self, parent: int, name: str) -> None:
        self._require_writable()
        if parent >= LOCAL_BASE:
            self._local.unlink(join(self._local.rel(parent), name))
            return
        directory = self.tree.directory(parent)
        path = join(directory.path, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            self._local.unlink(path)
        else:
            self.tree.unlink(directory, name)

    def rmdir(self, parent: int, name: str) -> None:
        self._require_writable()
        if parent >= LOCAL_BASE:
            self._local.rmdir(join(self._local.rel(parent), name))
            return
        directory = self.tree.directory(parent)
        path = join(directory.path, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            self._local.rmdir(path)
            return
        if self._local.children(path):
            raise fail(errno.ENOTEMPTY, path)
        self.tree.rmdir(directory, name)
        self._local.drop_empty(path)

    # --- renaming -----------------------------------------------------------------------------------------

    async def rename(self, parent: int, name: str, new_parent: int, new_name: str, *, replace: bool) -> None:
        self._require_writable()
        check_name(new_name)
        source, source_path = self._end(parent, name)
        target, target_path = self._end(new_parent, new_name)
        if source is not None and target is not None:
            await self._rename_within(source, name, target, new_name, replace)
            return
        if not replace and self.lookup_exists(target_path):
            raise fail(errno.EEXIST, target_path)
        if source is None and target is None:
            self._local.rename(source_path, target_path)
        elif source is not None:
            node = self.tree.existing(source, name)
            await self.tree.surrender(node, lambda content, mode: self._local.take(target_path, content, mode))
            self._invalidate([TreeChange(new_parent, new_name, 0, content=False)])
        elif target is not None:
            found = self._local.lookup(source_path)
            if found is None:
                raise fail(errno.ENOENT, source_path)
            self.tree.adopt(self._local.path(source_path), found.ino, target, new_name)
            self._invalidate([TreeChange(new_parent, new_name, 0, content=False)])

    def lookup_exists(self, path: RelPath) -> bool:
        """Whether a name exists in either tier."""
        return self._catalog.at(path) is not None or self._local.lookup(path) is not None

    async def _rename_within(self, source: Node, name: str, target: Node, new_name: str, replace: bool) -> None:
        """Within the datastore tier; local files below a renamed directory go with it."""
        old, new = join(source.path, name), join(target.path, new_name)
        if self.tree.existing(source, name).is_dir:
            if self._local.children(new):
                raise fail(errno.ENOTEMPTY, new)
            if self._local.would_strand(old, new):
                raise fail(errno.EXDEV, new)
        moved = await self.tree.rename(source.ino, name, target.ino, new_name, replace=replace)
        self._local.move_shadow(*moved)

    def _end(self, parent: int, name: str) -> tuple[Node | None, RelPath]:
        """One end of a rename: the datastore directory it is in, or ``None`` for the local tier."""
        if parent >= LOCAL_BASE:
            return None, join(self._local.rel(parent), name)
        directory = self.tree.directory(parent)
        path = join(directory.path, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            return None, path
        return directory, path

    # --- files --------------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC):
            self._require_writable()
        return await self.files.open(self.inodes.resolve(ino), flags)

    async def setattr(self, ino: int, change: Change) -> Attributes:
        self._require_writable()
        ino = self.inodes.resolve(ino)
        if ino in self.inodes.orphans:
            self._set_orphan_attributes(ino, change)
        elif ino >= LOCAL_BASE:
            self._local.setattr(ino, change, self.files.descriptor(ino))
        else:
            node = self._catalog.node(ino)
            if node is None:
                raise stale(ino)
            await self.tree.setattr(node, change)
        return self.getattr(ino)

    def _set_orphan_attributes(self, ino: int, change: Change) -> None:
        orphan = self.inodes.orphans[ino]
        descriptor = self.files.descriptor(ino)
        where = orphan.content if descriptor is None else descriptor
        if where is not None:
            if change.size is not None:
                os.truncate(where, change.size)
            if change.mtime_ns is not None:
                os.utime(where, ns=(change.mtime_ns, change.mtime_ns))
        orphan.node = orphan.node._replace(
            mode=orphan.node.mode if change.mode is None else change.mode & 0o7777,
            uid=orphan.node.uid if change.uid is None else change.uid,
            gid=orphan.node.gid if change.gid is None else change.gid,
        )
