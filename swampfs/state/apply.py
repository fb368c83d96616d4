"""Applying an index delta to the catalog: the pure bookkeeping between "the index moved" and "the kernel must know".

One transaction per delta. Dirty paths are never touched; what they were based on stays in the journal, and the push
decides (architecture rule 2). Deletes apply only to rows that were read from the partition that dropped them.
"""

from __future__ import annotations

import time
from collections.abc import Container
from typing import NamedTuple

from swampfs.names import RelPath, is_servable, parent_of
from swampfs.records import Finding, IndexDelta, IndexEntry, Node, Partition, Residency, TreeChange
from swampfs.state.catalog import ROOT_INO, Catalog


class Applied(NamedTuple):
    """Result of :func:`apply_delta`."""

    changes: list[TreeChange]
    stale: list[RelPath]  # local clean content that no longer belongs to its path
    missing_parked: list[RelPath]  # our parked entries that vanished from the index (H6)


def apply_delta(catalog: Catalog, delta: IndexDelta, dirty: Container[str]) -> Applied:
    """Bring the catalog to the delta's state. Returns what the kernel and the cache directory must forget."""
    applied = Applied([], [], [])
    catalog.epoch += 1
    with catalog.transaction():
        known = catalog.partitions()
        work = _Work(catalog, dirty, applied, fresh=not known and not catalog.has_children(ROOT_INO))
        for name, partition in delta.changed.items():
            work.partition(name, partition)
            catalog.db.execute("INSERT OR REPLACE INTO partition VALUES (?, ?)", (name, partition.etag))
        for name in known.keys() - delta.kept - delta.changed.keys():
            work.partition(name, Partition("", ()))
            catalog.db.execute("DELETE FROM partition WHERE name = ?", (name,))
        work.finish()
        catalog.report(delta.findings)
        catalog.set_watermark(delta.watermark)
    return applied


class _Work:
    """State of one application: what was seen, what must be reported."""

    def __init__(self, catalog: Catalog, dirty: Container[str], applied: Applied, *, fresh: bool) -> None:
        self._catalog = catalog
        self._dirty = dirty
        self._applied = applied
        self._fresh = fresh
        self._now = time.time_ns()
        self._directories: dict[str, int] = {"": ROOT_INO}
        self._seen: set[str] = set()
        self._newest: dict[int, int] = {}  # directory inode → mtime it should show
        self._removed_from: set[str] = set()
        self._parked = set(catalog.parked())
        self._findings: list[Finding] = []

    def partition(self, name: str, partition: Partition) -> None:
        """Make the rows read from one partition equal to its entries."""
        self._catalog.db.execute("DELETE FROM finding WHERE partition = ?", (name,))
        rows = self._catalog.db.execute("SELECT path FROM node WHERE partition = ?", (name,))
        gone = set() if self._fresh else {row[0] for row in rows}
        for entry in partition.entries:
            gone.discard(entry.path)
            if not is_servable(entry.path):
                continue
            # On a first mount most paths are new: skip a look-up per entry.
            surely_new = self._fresh and entry.path not in self._seen and entry.path not in self._directories
            node = None if surely_new else self._catalog.at(entry.path)
            self._seen.add(entry.path)
            if node is None:
                self._add(entry, name)
            else:
                self._update(node, entry, name)
        for path in sorted(gone):
            self._remove(RelPath(path))

    def _add(self, entry: IndexEntry, partition: str) -> None:
        if entry.path in self._dirty:
            return  # removed here, not pushed yet
        directory = parent_of(entry.path)
        parent = self._directories.get(directory)
        if parent is None:
            missing = self._missing_directories(directory)
            try:
                parent = self._catalog.make_parents(entry.path)
            except NotADirectoryError as error:
                self._clash(entry.path, f"{error} is a file", partition)
                return
            self._directories[directory] = parent
            self._note_created(missing)
        ino = self._catalog.add_remote(parent, entry, partition, self._now)
        self._newest[parent] = max(self._newest.get(parent, 0), entry.mtime_ns if self._fresh else self._now)
        if not self._fresh:
            self._applied.changes.append(TreeChange(parent, entry.path.rpartition("/")[2], ino, content=False))

    def _missing_directories(self, directory: str) -> list[str]:
        """Ancestors, outermost last, that the next insert will create."""
        missing = []
        while directory and directory not in self._directories and self._catalog.at(directory) is None:
            missing.append(directory)
            directory = directory.rpartition("/")[0]
        return missing

    def _note_created(self, directories: list[str]) -> None:
        for directory in directories:
            node = self._catalog.at(directory)
            assert node is not None
            self._directories[directory] = node.ino
            if not self._fresh:
                self._applied.changes.append(TreeChange(node.parent, node.name, node.ino, content=False))

    def _update(self, node: Node, entry: IndexEntry, partition: str) -> None:
        if node.is_dir:
            self._clash(entry.path, "it is both a file and a directory", partition)
            return
        if entry.path in self._dirty:
            return
        if node.base == entry and node.partition == partition:
            return
        same = entry.same_content(node.base)
        self._catalog.settle(entry, partition, clean=False)
        if same:
            return
        self._applied.stale.append(entry.path)
        self._catalog.set_content(node.ino, entry.size, entry.mtime_ns or self._now, Residency.STUB)
        self._applied.changes.append(TreeChange(node.parent, "", node.ino, content=True))

    def _remove(self, path: RelPath) -> None:
        if path in self._dirty:
            return
        if path in self._parked:
            self._applied.missing_parked.append(path)
            return
        node = self._catalog.at(path)
        if node is None:
            return
        self._catalog.db.execute("DELETE FROM node WHERE ino = ?", (node.ino,))
        self._applied.stale.append(path)
        self._applied.changes.append(TreeChange(node.parent, node.name, node.ino, content=True))
        self._newest[node.parent] = self._now
        self._removed_from.add(parent_of(path))

    def finish(self) -> None:
        """Directory times, and directories that only existed for files now gone."""
        for directory in sorted(self._removed_from, key=len, reverse=True):
            self._prune(directory)
        for ino, mtime_ns in self._newest.items():
            self._catalog.touch(ino, mtime_ns)
            if not self._fresh:
                self._applied.changes.append(TreeChange(ino, "", ino, content=False))
        self._catalog.report(self._findings)

    def _prune(self, directory: str) -> None:
        while directory:
            row = self._catalog.db.execute(
                "SELECT ino, parent, name FROM node WHERE path = ? AND explicit = 0", (directory,)
            ).fetchone()
            if row is None or self._catalog.has_children(row[0]):
                return
            self._catalog.db.execute("DELETE FROM node WHERE ino = ?", (row[0],))
            self._applied.changes.append(TreeChange(row[1], row[2], row[0], content=False))
            self._newest.pop(row[0], None)
            self._newest[row[1]] = self._now
            directory = directory.rpartition("/")[0]

    def _clash(self, path: str, why: str, partition: str) -> None:
        self._findings.append(Finding(path, "index-clash", f"skipped: {why}", partition))
