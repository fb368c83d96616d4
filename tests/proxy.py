"""The network between a machine and the store: a relay that can be slow, silent or broken."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path
from urllib.parse import urlsplit


class Proxy:
    """Relays TCP to an endpoint. ``delay_s`` is added in each direction; set ``broken`` or ``silent`` at any time.

    It listens on loopback, or on a socket file that other network namespaces reach.
    """

    def __init__(self, endpoint: str, *, socket_file: Path | None = None, delay_s: float = 0.0) -> None:
        parts = urlsplit(endpoint)
        self._target = (parts.hostname, parts.port)
        self._socket_file = socket_file
        self.delay_s = delay_s
        self.broken = False  # connections are refused and reset
        self.silent = False  # bytes are swallowed: nobody answers
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._ready.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut(self) -> None:
        """From now on nobody gets through, and whoever was is thrown out."""
        self.broken = True
        self._loop.call_soon_threadsafe(self._reset)

    def mend(self) -> None:
        self.broken = self.silent = False

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._loop.close()

    async def _serve(self) -> None:
        self._stopped = asyncio.Event()
        if self._socket_file is not None:
            server = await asyncio.start_unix_server(self._relay, self._socket_file)
        else:
            server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stopped.wait()
        server.close()
        await asyncio.sleep(0)  # who was let in just now begins, so that it can end
        self._reset()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # what was aborted is closed

    def _reset(self) -> None:
        for writer in list(self._writers):
            writer.transport.abort()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.broken:
            writer.transport.abort()
            return
        try:
            other_reader, other_writer = await asyncio.open_connection(*self._target)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        self._writers |= {writer, other_writer}
        try:
            await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer))
        except asyncio.CancelledError:  # not passed on: asyncio would log it
            self._reset()
        finally:
            for end in (writer, other_writer):
                self._writers.discard(end)
                end.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
            if writer.can_write_eof():
                writer.write_eof()
