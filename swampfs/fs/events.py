"""``.swampfs/events``: what happens at a mount, a JSON object per line, for whoever has it open (``design/cli.md`` §3).

A reader is told of what happens after it opened the file, and waits while nothing does. Nothing is kept for nobody.
"""

from __future__ import annotations

import json
import time
from collections import deque
from typing import Any
from weakref import WeakSet

import trio
from trio.lowlevel import ParkingLot

from swampfs.records import timestamp

MOST = 10_000  # lines that wait for one reader


class Stream:
    """What one ``open`` reads. It ends with its handle."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()
        self._begun = b""  # the rest of a line
        self._lost = 0
        self._readers = ParkingLot()

    def put(self, line: bytes) -> None:
        """Of a reader who does not keep up the oldest lines are dropped, and their number is told."""
        if len(self._lines) >= MOST:
            self._lines.popleft()
            self._lost += 1
        self._lines.append(line)
        self._readers.unpark_all()

    def take(self, size: int) -> bytes | None:
        """At most ``size`` bytes, whole lines if one fits; ``None``: there is nothing yet."""
        if self._lost:
            self._lines.appendleft(_line("lost", {"lines": self._lost}))
            self._lost = 0
        taken, self._begun = self._begun[:size], self._begun[size:]
        while self._lines and len(taken) + len(self._lines[0]) <= size:
            taken += self._lines.popleft()
        if self._lines and not taken:  # whoever reads byte by byte
            first = self._lines.popleft()
            taken, self._begun = first[:size], first[size:]
        return taken or None

    async def receive(self, size: int) -> bytes:
        """As :meth:`take`, when there is something."""
        while (found := self.take(size)) is None:
            await self._readers.park()
        return found


class Events:
    """Of one mount."""

    def __init__(self) -> None:
        self._streams: WeakSet[Stream] = WeakSet()
        self._heard = trio.Event()

    @property
    def is_heard(self) -> bool:
        """Whether anybody has it open."""
        return bool(self._streams)

    async def until_heard(self) -> None:
        while not self._streams:
            self._heard = trio.Event()
            await self._heard.wait()

    def listen(self) -> Stream:
        """For a new reader."""
        stream = Stream()
        self._streams.add(stream)
        self._heard.set()
        return stream

    def tell(self, event: str, **facts: Any) -> None:
        """Something happened."""
        if self._streams:
            line = _line(event, facts)
            for stream in self._streams:
                stream.put(line)


def idle() -> bytes:
    """A line for a reader who must not be kept waiting any longer, though nothing happened."""
    return _line("idle", {})


def _line(event: str, facts: dict[str, Any]) -> bytes:
    told = {"time": timestamp(time.time_ns()), "event": event, **facts}
    return json.dumps(told, ensure_ascii=False).encode(errors="replace") + b"\n"
