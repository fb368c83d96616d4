"""What clients did to registers and saw of them, and whether one shared file system could have answered so.

A register is a file. An *event* gives it a value (``None``: it is gone) somewhere between its start and its end. An
event is *established* once its machine pushed it; from then on whatever had ended before it started can only come back
by a later event. That is all there is to check: nothing established is lost, nothing removed comes back, no content is
torn.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import dataclass, field

FOREVER = float("inf")


def content(value: str, size: int) -> bytes:
    """A file that shows if it is not whole."""
    filler = (hashlib.sha256(value.encode()).hexdigest() * (size // 64 + 1))[:size]
    body = f"{value}\n{filler}\n"
    return f"{hashlib.sha256(body.encode()).hexdigest()}\n{body}".encode()


def value_of(body: bytes) -> str:
    """Raises ValueError for content that nobody wrote."""
    digest, _, rest = body.partition(b"\n")
    if hashlib.sha256(rest).hexdigest().encode() != digest:
        raise ValueError(f"torn content: {body[:80]!r}… of {len(body)} bytes")
    return rest.partition(b"\n")[0].decode()


@dataclass
class Event:
    machine: str
    path: str
    value: str | None
    start: float
    end: float = FOREVER  # not known to have ended: it may still happen
    pushed: float = FOREVER  # when its machine was told that it is published

    def __str__(self) -> str:
        what = f"= {self.value}" if self.value else "removed"
        return f"{self.machine} {self.path} {what} in {self.start:.3f}–{self.end:.3f}, pushed {self.pushed:.3f}"


@dataclass
class Read:
    machine: str
    path: str
    value: str | None
    start: float
    end: float


@dataclass
class History:
    """``faulty``: machine → intervals in which it may lag behind."""

    events: list[Event] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    faulty: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def violations(self, lag_s: float) -> list[str]:
        """Reads that show what had been superseded more than ``lag_s`` before."""
        by_path = defaultdict(list)
        for event in self.events:
            by_path[event.path].append(event)
        found = []
        for read in self.reads:
            over = self._superseded(by_path[read.path], read, lag_s)
            if over is not None:
                found.append(f"at {read.start:.3f} {read.machine} read {read.path} = {read.value}, but {over}")
        return found

    def lost(self, final: dict[str, str | None]) -> list[str]:
        """Paths whose value at the end is not the last established one."""
        by_path = defaultdict(list)
        for event in self.events:
            by_path[event.path].append(event)
        found = []
        for path, events in by_path.items():
            over = self._superseded(events, Read("", path, final.get(path), FOREVER, FOREVER), 0.0)
            if over is not None:
                found.append(f"in the end {path} = {final.get(path)}, but {over}")
        return found

    def _superseded(self, events: list[Event], read: Read, lag_s: float) -> str | None:
        """Why this value cannot have been there any more; ``None`` if it can."""
        sources = [event for event in events if event.value == read.value and event.start <= read.end]
        if read.value is None:
            sources.append(Event("", read.path, None, -FOREVER, -FOREVER, -FOREVER))
        if not sources:
            return "nobody had written that"
        known = [event for event in events if self._is_due(event, read, lag_s)]
        removals = [event for event in events if event.value is None]
        over = None
        for source in sources:
            over = next((event for event in known if _overrides(event, source, removals)), None)
            if over is None:
                return None
        return f"{over} came after {sources[-1]}"

    def _is_due(self, event: Event, read: Read, lag_s: float) -> bool:
        """Whether the reader must know of an event: it is established, and nothing kept the reader from hearing."""
        if event.pushed + lag_s >= read.start:
            return False
        window = (event.pushed, read.start)
        return not any(begin < window[1] and window[0] < end for begin, end in self.faulty[read.machine])


def _overrides(event: Event, source: Event, removals: list[Event]) -> bool:
    """Whether an established event excludes that an earlier one is still, or again, the register's value.

    What was not published yet when the file was removed comes back on purpose: content wins over absence. So it does
    where the removed file had got another value meanwhile.
    """
    if event is source or event.start <= source.end:
        return False
    if event.value is None:
        return source.pushed < event.start
    return not any(event.start < removal.end and removal.start <= source.pushed for removal in removals)
