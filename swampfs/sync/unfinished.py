"""What somebody is in the middle of, under a lock file: it is published as a whole, or when the lock is given back.

Swamp writes a version as several files and then ``latest``, which it removes first; and it removes a version before it
lets ``latest`` show another. Others must only ever see whole versions (data model §8.2, rule 4).
"""

from __future__ import annotations

from swampfs.names import RelPath, lease_path, marker_of, version_of
from swampfs.records import Op
from swampfs.state.cache_dir import CacheDir
from swampfs.state.journal import Journal
from swampfs.sync.leases import Leases

_LONGEST = 32  # bytes of a version number


class Unfinished:
    """A set of journaled paths, as of now."""

    def __init__(self, journal: Journal, cache: CacheDir, leases: Leases) -> None:
        self._journal = journal
        self._cache = cache
        self._leases = leases

    def __contains__(self, path: object) -> bool:
        """Removed, or of a version that ``latest`` does not show yet, under a lock that a user holds."""
        assert isinstance(path, str)
        lease = self._leases.taken(lease_path(path))
        if (lease is None or not lease.lock.is_sure) and self._leases.taken_global() is None:
            return False
        if self._journal.op(path) is Op.DELETE:
            return True
        marker, version = marker_of(path), version_of(path)
        return marker is not None and version is not None and version > self._shown(marker)

    def _shown(self, marker: RelPath) -> int:
        """The version a marker shows on this machine; 0 if there is none, or it was not even looked at."""
        try:
            with open(self._cache.path(marker), "rb") as file:
                return int(file.read(_LONGEST))
        except (OSError, ValueError):
            return 0
