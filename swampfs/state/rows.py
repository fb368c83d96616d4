"""Rows of the catalog's table ``node`` as :class:`Node`."""

from __future__ import annotations

from typing import Any

from swampfs.records import Kind, Node, Residency

NODE = (
    "coalesce(shared, ino), parent, name, path, kind, size, mtime_ns, ctime_ns, mode, uid, gid, residency, partition,"
    " base_size, base_sha256, base_modified, base_mtime, base_posix, target, rdev, atime_ns, links, blocks,"
    " coalesce(place, ino), ino"
)
SELECT = f"SELECT {NODE} FROM node"


def node_of(row: tuple[Any, ...]) -> Node:
    """The column order of ``NODE`` is the field order of :class:`Node`."""
    values = list(row)
    values[4], values[11] = Kind(row[4]), Residency(row[11])
    return Node._make(values)


def found(row: tuple[Any, ...] | None) -> Node | None:
    return None if row is None else node_of(row)
