"""The server that stands in for Google Cloud Storage behaves as its JSON API is documented to.

With ``SWAMPFS_LIVE_GCS_BUCKET`` set, the tests of the client run against that bucket instead (credentials: ADC).
"""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
import uuid

import pytest
from google.api_core import exceptions as api
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage

from swampfs.testing.gcs_server import CHUNK, GcsServer, Refusal

LIVE = os.environ.get("SWAMPFS_LIVE_GCS_BUCKET")
ONCE = {"retry": None, "timeout": 30}


@pytest.fixture
def bucket(gcs: GcsServer):
    if LIVE:
        client = storage.Client()
        name = LIVE
    else:
        client = storage.Client(
            project="p", credentials=AnonymousCredentials(), client_options={"api_endpoint": gcs.endpoint}
        )
        name = f"b-{uuid.uuid4().hex[:8]}"
        gcs.make_bucket(name)
    client._bucket_metadata_cache = None
    found = client.bucket(name)
    found.top = f"swampfs-test-{uuid.uuid4().hex}/"
    yield found
    for blob in list(client.list_blobs(found, prefix=found.top)):
        blob.delete()
    client.close()


def put(bucket, name: str, body: bytes = b"x", **conditions):
    blob = bucket.blob(bucket.top + name)
    blob.upload_from_string(body, **ONCE, **conditions)
    return blob


def test_generations_grow_and_metagenerations_start_anew(bucket):
    first = put(bucket, "x", b"one")
    first.metadata = {"colour": "blue"}
    first.patch(**ONCE)
    assert first.metageneration == 2
    second = put(bucket, "x", b"two")
    assert second.generation > first.generation
    assert second.metageneration == 1
    second.delete(**ONCE)
    assert put(bucket, "x").generation > second.generation


def test_every_precondition_of_an_upload(bucket):
    put(bucket, "x", if_generation_match=0)
    with pytest.raises(api.PreconditionFailed):
        put(bucket, "x", if_generation_match=0)
    found = bucket.get_blob(bucket.top + "x")
    with pytest.raises(api.PreconditionFailed):
        put(bucket, "x", if_generation_match=found.generation - 1)
    put(bucket, "x", if_generation_match=found.generation)
    found = bucket.get_blob(bucket.top + "x")
    with pytest.raises(api.PreconditionFailed):
        put(bucket, "x", if_metageneration_match=7)
    put(bucket, "x", if_metageneration_match=found.metageneration)
    with pytest.raises(api.PreconditionFailed):
        put(bucket, "none", if_generation_match=5)


def test_every_precondition_of_reading(bucket):
    blob = put(bucket, "x", b"body")
    fresh = bucket.blob(bucket.top + "x")
    with pytest.raises(api.NotModified):
        fresh.reload(if_generation_not_match=blob.generation, **ONCE)
    with pytest.raises(api.PreconditionFailed):
        fresh.reload(if_generation_match=blob.generation + 1, **ONCE)
    with pytest.raises(api.NotModified):
        fresh.download_as_bytes(if_generation_not_match=blob.generation, **ONCE)
    assert fresh.download_as_bytes(if_generation_not_match=blob.generation + 1, **ONCE) == b"body"
    with pytest.raises(api.PreconditionFailed):
        fresh.download_as_bytes(if_metageneration_match=9, **ONCE)
    assert fresh.download_as_bytes(start=1, end=2, **ONCE) == b"od"
    with pytest.raises(api.RequestRangeNotSatisfiable):
        fresh.download_as_bytes(start=99, **ONCE)
    with pytest.raises(api.NotFound):
        bucket.blob(bucket.top + "none").reload(**ONCE)


def test_every_precondition_of_deleting(bucket):
    blob = put(bucket, "x")
    fresh = bucket.blob(bucket.top + "x")
    with pytest.raises(api.PreconditionFailed):
        fresh.delete(if_generation_match=blob.generation + 1, **ONCE)
    with pytest.raises(api.PreconditionFailed):
        fresh.delete(if_metageneration_match=4, **ONCE)
    fresh.delete(if_generation_match=blob.generation, **ONCE)
    with pytest.raises(api.NotFound):
        fresh.delete(**ONCE)


def test_a_resumable_upload_in_chunks(bucket):
    body = os.urandom(CHUNK * 2 + 17)
    blob = bucket.blob(bucket.top + "big", chunk_size=CHUNK)
    blob._MAX_MULTIPART_SIZE = 1
    import io

    blob.upload_from_file(io.BytesIO(body), size=len(body), if_generation_match=0, **ONCE)
    assert bucket.blob(bucket.top + "big").download_as_bytes(**ONCE) == body
    with pytest.raises(api.PreconditionFailed):
        blob.upload_from_file(io.BytesIO(body), size=len(body), if_generation_match=1, **ONCE)


