"""Values that travel between layers. Rows are ``NamedTuple``; nothing here has behaviour beyond its own fields."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from enum import Enum, IntEnum
from typing import Any, NamedTuple

from swampfs.names import RelPath

_UNKNOWN_NS = 365 * 86_400_000_000_000  # some writers say the epoch where they know no time
_LAST_NS = 253_402_300_799_999_000_000  # end of the year 9999; file times can be further out


def timestamp(ns: int) -> str:
    """UTC wire form ``YYYY-MM-DDTHH:mm:ss.sssZ`` of nanoseconds since the epoch, truncated to ms (spec §0)."""
    seconds, rest = divmod(min(max(ns, 0), _LAST_NS), 1_000_000_000)
    moment = datetime.fromtimestamp(seconds, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{rest // 1_000_000:03d}Z"


def timestamp_ns(text: str | None) -> int | None:
    """Inverse of :func:`timestamp`; ``None`` when the text is not such a time, or one of the epoch's first year."""
    ns = instant_ns(text)
    return None if ns is None or ns < _UNKNOWN_NS else ns


def instant_ns(text: str | None) -> int | None:
    """As :func:`timestamp_ns`, for a writer that means what it says: build tools set times of the epoch itself."""
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    if moment.tzinfo is None or moment.year < 1970:
        return None
    return int(moment.replace(microsecond=0).timestamp()) * 1_000_000_000 + moment.microsecond * 1000


class Posix(NamedTuple):
    """What the index format has no field for; it travels in one that other clients ignore (``docs/formats.md``)."""

    mode: int | None = None  # permission bits; None: the usual ones
    uid: int | None = None  # None: whoever mounts it
    gid: int | None = None
    ns: int = 0  # of the modification time, below its milliseconds
    link: str | None = None  # it is a symbolic link to this; its content is the same text


def encode_posix(posix: Posix | None) -> str | None:
    return None if posix is None else json.dumps(posix)


def decode_posix(text: str | None) -> Posix | None:
    return None if text is None else Posix._make(json.loads(text))


class IndexEntry(NamedTuple):
    """One file as the remote index names it (spec §2)."""

    path: RelPath
    size: int
    last_modified: str
    local_mtime: str | None = None
    sha256: str | None = None
    posix: Posix | None = None  # None: its writer knew nothing of it

    def same_content(self, other: IndexEntry | None) -> bool:
        """Whether both name the same bytes: by hash where both have one, else by size and time."""
        if other is None or self.size != other.size:
            return False
        if self.sha256 and other.sha256:
            return self.sha256 == other.sha256
        return self.last_modified == other.last_modified

    @property
    def mtime_ns(self) -> int | None:
        """Modification time shown to users: the pusher's file time, else the time of upload, if that is known."""
        if self.posix is not None:
            exact = instant_ns(self.local_mtime)
            if exact is not None:
                return exact + self.posix.ns
        return timestamp_ns(self.local_mtime) or timestamp_ns(self.last_modified)

    @property
    def kind(self) -> Kind:
        return Kind.SYMLINK if self.posix is not None and self.posix.link is not None else Kind.FILE


class Kind(IntEnum):
    """``FILE`` and ``SYMLINK`` are published; the special ones exist on their machine only."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHARACTER_DEVICE = 6
    BLOCK_DEVICE = 7


class Residency(IntEnum):
    """Where a file's bytes are. ``HYDRATING`` and ``EVICTING`` live in memory only; see :data:`RESIDENCY_MOVES`."""

    STUB = 0
    HYDRATING = 1
    CLEAN = 2
    DIRTY = 3
    EVICTING = 4


RESIDENCY_MOVES: Mapping[Residency, frozenset[Residency]] = {
    # STUB → DIRTY: truncated or replaced without ever having been read.
    Residency.STUB: frozenset({Residency.HYDRATING, Residency.DIRTY}),
    Residency.HYDRATING: frozenset({Residency.CLEAN, Residency.STUB}),
    # CLEAN → STUB: the remote content moved on.
    Residency.CLEAN: frozenset({Residency.DIRTY, Residency.EVICTING, Residency.STUB}),
    # DIRTY → STUB: another machine won a conflict; our bytes were set aside first.
    Residency.DIRTY: frozenset({Residency.CLEAN, Residency.STUB}),
    Residency.EVICTING: frozenset({Residency.STUB, Residency.CLEAN}),
}


