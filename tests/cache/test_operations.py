"""Migration, hydration, catalogs, control records (spec §8, §1.10, §13: 104–110)."""

from __future__ import annotations

import json

import pytest
import trio

from swampfs.errors import (
    CacheError,
    HostileNameError,
    IndexCorruptError,
    StoreUnreachableError,
    UnpartitionableError,
)
from tests.caches import MODEL, When, compact, entry

FILES = {f"{MODEL}/1/raw": b"one", f"{MODEL}/latest": b"1", "audit/a.jsonl": b"{}"}


def test_a_migration_preserves_every_entry_byte_for_byte(world):
    world.load(FILES, "v1")
    before = world.document(".datastore-index.json")["entries"]
    monolith = world.body(".datastore-index.json")
    cache = world.cache("a")
    shards = cache.do("migrate_monolith_to_shards")
    assert (shards.version, shards.commit_seq) == (2, 1)
    assert world.document("_index/_meta.json")["partitions"] == sorted(shards.partitions)
    assert world.entries() == before
    assert world.body(".datastore-index.json") == monolith
    assert cache.pull() == len(FILES)


def test_an_unpartitionable_entry_aborts_a_migration_with_nothing_written(world):
    """Lesson 20."""
    world.load({**FILES, **{f"definitions-evaluated/test/{n}.yaml": b"" for n in range(12)}}, "v1")
    before = dict(world.bucket.objects)
    with pytest.raises(UnpartitionableError, match=r"12 of 15 entries have no partition: .* and 2 more"):
        world.cache("a").do("migrate_monolith_to_shards")
    assert world.bucket.objects == before


def test_a_migration_that_broke_off_can_be_repeated(world):
    world.load(FILES, "v1")
    world.put("_index/_meta.json", {"version": 1, "partitions": ["audit"]})
    cache = world.cache("a")
    fault = world.fail("put", "_index/_meta.json", times=99)
    with pytest.raises(StoreUnreachableError):
        cache.do("migrate_monolith_to_shards")
    assert world.document("_index/_meta.json")["version"] == 1
    assert world.cache("b").pull() == len(FILES)
    fault.times = 0
    cache.do("migrate_monolith_to_shards")
    assert set(world.entries()) == set(FILES)


def test_migrating_a_version_2_store_loses_nothing_and_does_not_go_back(world):
    """H12, H33: the monolith is stale by then."""
    world.load(FILES, "v1")
    cache = world.cache("a")
    cache.pull()
    cache.do("migrate_monolith_to_shards")
    for number in range(3):
        cache.write(f"audit/{number}.jsonl", b"x")
        cache.push()
    before = world.entries()
    shards = cache.do("migrate_monolith_to_shards")
    assert shards.commit_seq == 5
    assert world.entries() == before
    assert cache.pull() == 0


def test_an_empty_monolith_makes_meta_of_the_shards_there_are(world):
    world.load(FILES, "v2")
    world.bucket.delete("_index/_meta.json")
    world.put(".datastore-index.json", compact({"version": 1, "entries": {}}))
    shards = world.cache("a").do("migrate_monolith_to_shards")
    assert shards.partitions == ("audit", "data--test--m1", "data--test--m1--state")
    assert set(world.entries()) == set(FILES)


def test_hydrating_puts_the_file_where_it_was_asked_for(world):
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull(metadata_only=True)
    assert cache.do("hydrate_file", f"{MODEL}/1/raw") is True
    assert cache.read(f"{MODEL}/1/raw") == b"one"
    assert cache.do("hydrate_file", f"{MODEL}/1/raw") is True
    assert cache.do("hydrate_file", "data/none/raw") is False
    assert not (cache.directory / "data/none").exists()
    world.put("data/unlisted/raw", b"no index names it")
    assert cache.do("hydrate_file", "data/unlisted/raw") is True


