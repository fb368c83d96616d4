"""Lost answers and kills at awkward moments, found by a fuzzer: no conflict with ourselves, nothing comes back."""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import trio

from swampfs.backends.filesystem import FilesystemStore
from swampfs.errors import StoreError
from swampfs.sync.replay import replay
from swampfs.testing.faults import Fault, FaultyStore, When
from swampfs.testing.memory import MemoryStore
from tests.datastores import check_bucket
from tests.engine import CALLER, Store, load, machine

FILES = {"audit/a": b"a", "files/a": b"1", "files/b": b"2"}


class Cut(StoreError):
    """No answer, and no retry."""


def run(fn):
    trio.run(fn)


@pytest.fixture(params=["v1", "v2"])
def store(request):
    filled = MemoryStore()
    load(filled, FILES, request.param)
    return filled


def no_conflict(node):
    assert node.sync.cache.conflicts() == []
    assert len(node.sync.journal) == 0


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "store").mkdir()
    return FilesystemStore(str(tmp_path / "store"))


def test_a_restart_after_a_file_became_a_directory(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.unlink("files/a")
            await a.mkdirs("files/a")
            await a.write("files/a/x", b"below")
        async with machine(store, tmp_path / "a") as a:
            assert await a.read("files/a/x") == b"below"
            await a.push()
            no_conflict(a)

    run(main)
    assert "files/a/x" in check_bucket(Store(store))


@pytest.mark.parametrize("restart", [False, True])
def test_a_new_file_whose_commit_was_not_answered_can_be_removed_for_good(store, tmp_path, restart):
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            key = "_index/_meta.json" if "_index/_meta.json" in store.objects else ".datastore-index.json"
            faulty.faults.append(Fault("put", key, When.AFTER, error=Cut("cut")))
            await a.write("files/new", b"new")
            with pytest.raises(Cut):
                await a.push()
            if not restart:
                await a.unlink("files/new")
                await a.push()
                await a.pull()
                assert "files/new" not in a.names()
        async with machine(store, tmp_path / "a") as a:
            if restart:
                await a.unlink("files/new")
            await a.push()
            await a.pull()
            assert "files/new" not in a.names()
            no_conflict(a)

    run(main)
    assert "files/new" not in check_bucket(Store(store))


@pytest.mark.parametrize("then", ["write", "unlink"])
def test_a_kill_between_the_catalog_and_the_journal_of_a_finished_push(store, tmp_path, then):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write("files/new", b"one")

            def die(done):
                raise Cut("killed here")

            a.sync.journal.retire = die
            with pytest.raises(Cut):
                await a.push()
        async with machine(store, tmp_path / "a") as a:
            if then == "write":
                await a.write("files/new", b"two, longer")
            else:
                await a.unlink("files/new")
            await a.push()
            await a.pull()
            no_conflict(a)
            assert ("files/new" in a.names()) == (then == "write")

    run(main)
    assert check_bucket(Store(store)).get("files/new") == (b"two, longer" if then == "write" else None)


def test_two_pushes_of_one_file_that_failed_in_different_ways(store, tmp_path):
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            key = "_index/audit" if "_index/_meta.json" in store.objects else ".datastore-index"
            for body, when in ((b"one", When.AFTER), (b"twoo", When.BEFORE)):
                faulty.faults.append(Fault("put", key, when, error=Cut("cut")))
                await a.write("audit/a", body)
                with contextlib.suppress(StoreError):
                    await a.push()
            await a.push()
            await a.push()
            no_conflict(a)
        async with machine(store, tmp_path / "b") as b:
            assert await b.read("audit/a") == b"twoo"

    run(main)


def test_a_parked_file_deleted_elsewhere_does_not_stay_as_a_ghost(tmp_path):
    store = MemoryStore()
    load(store, FILES, "v2")

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.mkdirs("outputs")
            await a.write("outputs/p", b"parked")
            await a.push()
            await b.pull()
            await b.unlink("outputs/p")
            await b.push()
            await a.write("r", b"another in _root")
            await a.push()
            await a.pull()
            assert "outputs/p" not in a.names()

    run(main)
    assert "outputs/p" not in check_bucket(Store(store))


def test_a_remote_delete_of_a_file_that_was_written_and_is_still_open_waits_for_its_push(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            number = await a.fs.open(a.ino("files/a"), os.O_RDWR, 0)
            await b.unlink("files/a")
            await b.push()
            await a.fs.files.write(number, 0, b"!")
            await a.pull()
            assert "files/a" in a.names()
            a.fs.files.release(number)
            await a.push()
            await a.pull()
            assert await a.read("files/a") == b"!"  # removed there, rewritten here: content wins over absence

    run(main)


def test_a_directory_datastore_whose_put_was_not_answered_has_no_conflict_with_itself(plain, tmp_path):
    faulty = FaultyStore(plain)
    faulty.faults.append(Fault("put", "files/q", When.AFTER, error=Cut("cut")))

    async def main():
        async with machine(faulty, tmp_path / "a", plain=True) as a:
            await a.mkdirs("files")
            await a.write("files/q", b"one")
            with pytest.raises(Cut):
                await a.push()
            await a.write("files/q", b"second")
            await a.push()
            no_conflict(a)
            assert await a.read("files/q") == b"second"

    run(main)
    assert plain.get("files/q").body == b"second"


def test_a_file_hidden_by_a_local_directory_appears_when_that_goes(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.mkdirs("files/d")
            await b.write("files/d", b"a file there")
            await b.push()
            await a.pull()
            assert [finding.kind for finding in a.sync.catalog.findings()] == ["index-clash"]
            await a.rmdir("files/d")
            await a.pull()
            assert await a.read("files/d") == b"a file there"

    run(main)


def test_machines_agree_about_a_name_that_is_both_a_file_and_a_directory(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await a.mkdirs("files/d")
            await a.write("files/d/x", b"in the directory")
            await b.write("files/d", b"the file")
            await b.push()
            await a.push()
            for node in (a, b, a, b):
                await node.pull()
            assert a.names() == b.names() == {*FILES, "files/d/x"}
            await a.unlink("files/d/x")
            await a.rmdir("files/d")
            await a.push()
            for node in (a, b, a, b):
                await node.pull()
            assert a.names() == b.names() == {*FILES, "files/d"}
            assert await a.read("files/d") == b"the file"

    run(main)


def test_an_acknowledged_removal_is_not_undone_by_a_kill_during_the_creation_that_follows(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.unlink("files/a")

            def die(rel):
                raise Cut("killed here")

            a.sync.cache.create = die
            with pytest.raises(Cut):
                await a.write("files/a", b"again")
        async with machine(store, tmp_path / "a") as a:
            assert "files/a" not in a.names()
            await a.push()

    run(main)
    assert "files/a" not in check_bucket(Store(store))


def test_a_rename_whose_target_directory_vanished_during_its_hydration_is_refused_whole(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.mkdirs("files/into")
            original = a.sync.hydrate_file

            async def hydrate(path):
                await original(path)
                await a.rmdir("files/into")

            a.sync.hydrate_file = hydrate
            with pytest.raises(Exception, match=r"ESTALE|ENOENT"):
                await a.rename("audit/a", "files/into/a")
            a.sync.hydrate_file = original
            assert await a.read("audit/a") == b"a"
            assert a.sync.journal.intents() == []

    run(main)


def test_the_locks_of_a_killed_mount_are_given_back_by_the_next_but_never_those_of_others(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write("files/a", b"changed")

            async def die(batch, transaction):
                store.objects.setdefault("kept", store.objects[".datastore.lock"])
                raise KeyboardInterrupt

            a.sync._pusher._upload = die
            with contextlib.suppress(BaseException):
                await a.push()
            # A kill releases nothing: put the lock back as it was, and its note.
            lock = store.objects.pop("kept")
            store.objects[".datastore.lock"] = lock
            a.sync.catalog.note_lock(".datastore.lock", json.loads(lock[0])["nonce"])
            a.sync.catalog.note_lock("data/t/m/.lock", "a nonce that is not theirs")
            store.objects["data/t/m/.lock"] = lock
        async with machine(store, tmp_path / "a") as a:
            assert ".datastore.lock" not in store.objects
            assert store.objects.pop("data/t/m/.lock") == lock
            assert a.sync.catalog.noted_locks() == {}
            await a.push()
            no_conflict(a)

    run(main)
    assert check_bucket(Store(store))["files/a"] == b"changed"


@pytest.mark.parametrize("died_at", ["_index/_meta.json", "_index/workflow-runs--w.json"])
def test_a_shard_that_a_dead_commit_left_unlisted_is_swept_by_the_next(tmp_path, died_at):
    """Killed between shard and meta, or between meta and the removal of an emptied shard."""
    store = MemoryStore()
    load(store, FILES, "v2")
    rel = "workflow-runs/w/workflow-run-r.yaml"
    faulty = FaultyStore(store)

    async def main():
        async with machine(faulty, tmp_path / "a") as a:
            await a.mkdirs("workflow-runs/w")
            await a.write(rel, b"id: r\n")
            if died_at == "_index/_meta.json":
                faulty.faults.append(Fault("put", died_at, error=Cut("cut")))
                with pytest.raises(Cut):
                    await a.push()
                await a.unlink(rel)
            else:
                await a.push()
                await a.unlink(rel)
                faulty.faults.append(Fault("delete", died_at, error=KeyboardInterrupt()))
                with contextlib.suppress(BaseException):
                    await a.push()
        async with machine(store, tmp_path / "a") as a:
            await a.push()
            no_conflict(a)

    run(main)
    check_bucket(Store(store))


def test_scratch_files_survive_a_lost_catalog(store, tmp_path):
    """They are in no journal and in no index, so nothing but the file says that they exist."""
    name = "files/.0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp"

    async def main():
        async with machine(store, tmp_path / "a") as a:
            await a.write(name, b"not yet renamed")
        for path in (tmp_path / "a/state").glob("catalog.db*"):
            path.unlink()
        (tmp_path / "a/state/catalog.db").write_bytes(b"rubbish" * 1000)
        async with machine(store, tmp_path / "a") as a:
            assert await a.read(name) == b"not yet renamed"
            await a.rename(name, "files/final")
            await a.push()

    run(main)
    assert check_bucket(Store(store))["files/final"] == b"not yet renamed"


def test_an_entry_without_hash_whose_object_is_gone_does_not_block_a_push(tmp_path):
    store = MemoryStore()
    load(store, FILES, "none")

    async def main():
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await b.write("files/b", b"b")
            await b.push()  # the index is born, with hash-less entries for what was found
            await a.mkdirs("files")
            await a.unlink("files/a")
            await a.write("files/a", b"mine")
            shard = json.loads(store.get(".datastore-index.json").body)
            shard["entries"]["files/a"] = {"key": "files/a", "size": 4, "lastModified": "2026-08-03T09:14:22.401Z"}
            store.put(".datastore-index.json", json.dumps(shard).encode())
            store.delete("files/a")
            await a.write("audit/a", b"goes on")
            await a.push()
            assert store.get("audit/a").body == b"goes on"
            kept = [path.read_bytes() for path in (tmp_path / "a/state/conflicts").glob("*/content")]
            assert kept == [b"mine"]

    run(main)


def test_a_symbolic_link_whose_mark_a_power_cut_took_is_published_as_the_catalog_has_it(store, tmp_path):
    async def main():
        async with machine(store, tmp_path / "a") as a:
            parent, name = a.parent("files/link")
            await a.fs.symlink(parent, name, "to/there", CALLER)
            a.sync.journal.forget("files/link")
            os.truncate(tmp_path / "a/files/files/link", 0)
            replay(a.sync.catalog, a.sync.cache, a.sync.journal, a.sync.sidecar, machine_died=True)
            await a.push()

    run(main)
    assert check_bucket(Store(store))["files/link"] == b"to/there"
