"""Empty directories: the format has none, but a version number allocated by ``mkdir`` must not be allocated twice.

Whoever gives back a lock leaves the names of directories that are still empty below it in one small record beside the
data; whoever takes the lock next reads it. The record exists only while there is such a directory.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import msgspec

from swampfs.errors import AbsentError, PreconditionError, SwampfsError
from swampfs.names import LEASES, Keyspace, RelPath, lease_path, parent_of, rel_path
from swampfs.provider import ABSENT, ObjectInfo, matching
from swampfs.records import Kind, Residency, TreeChange
from swampfs.state.catalog import DIRECTORY_MODE, Catalog
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote
from swampfs.threads import Lane

log = logging.getLogger(__name__)

_RECORDS = "_control/swampfs/reserved"
_AT_ONCE = 16


def _scope(name: RelPath) -> str:
    """The directory a lock is about."""
    return name.removeprefix(f"{LEASES}/").removesuffix(".lock").rstrip("/")


class Reservations:
    """Reads and writes the record of a lock. Call only with that lock held."""

    def __init__(self, remote: Remote, keys: Keyspace, catalog: Catalog) -> None:
        self._remote = remote
        self._keys = keys
        self._catalog = catalog
        self._versions: dict[RelPath, str] = {}  # of the records as we read or wrote them

    def _key(self, name: RelPath) -> str:
        return self._keys.data(f"{_RECORDS}/{_scope(name)}.json")

    async def load(self, name: RelPath) -> list[TreeChange]:
        """Show the empty directories of others; returns what the kernel must forget. Raises StoreError."""
        key = self._key(name)
        try:
            blob = await self._remote.get(key, lane=Lane.LOCK)
        except AbsentError:
            blob = None
        self._versions[name] = blob.info.etag if blob is not None else ""
        listed = _decode(blob.body, name) if blob is not None else []
        if listed is None:
            return []  # unreadable is not empty
        return self._take_over(name, listed)

    async def load_all(self) -> list[TreeChange]:
        """For a machine that knows nothing yet: what the records say without any lock. Raises StoreError."""
        root = self._keys.data(f"{_RECORDS}/")
        changes: list[TreeChange] = []

        async def load(info: ObjectInfo) -> None:
            try:
                blob = await self._remote.get(info.key)
            except AbsentError:
                return
            assert blob is not None
            scope = info.key[len(root) :].removesuffix(".json")
            for name in {RelPath(f"{scope}/.lock"), RelPath(f"{LEASES}/{scope}.lock")}:
                listed = _decode(blob.body, name)
                if listed:
                    changes.extend(self._take_over(name, listed))

        errors = await for_each(await self._remote.list(root), load, at_once=_AT_ONCE)
        if errors:
            raise errors[0]
        return changes

    def _take_over(self, name: RelPath, listed: list[RelPath]) -> list[TreeChange]:
        known = self._known(name)
        changes: list[TreeChange] = []
        with self._catalog.transaction():
            for path in listed:
                if path not in known:  # else it was removed here, while the datastore was out of reach
                    changes += self._show(path)
            for path in known - set(listed):
                changes += self._hide(path)
            self._remember(name, listed)
        return changes

    async def store(self, name: RelPath) -> None:
        """Leave the names of directories that are still empty. One request if they changed. Raises StoreError."""
        scope = _scope(name)
        empty = [path for path in self._catalog.empty_directories(scope) if lease_path(path) == name]
        if set(empty) == self._known(name):
            return
        version = self._versions.pop(name, "")
        when = matching(version) if version else ABSENT
        try:
            if empty:
                body = json.dumps({"version": 1, "directories": empty}, ensure_ascii=False).encode()
                await self._remote.put(self._key(name), body, when, Lane.LOCK)
            elif version:
                await self._remote.delete(self._key(name), when, Lane.LOCK)
        except (PreconditionError, AbsentError):
            log.info("the record of empty directories of %s is a successor's by now", name)
            return
        self._remember(name, empty)

    def _known(self, name: RelPath) -> set[RelPath]:
        return {RelPath(path) for path in json.loads(self._catalog.fact(f"reserved:{name}") or "[]")}

    def _remember(self, name: RelPath, paths: list[RelPath]) -> None:
        if paths:
            self._catalog.set_fact(f"reserved:{name}", json.dumps(paths))
        else:
            self._catalog.drop_fact(f"reserved:{name}")

    def _show(self, path: RelPath) -> list[TreeChange]:
        if self._catalog.at(path) is not None:
            return []
        try:
            self._catalog.make_parents(path)
        except NotADirectoryError:
            return []
        node = self._catalog.add(path, Kind.DIRECTORY, mode=DIRECTORY_MODE, residency=Residency.CLEAN)
        return self._told(path, node.ino)

    def _hide(self, path: RelPath) -> list[TreeChange]:
        """Another machine removed it."""
        node = self._catalog.at(path)
        if node is None or not node.is_dir or self._catalog.has_children(node.ino):
            return []
        self._catalog.remove(node)
        return self._told(path, node.ino)

    def _told(self, path: RelPath, ino: int) -> list[TreeChange]:
        changes = []
        while path:
            above = self._catalog.at(parent_of(path))
            assert above is not None
            changes.append(TreeChange(above.ino, path.rpartition("/")[2], ino))
            path, ino = parent_of(path), above.ino
        return changes


def _decode(body: bytes, name: RelPath) -> list[RelPath] | None:
    """Only what may stand there: a foreign name would be made a directory of this machine. ``None``: not readable."""
    found = []
    try:
        raw: Any = msgspec.json.decode(body)
        for text in raw["directories"]:
            path = rel_path(text)
            if lease_path(path) == name:
                found.append(path)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError, SwampfsError) as error:
        log.info("the record of empty directories of %s is not readable: %s", name, error)
        return None
    return found
