"""Swamp works in a mounted ``.swamp`` as on a local disk, and other machines only ever see whole versions.

What swamp does is done step by step as ``spec/swamp-data-model.md`` §4 and §7 say, once in a mount and once in a plain
directory, while another machine looks.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import sqlite3
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from tests.datastores import check_bucket, load_shards
from tests.harness import tree

MODEL = "data/acme/probe/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"

MOMENT_S = 0.3


class Swamp:
    """One swamp process, in the directory that is its ``.swamp``."""

    def __init__(self, root, pause=lambda: None):
        self.root, self.model, self.pause = root, root / MODEL, pause
        self.model.mkdir(parents=True, exist_ok=True)
        self.catalog = sqlite3.connect(root / "data/_catalog.db", timeout=5)
        self.catalog.execute("PRAGMA journal_mode=WAL")
        self.catalog.execute("CREATE TABLE catalog (name, version, is_latest, PRIMARY KEY (name, version))")

    @contextmanager
    def locked(self):
        lock = self.model / ".lock"
        info = {"holder": "u@h", "hostname": os.uname().nodename, "pid": os.getpid(), "ttlMs": 30_000}
        with open(lock, "x") as file:
            json.dump({**info, "acquiredAt": now(), "nonce": str(uuid.uuid4())}, file, indent=2)
        assert [path.name for path in self.root.rglob("*.lock")] == [".lock"], "the scan of a structural command"
        lock.write_text(json.dumps({**info, "acquiredAt": now(), "nonce": "beat"}))  # in place
        try:
            yield
        finally:
            lock.unlink()

    def put(self, path, body):
        """Written beside, then renamed over."""
        temporary = path.parent / f".{uuid.uuid4()}.tmp"
        temporary.write_bytes(body)
        temporary.rename(path)

    def allocate(self, name):
        directory = self.model / name
        directory.mkdir(parents=True, exist_ok=True)
        number = max(self.versions(name), default=0) + 1
        os.mkdir(directory / str(number))
        return number

    def versions(self, name):
        return sorted(int(entry.name) for entry in os.scandir(self.model / name) if entry.is_dir())

    def set_latest(self, name, number):
        marker = self.model / name / "latest"
        marker.unlink(missing_ok=True)
        self.pause()
        self.put(marker, str(number).encode())
        with self.catalog:
            self.catalog.execute("UPDATE catalog SET is_latest = 0 WHERE name = ?", (name,))
            self.catalog.execute("INSERT OR REPLACE INTO catalog VALUES (?, ?, 1)", (name, number))

    def describe(self, name, number, *, checksum):
        raw = (self.model / name / str(number) / "raw").read_bytes()
        document = {"name": name, "version": number, "size": len(raw), "streaming": not checksum}
        if checksum:
            document["checksum"] = hashlib.sha256(raw).hexdigest()
        self.put(self.model / name / str(number) / "metadata.yaml", json.dumps(document).encode())

    def save(self, name, body):
        number = self.allocate(name)
        directory = self.model / name / str(number)
        document = {"name": name, "version": number, "size": len(body), "checksum": hashlib.sha256(body).hexdigest()}
        self.put(directory / "metadata.yaml", json.dumps(document).encode())
        self.pause()
        self.put(directory / "raw", body)
        self.set_latest(name, number)
        return number

    def stream(self, name, chunks):
        number = self.allocate(name)
        with open(self.model / name / str(number) / "raw", "wb", buffering=0) as file:
            for chunk in chunks:
                file.write(chunk)
                self.pause()
        self.describe(name, number, checksum=True)
        self.set_latest(name, number)
        return number

    def append(self, name, chunk):
        number = int((self.model / name / "latest").read_text())
        with open(self.model / name / str(number) / "raw", "ab") as file:
            file.write(chunk)
        self.describe(name, number, checksum=False)
        return number

    def delete_version(self, name, number):
        shutil.rmtree(self.model / name / str(number))
        self.pause()
        left = self.versions(name)
        if left:
            self.set_latest(name, left[-1])
        else:
            self.delete(name)

    def delete(self, name):
        shutil.rmtree(self.model / name)
        with self.catalog:
            self.catalog.execute("DELETE FROM catalog WHERE name = ?", (name,))

    def rename(self, old, new):
        number = int((self.model / old / "latest").read_text())
        self.save(new, (self.model / old / str(number) / "raw").read_bytes())
        self.save(old, json.dumps({"renamedTo": new}).encode())

    def gc(self, name, keep):
        versions = self.versions(name)
        with ThreadPoolExecutor(20) as pool:
            list(pool.map(lambda number: shutil.rmtree(self.model / name / str(number)), versions[:-keep]))
        self.pause()
        self.set_latest(name, versions[-1])
        return versions[:-keep]

    def audit(self, line):
        (self.root / "audit").mkdir(exist_ok=True)
        with open(self.root / "audit/commands.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def names(self):
        return sorted(entry.name for entry in os.scandir(self.model) if entry.is_dir())


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())


def history(seed):
    """What a busy operator does, as calls."""
    dice, names, calls = random.Random(seed), {}, []
    for number in range(40):
        name = dice.choice("pqrst")
        versions = names.get(name, 0)
        what = dice.choice(["save", "save", "stream", "append", "delete_version", "delete", "rename", "gc"])
        if not versions or what == "save":
            calls.append(("save", name, f"content {number}".encode() * dice.randint(1, 400)))
            names[name] = versions + 1
        elif what == "stream":
            calls.append(("stream", name, [f"line {number}.{at}\n".encode() for at in range(5)]))
            names[name] = versions + 1
        elif what == "append":
            calls.append(("append", name, b"one more line\n"))
        elif what == "delete_version":
            calls.append(("delete_version", name, None))  # the highest
            names[name] = versions - 1
        elif what == "delete":
            calls.append(("delete", name))
            names[name] = 0
        elif what == "gc":
            calls.append(("gc", name, 1))
            names[name] = 1
        else:
            new = next((free for free in "uvwxyz" if not names.get(free)), None)
            if new is not None:
                calls.append(("rename", name, new))
                names[name], names[new] = versions + 1, 1
    return calls


def run(swamp, calls):
    """Each call under the model's lock; returns what they said and what was seen after each."""
    said = []
    for number, (what, *arguments) in enumerate(calls):
        with swamp.locked():
            if what == "delete_version":
                arguments[1] = swamp.versions(arguments[0])[-1]
            said.append((getattr(swamp, what)(*arguments), swamp.names()))
        swamp.audit({"number": number, "did": what})
    return said


