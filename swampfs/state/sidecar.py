"""The sync sidecar ``.datastore-sync-state.json`` (spec §4): how a cache says that it holds unpushed work.

Two users. A mount writes it once per episode of work, because its journal knows every path (``docs/decisions/0002``).
The library shares it with the existing extensions, path by path. Every write is atomic and fsynced, happens under an
advisory lock (several processes share the file), and keeps every field it does not set (H3, H31).
"""

from __future__ import annotations

import fcntl
import json
import os
import posixpath
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from swampfs.records import Watermark

SIDECAR = ".datastore-sync-state.json"
MAX_PATHS = 200
S3_FINGERPRINT = "remoteIndexETag"
GCS_FINGERPRINT = "remoteIndexGeneration"

Fields = dict[str, Any]


class SidecarState(NamedTuple):
    """What a valid sidecar says. A v1 one that is dirty counts as bulk-invalidated (spec §4, SEED)."""

    fingerprint: str
    verified_at: str
    local_dirty: bool
    paths: tuple[str, ...]
    bulk: bool
    overflowed: bool
    lazy: bool
    commit_seq: int | None

    @property
    def dirty(self) -> bool:
        """Leftover marks count, whatever ``localDirty`` says: a first prepare may have cleared it early (H38)."""
        return self.local_dirty or self.bulk or bool(self.paths)


