"""The base manifest of a library cache: what the index says, and what was last in step (spec §6.3 BETTER).

It tells "changed here", "changed there", "deleted here" and "deleted there" apart, which neither the cache's files
nor its sidecar can. It lives in the cache's own ``_index/``, which no client ever uploads, one database per namespace.
Losing it loses no content: the next sync compares by hash.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from swampfs.names import RelPath, is_internal, is_lazy, is_servable
from swampfs.records import IndexDelta, IndexEntry, IndexMode, Watermark
from swampfs.state.schema import MANIFEST, MANIFEST_VERSION, SchemaError, open_database, set_aside, transaction

_RACY_NS = 50_000_000  # a file changed so shortly before we looked may change again within one clock tick
_PENDING = """partition IS NOT NULL AND dangling = 0 AND (
    base_size IS NOT size OR CASE WHEN base_sha256 IS NOT NULL AND sha256 IS NOT NULL THEN base_sha256 <> sha256
                                  ELSE base_modified IS NOT modified END)"""
_ROW = (
    "path, partition, size, sha256, modified, mtime, dangling, parked, base_size, base_sha256, base_modified, stat,"
    " stat_at"
)


class Row(NamedTuple):
    """One path. ``entry`` is the index's word, ``base`` the content last in step; either may be missing."""

    path: RelPath
    entry: IndexEntry | None
    base: IndexEntry | None
    stat: str
    stat_at: int
    dangling: bool
    parked: int

    def is_untouched(self, found: os.stat_result) -> bool:
        """Whether the local file surely still is the base content, by its identity alone."""
        return (
            self.base is not None
            and self.stat == identity(found)
            and self.stat_at - max(found.st_ctime_ns, found.st_mtime_ns) > _RACY_NS
        )


def identity(found: os.stat_result) -> str:
    """Equal only if nobody wrote to the file in between: the inode's change time cannot be set."""
    return f"{found.st_ino:x}-{found.st_size:x}-{found.st_mtime_ns:x}-{found.st_ctime_ns:x}"


