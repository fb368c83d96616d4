"""The ports: what the engine asks of a store, and what a datastore offers its users.

Narrow on purpose — nine calls make a backend (``design/architecture.md`` §2). Implementations of
:class:`ObjectStore` are blocking and thread-safe and raise only :mod:`swampfs.errors`.
"""

from __future__ import annotations

import builtins
import re
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel

from swampfs.errors import AbortedError, DatastoreTypeError
from swampfs.names import ModelRef, RelPath
from swampfs.records import IndexDelta, IndexEntry, LockInfo, Watermark

T = TypeVar("T")

# --- downward: what the engine asks of a store -----------------------------------------------------------


class ObjectInfo(NamedTuple):
    key: str
    size: int
    etag: str  # opaque; quotes stripped
    last_modified: str  # wire timestamp of the store's clock; '' where only `head` and `list` tell


Take = Callable[[int, memoryview], object]
"""Is given bytes as they come, each time with their offset in the object. They are gone when it returns."""


class Blob(NamedTuple):
    body: bytes
    info: ObjectInfo

    def given(self, offset: int, take: Take | None) -> Blob:
        """Itself; or without its body, which was given to ``take``."""
        if take is None:
            return self
        take(offset, memoryview(self.body))
        return self._replace(body=b"")


class Precondition(NamedTuple):
    """When a put or delete may take effect. The store refuses with ``PreconditionError`` otherwise."""

    absent: bool = False
    etag: str | None = None


ALWAYS = Precondition()
ABSENT = Precondition(absent=True)


def matching(etag: str) -> Precondition:
    return Precondition(etag=etag)


class ObjectStore(Protocol):
    """A flat map from keys to bytes. Every call may raise ``StoreError`` and its subclasses.

    ``AbsentError`` means a definite 404 of that key and nothing else (architecture rule 4).
    """

    name: str
    """For messages: scheme and bucket or directory, never credentials."""
    label: str
    """For messages: what kind of store this is, such as ``S3``."""
    authenticated: bool
    """Whether what is read cannot have been changed on the way: TLS, or no network."""

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        """Whole body, for small objects. ``None`` if the object still has the ETag ``unless``."""

    def download(self, key: str, target: str) -> ObjectInfo:
        """Write the body to the file ``target``, truncating it; a failed call leaves garbage there."""

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        """So many bytes from somewhere within an object, and its ETag; if none was given, also the size of the whole.

        ``take`` is given the bytes instead of the blob, in order, as early as the store can; from the first again if
        the request is repeated. Raises PreconditionError if it does not have that ETag, and what ``take`` raises.
        """

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        """Store bytes, or the file at a path. Durable and visible to every reader on return."""

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        """Remove; an absent key is success (H40) unless an ETag was demanded."""

    def head(self, key: str) -> ObjectInfo:
        """Raises AbsentError."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every key that starts with ``prefix``, to the last page, keys ascending."""

    def directories(self, prefix: str) -> Sequence[str]:
        """Next segments of keys that go on below them: ``a`` for ``{prefix}a/b``. A prefix is empty or ends in ``/``.

        Ascending, and without reading what is below them if the store can.
        """

    def verify(self) -> None:
        """Raise the error that explains why the store cannot be used, if it cannot."""


class Probed(Protocol):
    """A driver that can say how long it has heard nothing, and give up what waits in vain."""

    def probe(self, timeout_s: float) -> None:
        """One request on a new connection. Raises StoreUnreachableError if it is not answered in time."""

    def silent_s(self) -> float:
        """For how long the request that waits longest has heard nothing; 0 if none is under way."""

    def end_silent(self, since: float) -> None:
        """End requests that have heard nothing since a monotonic time, as if their connections had been reset."""


