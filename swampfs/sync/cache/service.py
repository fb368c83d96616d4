"""One cache's sync service: swamp's contract, call by call (spec §1.2, §4, §6–§8).

This class binds a namespace and joins the parts; each call is documented in :mod:`swampfs.provider` and implemented
where its name says.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from swampfs.errors import CacheError, HostileNameError, NamespaceError
from swampfs.names import Keyspace, ModelRef, RelPath, check_namespace, is_servable, rel_path
from swampfs.provider import (
    AbortSignal,
    ContaminationReport,
    ControlPlaneStore,
    ForeignCatalog,
    ForeignNamespace,
    PushManifest,
    PushPreview,
    RemoteIndex,
    ShardMap,
    SyncCapabilities,
    SyncContext,
)
from swampfs.state.manifest import Manifest
from swampfs.state.marks import MarkLog
from swampfs.state.schema import is_local_fault
from swampfs.state.sidecar import Sidecar
from swampfs.sync.cache.decide import covers_path
from swampfs.sync.cache.marks import MarkBook
from swampfs.sync.cache.parts import CacheParts, MakeIndex
from swampfs.sync.cache.pull import CachePuller
from swampfs.sync.cache.push import CachePusher
from swampfs.sync.cache.tree import OWN, CacheTree
from swampfs.sync.catalogs import Catalogs, encode_rows
from swampfs.sync.control import ControlRecords
from swampfs.sync.datastore_lock import HeldLocks
from swampfs.sync.locks import prove_preconditions
from swampfs.sync.migrate import ShardWriter
from swampfs.sync.namespaces import foreign_objects
from swampfs.sync.remote import Remote
from swampfs.threads import abort_signal


@dataclass(frozen=True, slots=True)
class _Bound:
    """The parts of one namespace."""

    parts: CacheParts
    book: MarkBook
    puller: CachePuller
    pusher: CachePusher


class CacheSyncService:
    """:class:`~swampfs.provider.DatastoreSyncService` over any object store or directory. Lives on a trio loop."""

    def __init__(
        self,
        remote: Remote,
        keys: Keyspace,
        make_index: MakeIndex,
        cache_path: str,
        *,
        fingerprint_field: str,
        held: HeldLocks,
        two_phase: bool,
        widths: tuple[int, int],
    ) -> None:
        self._remote = remote
        self._keys = keys._replace(namespace="")
        self._make_index = make_index
        self._root = os.path.abspath(cache_path)
        own = os.path.join(self._root, OWN)
        with _local_faults(self._root):
            os.makedirs(own, mode=0o700, exist_ok=True)
            self._sidecar = Sidecar(self._root, fingerprint_field, os.path.join(own, ".lock"))
            self._log = MarkLog(os.path.join(own, "marks.db"))
        self._book = MarkBook(self._log, self._sidecar, self._root, "")
        self._held = held
        self._two_phase = two_phase
        self._widths = widths
        self._namespace: str | None = None  # not bound yet
        self._bound: _Bound | None = None

    def close(self) -> None:
        """Close the databases. The service can be used no more."""
        self._log.close()
        if self._bound is not None:
            self._bound.parts.manifest.close()

    def capabilities(self) -> SyncCapabilities:
        return SyncCapabilities(
            scoped_sync=True,
            lazy_hydration=True,
            namespaced_sync=True,
            two_phase_sync=self._two_phase,
            control_plane=True,
            preview_push=True,
        )

    # --- pull and push ------------------------------------------------------------------------------------

    async def pull_changed(
        self,
        *,
        signal: AbortSignal | None = None,
        context: SyncContext | None = None,
        namespace: str | None = None,
        metadata_only: bool = False,
    ) -> int:
        bound = self._bind(namespace)
        models = [ModelRef(model.type, model.id) for model in context.models] if context else []
        with _heeding(signal), _local_faults(self._root):
            return await bound.puller.pull(models, bound.book.now(), signal, lazy=metadata_only)

    async def push_changed(
        self,
        *,
        signal: AbortSignal | None = None,
        context: SyncContext | None = None,
        namespace: str | None = None,
    ) -> int:
        bound = self._bind(namespace)
        with _heeding(signal), _local_faults(self._root):
            manifest = await bound.pusher.prepare(signal)
            return await bound.pusher.commit(manifest, signal)

    async def prepare_push(
        self,
        *,
        signal: AbortSignal | None = None,
        context: SyncContext | None = None,
        namespace: str | None = None,
    ) -> PushManifest:
        bound = self._bind(namespace)
        with _heeding(signal), _local_faults(self._root):
            return await bound.pusher.prepare(signal)

    async def commit_push(
        self, manifest: PushManifest, *, signal: AbortSignal | None = None, namespace: str | None = None
    ) -> int:
        bound = self._current(namespace)  # H27: never to the root because nothing was bound
        with _heeding(signal), _local_faults(self._root):
            return await bound.pusher.commit(manifest, signal)

    async def preview_push(self, *, signal: AbortSignal | None = None, namespace: str | None = None) -> PushPreview:
        bound = self._bind(namespace)
        with _heeding(signal), _local_faults(self._root):
            return await bound.pusher.preview()

    async def mark_dirty(self, *, rel_path: str | None = None) -> None:
        with _local_faults(self._root):
            self._book.mark(rel_path)

    # --- one file -----------------------------------------------------------------------------------------

    async def hydrate_file(self, rel_path: str, *, signal: AbortSignal | None = None) -> bool:
        """The path is relative to the cache: in a namespace it begins with it, and that is where the file goes (H9).

        Raises HostileNameError, IntegrityError, StoreError.
        """
        rel = self._inside(rel_path)
        if not is_servable(rel):
            return False  # internal, or a secret that somebody put there (lesson 49)
        bound = self._current(None)
        with _heeding(signal), _local_faults(self._root):
            await bound.parts.refresh(lambda name: covers_path(name, rel))
            bound.parts.tree.make()
            return await bound.puller.hydrate(rel, bound.book.now())

    # --- namespaces ---------------------------------------------------------------------------------------

    async def export_catalog(self, namespace: str, rows: Sequence[Mapping[str, Any]]) -> None:
        body = encode_rows(rows)
        digest = hashlib.sha256(body).hexdigest()
        if self._log.export(namespace) == digest:
            return
        await Catalogs(self._remote, self._keys).write(namespace, body)
        self._log.note_export(namespace, digest)
        self._sidecar.note_catalog_hash(digest)

    async def pull_foreign_catalogs(self, namespaces: Sequence[str]) -> list[ForeignCatalog]:
        return await Catalogs(self._remote, self._keys).read(namespaces)

    async def fetch_foreign_content(self, namespace: str, rel_path: str) -> bytes | None:
        return await Catalogs(self._remote, self._keys).content(namespace, rel_path)

    async def migrate_monolith_to_shards(self, *, namespace: str | None = None) -> ShardMap:
        bound = self._bind(namespace)
        self._held.check()
        return await ShardWriter(bound.parts.remote, bound.parts.keys).migrate()

    async def repair_namespace_contamination(
        self, *, namespace: str | None = None, dry_run: bool = True
    ) -> ContaminationReport:
        """Remove objects of other namespaces from this one, rebuild its index, and drop local copies (spec §8.6)."""
        bound = self._bind(namespace)
        if not bound.parts.keys.namespace:
            return ContaminationReport()
        count, keys = await foreign_objects(self._remote, bound.parts.keys)
        found = tuple(ForeignNamespace(name, count[name]) for name in sorted(count))
        if dry_run or not keys:
            return ContaminationReport(found, len(keys), 0)
        self._held.check()
        writer = ShardWriter(bound.parts.remote, bound.parts.keys)
        removed = await writer.remove_foreign(keys, frozenset(count))
        for name in count:
            bound.parts.tree.remove_tree(name)
        return ContaminationReport(found, len(keys), removed)

    def control_plane_store(self) -> ControlPlaneStore:
        return ControlRecords(self._remote, self._keys._replace(namespace=self._namespace or ""))

    # --- binding ------------------------------------------------------------------------------------------

    def _bind(self, namespace: str | None) -> _Bound:
        wanted = namespace or ""
        if self._namespace is None:
            if wanted:
                check_namespace(wanted)
            self._namespace = wanted
            if self._bound is not None and self._bound.parts.keys.namespace != wanted:
                self._bound.parts.manifest.close()
                self._bound = None
        elif self._namespace != wanted:
            raise NamespaceError(
                f"Namespace mismatch: bound to {self._namespace or 'none'} but called with {wanted or 'none'}",
                remedy="make another service for another namespace",
            )
        return self._made(wanted)

    def _current(self, namespace: str | None) -> _Bound:
        """For calls that do not bind: the bound namespace, else the one given, else none."""
        if namespace is not None or self._namespace is not None:
            return self._bind(namespace if namespace is not None else self._namespace)
        return self._made("")

    def _made(self, namespace: str) -> _Bound:
        if self._bound is None:
            with _local_faults(self._root):
                self._bound = self._make(namespace)
        return self._bound

    def _make(self, namespace: str) -> _Bound:
        keys = self._keys._replace(namespace=namespace)
        index: RemoteIndex = self._make_index(keys)
        tree = CacheTree(self._root, namespace)
        tree.make()
        tree.clear_staging()
        manifest = Manifest(
            os.path.join(self._root, OWN, f"ns-{namespace}.db" if namespace else "solo.db"),
            f"{self._remote.name}|{self._keys.prefix}",
        )
        pull_width, push_width = self._widths
        parts = CacheParts(self._remote, keys, index, tree, manifest, self._sidecar, pull_width, push_width)
        book = MarkBook(self._log, self._sidecar, self._root, namespace)

        async def prove() -> None:
            if self._two_phase and not self._log.is_proven(self._remote.name):
                await prove_preconditions(self._remote, keys.data("_control/swampfs/precondition-probe"))
                self._log.note_proven(self._remote.name)

        return _Bound(
            parts, book, CachePuller(parts, book), CachePusher(parts, book, check_locks=self._held.check, prove=prove)
        )

    def _inside(self, path: str) -> RelPath:
        """A cache-relative path as one of the namespace."""
        rel = rel_path(path)
        head = f"{self._namespace}/" if self._namespace else ""
        if head and not rel.startswith(head):
            raise HostileNameError(f"{path} is not in the namespace {self._namespace}, which this service is bound to")
        return RelPath(rel.removeprefix(head))


@contextmanager
def _local_faults(root: str) -> Iterator[None]:
    """Raises CacheError for whatever this machine's disk or databases refuse."""
    try:
        yield
    except Exception as error:
        if not is_local_fault(error):
            raise
        where = getattr(error, "filename", None) or root
        reason = getattr(error, "strerror", None) or str(error)
        raise CacheError(f"the cache {root} cannot be used: {where}: {reason}") from error


@contextmanager
def _heeding(signal: AbortSignal | None) -> Iterator[None]:
    """Requests and retry pauses of this call end when the signal is raised. Raises AbortedError at once if it is."""
    if signal is None:
        yield
        return
    signal.check()
    token = abort_signal.set(signal)
    try:
        yield
    finally:
        abort_signal.reset(token)
