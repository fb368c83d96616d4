"""The remote index of an object store, followed by conditional requests.

``poll`` costs one request when nothing moved; on change it lists ``_index/`` once and fetches only the shards whose
ETag moved. Meta is read before and after the shards, so that a commit in between is never seen in part
(spec §6.3 BETTER). While meta is version 2 the monolith is never looked at (H41).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from swampfs.errors import AbsentError, IndexCorruptError
from swampfs.names import Keyspace, RelPath
from swampfs.provider import Blob, IndexTransaction
from swampfs.records import Finding, IndexDelta, IndexEntry, IndexMode, Partition, Watermark
from swampfs.sync.commit import Commit
from swampfs.sync.index import MONOLITH, Meta, decode_entries, decode_json, decode_meta, decode_shard
from swampfs.sync.listing import list_entries
from swampfs.sync.parallel import for_each
from swampfs.sync.remote import Remote

_TORN_READS = 5
SHARDS_AT_ONCE = 10


class ObjectIndex:
    """:class:`~swampfs.provider.RemoteIndex` of S3-like stores, bound to one namespace."""

    in_place = False

    def __init__(self, remote: Remote, keys: Keyspace) -> None:
        self._remote = remote
        self._keys = keys

    async def poll(self, known: Watermark, partitions: Mapping[str, str]) -> IndexDelta | None:
        """Raises IndexVersionError for an index from the future, IndexCorruptError for an unreadable document,
        and StoreError when the store does not answer."""
        for _ in range(_TORN_READS):
            meta_blob, unchanged = await self._meta(known)
            if unchanged and known.mode is IndexMode.SHARDS:
                return None
            if meta_blob is not None:
                meta = decode_meta(meta_blob.body, self._keys.meta)
                if meta.mode is IndexMode.SHARDS:
                    delta = await self._read_shards(meta, meta_blob.info.etag, partitions)
                    if delta is not None:
                        return delta
                    continue
            etag = meta_blob.info.etag if meta_blob else known.meta_etag if unchanged else ""
            return await self._read_monolith(known, etag)
        raise self._torn()

    async def poll_some(
        self, known: Watermark, partitions: Mapping[str, str], wanted: Callable[[str], bool]
    ) -> IndexDelta | None:
        """Raises what :meth:`poll` raises. A version 1 index is one document: it is read whole (H11).

        So is one that was version 1 when last read: entries known from the monolith belong to no shard.
        """
        if known.mode in (IndexMode.MONOLITH, IndexMode.LISTING):
            return await self.poll(known, partitions)
        for _ in range(_TORN_READS):
            meta_blob, unchanged = await self._meta(known)
            if unchanged and known.mode is IndexMode.SHARDS:
                return None  # then every partition read so far is current, too
            meta = decode_meta(meta_blob.body, self._keys.meta) if meta_blob else None
            if meta_blob is None or meta is None or meta.mode is not IndexMode.SHARDS:
                etag = meta_blob.info.etag if meta_blob else known.meta_etag if unchanged else ""
                return await self._read_monolith(known, etag)
            changed: dict[str, Partition] = {}
            findings: list[Finding] = []
            names = [name for name in dict.fromkeys(meta.partitions) if wanted(name)]
            await self._read_each(names, partitions, changed, findings)
            if await self._is_current(meta_blob.info.etag):
                listed = frozenset(meta.partitions)
                mark = Watermark(IndexMode.SHARDS, meta.commit_seq, meta_blob.info.etag)
                return IndexDelta(mark, changed, listed, tuple(findings), complete=False)
        raise self._torn()

    async def begin(
        self, paths: Mapping[RelPath, str | None], known: Watermark, parked: Sequence[IndexEntry] = ()
    ) -> IndexTransaction:
        return await Commit.begin(self._remote, self._keys, paths, known, parked)

    async def _meta(self, known: Watermark) -> tuple[Blob | None, bool]:
        """The meta document and whether it still is the known one."""
        try:
            blob = await self._remote.get(self._keys.meta, unless=known.meta_etag)
        except AbsentError:
            return None, False
        return blob, blob is None

    async def _read_shards(self, meta: Meta, meta_etag: str, known: Mapping[str, str]) -> IndexDelta | None:
        """Moved shards of a consistent version 2 index; ``None`` if a commit came in between."""
        names = list(dict.fromkeys(meta.partitions))
        if any(name in known for name in names):
            listed = await self._remote.list(self._keys.shards)
            etags = {info.key: info.etag for info in listed}
            moved = [name for name in names if known.get(name, "") != etags.get(self._keys.shard(name), "-")]
        else:
            moved = names
        changed: dict[str, Partition] = {}
        findings: list[Finding] = []
        await self._read_each(moved, {}, changed, findings)
        if not await self._is_current(meta_etag):
            return None
        broken = any(finding.kind == "index-shard" for finding in findings)
        # An unreadable shard keeps its old rows; forgetting meta's ETag makes the next poll look again.
        mark = Watermark(IndexMode.SHARDS, meta.commit_seq, "" if broken else meta_etag)
        return IndexDelta(mark, changed, frozenset(names), tuple(findings))

    async def _is_current(self, meta_etag: str) -> bool:
        """Whether no commit came in between (spec §6.3 BETTER)."""
        try:
            return await self._remote.get(self._keys.meta, unless=meta_etag) is None
        except AbsentError:
            return False

    def _torn(self) -> IndexCorruptError:
        return IndexCorruptError(
            f"{self._keys.meta} changed during each of {_TORN_READS} readings",
            remedy="other machines commit very often; try again",
        )

    async def _read_each(
        self, names: Sequence[str], known: Mapping[str, str], changed: dict[str, Partition], findings: list[Finding]
    ) -> None:
        errors = await for_each(
            names, lambda name: self._read_shard(name, known, changed, findings), at_once=SHARDS_AT_ONCE
        )
        if errors:
            raise errors[0]

    async def _read_shard(
        self, name: str, known: Mapping[str, str], changed: dict[str, Partition], findings: list[Finding]
    ) -> None:
        key = self._keys.shard(name)
        try:
            blob = await self._remote.get(key, unless=known.get(name, ""))
            if blob is None:
                return
            entries, bad = decode_entries(decode_shard(blob.body, key), key, name)
        except AbsentError:
            findings.append(Finding(key, "index-shard", "listed but missing; its files stay as they were", name))
            return
        except IndexCorruptError as error:
            findings.append(Finding(key, "index-shard", f"unreadable, its files stay as they were: {error}", name))
            return
        changed[name] = Partition(blob.info.etag, entries)
        findings.extend(bad)

    async def _read_monolith(self, known: Watermark, meta_etag: str) -> IndexDelta | None:
        unless = known.monolith_etag if known.mode is IndexMode.MONOLITH else ""
        try:
            blob = await self._remote.get(self._keys.monolith, unless=unless)
        except AbsentError:
            return await self._read_listing(known)
        if blob is None:
            return None
        document = decode_json(blob.body, self._keys.monolith)
        entries, bad = decode_entries(document, self._keys.monolith, MONOLITH)
        mark = Watermark(IndexMode.MONOLITH, 0, meta_etag, blob.info.etag)
        return IndexDelta(mark, {MONOLITH: Partition(blob.info.etag, entries)}, frozenset({MONOLITH}), bad)

    async def _read_listing(self, known: Watermark) -> IndexDelta | None:
        """Discovery (spec §6.4): no index at all, so the listing is the truth."""
        partition, findings = await list_entries(self._remote, self._keys)
        if known.mode is IndexMode.LISTING and partition.etag == known.monolith_etag:
            return None
        mark = Watermark(IndexMode.LISTING, monolith_etag=partition.etag)
        return IndexDelta(mark, {MONOLITH: partition}, frozenset({MONOLITH}), findings)
