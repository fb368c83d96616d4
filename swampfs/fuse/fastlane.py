"""The fast lane: requests of the kernel that need no wait are answered before pyfuse3 sees them (decision 0012).

The lane reads ``/dev/fuse``. What it can answer at once, from memory, the catalog or a local file, it answers with one
system call; everything else it hands, byte for byte, to pyfuse3 through a socket that stands in the place of the
device, and what pyfuse3 answers it hands back. All of it runs on the loop, so a request answered here is to the file
system what a handler without a wait is. Reads and writes that must wait do so in a task here: only what is small passes
through the socket, so that no answer of pyfuse3 ever has to wait for the socket to be read.

After an answer the lane looks for the next request for a moment before it lets the loop go on: a process that walks a
tree asks again within microseconds.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from typing import Any

import pyfuse3
import trio
from pyfuse3 import FileHandleT, FUSEError

from swampfs.fs.attributes import Caller
from swampfs.fs.failures import ANSWERS
from swampfs.fs.immediate import Immediate
from swampfs.fs.vfs import FileSystem
from swampfs.fs.views import VIEW_BASE
from swampfs.fuse import kernel
from swampfs.fuse.kernel import Op
from swampfs.fuse.operations import CACHE_S, DOTS, LONGEST_NAME, Operations, errno_of
from swampfs.fuse.passthrough import Passthrough
from swampfs.state.schema import is_disk_full

log = logging.getLogger(__name__)

LATER = None
"""A handler's answer for what it leaves to pyfuse3. It has changed nothing."""
NOTHING = bytes(bytearray(b"no answer"))
"""A handler's answer for a request that gets none. Compared by identity: no content of a file is this very object."""
_OK = b""
_LARGEST = 1 << 17  # bytes of anything but a write and its answer
_SLICE_S = 0.002  # for which the loop may have to wait for the lane
_LOOK_S = 100e-6  # for the next request, while that pays
_TRIES = 8  # looks in vain, after which it does not
_GONE = (errno.ENODEV, errno.ECONNABORTED)
_CACHE_S = int(CACHE_S)
_HEAD = kernel.REQUEST.size
_NAMES_AT: dict[int, int] = {Op.LOOKUP: 0, Op.CREATE: kernel.CREATE_IN.size, Op.MKDIR: kernel.MKDIR_IN.size}
_BYTES = kernel.WRITE_IN.size

Handler = Callable[[kernel.Request, memoryview], bytes | None]


