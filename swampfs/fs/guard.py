"""The way from a writer to the lock it needs. Readers do not pass here."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext

from swampfs.names import is_scratch
from swampfs.records import LockInfo
from swampfs.sync.leases import Leases


class Guard:
    """Before anything below a lock changes. ``leases=None``: a mount of its own, without locks."""

    def __init__(self, leases: Leases | None) -> None:
        self._leases = leases

    def lets(self, *paths: str) -> bool:
        """Whether all paths may be changed at once; no request, no wait. Scratch names are nobody else's."""
        leases = self._leases
        return leases is None or all(is_scratch(path) or leases.covers(path) for path in paths)

    def staying(self, *paths: str) -> AbstractContextManager[None]:
        """For something done in several steps under the locks of ``paths``."""
        return nullcontext() if self._leases is None else self._leases.staying(paths)

    async def wait(self, pid: int, *paths: str) -> None:
        """Return when they may be. Whatever was read before may be different now.

        ``pid`` is the process that asks. Raises what :meth:`Leases.guard` raises.
        """
        if self._leases is not None:
            await self._leases.guard(pid, *(path for path in paths if not is_scratch(path)))


def is_family(pid: int, holder: LockInfo) -> bool:
    """Whether a process works for a lock's holder: the holder itself, its descendant, or told so by swamp.

    Swamp sets ``SWAMP_LOCK_HOLDER_PID`` for what it starts (lesson 33): it waits for them, so they must
    not wait for it.
    """
    if holder.hostname != os.uname().nodename or pid <= 0:
        return False
    try:
        with open(f"/proc/{pid}/environ", "rb") as file:
            if f"SWAMP_LOCK_HOLDER_PID={holder.pid}".encode() in file.read().split(b"\0"):
                return True
        while pid > 1:
            if pid == holder.pid:
                return True
            pid = _parent(pid)
    except OSError:
        return False
    return False


def process_of(pid: int) -> int:
    """The process of a thread: the kernel names the thread that asks. 0 if it cannot be seen from here."""
    try:
        with open(f"/proc/{pid}/status") as file:
            return int(dict(line.split(":", 1) for line in file)["Tgid"])
    except OSError:
        return 0


def _parent(pid: int) -> int:
    """Of a process or of a thread: the kernel names the thread that asks. Raises OSError."""
    with open(f"/proc/{pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    group = int(fields["Tgid"])
    return group if group != pid else int(fields["PPid"])
