"""Library caches over one store that records its requests and can fail; every call runs a loop of its own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import trio

from swampfs.datastore import ObjectStoreProvider
from swampfs.provider import ALWAYS, AbortSignal, Blob, ObjectInfo, ObjectStore, Precondition, Take
from swampfs.sync.cache.service import CacheSyncService
from swampfs.testing.faults import Fault, FaultyStore, When
from swampfs.testing.memory import MemoryStore
from tests.datastores import STAMP, compact, entry, load_monolith, load_shards
from tests.engine import Store

MODEL = "data/test/m1/state"
LATER = "2027-01-01T00:00:00.000Z"


class Recorder:
    """An :class:`~swampfs.provider.ObjectStore` that writes down every request."""

    label = "memory"

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.name = inner.name
        self.authenticated = inner.authenticated
        self.log: list[tuple[str, str]] = []

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        self.log.append(("get", key))
        blob = self._inner.get(key, unless=unless)
        if blob is None:
            self.log[-1] = ("unchanged", key)
        return blob

    def download(self, key: str, target: str) -> ObjectInfo:
        self.log.append(("get", key))
        return self._inner.download(key, target)

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        self.log.append(("get", key))
        return self._inner.part(key, offset, size, etag=etag, take=take)

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        self.log.append(("put", key))
        return self._inner.put(key, body, when)

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        self.log.append(("delete", key))
        self._inner.delete(key, when)

    def head(self, key: str) -> ObjectInfo:
        self.log.append(("head", key))
        return self._inner.head(key)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self.log.append(("list", prefix))
        return self._inner.list(prefix)

    def directories(self, prefix: str) -> Sequence[str]:
        self.log.append(("list", prefix))
        return self._inner.directories(prefix)

    def verify(self) -> None:
        self.log.append(("verify", ""))
        self._inner.verify()


class World:
    """One datastore; ``bucket`` looks at it from outside."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.bucket = MemoryStore()
        self.faulty = FaultyStore(self.bucket)
        self.recorder = Recorder(self.faulty)

    def provider(self, **more: Any) -> ObjectStoreProvider:
        return ObjectStoreProvider(self.recorder, "@swampfs/memory", "memory", **more)

    def cache(self, name: str, namespace: str = "", **more: Any) -> Cache:
        return Cache(self, self.directory / name, namespace, **more)

    def fail(self, operation: str, key: str = "", **more: Any) -> Fault:
        fault = Fault(operation, key, **more)
        self.faulty.faults.append(fault)
        return fault

    def requests(self, fn: Callable[[], Any]) -> tuple[Any, list[tuple[str, str]]]:
        start = len(self.recorder.log)
        result = fn()
        return result, self.recorder.log[start:]

    def keys(self) -> set[str]:
        return set(self.bucket.objects)

    def body(self, key: str) -> bytes | None:
        found = self.bucket.objects.get(key)
        return found[0] if found else None

    def document(self, key: str) -> Any:
        body = self.body(key)
        return None if body is None else json.loads(body)

    def put(self, key: str, body: bytes | dict[str, Any]) -> None:
        self.bucket.put(key, body if isinstance(body, bytes) else compact(body))

    def load(self, files: dict[str, bytes], index: str) -> None:
        if index == "v1":
            load_monolith(Store(self.bucket), files.items())
        elif index == "v2":
            load_shards(Store(self.bucket), files.items())
        else:
            for rel, body in files.items():
                self.bucket.put(rel, body)

    def entries(self, namespace: str = "") -> dict[str, Any]:
        """Path → entry as readers of the current format find them."""
        head = f"{namespace}/" if namespace else ""
        meta = self.document(f"{head}_index/_meta.json")
        if meta is None or meta["version"] == 1:
            return (self.document(f"{head}.datastore-index.json") or {"entries": {}})["entries"]
        found: dict[str, Any] = {}
        for name in meta["partitions"]:
            found.update(self.document(f"{head}_index/{name}.json")["entries"])
        return found

    def check(self, namespace: str = "") -> None:
        """Index, shards and objects agree."""
        head = f"{namespace}/" if namespace else ""
        for rel, found in self.entries(namespace).items():
            body = self.body(head + rel)
            assert body is not None, f"{rel} dangles"
            assert entry(rel, body)["size"] == found["size"], rel
            assert found.get("sha256") in (None, entry(rel, body)["sha256"]), rel


class Cache:
    """One machine's cache directory and its service."""

    def __init__(self, world: World, directory: Path, namespace: str, **more: Any) -> None:
        self.world = world
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.namespace = namespace
        self.more = more
        self.provider = world.provider(**more)
        self.service: CacheSyncService = self.provider.create_sync_service("/repo", str(directory))

    def restart(self) -> None:
        """A new process on the same cache."""
        self.service.close()
        self.provider = self.world.provider(**self.more)
        self.service = self.provider.create_sync_service("/repo", str(self.directory))

    def do(self, call: str, *args: Any, **options: Any) -> Any:
        return trio.run(partial(getattr(self.service, call), *args, **options))

    @property
    def _ns(self) -> dict[str, str]:
        return {"namespace": self.namespace} if self.namespace else {}

    def pull(self, **options: Any) -> int:
        return self.do("pull_changed", **self._ns, **options)

    def push(self, **options: Any) -> int:
        return self.do("push_changed", **self._ns, **options)

    def prepare(self, **options: Any) -> Any:
        return self.do("prepare_push", **self._ns, **options)

    def commit(self, manifest: Any, **options: Any) -> int:
        return self.do("commit_push", manifest, **self._ns, **options)

    def mark(self, rel: str | None = None) -> None:
        self.do("mark_dirty", rel_path=self._full(rel) if rel else rel)

    def _full(self, rel: str) -> str:
        return f"{self.namespace}/{rel}" if self.namespace else rel

    def path(self, rel: str) -> Path:
        return self.directory / self._full(rel)

    def put(self, rel: str, body: bytes) -> None:
        """Write without a mark."""
        self.path(rel).parent.mkdir(parents=True, exist_ok=True)
        self.path(rel).write_bytes(body)

    def write(self, rel: str, body: bytes) -> None:
        self.mark(rel)
        self.put(rel, body)

    def remove(self, rel: str) -> None:
        self.mark(rel)
        self.path(rel).unlink()

    def read(self, rel: str) -> bytes | None:
        return self.path(rel).read_bytes() if self.path(rel).is_file() else None

    def files(self) -> set[str]:
        root = self.directory / self.namespace
        found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
        return {
            str(path)
            for path in found
            if path.parts[0] != "_index" and not path.name.startswith(".datastore-") and path.name != ".namespace.json"
        }

    @property
    def sidecar_path(self) -> Path:
        return self.directory / ".datastore-sync-state.json"

    def sidecar(self) -> dict[str, Any] | None:
        return json.loads(self.sidecar_path.read_text()) if self.sidecar_path.exists() else None

    def write_sidecar(self, **fields: Any) -> None:
        base = {"version": 2, "remoteIndexETag": "", "lastVerifiedAt": "", "localDirty": False}
        self.sidecar_path.write_text(json.dumps({**base, **fields}))

    def asides(self) -> list[bytes]:
        """Contents kept because they lost against others."""
        return [path.read_bytes() for path in (self.directory / "_index/conflicts").glob("*/content")]

    def forget_databases(self) -> None:
        """As a cache that the existing extensions filled."""
        self.service.close()
        for path in (self.directory / "_index").glob("*.db*"):
            os.unlink(path)
        self.restart()


__all__ = ["LATER", "MODEL", "STAMP", "AbortSignal", "Cache", "Fault", "When", "World", "compact", "entry"]
