"""A small datastore as swamp writes it (data model §2–3): for the quick start and for tests without fixtures."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path

import yaml

_TYPES = ("aws/ec2/vpc", "@acme/net/subnet", "docker/host")
_CREATED = "2026-03-14T09:26:54.001Z"
_SPACE = uuid.UUID("6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a20")


def sample_files(*, models: int = 3, names: int = 2, versions: int = 2) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file: versions with metadata, ``latest`` markers, one output and one run per model.

    The same arguments give the same bytes.
    """
    for number in range(models):
        kind = _TYPES[number % len(_TYPES)]
        model = str(uuid.uuid5(_SPACE, f"model {number}"))
        for name in (f"item-{i}" for i in range(names)):
            top = f"data/{kind}/{model}/{name}"
            for version in range(1, versions + 1):
                raw = json.dumps({"model": number, "name": name, "version": version, "state": "running"}).encode()
                yield f"{top}/{version}/metadata.yaml", _metadata(model, name, version, raw)
                yield f"{top}/{version}/raw", raw
            yield f"{top}/latest", str(versions).encode()
        output = {"id": str(uuid.uuid5(_SPACE, f"out {number}")), "definitionId": model, "status": "succeeded"}
        yield f"outputs/{kind}/sync/{model}-2026-03-14T09-26-53-589Z.yaml", yaml.safe_dump(output).encode()
    workflow = str(uuid.uuid5(_SPACE, "workflow"))
    run = str(uuid.uuid5(_SPACE, "run"))
    record = {"id": run, "workflowId": workflow, "workflowName": "nightly", "status": "succeeded", "tags": {}}
    yield f"workflow-runs/{workflow}/workflow-run-{run}.yaml", yaml.safe_dump(record).encode()


def write_sample(directory: Path, *, models: int = 3, names: int = 2, versions: int = 2) -> int:
    """Write :func:`sample_files` below a directory; returns how many there are."""
    count = 0
    for count, (rel, body) in enumerate(sample_files(models=models, names=names, versions=versions), 1):  # noqa: B007
        path = directory / rel
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(body)
    return count


def _metadata(model: str, name: str, version: int, raw: bytes) -> bytes:
    fields = {
        "id": str(uuid.uuid5(_SPACE, f"{model} {name} {version}")),
        "name": name,
        "version": version,
        "contentType": "application/json",
        "lifetime": "infinite",
        "garbageCollection": 10,
        "streaming": False,
        "tags": {"type": "resource", "specName": "item", "modelName": f"model-{model[:4]}"},
        "ownerDefinition": {"ownerType": "model-method", "ownerRef": model},
        "createdAt": _CREATED,
        "size": len(raw),
        "checksum": hashlib.sha256(raw).hexdigest(),
    }
    return yaml.safe_dump(fields, sort_keys=False).encode()
