"""Vocabulary of paths: what a datastore-relative path may look like and what each one means.

Everything here is pure. The rules come from ``spec/datastore-format.md`` §1–§5 (keys, partitions, internal names)
and ``spec/swamp-data-model.md`` §2, §7 (layout, always-local and temporary names).
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple, NewType

from swampfs.errors import HostileNameError, NameTooLongError, SettingsError

RelPath = NewType("RelPath", str)
"""A checked forward-slash path relative to the datastore root, without namespace. ``""`` is the root."""

ROOT = RelPath("")
_RECENT = 4096  # paths whose meaning is remembered: one operation asks for it several times
MAX_SEGMENT_BYTES = 255
MAX_LINK = 4095  # bytes of a symbolic link's target, as in Linux
MAX_KEY_BYTES = 1024  # S3 and GCS object names

SYNCED_DIRECTORIES = frozenset(
    [
        "auto-definitions",
        "definitions-evaluated",
        "workflows-evaluated",
        "data",
        "outputs",
        "workflow-runs",
        "audit",
        "telemetry",
        "logs",
        "files",
    ]
)
ROOT_PARTITION = "_root"
NAMESPACE_MANIFEST = ".namespace.json"
GLOBAL_LOCK_FILE = ".datastore.lock"

_LOCAL_TOP = frozenset({"secrets", "pulled-extensions"})
_LOCAL_DATABASES = ("_catalog.db", "_extension_catalog.db", "run_tracker.db")
_INTERNAL_ROOT_FILES = frozenset(
    [
        ".datastore-index.json",
        ".push-queue.json",
        GLOBAL_LOCK_FILE,
        ".datastore-sync-state.json",
        ".datastore-dirty.log",
    ]
)
_INTERNAL_ROOT_DIRS = frozenset({"_index", "_control", ".locks"})
_PARTITION_BY_TOP = frozenset(["workflows-evaluated", "auto-definitions", "audit", "telemetry", "logs", "files"])
_PARTITION_BY_DEPTH = frozenset({"data", "outputs", "definitions-evaluated"})

_SWAMP_TEMP = re.compile(r"^\.[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\.tmp$|\.tmp\.\d+\.[0-9a-f-]+$")
_SCRATCH = re.compile(r"^\..*\.sw[a-px]$|^\.#|^#.*#$|^\.nfs[0-9a-f]{8,}|^\.fuse_hidden|^\.swamp-health-check-")
_PLAIN = re.compile(r"[\w@+,:= -][\w@+,:=. -]*(?:/[\w@+,:= -][\w@+,:=. -]*)*", re.ASCII)
_NAMESPACE = re.compile(r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$")
_UUID = re.compile(r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", re.IGNORECASE)


def check_name(name: str) -> None:
    """Refuse one path segment that cannot be a file name in a datastore.

    Raises:
        NameTooLongError: more than 255 bytes of UTF-8.
        HostileNameError: empty, ``.``, ``..``, or containing ``/``, ``\\``, NUL or a lone surrogate.
    """
    if name in ("", ".", "..") or "/" in name or "\\" in name or "\0" in name:
        raise HostileNameError(f"{name!r} cannot be a name in a datastore")
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        raise HostileNameError(f"{name!r} is not UTF-8") from None
    if length > MAX_SEGMENT_BYTES:
        raise NameTooLongError(f"{name[:40]!r}… has {length} bytes; a name has at most {MAX_SEGMENT_BYTES}")


def rel_path(text: str) -> RelPath:
    """Check a whole path (spec §5.3 BETTER). Raises what :func:`check_name` raises."""
    for segment in text.split("/"):
        check_name(segment)
    if len(text.encode()) > MAX_KEY_BYTES:
        raise NameTooLongError(f"{text[:60]!r}… is longer than {MAX_KEY_BYTES} bytes")
    return RelPath(text)


def index_path(text: str) -> RelPath:
    """As :func:`rel_path`, quick for the plain names that nearly all are: an index has hundreds of thousands."""
    if _PLAIN.fullmatch(text) and len(text) <= MAX_SEGMENT_BYTES:
        return RelPath(text)
    return rel_path(text)


def join(parent: RelPath, name: str) -> RelPath:
    """Child of a checked path; ``name`` must have passed :func:`check_name`."""
    return RelPath(f"{parent}/{name}" if parent else name)


def parent_of(rel: RelPath) -> RelPath:
    return RelPath(rel.rpartition("/")[0])


def is_below(rel: str, directory: str) -> bool:
    """Whether ``rel`` is strictly inside ``directory``."""
    return not directory or rel.startswith(directory + "/")


# --- what a path is --------------------------------------------------------------------------------------


def is_internal(rel: str) -> bool:
    """The sync layer's own files, which are never content (spec §5.1 with its BETTER note)."""
    head, _, _ = rel.partition("/")
    base = rel.rpartition("/")[2]
    return (
        rel in _INTERNAL_ROOT_FILES
        or head in _INTERNAL_ROOT_DIRS
        or base in (".lock", ".namespace.json")
        or base == "_catalog.db"
        or base.startswith("_catalog.db-")
        or bool(_SWAMP_TEMP.search(base))
    )


