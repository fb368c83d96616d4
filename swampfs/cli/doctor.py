"""``swampfs doctor``: this machine, the datastore, its index, and what is kept here. Mends what can be mended."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from swampfs.cli import environment, progress
from swampfs.cli.sync import json_option, lock_options, locked, namespace_option, patiently, repo_dir, source_argument
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.repository import OpenDatastore, open_for_command
from swampfs.errors import AccessDeniedError, DatastoreTypeError, SettingsError, SwampfsError
from swampfs.records import IndexMode
from swampfs.sync.examine import IndexReport
from swampfs.threads import Lane, Threads

_SHOWN = 5
_HONOURED = "conditional writes are honoured"
_SKEW_S = 5
_WHY = "the swamp CLI judges locks by it, and from 15 minutes on requests are refused"


@click.command()
@source_argument
@click.option("--repair", is_flag=True, help="Mend what can be mended: index shards, foreign objects, dead mounts.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Write what somebody who helps has to know into FILE.")
@namespace_option
@json_option
def doctor(source: str | None, repair: bool, bundle: Path | None, namespace: str, as_json: bool) -> None:
    """Examine environment, datastore, index and cache. Exit code 1 if something is wrong.

    \b
    Example: swampfs doctor ~/repo
    """
    try:
        datastore = _open_for_doctor(source, namespace)
        examine = partial(patiently, datastore, "examination", partial(_examine, datastore, repair))
        answer = progress.run("doctor", examine, as_json=as_json)
    except (SettingsError, DatastoreTypeError) as error:
        answer = _answer(
            "unknown", False, [*environment.examine(), environment.finding("settings", error.line(), passed=False)]
        )
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        for finding in answer["healthFindings"]:
            click.echo(f"{'ok  ' if finding['passed'] else 'FAIL'}  {finding['check']:12} {finding['message']}")
            if "repair" in finding and not repair:
                click.echo(f"                   --repair {finding['repair']}")
        for line in answer["repairs"]:
            click.echo(f"      repaired     {line}")
    if bundle is not None:
        from swampfs.cli import bundle as bundles

        names = bundles.write(bundle, answer)
        click.echo(f"{bundle} has {', '.join(names)}; secrets are left out, names of files are not", err=True)
    sys.exit(0 if answer["overallStatus"] == "pass" else 1)


async def _examine(datastore: OpenDatastore, repair: bool) -> dict[str, Any]:
    repairs = environment.repair() if repair else []
    here = await Threads().read(Lane.DISK, environment.examine)
    findings = [*here, *_extensions(datastore)]
    health = await datastore.provider.create_verifier().verify()
    findings.append(environment.finding("health", health.message, passed=health.healthy))
    contamination = None
    provider = datastore.provider
    if health.healthy and isinstance(provider, ObjectStoreProvider) and not datastore.is_directory:
        findings.append(writing := await _conditional(provider, datastore.namespace))
        if writing["message"] == _HONOURED:
            findings.append(await _clock(provider, datastore.namespace))
        try:
            report = await provider.examine_index(datastore.namespace)
            if repair and not report.sound and report.mode is IndexMode.SHARDS:
                shards = await provider.migrate_index(datastore.namespace, lock_options(datastore))
                repairs.append(f"index rebuilt from the objects: {len(shards.partitions)} shards")
                report = await provider.examine_index(datastore.namespace)
            findings += [_of_index(report), *_of_paths(report)]
        except SwampfsError as error:
            findings.append(environment.finding("index", error.line(), passed=False))
        if datastore.namespace and str(datastore.cache_path) != os.devnull:
            contamination = await _contamination(datastore, repairs, repair=repair)
            if contamination is not None:
                findings.append(
                    environment.finding(
                        "namespace", f"objects of {contamination} inside it", passed=False, repair="removes them"
                    )
                )
    findings.extend(_caches(datastore))
    return {
        **_answer(datastore.type, datastore.is_custom, findings),
        "contaminationFinding": contamination,
        "repairs": repairs,
    }


def _open_for_doctor(source: str | None, namespace: str) -> OpenDatastore:
    """With the repository's cache if there is a repository, else without one."""
    try:
        return open_for_command(source, os.environ, Path.cwd(), namespace=namespace)
    except SettingsError as error:
        if "--cache" not in error.remedy:
            raise
        return open_for_command(source, os.environ, Path.cwd(), namespace=namespace, cache=Path(os.devnull))


