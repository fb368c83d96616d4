"""What a monitoring system reads of a mount."""

from __future__ import annotations

import os
import re
import socket
import urllib.error
import urllib.request

import pytest

from swampfs import metrics
from tests.datastores import load_shards
from tests.harness import wait_for

SAMPLE = re.compile(r'^(swampfs_\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\.)*",?)*)\})? (-?[0-9.e+]+)$')


@pytest.fixture
def port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def samples(text):
    """Name and labels → value; every line is in the format, and of a family that was announced."""
    found, families = {}, set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            assert re.fullmatch(r"# TYPE swampfs_\w+ (gauge|counter)", line), line
            assert line.split()[2] not in families, "announced twice"
            families.add(line.split()[2])
        elif not line.startswith("# HELP"):
            match = SAMPLE.fullmatch(line)
            assert match, line
            assert match[1] in families, line
            found[match[1], match[2] or ""] = float(match[3])
    return found


def scraped(port, path="/metrics"):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        return answer.read().decode()


def test_a_mount_is_watched_through_its_port_and_its_file(bucket, fleet, port):
    load_shards(bucket, [("files/one", b"1"), ("files/two", b"22")])
    machine = fleet.machine("a", bucket.env, options=("--push-delay", "1h", "--metrics-port", str(port)))
    machine.mount(bucket.url)
    (machine.path / "files/one").read_bytes()
    (machine.path / "files/new").write_text("new")
    told = samples(scraped(port))
    assert told["swampfs_healthy", ""] == 1
    assert told["swampfs_files", ""] == 3
    assert told["swampfs_files_here", ""] >= 2
    assert told["swampfs_changes_pending", ""] == 1
    assert told["swampfs_requests_total", 'operation="get"'] >= 2
    assert any(name == "swampfs_upcalls_total" for name, _ in told)
    assert f'mountpoint="{machine.mountpoint}"' in next(labels for name, labels in told if name == "swampfs_info")
    filed = samples((machine.path / ".swampfs/metrics").read_text())
    assert filed.keys() >= told.keys()
    machine.flush()
    wait_for(lambda: samples(scraped(port))["swampfs_changes_pending", ""] == 0, "it is pushed")


def test_whoever_asks_for_something_else_or_for_nothing_harms_nobody(bucket, fleet, port):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env, options=("--metrics-port", str(port)))
    machine.mount(bucket.url)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        scraped(port, "/")
    with socket.create_connection(("127.0.0.1", port)) as silent, socket.create_connection(("127.0.0.1", port)) as rude:
        rude.sendall(b"x" * 100_000)
        silent.sendall(b"GET /metr")
        assert samples(scraped(port))
    with socket.create_connection(("127.0.0.1", port)) as poster:
        poster.sendall(b"POST /metrics HTTP/1.1\r\n\r\n")
        assert poster.recv(100).startswith(b"HTTP/1.1 405")
    assert (machine.path / "files/one").read_text() == "1"


def test_a_port_that_is_taken_is_said_and_nothing_is_mounted(bucket, fleet, port):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env)
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        done = machine.mount(bucket.url, "--metrics-port", str(port), check=False)
    assert done.returncode == 1
    assert f"127.0.0.1:{port}" in done.stderr
    assert "--metrics-port" in done.stderr
    assert not machine.is_mounted()


def test_many_idle_connections_take_nothing_from_the_mount(bucket, fleet, port):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env, options=("--metrics-port", str(port)))
    machine.mount(bucket.url)
    before = len(os.listdir(f"/proc/{machine.pid()}/fd"))
    idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(100)]
    wait_for(lambda: len(os.listdir(f"/proc/{machine.pid()}/fd")) <= before + 10, "most are sent away")
    for one in idle:
        one.close()
    wait_for(lambda: _answers(port), "others are answered again")


def _answers(port):
    try:
        return samples(scraped(port))
    except OSError:
        return None


def test_large_numbers_are_told_to_their_last_digit(bucket, fleet):
    load_shards(bucket, [("files/one", b"1")])
    machine = fleet.machine("a", bucket.env)
    machine.mount(bucket.url)
    status = machine.status()
    status["requests"], status["cache"]["bytes"] = {"get": 1_234_567}, 307_232_769
    text = metrics.render(status)
    assert 'swampfs_requests_total{operation="get"} 1234567\n' in text
    assert "swampfs_cache_bytes 307232769\n" in text
