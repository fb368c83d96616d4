"""Files that the kernel maps by itself while somebody has them open for writing (decision 0013).

What is written through such a mapping is written to the file of this machine, and nobody is told. So it is assumed:
whoever could write so has changed the file, when it is opened, when it is published, and when it is closed; and it is
not closed before no mapping is left.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from swampfs.fs.handles import Handle, Handles, is_written


class Mapped:
    """Of one mount."""

    def __init__(self, handles: Handles, announce: Callable[[Handle], None], close: Callable[[Handle], None]) -> None:
        """``announce``: a handle's file is about to change. ``close``: of a handle that was released."""
        self._handles = handles
        self._announce = announce
        self._close = close
        self._lingering: list[Handle] = []  # released, and something may still be written

    def announce(self) -> None:
        """Whatever may be written without our being told counts as changed from here on."""
        for handle in (*self._handles.by_number.values(), *self._lingering):
            if handle.is_mapped:
                self._announce(handle)

    def linger(self, handle: Handle) -> bool:
        """Whether a handle that is released has to be kept, since a mapping may have outlived it."""
        assert handle.file is not None
        self._announce(handle)
        reader = os.open(f"/proc/self/fd/{handle.fd}", os.O_RDONLY | os.O_CLOEXEC)
        writers = handle.file.writers
        writers[writers.index(handle.fd)] = reader
        os.close(handle.fd)
        handle.fd = reader
        if is_written(reader):
            self._lingering.append(handle)
            return True
        return False

    def end(self) -> None:
        """Close what nobody can write any more."""
        for handle in [handle for handle in self._lingering if not is_written(handle.fd)]:
            self._lingering.remove(handle)
            self._close(handle)