class Node(NamedTuple):
    """One inode of the tree: a catalog row."""

    ino: int
    parent: int
    name: str
    path: RelPath
    kind: Kind
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    uid: int
    gid: int
    residency: Residency
    partition: str | None  # where the remote entry was found; None = never published
    base_size: int | None
    base_sha256: str | None
    base_modified: str | None
    base_mtime: str | None
    base_posix: str | None  # encoded: few ask
    target: str | None  # of a symbolic link
    rdev: int  # of a device
    atime_ns: int | None  # if it was ever set; reading does not
    links: int  # names of a file; of a directory, 1 and its subdirectories
    blocks: int | None  # on this machine, if it was written here: it may have holes
    place: int  # in the listing of its directory: it stays while the name does
    row: int  # of this name; of the first name of an inode, the inode

    @property
    def base(self) -> IndexEntry | None:
        """The remote entry this node was last in step with."""
        if self.partition is None or self.base_size is None:
            return None
        return IndexEntry(
            self.path,
            self.base_size,
            self.base_modified or "",
            self.base_mtime,
            self.base_sha256,
            decode_posix(self.base_posix),
        )

    @property
    def is_dir(self) -> bool:
        return self.kind is Kind.DIRECTORY

    @property
    def is_special(self) -> bool:
        return self.kind > Kind.SYMLINK


class Change(NamedTuple):
    """What a ``setattr`` asks for; ``None`` = leave alone."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    mtime_ns: int | None = None
    atime_ns: int | None = None

    @property
    def is_of_access(self) -> bool:
        """Whether it is about mode or owner."""
        return (self.mode, self.uid, self.gid) != (None, None, None)


class Op(Enum):
    WRITE = "write"
    DELETE = "delete"
    ATTRIBUTES = "attributes"  # content as it is in the datastore


class DirtyPath(NamedTuple):
    """A journal record: this path's local state is not in the datastore yet."""

    path: RelPath
    op: Op
    generation: int
    base: IndexEntry | None
    partition: str | None


class Intent(NamedTuple):
    """A rename begun: on replay the files are moved if they have not been."""

    id: int
    source: RelPath
    target: RelPath


class LockInfo(NamedTuple):
    """Body of a lock object (spec §1.8)."""

    holder: str
    hostname: str
    pid: int
    acquired_at: str
    ttl_ms: int
    nonce: str | None

    def as_json(self) -> dict[str, Any]:
        return {
            "holder": self.holder,
            "hostname": self.hostname,
            "pid": self.pid,
            "acquiredAt": self.acquired_at,
            "ttlMs": self.ttl_ms,
            "nonce": self.nonce,
        }


class IndexMode(Enum):
    """What the datastore's index is (spec §1.4–1.6)."""

    UNKNOWN = "unknown"
    LISTING = "listing"  # no index: a listing is the truth (un-indexed bucket, or a directory)
    MONOLITH = "v1"
    SHARDS = "v2"


class Watermark(NamedTuple):
    """How far this machine has followed the remote index."""

    mode: IndexMode = IndexMode.UNKNOWN
    commit_seq: int = 0
    meta_etag: str = ""
    monolith_etag: str = ""


class Partition(NamedTuple):
    """Whole content of one partition as read from, or just written to, the remote."""

    etag: str
    entries: tuple[IndexEntry, ...]


class Finding(NamedTuple):
    """Something in the datastore that was skipped or set aside, for ``status`` and ``doctor``."""

    path: str
    kind: str
    detail: str
    partition: str = ""  # reading it again without the fault clears the finding


class IndexDelta(NamedTuple):
    """What moved in the remote index since a watermark."""

    watermark: Watermark
    changed: Mapping[str, Partition]
    kept: frozenset[str]  # partitions that stay as they are; every other known one is gone
    findings: tuple[Finding, ...] = ()
    complete: bool = True  # every partition was compared, not just some


class TreeChange(NamedTuple):
    """A name that stands for something else now, and the inode whose cached attributes no longer hold."""

    parent: int
    name: str  # "" = only the inode's attributes
    ino: int


class PushReport(NamedTuple):
    """Outcome of one push."""

    pushed: int = 0
    deleted: int = 0
    conflicts: tuple[str, ...] = ()
    waiting: tuple[RelPath, ...] = ()  # locks that others hold
    open_files: tuple[str, ...] = ()  # left for later: still being written, or unfinished
    failure: Exception | None = None  # of a file that could not be uploaded or removed; the rest was committed
