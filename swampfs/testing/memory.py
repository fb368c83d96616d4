"""An object store in memory: every obligation of the port, exactly; for tests that need no network."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence

from swampfs.errors import AbsentError, PreconditionError
from swampfs.provider import ALWAYS, Blob, ObjectInfo, Precondition, Take
from swampfs.records import timestamp


class MemoryStore:
    """:class:`~swampfs.provider.ObjectStore` over a dict. Thread-safe; shared by the machines of a test."""

    label = "memory"
    authenticated = True

    def __init__(self, name: str = "memory://") -> None:
        self.name = name
        self._lock = threading.Lock()
        self.objects: dict[str, tuple[bytes, ObjectInfo]] = {}

    def _found(self, key: str) -> tuple[bytes, ObjectInfo]:
        try:
            return self.objects[key]
        except KeyError:
            raise AbsentError(f"{self.name}/{key} does not exist") from None

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        with self._lock:
            body, info = self._found(key)
        return None if unless and unless == info.etag else Blob(body, info)

    def download(self, key: str, target: str) -> ObjectInfo:
        with self._lock:
            body, info = self._found(key)
        with open(target, "wb") as file:
            file.write(body)
        return info

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        with self._lock:
            body, info = self._found(key)
        if etag and etag != info.etag:
            raise PreconditionError(f"{self.name}/{key} is another version")
        return Blob(body[offset : offset + size], info).given(offset, take)

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        if isinstance(body, str):
            with open(body, "rb") as file:
                body = file.read()
        with self._lock:
            self._demand(key, when)
            # As S3: equal bytes have equal ETags.
            etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
            info = ObjectInfo(key, len(body), etag, timestamp(time.time_ns()))
            self.objects[key] = (body, info)
            return info

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        with self._lock:
            self._demand(key, when)
            self.objects.pop(key, None)

    def head(self, key: str) -> ObjectInfo:
        with self._lock:
            return self._found(key)[1]

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        with self._lock:
            found = [info for key, (_, info) in sorted(self.objects.items()) if key.startswith(prefix)]
        return iter(found)

    def directories(self, prefix: str) -> Sequence[str]:
        found = (info.key[len(prefix) :].partition("/") for info in self.list(prefix))
        return sorted({name for name, slash, _ in found if slash})

    def verify(self) -> None:
        """Memory is always there."""

    def _demand(self, key: str, when: Precondition) -> None:
        found = self.objects.get(key)
        refused = (when.absent and found is not None) or (
            when.etag is not None and (found is None or found[1].etag != when.etag)
        )
        if refused:
            raise PreconditionError(f"{self.name}/{key} is not as demanded")
