"""Power cuts: the state directory lies on a disk of its own, of which only what was synced survives.

The disk is an ext4 image behind a loop device that writes nothing by itself for ten minutes. At the cut the process is
stopped and the image copied as it is: what was never synced is not in it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from tests.datastores import indexed, load_shards
from tests.fault.test_crashes import check_data
from tests.harness import wait_for

MIB = 1 << 20
MKFS = shutil.which("mkfs.ext4", path=f"{os.environ['PATH']}:/usr/sbin:/sbin")  # a user's PATH has no sbin
OPTIONS = ("--refresh", "300ms", "--push-delay", "1h", "--lock-ttl", "2s")
MODEL = "data/test/7b1463fb-2730-4225-aef5-5f9f9a66c7d9/n"
FILES = {
    f"{MODEL}/1/raw": b"one" * 1000,
    "files/a": b"a" * 5000,
    "files/b": b"b" * 5000,
    "files/c": b"c" * 5000,
    "audit/log.jsonl": b"first\n",
}


def run(*command):
    subprocess.run([str(part) for part in command], check=True, capture_output=True)


class Disk:
    """Where a state directory lies; loses what was not synced when its power is cut."""

    def __init__(self, directory: Path, at_end: ExitStack) -> None:
        self.image, self.path = directory / "image", directory / "disk"
        self.path.mkdir()
        with open(self.image, "wb") as file:
            file.truncate(96 * MIB)
        run(MKFS, "-q", "-F", self.image)
        self.attach()
        at_end.callback(lambda: subprocess.run(["umount", "-l", self.path], capture_output=True))

    def attach(self):
        run("mount", "-o", "loop,commit=600", self.image, self.path)

    def sync(self):
        """Everything so far is on the disk, as after some time without a change."""
        run("sync", "-f", self.path)

    def cut(self, machine):
        """The machine is gone; here is its disk when the power is back."""
        os.kill(machine.pid(), signal.SIGSTOP)
        shutil.copyfile(self.image, self.image.with_suffix(".survived"))
        machine.kill()
        run("umount", "-l", machine.path)
        self.lose_power(survived=True)
        with closing(sqlite3.connect(f"{machine.state_dir}/state/journal.db")) as db:
            db.execute("UPDATE fact SET value = 'the boot before' WHERE key = 'boot' AND value != 'ended'")
            db.commit()

    def lose_power(self, *, survived=False):
        """Without a mount: what was synced is there, the rest is not."""
        if not survived:
            shutil.copyfile(self.image, self.image.with_suffix(".survived"))
        wait_for(lambda: subprocess.run(["umount", self.path], capture_output=True).returncode == 0, "a disk at rest")
        os.replace(self.image.with_suffix(".survived"), self.image)
        self.attach()


def unsynced(machine):
    with closing(sqlite3.connect(f"file:{machine.state_dir}/state/journal.db?mode=ro", uri=True)) as db:
        return db.execute("SELECT count(*) FROM dirty WHERE op = 'write' AND NOT synced").fetchone()[0]


@pytest.fixture
def disk(tmp_path):
    if not os.path.exists("/dev/loop-control") or MKFS is None:
        # A container may have neither; nothing else can take a disk's power away.
        pytest.skip("no loop devices, or no mkfs.ext4 (apt-get install e2fsprogs)")
    with ExitStack() as at_end:
        yield Disk(tmp_path, at_end)


@pytest.fixture
def machine(bucket, fleet, disk):
    load_shards(bucket, FILES.items())
    machine = fleet.machine("a", bucket.env, options=OPTIONS)
    machine.state_dir = disk.path / "state"
    machine.mount(bucket.url)
    yield machine
    machine.close()  # before its disk goes


def write(path, body, *, sync):
    with open(path, "wb", buffering=0) as file:
        file.write(body)
        if sync:
            os.fsync(file.fileno())


def published(machine, bucket):
    machine.flush()
    machine.umount()
    found = check_data(bucket)  # the dead machine's locks have some seconds to live
    assert set(indexed(bucket)) == set(found)
    return found


def test_what_fsync_acknowledged_survives_a_power_cut(machine, bucket, disk):
    root = machine.path
    (root / f"{MODEL}/2").mkdir()
    write(root / f"{MODEL}/2/raw", b"two" * 1000, sync=True)
    write(root / "files/a", b"A" * 7000, sync=True)
    with open(root / "audit/log.jsonl", "ab", buffering=0) as file:
        for number in range(20):
            file.write(f"line {number}\n".encode())
            os.fsync(file.fileno())
    write(root / "files/.b.tmp-1", b"B" * 3000, sync=True)  # as editors and swamp replace a file
    os.rename(root / "files/.b.tmp-1", root / "files/b")
    write(root / "files/x.123.tmp", b"X" * 3000, sync=True)
    os.rename(root / "files/x.123.tmp", root / "files/x")
    os.fsync(directory := os.open(root / "files", os.O_DIRECTORY))
    os.close(directory)
    disk.cut(machine)
    machine.mount(bucket.url)
    expected = {
        **FILES,
        f"{MODEL}/2/raw": b"two" * 1000,
        "files/a": b"A" * 7000,
        "files/b": b"B" * 3000,
        "files/x": b"X" * 3000,
        "audit/log.jsonl": b"first\n" + b"".join(f"line {number}\n".encode() for number in range(20)),
    }
    for path, body in expected.items():
        assert (machine.path / path).read_bytes() == body, path
    assert published(machine, bucket) == expected
    assert machine.log().count("conflict") == 0


def test_what_was_not_synced_is_lost_or_kept_aside_and_never_published_in_part(machine, bucket, disk, fleet):
    fleet.expected_log.append("was being written when this machine died")
    root = machine.path
    for name in "abc":
        (root / f"files/{name}").read_bytes()
    disk.sync()
    with open(root / "files/b", "r+b", buffering=0) as half, open(root / "files/new", "wb", buffering=0) as other:
        half.write(b"B" * 3000)
        other.write(b"N" * 3000)
        disk.sync()  # half of these reaches the disk
        half.write(b"B" * 3000)
        other.write(b"N" * 3000)
        write(root / "files/a", b"A" * 7000, sync=False)  # and nothing of this
        disk.cut(machine)
        for file in (half, other):
            with suppress(OSError):
                file.close()
    machine.mount(bucket.url)
    reports = json.loads(machine.run("conflicts", "list", "--json", str(root)).stdout)["conflicts"]
    kept = {report["path"]: Path(report["content"]).read_bytes() for report in reports}
    assert set(kept) == {"files/b", "files/new"}
    assert kept["files/b"].startswith(b"B" * 3000) and kept["files/new"].startswith(b"N" * 3000)
    for path, body in FILES.items():
        assert (root / path).read_bytes() == body, "as others see it"
    assert not (root / "files/new").exists()
    assert published(machine, bucket) == FILES


def test_a_new_file_whose_mark_did_not_reach_the_disk_is_never_published_in_part(machine, bucket, disk, fleet):
    fleet.expected_log.append("was being written when this machine died")
    disk.sync()
    root = machine.path
    for number in range(5):
        (root / f"files/new-{number}").write_bytes(b"N" * 50_000)
    (root / "files/x.123.tmp").write_bytes(b"X" * 3000)
    for number in range(1, 5):
        # The disk has the bytes of some of them before what the journal and the catalog say of any.
        with open(machine.state_dir / f"files/files/new-{number}", "rb+") as file:
            os.truncate(file.fileno(), 20_000 if number == 1 else 50_000)
            os.fsync(file.fileno())
    disk.cut(machine)
    machine.mount(bucket.url)
    assert {path.name for path in (machine.path / "files").iterdir()} - {"x.123.tmp"} == {"a", "b", "c"}
    assert set(published(machine, bucket)) == set(FILES)
    assert not list((machine.state_dir / "files").rglob("new*")), "nothing is left that nobody knows of"


def test_a_scratch_file_that_was_synced_is_there_after_a_power_cut(machine, bucket, disk):
    disk.sync()
    write(machine.path / "files/x.123.tmp", b"X" * 3000, sync=True)
    disk.cut(machine)
    machine.mount(bucket.url)
    assert (machine.path / "files/x.123.tmp").read_bytes() == b"X" * 3000


def test_a_published_file_that_was_renamed_survives_a_power_cut(machine, bucket, disk):
    os.rename(machine.path / "files/a", machine.path / "files/moved")  # its content came just now, and is in no object
    write(machine.path / "files/b", b"B" * 5000, sync=False)
    os.rename(machine.path / "files/b", machine.path / "files/changed and moved")
    os.link(machine.path / "files/c", machine.path / "files/linked")
    os.unlink(machine.path / "files/c")
    (machine.path / "audit").rename(machine.path / "outputs")
    disk.cut(machine)
    machine.mount(bucket.url)
    left = {
        f"{MODEL}/1/raw": FILES[f"{MODEL}/1/raw"],
        "files/moved": FILES["files/a"],
        "files/changed and moved": b"B" * 5000,
        "files/linked": FILES["files/c"],
        "outputs/log.jsonl": FILES["audit/log.jsonl"],
    }
    assert published(machine, bucket) == left


def test_a_file_that_is_linked_into_place_after_an_fsync_survives_a_power_cut(machine, bucket, disk):
    (machine.path / "files/tmp_obj").touch()
    write(machine.path / "files/tmp_obj", b"object" * 1000, sync=True)  # as git and maildirs do
    os.link(machine.path / "files/tmp_obj", machine.path / "files/obj")
    os.unlink(machine.path / "files/tmp_obj")
    disk.cut(machine)
    machine.mount(bucket.url)
    assert published(machine, bucket) == {**FILES, "files/obj": b"object" * 1000}


def test_what_replaced_synced_content_is_not_trusted_for_it(machine, bucket, disk, fleet):
    fleet.expected_log.append("was being written when this machine died")
    write(machine.path / "files/a", b"A" * 9000, sync=True)
    with open(machine.path / "files/a", "r+b", buffering=0) as file:
        file.truncate(0)
        file.write(b"half")
        disk.sync()
        file.write(b" and the rest")
        disk.cut(machine)
        with suppress(OSError):
            file.close()
    machine.mount(bucket.url)
    assert machine.status()["conflicts"] == 1
    assert published(machine, bucket) == FILES


def test_content_that_a_power_cut_shortened_is_fetched_again_before_it_is_renamed(machine, bucket, disk):
    (machine.path / "files/a").read_bytes()
    machine.umount()
    os.truncate(machine.state_dir / "files/files/a", 100)
    machine.mount(bucket.url)
    os.rename(machine.path / "files/a", machine.path / "files/moved")
    left = {**FILES, "files/moved": FILES["files/a"]}
    del left["files/a"]
    assert published(machine, bucket) == left


def test_a_mount_that_ended_in_order_is_believed_after_the_next_boot(machine, bucket, disk):
    write(machine.path / "files/a", b"A" * 7000, sync=False)
    run("umount", machine.path)  # the journal is left to the next mount
    pid = machine.pid()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), "the process has ended")
    disk.lose_power()
    machine.mount(bucket.url)
    assert machine.status()["conflicts"] == 0
    assert published(machine, bucket) == {**FILES, "files/a": b"A" * 7000}


def test_what_was_closed_some_time_before_a_power_cut_is_published_after_it(machine, bucket, disk):
    write(machine.path / "files/a", b"A" * 7000, sync=False)
    write(machine.path / "files/new", b"N" * 7000, sync=False)
    wait_for(lambda: not unsynced(machine), "it is made durable by itself")
    disk.cut(machine)
    machine.mount(bucket.url)
    assert machine.status()["conflicts"] == 0
    assert published(machine, bucket) == {**FILES, "files/a": b"A" * 7000, "files/new": b"N" * 7000}


def sync_directory(path):
    directory = os.open(path, os.O_DIRECTORY)
    os.fsync(directory)
    os.close(directory)


@pytest.mark.parametrize("linked", [False, True])
def test_what_was_renamed_or_linked_is_under_one_name_at_least(machine, bucket, disk, linked):
    """A journal that is written over in place reaches the disk without the directory that it speaks of."""
    root = machine.path
    for number in range(60):
        write(root / f"files/w{number}", b"w", sync=True)
    sync_directory(root / "files")
    machine.flush()
    sync_directory(root / "files")
    (root / "files/c").read_bytes()
    disk.sync()
    if linked:
        os.link(root / "files/c", root / "files/moved")
        os.unlink(root / "files/c")
    else:
        os.rename(root / "files/c", root / "files/moved")
    sync_directory(root / "files")
    disk.cut(machine)
    machine.mount(bucket.url)
    assert (root / "files/moved").read_bytes() == FILES["files/c"]
    assert not (root / "files/c").exists()
    assert published(machine, bucket)["files/moved"] == FILES["files/c"]


def test_content_that_was_published_shortly_before_a_power_cut_is_fetched_again(machine, bucket, disk):
    (machine.path / "files/b").read_bytes()
    disk.sync()
    with open(machine.path / "files/b", "r+b", buffering=0) as file:
        file.write(b"B" * 5000)  # size and place of the old content
    machine.flush()
    disk.cut(machine)
    machine.mount(bucket.url)
    assert (machine.path / "files/b").read_bytes() == b"B" * 5000
    os.rename(machine.path / "files/b", machine.path / "files/b2")
    assert published(machine, bucket)["files/b2"] == b"B" * 5000


def test_a_large_file_that_was_read_shortly_before_a_power_cut_is_fetched_again(bucket, disk, fleet):
    """It had its size from the first part on: that says nothing of the others."""
    body = os.urandom(9 * MIB)
    load_shards(bucket, {**FILES, "files/large": body}.items())
    machine = fleet.machine("a", bucket.env, options=OPTIONS)
    machine.state_dir = disk.path / "state"
    machine.mount(bucket.url)
    disk.sync()
    assert (machine.path / "files/large").read_bytes() == body
    wait_for(lambda: machine.status()["hydrated"] == 1, "all of it is kept")
    write(machine.path / "files/n", b"n", sync=True)
    machine.flush()
    write(machine.path / "files/n2", b"n", sync=True)
    disk.cut(machine)
    machine.mount(bucket.url)
    assert (machine.path / "files/large").read_bytes() == body
    machine.umount()
    machine.close()


def test_content_that_was_published_before_an_orderly_end_survives_a_power_cut(machine, bucket, disk):
    (machine.path / "files/b").read_bytes()
    disk.sync()
    with open(machine.path / "files/b", "r+b", buffering=0) as file:
        file.write(b"B" * 5000)
    machine.flush()
    machine.umount()
    disk.lose_power()
    machine.mount(bucket.url)
    assert (machine.path / "files/b").read_bytes() == b"B" * 5000
