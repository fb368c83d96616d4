"""Many files at once in worker threads, and one error for what failed (spec §10.2)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from typing import Generic, TypeVar

import trio

from swampfs.errors import AbortedError, StoreUnreachableError, TransferError
from swampfs.provider import AbortSignal
from swampfs.sync import tally
from swampfs.threads import Lane, Threads

T = TypeVar("T")
R = TypeVar("R")


class Batch(Generic[T, R]):
    """A queue of items worked off by ``width`` threads. Each worker takes many: a thread hop per file is dear.

    ``what`` they are, for whoever watches (:mod:`swampfs.sync.tally`).
    """

    def __init__(self, items: Collection[T], fn: Callable[[T], R], signal: AbortSignal | None, *, what: str) -> None:
        self._progress = tally.begin(what, len(items))
        self._items = iter(items)
        self._fn = fn
        self._signal = signal
        self._lock = threading.Lock()
        self._unreached = 0
        self._stopped = False
        self.done: list[tuple[T, R]] = []
        self.failed: list[tuple[T, Exception]] = []

    async def run(self, threads: Threads, lane: Lane, width: int) -> None:
        """Returns when every item was tried. Raises AbortedError if the signal was raised meanwhile."""

        def work() -> None:
            self._work(give_up_after=width)

        async def watch() -> None:
            try:
                await trio.sleep_forever()
            finally:
                self._stopped = True  # threads cannot be cancelled: each ends with the file it has

        async with trio.open_nursery() as watching:
            watching.start_soon(watch)
            async with trio.open_nursery() as nursery:
                for _ in range(width):
                    nursery.start_soon(threads.write, lane, work)
            watching.cancel_scope.cancel()
        if self._signal is not None:
            self._signal.check()

    def _work(self, give_up_after: int) -> None:
        while not (self._stopped or (self._signal is not None and self._signal.aborted)):
            with self._lock:
                item = next(self._items, None)
            if item is None:
                return
            try:
                if self._unreached > give_up_after:  # a dead network: not thousands of timeouts more
                    raise StoreUnreachableError("not tried: the store does not answer")
                result = self._fn(item)
            except AbortedError:
                return
            except Exception as error:
                self._unreached += isinstance(error, StoreUnreachableError)
                with self._lock:
                    self._progress.done += 1
                    self.failed.append((item, error))
            else:
                self._unreached = 0
                with self._lock:
                    self._progress.done += 1
                    self.done.append((item, result))


def transfer_error(verb: str, label: str, failures: Sequence[tuple[str, Exception]]) -> TransferError:
    """``verb`` is push, pull or delete."""
    names = [name for name, _ in failures]
    way = "to" if verb == "push" else "from"
    lines = [f"Failed to {verb} {len(names)} file(s) {way} {label}: {', '.join(names)}"]
    lines += [f"  - {name}: {error}" for name, error in failures[:3]]
    if len(failures) > 3:
        lines.append(f"  ... and {len(failures) - 3} more")
    return TransferError("\n".join(lines), dict(failures))
