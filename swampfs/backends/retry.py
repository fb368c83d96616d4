"""Retries as a decorator of the store port (spec §10.1): 3 attempts, about 0.5 s and 1.5 s apart.

Only errors whose class says so are retried. A retried put whose first attempt was applied may answer
``PreconditionError``; callers with preconditions re-read and recognise their own bytes (H28).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential, wait_random

from swampfs.errors import StoreError
from swampfs.provider import ALWAYS, Blob, ObjectInfo, ObjectStore, Precondition

T = TypeVar("T")


class RetryingStore:
    """An :class:`~swampfs.provider.ObjectStore` that tries again."""

    def __init__(self, inner: ObjectStore, attempts: int = 3, first_pause_s: float = 0.4) -> None:
        self._inner = inner
        self.name = inner.name
        self._retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=wait_exponential(multiplier=first_pause_s, exp_base=3) + wait_random(0, first_pause_s / 2),
            retry=retry_if_exception(lambda error: isinstance(error, StoreError) and error.retryable),
            reraise=True,
        )

    def _call(self, fn: Callable[[], T]) -> T:
        return self._retrying.copy()(fn)

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        return self._call(lambda: self._inner.get(key, unless=unless))

    def download(self, key: str, target: str) -> ObjectInfo:
        return self._call(lambda: self._inner.download(key, target))

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        return self._call(lambda: self._inner.put(key, body, when))

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        return self._call(lambda: self._inner.delete(key, when))

    def head(self, key: str) -> ObjectInfo:
        return self._call(lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: list(self._inner.list(prefix))))

    def verify(self) -> None:
        self._call(self._inner.verify)
