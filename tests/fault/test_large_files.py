"""Files that can be read before all of them is here: what is given out is right, whatever happens to the rest."""

from __future__ import annotations

import errno
import gc
import hashlib
import os
import random
import threading
import time
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel
import trio.testing

from swampfs.backends.retry import RetryingStore
from swampfs.errors import AccessDeniedError, FileError, IntegrityError, StoreUnreachableError
from swampfs.provider import Blob
from swampfs.records import Residency, timestamp
from swampfs.sync import hydrate, incoming
from swampfs.sync.incoming import PART, StoppedError
from swampfs.testing.memory import MemoryStore
from tests.datastores import load_shards
from tests.engine import Store, machine

RUN = incoming._RUN * PART
BODY = random.Random(7).randbytes(5 * RUN + 12345)
NAME = "data/test/m/big/1/raw"


class Counting(MemoryStore):
    """Counts what is read; ``change`` may do something to a part before it is answered."""

    def __init__(self, *, authenticated=True, change=lambda body: body):
        super().__init__()
        self.authenticated = authenticated
        self.change = change
        self.asked = []
        self.downloads = 0

    def part(self, key, offset, size, *, etag="", take=None):
        self.asked.append((offset, size))
        blob = super().part(key, offset, size, etag=etag)
        return Blob(self.change(blob.body), blob.info).given(offset, take)

    def download(self, key, target):
        self.downloads += 1
        return super().download(key, target)


def filled(store, body=BODY, *, stamp_s=0.0, seq=1):
    load_shards(Store(store), [(NAME, body)], seq=seq, stamp=timestamp(int((time.time() + stamp_s) * 1e9)))
    return store


async def open_it(node, flags=os.O_RDONLY):
    return await node.fs.open(node.ino(NAME), flags, 0)


async def read(node, number, offset, size):
    found = node.fs.files.read(number, offset, size)
    return await node.fs.files.early.read(number, offset, size) if found is None else found


async def read_all(node, number):
    body = b""
    while piece := await read(node, number, len(body), 1 << 17):
        body += piece
    return body


def run(tmp_path, store, fn):
    async def main():
        async with machine(store, tmp_path / "a") as node:
            await fn(node)

    trio.run(main)


@asynccontextmanager
async def opening(node, numbers, times=1):
    """While it is being opened; leaving the block waits for that."""

    async def opener():
        numbers.append(await open_it(node))

    async with trio.open_nursery() as nursery:
        for _ in range(times):
            nursery.start_soon(opener)
        await trio.testing.wait_all_tasks_blocked(0.05)
        yield


def residency(node):
    return node.sync.catalog.at(NAME).residency


@pytest.mark.parametrize(("authenticated", "requests"), [(True, 1), (False, 2)])
def test_the_head_of_a_large_file_costs_one_part_or_two_that_agree(tmp_path, authenticated, requests):
    store = filled(Counting(authenticated=authenticated))

    async def main(node):
        number = await open_it(node)
        assert await read(node, number, 0, 100) == BODY[:100]
        assert await read(node, number, 5000, 1 << 17) == BODY[5000 : 5000 + (1 << 17)]
        node.fs.files.release(number)
        assert len(store.asked) == requests
        assert store.downloads == 0
        assert residency(node) is Residency.STUB
        number = await open_it(node)
        assert await read(node, number, 0, 100) == BODY[:100]
        assert len(store.asked) == requests, "what is here stays for a while"
        node.fs.files.release(number)

    run(tmp_path, store, main)


@pytest.mark.parametrize("authenticated", [True, False])
def test_who_reads_all_of_it_has_all_of_it_verified_and_kept(tmp_path, authenticated):
    store = filled(Counting(authenticated=authenticated))

    async def main(node):
        number = await open_it(node)
        assert await read_all(node, number) == BODY
        with trio.fail_after(5):
            await node.sync.hydrate_file(NAME)
        assert residency(node) is Residency.CLEAN
        assert await read(node, number, PART, 50) == BODY[PART : PART + 50]
        node.fs.files.release(number)
        sizes = sum(size for _, size in store.asked)
        assert sizes <= len(BODY) + 6 * PART, "most of it was asked for once"
        assert (tmp_path / "a/files" / NAME).read_bytes() == BODY
        assert os.listdir(tmp_path / "a/staging") == []

    run(tmp_path, store, main)


