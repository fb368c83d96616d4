"""Names of the datastore tier: every operation that changes the tree, in the order that survives a crash.

Journal first, then files, then catalog (``docs/architecture.md``): replay can finish whatever was begun, and an
operation that was not acknowledged may as well not have happened.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable

from swampfs.fs.attributes import KINDS, Attributes, fail, stale
from swampfs.fs.files import Files
from swampfs.fs.handles import sync_content
from swampfs.fs.inodes import Inodes, Orphan
from swampfs.names import MAX_LINK, RelPath, check_name, is_below, is_scratch, join, rel_path
from swampfs.records import Change, DirtyPath, Kind, Node, Op, Residency, TreeChange
from swampfs.state.catalog import CHANGED, LINK_MODE
from swampfs.sync.parallel import for_each
from swampfs.sync.service import SyncService

_HYDRATE_AT_ONCE = 32
_TICK_NS = 4_000_000  # of the clock that Linux stamps files with


class Tree:
    """Directory operations on catalog nodes. Raises FileError, HostileNameError and sync errors."""

    def __init__(self, sync: SyncService, files: Files, inodes: Inodes, on_dirty: Callable[[RelPath], None]) -> None:
        self._sync = sync
        self._catalog = sync.catalog
        self._files = files
        self._inodes = inodes
        self._on_dirty = on_dirty

    def directory(self, ino: int) -> Node:
        node = self._catalog.node(ino)
        if node is None:
            raise fail(errno.ENOENT, "a removed directory") if ino in self._inodes.orphans else stale(ino)
        if not node.is_dir:
            raise fail(errno.ENOTDIR, node.path)
        return node

    def unpublished(self, ino: int) -> list[RelPath]:
        """Paths below a directory under which the datastore has something else, or nothing."""
        node = self._catalog.node(ino)
        if node is None:
            return []  # of the local tier, or removed
        return [RelPath(path) for path in self._sync.journal if is_below(path, node.path)]

    def sync_names(self, ino: int) -> None:
        """What was renamed or linked into a directory is there after a power cut."""
        node = self._catalog.node(ino)
        if node is not None:
            self._sync.cache.sync_names(RelPath(f"{node.path}/." if node.path else "."))

    def child_path(self, parent: Node, name: str) -> RelPath:
        """Checked path of a name that may be created."""
        check_name(name)
        return rel_path(join(parent.path, name))

    def existing(self, parent: Node, name: str) -> Node:
        node = self._catalog.child(parent.ino, name)
        if node is None:
            raise fail(errno.ENOENT, name)
        return node

    def lives_on(self, change: TreeChange) -> bool:
        """Whether an inode that lost this name is still open, or has others."""
        if self._files.handles.is_open(change.ino):
            return True
        if self._catalog.node(change.ino) is None:
            return False
        there = self._catalog.child(change.parent, change.name)
        return there is None or there.ino != change.ino

    def name_of_file(self, ino: int) -> tuple[int, str] | None:
        """Directory and name; of several names, one."""
        node = self._catalog.node(ino)
        return None if node is None or node.is_dir else (node.parent, node.name)

    # --- making -------------------------------------------------------------------------------------------

    def mkdir(self, parent: Node, name: str, mode: int, owner: tuple[int, int]) -> Node:
        path = self.child_path(parent, name)
        mode |= parent.mode & stat.S_ISGID
        if self._catalog.child(parent.ino, name) is not None:
            raise fail(errno.EEXIST, path)
        with self._catalog.transaction():
            return self._catalog.add(
                path, Kind.DIRECTORY, mode=mode & 0o7777, owner=_group_of(parent, owner), residency=Residency.CLEAN
            )

    def create(self, parent: Node, name: str, mode: int, owner: tuple[int, int]) -> Node:
        """A new, empty file; its bytes are made by :meth:`Files.create`."""
        path = self.child_path(parent, name)
        if self._catalog.child(parent.ino, name) is not None:
            raise fail(errno.EEXIST, path)
        with self._catalog.transaction():
            node = self._catalog.add(path, Kind.FILE, mode=mode & 0o7777, owner=_group_of(parent, owner))
            if self._adopt_removed(path):
                return self.existing(parent, name)
        return node

    def _adopt_removed(self, path: RelPath) -> bool:
        """Removed and made again before the removal was pushed: a change of the published file."""
        pending = self._sync.journal.get(path) if path in self._sync.journal else None
        if pending is None:
            return False
        self._catalog.adopt_base(path, pending.base, pending.partition)
        return True

    def symlink(self, parent: Node, name: str, target: str, owner: tuple[int, int]) -> Node:
        """Its content is its target, for clients that know no links."""
        path = self.child_path(parent, name)
        if self._catalog.child(parent.ino, name) is not None:
            raise fail(errno.EEXIST, path)
        body = target.encode()
        if len(body) > MAX_LINK:
            raise fail(errno.ENAMETOOLONG, path)
        with self._catalog.transaction():
            node = self._catalog.add(path, Kind.SYMLINK, mode=LINK_MODE, owner=_group_of(parent, owner), target=target)
            self._adopt_removed(path)
        self._sync.mark_dirty(node)
        fd = self._sync.cache.create(path)
        try:
            os.write(fd, body)
            found = os.fstat(fd)
        finally:
            os.close(fd)
        self._catalog.set_content(node.ino, found)
        self._on_dirty(path)
        return node._replace(mtime_ns=found.st_mtime_ns)

    def mknod(self, parent: Node, name: str, mode: int, rdev: int, owner: tuple[int, int]) -> Node:
        path = self.child_path(parent, name)
        if self._catalog.child(parent.ino, name) is not None:
            raise fail(errno.EEXIST, path)
        kind = KINDS[stat.S_IFMT(mode)]
        with self._catalog.transaction():
            return self._catalog.add(
                path,
                kind,
                mode=mode & 0o7777,
                owner=_group_of(parent, owner),
                residency=Residency.CLEAN,
                rdev=rdev,
            )

    async def link(self, ino: int, parent: int, name: str) -> Node:
        """A further name of a file. On other machines, and to the datastore, it is a file of its own."""
        node = self.linkable(ino)
        if node.kind in (Kind.FILE, Kind.SYMLINK):
            await (self._files.make_durable if self._is_loose(node) else self._files.make_local)(node)
            node = self.linkable(ino)
        path = self.child_path(self.directory(parent), name)
        if self._catalog.child(parent, name) is not None:
            raise fail(errno.EEXIST, path)
        if node.is_special:
            self._catalog.add_link(node, path, Residency.CLEAN)
        else:
            self._sync.mark_dirty(node._replace(path=path, partition=None))
            if self._sync.journal.is_synced(node.path):
                self._sync.journal.note_synced(path)
            self._sync.cache.link(node.path, path)
            if node.base is not None:
                self._sync.cache.sync_names(path)
            with self._catalog.transaction():
                self._catalog.add_link(node, path, Residency.DIRTY)
                self._adopt_removed(path)
            self._files.handles.linked(ino)
            self._on_dirty(path)
        made = self._catalog.at(path)
        assert made is not None
        return made

    def linkable(self, ino: int) -> Node:
        node = self._catalog.node(ino)
        if node is None:
            raise fail(errno.ENOENT, "a removed file") if ino in self._inodes.orphans else stale(ino)
        if node.is_dir:
            raise fail(errno.EPERM, node.path)
        return node

    # --- removing -----------------------------------------------------------------------------------------

    def unlink(self, parent: Node, name: str) -> Node:
        node = self.existing(parent, name)
        if node.is_dir:
            raise fail(errno.EISDIR, node.path)
        self._sync.mark_deleted(node)
        self._unname(node)
        self._sync.cache.remove(node.path)
        self._catalog.remove(node, by_user=True)
        self._catalog.unhide(node.path)
        if node.path in self._sync.journal:
            self._on_dirty(node.path)
        return node

    def rmdir(self, parent: Node, name: str) -> Node:
        node = self.existing(parent, name)
        if not node.is_dir:
            raise fail(errno.ENOTDIR, node.path)
        if self._catalog.has_children(node.ino):
            raise fail(errno.ENOTEMPTY, node.path)
        self._changed([node])
        self._sync.cache.remove_dir(node.path)
        self._catalog.remove(node, by_user=True)
        self._catalog.unhide(node.path)
        if self._inodes.is_held(node.ino):
            self._inodes.orphans[node.ino] = Orphan(node, None)
        return node

    def replaced_remotely(self, node: Node) -> None:
        """The name of this inode stands for other content now, or for none."""
        if not node.is_dir and node.links > 1:
            self._sync.cache.remove(node.path)
            self._files.handles.lost_name(node.ino, node.path, self._catalog.names(node.ino))
            return
        if node.residency is not Residency.STUB:  # a stub has nothing to go on with: its next open is ESTALE
            self._unname(node)
            self._sync.cache.remove(node.path)
        self._files.handles.replaced(node.ino)
        orphan = self._inodes.orphans.get(node.ino)
        if orphan is not None:
            orphan.replaced = True
            orphan.drop_content()  # nobody can open it any more

    def _unname(self, node: Node) -> None:
        """The node loses its name; while the kernel holds the inode, its content stays reachable."""
        left = [path for path in self._catalog.names(node.ino) if path != node.path] if node.links > 1 else []
        self._files.handles.lost_name(node.ino, node.path, left)
        if left:
            return
        self._files.handles.last_use.pop(node.ino, None)
        if self._inodes.is_held(node.ino):
            content = self._sync.cache.orphan(node.path, node.ino)
            self._inodes.orphans[node.ino] = Orphan(node, content)

    # --- renaming -----------------------------------------------------------------------------------------

    async def rename(
        self, parent: int, name: str, new_parent: int, new_name: str, *, replace: bool
    ) -> tuple[RelPath, RelPath]:
        """POSIX rename within the datastore tier, of names in directories given by inode. Returns old and new path.

        What moves must be local, because only content that is here can be published under the new name; and on the
        disk, because the old name's object will be deleted for it, also after a power cut.
        """
        durable: set[int] = set()
        with self._sync.room.keeping():
            while True:
                # Read anew after each wait: others may have moved or removed anything.
                node = self.existing(self.directory(parent), name)
                target = self.child_path(self.directory(new_parent), new_name)
                over = self._catalog.child(new_parent, new_name)
                if over is not None and over.ino == node.ino:
                    return node.path, target
                if await self._files.early.finish(over):
                    continue
                self._check_rename(node, target, over, replace)
                moving = list(self._catalog.files_below(node.path))
                loose = [file for file in moving if self._is_loose(file) and file.ino not in durable]
                links = [link for link in moving if link.residency is Residency.STUB and link.kind is not Kind.FILE]
                if not loose and not links:
                    break
                errors = await for_each(loose, self._files.make_durable, at_once=_HYDRATE_AT_ONCE)
                errors += await for_each(links, self._files.make_local, at_once=_HYDRATE_AT_ONCE)
                if errors:
                    raise errors[0]
                durable.update(file.ino for file in loose)
            self._move(node, target, over)
        return node.path, target

    def _is_loose(self, node: Node) -> bool:
        """Whether a power cut could take the bytes of something that is in the datastore under this name."""
        if node.kind is not Kind.FILE or node.base is None:
            return False
        return node.residency is not Residency.DIRTY or not self._sync.journal.is_synced(node.path)

    def moved_with(self, node: Node, target: RelPath) -> list[RelPath]:
        """Every path, old and new, that others would see change if a directory were renamed to ``target``."""
        below = ["/", *(file.path[len(node.path) :] for file in self._catalog.files_below(node.path))]
        below += [path[len(node.path) :] for path in self._catalog.empty_directories(node.path)]
        below += [found.path[len(node.path) :] for found in self._catalog.unusual_directories(node.path)]
        return [RelPath(end + path) for end in (node.path, target) for path in ("", *below)]

    def _check_rename(self, node: Node, target: RelPath, over: Node | None, replace: bool) -> None:
        if node.is_dir and (target + "/").startswith(node.path + "/"):
            raise fail(errno.EINVAL, f"{node.path} → {target}")
        if over is None:
            return
        if not replace:
            raise fail(errno.EEXIST, target)
        if node.is_dir and not over.is_dir:
            raise fail(errno.ENOTDIR, target)
        if over.is_dir and not node.is_dir:
            raise fail(errno.EISDIR, target)
        if over.is_dir and self._catalog.has_children(over.ino):
            raise fail(errno.ENOTEMPTY, target)

    def _move(self, node: Node, target: RelPath, over: Node | None) -> None:
        moves = []
        for file in self._catalog.files_below(node.path):
            moved = RelPath(target + file.path[len(node.path) :])
            old = DirtyPath(file.path, Op.DELETE, 0, file.base, file.partition)
            base, partition = (over.base, over.partition) if over and not over.is_dir else (None, None)
            new = None if is_scratch(moved) else DirtyPath(moved, Op.WRITE, 0, base, partition)
            moves.append((old, new))
        if over is not None and not over.is_dir and node.is_special:
            # Nothing comes in place of its content. In one commit with the intent: a crash does both or neither.
            moves.append((DirtyPath(over.path, Op.DELETE, 0, over.base, over.partition), None))
        self._sync.sidecar.mark_bulk()
        intent = self._sync.journal.mark_rename(node.path, target, moves)
        if over is not None and not over.is_dir:
            if is_scratch(target):
                self._sync.mark_deleted(over)
            self._unname(over)
            if node.is_special:
                self._sync.cache.remove(over.path)
        self._sync.cache.rename(node.path, target)
        if any(old.base is not None for old, _ in moves):
            # Its object will be deleted for this: a power cut must not leave it under neither name.
            self._sync.cache.sync_names(node.path, target)
        with self._catalog.transaction():
            if over is not None:
                self._catalog.remove(over)
            self._changed([node, *self._catalog.unusual_directories(node.path)] if node.is_dir else [])
            self._catalog.move(node, target)
            self._catalog.unhide(node.path)
            self._catalog.unpublish(target)
            for _, new in moves:
                if new is not None:
                    pending = self._sync.journal.get(new.path)
                    if pending is not None and pending.base is not None:
                        self._catalog.adopt_base(new.path, pending.base, pending.partition)
        self._sync.journal.settle(intent)
        self._files.handles.renamed(node.path, target)
        for old, new in moves:
            self._on_dirty(old.path)
            if new is not None:
                self._on_dirty(new.path)

    # --- attributes ---------------------------------------------------------------------------------------

    async def setattr(self, node: Node, change: Change) -> None:
        if change.size is not None:
            if node.is_dir:
                raise fail(errno.EISDIR, node.path)
            node = await (self._files.make_local if change.size > 0 else self._files.early.finished)(node)
            self._files.truncate(node, change.size)
        self.set_attributes(node, change)

    def set_attributes(self, node: Node, change: Change) -> None:
        """All but the size."""
        if change.mtime_ns is not None and not node.is_dir and self._sync.cache.stat(node.path) is not None:
            # The file carries the time too: it is what a push reads and what replay trusts.
            os.utime(self._sync.cache.path(node.path), ns=(change.mtime_ns, change.mtime_ns))
        if change.is_of_access:
            self._changed([node] if node.is_dir and node.path else [])
        mode = None if change.mode is None else change.mode & 0o7777
        if _is_as_it_was(node, change._replace(mode=mode)):
            return
        shown = (mode, change.uid, change.gid, change.mtime_ns) != (None, None, None, None)
        names = self._files.names_of(node) if shown and node.kind in (Kind.FILE, Kind.SYMLINK) else []
        for name in names:
            self._sync.mark_attributes(name)
        written = self._files.handles.written(node.ino) if node.residency is Residency.DIRTY else None
        self._catalog.set_attributes(node.ino, change._replace(mode=mode), written)
        for name in names:
            if name.path in self._sync.journal:
                self._on_dirty(name.path)

    def _changed(self, directories: Iterable[Node]) -> None:
        """What others last said of their modes and owners is not to be restored (:mod:`swampfs.sync.directories`)."""
        for node in directories:
            self._catalog.set_fact(f"{CHANGED}:{node.path}", "")

    # --- across tiers -------------------------------------------------------------------------------------

    async def surrender(self, node: Node, take: Callable[[str, int], Attributes]) -> None:
        """A datastore file is renamed to a local name: hand its content to ``take`` and forget it here."""
        if node.kind is not Kind.FILE or node.links > 1 or self._files.handles.has_writer(node.ino):
            raise fail(errno.EXDEV, node.path)
        if self._files.handles.is_passing(node.ino):
            raise fail(errno.EXDEV, node.path)  # the kernel reads it as what it was
        node = await self._files.make_durable(node)
        taken = take(self._sync.cache.path(node.path), node.mode)
        self._sync.mark_deleted(node)
        self._catalog.remove(node, by_user=True)
        self._files.handles.lost_name(node.ino, node.path, [])
        self._inodes.alias(node.ino, taken.ino)
        self._on_dirty(node.path)

    def adopt(self, content: str, ino: int, parent: Node, name: str) -> Node:
        """A local file is renamed to a datastore name: its content becomes a new, dirty file there.

        ``ino`` is its inode in the local tier. The source goes last: a crash before that leaves it where it was.
        """
        found = os.lstat(content)
        if not stat.S_ISREG(found.st_mode) or self._files.handles.has_writer(ino):
            raise fail(errno.EXDEV, content)  # what mv(1) answers by copying
        path = self.child_path(parent, name)
        over = self._catalog.child(parent.ino, name)
        if over is not None and over.is_dir:
            raise fail(errno.EISDIR, path)
        staged = self._sync.cache.stage()
        shutil.copyfile(content, staged)
        sync_content(staged)
        if over is not None:
            self._sync.mark_dirty(over)
            self._unname(over)
            self._catalog.remove(over)
        node = self.create(parent, name, found.st_mode, (found.st_uid, found.st_gid))
        self._sync.mark_dirty(node)
        self._sync.cache.admit(staged, path, found.st_mtime_ns)
        self._sync.journal.note_synced(path)
        self._catalog.set_content(node.ino, os.lstat(self._sync.cache.path(path)))
        os.unlink(content)
        self._inodes.alias(ino, node.ino)
        self._on_dirty(path)
        return node


def _group_of(parent: Node, owner: tuple[int, int]) -> tuple[int, int]:
    """Below a directory with the setgid bit, everything is of its group."""
    return (owner[0], parent.gid) if parent.mode & stat.S_ISGID else owner


def _is_as_it_was(node: Node, change: Change) -> bool:
    """Whether mode and owner are set to what they are, at the moment they were set, as far as clocks can tell."""
    if change.mtime_ns is not None or change.atime_ns is not None or time.time_ns() - node.ctime_ns > _TICK_NS:
        return False
    return change.mode in (None, node.mode) and change.uid in (None, node.uid) and change.gid in (None, node.gid)
