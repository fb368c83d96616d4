"""Several repositories in one bucket: registration, mounting one, moving into and out of one."""

from __future__ import annotations

import json

import pytest
import yaml

from swampfs.testing.sample import sample_files
from tests.datastores import load_monolith, load_shards
from tests.fuse.test_locks import FILES, LOCK, MODEL, record
from tests.harness import tree


def make_repo(home, bucket, name, namespace=""):
    directory = home / name
    directory.mkdir()
    place, prefix = bucket.url.removeprefix("s3://").split("/", 1)
    more = f"  namespace: {namespace}\n" if namespace else ""
    (directory / ".swamp.yaml").write_text(
        f"swampVersion: '1'\nrepoId: id-of-{name}\nunknownKey: [kept]\n"
        f"datastore:\n  type: '@swamp/s3-datastore'\n{more}"
        f"  config: {{bucket: '{place}', prefix: '{prefix}'}}\n"
    )
    return directory


@pytest.fixture
def shell(bucket, fleet):
    return fleet.machine("shell", bucket.env)


def answer(shell, *arguments):
    return json.loads(shell.run("namespace", *arguments, "--json").stdout)


def test_a_namespace_is_registered_set_listed_and_unset(shell, home, bucket):
    one, two = make_repo(home, bucket, "one"), make_repo(home, bucket, "two")
    assert answer(shell, "set", "infra", "--source", str(one))["namespace"] == "infra"
    marker = yaml.safe_load((one / ".swamp.yaml").read_text())
    assert marker["datastore"]["namespace"] == "infra"
    assert (marker["unknownKey"], marker["repoId"]) == (["kept"], "id-of-one")
    taken = shell.run("namespace", "set", "infra", "--source", str(two), check=False)
    assert taken.returncode == 1 and "already registered by repo id-of-one" in taken.stderr
    assert "namespace" not in yaml.safe_load((two / ".swamp.yaml").read_text())["datastore"]
    answer(shell, "set", "security", "--source", str(two))
    listed = answer(shell, "list", "--source", str(one))
    assert [(n["namespace"], n["repoId"], n["isCurrent"]) for n in listed["namespaces"]] == [
        ("infra", "id-of-one", True),
        ("security", "id-of-two", False),
    ]
    refused = shell.run("namespace", "unset", "--source", str(one), check=False)
    assert refused.returncode == 1 and "security" in refused.stderr
    bucket.delete("security/.namespace.json")
    assert answer(shell, "unset", "--source", str(one)) == {"previousNamespace": "infra"}
    assert "namespace" not in yaml.safe_load((one / ".swamp.yaml").read_text())["datastore"]


def test_a_mount_of_a_namespace_another_repository_owns_is_refused_for_writing(shell, home, bucket):
    mine = make_repo(home, bucket, "mine", "infra")
    bucket.put("infra/.namespace.json", json.dumps({"namespace": "infra", "repoId": "another"}).encode())
    refused = shell.mount(str(mine), check=False)
    assert refused.returncode == 1 and "already registered by repo another" in refused.stderr
    shell.mount(str(mine), "--read-only")
    shell.umount()
    bucket.delete("infra/.namespace.json")
    shell.mount(str(mine))
    assert json.loads(bucket.get("infra/.namespace.json"))["repoId"] == "id-of-mine"
    shell.umount()


def test_two_namespaces_of_one_bucket_do_not_see_or_lock_each_other(bucket, fleet):
    a = fleet.machine("a", bucket.env)
    b = fleet.machine("b", bucket.env)
    a.mount(bucket.url, "--namespace", "infra")
    b.mount(bucket.url, "--namespace", "security")
    for machine in (a, b):
        (machine.path / MODEL / "n/1").mkdir(parents=True)
        (machine.path / MODEL / "n/1/raw").write_text(machine.name)
        (machine.path / LOCK).write_bytes(record())
    keys = bucket.keys()
    assert {f"infra/{LOCK}", f"security/{LOCK}"} <= set(keys)
    for machine in (a, b):
        (machine.path / LOCK).unlink()
        machine.flush()
        assert tree(machine.path).keys() == {f"{MODEL}/n/1/raw"}
    (a.path / ".datastore.lock").write_bytes(record())
    assert ".locks/infra.lock" in bucket.keys()
    (a.path / ".datastore.lock").unlink()
    a.umount()
    b.umount()
    assert not [key for key in bucket.keys() if not key.startswith(("infra/", "security/"))]