class Manifest:
    """SQLite store of :class:`Row`. Used by one thread at a time; several processes may have it open."""

    def __init__(self, path: str, datastore: str) -> None:
        """``datastore`` identifies what the manifest is of: another one's says nothing about this one's files."""
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            self.db = open_database(path, MANIFEST, MANIFEST_VERSION, "NORMAL")
        except SchemaError:
            set_aside(path)
            self.db = open_database(path, MANIFEST, MANIFEST_VERSION, "NORMAL")
        if self.fact("datastore") not in (None, datastore):
            self.db.close()
            set_aside(path)
            self.db = open_database(path, MANIFEST, MANIFEST_VERSION, "NORMAL")
        self.set_fact("datastore", datastore)
        self._lock = threading.RLock()

    def close(self) -> None:
        self.db.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """One thread at a time: calls of one service may overlap, and share this connection."""
        with self._lock, transaction(self.db):
            yield

    # --- rows ---------------------------------------------------------------------------------------------

    def row(self, path: str) -> Row | None:
        found = self.db.execute(f"SELECT {_ROW} FROM file WHERE path = ?", (path,)).fetchone()
        return None if found is None else _row(found)

    def rows(self, below: str = "") -> Iterator[Row]:
        """Every row at or below a path, in order of path."""
        low, high = (f"{below}/", f"{below}0") if below else ("", "\U0010ffff")
        sql = f"SELECT {_ROW} FROM file WHERE path = ? OR (path >= ? AND path < ?) ORDER BY path"
        return map(_row, self.db.execute(sql, (below, low, high)))

    def pending(self, *, eager_only: bool = False) -> bool:
        """Whether some entry of the index is not in step here, or one that was is gone there.

        ``eager_only`` leaves out lazy content.
        """
        lazy = "lazy = 0 AND " if eager_only else ""
        if self.db.execute("SELECT 1 FROM file WHERE partition IS NULL AND base_size IS NOT NULL LIMIT 1").fetchone():
            return True
        return self.db.execute(f"SELECT 1 FROM file WHERE {lazy}{_PENDING} LIMIT 1").fetchone() is not None

    def is_empty(self) -> bool:
        """Whether the index, as last read, named nothing."""
        return self.db.execute("SELECT 1 FROM file WHERE partition IS NOT NULL LIMIT 1").fetchone() is None

    def dangling(self) -> list[RelPath]:
        sql = "SELECT path FROM file WHERE partition IS NOT NULL AND dangling = 1"
        return [RelPath(row[0]) for row in self.db.execute(sql)]

    def partition_of(self, path: str) -> str | None:
        sql = "SELECT name FROM file JOIN partition ON partition.id = file.partition WHERE path = ?"
        found = self.db.execute(sql, (path,)).fetchone()
        return None if found is None else str(found[0])

    def set_bases(self, bases: Iterable[tuple[RelPath, IndexEntry, os.stat_result | None]]) -> None:
        """Local content of these paths is in step with this entry; the stat is of the local file."""
        now = time.time_ns()
        with self._transaction():
            self.db.executemany(
                "INSERT INTO file (path, base_size, base_sha256, base_modified, stat, stat_at) VALUES (?,?,?,?,?,?)"
                " ON CONFLICT (path) DO UPDATE SET base_size = excluded.base_size, base_sha256 = excluded.base_sha256,"
                " base_modified = excluded.base_modified, stat = excluded.stat, stat_at = excluded.stat_at",
                [
                    (path, e.size, e.sha256, e.last_modified, identity(found) if found else "", now)
                    for path, e, found in bases
                ],
            )

    def forget_bases(self, paths: Iterable[str]) -> None:
        """These paths have no local content any more."""
        names = [(path,) for path in paths]
        with self._transaction():
            self.db.executemany(
                "UPDATE file SET base_size=NULL, base_sha256=NULL, base_modified=NULL, stat=NULL WHERE path=?", names
            )
            self.db.executemany("DELETE FROM file WHERE path = ? AND partition IS NULL", names)

    def mark_dangling(self, paths: Iterable[str]) -> None:
        with self._transaction():
            self.db.executemany("UPDATE file SET dangling = 1 WHERE path = ?", [(path,) for path in paths])

    # --- uploads under way --------------------------------------------------------------------------------

    def note_uploads(self, uploads: Iterable[tuple[RelPath, IndexEntry | None]]) -> None:
        """About to be sent, to replace these entries: should no answer come, their objects are known as ours."""
        rows = [(path, entry.last_modified if entry else "") for path, entry in uploads]
        with self._transaction():
            self.db.executemany("INSERT OR REPLACE INTO upload VALUES (?, ?, NULL)", rows)

    def note_sent(self, sent: Iterable[IndexEntry]) -> None:
        """These bytes are in their objects now; whether a commit names them is not known yet."""
        with self._transaction():
            rows = [(entry.sha256, entry.path) for entry in sent]
            self.db.executemany("UPDATE upload SET sha256 = ? WHERE path = ?", rows)

    def was_sent(self, path: str) -> bool:
        """Whether this cache sent the path's object and saw no commit name it."""
        return self.db.execute("SELECT 1 FROM upload WHERE path = ?", (path,)).fetchone() is not None

    def was_overtaken(self, local: IndexEntry, entry: IndexEntry | None) -> bool:
        """Whether this content was sent before, and another machine has committed its own since.

        Ours may have been committed in between, the answer lost: publishing it now would revert theirs.
        """
        row = self.db.execute("SELECT over, sha256 FROM upload WHERE path = ?", (local.path,)).fetchone()
        if row is None or entry is None or row[1] != local.sha256 or entry.sha256 == local.sha256:
            return False
        return bool(row[0] != entry.last_modified)

    def forget_uploads(self, paths: Iterable[str]) -> None:
        with self._transaction():
            self.db.executemany("DELETE FROM upload WHERE path = ?", [(path,) for path in paths])

    def uploads(self) -> list[RelPath]:
        return [RelPath(row[0]) for row in self.db.execute("SELECT path FROM upload ORDER BY path")]

    # --- parked entries (H6) ------------------------------------------------------------------------------

    def park(self, paths: Iterable[str]) -> None:
        self.db.executemany("UPDATE file SET parked = 1 WHERE path = ?", [(path,) for path in paths])

    def lost_parked(self) -> list[Row]:
        return [_row(found) for found in self.db.execute(f"SELECT {_ROW} FROM file WHERE parked = 2")]

    def drop_entries(self, paths: Iterable[str]) -> None:
        """These are not in the index any more, whatever its documents said when last read."""
        names = [(path,) for path in paths]
        with self._transaction():
            self.db.executemany("UPDATE file SET partition = NULL, parked = 0, dangling = 0 WHERE path = ?", names)
            self.db.executemany("DELETE FROM file WHERE path = ? AND base_size IS NULL", names)

    # --- the index ----------------------------------------------------------------------------------------

    def watermark(self) -> Watermark:
        facts = dict(self.db.execute("SELECT key, value FROM fact"))
        return Watermark(
            IndexMode(facts.get("mode", "unknown")),
            int(facts.get("commit_seq", "0")),
            facts.get("meta_etag", ""),
            facts.get("monolith_etag", ""),
        )

    def partitions(self) -> dict[str, str]:
        return dict(self.db.execute("SELECT name, etag FROM partition"))

    def apply(self, delta: IndexDelta, known: Watermark, covers: Callable[[str], bool] | None = None) -> bool:
        """Make the mirror equal to what was read. ``covers`` says which partitions an incomplete reading looked at.

        Only a complete reading moves the watermark. Returns ``False``, with nothing changed, if the mirror is no longer
        the one that the reading began with (``known``): it may be newer than what was read.
        """
        with self._transaction():
            if self.watermark() != known:
                return False
            numbers = dict(self.db.execute("SELECT name, id FROM partition"))
            staying = {entry.path for partition in delta.changed.values() for entry in partition.entries}
            for name in numbers.keys() - delta.kept - delta.changed.keys():
                if delta.complete or (covers is not None and covers(name)):
                    self._drop_partition(numbers[name], staying)
            internal = self.fact("scrub") == "1" and not delta.changed
            for name, partition in delta.changed.items():
                self.db.execute(
                    "INSERT INTO partition (name, etag) VALUES (?, ?)"
                    " ON CONFLICT (name) DO UPDATE SET etag = excluded.etag",
                    (name, partition.etag),
                )
                number = self.db.execute("SELECT id FROM partition WHERE name = ?", (name,)).fetchone()[0]
                if name in numbers:
                    self._remove_gone(number, staying)
                entries = [entry for entry in partition.entries if is_servable(entry.path)]
                internal |= any(is_internal(entry.path) for entry in partition.entries)
                self._upsert(number, entries)
            if delta.complete:
                self._set_watermark(delta.watermark)
                self.set_fact("scrub", "1" if internal else "0")
        return True

    def _upsert(self, number: int, entries: Iterable[IndexEntry]) -> None:
        self.db.executemany(
            "INSERT INTO file (path, partition, size, sha256, modified, mtime, lazy) VALUES (?,?,?,?,?,?,?)"
            " ON CONFLICT (path) DO UPDATE SET partition = excluded.partition, size = excluded.size,"
            " sha256 = excluded.sha256, modified = excluded.modified, mtime = excluded.mtime,"
            " dangling = file.dangling AND file.modified IS excluded.modified AND file.size IS excluded.size,"
            " parked = min(file.parked, 1)",
            [(e.path, number, e.size, e.sha256, e.last_modified, e.local_mtime, is_lazy(e.path)) for e in entries],
        )

    def _drop_partition(self, number: int, staying: set[RelPath]) -> None:
        self._remove_gone(number, staying)
        if self.db.execute("SELECT 1 FROM file WHERE partition = ? LIMIT 1", (number,)).fetchone() is None:
            self.db.execute("DELETE FROM partition WHERE id = ?", (number,))
        else:
            self.db.execute("UPDATE partition SET etag = '' WHERE id = ?", (number,))

    def _remove_gone(self, number: int, staying: set[RelPath]) -> None:
        paths = [row[0] for row in self.db.execute("SELECT path FROM file WHERE partition = ?", (number,))]
        gone = [(path,) for path in paths if path not in staying]
        self.db.executemany("UPDATE file SET parked = 2 WHERE path = ? AND parked > 0", gone)
        self.db.executemany("UPDATE file SET partition = NULL, dangling = 0 WHERE path = ? AND parked = 0", gone)
        self.db.executemany("DELETE FROM file WHERE path = ? AND partition IS NULL AND base_size IS NULL", gone)

    def _set_watermark(self, mark: Watermark) -> None:
        for key, value in (
            ("mode", mark.mode.value),
            ("commit_seq", str(mark.commit_seq)),
            ("meta_etag", mark.meta_etag),
            ("monolith_etag", mark.monolith_etag),
        ):
            self.set_fact(key, value)

    def fact(self, key: str) -> str | None:
        found = self.db.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if found is None else str(found[0])

    def set_fact(self, key: str, value: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (key, value))


def _row(found: tuple[Any, ...]) -> Row:
    path = RelPath(found[0])
    entry = base = None
    if found[1] is not None:
        entry = IndexEntry(path, found[2], found[4] or "", found[5], found[3])
    if found[8] is not None:
        base = IndexEntry(path, found[8], found[10] or "", None, found[9])
    return Row(path, entry, base, found[11] or "", found[12] or 0, bool(found[6]), found[7])
