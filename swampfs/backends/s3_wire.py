"""Small S3 requests with our own SigV4 over plain sockets: the hot path of hydration and push.

boto3 spends 1.4 ms of CPU per small request and tops out near 650 a second; ``http.client`` 0.3 ms, mostly on parsing
headers as mail; this 0.15 ms (measured with SeaweedFS, ``docs/performance.md``). Everything else — large bodies,
credentials, redirects — stays with boto3, which also tells this module where to send and with what to sign. No retries
here: :mod:`swampfs.backends.retry` decides.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import io
import os
import re
import socket
import ssl
import sys
import termios
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, NamedTuple, cast
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass
from xml.sax.saxutils import unescape

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_SKEW_S = 240.0  # a store accepts a quarter of an hour
_IDLE_S = 4.0  # servers drop idle connections; a request must not be the one to find out
_CHUNK = 1 << 18
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
_MD5 = re.compile(r"[0-9a-f]{32}")
_ENCRYPTION = "x-amz-server-side-encryption"
_FIELD = re.compile(rb"<(Code|Message|RequestId)>([^<]*)</")


class Key(NamedTuple):
    """Credentials of one request. ``token`` is empty for long-term ones."""

    access: str
    secret: str
    token: str


class Answer(NamedTuple):
    """A response. Header names are lower case; ``error`` is the parsed XML of a refusal."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    error: Mapping[str, str] = {}


class _Request(NamedTuple):
    """``path`` and ``query`` are encoded already. ``file`` is on disk; it, or a piece of it, is the body."""

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    file: str = ""
    piece: tuple[int, int] | None = None  # offset and length

    def digest(self) -> str:
        if not self.file:
            return hashlib.sha256(self.body).hexdigest() if self.body else _EMPTY_SHA256
        digest = hashlib.sha256()
        for chunk in self.chunks():
            digest.update(chunk)
        return digest.hexdigest()

    def chunks(self) -> Iterator[bytes]:
        """Of the file. Raises OSError."""
        offset, left = self.piece or (0, self.size())
        with open(self.file, "rb", buffering=0) as file:
            file.seek(offset)
            while left and (chunk := file.read(min(left, _CHUNK))):
                left -= len(chunk)
                yield chunk

    def size(self) -> int:
        if self.piece:
            return self.piece[1]
        return os.stat(self.file).st_size if self.file else len(self.body)


class Unanswered(Exception):
    """No complete response came; the request may have been applied."""


class _SinkFailed(Exception):
    """The local disk's fault, not the network's; its cause says what."""


class _MalformedError(ValueError):
    """Not a complete HTTP response."""


