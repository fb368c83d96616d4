"""Many things at once: no more than were asked for, all of them, and what failed."""

from __future__ import annotations

import trio
import trio.lowlevel

from swampfs.sync.parallel import for_each


def test_all_are_done_no_more_at_once_than_asked_for_though_what_is_listed_changes_meanwhile():
    items, done, now, most = set(range(20)), [], 0, 0

    async def one(item):
        nonlocal now, most
        now += 1
        most = max(most, now)
        await trio.lowlevel.checkpoint()
        items.discard(item)
        items.add(item + 100)
        now -= 1
        done.append(item)

    assert trio.run(lambda: for_each(items, one, at_once=3)) == []
    assert sorted(done) == list(range(20))
    assert most == 3


def test_what_fails_keeps_nothing_else_from_being_done_and_is_returned():
    done = []

    async def one(item):
        await trio.lowlevel.checkpoint()
        if item % 2:
            raise ValueError(item)
        done.append(item)

    failed = trio.run(lambda: for_each(range(5), one, at_once=2))
    assert [str(error) for error in failed] == ["1", "3"]
    assert done == [0, 2, 4]
