"""New files go into the store ahead of their push: nobody sees them before it, and what comes between is not lost."""

from __future__ import annotations

import time
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from swampfs.errors import StoreUnreachableError
from swampfs.fs.writeback import Writeback
from swampfs.names import RelPath
from swampfs.records import Change
from swampfs.testing.fault_proxy import Fault as NetworkFault
from swampfs.testing.fault_proxy import FaultProxy
from swampfs.testing.faults import Fault, FaultyStore, When
from swampfs.testing.memory import MemoryStore
from tests.datastores import check_bucket, indexed, load_shards
from tests.engine import Store, load, machine
from tests.harness import wait_for

UUID = "7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
MODEL = f"data/test/{UUID}/state"
RAW, NEW, LATEST = f"{MODEL}/1/raw", f"{MODEL}/2/raw", f"{MODEL}/latest"
FILES = {RAW: b"one", LATEST: b"1", "files/x": b"x"}
INDEXES = pytest.mark.parametrize("index", ["v1", "v2"])


class Counting(FaultyStore):
    """Remembers what was put."""

    def __init__(self, inner):
        super().__init__(inner)
        self.puts = []

    def put(self, key, body, *when):
        self.puts.append(key)
        return super().put(key, body, *when)


@pytest.fixture
def store():
    return Counting(MemoryStore())


async def ahead(node):
    """As the writeback task does it, under the locks of who wrote."""
    await node.sync.leases.guard(0, *node.sync.journal)
    await node.sync.upload_ahead(list(node.sync.journal), until=lambda: False)


async def push(node):
    report = await node.push()
    assert report.failure is None and len(node.sync.journal) == 0
    await node.sync.leases.give_back_idle()
    return report


def sent(store):
    """Data objects that were put since the last question."""
    puts, store.puts = [key for key in store.puts if key.startswith("data/") and not key.endswith(".lock")], []
    return puts


def run(store, home, index, work):
    load(store, FILES, index)
    store.puts.clear()

    async def main():
        async with machine(store, home) as a:
            await a.mkdirs(f"{MODEL}/2")
            await a.write(NEW, b"two")
            await ahead(a)
            assert sent(store) == [NEW]
            assert NEW not in indexed(Store(store)), "nobody sees it"
            await work(a)
        check_bucket(Store(store))

    trio.run(main)


@INDEXES
def test_a_push_finds_what_went_ahead(store, tmp_path, index):
    async def work(a):
        await ahead(a)
        assert sent(store) == [], "once is enough"
        report = await push(a)
        assert report.pushed == 1 and sent(store) == []
        assert indexed(Store(store))[NEW]["size"] == 3
        assert await a.read(NEW) == b"two"

    run(store, tmp_path, index, work)


@INDEXES
def test_what_is_written_after_it_went_ahead_is_what_is_published(store, tmp_path, index):
    async def work(a):
        await a.write(NEW, b"three")
        await push(a)
        assert sent(store) == [NEW] and check_bucket(Store(store))[NEW] == b"three"

    run(store, tmp_path, index, work)


def test_a_mode_that_is_set_after_it_went_ahead_is_published(store, tmp_path):
    async def work(a):
        await a.fs.setattr(a.ino(NEW), Change(mode=0o755), pid=0)
        await push(a)
        assert indexed(Store(store))[NEW]["posix"]["mode"] == 0o755

    run(store, tmp_path, "v2", work)


def test_what_is_removed_after_it_went_ahead_leaves_no_object(store, tmp_path):
    async def work(a):
        await a.unlink(NEW)
        await push(a)
        assert NEW not in check_bucket(Store(store))

    run(store, tmp_path, "v2", work)


def test_what_is_renamed_after_it_went_ahead_leaves_no_object_under_its_old_name(store, tmp_path):
    async def work(a):
        await a.rename(NEW, f"{MODEL}/2/other")
        await push(a)
        found = check_bucket(Store(store))
        assert found[f"{MODEL}/2/other"] == b"two" and NEW not in found

    run(store, tmp_path, "v2", work)


def test_after_a_crash_the_next_push_publishes_what_went_ahead(store, tmp_path):
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path) as a:
            await a.mkdirs(f"{MODEL}/2")
            await a.write(NEW, b"two")
            await ahead(a)
        async with machine(store, tmp_path) as a:
            await push(a)
        assert check_bucket(Store(store))[NEW] == b"two"

    trio.run(main)


def test_what_somebody_stored_after_we_had_lost_the_lock_is_not_taken_for_ours(store, tmp_path):
    async def work(a):
        a.sync.leases._drop(f"{MODEL.rpartition('/')[0]}/.lock")  # its TTL passed while nothing was answered
        store.delete(f"{MODEL.rpartition('/')[0]}/.lock")
        store.delete(NEW)  # somebody published one, and removed it
        sent(store)
        await push(a)
        assert sent(store) == [NEW]

    run(store, tmp_path, "v2", work)


