"""The v2 sync sidecar of this state directory (spec §4), the fallback when the journal is lost.

The journal knows every path; the sidecar only says that there is work. So it is written when the journal goes from
empty to not empty (``localDirty`` + ``bulkInvalidated``: a full walk that infers no deletes) and back, instead of
once per path (lesson 50; ``docs/decisions/0002``). Every write keeps every field it does not set (H3, H31).
"""

from __future__ import annotations

import json
import os
import uuid
from typing import Any

from swampfs.records import Watermark

_NAME = ".datastore-sync-state.json"
_DEFAULTS: dict[str, Any] = {
    "version": 2,
    "remoteIndexETag": "",
    "lastVerifiedAt": "",
    "localDirty": False,
    "dirtyPaths": [],
    "bulkInvalidated": False,
}


class Sidecar:
    """One JSON file, replaced atomically and fsynced. An unreadable one counts as "no sidecar", never as clean."""

    def __init__(self, directory: str) -> None:
        self._path = os.path.join(directory, _NAME)
        self._fields = self._read()

    def _read(self) -> dict[str, Any] | None:
        try:
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("version") != 2 or not isinstance(found.get("localDirty"), bool):
            return None
        return found

    @property
    def dirty(self) -> bool:
        """Whether unpushed work may exist; doubt is yes."""
        return self._fields is None or bool(self._fields["localDirty"])

    def mark_bulk(self) -> None:
        self._write({"localDirty": True, "bulkInvalidated": True})

    def mark_clean(self, watermark: Watermark, verified_at: str) -> None:
        self._write(
            {
                "localDirty": False,
                "bulkInvalidated": False,
                "dirtyPaths": [],
                "remoteIndexETag": watermark.monolith_etag,
                "lastVerifiedAt": verified_at,
                "commitSeq": watermark.commit_seq,
            }
        )

    def _write(self, changes: dict[str, Any]) -> None:
        fields = {**_DEFAULTS, **(self._fields or {}), **changes}
        if fields == self._fields:
            return
        temporary = os.path.join(os.path.dirname(self._path), f".{uuid.uuid4()}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            json.dump(fields, file, indent=2, ensure_ascii=False)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, self._path)
        self._fields = fields
