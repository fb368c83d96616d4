"""A mount of several namespaces: its root holds them by name, and what is below one is answered by that one.

Each has its own file system and its own inode numbers from 1. To the kernel they are one space: a foreign namespace's
number stands in the upper bits of every inode and handle of it.
"""

from __future__ import annotations

import errno
import stat
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import pyfuse3
from pyfuse3 import FileHandleT, FileNameT, FUSEError, InodeT, RequestContext

from swampfs.fs import views
from swampfs.fs.attributes import LOCAL_BASE, Attributes, Owner
from swampfs.fs.views import VIEW_BASE
from swampfs.fuse.operations import CACHE_S, LONGEST_NAME, Numbers, Operations, bounded, entry_of, handler
from swampfs.names import is_namespace
from swampfs.state.catalog import ROOT_INO

_BITS = 48
_INNER = LOCAL_BASE - 1  # foreign namespaces have no local tier
_FOREIGN = 1 << 60
_ROOT = InodeT(ROOT_INO)
FIRST, LAST = 2, (1 << 12) - 1
"""Numbers of foreign namespaces."""
OWN = Numbers(base=0, root=_FOREIGN | 1 << _BITS | ROOT_INO)
"""The bound namespace keeps its inodes, but its root is not the mount's."""


def numbers_of(number: int) -> Numbers:
    """Of the inodes and handles of a foreign namespace."""
    base = _FOREIGN | number << _BITS
    return Numbers(base, base + ROOT_INO)


def _is_foreign(where: int) -> bool:
    return _FOREIGN <= where < VIEW_BASE and where != OWN.root


def _number(where: int) -> int:
    return where >> _BITS & LAST


class Namespaces(Protocol):
    """The foreign namespaces of a datastore."""

    def numbers(self) -> Mapping[str, int]:
        """By name, as far as is known; a name keeps its number from mount to mount."""

    async def look(self) -> None:
        """See which there are now, if that does not take too long."""

    def look_soon(self) -> None:
        """See which there are now, and do not wait for it."""

    async def open(self, number: int) -> Operations:
        """Read-only. Raises FileError and sync errors."""


def _of_inode(name: str) -> Any:
    """A handler that belongs to the namespace of its first argument, an inode."""

    async def forward(self: Federation, inode: int, *args: Any) -> Any:
        part, inner = await self.part(inode)
        return await getattr(part, name)(inner, *args)

    forward.__name__ = name
    return forward


def _of_handle(name: str) -> Any:
    """As :func:`_of_inode`, for the handle of a file."""

    async def forward(self: Federation, handle: int, *args: Any) -> Any:
        part = self.opened[_number(handle)] if _is_foreign(handle) else self.own
        return await getattr(part, name)(handle & _INNER, *args)

    forward.__name__ = name
    return forward


def _of_xattrs(name: str) -> Any:
    """As :func:`_of_inode`; asking opens no namespace, and the roots have none."""

    async def forward(self: Federation, inode: int, *args: Any) -> Any:
        unopened = _is_foreign(inode) and _number(inode) not in self.opened
        part, inner = (self.own, ROOT_INO) if inode == _ROOT or unopened else await self.part(inode)
        return await getattr(part, name)(inner, *args)

    forward.__name__ = name
    return forward