class Wire:
    """Signed requests for the objects of one bucket. Thread-safe: a connection belongs to one request at a time."""

    def __init__(self, url: str, region: str, key: Callable[[], Key], timeout_s: float) -> None:
        """``url`` is the bucket's own, such as ``http://host:1/bucket`` or ``https://bucket.s3.eu-west-1.…``."""
        parts = urlsplit(url)
        self._host = parts.netloc
        self._origin = f"{parts.scheme}://{parts.netloc}"
        self._address = (parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80))
        self._root = parts.path.rstrip("/")
        self._region = region
        self._key = key
        self._timeout_s = timeout_s
        self._tls = None
        if parts.scheme == "https":
            self._tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE") or None)
        self._idle: deque[tuple[float, _Connection]] = deque()
        self._busy: set[_Connection] = set()
        self._signing: tuple[str, bytes] = ("", b"")
        self._hashed: set[str] = set()  # kinds of encryption under which an ETag is the MD5 of the content
        self.ahead_s = 0.0
        """How far the store's clock is ahead of ours, once it refused a request for that."""
        weakref.finalize(self, _close_all, self._idle)

    @staticmethod
    def is_direct(url: str) -> bool:
        """Whether no proxy stands between; those are boto3's business."""
        parts = urlsplit(url)
        return parts.scheme not in getproxies() or bool(proxy_bypass(parts.hostname or ""))

    def get(self, key: str, headers: Mapping[str, str], sink: BinaryIO | None = None) -> Answer:
        """A successful body goes to ``sink`` if there is one. Raises Unanswered, also if a body is not what was put."""
        answer = self._request("GET", key, headers, b"", sink)
        if sink is None and answer.status == 200 and not self._is_as_put(answer):
            raise Unanswered(f"{self._origin}: the body does not have the hash that its ETag says")
        return answer

    def _is_as_put(self, answer: Answer) -> bool:
        """Nothing else vouches for an index or a lock. An ETag is an MD5 where that was seen: by kind of encryption."""
        etag, kind = answer.headers.get("etag", "").strip('"'), answer.headers.get(_ENCRYPTION, "")
        if not _MD5.fullmatch(etag):
            return True
        same = hashlib.md5(answer.body, usedforsecurity=False).hexdigest() == etag
        if same:
            self._hashed.add(kind)
        return same or kind not in self._hashed

    def put(self, key: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Raises Unanswered."""
        return self._request("PUT", key, headers, body, None)

    def put_file(self, key: str, headers: Mapping[str, str], path: str) -> Answer:
        """Raises Unanswered, OSError of the file."""
        return self._send(_Request("PUT", self._path(key), "", headers, b"", path), None)

    def put_part(self, key: str, query: str, path: str, piece: tuple[int, int]) -> Answer:
        """A piece (offset, length) of a file, as a part of an upload. Raises Unanswered, OSError of the file."""
        return self._send(_Request("PUT", self._path(key), query, {}, b"", path, piece), None)

    def post(self, key: str, query: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("POST", self._path(key), query, headers, body), None)

    def delete_upload(self, key: str, query: str) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("DELETE", self._path(key), query, {}, b""), None)

    def delete(self, key: str, headers: Mapping[str, str]) -> Answer:
        """Raises Unanswered."""
        return self._request("DELETE", key, headers, b"", None)

    def head(self, key: str) -> Answer:
        """Raises Unanswered."""
        return self._request("HEAD", key, {}, b"", None)

    def head_bucket(self) -> Answer:
        """Raises Unanswered."""
        return self._send(self._of_bucket(), None)

    def probe(self, timeout_s: float) -> Answer:
        """As :meth:`head_bucket`, on a connection and with a timeout of its own. Raises Unanswered."""
        return self._send_once(self._of_bucket(), _EMPTY_SHA256, None, timeout_s)

    def silent_s(self) -> float:
        """For how long the request that waits longest has heard nothing; 0 if none is under way."""
        return max((connection.silent_s() for connection in list(self._busy)), default=0.0)

    def end_silent(self, since: float) -> None:
        """End requests that have heard nothing since a monotonic time."""
        for connection in list(self._busy):
            if time.monotonic() - connection.silent_s() <= since:
                with contextlib.suppress(OSError):
                    # Not the method of a TLS socket, after which plain reads would return what was encrypted.
                    socket.socket.shutdown(connection.socket, socket.SHUT_RDWR)
        _close_all(self._idle)

    def _of_bucket(self) -> _Request:
        return _Request("HEAD", self._root or "/", "", {}, b"")

    def list_page(self, query: Mapping[str, str]) -> Answer:
        """``ListObjectsV2`` of the bucket. Raises Unanswered."""
        encoded = "&".join(f"{name}={quote(query[name], safe='-._~')}" for name in sorted(query))
        return self._send(_Request("GET", self._root or "/", encoded, {}, b""), None)

    def _request(self, method: str, key: str, headers: Mapping[str, str], body: bytes, sink: BinaryIO | None) -> Answer:
        return self._send(_Request(method, self._path(key), "", headers, body), sink)

    def _path(self, key: str) -> str:
        return f"{self._root}/{quote(key, safe='/-._~')}"

    def _send(self, request: _Request, sink: BinaryIO | None) -> Answer:
        """Once; and once more if the store says that one of the two clocks is wrong."""
        digest = request.digest()
        answer = self._send_once(request, digest, sink)
        if answer.status == 403:
            there = _moment(answer.headers.get("date", ""))
            if there is not None and abs(there - time.time() - self.ahead_s) > _SKEW_S:
                self.ahead_s = there - time.time()
                return self._send_once(request, digest, sink)
        return answer

    def _send_once(self, request: _Request, digest: str, sink: BinaryIO | None, apart_s: float | None = None) -> Answer:
        """``apart_s``: on a connection that nobody else gets, with this timeout."""
        head = self._sign(request, digest)
        if request.method in ("PUT", "POST"):
            head += f"content-length: {request.size()}\r\n"
        connection = self._connection() if apart_s is None else self._connect(apart_s)
        refused = False
        connection.heard_at = time.monotonic()
        self._busy.add(connection)
        try:
            try:
                connection.send(f"{head}\r\n".encode() + request.body)  # one send: no waiting in between
                if request.file:
                    _send_file(connection, request)
            except (BrokenPipeError, ConnectionResetError):
                refused = True  # perhaps with an answer, before it had heard everything
            connection.begin_answer()
            answer = _read(connection, sink, bodiless=request.method == "HEAD")
            if refused and answer.status < 300:
                raise ConnectionResetError("the connection was closed while the request was sent")
        except _SinkFailed as failure:
            connection.close()
            assert failure.__cause__ is not None
            raise failure.__cause__ from None
        except (ValueError, OSError) as error:
            connection.close()
            _close_all(self._idle)  # most likely as dead as this one: the next attempt gets a fresh one
            raise Unanswered(f"{self._origin}: {error or type(error).__name__}") from error
        except BaseException:
            connection.close()
            raise
        finally:
            self._busy.discard(connection)
        stays = "content-length" in answer.headers and "close" not in answer.headers.get("connection", "").lower()
        if refused or not stays or apart_s is not None:
            connection.close()
        else:
            self._idle.append((time.monotonic(), connection))
        return answer

    def _connection(self) -> _Connection:
        now = time.monotonic()
        while self._idle:
            try:
                since, connection = self._idle.pop()
            except IndexError:
                break
            if now - since < _IDLE_S:
                return connection
            connection.close()
        return self._connect(self._timeout_s)

    def _connect(self, timeout_s: float) -> _Connection:
        try:
            return _Connection(self._address, timeout_s, self._tls)
        except OSError as error:
            raise Unanswered(f"{self._origin}: {error or type(error).__name__}") from error

    def _sign(self, request: _Request, digest: str) -> str:
        """Request line and headers, signed with Signature Version 4 (AWS General Reference)."""
        method, path, query, headers = request[:4]
        key = self._key()
        moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(time.time() + self.ahead_s))
        scope = f"{moment[:8]}/{self._region}/s3/aws4_request"
        all_headers = {name.lower(): value for name, value in headers.items()}
        all_headers |= {"host": self._host, "x-amz-content-sha256": digest, "x-amz-date": moment}
        if key.token:
            all_headers["x-amz-security-token"] = key.token
        names = sorted(all_headers)
        signed = ";".join(names)
        lines = "".join(f"{name}:{all_headers[name]}\n" for name in names)
        canonical = f"{method}\n{path}\n{query}\n{lines}\n{signed}\n{digest}"
        text = f"AWS4-HMAC-SHA256\n{moment}\n{scope}\n{hashlib.sha256(canonical.encode()).hexdigest()}"
        signature = hmac.digest(self._signing_key(key.secret, scope), text.encode(), "sha256").hex()
        target = f"{path}?{query}" if query else path
        head = f"{method} {target} HTTP/1.1\r\n" + "".join(f"{name}: {all_headers[name]}\r\n" for name in names)
        return (
            f"{head}authorization: AWS4-HMAC-SHA256 Credential={key.access}/{scope},"
            f" SignedHeaders={signed}, Signature={signature}\r\n"
        )

    def _signing_key(self, secret: str, scope: str) -> bytes:
        known, derived = self._signing
        if known != secret + scope:
            derived = b"AWS4" + secret.encode()
            for part in scope.split("/"):
                derived = hmac.digest(derived, part.encode(), "sha256")
            self._signing = (secret + scope, derived)
        return derived


def _close_all(idle: deque[tuple[float, _Connection]]) -> None:
    while idle:
        with contextlib.suppress(IndexError):
            idle.pop()[1].close()


class _Connection(io.RawIOBase):
    """A kept-alive connection. Requests on it are strictly one after the other.

    It is what its own reader reads from: a pause is as long as the timeout at most, and a whole answer takes no longer
    than that plus what its bytes take at the slowest pace.
    """

    def __init__(self, address: tuple[str, int], timeout_s: float, tls: ssl.SSLContext | None) -> None:
        self._timeout_s = timeout_s
        self.socket: socket.socket = socket.create_connection(address, timeout=min(timeout_s, _CONNECT_S))
        for level, option, value in _OPTIONS:
            self.socket.setsockopt(level, option, value)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(timeout_s * 1000))
        if tls is not None:
            self.socket = tls.wrap_socket(self.socket, server_hostname=address[0])
        self.reader: Any = io.BufferedReader(self, _CHUNK)
        self.heard_at = time.monotonic()
        """When a byte came, or went, last."""
        self._give_up_at = 0.0
        self._allowed_s = -1.0  # for one call; to say so again is a system call for each record of TLS
        self._unsent = 0  # bytes, as of the last look

    def silent_s(self) -> float:
        """For how long nothing has come, nor gone: what we sent may take a while to leave."""
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

    def _allow(self, timeout_s: float) -> None:
        if timeout_s != self._allowed_s:
            self.socket.settimeout(timeout_s)
            self._allowed_s = timeout_s

    def close(self) -> None:
        self.socket.close()
        super().close()


def _send_file(connection: _Connection, request: _Request) -> None:
    chunks = request.chunks()
    while True:
        try:
            chunk = next(chunks, b"")
        except OSError as error:
            raise _SinkFailed from error
        if not chunk:
            return
        connection.send(chunk)


def _moment(date: str) -> float | None:
    """An HTTP date in seconds since the epoch."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None


def _read(connection: _Connection, sink: BinaryIO | None, *, bodiless: bool) -> Answer:
    """One response (RFC 9112): a body of known length, in chunks, or up to the end of the connection."""
    reader = connection.reader
    status = 100
    while 100 <= status < 200:
        line = reader.readline(_LINE)
        if not line.startswith(b"HTTP/1.") or len(line) < 12:
            raise _MalformedError(f"not a response: {line[:40]!r}" if line else "the connection was closed")
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
    if sink is None:
        return Answer(status, headers, _body(reader, headers))
    for piece in _pieces(reader, headers):
        try:
            sink.write(piece)
        except OSError as error:
            raise _SinkFailed from error
        connection.heard_at = time.monotonic()  # a slow disk is not a silent network
    return Answer(status, headers, b"")


def _read_headers(reader: io.BufferedReader) -> dict[str, str]:
    headers: dict[str, str] = {}
    while (line := reader.readline(_LINE)) not in (b"\r\n", b"\n"):
        if not line.endswith(b"\n"):
            raise _MalformedError("the headers end in mid-line")
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.strip().lower()] = value.strip()
    return headers


