"""Publishing local changes: content, then index, then deletes, each under the right lock.

One push takes a batch of models. For each, the model lock is taken and the global lock checked (spec §9.4); the
remote entries of its dirty paths are compared with what the changes were based on; content is uploaded, ``latest``
markers last; the index is committed under the global lock; deleted objects are removed; and exactly the uploaded
generations are retired. A path that another machine changed meanwhile is a conflict: the remote version stays, ours
is kept under ``state/conflicts/`` (architecture rule 2).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from swampfs.errors import LockTimeoutError, SwampfsError
from swampfs.names import ModelRef, RelPath, home_partition, is_latest_marker, is_publishable, partition_key
from swampfs.provider import IndexTransaction
from swampfs.records import DirtyPath, IndexEntry, IndexMode, Op, PushReport, TreeChange, timestamp
from swampfs.state.apply import apply_delta
from swampfs.sync.hydrate import hash_file
from swampfs.sync.index import MONOLITH
from swampfs.sync.locks import Lock, hold, prove_exclusive_create, wait_until_free
from swampfs.sync.parallel import for_each
from swampfs.sync.parts import Parts
from swampfs.threads import Lane

_UPLOADS_AT_ONCE = 16
_EXCLUSIVE_PROVEN = "exclusive_create_proven"


@dataclass(slots=True)
class _Batch:
    """One push in progress."""

    records: list[DirtyPath]
    uploads: list[DirtyPath] = field(default_factory=list)
    deletes: list[DirtyPath] = field(default_factory=list)
    conflicts: list[DirtyPath] = field(default_factory=list)
    settled: list[DirtyPath] = field(default_factory=list)  # already true in the remote
    entries: list[IndexEntry] = field(default_factory=list)
    changes: list[TreeChange] = field(default_factory=list)


class Pusher:
    """Pushes journaled changes of one datastore. Only one push runs at a time (the writeback task)."""

    def __init__(self, parts: Parts, *, make_lock: Callable[[str], Lock], fenced: bool, lock_timeout_s: float) -> None:
        self._remote = parts.remote
        self._keys = parts.keys
        self._index = parts.index
        self._catalog = parts.catalog
        self._cache = parts.cache
        self._journal = parts.journal
        self._make_lock = make_lock
        self._fenced = fenced  # the store has object preconditions worth proving
        self._lock_timeout_s = lock_timeout_s

    async def push(
        self, paths: Iterable[str], models: Collection[ModelRef], is_open: Callable[[str], bool]
    ) -> tuple[PushReport, list[TreeChange]]:
        """Push the given journaled paths under the locks of ``models``.

        Paths still open for writing wait for their close. Returns what was done and what the kernel must forget.

        Raises:
            LockTimeoutError: the global lock is held; nothing was uploaded or nothing was committed.
            LeaseLostError, StoreError: nothing was committed; the journal stands, the same push can be repeated.
        """
        waiting: list[ModelRef] = []
        async with AsyncExitStack() as locks:
            held: list[Lock] = []
            for model in sorted(models):
                lock = self._make_lock(self._keys.model_lock(model))
                try:
                    held.append(await locks.enter_async_context(hold(lock)))
                except LockTimeoutError:
                    waiting.append(model)
            if held:
                await self._prove_exclusive(held[0])
                await wait_until_free(self._make_lock(self._keys.global_lock), self._lock_timeout_s)
            ready, still_open = [], []
            for path in paths:
                if is_open(path):
                    still_open.append(path)
                elif is_publishable(path):
                    ready.append(path)
            batch = _Batch(self._journal.seal(ready))
            try:
                await self._run(batch, held)
            finally:
                self._journal.unseal(record.path for record in batch.records)
        report = PushReport(
            pushed=len(batch.entries),
            deleted=len(batch.deletes),
            conflicts=tuple(record.path for record in batch.conflicts),
            waiting=tuple(waiting),
            open_files=tuple(still_open),
        )
        return report, batch.changes

    async def _run(self, batch: _Batch, held: Sequence[Lock]) -> None:
        if not batch.records:
            return
        parked = self._lost_parked()
        known = self._catalog.watermark()
        hints = {record.path: record.partition for record in batch.records}
        epoch = self._catalog.epoch
        transaction = await self._index.begin(hints, known, parked)
        self._sort(batch, transaction)
        await self._upload(batch)
        if batch.entries or batch.deletes or parked:
            global_lock = self._make_lock(self._keys.global_lock)
            async with hold(global_lock):
                if not held:
                    await self._prove_exclusive(global_lock)
                for lock in (*held, global_lock):
                    lock.check()
                delta = await transaction.commit(batch.entries, [record.path for record in batch.deletes])
                await self._delete_objects(batch.deletes)
            overtaken = epoch != self._catalog.epoch
            self._settle(batch, parked)
            if overtaken:
                self._catalog.set_watermark(known._replace(meta_etag="", monolith_etag=""))  # look again
            elif delta is not None:
                applied = apply_delta(self._catalog, delta, self._journal)
                for path in applied.stale:
                    self._cache.remove(path)
                batch.changes.extend(applied.changes)
        else:
            self._settle(batch, parked)
        self._keep_conflicts(batch, transaction)

    def _sort(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """Decide for each record: upload, delete, already done, or conflict."""
        for record in batch.records:
            current = transaction.entry(record.path)
            unchanged = current is None if record.base is None else record.base.same_content(current)
            if record.op is Op.DELETE:
                if current is None:
                    batch.settled.append(record)
                else:
                    (batch.deletes if unchanged else batch.conflicts).append(record)
            elif unchanged or self._holds_same(record, current):
                batch.uploads.append(record)
            else:
                batch.conflicts.append(record)

    def _holds_same(self, record: DirtyPath, current: IndexEntry | None) -> bool:
        """Two machines that wrote the same bytes do not conflict (lesson 4: compare content, not times)."""
        if current is None:
            return True  # removed there, rewritten here: content wins over absence
        stat = self._cache.stat(record.path)
        if stat is None or stat.st_size != current.size or current.sha256 is None:
            return False
        return hash_file(self._cache.path(record.path)) == current.sha256

    # --- content ------------------------------------------------------------------------------------------

    async def _upload(self, batch: _Batch) -> None:
        markers = [record for record in batch.uploads if is_latest_marker(record.path)]
        content = [record for record in batch.uploads if not is_latest_marker(record.path)]
        for group in (content, markers):
            errors = await for_each(group, lambda record: self._upload_one(batch, record), at_once=_UPLOADS_AT_ONCE)
            if errors:
                raise _upload_error(errors, len(group), self._remote.name)

    async def _upload_one(self, batch: _Batch, record: DirtyPath) -> None:
        """Upload a private copy, so that size, hash and bytes are of one moment (H26)."""
        staged = self._cache.stage()
        source = self._cache.path(record.path)
        key = self._keys.data(record.path)

        def transfer() -> IndexEntry:
            mtime_ns = _snapshot(source, staged)
            size, sha256 = os.stat(staged).st_size, hash_file(staged)
            info = self._remote.store.put(key, staged)
            return IndexEntry(record.path, size, info.last_modified, timestamp(mtime_ns), sha256)

        try:
            batch.entries.append(await self._remote.threads.write(Lane.PUSH, transfer))
        except FileNotFoundError:
            batch.uploads.remove(record)  # removed or renamed since: its newer journal record says what to do
        finally:
            if os.path.lexists(staged):
                os.unlink(staged)

    async def _delete_objects(self, deletes: Sequence[DirtyPath]) -> None:
        """After the commit (H20): a crash in between leaves unlisted objects, never dangling entries."""
        errors = await for_each(
            deletes, lambda record: self._remote.delete(self._keys.data(record.path)), at_once=_UPLOADS_AT_ONCE
        )
        if errors:
            raise errors[0]

    # --- afterwards ---------------------------------------------------------------------------------------

    def _settle(self, batch: _Batch, parked: Sequence[IndexEntry]) -> None:
        """Retire what was committed, exactly; then let the catalog agree."""
        entries = {entry.path: entry for entry in batch.entries}
        done: list[tuple[DirtyPath, IndexEntry | None, str | None]] = []
        for record in batch.uploads:
            done.append((record, entries[record.path], self._partition(record.path)))
        done += [(record, None, None) for record in (*batch.deletes, *batch.settled)]
        retired = self._journal.retire(done)
        self._catalog.epoch += 1
        with self._catalog.transaction():
            for record, entry, partition in done:
                if entry is not None and partition is not None:
                    self._catalog.settle(entry, partition, clean=record.path in retired)
            if self._catalog.watermark().mode is IndexMode.SHARDS:
                fresh = [entry.path for entry in batch.entries if partition_key(entry.path) is None]
                self._catalog.park([*fresh, *(entry.path for entry in parked)])
                self._catalog.unpark(record.path for record in batch.deletes)

    def _partition(self, path: RelPath) -> str:
        """Partition that holds a path's entry after a commit."""
        return home_partition(path) if self._catalog.watermark().mode is IndexMode.SHARDS else MONOLITH

    def _lost_parked(self) -> list[IndexEntry]:
        """Entries we parked in ``_root`` that another writer dropped; they are put back with this commit (H6)."""
        entries = []
        for path in self._catalog.parked(lost_only=True):
            node = self._catalog.at(path)
            if node is not None and node.base is not None and path not in self._journal:
                entries.append(node.base)
        return entries

    def _keep_conflicts(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """The remote version stays in the tree; our bytes go aside with a report. Never dropped."""
        for record in batch.conflicts:
            current = transaction.entry(record.path)
            report: dict[str, object] = {
                "path": record.path,
                "operation": record.op.value,
                "keptAt": timestamp(time.time_ns()),
                "base": record.base._asdict() if record.base else None,
                "remote": current._asdict() if current else None,
            }
            self._cache.set_conflict_aside(record.path, report)
            self._journal.retire([(record, None, None)])
            node = self._catalog.at(record.path)
            partition = self._partition(record.path)
            with self._catalog.transaction():
                if node is not None:
                    self._catalog.reset_to_remote(node, current, partition)
                    batch.changes.append(TreeChange(node.parent, node.name, node.ino, content=True))
                elif current is not None:
                    parent = self._catalog.make_parents(record.path)
                    ino = self._catalog.add_remote(parent, current, partition, time.time_ns())
                    batch.changes.append(TreeChange(parent, record.path.rpartition("/")[2], ino, content=False))

    async def _prove_exclusive(self, lock: Lock) -> None:
        """Once per state directory: see that creating a lock twice is refused."""
        if self._fenced and self._catalog.fact(_EXCLUSIVE_PROVEN) is None:
            await prove_exclusive_create(self._remote, lock)
            self._catalog.set_fact(_EXCLUSIVE_PROVEN, timestamp(time.time_ns()))


def _snapshot(source: str, target: str) -> int:
    """Copy a file's bytes as of one moment; returns its modification time in ns. Raises FileNotFoundError."""
    reader = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        writer = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            while os.copy_file_range(reader, writer, 1 << 30):
                pass
        finally:
            os.close(writer)
        return os.fstat(reader).st_mtime_ns
    finally:
        os.close(reader)


def _upload_error(errors: Sequence[Exception], total: int, where: str) -> Exception:
    """One error for a batch, keeping the class — and so errno and retryability — of the first."""
    first = errors[0]
    if not isinstance(first, SwampfsError):
        return first
    return type(first)(f"{len(errors)} of {total} uploads to {where} failed: {first}", remedy=first.remedy)
