"""pyfuse3 handlers: bytes and flags to names and values, errors to errno, and a deadline on whatever may wait.

Thin on purpose; what an operation means is in :mod:`swampfs.fs`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import stat
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FileNameT, FlagT, FUSEError, InodeT, ModeT, RequestContext

from swampfs.errors import SwampfsError
from swampfs.fs.attributes import Attributes, Caller
from swampfs.fs.events import idle
from swampfs.fs.vfs import FileSystem
from swampfs.fs.views import VIEW_BASE
from swampfs.fs.xattrs import PREFIX, Xattrs
from swampfs.names import RelPath
from swampfs.records import Change
from swampfs.state.catalog import ROOT_INO
from swampfs.state.schema import is_disk_full

log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Awaitable[Any]])

# Exact invalidation makes long timeouts safe (architecture §4).
CACHE_S = 3600.0
_BLOCK = 4096
DOTS = 2  # positions of a directory before those of its entries
LONGEST_NAME = 255
_IDLE_S = 1.0
_OF_HANDLES = ("read", "read_later", "write", "flush", "fsync", "release")


class Numbers(NamedTuple):
    """How a file system's inode and handle numbers are told to a kernel that knows several of them."""

    base: int = 0
    root: int = ROOT_INO

    def inode(self, ino: int) -> int:
        return self.root if ino == ROOT_INO else self.base + ino


PLAIN = Numbers()


class HasTimeout(Protocol):
    """``timeout_s``: how long a caller may wait."""

    timeout_s: float


