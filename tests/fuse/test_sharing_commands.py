"""Commands about other machines: conflicts, locks; and what a mount says of itself in ``.swampfs/``."""

from __future__ import annotations

import json
import os
import subprocess
import time

import pytest

from swampfs.fs.links import TOPS
from tests.datastores import check_bucket, load_shards
from tests.fuse.test_locks import FILES, LOCK, MODEL, record
from tests.harness import wait_for

RAW = f"{MODEL}/n/1/raw"
SLOW = ("--refresh", "1h", "--push-delay", "1h")


@pytest.fixture
def conflict(bucket, fleet, network):
    """A machine whose offline edit lost against another's."""
    load_shards(bucket, FILES)
    way = network()
    a = fleet.machine("a", bucket.env, options=SLOW)
    b = fleet.machine("b", {**bucket.env, "AWS_ENDPOINT_URL_S3": way.url}, options=SLOW)
    a.mount(bucket.url)
    b.mount(bucket.url)
    way.cut()
    (b.path / RAW).write_text("from B")
    (a.path / RAW).write_text("from A")
    a.flush()
    a.umount()
    way.mend()
    b.flush()
    yield b
    b.umount()


def conflicts(machine):
    return json.loads(machine.run("conflicts", "list", "--json", str(machine.mountpoint)).stdout)["conflicts"]


def test_a_conflict_is_listed_shown_and_resolved_for_our_version(conflict, bucket):
    (one,) = conflicts(conflict)
    assert (one["path"], one["operation"], one["size"]) == (RAW, "write", len("from B"))
    assert RAW in conflict.run("conflicts", "list", str(conflict.mountpoint)).stdout
    assert conflict.run("conflicts", "show", one["id"][:6]).stdout == "from B"
    assert (conflict.path / RAW).read_text() == "from A"
    conflict.run("conflicts", "resolve", one["id"], "--keep", "ours")
    assert (conflict.path / RAW).read_text() == "from B"
    assert conflicts(conflict) == []
    conflict.flush()
    assert check_bucket(bucket)[RAW] == b"from B"


def test_a_conflict_resolved_for_theirs_leaves_the_tree_as_it_is(conflict, bucket):
    (one,) = conflicts(conflict)
    conflict.run("conflicts", "resolve", one["id"], "--keep", "theirs")
    assert conflicts(conflict) == []
    assert (conflict.path / RAW).read_text() == "from A"
    done = conflict.run("conflicts", "resolve", one["id"], "--keep", "theirs", check=False)
    assert done.returncode == 1 and "there is no conflict" in done.stderr and done.stderr.count("\n") == 1


@pytest.fixture
def shell(bucket, fleet):
    load_shards(bucket, FILES)
    return fleet.machine("shell", bucket.env)


def test_locks_are_shown_and_broken_from_the_command_line(shell, bucket):
    free = shell.run("lock", "status", "--source", bucket.url)
    assert free.stdout == "global: free\n"
    bucket.put(LOCK, record("n-1"))
    bucket.put(".datastore.lock", record("n-2"))
    text = shell.run("lock", "status", "--json", "--source", bucket.url).stdout
    decoder, documents = json.JSONDecoder(), []
    while text.strip():
        document, end = decoder.raw_decode(text.lstrip())
        text = text.lstrip()[end:]
        documents.append(document)
    assert [(d["lockScope"], d["held"], d["info"]["nonce"]) for d in documents] == [
        (LOCK, True, "n-1"),
        ("global", True, "n-2"),
    ]
    model = LOCK.removeprefix("data/").removesuffix("/.lock")
    refused = shell.run("lock", "release", "--model", model, "--source", bucket.url, check=False)
    assert refused.returncode == 1 and LOCK in bucket.keys()
    done = shell.run("lock", "release", "--force", "--model", model, "--json", "--source", bucket.url)
    assert json.loads(done.stdout)["previousHolder"]["nonce"] == "n-1"
    assert LOCK not in bucket.keys() and ".datastore.lock" in bucket.keys()
    again = shell.run("lock", "release", "--force", "--model", model, "--source", bucket.url)
    assert again.stdout == "not released: not held\n"


