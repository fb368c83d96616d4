"""Renames between the datastore and this machine's local tier, and files whose name is gone."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys

import pytest

from tests.harness import tree, wait_for


@pytest.fixture
def machine(fleet, store_dir):
    running = fleet.machine(options=("--refresh", "200ms", "--push-delay", "1h"))
    running.mount(f"file://{store_dir}")
    (running.path / "secrets").mkdir()
    (running.path / "outputs").mkdir()
    yield running
    running.umount()


def test_a_rename_to_either_tier_is_seen_at_once_by_name(machine):
    for number in range(40):
        here, there = machine.path / f"secrets/{number}", machine.path / f"outputs/{number}.yaml"
        here.write_text(f"content {number}")
        os.rename(here, there)
        assert there.read_text() == f"content {number}"
        assert there.stat().st_nlink == 1
        there.chmod(0o750)
        os.rename(there, here)
        assert here.read_text() == f"content {number}"
        assert here.stat().st_nlink == 1
        assert here.stat().st_mode & 0o777 == 0o750


def test_directories_and_links_do_not_cross_and_lose_nothing(machine):
    (machine.path / "secrets/sub").mkdir()
    (machine.path / "secrets/sub/f").write_text("kept")
    os.symlink("sub", machine.path / "secrets/link")
    for name in ("sub", "link"):
        with pytest.raises(OSError) as caught:
            os.rename(machine.path / "secrets" / name, machine.path / "outputs" / name)
        assert caught.value.errno == errno.EXDEV
    assert (machine.path / "secrets/link/f").read_text() == "kept"
    shutil.move(machine.path / "secrets/sub", machine.path / "outputs/sub")  # as mv(1) does: copy and remove
    assert (machine.path / "outputs/sub/f").read_text() == "kept"


def test_a_removed_local_file_is_not_confused_with_its_successor(machine):
    path = machine.path / "secrets/k"
    path.write_text("first")
    fd = os.open(path, os.O_RDWR)
    os.unlink(path)
    path.write_text("precious")
    os.ftruncate(fd, 0)
    os.fchmod(fd, 0o600)
    assert os.fstat(fd).st_size == 0
    os.close(fd)
    assert path.read_text() == "precious"


def test_local_files_get_the_mode_their_maker_asked_for(machine):
    previous = os.umask(0)
    try:
        fd = os.open(machine.path / "secrets/m", os.O_CREAT | os.O_WRONLY, 0o666)
        os.close(fd)
        os.mkdir(machine.path / "secrets/d", 0o777)
    finally:
        os.umask(previous)
    assert (machine.path / "secrets/m").stat().st_mode & 0o777 == 0o666
    assert (machine.path / "secrets/d").stat().st_mode & 0o777 == 0o777


def test_a_renamed_directory_takes_its_local_files_along_or_does_not_move(machine):
    run = machine.path / "workflow-runs/x"
    run.mkdir(parents=True)
    (run / "a.log").write_text("log")
    (run / "a.yaml").write_text("yaml")
    os.rename(run, run.with_name("y"))
    assert (run.with_name("y") / "a.log").read_text() == "log"
    with pytest.raises(OSError) as caught:
        os.rename(run.with_name("y"), machine.path / "moved")
    assert caught.value.errno == errno.EXDEV
    with pytest.raises(OSError) as caught:
        os.rmdir(run.with_name("y"))
    assert caught.value.errno == errno.ENOTEMPTY


def test_a_file_changed_or_removed_by_others_while_open_keeps_its_old_content(machine, store_dir):
    (store_dir / "audit").mkdir()
    for name in ("changed", "removed"):
        (store_dir / "audit" / name).write_text("A" * 5000)
    wait_for((machine.path / "audit/removed").exists, "the files arrive")
    with open(machine.path / "audit/changed") as changed, open(machine.path / "audit/removed") as removed:
        assert changed.read(10) == removed.read(10) == "A" * 10
        (store_dir / "audit/changed").unlink()
        (store_dir / "audit/changed").write_text("B" * 5000)
        (store_dir / "audit/removed").unlink()
        wait_for(lambda: not (machine.path / "audit/removed").exists(), "the removal arrives")
        for file in (changed, removed):
            assert file.read() == "A" * 4990
            assert os.fstat(file.fileno()).st_nlink == 0
        assert (machine.path / "audit/changed").read_text() == "B" * 5000  # no page of the old version
    assert (machine.path / "audit/changed").read_text() == "B" * 5000


def test_a_new_remote_directory_changes_its_parents_time(machine, store_dir):
    (store_dir / "audit/one").mkdir(parents=True)
    (store_dir / "audit/one/f").write_text("1")
    wait_for((machine.path / "audit/one/f").exists, "the first arrives")
    before = (machine.path / "audit").stat().st_mtime_ns
    (store_dir / "audit/two").mkdir()
    (store_dir / "audit/two/f").write_text("2")
    wait_for(lambda: (machine.path / "audit").stat().st_mtime_ns > before, "the parent's time moves")
    assert sorted(os.listdir(machine.path / "audit")) == ["one", "two"]


def test_places_inside_one_another_are_refused(fleet, home, store_dir):
    machine = fleet.machine("inner")
    machine.state_dir = machine.mountpoint / "state"
    done = machine.mount(f"file://{store_dir}", check=False)
    assert done.returncode == 1
    assert "below the mount point" in done.stderr
    inside = fleet.machine("b")
    inside.mountpoint = store_dir / "mnt"
    inside.mountpoint.mkdir()
    done = inside.mount(f"file://{store_dir}", check=False)
    assert done.returncode == 1
    assert "inside the datastore" in done.stderr


def test_a_mount_is_found_through_a_link_and_modules_of_the_current_directory_are_not_run(fleet, home, store_dir):
    (home / "click.py").write_text("raise SystemExit('hijacked')")
    link = home / "link"
    machine = fleet.machine("c")
    link.symlink_to(machine.mountpoint)
    command = [os.path.join(os.path.dirname(sys.executable), "swampfs")]
    environment = machine.environment()
    arguments = ["mount", f"file://{store_dir}", str(link), "--state-dir", str(machine.state_dir)]
    subprocess.run([*command, *arguments], cwd=home, env=environment, check=True)
    assert machine.is_mounted()
    subprocess.run([*command, "umount", str(link)], cwd=home, env=environment, check=True)
    assert not machine.is_mounted()
    assert tree(store_dir) == {}
