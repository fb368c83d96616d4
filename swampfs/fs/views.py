"""``.swampfs/`` at the root of a mount: its state as files, answered from memory (``design/cli.md`` §3).

It is found by name and never listed, so that ``find`` and ``grep -r`` do not meet it.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from swampfs.fs.attributes import Attributes, Owner, fail, stale
from swampfs.fs.events import Events
from swampfs.fs.handles import Handles
from swampfs.records import Node

VIEW_BASE = 1 << 61
"""Inode of the directory; its files follow. Below the lock files', above every other."""
NAME = ".swampfs"
_EVENTS = "events"
_NEVER_LISTED = "query"
_KEPT_S = 2.0  # what a directory of links shows, before it is asked for again
_MOST_KNOWN = 500_000
_FILES = 4096  # inodes of files, before those of links


class Views:
    """``files``: name → what it says now. ``events``: what may be listened to.

    ``links``: what is in a directory of links, by its path below ours.

    ``old``: where a name in a directory of the tree leads that stands for an old version.
    ``private``: they name what directories hide from other users.
    ``sizes``: whether the kernel believes the next size, too; else they say none, as files of ``/proc``.
    """

    def __init__(
        self,
        owner: Owner,
        files: Mapping[str, Callable[[], str]],
        *,
        events: Events,
        tops: Sequence[str] = (),
        links: Callable[[str], Awaitable[Mapping[str, str | None] | None]] | None = None,
        old: Callable[[Node, str], str | None] = lambda directory, name: None,
        private: bool = False,
        sizes: bool = True,
    ) -> None:
        self._owner = owner
        self._others = (0o700 if private else 0o777) & ~owner.umask
        self._events = events
        self._sizes = sizes
        self._files: dict[str, Callable[[], str]] = {**files, _EVENTS: str}
        self._names = list(self._files)
        self._since_ns = time.time_ns()
        self._links = links
        self._old = old
        self._paths: dict[str, int] = {}  # of directories of links and of links
        self._nodes: dict[int, tuple[str, str | None]] = {}  # path and target
        self._listings: dict[str, tuple[float, dict[str, int]]] = {}
        self._last = VIEW_BASE + _FILES  # inode
        self._tops = {name: self._number(name, None) for name in tops}

    def lookup(self, parent: int, name: str) -> Attributes | None:
        """An entry of one of the directories, as :meth:`prepare` found it."""
        if parent == VIEW_BASE and name in self._files:
            return self.attributes(VIEW_BASE + 1 + self._names.index(name))
        ino = self._inside(parent).get(name)
        return None if ino is None else self.attributes(ino)

    def attributes(self, ino: int) -> Attributes:
        """Of the directory, or of one of its files as it is now. Raises ESTALE."""
        now = time.time_ns()
        if ino == VIEW_BASE or (ino in self._nodes and self._nodes[ino][1] is None):
            since = self._since_ns
            return Attributes(ino, stat.S_IFDIR | 0o555 & self._others, 2, *self._owner[:2], 0, 0, since, since, since)
        if ino in self._nodes:
            size = len(self.readlink(ino).encode())
            return Attributes(ino, stat.S_IFLNK | 0o777, 1, *self._owner[:2], size, 0, now, now, now)
        size = len(self._content(ino)) if self._sizes else 0
        return Attributes(ino, stat.S_IFREG | 0o444 & self._others, 1, *self._owner[:2], size, 0, now, now, now)

    def children(self, ino: int) -> list[tuple[str, Attributes]]:
        """By their inodes, ascending."""
        names = self._names if ino == VIEW_BASE else []  # who greps all of it shall not wait for what will happen
        files = [(name, VIEW_BASE + 1 + at) for at, name in enumerate(names) if name != _EVENTS]
        inside = sorted(self._inside(ino).items(), key=itemgetter(1))
        return [(name, self.attributes(number)) for name, number in (*files, *inside)]

    def readlink(self, ino: int) -> str:
        """Raises ESTALE, EINVAL."""
        path, target = self._nodes.get(ino, ("", None))
        if not path:
            raise stale(ino)
        if target is None:
            raise fail(errno.EINVAL, path)
        return target

    def old_version(self, directory: Node, name: str) -> Attributes | None:
        """A link from a directory of the tree to an old version, if a name stands for one."""
        target = self._old(directory, name) if "@" in name else None
        return None if target is None else self.attributes(self._number(f"@{directory.ino}/{name}", target))

    async def prepare(self, directory: int, name: str | None = None) -> None:
        """Find out what is in a directory of links, or whether ``name`` is. Raises what asking the catalog raises."""
        if len(self._nodes) > _MOST_KNOWN:
            self._forget()
        if self._links is None or directory not in self._nodes:
            return
        path = self._nodes[directory][0]
        await self._list(path)
        if name is not None and path == _NEVER_LISTED:  # what a predicate finds is found when it is named
            inner = f"{path}/{name}"
            if await self._list(inner) is not None:
                self._listings.setdefault(path, (0.0, {}))[1][name] = self._number(inner, None)

    async def _list(self, path: str) -> dict[str, int] | None:
        assert self._links is not None
        until, known = self._listings.get(path, (0.0, None))
        if known is not None and until > time.monotonic():
            return known
        found = await self._links(path)
        if found is None:
            self._listings.pop(path, None)
            return None
        up = "../" * (path.count("/") + 2)
        inside = {
            name: self._number(f"{path}/{name}", None if target is None else up + target)
            for name, target in found.items()
        }
        self._listings[path] = (time.monotonic() + _KEPT_S, inside)
        return inside

    def _inside(self, directory: int) -> dict[str, int]:
        if directory == VIEW_BASE:
            return self._tops
        path = self._nodes.get(directory, ("", None))[0]
        return self._listings.get(path, (0.0, {}))[1]

    def _number(self, path: str, target: str | None) -> int:
        """Its inode, which stays while it is known."""
        ino = self._paths.get(path)
        if ino is None:
            self._last += 1
            ino = self._paths[path] = self._last
        self._nodes[ino] = (path, target)
        return ino

    def _forget(self) -> None:
        """All but the first directories: who comes back is given other numbers."""
        self._paths = {name: ino for name, ino in self._paths.items() if "/" not in name}
        self._nodes = {ino: self._nodes[ino] for ino in self._paths.values()}
        self._listings.clear()

    def open(self, ino: int, handles: Handles) -> int:
        """Handle of a private copy of what the file says now, or of what will happen. Raises ESTALE."""
        content = self._content(ino)
        fd = os.memfd_create("view", os.MFD_CLOEXEC)
        os.pwrite(fd, content, 0)
        number = handles.add(fd, ino, os.O_RDONLY)
        if self._names[ino - VIEW_BASE - 1] == _EVENTS:
            handles[number].stream = self._events.listen()
        return number

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
