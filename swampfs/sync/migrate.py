"""From the monolith to shards, and shards anew from what is there (spec §8.6, §8.8 with their BETTER notes).

Both write every shard first and meta last, conditionally, with a ``commitSeq`` above any earlier one. Until meta is
written, readers see the index as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from swampfs.errors import (
    AbsentError,
    ConflictingWriteError,
    IndexCorruptError,
    PreconditionError,
    UnpartitionableError,
)
from swampfs.names import Keyspace, RelPath, home_partition, is_servable, partition_key
from swampfs.provider import ABSENT, Blob, ShardMap, matching
from swampfs.records import IndexMode
from swampfs.sync.index import (
    Meta,
    decode_entries,
    decode_json,
    decode_meta,
    decode_shard,
    encode_document,
    encode_entry,
    encode_meta,
    entries_of,
    new_shard,
)
from swampfs.sync.listing import list_entries
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote

_NAMED = 10
_SHARDS_AT_ONCE = 10


class ShardWriter:
    """Writes a whole version 2 index of one namespace. The caller holds its global lock."""

    def __init__(self, remote: Remote, keys: Keyspace) -> None:
        self._remote = remote
        self._keys = keys

    async def migrate(self) -> ShardMap:
        """Version 1 → 2; on a version 2 store the shards are completed from a listing, and nothing is lost (H12).

        Raises UnpartitionableError with nothing written, IndexCorruptError, StoreError.
        """
        blob, meta = await self._meta()
        if meta is not None and meta.mode is IndexMode.SHARDS:
            return await self.rebuild(blob, meta)
        found = await self._shard_etags()
        entries = await self._monolith_entries()
        if entries is None:
            return await self._from_shard_listing(blob)
        homeless = sorted(path for path in entries if partition_key(path) is None)
        if homeless:
            more = f" … and {len(homeless) - _NAMED} more" if len(homeless) > _NAMED else ""
            raise UnpartitionableError(
                f"{len(homeless)} of {len(entries)} entries have no partition: {', '.join(homeless[:_NAMED])}{more}"
            )
        return await self._write(entries, blob, found, seq=1)

    async def rebuild(self, blob: Blob | None, meta: Meta | None) -> ShardMap:
        """Shards that agree with the objects: entries of objects that exist, and hash-less ones for the others.

        What has no partition is parked in ``_root`` (H6).
        """
        found = await self._shard_etags()
        known: dict[RelPath, Any] = {}
        for name in meta.partitions if meta and meta.mode is IndexMode.SHARDS else ():
            known.update(await self._shard(name))
        listed, _ = await list_entries(self._remote, self._keys)
        entries: dict[RelPath, Any] = {}
        for entry in listed.entries:
            raw = known.get(entry.path)
            same = isinstance(raw, dict) and raw.get("size") == entry.size
            entries[entry.path] = raw if same else encode_entry(entry)
        return await self._write(entries, blob, found, seq=(meta.commit_seq if meta else 0) + 1)

    async def remove_foreign(self, keys: Sequence[str], heads: Collection[str]) -> int:
        """Delete objects that are another namespace's, after the index stopped naming them; returns how many.

        The index keeps its version and every other entry with its hash (H32).
        """
        blob, meta = await self._meta()
        if meta is not None and meta.mode is IndexMode.SHARDS:
            for name in meta.partitions:
                await self._without(self._keys.shard(name), heads)
            await self._write_meta(meta.partitions, blob, meta.commit_seq + 1)
        else:
            await self._without(self._keys.monolith, heads)
        removed: list[str] = []

        async def remove(key: str) -> None:
            await self._remote.delete(key)
            removed.append(key)

        await for_each(keys, remove, at_once=_SHARDS_AT_ONCE, what="objects removed")
        return len(removed)

    async def _without(self, key: str, heads: Collection[str]) -> None:
        """Rewrite one index document without entries below these top-level names."""
        try:
            blob = await self._remote.get(key)
        except AbsentError:
            return
        assert blob is not None
        document = decode_json(blob.body, key)
        entries = entries_of(document, key)
        kept = {path: raw for path, raw in entries.items() if path.partition("/")[0] not in heads}
        if len(kept) < len(entries):
            document["entries"] = kept
            await self._remote.put(key, encode_document(document), matching(blob.info.etag))

    # --- reading ------------------------------------------------------------------------------------------

    async def _meta(self) -> tuple[Blob | None, Meta | None]:
        try:
            blob = await self._remote.get(self._keys.meta)
        except AbsentError:
            return None, None
        assert blob is not None
        return blob, decode_meta(blob.body, self._keys.meta)

    async def _monolith_entries(self) -> dict[RelPath, Any] | None:
        """Servable entries with every field of theirs; ``None`` if there are none."""
        try:
            blob = await self._remote.get(self._keys.monolith)
        except AbsentError:
            listed, _ = await list_entries(self._remote, self._keys)
            return {entry.path: encode_entry(entry) for entry in listed.entries} or None
        assert blob is not None
        document = decode_json(blob.body, self._keys.monolith)
        good, _ = decode_entries(document, self._keys.monolith, "")
        raw = entries_of(document, self._keys.monolith)
        return {entry.path: raw[entry.path] for entry in good if is_servable(entry.path)} or None

    async def _shard(self, name: str) -> dict[RelPath, Any]:
        """Entries of a shard, as far as it can be read: a listing makes up for the rest."""
        key = self._keys.shard(name)
        try:
            blob = await self._remote.get(key)
            assert blob is not None
            return {RelPath(path): raw for path, raw in entries_of(decode_shard(blob.body, key), key).items()}
        except (AbsentError, IndexCorruptError):
            return {}

    async def _from_shard_listing(self, blob: Blob | None) -> ShardMap:
        """No entries at all: meta is made of the shards that exist (spec §8.8)."""
        root = self._keys.shards
        keys = [info.key for info in await self._remote.list(root)]
        names = [key[len(root) : -len(".json")] for key in keys if key.endswith(".json") and key != self._keys.meta]
        return await self._write_meta(tuple(name for name in names if "/" not in name), blob, 1)

    # --- writing ------------------------------------------------------------------------------------------

    async def _shard_etags(self) -> dict[str, str]:
        """Every shard there is, as it was before its entries were read: what has changed since is not replaced."""
        return {
            info.key: info.etag for info in await self._remote.list(self._keys.shards) if info.key.endswith(".json")
        }

    async def _write(
        self, entries: Mapping[RelPath, Any], blob: Blob | None, found: Mapping[str, str], *, seq: int
    ) -> ShardMap:
        shards: dict[str, dict[str, Any]] = {}
        for path, raw in entries.items():
            shards.setdefault(home_partition(path), {})[path] = raw

        async def put(name: str) -> None:
            key = self._keys.shard(name)
            when = matching(found[key]) if key in found else ABSENT
            try:
                await self._remote.put(key, encode_document(new_shard(shards[name])), when)
            except PreconditionError:
                raise self._overtaken(key) from None

        errors = await for_each(sorted(shards), put, at_once=_SHARDS_AT_ONCE, what="shards written")
        if errors:
            raise errors[0]
        written = await self._write_meta(tuple(shards), blob, seq)
        for key in found.keys() - {self._keys.shard(name) for name in shards} - {self._keys.meta}:
            with contextlib.suppress(PreconditionError, AbsentError):  # somebody needs it again
                await self._remote.delete(key, matching(found[key]))
        return written

    def _overtaken(self, key: str) -> ConflictingWriteError:
        return ConflictingWriteError(
            f"{key} was written by another machine meanwhile", remedy="take the global lock, then try again"
        )

    async def _write_meta(self, names: tuple[str, ...], blob: Blob | None, seq: int) -> ShardMap:
        body = encode_meta(Meta(IndexMode.SHARDS, names, seq))
        when = matching(blob.info.etag) if blob is not None else ABSENT
        try:
            await self._remote.put(self._keys.meta, body, when)
        except PreconditionError:
            raise self._overtaken(self._keys.meta) from None
        written = decode_meta(body, self._keys.meta)
        return ShardMap(2, written.partitions, seq)
