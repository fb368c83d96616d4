"""Push: publish what is marked, in two phases (spec §7.2, §7.3 with their BETTER notes).

Prepare looks, decides and uploads; commit merges into the index as it is then, deletes objects after that (H20), and
clears exactly the marks that prepare saw. A single push is one after the other. Locks are the caller's, as in swamp;
one of this provider's that was lost is noticed right before the commit (H18).
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from swampfs.errors import AbsentError, ConflictingWriteError, IndexCorruptError, PreconditionError
from swampfs.names import RelPath, is_latest_marker, partition_key
from swampfs.provider import ALWAYS, AbortSignal, IndexTransaction, Precondition, PushManifest, PushPreview
from swampfs.records import IndexEntry, IndexMode, timestamp
from swampfs.state.manifest import Row
from swampfs.sync.cache.decide import Verdict, covers_path, dirty_partitions, judge
from swampfs.sync.cache.marks import MarkBook, Marks
from swampfs.sync.cache.parts import CacheParts
from swampfs.sync.cache.transfer import Batch, transfer_error
from swampfs.sync.cache.tree import Content, read_stable
from swampfs.sync.cache.walk import Candidates, candidates, link_text
from swampfs.threads import Lane

log = logging.getLogger(__name__)


class Change(NamedTuple):
    """A local file that is to be uploaded, and what that was decided on."""

    path: RelPath
    entry: IndexEntry | None  # the index's word at the time
    base: IndexEntry | None
    partition: str | None
    unseen: bool = False  # the entry is not what this cache had: others' content will be replaced
    when: Precondition = ALWAYS


class Sent(NamedTuple):
    """An uploaded file."""

    entry: IndexEntry
    stat: os.stat_result | None


@dataclass(slots=True)
class Prepared:
    """The service's own part of a :class:`~swampfs.provider.PushManifest`."""

    marks: Marks
    changes: dict[RelPath, Change] = field(default_factory=dict)
    deletes: list[Row] = field(default_factory=list)
    sent: dict[RelPath, Sent] = field(default_factory=dict)
    same: list[tuple[RelPath, IndexEntry, os.stat_result | None]] = field(default_factory=list)
    unstable: list[RelPath] = field(default_factory=list)  # kept changing while they were read: still dirty (H26)
    scrub: bool = False
    current: bool = True  # the mirror of the index was compared as a whole
    own_marks: list[int] = field(default_factory=list)
    waiting: list[str] = field(default_factory=list)  # marked, and nothing is there yet
    held: list[str] = field(default_factory=list)  # marked, and not to be carried out yet
    orphans: list[RelPath] = field(default_factory=list)  # sent earlier, never indexed, and gone here

    @property
    def is_idle(self) -> bool:
        """Nothing to write anywhere."""
        return not (self.changes or self.deletes or self.scrub or self.orphans)

    @property
    def is_empty(self) -> bool:
        return not (self.sent or self.deletes or self.scrub or self.orphans)


