"""The worked example of docs/adding-a-backend.md, taken from the page and put where a repository has it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from swampfs.datastore import load_types
from swampfs.testing.conformance import DatastoreSuite, assert_datastore_export_conformance
from swampfs.testing.stores import ObjectStoreSuite

PAGE = (Path(__file__).resolve().parents[2] / "docs/adding-a-backend.md").read_text()
EXAMPLE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0]


@pytest.fixture
def example(tmp_path):
    """The example as found in a repository."""
    directory = tmp_path / "repo/extensions/datastores"
    directory.mkdir(parents=True)
    (directory / "sqlite.py").write_text(EXAMPLE)
    return load_types(tmp_path / "repo").types["@example/sqlite-datastore"]


def test_the_example_is_short_and_conforms(example, tmp_path):
    assert len(EXAMPLE.splitlines()) < 120
    assert_datastore_export_conformance(
        example, valid_configs=[{"file": str(tmp_path / "x.db")}], invalid_configs=[{}, {"file": 7}]
    )


class TestExampleStore(ObjectStoreSuite):
    @pytest.fixture
    def store(self, example, tmp_path):
        return example.create_provider({"file": str(tmp_path / "store.db")})._remote.store


class TestExampleDatastore(DatastoreSuite):
    @pytest.fixture
    def make_provider(self, example, tmp_path):
        return lambda: example.create_provider({"file": str(tmp_path / "store.db")})
