"""What the format cannot say of directories: that they are there while empty, whose they are, and their modes.

A version number allocated by ``mkdir`` must not be allocated twice, so whoever gives back a lock leaves the names of
directories that are still empty below it in one small record beside the data; whoever takes the lock next reads it.
Modes and owners that are not the usual stand there too. The record exists only while there is something to say.
"""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any, NamedTuple

import msgspec

from swampfs.errors import AbsentError, PreconditionError, SwampfsError
from swampfs.names import LEASES, Keyspace, RelPath, is_servable, lease_path, parent_of, rel_path
from swampfs.provider import ABSENT, ObjectInfo, matching
from swampfs.records import Change, Kind, Node, Residency, TreeChange
from swampfs.state.catalog import CHANGED, DIRECTORY_MODE, Catalog
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote
from swampfs.threads import Lane

log = logging.getLogger(__name__)

_RECORDS = "_control/swampfs/reserved"
_AT_ONCE = 16
_Id = Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 1)]


class _Attributes(msgspec.Struct, frozen=True, omit_defaults=True):
    """Of one directory, as far as they are not the usual."""

    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] | None = None
    uid: _Id | None = None
    gid: _Id | None = None


class _Record(msgspec.Struct):
    version: int = 1
    directories: list[RelPath] = []
    """Those that are empty."""
    attributes: dict[RelPath, _Attributes] = {}


class Found(NamedTuple):
    """What stands in the record of a lock."""

    name: RelPath
    record: _Record | None  # None: not readable, which is not empty


def _scope(name: RelPath) -> str:
    """The directory a lock is about."""
    return name.removeprefix(f"{LEASES}/").removesuffix(".lock").rstrip("/")


