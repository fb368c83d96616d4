"""Golden fixtures both ways: the caches of the existing extensions are read, and the same edits give the same bucket.

The comparer allows differences only in what the format calls informational: ``lastPulled``, ``lastModified`` of new
entries, and the order of entries (which is that of finished uploads).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from swampfs.names import is_internal
from swampfs.state.sidecar import Sidecar
from tests.caches import Cache, World
from tests.harness import FIXTURES

pytestmark = pytest.mark.compat

VPC = "data/aws/ec2/vpc/d82fa959-4195-438f-9f9a-57ab069d4b7c"
THING = "data/@acme/thing/a73bc38d-2f8b-4c70-ac36-5a84355a927d"
TEST = "data/test/11111111-1111-4111-8111-111111111111"
ECHO = "data/swamp/echo"

# Scenario, namespace: a bucket and the whole cache of the machine that wrote it last.
WRITERS = [
    ("01-solo-monolith", ""), ("02-shard-first/b-two-phase", ""), ("03-deletes/c-monolith-scoped", ""),
    ("03-deletes/g-monolith-overflow", ""), ("04-namespace-infra/a-monolith", "infra"),
    ("04-namespace-infra/c-shards", "infra"), ("06-sidecars-state", ""), ("solo-v1", ""), ("solo-v2", ""),
    ("solo-v2-deletes", ""), ("locks", ""), ("namespaced-v2", "infra"), ("namespaced-v2", "security"),
]  # fmt: skip


def load(world: World, scenario: Path) -> None:
    bucket = scenario / "bucket" if (scenario / "bucket").is_dir() else scenario
    for path in sorted(bucket.rglob("*")):
        if path.is_file():
            world.bucket.put(str(path.relative_to(bucket)), path.read_bytes())


def cache_dir(scenario: Path, namespace: str) -> Path:
    own = scenario / f"cache-{namespace}"
    return own if namespace and own.is_dir() else scenario / "cache"


def times(scenario: Path, namespace: str) -> dict[str, int]:
    """Path → mtime in ms, in either shape of the fixtures."""
    own = scenario / f"cache-{namespace}_stat.json"
    found = json.loads((own if namespace and own.exists() else scenario / "cache_stat.json").read_text())
    return found.get("mtime_ms") or {rel: values[0] for rel, values in found["mtimeMs_size_sha256"].items()}


def copy_cache(world: World, scenario: Path, namespace: str = "", *, name: str = "a") -> Cache:
    """A cache as it was on disk, with its times."""
    target = world.directory / name
    shutil.copytree(cache_dir(scenario, namespace), target, copy_function=shutil.copyfile)
    for directory, _, _ in os.walk(target):
        os.chmod(directory, 0o755)
    for rel, ms in times(scenario, namespace).items():
        if (target / rel).exists():
            os.utime(target / rel, ns=(ms * 1_000_000, ms * 1_000_000))
    return world.cache(name, namespace)


def informational(document: Any, before: dict[str, Any]) -> Any:
    """An index document without what may differ: times of entries that are new since ``before``."""
    if not isinstance(document, dict):
        return document
    plain = {name: value for name, value in document.items() if name != "lastPulled"}
    if plain.get("version") == 1 and "partitions" in plain:
        plain["partitions"] = sorted(plain["partitions"])
    if "entries" in plain:
        plain["entries"] = {
            rel: entry if before.get(rel) == entry else {**entry, "lastModified": "…"}
            for rel, entry in plain["entries"].items()
        }
    return plain


def assert_same_bucket(world: World, expected: Path, before: dict[str, Any]) -> None:
    """Our bucket is the reference's: same keys, same bytes, index documents equal but for what is informational."""
    bucket = expected / "bucket" if (expected / "bucket").is_dir() else expected
    theirs = {str(path.relative_to(bucket)): path.read_bytes() for path in bucket.rglob("*") if path.is_file()}
    assert world.keys() == set(theirs)
    for key, body in theirs.items():
        ours = world.body(key)
        if ours == body:
            continue
        assert "_index/" in key or key.endswith(".datastore-index.json"), f"{key} differs"
        assert informational(json.loads(ours or b""), before) == informational(json.loads(body), before), key
        assert ours == json.dumps(json.loads(ours or b""), ensure_ascii=False, separators=(",", ":")).encode()


