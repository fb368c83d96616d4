"""Which inodes the kernel holds, and the ones that lost their name while it does.

A reader may have looked up a file just before another process replaced it; its ``open`` must then still reach the
replaced content (architecture §7: a spurious ENOENT in other file systems). Such an inode is an *orphan* until FORGET.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from swampfs.records import Node


@dataclass(slots=True)
class Orphan:
    """A nameless inode: its last attributes, and its content if it is on this machine."""

    node: Node
    content: str | None
    replaced: bool = False  # by another machine: the name stands for other content, or for none


class Inodes:
    """Lookup counts as the kernel counts them (its memory bounds ours), and orphans."""

    def __init__(self) -> None:
        self._lookups: dict[int, int] = {}
        self.orphans: dict[int, Orphan] = {}
        self._aliases: dict[int, int] = {}  # renamed to the other tier: the kernel still says the old inode

    def alias(self, old: int, new: int) -> None:
        """A file got another inode by a rename across tiers; until FORGET both numbers mean it."""
        self._aliases[old] = new

    def resolve(self, ino: int) -> int:
        return self._aliases.get(ino, ino)

    def looked_up(self, ino: int) -> None:
        self._lookups[ino] = self._lookups.get(ino, 0) + 1

    def is_held(self, ino: int) -> bool:
        return ino in self._lookups

    def __len__(self) -> int:
        return len(self._lookups)

    def forget(self, ino: int, count: int) -> bool:
        """Returns whether the kernel holds it no longer."""
        left = self._lookups.get(ino, 0) - count
        if left > 0:
            self._lookups[ino] = left
            return False
        self._lookups.pop(ino, None)
        self._aliases.pop(ino, None)
        orphan = self.orphans.pop(ino, None)
        if orphan is not None and orphan.content is not None and os.path.lexists(orphan.content):
            os.unlink(orphan.content)
        return True
