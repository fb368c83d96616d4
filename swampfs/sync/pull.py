"""Following the remote index: poll, apply the difference, say what the kernel must forget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Sequence

import trio

from swampfs.errors import AbsentError, StoreError
from swampfs.names import RelPath
from swampfs.records import Node, TreeChange
from swampfs.state.apply import apply_delta
from swampfs.sync.parts import Parts

log = logging.getLogger(__name__)


class Puller:
    """The metadata-only pull of the mount. Content is hydrated when it is opened."""

    def __init__(self, parts: Parts, busy: Container[str], drop_content: Callable[[Node], None]) -> None:
        self._drop_content = drop_content
        self._remote = parts.remote
        self._keys = parts.keys
        self._index = parts.index
        self._catalog = parts.catalog
        self._cache = parts.cache
        self._journal = parts.journal
        self._busy = busy

    async def pull(self) -> list[TreeChange]:
        """One request when nothing changed. Busy paths are left alone; remote deletes reach clean files only.

        Raises StoreError and its subclasses; the catalog then stays as it was.
        """
        while True:
            epoch = self._catalog.epoch
            known = self._catalog.watermark()
            if self._catalog.look_again():
                known = known._replace(meta_etag="", monolith_etag="")
            delta = await self._index.poll(known, self._catalog.partitions())
            if delta is None:
                return []
            if epoch == self._catalog.epoch:
                break  # else a push or another poll got further meanwhile: what we read may be the older
        applied = apply_delta(self._catalog, delta, self._busy)
        for node in applied.stale:
            self._drop_content(node)
        for path, mtime_ns in applied.retimed:
            self._cache.retime(path, mtime_ns)
        with trio.CancelScope(shield=True):  # the kernel must hear of what was applied, whoever asked for it
            applied.changes.extend(await self._judge_parked(applied.missing_parked))
        return applied.changes

    async def _judge_parked(self, paths: Sequence[RelPath]) -> list[TreeChange]:
        """An entry we parked in ``_root`` is gone: deleted by somebody, or dropped by a writer that does not park?

        The object decides (H6): while it exists, or cannot be asked for, the file stays and the next commit, which
        asks once more, lists it again.
        """
        changes = []
        for path in paths:
            try:
                await self._remote.head(self._keys.data(path))
            except AbsentError:
                node = self._catalog.at(path)
                self._catalog.unpark([path])
                if node is not None and path not in self._busy:
                    self._catalog.remove(node)
                    self._drop_content(node)
                    changes.append(TreeChange(node.parent, node.name, node.ino))
                continue
            except StoreError as error:
                log.info("cannot tell whether %s was deleted, keeping it: %s", path, error)
            self._catalog.mark_parked_lost([path])
        return changes
