"""A provider for any object store or directory: nine calls in, the whole contract out (spec §10.8)."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import TypeVar

from swampfs.backends.retry import RetryingStore
from swampfs.errors import SwampfsError
from swampfs.names import Keyspace, ModelRef
from swampfs.provider import (
    GLOBAL_LOCK,
    DatastoreHealthResult,
    LockOptions,
    NamespaceManifest,
    ObjectStore,
    RemoteIndex,
    ShardMap,
)
from swampfs.schemas import PULL_CONCURRENCY, PUSH_CONCURRENCY
from swampfs.state.sidecar import S3_FINGERPRINT
from swampfs.sync.cache.service import CacheSyncService
from swampfs.sync.clock import Skew, measure
from swampfs.sync.datastore_lock import DatastoreLock, HeldLocks
from swampfs.sync.drain import ModelLocks, as_writer, structurally
from swampfs.sync.examine import IndexReport, examine
from swampfs.sync.listing import ListingIndex
from swampfs.sync.locks import Lock, prove_preconditions
from swampfs.sync.migrate import ShardWriter
from swampfs.sync.namespaces import Namespaces
from swampfs.sync.object_index import ObjectIndex
from swampfs.sync.remote import Remote
from swampfs.sync.surgery import Moved, Surgery, move_namespace
from swampfs.threads import Lane, Threads

T = TypeVar("T")


class StoreVerifier:
    """:class:`~swampfs.provider.DatastoreVerifier`: one request to a bucket; a probe file in a directory."""

    def __init__(self, remote: Remote, type_name: str, place: str, *, is_directory: bool) -> None:
        self._remote = remote
        self._type = type_name
        self._place = place
        self._is_directory = is_directory

    async def verify(self) -> DatastoreHealthResult:
        started = time.monotonic()
        what = f"{'directory' if self._is_directory else f'{self._remote.label} bucket'} '{self._place}'"
        try:
            await self._remote.verify()
            if self._is_directory:
                probe = f".swamp-health-check-{uuid.uuid4()}"
                await self._remote.put(probe, b"")
                await self._remote.delete(probe)
        except SwampfsError as error:
            return self._result(started, f"Cannot access {what}: {error}.{_hint(error)}", healthy=False)
        except Exception as error:  # a verifier never raises (spec §10.6)
            return self._result(started, f"Cannot access {what}: {error!r}", healthy=False)
        return self._result(started, f"{what} is accessible", healthy=True)

    def _result(self, started: float, message: str, *, healthy: bool) -> DatastoreHealthResult:
        latency_ms = (time.monotonic() - started) * 1000
        details = {"path" if self._is_directory else "bucket": self._place}
        return DatastoreHealthResult(healthy, message, latency_ms, self._type, details)


def _hint(error: SwampfsError) -> str:
    return f" {error.remedy[0].upper()}{error.remedy[1:]}." if error.remedy else ""


class ObjectStoreProvider:
    """:class:`~swampfs.provider.DatastoreProvider` of one configured store.

    ``is_directory``: the objects are plain files that others use directly, so no index is ever written among them.
    """

    def __init__(
        self,
        store: ObjectStore,
        type_name: str,
        place: str,
        *,
        prefix: str = "",
        is_directory: bool = False,
        fingerprint_field: str = S3_FINGERPRINT,
        pull_concurrency: int = PULL_CONCURRENCY,
        push_concurrency: int = PUSH_CONCURRENCY,
    ) -> None:
        threads = Threads({Lane.HYDRATE: pull_concurrency, Lane.PUSH: push_concurrency})
        self._remote = Remote(RetryingStore(store), threads)
        self._type = type_name
        self._place = place
        self._keys = Keyspace(prefix)
        self._is_directory = is_directory
        self._fingerprint_field = fingerprint_field
        self._widths = (pull_concurrency, push_concurrency)
        self._held = HeldLocks()
        self._namespaces = Namespaces(self._remote, self._keys, newline=is_directory)

    def create_lock(self, datastore_path: str, options: LockOptions = GLOBAL_LOCK) -> DatastoreLock:
        key = self._keys.key(options.lock_key or self._keys.global_lock)
        return DatastoreLock(self._remote, key, options, self._held, trust_pids=self._is_directory)

    def create_verifier(self) -> StoreVerifier:
        return StoreVerifier(self._remote, self._type, self._place, is_directory=self._is_directory)

    def create_sync_service(self, repo_dir: str, cache_path: str) -> CacheSyncService:
        return CacheSyncService(
            self._remote,
            self._keys,
            self._index,
            cache_path,
            fingerprint_field=self._fingerprint_field,
            held=self._held,
            two_phase=not self._is_directory,  # a file put into a directory is published
            widths=self._widths,
        )

    async def examine_index(self, namespace: str) -> IndexReport:
        """Compare a namespace's index with its objects. Writes nothing."""
        return await examine(self._remote, self._keys._replace(namespace=namespace))

    async def prove_preconditions(self, namespace: str) -> None:
        """One request, which changes nothing in a store that honours them. Raises PreconditionsUnsupportedError."""
        key = self._keys._replace(namespace=namespace).data("_control/swampfs/precondition-probe")
        await prove_preconditions(self._remote, key)

    async def measure_clock(self, namespace: str) -> Skew | None:
        """This machine's clock against the datastore's; see :func:`swampfs.sync.clock.measure`."""
        return await measure(self._remote, self._keys._replace(namespace=namespace))

    async def migrate_index(self, namespace: str, options: LockOptions) -> ShardMap:
        """Version 1 → 2, or shards that agree with the objects (version 2), while nobody writes.

        Raises LockTimeoutError naming who does.
        """
        writer = ShardWriter(self._remote, self._keys._replace(namespace=namespace))
        return await self.structurally(namespace, options, writer.migrate)

    async def structurally(self, namespace: str, options: LockOptions, fn: Callable[[], Awaitable[T]]) -> T:
        """Run a structural command: under the namespace's global lock, with no model lock held by anybody."""
        keys = self._keys._replace(namespace=namespace)
        lock = self.create_lock("", options._replace(lock_key=Keyspace("", namespace).global_lock))
        return await structurally(ModelLocks(self._remote, keys), lock, options.max_wait_ms / 1000, fn)

    async def as_writer(
        self, namespace: str, model: ModelRef, options: LockOptions, fn: Callable[[], Awaitable[T]]
    ) -> T:
        """Run what changes a model: under its lock, with the global lock free. Raises LockTimeoutError."""
        keys = self._keys._replace(namespace=namespace)
        model_key = Keyspace("", namespace).model_lock(model)
        global_lock = Lock(self._remote, keys.global_lock, trust_pids=self._is_directory)
        model_lock = self.create_lock("", options._replace(lock_key=model_key))
        return await as_writer(model_lock, global_lock, options.max_wait_ms / 1000, fn)

    def model_locks(self, namespace: str) -> ModelLocks:
        """The model locks of a namespace, as others hold them."""
        return ModelLocks(self._remote, self._keys._replace(namespace=namespace))

    def resolve_datastore_path(self, repo_dir: str) -> str:
        return self._place if self._is_directory else os.path.join(repo_dir, ".swamp")

    def resolve_cache_path(self, repo_dir: str) -> str | None:
        return None

    async def register_namespace(self, namespace: str, repo_id: str) -> NamespaceManifest:
        return await self._namespaces.register(namespace, repo_id)

    async def list_namespaces(self) -> list[str]:
        return await self._namespaces.list()

    async def namespace_manifests(self) -> list[NamespaceManifest]:
        """Of all registered namespaces, with their owners."""
        return await self._namespaces.manifests()

    async def migrate_namespace(self, namespace: str, options: LockOptions, *, reverse: bool, preview: bool) -> Moved:
        """Move all files from the root into a namespace, or back, while nobody writes either.

        ``preview`` only tells what would be moved, and takes no lock. Raises NamespaceError, LockTimeoutError.
        """
        root, named = self.surgery(""), self.surgery(namespace)
        source, target = (named, root) if reverse else (root, named)

        async def move() -> Moved:
            return await move_namespace(source, target, preview=preview)

        if preview:
            return await move()
        return await self.structurally("", options, lambda: self.structurally(namespace, options, move))

    def surgery(self, namespace: str) -> Surgery:
        """The files of a namespace, for structural commands."""
        keys = self._keys._replace(namespace=namespace)
        return Surgery(self._remote, keys, self._index(keys))

    def _index(self, keys: Keyspace) -> RemoteIndex:
        return ListingIndex(self._remote, keys) if self._is_directory else ObjectIndex(self._remote, keys)
