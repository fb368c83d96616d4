"""``gc``, ``prune`` and ``delete``: what they remove, what they leave, and whom they wait for."""

from __future__ import annotations

import json
import time

import pytest
import yaml

from swampfs.records import timestamp
from tests.datastores import check_bucket, indexed, load_monolith, load_shards
from tests.fuse.test_locks import record
from tests.harness import wait_for

TYPE = "aws/ec2"
LIVE, DEAD = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
DAY_S = 86_400


def files(model, name, versions, **more):
    """A data name with versions 1…n, each one day younger than the one before; ``metadata`` of all of them."""
    found = []
    for number in range(1, versions + 1):
        age_s = (versions - number) * DAY_S + more.get("age_days", 0) * DAY_S
        metadata = {
            "id": f"{number}",
            "name": name,
            "version": number,
            "lifetime": more.get("lifetime", "infinite"),
            "garbageCollection": more.get("policy", 10),
            "createdAt": timestamp(time.time_ns() - int(age_s * 1e9)),
            "ownerDefinition": more.get("owner", {}),
            **({"lifecycle": "deleted"} if more.get("tombstone") else {}),
        }
        found.append((f"data/{TYPE}/{model}/{name}/{number}/metadata.yaml", yaml.safe_dump(metadata).encode()))
        found.append((f"data/{TYPE}/{model}/{name}/{number}/raw", f"{name} {number}".encode()))
    return [*found, (f"data/{TYPE}/{model}/{name}/latest", str(versions).encode())]


@pytest.fixture
def shell(bucket, fleet):
    return fleet.machine("shell", bucket.env)


def run(shell, bucket, *arguments):
    return json.loads(shell.run(*arguments, "--json", "--source", bucket.url).stdout)


def names(bucket):
    """Model/name → versions that the index knows."""
    found: dict[str, set[int]] = {}
    for path in indexed(bucket):
        if path.endswith("/raw"):
            *_, model, name, number, _ = path.split("/")
            found.setdefault(f"{model[:1]}/{name}", set()).add(int(number))
    return found


@pytest.mark.parametrize("load", [load_monolith, load_shards])
def test_gc_keeps_what_each_policy_keeps(shell, bucket, load):
    run_id = {"workflowId": "w", "workflowRunId": "gone"}
    load(
        bucket,
        [
            *files(LIVE, "three", 5, policy=3),
            *files(LIVE, "young", 5, policy="2d"),
            *files(LIVE, "all", 5),
            *files(LIVE, "old", 2, lifetime="7d", age_days=8),
            *files(LIVE, "grave", 2, lifetime="7d", age_days=8, tombstone=True),
            *files(LIVE, "orphan", 1, lifetime="workflow", owner=run_id),
            *files(LIVE, "owned", 1, lifetime="workflow", owner={**run_id, "workflowRunId": "here"}),
            ("workflow-runs/w/workflow-run-here.yaml", b"id: here\n"),
            (f"data/{TYPE}/{LIVE}/broken/1/metadata.yaml", b"{not yaml"),
            (f"data/{TYPE}/{LIVE}/broken/1/raw", b"kept"),
        ],
    )
    keys = bucket.keys()
    shown = run(shell, bucket, "gc", "--dry-run")
    assert bucket.keys() == keys, "a dry run removes nothing"
    done = run(shell, bucket, "gc")
    assert {**shown, "dryRun": False} == done
    assert (done["dataEntriesExpired"], done["versionsDeleted"]) == (2, 2 + 3 + 2 + 1)
    assert {entry["dataName"] for entry in done["expiredEntries"]} == {"old", "orphan"}
    assert names(bucket) == {
        "1/three": {3, 4, 5},
        "1/young": {4, 5},
        "1/all": {1, 2, 3, 4, 5},
        "1/grave": {1, 2},
        "1/owned": {1},
        "1/broken": {1},
    }
    check_bucket(bucket)
    assert run(shell, bucket, "gc")["versionsDeleted"] == 0


