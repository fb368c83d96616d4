"""Pushes that meet other writers, lost answers and crashes: nothing is lost, overwritten or resurrected."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from pathlib import Path

import pytest
import trio

from swampfs.errors import CircuitOpenError, FileError, LeaseLostError, StoreError, SwampfsError
from swampfs.provider import ABSENT
from swampfs.records import LockInfo, Op
from swampfs.sync.locks import encode_lock
from swampfs.testing.faults import Fault, FaultyStore, When
from swampfs.testing.memory import MemoryStore
from tests.datastores import check_bucket, compact, entry, indexed
from tests.engine import Store, load, machine

UUID = "7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
RAW = f"data/test/{UUID}/state/1/raw"
LATEST = f"data/test/{UUID}/state/latest"
FILES = {RAW: b"one", LATEST: b"1", "audit/a.jsonl": b"a\n", "files/x": b"x", "files/sub/y": b"y"}
INDEXES = pytest.mark.parametrize("index", ["v1", "v2"])


def run(fn, *arguments):
    trio.run(fn, *arguments)


@pytest.fixture
def store():
    return MemoryStore()


def content(store, rel):
    return store.get(rel).body


def commit_elsewhere(store, rel, body, partition):
    """Another machine publishes a file: object, shard, meta."""
    store.put(rel, body)
    shard = json.loads(store.get(f"_index/{partition}.json").body)
    shard["entries"][rel] = entry(rel, body)
    store.put(f"_index/{partition}.json", compact(shard))
    meta = json.loads(store.get("_index/_meta.json").body)
    meta["commitSeq"] += 1
    meta["partitions"] = sorted({*meta["partitions"], partition})
    store.put("_index/_meta.json", compact(meta))


def lock_of_another(store, key, ttl_ms=30_000):
    info = LockInfo("ana@elsewhere", "elsewhere", 1, "2026-08-03T09:14:20.000Z", ttl_ms, "a-nonce")
    store.put(key, encode_lock(info), ABSENT)


def conflicts(node):
    kept = [Path(node.sync.cache._conflicts, name, "content") for name in node.sync.cache.conflicts()]
    return {path.read_bytes() for path in kept if path.exists()}


# --- other writers ------------------------------------------------------------------------------------------


class Slow(MemoryStore):
    """Answers at once, but for reads of the index."""

    wait_s = 0.0

    def get(self, key, *, unless=""):
        if key.startswith("_index/"):
            time.sleep(self.wait_s)
        return super().get(key, unless=unless)


def test_a_store_that_is_slow_is_not_told_as_a_lock_of_somebody_else(tmp_path):
    """The lock is ours in time, what others wrote before is not known in time: the change is queued."""
    store = Slow()
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a:
            store.wait_s = 0.4  # longer than a writer waits
            await a.sync.leases.guard(0, "files/x")
            assert a.sync.leases.reach.lost_since is not None
            store.wait_s = 0.0
            await a.write("files/x", b"written")
            await a.push()
            assert content(store, "files/x") == b"written"

    run(main)


@INDEXES
def test_a_model_locked_by_another_machine_is_not_pushed(store, tmp_path, index):
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write(RAW, b"two")
            await a.write("audit/a.jsonl", b"b\n")
            lock_of_another(store, f"data/test/{UUID}/.lock")
            report = await a.push()
            assert list(report.waiting) == [f"data/test/{UUID}/.lock"]
            assert content(store, RAW) == b"one"
            assert content(store, "audit/a.jsonl") == b"b\n"  # what has no lock in the way goes on
            assert a.sync.journal.op(RAW) is Op.WRITE

    run(main)


def test_the_global_lock_of_a_structural_command_is_waited_for_without_holding_a_model_lock(store, tmp_path):
    load(store, FILES, "v2")
    lock_of_another(store, ".datastore.lock")

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write(RAW, b"two")
            assert list((await a.push()).waiting) == [f"data/test/{UUID}/.lock"]
            assert f"data/test/{UUID}/.lock" not in store.objects
            assert content(store, RAW) == b"one"

    run(main)


@INDEXES
def test_a_stale_lock_is_taken_over_only_after_its_ttl_on_our_clock(store, tmp_path, index):
    load(store, FILES, index)
    lock_of_another(store, f"data/test/{UUID}/.lock", ttl_ms=200)

    async def main():
        async with machine(store, tmp_path / "a", patience_s=5.0) as a:
            await a.write(RAW, b"two")
            await a.push()
            assert content(store, RAW) == b"two"

    run(main)
    check_bucket(Store(store))


@INDEXES
def test_a_path_committed_elsewhere_since_we_read_it_becomes_a_conflict_that_keeps_both(store, tmp_path, index):
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.write(RAW, b"from a")
            await b.write(RAW, b"from b")
            await a.push()
            report = await b.push()
            assert report.conflicts == (RAW,)
            assert conflicts(b) == {b"from b"}
            assert content(store, RAW) == b"from a"
            assert await b.read(RAW) == b"from a"

    run(main)
    check_bucket(Store(store))


@INDEXES
def test_a_delete_of_what_another_machine_changed_does_not_delete_it(store, tmp_path, index):
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.write(RAW, b"newer")
            await b.unlink(RAW)
            await a.push()
            assert (await b.push()).conflicts == (RAW,)
            assert await b.read(RAW) == b"newer"

    run(main)
    assert check_bucket(Store(store))[RAW] == b"newer"


def test_a_writer_without_model_lock_is_excluded_by_the_global_lock_from_decision_to_commit(store, tmp_path):
    """Paths outside models: while we upload, nobody else can commit."""
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    seen = []
    faulty.faults.append(Fault("put", "files/x", action=lambda: seen.append(".datastore.lock" in store.objects)))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.write("files/x", b"changed")
            await a.push()

    run(main)
    assert seen == [True]


def test_emptying_a_shard_does_not_delist_what_another_writer_just_put_into_it(store, tmp_path):
    load(store, FILES, "v2")
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.unlink("files/x")
            await a.unlink("files/sub/y")
            faulty.faults.append(
                Fault("put", "_index/files.json", action=lambda: commit_elsewhere(store, "files/new", b"n", "files"))
            )
            await a.push()
            await a.pull()
            assert await a.read("files/new") == b"n"

    run(main)
    assert {rel for rel in check_bucket(Store(store)) if rel.startswith("files/")} == {"files/new"}


def test_a_commit_between_reading_and_writing_a_shard_is_merged(store, tmp_path):
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    faulty.faults.append(
        Fault("put", "_index/audit.json", action=lambda: commit_elsewhere(store, "audit/b.jsonl", b"b", "audit"))
    )

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.write("audit/a.jsonl", b"ours")
            await a.push()
            await a.pull()
            assert await a.read("audit/b.jsonl") == b"b"

    run(main)
    data = check_bucket(Store(store))
    assert (data["audit/a.jsonl"], data["audit/b.jsonl"]) == (b"ours", b"b")


def test_a_migration_to_shards_during_the_upload_is_noticed(store, tmp_path):
    load(store, FILES, "v1")
    faulty = FaultyStore(store)

    def migrate():
        load(store, FILES, "v2")

    faulty.faults.append(Fault("put", "audit/a.jsonl", action=migrate))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.write("audit/a.jsonl", b"ours")
            with pytest.raises(SwampfsError):
                await a.push()
            await a.push()
            await a.pull()
            assert await a.read("audit/a.jsonl") == b"ours"

    run(main)
    assert json.loads(store.get("_index/_meta.json").body)["version"] == 2
    assert indexed(Store(store))["audit/a.jsonl"] == entry("audit/a.jsonl", b"ours") | {
        key: value
        for key, value in indexed(Store(store))["audit/a.jsonl"].items()
        if key in ("lastModified", "localMtime", "posix")
    }


def test_a_lost_lock_stops_the_commit(store, tmp_path):
    load(store, FILES, "v2")
    faulty = FaultyStore(store)

    def steal():
        key = f"data/test/{UUID}/.lock"
        store.delete(key)
        lock_of_another(store, key)

    faulty.faults.append(Fault("put", RAW, action=steal))
    before = store.get("_index/_meta.json").body

    async def main():
        async with machine(faulty, tmp_path / "a", ttl_ms=60) as a:
            faulty.faults.append(Fault("put", ".datastore.lock", action=lambda: time.sleep(0.2)))
            await a.write(RAW, b"two")
            with pytest.raises(LeaseLostError):
                await a.push()
            assert a.sync.journal.op(RAW) is Op.WRITE

    run(main)
    assert store.get("_index/_meta.json").body == before


# --- lost answers and failures ------------------------------------------------------------------------------


@INDEXES
@pytest.mark.parametrize("when", list(When))
@pytest.mark.parametrize("step", range(12))
def test_any_single_lost_answer_ends_in_one_published_version_and_no_conflict(store, tmp_path, index, when, step):
    """Fail the n-th write of a push, before or after it was applied; push again, with a new edit in between."""
    load(store, FILES, index)
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a", ttl_ms=300, patience_s=3.0) as a:
            await a.write(RAW, b"two")
            await a.write("audit/new.jsonl", b"new")
            await a.unlink("files/x")
            writes = [0]

            def strike(operation, key, fn):
                if operation in ("put", "delete"):
                    writes[0] += 1
                    if writes[0] == step + 1:
                        if when is When.AFTER:
                            fn()
                        raise PermanentFailure("cut")
                return fn()

            faulty._run = strike
            with contextlib.suppress(SwampfsError):
                await a.push()
            faulty._run = lambda operation, key, fn: fn()
            await a.write(RAW, b"three")
            for attempt in range(20):
                with contextlib.suppress(LeaseLostError):  # this machine had no processor for as long as a TTL
                    await a.push()
                if attempt >= 2 and len(a.sync.journal) == 0:
                    break
            assert conflicts(a) == set()
            assert len(a.sync.journal) == 0
            await a.pull()
            assert await a.read(RAW) == b"three"

    run(main)
    data = check_bucket(Store(store))
    assert data[RAW] == b"three"
    assert data["audit/new.jsonl"] == b"new"
    assert "files/x" not in data


class PermanentFailure(StoreError):
    """Not retried by the decorator: the push itself fails."""


def test_a_commit_whose_answer_was_lost_and_retried_is_seen_by_others(store, tmp_path):
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    faulty.faults.append(Fault("put", "_index/audit.json", When.AFTER))

    async def main():
        async with machine(faulty, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.write("audit/a.jsonl", b"ours")
            await a.push()
            await b.pull()
            assert await b.read("audit/a.jsonl") == b"ours"

    run(main)


def test_one_file_that_cannot_be_uploaded_keeps_no_other_back_except_its_latest(store, tmp_path):
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    faulty.faults.append(Fault("put", RAW, times=99, error=PermanentFailure("too large")))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.write(RAW, b"two")
            await a.write(LATEST, b"2")
            await a.write("audit/a.jsonl", b"b\n")
            report = await a.push()
            assert isinstance(report.failure, PermanentFailure)
            assert set(a.sync.journal) == {RAW, LATEST}

    run(main)
    data = check_bucket(Store(store))
    assert (data[RAW], data[LATEST], data["audit/a.jsonl"]) == (b"one", b"1", b"b\n")


def test_of_many_small_files_one_that_cannot_be_uploaded_keeps_no_other_back(store, tmp_path):
    """Several go in one thread, one after the other."""
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    faulty.faults.append(Fault("put", "files/77", times=99, error=PermanentFailure("not this one")))
    names = [f"files/{number:02}" for number in range(100)]

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            for name in names:
                await a.write(name, name.encode())
            report = await a.push()
            assert (report.pushed, str(report.failure)) == (99, "not this one")
            assert set(a.sync.journal) == {"files/77"}

    run(main)
    data = check_bucket(Store(store))
    assert {name for name in names if data.get(name) == name.encode()} == {*names} - {"files/77"}


@pytest.mark.parametrize("size", [10, 100_000], ids=["small", "large"])
def test_what_a_store_cannot_find_is_not_taken_for_lost_content(store, tmp_path, size):
    """A directory datastore that is not mounted, for one, has no such directory."""
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    faulty.faults.append(Fault("put", "files/new", times=1, error=FileNotFoundError(2, "no such directory")))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.write("files/new", b"x" * size)
            with pytest.raises(FileNotFoundError):
                await a.push()
            assert set(a.sync.journal) == {"files/new"}
            assert (await a.push()).pushed == 1

    run(main)
    assert check_bucket(Store(store))["files/new"] == b"x" * size


def test_a_store_out_of_reach_is_not_asked_for_each_of_many_small_files(store, tmp_path):
    load(store, FILES, "v2")
    faulty, asked = FaultyStore(store), set()

    def unreachable(key):
        asked.add(key)
        raise CircuitOpenError("no answer")

    names = [f"files/{number:03}" for number in range(200)]
    faulty.faults += [Fault("put", name, times=99, action=lambda name=name: unreachable(name)) for name in names]

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            for name in names:
                await a.write(name, b"kept")
            with pytest.raises(CircuitOpenError):
                await a.push()
            assert 0 < len(asked) <= 32, "one of each row"
            assert set(a.sync.journal) == set(names)
            faulty.faults.clear()
            assert (await a.push()).pushed == 200

    run(main)
    assert set(names) <= set(check_bucket(Store(store)))


def test_who_leaves_during_a_push_of_many_small_files_begins_no_further_upload(store, tmp_path):
    """Its locks may be given back by then."""
    load(store, FILES, "v2")
    faulty, begun, some, gate = FaultyStore(store), [], trio.Event(), threading.Event()

    def take_long():
        begun.append(None)
        trio.from_thread.run_sync(some.set)
        gate.wait(10)

    faulty.faults.append(Fault("put", "files/", times=999, action=take_long))

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            for number in range(200):
                await a.write(f"files/{number:03}", b"kept")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.push)
                await some.wait()
                await a.sync.remote.threads.leave(0.0)
                gate.set()
                nursery.cancel_scope.cancel()
            await trio.sleep(0.2)  # in which all would be sent
            assert 0 < len(begun) <= 32, "one of each thread"

    run(main)


# --- the user goes on meanwhile -----------------------------------------------------------------------------


class Meanwhile:
    """Runs something between the private copy of an upload and its put, once."""

    def __init__(self, node, action):
        self._original = node.sync.journal.note_sent
        self._node = node
        self._action = action
        node.sync.journal.note_sent = self

    def __call__(self, *arguments):
        self._node.sync.journal.note_sent = self._original
        self._original(*arguments)
        self._action()


def overwrite(node, path, body):
    """Write without waiting, to content that is here."""
    fs = node.fs
    current = fs.sync.catalog.at(path)
    fs.files.truncate(current, 0)
    fd = fs.sync.cache.open(path, os.O_WRONLY)
    os.write(fd, body)
    fs.sync.catalog.set_content(current.ino, os.fstat(fd))
    os.close(fd)


@INDEXES
def test_a_file_written_during_its_upload_stays_dirty_and_its_next_push_is_no_conflict(store, tmp_path, index):
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write(RAW, b"two")
            Meanwhile(a, lambda: overwrite(a, RAW, b"three"))
            await a.push()
            assert content(store, RAW) == b"two"
            assert RAW in a.sync.journal
            await a.push()
            assert conflicts(a) == set()

    run(main)
    assert check_bucket(Store(store))[RAW] == b"three"


@INDEXES
def test_half_of_a_change_is_never_published(store, tmp_path, index):
    """A file opened and half rewritten after the push looked whether it was open."""
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write("files/x", b"whole")
            original = a.sync._pusher._upload
            numbers = []

            async def upload(batch, transaction):
                numbers.append(await a.fs.open(a.ino("files/x"), os.O_WRONLY | os.O_TRUNC, 0))
                await a.fs.files.write(numbers[0], 0, b"half")
                await original(batch, transaction)

            a.sync._pusher._upload = upload
            await a.push()
            assert content(store, "files/x") == b"x"
            await a.fs.files.write(numbers[0], 4, b" and the other half")
            a.fs.files.release(numbers[0])
            a.sync._pusher._upload = original
            await a.push()

    run(main)
    assert check_bucket(Store(store))["files/x"] == b"half and the other half"


def test_a_file_created_written_and_removed_around_a_push_does_not_come_back(store, tmp_path):
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write("audit/t.jsonl", b"1")

            def meanwhile():
                overwrite(a, "audit/t.jsonl", b"2")
                a.fs.tree.unlink(a.fs.tree.directory(a.ino("audit")), "t.jsonl")

            Meanwhile(a, meanwhile)
            await a.push()
            await a.push()
            await a.pull()
            assert "audit/t.jsonl" not in a.names()

    run(main)
    assert "audit/t.jsonl" not in check_bucket(Store(store))


@INDEXES
def test_a_writer_whose_file_another_machine_replaced_is_told_and_loses_nothing(store, tmp_path, index):
    """As on NFS: what it read is not the file any more, and a write of it would undo the other's."""
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            number = await a.fs.open(a.ino("audit/a.jsonl"), os.O_RDWR, 0)
            await b.write("audit/a.jsonl", b"from b, longer")
            await b.push()
            await a.pull()
            assert a.fs.files.read(number, 0, 100) == b"a\n"
            with pytest.raises(FileError) as failed:
                await a.fs.files.write(number, 0, b"A")
            assert failed.value.errno == errno.ESTALE
            a.fs.files.release(number)
            assert await a.read("audit/a.jsonl") == b"from b, longer"
            assert (await a.push()).conflicts == () and len(a.sync.journal) == 0

    run(main)


