"""The composition root: settings in, a running mount out.

Start: own the state directory → reach the local tier before it is covered → open the datastore → first poll, replay
and proof → attach to the kernel → serve. Stop: push what is pending while still serving, then detach.
"""

from __future__ import annotations

import ctypes
import fcntl
import logging
import os
import resource
import signal
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import trio

from swampfs import metrics, registry, spans
from swampfs.artifacts.keeper import Keeper
from swampfs.control import Control
from swampfs.datastore import Datastore, open_datastore
from swampfs.errors import MountError, PushPendingError, SettingsError, StateBusyError
from swampfs.foreign import ForeignNamespaces
from swampfs.fs.attributes import Owner
from swampfs.fs.cache_limit import CacheLimit
from swampfs.fs.consistency import CloseToOpen
from swampfs.fs.events import Events
from swampfs.fs.guard import Guard, is_family
from swampfs.fs.keeping import Keeping
from swampfs.fs.localtier import LocalTier
from swampfs.fs.lockfiles import LockFiles
from swampfs.fs.prefetch import Prefetch
from swampfs.fs.refresh import Refresh
from swampfs.fs.scrub import Scrub
from swampfs.fs.settle import Settle
from swampfs.fs.vfs import FileSystem
from swampfs.fs.watcher import Watcher
from swampfs.fs.writeback import Writeback
from swampfs.fs.xattrs import Xattrs
from swampfs.fuse import mountpoint as mountpoints
from swampfs.fuse import session
from swampfs.fuse.attach import attach
from swampfs.fuse.collected import bring_collected
from swampfs.fuse.federation import OWN
from swampfs.fuse.operations import PLAIN, Numbers, Operations
from swampfs.names import RelPath, lease_path
from swampfs.records import TreeChange
from swampfs.running import Mount
from swampfs.settings import Backend, Consistency, MountSettings
from swampfs.state.ballast import Ballast
from swampfs.sync.lease import LONGEST_S
from swampfs.sync.leases import Leases
from swampfs.sync.namespaces import Namespaces
from swampfs.sync.outage import watch
from swampfs.sync.service import SyncService
from swampfs.threads import Threads

log = logging.getLogger(__name__)

_COLLECT_S = 10.0
_UNMOUNT_FLUSH_S = 60.0
_M_ARENA_MAX, _HEAPS = -8, 2
_REGISTERED = "namespace_registered_for"
_LOCK_SHARE = 0.8  # of an operation's time, for waiting for a lock; the rest is for what it guards


_OURS = ("files", "local", "staging")  # of a state directory; what they hold is found again without `state`


