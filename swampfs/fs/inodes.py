"""Which inodes the kernel holds, and the ones that lost their name while it does.

A reader may have looked up a file just before another process replaced it; its ``open`` must then still reach the
replaced content (architecture §7: a spurious ENOENT in other file systems). Such an inode is an *orphan* until FORGET.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from swampfs.fs.attributes import stale
from swampfs.records import Change, Node


@dataclass(slots=True)
class Orphan:
    """A nameless inode: its last attributes, and its content if it is on this machine."""

    node: Node
    content: str | None
    replaced: bool = False  # by another machine: the name stands for other content, or for none

    def set_attributes(self, change: Change, descriptor: int | None) -> None:
        """``descriptor`` is of an open handle, if there is any. Raises ESTALE for what was replaced."""
        if change.size is not None and self.replaced:
            raise stale(self.node.ino)  # as a write is: the name stands for another machine's version
        where = self.content if descriptor is None else descriptor
        if where is not None:
            if change.size is not None:
                os.truncate(where, change.size)
            if change.mtime_ns is not None:
                os.utime(where, ns=(change.mtime_ns, change.mtime_ns))
        self.node = self.node._replace(
            mode=self.node.mode if change.mode is None else change.mode & 0o7777,
            uid=self.node.uid if change.uid is None else change.uid,
            gid=self.node.gid if change.gid is None else change.gid,
        )

    def drop_content(self) -> None:
        """It takes no room any more; who has it open keeps it."""
        if self.content is not None and os.path.lexists(self.content):
            os.unlink(self.content)
        self.content = None


class Inodes:
    """Lookup counts as the kernel counts them (its memory bounds ours), and orphans."""

    def __init__(self) -> None:
        self._lookups: dict[int, int] = {}
        self.orphans: dict[int, Orphan] = {}
        self._aliases: dict[int, int] = {}  # renamed to the other tier: the kernel still says the old inode

    def alias(self, old: int, new: int) -> None:
        """A file got another inode by a rename across tiers; until FORGET both numbers mean it."""
        self._aliases[old] = new

    def is_alias(self, ino: int) -> bool:
        """Whether the kernel knows an inode by another number, too."""
        return bool(self._aliases) and ino in self._aliases.values()

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
        if orphan is not None:
            orphan.drop_content()
        return True
