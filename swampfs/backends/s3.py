"""S3 and compatible stores through boto3. The only module that imports it.

boto3's own retries are off: :mod:`swampfs.backends.retry` decides. Errors are classified by status and code, never by
message text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeVar

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    SSOError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from swampfs.errors import (
    AbsentError,
    AccessDeniedError,
    BucketMissingError,
    ConflictingWriteError,
    CredentialsError,
    PreconditionError,
    PreconditionsUnsupportedError,
    SettingsError,
    StoreBusyError,
    StoreError,
    StoreFullError,
    StoreUnreachableError,
)
from swampfs.provider import ALWAYS, Blob, ObjectInfo, Precondition
from swampfs.records import timestamp
from swampfs.settings import Source

T = TypeVar("T")

_CREDENTIAL_ERRORS = (
    NoCredentialsError,
    PartialCredentialsError,
    CredentialRetrievalError,
    ProfileNotFound,
    SSOError,
)
_CREDENTIAL_CODES = frozenset(
    ["ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId", "SignatureDoesNotMatch", "InvalidToken"]
)
_CHUNK = 1 << 20


class S3Store:
    """:class:`~swampfs.provider.ObjectStore` of one bucket. Thread-safe: one client, one connection pool."""

    label = "S3"

    def __init__(self, source: Source, connections: int = 64) -> None:
        self._bucket = source.bucket
        self.name = f"s3://{source.bucket}"
        config = Config(
            retries={"total_max_attempts": 1},
            connect_timeout=min(5.0, source.request_timeout_s),
            read_timeout=source.request_timeout_s,
            max_pool_connections=connections,
            tcp_keepalive=True,
            # Integrity is ours (sha256 in the index); stores other than AWS reject the newer trailers.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if source.path_style or source.endpoint else "auto"},
        )
        try:
            self._client: Any = boto3.session.Session().client(
                "s3", region_name=source.region, endpoint_url=source.endpoint, config=config
            )
        except _CREDENTIAL_ERRORS as error:
            raise CredentialsError(f"no credentials for {self.name}: {error}") from None
        except (BotoCoreError, ValueError) as error:
            raise SettingsError(f"{self.name} cannot be addressed: {error}") from None

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        condition = {"IfNoneMatch": f'"{unless}"'} if unless else {}

        def read() -> Blob | None:
            try:
                response = self._client.get_object(Bucket=self._bucket, Key=key, **condition)
            except ClientError as error:
                if _status(error) == 304:
                    return None
                raise
            return Blob(response["Body"].read(), _info(key, response))

        return self._call("get", key, read)

    def download(self, key: str, target: str) -> ObjectInfo:
        def transfer() -> ObjectInfo:
            response = self._client.get_object(Bucket=self._bucket, Key=key)
            with open(target, "wb", buffering=0) as file:
                for chunk in response["Body"].iter_chunks(_CHUNK):
                    file.write(chunk)
            return _info(key, response)

        return self._call("get", key, transfer)

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        condition: dict[str, str] = {}
        if when.absent:
            condition["IfNoneMatch"] = "*"
        elif when.etag:
            condition["IfMatch"] = f'"{when.etag}"'

        def store() -> ObjectInfo:
            if isinstance(body, bytes):
                response = self._client.put_object(Bucket=self._bucket, Key=key, Body=body, **condition)
                size = len(body)
            else:
                with open(body, "rb") as file:
                    response = self._client.put_object(Bucket=self._bucket, Key=key, Body=file, **condition)
                    size = file.tell()
            return ObjectInfo(key, size, _etag(response), _now())

        return self._call("put", key, store)

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        condition = {"IfMatch": f'"{when.etag}"'} if when.etag else {}
        try:
            self._call("delete", key, lambda: self._client.delete_object(Bucket=self._bucket, Key=key, **condition))
        except AbsentError:
            if when.etag:
                raise

    def head(self, key: str) -> ObjectInfo:
        return self._call("head", key, lambda: _info(key, self._client.head_object(Bucket=self._bucket, Key=key)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        token: str | None = None
        while True:
            more = {"ContinuationToken": token} if token else {}
            page: dict[str, Any] = self._call("list", prefix, functools.partial(self._page, prefix, more))
            for item in page.get("Contents", ()):
                modified = _timestamp(item.get("LastModified"))
                yield ObjectInfo(item["Key"], int(item["Size"]), item["ETag"].strip('"'), modified)
            token = page.get("NextContinuationToken")
            if not token:
                return

    def _page(self, prefix: str, more: dict[str, str]) -> dict[str, Any]:
        page: dict[str, Any] = self._client.list_objects_v2(Bucket=self._bucket, Prefix=prefix, **more)
        return page

    def verify(self) -> None:
        self._call("head bucket", "", lambda: self._client.head_bucket(Bucket=self._bucket))

    def _call(self, operation: str, key: str, fn: Callable[[], T]) -> T:
        try:
            return fn()
        except ClientError as error:
            raise self._translate(operation, key, error) from None
        except _CREDENTIAL_ERRORS as error:
            raise CredentialsError(f"{operation} {self.name} failed: {error}") from None
        except NoRegionError as error:
            raise SettingsError(f"{self.name}: {error}") from None
        except (HTTPClientError, BotoConnectionError, BotoCoreError, Boto3Error) as error:
            # Not reached, reset, timed out, or cut short while reading the body.
            raise StoreUnreachableError(f"{operation} {self._where(key)} got no answer: {error}") from None

    def _where(self, key: str) -> str:
        return f"{self.name}/{key}" if key else self.name

    def _translate(self, operation: str, key: str, error: ClientError) -> StoreError:
        status = _status(error)
        code = str(error.response.get("Error", {}).get("Code", ""))
        detail = str(error.response.get("Error", {}).get("Message", "")) or code
        text = f"{operation} {self._where(key)} failed: HTTP {status} {code}: {detail}"
        kind: type[StoreError] = StoreError
        if code == "NoSuchBucket" or (status == 404 and not key):
            kind, text = BucketMissingError, f"bucket {self._bucket!r} does not exist"
        elif status == 404:
            kind = AbsentError
        elif status == 412:
            kind = PreconditionError
        elif status == 409:
            kind = ConflictingWriteError
        elif code in _CREDENTIAL_CODES:
            kind = CredentialsError
        elif status in (401, 403):
            kind = AccessDeniedError
        elif status == 501 and "If-" in detail:
            kind = PreconditionsUnsupportedError
        elif status == 507:
            kind = StoreFullError
        elif status == 429 or status >= 500:
            kind = StoreBusyError
        return kind(text)


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _etag(response: dict[str, Any]) -> str:
    return str(response.get("ETag", "")).strip('"')


def _info(key: str, response: dict[str, Any]) -> ObjectInfo:
    modified = _timestamp(response.get("LastModified"))
    return ObjectInfo(key, int(response.get("ContentLength", 0)), _etag(response), modified)


def _timestamp(moment: datetime | None) -> str:
    if moment is None:
        return _now()
    return timestamp(int(moment.timestamp() * 1000) * 1_000_000)


def _now() -> str:
    return _timestamp(datetime.now(UTC))
