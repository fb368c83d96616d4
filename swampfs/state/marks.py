"""Marks of a library cache with their generations, and what its exports were, beside the sidecar others read.

One database per cache root, whatever the namespace: a mark may come before an instance is bound to one.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

from swampfs.state.schema import MARKS, MARKS_VERSION, SchemaError, open_database, set_aside, transaction

_MARK = """
INSERT INTO dirty VALUES (?, (SELECT coalesce(max(generation), 0) + 1 FROM dirty))
ON CONFLICT (path) DO UPDATE SET generation = excluded.generation RETURNING generation
"""


class MarkLog:
    """Path → generation. Several processes may write at once; each mark is one commit, fsynced by the sidecar."""

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            self._db = open_database(path, MARKS, MARKS_VERSION, "NORMAL")
        except SchemaError:
            set_aside(path)  # the sidecar still says that there is work
            self._db = open_database(path, MARKS, MARKS_VERSION, "NORMAL")

    def close(self) -> None:
        self._db.close()

    def mark(self, path: str) -> int:
        """Record a mark (``""`` = anything) with a new generation: made during a push, it outlives it."""
        return int(self._db.execute(_MARK, (path,)).fetchone()[0])

    def marked(self, after: int = 0) -> tuple[dict[str, int], int]:
        """Paths marked later than a generation, and the newest generation."""
        rows = self._db.execute("SELECT path, generation FROM dirty WHERE generation > ?", (after,)).fetchall()
        return dict(rows), max((row[1] for row in rows), default=after)

    def retire(self, cut: int, more: Iterable[tuple[str, int]] = (), *, keep: Iterable[str] = ()) -> None:
        """What the marks up to a generation, and exactly these others, announced is committed."""
        with transaction(self._db):
            kept = [(path, generation) for path in keep if (generation := self._generation(path)) is not None]
            self._db.execute("DELETE FROM dirty WHERE generation <= ?", (cut,))
            self._db.executemany("DELETE FROM dirty WHERE path = ? AND generation = ?", list(more))
            self._db.executemany("INSERT OR REPLACE INTO dirty VALUES (?, ?)", kept)

    def _generation(self, path: str) -> int | None:
        row = self._db.execute("SELECT generation FROM dirty WHERE path = ?", (path,)).fetchone()
        return None if row is None else int(row[0])

    def stamp(self) -> str:
        """Identity of the sidecar as we last left it with nothing more to push."""
        return self._fact("sidecar") or ""

    def set_stamp(self, stamp: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fact VALUES ('sidecar', ?)", (stamp,))

    def export(self, namespace: str) -> str | None:
        """Hash of the catalog last exported for a namespace; the sidecar has room for one only (spec §8.3)."""
        return self._fact(f"export:{namespace}")

    def note_export(self, namespace: str, digest: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (f"export:{namespace}", digest))

    def _fact(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])
