"""``metadata.yaml`` of a version (data-model spec §3), and rows of another namespace's catalog export (§5.5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml

from swampfs.state.artifacts import Artifact, Document

NAME = "metadata.yaml"
_LONGEST = 1 << 20  # bytes: what is longer is no metadata of swamp's
_MOST_NESTED = 1000  # openings: libyaml's wrapper descends on the C stack, and would end the process
_OPENINGS = (b"[", b"{", b"- ", b"-\t", b"? ", b"?\t")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """All scalars are the text that was written, but for null: ``on`` is a tag's value and no truth."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as its base has it)
        first: [one for one in resolvers if one[0] == "tag:yaml.org,2002:null"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def path_of(rel: str) -> tuple[str, str, str, int] | None:
    """Normalized type, model id, data name and version of a version's directory; ``None`` if it can be none."""
    parts = rel.split("/")
    if len(parts) < 5 or parts[0] != "data" or not parts[-1].isascii() or not parts[-1].isdigit():
        return None
    version = int(parts[-1]) if len(parts[-1]) < 16 else 0
    return ("/".join(parts[1:-3]), parts[-3], parts[-2], version) if version else None


def parse(path: str, body: bytes, fingerprint: str) -> Document:
    """What the metadata of the version at ``path`` says. What is wrong with it is in the document's ``problem``."""
    place = path_of(path)
    try:
        if place is None or len(body) > _LONGEST or sum(map(body.count, _OPENINGS)) > _MOST_NESTED:
            raise ValueError("not the metadata of a version")
        raw = _mapping(yaml.load(body, Loader=_Loader))  # noqa: S506 (a safe loader)
        if not raw:
            raise ValueError("not a mapping")
        artifact = _artifact(raw, place)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        return Document(path, fingerprint, None, problem=" ".join(str(error).split()) or type(error).__name__)
    return Document(path, fingerprint, artifact, None, _text(raw.get("lifecycle")), _text(raw.get("renamedTo")))


def _artifact(raw: Mapping[str, Any], place: tuple[str, str, str, int]) -> Artifact:
    type_normalized, model_id, name, version = place
    tags = {_text(key): _text(value) for key, value in _mapping(raw.get("tags")).items()}
    owner = _mapping(raw.get("ownerDefinition"))
    return Artifact(
        namespace="",
        type_normalized=type_normalized,
        model_id=model_id,
        data_name=name,
        uuid=_text(raw.get("id")),
        version=version,
        model_name=tags.get("modelName", ""),
        spec_name=tags.get("specName", ""),
        data_type=tags.get("type", ""),
        content_type=_text(raw.get("contentType")),
        lifetime=_text(raw.get("lifetime")),
        owner_type=_text(owner.get("ownerType")),
        streaming=_text(raw.get("streaming")) == "true",
        size=_size(raw.get("size")),
        created_at=_text(raw.get("createdAt")),
        tags=tags,
        owner_ref=_text(owner.get("ownerRef")),
        workflow_run_id=_text(owner.get("workflowRunId")),
        workflow_name=_text(owner.get("workflowName")),
        job_name=_text(owner.get("jobName")),
        step_name=_text(owner.get("stepName")),
        source=_text(owner.get("source")),
    )


def of_export(namespace: str, raw: Any) -> Artifact | None:
    """A row of ``.catalog-export.json``; ``None`` if it is none."""
    if not isinstance(raw, dict):
        return None
    try:
        tags = json.loads(raw.get("tags") or "{}")
        version = int(raw["version"])
        kept = {name: _text(raw.get(name)) for name in Artifact._fields if name not in _NOT_TEXT}
    except (KeyError, ValueError, TypeError, RecursionError):
        return None
    if not kept["type_normalized"] or not kept["model_id"] or not kept["data_name"] or not 0 < version < _MOST:
        return None
    return Artifact(
        **{**kept, "namespace": namespace, "uuid": _text(raw.get("id"))},
        version=version,
        streaming=bool(raw.get("streaming")),
        size=_size(raw.get("size")),
        tags={_text(key): _text(value) for key, value in _mapping(tags).items()},
        is_latest=bool(raw.get("is_latest")),
    )


_NOT_TEXT = ("version", "streaming", "size", "tags", "is_latest")
_MOST = 1 << 53


def _mapping(value: Any) -> Mapping[Any, Any]:
    return value if isinstance(value, dict) else {}


def _size(value: Any) -> int:
    try:
        size = int(value)
    except (ValueError, TypeError):
        return 0
    return size if 0 <= size < _MOST else 0


def _text(value: Any) -> str:
    """What is no scalar has no text: an anchor can make it endless."""
    if value is None or isinstance(value, dict | list):
        return ""
    return str(value).encode("utf-8", "replace").decode()  # a lone surrogate is no text for a database
