"""The kernel's side of FUSE: numbers and records of ``linux/fuse.h``, as far as :mod:`swampfs.fuse.fastlane` speaks it.

All records are in the machine's byte order and have no padding but what is named.
"""

from __future__ import annotations

import stat
import struct
import time
from enum import IntEnum
from typing import NamedTuple

from swampfs.fs.attributes import Attributes
from swampfs.records import Change

REQUEST = struct.Struct("=IIQQIIII")
"""Length, opcode, unique, inode, uid, gid, pid, (extension length)."""
REPLY = struct.Struct("=IiQ")
"""Length, negative errno, unique."""

OPEN_IN = struct.Struct("=II")
OPEN_OUT = struct.Struct("=QIi")  # handle, FOPEN_*, backing id
RELEASE_IN = struct.Struct("=Q")
WRITE_IN = struct.Struct("=QQIIQII")  # handle, offset, size, flags, lock owner, open flags, -; the bytes follow
WRITE_FLAGS = struct.Struct("=20xI")  # in a request to write
RANGE = struct.Struct("=QQI")  # what it, and a request to read, begins with
READ_FLAGS = struct.Struct("=32xI")  # of open(2), in a request to read
WRITE_OUT = struct.Struct("=II")
MKDIR_IN = struct.Struct("=II")  # mode, umask; the name follows
CREATE_IN = struct.Struct("=IIII")  # flags, mode, umask, open flags; the name follows
SETATTR_IN = struct.Struct("=IIQQQqqqIIIIIIII")
HANDLE = struct.Struct("=Q")
INTERRUPT_IN = struct.Struct("=Q")
FORGET_IN = struct.Struct("=Q")
BATCH_FORGET_IN = struct.Struct("=II")
FORGET_ONE = struct.Struct("=QQ")
DIRENT = struct.Struct("=QQII")  # inode, next offset, length of the name, type
INVALIDATE_INODE = struct.Struct("=qqq")  # inode, offset, length
INVALIDATE_NAME = struct.Struct("=QII")  # directory, length of the name, flags; the name follows

_ATTRIBUTES = "QQQqqqIIIIIIIIII"
ATTRIBUTES_OUT = struct.Struct(f"=QII{_ATTRIBUTES}")
ENTRY_OUT = struct.Struct(f"=QQQQII{_ATTRIBUTES}")
_MAX_WRITE, _MAX_WRITE_AT = struct.Struct("=I"), 20  # in struct fuse_init_out
_OF_A_WRITE = 64 << 10  # around its bytes, generously
_SECOND = 1_000_000_000
_BLOCK = 4096

NOTIFY_INVALIDATE_INODE = 2
NOTIFY_INVALIDATE_NAME = 3

WRITE_CACHE = 1 << 0
"""Of a write: it comes from the kernel's pages. It takes no answer but all of it, or an error."""

FOPEN_DIRECT_IO = 1 << 0
FOPEN_KEEP_CACHE = 1 << 1
FOPEN_CACHE_DIR = 1 << 3
FOPEN_STREAM = 1 << 4
FOPEN_PASSTHROUGH = 1 << 7


class Op(IntEnum):
    """Requests of the kernel."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    SETXATTR = 21
    GETXATTR = 22
    LISTXATTR = 23
    REMOVEXATTR = 24
    FLUSH = 25
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    IOCTL = 39
    BATCH_FORGET = 42
    READDIRPLUS = 44
    RENAME2 = 45


def name_of(opcode: int) -> str:
    """As ``linux/fuse.h`` calls it."""
    try:
        return Op(opcode).name
    except ValueError:
        return str(opcode)


class Set(IntEnum):
    """What a SETATTR is to change."""

    MODE = 1 << 0
    UID = 1 << 1
    GID = 1 << 2
    SIZE = 1 << 3
    ATIME = 1 << 4
    MTIME = 1 << 5
    HANDLE = 1 << 6
    ATIME_NOW = 1 << 7
    MTIME_NOW = 1 << 8
    LOCK_OWNER = 1 << 9
    CTIME = 1 << 10
    KILL_SUIDGID = 1 << 11


class Request(NamedTuple):
    """Head of a request."""

    length: int
    opcode: int
    unique: int
    ino: int
    uid: int
    gid: int
    pid: int
    extension: int


def _fields(found: Attributes) -> tuple[int, ...]:
    atime, atime_ns = divmod(found.atime_ns, _SECOND)
    mtime, mtime_ns = divmod(found.mtime_ns, _SECOND)
    ctime, ctime_ns = divmod(found.ctime_ns, _SECOND)
    return (
        found.ino, found.size, found.blocks, atime, mtime, ctime, atime_ns, mtime_ns, ctime_ns,
        found.mode, found.nlink, found.uid, found.gid, found.rdev, _BLOCK, 0,
    )  # fmt: skip


def attributes(found: Attributes, valid_s: int) -> bytes:
    """Answer to GETATTR and SETATTR; the kernel may believe it for ``valid_s``."""
    return ATTRIBUTES_OUT.pack(valid_s, 0, 0, *_fields(found))


def largest_request(init: bytes | memoryview) -> int:
    """Bytes to have room for, after the answer to INIT that says how much is written at once."""
    (max_write,) = _MAX_WRITE.unpack_from(init, REPLY.size + _MAX_WRITE_AT)
    return int(max_write) + _OF_A_WRITE


def change(body: bytes | memoryview) -> Change:
    """What a SETATTR asks for."""
    valid, _, _, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _ = SETATTR_IN.unpack_from(body)
    now = time.time_ns() if valid & (Set.ATIME_NOW | Set.MTIME_NOW) else 0
    return Change(
        mode=stat.S_IMODE(mode) if valid & Set.MODE else None,
        uid=uid if valid & Set.UID else None,
        gid=gid if valid & Set.GID else None,
        size=size if valid & Set.SIZE else None,
        mtime_ns=_time(valid, Set.MTIME_NOW, now, Set.MTIME, mtime * _SECOND + mtime_ns),
        atime_ns=_time(valid, Set.ATIME_NOW, now, Set.ATIME, atime * _SECOND + atime_ns),
    )


def _time(valid: int, is_now: Set, now: int, is_given: Set, given: int) -> int | None:
    if valid & is_now:
        return now
    return given if valid & is_given else None


def entry(found: Attributes, valid_s: int) -> bytes:
    """Answer to LOOKUP, and the first part of that to CREATE. Inode numbers are never reused: generation 0."""
    return ENTRY_OUT.pack(found.ino, 0, valid_s, valid_s, 0, 0, *_fields(found))


def entry_in_directory(found: Attributes, valid_s: int, name: bytes, position: int) -> bytes:
    """One entry of an answer to READDIRPLUS; ``position`` is where the next one is."""
    head = entry(found, valid_s) + DIRENT.pack(found.ino, position, len(name), found.mode >> 12) + name
    return head + bytes(-len(head) % 8)
