"""What a command waits for, on standard error: a bar on a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn

from swampfs import registry
from swampfs.errors import NotMountedError

_LINE_S = 5.0  # between two lines
_ANSWER_S = 5.0


class Done(NamedTuple):
    """Of what there is to do; ``unit`` is ``bytes`` or a word for what is counted."""

    done: int
    total: int
    unit: str


@contextmanager
def shown(registration: registry.Registration, what: str) -> Iterator[Callable[[], None]]:
    """Yields what is to be called now and then while a mount is at ``what``: ``hydrate``, ``push``, ``metadata``."""
    console = Console(stderr=True)
    measure = _Measure(what)

    def look() -> Done | None:
        try:
            answer = registry.request(registration, {"cmd": "progress"}, _ANSWER_S)
        except NotMountedError:
            return None  # it is busy, or ends: whoever waits for its answer will know
        return None if "error" in answer else measure(answer)

    if console.is_terminal:
        with _bar(console, what) as (bars, task):

            def draw() -> None:
                seen = look()
                if seen is not None:
                    bars.update(task, completed=seen.done, total=seen.total)

            yield draw
    else:
        yield _Lines(console, look)


class _Measure:
    """How far it is: of a push, by what was pending when it was first asked."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._most = 0

    def __call__(self, answer: Mapping[str, Any]) -> Done:
        if self._what == "hydrate":
            job = answer["hydrate"]
            return Done(job["bytesDone"], job["bytes"], "bytes")
        if self._what == "metadata":
            return Done(answer["artifacts"]["done"], answer["artifacts"]["total"], "names looked at")
        self._most = max(self._most, answer["pending"])
        return Done(self._most - answer["pending"], self._most, "changes")


@contextmanager
def _bar(console: Console, what: str) -> Iterator[tuple[Progress, Any]]:
    counts = (DownloadColumn(), TransferSpeedColumn()) if what == "hydrate" else (MofNCompleteColumn(),)
    with Progress(TextColumn("{task.description}"), BarColumn(), *counts, console=console, transient=True) as bars:
        yield bars, bars.add_task(what, total=None)


class _Lines:
    """``hydrate: 120 of 400 bytes``, not more often than somebody reads it."""

    def __init__(self, console: Console, look: Callable[[], Done | None]) -> None:
        self._console = console
        self._look = look
        self._told_at = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._told_at < _LINE_S:
            return
        self._told_at = time.monotonic()
        seen = self._look()
        if seen is not None and seen.total:
            self._console.print(f"{seen.done} of {seen.total} {seen.unit}", highlight=False)
