"""What somebody opens next, guessed from what they opened last; without network or kernel."""

from __future__ import annotations

import pytest

from swampfs.names import RelPath
from swampfs.records import IndexEntry, Residency
from swampfs.state.catalog import Catalog
from swampfs.state.traversal import following


@pytest.fixture
def catalog(tmp_path):
    running = Catalog(str(tmp_path / "catalog.db"))
    yield running
    running.close()


def fill(catalog, paths, local=()):
    for path in paths:
        entry = IndexEntry(RelPath(path), 1, "2026-08-03T09:14:22.401Z")
        ino = catalog.add_remote(catalog.make_parents(RelPath(path)), entry, "p", 0)
        if path in local:
            catalog.set_residency(ino, Residency.CLEAN)


def guesses(catalog, last, now, most=20):
    walk = following(catalog, RelPath(last), catalog.at(now))
    if walk is None:
        return None
    found = []
    while len(found) < most and (node := walk.next()) is not None:
        found.append(node.path)
    return found


def versions(*names, count=3):
    return [f"m/{name}/{v}/{file}" for name in names for v in range(1, count + 1) for file in ("metadata.yaml", "raw")]


def test_neighbours_in_a_directory_are_followed_by_the_rest_of_it(catalog):
    fill(catalog, ["d/a", "d/b", "d/c", "d/sub/x", "d/z", "e/a"], local=["d/a"])
    assert guesses(catalog, "d/a", "d/b") == ["d/c", "d/z"]


def test_who_goes_by_name_is_not_taken_for_one_who_goes_by_place(catalog):
    fill(catalog, ["d/c", "d/a", "d/d", "d/b"], local=["d/a"])
    assert guesses(catalog, "d/a", "d/b") == ["d/c", "d/d"]
    assert guesses(catalog, "d/a", "d/d") == ["d/b"], "as a listing has them"


def test_files_that_are_here_already_do_not_part_neighbours(catalog):
    fill(catalog, ["d/a", "d/b", "d/c", "d/d"], local=["d/a", "d/b"])
    assert guesses(catalog, "d/a", "d/c") == ["d/d"]


def test_somebody_who_jumps_or_goes_backwards_is_not_followed(catalog):
    fill(catalog, [f"d/{i:02}" for i in range(20)] + ["e/00"])
    assert guesses(catalog, "d/00", "d/07") is None
    assert guesses(catalog, "d/07", "d/06") is None
    assert guesses(catalog, "d/07", "d/07") is None


def test_who_read_all_of_a_directory_and_goes_to_the_next_reads_everything(catalog):
    paths = versions("one", "two", "xix")
    fill(catalog, paths, local=[path for path in paths if path.startswith("m/one/")])
    assert guesses(catalog, "m/one/3/raw", "m/two/1/metadata.yaml") == paths[7:]


def test_who_reads_one_file_of_each_directory_gets_that_of_the_others(catalog):
    fill(catalog, versions("one"), local=["m/one/1/raw"])
    assert guesses(catalog, "m/one/1/raw", "m/one/2/raw") == ["m/one/3/raw"]


def test_who_reads_the_newest_version_of_each_name_gets_the_newest_of_the_others(catalog):
    fill(catalog, versions("one", count=2) + versions("two", count=11) + versions("six"), local=["m/one/2/raw"])
    fill(catalog, versions("xix", count=12))
    assert guesses(catalog, "m/one/2/raw", "m/two/11/raw") == ["m/six/3/raw", "m/xix/12/raw"]


def test_who_reads_the_same_version_of_each_name_gets_that_or_else_the_newest(catalog):
    fill(catalog, versions("one", "two", count=2) + versions("six", count=1), local=["m/one/2/raw"])
    fill(catalog, versions("xix", count=3))
    assert guesses(catalog, "m/one/2/raw", "m/two/2/raw") == ["m/six/1/raw", "m/xix/2/raw"]


def test_different_files_of_neighbouring_directories_say_nothing(catalog):
    fill(catalog, versions("one"), local=["m/one/1/raw"])
    assert guesses(catalog, "m/one/1/raw", "m/one/2/metadata.yaml") is None


def test_a_walk_sees_what_came_and_went_behind_its_back(catalog):
    fill(catalog, [f"d/{i:03}" for i in range(200)], local=["d/000"])
    walk = following(catalog, RelPath("d/000"), catalog.at("d/001"))
    assert walk.next().path == "d/002"
    catalog.remove(catalog.at("d/199"))
    fill(catalog, ["d/200"])
    rest = []
    while (node := walk.next()) is not None:
        rest.append(node.path)
    assert rest[-2:] == ["d/198", "d/200"]


def test_a_walk_over_what_is_here_looks_at_a_bounded_number_of_rows_and_goes_on_later(catalog):
    local = [f"d/{i:04}" for i in range(3, 3000)]
    fill(catalog, ["d/0000", "d/0001", *local, "d/last"], local=local)
    walk = following(catalog, RelPath("d/0000"), catalog.at("d/0001"))
    steps = 0
    while (found := walk.next()) is None:
        steps += 1
    assert found.path == "d/last"
    assert 2 <= steps <= 10


def test_listings_and_walks_read_a_directory_in_order_without_sorting_it(catalog):
    fill(catalog, ["d/a", "d/b"])
    plans = []
    catalog.db.set_trace_callback(plans.append)
    catalog.children(catalog.at("d").ino, 0, 10)
    catalog.children_by_name(catalog.at("d").ino, "", 10)
    catalog.db.set_trace_callback(None)
    for statement in (text for text in plans if "ORDER BY" in text):
        steps = [row[3] for row in catalog.db.execute(f"EXPLAIN QUERY PLAN {statement}")]
        assert not [step for step in steps if "TEMP B-TREE" in step], (statement, steps)
