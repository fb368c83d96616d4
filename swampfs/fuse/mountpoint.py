"""Mount points from outside: is one stale, unmount it. Needs no pyfuse3, so every command can use it."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from typing import NamedTuple

from swampfs.errors import MountError

_PROBE_S = 10.0
_READ_AHEAD_KIB = 512


class Mounted(NamedTuple):
    """A line of ``/proc/self/mountinfo``. In its path the kernel has escaped what separates fields and lines."""

    device: str
    path: str
    kind: str


def mounts() -> Iterator[Mounted]:
    """All that this process sees, the latest last. Others may have mounted anything, at names of any bytes."""
    with open("/proc/self/mountinfo", errors="surrogateescape", newline="\n") as lines:
        for line in lines:
            head, _, tail = line.partition(" - ")
            fields = head.split(" ")
            yield Mounted(fields[2], fields[4], tail.split(" ")[0])


def is_stale(mountpoint: str) -> bool:
    """Whether a crashed mount still covers the directory.

    Asks for statfs, which no kernel cache answers: a dead mount's root may still be in the attribute cache. The first
    asking is left to another process, because a mount that is alive but stuck would keep us for ever.

    Raises MountError for such a mount.
    """
    silent = subprocess.DEVNULL
    probe = subprocess.Popen(["stat", "-f", mountpoint], stdout=silent, stderr=silent)  # noqa: S603, S607
    try:
        probe.wait(_PROBE_S)
    except subprocess.TimeoutExpired:
        probe.kill()
        raise MountError(
            f"the mount at {mountpoint} does not answer", remedy="`swampfs umount --lazy` detaches it"
        ) from None
    try:
        os.statvfs(mountpoint)
    except OSError as error:
        return error.errno in (errno.ENOTCONN, errno.ECONNABORTED)
    return False


def read_further_ahead(mountpoint: str) -> None:
    """Have the kernel ask for more of a file that is read in order: half a megabyte instead of an eighth.

    Only root may say so, to a kernel that shows its devices; otherwise it stays as it is.
    """
    with contextlib.suppress(OSError, StopIteration):
        path = mountpoint.replace("\\", "\\134").replace(" ", "\\040").replace("\t", "\\011").replace("\n", "\\012")
        device = next(mount.device for mount in reversed(list(mounts())) if mount.path == path)
        with open(f"/sys/class/bdi/{device}/read_ahead_kb", "w") as file:
            file.write(str(_READ_AHEAD_KIB))


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Ask the kernel to detach a mount, as root or through fusermount3.

    Raises MountError with the tool's reason, such as open files.
    """
    if os.geteuid() == 0:
        command = ["umount", *(["-l"] if lazy else []), mountpoint]
    else:
        command = ["fusermount3", "-u", *(["-z"] if lazy else []), mountpoint]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired) as error:
        raise MountError(f"{mountpoint} could not be unmounted: {error}") from None
    if done.returncode != 0:
        raise MountError(
            f"{mountpoint} could not be unmounted: {done.stderr.strip() or command[0]}",
            remedy="close what uses it (`fuser -vm` lists it), or pass --lazy",
        )


def clear_stale(mountpoint: str) -> None:
    """Remove what a crashed mount left. Raises MountError."""
    unmount(mountpoint, lazy=True)