class Federation(pyfuse3.Operations):
    """Adapter from the kernel to one :class:`Operations` per namespace."""

    supports_dot_lookup = True
    enable_writeback_cache = False

    def __init__(self, name: str, own: Operations, foreign: Namespaces, *, owner: Owner, names_s: float) -> None:
        """``names_s``: how long the kernel may remember which foreign namespaces there are."""
        super().__init__()
        self.timeout_s = own.timeout_s
        self._name = name
        self.own = own
        self._foreign = foreign
        self.opened: dict[int, Operations] = {}
        self._names_s = names_s
        self._owner = owner
        self._since_ns = time.time_ns()

    def disk_is_full(self) -> None:
        """A database could not be written."""
        self.own.disk_is_full()

    def failed(self, operation: str, args: Sequence[Any], code: int, error: Exception | None) -> None:
        """Of the root, which has no path; a part keeps its own."""

    async def part(self, where: int) -> tuple[Operations, int]:
        """Whose inode or handle this is, and what it is called there. Opens a namespace at the first look into it."""
        if not _is_foreign(where):
            if where == _ROOT:
                raise FUSEError(errno.EROFS)  # whatever comes here wants to change it
            return self.own, ROOT_INO if where == OWN.root else where
        part = self.opened.get(_number(where))
        if part is None:
            part = await self._opened(_number(where))
        return part, where & _INNER

    @bounded
    async def _opened(self, number: int) -> Operations:
        part = self.opened[number] = await self._foreign.open(number)
        return part

    # --- the root -----------------------------------------------------------------------------------------

    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if parent_inode != _ROOT:
            part, inner = await self.part(parent_inode)
            if inner == ROOT_INO and name == b"..":
                return self._directory(_ROOT, 0o555)
            return await part.lookup(InodeT(inner), name, ctx)
        if name in (b".", b".."):
            return self._directory(_ROOT, 0o555)
        if name == views.NAME.encode():
            return await self.own.lookup(InodeT(0), name, ctx)
        return await self._lookup_namespace(name)

    @handler
    async def _lookup_namespace(self, name: FileNameT) -> pyfuse3.EntryAttributes:
        if len(name) > LONGEST_NAME:
            raise FUSEError(errno.ENAMETOOLONG)
        wanted = name.decode(errors="replace")
        if wanted == self._name:
            return self.own.attributes(_ROOT)
        if not is_namespace(wanted):
            raise FUSEError(errno.ENOENT)
        if wanted in self._foreign.numbers():
            self._foreign.look_soon()  # it may be gone
        else:
            await self._foreign.look()
        number = self._foreign.numbers().get(wanted)
        if number is None:
            raise FUSEError(errno.ENOENT)
        return self._root_of(number)

    def _root_of(self, number: int) -> pyfuse3.EntryAttributes:
        """Directory of a foreign namespace; if nobody looked into it yet, it is not opened for that."""
        part = self.opened.get(number)
        entry = part.attributes(_ROOT) if part is not None else self._directory(numbers_of(number).root, 0o755)
        entry.entry_timeout = self._names_s
        entry.attr_timeout = CACHE_S if part is not None else 0
        return entry

    def _directory(self, ino: int, mode: int) -> pyfuse3.EntryAttributes:
        at = self._since_ns
        return entry_of(
            Attributes(ino, stat.S_IFDIR | mode & ~self._owner.umask, 1, *self._owner[:2], 0, 0, at, at, at)
        )

    @handler
    async def getattr(self, inode: InodeT, ctx: RequestContext) -> pyfuse3.EntryAttributes:
        if inode == _ROOT:
            return self._directory(_ROOT, 0o555)
        if _is_foreign(inode) and _number(inode) not in self.opened:
            return self._root_of(_number(inode))
        part, inner = await self.part(inode)
        return part.attributes(inner)

    @handler
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        if inode == _ROOT:
            await self._foreign.look()
        else:
            await self.part(inode)
        return FileHandleT(inode)

    @handler
    async def readdir(self, fh: FileHandleT, start_id: int, token: pyfuse3.ReaddirToken) -> None:
        if fh != _ROOT:
            part, inner = await self.part(fh)
            await part.readdir(FileHandleT(inner), start_id, token)
            return
        if start_id == 0 and not pyfuse3.readdir_reply(token, self._name.encode(), self.own.attributes(_ROOT), 1):
            return
        for name, number in sorted(self._foreign.numbers().items(), key=lambda item: item[1]):
            if number > start_id and not pyfuse3.readdir_reply(token, name.encode(), self._root_of(number), number):
                return

    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        if fh != _ROOT:
            part, inner = await self.part(fh)
            await part.fsyncdir(FileHandleT(inner), datasync)

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        for inode, count in inode_list:
            if not _is_foreign(inode):
                if inode not in (_ROOT, OWN.root):  # roots are not counted
                    await self.own.forget([(inode, count)])
            elif (part := self.opened.get(_number(inode))) is not None:
                await part.forget([(InodeT(inode & _INNER), count)])

    # --- below it -----------------------------------------------------------------------------------------

    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        return await self.own.statfs(ctx)

    async def rename(self, parent_inode_old: InodeT, name_old: FileNameT, parent_inode_new: InodeT, *args: Any) -> None:
        part, old = await self.part(parent_inode_old)
        other, new = await self.part(parent_inode_new)
        if part is not other:
            raise FUSEError(errno.EXDEV)
        await part.rename(InodeT(old), name_old, InodeT(new), *args)

    async def link(self, inode: InodeT, new_parent_inode: InodeT, *args: Any) -> pyfuse3.EntryAttributes:
        part, inner = await self.part(inode)
        other, parent = await self.part(new_parent_inode)
        if part is not other:
            raise FUSEError(errno.EXDEV)
        return await part.link(InodeT(inner), InodeT(parent), *args)

    async def releasedir(self, fh: FileHandleT) -> None:
        pass

    readlink = _of_inode("readlink")
    mkdir = _of_inode("mkdir")
    create = _of_inode("create")
    mknod = _of_inode("mknod")
    symlink = _of_inode("symlink")
    unlink = _of_inode("unlink")
    rmdir = _of_inode("rmdir")
    setattr = _of_inode("setattr")
    getxattr = _of_xattrs("getxattr")
    listxattr = _of_xattrs("listxattr")
    setxattr = _of_xattrs("setxattr")
    removexattr = _of_xattrs("removexattr")
    open = _of_inode("open")
    read = _of_handle("read")
    write = _of_handle("write")
    flush = _of_handle("flush")
    fsync = _of_handle("fsync")
    release = _of_handle("release")
