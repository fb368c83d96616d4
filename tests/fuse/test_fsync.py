"""``fsync``: durable on this machine at once, and with ``--fsync remote`` in the datastore before it returns."""

from __future__ import annotations

import errno
import os
import time

import pytest

from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import indexed

REMOTE = ("--fsync", "remote", "--refresh", "300ms", "--push-delay", "1h", "--timeout", "2s")


@pytest.fixture
def machine(bucket, fleet):
    machine = fleet.machine("a", bucket.env, options=REMOTE)
    machine.mount(bucket.url)
    (machine.path / "files").mkdir()
    return machine


def published(bucket):
    """What others see: the index, and the objects it names."""
    return {path: bucket.get(path) for path in indexed(bucket)}


def synced(path, flags=os.O_RDONLY):
    fd = os.open(path, flags)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def test_with_fsync_remote_an_fsync_returns_when_the_file_is_in_the_datastore(machine, bucket):
    with open(machine.path / "files/a", "wb", buffering=0) as file:
        file.write(b"one")
        os.fsync(file.fileno())
        assert published(bucket)["files/a"] == b"one", "though it is still open"
        file.write(b", two")
        os.fdatasync(file.fileno())
        assert published(bucket)["files/a"] == b"one, two"
    (machine.path / "files/b").write_bytes(b"b")
    assert "files/b" not in published(bucket), "nobody asked"
    synced(machine.path / "files/b")  # also through a descriptor that cannot write
    assert published(bucket)["files/b"] == b"b"


def test_with_fsync_remote_an_fsync_of_a_directory_publishes_what_was_renamed_and_removed_in_it(machine, bucket):
    (machine.path / "files/old").write_bytes(b"old")
    synced(machine.path / "files/old")
    (machine.path / "files/.new.tmp").write_bytes(b"new")
    os.rename(machine.path / "files/.new.tmp", machine.path / "files/new")
    os.unlink(machine.path / "files/old")
    synced(machine.path / "files", os.O_DIRECTORY)
    assert published(bucket) == {"files/new": b"new"}


def test_with_fsync_remote_and_no_datastore_fsync_fails_in_time_and_the_bytes_are_kept(bucket, server, fleet):
    proxy = FaultProxy(server.endpoint)
    machine = fleet.machine("a", {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}, options=REMOTE)
    machine.mount(bucket.url)
    (machine.path / "files").mkdir()
    proxy.set(Fault.BLACK_HOLE)
    with open(machine.path / "files/a", "wb", buffering=0) as file:
        file.write(b"kept")
        began = time.monotonic()
        with pytest.raises(OSError) as caught:
            os.fsync(file.fileno())
        assert caught.value.errno == errno.ETIMEDOUT
        assert time.monotonic() - began < 4
    machine.kill()
    proxy.set(None)
    machine.mount(bucket.url)
    synced(machine.path / "files/a")
    assert published(bucket)["files/a"] == b"kept"
    machine.umount()
    proxy.close()


def test_an_fsync_of_this_machine_alone_asks_the_datastore_nothing(bucket, fleet):
    machine = fleet.machine("a", bucket.env, options=("--refresh", "1h", "--push-delay", "1h"))
    machine.mount(bucket.url)
    (machine.path / "files").mkdir()
    with open(machine.path / "files/a", "wb", buffering=0) as file:
        file.write(b"one")
        machine.clear_requests()
        os.fsync(file.fileno())
    synced(machine.path / "files", os.O_DIRECTORY)
    assert machine.requests() == []
