"""Every driver keeps every obligation of the store port: SeaweedFS, a GCS server, a directory, memory."""

from __future__ import annotations

import pytest

from swampfs.backends.filesystem import FilesystemStore
from swampfs.backends.gcs import GcsStore
from swampfs.backends.s3 import S3Store
from swampfs.settings import gcs_source, s3_source
from swampfs.testing.memory import MemoryStore
from swampfs.testing.stores import ObjectStoreSuite


class TestMemory(ObjectStoreSuite):
    @pytest.fixture
    def store(self):
        return MemoryStore()


class TestDirectory(ObjectStoreSuite):
    @pytest.fixture
    def store(self, tmp_path):
        (tmp_path / "datastore").mkdir()
        return FilesystemStore(str(tmp_path / "datastore"))


class TestS3(ObjectStoreSuite):
    @pytest.fixture
    def store(self, server, own_bucket, monkeypatch):
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        return S3Store(s3_source({"bucket": own_bucket, "endpoint": server.endpoint}, "test"))


class TestS3ThroughBoto(TestS3):
    """The way of large bodies, proxies and redirects, for everything."""

    @pytest.fixture
    def store(self, server, own_bucket, monkeypatch):
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
        store = S3Store(s3_source({"bucket": own_bucket, "endpoint": server.endpoint}, "test"))
        store._wire = None
        return store


class TestGcs(ObjectStoreSuite):
    @pytest.fixture
    def store(self, gcs):
        gcs.make_bucket("suite")
        return GcsStore(gcs_source({"bucket": "suite", "apiEndpoint": gcs.endpoint}, "test"))
