"""A network that misbehaves: an HTTP relay between a client and a store that does what real ones have done.

Put it in front of any HTTP store (``AWS_ENDPOINT_URL_S3``), :meth:`FaultProxy.set` a fault, and see what the client
makes of it. It speaks plain HTTP/1.1 with persistent connections, on a free loopback port, in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple
from urllib.parse import urlsplit


class Fault(Enum):
    """What happens to each request while it is set."""

    REFUSED = "connections are refused"
    BLACK_HOLE = "requests are swallowed and never answered"
    HALF_OPEN = "what was connected stays so, and nothing passes any more, also when all else is well again"
    RESET_BEFORE = "the connection is reset before the store sees the request"
    RESET_AFTER = "the store applies the request, and the connection is reset before the answer"
    LATE = "every answer comes three tenths of a second late"
    NARROW = "answers come at 20 kB a second"
    DRIBBLE = "answers come a byte at a time, four times a second"
    UNAVAILABLE = "503 Slow Down"
    TOO_MANY = "429 Too Many Requests"
    BROKEN = "500 Internal Error"
    DENIED = "403 Access Denied"
    CUT_SHORT = "the connection ends in the middle of a body"
    SHORTENED = "a body lacks its last byte, and its length says so"
    FLIPPED = "one byte of a body is another"
    SKEWED = "the store's clock is an hour ahead"


_REFUSALS = {
    Fault.UNAVAILABLE: (503, "SlowDown"),
    Fault.TOO_MANY: (429, "TooManyRequests"),
    Fault.BROKEN: (500, "InternalError"),
    Fault.DENIED: (403, "AccessDenied"),
}
_ENDS = (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError)  # of a connection
_LATE_S = 0.3
_NARROW_BYTES = 2000  # each tenth of a second
_DRIBBLE_S = 0.25


class Request(NamedTuple):
    """As it came."""

    method: str
    target: str
    head: bytes
    body: bytes


class Answer(NamedTuple):
    """As it came; ``body`` with whatever framing it has."""

    head: bytes
    body: bytes


class FaultProxy:
    """Relays HTTP to ``endpoint``. ``matches(method, target)`` says which requests a fault hits."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._store = (parts.hostname, parts.port)
        self.fault: Fault | None = None
        self.matches: Callable[[str, str], bool] = lambda method, target: True
        self.port = 0
        self._clients: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fault-proxy", daemon=True)
        self._thread.start()
        self._ready.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def set(self, fault: Fault | None) -> None:
        """From now on. What stands of connections is reset, unless the fault is that it stands."""
        keeps = Fault.HALF_OPEN in (self.fault, fault)
        self.fault = fault
        self._loop.call_soon_threadsafe(self._change, keeps)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopped, self._changed = asyncio.Event(), asyncio.Event()
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()
        self._reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _change(self, keeps_connections: bool) -> None:
        if not keeps_connections:
            self._reset()
        self._changed.set()
        self._changed = asyncio.Event()

    def _reset(self) -> None:
        for client in list(self._clients):
            client.transport.abort()

    # --- one connection -----------------------------------------------------------------------------------

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.fault is Fault.REFUSED:
            writer.transport.abort()
            return
        self._clients.add(writer)
        try:
            with contextlib.suppress(*_ENDS):
                while await self._one(reader, writer):
                    pass
        finally:
            self._clients.discard(writer)
            writer.transport.abort()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer. Returns whether the connection goes on."""
        request = await _request(reader, writer)
        fault = self.fault if self.matches(request.method, request.target) else None
        if fault in (Fault.BLACK_HOLE, Fault.HALF_OPEN):
            await (self._stopped if fault is Fault.HALF_OPEN else self._changed).wait()
            return False
        if fault is Fault.RESET_BEFORE:
            return False
        if fault in _REFUSALS:
            writer.write(_refusal(request.method, *_REFUSALS[fault]))
            await writer.drain()
            return True
        answer = await self._ask(request)
        if fault is Fault.RESET_AFTER:
            return False
        return await self._reply(writer, answer, fault)

    async def _ask(self, request: Request) -> Answer:
        reader, writer = await asyncio.open_connection(*self._store)
        try:
            writer.write(request.head + request.body)
            await writer.drain()
            head = await reader.readuntil(b"\r\n\r\n")
            bodiless = request.method == "HEAD" or head[9:12] in (b"204", b"304")
            return Answer(head, b"" if bodiless else await _body(reader, head))
        finally:
            writer.close()

    async def _reply(self, writer: asyncio.StreamWriter, answer: Answer, fault: Fault | None) -> bool:
        head, body = _with(answer.head, b"Connection", None), answer.body  # that was between us and the store
        if fault is Fault.LATE:
            await asyncio.sleep(_LATE_S)
        elif fault is Fault.SKEWED:
            head = _with(head, b"Date", b"Fri, 01 Jan 2100 00:00:00 GMT")
        elif fault is Fault.FLIPPED and body:
            at = len(body) // 2
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        elif fault is Fault.SHORTENED and body and _field(head, b"content-length") is not None:
            body = body[:-1]
            head = _with(head, b"Content-Length", str(len(body)).encode())
        elif fault is Fault.CUT_SHORT and body:
            writer.write(head + body[: len(body) // 2])
            await writer.drain()
            return False
        writer.write(head)
        if fault in (Fault.NARROW, Fault.DRIBBLE):
            size, pause_s = (_NARROW_BYTES, 0.1) if fault is Fault.NARROW else (1, _DRIBBLE_S)
            for start in range(0, len(body), size):
                writer.write(body[start : start + size])
                await writer.drain()
                await asyncio.sleep(pause_s if self.fault is fault else 0)
        else:
            writer.write(body)
        await writer.drain()
        return True


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request:
    head = await reader.readuntil(b"\r\n\r\n")
    method, target, _ = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ", 2)
    if _field(head, b"expect") is not None:
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        head = _with(head, b"Expect", None)
    length = int(_field(head, b"content-length") or 0)
    body = await reader.readexactly(length) if length else b""
    return Request(method, target, _with(head, b"Connection", b"close"), body)


async def _body(reader: asyncio.StreamReader, head: bytes) -> bytes:
    """The body with its framing."""
    length = _field(head, b"content-length")
    if length is not None:
        return await reader.readexactly(int(length))
    return await reader.read()  # in chunks, or up to the end: we asked for the connection to be closed


def _field(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.strip().lower() == name.lower():
            return value.strip()
    return None


def _with(head: bytes, name: bytes, value: bytes | None) -> bytes:
    """The head with one field set, or left out."""
    first, *lines = head.rstrip(b"\r\n").split(b"\r\n")
    kept = [line for line in lines if line.partition(b":")[0].strip().lower() != name.lower()]
    added = [] if value is None else [name + b": " + value]
    return b"\r\n".join([first, *kept, *added]) + b"\r\n\r\n"


def _refusal(method: str, status: int, code: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>by the fault proxy</Message></Error>".encode()
    head = f"HTTP/1.1 {status} {code}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + (b"" if method == "HEAD" else body)
