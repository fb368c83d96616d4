"""Errors at the drivers' edges: what each refusal is, and what its message says (spec §10.2)."""

from __future__ import annotations

import socket
import threading
import time

import pytest

from swampfs.backends.gcs import GcsStore
from swampfs.backends.s3 import S3Store, _kind
from swampfs.backends.s3_wire import Key, Unanswered, Wire
from swampfs.errors import (
    AbsentError,
    AccessDeniedError,
    BucketMissingError,
    ConflictingWriteError,
    CredentialsError,
    PreconditionError,
    PreconditionsUnsupportedError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
)
from swampfs.settings import gcs_source, s3_source
from swampfs.testing.gcs_server import Refusal


@pytest.mark.parametrize(
    ("status", "code", "detail", "has_key", "kind"),
    [
        (404, "NoSuchKey", "", True, AbsentError),
        (404, "NotFound", "", True, AbsentError),
        (404, "NoSuchBucket", "", True, BucketMissingError),
        (404, "", "", False, BucketMissingError),
        (412, "PreconditionFailed", "", True, PreconditionError),
        (409, "ConditionalRequestConflict", "", True, ConflictingWriteError),
        (403, "AccessDenied", "", True, AccessDeniedError),
        (403, "InvalidAccessKeyId", "", True, CredentialsError),
        (400, "ExpiredToken", "", True, CredentialsError),
        (501, "NotImplemented", "A header you provided implies If-None-Match", True, PreconditionsUnsupportedError),
        (507, "InsufficientStorage", "", True, StoreFullError),
        (429, "SlowDown", "", True, StoreBusyError),
        (500, "InternalError", "", True, StoreBusyError),
        (503, "SlowDown", "", True, StoreBusyError),
        (400, "Malformed", "", True, StoreError),
    ],
)
def test_what_an_s3_refusal_is(status, code, detail, has_key, kind):
    assert _kind(status, code, detail, has_key=has_key) is kind


@pytest.mark.parametrize(
    ("status", "kind"),
    [(401, CredentialsError), (403, AccessDeniedError), (404, AbsentError), (408, StoreBusyError),
     (412, PreconditionError), (429, StoreBusyError), (500, StoreBusyError), (503, StoreBusyError), (400, StoreError)],
)  # fmt: skip
def test_what_a_gcs_refusal_is(gcs, status, kind):
    gcs.make_bucket("edges")
    store = GcsStore(gcs_source({"bucket": "edges", "apiEndpoint": gcs.endpoint}, "test"))
    gcs.failures.append(Refusal(status, "someReason", "said so"))
    with pytest.raises(StoreError) as refusal:
        store.head("x")
    assert type(refusal.value) is kind
    if status != 401:  # the client refuses to authenticate without credentials, and tells no more
        assert f"GCS head gs://edges/x failed HTTP {status} someReason — said so" in str(refusal.value)
        assert (refusal.value.http_status, refusal.value.code) == (status, "someReason")


def test_a_missing_gcs_bucket_is_not_a_missing_object(gcs):
    store = GcsStore(gcs_source({"bucket": "no-such-bucket", "apiEndpoint": gcs.endpoint}, "test"))
    for call in (lambda: list(store.list("")), store.verify, lambda: store.head("x")):
        with pytest.raises(BucketMissingError):
            call()


def test_a_gcs_endpoint_that_is_not_there(gcs):
    store = GcsStore(gcs_source({"bucket": "bucket", "apiEndpoint": "http://127.0.0.1:9"}, "test"))
    with pytest.raises(StoreUnreachableError):
        store.get("x")


