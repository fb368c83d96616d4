"""The file system as the kernel asks for it: inode numbers in, attributes out, each routed to its tier.

A name belongs to the datastore tier if it is there; else to the local tier if its name is an always-local one; and
what is created goes where its name belongs. ``swampfs/fuse`` is a thin adapter of this class.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

from swampfs.errors import FileError, ReadOnlyError
from swampfs.fs import views
from swampfs.fs.attributes import LOCAL_BASE, Attributes, Caller, Owner, as_stored, fail, of_node, of_stat, stale
from swampfs.fs.consistency import CloseToOpen
from swampfs.fs.failures import Failures
from swampfs.fs.files import Files
from swampfs.fs.guard import Guard
from swampfs.fs.inodes import Inodes
from swampfs.fs.localtier import LocalTier
from swampfs.fs.lockfiles import LOCK_BASE, LockFiles
from swampfs.fs.tree import Tree
from swampfs.fs.views import VIEW_BASE, Views
from swampfs.names import RelPath, check_name, is_lock_file, join, lease_path, parent_of
from swampfs.records import Change, Node, TreeChange
from swampfs.state.catalog import ROOT_INO
from swampfs.sync.service import SyncService

_BATCH = 256
_MOST_LOCKS = 64  # that one rename may need


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
        guard: Guard | None = None,
        locks: LockFiles | None = None,
    ) -> None:
        """``guard`` and ``locks`` make it one of many mounts; without them it writes as if it were alone."""
        self.sync = sync
        self.inodes = Inodes()
        self.failures = Failures(sync.catalog, self.inodes)
        self.guard = guard or Guard(None)
        self.locks = locks
        self.close_to_open: CloseToOpen | None = None
        """Set by the composition root for a mount that asks at each open and publishes at each close."""
        self.views: Views | None = None
        """The directory of the mount's own state; set by the composition root."""
        self.views_parent = ROOT_INO  # where it is; 0 = in a directory above ours
        self.files = Files(sync, local, self.inodes, owner, on_dirty, guard=self.guard, locks=locks)
        sync.is_open = self.files.is_being_written
        self.tree = Tree(sync, self.files, self.inodes, on_dirty)
        sync.drop_content = self.tree.replaced_remotely
        self._catalog = sync.catalog
        self._local = local
        self.owner = owner
        self.is_read_only = read_only
        self._invalidate = invalidate

    def _require_writable(self) -> None:
        if self.is_read_only:
            raise ReadOnlyError("the datastore is mounted read-only")

    # --- looking ------------------------------------------------------------------------------------------

    def lookup(self, parent: int, name: str) -> Attributes | None:
        """``None`` = no such name. Counts a look-up of what it finds."""
        if name in (".", ".."):  # asked for by nfsd and open_by_handle_at(2)
            found = self.dots(parent, name)
        elif self.views is not None and (parent >= VIEW_BASE or (parent == self.views_parent and name == views.NAME)):
            found = self.views.lookup(parent, name) if parent >= VIEW_BASE else self.views.attributes(VIEW_BASE)
        elif parent >= LOCAL_BASE:
            found = self._local.lookup(join(self._local.rel(parent), name))
        else:
            node = self._catalog.child(parent, name)
            found = self._not_there(parent, name) if node is None else self.files.attributes(node)
        if found is not None:
            self.inodes.looked_up(found.ino)
        return found

    def _not_there(self, parent: int, name: str) -> Attributes | None:
        directory = self.tree.directory(parent)
        path = join(directory.path, name)
        found = self._local.lookup(path) if self._local.owns(path) else None
        return self.views.old_version(directory, name) if found is None and self.views else found

    async def lookup_lock(self, parent: int, name: str) -> Attributes | None:
        """As :meth:`lookup`, for a name that may be a lock's: who holds it is asked for every time."""
        path = self.lock_path(parent, name)
        if path is None or self.locks is None:
            return self.lookup(parent, name)
        found = await self.locks.lookup(path)
        if found is not None:
            self.inodes.looked_up(found.ino)
        return found

    def may_be_lock(self, name: bytes) -> bool:
        return self.locks is not None and name.endswith(b".lock")

    def lock_path(self, parent: int, name: str) -> RelPath | None:
        """Path of a lock file; ``None`` for any other name."""
        if self.locks is None or not name.endswith(".lock") or parent >= LOCK_BASE:
            return None
        above = self._local.rel(parent) if parent >= LOCAL_BASE else self.tree.directory(parent).path
        path = join(above, name)
        return path if is_lock_file(path) else None

    def getattr(self, ino: int) -> Attributes:
        ino = self.inodes.resolve(ino)
        if ino in self.inodes.orphans:
            return self._orphan_attributes(ino)
        if self.locks is not None and ino >= LOCK_BASE:
            return self.locks.attributes(ino)
        if self.views is not None and ino >= VIEW_BASE:
            return self.views.attributes(ino)
        if ino >= LOCAL_BASE:
            try:
                return self._local.attributes(ino)
            except FileError:
                return of_stat(self._fstat(ino), ino, self.owner.umask)
        node = self._catalog.node(ino)
        if node is None:
            raise stale(ino)
        return self.files.attributes(node)

    def _fstat(self, ino: int) -> os.stat_result:
        """Of an open file without a name. Raises ESTALE if it is not open."""
        descriptor = self.files.handles.descriptor(ino)
        if descriptor is None:
            raise stale(ino)
        return os.fstat(descriptor)

    def _orphan_attributes(self, ino: int) -> Attributes:
        orphan = self.inodes.orphans[ino]
        if orphan.replaced and not self.files.handles.is_open(ino):
            raise stale(ino)
        attributes = of_node(orphan.node, self.owner, nlink=0)
        descriptor = self.files.handles.descriptor(ino)
        if descriptor is not None:
            found = os.fstat(descriptor)
        elif orphan.content is not None and os.path.exists(orphan.content):
            found = os.stat(orphan.content)
        else:
            return attributes
        return attributes._replace(size=found.st_size, blocks=found.st_blocks, mtime_ns=found.st_mtime_ns)

    def dots(self, ino: int, name: str) -> Attributes | None:
        """A directory itself, or the one above it; ``None`` if it was removed."""
        if ino in self.inodes.orphans:
            return None
        return self.getattr(ino if name == "." else self._above(ino))

    def _above(self, ino: int) -> int:
        if ino >= VIEW_BASE:
            return ROOT_INO
        if ino < LOCAL_BASE:
            return self.tree.directory(ino).parent
        path = parent_of(self._local.rel(ino))
        above = self._catalog.at(path) or self._local.lookup(path)
        return ino if above is None else above.ino

    def readdir(self, ino: int, after: int, *, locks: bool = True) -> Iterator[tuple[str, Attributes, int]]:
        """Entries whose position is greater than ``after``, with it; positions survive concurrent change.

        ``locks``: also those of lock files, which come and go by themselves.
        """
        if ino in self.inodes.orphans:
            return  # removed while open
        if self.views is not None and ino >= VIEW_BASE:
            children = self.views.children(ino)
        elif ino >= LOCAL_BASE:
            children = self._local.children(self._local.rel(ino))
        else:
            directory = self.tree.directory(ino)
            seen = after
            while seen < LOCAL_BASE:
                batch = self._catalog.children(ino, seen, _BATCH)
                for node in batch:
                    yield node.name, self.files.attributes(node), node.place
                    seen = node.place
                if len(batch) < _BATCH:
                    break
            children = [
                (name, found)
                for name, found in self._local.children(directory.path)
                if self._catalog.child(ino, name) is None
            ]
            children += self.locks.children(directory.path) if locks and self.locks is not None else []
        for name, found in children:
            if found.ino > after:
                yield name, found, found.ino

    def forget(self, ino: int, count: int) -> None:
        if self.inodes.forget(ino, count) and ino >= LOCAL_BASE:
            self._local.forget(ino)
            if self.locks is not None:
                self.locks.forget(ino)

    def readlink(self, ino: int) -> str:
        ino = self.inodes.resolve(ino)
        if ino >= LOCAL_BASE:
            return self.views.readlink(ino) if self.views and ino >= VIEW_BASE else self._local.readlink(ino)
        orphan = self.inodes.orphans.get(ino)
        node = self._catalog.node(ino) if orphan is None else orphan.node
        if node is None:
            raise stale(ino)
        if node.target is None:
            raise fail(errno.EINVAL, "not a symbolic link")
        return node.target

    # --- making and removing ------------------------------------------------------------------------------

    def place(self, parent: int, name: str) -> tuple[Node | None, RelPath]:
        """Where a new name goes: its datastore directory, or ``None`` for the local tier; and its path."""
        self._require_writable()
        check_name(name)
        if parent >= VIEW_BASE or (parent == self.views_parent and name == views.NAME):
            raise fail(errno.EPERM, views.NAME)
        if parent >= LOCAL_BASE:
            return None, join(self._local.rel(parent), name)
        directory = self.tree.directory(parent)
        path = self.tree.child_path(directory, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            return None, path
        return directory, path

    async def _place_for_writing(
        self, parent: int, name: str, caller: Caller, *, within: bool = False
    ) -> tuple[Node | None, RelPath]:
        """As :meth:`place`, with the lock of a datastore path in hand; ``within``: and of what is to be in it."""
        directory, path = self.place(parent, name)
        paths = (path, f"{path}/") if within else (path,)
        if directory is not None and not self.guard.lets(*paths):
            await self.guard.wait(caller.pid, *paths)
            return self.place(parent, name)  # anything may have happened while we waited
        return directory, path

    async def mkdir(self, parent: int, name: str, mode: int, caller: Caller) -> Attributes:
        directory, path = await self._place_for_writing(parent, name, caller, within=True)
        return self.make_directory(directory, path, mode, caller)

    def make_directory(self, directory: Node | None, path: RelPath, mode: int, caller: Caller) -> Attributes:
        """A new one where :meth:`place` says; its lock is held."""
        if directory is None:
            found = self._local.mkdir(path, mode, caller.owner)
        else:
            name = path.rpartition("/")[2]
            found = self.files.attributes(self.tree.mkdir(directory, name, mode, self._owner_of(caller)))
        self.inodes.looked_up(found.ino)
        return found

    async def create(self, parent: int, name: str, mode: int, flags: int, caller: Caller) -> tuple[int, Attributes]:
        """Make and open a file. Returns handle and attributes.

        If another machine made it meanwhile it is opened, unless ``O_EXCL`` is asked for.
        """
        lock = self.lock_path(parent, name)
        if lock is not None and self.locks is not None:
            self._require_writable()
            fd, found = await self.locks.create(lock, caller)
            self.inodes.looked_up(found.ino)
            return self.files.adopt(fd, found.ino, os.O_RDWR), found
        directory, path = await self._place_for_writing(parent, name, caller)
        there = None if directory is None else self._catalog.child(directory.ino, name)
        if there is None or there.is_dir or flags & os.O_EXCL:
            return self.make(directory, path, mode, flags, caller)
        number = await self.files.open(there.ino, flags, caller.pid)
        found = self.files.attributes(self._catalog.node(there.ino) or there)
        self.inodes.looked_up(found.ino)
        return number, found

    def make(
        self, directory: Node | None, path: RelPath, mode: int, flags: int, caller: Caller
    ) -> tuple[int, Attributes]:
        """A new file where :meth:`place` says; its lock is held."""
        if directory is None:
            number, found = self.files.create_local(path, flags, mode, caller.owner)
        else:
            node = self.tree.create(directory, path.rpartition("/")[2], mode, self._owner_of(caller))
            number = self.files.create(node, flags, caller.pid)
            found = self.files.attributes(node)
        self.inodes.looked_up(found.ino)
        return number, found

    async def symlink(self, parent: int, name: str, target: str, caller: Caller) -> Attributes:
        directory, path = await self._place_for_writing(parent, name, caller)
        if directory is None:
            found = self._local.symlink(path, target)
        else:
            found = self.files.attributes(self.tree.symlink(directory, name, target, self._owner_of(caller)))
        self.inodes.looked_up(found.ino)
        return found

    async def mknod(self, parent: int, name: str, mode: int, rdev: int, caller: Caller) -> Attributes:
        """A pipe, socket or device: it means something on this machine only, and is never published."""
        directory, path = await self._place_for_writing(parent, name, caller)
        if directory is None:
            raise fail(errno.EPERM, f"{path}: this name is for files of this machine")
        found = self.files.attributes(self.tree.mknod(directory, name, mode, rdev, self._owner_of(caller)))
        self.inodes.looked_up(found.ino)
        return found

    async def link(self, ino: int, parent: int, name: str, caller: Caller) -> Attributes:
        """A further name of an inode, in the same tier."""
        ino = self.inodes.resolve(ino)
        directory, path = await self._place_for_writing(parent, name, caller)
        if (directory is None) != (ino >= LOCAL_BASE):
            raise fail(errno.EXDEV, path)
        if directory is None:
            found = self._local.link(ino, path)
        else:
            with self.guard.staying(path):
                found = self.files.attributes(await self.tree.link(ino, parent, name))
        self.inodes.looked_up(found.ino)
        return found

    def _owner_of(self, caller: Caller) -> tuple[int, int]:
        """Of what a caller makes in the datastore: what is the mounting user's is so on every machine."""
        uid, gid = caller.owner
        return -1 if uid == self.owner.uid else uid, -1 if gid == self.owner.gid else gid

    async def unlink(self, parent: int, name: str, caller: Caller) -> None:
        self._require_writable()
        lock = self.lock_path(parent, name)
        if lock is not None and self.locks is not None:
            await self.locks.unlink(lock)
            return
        if parent >= LOCAL_BASE:
            self._local.unlink(join(self._local.rel(parent), name))
            return
        await self.files.early.finish(self._catalog.child(parent, name))
        directory = self.tree.directory(parent)
        path = join(directory.path, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            self._local.unlink(path)
            return
        if not self.guard.lets(path):
            await self.guard.wait(caller.pid, path)
            directory = self.tree.directory(parent)
        self.tree.unlink(directory, name)

    async def rmdir(self, parent: int, name: str, caller: Caller) -> None:
        self._require_writable()
        if parent >= LOCAL_BASE:
            self._local.rmdir(join(self._local.rel(parent), name))
            return
        directory = self.tree.directory(parent)
        path = join(directory.path, name)
        if self._catalog.child(parent, name) is None and self._local.owns(path):
            self._local.rmdir(path)
            return
        if not self.guard.lets(path, f"{path}/"):
            await self.guard.wait(caller.pid, path, f"{path}/")
            directory = self.tree.directory(parent)
        if self._local.children(path):
            raise fail(errno.ENOTEMPTY, path)
        self.tree.rmdir(directory, name)
        self._local.drop_empty(path)

    # --- renaming -----------------------------------------------------------------------------------------

    async def rename(self, old: tuple[int, str], new: tuple[int, str], caller: Caller, *, replace: bool) -> None:
        """Each end is the inode of its directory and a name."""
        self._require_writable()
        check_name(new[1])
        if await self._renamed_lock(old, new, caller, replace):
            return
        paths = await self._have_locks(old, new, caller)
        with self.guard.staying(*paths):
            await self._rename(old, new, replace)

    async def _rename(self, old: tuple[int, str], new: tuple[int, str], replace: bool) -> None:
        (parent, name), (new_parent, new_name) = old, new
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
            self._invalidate([TreeChange(new_parent, new_name, node.ino)])
        elif target is not None:
            found = self._local.lookup(source_path)
            if found is None:
                raise fail(errno.ENOENT, source_path)
            self.tree.adopt(self._local.path(source_path), found.ino, target, new_name)
            self._invalidate([TreeChange(new_parent, new_name, found.ino)])

    async def _have_locks(self, old: tuple[int, str], new: tuple[int, str], caller: Caller) -> list[RelPath]:
        """Of every datastore path that a rename changes; returns those."""
        while True:
            paths = [path for directory, path in (self._end(*old), self._end(*new)) if directory is not None]
            node = self._catalog.at(paths[0]) if len(paths) == 2 else None
            if node is not None and node.is_dir:
                paths = self.tree.moved_with(node, paths[1])
            if len({lease_path(path) for path in paths}) > _MOST_LOCKS:
                raise fail(errno.EXDEV, f"{paths[0]}: it is below too many locks")  # mv(1) copies, a lock at a time
            if self.guard.lets(*paths):
                return paths
            await self.guard.wait(caller.pid, *paths)
            if not self.guard.lets(*paths):
                return paths  # out of reach: what is done now is queued

    async def _renamed_lock(self, old: tuple[int, str], new: tuple[int, str], caller: Caller, replace: bool) -> bool:
        """Whether an end of a rename is a lock; what is renamed over a lock becomes its content."""
        if self.lock_path(*old) is not None:
            raise fail(errno.EPERM, f"{old[1]}: a lock cannot be renamed")
        lock = self.lock_path(*new)
        if lock is None or self.locks is None:
            return False
        found = self.lookup(*old)
        if found is None:
            raise fail(errno.ENOENT, old[1])
        self.inodes.forget(found.ino, 1)
        if not replace and await self.locks.lookup(lock) is not None:
            raise fail(errno.EEXIST, lock)
        number = await self.files.open(found.ino, os.O_RDONLY, caller.pid)
        try:
            content = self.files.read(number, 0, 1 << 16) or await self.files.early.read(number, 0, 1 << 16)
        finally:
            self.files.release(number)
        await self.locks.replace(lock, content, caller)
        await self.unlink(*old, caller)
        return True

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

    async def open(self, ino: int, flags: int, pid: int) -> int:
        writing = flags & (os.O_WRONLY | os.O_RDWR | os.O_TRUNC)
        if writing:
            self._require_writable()
        if self.views is not None and VIEW_BASE <= ino < LOCK_BASE:
            if writing:
                raise fail(errno.EACCES, views.NAME)
            return self.views.open(ino, self.files.handles)
        return await self.files.open(self.inodes.resolve(ino), flags, pid)

    async def setattr(self, ino: int, change: Change, pid: int) -> Attributes:
        self._require_writable()
        ino = self.inodes.resolve(ino)
        if self.locks is not None and ino >= LOCK_BASE:
            descriptor = self.files.handles.descriptor(ino)
            if change.size is not None and descriptor is not None:
                os.ftruncate(descriptor, change.size)
        elif ino in self.inodes.orphans:
            self.inodes.orphans[ino].set_attributes(change, self.files.handles.descriptor(ino))
        elif ino >= LOCAL_BASE:
            self._local.setattr(ino, change, self.files.handles.descriptor(ino))
        else:
            node = self._catalog.node(ino)
            if node is None:
                raise stale(ino)
            if change.size is not None and not node.is_dir:
                node = await self.files.about_to_write(node, pid)
            elif node.is_dir and change.is_of_access and node.path and not self.guard.lets(node.path):
                await self.guard.wait(pid, node.path)
                node = self.tree.directory(ino)
            with self.guard.staying(node.path):
                await self.tree.setattr(node, as_stored(change, self.owner, node.mode))
        return self.getattr(ino)
