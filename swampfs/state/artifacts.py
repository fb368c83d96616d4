"""What is known of every artifact: a row for each version that has a ``metadata.yaml``, to be searched in milliseconds.

A cache of what the datastore holds, made of the files it was read from; a damaged or foreign database is set aside
and made anew. It is our own: the swamp CLI's ``_catalog.db`` has a schema that two programs cannot share (data-model
spec §5.2), and its fields are columns here.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from swampfs.errors import StateError
from swampfs.state.schema import SchemaError, open_database, set_aside, transaction

VERSION = 1
HIDDEN, HISTORY, LATEST = -1, 0, 1  # what ``is_latest`` may be
_SCHEMA = """
CREATE TABLE document (                               -- a metadata.yaml that was read
    id              INTEGER PRIMARY KEY,
    namespace       TEXT    NOT NULL,
    path            TEXT    NOT NULL,                 -- of the version's directory, in its namespace
    place           TEXT    NOT NULL,                 -- of the directory of its name: all its versions are there
    fingerprint     TEXT    NOT NULL,                 -- of what was read; '' is to be read again
    problem         TEXT,                             -- why it could not be understood
    lifecycle       TEXT    NOT NULL,
    renamed_to      TEXT    NOT NULL,
    version         INTEGER NOT NULL DEFAULT 0,
    step_name       TEXT    NOT NULL DEFAULT '',
    is_latest       INTEGER,                          -- of the artifact; NULL: there is none
    UNIQUE (namespace, path)
) STRICT;
CREATE INDEX document_place ON document (namespace, place);
CREATE TABLE artifact (                               -- what it says; the latest are side by side on the disk
    is_latest       INTEGER NOT NULL,                 -- 1, 0, or -1: a tombstone, or of a name that was removed
    id              INTEGER NOT NULL,
    namespace       TEXT    NOT NULL,
    model_name      TEXT    NOT NULL,
    data_name       TEXT    NOT NULL,
    version         INTEGER NOT NULL,
    size            INTEGER NOT NULL,
    streaming       INTEGER NOT NULL,
    spec_name       TEXT    NOT NULL,
    data_type       TEXT    NOT NULL,
    created_at      TEXT    NOT NULL,
    workflow_run_id TEXT    NOT NULL,
    workflow_name   TEXT    NOT NULL,
    job_name        TEXT    NOT NULL,
    step_name       TEXT    NOT NULL,
    source          TEXT    NOT NULL,
    content_type    TEXT    NOT NULL,
    lifetime        TEXT    NOT NULL,
    owner_type      TEXT    NOT NULL,
    owner_ref       TEXT    NOT NULL,
    type_normalized TEXT    NOT NULL,
    model_id        TEXT    NOT NULL,
    uuid            TEXT    NOT NULL,
    tags            TEXT    NOT NULL,                 -- JSON
    PRIMARY KEY (is_latest, id)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX artifact_id ON artifact (id);
CREATE INDEX artifact_model ON artifact (model_name);
CREATE INDEX artifact_name ON artifact (data_name);
CREATE INDEX artifact_spec ON artifact (spec_name);
CREATE INDEX artifact_run ON artifact (workflow_run_id);
CREATE INDEX artifact_created ON artifact (created_at);
CREATE INDEX artifact_size ON artifact (size);
CREATE TABLE name (
    namespace TEXT, place TEXT, marker TEXT NOT NULL, PRIMARY KEY (namespace, place)
) STRICT, WITHOUT ROWID;
CREATE TABLE tag (id INTEGER PRIMARY KEY, key TEXT NOT NULL, value TEXT NOT NULL, UNIQUE (key, value)) STRICT;
CREATE TABLE tagged (tag INTEGER, artifact INTEGER, PRIMARY KEY (tag, artifact)) STRICT, WITHOUT ROWID;
"""
_CACHE_KIB = 32 << 10  # of the one who writes: each artifact is in eight places
_MAPPED = 1 << 30  # bytes of the file that a reader sees without copying them
INDEXED = {"model_name", "data_name", "spec_name", "workflow_run_id", "created_at", "size"}
"""Columns of the table ``artifact`` by which a few of many are found fast."""


class Artifact(NamedTuple):
    """One version: the fields of a record of ``swamp data query`` (data-model spec §5.2, §6.1)."""

    namespace: str
    type_normalized: str
    model_id: str
    data_name: str
    uuid: str
    version: int
    model_name: str
    spec_name: str
    data_type: str
    content_type: str
    lifetime: str
    owner_type: str
    streaming: bool
    size: int  # bytes
    created_at: str
    tags: Mapping[str, str]
    owner_ref: str
    workflow_run_id: str
    workflow_name: str
    job_name: str
    step_name: str
    source: str
    is_latest: bool = False

    @property
    def place(self) -> str:
        """The directory of its name, in its namespace."""
        return f"data/{self.type_normalized}/{self.model_id}/{self.data_name}"


class Document(NamedTuple):
    """A ``metadata.yaml`` that was read."""

    path: str  # of its version's directory
    fingerprint: str
    artifact: Artifact | None
    problem: str | None = None  # why there is no artifact
    lifecycle: str = ""
    renamed_to: str = ""


_FIELDS = Artifact._fields
_COLUMNS = ", ".join(_FIELDS)
_PUT = f"INSERT INTO artifact (id, {_COLUMNS}) VALUES ({', '.join('?' * (1 + len(_FIELDS)))})"
_NOTE = (
    "INSERT INTO document (namespace, path, place, fingerprint, problem, lifecycle, renamed_to, version, step_name)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (namespace, path) DO UPDATE SET"
    " fingerprint = excluded.fingerprint, problem = excluded.problem, lifecycle = excluded.lifecycle,"
    " renamed_to = excluded.renamed_to, version = excluded.version, step_name = excluded.step_name"
    " RETURNING id, is_latest"
)
_MOST_TAGS = 50_000  # whose numbers are remembered


class Artifacts:
    """The database. ``read_only`` is for another process than the one that keeps it."""

    def __init__(self, path: str, *, read_only: bool = False) -> None:
        """Raises StateError if it is to be read and cannot be."""
        self.path = path
        self.db: sqlite3.Connection
        self._tags: dict[tuple[str, str], int] = {}
        self._inode: int | None = None
        self._log: int | None = None
        self._open(read_only=read_only)

    def _open(self, *, read_only: bool) -> None:
        if read_only:
            try:
                self.db = sqlite3.connect(f"file:{self.path}?mode=ro", uri=True, isolation_level=None)
                self.db.execute(f"PRAGMA mmap_size={_MAPPED}")
                self.db.execute("SELECT count(*) FROM name WHERE namespace IS NULL").fetchone()
            except sqlite3.Error as error:
                raise StateError(f"{self.path} cannot be read: {error}") from error
            return
        try:
            self.db = open_database(self.path, _SCHEMA, VERSION, "NORMAL")
        except SchemaError:
            set_aside(self.path)
            self.db = open_database(self.path, _SCHEMA, VERSION, "NORMAL")
        self.db.execute(f"PRAGMA cache_size=-{_CACHE_KIB}")
        self._inode = _inode(self.path)

    def close(self) -> None:
        self.db.close()

    def is_lost(self) -> bool:
        """Whether the files under its names are no longer those that are open."""
        log = _inode(f"{self.path}-wal")
        if self._log is None:
            self._log = log
        return _inode(self.path) != self._inode or log != self._log

    def make_anew(self) -> None:
        """Begin with nothing."""
        self._inode = self._log = None  # until it is open
        self.db.close()
        self._tags.clear()
        for suffix in ("", "-wal", "-shm"):
            if os.path.exists(self.path + suffix):
                os.unlink(self.path + suffix)
        self._open(read_only=False)

    # --- keeping ------------------------------------------------------------------------------------------

    def fingerprints(self, namespace: str) -> dict[str, str]:
        """Path of each version → what its metadata was when it was read."""
        rows = self.db.execute("SELECT path, fingerprint FROM document WHERE namespace = ?", (namespace,))
        return dict(rows.fetchall())

    def versions(self, namespace: str, places: Iterable[str]) -> dict[str, dict[str, str]]:
        """The same of some names, by their directories."""
        query = "SELECT path, fingerprint FROM document WHERE namespace = ? AND place = ?"
        return {place: dict(self.db.execute(query, (namespace, place)).fetchall()) for place in places}

    def namespaces(self) -> set[str]:
        """Of which anything is known."""
        return {row[0] for row in self.db.execute("SELECT DISTINCT namespace FROM document")}

    def places(self, namespace: str, name: str) -> list[str]:
        """Directories of a data name, of whatever model."""
        query = "SELECT place FROM name WHERE namespace = ? AND substr(place, ?) = ?"
        return [row[0] for row in self.db.execute(query, (namespace, -len(name) - 1, f"/{name}"))]

    def markers(self, namespace: str) -> dict[str, str]:
        """Directory of each name → what its ``latest`` was when :meth:`settle` was told of it; ``""`` is none."""
        return dict(self.db.execute("SELECT place, marker FROM name WHERE namespace = ?", (namespace,)).fetchall())

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """What is noted in it is noted together."""
        try:
            with transaction(self.db):
                yield
        except BaseException:
            self._tags.clear()  # numbers that were taken back
            raise

    def put(
        self,
        namespace: str,
        place: str,
        documents: Iterable[Document],
        *,
        gone: Iterable[str] = (),
        latest: int | None = None,
        marker: str = "",
    ) -> None:
        """Note what was read of a name, and decide what is shown of it.

        ``gone`` are versions that are there no more; ``latest`` is what its marker says, if there is one, and
        ``marker`` the fingerprint of that.
        """
        with self.transaction():
            for path in gone:
                self._remove(namespace, path)
            new: dict[int, Artifact] = {}
            for one in documents:
                number, was = self._note(namespace, place, one)
                if was is not None:
                    self._drop(number)
                if one.artifact is not None:
                    new[number] = one.artifact
            self._settle(namespace, place, new, latest)
            self.db.execute("INSERT OR REPLACE INTO name VALUES (?, ?, ?)", (namespace, place, marker))

    def forget(self, namespace: str, place: str) -> None:
        """Nothing of a name is there any more."""
        with self.transaction():
            for path in self.versions(namespace, [place])[place]:
                self._remove(namespace, path)
            self.db.execute("DELETE FROM name WHERE namespace = ? AND place = ?", (namespace, place))

    def import_rows(self, namespace: str, artifacts: Sequence[Artifact]) -> None:
        """All of a namespace, as its own catalog says."""
        with self.transaction():
            for path in self.fingerprints(namespace):
                self._remove(namespace, path)
            for one in artifacts:
                number, was = self._note(namespace, one.place, Document(f"{one.place}/{one.version}", "", one))
                if was is None:  # otherwise somebody exported it twice
                    self._add(namespace, number, one, LATEST if one.is_latest else HISTORY)

    def _note(self, namespace: str, place: str, document: Document) -> tuple[int, int | None]:
        """Number of a document, and what its artifact was."""
        one = document.artifact
        version, step = (0, "") if one is None else (one.version, one.step_name)
        known = (namespace, document.path, place, document.fingerprint, document.problem, document.lifecycle)
        ((number, was),) = self.db.execute(_NOTE, (*known, document.renamed_to, version, step)).fetchall()
        return int(number), was

    def _settle(self, namespace: str, place: str, new: Mapping[int, Artifact], latest: int | None) -> None:
        """Show the latest of each step (spec §5.4), and nothing at all of a name whose latest is a tombstone.

        Versions above the one that ``latest`` names are of a write that is not finished (§4), and are no latest.
        """
        rows = self.db.execute(
            "SELECT id, version, lifecycle, step_name, is_latest FROM document"
            " WHERE namespace = ? AND place = ? AND problem IS NULL",
            (namespace, place),
        ).fetchall()
        versions = {row[1]: row[2] for row in rows}
        newest = latest if latest in versions else max(versions, default=None)
        gone = newest is None or versions[newest] == "deleted"
        last: dict[str, int] = {}
        for _, version, lifecycle, step, _ in rows:
            if lifecycle != "deleted" and newest is not None and version <= newest:  # what follows is not finished
                last[step] = max(version, last.get(step, 0))
        for number, version, lifecycle, step, was in rows:
            is_latest = LATEST if last.get(step) == version else HISTORY
            wanted = HIDDEN if gone or lifecycle == "deleted" else is_latest
            if number in new:
                self._add(namespace, number, new[number], wanted)
            elif wanted != was:
                self.db.execute("UPDATE artifact SET is_latest = ? WHERE id = ?", (wanted, number))
                self.db.execute("UPDATE document SET is_latest = ? WHERE id = ?", (wanted, number))

    def _remove(self, namespace: str, path: str) -> None:
        query = "DELETE FROM document WHERE namespace = ? AND path = ? RETURNING id"
        for (number,) in self.db.execute(query, (namespace, path)).fetchall():
            self._drop(number)

    def _add(self, namespace: str, number: int, artifact: Artifact, is_latest: int) -> None:
        row = artifact._replace(
            namespace=namespace,
            tags=json.dumps(artifact.tags, ensure_ascii=False),  # type: ignore[arg-type]
            is_latest=is_latest,  # type: ignore[arg-type]
        )
        self.db.execute(_PUT, (number, *row))
        self.db.execute("UPDATE document SET is_latest = ? WHERE id = ?", (is_latest, number))
        pairs = [(self._tag(*pair), number) for pair in artifact.tags.items()]
        self.db.executemany("INSERT OR IGNORE INTO tagged VALUES (?, ?)", pairs)

    def _drop(self, number: int) -> None:
        for (tags,) in self.db.execute("DELETE FROM artifact WHERE id = ? RETURNING tags", (number,)).fetchall():
            pairs = [(self._tag(*pair), number) for pair in json.loads(tags).items()]
            self.db.executemany("DELETE FROM tagged WHERE tag = ? AND artifact = ?", pairs)

    def _tag(self, key: str, value: str) -> int:
        """Its number."""
        known = self._tags.get((key, value))
        if known is None:
            if len(self._tags) >= _MOST_TAGS:
                self._tags.clear()
            self.db.execute("INSERT OR IGNORE INTO tag (key, value) VALUES (?, ?)", (key, value))
            (known,) = self.db.execute("SELECT id FROM tag WHERE key = ? AND value = ?", (key, value)).fetchone()
            self._tags[key, value] = known
        return int(known)

    # --- asking -------------------------------------------------------------------------------------------

    def has_few(self, rows: str, values: Sequence[object], most: int) -> bool:
        """Whether there are no more than so many; ``rows`` is a table and a condition that an index answers."""
        query = f"SELECT count(*) FROM (SELECT 1 FROM {rows} LIMIT {most + 1})"
        return int(self.db.execute(query, tuple(values)).fetchone()[0]) <= most

    def select(
        self, where: str, values: Sequence[object], *, newest_first: bool = False, limit: int = -1
    ) -> Iterator[Artifact]:
        """Those that are shown and for which an SQL condition over the table ``artifact`` holds, as they came here."""
        # Bare, SQLite would rather go through all of them in their order than sort a few.
        order = "created_at DESC, +id DESC" if newest_first else "+id"
        query = f"SELECT {_COLUMNS} FROM artifact WHERE +is_latest >= {HISTORY} AND ({where}) ORDER BY {order} LIMIT ?"
        cursor = self.db.execute(query, (*values, limit))
        for row in cursor:
            yield _artifact(row)

    def renamed(self, where: str, values: Sequence[object]) -> str | None:
        """What a name is called now whose latest says that it was renamed."""
        query = (
            "SELECT renamed_to FROM document JOIN artifact USING (id)"
            f" WHERE lifecycle = 'deleted' AND renamed_to <> '' AND ({where}) ORDER BY artifact.version DESC LIMIT 1"
        )
        row = self.db.execute(query, tuple(values)).fetchone()
        return None if row is None else str(row[0])

    def distinct(self, what: str, where: str = "1", values: Sequence[object] = ()) -> list[str]:
        """What the latest artifacts have in a column, ascending."""
        query = f"SELECT DISTINCT {what} FROM artifact WHERE is_latest = 1 AND ({where}) ORDER BY 1"
        return [str(row[0]) for row in self.db.execute(query, tuple(values))]

    def tags(self, where: str, values: Sequence[object], key: str | None = None) -> list[str]:
        """Keys of tags of the latest artifacts for which a condition holds; values of one key."""
        what, is_it, keys = ("key", "1", ()) if key is None else ("value", "key = ?", (key,))
        used = "SELECT 1 FROM tagged JOIN artifact ON artifact.id = tagged.artifact WHERE tagged.tag = tag.id"
        wanted = f"{is_it} AND EXISTS ({used} AND +is_latest = 1 AND ({where}))"
        query = f"SELECT DISTINCT {what} FROM tag WHERE {wanted} ORDER BY 1"
        return [str(row[0]) for row in self.db.execute(query, (*keys, *values))]

    def count(self) -> int:
        """Of all that are shown."""
        return int(self.db.execute(f"SELECT count(*) FROM artifact WHERE is_latest >= {HISTORY}").fetchone()[0])


def _inode(path: str) -> int | None:
    try:
        return os.stat(path).st_ino
    except FileNotFoundError:
        return None


_AT = {name: at for at, name in enumerate(_FIELDS)}


def _artifact(row: Sequence[object]) -> Artifact:
    values = list(row)
    values[_AT["tags"]] = json.loads(str(row[_AT["tags"]]))
    values[_AT["streaming"]] = bool(row[_AT["streaming"]])
    values[_AT["is_latest"]] = row[_AT["is_latest"]] == LATEST
    return Artifact._make(values)
