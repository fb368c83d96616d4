"""A circuit breaker: while a store does not answer, nobody waits to find that out again.

Failures in a row, or a request that has heard nothing for long, make a probe due, on a connection of its own; the
circuit opens if that gets no answer either. While it is open, downloads fail at once; everything else still asks,
because locks and commits decide by answers. When a later probe is answered it closes. What still waits on connections
that have been silent meanwhile is ended and asked again: the network may have forgotten them without a word.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from swampfs.errors import CircuitOpenError, StoreError, StoreUnreachableError
from swampfs.provider import ALWAYS, Blob, ObjectInfo, ObjectStore, Precondition, Probed, Take

T = TypeVar("T")

_FAILURES = 3  # in a row, with no answer in between
_SILENT_S = 5.0
_ALSO_SILENT_S = 1.0  # with that one
_PROBE_S = 3.0
_PATIENCE_S = (5.0, 60.0)  # at first and at last, between two times that requests are ended though others are answered


class CircuitStore:
    """An :class:`~swampfs.provider.ObjectStore` that knows whether it is answered. Thread-safe.

    Somebody calls :meth:`probe` each second or so while :meth:`is_probe_due`.
    """

    def __init__(self, inner: ObjectStore, probed: Probed | None = None) -> None:
        """Without ``probed``, ``verify`` is the probe."""
        self._inner = inner
        self._probed = probed
        self.name = inner.name
        self.label = inner.label
        self.authenticated = inner.authenticated
        self._lock = threading.Lock()
        self._failures = 0
        self.open_since: float | None = None
        """Monotonic time of the first probe that got no answer; ``None`` while the store answers."""
        self._silent_at = 0.0  # of the last one
        self._is_out = False  # until a probe is answered
        self._ended_at = float("-inf")
        self._patience_s = _PATIENCE_S[0]

    def is_probe_due(self) -> bool:
        """Whether to ask if the store is there."""
        if self._is_out or self._failures >= _FAILURES:
            return True
        return self._is_silent()

    def _is_silent(self) -> bool:
        """Whether a request has heard nothing for long."""
        if self._probed is not None and self._probed.silent_s() >= _SILENT_S:
            return True
        if time.monotonic() - self._ended_at > _SILENT_S + _PROBE_S:
            self._patience_s = _PATIENCE_S[0]  # asked again, they were answered: it was right to end them
        return False

    def probe(self) -> bool:
        """Ask whether the store is there. Returns whether an outage is over."""
        asked_at = time.monotonic()
        try:
            if self._probed is not None:
                self._probed.probe(_PROBE_S)
            else:
                self._inner.verify()
        except StoreUnreachableError:
            with self._lock:
                self._silent_at, self._is_out = asked_at, True
                self.open_since = self.open_since or asked_at
            return False
        except StoreError:
            pass  # a refusal is an answer
        was_out, self._is_out = self._is_out, False  # though others may have been answered meanwhile
        self._answered()
        if self._probed is not None:
            if was_out:
                self._probed.end_silent(self._silent_at)
            elif asked_at - self._ended_at > self._patience_s and self._is_silent():
                # The store is there, so their connections are not; or it is slow, and they are asked again in peace.
                self._ended_at, self._patience_s = asked_at, min(2 * self._patience_s, _PATIENCE_S[1])
                self._probed.end_silent(asked_at - _ALSO_SILENT_S)
        return was_out

    def _answered(self) -> None:
        if self._failures or self.open_since is not None:
            with self._lock:
                self._failures, self.open_since = 0, None

    def _watched(self, fn: Callable[[], T]) -> T:
        try:
            result = fn()
        except StoreUnreachableError:
            with self._lock:
                self._failures += 1
            raise
        except StoreError:
            self._answered()
            raise
        self._answered()
        return result

    def download(self, key: str, target: str) -> ObjectInfo:
        self._require_closed()
        return self._watched(lambda: self._inner.download(key, target))

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        self._require_closed()
        return self._watched(lambda: self._inner.part(key, offset, size, etag=etag, take=take))

    def _require_closed(self) -> None:
        since = self.open_since
        if since is not None:
            raise CircuitOpenError(f"{self.name} has not answered for {time.monotonic() - since:.0f} s")

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        return self._watched(lambda: self._inner.get(key, unless=unless))

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        return self._watched(lambda: self._inner.put(key, body, when))

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        self._watched(lambda: self._inner.delete(key, when))

    def head(self, key: str) -> ObjectInfo:
        return self._watched(lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._watched(lambda: list(self._inner.list(prefix))))

    def directories(self, prefix: str) -> Sequence[str]:
        return self._watched(lambda: self._inner.directories(prefix))

    def verify(self) -> None:
        self._watched(self._inner.verify)
