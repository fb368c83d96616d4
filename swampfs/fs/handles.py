"""What is open: one :class:`Handle` per ``open``, one :class:`OpenFile` per inode of the datastore."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from swampfs.fs.events import Stream
from swampfs.names import RelPath
from swampfs.sync.incoming import Incoming

WRITING = os.O_WRONLY | os.O_RDWR
CHANGING = WRITING | os.O_TRUNC
PASS_FROM = 128 << 10
"""Bytes of a file that the kernel reads by itself: of a smaller one it keeps what it once read."""


@dataclass(slots=True)
class Handle:
    """One ``open``."""

    fd: int
    ino: int
    writable: bool
    pid: int = 0  # who opened it
    coming: Incoming | None = None  # its content was not all here when it was opened
    file: OpenFile | None = None  # None: of an inode without name, or of something that is no datastore file
    stream: Stream | None = None  # it is read as things happen, and may have to be waited for
    backing: int = 0  # the kernel's number of the file of this machine that it reads by itself; 0: it asks us

    @property
    def is_mapped(self) -> bool:
        """Whether its file may be written through a mapping without our being told."""
        return self.writable and self.backing != 0 and self.file is not None


@dataclass(slots=True)
class OpenFile:
    """All handles of one datastore inode."""

    path: RelPath | None  # None: it lost its name
    readers: int = 0
    writers: list[int] = field(default_factory=list)  # descriptors
    linked: bool = False  # it may have other names
    changed: bool = False
    replaced: bool = False  # by another machine while we had it open: what is written here would be lost
    backing: int = 0  # as of its handles: all of them, or none
    passing: int = 0  # handles


class Backing(Protocol):
    """The kernel's own table of files it can read without us."""

    def register(self, fd: int) -> int:
        """Its number for an open file, until :meth:`unregister`; 0: it cannot."""

    def unregister(self, number: int) -> None: ...


