"""What the kernel asks, counted; and that it makes no difference to anybody who answers (decisions 0012 and 0013)."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import threading
from collections import Counter

import pytest

from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.datastores import load_shards
from tests.harness import wait_for

QUIET = ("--refresh", "1h", "--push-delay", "1h", "--prefetch", "off")
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
LARGE = os.urandom(3 << 20)


class Asked:
    """Requests of the kernel since it was made, by name."""

    def __init__(self, machine):
        self._machine = machine
        self._before = self._counts()

    def _counts(self):
        told = self._machine.status()["upcalls"]
        return Counter(told["answered"]) + Counter(told["passed"])

    def __call__(self):
        """But for what ``status`` does to the mount point itself."""
        counts = self._counts() - self._before
        counts.subtract(STATFS=counts["STATFS"], GETATTR=min(counts["GETATTR"], 2))
        return dict(+counts)


@pytest.fixture
def mounted(bucket, fleet):
    def mount(files, *options, name="a"):
        load_shards(bucket, files)
        machine = fleet.machine(name, bucket.env, options=options or QUIET)
        machine.mount(bucket.url)
        return machine

    return mount


def is_patched(machine):
    """Whether the kernel reads files of this machine by itself; it has to be new enough, and we root."""
    return machine.status()["upcalls"]["passthrough"]


def test_a_warm_open_read_and_close_is_one_request_somebody_waits_for(mounted):
    machine = mounted([("files/small", b"small")])
    path = machine.path / "files/small"
    path.read_bytes()
    asked = Asked(machine)
    for _ in range(20):
        assert path.read_bytes() == b"small"
    wait_for(lambda: asked().get("RELEASE") == 20, "they are closed")  # which nobody waits for
    counts = asked()
    counts.pop("IOCTL", None)  # Python asks whether it is a terminal
    assert counts == {"OPEN": 20, "RELEASE": 20}


def test_another_find_asks_for_nothing_but_the_directories_themselves(mounted):
    machine = mounted([(f"files/{d}/{f}", b"x") for d in range(10) for f in range(30)])
    find = lambda: subprocess.run(["find", "."], cwd=machine.path, check=True, capture_output=True, text=True).stdout  # noqa: E731
    first = find()
    find()  # asks for the directories' access times, which the first one changed
    asked = Asked(machine)
    assert find() == first
    assert set(asked()) == {"OPENDIR", "RELEASEDIR"}
    assert 12 <= asked()["OPENDIR"] <= 13  # one may be of `status`


def test_a_long_listing_of_ten_thousand_is_less_than_a_hundred_requests(mounted):
    machine = mounted([(f"files/name-{number:05}", b"x") for number in range(10_000)])
    asked = Asked(machine)
    listing = subprocess.run(
        ["ls", "-l", "files"], cwd=machine.path, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(listing) == 10_001
    assert sum(asked().values()) <= 100, asked()


def test_an_archive_is_unpacked_without_pyfuse3(mounted, tmp_path):
    machine = mounted([("files/old", b"old")])
    for number in range(20):
        (tmp_path / f"source/{number}/1").mkdir(parents=True)
        (tmp_path / f"source/{number}/1/raw").write_bytes(b"x" * 4096)
    subprocess.run(["tar", "-cf", tmp_path / "archive", "-C", tmp_path / "source", "."], check=True)
    for attempt in range(3):  # on a slow machine the lock may have been held for so long that it changes hands
        (machine.path / f"files/first{attempt}").touch()  # takes it
        (machine.path / "files/new").mkdir()
        before = Counter(machine.status()["upcalls"]["passed"])
        subprocess.run(["tar", "-xf", tmp_path / "archive", "-C", machine.path / "files/new"], check=True)
        passed = Counter(machine.status()["upcalls"]["passed"]) - before
        if not passed.keys() - {"GETXATTR"} or attempt == 2:
            break
        shutil.rmtree(machine.path / "files/new")
    assert not passed.keys() - {"GETXATTR"}, passed  # which is asked once, to be told that there are none
    assert (machine.path / "files/new/7/1/raw").read_bytes() == b"x" * 4096
    assert (machine.path / "files/new/7").stat().st_mode == (tmp_path / "source/7").stat().st_mode


def test_large_local_files_are_read_by_the_kernel_alone(mounted):
    machine = mounted([("files/large", LARGE)])
    path = machine.path / "files/large"
    assert path.read_bytes() == LARGE
    asked = Asked(machine)
    assert path.read_bytes() == LARGE
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert mapped[-100:] == LARGE[-100:]
    if is_patched(machine):
        assert "READ" not in asked(), asked()


def test_the_kernel_reads_nothing_by_itself_if_that_is_not_wanted(mounted):
    machine = mounted([("files/large", LARGE)], *QUIET, "--passthrough", "off")
    assert not is_patched(machine)
    for _ in range(2):
        assert (machine.path / "files/large").read_bytes() == LARGE


def test_a_file_that_is_read_in_order_is_asked_for_in_large_pieces(mounted):
    body = os.urandom(8 << 20)
    machine = mounted([("files/x", b"x")], *QUIET, "--passthrough", "off")
    (machine.path / "files/new").write_bytes(body)
    device = machine.path.stat().st_dev
    may_say_so = os.access(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb", os.W_OK)
    asked = Asked(machine)
    with open(machine.path / "files/new", "rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        assert file.read() == body
    assert asked()["READ"] <= (24 if may_say_so else 72)


@pytest.mark.parametrize("written", ["appended", "mapped", "renamed over", "truncated"])
def test_who_reads_a_large_file_and_who_changes_it_see_one_file_and_others_get_it(mounted, fleet, bucket, written):
    machine = mounted([("files/large", LARGE)], "--refresh", "300ms", "--push-delay", "200ms")
    other = fleet.machine("b", bucket.env)
    other.mount(bucket.url)
    path = machine.path / "files/large"
    assert path.read_bytes() == LARGE
    with open(path, "rb", buffering=0) as reader:
        assert reader.read(10) == LARGE[:10]
        expected = changed(path, written)
        reader.seek(0)
        assert reader.read() == (LARGE if written == "renamed over" else expected)
        assert path.read_bytes() == expected
        assert path.stat().st_size == len(expected)
    assert path.read_bytes() == expected
    machine.flush()
    wait_for(lambda: (other.path / "files/large").read_bytes() == expected, "the other machine has it")


def changed(path, written):
    """Change a file in some way; returns what it then holds."""
    if written == "appended":
        with open(path, "ab") as file:
            file.write(b"and more")
        return LARGE + b"and more"
    if written == "mapped":
        with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
            mapped[5:9] = b"here"
        return LARGE[:5] + b"here" + LARGE[9:]
    if written == "renamed over":
        path.with_suffix(".new").write_bytes(b"new" * 100_000)
        path.with_suffix(".new").rename(path)
        return b"new" * 100_000
    os.truncate(path, 1 << 20)
    return LARGE[: 1 << 20]


def test_what_is_written_through_a_mapping_that_outlives_its_file_reaches_the_others(mounted, fleet, bucket):
    """The kernel maps the file of this machine itself, and tells nobody when that ends."""
    machine = mounted([("files/large", LARGE)], "--refresh", "300ms", "--push-delay", "200ms")
    other = fleet.machine("b", bucket.env)
    other.mount(bucket.url)
    path = machine.path / "files/large"
    path.read_bytes()
    with open(path, "rb", buffering=0):
        address = mapped(path)
        machine.status()
        wait_for(lambda: machine.status()["openFiles"] <= 2, "the writer is closed")
        ctypes.memmove(address, b"early", 5)
        ctypes.memmove(address + 10, b"late", 4)
        _libc.munmap(ctypes.c_void_p(address), len(LARGE))
    expected = b"early" + LARGE[5:10] + b"late" + LARGE[14:]
    assert path.read_bytes() == expected
    machine.flush()
    wait_for(lambda: (other.path / "files/large").read_bytes() == expected, "the other machine has it")


@pytest.mark.parametrize("options", [("--fsync", "remote"), ("--consistency", "close-to-open"), ()])
def test_each_publication_of_a_mapped_file_has_what_was_written_before_it(mounted, bucket, options):
    machine = mounted([("files/large", LARGE)], *QUIET, *options)
    path = machine.path / "files/large"
    path.read_bytes()
    with open(path, "rb", buffering=0) as reader, open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as shared:
        assert reader.read(4) == LARGE[:4]
        for word in (b"ONE!", b"TWO!"):
            shared[:4] = word
            os.fsync(file.fileno())
            os.close(os.dup(file.fileno()))
            if options:
                assert bucket.get("files/large")[:4] == word
        shared[:4] = b"THR!"
    machine.flush()
    assert bucket.get("files/large") == path.read_bytes() == b"THR!" + LARGE[4:]


@pytest.mark.parametrize("way", ["out of the datastore", "into it"])
def test_a_large_file_that_is_open_can_be_moved_across_tiers(mounted, way):
    machine = mounted([("files/large", LARGE)])
    source, target = machine.path / "files/large", machine.path / "secrets/large"
    if way == "into it":
        source.unlink()
        source, target = target, source
        source.parent.mkdir(exist_ok=True)
        source.write_bytes(LARGE)
    target.parent.mkdir(exist_ok=True)
    source.read_bytes()
    with open(source, "rb") as reader:
        subprocess.run(["mv", source, target], check=True)
        assert target.read_bytes() == LARGE
        machine.flush()
        with open(f"/proc/self/fd/{reader.fileno()}", "rb") as again:
            assert again.read() == reader.read() == LARGE
        assert target.read_bytes() == LARGE


def mapped(path):
    """Address of a file that is mapped for writing, and closed: Python's own mappings keep it open."""
    file = os.open(path, os.O_RDWR)
    address = shared(file, len(LARGE))
    os.close(file)
    return address