def _body(reader: io.BufferedReader, headers: Mapping[str, str]) -> bytes:
    size = int(headers.get("content-length", "0"))
    if not _CHUNK < size <= _IN_ONE_PIECE or "transfer-encoding" in headers:
        return b"".join(_pieces(reader, headers))
    body, done = bytearray(size), 0
    view = memoryview(body)
    while done < size:
        got = reader.readinto(view[done:])
        if not got:
            raise _MalformedError(f"the connection was closed {size - done} bytes early")
        done += got
    return cast(bytes, body)  # nobody changes it, and a copy would cost as much as the request


def _pieces(reader: io.BufferedReader, headers: Mapping[str, str]) -> Iterator[bytes]:
    if headers.get("transfer-encoding", "").lower().endswith("chunked"):
        while size := int(reader.readline(_LINE).partition(b";")[0].strip() or b"-", 16):
            yield from _exactly(reader, size)
            reader.readline(_LINE)
        _read_headers(reader)
    elif "content-length" in headers:
        yield from _exactly(reader, int(headers["content-length"]))
    else:
        while piece := reader.read1(_CHUNK):
            yield piece


def _exactly(reader: io.BufferedReader, size: int) -> Iterator[bytes]:
    while size:
        piece = reader.read1(min(size, _CHUNK))
        if not piece:
            raise _MalformedError(f"the connection was closed {size} bytes early")
        size -= len(piece)
        yield piece
