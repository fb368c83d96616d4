"""Artifacts without a datastore: for questions asked of the catalog alone."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

from swampfs.state.artifacts import Artifact, Artifacts, Document

STATES = ("running", "stopped", "gone")


def artifacts(names: int, versions: int, *, seed: int = 1) -> Iterator[Artifact]:
    """The same for the same arguments; five names of each model."""
    chance = random.Random(seed)
    for number in range(names):
        model = number // 5
        for version in range(1, versions + 1):
            yield Artifact(
                namespace="",
                type_normalized=f"type/{model % 7}",
                model_id=f"id-{model:05}",
                data_name=f"name-{number % 5}",
                uuid=f"{number:08}-{version}",
                version=version,
                model_name=f"model-{model}",
                spec_name=("vpc", "subnet", "host")[number % 3],
                data_type=("resource", "report")[number % 10 == 0],
                content_type="application/json",
                lifetime="infinite",
                owner_type="model-method",
                streaming=number % 20 == 0,
                size=chance.randrange(100_000),
                created_at=f"2026-0{1 + version % 9}-{1 + number % 28:02}T00:00:00.000Z",
                tags={
                    "type": "resource", "modelName": f"model-{model}", "specName": "x",
                    "env": "prod" if number % 50 else "lab",
                    **({"run": str(number % 1000)} if number % 2 else {}),
                },
                owner_ref=f"id-{model:05}",
                workflow_run_id=f"run-{number % 300}" if number % 3 == 0 else "",
                workflow_name="nightly" if number % 3 == 0 else "",
                job_name="",
                step_name="",
                source="",
                is_latest=version == versions,
            )  # fmt: skip


def content_of(artifact: Artifact) -> bytes | None:
    """Of two thirds of them; the rest is not on this machine."""
    at = artifact.size % 3
    return None if at == 0 else json.dumps({"state": STATES[at], "count": artifact.version}).encode()


def database(path: Path, found: Sequence[Artifact]) -> Artifacts:
    made = Artifacts(str(path))
    with made.transaction():
        for place, versions in groupby(found, lambda one: one.place):
            made.put("", place, [Document(f"{place}/{one.version}", "x", one) for one in versions])
    return made