@INDEXES
def test_a_remote_change_under_a_writer_that_wrote_before_is_a_conflict_that_keeps_both(store, tmp_path, index):
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            number = await a.fs.open(a.ino("audit/a.jsonl"), os.O_RDWR, 0)
            await a.fs.files.write(number, 0, b"A")
            await b.write("audit/a.jsonl", b"from b, longer")
            await b.push()
            await a.pull()
            await a.fs.files.write(number, 1, b"A")
            a.fs.files.release(number)
            assert (await a.push()).conflicts == ("audit/a.jsonl",)
            assert conflicts(a) == {b"AA"}
            assert await a.read("audit/a.jsonl") == b"from b, longer"

    run(main)


@INDEXES
def test_a_reader_keeps_its_version_and_the_name_gets_a_new_inode(store, tmp_path, index):
    load(store, FILES, index)

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            ino = a.ino(RAW)
            a.fs.inodes.looked_up(ino)
            number = await a.fs.open(ino, os.O_RDONLY, 0)
            await b.write(RAW, b"two")
            await b.push()
            await a.pull()
            assert a.fs.files.read(number, 0, 10) == b"one"
            assert a.fs.getattr(ino).nlink == 0
            assert a.ino(RAW) != ino
            assert await a.read(RAW) == b"two"
            a.fs.files.release(number)

    run(main)