def test_delete_takes_a_version_a_name_or_a_model(shell, bucket):
    load_shards(bucket, [*files(LIVE, "one", 3), *files(LIVE, "two", 1), *files(DEAD, "one", 1)])
    model = f"{TYPE}/{LIVE}"
    done = run(shell, bucket, "delete", model, "one", "--version", "3")
    assert (done["dataName"], done["version"], done["versionsDeleted"]) == ("one", 3, 1)
    assert bucket.get(f"data/{TYPE}/{LIVE}/one/latest") == b"2"
    run(shell, bucket, "delete", model, "two", "--version", "1")  # the only one: the name goes with it
    assert names(bucket) == {"1/one": {1, 2}, "2/one": {1}}
    check_bucket(bucket)
    assert run(shell, bucket, "delete", model)["totalVersionsDeleted"] == 2
    assert names(bucket) == {"2/one": {1}}
    check_bucket(bucket)
    missing = shell.run("delete", model, "-y", "--source", bucket.url, check=False)
    assert missing.returncode == 1 and "there is no data of" in missing.stderr


def test_prune_removes_the_data_of_models_without_a_definition(shell, bucket, home):
    load_shards(bucket, [*files(LIVE, "kept", 2), *files(DEAD, "gone", 2)])
    repo = home / "repo"
    (repo / "models").mkdir(parents=True)
    place, prefix = bucket.url.removeprefix("s3://").split("/", 1)
    (repo / ".swamp.yaml").write_text(
        f"repoId: r\ndatastore:\n  type: '@swamp/s3-datastore'\n  config: {{bucket: '{place}', prefix: '{prefix}'}}\n"
    )
    (repo / "models" / "bad.yaml").write_text("no id here\n")
    refused = shell.run("prune", "-y", "--source", str(repo), check=False)
    assert refused.returncode == 1 and "bad.yaml" in refused.stderr
    assert names(bucket) == {"1/kept": {1, 2}, "2/gone": {1, 2}}
    (repo / "models" / "bad.yaml").write_text(f"id: {LIVE}\n")
    done = json.loads(shell.run("prune", "--json", "--source", str(repo)).stdout)
    assert [(m["modelId"], m["versionCount"]) for m in done["reclaimedModels"]] == [(DEAD, 2)]
    assert names(bucket) == {"1/kept": {1, 2}}
    check_bucket(bucket)


def test_structural_commands_wait_for_writers_and_mounts_see_what_they_did(shell, bucket):
    load_shards(bucket, files(LIVE, "one", 3))
    bucket.put(f"data/{TYPE}/{DEAD}/.lock", record())
    shell.env["SWAMP_LOCK_TIMEOUT_MS"] = "600"
    waits = shell.run("delete", f"{TYPE}/{LIVE}", "one", "-y", "--source", bucket.url, check=False)
    assert waits.returncode == 75 and "somebody@elsewhere" in waits.stderr
    bucket.delete(f"data/{TYPE}/{DEAD}/.lock")
    shell.mount(bucket.url)
    one = shell.path / f"data/{TYPE}/{LIVE}/one"
    (one / "3/raw").write_text("being edited")
    shell.env["SWAMP_LOCK_TIMEOUT_MS"] = "20000"
    run(shell, bucket, "delete", f"{TYPE}/{LIVE}", "one", "--version", "1")  # waits until the mount has pushed
    wait_for(lambda: not (one / "1").exists(), "the mount sees it")
    assert (one / "3/raw").read_text() == "being edited"
    shell.umount()
    assert check_bucket(bucket)[f"data/{TYPE}/{LIVE}/one/3/raw"] == b"being edited"


def test_what_an_unreadable_shard_hides_is_not_taken_to_be_gone(shell, bucket):
    """The run record is there, its shard cannot be read: its data must not count as outlived."""
    owner = {"workflowId": "w", "workflowRunId": "here"}
    load_shards(
        bucket,
        [*files(LIVE, "owned", 1, lifetime="workflow", owner=owner), ("workflow-runs/w/workflow-run-here.yaml", b"x")],
    )
    bucket.put("_index/workflow-runs--w.json", b"{not json")
    keys = bucket.keys()
    refused = shell.run("gc", "-y", "--source", bucket.url, check=False)
    assert refused.returncode != 0 and "workflow-runs--w" in refused.stderr
    assert bucket.keys() == keys
