"""``status`` for Prometheus: its text format, in ``.swampfs/metrics`` and at a port of the loopback interface."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import trio

from swampfs.errors import SettingsError

log = logging.getLogger(__name__)

_HOST = "127.0.0.1"
_REQUEST_S = 5.0
_AT_ONCE = 8  # connections: each is a descriptor of the mount's
_FRESH_S = 1.0
_LONGEST = 8192  # bytes of a request
_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Samples = list[tuple[Mapping[str, str], Any]]


def render(status: Mapping[str, Any]) -> str:
    """``status --json`` as samples; what is not known yet is left out."""
    return "".join(_lines(status))


def _lines(status: Mapping[str, Any]) -> Iterator[str]:
    for name, kind, help_text, samples in _families(status):
        known = [(labels, value) for labels, value in samples if value is not None]
        if known:
            yield f"# HELP swampfs_{name} {help_text}\n# TYPE swampfs_{name} {kind}\n"
        for labels, value in known:
            told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
            number = str(int(value)) if isinstance(value, int) else repr(float(value))
            yield f"swampfs_{name}{{{told}}} {number}\n" if told else f"swampfs_{name} {number}\n"


def _families(status: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Samples]]:
    """Name, type, help, samples."""
    about = {key: str(status[key] or "") for key in ("version", "source", "mountpoint", "backend")}
    yield "info", "gauge", "What is mounted where; always 1.", [(about, 1)]
    cache, seen = status["cache"], status["visibilityMs"]
    for name, kind, help_text, value in (
        ("healthy", "gauge", "1 unless lastError says otherwise.", status["healthy"]),
        ("offline", "gauge", "1 while the datastore does not answer.", status["offline"]),
        ("uptime_seconds", "gauge", "Since the mount.", status["uptimeS"]),
        ("refresh_age_seconds", "gauge", "Since the datastore last said what is in it.", _s(status["refreshAgeMs"])),
        ("backend_latency_seconds", "gauge", "Of the last request.", _s(status["latencyMs"])),
        ("visibility_p99_seconds", "gauge", "From a commit elsewhere to its being seen here.", _s(seen["p99"])),
        ("files", "gauge", "In the datastore.", status["files"]),
        ("bytes", "gauge", "In the datastore.", status["bytes"]),
        ("files_here", "gauge", "Whose content is on this machine.", status["hydrated"]),
        ("changes_pending", "gauge", "Paths that are not pushed yet.", status["dirty"]),
        ("open_files", "gauge", "Handles.", status["openFiles"]),
        ("locks", "gauge", "Held, or waited for.", len(status["locks"])),
        ("locks_lost_total", "counter", "Locks that expired under this mount.", status["lostLocks"]),
        ("conflicts", "gauge", "Contents kept aside.", status["conflicts"]),
        ("findings", "gauge", "Entries of the index that cannot be files.", len(status["findings"])),
        ("cache_bytes", "gauge", "Of content on this machine.", cache["bytes"]),
        ("cache_limit_bytes", "gauge", "See --cache-size.", cache["limit"]),
        ("cache_evicted_total", "counter", "Files that had to go.", cache["evicted"]),
        ("prefetched_total", "counter", "Files fetched ahead.", status["prefetch"]["fetched"]),
        ("prefetched_used_total", "counter", "Those of them that were opened.", status["prefetch"]["used"]),
        ("damaged_total", "counter", "Contents this machine's disk returned wrong.", status["scrub"]["damaged"]),
    ):
        yield name, kind, help_text, [({}, value)]
    requests: Samples = [({"operation": name}, count) for name, count in status["requests"].items()]
    yield "requests_total", "counter", "To the datastore.", requests
    upcalls = status["upcalls"] or {}
    told: Samples = [
        ({"operation": name, "by": by}, count)
        for by, where in (("lane", "answered"), ("pyfuse3", "passed"))
        for name, count in upcalls.get(where, {}).items()
    ]
    yield "upcalls_total", "counter", "Of the kernel.", told


def _s(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


# --- over HTTP ------------------------------------------------------------------------------------------------


async def serve(port: int, text: Callable[[], str], nursery: trio.Nursery) -> int:
    """Answer ``GET /metrics`` on the loopback interface, for ever. Returns the port (another one for 0).

    Raises SettingsError if it is taken.
    """
    try:
        listeners = await trio.open_tcp_listeners(port, host=_HOST)
    except OSError as error:
        raise SettingsError(
            f"metrics cannot be served at {_HOST}:{port}: {error.strerror}", remedy="pass another --metrics-port"
        ) from None
    nursery.start_soon(trio.serve_listeners, partial(_answer, _Recent(text), trio.CapacityLimiter(_AT_ONCE)), listeners)
    return int(listeners[0].socket.getsockname()[1])


class _Recent:
    """A text that is made anew only once a second, however many ask."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self._made_at = float("-inf")
        self._said = ""

    def __call__(self) -> str:
        if time.monotonic() - self._made_at >= _FRESH_S:
            self._said, self._made_at = self._text(), time.monotonic()
        return self._said


async def _answer(text: Callable[[], str], turns: trio.CapacityLimiter, stream: trio.SocketStream) -> None:
    """One request, one answer; whoever is slow, rude, away, or one too many, is left alone."""
    async with stream:
        try:
            turns.acquire_nowait()
        except trio.WouldBlock:
            return
        try:
            await _converse(text, stream)
        finally:
            turns.release()


async def _converse(text: Callable[[], str], stream: trio.SocketStream) -> None:
    with trio.move_on_after(_REQUEST_S):
        try:
            await stream.send_all(_reply(await _head(stream), text))
        except trio.BrokenResourceError:
            return
        except Exception:  # a task that fails takes the mount down
            log.exception("a request for metrics failed")


def _reply(head: bytes, text: Callable[[], str]) -> bytes:
    word, _, rest = head.partition(b" ")
    if word not in (b"GET", b"HEAD"):
        status, body = "405 Method Not Allowed", b""
    elif rest.split(b" ")[0].split(b"?")[0] != b"/metrics":
        status, body = "404 Not Found", b"see /metrics\n"
    else:
        status, body = "200 OK", text().encode()
    header = f"HTTP/1.1 {status}\r\nContent-Type: {_TYPE}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return header.encode() + (b"" if word == b"HEAD" else body)


async def _head(stream: trio.SocketStream) -> bytes:
    head = b""
    while b"\r\n\r\n" not in head and len(head) < _LONGEST:
        more = await stream.receive_some(_LONGEST)
        if not more:
            break
        head += more
    return head
