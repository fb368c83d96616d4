"""Bad input ends in one clear line, loses nothing, and leaves no process, mount or lock behind."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from swampfs.testing.sample import sample_files
from tests.conftest import BUCKET
from tests.datastores import compact, entry, load_shards
from tests.harness import tree

GOOD = "audit/good.jsonl"


def refused(machine, *arguments, code, says):
    """A mount that must fail: exit code, one line with the words, and nothing left mounted."""
    done = machine.mount(*arguments, check=False)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("swampfs: ")
    for word in says:
        assert word in lines[0], lines[0]
    assert not machine.is_mounted()


def test_a_missing_bucket(server, fleet):
    machine = fleet.machine(env=server.environment())
    refused(machine, "s3://no-such-bucket-here/x", code=32, says=["bucket 'no-such-bucket-here' does not exist"])


def test_a_wrong_secret_and_an_unknown_key(server, fleet):
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        machine = fleet.machine(env={**server.environment(), name: "wrong"})
        refused(machine, f"s3://{BUCKET}/x", code=32, says=["credentials", "403"])


def test_no_credentials_at_all(server, fleet):
    env = {k: v for k, v in server.environment().items() if "KEY" not in k}
    machine = fleet.machine(
        env={**env, "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent", "AWS_CONFIG_FILE": "/nonexistent"}
    )
    refused(machine, f"s3://{BUCKET}/x", code=32, says=["credentials"])


def test_no_route_to_the_store(server, fleet):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{unused.getsockname()[1]}"
        machine = fleet.machine(env={**server.environment(), "AWS_ENDPOINT_URL_S3": endpoint})
        refused(machine, f"s3://{BUCKET}/x", code=32, says=["got no answer", endpoint])


def test_a_missing_datastore_directory(fleet):
    refused(fleet.machine(), "file:///nonexistent/datastore", code=32, says=["/nonexistent/datastore does not exist"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("datastore: [", "cannot be read"),
        ("- a list", "not a mapping"),
        ("datastore: 7", "datastore must be a mapping"),
        ("datastore: {type: filesystem}", "needs a path"),
        ("datastore: {type: '@acme/unheard-of'}", "unknown datastore type"),
        ("datastore: {type: '@swamp/s3-datastore', config: {bucket: 'X'}}", "not a bucket name"),
        ("datastore: {type: filesystem, path: '$NOT_SET_ANYWHERE/x'}", "not set"),
        ("datastore: {type: filesystem, path: /tmp, namespace: 'Not A Slug'}", "namespace"),
        ("datastore: {type: filesystem, path: /tmp, directories: data}", "lists of names"),
        ("\xff\xfe", "cannot be read"),
    ],
)
def test_a_malformed_swamp_yaml(text, says, fleet, home):
    repo = home / "repo"
    repo.mkdir()
    (repo / ".swamp.yaml").write_bytes(text.encode("latin-1"))
    refused(fleet.machine(), str(repo), code=1, says=[says, ".swamp.yaml" if "namespace" not in says else ""])


def test_a_mount_point_with_files_in_it(fleet, store_dir):
    machine = fleet.machine()
    (machine.mountpoint / "mine").write_text("precious")
    refused(machine, f"file://{store_dir}", code=32, says=["not empty", str(machine.mountpoint)])
    assert (machine.mountpoint / "mine").read_text() == "precious"


def test_mounts_of_others_at_names_that_are_no_text_are_no_obstacle(fleet, store_dir, home):
    odd = os.fsencode(home) + b"/a\rb\xff \xc2\xa0c\n"
    os.mkdir(odd)
    machine = fleet.machine()
    steps = 'mount -t tmpfs none "$1" && "$2" -m swampfs mount "$3" "$4" && "$2" -m swampfs umount "$4"'
    alone = ["unshare", "--mount", "sh", "-c", steps, "sh", odd]  # for others it is no obstacle, but a nuisance
    arguments = [sys.executable, f"file://{store_dir}", str(machine.mountpoint)]
    done = subprocess.run([*alone, *arguments], env=machine.environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_mount_point(fleet, store_dir):
    machine = fleet.machine()
    machine.mountpoint.rmdir()
    refused(machine, f"file://{store_dir}", code=32, says=["does not exist"])


def test_a_state_directory_in_use_and_a_mount_point_in_use(fleet, store_dir):
    a = fleet.machine("a")
    a.mount(f"file://{store_dir}")
    b = fleet.machine("b")
    b.state_dir = a.state_dir
    refused(b, f"file://{store_dir}", code=32, says=["in use by process", str(a.pid())])
    again = fleet.machine("a")
    again.state_dir = again.home / "other-state"
    done = again.mount(f"file://{store_dir}", check=False)
    assert done.returncode == 32
    assert "already a mount point" in done.stderr
    assert a.is_mounted()
    a.umount()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["s3://bucket/x"], "no MOUNTPOINT"),
        (["s3://bucket/x", "m", "more"], "too many arguments"),
        (["ftp://x/y", "m"], "not a datastore"),
        (["s3://key:secret@bucket/x", "m"], "credentials"),
        (["--refresh", "soon", "file:///tmp", "m"], "not a duration"),
        (["-o", "no_such_option=1", "file:///tmp", "m"], "unknown mount option"),
        (["-o", "refresh", "file:///tmp", "m"], "needs a value"),
        (["--namespace", "../up", "file:///tmp", "m"], "namespace"),
        ([], "not inside a swamp repository"),
    ],
)
def test_usage_errors_are_one_line_and_exit_1(arguments, says, fleet):
    done = fleet.machine().run("mount", *arguments, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_without_a_mount_say_so(fleet, home):
    for arguments in (["status"], ["umount", str(home)], ["flush", str(home / "x")], ["status", str(home)]):
        done = fleet.machine().run(*arguments, check=False)
        assert done.returncode == 1
        assert "mounted" in done.stderr or "no swampfs mount" in done.stderr


HOSTILE = {
    "../escape": "up",
    "audit/../../escape": "up in the middle",
    "/etc/passwd": "absolute",
    "audit/./dot": "dot",
    "audit//double": "empty segment",
    "audit/nul\0byte": "nul",
    "audit/back\\slash": "backslash",
    "audit/" + "n" * 300: "300 bytes",
    "audit/dir/": "directory marker",
}


@pytest.mark.parametrize("mode", ["v1", "v2"])
def test_hostile_keys_are_skipped_with_a_finding_and_the_rest_mounts(mode, bucket, fleet):
    body = b"fine\n"
    bucket.put(GOOD, body)
    entries = {GOOD: entry(GOOD, body)} | {rel: entry(rel, b"x") for rel in HOSTILE}
    entries |= {
        "audit/size": {"key": "audit/size", "size": -1},
        "audit/list": [],
        "audit/hash": {"size": 1, "sha256": "x"},
    }
    # A name that is both: every machine shows the directory, so that no single key can hide a tree.
    bucket.put("audit/both/below", b"below\n")
    entries |= {"audit/both": entry("audit/both", b"x"), "audit/both/below": entry("audit/both/below", b"below\n")}
    if mode == "v1":
        bucket.put(".datastore-index.json", compact({"version": 1, "entries": entries}))
    else:
        bucket.put("_index/audit.json", compact({"version": 1, "entries": entries}))
        bucket.put("_index/_meta.json", compact({"version": 2, "partitions": ["audit"], "commitSeq": 1}))
    machine = fleet.machine(env=bucket.env)
    machine.mount(bucket.url)
    shown = {rel: (machine.path / rel).read_bytes() for rel in tree(machine.path)}
    assert shown == {GOOD: body, "audit/both/below": b"below\n"}
    status = machine.status()
    found = {finding["path"] for finding in status["findings"]}
    assert found == {*HOSTILE, "audit/size", "audit/list", "audit/hash", "audit/both"}
    # Writing beside them works, and their entries are left as they were: they are not ours to remove.
    (machine.path / "audit/new.jsonl").write_text("new\n")
    machine.umount()
    key = ".datastore-index.json" if mode == "v1" else "_index/audit.json"
    after = json.loads(bucket.get(key))["entries"]
    assert {rel: after[rel] for rel in entries} == entries
    assert "audit/new.jsonl" in after


def test_directory_markers_and_stray_internal_objects_in_a_listing_are_no_files(bucket, fleet):
    for key in ("audit/", "data/", "_control/x", ".locks/infra.lock", "infra/_index/_meta.json", "secrets/key.enc",
                "data/_catalog.db-wal", "audit/.0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp"):  # fmt: skip
        bucket.put(key, b"")
    bucket.put(GOOD, b"fine\n")
    machine = fleet.machine(env=bucket.env)
    machine.mount(bucket.url)
    assert list(tree(machine.path)) == [GOOD]
    machine.umount()


def test_an_index_from_the_future_is_refused_and_left_alone(bucket, fleet):
    meta = compact({"version": 3, "partitions": ["audit"], "shape": "unknown"})
    bucket.put("_index/_meta.json", meta)
    refused(fleet.machine(env=bucket.env), bucket.url, code=32, says=["version 3", "upgrade"])
    assert bucket.get("_index/_meta.json") == meta
    assert bucket.keys() == ["_index/_meta.json"]


def test_an_unreadable_index_is_an_error_not_an_empty_tree(bucket, fleet):
    bucket.put(".datastore-index.json", b'{"version":1,"entries":{')
    refused(fleet.machine(env=bucket.env), bucket.url, code=32, says=["not JSON"])


def test_a_missing_shard_keeps_the_mount_and_is_reported(bucket, fleet):
    load_shards(bucket, sample_files(models=2))
    gone = next(key for key in bucket.keys() if key.startswith("_index/workflow-runs"))
    bucket.delete(gone)
    machine = fleet.machine(env=bucket.env)
    machine.mount(bucket.url)
    assert (machine.path / "data").is_dir()
    assert not (machine.path / "workflow-runs").exists()
    findings = machine.status()["findings"]
    assert [(f["kind"], f["path"].endswith(gone)) for f in findings] == [("index-shard", True)]
    machine.umount()


def test_names_a_datastore_cannot_hold_are_refused_with_the_right_errno(fleet, store_dir):
    import errno

    machine = fleet.machine()
    machine.mount(f"file://{store_dir}")
    for name, number in ((b"n" * 256, errno.ENAMETOOLONG), (b"back\\slash", errno.EINVAL), (b"\xff\xfe", errno.EILSEQ)):
        with pytest.raises(OSError) as caught:
            os.mkdir(os.fsencode(machine.path) + b"/" + name)
        assert caught.value.errno == number
    machine.umount()


def test_a_store_that_ignores_preconditions_is_refused_for_writing(fleet, home):
    """`rclone serve s3` takes every conditional put (architecture §7)."""
    from tests import seaweed

    rclone = os.path.join(os.path.dirname(sys.executable), "rclone")
    if not os.path.exists(rclone):
        rclone = "rclone"
    data = home / "rclone"
    (data / "careless").mkdir(parents=True)
    (port,) = seaweed.free_ports(1)
    command = [rclone, "serve", "s3", str(data), "--addr", f"127.0.0.1:{port}", "--auth-key", "key,secret-of-rclone"]
    env = {**os.environ, "HOME": str(home)}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        from tests.harness import wait_for

        wait_for(lambda: _listens(port), "rclone serves")
        credentials = {
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret-of-rclone",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        }
        machine = fleet.machine(env=credentials)
        refused(machine, "s3://careless/x", code=32, says=["ignores conditional writes", "--read-only"])
        assert [path for path in data.rglob("*") if path.is_file()] == []  # the probe left nothing
        (home / "cache/audit").mkdir(parents=True)
        (home / "cache/audit/a.jsonl").write_bytes(b"x")
        sync = machine.run("sync", "--push", "--cache", str(home / "cache"), "s3://careless/x", check=False)
        assert sync.returncode == 2
        assert "ignores conditional writes" in sync.stderr
        assert [path for path in data.rglob("*") if path.is_file()] == []
        machine.mount("s3://careless/x", "--read-only")
        machine.umount()
    finally:
        process.terminate()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def test_the_reason_of_libfuse_reaches_the_user(monkeypatch, tmp_path):
    """libfuse and fusermount3 speak on descriptor 2 only, which a background mount's parent never sees."""
    from swampfs.errors import MountError
    from swampfs.fuse import session
    from swampfs.settings import MountSettings, source_of_url

    def refuse(*arguments):
        os.write(2, b"fusermount3: option allow_other only allowed\nif 'user_allow_other' is set\n")
        raise RuntimeError("fuse_session_mount failed")

    monkeypatch.setattr("pyfuse3.init", refuse)
    settings = MountSettings(source_of_url(f"file://{tmp_path}"), tmp_path / "m", tmp_path / "s")
    with pytest.raises(MountError) as caught:
        session.mount(None, settings)  # type: ignore[arg-type]
    assert "only allowed if 'user_allow_other' is set" in caught.value.line()
