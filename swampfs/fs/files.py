"""Open files: handles, reads, writes, and the moment a file becomes dirty.

A warm ``open``, ``read`` or ``write`` is a system call on this machine's disk, on the loop, with no thread and no
request. The journal announces a path before its first byte changes; size and time of a file that is being written
come from the file itself and reach the catalog at the last close.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence

from swampfs.errors import StoreError
from swampfs.fs.attributes import LOCAL_BASE, Attributes, Owner, fail, of_node, stale
from swampfs.fs.early import EarlyReads
from swampfs.fs.guard import Guard
from swampfs.fs.handles import CHANGING, WRITING, Handle, Handles, OpenFile, sync_content
from swampfs.fs.inodes import Inodes
from swampfs.fs.localtier import LocalTier
from swampfs.fs.lockfiles import LOCK_BASE, LockFiles
from swampfs.fs.mapped import Mapped
from swampfs.fs.prefetch import Prefetch
from swampfs.names import RelPath, is_scratch, lease_path
from swampfs.records import Kind, Node, Residency
from swampfs.state.schema import is_disk_full
from swampfs.sync.incoming import Incoming
from swampfs.sync.room import is_full
from swampfs.sync.service import SyncService
from swampfs.threads import Lane


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
        self.handles = Handles()
        self.early = EarlyReads(sync, self.handles.by_number, self.make_local)
        self.prefetch: Prefetch | None = None
        """Told of what is opened; set by the composition root unless nothing is to be fetched ahead."""
        self.mapped = Mapped(self.handles, self._may_change, self._close)
        self._unnoted: set[int] = set()  # the disk was too full to note their sizes in the catalog

    def is_being_written(self, path: str) -> bool:
        """Whether a push must wait for a close."""
        self.mapped.end()
        if not self.handles.writable:
            return False
        node = self._sync.catalog.at(path)
        file = self.handles.files.get(node.ino) if node else None
        return file is not None and bool(file.writers)

    def has_changing(self, lock: str) -> bool:
        """Whether a changed file below a lock is still open for writing."""
        written = [path for ino, file in self.handles.files.items() if file.writers for path in self._names(ino, file)]
        return any(path in self._sync.journal and lease_path(path) == lock for path in written)

    # --- opening ------------------------------------------------------------------------------------------

    async def open(self, ino: int, flags: int, pid: int) -> int:
        """Open by inode; hydrates what is not local. Returns a handle number.

        For writing, the lock that covers the file is held on return, and what is opened is the latest content.
        Raises FileError and what :meth:`SyncService.hydrate_file` and :meth:`Guard.wait` raise.
        """
        if ino >= LOCAL_BASE or ino in self._inodes.orphans:
            return await self._open_elsewhere(ino, flags)
        node = self._sync.catalog.node(ino)
        if node is None:
            raise stale(ino)
        if node.is_dir:
            raise fail(errno.EISDIR, node.path)
        if flags & CHANGING:
            node = await self.about_to_write(node, pid)
            if flags & os.O_TRUNC:
                self.truncate(await self.early.finished(node), 0)
        while True:
            current = self._sync.catalog.node(ino)
            if current is None:
                raise stale(ino)
            if self.prefetch is not None:
                self._tell(self.prefetch, current, pid)
            if current.residency is Residency.STUB:
                coming = None if flags & WRITING else await self._sync.hydrator.open_early(current)
                if coming is not None:
                    number = self._open_coming(coming, current)
                    if number is None:
                        continue
                    return number
                current = await self._hydrated(current)
            fd = self._open_content(current, flags & (os.O_ACCMODE | os.O_APPEND))
            if fd is not None:
                return self._track(fd, current, flags, pid)

    def open_now(self, ino: int, flags: int, pid: int) -> int | None:
        """As :meth:`open`; ``None`` if that has to wait for content or for a lock, or if the inode is no such file."""
        if ino in self._inodes.orphans or (ino >= LOCAL_BASE and self._locks is not None and ino >= LOCK_BASE):
            return None
        if ino >= LOCAL_BASE:
            return self.handles.add(self._local.open(ino, flags), ino, flags)
        if not flags & CHANGING and (self.prefetch is None or ino not in self.prefetch.expected):
            clean = self._sync.catalog.clean_content(ino)
            if clean is not None:
                return self._open_clean(ino, *clean, pid)
        node = self._sync.catalog.node(ino)
        if node is None or node.kind is not Kind.FILE or node.residency is Residency.STUB:
            return None
        if flags & CHANGING:
            paths = self._sync.catalog.names(ino) if node.links > 1 else [node.path]
            if not self._guard.lets(*paths):
                return None
            if flags & os.O_TRUNC:
                self.truncate(node, 0)
                node = self._sync.catalog.node(ino) or node
        if self.prefetch is not None and ino in self.prefetch.expected:
            self.prefetch.opened(node)
        opened = self._open_content(node, flags & (os.O_ACCMODE | os.O_APPEND))
        return None if opened is None else self._track(opened, node, flags, pid)

    def _open_clean(self, ino: int, path: RelPath, size: int, pid: int) -> int | None:
        """``None``: its content was lost, or is damaged."""
        try:
            fd = self._sync.cache.open(path)
        except FileNotFoundError:
            return None
        if os.fstat(fd).st_size == size:
            return self._tracked(fd, ino, path, flags=os.O_RDONLY, pid=pid, whole=size)
        os.close(fd)
        return None

    async def _open_elsewhere(self, ino: int, flags: int) -> int:
        if ino in self._inodes.orphans:
            return await self._open_orphan(ino, flags)
        if self._locks is not None and ino >= LOCK_BASE:
            return self.handles.add(await self._locks.open(ino, flags), ino, flags)
        return self.handles.add(self._local.open(ino, flags), ino, flags)

    def _open_coming(self, coming: Incoming, node: Node) -> int | None:
        """Handle of a large file of which parts can be read already; ``None``: it is not the same any more."""
        now = self._sync.catalog.node(node.ino)
        if now is None or now.residency is not Residency.STUB or now.base != coming.entry:
            self._sync.hydrator.leave(coming)
            return None
        number = self._track(os.dup(coming.fd), node, os.O_RDONLY, 0)
        self.early.note(self.handles[number], coming)
        return number

    def _tell(self, prefetch: Prefetch, node: Node, pid: int) -> None:
        if node.residency is Residency.STUB:
            prefetch.demanded(node, pid)
        elif node.ino in prefetch.expected:
            prefetch.opened(node)

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
        if self.handles.is_open(ino):
            return self.handles.track(fd, ino, orphan.node.path, flags=flags, pid=0)
        return self.handles.add(fd, ino, flags)

    def create(self, node: Node, flags: int, pid: int) -> int:
        """Handle of a file the tree has just made: announce it, then make its bytes."""
        self._announce(node)
        fd = self._sync.cache.create(node.path)
        if flags & os.O_APPEND:
            os.close(fd)
            fd = self._sync.cache.open(node.path, os.O_RDWR | os.O_APPEND)
        number = self._track(fd, node, flags | os.O_RDWR, pid)
        self.handles.files[node.ino].changed = True
        return number

    def create_local(self, rel: RelPath, flags: int, mode: int, owner: tuple[int, int]) -> tuple[int, Attributes]:
        fd, attributes = self._local.create(rel, flags, mode, owner)
        return self.handles.add(fd, attributes.ino, flags), attributes

    def adopt(self, fd: int, ino: int, flags: int) -> int:
        """Handle of something that is no file: a lock that was just taken, or a view."""
        return self.handles.add(fd, ino, flags)

    def _track(self, fd: int, node: Node, flags: int, pid: int) -> int:
        file = self.handles.files.get(node.ino)
        if flags & WRITING and file is not None and file.backing:
            try:
                self._about_to_change(node.ino, file)  # what is mapped is written without our being told
            except BaseException:
                os.close(fd)
                raise
        whole = node.size if node.residency is Residency.CLEAN and not flags & WRITING else 0
        return self._tracked(fd, node.ino, node.path, flags=flags, pid=pid, linked=node.links > 1, whole=whole)

    def _tracked(
        self, fd: int, ino: int, path: RelPath, *, flags: int, pid: int, whole: int, linked: bool = False
    ) -> int:
        """What the kernel knows by another number, too, it may have open in another way: that is read through us."""
        if self._inodes.is_alias(ino):
            whole = 0
        return self.handles.track(fd, ino, path, flags=flags, pid=pid, linked=linked, whole=whole)

    # --- bytes --------------------------------------------------------------------------------------------

    def read(self, number: int, offset: int, size: int) -> bytes | None:
        """``None``: not all of that is here; see :class:`EarlyReads` and :class:`Stream`."""
        handle = self.handles[number]
        if handle.coming is not None:
            handle.coming.note_reader(offset, size)
            if not handle.coming.is_here(offset, size):
                return None
        return os.pread(handle.fd, size, offset) if handle.stream is None else handle.stream.take(size)

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Raises ESTALE if another machine replaced the file since it was opened."""
        handle = self.handles[number]
        if names := self._unguarded(handle):
            await self._guard.wait(handle.pid, *names)
        self._begin_change(handle)
        view, done = memoryview(data), 0
        room = self._sync.room
        while done < len(data):
            try:
                room.check()
                done += self.handles.write(handle, view[done:], offset + done)
            except OSError as error:
                if not is_full(error) or not await room.make_room(len(data)):
                    raise
        if self._locks is not None and handle.ino >= LOCK_BASE:
            await self._locks.written(handle.ino, handle.fd)
        return done

    def write_now(self, number: int, offset: int, data: memoryview) -> int | None:
        """As :meth:`write`; ``None`` if that has to wait for a lock or for room. May write less."""
        handle = self.handles[number]
        if not self._is_begun(handle.file):
            if self._unguarded(handle) or (self._locks is not None and handle.ino >= LOCK_BASE):
                return None
            self._begin_change(handle)
        try:
            self._sync.room.check()
            return self.handles.write(handle, data, offset)
        except OSError as error:
            if not is_full(error):
                raise
            return None

    def _is_begun(self, file: OpenFile | None) -> bool:
        """Whether a file may change with no more ado; of one that has several names that is not seen here."""
        if file is None or file.path is None or file.linked or file.replaced or not file.changed:
            return False
        return self._sync.journal.is_announced(file.path)

    def _unguarded(self, handle: Handle) -> Sequence[RelPath]:
        """Names whose lock a writer has to wait for."""
        file = handle.file
        names = () if file is None else self._names(handle.ino, file)
        if not names or file is None or self._is_announced(file, names) or self._guard.lets(*names):
            return ()
        return names

    def _begin_change(self, handle: Handle) -> None:
        if handle.file is not None and handle.file.replaced:
            raise stale(handle.ino)
        self._may_change(handle)

    def _may_change(self, handle: Handle) -> None:
        if handle.file is not None and not handle.file.replaced:
            self._about_to_change(handle.ino, handle.file)

    def truncate(self, node: Node, size: int) -> None:
        """Change a file's length; its content must be local unless the length is 0."""
        file = self.handles.files.get(node.ino) or OpenFile(node.path)
        self._about_to_change(node.ino, file)
        for name in self.names_of(node):
            self._sync.journal.note_replaced(name.path)
        if size == 0:
            os.close(self._sync.cache.create(node.path))  # whether or not there is content here
        else:
            os.truncate(self._sync.cache.path(node.path), size)
        self._note_content(node.ino, os.lstat(self._sync.cache.path(node.path)))
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
        """Bytes survive a power cut on return, and so does the knowledge that they are whole (sync/replay.py)."""
        handle = self.handles[number]
        if handle.is_mapped:
            self._may_change(handle)
        await self._sync.remote.threads.write(Lane.DISK, os.fsync, handle.fd)
        for path in () if handle.file is None else self._names(handle.ino, handle.file):
            if path in self._sync.journal or is_scratch(path):
                self._sync.journal.note_synced(path)

    async def make_durable(self, node: Node) -> Node:
        """Content is here, whole, and survives a power cut: it is about to be all there is of it."""
        node = await self.make_local(node)
        await self._sync.remote.threads.write(Lane.DISK, sync_content, self._sync.cache.path(node.path))
        self._sync.journal.note_synced(node.path)
        return node

    def require_current(self, number: int) -> None:
        """Raises ESTALE if another machine replaced a handle's file: what was written to it was kept aside."""
        handle = self.handles[number]
        if handle.file is not None and handle.file.replaced:
            raise stale(handle.ino)

    def unpublished(self, number: int) -> list[RelPath]:
        """Names of a handle's file under which the datastore has something else, or nothing."""
        handle = self.handles[number]
        if handle.is_mapped:
            self._may_change(handle)
        names = [] if handle.file is None else self._names(handle.ino, handle.file)
        return [path for path in names if path in self._sync.journal]

    def release(self, number: int) -> None:
        handle = self.handles.by_number.pop(number)
        lingers = False
        try:
            lingers = handle.is_mapped and self.mapped.linger(handle)
        finally:
            if not lingers:
                self._close(handle)

    def _close(self, handle: Handle) -> None:
        try:
            if handle.file is not None:
                self._closed(handle, handle.file)
        finally:
            os.close(handle.fd)
            if handle.coming is not None:
                self._sync.hydrator.leave(handle.coming)

    def _closed(self, handle: Handle, file: OpenFile) -> None:
        try:
            if handle.writable:
                if handle.is_mapped:
                    self._may_change(handle)
                self._record(handle.ino, file, handle.fd)
        finally:
            self.handles.untrack(handle, file)

    # --- asking -------------------------------------------------------------------------------------------

    def attributes(self, node: Node) -> Attributes:
        """Attributes, with size and time from the file itself while it is being written."""
        attributes = of_node(node, self._owner)
        found = self.handles.written(node.ino)
        if found is None and node.ino in self._unnoted and node.residency is Residency.DIRTY:
            found = os.lstat(self._sync.cache.path(node.path))
        if found is None:
            return attributes
        return attributes._replace(
            size=found.st_size,
            blocks=found.st_blocks,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=max(found.st_ctime_ns, attributes.ctime_ns),
        )

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
            self._note_content(ino, found)
        self._sync.room.came(found.st_size)
        self._changed(node)

    def _note_content(self, ino: int, found: os.stat_result) -> None:
        """Nobody hears of an error at a close: if the disk is full, the file itself is asked until it is published."""
        try:
            self._sync.catalog.set_content(ino, found)
        except Exception as error:
            if not is_disk_full(error):
                raise
            self._sync.room.databases_need_room()
            self._unnoted.add(ino)
        else:
            self._unnoted.discard(ino)
