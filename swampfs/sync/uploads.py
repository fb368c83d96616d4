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

from swampfs.errors import ConflictingWriteError, PreconditionError, StoreError, StoreUnreachableError
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
_IN_A_ROW = 8  # small files that one thread uploads
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


class _Sent(NamedTuple):
    """What the index will say of what is in the store, and the time of its content, in nanoseconds."""

    entry: IndexEntry
    mtime_ns: int


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

    async def upload(
        self, records: Sequence[DirtyPath], when: Callable[[RelPath], Precondition]
    ) -> tuple[dict[RelPath, IndexEntry], list[Exception]]:
        """The entries of what is in the store now for sealed records, by path, and what failed.

        Files that were changed, removed or renamed are in neither: their newer journal records say what to do.
        A failure is a ConflictingWriteError, StoreError or OSError.
        """
        entries: dict[RelPath, IndexEntry] = {}
        failures: list[Exception] = []
        left: list[DirtyPath] = []
        for record in records:
            ahead = self._ahead.get(record.path)
            if ahead is not None and self._is_valid(ahead, record):
                entries[record.path] = ahead.entry._replace(posix=self._parts.posix(record.path, ahead.mtime_ns))
            else:
                left.append(record)

        async def send(row: Sequence[DirtyPath]) -> None:
            for record, answer in await self._send(row, when):
                match answer:
                    case _Sent():
                        entries[record.path] = answer.entry
                    case FileNotFoundError() if not self._is_here(record):
                        self._lost(record)
                    case PreconditionError():
                        changed = f"{record.path} was changed by another writer just now"
                        failures.append(ConflictingWriteError(changed))
                    case Exception():
                        failures.append(answer)

        failures += await for_each(_rows(left), send, at_once=UPLOADS_AT_ONCE)
        return entries, failures

    async def go_ahead(self, paths: Sequence[RelPath], *, until: Callable[[], bool]) -> bool:
        """Upload those that can go ahead, and begin none after ``until``.

        Returns whether to go on: what fails is for the push to explain.
        """
        if self._parts.index.in_place or self._parts.catalog.watermark().mode is IndexMode.LISTING:
            return False  # everybody would see it
        sealed = self._journal.seal([path for path in paths if self._may_go(path)])
        self._journal.unseal(record.path for record in sealed if record.base is not None)
        records = [record for record in sealed if record.base is None]

        async def go(row: Sequence[DirtyPath]) -> None:
            if not until():
                await self._go(row)

        await for_each(_rows(records), go, at_once=UPLOADS_AT_ONCE)
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
        locks = {record.path: self._leases.lock_over(record.path) for record in records}

        def when(path: RelPath) -> Precondition | None:
            lock = locks[path]
            return ABSENT if lock is not None and self._leases.lock_over(path) is lock else None

        for record, answer in await self._send(records, when):
            lock = locks[record.path]
            if isinstance(answer, _Sent) and lock is not None:
                self._ahead[record.path] = _Ahead(record.generation, lock, answer.mtime_ns, answer.entry)
            elif answer is not None:
                log.debug("%s does not go ahead: %s", record.path, answer)

    async def _send(
        self, records: Sequence[DirtyPath], when: Callable[[RelPath], Precondition | None]
    ) -> list[tuple[DirtyPath, _Sent | Exception | None]]:
        """Upload, or say why not. ``None``, or nothing: it was changed meanwhile, or ``when`` has no condition for it.

        Those that are small go one after the other in one thread: a hop for each would cost as much as its upload.
        """
        threads = self._parts.remote.threads
        contents = await threads.read(Lane.PUSH, lambda: [self._small(record) for record in records])
        going: list[tuple[DirtyPath, _Content, Precondition]] = []
        alone: list[DirtyPath] = []
        for record, content in zip(records, contents, strict=True):
            if content is None:
                alone.append(record)
            elif self._journal.is_newest(record) and (condition := when(record.path)) is not None:
                going.append((record, content, condition))
        answers: list[tuple[DirtyPath, _Sent | Exception | None]] = []
        if going:
            self._journal.note_sent([(record, content.size, content.sha256) for record, content, _ in going])
            puts = [(self._parts.keys.data(record.path), content.body, how) for record, content, how in going]
            said = await threads.write(Lane.PUSH, self._put_each, puts)
            for (record, content, _), info in zip(going, said, strict=True):
                answers.append((record, info if isinstance(info, Exception) else self._sent(record, content, info)))
        return answers + [(record, await self._send_alone(record, when)) for record in alone]

    async def _send_alone(
        self, record: DirtyPath, when: Callable[[RelPath], Precondition | None]
    ) -> _Sent | Exception | None:
        condition = when(record.path)
        if condition is None:
            return None
        try:
            return await self._put(record, condition)
        except Exception as error:
            return error

    def _put_each(self, puts: Sequence[tuple[str, bytes | str, Precondition]]) -> list[ObjectInfo | Exception]:
        """In a thread. What cannot be reached is not asked again."""
        remote = self._parts.remote
        answers: list[ObjectInfo | Exception] = []
        for put in puts:
            if answers and isinstance(answers[-1], StoreUnreachableError):
                answers.append(answers[-1])
            elif remote.threads.is_ending:
                answers.append(StoreError("not sent: this process ends"))
            else:
                try:
                    answers.append(remote.store.put(*put))
                except (StoreError, OSError) as error:
                    answers.append(error)
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

    def _sent(self, record: DirtyPath, content: _Content, info: ObjectInfo) -> _Sent:
        posix = self._parts.posix(record.path, content.mtime_ns)
        modified, written = info.last_modified, timestamp(content.mtime_ns)
        entry = IndexEntry(record.path, content.size, modified, written, content.sha256, posix)
        return _Sent(entry, content.mtime_ns)

    async def _put(self, record: DirtyPath, when: Precondition) -> _Sent | None:
        """Upload a private copy, so that size, hash and bytes are of one moment (H26).

        Where there is no room for one, the file itself, which then must not have changed meanwhile.
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
            return self._sent(record, content, info)
        finally:
            if os.path.lexists(staged):
                os.unlink(staged)

    def _is_here(self, record: DirtyPath) -> bool:
        """Whether what is to be sent is on this machine: then it was the store that missed something."""
        return self._journal.is_newest(record) and os.path.lexists(self._parts.cache.path(record.path))

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


def _rows(records: Sequence[DirtyPath]) -> list[Sequence[DirtyPath]]:
    """For one thread each: as few as keep all threads at work, so that many cost less."""
    each = min(_IN_A_ROW, -(-len(records) // UPLOADS_AT_ONCE))
    return [records[at : at + each] for at in range(0, len(records), each)] if records else []
