"""A mount as a service: it says when it is ready, and the same command starts it again after it died."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import pytest

from tests.datastores import load_shards
from tests.harness import REPO, wait_for


@pytest.fixture
def manager(tmp_path):
    """The socket a service manager listens on."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.settimeout(30)
        yield listener


def start(machine, source, manager):
    return subprocess.Popen(
        [sys.executable, "-m", "swampfs", "mount", "-f", source, str(machine.path), "--state-dir", machine.state_dir],
        env={**machine.environment(), "NOTIFY_SOCKET": manager.getsockname()}, stderr=subprocess.PIPE, cwd=machine.home,
    )  # fmt: skip


def test_a_service_says_when_it_is_ready_and_is_started_again_after_it_died(bucket, fleet, manager):
    load_shards(bucket, [("files/a", b"a")])
    machine = fleet.machine("a", bucket.env)
    first = start(machine, bucket.url, manager)
    assert manager.recv(4096).startswith(b"READY=1\nSTATUS=s3://")
    (machine.path / "files/new").write_bytes(b"new")
    first.kill()
    first.communicate()
    second = start(machine, bucket.url, manager)  # what Restart=on-failure does
    assert manager.recv(4096).startswith(b"READY=1")
    assert (machine.path / "files/new").read_bytes() == b"new"
    second.send_signal(signal.SIGTERM)
    assert manager.recv(4096) == b"STOPPING=1"
    _, said = second.communicate(timeout=30)
    assert second.returncode == 0, said
    assert not machine.is_mounted()
    assert bucket.get("files/new") == b"new"


def test_the_unit_in_the_documentation_is_one(tmp_path):
    text = (REPO / "docs/operations.md").read_text()
    unit = re.search(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", text, re.DOTALL)
    assert unit is not None
    assert {"Type=notify", "Restart=on-failure"} <= set(unit[2].splitlines())
    options = set(re.findall(r"--[a-z-]+", unit[2]))
    known = subprocess.run([sys.executable, "-m", "swampfs", "mount", "--help"], capture_output=True, text=True).stdout
    assert all(option in known for option in options)
    if shutil.which("systemd-analyze"):
        path = tmp_path / unit[1]
        path.write_text(unit[2].replace("/usr/local/bin/swampfs", os.path.realpath(sys.executable)))
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", path], capture_output=True, text=True)
        assert str(path) not in done.stderr, done.stderr


def test_a_mount_that_ends_well_leaves_no_process(bucket, fleet, manager):
    load_shards(bucket, [("files/a", b"a")])
    machine = fleet.machine("a", bucket.env)
    service = start(machine, bucket.url, manager)
    assert manager.recv(4096).startswith(b"READY=1")
    machine.umount()  # what ExecStop= does
    wait_for(lambda: service.poll() is not None, "it ends with its mount")
    assert service.returncode == 0
    service.communicate()
