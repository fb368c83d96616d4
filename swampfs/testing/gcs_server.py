"""A small faithful server of Google Cloud Storage's JSON API, for tests. It stands in for the service.

Objects with generations and metagenerations; every precondition on upload, read, patch, delete and rewrite; media,
multipart and resumable uploads; rewrites that take several calls; listings with prefix, delimiter, pages and offsets;
errors in the API's own form. Everything is in memory and behind one lock, so each request is atomic, as in the service.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlsplit

import google_crc32c

CHUNK = 256 * 1024  # non-final chunks of a resumable upload are multiples of this
_PAGE = 1000


class Refusal(Exception):
    """An answer other than success, in the API's words."""

    def __init__(self, status: int, reason: str, message: str, *, location: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.location = location

    def body(self) -> bytes:
        error: dict[str, Any] = {"message": str(self), "domain": "global", "reason": self.reason}
        if self.location:
            error |= {"locationType": "header", "location": self.location}
        return json.dumps({"error": {"code": self.status, "message": str(self), "errors": [error]}}).encode()


@dataclass(slots=True)
class StoredObject:
    """One live object."""

    name: str
    body: bytes
    generation: int
    metageneration: int = 1
    content_type: str = "application/octet-stream"
    metadata: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    updated: str = ""


@dataclass(slots=True)
class _Upload:
    """A resumable session."""

    name: str
    query: Mapping[str, str]
    fields: dict[str, Any]
    received: bytearray = field(default_factory=bytearray)
    done: StoredObject | None = None


@dataclass(slots=True)
class _Rewrite:
    """A rewrite under way; preconditions on the source are those of its first call."""

    source: StoredObject
    sent: int = 0


class Request(NamedTuple):
    """A request, taken apart."""

    method: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: bytes


class GcsServer:
    """``with GcsServer() as server:`` serves at ``server.endpoint``. Buckets are made with :meth:`make_bucket`."""

    def __init__(self, *, rewrite_bytes_per_call: int = 1 << 20) -> None:
        self.buckets: dict[str, dict[str, StoredObject]] = {}
        self.requests: list[str] = []
        self.failures: list[Refusal] = []
        """Answers to give to the next requests instead of serving them."""
        self.rewrite_bytes_per_call = rewrite_bytes_per_call
        self._lock = threading.RLock()
        self._generation = 0
        self._uploads: dict[str, _Upload] = {}
        self._rewrites: dict[str, _Rewrite] = {}
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> GcsServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def make_bucket(self, name: str) -> None:
        self.buckets[name] = {}

    def objects(self, bucket: str) -> dict[str, bytes]:
        """Name → content, as they are now."""
        with self._lock:
            return {name: found.body for name, found in self.buckets[bucket].items()}

    # --- dispatch -----------------------------------------------------------------------------------------

    def serve(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Answer:
        """One request. Raises Refusal."""
        url = urlsplit(target)
        query = dict(parse_qsl(url.query, keep_blank_values=True))
        with self._lock:
            self.requests.append(f"{method} {target}")
            if self.failures:
                raise self.failures.pop(0)
            upload = re.fullmatch(r"/(?:resumable/)?upload/storage/v1/b/([^/]+)/o", url.path)
            if upload:
                return self._upload(unquote(upload[1]), Request(method, query, headers, body))
            rewrite = re.fullmatch(r"/storage/v1/b/([^/]+)/o/([^/]+)/(rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)", url.path)
            if rewrite and method == "POST":
                return self._rewrite([unquote(part) for part in rewrite.groups()], query, body)
            found = re.fullmatch(r"(/download)?/storage/v1/b/([^/]+)(?:/o(?:/([^/]+))?)?(?<!/)", url.path)
            if not found:
                raise Refusal(404, "notFound", "Not Found")
            bucket = self._bucket(unquote(found[2]))
            if found[3] is not None:
                media = bool(found[1]) or query.get("alt") == "media"
                return self._object(bucket, unquote(found[3]), Request(method, query, headers, body), media=media)
            if url.path.endswith("/o"):
                return self._list(bucket, unquote(found[2]), query)
            return Answer.of_json({"kind": "storage#bucket", "id": found[2], "name": found[2], "metageneration": "1"})

    def _bucket(self, name: str) -> dict[str, StoredObject]:
        if name not in self.buckets:
            raise Refusal(404, "notFound", "The specified bucket does not exist.")
        return self.buckets[name]

    # --- one object ---------------------------------------------------------------------------------------

    def _object(self, bucket: dict[str, StoredObject], name: str, request: Request, *, media: bool) -> Answer:
        where = self._name_of(bucket)
        found = _live(bucket, where, name, request.query)
        check_preconditions(found, request.query)
        if request.method == "DELETE":
            del bucket[name]
            return Answer(204, {}, b"")
        if request.method == "PATCH":
            changes = _json(request.body)
            found.metageneration += 1
            found.updated = _now()
            found.content_type = changes.get("contentType", found.content_type)
            found.metadata |= {key: value for key, value in changes.items() if key != "contentType"}
        elif request.method == "GET" and media:
            return _media(found, request.headers)
        elif request.method != "GET":
            raise Refusal(405, "methodNotAllowed", "Method Not Allowed")
        return Answer.of_json(self._resource(where, found))

    def _name_of(self, bucket: dict[str, StoredObject]) -> str:
        return next(name for name, objects in self.buckets.items() if objects is bucket)

    def _store(self, bucket: str, name: str, body: bytes, fields: Mapping[str, Any]) -> StoredObject:
        """Content replaced: a new generation, metageneration 1. Checks the checksums that came with it."""
        crc32c, md5 = fields.get("crc32c"), fields.get("md5Hash")
        if (crc32c and crc32c != _crc32c(body)) or (md5 and md5 != _md5(body)):
            raise Refusal(400, "invalid", "Provided hash does not match the calculated hash")
        # Microseconds, and never the same twice, also after a delete.
        self._generation = max(int(time.time() * 1e6), self._generation + 1)
        now = _now()
        kept = {key: fields[key] for key in ("metadata", "cacheControl", "contentEncoding") if key in fields}
        kind = str(fields.get("contentType") or "application/octet-stream")
        stored = StoredObject(name, body, self._generation, 1, kind, kept, now, now)
        self.buckets[bucket][name] = stored
        return stored

    def _resource(self, bucket: str, found: StoredObject) -> dict[str, Any]:
        quoted = found.name.replace("%", "%25").replace("/", "%2F")
        link = f"{self.endpoint}/download/storage/v1/b/{bucket}/o/{quoted}?generation={found.generation}&alt=media"
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{found.name}/{found.generation}",
            "mediaLink": link,
            "name": found.name,
            "bucket": bucket,
            "generation": str(found.generation),
            "metageneration": str(found.metageneration),
            "contentType": found.content_type,
            "storageClass": "STANDARD",
            "size": str(len(found.body)),
            "md5Hash": _md5(found.body),
            "crc32c": _crc32c(found.body),
            "etag": _etag(found),
            "timeCreated": found.created,
            "updated": found.updated,
            **found.metadata,
        }

    # --- listing ------------------------------------------------------------------------------------------

    def _list(self, bucket: dict[str, StoredObject], where: str, query: Mapping[str, str]) -> Answer:
        """Names ascending by their UTF-8 bytes; items and prefixes count towards the page together."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        start, end = query.get("startOffset", "").encode(), query.get("endOffset", "").encode()
        limit = min(int(query.get("maxResults", _PAGE) or _PAGE), _PAGE)
        after = _token_name(query["pageToken"]) if query.get("pageToken") else None
        items: list[StoredObject] = []
        prefixes: list[str] = []
        last, more = "", False
        for name in sorted(bucket, key=str.encode):
            raw = name.encode()
            if not name.startswith(prefix) or raw < start or (end and raw >= end):
                continue
            cut = name.find(delimiter, len(prefix)) if delimiter else -1
            shown = name[: cut + len(delimiter)] if cut >= 0 else name
            if (after is not None and shown.encode() <= after) or (cut >= 0 and shown in prefixes):
                continue
            if len(items) + len(prefixes) >= limit:
                more = True
                break
            last = shown
            if cut >= 0:
                prefixes.append(shown)
            else:
                items.append(bucket[name])
        page: dict[str, Any] = {"kind": "storage#objects"}
        if items:
            page["items"] = [self._resource(where, item) for item in items]
        if prefixes:
            page["prefixes"] = prefixes
        if more:
            page["nextPageToken"] = base64.urlsafe_b64encode(last.encode()).decode()
        return Answer.of_json(page)

    # --- uploads ------------------------------------------------------------------------------------------

    def _upload(self, bucket: str, request: Request) -> Answer:
        method, query, headers, body = request
        objects = self._bucket(bucket)
        if "upload_id" in query:
            return self._continue(bucket, query["upload_id"], request)
        kind = query.get("uploadType")
        if method != "POST" or kind not in ("media", "multipart", "resumable"):
            raise Refusal(400, "invalid", f"Invalid upload type {kind}")
        fields: dict[str, Any] = {}
        if kind == "media":
            fields = {"name": query.get("name"), "contentType": headers.get("content-type")}
        elif kind == "multipart":
            fields, body = _multipart(headers.get("content-type", ""), body)
        elif body:
            fields = _json(body)
        name = fields.get("name") or query.get("name")
        if not name or (query.get("name") and query["name"] != name):
            raise Refusal(400, "required", "Required object name is missing or ambiguous")
        fields.setdefault("contentType", headers.get("x-upload-content-type"))
        if kind == "resumable":
            check_preconditions(objects.get(name), query)
            session = uuid.uuid4().hex
            self._uploads[session] = _Upload(name, query, fields)
            location = f"{self.endpoint}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={session}"
            return Answer(200, {"Location": location}, b"")
        check_preconditions(objects.get(name), query)
        return Answer.of_json(self._resource(bucket, self._store(bucket, name, body, fields)))

    def _continue(self, bucket: str, session: str, request: Request) -> Answer:
        method, _, headers, body = request
        upload = self._uploads.get(session)
        if upload is None:
            raise Refusal(404, "notFound", "Upload session not found")
        if method == "DELETE":
            del self._uploads[session]
            return Answer(499, {}, b"")
        if upload.done is not None:
            return Answer.of_json(self._resource(bucket, upload.done))
        span = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", headers.get("content-range", ""))
        if span is None and headers.get("content-range"):
            raise Refusal(400, "invalid", "Invalid Content-Range")
        total = len(body) if span is None else None if span[3] == "*" else int(span[3])
        first = int(span[1]) if span is not None and span[1] else len(upload.received)
        if first > len(upload.received):
            raise Refusal(503, "backendError", "The upload has a gap")
        upload.received += body[len(upload.received) - first :]  # what is here already is ignored
        if total is None or len(upload.received) < total:
            if body and len(body) % CHUNK:
                raise Refusal(400, "invalid", f"Chunks but the last must be multiples of {CHUNK} bytes")
            known = {"Range": f"bytes=0-{len(upload.received) - 1}"} if upload.received else {}
            return Answer(308, known, b"")
        check_preconditions(self._bucket(bucket).get(upload.name), upload.query)
        upload.done = self._store(bucket, upload.name, bytes(upload.received), upload.fields)
        return Answer.of_json(self._resource(bucket, upload.done))

    # --- copies -------------------------------------------------------------------------------------------

    def _rewrite(self, parts: list[str], query: Mapping[str, str], body: bytes) -> Answer:
        source_bucket, source_name, kind, bucket, name = parts
        token = query.get("rewriteToken")
        if token is None:
            source = _live(self._bucket(source_bucket), source_bucket, source_name, query, "sourceGeneration")
            check_preconditions(source, query, "ifSource")
            check_preconditions(self._bucket(bucket).get(name), query)
            work = _Rewrite(source)
        elif token in self._rewrites:
            work = self._rewrites.pop(token)
        else:
            raise Refusal(400, "invalid", "Invalid rewrite token")
        size = len(work.source.body)
        work.sent = size if kind == "copyTo" else min(size, work.sent + self.rewrite_bytes_per_call)
        progress = {"kind": "storage#rewriteResponse", "totalBytesRewritten": str(work.sent), "objectSize": str(size)}
        if work.sent < size:
            token = uuid.uuid4().hex
            self._rewrites[token] = work
            return Answer.of_json({**progress, "done": False, "rewriteToken": token})
        check_preconditions(self._bucket(bucket).get(name), query)
        fields = _json(body) if body else {"contentType": work.source.content_type, **work.source.metadata}
        resource = self._resource(bucket, self._store(bucket, name, work.source.body, fields))
        return Answer.of_json(resource if kind == "copyTo" else {**progress, "done": True, "resource": resource})


@dataclass(slots=True)
class Answer:
    """A response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> Answer:
        return cls(200, {"Content-Type": "application/json; charset=UTF-8"}, json.dumps(document).encode())


def check_preconditions(found: StoredObject | None, query: Mapping[str, str], prefix: str = "if") -> None:
    """All given must hold. A match that fails is 412, a non-match that fails 304. Generation 0 means "no object"."""
    for name, actual in (
        ("Generation", found.generation if found else 0),
        ("Metageneration", found.metageneration if found else 0),
    ):
        wanted = _number(query, f"{prefix}{name}Match")
        if wanted is not None and wanted != actual:
            raise Refusal(412, "conditionNotMet", _UNMET, location="If-Match")
    for name, actual in (
        ("Generation", found.generation if found else 0),
        ("Metageneration", found.metageneration if found else 0),
    ):
        unwanted = _number(query, f"{prefix}{name}NotMatch")
        if unwanted is not None and unwanted == actual:
            raise Refusal(304, "notModified", "Not Modified")


_UNMET = "At least one of the pre-conditions you specified did not hold."


def _number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        return int(text)
    except ValueError:
        raise Refusal(400, "invalid", f"Invalid value for {name}: {text}") from None


def _live(
    bucket: dict[str, StoredObject], where: str, name: str, query: Mapping[str, str], pin: str = "generation"
) -> StoredObject:
    found = bucket.get(name)
    pinned = _number(query, pin)
    if found is None or (pinned is not None and pinned != found.generation):
        raise Refusal(404, "notFound", f"No such object: {where}/{name}")
    return found


def _media(found: StoredObject, headers: Mapping[str, str]) -> Answer:
    shown = {
        "Content-Type": found.content_type,
        "ETag": _etag(found),
        "X-Goog-Generation": str(found.generation),
        "X-Goog-Metageneration": str(found.metageneration),
        "X-Goog-Hash": f"crc32c={_crc32c(found.body)},md5={_md5(found.body)}",
        "X-Goog-Stored-Content-Length": str(len(found.body)),
        "X-Goog-Stored-Content-Encoding": found.metadata.get("contentEncoding", "identity"),
        "X-Goog-Storage-Class": "STANDARD",
    }
    span = re.fullmatch(r"bytes=(\d*)-(\d*)", headers.get("range", ""))
    if span is None or not (span[1] or span[2]):
        return Answer(200, shown, found.body)
    size = len(found.body)
    first = int(span[1]) if span[1] else max(0, size - int(span[2]))
    last = min(int(span[2]), size - 1) if span[1] and span[2] else size - 1
    if first >= size:
        raise Refusal(416, "requestedRangeNotSatisfiable", "The requested range cannot be satisfied.")
    shown["Content-Range"] = f"bytes {first}-{last}/{size}"
    return Answer(206, shown, found.body[first : last + 1])


def _multipart(content_type: str, body: bytes) -> tuple[dict[str, Any], bytes]:
    boundary = re.search(r'boundary="?([^";]+)"?', content_type)
    parts = body.split(b"--" + boundary[1].encode()) if boundary else []
    if len(parts) != 4 or not parts[3].startswith(b"--"):
        raise Refusal(400, "parseError", "Malformed multipart body")
    fields = _json(parts[1].partition(b"\r\n\r\n")[2])
    head, _, content = parts[2].partition(b"\r\n\r\n")
    kind = re.search(rb"content-type:\s*([^\r\n]+)", head, re.IGNORECASE)
    if kind:
        fields.setdefault("contentType", kind[1].decode())
    return fields, content.removesuffix(b"\r\n")


def _json(body: bytes) -> dict[str, Any]:
    try:
        document = json.loads(body)
    except ValueError:
        document = None
    if not isinstance(document, dict):
        raise Refusal(400, "parseError", "Parse Error")
    return document


def _token_name(token: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(token)
    except ValueError:
        raise Refusal(400, "invalid", "Invalid page token") from None


def _md5(body: bytes) -> str:
    return base64.b64encode(hashlib.md5(body, usedforsecurity=False).digest()).decode()


def _crc32c(body: bytes) -> str:
    return base64.b64encode(google_crc32c.value(body).to_bytes(4, "big")).decode()


def _etag(found: StoredObject) -> str:
    return base64.b64encode(f"{found.generation}/{found.metageneration}".encode()).decode()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _handler_of(server: GcsServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = {name.lower(): value for name, value in self.headers.items()}
            try:
                answer = server.serve(self.command, self.path, headers, body)
            except Refusal as refusal:
                kind = "application/json; charset=UTF-8"
                content = b"" if refusal.status == 304 else refusal.body()
                if "alt=media" in self.path and refusal.status != 304:
                    kind, content = "text/html; charset=UTF-8", str(refusal).encode()
                answer = Answer(refusal.status, {"Content-Type": kind}, content)
            self.send_response(answer.status)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.status not in (204, 304):
                self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            self.wfile.write(answer.body)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _answer

        def log_message(self, format: str, *args: object) -> None:
            """Quiet: ``GcsServer.requests`` has them."""

    return Handler