def _answer(kind: str, is_custom: bool, findings: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "overallStatus": "pass" if all(finding["passed"] for finding in findings) else "fail",
        "datastoreType": kind,
        "isCustom": is_custom,
        "healthFindings": findings,
        "contaminationFinding": None,
        "repairs": [],
    }


def _extensions(datastore: OpenDatastore) -> list[dict[str, Any]]:
    return [
        environment.finding("extension", f"{broken.origin}: {broken.reason}", passed=False)
        for broken in datastore.broken
    ]


async def _conditional(provider: ObjectStoreProvider, namespace: str) -> dict[str, Any]:
    """Whether two writers can be kept apart."""
    try:
        await provider.prove_preconditions(namespace)
    except AccessDeniedError:
        return environment.finding("writing", "these credentials may only read: mount it --read-only", passed=True)
    except SwampfsError as error:
        return environment.finding("writing", error.line(), passed=False)
    return environment.finding("writing", _HONOURED, passed=True)


async def _clock(provider: ObjectStoreProvider, namespace: str) -> dict[str, Any]:
    try:
        skew = await provider.measure_clock(namespace)
    except SwampfsError as error:
        return environment.finding("clock", error.line(), passed=False)
    if skew is None:
        return environment.finding("clock", "the datastore tells no times to compare it with", passed=True)
    if skew.at_least_s < _SKEW_S:
        return environment.finding("clock", f"within {_SKEW_S} s of the datastore's", passed=True)
    where = "ahead of" if skew.ahead_s > 0 else "behind"
    text = f"this machine is {abs(skew.ahead_s):.0f} s {where} the datastore"
    return environment.finding("clock", f"{text}: set its clock (`timedatectl set-ntp true`); {_WHY}", passed=False)


def _of_paths(report: IndexReport) -> list[dict[str, Any]]:
    if not report.homeless:
        return []
    named = ", ".join(report.homeless[:_SHOWN])
    is_divided = report.mode is IndexMode.SHARDS
    what = "other writers may drop them: better move them" if is_divided else "`migrate-index` would refuse them"
    text = f"{len(report.homeless)} belong to no shard ({named}): {what}"
    return [environment.finding("paths", text, passed=not is_divided)]


def _of_index(report: IndexReport) -> dict[str, Any]:
    is_mendable = not report.sound and report.mode is IndexMode.SHARDS
    repair = "rebuilds the shards from the objects" if is_mendable else ""
    return environment.finding("index", _index_text(report), passed=report.sound, repair=repair)


def _index_text(report: IndexReport) -> str:
    text = f"{report.mode.value}, {report.entries} entries"
    if report.mode is IndexMode.SHARDS:
        text += f", commit {report.commit_seq}"
    for paths, what in (
        (report.broken, "document(s) missing or unreadable"),
        (report.dangling, "entries without an object"),
        (report.differing, "objects of another size"),
        (report.unlisted, "objects without an entry"),
        (report.stray, "shards that nothing lists"),
    ):
        if paths:
            text += f"; {len(paths)} {what}, such as {', '.join(paths[:_SHOWN])}"
    return text + (f"; {report.skipped} unusable entries" if report.skipped else "")


async def _contamination(datastore: OpenDatastore, repairs: list[str], *, repair: bool) -> str | None:
    service = datastore.provider.create_sync_service(repo_dir(datastore), str(datastore.cache_path))
    look = partial(service.repair_namespace_contamination, namespace=datastore.namespace)
    report = await look(dry_run=True)
    if repair and report.total_foreign_objects:
        done = await locked(datastore, partial(look, dry_run=False))
        repairs.append(f"{done.deleted} foreign object(s) removed")
        report = await look(dry_run=True)
    names = ", ".join(f"{found.namespace} ({found.object_count})" for found in report.foreign_namespaces)
    return names or None


def _caches(datastore: OpenDatastore) -> list[dict[str, Any]]:
    cache = datastore.cache_path
    kept = cache / "_index" / "conflicts"
    if datastore.is_directory or not cache.is_dir():
        return []
    count = len(os.listdir(kept)) if kept.is_dir() else 0
    sidecar = cache / ".datastore-sync-state.json"
    try:
        dirty = json.loads(sidecar.read_text()).get("localDirty") if sidecar.exists() else False
    except (OSError, ValueError, AttributeError):
        return [
            environment.finding("cache", f"{sidecar} cannot be read: the next push looks at every file", passed=False)
        ]
    text = f"{cache}: {'work to push' if dirty else 'nothing to push'}"
    if count:
        text += f"; {count} content(s) kept in {kept} because another machine won"
    return [environment.finding("cache", text, passed=True)]
