"""What a command waits for, on standard error: a bar on a terminal, lines now and then in a pipe, or JSON."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar

import click
import trio

from swampfs import registry
from swampfs.errors import NotMountedError
from swampfs.sync import tally

T = TypeVar("T")

_LINE_S = 5.0  # between two lines
_JSON_S = 1.0
_DRAW_S = 0.2
_QUIET_S = 0.5  # what takes less is not worth a word
_ANSWER_S = 5.0


class Done(NamedTuple):
    """Of what there is to do; ``unit`` is ``bytes`` or a word for what is counted."""

    done: int
    total: int
    unit: str


Look = Callable[[], Done | None]


@contextmanager
def of_mount(registration: registry.Registration, what: str, *, as_json: bool = False) -> Iterator[Callable[[], None]]:
    """Yields what is to be called now and then while a mount is at ``what``: ``hydrate``, ``push``, ``metadata``."""
    measure = _Measure(what)

    def look() -> Done | None:
        try:
            answer = registry.request(registration, {"cmd": "progress"}, _ANSWER_S)
        except NotMountedError:
            return None  # it is busy, or ends: whoever waits for its answer will know
        return None if "error" in answer else measure(answer)

    with _shown(look, what, as_json=as_json) as draw:
        yield draw


def run(what: str, call: Callable[..., Awaitable[T]], *args: Any, as_json: bool = False) -> T:
    """``trio.run``, showing how far the call is (:mod:`swampfs.sync.tally`)."""
    return trio.run(watched, what, call, args, as_json)


async def watched(what: str, call: Callable[..., Awaitable[T]], args: tuple[Any, ...], as_json: bool) -> T:
    """Await a call, and show how far it is."""
    seen = tally.Tally()
    token = tally.watched.set(seen)
    result: list[T] = []
    failure: list[Exception] = []
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_draw, what, seen, as_json)
            try:
                result.append(await call(*args))
            except Exception as error:  # re-raised below: the nursery would wrap it in a group
                failure.append(error)
            nursery.cancel_scope.cancel()
    finally:
        tally.watched.reset(token)
    if failure:
        raise failure[0]
    return result[0]


async def _draw(what: str, seen: tally.Tally, as_json: bool) -> None:
    await trio.sleep(_QUIET_S)

    def look() -> Done:
        return Done(seen.piece.done, seen.piece.total, seen.piece.what)

    with _shown(look, what, as_json=as_json) as draw:
        while True:
            draw()
            await trio.sleep(_DRAW_S)


@contextmanager
def _shown(look: Look, what: str, *, as_json: bool) -> Iterator[Callable[[], None]]:
    with ExitStack() as at_end:
        draw: Callable[[], None] = _nothing
        if sys.stderr is not None:  # it is closed
            with suppress(OSError, ValueError):
                draw = _drawing(look, what, as_json, at_end)
        yield _Safely(draw)


def _drawing(look: Look, what: str, as_json: bool, at_end: ExitStack) -> Callable[[], None]:
    if as_json:
        return _Lines(look, _JSON_S, lambda seen: json.dumps({"what": what, **seen._asdict()}))
    if sys.stderr.isatty():
        return _bar(look, what, at_end)
    return _Lines(look, _LINE_S, lambda seen: f"{seen.done} of {seen.total} {seen.unit}")


def _nothing() -> None:
    return


class _Safely:
    """Nothing is stopped because it cannot be shown: to a reader who is gone, or on a disk that is full."""

    def __init__(self, draw: Callable[[], None]) -> None:
        self._draw = draw

    def __call__(self) -> None:
        try:
            self._draw()
        except (OSError, ValueError):
            self._draw = _nothing


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


def _bar(look: Look, what: str, at_end: ExitStack) -> Callable[[], None]:
    from rich.console import Console  # not worth its import for what takes a moment
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn

    counts = (DownloadColumn(), TransferSpeedColumn()) if what == "hydrate" else (MofNCompleteColumn(),)
    columns = (TextColumn("{task.description}"), BarColumn(), *counts)
    bars = Progress(*columns, console=Console(stderr=True), transient=True)
    bars.start()
    at_end.callback(_Safely(bars.stop))
    task = bars.add_task(what, total=None)

    def draw() -> None:
        seen = look()
        if seen is not None and seen.total:
            bars.update(task, completed=seen.done, total=seen.total)

    return draw


class _Lines:
    """A line each, not more often than somebody reads it."""

    def __init__(self, look: Look, every_s: float, line: Callable[[Done], str]) -> None:
        self._look = look
        self._every_s = every_s
        self._line = line
        self._told_at = time.monotonic()

    def __call__(self) -> None:
        if time.monotonic() - self._told_at < self._every_s:
            return
        self._told_at = time.monotonic()
        seen = self._look()
        if seen is not None and seen.total:
            click.echo(self._line(seen), err=True)
