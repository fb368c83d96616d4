"""Requests per operation, counted from the request log (issue "First mount", Done when)."""

from __future__ import annotations

import os
import subprocess
import threading

from swampfs.testing.sample import sample_files
from tests.datastores import load_shards
from tests.harness import wait_for

QUIET = ("--refresh", "1h", "--push-delay", "1h")


def operations(machine):
    return [request["op"] for request in machine.requests()]


def find(path):
    subprocess.run(["find", "."], cwd=path, check=True, stdout=subprocess.DEVNULL)


def test_mount_and_find_cost_one_request_per_partition_and_four_more(bucket, fleet):
    partitions = load_shards(bucket, sample_files(models=6))
    machine = fleet.machine(env=bucket.env, options=QUIET)
    machine.mount(bucket.url)
    find(machine.path)
    seen = operations(machine)
    assert len(seen) <= len(partitions) + 4, seen
    assert seen.count("list") == 1, "of the records of empty directories; the index is read as it says itself"
    machine.umount()


def test_mounting_again_with_nothing_changed_costs_at_most_two_requests(bucket, fleet):
    load_shards(bucket, sample_files(models=2))
    machine = fleet.machine(env=bucket.env, options=QUIET)
    machine.mount(bucket.url)
    machine.umount()
    machine.clear_requests()
    machine.mount(bucket.url)
    find(machine.path)
    assert len(operations(machine)) <= 2, operations(machine)
    machine.umount()


def test_stat_never_hydrates_and_open_fetches_exactly_that_file(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine(env=bucket.env, options=QUIET)
    machine.mount(bucket.url)
    raw = next(machine.path.glob("data/**/item-0/1/raw"))
    machine.clear_requests()
    assert raw.stat().st_size > 0
    assert raw.stat().st_blocks == 0  # du shows what is local
    subprocess.run(["ls", "-lR", str(machine.path)], check=True, stdout=subprocess.DEVNULL)
    assert operations(machine) == []
    raw.read_bytes()
    assert operations(machine) == ["download"]
    assert raw.stat().st_blocks > 0
    machine.umount()


def test_a_warm_open_read_close_makes_no_request_and_no_thread_hop(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine(env=bucket.env, options=QUIET)
    machine.mount(bucket.url)
    raw = next(machine.path.glob("data/**/item-0/1/raw"))
    raw.read_bytes()
    machine.clear_requests()
    hops = machine.status()["threadHops"]
    for _ in range(50):
        raw.read_bytes()
    assert operations(machine) == []
    assert machine.status()["threadHops"] == hops
    machine.umount()


def test_concurrent_opens_of_one_file_are_one_download(bucket, fleet):
    load_shards(bucket, [("data/test/m-1/big/1/raw", os.urandom(3_000_000))])
    machine = fleet.machine(env=bucket.env, options=QUIET)
    machine.mount(bucket.url)
    raw = machine.path / "data/test/m-1/big/1/raw"
    machine.clear_requests()
    sizes: list[int] = []
    threads = [threading.Thread(target=lambda: sizes.append(len(raw.read_bytes()))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sizes == [3_000_000] * 8
    assert operations(machine) == ["download"]
    machine.umount()


def test_pushing_one_changed_file_costs_at_most_twelve_requests_with_its_locks(bucket, fleet):
    load_shards(bucket, sample_files(models=2))
    machine = fleet.machine(env=bucket.env, options=QUIET)
    machine.mount(bucket.url)
    raw = next(machine.path.glob("data/**/item-0/1/raw"))
    for text in ("first push of this machine", "second"):
        raw.write_text(text)
        machine.clear_requests()
        machine.flush()
        assert len(operations(machine)) <= 12, operations(machine)
    machine.umount()


def test_an_idle_refresh_is_one_conditional_request(bucket, fleet):
    load_shards(bucket, sample_files(models=2))
    machine = fleet.machine(env=bucket.env, options=("--refresh", "50ms", "--push-delay", "1h"))
    machine.mount(bucket.url)
    machine.clear_requests()
    wait_for(lambda: len(machine.requests()) >= 4, "a few polls")
    meta = f"{bucket.prefix}/_index/_meta.json"
    assert {(r["op"], r["key"], r["outcome"]) for r in machine.requests()} == {("get", meta, "unchanged")}
    machine.umount()


def test_one_remote_change_costs_one_listing_and_one_shard(bucket, fleet):
    load_shards(bucket, sample_files(models=6))
    a = fleet.machine("a", bucket.env, options=QUIET)
    b = fleet.machine("b", bucket.env, options=("--refresh", "200ms", "--push-delay", "1h"))
    a.mount(bucket.url)
    b.mount(bucket.url)
    raw = next(a.path.glob("data/**/item-0/1/raw")).relative_to(a.path)
    (a.path / raw).write_text("changed")
    b.clear_requests()
    a.flush()
    wait_for(lambda: (b.path / raw).stat().st_size == len("changed"), "the change is visible")
    changed = [r for r in b.requests() if r["outcome"] != "unchanged"]
    assert [r["op"] for r in changed] == ["get", "list", "get"]  # meta, listing of _index/, the moved shard
    a.umount()
    b.umount()
