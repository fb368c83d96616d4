"""What ``stat`` answers, for nodes of both tiers."""

from __future__ import annotations

import errno
import os
import stat
from typing import NamedTuple

from swampfs.errors import FileError
from swampfs.records import Change, Kind, Node, Residency

_LAST_NS = 2**63 - 1
LOCAL_BASE = 1 << 48
"""Inodes of the local tier are this plus the inode beneath; catalog inodes stay below it."""


class Attributes(NamedTuple):
    ino: int
    mode: int  # with the file type
    nlink: int
    uid: int
    gid: int
    size: int
    blocks: int  # of 512 bytes
    mtime_ns: int
    ctime_ns: int
    atime_ns: int
    rdev: int = 0

    @property
    def is_dir(self) -> bool:
        return stat.S_ISDIR(self.mode)


class Owner(NamedTuple):
    """Of what has none."""

    uid: int
    gid: int
    umask: int = 0
    """Permissions that nobody has in this mount. They stay as they are in the datastore, whatever is changed here."""

    def mode_after(self, change: int, before: int) -> int:
        """What becomes of a mode that is to be another one."""
        return change & ~self.umask | before & self.umask


class Caller(NamedTuple):
    """Who asks, as the kernel says it."""

    uid: int
    gid: int
    pid: int

    @property
    def owner(self) -> tuple[int, int]:
        """Of what this caller makes."""
        return self.uid, self.gid


_TYPES = {
    Kind.FILE: stat.S_IFREG,
    Kind.DIRECTORY: stat.S_IFDIR,
    Kind.SYMLINK: stat.S_IFLNK,
    Kind.FIFO: stat.S_IFIFO,
    Kind.SOCKET: stat.S_IFSOCK,
    Kind.CHARACTER_DEVICE: stat.S_IFCHR,
    Kind.BLOCK_DEVICE: stat.S_IFBLK,
}
KINDS = {mode: kind for kind, mode in _TYPES.items()}


def of_node(node: Node, owner: Owner, *, nlink: int | None = None) -> Attributes:
    """Attributes of a catalog node. ``blocks`` is 0 for content that is not here, so that ``du`` shows what is."""
    if nlink is None:
        nlink = node.links + 1 if node.is_dir else node.links
    return Attributes(
        ino=node.ino,
        mode=_TYPES[node.kind] | node.mode & ~owner.umask,
        nlink=nlink,
        uid=owner.uid if node.uid < 0 else node.uid,
        gid=owner.gid if node.gid < 0 else node.gid,
        size=node.size,
        blocks=_blocks(node),
        mtime_ns=node.mtime_ns,
        ctime_ns=node.ctime_ns,
        atime_ns=node.mtime_ns if node.atime_ns is None else node.atime_ns,
        rdev=node.rdev,
    )


def _blocks(node: Node) -> int:
    if node.residency is Residency.STUB:
        return 0
    return -(-node.size // 512) if node.blocks is None else node.blocks


def of_stat(found: os.stat_result, ino: int, umask: int) -> Attributes:
    """Attributes of a file of this machine, shown under ``ino``."""
    return Attributes(
        ino=ino,
        mode=found.st_mode & ~umask,
        nlink=found.st_nlink,
        uid=found.st_uid,
        gid=found.st_gid,
        size=found.st_size,
        blocks=found.st_blocks,
        mtime_ns=found.st_mtime_ns,
        ctime_ns=found.st_ctime_ns,
        atime_ns=found.st_atime_ns,
        rdev=found.st_rdev,
    )


def fail(number: int, what: str = "") -> FileError:
    """The error a system call shall end with."""
    return FileError(number, what)


def stale(ino: int) -> FileError:
    """The kernel holds an inode that is gone; ESTALE makes it look the name up again."""
    return FileError(errno.ESTALE, f"inode {ino}")


def as_stored(change: Change, owner: Owner, mode: int) -> Change:
    """As the catalog keeps it: the mounting user's files have no owner, and a time beyond its range is its end.

    ``mode`` is what it has now.
    """
    return change._replace(
        mode=None if change.mode is None else owner.mode_after(change.mode, mode),
        uid=-1 if change.uid == owner.uid else change.uid,
        gid=-1 if change.gid == owner.gid else change.gid,
        mtime_ns=_in_range(change.mtime_ns),
        atime_ns=_in_range(change.atime_ns),
    )


def _in_range(ns: int | None) -> int | None:
    return None if ns is None else max(-_LAST_NS, min(ns, _LAST_NS))