def is_stray_internal(rel: str) -> bool:
    """Index files of a namespace met in a listing of the whole bucket (spec §6.4 BETTER)."""
    parts = rel.split("/", 2)
    return len(parts) > 1 and parts[1] in ("_index", "_control", ".datastore-index.json")


def is_secret(rel: str) -> bool:
    """What must never leave the machine nor be served from a datastore: secrets, bundles, SQLite files."""
    head = rel.partition("/")[0]
    base = rel.rpartition("/")[2]
    return head in _LOCAL_TOP or head.endswith("bundles") or base.startswith(_LOCAL_DATABASES)


def is_run_log(rel: str) -> bool:
    """Run logs and run indexes, which swamp writes to the local tier only (data model §2.1)."""
    head = rel.partition("/")[0]
    if head == "outputs":
        return rel.endswith(".log")
    return head == "workflow-runs" and (rel.endswith(".log") or rel.endswith("/.runs-index.json"))


def is_always_local(rel: str) -> bool:
    """Names created through a mount that belong to this machine's local tier, not to the datastore."""
    base = rel.rpartition("/")[2]
    if _SWAMP_TEMP.search(base):
        return False  # becomes what it is renamed to; until then it is unpublished
    return is_internal(rel) or is_secret(rel) or is_run_log(rel)


@lru_cache(_RECENT)
def is_scratch(rel: str) -> bool:
    """Temporary and editor scratch names: visible in this mount, never published (data model §7.4)."""
    base = rel.rpartition("/")[2]
    return bool(_SWAMP_TEMP.search(base) or _SCRATCH.search(base))


@lru_cache(_RECENT)
def is_publishable(rel: str) -> bool:
    """Whether a datastore-tier file may ever be pushed. The deny list of architecture rule 7."""
    return not (is_internal(rel) or is_secret(rel) or is_scratch(rel))


def is_servable(rel: str) -> bool:
    """Whether an entry found in a remote index may appear in the tree."""
    return not (is_internal(rel) or is_secret(rel))


def is_lazy(rel: str) -> bool:
    """Content that a metadata-only pull leaves out: ``data/**/raw`` (spec §6.1)."""
    return rel.startswith("data/") and rel.endswith("/raw") and rel.count("/") >= 2


def is_latest_marker(rel: str) -> bool:
    return rel.startswith("data/") and rel.endswith("/latest")


# --- partitions ------------------------------------------------------------------------------------------


def partition_key(rel: str) -> str | None:
    """Shard of a path, with every oddity of spec §3 (the wire format). ``None`` = unpartitionable."""
    segments = rel.split("/")
    count = len(segments)
    top = segments[0]
    if count == 1:
        return ROOT_PARTITION if top else None
    if top in _PARTITION_BY_DEPTH:
        if count < 4:
            return None
        return "--".join(segments[: count - 3 if count >= 6 else count - 1])
    if top == "workflow-runs":
        return None if count < 3 else f"workflow-runs--{segments[1]}"
    return top if top in _PARTITION_BY_TOP else None


def home_partition(rel: str) -> str:
    """Where we keep a path's entry in a shard-first index: its own shard, or parked in ``_root`` (H6)."""
    return partition_key(rel) or ROOT_PARTITION


# --- models ----------------------------------------------------------------------------------------------


class ModelRef(NamedTuple):
    """A model: its normalised type (slashes kept) and its id. Sorts the way locks are taken."""

    type: str
    id: str

    def __str__(self) -> str:
        return f"{self.type}/{self.id}"

    @property
    def lock_path(self) -> RelPath:
        """Spec §9.3: the per-model lock, relative to the namespace root."""
        return RelPath(f"data/{self.type}/{self.id}/.lock")


