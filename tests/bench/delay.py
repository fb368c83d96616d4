"""A TCP proxy with a round trip time, where the kernel has no netem: ``python -m tests.bench.delay PORT SECONDS``.

Half of the time is spent each way, and one whole of it before the first byte of a connection: its handshake. Prints
the port it listens on, and goes on until it is ended.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

_AHEAD = 8 << 20  # bytes on the way, after which the sender waits


class _Side(asyncio.Protocol):
    """One end of a connection: what comes here goes to the other one, later."""

    def __init__(self, delay_s: float) -> None:
        self.delay_s = delay_s
        self.other: _Side | None = None
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []
        self.not_before = 0.0
        self._loop = asyncio.get_running_loop()
        self._on_the_way = 0
        self._queue: deque[bytes] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.other is None:
            self.early.append(data)
            return
        self._on_the_way += len(data)
        if self._on_the_way > _AHEAD and self.transport is not None:
            self.transport.pause_reading()
        self._queue.append(data)  # timers for one moment have no order among them
        self._loop.call_at(max(self._loop.time() + self.delay_s, self.not_before), self._deliver)

    def _deliver(self) -> None:
        data = self._queue.popleft()
        self._on_the_way -= len(data)
        if self._on_the_way <= _AHEAD and self.transport is not None:
            self.transport.resume_reading()
        if self.other is not None and self.other.transport is not None and not self.other.transport.is_closing():
            self.other.transport.write(data)

    def connection_lost(self, exc: Exception | None) -> None:
        self._loop.call_later(self.delay_s, self._close_other)

    def _close_other(self) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


class _Front(_Side):
    """The client's end."""

    def __init__(self, delay_s: float, port: int) -> None:
        super().__init__(delay_s)
        self._port = port
        self._connecting: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.not_before = self._loop.time() + 3 * self.delay_s
        self._connecting = self._loop.create_task(self._connect())

    async def _connect(self) -> None:
        back = _Side(self.delay_s)
        await self._loop.create_connection(lambda: back, "127.0.0.1", self._port)
        back.other, self.other = self, back
        for data in self.early:
            self.data_received(data)
        self.early.clear()


async def _serve(port: int, delay_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Front(delay_s, port), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def delayed(port: int, rtt_s: float) -> Iterator[int]:
    """A port as far away as that; itself for 0."""
    if not rtt_s:
        yield port
        return
    command = [sys.executable, "-m", "tests.bench.delay", str(port), str(rtt_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


if __name__ == "__main__":
    asyncio.run(_serve(int(sys.argv[1]), float(sys.argv[2]) / 2))
