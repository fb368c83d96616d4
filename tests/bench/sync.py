"""``scripts/bench sync``: the library's sync of a cache against a real S3 server, small files and tier L."""

from __future__ import annotations

import json
import os
import resource
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import trio

from swampfs.backends.s3 import S3Store
from swampfs.backends.trace import TracingStore
from swampfs.datastore import ObjectStoreProvider
from swampfs.names import partition_key
from swampfs.settings import s3_source
from tests import seaweed

_SPACE = uuid.UUID("6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a20")


class Cache:
    """One cache of one machine on the server, with its requests counted."""

    def __init__(self, server: seaweed.Server, bucket: str, directory: Path) -> None:
        source = s3_source({"bucket": bucket, "endpoint": server.endpoint, "region": "us-east-1"}, "bench")
        self.trace = TracingStore(S3Store(source))
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.service = ObjectStoreProvider(self.trace, "@acme/bench", bucket).create_sync_service("/", str(directory))

    def timed(self, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
        before = Counter(self.trace.counts)
        started = time.perf_counter()
        result = trio.run(call)
        elapsed = time.perf_counter() - started
        requests = sum((self.trace.counts - before).values())
        peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"{what:44} {elapsed:8.2f} s  {requests:7} requests  peak {peak_mb:5.0f} MB   → {result}", flush=True)
        return result


def small_files(count: int) -> Any:
    """As swamp writes them: five versions of a name, 5 KB of content and 0.5 KB of metadata each, and a marker."""
    made = number = 0
    while made < count:
        top = f"data/aws/ec2/vpc/{uuid.uuid5(_SPACE, f'model {number % 50}')}/item-{number // 50}"
        files = [(f"{top}/latest", b"5")]
        for version in range(1, 6):
            files.append((f"{top}/{version}/raw", (f"raw {number} {version} " * 600)[:5120].encode()))
            files.append((f"{top}/{version}/metadata.yaml", (f"id: {number} {version}\n" * 60)[:512].encode()))
        for rel, body in files[: count - made]:
            yield rel, body
            made += 1
        number += 1


def write(directory: Path, files: Any) -> None:
    for rel, body in files:
        path = directory / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)


def small(server: seaweed.Server, scratch: Path, count: int) -> None:
    """The rows that were measured for the existing extension."""
    server.client().create_bucket(Bucket="small")
    one = Cache(server, "small", scratch / "one")
    write(one.directory, small_files(count))
    trio.run(partial(one.service.mark_dirty))
    one.timed(f"push {count} files", one.service.push_changed)
    one.timed("zero-diff push", one.service.push_changed)
    two = Cache(server, "small", scratch / "two")
    two.timed("metadata-only pull", partial(two.service.pull_changed, metadata_only=True))
    three = Cache(server, "small", scratch / "three")
    three.timed("full pull", three.service.pull_changed)
    three.timed("zero-diff pull", three.service.pull_changed)
    trio.run(one.service.migrate_monolith_to_shards)
    trio.run(one.service.pull_changed)
    rel = next(iter(small_files(1)))[0]
    trio.run(partial(one.service.mark_dirty, rel_path=rel))
    (one.directory / rel).write_bytes(b"changed")
    one.timed("one-file push on shards", one.service.push_changed)


def fill_tier_l(server: seaweed.Server) -> None:
    """275 000 entries in the index of 2 000 models; only the index is in the bucket."""
    client = server.client()
    client.create_bucket(Bucket="tier-l")
    shards: dict[str, dict[str, Any]] = {}
    for number in range(25_000):
        model = uuid.uuid5(_SPACE, f"model {number % 2000}")
        top = f"data/aws/kind{number % 40}/vpc/{model}/item-{number // 2000}"
        rels = [f"{top}/latest"]
        for version in range(1, 6):
            rels += [f"{top}/{version}/raw", f"{top}/{version}/metadata.yaml"]
        for rel in rels:
            entry = {
                "key": rel,
                "size": 0,
                "lastModified": "2026-08-03T09:14:22.401Z",
                "localMtime": "2026-08-03T09:14:21.977Z",
                "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            }
            shards.setdefault(partition_key(rel) or "_root", {})[rel] = entry
    for name, entries in shards.items():
        body = json.dumps({"version": 1, "entries": entries}, separators=(",", ":"))
        client.put_object(Bucket="tier-l", Key=f"_index/{name}.json", Body=body.encode())
    meta = {"version": 2, "partitions": sorted(shards), "commitSeq": 7}
    client.put_object(Bucket="tier-l", Key="_index/_meta.json", Body=json.dumps(meta, separators=(",", ":")).encode())
    total = sum(len(entries) for entries in shards.values())
    print(f"-- {total} entries in {len(shards)} shards", flush=True)


def tier_l(server: seaweed.Server, scratch: Path) -> None:
    """What a library user does with an index of that size."""
    cache = Cache(server, "tier-l", scratch / "big")
    bound = cache.service._bind(None)
    cache.timed("read the whole index (v2)", bound.parts.refresh)
    cache.timed("read it again, nothing new", bound.parts.refresh)
    marks(cache)
    rel = f"data/aws/kind1/vpc/{uuid.uuid5(_SPACE, 'model 1')}/item-0/6"
    fresh = Cache(server, "tier-l", scratch / "fresh")
    trio.run(partial(fresh.service.mark_dirty, rel_path=rel))
    write(fresh.directory, [(f"{rel}/raw", b"new"), (f"{rel}/metadata.yaml", b"size: 3")])
    fresh.timed("one-model commit from an empty cache", fresh.service.push_changed)


def marks(cache: Cache) -> None:
    """100 000 marks, in a cache of their own."""
    other = cache.directory.parent / "marks"
    other.mkdir()
    service = ObjectStoreProvider(cache.trace, "@acme/bench", "marks").create_sync_service("/", str(other))

    async def mark_all() -> str:
        laps = []
        for lap in range(4):
            started = time.perf_counter()
            for number in range(25_000):
                await service.mark_dirty(rel_path=f"data/test/model/{lap}/{number}")
            laps.append((time.perf_counter() - started) / 25_000 * 1e6)
        return " ".join(f"{lap:.0f} µs" for lap in laps)

    cache.timed("mark_dirty of 100 000 paths, per quarter", mark_all)


def main(arguments: list[str]) -> None:
    count = next((int(word) for word in arguments if word.isdigit()), 10_000)
    scratch = Path(tempfile.mkdtemp(prefix="swampfs-bench-"))
    server = seaweed.start()
    try:
        os.environ.update(server.environment())
        if "--tier-l" not in arguments:
            small(server, scratch, count)
        if "--small" not in arguments:
            child = os.fork()  # so that what fills the bucket does not count as our memory
            if child == 0:
                fill_tier_l(server)
                os._exit(0)
            os.waitpid(child, 0)
            tier_l(server, scratch)
    finally:
        server.stop()
        shutil.rmtree(scratch, ignore_errors=True)


if __name__ == "__main__":
    main(sys.argv[1:])
