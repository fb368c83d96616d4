"""A mounted tree against a plain directory: whatever is done to both, both answer and look the same.

``SWAMPFS_STEPS`` says how many steps are done in all: random ones; without it 12 000, the same every time. After every
12 000, what is left is compared with a fresh machine, and removed.
"""

from __future__ import annotations

import errno
import itertools
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datastores import check_bucket
from tests.suite import everything

EXPLORE = "SWAMPFS_STEPS" in os.environ
STEPS = int(os.environ.get("SWAMPFS_STEPS", "12000"))
ROUND = 12000
LENGTH = 120
DIRECTORIES = ["", "d", "d/e", "other"]
PATHS = st.builds(os.path.join, st.sampled_from(DIRECTORIES), st.sampled_from(["a", "b", "d", "e", ".#scratch"]))
BYTES = st.binary(max_size=12)
OFFSETS = st.integers(0, 20)
HANDLES = st.integers(0, 2)
MODES = st.sampled_from([0o600, 0o644, 0o755, 0o400, 0o4711])
FLAGS = st.sampled_from(
    [os.O_RDONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND, os.O_RDWR | os.O_TRUNC, os.O_RDWR | os.O_CREAT,
     os.O_RDWR | os.O_CREAT | os.O_EXCL, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, os.O_RDONLY | os.O_DIRECTORY]
)  # fmt: skip
STEP = st.one_of(
    st.tuples(st.just("write"), PATHS, BYTES),
    st.tuples(st.just("append"), PATHS, BYTES),
    st.tuples(st.just("truncate"), PATHS, OFFSETS),
    st.tuples(st.just("read"), PATHS),
    st.tuples(st.just("open"), HANDLES, PATHS, FLAGS),
    st.tuples(st.just("pwrite"), HANDLES, BYTES, OFFSETS),
    st.tuples(st.just("pread"), HANDLES, OFFSETS),
    st.tuples(st.just("ftruncate"), HANDLES, OFFSETS),
    st.tuples(st.just("fstat"), HANDLES),
    st.tuples(st.just("close"), HANDLES),
    st.tuples(st.just("mkdir"), PATHS),
    st.tuples(st.just("rmdir"), PATHS),
    st.tuples(st.just("unlink"), PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("rename"), PATHS, PATHS),
    st.tuples(st.just("link"), PATHS, PATHS),
    st.tuples(st.just("symlink"), st.sampled_from(["a", "../a", "nowhere"]), PATHS),
    st.tuples(st.just("readlink"), PATHS),
    st.tuples(st.just("mkfifo"), PATHS),
    st.tuples(st.just("chmod"), PATHS, MODES),
    st.tuples(st.just("utime"), PATHS, st.integers(0, 2**60)),
    st.tuples(st.just("listdir"), PATHS),
    st.tuples(st.just("stat"), PATHS),
)


