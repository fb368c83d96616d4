"""SQLite files: how they are opened, and their schemas, field by field.

All run in WAL mode. The journal commits with ``synchronous=FULL`` (0.25 ms here): a mark must be on disk
before the bytes it announces. The catalog uses ``NORMAL``: it can be rebuilt from the index and the journal. So does
the library's manifest, whose marks the fsynced sidecar backs.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from swampfs.errors import StateError

CATALOG_VERSION = 2
JOURNAL_VERSION = 3

_LINKS = """
CREATE INDEX node_shared ON node (shared) WHERE shared IS NOT NULL;
CREATE TRIGGER directory_made AFTER INSERT ON node WHEN NEW.kind = 2 AND NEW.parent <> NEW.ino
BEGIN UPDATE node SET links = links + 1 WHERE ino = NEW.parent; END;
CREATE TRIGGER directory_removed AFTER DELETE ON node WHEN OLD.kind = 2
BEGIN UPDATE node SET links = links - 1 WHERE ino = OLD.parent; END;
CREATE TRIGGER directory_moved AFTER UPDATE OF parent ON node WHEN NEW.kind = 2 AND NEW.parent <> OLD.parent
BEGIN
    UPDATE node SET links = links - 1 WHERE ino = OLD.parent;
    UPDATE node SET links = links + 1 WHERE ino = NEW.parent;
END;
"""
CATALOG = (
    """
CREATE TABLE node (
    ino           INTEGER PRIMARY KEY AUTOINCREMENT,  -- never reused: it is the kernel's inode number
    parent        INTEGER NOT NULL,
    name          TEXT    NOT NULL,
    path          TEXT    NOT NULL UNIQUE,            -- '' is the root
    kind          INTEGER NOT NULL,                   -- records.Kind
    size          INTEGER NOT NULL DEFAULT 0,
    mtime_ns      INTEGER NOT NULL,
    ctime_ns      INTEGER NOT NULL,
    mode          INTEGER NOT NULL,                   -- permission bits only
    uid           INTEGER NOT NULL DEFAULT -1,        -- -1: the mount's owner
    gid           INTEGER NOT NULL DEFAULT -1,
    residency     INTEGER NOT NULL DEFAULT 0,         -- records.Residency: STUB, CLEAN or DIRTY
    explicit      INTEGER NOT NULL DEFAULT 0,         -- directory made, or emptied, by a user: stays
    partition     TEXT,                               -- partition the base entry was read from; NULL: unpublished
    base_size     INTEGER,                            -- the remote entry last in step with this node
    base_sha256   TEXT,
    base_modified TEXT,
    base_mtime    TEXT,
    base_posix    TEXT,                               -- JSON of records.Posix
    target        TEXT,                               -- of a symbolic link
    rdev          INTEGER NOT NULL DEFAULT 0,
    atime_ns      INTEGER,                            -- NULL: never set
    links         INTEGER NOT NULL DEFAULT 1,         -- of a directory: 1 and its subdirectories
    blocks        INTEGER,                            -- of 512 bytes on this machine, if it was written here
    place         INTEGER,                            -- in its directory's listing; NULL: ino
    shared        INTEGER,                            -- a further name of this inode, whose own row has NULL here
    UNIQUE (parent, name)
) STRICT;
CREATE INDEX node_partition ON node (partition) WHERE partition IS NOT NULL;
CREATE TABLE partition (name TEXT PRIMARY KEY, etag TEXT NOT NULL) STRICT;
CREATE TABLE finding (
    path TEXT, kind TEXT, detail TEXT NOT NULL, partition TEXT NOT NULL, PRIMARY KEY (path, kind)
) STRICT;
CREATE TABLE parked (path TEXT PRIMARY KEY, lost INTEGER NOT NULL DEFAULT 0) STRICT;  -- spec H6: our entries in _root
CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""
    + _LINKS
)

