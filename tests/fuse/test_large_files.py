"""Large files through the kernel: the head of one costs a part of it."""

from __future__ import annotations

import mmap
import os
import subprocess
import time

from swampfs.records import timestamp
from tests.datastores import load_shards
from tests.harness import wait_for

QUIET = ("--refresh", "1h", "--push-delay", "1h")
NAME = "data/test/m/big/1/raw"
MIB = 1 << 20


def mounted(bucket, fleet, body):
    load_shards(bucket, [(NAME, body)], stamp=timestamp(time.time_ns()))
    machine = fleet.machine("a", bucket.env, options=QUIET)
    machine.mount(bucket.url)
    machine.clear_requests()
    return machine


def operations(machine):
    return [request["op"] for request in machine.requests()]


def test_the_head_of_a_large_file_is_asked_for_twice_and_nothing_else_of_it(bucket, fleet):
    """Over plain HTTP two requests must agree; with TLS it is one."""
    body = os.urandom(48 * MIB)
    machine = mounted(bucket, fleet, body)
    head = subprocess.run(["head", "-c", "100", machine.path / NAME], capture_output=True, check=True).stdout
    assert head == body[:100]
    assert operations(machine) == ["part", "part"]
    tail = subprocess.run(["tail", "-c", "100", machine.path / NAME], capture_output=True, check=True).stdout
    assert tail == body[-100:]
    assert len(operations(machine)) <= 6, "the kernel reads ahead of tail"
    assert (machine.path / NAME).stat().st_blocks == 0
    machine.umount()


def test_a_large_file_that_is_read_through_is_here_then(bucket, fleet):
    body = os.urandom(48 * MIB)
    machine = mounted(bucket, fleet, body)
    assert subprocess.run(["cat", machine.path / NAME], capture_output=True, check=True).stdout == body
    wait_for(lambda: machine.status()["hydrated"] == 1, "all of it is kept")
    assert (machine.path / NAME).stat().st_blocks * 512 >= len(body)
    machine.clear_requests()
    assert (machine.path / NAME).read_bytes() == body
    assert operations(machine) == []
    machine.umount()


def test_a_large_file_can_be_mapped_and_read_anywhere_before_it_is_here(bucket, fleet):
    body = os.urandom(20 * MIB + 17)
    machine = mounted(bucket, fleet, body)
    with open(machine.path / NAME, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        for offset in (len(body) - 5, 7 * MIB - 3, 0, 13 * MIB):
            assert mapped[offset : offset + 5] == body[offset : offset + 5]
    machine.umount()


def test_a_large_file_is_written_to_as_any_other(bucket, fleet):
    body = os.urandom(20 * MIB)
    machine = mounted(bucket, fleet, body)
    with open(machine.path / NAME, "rb") as reader:
        reader.read(100)
        with open(machine.path / NAME, "r+b") as writer:
            writer.seek(9 * MIB)
            writer.write(b"changed")
        os.posix_fadvise(reader.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        reader.seek(9 * MIB)
        assert reader.read(7) == b"changed"
    machine.flush()
    assert bucket.get(NAME) == body[: 9 * MIB] + b"changed" + body[9 * MIB + 7 :]
    machine.umount()
