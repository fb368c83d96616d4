"""Machines with networks, delays and clocks of their own, all after the same thing (issue 4, "Done when").

The numbers are small here; ``SWAMPFS_RACES=full`` takes those of the issue.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.datastores import load_shards
from tests.site import FAKETIME, Site

MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9"
FULL = os.environ.get("SWAMPFS_RACES") == "full"
WORKER = str(Path(__file__).with_name("worker.py"))

pytestmark = [
    pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed (apt-get install faketime)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.timeout(3600 if FULL else 240),
]


@pytest.fixture(params=[2, 5], ids=lambda count: f"{count} machines")
def machines(request, server, bucket, fleet, home):
    load_shards(bucket, [(f"{MODEL}/n/1/raw", b"0"), ("files/counter", b"0")])
    with ExitStack() as at_end:
        running = []
        for number in range(request.param):
            clock = ("", "-20m", "+20m")[number] if number < 3 else ""
            site = Site(server.endpoint, home / f"site-{number}", delay_s=0.002 * number, clock=clock)
            at_end.callback(site.close)
            machine = fleet.machine(f"m{number}", {**bucket.env, **site.environment}, within=site.within)
            machine.mount(bucket.url)
            at_end.callback(machine.umount)
            running.append(machine)
        yield running


def race(machines, *arguments):
    """Run the worker on every machine at once; ``{}`` is its mount point. Returns what each printed."""
    started = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, WORKER, *(text.format(machine.path) for text in arguments)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for machine in machines
    ]  # fmt: skip
    answers = []
    for process in processes:
        out, err = process.communicate()
        assert process.returncode == 0, err
        answers.append(json.loads(out))
    print(f"{arguments[0]} on {len(machines)} machines: {time.monotonic() - started:.1f} s")
    return answers


@pytest.mark.parametrize(
    ("lock", "counter"),
    [(f"{MODEL}/.lock", f"{MODEL}/n/1/raw"), (".datastore.lock", "files/counter")],
    ids=["model lock", "global lock"],
)
def test_no_increment_under_a_lock_file_is_lost(machines, bucket, lock, counter):
    each = (1000 if FULL else 40) // len(machines)
    done = race(machines, "increment", f"{{}}/{lock}", f"{{}}/{counter}", str(each))
    numbers = sorted(number for answer in done for number in answer)
    assert numbers == list(range(1, each * len(machines) + 1))
    for machine in machines:
        machine.flush()
    assert bucket.get(counter) == str(each * len(machines)).encode()


def test_of_concurrent_exclusive_creates_of_one_name_one_wins(machines, bucket):
    names = 200 if FULL else 20
    won = race(machines, "create", f"{{}}/{MODEL}/n", str(names))
    assert sorted(number for answer in won for number in answer) == list(range(names))
    for machine in machines:
        machine.flush()
    assert len([key for key in bucket.keys() if "/name-" in key]) == names


def test_no_version_number_is_allocated_twice(machines):
    each = (200 if FULL else 20) // len(machines)
    got = race(machines, "allocate", f"{{}}/{MODEL}/n", str(each))
    numbers = [number for answer in got for number in answer]
    assert len(numbers) == len(set(numbers)) == each * len(machines)
