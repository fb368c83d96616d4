"""The kernel collects what is written (decision 0016): fewer requests, and the same files for everybody."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import contextmanager

import pytest

from tests.datastores import check_bucket, load_shards
from tests.fuse.test_locks import record
from tests.harness import wait_for

COLLECTS = ("--writeback-cache", "on")
QUIET = ("--refresh", "1h", "--push-delay", "1h", *COLLECTS)
LIVELY = ("--refresh", "300ms", "--push-delay", "200ms", *COLLECTS)
MODEL = "data/docker/host/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
BODY = os.urandom(10_000)


@pytest.fixture
def two(bucket, fleet):
    """Two machines that both collect."""
    load_shards(bucket, [("files/x", BODY)])
    machines = [fleet.machine(name, bucket.env, options=LIVELY) for name in "ab"]
    for machine in machines:
        machine.mount(bucket.url)
    return machines


@pytest.fixture(params=["on", "off"])
def lane(request):
    return "--fast-lane", request.param


_WRITER = """
import os, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
os.write(fd, b"WRITTEN")
print("written", flush=True)
sys.stdin.read()
os.close(fd)
"""


@contextmanager
def written_and_open(path):
    """By another process: each program that this one starts closes its files, which brings what was collected."""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _WRITER, path], stdin=pipe, stdout=pipe, stderr=pipe) as writer:
        assert writer.stdout.readline() == b"written\n"
        yield
        writer.stdin.close()


def upcalls(machine):
    told = machine.status()["upcalls"]
    return Counter(told["answered"]) + Counter(told["passed"])


def writes(machine):
    return upcalls(machine)["WRITE"]


def lookups(machine):
    return upcalls(machine)["LOOKUP"]


def test_many_small_writes_are_few_requests_that_are_answered_before_the_close(bucket, fleet):
    load_shards(bucket, [("files/x", BODY)])
    machine = fleet.machine("a", bucket.env, options=QUIET)
    machine.mount(bucket.url)
    (machine.path / "files/first").write_bytes(b"")  # the lock is there
    before = writes(machine)
    body = os.urandom(1 << 20)
    with open(machine.path / "files/new", "wb", buffering=0) as file:
        for at in range(0, len(body), 4096):
            file.write(body[at : at + 4096])
        assert os.fstat(file.fileno()).st_size == len(body)
        assert (machine.path / "files/new").read_bytes() == body, "who reads meanwhile sees all of it"
    assert writes(machine) - before <= 32, "of 256"
    machine.kill()
    machine.mount(bucket.url)
    assert (machine.path / "files/new").read_bytes() == body
    machine.umount()
    assert check_bucket(bucket)["files/new"] == body


def test_parts_of_pages_ends_and_holes_are_where_they_were_written(bucket, fleet, lane):
    load_shards(bucket, [("files/x", BODY)])
    machine = fleet.machine("a", bucket.env, options=(*LIVELY, *lane))
    machine.mount(bucket.url)
    path = machine.path / "files/x"
    only = os.open(path, os.O_WRONLY)
    os.pwrite(only, b"middle", 5000)
    ends = [os.open(path, os.O_WRONLY | os.O_APPEND) for _ in range(2)]
    for word in (b"one", b"two", b"three"):
        for fd in ends:
            os.write(fd, word)
    os.pwrite(only, b"far", 30_000)
    for fd in (only, *ends):
        os.close(fd)
    expected = bytearray(BODY + b"oneonetwotwothreethree")
    expected[5000:5006] = b"middle"
    expected = bytes(expected.ljust(30_000, b"\0")) + b"far"
    assert path.read_bytes() == expected
    machine.umount()
    assert check_bucket(bucket)["files/x"] == expected


def test_size_and_time_that_were_set_while_it_collected_reach_the_other_machine(two):
    here, there = two
    path = here.path / "files/x"
    with open(path, "r+b", buffering=0) as file:
        file.write(b"changed")
        os.ftruncate(file.fileno(), 5)
        os.utime(path, ns=(1, 1_500_000_000_123_456_789))
        os.fchmod(file.fileno(), 0o640)
    here.flush()
    other = there.path / "files/x"
    wait_for(lambda: other.read_bytes() == b"chang", "the other machine has it")
    seen = other.stat()
    assert (seen.st_mtime_ns, oct(seen.st_mode)) == (1_500_000_000_123_456_789, "0o100640")


def test_a_time_that_another_machine_set_is_seen_though_the_kernel_knew_another(two):
    here, there = two
    path, other = here.path / "files/x", there.path / "files/x"
    assert other.read_bytes() == BODY
    for moment in (1_500_000_000_000_000_000, 1_600_000_000_000_000_000):
        os.utime(path, ns=(moment, moment))
        here.flush()
        wait_for(lambda wanted=moment: other.stat().st_mtime_ns == wanted, "the other machine shows it")


def test_a_time_is_kept_when_the_file_was_written_before_it_was_set(two, bucket, tmp_path):
    here, _ = two
    source = tmp_path / "source"
    source.write_bytes(BODY)
    os.utime(source, ns=(1, 1_400_000_000_000_000_001))
    subprocess.run(["cp", "-p", source, here.path / "files/copy"], check=True)
    assert (here.path / "files/copy").stat().st_mtime_ns == 1_400_000_000_000_000_001
    here.umount()
    here.mount(bucket.url)
    assert (here.path / "files/copy").stat().st_mtime_ns == 1_400_000_000_000_000_001


def test_the_time_of_a_file_is_when_it_was_written_on_every_machine(two):
    here, there = two
    (here.path / "files/many").mkdir()
    for number in range(200):
        (here.path / f"files/many/{number}").write_bytes(BODY)
    here.flush()
    times = lambda machine: [(machine.path / f"files/many/{n}").stat().st_mtime_ns for n in range(200)]  # noqa: E731
    wait_for(lambda: len(list(there.path.glob("files/many/*"))) == 200, "the other machine has them")
    assert times(there) == times(here)


def test_whoever_wrote_to_a_file_that_others_replaced_is_told_when_it_is_closed(two, bucket):
    here, there = two
    path = here.path / "files/x"
    fd = os.open(path, os.O_RDWR)
    (there.path / "files/x").write_bytes(b"theirs")
    there.flush()
    wait_for(lambda: path.read_bytes() == b"theirs", "it is replaced")
    os.write(fd, b"ours")
    with pytest.raises(OSError) as told:
        os.fsync(fd)
    assert told.value.errno in (errno.ESTALE, errno.EIO)
    os.close(fd)
    assert path.read_bytes() == b"theirs"
    here.umount()
    there.umount()
    assert check_bucket(bucket)["files/x"] == b"theirs"


def test_a_full_disk_is_told_by_fsync_and_nothing_is_taken_for_written(bucket, fleet, home):
    """Of what the kernel has collected, an answer that took a part of it would be taken for all."""
    small = home / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", small], check=True)
    try:
        machine = fleet.machine("a", bucket.env, options=QUIET)
        machine.state_dir = small / "state"
        machine.mount(bucket.url)
        (machine.path / "files").mkdir()
        fd = os.open(machine.path / "files/large", os.O_WRONLY | os.O_CREAT)
        for _ in range(48):
            os.write(fd, os.urandom(1 << 20))
        with pytest.raises(OSError) as told:
            os.fsync(fd)
        assert told.value.errno == errno.ENOSPC
        os.close(fd)
        os.unlink(machine.path / "files/large")
        machine.umount()
    finally:
        machine.close()
        subprocess.run(["umount", "-l", small], check=True)


def test_locks_are_what_they_are_without_it(two):
    here, there = two
    for machine in two:
        (machine.path / MODEL).mkdir(parents=True, exist_ok=True)
    fd = os.open(here.path / MODEL / ".lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(fd, b"{}")
    with pytest.raises(FileExistsError):
        os.open(there.path / MODEL / ".lock", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(fd)
    (here.path / MODEL / "x").write_bytes(b"under it")
    os.unlink(here.path / MODEL / ".lock")
    other = there.path / MODEL / "x"
    wait_for(lambda: other.exists() and other.read_bytes() == b"under it", "the other machine has it")


def test_a_flush_finds_what_is_open_and_was_written_though_the_kernel_has_it(bucket, fleet, lane):
    load_shards(bucket, [("files/x", BODY)])
    machine = fleet.machine("a", bucket.env, options=(*QUIET, *lane))
    machine.mount(bucket.url)
    with written_and_open(machine.path / "files/x"):
        for command in ("flush", "umount"):
            done = machine.run(command, str(machine.path), check=False)
            assert (done.returncode, "still open for writing" in done.stderr) == (2, True)
    machine.umount()
    assert check_bucket(bucket)["files/x"] == b"WRITTEN" + BODY[7:]


def test_a_flush_is_not_done_while_the_kernel_has_not_written(bucket, fleet, home):
    stuck = home / "bin/sync"
    stuck.parent.mkdir()
    stuck.write_text("#!/bin/sh\nexec sleep 60\n")
    stuck.chmod(0o755)
    load_shards(bucket, [("files/x", BODY)])
    env = {**bucket.env, "PATH": f"{stuck.parent}:{os.environ['PATH']}"}
    machine = fleet.machine("a", env, options=QUIET)
    machine.mount(bucket.url)
    with written_and_open(machine.path / "files/x"):
        done = machine.run("flush", "--timeout", "1s", str(machine.path), check=False)
        assert (done.returncode, "the kernel has not written" in done.stderr) == (2, True), done.stderr


def test_an_orderly_end_keeps_what_a_file_holds_that_is_still_open(bucket, fleet):
    """As `systemctl stop` ends a mount; what it cannot push is in the journal."""
    load_shards(bucket, [("files/x", BODY)])
    machine = fleet.machine("a", bucket.env, options=QUIET)
    machine.mount(bucket.url)
    pid = machine.pid()
    with written_and_open(machine.path / "files/x"):
        os.kill(pid, signal.SIGTERM)
        wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "it has ended", 30)
    machine.mount(bucket.url)
    assert (machine.path / "files/x").read_bytes() == b"WRITTEN" + BODY[7:]
    machine.umount()
    assert check_bucket(bucket)["files/x"] == b"WRITTEN" + BODY[7:]


def test_what_the_mount_says_of_itself_is_of_now(bucket, fleet, lane):
    load_shards(bucket, [("files/x", BODY)])
    machine = fleet.machine("a", bucket.env, options=(*QUIET, *lane))
    machine.mount(bucket.url)
    views = machine.path / ".swampfs"
    assert (views / "pending").read_text() == ""
    before = json.loads((views / "status.json").read_text())
    for number in range(3):
        (machine.path / f"files/n{number}").write_bytes(BODY)
    assert (views / "pending").read_text().split() == [f"files/n{number}" for number in range(3)]
    assert json.loads((views / "status.json").read_text())["dirty"] == before["dirty"] + 3
    fd = os.open(views / "events", os.O_RDONLY | os.O_NONBLOCK)
    try:
        assert os.read(fd, 1 << 16) != b"", "it does not end"
    except BlockingIOError:
        pass
    finally:
        os.close(fd)


@pytest.mark.parametrize("collects", ["on", "off"])
def test_the_record_of_a_lock_is_all_there_and_of_now_when_it_is_another_one(bucket, fleet, collects):
    load_shards(bucket, [(f"{MODEL}/x", BODY)])
    machine = fleet.machine("a", bucket.env, options=(*QUIET, "--writeback-cache", collects))
    machine.mount(bucket.url)
    path = machine.path / MODEL / ".lock"
    sizes, times = set(), set()
    for nonce, host in (("1", "one"), ("2", "another-one-with-a-longer-name")):
        bucket.put(f"{MODEL}/.lock", record(nonce, host=host, ttl_ms=3_600_000))
        fd = os.open(path, os.O_RDONLY)
        found = os.fstat(fd)
        told = json.loads(os.read(fd, found.st_size))
        os.close(fd)
        assert (told["nonce"], told["hostname"]) == (nonce, host)
        sizes.add(found.st_size)
        times.add(found.st_mtime_ns)
    assert len(sizes) == len(times) == 2
    bucket.delete(f"{MODEL}/.lock")


def test_a_time_that_another_machine_set_while_it_was_open_is_seen_once_it_is_closed(two):
    here, there = two
    path, other = here.path / "files/x", there.path / "files/x"
    with open(other, "rb") as file:
        assert file.read() == BODY
        os.utime(path, ns=(1, 1_500_000_000_000_000_000))
        other.stat()
        before = lookups(there)
        here.flush()
        wait_for(lambda: other.stat() and lookups(there) > before, "the kernel of the other machine forgot the name")
    wait_for(lambda: other.stat().st_mtime_ns == 1_500_000_000_000_000_000, "the other machine shows it")
