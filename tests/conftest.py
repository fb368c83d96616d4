"""Fixtures of the whole suite: one S3 server per session, machines that leave nothing behind, quiet logs."""

from __future__ import annotations

import copy
import itertools
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from swampfs.testing.gcs_server import GcsServer
from tests import seaweed
from tests.caches import World
from tests.harness import FIXTURES, Machine
from tests.proxy import Proxy
from tests.seaweed import BUCKET

_prefixes = itertools.count(1)


@pytest.fixture(scope="session")
def server() -> Iterator[seaweed.Server]:
    running = seaweed.start()
    running.client().create_bucket(Bucket=BUCKET)
    yield running
    running.stop()


class Bucket:
    """One test's corner of the server: a prefix of the shared bucket, looked at from outside."""

    def __init__(self, server: seaweed.Server, prefix: str) -> None:
        self.prefix = prefix
        self.url = f"s3://{BUCKET}/{prefix}"
        self.env = server.environment()
        self.client: Any = server.client()

    def put(self, key: str, body: bytes) -> None:
        self.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}", Body=body)

    def get(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}")["Body"].read()

    def delete(self, key: str) -> None:
        self.client.delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{key}")

    def keys(self) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=self.prefix + "/")
        found = [item["Key"] for page in pages for item in page.get("Contents", ())]
        return sorted(key[len(self.prefix) + 1 :] for key in found)

    def below(self, name: str) -> Bucket:
        """A directory of it."""
        inner = copy.copy(self)
        inner.prefix, inner.url = f"{self.prefix}/{name}", f"{self.url}/{name}"
        return inner

    def load(self, directory: Path) -> None:
        for path in sorted(directory.rglob("*")):
            if path.is_file():
                self.put(str(path.relative_to(directory)), path.read_bytes())


@pytest.fixture
def bucket(server: seaweed.Server) -> Bucket:
    return Bucket(server, f"t{next(_prefixes)}")


@pytest.fixture
def own_bucket(server: seaweed.Server) -> Iterator[str]:
    """A bucket of this test alone, gone afterwards."""
    name = f"own-{next(_prefixes)}"
    client: Any = server.client()
    client.create_bucket(Bucket=name)
    yield name
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=name):
        for item in page.get("Contents", ()):
            client.delete_object(Bucket=name, Key=item["Key"])
    client.delete_bucket(Bucket=name)


@pytest.fixture
def network(server: seaweed.Server) -> Iterator[Callable[..., Proxy]]:
    """Makes a machine's own way to the server; put its ``url`` into the machine's environment."""
    with ExitStack() as at_end:

        def make(**more: Any) -> Proxy:
            proxy = Proxy(server.endpoint, **more)
            at_end.callback(proxy.close)
            return proxy

        yield make


@pytest.fixture(scope="session")
def gcs() -> Iterator[GcsServer]:
    with GcsServer() as running:
        yield running


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("home")
    yield path
    shutil.rmtree(path, ignore_errors=True)


class Fleet:
    """Makes machines, and checks at the end that each was quiet and left nothing behind."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self.machines: list[Machine] = []
        self.expected_log: list[str] = []

    def machine(self, name: str = "a", env: dict[str, str] | None = None, **more: Any) -> Machine:
        machine = Machine(self._home, env or {}, name, **more)
        self.machines.append(machine)
        return machine

    def close(self) -> None:
        for machine in self.machines:
            machine.close()

    def complaints(self) -> list[str]:
        """Log lines at WARNING or above, and tracebacks, that no test announced."""
        said = [entry for machine in self.machines for entry in re.split(r"\n(?=\d{4}-\d\d-\d\d )", machine.log())]
        loud = [entry for entry in said if " WARNING " in entry or " ERROR " in entry or "\nTraceback" in entry]
        return [entry for entry in loud if not any(word in entry for word in self.expected_log)]


@pytest.fixture
def fleet(home: Path) -> Iterator[Fleet]:
    running = Fleet(home)
    yield running
    running.close()
    assert running.complaints() == []


@pytest.fixture
def store_dir(home: Path) -> Path:
    """An empty directory datastore."""
    path = home / "datastore"
    path.mkdir()
    return path


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    loud = [r for r in caplog.get_records("call") if r.levelno >= logging.WARNING and r.name.startswith("swampfs")]
    assert not loud, loud


@pytest.fixture(scope="session")
def reference() -> Path:
    """The golden fixtures beside the clone; a stranger has none."""
    if not FIXTURES.is_dir():
        # Not ours to ship: a stranger's clone goes without. Where they ought to be, .ci/run fails on this line.
        pytest.skip(f"no reference fixtures at {FIXTURES}")
    return FIXTURES


def pytest_configure(config: pytest.Config) -> None:
    os.environ.setdefault("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """A datastore in memory for library caches; nothing waits for its retries."""
    monkeypatch.setattr("swampfs.backends.retry._sleep", lambda seconds: None)
    monkeypatch.setattr("swampfs.sync.cache.parts._SHARD_PAUSE_S", 0.0)
    monkeypatch.setattr("swampfs.sync.cache.pull._MISMATCH_PAUSE_S", 0.0)
    return World(tmp_path)
