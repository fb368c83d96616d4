"""The blocking object store seen from the loop: each call is one thread hop in the lane of its purpose."""

from __future__ import annotations

from collections.abc import Sequence

from swampfs.provider import ALWAYS, Blob, ObjectInfo, ObjectStore, Precondition
from swampfs.threads import Lane, Threads


class Remote:
    """An :class:`ObjectStore` with ``await``. Reads may be abandoned on cancellation, writes may not."""

    def __init__(self, store: ObjectStore, threads: Threads) -> None:
        self.store = store
        self.threads = threads

    @property
    def name(self) -> str:
        return self.store.name

    @property
    def label(self) -> str:
        return self.store.label

    async def get(self, key: str, *, unless: str = "", lane: Lane = Lane.INDEX) -> Blob | None:
        return await self.threads.read(lane, lambda: self.store.get(key, unless=unless))

    async def head(self, key: str, lane: Lane = Lane.INDEX) -> ObjectInfo:
        return await self.threads.read(lane, self.store.head, key)

    async def list(self, prefix: str) -> list[ObjectInfo]:
        return await self.threads.read(Lane.INDEX, lambda: list(self.store.list(prefix)))

    async def directories(self, prefix: str) -> Sequence[str]:
        return await self.threads.read(Lane.INDEX, self.store.directories, prefix)

    async def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS, lane: Lane = Lane.PUSH) -> ObjectInfo:
        return await self.threads.write(lane, self.store.put, key, body, when)

    async def delete(self, key: str, when: Precondition = ALWAYS, lane: Lane = Lane.PUSH) -> None:
        await self.threads.write(lane, self.store.delete, key, when)

    async def verify(self) -> None:
        await self.threads.read(Lane.INDEX, self.store.verify)
