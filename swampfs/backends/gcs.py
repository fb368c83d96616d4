"""Google Cloud Storage through google-cloud-storage. The only module that imports it.

An ETag of the port is the object's generation, a decimal string: every precondition is a generation precondition.
The client's own retries are off everywhere: :mod:`swampfs.backends.retry` decides.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, TypeVar

import requests
import urllib3
from google.api_core import exceptions as api
from google.auth import exceptions as auth
from google.auth.credentials import AnonymousCredentials
from google.cloud import storage
from google.resumable_media import common as media

from swampfs.backends.answers import PREVIEW_BYTES, answer_text
from swampfs.errors import (
    AbsentError,
    AccessDeniedError,
    BucketMissingError,
    CredentialsError,
    PreconditionError,
    SettingsError,
    StoreBusyError,
    StoreError,
    StoreUnreachableError,
)
from swampfs.provider import ALWAYS, Blob, ObjectInfo, Precondition, Take
from swampfs.records import timestamp
from swampfs.settings import Source

T = TypeVar("T")

_CONTENT_TYPE = "application/octet-stream"
_LISTED = "items(name,size,generation,updated),nextPageToken"
_UNREACHED = (requests.RequestException, urllib3.exceptions.HTTPError, auth.TransportError, media.InvalidResponse)
_SIGN_IN = "sign in again: `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"


class GcsStore:
    """:class:`~swampfs.provider.ObjectStore` of one bucket. Thread-safe: blobs are never shared."""

    label = "GCS"

    def __init__(self, source: Source, connections: int = 64) -> None:
        self.name = f"gs://{source.bucket}"
        self._timeout_s = source.request_timeout_s
        try:
            self._client = self._connect(source)
        except auth.GoogleAuthError as error:
            raise CredentialsError(f"no credentials for {self.name}: {error}", remedy=_SIGN_IN) from None
        except ValueError as error:
            raise SettingsError(f"{self.name} cannot be addressed: {error}") from None
        # Otherwise the first use of a bucket, and any 404 in it, asks for the bucket's metadata in a thread.
        setattr(self._client, "_bucket_metadata_cache", None)  # noqa: B010
        session: Any = self._client._http
        adapter = requests.adapters.HTTPAdapter(pool_connections=4, pool_maxsize=connections)
        session.mount("https://", adapter)
        session.mount("http://", adapter)
        self._bucket = self._client.bucket(source.bucket)
        endpoint = source.endpoint or os.environ.get("STORAGE_EMULATOR_HOST") or "https:"
        self.authenticated = endpoint.startswith("https:")

    @staticmethod
    def _connect(source: Source) -> Any:
        if source.endpoint:  # an emulator or a private endpoint: no authentication (spec §11)
            return storage.Client(
                project=source.project or "swampfs",
                credentials=_anonymous(),
                client_options={"api_endpoint": source.endpoint},
            )
        return storage.Client(project=source.project)

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        blob, body = self._bucket.blob(key), io.BytesIO()
        condition = {"if_generation_not_match": int(unless)} if unless else {}

        def read() -> Blob | None:
            try:
                blob.download_to_file(body, raw_download=True, checksum=None, **condition, **self._once)
            except api.NotModified:
                return None
            content = body.getvalue()
            return Blob(content, ObjectInfo(key, len(content), str(blob.generation or ""), ""))

        return self._call("get", key, read)

    def download(self, key: str, target: str) -> ObjectInfo:
        blob = self._bucket.blob(key)

        def transfer() -> ObjectInfo:
            with open(target, "wb") as file:
                blob.download_to_file(file, raw_download=True, checksum=None, **self._once)
                return ObjectInfo(key, file.tell(), str(blob.generation or ""), "")

        return self._call("get", key, transfer)

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        blob = self._bucket.blob(key)

        def read() -> Blob:
            if not etag:
                blob.reload(**self._once)  # an answer with a part does not tell the size of the whole
            more = {"if_generation_match": int(etag or blob.generation)}
            body = blob.download_as_bytes(
                start=offset, end=offset + size - 1, raw_download=True, checksum=None, **more, **self._once
            )
            stored_us = int(blob.generation or 0)  # a generation is the moment it was made
            modified = timestamp(stored_us * 1000) if stored_us else ""
            return Blob(body, ObjectInfo(key, int(blob.size or 0), str(blob.generation or ""), modified))

        return self._call("get", key, read).given(offset, take)

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        blob = self._bucket.blob(key)
        more = {"checksum": None, "content_type": _CONTENT_TYPE, **_condition(when), **self._once}

        def store() -> ObjectInfo:
            if isinstance(body, bytes):
                blob.upload_from_string(body, **more)
            else:
                blob.upload_from_filename(body, **more)
            return _info(blob)

        return self._call("put", key, store)

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        try:
            self._call("delete", key, lambda: self._bucket.blob(key).delete(**_condition(when), **self._once))
        except AbsentError:
            if when.etag:
                raise

    def head(self, key: str) -> ObjectInfo:
        blob = self._bucket.blob(key)

        def read() -> ObjectInfo:
            blob.reload(**self._once)
            return _info(blob)

        return self._call("head", key, read)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        listing = self._client.list_blobs(self._bucket, prefix=prefix, fields=_LISTED, **self._once)
        pages = iter(listing.pages)
        while True:
            page = self._call("list", prefix, functools.partial(next, pages, None))
            if page is None:
                return
            yield from map(_info, page)

    def directories(self, prefix: str) -> Sequence[str]:
        fields = "prefixes,nextPageToken"
        listing = self._client.list_blobs(self._bucket, prefix=prefix, delimiter="/", fields=fields, **self._once)
        pages = iter(listing.pages)
        while self._call("list", prefix, functools.partial(next, pages, None)) is not None:
            pass
        return sorted(found[len(prefix) : -1] for found in listing.prefixes)

    def verify(self) -> None:
        self._call("head bucket", "", lambda: self._bucket.reload(**self._once))

    @property
    def _once(self) -> dict[str, Any]:
        return {"timeout": self._timeout_s, "retry": None}

    def _call(self, operation: str, key: str, fn: Callable[[], T]) -> T:
        try:
            return fn()
        except api.GoogleAPICallError as error:
            raise self._translate(operation, key, error) from None
        except (auth.RefreshError, auth.DefaultCredentialsError) as error:
            raise CredentialsError(f"{operation} {self.name} failed: {error}", remedy=_SIGN_IN) from None
        except requests.Timeout:
            text = answer_text("GCS", operation, self._where(key), timed_out_ms=int(self._timeout_s * 1000))
            raise StoreUnreachableError(text) from None
        except _UNREACHED as error:
            raise StoreUnreachableError(f"{operation} {self._where(key)} got no answer: {error}") from None

    def _where(self, key: str) -> str:
        return f"{self.name}/{key}" if key else self.name

    def _translate(self, operation: str, key: str, error: api.GoogleAPICallError) -> StoreError:
        status = int(error.code or 0)
        code, detail, preview = _reason(error)
        text = answer_text("GCS", operation, self._where(key), status=status, code=code, detail=detail, preview=preview)
        kind: type[StoreError] = StoreError
        if status == 404:
            bucket = not key or operation == "list" or "bucket does not exist" in detail + preview
            kind = BucketMissingError if bucket else AbsentError
        elif status in (304, 412):
            kind = PreconditionError
        elif status in (401, 403):
            kind = AccessDeniedError
        elif status in (408, 429) or status >= 500:
            kind = StoreBusyError
        failure = kind(text)
        failure.http_status, failure.code, failure.body_preview = status, code, preview
        return failure


def _anonymous() -> Any:
    return AnonymousCredentials()  # type: ignore[no-untyped-call]


def _condition(when: Precondition) -> dict[str, int]:
    if when.absent:
        return {"if_generation_match": 0}
    return {"if_generation_match": int(when.etag)} if when.etag else {}


def _reason(error: api.GoogleAPICallError) -> tuple[str, str, str]:
    """Code, message and, when the body is not the API's JSON, its beginning."""
    response = getattr(error, "response", None)
    try:
        body = response.json()["error"] if response is not None else {}
        reasons = body.get("errors") or [{}]
        return str(reasons[0].get("reason") or body.get("code") or ""), str(body.get("message") or ""), ""
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        content = response.content if response is not None else b""
        preview = " ".join(content[:PREVIEW_BYTES].decode("utf-8", "replace").split())
        return "", "" if preview else str(error.message or ""), preview


def _info(blob: Any) -> ObjectInfo:
    return ObjectInfo(blob.name, int(blob.size or 0), str(blob.generation), _timestamp(blob.updated))


def _timestamp(moment: datetime | None) -> str:
    at = moment or datetime.now(UTC)
    return timestamp(int(at.timestamp() * 1000) * 1_000_000)
