"""One datastore's sync service: the four verbs the file system and the library use, over one set of local state.

``mark_dirty`` before bytes change, ``hydrate_file`` before they are read, ``pull_changed`` to follow the others,
``push_changed`` to be followed. Each is documented where it is implemented; this class only joins them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Container, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from swampfs.errors import StoreError
from swampfs.names import Keyspace, RelPath, is_scratch
from swampfs.provider import RemoteIndex
from swampfs.records import IndexMode, Node, PushReport, TreeChange, timestamp
from swampfs.spans import span
from swampfs.state.cache_dir import CacheDir
from swampfs.state.catalog import Catalog
from swampfs.state.journal import Journal
from swampfs.state.schema import is_disk_full
from swampfs.state.sidecar import Sidecar
from swampfs.sync.directories import Directories, Found
from swampfs.sync.hydrate import Hydrator
from swampfs.sync.leases import Leases
from swampfs.sync.locks import Lock, prove_exclusive_create
from swampfs.sync.parallel import for_each
from swampfs.sync.parts import Parts
from swampfs.sync.pull import Puller
from swampfs.sync.push import Pusher
from swampfs.sync.remote import Remote
from swampfs.sync.replay import replay
from swampfs.sync.room import Room
from swampfs.sync.visibility import Visibility

log = logging.getLogger(__name__)

MakeLock = Callable[[str, Callable[[str, str | None], None]], Lock]
"""Makes the lock of a key; the second argument is told what is about to be held, and what no longer is."""

_AT_ONCE = 8
_BOOT = "boot"  # during which the last mount ran, or
_ENDED = "ended"  # in order, with everything on the disk
_PROVEN = "preconditions_proven"
_EXCLUSIVE_PROVEN = "exclusive_create_proven"


class SyncService:
    """Cache directory ⇄ remote for one bound namespace. Lives on the loop."""

    def __init__(
        self,
        remote: Remote,
        keys: Keyspace,
        index: RemoteIndex,
        home: str,
        *,
        make_lock: MakeLock,
        prove: Callable[[], Awaitable[None]] | None,
        start_soon: Callable[..., Any],
        timeout_s: float,
        lock_wait_s: float,
        queue_offline: bool = True,
    ) -> None:
        """``lock_wait_s`` bounds how long a writer waits for another machine's lock."""
        self.remote = remote
        with ExitStack() as undo:
            self.catalog = Catalog(f"{home}/state/catalog.db")
            undo.callback(self.catalog.close)
            self.journal = Journal(f"{home}/state/journal.db")
            undo.callback(self.journal.close)
            self.sidecar = Sidecar(f"{home}/state")
            self.cache = CacheDir(home)
            self.cache.clear_staging()
            undo.pop_all()
        self.parts = parts = Parts(remote, keys, index, self.catalog, self.cache, self.journal)
        self.hydrator = Hydrator(parts, refresh=self.pull_changed, start_soon=start_soon, timeout_s=timeout_s)
        self.is_open: Callable[[str], bool] = lambda path: False
        """Whether a file is open for writing; set by the file system."""
        self.drop_content: Callable[[Node], None] = lambda node: self.cache.remove(node.path)
        """What becomes of an inode whose name stands for other content now; set by the file system."""
        self._directories = Directories(remote, keys, self.catalog)
        self.leases = Leases(
            keys,
            make_lock=self.lock,
            refresh=self._refresh_under,
            before_release=self._directories.store,
            prove_exclusive=self._prove_exclusive,
            start_soon=start_soon,
            wait_s=lock_wait_s,
            queue_offline=queue_offline,
        )
        self._puller = Puller(parts, self.journal, lambda node: self.drop_content(node))
        self._pusher = Pusher(
            parts,
            busy=self.journal,
            is_open=lambda path: self.is_open(path),
            drop_content=lambda node: self.drop_content(node),
            make_lock=self.lock,
            leases=self.leases,
        )
        self.unfinished: Container[str] = self._pusher.unfinished
        """Changes that wait for the end of what a user does under a lock."""
        self._prove = prove
        self._make_lock = make_lock
        self.on_changes: Callable[[list[TreeChange]], None] | None = None
        self.settle: Callable[[], Awaitable[None]] = _nothing
        """Return when the kernel shows nothing older than what was announced; set by the composition root."""
        self.refreshed_at: float | None = None
        self.visibility = Visibility()

    def lock(self, key: str) -> Lock:
        """The lock of a key, given back by the next process should this one die with it."""
        return self._make_lock(key, self._note_lock)

    def _note_lock(self, key: str, nonce: str | None) -> None:
        try:
            self.catalog.note_lock(key, nonce)
        except Exception as error:
            if nonce is not None or not is_disk_full(error):
                raise
            self.room.databases_need_room()  # it is given back all the same: a note too many harms nobody

    async def _prove_exclusive(self, lock: Lock) -> None:
        """Once per state directory, with a lock in hand: see that creating it twice is refused."""
        if self._prove is not None and self.catalog.fact(_EXCLUSIVE_PROVEN) is None:
            await prove_exclusive_create(self.remote, lock)
            self.catalog.set_fact(_EXCLUSIVE_PROVEN, timestamp(time.time_ns()))

    async def _refresh_under(self, names: Sequence[RelPath]) -> None:
        """With locks in hand: see everything that was done under them so far."""
        records: list[Found] = []

        async def read(name: RelPath) -> None:
            records.append(await self._directories.read(name))

        looks: list[Callable[[], Awaitable[object]]] = [self.pull_changed]
        looks += [partial(read, name) for name in names]
        errors = await for_each(looks, lambda look: look(), at_once=_AT_ONCE)
        if errors:
            raise errors[0]
        self.announce([change for found in records for change in self._directories.apply(found)])
        await self.settle()

    @property
    def room(self) -> Room:
        return self.hydrator.room

    def use_room(self, room: Room) -> None:
        """Where content goes has a limit."""
        self.hydrator.room = self._pusher.uploads.room = room

    def close(self) -> None:
        """The end of a mount: nothing of what was under way or had lost its name takes room until the next."""
        self.cache.clear_staging()
        if self.journal.fact(_BOOT) is not None:
            self.cache.sync()  # also what was pushed or fetched: the next mount believes it
            self.journal.set_fact(_BOOT, _ENDED)
        self.catalog.close()
        self.journal.close()

    async def open(self, *, writable: bool) -> int:
        """First poll, crash replay, and proof that the store can be written safely.

        Returns the number of changes still to be pushed. A store that does not answer is an error only for a state
        directory that has never seen it; otherwise work goes on from what is known.
        """
        known = self.catalog.watermark().mode is not IndexMode.UNKNOWN
        try:
            await self.pull_changed()
            if not known:
                records = await self._directories.read_all()
                for found in (*records, *records):  # one may say the mode of what another shows
                    self._directories.apply(found)
        except Exception as error:
            if not (known and getattr(error, "retryable", False)):
                raise
        boot = _boot_id()
        machine_died = self.journal.fact(_BOOT) not in (None, boot, _ENDED)
        pending = replay(self.catalog, self.cache, self.journal, self.sidecar, machine_died=machine_died)
        self.journal.set_fact(_BOOT, boot)
        if pending:
            self.sidecar.mark_bulk()
        else:
            self.sidecar.mark_clean(self.catalog.watermark(), timestamp(time.time_ns()))
        if writable:
            await self._give_back_locks()
        if writable and self._prove is not None and self.catalog.fact(_PROVEN) is None:
            await self._prove()
            self.catalog.set_fact(_PROVEN, timestamp(time.time_ns()))
        return pending

    async def _give_back_locks(self) -> None:
        """Locks of a process that died holding them: nobody has to wait for their TTL."""
        for key, nonce in self.catalog.noted_locks().items():
            try:
                await self.lock(key).force_release(nonce)
            except StoreError as error:
                log.info("lock %s stays until its TTL: %s", key, error)
            self.catalog.note_lock(key, None)

    def mark_dirty(self, node: Node) -> None:
        """Durable before return: the bytes of this file are about to change. No network, no look at the file.

        Scratch names are not announced: they are published under the name they are renamed to, or never.
        """
        if is_scratch(node.path):
            return
        if len(self.journal) == 0:
            self.sidecar.mark_bulk()
        self.journal.mark_write(node.path, node.base, node.partition)

    def mark_deleted(self, node: Node) -> None:
        """Durable before return: this file is about to disappear, on purpose."""
        if len(self.journal) == 0 and node.base is not None:
            self.sidecar.mark_bulk()
        self.journal.mark_delete(node.path, node.base, node.partition)

    def mark_attributes(self, node: Node) -> None:
        """Durable before return: mode, owner or time of this file are about to be others than those published."""
        if is_scratch(node.path) or (node.base is None and node.path not in self.journal):
            return
        if len(self.journal) == 0:
            self.sidecar.mark_bulk()
        self.journal.mark_attributes(node.path, node.base, node.partition)

    async def hydrate_file(self, path: RelPath) -> None:
        """See :meth:`swampfs.sync.hydrate.Hydrator.hydrate`."""
        await self.hydrator.hydrate(path)

    async def pull_changed(self) -> list[TreeChange]:
        """See :meth:`swampfs.sync.pull.Puller.pull`. Listeners are told before this returns."""
        began = time.monotonic()
        with span("pull"):
            changes = await self._puller.pull()
        self.refreshed_at = time.monotonic()
        self.announce(changes)
        if changes:
            await self.settle()
        self.visibility.polled(began, found=bool(changes))
        return changes

    async def push_changed(self, paths: Sequence[str], *, even_open: Container[str] = ()) -> PushReport:
        """See :meth:`swampfs.sync.push.Pusher.push`."""
        with span("push", paths=len(paths)):
            report, changes = await self._pusher.push(paths, even_open=even_open)
        if len(self.journal) == 0:
            self.sidecar.mark_clean(self.catalog.watermark(), timestamp(time.time_ns()))
        self.announce(changes)
        return report

    async def upload_ahead(self, paths: Sequence[RelPath], *, until: Callable[[], bool]) -> bool:
        """See :meth:`swampfs.sync.uploads.Uploads.go_ahead`."""
        return await self._pusher.uploads.go_ahead(paths, until=until)

    def are_ahead(self, paths: Sequence[RelPath]) -> bool:
        """See :meth:`swampfs.sync.uploads.Uploads.are_ahead`."""
        return self._pusher.uploads.are_ahead(paths)

    def announce(self, changes: list[TreeChange]) -> None:
        """Tell whoever shows them to others."""
        if changes and self.on_changes is not None:
            self.on_changes(changes)


async def _nothing() -> None:
    return


def _boot_id() -> str:
    """Another one whenever this machine was started anew."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
