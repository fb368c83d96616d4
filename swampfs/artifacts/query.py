"""``swamp data query`` over the artifact catalog (data-model spec §6.1): records, predicates, selections.

Content is asked for only where an expression refers to it, and is never fetched here: whoever asks hands in how a
version's bytes are read, and what is not on this machine reads as ``None``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from typing import Any

from swampfs.artifacts.predicate import NUMBERS, TEXTS, TRUTHS, Expression, Predicate
from swampfs.state.artifacts import Artifact, Artifacts

Content = Callable[[Artifact], bytes | None]
LARGEST = 16 << 20
"""Bytes of content; what has more is looked at by nobody, as if it were not here."""

_YAML = {"application/yaml", "application/x-yaml", "text/yaml", "text/x-yaml"}
_COLUMN_OF = {**TEXTS, **NUMBERS, **TRUTHS}
_ORDER = (
    "id", "name", "version", "isLatest", "createdAt", "namespace", "tags", "modelName", "modelId", "modelType",
    "specName", "dataType", "contentType", "lifetime", "ownerType", "streaming", "size", "content", "ownerRef",
    "workflowRunId", "workflowName", "jobName", "stepName", "source",
)  # fmt: skip
_FEW = 6000  # rows that are sooner looked up one by one than found by going through all
_OTHER_NAMES = {"namespace": "namespace", "modelId": "model_id", "tags": "tags"}


class Record:
    """One artifact as an expression sees it."""

    def __init__(self, artifact: Artifact, content: Content) -> None:
        self.artifact = artifact
        self._content = content
        self._read: tuple[bytes | None] | None = None

    def __call__(self, name: str) -> Any:
        """A field. ``attributes`` and ``content`` are ``None`` for content that is not on this machine."""
        if name == "attributes":
            return self._attributes()
        if name == "content":
            return self._attributes() if self._is_json() else self._text()
        return getattr(self.artifact, _COLUMN_OF.get(name) or _OTHER_NAMES[name])

    def as_json(self) -> dict[str, Any]:
        """All of it but ``attributes``, whose place ``content`` has."""
        return {name: self(name) for name in _ORDER}

    def load(self) -> None:
        """Read its content, if it has any that an expression could see."""
        self("content")

    def _is_json(self) -> bool:
        return self.artifact.content_type.partition(";")[0].strip().lower() == "application/json"

    def _bytes(self) -> bytes | None:
        if self._read is None:
            self._read = (self._content(self.artifact),)
        return self._read[0]

    def _attributes(self) -> Any:
        if not self._is_json():
            return {}
        body = self._bytes()
        if body is None:
            return None
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            return {}

    def _text(self) -> str | None:
        kind = self.artifact.content_type.partition(";")[0].strip().lower()
        if not kind.startswith("text/") and kind not in _YAML:
            return ""
        body = self._bytes()
        return None if body is None else body.decode("utf-8", "replace")


def nothing(_: Artifact) -> bytes | None:
    """No content is here."""
    return None


def search(
    artifacts: Artifacts,
    predicate: Predicate,
    content: Content = nothing,
    loaded: Callable[[Iterator[Record]], Iterator[Record]] = iter,
) -> Iterator[Record]:
    """Records for which it holds, in the order in which they came to this machine.

    ``loaded`` may read the contents of many side by side, where the predicate needs them.
    """
    where = predicate.where(lambda text, values: artifacts.has_few(text, values, _FEW))
    candidates = (Record(artifact, content) for artifact in artifacts.select(*where))
    for record in loaded(candidates) if predicate.needs_content else candidates:
        if predicate.is_sql or predicate.holds(record):
            yield record


def selected(record: Record, selection: Expression | None) -> Any:
    """What is shown of a record: ``None`` where a selection has no value of it."""
    if selection is None:
        return record.as_json()
    try:
        return _plain(selection.value(record))
    except ValueError:
        return None


def _plain(value: Any) -> Any:
    """As JSON has it: CEL knows times, durations and bytes."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    isoformat = getattr(value, "isoformat", None)
    if isoformat is not None:
        return str(isoformat()).replace("+00:00", "Z")
    total_seconds = getattr(value, "total_seconds", None)
    return str(value) if total_seconds is None else f"{total_seconds():g}s"
