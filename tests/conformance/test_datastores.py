"""The kit passes for every built-in datastore, as a third party would run it.

With ``SWAMPFS_LIVE_GCS_BUCKET`` set, also for that bucket of the real service, below a prefix of its own.
"""

from __future__ import annotations

import itertools
import os
import uuid

import pytest

from swampfs.datastore import FILESYSTEM, GCS, S3, ObjectStoreProvider
from swampfs.testing.conformance import DatastoreSuite
from swampfs.testing.memory import MemoryStore

LIVE = os.environ.get("SWAMPFS_LIVE_GCS_BUCKET")
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


if LIVE:

    class TestLiveGcs(DatastoreSuite):
        @pytest.fixture
        def make_provider(self):
            prefix = f"swampfs-test-{uuid.uuid4().hex}"
            make = lambda: GCS.create_provider({"bucket": LIVE, "prefix": prefix})  # noqa: E731
            yield make
            store = make()._remote.store
            for info in list(store.list(f"{prefix}/")):
                store.delete(info.key)
