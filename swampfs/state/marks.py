"""Marks of a library cache with their generations, and what its exports were, beside the sidecar others read.

One database per cache root, whatever the namespace: a mark may come before an instance is bound to one.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable

from swampfs.state.schema import MARKS, MARKS_VERSION, SchemaError, open_database, set_aside, transaction

_MARK = "INSERT OR REPLACE INTO dirty (path, at) VALUES (?, ?) RETURNING generation"


class MarkLog:
    """Path → generation. Several processes may write at once; each mark is one commit, fsynced by the sidecar."""

    def __init__(self, path: str) -> None:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        try:
            self._db = open_database(path, MARKS, MARKS_VERSION, "NORMAL")
        except SchemaError:
            set_aside(path)  # the sidecar still says that there is work
            self._db = open_database(path, MARKS, MARKS_VERSION, "NORMAL")
        self._lock = threading.Lock()  # workers of a pull ask whether a path was marked meanwhile

    def close(self) -> None:
        self._db.close()

    def mark(self, path: str) -> int:
        """Record a mark (``""`` = anything) with a new generation: made during a push, it outlives it."""
        with self._lock:
            return int(self._db.execute(_MARK, (path, time.time_ns())).fetchone()[0])

    def marked(self, after: int = 0) -> tuple[dict[str, int], int]:
        """Paths marked later than a generation, and the newest generation."""
        with self._lock:
            rows = self._db.execute("SELECT path, generation FROM dirty WHERE generation > ?", (after,)).fetchall()
        return dict(rows), max((row[1] for row in rows), default=after)

    def newest(self) -> int:
        """The newest generation; cheap, for the workers of a pull."""
        with self._lock:
            return int(self._db.execute("SELECT coalesce(max(generation), 0) FROM dirty").fetchone()[0])

    def retire(self, cut: int, more: Iterable[int] = (), *, keep: Iterable[str] = ()) -> None:
        """What the marks up to a generation, and exactly these others, announced is committed; but for ``keep``."""
        kept = set(keep)
        with self._lock, transaction(self._db):
            rows = self._db.execute("SELECT generation, path FROM dirty WHERE generation <= ?", (cut,)).fetchall()
            done = [(generation,) for generation, path in rows if path not in kept]
            self._db.executemany("DELETE FROM dirty WHERE generation = ?", done + [(number,) for number in more])

    def young(self, paths: Iterable[str], age_s: float) -> set[str]:
        """Those of the paths that were marked not longer ago than this."""
        since = time.time_ns() - int(age_s * 1e9)
        with self._lock:
            found = {row[0] for row in self._db.execute("SELECT path FROM dirty WHERE at >= ?", (since,))}
        return found.intersection(paths)

    def is_proven(self, store: str) -> bool:
        """Whether a store was seen to honour conditional writes."""
        return self._fact(f"proven:{store}") is not None

    def note_proven(self, store: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, '1')", (f"proven:{store}",))

    def export(self, namespace: str) -> str | None:
        """Hash of the catalog last exported for a namespace; the sidecar has room for one only (spec §8.3)."""
        return self._fact(f"export:{namespace}")

    def note_export(self, namespace: str, digest: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO fact VALUES (?, ?)", (f"export:{namespace}", digest))

    def _fact(self, key: str) -> str | None:
        row = self._db.execute("SELECT value FROM fact WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])
