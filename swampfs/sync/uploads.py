"""Content on its way into the store: a private copy, its hash, the object, and the entry the index will have of it.

New files of a model may go ahead of their push: while it waits for quiet, under the lock their writer holds. Nobody
sees them, for no index names them; the push that follows finds them there, or, if anything happened to them
meanwhile, uploads what there is then. What was sent is in the journal, so that what is removed before it was ever
published is removed from the store, too.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from swampfs.errors import ConflictingWriteError, PreconditionError, StoreError
from swampfs.names import RelPath, is_latest_marker, model_of
from swampfs.provider import ABSENT, ObjectInfo, Precondition
from swampfs.records import DirtyPath, Finding, IndexEntry, IndexMode, Op, timestamp
from swampfs.sync.hashing import hash_file
from swampfs.sync.leases import Leases
from swampfs.sync.locks import Lock
from swampfs.sync.parallel import for_each
from swampfs.sync.parts import Parts
from swampfs.sync.room import Room, is_full
from swampfs.threads import Lane

log = logging.getLogger(__name__)

UPLOADS_AT_ONCE = 32
_IN_MEMORY = 64 << 10  # bytes of a file whose private copy needs no file
_IN_A_ROW = 8  # files that go ahead in one thread
LARGEST_AHEAD = 1 << 20
"""Bytes of a file that goes ahead: whoever wants to push meanwhile waits for it."""


class _Ahead(NamedTuple):
    """What is in the store already."""

    generation: int
    lock: Lock  # under which it was uploaded: since then nobody else could touch it
    mtime_ns: int
    entry: IndexEntry


class _Content(NamedTuple):
    """A private copy: its bytes, or where they are, and what is said of them."""

    body: bytes | str
    mtime_ns: int
    size: int
    sha256: str


class Uploads:
    """Of one datastore. The writeback task does one thing after the other: a push, or what goes ahead of it."""

    def __init__(self, parts: Parts, leases: Leases, *, is_settled: Callable[[str], bool]) -> None:
        """``is_settled``: whether a path could be pushed, for all its users do with it."""
        self._parts = parts
        self._journal = parts.journal
        self._leases = leases
        self._is_settled = is_settled
        self._ahead: dict[str, _Ahead] = {}
        self.room = Room()

    async def upload(self, record: DirtyPath, when: Precondition) -> IndexEntry | None:
        """The entry of what is in the store now for a sealed record.

        ``None`` if the file was changed, removed or renamed: its newer journal record says what to do.
        Raises ConflictingWriteError, StoreError, OSError.
        """
        ahead = self._ahead.get(record.path)
        if ahead is not None and self._is_valid(ahead, record):
            return ahead.entry._replace(posix=self._parts.posix(record.path, ahead.mtime_ns))
        try:
            done = await self._put(record, when)
        except FileNotFoundError:
            self._lost(record)
            return None
        except PreconditionError:
            raise ConflictingWriteError(f"{record.path} was changed by another writer just now") from None
        return None if done is None else done[0]

    async def go_ahead(self, paths: Sequence[RelPath], *, until: Callable[[], bool]) -> bool:
        """Upload those that can go ahead, and begin none after ``until``.

        Returns whether to go on: what fails is for the push to explain.
        """
        if self._parts.index.in_place or self._parts.catalog.watermark().mode is IndexMode.LISTING:
            return False  # everybody would see it
        sealed = self._journal.seal([path for path in paths if self._may_go(path)])
        self._journal.unseal(record.path for record in sealed if record.base is not None)
        records = [record for record in sealed if record.base is None]

        async def go(records: Sequence[DirtyPath]) -> None:
            if not until():
                await self._go(records)

        rows = [records[at : at + _IN_A_ROW] for at in range(0, len(records), _IN_A_ROW)]
        await for_each(rows, go, at_once=UPLOADS_AT_ONCE)
        failed = [record.path for record in records if record.path not in self._ahead]
        self._journal.unseal(failed)
        return not failed

    def are_ahead(self, paths: Sequence[RelPath]) -> bool:
        """Whether a push of these has nothing to upload but markers, as far as can be told in advance."""
        return all(is_latest_marker(path) or self._is_newest(path) for path in paths)

    def _is_newest(self, path: RelPath) -> bool:
        ahead = self._ahead.get(path)
        return ahead is not None and ahead.generation == self._journal.generation(path)

    def _is_valid(self, ahead: _Ahead, record: DirtyPath) -> bool:
        """Whether nobody touched it since: no user of ours, and, for the lock never left us, nobody else."""
        if ahead.generation != record.generation or not self._journal.is_newest(record):
            return False
        return ahead.lock is self._leases.lock_over(record.path)

    def settled(self, records: Iterable[DirtyPath]) -> None:
        """A push is over."""
        for record in records:
            self._ahead.pop(record.path, None)

    def _may_go(self, path: RelPath) -> bool:
        """Under a model's lock, which keeps all others out."""
        if path in self._ahead or self._journal.op(path) is not Op.WRITE or model_of(path) is None:
            return False
        if is_latest_marker(path) or not self._is_settled(path) or self._leases.lock_over(path) is None:
            return False
        stat = self._parts.cache.stat(path)
        return stat is not None and stat.st_size <= LARGEST_AHEAD

    async def _go(self, records: Sequence[DirtyPath]) -> None:
        """Those that are small one after the other in one thread: a hop for each would cost as much as its upload."""
        threads = self._parts.remote.threads
        contents = await threads.read(Lane.PUSH, lambda: [self._small(record) for record in records])
        taken = list(zip(records, contents, strict=True))
        going = [
            (record, lock, content)
            for record, content in taken
            if content is not None
            and (lock := self._leases.lock_over(record.path)) is not None
            and self._journal.is_newest(record)
        ]
        self._journal.note_sent((record, content.size, content.sha256) for record, _, content in going)
        bodies = [(self._parts.keys.data(record.path), content.body) for record, _, content in going]
        answers = await threads.write(Lane.PUSH, self._put_each, bodies)
        for (record, lock, content), info in zip(going, answers, strict=True):
            if info is not None:
                entry = self._entry(record, content, info)
                self._ahead[record.path] = _Ahead(record.generation, lock, content.mtime_ns, entry)
        for record, small in taken:
            if small is None:
                await self._go_alone(record)

    async def _go_alone(self, record: DirtyPath) -> None:
        lock = self._leases.lock_over(record.path)
        if lock is None:
            return
        try:
            done = await self._put(record, ABSENT)
        except (StoreError, OSError) as error:
            log.debug("%s does not go ahead: %s", record.path, error)
            return
        if done is not None:
            entry, mtime_ns = done
            self._ahead[record.path] = _Ahead(record.generation, lock, mtime_ns, entry)

    def _put_each(self, bodies: Sequence[tuple[str, bytes | str]]) -> list[ObjectInfo | None]:
        """In a thread. ``None`` from what fails on."""
        answers: list[ObjectInfo | None] = [None] * len(bodies)
        for at, (key, body) in enumerate(bodies):
            try:
                answers[at] = self._parts.remote.store.put(key, body, ABSENT)
            except (StoreError, OSError) as error:
                log.debug("%s does not go ahead: %s", key, error)
                break
        return answers

    def _small(self, record: DirtyPath) -> _Content | None:
        """In a thread: a copy in memory. ``None``: it needs one on the disk, or cannot be read."""
        try:
            found = self._parts.cache.small(record.path, _IN_MEMORY)
        except OSError:
            return None
        if found is None:
            return None
        body, mtime_ns = found
        return _Content(body, mtime_ns, len(body), hashlib.sha256(body).hexdigest())

    def _entry(self, record: DirtyPath, content: _Content, info: ObjectInfo) -> IndexEntry:
        posix = self._parts.posix(record.path, content.mtime_ns)
        modified, written = info.last_modified, timestamp(content.mtime_ns)
        return IndexEntry(record.path, content.size, modified, written, content.sha256, posix)

    async def _put(self, record: DirtyPath, when: Precondition) -> tuple[IndexEntry, int] | None:
        """Upload a private copy, so that size, hash and bytes are of one moment (H26).

        Where there is no room for one, the file itself, which then must not have changed meanwhile. Returns the entry
        and the time of the content, in nanoseconds.
        """
        parts = self._parts
        staged = parts.cache.stage()
        source = parts.cache.path(record.path)

        def take() -> _Content:
            small = self._small(record)
            if small is not None:
                return small
            try:
                mtime_ns, body = parts.cache.snapshot(record.path, staged), staged
            except OSError as error:
                if not is_full(error):
                    raise
                mtime_ns, body = os.stat(source).st_mtime_ns, source
            return _Content(body, mtime_ns, os.stat(body).st_size, hash_file(body))

        try:
            content = await parts.remote.threads.read(Lane.PUSH, take)
            if content.body == source and await self.room.make_room(content.size):
                content = await parts.remote.threads.read(Lane.PUSH, take)
            if not self._journal.is_newest(record):
                return None  # changed since the seal: the copy may be of half a change
            self._journal.note_sent([(record, content.size, content.sha256)])
            info = await parts.remote.put(parts.keys.data(record.path), content.body, when)
            if content.body == source and not self._journal.is_newest(record):
                return None  # the object may be of half a change: the newer record replaces it
            return self._entry(record, content, info), content.mtime_ns
        finally:
            if os.path.lexists(staged):
                os.unlink(staged)

    def _lost(self, record: DirtyPath) -> None:
        """There is nothing to upload. If no newer record explains it, the content is gone: say so, do not ask again."""
        if not self._journal.is_newest(record):
            return
        self._journal.forget(record.path)
        catalog, partition = self._parts.catalog, self._parts.partition(record.path)
        node = catalog.at(record.path)
        if node is not None:
            catalog.reset_to_remote(node, record.base, partition)
            catalog.read_again(partition)
        finding = Finding(record.path, "content-lost", "its unpushed content is missing from the state directory")
        catalog.report([finding])
