"""What takes long shows how far it is: a bar on a terminal, lines in a pipe, nothing for what takes a moment."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import sys

import pytest

from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import load_shards
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
