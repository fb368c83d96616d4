"""The file system without a kernel against a model in memory: any history, with pushes, polls and deaths in between.

``SWAMPFS_STEPS`` says how many steps are drawn in all: random ones; without it 18 000, the same every time. A third of
them is not done, because a kernel would not pass it on.
"""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swampfs.errors import FileError
from swampfs.names import is_scratch
from swampfs.records import Change
from swampfs.testing.memory import MemoryStore
from tests.datastores import check_bucket
from tests.engine import CALLER, Store, load, machine

EXPLORE = "SWAMPFS_STEPS" in os.environ
STEPS = int(os.environ.get("SWAMPFS_STEPS", "18000"))
LENGTH = 60
MODEL_DIR = "data/t/7b1463fb-2730-4225-aef5-5f9f9a66c7d9/n"
DIRECTORIES = ["files", "files/d", "files/d/e", MODEL_DIR]
NAMES = ["a", "b", "d", "e"]
PATHS = st.one_of(
    st.builds("{}/{}".format, st.sampled_from(DIRECTORIES), st.sampled_from(NAMES)),
    st.sampled_from(["files/a", "files/d/a", "files/d/e", "files/.#scratch", f"{MODEL_DIR}/a"]),
)
BYTES = st.binary(min_size=1, max_size=8)
OFFSETS = st.integers(0, 12)
HANDLES = st.integers(0, 2)
STEP = st.one_of(
    st.tuples(st.just("write"), PATHS, BYTES),
    st.tuples(st.just("open"), HANDLES, PATHS, st.sampled_from([0, os.O_APPEND, os.O_TRUNC])),
    st.tuples(st.just("create"), HANDLES, PATHS),
    st.tuples(st.just("pwrite"), HANDLES, BYTES, OFFSETS),
    st.tuples(st.just("pwrite"), HANDLES, BYTES, OFFSETS),
    st.tuples(st.just("pread"), HANDLES),
    st.tuples(st.just("ftruncate"), HANDLES, OFFSETS),
    st.tuples(st.just("close"), HANDLES),
    st.tuples(st.just("mkdir"), PATHS),
    st.tuples(st.just("rmdir"), PATHS),
    st.tuples(st.just("unlink"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("link"), st.just("files/a"), PATHS),
    st.tuples(st.just("symlink"), st.sampled_from(["a", "nowhere"]), PATHS),
    st.tuples(st.just("chmod"), PATHS, st.sampled_from([0o600, 0o755, 0o644])),
    st.tuples(st.just("utime"), PATHS, st.integers(0, 2**60)),
    st.tuples(st.just("push")),
    st.tuples(st.just("pull")),
    st.tuples(st.just("die")),
)


class Inode:
    """Of the model. ``mtime_ns`` is ``None`` once the clock has had a hand in it."""

    def __init__(self, kind: int, mode: int, content: bytes = b"") -> None:
        self.kind, self.mode, self.content = kind, mode, content
        self.mtime_ns: int | None = None


def refuse(number: int) -> None:
    raise OSError(number, os.strerror(number))


class Model:
    """What POSIX says."""

    def __init__(self) -> None:
        self.names: dict[str, Inode] = {}
        self.handles: dict[int, tuple[Inode, int]] = {}

    async def do(self, op, *arguments):
        return getattr(self, op)(*arguments)

    def _new(self, path: str, inode: Inode) -> None:
        if self.names[os.path.dirname(path)].kind != stat.S_IFDIR:
            refuse(errno.ENOTDIR)
        if path in self.names:
            refuse(errno.EEXIST)
        self.names[path] = inode

    def at(self, path: str) -> Inode:
        above = os.path.dirname(path)
        if above in self.names and self.names[above].kind != stat.S_IFDIR:
            refuse(errno.ENOTDIR)
        return self.names[path] if path in self.names else refuse(errno.ENOENT)

    def is_empty(self, path: str) -> bool:
        return not any(name.startswith(path + "/") for name in self.names)

    def write(self, path, body):
        if path not in self.names:
            self._new(path, Inode(stat.S_IFREG, 0o644))
        inode = self.at(path)
        inode.content, inode.mtime_ns = body, None

    def create(self, number, path):
        self.close(number)
        self._new(path, Inode(stat.S_IFREG, 0o640))
        self.handles[number] = (self.names[path], 0)

    def open(self, number, path, flags):
        self.close(number)
        inode = self.at(path)
        if flags & os.O_TRUNC:
            inode.content, inode.mtime_ns = b"", None
        self.handles[number] = (inode, flags)

    def pwrite(self, number, body, offset):
        inode, flags = self.handles[number]
        offset = len(inode.content) if flags & os.O_APPEND else offset
        padded = inode.content.ljust(offset, b"\0")
        inode.content, inode.mtime_ns = padded[:offset] + body + padded[offset + len(body) :], None

    def pread(self, number):
        return self.handles[number][0].content

    def ftruncate(self, number, size):
        inode, _ = self.handles[number]
        inode.content, inode.mtime_ns = inode.content[:size].ljust(size, b"\0"), None

    def close(self, number):
        self.handles.pop(number, None)

    def mkdir(self, path):
        self._new(path, Inode(stat.S_IFDIR, 0o755))

    def rmdir(self, path):
        inode = self.at(path)
        if inode.kind != stat.S_IFDIR:
            refuse(errno.ENOTDIR)
        if not self.is_empty(path):
            refuse(errno.ENOTEMPTY)
        del self.names[path]

    def unlink(self, path):
        if self.at(path).kind == stat.S_IFDIR:
            refuse(errno.EISDIR)
        del self.names[path]

    def rename(self, source, target):
        if any(self.names[os.path.dirname(path)].kind != stat.S_IFDIR for path in (source, target)):
            refuse(errno.ENOTDIR)
        inode, over = self.at(source), self.names.get(target)
        if over is inode:
            return
        if inode.kind == stat.S_IFDIR and f"{target}/".startswith(f"{source}/"):
            refuse(errno.EINVAL)
        if over is not None:
            if inode.kind == stat.S_IFDIR != over.kind:
                refuse(errno.ENOTDIR)
            if over.kind == stat.S_IFDIR != inode.kind:
                refuse(errno.EISDIR)
            if not self.is_empty(target):
                refuse(errno.ENOTEMPTY)
            del self.names[target]
        for name in [name for name in self.names if f"{name}/".startswith(f"{source}/")]:
            self.names[target + name[len(source) :]] = self.names.pop(name)

    def link(self, source, target):
        inode = self.at(source)
        if self.names[os.path.dirname(target)].kind != stat.S_IFDIR:
            refuse(errno.ENOTDIR)
        if inode.kind == stat.S_IFDIR:
            refuse(errno.EPERM)
        self._new(target, inode)

    def symlink(self, text, path):
        self._new(path, Inode(stat.S_IFLNK, 0o777, text.encode()))

    def chmod(self, path, mode):
        self.at(path).mode = mode

    def utime(self, path, mtime_ns):
        self.at(path).mtime_ns = mtime_ns

    def push(self):
        pass

    def pull(self):
        pass

    def die(self):
        self.handles.clear()

    def tree(self, *, published=False):
        """What must be seen. Directories have no times here, and on other machines names are files of their own."""
        found = {}
        for path, inode in self.names.items():
            if published and is_scratch(path) and inode.kind != stat.S_IFDIR:
                continue
            names = 1 if published else sum(other is inode for other in self.names.values())
            is_dir = inode.kind == stat.S_IFDIR
            mtime_ns = None if is_dir else inode.mtime_ns
            found[path] = (inode.kind | inode.mode, None if is_dir else names, inode.content, mtime_ns)
        return found


class Bare:
    """The same over the file system, which is asked what a kernel would ask it."""

    def __init__(self, node) -> None:
        self.node, self.fs = node, node.fs
        self.handles: dict[int, tuple[int, int, int]] = {}  # number, inode, flags

    async def do(self, op, *arguments):
        return await getattr(self, op)(*arguments)

    def parent(self, path):
        ino, name = self.node.parent(path)
        if not self.fs.getattr(ino).is_dir:
            refuse(errno.ENOTDIR)
        return ino, name

    def look(self, path):
        """Inode of a path, held as the kernel holds what it knows; see :meth:`forget`."""
        found = self.fs.lookup(*self.parent(path))
        return found.ino if found is not None else refuse(errno.ENOENT)

    async def write(self, path, body):
        await self.node.write(path, body)

    async def create(self, number, path):
        await self.close(number)
        handle, found = await self.fs.create(*self.parent(path), 0o640, os.O_RDWR | os.O_EXCL, CALLER)
        self.handles[number] = (handle, found.ino, 0)

    async def open(self, number, path, flags):
        await self.close(number)
        ino = self.look(path)
        self.handles[number] = (await self.fs.open(ino, os.O_RDWR | flags, 0), ino, flags)

    async def pwrite(self, number, body, offset):
        handle, ino, flags = self.handles[number]
        await self.fs.files.write(handle, self.fs.getattr(ino).size if flags & os.O_APPEND else offset, body)

    async def pread(self, number):
        return self.fs.files.read(self.handles[number][0], 0, 1 << 20)

    async def ftruncate(self, number, size):
        await self.fs.setattr(self.handles[number][1], Change(size=size), 0)

    async def close(self, number):
        if number in self.handles:
            handle, ino, _ = self.handles.pop(number)
            self.fs.files.release(handle)
            self.fs.forget(ino, 1)

    async def mkdir(self, path):
        self.fs.forget((await self.fs.mkdir(*self.parent(path), 0o755, CALLER)).ino, 1)

    async def rmdir(self, path):
        await self.fs.rmdir(*self.parent(path), CALLER)

    async def unlink(self, path):
        await self.fs.unlink(*self.parent(path), CALLER)

    async def rename(self, source, target):
        await self.fs.rename(self.parent(source), self.parent(target), CALLER, replace=True)

    async def link(self, source, target):
        ino = self.look(source)
        try:
            self.fs.forget((await self.fs.link(ino, *self.parent(target), CALLER)).ino, 1)
        finally:
            self.fs.forget(ino, 1)

    async def symlink(self, text, path):
        self.fs.forget((await self.fs.symlink(*self.parent(path), text, CALLER)).ino, 1)

    async def _set(self, path, change):
        ino = self.look(path)
        await self.fs.setattr(ino, change, 0)
        self.fs.forget(ino, 1)

    async def chmod(self, path, mode):
        await self._set(path, Change(mode=mode))

    async def utime(self, path, mtime_ns):
        await self._set(path, Change(mtime_ns=mtime_ns))

    async def push(self):
        report = await self.node.push()
        assert not report.conflicts and report.failure is None

    async def pull(self):
        await self.node.pull()

    async def tree(self, wanted, *, published=False):
        """What is seen below the roots of the model. Times only of what ``wanted`` has times of."""
        found = {}
        waiting = [path for path in ROOTS if path in wanted]
        while waiting:
            path = waiting.pop()
            ino = self.look(path)
            seen, content = self.fs.getattr(ino), b""
            if seen.is_dir:
                waiting += [f"{path}/{name}" for name, _, _ in self.fs.readdir(ino, 0)]
            elif stat.S_ISLNK(seen.mode):
                content = self.fs.readlink(ino).encode()
            else:
                content = await self.node.read(path)
            self.fs.forget(ino, 1)
            known = wanted.get(path)
            mtime_ns = seen.mtime_ns if known is not None and known[3] is not None else None
            found[path] = (seen.mode, None if seen.is_dir else seen.nlink, content, mtime_ns)
            if not seen.is_dir and not stat.S_ISLNK(seen.mode):
                assert seen.size == len(content), path
        return found


ROOTS = ["files", MODEL_DIR]


def may_be_asked(model: Model, op: str, arguments: tuple) -> bool:
    """Whether a kernel would pass this on: it follows links, resolves directories and checks what it opens itself."""
    if op in ("pwrite", "pread", "ftruncate"):
        return arguments[0] in model.handles
    paths = [word for word in arguments if isinstance(word, str) and "/" in word]
    if any(os.path.dirname(path) not in model.names for path in paths):
        return False
    if any(model.names[os.path.dirname(path)].kind == stat.S_IFLNK for path in paths):
        return False
    if op in ("write", "open"):
        there = model.names.get(paths[0])
        return there.kind == stat.S_IFREG if there is not None else True
    if op == "chmod":
        return paths[0] not in model.names or model.names[paths[0]].kind != stat.S_IFLNK
    return True


async def answer(side, op, arguments):
    try:
        return await side.do(op, *arguments)
    except (OSError, FileError) as error:
        return errno.errorcode[error.errno]


async def run(home: Path, index: str, steps) -> None:
    store, model, rest, done = MemoryStore(), Model(), list(steps), []
    load(store, {f"{MODEL_DIR}/a": b"1"}, index)
    for directory in (*ROOTS, "files/d"):
        model.names[directory] = Inode(stat.S_IFDIR, 0o755)
    model.names[f"{MODEL_DIR}/a"] = Inode(stat.S_IFREG, 0o644, b"1")
    while rest:
        async with machine(store, home / "a") as node:
            await node.mkdirs("files/d")
            bare = Bare(node)
            while rest:
                op, *arguments = rest.pop(0)
                if op == "die":
                    break
                if not may_be_asked(model, op, arguments):
                    continue
                wanted, got = await answer(model, op, arguments), await answer(bare, op, arguments)
                done.append((op, *arguments, wanted))
                assert got == wanted, f"{got} instead of {wanted} after {done}"
            if "files/d" not in model.names:  # made anew at the next start
                model.names["files/d"] = Inode(stat.S_IFDIR, 0o755)
                await node.mkdirs("files/d")
            wanted = model.tree()
            assert await bare.tree(wanted) == wanted, done
            await model.do("die")
            done.append(("die",))
    async with machine(store, home / "a") as node:
        wanted = model.tree()
        assert await Bare(node).tree(wanted) == wanted, done
        await node.push()
        assert node.sync.cache.conflicts() == [] and not node.sync.journal, done
        if any(key.startswith("_index/") for key in store.objects):  # else nothing was ever committed
            check_bucket(Store(store), hashed=False)
    async with machine(store, home / "b") as node:
        wanted = {path: seen for path, seen in model.tree(published=True).items() if not stat.S_ISDIR(seen[0])}
        roots = {path: (0,) * 4 for path in ROOTS if any(name.startswith(path) for name in wanted)}
        found = await Bare(node).tree({**wanted, **roots}, published=True)
        assert {path: seen for path, seen in found.items() if not stat.S_ISDIR(seen[0])} == wanted, done


@pytest.mark.parametrize("index", ["v1", "v2"])
def test_an_index_that_became_empty_leaves_no_shard_behind(index):
    steps = [("write", "files/a", b"1"), ("push",), ("unlink", "files/a"), ("unlink", f"{MODEL_DIR}/a"), ("push",)]
    with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
        trio.run(run, Path(home), index, steps)


@pytest.mark.parametrize("index", ["v1", "v2"])
def test_any_history_without_a_kernel_is_that_of_the_model(index):
    @settings(
        max_examples=-(-STEPS // LENGTH // 2),
        deadline=None,
        database=None,
        derandomize=not EXPLORE,
        suppress_health_check=list(HealthCheck),
    )
    @given(steps=st.lists(STEP, min_size=LENGTH, max_size=LENGTH))
    def histories(steps):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as home:
            trio.run(run, Path(home), index, steps)

    histories()
