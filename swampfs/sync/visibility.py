"""How long a commit of another machine takes to be seen here: measured without trusting anybody's clock."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

_SAMPLES = 1000


class Visibility:
    """Upper bounds: what a poll finds was committed after the one before it had begun, which did not find it."""

    def __init__(self) -> None:
        self._previous: float | None = None
        self._bounds_ms: deque[float] = deque(maxlen=_SAMPLES)

    def polled(self, began: float, *, found: bool) -> None:
        """A poll that began then is over and what it found is visible; times are of ``time.monotonic``."""
        if found and self._previous is not None:
            self._bounds_ms.append((time.monotonic() - self._previous) * 1000)
        self._previous = max(began, self._previous or began)

    def as_json(self) -> dict[str, Any]:
        """For ``status``: milliseconds from a remote commit to its visibility here, at most."""
        ordered = sorted(self._bounds_ms)
        if not ordered:
            return {"p50": None, "p99": None, "samples": 0}
        last = len(ordered) - 1
        return {
            "p50": round(ordered[last // 2], 1),
            "p99": round(ordered[-(-last * 99 // 100)], 1),
            "samples": len(ordered),
        }
