"""A place of its own: a network namespace whose only way out is a slow relay, and a clock that may be wrong."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tests.proxy import Proxy

PORT = 9000
FAKETIME = next(iter(Path("/usr/lib").glob("*/faketime/libfaketime.so.1")), None)


class Site:
    """Run commands with ``within`` and ``environment``; the store is at its own loopback there."""

    def __init__(self, endpoint: str, directory: Path, *, delay_s: float, clock: str = "") -> None:
        directory.mkdir(parents=True)
        gate = directory / "out.sock"
        self.proxy = Proxy(endpoint, socket_file=gate, delay_s=delay_s)
        self._relay = subprocess.Popen(
            ["unshare", "--net", sys.executable, "-m", "tests.site", str(gate)], stdout=subprocess.PIPE
        )
        assert self._relay.stdout is not None
        assert self._relay.stdout.readline() == b"ready\n", "the relay in the namespace"
        self.within = ("nsenter", f"--net=/proc/{self._relay.pid}/ns/net", "--")
        self.environment = {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{PORT}"}
        if clock:
            assert FAKETIME is not None, "the package libfaketime"
            self.environment |= {
                "LD_PRELOAD": str(FAKETIME),
                "FAKETIME": clock,
            }

    def close(self) -> None:
        self._relay.kill()
        self._relay.communicate()
        self.proxy.close()
        for left in Path("/dev/shm").glob("*faketime_s??_*"):  # of processes that were killed
            if not Path("/proc", left.name.rpartition("_")[2]).exists():
                left.unlink(missing_ok=True)


def _relay(gate: str) -> None:
    """Inside the namespace: from its loopback to the socket file outside."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    listener = socket.create_server(("127.0.0.1", PORT))
    print("ready", flush=True)
    while True:
        near, _ = listener.accept()
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far = socket.socket(socket.AF_UNIX)
        try:
            far.connect(gate)
        except OSError:
            near.close()
            continue
        for ends in ((near, far), (far, near)):
            threading.Thread(target=_pump, args=ends, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    try:
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            end.close()


if __name__ == "__main__":
    os.environ.pop("LD_PRELOAD", None)
    _relay(sys.argv[1])
