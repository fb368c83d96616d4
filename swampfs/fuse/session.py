"""Mounting, serving and unmounting; telling the kernel what it must forget."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator

import pyfuse3
import trio

from swampfs.errors import MountError
from swampfs.fs.vfs import FileSystem
from swampfs.fuse.operations import Operations
from swampfs.records import TreeChange
from swampfs.settings import MountSettings
from swampfs.threads import Lane, Threads

log = logging.getLogger(__name__)

_NAMES_S = 0.1
_MAX_TASKS = 256  # handlers at once; far above the cold opens a shell causes


def mount(fs: FileSystem, settings: MountSettings) -> None:
    """Attach to the mount point. From here on the kernel queues requests; :func:`serve` answers them.

    Raises MountError.
    """
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse", remedy="install fuse3, or load the kernel's fuse module")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError("/dev/fuse may not be opened by this user", remedy="mount as root, or `chmod 666 /dev/fuse`")
    options = set(pyfuse3.default_options)
    name = settings.source.url.replace(",", "%2C")  # a comma ends a mount option
    options |= {f"fsname={name}", "subtype=swampfs", "default_permissions"}
    if os.geteuid() == 0:
        options |= {"nosuid", "nodev"}  # fusermount3 adds them for everybody else
    if settings.allow_other:
        options.add("allow_other")
    elif settings.allow_root:
        options.add("allow_root")
    if settings.read_only:
        options.add("ro")
    with tempfile.TemporaryFile() as said:
        try:
            with _stderr_to(said.fileno()):
                pyfuse3.init(Operations(fs, settings.timeout_s), str(settings.mountpoint), options)
        except RuntimeError as error:
            said.seek(0)
            reason = " ".join(said.read().decode(errors="replace").split()) or str(error)
            raise MountError(
                f"{settings.mountpoint} could not be mounted: {reason}", remedy="check that fuse3 is installed"
            ) from None


@contextlib.contextmanager
def _stderr_to(target: int) -> Iterator[None]:
    """libfuse and fusermount3 say why they fail on descriptor 2 and nowhere else."""
    kept = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


async def serve() -> None:
    """Answer the kernel until it is unmounted or the task is cancelled."""
    await pyfuse3.main(max_tasks=_MAX_TASKS)


def detach() -> None:
    """End the session and unmount. Only after :func:`mount`: pyfuse3 crashes otherwise."""
    pyfuse3.close(unmount=True)


class Invalidator:
    """Tells the kernel about changes, from a queue and in a thread.

    A notification can block until a handler has answered, and that handler may be waiting for the very task that
    found the change; so whoever reports a change never waits for the kernel.
    """

    def __init__(self, threads: Threads) -> None:
        self._threads = threads
        self._names: list[TreeChange] = []
        self._inodes: list[TreeChange] = []
        self._wake = trio.Event()
        self._idle = trio.Event()
        self._idle.set()

    def __call__(self, changes: list[TreeChange]) -> None:
        if changes:
            self._names.extend(changes)
            self._inodes.extend(changes)
            self._idle = trio.Event()
            self._wake.set()

    async def run(self) -> None:
        """Deliver, for ever. Start it once the kernel is attached."""
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            await self._forget_inodes()
            names, self._names = self._names, []
            await self._deliver(Lane.KERNEL, _forget_names, names)
            if not self._names:
                self._idle.set()

    async def settle(self) -> None:
        """Return when no look at anything reported so far can show what was before.

        A name below a directory that the caller's own operation holds cannot be forgotten before that is over; but its
        inode can, and then the kernel asks (ESTALE) what the name means.
        """
        if not self._idle.is_set():
            await self._forget_inodes()
            with trio.move_on_after(_NAMES_S):
                await self._idle.wait()

    async def _forget_inodes(self) -> None:
        batch, self._inodes = self._inodes, []
        await self._deliver(Lane.INODES, _forget_inodes, batch)

    async def _deliver(self, lane: Lane, fn: Callable[[list[TreeChange]], None], batch: list[TreeChange]) -> None:
        try:
            await self._threads.read(lane, fn, batch)
        except OSError as error:
            log.info("the kernel refused an invalidation: %s", error)


def _forget_inodes(changes: list[TreeChange]) -> None:
    for change in changes:
        if change.ino:
            with contextlib.suppress(FileNotFoundError):  # the kernel did not know it: nothing to forget
                pyfuse3.invalidate_inode(change.ino, attr_only=not change.content)


def _forget_names(changes: list[TreeChange]) -> None:
    for change in changes:
        if change.name:
            with contextlib.suppress(FileNotFoundError):
                pyfuse3.invalidate_entry(change.parent, change.name.encode())
