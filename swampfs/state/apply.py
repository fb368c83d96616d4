"""Applying an index delta to the catalog: the pure bookkeeping between "the index moved" and "the kernel must know".

One transaction per delta. Dirty paths are never touched; what they were based on stays in the journal, and the push
decides (architecture rule 2). Deletes apply only to rows that were read from the partition that dropped them.
"""

from __future__ import annotations

import time
from collections.abc import Container, Sequence
from typing import NamedTuple

from swampfs.names import RelPath, is_servable, parent_of
from swampfs.records import Change, Finding, IndexDelta, IndexEntry, Kind, Node, Partition, Residency, TreeChange
from swampfs.state.catalog import ROOT_INO, Catalog


class Applied(NamedTuple):
    """Result of :func:`apply_delta`."""

    changes: list[TreeChange]
    stale: list[Node]  # inodes whose name now stands for other content, or for none
    missing_parked: list[RelPath]  # our parked entries that vanished from the index (H6)
    retimed: list[tuple[RelPath, int]]  # content that stays, under another modification time


def apply_delta(catalog: Catalog, delta: IndexDelta, dirty: Container[str]) -> Applied:
    """Bring the catalog to the delta's state. Returns what the kernel and the cache directory must forget."""
    applied = Applied([], [], [], [])
    catalog.epoch += 1
    with catalog.transaction():
        known = catalog.partitions()
        vanished = known.keys() - delta.kept - delta.changed.keys()
        work = _Work(catalog, dirty, applied, fresh=not known and not catalog.has_children(ROOT_INO))
        waiting: set[str] = set()
        if not work.fresh:
            # Removals first, over all partitions: a file may become a directory, or move to another partition.
            staying = {entry.path for partition in delta.changed.values() for entry in partition.entries}
            waiting = {name for name in (*delta.changed, *vanished) if not work.remove_gone(name, staying)}
            work.prune()
        # Without its ETag a partition is looked at again by the next poll: it holds news for a path that was busy.
        for name in vanished:
            if name in waiting:
                catalog.read_again(name)
            else:
                catalog.db.execute("DELETE FROM partition WHERE name = ?", (name,))
        for name, partition in delta.changed.items():
            complete = work.add_and_update(name, partition) and name not in waiting
            etag = partition.etag if complete else ""
            catalog.db.execute("INSERT OR REPLACE INTO partition VALUES (?, ?)", (name, etag))
        work.finish()
        catalog.report(delta.findings)
        catalog.set_watermark(delta.watermark)
    return applied