MANIFEST_VERSION = 1
MANIFEST = """
CREATE TABLE file (
    path          TEXT PRIMARY KEY,                   -- relative to the namespace
    partition     INTEGER,                            -- partition.id the entry was read from; NULL: not in the index
    size          INTEGER,                            -- the remote entry as last read (spec §2)
    sha256        TEXT,
    modified      TEXT,
    mtime         TEXT,
    lazy          INTEGER NOT NULL DEFAULT 0,         -- a metadata-only pull leaves it out (spec §6.1)
    dangling      INTEGER NOT NULL DEFAULT 0,         -- 1: the entry's object answered 404
    parked        INTEGER NOT NULL DEFAULT 0,         -- H6: 1 our entry in _root; 2 another writer dropped it
    base_size     INTEGER,                            -- the content that local and remote last had in common
    base_sha256   TEXT,
    base_modified TEXT,
    stat          TEXT,                               -- identity of the local file when it had that content
    stat_at       INTEGER                             -- and when that was seen, ns
) STRICT, WITHOUT ROWID;
CREATE TABLE upload (                                 -- sent or about to be, and not surely in the index yet
    path   TEXT PRIMARY KEY,
    over   TEXT NOT NULL,                             -- lastModified of the entry it is to replace; '' for none
    sha256 TEXT                                       -- of what was sent, once it was
) STRICT;
CREATE INDEX file_partition ON file (partition) WHERE partition IS NOT NULL;
CREATE INDEX file_removed ON file (lazy) WHERE partition IS NULL AND base_size IS NOT NULL;
CREATE INDEX file_pending ON file (lazy) WHERE partition IS NOT NULL AND dangling = 0 AND (
    base_size IS NOT size OR CASE WHEN base_sha256 IS NOT NULL AND sha256 IS NOT NULL THEN base_sha256 <> sha256
                                  ELSE base_modified IS NOT modified END);
CREATE TABLE partition (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, etag TEXT NOT NULL) STRICT;
CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""

MARKS_VERSION = 1
MARKS = """
CREATE TABLE dirty (
    generation INTEGER PRIMARY KEY AUTOINCREMENT,     -- never used twice: a mark made again is another one
    path       TEXT NOT NULL UNIQUE,                  -- relative to the cache root; '' is anything
    at         INTEGER NOT NULL                       -- when, ns
) STRICT;
CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""

JOURNAL = """
CREATE TABLE dirty (
    path          TEXT PRIMARY KEY,
    op            TEXT    NOT NULL,                   -- records.Op
    generation    INTEGER NOT NULL,                   -- a push retires exactly the generation it uploaded
    partition     TEXT,                               -- with base_*: the remote entry this change started from
    base_size     INTEGER,
    base_sha256   TEXT,
    base_modified TEXT,
    base_mtime    TEXT,
    base_posix    TEXT,
    sent_size     INTEGER,                            -- what a push uploaded and meant to commit: if its outcome was
    sent_sha256   TEXT,                               -- lost, finding this in the index is no conflict
    was_deleted   INTEGER NOT NULL DEFAULT 0,         -- 1: a removal that became a write before it was pushed
    synced        INTEGER NOT NULL DEFAULT 0          -- 1: its content was on the disk since it was last replaced
) STRICT;
CREATE TABLE intent (id INTEGER PRIMARY KEY AUTOINCREMENT, source TEXT NOT NULL, target TEXT NOT NULL) STRICT;
CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
"""


UPGRADES = {
    CATALOG: (
        """
ALTER TABLE node ADD COLUMN base_posix TEXT;
ALTER TABLE node ADD COLUMN target TEXT;
ALTER TABLE node ADD COLUMN rdev INTEGER NOT NULL DEFAULT 0;
ALTER TABLE node ADD COLUMN atime_ns INTEGER;
ALTER TABLE node ADD COLUMN links INTEGER NOT NULL DEFAULT 1;
ALTER TABLE node ADD COLUMN blocks INTEGER;
ALTER TABLE node ADD COLUMN place INTEGER;
ALTER TABLE node ADD COLUMN shared INTEGER;
UPDATE node SET links = 1 + (SELECT count(*) FROM node AS below WHERE below.parent = node.ino AND below.kind = 2)
    WHERE kind = 2;
UPDATE node SET links = links - 1 WHERE ino = parent;
"""
        + _LINKS,
    ),
    JOURNAL: (
        "ALTER TABLE dirty ADD COLUMN base_posix TEXT;",
        "ALTER TABLE dirty ADD COLUMN synced INTEGER NOT NULL DEFAULT 0;"
        "CREATE TABLE fact (key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;",
    ),
}
"""Schema → what makes a version 2 of a version 1, a version 3 of that, and so on."""


