"""``swampfs explain``: an operator asks why something failed, and is told what, since when, and what to do."""

from __future__ import annotations

import json
import os

import pytest

from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import load_shards
from tests.harness import wait_for

SHORT = ("--refresh", "300ms", "--push-delay", "200ms", "--timeout", "3s", "--lock-ttl", "5s")


def explain(machine, path):
    told = json.loads(machine.run("explain", "--json", str(path)).stdout)
    shown = machine.run("explain", str(path)).stdout
    assert shown.startswith(f"{told['path']}: ")
    assert "  now     " in shown
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
        assert "'files/three': EBUSY" in (a.path / ".swampfs/errors").read_text()


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
    told = explain(machine, path)
    assert told["failure"]["errno"] == "EINVAL"
    assert "another name" in told["now"][0]
    fails(36, (machine.path / "files" / ("x" * 300)).write_text, "x")
    with pytest.raises(OSError, match="Invalid or incomplete"):
        os.close(os.open(os.fsencode(machine.path / "files") + b"/\xff", os.O_CREAT | os.O_WRONLY))
    assert "EILSEQ" in (machine.path / ".swampfs/errors").read_text()


def test_what_was_done_since_is_in_nobodys_way_and_what_is_local_is_said_to_be(bucket, fleet):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env, options=SHORT)
    machine.mount(bucket.url)
    path = machine.path / "files/one"
    path.read_bytes()
    fails(27, os.truncate, path, 1 << 62)
    assert explain(machine, path)["failure"]["errno"] == "EFBIG"
    path.write_text("well")
    machine.flush()
    told = explain(machine, path)
    assert (told["isOver"], told["now"]) == (True, ["nothing is in the way"])
    (machine.path / "secrets").mkdir(exist_ok=True)
    (machine.path / "secrets/x").write_text("x")
    assert "this machine only" in machine.run("explain", str(machine.path / "secrets/x")).stdout


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
