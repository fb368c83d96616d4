"""Counting and logging every request, as a decorator directly around a driver.

``status`` shows the counts; ``--trace-file`` (or ``SWAMP_S3_SYNC_TRACE=<file>``) gets one JSON line per request.
Keys are logged, bodies and credentials never.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from swampfs.errors import SwampfsError
from swampfs.provider import ALWAYS, Blob, ObjectInfo, ObjectStore, Precondition, Take
from swampfs.spans import span

T = TypeVar("T")


class TracingStore:
    """An :class:`~swampfs.provider.ObjectStore` that counts. Thread-safe."""

    def __init__(self, inner: ObjectStore, trace_file: str | None = None) -> None:
        self._inner = inner
        self.name = inner.name
        self.label = inner.label
        self.authenticated = inner.authenticated
        self._lock = threading.Lock()
        self._file = open(trace_file, "a", encoding="utf-8", buffering=1) if trace_file else None  # noqa: SIM115
        self.counts: Counter[str] = Counter()
        self.last_latency_ms: float | None = None

    def _traced(self, operation: str, key: str, fn: Callable[[], T]) -> T:
        started = time.monotonic()
        outcome = "ok"
        try:
            with span(operation, key=key, store=self.name):
                result = fn()
            if operation == "get" and result is None:
                outcome = "unchanged"
            return result
        except SwampfsError as error:
            outcome = type(error).__name__
            raise
        finally:
            self._note(operation, key, outcome, (time.monotonic() - started) * 1000)

    def _note(self, operation: str, key: str, outcome: str, elapsed_ms: float) -> None:
        with self._lock:
            self.counts[operation] += 1
            self.last_latency_ms = elapsed_ms
            if self._file is not None:
                line = {"at": time.time(), "op": operation, "key": key, "outcome": outcome, "ms": round(elapsed_ms, 2)}
                self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        return self._traced("get", key, lambda: self._inner.get(key, unless=unless))

    def download(self, key: str, target: str) -> ObjectInfo:
        return self._traced("download", key, lambda: self._inner.download(key, target))

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        return self._traced("part", key, lambda: self._inner.part(key, offset, size, etag=etag, take=take))

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        return self._traced("put", key, lambda: self._inner.put(key, body, when))

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        return self._traced("delete", key, lambda: self._inner.delete(key, when))

    def head(self, key: str) -> ObjectInfo:
        return self._traced("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """Counted once per listing, however many pages it has."""
        yield from self._traced("list", prefix, lambda: list(self._inner.list(prefix)))

    def directories(self, prefix: str) -> Sequence[str]:
        return self._traced("list", prefix, lambda: self._inner.directories(prefix))

    def verify(self) -> None:
        self._traced("verify", "", self._inner.verify)
