"""The journal: which paths of this machine are not in the datastore yet, and what each change started from.

Written before the act (``mark`` → bytes), retired only for exactly the generation that was committed. Deletes are
records here; absence on disk never is one (architecture rule 5, lessons 1, 3, 9).
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from swampfs.names import RelPath
from swampfs.records import DirtyPath, IndexEntry, Intent, Op, decode_posix, encode_posix
from swampfs.state.schema import (
    JOURNAL,
    JOURNAL_VERSION,
    Compacted,
    SchemaError,
    compact,
    open_database,
    set_aside,
    transaction,
)

_COLUMNS = "path, op, generation, partition, base_size, base_sha256, base_modified, base_mtime, base_posix"
_SET_BASE = "partition=?, base_size=?, base_sha256=?, base_modified=?, base_mtime=?, base_posix=?"
_UPSERT = f"""
INSERT INTO dirty ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (path) DO UPDATE SET op = excluded.op, generation = excluded.generation,
    synced = CASE WHEN dirty.op = 'write' AND excluded.op = 'write' THEN dirty.synced ELSE 0 END,
    was_deleted = CASE WHEN dirty.op = 'delete' AND excluded.op = 'write' THEN 1 ELSE dirty.was_deleted END
"""


class Journal:
    """Durable set of :class:`DirtyPath`. All calls are on the loop thread.

    Each mark is one commit, fsynced unless it is of a new file.
    """

    def __init__(self, path: str) -> None:
        self.lost = not os.path.exists(path)
        """Whether earlier records, if there were any, are gone (new or damaged file); see sync/replay.py."""
        try:
            self._db = open_database(path, JOURNAL, JOURNAL_VERSION, "FULL")
        except SchemaError:
            set_aside(path)
            self.lost = True
            self._db = open_database(path, JOURNAL, JOURNAL_VERSION, "FULL")
        self._ops: dict[str, Op] = {}
        self._generations: dict[str, int] = {}
        self._sealed: set[str] = set()  # snapshot taken: the next write opens a new generation
        self._in_flight: set[str] = set()  # being pushed: may be in the datastore a moment from now
        self._generation = 0
        self._synced: set[str] = set()  # paths, also of scratch files, which have no record
        self._load()

    def _load(self) -> None:
        rows = self._db.execute("SELECT path, op, generation FROM dirty").fetchall()
        self._ops = {path: Op(op) for path, op, _ in rows}
        self._generations = {path: generation for path, _, generation in rows}
        self._synced = {path for (path,) in self._db.execute("SELECT path FROM dirty WHERE synced")}
        self._generation = max([self._generation, *self._generations.values()])

    def close(self) -> None:
        self._db.close()

    def __contains__(self, path: object) -> bool:
        return path in self._ops

    def __len__(self) -> int:
        return len(self._ops)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ops)

    def op(self, path: str) -> Op | None:
        return self._ops.get(path)

    def generation(self, path: str) -> int | None:
        """Of its newest record."""
        return self._generations.get(path)

    def is_announced(self, path: str) -> bool:
        """Whether a write to this path needs no further mark."""
        return self._ops.get(path) is Op.WRITE and path not in self._sealed

    def mark_write(self, path: RelPath, base: IndexEntry | None, partition: str | None) -> None:
        """Announce that a path's bytes are about to change. Cheap when already announced since the last seal.

        Of a new file nothing has to be known before its bytes: a power cut may take both.
        """
        if self.is_announced(path):
            return
        with self._at_leisure() if base is None and path not in self._ops else nullcontext():
            self._put(path, Op.WRITE, base, partition)

    def mark_attributes(self, path: RelPath, base: IndexEntry | None, partition: str | None) -> None:
        """Announce that mode, owner or time of a published path change, and its bytes do not."""
        op = self._ops.get(path)
        if op is Op.WRITE:
            self.mark_write(path, base, partition)  # if that is being pushed: once more
        elif (op is None and base is not None) or (op is Op.ATTRIBUTES and path in self._sealed):
            self._put(path, Op.ATTRIBUTES, base, partition)

    def mark_delete(self, path: RelPath, base: IndexEntry | None, partition: str | None) -> None:
        """Announce a removal. A path that surely never was in the datastore is simply forgotten."""
        known = self.get(path)
        if (known.base if known else base) is None and path not in self._in_flight and self._sent(path) is None:
            self.forget(path)
        else:
            self._put(path, Op.DELETE, base, partition)

    def mark_rename(
        self,
        source: RelPath,
        target: RelPath,
        moves: Iterable[tuple[DirtyPath, DirtyPath | None]],
    ) -> Intent:
        """Announce a rename of a file or directory in one commit: every file's delete and write, and the intent.

        ``moves`` pairs the record of each source file with that of its target, ``None`` for a target that is never
        published; their ``generation`` is ignored.
        """
        sealed, synced = set(self._sealed), set(self._synced)
        try:
            with transaction(self._db):
                cursor = self._db.execute("INSERT INTO intent (source, target) VALUES (?, ?)", (source, target))
                for old, new in moves:
                    was_synced = old.path in self._synced
                    self.mark_delete(old.path, old.base, old.partition)
                    if new is not None:
                        self._put(new.path, Op.WRITE, new.base, new.partition)
                        self.note_replaced(new.path)
                    if was_synced and (new is not None or old.path == source):
                        self.note_synced(new.path if new is not None else target)
        except sqlite3.Error:
            self._load()  # the transaction was rolled back; what we remember must be too
            self._sealed, self._synced = sealed, synced
            raise
        return Intent(int(cursor.lastrowid or 0), source, target)

    def intents(self) -> list[Intent]:
        rows = self._db.execute("SELECT id, source, target FROM intent ORDER BY id").fetchall()
        return [Intent(row[0], RelPath(row[1]), RelPath(row[2])) for row in rows]

    def settle(self, intent: Intent) -> None:
        """The rename is done on disk and in the catalog. Needs no fsync: replaying it is a no-op."""
        with self._at_leisure():
            self._db.execute("DELETE FROM intent WHERE id = ?", (intent.id,))

    @contextmanager
    def _at_leisure(self) -> Iterator[None]:
        """What is noted here survives this process, and a power cut once anything after it was made to."""
        self._db.execute("PRAGMA synchronous=NORMAL")
        try:
            yield
        finally:
            self._db.execute("PRAGMA synchronous=FULL")

    def forget(self, path: str) -> None:
        """Drop a record whose change no longer exists (an unpublished file was removed)."""
        if path in self._ops:
            self._db.execute("DELETE FROM dirty WHERE path = ?", (path,))
            del self._ops[path], self._generations[path]
        self._sealed.discard(path)
        self._synced.discard(path)

    def get(self, path: str) -> DirtyPath | None:
        row = self._db.execute(f"SELECT {_COLUMNS} FROM dirty WHERE path = ?", (path,)).fetchone()
        return _dirty_path(row) if row else None

    def is_newest(self, record: DirtyPath) -> bool:
        """Whether nothing happened to a path since a record was taken."""
        return self._generations.get(record.path) == record.generation

    def seal(self, paths: Iterable[str]) -> list[DirtyPath]:
        """Snapshot records for a push: from now on a further write to one of them opens a new generation."""
        sealed = [record for path in paths if (record := self.get(path)) is not None]
        self._sealed.update(record.path for record in sealed)
        self._in_flight.update(record.path for record in sealed)
        return sealed

    def unseal(self, paths: Iterable[str]) -> None:
        """A push is over; the records it did not retire stand."""
        paths = list(paths)
        self._sealed.difference_update(paths)
        self._in_flight.difference_update(paths)

    def note_sent(self, sent: Iterable[tuple[DirtyPath, int, str]]) -> None:
        """About to upload these, each with size and hash: should the outcome be lost, the next push knows its own
        bytes again."""
        rows = [(size, sha256, record.path) for record, size, sha256 in sent]
        with self._at_leisure(), transaction(self._db):
            self._db.executemany("UPDATE dirty SET sent_size = ?, sent_sha256 = ? WHERE path = ?", rows)

    def was_sent(self, path: str, size: int, sha256: str | None) -> bool:
        """Whether an earlier push of this machine uploaded this content for the path.

        ``sha256`` may be unknown; then only the size is compared, and the caller must look at the content.
        """
        sent = self._sent(path)
        return sent is not None and sent[0] == size and sha256 in (None, sent[1])

    def _sent(self, path: str) -> tuple[int, str] | None:
        row = self._db.execute("SELECT sent_size, sent_sha256 FROM dirty WHERE path = ?", (path,)).fetchone()
        return None if row is None or row[1] is None else (row[0], row[1])

    def was_deleted(self, path: str) -> bool:
        """Whether a write in the journal replaced a removal that was acknowledged."""
        row = self._db.execute("SELECT was_deleted FROM dirty WHERE path = ?", (path,)).fetchone()
        return row is not None and bool(row[0])

    def rebase(self, record: DirtyPath, base: IndexEntry, partition: str | None) -> DirtyPath:
        """The remote turned out to hold an earlier version of ours: later versions start from that."""
        self._db.execute(
            f"UPDATE dirty SET {_SET_BASE} WHERE path=?",
            (*_base_columns(base, partition), record.path),
        )
        return record._replace(base=base, partition=partition)

    def retire(self, done: Sequence[tuple[DirtyPath, IndexEntry | None, str | None]]) -> set[str]:
        """Drop the records a commit made true; returns their paths.

        A record that has a newer generation stays, rebased on the entry (and its partition) now in the index.
        """
        retired: set[str] = set()
        with transaction(self._db):
            for record, entry, partition in done:
                gone = self._db.execute(
                    "DELETE FROM dirty WHERE path = ? AND generation = ?", (record.path, record.generation)
                ).rowcount
                if gone:
                    retired.add(record.path)
                    self._ops.pop(record.path, None)
                    self._generations.pop(record.path, None)
                    self._synced.discard(record.path)
                else:
                    self._db.execute(
                        f"UPDATE dirty SET was_deleted=0, sent_size=NULL, sent_sha256=NULL, {_SET_BASE} WHERE path = ?",
                        (*_base_columns(entry, partition), record.path),
                    )
        self._sealed.difference_update(record.path for record, _, _ in done)
        return retired

    def note_synced(self, *paths: str) -> None:
        """The bytes of these are on the disk; durable before return, with everything noted so far."""
        new = [path for path in paths if path not in self._synced]
        if new:
            with transaction(self._db):
                self._db.executemany("UPDATE dirty SET synced = 1 WHERE path = ?", [(path,) for path in new])
            self._synced.update(new)

    def note_replaced(self, path: str) -> None:
        """What a path holds from now on has nothing to do with what was on the disk."""
        if path in self._synced:
            self._db.execute("UPDATE dirty SET synced = 0 WHERE path = ?", (path,))
            self._synced.discard(path)

    def is_synced(self, path: str) -> bool:
        """Whether the bytes of a path survive a power cut, but for those written since."""
        return path in self._synced

    def unsynced(self) -> list[str]:
        """Paths whose bytes are announced, and may not be on the disk."""
        return [path for path, op in self._ops.items() if op is Op.WRITE and path not in self._synced]

    def fact(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def set_fact(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (key, value))

    def compact(self) -> Compacted:
        """See :func:`swampfs.state.schema.compact`."""
        return compact(self._db)

    def sync(self) -> None:
        """Make every record so far survive a power cut; marks already do, forgets and settles may not."""
        self._db.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def _put(self, path: RelPath, op: Op, base: IndexEntry | None, partition: str | None) -> None:
        self._generation += 1
        self._db.execute(_UPSERT, (path, op.value, self._generation, *_base_columns(base, partition)))
        if not (op is Op.WRITE and self._ops.get(path) is Op.WRITE):
            self._synced.discard(path)
        self._ops[path] = op
        self._generations[path] = self._generation
        self._sealed.discard(path)


def _base_columns(
    base: IndexEntry | None, partition: str | None
) -> tuple[str | None, int | None, str | None, str | None, str | None, str | None]:
    if base is None:
        return (None, None, None, None, None, None)
    return (partition, base.size, base.sha256, base.last_modified, base.local_mtime, encode_posix(base.posix))


def _dirty_path(row: sqlite3.Row | tuple[object, ...]) -> DirtyPath:
    path, op, generation, partition, size, sha256, modified, mtime, posix = row
    rel = RelPath(str(path))
    base = None
    if isinstance(size, int):
        known = decode_posix(_text(posix))
        base = IndexEntry(rel, size, str(modified or ""), _text(mtime), _text(sha256), known)
    return DirtyPath(rel, Op(op), int(str(generation)), base, _text(partition))


def _text(value: object) -> str | None:
    return None if value is None else str(value)
