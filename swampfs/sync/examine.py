"""Is an index what it says? One listing compared with every index document, for ``swampfs doctor``. Writes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from swampfs.errors import AbsentError, IndexCorruptError
from swampfs.names import Keyspace, RelPath, is_servable, partition_key
from swampfs.records import IndexMode
from swampfs.sync.index import Meta, decode_entries, decode_json, decode_meta, decode_shard
from swampfs.sync.listing import list_entries
from swampfs.sync.remote import Remote


class IndexReport(NamedTuple):
    """What was found. Paths are relative to the namespace; lists are complete."""

    mode: IndexMode
    commit_seq: int
    entries: int
    dangling: tuple[str, ...]  # entries without an object
    differing: tuple[str, ...]  # objects of another size than their entry
    unlisted: tuple[str, ...]  # objects without an entry
    broken: tuple[str, ...]  # documents that are listed and missing, or unreadable
    stray: tuple[str, ...]  # shards that nothing lists
    homeless: tuple[str, ...]  # entries whose paths have no partition (spec §3)
    skipped: int  # entries whose names or fields cannot be used

    @property
    def sound(self) -> bool:
        return not (self.dangling or self.differing or self.broken)


async def examine(remote: Remote, keys: Keyspace) -> IndexReport:
    """Raises IndexVersionError for an index from the future, StoreError."""
    meta = await _meta(remote, keys)
    sizes: dict[RelPath, int] = {}
    broken: list[str] = []
    skipped = 0
    mode = IndexMode.LISTING
    documents = [keys.monolith]
    if meta is not None and meta.mode is IndexMode.SHARDS:
        documents = [keys.shard(name) for name in meta.partitions]
        mode = IndexMode.SHARDS
    for key in documents:
        try:
            blob = await remote.get(key)
            assert blob is not None
            document = decode_shard(blob.body, key) if mode is IndexMode.SHARDS else decode_json(blob.body, key)
            good, bad = decode_entries(document, key, "")
        except AbsentError:
            if mode is IndexMode.SHARDS:
                broken.append(key)
            continue
        except IndexCorruptError:
            broken.append(key)
            continue
        if mode is IndexMode.LISTING:
            mode = IndexMode.MONOLITH
        skipped += len(bad)
        sizes.update((entry.path, entry.size) for entry in good if is_servable(entry.path))
    return await _compare(remote, keys, IndexReport(mode, meta.commit_seq if meta else 0, len(sizes), (), (), (),
                                                    tuple(broken), (), (), skipped), sizes, meta)  # fmt: skip


async def _compare(
    remote: Remote, keys: Keyspace, report: IndexReport, sizes: Mapping[RelPath, int], meta: Meta | None
) -> IndexReport:
    listed, _ = await list_entries(remote, keys)
    found = {entry.path: entry.size for entry in listed.entries if is_servable(entry.path)}
    stray = []
    if report.mode is IndexMode.SHARDS and meta is not None:
        wanted = {keys.meta, *map(keys.shard, meta.partitions)}
        stray = [info.key for info in await remote.list(keys.shards) if info.key not in wanted]
    return report._replace(
        dangling=tuple(sorted(sizes.keys() - found.keys())),
        differing=tuple(sorted(path for path in sizes.keys() & found.keys() if sizes[path] != found[path])),
        unlisted=tuple(sorted(found.keys() - sizes.keys())) if report.mode is not IndexMode.LISTING else (),
        stray=tuple(stray),
        homeless=tuple(sorted(path for path in sizes if partition_key(path) is None)),
    )


async def _meta(remote: Remote, keys: Keyspace) -> Meta | None:
    try:
        blob = await remote.get(keys.meta)
    except AbsentError:
        return None
    assert blob is not None
    return decode_meta(blob.body, keys.meta)
