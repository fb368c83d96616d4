"""``files/`` and ``staging/``: file content on this machine, mirroring datastore-relative paths.

Nothing is ever opened through a symbolic link (``O_NOFOLLOW``), content enters ``files/`` only by ``rename(2)`` from
``staging/``, and names were checked by :mod:`swampfs.names` before they get here.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from typing import Any

from swampfs.names import RelPath

_libc = ctypes.CDLL(None, use_errno=True)  # for syncfs(2), which the standard library has not


class CacheDir:
    """Content store of one state directory. Paths in, file descriptors and plain paths out."""

    def __init__(self, home: str) -> None:
        self.home = home
        self._files = os.path.join(home, "files")
        self._staging = os.path.join(home, "staging")
        self._conflicts = os.path.join(home, "state", "conflicts")
        for directory in (self._files, self._staging, self._conflicts):
            os.makedirs(directory, mode=0o700, exist_ok=True)

    def clear_staging(self) -> None:
        """Downloads and orphans of a dead process: nothing of value."""
        shutil.rmtree(self._staging)
        os.mkdir(self._staging, 0o700)

    def path(self, rel: RelPath) -> str:
        return f"{self._files}/{rel}"

    def stage(self) -> str:
        """A fresh name in ``staging/``; the file does not exist yet."""
        return os.path.join(self._staging, uuid.uuid4().hex)

    def admit(self, staged: str, rel: RelPath, mtime_ns: int) -> None:
        """Move verified content into place, atomically over whatever was there."""
        os.utime(staged, ns=(mtime_ns, mtime_ns))
        self._make_room(rel)
        os.rename(staged, self.path(rel))

    def create(self, rel: RelPath) -> int:
        """Open a new or emptied file for reading and writing; returns the descriptor."""
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            return os.open(self.path(rel), flags, 0o600)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            self._make_room(rel)
        return os.open(self.path(rel), flags, 0o600)

    def write(self, rel: RelPath, body: bytes) -> None:
        """Make this its content."""
        fd = self.create(rel)
        try:
            os.write(fd, body)
        finally:
            os.close(fd)

    def retime(self, rel: RelPath, mtime_ns: int) -> None:
        """Content that is here keeps the time its name shows."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            os.utime(self.path(rel), ns=(mtime_ns, mtime_ns), follow_symlinks=False)

    def open(self, rel: RelPath, flags: int = os.O_RDONLY) -> int:
        return os.open(self.path(rel), flags | os.O_NOFOLLOW | os.O_CLOEXEC)

    def stat(self, rel: RelPath) -> os.stat_result | None:
        """``lstat`` of the local content, ``None`` if there is none."""
        try:
            return os.lstat(self.path(rel))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def snapshot(self, rel: RelPath, target: str) -> int:
        """Copy a file's bytes as of one moment; returns its modification time in ns. Raises FileNotFoundError."""
        reader = self.open(rel)
        try:
            writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                while os.copy_file_range(reader, writer, 1 << 30):
                    pass
            except OSError:
                os.unlink(target)
                raise
            finally:
                os.close(writer)
            return os.fstat(reader).st_mtime_ns
        finally:
            os.close(reader)

    def small(self, rel: RelPath, most: int) -> tuple[bytes, int] | None:
        """A file's bytes and its modification time in ns; ``None``: there are more than ``most``, or it is changing.

        Raises FileNotFoundError.
        """
        fd = self.open(rel)
        try:
            found = os.fstat(fd)
            body = os.read(fd, found.st_size + 1) if found.st_size <= most else b""
            is_whole = len(body) == found.st_size and os.fstat(fd).st_mtime_ns == found.st_mtime_ns
            return (body, found.st_mtime_ns) if is_whole else None
        finally:
            os.close(fd)

    def remove(self, rel: RelPath) -> None:
        try:
            os.unlink(self.path(rel))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        self._prune(rel)

    def remove_dir(self, rel: RelPath) -> None:
        """Drop a directory the tree no longer has; whatever clean content is left in it goes too."""
        shutil.rmtree(self.path(rel), ignore_errors=True)

    def rename(self, source: RelPath, target: RelPath) -> None:
        """Move a file or directory of content; a missing source means there was none to move."""
        if not os.path.lexists(self.path(source)):
            return
        if os.path.isdir(self.path(source)):
            shutil.rmtree(self.path(target), ignore_errors=True)
        self._make_room(target)
        os.rename(self.path(source), self.path(target))
        self._prune(source)

    def sync_names(self, *paths: RelPath) -> None:
        """The directories of these are on the disk when this returns: what was renamed or linked is there."""
        for parent in {os.path.dirname(self.path(path)) for path in paths}:
            with contextlib.suppress(FileNotFoundError):
                directory = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    os.fsync(directory)
                finally:
                    os.close(directory)

    def link(self, source: RelPath, target: RelPath) -> None:
        """Two names of one content: what is written to either is in both."""
        self._make_room(target)
        if os.path.lexists(self.path(target)):
            os.unlink(self.path(target))
        os.link(self.path(source), self.path(target), follow_symlinks=False)

    def unshare(self, rel: RelPath) -> None:
        """Give a name content of its own, should it share any."""
        found = self.stat(rel)
        if found is None or found.st_nlink == 1:
            return
        staged = self.stage()
        shutil.copyfile(self.path(rel), staged)
        self.admit(staged, rel, found.st_mtime_ns)

    def orphan(self, rel: RelPath, ino: int) -> str | None:
        """Move a file that lost its name but may still be opened; returns where it is now."""
        aside = os.path.join(self._staging, f"orphan-{ino}")
        try:
            os.rename(self.path(rel), aside)
        except FileNotFoundError:
            return None
        return aside

    def set_conflict_aside(self, rel: RelPath, report: dict[str, object]) -> str:
        """Keep the losing bytes of a conflict under ``state/conflicts/`` with a report; returns the directory."""
        directory = os.path.join(self._conflicts, uuid.uuid4().hex)
        os.makedirs(directory, mode=0o700)
        self.unshare(rel)
        if os.path.lexists(self.path(rel)):
            os.rename(self.path(rel), os.path.join(directory, "content"))
        with open(os.path.join(directory, "report.json"), "w", encoding="utf-8") as file:
            json.dump(report, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        return directory

    def conflicts(self) -> list[str]:
        return sorted(os.listdir(self._conflicts))

    def conflict_reports(self) -> list[dict[str, Any]]:
        """What was kept, oldest first: the report of each with its ``id``, and ``content``, where its bytes are."""
        found = []
        for name in self.conflicts():
            content = os.path.join(self._conflicts, name, "content")
            with open(os.path.join(self._conflicts, name, "report.json"), encoding="utf-8") as file:
                report: dict[str, Any] = json.load(file)
            there = os.path.exists(content)
            size = os.stat(content).st_size if there else 0
            found.append({"id": name, **report, "size": size, "content": content if there else None})
        return sorted(found, key=lambda one: str(one["keptAt"]))

    def drop_conflict(self, name: str) -> None:
        """Forget what was kept. Raises FileNotFoundError for a name that is none of :meth:`conflicts`."""
        if name not in self.conflicts():
            raise FileNotFoundError(name)
        shutil.rmtree(os.path.join(self._conflicts, name))

    def walk(self) -> Iterator[RelPath]:
        """Every regular file under ``files/``."""
        for directory, _, names in os.walk(self._files):
            for name in names:
                full = os.path.join(directory, name)
                if os.path.isfile(full) and not os.path.islink(full):
                    yield RelPath(os.path.relpath(full, self._files))

    def sync(self) -> None:
        """Everything here is on the disk when this returns. Raises OSError."""
        directory = os.open(self._files, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if _libc.syncfs(directory):
                raise OSError(ctypes.get_errno(), "the disk of the state directory could not be synchronised")
        finally:
            os.close(directory)

    def free_bytes(self) -> os.statvfs_result:
        return os.statvfs(self._files)

    def _make_room(self, rel: RelPath) -> None:
        """Parents exist, and no stale file or directory of another kind is in the way.

        What is in the way is clean by construction: the catalog holds no such clash.
        """
        target = self.path(rel)
        try:
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            parent = rel
            while "/" in parent:
                parent = RelPath(parent.rpartition("/")[0])
                if os.path.lexists(self.path(parent)) and not os.path.isdir(self.path(parent)):
                    os.unlink(self.path(parent))
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
        if os.path.isdir(target) and not os.path.islink(target):
            shutil.rmtree(target)

    def _prune(self, rel: RelPath) -> None:
        """Remove directories that became empty, up to ``files/``."""
        parent = rel.rpartition("/")[0]
        while parent:
            try:
                os.rmdir(f"{self._files}/{parent}")
            except OSError:
                return
            parent = parent.rpartition("/")[0]
