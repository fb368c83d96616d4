"""Pull: bring the cache up to the index (spec §6.3 with its BETTER notes).

What is marked dirty, or differs from what was last in step, is never overwritten or removed. Content enters by rename
after its size and hash were verified. A pull writes nothing to the datastore.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import trio

from swampfs.errors import AbsentError, IntegrityError, TransferError
from swampfs.names import ModelRef, RelPath, is_lazy
from swampfs.provider import AbortSignal
from swampfs.records import IndexEntry, timestamp
from swampfs.state.manifest import Row, identity
from swampfs.sync.cache.decide import covers_model, is_in_scope, scope_partitions
from swampfs.sync.cache.marks import MarkBook, Marks
from swampfs.sync.cache.parts import CacheParts
from swampfs.sync.cache.transfer import Batch, transfer_error
from swampfs.sync.cache.tree import IN_MEMORY
from swampfs.threads import Lane

log = logging.getLogger(__name__)

_MISMATCHES = 4
_MISMATCH_PAUSE_S = 0.5


class Fetched(NamedTuple):
    entry: IndexEntry  # with the hash its bytes have
    stat: os.stat_result


class _Download(NamedTuple):
    entry: IndexEntry
    seen: str  # identity of the local file it replaces; "" = there is none
    cut: int  # marks later than this one are news


class Plan(NamedTuple):
    """What a pull has to do."""

    fetch: list[IndexEntry]
    seen: dict[RelPath, str]  # identity of the local files that the downloads replace
    adopt: list[tuple[RelPath, IndexEntry, os.stat_result | None]]  # local content found equal to the index
    remove: list[RelPath]  # gone there, untouched here
    aside: list[RelPath]  # of unknown origin and different: kept before the download replaces it
    absent: list[RelPath]  # removed here behind our back
    directories: list[RelPath]  # of content that a metadata-only pull leaves out


class CachePuller:
    """Pulls of one bound cache."""

    def __init__(self, parts: CacheParts, book: MarkBook) -> None:
        self._parts = parts
        self._book = book
        self._manifest = parts.manifest
        self._tree = parts.tree

    async def pull(self, models: Sequence[ModelRef], marks: Marks, signal: AbortSignal | None, *,
                   lazy: bool) -> int:  # fmt: skip
        """Returns how many files were downloaded. Raises TransferError naming what could not be."""
        self._tree.make()
        self._tree.is_marked = marks.paths.__contains__
        if lazy:
            self._parts.sidecar.set_lazy(active=True)  # before anything is left out: absence must not mean deletion
        sidecar = self._parts.sidecar.load()
        if sidecar is None and not self._tree.is_empty():
            # Lost or damaged: what this cache holds may be unpushed, and a pull must not call it clean (lesson 15).
            self._parts.sidecar.mark_bulk()
        if models:
            scopes = scope_partitions(models)
            moved = (await self._parts.refresh(lambda name: covers_model(name, scopes))).moved
        else:
            moved = (await self._parts.refresh()).moved
        if not moved and sidecar is not None and self._is_in_step(models, lazy=lazy):
            if not models:
                self._note_verified(lazy=lazy)
            return 0
        await self._judge_parked()
        plan = await self._parts.remote.threads.write(Lane.DISK, lambda: self._plan(models, marks, lazy=lazy))
        self._carry_out_locally(plan, marks.cut)
        fetched = await self._fetch(plan, marks.cut, signal)
        if not models:
            self._note_verified(lazy=lazy)
        return fetched

    def _is_in_step(self, models: Sequence[ModelRef], *, lazy: bool) -> bool:
        if not self._manifest.pending(eager_only=lazy):
            return True
        return bool(models) and not any(
            _is_pending(row) and not (lazy and is_lazy(row.path)) for row in self._rows(models)
        )

    def _note_verified(self, *, lazy: bool) -> None:
        """A complete pull is over: the sidecar says how far, and whether absent content means anything."""
        if lazy:
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

    def _plan(self, models: Sequence[ModelRef], marks: Marks, *, lazy: bool) -> Plan:
        plan = Plan([], {}, [], [], [], [], [])
        for row in list(self._rows(models)):
            if row.dangling or (row.path in marks.paths and not self._is_news(row, marks)):
                continue
            if row.entry is None:
                self._plan_removal(row, plan)
            else:
                self._plan_entry(row, row.entry, marks, plan, lazy=lazy and is_lazy(row.path))
        return plan

    def _is_news(self, row: Row, marks: Marks) -> bool:
        """Whether a file in a marked directory was never here, so that the mark is of others beside it."""
        if row.path in marks.paths.exact or row.base is not None or self._manifest.was_sent(row.path):
            return False
        return self._tree.stat(row.path) is None

    def _rows(self, models: Sequence[ModelRef]) -> Iterable[Row]:
        if not models:
            return self._manifest.rows()
        places = [f"data/{model.type}/{model.id}" for model in models]
        places += [f"{top}/{model.type}" for model in models for top in ("outputs", "definitions-evaluated")]
        rows = chain.from_iterable(self._manifest.rows(place) for place in dict.fromkeys(places))
        return (row for row in rows if is_in_scope(row.path, models))

    def _plan_removal(self, row: Row, plan: Plan) -> None:
        """Deleted there: remove an untouched copy; a changed one stays (H19, rule 5)."""
        found = self._tree.stat(row.path)
        if found is None:
            plan.absent.append(row.path)
        elif row.is_untouched(found) or self._has_base_content(row):
            plan.remove.append(row.path)
            plan.seen[row.path] = identity(found)
        else:
            log.info("%s was deleted in the datastore and changed here: kept", row.path)

    def _has_base_content(self, row: Row) -> bool:
        """By hash. A file that cannot be read has no known content, so it is never taken for the old one."""
        digest = self._local_hash(row.path)
        return digest is not None and row.base is not None and digest == row.base.sha256

    def _plan_entry(self, row: Row, entry: IndexEntry, marks: Marks, plan: Plan, *, lazy: bool) -> None:
        found = self._tree.stat(row.path)
        if found is None or stat.S_ISDIR(found.st_mode):
            # In place of a directory, too: its files go first. If some stay, so does it, with an error.
            self._plan_missing(row, entry, found, plan, lazy=lazy)
            return
        if row.is_untouched(found):
            if not entry.same_content(row.base):
                self._replace(row, entry, found, plan, lazy=lazy)
            elif row.base is not None and row.base.last_modified != entry.last_modified:
                plan.adopt.append((row.path, entry, found))  # pushed again with the same bytes
            return
        digest = self._local_hash(row.path)
        if _is_same(found, digest, entry, row.base):
            # Equal to an entry without a hash is a guess by size, unless what was in step proves it.
            plan.adopt.append((row.path, entry._replace(sha256=digest) if row.base else entry, found))
        elif row.base is None and (marks.sidecar is None or not marks.paths.bulk):
            plan.aside.append(row.path)
            plan.fetch.append(entry)
        elif row.base is not None and digest == row.base.sha256:
            self._replace(row, entry, found, plan, lazy=lazy)
        else:
            log.info("%s was changed here without a mark: kept", row.path)

    def _plan_missing(
        self, row: Row, entry: IndexEntry, found: os.stat_result | None, plan: Plan, *, lazy: bool
    ) -> None:
        if not lazy:
            plan.fetch.append(entry)
        elif found is None:
            plan.directories.append(RelPath(row.path.rpartition("/")[0]))
            if row.base is not None:
                plan.absent.append(row.path)

    def _replace(self, row: Row, entry: IndexEntry, found: os.stat_result, plan: Plan, *, lazy: bool) -> None:
        """Untouched here, moved on there. A metadata-only pull lets old lazy content go instead."""
        plan.seen[entry.path] = identity(found)
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

    def _remove(self, rel: RelPath, seen: str, cut: int) -> bool:
        """Remove a copy that the plan found untouched, unless it was written or marked since (H13)."""
        found = self._tree.stat(rel)
        if found is not None and (identity(found) != seen or self._book.was_marked(rel, cut)):
            log.info("%s was changed here meanwhile: kept", rel)
            return False
        self._tree.remove(rel)
        return True

    def _carry_out_locally(self, plan: Plan, cut: int) -> None:
        for rel in plan.aside:
            self._tree.keep_aside(rel, self._tree.path(rel), {"why": "differed from the datastore, origin unknown"})
            log.info("%s differed from the datastore and was kept in %s", rel, self._tree.own)
        removed = [rel for rel in plan.remove if self._remove(rel, plan.seen[rel], cut)]
        for directory in dict.fromkeys(plan.directories):
            os.makedirs(self._tree.path(directory), exist_ok=True)
        self._manifest.set_bases(plan.adopt)
        self._manifest.forget_bases([*removed, *plan.absent])

    async def _fetch(self, plan: Plan, cut: int, signal: AbortSignal | None) -> int:
        """Download, verify, admit. Returns how many files. Raises TransferError.

        Bytes that do not match are most often a push in progress, whose content lands before its index entry: the index
        is read again a few times until both agree.
        """
        wanted = [_Download(entry, plan.seen.get(entry.path, ""), cut) for entry in plan.fetch]
        fetched, failed = await self._fetch_all(wanted, signal)
        for _ in range(_MISMATCHES):
            odd = {d.entry.path: d for d, error in failed if isinstance(error, IntegrityError | AbsentError)}
            if not odd:
                break
            if not (await self._parts.refresh()).moved and any(
                isinstance(error, IntegrityError) for _, error in failed
            ):
                await trio.sleep(_MISMATCH_PAUSE_S)
            rows = {path: self._manifest.row(path) for path in odd}
            again = [odd[path]._replace(entry=row.entry) for path, row in rows.items() if row and row.entry]
            more, failed_again = await self._fetch_all(again, signal)
            fetched += more
            failed = [pair for pair in failed if pair[0].entry.path not in odd] + failed_again
        self._manifest.mark_dangling(d.entry.path for d, error in failed if isinstance(error, AbsentError))
        fatal = [(str(d.entry.path), error) for d, error in failed if not isinstance(error, AbsentError)]
        if fatal:
            raise transfer_error("pull", self._parts.remote.label, fatal)
        return fetched

    async def _fetch_all(
        self, wanted: Sequence[_Download], signal: AbortSignal | None
    ) -> tuple[int, list[tuple[_Download, Exception]]]:
        if not wanted:
            return 0, []
        batch = Batch(wanted, self._fetch_one, signal, what="files pulled")
        try:
            await batch.run(self._parts.remote.threads, Lane.HYDRATE, min(self._parts.pull_width, len(wanted)))
        finally:
            got = [(wish.entry.path, fetched) for wish, fetched in batch.done if fetched is not None]
            self._manifest.set_bases((path, fetched.entry, fetched.stat) for path, fetched in got)
        return len(got), batch.failed

    def _fetch_one(self, wish: _Download) -> Fetched | None:
        """In a worker: one file, atomically; ``None`` if it was marked or written meanwhile, and so stays."""
        entry = wish.entry
        staged = self._tree.stage()
        try:
            digest = self._download(entry, staged)
            found = self._tree.stat(entry.path)
            now = identity(found) if found is not None and stat.S_ISREG(found.st_mode) else ""
            if now != wish.seen or self._book.was_marked(entry.path, wish.cut):
                log.info("%s was changed here while it was downloaded: kept", entry.path)
                os.unlink(staged)
                return None
            found = self._tree.admit(staged, entry.path, entry.mtime_ns or time.time_ns())
            return Fetched(entry._replace(sha256=digest), found)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(staged)
            raise

    async def hydrate(self, path: RelPath, marks: Marks) -> bool:
        """One file; ``False`` if it does not exist. Local changes stay, as in a pull. Raises IntegrityError."""
        row = self._manifest.row(path)
        if row is None or row.entry is None:
            row = await self._unlisted(path, row)
        if row is None or row.entry is None:
            return self._tree.stat(path) is not None
        if path in marks.paths and self._tree.stat(path) is not None:
            return True
        plan = Plan([], {}, [], [], [], [], [])
        self._plan_entry(row._replace(dangling=False), row.entry, marks, plan, lazy=False)
        self._carry_out_locally(plan, marks.cut)
        try:
            await self._fetch(plan, marks.cut, None)
        except TransferError as error:
            raise error.failures[str(path)] from None
        return self._tree.stat(path) is not None

    async def _unlisted(self, path: RelPath, row: Row | None) -> Row | None:
        """An object that no index names can be read all the same (spec §8.2)."""
        try:
            info = await self._parts.remote.head(self._parts.keys.data(path))
        except AbsentError:
            return None
        base = row.base if row is not None else None
        return Row(path, IndexEntry(path, info.size, info.last_modified), base, "", 0, dangling=False, parked=0)

    async def _judge_parked(self) -> None:
        """Our entry in ``_root`` is gone: the object decides whether somebody deleted the file (H6)."""
        for row in self._manifest.lost_parked():
            try:
                await self._parts.remote.head(self._parts.keys.data(row.path))
            except AbsentError:
                self._manifest.drop_entries([row.path])

    def _download(self, entry: IndexEntry, staged: str) -> str:
        store, key = self._parts.remote.store, self._parts.keys.data(entry.path)
        if entry.size <= IN_MEMORY:
            blob = store.get(key)
            assert blob is not None
            size, digest = len(blob.body), hashlib.sha256(blob.body).hexdigest()
            self._tree.write_staged(staged, blob.body)
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
    if row.entry is None:
        return row.base is not None
    return not row.dangling and not row.entry.same_content(row.base)
