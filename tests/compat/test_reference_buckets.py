"""Each bucket the existing extensions wrote mounts, and shows exactly its files, read lazily."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from swampfs.names import is_internal
from tests.harness import FIXTURES, tree

pytestmark = pytest.mark.compat


def scenarios() -> list[tuple[str, str]]:
    """(scenario, namespace) of every fixture that has a bucket."""
    found = []
    for objects in sorted(FIXTURES.glob("**/objects.json")):
        bucket = objects.parent / "bucket"
        if not bucket.is_dir():
            continue
        name = str(objects.parent.relative_to(FIXTURES))
        namespaces = [path.parent.name for path in bucket.glob("*/.namespace.json")]
        found += [(name, namespace) for namespace in sorted(namespaces) or [""]]
    return found


def expected(scenario: Path, namespace: str) -> dict[str, str]:
    """Path → sha256 of what a user must see: every object but the internal ones, and what the index leaves out."""
    prefix = f"{namespace}/" if namespace else ""
    found = {}
    for item in json.loads((scenario / "objects.json").read_text()):
        rel = item["key"].removeprefix(prefix)
        # `exportCatalog` writes its object beside the index (spec §1.9): it is a file only where the index says so.
        unindexed_export = rel == ".catalog-export.json" and not _indexed(scenario / "bucket" / namespace, rel)
        foreign = not namespace and item["key"].split("/")[0] in ("infra", "security")
        if item["key"].startswith(prefix) and not is_internal(rel) and not unindexed_export and not foreign:
            found[rel] = item["sha256"]
    return found


def _indexed(root: Path, rel: str) -> bool:
    indexes = [*root.glob("_index/*.json"), root / ".datastore-index.json"]
    return any(rel in json.loads(path.read_text()).get("entries", {}) for path in indexes if path.exists())


@pytest.mark.parametrize(("name", "namespace"), scenarios() or [("none", "")])
def test_a_reference_bucket_shows_exactly_its_files(reference, name, namespace, bucket, fleet):
    scenario = reference / name
    bucket.load(scenario / "bucket")
    machine = fleet.machine(env=bucket.env)
    machine.mount(bucket.url, "--prefetch", "off", *(["--namespace", namespace] if namespace else []))

    want = expected(scenario, namespace)
    shown = {str(Path(d, n).relative_to(machine.path)) for d, _, names in os.walk(machine.path) for n in names}
    assert shown == set(want)
    assert [r for r in machine.requests() if r["op"] == "download"] == []  # looking fetched nothing

    some = sorted(want)[::7]
    for rel in some:
        (machine.path / rel).read_bytes()
    downloads = {r["key"] for r in machine.requests() if r["op"] == "download"}
    ns = f"{namespace}/" if namespace else ""
    assert downloads == {f"{bucket.prefix}/{ns}{rel}" for rel in some}  # only the files read were fetched

    assert tree(machine.path) == want
    machine.umount()


def test_the_repository_of_the_real_cli_mounts_as_a_directory_datastore(reference, fleet, store_dir):
    import shutil

    source = reference / "cli-repo" / "repo" / ".swamp"
    for path in source.iterdir():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, store_dir / path.name)
    machine = fleet.machine()
    machine.mount(f"file://{store_dir}")
    assert tree(machine.path) == {rel: digest for rel, digest in tree(source).items() if not is_internal(rel)}
    machine.umount()
