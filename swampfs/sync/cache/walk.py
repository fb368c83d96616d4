"""Which local files and which index entries a push has to look at (spec §7.2, step 5)."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Iterable
from typing import NamedTuple

from swampfs.errors import HostileNameError
from swampfs.names import RelPath, is_internal, is_publishable, rel_path
from swampfs.state.manifest import Manifest, Row
from swampfs.sync.cache.marks import Marks
from swampfs.sync.cache.tree import CacheTree, Found, WalkProblem

log = logging.getLogger(__name__)


class Candidates(NamedTuple):
    """``files`` maps a path to its stat; ``missing`` are index entries whose absence here means a deletion."""

    files: dict[RelPath, os.stat_result]
    missing: list[Row]
    links: list[RelPath]  # old-style ``latest`` links, to be uploaded as text
    held: list[str]  # marked paths whose deletions a lazy cache may not carry out: they stay marked


def candidates(tree: CacheTree, manifest: Manifest, marks: Marks) -> Candidates:
    """Runs in a worker. Deletions are never inferred in a lazy cache, nor from a walk that missed anything (H4)."""
    found = Candidates({}, [], [], [])
    problems: list[WalkProblem] = []
    lazy = marks.lazy
    if marks.walk_all:
        for name in tree.strays():
            log.warning("%s/%s belongs to no namespace: not published", tree.root, name)
        _take(tree.walk("", problems), found)
        complete = not any(problem.fatal for problem in problems)
        if marks.overflowed and complete and not lazy:
            # Paths that were marked are lost: what was here once and is no more was deleted (spec §7.2).
            rows = (row for row in manifest.rows() if row.base is not None)
            found.missing.extend(_absent(tree, rows, found))
        for path in marks.paths.paths:
            _look_for_deletions(tree, manifest, path, found, complete=complete and not lazy)
    else:
        for path in marks.paths.paths:
            _look_at(tree, manifest, path, found, problems, lazy=lazy)
    for problem in problems:
        _report(tree, problem, found)
    if lazy:
        found.held.extend(path for path in marks.paths.paths if _lacks_something(tree, manifest, path))
    unique = {row.path: row for row in found.missing if not is_internal(row.path) and _may_delete(row, manifest)}
    return found._replace(missing=list(unique.values()))


def _lacks_something(tree: CacheTree, manifest: Manifest, path: str) -> bool:
    """Whether something at or below a marked path was here once and is gone."""
    return any(row.base is not None and tree.stat(row.path) is None for row in manifest.rows(path))


def _may_delete(row: Row, manifest: Manifest) -> bool:
    """A deletion of what was known here does not take newer content of others with it (spec §7.3, H19)."""
    if row.entry is None or row.base is None or row.entry.same_content(row.base):
        return True
    if row.entry.sha256 is None and manifest.was_sent(row.path):
        return True  # our own uncommitted object, which a listing brought into the index
    log.info("%s was deleted here and changed by another machine: kept", row.path)
    return False


def _look_for_deletions(tree: CacheTree, manifest: Manifest, path: str, found: Candidates, *, complete: bool) -> None:
    """Of a marked path, when all files were walked anyway. A mark "anything" must not hide it (H19)."""
    try:
        status = tree.stat(path)
    except OSError:
        return
    if complete and status is None:
        found.missing.extend(manifest.rows(path))
    elif complete and status is not None and stat.S_ISDIR(status.st_mode):
        found.missing.extend(_absent(tree, (row for row in manifest.rows(path) if row.base is not None), found))


def _look_at(
    tree: CacheTree, manifest: Manifest, path: str, found: Candidates, problems: list[WalkProblem], *, lazy: bool
) -> None:
    """One marked path: a file, a directory, or something that is gone."""
    try:
        status = tree.stat(path)
    except OSError as error:
        log.warning("%s cannot be looked at, skipped: %s", path, error.strerror)
        found.held.append(path)
        return
    if status is None:
        if not lazy:
            # The contract: absence of a marked path is its deletion, and of all below it.
            found.missing.extend(manifest.rows(path))
    elif stat.S_ISDIR(status.st_mode):
        before = len(problems)
        _take(tree.walk(path, problems), found)
        if not lazy and not any(problem.fatal for problem in problems[before:]):
            # Inside it only what was here once: others may have added what this cache has not pulled (H19).
            rows = (row for row in manifest.rows(path) if row.base is not None)
            found.missing.extend(_absent(tree, rows, found))
    elif stat.S_ISREG(status.st_mode):
        _take_marked_file(path, status, found)
    else:
        problems.append(WalkProblem(path, "is not a regular file", fatal=False))


def _take_marked_file(path: str, status: os.stat_result, found: Candidates) -> None:
    try:
        if is_publishable(path):
            found.files[rel_path(path)] = status
    except HostileNameError as error:
        log.warning("%r cannot be published, skipped: %s", path, error)


def _take(files: Iterable[Found], found: Candidates) -> None:
    for item in files:
        found.files[item.path] = item.stat


def _absent(tree: CacheTree, rows: Iterable[Row], found: Candidates) -> list[Row]:
    gone = []
    for row in rows:
        if row.path not in found.files and tree.stat(row.path) is None:
            gone.append(row)
    return gone


def _report(tree: CacheTree, problem: WalkProblem, found: Candidates) -> None:
    target = _numeric_link(tree, problem.path)
    if target is not None:
        found.links.append(RelPath(problem.path))
        return
    if not problem.fatal or os.path.lexists(tree.path(problem.path)):
        log.warning("%s %s: not published", problem.path or tree.base, problem.why)


def _numeric_link(tree: CacheTree, path: str) -> str | None:
    """The version an old-style ``latest`` link points to (spec §5.3)."""
    if not path.endswith("/latest"):
        return None
    try:
        target = os.readlink(tree.path(path)).rstrip("/")
    except OSError:
        return None
    return target if target.isascii() and target.isdigit() else None


def link_text(tree: CacheTree, path: str) -> bytes | None:
    """Content under which such a link is published."""
    text = _numeric_link(tree, path)
    return None if text is None else text.encode()
