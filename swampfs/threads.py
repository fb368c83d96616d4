"""The only door to worker threads: one limiter per purpose, and the cancellation policy.

Reads may be abandoned when their caller gives up; writes may not, because an abandoned put that lands later
would be a write nobody knows of (architecture §6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from enum import Enum
from typing import TypeVar

import trio

from swampfs.provider import AbortSignal

T = TypeVar("T")

abort_signal: ContextVar[AbortSignal | None] = ContextVar("abort_signal", default=None)
"""The signal of the operation this task, or this worker thread, is part of."""


class Lane(Enum):
    """Purpose of a thread; its value is how many may run at once."""

    HYDRATE = ("hydrate", 32)
    LARGE = ("large", 16)  # runs of large files: who opens a small one waits for none of them
    PUSH = ("push", 32)
    LOCK = ("lock", 8)  # its own, so that downloads never starve a heartbeat
    INDEX = ("index", 10)  # spec §6.3: shards are read ten at a time
    PROBE = ("probe", 1)  # whether the store is there, when the others wait for it in vain
    DISK = ("disk", 4)
    SCAN = ("scan", 16)  # metadata of artifacts: somebody waits for it, but not as for a file that is opened
    ARTIFACTS = ("artifacts", 1)  # their database
    KERNEL = ("kernel", 1)  # cache invalidation, which pyfuse3 does not allow on the loop
    NAMES = ("names", 1)  # the part of it that may have to wait for a directory


class Threads:
    """Runs blocking functions. One instance per process, made by the composition root."""

    def __init__(self, sizes: Mapping[Lane, int] | None = None) -> None:
        wanted = sizes or {}
        self._limiters = {lane: trio.CapacityLimiter(wanted.get(lane, lane.value[1])) for lane in Lane}
        self.hops = 0
        """Calls so far, for ``status``: a warm operation adds none."""
        self._begun = trio.CapacityLimiter(math.inf)  # their lane counts them
        self._writes: set[trio.CancelScope] = set()
        self._idle = trio.Event()
        self._leaving = False
        self.is_ending = False
        """Whether the process ends: a thread that does several things begins no further one."""

    async def read(self, lane: Lane, fn: Callable[..., T], *args: object) -> T:
        """Run something whose effects hurt nobody; on cancellation the thread is left to finish alone."""
        self.hops += 1
        return await trio.to_thread.run_sync(fn, *args, limiter=self._limiters[lane], abandon_on_cancel=True)

    def slot(self, lane: Lane) -> trio.CapacityLimiter:
        """``async with`` it: a thread of that lane is there, for :meth:`read_in_slot`."""
        return self._limiters[lane]

    async def read_in_slot(self, fn: Callable[[], T]) -> T:
        """As :meth:`read`. A thread that is left alone does not keep its slot."""
        self.hops += 1
        return await trio.to_thread.run_sync(fn, limiter=self._begun, abandon_on_cancel=True)

    async def write(self, lane: Lane, fn: Callable[..., T], *args: object) -> T:
        """Run something with effects: once begun, its outcome is awaited whatever is cancelled, until :meth:`leave`."""
        self.hops += 1
        async with self._limiters[lane]:  # who still waits for a thread may be cancelled
            scope = trio.CancelScope(shield=not self._leaving)
            self._writes.add(scope)
            try:
                with scope:
                    return await trio.to_thread.run_sync(fn, *args, limiter=self._begun, abandon_on_cancel=True)
            finally:
                self._writes.remove(scope)
                if not self._writes:
                    self._idle.set()
                    self._idle = trio.Event()
        raise AssertionError("nobody cancels this scope")

    async def leave(self, patience_s: float) -> None:
        """The process ends: wait so long for what has effects, then for nothing more, as if it had been killed."""
        self.is_ending = True
        with trio.move_on_after(patience_s):
            while self._writes:
                await self._idle.wait()
        self._leaving = True
        for scope in self._writes:
            scope.shield = False
