"""A real S3 server for the tests: SeaweedFS on free loopback ports, ended by pid."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

ACCESS_KEY = "swampfs-test"
SECRET_KEY = "swampfs-test-secret"
LEAST_WRITER, LEAST_READER = "swampfs-least-writer", "swampfs-least-reader"
"""Access keys that may do no more than a mount needs, below ``CORNER``."""
BUCKET, CORNER = "swampfs-tests", "corner"
READY_S = 90.0


def free_ports(count: int) -> list[int]:
    """Distinct free ports below the ephemeral range, each with its gRPC companion 10000 above."""
    found: list[int] = []
    with ExitStack() as open_sockets:
        port = 12000 + os.getpid() * 16 % 8000  # two runs that begin together look in different places
        while len(found) < count:
            port += 1
            try:
                for number in (port, port + 10000):
                    probe = open_sockets.enter_context(socket.socket())
                    probe.bind(("127.0.0.1", number))
            except OSError:
                continue
            found.append(port)
    return found


@dataclass
class Server:
    """A running server: where it is, and a client to look at it from outside."""

    endpoint: str
    process: subprocess.Popen[bytes]
    directory: Path
    ports: tuple[int, ...]
    secure_port: int = 0
    """Where it also answers with TLS, if it has a certificate."""

    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(s3={"addressing_style": "path"}, retries={"total_max_attempts": 3}, max_pool_connections=32),
        )

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(3)  # it would wait for idle connections of clients; nothing here is to be kept
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.directory, ignore_errors=True)
        for port in (*self.ports, *(port + 10000 for port in self.ports)):
            # Its sockets are named after their port, in /tmp whatever TMPDIR says.
            for left in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                left.unlink(missing_ok=True)


def _identity(name: str, key: str, actions: list[str]) -> dict[str, Any]:
    return {"name": name, "credentials": [{"accessKey": key, "secretKey": SECRET_KEY}], "actions": actions}


def weed_binary() -> str:
    beside = Path(sys.executable).parent / "weed"
    return str(beside) if beside.exists() else str(shutil.which("weed"))


def start(certificate: tuple[Path, Path] | None = None) -> Server:
    """Start a server and wait until it answers an authenticated request. ``certificate`` comes with its key."""
    directory = Path(tempfile.mkdtemp(prefix="swampfs-weed-"))
    master, volume, filer, s3, secure = free_ports(5)
    below = f"{BUCKET}/{CORNER}"
    identities = [
        _identity("tests", ACCESS_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
        # What docs/security.md says is enough, in this server's words: listing the bucket, and objects of one prefix.
        _identity(LEAST_WRITER, LEAST_WRITER, [f"List:{BUCKET}", f"Read:{below}/*", f"Write:{below}/*"]),
        _identity(LEAST_READER, LEAST_READER, [f"List:{BUCKET}", f"Read:{below}/*"]),
    ]
    config = directory / "identities.json"
    config.write_text(json.dumps({"identities": identities}))
    (directory / "data").mkdir()
    tls = [] if certificate is None else [f"-s3.port.https={secure}"]
    tls += [f"-s3.{name}.file={path}" for name, path in zip(("cert", "key"), certificate or (), strict=False)]
    with open(directory / "weed.log", "wb") as log:
        process = subprocess.Popen(
            [
                weed_binary(), f"-logdir={directory}", "server", "-filer", "-s3", "-ip=127.0.0.1", "-ip.bind=127.0.0.1",
                f"-dir={directory / 'data'}", "-volume.max=400", "-master.telemetry=false",
                f"-master.port={master}", f"-master.port.grpc={master + 10000}",
                f"-volume.port={volume}", f"-volume.port.grpc={volume + 10000}",
                f"-filer.port={filer}", f"-filer.port.grpc={filer + 10000}",
                f"-s3.port={s3}", f"-s3.port.grpc={s3 + 10000}",
                "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={config}", *tls,
            ],
            stdout=log, stderr=log, cwd=directory, env={**os.environ, "HOME": str(directory)},
        )  # fmt: skip
    ports = (master, volume, filer, s3)
    server = Server(f"http://127.0.0.1:{s3}", process, directory, ports, secure if certificate else 0)
    deadline = time.monotonic() + READY_S
    while True:
        try:
            client = server.client()
            client.create_bucket(Bucket="ready")
            client.put_object(Bucket="ready", Key="probe", Body=b"1")
            client.delete_object(Bucket="ready", Key="probe")
            return server
        except Exception:
            if time.monotonic() > deadline or process.poll() is not None:
                tail = (directory / "weed.log").read_text(errors="replace")[-2000:]
                server.stop()
                raise RuntimeError(f"SeaweedFS did not start: {tail}") from None
            time.sleep(0.2)