class Shell:
    """The same user on one of the two directories."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.open: dict[int, int] = {}
        root.mkdir(parents=True)

    def do(self, op, *arguments):
        """What the system answered: a value, or the name of its error."""
        try:
            return getattr(self, op)(*arguments)
        except OSError as error:
            return errno.errorcode[error.errno]

    def at(self, path):
        return os.path.join(self.root, path)

    def write(self, path, body):
        self._put(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, body)

    def append(self, path, body):
        self._put(path, os.O_WRONLY | os.O_APPEND, body)

    def _put(self, path, flags, body):
        if self.is_pipe(path):
            return
        fd = os.open(self.at(path), flags, 0o644)
        try:
            os.write(fd, body)
        finally:
            os.close(fd)

    def is_pipe(self, path):
        """Opening one would wait for its other end."""
        try:
            return stat.S_ISFIFO(os.stat(self.at(path)).st_mode)
        except OSError:
            return False

    def truncate(self, path, size):
        os.truncate(self.at(path), size)

    def read(self, path):
        return None if self.is_pipe(path) else Path(self.at(path)).read_bytes()

    def open_(self, number, path, flags):
        if self.is_pipe(path):
            return
        self.close(number)
        self.open[number] = os.open(self.at(path), flags, 0o640)

    def pwrite(self, number, body, offset):
        return os.pwrite(self.open[number], body, offset) if number in self.open else None

    def pread(self, number, offset):
        return os.pread(self.open[number], 64, offset) if number in self.open else None

    def ftruncate(self, number, size):
        return os.ftruncate(self.open[number], size) if number in self.open else None

    def fstat(self, number):
        return look(os.fstat(self.open[number])) if number in self.open else None

    def close(self, number):
        if number in self.open:
            os.close(self.open.pop(number))

    def mkdir(self, path):
        os.mkdir(self.at(path), 0o755)

    def rmdir(self, path):
        os.rmdir(self.at(path))

    def unlink(self, path):
        os.unlink(self.at(path))

    def rename(self, source, target):
        os.rename(self.at(source), self.at(target))

    def link(self, source, target):
        os.link(self.at(source), self.at(target), follow_symlinks=False)

    def symlink(self, text, path):
        os.symlink(text, self.at(path))

    def readlink(self, path):
        return os.readlink(self.at(path))

    def mkfifo(self, path):
        os.mkfifo(self.at(path), 0o644)

    def chmod(self, path, mode):
        os.chmod(self.at(path), mode)

    def utime(self, path, mtime_ns):
        os.utime(self.at(path), ns=(1, mtime_ns))
        return os.stat(self.at(path)).st_mtime_ns

    def listdir(self, path):
        return sorted(os.listdir(self.at(path)))

    def stat(self, path):
        return look(os.lstat(self.at(path)))

    def everything(self):
        """The whole tree: attributes, contents, and which names are one file."""
        found, same = {}, {}
        for directory, names, files in os.walk(self.root):
            for name in [*names, *files]:
                path = os.path.join(directory, name)
                seen, rel = os.lstat(path), os.path.relpath(path, self.root)
                content = Path(path).read_bytes() if stat.S_ISREG(seen.st_mode) else None
                content = os.readlink(path) if stat.S_ISLNK(seen.st_mode) else content
                same.setdefault(seen.st_ino, []).append(rel)
                found[rel] = (look(seen), content)
        return found, sorted(map(sorted, same.values()))


def look(found):
    """Directories have sizes of their file system's own."""
    size = None if stat.S_ISDIR(found.st_mode) else found.st_size
    return oct(found.st_mode), found.st_nlink, size, found.st_uid, found.st_gid


@pytest.mark.timeout(STEPS / 20 + 120)
@pytest.mark.parametrize("collects", ["off", "on"])
def test_a_mounted_tree_answers_as_a_plain_directory_does(bucket, fleet, collects):
    steps = STEPS if collects == "off" else STEPS // 4
    for number in range(-(-steps // ROUND)):
        do_a_round(bucket, fleet, number, min(steps, ROUND), ("--push-delay", "50ms", "--writeback-cache", collects))


def do_a_round(bucket, fleet, number, many, options):
    machine = fleet.machine(f"a{number}", bucket.env, options=options)
    machine.mount(bucket.url)
    numbers = itertools.count()

    @settings(
        max_examples=many // LENGTH,
        deadline=None,
        database=None,
        derandomize=not EXPLORE,
        suppress_health_check=list(HealthCheck),
    )
    @given(steps=st.lists(STEP, min_size=LENGTH, max_size=LENGTH))
    def both(steps):
        with tempfile.TemporaryDirectory(dir="/dev/shm") as scratch:
            place = f"files/{number}-{next(numbers)}/t"  # SeaweedFS loses objects named as a folder once was
            do_both(Shell(machine.path / place), Shell(Path(scratch, "t")), steps)

    both()
    left = everything(machine.path)
    assert len(left) > many / LENGTH / 2, "something was made"
    machine.umount()
    check_bucket(bucket)
    fresh = fleet.machine(f"b{number}", bucket.env)
    fresh.mount(bucket.url)
    assert everything(fresh.path) == left
    shutil.rmtree(fresh.path / "files")
    fresh.umount()


def do_both(mounted, plain, steps):
    """The same steps in both directories, with the same answers, and the same tree in the end."""
    done = []
    try:
        for op, *arguments in steps:
            ours, theirs = (shell.do("open_" if op == "open" else op, *arguments) for shell in (mounted, plain))
            done.append((op, *arguments, theirs))
            assert ours == theirs, f"{ours} instead of {theirs} after {done}"
    finally:
        for shell in (mounted, plain):
            for handle in list(shell.open):
                shell.close(handle)
    assert mounted.everything() == plain.everything(), done
