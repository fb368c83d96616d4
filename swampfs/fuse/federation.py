"""A mount of several namespaces: its root holds them by name, and what is below one is answered by that one.

Each has its own file system and its own inode numbers from 1. To the kernel they are one space: the namespace's number
stands in the upper bits of every inode and handle.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyfuse3
from pyfuse3 import FileHandleT, FileNameT, FUSEError, InodeT, RequestContext

from swampfs.fs import views
from swampfs.fs.attributes import Attributes, Owner
from swampfs.fs.views import VIEW_BASE
from swampfs.fuse.operations import CACHE_S, Operations, bounded, entry_of, handler

_BITS = 52
_INNER = (1 << _BITS) - 1
_ROOT = InodeT(1)
OWN = 1
"""Number of the namespace the mount is bound to."""
MOST = (VIEW_BASE >> _BITS) - 1


def base_of(number: int) -> int:
    """What the inodes of a namespace are shifted by."""
    return number << _BITS


class Namespaces(Protocol):
    """The foreign namespaces of a datastore."""

    def numbers(self) -> Mapping[str, int]:
        """By name, as far as is known; a name keeps its number from mount to mount."""

    async def look(self) -> None:
        """See which there are now."""

    async def open(self, number: int) -> Operations:
        """Read-only. Raises FileError and sync errors."""


def _forward(name: str) -> Any:
    """A handler that belongs to the namespace of its first argument, an inode or a handle."""

    async def forward(self: Federation, where: int, *args: Any) -> Any:
        part, inner = await self.part(where)
        return await getattr(part, name)(inner, *args)

    forward.__name__ = name
    return forward


class Federation(pyfuse3.Operations):
    """Adapter from the kernel to one :class:`Operations` per namespace."""

    supports_dot_lookup = False
    enable_writeback_cache = False

    def __init__(self, name: str, own: Operations, foreign: Namespaces, owner: Owner) -> None:
        super().__init__()
        self.timeout_s = own.timeout_s
        self._own = own
        self._open: dict[int, Operations] = {OWN: own}
        self._names = {name: OWN}
        self._foreign = foreign
        self._owner = owner
        self._since_ns = time.time_ns()

    async def part(self, where: int) -> tuple[Operations, int]:
        """Whose inode or handle this is, and what it is called there. Opens a namespace at the first look into it."""
        if where >= VIEW_BASE:
            return self._own, where
        part = self._open.get(where >> _BITS)
        if part is None:
            part = await self._opened(where >> _BITS)
        return part, where & _INNER

    @bounded
    async def _opened(self, number: int) -> Operations:
        if not number:
            raise FUSEError(errno.EROFS)  # the root: whatever comes here wants to change it
        part = self._open[number] = await self._foreign.open(number)
        return part

    # --- the root -----------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if parent_inode != _ROOT:
            part, inner = await self.part(parent_inode)
            return await part.lookup(InodeT(inner), name, ctx)
        if name == views.NAME.encode():
            return await self._own.lookup(_ROOT, name, ctx)
        return await self._lookup_namespace(name)

    @bounded
    async def _lookup_namespace(self, name: FileNameT) -> pyfuse3.EntryAttributes:
        wanted = name.decode(errors="replace")
        number = self._all().get(wanted)
        if number is None:
            await self._foreign.look()
            number = self._all().get(wanted)
        if number is None:
            raise FUSEError(errno.ENOENT)
        return self._root_of(number)

    def _all(self) -> dict[str, int]:
        return {**self._foreign.numbers(), **self._names}

    def _root_of(self, number: int) -> pyfuse3.EntryAttributes:
        """Directory of a namespace; if nobody looked into it yet, it is not opened for that."""
        part = self._open.get(number)
        if part is not None:
            return part.attributes(_ROOT)
        entry = self._directory(base_of(number) | _ROOT)
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def _directory(self, ino: int) -> pyfuse3.EntryAttributes:
        at = self._since_ns
        entry = entry_of(Attributes(ino, 0o40555, 2, *self._owner, 0, 0, at, at, at))
        entry.entry_timeout = entry.attr_timeout = CACHE_S
        return entry

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if inode == _ROOT:
            return self._directory(_ROOT)
        if inode < VIEW_BASE and inode >> _BITS not in self._open:
            return self._root_of(inode >> _BITS)
        part, inner = await self.part(inode)
        return part.attributes(inner)

    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        if inode == _ROOT:
            await self._look()
        else:
            await self.part(inode)
        return FileHandleT(inode)

    @bounded
    async def _look(self) -> None:
        await self._foreign.look()

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if fh != _ROOT:
            part, inner = await self.part(fh)
            await part.readdir(FileHandleT(inner), start_id, token)
            return
        for name, number in sorted(self._all().items(), key=lambda item: item[1]):
            if number > start_id and not pyfuse3.readdir_reply(token, name.encode(), self._root_of(number), number):
                return

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            part = self._own if inode >= VIEW_BASE else self._open.get(inode >> _BITS)
            if part is not None:
                await part.forget([(inode if inode >= VIEW_BASE else InodeT(inode & _INNER), count)])

    # --- below it -----------------------------------------------------------------------------------------

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        return await self._own.statfs(ctx)

    async def rename(self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT, *args: Any) -> None:
        part, old = await self.part(parent_inode_old)
        other, new = await self.part(parent_inode_new)
        if part is not other:
            raise FUSEError(errno.EXDEV)
        await part.rename(InodeT(old), name_old, InodeT(new), *args)

    async def link(self, inode: InodeT, *args: Any) -> pyfuse3.EntryAttributes:
        raise FUSEError(errno.EPERM)

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    readlink = _forward("readlink")
    mkdir = _forward("mkdir")
    create = _forward("create")
    mknod = _forward("mknod")
    symlink = _forward("symlink")
    unlink = _forward("unlink")
    rmdir = _forward("rmdir")
    setattr = _forward("setattr")
    open = _forward("open")
    read = _forward("read")
    write = _forward("write")
    flush = _forward("flush")
    fsync = _forward("fsync")
    fsyncdir = _forward("fsyncdir")
    release = _forward("release")
