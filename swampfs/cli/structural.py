"""``swampfs gc``, ``prune`` and ``delete``: removal on the datastore itself, while nobody writes."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import click

from swampfs.cli import progress
from swampfs.cli.locks import model_reference
from swampfs.cli.sync import lock_options
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.repository import OpenDatastore, open_for_command
from swampfs.errors import SettingsError, UsageError
from swampfs.settings import Repo
from swampfs.sync.garbage import Plan, carry_out, definition_id, plan_delete, plan_gc, plan_prune
from swampfs.sync.surgery import Surgery

_SHOWN = 10


class _How(NamedTuple):
    as_json: bool
    confirmed: bool
    dry_run: bool


MakePlan = Callable[[Surgery], Awaitable[Plan]]


def _options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option("--source", help="A URL or a repository; default: the repository here."),
        click.option("--namespace", default="", help="Instead of the repository's own."),
        click.option("--json", "as_json", is_flag=True, help="As JSON; never asks."),
        click.option("-y", "--yes", is_flag=True, help="Do not ask."),
        click.option("--dry-run", is_flag=True, help="Only show what would be removed; takes no lock."),
    ):
        command = option(command)
    return command


@click.command()
@_options
def gc(source: str | None, namespace: str, as_json: bool, yes: bool, dry_run: bool) -> None:
    """Remove what has outlived its lifetime, and versions beyond each name's policy.

    \b
    Example: swampfs gc --dry-run
    """

    def answer(plan: Plan) -> dict[str, Any]:
        return {
            "dataEntriesExpired": len(plan.expired),
            "versionsDeleted": plan.versions,
            "bytesReclaimed": plan.bytes,
            "dryRun": dry_run,
            "expiredEntries": [
                {"type": d.model.type, "modelId": d.model.id, "dataName": d.name, "reason": reason}
                for d, reason in plan.expired
            ],
            "walPagesTotal": 0,
            "walPagesCheckpointed": 0,
        }

    datastore = _open(source, namespace)
    _do(datastore, lambda surgery: plan_gc(surgery, datetime.now(UTC)), answer, _How(as_json, yes or as_json, dry_run))


@click.command()
@_options
def prune(source: str | None, namespace: str, as_json: bool, yes: bool, dry_run: bool) -> None:
    """Remove the data of models whose definition is gone, from this repository and from the datastore.

    \b
    Example: swampfs prune --dry-run
    """
    datastore = _open(source, namespace)
    live = _definitions(datastore)

    def answer(plan: Plan) -> dict[str, Any]:
        models: dict[Any, list[Any]] = {}
        for data, _ in plan.expired:
            models.setdefault(data.model, []).append(data)
        return {
            "modelsReclaimed": len(models),
            "dataEntriesReclaimed": len(plan.expired),
            "versionsDeleted": plan.versions,
            "bytesReclaimed": plan.bytes,
            "dryRun": dry_run,
            "reclaimedModels": [
                {
                    "type": model.type,
                    "modelId": model.id,
                    "dataNames": [data.name for data in names],
                    "versionCount": sum(len(data.versions) for data in names),
                    "bytesReclaimed": sum(entry.size for data in names for entry in data.files()),
                }
                for model, names in models.items()
            ],
            "walPagesTotal": 0,
            "walPagesCheckpointed": 0,
        }

    _do(datastore, lambda surgery: plan_prune(surgery, live), answer, _How(as_json, yes or as_json, dry_run))


@click.command()
@click.argument("model")
@click.argument("name", required=False)
@click.option("--version", type=int, help="Only this version.")
@_options
def delete(
    model: str,
    name: str | None,
    version: int | None,
    source: str | None,
    namespace: str,
    **flags: bool,
) -> None:
    """Remove the data of a model (TYPE/ID), one name of it, or one version of that.

    \b
    Example: swampfs delete aws/ec2/vpc/6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a20 vpc-main --version 3
    """
    reference = model_reference(model)
    if version is not None and name is None:
        raise UsageError("--version needs the NAME it is a version of")
    dry_run = flags["dry_run"]

    def answer(plan: Plan) -> dict[str, Any]:
        common = {"modelId": reference.id, "modelName": None, "modelType": reference.type}
        if name is not None:
            more = {"version": version} if version is not None else {}
            return {**common, "dataName": name, **more, "versionsDeleted": plan.versions, "dryRun": dry_run}
        totals = {"totalDeleted": len(plan.expired), "totalVersionsDeleted": plan.versions}
        return {**common, **totals, "failed": [], "dryRun": dry_run}

    datastore = _open(source, namespace)
    how = _How(flags["as_json"], flags["yes"] or flags["as_json"], dry_run)
    _do(datastore, lambda surgery: plan_delete(surgery, reference, name, version), answer, how)


def _do(datastore: OpenDatastore, make_plan: MakePlan, answer: Callable[[Plan], dict[str, Any]], how: _How) -> None:
    """Plan, ask, plan again under the lock (others may have written meanwhile), carry out."""
    provider = datastore.provider
    if not isinstance(provider, ObjectStoreProvider):
        raise UsageError(f"the datastore type {datastore.type} has no such operation")
    surgery = provider.surgery(datastore.namespace)
    what = click.get_current_context().info_name or ""
    if how.dry_run or not how.confirmed:
        plan = progress.run(what, make_plan, surgery, as_json=how.as_json)
        _print(answer(plan), plan, as_json=how.as_json, done=False)
        if how.dry_run:
            return
        if not plan.deletes or not click.confirm("remove that?"):
            click.echo("nothing was removed")
            return

    async def work() -> Plan:
        found = await make_plan(surgery)
        await carry_out(surgery, found)
        return found

    async def run() -> Plan:
        return await provider.structurally(datastore.namespace, lock_options(datastore), work)

    plan = progress.run(what, run, as_json=how.as_json)
    _print(answer(plan), plan, as_json=how.as_json, done=True)


def _print(answer: dict[str, Any], plan: Plan, *, as_json: bool, done: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    verb = "removed" if done else "would be removed"
    for data, reason in plan.expired[:_SHOWN]:
        click.echo(f"{data.path}: {reason}")
    for path, count in list(plan.by_name.items())[:_SHOWN]:
        click.echo(f"{path}: {count} version(s)")
    for path in plan.unreadable[:_SHOWN]:
        click.echo(f"{path}: left alone, its metadata cannot be read")
    click.echo(f"{verb}: {len(plan.expired)} name(s), {plan.versions} version(s), {plan.bytes} bytes")


def _definitions(datastore: OpenDatastore) -> set[str]:
    """Ids of the repository's model definitions. Raises SettingsError where they cannot be known."""
    repo: Repo | None = datastore.repo
    if repo is None:
        raise UsageError("prune needs the repository, for its definitions", remedy="run it there")
    directory = repo.directory / repo.models_dir
    if not directory.is_dir():
        raise SettingsError(f"{directory} does not exist, so no definition can be told from a missing one")
    files = [path for path in directory.rglob("*") if path.suffix in (".yaml", ".yml")]
    return {definition_id(path.read_bytes(), str(path)) for path in files}


def _open(source: str | None, namespace: str) -> OpenDatastore:
    return open_for_command(source, os.environ, Path.cwd(), namespace=namespace, cache=Path(os.devnull))