def test_hydrating_in_a_namespace_does_not_double_it(world):
    """H9."""
    one, two = world.cache("a", "infra"), world.cache("b", "infra")
    one.write(f"{MODEL}/1/raw", b"one")
    one.push()
    two.pull(metadata_only=True)
    assert two.do("hydrate_file", f"infra/{MODEL}/1/raw") is True
    assert (two.directory / "infra" / MODEL / "1/raw").read_bytes() == b"one"
    assert not (two.directory / "infra/infra").exists()


def test_hydrating_replaces_no_local_change(world):
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.write(f"{MODEL}/latest", b"mine")
    assert cache.do("hydrate_file", f"{MODEL}/latest") is True
    assert cache.read(f"{MODEL}/latest") == b"mine"


ROWS = [{"relPath": "data/é", "size": 1, "lastModified": "2026-08-03T09:14:22.401Z"}]


def test_an_export_with_the_same_rows_is_not_written_again_also_by_another_instance(world):
    cache = world.cache("a")
    cache.do("export_catalog", "infra", ROWS)
    assert (
        world.body("infra/.catalog-export.json") == json.dumps(ROWS, ensure_ascii=False, separators=(",", ":")).encode()
    )
    cache.restart()
    assert world.requests(lambda: cache.do("export_catalog", "infra", ROWS))[1] == []
    # Equal rows of another namespace are another export; the reference's one hash for all would skip it.
    cache.do("export_catalog", "apps", ROWS)
    assert "apps/.catalog-export.json" in world.keys()
    assert len(cache.sidecar()["lastCatalogHash"]) == 64


def test_foreign_catalogs_missing_or_malformed_are_left_out_and_failures_are_not(world):
    cache = world.cache("a")
    cache.do("export_catalog", "infra", ROWS)
    world.put("bad/.catalog-export.json", b"{")
    world.put("object/.catalog-export.json", b"{}")
    found = cache.do("pull_foreign_catalogs", ["none", "bad", "object", "infra"])
    assert [(catalog.namespace, catalog.rows) for catalog in found] == [("infra", ROWS)]
    world.fail("get", "infra/", times=99)
    with pytest.raises(StoreUnreachableError):
        cache.do("pull_foreign_catalogs", ["infra"])


@pytest.mark.parametrize("rel", ["../x", "/etc/passwd", "\\x", "a/../../x", ""])
def test_foreign_content_cannot_leave_its_namespace(world, rel):
    cache = world.cache("a")
    with pytest.raises(HostileNameError, match="Path traversal rejected"):
        cache.do("fetch_foreign_content", "infra", rel)
    with pytest.raises(HostileNameError, match="Path traversal rejected"):
        cache.do("fetch_foreign_content", "../up", "data/x")


def test_foreign_content_is_read_without_a_trace_in_the_cache(world):
    world.put("infra/data/x/y/z", b"theirs")
    cache = world.cache("a")
    assert cache.do("fetch_foreign_content", "infra", "data/x/y/z") == b"theirs"
    assert cache.do("fetch_foreign_content", "infra", "data/none") is None
    assert cache.files() == set()


def test_control_records_are_isolated_by_namespace_and_survive_lost_answers(world):
    solo, infra = world.cache("a"), world.cache("b", "infra")
    infra.pull()

    async def use() -> None:
        root, records = solo.service.control_plane_store(), infra.service.control_plane_store()
        await root.put("heartbeats/1", b"r")
        await records.put("heartbeats/1", b"n")
        assert (await root.get("heartbeats/1"), await records.get("heartbeats/1")) == (b"r", b"n")
        assert await records.list("heart") == ["heartbeats/1"]
        assert await records.list("none") == []
        await records.delete("heartbeats/1")
        await records.delete("heartbeats/1")
        assert await records.get("heartbeats/1") is None
        assert await records.put_if_absent("claims/1", b"x") is True
        assert await records.put_if_absent("claims/1", b"x") is False
        await records.delete("claims/1")
        assert await records.put_if_absent("claims/1", b"y") is True
        # A put that was applied and not answered is tried again and refused: it was ours all the same.
        world.fail("put", "claims/2", when=When.AFTER)
        assert await records.put_if_absent("claims/2", b"z") is True
        with pytest.raises(HostileNameError):
            await records.put("../up", b"")

    trio.run(use)
    assert {key for key in world.keys() if "claims" in key} == {"infra/_control/claims/1", "infra/_control/claims/2"}
    assert "_control/heartbeats/1" in world.keys()


