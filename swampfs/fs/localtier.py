"""The local tier: names that belong to this machine, passed through to a real directory.

It is the repo's own ``.swamp/`` below the mount point, opened before mounting and reached through
``/proc/self/fd``, or ``local/`` in the state home. Secrets, bundles, SQLite files, run logs and (until they are
distributed) lock files live here and nowhere else. Errors are the operating system's own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat

from swampfs.errors import FileError
from swampfs.fs.attributes import LOCAL_BASE, Attributes, of_stat, stale
from swampfs.names import RelPath, is_always_local, join, parent_of
from swampfs.records import Change
from swampfs.settings import TierPolicy

_OPEN_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_TRUNC | os.O_EXCL
_LARGE = 1 << 59
_SAFELY = os.O_NOFOLLOW | os.O_CLOEXEC


class LocalTier:
    """Path operations on one directory. ``root`` must stay valid while it is mounted over."""

    def __init__(self, root: str, policy: TierPolicy, *, umask: int = 0) -> None:
        self._root = root
        self._umask = umask
        self._kept = policy.kept_local
        self._large: dict[int, int] = {}  # inodes beneath that do not fit below the limit → short ones
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
        attributes = of_stat(found, self._ino(found.st_ino), self._umask)
        self._paths[attributes.ino] = rel
        return attributes

    def _ino(self, beneath: int) -> int:
        """Some file systems number their inodes by hashes of 64 bits."""
        if beneath >= _LARGE:
            beneath = _LARGE + self._large.setdefault(beneath, len(self._large))
        return LOCAL_BASE + beneath

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

    def mkdir(self, rel: RelPath, mode: int, owner: tuple[int, int]) -> Attributes:
        self.make_parents(rel)
        os.mkdir(self.path(rel), mode & 0o7777)
        return self._owned(rel, mode, owner)

    def symlink(self, rel: RelPath, target: str) -> Attributes:
        self.make_parents(rel)
        os.symlink(target, self.path(rel))
        return self._existing(rel)

    def link(self, ino: int, rel: RelPath) -> Attributes:
        """Raises ESTALE for an inode that is gone."""
        self.make_parents(rel)
        os.link(self.path(self.rel(ino)), self.path(rel), follow_symlinks=False)
        found = self.lookup(rel)
        assert found is not None
        return found

    def readlink(self, ino: int) -> str:
        return os.readlink(self.path(self.rel(ino)))

    def create(self, rel: RelPath, flags: int, mode: int, owner: tuple[int, int]) -> tuple[int, Attributes]:
        self.make_parents(rel)
        is_new = not os.path.lexists(self.path(rel))
        fd = os.open(self.path(rel), (flags & _OPEN_FLAGS) | os.O_CREAT | _SAFELY, mode & 0o7777)
        return fd, self._owned(rel, mode, owner) if is_new else self._existing(rel)

    def open(self, ino: int, flags: int) -> int:
        fd = os.open(self.path(self.rel(ino)), (flags & _OPEN_FLAGS & ~os.O_EXCL) | _SAFELY)
        if self._ino(os.fstat(fd).st_ino) != ino:
            os.close(fd)
            raise stale(ino)
        return fd

    def unlink(self, rel: RelPath) -> None:
        self._drop(rel)
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
        self._drop(target)
        os.rename(self.path(source), self.path(target))
        self._moved(source, target)

    def would_strand(self, source: RelPath, target: RelPath) -> bool:
        """Whether a local file below a datastore directory would lose its place if that directory were renamed."""
        for directory, _, names in os.walk(self.path(source)):
            below = os.path.relpath(directory, self.path(source))
            for name in names:
                rel = os.path.normpath(os.path.join(below, name))
                if self.owns(f"{source}/{rel}") and not self.owns(f"{target}/{rel}"):
                    return True
        return False

    def move_shadow(self, source: RelPath, target: RelPath) -> None:
        """A datastore directory was renamed: local files below its name follow."""
        if os.path.isdir(self.path(source)):
            self.drop_empty(target)
            if not os.path.lexists(self.path(target)):
                self.rename(source, target)

    def take(self, rel: RelPath, content: str, mode: int) -> Attributes:
        """A datastore file was renamed to a local name: move its content here, over what was there."""
        self.make_parents(rel)
        self._drop(rel)
        os.chmod(content, mode)
        shutil.move(content, self.path(rel))
        return self._existing(rel)

    def setattr(self, ino: int, change: Change, fd: int | None) -> None:
        """Change attributes by name, or through a descriptor once the name is gone."""
        path: str | int
        try:
            path = self.path(self.rel(ino))
            if self._ino(os.lstat(path).st_ino) != ino:
                raise stale(ino)
        except (FileError, FileNotFoundError):
            if fd is None:
                raise stale(ino) from None
            path = fd
        follow = isinstance(path, int)  # a descriptor knows no links
        if change.size is not None:
            os.truncate(path, change.size)
        if change.mode is not None:
            before = os.stat(path, follow_symlinks=follow).st_mode
            os.chmod(path, (change.mode & ~self._umask | before & self._umask) & 0o7777)
        if change.uid is not None or change.gid is not None:
            uid, gid = (-1 if value is None else value for value in (change.uid, change.gid))
            os.chown(path, uid, gid, follow_symlinks=follow)
        if change.mtime_ns is not None or change.atime_ns is not None:
            found = os.stat(path, follow_symlinks=follow)
            atime = found.st_atime_ns if change.atime_ns is None else change.atime_ns
            mtime = found.st_mtime_ns if change.mtime_ns is None else change.mtime_ns
            os.utime(path, ns=(atime, mtime), follow_symlinks=follow)

    def _owned(self, rel: RelPath, mode: int, owner: tuple[int, int]) -> Attributes:
        """What was just made has the mode its maker asked for (the daemon's umask is not theirs), and its owner."""
        path = self.path(rel)
        above = os.stat(os.path.dirname(path))
        if above.st_mode & stat.S_ISGID:
            owner = owner[0], above.st_gid
            mode |= stat.S_ISGID if os.path.isdir(path) else 0
        if os.geteuid() == 0:
            os.chown(path, *owner)
        os.chmod(path, mode & 0o7777)
        return self._existing(rel)

    def _drop(self, rel: RelPath) -> None:
        """The name is about to leave its inode."""
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            ino = self._ino(os.lstat(self.path(rel)).st_ino)
            if self._paths.get(ino) == rel:
                del self._paths[ino]

    def _existing(self, rel: RelPath) -> Attributes:
        found = self.lookup(rel)
        assert found is not None
        return found

    def _moved(self, source: RelPath, target: RelPath) -> None:
        for ino, path in self._paths.items():
            if path == source or path.startswith(source + "/"):
                self._paths[ino] = RelPath(target + path[len(source) :])
