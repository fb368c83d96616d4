"""``kill -9`` at every step that leaves something on a disk or in the datastore, and at random moments.

What a system call acknowledged is there after the next mount; what was under way is there as before or as after, and
after the next push the datastore holds exactly what the mount shows. ``SWAMPFS_KILLS`` (default 10) says how many
random kills.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.datastores import check_bucket, load_shards
from tests.fault import crash_load

KILLS = int(os.environ.get("SWAMPFS_KILLS", "10"))
SITE = Path(__file__).parent / "crash_site"
OPTIONS = ("--refresh", "300ms", "--push-delay", "1h", "--lock-ttl", "2s", "--timeout", "10s")
MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9/n"
FILES = {
    f"{MODEL}/1/raw": b"one",
    f"{MODEL}/1/metadata.yaml": b"a: 1\n",
    f"{MODEL}/latest": b"1",
    "audit/log.jsonl": b"first\n",
    "files/old": b"old",
    "files/gone": b"gone",
    "files/target": b"target",
    "files/long": b"0123456789",
    "outputs/d/x": b"x",
    "outputs/d/e/y": b"y",
}

LARGE = b"large" * 20_000  # more than goes without a copy on the disk
JOURNAL, CATALOG = "swampfs.state.journal:Journal.", "swampfs.state.catalog:Catalog."
CACHE, SIDECAR = "swampfs.state.cache_dir:CacheDir.", "swampfs.state.sidecar:Sidecar."
STORE = "swampfs.backends.s3:S3Store."
BOTH = ("before", "after")
POINTS = [
    # What a writer does on this machine.
    *[(when, JOURNAL + "_put", "files/new") for when in BOTH],
    *[(when, SIDECAR + "mark_bulk", "") for when in BOTH],
    *[(when, CACHE + "create", "files/new") for when in BOTH],
    *[(when, CATALOG + "add", "new") for when in BOTH],
    *[(when, CATALOG + "set_content", "") for when in BOTH],
    *[(when, JOURNAL + "mark_delete", "files/gone") for when in BOTH],
    *[(when, CACHE + "remove", "files/gone") for when in BOTH],
    *[(when, CATALOG + "remove", "files/gone") for when in BOTH],
    *[(when, JOURNAL + "mark_rename", "files/old") for when in BOTH],
    *[(when, CACHE + "rename", "files/old") for when in BOTH],
    *[(when, CATALOG + "move", "files/old") for when in BOTH],
    *[(when, JOURNAL + "settle", "files/old") for when in BOTH],
    ("after", JOURNAL + "mark_rename", "outputs/d"),
    ("after", CACHE + "rename", "outputs/d"),
    *[(when, JOURNAL + "mark_attributes", "files/long") for when in BOTH],
    ("after", CACHE + "orphan", "files/target"),
    ("after", CACHE + "link", ""),
    # What a reader does.
    ("after", STORE + "download", "audit/log.jsonl"),
    *[(when, CACHE + "admit", "audit/log.jsonl") for when in BOTH],
    ("after", CATALOG + "set_residency", ""),
    # What a push does.
    ("after", JOURNAL + "seal", ""),
    *[(when, CACHE + "small", "files/new") for when in BOTH],
    *[(when, CACHE + "snapshot", "files/large") for when in BOTH],
    ("after", JOURNAL + "note_sent", "files/new"),
    *[(when, STORE + "put", "/files/new") for when in BOTH],
    *[(when, STORE + "put", "/latest") for when in BOTH],
    *[(when, STORE + "put", "_index/files.json") for when in BOTH],
    *[(when, STORE + "put", "_index/_meta.json") for when in BOTH],
    *[(when, STORE + "delete", "/files/gone") for when in BOTH],
    *[(when, CATALOG + "settle", "files/new") for when in BOTH],
    ("after", CATALOG + "sync", ""),
    *[(when, JOURNAL + "retire", "files/new") for when in BOTH],
    *[(when, SIDECAR + "mark_clean", "") for when in BOTH],
    # Locks.
    *[(when, STORE + "put", "/.lock") for when in BOTH],
    *[(when, STORE + "delete", "/.lock") for when in BOTH],
    *[(when, STORE + "delete", ".datastore.lock") for when in BOTH],
    # Following others, and starting.
    *[(when, "swampfs.sync.pull:apply_delta", "") for when in BOTH],
]


def mount(machine, source, point=()):
    """With a point to die at, or without."""
    env = machine.env
    if point:
        mark = {"SWAMPFS_TEST_CRASH": " ".join(point), "SWAMPFS_TEST_CRASHED": str(died(machine))}
        machine.env = {**env, "PYTHONPATH": str(SITE), **mark}
    try:
        return machine.mount(source, check=not point).returncode == 0
    finally:
        machine.env = env


def died(machine):
    """Exists once the process was killed at its point."""
    return machine.home / "died"


class Dead(Exception):
    """The mount is."""


class Script:
    """Steps a user takes, and what must be there after each."""

    def __init__(self, root):
        self.root = root
        self.expected = dict(FILES)
        self.allowed = [dict(FILES)]

    def step(self, act, after, *halves):
        """``after`` is the tree once ``act`` is acknowledged; ``halves`` are others it may leave if it is not."""
        self.allowed = [self.expected, after, *halves]
        try:
            act()
        except OSError:
            raise Dead from None
        self.expected, self.allowed = after, [after]

    def write(self, path, body):
        before = {key: value for key, value in self.expected.items() if key != path}
        parts = [{**before, path: body[:size]} for size in (range(len(body)) if len(body) < 100 else (0,))]
        self.step(lambda: (self.root / path).write_bytes(body), {**before, path: body}, *parts)

    def append(self, path, body):
        def act():
            with open(self.root / path, "ab", buffering=0) as file:
                file.write(body)

        self.step(act, {**self.expected, path: self.expected.get(path, b"") + body})

    def remove(self, path):
        after = {key: value for key, value in self.expected.items() if key != path}
        self.step(lambda: (self.root / path).unlink(), after)

    def rename(self, source, target):
        after = {}
        for key, value in self.expected.items():
            if key != target:
                after[target + key[len(source) :] if key == source or key.startswith(source + "/") else key] = value
        self.step(lambda: (self.root / source).rename(self.root / target), after)

    def plain(self, act):
        """Something that changes no content."""
        self.step(act, dict(self.expected))

    def all(self, flush):
        root = self.root
        self.write("files/new", b"new content")
        self.write("files/large", LARGE)
        self.remove("files/gone")
        self.append("audit/log.jsonl", b"second\n")
        self.rename("files/old", "files/older")
        self.rename("outputs/d", "outputs/f")
        self.plain(lambda: (root / "files/long").chmod(0o755))
        self.step(lambda: os.truncate(root / "files/long", 4), {**self.expected, "files/long": b"0123"})
        self.plain(lambda: (root / f"{MODEL}/2").mkdir())
        self.write(f"{MODEL}/2/raw", b"two, longer")
        self.remove(f"{MODEL}/latest")
        self.write(f"{MODEL}/latest", b"2")
        self.write("files/.target.tmp", b"replaced")
        with open(root / "files/target", "rb"):  # so that what is replaced must live on
            self.rename("files/.target.tmp", "files/target")
        linked = {**self.expected, "files/linked": b"replaced"}
        self.step(lambda: os.link(root / "files/target", root / "files/linked"), linked)
        self.plain(flush)
        self.write("files/new", b"newer")
        self.remove(f"{MODEL}/1/raw")
        self.plain(flush)


def contents(root):
    """Every file a user would see."""
    found = {}
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory) / name
            found[str(path.relative_to(root))] = path.read_bytes()
    return found


def flush(machine):
    done = machine.run("flush", str(machine.path), check=False)
    if done.returncode:
        raise OSError("the mount is dead")


def check_state_dir(machine):
    """Nothing is left of what was under way."""
    assert list((machine.state_dir / "staging").iterdir()) == []


@pytest.mark.parametrize("point", POINTS, ids=lambda point: "-".join(point).replace("swampfs.", ""))
def test_a_death_at_any_step_loses_nothing_and_leaves_nothing(point, bucket, fleet):
    load_shards(bucket, FILES.items())
    machine = fleet.machine("a", bucket.env, options=OPTIONS)
    script = Script(machine.path)
    if mount(machine, bucket.url, point):
        with contextlib.suppress(Dead):
            script.all(lambda: flush(machine))
            machine.run("umount", str(machine.path), check=False)
    assert died(machine).exists(), "the point was never reached"
    mount(machine, bucket.url)
    left = contents(machine.path)
    assert left in script.allowed
    machine.flush()
    assert check_data(bucket) == left
    check_state_dir(machine)
    machine.umount()
    check_bucket(bucket)


def check_data(bucket):
    """Content by path, locks aside: those of the dead may have some seconds to live."""
    internal = ("_index/", "_control/", ".datastore")
    return {key: bucket.get(key) for key in bucket.keys() if not key.startswith(internal) and not key.endswith(".lock")}


# --- at random moments --------------------------------------------------------------------------------------


class Worker:
    """A process that works until its mount dies, and what must be there then."""

    def __init__(self, machine, seed):
        self.root, self.seed = machine.path, seed
        self.log = machine.home / f"worker-{seed}.log"
        self.state = {}

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.fault.crash_load", str(self.root), str(self.log), str(self.seed)],
            stdin=subprocess.PIPE,
        )
        self.process.stdin.write(json.dumps(self.state).encode())
        self.process.stdin.close()

    def check(self):
        """After the next mount. Returns how many steps had been acknowledged."""
        self.process.wait(20)
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        under_way = {}
        for line in lines:
            if line == "ok":
                self.state.update(under_way)
                under_way = {}
            elif "ended" not in line:
                under_way = line
        found = {}
        for path in {*crash_load.paths(self.seed), *self.state, *under_way}:
            there = self.root / path
            found[path] = there.read_text() if there.exists() else None
            was, becomes = self.state.get(path), under_way.get(path)
            if found[path] == was or (path in under_way and found[path] == becomes):
                continue
            # A write that was not closed: any part of it, from the start.
            assert path in under_way and found[path] is not None and (becomes or "").startswith(found[path]), path
        moved = [found[path] for path in under_way]
        assert not under_way or any(moved) or not any(self.state.get(path) for path in under_way) or len(moved) == 1
        self.state = {path: body for path, body in found.items() if body is not None}
        return lines.count("ok")


@pytest.mark.timeout(120 + KILLS * 10)
def test_deaths_at_random_moments_lose_nothing_that_was_acknowledged(bucket, fleet):
    machine = fleet.machine("a", bucket.env, options=("--push-delay", "100ms", "--refresh", "300ms", *OPTIONS[4:]))
    workers = [Worker(machine, seed) for seed in range(3)]
    steps = 0
    for kill in range(KILLS):
        machine.mount(bucket.url)
        if kill:
            steps += sum(worker.check() for worker in workers)
        for worker in workers:
            worker.start()
        time.sleep(random.uniform(0.02, 1.5))  # the moment of the kill is what is tested
        machine.kill()
    machine.mount(bucket.url)
    steps += sum(worker.check() for worker in workers)
    assert steps >= KILLS
    machine.flush()
    check_state_dir(machine)
    machine.umount()
    expected = {path: body.encode() for worker in workers for path, body in worker.state.items()}
    assert check_bucket(bucket) == expected
    print(f"{KILLS} deaths, {steps} steps acknowledged")