class IndexTransaction(Protocol):
    """A read-merge-write of the remote index, fenced by conditional writes where the store has them."""

    def entry(self, path: RelPath) -> IndexEntry | None:
        """The remote entry of a path as of the transaction's begin."""

    in_place: bool
    """Whether the objects are their own index, so that each put and delete takes effect at once."""

    def internal(self) -> list[RelPath]:
        """Entries that should never have been indexed and may be taken out with this commit (spec §5.1)."""

    def precondition(self, path: RelPath) -> Precondition:
        """Under which the path's object may be put or deleted as this transaction decided."""

    async def commit(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> IndexDelta | None:
        """Publish. The result is the full new content of the touched partitions, if there are partitions."""


class RemoteIndex(Protocol):
    """Which files the datastore holds."""

    in_place: bool
    """Whether the objects are their own index, so that each put and delete takes effect at once."""

    async def poll(self, known: Watermark, partitions: Mapping[str, str]) -> IndexDelta | None:
        """What changed since ``known`` (partition name → ETag). ``None`` = nothing."""

    async def poll_some(
        self, known: Watermark, partitions: Mapping[str, str], wanted: Callable[[str], bool]
    ) -> IndexDelta | None:
        """As :meth:`poll`, reading no other partitions than wanted where the index has several."""

    async def begin(
        self, paths: Mapping[RelPath, str | None], known: Watermark, parked: Sequence[IndexEntry] = ()
    ) -> IndexTransaction:
        """Read what a commit of ``paths`` (→ partition last seen in) will touch."""


# --- upward: what a datastore offers its users -----------------------------------------------------------


class AbortSignal:
    """A caller's wish to stop, checked before each batch, each request and each retry (spec §10.7). Thread-safe."""

    def __init__(self) -> None:
        self._raised = threading.Event()
        self.reason = "Aborted"

    def abort(self, reason: str = "Aborted") -> None:
        self.reason = reason
        self._raised.set()

    @property
    def aborted(self) -> bool:
        return self._raised.is_set()

    def check(self) -> None:
        """Raises AbortedError with the reason, if raised."""
        if self._raised.is_set():
            raise AbortedError(self.reason)

    def wait(self, timeout_s: float) -> bool:
        """Sleep, at most until raised; returns whether it was."""
        return self._raised.wait(timeout_s)


class SyncCapabilities(NamedTuple):
    """What a sync service can do beyond pull and push."""

    scoped_sync: bool = False
    lazy_hydration: bool = False
    namespaced_sync: bool = False
    two_phase_sync: bool = False
    control_plane: bool = False
    preview_push: bool = False


class SyncContext(NamedTuple):
    """Models a pull is wanted for; empty = everything."""

    models: tuple[ModelRef, ...] = ()


class PushPreview(NamedTuple):
    """What a push would do (spec §7.4)."""

    total: int
    new: int
    changed: int
    deleted: int


class PushManifest(NamedTuple):
    """Opaque result of ``prepare_push``: in-process only, never serialised (spec §7.3)."""

    new_entries: Mapping[RelPath, IndexEntry]
    deleted_keys: tuple[RelPath, ...]
    pushed: int
    deleted: int
    dirty_partition_keys: frozenset[str]
    private: object = None
    """The service's own notes: what each change was decided on, and which marks it fulfils."""


class ForeignCatalog(NamedTuple):
    namespace: str
    rows: list[Any]


class ForeignNamespace(NamedTuple):
    namespace: str
    object_count: int


class ContaminationReport(NamedTuple):
    """Objects of other namespaces found inside one (spec §8.6)."""

    foreign_namespaces: tuple[ForeignNamespace, ...] = ()
    total_foreign_objects: int = 0
    deleted: int = 0


class ShardMap(NamedTuple):
    """Partition meta as a migration leaves it."""

    version: int
    partitions: tuple[str, ...]
    commit_seq: int


class LockOptions(NamedTuple):
    """Spec §9.1. ``lock_key`` empty = the global lock of solo mode. Times in milliseconds."""

    lock_key: str = ""
    ttl_ms: int = 30_000
    retry_interval_ms: int = 1_000
    max_wait_ms: int = 60_000


GLOBAL_LOCK = LockOptions()


class DistributedLock(Protocol):
    """Swamp's lock contract (spec §9)."""

    async def acquire(self) -> None:
        """Raises LockTimeoutError naming the holder."""

    async def release(self) -> None:
        """Idempotent; never raises; never removes a successor's lock."""

    async def with_lock(self, fn: Callable[[], Awaitable[T]]) -> T:
        """Acquire, run, always release; returns what ``fn`` returned."""

    async def inspect(self) -> LockInfo | None:
        """Current holder. ``None`` only if there definitely is none (H17)."""

    async def force_release(self, nonce: str) -> bool:
        """Remove the lock of that acquisition; ``False`` if it is another's, or none."""


class DatastoreHealthResult(NamedTuple):
    healthy: bool
    message: str
    latency_ms: float
    datastore_type: str
    details: Mapping[str, str] = MappingProxyType({})


class DatastoreVerifier(Protocol):
    async def verify(self) -> DatastoreHealthResult:
        """Reach the datastore. Never raises (spec §10.6)."""


class ControlPlaneStore(Protocol):
    """Small records beside the data that bypass index and cache (spec §1.10)."""

    async def put(self, key: str, body: bytes) -> None: ...

    async def get(self, key: str) -> bytes | None: ...

    async def delete(self, key: str) -> None:
        """Idempotent."""

    async def list(self, prefix: str) -> list[str]:
        """Keys that start with ``prefix``."""

    async def put_if_absent(self, key: str, body: bytes) -> bool:
        """Whether this call stored the record."""


class DatastoreSyncService(Protocol):
    """Cache directory ⇄ datastore. Counts are files. Every call may raise StoreError and its subclasses.

    The first call that names a namespace binds it; a later different one raises NamespaceError (spec §1.2).
    """

    def capabilities(self) -> SyncCapabilities: ...

    async def pull_changed(
        self,
        *,
        signal: AbortSignal | None = None,
        context: SyncContext | None = None,
        namespace: str | None = None,
        metadata_only: bool = False,
    ) -> int:
        """Bring the cache up to date; returns how many files were downloaded."""

    async def push_changed(
        self,
        *,
        signal: AbortSignal | None = None,
        context: SyncContext | None = None,
        namespace: str | None = None,
    ) -> int:
        """Publish what is dirty; returns pushed + deleted. The caller holds the global lock."""

    async def mark_dirty(self, *, rel_path: str | None = None) -> None:
        """Durable before return: this cache path, or anything at all, is about to change. No network."""

    async def hydrate_file(self, rel_path: str, *, signal: AbortSignal | None = None) -> bool:
        """Bring one file (cache-relative path) into the cache; ``False`` if it does not exist."""

    async def prepare_push(
        self,
        *,
        signal: AbortSignal | None = None,
        context: SyncContext | None = None,
        namespace: str | None = None,
    ) -> PushManifest:
        """Upload content without touching the index or the dirty marks."""

    async def commit_push(
        self, manifest: PushManifest, *, signal: AbortSignal | None = None, namespace: str | None = None
    ) -> int:
        """Publish what ``prepare_push`` uploaded. The caller holds the global lock."""

    async def preview_push(self, *, signal: AbortSignal | None = None, namespace: str | None = None) -> PushPreview:
        """What ``push_changed`` would do. Changes nothing anywhere."""

    async def export_catalog(self, namespace: str, rows: Sequence[Mapping[str, Any]]) -> None: ...

    async def pull_foreign_catalogs(self, namespaces: Sequence[str]) -> list[ForeignCatalog]: ...

    async def fetch_foreign_content(self, namespace: str, rel_path: str) -> bytes | None: ...

    async def migrate_monolith_to_shards(self, *, namespace: str | None = None) -> ShardMap: ...

    async def repair_namespace_contamination(
        self, *, namespace: str | None = None, dry_run: bool = True
    ) -> ContaminationReport: ...

    def control_plane_store(self) -> ControlPlaneStore: ...


class NamespaceManifest(NamedTuple):
    """``{ns}/.namespace.json`` (spec §1.7)."""

    namespace: str
    repo_id: str
    registered_at: str


class DatastoreProvider(Protocol):
    """One configured datastore. Making it validates the configuration and touches no network."""

    def create_lock(self, datastore_path: str, options: LockOptions = GLOBAL_LOCK) -> DistributedLock: ...

    def create_verifier(self) -> DatastoreVerifier: ...

    def create_sync_service(self, repo_dir: str, cache_path: str) -> DatastoreSyncService: ...

    def resolve_datastore_path(self, repo_dir: str) -> str: ...

    def resolve_cache_path(self, repo_dir: str) -> str | None:
        """Where the cache must be; ``None`` = the caller's choice, normally ``~/.swamp/repos/{repoId}``."""

    async def register_namespace(self, namespace: str, repo_id: str) -> NamespaceManifest: ...

    async def list_namespaces(self) -> list[str]: ...


RESERVED_COLLECTIVES = frozenset({"swamp", "si"})
_TYPE = re.compile(r"^@?[a-z][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*$")


class DatastoreType(NamedTuple):
    """What a datastore extension exports."""

    type: str
    name: str
    description: str
    config_schema: builtins.type[BaseModel]
    create_provider: Callable[[Mapping[str, Any]], DatastoreProvider]


def check_type_name(name: str) -> str:
    """Raises DatastoreTypeError for a name that is not ``collective/name`` (spec §10.8)."""
    if not _TYPE.match(name):
        raise DatastoreTypeError(
            f"{name!r} is not a datastore type", remedy="write it like @acme/object-store, in lower case"
        )
    return name
