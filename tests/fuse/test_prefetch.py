"""Who opens one small file after another does not wait for each; who does not, fetches nothing more."""

from __future__ import annotations

import os
import random
import subprocess

import pytest

from tests.datastores import load_shards
from tests.harness import wait_for

QUIET = ("--refresh", "1h", "--push-delay", "1h")


def downloads(machine):
    return [request["key"] for request in machine.requests() if request["op"] == "download"]


def used(machine):
    return machine.status()["prefetch"]["used"]


@pytest.fixture
def mounted(bucket, fleet):
    """A machine with these files on the datastore, and requests counted from now on."""

    def mount(files, *more):
        load_shards(bucket, files.items())
        machine = fleet.machine("a", bucket.env, options=QUIET)
        machine.mount(bucket.url, *more)
        machine.clear_requests()
        return machine

    return mount


def directory(name, count, size=100):
    return {f"data/test/{name}/f{number:04}": os.urandom(size) for number in range(count)}


def versions(names, count):
    return {
        f"data/test/m/{name}/{version}/{file}": os.urandom(50)
        for name in names
        for version in range(1, count + 1)
        for file in ("metadata.yaml", "raw")
    }


def test_a_cat_of_many_small_siblings_costs_one_request_each_and_waits_for_two(mounted):
    files = directory("m", 300)
    machine = mounted(files)
    read = subprocess.run("cat data/test/m/*", shell=True, cwd=machine.path, capture_output=True, check=True).stdout
    assert read == b"".join(files[name] for name in sorted(files))
    assert len(downloads(machine)) == len(set(downloads(machine))) == 300
    assert used(machine) == 298, "the first two say what comes"


def test_a_loop_that_starts_a_process_for_each_file_is_followed_too(mounted):
    machine = mounted(directory("m", 60))
    subprocess.run(
        "for f in data/test/m/*; do cat $f; done", shell=True, cwd=machine.path, capture_output=True, check=True
    )
    assert len(downloads(machine)) == 60
    assert used(machine) >= 55


def test_a_grep_over_many_directories_goes_on_from_one_to_the_next(mounted):
    files = {}
    for number in range(30):
        files |= directory(f"m{number:02}", 10)
    machine = mounted(files)
    found = subprocess.run(
        ["grep", "-rc", "", machine.path / "data"], capture_output=True, text=True, check=True
    ).stdout
    assert found.count("\n") == 300
    assert len(downloads(machine)) == 300
    assert used(machine) >= 290


def test_who_reads_only_the_newest_versions_has_only_those_fetched(mounted):
    names = [f"n{number:02}" for number in range(40)]
    machine = mounted(versions(names, 3))
    for name in names:
        (machine.path / f"data/test/m/{name}/3/raw").read_bytes()
    assert sorted(key.partition("data/")[2] for key in downloads(machine)) == [f"test/m/{name}/3/raw" for name in names]
    assert used(machine) == 38


def test_who_follows_markers_has_both_the_markers_and_what_they_name(mounted):
    names = [f"n{number:02}" for number in range(40)]
    files = versions(names, 2) | {f"data/test/m/{name}/latest": b"2" for name in names}
    machine = mounted(files)
    for name in names:
        here = machine.path / f"data/test/m/{name}"
        (here / (here / "latest").read_text() / "raw").read_bytes()
    assert {key.rpartition("/")[2] for key in downloads(machine)} == {"latest", "raw"}
    assert len(downloads(machine)) == 80
    assert used(machine) >= 60  # how far ahead it is depends on the time


def test_a_wrong_guess_costs_eight_small_files_and_no_more(mounted):
    machine = mounted(directory("m", 100))
    for name in ("f0010", "f0011"):
        (machine.path / "data/test/m" / name).read_bytes()
    wait_for(lambda: machine.status()["prefetch"]["fetched"] == 8, "what was guessed is here")
    for number in (90, 50, 70, 30, 95):  # somewhere else, backwards and forwards
        (machine.path / f"data/test/m/f{number:04}").read_bytes()
    assert len(downloads(machine)) == 2 + 8 + 5
    assert machine.status()["prefetch"]["bytesAhead"] == 0, "nobody is expected any more"


def test_files_that_are_opened_in_no_order_are_fetched_when_they_are_opened(mounted):
    machine = mounted(directory("m", 60))
    order = random.Random(7).sample(range(0, 60, 2), 20)
    for number in order:
        (machine.path / f"data/test/m/f{number:04}").read_bytes()
    assert len(downloads(machine)) <= 20 + 8


def test_large_files_are_not_fetched_ahead(mounted):
    files = {f"data/test/m/f{number}": os.urandom(5 << 20) for number in range(4)}
    machine = mounted(files)
    for name in list(files)[:3]:
        assert (machine.path / name).read_bytes() == files[name]
    assert len(downloads(machine)) == 3
    assert machine.status()["prefetch"]["fetched"] == 0


def test_nothing_goes_from_the_cache_for_what_nobody_asked_for(mounted):
    machine = mounted(directory("m", 40, size=100_000), "--cache-size", "1M")
    for number in range(12):
        (machine.path / f"data/test/m/f{number:04}").read_bytes()
    assert machine.status()["cache"]["evicted"] <= 4, "for what was asked for"
    assert len(downloads(machine)) <= 14


def test_what_was_fetched_ahead_is_told_to_du(mounted):
    machine = mounted(directory("m", 20, size=5000))
    here = machine.path / "data/test/m"
    assert sum(path.stat().st_blocks for path in here.iterdir()) == 0
    for name in ("f0000", "f0001"):
        (here / name).read_bytes()
    wait_for(lambda: sum(path.stat().st_blocks > 0 for path in here.iterdir()) == 10, "blocks of what is here")


def test_with_prefetch_off_each_open_fetches_its_file(mounted):
    machine = mounted(directory("m", 30), "--prefetch", "off")
    for number in range(20):
        (machine.path / f"data/test/m/f{number:04}").read_bytes()
    assert len(downloads(machine)) == 20
