"""Pull: bring the cache up to the index (spec §6.3 with its BETTER notes).

What is marked dirty, or differs from what was last in step, is never overwritten or removed. Content enters by rename
after its size and hash were verified. A pull writes nothing to the datastore.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from swampfs.errors import AbsentError, IntegrityError
from swampfs.names import ModelRef, RelPath, is_lazy
from swampfs.provider import AbortSignal
from swampfs.records import IndexEntry, timestamp
from swampfs.state.manifest import Row
from swampfs.sync.cache.decide import covers_model, is_in_scope, scope_partitions
from swampfs.sync.cache.marks import MarkedPaths
from swampfs.sync.cache.parts import CacheParts
from swampfs.sync.cache.transfer import Batch, transfer_error
from swampfs.sync.cache.tree import IN_MEMORY
from swampfs.threads import Lane

log = logging.getLogger(__name__)


class Fetched(NamedTuple):
    entry: IndexEntry  # with the hash its bytes have
    stat: os.stat_result


class Plan(NamedTuple):
    """What a pull has to do."""

    fetch: list[IndexEntry]
    adopt: list[tuple[RelPath, IndexEntry, os.stat_result | None]]  # local content found equal to the index
    remove: list[RelPath]  # gone there, untouched here
    aside: list[RelPath]  # of unknown origin and different: kept before the download replaces it
    absent: list[RelPath]  # removed here behind our back
    directories: list[RelPath]  # of content that a metadata-only pull leaves out


class CachePuller:
    """Pulls of one bound cache."""

    def __init__(self, parts: CacheParts) -> None:
        self._parts = parts
        self._manifest = parts.manifest
        self._tree = parts.tree

    async def pull(self, models: Sequence[ModelRef], marks: MarkedPaths, signal: AbortSignal | None, *,
                   lazy: bool) -> int:  # fmt: skip
        """Returns how many files were downloaded. Raises TransferError naming what could not be."""
        self._tree.make()
        sidecar = self._parts.sidecar.load()
        if models:
            scopes = scope_partitions(models)
            moved = (await self._parts.refresh(lambda name: covers_model(name, scopes))).moved
        else:
            moved = (await self._parts.refresh()).moved
        if not moved and sidecar is not None and self._is_in_step(models, lazy=lazy):
            if not models:
                self._note_verified(lazy=lazy)
            return 0
        plan = await self._parts.remote.threads.write(Lane.DISK, lambda: self._plan(models, marks, lazy=lazy))
        self._carry_out_locally(plan)
        fetched = await self._fetch(plan.fetch, signal)
        if not models:
            self._note_verified(lazy=lazy)
        return fetched

    def _is_in_step(self, models: Sequence[ModelRef], *, lazy: bool) -> bool:
        if not self._manifest.pending(eager_only=lazy):
            return True
        return bool(models) and not any(
            is_in_scope(row.path, models) and _is_pending(row) and not (lazy and is_lazy(row.path))
            for row in self._manifest.rows()
        )

    def _note_verified(self, *, lazy: bool) -> None:
        """A complete pull is over: the sidecar says how far, and whether absent content means anything."""
        if lazy:
            self._parts.sidecar.set_lazy(active=True)
            return
        state = self._parts.sidecar.load()
        if state is None or state.lazy:
            self._parts.sidecar.set_lazy(active=False)
        if not self._manifest.pending():
            watermark = self._manifest.watermark()
            unchanged = state is not None and (state.fingerprint, state.commit_seq) == (
                watermark.monolith_etag,
                watermark.commit_seq or None,
            )
            if not unchanged:
                self._parts.sidecar.verify(watermark, timestamp(time.time_ns()))

    # --- deciding -----------------------------------------------------------------------------------------

    def _plan(self, models: Sequence[ModelRef], marks: MarkedPaths, *, lazy: bool) -> Plan:
        plan = Plan([], [], [], [], [], [])
        for row in list(self._rows(models)):
            if row.path in marks or row.dangling:
                continue
            if row.entry is None:
                self._plan_removal(row, plan)
            else:
                self._plan_entry(row, row.entry, marks, plan, lazy=lazy and is_lazy(row.path))
        return plan

    def _rows(self, models: Sequence[ModelRef]) -> Iterable[Row]:
        rows = self._manifest.rows()
        return rows if not models else (row for row in rows if is_in_scope(row.path, models))

    def _plan_removal(self, row: Row, plan: Plan) -> None:
        """Deleted there: remove an untouched copy; a changed one stays (H19, rule 5)."""
        found = self._tree.stat(row.path)
        if found is None:
            plan.absent.append(row.path)
        elif row.is_untouched(found) or self._local_hash(row.path) == (row.base.sha256 if row.base else None):
            plan.remove.append(row.path)
        else:
            log.info("%s was deleted in the datastore and changed here: kept", row.path)

    def _plan_entry(self, row: Row, entry: IndexEntry, marks: MarkedPaths, plan: Plan, *, lazy: bool) -> None:
        found = self._tree.stat(row.path)
        if found is None:
            if lazy:
                plan.directories.append(RelPath(row.path.rpartition("/")[0]))
                if row.base is not None:
                    plan.absent.append(row.path)
            else:
                plan.fetch.append(entry)
            return
        if row.is_untouched(found):
            if not entry.same_content(row.base):
                self._replace(row, entry, plan, lazy=lazy)
            elif row.base is not None and row.base.last_modified != entry.last_modified:
                plan.adopt.append((row.path, entry, found))  # pushed again with the same bytes
            return
        digest = self._local_hash(row.path)
        if _is_same(found, digest, entry, row.base):
            plan.adopt.append((row.path, entry._replace(sha256=digest), found))
        elif row.base is None and not marks.bulk:
            plan.aside.append(row.path)
            plan.fetch.append(entry)
        elif row.base is not None and digest == row.base.sha256:
            self._replace(row, entry, plan, lazy=lazy)
        else:
            log.info("%s was changed here without a mark: kept", row.path)

    def _replace(self, row: Row, entry: IndexEntry, plan: Plan, *, lazy: bool) -> None:
        """Untouched here, moved on there. A metadata-only pull lets old lazy content go instead."""
        if lazy:
            plan.remove.append(row.path)
        else:
            plan.fetch.append(entry)

    def _local_hash(self, rel: str) -> str | None:
        try:
            with open(self._tree.path(rel), "rb", buffering=0) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            return None

    # --- doing --------------------------------------------------------------------------------------------

    def _carry_out_locally(self, plan: Plan) -> None:
        for rel in plan.aside:
            self._tree.keep_aside(rel, self._tree.path(rel), {"why": "differed from the datastore, origin unknown"})
            log.info("%s differed from the datastore and was kept in %s", rel, self._tree.own)
        for rel in plan.remove:
            self._tree.remove(rel)
        for directory in dict.fromkeys(plan.directories):
            os.makedirs(self._tree.path(directory), exist_ok=True)
        self._manifest.set_bases(plan.adopt)
        self._manifest.forget_bases([*plan.remove, *plan.absent])

    async def _fetch(self, entries: Sequence[IndexEntry], signal: AbortSignal | None) -> int:
        """Download, verify, admit. What the index had newer by then is read once more (spec §6.3)."""
        failed = await self._fetch_all(entries, signal)
        moved = [entry.path for entry, error in failed if isinstance(error, IntegrityError | AbsentError)]
        if moved and (await self._parts.refresh()).moved:
            now = {path: row.entry for path in moved if (row := self._manifest.row(path)) is not None}
            again = [entry for entry in now.values() if entry is not None]
            settled = [pair for pair in failed if pair[0].path not in moved]
            failed = settled + await self._fetch_all(again, signal)
        self._manifest.mark_dangling(entry.path for entry, error in failed if isinstance(error, AbsentError))
        fatal = [(str(entry.path), error) for entry, error in failed if not isinstance(error, AbsentError)]
        if fatal:
            raise transfer_error("pull", self._parts.remote.label, fatal)
        return len(entries) - len(failed)

    async def _fetch_all(
        self, entries: Sequence[IndexEntry], signal: AbortSignal | None
    ) -> list[tuple[IndexEntry, Exception]]:
        if not entries:
            return []
        batch = Batch(entries, self.fetch_one, signal)
        try:
            await batch.run(self._parts.remote.threads, Lane.HYDRATE, min(self._parts.pull_width, len(entries)))
        finally:
            self._manifest.set_bases((entry.path, got.entry, got.stat) for entry, got in batch.done)
        return batch.failed

    def fetch_one(self, entry: IndexEntry) -> Fetched:
        """In a worker: one file, atomically. Raises AbsentError, IntegrityError, StoreError or OSError."""
        staged = self._tree.stage()
        try:
            digest = self._download(entry, staged)
            found = self._tree.admit(staged, entry.path, entry.mtime_ns or time.time_ns())
            return Fetched(entry._replace(sha256=digest), found)
        finally:
            if os.path.lexists(staged):
                os.unlink(staged)

    def _download(self, entry: IndexEntry, staged: str) -> str:
        store, key = self._parts.remote.store, self._parts.keys.data(entry.path)
        if entry.size <= IN_MEMORY:
            blob = store.get(key)
            assert blob is not None
            size, digest = len(blob.body), hashlib.sha256(blob.body).hexdigest()
            with open(staged, "xb", buffering=0) as file:
                file.write(blob.body)
        else:
            store.download(key, staged)
            with open(staged, "rb", buffering=0) as file:
                size, digest = os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()
        if size != entry.size:
            raise IntegrityError(f"it has {size} bytes in the datastore; its index says {entry.size}")
        if entry.sha256 not in (None, digest):
            raise IntegrityError("its bytes in the datastore do not have the hash its index says")
        return digest


def _is_same(found: os.stat_result, digest: str | None, entry: IndexEntry, base: IndexEntry | None) -> bool:
    """Whether local content is what the index says: by hash where it has one (H1), else by size and what we know."""
    if found.st_size != entry.size:
        return False
    if entry.sha256 is not None:
        return digest == entry.sha256
    return base is None or (entry.same_content(base) and digest == base.sha256)


def _is_pending(row: Row) -> bool:
    return row.entry is not None and not row.dangling and not row.entry.same_content(row.base)