class Directories:
    """Reads and writes the record of a lock. Call only with that lock held."""

    def __init__(self, remote: Remote, keys: Keyspace, catalog: Catalog) -> None:
        self._remote = remote
        self._keys = keys
        self._catalog = catalog
        self._versions: dict[RelPath, str] = {}  # of the records as we read or wrote them

    def _key(self, name: RelPath) -> str:
        return self._keys.data(f"{_RECORDS}/{_scope(name)}.json")

    async def read(self, name: RelPath) -> Found:
        """One request; changes nothing yet. Raises StoreError."""
        try:
            blob = await self._remote.get(self._key(name), lane=Lane.LOCK)
        except AbsentError:
            blob = None
        self._versions[name] = blob.info.etag if blob is not None else ""
        return Found(name, _decode(blob.body, name) if blob is not None else _Record())

    async def read_all(self) -> list[Found]:
        """For a machine that knows nothing yet: what the records say without any lock. Raises StoreError."""
        root = self._keys.data(f"{_RECORDS}/")
        found: list[Found] = []

        async def read(info: ObjectInfo) -> None:
            try:
                blob = await self._remote.get(info.key)
            except AbsentError:
                return
            assert blob is not None
            scope = info.key[len(root) :].removesuffix(".json")
            found.extend(
                Found(name, _decode(blob.body, name))
                for name in {RelPath(f"{scope}/.lock"), RelPath(f"{LEASES}/{scope}.lock")}
            )

        errors = await for_each(await self._remote.list(root), read, at_once=_AT_ONCE)
        if errors:
            raise errors[0]
        return found

    def apply(self, found: Found) -> list[TreeChange]:
        """Show what others did; what was done here, while the datastore was out of reach, stays.

        Returns what the kernel must forget. Call when the tree is in step with the index.
        """
        name, record = found
        if record is None:
            return []
        known = self._known(name)
        changes: list[TreeChange] = []
        with self._catalog.transaction():
            for path in record.directories:
                if path not in known.directories:  # else it was removed here
                    changes += self._show(path)
            for path in set(known.directories).difference(record.directories):
                changes += self._hide(path)
            for path in known.attributes.keys() | record.attributes.keys():
                changes += self._set(path, record.attributes.get(path))
            there = {path: value for path, value in record.attributes.items() if self._at(path) is not None}
            self._remember(name, _Record(1, record.directories, there))
        return changes

    async def store(self, name: RelPath) -> None:
        """Leave what the next holder must know. One request if it changed. Raises StoreError."""
        known = self._known(name)
        for path, value in known.attributes.items():
            node = self._at(path)
            if node is not None and _of(node) == _Attributes():
                self._set(path, value)  # others removed it and made it anew meanwhile
        record = self._here(name)
        if record == known:
            self._settle(name)
            return
        version = self._versions.pop(name, "")
        when = matching(version) if version else ABSENT
        try:
            if record.directories or record.attributes:
                await self._remote.put(self._key(name), msgspec.json.encode(record), when, Lane.LOCK)
            elif version:
                await self._remote.delete(self._key(name), when, Lane.LOCK)
        except (PreconditionError, AbsentError):
            log.info("the record of the directories of %s is a successor's by now", name)
            return
        self._remember(name, record)
        self._settle(name)

    def _settle(self, name: RelPath) -> None:
        """What was done to directories here is in the record."""
        for path in self._catalog.facts(CHANGED):
            if lease_path(path) == name:
                self._catalog.drop_fact(f"{CHANGED}:{path}")

    def _here(self, name: RelPath) -> _Record:
        """What this machine has to say of the directories under a lock."""
        scope = _scope(name)
        empty = [path for path in self._catalog.empty_directories(scope) if _may_name(name, path)]
        special = self._catalog.unusual_directories(scope)
        return _Record(1, empty, {node.path: _of(node) for node in special if lease_path(node.path) == name})

    def _known(self, name: RelPath) -> _Record:
        """What this machine and the record had in common last."""
        known: Any = json.loads(self._catalog.fact(f"reserved:{name}") or "[]")
        if isinstance(known, list):  # as earlier versions kept it
            known = {"directories": known}
        return msgspec.convert(known, _Record)

    def _remember(self, name: RelPath, record: _Record) -> None:
        if record.directories or record.attributes:
            self._catalog.set_fact(f"reserved:{name}", msgspec.json.encode(record).decode())
        else:
            self._catalog.drop_fact(f"reserved:{name}")

    # --- the tree -----------------------------------------------------------------------------------------

    def _at(self, path: RelPath) -> Node | None:
        node = self._catalog.at(path)
        return node if node is not None and node.is_dir else None

    def _show(self, path: RelPath) -> list[TreeChange]:
        there = self._catalog.at(path)
        if there is not None:
            if there.is_dir:
                self._catalog.touch(there.ino, there.mtime_ns, keep=True)
            return []
        try:
            self._catalog.make_parents(path)
        except NotADirectoryError:
            return []
        node = self._catalog.add(path, Kind.DIRECTORY, mode=DIRECTORY_MODE, residency=Residency.CLEAN)
        return self._told(path, node.ino)

    def _hide(self, path: RelPath) -> list[TreeChange]:
        """Another machine removed it, and perhaps those above it that were there for nothing else."""
        node, changes = self._at(path), []
        while node is not None and not self._catalog.has_children(node.ino):
            self._catalog.remove(node)
            self._catalog.unhide(node.path)
            changes += self._told(node.path, node.ino)
            node = self._catalog.implied(parent_of(node.path))
        return changes

    def _set(self, path: RelPath, wanted: _Attributes | None) -> list[TreeChange]:
        """What others say of a directory, unless it was changed here since."""
        node = self._at(path)
        wanted = wanted or _Attributes()
        if node is None or _of(node) == wanted or self._catalog.fact(f"{CHANGED}:{path}") is not None:
            return []
        mode = DIRECTORY_MODE if wanted.mode is None else wanted.mode
        uid, gid = (-1 if number is None else number for number in (wanted.uid, wanted.gid))
        self._catalog.set_attributes(node.ino, Change(mode=mode, uid=uid, gid=gid))
        return [TreeChange(node.parent, node.name, node.ino)]

    def _told(self, path: RelPath, ino: int) -> list[TreeChange]:
        changes = []
        while path:
            above = self._catalog.at(parent_of(path))
            assert above is not None
            changes.append(TreeChange(above.ino, path.rpartition("/")[2], ino))
            path, ino = parent_of(path), above.ino
        return changes


def _of(node: Node) -> _Attributes:
    return _Attributes(
        None if node.mode == DIRECTORY_MODE else node.mode,
        None if node.uid < 0 else node.uid,
        None if node.gid < 0 else node.gid,
    )


def _may_name(name: RelPath, path: RelPath) -> bool:
    """Whether the record of a lock may say of a directory that it is empty: what is, or would be, under it."""
    return (lease_path(path) == name or lease_path(f"{path}/") == name) and _may_be(path)


def _may_be(path: RelPath) -> bool:
    """Whether there may be such a directory in the datastore."""
    while path:
        if not is_servable(path):
            return False
        path = parent_of(path)
    return True


def _decode(body: bytes, name: RelPath) -> _Record | None:
    """Only what may stand there: a foreign name would be made a directory of this machine. ``None``: not readable."""
    try:
        raw: Any = msgspec.json.decode(body)
        directories = [path for text in raw["directories"] if _may_name(name, path := rel_path(text))]
        attributes = {
            path: msgspec.convert(value, _Attributes)
            for text, value in raw.get("attributes", {}).items()
            if lease_path(path := rel_path(text)) == name and _may_be(path)
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, SwampfsError) as error:
        log.info("the record of the directories of %s is not readable: %s", name, error)
        return None
    return _Record(1, directories, attributes)
