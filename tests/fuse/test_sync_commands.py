"""``swampfs sync``, ``migrate-index`` and ``doctor``: in a repository, beside a mount, and with bad input."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from tests.datastores import load_monolith, load_shards
from tests.harness import wait_for
from tests.site import FAKETIME

MODEL = "data/test/m1/state"
FILES = [(f"{MODEL}/1/raw", b"one"), (f"{MODEL}/latest", b"1"), ("audit/a.jsonl", b"{}")]


@pytest.fixture
def repo(home: Path, bucket) -> Path:
    """A repository whose datastore is this test's corner of the bucket."""
    directory = home / "repo"
    directory.mkdir()
    config = {
        "bucket": bucket.url.split("/")[2],
        "prefix": bucket.prefix,
        "endpoint": bucket.env["AWS_ENDPOINT_URL_S3"],
    }
    block = {"type": "@swamp/s3-datastore", "config": config}
    (directory / ".swamp.yaml").write_text(json.dumps({"repoId": "repo-1", "datastore": block}))
    return directory


@pytest.fixture
def run(home: Path, bucket):
    """The command line, as a shell would call it; returns exit code, output and errors."""

    def call(*arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, "-m", "swampfs", *arguments],
            env={**os.environ, **bucket.env, "SWAMP_HOME": str(home / "swamp"), "HOME": str(home)},
            cwd=cwd or home,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.returncode, done.stdout, done.stderr

    return call


def cache(home: Path) -> Path:
    return home / "swamp/repos/repo-1"


def test_a_sync_pulls_what_others_did_and_pushes_what_was_done_here(home, repo, run, bucket):
    load_monolith(bucket, FILES)
    assert run("sync", "--json", cwd=repo) == (
        0,
        json.dumps({"mode": "sync", "filesPulled": 3, "filesPushed": 0}, indent=2) + "\n",
        "",
    )
    assert (cache(home) / MODEL / "latest").read_bytes() == b"1"
    (cache(home) / "audit/b.jsonl").write_bytes(b"new")
    sidecar = cache(home) / ".datastore-sync-state.json"
    fields = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**fields, "localDirty": True, "dirtyPaths": ["audit/b.jsonl"]}))
    code, out, _ = run("sync", "--dry-run", "--json", str(repo))
    assert (code, json.loads(out)["summary"]) == (0, {"total": 1, "new": 1, "changed": 0, "deleted": 0})
    assert "audit/b.jsonl" not in bucket.keys()
    assert run("sync", "--push", str(repo)) == (0, "1 file(s) pushed\n", "")
    assert bucket.get("audit/b.jsonl") == b"new"
    assert not [key for key in bucket.keys() if key.endswith(".lock")]
    assert run("sync", "--pull", str(repo)) == (0, "0 file(s) pulled\n", "")


def test_migrating_the_index(repo, run, bucket):
    load_monolith(bucket, FILES)
    code, out, _ = run("migrate-index", "--json", cwd=repo)
    assert code == 0
    assert json.loads(out) == {
        "version": 2,
        "partitions": ["audit", "data--test--m1", "data--test--m1--state"],
        "commitSeq": 1,
    }
    bucket.put("data/a/b", b"x")
    code, out, _ = run("migrate-index", str(repo))
    assert (code, out) == (0, "index version 2: 4 shards, commit 2\n")


def test_a_migration_that_would_lose_entries_is_refused(repo, run, bucket):
    load_monolith(bucket, [*FILES, ("definitions-evaluated/test/x.yaml", b"")])
    before = {key: bucket.get(key) for key in bucket.keys()}
    code, out, error = run("migrate-index", cwd=repo)
    assert (code, out) == (2, "")
    assert error.startswith("swampfs: 1 of 4 entries have no partition: definitions-evaluated/test/x.yaml — ")
    assert {key: bucket.get(key) for key in bucket.keys()} == before


def test_the_doctor_finds_and_mends_an_index(repo, run, bucket):
    load_monolith(bucket, FILES)
    run("migrate-index", cwd=repo)
    code, out, _ = run("doctor", "--json", cwd=repo)
    answer = json.loads(out)
    assert (code, answer["overallStatus"], answer["datastoreType"]) == (0, "pass", "@swamp/s3-datastore")
    bucket.delete("_index/audit.json")
    bucket.delete(f"{MODEL}/1/raw")
    code, out, _ = run("doctor", cwd=repo)
    assert code == 1
    assert "FAIL  index" in out
    assert "1 document(s) missing or unreadable, such as" in out
    assert f"1 entries without an object, such as {MODEL}/1/raw" in out
    code, out, _ = run("doctor", "--repair", cwd=repo)
    assert code == 0
    assert "repaired     index rebuilt from the objects: 2 shards" in out
    code, _, _ = run("doctor", cwd=repo)
    assert code == 0
    assert run("sync", "--pull", cwd=repo)[:2] == (0, "2 file(s) pulled\n")


