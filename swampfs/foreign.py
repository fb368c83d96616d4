"""The foreign namespaces of a mount: found by name, opened read-only at the first look into one, then followed.

Each is a datastore of its own with its own catalog and content, ``foreign/<name>/`` in the state directory. One that
nobody looks into costs nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import trio

from swampfs.datastore import Datastore
from swampfs.errors import SwampfsError
from swampfs.fs.attributes import Owner, stale
from swampfs.fs.consistency import CloseToOpen
from swampfs.fs.localtier import LocalTier
from swampfs.fs.prefetch import Prefetch
from swampfs.fs.refresh import Refresh
from swampfs.fs.vfs import FileSystem
from swampfs.fs.xattrs import Xattrs
from swampfs.fuse.federation import FIRST, LAST, numbers_of
from swampfs.fuse.operations import Operations
from swampfs.fuse.session import Invalidator
from swampfs.names import RelPath
from swampfs.settings import Consistency, MountSettings, TierPolicy
from swampfs.state.catalog import Catalog
from swampfs.sync.namespaces import Namespaces
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)

_NUMBER = "namespace"
_SHARE, _FIRST_SHARE = 0.1, 0.8  # of an operation's time, for waiting for a listing


class _Part(NamedTuple):
    """A namespace that is followed."""

    sync: SyncService
    refresh: Refresh
    operations: Operations


class _Opening:
    """It belongs to no caller: one that gives up leaves it running for the next."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.part: _Part | None = None
        self.error: Exception | None = None


