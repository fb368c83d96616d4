"""Faults as a decorator of the store port: a call fails before it was applied, or after."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from swampfs.errors import StoreUnreachableError
from swampfs.provider import ALWAYS, Blob, ObjectInfo, ObjectStore, Precondition, Take

T = TypeVar("T")


class When(Enum):
    BEFORE = "before"  # the store never saw the request
    AFTER = "after"  # the store applied it, its answer was lost


@dataclass(slots=True)
class Fault:
    """Applies to calls whose operation matches and whose key contains a text; ``times`` times."""

    operation: str
    key: str
    when: When = When.BEFORE
    times: int = 1
    error: Exception | None = None
    action: Callable[[], object] | None = None
    """Run at the moment of the call instead of failing: another machine's doing in between."""


class FaultyStore:
    """An :class:`~swampfs.provider.ObjectStore` with a list of :class:`Fault`, consumed as they strike."""

    def __init__(self, inner: ObjectStore) -> None:
        self._inner = inner
        self.name = inner.name
        self.label = inner.label
        self.authenticated = inner.authenticated
        self.faults: list[Fault] = []

    def _run(self, operation: str, key: str, fn: Callable[[], T]) -> T:
        fault = next((f for f in self.faults if f.times and f.operation == operation and f.key in key), None)
        if fault is None:
            return fn()
        fault.times -= 1
        if fault.action is not None:
            fault.action()
            return fn()
        if fault.when is When.AFTER:
            fn()
        raise fault.error or StoreUnreachableError(f"{operation} {key} got no answer")

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        return self._run("get", key, lambda: self._inner.get(key, unless=unless))

    def download(self, key: str, target: str) -> ObjectInfo:
        return self._run("download", key, lambda: self._inner.download(key, target))

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        return self._run("part", key, lambda: self._inner.part(key, offset, size, etag=etag, take=take))

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        return self._run("put", key, lambda: self._inner.put(key, body, when))

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        self._run("delete", key, lambda: self._inner.delete(key, when))

    def head(self, key: str) -> ObjectInfo:
        return self._run("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        return self._run("list", prefix, lambda: self._inner.list(prefix))

    def directories(self, prefix: str) -> Sequence[str]:
        return self._run("list", prefix, lambda: self._inner.directories(prefix))

    def verify(self) -> None:
        self._run("verify", "", self._inner.verify)
