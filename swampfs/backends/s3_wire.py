"""S3 requests with our own SigV4 over plain sockets: the hot path of hydration and push.

boto3 spends 1.4 ms of CPU per small request and tops out near 650 a second; ``http.client`` 0.3 ms, mostly on parsing
headers as mail; this 0.15 ms (measured with SeaweedFS, ``docs/performance.md``). Everything else —
credentials, proxies, redirects — stays with boto3, which also tells this module where to send and with what to sign. No
retries here: :mod:`swampfs.backends.retry` decides. Answers are read by :mod:`swampfs.backends.connection`.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import socket
import ssl
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import BinaryIO, NamedTuple
from urllib.parse import quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from swampfs.backends.connection import (
    CHUNK,
    Answer,
    Connection,
    Reading,
    SinkFailed,
    read_answer,
    to_file,
    to_taker,
    whole_body,
)
from swampfs.provider import Take

_EMPTY_SHA256 = hashlib.sha256(b"").hexdigest()
_SKEW_S = 240.0  # a store accepts a quarter of an hour
_IDLE_S = 4.0  # servers drop idle connections; a request must not be the one to find out
_MD5 = re.compile(r"[0-9a-f]{32}")
_ENCRYPTION = "x-amz-server-side-encryption"


class Key(NamedTuple):
    """Credentials of one request. ``token`` is empty for long-term ones."""

    access: str
    secret: str
    token: str


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
            while left and (chunk := file.read(min(left, CHUNK))):
                left -= len(chunk)
                yield chunk

    def size(self) -> int:
        if self.piece:
            return self.piece[1]
        return os.stat(self.file).st_size if self.file else len(self.body)


class Unanswered(Exception):
    """No complete response came; the request may have been applied."""


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
        self._idle: deque[tuple[float, Connection]] = deque()
        self._busy: set[Connection] = set()
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
        answer = self._send(_Request("GET", self._path(key), "", headers, b""), to_file(sink) if sink else whole_body)
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

    def get_range(self, key: str, headers: Mapping[str, str], offset: int, take: Take | None) -> Answer:
        """What the headers demand from that offset on goes to ``take``, if that is what comes. Raises Unanswered."""
        request = _Request("GET", self._path(key), "", headers, b"")
        return self._send(request, to_taker(offset, take) if take else whole_body)

    def put(self, key: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("PUT", self._path(key), "", headers, body))

    def put_file(self, key: str, headers: Mapping[str, str], path: str) -> Answer:
        """Raises Unanswered, OSError of the file."""
        return self._send(_Request("PUT", self._path(key), "", headers, b"", path))

    def put_part(self, key: str, query: str, path: str, piece: tuple[int, int]) -> Answer:
        """A piece (offset, length) of a file, as a part of an upload. Raises Unanswered, OSError of the file."""
        return self._send(_Request("PUT", self._path(key), query, {}, b"", path, piece))

    def post(self, key: str, query: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("POST", self._path(key), query, headers, body))

    def delete_upload(self, key: str, query: str) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("DELETE", self._path(key), query, {}, b""))

    def delete(self, key: str, headers: Mapping[str, str]) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("DELETE", self._path(key), "", headers, b""))

    def head(self, key: str) -> Answer:
        """Raises Unanswered."""
        return self._send(_Request("HEAD", self._path(key), "", {}, b""))

    def head_bucket(self) -> Answer:
        """Raises Unanswered."""
        return self._send(self._of_bucket())

    def probe(self, timeout_s: float) -> Answer:
        """As :meth:`head_bucket`, on a connection and with a timeout of its own. Raises Unanswered."""
        return self._send_once(self._of_bucket(), _EMPTY_SHA256, whole_body, timeout_s)

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
        return self._send(_Request("GET", self._root or "/", encoded, {}, b""))

    def _path(self, key: str) -> str:
        return f"{self._root}/{quote(key, safe='/-._~')}"

    def _send(self, request: _Request, read: Reading | None = None) -> Answer:
        """Once; and once more if the store says that one of the two clocks is wrong."""
        digest, read = request.digest(), read or whole_body
        answer = self._send_once(request, digest, read)
        if answer.status == 403:
            there = _moment(answer.headers.get("date", ""))
            if there is not None and abs(there - time.time() - self.ahead_s) > _SKEW_S:
                self.ahead_s = there - time.time()
                return self._send_once(request, digest, read)
        return answer

    def _send_once(self, request: _Request, digest: str, read: Reading, apart_s: float | None = None) -> Answer:
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
            answer = read_answer(connection, read, bodiless=request.method == "HEAD")
            if refused and answer.status < 300:
                raise ConnectionResetError("the connection was closed while the request was sent")
        except SinkFailed as failure:
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

    def _connection(self) -> Connection:
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

    def _connect(self, timeout_s: float) -> Connection:
        try:
            return Connection(self._address, timeout_s, self._tls)
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


def _close_all(idle: deque[tuple[float, Connection]]) -> None:
    while idle:
        with contextlib.suppress(IndexError):
            idle.pop()[1].close()


def _send_file(connection: Connection, request: _Request) -> None:
    chunks = request.chunks()
    while True:
        try:
            chunk = next(chunks, b"")
        except OSError as error:
            raise SinkFailed from error
        if not chunk:
            return
        connection.send(chunk)


def _moment(date: str) -> float | None:
    """An HTTP date in seconds since the epoch."""
    try:
        return parsedate_to_datetime(date).timestamp()
    except ValueError:
        return None
