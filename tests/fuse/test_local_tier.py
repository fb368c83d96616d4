"""Mounting over a repository's own ``.swamp``: what is always local is passed through and never leaves."""

from __future__ import annotations

import os
import sqlite3
import stat

import pytest

from swampfs.testing.sample import sample_files
from tests.datastores import check_bucket, load_shards
from tests.harness import tree


@pytest.fixture
def repo(home, bucket):
    """A repository with secrets, bundles and databases in its ``.swamp``, and a datastore in a bucket."""
    directory = home / "repo"
    (directory / ".swamp" / "secrets" / "local").mkdir(parents=True)
    (directory / ".swamp" / "secrets" / "local" / "key.enc").write_text("secret")
    (directory / ".swamp" / "bundles").mkdir()
    (directory / ".swamp" / "bundles" / "x.js").write_text("bundle")
    (directory / ".swamp" / "data").mkdir()
    (directory / ".swamp" / "data" / "_catalog.db").write_bytes(b"")
    (directory / ".swamp" / "leftover.txt").write_text("of an earlier datastore")
    location, prefix = bucket.url.removeprefix("s3://").split("/", 1)
    (directory / ".swamp.yaml").write_text(
        f"swampVersion: '1'\nrepoId: r\ndatastore:\n  type: '@swamp/s3-datastore'\n"
        f"  config: {{bucket: '{location}', prefix: '{prefix}'}}\n"
    )
    load_shards(bucket, sample_files(models=1))
    return directory


@pytest.fixture
def machine(fleet, bucket, repo):
    running = fleet.machine(env=bucket.env)
    running.mountpoint = repo / ".swamp"
    done = running.run(
        "mount", str(repo), "--state-dir", str(running.state_dir), "--push-delay", "100ms", "--refresh", "200ms"
    )
    assert done.stderr == ""
    return running


def test_local_names_show_through_and_the_datastore_is_around_them(machine):
    names = set(os.listdir(machine.path))
    assert {"secrets", "bundles", "data", "outputs", "workflow-runs"} <= names
    assert "leftover.txt" not in names  # hidden by the mount, not lost
    assert (machine.path / "secrets/local/key.enc").read_text() == "secret"
    assert "_catalog.db" in os.listdir(machine.path / "data")
    machine.umount()
    assert (machine.path / "leftover.txt").read_text() == "of an earlier datastore"


def test_always_local_names_are_written_beneath_and_never_pushed(machine, bucket, repo):
    (machine.path / "secrets/local/new.enc").write_text("more")
    (machine.path / "bundles/sub").mkdir()
    (machine.path / "bundles/sub/y.js").write_text("y")
    run = machine.path / "workflow-runs/w-1"
    run.mkdir(parents=True)
    (run / "workflow-run-r.log").write_text("log")
    (run / "workflow-run-r.yaml").write_text("id: r\n")
    temporary = run / ".0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp"
    temporary.write_text("{}")
    os.rename(temporary, run / ".runs-index.json")  # from the datastore tier's scratch into the local tier
    assert (run / ".runs-index.json").read_text() == "{}"
    os.symlink("key.enc", machine.path / "secrets/local/link")
    assert os.readlink(machine.path / "secrets/local/link") == "key.enc"
    lock = next(machine.path.glob("data/*/*/*/*/")).parent / ".lock"
    fd = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(fd)
    os.unlink(lock)
    machine.umount()

    data = check_bucket(bucket)
    assert "workflow-runs/w-1/workflow-run-r.yaml" in data
    assert not [
        rel for rel in data if "secret" in rel or "bundles" in rel or rel.endswith((".log", ".lock", "index.json"))
    ]
    beneath = tree(repo / ".swamp")
    assert {"secrets/local/new.enc", "bundles/sub/y.js", "workflow-runs/w-1/workflow-run-r.log",
            "workflow-runs/w-1/.runs-index.json"} <= set(beneath)  # fmt: skip
    assert "workflow-runs/w-1/workflow-run-r.yaml" not in beneath


def test_a_local_file_renamed_to_a_datastore_name_is_published(machine, bucket):
    (machine.path / "outputs/run.log").write_text("a log that becomes a record")
    os.rename(machine.path / "outputs/run.log", machine.path / "outputs/aws.yaml")
    assert (machine.path / "outputs/aws.yaml").read_text() == "a log that becomes a record"
    machine.umount()
    assert check_bucket(bucket)["outputs/aws.yaml"] == b"a log that becomes a record"


def test_the_catalog_database_works_in_wal_mode_on_the_local_tier(machine, repo):
    path = machine.path / "data/_catalog.db"
    first, second = sqlite3.connect(path), sqlite3.connect(path)
    first.execute("PRAGMA journal_mode=WAL")
    first.execute("CREATE TABLE t (x)")
    for number in range(50):
        with first:
            first.execute("INSERT INTO t VALUES (?)", (number,))
        assert second.execute("SELECT count(*) FROM t").fetchone() == (number + 1,)
    first.close()
    second.close()
    machine.umount()
    db = sqlite3.connect(repo / ".swamp/data/_catalog.db")
    assert db.execute("SELECT count(*) FROM t").fetchone() == (50,)
    db.close()


def test_the_state_directory_is_private(machine):
    for path in (machine.state_dir, machine.state_dir / "files", machine.state_dir / "staging"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    machine.umount()


def test_directories_kept_local_by_the_repository_stay_local(fleet, home, store_dir):
    repo = home / "repo2"
    repo.mkdir()
    (repo / ".swamp.yaml").write_text(
        f"datastore: {{type: filesystem, path: '{store_dir}', directories: [data, outputs], exclude: [outputs]}}\n"
    )
    machine = fleet.machine()
    machine.mountpoint = repo / ".swamp"
    machine.run("mount", str(repo), "--state-dir", str(machine.state_dir))
    for top in ("data/t", "outputs", "audit"):
        (machine.path / top).mkdir(parents=True)
        (machine.path / top / "f").write_text("x")
    machine.umount()
    assert set(tree(store_dir)) == {"data/t/f"}
    assert set(tree(repo / ".swamp")) == {"outputs/f", "audit/f"}