@pytest.mark.parametrize("linger", [True, False])
def test_who_opens_it_when_all_of_it_was_read_finds_it_whole(tmp_path, monkeypatch, linger):
    """The kernel reads a whole file by itself, and keeps its pages."""
    hashing = threading.Event()
    hash_range = incoming._hash_range
    monkeypatch.setattr(incoming, "_hash_range", lambda *args: (hashing.wait(30), hash_range(*args)))
    store = filled(Counting())

    async def main(node):
        number = await open_it(node)
        assert await read_all(node, number) == BODY
        node.fs.files.release(number)
        if linger:
            await trio.testing.wait_all_tasks_blocked()
        hashing.set()
        asked = len(store.asked)
        number = await open_it(node)
        assert residency(node) is Residency.CLEAN
        assert node.fs.files.handles[number].coming is None
        assert len(store.asked) == asked
        node.fs.files.release(number)

    run(tmp_path, store, main)


def test_who_is_read_ahead_for_by_several_requests_is_seen_to_read_in_order(tmp_path):
    answers = threading.Event()

    class Slow(Counting):
        def part(self, key, offset, size, *, etag="", take=None):
            assert offset == 0 or answers.wait(30)
            return super().part(key, offset, size, etag=etag, take=take)

    async def main(node):
        number = await open_it(node)
        coming = node.fs.files.handles[number].coming
        async with trio.open_nursery() as nursery:
            for at in (*range(0, 12 * PART, 3 * PART), 20 * PART):
                assert node.fs.files.read(number, at, 3 * PART) is None
                assert coming.wants_all == (3 * PART <= at < 12 * PART), (
                    "not yet, or a jump: however much is wanted there"
                )
                nursery.start_soon(node.fs.files.early.read, number, at, 3 * PART)
                await trio.testing.wait_all_tasks_blocked()
            answers.set()
        node.fs.files.release(number)

    run(tmp_path, filled(Slow()), main)


def test_a_part_in_the_middle_does_not_wait_for_what_is_before_it(tmp_path):
    store = filled(Counting())

    async def main(node):
        number = await open_it(node)
        assert await read(node, number, len(BODY) - 10, 100) == BODY[-10:]
        assert await read(node, number, 10 * PART - 5, 10) == BODY[10 * PART - 5 : 10 * PART + 5]
        assert len(store.asked) == 4
        assert await read(node, number, len(BODY) + 5, 10) == b""
        node.fs.files.release(number)

    run(tmp_path, store, main)


def test_bytes_that_flip_on_the_way_are_never_given_out(tmp_path):
    chance = random.Random(11)

    def flip(body):
        if chance.random() < 0.3:
            at = chance.randrange(len(body))
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        return body

    store = filled(Counting(authenticated=False, change=flip))

    async def main(node):
        for _ in range(6):
            number = await open_it(node)
            for _ in range(8):
                offset = chance.randrange(len(BODY))
                try:
                    assert await read(node, number, offset, 70_000) == BODY[offset : offset + 70_000]
                except IntegrityError:
                    continue  # four copies, and no two agreed
            node.fs.files.release(number)
            await trio.lowlevel.checkpoint()

    run(tmp_path, store, main)


def test_a_whole_that_is_wrong_once_is_fetched_again_and_wrong_twice_is_an_error(tmp_path):
    wrong = [2]

    def spoil(body):
        if len(body) == RUN and wrong[0] > 0:
            wrong[0] -= 1
            return b"\0" + body[1:]
        return body

    store = filled(Counting(change=spoil))

    async def main(node):
        await node.sync.hydrate_file(NAME)
        assert (tmp_path / "a/files" / NAME).read_bytes() == BODY
        await node.sync.hydrate_file(NAME)
        node.fs.sync.cache.remove(NAME)
        node.sync.catalog.set_residency(node.ino(NAME), Residency.STUB)
        wrong[0] = 1 << 40
        with pytest.raises(IntegrityError, match="hash"):
            await node.sync.hydrate_file(NAME)
        assert os.listdir(tmp_path / "a/staging") == []

    run(tmp_path, store, main)


