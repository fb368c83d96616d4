"""Reads that meet missing, wrong or late content."""

from __future__ import annotations

import errno
import os

import pytest
import trio

from swampfs.errors import AbsentError, IntegrityError, StoreUnreachableError
from swampfs.records import Residency
from swampfs.testing.faults import Fault, FaultyStore
from swampfs.testing.memory import MemoryStore
from tests.engine import load, machine

FILES = {"audit/a": b"first", "audit/b": b"other"}


@pytest.fixture
def store():
    filled = MemoryStore()
    load(filled, FILES, "v2")
    return filled


def run(fn):
    trio.run(fn)


@pytest.mark.parametrize("wrong", [b"fi", b"first and more", b"firsT"], ids=["truncated", "padded", "flipped"])
def test_content_that_does_not_match_the_index_is_never_served(store, tmp_path, wrong):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            store.put("audit/a", wrong)
            with pytest.raises(IntegrityError):
                await a.read("audit/a")
            assert await a.read("audit/b") == b"other"
            assert not (tmp_path / "a/files/audit/a").exists()
            store.put("audit/a", b"first")
            assert await a.read("audit/a") == b"first"

    run(main)


def test_a_push_in_progress_is_waited_for(store, tmp_path):
    """Content lands before its index entry: a reader in between gets the new version, once it is committed."""

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await b.write("audit/a", b"second")
            original = b.sync._pusher._upload

            async def upload(batch, transaction):
                await original(batch, transaction)
                nursery.start_soon(read)
                await trio.sleep(0.05)

            b.sync._pusher._upload = upload
            seen = []

            async def read():
                seen.append(await a.read("audit/a"))

            async with trio.open_nursery() as nursery:
                await b.push()
            assert seen == [b"second"]

    run(main)


def test_a_missing_object_is_that_files_error_only(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            store.delete("audit/a")
            with pytest.raises(AbsentError):
                await a.read("audit/a")
            assert await a.read("audit/b") == b"other"
            assert a.names() == set(FILES)

    run(main)


def test_a_store_that_does_not_answer_fails_the_cold_read_and_keeps_the_rest(store, tmp_path):
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            assert await a.read("audit/b") == b"other"
            faulty.faults.append(Fault("download", "", times=99))
            faulty.faults.append(Fault("get", "", times=99))
            with pytest.raises(StoreUnreachableError):
                await a.read("audit/a")
            with pytest.raises(StoreUnreachableError):
                await a.pull()
            assert await a.read("audit/b") == b"other"
            await a.write("audit/c", b"written while away")
            assert a.names() == {*FILES, "audit/c"}

    run(main)


def test_a_mount_that_was_up_before_starts_without_the_store(store, tmp_path):
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.read("audit/a")
        faulty.faults.append(Fault("get", "", times=99))
        async with machine(faulty, tmp_path / "a") as a:
            assert a.names() == set(FILES)
            assert await a.read("audit/a") == b"first"

    run(main)


def test_one_transient_failure_is_retried(store, tmp_path):
    faulty = FaultyStore(store)
    faulty.faults.append(Fault("download", "audit/a", times=2))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            assert await a.read("audit/a") == b"first"

    run(main)


def test_a_commit_during_the_reading_of_shards_is_never_seen_in_part(store, tmp_path):
    """Meta is read before and after; a commit in between starts the reading over."""
    other = MemoryStore()
    load(other, {"audit/a": b"1", "files/x": b"1"}, "v2")
    faulty = FaultyStore(other)

    def commit():
        load(other, {"audit/a": b"2", "files/x": b"2"}, "v2")
        meta = other.get("_index/_meta.json").body.replace(b'"commitSeq":1', b'"commitSeq":2')
        other.put("_index/_meta.json", meta)

    faulty.faults.append(Fault("get", "_index/files.json", action=commit))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            assert (await a.read("audit/a"), await a.read("files/x")) == (b"2", b"2")
            assert a.sync.catalog.watermark().commit_seq == 2
            assert all(node.residency is Residency.CLEAN for node in a.sync.catalog.files_below(""))

    run(main)


class Registry:
    """A kernel that reads files of this machine by itself, as far as the table of handles can tell."""

    def __init__(self):
        self.numbers = set()

    def register(self, fd):
        self.numbers.add(fd)
        return fd

    def unregister(self, number):
        self.numbers.remove(number)


def test_an_open_for_writing_that_fails_beside_a_reader_leaves_nothing_open(store, tmp_path, monkeypatch):
    body = b"large" * 100_000

    async def main():
        async with machine(store, tmp_path / "a") as a:
            kernel = a.fs.files.handles.backing = Registry()
            await a.write("audit/large", body)
            await a.push()
            reader = await a.fs.open(a.ino("audit/large"), os.O_RDONLY, 0)
            assert len(kernel.numbers) == 1
            descriptors = len(os.listdir("/proc/self/fd"))
            with monkeypatch.context() as full:
                full.setattr(a.sync, "mark_dirty", no_room)
                for _ in range(5):
                    with pytest.raises(OSError, match="No space"):
                        await a.fs.open(a.ino("audit/large"), os.O_RDWR, 0)
            assert len(a.fs.files.handles) == 1
            assert len(os.listdir("/proc/self/fd")) == descriptors
            a.fs.files.release(reader)
            assert not kernel.numbers
            await a.write("audit/large", body[::-1])
            assert (await a.push()).pushed == 1
            assert store.get("audit/large").body == body[::-1]

    run(main)


def no_room(node):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
