"""What takes long shows how far it is: a bar on a terminal, lines in a pipe, nothing for what takes a moment."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import uuid

import pytest

from swampfs.names import ModelRef
from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import load_monolith, load_shards
from tests.harness import wait_for


@pytest.fixture
def slow(bucket, server, fleet):
    """A mount whose datastore answers late, from when it is asked to."""
    load_shards(bucket, [(f"files/{number:03}", b"x" * 10_000) for number in range(200)])
    proxy = FaultProxy(server.endpoint)
    env = {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}
    machine = fleet.machine("a", env, options=("--refresh", "1h", "--push-delay", "1h", "--prefetch", "off"))
    machine.mount(bucket.url)
    yield machine, proxy
    proxy.set(None)
    proxy.close()


def on_a_terminal(machine, *words):
    """Start a command; returns its process and a function that reads what it has written by now."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "swampfs", *words], stdout=theirs, stderr=theirs, stdin=theirs,
        env={**machine.environment(), "TERM": "xterm", "COLUMNS": "100"},
    )  # fmt: skip
    os.close(theirs)
    shown = bytearray()

    def read():
        with contextlib.suppress(OSError):  # it has ended
            shown.extend(os.read(ours, 1 << 16))
        return shown.decode(errors="replace")

    return process, read, ours


def test_hydrating_much_draws_a_bar_that_grows(slow):
    machine, proxy = slow
    proxy.set(Fault.LATE)
    process, read, terminal = on_a_terminal(machine, "hydrate", str(machine.path / "files"))
    wait_for(lambda: re.search(r"hydrate.*[1-9][\d.]*/2.0 MB", read()), "it says how much of how much is here")
    proxy.set(None)
    wait_for(lambda: "200 file(s), 2000000 bytes fetched" in read(), "it ends with what it did")
    assert process.wait(10) == 0
    os.close(terminal)


def test_a_flush_says_how_many_changes_are_left(slow):
    machine, proxy = slow
    for number in range(60):
        (machine.path / f"files/new-{number}").write_text("new")
    proxy.set(Fault.LATE)
    process, read, terminal = on_a_terminal(machine, "flush", str(machine.path))
    wait_for(lambda: re.search(r"push.*\d+/60", read()), "it says how many of how many")
    proxy.set(None)
    assert process.wait(20) == 0
    os.close(terminal)


def test_what_takes_a_moment_and_what_is_in_a_pipe_is_quiet(slow):
    machine, _ = slow
    (machine.path / "files/new").write_text("new")
    assert machine.run("flush", str(machine.path)).stderr == ""
    done = machine.run("hydrate", str(machine.path / "files/001"))
    assert (done.stdout, done.stderr) == ("1 file(s), 10000 bytes fetched\n", "")


def lines_of(text):
    return [json.loads(line) for line in text.splitlines()]


def test_with_json_progress_is_an_object_per_line_and_the_result_is_alone(slow):
    machine, proxy = slow
    proxy.set(Fault.LATE)
    fetched = machine.run("hydrate", "--json", str(machine.path / "files"))
    assert json.loads(fetched.stdout)["files"] == 200
    steps = lines_of(fetched.stderr)
    assert [step["done"] for step in steps] == sorted(step["done"] for step in steps)
    assert {(step["what"], step["total"], step["unit"]) for step in steps} == {("hydrate", 2_000_000, "bytes")}
    for number in range(200):
        (machine.path / f"files/new-{number}").write_text("new")
    pushed = machine.run("flush", "--json", str(machine.path))
    assert json.loads(pushed.stdout) == {"pending": 0}
    assert {step["unit"] for step in lines_of(pushed.stderr)} == {"changes"}
    proxy.set(None)
    assert json.loads(machine.run("pin", "--json", str(machine.path / "files/001")).stdout)["failed"] == 0
    assert json.loads(machine.run("unpin", "--json", str(machine.path / "files/001")).stdout) == {"unpinned": 1}
    assert json.loads(machine.run("evict", "--json", str(machine.path / "files/001")).stdout)["files"] == 1
    ended = machine.run("umount", "--json", str(machine.path))
    assert json.loads(ended.stdout) == {"mountpoint": str(machine.path), "done": "unmounted"}


@pytest.fixture
def late(bucket, server, fleet, tmp_path):
    """A machine and a repository of a datastore that answers late, a few requests at a time."""
    models = [ModelRef("test", str(uuid.UUID(int=number))) for number in range(40)]
    contents = {"raw": b"x" * 100, "metadata.yaml": b"name: n\nlifetime: infinite\n"}
    files = [(f"data/{model}/n/1/{name}", body) for model in models for name, body in contents.items()]
    proxy = FaultProxy(server.endpoint)
    config = {"bucket": bucket.url.split("/")[2], "prefix": bucket.prefix, "pullConcurrency": 4}
    marker = {"repoId": str(uuid.uuid4()), "datastore": {"type": "@swamp/s3-datastore", "config": config}}
    (tmp_path / "repo").mkdir()
    (tmp_path / "repo/.swamp.yaml").write_text(json.dumps(marker))
    proxy.set(Fault.LATE)

    def make(load):
        load(bucket, files)
        return fleet.machine("a", {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}), tmp_path / "repo"

    yield make
    proxy.set(None)
    proxy.close()


@pytest.mark.parametrize(("words", "what", "units"), [
    (("sync", "--pull"), "sync", {"files pulled"}),
    (("migrate-index",), "migrate", {"shards written"}),
    (("gc", "--dry-run", "--source"), "gc", {"names looked at"}),
])  # fmt: skip
def test_commands_without_a_mount_show_how_far_they_are(words, what, units, late):
    machine, repo = late(load_monolith if what == "migrate" else load_shards)
    done = machine.run(*words, str(repo), "--json")
    json.loads(done.stdout)
    steps = lines_of(done.stderr)
    assert {step["what"] for step in steps} == {what}
    assert {step["unit"] for step in steps} == units
    assert all(0 <= step["done"] <= step["total"] for step in steps)


@pytest.mark.parametrize("stderr", ["2>&-", "2>/dev/full"])
def test_work_is_done_though_nobody_can_be_told_how_far_it_is(stderr, late):
    machine, repo = late(load_shards)
    command = f"exec {sys.executable} -m swampfs sync --pull --json {repo} {stderr}"
    done = subprocess.run(["sh", "-c", command], env=machine.environment(), stdout=subprocess.PIPE, timeout=60)
    assert (done.returncode, json.loads(done.stdout)["filesPulled"]) == (0, 80)
