"""The decisions of a sync, as pure functions of what is known about one path (spec §6.3, §7.1, with BETTER notes)."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum

from swampfs.names import ROOT_PARTITION, ModelRef, partition_key
from swampfs.records import IndexEntry


class Verdict(Enum):
    """What a push does with a local file."""

    PUSH = "push"
    SAME = "same"  # the index has this content
    STALE = "stale"  # unchanged here, moved on there: for the next pull


def needs_push(size: int, mtime: str | None, sha256: str, entry: IndexEntry | None) -> bool:
    """The table of spec §7.1, for a file whose hash is known."""
    if entry is None or entry.size != size:
        return True
    if entry.sha256 is not None:
        return entry.sha256 != sha256
    # No hash to compare with: a coarse clock may hide a rewrite, but a time that differs is no proof of none.
    return mtime is not None and entry.local_mtime is not None and entry.local_mtime != mtime


def judge(local: IndexEntry, entry: IndexEntry | None, base: IndexEntry | None, *, rewritten: bool) -> Verdict:
    """Compare local content with the index and with what both last had in common.

    Without a base (a cache that others filled) it is the spec's table. With one, content that did not change here is
    never pushed over what changed there (H1), nor brought back after it was deleted there (H19). ``rewritten``: its
    path was marked and the file is not the one that was in step, so its writer means it to exist.
    """
    changed_here = base is None or not _same_bytes(local, base)
    if changed_here:
        assert local.sha256 is not None
        if base is not None and entry is not None and entry.sha256 is None and entry.same_content(base):
            return Verdict.PUSH  # the index has no hash, but what it names is what we know to differ
        wanted = needs_push(local.size, local.local_mtime, local.sha256, entry)
        return Verdict.PUSH if wanted else Verdict.SAME
    if entry is None:
        return Verdict.PUSH if rewritten else Verdict.STALE
    assert base is not None
    return Verdict.SAME if entry.same_content(base) or _same_bytes(local, entry) else Verdict.STALE


def _same_bytes(local: IndexEntry, other: IndexEntry) -> bool:
    return local.size == other.size and other.sha256 is not None and local.sha256 == other.sha256


def scope_partitions(models: Iterable[ModelRef]) -> tuple[str, ...]:
    """Beginnings of the partitions that may hold files of these models (spec §3, §6.3 BETTER).

    A model's ``latest`` markers are in ``data--{type}``, or in ``data--{type}--{id}--*`` for one-segment types (H2).
    """
    found: list[str] = []
    for model in models:
        slug = model.type.replace("/", "--")
        found += [f"{top}--{slug}" for top in ("data", "outputs", "definitions-evaluated")]
    return tuple(dict.fromkeys(found))


def covers_model(name: str, scopes: tuple[str, ...]) -> bool:
    """Whether a partition may hold files in scope: named like one, below one, or with a shortened name above one."""
    return any(name == s or name.startswith(f"{s}--") or s.startswith(f"{name}--") for s in scopes)


def is_in_scope(rel: str, models: Iterable[ModelRef]) -> bool:
    """Whether a file belongs to one of the models, by its real path."""
    for model in models:
        if rel.startswith(f"data/{model.type}/{model.id}/"):
            return True
        head, _, name = rel.rpartition("/")
        if head == f"definitions-evaluated/{model.type}":
            return True
        if head.rpartition("/")[0] == f"outputs/{model.type}" and name.startswith(f"{model.id}-"):
            return True
    return False


def covers_path(name: str, path: str) -> bool:
    """Whether a partition may hold a file at or below a path, marked as a file or as a directory."""
    joined = path.replace("/", "--")
    if name == ROOT_PARTITION:
        return partition_key(path) in (None, ROOT_PARTITION)  # parked there (H6)
    return name == joined or name.startswith(joined + "--") or joined.startswith(name + "--")


def dirty_partitions(paths: Iterable[str]) -> frozenset[str]:
    return frozenset(key for path in paths if (key := partition_key(path)) is not None)
