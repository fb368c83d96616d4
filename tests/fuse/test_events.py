"""``.swampfs/events``: who reads it hears of what happens, waits while nothing does, and may stop at any time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from queue import Queue

import pytest

from swampfs.names import lease_path
from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import load_shards
from tests.harness import wait_for

FILES = [("files/one", b"one"), ("files/two", b"two")]


class Listener:
    """A process that reads events, and what it heard."""

    def __init__(self, machine):
        self.process = subprocess.Popen(["cat", machine.path / ".swampfs/events"], stdout=subprocess.PIPE)
        self._lines = Queue()
        self.heard = []
        self._asked = []
        threading.Thread(target=self._listen, daemon=True).start()
        wait_for(lambda: machine.status()["openFiles"] > 0, "it listens")

    def _listen(self):
        for line in self.process.stdout:
            self._lines.put(json.loads(line))

    def until(self, event, **facts):
        """The first event of a kind, with these facts, that was not asked for yet; they come in any order."""
        at = 0
        while True:
            while at >= len(self.heard):
                self.heard.append(self._lines.get(timeout=20))
            told, at = self.heard[at], at + 1
            if told["event"] == event and facts.items() <= told.items() and told not in self._asked:
                self._asked.append(told)
                return told

    def end(self, number=signal.SIGINT):
        self.process.send_signal(number)
        return self.process.wait(5)


@pytest.fixture
def listening(bucket, fleet):
    """Makes machines and their listeners; nobody listens any more at the end."""
    listeners = []

    def mount(name, *options, env=None):
        machine = fleet.machine(
            name, env or bucket.env, options=("--refresh", "200ms", "--push-delay", "200ms", *options)
        )
        machine.mount(bucket.url)
        listeners.append(Listener(machine))
        return machine, listeners[-1]

    load_shards(bucket, FILES)
    yield mount
    for listener in listeners:
        listener.process.kill()
        listener.process.wait()
        listener.process.stdout.close()


def test_a_reader_hears_of_what_other_machines_and_this_one_do(listening):
    (a, heard_at_a), (_, heard_at_b) = listening("a"), listening("b")
    (a.path / "files/new").write_bytes(b"new")
    assert heard_at_a.until("lock", lock=lease_path("files/new"), state="held")["by"] == "mount"
    pushed = heard_at_a.until("pushed")
    assert (pushed["files"], pushed["removed"]) == (1, 0) and pushed["commitSeq"] > 0
    seen = heard_at_b.until("changed", path="files/new")
    assert (seen["kind"], seen["size"]) == ("file", 3)
    (a.path / "files/one").unlink()
    heard_at_b.until("removed", path="files/one")
    heard_at_a.until("lock", state="released")
    assert not [told for told in heard_at_b.heard if told["event"] == "pushed"], "it did nothing itself"


def test_a_reader_hears_of_failures_and_of_an_outage_and_its_end(listening, bucket, server):
    proxy = FaultProxy(server.endpoint)
    try:
        env = {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}
        machine, heard = listening("a", "--timeout", "2s", env=env)
        proxy.set(Fault.BLACK_HOLE)
        heard.until("offline")
        with pytest.raises(OSError):
            (machine.path / "files/two").read_bytes()
        failed = heard.until("failed", path="files/two")
        assert failed["errno"] == "ETIMEDOUT" and failed["why"]
        proxy.set(None)
        heard.until("online")
    finally:
        proxy.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_who_waits_for_events_can_be_interrupted_at_once(listening, number):
    machine, heard = listening("a")
    time.sleep(0.2)  # it waits within `read` by now
    assert heard.end(number) == -number  # within seconds, though nothing happens
    wait_for(lambda: machine.status()["openFiles"] == 0, "its handle is closed")
    machine.umount()


def test_two_that_share_a_descriptor_can_both_be_ended(listening):
    machine, _ = listening("a")
    with open(machine.path / ".swampfs/events", "rb") as file:
        readers = [subprocess.Popen(["cat"], stdin=file, stdout=subprocess.PIPE) for _ in range(2)]
    time.sleep(0.2)  # both wait within `read` by now
    readers[1].kill()
    assert readers[1].wait(5) == -signal.SIGKILL
    (machine.path / "files/new").write_bytes(b"new")
    assert json.loads(readers[0].stdout.readline())["event"] in ("lock", "pushed")
    readers[0].kill()
    for reader in readers:
        reader.wait(5)
        reader.stdout.close()


def test_who_does_not_want_to_wait_is_told_so(listening):
    machine, heard = listening("a")
    descriptor = os.open(machine.path / ".swampfs/events", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        os.read(descriptor, 100)
    (machine.path / "files/new").write_bytes(b"new")
    heard.until("pushed")
    assert b'"event"' in os.read(descriptor, 1 << 16)
    os.close(descriptor)


def test_grep_meets_no_events(listening):
    machine, _ = listening("a")
    subprocess.run(["grep", "-rs", "no such word", "."], cwd=machine.path / ".swampfs", timeout=20)


def test_events_are_read_byte_by_byte_as_well(listening):
    machine, heard = listening("a")
    shell = subprocess.Popen(
        ["bash", "-c", "for i in 1 2; do read -r line && echo $line; done < .swampfs/events"],
        cwd=machine.path,
        stdout=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: machine.status()["openFiles"] == 2, "the shell listens, too")
    for name in ("first", "last"):
        (machine.path / f"files/{name}").write_bytes(b"x")
        heard.until("pushed")
    out, _ = shell.communicate(timeout=10)
    assert [json.loads(line)["event"] for line in out.splitlines()] == [told["event"] for told in heard.heard[:2]]


def test_without_the_fast_lane_a_reader_is_told_now_and_then_that_nothing_happened(listening):
    machine, heard = listening("a", "--fast-lane", "off")
    assert set(heard.until("idle")) == {"time", "event"}
    (machine.path / "files/new").write_bytes(b"new")
    heard.until("pushed")
    heard.end()


def test_events_are_no_file_to_seek_in_and_cost_nothing_that_nobody_reads(listening):
    machine, heard = listening("a")
    with open(machine.path / ".swampfs/events", "rb", buffering=0) as file:
        assert os.fstat(file.fileno()).st_size == 0
        with pytest.raises(OSError, match="Illegal seek"):
            file.seek(0)
    heard.end()
