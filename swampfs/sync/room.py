"""Room for content on this machine's disk, as those who bring content there see it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

_PLENTY = 1 << 62


def is_full(error: OSError) -> bool:
    """Whether there is no room left on the disk, or in the quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


class Room:
    """Without a limit; see :class:`swampfs.fs.cache_limit.CacheLimit`."""

    def spare(self) -> int:
        """How many bytes may come without anything going for them."""
        return _PLENTY

    def came(self, size: int) -> None:
        """So many bytes of content are here that were not before."""

    def check(self) -> None:
        """Before content is written. Raises OSError (ENOSPC) while what is left is for the databases."""

    def databases_need_room(self) -> None:
        """One of them met a full disk: what it does next may succeed."""

    @contextmanager
    def keeping(self) -> Iterator[None]:
        """What comes meanwhile stays: it is needed all at once."""
        yield

    async def make_room(self, size: int) -> bool:
        """The disk is full, and so many bytes are wanted. Returns whether to try again."""
        return False