def lock_state_dir(directory: Path) -> int:
    """Own a state directory for the life of this process. Returns the descriptor that holds it.

    Raises StateBusyError, or SettingsError if the directory cannot be made.
    """
    if _is_taken(directory):
        raise SettingsError(f"{directory} is no state directory, and not empty", remedy="pass another --state-dir")
    try:
        (directory / "state").mkdir(parents=True, exist_ok=True, mode=0o700)
        os.chmod(directory, 0o700)
        fd = os.open(directory / "state" / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SettingsError(
            f"the state directory {directory} cannot be used: {error.strerror}", remedy="pass another --state-dir"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(fd)
        raise StateBusyError(f"the state directory {directory} is in use by process {owner}") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _is_taken(directory: Path) -> bool:
    """Whether it has files that are not ours: it would be closed to all others."""
    try:
        names = os.listdir(directory)
    except OSError:
        return False  # there is none, or it cannot be used, which is said in a moment
    return "state" not in names and any(name not in _OURS and not name.endswith((".log", ".jsonl")) for name in names)


def check_places(settings: MountSettings, env: Mapping[str, str]) -> None:
    """Refuse places inside one another: a mount that needs its own files would wait for itself for ever."""
    inside_mount = {
        "the state directory": settings.state_dir,
        "the run directory": registry.run_dir(env),
        "the trace file": Path(settings.trace_file) if settings.trace_file else None,
    }
    for what, path in inside_mount.items():
        if path is not None and _is_inside(path, settings.mountpoint):
            raise SettingsError(
                f"{what} {path} lies below the mount point {settings.mountpoint}",
                remedy="pass --state-dir, or set SWAMP_HOME, outside of it",
            )
    source = settings.source.directory
    if source:
        for what, path in (("the mount point", settings.mountpoint), ("the state directory", settings.state_dir)):
            if _is_inside(path, Path(source)) and str(path) != source:
                raise SettingsError(
                    f"{what} {path} lies inside the datastore {source}", remedy="choose a place outside"
                )


def _is_inside(path: Path, directory: Path) -> bool:
    real, above = Path(os.path.realpath(path)), Path(os.path.realpath(directory))
    return above == real or above in real.parents


def check_mountpoint(settings: MountSettings) -> None:
    """Refuse a mount point that would hide somebody's files (``design/cli.md`` §2)."""
    mountpoint = settings.mountpoint
    own = settings.repo is not None and mountpoint == settings.repo.mountpoint
    if mountpoints.is_stale(str(mountpoint)):
        log.info("clearing the mount a dead process left at %s", mountpoint)
        mountpoints.clear_stale(str(mountpoint))
    if own:
        mountpoint.mkdir(mode=0o755, exist_ok=True)
    if os.path.ismount(mountpoint):
        raise MountError(f"{mountpoint} is already a mount point", remedy="unmount it first")
    try:
        inside = os.listdir(mountpoint)
    except FileNotFoundError:
        raise MountError(f"the mount point {mountpoint} does not exist", remedy="create the directory") from None
    except NotADirectoryError:
        raise MountError(f"the mount point {mountpoint} is not a directory") from None
    except OSError as error:
        raise MountError(f"the mount point {mountpoint} cannot be read: {error.strerror}") from None
    if inside and not own:
        raise MountError(
            f"the mount point {mountpoint} is not empty",
            remedy="mount on an empty directory, or on a repo's own .swamp",
        )


async def run(settings: MountSettings, env: Mapping[str, str], on_ready: Callable[[], None]) -> None:
    """Mount and serve until unmounted or told to stop. ``on_ready`` is called once requests are served.

    Raises whatever kept the mount from starting; after ``on_ready`` only bugs.
    """
    check_places(settings, env)
    check_mountpoint(settings)
    _raise_file_limit()
    _share_heaps()
    signal.signal(signal.SIGIO, signal.SIG_IGN)  # what is sent if a lease is broken while it is asked for (fs/handles)
    failure: list[Exception] = []
    threads = Threads()
    with ExitStack() as at_end:
        at_end.callback(spans.begin(env))
        at_end.callback(os.close, lock_state_dir(settings.state_dir))
        beneath = _local_root(settings)
        at_end.callback(os.close, beneath)
        async with trio.open_nursery() as nursery:
            try:
                await _start(settings, env, beneath, nursery, threads=threads, on_ready=on_ready, at_end=at_end)
            except Exception as error:  # re-raised below: the nursery would wrap it in a group
                failure.append(error)
            await threads.leave(settings.timeout_s)
            nursery.cancel_scope.cancel()
    if failure:
        raise failure[0]


def _raise_file_limit() -> None:
    """Each open file of a user is one of ours."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _share_heaps() -> None:
    """By itself glibc gives worker threads heaps of their own, and keeps what was once in use in each of them."""
    with suppress(AttributeError):  # another libc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _HEAPS)


def _local_root(settings: MountSettings) -> int:
    """The directory of the local tier, opened before it is mounted over."""
    if settings.repo is not None and settings.mountpoint == settings.repo.mountpoint:
        directory = settings.mountpoint
    else:
        directory = settings.state_dir / "local"
        directory.mkdir(mode=0o700, exist_ok=True)
    return os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


async def _start(
    settings: MountSettings,
    env: Mapping[str, str],
    beneath: int,
    nursery: trio.Nursery,
    *,
    threads: Threads,
    on_ready: Callable[[], None],
    at_end: ExitStack,
) -> None:
    own = settings.source.backend is Backend.FILESYSTEM and settings.source.directory == str(settings.mountpoint)
    datastore = open_datastore(
        settings.source,
        threads,
        trace_file=settings.trace_file,
        directory=f"/proc/self/fd/{beneath}" if own else None,
        lock_ttl_ms=int(settings.lock_ttl_s * 1000),
    )
    sync = SyncService(
        datastore.remote,
        datastore.keys,
        datastore.index,
        str(settings.state_dir),
        make_lock=datastore.make_lock,
        prove=datastore.prove,
        start_soon=nursery.start_soon,
        timeout_s=settings.timeout_s,
        lock_wait_s=settings.timeout_s * _LOCK_SHARE,
        queue_offline=settings.queue_offline,
    )
    at_end.callback(sync.close)
    pending = await sync.open(writable=not settings.read_only)
    if not settings.read_only:
        await _register(settings, datastore, sync)
    if pending:
        log.info("replayed the journal: %d change(s) to push", pending)
    foreign = None
    if settings.all_namespaces:
        foreign = ForeignNamespaces(settings, datastore, sync.catalog, nursery, at_end)
    mount = _compose(settings, datastore, sync, beneath, nursery, at_end=at_end, foreign=foreign)
    await _serve(mount, env, nursery, on_ready)


async def _register(settings: MountSettings, datastore: Datastore, sync: SyncService) -> None:
    """A repository's namespace is its own: say so once, or find out that it is another's. Raises NamespaceError."""
    slug, owner = settings.source.namespace, settings.repo.repo_id if settings.repo is not None else None
    if not slug or not owner or sync.catalog.fact(_REGISTERED) == owner:
        return
    is_plain = settings.source.backend is Backend.FILESYSTEM
    await Namespaces(datastore.remote, datastore.keys, newline=is_plain).register(slug, owner)
    sync.catalog.set_fact(_REGISTERED, owner)


def _compose(
    settings: MountSettings,
    datastore: Datastore,
    sync: SyncService,
    beneath: int,
    nursery: trio.Nursery,
    *,
    at_end: ExitStack,
    foreign: ForeignNamespaces | None,
) -> Mount:
    """Join the parts and attach to the kernel."""
    numbers = PLAIN if foreign is None else OWN
    invalidator = session.Invalidator(datastore.remote.threads, numbers)
    sync.on_changes, sync.settle = invalidator, invalidator.settle
    touched: list[Callable[[RelPath], None]] = []
    owner = Owner(settings.uid, settings.gid, settings.umask)
    locks = LockFiles(
        sync.leases,
        datastore.remote,
        datastore.keys,
        owner=owner,
        make_lock=lambda key: datastore.make_lock(key, lambda key, nonce: None),
        start_soon=nursery.start_soon,
    )
    fs = FileSystem(
        sync,
        LocalTier(f"/proc/self/fd/{beneath}", settings.tiers, umask=settings.umask),
        owner=owner,
        read_only=settings.read_only,
        on_dirty=lambda path: touched[0](path),
        invalidate=invalidator,
        guard=Guard(sync.leases),
        locks=locks,
    )
    writeback = Writeback(sync, settings.push_delay_s)
    touched.append(writeback.touch)
    _join_leases(sync.leases, fs, writeback, settings)
    locks.publish = lambda lock: _publish(fs, writeback, lock, settings.timeout_s * _LOCK_SHARE)
    operations = _operations(settings, fs, writeback, numbers)
    lane = attach(settings, fs, operations, foreign, at_end)
    if lane is not None:
        nursery.start_soon(lane.run)
        invalidator.forget_inode, invalidator.forget_name = lane.forget_inode, lane.forget_name
        invalidator.forget_listing = lane.forget_listing
    if fs.files.handles.written_back:
        invalidator.show_times_of(fs)
    invalidator.lives_on, invalidator.is_in_use = fs.tree.lives_on, operations.in_use.__contains__
    nursery.start_soon(invalidator.run)
    mount = _joined(settings, datastore, fs, writeback, foreign)
    mount.upcalls = lane.as_json if lane is not None else None
    if fs.files.handles.written_back:
        mount.collect = partial(_collect, mount)
    if settings.xattrs:
        operations.xattrs = mount.about
    at_end.callback(mount.artifacts.close)
    fs.views = mount.views(owner)
    _begin(mount, nursery)
    return mount


async def _collect(mount: Mount, timeout_s: float) -> bool:
    """As :attr:`Mount.collect`, with the writeback cache."""
    paths = map(mount.shown, mount.fs.files.handles.written_to())
    return await bring_collected(mount.settings.mountpoint, paths, timeout_s)


def _joined(
    settings: MountSettings,
    datastore: Datastore,
    fs: FileSystem,
    writeback: Writeback,
    foreign: ForeignNamespaces | None,
) -> Mount:
    sync = fs.sync
    cache = CacheLimit(sync, fs.files, settings.cache_bytes, Ballast(f"{settings.state_dir}/state/ballast"))
    sync.use_room(cache)
    prefetch = Prefetch(sync)
    if settings.prefetch:
        fs.files.prefetch = prefetch
    return Mount(
        settings=settings,
        datastore=datastore,
        sync=sync,
        fs=fs,
        writeback=writeback,
        refresh=Refresh(sync, settings.refresh_s),
        cache=cache,
        scrub=Scrub(sync, settings.scrub_s),
        keeping=Keeping(sync, cache, settings.refresh_s),
        prefetch=prefetch,
        about=Xattrs(sync, fs.inodes, lambda: writeback.last_error),
        foreign=foreign,
        artifacts=Keeper(sync.parts, f"{settings.state_dir}/state/artifacts.db"),
        events=Events(),
    )


def _begin(mount: Mount, nursery: trio.Nursery) -> None:
    """Everything a mount does by itself."""
    tasks = [mount.refresh.run, mount.cache.run, mount.scrub.run, mount.keeping.run, mount.prefetch.run]
    if not mount.settings.read_only:
        mount.writeback.touch_all()
        tasks += [mount.writeback.run, mount.sync.leases.run, Settle(mount.sync, mount.fs.files).run]
    for task in (*tasks, _watcher(mount).run):
        nursery.start_soon(task)

    def resume() -> None:
        """The datastore is back."""
        mount.refresh.soon()
        mount.writeback.resume()

    nursery.start_soon(watch, mount.datastore.circuit, mount.datastore.remote.threads, resume)


def _watcher(mount: Mount) -> Watcher:
    """Whoever knows of something tells it."""
    watcher = Watcher(mount.events, mount.sync.catalog, mount.standing, mount.shown)
    show = mount.sync.on_changes

    def changed(changes: list[TreeChange]) -> None:
        if show is not None:
            show(changes)
        watcher.changed(changes)

    mount.sync.on_changes = changed
    mount.fs.failures.on_failure = watcher.failed
    mount.writeback.on_pushed = watcher.pushed
    return watcher


def _operations(settings: MountSettings, fs: FileSystem, writeback: Writeback, numbers: Numbers) -> Operations:
    """The kernel's way to the file system; who asks for it waits until the datastore has what was written."""

    async def publish(paths: Sequence[RelPath]) -> None:
        await writeback.flush(paths, settings.timeout_s * _LOCK_SHARE, even_open=True)

    fs.files.handles.written_back = settings.writeback_cache and not settings.read_only
    if settings.consistency is Consistency.CLOSE_TO_OPEN:
        fs.close_to_open = CloseToOpen(fs.sync, publish)
    operations = Operations(fs, settings.timeout_s, numbers)
    if settings.fsync_remote:
        operations.publish = publish
    return operations


def _join_leases(leases: Leases, fs: FileSystem, writeback: Writeback, settings: MountSettings) -> None:
    """What decides when a lock is given back: changes to push, files being written."""
    leases.is_pending = writeback.is_pending
    leases.is_written = fs.files.has_changing
    leases.hurry = writeback.hurry
    leases.is_family = is_family
    leases.longest_s = max(LONGEST_S, 2 * settings.push_delay_s)


async def _publish(fs: FileSystem, writeback: Writeback, lock: RelPath, timeout_s: float) -> None:
    """Before a user's lock is given up: commit what was written under it and under our own locks."""
    leases = fs.sync.leases
    fs.files.mapped.announce()
    mine = [
        path
        for path in writeback.pending()
        if lease_path(path) == lock or leases.holds(lease_path(path)) or writeback.is_held_back(path)
    ]
    if mine:
        await writeback.flush(mine, timeout_s, even_open=True)
    await leases.give_back_idle()


async def _serve(mount: Mount, env: Mapping[str, str], nursery: trio.Nursery, on_ready: Callable[[], None]) -> None:
    """Serve the kernel and the control socket until one of them ends the mount."""
    settings = mount.settings
    socket_path = registry.socket_path(env, settings.mountpoint)
    listener = registry.listen(socket_path)
    record = registry.register(
        env,
        registry.Registration(
            str(settings.mountpoint), os.getpid(), settings.source.url, str(settings.state_dir), str(socket_path)
        ),
    )

    async def serve_kernel() -> None:
        await session.serve()
        mount.stop.set()  # unmounted from outside

    try:
        if settings.metrics_port is not None:
            await metrics.serve(settings.metrics_port, lambda: metrics.render(mount.status()), nursery)
        nursery.start_soon(Control(listener, mount.commands()).run)
        nursery.start_soon(_signals, mount)
        nursery.start_soon(serve_kernel)
        on_ready()
        await mount.stop.wait()
        await mount.sync.leases.close()
    finally:
        record.unlink(missing_ok=True)
        socket_path.unlink(missing_ok=True)
        listener.close()


async def _signals(mount: Mount) -> None:
    """SIGTERM/SIGINT: push, then unmount; again: leave the rest to the journal. SIGHUP: refresh."""
    stopping = trio.CancelScope()

    async def finish() -> None:
        with stopping:
            try:
                if not mount.settings.read_only:
                    if not await mount.collect(_COLLECT_S):
                        log.info("unmounting before the kernel has written all it collected")
                    await mount.writeback.flush(None, _UNMOUNT_FLUSH_S)
            except PushPendingError as error:
                log.info("unmounting with changes pending: %s", error.line())
        mount.stop.set()

    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1) as received:
            ending = False
            async for number in received:
                if number == signal.SIGHUP:
                    mount.refresh.soon()
                elif number == signal.SIGUSR1:
                    log.info("state: %s", mount.status())
                elif ending:
                    stopping.cancel()
                else:
                    ending = True
                    nursery.start_soon(finish)
