"""The bytes of the remote index: monolith, shard and meta documents (spec §1.4–1.6, §2).

Decoding trusts nothing: a bad entry becomes a finding and the rest is used; a bad document is an error. Encoding is
compact UTF-8. Documents are kept as the JSON they were, so that fields of other writers survive our rewrites.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, NamedTuple

import msgspec

from swampfs.errors import HostileNameError, IndexCorruptError, IndexVersionError
from swampfs.names import MAX_LINK, RelPath, index_path
from swampfs.records import Finding, IndexEntry, IndexMode, Posix

MONOLITH = ""
"""Partition name under which the monolith's (or a listing's) entries are filed in the catalog."""

_HEX = frozenset("0123456789abcdef")


class Meta(NamedTuple):
    """``_index/_meta.json``."""

    mode: IndexMode
    partitions: tuple[str, ...]
    commit_seq: int


def decode_json(body: bytes, what: str) -> dict[str, Any]:
    try:
        document = _decode(body)
    except (ValueError, RecursionError) as error:
        raise IndexCorruptError(f"{what} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise IndexCorruptError(f"{what} is not a JSON object")
    return document


def _decode(body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:
        # msgspec refuses a document for one lone surrogate; that is one bad name, not a bad index.
        return json.loads(body)


def decode_meta(body: bytes, what: str) -> Meta:
    """Raises IndexVersionError for any shape that is not version 1 or 2 (spec §1.6 BETTER, H14)."""
    document = decode_json(body, what)
    version, partitions, seq = (document.get(name) for name in ("version", "partitions", "commitSeq"))
    names_ok = isinstance(partitions, list) and all(isinstance(name, str) and name for name in partitions)
    if version not in (1, 2) or isinstance(version, bool) or not names_ok or partitions is None:
        raise IndexVersionError(f"{what} has version {version!r} in a form this software does not know")
    for name in partitions:
        if "/" in name or "\0" in name:
            raise IndexCorruptError(f"{what} lists the partition {name!r}")
    if version == 1:
        return Meta(IndexMode.MONOLITH, tuple(partitions), 0)
    if not isinstance(seq, int) or isinstance(seq, bool) or seq < 0:
        raise IndexCorruptError(f"{what} has commitSeq {seq!r}")
    return Meta(IndexMode.SHARDS, tuple(partitions), seq)


def encode_meta(meta: Meta) -> bytes:
    if meta.mode is IndexMode.MONOLITH:
        return msgspec.json.encode({"version": 1, "partitions": list(meta.partitions)})
    partitions = sorted(set(meta.partitions), key=_utf16)
    return msgspec.json.encode({"version": 2, "partitions": partitions, "commitSeq": meta.commit_seq})


def _utf16(text: str) -> bytes:
    """Sort order of the wire format: UTF-16 code units."""
    return text.encode("utf-16-be", "surrogatepass")


def entries_of(document: dict[str, Any], what: str) -> dict[str, Any]:
    """The ``entries`` object; a missing one is tolerated as empty (spec §1.4)."""
    entries = document.get("entries", {})
    if not isinstance(entries, dict):
        raise IndexCorruptError(f"{what} has entries that are not an object")
    return entries


def decode_shard(body: bytes, what: str) -> dict[str, Any]:
    document = decode_json(body, what)
    if document.get("version") != 1:
        raise IndexCorruptError(f"{what} has version {document.get('version')!r}")
    return document


def decode_entries(
    document: dict[str, Any], what: str, partition: str
) -> tuple[tuple[IndexEntry, ...], tuple[Finding, ...]]:
    """Checked entries, and a finding for each that was skipped."""
    good: list[IndexEntry] = []
    bad: list[Finding] = []
    for name, raw in entries_of(document, what).items():
        try:
            good.append(_entry(index_path(name), raw))
        except HostileNameError as error:
            bad.append(Finding(name, "index-name", f"skipped: {error}", partition))
        except IndexCorruptError as error:
            bad.append(Finding(name, "index-entry", f"skipped: {error}", partition))
    return tuple(good), tuple(bad)


def _entry(path: RelPath, raw: object) -> IndexEntry:
    if not isinstance(raw, dict):
        raise IndexCorruptError("the entry is not an object")
    size = raw.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 2**62:
        raise IndexCorruptError(f"its size is {str(size)[:40]!r}")
    sha256 = raw.get("sha256")
    if sha256 is not None and not (isinstance(sha256, str) and len(sha256) == 64 and _HEX.issuperset(sha256)):
        raise IndexCorruptError(f"its sha256 is {str(sha256)[:80]!r}")
    modified, mtime, posix = raw.get("lastModified"), raw.get("localMtime"), raw.get("posix")
    return IndexEntry(
        path,
        size,
        modified if isinstance(modified, str) else "",
        mtime if isinstance(mtime, str) else None,
        sha256,
        None if posix is None else _posix(posix),
    )


def _posix(raw: object) -> Posix | None:
    """``None`` for whatever is not ours: it is a remark about the file, not the file."""
    try:
        posix = msgspec.convert(raw, _WirePosix)
    except msgspec.ValidationError:
        return None
    return Posix(posix.mode, posix.uid, posix.gid, posix.ns, posix.link)


class _WirePosix(msgspec.Struct):
    mode: Annotated[int, msgspec.Meta(ge=0, le=0o7777)] | None = None
    uid: Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 1)] | None = None
    gid: Annotated[int, msgspec.Meta(ge=0, lt=2**32 - 1)] | None = None
    ns: Annotated[int, msgspec.Meta(ge=0, lt=1_000_000)] = 0
    link: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_LINK, pattern=r"^[^\0]+$")] | None = None


def _wire_posix(posix: Posix | None, previous: object) -> dict[str, Any]:
    """A writer that knows nothing of it leaves mode and owner as they were; the rest was of the former content."""
    if posix is None:
        known = previous if isinstance(previous, dict) else {}
        return {name: value for name, value in known.items() if name not in ("ns", "link")}
    wire: dict[str, Any] = {name: value for name, value in posix._asdict().items() if value is not None}
    if not posix.ns:
        del wire["ns"]
    return wire


def decode_entry(document: dict[str, Any], path: RelPath) -> IndexEntry | None:
    """One entry of a document, ``None`` if it has none. Raises IndexCorruptError if it is bad."""
    raw = entries_of(document, "the index").get(path)
    return None if raw is None else _entry(path, raw)


def encode_entry(entry: IndexEntry, previous: object = None) -> dict[str, Any]:
    """Wire form in the order of spec §2, then whatever other fields the previous entry carried."""
    wire: dict[str, Any] = {"key": entry.path, "size": entry.size, "lastModified": entry.last_modified}
    if entry.local_mtime is not None:
        wire["localMtime"] = entry.local_mtime
    if entry.sha256 is not None:
        wire["sha256"] = entry.sha256
    posix = _wire_posix(entry.posix, previous.get("posix") if isinstance(previous, dict) else None)
    if posix or entry.posix is not None:  # an empty one says that everything is as usual
        wire["posix"] = posix
    if isinstance(previous, dict):
        known = ("key", "size", "lastModified", "localMtime", "sha256", "posix")
        wire.update({name: value for name, value in previous.items() if name not in known})
    return wire


def encode_document(document: dict[str, Any]) -> bytes:
    """Compact JSON, non-ASCII raw (spec, JSON rules)."""
    try:
        return msgspec.json.encode(document)
    except UnicodeEncodeError:  # somebody's lone surrogate: kept, in its escaped form
        return json.dumps(document, separators=(",", ":")).encode()


def new_shard(entries: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "entries": entries}


def new_monolith(entries: dict[str, Any], pulled_at: str) -> dict[str, Any]:
    return {"version": 1, "lastPulled": pulled_at, "entries": entries}
