"""``metadata.yaml`` of a version (data-model spec §3), and rows of another namespace's catalog export (§5.5)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from swampfs.names import rel_path
from swampfs.state.artifacts import Artifact, Document

NAME = "metadata.yaml"
_LONGEST = 1 << 20  # bytes: what is longer is no metadata of swamp's
_MOST_NESTED = 1000  # openings: libyaml's wrapper descends on the C stack, and would end the process
_NULL = "tag:yaml.org,2002:null"
_OPENINGS = (b"[", b"{", b"- ", b"-\t", b"? ", b"?\t")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Nothing is constructed, so that no tag, merge or anchor costs anything: scalars stay what was written."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as its base has it)
        first: [one for one in resolvers if one[0] == _NULL]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def path_of(rel: str) -> tuple[str, str, str, int] | None:
    """Normalized type, model id, data name and version of a version's directory; ``None`` if it can be none."""
    parts = rel.split("/")
    if len(parts) < _FEWEST or parts[0] != "data" or parts[-2].lower() == "latest":
        return None
    if not _VERSION.fullmatch(parts[-1]):
        return None
    return "/".join(parts[1:-3]), parts[-3], parts[-2], int(parts[-1])


def parse(path: str, body: bytes, fingerprint: str) -> Document:
    """What the metadata of the version at ``path`` says. What is wrong with it is in the document's ``problem``."""
    place = path_of(path)
    try:
        if place is None or len(body) > _LONGEST or sum(map(body.count, _OPENINGS)) > _MOST_NESTED:
            raise ValueError("not the metadata of a version")
        raw = _mapping(yaml.compose(body, Loader=_Loader))
        if not _text(raw.get("id")):
            raise ValueError("not a mapping with an id")
        artifact = _artifact(raw, place)
    except Exception as error:  # whatever others wrote there, it is theirs to mend
        return Document(path, fingerprint, None, problem=" ".join(str(error).split()) or type(error).__name__)
    return Document(path, fingerprint, artifact, None, _text(raw.get("lifecycle")), _text(raw.get("renamedTo")))


def _artifact(raw: Mapping[str, Any], place: tuple[str, str, str, int]) -> Artifact:
    type_normalized, model_id, name, version = place
    tags = {key: _text(value) for key, value in _mapping(raw.get("tags")).items()}
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
        size=_size(_text(raw.get("size"))),
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
    """A row of ``.catalog-export.json``; ``None`` if it is none, or names a place that no artifact can have."""
    try:
        tags = json.loads(raw.get("tags") or "{}")
        kept = {name: _clean(str(raw.get(name) or "")) for name in Artifact._fields if name not in _NOT_TEXT}
        found = Artifact(
            **{**kept, "namespace": namespace, "uuid": _clean(str(raw.get("id") or ""))},
            version=int(raw["version"]),
            streaming=bool(raw.get("streaming")),
            size=_size(raw.get("size")),
            tags={_clean(str(key)): _clean(str(value)) for key, value in tags.items()},
            is_latest=bool(raw.get("is_latest")),
        )
        path = rel_path(f"{found.place}/{found.version}")
    except Exception:  # whatever others wrote there
        return None
    is_place = path_of(path) == (found.type_normalized, found.model_id, found.data_name, found.version)
    return found if is_place else None


_NOT_TEXT = ("version", "streaming", "size", "tags", "is_latest")
_FEWEST = 5  # data, a type, a model, a name, a version
_VERSION = re.compile("[1-9][0-9]{0,14}")
_MOST = 1 << 53


def _mapping(node: Any) -> dict[str, Any]:
    """Key → value, a node of YAML, of a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return {}
    return {_text(key): value for key, value in node.value if isinstance(key, yaml.ScalarNode)}


def _size(value: Any) -> int:
    try:
        size = int(value)
    except (ValueError, TypeError, OverflowError):
        return 0
    return size if 0 <= size < _MOST else 0


def _text(node: Any) -> str:
    """What was written; what is no scalar, or nothing, has no text."""
    if not isinstance(node, yaml.ScalarNode) or node.tag == _NULL:
        return ""
    return _clean(node.value)


def _clean(text: str) -> str:
    """As a database keeps it and finds it again: without lone surrogates and NUL."""
    return text.encode("utf-8", "replace").decode().replace("\0", "\N{REPLACEMENT CHARACTER}")
