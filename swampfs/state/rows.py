"""Rows of the catalog's table ``node`` as :class:`Node`."""

from __future__ import annotations

import sqlite3
from typing import Any

from swampfs.records import Kind, Node, Residency

NODE = (
    "coalesce(shared, ino), parent, name, path, kind, size, mtime_ns, ctime_ns, mode, uid, gid, residency, partition,"
    " base_size, base_sha256, base_modified, base_mtime, base_posix, target, rdev, atime_ns, links, blocks,"
    " coalesce(place, ino), ino"
)
SELECT = f"SELECT {NODE} FROM node"
BY_INODE = f"{SELECT} WHERE ino = ?"
BY_NAME = f"{SELECT} WHERE parent = ? AND name = ?"
BY_PATH = f"{SELECT} WHERE path = ?"
_MOST_KNOWN = 20_000


def node_of(row: tuple[Any, ...]) -> Node:
    """The column order of ``NODE`` is the field order of :class:`Node`."""
    values = list(row)
    values[4], values[11] = Kind(row[4]), Residency(row[11])
    return Node._make(values)


def found(row: tuple[Any, ...] | None) -> Node | None:
    return None if row is None else node_of(row)


class Known:
    """What was read of a database since it was last written: who asks for it again, as one operation does, has it."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._since = -1  # `total_changes` of the database
        self._rows: dict[Any, Any] = {}

    def now(self) -> dict[Any, Any]:
        """Anything that says what it is of."""
        if self._since != self._db.total_changes or len(self._rows) >= _MOST_KNOWN:
            self._rows, self._since = {}, self._db.total_changes
        return self._rows

    def node(self, query: str, *key: int | str) -> Node | None:
        known = self.now()
        if (query, key) not in known:
            known[query, key] = found(self._db.execute(query, key).fetchone())
        node: Node | None = known[query, key]
        return node

    def learn(self, node: Node) -> None:
        """What was just written."""
        self.now()[BY_INODE, (node.ino,)] = node

    def forget(self) -> None:
        """What was written is taken back."""
        self._rows = {}
