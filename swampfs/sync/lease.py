"""One lock that a mount holds, and one it is about to (:mod:`swampfs.sync.leases`)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import trio

from swampfs.names import RelPath
from swampfs.records import LockInfo
from swampfs.sync.locks import Lock


@dataclass(slots=True)
class Lease:
    """One lock this mount holds."""

    name: RelPath
    lock: Lock
    since: float
    used: float
    fresh: bool = False  # the tree was refreshed after it was acquired: what is written starts from the latest
    pins: int = 0  # pushes under way
    closing: bool = False  # no new writer is let in; it goes as soon as everything is pushed
    user: bool = False  # taken by a user as a file; only that file's removal ends it
    alive: Callable[[], bool] = lambda: True  # a user's lock is renewed for as long as its process lives
    beat: trio.CancelScope = field(default_factory=trio.CancelScope)

    def as_json(self) -> dict[str, Any]:
        """For ``status``."""
        return {
            "lock": self.name,
            "state": "held" if self.lock.is_sure else "unsure",
            "by": "user" if self.user else "mount",
            "heldS": round(time.monotonic() - self.since, 1),
        }

    def lets_in(self) -> bool:
        return self.fresh and not self.closing and self.lock.is_sure


class Flight:
    """An acquisition under way and those who wait for it."""

    def __init__(self) -> None:
        self.done = trio.Event()
        self.moved = trio.Event()  # set at each news: somebody else holds the lock, or it is ours
        self.acquired = False
        self.holder: LockInfo | None = None
        self.waits = False  # the store has answered: somebody else holds it
        self.error: Exception | None = None

    def tell(self) -> None:
        self.moved.set()
        self.moved = trio.Event()

    def as_json(self, name: RelPath) -> dict[str, Any]:
        """For ``status``: who it waits for."""
        return {
            "lock": name,
            "state": "waiting",
            "by": self.holder.holder if self.holder else None,
            "hostname": self.holder.hostname if self.holder else None,
            "pid": self.holder.pid if self.holder else None,
        }