def test_a_rewrite_of_several_calls(bucket, gcs):
    body = os.urandom(3 * gcs.rewrite_bytes_per_call + 5) if not LIVE else b"small"
    source = put(bucket, "source", body)
    target = bucket.blob(bucket.top + "target")
    calls, token = 0, None
    while True:
        calls += 1
        token, rewritten, size = target.rewrite(
            source, token=token, if_generation_match=0, if_source_generation_match=source.generation, **ONCE
        )
        assert size == len(body)
        if token is None:
            break
    assert LIVE or calls == 4
    assert rewritten == len(body)
    assert bucket.blob(bucket.top + "target").download_as_bytes(**ONCE) == body
    with pytest.raises(api.PreconditionFailed):
        target.rewrite(source, if_generation_match=0, **ONCE)
    with pytest.raises(api.PreconditionFailed):
        target.rewrite(source, if_source_generation_match=1, **ONCE)


def test_listings_by_prefix_delimiter_pages_and_offsets(bucket):
    for name in ("a/1", "a/2", "b/1", "c", "é", "z"):
        put(bucket, name)
    top, client = bucket.top, bucket.client

    def names(**options):
        options.setdefault("prefix", top)
        return [blob.name.removeprefix(top) for blob in client.list_blobs(bucket, **options, **ONCE)]

    assert names() == ["a/1", "a/2", "b/1", "c", "z", "é"]
    assert names(page_size=2) == names()
    assert names(prefix=top + "a/") == ["a/1", "a/2"]
    assert names(start_offset=top + "b/1", end_offset=top + "z") == ["b/1", "c"]
    listing = client.list_blobs(bucket, prefix=top, delimiter="/", page_size=2, **ONCE)
    assert [blob.name.removeprefix(top) for blob in listing] == ["c", "z", "é"]
    assert listing.prefixes == {top + "a/", top + "b/"}


def test_checksums_that_came_with_an_upload_are_checked(gcs):
    gcs.make_bucket("sums")
    boundary = b"xyz"
    fields = json.dumps({"name": "x", "md5Hash": "AAAAAAAAAAAAAAAAAAAAAA=="}).encode()
    body = (
        b"--xyz\r\ncontent-type: application/json\r\n\r\n" + fields + b"\r\n--xyz\r\ncontent-type: text/plain\r\n\r\n"
        b"body\r\n--" + boundary + b"--"
    )
    request = urllib.request.Request(
        f"{gcs.endpoint}/upload/storage/v1/b/sums/o?uploadType=multipart",
        data=body,
        headers={"Content-Type": 'multipart/related; boundary="xyz"'},
    )
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(request)
    assert refusal.value.code == 400
    refusal.value.close()
    assert gcs.objects("sums") == {}


@pytest.mark.parametrize(
    ("path", "status", "reason"),
    [("/storage/v1/b/errors/o/none", 404, "notFound"), ("/storage/v1/b/nobucket/o", 404, "notFound"),
     ("/storage/v1/b/errors/o/x?ifGenerationMatch=1", 412, "conditionNotMet"),
     ("/storage/v1/b/errors/o/x?ifGenerationMatch=y", 400, "invalid")],
)  # fmt: skip
def test_errors_have_the_form_of_the_api(gcs, path, status, reason):
    gcs.make_bucket("errors")
    gcs.buckets["errors"]["x"] = gcs._store("errors", "x", b"", {})
    with pytest.raises(urllib.error.HTTPError) as refusal:
        urllib.request.urlopen(gcs.endpoint + path)
    body = json.loads(refusal.value.read())
    refusal.value.close()
    assert (refusal.value.code, body["error"]["code"]) == (status, status)
    assert body["error"]["errors"][0]["reason"] == reason
    assert body["error"]["errors"][0]["domain"] == "global"
    assert body["error"]["message"] == body["error"]["errors"][0]["message"]


def test_a_failure_can_be_ordered_for_the_next_request(gcs, bucket):
    if LIVE:
        # Only the server of our own can be told to fail.
        pytest.skip("the service takes no orders")
    gcs.failures.append(Refusal(503, "backendError", "try again"))
    with pytest.raises(api.ServiceUnavailable):
        put(bucket, "x")
    put(bucket, "x")
