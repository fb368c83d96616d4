"""System calls through the kernel behave as on a local file system."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import sqlite3
import subprocess
import tempfile

import pytest

from tests.harness import tree


@pytest.fixture
def mount(fleet, store_dir):
    machine = fleet.machine(options=("--refresh", "200ms", "--push-delay", "100ms"))
    machine.mount(f"file://{store_dir}")
    (machine.path / "audit").mkdir()
    yield machine.path / "audit"
    expected = tree(machine.path / "audit")
    machine.umount()
    # What the mount showed at the end is what the datastore holds, byte for byte.
    published = {rel: digest for rel, digest in expected.items() if not rel.endswith((".tmp", ".swp"))}
    assert tree(store_dir / "audit") == published if published else not (store_dir / "audit").exists()


def raises(number, fn, *args):
    with pytest.raises(OSError) as caught:
        fn(*args)
    assert caught.value.errno == number


def test_exclusive_create_and_mkdir_refuse_what_exists(mount):
    fd = os.open(mount / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.close(fd)
    raises(errno.EEXIST, os.open, mount / "f", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.mkdir(mount / "d")
    raises(errno.EEXIST, os.mkdir, mount / "d")
    raises(errno.EISDIR, os.open, mount / "d", os.O_WRONLY)
    raises(errno.ENOTDIR, os.mkdir, mount / "f" / "x")


def test_append_from_two_handles_interleaves_without_loss(mount):
    one, two = (os.open(mount / "log", os.O_CREAT | os.O_APPEND | os.O_WRONLY) for _ in range(2))
    for number in range(20):
        os.write(one, b"one %d\n" % number)
        os.write(two, b"two %d\n" % number)
    os.close(one)
    os.close(two)
    lines = (mount / "log").read_text().splitlines()
    assert lines == [f"{who} {n}" for n in range(20) for who in ("one", "two")]


def test_truncate_grows_with_zeros_and_shrinks(mount):
    (mount / "f").write_bytes(b"0123456789")
    os.truncate(mount / "f", 4)
    assert (mount / "f").read_bytes() == b"0123"
    os.truncate(mount / "f", 8)
    assert (mount / "f").read_bytes() == b"0123\0\0\0\0"
    with open(mount / "f", "r+b") as file:
        file.truncate(2)
        file.seek(5)
        file.write(b"x")
    assert (mount / "f").read_bytes() == b"01\0\0\0x"
    assert (mount / "f").stat().st_size == 6


def test_a_write_through_one_handle_is_read_through_another_at_once(mount):
    (mount / "f").write_bytes(b"before")
    with open(mount / "f", "rb", buffering=0) as reader, open(mount / "f", "r+b", buffering=0) as writer:
        assert reader.read() == b"before"
        writer.write(b"after!")
        reader.seek(0)
        assert reader.read() == b"after!"


def test_an_unlinked_file_stays_readable_and_writable_while_open(mount):
    with open(mount / "f", "w+b", buffering=0) as file:
        file.write(b"still here")
        os.unlink(mount / "f")
        assert not (mount / "f").exists()
        file.seek(0)
        assert file.read() == b"still here"
        file.write(b" and growing")
        assert os.fstat(file.fileno()).st_size == 22
        assert os.fstat(file.fileno()).st_nlink == 0
        os.ftruncate(file.fileno(), 5)
        assert os.fstat(file.fileno()).st_size == 5
    assert os.listdir(mount) == []


def test_rename_over_an_open_file_leaves_the_reader_the_old_content(mount):
    (mount / "target").write_text("old")
    with open(mount / "target") as reader:
        (mount / "new").write_text("new")
        os.rename(mount / "new", mount / "target")
        assert reader.read() == "old"
    assert (mount / "target").read_text() == "new"
    assert os.listdir(mount) == ["target"]


def test_directories_rename_with_everything_in_them_and_open_files_follow(mount):
    shutil.rmtree(mount)
    os.makedirs(mount / "a/b/c")
    (mount / "a/b/c/f").write_text("deep")
    with open(mount / "a/b/c/f", "a") as file:
        os.rename(mount / "a", mount / "z")
        file.write(" and more")
    assert (mount / "z/b/c/f").read_text() == "deep and more"
    raises(errno.EINVAL, os.rename, mount / "z", mount / "z/b/z")
    os.mkdir(mount / "full")
    (mount / "full/x").write_text("x")
    raises(errno.ENOTEMPTY, os.rename, mount / "z", mount / "full")
    raises(errno.ENOTDIR, os.rename, mount / "z", mount / "full/x")
    raises(errno.EISDIR, os.rename, mount / "full/x", mount / "z")
    os.mkdir(mount / "empty")
    os.rename(mount / "z", mount / "empty")
    assert (mount / "empty/b/c/f").read_text() == "deep and more"


def test_rmdir_refuses_a_directory_with_entries(mount):
    os.mkdir(mount / "d")
    (mount / "d/f").write_text("x")
    raises(errno.ENOTEMPTY, os.rmdir, mount / "d")
    raises(errno.ENOTDIR, os.rmdir, mount / "d/f")
    raises(errno.EISDIR, os.unlink, mount / "d")
    os.unlink(mount / "d/f")
    os.rmdir(mount / "d")
    raises(errno.ENOENT, os.rmdir, mount / "d")


def test_times_modes_and_sizes_are_kept_and_survive_a_remount(fleet, store_dir):
    machine = fleet.machine()
    machine.mount(f"file://{store_dir}")
    path = machine.path / "audit.jsonl"
    path.write_text("x")
    os.utime(path, ns=(1_700_000_000_123_456_789, 1_700_000_000_987_654_321))
    os.chmod(path, 0o640)
    ino = path.stat().st_ino
    assert path.stat().st_mtime_ns == 1_700_000_000_987_654_321
    machine.umount()
    machine.mount(f"file://{store_dir}")
    found = path.stat()
    assert (found.st_ino, found.st_mode & 0o777, found.st_mtime_ns) == (ino, 0o640, 1_700_000_000_987_654_321)
    machine.umount()


def test_hard_links_share_one_content_until_the_last_is_gone(mount):
    (mount / "f").write_text("x")
    os.link(mount / "f", mount / "hard")
    (mount / "deep").mkdir()
    os.link(mount / "hard", mount / "deep/third")
    names = [mount / "f", mount / "hard", mount / "deep/third"]
    assert len({path.stat().st_ino for path in names}) == 1 and {path.stat().st_nlink for path in names} == {3}
    with open(mount / "hard", "a") as file:
        file.write("y")
    names[2].chmod(0o600)
    assert [path.read_text() for path in names] == ["xy"] * 3 and names[0].stat().st_mode & 0o777 == 0o600
    ino = names[0].stat().st_ino
    with open(mount / "f", "r+") as held:
        (mount / "f").unlink()
        held.seek(0, os.SEEK_END)
        held.write("z")
        held.flush()
        assert [path.read_text() for path in names[1:]] == ["xyz"] * 2
    assert {(path.stat().st_ino, path.stat().st_nlink) for path in names[1:]} == {(ino, 2)}
    (mount / "other").write_text("over")
    os.rename(mount / "other", mount / "hard")
    assert (names[2].read_text(), names[2].stat().st_nlink, (mount / "hard").read_text()) == ("xyz", 1, "over")
    raises(errno.EEXIST, os.link, names[2], mount / "hard")
    raises(errno.EPERM, os.link, mount / "deep", mount / "no")


def test_a_link_over_its_own_inode_changes_nothing(mount):
    (mount / "a").write_text("x")
    os.link(mount / "a", mount / "b")
    os.rename(mount / "a", mount / "b")
    assert sorted(os.listdir(mount)) == ["a", "b"]


def test_a_shared_mapping_writes_through(mount):
    (mount / "f").write_bytes(b"a" * 8192)
    with open(mount / "f", "r+b") as file, mmap.mmap(file.fileno(), 8192) as mapping:
        mapping[4096:4100] = b"MMAP"
        mapping.flush()
    assert (mount / "f").read_bytes()[4090:4102] == b"aaaaaaMMAPaa"


def test_a_thousand_entries_are_listed_once_each_while_names_come_and_go(mount):
    for number in range(1000):
        (mount / f"f{number}").touch()
    seen = []
    with os.scandir(mount) as entries:
        for position, entry in enumerate(entries):
            seen.append(entry.name)
            if position == 100:
                (mount / "f1").unlink()
                (mount / "late").touch()
    assert len(seen) == len(set(seen))
    assert {f"f{n}" for n in range(2, 1000)} <= set(seen)
    shutil.rmtree(mount)
    os.mkdir(mount)


def test_editors_and_tools_that_replace_files_work(mount):
    (mount / "f").write_text("one\n")
    for script in ("sed -i s/one/two/ f", "cp f g && mv -f g f", "echo three >> f", "tee -a f <<< four >/dev/null",
                   "install -m 600 f h", "rm h", "dd if=f of=i bs=3 status=none", "rm i"):  # fmt: skip
        subprocess.run(["bash", "-euc", script], cwd=mount, check=True)
    assert (mount / "f").read_text() == "two\nthree\nfour\n"
    with tempfile.NamedTemporaryFile(dir=mount) as file:
        file.write(b"x")
    assert os.listdir(mount) == ["f"]


def test_scratch_names_stay_on_this_machine_until_they_are_renamed(mount, store_dir):
    temporary = mount / ".0f0e9c1a-6b1f-4d1b-8a33-2c7b0d5e9f10.tmp"
    temporary.write_text("whole")
    (mount / ".notes.swp").write_text("vim")
    subprocess.run(["sync", "-f", str(mount)], check=False)
    assert not (store_dir / "audit").exists()
    os.rename(temporary, mount / "final")
    assert (mount / "final").read_text() == "whole"


def test_git_and_sqlite_work_on_the_mount(mount):
    env = {**os.environ, "GIT_CONFIG_GLOBAL": "/dev/null", "GIT_AUTHOR_NAME": "t", "GIT_AUTHOR_EMAIL": "t@t",
           "GIT_COMMITTER_NAME": "t", "GIT_COMMITTER_EMAIL": "t@t"}  # fmt: skip
    script = "git init -q repo && cd repo && echo x > f && git add f && git commit -qm m && git fsck && git gc -q"
    subprocess.run(["bash", "-euc", script], cwd=mount, check=True, env=env, capture_output=True)
    shutil.rmtree(mount / "repo")
    for journal in ("wal", "delete"):
        db = sqlite3.connect(mount / f"{journal}.sqlite")
        db.execute(f"PRAGMA journal_mode={journal}")
        db.execute("CREATE TABLE t (x)")
        with db:
            db.executemany("INSERT INTO t VALUES (?)", [(n,) for n in range(1000)])
        assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert db.execute("SELECT sum(x) FROM t").fetchone() == (499500,)
        db.close()


def test_a_read_only_mount_refuses_every_change(fleet, store_dir):
    (store_dir / "audit.jsonl").write_text("x")
    machine = fleet.machine()
    machine.mount(f"file://{store_dir}", "--read-only")
    path = machine.path / "audit.jsonl"
    assert path.read_text() == "x"
    for change in (
        lambda: path.write_text("y"),
        lambda: path.unlink(),
        lambda: path.chmod(0o600),
        lambda: path.rename(machine.path / "b"),
        lambda: (machine.path / "d").mkdir(),
    ):
        raises(errno.EROFS, change)
    machine.umount()
    assert (store_dir / "audit.jsonl").read_text() == "x"


def test_umount_refuses_while_a_file_is_open_and_says_so(fleet, store_dir):
    machine = fleet.machine()
    machine.mount(f"file://{store_dir}")
    with open(machine.path / "held", "w") as file:
        file.write("x")
        done = machine.run("umount", str(machine.mountpoint), "--timeout", "1s", check=False)
        assert done.returncode != 0
        assert "open for writing" in done.stderr
        assert machine.is_mounted()
    machine.umount()
    assert (store_dir / "held").read_text() == "x"


def test_df_reports_the_datastore_and_the_room_on_this_machine(fleet, store_dir, home):
    (store_dir / "audit").mkdir()
    (store_dir / "audit/big").write_bytes(b"x" * 1_000_000)
    machine = fleet.machine()
    machine.mount(f"file://{store_dir}")
    found, disk = os.statvfs(machine.path), os.statvfs(home)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    assert 1_000_000 <= used < 1_010_000
    assert found.f_namemax == 255
    assert abs(found.f_bavail * found.f_frsize - disk.f_bavail * disk.f_frsize) < 1 << 30
    machine.umount()


def test_a_datastore_with_a_comma_and_spaces_in_its_name_mounts_and_is_found(fleet, home):
    odd = home / "odd, name"
    odd.mkdir()
    (odd / "files").mkdir()
    (odd / "files/x").write_text("x")
    machine = fleet.machine()
    machine.mount(f"file://{odd}")
    assert (machine.path / "files/x").read_text() == "x"
    done = subprocess.run(["findmnt", "-n", "-o", "FSTYPE", str(machine.path)], capture_output=True, text=True)
    assert done.stdout.strip() == "fuse.swampfs"
    machine.umount()