def shared(fd, size):
    access = mmap.PROT_READ | mmap.PROT_WRITE
    return _libc.mmap(None, ctypes.c_size_t(size), access, mmap.MAP_SHARED, fd, ctypes.c_long(0))


def test_a_removed_large_file_can_be_opened_again_by_who_has_it(mounted):
    machine = mounted([("files/large", LARGE), ("files/small", b"small")])
    for name in ("large", "small"):
        path = machine.path / "files" / name
        body = path.read_bytes()
        with open(path, "rb") as reader, open(path, "r+b") as writer:
            path.unlink()
            for file in (reader, writer):
                again = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR)
                assert os.pread(again, len(body) + 1, 0) == body
                os.pwrite(again, b"!", 0)
                os.pwrite(again, body[:1], 0)
                os.close(again)
            assert reader.read() == body
    assert machine.path.joinpath("files").is_dir()


def test_what_waits_for_the_datastore_holds_up_nothing_that_is_here(bucket, server, fleet):
    load_shards(bucket, [("files/here", b"here"), *((f"files/away-{n}", b"away") for n in range(40))])
    proxy = FaultProxy(server.endpoint)
    machine = fleet.machine(
        "a", {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}, options=("--timeout", "5s", "--prefetch", "off")
    )
    machine.mount(bucket.url)
    (machine.path / "files/here").read_bytes()
    proxy.set(Fault.BLACK_HOLE)
    errors = []

    def read(number):
        try:
            (machine.path / f"files/away-{number}").read_bytes()
        except OSError as error:
            errors.append(error.errno)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(40)]
    for reader in readers:
        reader.start()
    asked = Asked(machine)
    for _ in range(100):
        assert (machine.path / "files/here").read_bytes() == b"here"
    assert not errors, "they were done before anybody gave up"
    assert asked()["OPEN"] >= 100
    proxy.set(None)
    for reader in readers:
        reader.join()
    proxy.close()