@pytest.mark.parametrize("stamp_s", [-60.0, None])
def test_an_object_that_is_newer_than_its_entry_or_of_another_size_is_not_read_early(tmp_path, stamp_s):
    """Content lands before its index entry: what is there may not be committed yet."""
    store = filled(Counting(), stamp_s=stamp_s or 0.0)
    if stamp_s is None:
        store.put(NAME, BODY + b"more")

    async def main(node):
        if stamp_s is None:
            with pytest.raises(IntegrityError, match="its index says"):
                await open_it(node)
        else:
            number = await open_it(node)
            assert residency(node) is Residency.CLEAN, "all of it was waited for"
            assert await read(node, number, 0, 10) == BODY[:10]

    run(tmp_path, store, main)


def test_a_truncated_part_is_never_given_out(tmp_path):
    store = filled(Counting(change=lambda body: body[:-1]))

    async def main(node):
        with pytest.raises(IntegrityError):
            await open_it(node)

    run(tmp_path, store, main)


def test_a_reader_whose_file_is_replaced_is_told_so(tmp_path):
    store = filled(Counting())

    async def main(node):
        number = await open_it(node)
        assert await read(node, number, 0, 10) == BODY[:10]
        filled(store, BODY[::-1], seq=2)
        with pytest.raises(FileError) as raised:
            await read(node, number, 5 * PART, 10)
        assert raised.value.errno == errno.ESTALE
        await node.pull()
        assert (await read(node, await open_it(node), 0, 10)) == BODY[::-1][:10]

    run(tmp_path, store, main)


def test_a_store_that_is_away_for_a_moment_costs_one_read_and_not_the_file(tmp_path):
    store = filled(Counting())

    async def main(node):
        number = await open_it(node)
        inner, store.part = store.part, lambda *_, **__: (_ for _ in ()).throw(StoreUnreachableError("away"))
        with pytest.raises(StoreUnreachableError):
            await read(node, number, 5 * PART, 10)
        store.part = inner
        assert await read(node, number, 5 * PART, 10) == BODY[5 * PART : 5 * PART + 10]
        await node.sync.hydrate_file(NAME)
        assert residency(node) is Residency.CLEAN

    run(tmp_path, RetryingStore(store, attempts=1), main)


def test_when_the_last_reader_leaves_the_rest_is_not_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(hydrate, "_LINGER_S", 0.05)
    monkeypatch.setattr(incoming, "_AT_ONCE", 1)
    slowly = threading.Event()  # never set
    store = filled(Counting(change=lambda body: (slowly.wait(0.05), body)[1]))

    async def main(node):
        number = await open_it(node)
        for part in range(3):
            await read(node, number, part * PART, 10)
        node.fs.files.release(number)
        await trio.sleep(0.3)
        asked = len(store.asked)
        assert sum(size for _, size in store.asked) < len(BODY)
        await trio.sleep(0.3)
        assert len(store.asked) == asked
        assert residency(node) is Residency.STUB
        assert not node.sync.hydrator.failures, "nobody was refused anything"
        assert os.listdir(tmp_path / "a/staging") == []
        await node.sync.hydrate_file(NAME)
        assert residency(node) is Residency.CLEAN

    run(tmp_path, store, main)


class Dripping(Counting):
    """Gives a run away in pieces of two parts; ``drip`` is called before each."""

    def __init__(self, drip):
        super().__init__()
        self.drip = drip

    def part(self, key, offset, size, *, etag="", take=None):
        blob = super().part(key, offset, size, etag=etag)
        if take is None:
            return blob
        for at in range(0, size, 2 * PART):
            self.drip(offset + at)
            take(offset + at, memoryview(blob.body[at : at + 2 * PART]))
        return Blob(b"", blob.info)


async def in_order(node, number, parts):
    for part in range(parts):
        await read(node, number, part * PART, 10)


