"""The kit passes for every built-in datastore, as a third party would run it."""

from __future__ import annotations

import itertools

import pytest

from swampfs.datastore import FILESYSTEM, GCS, S3, ObjectStoreProvider
from swampfs.testing.conformance import DatastoreSuite
from swampfs.testing.memory import MemoryStore

_buckets = itertools.count(1)


class TestMemory(DatastoreSuite):
    @pytest.fixture
    def make_provider(self):
        store = MemoryStore()
        return lambda: ObjectStoreProvider(store, "@swampfs/memory", "memory")


class TestDirectory(DatastoreSuite):
    @pytest.fixture
    def make_provider(self, tmp_path):
        (tmp_path / "datastore").mkdir()
        return lambda: FILESYSTEM.create_provider({"path": str(tmp_path / "datastore")})


class TestS3(DatastoreSuite):
    @pytest.fixture
    def make_provider(self, server, own_bucket, monkeypatch):
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        return lambda: S3.create_provider({"bucket": own_bucket, "endpoint": server.endpoint, "prefix": "team"})


class TestGcs(DatastoreSuite):
    @pytest.fixture
    def make_provider(self, gcs):
        bucket = f"suite-{next(_buckets)}"
        gcs.make_bucket(bucket)
        return lambda: GCS.create_provider({"bucket": bucket, "apiEndpoint": gcs.endpoint, "prefix": "team"})
