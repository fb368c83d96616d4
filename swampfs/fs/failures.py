"""What failed lately, on which path and why: for ``swampfs explain`` and ``.swampfs/errors``."""

from __future__ import annotations

import errno
import time
from typing import Any, NamedTuple

from cachetools import LRUCache

from swampfs.errors import SwampfsError
from swampfs.fs.inodes import Inodes
from swampfs.names import join
from swampfs.records import timestamp
from swampfs.state.catalog import Catalog

_MOST = 1000  # paths
ANSWERS = frozenset({errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EXDEV})
ANSWERS |= {errno.ENODATA, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.ELOOP}
"""Errors that are answers to ordinary questions: nobody asks why."""


class Failure(NamedTuple):
    """The last of one path. Times in nanoseconds since the epoch; ``times``: in a row, since ``first_ns``."""

    path: str
    operation: str
    errno: int
    why: str
    at_ns: int
    first_ns: int
    times: int

    def as_json(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "operation": self.operation,
            "errno": errno.errorcode.get(self.errno, str(self.errno)),
            "why": self.why,
            "at": timestamp(self.at_ns),
            "since": timestamp(self.first_ns),
            "times": self.times,
        }

    def line(self) -> str:
        told = self.as_json()
        return f"{told['at']} {self.operation} {self.path}: {told['errno']}: {self.why}"


class Failures:
    """Of one mount; nothing is noted of what succeeds."""

    def __init__(self, catalog: Catalog, inodes: Inodes) -> None:
        self._catalog = catalog
        self._inodes = inodes
        self._last: LRUCache[str, Failure] = LRUCache(_MOST)

    def note(self, operation: str, ino: int, name: bytes | None, code: int, error: Exception | None) -> None:
        """An operation on an inode, or on a name in a directory, was answered with an error.

        ``error=None``: its time was over. Of what is in the local tier nothing is noted.
        """
        # What is there and cannot be opened has lost its object; a stale inode is looked up again by the kernel.
        is_answer = code in ANSWERS and not (code == errno.ENOENT and operation == "open")
        if is_answer or (code == errno.ESTALE and operation != "write"):
            return
        node = self._catalog.node(self._inodes.resolve(ino))
        if node is None:
            return
        path = node.path if name is None else join(node.path, name.decode(errors="replace"))
        why = "its time was over before the datastore, or the holder of a lock, had answered"
        if error is not None:
            why = error.line() if isinstance(error, SwampfsError) else str(error)
        now, before = time.time_ns(), self._last.get(path)
        again = before is not None and (before.operation, before.errno) == (operation, code)
        first, times = (before.first_ns, before.times + 1) if before is not None and again else (now, 1)
        self._last[path] = Failure(path, operation, code, why, now, first, times)

    def of(self, path: str) -> Failure | None:
        return self._last.get(path)

    def recent(self) -> list[Failure]:
        """The latest last."""
        return sorted(self._last.values(), key=lambda failure: failure.at_ns)