def test_a_part_is_given_out_before_the_rest_of_its_request_has_come(tmp_path):
    rest = threading.Event()
    store = filled(Dripping(lambda offset: offset < 2 * RUN or offset % RUN < 2 * PART or rest.wait(30)))

    async def main(node):
        number = await open_it(node)
        await in_order(node, number, 3)
        with trio.fail_after(10):
            assert await read(node, number, 3 * RUN + PART, 10) == BODY[3 * RUN + PART :][:10]
        assert residency(node) is Residency.STUB
        rest.set()
        assert await read_all(node, number) == BODY
        node.fs.files.release(number)

    run(tmp_path, store, main)


def test_who_begins_anew_is_not_disturbed_by_what_was_given_up(tmp_path, monkeypatch):
    """A thread that waits for the network cannot be stopped, and may get its bytes when all is done."""
    held, late, ended = threading.Event(), threading.Event(), threading.Event()
    written = []
    write_at = incoming._write_at

    class Stalling(Dripping):
        def part(self, key, offset, size, **more):
            try:
                return super().part(key, offset, size, **more)
            except StoppedError:
                ended.set()
                raise

    def stall(offset):
        if offset == RUN:
            held.set()
            late.wait(30)

    store = filled(Stalling(stall))

    def write(fd, body, offset):
        written.append(offset)
        write_at(fd, body, offset)

    async def main(node):
        number = await open_it(node)
        await in_order(node, number, 3)
        assert await trio.to_thread.run_sync(held.wait, 30)
        node.fs.files.release(number)  # and nobody wants it
        await trio.testing.wait_all_tasks_blocked(0.05)
        store.drip = lambda _: None
        await node.sync.hydrate_file(NAME)
        monkeypatch.setattr(incoming, "_write_at", write)
        late.set()
        assert await trio.to_thread.run_sync(ended.wait, 30)
        assert written == []
        assert (tmp_path / "a/files" / NAME).read_bytes() == BODY

    run(tmp_path, store, main)


def test_what_was_given_up_is_not_asked_for_again(tmp_path):
    held, late = threading.Event(), threading.Event()

    def fail_late(offset):
        if offset == RUN:
            held.set()
            late.wait(30)
            raise StoreUnreachableError("reset")

    store = filled(Dripping(fail_late))

    async def main(node):
        number = await open_it(node)
        await in_order(node, number, 3)
        assert await trio.to_thread.run_sync(held.wait, 30)
        node.fs.files.release(number)
        await trio.testing.wait_all_tasks_blocked(0.05)
        late.set()
        await trio.sleep(0.3)
        assert store.asked.count((RUN, RUN)) == 1

    run(tmp_path, store, main)


def test_who_opens_what_was_just_given_up_has_one_of_its_own(tmp_path):
    store = filled(Counting())

    async def main(node):
        numbers = [await open_it(node)]
        given_up = node.fs.files.handles[numbers[0]].coming
        given_up.stop()
        numbers.append(await open_it(node))
        assert node.fs.files.handles[numbers[1]].coming is not given_up
        for number in numbers:
            assert await read_all(node, number) == BODY
            node.fs.files.release(number)

    run(tmp_path, store, main)


def test_a_disk_that_is_full_for_a_while_costs_what_it_refused(tmp_path, monkeypatch):
    write_at, full = incoming._write_at, [OSError(errno.ENOSPC, "full") for _ in range(3)]
    made = []
    store = filled(Dripping(lambda _: None))

    def write(fd, body, offset):
        if full and offset >= 2 * RUN:
            raise full.pop()
        write_at(fd, body, offset)

    async def make_room(size):
        made.append(size)
        return True

    async def main(node):
        monkeypatch.setattr(incoming, "_write_at", write)
        monkeypatch.setattr(node.sync.hydrator.room, "make_room", make_room)
        await node.sync.hydrate_file(NAME)
        assert (tmp_path / "a/files" / NAME).read_bytes() == BODY
        assert len(made) == 3
        assert sum(size for _, size in store.asked) <= len(BODY) + 3 * RUN

    run(tmp_path, store, main)


@pytest.mark.parametrize("size", [-1, 1])
def test_a_request_that_gives_more_or_less_than_it_was_asked_for_is_refused(tmp_path, size):
    class Wrong(Counting):
        def part(self, key, offset, asked, *, etag="", take=None):
            blob = super().part(key, offset, asked + size if take else asked, etag=etag)
            return blob.given(offset, take)

    async def main(node):
        with pytest.raises(IntegrityError, match="other bytes"):
            await node.sync.hydrate_file(NAME)
        assert residency(node) is Residency.STUB

    run(tmp_path, filled(Wrong()), main)