class CachePusher:
    """Pushes of one bound cache."""

    def __init__(
        self,
        parts: CacheParts,
        book: MarkBook,
        *,
        check_locks: Callable[[], None],
        prove: Callable[[], Awaitable[None]],
    ) -> None:
        self._parts = parts
        self._manifest = parts.manifest
        self._tree = parts.tree
        self._book = book
        self._check_locks = check_locks
        self._prove = prove

    async def prepare(self, signal: AbortSignal | None) -> PushManifest:
        """Look, decide, upload. Raises TransferError; the index and the marks are as they were.

        Raises PreconditionsUnsupportedError, once per cache, before anything is written to a store that is not safe.
        """
        prepared = await self._decide()
        if prepared is None:
            return PushManifest({}, (), 0, 0, frozenset())
        if not prepared.is_idle:
            await self._prove()
        await self._upload(prepared, signal)
        entries = {path: sent.entry for path, sent in prepared.sent.items()}
        deleted = tuple(row.path for row in prepared.deletes)
        return PushManifest(
            entries, deleted, len(entries), len(deleted), dirty_partitions([*entries, *deleted]), prepared
        )

    async def preview(self) -> PushPreview:
        """What a push would do now. Nothing is written, here or there."""
        prepared = await self._decide()
        if prepared is None:
            return PushPreview(0, 0, 0, 0)
        new = sum(change.entry is None for change in prepared.changes.values())
        changed = len(prepared.changes) - new
        return PushPreview(new + changed + len(prepared.deletes), new, changed, len(prepared.deletes))

    async def commit(self, manifest: PushManifest, signal: AbortSignal | None) -> int:
        """Returns pushed + deleted. Raises LeaseLostError, ConflictingWriteError, StoreError: the marks then stand."""
        prepared = manifest.private
        if not isinstance(prepared, Prepared):
            return 0
        if signal is not None:
            signal.check()
        parked = await self._lost_parked()
        gone = await self._dangling()
        if not prepared.is_empty or parked or gone:
            await self._commit(prepared, parked, gone, signal)
        self._manifest.set_bases(prepared.same)
        self._retire(prepared)
        return len(prepared.sent) + len(prepared.deletes)

    # --- deciding -----------------------------------------------------------------------------------------

    async def _decide(self) -> Prepared | None:
        """What there is to do; ``None`` if one request shows that there is nothing."""
        marks = self._book.now()
        current = True
        if marks.walk_all:
            moved = (await self._parts.refresh()).moved
            scrub = self._manifest.fact("scrub") == "1"
            repair = scrub or self._manifest.dangling() or self._manifest.lost_parked() or self._manifest.uploads()
            if not (marks.dirty or moved or repair):
                return None
        else:
            paths = marks.paths.paths
            refreshed = await self._parts.refresh(lambda name: any(covers_path(name, path) for path in paths))
            current = refreshed.current
        work = await self._parts.remote.threads.read(Lane.DISK, candidates, self._tree, self._manifest, marks)
        scrub = self._manifest.fact("scrub") == "1"
        held = [self._cache_path(path) for path in work.held]
        prepared = Prepared(marks, deletes=work.missing, scrub=scrub, current=current, held=held)
        await self._parts.remote.threads.read(Lane.DISK, self._compare, work, prepared)
        return prepared

    def _compare(self, work: Candidates, prepared: Prepared) -> None:
        for path, found in work.files.items():
            row = self._manifest.row(path)
            marked = path in prepared.marks.paths.exact
            untouched = row is not None and row.is_untouched(found)
            if untouched and not marked:
                continue  # in step, or moved on there: for the next pull
            if row is None or (row.entry is None and row.base is None):
                prepared.changes[path] = Change(path, None, None, None)  # new: hashed when it is sent
            else:
                self._compare_content(path, row, prepared, rewritten=marked and not untouched)
        self._find_leftovers(prepared)
        for path in work.links:
            row, body = self._manifest.row(path), link_text(self._tree, path)
            if body is not None and (row is None or row.entry is None or row.entry.sha256 != _sha256(body)):
                prepared.changes[path] = self._change(path, row)

    def _find_leftovers(self, prepared: Prepared) -> None:
        """Marks whose file is still to come, and objects of ours that no index will ever name."""
        for path in prepared.marks.paths.paths:
            if not os.path.lexists(self._tree.path(path)) and next(self._manifest.rows(path), None) is None:
                prepared.waiting.append(self._cache_path(path))
        for path in self._manifest.uploads():
            row = self._manifest.row(path)
            if not os.path.lexists(self._tree.path(path)) and (row is None or row.entry is None):
                prepared.orphans.append(path)

    def _compare_content(self, path: RelPath, row: Row, prepared: Prepared, *, rewritten: bool) -> None:
        try:
            content = _identify(self._tree.path(path), path)
        except FileNotFoundError:
            return  # its removal is marked, or will be
        if content is None:
            prepared.unstable.append(path)
            return
        local, found = content
        entry = row.entry
        if self._manifest.was_overtaken(local, entry):
            self._give_way(path, local, found)
            return
        verdict = judge(local, entry, row.base, rewritten=rewritten)
        if verdict is Verdict.SAME and entry is not None and entry.sha256 is None and path in prepared.marks.paths:
            verdict = Verdict.PUSH  # announced, and the index has nothing to prove that it is there already
        if verdict is Verdict.PUSH and row.base is None and entry is not None and not prepared.marks.dirty:
            return  # nobody announced a change, and nothing tells whose version is the older (H1)
        if verdict is Verdict.PUSH:
            unseen = entry is not None and not (entry.same_content(row.base) if row.base else rewritten)
            prepared.changes[path] = self._change(path, row)._replace(unseen=unseen)
        elif verdict is Verdict.SAME and entry is not None:
            prepared.same.append((path, entry, found))  # without a hash if the index has none: nothing proves it

    def _give_way(self, path: RelPath, local: IndexEntry, found: os.stat_result) -> None:
        """Keep our bytes aside and let the next pull bring theirs: for it, this file is in step with what was."""
        staged = self._tree.stage()
        shutil.copyfile(self._tree.path(path), staged)
        self._tree.keep_aside(path, staged, {"why": "another machine committed this path after it was sent from here"})
        self._manifest.set_bases([(path, local, found)])
        log.info("%s was committed by another machine after it was sent from here: ours is kept aside", path)

    def _change(self, path: RelPath, row: Row | None) -> Change:
        partition = self._manifest.partition_of(path)
        return Change(path, row.entry if row else None, row.base if row else None, partition)

    # --- uploading ----------------------------------------------------------------------------------------

    async def _upload(self, prepared: Prepared, signal: AbortSignal | None) -> None:
        """Content, then ``latest`` markers. All are tried before a failure is raised, and nothing is indexed then."""
        changes = list(prepared.changes.values())
        if self._parts.index.in_place and changes:
            transaction = await self._begin({change.path: change.partition for change in changes}, ())
            changes = [change._replace(when=transaction.precondition(change.path)) for change in changes]
        if any(change.path not in prepared.marks.paths for change in changes):
            # From here on objects may be newer than their entries: until the commit all this must count as dirty.
            prepared.own_marks.append(self._book.mark_unsettled())
        self._manifest.note_uploads((change.path, change.entry) for change in changes)
        failed: list[tuple[str, Exception]] = []
        for markers in (False, True):
            group = [change for change in changes if is_latest_marker(change.path) is markers]
            failed += await self._upload_all(group, prepared, signal)
        if failed:
            raise transfer_error("push", self._parts.remote.label, failed)

    async def _upload_all(
        self, changes: Sequence[Change], prepared: Prepared, signal: AbortSignal | None
    ) -> list[tuple[str, Exception]]:
        if not changes:
            return []
        batch = Batch(changes, self._upload_one, signal, what="files pushed")
        await batch.run(self._parts.remote.threads, Lane.PUSH, min(self._parts.push_width, len(changes)))
        for change, sent in batch.done:
            if sent is None:
                prepared.unstable.append(change.path)
            else:
                prepared.sent[change.path] = sent
        self._manifest.note_sent(sent.entry for sent in prepared.sent.values())
        return [(str(change.path), error) for change, error in batch.failed]

    def _upload_one(self, change: Change) -> Sent | None:
        """In a worker. Size and hash are of the very bytes that are sent; ``None`` if they would not hold still."""
        staged = self._tree.stage()
        content = None
        try:
            content = self._content(change.path, staged)
            if content is None:
                return None
            if change.entry is not None and change.unseen:
                self._keep_loser(change, change.entry, content.sha256)
            info = self._parts.remote.store.put(self._parts.keys.data(change.path), content.body, change.when)
        except FileNotFoundError:
            return None  # removed meanwhile: its removal is marked, or will be
        except PreconditionError:
            raise ConflictingWriteError(f"{change.path} was changed by another writer just now") from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                if content is None or isinstance(content.body, str):  # else there never was a copy
                    os.unlink(staged)
        mtime = timestamp(content.stat.st_mtime_ns) if content.stat is not None else None
        entry = IndexEntry(change.path, content.size, info.last_modified, mtime, content.sha256)
        return Sent(entry, content.stat)

    def _content(self, path: RelPath, staged: str) -> Content | None:
        text = link_text(self._tree, path)
        if text is not None:
            return Content(text, len(text), _sha256(text), None)
        return read_stable(self._tree.path(path), staged)

    def _keep_loser(self, change: Change, entry: IndexEntry, digest: str) -> None:
        """Changed here and there: the marked one wins, as its writer holds the model's lock; the other is kept."""
        if entry.sha256 == digest:
            return
        staged = self._tree.stage()
        try:
            self._parts.remote.store.download(self._parts.keys.data(change.path), staged)
        except AbsentError:
            return
        report: dict[str, object] = {"why": "replaced in the datastore by this cache", "remote": entry._asdict()}
        self._tree.keep_aside(change.path, staged, report)
        log.info("%s was changed by another machine, too: its version is kept in %s", change.path, self._tree.own)

    def _cache_path(self, path: str) -> str:
        return f"{self._tree.namespace}/{path}" if self._tree.namespace else path

    # --- committing ---------------------------------------------------------------------------------------

    async def _begin(self, paths: Mapping[RelPath, str | None], parked: Sequence[IndexEntry]) -> IndexTransaction:
        return await self._parts.index.begin(paths, self._manifest.watermark(), parked)

    async def _commit(
        self, prepared: Prepared, parked: list[IndexEntry], gone: list[RelPath], signal: AbortSignal | None
    ) -> None:
        hints: dict[RelPath, str | None] = {path: self._manifest.partition_of(path) for path in gone}
        hints |= {row.path: self._manifest.partition_of(row.path) for row in prepared.deletes}
        hints |= {path: change.partition for path, change in prepared.changes.items() if path in prepared.sent}
        transaction = await self._begin(hints, parked)
        if not transaction.in_place:
            self._check_unmoved(transaction, prepared)
        puts = [sent.entry for sent in prepared.sent.values()]
        deletes = [*(row.path for row in prepared.deletes), *gone, *transaction.internal()]
        self._check_locks()
        known = self._manifest.watermark()
        delta = await transaction.commit(puts, deletes)
        await self._delete_objects(prepared, transaction, signal)
        if delta is not None:
            await self._parts.remote.threads.write(Lane.DISK, self._manifest.apply, delta, known)
        elif transaction.in_place:
            await self._parts.refresh()
        moved_on = self._manifest.watermark() != known
        prepared.current = transaction.in_place or (prepared.current and moved_on and delta is not None)
        self._manifest.set_bases((path, sent.entry, sent.stat) for path, sent in prepared.sent.items())
        self._manifest.forget_uploads(prepared.sent)
        self._manifest.forget_bases(row.path for row in prepared.deletes)
        self._manifest.drop_entries([*(row.path for row in prepared.deletes), *gone])
        if not transaction.in_place:
            self._manifest.park(path for path in prepared.sent if partition_key(path) is None)

    def _check_unmoved(self, transaction: IndexTransaction, prepared: Prepared) -> None:
        """Nobody committed one of our paths since we decided on it; others' paths are merged."""
        for row in prepared.deletes:
            now = _entry_of(transaction, row.path)
            if now is not None and now != row.entry:
                raise ConflictingWriteError(
                    f"{row.path} was committed by another machine after it was deleted here",
                    remedy="it is still marked: pull, then push again",
                )
        for path, sent in prepared.sent.items():
            decided, now = prepared.changes[path].entry, _entry_of(transaction, path)
            if now is None or now == decided or sent.entry.same_content(now):
                continue
            # An un-indexed bucket is listed: there an entry without a hash is the object we have just put.
            if now.sha256 is not None or now.size != sent.entry.size:
                raise ConflictingWriteError(
                    f"{path} was committed by another machine while it was uploaded here",
                    remedy="it is still marked: push again",
                )

    async def _delete_objects(
        self, prepared: Prepared, transaction: IndexTransaction, signal: AbortSignal | None
    ) -> None:
        paths = [*(row.path for row in prepared.deletes), *prepared.orphans]
        if not paths:
            return

        def remove(path: RelPath) -> None:
            when = transaction.precondition(path)
            try:
                self._parts.remote.store.delete(self._parts.keys.data(path), ALWAYS if when.absent else when)
            except AbsentError:
                return

        batch = Batch(paths, remove, signal, what="objects removed")
        await batch.run(self._parts.remote.threads, Lane.PUSH, min(self._parts.push_width, len(paths)))
        if batch.failed:
            raise transfer_error(
                "delete", self._parts.remote.label, [(str(path), error) for path, error in batch.failed]
            )
        self._manifest.forget_uploads(prepared.orphans)

    # --- healing ------------------------------------------------------------------------------------------

    async def _lost_parked(self) -> list[IndexEntry]:
        """Entries we parked in ``_root`` that another writer dropped, as far as their objects exist (H6)."""
        entries = []
        for row in self._manifest.lost_parked():
            if row.entry is not None and await self._exists(row.path):
                entries.append(row.entry)
            else:
                self._manifest.drop_entries([row.path])
        return entries

    async def _dangling(self) -> list[RelPath]:
        """Entries whose objects a pull did not find, and are still not there: they go with this commit (H20)."""
        return [path for path in self._manifest.dangling() if not await self._exists(path)]

    async def _exists(self, path: RelPath) -> bool:
        try:
            await self._parts.remote.head(self._parts.keys.data(path))
        except AbsentError:
            return False
        return True

    # --- afterwards ---------------------------------------------------------------------------------------

    def _retire(self, prepared: Prepared) -> None:
        for path in prepared.unstable:
            self._book.mark(self._cache_path(path))
        watermark = self._manifest.watermark()
        complete = (
            prepared.current
            and watermark.mode is not IndexMode.UNKNOWN
            and not prepared.marks.lazy
            and not self._manifest.pending()
        )
        keep = self._book.still_awaited(prepared.waiting) | set(prepared.held)
        self._book.retire(prepared.marks, prepared.own_marks, keep, watermark if complete else None)


def _entry_of(transaction: IndexTransaction, path: RelPath) -> IndexEntry | None:
    try:
        return transaction.entry(path)
    except IndexCorruptError:
        return None  # a malformed entry names no content; ours replaces it


def _identify(full: str, path: RelPath) -> tuple[IndexEntry, os.stat_result] | None:
    """Size, time and hash of a file as of one moment; ``None`` if it keeps changing."""
    for _ in range(3):
        fd = os.open(full, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(fd, "rb", buffering=0) as file:
            before = os.fstat(fd)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            after = os.fstat(fd)
        if (before.st_mtime_ns, before.st_ctime_ns, before.st_size) == (
            after.st_mtime_ns,
            after.st_ctime_ns,
            after.st_size,
        ):
            mtime = timestamp(after.st_mtime_ns)
            return IndexEntry(path, after.st_size, timestamp(time.time_ns()), mtime, digest), after
    return None


def _sha256(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()
