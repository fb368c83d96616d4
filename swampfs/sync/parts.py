"""What every part of the engine works on: one remote and this machine's state of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from swampfs.names import Keyspace, RelPath, home_partition
from swampfs.provider import RemoteIndex
from swampfs.records import IndexMode, Posix
from swampfs.state.cache_dir import CacheDir
from swampfs.state.catalog import FILE_MODE, LINK_MODE, Catalog
from swampfs.state.journal import Journal
from swampfs.sync.index import MONOLITH
from swampfs.sync.remote import Remote


@dataclass(frozen=True, slots=True)
class Parts:
    """Handed to pull, push and hydrate; made once by the sync service."""

    remote: Remote
    keys: Keyspace
    index: RemoteIndex
    catalog: Catalog
    cache: CacheDir
    journal: Journal

    def partition(self, path: RelPath) -> str:
        """Partition that holds a path's entry after a commit."""
        return self.partitions()(path)

    def partitions(self) -> Callable[[RelPath], str]:
        """As :meth:`partition`, of many."""
        is_sharded = self.catalog.watermark().mode is IndexMode.SHARDS
        return home_partition if is_sharded else lambda path: MONOLITH

    def posix(self, path: RelPath, mtime_ns: int | None) -> Posix:
        """What the catalog says of a file, as far as it is not the usual."""
        node = self.catalog.at(path)
        if node is None:
            return Posix()
        usual = FILE_MODE if node.target is None else LINK_MODE
        return Posix(
            mode=None if node.mode == usual else node.mode,
            uid=None if node.uid < 0 else node.uid,
            gid=None if node.gid < 0 else node.gid,
            ns=0 if mtime_ns is None else mtime_ns % 1_000_000,
            link=node.target,
        )
