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
            try:
                seen = os.lstat(path)
            except FileNotFoundError:
                continue  # removed since it was listed
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


def test_a_directory_that_was_emptied_is_there_on_the_next_machine_and_one_that_was_removed_is_not(datastore, fleet):
    a = fleet.machine("a", datastore.env)
    a.mount(datastore.url)
    places = ["files", "files/t", "files/t/in", "data/test/m", "outputs", "outputs/x/y"]
    for place in places:
        (a.path / place).mkdir(parents=True, exist_ok=True)
        (a.path / place / "file").touch()
    a.flush()
    for place in places:
        (a.path / place / "file").unlink()
    a.flush()
    fresh = fleet.machine("b", datastore.env)
    fresh.mount(datastore.url)
    for place in places:
        assert (fresh.path / place).is_dir(), place
        with pytest.raises(FileExistsError):
            (fresh.path / place).mkdir()
    (fresh.path / "files/t/in").rmdir()
    (fresh.path / "files/t").rmdir()
    (fresh.path / "outputs").rename(fresh.path / "audit")
    fresh.flush()
    last = fleet.machine("c", datastore.env)
    last.mount(datastore.url)
    assert [(last.path / place).is_dir() for place in places] == [True, False, False, True, False, False]
    assert (last.path / "audit/x/y").is_dir()


def directories(root):
    """Mode and owner of each."""
    found = {}
    for path, _, _ in os.walk(root / "files"):
        seen = os.lstat(path)
        found[os.path.relpath(path, root)] = (seen.st_mode, seen.st_uid, seen.st_gid)
    return found


def test_modes_and_owners_of_directories_travel_with_the_lock(machines, datastore, fleet):
    a, b = machines
    for name, mode in (("private", 0o700), ("shared", 0o2775)):
        (a.path / "files" / name / "in/side").mkdir(parents=True)
        (a.path / "files" / name / "in/side/file").write_text("content")
        (a.path / "files" / name / "in").chmod(mode)
    os.chown(a.path / "files/shared", 1234, 567)
    (a.path / "files/private/empty").mkdir(mode=0o711)
    a.flush()

    assert directories(a.path)["files/private/in"][0] == 0o40700
    fresh = fleet.machine("c", datastore.env)
    fresh.mount(datastore.url)
    assert directories(fresh.path) == directories(a.path), "a new machine sees them at once"
    wait_for(lambda: (b.path / "files/shared/in/side/file").exists(), "the files arrive")
    (b.path / "files/new").touch()  # those of the lock that is taken, and of no other
    (b.path / "files/private/new").touch()
    (b.path / "files/shared/new").touch()
    wait_for(lambda: directories(b.path) == directories(a.path), "another sees them when it takes the lock")
    (b.path / "files/private/in").chmod(0o755)
    b.flush()
    (a.path / "files/private/more").touch()
    wait_for(lambda: directories(a.path)["files/private/in"][0] == 0o40755, "and changes them")
    (a.path / "files/shared").rename(a.path / "files/elsewhere")
    a.flush()
    later = fleet.machine("d", datastore.env)
    later.mount(datastore.url)
    assert directories(later.path) == directories(a.path), "they go with a rename"


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
    wait_for(lambda: stat.S_IMODE(os.stat(b.path / RAW).st_mode) == 0o755, "the mode arrives")
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


def test_attributes_reach_every_name_and_also_the_usual_ones_travel(machines):
    a, b = machines
    (a.path / "files").mkdir()
    for name in ("one", "mode"):
        (a.path / f"files/{name}").write_text(name)
    os.link(a.path / "files/one", a.path / "files/two")
    (a.path / "files/mode").chmod(0o755)
    (a.path / "files/link").symlink_to("one")
    a.flush()
    wait_for(lambda: attributes(b.path) == attributes(a.path), "the first state arrives")
    os.utime(a.path / "files/link", (1, 2), follow_symlinks=False)
    (a.path / "files/two").chmod(0o600)
    os.utime(a.path / "files/two", ns=(0, MTIME_NS))
    (a.path / "files/mode").chmod(0o644)
    os.utime(a.path / "files/mode", (0, 0))
    a.flush()
    wait_for(lambda: attributes(b.path) == attributes(a.path), "all of it arrives")
    assert attributes(b.path)["files/mode"][0] == 0o100644
    assert {attributes(b.path)[f"files/{name}"][::3] for name in ("one", "two")} == {(0o100600, MTIME_NS)}
    os.utime(b.path / "files/mode", (1_600_000_000, 1_600_000_000))
    b.flush()
    wait_for(lambda: attributes(b.path) == attributes(a.path), "whole seconds travel back")
    os.rename(a.path / "files/mode", a.path / "files/renamed")
    a.flush()
    wait_for(lambda: attributes(b.path) == attributes(a.path), "and stay with a renamed file")
    assert attributes(b.path)["files/renamed"][3] == 1_600_000_000 * 10**9


def test_a_pipe_in_place_of_a_published_file_stays_and_the_file_goes(machines, datastore):
    a, b = machines
    (a.path / "files").mkdir()
    for name in ("renamed over", "made anew"):
        (a.path / f"files/{name}").write_text("x")
    a.flush()
    os.mkfifo(a.path / "files/pipe")
    os.rename(a.path / "files/pipe", a.path / "files/renamed over")
    (a.path / "files/made anew").unlink()
    os.mkfifo(a.path / "files/made anew")
    (a.path / "files/never pushed").write_text("y")
    os.mkfifo(a.path / "files/pipe")
    os.rename(a.path / "files/pipe", a.path / "files/never pushed")
    a.kill()
    a.mount(datastore.url)
    a.flush()
    assert not [key for key in datastore.keys() if key.startswith("files/")]
    wait_for(lambda: not any((b.path / "files").glob("*")), "the files are gone elsewhere")
    for name in ("renamed over", "made anew", "never pushed"):
        assert stat.S_ISFIFO(os.stat(a.path / "files" / name).st_mode), name


