"""Programs people use, on a mount: they work, and another machine sees what they left."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys

import pytest

from tests.datastores import check_bucket
from tests.harness import wait_for
from tests.suite import everything

GIT = ["git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main", "-c", "gc.auto=0"]


@pytest.fixture
def machine(bucket, fleet):
    machine = fleet.machine("a", bucket.env)
    machine.mount(bucket.url)
    (machine.path / "files").mkdir()
    return machine


@pytest.fixture
def another(machine, bucket, fleet):
    """The same datastore on a machine that knows nothing yet; what the first one showed is compared."""

    def move():
        left = everything(machine.path)
        machine.umount()
        check_bucket(bucket)
        fresh = fleet.machine("b", bucket.env)
        fresh.mount(bucket.url)
        assert everything(fresh.path) == left
        return fresh

    return move


def git(directory, *arguments):
    environment = {**os.environ, "HOME": str(directory.parent), "GIT_CONFIG_NOSYSTEM": "1"}
    done = subprocess.run([*GIT, *arguments], cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"git {arguments}: {done.stderr}"
    return done.stdout


def test_git_works_and_its_repository_is_whole_on_another_machine(machine, another):
    repo = machine.path / "files/repo"
    repo.mkdir()
    git(repo, "init", "-q")
    for number in range(60):
        (repo / f"d{number % 7}").mkdir(exist_ok=True)
        (repo / f"d{number % 7}/f{number}").write_text(f"{number}\n" * 50)
    (repo / "run").write_text("#!/bin/sh\n")
    (repo / "run").chmod(0o755)
    (repo / "way").symlink_to("d1/f1")
    git(repo, "add", "-A")
    git(repo, "commit", "-q", "-m", "first")
    git(repo, "checkout", "-q", "-b", "side")
    (repo / "d1/f1").write_text("changed\n")
    git(repo, "commit", "-qam", "second")
    git(repo, "checkout", "-q", "main")
    git(repo, "merge", "-q", "--no-ff", "-m", "merged", "side")
    git(repo, "gc", "-q")
    git(repo.parent, "clone", "-q", "repo", "copy")
    assert git(repo, "status", "--porcelain") == "" and git(repo.parent / "copy", "status", "--porcelain") == ""
    log = git(repo, "log", "--format=%H %s")
    fresh = another()
    for name in ("repo", "copy"):
        git(fresh.path / "files" / name, "fsck", "--full", "--strict")
        assert git(fresh.path / "files" / name, "status", "--porcelain") == ""
    assert git(fresh.path / "files/repo", "log", "--format=%H %s") == log


def test_an_archive_comes_out_as_it_went_in_also_on_another_machine(machine, another, tmp_path):
    source = tmp_path / "source"
    for directory in ("a/b", "ä ö"):
        (source / directory).mkdir(parents=True)
    for name, mode in (("a/x", 0o755), ("a/b/y", 0o600), ("ä ö/z", 0o444), ("empty", 0o644)):
        (source / name).write_text(name * 1000)
        (source / name).chmod(mode)
        os.utime(source / name, ns=(1, 1_500_000_000_123_456_789))
    (source / "a/link").symlink_to("../empty")
    os.link(source / "a/x", source / "hard")
    (machine.path / "files/t").mkdir()
    make, take = ["tar", "--format=posix", "-cf", "-", "."], ["tar", "-xpf", "-"]
    with subprocess.Popen(make, cwd=source, stdout=subprocess.PIPE) as sent:
        subprocess.run(take, cwd=machine.path / "files/t", stdin=sent.stdout, check=True)
    assert everything(machine.path / "files/t") == everything(source)
    assert os.stat(machine.path / "files/t/hard").st_nlink == 2
    assert everything(another().path / "files/t") == everything(source)


WRITER = """
import sqlite3, sys
db = sqlite3.connect(sys.argv[1], timeout=30, isolation_level=None)
db.execute(f"PRAGMA journal_mode={sys.argv[2]}")
while True:
    db.execute("BEGIN IMMEDIATE")
    db.execute("INSERT INTO t SELECT coalesce(max(n), 0) + 1 FROM t")
    db.execute("UPDATE c SET n = n + 1")
    db.execute("COMMIT")
"""


@pytest.mark.parametrize("mode", ["WAL", "DELETE"])
def test_a_database_survives_the_death_of_its_writers(machine, another, mode):
    path = str(machine.path / "files/things.dat")
    db = sqlite3.connect(path, timeout=30)
    db.execute(f"PRAGMA journal_mode={mode}")
    db.executescript("CREATE TABLE t (n INTEGER PRIMARY KEY); CREATE TABLE c (n); INSERT INTO c VALUES (0);")
    db.close()
    for _ in range(3):
        before = counted(path)
        writers = [subprocess.Popen([sys.executable, "-c", WRITER, path, mode]) for _ in range(2)]
        wait_for(lambda before=before: counted(path) > before + 20, "the writers are at work")
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.wait()
        db = sqlite3.connect(path, timeout=30)
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        rows = db.execute("SELECT count(*) FROM t").fetchone()[0]
        db.close()
        assert rows == counted(path) > 20
    there = str(another().path / "files/things.dat")
    assert counted(there) == rows
    db = sqlite3.connect(there)
    assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    db.close()


def counted(path):
    db = sqlite3.connect(path, timeout=30)
    try:
        return db.execute("SELECT n FROM c").fetchone()[0]
    finally:
        db.close()
