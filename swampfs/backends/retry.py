"""Retries as a decorator of the store port (spec §10.1): 3 attempts, about 0.5 s and 1.5 s apart.

Only errors whose class says so are retried, and not once the caller's signal is raised: it also ends a pause at once.
Who met such an error waits some seconds for the end of an outage, too; only who comes during it is sent away at once.
A retried put whose first attempt was applied may answer
``PreconditionError``; callers with preconditions re-read and recognise their own bytes (H28).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt

from swampfs.errors import AbsentError, CircuitOpenError, PreconditionError, StoreError
from swampfs.provider import ALWAYS, Blob, ObjectInfo, ObjectStore, Precondition, Take
from swampfs.threads import abort_signal

T = TypeVar("T")

_OUTAGE_S = 5.0  # that whoever met a failure before it waits for its end


class RetryingStore:
    """An :class:`~swampfs.provider.ObjectStore` that tries again."""

    def __init__(self, inner: ObjectStore, attempts: int = 3, first_pause_s: float = 0.5) -> None:
        self._inner = inner
        self.name = inner.name
        self.label = inner.label
        self.authenticated = inner.authenticated
        self._first_pause_s = first_pause_s
        self._retrying = Retrying(
            stop=stop_after_attempt(attempts),
            wait=self._pause_s,
            sleep=_sleep,
            retry=retry_if_exception(lambda error: isinstance(error, StoreError) and error.retryable),
            reraise=True,
        )

    def _pause_s(self, state: RetryCallState) -> float:
        exact: float = self._first_pause_s * 3 ** (state.attempt_number - 1)
        return exact * random.uniform(0.75, 1.25)  # noqa: S311

    def _call(self, fn: Callable[[], T]) -> T:
        signal = abort_signal.get()
        if signal is not None:
            signal.check()
        try:
            return fn()  # the common case does without the machinery
        except StoreError as error:
            if not error.retryable:
                raise
            first = error
        return self._again(fn, first)

    def _again(self, fn: Callable[[], T], first: StoreError) -> T:
        failures = [first]

        def attempt() -> T:
            if failures:
                raise failures.pop()
            return self._after_outage(fn)

        try:
            return self._retrying.copy()(attempt)
        except (PreconditionError, AbsentError) as error:
            error.retried = True
            raise

    def _after_outage(self, fn: Callable[[], T]) -> T:
        until = time.monotonic() + _OUTAGE_S
        while True:
            try:
                return fn()
            except CircuitOpenError:
                if time.monotonic() >= until:
                    raise
            _sleep(self._first_pause_s)

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        return self._call(lambda: self._inner.get(key, unless=unless))

    def download(self, key: str, target: str) -> ObjectInfo:
        return self._call(lambda: self._inner.download(key, target))

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        return self._call(lambda: self._inner.part(key, offset, size, etag=etag, take=take))

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        return self._call(lambda: self._inner.put(key, body, when))

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        return self._call(lambda: self._inner.delete(key, when))

    def head(self, key: str) -> ObjectInfo:
        return self._call(lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return iter(self._call(lambda: list(self._inner.list(prefix))))

    def directories(self, prefix: str) -> Sequence[str]:
        return self._call(lambda: self._inner.directories(prefix))

    def verify(self) -> None:
        self._call(self._inner.verify)


def _sleep(seconds: float) -> None:
    signal = abort_signal.get()
    if signal is None:
        time.sleep(seconds)
    else:
        signal.wait(seconds)
        signal.check()
