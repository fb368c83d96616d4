"""S3 and compatible stores through boto3. The only module that imports it.

boto3's own retries are off: :mod:`swampfs.backends.retry` decides. Errors are classified by status and code, never by
message text.
"""

from __future__ import annotations

import functools
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import unquote_plus
from xml.sax.saxutils import unescape

import boto3
from boto3.exceptions import Boto3Error
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    HTTPClientError,
    NoCredentialsError,
    NoRegionError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    SSOError,
)
from botocore.exceptions import (
    ConnectionError as BotoConnectionError,
)

from swampfs.backends.answers import PREVIEW_BYTES, answer_text
from swampfs.backends.connection import Answer
from swampfs.backends.s3_parts import PART, put_in_parts
from swampfs.backends.s3_wire import Key, Unanswered, Wire
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
from swampfs.provider import ALWAYS, Blob, ObjectInfo, Precondition, Take
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
_EXPIRED_CODES = frozenset(["ExpiredToken", "ExpiredTokenException"])
_CHUNK = 1 << 20
_SMALL = 4 << 20
_SINGLE = 256 << 20  # larger files go in parts
_EXAMPLE = "example"


class S3Store:
    """:class:`~swampfs.provider.ObjectStore` of one bucket. Thread-safe: one client, one connection pool."""

    label = "S3"

    def __init__(self, source: Source, connections: int = 64) -> None:
        self._bucket = source.bucket
        self.name = f"s3://{source.bucket}"
        config = Config(
            signature_version="s3v4",
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
        self._timeout_s = source.request_timeout_s
        try:
            session = boto3.session.Session()
            self._client: Any = session.client(
                "s3", region_name=source.region, endpoint_url=source.endpoint, config=config
            )
        except _CREDENTIAL_ERRORS as error:
            raise CredentialsError(f"no credentials for {self.name}: {error}") from None
        except (BotoCoreError, ValueError) as error:
            raise SettingsError(f"{self.name} cannot be addressed: {error}") from None
        self.authenticated = str(self._client.meta.endpoint_url).startswith("https:")
        self._wire = self._connect_wire(session, source.request_timeout_s)

    def get(self, key: str, *, unless: str = "") -> Blob | None:
        condition = {"If-None-Match": f'"{unless}"'} if unless else {}
        answer = self._wired("get", key, lambda wire: wire.get(key, condition))
        if answer is not None:
            return None if answer.status == 304 else Blob(answer.body, _wire_info(key, answer, len(answer.body)))

        def read() -> Blob | None:
            more = {"IfNoneMatch": condition["If-None-Match"]} if condition else {}
            try:
                response = self._client.get_object(Bucket=self._bucket, Key=key, **more)
            except ClientError as error:
                if _status(error) == 304:
                    return None
                raise
            return Blob(response["Body"].read(), _info(key, response))

        return self._call("get", key, read)

    def download(self, key: str, target: str) -> ObjectInfo:
        with open(target, "wb") as file:  # buffered: a raw write may be short when the disk is nearly full
            answer = self._wired("get", key, lambda wire: wire.get(key, {}, file))
            if answer is not None:
                return _wire_info(key, answer, file.tell())

            def transfer() -> ObjectInfo:
                response = self._client.get_object(Bucket=self._bucket, Key=key)
                for chunk in response["Body"].iter_chunks(_CHUNK):
                    file.write(chunk)
                return _info(key, response)

            return self._call("get", key, transfer)

    def part(self, key: str, offset: int, size: int, *, etag: str = "", take: Take | None = None) -> Blob:
        last = offset + size - 1
        demand = {"Range": f"bytes={offset}-{last}", **({"If-Match": f'"{etag}"'} if etag else {})}
        answer = self._wired("get", key, lambda wire: wire.get_range(key, demand, offset, take))
        if answer is not None:
            whole = answer.headers.get("content-range", "").rpartition("/")[2]
            info = _wire_info(key, answer, int(whole) if whole.isdigit() else len(answer.body))
            return Blob(answer.body, info._replace(last_modified=_http_time(answer.headers.get("last-modified", ""))))
        more = {name.replace("-", ""): value for name, value in demand.items()}

        def read() -> Blob:
            response = self._client.get_object(Bucket=self._bucket, Key=key, **more)
            whole = str(response.get("ContentRange", "")).rpartition("/")[2]
            body = response["Body"].read()
            return Blob(body, _info(key, response)._replace(size=int(whole) if whole.isdigit() else len(body)))

        return self._call("get", key, read).given(offset, take)

    def put(self, key: str, body: bytes | str, when: Precondition = ALWAYS) -> ObjectInfo:
        if isinstance(body, bytes) and len(body) <= _SMALL:
            answer = self._wired("put", key, lambda wire: wire.put(key, _condition(when), body))
            if answer is not None:
                return _wire_info(key, answer, len(body))._replace(last_modified=self._now())
        elif isinstance(body, str) and (size := os.stat(body).st_size) <= _SINGLE:
            answer = self._wired("put", key, lambda wire: wire.put_file(key, _condition(when), body))
            if answer is not None:
                return _wire_info(key, answer, size)._replace(last_modified=self._now())
        elif isinstance(body, str):
            answer = self._wired("put", key, lambda wire: put_in_parts(wire, key, _condition(when), body, PART))
            if answer is not None:
                return _wire_info(key, answer, size)._replace(last_modified=self._now())
        more = {name.replace("-", ""): value for name, value in _condition(when).items()}

        def store() -> ObjectInfo:
            if isinstance(body, bytes):
                response = self._client.put_object(Bucket=self._bucket, Key=key, Body=body, **more)
                size = len(body)
            else:
                with open(body, "rb") as file:
                    response = self._client.put_object(Bucket=self._bucket, Key=key, Body=file, **more)
                    size = file.tell()
            return ObjectInfo(key, size, _etag(response), self._now())

        return self._call("put", key, store)

    def delete(self, key: str, when: Precondition = ALWAYS) -> None:
        condition = {"IfMatch": f'"{when.etag}"'} if when.etag else {}
        try:
            if self._wired("delete", key, lambda wire: wire.delete(key, _condition(when))) is not None:
                return
            self._call("delete", key, lambda: self._client.delete_object(Bucket=self._bucket, Key=key, **condition))
        except AbsentError:
            if when.etag:
                raise

    def head(self, key: str) -> ObjectInfo:
        answer = self._wired("head", key, lambda wire: wire.head(key))
        if answer is not None:
            info = _wire_info(key, answer, int(answer.headers.get("content-length", 0)))
            return info._replace(last_modified=_http_time(answer.headers.get("last-modified", "")))
        return self._call("head", key, lambda: _info(key, self._client.head_object(Bucket=self._bucket, Key=key)))

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        query = {"list-type": "2", "prefix": prefix, "encoding-type": "url"}
        while (answer := self._wired("list", "", lambda wire: wire.list_page(query))) is not None:
            infos, token = parse_listing(answer.body)
            yield from infos
            if not token:
                return
            query["continuation-token"] = token
        yield from self._list_through_boto(prefix)

    def _list_through_boto(self, prefix: str) -> Iterator[ObjectInfo]:
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

    def directories(self, prefix: str) -> Sequence[str]:
        query = {"list-type": "2", "prefix": prefix, "delimiter": "/", "encoding-type": "url"}
        found: tuple[str, ...] = ()
        while (answer := self._wired("list", "", lambda wire: wire.list_page(query))) is not None:
            names, token = parse_directories(answer.body, prefix)
            found += names
            if not token:
                return found
            query["continuation-token"] = token
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self._bucket, Prefix=prefix, Delimiter="/"
        )
        answers = self._call("list", prefix, lambda: tuple(pages))
        return [item["Prefix"][len(prefix) : -1] for page in answers for item in page.get("CommonPrefixes", ())]

    def verify(self) -> None:
        if self._wired("head bucket", "", lambda wire: wire.head_bucket()) is None:
            self._call("head bucket", "", lambda: self._client.head_bucket(Bucket=self._bucket))

    def probe(self, timeout_s: float) -> None:
        wire = self._wire
        if wire is None:
            self.verify()  # through boto3, with its own timeouts
        else:
            self._call("head bucket", "", lambda: wire.probe(timeout_s))

    def silent_s(self) -> float:
        return 0.0 if self._wire is None else self._wire.silent_s()

    def end_silent(self, since: float) -> None:
        if self._wire is not None:
            self._wire.end_silent(since)

    def _connect_wire(self, session: Any, timeout_s: float) -> Wire | None:
        """The quick way to single objects, told by boto3 where they are; ``None`` if it is not to be had."""
        try:
            found = session.get_credentials()
            if found is None:
                return None
            example: str = self._client.generate_presigned_url(
                "get_object", Params={"Bucket": self._bucket, "Key": _EXAMPLE}
            )
        except (BotoCoreError, Boto3Error, ClientError, ValueError):
            return None  # the first request says what is wrong
        url = example.partition("?")[0].removesuffix(f"/{_EXAMPLE}")
        region = self._client.meta.region_name
        if region in (None, "aws-global"):
            region = "us-east-1"

        def key() -> Key:
            frozen = found.get_frozen_credentials()
            return Key(frozen.access_key, frozen.secret_key, frozen.token or "")

        return Wire(url, region, key, timeout_s) if Wire.is_direct(url) else None

    def _wired(self, operation: str, key: str, fn: Callable[[Wire], Answer]) -> Answer | None:
        """Do it the quick way. ``None``: do it through boto3 (which follows redirects to other regions)."""
        wire = self._wire
        if wire is None:
            return None
        answer = self._call(operation, key, lambda: fn(wire))
        if answer.status < 300 or answer.status == 304:
            return answer
        if answer.status < 400:
            self._wire = None
            return None
        code = answer.error.get("Code", "")
        raise self._refusal(
            operation,
            key,
            status=answer.status,
            code=code,
            detail=answer.error.get("Message", ""),
            request_id=answer.error.get("RequestId", ""),
            preview="" if code else answer.body[:PREVIEW_BYTES].decode("utf-8", "replace"),
        )

    def _call(self, operation: str, key: str, fn: Callable[[], T]) -> T:
        try:
            return fn()
        except ClientError as error:
            raise self._translate(operation, key, error) from None
        except _CREDENTIAL_ERRORS as error:
            raise CredentialsError(f"{operation} {self.name} failed: {error}", remedy=_sign_in()) from None
        except NoRegionError as error:
            raise SettingsError(f"{self.name}: {error}") from None
        except (ReadTimeoutError, ConnectTimeoutError, TimeoutError):
            raise self._timed_out(operation, key) from None
        except Unanswered as error:
            if isinstance(error.__cause__, TimeoutError):
                raise self._timed_out(operation, key) from None
            raise StoreUnreachableError(f"{operation} {self._where(key)} got no answer: {error}") from None
        except (HTTPClientError, BotoConnectionError, BotoCoreError, Boto3Error) as error:
            # Not reached, reset, or cut short while reading the body.
            raise StoreUnreachableError(f"{operation} {self._where(key)} got no answer: {error}") from None

    def _now(self) -> str:
        """Of the store, as far as we know its clock."""
        ahead_s = self._wire.ahead_s if self._wire is not None else 0.0
        return _timestamp(datetime.fromtimestamp(time.time() + ahead_s, UTC))

    def _where(self, key: str) -> str:
        return f"{self.name}/{key}" if key else self.name

    def _timed_out(self, operation: str, key: str) -> StoreError:
        timeout_ms = int(self._timeout_s * 1000)
        return StoreUnreachableError(answer_text("S3", operation, self._where(key), timed_out_ms=timeout_ms))

    def _translate(self, operation: str, key: str, error: ClientError) -> StoreError:
        answer = error.response.get("Error", {})
        return self._refusal(
            operation,
            key,
            status=_status(error),
            code=str(answer.get("Code", "")),
            detail=str(answer.get("Message", "")),
            request_id=str(error.response.get("ResponseMetadata", {}).get("RequestId", "")),
        )

    def _refusal(
        self, operation: str, key: str, *, status: int, code: str, detail: str, request_id: str, preview: str = ""
    ) -> StoreError:
        text = answer_text(
            "S3",
            operation,
            self._where(key),
            status=status,
            code=code,
            detail=detail,
            request_id=request_id,
            preview=preview,
        )
        kind = _kind(status, code, detail, has_key=bool(key))
        failure = kind(f"bucket {self._bucket!r} does not exist: {text}" if kind is BucketMissingError else text)
        if isinstance(failure, CredentialsError):
            failure.remedy = _sign_in() if code in _EXPIRED_CODES else failure.remedy
        failure.http_status, failure.code, failure.request_id, failure.body_preview = status, code, request_id, preview
        return failure