def test_a_sync_beside_a_mount_goes_through_it(home, repo, run, bucket, fleet):
    load_monolith(bucket, FILES)
    machine = fleet.machine(
        env={**bucket.env, "SWAMP_HOME": str(home / "swamp")}, options=("--refresh", "1h", "--push-delay", "1h")
    )
    machine.mountpoint = repo / ".swamp"
    machine.mount(str(repo))
    (machine.path / "audit/b.jsonl").write_bytes(b"through the mount")
    code, out, error = run("sync", "--json", cwd=repo)
    assert (code, error) == (0, "")
    assert json.loads(out) == {"mode": "sync", "through": str(machine.mountpoint)}
    assert bucket.get("audit/b.jsonl") == b"through the mount"
    assert not cache(home).exists()
    code, out, _ = run("doctor", cwd=repo)
    assert f"{machine.mountpoint}: healthy, 0 change(s) to push" in out
    (machine.path / "audit/c.jsonl").write_bytes(b"not yet")
    code, out, _ = run("sync", "--dry-run", "--json", cwd=repo)
    assert (code, json.loads(out)["pushed"]) == (0, False)
    assert "audit/c.jsonl" not in bucket.keys()
    machine.umount()
    wait_for(lambda: not os.path.ismount(machine.mountpoint), "unmounted")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("sync", "s3://bucket/prefix"), 1, "pass --cache DIR"),
        (("sync", "file:///tmp"), 1, "sync_not_supported"),
        (("sync", "--timeout", "0"), 1, "--timeout"),
        (("migrate-index", "file:///tmp"), 1, "is for object stores"),
        (("sync", "/nonexistent"), 1, "is not a swamp repository"),
        (("doctor", "nonsense://x"), 1, "is not a datastore"),
    ],
)
def test_bad_input_is_one_clear_line(run, arguments, code, says):
    found, out, error = run(*arguments)
    assert found == code
    assert says in out + error
    assert "Traceback" not in error


def test_a_held_lock_ends_the_push_with_its_holder(home, repo, run, bucket, monkeypatch):
    load_monolith(bucket, FILES)
    monkeypatch.setenv("SWAMP_LOCK_TIMEOUT_MS", "300")
    bucket.put(".datastore.lock", b'{"holder":"ana@build-7","hostname":"build-7","pid":1,'
               b'"acquiredAt":"2026-11-21T00:00:00.000Z","ttlMs":30000,"nonce":"n"}')  # fmt: skip
    code, _, error = run("sync", "--push", cwd=repo)
    assert code == 75
    assert "held by ana@build-7 (pid 1) — timed out after" in error


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_sync_stops_soon_and_gives_its_lock_back(home, repo, bucket, number):

    load_monolith(bucket, FILES)
    cache(home).mkdir(parents=True)
    for name in range(3000):
        path = cache(home) / f"audit/{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 2000)
    env = {**os.environ, **bucket.env, "SWAMP_HOME": str(home / "swamp"), "HOME": str(home)}
    process = subprocess.Popen([sys.executable, "-m", "swampfs", "sync", "--push", str(repo)], env=env,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    wait_for(lambda: ".datastore.lock" in bucket.keys(), "the lock is taken")
    time.sleep(0.3)
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130, error
    assert len(bucket.keys()) < 2500
    assert "Traceback" not in error
    assert ".datastore.lock" not in bucket.keys()


def test_the_timeout_covers_the_wait_for_the_lock(repo, run, bucket):
    load_monolith(bucket, FILES)
    bucket.put(".datastore.lock", b'{"holder":"ana@build-7","hostname":"build-7","pid":1,'
               b'"acquiredAt":"2026-11-21T00:00:00.000Z","ttlMs":30000,"nonce":"n"}')  # fmt: skip
    started = time.monotonic()
    code, _, error = run("sync", "--push", "--timeout", "1", cwd=repo)
    assert time.monotonic() - started < 10
    assert code == 2
    assert "push did not end within 1000ms" in error


@pytest.mark.parametrize("value", ["²", "9" * 400, "-1", "x"])
def test_nonsense_in_the_environment_is_ignored(repo, run, bucket, monkeypatch, value):
    load_monolith(bucket, FILES)
    monkeypatch.setenv("SWAMP_DATASTORE_SYNC_TIMEOUT_MS", value)
    monkeypatch.setenv("SWAMP_LOCK_TIMEOUT_MS", value)
    assert run("sync", cwd=repo) == (0, "3 file(s) pulled, 0 file(s) pushed\n", "")


def test_a_repository_id_does_not_choose_the_directory(home, repo, run, bucket):
    load_monolith(bucket, FILES)
    marker = repo / ".swamp.yaml"
    marker.write_text(marker.read_text().replace("repo-1", "../../../evil"))
    code, _, error = run("sync", cwd=repo)
    assert code == 1
    assert "repoId '../../../evil' is not an id" in error
    assert not (home.parent / "evil").exists()


def test_the_doctor_says_what_is_wrong_with_the_configuration(repo, run):
    marker = repo / ".swamp.yaml"
    marker.write_text(json.dumps({"repoId": "repo-1", "datastore": {"type": "@acme/unknown"}}))
    code, out, _ = run("doctor", "--json", cwd=repo)
    answer = json.loads(out)
    assert (code, answer["overallStatus"]) == (1, "fail")
    assert "there is no datastore type '@acme/unknown'" in str(answer["healthFindings"])


def test_a_cache_that_cannot_be_written_is_one_clear_line(home, repo, run, bucket):
    load_monolith(bucket, FILES)
    cache(home).parent.mkdir(parents=True)
    cache(home).write_bytes(b"a file where a directory should be")
    code, _, error = run("sync", "--pull", cwd=repo)
    assert code == 2
    assert error.startswith("swampfs: ")
    assert str(cache(home)) in error
    assert "Traceback" not in error


def test_the_library_and_its_commands_do_without_the_kernel(tmp_path):
    """No pyfuse3: everything but mounting works, and mounting says what to install."""
    (tmp_path / "pyfuse3.py").write_text("raise ModuleNotFoundError(\"No module named 'pyfuse3'\", name='pyfuse3')")
    script = (
        "import importlib, pkgutil, swampfs.cli, swampfs.datastore, swampfs.sync.cache.service, sys;"
        "[importlib.import_module(m.name) for m in pkgutil.iter_modules(swampfs.cli.__path__, 'swampfs.cli.')];"
        "assert 'pyfuse3' not in sys.modules; assert not [m for m in sys.modules if m.startswith('google.')]"
    )
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", script], check=True, env=env)
    (tmp_path / "store").mkdir()
    (tmp_path / "mnt").mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "swampfs", "mount", "-f", f"file://{tmp_path}/store", str(tmp_path / "mnt")],
        env=env, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert "there is no pyfuse3" in done.stderr
    assert "pip install 'swampfs[mount]'" in done.stderr


