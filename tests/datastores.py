"""Building indexed buckets from plain files, without using the code under test for the index bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

from swampfs.names import partition_key

STAMP = "2026-08-03T09:14:22.401Z"


def compact(document: object) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def entry(rel: str, body: bytes, stamp: str = STAMP) -> dict[str, Any]:
    digest = hashlib.sha256(body).hexdigest()
    return {"key": rel, "size": len(body), "lastModified": stamp, "localMtime": STAMP, "sha256": digest}


def load_shards(bucket: Any, files: Iterable[tuple[str, bytes]], *, seq: int = 1, stamp: str = STAMP) -> set[str]:
    """Put files and a version 2 index, which says that they were put at ``stamp``; returns the partition names."""
    shards: dict[str, dict[str, Any]] = {}
    for rel, body in files:
        bucket.put(rel, body)
        shards.setdefault(partition_key(rel) or "_root", {})[rel] = entry(rel, body, stamp)
    for name, entries in shards.items():
        bucket.put(f"_index/{name}.json", compact({"version": 1, "entries": entries}))
    bucket.put("_index/_meta.json", compact({"version": 2, "partitions": sorted(shards), "commitSeq": seq}))
    return set(shards)


def load_monolith(bucket: Any, files: Iterable[tuple[str, bytes]]) -> None:
    """Put files and a version 1 index without advisory shards."""
    entries = {}
    for rel, body in files:
        bucket.put(rel, body)
        entries[rel] = entry(rel, body)
    bucket.put(".datastore-index.json", compact({"version": 1, "lastPulled": STAMP, "entries": entries}))


def indexed(bucket: Any) -> dict[str, dict[str, Any]]:
    """Path → entry, as a reader of the bucket's current index format finds them."""
    keys = bucket.keys()
    meta = json.loads(bucket.get("_index/_meta.json")) if "_index/_meta.json" in keys else {"version": 1}
    if meta["version"] == 1:
        return json.loads(bucket.get(".datastore-index.json"))["entries"]
    found: dict[str, dict[str, Any]] = {}
    for name in meta["partitions"]:
        found.update(json.loads(bucket.get(f"_index/{name}.json"))["entries"])
    return found


def check_bucket(bucket: Any, *, hashed: bool = True) -> dict[str, bytes]:
    """The index, the shards and the objects agree to the last byte, and nothing else is there.

    ``hashed=False`` admits the hash-less entries of a discovered index. Returns path → content of every data object.
    """
    keys = bucket.keys()
    entries = indexed(bucket)
    internal = {key for key in keys if key.startswith("_index/") or key == ".datastore-index.json"}
    # Names of directories that are still empty, for whoever may allocate there next (docs/semantics.md).
    empty = {key for key in keys if key.startswith("_control/swampfs/reserved/")}
    data = {key: bucket.get(key) for key in keys if key not in internal | empty}
    assert set(data) == set(entries), sorted(set(data) ^ set(entries))
    for rel, found in entries.items():
        assert found["key"] == rel
        assert found["size"] == len(data[rel]), rel
        if not hashed and "sha256" not in found:
            continue
        assert found["sha256"] == hashlib.sha256(data[rel]).hexdigest(), rel
        assert list(found)[:5] == ["key", "size", "lastModified", "localMtime", "sha256"], rel
        assert len(found["lastModified"]) == len(found["localMtime"]) == 24, rel
    meta = json.loads(bucket.get("_index/_meta.json"))
    for name in meta["partitions"]:
        raw = bucket.get(f"_index/{name}.json")
        shard = json.loads(raw)
        assert raw == compact(shard), f"{name} is not compact JSON"
        for rel in shard["entries"]:
            assert (partition_key(rel) or "_root") == name, f"{rel} is in the shard {name}"
            assert shard["entries"][rel] == entries[rel], f"the shard {name} is stale for {rel}"
    listed = {f"_index/{name}.json" for name in meta["partitions"]} | {"_index/_meta.json"}
    assert {key for key in internal if key.startswith("_index/")} == listed, "stray shards"
    if meta["version"] == 2:
        assert meta["partitions"] == sorted(set(meta["partitions"]))
    return data
