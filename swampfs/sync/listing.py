"""Listing as index: a directory datastore, or a bucket that nothing has indexed yet (spec §6.4 discovery)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

from swampfs.errors import AbsentError, HostileNameError
from swampfs.names import NAMESPACE_MANIFEST, Keyspace, RelPath, is_internal, is_stray_internal, rel_path
from swampfs.provider import ABSENT, IndexTransaction, Precondition, matching
from swampfs.records import Finding, IndexDelta, IndexEntry, IndexMode, Partition, Watermark
from swampfs.sync.index import MONOLITH
from swampfs.sync.remote import Remote


async def list_entries(remote: Remote, keys: Keyspace) -> tuple[Partition, tuple[Finding, ...]]:
    """Everything below the bound namespace as hash-less entries; other namespaces are left out in solo mode.

    The partition's ETag is a digest of the listing, so equal listings compare equal.
    """
    digest = hashlib.sha256()
    entries: list[IndexEntry] = []
    findings: list[Finding] = []
    names = []
    for info in await remote.list(keys.data("")):
        rel = keys.rel(info.key)
        if rel is not None and rel != "" and not rel.endswith("/"):
            names.append((rel, info))
    foreign = set()
    if not keys.namespace:
        foreign = {rel.split("/", 1)[0] for rel, _ in names if rel.endswith("/" + NAMESPACE_MANIFEST)}
    for rel, info in names:
        if is_internal(rel) or is_stray_internal(rel) or rel.split("/", 1)[0] in foreign:
            continue
        try:
            path = rel_path(rel)
        except HostileNameError as error:
            findings.append(Finding(rel, "index-name", f"skipped: {error}", MONOLITH))
            continue
        digest.update(f"{rel}\0{info.etag}\0".encode("utf-8", "surrogatepass"))
        entries.append(IndexEntry(path, info.size, info.last_modified))
    return Partition(digest.hexdigest(), tuple(entries)), tuple(findings)


class ListingIndex:
    """:class:`~swampfs.provider.RemoteIndex` of a plain directory: no index is ever written into it."""

    in_place = True

    def __init__(self, remote: Remote, keys: Keyspace) -> None:
        self._remote = remote
        self._keys = keys

    async def poll(self, known: Watermark, partitions: Mapping[str, str]) -> IndexDelta | None:
        partition, findings = await list_entries(self._remote, self._keys)
        if known.mode is IndexMode.LISTING and partition.etag == known.monolith_etag:
            return None
        mark = Watermark(IndexMode.LISTING, monolith_etag=partition.etag)
        return IndexDelta(mark, {MONOLITH: partition}, frozenset({MONOLITH}), findings)

    async def poll_some(
        self, known: Watermark, partitions: Mapping[str, str], wanted: Callable[[str], bool]
    ) -> IndexDelta | None:
        return await self.poll(known, partitions)

    async def begin(
        self, paths: Mapping[RelPath, str | None], known: Watermark, parked: Sequence[IndexEntry] = ()
    ) -> IndexTransaction:
        found: dict[RelPath, tuple[IndexEntry, str]] = {}
        for path in paths:
            try:
                info = await self._remote.head(self._keys.data(path))
            except AbsentError:
                continue
            found[path] = (IndexEntry(path, info.size, info.last_modified), info.etag)
        return _ListingTransaction(found)


class _ListingTransaction:
    """The files are their own index: committing is only saying what was put and deleted."""

    in_place = True

    def __init__(self, found: Mapping[RelPath, tuple[IndexEntry, str]]) -> None:
        self._found = found

    def entry(self, path: RelPath) -> IndexEntry | None:
        found = self._found.get(path)
        return found[0] if found else None

    def internal(self) -> list[RelPath]:
        return []

    def precondition(self, path: RelPath) -> Precondition:
        """Putting the file is the commit, so it is the put that must not overwrite somebody's newer version."""
        found = self._found.get(path)
        return matching(found[1]) if found else ABSENT

    async def commit(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> IndexDelta | None:
        return None