# --- reading -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "namespace"), WRITERS)
def test_a_cache_of_the_reference_is_taken_over_as_it_is(reference, world, name, namespace):
    """Every file and hash is right, nothing is downloaded or uploaded again, and it is clean afterwards."""
    scenario = reference / name
    load(world, scenario)
    bucket = dict(world.bucket.objects)
    cache = copy_cache(world, scenario, namespace)
    assert cache.pull() == 0
    assert cache.push() == 0
    assert world.bucket.objects == bucket
    head = f"{namespace}/" if namespace else ""
    for rel, entry in world.entries(namespace).items():
        body = cache.read(rel)
        assert body is not None, rel
        assert (len(body), hashlib.sha256(body).hexdigest()) == (entry["size"], entry["sha256"]), rel
        assert world.body(head + rel) == body
    cache.mark()
    assert cache.push() == 0
    assert world.bucket.objects == bucket
    assert cache.sidecar()["localDirty"] is False


def sidecars() -> list[Path]:
    found = sorted(FIXTURES.rglob("*sidecar*/**/*.json"))
    return [path for path in found if '"remoteIndexETag"' in path.read_text()[:200]]


@pytest.mark.parametrize("path", sidecars() or [None], ids=lambda path: path.name if path else "none")
def test_every_sidecar_of_the_reference_is_read(reference, path, tmp_path):
    document = json.loads(path.read_text())
    shutil.copyfile(path, tmp_path / ".datastore-sync-state.json")
    state = Sidecar(str(tmp_path)).load()
    assert state is not None
    assert state.fingerprint == document["remoteIndexETag"]
    assert state.local_dirty == document["localDirty"]
    assert list(state.paths) == document.get("dirtyPaths", [])
    assert state.commit_seq == document.get("commitSeq")
    assert state.overflowed == document.get("dirtyPathsOverflowed", False)
    assert state.lazy == document.get("lazyPullActive", False)


# --- pulling -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "full", "lazy"),
    [("solo-v2", 115, 75), ("07-metadata-only/a-lazy", 55, 41), ("04-namespace-infra/a-monolith", 30, None),
     ("no-index/bucket", 59, None), ("locks", 3, None)],
)  # fmt: skip
def test_pulls_bring_as_many_files_as_the_reference_recorded(reference, world, name, full, lazy):
    load(world, reference / name)
    namespace = "infra" if "namespace" in name else ""
    cache = world.cache("a", namespace)
    if lazy is not None:
        assert cache.pull(metadata_only=True) == lazy
        assert cache.pull(metadata_only=True) == 0
        assert cache.pull() == full - lazy
    else:
        assert cache.pull() == full
    assert cache.pull() == 0
    for rel, entry in world.entries(namespace).items():
        if entry.get("sha256"):
            assert hashlib.sha256(cache.read(rel) or b"").hexdigest() == entry["sha256"]


def test_a_lazy_cache_of_the_reference_is_completed(reference, world):
    load(world, reference / "solo-v2")
    cache = copy_cache(world, reference / "lazy-cache")
    assert cache.sidecar()["lazyPullActive"] is True
    assert cache.pull() == 40
    assert cache.push() == 0
    assert cache.sidecar()["lazyPullActive"] is False


# --- the same edits ----------------------------------------------------------------------------------------


def write_version(cache: Cache, source: Path, top: str, *rels: str) -> None:
    """Files as the reference had them, with their times."""
    stamps = times(source, "")
    for rel in rels:
        cache.put(f"{top}/{rel}", (source / "cache" / top / rel).read_bytes())
        ms = stamps[f"{top}/{rel}"]
        os.utime(cache.path(f"{top}/{rel}"), ns=(ms * 1_000_000, ms * 1_000_000))


def test_a_migration_changes_meta_alone(reference, world):
    load(world, reference / "01-solo-monolith")
    before = world.entries()
    shards = world.cache("a").do("migrate_monolith_to_shards")
    assert shards.commit_seq == 1
    assert_same_bucket(world, reference / "02-shard-first/a-migrated", before)


