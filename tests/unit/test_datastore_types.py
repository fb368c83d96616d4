"""Which datastore types there are: built in, of packages, of a repository."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from swampfs.datastore import create_provider, load_types
from swampfs.errors import DatastoreTypeError, SettingsError

GOOD = """
from pydantic import BaseModel
from swampfs.datastore import ObjectStoreProvider
from swampfs.provider import DatastoreType
from swampfs.testing.memory import MemoryStore

class Config(BaseModel):
    pass

datastore = DatastoreType({type!r}, "Memory", "Nothing stays", Config,
                          lambda config: ObjectStoreProvider(MemoryStore(), {type!r}, "memory"))
"""


@pytest.fixture
def repo(tmp_path):
    (tmp_path / "extensions/datastores").mkdir(parents=True)

    def add(name: str, text: str) -> None:
        (tmp_path / "extensions/datastores" / name).write_text(text)

    tmp_path_add = add
    return tmp_path, tmp_path_add


def test_the_built_in_types_are_always_there():
    assert set(load_types().types) >= {"@swamp/s3-datastore", "@swamp/gcs-datastore", "filesystem"}


def test_a_repositorys_extension_is_found_and_used(repo):
    path, add = repo
    add("memory.py", GOOD.format(type="@acme/memory"))
    add("_private.py", "raise RuntimeError('not loaded')")
    types = load_types(path)
    assert types.broken == ()
    assert types.create_provider("@acme/memory", {}).resolve_datastore_path("/repo") == "/repo/.swamp"
    assert create_provider("@acme/memory", {}, repo_dir=path)


def test_a_manifest_names_what_is_loaded(repo):
    path, add = repo
    add("one.py", GOOD.format(type="@acme/one"))
    add("two.py", "raise RuntimeError('not named, not loaded')")
    add("manifest.yaml", "datastores: [one.py, none.py]")
    types = load_types(path)
    assert "@acme/one" in types.types
    assert [broken.reason for broken in types.broken] == [
        f"DatastoreTypeError: {path}/extensions/datastores/none.py does not exist"
    ]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError"),
        ("raise SystemError('odd')", "SystemError: odd"),
        ("import sys; sys.exit(7)", "SystemExit: 7"),
        ("x = 1", "exports nothing named datastore"),
        ("datastore = object()", "has no type, name, description"),
        (GOOD.format(type="Bad Name"), "'Bad Name' is not a datastore type"),
        (GOOD.format(type="@swamp/memory"), "reserved"),
        (GOOD.format(type="@si/memory"), "reserved"),
        (GOOD.format(type="@acme/x") + "\ndatastore = datastore._replace(config_schema=dict)", "not a pydantic model"),
        (GOOD.format(type="@acme/x") + "\ndatastore = datastore._replace(create_provider=1)", "cannot be called"),
        (GOOD.format(type="@acme/x") + "\ndatastore = datastore._replace(name=1)", "must be text"),
    ],
)
def test_a_broken_extension_is_reported_and_does_not_disturb_the_others(repo, text, reason):
    path, add = repo
    add("broken.py", text)
    add("good.py", GOOD.format(type="@acme/good"))
    types = load_types(path)
    assert "@acme/good" in types.types
    assert len(types.broken) == 1
    assert types.broken[0].origin.endswith("broken.py")
    assert reason in types.broken[0].reason
    with pytest.raises(DatastoreTypeError, match=r"there is no datastore type '@acme/none' .*broken\.py"):
        types.create_provider("@acme/none", {})


@pytest.mark.parametrize("text", ["datastores: one.py", "[", "datastores: [1]", "- x"])
def test_a_bad_manifest_is_reported(repo, text):
    path, add = repo
    add("manifest.yaml", text)
    assert len(load_types(path).broken) == 1


def test_two_of_one_type_are_an_error(repo):
    path, add = repo
    add("a.py", GOOD.format(type="@acme/memory"))
    add("b.py", GOOD.format(type="@acme/memory"))
    with pytest.raises(DatastoreTypeError, match=r"@acme/memory is defined twice: .*a\.py and .*b\.py"):
        load_types(path)


def test_installed_packages_announce_theirs_as_entry_points(monkeypatch, repo):
    path, add = repo
    add("memory.py", GOOD.format(type="@acme/packaged"))
    monkeypatch.syspath_prepend(str(path / "extensions/datastores"))
    points = [
        EntryPoint("good", "memory:datastore", "swampfs.datastores"),
        EntryPoint("bad", "no_such_module:datastore", "swampfs.datastores"),
    ]
    monkeypatch.setattr("swampfs.datastore.extensions.entry_points", lambda group: points)
    types = load_types()
    assert "@acme/packaged" in types.types
    assert [broken.origin for broken in types.broken] == ["entry point bad of no_such_module:datastore"]


def test_a_bad_configuration_names_each_bad_field():
    with pytest.raises(SettingsError, match=r"@swamp/s3-datastore: pullConcurrency: .*; bucket: "):
        create_provider("@swamp/s3-datastore", {"bucket": "X", "pullConcurrency": 0})


def test_a_manifest_that_is_not_text_is_reported(repo):
    path, _ = repo
    (path / "extensions/datastores/manifest.yaml").write_bytes(b"\xff\xfe\x00")
    assert len(load_types(path).broken) == 1


def test_the_schema_of_an_extension_is_applied_and_its_failures_are_one_line(repo):
    path, add = repo
    text = GOOD.format(type="@acme/memory")
    text = text.replace("    pass", "    file: str").replace("lambda config: Obj", "lambda config: 1 / 0 or Obj")
    add("memory.py", text)
    with pytest.raises(SettingsError, match="@acme/memory: file: Field required"):
        create_provider("@acme/memory", {}, repo_dir=path)
    with pytest.raises(SettingsError, match="@acme/memory could not be set up: ZeroDivisionError: division by zero"):
        create_provider("@acme/memory", {"file": "x"}, repo_dir=path)
