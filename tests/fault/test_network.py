"""Every fault of a network, times every operation of a user: what happens, and how long anybody waits at most.

A row is a fault, set while the mount is idle; the columns are done one after the other, each in a process of its own.
Whatever needs no answer of the store must not notice. When the fault is over the mount is whole again, by itself.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from swampfs import registry
from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import check_bucket, load_shards
from tests.harness import wait_for

TIMEOUT_S = 2.0
BOUND_S = TIMEOUT_S + 2.0  # no user waits longer; the rest is for a busy machine
MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9/n"
FILES = [(f"{MODEL}/{number}/raw", f"content {number}".encode() * 50) for number in range(1, 9)]
FILES += [(f"{MODEL}/latest", b"8"), ("files/old", b"old"), ("files/gone", b"gone"), ("files/moved", b"moved")]

SLOW = {Fault.LATE, Fault.NARROW, Fault.SKEWED}
"""All works, later."""
HARMLESS_TO_PUSHES = SLOW | {Fault.DRIBBLE, Fault.CUT_SHORT, Fault.SHORTENED, Fault.FLIPPED}
"""Their answers have hardly a body."""
PROGRAMS = {
    "ls cached": "import os; assert len(os.listdir('files')) >= 3",
    "ls uncached": f"import os; assert sorted(os.listdir('{MODEL}/7')) == ['raw']",
    "stat": f"import os; assert os.stat('{MODEL}/6/raw').st_size == 450",
    "cat local": f"assert open('{MODEL}/1/raw').read() == 'content 1' * 50",
    "cat remote": f"assert open('{MODEL}/2/raw').read() == 'content 2' * 50",
    "write+close": "open('files/new', 'w').write('new')",
    "fsync": "import os; f = open('files/synced', 'w'); f.write('synced'); f.flush(); os.fsync(f.fileno()); f.close()",
    "rename": "import os; os.rename('files/moved', 'files/moved-2')",
    "mkdir": "import os; os.mkdir('files/made')",
    "rm": "import os; os.remove('files/gone')",
}
NEEDS_NOTHING = {"ls cached", "ls uncached", "stat", "cat local"}


@pytest.fixture
def proxy(server):
    proxy = FaultProxy(server.endpoint)
    yield proxy
    proxy.close()


@pytest.fixture
def machine(bucket, fleet, proxy):
    load_shards(bucket, FILES)
    env = {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}
    options = ("--timeout", f"{TIMEOUT_S:g}s", "--refresh", "300ms", "--push-delay", "200ms")
    machine = fleet.machine("a", env, options=options)
    machine.mount(bucket.url)
    (machine.path / f"{MODEL}/1/raw").read_bytes()
    (machine.path / "files/moved").read_bytes()
    return machine


def do(machine, program):
    """The last thing a process said, ``ok`` for success, and how long it took, once it was started.

    One that hangs is an error here.

    A process in uninterruptible sleep is one that waits for its handler: it ends when that does, so it is in the time.
    """
    timed = f"import time\nbegan = time.monotonic()\ntry:\n  {program}\nfinally:\n  print(time.monotonic() - began)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", timed], cwd=machine.path, capture_output=True, timeout=60, text=True
    )
    said = done.stderr.strip().splitlines()[-1:] or ["ok"]
    return said[0], float(done.stdout)


def expected(fault, operation):
    """How the answer to a user begins."""
    if operation in NEEDS_NOTHING or fault in SLOW:
        return "ok"
    if fault is Fault.DENIED:
        return "PermissionError"  # an answer, not an outage: nothing is queued that may never be written
    return ("TimeoutError", "OSError: [Errno 5]") if operation == "cat remote" else "ok"


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name.lower())
def test_no_fault_of_the_network_hangs_anybody_or_loses_anything(fault, machine, proxy, bucket):
    proxy.set(fault)
    for operation, program in PROGRAMS.items():
        said, took = do(machine, program)
        assert said.startswith(expected(fault, operation)), operation
        assert took < (TIMEOUT_S if operation in NEEDS_NOTHING else BOUND_S), operation
    mount = registry.find(machine.environment(), machine.mountpoint)
    assert registry.request(mount, {"cmd": "status"}, BOUND_S)["healthy"] in (True, False), "it answers from memory"
    proxy.set(None)
    mended = time.monotonic()
    wait_for(lambda: do(machine, f"open('{MODEL}/3/raw').read()")[0] == "ok", "content comes again", timeout_s=10)
    assert (machine.path / f"{MODEL}/3/raw").read_bytes() == FILES[2][1]
    wait_for(lambda: machine.status()["dirty"] == 0, "everything is published", timeout_s=10)
    assert time.monotonic() - mended < 10, "whole again, without a remount"
    machine.umount()
    left = dict(FILES)
    if fault is not Fault.DENIED:
        del left["files/gone"]
        left |= {"files/new": b"new", "files/synced": b"synced", "files/moved-2": left.pop("files/moved")}
    assert check_bucket(bucket) == left


@pytest.mark.parametrize("fault", list(Fault), ids=lambda fault: fault.name.lower())
def test_an_unmount_during_any_fault_ends_in_time_and_keeps_what_is_not_pushed(fault, machine, proxy, bucket):
    proxy.set(fault)
    left = dict(FILES)
    if fault is not Fault.DENIED:  # then nothing can be written that might not be published
        wait_for(lambda: do(machine, PROGRAMS["write+close"])[0] == "ok", "it is written")  # in time is another test
        left["files/new"] = b"new"
    began = time.monotonic()
    done = machine.run("umount", "--timeout", "2s", str(machine.path), check=False)
    assert time.monotonic() - began < 10, "twice its timeout, and what a busy machine needs to start and end Python"
    pid = machine.pid()
    if machine.is_mounted():
        assert done.returncode != 0 and "not pushed" in done.stderr
        machine.run("umount", "--lazy", str(machine.path))
    else:
        assert done.returncode == 0
        assert fault is Fault.DENIED or fault in HARMLESS_TO_PUSHES
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "it ends, whatever is still unanswered", timeout_s=20)
    proxy.set(None)
    machine.mount(bucket.url)
    machine.umount()
    assert check_bucket(bucket) == left


@pytest.mark.parametrize("fault", [Fault.BLACK_HOLE, Fault.HALF_OPEN], ids=lambda fault: fault.name.lower())
def test_an_outage_is_found_out_once_and_is_over_within_seconds(fault, bucket, fleet, proxy):
    """With the usual ``--timeout`` of 30 s."""
    load_shards(bucket, FILES)
    machine = fleet.machine("a", {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url})
    machine.mount(bucket.url)
    proxy.set(fault)
    answers = []
    first = threading.Thread(target=lambda: answers.append(do(machine, PROGRAMS["cat remote"])))
    first.start()
    wait_for(lambda: machine.status()["offline"], "the outage is noticed before anything has timed out")
    assert answers == []
    assert "has not answered for" in machine.status()["lastError"]
    said, took = do(machine, f"open('{MODEL}/4/raw').read()")
    assert said.startswith("TimeoutError") and took < 10, "not asked again, which takes 30 s"
    proxy.set(None)
    mended = time.monotonic()
    wait_for(lambda: not machine.status()["offline"], "the end is noticed")
    first.join(10)
    assert [said for said, _ in answers] == ["ok"], "who waited is answered"
    assert time.monotonic() - mended < 10
    assert (machine.path / f"{MODEL}/4/raw").read_bytes() == FILES[3][1]


def test_connections_that_were_forgotten_in_a_short_outage_hold_nobody_up(bucket, fleet, proxy):
    load_shards(bucket, FILES)
    machine = fleet.machine("a", {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url})
    machine.mount(bucket.url)
    proxy.set(Fault.HALF_OPEN)
    (machine.path / "files").stat()
    answers = []
    reader = threading.Thread(target=lambda: answers.append(do(machine, PROGRAMS["cat remote"])))
    reader.start()
    wait_for(lambda: machine.status()["refreshAgeMs"] > 1000, "its request, and the poll's, are under way")
    proxy.set(None)
    mended = time.monotonic()
    reader.join(12)
    assert [said for said, _ in answers] == ["ok"]
    assert time.monotonic() - mended < 10, "though each request may take 30 s"


@pytest.mark.parametrize("then", ["wait", "unmount"])
def test_a_lock_that_could_not_be_given_back_is_given_back_when_the_store_answers(machine, proxy, bucket, then):
    locks = lambda: [key for key in bucket.keys() if key.endswith(".lock")]  # noqa: E731
    proxy.matches = lambda method, target: method == "DELETE" and ".lock" in target
    proxy.set(Fault.DENIED)
    (machine.path / "files/new").write_text("new")
    wait_for(lambda: machine.status()["pending"] == [], "it is published")
    wait_for(lambda: machine.status()["locks"] == [], "nobody holds one")
    assert len(locks()) == 2  # of the directory, and the global one of the commit
    proxy.set(None)
    if then == "unmount":
        machine.umount()
    wait_for(lambda: not locks(), "they are gone", timeout_s=12)


@pytest.mark.parametrize("lock", ["datastore", "files"])
def test_after_a_flush_that_met_the_end_of_a_push_no_lock_is_left(machine, proxy, bucket, lock):
    """The global lock is given back by the push, that of the directory after it."""
    tried = itertools.count(1)
    proxy.matches = lambda method, target: (
        method == "DELETE" and f"{lock}.lock" in target and next(tried) <= 3  # then the store is well again
    )
    proxy.set(Fault.UNAVAILABLE)
    (machine.path / "files/new").write_text("new")
    wait_for(lambda: machine.status()["pending"] == [], "it is published")
    if lock == "files":
        wait_for(lambda: machine.status()["locks"] == [], "it is being given back")
    machine.flush()
    assert next(tried) > 3
    assert [key for key in bucket.keys() if key.endswith(".lock")] == []
