"""Open files: handles, reads, writes, and the moment a file becomes dirty.

A warm ``open``, ``read`` or ``write`` is a system call on this machine's disk, on the loop, with no thread and no
request. The journal announces a path before its first byte changes; size and time of a file that is being written
come from the file itself and reach the catalog at the last close.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from swampfs.errors import StoreError
from swampfs.fs.attributes import LOCAL_BASE, Attributes, Owner, fail, of_node, stale
from swampfs.fs.guard import Guard
from swampfs.fs.inodes import Inodes
from swampfs.fs.localtier import LocalTier
from swampfs.fs.lockfiles import LOCK_BASE, LockFiles
from swampfs.names import RelPath, is_scratch, lease_path
from swampfs.records import Kind, Node, Residency
from swampfs.sync.room import is_full
from swampfs.sync.service import SyncService
from swampfs.threads import Lane

_WRITING = os.O_WRONLY | os.O_RDWR


@dataclass(slots=True)
class Handle:
    """One ``open``."""

    fd: int
    ino: int
    writable: bool
    pid: int = 0  # who opened it


@dataclass(slots=True)
class OpenFile:
    """All handles of one datastore inode."""

    path: RelPath | None  # None: it lost its name
    readers: int = 0
    writers: list[int] = field(default_factory=list)  # descriptors
    linked: bool = False  # it may have other names
    changed: bool = False
    replaced: bool = False  # by another machine while we had it open: what is written here would be lost


class Files:
    """The table of handles. ``on_dirty`` is told each path that a push should soon look at."""

    def __init__(
        self,
        sync: SyncService,
        local: LocalTier,
        inodes: Inodes,
        owner: Owner,
        on_dirty: Callable[[RelPath], None],
        *,
        guard: Guard,
        locks: LockFiles | None,
    ) -> None:
        self._sync = sync
        self._guard = guard
        self._locks = locks
        self._local = local
        self._inodes = inodes
        self._owner = owner
        self._on_dirty = on_dirty
        self._handles: dict[int, Handle] = {}
        self._open: dict[int, OpenFile] = {}
        self._next = 1
        self.last_use: dict[int, float] = {}
        """Inode → when it was opened last, in seconds of the monotonic clock. Whoever evicts forgets."""

    def __len__(self) -> int:
        return len(self._handles)

    def is_being_written(self, path: str) -> bool:
        """Whether a push must wait for a close."""
        node = self._sync.catalog.at(path)
        file = self._open.get(node.ino) if node else None
        return file is not None and bool(file.writers)

    def has_changing(self, lock: str) -> bool:
        """Whether a changed file below a lock is still open for writing."""
        written = [path for ino, file in self._open.items() if file.writers for path in self._names(ino, file)]
        return any(path in self._sync.journal and lease_path(path) == lock for path in written)

    # --- opening ------------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, pid: int) -> int:
        """Open by inode; hydrates what is not local. Returns a handle number.

        For writing, the lock that covers the file is held on return, and what is opened is the latest content.
        Raises FileError and what :meth:`SyncService.hydrate_file` and :meth:`Guard.wait` raise.
        """
        if self._locks is not None and ino >= LOCK_BASE:
            return self._handle(await self._locks.open(ino, flags), ino, flags)
        if ino >= LOCAL_BASE:
            return self._handle(self._local.open(ino, flags), ino, flags)
        if ino in self._inodes.orphans:
            return await self._open_orphan(ino, flags)
        node = self._sync.catalog.node(ino)
        if node is None:
            raise stale(ino)
        if node.is_dir:
            raise fail(errno.EISDIR, node.path)
        if flags & _WRITING:
            node = await self.about_to_write(node, pid)
            if flags & os.O_TRUNC:
                self.truncate(node, 0)
        while True:
            current = self._sync.catalog.node(ino)
            if current is None:
                raise stale(ino)
            if current.residency is Residency.STUB:
                current = await self._hydrated(current)
            fd = self._open_content(current, flags & (os.O_ACCMODE | os.O_APPEND))
            if fd is not None:
                return self._track(fd, current, flags, pid)

    async def about_to_write(self, node: Node, pid: int) -> Node:
        """Have the lock that covers a file. Raises ESTALE if the name stands for another file by then."""
        paths = self._sync.catalog.names(node.ino) if node.links > 1 else [node.path]
        if self._guard.lets(*paths):
            return node
        await self._guard.wait(pid, *paths)
        again = self._sync.catalog.node(node.ino)
        if again is None:
            raise stale(node.ino)
        return again

    def _open_content(self, node: Node, flags: int) -> int | None:
        """Descriptor of local content; ``None`` if a clean file turned out to be damaged, and is a stub again."""
        try:
            fd = self._sync.cache.open(node.path, flags)
        except FileNotFoundError:
            if node.residency is Residency.DIRTY:
                raise
            fd = None
        if fd is not None:
            if node.residency is not Residency.CLEAN or os.fstat(fd).st_size == node.size:
                return fd
            os.close(fd)
        # Lost or cut short (a power cut, somebody's rm): clean content can be fetched again (architecture §3).
        if node.links > 1:
            self._part(node)
            raise stale(node.ino)
        self._sync.cache.remove(node.path)
        self._sync.catalog.set_residency(node.ino, Residency.STUB)
        return None

    def _part(self, node: Node) -> None:
        """Names whose shared content is gone have nothing in common any more but what each has in the datastore."""
        for path in self._sync.catalog.names(node.ino):
            name = self._sync.catalog.at(path)
            if name is not None and name.base is not None and name.residency is Residency.CLEAN:
                self._sync.cache.remove(path)
                self._sync.catalog.reset_to_remote(name, name.base, name.partition or "")

    async def _hydrated(self, node: Node) -> Node:
        while node.residency is Residency.STUB:
            await self._sync.hydrate_file(node.path)
            again = self._sync.catalog.node(node.ino)  # anything may have happened while we waited
            if again is None:
                # Replaced: what the name stands for now is here, so the kernel's second attempt need not wait.
                raise stale(node.ino)
            node = again
        return node

    async def _open_orphan(self, ino: int, flags: int) -> int:
        orphan = self._inodes.orphans[ino]
        if orphan.replaced:
            raise stale(ino)  # the kernel looks the name up again, and finds what it stands for now
        if orphan.content is None:
            if orphan.node.base is None:
                raise stale(ino)
            try:
                orphan.content = await self._sync.hydrator.fetch_aside(orphan.node.base)
            except StoreError:
                raise stale(ino) from None  # replaced remotely: the kernel looks the name up again
        fd = os.open(orphan.content, (flags & (os.O_ACCMODE | os.O_APPEND)) | os.O_NOFOLLOW | os.O_CLOEXEC)
        return self._handle(fd, ino, flags)

    def create(self, node: Node, flags: int, pid: int) -> int:
        """Handle of a file the tree has just made: announce it, then make its bytes."""
        self._announce(node)
        fd = self._sync.cache.create(node.path)
        if flags & os.O_APPEND:
            os.close(fd)
            fd = self._sync.cache.open(node.path, os.O_RDWR | os.O_APPEND)
        return self._track(fd, node, flags | os.O_RDWR, pid)

    def create_local(self, rel: RelPath, flags: int, mode: int, owner: tuple[int, int]) -> tuple[int, Attributes]:
        fd, attributes = self._local.create(rel, flags, mode, owner)
        return self._handle(fd, attributes.ino, flags), attributes

    def adopt(self, fd: int, ino: int, flags: int) -> int:
        """Handle of something that is no file: a lock that was just taken, or a view."""
        return self._handle(fd, ino, flags)

    def _track(self, fd: int, node: Node, flags: int, pid: int) -> int:
        file = self._open.setdefault(node.ino, OpenFile(node.path))
        file.linked = file.linked or node.links > 1
        self.last_use[node.ino] = time.monotonic()
        if flags & _WRITING:
            file.writers.append(fd)
        else:
            file.readers += 1
        return self._handle(fd, node.ino, flags, pid)

    def _handle(self, fd: int, ino: int, flags: int, pid: int = 0) -> int:
        number = self._next
        self._next += 1
        self._handles[number] = Handle(fd, ino, bool(flags & _WRITING), pid)
        return number

    # --- bytes --------------------------------------------------------------------------------------------

    def read(self, number: int, offset: int, size: int) -> bytes:
        return os.pread(self._handles[number].fd, size, offset)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Raises ESTALE if another machine replaced the file since it was opened."""
        handle = self._handles[number]
        file = self._open.get(handle.ino)
        if file is not None:
            names = self._names(handle.ino, file)
            if names and not self._is_announced(file, names) and not self._guard.lets(*names):
                await self._guard.wait(handle.pid, *names)
            if file.replaced:
                raise stale(handle.ino)
            if file.path is not None:
                self._about_to_change(handle.ino, file)
        view, done = memoryview(data), 0
        room = self._sync.room
        while done < len(data):
            try:
                room.check()
                done += os.pwrite(handle.fd, view[done:], offset + done)
            except OSError as error:
                if not is_full(error) or not await room.make_room(len(data)):
                    raise
        if self._locks is not None and handle.ino >= LOCK_BASE:
            await self._locks.written(handle.ino, handle.fd)
        return done

    def truncate(self, node: Node, size: int) -> None:
        """Change a file's length; its content must be local unless the length is 0."""
        file = self._open.get(node.ino) or OpenFile(node.path)
        self._about_to_change(node.ino, file)
        if size == 0:
            os.close(self._sync.cache.create(node.path))  # whether or not there is content here
        else:
            os.truncate(self._sync.cache.path(node.path), size)
        self._sync.catalog.set_content(node.ino, os.lstat(self._sync.cache.path(node.path)))
        self._changed(node)

    async def make_local(self, node: Node) -> Node:
        """Content on this machine, whatever it takes."""
        while True:
            node = await self._hydrated(node)
            fd = self._open_content(node, os.O_RDONLY)
            if fd is not None:
                os.close(fd)
                return node
            node = node._replace(residency=Residency.STUB)

    async def fsync(self, number: int) -> None:
        """Bytes and journal survive a power cut on return. The journal first: bytes without a mark are nobody's."""
        fd = self._handles[number].fd
        self._sync.journal.sync()
        await self._sync.remote.threads.write(Lane.DISK, os.fsync, fd)

    def changed_paths(self, number: int) -> list[RelPath]:
        """Of a handle through which something may have been written that is not published."""
        handle = self._handles[number]
        file = self._open.get(handle.ino)
        if file is None or not handle.writable:
            return []
        return [path for path in self._names(handle.ino, file) if path in self._sync.journal]

    def release(self, number: int) -> None:
        handle = self._handles.pop(number)
        file = self._open.get(handle.ino)
        try:
            if file is not None:
                self._closed(handle, file)
        finally:
            os.close(handle.fd)

    def _closed(self, handle: Handle, file: OpenFile) -> None:
        try:
            if handle.writable:
                self._record(handle.ino, file, handle.fd)
        finally:
            if handle.writable:
                file.writers.remove(handle.fd)
            else:
                file.readers -= 1
            if not file.writers and file.readers <= 0:
                del self._open[handle.ino]

    # --- names --------------------------------------------------------------------------------------------

    def renamed(self, source: RelPath, target: RelPath) -> None:
        """The tree moved a file or a directory: open files follow."""
        for file in self._open.values():
            if file.path is not None and (file.path == source or file.path.startswith(source + "/")):
                file.path = RelPath(target + file.path[len(source) :])

    def lost_name(self, ino: int, path: RelPath, left: Sequence[RelPath]) -> None:
        """A file lost a name; ``left`` are its others."""
        file = self._open.get(ino)
        if file is not None and file.path == path:
            file.path = left[0] if left else None

    def linked(self, ino: int) -> None:
        """A file got another name."""
        file = self._open.get(ino)
        if file is not None:
            file.linked = True

    def replaced(self, ino: int) -> None:
        """By another machine: what is written through its handles would be nobody's."""
        file = self._open.get(ino)
        if file is not None:
            file.replaced = True

    def is_open(self, ino: int) -> bool:
        return ino in self._open

    def attributes(self, node: Node) -> Attributes:
        """Attributes, with size and time from the file itself while it is being written."""
        attributes = of_node(node, self._owner)
        file = self._open.get(node.ino)
        if file is None or not file.writers:
            return attributes
        found = os.fstat(file.writers[0])
        return attributes._replace(
            size=found.st_size,
            blocks=found.st_blocks,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=max(found.st_ctime_ns, attributes.ctime_ns),
        )

    def descriptor(self, ino: int) -> int | None:
        """Of an open file, preferably a writable one."""
        found = [handle for handle in self._handles.values() if handle.ino == ino]
        return max(found, key=lambda handle: handle.writable).fd if found else None

    def has_writer(self, ino: int) -> bool:
        return any(handle.ino == ino and handle.writable for handle in self._handles.values())

    # --- parts --------------------------------------------------------------------------------------------

    def _names(self, ino: int, file: OpenFile) -> Sequence[RelPath]:
        if file.path is None:
            return ()
        return self._sync.catalog.names(ino) if file.linked else (file.path,)

    def _is_announced(self, file: OpenFile, names: Sequence[RelPath]) -> bool:
        if not names or not file.changed:
            return False
        return all(self._sync.journal.is_announced(path) or is_scratch(path) for path in names)

    def _about_to_change(self, ino: int, file: OpenFile) -> None:
        if file.path is None or self._is_announced(file, self._names(ino, file)):
            return
        node = self._sync.catalog.node(ino)
        if node is not None:
            self._announce(node)
        file.changed = True

    def _announce(self, node: Node) -> None:
        for name in self.names_of(node):
            self._sync.mark_dirty(name)
        if node.residency is not Residency.DIRTY or node.links > 1:
            self._sync.catalog.set_residency(node.ino, Residency.DIRTY)
        self._changed(node)

    def names_of(self, node: Node) -> list[Node]:
        """A file under each of its names."""
        if node.links == 1:
            return [node]
        return [name for path in self._sync.catalog.names(node.ino) if (name := self._sync.catalog.at(path))]

    def _changed(self, node: Node) -> None:
        for name in self.names_of(node):
            self._on_dirty(name.path)

    def _record(self, ino: int, file: OpenFile, fd: int) -> None:
        """A writer closes: what it left is the file's size and time."""
        if file.path is None:
            return
        node = self._sync.catalog.node(ino)
        found = os.fstat(fd)
        if node is None or node.kind is not Kind.FILE or node.residency is not Residency.DIRTY:
            return
        if (node.size, node.mtime_ns, node.blocks) != (found.st_size, found.st_mtime_ns, found.st_blocks):
            self._sync.catalog.set_content(ino, found)
            self._sync.room.came(found.st_size)
        self._changed(node)