def test_what_a_repeated_request_brings_again_is_not_written_again(tmp_path):
    """It may be hashed already, and what was hashed is what is kept."""

    class Breaking(Dripping):
        def part(self, key, offset, size, *, etag="", take=None):
            if take is None or offset != RUN:
                return super().part(key, offset, size, etag=etag, take=take)
            given, self.change = self.asked.count((offset, size)), self.flip

            def some(at, piece):
                if not given and at >= RUN + 6 * PART:
                    raise StoreUnreachableError("reset")
                take(at, piece)

            return super().part(key, offset, size, etag=etag, take=some)

        def flip(self, body):
            again = self.asked.count(self.asked[-1]) > 1 and self.asked[-1][0] == RUN
            return bytes([body[0] ^ 1]) + body[1:] if again else body

    store = filled(Breaking(lambda _: None))

    async def main(node):
        await node.sync.hydrate_file(NAME)
        assert (tmp_path / "a/files" / NAME).read_bytes() == BODY
        assert store.asked.count((RUN, RUN)) == 2, "it was right, and not fetched as a whole again"

    run(tmp_path, RetryingStore(store, attempts=3), main)


def test_what_was_sure_when_it_was_waited_for_is_looked_at_again(tmp_path, monkeypatch):
    """A second round, because the hash of the first was wrong, may bring something else meanwhile."""
    store = filled(Counting(authenticated=False))
    wait_for, lowered = incoming.Incoming._wait_for, []

    async def waiting(coming, part):
        await wait_for(coming, part)
        if part == 5 and not lowered:
            await wait_for(coming, 4)
            lowered.append(part)
            coming._parts[4] = incoming._HERE

    monkeypatch.setattr(incoming.Incoming, "_wait_for", waiting)

    async def main(node):
        number = await open_it(node)
        assert await read(node, number, 4 * PART, 2 * PART) == BODY[4 * PART : 6 * PART]
        assert lowered
        assert node.fs.files.handles[number].coming._parts[4] == incoming._SURE
        node.fs.files.release(number)

    run(tmp_path, store, main)


