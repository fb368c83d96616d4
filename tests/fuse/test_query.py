"""``swampfs query`` and ``swampfs latest`` on real mounts: what is found, what is fetched for it, and what heals."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sqlite3
from pathlib import Path

import pytest
import yaml

from swampfs.testing.sample import sample_files
from tests.datastores import load_shards
from tests.harness import wait_for

SHORT = ("--refresh", "300ms", "--push-delay", "200ms", "--timeout", "5s")
SAMPLE = list(sample_files(models=3, names=2, versions=2))
ID = "6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a2"  # and a digit


def version(model, name, number, raw, **more):
    """Paths and contents of one version, ``latest`` included."""
    top = f"data/acme/probe/{ID}{model}/{name}"
    fields = {
        "id": f"{model}-{name}-{number}", "name": name, "version": number, "contentType": "application/json",
        "lifetime": "infinite", "garbageCollection": 10, "streaming": False,
        "tags": {"type": "resource", "modelName": f"probe-{model}", **more.pop("tags", {})},
        "ownerDefinition": {"ownerType": "model-method", "ownerRef": f"{ID}{model}", **more.pop("owner", {})},
        "createdAt": f"2026-03-{number:02}T00:00:00.000Z", "size": len(raw),
        "checksum": hashlib.sha256(raw).hexdigest(), **more,
    }  # fmt: skip
    yield f"{top}/{number}/metadata.yaml", yaml.safe_dump(fields).encode()
    yield f"{top}/{number}/raw", raw
    yield f"{top}/latest", str(number).encode()


def write(machine, files):
    for rel, body in files:
        (machine.path / rel).parent.mkdir(parents=True, exist_ok=True)
        (machine.path / rel).write_bytes(body)


@pytest.fixture
def machine(bucket, fleet):
    return sampled(bucket, fleet)


def sampled(bucket, fleet):
    """A machine that has mounted the sample."""
    load_shards(bucket, SAMPLE)
    made = fleet.machine("a", bucket.env, options=SHORT)
    made.mount(bucket.url)
    return made


def query(machine, *arguments):
    return json.loads(machine.run("query", "--mount", str(machine.path), "--json", *arguments).stdout)


def names(machine, *arguments):
    found = query(machine, *arguments)["results"]
    return sorted(f"{one['modelName']}/{one['name']}@{one['version']}" for one in found)


def test_artifacts_are_found_by_what_is_known_of_them(machine):
    found = query(machine)
    assert (found["total"], found["limited"], found["predicate"]) == (6, False, "")
    one = found["results"][0]
    assert (one["version"], one["isLatest"], one["lifetime"], one["tags"]["specName"]) == (2, True, "infinite", "item")
    assert "attributes" not in one
    model = one["modelName"]
    assert names(machine, f'modelName == "{model}" && version == 1') == [f"{model}/item-0@1", f"{model}/item-1@1"]
    assert query(machine, "--limit", "4")["limited"] is True
    assert query(machine, "--limit", "6")["limited"] is False
    chosen = query(machine, f'modelName == "{model}"', "--select", "{'n': name, 'v': version}")
    assert chosen == {"results": [{"n": "item-0", "v": 2}, {"n": "item-1", "v": 2}], "total": 2, "limited": False}


def test_content_that_is_not_here_is_null_until_it_is_asked_for(machine):
    assert {one["content"] is None for one in query(machine)["results"]} == {True}
    wanted = 'attributes.model == 1 && name == "item-0"'
    assert query(machine, wanted)["total"] == 0
    assert [one["content"]["state"] for one in query(machine, wanted, "--hydrate")["results"]] == ["running"]
    assert query(machine, wanted)["total"] == 1, "and from then on it is here"
    assert query(machine, "attributes == null")["total"] == 3, "only what could have met the predicate was fetched"


def test_paths_can_be_handed_to_other_programs(machine):
    lines = machine.run("query", "--mount", str(machine.path), "--paths", 'name == "item-1"').stdout.splitlines()
    assert len(lines) == 3
    assert {json.loads(Path(path).read_bytes())["name"] for path in lines} == {"item-1"}
    ended = machine.run("query", "--mount", str(machine.path), "--paths", "-0", 'name == "item-1"').stdout
    assert ended.split("\0") == [*lines, ""]
    table = machine.run("query", "--mount", str(machine.path), "--limit", "2")
    assert len(table.stdout.splitlines()) == 3
    assert "only 2 were asked for" in table.stderr


def read(machine):
    """Metadata that was fetched from the datastore, by name."""
    keys = [one["key"] for one in machine.requests() if one["op"] in ("get", "download")]
    return sorted(key.split("/")[-3] for key in keys if key.endswith("/metadata.yaml"))


def test_metadata_is_read_once_and_not_brought_into_the_cache(bucket, machine):
    query(machine)
    assert len(read(machine)) == 12
    assert machine.status()["hydrated"] == 0
    query(machine, "version > 0")
    machine.umount()
    machine.mount(bucket.url)
    assert query(machine)["total"] == 6
    assert len(read(machine)) == 12, "it is kept across mounts"


def test_what_is_written_here_or_there_is_found(bucket, fleet, machine):
    other = fleet.machine("b", bucket.env, options=SHORT)
    other.mount(bucket.url)
    assert query(machine)["total"] == query(other)["total"] == 6
    write(machine, version(1, "new", 1, b'{"n": 1}', tags={"env": "prod"}))
    assert names(machine, 'tags.env == "prod"') == ["probe-1/new@1"], "before it is pushed"
    wait_for(lambda: names(other, 'tags.env == "prod"') == ["probe-1/new@1"], "the other machine's change")
    write(other, version(1, "new", 2, b'{"n": 2}', tags={"env": "prod"}))
    wait_for(lambda: names(machine, 'tags.env == "prod"') == ["probe-1/new@2"], "the other machine's change")
    assert names(machine, 'tags.env == "prod" && version > 0') == ["probe-1/new@1", "probe-1/new@2"]
    shutil.rmtree(other.path / f"data/acme/probe/{ID}1/new/2")
    (other.path / f"data/acme/probe/{ID}1/new/latest").write_text("1")
    wait_for(
        lambda: names(machine, 'tags.env == "prod" && version > 0') == ["probe-1/new@1"], "the other machine's change"
    )
    os.rename(machine.path / f"data/acme/probe/{ID}1/new", machine.path / f"data/acme/probe/{ID}1/newer")
    assert [one["name"] for one in query(machine, 'tags.env == "prod"')["results"]] == ["newer"]
    shutil.rmtree(machine.path / f"data/acme/probe/{ID}1/newer")
    assert query(machine)["total"] == 6


def test_a_deletion_marker_takes_the_name_out_of_the_answers(machine):
    write(machine, version(1, "new", 1, b"{}"))
    write(machine, version(1, "new", 2, b"{}", lifecycle="deleted"))
    assert names(machine, 'modelName == "probe-1" && version > 0') == []
    assert machine.run("latest", "--mount", str(machine.path), "probe-1", "new", check=False).returncode == 1


def test_the_latest_of_a_name_is_found_without_reading_all_metadata(machine):
    model_id = next(path for path, _ in SAMPLE if path.startswith("data/aws")).split("/")[4]
    path = machine.run("latest", "--mount", str(machine.path), model_id, "item-1").stdout.strip()
    assert path.endswith(f"{model_id}/item-1/2/raw")
    assert read(machine) == ["item-1"] * 6
    told = json.loads(
        machine.run("latest", "--mount", str(machine.path), f"model-{model_id[:4]}", "item-1", "--json").stdout
    )
    assert (told["version"], told["modelId"], told["contentPath"]) == (2, model_id, path)
    assert told["content"]["name"] == "item-1"
    assert told["checksum"] == hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "harm", ["deleted", "log deleted", "truncated", "damaged", "foreign", "damaged while it is open"]
)
def test_a_catalog_that_is_lost_heals_by_itself(bucket, machine, harm):
    assert query(machine)["total"] == 6
    path = f"{machine.status()['stateDir']}/state/artifacts.db"
    if harm == "deleted":
        os.unlink(path)
    elif harm == "log deleted":
        os.unlink(f"{path}-wal")
        os.unlink(f"{path}-shm")
        write(machine, version(1, "new", 1, b"{}"))
        assert query(machine)["total"] == 7
        shutil.rmtree(machine.path / f"data/acme/probe/{ID}1")
    elif harm == "truncated":
        machine.run("compact", str(machine.path))
        os.truncate(path, 0)
    elif harm == "damaged while it is open":
        with open(path, "r+b") as file:
            file.seek(4096)
            file.write(b"\xff" * (os.path.getsize(path) - 4096))
    else:
        machine.umount()
        if harm == "foreign":
            with sqlite3.connect(path) as db:
                db.execute("PRAGMA user_version = 99")
            db.close()
        else:
            with open(path, "r+b") as file:
                file.write(b"nonsense" * 100)
        machine.mount(bucket.url)
    assert query(machine)["total"] == 6


def test_the_latest_is_right_after_a_removal_and_a_rename(machine):
    write(machine, [*version(1, "one", 1, b"{}"), *version(1, "two", 1, b"{}")])

    def latest(name, check=True):
        return machine.run("latest", "--mount", str(machine.path), "probe-1", name, check=check)

    assert latest("one").stdout.strip().endswith("/one/1/raw")
    assert latest("two").stdout.strip().endswith("/two/1/raw")
    shutil.rmtree(machine.path / f"data/acme/probe/{ID}1/one")
    assert latest("one", check=False).returncode == 1
    os.rename(machine.path / f"data/acme/probe/{ID}1", machine.path / f"data/acme/probe/{ID}8")
    assert latest("two").stdout.strip() == f"{machine.path}/data/acme/probe/{ID}8/two/1/raw"
    write(machine, version(8, "two", 2, b"{}", lifecycle="deleted", renamedTo="three", tags={"modelName": "probe-1"}))
    write(machine, version(8, "three", 1, b"{}", tags={"modelName": "probe-1"}))
    assert latest("two").stdout.strip().endswith("/three/1/raw"), "a rename that swamp made is followed"


def test_content_that_is_being_written_or_is_too_large_is_not_looked_at(machine):
    write(machine, list(version(1, "begun", 1, b""))[:1])
    write(machine, version(1, "large", 1, json.dumps({"big": 1, "more": "x" * (17 << 20)}).encode()))
    write(machine, version(1, "small", 1, json.dumps({"big": 1, "more": "x" * (2 << 20)}).encode()))
    assert names(machine, "attributes.big == 1", "--hydrate") == ["probe-1/small@1"]
    assert os.listdir(machine.path / ".swampfs/query/attributes.big == 1") == ["probe-1:small@1"]
    (large,) = query(machine, 'name == "large"')["results"]
    assert large["content"] is None


def test_a_change_is_not_lost_if_it_could_not_be_noted(machine):
    assert query(machine)["total"] == 6
    write(machine, version(1, "new", 1, b"{}"))
    machine.flush()
    with contextlib.closing(sqlite3.connect(f"{machine.status()['stateDir']}/state/artifacts.db")) as db:
        db.execute("BEGIN IMMEDIATE")
        done = machine.run("query", "--mount", str(machine.path), check=False)
        assert done.returncode == 2
        assert "database is locked — make room, or wait for who uses it" in done.stderr
    assert names(machine, 'name == "new"') == ["probe-1/new@1"]


def test_what_is_asked_wrongly_is_told_and_changes_nothing(machine):
    for arguments, told in [
        (["modelNam == 'x'"], "unknown field modelNam"),
        (["name =="], "no CEL expression"),
        (["name == 'x'", "--select", "nam"], "in the selection"),
        (["--limit", "0"], "--limit"),
        (["--paths", "--json"], "--paths goes with neither"),
    ]:
        done = machine.run("query", "--mount", str(machine.path), *arguments, check=False)
        assert (done.returncode, told in done.stderr) == (1, True), done.stderr
    done = machine.run("latest", "--mount", str(machine.path), "nobody", "item-0", check=False)
    assert done.returncode == 1
    assert "nobody has no artifact item-0" in done.stderr


def test_without_a_mount_it_says_so(machine):
    machine.umount()
    done = machine.run("query", "--mount", str(machine.path), check=False)
    assert done.returncode == 1
    assert "no swampfs mount" in done.stderr


def test_hostile_metadata_harms_nobody(machine):
    for number, body in enumerate(
        [b"\xff\xfe", b"size: !!float .inf", b"[" * 100_000, b"&a [*a]", b"- " * 50_000, b"a: b: c"], 1
    ):
        top = machine.path / f"data/acme/probe/{ID}9/bad/{number}"
        top.mkdir(parents=True)
        (top / "metadata.yaml").write_bytes(body)
    assert query(machine, "version > 0")["total"] == 12
    assert machine.status()["healthy"]


def test_databases_give_back_what_was_forgotten(machine):
    write(machine, [file for number in range(300) for file in version(1, f"new-{number}", 1, b"{}")])
    assert query(machine)["total"] == 306
    shutil.rmtree(machine.path / f"data/acme/probe/{ID}1")
    assert query(machine)["total"] == 6
    state = Path(f"{machine.status()['stateDir']}/state")

    def size():
        return sum(path.stat().st_size for path in state.glob("artifacts.db*"))

    before = size()
    done = json.loads(machine.run("compact", "--json", str(machine.path)).stdout)
    assert done["dbBytesReclaimed"] > 0
    assert not done["vacuumSkipped"]
    assert size() < before
    assert query(machine)["total"] == 6
    assert "0 bytes given back" in machine.run("compact", str(machine.path)).stdout
