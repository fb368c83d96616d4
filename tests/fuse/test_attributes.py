"""Modes, owners, exact times and symbolic links: on this machine, on another one, and for clients that know none."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from swampfs.testing.sample import sample_files
from tests.datastores import check_bucket, indexed, load_monolith, load_shards
from tests.fuse.test_locks import MODEL
from tests.harness import wait_for

RAW = f"{MODEL}/n/1/raw"
MTIME_NS = 1_700_000_000_123_456_789


@pytest.fixture(params=["v1", "v2"])
def datastore(request, bucket):
    (load_monolith if request.param == "v1" else load_shards)(bucket, [*sample_files(models=1), (RAW, b"content")])
    return bucket


@pytest.fixture
def machines(datastore, fleet):
    found = [fleet.machine(name, datastore.env) for name in "ab"]
    for machine in found:
        machine.mount(datastore.url)
    return found


def attributes(root):
    """Everything of a tree that another machine must see too."""
    found = {}
    for directory, names, files in os.walk(root):
        for name in [*files, *(name for name in names if os.path.islink(os.path.join(directory, name)))]:
            path = os.path.join(directory, name)
            seen = os.lstat(path)
            target = os.readlink(path) if stat.S_ISLNK(seen.st_mode) else None
            found[os.path.relpath(path, root)] = (seen.st_mode, seen.st_uid, seen.st_gid, seen.st_mtime_ns, target)
    return found


def test_modes_owners_times_and_links_travel_to_other_machines(machines, datastore, fleet):
    a, b = machines
    tool = a.path / "files/tool"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    os.chown(tool, 1234, 567)
    os.utime(tool, ns=(MTIME_NS, MTIME_NS))
    (a.path / "files/way").symlink_to("../data/not there/å")
    os.utime(a.path / "files/way", ns=(MTIME_NS, MTIME_NS + 1), follow_symlinks=False)
    (a.path / "files/plain").write_text("plain")
    a.flush()
    wait_for(lambda: attributes(b.path) == attributes(a.path), "the other machine shows the same")
    assert attributes(b.path)["files/tool"] == (0o100755, 1234, 567, MTIME_NS, None)
    fresh = fleet.machine("c", datastore.env)
    fresh.mount(datastore.url)
    assert attributes(fresh.path) == attributes(a.path)


def test_a_change_of_attributes_alone_sends_no_content(machines, datastore):
    a, b = machines
    inode, content = os.stat(b.path / RAW).st_ino, (b.path / RAW).read_bytes()
    for machine in machines:
        machine.clear_requests()
    (a.path / RAW).chmod(0o600)
    os.utime(a.path / RAW, ns=(0, MTIME_NS))
    a.flush()
    assert RAW not in [request["key"].partition("/")[2] for request in a.requests()], "nor fetched: it is not here"
    wait_for(lambda: attributes(b.path) == attributes(a.path), "the other machine shows the same")
    assert stat.S_IMODE(os.stat(b.path / RAW).st_mode) == 0o600
    assert (os.stat(b.path / RAW).st_ino, (b.path / RAW).read_bytes()) == (inode, content)
    assert not [request for request in b.requests() if request["op"] == "download"], "what it has is still good"
    assert check_bucket(datastore)[RAW] == b"content"


def test_attributes_survive_kill_9_and_are_published_after_it(machines, datastore):
    a, b = machines
    (a.path / RAW).chmod(0o711)
    (a.path / "files").mkdir()
    (a.path / "files/l").symlink_to("t")
    a.kill()
    a.mount(datastore.url)
    assert stat.S_IMODE(os.stat(a.path / RAW).st_mode) == 0o711
    assert os.readlink(a.path / "files/l") == "t"
    a.flush()
    wait_for(lambda: attributes(b.path) == attributes(a.path), "the other machine shows the same")
    assert stat.S_IMODE(os.stat(b.path / RAW).st_mode) == 0o711


def test_a_client_that_knows_no_attributes_sees_plain_files_and_keeps_what_it_does_not_touch(machines, datastore):
    a, b = machines
    (a.path / "files").mkdir()
    (a.path / "files/l").symlink_to("target")
    (a.path / RAW).chmod(0o755)
    a.flush()
    assert datastore.get("files/l") == b"target"
    entries = indexed(datastore)
    assert entries["files/l"]["size"] == 6 and entries["files/l"]["posix"]["link"] == "target"
    assert entries[RAW]["posix"]["mode"] == 0o755
    wait_for(lambda: os.path.islink(b.path / "files/l"), "the link arrives")
    # Another client replaces the file: its entry has no such field.
    files = [(path, body) for path, body in check_bucket(datastore).items() if path not in (RAW, "files/l")]
    load_monolith(datastore, [*files, (RAW, b"newer"), ("files/l", b"no link any more")])
    for key in datastore.keys():
        if key.startswith("_index/"):
            datastore.delete(key)
    wait_for(lambda: (b.path / RAW).read_bytes() == b"newer", "the new content arrives")
    assert stat.S_IMODE(os.stat(b.path / RAW).st_mode) == 0o755, "this machine remembers"
    assert (b.path / "files/l").read_bytes() == b"no link any more" and not os.path.islink(b.path / "files/l")


def test_conflicting_attributes_and_content_keep_the_content(machines, datastore):
    a, b = machines
    assert (b.path / RAW).read_bytes() == b"content"
    os.kill(b.pid(), 19)
    try:
        (a.path / RAW).write_bytes(b"from a")
        a.flush()
    finally:
        os.kill(b.pid(), 18)
    (b.path / RAW).chmod(0o640)
    b.flush()
    for machine in machines:
        wait_for(lambda machine=machine: (machine.path / RAW).read_bytes() == b"from a", "a's content is everywhere")
        assert machine.status()["conflicts"] == 0


def test_pipes_and_sockets_work_and_stay_on_their_machine(machines, datastore):
    a, b = machines
    (a.path / "files").mkdir()
    pipe = a.path / "files/pipe"
    os.mkfifo(pipe, 0o640)
    heard = []
    reader = threading.Thread(target=lambda: heard.append(pipe.read_bytes()))
    reader.start()
    pipe.write_bytes(b"through the pipe")
    reader.join(10)
    assert heard == [b"through the pipe"]
    os.rename(pipe, a.path / "files/pipe2")
    assert stat.S_ISFIFO(os.stat(a.path / "files/pipe2").st_mode)
    (a.path / "files/seen").write_text("x")
    a.flush()
    wait_for(lambda: (b.path / "files/seen").exists(), "the file beside it arrives")
    assert not (b.path / "files/pipe2").exists()
    assert not [key for key in datastore.keys() if "pipe" in key]
    a.umount()
    a.mount(datastore.url)
    assert stat.S_IMODE(os.stat(a.path / "files/pipe2").st_mode) == 0o640
    (a.path / "files/pipe2").unlink()


def test_directories_count_their_subdirectories_and_list_themselves(machines):
    a, _ = machines
    (a.path / "files/one/two").mkdir(parents=True)
    (a.path / "files/three").mkdir()
    assert [os.stat(a.path / path).st_nlink for path in ("files", "files/one", "files/three")] == [4, 3, 2]
    os.rename(a.path / "files/one/two", a.path / "files/three/two")
    (a.path / "files/three").rename(a.path / "files/one/three")
    assert [os.stat(a.path / path).st_nlink for path in ("files", "files/one", "files/one/three")] == [3, 3, 3]
    (a.path / "files/one/three/two").rmdir()
    assert os.stat(a.path / "files/one/three").st_nlink == 2
    with os.popen(f"ls -ai {a.path}/files") as shown:
        rows = dict(reversed(line.split()) for line in shown)
    assert rows["."] == str(os.stat(a.path / "files").st_ino) and rows[".."] == str(os.stat(a.path).st_ino)


def test_each_name_of_a_linked_file_is_published_and_kept_apart_elsewhere(machines, datastore):
    a, b = machines
    (a.path / "files").mkdir()
    (a.path / "files/one").write_text("first")
    os.link(a.path / "files/one", a.path / "files/two")
    os.link(a.path / RAW, a.path / "files/raw")  # of a file that was not here
    a.flush()
    assert [datastore.get(f"files/{name}") for name in ("one", "two", "raw")] == [b"first", b"first", b"content"]
    (a.path / "files/two").write_text("second")
    a.flush()
    assert [datastore.get(f"files/{name}") for name in ("one", "two")] == [b"second", b"second"]
    check_bucket(datastore)
    wait_for(lambda: (b.path / "files/two").exists() and (b.path / "files/two").read_text() == "second", "it arrives")
    (b.path / "files/two").write_text("elsewhere")
    b.flush()
    wait_for(lambda: (a.path / "files/two").read_text() == "elsewhere", "the other machine's change arrives")
    assert (a.path / "files/one").read_text() == "second"
    assert [os.stat(a.path / f"files/{name}").st_nlink for name in ("one", "two", "raw")] == [1, 1, 2]


def test_linked_names_survive_kill_9(machines, datastore):
    a, _ = machines
    (a.path / "files").mkdir()
    (a.path / "files/one").write_text("first")
    os.link(a.path / "files/one", a.path / "files/two")
    (a.path / "files/one").write_text("second")
    a.kill()
    a.mount(datastore.url)
    assert [(a.path / f"files/{name}").read_text() for name in ("one", "two")] == ["second"] * 2
    a.flush()
    assert [datastore.get(f"files/{name}") for name in ("one", "two")] == [b"second"] * 2
