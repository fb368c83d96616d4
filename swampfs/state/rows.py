"""Rows of the catalog's table ``node`` as :class:`Node`."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from functools import cache
from typing import Any

from swampfs.records import Kind, Node, Residency

NODE = (
    "coalesce(shared, ino), parent, name, path, kind, size, mtime_ns, ctime_ns, mode, uid, gid, residency, partition,"
    " base_size, base_sha256, base_modified, base_mtime, base_posix, target, rdev, atime_ns, links, blocks,"
    " coalesce(place, ino), ino"
)
SELECT = f"SELECT {NODE} FROM node"
INSERT = """
INSERT INTO node (parent, name, path, kind, size, mtime_ns, ctime_ns, mode, uid, gid, residency, explicit,
                  target, rdev, partition, base_size, base_sha256, base_modified, base_mtime, base_posix)
VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
"""
BY_INODE = f"{SELECT} WHERE ino = ?"
BY_NAME = f"{SELECT} WHERE parent = ? AND name = ?"
BY_PATH = f"{SELECT} WHERE path = ?"
_INSERT_AND_RETURN = f"{INSERT} RETURNING {NODE}"
_MOST_KNOWN = 20_000


def node_of(row: Sequence[Any]) -> Node:
    """The column order of ``NODE`` is the field order of :class:`Node`."""
    values = list(row)
    values[4], values[11] = Kind(row[4]), Residency(row[11])
    return Node._make(values)


def found(row: tuple[Any, ...] | None) -> Node | None:
    return None if row is None else node_of(row)


@cache
def _update(columns: tuple[str, ...]) -> str:
    return f"UPDATE node SET {', '.join(f'{column} = ?' for column in columns)} WHERE ino = ?"


class Known:
    """What was read of a database and is still so: who asks for it again, as one operation does, has it.

    What is written through here stays known, as it is then. After any other write nothing is.
    """

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._since = -1  # `total_changes` of the database
        self._nodes: dict[int, Node] = {}  # by row
        self._rows: dict[tuple[int | str, ...], int | None] = {}  # by path, and by parent and name
        self._clean: dict[int, Any] = {}  # by row

    def node(self, row: int) -> Node | None:
        self._look()
        node = self._nodes.get(row)
        return self._found(BY_INODE, (row,)) if node is None else node

    def named(self, query: str, *key: int | str) -> Node | None:
        """By path, or by parent and name."""
        self._look()
        if key not in self._rows:
            node = self._found(query, key)
            self._rows[key] = None if node is None else node.row
        row = self._rows[key]
        return None if row is None else self._nodes[row]

    def clean(self, query: str, row: int) -> Any:
        """What a query says of a row."""
        self._look()
        if row not in self._clean:
            self._clean[row] = self._db.execute(query, (row,)).fetchone()
        return self._clean[row]

    def update(self, row: int, **values: Any) -> None:
        """Set columns of a row; their names are those of :class:`Node`."""
        self._look()
        done = self._db.execute(_update(tuple(values)), (*values.values(), row))
        self._since += done.rowcount
        self._clean.pop(row, None)
        if row in self._nodes:
            self._nodes[row] = self._nodes[row]._replace(**values)

    def insert(self, values: tuple[Any, ...]) -> Node:
        """Make a row, of what ``INSERT`` asks for."""
        self._look()
        ((*row,),) = self._db.execute(_INSERT_AND_RETURN, values).fetchall()
        self._since += 1
        node = node_of(row)
        self._nodes[node.row] = node
        self._rows[node.path,] = self._rows[node.parent, node.name] = node.row
        return node

    def forget(self) -> None:
        """What was written is taken back."""
        self._since = -1

    def _found(self, query: str, key: tuple[int | str, ...]) -> Node | None:
        node = found(self._db.execute(query, key).fetchone())
        if node is not None:
            self._nodes[node.row] = node
        return node

    def _look(self) -> None:
        many = len(self._nodes) + len(self._rows) + len(self._clean) >= _MOST_KNOWN
        if many or self._since != self._db.total_changes:
            self._nodes, self._rows, self._clean = {}, {}, {}
            self._since = self._db.total_changes
