"""What is on this machine by a user's wish: ``hydrate``, ``evict``, ``pin``, ``unpin``; and ``info``."""

from __future__ import annotations

import hashlib
import json
import os

import pytest

from tests.datastores import load_shards
from tests.harness import wait_for

MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
RAW = f"{MODEL}/n/3/raw"
MIB = 1 << 20
FILES = {RAW: b"content", **{f"outputs/{number}": bytes([number]) * MIB for number in range(6)}}


@pytest.fixture
def machine(bucket, fleet):
    load_shards(bucket, FILES.items())
    machine = fleet.machine("a", bucket.env)
    machine.mount(bucket.url)
    return machine


def local(machine):
    return {path for path in FILES if (machine.path / path).exists() and os.stat(machine.path / path).st_blocks}


def downloads(machine):
    return [request["key"] for request in machine.requests() if request["op"] == "download"]


def run(machine, command, *paths, **more):
    return machine.run(command, *(str(machine.path / path) for path in paths), **more)


def test_hydrate_fetches_what_is_not_here_and_evict_gives_the_room_back(machine):
    assert "6 file(s), 6291456 bytes fetched" in run(machine, "hydrate", "outputs").stdout
    assert local(machine) == {path for path in FILES if path.startswith("outputs/")}
    machine.clear_requests()
    assert "0 file(s), 0 bytes" in run(machine, "hydrate", "outputs").stdout
    assert (machine.path / "outputs/3").read_bytes() == FILES["outputs/3"]
    assert downloads(machine) == []
    with open(machine.path / "outputs/2", "rb"):
        assert "5 file(s), 5242880 bytes removed from this machine; 1 kept" in run(machine, "evict", "outputs").stdout
    assert local(machine) == {"outputs/2"}
    assert (machine.path / "outputs/3").read_bytes() == FILES["outputs/3"], "and it is fetched again"


def test_what_is_pinned_stays_follows_others_and_is_pinned_after_a_remount(machine, bucket, fleet):
    run(machine, "pin", "outputs/1")
    run(machine, "hydrate", "outputs")
    assert "1 kept" in run(machine, "evict", "outputs").stdout
    assert local(machine) == {"outputs/1"}
    machine.umount()
    machine.mount(bucket.url, "--cache-size", "1M")
    assert machine.status()["pinned"] == ["outputs/1"]
    for number in range(2, 6):
        (machine.path / f"outputs/{number}").read_bytes()
    wait_for(lambda: len(local(machine)) <= 2, "the others go")
    assert "outputs/1" in local(machine)
    other = fleet.machine("b", bucket.env)
    other.mount(bucket.url)
    (other.path / "outputs/1").write_bytes(b"new" * MIB)
    other.flush()
    wait_for(lambda: os.stat(machine.path / "outputs/1").st_size == 3 * MIB, "the change is seen")
    wait_for(lambda: "outputs/1" in local(machine), "and fetched before anybody asks")
    machine.clear_requests()
    assert (machine.path / "outputs/1").read_bytes() == b"new" * MIB
    assert downloads(machine) == []
    assert "1 path(s) unpinned" in run(machine, "unpin", "outputs/1").stdout
    assert "0 kept" not in run(machine, "evict", "outputs").stdout
    assert local(machine) == set()


def test_info_tells_what_is_known_and_asks_nothing(machine):
    machine.clear_requests()
    told = info(machine, RAW)
    assert told | {"remoteModifiedAt": ""} == {
        "path": RAW,
        "kind": "file",
        "state": "remote",
        "sha256": hashlib.sha256(b"content").hexdigest(),
        "size": 7,
        "model": MODEL.removeprefix("data/"),
        "version": "3",
        "partition": told["partition"],
        "remoteModifiedAt": "",
        "pinned": False,
        "lock": f"{MODEL}/.lock",
        "lockHolder": None,
    }
    (machine.path / RAW).read_bytes()
    assert info(machine, RAW)["state"] == "clean"
    assert "sha256" in run(machine, "info", RAW).stdout


def info(machine, path):
    return json.loads(machine.run("info", "--json", str(machine.path / path)).stdout)


@pytest.mark.parametrize("command", ["hydrate", "evict", "pin", "unpin", "info"])
def test_a_path_that_is_not_there_is_a_usage_error(command, machine):
    done = run(machine, command, "nowhere", check=False)
    assert done.returncode == 1
    assert "nowhere is not in the datastore" in done.stderr
    done = machine.run(command, "/", check=False)
    assert done.returncode == 1
    assert "no swampfs mount" in done.stderr


def test_hydrate_out_of_reach_names_what_failed_and_why(machine, bucket):
    bucket.delete("outputs/4")
    done = run(machine, "hydrate", "outputs", check=False)
    assert done.returncode == 2
    assert "5 file(s)" in done.stdout
    assert "outputs/4: " in done.stderr and "its object is gone" in done.stderr