def test_the_doctor_finds_a_mount_whose_process_is_gone_and_clears_it(home, repo, run, bucket, fleet):
    machine = fleet.machine("left", {**bucket.env, "SWAMP_HOME": str(home / "swamp")})
    machine.mount(bucket.url)
    machine.kill()
    code, out, _ = run("doctor", cwd=repo)
    assert code == 1
    assert f"{machine.path}: left by a process that is gone" in out
    assert "--repair clears it" in out
    code, out, _ = run("doctor", "--repair", cwd=repo)
    assert f"cleared the mount a dead process left at {machine.path}" in out
    assert not os.path.ismount(machine.path)
    _, out, _ = run("doctor", cwd=repo)
    assert str(machine.path) not in out, "nor is it in the list of mounts"


def test_the_doctor_says_whether_two_writers_can_be_kept_apart(repo, run):
    _, out, _ = run("doctor", cwd=repo)
    assert "ok    writing      conditional writes are honoured" in out


def test_a_bundle_for_who_helps_has_everything_but_secrets(home, repo, run, bucket, fleet):
    machine = fleet.machine("one", {**bucket.env, "SWAMP_HOME": str(home / "swamp")})
    machine.mount(bucket.url)
    secrets = [bucket.env["AWS_SECRET_ACCESS_KEY"], bucket.env["AWS_ACCESS_KEY_ID"]]
    with open(machine.state_dir / "swampfs.log", "a") as log:
        log.write(f"INFO key {secrets[0]} of AKIAIOSFODNN7EXAMPLE at https://user:word@proxy:1/x\n")
    path = home / "support.tar.gz"
    code, out, err = run("doctor", "--bundle", str(path), cwd=repo)
    assert code == 0, out + err
    assert "secrets are left out" in err
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as archive:
        parts = {name.split("/", 1)[1]: archive.extractfile(name).read().decode() for name in archive.getnames()}
    assert {"doctor.json", "machine.json", "environment.json", "mount-1/status.json", "mount-1/swampfs.log"} <= set(
        parts
    )
    everything = "".join(parts.values())
    for secret in (*secrets, "AKIAIOSFODNN7EXAMPLE", "user:word"):
        assert secret not in everything
    assert json.loads(parts["environment.json"])["AWS_SECRET_ACCESS_KEY"] == "(set)"
    assert json.loads(parts["mount-1/status.json"])["healthy"]
    assert json.loads(parts["machine.json"])["packages"]["pyfuse3"][0].isdigit()
    code, _, err = run("doctor", "--bundle", str(path), cwd=repo)
    assert (code, "cannot be written: File exists" in err) == (2, True), "nothing is overwritten"