_LOG_PAGES = 8000  # 32 MB, after which a commit moves them: that waits for the disk twice, and the loop with it
_BROKEN = (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT)


class SchemaError(Exception):
    """The file is not a database of ours, is damaged, or has another version."""


def open_database(path: str, schema: str, version: int, synchronous: str) -> sqlite3.Connection:
    """Open or create a database file (mode 0600). Raises SchemaError if it cannot be trusted."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    os.close(fd)
    db = sqlite3.connect(path, isolation_level=None, cached_statements=256, check_same_thread=False)
    try:
        db.execute("PRAGMA busy_timeout=5000")
        db.execute("PRAGMA journal_mode=WAL")
        db.execute(f"PRAGMA wal_autocheckpoint={_LOG_PAGES}")
        db.execute(f"PRAGMA synchronous={synchronous}")
        found = db.execute("PRAGMA user_version").fetchone()[0]
        tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if tables == 0:
            db.executescript(f"BEGIN; {schema} PRAGMA user_version={version}; COMMIT;")
        elif 1 <= found < version and schema in UPGRADES:
            steps = " ".join(UPGRADES[schema][found - 1 :])
            db.executescript(f"BEGIN; {steps} PRAGMA user_version={version}; COMMIT;")
        elif found != version:
            raise SchemaError(f"{path} has schema {found}, expected {version}")
        elif db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
            raise SchemaError(f"{path} is damaged")
    except sqlite3.DatabaseError as error:
        db.close()
        if _is_broken(error):
            raise SchemaError(f"{path}: {error}") from error
        # A full disk says nothing about the database: never set a healthy one aside for it.
        raise StateError(f"{path} cannot be opened: {error}") from error
    except SchemaError:
        db.close()
        raise
    return db


class Compacted(NamedTuple):
    """What became of a database; the first two are pages of its write-ahead log."""

    wal_pages: int
    checkpointed: int
    reclaimed: int  # bytes
    skipped: bool  # it is too large to be rewritten while somebody waits


def compact(db: sqlite3.Connection, largest: int | None = None) -> Compacted:
    """Empty the write-ahead log, and give unused pages back; of a file of more than ``largest`` bytes only the first.

    Raises sqlite3.Error: nothing is lost.
    """
    _, wal_pages, checkpointed = db.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchone()
    (page,) = db.execute("PRAGMA page_size").fetchone()

    def count(what: str) -> int:
        return int(db.execute(f"PRAGMA {what}").fetchone()[0])

    before, is_waste = count("page_count"), count("freelist_count") > 0
    skipped = is_waste and largest is not None and before * page > largest
    if is_waste and not skipped:
        db.execute("VACUUM")
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return Compacted(max(0, wal_pages), max(0, checkpointed), (before - count("page_count")) * page, skipped)


def is_disk_full(error: Exception) -> bool:
    """Whether a database refused a change for want of room."""
    return isinstance(error, sqlite3.Error) and error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_FULL


def is_damaged(error: Exception) -> bool:
    """Whether a database turned out to be none, a broken one, or one without our tables."""
    return isinstance(error, sqlite3.DatabaseError) and (_is_broken(error) or "no such table" in str(error))


def _is_broken(error: sqlite3.DatabaseError) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in _BROKEN


def is_local_fault(error: BaseException) -> bool:
    """Whether a failure is this machine's disk or database, not the datastore's or ours."""
    return isinstance(error, OSError | sqlite3.Error | StateError)


def set_aside(path: str) -> str:
    """Move a distrusted database and its side files out of the way; returns the new name."""
    aside = f"{path}.bad-{time.time_ns()}"
    for suffix in ("", "-wal", "-shm", "-journal"):
        if os.path.exists(path + suffix):
            os.rename(path + suffix, aside + suffix)
    return aside


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """``BEGIN IMMEDIATE`` … ``COMMIT``, rolled back on any exception. Nests by joining the outer one."""
    if db.in_transaction:
        yield
        return
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # a full disk may have rolled it back: asking again would hide that it was full
            db.execute("ROLLBACK")
        raise
