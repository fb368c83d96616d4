"""What every part of the engine works on: one remote and this machine's state of it."""

from __future__ import annotations

from dataclasses import dataclass

from swampfs.names import Keyspace
from swampfs.provider import RemoteIndex
from swampfs.state.cache_dir import CacheDir
from swampfs.state.catalog import Catalog
from swampfs.state.journal import Journal
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
