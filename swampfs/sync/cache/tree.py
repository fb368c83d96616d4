"""The cache directory: where files are, how they are looked at, and how content gets in.

Layout (spec §1.2): ``{root}/{namespace}/{rel}``. Our own files are in ``{root}/_index/``, which every client leaves
alone. Nothing is read or written through a symbolic link, also not one in place of a directory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from typing import NamedTuple

from swampfs.errors import HostileNameError
from swampfs.names import NAMESPACE_MANIFEST, SYNCED_DIRECTORIES, RelPath, is_internal, is_publishable, rel_path

OWN = "_index"
IN_MEMORY = 4 << 20
_READ_ATTEMPTS = 3
_STAGED_S = 24 * 3600.0


class Found(NamedTuple):
    """A regular file of the cache."""

    path: RelPath
    stat: os.stat_result


class WalkProblem(NamedTuple):
    """Something a walk could not take: it makes absence unprovable, or is only worth a word."""

    path: str
    why: str
    fatal: bool  # part of the tree was not seen


class CacheTree:
    """One cache root seen as one namespace."""

    def __init__(self, root: str, namespace: str = "") -> None:
        self.root = os.path.abspath(root)
        self.namespace = namespace
        self.base = os.path.join(self.root, namespace) if namespace else self.root
        self.own = os.path.join(self.root, OWN)
        self._staging = os.path.join(self.own, "staging")
        self._conflicts = os.path.join(self.own, "conflicts")
        self._strays_told = False
        self.is_marked: Callable[[str], bool] = lambda rel: False
        """Which files a pull must leave in place; set when it begins."""
        self._safe: set[str] = set()  # directories seen to be real ones since the last operation began

    def make(self) -> None:
        """Begin an operation: our own directories exist, and no other is taken for granted."""
        self._safe.clear()
        os.makedirs(self._staging, mode=0o700, exist_ok=True)

    def clear_staging(self) -> None:
        """Files of processes that died. Young ones may be another process's, at work on the same cache."""
        oldest = time.time() - _STAGED_S
        for entry in os.scandir(self._staging):
            with contextlib.suppress(FileNotFoundError):
                if entry.stat().st_mtime < oldest:
                    os.unlink(entry.path)

    def path(self, rel: str) -> str:
        return f"{self.base}/{rel}"

    def stage(self) -> str:
        return f"{self._staging}/{uuid.uuid4().hex}"

    # --- looking ------------------------------------------------------------------------------------------

    def stat(self, rel: str) -> os.stat_result | None:
        """``lstat``; ``None`` only if there definitely is nothing of that name. Raises OSError otherwise (H4)."""
        try:
            return os.lstat(self.path(rel))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def is_empty(self) -> bool:
        """Whether no publishable file is here."""
        return next(self.walk("", []), None) is None

    def walk(self, below: str, problems: list[WalkProblem]) -> Iterator[Found]:
        """Publishable files below a directory; what cannot be taken is noted, never guessed about."""
        try:
            entries = sorted(os.scandir(self.path(below) if below else self.base), key=lambda entry: entry.name)
        except OSError as error:
            problems.append(WalkProblem(below, error.strerror or str(error), fatal=True))
            return
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            if self._is_hidden(name):
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    if not self._is_foreign(name):
                        yield from self.walk(name, problems)
                elif entry.is_symlink():
                    problems.append(WalkProblem(name, "is a symbolic link", fatal=False))
                elif entry.is_file(follow_symlinks=False) and is_publishable(name):
                    yield Found(rel_path(name), entry.stat(follow_symlinks=False))
            except HostileNameError as error:
                problems.append(WalkProblem(name, str(error), fatal=False))
            except FileNotFoundError:
                problems.append(WalkProblem(name, "went away while we looked", fatal=True))
            except OSError as error:
                problems.append(WalkProblem(name, error.strerror or str(error), fatal=True))

    def _is_hidden(self, name: str) -> bool:
        """Internal by its place in the namespace or in the cache (H15)."""
        return is_internal(name) or (bool(self.namespace) and is_internal(f"{self.namespace}/{name}"))

    def _is_foreign(self, name: str) -> bool:
        """A directory that is another namespace's (spec §5.4), also nested by an old contamination (H32)."""
        if "/" in name or name in SYNCED_DIRECTORIES:
            return False
        return os.path.exists(os.path.join(self.path(name), NAMESPACE_MANIFEST))

    def strays(self) -> list[str]:
        """Top-level names of a namespaced cache that belong to no namespace: old solo leftovers. Told of once."""
        if not self.namespace or self._strays_told or not os.path.isdir(self.root):
            return []
        self._strays_told = True
        found = []
        for entry in os.scandir(self.root):
            manifest = os.path.join(entry.path, NAMESPACE_MANIFEST)
            if not is_internal(entry.name) and entry.name != self.namespace and not os.path.exists(manifest):
                found.append(entry.name)
        return sorted(found)

    # --- changing -----------------------------------------------------------------------------------------

    def admit(self, staged: str, rel: str, mtime_ns: int) -> os.stat_result:
        """Move verified content into place, atomically over whatever file was there."""
        os.utime(staged, ns=(mtime_ns, mtime_ns))
        target = self.path(rel)
        self.make_parents(rel)
        try:
            os.rename(staged, target)
        except IsADirectoryError:
            os.rmdir(target)
            os.rename(staged, target)
        except FileNotFoundError:  # a directory that was there a moment ago
            self._safe.clear()
            self.make_parents(rel)
            os.rename(staged, target)
        return os.lstat(target)

    def write_staged(self, staged: str, body: bytes) -> None:
        """All of it or an error: a single write may be short when the disk is nearly full."""
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            done = os.write(fd, body)
            while done < len(body):
                done += os.write(fd, body[done:])
        finally:
            os.close(fd)

    def make_parents(self, rel: str) -> None:
        """Directories above a path. Raises HostileNameError if one of them is a link (spec §5.3)."""
        directory = os.path.dirname(self.path(rel))
        if directory in self._safe:
            return
        try:
            os.makedirs(directory, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            self._clear_file_above(rel)
            os.makedirs(directory, exist_ok=True)
        real = os.path.normpath(os.path.join(os.path.realpath(self.root), directory[len(self.root) + 1 :]))
        if os.path.realpath(directory) != real:
            raise HostileNameError(f"{rel} lies behind a symbolic link in the cache {self.root}")
        self._safe.add(directory)

    def _clear_file_above(self, rel: str) -> None:
        """A file became a directory in the datastore, and it is not the one that was known here: kept aside."""
        at = rel
        while "/" in at:
            at = at.rpartition("/")[0]
            found = self.stat(at)
            if found is not None and stat.S_ISREG(found.st_mode):
                if self.is_marked(at):
                    raise FileExistsError(errno.EEXIST, f"{at} is a file here with changes to push")
                self.keep_aside(at, self.path(at), {"why": "is a directory in the datastore"})

    def remove(self, rel: str) -> None:
        """Remove a file and the directories that it leaves empty."""
        try:
            os.unlink(self.path(rel))
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return
        parent = rel.rpartition("/")[0]
        while parent:
            try:
                os.rmdir(self.path(parent))
            except OSError:
                return
            parent = parent.rpartition("/")[0]

    def remove_tree(self, rel: str) -> None:
        """Drop a whole directory of another namespace's copies."""
        shutil.rmtree(self.path(rel_path(rel)), ignore_errors=True)

    def keep_aside(self, rel: str, source: str, report: dict[str, object]) -> str:
        """Keep bytes that lose against others under ``_index/conflicts/`` with a report; returns the directory."""
        directory = os.path.join(self._conflicts, uuid.uuid4().hex)
        os.makedirs(directory, mode=0o700)
        os.rename(source, os.path.join(directory, "content"))
        with open(os.path.join(directory, "report.json"), "w", encoding="utf-8") as file:
            json.dump({"path": rel, "namespace": self.namespace, **report}, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        return directory

    def conflicts(self) -> list[str]:
        try:
            return sorted(os.listdir(self._conflicts))
        except FileNotFoundError:
            return []


class Content(NamedTuple):
    """Bytes of one moment: in memory, or the path of a private copy when there are many."""

    body: bytes | str
    size: int
    sha256: str
    stat: os.stat_result | None


def read_stable(path: str, copy: str) -> Content | None:
    """A file's content and stat of one moment; ``None`` if it kept changing while being read (H26, spec §2).

    What is too much for memory is copied to ``copy``. Raises FileNotFoundError, also for what is not a regular file.
    """
    for _ in range(_READ_ATTEMPTS):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            before = os.fstat(fd)
            if not stat.S_ISREG(before.st_mode):
                raise FileNotFoundError(path)
            content = _read(fd, before, copy)
            after = os.fstat(fd)
        finally:
            os.close(fd)
        if _moment(before) == _moment(after) and content.size == after.st_size:
            return content
    return None


def _read(fd: int, found: os.stat_result, copy: str) -> Content:
    if found.st_size <= IN_MEMORY:
        with os.fdopen(fd, "rb", closefd=False, buffering=0) as file:
            body = file.read()
        return Content(body, len(body), hashlib.sha256(body).hexdigest(), found)
    with open(copy, "wb+", buffering=0) as target:
        while os.copy_file_range(fd, target.fileno(), 1 << 30):
            pass
        size = target.seek(0, os.SEEK_END)
        target.seek(0)
        return Content(copy, size, hashlib.file_digest(target, "sha256").hexdigest(), found)


def _moment(found: os.stat_result) -> tuple[int, int, int]:
    return found.st_mtime_ns, found.st_ctime_ns, found.st_size
