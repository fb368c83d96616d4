"""Machines without a kernel: sync service and file system over any store, on one trio loop."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from swampfs.backends.retry import RetryingStore
from swampfs.errors import FileError
from swampfs.fs.attributes import Caller, Owner
from swampfs.fs.localtier import LocalTier
from swampfs.fs.vfs import FileSystem
from swampfs.names import Keyspace
from swampfs.provider import ObjectStore
from swampfs.settings import TierPolicy
from swampfs.sync.listing import ListingIndex
from swampfs.sync.locks import Lock
from swampfs.sync.object_index import ObjectIndex
from swampfs.sync.remote import Remote
from swampfs.sync.service import SyncService
from swampfs.threads import Threads
from tests.datastores import load_monolith, load_shards

CALLER = Caller(0, 0, 0)


class Store:
    """A store as :mod:`tests.datastores` wants to see it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def put(self, key: str, body: bytes) -> None:
        self.store.put(key, body)

    def get(self, key: str) -> bytes:
        blob = self.store.get(key)
        assert blob is not None
        return blob.body

    def keys(self) -> list[str]:
        return [info.key for info in self.store.list("")]


def load(store: ObjectStore, files: dict[str, bytes], index: str) -> None:
    if index == "v2":
        load_shards(Store(store), files.items())
    elif index == "v1":
        load_monolith(Store(store), files.items())
    else:
        for rel, body in files.items():
            store.put(rel, body)


class Node:
    """One machine: path-based operations over the file system, as a shell would do them."""

    def __init__(self, sync: SyncService, fs: FileSystem) -> None:
        self.sync = sync
        self.fs = fs

    def ino(self, path: str) -> int:
        ino = 1
        for name in filter(None, path.split("/")):
            found = self.fs.lookup(ino, name)
            if found is None:
                raise FileNotFoundError(path)
            self.fs.forget(found.ino, 1)
            ino = found.ino
        return ino

    def parent(self, path: str) -> tuple[int, str]:
        head, _, name = path.rpartition("/")
        return self.ino(head), name

    async def mkdirs(self, path: str) -> None:
        done = ""
        for name in filter(None, path.split("/")):
            parent = self.ino(done)
            if self.fs.lookup(parent, name) is None:
                await self.fs.mkdir(parent, name, 0o755, CALLER)
            done = f"{done}/{name}"

    async def write(self, path: str, body: bytes) -> None:
        parent, name = self.parent(path)
        if self.fs.lookup(parent, name) is None:
            number, _ = await self.fs.create(parent, name, 0o644, os.O_RDWR, CALLER)
        else:
            number = await self.fs.open(self.ino(path), os.O_WRONLY | os.O_TRUNC, 0)
        await self.fs.files.write(number, 0, body)
        self.fs.files.release(number)

    async def read(self, path: str) -> bytes:
        try:
            number = await self.fs.open(self.ino(path), os.O_RDONLY, 0)
        except FileError as error:
            if error.errno != errno.ESTALE:
                raise
            number = await self.fs.open(self.ino(path), os.O_RDONLY, 0)  # as the kernel does
        try:
            return self.fs.files.read(number, 0, 1 << 24)
        finally:
            self.fs.files.release(number)

    async def unlink(self, path: str) -> None:
        await self.fs.unlink(*self.parent(path), CALLER)

    async def rmdir(self, path: str) -> None:
        await self.fs.rmdir(*self.parent(path), CALLER)

    async def rename(self, source: str, target: str) -> None:
        await self.fs.rename(self.parent(source), self.parent(target), CALLER, replace=True)

    async def push(self):
        return await self.sync.push_changed(sorted(self.sync.journal))

    async def pull(self):
        return await self.sync.pull_changed()

    def names(self) -> set[str]:
        """Paths of all files."""
        return {str(node.path) for node in self.sync.catalog.files_below("")}

    async def tree(self) -> dict[str, str]:
        return {path: hashlib.sha256(await self.read(path)).hexdigest() for path in sorted(self.names())}


@asynccontextmanager
async def machine(
    store: ObjectStore,
    home: Path,
    *,
    plain: bool = False,
    ttl_ms: int = 30_000,
    patience_s: float = 0.3,
) -> AsyncIterator[Node]:
    """A running machine; leaving the block is a ``kill -9``: nothing is pushed or tidied."""
    (home / "state").mkdir(parents=True, exist_ok=True)
    (home / "local").mkdir(exist_ok=True)
    remote, keys = Remote(RetryingStore(store, first_pause_s=0.001), Threads()), Keyspace()
    async with trio.open_nursery() as nursery:
        sync = SyncService(
            remote,
            keys,
            ListingIndex(remote, keys) if plain else ObjectIndex(remote, keys),
            str(home),
            make_lock=lambda key, note: Lock(remote, key, ttl_ms=ttl_ms, max_wait_s=patience_s, note=note),
            prove=None,
            start_soon=nursery.start_soon,
            timeout_s=1.0,
            lock_wait_s=patience_s,
        )
        fs = FileSystem(
            sync,
            LocalTier(str(home / "local"), TierPolicy()),
            owner=Owner(0, 0),
            read_only=False,
            on_dirty=lambda path: None,
            invalidate=lambda changes: None,
        )
        await sync.open(writable=True)
        try:
            yield Node(sync, fs)
        finally:
            nursery.cancel_scope.cancel()
            sync.close()