@pytest.mark.parametrize("path", [RAW, LATEST, "files/new"])
def test_what_others_could_see_or_change_does_not_go_ahead(store, tmp_path, path):
    """Content that the index names; the marker of a version; a file that no model's lock covers."""
    load(store, FILES, "v2")
    store.puts.clear()

    async def main():
        async with machine(store, tmp_path) as a:
            await a.write(path, b"7")
            await ahead(a)
            assert sent(store) == [] and path not in store.puts
            await push(a)
        check_bucket(Store(store))

    trio.run(main)


def test_an_object_that_is_there_already_is_not_overwritten_ahead(store, tmp_path):
    load(store, FILES, "v2")
    store.put(NEW, b"left by a push that did not get to its end")
    store.puts.clear()

    async def main():
        async with machine(store, tmp_path) as a:
            await a.mkdirs(f"{MODEL}/2")
            await a.write(NEW, b"two")
            await ahead(a)
            assert Store(store).get(NEW).startswith(b"left")
            await push(a)
        assert check_bucket(Store(store))[NEW] == b"two"

    trio.run(main)


@pytest.mark.parametrize("when", list(When))
def test_an_upload_ahead_that_fails_is_no_error_and_the_push_makes_up_for_it(store, tmp_path, when):
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path) as a:
            await a.mkdirs(f"{MODEL}/2")
            await a.write(NEW, b"two")
            store.faults = [Fault("put", NEW, when, times=9, error=StoreUnreachableError("no answer"))]
            await ahead(a)
            store.faults = []
            await push(a)
        assert check_bucket(Store(store))[NEW] == b"two"

    trio.run(main)


@pytest.mark.parametrize("plain", [True, False], ids=["a directory", "a bucket without index"])
def test_nothing_goes_ahead_where_objects_are_their_own_index(store, tmp_path, plain):
    load(store, FILES, "plain")
    store.puts.clear()

    async def main():
        async with machine(store, tmp_path, plain=plain) as a:
            await a.mkdirs(f"{MODEL}/2")
            await a.write(NEW, b"two")
            await ahead(a)
            assert sent(store) == []

    trio.run(main)


def test_an_upload_ahead_that_takes_longer_than_the_delay_is_finished_by_the_push(server, bucket, fleet):
    load_shards(bucket, [(RAW, b"one"), (LATEST, b"1")])
    proxy = FaultProxy(server.endpoint)
    try:
        env = {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}
        machine = fleet.machine("a", env, options=("--push-delay", "1s"))
        machine.mount(bucket.url)
        version = machine.path / MODEL / "2"
        version.mkdir()
        proxy.matches = lambda method, target: method == "PUT" and "/part-" in target
        proxy.set(NetworkFault.LATE)
        for number in range(200):
            (version / f"part-{number}").write_text(f"content {number}")
        wait_for(lambda: machine.status()["pending"] == [], "they are published")
        puts = [request for request in machine.requests() if request["op"] == "put" and "/part-" in request["key"]]
        done = [request["key"] for request in puts if request["outcome"] == "ok"]  # a connection may have been reset
        assert len(done) == len(set(done)) == 200
        machine.umount()
    finally:
        proxy.close()
    assert len(check_bucket(bucket)) == 202


def test_a_mount_uploads_new_files_while_their_push_waits_for_quiet(bucket, fleet):
    load_shards(bucket, [(RAW, b"one"), (LATEST, b"1")])
    machine = fleet.machine("a", bucket.env, options=("--push-delay", "6s"))
    machine.mount(bucket.url)
    version = machine.path / MODEL / "2"
    version.mkdir()
    for number in range(200):
        (version / f"part-{number}").write_text(f"content {number}")
    machine.clear_requests()
    wait_for(lambda: len([key for key in bucket.keys() if "/part-" in key]) == 200, "all objects are there")
    assert not [path for path in indexed(bucket) if "/part-" in path], "and nobody is told"
    machine.clear_requests()
    wait_for(lambda: machine.status()["pending"] == [], "they are published")
    assert [request for request in machine.requests() if "/part-" in request["key"]] == []
    machine.umount()
    assert len(check_bucket(bucket)) == 202


