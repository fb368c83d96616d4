"""HTTP/1.1 answers from a kept-alive connection: what :mod:`swampfs.backends.s3_wire` asks for (RFC 9112)."""

from __future__ import annotations

import contextlib
import fcntl
import io
import re
import socket
import ssl
import sys
import termios
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple, cast
from xml.sax.saxutils import unescape

from swampfs.provider import Take

CHUNK = 1 << 18
_PIECE = 1 << 19
_IN_ONE_PIECE = 64 << 20  # a length that may be believed before the bytes come
_LINE = 1 << 16
_CONNECT_S = 5.0
_SLOWEST = 16 << 10  # bytes per second of an answer
_OPTIONS = (
    (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
)
_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/", re.ASCII)
_FIELD = re.compile(rb"<(Code|Message|RequestId)>([^<]*)</")


class Answer(NamedTuple):
    """A response. Header names are lower case; ``error`` is the parsed XML of a refusal."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    error: Mapping[str, str] = {}


class SinkFailed(Exception):
    """The local disk's fault, not the network's; its cause says what."""


class MalformedError(ValueError):
    """Not a complete HTTP response."""


class Connection(io.RawIOBase):
    """A kept-alive connection. Requests on it are strictly one after the other.

    It is what its own reader reads from: a pause is as long as the timeout at most, and a whole answer takes no longer
    than that plus what its bytes take at the slowest pace, and the time in which they are put somewhere.
    """

    def __init__(self, address: tuple[str, int], timeout_s: float, tls: ssl.SSLContext | None) -> None:
        self._timeout_s = timeout_s
        self.socket: socket.socket = socket.create_connection(address, timeout=min(timeout_s, _CONNECT_S))
        for level, option, value in _OPTIONS:
            self.socket.setsockopt(level, option, value)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=address[0])
        self.reader: Any = io.BufferedReader(self, CHUNK)
        self.heard_at = time.monotonic()
        """When a byte came, or went, last."""
        self._give_up_at = 0.0
        self._allowed_s = -1.0  # for one call; to say so again is a system call for each record of TLS
        self._unsent = 0  # bytes, as of the last look
        self._is_drained = False  # the reader has nothing of this answer any more
        self._is_aside = False

    def silent_s(self) -> float:
        """For how long nothing has come, nor gone: what we sent may take a while to leave."""
        if self._is_aside:
            return 0.0
        with contextlib.suppress(OSError, ValueError):  # closed just now
            waiting = int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, b"\0" * 4), sys.byteorder)
            if waiting != self._unsent:
                self._unsent, self.heard_at = waiting, time.monotonic()
        return time.monotonic() - self.heard_at

    def send(self, data: bytes) -> None:
        """All of it, within the timeout."""
        self._allow(self._timeout_s)
        self.socket.sendall(data)
        self.heard_at = time.monotonic()

    def begin_answer(self) -> None:
        """What comes from now on answers one request."""
        self._give_up_at = time.monotonic() + self._timeout_s
        self._is_drained = False

    @contextlib.contextmanager
    def set_aside(self) -> Iterator[None]:
        """What came is put somewhere, which may fail, too; and a slow disk is not a silent network."""
        began, self._is_aside = time.monotonic(), True
        try:
            yield
        except OSError as error:
            raise SinkFailed from error
        finally:
            self.heard_at = time.monotonic()
            self._give_up_at += self.heard_at - began
            self._is_aside = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._give_up_at - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("the answer came too slowly")
        self._allow(min(left_s, self._timeout_s))
        got = self.socket.recv_into(buffer)
        self.heard_at = time.monotonic()
        self._give_up_at += got / _SLOWEST
        return got

    def fill(self, buffer: memoryview) -> None:
        """With what comes next of a body. Past the reader once that is empty: it would copy what it reads."""
        while buffer:
            if self._is_drained:
                got = self.readinto(buffer)
            else:
                wanted = min(len(buffer), CHUNK)
                had = self.reader.read1(wanted)
                got = len(had)
                buffer[:got] = had
                self._is_drained = got < wanted
            if not got:
                raise MalformedError(f"the connection was closed {len(buffer)} bytes early")
            buffer = buffer[got:]

    def _allow(self, timeout_s: float) -> None:
        if timeout_s != self._allowed_s:
            self.socket.settimeout(timeout_s)
            self._allowed_s = timeout_s

    def close(self) -> None:
        self.socket.close()
        super().close()


Reading = Callable[[Connection, Mapping[str, str]], bytes]
"""Reads the body of a success; what it does not put elsewhere is the answer's."""


def read_answer(connection: Connection, read: Reading, *, bodiless: bool) -> Answer:
    """One response (RFC 9112): a body of known length, in chunks, or up to the end of the connection."""
    reader = connection.reader
    status = 100
    while 100 <= status < 200:
        line = reader.readline(_LINE)
        if not line.startswith(b"HTTP/1.") or len(line) < 12:
            raise MalformedError(f"not a response: {line[:40]!r}" if line else "the connection was closed")
        status = int(line[9:12])
        headers = _read_headers(reader)
    if line.startswith(b"HTTP/1.0"):
        headers["connection"] = "close"
    if status in (204, 304) or bodiless:
        return Answer(status, {"content-length": "0", **headers}, b"")
    if status >= 300:
        body = b"".join(_pieces(reader, headers))
        found = {name.decode(): unescape(value.decode("utf-8", "replace")) for name, value in _FIELD.findall(body)}
        return Answer(status, headers, body, found)
    return Answer(status, headers, read(connection, headers))


def _read_headers(reader: io.BufferedReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    while (line := reader.readline(_LINE)) not in (b"\r\n", b"\n"):
        if not line.endswith(b"\n"):
            raise MalformedError("the headers end in mid-line")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def whole_body(connection: Connection, headers: Mapping[str, str]) -> bytes:
    """The body is the answer's. Raises ValueError, OSError."""
    size = int(headers.get("content-length", "0"))
    if not CHUNK < size <= _IN_ONE_PIECE or "transfer-encoding" in headers:
        return b"".join(_pieces(connection.reader, headers))
    body = bytearray(size)
    connection.fill(memoryview(body))
    return cast(bytes, body)  # nobody changes it, and a copy would cost as much as the request


def to_file(sink: BinaryIO) -> Reading:
    """The body goes to a file."""

    def read(connection: Connection, headers: Mapping[str, str]) -> bytes:
        for piece in _pieces(connection.reader, headers):
            with connection.set_aside():
                sink.write(piece)
        return b""

    return read


def to_taker(offset: int, take: Take) -> Reading:
    """The body goes to ``take`` if it begins at that offset of an object.

    Through one buffer, small enough to be in the processor's cache still when it is taken.
    """

    def read(connection: Connection, headers: Mapping[str, str]) -> bytes:
        found = _RANGE.match(headers.get("content-range", ""))
        if found is None or int(found[1]) != offset:
            return whole_body(connection, headers)  # not what was asked for
        done = 0
        for piece in _large_pieces(connection, headers):
            with connection.set_aside():
                take(offset + done, piece)
            done += len(piece)
        if done != int(found[2]) - offset + 1:
            raise MalformedError(f"{done} bytes came, of those from {found[1]} to {found[2]}")
        return b""

    return read


def _large_pieces(connection: Connection, headers: Mapping[str, str]) -> Iterator[memoryview]:
    """Each is gone when the next one is asked for."""
    if "transfer-encoding" in headers or "content-length" not in headers:
        yield from (memoryview(piece) for piece in _pieces(connection.reader, headers))
        return
    left = int(headers["content-length"])
    buffer = memoryview(bytearray(min(left, _PIECE)))
    while left > 0:
        piece = buffer[:left]
        connection.fill(piece)
        left -= len(piece)
        yield piece


def _pieces(reader: io.BufferedReader, headers: Mapping[str, str]) -> Iterator[bytes]:
    if headers.get("transfer-encoding", "").lower().endswith("chunked"):
        while size := int(reader.readline(_LINE).partition(b";")[0].strip() or b"-", 16):
            yield from _exactly(reader, size)
            reader.readline(_LINE)
        _read_headers(reader)
    elif "content-length" in headers:
        yield from _exactly(reader, int(headers["content-length"]))
    else:
        while piece := reader.read1(CHUNK):
            yield piece


def _exactly(reader: io.BufferedReader, size: int) -> Iterator[bytes]:
    while size:
        piece = reader.read1(min(size, CHUNK))
        if not piece:
            raise MalformedError(f"the connection was closed {size} bytes early")
        size -= len(piece)
        yield piece
