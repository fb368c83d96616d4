"""What is written through one mount is seen through another, and lies in the bucket as the format demands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from swampfs.testing.sample import sample_files, write_sample
from tests.datastores import check_bucket, indexed, load_monolith, load_shards
from tests.harness import tree, wait_for

UUID = "7b1463fb-2730-4225-aef5-5f9f9a66c7d9"


def shell(script: str, cwd: Path) -> None:
    subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=cwd, check=True, timeout=60)


def edit_forty_files(mount: Path, scratch: Path) -> None:
    """``cp -r``, ``>``, ``>>``, ``sed -i``, ``mv``, ``rm`` over forty files in several models and directories."""
    write_sample(scratch, models=4, names=2, versions=2)
    shell(f"cp -r {scratch}/. .", mount)
    shell(f"mkdir -p data/docker/host/{UUID}/log/1 audit", mount)
    top = f"data/docker/host/{UUID}/log"
    shell(f"for i in $(seq 5); do echo line $i >> {top}/1/raw; done; echo '{{}}' > {top}/1/metadata.yaml", mount)
    shell(f"printf 1 > {top}/latest; echo note > audit/commands-2026-11-20.jsonl", mount)
    shell("sed -i s/running/stopped/ data/*/*/*/item-0/2/raw data/*/*/*/*/item-0/2/raw 2>/dev/null || true", mount)
    shell("for f in data/*/*/*/item-1/1/raw; do sed -i s/running/gone/ $f; done", mount)
    outputs = sorted(mount.glob("outputs/*/*/*/*.yaml")) + sorted(mount.glob("outputs/*/*/*/*/*.yaml"))
    shell(f"mv '{outputs[0]}' '{outputs[0].parent}/moved.yaml'; rm '{outputs[1]}'", mount)
    shell("echo temp > files.tmp; mv files.tmp audit/renamed.jsonl", mount)
    version = next(mount.glob("data/docker/host/*/item-1/1"))
    shutil.rmtree(version)


@pytest.mark.parametrize("index", ["v1", "v2", "none"])
def test_forty_files_written_through_one_mount_are_seen_through_the_other(index, bucket, fleet, tmp_path):
    if index == "v1":
        load_monolith(bucket, sample_files(models=1))
    elif index == "v2":
        load_shards(bucket, sample_files(models=1))
    a, b = fleet.machine("a", bucket.env), fleet.machine("b", bucket.env)
    a.mount(bucket.url)
    b.mount(bucket.url)

    edit_forty_files(a.path, tmp_path)
    wrote = tree(a.path)
    assert len(wrote) >= 40
    a.flush()

    data = check_bucket(bucket)
    assert data == {rel: (a.path / rel).read_bytes() for rel in wrote}
    wait_for(lambda: set(tree(b.path)) == set(wrote), "the names arrive on the second machine")
    assert tree(b.path) == wrote
    a.umount()
    b.umount()
    assert check_bucket(bucket) == data


def test_a_change_made_elsewhere_replaces_cached_content_names_and_sizes(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    a, b = fleet.machine("a", bucket.env), fleet.machine("b", bucket.env)
    a.mount(bucket.url)
    b.mount(bucket.url)
    raw = next(a.path.glob("data/**/item-0/2/raw")).relative_to(a.path)
    assert (b.path / raw).read_bytes() == (a.path / raw).read_bytes()  # in B's cache and page cache now
    assert not (b.path / "audit").exists()  # and a negative entry
    same_size = bytes(reversed((a.path / raw).read_bytes()))

    (a.path / raw).write_bytes(same_size)
    (a.path / "audit").mkdir()
    (a.path / "audit/new.jsonl").write_text("now\n")
    a.flush()

    wait_for(lambda: (b.path / "audit/new.jsonl").exists(), "the new name appears")
    assert (b.path / "audit/new.jsonl").read_text() == "now\n"
    wait_for(lambda: (b.path / raw).read_bytes() == same_size, "same-size content is replaced")

    (b.path / raw).write_text("longer than it was before, by far: " * 20)
    b.flush()
    wait_for(lambda: "by far" in (a.path / raw).read_text(), "and back again")
    assert (a.path / raw).stat().st_size == (b.path / raw).stat().st_size

    shutil.rmtree(a.path / "audit")
    a.flush()
    wait_for(lambda: not (b.path / "audit").exists(), "an emptied directory disappears")
    a.umount()
    b.umount()


def test_an_emptied_shard_is_delisted_and_deleted(bucket, fleet):
    load_shards(bucket, sample_files(models=2))
    a = fleet.machine("a", bucket.env)
    a.mount(bucket.url)
    shutil.rmtree(a.path / "workflow-runs")
    a.flush()
    check_bucket(bucket)
    assert not any(key.startswith("_index/workflow-runs") for key in bucket.keys())
    assert json.loads(bucket.get("_index/_meta.json"))["commitSeq"] == 2
    a.umount()


def test_unpartitionable_files_are_parked_in_the_root_shard_and_survive_a_writer_that_drops_them(bucket, fleet):
    """Spec H6: a version 2 index has no place for them, so readers would lose them."""
    load_shards(bucket, sample_files(models=1))
    a, b = fleet.machine("a", bucket.env), fleet.machine("b", bucket.env)
    a.mount(bucket.url)
    b.mount(bucket.url)
    rel = "definitions-evaluated/test/my.yaml"
    (a.path / rel).parent.mkdir(parents=True)
    (a.path / rel).write_text("name: my\n")
    a.flush()
    assert rel in json.loads(bucket.get("_index/_root.json"))["entries"]
    wait_for(lambda: (b.path / rel).exists(), "the parked file is visible elsewhere")

    # The reference's one-phase push regroups by partition and delists a _root that holds only parked entries.
    meta = json.loads(bucket.get("_index/_meta.json"))
    meta["partitions"].remove("_root")
    meta["commitSeq"] += 1
    bucket.delete("_index/_root.json")
    bucket.put("_index/_meta.json", json.dumps(meta, separators=(",", ":")).encode())

    seq = meta["commitSeq"]
    wait_for(lambda: a.status()["index"]["commitSeq"] == seq, "A has seen that commit")
    assert (a.path / rel).read_text() == "name: my\n"
    (a.path / "audit").mkdir()
    (a.path / "audit/x.jsonl").write_text("next push\n")
    a.flush()
    assert rel in indexed(bucket)
    a.umount()
    b.umount()


def test_edits_of_one_file_on_two_machines_keep_both_contents(bucket, fleet, network):
    """One of them was cut off, or it would have waited for the other's lock."""
    load_shards(bucket, sample_files(models=1))
    slow = ("--refresh", "1h", "--push-delay", "1h")
    way = network()
    a = fleet.machine("a", bucket.env, options=slow)
    b = fleet.machine("b", {**bucket.env, "AWS_ENDPOINT_URL_S3": way.url}, options=slow)
    a.mount(bucket.url)
    b.mount(bucket.url)
    raw = next(a.path.glob("data/**/item-0/1/raw")).relative_to(a.path)
    way.cut()
    (b.path / raw).write_text("from B, later")
    assert b.status()["offline"] is True
    (a.path / raw).write_text("from A")
    a.flush()
    way.mend()
    b.flush()

    assert check_bucket(bucket)[str(raw)] == b"from A"
    wait_for(lambda: (b.path / raw).read_text() == "from A", "the remote version stays in the tree")
    status = b.status()
    assert status["conflicts"] == 1
    kept = list(Path(status["stateDir"], "state", "conflicts").glob("*/content"))
    assert [path.read_text() for path in kept] == ["from B, later"]
    report = json.loads((kept[0].parent / "report.json").read_text())
    assert report["path"] == str(raw)
    a.umount()
    b.umount()


