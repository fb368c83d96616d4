"""``.swampfs/`` at the root of a mount: its state as files, answered from memory (``design/cli.md`` §3).

It is found by name and never listed, so that ``find`` and ``grep -r`` do not meet it.
"""

from __future__ import annotations

import json
import os
import stat
import time
from collections.abc import Callable, Mapping
from typing import Any

from swampfs.fs.attributes import Attributes, Owner, stale

VIEW_BASE = 1 << 61
"""Inode of the directory; its files follow. Below the lock files', above every other."""
NAME = ".swampfs"


class Views:
    """``files``: name → what it says now. ``private``: they name what directories hide from other users."""

    def __init__(self, owner: Owner, files: Mapping[str, Callable[[], str]], *, private: bool = False) -> None:
        self._owner = owner
        self._others = 0o700 if private else 0o777
        self._files = dict(files)
        self._names = list(self._files)
        self._since_ns = time.time_ns()

    def lookup(self, name: str) -> Attributes | None:
        """A file of the directory."""
        return self.attributes(VIEW_BASE + 1 + self._names.index(name)) if name in self._files else None

    def attributes(self, ino: int) -> Attributes:
        """Of the directory, or of one of its files as it is now. Raises ESTALE."""
        if ino == VIEW_BASE:
            now = self._since_ns
            return Attributes(ino, stat.S_IFDIR | 0o555 & self._others, 2, *self._owner, 0, 0, now, now, now)
        now, size = time.time_ns(), len(self._content(ino))
        return Attributes(ino, stat.S_IFREG | 0o444 & self._others, 1, *self._owner, size, 0, now, now, now)

    def children(self) -> list[tuple[str, Attributes]]:
        return [(name, self.attributes(VIEW_BASE + 1 + at)) for at, name in enumerate(self._names)]

    def open(self, ino: int) -> int:
        """A private copy of what the file says now. Raises ESTALE."""
        fd = os.memfd_create("view", os.MFD_CLOEXEC)
        os.pwrite(fd, self._content(ino), 0)
        return fd

    def _content(self, ino: int) -> bytes:
        at = ino - VIEW_BASE - 1
        if not 0 <= at < len(self._names):
            raise stale(ino)
        return self._files[self._names[at]]().encode()


def lines(values: list[str]) -> str:
    return "".join(f"{value}\n" for value in values)


def document(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def records(values: list[dict[str, Any]]) -> str:
    """One JSON object per line."""
    return lines([json.dumps(value, ensure_ascii=False) for value in values])