def test_control_records_are_no_files(world):
    world.put("_control/tokens/a", b"1")
    world.put("audit/a", b"x")
    cache = world.cache("a")
    assert cache.pull() == 1
    cache.mark()
    cache.push()
    assert world.body("_control/tokens/a") == b"1"


def test_the_helper_writes_entries_as_the_format_has_them():
    assert list(entry("x", b"")) == ["key", "size", "lastModified", "localMtime", "sha256"]


def test_downloads_of_a_dead_process_are_cleared_and_those_of_a_live_one_are_not(world):
    import os
    import time

    cache = world.cache("a")
    staging = cache.directory / "_index/staging"
    staging.mkdir(parents=True)
    for name, age_s in (("old", 2 * 24 * 3600), ("young", 60)):
        (staging / name).write_bytes(b"half")
        os.utime(staging / name, (time.time() - age_s,) * 2)
    cache.pull()
    assert [path.name for path in staging.iterdir()] == ["young"]


def test_a_namespace_may_have_any_name(world):
    """Also those of our own files."""
    for name in ("solo", "marks", "ns-x"):
        cache = world.cache("shared", name)
        cache.write("audit/x", name.encode())
        assert cache.push() == 1
    solo = world.cache("shared")
    assert solo.pull() >= 0
    assert [world.body(f"{name}/audit/x") for name in ("solo", "marks")] == [b"solo", b"marks"]


def test_a_cache_that_is_given_another_datastore_loses_nothing(world, tmp_path):
    """A changed prefix in ``.swamp.yaml``, or two repositories without an id: not a thousand deletions."""
    world.load(FILES, "v2")
    cache = world.cache("a")
    cache.pull()
    cache.provider = world.provider(prefix="elsewhere")
    cache.service = cache.provider.create_sync_service("/repo", str(cache.directory))
    assert cache.pull() == 0
    assert cache.files() == set(FILES)


@pytest.mark.parametrize("index", ["v1", "v2"])
def test_a_datastore_that_lost_everything_is_an_error_and_no_deletion(world, index):
    world.load(FILES, index)
    cache = world.cache("a")
    cache.pull()
    world.bucket.objects.clear()
    for call in (cache.pull, cache.push):
        with pytest.raises(IndexCorruptError, match="neither an index nor files any more"):
            call()
    assert cache.files() == set(FILES)
    world.load({}, index)  # an index that lists nothing is an answer
    world.put(".datastore-index.json", {"version": 1, "entries": {}})
    cache.pull()
    assert cache.files() == set()


def test_faults_of_this_machines_disk_are_one_kind_of_error(world):
    """A locked database, a file where a directory should be: nothing raw, nothing lost."""
    import sqlite3

    broken = world.directory / "broken"
    broken.write_bytes(b"a file")
    with pytest.raises(CacheError, match="broken"):
        world.provider().create_sync_service("/repo", str(broken))
    cache = world.cache("a")
    cache.write("audit/a", b"1")
    cache.service._log._db.execute("PRAGMA busy_timeout=50")
    other = sqlite3.connect(cache.directory / "_index/marks.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(CacheError, match="database is locked"):
        cache.mark("audit/b")
    other.close()
    assert cache.push() == 1


def test_secrets_are_neither_published_nor_fetched(world):
    """Lesson 49."""
    world.put("secrets/local_encryption/v/k.enc", b"somebody's")
    cache = world.cache("a")
    assert cache.do("hydrate_file", "secrets/local_encryption/v/k.enc") is False
    assert cache.pull() == 0
    cache.write("secrets/local_encryption/v/mine.enc", b"mine")
    cache.mark()
    assert cache.push() == 0
    assert world.keys() == {"secrets/local_encryption/v/k.enc"}
