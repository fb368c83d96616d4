"""Committing to an object store's index: a read-merge-write that conditional puts fence (H7, H18).

What was read at :meth:`Commit.begin` is written back only if it is still the current version; otherwise it is read
again and the same changes are applied to it. So a writer that lost its lock cannot overwrite its successor, and
entries and fields of other writers survive.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from swampfs.errors import AbsentError, ConflictingWriteError, IndexCorruptError, PreconditionError, StoreError
from swampfs.names import ROOT_PARTITION, Keyspace, RelPath, home_partition, is_internal, partition_key
from swampfs.provider import ABSENT, ALWAYS, Precondition, matching
from swampfs.records import IndexDelta, IndexEntry, IndexMode, Partition, Watermark, timestamp
from swampfs.sync.index import (
    MONOLITH,
    Meta,
    decode_entries,
    decode_entry,
    decode_json,
    decode_meta,
    decode_shard,
    encode_document,
    encode_entry,
    encode_meta,
    entries_of,
    new_monolith,
    new_shard,
)
from swampfs.sync.listing import list_entries
from swampfs.sync.remote import Remote

log = logging.getLogger(__name__)

_ATTEMPTS = 8
_HEADS = 3  # shards whose ETags are asked for one by one; more are listed


@dataclass(slots=True)
class _Document:
    """One index document as read: its JSON and the condition under which it may be replaced."""

    key: str
    content: dict[str, Any]
    when: Precondition
    etag: str = ""
    base: dict[str, Any] = field(default_factory=dict)  # entries as of begin


@dataclass(slots=True)
class Commit:
    """:class:`~swampfs.provider.IndexTransaction` of :class:`~swampfs.sync.object_index.ObjectIndex`."""

    remote: Remote
    keys: Keyspace
    known: Watermark
    parked: Sequence[IndexEntry]
    meta: Meta | None = None
    meta_etag: str = ""
    mode_at_begin: IndexMode = IndexMode.MONOLITH
    in_place: bool = False
    documents: dict[str, _Document] = field(default_factory=dict)  # partition → document

    @classmethod
    async def begin(
        cls,
        remote: Remote,
        keys: Keyspace,
        paths: Mapping[RelPath, str | None],
        known: Watermark,
        parked: Sequence[IndexEntry],
    ) -> Commit:
        """Read meta, then every document a commit of ``paths`` touches."""
        commit = cls(remote, keys, known, parked)
        await commit._read_meta()
        commit.mode_at_begin = commit.meta.mode if commit.meta else IndexMode.MONOLITH
        if commit.meta is None or commit.meta.mode is IndexMode.MONOLITH:
            await commit._read_monolith()
            return commit
        wanted = {home_partition(path) for path in paths}
        wanted |= {found for found in paths.values() if found and found in commit.meta.partitions}
        if parked:
            wanted.add(ROOT_PARTITION)
        for name in sorted(wanted):
            await commit._read_shard(name)
        return commit

    def entry(self, path: RelPath) -> IndexEntry | None:
        for document in self.documents.values():
            entry = decode_entry(document.content, path)
            if entry is not None:
                return entry
        return None

    def _raw(self, path: RelPath) -> object:
        found = (entries_of(document.content, document.key).get(path) for document in self.documents.values())
        return next((raw for raw in found if raw is not None), None)

    def internal(self) -> list[RelPath]:
        """Of the monolith only: shards belong to many, and readers scrub them in memory."""
        monolith = self.documents.get(MONOLITH)
        entries = entries_of(monolith.content, monolith.key) if monolith else {}
        return [RelPath(path) for path in entries if is_internal(path)]

    def precondition(self, path: RelPath) -> Precondition:
        """An object may be replaced at will: what names it is the index, which is fenced."""
        return ALWAYS

    async def commit(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> IndexDelta | None:
        """Write content changes to the index: monolith then shards (v1), or shards then meta (v2)."""
        await self._reread_meta()
        if self.mode_at_begin is IndexMode.SHARDS:
            return await self._commit_shards([*puts, *self.parked], deletes)
        return await self._commit_monolith(puts, deletes)

    # --- reading ------------------------------------------------------------------------------------------

    async def _read_meta(self) -> None:
        try:
            blob = await self.remote.get(self.keys.meta)
        except AbsentError:
            self.meta, self.meta_etag = None, ""
            return
        assert blob is not None
        self.meta, self.meta_etag = decode_meta(blob.body, self.keys.meta), blob.info.etag

    async def _reread_meta(self) -> None:
        """Under the global lock, once more (spec §7.3). Raises ConflictingWriteError if the index was migrated."""
        try:
            blob = await self.remote.get(self.keys.meta, unless=self.meta_etag)
        except AbsentError:
            blob, self.meta, self.meta_etag = None, None, ""
        if blob is not None:
            self.meta, self.meta_etag = decode_meta(blob.body, self.keys.meta), blob.info.etag
        mode = self.meta.mode if self.meta else IndexMode.MONOLITH
        if mode is not self.mode_at_begin:
            raise ConflictingWriteError(f"{self.keys.meta} changed its version while files were uploaded")

    async def _read_shard(self, name: str) -> None:
        assert self.meta is not None
        key = self.keys.shard(name)
        if name not in self.meta.partitions:
            # Unlisted means "no entries" (H41), whatever an old object of that name may hold.
            self.documents[name] = self._first(name, _Document(key, new_shard({}), ABSENT))
            return
        try:
            blob = await self.remote.get(key)
        except AbsentError:
            raise IndexCorruptError(f"the index shard {key} is listed but missing; nothing was committed") from None
        assert blob is not None
        content = decode_shard(blob.body, key)
        self.documents[name] = self._first(name, _Document(key, content, matching(blob.info.etag), blob.info.etag))

    def _first(self, name: str, document: _Document) -> _Document:
        """Remember the entries a document had when the transaction began, over re-readings."""
        earlier = self.documents.get(name)
        document.base = dict(entries_of(document.content, document.key)) if earlier is None else earlier.base
        return document

    async def _read_monolith(self) -> None:
        key = self.keys.monolith
        try:
            blob = await self.remote.get(key)
        except AbsentError:
            partition, _ = await list_entries(self.remote, self.keys)
            entries: dict[str, Any] = {entry.path: encode_entry(entry) for entry in partition.entries}
            content = new_monolith(entries, timestamp(time.time_ns()))
            self.documents[MONOLITH] = self._first(MONOLITH, _Document(key, content, ABSENT))
            return
        assert blob is not None
        content = decode_json(blob.body, key)
        entries_of(content, key)
        document = _Document(key, content, matching(blob.info.etag), blob.info.etag)
        self.documents[MONOLITH] = self._first(MONOLITH, document)

    # --- version 2: shards, then meta ---------------------------------------------------------------------

    async def _commit_shards(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> IndexDelta | None:
        base_etag = self.meta_etag
        touched = []
        # What is in the shards already may be of a commit that got no further: the others still have to be told.
        repeated = any(self._raw(path) is None for path in deletes) or any(
            self._raw(entry.path) == encode_entry(entry, self._raw(entry.path)) for entry in puts
        )
        for name in sorted(self.documents):
            mine = [entry for entry in puts if home_partition(entry.path) == name]
            elsewhere = [entry.path for entry in puts if home_partition(entry.path) != name]
            if await self._write(name, mine, [*deletes, *elsewhere]):
                touched.append(name)
        if not touched and not repeated:
            return None
        listed = [name for name in self.documents if name in self.meta.partitions] if self.meta else []
        emptied = {name for name in {*touched, *listed} if not entries_of(self.documents[name].content, name)}
        unlisted = self.documents.keys() - set(self.meta.partitions if self.meta else ()) - set(touched) - emptied
        leftovers = [
            self.documents[name] for name in sorted(unlisted) if await self._is_left_over(self.documents[name])
        ]
        await self._write_meta(set(touched) - emptied, emptied)
        # After meta stopped listing them: a crash in between leaves a readable index. And only the versions seen
        # before: who lists one of them again has written it first.
        for document in (*(self.documents[name] for name in sorted(emptied)), *leftovers):
            await self._discard(document)
        return self._delta_of_shards(touched, emptied, base_etag)

    async def _write(self, name: str, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> bool:
        """Apply changes to one document and put it, re-reading as long as others are faster.

        Returns whether the document changed. A put without an answer may have been applied; then reading it again
        finds nothing left to change, and it still counts as changed.

        Raises:
            ConflictingWriteError: an entry we are about to replace is no longer the one our decision was based on.
        """
        for attempt in range(_ATTEMPTS):
            document = self.documents[name]
            entries = entries_of(document.content, document.key)
            after = dict(entries)
            for entry in puts:
                after[entry.path] = encode_entry(entry, entries.get(entry.path))
            for path in deletes:
                after.pop(path, None)
            if entries == after and not (name == MONOLITH and document.when == ABSENT):
                return attempt > 0
            for path in (*(entry.path for entry in puts), *deletes):
                if entries.get(path) not in (document.base.get(path), after.get(path)):
                    raise ConflictingWriteError(f"{path} was committed by another machine meanwhile")
            document.content["entries"] = after
            try:
                info = await self.remote.put(document.key, encode_document(document.content), document.when)
            except PreconditionError:
                await self._reread(name)
                continue
            document.etag, document.when = info.etag, matching(info.etag)
            return True
        raise ConflictingWriteError(f"{self.documents[name].key} changed {_ATTEMPTS} times while we tried to update it")

    async def _reread(self, name: str) -> None:
        """Take the current version of a document whose precondition failed."""
        if name == MONOLITH:
            await self._read_monolith()
        else:
            await self._read_meta()
            if self.meta is None or self.meta.mode is not IndexMode.SHARDS:
                raise IndexCorruptError(f"{self.keys.meta} is no longer version 2; nothing more was committed")
            await self._read_shard(name)
            if self.documents[name].when == ABSENT:
                # An unlisted leftover is in the way: replace exactly that version of it.
                info = await self.remote.head(self.documents[name].key)
                self.documents[name].when = matching(info.etag)

    async def _write_meta(self, present: set[str], emptied: set[str]) -> None:
        for _ in range(_ATTEMPTS):
            assert self.meta is not None
            names = (set(self.meta.partitions) | present) - emptied
            meta = Meta(IndexMode.SHARDS, tuple(names), self.meta.commit_seq + 1)
            try:
                info = await self.remote.put(self.keys.meta, encode_meta(meta), matching(self.meta_etag))
            except PreconditionError:
                await self._reread_meta()
                await self._verify_shards(present | emptied)
                continue
            self.meta, self.meta_etag = meta, info.etag
            return
        raise ConflictingWriteError(f"{self.keys.meta} changed {_ATTEMPTS} times while we tried to update it")

    async def _verify_shards(self, names: set[str]) -> None:
        """Another commit came in between: are the shards still what we wrote? It may have replaced one (H18)."""
        for name in sorted(names):
            document = self.documents[name]
            try:
                found = (await self.remote.head(document.key)).etag
            except AbsentError:
                found = ""
            if found != document.etag:
                raise ConflictingWriteError(f"{document.key} was replaced by another machine's commit")

    def _delta_of_shards(self, touched: list[str], emptied: set[str], base_etag: str) -> IndexDelta | None:
        if self.known.mode is not IndexMode.SHARDS:
            return None  # the tree was read from another kind of index; the next poll reads it anew
        assert self.meta is not None
        changed = {}
        for name in touched:
            if name not in emptied:
                document = self.documents[name]
                entries, _ = decode_entries(document.content, document.key, name)
                changed[name] = Partition(document.etag, entries)
        current = self.known.meta_etag == base_etag and self.meta.commit_seq == self.known.commit_seq + 1
        mark = Watermark(IndexMode.SHARDS, self.meta.commit_seq, self.meta_etag) if current else self.known
        return IndexDelta(mark, changed, frozenset(self.meta.partitions))

    # --- version 1: monolith, then advisory shards --------------------------------------------------------

    async def _commit_monolith(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> IndexDelta | None:
        document = self.documents[MONOLITH]
        document.content["lastPulled"] = timestamp(time.time_ns())
        if not await self._write(MONOLITH, puts, deletes):
            return None
        document = self.documents[MONOLITH]
        meta_etag = self.known.meta_etag
        try:
            meta_etag = await self._write_advisory_shards(puts, deletes)
        except StoreError as error:
            # Readers of version 1 prefer the monolith; stale shards are rewritten by the next commit (spec §7.2).
            log.info("advisory index shards were not updated: %s", error)
        entries, findings = decode_entries(document.content, document.key, MONOLITH)
        mark = Watermark(IndexMode.MONOLITH, 0, meta_etag, document.etag)
        if self.known.mode is IndexMode.SHARDS:
            return None
        return IndexDelta(mark, {MONOLITH: Partition(document.etag, entries)}, frozenset({MONOLITH}), findings)

    async def _write_advisory_shards(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> str:
        """Rewrite the shards of changed partitions (all, if there was no meta yet); returns meta's ETag."""
        grouped: dict[str, dict[str, Any]] = {}
        for path, raw in entries_of(self.documents[MONOLITH].content, MONOLITH).items():
            name = partition_key(path)
            if name is not None:
                grouped.setdefault(name, {})[path] = raw
        paths = [entry.path for entry in puts] + list(deletes)
        dirty = {name for path in paths if (name := partition_key(path)) is not None}
        names = sorted(set(grouped) if self.meta is None else dirty & set(grouped))
        etags = await self._shard_etags(names)
        await self._reread_meta()  # looked at after the shards: what a migration has written since is not replaced
        for name in names:
            key = self.keys.shard(name)
            when = matching(etags[key]) if key in etags else ABSENT
            await self.remote.put(key, encode_document(new_shard(grouped[name])), when)
        old = self.meta.partitions if self.meta else ()
        if set(old) == set(grouped):
            return self.meta_etag
        meta = Meta(
            IndexMode.MONOLITH, tuple([n for n in old if n in grouped] + [n for n in grouped if n not in old]), 0
        )
        when = matching(self.meta_etag) if self.meta_etag else ABSENT  # never over a version 2 meta (H14)
        info = await self.remote.put(self.keys.meta, encode_meta(meta), when)
        for name in sorted(dirty - set(grouped)):
            await self.remote.delete(self.keys.shard(name))
        return info.etag

    async def _shard_etags(self, names: Sequence[str]) -> dict[str, str]:
        if len(names) > _HEADS:
            return {info.key: info.etag for info in await self.remote.list(self.keys.shards)}
        etags = {}
        for name in names:
            with contextlib.suppress(AbsentError):
                etags[self.keys.shard(name)] = (await self.remote.head(self.keys.shard(name))).etag
        return etags

    async def _is_left_over(self, document: _Document) -> bool:
        """Whether a shard that nothing lists exists: of a commit that died before its meta, or before its clean-up."""
        try:
            document.etag = (await self.remote.head(document.key)).etag
        except AbsentError:
            return False
        return True

    async def _discard(self, document: _Document) -> None:
        try:
            await self.remote.delete(document.key, matching(document.etag) if document.etag else document.when)
        except StoreError as error:
            log.info("the empty index shard %s stays behind, unlisted: %s", document.key, error)
