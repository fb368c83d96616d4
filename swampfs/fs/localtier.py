"""The local tier: names that belong to this machine, passed through to a real directory.

It is the repo's own ``.swamp/`` below the mount point, opened before mounting and reached through
``/proc/self/fd``, or ``local/`` in the state home. Secrets, bundles, SQLite files, run logs and (until they are
distributed) lock files live here and nowhere else. Errors are the operating system's own.
"""

from __future__ import annotations

import os
import shutil

from swampfs.fs.attributes import LOCAL_BASE, Attributes, Change, of_stat, stale
from swampfs.names import RelPath, is_always_local, join, parent_of
from swampfs.settings import TierPolicy


class LocalTier:
    """Path operations on one directory. ``root`` must stay valid while it is mounted over."""

    def __init__(self, root: str, policy: TierPolicy) -> None:
        self._root = root
        self._kept = policy.kept_local
        self._paths: dict[int, RelPath] = {}  # inodes the kernel knows; dropped at FORGET

    def owns(self, rel: str) -> bool:
        """Whether a name created at ``rel`` belongs here rather than in the datastore."""
        return is_always_local(rel) or rel.partition("/")[0] in self._kept

    def path(self, rel: RelPath) -> str:
        return f"{self._root}/{rel}" if rel else self._root

    def rel(self, ino: int) -> RelPath:
        """Raises ESTALE for an inode that was never looked up or is gone."""
        try:
            return self._paths[ino]
        except KeyError:
            raise stale(ino) from None

    def lookup(self, rel: RelPath) -> Attributes | None:
        try:
            found = os.lstat(self.path(rel))
        except (FileNotFoundError, NotADirectoryError):
            return None
        attributes = of_stat(found, LOCAL_BASE + found.st_ino)
        self._paths[attributes.ino] = rel
        return attributes

    def attributes(self, ino: int) -> Attributes:
        found = self.lookup(self.rel(ino))
        if found is None or found.ino != ino:
            raise stale(ino)
        return found

    def forget(self, ino: int) -> None:
        self._paths.pop(ino, None)

    def children(self, rel: RelPath) -> list[tuple[str, Attributes]]:
        """Entries of a directory that belong to this tier, in inode order; none if it does not exist here."""
        try:
            names = os.listdir(self.path(rel))
        except (FileNotFoundError, NotADirectoryError):
            return []
        found = []
        for name in names:
            child = join(rel, name)
            attributes = self.lookup(child) if self.owns(child) else None
            if attributes is not None:
                found.append((name, attributes))
        return sorted(found, key=lambda item: item[1].ino)

    def make_parents(self, rel: RelPath) -> None:
        os.makedirs(self.path(parent_of(rel)), exist_ok=True)

    def mkdir(self, rel: RelPath, mode: int) -> Attributes:
        self.make_parents(rel)
        os.mkdir(self.path(rel), mode & 0o7777)
        return self._existing(rel)

    def symlink(self, rel: RelPath, target: str) -> Attributes:
        self.make_parents(rel)
        os.symlink(target, self.path(rel))
        return self._existing(rel)

    def readlink(self, ino: int) -> str:
        return os.readlink(self.path(self.rel(ino)))

    def create(self, rel: RelPath, flags: int, mode: int) -> tuple[int, Attributes]:
        self.make_parents(rel)
        fd = os.open(self.path(rel), flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, mode & 0o7777)
        return fd, self._existing(rel)

    def open(self, ino: int, flags: int) -> int:
        return os.open(self.path(self.rel(ino)), (flags & ~os.O_CREAT) | os.O_NOFOLLOW | os.O_CLOEXEC)

    def unlink(self, rel: RelPath) -> None:
        os.unlink(self.path(rel))

    def rmdir(self, rel: RelPath) -> None:
        os.rmdir(self.path(rel))

    def drop_empty(self, rel: RelPath) -> None:
        """Remove the shadow of a datastore directory; what still holds local files stays."""
        for directory, _, _ in os.walk(self.path(rel), topdown=False):
            try:
                os.rmdir(directory)
            except OSError:
                return

    def rename(self, source: RelPath, target: RelPath) -> None:
        self.make_parents(target)
        os.rename(self.path(source), self.path(target))
        self._moved(source, target)

    def move_shadow(self, source: RelPath, target: RelPath) -> None:
        """A datastore directory was renamed: local files below its name follow."""
        if os.path.isdir(self.path(source)) and not os.path.lexists(self.path(target)):
            self.rename(source, target)

    def take(self, rel: RelPath, content: str) -> None:
        """A datastore file was renamed to a local name: move its content here, over what was there."""
        self.make_parents(rel)
        shutil.move(content, self.path(rel))

    def setattr(self, ino: int, change: Change) -> Attributes:
        path = self.path(self.rel(ino))
        if change.size is not None:
            os.truncate(path, change.size)
        if change.mode is not None:
            os.chmod(path, change.mode & 0o7777)
        if change.uid is not None or change.gid is not None:
            os.lchown(path, -1 if change.uid is None else change.uid, -1 if change.gid is None else change.gid)
        if change.mtime_ns is not None or change.atime_ns is not None:
            found = os.lstat(path)
            atime = found.st_atime_ns if change.atime_ns is None else change.atime_ns
            mtime = found.st_mtime_ns if change.mtime_ns is None else change.mtime_ns
            os.utime(path, ns=(atime, mtime), follow_symlinks=False)
        return self.attributes(ino)

    def _existing(self, rel: RelPath) -> Attributes:
        found = self.lookup(rel)
        assert found is not None
        return found

    def _moved(self, source: RelPath, target: RelPath) -> None:
        for ino, path in self._paths.items():
            if path == source or path.startswith(source + "/"):
                self._paths[ino] = RelPath(target + path[len(source) :])