def test_equal_edits_on_two_machines_are_no_conflict(bucket, fleet, network):
    load_shards(bucket, sample_files(models=1))
    slow = ("--refresh", "1h", "--push-delay", "1h")
    ways = [network(), network()]
    machines = [
        fleet.machine(name, {**bucket.env, "AWS_ENDPOINT_URL_S3": way.url}, options=slow)
        for name, way in zip("ab", ways, strict=True)
    ]
    for machine, way in zip(machines, ways, strict=True):
        machine.mount(bucket.url)
        raw = next(machine.path.glob("data/**/item-0/1/raw"))
        way.cut()
        raw.write_text("the same")
    for machine, way in zip(machines, ways, strict=True):
        way.mend()
        machine.flush()
        assert machine.status()["conflicts"] == 0
        machine.umount()
    check_bucket(bucket)


def test_two_machines_share_a_plain_directory(store_dir, fleet):
    write_sample(store_dir, models=2)
    before = {str(p.relative_to(store_dir)) for p in store_dir.rglob("*") if p.is_file()}
    a, b = fleet.machine("a"), fleet.machine("b")
    a.mount(f"file://{store_dir}")
    b.mount(f"file://{store_dir}")
    assert set(tree(a.path)) == before
    (a.path / "audit").mkdir()
    (a.path / "audit/log.jsonl").write_text("1\n")
    raw = next(a.path.glob("data/**/item-0/1/raw")).relative_to(a.path)
    (a.path / raw).write_text("changed")
    a.flush()
    wait_for(lambda: (b.path / "audit/log.jsonl").exists(), "the new file arrives")
    wait_for(lambda: (b.path / raw).read_text() == "changed", "the change arrives")
    (store_dir / "audit" / "by-hand.jsonl").write_text("a swamp CLI on the directory itself\n")
    for machine in (a, b):
        wait_for((machine.path / "audit/by-hand.jsonl").exists, "files of an unmodified CLI arrive")
    os.unlink(b.path / "audit/by-hand.jsonl")
    b.flush()
    a.umount()
    b.umount()
    after = {str(p.relative_to(store_dir)) for p in store_dir.rglob("*") if p.is_file()}
    assert after == before | {"audit/log.jsonl"}  # no index, no shard, no lock, no temporary file