@pytest.mark.parametrize("load", [load_monolith, load_shards])
def test_a_repository_moves_into_its_namespace_and_back(shell, home, bucket, load):
    load(bucket, sample_files(models=2))
    before = {key: bucket.get(key) for key in bucket.keys() if not key.startswith(("_index/", ".datastore"))}
    repo = make_repo(home, bucket, "repo", "infra")
    shown = answer(shell, "migrate", "--source", str(repo))
    assert (shown["confirm"], shown["totalFiles"]) == (False, len(before))
    assert {key for key in bucket.keys() if key in before} == set(before), "a preview moves nothing"
    done = answer(shell, "migrate", "-y", "--source", str(repo))
    assert done["totalFiles"] == len(before) and done["migratedDirectories"] == len(done["directories"])
    assert not [key for key in bucket.keys() if key in before]
    shell.mount(str(repo))
    assert {key: (shell.path / key).read_bytes() for key in tree(shell.path)} == before
    shell.umount()
    bucket.put(f"infra/{LOCK}", record())
    shell.env["SWAMP_LOCK_TIMEOUT_MS"] = "600"
    waits = shell.run("namespace", "migrate", "--reverse", "-y", "--source", str(repo), check=False)
    assert waits.returncode == 75 and "somebody@elsewhere" in waits.stderr, "it waits for every writer"
    bucket.delete(f"infra/{LOCK}")
    answer(shell, "migrate", "--reverse", "-y", "--source", str(repo))
    assert {key: bucket.get(key) for key in before} == before


def test_a_move_over_other_content_is_refused_and_changes_nothing(shell, home, bucket):
    load_shards(bucket, FILES)
    repo = make_repo(home, bucket, "repo", "infra")
    shell.mount(str(repo))
    (shell.path / MODEL / "n/1").mkdir(parents=True)
    (shell.path / MODEL / "n/1/raw").write_text("mine already")
    shell.umount()
    keys = bucket.keys()
    refused = shell.run("namespace", "migrate", "-y", "--source", str(repo), check=False)
    assert refused.returncode == 1 and f"{MODEL}/n/1/raw" in refused.stderr
    assert bucket.keys() == keys


def test_a_directory_datastore_has_namespaces_too(shell, home, store_dir):
    repo = home / "repo"
    repo.mkdir()
    text = f"swampVersion: '1'\nrepoId: r\ndatastore: {{type: filesystem, path: '{store_dir}', namespace: infra}}\n"
    (repo / ".swamp.yaml").write_text(text)
    for rel, body in FILES:
        (store_dir / rel).parent.mkdir(parents=True, exist_ok=True)
        (store_dir / rel).write_bytes(body)
    assert answer(shell, "migrate", "-y", "--source", str(repo))["totalFiles"] == len(FILES)
    assert tree(store_dir).keys() == {f"infra/{rel}" for rel, _ in FILES}
    answer(shell, "set", "infra", "--source", str(repo))
    assert [one["namespace"] for one in answer(shell, "list", "--source", str(repo))["namespaces"]] == ["infra"]


def test_an_object_of_the_same_size_in_the_way_of_a_move_is_not_removed(shell, home, bucket):
    load_shards(bucket, FILES)
    repo = make_repo(home, bucket, "repo", "infra")
    bucket.put("infra/_index/_meta.json", b'{"version":2,"partitions":[],"commitSeq":1}')
    bucket.put(f"infra/{MODEL}/n/1/raw", b"eno")  # uploaded by somebody, in no index yet
    refused = shell.run("namespace", "migrate", "-y", "--source", str(repo), check=False)
    assert refused.returncode == 1 and "with other content" in refused.stderr
    assert bucket.get(f"infra/{MODEL}/n/1/raw") == b"eno" and bucket.get(f"{MODEL}/n/1/raw") == b"one"