# The clock of a process is made wrong by that library, and by nothing else.
@pytest.mark.skipif(FAKETIME is None, reason="libfaketime is not installed (apt-get install faketime)")
@pytest.mark.parametrize("clock", ["+70s", "-70s"])
def test_the_doctor_finds_a_clock_that_is_wrong(repo, run, bucket, monkeypatch, clock):
    _, out, _ = run("doctor", cwd=repo)
    assert "ok    clock        within 5 s of the datastore's" in out
    monkeypatch.setenv("LD_PRELOAD", str(FAKETIME))
    monkeypatch.setenv("FAKETIME", clock)
    code, out, _ = run("doctor", cwd=repo)
    assert code == 1
    (line,) = [line for line in out.splitlines() if line.startswith("FAIL")]
    assert (
        line.startswith("FAIL  clock        this machine is ")
        and ("ahead of" if clock == "+70s" else "behind") in line
        and "timedatectl" in line
    )
    assert 68 <= int(line.split(" is ")[1].split()[0]) <= 72
    assert bucket.keys() == [], "the probe is gone"


def test_the_doctor_names_paths_that_no_shard_can_hold(repo, run, bucket):
    odd = "definitions-evaluated/test/x.yaml"
    load_monolith(bucket, [*FILES, (odd, b"x")])
    code, out, _ = run("doctor", cwd=repo)
    assert (code, f"ok    paths        1 belong to no shard ({odd}): `migrate-index` would refuse them" in out) == (
        0,
        True,
    )
    assert run("migrate-index", cwd=repo)[0] == 2
    for key in bucket.keys():
        bucket.delete(key)
    load_shards(bucket, [*FILES, (odd, b"x")])
    code, out, _ = run("doctor", cwd=repo)
    assert code == 1
    assert f"FAIL  paths        1 belong to no shard ({odd}): other writers may drop them" in out


def test_the_doctor_finds_what_a_mount_left_unpushed_and_what_of_it_is_gone(home, repo, run, bucket, fleet):
    machine = fleet.machine("left", {**bucket.env, "SWAMP_HOME": str(home / "swamp")}, options=("--push-delay", "1h"))
    machine.mount(bucket.url)
    (machine.path / "files").mkdir()
    for name in ("kept", "gone"):
        (machine.path / "files" / name).write_text(name)
    (machine.path / "files/link").symlink_to("kept")
    _, out, _ = run("doctor", cwd=repo)
    assert "ok    state        1 state directory in order" in out, "while it is mounted"
    machine.kill()
    run("umount", str(machine.path))
    code, out, _ = run("doctor", cwd=repo)
    assert (code, f"{machine.state_dir}: 3 change(s) are not pushed, and nothing mounts it" in out) == (1, True)
    assert "of them is gone" not in out
    (machine.state_dir / "files/files/gone").unlink()
    _, out, _ = run("doctor", cwd=repo)
    assert "the content of 1 of them is gone, such as files/gone" in out
    (machine.state_dir / "state/catalog.db").write_bytes(b"no database" * 1000)
    (machine.state_dir / "state/catalog.db-wal").unlink()
    _, out, _ = run("doctor", cwd=repo)
    assert "catalog.db is damaged: the next mount sets it aside" in out
    machine.mount(bucket.url)
    assert (machine.path / "files/kept").read_text() == "kept"
    machine.umount()
    assert bucket.get("files/kept") == b"kept"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("journal.db", "journal.db is damaged"),
        ("catalog.db", "catalog.db is damaged"),
        ("artifacts.db", "it cannot be examined"),
    ],
)
def test_an_odd_state_directory_is_a_finding_and_no_failure_of_the_doctor(home, repo, run, name, says):
    """Empty databases are sound to SQLite; a directory where a file should be, to nobody."""
    state = home / "swamp/swampfs/odd-1/state"
    state.mkdir(parents=True)
    (state / "journal.db").touch()
    with sqlite3.connect(state / "journal.db") as db:
        if name != "journal.db":
            db.execute("CREATE TABLE dirty (path, op)")
            db.execute("INSERT INTO dirty VALUES ('x', 'write')")
    db.close()
    (state / name).mkdir() if name == "artifacts.db" else (state / name).touch()
    before = sorted(state.iterdir())
    code, out, err = run("doctor", cwd=repo)
    assert (code, err) == (1, "")
    assert says in out
    assert sorted(state.iterdir()) == before, "nothing is made there"