class _Work:
    """State of one application: what was seen, what must be reported."""

    def __init__(self, catalog: Catalog, dirty: Container[str], applied: Applied, *, fresh: bool) -> None:
        self.fresh = fresh
        self._catalog = catalog
        self._dirty = dirty
        self._applied = applied
        self._now = time.time_ns()
        self._directories: dict[str, int] = {"": ROOT_INO}
        self._seen: set[str] = set()
        self._newest: dict[int, int] = {}  # directory inode → mtime it should show
        self._removed_from: set[str] = set()
        self._parked = set(catalog.parked())
        self._findings: list[Finding] = []

    def remove_gone(self, name: str, staying: Container[str]) -> bool:
        """Remove rows read from a partition that it no longer holds; returns whether none of them was busy."""
        self._catalog.db.execute("DELETE FROM finding WHERE partition = ?", (name,))
        rows = self._catalog.db.execute("SELECT path FROM node WHERE partition = ?", (name,)).fetchall()
        gone = sorted(row[0] for row in rows if row[0] not in staying)
        busy = [path for path in gone if not self._remove(RelPath(path))]
        return not busy

    def add_and_update(self, name: str, partition: Partition) -> bool:
        """Make rows equal to a partition's entries; returns whether none had to be passed over as busy."""
        complete = True
        for entry in partition.entries:
            if not is_servable(entry.path):
                continue
            # On a first mount most paths are new: skip a look-up per entry.
            surely_new = self.fresh and entry.path not in self._seen and entry.path not in self._directories
            node = None if surely_new else self._catalog.at(entry.path)
            self._seen.add(entry.path)
            if entry.path in self._dirty or (node is not None and node.residency is Residency.DIRTY):
                complete = complete and node is not None and entry == node.base
            elif node is None:
                complete = self._add(entry, name) and complete
            else:
                self._update(node, entry, name)
        return complete

    def _add(self, entry: IndexEntry, partition: str) -> bool:
        """Returns whether the entry could be shown, or is hidden for good."""
        directory = parent_of(entry.path)
        parent = self._directories.get(directory)
        if parent is None:
            missing = self._catalog.missing_directories(entry.path)
            if not self._give_way(entry.path):
                self._clash(entry.path, "a directory it needs is a file here, changed or open", partition)
                return False
            parent = self._catalog.make_parents(entry.path)
            self._directories[directory] = parent
            self._note_created(missing)
        ino = self._catalog.add_remote(parent, entry, partition, self._now)
        self._newest[parent] = max(self._newest.get(parent, 0), (entry.mtime_ns or 0) if self.fresh else self._now)
        if not self.fresh:
            self._applied.changes.append(TreeChange(parent, entry.path.rpartition("/")[2], ino))
        return True

    def _give_way(self, path: RelPath) -> bool:
        """If the index has both ``d`` and ``d/x``, every machine shows the directory. Hides a file in the way."""
        directory = parent_of(path)
        while directory:
            node = self._catalog.at(directory)
            if node is not None and not node.is_dir:
                if directory in self._dirty or node.residency is Residency.DIRTY:
                    return False
                self._take_away(node)
                self._clash(directory, "it is both a file and a directory", node.partition or "")
                return True
            directory = parent_of(directory)
        return True

    def _note_created(self, directories: Sequence[str]) -> None:
        for directory in directories:
            node = self._catalog.at(directory)
            assert node is not None
            self._directories[directory] = node.ino
            if not self.fresh:
                self._applied.changes.append(TreeChange(node.parent, node.name, node.ino))
                self._newest[node.parent] = self._now

    def _update(self, node: Node, entry: IndexEntry, partition: str) -> None:
        if node.is_dir:
            self._clash(entry.path, "it is both a file and a directory", partition)
            return
        if node.base == entry and node.partition == partition:
            return
        if entry.same_content(node.base) and (entry.posix is None or entry.kind is node.kind):
            if self._catalog.adopt_posix(node, entry):
                self._applied.changes.append(TreeChange(node.parent, "", node.ino))
                if entry.mtime_ns is not None:
                    self._applied.retimed.append((node.path, entry.mtime_ns))
            self._catalog.settle(entry, partition, clean=False)
            return
        # New content is a new inode, as when a file is renamed over: who has the old one open goes on reading it, and
        # no page or size of it can ever be taken for the new.
        self._catalog.drop(node)
        ino = self._catalog.add_remote(node.parent, entry, partition, self._now)
        if entry.posix is None and node.kind is Kind.FILE:
            self._catalog.set_attributes(ino, Change(mode=node.mode, uid=node.uid, gid=node.gid))
        self._applied.stale.append(node)
        self._applied.changes.append(TreeChange(node.parent, node.name, node.ino))

    def _remove(self, path: RelPath) -> bool:
        if path in self._dirty:
            return False
        if path in self._parked:
            self._applied.missing_parked.append(path)
            return True
        node = self._catalog.at(path)
        if node is None:
            return True
        if node.residency is Residency.DIRTY:
            return False
        self._take_away(node)
        return True

    def _take_away(self, node: Node) -> None:
        self._catalog.drop(node)
        self._applied.stale.append(node)
        self._applied.changes.append(TreeChange(node.parent, node.name, node.ino))
        self._newest[node.parent] = self._now
        self._removed_from.add(parent_of(node.path))
        self._catalog.unhide(node.path)

    def prune(self) -> None:
        """Remove directories that only existed for files now gone."""
        for directory in sorted(self._removed_from, key=len, reverse=True):
            self._prune(directory)

    def finish(self) -> None:
        """Times of directories whose entries changed."""
        for ino, mtime_ns in self._newest.items():
            self._catalog.touch(ino, mtime_ns)
            if not self.fresh:
                self._applied.changes.append(TreeChange(ino, "", ino))
        self._catalog.report(self._findings)

    def _prune(self, directory: str) -> None:
        while (node := self._catalog.implied(directory)) is not None:
            self._catalog.drop(node)
            self._catalog.unhide(directory)
            self._applied.changes.append(TreeChange(node.parent, node.name, node.ino))
            self._newest.pop(node.ino, None)
            self._newest[node.parent] = self._now
            directory = node.path.rpartition("/")[0]

    def _clash(self, path: str, why: str, partition: str) -> None:
        self._findings.append(Finding(path, "index-clash", f"skipped: {why}", partition))
