"""mount(8), umount(8), findmnt(8) and fstab(5): the real ones, with the helper where mount(8) looks for it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import wait_for

HELPER = Path("/sbin/mount.fuse.swampfs")
OURS = Path(sys.executable).with_name("mount.fuse.swampfs")
OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


@pytest.fixture
def helper(tmp_path):
    """As ``docs/operations.md`` says: a link. One test at a time has it; what was there before is put back."""
    with open("/run/lock/swampfs-tests-helper", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        before = os.readlink(HELPER) if HELPER.is_symlink() else None
        HELPER.unlink(missing_ok=True)
        HELPER.symlink_to(OURS)
        yield
        HELPER.unlink()
        if before is not None:
            HELPER.symlink_to(before)


@pytest.fixture
def place(tmp_path):
    """A directory datastore, a mount point and where its state goes; unmounted at the end."""
    for name in ("datastore/files", "mnt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "datastore/files/one").write_text("one")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path / "mnt"], capture_output=True)
    lock = tmp_path / "state/state/lock"
    if lock.exists() and lock.read_text():
        wait_for(lambda: not Path(f"/proc/{lock.read_text().strip()}").exists(), "the mount's process ends")


def run(*words, check=True, **env):
    environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **env}  # what init starts it with, or less
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, env=environment, timeout=60)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def mount(place, *more, options="", **how):
    words = f"state_dir={place}/state,refresh=300ms,push-delay=200ms{',' if options else ''}{options}"
    return run("mount", "-t", "fuse.swampfs", f"file://{place}/datastore", place / "mnt", "-o", words, *more, **how)


def test_mount_and_umount_work_as_for_any_file_system(helper, place):
    mount(place, "-v", options="rw,nosuid,nodev,_netdev,nofail,noexec,x-systemd.automount,x-systemd.idle-timeout=60")
    assert (place / "mnt/files/one").read_text() == "one"
    found = json.loads(run("findmnt", "-J", "-t", "fuse.swampfs", place / "mnt").stdout)["filesystems"][0]
    assert found["source"] == f"file://{place}/datastore"
    assert {"rw", "nosuid", "nodev", "noexec"} <= set(found["options"].split(","))
    (place / "mnt/files/two").write_text("two")
    run("umount", place / "mnt")
    assert not os.path.ismount(place / "mnt")
    mount(place, options="ro")
    assert (place / "mnt/files/two").read_text() == "two"
    with pytest.raises(OSError, match="Read-only"):
        (place / "mnt/files/three").write_text("three")


def test_a_line_of_fstab_is_mounted_by_its_directory(helper, place):
    line = re.search(r"^\S+ \S+ fuse\.swampfs \S+ 0 0$", OPERATIONS.read_text(), re.MULTILINE)[0]
    source, directory, _, options, *_ = line.split()
    mine = line.replace(source, f"file://{place}/datastore").replace(directory, str(place / "mnt"))
    mine = mine.replace(options, re.sub("state_dir=[^,]*", f"state_dir={place}/state", options))
    (place / "fstab").write_text(mine + "\n")
    run("mount", "-T", place / "fstab", place / "mnt", HOME=str(place))
    assert (place / "mnt/files/one").read_text() == "one"
    run("umount", place / "mnt")


def test_a_mount_that_is_there_is_not_mounted_over(helper, place):
    mount(place)
    again = mount(place, check=False)
    assert again.returncode == 32
    assert "already" in again.stderr or "in use" in again.stderr
    assert (place / "mnt/files/one").read_text() == "one"


@pytest.mark.parametrize(
    ("options", "says"),
    [("no_such=1", "unknown mount option 'no_such'"), ("refresh=soon", "not a duration"), ("remount", "anew"),
     ("xattrs=1", "takes no value"), ("cache-size", "needs a value"), ("log-file=", "without quotes"),
     ('namespace="x"', "without quotes")],
)  # fmt: skip
def test_a_bad_option_is_named_and_nothing_is_mounted(helper, place, options, says):
    done = mount(place, options=options, check=False)
    assert done.returncode == 1
    assert says in done.stderr
    assert not os.path.ismount(place / "mnt")


def test_a_fake_mount_checks_everything_and_mounts_nothing(helper, place):
    mount(place, "-f")
    assert run(HELPER, f"file://{place}/datastore", place / "mnt", "-sfnv", "-o", "rw").stdout == ""
    assert not os.path.ismount(place / "mnt")
    assert run(HELPER, f"file://{place}/datastore", place / "mnt", "-f", "-o", "no_such", check=False).returncode == 1
    assert run(HELPER, "nowhere", check=False).returncode == 1


def test_a_directory_with_somebodys_files_does_not_become_a_state_directory(helper, place):
    (place / "home").mkdir(mode=0o755)
    (place / "home/notes").write_text("mine")
    words = ["mount", "-t", "fuse.swampfs", f"file://{place}/datastore", place / "mnt"]
    done = run(*words, "-o", f"state_dir={place}/home", check=False)
    assert done.returncode in (1, 32)
    assert "not empty" in done.stderr
    assert (place / "home").stat().st_mode & 0o777 == 0o755
    assert not (place / "home/state").exists()


def test_the_units_in_the_documentation_are_right(tmp_path):
    """As systemd itself sees them, but for the program, which is where this machine has it."""
    if shutil.which("systemd-analyze") is None:
        # Nothing else reads units, and a machine without systemd has no use for them.
        pytest.skip("this machine has no systemd")
    units = re.findall(r"```ini\n# /etc/systemd/system/(\S+)\n(.*?)```", OPERATIONS.read_text(), re.DOTALL)
    assert {Path(name).suffix for name, _ in units} == {".service", ".mount", ".automount"}
    for name, text in units:
        (tmp_path / name).write_text(text.replace("/usr/local/bin/swampfs", "/bin/true"))
    done = run("systemd-analyze", "verify", *(tmp_path / name for name, _ in units), check=False)
    ours = [line for line in done.stderr.splitlines() if "swamp" in line]
    assert not ours, ours
