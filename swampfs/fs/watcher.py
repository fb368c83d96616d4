"""Who tells :class:`~swampfs.fs.events.Events` what happens: changes of others, pushes, failures, locks, outages."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import trio

from swampfs.fs.events import MOST, Events
from swampfs.fs.failures import Failure
from swampfs.names import join
from swampfs.records import PushReport, TreeChange
from swampfs.state.catalog import Catalog

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_SLICE = 50  # changes, between which others have their turn


@contextmanager
def _harmlessly() -> Iterator[None]:
    """What cannot be told stops neither the task nor what it is told of."""
    try:
        yield
    except Exception:
        log.exception("an event could not be told")


class Watcher:
    """Of one mount. ``now`` says how it stands; ``shown`` how it names a path."""

    def __init__(
        self,
        events: Events,
        catalog: Catalog,
        now: Callable[[], Mapping[str, Any]],
        shown: Callable[[str], str],
    ) -> None:
        self._events = events
        self._catalog = catalog
        self._now = now
        self._shown = shown
        self._changes: deque[TreeChange] = deque(maxlen=MOST)
        self._unseen = 0  # changes that were pushed out of it
        self._some = trio.Event()

    def changed(self, changes: list[TreeChange]) -> None:
        """Another machine did something. It is told a little later: there may be a lot of it."""
        if self._events.is_heard:
            named = [change for change in changes if change.name]
            self._unseen += max(0, len(self._changes) + len(named) - MOST)
            self._changes.extend(named)
            self._some.set()

    async def _tell_changes(self) -> None:
        while True:
            await self._some.wait()
            self._some = trio.Event()
            while self._changes:
                if self._unseen:
                    self._events.tell("lost", lines=self._unseen)
                    self._unseen = 0
                with _harmlessly():
                    for _ in range(min(_SLICE, len(self._changes))):
                        self._tell_change(self._changes.popleft())
                await trio.lowlevel.checkpoint()

    def _tell_change(self, change: TreeChange) -> None:
        """As it is by now."""
        parent = self._catalog.node(change.parent)
        if parent is None:
            return
        found = self._catalog.child(parent.ino, change.name)
        facts = {"kind": found.kind.name.lower(), "size": found.size} if found is not None else {}
        path = self._shown(join(parent.path, change.name))
        self._events.tell("removed" if found is None else "changed", path=path, **facts)

    def pushed(self, report: PushReport) -> None:
        if not self._events.is_heard:
            return
        with _harmlessly():
            if report.pushed or report.deleted:
                commit = self._catalog.watermark().commit_seq
                self._events.tell("pushed", files=report.pushed, removed=report.deleted, commitSeq=commit)
            for path in report.conflicts:
                self._events.tell("conflict", path=self._shown(path))

    def failed(self, failure: Failure) -> None:
        with _harmlessly():
            self._events.tell("failed", **{**failure.as_json(), "path": self._shown(failure.path)})

    async def run(self) -> None:
        """For ever."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tell_changes)
            nursery.start_soon(self._look)

    async def _look(self) -> None:
        """What is not told by who does it is seen by looking, while somebody listens."""
        while True:
            await self._events.until_heard()
            before = self._now()
            while self._events.is_heard:
                await trio.sleep(_LOOK_S)
                with _harmlessly():
                    now = self._now()
                    self._compare(before, now)
                    before = now

    def _compare(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        if now["offline"] != before["offline"]:
            self._events.tell("offline" if now["offline"] else "online")
        if now["lastError"] != before["lastError"]:
            self._events.tell("error" if now["lastError"] else "healthy", error=now["lastError"])
        locks = {one["lock"]: one for one in now["locks"]}
        had = {one["lock"]: one for one in before["locks"]}
        for name in had.keys() - locks.keys():
            self._events.tell("lock", lock=name, state="released")
        for name, one in locks.items():
            if name not in had or one["state"] != had[name]["state"]:
                self._events.tell("lock", **one)
