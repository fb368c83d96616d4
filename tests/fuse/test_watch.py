"""``status --watch``: a live screen on a terminal, lines in a pipe, objects for programs."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from swampfs.cli import screen
from tests.datastores import load_shards
from tests.harness import wait_for

MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"


@pytest.fixture
def machine(bucket, fleet):
    load_shards(bucket, [("files/one", b"1" * 2048)])
    machine = fleet.machine("a", bucket.env, options=("--push-delay", "1h", "--cache-size", "1M"))
    machine.mount(bucket.url)
    (machine.path / "files/one").read_bytes()
    (machine.path / MODEL / "new/1").mkdir(parents=True)
    (machine.path / MODEL / "new/1/raw").write_text("new")
    return machine


def watching(machine, *more, **where):
    words = [sys.executable, "-m", "swampfs", "status", "--watch", "--every", "100ms", *more, str(machine.path)]
    return subprocess.Popen(words, env={**machine.environment(), "TERM": "xterm", "COLUMNS": "110"}, **where)


def ended(process):
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0


def test_on_a_terminal_it_is_a_screen_that_follows_the_mount(machine):
    ours, theirs = pty.openpty()
    process = watching(machine, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = bytearray()

    def shows(text):
        def look():
            shown.extend(os.read(ours, 1 << 16))
            return text.encode() in shown

        return look

    wait_for(shows("healthy"), "it says how the mount is")
    wait_for(shows("2.0 KiB of 1.0 MiB"), "it says how full the cache is")
    wait_for(shows("test/7b1463fb"), "it says what is to be pushed, by model")
    shown.clear()
    machine.flush()
    wait_for(shows("put"), "it shows the requests of the push")
    ended(process)
    os.close(ours)


def test_what_happened_since_the_last_look_is_shown_until_the_next(machine):
    first = machine.status()
    later = {**first, "requests": {**first["requests"], "put": first["requests"].get("put", 0) + 5}}
    looks = iter([first, later])

    def ask():
        for status in looks:
            return status
        raise KeyboardInterrupt

    drawn = io.StringIO()
    with pytest.raises(KeyboardInterrupt):
        screen.watch(ask, 0.01, Console(file=drawn, force_terminal=True, width=100))
    assert "put" in drawn.getvalue().rpartition("requests")[2]


def test_in_a_pipe_it_is_a_line_each_time(machine):
    process = watching(machine, stdout=subprocess.PIPE, text=True)
    lines = [process.stdout.readline() for _ in range(3)]
    ended(process)
    process.stdout.close()
    assert all("healthy files 2 here 2 to push 1" in line for line in lines), lines


def test_for_programs_it_is_an_object_per_line(machine):
    process = watching(machine, "--json", stdout=subprocess.PIPE, text=True)
    told = [json.loads(process.stdout.readline()) for _ in range(2)]
    ended(process)
    process.stdout.close()
    assert list(told[0]["pendingByModel"].values()) == [1]
    assert told[1]["uptimeS"] >= told[0]["uptimeS"]


def test_it_ends_with_the_mount_and_says_so(machine):
    process = watching(machine, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.2)
    machine.umount()
    _, why = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "swampfs: " in why


def test_names_that_look_like_markup_or_move_the_cursor_are_shown_as_they_are(machine):
    odd = "data/[/t]\x1b[2J/7b1463fb-2730-4225-aef5-5f9f9a66c7d9/n/1"
    (machine.path / odd).mkdir(parents=True)
    (machine.path / odd / "raw").write_text("odd")
    ours, theirs = pty.openpty()
    process = watching(machine, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = bytearray()

    def look():
        shown.extend(os.read(ours, 1 << 16))
        return b"[/t]\\x1b[2J" in shown

    wait_for(look, "it is among what is to be pushed")
    ended(process)
    os.close(ours)
    told = machine.run("explain", str(machine.path / odd / "raw")).stdout
    assert "[/t]\\x1b[2J" in told
    assert "\x1b" not in told


def test_a_pause_that_is_none_is_refused(machine):
    assert machine.run("status", "--watch", "--every", "0", str(machine.path), check=False).returncode == 1