def _text(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError:
        raise FUSEError(errno.EILSEQ) from None


def errno_of(error: Exception) -> int | None:
    """What a system call that met it is answered with; ``None``: it is a bug."""
    if isinstance(error, SwampfsError | OSError):
        return error.errno or errno.EIO
    return errno.ENOSPC if is_disk_full(error) else None


def handler(fn: F) -> F:
    """One mapper for every handler: our errors and the system's become errno; a bug becomes EIO and is logged."""

    @functools.wraps(fn)
    async def handle(*args: Any) -> Any:
        try:
            return await fn(*args)
        except FUSEError as error:
            if error.errno in (errno.ETIMEDOUT, errno.EILSEQ, errno.ENAMETOOLONG):
                args[0].failed(fn.__name__, args[1:], error.errno, None)
            raise
        except Exception as error:
            code = errno_of(error)
            if code is None:
                log.exception("%s failed", fn.__name__)
            elif code == errno.ENOSPC and is_disk_full(error):
                args[0].disk_is_full()
            args[0].failed(fn.__name__, args[1:], code or errno.EIO, error)
            raise FUSEError(code or errno.EIO) from None

    return cast(F, handle)


def bounded(fn: F) -> F:
    """For handlers that may wait: past the deadline the caller gets ETIMEDOUT (it could not be interrupted)."""

    @functools.wraps(fn)
    async def handle(self: HasTimeout, *args: Any) -> Any:
        with trio.move_on_after(self.timeout_s):
            return await fn(self, *args)
        raise FUSEError(errno.ETIMEDOUT)

    return handler(cast(F, handle))


def _naming(fn: F) -> F:
    """For handlers that change names: while they wait, the kernel keeps the directory locked."""

    @functools.wraps(fn)
    async def handle(self: Operations, directory: InodeT, *args: Any) -> Any:
        with self.using(directory):
            return await fn(self, directory, *args)

    return bounded(cast(F, handle))


class Operations(pyfuse3.Operations):
    """Adapter from the kernel to one :class:`FileSystem`."""

    supports_dot_lookup = True

    def __init__(self, fs: FileSystem, timeout_s: float, numbers: Numbers = PLAIN) -> None:
        """``numbers`` is for what goes out to the kernel; what comes in is expected to be translated back."""
        super().__init__()
        self.enable_writeback_cache = fs.files.handles.written_back
        self._numbers = numbers
        self._strict = fs.close_to_open
        self._fs = fs
        self.timeout_s = timeout_s
        self.xattrs: Xattrs | None = None
        """Set by the composition root if they were asked for at mount."""
        self.publish: Callable[[Sequence[RelPath]], Awaitable[None]] | None = None
        """Commit these, though they may be open. Set by the composition root if ``fsync`` is to wait for that."""
        self.in_use: Counter[int] = Counter()
        """Directories whose names are being changed."""

    def disk_is_full(self) -> None:
        """A database could not be written."""
        self._fs.sync.room.databases_need_room()

    def failed(self, operation: str, args: Sequence[Any], code: int, error: Exception | None) -> None:
        """Keep why, for whoever asks."""
        ino = args[0] if args and isinstance(args[0], int) else 0
        name = args[1] if len(args) > 1 and isinstance(args[1], bytes) and "xattr" not in operation else None
        if operation in _OF_HANDLES:
            handle = self._fs.files.handles.by_number.get(ino)
            ino = 0 if handle is None else handle.ino
        self._fs.failures.note(operation.removesuffix("_later"), ino, name, code, error)

    @contextmanager
    def using(self, directory: int) -> Iterator[None]:
        self.in_use[directory] += 1
        try:
            yield
        finally:
            self.in_use[directory] -= 1
            if not self.in_use[directory]:
                del self.in_use[directory]

    # --- looking ------------------------------------------------------------------------------------------

    @handler
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if len(name) > LONGEST_NAME:
            raise FUSEError(errno.ENAMETOOLONG)
        if parent_inode >= VIEW_BASE:
            await self._prepare(parent_inode, name)
        try:
            if self._fs.may_be_lock(name):
                found = await self._lookup_lock(parent_inode, name.decode())
            else:
                found = self._fs.lookup(parent_inode, name.decode())
                if found is None and self._strict is not None:
                    with trio.move_on_after(self.timeout_s):
                        await self._strict.ask()
                    found = self._fs.lookup(parent_inode, name.decode())
        except UnicodeDecodeError:
            found = None  # no such name can exist here
        if found is None:
            raise FUSEError(errno.ENOENT)  # not to be remembered: another machine may make it at any time
        return self._entry(found)

    async def _lookup_lock(self, parent_inode: InodeT, name: str) -> Attributes | None:
        with trio.move_on_after(self.timeout_s):
            return await self._fs.lookup_lock(parent_inode, name)
        raise FUSEError(errno.ETIMEDOUT)

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        return self.attributes(inode)

    def attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        """Raises FileError."""
        return self._entry(self._fs.getattr(inode))

    @handler
    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            self._fs.forget(inode, count)

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        if inode >= VIEW_BASE:
            await self._prepare(inode)
        return inode

    async def _prepare(self, directory: InodeT, name: bytes | None = None) -> None:
        """What is shown there is known when this returns."""
        if self._fs.views is not None:
            with trio.move_on_after(self.timeout_s):
                await self._fs.views.prepare(directory, None if name is None else os.fsdecode(name))
                return
            raise FUSEError(errno.ETIMEDOUT)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        for position, name in enumerate((".", "..")[start_id:], start_id + 1):
            found = self._fs.dots(fh, name)
            if found is None or not pyfuse3.readdir_reply(token, name.encode(), self._entry(found), position):
                return  # they count as no look-up
        for name, attributes, position in self._fs.readdir(fh, max(0, start_id - DOTS)):
            if not pyfuse3.readdir_reply(token, name.encode(), self._entry(attributes), position + DOTS):
                return
            self._fs.inodes.looked_up(attributes.ino)

    @handler
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        return FileNameT(os.fsencode(self._fs.readlink(inode)))

    @handler
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        totals, disk = self._fs.sync.catalog.totals(), self._fs.sync.cache.free_bytes()
        data = pyfuse3.StatvfsData()
        data.f_bsize = data.f_frsize = _BLOCK
        # The datastore has no end; what bounds new content is the room left on this machine.
        free = disk.f_bavail * disk.f_frsize // _BLOCK
        data.f_blocks = -(-totals["bytes"] // _BLOCK) + free
        data.f_bfree = data.f_bavail = free
        data.f_files = totals["files"] + disk.f_favail
        data.f_ffree = data.f_favail = disk.f_favail
        data.f_namemax = 255
        return data

    # --- names --------------------------------------------------------------------------------------------

    @_naming
    async def mkdir(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        mode_after = mode & ~ctx.umask
        return self._entry(await self._fs.mkdir(parent_inode, _text(name), mode_after, _caller(ctx)))

    @_naming
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[pyfuse3.FileInfo, pyfuse3.EntryAttributes]:
        mode_after = mode & ~ctx.umask
        flags = FlagT(self._fs.files.handles.as_opened(flags))
        number, found = await self._fs.create(parent_inode, _text(name), mode_after, flags, _caller(ctx))
        return self._file_info(number, found.ino), self._entry(found)

    @_naming
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        if not stat.S_ISREG(mode):
            mode_after = mode & ~ctx.umask
            return self._entry(await self._fs.mknod(parent_inode, _text(name), mode_after, rdev, _caller(ctx)))
        flags = os.O_RDWR | os.O_EXCL
        number, found = await self._fs.create(parent_inode, _text(name), mode & ~ctx.umask, flags, _caller(ctx))
        self._fs.files.release(number)
        return self._entry(found)

    @_naming
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        return self._entry(await self._fs.symlink(parent_inode, _text(name), _text(target), _caller(ctx)))

    @bounded
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> pyfuse3.EntryAttributes:
        with self.using(new_parent_inode):
            return self._entry(await self._fs.link(inode, new_parent_inode, _text(new_name), _caller(ctx)))

    @_naming
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._fs.unlink(parent_inode, _text(name), _caller(ctx))

    @_naming
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        await self._fs.rmdir(parent_inode, _text(name), _caller(ctx))

    @_naming
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        if flags & pyfuse3.RENAME_EXCHANGE:
            raise FUSEError(errno.EINVAL)
        replace = not flags & pyfuse3.RENAME_NOREPLACE
        old, new = (parent_inode_old, _text(name_old)), (parent_inode_new, _text(name_new))
        with self.using(parent_inode_new):
            await self._fs.rename(old, new, _caller(ctx), replace=replace)

    @bounded
    async def setattr(
        self,
        inode: InodeT,
        attr: pyfuse3.EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> pyfuse3.EntryAttributes:
        change = Change(
            mode=stat.S_IMODE(attr.st_mode) if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            size=attr.st_size if fields.update_size else None,
            mtime_ns=attr.st_mtime_ns if fields.update_mtime else None,
            atime_ns=attr.st_atime_ns if fields.update_atime else None,
        )
        return self._entry(await self._fs.setattr(inode, change, ctx.pid))

    # --- files --------------------------------------------------------------------------------------------

    @bounded
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> pyfuse3.FileInfo:
        if self._strict is not None:
            await self._strict.ask()
        flags = FlagT(self._fs.files.handles.as_opened(flags))
        return self._file_info(await self._fs.open(inode, flags, ctx.pid), inode)

    @handler
    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        found = self._fs.files.read(fh, off, size)
        return await self._read_coming(fh, off, size) if found is None else found

    @handler
    async def read_later(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """What was asked for already and is not here yet: asked for again, it would be out of its order."""
        return await self._read_coming(fh, off, size)

    async def _read_coming(self, fh: FileHandleT, off: int, size: int) -> bytes:
        stream = self._fs.files.handles[fh].stream
        if stream is not None:
            with trio.move_on_after(_IDLE_S):
                return await stream.receive(size)
            stream.put(idle())  # who waits for pyfuse3 cannot be interrupted
            return stream.take(size) or b""
        with trio.move_on_after(self.timeout_s):
            return await self._fs.files.early.read(fh, off, size)
        raise FUSEError(errno.ETIMEDOUT)

    @bounded
    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        return await self._fs.files.write(fh, off, buf)

    @bounded
    async def flush(self, fh: FileHandleT) -> None:
        if self._strict is None:
            raise FUSEError(errno.ENOSYS)  # asked once: bytes are in the file already, so a close needs no upcall
        paths = self._fs.files.unpublished(fh) if self._fs.files.handles.is_writable(fh) else []
        if paths:
            await self._strict.publish(paths)

    @bounded
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        await self._fs.files.fsync(fh)
        if self.publish is not None and (paths := self._fs.files.unpublished(fh)):
            await self.publish(paths)
            self._fs.files.require_current(fh)

    @bounded
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        self._fs.tree.sync_names(fh)
        self._fs.sync.journal.sync()
        if self.publish is not None and (paths := self._fs.tree.unpublished(fh)):
            await self.publish(paths)

    @handler
    async def release(self, fh: FileHandleT) -> None:
        self._fs.files.release(fh)

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    # --- answers ------------------------------------------------------------------------------------------

    def _entry(self, found: Attributes) -> pyfuse3.EntryAttributes:
        entry = entry_of(found)
        entry.st_ino = self._numbers.inode(found.ino)
        return entry

    def _file_info(self, number: int, ino: int) -> pyfuse3.FileInfo:
        if ino >= VIEW_BASE:  # it changes by itself, or, as what a lock says, is for others at once
            is_stream = self._fs.files.handles[number].stream is not None
            return pyfuse3.FileInfo(fh=self._numbers.base + number, direct_io=True, nonseekable=is_stream)
        # What changes remotely is invalidated explicitly, so pages of an earlier open are still good.
        keep = not self._fs.files.early.has_pages(number, ino)
        return pyfuse3.FileInfo(fh=self._numbers.base + number, keep_cache=keep)

    # --- extended attributes: unless asked for, ENOSYS once; then the kernel never asks again (architecture §7) --

    @handler
    async def getxattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> bytes:
        value = self._xattrs(inode).get(name.decode(errors="replace"))
        if value is None:
            raise FUSEError(pyfuse3.ENOATTR)
        return value.encode()

    @handler
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[Any]:
        return [name.encode() for name in self._xattrs(inode)]

    @handler
    async def setxattr(self, inode: InodeT, name: bytes, value: bytes, ctx: RequestContext) -> None:
        self._refuse_xattr(name)

    @handler
    async def removexattr(self, inode: InodeT, name: bytes, ctx: RequestContext) -> None:
        self._refuse_xattr(name)

    def _xattrs(self, inode: int) -> dict[str, str]:
        if self.xattrs is None:
            raise FUSEError(errno.ENOSYS)
        return self.xattrs.of(inode)

    def _refuse_xattr(self, name: bytes) -> None:
        """Ours are answers; of others, a datastore has no place for them."""
        if self.xattrs is None:
            raise FUSEError(errno.ENOSYS)
        raise FUSEError(errno.EPERM if name.startswith(PREFIX.encode()) else errno.EOPNOTSUPP)


def entry_of(found: Attributes) -> pyfuse3.EntryAttributes:
    entry = pyfuse3.EntryAttributes()
    entry.st_ino = found.ino
    entry.generation = 0  # inode numbers are never reused
    entry.entry_timeout = entry.attr_timeout = CACHE_S if found.ino < VIEW_BASE else 0
    entry.st_mode = found.mode
    entry.st_nlink = found.nlink
    entry.st_uid = found.uid
    entry.st_gid = found.gid
    entry.st_rdev = found.rdev
    entry.st_size = found.size
    entry.st_blksize = _BLOCK
    entry.st_blocks = found.blocks
    entry.st_mtime_ns = found.mtime_ns
    entry.st_ctime_ns = found.ctime_ns
    entry.st_atime_ns = found.atime_ns
    return entry


def _caller(ctx: RequestContext) -> Caller:
    return Caller(ctx.uid, ctx.gid, ctx.pid)
