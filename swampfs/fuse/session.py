"""Mounting, serving and unmounting; telling the kernel what it must forget."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import pyfuse3
import trio
from pyfuse3 import InodeT

from swampfs.errors import MountError
from swampfs.fs.vfs import FileSystem
from swampfs.fuse.operations import PLAIN, Numbers
from swampfs.records import TreeChange
from swampfs.settings import MountSettings
from swampfs.threads import Lane, Threads

T = TypeVar("T")

log = logging.getLogger(__name__)

_IN_USE_S = 0.02
_NOBODY_WAITS = {os.strerror(code) for code in (errno.ENOENT, errno.ENODEV, errno.ECONNABORTED)}
_MAX_TASKS = 256  # handlers at once; far above the cold opens a shell causes


def mount(operations: pyfuse3.Operations, settings: MountSettings) -> int:
    """Attach to the mount point. From here on the kernel queues requests; :func:`serve` answers them.

    Returns the descriptor of the session, -1 if that cannot be told. Raises MountError.
    """
    if not os.path.exists("/dev/fuse"):
        raise MountError("there is no /dev/fuse", remedy="install fuse3, or load the kernel's fuse module")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        raise MountError("/dev/fuse may not be opened by this user", remedy="mount as root, or `chmod 666 /dev/fuse`")
    logging.getLogger(pyfuse3.__name__).addFilter(_is_news)
    options = set(pyfuse3.default_options)
    name = settings.source.url.replace(",", "%2C")  # a comma ends a mount option
    options |= {f"fsname={name}", "subtype=swampfs", "default_permissions", *settings.kernel_options}
    if os.geteuid() == 0:
        options |= {"nosuid", "nodev"}  # fusermount3 adds them for everybody else
    if settings.allow_other:
        options.add("allow_other")
    elif settings.allow_root:
        options.add("allow_root")
    if settings.read_only:
        options.add("ro")
    before = _devices()
    with tempfile.TemporaryFile() as said:
        try:
            with _stderr_to(said.fileno()):
                pyfuse3.init(operations, str(settings.mountpoint), options)
        except RuntimeError as error:
            said.seek(0)
            reason = " ".join(said.read().decode(errors="replace").split()) or str(error)
            raise MountError(
                f"{settings.mountpoint} could not be mounted: {reason}", remedy="check that fuse3 is installed"
            ) from None
    return max(_devices() - before, default=-1)


def _is_news(record: logging.LogRecord) -> bool:
    """Not that nobody waits for an answer any more, as happens at an unmount; pyfuse3 calls it an error."""
    is_unheard = "fuse_reply_* failed" in str(record.msg) and isinstance(record.args, tuple)
    return not is_unheard or not _NOBODY_WAITS.intersection(map(str, record.args or ()))


def _devices() -> set[int]:
    """Descriptors of ``/dev/fuse``."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # of this very listing
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                found.add(int(name))
    return found


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
    """Tells the kernel about changes, from queues and in threads.

    Inodes are forgotten, which never blocks: where the kernel then uses one whose name stands for something else, it is
    answered ESTALE and looks the name up again; and what is not there it does not remember. A name is forgotten only
    where that is not enough, because somebody still has the old inode open, or it has other names. That waits for its
    directory, which an operation may hold that waits for us; should this process be killed then, the thread could not
    die and the mount would hang. So it is not done while an operation of ours is at work there.
    """

    def __init__(self, threads: Threads, numbers: Numbers = PLAIN) -> None:
        """``numbers`` as of the :class:`Operations` whose inodes it is told."""
        self._threads = threads
        self._numbers = numbers
        self._inodes: list[int] = []
        self._listings: set[int] = set()
        self._names: list[TreeChange] = []
        self._wake = trio.Event()
        self._wake_names = trio.Event()
        self._idle = trio.Event()
        self._idle.set()
        self.lives_on: Callable[[TreeChange], bool] = lambda change: False
        """Whether the inode would go on to answer under a name that is not its own any more."""
        self.is_in_use: Callable[[int], bool] = lambda directory: False
        self.forget_inode: Callable[[int], None] = _forget_inode
        self.forget_name: Callable[[int, bytes], None] = pyfuse3.invalidate_entry
        self._fs: FileSystem | None = None
        self._once_closed: set[int] = set()  # inodes whose name is forgotten in vain while somebody has them open
        self.forget_listing: Callable[[int], None] | None = None
        """How the kernel is told; they raise OSError. It keeps listings only if it is told of those."""

    def __call__(self, changes: list[TreeChange]) -> None:
        inodes = [self._numbers.inode(change.ino) for change in changes if change.ino]
        listings = [] if self.forget_listing is None else {change.parent for change in changes if change.name}
        if inodes or listings:
            self._inodes.extend(inodes)
            self._listings.update(listings)
            if self._idle.is_set():  # else somebody waits for this very one
                self._idle = trio.Event()
            self._wake.set()
        names = [change for change in changes if change.name and self.lives_on(change)]
        if self._fs is not None:
            retimed = [change.ino for change in changes if not change.name]
            self._once_closed.update(filter(self._fs.files.handles.is_open, retimed))
            names += self._named(retimed)
        self._forget_soon(names)

    def show_times_of(self, fs: FileSystem) -> None:
        """The kernel believes nobody else about a file's time (decision 0016): to show what others set, it has to
        forget the name."""
        self._fs = fs
        fs.files.handles.on_closed = self._closed

    def _named(self, inodes: Iterable[int]) -> list[TreeChange]:
        assert self._fs is not None
        name_of = self._fs.tree.name_of_file
        return [TreeChange(*name, ino) for ino in inodes if (name := name_of(ino)) is not None]

    def _closed(self, ino: int) -> None:
        if ino in self._once_closed:
            self._once_closed.discard(ino)
            self._forget_soon(self._named([ino]))

    def _forget_soon(self, names: list[TreeChange]) -> None:
        if names:
            self._names.extend(names)
            self._wake_names.set()

    async def run(self) -> None:
        """Deliver, for ever. Start it once the kernel is attached."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._forget_names)
            while True:
                await self._wake.wait()
                self._wake = trio.Event()
                inodes, self._inodes = self._inodes, []
                listings, self._listings = self._listings, set()
                if listings:
                    await self._deliver(Lane.KERNEL, self._forget_listings, listings)
                await self._deliver(Lane.KERNEL, self._forget_inodes, inodes)
                if not (self._inodes or self._listings):
                    self._idle.set()

    async def settle(self) -> None:
        """Return when no look at anything reported so far shows what was before."""
        await self._idle.wait()

    async def _forget_names(self) -> None:
        while True:
            await self._wake_names.wait()
            self._wake_names = trio.Event()
            batch, self._names = self._names, []
            for change in batch:
                if self.is_in_use(change.parent):
                    self._names.append(change)
                else:
                    await self._deliver(Lane.NAMES, self._forget_name, change)
            if self._names:
                await trio.sleep(_IN_USE_S)
                self._wake_names.set()

    async def _deliver(self, lane: Lane, fn: Callable[[T], None], what: T) -> None:
        try:
            await self._threads.read(lane, fn, what)
        except OSError as error:
            log.info("the kernel refused an invalidation: %s", error)

    def _forget_inodes(self, inodes: list[int]) -> None:
        for ino in inodes:
            with contextlib.suppress(FileNotFoundError):  # the kernel did not know it: nothing to forget
                self.forget_inode(ino)

    def _forget_listings(self, directories: set[int]) -> None:
        for ino in directories:
            with contextlib.suppress(FileNotFoundError):
                if self.forget_listing is not None:
                    self.forget_listing(self._numbers.inode(ino))

    def _forget_name(self, change: TreeChange) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.forget_name(self._numbers.inode(change.parent), change.name.encode())


def _forget_inode(ino: int) -> None:
    pyfuse3.invalidate_inode(InodeT(ino), attr_only=True)
