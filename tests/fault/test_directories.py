"""What machines tell each other of directories, under the locks that a mount takes: none is lost, none comes back."""

from __future__ import annotations

import errno
import json
from contextlib import asynccontextmanager

import pytest
import trio

from swampfs.errors import FileError
from swampfs.fs.guard import Guard
from swampfs.fs.vfs import FileSystem
from swampfs.records import Change
from swampfs.testing.memory import MemoryStore
from tests import engine
from tests.engine import CALLER


class Node(engine.Node):
    """Its changes take locks; :meth:`idle` pushes them and gives the locks back."""

    async def mkdirs(self, path):
        """``mkdir -p``: that another machine made one is known once its lock is taken."""
        done = ""
        for name in path.split("/"):
            if self.fs.lookup(self.ino(done), name) is None:
                try:
                    await self.fs.mkdir(self.ino(done), name, 0o755, CALLER)
                except FileError as error:
                    assert error.errno == errno.EEXIST
            done = f"{done}/{name}"

    async def chmod(self, path, mode):
        await self.fs.setattr(self.ino(path), Change(mode=mode), 0)

    def mode(self, path):
        return self.fs.getattr(self.ino(path)).mode & 0o7777

    async def idle(self):
        await self.push()
        await self.sync.leases.give_back_idle()

    async def touch(self, path):
        """Take the lock of a path, and give it back."""
        await self.pull()
        await self.mkdirs(path.rpartition("/")[0])
        await self.write(path, b"touched")
        await self.idle()

    async def look(self, path):
        await self.pull()
        try:
            return self.fs.getattr(self.ino(path)).is_dir
        except (FileNotFoundError, FileError):
            return None


@asynccontextmanager
async def machine(store, home):
    async with engine.machine(store, home, patience_s=10.0) as plain:
        fs = FileSystem(
            plain.sync,
            plain.fs._local,
            owner=plain.fs.owner,
            read_only=False,
            on_dirty=lambda path: None,
            invalidate=lambda changes: None,
            guard=Guard(plain.sync.leases),
        )
        yield Node(plain.sync, fs)


def run(tmp_path, main):
    async def both():
        store = MemoryStore()
        async with machine(store, tmp_path / "a") as a, machine(store, tmp_path / "b") as b:
            await main(a, b, store)

    trio.run(both)


def test_a_mode_stays_when_others_empty_the_directory_and_fill_it_in_one_step(tmp_path):
    async def main(a, b, store):
        await a.mkdirs("files/p/priv")
        await a.write("files/p/priv/f", b"1")
        await a.chmod("files/p/priv", 0o700)
        await a.idle()
        await b.pull()
        await b.touch("files/p/q")
        assert b.mode("files/p/priv") == 0o700
        await a.rename("files/p/priv/f", "files/p/priv/g")
        await a.idle()
        await b.pull()
        await b.touch("files/p/q2")
        await a.touch("files/p/q3")
        await b.touch("files/p/q4")
        assert (a.mode("files/p/priv"), b.mode("files/p/priv")) == (0o700, 0o700)
        await b.chmod("files/p/priv", 0o755)
        await b.idle()
        await a.touch("files/p/q5")
        assert a.mode("files/p/priv") == 0o755, "back to the usual is a change too"
        await a.chmod("files/p/priv", 0o700)
        await a.idle()
        await a.unlink("files/p/priv/g")
        await a.rmdir("files/p/priv")
        await a.mkdirs("files/p/priv")
        await a.idle()
        assert a.mode("files/p/priv") == 0o755, "another directory of that name is another"

    run(tmp_path, main)


def test_a_new_machine_sees_the_mode_of_an_empty_directory_at_the_border_of_two_locks(tmp_path):
    async def main(a, b, store):
        await a.mkdirs("files/t")
        await a.chmod("files/t", 0o777)
        await a.touch("files/t/x")
        await a.unlink("files/t/x")
        await a.idle()
        async with machine(store, tmp_path / "c") as c:
            assert c.mode("files/t") == 0o777

    run(tmp_path, main)


def test_a_directory_outlives_what_was_in_it_wherever_that_was_removed(tmp_path):
    async def main(a, b, store):
        await a.mkdirs("files/p/x/y")
        await a.idle()
        await b.touch("files/p/zz1")
        await a.rmdir("files/p/x/y")
        await a.idle()
        await b.touch("files/p/q")
        await a.touch("files/p/q2")
        assert await a.look("files/p/x") and await b.look("files/p/x")
        await b.rmdir("files/p/x")
        await b.idle()
        await a.touch("files/p/q3")
        assert await a.look("files/p/x") is None

    run(tmp_path, main)


def test_an_emptied_directory_at_the_border_of_two_locks_cannot_be_made_again(tmp_path):
    async def main(a, b, store):
        await a.mkdirs("files/e")
        await a.idle()
        await a.touch("files/e/a")
        await b.pull()
        await a.unlink("files/e/a")
        await a.idle()
        await b.pull()
        await b.touch("files/top")
        await a.touch("files/top2")
        assert await a.look("files/e")
        for node in (a, b):
            with pytest.raises(FileError) as caught:
                await node.fs.mkdir(*node.parent("files/e"), 0o755, CALLER)
            assert caught.value.errno == errno.EEXIST
            await node.idle()

    run(tmp_path, main)


def test_a_removed_tree_of_directories_leaves_no_ghost(tmp_path):
    async def main(a, b, store):
        await a.mkdirs("files/p/x/y")
        await a.idle()
        await b.touch("files/p/zz")
        await a.rmdir("files/p/x/y")
        await a.rmdir("files/p/x")
        await a.idle()
        await b.touch("files/p/zz2")
        assert await b.look("files/p/x") is None
        await b.mkdirs("files/p/x")

    run(tmp_path, main)


def test_a_file_that_took_the_place_of_a_directory_appears(tmp_path):
    async def main(a, b, store):
        await b.mkdirs("files/p/x")
        await b.touch("files/p/x/f")
        await b.unlink("files/p/x/f")
        await b.idle()
        await a.touch("files/p/q")
        await a.rmdir("files/p/x")
        await a.touch("files/p/x")
        await b.pull()
        await b.touch("files/p/q2")
        await b.pull()
        assert await b.read("files/p/x") == b"touched"

    run(tmp_path, main)


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 200_000,
        b'{"directories":["files/p/x"],"attributes":' + b'{"files/p/x":' * 3000 + b"1" + b"}" * 3000 + b"}",
        b'{"directories":["files/p/x"],"attributes":{"files/p/x":{"mode":-1}}}',
        b'{"directories":["files/p/.lock","files/p/../y","files/elsewhere/x"]}',
        b'{"directories":null}',
        b"",
    ],
)
def test_a_hostile_record_of_directories_stops_nobody(body, tmp_path):
    async def main(a, b, store):
        await a.touch("files/p/q")
        store.put("_control/swampfs/reserved/files/p.json", body)
        await b.touch("files/p/z")
        assert b.names() == {"files/p/q", "files/p/z"}
        assert await b.look("files/p/.lock") is None and await b.look("files/elsewhere") is None

    run(tmp_path, main)


def test_a_record_makes_no_directories_where_only_locks_and_secrets_may_be(tmp_path):
    store = MemoryStore()
    names = {"secrets": "secrets/x", "_control": "_control/x", "": ".datastore.lock"}
    for scope, name in names.items():
        store.put(f"_control/swampfs/reserved/{scope}.json", json.dumps({"directories": [name]}).encode())

    async def main():
        async with machine(store, tmp_path / "a") as a:
            for name in names.values():
                assert a.sync.catalog.at(name) is None

    trio.run(main)