def test_a_listing_the_kernel_keeps_shows_what_others_make_and_remove(mounted, fleet, bucket):
    machine = mounted([("files/one", b"1")], "--refresh", "200ms")
    other = fleet.machine("b", bucket.env)
    other.mount(bucket.url)
    for _ in range(3):
        assert os.listdir(machine.path / "files") == ["one"]
    (other.path / "files/two").write_text("2")
    other.flush()
    wait_for(lambda: sorted(os.listdir(machine.path / "files")) == ["one", "two"], "it shows what was made")
    (other.path / "files/one").unlink()
    other.flush()
    wait_for(lambda: os.listdir(machine.path / "files") == ["two"], "it does not show what was removed")


def test_a_listing_is_right_also_if_the_time_of_its_directory_is_turned_back(mounted, fleet, bucket):
    machine = mounted([("files/one", b"1")], "--refresh", "200ms")
    other = fleet.machine("b", bucket.env)
    other.mount(bucket.url)
    directory = machine.path / "files"
    os.utime(directory, (1, 1))
    for _ in range(2):
        assert os.listdir(directory) == ["one"]
    (other.path / "files/two").write_text("2")
    (other.path / "files/one").write_text("replaced")
    other.flush()
    wait_for(lambda: directory.stat().st_mtime != 1 and (directory / "one").read_text() == "replaced", "it was told")
    os.utime(directory, (1, 1))
    assert sorted(os.listdir(directory)) == ["one", "two"]
    with os.scandir(directory) as entries:
        assert all(entry.inode() == entry.stat().st_ino for entry in entries)


