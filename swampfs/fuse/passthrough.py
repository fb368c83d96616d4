"""Reads that the kernel does by itself: ``FUSE_PASSTHROUGH`` (Linux 6.9, root only; decision 0013).

Agreed in the INIT handshake that passes through the fast lane. From then on an ``open`` may be answered with the number
of a file of this machine that was registered at the device, and its bytes never pass through this process again.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import struct
from collections.abc import Mapping

from swampfs.fuse import kernel
from swampfs.fuse.mountpoint import mounts

log = logging.getLogger(__name__)

_BACKING_OPEN = 0x4010E501  # _IOW(229, 1, struct fuse_backing_map)
_BACKING_CLOSE = 0x4004E502  # _IOW(229, 2, uint32_t)
_BACKING = struct.Struct("=iIQ")
_NUMBER = struct.Struct("=I")
_INIT_IN = struct.Struct("=IIIII")  # major, minor, read-ahead, flags, second flags
_FLAGS, _SECOND_FLAGS, _DEPTH = 12, 32, 36  # offsets in struct fuse_init_out
_WORD = struct.Struct("=I")
_EXTENDED = 1 << 30  # of the flags: there are second flags
_WRITEBACK = 1 << 16
_PASSTHROUGH = 1 << 5  # of the second flags
_STACKED = ("overlay", "ecryptfs", "fuse")
_NEVER = (errno.EPERM, errno.ENOTTY, errno.EOPNOTSUPP, errno.ELOOP)  # it will not work for another file either


class Passthrough:
    """Of one connection. Keeps silent about what the kernel cannot do: files are then read as ever."""

    def __init__(self, device: int, *, wanted: bool, state_dir: str) -> None:
        self._device = device
        self._wanted = wanted
        self._depth = 2 if _is_stacked(state_dir) else 1
        self.is_agreed = False

    def agree(self, request: bytes, reply: memoryview) -> None:
        """Ask for it in the ``reply`` to INIT, if the kernel's ``request`` offers it."""
        if not self._wanted or os.geteuid() != 0:
            return
        body = kernel.REPLY.size
        _, _, _, flags, more = _INIT_IN.unpack_from(request, kernel.REQUEST.size)
        (wanted,) = _WORD.unpack_from(reply, body + _FLAGS)
        if not (flags & _EXTENDED and more & _PASSTHROUGH) or wanted & _WRITEBACK:
            return
        (also,) = _WORD.unpack_from(reply, body + _SECOND_FLAGS)
        _WORD.pack_into(reply, body + _FLAGS, wanted | _EXTENDED)
        _WORD.pack_into(reply, body + _SECOND_FLAGS, (also if wanted & _EXTENDED else 0) | _PASSTHROUGH)
        _WORD.pack_into(reply, body + _DEPTH, self._depth)
        self.is_agreed = True

    def register(self, fd: int) -> int:
        """The kernel's number for an open file, until :meth:`unregister`; 0: it is not to be had."""
        if not self.is_agreed:
            return 0
        try:
            return int(fcntl.ioctl(self._device, _BACKING_OPEN, bytearray(_BACKING.pack(fd, 0, 0))))
        except OSError as error:
            if error.errno in _NEVER:
                log.info("the kernel does not read files of this machine by itself: %s", error)
                self.is_agreed = False
            return 0

    def unregister(self, number: int) -> None:
        try:
            fcntl.ioctl(self._device, _BACKING_CLOSE, _NUMBER.pack(number))
        except OSError as error:
            log.info("the kernel keeps a file of this machine: %s", error)


def _is_stacked(directory: str) -> bool:
    """Whether a directory is on a file system that is itself on another one."""
    return _types().get(os.stat(directory).st_dev, "").startswith(_STACKED)


def _types() -> Mapping[int, str]:
    """Device number → type of its file system."""
    found = {}
    for mount in mounts():
        major, _, minor = mount.device.partition(":")
        found[os.makedev(int(major), int(minor))] = mount.kind
    return found
