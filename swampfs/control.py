"""The control socket of a running mount: one JSON request per connection, one JSON line back.

Answers ``status`` from memory, so it works with the backend down. Only the mounting user and root may connect.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from swampfs.errors import SwampfsError

log = logging.getLogger(__name__)

Command = Callable[[Mapping[str, Any]], Awaitable[dict[str, Any]]]

_LONGEST_REQUEST = 1 << 20


class Control:
    """Serves a listening socket. ``commands`` maps ``cmd`` to what answers it."""

    def __init__(self, listener: socket.socket, commands: Mapping[str, Command]) -> None:
        self._listener = listener
        self._commands = commands

    async def run(self) -> None:
        sock = trio.socket.from_stdlib_socket(self._listener)
        async with trio.open_nursery() as nursery:
            while True:
                try:
                    connection, _ = await sock.accept()
                except OSError as error:  # out of descriptors: the file system matters more than this socket
                    log.info("control socket: %s", error)
                    await trio.sleep(1)
                    continue
                nursery.start_soon(self._serve, connection)

    async def _serve(self, connection: trio.socket.SocketType) -> None:
        with connection:
            try:
                if not _may_connect(connection):
                    return
                answer = await self._answer(await _line(connection))
                await trio.SocketStream(connection).send_all(json.dumps(answer).encode() + b"\n")
            except (OSError, trio.BrokenResourceError) as error:
                log.debug("control connection ended: %s", error)

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line)
            command = self._commands[message["cmd"]]
        except (ValueError, KeyError, TypeError):
            return {"error": "not a request this mount understands", "exitCode": 1}
        try:
            return await command(message)
        except SwampfsError as error:
            return {"error": error.line(), "exitCode": error.exit_code}
        except Exception as error:
            log.exception("control command failed")
            return {"error": f"internal error: {error}", "exitCode": 2}


def _may_connect(connection: trio.socket.SocketType) -> bool:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", credentials)
    return uid in (0, os.geteuid())


async def _line(connection: trio.socket.SocketType) -> bytes:
    data = b""
    while not data.endswith(b"\n") and len(data) < _LONGEST_REQUEST:
        chunk = await connection.recv(65536)
        if not chunk:
            break
        data += chunk
    return data
