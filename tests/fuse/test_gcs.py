"""A mount of a GCS bucket, through the real client and a server that keeps generation preconditions."""

from __future__ import annotations

import itertools
import json

import pytest

from swampfs.testing.gcs_server import GcsServer
from tests.harness import wait_for

_buckets = itertools.count(1)


@pytest.fixture
def gcs_env(gcs: GcsServer) -> dict[str, str]:
    return {"STORAGE_EMULATOR_HOST": gcs.endpoint}


def test_two_machines_share_a_gcs_bucket(gcs, gcs_env, fleet):
    name = f"mounted-{next(_buckets)}"
    gcs.make_bucket(name)
    one, two = (fleet.machine(machine, env=gcs_env) for machine in "ab")
    one.mount(f"gs://{name}/team")
    two.mount(f"gs://{name}/team")
    model = "data/test/m1/state"
    (one.path / model / "1").mkdir(parents=True)
    (one.path / model / "1/raw").write_bytes(b"from one")
    (one.path / model / "latest").write_bytes(b"1")
    one.flush()
    wait_for((two.path / model / "1/raw").exists, "the other machine sees it")
    assert (two.path / model / "1/raw").read_bytes() == b"from one"
    (two.path / model / "latest").write_bytes(b"2")
    two.flush()
    wait_for(lambda: (one.path / model / "latest").read_bytes() == b"2", "the change comes back")
    (one.path / model / "1/raw").unlink()
    one.flush()
    one.umount()
    two.umount()
    objects = gcs.objects(name)
    index = json.loads(objects["team/.datastore-index.json"])["entries"]
    assert set(index) == {f"{model}/latest"}
    assert objects[f"team/{model}/latest"] == b"2"
    assert not [key for key in objects if key.endswith(".lock")]


def test_a_missing_gcs_bucket_is_one_clear_line(gcs_env, fleet):
    machine = fleet.machine(env=gcs_env)
    done = machine.run("mount", "gs://not-there-at-all/x", str(machine.mountpoint), check=False)
    assert done.returncode == 32
    assert "does not exist" in done.stderr