def test_no_upload_ahead_begins_once_somebody_waits_for_a_push(store, tmp_path):
    load(store, FILES, "v2")
    store.puts.clear()

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.mkdirs(f"{MODEL}/2")
            for number in range(100):
                await a.write(f"{MODEL}/2/{number}", b"new")
            await a.sync.leases.guard(0, *a.sync.journal)
            looks = iter(range(1000))
            assert not await a.sync.upload_ahead(list(a.sync.journal), until=lambda: next(looks) >= 2)
            done = len(sent(store))
            assert 0 < done <= 16, "it is asked before each few of them"
            await push(a)
            assert len(sent(store)) == 100 - done, "those that went ahead are not uploaded twice"

    trio.run(main)


# --- when it is done ------------------------------------------------------------------------------------------


class Sync:
    """What the writeback task asks of one; remembers what was offered."""

    def __init__(self, groups, files):
        self.looks, self.offered, self.during, self.are_ahead = 0, [], lambda: True, lambda paths: False
        names = [f"data/t/{UUID[:-4]}{group:04}/o/1/{file}" for group in range(groups) for file in range(files)]
        self.journal = Journal(self, names)

    async def upload_ahead(self, paths, *, until):
        assert not until(), "nobody waits for a push yet"
        self.offered += paths
        await trio.lowlevel.checkpoint()
        return self.during()


class Journal(list):
    def __init__(self, sync, names):
        super().__init__(names)
        self.sync = sync

    def __iter__(self):
        self.sync.looks += 1
        return super().__iter__()


async def quiet(sync, delay_s, touched=()):
    """Let what waits become quiet, and go ahead of its push; returns when that is due."""
    writeback = Writeback(sync, delay_s)
    sync.during_touch = writeback.touch
    for path in touched or list(sync.journal):
        writeback.touch(RelPath(path))
    sync.looks = 0
    with trio.fail_after(20):
        await writeback._sleep_until_due()


def test_the_journal_is_looked_over_a_few_times_for_all_that_became_quiet_together():
    sync = Sync(groups=300, files=10)
    trio.run(quiet, sync, 1.0)
    assert sync.looks <= 30, "for each it would be 300 times"
    assert sorted(sync.offered) == sorted(sync.journal)


def test_who_writes_elsewhere_does_not_make_it_start_again():
    sync = Sync(groups=2, files=500)
    mine, other = [path for path in sync.journal if "0000/o" in path], sync.journal[-1]

    def touch():
        sync.during_touch(RelPath(other))
        return True

    sync.during = touch
    trio.run(quiet, sync, 1.0, mine)
    assert sorted(path for path in sync.offered if path in mine) == sorted(mine), "each of them once"


def test_a_burst_does_not_wake_the_task_for_each_of_its_changes(monkeypatch):
    monkeypatch.setattr("swampfs.fs.writeback.time", SimpleNamespace(monotonic=trio.current_time))
    sync = Sync(groups=2, files=500)
    writeback = Writeback(sync, 2.0)
    woken, quiet = [], writeback._quiet
    monkeypatch.setattr(writeback, "_quiet", lambda now: (woken.append(now), quiet(now))[1])

    async def main():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writeback._sleep_until_due)
            await trio.testing.wait_all_tasks_blocked()
            began = trio.current_time()
            for path in sync.journal:
                writeback.touch(RelPath(path))
                await trio.sleep(0.001)
            assert 2 < len(woken) <= 10, "now and then it looks"
        return trio.current_time() - began

    took_s = trio.run(main, clock=MockClock(autojump_threshold=0))
    assert sorted(sync.offered) == sorted(sync.journal)
    assert took_s == pytest.approx(0.5 + 2.0, abs=0.1), "the first group is due two seconds after its last change"


def test_what_goes_ahead_makes_way_for_a_push_that_is_due():
    sync = Sync(groups=1, files=4000)

    def take_long():
        time.sleep(0.05)
        return True

    sync.during = take_long
    trio.run(quiet, sync, 0.6)
    assert 0 < len(sync.offered) < 4000


@pytest.mark.parametrize("is_all", [True, False])
def test_a_push_that_has_nothing_to_upload_does_not_wait_for_all_of_its_delay(is_all, monkeypatch):
    monkeypatch.setattr("swampfs.fs.writeback.time", SimpleNamespace(monotonic=trio.current_time))
    sync = Sync(groups=1, files=200)
    sync.are_ahead = lambda paths: sorted(paths) == sorted(sync.journal) and is_all

    async def main():
        began = trio.current_time()
        await quiet(sync, 8.0)
        return trio.current_time() - began

    assert trio.run(main, clock=MockClock(autojump_threshold=0)) == pytest.approx(7.0 if is_all else 8.0, abs=0.1)


def test_what_fails_ahead_is_not_tried_until_the_push():
    sync = Sync(groups=1, files=500)
    sync.during = lambda: False
    trio.run(quiet, sync, 0.6)
    assert 0 < len(sync.offered) < 500
