"""Old versions by name: ``NAME@3`` beside a data name, ``raw@-1`` in a version (``design/cli.md`` §3).

They are links that are found by name and never listed; a real entry of the same name wins.
"""

from __future__ import annotations

import re

from swampfs.artifacts.metadata import path_of
from swampfs.names import parent_of
from swampfs.records import Node
from swampfs.state.catalog import Catalog

_OLD = re.compile(r"(.+)@(-?[1-9][0-9]{0,14})", re.DOTALL)
_VERSION = re.compile("[1-9][0-9]{0,14}")
_IN_A_VERSION = ("raw", "metadata.yaml")


def target(catalog: Catalog, directory: Node, name: str) -> str | None:
    """Where a name leads, relative to its directory; ``None`` if it names no version that is there.

    A positive number is a version; a negative one counts back, from the version it is asked in, or from the latest.
    """
    found = _OLD.fullmatch(name)
    if found is None:
        return None
    base, number = found.group(1), int(found.group(2))
    here = path_of(directory.path)
    if base in _IN_A_VERSION and here is not None:
        above = catalog.at(parent_of(directory.path))
        version = None if above is None else _counted(_versions(catalog, above), number, here[3])
        if version is None or catalog.at(f"{parent_of(directory.path)}/{version}/{base}") is None:
            return None
        return f"../{version}/{base}"
    place = catalog.child(directory.ino, base)
    if place is None or not place.is_dir or path_of(f"{place.path}/1") is None:
        return None
    versions = _versions(catalog, place)
    version = _counted(versions, number, max(versions, default=0))
    return None if version is None else f"{base}/{version}"


def _versions(catalog: Catalog, place: Node) -> list[int]:
    names = (node.name for node in catalog.children(place.ino) if node.is_dir)
    return sorted(int(name) for name in names if _VERSION.fullmatch(name))


def _counted(versions: list[int], number: int, current: int) -> int | None:
    if number > 0:
        return number if number in versions else None
    before = [version for version in versions if version < current]
    return before[number] if len(before) >= -number else None