@pytest.mark.parametrize("lane", ["on", "off"])
def test_a_file_opened_for_reading_and_truncation_is_empty(mounted, lane, bucket):
    machine = mounted([("files/here", b"here"), ("files/away", b"away")], *QUIET, "--fast-lane", lane)
    (machine.path / "files/here").read_bytes()
    for name in ("here", "away"):
        os.close(os.open(machine.path / "files" / name, os.O_RDONLY | os.O_TRUNC))
        assert (machine.path / "files" / name).read_bytes() == b""
    machine.flush()
    assert bucket.get("files/here") == bucket.get("files/away") == b""


def test_without_the_fast_lane_everything_is_as_with_it(mounted):
    machine = mounted([("files/large", LARGE), ("files/small", b"small")], *QUIET, "--fast-lane", "off")
    assert machine.status()["upcalls"] is None
    for _ in range(2):
        assert (machine.path / "files/large").read_bytes() == LARGE
        assert (machine.path / "files/small").read_bytes() == b"small"
    (machine.path / "files/new").write_text("new")
    assert sorted(os.listdir(machine.path / "files")) == ["large", "new", "small"]
    machine.flush()


def appended_by_two(path, fd):
    with open(path, "ab", buffering=0) as other:
        for _ in range(3):
            other.write(b" theirs")
            os.write(fd, b" ours")
    return path, b"first" + b" theirs ours" * 3


def changed_beside(path, fd):
    with open(path, "r+b", buffering=0) as other, open(path, "rb", buffering=0) as reader:
        other.write(b"F")
        assert reader.read() == b"First"
        os.pwrite(fd, b"T", 4)
        assert os.pread(other.fileno(), 10, 0) == os.pread(reader.fileno(), 10, 0) == b"FirsT"
    return path, b"FirsT"


def truncated(path, fd):
    os.ftruncate(fd, 3)
    os.write(fd, b"second")
    os.truncate(path, 10)
    assert path.stat().st_size == os.fstat(fd).st_size == 10
    return path, b"fir\0\0secon"


def emptied_by_another(path, fd):
    with open(path, "wb") as other:
        other.write(b"x")
    os.pwrite(fd, b"y", 1)
    return path, b"xy"


def renamed_and_replaced(path, fd):
    path = path.rename(path.with_name("renamed"))
    os.write(fd, b" second")
    path.with_name("second").write_bytes(b"another")
    path.with_name("second").rename(path)
    os.write(fd, b" to nobody")
    assert os.pread(fd, 100, 0) == b"first second to nobody"
    return path, b"another"


def linked(path, fd):
    link = path.with_name("link")
    os.link(path, link)
    os.write(fd, b" second")
    assert link.read_bytes() == b"first second"
    path.unlink()
    os.write(fd, b" third")
    return link, b"first second third"


def removed(path, fd):
    path.unlink()
    os.write(fd, b" second")
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    os.pwrite(again, b"F", 0)
    assert os.pread(again, 100, 0) == os.pread(fd, 100, 0) == b"First second"
    os.close(again)
    return path, None


def mapped_for_longer(path, fd):
    os.ftruncate(fd, mmap.PAGESIZE)
    address = shared(fd, mmap.PAGESIZE)
    ctypes.memmove(address, b"mappe", 5)
    os.close(os.open(path, os.O_RDONLY))
    ctypes.memmove(address + 5, b"d", 1)
    _libc.munmap(ctypes.c_void_p(address), mmap.PAGESIZE)
    return path, b"mapped" + bytes(mmap.PAGESIZE - 6)


WAYS = [
    appended_by_two, changed_beside, truncated, emptied_by_another, renamed_and_replaced, linked, removed,
    mapped_for_longer,
]  # fmt: skip


@pytest.mark.parametrize("collects", ["off", "on"])
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_is_written_to_a_new_file_is_what_everybody_sees(mounted, fleet, bucket, way, collects):
    options = ("--refresh", "300ms", "--push-delay", "200ms", "--writeback-cache", collects)
    machine = mounted([("files/old", b"old")], *options)
    other = fleet.machine("b", bucket.env)
    other.mount(bucket.url)
    path = machine.path / "files/new"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | (os.O_APPEND if way is appended_by_two else 0))
    os.write(fd, b"first")
    assert path.stat().st_size == 5
    path, expected = way(path, fd)
    os.close(fd)
    assert (path.read_bytes() if path.exists() else None) == expected
    machine.flush()
    names = ["old"] if expected is None else sorted(["old", path.name])
    wait_for(lambda: sorted(os.listdir(other.path / "files")) == names, "the other machine sees its name")
    if expected is not None:
        assert (other.path / "files" / path.name).read_bytes() == expected