def is_possible() -> bool:
    """Whether this kernel lets libfuse read from a socket as it does from the device (Linux 6.5)."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reader, writer = os.pipe()
    try:
        ours.send(b"?")
        return os.splice(theirs.fileno(), writer, 64) == 1
    except OSError:
        return False
    finally:
        for descriptor in (reader, writer):
            os.close(descriptor)
        ours.close()
        theirs.close()


class FastLane:
    """Between the device and pyfuse3. Made when the session is, before anything was read from the device."""

    def __init__(self, fs: FileSystem, operations: Operations, session_fd: int, *, passthrough: bool) -> None:
        """Takes the place of the device at ``session_fd``; :meth:`close` gives it back.

        ``passthrough``: whether the kernel may read files of this machine by itself, if it can.
        """
        self._fs, self._now = fs, Immediate(fs)
        self._operations = operations
        self._session_fd = session_fd
        self._device = os.dup(session_fd)
        os.set_blocking(self._device, False)
        self.passthrough = Passthrough(self._device, wanted=passthrough, state_dir=fs.sync.cache.home)
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.setblocking(False)
        os.dup2(theirs.fileno(), session_fd, inheritable=False)
        theirs.close()
        self._buffer = bytearray(_LARGEST)
        self._view = memoryview(self._buffer)
        self._waiting: deque[bytes] = deque()  # for pyfuse3 to read them
        self._some_wait = trio.Event()
        self._at_work: dict[int, trio.CancelScope | None] = {}  # by unique, what waits here; None: to its own end
        self._to_edit: dict[int, kernel.Request | bytes] = {}  # by unique: INIT as it came, and opens
        poller = select.poll()
        poller.register(self._device, select.POLLIN)
        self._poll = poller.poll
        self.on_begin: Callable[[], None] = lambda: None
        """Called once, when the kernel and pyfuse3 have agreed on what both can do."""
        self._has_begun = False
        self._in_vain = 0  # looks for a next request, since one was found
        self._last = 0.0  # answer, on the clock
        self.answered: Counter[int] = Counter()
        """Requests that were answered here, by opcode."""
        self.passed: Counter[int] = Counter()
        """Requests that went on to pyfuse3, by opcode."""
        self._handlers: dict[int, Handler] = {
            Op.LOOKUP: self._lookup,
            Op.GETATTR: self._getattr,
            Op.OPENDIR: self._opendir,
            Op.READDIRPLUS: self._readdirplus,
            Op.RELEASEDIR: self._releasedir,
            Op.OPEN: self._open,
            Op.READ: self._read,
            Op.RELEASE: self._release,
            Op.CREATE: self._create,
            Op.MKDIR: self._mkdir,
            Op.WRITE: self._write,
            Op.SETATTR: self._setattr,
            Op.INTERRUPT: self._interrupt,
            Op.IOCTL: self._ioctl,
            Op.FORGET: self._forget,
            Op.BATCH_FORGET: self._batch_forget,
        }

    def close(self) -> None:
        """Pyfuse3 has the device again; nothing is answered here any more."""
        if self._device >= 0:
            os.dup2(self._device, self._session_fd, inheritable=False)
            self._fs.files.handles.backing = None
            os.close(self._device)
            self._device = -1
            self._socket.close()

    # --- the loop -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Answer and pass on until the kernel unmounts."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._hand_on)
            self._nursery.start_soon(self._hand_back)
            while self._drain():
                await trio.lowlevel.wait_readable(self._device)
            self._nursery.cancel_scope.cancel()
        pyfuse3.terminate()

    def _drain(self) -> bool:
        """Everything that is there now or comes soon. Returns whether the mount still is."""
        began = last = time.perf_counter()
        if began - self._last < 2 * _LOOK_S:
            self._in_vain = 0  # it came so soon that to look for it would have paid
        look_s = _LOOK_S if self._in_vain < _TRIES else 0.0
        poll, device, buffers = self._poll, self._device, [self._buffer]
        while True:
            while not poll(0):
                if time.perf_counter() - last > look_s:
                    self._in_vain += 1
                    return True
                os.sched_yield()  # whoever is to ask may need this very processor
            try:
                length = os.readv(device, buffers)
            except (BlockingIOError, InterruptedError):
                continue  # the request is gone
            except OSError as error:
                if error.errno == errno.ENOENT:
                    continue  # interrupted before it was read
                if error.errno in _GONE:
                    return False
                raise
            if last > began:
                self._in_vain = 0
            self._answer(length)
            self._last = last = time.perf_counter()
            if last - began > _SLICE_S:
                return True

    def _answer(self, length: int) -> None:
        request = kernel.Request._make(kernel.REQUEST.unpack_from(self._buffer))
        handler = self._handlers.get(request.opcode)
        if handler is None:
            self._pass_on(request, length)
            return
        try:
            body = handler(request, self._view[_HEAD:length])
            if body is LATER:
                self._pass_on(request, length)
                return
            code = 0
        except Exception as error:
            number = self._number(error)
            if number not in ANSWERS:
                self._note(request, length, number, error)
            code, body = -number, b""
        self.answered[request.opcode] += 1
        if body is not NOTHING:
            self._reply(kernel.REPLY.pack(kernel.REPLY.size + len(body), code, request.unique), body)

    def _note(self, request: kernel.Request, length: int, number: int, error: Exception) -> None:
        """Keep why, for whoever asks."""
        begins = _NAMES_AT.get(request.opcode)
        name = None if begins is None else bytes(self._view[_HEAD + begins : length - 1])
        self._fs.failures.note(kernel.name_of(request.opcode).lower(), request.ino, name, number, error)

    def _number(self, error: Exception) -> int:
        """As :func:`swampfs.fuse.operations.handler` maps it."""
        code = errno_of(error)
        if code is None:
            log.error("a request failed", exc_info=error)
        elif code == errno.ENOSPC and is_disk_full(error):
            self._operations.disk_is_full()
        return code or errno.EIO

    def _wait_for(self, unique: int, work: Callable[[], Awaitable[bytes]], *, for_ever: bool = False) -> bytes:
        """Answer when a handler of pyfuse3 has; what may wait ``for_ever`` ends when the caller is interrupted."""
        scope = trio.CancelScope()

        async def wait() -> None:
            code, body = -errno.EINTR, b""
            with scope:
                try:
                    code, body = 0, await work()
                except FUSEError as error:
                    code = -error.errno
            del self._at_work[unique]
            self._reply(kernel.REPLY.pack(kernel.REPLY.size + len(body), code, unique), body)

        self._at_work[unique] = scope if for_ever else None
        self._nursery.start_soon(wait)
        return NOTHING

    def _interrupt(self, request: kernel.Request, body: memoryview) -> bytes | None:
        """Most wait until their handler's deadline; pyfuse3 knows nothing of those who wait here."""
        (unique,) = kernel.INTERRUPT_IN.unpack_from(body)
        if unique not in self._at_work:
            return LATER
        scope = self._at_work[unique]
        if scope is not None:
            scope.cancel()
        return NOTHING

    def _reply(self, *parts: bytes | memoryview) -> None:
        try:
            os.writev(self._device, parts)
        except OSError as error:
            if error.errno != errno.ENOENT and error.errno not in _GONE:  # nobody waits for it any more
                log.exception("the kernel refused an answer")

    def as_json(self) -> dict[str, Any]:
        """``status``: requests of the kernel by name, those answered here and those that pyfuse3 got."""
        both = {"answered": self.answered, "passed": self.passed}
        named = {
            where: {kernel.name_of(opcode): count for opcode, count in sorted(counts.items())}
            for where, counts in both.items()
        }
        return {**named, "passthrough": self.passthrough.is_agreed}

    def forget_inode(self, ino: int) -> None:
        """Make the kernel ask for the attributes of an inode again. Raises FileNotFoundError if it knows none."""
        self._notify(kernel.NOTIFY_INVALIDATE_INODE, kernel.INVALIDATE_INODE.pack(ino, -1, 0))

    def forget_listing(self, directory: int) -> None:
        """Make the kernel list a directory anew. Raises FileNotFoundError as above."""
        self._notify(kernel.NOTIFY_INVALIDATE_INODE, kernel.INVALIDATE_INODE.pack(directory, 0, 0))

    def forget_name(self, directory: int, name: bytes) -> None:
        """Make the kernel look a name up again; waits for its directory. Raises FileNotFoundError as above."""
        body = kernel.INVALIDATE_NAME.pack(directory, len(name), 0)
        self._notify(kernel.NOTIFY_INVALIDATE_NAME, body + name + b"\0")

    def _notify(self, kind: int, body: bytes) -> None:
        if self._device >= 0:
            os.write(self._device, kernel.REPLY.pack(kernel.REPLY.size + len(body), kind, 0) + body)

    # --- pyfuse3 ------------------------------------------------------------------------------------------

    def _pass_on(self, request: kernel.Request, length: int) -> None:
        self.passed[request.opcode] += 1
        if request.opcode in (Op.READDIR, Op.FSYNCDIR):
            kernel.HANDLE.pack_into(self._buffer, _HEAD, request.ino)  # of a directory: it is what pyfuse3 gives out
        if request.opcode in (Op.INIT, Op.OPEN, Op.CREATE):
            self._to_edit[request.unique] = bytes(self._view[:length]) if request.opcode == Op.INIT else request
        if self._waiting or not self._send(self._view[:length]):
            self._waiting.append(bytes(self._view[:length]))
            self._some_wait.set()

    def _send(self, request: bytes | memoryview) -> bool:
        """``False``: the socket is full. What it can never take is refused."""
        try:
            self._socket.send(request)
        except BlockingIOError:
            return False
        except OSError as error:
            log.info("a request could not be handed on: %s", error)
            unique = kernel.REQUEST.unpack_from(request)[2]
            self._reply(kernel.REPLY.pack(kernel.REPLY.size, -errno.EIO, unique))
        return True

    async def _hand_on(self) -> None:
        """What pyfuse3 could not take at once."""
        while True:
            await self._some_wait.wait()
            while self._waiting:
                await trio.lowlevel.wait_writable(self._socket)
                while self._waiting and self._send(self._waiting[0]):
                    self._waiting.popleft()
            self._some_wait = trio.Event()

    async def _hand_back(self) -> None:
        """Answers of pyfuse3."""
        buffer = bytearray(_LARGEST)
        view = memoryview(buffer)
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            with contextlib.suppress(BlockingIOError):
                while True:
                    length = self._socket.recv_into(buffer)
                    if not length:
                        return  # pyfuse3 has ended
                    if self._to_edit:
                        self._edit(view[:length])
                    self._reply(view[:length])
                    if not self._has_begun:
                        self._has_begun = True
                        self.on_begin()

    def _edit(self, reply: memoryview) -> None:
        """What pyfuse3 does not know of: which files the kernel reads by itself."""
        _, code, unique = kernel.REPLY.unpack_from(reply)
        request = self._to_edit.pop(unique, None)
        if request is None or code:
            return
        if isinstance(request, bytes):
            self._buffer = bytearray(kernel.largest_request(reply))
            self._view = memoryview(self._buffer)
            self.passthrough.agree(request, reply)
            if self.passthrough.is_agreed:
                self._fs.files.handles.backing = self.passthrough
            return
        start = len(reply) - kernel.OPEN_OUT.size
        number = kernel.OPEN_OUT.unpack_from(reply, start)[0]
        handle = self._fs.files.handles.by_number.get(number)
        if handle is not None and handle.backing:
            reply[start:] = self._opened(number, handle.ino)
        elif handle is not None and handle.stream is not None:
            # No place in it, so that of two who share a descriptor the one that is not first can be killed, too.
            reply[start:] = kernel.OPEN_OUT.pack(number, kernel.FOPEN_DIRECT_IO | kernel.FOPEN_STREAM, 0)

    # --- looking ------------------------------------------------------------------------------------------

    def _lookup(self, request: kernel.Request, body: memoryview) -> bytes | None:
        name = bytes(body[:-1])
        if len(name) > LONGEST_NAME or self._fs.may_be_lock(name) or request.ino >= VIEW_BASE:
            return LATER
        try:
            found = self._fs.lookup(request.ino, name.decode())
        except UnicodeDecodeError:
            return LATER
        if found is None:
            if self._fs.close_to_open is not None:
                return LATER
            raise OSError(errno.ENOENT, "no such name")
        return kernel.entry(found, _valid_s(found.ino))

    def _getattr(self, request: kernel.Request, body: memoryview) -> bytes | None:
        found = self._fs.getattr(request.ino)
        return kernel.attributes(found, _valid_s(found.ino))

    def _forget(self, request: kernel.Request, body: memoryview) -> bytes | None:
        self._fs.forget(request.ino, *kernel.FORGET_IN.unpack_from(body))
        return NOTHING

    def _batch_forget(self, request: kernel.Request, body: memoryview) -> bytes | None:
        count, _ = kernel.BATCH_FORGET_IN.unpack_from(body)
        start = kernel.BATCH_FORGET_IN.size
        for ino, times in kernel.FORGET_ONE.iter_unpack(body[start : start + count * kernel.FORGET_ONE.size]):
            self._fs.forget(ino, times)
        return NOTHING

    def _opendir(self, request: kernel.Request, body: memoryview) -> bytes | None:
        """The handle is the inode and whether the kernel keeps what it reads."""
        if request.ino >= VIEW_BASE:
            return LATER
        keep = self._now.is_listing_cacheable(request.ino)
        flags = kernel.FOPEN_KEEP_CACHE | kernel.FOPEN_CACHE_DIR if keep else 0
        return kernel.OPEN_OUT.pack(request.ino << 1 | keep, flags, 0)

    def _readdirplus(self, request: kernel.Request, body: memoryview) -> bytes | None:
        handle, after, size = kernel.RANGE.unpack_from(body)
        ino, is_kept = request.ino, bool(handle & 1)
        room, parts = size, []
        for position, name in enumerate((".", "..")[after:], after + 1):
            found = self._fs.dots(ino, name)
            if found is None:
                break
            parts.append(kernel.entry_in_directory(found, 0, name.encode(), position))
            room -= len(parts[-1])
        else:
            for name, found, place in self._fs.readdir(ino, max(0, after - DOTS), locks=not is_kept):
                part = kernel.entry_in_directory(found, _valid_s(found.ino), name.encode(), place + DOTS)
                room -= len(part)
                if room < 0:
                    break
                parts.append(part)
                self._fs.inodes.looked_up(found.ino)
        return b"".join(parts)

    def _releasedir(self, request: kernel.Request, body: memoryview) -> bytes | None:
        return _OK

    # --- files --------------------------------------------------------------------------------------------

    def _open(self, request: kernel.Request, body: memoryview) -> bytes | None:
        flags, _ = kernel.OPEN_IN.unpack_from(body)
        number = self._now.open(request.ino, self._fs.files.handles.as_opened(flags), request.pid)
        if number is None:
            return LATER
        return self._opened(number, request.ino)

    def _opened(self, number: int, ino: int) -> bytes:
        handle = self._fs.files.handles[number]
        if handle.backing:
            # Who may write does so through us: what changes must be announced first.
            flags = kernel.FOPEN_PASSTHROUGH | (kernel.FOPEN_DIRECT_IO if handle.writable else 0)
        else:
            flags = 0 if self._fs.files.early.has_pages(number, ino) else kernel.FOPEN_KEEP_CACHE
        return kernel.OPEN_OUT.pack(number, flags, handle.backing)

    def _read(self, request: kernel.Request, body: memoryview) -> bytes | None:
        number, offset, size = kernel.RANGE.unpack_from(body)
        found = self._fs.files.read(number, offset, size)
        if found is not None:
            return found
        stream = self._fs.files.handles[number].stream
        if stream is not None:
            if kernel.READ_FLAGS.unpack_from(body)[0] & os.O_NONBLOCK:
                raise BlockingIOError(errno.EAGAIN, "nothing happened yet")
            return self._wait_for(request.unique, lambda: stream.receive(size), for_ever=True)
        return self._wait_for(request.unique, lambda: self._operations.read_later(FileHandleT(number), offset, size))

    def _release(self, request: kernel.Request, body: memoryview) -> bytes | None:
        self._fs.files.release(*kernel.RELEASE_IN.unpack_from(body))
        return _OK

    def _ioctl(self, request: kernel.Request, body: memoryview) -> bytes | None:
        raise OSError(errno.ENOTTY, "no device")  # whoever opens a file asks whether it is a terminal

    # --- changing -----------------------------------------------------------------------------------------

    def _create(self, request: kernel.Request, body: memoryview) -> bytes | None:
        flags, mode, umask, _ = kernel.CREATE_IN.unpack_from(body)
        name = bytes(body[kernel.CREATE_IN.size : -1])
        try:
            text = name.decode()
        except UnicodeDecodeError:
            return LATER
        caller = Caller(request.uid, request.gid, request.pid)
        flags = self._fs.files.handles.as_opened(flags)
        made = self._now.create(request.ino, text, mode & ~umask, flags, caller)
        if made is None:
            return LATER
        number, found = made
        return kernel.entry(found, _valid_s(found.ino)) + self._opened(number, found.ino)

    def _mkdir(self, request: kernel.Request, body: memoryview) -> bytes | None:
        mode, umask = kernel.MKDIR_IN.unpack_from(body)
        try:
            name = bytes(body[kernel.MKDIR_IN.size : -1]).decode()
        except UnicodeDecodeError:
            return LATER
        found = self._now.mkdir(request.ino, name, mode & ~umask, Caller(request.uid, request.gid, request.pid))
        return LATER if found is None else kernel.entry(found, _valid_s(found.ino))

    def _write(self, request: kernel.Request, body: memoryview) -> bytes | None:
        number, offset, size = kernel.RANGE.unpack_from(body)
        done = self._now.write(number, offset, body[_BYTES : _BYTES + size])
        if done == size or (done and not kernel.WRITE_FLAGS.unpack_from(body)[0] & kernel.WRITE_CACHE):
            return kernel.WRITE_OUT.pack(done, 0)
        data = bytes(body[_BYTES : _BYTES + size])

        async def write() -> bytes:
            return kernel.WRITE_OUT.pack(await self._operations.write(FileHandleT(number), offset, data), 0)

        return self._wait_for(request.unique, write)

    def _setattr(self, request: kernel.Request, body: memoryview) -> bytes | None:
        found = self._now.setattr(request.ino, kernel.change(body))
        return LATER if found is None else kernel.attributes(found, _valid_s(found.ino))


def _valid_s(ino: int) -> int:
    return _CACHE_S if ino < VIEW_BASE else 0
