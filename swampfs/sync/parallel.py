"""Doing many things at once and failing with one plain error, not with a group."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from typing import TypeVar

import trio

from swampfs.sync import tally

T = TypeVar("T")


async def for_each(
    items: Collection[T], fn: Callable[[T], Awaitable[object]], *, at_once: int, what: str = ""
) -> list[Exception]:
    """Run ``fn`` on every item; waits for all of them and returns what failed, in order of failing.

    ``what`` they are, for whoever watches (:mod:`swampfs.sync.tally`); ``""``: not worth it.
    """
    progress = tally.begin(what, len(items))
    left = iter(tuple(items))  # they may change meanwhile
    errors: list[Exception] = []

    async def work() -> None:
        for item in left:
            try:
                await fn(item)
            except Exception as error:
                errors.append(error)
            progress.done += 1

    async with trio.open_nursery() as nursery:
        for _ in range(min(at_once, len(items))):
            nursery.start_soon(work)
    return errors
