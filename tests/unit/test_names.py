"""The vocabulary of paths, row by row as the specification has it."""

from __future__ import annotations

import pytest

from swampfs.errors import HostileNameError, NameTooLongError, SettingsError
from swampfs.names import (
    Keyspace,
    ModelRef,
    check_namespace,
    is_always_local,
    is_internal,
    is_publishable,
    is_scratch,
    is_servable,
    marker_of,
    model_of,
    partition_key,
    rel_path,
    version_of,
)

TEMP = ".0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp"
UUID = "7b1463fb-2730-4225-aef5-5f9f9a66c7d9"

PARTITIONS = {  # spec §3, the table and the rules above it
    "data/aws/ec2/vpc/m-1/state/3/raw": "data--aws--ec2--vpc--m-1",
    "data/aws/ec2/vpc/m-1/state/latest": "data--aws--ec2--vpc",
    "data/test/m-1/state/3/raw": "data--test--m-1",
    "data/test/m-1/state/latest": "data--test--m-1--state",
    "data/@acme/echo/m-1/state/3/raw": "data--@acme--echo--m-1",
    "data/@acme/echo/m-1/state/latest": "data--@acme--echo",
    "data/test/m-1/state/3/sub/raw": "data--test--m-1--state",
    "data/a/b": None,
    "outputs/test/run/d1-2026-08-03.yaml": "outputs--test--run",
    "outputs/aws/ec2/vpc/create/d1.yaml": "outputs--aws--ec2",
    "definitions-evaluated/test/my.yaml": None,
    "definitions-evaluated/@acme/echo/my.yaml": "definitions-evaluated--@acme--echo",
    "workflow-runs/w1/workflow-run-r1.yaml": "workflow-runs--w1",
    "workflow-runs/x.yaml": None,
    "workflows-evaluated/workflow-a.yaml": "workflows-evaluated",
    "auto-definitions/a/b/c.yaml": "auto-definitions",
    "audit/x/y/z": "audit",
    "telemetry/x": "telemetry",
    "logs/x": "logs",
    "files/x": "files",
    ".catalog-export.json": "_root",
    "infra/data/test/m/d/1/raw": None,
    "": None,
    "audit": "_root",
    "data//x/y": "data----x",
    "unknown/x": None,
}


@pytest.mark.parametrize(("rel", "key"), PARTITIONS.items())
def test_partition_keys_are_those_of_the_wire_format(rel, key):
    assert partition_key(rel) == key


@pytest.mark.parametrize(
    ("rel", "model"),
    [
        (f"data/aws/ec2/vpc/{UUID}/state/3/raw", ModelRef("aws/ec2/vpc", UUID)),
        (f"data/aws/ec2/vpc/{UUID}/state/latest", ModelRef("aws/ec2/vpc", UUID)),
        (f"data/a/{UUID}/7/1/raw", ModelRef("a", UUID)),
        ("data/test/m-1/state/3/raw", ModelRef("test", "m-1")),
        ("data/test/m-1/207333/3/metadata.yaml", ModelRef("test", "m-1")),
        ("data/@acme/x/m-1/state/latest", ModelRef("@acme/x", "m-1")),
        ("data/test/m-1/state/3/sub/raw", ModelRef("test", "m-1")),
        ("data/a/b", None),
        ("outputs/test/run/x.yaml", None),
        ("audit/x", None),
    ],
)
def test_models_are_found_by_markers_not_by_depth(rel, model):
    assert model_of(rel) == model


@pytest.mark.parametrize(
    ("rel", "version", "marker"),
    [
        (f"data/aws/ec2/{UUID}/state/3/raw", 3, f"data/aws/ec2/{UUID}/state/latest"),
        (f"data/aws/ec2/{UUID}/12/3/metadata.yaml", 3, f"data/aws/ec2/{UUID}/12/latest"),
        (f"data/aws/ec2/{UUID}/state/3/", 3, f"data/aws/ec2/{UUID}/state/latest"),
        (f"data/aws/ec2/{UUID}/state/latest", None, f"data/aws/ec2/{UUID}/state/latest"),
        (f"data/aws/ec2/{UUID}/state", None, None),
        (f"outputs/aws/{UUID}/3/raw", None, None),
    ],
)
def test_versions_and_their_markers_are_found_in_paths(rel, version, marker):
    assert (version_of(rel), marker_of(rel)) == (version, marker)


def test_a_models_lock_has_the_key_of_the_swamp_extensions():
    keys = Keyspace("team", "infra")
    assert keys.model_lock(ModelRef("aws/ec2", "m")) == "team/infra/data/aws/ec2/m/.lock"
    assert keys.global_lock == "team/.locks/infra.lock"
    assert Keyspace().global_lock == ".datastore.lock"


@pytest.mark.parametrize(("prefix", "key"), [("", "x"), ("a", "a/x"), ("a/", "a//x"), ("/a", "/a/x")])
def test_prefixes_are_joined_without_normalisation(prefix, key):
    assert Keyspace(prefix).key("x") == key


@pytest.mark.parametrize("text", ["", "/a", "a//b", "a/../b", "..", "a/.", "a\0b", "a\\b", "a/", "\ud800"])
def test_hostile_paths_are_refused(text):
    with pytest.raises(HostileNameError):
        rel_path(text)


def test_long_names_are_refused_by_their_bytes():
    assert rel_path("å" * 127)
    with pytest.raises(NameTooLongError):
        rel_path("å" * 128)
    with pytest.raises(NameTooLongError):
        rel_path("/".join(["d" * 100] * 11))


@pytest.mark.parametrize(
    "rel",
    [".datastore-index.json", "_index/x.json", "_control/a", ".locks/n.lock", "data/t/m/.lock", "x/.namespace.json",
     "data/_catalog.db", "data/_catalog.db-wal", f"data/x/{TEMP}", "metadata.yaml.tmp.12.0f0e9c1a-6b1f"],
)  # fmt: skip
def test_internal_names_are_neither_published_nor_served(rel):
    assert is_internal(rel)
    assert not is_publishable(rel)
    assert not is_servable(rel)


@pytest.mark.parametrize(
    "rel", ["secrets/x", "bundles/x", "vault-bundles/x", "run_tracker.db-shm", "pulled-extensions/x"]
)
def test_secrets_bundles_and_databases_stay_on_this_machine(rel):
    assert is_always_local(rel)
    assert not is_publishable(rel)
    assert not is_servable(rel)


def test_run_logs_are_local_when_made_here_and_served_when_the_index_has_them():
    for rel in ("outputs/a/b/c.log", "workflow-runs/w/x.log", "workflow-runs/w/.runs-index.json"):
        assert is_always_local(rel)
        assert is_servable(rel)
    assert not is_always_local("data/t/m/n/1/raw.log")


@pytest.mark.parametrize("name", [TEMP, ".x.swp", ".#lock", "#save#", ".nfs000000001234", ".swamp-health-check-1"])
def test_scratch_names_are_not_published_and_not_local(name):
    assert is_scratch(f"audit/{name}")
    assert not is_publishable(f"audit/{name}")
    assert not is_always_local(f"audit/{name}")


@pytest.mark.parametrize("name", ["raw", "x.tmp", "notes.swap", ".hidden", "a#b", ".catalog-export.json"])
def test_ordinary_names_are_published(name):
    assert is_publishable(f"audit/{name}")


@pytest.mark.parametrize("slug", ["", "Upper", "-a", "a-", "a/b", "..", "a" * 65])
def test_namespaces_are_slugs(slug):
    with pytest.raises(SettingsError):
        check_namespace(slug)
    assert check_namespace("infra-2") == "infra-2"
