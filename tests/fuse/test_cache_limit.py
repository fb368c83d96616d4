"""How much content stays on this machine: ``--cache-size``, and a disk that is full."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess

import pytest

from tests.datastores import check_bucket, load_shards
from tests.harness import wait_for

MIB = 1 << 20
FILES = [(f"files/{number:02}", bytes([number]) * MIB) for number in range(20)]


@pytest.fixture
def datastore(bucket):
    load_shards(bucket, FILES)
    return bucket


def local(machine):
    """Names whose content is on this machine."""
    return {name for name in os.listdir(machine.path / "files") if os.stat(machine.path / "files" / name).st_blocks}


def read(machine, number):
    return (machine.path / f"files/{number:02}").read_bytes()


def test_the_longest_unused_content_goes_when_there_is_too_much(datastore, fleet):
    a = fleet.machine("a", datastore.env, options=("--cache-size", "8M", "--refresh", "200ms"))
    a.mount(datastore.url)
    for number in range(8):
        assert read(a, number) == FILES[number][1]
    with open(a.path / "files/01", "rb") as held:
        read(a, 0)  # the youngest now
        for number in range(8, 12):
            assert read(a, number) == FILES[number][1]
        wait_for(lambda: a.status()["cache"]["bytes"] <= 8 * MIB, "there is no more than allowed")
        kept = local(a)
        assert {"00", "01", "11"} <= kept, "what is open, and what was used last"
        assert not {"02", "03", "04"} & kept, "the longest unused"
        assert held.read() == FILES[1][1]
    assert read(a, 2) == FILES[2][1], "it is fetched again"
    assert a.status()["cache"]["limit"] == 8 * MIB


def test_what_is_not_in_the_datastore_yet_is_never_evicted(datastore, fleet):
    a = fleet.machine("a", datastore.env, options=("--cache-size", "2M", "--push-delay", "1h"))
    a.mount(datastore.url)
    for number in range(4):
        (a.path / f"files/new-{number}").write_bytes(b"n" * MIB)
    for number in range(6):
        read(a, number)
    wait_for(lambda: len(local(a)) <= 4, "what is clean went")
    assert local(a) == {f"new-{number}" for number in range(4)}
    a.flush()
    wait_for(lambda: a.status()["cache"]["bytes"] <= 2 * MIB, "after the push they may go")
    assert check_bucket(datastore)["files/new-3"] == b"n" * MIB
    assert (a.path / "files/new-3").read_bytes() == b"n" * MIB


def test_a_directory_larger_than_the_limit_can_be_renamed(datastore, fleet):
    a = fleet.machine("a", datastore.env, options=("--cache-size", "4M", "--push-delay", "200ms"))
    a.mount(datastore.url)
    (a.path / "files").rename(a.path / "audit")
    a.flush()
    assert check_bucket(datastore) == {path.replace("files/", "audit/"): body for path, body in FILES}
    wait_for(lambda: a.status()["cache"]["bytes"] <= 4 * MIB, "then there is no more than allowed")


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 12 MiB for a state directory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], check=True)
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk_is_made_room_on_for_what_is_read_and_written(datastore, fleet, small_disk):
    a = fleet.machine("a", datastore.env, options=("--push-delay", "200ms"))
    a.state_dir = small_disk / "state"
    a.mount(datastore.url)
    for number, (_, body) in enumerate(FILES):
        assert read(a, number) == body, "all of it, though it is more than the disk holds"
    (a.path / "files/large").write_bytes(b"l" * 6 * MIB)
    a.flush()
    assert check_bucket(datastore)["files/large"] == b"l" * 6 * MIB


def test_what_does_not_fit_is_enospc_and_takes_nothing_with_it(datastore, fleet, small_disk):
    a = fleet.machine("a", datastore.env, options=("--push-delay", "1h"))
    a.state_dir = small_disk / "state"
    a.mount(datastore.url)
    (a.path / "files/kept").write_bytes(b"k" * 4 * MIB)
    with pytest.raises(OSError) as caught:
        (a.path / "files/large").write_bytes(b"l" * 16 * MIB)
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(OSError) as caught:
        read(a, 1)
    assert caught.value.errno == errno.ENOSPC
    assert (a.path / "files/kept").read_bytes() == b"k" * 4 * MIB
    os.unlink(a.path / "files/large")

    def can_read():  # soon: its content goes when the kernel has forgotten it
        try:
            return read(a, 1) == FILES[1][1]
        except OSError as error:
            assert error.errno == errno.ENOSPC
            return False

    wait_for(can_read, "with room again, all goes on")
    a.flush()
    assert check_bucket(datastore) == {**dict(FILES), "files/kept": b"k" * 4 * MIB}


@pytest.mark.parametrize("text", ["ten", "-1G", "10 apples"])
def test_a_bad_cache_size_is_a_usage_error(text, datastore, fleet):
    done = fleet.machine("a", datastore.env).mount(datastore.url, "--cache-size", text, check=False)
    assert done.returncode == 1
    assert "is not a size" in done.stderr


@pytest.fixture
def filler(small_disk):
    """Takes what is left of the disk each time it is called; ``give_back`` frees it."""
    path = small_disk / "filler"

    class Filler:
        def fill(self):
            with open(path, "ab", buffering=0) as file:
                for size in (1 << 16, 1 << 12, 1):  # to the last page
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"f" * size)

        def give_back(self):
            path.unlink()

    return Filler()


CHANGES = {
    "journal and catalog": lambda root, number: (root / f"files/new-{number}").touch(),
    "catalog": lambda root, number: (root / f"outputs/{number}").mkdir(),
    "journal": lambda root, number: (root / "files/05").chmod(0o600 + number % 2),
}
MANY = 4000


@pytest.mark.parametrize("what", CHANGES)
def test_a_disk_without_a_page_left_is_enospc_to_a_change_of_the_databases_and_loses_none(
    what, datastore, fleet, small_disk, filler
):
    a = fleet.machine("a", datastore.env, options=("--push-delay", "1h", "--refresh", "200ms"))
    a.state_dir = small_disk / "state"
    a.mount(datastore.url)
    (a.path / "outputs").mkdir()
    (a.path / "files/kept").write_bytes(b"kept")
    held = open(a.path / "files/held", "wb", buffering=0)  # noqa: SIM115
    held.write(b"held")
    done = []
    for attempt in range(2):  # the second time with nothing kept for the databases
        with pytest.raises(OSError) as caught:
            for number in range(attempt * MANY, (attempt + 1) * MANY):
                if number % 20 == 0:  # whatever became free meanwhile
                    filler.fill()
                CHANGES[what](a.path, number)
                done.append(number)
        assert caught.value.errno == errno.ENOSPC
        assert (a.path / "files/kept").read_bytes() == b"kept", "what is here can be read"
        assert a.status()["pid"] == a.pid(), "and it goes on"
        if what == "catalog":  # nothing is pending there
            wait_for(lambda: "outputs" not in str(a.status()["locks"]), "locks are given back, also now")
            assert not [key for key in datastore.keys() if key.endswith("outputs.lock")]
    held.close()
    assert (a.path / "files/held").read_bytes() == b"held", "though its size could not be noted"
    filler.give_back()
    CHANGES[what](a.path, -1)
    a.flush()
    left = {**dict(FILES), "files/kept": b"kept", "files/held": b"held"}
    if what == "journal and catalog":
        left |= {f"files/new-{number}": b"" for number in (*done, -1)}
    if what == "catalog":
        assert set(os.listdir(a.path / "outputs")) == {str(number) for number in (*done, -1)}
    a.umount()
    a.mount(datastore.url)
    assert {str(path.relative_to(a.path)) for path in a.path.rglob("*") if path.is_file()} == set(left)
    assert check_bucket(datastore) == left


def test_what_others_change_while_the_disk_is_full_is_seen_when_there_is_room_again(
    datastore, fleet, small_disk, filler
):
    options = ("--push-delay", "100ms", "--refresh", "200ms")
    a, b = (fleet.machine(name, datastore.env, options=options) for name in "ab")
    a.state_dir = small_disk / "state"
    for machine in (a, b):
        machine.mount(datastore.url)
    for attempt in range(2):
        filler.fill()
        for number in range(300):
            (b.path / f"files/from-b-{attempt}-{number:03}-{'x' * 150}").touch()
        b.flush()
    wait_for(lambda: not a.status()["healthy"], "it says that it cannot follow")
    assert "full" in a.status()["lastError"]
    assert len(os.listdir(a.path / "files")) >= len(FILES), "what it knows is there"
    filler.give_back()
    wait_for(lambda: len(os.listdir(a.path / "files")) == len(FILES) + 600, "with room again, it follows")
    assert a.status()["healthy"]