def test_news_for_a_path_that_was_busy_are_applied_when_it_is_not(store, tmp_path):
    """Local new file, the same name published elsewhere, local removal: the remote one must appear."""
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.write("audit/n.jsonl", b"mine")
            await b.write("audit/n.jsonl", b"theirs")
            await b.push()
            await a.pull()
            assert await a.read("audit/n.jsonl") == b"mine"
            await a.unlink("audit/n.jsonl")
            await a.pull()
            assert await a.read("audit/n.jsonl") == b"theirs"

    run(main)


def test_a_file_becomes_a_directory_and_the_reverse_in_one_remote_commit(store, tmp_path):
    load(store, {**FILES, "files/a/b": b"1", "files/c": b"2"}, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await b.read("files/c")
            await b.unlink("files/a/b")
            await b.rmdir("files/a")
            await b.unlink("files/c")
            await b.write("files/a", b"file now")
            await b.mkdirs("files/c")
            await b.write("files/c/d", b"below")
            await b.push()
            await a.pull()
            assert await a.read("files/a") == b"file now"
            assert await a.read("files/c/d") == b"below"
            assert a.sync.catalog.findings() == []

    run(main)


@pytest.mark.parametrize("plain", [True, False])
def test_a_directory_datastore_and_a_bucket_take_the_same_flips_of_kind(tmp_path, plain):
    from swampfs.backends.filesystem import FilesystemStore

    (tmp_path / "store").mkdir()
    store = FilesystemStore(str(tmp_path / "store")) if plain else MemoryStore()

    async def main():
        async with machine(store, tmp_path / "a", plain=plain) as a:
            await a.mkdirs("files/d")
            await a.write("files/d/x", b"x")
            await a.write("files/f", b"f")
            await a.push()
            await a.unlink("files/d/x")
            await a.rmdir("files/d")
            await a.write("files/d", b"file")
            await a.unlink("files/f")
            await a.mkdirs("files/f")
            await a.write("files/f/x", b"below")
            await a.push()
            assert len(a.sync.journal) == 0
            assert conflicts(a) == set()
        async with machine(store, tmp_path / "b", plain=plain) as b:
            assert b.names() == {"files/d", "files/f/x"}
            assert await b.read("files/d") == b"file"

    run(main)


# --- damage on this machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_clean_content_that_was_lost_or_cut_short_is_fetched_again(store, tmp_path, damage):
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a:
            assert await a.read(RAW) == b"one"
        path = tmp_path / "a/files" / RAW
        path.unlink() if damage == "removed" else path.write_bytes(b"")
        async with machine(store, tmp_path / "a") as a:
            assert await a.read(RAW) == b"one"

    run(main)


@pytest.mark.parametrize("journal", ["whole", "lost"])
def test_a_rebuilt_catalog_never_pushes_an_old_cache_over_newer_remote_content(store, tmp_path, journal):
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.read(RAW)
            await a.read("files/x")
            await b.write(RAW, b"newer")
            await b.unlink("files/x")
            await b.push()
        for path in (tmp_path / "a/state").glob("catalog.db*" if journal == "whole" else "*.db*"):
            path.unlink()
        (tmp_path / "a/state/catalog.db").write_bytes(b"rubbish" * 1000)
        async with machine(store, tmp_path / "a") as a:
            await a.push()
            await a.pull()
            assert await a.read(RAW) == b"newer"
            assert "files/x" not in a.names()

    run(main)
    data = check_bucket(Store(store))
    assert data[RAW] == b"newer"
    assert "files/x" not in data


def test_a_full_disk_at_mount_does_not_cost_the_journal(tmp_path, monkeypatch):
    import sqlite3

    from swampfs.errors import StateError
    from swampfs.state.journal import Journal

    path = str(tmp_path / "journal.db")
    first = Journal(path)
    first.mark_write("audit/a", None, None)  # type: ignore[arg-type]
    first.close()

    class Full:
        def execute(self, sql, *more):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

        def close(self):
            pass

    with monkeypatch.context() as patch:
        patch.setattr("sqlite3.connect", lambda *a, **k: Full())
        with pytest.raises(StateError):
            Journal(path)
    again = Journal(path)
    assert list(again) == ["audit/a"]
    assert not again.lost
    again.close()


def test_a_delete_committed_only_as_far_as_the_shard_is_still_told_to_the_others(store, tmp_path):
    load(store, FILES, "v2")
    faulty = FaultyStore(store)
    faulty.faults.append(Fault("put", "_index/_meta.json", error=PermanentFailure("cut")))

    async def main():
        async with machine(faulty, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.unlink("files/x")
            with pytest.raises(PermanentFailure):
                await a.push()
            await b.pull()
            await a.push()
            await b.pull()
            assert "files/x" not in b.names()
            assert len(a.sync.journal) == 0

    run(main)
    assert "files/x" not in check_bucket(Store(store))
