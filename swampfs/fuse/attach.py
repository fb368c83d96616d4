"""To the kernel: through pyfuse3 alone, as one namespace of several, or with the fast lane in front of it."""

from __future__ import annotations

from contextlib import ExitStack

from swampfs.fs.vfs import FileSystem
from swampfs.fuse import session
from swampfs.fuse.fastlane import FastLane, is_possible
from swampfs.fuse.federation import Federation, Namespaces
from swampfs.fuse.mountpoint import read_further_ahead
from swampfs.fuse.operations import Operations
from swampfs.settings import MountSettings


def attach(
    settings: MountSettings,
    fs: FileSystem,
    operations: Operations,
    foreign: Namespaces | None,
    at_end: ExitStack,
) -> FastLane | None:
    """Mount. Returns the fast lane if it is wanted and this machine can do that. Raises MountError."""
    if foreign is not None:
        fs.views_parent = 0
        name = settings.source.namespace
        federation = Federation(name, operations, foreign, owner=fs.owner, names_s=settings.refresh_s)
        federation.enable_writeback_cache = operations.enable_writeback_cache
        session.mount(federation, settings)
        at_end.callback(session.detach)
        return None
    descriptor = session.mount(operations, settings)
    at_end.callback(session.detach)  # after the nursery: its tasks use the session
    if not settings.fast_lane or descriptor < 0 or not is_possible():
        return None
    lane = FastLane(fs, operations, descriptor, passthrough=settings.passthrough)
    lane.on_begin = lambda: read_further_ahead(str(settings.mountpoint))
    at_end.callback(lane.close)  # before the session ends: its device must not stay open
    return lane
