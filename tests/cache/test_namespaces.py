"""Namespaces (spec §1.2, §1.7, §8.6, §13: 95–103): own keys, foreign ones untouched."""

from __future__ import annotations

import json

import pytest
import trio

from swampfs.errors import HostileNameError, NamespaceError, SettingsError
from tests.caches import MODEL, World, compact, entry


def register(world: World, *names: str) -> None:
    for name in names:
        trio.run(world.provider().register_namespace, name, f"repo-{name}")


def test_objects_are_below_the_namespace_and_index_keys_are_bare(world):
    cache = world.cache("a", "infra")
    cache.write(f"{MODEL}/latest", b"1")
    cache.push()
    assert {key.partition("/")[0] for key in world.keys()} == {"infra"}
    assert list(world.entries("infra")) == [f"{MODEL}/latest"]
    assert world.entries("infra")[f"{MODEL}/latest"]["key"] == f"{MODEL}/latest"
    other = world.cache("b", "infra")
    assert other.pull() == 1
    assert (other.directory / "infra" / MODEL / "latest").read_bytes() == b"1"


def test_a_push_touches_no_key_outside_its_namespace(world):
    """H3, H8: neither a solo tenant at the root nor another namespace is read as data, moved or deleted."""
    world.load({f"{MODEL}/latest": b"tenant A", "outputs/x/y/z.yaml": b"A"}, "v1")
    world.put("security/data/test/m1/state/latest", b"S")
    before = {key: world.body(key) for key in world.keys()}
    cache = world.cache("a", "infra")
    for _ in range(3):
        cache.write(f"{MODEL}/1/raw", b"B")
        cache.push()
        cache.pull()
        cache.restart()
    assert {key: world.body(key) for key in before} == before
    touched = {key for op, key in world.recorder.log if op in ("put", "delete", "get", "unchanged")}
    assert all(key.startswith("infra/") for key in touched)


def test_a_missing_object_is_never_taken_from_the_root(world):
    """H8: the un-namespaced key may be another tenant's file."""
    cache = world.cache("a", "infra")
    cache.write("audit/a.jsonl", b"mine")
    cache.push()
    world.bucket.delete("infra/audit/a.jsonl")
    world.put("audit/a.jsonl", b"mine")
    other = world.cache("b", "infra")
    assert other.pull() == 0
    assert other.read("audit/a.jsonl") is None


def test_another_namespace_on_one_service_is_refused(world):
    cache = world.cache("a", "infra")
    cache.pull()
    for namespace in ("security", None):
        with pytest.raises(NamespaceError, match="Namespace mismatch: bound to infra but called with"):
            cache.do("pull_changed", namespace=namespace)


def test_foreign_directories_and_solo_leftovers_in_the_cache_are_not_published(world, caplog):
    cache = world.cache("a", "infra")
    other = cache.directory / "security"
    other.mkdir()
    (other / ".namespace.json").write_text("{}")
    (other / "data").mkdir()
    (other / "data/x").write_bytes(b"theirs")
    (cache.directory / "data/test").mkdir(parents=True)
    (cache.directory / "data/test/old").write_bytes(b"solo leftover")
    nested = cache.path("apps")
    nested.mkdir(parents=True)
    (nested / ".namespace.json").write_text("{}")
    (nested / "x").write_bytes(b"contaminated")
    cache.mark()
    cache.put("audit/a.jsonl", b"mine")
    assert cache.push() == 1
    assert list(world.entries("infra")) == ["audit/a.jsonl"]
    assert f"{cache.directory}/data belongs to no namespace: not published" in caplog.text
    caplog.clear()


def test_internal_files_below_the_namespace_are_not_published(world):
    """H15: a stray ``{ns}/.datastore-index.json`` was uploaded over the real index."""
    cache = world.cache("a", "infra")
    cache.mark()
    for rel in (".datastore-index.json", "_index/_meta.json", "_control/x", ".namespace.json", "data/m/.lock"):
        cache.put(rel, b"stray")
    cache.put("audit/a.jsonl", b"mine")
    assert cache.push() == 1
    assert list(world.entries("infra")) == ["audit/a.jsonl"]
    assert world.document("infra/.datastore-index.json")["version"] == 1


def test_a_complete_namespaced_cache_becomes_clean(world):
    cache = world.cache("a", "infra")
    cache.write("audit/a.jsonl", b"x")
    cache.commit(cache.prepare())
    assert cache.sidecar()["localDirty"] is False
    assert len(world.requests(cache.push)[1]) <= 2


def test_a_marked_path_without_the_namespace_never_deletes(world):
    """H16."""
    cache = world.cache("a", "infra")
    cache.write("outputs/test/run/x.yaml", b"x")
    cache.push()
    cache.do("mark_dirty", rel_path="outputs/test/run/x.yaml")
    assert cache.push() == 0
    assert "outputs/test/run/x.yaml" in world.entries("infra")
    assert world.body("infra/outputs/test/run/x.yaml") == b"x"


def test_two_namespaces_in_one_cache_keep_their_marks_apart(world):
    register(world, "infra", "security")
    infra = world.cache("shared", "infra")
    security = world.cache("shared", "security")
    for cache in (infra, security):
        cache.path(".namespace.json").parent.mkdir(parents=True, exist_ok=True)
        cache.path(".namespace.json").write_text("{}")
        cache.pull()
    infra.write("audit/a", b"i")
    security.write("audit/a", b"s")
    assert infra.push() == 1
    assert security.sidecar()["dirtyPaths"] == ["security/audit/a"]
    assert security.push() == 1


