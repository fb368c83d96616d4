"""Walking the tree as somebody else seems to walk it: what will they open after this?

Listings come in the order of places, shells sort by name; some read every file on their way, some one file of every
directory, some the newest version of everything. Two files opened one after the other tell which.
"""

from __future__ import annotations

import os.path
from collections import deque
from enum import Enum

from swampfs.names import RelPath
from swampfs.records import Kind, Node, Residency
from swampfs.state.catalog import Catalog

_BATCH = 64
_LOOK = 500  # rows that may be looked at for one answer

Tail = tuple[str | None, ...]
"""Components of a path below a directory; ``None`` stands for the highest number there is."""


class Order(Enum):
    """Of the entries of a directory."""

    PLACE = "place"
    NAME = "name"

    def key(self, node: Node) -> int | str:
        return node.place if self is Order.PLACE else node.name

    def after(self, catalog: Catalog, directory: int, key: int | str) -> list[Node]:
        """The next entries of a directory, a few at a time."""
        if self is Order.PLACE:
            return catalog.children(directory, int(key), _BATCH)
        return catalog.children_by_name(directory, str(key), _BATCH)


class _Level:
    """A directory on the way down, and how far it was walked."""

    def __init__(self, directory: int, after: int | str) -> None:
        self.directory = directory
        self.after = after
        self._batch: deque[Node] = deque()

    def next(self, catalog: Catalog, order: Order) -> Node | None:
        if not self._batch:
            self._batch.extend(order.after(catalog, self.directory, self.after))
            if not self._batch:
                return None
        node = self._batch.popleft()
        self.after = order.key(node)
        return node


class Walk:
    """Goes on where somebody is now, over files whose content is not here."""

    def __init__(
        self, catalog: Catalog, order: Order, way: list[Node], *, deep: bool = False, tails: tuple[Tail, ...] = ()
    ) -> None:
        """``way`` begins with a directory to walk and ends with where its walker is.

        ``deep``: over everything below it. ``tails``: only over one file of each directory in it, the first there is
        of these. Else over the files in it.
        """
        self._catalog = catalog
        self._order = order
        self._levels = [_Level(below.parent, order.key(below)) for below in way[1:]]
        self._deep = deep
        self.tails = tails
        if not deep:
            del self._levels[1:]

    def next(self) -> Node | None:
        """``None``: there are no more, or they are too far away to look for now."""
        for _ in range(_LOOK):
            if not self._levels:
                return None
            node = self._levels[-1].next(self._catalog, self._order)
            if node is None:
                self._levels.pop()
                continue
            if node.is_dir and self.tails:
                found = _first(self._catalog, node, self.tails)
                if found is not None:
                    return found
            elif node.is_dir and self._deep:
                self._levels.append(_Level(node.ino, 0 if self._order is Order.PLACE else ""))
            elif _is_stub(node) and not self.tails:
                return node
        return None


def following(catalog: Catalog, last: RelPath, node: Node) -> Walk | None:
    """The walk on which somebody came from one file to another, if it looks like one."""
    above = os.path.commonpath([last, node.path]) if last.partition("/")[0] == node.path.partition("/")[0] else ""
    way = [catalog.at(path) for path in _way(above, node.path)]
    first = catalog.at(_way(above, last)[1]) if last != above else None
    if first is None or None in way:
        return None
    known = [one for one in way if one is not None]
    order = _order(catalog, first, known[1])
    if order is None:
        return None
    if first.kind is Kind.FILE and known[1].kind is Kind.FILE:
        return Walk(catalog, order, known)
    if not (first.is_dir and _has_stub(catalog, first.path)):
        return Walk(catalog, order, known, deep=True)
    tails = _alike(last[len(first.path) + 1 :], node.path[len(known[1].path) + 1 :])
    return Walk(catalog, order, known, tails=tails) if tails else None


def _way(above: str, path: str) -> list[str]:
    """From a directory to something below it, both included."""
    way = [above]
    for component in path[len(above) :].strip("/").split("/"):
        way.append(f"{way[-1]}/{component}" if way[-1] else component)
    return way


def _order(catalog: Catalog, first: Node, second: Node) -> Order | None:
    """In which one entry of a directory comes right after another, as far as those matter."""
    for order in Order:
        for between in order.after(catalog, first.parent, order.key(first)):
            if between.ino == second.ino:
                return order
            if between.is_dir if second.is_dir else _is_stub(between):
                break
    return None


def _is_stub(node: Node) -> bool:
    return node.residency is Residency.STUB and node.kind is Kind.FILE


def _has_stub(catalog: Catalog, path: str) -> bool:
    """Whether not all below a directory was read."""
    found = catalog.db.execute(
        f"SELECT 1 FROM (SELECT kind, residency FROM node WHERE path > ? AND path < ? LIMIT {_LOOK})"
        f" WHERE kind = {Kind.FILE:d} AND residency = {Residency.STUB:d} LIMIT 1",
        (f"{path}/", f"{path}0"),
    )
    return found.fetchone() is not None


def _alike(first: str, second: str) -> tuple[Tail, ...]:
    """What two paths below neighbours have in common: the same everywhere, or that of the newest version."""
    pairs = list(zip(first.split("/"), second.split("/"), strict=False))
    if first.count("/") != second.count("/") or not first or not second:
        return ()
    newest: Tail = tuple(None if one.isdigit() and other.isdigit() else one for one, other in pairs)
    if first == second:
        return (tuple(first.split("/")), newest) if None in newest else (newest,)
    is_same = all(one == other or component is None for (one, other), component in zip(pairs, newest, strict=True))
    return (newest,) if is_same else ()


def _first(catalog: Catalog, directory: Node, tails: tuple[Tail, ...]) -> Node | None:
    for tail in tails:
        node = _below(catalog, directory, tail)
        if node is not None and node.kind is Kind.FILE:
            return node if _is_stub(node) else None
    return None


def _below(catalog: Catalog, directory: Node, tail: Tail) -> Node | None:
    node: Node | None = directory
    for component in tail:
        if node is None:
            return None
        node = catalog.child(node.ino, _newest(catalog, node.ino) if component is None else component)
    return node


def _newest(catalog: Catalog, directory: int) -> str:
    """Name of the highest version below a directory; '' if there is none."""
    (found,) = catalog.db.execute(
        "SELECT max(CAST(name AS INTEGER)) FROM node WHERE parent = ? AND kind = ? AND NOT name GLOB '*[^0-9]*'",
        (directory, Kind.DIRECTORY),
    ).fetchone()
    return "" if found is None else str(found)
