"""The catalog: the tree of inodes, answered without network.

Rows mirror ``schema.CATALOG``. Namespace operations (:mod:`swampfs.fs.tree`) and index deltas
(:mod:`swampfs.state.apply`) both write here; the kernel's ``lookup``, ``getattr`` and ``readdir`` read from here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from swampfs.names import ROOT, RelPath, is_scratch, parent_of
from swampfs.records import (
    Change,
    Finding,
    IndexEntry,
    IndexMode,
    Kind,
    Node,
    Posix,
    Residency,
    Watermark,
    encode_posix,
)
from swampfs.state.rows import BY_NAME, BY_PATH, INSERT, SELECT, Known, found, node_of
from swampfs.state.schema import (
    CATALOG,
    CATALOG_VERSION,
    SchemaError,
    open_database,
    set_aside,
    transaction,
)

ROOT_INO = 1
NO_POSIX = Posix()
FILE_MODE = 0o644
LINK_MODE = 0o777
DIRECTORY_MODE = 0o755
CHANGED = "directory"  # kind of a fact: mode or owner of a directory was changed here, and others do not know yet

_INODE = "(ino = ? OR shared = ?)"
_SET_BASE = "partition=?, base_size=?, base_sha256=?, base_modified=?, base_mtime=?, base_posix=?"
_LOCAL = f"kind = {Kind.FILE:d} AND residency <> {Residency.STUB:d}"
_CLEAN_CONTENT = f"""
SELECT path, size FROM node WHERE ino = ? AND kind = {Kind.FILE:d} AND residency = {Residency.CLEAN:d} AND links = 1
"""
_UNUSUAL = f"kind = {Kind.DIRECTORY:d} AND (mode <> {DIRECTORY_MODE} OR uid >= 0 OR gid >= 0)"
_PUBLISHED = f"kind IN ({Kind.FILE:d}, {Kind.SYMLINK:d})"


class Catalog:
    """SQLite store of :class:`Node`. A damaged or foreign file is set aside and rebuilt by the next poll."""

    def __init__(self, path: str) -> None:
        self.rebuilt = False
        self.epoch = 0  # counts changes to what is known of the remote; an await in between may have made one
        try:
            self.db = open_database(path, CATALOG, CATALOG_VERSION, "NORMAL")
        except SchemaError:
            set_aside(path)
            self.rebuilt = True
            self.db = open_database(path, CATALOG, CATALOG_VERSION, "NORMAL")
        self._known = Known(self.db)
        self.db.create_function("is_scratch", 1, is_scratch, deterministic=True)
        self.db.execute("CREATE INDEX IF NOT EXISTS node_explicit ON node (path) WHERE explicit = 1")
        self.db.execute("CREATE INDEX IF NOT EXISTS node_place ON node (parent, coalesce(place, ino))")
        self.db.execute(f"CREATE INDEX IF NOT EXISTS node_local ON node (residency, size) WHERE {_LOCAL}")
        self.db.execute(f"CREATE INDEX IF NOT EXISTS node_unusual ON node (path) WHERE {_UNUSUAL}")
        if self.db.execute("SELECT 1 FROM node WHERE ino = ?", (ROOT_INO,)).fetchone() is None:
            now = time.time_ns()
            self.db.execute(
                "INSERT INTO node (ino, parent, name, path, kind, mtime_ns, ctime_ns, mode, residency, explicit)"
                " VALUES (?, ?, '', '', ?, ?, ?, ?, ?, 1)",
                (ROOT_INO, ROOT_INO, Kind.DIRECTORY, now, now, DIRECTORY_MODE, Residency.CLEAN),
            )

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        try:
            with transaction(self.db):
                yield
        except BaseException:
            self._known.forget()
            raise

    # --- reading ------------------------------------------------------------------------------------------

    def node(self, ino: int) -> Node | None:
        return self._known.node(ino)

    def clean_content(self, ino: int) -> tuple[RelPath, int] | None:
        """Path and size of a published file of one name whose content is here; what a warm open needs to know."""
        clean: tuple[RelPath, int] | None = self._known.clean(_CLEAN_CONTENT, ino)
        return clean

    def child(self, parent: int, name: str) -> Node | None:
        return self._known.named(BY_NAME, parent, name)

    def at(self, path: str) -> Node | None:
        return self._known.named(BY_PATH, path)

    def children(self, parent: int, after: int = 0, limit: int = -1) -> list[Node]:
        """Entries of a directory in the order of their places, so that a position survives concurrent change."""
        return self._nodes(
            f"parent = ? AND coalesce(place, ino) > ? AND ino != {ROOT_INO} ORDER BY coalesce(place, ino) LIMIT ?",
            (parent, after, limit),
        )

    def children_by_name(self, parent: int, after: str, limit: int) -> list[Node]:
        return self._nodes("parent = ? AND name > ? ORDER BY name LIMIT ?", (parent, after, limit))

    def _nodes(self, where: str, parameters: tuple[Any, ...]) -> list[Node]:
        return [node_of(row) for row in self.db.execute(f"{SELECT} WHERE {where}", parameters).fetchall()]

    def has_children(self, parent: int) -> bool:
        row = self.db.execute(
            f"SELECT 1 FROM node WHERE parent = ? AND ino != {ROOT_INO} LIMIT 1", (parent,)
        ).fetchone()
        return row is not None

    def files_below(self, path: str) -> Iterator[Node]:
        """Every file and symbolic link at or below a path."""
        low, high = (f"{path}/", f"{path}0") if path else ("", "\U0010ffff")
        where = f"(path = ? OR (path >= ? AND path < ?)) AND {_PUBLISHED} ORDER BY path"
        return iter(self._nodes(where, (path, low, high)))

    def implied(self, path: str) -> Node | None:
        """The empty directory at a path that was only there for what was in it."""
        row = self.db.execute(
            f"{SELECT} AS directory WHERE path = ? AND explicit = 0 AND kind = {Kind.DIRECTORY:d}"
            " AND NOT EXISTS (SELECT 1 FROM node WHERE parent = directory.ino)",
            (path,),
        ).fetchone()
        return found(row)

    def empty_directories(self, scope: str) -> list[RelPath]:
        """Directories at or below ``scope`` that were made by ``mkdir`` and have nothing in them that others see."""
        low, high = (f"{scope}/", f"{scope}0") if scope else ("", "\U0010ffff")
        rows = self.db.execute(
            "SELECT path FROM node AS directory"
            " WHERE explicit = 1 AND (path = ? OR (path > ? AND path < ?)) AND path != '' AND kind = ?"
            f" AND NOT EXISTS (SELECT 1 FROM node WHERE parent = directory.ino AND (kind = ? OR {_PUBLISHED}"
            " AND NOT is_scratch(name))) ORDER BY path",
            (scope, low, high, Kind.DIRECTORY, Kind.DIRECTORY),
        ).fetchall()
        return [RelPath(row[0]) for row in rows]

    def unusual_directories(self, scope: str) -> list[Node]:
        """Directories below ``scope`` whose mode or owner is not what a directory has by itself."""
        low, high = (f"{scope}/", f"{scope}0") if scope else ("", "\U0010ffff")
        return self._nodes(f"{_UNUSUAL} AND path > ? AND path < ? ORDER BY path", (low, high))

    def dirty_files(self) -> list[RelPath]:
        rows = self.db.execute("SELECT path FROM node WHERE residency = ?", (Residency.DIRTY,))
        return [RelPath(path) for (path,) in rows]

    def local_bytes(self) -> int:
        """Sizes of all files whose content is here, together."""
        return int(self.db.execute(f"SELECT coalesce(sum(size), 0) FROM node WHERE {_LOCAL}").fetchone()[0])

    def clean_files(self, after: int = 0, limit: int = -1) -> list[Node]:
        """Files whose content is here and in the datastore, by inode."""
        where = f"{_LOCAL} AND residency = ? AND partition IS NOT NULL AND links = 1 AND ino > ? ORDER BY ino LIMIT ?"
        return self._nodes(where, (Residency.CLEAN, after, limit))

    def totals(self) -> dict[str, int]:
        """Counts and bytes for ``statfs`` and ``status``."""
        row = self.db.execute(
            "SELECT count(*), coalesce(sum(size), 0), coalesce(sum(residency = ?), 0), coalesce(sum(residency = ?), 0)"
            f" FROM node WHERE {_PUBLISHED}",
            (Residency.CLEAN, Residency.DIRTY),
        ).fetchone()
        return {"files": row[0], "bytes": row[1], "clean": row[2], "dirty": row[3]}

    # --- the tree -----------------------------------------------------------------------------------------

    def add(
        self,
        path: RelPath,
        kind: Kind,
        *,
        mode: int,
        owner: tuple[int, int] = (-1, -1),
        mtime_ns: int | None = None,
        residency: Residency = Residency.DIRTY,
        target: str | None = None,
        rdev: int = 0,
    ) -> Node:
        """Insert a local entry; its parent must exist. Directories added here stay when they become empty."""
        now = time.time_ns()
        parent = self.at(parent_of(path))
        assert parent is not None
        node = self._known.insert(
            (parent.ino, path.rpartition("/")[2], path, kind, len((target or "").encode()), mtime_ns or now, now, mode,
             *owner, residency, int(kind is Kind.DIRECTORY), target, rdev, None, *_base(None)),
        )  # fmt: skip
        self.touch(parent.ino, now)
        return node

    def make_parents(self, path: RelPath) -> int:
        """Inode of the directory that holds ``path``, creating missing ones. Raises NotADirectoryError."""
        parent = parent_of(path)
        if parent == ROOT:
            return ROOT_INO
        found = self.db.execute("SELECT ino, kind FROM node WHERE path = ?", (parent,)).fetchone()
        if found is not None:
            if found[1] != Kind.DIRECTORY:
                raise NotADirectoryError(parent)
            return int(found[0])
        above = self.make_parents(parent)
        now = time.time_ns()
        cursor = self.db.execute(
            INSERT,
            (above, parent.rpartition("/")[2], parent, Kind.DIRECTORY, 0, now, now, DIRECTORY_MODE, -1, -1,
             Residency.CLEAN, 0, None, 0, None, *_base(None)),
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def missing_directories(self, path: RelPath) -> list[RelPath]:
        """Ancestors of a path, innermost first, that :meth:`make_parents` would create."""
        missing = []
        directory = parent_of(path)
        while directory and self.at(directory) is None:
            missing.append(directory)
            directory = parent_of(directory)
        return missing

    def add_remote(self, parent: int, entry: IndexEntry, partition: str, now: int) -> int:
        """Insert a file as its index entry describes it; returns its inode."""
        mode, uid, gid, _, link = entry.posix or NO_POSIX
        usual = FILE_MODE if link is None else LINK_MODE
        cursor = self.db.execute(
            INSERT,
            (parent, entry.path.rpartition("/")[2], entry.path, entry.kind, entry.size, _time(entry), now,
             usual if mode is None else mode, -1 if uid is None else uid, -1 if gid is None else gid, Residency.STUB, 0,
             link, 0, partition, *_base(entry)),
        )  # fmt: skip
        return int(cursor.lastrowid or 0)

    def remove(self, node: Node, *, by_user: bool = False) -> None:
        """``by_user``: of this machine; then its directory stays, as on any disk, when that was the last in it."""
        self.drop(node)
        self.touch(node.parent, time.time_ns(), keep=by_user)

    def drop(self, node: Node) -> None:
        """Remove a name; the inode stays under its others."""
        with self.transaction():
            self.db.execute("DELETE FROM node WHERE ino = ?", (node.row,))
            if not node.is_dir and node.links > 1:
                self._keep_inode(node)

    def _keep_inode(self, node: Node) -> None:
        if node.row == node.ino:
            heir = self.db.execute("SELECT min(ino) FROM node WHERE shared = ?", (node.ino,)).fetchone()[0]
            self.db.execute(
                "UPDATE node SET ino = ?, place = coalesce(place, ino), shared = NULL WHERE ino = ?", (node.ino, heir)
            )
        self.db.execute(
            f"UPDATE node SET links = links - 1, ctime_ns = ? WHERE {_INODE}", (time.time_ns(), node.ino, node.ino)
        )

    def add_link(self, node: Node, path: RelPath, residency: Residency) -> None:
        """One more name of an inode; its parent must exist. It is published, or not, for itself."""
        parent = self.at(parent_of(path))
        assert parent is not None
        now, ino = time.time_ns(), node.ino
        with self.transaction():
            self.db.execute(
                "INSERT INTO node (parent, name, path, kind, size, mtime_ns, ctime_ns, mode, uid, gid, residency,"
                " target, rdev, atime_ns, links, blocks, shared) SELECT ?, ?, ?, kind, size, mtime_ns, ctime_ns, mode,"
                " uid, gid, ?, target, rdev, atime_ns, links, blocks, ? FROM node WHERE ino = ?",
                (parent.ino, path.rpartition("/")[2], path, residency, ino, ino),
            )
            self.db.execute(f"UPDATE node SET links = links + 1, ctime_ns = ? WHERE {_INODE}", (now, ino, ino))
            self.touch(parent.ino, now)

    def names(self, ino: int) -> list[RelPath]:
        """Every path of an inode."""
        rows = self.db.execute(f"SELECT path FROM node WHERE {_INODE} ORDER BY path", (ino, ino)).fetchall()
        return [RelPath(row[0]) for row in rows]

    def move(self, node: Node, target: RelPath) -> None:
        """Rename an entry and everything below it; the inode stays. The target name must be free."""
        parent = self.at(parent_of(target))
        assert parent is not None
        now = time.time_ns()
        self.db.execute(
            "UPDATE node SET parent = ?, name = ?, path = ?, ctime_ns = ?, explicit = 1 WHERE ino = ?",
            (parent.ino, target.rpartition("/")[2], target, now, node.row),
        )
        self.db.execute(
            "UPDATE node SET path = ? || substr(path, ?) WHERE path >= ? AND path < ?",
            (target, len(node.path) + 1, f"{node.path}/", f"{node.path}0"),
        )
        self.touch(node.parent, now, keep=True)
        self.touch(parent.ino, now)

    def unpublish(self, path: RelPath) -> None:
        """The files at or below a path are new local content: no base, dirty."""
        self.db.execute(
            f"UPDATE node SET residency=?, {_SET_BASE} WHERE (path = ? OR (path >= ? AND path < ?)) AND {_PUBLISHED}",
            (Residency.DIRTY, None, *_base(None), path, f"{path}/", f"{path}0"),
        )

    def adopt_base(self, path: RelPath, base: IndexEntry | None, partition: str | None) -> None:
        """Local content that will replace a published entry keeps what it is based on."""
        self.db.execute(
            f"UPDATE node SET {_SET_BASE} WHERE path=?",
            (partition if base else None, *_base(base), path),
        )

    def touch(self, ino: int, mtime_ns: int, *, keep: bool = False) -> None:
        self._known.update(ino, mtime_ns=mtime_ns, ctime_ns=mtime_ns)
        if keep:
            self.db.execute("UPDATE node SET explicit = 1 WHERE ino = ?", (ino,))

    def set_content(self, ino: int, found: os.stat_result) -> None:
        """What was written here, as it is on this machine."""
        self._set(ino, **_written(found), ctime_ns=time.time_ns(), residency=Residency.DIRTY)

    def evicted(self, ino: int) -> None:
        """Its content is in the datastore only."""
        self._known.update(ino, residency=Residency.STUB, blocks=None)

    def set_residency(self, ino: int, residency: Residency) -> None:
        self._set(ino, residency=residency)

    def set_attributes(self, ino: int, change: Change, found: os.stat_result | None = None) -> None:
        """``found``: also what was written so far, as it is on this machine."""
        values = change._replace(size=None)._asdict()
        if found is not None:
            values |= _written(found)
        values["ctime_ns"] = time.time_ns()
        self._set(ino, **{column: value for column, value in values.items() if value is not None})

    def _set(self, ino: int, **values: int) -> None:
        """Of an inode, under all its names."""
        node = self.node(ino)
        if node is None:
            return
        if node.is_dir or node.links == 1:
            self._known.update(ino, **values)
            return
        with self.transaction():
            for (row,) in self.db.execute(f"SELECT ino FROM node WHERE {_INODE}", (ino, ino)).fetchall():
                self._known.update(row, **values)

    def adopt_posix(self, node: Node, entry: IndexEntry) -> bool:
        """Another machine changed attributes of unchanged content; returns whether something is different now."""
        if entry.posix is None or (
            encode_posix(entry.posix) == node.base_posix and entry.local_mtime == node.base_mtime
        ):
            return False
        mode, uid, gid, _, link = entry.posix
        usual = FILE_MODE if link is None else LINK_MODE
        self.set_attributes(
            node.ino,
            Change(
                mode=usual if mode is None else mode,
                uid=-1 if uid is None else uid,
                gid=-1 if gid is None else gid,
                mtime_ns=entry.mtime_ns,
            ),
        )
        return True

    def settle(self, entry: IndexEntry, partition: str, *, clean: bool, ours: bool = False) -> None:
        """A push made this entry the remote truth of its path; ``clean`` if nothing was written since.

        ``ours``: it describes what we sent, also of a file whose writer has not closed it yet.
        """
        self.db.execute(f"UPDATE node SET {_SET_BASE} WHERE path=?", (partition, *_base(entry), entry.path))
        if clean:
            self.db.execute(
                "UPDATE node SET residency = ?, size = ?, mtime_ns = coalesce(?, mtime_ns)"
                " WHERE path = ? AND residency = ?",
                (Residency.CLEAN, entry.size, entry.mtime_ns if ours else None, entry.path, Residency.DIRTY),
            )

    def reset_to_remote(self, node: Node, entry: IndexEntry | None, partition: str) -> None:
        """Give up local content of a path: it becomes the remote's file again, or disappears."""
        if entry is None:
            self.remove(node)
            return
        if node.links > 1:
            self.drop(node)
            self.add_remote(node.parent, entry, partition, time.time_ns())
            return
        self.settle(entry, partition, clean=False)
        self.db.execute(
            "UPDATE node SET size = ?, mtime_ns = ?, ctime_ns = ?, blocks = NULL, residency = ? WHERE ino = ?",
            (entry.size, _time(entry), time.time_ns(), Residency.STUB, node.ino),
        )

    # --- what is known of the remote ----------------------------------------------------------------------

    def watermark(self) -> Watermark:
        facts = dict(self.db.execute("SELECT key, value FROM fact"))
        return Watermark(
            IndexMode(facts.get("mode", "unknown")),
            int(facts.get("commit_seq", "0")),
            facts.get("meta_etag", ""),
            facts.get("monolith_etag", ""),
        )

    def set_watermark(self, mark: Watermark) -> None:
        values = {"mode": mark.mode.value, "commit_seq": str(mark.commit_seq)}
        values |= {"meta_etag": mark.meta_etag, "monolith_etag": mark.monolith_etag}
        self.db.executemany("INSERT OR REPLACE INTO fact VALUES (?, ?)", values.items())

    def fact(self, key: str) -> str | None:
        row = self.db.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_fact(self, key: str, value: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (key, value))

    def drop_fact(self, key: str) -> None:
        self.db.execute("DELETE FROM fact WHERE key = ?", (key,))

    def note_lock(self, key: str, nonce: str | None) -> None:
        """Remember a lock about to be taken (``None``: released), so that a successor process can give it back."""
        if nonce is None:
            self.db.execute("DELETE FROM fact WHERE key = ?", (f"lock:{key}",))
        else:
            self.set_fact(f"lock:{key}", nonce)

    def noted_locks(self) -> dict[str, str]:
        """Key → nonce of locks that a dead process may have left behind."""
        return self.facts("lock")

    def facts(self, kind: str) -> dict[str, str]:
        """Those with a key ``{kind}:…``, without that prefix."""
        rows = self.db.execute("SELECT key, value FROM fact WHERE key >= ? AND key < ?", (f"{kind}:", f"{kind};"))
        return {key.removeprefix(f"{kind}:"): value for key, value in rows}

    def partitions(self) -> dict[str, str]:
        """Partition name → ETag last applied."""
        return dict(self.db.execute("SELECT name, etag FROM partition"))

    def read_again(self, partition: str) -> None:
        """Have the next poll read a partition whatever its ETag."""
        self.db.execute("UPDATE partition SET etag = '' WHERE name = ?", (partition,))

    def unhide(self, path: str) -> None:
        """A name went away: whatever the index has under it and could not be shown beside it is looked at again."""
        self.db.execute(
            "UPDATE partition SET etag = '' WHERE name IN (SELECT partition FROM finding"
            " WHERE kind = 'index-clash' AND (path = ? OR (path >= ? AND path < ?)))",
            (path, f"{path}/", f"{path}0"),
        )

    def sync(self) -> None:
        """Make what was written so far survive a power cut, before the journal forgets it."""
        self.db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def look_again(self) -> bool:
        """Whether some partition must be read whatever its ETag: it holds news for a path that was busy."""
        return self.db.execute("SELECT 1 FROM partition WHERE etag = ''").fetchone() is not None

    def park(self, paths: Iterable[RelPath]) -> None:
        self.db.executemany("INSERT OR REPLACE INTO parked VALUES (?, 0)", [(path,) for path in paths])

    def unpark(self, paths: Iterable[str]) -> None:
        self.db.executemany("DELETE FROM parked WHERE path = ?", [(path,) for path in paths])

    def parked(self, *, lost_only: bool = False) -> list[RelPath]:
        where = " WHERE lost = 1" if lost_only else ""
        return [RelPath(row[0]) for row in self.db.execute(f"SELECT path FROM parked{where}")]

    def mark_parked_lost(self, paths: Iterable[str]) -> None:
        self.db.executemany("UPDATE parked SET lost = 1 WHERE path = ?", [(path,) for path in paths])

    def findings(self) -> list[Finding]:
        return [Finding(*row) for row in self.db.execute("SELECT * FROM finding ORDER BY path")]

    def report(self, findings: Iterable[Finding]) -> None:
        self.db.executemany("INSERT OR REPLACE INTO finding VALUES (?, ?, ?, ?)", findings)


def _time(entry: IndexEntry) -> int:
    return time.time_ns() if entry.mtime_ns is None else entry.mtime_ns


def _written(found: os.stat_result) -> dict[str, int]:
    return {"size": found.st_size, "blocks": found.st_blocks, "mtime_ns": found.st_mtime_ns}


def _base(entry: IndexEntry | None) -> tuple[int | None, str | None, str | None, str | None, str | None]:
    if entry is None:
        return (None, None, None, None, None)
    return (entry.size, entry.sha256, entry.last_modified, entry.local_mtime, encode_posix(entry.posix))
