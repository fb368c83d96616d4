"""Random work on three machines while they are killed, paused and cut off; the history is checked afterwards.

``SWAMPFS_HISTORY_S`` (seconds, default 30) and ``SWAMPFS_HISTORY_SEED`` rerun it longer, or as it was.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from swampfs import registry
from tests.datastores import check_bucket, load_shards
from tests.harness import wait_for
from tests.history import Event, History, Read, content, value_of

SECONDS = float(os.environ.get("SWAMPFS_HISTORY_S", "30"))
SEED = int(os.environ.get("SWAMPFS_HISTORY_SEED", str(int(time.time()))))
TTL_S = 3.0
LAG_S = 2.5  # refresh interval, push in progress, a busy test machine
MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
PATHS = [f"{MODEL}/n/1/raw", f"{MODEL}/n/latest", f"{MODEL}/m/1/raw", "files/a", "files/b", "audit/c.jsonl"]
OPTIONS = ("--refresh", "300ms", "--push-delay", "200ms", "--timeout", "5s", "--lock-ttl", f"{TTL_S}s")
SETTLED_S = 3 * TTL_S + 2  # after a fault: its own retries, and the locks of the dead

pytestmark = pytest.mark.timeout(SECONDS * 2 + 240)


class Client:
    """One machine and the one process that works on it."""

    def __init__(self, machine, way, seed, history):
        self.machine = machine
        self.way = way
        self.random = random.Random(seed)
        self.history = history
        self.numbers = itertools.count()
        self.failures = {}
        self.torn = []
        self.unpushed = []
        self.told = set()  # conflicts of earlier flushes
        self.at_work = threading.Lock()  # nobody works while the mount is down

    @property
    def name(self):
        return self.machine.name

    def event(self, path, value):
        event = Event(self.name, path, value, time.monotonic())
        self.history.events.append(event)
        return event

    def step(self):
        path = self.random.choice(PATHS)
        work = self.random.choices(
            [self.read, self.write, self.replace, self.append, self.remove, self.rename, self.flush],
            [40, 20, 10, 8, 6, 4, 12],
        )[0]
        try:
            work(path)
        except OSError as error:
            name = f"{work.__name__} {errno.errorcode.get(error.errno or 0, '?')}"
            self.failures[name] = self.failures.get(name, 0) + 1
            if error.errno == errno.ENOTCONN:
                time.sleep(0.1)

    def fresh(self):
        value = f"{self.name}-{next(self.numbers)}"
        return value, content(value, self.random.choice([0, 10, 5000, 200_000]))

    def look(self, path):
        """The value of a file; ``None`` if there is none."""
        try:
            return value_of((self.machine.path / path).read_bytes())
        except FileNotFoundError:
            return None
        except ValueError as error:
            self.torn.append(f"{self.name} {path}: {error}")
            raise OSError(errno.EIO, "torn") from None

    def read(self, path):
        started = time.monotonic()
        value = self.look(path)
        self.history.reads.append(Read(self.name, path, value, started, time.monotonic()))

    def finish(self, event):
        event.end = time.monotonic()
        self.unpushed.append(event)

    def write(self, path):
        """Replaces content in place: whoever opens it meanwhile on this machine may see half of it."""
        value, body = self.fresh()
        target = self.machine.path / path
        event = self.event(path, value)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(body)
        self.finish(event)

    def replace(self, path):
        value, body = self.fresh()
        target = self.machine.path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.swp")
        temporary.write_bytes(body)
        event = self.event(path, value)
        os.replace(temporary, target)
        self.finish(event)

    def append(self, path):
        """Read, modify, write through one handle: the lock is held from open to close."""
        value, body = self.fresh()
        event = self.event(path, value)
        with open(self.machine.path / path, "r+b") as file:
            value_of(file.read())
            file.seek(0)
            file.truncate()
            file.write(body)
        self.finish(event)

    def remove(self, path):
        event = self.event(path, None)
        try:
            (self.machine.path / path).unlink()
        except FileNotFoundError:
            self.history.events.remove(event)
            return
        self.finish(event)

    def rename(self, path):
        """Within the model, so that one lock covers both; the value gets another name."""
        source, target = self.random.sample(PATHS[:3], 2)
        value = self.look(source)
        if value is None:
            return
        events = [self.event(target, value), self.event(source, None)]
        try:
            os.rename(self.machine.path / source, self.machine.path / target)
        except FileNotFoundError:
            for event in events:
                self.history.events.remove(event)
            return
        for event in events:
            self.finish(event)
        # Another machine may have changed the source between the look and the rename: then that is what was moved.
        moved = self.look(target)
        if moved not in (value, None):
            again = self.event(target, moved)
            again.start = events[0].start
            self.finish(again)

    def flush(self, _path):
        """Publish; what became no conflict is established."""
        waiting = self.unpushed
        try:
            found = registry.find(self.machine.environment(), self.machine.mountpoint)
            answer = registry.request(found, {"cmd": "flush", "timeout": 4.0}, 8.0)
        except Exception:
            return
        if "error" in answer:
            return
        now = time.monotonic()
        self.unpushed = []
        conflicts = self.kept()
        lost = {json.loads(Path(name, "report.json").read_text())["path"] for name in conflicts - self.told}
        self.told = conflicts
        for event in waiting:
            if event.path not in lost:
                event.pushed = now

    def kept(self):
        return {str(path) for path in Path(self.machine.state_dir, "state", "conflicts").glob("*")}


class Trouble:
    """What happens to machines, one of them at a time."""

    def __init__(self, clients, history, url, seed):
        self.clients = clients
        self.history = history
        self.url = url
        self.random = random.Random(seed)
        self.done = {}

    def strike(self, stop):
        while not stop.is_set():
            client = self.random.choice(self.clients)
            what = self.random.choice([self.cut, self.silence, self.kill, self.pause])
            started = time.monotonic()
            try:
                what(client, self.random.choice([0.5, 2.0, 1.7 * TTL_S]), stop)
            finally:
                client.way.mend()
                self.history.faulty[client.name].append((started, time.monotonic() + SETTLED_S))
            self.done[what.__name__] = self.done.get(what.__name__, 0) + 1
            stop.wait(self.random.uniform(0.5, 3.0))

    def cut(self, client, seconds, stop):
        client.way.cut()
        stop.wait(seconds)

    def silence(self, client, seconds, stop):
        client.way.silent = True
        stop.wait(seconds)
        client.way.cut()  # who waits for an answer that was swallowed would wait for long

    def kill(self, client, seconds, stop):
        client.machine.kill()
        with client.at_work:  # whatever was under way has failed by then
            stop.wait(min(seconds, 2.0))
            client.machine.mount(self.url)

    def pause(self, client, seconds, stop):
        """Longer than the TTL: its locks expire while it believes to have them."""
        pid = client.machine.pid()
        os.kill(pid, signal.SIGSTOP)
        stop.wait(seconds)
        os.kill(pid, signal.SIGCONT)


def test_no_history_of_three_machines_loses_or_revives_anything(bucket, fleet, network):
    load_shards(bucket, [(path, content(f"initial-{path}", 10)) for path in PATHS[:4]])
    history = History()
    history.events += [Event("", path, f"initial-{path}", -2.0, -1.0, -1.0) for path in PATHS[:4]]
    clients = []
    for number in range(3):
        way = network(delay_s=0.002 * number)
        machine = fleet.machine(f"m{number}", {**bucket.env, "AWS_ENDPOINT_URL_S3": way.url}, options=OPTIONS)
        machine.mount(bucket.url)
        clients.append(Client(machine, way, SEED * 10 + number, history))
    trouble = Trouble(clients, history, bucket.url, SEED * 10 + 9)
    stop = threading.Event()

    def work(client):
        while not stop.is_set():
            with client.at_work:
                client.step()
            time.sleep(0.001)

    threads = [threading.Thread(target=work, args=(client,)) for client in clients]
    threads.append(threading.Thread(target=trouble.strike, args=(stop,)))
    for thread in threads:
        thread.start()
    stop.wait(SECONDS)
    stop.set()
    for thread in threads:
        thread.join()

    final = settle(clients, history)
    summary = {client.name: client.failures for client in clients}
    print(f"seed {SEED}: {len(history.events)} events, {len(history.reads)} reads, {trouble.done}, {summary}")
    assert [line for client in clients for line in client.torn] == [], f"seed {SEED}"
    wrong = [*history.violations(LAG_S), *history.lost(final)]
    if wrong:
        print("\n".join([*wrong, "", *map(str, history.events)]))
    assert not wrong, f"seed {SEED}: {len(wrong)} contradictions, printed above"
    in_bucket = {path: value_of(body) for path, body in check_bucket(bucket).items() if path in PATHS}
    assert in_bucket == {path: value for path, value in final.items() if value is not None}, f"seed {SEED}"
    established = [event for event in history.events if event.pushed != float("inf")]
    assert len(established) > SECONDS, "most of the time something could be published"


def settle(clients, history):
    """Everything is mended: all machines publish what they have, and come to see the same."""
    for client in clients:
        client.way.mend()

    def all_pushed():
        for client in clients:
            client.flush("")
        return all(not client.machine.status()["dirty"] for client in clients)

    wait_for(all_pushed, "everything is published", SETTLED_S + 60)
    seen = []

    def agree():
        seen[:] = [{path: look(client, path) for path in PATHS} for client in clients]
        return seen[0] == seen[1] == seen[2]

    wait_for(agree, "all machines see the same", 30)
    for client in clients:
        client.machine.umount()
    return seen[0]


def look(client, path):
    with contextlib.suppress(OSError):
        return client.look(path)
    return "unreadable"
