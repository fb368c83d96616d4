"""Eight processes on two machines, with random faults of the network, for as long as ``SWAMPFS_SOAK_S`` says (20).

Nothing leaks, and in the end both trees, the bucket and what the processes believe agree.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median

import pytest

from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import check_bucket, load_shards
from tests.fault.test_crashes import check_state_dir, contents
from tests.harness import wait_for

SECONDS = float(os.environ.get("SWAMPFS_SOAK_S", "20"))
LONG_S = 300.0  # from here on memory is flat, or it grows
OPTIONS = ("--refresh", "300ms", "--push-delay", "300ms", "--timeout", "5s", "--lock-ttl", "5s")

pytestmark = pytest.mark.timeout(SECONDS * 1.5 + 240)


def sample(machine):
    """What a mount holds: descriptors, threads, tasks, KiB of memory."""
    pid = machine.pid()
    status = machine.status()
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "fds": len(os.listdir(f"/proc/{pid}/fd")) - status["openFiles"],
        "threads": int(fields["Threads"]),
        "tasks": status["tasks"],
        "rss": int(fields["VmRSS"].split()[0]),
    }


def misbehave(proxies, until, samples, machines):
    chance = random.Random()
    while time.monotonic() < until:
        time.sleep(chance.uniform(1, 5))  # the network is well for a while
        proxy = chance.choice(proxies)
        proxy.set(chance.choice(list(Fault)))
        time.sleep(chance.uniform(0.3, 6))
        proxy.set(None)
        for machine, taken in zip(machines, samples, strict=True):
            taken.append(sample(machine))


def test_hours_of_faults_leak_nothing_and_lose_nothing(bucket, server, fleet):
    load_shards(bucket, [("files/start", b"start")])
    with ExitStack() as at_end:
        machines, proxies = [], []
        for name in "ab":
            proxies.append(FaultProxy(server.endpoint))
            at_end.callback(proxies[-1].close)
            env = {**bucket.env, "AWS_ENDPOINT_URL_S3": proxies[-1].url}
            machines.append(fleet.machine(name, env, options=OPTIONS))
            machines[-1].mount(bucket.url)
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.fault.soak_load", str(machines[seed % 2].path), str(seed)],
                stdout=subprocess.PIPE, text=True,
            )
            for seed in range(8)
        ]  # fmt: skip
        at_end.callback(lambda: [worker.kill() for worker in workers])
        samples = [[], []]
        misbehave(proxies, time.monotonic() + SECONDS, samples, machines)
        for worker in workers:
            worker.terminate()
        said = [worker.communicate(timeout=60)[0] for worker in workers]
        assert [worker.returncode for worker in workers] == [0] * 8
        answers = [json.loads(text) for text in said]
        expected = {path: body.encode() for answer in answers for path, body in answer["state"].items()}
        for machine in machines:
            flush(machine, machines)
        expected["files/start"] = b"start"
        for machine in machines:
            with contextlib.suppress(AssertionError):
                wait_for(lambda m=machine: names(m) == set(expected), "each sees all of it", timeout_s=45)
            found = contents(machine.path)
            wrong = {path for path in {*found, *expected} if found.get(path) != expected.get(path)}
            both = {path: [str(held.get(path))[:80] for held in (found, expected)] for path in wrong}
            assert not wrong, f"seen and expected: {both}\n{history(machine, wrong)}"
            assert machine.status()["conflicts"] == 0
        quiet(machines)
        print(sum(answer["done"] for answer in answers), "steps;", [sample(machine) for machine in machines])
        print([answer["errors"] for answer in answers])
        for machine, taken in zip(machines, samples, strict=True):
            check_flat(taken, sample(machine))
            machine.umount()
            check_state_dir(machine)
        assert check_bucket(bucket) == expected


def flush(machine, machines):
    """Or say what each of them was at."""
    try:
        machine.flush()
    except AssertionError as error:
        told = {one.name: [one.status(), one.requests()[-60:], one.log()[-8000:]] for one in machines}
        raise AssertionError(f"{machine.name}: {error}\n{json.dumps(told, indent=1)}") from None


def names(machine):
    """Whose contents can be read; ``None``: one of them was removed by the other machine just now."""
    try:
        return set(contents(machine.path))
    except FileNotFoundError:
        return None


def history(machine, paths):
    """What is known of paths that are not as they should be."""
    reports = machine.run("conflicts", "list", "--json", str(machine.path)).stdout
    told = [request for request in machine.requests() if any(request["key"].endswith(path) for path in paths)]
    return json.dumps([machine.name, sorted(paths), told[-60:], json.loads(reports), machine.log()[-4000:]], indent=1)


def quiet(machines):
    """Nobody has anything open, locks are given back, idle threads have ended."""
    for machine in machines:
        wait_for(lambda machine=machine: machine.status()["locks"] == [], "locks are given back")
        wait_for(lambda machine=machine: machine.status()["openFiles"] == 0, "nothing is open")
        wait_for(lambda machine=machine: sample(machine)["threads"] < 12, "idle threads end", timeout_s=40)


def check_flat(taken, last):
    assert last["fds"] <= 40, last
    assert last["tasks"] <= 27, last  # three of them are the fast lane's
    if SECONDS >= LONG_S:
        quarter = len(taken) // 4
        early, late = (median(one["rss"] for one in part) for part in (taken[quarter : 2 * quarter], taken[-quarter:]))
        assert late <= early * 1.1, (early, late)
