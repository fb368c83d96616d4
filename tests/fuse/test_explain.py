"""``swampfs explain``: an operator asks why something failed, and is told what, since when, and what to do."""

from __future__ import annotations

import json

import pytest

from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import load_shards
from tests.harness import wait_for

SHORT = ("--refresh", "300ms", "--push-delay", "200ms", "--timeout", "3s", "--lock-ttl", "5s")


def explain(machine, path):
    told = json.loads(machine.run("explain", "--json", str(path)).stdout)
    shown = machine.run("explain", str(path)).stdout
    assert shown.startswith(f"{told['path']}: ")
    assert all(step in shown for step in told["now"])
    return told


def fails(number, act, *arguments):
    with pytest.raises(OSError) as caught:
        act(*arguments)
    assert caught.value.errno == number


def test_nothing_is_wrong_with_a_file_that_is_there_or_a_name_that_is_not(bucket, fleet):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env, options=SHORT)
    machine.mount(bucket.url)
    told = explain(machine, machine.path / "files/one")
    assert (told["failure"], told["info"]["state"]) == (None, "remote")
    assert told["now"] == ["nothing is in the way"]
    (machine.path / "files/none").exists()
    assert explain(machine, machine.path / "files/none")["failure"] is None, (
        "to be told that it is not there is no failure"
    )


def test_a_lock_of_another_machine_is_named(bucket, fleet):
    load_shards(bucket, [("files/one", b"1")])
    a, b = (fleet.machine(name, bucket.env, options=SHORT) for name in "ab")
    a.mount(bucket.url)
    b.mount(bucket.url)
    with open(b.path / "files/two", "w") as file:
        file.write("theirs")
        file.flush()
        for _ in range(2):
            fails(16, (a.path / "files/three").write_text, "ours")
        told = explain(a, a.path / "files/three")
        failure = told["failure"]
        assert (failure["operation"], failure["errno"], failure["times"]) == ("create", "EBUSY", 2)
        assert failure["since"] < failure["at"]
        assert str(b.pid()) in failure["why"]
        assert "lock" in told["now"][0]
        assert "files/three: EBUSY" in (a.path / ".swampfs/errors").read_text()


def test_a_datastore_that_is_silent_or_refuses_is_named_for_reads_and_for_what_waits_to_be_pushed(
    bucket, server, fleet
):
    load_shards(bucket, [("files/one", b"1"), ("files/two", b"2")])
    proxy = FaultProxy(server.endpoint)
    machine = fleet.machine(
        "a", {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}, options=(*SHORT, "--prefetch", "off")
    )
    machine.mount(bucket.url)
    (machine.path / "files/new").write_text("new")
    machine.flush()
    proxy.set(Fault.DENIED)
    fails(13, (machine.path / "files/one").read_bytes)
    told = explain(machine, machine.path / "files/one")
    assert (told["failure"]["operation"], told["failure"]["errno"]) == ("open", "EACCES")
    assert "403" in told["now"][0]
    proxy.set(Fault.BLACK_HOLE)
    (machine.path / "files/new").write_text("newer")
    fails(110, (machine.path / "files/two").read_bytes)
    assert explain(machine, machine.path / "files/two")["failure"]["errno"] == "ETIMEDOUT"
    wait_for(lambda: explain(machine, machine.path / "files/new")["offline"], "the outage is noticed")
    assert any("changed" in step for step in explain(machine, machine.path / "files/new")["now"])
    proxy.set(None)
    machine.flush()
    wait_for(lambda: explain(machine, machine.path / "files/new")["now"] == ["nothing is in the way"], "it is over")
    proxy.close()


def test_a_name_that_cannot_be_is_said_to_be_one(bucket, fleet):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env, options=SHORT)
    machine.mount(bucket.url)
    path = machine.path / "files" / "back\\slash"
    fails(22, path.write_text, "x")
    done = machine.run("explain", str(path), check=False)
    assert done.returncode == 1
    assert "cannot be a name in a datastore" in done.stderr


def test_what_is_open_or_changed_says_when_it_is_pushed(bucket, fleet):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env, options=("--push-delay", "1h"))
    machine.mount(bucket.url)
    with open(machine.path / "files/two", "w") as file:
        file.write("2")
        assert "still open" in explain(machine, machine.path / "files/two")["now"][0]
    wait_for(lambda: "in a moment" in explain(machine, machine.path / "files/two")["now"][0], "it is closed")
    machine.flush()
    assert explain(machine, machine.path / "files/two")["now"] == ["nothing is in the way"]
