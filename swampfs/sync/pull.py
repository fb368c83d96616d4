"""Following the remote index: poll, apply the difference, say what the kernel must forget."""

from __future__ import annotations

from collections.abc import Sequence

from swampfs.errors import AbsentError
from swampfs.names import RelPath
from swampfs.records import TreeChange
from swampfs.state.apply import apply_delta
from swampfs.sync.parts import Parts


class Puller:
    """The metadata-only pull of the mount. Content is hydrated when it is opened."""

    def __init__(self, parts: Parts) -> None:
        self._remote = parts.remote
        self._keys = parts.keys
        self._index = parts.index
        self._catalog = parts.catalog
        self._cache = parts.cache
        self._journal = parts.journal

    async def pull(self) -> list[TreeChange]:
        """One request when nothing changed. Dirty paths are left alone; remote deletes reach clean files only.

        Raises StoreError and its subclasses; the catalog then stays as it was.
        """
        while True:
            epoch = self._catalog.epoch
            delta = await self._index.poll(self._catalog.watermark(), self._catalog.partitions())
            if delta is None:
                return []
            if epoch == self._catalog.epoch:
                break  # else a push or another poll got further meanwhile: what we read may be the older
        applied = apply_delta(self._catalog, delta, self._journal)
        for path in applied.stale:
            self._cache.remove(path)
        if applied.missing_parked:
            await self._judge_parked(applied.missing_parked)
        return applied.changes

    async def _judge_parked(self, paths: Sequence[RelPath]) -> None:
        """An entry we parked in ``_root`` is gone: deleted by somebody, or dropped by a writer that does not park?

        The object decides (H6): while it exists the file stays and the next commit lists it again.
        """
        lost = []
        for path in paths:
            try:
                await self._remote.head(self._keys.data(path))
                lost.append(path)
            except AbsentError:
                node = self._catalog.at(path)
                if node is not None and path not in self._journal:
                    self._catalog.remove(node)
                    self._cache.remove(path)
                self._catalog.unpark([path])
        self._catalog.mark_parked_lost(lost)