def test_a_reader_that_meets_a_commit_gets_the_whole_new_content(bucket, fleet):
    """The kernel knows the old size of the file; the new content is found only while opening it."""
    rel, body = "audit/growing.jsonl", b"longer than before\n" * 500
    load_shards(bucket, [(rel, b"short\n")])
    machine = fleet.machine(env=bucket.env, options=("--refresh", "1h", "--push-delay", "1h"))
    machine.mount(bucket.url)
    assert (machine.path / rel).stat().st_size == len(b"short\n")
    load_shards(bucket, [(rel, body)], seq=2)
    assert (machine.path / rel).read_bytes() == body
    assert (machine.path / rel).stat().st_size == len(body)
    machine.umount()


def test_close_to_open_shows_at_the_next_open_what_another_machine_has_closed(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    strict = ("--refresh", "1h", "--push-delay", "1h", "--consistency", "close-to-open")
    a, b = fleet.machine("a", bucket.env, options=strict), fleet.machine("b", bucket.env, options=strict)
    a.mount(bucket.url)
    b.mount(bucket.url)
    raw = next(a.path.glob("data/**/item-0/1/raw")).relative_to(a.path)
    (b.path / raw).read_bytes()
    assert not (b.path / "audit").exists()
    (a.path / raw).write_text("closed on A")
    (a.path / "audit").mkdir()
    with open(a.path / "audit/new.jsonl", "w") as file:
        file.write("first\n")
    assert (b.path / raw).read_text() == "closed on A"
    assert (b.path / "audit/new.jsonl").read_text() == "first\n"
    b.clear_requests()
    for _ in range(3):
        (b.path / raw).read_bytes()
    assert [request["op"] for request in b.requests()] == ["get"] * 3  # one conditional request per open
    with open(b.path / raw, "a") as file:
        file.write(", then on B")
    assert (a.path / raw).read_text() == "closed on A, then on B"
    a.umount()
    b.umount()


def test_readers_never_miss_a_file_that_is_being_replaced(bucket, fleet):
    a, b = fleet.machine("a", bucket.env), fleet.machine("b", bucket.env, options=("--refresh", "100ms"))
    a.mount(bucket.url)
    b.mount(bucket.url)
    (a.path / "files").mkdir()
    target, errors, seen, done = "files/target", [], {a.name: [], b.name: []}, threading.Event()
    (a.path / target).write_text("0" * 2000)
    a.flush()
    wait_for(lambda: (b.path / target).exists(), "it is there")

    def read(machine):
        while not done.is_set():
            try:
                body = (machine.path / target).read_text()
            except OSError as error:
                errors.append((machine.name, error))
            else:
                assert len(body) == 2000 and len(set(body)) == 1, "one version, whole"
                seen[machine.name].append(ord(body[0]))

    threads = [threading.Thread(target=read, args=(machine,)) for machine in (a, a, b, b)]
    for thread in threads:
        thread.start()
    try:
        for number in range(1, 60):
            (a.path / "files/.target.swp").write_text(chr(ord("0") + number) * 2000)
            os.rename(a.path / "files/.target.swp", a.path / target)
            if number % 4 == 0:
                time.sleep(0.3)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert errors == []
    assert len(set(seen[a.name])) > 20 and len(set(seen[b.name])) > 2, "they read while it happened"