def test_a_two_phase_push_of_a_new_version(reference, world):
    load(world, reference / "02-shard-first/a-migrated")
    cache = copy_cache(world, reference / "01-solo-monolith")
    cache.pull()
    before = world.entries()
    cache.mark(f"{VPC}/main")
    write_version(cache, reference / "02-shard-first/b-two-phase", f"{VPC}/main", "2/raw", "2/metadata.yaml", "latest")
    manifest = cache.prepare()
    assert (manifest.pushed, manifest.deleted) == (3, 0)
    assert cache.commit(manifest) == 3
    assert_same_bucket(world, reference / "02-shard-first/b-two-phase", before)


def test_a_one_phase_push_of_one_output(reference, world):
    load(world, reference / "02-shard-first/b-two-phase")
    cache = copy_cache(world, reference / "02-shard-first/b-two-phase")
    before = world.entries()
    cache.mark()
    rel = "outputs/swamp/echo/run/extra-2026-11-20T00-00-00-000Z.yaml"
    cache.put(rel, b"extra: true\n")
    expected = reference / "02-shard-first/c-one-phase"
    ms = times(expected, "")[rel]
    os.utime(cache.path(rel), ns=(ms * 1_000_000, ms * 1_000_000))
    assert cache.push() == 1
    assert_same_bucket(world, expected, before)


def test_a_stale_reader_of_the_monolith_era_catches_up(reference, world):
    """H41: the reference stays at the frozen monolith for ever and pulls nothing."""
    load(world, reference / "02-shard-first/c-one-phase")
    cache = copy_cache(world, reference / "01-solo-monolith")
    assert cache.pull() == 4
    assert cache.read(f"{VPC}/main/latest") == b"2"


def test_the_reference_reverted_a_marker_and_we_do_not(reference, world):
    """H1: the end state of fixture 02/g is the defect; from its start, ours must differ."""
    load(world, reference / "02-shard-first/c-one-phase")
    one, two = world.cache("one"), world.cache("two")
    one.pull()
    two.pull()
    one.mark(f"{VPC}/main")
    for rel in ("raw", "metadata.yaml"):
        one.put(f"{VPC}/main/3/{rel}", one.read(f"{VPC}/main/2/{rel}") or b"")
    one.put(f"{VPC}/main/latest", b"3")
    assert one.commit(one.prepare()) == 3
    assert two.pull() == 3
    two.mark()
    assert two.push() == 0
    assert world.body(f"{VPC}/main/latest") == b"3"


def test_deleting_everything_of_a_model_empties_its_shards(reference, world):
    load(world, reference / "03-deletes/e-shards-stuck-after-bulk")
    cache = world.cache("a")
    assert cache.pull() == 56
    before = world.entries()
    shutil.rmtree(cache.path("data/swamp"))
    cache.mark(ECHO)
    manifest = cache.prepare()
    assert (manifest.pushed, manifest.deleted) == (0, 10)
    assert cache.commit(manifest) == 10
    assert_same_bucket(world, reference / "03-deletes/f-shards-emptied", before)


def test_a_bulk_mark_deletes_nothing(reference, world):
    load(world, reference / "03-deletes/c-monolith-scoped")
    cache = copy_cache(world, reference / "03-deletes/c-monolith-scoped")
    cache.pull()
    before = world.entries()
    cache.path(f"{THING}/blob/latest").unlink()
    cache.mark()
    assert cache.push() == 0
    assert_same_bucket(world, reference / "03-deletes/d-monolith-bulk", before)


def test_changing_one_file_of_a_migrated_namespace(reference, world):
    load(world, reference / "04-namespace-infra/a-monolith")
    cache = copy_cache(world, reference / "04-namespace-infra/a-monolith", "infra")
    cache.pull()
    before = world.entries("infra")
    shards = cache.do("migrate_monolith_to_shards", namespace="infra")
    assert shards.commit_seq == 1
    expected = reference / "04-namespace-infra/c-shards"
    cache.mark(f"{VPC}/blob")
    cache.put(f"{VPC}/blob/1/raw", b"changed blob, longer than before\n")
    ms = times(expected, "infra")[f"infra/{VPC}/blob/1/raw"]
    os.utime(cache.path(f"{VPC}/blob/1/raw"), ns=(ms * 1_000_000, ms * 1_000_000))
    assert cache.commit(cache.prepare()) == 1
    assert_same_bucket(world, expected, before)