def test_what_a_conflict_kept_is_not_written_to_through_another_name(machines, datastore, fleet, network):
    _, b = machines
    way = network()
    a = fleet.machine("linked", {**datastore.env, "AWS_ENDPOINT_URL_S3": way.url}, options=("--timeout", "2s"))
    a.mount(datastore.url)
    (a.path / "files").mkdir()
    (a.path / "files/one").write_text("first")
    os.link(a.path / "files/one", a.path / "files/two")
    a.flush()
    wait_for(lambda: (b.path / "files/two").exists(), "it arrives")
    way.cut()
    (a.path / "files/one").write_text("ours")
    (b.path / "files/two").write_text("theirs")
    b.flush()
    way.mend()
    a.flush()
    (kept,) = a.state_dir.glob("state/conflicts/*/content")
    (a.path / "files/one").write_text("later")
    assert kept.read_text() == "ours"
    assert (a.path / "files/two").read_text() == "theirs"


def test_links_are_each_listed_once_while_their_first_names_are_removed(machines):
    a, _ = machines
    (a.path / "files").mkdir()
    for number in range(300):
        (a.path / f"files/f{number:03}").touch()
        os.link(a.path / f"files/f{number:03}", a.path / f"files/l{number:03}")
    seen = []
    for entry in os.scandir(a.path / "files"):
        seen.append(entry.name)
        if entry.name.startswith("f"):
            os.unlink(entry.path)
    assert sorted(name for name in seen if name.startswith("l")) == [f"l{number:03}" for number in range(300)]


def test_files_below_a_setgid_directory_are_of_its_group(machines):
    a, _ = machines
    team = a.path / "files"
    team.mkdir()
    os.chown(team, -1, 77)
    team.chmod(0o2775)
    (team / "file").touch()
    (team / "directory").mkdir()
    (team / "directory/file").touch()
    assert [os.stat(team / name).st_gid for name in ("file", "directory", "directory/file")] == [77] * 3
    assert os.stat(team / "directory").st_mode & stat.S_ISGID


def test_times_beyond_the_range_become_its_end_and_holes_are_no_blocks(machines, datastore):
    a, _ = machines
    (a.path / "files").mkdir()
    far = a.path / "files/far"
    far.write_text("hello")
    os.utime(far, (2**35, 2**35))
    assert os.stat(far).st_mtime_ns == 2**63 - 1
    with open(a.path / "files/sparse", "wb") as file:
        file.seek(1 << 20)
        file.write(b"x")
    assert os.stat(a.path / "files/sparse").st_blocks < 100
    a.umount()
    a.mount(datastore.url)
    assert (far.read_text(), os.stat(far).st_size) == ("hello", 5)


def test_a_file_published_at_its_close_can_be_opened_and_linked_at_once(datastore, fleet):
    machine = fleet.machine("strict", datastore.env, options=("--consistency", "close-to-open"))
    machine.mount(datastore.url)
    (machine.path / "files").mkdir()
    for number in range(3):
        (machine.path / "files/one").write_text("x" * number)
        assert os.stat(machine.path / "files/one").st_size == number
        assert (machine.path / "files/one").read_text() == "x" * number
    os.link(machine.path / "files/one", machine.path / "files/two")
    (machine.path / "files/two").write_text("both")
    assert [datastore.get(f"files/{name}") for name in ("one", "two")] == [b"both"] * 2


def test_a_umask_hides_permissions_here_and_changes_none_elsewhere(datastore, fleet):
    a, b = fleet.machine("a", datastore.env, options=("--umask", "027")), fleet.machine("b", datastore.env)
    for machine in (a, b):
        machine.mount(datastore.url)
    modes = lambda machine: [  # noqa: E731
        stat.S_IMODE((machine.path / name).stat().st_mode) for name in ("files", "files/tool", "_local", "_local/own")
    ]
    for machine in (a, b):
        (machine.path / "_local").mkdir(mode=0o755, exist_ok=True)
        (machine.path / "_local/own").touch(0o666)
    (b.path / "files").mkdir()
    (b.path / "files/tool").write_text("#!/bin/sh\n")
    (b.path / "files/tool").chmod(0o644)
    b.flush()
    wait_for((a.path / "files/tool").exists, "the other machine sees it")
    assert modes(b) == [0o755, 0o644, 0o755, 0o644]
    assert modes(a) == [0o750, 0o640, 0o750, 0o640]
    (a.path / "files/tool").chmod(0o740)  # as `chmod u+x` asks for, which knows nothing of the rest
    (a.path / "_local/own").chmod(0o740)
    a.flush()
    assert modes(a) == [0o750, 0o740, 0o750, 0o740]
    wait_for(lambda: modes(b)[1] == 0o744, "only what may be changed was")
    (a.path / "files/new").write_text("new")
    assert stat.S_IMODE((a.path / "files/new").stat().st_mode) == 0o640
    assert stat.S_IMODE((a.path / ".swampfs/status.json").stat().st_mode) == 0o440
    a.umount()
    done = a.run("mount", "--umask", "rwx", datastore.url, str(a.path), check=False)
    assert done.returncode == 1 and "mask of permissions" in done.stderr