@pytest.mark.parametrize("authenticated", [True, False])
def test_the_hash_is_behind_where_readers_do_not_wait_for_it(tmp_path, monkeypatch, authenticated):
    hashed = []
    hash_range = incoming._hash_range
    monkeypatch.setattr(incoming, "_BEHIND", RUN)
    monkeypatch.setattr(incoming, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(incoming, "_hash_range", lambda *args: (hashed.append(args[2:]), hash_range(*args)))
    gate = threading.Event()
    store = filled(Dripping(lambda offset: offset < len(BODY) - 2 * PART or gate.wait(30)))

    store.authenticated = authenticated

    async def main(node):
        number = await open_it(node)
        await in_order(node, number, 3)
        await read(node, number, 4 * RUN, 10)
        await trio.testing.wait_all_tasks_blocked(0.05)
        behind = 5 * RUN - (hashed[-1][1] if hashed else 0)
        assert (behind >= RUN) == authenticated
        gate.set()
        assert await read_all(node, number) == BODY
        node.fs.files.release(number)
        await node.sync.hydrate_file(NAME)
        assert residency(node) is Residency.CLEAN

    run(tmp_path, store, main)


def test_a_removed_file_is_readable_to_its_end_for_who_has_it_open(tmp_path):
    store = filled(Counting())

    async def main(node):
        one, two = await open_it(node), await open_it(node)
        await read(node, one, 0, 10)
        await node.unlink(NAME)
        await node.push()
        assert NAME not in store.objects
        assert await read_all(node, one) == BODY
        node.fs.files.release(one)
        assert await read(node, two, 7 * PART, 10) == BODY[7 * PART : 7 * PART + 10]
        node.fs.files.release(two)

    run(tmp_path, store, main)


def test_a_file_that_is_renamed_over_is_readable_to_its_end_for_who_has_it_open(tmp_path):
    store = filled(Counting())

    async def main(node):
        number = await open_it(node)
        await node.write("data/test/m/big/1/new", b"new")
        await node.rename("data/test/m/big/1/new", NAME)
        await node.push()
        assert await read_all(node, number) == BODY
        assert await node.read(NAME) == b"new"

    run(tmp_path, store, main)


def test_a_writer_has_all_of_it_while_a_reader_goes_on(tmp_path):
    store = filled(Counting())

    async def main(node):
        reader = await open_it(node)
        await read(node, reader, 0, 10)
        writer = await open_it(node, os.O_RDWR)
        assert await node.fs.files.write(writer, 3 * PART, b"changed") == 7
        assert await read(node, reader, 3 * PART, 7) == b"changed", "they have the same file open"
        node.fs.files.release(writer)
        node.fs.files.release(reader)
        report = await node.push()
        assert report.pushed == 1
        body = BODY[: 3 * PART] + b"changed" + BODY[3 * PART + 7 :]
        assert hashlib.sha256(store.objects[NAME][0]).digest() == hashlib.sha256(body).digest()

    run(tmp_path, store, main)


def test_many_readers_at_once_ask_once_for_each_part(tmp_path):
    store = filled(Counting())

    async def main(node):
        numbers = [await open_it(node) for _ in range(8)]
        async with trio.open_nursery() as nursery:
            for number in numbers:
                nursery.start_soon(read, node, number, 9 * PART, 10)
        assert len(store.asked) == 2
        for number in numbers:
            node.fs.files.release(number)

    run(tmp_path, store, main)


def test_a_small_file_is_fetched_whole(tmp_path):
    store = filled(Counting(), b"small")

    async def main(node):
        assert await node.read(NAME) == b"small"
        assert store.asked == []
        assert store.downloads == 1

    run(tmp_path, store, main)


def test_who_opens_a_file_does_not_wait_for_others_that_are_fetched(tmp_path):
    gate = threading.Event()
    store = Dripping(lambda _: gate.wait(30))
    large, small = [f"{NAME}-{number}" for number in range(7)], "data/test/m/small/1/raw"
    stamp = timestamp(time.time_ns())
    load_shards(Store(store), [*((name, BODY) for name in (*large, NAME)), (small, b"small")], stamp=stamp)

    async def main(node):
        async with trio.open_nursery() as nursery:
            for name in large:
                nursery.start_soon(node.sync.hydrate_file, name)
            await trio.testing.wait_all_tasks_blocked(0.1)
            with trio.fail_after(10):
                assert await node.read(small) == b"small"
                number = await open_it(node)
                await in_order(node, number, 20)
                assert node.fs.files.handles[number].coming.is_fetching
            gate.set()
            node.fs.files.release(number)

    run(tmp_path, store, main)


def descriptors():
    gc.collect()  # of tests before this one
    return len(os.listdir("/proc/self/fd"))


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_a_file_that_is_truncated_while_it_comes_has_what_was_written_since(tmp_path):
    store = filled(Counting())

    async def main(node):
        reader = await open_it(node)
        await read(node, reader, 0, 10)
        writer = await open_it(node, os.O_WRONLY | os.O_TRUNC)
        await node.fs.files.write(writer, 0, b"new")
        assert await read(node, reader, 0, 10) == b"new", "one file, whoever has it open"
        assert await read(node, await open_it(node), 0, 10) == b"new"

    run(tmp_path, store, main)


def test_an_open_that_returns_after_a_write_sees_it(tmp_path):
    gate = threading.Event()
    store = filled(Counting(change=lambda body: (gate.wait(5), body)[1]))

    async def main(node):
        numbers = []
        async with opening(node, numbers):
            await node.write(NAME, b"local")
            gate.set()
        assert await read(node, numbers[0], 0, 10) == b"local"

    run(tmp_path, store, main)


@pytest.mark.parametrize("error", [AccessDeniedError("no"), StoreUnreachableError("away"), OSError(28, "full")])
def test_a_download_that_fails_leaves_nothing_behind(tmp_path, error, monkeypatch):
    store = filled(Counting())
    if isinstance(error, OSError):
        monkeypatch.setattr(incoming, "_write_at", failing(error))
    else:
        store.part = failing(error)

    async def main(node):
        before = descriptors()
        for _ in range(3):
            with pytest.raises(type(error)):
                await node.sync.hydrate_file(NAME)
        assert descriptors() <= before
        assert os.listdir(tmp_path / "a/staging") == []

    run(tmp_path, RetryingStore(store, attempts=1), main)


def test_a_catalog_that_fails_at_the_last_step_costs_that_download_only(tmp_path, monkeypatch):
    store = filled(Counting())

    async def main(node):
        before = descriptors()
        with monkeypatch.context() as patch:
            patch.setattr(node.sync.catalog, "set_residency", failing(OSError(28, "full")))
            with pytest.raises(OSError, match="full"):
                await node.sync.hydrate_file(NAME)
        await node.sync.hydrate_file(NAME)
        assert residency(node) is Residency.CLEAN
        assert descriptors() <= before

    run(tmp_path, store, main)


def test_what_was_read_of_a_replaced_file_goes_with_its_last_reader(tmp_path, monkeypatch):
    monkeypatch.setattr(hydrate, "_LINGER_S", 0.01)
    store = filled(Counting())

    async def main(node):
        before = descriptors()
        reader = await open_it(node)
        await read(node, reader, 0, 10)
        filled(store, BODY[::-1], seq=2)
        await node.pull()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.sync.hydrate_file, NAME)
            await trio.lowlevel.checkpoint()
            node.fs.files.release(reader)
        await trio.sleep(0.1)
        assert descriptors() <= before
        assert os.listdir(tmp_path / "a/staging") == []

    run(tmp_path, store, main)


