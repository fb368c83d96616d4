"""Changes made on the datastore itself, without a cache or a mount: what structural commands do to files.

The caller holds the namespace's global lock with no model lock held by anybody (:mod:`swampfs.sync.drain`). Content
goes up before the index says so, and objects go after it has stopped (spec §4 of the data model, H20).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Mapping
from typing import NamedTuple

from swampfs.errors import IndexCorruptError, IntegrityError, NamespaceError, PreconditionError
from swampfs.names import SYNCED_DIRECTORIES, Keyspace, RelPath, is_publishable
from swampfs.provider import ABSENT, RemoteIndex
from swampfs.records import IndexEntry, Watermark
from swampfs.sync.hashing import hash_file
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote
from swampfs.threads import Lane

_AT_ONCE = 16
_NAMED = 5
_UNREAD = frozenset({"index-shard", "index-entry"})  # findings that hide files which may exist


class Surgery:
    """The files of one namespace. Every call may raise StoreError."""

    def __init__(self, remote: Remote, keys: Keyspace, index: RemoteIndex) -> None:
        self.remote = remote
        self.keys = keys
        self._index = index

    async def entries(self) -> dict[RelPath, IndexEntry]:
        """Every file of swamp's own directories, as the index names it.

        Raises IndexCorruptError if part of the index cannot be read: what it does not name would be taken to be gone.
        """
        delta = await self._index.poll(Watermark(), {})
        unread = [finding for finding in delta.findings if finding.kind in _UNREAD] if delta is not None else []
        if unread:
            raise IndexCorruptError(f"{unread[0].path}: {unread[0].detail}")
        found = {}
        for partition in delta.changed.values() if delta is not None else ():
            for entry in partition.entries:
                if entry.path.partition("/")[0] in SYNCED_DIRECTORIES and is_publishable(entry.path):
                    found[entry.path] = entry
        return found

    async def content(self, path: RelPath) -> bytes:
        """Of a small file. Raises AbsentError."""
        blob = await self.remote.get(self.keys.data(path))
        assert blob is not None
        return blob.body

    async def commit(self, puts: Collection[IndexEntry], deletes: Collection[RelPath]) -> None:
        """Publish entries whose objects are there, and remove files: from the index first, then their objects."""
        if not puts and not deletes:
            return
        paths = dict.fromkeys([*(entry.path for entry in puts), *deletes])
        transaction = await self._index.begin(paths, Watermark(), ())
        await transaction.commit(list(puts), list(deletes))

        async def delete(path: RelPath) -> None:
            await self.remote.delete(self.keys.data(path))

        errors = await for_each(deletes, delete, at_once=_AT_ONCE, what="objects removed")
        if errors:
            raise errors[0]

    async def hash_of(self, path: RelPath) -> str:
        """SHA-256 of an object's bytes as they are. Raises AbsentError."""
        with tempfile.TemporaryDirectory(prefix="swampfs-") as directory:
            staged = os.path.join(directory, "content")

            def fetch() -> str:
                self.remote.store.download(self.keys.data(path), staged)
                return hash_file(staged)

            return await self.remote.threads.read(Lane.HYDRATE, fetch)

    async def take_over(self, entry: IndexEntry, source: Surgery) -> IndexEntry:
        """Copy another namespace's object here; returns its entry. Raises IntegrityError, PreconditionError."""
        with tempfile.TemporaryDirectory(prefix="swampfs-") as directory:
            staged = os.path.join(directory, "content")

            def fetch() -> str:
                source.remote.store.download(source.keys.data(entry.path), staged)
                return hash_file(staged)

            sha256 = await self.remote.threads.read(Lane.HYDRATE, fetch)
            if os.stat(staged).st_size != entry.size or (entry.sha256 or sha256) != sha256:
                raise IntegrityError(f"{source.keys.data(entry.path)} is not what its index says")
            await self.remote.put(self.keys.data(entry.path), staged, ABSENT)
            return entry._replace(sha256=sha256)


class Moved(NamedTuple):
    """What a namespace migration moves or moved: files and bytes of each directory."""

    directories: Mapping[str, tuple[int, int]]

    @property
    def files(self) -> int:
        return sum(files for files, _ in self.directories.values())

    @property
    def bytes(self) -> int:
        return sum(size for _, size in self.directories.values())


async def move_namespace(source: Surgery, target: Surgery, *, preview: bool) -> Moved:
    """All files of one namespace into another (``""``: the root). Both global locks are held.

    Nothing is removed before everything is in place; a repetition goes on where it stopped.

    Raises:
        NamespaceError: the target has other content under the same names; nothing was changed.
    """
    moving, there = await source.entries(), await target.entries()
    differing: list[RelPath] = []

    async def compare(path: RelPath) -> None:
        ours, theirs = moving[path].sha256, there[path].sha256
        if (ours or await source.hash_of(path)) != (theirs or await target.hash_of(path)):  # times prove nothing
            differing.append(path)

    errors = await for_each(moving.keys() & there.keys(), compare, at_once=_AT_ONCE, what="files compared")
    if errors:
        raise errors[0]
    differing.sort()
    if differing:
        more = f" and {len(differing) - _NAMED} more" if len(differing) > _NAMED else ""
        raise NamespaceError(
            f"{len(differing)} file(s) differ on the two sides: {', '.join(differing[:_NAMED])}{more}",
            remedy="rename or remove one of each; nothing was changed",
        )
    moved = Moved(_totals(moving.values()))
    if preview:
        return moved
    placed: list[IndexEntry] = []

    async def place(entry: IndexEntry) -> None:
        try:
            placed.append(await target.take_over(entry, source))
        except PreconditionError:  # of a move that was interrupted before its commit: is it the same?
            sha256 = entry.sha256 or await source.hash_of(entry.path)
            if await target.hash_of(entry.path) != sha256:
                key = target.keys.data(entry.path)
                raise NamespaceError(f"{key} exists, with other content", remedy="see whose it is") from None
            placed.append(entry._replace(sha256=sha256))

    missing = [entry for path, entry in moving.items() if path not in there]
    errors = await for_each(missing, place, at_once=_AT_ONCE, what="files copied")
    if errors:
        raise errors[0]
    await target.commit(placed, [])
    await source.commit([], list(moving))
    return moved


def _totals(entries: Collection[IndexEntry]) -> dict[str, tuple[int, int]]:
    totals: dict[str, tuple[int, int]] = {}
    for entry in entries:
        top = entry.path.partition("/")[0]
        files, size = totals.get(top, (0, 0))
        totals[top] = (files + 1, size + entry.size)
    return totals
