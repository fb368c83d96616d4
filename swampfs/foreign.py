"""The foreign namespaces of a mount: found by name, opened read-only at the first look into one, then followed.

Each is a datastore of its own with its own catalog and content, ``foreign/<name>/`` in the state directory. One that
nobody looks into costs nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any, NamedTuple

import trio

from swampfs.datastore import Datastore
from swampfs.errors import SwampfsError
from swampfs.fs.attributes import Owner, stale
from swampfs.fs.consistency import CloseToOpen
from swampfs.fs.localtier import LocalTier
from swampfs.fs.refresh import Refresh
from swampfs.fs.vfs import FileSystem
from swampfs.fuse.federation import MOST, OWN, base_of
from swampfs.fuse.operations import Operations
from swampfs.fuse.session import Invalidator
from swampfs.names import RelPath
from swampfs.settings import Consistency, MountSettings, TierPolicy
from swampfs.state.catalog import Catalog
from swampfs.sync.namespaces import Namespaces
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)

_NUMBER = "namespace"


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
        self._known = {name: int(number) for name, number in catalog.facts(_NUMBER).items()}
        self._shown = dict(self._known)  # until the datastore says which there are
        self._looked_at = -float("inf")
        self._turn = trio.Lock()
        self._openings: dict[int, _Opening] = {}

    def numbers(self) -> Mapping[str, int]:
        return self._shown

    async def look(self) -> None:
        """At most one look per refresh interval. A datastore out of reach has those it had."""
        async with self._turn:
            if time.monotonic() - self._looked_at < self._settings.refresh_s:
                return
            try:
                found = await self._registry.list()
            except SwampfsError as error:
                log.info("the namespaces could not be listed: %s", error.line())
            else:
                self._shown = {name: self._number(name) for name in found if name != self._settings.source.namespace}
                self._shown = {name: number for name, number in self._shown.items() if number <= MOST}
            self._looked_at = time.monotonic()

    def _number(self, name: str) -> int:
        if name not in self._known:
            self._known[name] = max(self._known.values(), default=OWN) + 1
            self._catalog.set_fact(f"{_NUMBER}:{name}", str(self._known[name]))
        return self._known[name]

    async def open(self, number: int) -> Operations:
        """Raises FileError and what the first poll raises."""
        name = next((name for name, known in self._known.items() if known == number), None)
        if name is None:
            raise stale(base_of(number))
        opening = self._openings.get(number)
        if opening is None:
            opening = self._openings[number] = _Opening()
            self._nursery.start_soon(self._finish, opening, name, number)
        await opening.done.wait()
        if opening.part is None:
            raise opening.error or stale(base_of(number))
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
        base = base_of(number)
        invalidator = Invalidator(datastore.remote.threads, base)
        sync.on_changes, sync.settle = invalidator, invalidator.settle
        fs = FileSystem(
            sync,
            LocalTier(str(home / "local"), TierPolicy()),
            owner=Owner(settings.uid, settings.gid),
            read_only=True,
            on_dirty=_nothing,
            invalidate=invalidator,
        )
        if settings.consistency is Consistency.CLOSE_TO_OPEN:
            fs.close_to_open = CloseToOpen(sync, _never)
        operations = Operations(fs, settings.timeout_s, base)
        invalidator.is_open, invalidator.is_in_use = fs.files.is_open, operations.in_use.__contains__
        refresh = Refresh(sync, settings.refresh_s)
        self._nursery.start_soon(invalidator.run)
        self._nursery.start_soon(refresh.run)
        return _Part(sync, refresh, operations)

    async def refresh(self) -> None:
        """One poll of each that is followed."""
        self._looked_at = -float("inf")
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


def _nothing(path: RelPath) -> None:
    """Nothing becomes dirty where nothing is written."""


async def _never(path: RelPath) -> None:
    """Nothing is published where nothing is written."""
