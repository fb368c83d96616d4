"""Somebody who is not root mounts, by the setuid helper ``fusermount3``: the common case on a workstation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOBODY = 65534


def closed_above(path: Path) -> Path | None:
    """The first directory on the way to a path that others may not enter, such as ``/root``."""
    return next((one for one in [*reversed(path.parents), path] if not one.stat().st_mode & 0o001), None)


def exposing(paths: set[Path], scratch: str) -> Iterator[str]:
    """Commands that show directories to everybody, in a mount namespace of their own."""
    hidden = sorted((closed, path) for path in paths if (closed := closed_above(path)) is not None)
    for number, (_, path) in enumerate(hidden):
        yield f"mkdir {scratch}/{number}; mount --bind {path} {scratch}/{number}"
    for closed in sorted({closed for closed, _ in hidden}):
        yield f"mount -t tmpfs -o mode=755 tmpfs {closed}"
    for number, (_, path) in enumerate(hidden):
        yield f"mkdir -p {path}; mount --bind {scratch}/{number} {path}"
    # On a machine with udev the device is everybody's.
    yield f"mknod -m 666 {scratch}/fuse c 10 229; mount --bind {scratch}/fuse /dev/fuse"


@pytest.fixture
def shell():
    """Runs a script as nobody, whose home has a datastore in it; ``swampfs`` and ``$HOME/mnt`` are there."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        # Only root can become nobody; whoever runs this as somebody else mounts unprivileged in every other test.
        pytest.skip("needs root, to become somebody else")
    scratch = tempfile.mkdtemp(prefix="swampfs-nobody-", dir="/tmp")
    os.chmod(scratch, 0o755)
    home = Path(scratch) / "home"
    for directory in (home, home / "mnt", home / "ds", home / "ds/files"):
        directory.mkdir()
        os.chown(directory, NOBODY, NOBODY)
    (home / "ds/files/one").write_text("one\n")
    (home / "ds/files/one").chmod(0o644)
    python = f"{sys.executable} -m swampfs"
    (home / "swampfs").write_text(f'#!/bin/sh\nexec env PYTHONPATH={ROOT} {python} "$@"\n')
    (home / "swampfs").chmod(0o755)
    needed = {Path(place).resolve() for place in (sys.prefix, sys.base_prefix, ROOT)}

    def run(script: str, after: str = "true") -> str:
        (home / "script").write_text(f"set -eu\nexport HOME={home}; PATH={home}:$PATH; cd {home}\n{script}\n")
        become = f"setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups bash {home}/script"
        whole = "\n".join(["set -eu", *exposing(needed, scratch), f"{become}; {after}"])
        env = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "SWAMP"))}
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", whole], env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    yield run
    shutil.rmtree(scratch)


def test_who_is_not_root_mounts_works_and_unmounts(shell):
    told = shell("""
        swampfs mount file://$HOME/ds $HOME/mnt
        findmnt -n -o FSTYPE,OPTIONS $HOME/mnt
        cat mnt/files/one
        echo two > mnt/files/two
        stat -c %U mnt/files/two
        swampfs flush
        cat ds/files/two
        swampfs status | head -1
        swampfs umount $HOME/mnt
        findmnt $HOME/mnt || echo gone
        stat -c %a .swamp/swampfs/*/state
    """)
    kind, *said = told.splitlines()
    assert kind.startswith("fuse.swampfs ")
    assert f"user_id={NOBODY}" in kind
    assert said[:3] == ["one", "nobody", "two"]
    assert said[3].endswith("healthy")
    assert said[4:] == ["gone", "700"]


def test_plain_umount_helpers_and_the_mount_helper_work_for_them_too(shell):
    told = shell("""
        swampfs mount file://$HOME/ds $HOME/mnt
        echo two > mnt/files/two
        fusermount3 -u $HOME/mnt
        for i in $(seq 100); do swampfs mount file://$HOME/ds $HOME/mnt 2>/dev/null && break; sleep 0.1; done
        cat mnt/files/two
        swampfs umount $HOME/mnt
    """)
    assert told == "two\n"


def test_what_they_may_not_is_told(shell):
    told = shell("""
        swampfs mount --allow-other file://$HOME/ds $HOME/mnt 2>&1 || echo $?
        swampfs mount file://$HOME/ds /usr 2>&1 || echo $?
    """)
    other, first, not_empty, second = told.splitlines()
    assert "user_allow_other" in other
    assert "is not empty" in not_empty
    assert (first, second) == ("32", "32")
