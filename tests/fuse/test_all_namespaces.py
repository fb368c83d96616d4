"""One mount of a whole datastore: the bound namespace to write, the others to read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import time

import pytest
import trio

from swampfs.errors import AccessDeniedError
from swampfs.names import Keyspace
from swampfs.sync.namespaces import Namespaces
from swampfs.sync.remote import Remote
from swampfs.testing.faults import Fault, FaultyStore
from swampfs.testing.memory import MemoryStore
from swampfs.threads import Threads
from tests.datastores import load_monolith, load_shards
from tests.fuse.test_locks import LOCK, MODEL
from tests.fuse.test_namespaces import make_repo
from tests.fuse.test_query import version
from tests.harness import tree, wait_for

RAW = f"{MODEL}/n/1/raw"


@pytest.fixture
def datastore(bucket):
    """Three namespaces: infra (shards), security (one index), empty."""
    load_shards(bucket.below("infra"), [(RAW, b"of infra"), ("files/a", b"a")])
    load_monolith(bucket.below("security"), [(RAW, b"of security"), ("audit/x.jsonl", b"x\n")])
    for name in ("infra", "security", "empty"):
        bucket.put(f"{name}/.namespace.json", b"{}")
    bucket.put("no-namespace/thing", b"")
    return bucket


@pytest.fixture
def everything(datastore, fleet):
    machine = fleet.machine("all", datastore.env)
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra")
    return machine


def found(machine, *arguments):
    told = json.loads(machine.run("query", "--mount", str(machine.path), "--json", *arguments).stdout)
    return sorted((one["namespace"], one["modelName"], one["version"]) for one in told["results"])


def test_artifacts_of_other_namespaces_are_known_by_what_they_export(datastore, fleet):
    row = {"namespace": "security", "type_normalized": "acme/probe", "model_id": "m", "data_name": "n", "id": "u",
           "version": 3, "is_latest": 1, "model_name": "theirs", "tags": "{}", "created_at": "2026-01-01T00:00:00.000Z",
           "size": 2, "streaming": 0, "content_type": "application/json"}  # fmt: skip
    datastore.put("security/.catalog-export.json", json.dumps([row, 7, {}]).encode())
    datastore.put("empty/.catalog-export.json", b"nonsense")
    load_shards(datastore.below("infra"), version(1, "ours", 1, b"{}"))
    load_monolith(datastore.below("security"), [("data/acme/probe/m/n/3/raw", b"{}")])
    both, one = fleet.machine("both", datastore.env), fleet.machine("one", datastore.env)
    both.mount(datastore.url, "--all-namespaces", "--namespace", "infra")
    one.mount(datastore.url, "--namespace", "infra")
    everything = [("infra", "probe-1", 1), ("security", "theirs", 3)]
    assert found(both) == found(one) == everything
    assert found(one, 'ns == "security"') == everything[1:]
    path = both.run("latest", "--mount", str(both.path), "security:theirs", "n").stdout.strip()
    assert path == f"{both.path}/security/data/acme/probe/m/n/3/raw"
    done = one.run("latest", "--mount", str(one.path), "security:theirs", "n", check=False)
    assert (done.returncode, "--all-namespaces" in done.stderr) == (1, True)
    assert (both.path / ".swampfs/latest/theirs/n").read_bytes() == b"{}"
    assert os.readlink(both.path / ".swampfs/by-model/probe-1/ours").startswith("../../../infra/data/")
    assert sorted(os.listdir(both.path / ".swampfs/by-model")) == ["probe-1", "theirs"]
    assert os.listdir(one.path / ".swampfs/by-model") == ["probe-1"], "what it does not show it has no links to"


@contextlib.contextmanager
def refused(*numbers):
    with pytest.raises(OSError) as caught:
        yield
    assert caught.value.errno in numbers


def test_the_bound_namespace_is_written_and_the_others_are_read(everything, datastore):
    assert sorted(os.listdir(everything.path)) == ["empty", "infra", "security"]
    assert (everything.path / "security" / RAW).read_bytes() == b"of security"
    assert (everything.path / "infra" / RAW).read_bytes() == b"of infra"
    assert os.listdir(everything.path / "empty") == []
    (everything.path / "infra" / RAW).write_bytes(b"changed")
    everything.flush(everything.path / "infra" / RAW)
    assert datastore.get(f"infra/{RAW}") == b"changed"
    everything.flush(everything.path / "security")  # nothing to do, and no error
    assert everything.status()["dirty"] == 0


def test_times_that_others_set_are_seen_with_the_writeback_cache(datastore, fleet):
    machine = fleet.machine("all", datastore.env, options=("--refresh", "300ms", "--writeback-cache", "on"))
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra")
    there = fleet.machine("there", datastore.env)
    there.mount(datastore.url, "--namespace", "security")
    foreign = machine.path / "security/audit/x.jsonl"
    assert foreign.read_bytes() == b"x\n"
    for moment in (1_500_000_000_000_000_000, 1_600_000_000_000_000_000):
        os.utime(there.path / "audit/x.jsonl", ns=(moment, moment))
        there.flush()
        wait_for(lambda wanted=moment: foreign.stat().st_mtime_ns == wanted, "it is seen")


def test_nothing_foreign_can_be_changed(everything, datastore):
    before = {key: datastore.get(key) for key in datastore.keys()}
    there = everything.path / "security"
    with refused(errno.EROFS):
        (there / RAW).write_bytes(b"no")
    with refused(errno.EROFS):
        (there / "files").mkdir()
    with refused(errno.EROFS):
        (there / RAW).unlink()
    with refused(errno.EROFS):
        os.truncate(there / RAW, 0)
    with refused(errno.EROFS):
        os.rename(there / RAW, there / f"{RAW}2")
    with refused(errno.EROFS):
        os.open(there / LOCK, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    with refused(errno.EXDEV):
        os.rename(there / RAW, everything.path / "infra" / RAW)
    with refused(errno.EXDEV):
        os.rename(everything.path / "infra" / RAW, there / RAW)
    for name in ("new", ".datastore.lock"):
        with refused(errno.EROFS):
            (everything.path / name).write_bytes(b"no")
    with refused(errno.EROFS):
        (everything.path / "infra").rmdir()
    everything.flush()
    assert {key: datastore.get(key) for key in datastore.keys()} == before


def test_what_others_do_in_their_namespace_appears(everything, datastore, fleet):
    other = fleet.machine("other", datastore.env)
    other.mount(datastore.url, "--namespace", "security")
    there = everything.path / "security"
    with open(there / RAW, "rb") as held:
        (other.path / RAW).write_bytes(b"newer")
        (other.path / "files").mkdir()
        (other.path / "files/b").write_bytes(b"b")
        (other.path / "audit/x.jsonl").unlink()
        other.flush()
        wait_for(lambda: (there / RAW).read_bytes() == b"newer", "the new content is seen")
        assert held.read() == b"of security", "an open file keeps its version"
    assert (there / "files/b").read_bytes() == b"b"
    assert not (there / "audit/x.jsonl").exists()
    assert tree(there) == tree(other.path)


def test_a_namespace_that_is_registered_later_appears(everything, datastore):
    assert not (everything.path / "late").exists()
    load_monolith(datastore.below("late"), [("files/z", b"z")])
    datastore.put("late/.namespace.json", b"{}")
    wait_for(lambda: (everything.path / "late/files/z").exists(), "the namespace is found")
    assert "late" in os.listdir(everything.path)


def test_a_namespace_costs_nothing_until_somebody_looks_into_it(everything):
    os.scandir(everything.path).close()
    [entry.stat() for entry in os.scandir(everything.path)]
    asked = [request["key"] for request in everything.requests()]
    assert not [key for key in asked if "security/" in key and not key.endswith(".namespace.json")]
    assert [one["followed"] for one in everything.status()["namespaces"]] == [False, False]
    os.listdir(everything.path / "security")
    assert [one["followed"] for one in everything.status()["namespaces"]] == [False, True]
    everything.clear_requests()
    assert (everything.path / "security" / RAW).read_bytes() == b"of security"
    assert [request["key"] for request in everything.requests() if request["op"] == "download"]
    everything.clear_requests()
    assert (everything.path / "security" / RAW).read_bytes() == b"of security"
    assert not [request for request in everything.requests() if request["op"] == "download"]


def test_a_namespace_that_is_removed_disappears(everything, datastore):
    there = everything.path / "security"
    assert (there / RAW).read_bytes() == b"of security"
    with open(there / RAW, "rb") as held:
        for key in datastore.below("security").keys():
            datastore.delete(f"security/{key}")
        wait_for(lambda: not there.exists(), "its name is gone")
        assert held.read() == b"of security"
    assert sorted(os.listdir(everything.path)) == ["empty", "infra"]
    datastore.put("security/.namespace.json", b"{}")
    wait_for(lambda: there.exists() and os.listdir(there) == [], "it is there again, with what it holds now")


def test_a_namespace_that_may_not_be_read_hides_no_other():
    store = FaultyStore(MemoryStore())
    for name in ("open", "shut"):
        store.put(f"{name}/.namespace.json", b'{"namespace": "x", "repoId": "r"}')
    store.faults += [Fault(call, "shut/", times=99, error=AccessDeniedError("403")) for call in ("get", "head")]
    namespaces = Namespaces(Remote(store, Threads()), Keyspace(), newline=False)
    assert trio.run(namespaces.list) == ["open", "shut"]
    assert [one.repo_id for one in trio.run(namespaces.manifests)] == ["r", ""]


def test_a_silent_store_holds_up_no_look_at_the_root_for_long(datastore, fleet, network):
    way = network()
    machine = fleet.machine("all", {**datastore.env, "AWS_ENDPOINT_URL_S3": way.url})
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra", "--timeout", "5s")
    assert sorted(os.listdir(machine.path)) == ["empty", "infra", "security"]
    way.silent = True
    time.sleep(0.4)  # so that what is known is old
    began = time.monotonic()
    for _ in range(5):
        assert sorted(os.listdir(machine.path)) == ["empty", "infra", "security"]
        assert not (machine.path / "nothing").exists()
        assert not (machine.path / ".git").exists()
    assert time.monotonic() - began < 4, "one short wait for all of them"
    way.cut()
    way.mend()


def test_the_root_answers_as_a_directory_does(everything):
    fd = os.open(everything.path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    with refused(errno.ENAMETOOLONG):
        os.stat(everything.path / ("x" * 256))
    with refused(errno.ENOENT):
        os.stat(everything.path / "Not a name")
    assert not (everything.path / "infra/.swampfs").exists(), "it has one place"
    assert json.loads((everything.path / ".swampfs/status.json").read_text())["namespace"] == "infra"


def test_a_conflict_is_resolved_where_the_mount_shows_it(datastore, fleet):
    machine = fleet.machine("all", datastore.env, options=("--refresh", "60s", "--push-delay", "60s"))
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra")
    (machine.path / "infra/files/a").write_bytes(b"ours")
    load_shards(datastore.below("infra"), [(RAW, b"of infra"), ("files/a", b"theirs")], seq=2)  # heeds no lock
    machine.flush()
    assert (machine.path / "infra/files/a").read_bytes() == b"theirs"
    (one,) = json.loads(machine.run("conflicts", "list", "--json", str(machine.path)).stdout)["conflicts"]
    assert one["path"] == "infra/files/a"
    machine.run("conflicts", "resolve", one["id"], "--keep", "ours")
    machine.flush()
    assert datastore.get("infra/files/a") == b"ours"


def test_out_of_reach_what_was_seen_stays(datastore, fleet, network):
    way = network()
    machine = fleet.machine("all", {**datastore.env, "AWS_ENDPOINT_URL_S3": way.url})
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra")
    assert (machine.path / "security" / RAW).read_bytes() == b"of security"
    seen = {str(path): os.stat(machine.path / path).st_ino for path in ("infra", "security", f"security/{RAW}")}
    machine.umount()
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra")
    assert {path: os.stat(machine.path / path).st_ino for path in seen} == seen, "inodes survive a remount"
    machine.umount()
    way.cut()
    machine.mount(datastore.url, "--all-namespaces", "--namespace", "infra", "--timeout", "5s")
    assert sorted(os.listdir(machine.path)) == ["empty", "infra", "security"]
    assert (machine.path / "security" / RAW).read_bytes() == b"of security"
    with refused(errno.EIO, errno.ETIMEDOUT):
        os.listdir(machine.path / "empty")  # nobody had looked into it
    way.mend()
    wait_for(lambda: os.listdir(machine.path / "empty") == [], "it can be looked into again")


def test_locks_views_and_local_names_are_the_bound_namespaces(everything, datastore):
    lock = everything.path / "infra" / LOCK
    os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
    assert datastore.get(f"infra/{LOCK}")
    assert LOCK in (everything.path / ".swampfs/locks").read_text()
    lock.unlink()
    (everything.path / "infra/secrets").mkdir()
    (everything.path / "infra/secrets/key").write_text("mine")
    assert (everything.path / "infra/secrets/key").read_text() == "mine"
    assert not (everything.path / "security/secrets").exists()
    assert not [key for key in datastore.keys() if "secrets" in key]


def test_a_directory_of_namespaces_is_mounted_whole(tmp_path, fleet):
    datastore = tmp_path / "datastore"
    for name in ("one", "two"):
        (datastore / name / "files").mkdir(parents=True)
        (datastore / name / "files/f").write_text(name)
        (datastore / name / ".namespace.json").write_text("{}")
    machine = fleet.machine("all")
    machine.mount(f"file://{datastore}", "--all-namespaces", "--namespace", "one")
    assert (machine.path / "two/files/f").read_text() == "two"
    with refused(errno.EROFS):
        (machine.path / "two/files/f").write_text("no")
    (machine.path / "one/files/f").write_text("changed")
    machine.flush()
    assert (datastore / "one/files/f").read_text() == "changed"


def test_a_mount_of_all_namespaces_needs_one_and_a_place_of_its_own(bucket, fleet, home):
    machine = fleet.machine("all", bucket.env)
    unbound = machine.mount(bucket.url, "--all-namespaces", check=False)
    assert unbound.returncode == 1 and "--namespace NAME" in unbound.stderr
    repo = make_repo(home, bucket, "mine", "infra")
    at_home = machine.run("mount", "--all-namespaces", str(repo), check=False)
    assert at_home.returncode == 1 and "another directory" in at_home.stderr
