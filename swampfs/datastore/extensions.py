"""Which datastore types there are: built-in, of installed packages, and of a repository.

Packages announce theirs as entry points of the group ``swampfs.datastores``. A repository has modules in
``extensions/datastores/``; with a ``manifest.yaml`` there, those its ``datastores:`` list names. Each exports one
:class:`~swampfs.provider.DatastoreType` (a module: under the name ``datastore``). A broken one is reported and the
others work; two of one type are an error.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from swampfs.datastore.builtin import BUILTIN
from swampfs.errors import DatastoreTypeError, SettingsError, SwampfsError
from swampfs.provider import RESERVED_COLLECTIVES, DatastoreProvider, DatastoreType, check_type_name
from swampfs.schemas import validate

GROUP = "swampfs.datastores"
DIRECTORY = Path("extensions") / "datastores"
MANIFEST = "manifest.yaml"
EXPORT = "datastore"


class BrokenExtension(NamedTuple):
    """An extension that could not be used, and why."""

    origin: str
    reason: str


class DatastoreTypes(NamedTuple):
    """Everything that was found."""

    types: Mapping[str, DatastoreType]
    broken: tuple[BrokenExtension, ...] = ()

    def create_provider(self, type_name: str, config: Mapping[str, Any]) -> DatastoreProvider:
        """Raises DatastoreTypeError for a type that is not there, SettingsError for a bad configuration."""
        found = self.types.get(type_name)
        if found is not None:
            validate(found.config_schema, dict(config), type_name)
            try:
                return found.create_provider(config)
            except SwampfsError:
                raise
            except Exception as error:  # a stranger's code: its words, in one line
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                raise SettingsError(f"{type_name} could not be set up: {reason}") from error
        reasons = "; ".join(f"{broken.origin}: {broken.reason}" for broken in self.broken)
        raise DatastoreTypeError(
            f"there is no datastore type {type_name!r}" + (f" (not loaded: {reasons})" if reasons else ""),
            remedy=f"known are {', '.join(sorted(self.types))}",
        )


def load_types(repo_dir: str | Path | None = None) -> DatastoreTypes:
    """Find all types. Raises DatastoreTypeError if two have the same name."""
    types = {builtin.type: builtin for builtin in BUILTIN}
    origins = dict.fromkeys(types, "built in")
    broken: list[BrokenExtension] = []
    for origin, load in _sources(Path(repo_dir) if repo_dir is not None else None, broken):
        try:
            found = check_export(load())
        except (Exception, SystemExit) as error:  # whatever a stranger's module does must not stop the others
            broken.append(BrokenExtension(origin, f"{type(error).__name__}: {error}"))
            continue
        if found.type in types:
            raise DatastoreTypeError(
                f"datastore type {found.type} is defined twice: {origins[found.type]} and {origin}",
                remedy="remove or rename one of them",
            )
        types[found.type], origins[found.type] = found, origin
    return DatastoreTypes(types, tuple(broken))


def check_export(found: object) -> DatastoreType:
    """An exported object that is what the contract asks for. Raises DatastoreTypeError."""
    missing = [name for name in DatastoreType._fields if not hasattr(found, name)]
    if missing:
        raise DatastoreTypeError(f"the exported {type(found).__name__} has no {', '.join(missing)}")
    export = DatastoreType(*(getattr(found, name) for name in DatastoreType._fields))
    if not all(isinstance(text, str) for text in (export.type, export.name, export.description)):
        raise DatastoreTypeError("type, name and description must be text")
    check_type_name(export.type)
    if export.type.lstrip("@").partition("/")[0] in RESERVED_COLLECTIVES:
        raise DatastoreTypeError(f"the collective of {export.type} is reserved", remedy="use your own")
    if not (isinstance(export.config_schema, type) and issubclass(export.config_schema, BaseModel)):
        raise DatastoreTypeError(f"config_schema of {export.type} is not a pydantic model")
    if not callable(export.create_provider):
        raise DatastoreTypeError(f"create_provider of {export.type} cannot be called")
    return export


def _sources(repo: Path | None, broken: list[BrokenExtension]) -> Iterator[tuple[str, Any]]:
    for point in entry_points(group=GROUP):
        yield f"entry point {point.name} of {point.value}", point.load
    if repo is not None:
        for path in _modules(repo / DIRECTORY, broken):
            yield str(path), lambda path=path: _load_module(path)


def _modules(directory: Path, broken: list[BrokenExtension]) -> list[Path]:
    manifest = directory / MANIFEST
    if not manifest.exists():
        return sorted(path for path in directory.glob("*.py") if not path.name.startswith("_"))
    try:
        named = (yaml.safe_load(manifest.read_text(encoding="utf-8")) or {}).get("datastores", [])
        if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
            raise DatastoreTypeError("datastores must be a list of file names")
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError, DatastoreTypeError) as error:
        broken.append(BrokenExtension(str(manifest), " ".join(str(error).split())))
        return []
    return [directory / name for name in named]


def _load_module(path: Path) -> object:
    if not path.is_file():
        raise DatastoreTypeError(f"{path} does not exist")
    name = f"swampfs_extension_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as the import system does: dataclasses and pydantic look there
    spec.loader.exec_module(module)
    if not hasattr(module, EXPORT):
        raise DatastoreTypeError(f"it exports nothing named {EXPORT}")
    return getattr(module, EXPORT)
