"""The file systems that are compared: how each is mounted on the same data, with an empty or a kept cache.

Each as its own documentation has it, with what it needs to be written through and to keep content on the disk. rclone
and s3fs see plain objects; JuiceFS its own format, with metadata in a Redis as far away as the objects, because several
machines are to share it.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path

from tests import seaweed

READY_S = 30.0


def tool(name: str) -> str | None:
    """Where a program is, beside this Python or in the PATH."""
    return shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


class Peer(ABC):
    """One file system. ``home`` is for what it keeps; without it, it knows nothing yet."""

    name = ""
    program = ""

    def __init__(self, server: seaweed.Server, endpoint: str, home: Path, certificate: Path) -> None:
        self.server = server
        self.endpoint = endpoint
        self.home = home
        self.mnt = home / "mnt"
        self.env = {**os.environ, **server.environment(), "AWS_ENDPOINT_URL_S3": endpoint, "HOME": str(home)}
        # Whom to trust: for us, for Go, for curl.
        self.env |= dict.fromkeys(("AWS_CA_BUNDLE", "SSL_CERT_FILE", "CURL_CA_BUNDLE"), str(certificate))

    @abstractmethod
    def command(self) -> list[str]:
        """What mounts it."""

    def forget(self) -> None:
        """Nothing is known any more, as on a new machine."""
        shutil.rmtree(self.home / "kept", ignore_errors=True)

    def mount(self) -> None:
        self.mnt.mkdir(parents=True, exist_ok=True)
        (self.home / "kept").mkdir(exist_ok=True)
        with open(self.home / f"{self.name}.log", "ab") as log:
            subprocess.run(self.command(), env=self.env, check=True, stdout=log, stderr=log, timeout=120)
        until = time.monotonic() + READY_S
        while not os.path.ismount(self.mnt):
            if time.monotonic() > until:
                raise RuntimeError(f"{self.name} did not mount: see {self.home}")
            time.sleep(0.005)

    def umount(self) -> None:
        for _ in range(100):
            if subprocess.run(["umount", self.mnt], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        else:
            subprocess.run(["umount", "-l", self.mnt], check=True)
        self.wait_gone()

    def wait_gone(self) -> None:
        """The process ends some time after its mount; the next measurement should not share the machine with it."""
        until = time.monotonic() + READY_S
        while time.monotonic() < until and subprocess.run(["pgrep", "-f", str(self.home)], capture_output=True).stdout:
            time.sleep(0.05)

    @contextmanager
    def mounted(self, *, cold: bool) -> Iterator[Path]:
        if cold:
            self.forget()
        self.mount()
        try:
            yield self.mnt
        finally:
            self.umount()


class Swampfs(Peer):
    name = "swampfs"
    program = "swampfs"
    source = "s3://bench/tree"

    def command(self) -> list[str]:
        return [sys.executable, "-P", "-m", "swampfs", "mount", self.source, str(self.mnt),
                "--state-dir", str(self.home / "kept/state")]  # fmt: skip


class Collecting(Swampfs):
    """The same, the kernel collecting what is written."""

    name = "writeback"

    def command(self) -> list[str]:
        return [*super().command(), "--writeback-cache", "on"]


class Rclone(Peer):
    name = "rclone"
    program = "rclone"

    def command(self) -> list[str]:
        options = {"provider": "Other", "endpoint": self.endpoint, "env_auth": "true"}
        self.env |= {f"RCLONE_S3_{key.upper()}": value for key, value in options.items()}
        return [str(tool("rclone")), "mount", ":s3:plain", str(self.mnt), "--daemon", "--vfs-cache-mode", "full",
                "--cache-dir", str(self.home / "kept")]  # fmt: skip


class S3fs(Peer):
    name = "s3fs"
    program = "s3fs"

    def command(self) -> list[str]:
        return [str(tool("s3fs")), "plain", str(self.mnt), "-o", f"url={self.endpoint}", "-o", "use_path_request_style",
                "-o", f"use_cache={self.home}/kept"]  # fmt: skip


class Juicefs(Peer):
    name = "juicefs"
    program = "juicefs"

    def __init__(self, server: seaweed.Server, endpoint: str, home: Path, certificate: Path) -> None:
        super().__init__(server, endpoint, home, certificate)
        (self.redis_port,) = seaweed.free_ports(1)
        self.redis: subprocess.Popen[bytes] | None = None
        self.meta = self._meta(self.redis_port)

    @staticmethod
    def _meta(port: int) -> str:
        return f"redis://127.0.0.1:{port}/1"

    def start(self) -> None:
        """The metadata server."""
        self.home.mkdir(parents=True, exist_ok=True)
        self.redis = subprocess.Popen(
            [str(tool("redis-server")), "--port", str(self.redis_port), "--bind", "127.0.0.1", "--save", "",
             "--dir", str(self.home), "--logfile", str(self.home / "redis.log")],
        )  # fmt: skip
        until = time.monotonic() + READY_S
        while time.monotonic() < until:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.redis_port), timeout=1):
                return
            time.sleep(0.01)
        raise RuntimeError(f"Redis did not start: see {self.home}")

    def stop(self) -> None:
        if self.redis is not None:
            self.redis.terminate()
            self.redis.wait()

    def format(self) -> None:
        bucket = f"{self.server.endpoint}/juice"
        subprocess.run(
            [str(tool("juicefs")), "format", "--storage", "s3", "--bucket", bucket, "--access-key", seaweed.ACCESS_KEY,
             "--secret-key", seaweed.SECRET_KEY, "--trash-days", "0", self.meta, "bench"],
            env=self.env, check=True, capture_output=True,
        )  # fmt: skip

    def move(self, endpoint: str, redis_port: int) -> None:
        """The same data is reached in another way."""
        self.meta = self._meta(redis_port)
        subprocess.run(
            [str(tool("juicefs")), "config", self.meta, "--bucket", f"{endpoint}/juice", "--yes"],
            env=self.env, check=True, capture_output=True,
        )  # fmt: skip

    def command(self) -> list[str]:
        return [str(tool("juicefs")), "mount", "-d", "--no-usage-report", "--cache-dir", str(self.home / "kept"),
                self.meta, str(self.mnt)]  # fmt: skip


class Bindfs(Peer):
    """What a passthrough file system in C costs: the same files on the local disk."""

    name = "bindfs"
    program = "bindfs"

    def command(self) -> list[str]:
        return [str(tool("bindfs")), str(self.home / "native"), str(self.mnt)]

    def forget(self) -> None:
        return


ALL = (Swampfs, Rclone, Juicefs, S3fs)


def versions(names: list[str]) -> dict[str, str]:
    """What was measured, by its own words."""
    said = {Swampfs.name: version("swampfs")}
    for kind in ALL[1:]:
        if kind.name in names:
            done = subprocess.run([str(tool(kind.program)), "--version"], capture_output=True, text=True, check=True)
            said[kind.name] = done.stdout.splitlines()[0]
    return said
