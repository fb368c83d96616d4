"""The ports: what the engine asks of a store, and what a datastore offers its users.

Narrow on purpose — seven calls make a backend (``design/architecture.md`` §2). Implementations of
:class:`ObjectStore` are blocking and thread-safe and raise only :mod:`swampfs.errors`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

from swampfs.names import RelPath
from swampfs.records import IndexDelta, IndexEntry, LockInfo, Watermark


class ObjectInfo(NamedTuple):
    key: str
    size: int
    etag: str  # opaque; quotes stripped
    last_modified: str  # wire timestamp of the store's clock


class Blob(NamedTuple):
    body: bytes
    info: ObjectInfo


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

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        """Whole body, for small objects. ``None`` if the object still has the ETag ``unless``."""

    def download(self, key: str, target: str) -> ObjectInfo:
        """Write the body to the file ``target``, truncating it; a failed call leaves garbage there."""

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        """Store bytes, or the file at a path. Durable and visible to every reader on return."""

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        """Remove; an absent key is success (H40) unless an ETag was demanded."""

    def head(self, key: str) -> ObjectInfo:
        """Raises AbsentError."""

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Every key that starts with ``prefix``, to the last page, keys ascending."""

    def verify(self) -> None:
        """Raise the error that explains why the store cannot be used, if it cannot."""


class IndexTransaction(Protocol):
    """A read-merge-write of the remote index, fenced by conditional writes where the store has them."""

    def entry(self, path: RelPath) -> IndexEntry | None:
        """The remote entry of a path as of the transaction's begin."""

    in_place: bool
    """Whether the objects are their own index, so that each put and delete takes effect at once."""

    def precondition(self, path: RelPath) -> Precondition:
        """Under which the path's object may be put or deleted as this transaction decided."""

    async def commit(self, puts: Sequence[IndexEntry], deletes: Sequence[RelPath]) -> IndexDelta | None:
        """Publish. The result is the full new content of the touched partitions, if there are partitions."""


class RemoteIndex(Protocol):
    """Which files the datastore holds."""

    async def poll(self, known: Watermark, partitions: Mapping[str, str]) -> IndexDelta | None:
        """What changed since ``known`` (partition name → ETag). ``None`` = nothing."""

    async def begin(
        self, paths: Mapping[RelPath, str | None], known: Watermark, parked: Sequence[IndexEntry] = ()
    ) -> IndexTransaction:
        """Read what a commit of ``paths`` (→ partition last seen in) will touch."""


class DistributedLock(Protocol):
    """Swamp's lock contract (spec §9), in snake_case."""

    async def acquire(self) -> None:
        """Raises LockTimeoutError naming the holder."""

    async def release(self) -> None:
        """Idempotent; never raises; never removes a successor's lock."""

    async def inspect(self) -> LockInfo | None:
        """Current holder. ``None`` only if there definitely is none (H17)."""

    async def force_release(self, nonce: str) -> bool: ...