class ForeignNamespaces:
    """:class:`swampfs.fuse.federation.Namespaces` of one datastore. ``catalog`` remembers their numbers."""

    def __init__(
        self,
        settings: MountSettings,
        datastore: Datastore,
        catalog: Catalog,
        nursery: trio.Nursery,
        at_end: ExitStack,
    ) -> None:
        self._settings = settings
        self._datastore = datastore
        self._catalog = catalog
        self._nursery = nursery
        self._at_end = at_end
        self._registry = Namespaces(datastore.remote, datastore.keys, newline=False)
        self._shown = {name: int(number) for name, number in catalog.facts(_NUMBER).items()}
        self._looking: trio.Event | None = None
        self._began = self._ended = -float("inf")
        self._openings: dict[int, _Opening] = {}

    def numbers(self) -> Mapping[str, int]:
        return self._shown

    def look_soon(self) -> None:
        """At most one look per refresh interval. A datastore out of reach has those it had."""
        if self._looking is None and time.monotonic() - self._ended >= self._settings.refresh_s:
            self._looking = trio.Event()
            self._began = time.monotonic()
            self._nursery.start_soon(self._look, self._looking)

    async def look(self) -> None:
        """A look that takes long goes on, and its callers go on with what is known."""
        self.look_soon()
        if self._looking is not None:
            with trio.move_on_after(max(0.0, self._began + self._patience_s - time.monotonic())):
                await self._looking.wait()

    @property
    def _patience_s(self) -> float:
        return self._settings.timeout_s * (_SHARE if self._shown else _FIRST_SHARE)

    async def _look(self, done: trio.Event) -> None:
        try:
            found = await self._registry.list()
            self._show([name for name in found if name != self._settings.source.namespace])
        except SwampfsError as error:
            log.info("the namespaces could not be listed: %s", error.line())
        except Exception:  # a background task that fails takes the mount down
            log.exception("the namespaces could not be listed")
        finally:
            self._ended, self._looking = time.monotonic(), None
            done.set()

    def _show(self, names: list[str]) -> None:
        """Names keep their numbers; those that are gone leave theirs to others, unless they are in use."""
        for name in set(self._shown) - set(names):
            if self._shown[name] not in self._openings:
                self._catalog.drop_fact(f"{_NUMBER}:{name}")
        in_use = {number for name, number in self._shown.items() if name in names} | set(self._openings)
        free = (number for number in range(FIRST, LAST + 1) if number not in in_use)
        known = {name: int(number) for name, number in self._catalog.facts(_NUMBER).items()}
        self._shown = {}
        for name in names:
            number = known.get(name) or next(free, None)
            if number is None:
                break
            self._shown[name] = number
            if name not in known:
                self._catalog.set_fact(f"{_NUMBER}:{name}", str(number))

    async def open(self, number: int) -> Operations:
        """Raises FileError and what the first poll raises."""
        opening = self._openings.get(number)
        if opening is None:
            name = next((name for name, shown in self._shown.items() if shown == number), None)
            if name is None:
                raise stale(numbers_of(number).root)
            opening = self._openings[number] = _Opening()
            self._nursery.start_soon(self._finish, opening, name, number)
        await opening.done.wait()
        if opening.part is None:
            raise opening.error or stale(numbers_of(number).root)
        return opening.part.operations

    async def _finish(self, opening: _Opening, name: str, number: int) -> None:
        try:
            opening.part = await self._opened(name, number)
        except Exception as error:
            opening.error = error
            del self._openings[number]
        finally:
            opening.done.set()

    async def _opened(self, name: str, number: int) -> _Part:
        settings, datastore = self._settings, self._datastore.in_namespace(name)
        home = settings.state_dir / "foreign" / name
        (home / "state").mkdir(parents=True, exist_ok=True, mode=0o700)
        sync = SyncService(
            datastore.remote,
            datastore.keys,
            datastore.index,
            str(home),
            make_lock=datastore.make_lock,
            prove=None,
            start_soon=self._nursery.start_soon,
            timeout_s=settings.timeout_s,
            lock_wait_s=settings.timeout_s,
        )
        try:
            await sync.open(writable=False)
        except BaseException:
            sync.close()
            raise
        self._at_end.callback(sync.close)
        numbers = numbers_of(number)
        invalidator = Invalidator(datastore.remote.threads, numbers)
        sync.on_changes, sync.settle = invalidator, invalidator.settle
        fs = FileSystem(
            sync,
            LocalTier(str(home / "local"), TierPolicy()),
            owner=Owner(settings.uid, settings.gid, settings.umask),
            read_only=True,
            on_dirty=_nothing,
            invalidate=invalidator,
        )
        if settings.prefetch:
            fs.files.prefetch = Prefetch(sync)
            self._nursery.start_soon(fs.files.prefetch.run)
        if settings.consistency is Consistency.CLOSE_TO_OPEN:
            fs.close_to_open = CloseToOpen(sync, _never)
        operations = Operations(fs, settings.timeout_s, numbers)
        if settings.xattrs:
            operations.xattrs = Xattrs(sync, fs.inodes, _no_error)
        if settings.writeback_cache and not settings.read_only:
            invalidator.show_times_of(fs)
        invalidator.lives_on, invalidator.is_in_use = fs.tree.lives_on, operations.in_use.__contains__
        refresh = Refresh(sync, settings.refresh_s)
        self._nursery.start_soon(invalidator.run)
        self._nursery.start_soon(refresh.run)
        return _Part(sync, refresh, operations)

    async def refresh(self) -> None:
        """One poll of each that is followed."""
        self._ended = -float("inf")
        self.look_soon()
        for opening in list(self._openings.values()):
            if opening.part is not None:
                await opening.part.refresh.once()

    def as_json(self) -> list[dict[str, Any]]:
        """For ``status``."""
        return [self._describe(name, number) for name, number in sorted(self._shown.items())]

    def _describe(self, name: str, number: int) -> dict[str, Any]:
        opening = self._openings.get(number)
        part = opening.part if opening is not None else None
        if part is None:
            return {"namespace": name, "followed": False}
        totals = part.sync.catalog.totals()
        return {
            "namespace": name,
            "followed": True,
            "files": totals["files"],
            "hydrated": totals["clean"],
            "refreshAgeMs": part.refresh.age_ms(),
            "lastError": part.refresh.last_error,
        }


def _no_error() -> None:
    """Nothing is pushed here."""


def _nothing(path: RelPath) -> None:
    """Nothing becomes dirty where nothing is written."""


async def _never(paths: Sequence[RelPath]) -> None:
    """Nothing is published where nothing is written."""