def _kind(status: int, code: str, detail: str, *, has_key: bool) -> type[StoreError]:
    """What a refusal is, by status and code; never by its words, but for the one code that stands for many headers."""
    kind: type[StoreError] = StoreError
    if code == "NoSuchBucket" or (status == 404 and not has_key):
        kind = BucketMissingError
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
    elif status in (408, 429) or status >= 500:
        kind = StoreBusyError
    return kind


_COMMON = re.compile(r"<CommonPrefixes>\s*<Prefix>([^<]*)</Prefix>\s*</CommonPrefixes>")
_CONTENTS = re.compile(r"<Contents>(.*?)</Contents>", re.DOTALL)
_ELEMENT = re.compile(r"<(Key|LastModified|ETag|Size|NextContinuationToken)>([^<]*)</")


def _listing_text(body: bytes) -> str:
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise StoreBusyError("the store's listing is not text") from None


def parse_listing(body: bytes) -> tuple[list[ObjectInfo], str]:
    """One page of ``ListObjectsV2`` with URL-encoded keys, and the token of the next. 50 times as fast as boto3's.

    Raises StoreBusyError for what is no listing: the next one may be.
    """
    text = _listing_text(body)
    infos = []
    for contents in _CONTENTS.findall(text):
        found = dict(_ELEMENT.findall(contents))
        try:
            modified, size = datetime.fromisoformat(found["LastModified"]), int(found["Size"])
            key = unquote_plus(unescape(found["Key"]))
        except (KeyError, ValueError):
            raise StoreBusyError(f"the store's listing has an entry that is none: {contents[:200]!r}") from None
        etag = unescape(found.get("ETag", ""), {"&quot;": '"', "&#34;": '"'}).strip('"')
        infos.append(ObjectInfo(key, size, etag, _timestamp(modified)))
    rest = dict(_ELEMENT.findall(_CONTENTS.sub("", text)))
    return infos, unescape(rest.get("NextContinuationToken", ""))


