"""Journal, catalog, cache directory and sidecar, without network or kernel."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest

from swampfs.names import RelPath
from swampfs.records import (
    RESIDENCY_MOVES,
    DirtyPath,
    IndexDelta,
    IndexEntry,
    IndexMode,
    Kind,
    Op,
    Partition,
    Residency,
    Watermark,
)
from swampfs.state.apply import apply_delta
from swampfs.state.cache_dir import CacheDir
from swampfs.state.catalog import Catalog
from swampfs.state.journal import Journal
from swampfs.state.schema import is_disk_full
from swampfs.state.sidecar import Sidecar

A, B = RelPath("audit/a"), RelPath("audit/b")
BASE = IndexEntry(A, 3, "2026-08-03T09:14:22.401Z", None, "a" * 64)


@pytest.fixture
def journal(tmp_path):
    running = Journal(str(tmp_path / "journal.db"))
    yield running
    running.close()


@pytest.fixture
def catalog(tmp_path):
    running = Catalog(str(tmp_path / "catalog.db"))
    yield running
    running.close()


def delta(**partitions: list[IndexEntry]) -> IndexDelta:
    changed = {name: Partition(f"etag {len(entries)}", tuple(entries)) for name, entries in partitions.items()}
    return IndexDelta(Watermark(IndexMode.SHARDS, 1, "m"), changed, frozenset(partitions))


def test_a_push_retires_exactly_the_generation_it_uploaded(journal):
    journal.mark_write(A, BASE, "audit")
    (sealed,) = journal.seal([A])
    journal.mark_write(A, BASE, "audit")
    newer = BASE._replace(size=4)
    assert journal.retire([(sealed, newer, "audit")]) == set()
    kept = journal.get(A)
    assert kept is not None
    assert kept.generation > sealed.generation
    assert kept.base == newer
    (again,) = journal.seal([A])
    assert journal.retire([(again, newer, "audit")]) == {A}
    assert len(journal) == 0


def test_a_second_mark_costs_no_commit(journal):
    journal.mark_write(A, None, None)
    before = journal._db.total_changes
    for _ in range(100):
        journal.mark_write(A, None, None)
    assert journal._db.total_changes == before


def test_removing_what_never_was_published_forgets_it(journal):
    journal.mark_write(A, None, None)
    journal.mark_delete(A, None, None)
    assert len(journal) == 0
    journal.mark_write(A, BASE, "audit")
    journal.mark_delete(A, None, None)
    record = journal.get(A)
    assert record == DirtyPath(A, Op.DELETE, record.generation, BASE, "audit")


def test_marks_survive_a_restart(tmp_path):
    first = Journal(str(tmp_path / "j.db"))
    first.mark_write(A, BASE, "audit")
    intent = first.mark_rename(A, B, [])
    first.close()
    second = Journal(str(tmp_path / "j.db"))
    assert second.op(A) is Op.WRITE
    assert second.intents() == [intent]
    assert not second.lost
    second.close()


def test_a_delta_adds_changes_and_removes_only_its_own_rows(catalog):
    apply_delta(catalog, delta(audit=[BASE, BASE._replace(path=B)], files=[BASE._replace(path=RelPath("files/x"))]), ())
    assert {node.path for node in catalog.files_below("")} == {A, B, "files/x"}
    ino = catalog.at(A).ino
    changed = BASE._replace(sha256="b" * 64)
    result = apply_delta(
        catalog, IndexDelta(Watermark(IndexMode.SHARDS, 2, "n"), {"audit": Partition("e", (changed,))},
                            frozenset({"audit", "files"})), (),
    )  # fmt: skip
    assert {node.path for node in catalog.files_below("")} == {A, "files/x"}
    assert catalog.at(A).ino != ino  # new content is a new inode
    assert {node.path for node in result.stale} == {A, B}
    apply_delta(catalog, IndexDelta(Watermark(IndexMode.SHARDS, 3, "o"), {}, frozenset({"files"})), ())
    assert catalog.at("audit") is None  # an implied directory goes with its last file
    assert catalog.at("files") is not None


def test_a_directory_made_by_hand_stays_when_it_becomes_empty(catalog):
    from swampfs.records import Kind

    catalog.add(RelPath("audit"), Kind.DIRECTORY, mode=0o755, residency=Residency.CLEAN)
    apply_delta(catalog, delta(audit=[BASE]), ())
    apply_delta(catalog, delta(audit=[]), ())
    assert catalog.at("audit") is not None


def test_busy_paths_are_left_alone_and_asked_for_again(catalog):
    apply_delta(catalog, delta(audit=[BASE]), ())
    apply_delta(catalog, delta(audit=[BASE._replace(sha256="b" * 64)]), {A})
    assert catalog.at(A).base == BASE
    assert catalog.look_again()
    apply_delta(catalog, delta(audit=[BASE._replace(sha256="b" * 64)]), ())
    assert catalog.at(A).base.sha256 == "b" * 64
    assert not catalog.look_again()


def test_inode_numbers_are_stable_and_never_reused(tmp_path):
    first = Catalog(str(tmp_path / "c.db"))
    apply_delta(first, delta(audit=[BASE, BASE._replace(path=B)]), ())
    kept, gone = first.at(A).ino, first.at(B).ino
    apply_delta(first, delta(audit=[BASE]), ())
    first.close()
    second = Catalog(str(tmp_path / "c.db"))
    apply_delta(second, delta(audit=[BASE, BASE._replace(path=RelPath("audit/c"))]), ())
    assert second.at(A).ino == kept
    assert second.at("audit/c").ino > gone
    second.close()


def test_residency_moves_only_along_its_table():
    assert set(RESIDENCY_MOVES) == set(Residency)
    assert Residency.EVICTING not in RESIDENCY_MOVES[Residency.DIRTY]  # dirty is the only copy


def test_the_cache_never_follows_a_planted_link(tmp_path):
    cache = CacheDir(str(tmp_path / "home"))
    outside = tmp_path / "outside"
    outside.write_text("precious")
    os.makedirs(tmp_path / "home/files/audit")
    os.symlink(outside, tmp_path / "home/files/audit/a")
    with pytest.raises(OSError):
        cache.open(A)
    with pytest.raises(OSError):
        cache.create(A)
    assert outside.read_text() == "precious"


def test_content_is_admitted_over_whatever_stood_in_its_way(tmp_path):
    cache = CacheDir(str(tmp_path))
    for rel in (RelPath("audit"), RelPath("audit/a"), RelPath("audit/a/b"), RelPath("audit")):
        staged = cache.stage()
        with open(staged, "w") as file:
            file.write(rel)
        cache.admit(staged, rel, 10**18)
        fd = cache.open(rel)
        assert os.read(fd, 99).decode() == rel
        os.close(fd)


def test_the_sidecar_keeps_every_field_and_never_trusts_a_damaged_file(tmp_path):
    path = tmp_path / ".datastore-sync-state.json"
    fields = {"version": 2, "remoteIndexETag": "e", "lastVerifiedAt": "", "localDirty": False, "lastCatalogHash": "h",
              "dataKeyMigrated": True, "lazyPullActive": True}  # fmt: skip
    path.write_text(json.dumps(fields))
    sidecar = Sidecar(str(tmp_path))
    assert not sidecar.dirty
    sidecar.mark_bulk()
    sidecar.mark_clean(Watermark(IndexMode.SHARDS, 42), "2026-08-03T09:14:22.401Z")
    after = json.loads(path.read_text())
    assert after["commitSeq"] == 42
    assert {name: after[name] for name in ("lastCatalogHash", "dataKeyMigrated", "lazyPullActive")} == {
        "lastCatalogHash": "h", "dataKeyMigrated": True, "lazyPullActive": True,
    }  # fmt: skip
    for text in ("", "[]", '{"version":1}', '{"version":2,"localDirty":"yes"}'):
        path.write_text(text)
        assert Sidecar(str(tmp_path)).dirty


def test_state_of_the_version_before_is_brought_up_to_date(tmp_path):
    catalog, journal = Catalog(f"{tmp_path}/catalog.db"), Journal(f"{tmp_path}/journal.db")
    catalog.add(RelPath("d"), Kind.DIRECTORY, mode=0o700)
    catalog.add(RelPath("d/e"), Kind.DIRECTORY, mode=0o700)
    catalog.add(RelPath("f"), Kind.FILE, mode=0o640)
    journal.mark_write(RelPath("f"), None, None)
    for trigger in ("directory_made", "directory_removed", "directory_moved"):
        catalog.db.execute(f"DROP TRIGGER {trigger}")
    catalog.db.execute("DROP INDEX node_shared")
    catalog.db.execute("DROP INDEX node_place")
    for column in ("base_posix", "target", "rdev", "atime_ns", "links", "blocks", "place", "shared"):
        catalog.db.execute(f"ALTER TABLE node DROP COLUMN {column}")
    for column in ("base_posix", "synced"):
        journal._db.execute(f"ALTER TABLE dirty DROP COLUMN {column}")
    journal._db.execute("DROP TABLE fact")
    for db in (catalog.db, journal._db):
        db.execute("PRAGMA user_version=1")
    catalog.close()
    journal.close()
    catalog, journal = Catalog(f"{tmp_path}/catalog.db"), Journal(f"{tmp_path}/journal.db")
    assert not catalog.rebuilt and not journal.lost
    found = {path: catalog.at(path) for path in ("", "d", "d/e", "f")}
    assert [node.links for node in found.values()] == [2, 2, 1, 1]
    assert found["f"].mode == 0o640 and "f" in journal
    catalog.close()
    journal.close()


def test_a_rename_that_could_not_be_announced_leaves_the_journal_as_it_was(tmp_path):
    journal = Journal(f"{tmp_path}/journal.db")
    journal.mark_write(RelPath("a"), None, None)
    journal.note_synced("a", "scratch.tmp")
    (sealed,) = journal.seal(["a"])
    refusal = "BEFORE INSERT ON dirty WHEN NEW.path = 'b' BEGIN SELECT RAISE(ABORT, ''); END"
    journal._db.execute(f"CREATE TRIGGER refuse {refusal}")
    a, b = (DirtyPath(RelPath(name), Op.WRITE, 0, None, None) for name in "ab")
    with pytest.raises(sqlite3.IntegrityError):
        journal.mark_rename(RelPath("a"), RelPath("b"), [(a, b)])
    assert journal.is_synced("a") and journal.is_synced("scratch.tmp")
    journal.mark_write(RelPath("a"), None, None)  # written while its push is under way
    assert journal.retire([(sealed, None, None)]) == set(), "so it is pushed again"
    journal.close()


def test_a_full_disk_in_a_transaction_is_told_as_that_and_leaves_none_open(tmp_path):
    catalog = Catalog(f"{tmp_path}/catalog.db")
    pages = catalog.db.execute("PRAGMA page_count").fetchone()[0]
    catalog.db.execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(sqlite3.OperationalError) as caught:
        for number in range(10_000):
            with catalog.transaction():
                catalog.set_fact(f"fact-{number}", "x" * 100)
    assert is_disk_full(caught.value)
    assert not catalog.db.in_transaction
    catalog.close()
