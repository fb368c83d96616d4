"""Objects too large for one request: sent in parts, whole or not at all."""

from __future__ import annotations

import os

import pytest

from swampfs.backends import s3
from swampfs.backends.s3 import S3Store
from swampfs.errors import AbsentError, AccessDeniedError, PreconditionError
from swampfs.provider import ABSENT
from swampfs.settings import s3_source
from swampfs.testing.fault_proxy import Fault, FaultProxy
from tests.conftest import BUCKET

MIB = 1 << 20


@pytest.fixture
def store(bucket, server, monkeypatch):
    """Through a proxy, with small parts."""
    monkeypatch.setattr(s3, "_SINGLE", 5 * MIB)
    monkeypatch.setattr(s3, "PART", 5 * MIB)
    monkeypatch.setattr("swampfs.backends.s3_parts._PAUSE_S", 0.01)
    proxy = FaultProxy(server.endpoint)
    for name, value in {**bucket.env, "AWS_ENDPOINT_URL_S3": proxy.url}.items():
        monkeypatch.setenv(name, value)
    store = S3Store(s3_source({"bucket": BUCKET}, "test"))
    store.proxy = proxy
    yield store
    proxy.close()


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(os.urandom(12 * MIB + 17))
    return path


def left_over(bucket):
    found = bucket.client.list_multipart_uploads(Bucket=BUCKET, Prefix=bucket.prefix)
    return found.get("Uploads", [])


def test_a_large_file_goes_in_parts_and_comes_back_whole(store, bucket, large, tmp_path):
    seen = []
    store.proxy.matches = lambda method, target: bool(seen.append((method, target.partition("?")[2][:12])))
    info = store.put(f"{bucket.prefix}/large", str(large))
    assert [query for method, query in seen if method == "PUT"] == ["partNumber=1", "partNumber=2", "partNumber=3"]
    assert info.size == 12 * MIB + 17
    assert store.head(f"{bucket.prefix}/large").etag == info.etag
    store.download(f"{bucket.prefix}/large", str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == large.read_bytes()
    assert left_over(bucket) == []


@pytest.mark.parametrize("fault", [Fault.RESET_BEFORE, Fault.RESET_AFTER, Fault.UNAVAILABLE])
def test_a_part_that_fails_is_sent_again_alone(store, bucket, large, fault):
    struck, parts = [], []

    def once(method, target):
        if method == "PUT":
            parts.append(target.partition("?")[2][:12])
        if "partNumber=2" in target and not struck:
            struck.append(target)
            return True
        return False

    store.proxy.matches = once
    store.proxy.set(fault)
    store.put(f"{bucket.prefix}/large", str(large))
    assert parts == ["partNumber=1", "partNumber=2", "partNumber=2", "partNumber=3"]
    assert bucket.get("large") == large.read_bytes()


def test_an_upload_that_is_refused_midway_leaves_nothing(store, bucket, large):
    store.proxy.matches = lambda method, target: "partNumber=3" in target
    store.proxy.set(Fault.DENIED)
    with pytest.raises(AccessDeniedError):
        store.put(f"{bucket.prefix}/large", str(large))
    assert left_over(bucket) == []
    with pytest.raises(AbsentError):
        store.head(f"{bucket.prefix}/large")


def test_a_condition_is_of_the_whole_object(store, bucket, large):
    bucket.put("large", b"somebody else's")
    with pytest.raises(PreconditionError):
        store.put(f"{bucket.prefix}/large", str(large), ABSENT)
    assert bucket.get("large") == b"somebody else's"
    assert left_over(bucket) == []
