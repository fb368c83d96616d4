"""Directories of symbolic links below ``.swampfs/``: artifacts by model, tag, workflow, time, or a predicate.

``by-model/MODEL/NAME``, ``by-tag/KEY/VALUE/…``, ``by-workflow/WORKFLOW/RUN/…``, ``recent/…`` and ``query/PREDICATE/…``
lead to the directory of a version, ``latest/MODEL/NAME`` to its content. A ``/`` in a name or a predicate is written
``%2F``, a ``%`` ``%25``. Predicates know of content what is on this machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple
from urllib.parse import quote, unquote

from swampfs.artifacts.cel import MACROS
from swampfs.artifacts.query import Content, search
from swampfs.errors import UsageError
from swampfs.state.artifacts import Artifact, Artifacts

TOPS = ("by-model", "by-tag", "by-workflow", "latest", "query", "recent")
_RECENT = 100
MOST = 10_000  # links in one directory
_LONGEST = 255  # bytes of a name

Listing = dict[str, str | None]
"""Name → target of a link, relative to the root of the mount; ``None`` is a directory."""


class Source(NamedTuple):
    """What links are made of."""

    where: Callable[[Artifact], str | None]
    """Directory of a version below the root of the mount, if it is there."""
    content: Content
    namespace: str | None
    """The only one whose artifacts are there; ``None`` is any."""

    @property
    def scope(self) -> tuple[str, tuple[str, ...]]:
        return ("1", ()) if self.namespace is None else ("+namespace = ?", (self.namespace,))


def listing(artifacts: Artifacts, path: str, source: Source) -> Listing | None:
    """What is in a directory below ``.swampfs/``; ``None`` if there is none of that name.

    Raises UsageError for a predicate that is wrong.
    """
    top, *parts = path.split("/")
    if top != "query":
        parts = [unquote(part) for part in parts]
    if top == "recent" and not parts:
        newest = artifacts.select("is_latest = 1", (), newest_first=True, limit=_RECENT)
        return _links(newest, source, lambda one: f"{one.created_at} {_label(one)}")
    if top == "query":
        return _query(artifacts, parts, source)
    if top in ("by-model", "latest") and len(parts) <= 1:
        inside = "raw" if top == "latest" else ""
        return _of_model(artifacts, parts, source, inside)
    columns = {"by-tag": 2, "by-workflow": 2}
    if len(parts) > columns.get(top, -1):
        return None
    return _by_tag(artifacts, parts, source) if top == "by-tag" else _by_workflow(artifacts, parts, source)


def _query(artifacts: Artifacts, parts: list[str], source: Source) -> Listing | None:
    if len(parts) != 1:
        return {} if not parts else None
    from swampfs.artifacts.predicate import Predicate  # costs an import that few mounts need

    predicate = Predicate(parts[0].replace("%2F", "/").replace("%25", "%"))
    if predicate.calls & MACROS:
        # The library evaluates them in one go, while nothing else of the mount can run.
        raise UsageError("what goes through lists and maps is not for a directory", remedy="ask `swampfs query`")
    found = (record.artifact for record in search(artifacts, predicate, source.content))
    return _links(found, source, _label) or {}


def _of_model(artifacts: Artifacts, parts: list[str], source: Source, inside: str) -> Listing | None:
    if not parts:
        names = artifacts.distinct("CASE model_name WHEN '' THEN model_id ELSE model_name END", *source.scope)
        return _directories(names)
    (model,) = parts
    is_it = "is_latest = 1 AND (model_name = ? OR (model_name = '' AND model_id = ?))"
    return _links(artifacts.select(is_it, (model, model)), source, lambda one: one.data_name, inside)


def _by_tag(artifacts: Artifacts, parts: list[str], source: Source) -> Listing | None:
    if len(parts) < 2:
        return _directories(artifacts.tags(*source.scope, *parts))
    tagged = "id IN (SELECT artifact FROM tagged WHERE tag = (SELECT id FROM tag WHERE key = ? AND value = ?))"
    return _links(artifacts.select(f"+is_latest = 1 AND {tagged}", parts), source, _label)


def _by_workflow(artifacts: Artifacts, parts: list[str], source: Source) -> Listing | None:
    where, values = source.scope
    is_it = f"workflow_run_id <> '' AND {where}"
    if not parts:
        return _directories(artifacts.distinct("workflow_name", is_it, values))
    if len(parts) == 1:
        return _directories(artifacts.distinct("workflow_run_id", f"{is_it} AND workflow_name = ?", (*values, *parts)))
    return _links(artifacts.select("workflow_name = ? AND workflow_run_id = ?", parts), source, _label)


def _directories(names: Iterable[str]) -> Listing | None:
    return {name: None for text in names if (name := _name(text))}


def _links(
    found: Iterable[Artifact], source: Source, label: Callable[[Artifact], str], inside: str = ""
) -> Listing | None:
    links: Listing = {}
    numbers: Counter[str] = Counter()  # of models of one name
    for one in found:
        directory, name = source.where(one), _name(label(one))
        if directory is None or not name:
            continue
        unique = name
        while unique in links:
            numbers[name] += 1
            unique = f"{name}~{numbers[name] + 1}"
        links[unique] = f"{directory}/{inside}" if inside else directory
        if len(links) >= MOST:
            break
    return links or None


def _label(one: Artifact) -> str:
    return f"{one.model_name or one.model_id}:{one.data_name}@{one.version}"


def _name(text: str) -> str:
    """As a directory can show it; ``""`` if it cannot."""
    name = quote(text, safe=_SAFE) if set(text) & _SPECIAL or text in (".", "..") else text
    name = name.replace(".", "%2E") if name in (".", "..") else name
    return name if len(name.encode("utf-8", "replace")) <= _LONGEST else ""


_SPECIAL = {"/", "%", *map(chr, range(32)), "\x7f"}
_SAFE = "".join(map(chr, range(32, 127))).translate({ord("/"): None, ord("%"): None})