class Handles:
    """The table of one mount."""

    def __init__(self) -> None:
        self.by_number: dict[int, Handle] = {}
        self.files: dict[int, OpenFile] = {}
        """Datastore inodes that are open."""
        self.last_use: dict[int, float] = {}
        """Inode → when it was opened last, in seconds of the monotonic clock. Whoever evicts forgets."""
        self.writable = 0
        """Handles of datastore files that may be written through."""
        self.backing: Backing | None = None
        """Set where the kernel may read files of this machine by itself."""
        self.on_closed: Callable[[int], None] = lambda ino: None
        """Told of a datastore inode that nobody has open any more."""
        self.written_back = False
        """Whether the kernel collects what is written (decision 0016)."""
        self._next = 1

    def __len__(self) -> int:
        return len(self.by_number)

    def __getitem__(self, number: int) -> Handle:
        return self.by_number[number]

    def add(self, fd: int, ino: int, flags: int, pid: int = 0) -> int:
        """A handle of something that is not pushed."""
        number = self._next
        self._next += 1
        self.by_number[number] = Handle(fd, ino, bool(flags & WRITING), pid)
        return number

    def as_opened(self, flags: int) -> int:
        """What the file of this machine is opened with, for a user's flags.

        What is written back may have to be read before, and brings its own offset.
        """
        if not self.written_back or not flags & WRITING:
            return flags
        return (flags & ~(os.O_ACCMODE | os.O_APPEND)) | os.O_RDWR

    def write(self, handle: Handle, data: bytes | memoryview, offset: int) -> int:
        """Returns how much was written. What the kernel collects was written when it says, not when it brings it."""
        if not self.written_back:
            return os.pwrite(handle.fd, data, offset)
        before = os.fstat(handle.fd)
        done = os.pwrite(handle.fd, data, offset)
        os.utime(handle.fd, ns=(before.st_atime_ns, before.st_mtime_ns))
        return done

    def track(
        self, fd: int, ino: int, path: RelPath, *, flags: int, pid: int, linked: bool = False, whole: int = 0
    ) -> int:
        """A handle of a datastore file, which may have other names if it is ``linked``.

        ``whole``: the file's size, if all of it is here and nothing but a writer of this machine changes it.
        """
        file = self.files.get(ino)
        if file is None:
            file = self.files[ino] = OpenFile(path)
        file.linked = file.linked or linked
        self.last_use[ino] = time.monotonic()
        if flags & WRITING:
            file.writers.append(fd)
            self.writable += 1
        else:
            file.readers += 1
        number = self.add(fd, ino, flags, pid)
        handle = self.by_number[number]
        handle.file = file
        if self.backing is not None and (file.backing or whole >= PASS_FROM):
            self._pass(handle, file, self.backing)
        return number

    def _pass(self, handle: Handle, file: OpenFile, backing: Backing) -> None:
        """The kernel has an inode's bytes from us through all of its handles, or through none."""
        if not file.backing and file.readers == 1 and not file.writers:
            file.backing = backing.register(handle.fd)
        if file.backing:
            file.passing += 1
            handle.backing = file.backing

    def untrack(self, handle: Handle, file: OpenFile) -> None:
        """Its handle is closed."""
        if handle.writable:
            file.writers.remove(handle.fd)
            self.writable -= 1
        else:
            file.readers -= 1
        if handle.backing:
            file.passing -= 1
            if not file.passing and self.backing is not None:
                self.backing.unregister(file.backing)
                file.backing = 0
        if not file.writers and not file.readers:
            del self.files[handle.ino]
            self.on_closed(handle.ino)

    # --- names --------------------------------------------------------------------------------------------

    def renamed(self, source: RelPath, target: RelPath) -> None:
        """The tree moved a file or a directory: open files follow."""
        for file in self.files.values():
            if file.path is not None and (file.path == source or file.path.startswith(source + "/")):
                file.path = RelPath(target + file.path[len(source) :])

    def lost_name(self, ino: int, path: RelPath, left: Sequence[RelPath]) -> None:
        """A file lost a name; ``left`` are its others."""
        file = self.files.get(ino)
        if file is not None and file.path == path:
            file.path = left[0] if left else None

    def linked(self, ino: int) -> None:
        """A file got another name."""
        file = self.files.get(ino)
        if file is not None:
            file.linked = True

    def replaced(self, ino: int) -> None:
        """By another machine: what is written through its handles would be nobody's."""
        file = self.files.get(ino)
        if file is not None:
            file.replaced = True

    # --- asking -------------------------------------------------------------------------------------------

    def is_open(self, ino: int) -> bool:
        return ino in self.files

    def is_passing(self, ino: int) -> bool:
        """Whether the kernel reads it by itself."""
        file = self.files.get(ino)
        return file is not None and file.backing != 0

    def descriptor(self, ino: int) -> int | None:
        """Of an open file, preferably a writable one."""
        found = [handle for handle in self.by_number.values() if handle.ino == ino]
        return max(found, key=lambda handle: handle.writable).fd if found else None

    def written(self, ino: int) -> os.stat_result | None:
        """What a datastore file that is open for writing holds by now."""
        file = self.files.get(ino)
        return os.fstat(file.writers[0]) if file is not None and file.writers else None

    def written_to(self) -> list[RelPath]:
        """Names of datastore files that are open for writing."""
        return [file.path for file in self.files.values() if file.writers and file.path is not None]

    def has_writer(self, ino: int) -> bool:
        return any(handle.ino == ino and handle.writable for handle in self.by_number.values())

    def is_writable(self, number: int) -> bool:
        """Whether something may have been written through a handle."""
        return self.by_number[number].writable


def is_written(fd: int) -> bool:
    """Whether anybody has a file open for writing, or mapped: a lease for readers is to be had of no such file.

    ``fd`` is open for reading only. ``False`` where the file system knows no leases.
    """
    try:
        fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    return False


def sync_content(path: str) -> None:
    """The bytes of a file are on the disk when this returns; there may be none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return  # renamed or removed meanwhile
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
