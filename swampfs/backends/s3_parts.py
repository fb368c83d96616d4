"""Large S3 objects in parts, each sent from the disk, verified by its hash and repeated alone if it fails.

A reset after an hour costs one part. No part is kept in memory.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Mapping
from html import unescape

from swampfs.backends.connection import Answer
from swampfs.backends.s3_wire import Unanswered, Wire

PART = 64 << 20
_MOST_PARTS = 10_000
_ATTEMPTS = 3
_PAUSE_S = 0.5
_UPLOAD = re.compile(rb"<UploadId>([^<]+)</")
_ETAG = re.compile(rb"<ETag>([^<]+)</")


def put_in_parts(wire: Wire, key: str, condition: Mapping[str, str], path: str, part_size: int) -> Answer:
    """Upload the file at a path; ``condition`` is of the object as a whole, which appears at once.

    Returns the answer of the last request, be it the first refusal. What was uploaded in vain is removed. Raises
    Unanswered, OSError of the file.
    """
    begun = wire.post(key, "uploads=", {}, b"")
    found = _UPLOAD.search(begun.body)
    if begun.status >= 300 or found is None:
        return begun
    upload = f"uploadId={found[1].decode()}"
    answer = begun
    done = False
    try:
        size = os.stat(path).st_size
        step = max(part_size, -(-size // _MOST_PARTS))
        tags = []
        for number, offset in enumerate(range(0, size, step), 1):
            length = min(step, size - offset)
            query = f"partNumber={number}&{upload}"
            answer = _again(lambda query=query, piece=(offset, length): wire.put_part(key, query, path, piece))  # type: ignore[misc]
            if answer.status >= 300:
                return answer
            tags.append(answer.headers.get("etag", ""))
        answer = _completed(wire.post(key, upload, condition, _list_of(tags)))
        done = answer.status < 300
        return answer
    finally:
        if not done:
            with contextlib.suppress(Unanswered):
                wire.delete_upload(key, upload)


def _again(send: Callable[[], Answer]) -> Answer:
    """A part more than once, if the store does not answer, or is busy."""
    for attempt in range(1, _ATTEMPTS):
        with contextlib.suppress(Unanswered):
            answer = send()
            if answer.status < 500 and answer.status != 429:
                return answer
        time.sleep(_PAUSE_S * attempt)
    return send()


def _list_of(tags: list[str]) -> bytes:
    parts = "".join(
        f"<Part><PartNumber>{number}</PartNumber><ETag>{tag}</ETag></Part>" for number, tag in enumerate(tags, 1)
    )
    return f"<CompleteMultipartUpload>{parts}</CompleteMultipartUpload>".encode()


def _completed(answer: Answer) -> Answer:
    """The answer begins before it is known how it ends: a success can hold an error."""
    if answer.status >= 300:
        return answer
    tag = _ETAG.search(answer.body)
    if tag is None:
        return answer._replace(status=500)
    return answer._replace(headers={**answer.headers, "etag": unescape(tag[1].decode())})