class Scripted:
    """A server that answers each connection's requests with the bytes it was told to."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/bucket"
        self.requests: list[bytes] = []
        self.connections = 0
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while self._answers:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                while self._answers:
                    request = connection.recv(1 << 16)
                    if not request:
                        break
                    self.requests.append(request)
                    answer = self._answers.pop(0)
                    connection.sendall(answer)
                    if b"content-length" not in answer.lower() and b"chunked" not in answer.lower():
                        break

    def close(self) -> None:
        self._socket.close()
        self._thread.join(2)


def wire(server: Scripted, timeout_s: float = 2.0) -> Wire:
    return Wire(server.url, "us-east-1", lambda: Key("AK", "SK", "TOKEN"), timeout_s)


OK = b'HTTP/1.1 200 OK\r\nETag: "e"\r\nContent-Length: 4\r\n\r\nbody'


RANGE = b'HTTP/1.1 206 Partial Content\r\nETag: "e"\r\nContent-Range: bytes 5-8/20\r\n'


@pytest.mark.parametrize(
    ("answer", "taken", "body"),
    [
        (RANGE + b"Content-Length: 4\r\n\r\nbody", b"body", b""),
        (RANGE + b"Transfer-Encoding: chunked\r\n\r\n1\r\nb\r\n3\r\nody\r\n0\r\n\r\n", b"body", b""),
        (RANGE + b"Connection: close\r\n\r\nbody", b"body", b""),
        (OK, b"", b"body"),
        (RANGE.replace(b"5-8", b"4-7") + b"Content-Length: 4\r\n\r\nbody", b"", b"body"),
    ],
)
def test_a_range_is_taken_however_it_is_delimited_if_it_is_the_one_that_was_asked_for(answer, taken, body):
    server = Scripted(answer, OK, OK)
    client = wire(server)
    found = bytearray()

    def take(offset, piece):
        assert offset == 5 + len(found)
        found.extend(piece)

    assert client.get_range("x", {"Range": "bytes=5-8"}, 5, take).body == body
    assert found == taken
    assert [client.get("x", {}).body for _ in range(2)] == [b"body", b"body"], "nothing is left on the connection"
    server.close()


def test_a_range_that_ends_early_is_no_answer():
    server = Scripted(RANGE + b"Connection: close\r\n\r\nbod")
    with pytest.raises(Unanswered, match="3 bytes came"):
        wire(server).get_range("x", {}, 5, lambda offset, piece: None)
    server.close()


def test_a_disk_that_is_slow_is_not_a_network_that_is_silent():
    server = Scripted(RANGE + b"Content-Length: 4\r\n\r\nbody")
    client = wire(server)
    silent = []

    def take(offset, piece):
        (connection,) = client._busy
        connection.heard_at -= 60.0  # it has been writing since
        silent.append(client.silent_s())
        client.end_silent(time.monotonic() - 1.0)

    client.get_range("x", {}, 5, take)
    assert silent == [0.0]
    server.close()


def test_a_connection_is_used_again_and_requests_are_signed():
    server = Scripted(OK, OK, b'HTTP/1.1 304 Not Modified\r\nETag: "e"\r\n\r\n', OK)
    client = wire(server)
    assert [client.get("a b/é", {}).body for _ in range(2)] == [b"body", b"body"]
    assert client.get("x", {"If-None-Match": '"e"'}).status == 304
    server.close()
    assert server.connections == 1
    head = server.requests[0].decode()
    assert head.startswith("GET /bucket/a%20b/%C3%A9 HTTP/1.1\r\n")
    assert "x-amz-security-token: TOKEN\r\n" in head
    assert "SignedHeaders=host;x-amz-content-sha256;x-amz-date;x-amz-security-token" in head
    assert "if-none-match;" in server.requests[2].decode()


def test_bodies_in_chunks_and_without_length_are_read_whole():
    server = Scripted(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\n2\r\nde\r\n0\r\nTrailer: 1\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n\r\nto the end",
    )
    client = wire(server)
    assert client.get("x", {}).body == b"abcde"
    assert client.get("x", {}).body == b"to the end"
    server.close()


@pytest.mark.parametrize(
    "answer",
    [b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nshort", b"HTTP/1.1 200 OK\r\nContent-Le", b"", b"garbage\r\n\r\n",
     b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n"],
)  # fmt: skip
def test_an_incomplete_answer_is_no_answer(answer):
    class Closing(Scripted):
        def _serve(self) -> None:
            connection, _ = self._socket.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(answer)

    server = Closing()
    with pytest.raises(Unanswered):
        wire(server).get("x", {})
    server.close()


def test_a_server_that_says_nothing_times_out():
    class Silent(Scripted):
        def _serve(self) -> None:
            connection, _ = self._socket.accept()
            with connection:
                connection.recv(1 << 16)
                connection.recv(1)

    server = Silent()
    with pytest.raises(Unanswered) as silence:
        wire(server, 0.2).get("x", {})
    assert isinstance(silence.value.__cause__, TimeoutError)
    server.close()


def test_a_refusal_tells_code_message_and_request():
    xml = b"<Error><Code>SlowDown</Code><Message>less &amp; slower</Message><RequestId>r1</RequestId></Error>"
    server = Scripted(b"HTTP/1.1 503 X\r\nContent-Length: %d\r\n\r\n%s" % (len(xml), xml), OK)
    client = wire(server)
    answer = client.get("x", {})
    assert (answer.status, answer.error) == (503, {"Code": "SlowDown", "Message": "less & slower", "RequestId": "r1"})
    assert client.get("x", {}).body == b"body"
    server.close()


def test_a_local_disk_that_is_full_is_not_the_networks_fault():
    server = Scripted(OK)
    with open("/dev/full", "wb", buffering=0) as full, pytest.raises(OSError, match="No space left"):
        wire(server).get("x", {}, full)
    server.close()


def test_a_bucket_that_moved_is_followed_by_boto(monkeypatch):
    """Redirects to another region are boto3's business; so is everything after the first."""
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y"}.items():
        monkeypatch.setenv(name, value)
    server = Scripted(b"HTTP/1.1 301 Moved\r\nContent-Length: 0\r\n\r\n", OK, OK)
    store = S3Store(s3_source({"bucket": "bucket", "endpoint": server.url.removesuffix("/bucket")}, "test"))
    blob = store.get("x")
    assert blob is not None
    assert blob.body == b"body"
    assert store._wire is None
    server.close()


def test_s3_errors_as_moto_shapes_them(monkeypatch):
    """Shapes that SeaweedFS does not produce."""
    from moto import mock_aws

    for name, value in {
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_ENDPOINT_URL_S3", raising=False)
    with mock_aws():
        store = S3Store(s3_source({"bucket": "bucket"}, "test"))
        store._wire = None  # moto stands in for boto3's transport only
        with pytest.raises(BucketMissingError, match="bucket 'bucket' does not exist"):
            store.get("x")
        store._client.create_bucket(Bucket="bucket")
        with pytest.raises(AbsentError, match="S3 get s3://bucket/x failed HTTP 404 NoSuchKey"):
            store.get("x")
        store.put("x", b"1")
        blob = store.get("x")
        assert blob is not None
        assert blob.body == b"1"


def test_without_credentials_nothing_is_tried_twice(monkeypatch, tmp_path):
    """H39."""
    from swampfs.backends.retry import RetryingStore

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setattr("swampfs.backends.retry._sleep", lambda seconds: pytest.fail("it paused to try again"))
    store = RetryingStore(S3Store(s3_source({"bucket": "bucket", "endpoint": "http://127.0.0.1:9"}, "test")))
    with pytest.raises(CredentialsError) as refusal:
        store.get("x")
    assert "aws sso login" in refusal.value.remedy