class Sidecar:
    """One JSON file. An unreadable one counts as "no sidecar", never as clean."""

    def __init__(self, directory: str, fingerprint_field: str = S3_FINGERPRINT, lock_file: str | None = None) -> None:
        self._directory = directory
        self._path = os.path.join(directory, SIDECAR)
        self._lock_file = lock_file or os.path.join(directory, ".sidecar.lock")
        self._fingerprint_field = fingerprint_field

    def load(self) -> SidecarState | None:
        """The file as it is now; ``None`` if it is missing or not to be trusted."""
        fields = self._read()
        if fields is None:
            return None
        paths, commit_seq = fields["dirtyPaths"], fields.get("commitSeq")
        return SidecarState(
            fields[self._fingerprint_field],
            fields["lastVerifiedAt"],
            fields["localDirty"],
            tuple(paths),
            fields["bulkInvalidated"],
            fields["dirtyPathsOverflowed"],
            fields["lazyPullActive"],
            commit_seq if isinstance(commit_seq, int) else None,
        )

    @property
    def dirty(self) -> bool:
        """Whether unpushed work may exist; doubt is yes."""
        state = self.load()
        return state is None or state.dirty

    def stamp(self) -> str:
        """Changes whenever anybody replaces the file; ``""`` if there is none."""
        try:
            found = os.stat(self._path)
        except FileNotFoundError:
            return ""
        return f"{found.st_ino}:{found.st_mtime_ns}:{found.st_size}"

    # --- marks --------------------------------------------------------------------------------------------

    def mark_path(self, rel: str) -> None:
        """Record one cache-relative path. Over the cap, or outside the cache, everything is (spec §4)."""
        normal = posixpath.normpath(rel)
        if normal.startswith(("/", "../")) or normal in ("..", "."):
            self.mark_bulk()
            return

        def mark(fields: Fields) -> None:
            paths: list[str] = fields["dirtyPaths"]
            fields["localDirty"] = True  # any mark, durably (H5)
            if fields["bulkInvalidated"] or normal in paths:
                return
            if len(paths) >= MAX_PATHS:
                fields["bulkInvalidated"] = fields["dirtyPathsOverflowed"] = True
            else:
                paths.append(normal)

        self._update(mark)

    def mark_bulk(self) -> None:
        self._update(lambda fields: fields.update(localDirty=True, bulkInvalidated=True))

    def mark_unsettled(self) -> None:
        """Objects may be newer than their entries: until a commit, no client may take this cache for clean."""
        self._update(lambda fields: fields.update(localDirty=True))

    def set_lazy(self, active: bool) -> None:
        self._update(lambda fields: fields.update(lazyPullActive=active))

    def note_catalog_hash(self, digest: str) -> None:
        self._update(lambda fields: fields.update(lastCatalogHash=digest))

    # --- verification -------------------------------------------------------------------------------------

    def verify(self, watermark: Watermark, verified_at: str) -> None:
        """The cache is in step with this index; what is dirty stays dirty (a pull clears nothing)."""
        self._update(lambda fields: self._set_verified(fields, watermark, verified_at))

    def retire(
        self,
        done: Collection[str],
        newer: Sequence[str],
        watermark: Watermark | None,
        verified_at: str,
        *,
        bulk_done: bool,
    ) -> None:
        """A push has committed what ``done`` announced; ``newer`` (``""`` = anything) was marked while it ran.

        Marks of others that came meanwhile stay. ``watermark`` is ``None`` if the cache lacks files of the index: then
        it is not verified, so that nobody takes the fast path past them (lesson 4).
        """

        def clear(fields: Fields) -> None:
            paths = [path for path in fields["dirtyPaths"] if path not in done and path not in newer]
            paths += [path for path in newer if path]
            if bulk_done:
                fields["bulkInvalidated"] = fields["dirtyPathsOverflowed"] = False
            over = len(paths) > MAX_PATHS
            fields["dirtyPaths"] = paths[:MAX_PATHS]
            fields["bulkInvalidated"] = fields["bulkInvalidated"] or over or "" in newer
            fields["dirtyPathsOverflowed"] = fields["dirtyPathsOverflowed"] or over
            fields["localDirty"] = bool(paths) or fields["bulkInvalidated"]
            if watermark is not None:
                self._set_verified(fields, watermark, verified_at)

        self._update(clear)

    def mark_clean(self, watermark: Watermark, verified_at: str) -> None:
        """A mount's journal is empty: whatever the sidecar said before, there is no work."""

        def clear(fields: Fields) -> None:
            fields.update(localDirty=False, bulkInvalidated=False, dirtyPathsOverflowed=False, dirtyPaths=[])
            self._set_verified(fields, watermark, verified_at)

        self._update(clear)

    def _set_verified(self, fields: Fields, watermark: Watermark, verified_at: str) -> None:
        usable = is_usable_fingerprint(self._fingerprint_field, watermark.monolith_etag)
        fields[self._fingerprint_field] = watermark.monolith_etag if usable else ""
        fields["lastVerifiedAt"] = verified_at
        if watermark.commit_seq:
            fields["commitSeq"] = watermark.commit_seq
        else:
            fields.pop("commitSeq", None)

    # --- the file -----------------------------------------------------------------------------------------

    def _read(self) -> Fields | None:
        try:
            with open(self._path, encoding="utf-8") as file:
                found = json.load(file)
        except (OSError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.get("version") not in (1, 2) or isinstance(found["version"], bool):
            return None
        texts = (found.get(self._fingerprint_field), found.get("lastVerifiedAt"))
        if not all(isinstance(text, str) for text in texts) or not isinstance(found.get("localDirty"), bool):
            return None
        paths = found.get("dirtyPaths", [])
        readable = isinstance(paths, list) and all(isinstance(path, str) for path in paths)
        fields: Fields = {
            "version": 2,
            self._fingerprint_field: texts[0],
            "lastVerifiedAt": texts[1],
            "localDirty": found["localDirty"],
            "dirtyPaths": paths if readable else [],
            # An old sidecar knew no paths, and a list we cannot read may hide some.
            "bulkInvalidated": found["localDirty"] if found["version"] == 1 or not readable else False,
            "lazyPullActive": False,
            "dirtyPathsOverflowed": False,
        }
        for flag in ("bulkInvalidated", "lazyPullActive", "dirtyPathsOverflowed"):
            fields[flag] = fields[flag] or found.get(flag) is True
        fields.update({name: value for name, value in found.items() if name not in fields})
        return fields

    def _update(self, change: Callable[[Fields], object]) -> None:
        with self._locked():
            before = self._read()
            fields: Fields = before or self._empty()
            after: Fields = json.loads(json.dumps(fields))
            change(after)
            if before is None or after != fields or self._is_old():
                self._write(after)

    def _is_old(self) -> bool:
        with open(self._path, encoding="utf-8") as file:
            return bool(json.load(file).get("version") != 2)

    def _empty(self) -> Fields:
        return {
            "version": 2,
            self._fingerprint_field: "",
            "lastVerifiedAt": "",
            "localDirty": False,
            "dirtyPaths": [],
            "bulkInvalidated": False,
            "lazyPullActive": False,
            "dirtyPathsOverflowed": False,
        }

    @contextmanager
    def _locked(self) -> Iterator[None]:
        os.makedirs(os.path.dirname(self._lock_file), mode=0o700, exist_ok=True)
        fd = os.open(self._lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _write(self, fields: Fields) -> None:
        temporary = os.path.join(self._directory, f".{uuid.uuid4()}.tmp")
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "w", encoding="utf-8") as file:
                file.write(json.dumps(fields, indent=2, ensure_ascii=False))
                file.flush()
                os.fsync(file.fileno())
            os.rename(temporary, self._path)
        except OSError:
            os.unlink(temporary)
            raise


def is_usable_fingerprint(field: str, fingerprint: str) -> bool:
    """Whether equal fingerprints mean equal bytes: not an ETag of parts, not generation zero (spec §6.2)."""
    if field == GCS_FINGERPRINT:
        return fingerprint not in ("", "0")
    tail = fingerprint.rpartition("-")[2] if "-" in fingerprint else ""
    return fingerprint != "" and not tail.isdigit()