def model_of(rel: str) -> ModelRef | None:
    """The model that owns a path below ``data/``, found by markers because type depth is unbounded.

    A UUID segment is a model id; otherwise the last all-digit segment is a version, two above which stands
    the model; otherwise a ``latest`` file stands two below it. ``None`` for everything else.
    """
    segments = rel.split("/")
    if segments[0] != "data" or len(segments) < 4:
        return None
    for at in range(2, len(segments) - 1):
        if _UUID.match(segments[at]):
            return ModelRef("/".join(segments[1:at]), segments[at])
    for at in range(len(segments) - 1, 3, -1):
        if segments[at].isascii() and segments[at].isdigit():
            return ModelRef("/".join(segments[1 : at - 2]), segments[at - 2])
    if segments[-1] == "latest" and len(segments) >= 5:
        return ModelRef("/".join(segments[1:-3]), segments[-3])
    return None


def marker_of(rel: str) -> RelPath | None:
    """The ``latest`` of the data name that a path belongs to, ``None`` if it belongs to none."""
    model = model_of(rel)
    if model is None:
        return None
    above = f"data/{model}/"
    name, _, within = rel[len(above) :].partition("/")
    return RelPath(f"{above}{name}/latest") if name and within else None


def version_of(rel: str) -> int | None:
    """The version of a data name that a path is or lies in, ``None`` if it is about all of them or of no model."""
    model = model_of(rel)
    if model is None:
        return None
    within = rel[len(f"data/{model}/") :].split("/")[1:]  # below the data name
    numbers = [segment for segment in within if segment.isascii() and segment.isdigit()]
    return int(numbers[-1]) if numbers else None


# --- locks -----------------------------------------------------------------------------------------------

LEASES = "_control/swampfs/leases"


@lru_cache(_RECENT)
def lease_path(rel: str) -> RelPath:
    """The lock under which a path is written, relative to the namespace root.

    A model's files have the model's lock, which swamp takes too. Everything else has a lock among mounts only, one for
    each directory of the second level: swamp writes those paths once and locks them with the global lock.
    """
    model = model_of(rel)
    if model is not None:
        return model.lock_path
    directory = "/".join(parent_of(RelPath(rel)).split("/")[:2])
    return RelPath(f"{LEASES}/{directory}.lock")


def is_model_lock(rel: str) -> bool:
    return rel.startswith("data/") and rel.endswith("/.lock") and rel.count("/") >= 3


def is_lock_file(rel: str) -> bool:
    """Names that swamp's processes lock by (data model §7.1)."""
    if rel == GLOBAL_LOCK_FILE or is_model_lock(rel):
        return True
    head, _, base = rel.partition("/")
    return head == ".locks" and base.endswith(".lock") and "/" not in base and bool(_NAMESPACE.match(base[:-5]))


# --- keys ------------------------------------------------------------------------------------------------


def is_namespace(slug: str) -> bool:
    try:
        check_namespace(slug)
    except SettingsError:
        return False
    return True


def check_namespace(slug: str) -> str:
    """Spec §1.2, and no directory of swamp's own: ``data/`` would be both. Raises SettingsError."""
    if slug in SYNCED_DIRECTORIES or slug in _LOCAL_TOP:
        raise SettingsError(f"namespace {slug!r} is a directory of swamp's own", remedy="choose another name")
    if len(slug) > 64 or not _NAMESPACE.match(slug):
        raise SettingsError(
            f"namespace {slug!r} is not valid",
            remedy="use 1–64 lower-case letters, digits and inner dashes",
        )
    return slug


class Keyspace(NamedTuple):
    """Object keys of one bound namespace (``""`` = solo) under one prefix, joined as spec §1.1 demands."""

    prefix: str = ""
    namespace: str = ""

    def key(self, logical: str) -> str:
        return f"{self.prefix}/{logical}" if self.prefix else logical

    def data(self, rel: str) -> str:
        return self.key(f"{self.namespace}/{rel}" if self.namespace else rel)

    def rel(self, key: str) -> str | None:
        """Inverse of :meth:`data`; ``None`` for a key of another namespace or prefix."""
        root = self.data("")
        return key[len(root) :] if key.startswith(root) else None

    @property
    def monolith(self) -> str:
        return self.data(".datastore-index.json")

    @property
    def meta(self) -> str:
        return self.data("_index/_meta.json")

    @property
    def shards(self) -> str:
        return self.data("_index/")

    def shard(self, partition: str) -> str:
        return self.data(f"_index/{partition}.json")

    @property
    def global_lock(self) -> str:
        """Spec §1.3: under the namespace's name, but at the root."""
        return self.key(f".locks/{self.namespace}.lock" if self.namespace else ".datastore.lock")

    def model_lock(self, model: ModelRef) -> str:
        return self.data(model.lock_path)

    def lock(self, rel: RelPath) -> str:
        """Key of a lock by its path: the global lock of a namespace lies at the root, whatever is mounted."""
        if rel == GLOBAL_LOCK_FILE:
            return self.global_lock
        return self.key(rel) if rel.startswith(".locks/") else self.data(rel)
