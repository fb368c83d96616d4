"""File handles, as an NFS server uses them: an inode is found again by its number alone."""

from __future__ import annotations

import ctypes
import errno
import os

import pytest

from swampfs.testing.sample import sample_files
from tests.datastores import load_shards

LIBC = ctypes.CDLL(None, use_errno=True)


class Handle(ctypes.Structure):
    _fields_ = [("bytes", ctypes.c_uint), ("type", ctypes.c_int), ("handle", ctypes.c_ubyte * 128)]


def handle_of(path):
    handle, mount = Handle(bytes=128), ctypes.c_int()
    if LIBC.name_to_handle_at(-100, os.fsencode(path), ctypes.byref(handle), ctypes.byref(mount), 0):
        raise OSError(ctypes.get_errno(), path)
    return handle


def open_handle(root, handle, flags=os.O_RDONLY):
    fd = LIBC.open_by_handle_at(root, ctypes.byref(handle), flags)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "open_by_handle_at")
    return fd


@pytest.fixture
def machine(bucket, fleet):
    load_shards(bucket, sample_files(models=1))
    machine = fleet.machine("a", bucket.env)
    machine.mount(bucket.url)
    yield machine
    machine.umount()


def forget_everything():
    """The kernel drops inodes and names that nobody uses."""
    os.sync()
    with open("/proc/sys/vm/drop_caches", "w") as file:
        file.write("2")


def test_files_and_directories_are_found_again_by_their_handles(machine):
    deep = next(machine.path.rglob("raw"))
    (machine.path / "files").mkdir()
    (machine.path / "files/new").write_text("written here")
    paths = [deep, deep.parent, machine.path / "files/new", machine.path / "files"]
    handles = [handle_of(path) for path in paths]
    seen = [(os.stat(path).st_ino, os.stat(path).st_mode) for path in paths]
    forget_everything()
    root = os.open(machine.path, os.O_RDONLY)
    try:
        for path, handle, expected in zip(paths, handles, seen, strict=True):
            fd = open_handle(root, handle)
            found = os.fstat(fd)
            assert (found.st_ino, found.st_mode) == expected, path
            if path.is_dir():
                assert os.readlink(f"/proc/self/fd/{fd}") == str(path), "its place in the tree is found too"
            os.close(fd)
        (machine.path / "files/new").unlink()
        forget_everything()
        with pytest.raises(OSError) as caught:
            open_handle(root, handles[2])
        assert caught.value.errno == errno.ESTALE
    finally:
        os.close(root)
