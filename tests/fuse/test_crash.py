"""``kill -9`` of the daemon loses nothing that was acknowledged, and leaves a mount the next one clears."""

from __future__ import annotations

import contextlib
import os
import shutil

from swampfs.testing.sample import sample_files
from tests.datastores import check_bucket, load_shards
from tests.harness import tree, wait_for

NEVER_PUSH = ("--refresh", "1h", "--push-delay", "1h")


def test_a_hundred_closed_files_survive_kill_9_before_any_push(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    before = tree(machine.path)
    top = machine.path / "data/docker/host/7b1463fb-2730-4225-aef5-5f9f9a66c7d9/out"
    wrote = {}
    for number in range(100):
        path = top / str(number + 1) / "raw"
        path.parent.mkdir(parents=True)
        path.write_bytes(os.urandom(2000 + number))
        wrote[str(path.relative_to(machine.path))] = path.read_bytes()
    machine.kill()
    keys = bucket.keys()
    assert not any(rel in keys for rel in wrote)

    machine.mount(bucket.url)
    assert {rel: (machine.path / rel).read_bytes() for rel in wrote} == wrote
    assert {rel: digest for rel, digest in tree(machine.path).items() if rel not in wrote} == before
    assert machine.status()["dirty"] == 100
    machine.flush()
    data = check_bucket(bucket)
    assert {rel: data[rel] for rel in wrote} == wrote
    machine.umount()


def test_every_kind_of_change_survives_kill_9(bucket, fleet):
    """Change, append, truncate, delete, rename of files and directories, all unpushed at the kill."""
    load_shards(bucket, sample_files(models=2))
    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    items = sorted(machine.path.glob("data/**/item-0"))
    (items[0] / "1/raw").write_text("changed")
    with open(items[0] / "2/raw", "a") as file:
        file.write("appended")
    os.truncate(items[0] / "1/metadata.yaml", 3)
    os.unlink(items[1] / "latest")
    (items[1] / "latest").write_text("1")
    shutil.rmtree(items[1] / "2")
    others = sorted(machine.path.glob("data/**/item-1"))
    os.rename(others[0], others[0].with_name("renamed"))
    os.rename(others[1] / "1/raw", others[1] / "2/raw")
    (machine.path / "audit").mkdir()
    (machine.path / "audit/a.jsonl").write_text("x\n")
    os.rename(machine.path / "audit/a.jsonl", machine.path / "audit/b.jsonl")
    expected = tree(machine.path)
    machine.kill()

    machine.mount(bucket.url)
    assert tree(machine.path) == expected
    machine.kill()  # replay is idempotent
    machine.mount(bucket.url)
    assert tree(machine.path) == expected
    machine.flush()
    assert set(check_bucket(bucket)) == set(expected)
    fresh = fleet.machine("fresh", bucket.env)
    fresh.mount(bucket.url)
    assert tree(fresh.path) == expected
    fresh.umount()
    machine.umount()


def test_a_writer_killed_in_mid_file_leaves_what_it_wrote(bucket, fleet):
    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    (machine.path / "audit").mkdir()
    fd = os.open(machine.path / "audit/stream.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, b"one\n")
    os.fsync(fd)
    os.write(fd, b"two\n")
    machine.kill()
    with contextlib.suppress(OSError):  # the descriptor of a dead mount
        os.close(fd)
    machine.mount(bucket.url)
    assert (machine.path / "audit/stream.jsonl").read_text() == "one\ntwo\n"
    machine.umount()
    assert check_bucket(bucket)["audit/stream.jsonl"] == b"one\ntwo\n"


def test_a_lost_journal_is_replaced_by_a_walk_that_deletes_nothing(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    raw = next(machine.path.glob("data/**/item-0/1/raw"))
    raw.write_text("changed while the journal was whole")
    removed = next(machine.path.glob("data/**/item-1/1/raw"))
    os.unlink(removed)
    machine.kill()
    state = machine.state_dir / "state"
    for suffix in ("", "-wal", "-shm"):
        (state / f"journal.db{suffix}").unlink(missing_ok=True)
    (state / "journal.db").write_bytes(b"this is not a database" * 100)

    machine.mount(bucket.url)
    assert raw.read_text() == "changed while the journal was whole"
    machine.flush()
    data = check_bucket(bucket)
    assert data[str(raw.relative_to(machine.path))] == b"changed while the journal was whole"
    assert str(removed.relative_to(machine.path)) in data  # absence on disk is never a delete
    machine.umount()


def test_a_lost_catalog_is_rebuilt_and_local_changes_are_kept(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    raw = next(machine.path.glob("data/**/item-0/1/raw"))
    raw.write_text("changed")
    expected = tree(machine.path)
    machine.kill()
    for path in (machine.state_dir / "state").glob("catalog.db*"):
        path.unlink()
    (machine.state_dir / "state" / "catalog.db").write_bytes(b"\0" * 5000)
    machine.mount(bucket.url)
    assert tree(machine.path) == expected
    machine.umount()
    assert check_bucket(bucket)[str(raw.relative_to(machine.path))] == b"changed"


def test_sigterm_pushes_then_unmounts(bucket, fleet):
    import signal

    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    (machine.path / "audit").mkdir()
    (machine.path / "audit/last.jsonl").write_text("words\n")
    os.kill(machine.pid(), signal.SIGTERM)
    wait_for(lambda: not machine.is_mounted(), "the mount is gone")
    assert check_bucket(bucket)["audit/last.jsonl"] == b"words\n"


def test_a_plain_umount_leaves_the_journal_to_the_next_mount(bucket, fleet):
    import subprocess

    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    (machine.path / "audit").mkdir()
    (machine.path / "audit/last.jsonl").write_text("words\n")
    pid = machine.pid()
    subprocess.run(["umount", str(machine.mountpoint)], check=True)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"), "the daemon ends by itself")
    assert bucket.keys() == []
    machine.mount(bucket.url)
    machine.umount()
    assert check_bucket(bucket)["audit/last.jsonl"] == b"words\n"


def test_a_read_only_mount_leaves_the_journal_for_a_mount_that_may_push(bucket, fleet):
    machine = fleet.machine(env=bucket.env, options=NEVER_PUSH)
    machine.mount(bucket.url)
    (machine.path / "audit").mkdir()
    (machine.path / "audit/x.jsonl").write_text("unpushed\n")
    machine.kill()
    machine.mount(bucket.url, "--read-only")
    assert (machine.path / "audit/x.jsonl").read_text() == "unpushed\n"
    machine.umount()
    assert [key for key in bucket.keys() if not key.endswith(".lock")] == []  # not even the lock it died with
    machine.mount(bucket.url)
    machine.umount()
    assert check_bucket(bucket) == {"audit/x.jsonl": b"unpushed\n"}
