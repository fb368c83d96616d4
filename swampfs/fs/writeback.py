"""Write-back: a debounced push per lock, and waiting for it.

Every change restarts its group's delay, up to a limit, so that a burst becomes one push. A group is what is written
under one lock (:func:`swampfs.names.lease_path`). A push that fails is repeated with growing pauses;
what it would publish is in the journal all the while.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import trio

from swampfs.errors import PushPendingError, SwampfsError
from swampfs.names import RelPath, is_publishable, lease_path
from swampfs.records import PushReport
from swampfs.state.schema import is_disk_full
from swampfs.sync.service import SyncService

log = logging.getLogger(__name__)

Group = str


class _Going(NamedTuple):
    """What of a group goes ahead of its push."""

    due: float  # when it was due, as it was looked over
    paths: list[RelPath]
    left: list[RelPath]  # not offered yet


_LONGEST_DEBOUNCE = 10  # times the delay: a file appended to for ever is still published
_FIRST_BACKOFF_S = 1.0
_LAST_BACKOFF_S = 30.0
_FLUSH_RETRY_S = 0.2
_SOON_S = 0.2
_QUIET_S = 0.25  # without a change, after which a burst looks over, and new files go ahead of the push
_SURELY_S = 5.0  # before a push, whose paths hardly change any more
_SAVED_S = 1.0  # of the delay, at most and not more than half of it, when nothing is left to be uploaded
_AHEAD = 256  # files at a time
_MOST_AHEAD = 5000  # journaled paths: with more of them pushes have enough to do
_LOOK_S = 0.5  # how often it is seen whether what is held back may go


class Writeback:
    """The push task. ``touch`` is called by the file system, ``flush`` by the control socket and unmount."""

    def __init__(self, sync: SyncService, delay_s: float) -> None:
        self._sync = sync
        self._delay_s = delay_s
        self._due: dict[Group, float] = {}
        self._first: dict[Group, float] = {}
        self._wake = trio.Event()
        self._awake_at = float("inf")  # when the task looks at what there is, unless it is woken
        self._round_done = trio.Event()
        self._backoff = _FIRST_BACKOFF_S
        self.last_error: str | None = None
        self.on_pushed: Callable[[PushReport], None] = lambda report: None
        """Told of each push that ended; set by the composition root."""
        self.conflicts = 0
        self.waiting_for: tuple[RelPath, ...] = ()
        self._pushing: set[Group] = set()
        self._ahead: dict[Group, _Going] = {}
        self._held: set[str] = set()  # journaled paths that wait for the end of what a user does under a lock
        self._even_open: set[str] = set()  # a user gave a lock back, or closed a file: what it holds now counts

    def touch(self, path: RelPath) -> None:
        """A change of this path is in the journal."""
        if not is_publishable(path):
            return
        now = time.monotonic()
        group = lease_path(path)
        first = self._first.setdefault(group, now)
        due = self._due[group] = min(now + self._delay_s, first + self._delay_s * _LONGEST_DEBOUNCE)
        if min(due, self._quiet_at(due)) < self._awake_at:
            self._wake.set()  # otherwise it looks soon enough: each file of a burst would wake it

    def touch_all(self) -> None:
        """Everything in the journal is due: after a replay."""
        for path in self._sync.journal:
            self.touch(RelPath(path))

    def is_pending(self, group: Group) -> bool:
        """Whether changes of a group wait for a push, or are in one."""
        return group in self._due or group in self._pushing

    def hurry(self, group: Group) -> None:
        """Push a group without its delay."""
        if group in self._due:
            self._due[group] = min(self._due[group], time.monotonic())
            self._wake.set()

    def resume(self) -> None:
        """The datastore is back: what waits to be tried again is due."""
        self._backoff = _FIRST_BACKOFF_S
        for group in self._due:
            self.hurry(group)

    def is_held_back(self, path: str) -> bool:
        """Whether a path waits for a user's lock to be given back; that its group is pending is not said of it."""
        return path in self._held

    def pending(self) -> list[str]:
        """Journaled paths that will be published."""
        return sorted(path for path in self._sync.journal if is_publishable(path))

    async def run(self) -> None:
        """Push what is due, for ever."""
        while True:
            await self._sleep_until_due()
            now = time.monotonic()
            groups = {group for group, due in self._due.items() if due <= now}
            for group in groups:
                self._due.pop(group, None)
                self._first.pop(group, None)
                self._ahead.pop(group, None)
            self._pushing = groups
            try:
                report = await self._push(groups)
            except Exception as error:  # this task must outlive whatever a push meets
                self.last_error = _line(error)
                if is_disk_full(error):
                    self._sync.room.databases_need_room()
                if isinstance(error, SwampfsError | OSError):
                    log.info("push failed, retrying in %.0f s: %s", self._backoff, error)
                else:
                    log.exception("push failed")
                self._retry(groups)
            else:
                if report.failure is None:
                    self._backoff, self.last_error = _FIRST_BACKOFF_S, None
                else:
                    self.last_error = _line(report.failure)
                    log.info("some files were not pushed, retrying in %.0f s: %s", self._backoff, report.failure)
                    self._retry(groups)
                self.on_pushed(report)
                self.conflicts += len(report.conflicts)
                self.waiting_for = report.waiting
                self._again(set(report.waiting), _FIRST_BACKOFF_S)
                held = {path for path in report.open_files if self._is_unfinished(path)}
                self._held |= held
                self._again({lease_path(path) for path in set(report.open_files) - held}, max(self._delay_s, _SOON_S))
            self._pushing = set()
            self._round_done.set()
            self._round_done = trio.Event()

    async def flush(self, paths: Iterable[str] | None, timeout_s: float, *, even_open: bool = False) -> None:
        """Return when the given paths (files or directories; ``None`` = all) are committed.

        Of all, it returns when the push is over to its last step, if there is time: then no lock is needed for it.

        Files open for writing are an error, unless ``even_open``: then what they hold now is published.
        Raises PushPendingError with the last error when they are not within the time, or are still open for writing.
        """
        wanted = None if paths is None else list(paths)
        if even_open:
            wanted = self._left(wanted)  # what is written from now on is not waited for
        with trio.move_on_after(timeout_s) as scope:
            while left := self._left(wanted):
                done = self._round_done
                self._even_open.update(path for path in left if even_open or self._is_unfinished(path))
                for path in left:
                    self._due[lease_path(path)] = 0.0
                self._wake.set()
                await done.wait()
                left = self._left(wanted)
                if left and not even_open and all(self._sync.is_open(path) for path in left):
                    raise PushPendingError(
                        f"{len(left)} file(s) are still open for writing, among them {left[0]}",
                        remedy="close them and flush again",
                    )
                if left:
                    await trio.sleep(_FLUSH_RETRY_S)
            if wanted is None or "" in wanted:
                await self._settled()
        if scope.cancelled_caught and (left := self._left(wanted)):
            why = f": {self.last_error}" if self.last_error else ""
            raise PushPendingError(f"{len(left)} change(s) are not pushed after {timeout_s:g} s{why}")

    async def _settled(self) -> None:
        """Nothing waits for a push. Return when none is under way either."""
        groups = {lease_path(path) for path in self.pending()}
        for group in self._due.keys() - groups:  # to look at it again, what is not to be looked at any more
            del self._due[group]
            self._first.pop(group, None)
            self._ahead.pop(group, None)
        while self._pushing and not self.pending():
            await self._round_done.wait()

    def _is_unfinished(self, path: str) -> bool:
        """Somebody who asks for a push now wants what is under a lock, too."""
        return path in self._sync.unfinished and not self._sync.is_open(path)

    # --- parts --------------------------------------------------------------------------------------------

    def _left(self, wanted: list[str] | None) -> list[str]:
        pending = self.pending()
        if wanted is None:
            return pending
        return [path for path in pending if any(w in ("", path) or path.startswith(w + "/") for w in wanted)]

    def _again(self, groups: Iterable[Group], after_s: float) -> None:
        due = time.monotonic() + after_s
        for group in groups:
            self._due.setdefault(group, due)
        self._wake.set()

    def _retry(self, groups: Iterable[Group]) -> None:
        self._again(groups, self._backoff)
        self._backoff = min(self._backoff * 2, _LAST_BACKOFF_S)

    async def _sleep_until_due(self) -> None:
        while True:
            now = time.monotonic()
            self._let_go()
            if self._due and min(self._due.values()) <= now:
                return
            self._wake, self._awake_at = trio.Event(), float("inf")
            try:
                quiet_s = await self._go_ahead()
            except Exception:  # it was a favour; the push says what is wrong
                log.exception("uploading ahead failed")
                quiet_s = float("inf")
            pause = min(self._due.values()) - time.monotonic() if self._due else float("inf")
            pause = max(0.0, min(pause, quiet_s))
            if self._held:
                pause = min(pause, _LOOK_S)
            self._awake_at = time.monotonic() + pause
            with trio.move_on_after(pause):
                await self._wake.wait()

    async def _go_ahead(self) -> float:
        """Upload new files of groups that have become quiet; seconds until another may have."""
        quiet, quiet_s = self._quiet(time.monotonic())
        for group in quiet:
            if group not in self._ahead:
                continue  # a flush met it meanwhile
            due, paths, left = self._ahead[group]
            while left and self._due.get(group) == due:
                if self._is_any_due():
                    return 0.0
                batch = [left.pop() for _ in range(min(len(left), _AHEAD))]
                if not await self._sync.upload_ahead(batch, until=self._is_any_due):
                    left.clear()  # the push says what is wrong
            if self._due.get(group) == due and self._sync.are_ahead(paths):
                due = max(due - min(_SAVED_S, self._delay_s / 2), time.monotonic())
                self._due[group], self._ahead[group] = due, _Going(due, [], [])
        return 0.0 if quiet else quiet_s

    def _quiet_at(self, due: float) -> float:
        """When a group that is due then may go ahead, if anything may."""
        if self.last_error is not None or len(self._sync.journal) > _MOST_AHEAD:
            return float("inf")
        return max(due - self._delay_s + _QUIET_S, due - _SURELY_S)

    def _is_any_due(self) -> bool:
        """Whether somebody waits for a push: to go ahead can wait."""
        return min(self._due.values(), default=float("inf")) <= time.monotonic()

    def _quiet(self, now: float) -> tuple[list[Group], float]:
        """Groups of which something may go ahead, and seconds until there may be another."""
        quiet: list[Group] = []
        quiet_s = float("inf")
        if self.last_error is not None or len(self._sync.journal) > _MOST_AHEAD:
            return quiet, quiet_s
        for group, due in self._due.items():
            at = self._quiet_at(due)
            going = self._ahead.get(group)
            if at > now:
                quiet_s = min(quiet_s, at - now)
            elif going is None or going.left or going.due != due:
                quiet.append(group)
        news: dict[Group, list[RelPath]] = {
            group: [] for group in quiet if group not in self._ahead or self._ahead[group].due != self._due[group]
        }
        if news:
            for path in self._sync.journal:
                if is_publishable(path) and (group := lease_path(path)) in news:
                    news[group].append(RelPath(path))
            self._ahead.update((group, _Going(self._due[group], paths, paths.copy())) for group, paths in news.items())
        return quiet, quiet_s

    def _let_go(self) -> None:
        """What was held back and may go, because its lock was given back, or lost, is due."""
        free = {path for path in self._held if path not in self._sync.unfinished}
        self._held -= free
        for path in free:
            if path in self._sync.journal:
                self._due.setdefault(lease_path(path), 0.0)

    async def _push(self, groups: set[Group]) -> PushReport:
        paths = [path for path in self.pending() if lease_path(path) in groups]
        if not paths:
            return PushReport()
        even_open, self._even_open = self._even_open, set()
        return await self._sync.push_changed(paths, even_open=even_open)


def _line(error: Exception) -> str:
    return error.line() if isinstance(error, SwampfsError) else f"push failed: {error!r}"
