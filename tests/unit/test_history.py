"""The checker of tests/fuse/test_history.py finds what it is for."""

from __future__ import annotations

import pytest

from tests.history import Event, History, Read, content, value_of


def history(*events, reads=()):
    return History(list(events), list(reads))


FIRST = Event("a", "f", "v1", 1, 2, pushed=3)
SECOND = Event("b", "f", "v2", 4, 5, pushed=6)


def test_a_lost_write_is_found():
    assert history(FIRST, SECOND).lost({"f": "v2"}) == []
    assert len(history(FIRST, SECOND).lost({"f": "v1"})) == 1
    assert len(history(FIRST, SECOND).lost({})) == 1
    assert len(history(FIRST, SECOND).lost({"f": "v3"})) == 1


def test_an_unpublished_write_may_be_lost_but_not_a_published_one():
    unpublished = Event("b", "f", "v2", 4, 5)
    assert history(FIRST, unpublished).lost({"f": "v1"}) == []
    assert history(FIRST, unpublished).lost({"f": "v2"}) == []


def test_concurrent_writes_may_end_either_way():
    other = Event("b", "f", "v2", 1.5, 2.5, pushed=4)
    assert history(FIRST, other).lost({"f": "v1"}) == history(FIRST, other).lost({"f": "v2"}) == []


def test_a_removed_file_that_comes_back_is_found_unless_its_content_was_not_published_yet():
    removed = Event("b", "f", None, 4, 5, pushed=6)
    assert len(history(FIRST, removed).lost({"f": "v1"})) == 1
    late = Event("a", "f", "v1", 1, 2, pushed=8)
    assert history(late, removed).lost({"f": "v1"}) == []


def test_what_was_not_published_when_a_file_was_removed_comes_back_also_over_the_removed_value():
    late = Event("a", "f", "v1", 1, 2, pushed=10)
    removed = Event("c", "f", None, 7, 8, pushed=9)
    assert history(late, SECOND, removed).lost({"f": "v1"}) == []
    assert len(history(late, SECOND).lost({"f": "v1"})) == 1, "a value is no absence"
    assert len(history(FIRST, SECOND, removed).lost({"f": "v1"})) == 1, "it was published before"
    assert len(history(late, removed, Event("b", "f", "v2", 11, 12, pushed=13)).lost({"f": "v1"})) == 1, "newer"


def test_a_stale_read_is_found_once_the_news_must_have_arrived():
    def at(start, value="v1"):
        return history(FIRST, SECOND, reads=[Read("a", "f", value, start, start + 0.1)]).violations(lag_s=2)

    assert at(7) == [] and at(9, "v2") == []
    assert len(at(9)) == 1
    cut_off = history(FIRST, SECOND, reads=[Read("a", "f", "v1", 9, 9.1)])
    cut_off.faulty["a"].append((5, 8))
    assert cut_off.violations(lag_s=2) == []


def test_a_read_may_see_what_is_written_while_it_waits():
    assert history(FIRST, reads=[Read("b", "f", "v1", 0.5, 1.5)]).violations(lag_s=2) == []
    assert len(history(FIRST, reads=[Read("b", "f", "v1", 0.5, 0.9)]).violations(lag_s=2)) == 1


def test_torn_content_is_found():
    whole = content("v1", 100)
    assert value_of(whole) == "v1"
    for torn in (whole[:-1], whole[:30] + b"x" + whole[31:], b""):
        with pytest.raises(ValueError):
            value_of(torn)
