"""The datastore of a repository, as the one-shot commands use it: provider, namespace, cache directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from swampfs.datastore.builtin import FILESYSTEM, provider_of
from swampfs.datastore.extensions import BrokenExtension, load_types
from swampfs.errors import HostileNameError, SettingsError
from swampfs.names import check_name
from swampfs.provider import DatastoreProvider
from swampfs.settings import (
    MARKER,
    Backend,
    Repo,
    Source,
    find_repo,
    read_repo,
    resolve_source,
    source_of_repo,
    user_data_dir,
)


class OpenDatastore(NamedTuple):
    """Everything a command needs to know; making it asks nothing of the network."""

    provider: DatastoreProvider
    type: str
    is_custom: bool
    namespace: str
    cache_path: Path
    lazy: bool
    repo: Repo | None
    broken: tuple[BrokenExtension, ...] = ()

    @property
    def is_directory(self) -> bool:
        """Used in place by everybody: there is nothing to synchronise."""
        return self.type == FILESYSTEM.type


def open_for_command(
    argument: str | None, env: Mapping[str, str], cwd: Path, *, namespace: str = "", cache: Path | None = None
) -> OpenDatastore:
    """From SOURCE (a URL, a repository, or nothing: the repository here). Raises SettingsError, DatastoreTypeError."""
    custom = _custom_repo(argument, env, cwd)
    if custom is not None:
        repo, kind = custom
        types = load_types(repo.directory)
        provider = types.create_provider(kind, repo.datastore.get("config") or {})
        own = provider.resolve_cache_path(str(repo.directory))
        return OpenDatastore(
            provider,
            kind,
            True,
            namespace or str(repo.datastore.get("namespace") or ""),
            cache or (Path(own) if own else _cache_of(repo, env)),
            repo.datastore.get("hydrationStrategy") == "lazy",
            repo,
            types.broken,
        )
    source, found = resolve_source(argument, env, cwd)
    if cache is None and found is None and source.backend is not Backend.FILESYSTEM:
        raise SettingsError(
            f"{source.url} is no repository, so it has no cache directory",
            remedy="pass --cache DIR, or run in the repo",
        )
    lazy = found is not None and found.datastore.get("hydrationStrategy") == "lazy"
    place = cache or (_cache_of(found, env) if found is not None else Path(source.directory or "."))
    broken = load_types(found.directory).broken if found is not None else ()
    return OpenDatastore(
        provider_of(source), type_of(source), False, namespace or source.namespace, place, lazy, found, broken
    )


def type_of(source: Source) -> str:
    names = {Backend.S3: "@swamp/s3-datastore", Backend.GCS: "@swamp/gcs-datastore", Backend.FILESYSTEM: "filesystem"}
    return names[source.backend]


def _cache_of(repo: Repo, env: Mapping[str, str]) -> Path:
    """Data model §1.3: shared by the clones of a repository on one machine, and with the swamp CLI."""
    name = repo.repo_id or "unknown"
    try:
        check_name(name)
    except HostileNameError:
        raise SettingsError(f"{repo.directory / MARKER}: repoId {name!r} is not an id", remedy="correct it") from None
    return user_data_dir(env) / "repos" / name


def _custom_repo(argument: str | None, env: Mapping[str, str], cwd: Path) -> tuple[Repo, str] | None:
    """The repository and its type, if that type is neither built in nor overridden by the environment."""
    if argument is not None and "://" in argument:
        return None
    repo = read_repo(Path(argument).absolute()) if argument is not None else find_repo(cwd)
    if repo is None or (argument is None and env.get("SWAMP_DATASTORE")):
        return None
    kind = str(repo.datastore.get("type", "filesystem"))
    try:
        source_of_repo(repo, env)
    except SettingsError:
        if kind in load_types(repo.directory).types and "/" in kind and not kind.startswith("@swamp/"):
            return repo, kind
        if kind.startswith("@") and not kind.startswith("@swamp/"):
            load_types(repo.directory).create_provider(kind, {})  # raises what is known about it
        raise
    return None
