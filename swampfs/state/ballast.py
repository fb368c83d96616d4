"""Room that content cannot take: a file that is given up when the disk is full, so that databases can go on.

Without it a disk full of content could not be emptied: a removal is a journal entry first.
"""

from __future__ import annotations

import os

SIZE = 4 << 20
"""Bytes: hundreds of journal entries, and the index of a push."""


class Ballast:
    """Held while there is room."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.held = False
        self.hold()

    def hold(self) -> bool:
        """Take the room, if it is there. Returns whether it is held."""
        if not self.held:
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(fd, 0, SIZE)
                self.held = True
            except OSError:
                os.ftruncate(fd, 0)
            finally:
                os.close(fd)
        return self.held

    def release(self) -> None:
        """Leave the room to the databases."""
        if self.held:
            os.truncate(self._path, 0)
            self.held = False
