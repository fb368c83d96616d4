"""What of a cache may hold unpushed work: marks of this library and of the existing extensions, as one set.

Two records. The sidecar (spec §4) is what every client reads: up to 200 paths, then "everything". The mark log keeps
all paths with a generation, so that a mark made during a push survives it. Both are written before ``mark_dirty``
returns; a crash in between leaves one of them, and either is enough.
"""

from __future__ import annotations

import os
import posixpath
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from swampfs.names import NAMESPACE_MANIFEST, SYNCED_DIRECTORIES
from swampfs.records import Watermark, timestamp
from swampfs.state.marks import MarkLog
from swampfs.state.sidecar import MAX_PATHS, Sidecar, SidecarState

_PATIENCE_S = 600.0


class MarkedPaths:
    """Namespace-relative paths, each standing for itself and everything below it."""

    def __init__(self, paths: Iterable[str], *, bulk: bool) -> None:
        self.paths = tuple(sorted(paths))
        self.bulk = bulk
        self.exact = frozenset(self.paths)

    def __contains__(self, path: object) -> bool:
        if not self.exact:
            return False
        at = str(path)
        while at:
            if at in self.exact:
                return True
            at = at.rpartition("/")[0]
        return False


class Marks(NamedTuple):
    """The marks as of one moment; :meth:`MarkBook.retire` clears exactly these."""

    paths: MarkedPaths
    overflowed: bool
    dirty: bool
    sidecar: SidecarState | None
    done: frozenset[str]  # cache-relative paths that a push fulfils
    foreign: frozenset[str]  # of other namespaces: not ours to clear
    cut: int

    @property
    def walk_all(self) -> bool:
        return self.paths.bulk or not self.paths.paths

    @property
    def lazy(self) -> bool:
        """Absent content means "not hydrated", not "deleted"."""
        return self.sidecar is not None and self.sidecar.lazy


class MarkBook:
    """Marks of one cache, seen from one namespace."""

    def __init__(self, log: MarkLog, sidecar: Sidecar, root: str, namespace: str) -> None:
        self._log = log
        self._sidecar = sidecar
        self._root = root
        self._namespace = namespace
        self._seen: tuple[str, SidecarState | None] | None = None

    def mark(self, rel: str | None) -> int:
        """Durable before return; no look at the file, which need not exist (spec §4). Returns the generation."""
        normal = posixpath.normpath(rel) if rel else ""
        if normal.startswith(("/", "../")) or normal in ("..", "."):
            normal = ""
        generation = self._log.mark(normal)
        state = self._current_sidecar()
        if state is not None and state.local_dirty and (state.bulk or normal in state.paths):
            return generation  # nothing that another path could add
        if normal:
            self._sidecar.mark_path(normal)
        else:
            self._sidecar.mark_bulk()
        return generation

    def _current_sidecar(self) -> SidecarState | None:
        """Read again only when somebody replaced it: a burst of marks must not read it each time (lesson 50)."""
        stamp = self._sidecar.stamp()
        if self._seen is None or self._seen[0] != stamp:
            self._seen = (stamp, self._sidecar.load())
        return self._seen[1]

    def now(self) -> Marks:
        """Everything marked so far."""
        state = self._sidecar.load()
        own, cut = self._log.marked()
        dirty = bool(own) or state is None or state.dirty
        # Dirty without a path, or no sidecar at all: somebody knows of work, nobody knows where (spec §4).
        bulk = state is None or state.bulk or "" in own or (state.local_dirty and not state.paths)
        paths = {*own, *(state.paths if state else ())} - {""}
        foreign = frozenset(path for path in paths if self._is_foreign(path))
        done = frozenset(paths - foreign)
        head = f"{self._namespace}/" if self._namespace else ""
        inside = [path.removeprefix(head) for path in done if path.startswith(head)]
        # In a namespace, a path that is in none says nothing of its own files, but that there is work somewhere (H16).
        marked = MarkedPaths(inside, bulk=bulk or len(inside) < len(done))
        return Marks(marked, state is not None and state.overflowed, dirty, state, done, foreign, cut)

    def _is_foreign(self, path: str) -> bool:
        """Of another namespace: one that is registered here, or at least no directory of swamp's own."""
        head = path.partition("/")[0]
        if head == self._namespace or (not self._namespace and not self._is_namespace(head)):
            return False
        return self._is_namespace(head) or head not in SYNCED_DIRECTORIES

    def _is_namespace(self, head: str) -> bool:
        return os.path.exists(os.path.join(self._root, head, NAMESPACE_MANIFEST))

    def _has_others(self) -> bool:
        return any(name != self._namespace and self._is_namespace(name) for name in os.listdir(self._root))

    def was_marked(self, path: str, after: int) -> bool:
        """Whether a namespace-relative path was marked since. Called by workers."""
        if self._log.newest() <= after:
            return False
        later, _ = self._log.marked(after)
        head = f"{self._namespace}/" if self._namespace else ""
        return head + path in MarkedPaths(later, bulk=False)

    def mark_unsettled(self) -> int:
        """A push is about to send what nobody marked. Returns the generation of its own mark for that."""
        generation = self._log.mark("")
        self._sidecar.mark_unsettled()
        return generation

    def still_awaited(self, paths: Iterable[str]) -> set[str]:
        """Of marks that a push found nothing for: the write they announce may be about to come, for a while."""
        return self._log.young(paths, _PATIENCE_S)

    def retire(self, marks: Marks, own: Sequence[int], keep: Iterable[str], watermark: Watermark | None) -> None:
        """What these marks, and those the push itself made, announced is committed; but for ``keep``.

        ``watermark`` only if the cache has every file of the index.
        """
        kept = set(keep)
        later, seen = self._log.marked(marks.cut)
        newer = [path for path, generation in later.items() if generation not in own]
        self._sidecar.retire(
            marks.done - kept,
            [*newer, *sorted(kept - set(newer))][: MAX_PATHS + 1],
            watermark,
            timestamp(time.time_ns()),
            bulk_done=marks.paths.bulk and not (self._namespace and self._has_others()),
        )
        for path in self._log.marked(seen)[0]:
            # Marked by another process between our two looks: its sidecar write may have come before ours.
            self._sidecar.mark_path(path) if path else self._sidecar.mark_bulk()
        self._log.retire(marks.cut, own, keep=marks.foreign | kept)