def test_migrating_and_pushing_a_version(reference, world):
    load(world, reference / "solo-v1")
    cache = copy_cache(world, reference / "solo-v1")
    cache.pull()
    before = world.entries()
    shards = cache.do("migrate_monolith_to_shards")
    recorded = json.loads((reference / "solo-v2/results.json").read_text())
    assert json.dumps(list(shards.partitions), ensure_ascii=False) in json.dumps(recorded, ensure_ascii=False)
    cache.mark(f"{VPC}/main")
    write_version(cache, reference / "solo-v2", f"{VPC}/main", "4/raw", "4/metadata.yaml", "latest")
    assert cache.commit(cache.prepare()) == 3
    assert_same_bucket(world, reference / "solo-v2", before)


def test_deletes_of_files_directories_and_whole_tops(reference, world):
    load(world, reference / "solo-v2")
    cache = copy_cache(world, reference / "solo-v2")
    cache.pull()
    before = world.entries()
    for rel in (f"{TEST}/state/1", f"{THING}/item-1", "workflow-runs", f"{TEST}/state/2/raw"):
        cache.mark(rel)
        path = cache.path(rel)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert cache.push() == 7
    assert_same_bucket(world, reference / "solo-v2-deletes", before)


def test_the_first_push_of_a_whole_repository(reference, world):
    """Every file of a cache into an empty bucket: 55 objects, a monolith, 20 shards, meta."""
    scenario = reference / "01-solo-monolith"
    cache = copy_cache(world, scenario)
    for name in (".datastore-index.json", ".datastore-sync-state.json"):
        (cache.directory / name).unlink(missing_ok=True)
    cache.mark()
    assert cache.push() == 55
    assert not [key for key in world.keys() if is_internal(key) and "_index" not in key and "index.json" not in key]
    assert_same_bucket(world, scenario, {})


def test_the_same_deletes_by_path_and_by_overflow(reference, world):
    expected = reference / "03-deletes/c-monolith-scoped"
    cache = world.cache("a")
    source = reference / "01-solo-monolith"
    stamps = times(source, "")
    for rel in sorted(stamps):
        if rel.startswith(f"{THING}/"):
            cache.put(rel, (source / "cache" / rel).read_bytes())
            os.utime(cache.path(rel), ns=(stamps[rel] * 1_000_000, stamps[rel] * 1_000_000))
    cache.mark()
    assert cache.push() == 13
    for rel in ("raw", "metadata.yaml"):
        cache.path(f"{THING}/main/1/{rel}").unlink()
    for number in range(201):
        cache.mark(f"data/none/{number}/x")
    assert cache.push() == 2
    theirs = json.loads((expected / "bucket/.datastore-index.json").read_text())["entries"]
    assert {rel: entry["sha256"] for rel, entry in world.entries().items()} == {
        rel: entry["sha256"] for rel, entry in theirs.items()
    }


def test_the_messages_the_reference_recorded(reference, world):
    """Owners of namespaces and holders of locks are named in the same words."""
    import trio

    from swampfs.errors import LockTimeoutError, NamespaceError
    from swampfs.provider import LockOptions

    load(world, reference / "04-namespace-infra/a-monolith")
    provider = world.provider()
    assert trio.run(provider.list_namespaces) == ["apps", "infra"]
    with pytest.raises(NamespaceError, match=r'^Namespace "apps" is already registered by repo repo-apps$'):
        trio.run(provider.register_namespace, "apps", "somebody-else")
    locks = World(world.directory / "locks")
    load(locks, reference / "05-locks")
    key = next(key for key in locks.keys() if key.startswith("data/aws"))
    lock = locks.provider().create_lock("/d", LockOptions(lock_key=key, max_wait_ms=50, retry_interval_ms=10))
    info = trio.run(lock.inspect)
    assert json.dumps(info.as_json(), indent=2).encode() == locks.body(key)
    assert trio.run(lock.force_release, "wrong") is False
    with pytest.raises(
        LockTimeoutError, match=rf'^Lock "{key}" held by unknown@vm \(pid \d+\) — timed out after \d+ms$'
    ):
        trio.run(lock.acquire)