class Watcher(threading.Thread):
    """Another machine: reads ``latest`` of every name, and what it shows, all the time."""

    def __init__(self, root):
        super().__init__(daemon=True)
        self.model, self.looks, self.seen, self.wrong = root / MODEL, 0, set(), []
        self.done = threading.Event()

    def run(self):
        while not self.done.is_set():
            for name in self.listed():
                self.look(name)
            self.looks += 1

    def listed(self):
        try:
            return os.listdir(self.model)
        except OSError:
            return []

    def look(self, name):
        """What is wrong for a moment changed while we looked; what stays wrong was published so."""
        until = time.monotonic() + MOMENT_S
        while (problem := self.problem(name)) is not None:
            if time.monotonic() > until:
                self.wrong.append((name, problem))
                return
            time.sleep(0.01)

    def problem(self, name):
        directory = self.model / name
        try:
            marker = (directory / "latest").read_bytes().decode()
        except OSError as error:
            # A name that is being removed is not listed any more; one without a marker would be.
            return f"latest: {error}" if name in self.listed() else None
        try:
            document = json.loads((directory / marker / "metadata.yaml").read_bytes())
            raw = (directory / marker / "raw").read_bytes()
        except (OSError, ValueError) as error:
            return f"{marker}: {error}"
        if "checksum" in document and document["checksum"] != hashlib.sha256(raw).hexdigest():
            return f"{marker}: metadata and content are of different versions"
        self.seen.add((name, marker))
        return None


@pytest.fixture
def repo(home, bucket):
    directory = home / "repo"
    (directory / ".swamp").mkdir(parents=True)
    location, prefix = bucket.url.removeprefix("s3://").split("/", 1)
    (directory / ".swamp.yaml").write_text(
        f"swampVersion: '1'\nrepoId: r\ndatastore:\n  type: '@swamp/s3-datastore'\n"
        f"  config: {{bucket: '{location}', prefix: '{prefix}'}}\n"
    )
    load_shards(bucket, [("audit/before.jsonl", b"{}\n")])
    return directory


def test_swamp_works_in_a_mount_as_on_a_disk_and_others_see_whole_versions(repo, bucket, fleet, tmp_path):
    a = fleet.machine("a", bucket.env)
    a.mountpoint = repo / ".swamp"
    a.run("mount", str(repo), "--state-dir", str(a.state_dir), "--push-delay", "50ms", "--refresh", "200ms")
    b = fleet.machine("b", bucket.env, options=("--refresh", "50ms"))
    b.mount(bucket.url)
    watcher = Watcher(b.path)
    watcher.start()
    calls, dice = history(5), random.Random(6)
    try:
        # Nothing is waited for here: now and then swamp itself is slow between two steps, for longer than a moment and
        # the push delay. What is half done then is pushed meanwhile, or must not be.
        mounted = Swamp(a.path, lambda: time.sleep(3 * MOMENT_S) if dice.random() < 0.08 else None)
        said = run(mounted, calls)
        a.flush()
        time.sleep(0.2)
    finally:
        watcher.done.set()
        watcher.join()
    (tmp_path / "audit").mkdir()
    (tmp_path / "audit/before.jsonl").write_bytes(b"{}\n")
    plain = Swamp(tmp_path)
    assert said == run(plain, calls)
    rows = "SELECT * FROM catalog ORDER BY name, version"
    assert mounted.catalog.execute(rows).fetchall() == plain.catalog.execute(rows).fetchall()
    mounted.catalog.close()
    plain.catalog.close()
    wanted = {path: body for path, body in tree(tmp_path).items() if "_catalog.db" not in path}
    assert {path: body for path, body in tree(a.path).items() if "_catalog.db" not in path} == wanted
    assert watcher.wrong == []
    assert watcher.looks > 10 and len(watcher.seen) > 10, "the other machine looked while it happened"
    a.umount()
    assert sorted(check_bucket(bucket)) == sorted(wanted), "no lock, no temporary file, no database left the machine"
    assert (repo / ".swamp/data/_catalog.db").exists()
