"""A datastore from its source: driver + trace + retry + index + locks, composed in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from cachetools import LRUCache

from swampfs.backends.circuit import CircuitStore
from swampfs.backends.filesystem import FilesystemStore
from swampfs.backends.retry import RetryingStore
from swampfs.backends.s3 import S3Store
from swampfs.backends.trace import TracingStore
from swampfs.names import Keyspace
from swampfs.provider import ObjectStore, RemoteIndex
from swampfs.settings import Backend, Source
from swampfs.sync.listing import ListingIndex
from swampfs.sync.locks import TTL_MS, Lock, Sighting, prove_preconditions
from swampfs.sync.object_index import ObjectIndex
from swampfs.sync.remote import Remote
from swampfs.sync.service import MakeLock
from swampfs.threads import Threads

_SIGHTINGS = 4096  # locks of others whose movement we remember at once
_LOCK_PATIENCE_S = 5.0  # a held model lock is asked for again by the next push
_LOCK_RETRY_S = 0.3  # a user is waiting


@dataclass(frozen=True, slots=True)
class Datastore:
    """What a sync service needs of one datastore."""

    remote: Remote
    keys: Keyspace
    index: RemoteIndex
    trace: TracingStore
    circuit: CircuitStore
    make_lock: MakeLock
    prove: Callable[[], Awaitable[None]] | None
    make_index: Callable[[Keyspace], RemoteIndex]

    def in_namespace(self, name: str) -> Datastore:
        """Another namespace of the same store, through the same connections."""
        keys = self.keys._replace(namespace=name)
        return replace(self, keys=keys, index=self.make_index(keys))


def open_datastore(
    source: Source,
    threads: Threads,
    *,
    trace_file: str | None = None,
    directory: str | None = None,
    lock_ttl_ms: int = TTL_MS,
) -> Datastore:
    """Build the stack for a source. No request is made.

    ``directory`` replaces a file-system source's path when that has been mounted over.
    Raises SettingsError or CredentialsError.
    """
    keys = Keyspace(source.prefix, source.namespace)
    is_plain = source.backend is Backend.FILESYSTEM
    driver = FilesystemStore(directory or source.directory) if is_plain else _driver(source)
    trace = TracingStore(driver, trace_file)
    circuit = CircuitStore(trace, driver if isinstance(driver, S3Store) else None)
    remote = Remote(RetryingStore(circuit), threads)
    sightings: LRUCache[str, Sighting] = LRUCache(_SIGHTINGS)

    def make_lock(key: str, note: Callable[[str, str | None], None]) -> Lock:
        return Lock(
            remote,
            key,
            ttl_ms=lock_ttl_ms,
            max_wait_s=_LOCK_PATIENCE_S,
            retry_s=_LOCK_RETRY_S,
            trust_pids=is_plain,
            sightings=sightings,
            note=note,
        )

    def make_index(keys: Keyspace) -> RemoteIndex:
        return ListingIndex(remote, keys) if is_plain else ObjectIndex(remote, keys)

    async def prove() -> None:
        await prove_preconditions(remote, keys.data("_control/swampfs/precondition-probe"))

    return Datastore(remote, keys, make_index(keys), trace, circuit, make_lock, None if is_plain else prove, make_index)


def _driver(source: Source) -> ObjectStore:
    if source.backend is Backend.S3:
        return S3Store(source)
    from swampfs.backends.gcs import GcsStore  # half a second of imports that S3 users do without

    return GcsStore(source)