def test_a_command_runs_under_a_models_lock_and_writes_through_a_mount(shell, bucket):
    shell.mount(bucket.url)
    model = LOCK.removeprefix("data/").removesuffix("/.lock")
    script = f"cat {shell.path / LOCK} > /dev/null && echo under it > {shell.path / RAW}; exit 7"
    done = shell.run("lock", "run", "--source", bucket.url, model, "--", "sh", "-c", script, check=False)
    assert done.returncode == 7, done.stderr
    shell.flush()
    assert check_bucket(bucket)[RAW] == b"under it\n"
    shell.umount()


def test_a_held_lock_ends_lock_run_with_75_and_the_holder(shell, bucket):
    bucket.put(LOCK, record())
    shell.env["SWAMP_LOCK_TIMEOUT_MS"] = "500"
    model = LOCK.removeprefix("data/").removesuffix("/.lock")
    done = shell.run("lock", "run", "--source", bucket.url, model, "--", "true", check=False)
    assert done.returncode == 75
    assert "somebody@elsewhere" in done.stderr and done.stderr.count("\n") == 1


def test_the_mount_says_in_swampfs_what_status_says_and_hides_it_from_listings(shell, bucket):
    shell.mount(bucket.url)
    assert ".swampfs" not in os.listdir(shell.path)
    files = {"errors", "locks", "metrics", "pending", "stats.json", "status.json"}
    assert set(os.listdir(shell.path / ".swampfs")) - set(TOPS) == files
    stats = json.loads((shell.path / ".swampfs/stats.json").read_text())
    assert stats["requests"]["get"] > 0
    (shell.path / RAW).write_text("changed")
    (held,) = map(json.loads, (shell.path / ".swampfs/locks").read_text().splitlines())
    assert (held["lock"], held["state"], held["by"]) == (LOCK, "held", "mount")
    status = json.loads((shell.path / ".swampfs/status.json").read_text())
    assert status["source"] == bucket.url and status["locks"][0]["lock"] == LOCK
    shell.flush()
    assert (shell.path / ".swampfs/locks").read_text() == (shell.path / ".swampfs/pending").read_text() == ""
    for attempt in (
        lambda: (shell.path / ".swampfs/locks").write_text("x"),
        lambda: (shell.path / ".swampfs/new").write_text("x"),
        lambda: (shell.path / ".swampfs/locks").unlink(),
        lambda: (shell.path / ".swampfs").rmdir(),
    ):
        with pytest.raises(OSError):
            attempt()
    found = subprocess.run(["find", "."], cwd=shell.path, capture_output=True, text=True, check=True).stdout
    assert "swampfs" not in found
    shell.umount()


def test_status_publishes_how_long_remote_commits_take_to_be_seen(bucket, fleet):
    load_shards(bucket, FILES)
    a, b = fleet.machine("a", bucket.env), fleet.machine("b", bucket.env)
    a.mount(bucket.url)
    b.mount(bucket.url)
    assert b.status()["visibilityMs"]["samples"] == 0
    slowest_ms = 0.0
    for turn in range(5):
        (a.path / RAW).write_text(f"turn {turn}")
        a.flush()
        committed = time.monotonic()
        wait_for(lambda turn=turn: (b.path / RAW).read_text() == f"turn {turn}", "the commit is seen")
        slowest_ms = max(slowest_ms, (time.monotonic() - committed) * 1000)
    published = b.status()["visibilityMs"]
    assert published["samples"] >= 5
    assert 0 < published["p50"] <= published["p99"]
    assert published["p99"] >= slowest_ms - 100  # an upper bound; reading the file took time, too
    a.umount()
    b.umount()
