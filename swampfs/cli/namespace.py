"""``swampfs namespace``: several repositories in one datastore, each below a name of its own."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from swampfs.cli import progress
from swampfs.cli.sync import lock_options
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.repository import OpenDatastore, open_for_command
from swampfs.errors import NamespaceError, SettingsError, UsageError
from swampfs.names import check_namespace
from swampfs.settings import Repo, write_namespace

_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")
_source = click.option("--source", help="A repository or, for list, a URL; default: the repository here.")


@click.group()
def namespace() -> None:
    """The namespaces of a datastore."""


@namespace.command("list")
@_json
@_source
def list_namespaces(source: str | None, as_json: bool) -> None:
    """List the registered namespaces and their owners.

    \b
    Example: swampfs namespace list --source s3://ops-runtime/team
    """
    datastore = _open(source)
    manifests = trio.run(_provider(datastore).namespace_manifests)
    found = [
        {
            "namespace": one.namespace,
            "repoId": one.repo_id,
            "registeredAt": one.registered_at,
            "isCurrent": one.namespace == datastore.namespace,
        }
        for one in manifests
    ]
    answer: dict[str, Any] = {"namespaces": found}
    if datastore.namespace:
        answer["currentNamespace"] = datastore.namespace
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for one in found:
        click.echo(f"{'*' if one['isCurrent'] else ' '} {one['namespace']:20} repo {one['repoId']}")
    if not found:
        click.echo("no namespaces")


@namespace.command("set")
@click.argument("slug")
@_json
@_source
def set_namespace(source: str | None, slug: str, as_json: bool) -> None:
    """Register a name for this repository and write it into its .swamp.yaml. Moves nothing.

    \b
    Example: swampfs namespace set infra
    """
    check_namespace(slug)
    datastore = _open(source)
    repo = _repo(datastore)
    if not repo.repo_id:
        raise SettingsError(f"{repo.directory} has no repoId", remedy="`swamp init` writes one")
    trio.run(datastore.provider.register_namespace, slug, repo.repo_id)
    write_namespace(repo, slug)
    warning = "files outside of the namespace are not seen any more; `swampfs namespace migrate` moves them into it"
    place = datastore.provider.resolve_datastore_path(str(repo.directory))
    answer = {"namespace": slug, "datastorePath": place, "warning": warning}
    click.echo(json.dumps(answer, indent=2) if as_json else f"namespace {slug} is set; {warning}")


@namespace.command("unset")
@_json
@_source
def unset_namespace(source: str | None, as_json: bool) -> None:
    """Take the name out of the .swamp.yaml. Moves nothing; refused while the datastore has other namespaces.

    \b
    Example: swampfs namespace migrate --reverse -y && swampfs namespace unset
    """
    datastore = _open(source)
    repo = _repo(datastore)
    if not datastore.namespace:
        raise UsageError(f"{repo.directory} has no namespace")
    others = [name for name in trio.run(datastore.provider.list_namespaces) if name != datastore.namespace]
    if others:
        raise NamespaceError(
            f"the datastore has other namespaces: {', '.join(others)}",
            remedy="outside of a namespace your files would lie among theirs",
        )
    write_namespace(repo, None)
    answer = {"previousNamespace": datastore.namespace}
    click.echo(json.dumps(answer) if as_json else f"namespace {datastore.namespace} is not used any more")


@namespace.command()
@click.option("--reverse", is_flag=True, help="Out of the namespace, to the root.")
@click.option("-y", "--yes", "--confirm", "confirmed", is_flag=True, help="Do it; without this it is only shown.")
@_json
@_source
def migrate(source: str | None, reverse: bool, confirmed: bool, as_json: bool) -> None:
    """Move this repository's files into its namespace. Waits for every writer of both places.

    Only swamp's own directories are moved. Nothing is removed before all of it is in place.

    \b
    Example: swampfs namespace migrate -y
    """
    datastore = _open(source)
    if not datastore.namespace:
        raise UsageError("the repository has no namespace", remedy="`swampfs namespace set NAME` gives it one")
    provider = _provider(datastore)
    moving = partial(
        provider.migrate_namespace,
        datastore.namespace,
        lock_options(datastore),
        reverse=reverse,
        preview=not confirmed,
    )
    moved = progress.run("migrate", moving, as_json=as_json)
    ends = ("", f"{datastore.namespace}/")
    old, new = reversed(ends) if reverse else ends
    answer: dict[str, Any] = {
        "namespace": datastore.namespace,
        "datastorePath": provider.resolve_datastore_path(os.getcwd()),
        "reverse": reverse,
        "confirm": confirmed,
        "directories": [
            {"subdir": top, "source": old + top, "destination": new + top, "fileCount": files, "totalBytes": size}
            for top, (files, size) in sorted(moved.directories.items())
        ],
        "totalFiles": moved.files,
        "totalBytes": moved.bytes,
        "isExtensionDatastore": not datastore.is_directory,
    }
    if confirmed:
        answer["migratedDirectories"] = len(moved.directories)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    for one in answer["directories"]:
        click.echo(f"{one['source']} → {one['destination']}: {one['fileCount']} files, {one['totalBytes']} bytes")
    click.echo("moved" if confirmed else "nothing was moved yet: add -y to do it")


def _open(source: str | None) -> OpenDatastore:
    return open_for_command(source, os.environ, Path.cwd(), cache=Path(os.devnull))


def _provider(datastore: OpenDatastore) -> ObjectStoreProvider:
    if not isinstance(datastore.provider, ObjectStoreProvider):
        raise UsageError(f"the datastore type {datastore.type} has no such operation")
    return datastore.provider


def _repo(datastore: OpenDatastore) -> Repo:
    if datastore.repo is None:
        raise UsageError("this needs a repository", remedy="run it in one, or pass --source REPOSITORY")
    return datastore.repo
