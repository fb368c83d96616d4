"""Publishing local changes: content, then index, then deletes, each under the right lock.

One push takes a batch of paths under the leases that cover them (:mod:`swampfs.sync.leases`, spec §9.4); the
remote entries of its dirty paths are compared with what the changes were based on; content is uploaded, ``latest``
markers last; the index is committed under the global lock; deleted objects are removed; and exactly the uploaded
generations are retired. A path that another machine changed meanwhile is a conflict: the remote version stays, ours
is kept under ``state/conflicts/`` (architecture rule 2).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from swampfs.errors import (
    AbsentError,
    ConflictingWriteError,
    IndexCorruptError,
    LockTimeoutError,
    PreconditionError,
)
from swampfs.names import (
    GLOBAL_LOCK_FILE,
    ROOT_PARTITION,
    RelPath,
    is_below,
    is_latest_marker,
    is_publishable,
    lease_path,
    model_of,
    partition_key,
)
from swampfs.provider import ALWAYS, IndexTransaction
from swampfs.records import (
    DirtyPath,
    IndexEntry,
    IndexMode,
    Node,
    Op,
    PushReport,
    TreeChange,
    timestamp,
)
from swampfs.state.apply import apply_delta
from swampfs.sync.hashing import hash_file
from swampfs.sync.leases import Leases
from swampfs.sync.locks import Lock, hold
from swampfs.sync.parallel import for_each
from swampfs.sync.parts import Parts
from swampfs.sync.unfinished import Unfinished
from swampfs.sync.uploads import UPLOADS_AT_ONCE, Uploads
from swampfs.threads import Lane


@dataclass(slots=True)
class _Batch:
    """One push in progress."""

    records: list[DirtyPath]
    uploads: list[DirtyPath] = field(default_factory=list)
    deletes: list[DirtyPath] = field(default_factory=list)
    conflicts: list[DirtyPath] = field(default_factory=list)
    present: list[DirtyPath] = field(default_factory=list)  # the remote has these bytes already
    moot: list[DirtyPath] = field(default_factory=list)  # nothing is left to publish
    entries: dict[RelPath, IndexEntry] = field(default_factory=dict)  # of uploads and present
    failures: list[Exception] = field(default_factory=list)
    changes: list[TreeChange] = field(default_factory=list)


class Pusher:
    """Pushes journaled changes of one datastore. Only one push runs at a time (the writeback task)."""

    def __init__(
        self,
        parts: Parts,
        *,
        busy: Container[str],
        is_open: Callable[[str], bool],
        drop_content: Callable[[Node], None],
        make_lock: Callable[[str], Lock],
        leases: Leases,
    ) -> None:
        self._parts = parts
        self._remote = parts.remote
        self._keys = parts.keys
        self._index = parts.index
        self._catalog = parts.catalog
        self._cache = parts.cache
        self._journal = parts.journal
        self._busy = busy
        self._is_open = is_open
        self._drop_content = drop_content
        self._make_lock = make_lock
        self._leases = leases
        self.unfinished = Unfinished(parts.journal, parts.cache, leases)
        self.uploads = Uploads(parts, leases, is_settled=lambda path: not (is_open(path) or path in self.unfinished))

    async def push(
        self, paths: Sequence[str], *, even_open: Container[str] = ()
    ) -> tuple[PushReport, list[TreeChange]]:
        """Push the given journaled paths, each under its lock.

        Paths still open for writing wait for their close, and what a user does under a lock until it is a whole
        (:mod:`swampfs.sync.unfinished`), unless they are in ``even_open``: then what is there now is published. Paths
        of models that others have locked wait for their release. Returns what was done, what the kernel must forget.

        Raises:
            LockTimeoutError: the global lock is held; nothing was committed, and our own locks were given back.
            LeaseLostError, StoreError: what was not committed stays journaled; the same push can be repeated.
        """
        try:
            return await self._push(
                paths, lambda path: path not in even_open and (self._is_open(path) or path in self.unfinished)
            )
        except LockTimeoutError:
            await self._leases.give_way()
            raise

    async def _push(self, paths: Sequence[str], is_open: Callable[[str], bool]) -> tuple[PushReport, list[TreeChange]]:
        ready = [path for path in paths if is_publishable(path) and not is_open(path)]
        async with AsyncExitStack() as stack:
            names = {lease_path(path) for path in ready}
            locks, waiting = await stack.enter_async_context(self._leases.pinned(sorted(names)))
            # Asked once more: taking locks may have taken long. From the seal on, a change opens a new generation.
            ready = [path for path in ready if lease_path(path) not in waiting and not is_open(path)]
            batch = _Batch(self._journal.seal(ready))
            try:
                if batch.records:
                    await self._run(batch, stack, locks)
                    self.uploads.settled(batch.records)
            finally:
                self._journal.unseal(record.path for record in batch.records)
        report = PushReport(
            pushed=len(batch.entries),
            deleted=len(batch.deletes),
            conflicts=tuple(record.path for record in batch.conflicts),
            waiting=tuple(sorted(waiting)),
            open_files=tuple(path for path in paths if is_open(path)),
            failure=batch.failures[0] if batch.failures else None,
        )
        return report, batch.changes

    # --- locks --------------------------------------------------------------------------------------------

    async def _lock_global(self, stack: AsyncExitStack, locks: list[Lock]) -> None:
        """Ours for the commit; or a user's, who took it as a file and works under it."""
        await stack.enter_async_context(self._leases.global_gate)
        taken = self._leases.taken_global()
        if taken is not None:
            locks.append(taken)
            return
        name = RelPath(GLOBAL_LOCK_FILE)
        await self._leases.left_over.give_back(name)
        lock = self._make_lock(self._keys.global_lock)
        stack.callback(self._leases.left_over.note, name, lock)
        await stack.enter_async_context(hold(lock))
        locks.append(lock)

    # --- one push -----------------------------------------------------------------------------------------

    async def _run(self, batch: _Batch, stack: AsyncExitStack, locks: list[Lock]) -> None:
        if any(model_of(record.path) is None for record in batch.records):
            # No model lock covers these from decision to commit; the global lock does.
            await self._lock_global(stack, locks)
        parked = await self._lost_parked(batch)
        known, epoch = self._catalog.watermark(), self._catalog.epoch
        hints = {record.path: record.partition for record in batch.records}
        transaction = await self._index.begin(hints, known, parked)
        await self._sort(batch, transaction)
        if transaction.in_place:
            await self._clear_the_way(batch, transaction)
        await self._upload(batch, transaction)
        delta = None
        if batch.entries or batch.deletes or parked:
            if locks[-1:] == [] or locks[-1].key != self._keys.global_lock:
                await self._lock_global(stack, locks)
            for lock in locks:
                lock.check()
            delta = await transaction.commit(list(batch.entries.values()), [r.path for r in batch.deletes])
        await self._delete_objects(batch, transaction)
        overtaken = epoch != self._catalog.epoch
        self._settle(batch, parked)
        if overtaken:
            self._catalog.set_watermark(known._replace(meta_etag="", monolith_etag=""))  # look again
        elif delta is not None:
            applied = apply_delta(self._catalog, delta, self._busy)
            for node in applied.stale:
                self._drop_content(node)
            for path, mtime_ns in applied.retimed:
                self._cache.retime(path, mtime_ns)
            batch.changes.extend(applied.changes)
            if applied.missing_parked:
                self._catalog.read_again(ROOT_PARTITION)  # the next poll asks after their objects
        self._keep_conflicts(batch, transaction)

    async def _sort(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """Decide for each record: upload, delete, already there, or conflict."""
        for record in batch.records:
            current = self._current(transaction, record.path)
            if record.op is Op.ATTRIBUTES:
                self._sort_attributes(batch, record, None if transaction.in_place else current)
                continue
            unchanged = current is None if record.base is None else record.base.same_content(current)
            if not unchanged and current is not None and await self._was_sent(record, current):
                # Our own earlier version, whose commit was not answered: what we have now starts from that.
                record, unchanged = self._journal.rebase(record, current, self._parts.partition(record.path)), True  # noqa: PLW2901
            if record.op is Op.DELETE:
                # Found gone: by somebody else, or by a push of ours that did not get to the end. Again is safe.
                (batch.deletes if unchanged or current is None else batch.conflicts).append(record)
            elif unchanged or current is None:  # removed there, rewritten here: content wins over absence
                batch.uploads.append(record)
            elif await self._holds_same(record, current):
                batch.present.append(record)
                ns = current.posix.ns if current.posix is not None else 0
                batch.entries[record.path] = current._replace(posix=self._parts.posix(record.path, ns))
            elif await self._is_unchanged(record):
                batch.moot.append(record)  # announced, and not changed: theirs comes with the next poll
                self._catalog.read_again(self._parts.partition(record.path))
            else:
                batch.conflicts.append(record)

    def _sort_attributes(self, batch: _Batch, record: DirtyPath, current: IndexEntry | None) -> None:
        """Attributes of content that is still there; a directory keeps no others than its own."""
        node = self._catalog.at(record.path)
        if current is None or node is None or not current.same_content(node.base):
            # Gone, or other content by now, which the next poll brings here with its own attributes.
            batch.moot.append(record)
            self._catalog.read_again(self._parts.partition(record.path))
            return
        posix = self._parts.posix(record.path, node.mtime_ns)
        batch.present.append(record)
        batch.entries[record.path] = current._replace(local_mtime=timestamp(node.mtime_ns), posix=posix)

    def _current(self, transaction: IndexTransaction, path: RelPath) -> IndexEntry | None:
        try:
            return transaction.entry(path)
        except IndexCorruptError:
            return None  # a malformed entry names no content; ours replaces it

    async def _was_sent(self, record: DirtyPath, current: IndexEntry) -> bool:
        if not self._journal.was_sent(record.path, current.size, current.sha256):
            return False
        return current.sha256 is not None or self._journal.was_sent(
            record.path, current.size, await self._remote_hash(record.path)
        )

    async def _is_unchanged(self, record: DirtyPath) -> bool:
        """Not of a file that is open: it may be changed right after the look."""
        if record.base is None or self._is_open(record.path):
            return False
        return await self._holds_same(record, record.base)

    async def _holds_same(self, record: DirtyPath, current: IndexEntry) -> bool:
        """Two machines that wrote the same bytes do not conflict (lesson 4: compare content, not times)."""
        stat = self._cache.stat(record.path)
        if stat is None or stat.st_size != current.size:
            return False
        theirs = current.sha256 or await self._remote_hash(record.path)
        ours = await self._remote.threads.read(Lane.DISK, hash_file, self._cache.path(record.path))
        return ours == theirs

    async def _remote_hash(self, path: RelPath) -> str:
        """Of an object whose index entry has none; ``""``, which equals no hash, if the object is gone."""
        staged = self._cache.stage()

        def fetch() -> str:
            self._remote.store.download(self._keys.data(path), staged)
            return hash_file(staged)

        try:
            return await self._remote.threads.read(Lane.PUSH, fetch)
        except AbsentError:
            return ""
        finally:
            if os.path.lexists(staged):
                os.unlink(staged)

    # --- content ------------------------------------------------------------------------------------------

    async def _upload(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """Content, then ``latest`` markers; a marker waits for a model's content that could not be uploaded.

        One file that fails keeps no other from being committed. Raises if nothing at all could be done.
        """
        wanted = batch.uploads
        batch.uploads = []
        content = [record for record in wanted if not is_latest_marker(record.path)]
        await self._upload_all(batch, content, transaction)
        done = {record.path for record in batch.uploads}
        failed = {model_of(record.path) for record in content if record.path not in done}
        markers = [record for record in wanted if is_latest_marker(record.path) and model_of(record.path) not in failed]
        await self._upload_all(batch, markers, transaction)
        if batch.failures and not (batch.uploads or batch.present or batch.deletes or batch.conflicts):
            raise batch.failures[0]

    async def _upload_all(self, batch: _Batch, records: Sequence[DirtyPath], transaction: IndexTransaction) -> None:
        entries, failures = await self.uploads.upload(records, transaction.precondition)
        batch.uploads += [record for record in records if record.path in entries]
        batch.entries |= entries
        batch.failures += failures

    async def _clear_the_way(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """In a directory, a file that became a directory (or the reverse) must go before its successor can come."""
        uploads = [record.path for record in batch.uploads]
        for record in batch.deletes:
            if any(is_below(path, record.path) or is_below(record.path, path) for path in uploads):
                when = transaction.precondition(record.path)
                await self._remote.delete(self._keys.data(record.path), ALWAYS if when.absent else when)

    async def _delete_objects(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """After the commit (H20): a crash in between leaves unlisted objects, never dangling entries.

        What fails stays journaled, so that the next push does it again.
        """
        gone: list[DirtyPath] = []

        async def one(record: DirtyPath) -> None:
            when = transaction.precondition(record.path)
            try:
                await self._remote.delete(self._keys.data(record.path), ALWAYS if when.absent else when)
            except (AbsentError, PreconditionError):
                if transaction.in_place and not await self._is_gone(record.path):
                    raise ConflictingWriteError(f"{record.path} was changed by another writer just now") from None
            gone.append(record)

        batch.failures += await for_each(batch.deletes, one, at_once=UPLOADS_AT_ONCE)
        batch.deletes = gone

    async def _is_gone(self, path: RelPath) -> bool:
        try:
            await self._remote.head(self._keys.data(path))
        except AbsentError:
            return True
        return False

    # --- afterwards ---------------------------------------------------------------------------------------

    def _settle(self, batch: _Batch, parked: Sequence[IndexEntry]) -> None:
        """Let the catalog agree with what was committed; then retire exactly that."""
        home = self._parts.partitions()
        done: list[tuple[DirtyPath, IndexEntry | None, str | None]] = [
            (record, batch.entries[record.path], home(record.path)) for record in (*batch.uploads, *batch.present)
        ]
        done += [(record, None, None) for record in batch.deletes]
        done += [(record, record.base, record.partition) for record in batch.moot]
        ours = {record.path for record in batch.uploads}
        self._catalog.epoch += 1
        with self._catalog.transaction():
            for record, entry, partition in done:
                if entry is not None and partition is not None:
                    newest = self._journal.get(record.path)
                    clean = newest is not None and newest.generation == record.generation
                    self._catalog.settle(entry, partition, clean=clean, ours=record.path in ours)
            if self._catalog.watermark().mode is IndexMode.SHARDS:
                fresh = [path for path in batch.entries if partition_key(path) is None]
                self._catalog.park([*fresh, *(entry.path for entry in parked)])
                self._catalog.unpark(record.path for record in batch.deletes)
        # Last, and after the catalog is on disk: a record is what explains a row that is not in step.
        self._catalog.sync()
        self._journal.retire(done)

    async def _lost_parked(self, batch: _Batch) -> list[IndexEntry]:
        """Entries we parked in ``_root`` that another writer dropped; they are put back with this commit (H6).

        Only while their object exists: whoever deletes a file removes the entry first, then the object.
        """
        entries = []
        for path in self._catalog.parked(lost_only=True):
            node = self._catalog.at(path)
            if node is None or node.base is None or path in self._journal:
                continue
            try:
                await self._remote.head(self._keys.data(path))
            except AbsentError:
                self._catalog.unpark([path])
                self._catalog.remove(node)
                self._drop_content(node)
                batch.changes.append(TreeChange(node.parent, node.name, node.ino))
                continue
            entries.append(node.base)
        return entries

    def _keep_conflicts(self, batch: _Batch, transaction: IndexTransaction) -> None:
        """The remote version stays in the tree; our bytes go aside with a report. Never dropped."""
        kept = []
        for record in batch.conflicts:
            newest = self._journal.get(record.path)
            if newest is None or newest.generation != record.generation or self._is_open(record.path):
                continue  # written to meanwhile: the next push decides about the whole of it
            kept.append(record)
            self._keep_conflict(batch, record, self._current(transaction, record.path))
        batch.conflicts = kept

    def _keep_conflict(self, batch: _Batch, record: DirtyPath, current: IndexEntry | None) -> None:
        report: dict[str, object] = {
            "path": record.path,
            "operation": record.op.value,
            "keptAt": timestamp(time.time_ns()),
            "base": record.base._asdict() if record.base else None,
            "remote": current._asdict() if current else None,
        }
        self._cache.set_conflict_aside(record.path, report)
        self._journal.retire([(record, None, None)])
        self._catalog.epoch += 1
        partition = self._parts.partition(record.path)
        self._catalog.read_again(partition)
        node = self._catalog.at(record.path)
        missing = [] if current is None else self._catalog.missing_directories(record.path)
        with self._catalog.transaction():
            if node is not None:
                self._catalog.remove(node)
                self._drop_content(node)
                batch.changes.append(TreeChange(node.parent, node.name, node.ino))
            if current is not None:
                parent = self._catalog.make_parents(record.path)
                self._catalog.add_remote(parent, current, partition, time.time_ns())
                batch.changes.append(TreeChange(parent, record.path.rpartition("/")[2], 0))
        for directory in missing:
            made = self._catalog.at(directory)
            assert made is not None
            batch.changes.append(TreeChange(made.parent, made.name, made.parent))