def test_two_opens_at_once_agree_on_one_version(tmp_path):
    store = filled(Counting())
    gate = threading.Event()
    real = store.part

    def slow_first(key, offset, size, *, etag="", take=None):
        blob = real(key, offset, size, etag=etag, take=take)
        if not etag:
            gate.wait(5)
        return blob

    store.part = slow_first

    async def main(node):
        numbers = []
        async with opening(node, numbers, times=2):
            store.put(NAME, BODY[::-1])  # content lands before its index entry
            gate.set()
        for number in numbers:
            assert await read(node, number, 0, 10) == BODY[:10]
            with pytest.raises(FileError):
                await read(node, number, 5 * RUN, 10)

    run(tmp_path, store, main)


@pytest.mark.parametrize("over", [False, True])
def test_a_full_disk_keeps_nobody_from_removing_what_is_being_read(tmp_path, over, monkeypatch):
    store = filled(Counting())

    async def main(node):
        reader = await open_it(node)
        await read(node, reader, 0, 10)
        monkeypatch.setattr(incoming, "_write_at", failing(OSError(28, "full")))
        if over:
            await node.write("data/test/m/big/1/new", b"new")
            await node.rename("data/test/m/big/1/new", NAME)
            assert await node.read(NAME) == b"new"
        else:
            await node.unlink(NAME)
        with pytest.raises(FileError) as raised:
            await read(node, reader, 5 * RUN, 10)
        assert raised.value.errno == errno.ESTALE

    run(tmp_path, store, main)


def test_a_state_directory_that_turned_read_only_does_not_end_the_mount(tmp_path, monkeypatch):
    monkeypatch.setattr(hydrate, "_LINGER_S", 0.01)
    store = filled(Counting())

    async def main(node):
        reader = await open_it(node)
        with monkeypatch.context() as patch:
            patch.setattr(incoming.os, "unlink", failing(OSError(30, "read-only")))
            node.fs.files.release(reader)
            await trio.sleep(0.1)
        assert await read(node, await open_it(node), 0, 10) == BODY[:10]

    run(tmp_path, store, main)


def test_an_entry_of_an_absurd_size_costs_nothing(tmp_path):
    store = MemoryStore()
    load_shards(Store(store), [(NAME, BODY)])
    shard = next(key for key in store.objects if key.startswith("_index/data"))
    store.put(shard, store.objects[shard][0].replace(str(len(BODY)).encode(), str(1 << 60).encode()))

    async def main(node):
        before = descriptors()
        with pytest.raises(IntegrityError, match="its index says"):
            await open_it(node)
        assert descriptors() <= before

    run(tmp_path, store, main)
