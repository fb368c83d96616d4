"""Fetching ahead must not cost the loop more than it saves."""

from __future__ import annotations

import threading

import pytest
import trio

from swampfs.fs.prefetch import LARGEST, Prefetch
from swampfs.names import RelPath
from swampfs.records import IndexEntry
from swampfs.state import traversal
from swampfs.sync.room import Room
from swampfs.testing.memory import MemoryStore
from tests.datastores import load_shards
from tests.engine import Store, machine

STAMP = "2026-08-03T09:14:22.401Z"


class NoRoom(Room):
    def spare(self):
        return 0


def fill(node, count, size):
    catalog = node.sync.catalog
    with catalog.transaction():
        parent = catalog.make_parents(RelPath("d/x"))
        for number in range(count):
            catalog.add_remote(parent, IndexEntry(RelPath(f"d/{number:06}"), size, STAMP), "p", 0)


@pytest.mark.parametrize(("size", "room"), [(LARGEST + 1, Room()), (10, NoRoom())], ids=["too large", "no room"])
def test_a_directory_of_what_is_not_fetched_is_not_walked_to_its_end(tmp_path, monkeypatch, size, room):
    looks = []
    real = traversal.Walk.next
    monkeypatch.setattr(traversal.Walk, "next", lambda self: (looks.append(1), real(self))[1])

    async def main():
        async with machine(MemoryStore(), tmp_path / "a") as node:
            fill(node, 5000, size)
            node.sync.use_room(room)
            prefetch = Prefetch(node.sync)
            for number in range(3):
                prefetch.demanded(node.sync.catalog.at(f"d/{number:06}"), 1)
            assert len(looks) <= 500
            assert not prefetch.expected

    trio.run(main)


def test_what_is_demanded_finds_a_thread_while_all_that_is_fetched_ahead_is_slow(tmp_path):
    gate = threading.Event()

    class Slow(MemoryStore):
        def download(self, key, target):
            if key.startswith("audit/slow"):
                gate.wait(20)
            return super().download(key, target)

    store = Slow()
    slow = {f"audit/slow-{number:03}": b"s" for number in range(100)}
    load_shards(Store(store), [*slow.items(), ("audit/wanted", b"wanted")])

    async def main():
        async with machine(store, tmp_path / "a") as node, trio.open_nursery() as nursery:
            prefetch = node.fs.files.prefetch = Prefetch(node.sync)
            nursery.start_soon(prefetch.run)
            for number in range(3):
                prefetch.demanded(node.sync.catalog.at(f"audit/slow-{number:03}"), 1)
            await trio.sleep(0.05)
            assert len(prefetch.expected) >= 6
            with trio.fail_after(10):
                assert await node.read("audit/wanted") == b"wanted"
            gate.set()
            nursery.cancel_scope.cancel()

    trio.run(main)
