"""A directory as the datastore: a plain tree that an unmodified swamp CLI uses directly.

Nothing but the users' own files and swamp's lock files is ever written into it. Puts are temp-and-rename (or
exclusive link) in the target's directory, under swamp's own temporary name pattern. ETags are inode, size and times.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO, TypeVar

from swampfs.errors import (
    AbsentError,
    AccessDeniedError,
    BucketMissingError,
    PreconditionError,
    StoreError,
    StoreFullError,
)
from swampfs.names import is_scratch
from swampfs.provider import ALWAYS, Blob, ObjectInfo, Precondition, Take
from swampfs.records import timestamp

T = TypeVar("T")


_ATTEMPTS = 10


def _create(path: str) -> BinaryIO:
    """A new file, with its directories: another's last removal may take those away between the two steps."""
    for _ in range(_ATTEMPTS):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return open(path, "xb")
    raise FileNotFoundError(path)


class FilesystemStore:
    """:class:`~swampfs.provider.ObjectStore` of one directory. Symbolic links are neither followed nor listed."""

    label = "directory"
    authenticated = True

    def __init__(self, directory: str) -> None:
        self._root = directory
        self.name = f"file://{directory}"

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        def read() -> Blob | None:
            with open(self._open(key), "rb") as file:
                info = _info(key, os.fstat(file.fileno()))
                return None if unless and info.etag == unless else Blob(file.read(), info)

        return self._call("read", key, read)

    def download(self, key: str, target: str) -> ObjectInfo:
        def transfer() -> ObjectInfo:
            with open(self._open(key), "rb") as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
                return _info(key, os.fstat(source.fileno()))

        return self._call("read", key, transfer)

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        def read() -> Blob:
            with open(self._open(key), "rb") as file:
                info = _info(key, os.fstat(file.fileno()))
                if etag and etag != info.etag:
                    raise PreconditionError(f"{self.name}/{key} is another version")
                file.seek(offset)
                return Blob(file.read(size), info)

        return self._call("read", key, read).given(offset, take)

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        return self._call("write", key, lambda: self._put(key, body, when))

    def _put(self, key: str, body: bytes | str, when: Precondition) -> ObjectInfo:
        target = self._path(key)
        temporary = os.path.join(os.path.dirname(target), f".{uuid.uuid4()}.tmp")
        try:
            with _create(temporary) as file:
                if isinstance(body, bytes):
                    file.write(body)
                else:
                    with open(body, "rb") as source:
                        shutil.copyfileobj(source, file, 1 << 20)
                file.flush()
                os.fsync(file.fileno())
                written = os.fstat(file.fileno())
            if when.absent:
                os.link(temporary, target)
            else:
                if when.etag is not None:
                    self._demand(key, when.etag)
                os.rename(temporary, target)
        except FileExistsError:
            raise PreconditionError(f"{self.name}/{key} exists already") from None
        finally:
            if os.path.lexists(temporary):
                os.unlink(temporary)
        return _info(key, written)

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        def remove() -> None:
            if when.etag is not None:
                self._demand(key, when.etag)
            try:
                os.unlink(self._path(key))
            except (FileNotFoundError, NotADirectoryError):
                return
            self._prune(key)

        self._call("delete", key, remove)

    def head(self, key: str) -> ObjectInfo:
        return self._call("stat", key, lambda: self._stat(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._require_root()
        start = prefix.rpartition("/")[0]
        yield from self._call("list", prefix, lambda: sorted(self._walk(start, prefix)))

    def directories(self, prefix: str) -> Sequence[str]:
        self._require_root()
        where = self._path(prefix.rstrip("/"))
        return self._call("list", prefix, lambda: sorted(_directories(where)))

    def verify(self) -> None:
        self._require_root()
        if not os.access(self._root, os.R_OK | os.X_OK):
            raise AccessDeniedError(f"{self._root} cannot be read", remedy="check its owner and mode")

    def _require_root(self) -> None:
        if not os.path.isdir(self._root):
            raise BucketMissingError(
                f"the datastore directory {self._root} does not exist", remedy="create it, or correct the path"
            )

    def _walk(self, directory: str, prefix: str) -> Iterator[ObjectInfo]:
        base = f"{directory}/" if directory else ""
        try:
            entries = list(os.scandir(self._path(directory) if directory else self._root))
        except FileNotFoundError:
            return  # removed while we walked
        for entry in entries:
            key = base + entry.name
            if entry.is_dir(follow_symlinks=False):
                if f"{key}/".startswith(prefix) or prefix.startswith(f"{key}/"):
                    yield from self._walk(key, prefix)
            elif entry.is_file(follow_symlinks=False) and key.startswith(prefix) and not is_scratch(entry.name):
                try:
                    yield _info(key, entry.stat(follow_symlinks=False))
                except FileNotFoundError:
                    continue

    def _stat(self, key: str) -> ObjectInfo:
        found = os.stat(self._path(key), follow_symlinks=False)
        if not stat.S_ISREG(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "not a regular file")
        return _info(key, found)

    def _demand(self, key: str, etag: str) -> None:
        """Not atomic with what follows; on a directory the lock files carry the exclusion, this catches the rest."""
        try:
            found = self._stat(key).etag
        except FileNotFoundError:
            found = ""
        if found != etag:
            raise PreconditionError(f"{self.name}/{key} is not the expected version")

    def _open(self, key: str) -> int:
        fd = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise FileNotFoundError(errno.ENOENT, "not a regular file")
        return fd

    def _path(self, key: str) -> str:
        return os.path.join(self._root, key)

    def _prune(self, key: str) -> None:
        """Directories that the removal emptied, up to the root."""
        parent = key.rpartition("/")[0]
        while parent:
            try:
                os.rmdir(self._path(parent))
            except OSError:
                return
            parent = parent.rpartition("/")[0]

    def _call(self, operation: str, key: str, fn: Callable[[], T]) -> T:
        try:
            return fn()
        except OSError as error:
            raise self._translate(operation, key, error) from None

    def _translate(self, operation: str, key: str, error: OSError) -> StoreError:
        text = f"{operation} {self.name}/{key} failed: {error.strerror}"
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            return AbsentError(text)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return AccessDeniedError(text, remedy="check the directory's owner, mode and mount options")
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return StoreFullError(text, remedy="make room; the changes stay journaled meanwhile")
        return StoreError(text)


def _info(key: str, found: os.stat_result) -> ObjectInfo:
    etag = f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}"
    return ObjectInfo(key, found.st_size, etag, timestamp(found.st_mtime_ns))


def _directories(path: str) -> Iterator[str]:
    """Empty ones too: whoever looks into one finds nothing."""
    with contextlib.suppress(FileNotFoundError), os.scandir(path) as entries:
        yield from (entry.name for entry in entries if entry.is_dir(follow_symlinks=False))
