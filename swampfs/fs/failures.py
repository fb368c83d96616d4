"""What failed lately, on which path and why: for ``swampfs explain`` and ``.swampfs/errors``."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from cachetools import LRUCache

from swampfs.errors import SwampfsError
from swampfs.fs.inodes import Inodes
from swampfs.names import join
from swampfs.records import Node, Residency, timestamp
from swampfs.state.catalog import Catalog

_MOST = 1000  # paths
ANSWERS = frozenset({errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR, errno.EISDIR, errno.EXDEV})
ANSWERS |= {errno.ENODATA, errno.ENOSYS, errno.ENOTTY, errno.EOPNOTSUPP, errno.ELOOP}
"""Errors that are answers to ordinary questions: nobody asks why."""


_OF_REQUESTS = {
    errno.ETIMEDOUT: "its time was over before the datastore, or the holder of a lock, had answered",
    errno.EILSEQ: "the name is not UTF-8",
    errno.ENAMETOOLONG: "a name has at most 255 bytes",
}

_MAKING = ("create", "mkdir", "symlink", "mknod", "link")
_READING = ("open", "read")

log = logging.getLogger(__name__)


class Failure(NamedTuple):
    """The last of one path. Times in nanoseconds since the epoch; ``times``: in a row, since ``first_ns``."""

    path: str
    operation: str
    errno: int
    why: str
    at_ns: int
    first_ns: int
    times: int

    def is_over(self, node: Node) -> bool:
        """Whether it was done since, as far as can be seen of what has the name now."""
        if self.operation in _MAKING or node.ctime_ns > self.at_ns:
            return True
        return self.operation in _READING and node.residency is not Residency.STUB

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
        return f"{told['at']} {self.operation} {self.path!r}: {told['errno']}: {self.why}"


class Failures:
    """Of one mount; nothing is noted of what succeeds."""

    def __init__(self, catalog: Catalog, inodes: Inodes) -> None:
        self._catalog = catalog
        self._inodes = inodes
        self._last: LRUCache[str, Failure] = LRUCache(_MOST)
        self.on_failure: Callable[[Failure], None] = lambda failure: None
        """Told of each; set by the composition root."""

    def note(self, operation: str, ino: int, name: bytes | None, code: int, error: Exception | None) -> None:
        """An operation on an inode, or on a name in a directory, was answered with an error. Never raises.

        ``error=None``: of the request itself. Of what is in the local tier nothing is noted.
        """
        # What is there and cannot be opened has lost its object; a stale inode is looked up again by the kernel.
        is_answer = code in ANSWERS and not (code == errno.ENOENT and operation == "open")
        if is_answer or (code == errno.ESTALE and operation != "write"):
            return
        try:
            node = self._catalog.node(self._inodes.resolve(ino))
        except Exception as unknown:  # it may be why the operation failed
            log.debug("what failed has no name: %s", unknown)
            return
        if node is None:
            return
        path = node.path if name is None else join(node.path, name.decode(errors="replace"))
        self.note_at(path, operation, code, error)

    def note_at(self, path: str, operation: str, code: int, error: Exception | None) -> None:
        """As :meth:`note`, where the path is known."""
        now, before = time.time_ns(), self._last.get(path)
        again = before is not None and (before.operation, before.errno) == (operation, code)
        first, times = (before.first_ns, before.times + 1) if before is not None and again else (now, 1)
        failure = self._last[path] = Failure(path, operation, code, _why(code, error), now, first, times)
        self.on_failure(failure)

    def of(self, path: str) -> Failure | None:
        return self._last.get(path)

    def recent(self) -> list[Failure]:
        """The latest last."""
        return sorted(self._last.values(), key=lambda failure: failure.at_ns)


def _why(code: int, error: Exception | None) -> str:
    """Without the names of this machine's own files."""
    if isinstance(error, SwampfsError):
        return error.line()
    if isinstance(error, OSError):
        return error.strerror or os.strerror(code)
    return _OF_REQUESTS.get(code, os.strerror(code)) if error is None else f"unexpected {type(error).__name__}"