def parse_directories(body: bytes, prefix: str) -> tuple[tuple[str, ...], str]:
    """What one page of ``ListObjectsV2`` with a delimiter has below a prefix, and the token of the next."""
    text = _listing_text(body)
    names = tuple(unquote_plus(unescape(name))[len(prefix) : -1] for name in _COMMON.findall(text))
    rest = dict(_ELEMENT.findall(_CONTENTS.sub("", text)))
    return names, unescape(rest.get("NextContinuationToken", ""))


def _sign_in() -> str:
    profile = os.environ.get("AWS_PROFILE")
    return f"sign in again: `aws sso login{f' --profile {profile}' if profile else ''}`, or check the credentials"


def _condition(when: Precondition) -> dict[str, str]:
    if when.absent:
        return {"If-None-Match": "*"}
    return {"If-Match": f'"{when.etag}"'} if when.etag else {}


def _wire_info(key: str, answer: Answer, size: int) -> ObjectInfo:
    """Of a get: parsing the time would cost as much as the rest of the request, and nobody asks."""
    return ObjectInfo(key, size, answer.headers.get("etag", "").strip('"'), "")


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _etag(response: dict[str, Any]) -> str:
    return str(response.get("ETag", "")).strip('"')


def _info(key: str, response: dict[str, Any]) -> ObjectInfo:
    modified = _timestamp(response.get("LastModified"))
    return ObjectInfo(key, int(response.get("ContentLength", 0)), _etag(response), modified)


def _timestamp(moment: datetime | None) -> str:
    return "" if moment is None else timestamp(int(moment.timestamp() * 1000) * 1_000_000)


def _http_time(text: str) -> str:
    """Wire timestamp of an HTTP date."""
    try:
        return _timestamp(parsedate_to_datetime(text))
    except ValueError:
        return ""
