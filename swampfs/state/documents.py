"""Which files of one name the tree has, and which of them changed since it was asked last.

Nobody is told of changes who did not ask: the triggers are made by the first :meth:`Documents.watch`, for this
connection only, and go with it.
"""

from __future__ import annotations

from collections.abc import Iterator

from swampfs.records import Kind, Residency
from swampfs.state.catalog import Catalog

_SLICE = 20_000  # inodes that are looked at in one go
_WATCHED = "INSERT OR IGNORE INTO touched VALUES"


class Documents:
    """Files called one of ``names``, anywhere in a tree."""

    def __init__(self, catalog: Catalog, names: tuple[str, ...]) -> None:
        self._catalog = catalog
        self._names = names
        self._is_watching = False

    def watch(self) -> None:
        """From now on changes are noted."""
        if self._is_watching:
            return
        names = ", ".join(f"'{name}'" for name in self._names)
        self._catalog.db.executescript(f"""
            CREATE TEMP TABLE IF NOT EXISTS touched (path TEXT PRIMARY KEY) WITHOUT ROWID;
            CREATE TEMP TRIGGER document_made AFTER INSERT ON main.node WHEN NEW.name IN ({names})
            BEGIN {_WATCHED} (NEW.path); END;
            CREATE TEMP TRIGGER document_gone AFTER DELETE ON main.node WHEN OLD.name IN ({names})
            BEGIN {_WATCHED} (OLD.path); END;
            CREATE TEMP TRIGGER document_changed
            AFTER UPDATE OF path, size, mtime_ns, residency, base_size, base_sha256, base_modified, target ON main.node
            WHEN NEW.name IN ({names}) OR OLD.name IN ({names})
            BEGIN {_WATCHED} (OLD.path); {_WATCHED} (NEW.path); END;
        """)
        self._is_watching = True

    def touched(self) -> list[str]:
        """Paths that were made, changed or removed since this was asked last."""
        rows = self._catalog.db.execute("SELECT path FROM temp.touched").fetchall()
        if rows:
            self._catalog.db.execute("DELETE FROM temp.touched")
        return [row[0] for row in rows]

    def all(self, name: str) -> Iterator[list[tuple[str, str]]]:
        """Path and fingerprint of every file of that name, a slice of the tree at a time."""
        (last,) = self._catalog.db.execute("SELECT coalesce(max(ino), 0) FROM node").fetchone()
        for start in range(0, last + 1, _SLICE):
            yield self._catalog.db.execute(
                f"SELECT path, {_FINGERPRINT} FROM node WHERE ino >= ? AND ino < ? AND name = ? AND kind = ?",
                (start, start + _SLICE, name, Kind.FILE),
            ).fetchall()

    def below(self, place: str, name: str) -> list[tuple[str, str]]:
        """Path and fingerprint of the files of that name in the directories of one directory."""
        return self._catalog.db.execute(
            f"SELECT path, {_FINGERPRINT} FROM node WHERE kind = ? AND path IN (SELECT path || '/' || ? FROM node AS"
            " directory WHERE parent = (SELECT ino FROM node WHERE path = ?))",
            (Kind.FILE, name, place),
        ).fetchall()

    def fingerprint(self, path: str) -> str:
        """Of one file; ``""`` if it is not there."""
        row = self._catalog.db.execute(f"SELECT {_FINGERPRINT} FROM node WHERE path = ?", (path,)).fetchone()
        return "" if row is None else str(row[0])

    def called(self, name: str) -> list[str]:
        """Paths of the directories of a name, wherever they are."""
        return [
            row[0]
            for row in self._catalog.db.execute(
                "SELECT path FROM node WHERE name = ? AND kind = ?", (name, Kind.DIRECTORY)
            )
        ]


_LOCAL = "'local:' || size || ':' || mtime_ns || ':' || ctime_ns"
_FINGERPRINT = (
    f"CASE WHEN residency = {Residency.DIRTY:d} OR base_size IS NULL THEN {_LOCAL}"
    " ELSE coalesce(base_sha256, base_size || ':' || base_modified) END"
)