def test_registering_first_come_first_served(world):
    provider = world.provider()
    manifest = trio.run(provider.register_namespace, "infra", "repo-1")
    body = world.body("infra/.namespace.json")
    assert (
        body
        == json.dumps(
            {"namespace": "infra", "repoId": "repo-1", "registeredAt": manifest.registered_at}, indent=2
        ).encode()
    )
    trio.run(provider.register_namespace, "infra", "repo-1")
    with pytest.raises(NamespaceError, match='Namespace "infra" is already registered by repo repo-1'):
        trio.run(provider.register_namespace, "infra", "repo-2")
    for bad in ("", "Infra", "a/b", "..", "-x", "x" * 65, "data", "outputs", "secrets"):
        with pytest.raises(SettingsError):
            trio.run(provider.register_namespace, bad, "repo")
    world.put("a/b/.namespace.json", b"{}")
    trio.run(provider.register_namespace, "apps", "repo-3")
    assert trio.run(provider.list_namespaces) == ["apps", "infra"]


@pytest.mark.parametrize("index", ["v1", "v2"])
def test_repairing_contamination_removes_only_what_is_foreign(world, index):
    """H32: hashes, index version and the sequence survive; local copies do not come back."""
    register(world, "infra", "security")
    cache = world.cache("a", "infra")
    cache.path(".namespace.json").parent.mkdir(parents=True)
    cache.write("audit/a.jsonl", b"mine")
    cache.push()
    if index == "v2":
        cache.do("migrate_monolith_to_shards", namespace="infra")
    world.put("infra/security/data/x/y/z/1/raw", b"theirs")
    world.put("infra/security/.namespace.json", b"{}")
    cache.put("security/data/x/y/z/1/raw", b"theirs")
    if index == "v1":
        document = world.document("infra/.datastore-index.json")
        document["entries"]["security/data/x/y/z/1/raw"] = entry("security/data/x/y/z/1/raw", b"theirs")
        world.put("infra/.datastore-index.json", document)
    before = dict(world.bucket.objects)
    report = cache.do("repair_namespace_contamination", namespace="infra")
    assert [tuple(found) for found in report.foreign_namespaces] == [("security", 2)]
    assert (report.total_foreign_objects, report.deleted) == (2, 0)
    assert world.bucket.objects == before
    report = cache.do("repair_namespace_contamination", namespace="infra", dry_run=False)
    assert report.deleted == 2
    assert not [key for key in world.keys() if key.startswith("infra/security")]
    assert set(world.entries("infra")) == {"audit/a.jsonl"}
    assert world.entries("infra")["audit/a.jsonl"]["sha256"]
    assert "security/.namespace.json" in world.keys()
    assert not cache.path("security").exists()
    if index == "v2":
        assert world.document("infra/_index/_meta.json")["commitSeq"] > 1
    cache.mark()
    assert cache.push() == 0
    clean = cache.do("repair_namespace_contamination", namespace="infra", dry_run=False)
    assert tuple(clean) == ((), 0, 0)
    assert tuple(world.cache("solo").do("repair_namespace_contamination", dry_run=False)) == ((), 0, 0)


def test_a_path_outside_the_bound_namespace_cannot_be_hydrated(world):
    cache = world.cache("a", "infra")
    cache.pull()
    with pytest.raises(HostileNameError):
        cache.do("hydrate_file", "security/data/x")


def test_a_migration_of_a_namespace_stays_below_it(world):
    world.put("data/a/b/c", b"root tenant")
    world.put("infra/data/test/m1/state/latest", b"1")
    cache = world.cache("a", "infra")
    shards = cache.do("migrate_monolith_to_shards", namespace="infra")
    assert shards.partitions == ("data--test--m1--state",)
    assert {key for key in world.keys() if "_index" in key} == {
        "infra/_index/_meta.json",
        "infra/_index/data--test--m1--state.json",
    }
    assert compact(world.document("infra/_index/_meta.json")) == world.body("infra/_index/_meta.json")


def test_a_manifest_that_cannot_be_read_is_nobodys_to_take(world):
    for body in (b'{"namespace"', b"[]", b"null", b'{"repoId": null}'):
        world.put("infra/.namespace.json", body)
        with pytest.raises(NamespaceError, match="cannot be read"):
            trio.run(world.provider().register_namespace, "infra", "repo-1")
        assert world.body("infra/.namespace.json") == body


def test_a_namespace_named_like_a_directory_costs_nobody_their_data(world):
    """``data/.namespace.json``: a repair took all of ``infra/data/`` for that namespace's."""
    cache = world.cache("a", "infra")
    cache.write("data/test/m1/state/latest", b"precious")
    cache.push()
    world.put("data/.namespace.json", b'{"namespace":"data","repoId":"x"}')
    report = cache.do("repair_namespace_contamination", namespace="infra", dry_run=False)
    assert report.deleted == 0
    assert world.body("infra/data/test/m1/state/latest") == b"precious"
    solo = world.cache("b")
    solo.put("data/.namespace.json", b"{}")
    solo.write("data/test/m2/state/latest", b"mine")
    assert solo.push() == 1
