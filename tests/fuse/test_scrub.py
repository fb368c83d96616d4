"""Content that rots on this machine's disk is found and fetched again."""

from __future__ import annotations

import os

import pytest

from tests.datastores import check_bucket, load_shards
from tests.harness import wait_for

FILES = {f"files/{name}": f"content of {name}".encode() * 100 for name in "abc"}


@pytest.fixture
def machine(bucket, fleet):
    load_shards(bucket, FILES.items())
    machine = fleet.machine("a", bucket.env, options=("--scrub", "300ms", "--refresh", "300ms", "--push-delay", "1h"))
    machine.mount(bucket.url)
    for path in FILES:
        (machine.path / path).read_bytes()
    return machine


def rot(machine, path):
    """One byte of the file on disk is another, and nothing else has changed."""
    there = machine.state_dir / "files" / path
    found = os.stat(there)
    with open(there, "r+b") as file:
        file.seek(50)
        file.write(b"\0")
    os.utime(there, ns=(found.st_atime_ns, found.st_mtime_ns))


def test_damaged_content_is_fetched_again_and_no_page_of_it_is_served(machine, fleet):
    fleet.expected_log.append("was damaged on this machine's disk")
    rot(machine, "files/b")
    wait_for(lambda: machine.status()["scrub"]["damaged"] == 1, "it is found")
    assert machine.status()["scrub"]["last_damaged"] == "files/b"
    machine.clear_requests()
    assert (machine.path / "files/b").read_bytes() == FILES["files/b"], "though the kernel had it in its cache"
    assert [request["op"] for request in machine.requests() if request["op"] == "download"] == ["download"]
    assert (machine.path / "files/a").read_bytes() == FILES["files/a"]
    before = machine.status()["scrub"]["passes"]
    wait_for(lambda: machine.status()["scrub"]["passes"] > before + 1, "and it goes on looking")
    assert machine.status()["scrub"]["damaged"] == 1


def test_what_was_changed_here_is_never_taken_for_damaged(machine, bucket):
    (machine.path / "files/a").write_bytes(b"changed here")
    with open(machine.path / "files/b", "r+b", buffering=0) as file:
        file.write(b"half")
        before = machine.status()["scrub"]["passes"]
        wait_for(lambda: machine.status()["scrub"]["passes"] > before + 1, "it has looked")
        file.write(b" done")
    machine.flush()
    assert machine.status()["scrub"]["damaged"] == 0
    machine.umount()
    left = check_bucket(bucket)
    assert left["files/a"] == b"changed here"
    assert left["files/b"].startswith(b"half done")
