"""Commands without a mount: ``sync``, ``migrate-index``, ``doctor``. Beside a mount, ``sync`` goes through it."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from swampfs import registry
from swampfs.cli import environment, progress
from swampfs.cli.words import FILE_NAME
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.repository import OpenDatastore, open_for_command
from swampfs.errors import (
    AccessDeniedError,
    DatastoreTypeError,
    NotMountedError,
    SettingsError,
    SwampfsError,
    SyncNotSupportedError,
    SyncTimeoutError,
)
from swampfs.names import Keyspace
from swampfs.provider import AbortSignal, DatastoreSyncService, LockOptions
from swampfs.records import IndexMode
from swampfs.sync.examine import IndexReport

_DEFAULT_TIMEOUT_S = 300.0
_MOUNT_ANSWER_S = 30.0
_LONGEST_S = 21_600.0
_TOO_SLOW = "too slow"
_INTERRUPTED = "interrupted"
_SHOWN = 5

_source = click.argument("source", type=FILE_NAME, required=False)
_namespace = click.option("--namespace", envvar="SWAMPFS_NAMESPACE", default="", help="Bind one namespace.")
_json = click.option("--json", "as_json", is_flag=True, help="Every field, as JSON.")
_cache = click.option("--cache", type=click.Path(path_type=Path), help="Cache directory.  [default: the repository's]")


@click.command()
@_source
@click.option("--pull", "mode", flag_value="pull", help="Only fetch what others changed.")
@click.option("--push", "mode", flag_value="push", help="Only publish what was changed here.")
@click.option("--dry-run", is_flag=True, help="Say what a push would do, and do nothing.")
@click.option(
    "--timeout", type=click.FloatRange(1, 21600), help="Longest for each direction, in seconds.  [default: 300]"
)
@_namespace
@_cache
@_json
def sync(
    *,
    source: str | None,
    mode: str | None,
    dry_run: bool,
    timeout: float | None,
    namespace: str,
    cache: Path | None,
    as_json: bool,
) -> None:
    """Synchronise a repository's cache with its datastore, once.

    SOURCE is a repository directory (default: the one here), or a URL with --cache. Without --pull or --push it does
    both. A push takes the global lock; a pull takes none.

    \b
    Example: swampfs sync ~/repo
    """
    datastore = open_for_command(source, os.environ, Path.cwd(), namespace=namespace, cache=cache)
    if datastore.is_directory:
        raise SyncNotSupportedError(
            "sync_not_supported: a directory datastore is used in place", remedy="there is nothing to synchronise"
        )
    mount = None if dry_run or cache is not None or namespace else _mount_of(datastore)
    if mount is not None:
        answer = _through_mount(mount, mode or "sync", timeout or _MOUNT_ANSWER_S, as_json=as_json)
    else:
        service = datastore.provider.create_sync_service(_repo_dir(datastore), str(datastore.cache_path))
        run = partial(_preview if dry_run else _sync, datastore, service, mode or "sync", _timeout_s(timeout))
        answer = progress.run("sync", run, as_json=as_json)
    if as_json:
        click.echo(json.dumps(answer, indent=2))
        return
    if dry_run:
        summary = answer["summary"]
        click.echo(f"would push {summary['new']} new, {summary['changed']} changed, {summary['deleted']} deleted")
        return
    words = [f"{answer[name]} file(s) {verb}" for name, verb in (("filesPulled", "pulled"), ("filesPushed", "pushed"))
             if name in answer]  # fmt: skip
    click.echo(", ".join(words) or "done through the mount")


@click.command("migrate-index")
@_source
@_namespace
@_json
def migrate_index(source: str | None, namespace: str, as_json: bool) -> None:
    """Divide the datastore's one index file into shards; a sharded one is completed from its objects.

    Every writer of this datastore must know shards (swamp since July 2026). There is no way back.

    \b
    Example: swampfs migrate-index ~/repo
    """
    datastore = open_for_command(source, os.environ, Path.cwd(), namespace=namespace, cache=Path(os.devnull))
    provider = own_provider(datastore, "migrate-index")

    async def migrate() -> dict[str, Any]:
        shards = await provider.migrate_index(datastore.namespace, lock_options(datastore))
        return {"version": shards.version, "partitions": list(shards.partitions), "commitSeq": shards.commit_seq}

    answer = progress.run("migrate", partial(_patiently, datastore, "migration", migrate), as_json=as_json)
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        click.echo(
            f"index version {answer['version']}: {len(answer['partitions'])} shards, commit {answer['commitSeq']}"
        )


@click.command()
@_source
@click.option("--repair", is_flag=True, help="Mend what can be mended: index shards, foreign objects, dead mounts.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Write what somebody who helps has to know into FILE.")
@_namespace
@_json
def doctor(source: str | None, repair: bool, bundle: Path | None, namespace: str, as_json: bool) -> None:
    """Examine environment, datastore, index and cache. Exit code 1 if something is wrong.

    \b
    Example: swampfs doctor ~/repo
    """
    try:
        datastore = _open_for_doctor(source, namespace)
        examine = partial(_patiently, datastore, "examination", partial(_examine, datastore, repair))
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


# --- sync --------------------------------------------------------------------------------------------------


async def _sync(datastore: OpenDatastore, service: DatastoreSyncService, mode: str, timeout_s: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"mode": mode}
    namespace = datastore.namespace or None
    if mode != "push":
        pull = partial(service.pull_changed, namespace=namespace, metadata_only=datastore.lazy)
        answer["filesPulled"] = await _within(timeout_s, "pull", datastore, pull)
    if mode != "pull":

        async def push(signal: AbortSignal) -> Any:
            return await _locked(datastore, partial(service.push_changed, namespace=namespace, signal=signal))

        answer["filesPushed"] = await _within(timeout_s, "push", datastore, push)
    return answer


async def _preview(
    datastore: OpenDatastore, service: DatastoreSyncService, mode: str, timeout_s: float
) -> dict[str, Any]:
    preview = partial(service.preview_push, namespace=datastore.namespace or None)
    found = await _within(timeout_s, "push", datastore, preview)
    return {"mode": "push", "summary": found._asdict(), "pushed": False}


async def _within(
    timeout_s: float, direction: str, datastore: OpenDatastore, call: Callable[..., Awaitable[Any]]
) -> Any:
    """Run a call that heeds a signal, until the time is over or somebody interrupts it.

    Raises SyncTimeoutError; an interrupt ends the command with 130 once everything is given back.
    """
    stop = AbortSignal()
    scope = trio.CancelScope()
    result: list[Any] = []
    failure: list[Exception] = []

    def end(why: str) -> None:
        if not stop.aborted:
            stop.abort(why)
        scope.cancel()

    async def watch_clock() -> None:
        await trio.sleep(timeout_s)
        end(_TOO_SLOW)

    async def watch_signals() -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as received:
            async for _ in received:
                end(_INTERRUPTED)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch_clock)
        nursery.start_soon(watch_signals)
        await trio.lowlevel.checkpoint()  # the signals are ours from here on
        with scope:
            try:
                result.append(await call(signal=stop))
            except Exception as error:  # re-raised below: the nursery would wrap it in a group
                failure.append(error)
        nursery.cancel_scope.cancel()
    if result:
        return result[0]
    if stop.aborted and stop.reason == _INTERRUPTED:
        raise click.Abort
    if stop.aborted:
        raise SyncTimeoutError(f"{datastore.type} {direction} did not end within {int(timeout_s * 1000)}ms")
    raise failure[0]


async def _patiently(datastore: OpenDatastore, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
    """Run the whole of a command that has no deadline of its own; it can be interrupted."""

    async def run(signal: AbortSignal) -> Any:
        return await call()

    return await _within(_LONGEST_S, what, datastore, run)


async def _locked(datastore: OpenDatastore, fn: Callable[[], Awaitable[Any]]) -> Any:
    """Under the namespace's global lock, as swamp pushes (spec §9.4). Raises LockTimeoutError."""
    place = datastore.provider.resolve_datastore_path(_repo_dir(datastore))
    return await datastore.provider.create_lock(place, lock_options(datastore)).with_lock(fn)


def lock_options(datastore: OpenDatastore) -> LockOptions:
    wait_ms = _positive("SWAMP_LOCK_TIMEOUT_MS")
    patience = {"max_wait_ms": wait_ms} if wait_ms else {}
    return LockOptions(lock_key=Keyspace("", datastore.namespace).global_lock, **patience)


def _timeout_s(given: float | None) -> float:
    """Spec §9.4: flag, environment, default; nonsense in the environment is ignored."""
    if given is not None:
        return given
    configured_ms = _positive("SWAMP_DATASTORE_SYNC_TIMEOUT_MS")
    return configured_ms / 1000 if configured_ms else _DEFAULT_TIMEOUT_S


def _positive(variable: str) -> int | None:
    text = os.environ.get(variable, "")
    return int(text) if text.isascii() and text.isdigit() and 0 < len(text) < 10 and int(text) > 0 else None


def _repo_dir(datastore: OpenDatastore) -> str:
    return str(datastore.repo.directory if datastore.repo is not None else Path.cwd())


def own_provider(datastore: OpenDatastore, what: str) -> ObjectStoreProvider:
    if not isinstance(datastore.provider, ObjectStoreProvider) or datastore.is_directory:
        raise SyncNotSupportedError(f"{what} is for object stores; {datastore.type} has no index of this kind")
    return datastore.provider


def _mount_of(datastore: OpenDatastore) -> registry.Registration | None:
    if datastore.repo is None:
        return None
    try:
        return registry.find(os.environ, datastore.repo.mountpoint)
    except NotMountedError:
        return None


def _through_mount(mount: registry.Registration, mode: str, timeout_s: float, *, as_json: bool) -> dict[str, Any]:
    """The mount has the same datastore open: it refreshes and pushes, so nothing is done twice."""
    answer: dict[str, Any] = {"mode": mode, "through": mount.mountpoint}
    for direction, command in (("push", "flush"), ("pull", "refresh")):
        if mode in (direction, "sync"):
            message = {"cmd": command, "timeout": timeout_s}
            with progress.of_mount(mount, "push", as_json=as_json) as draw:
                reply = registry.request(mount, message, timeout_s + 10, draw if direction == "push" else None)
            if "error" in reply:
                raise SwampfsError(str(reply["error"]))
    return answer


# --- doctor ------------------------------------------------------------------------------------------------


async def _examine(datastore: OpenDatastore, repair: bool) -> dict[str, Any]:
    repairs = environment.repair() if repair else []
    findings = [*environment.examine(), *_extensions(datastore)]
    health = await datastore.provider.create_verifier().verify()
    findings.append(environment.finding("health", health.message, passed=health.healthy))
    contamination = None
    provider = datastore.provider
    if health.healthy and isinstance(provider, ObjectStoreProvider) and not datastore.is_directory:
        findings.append(await _conditional(provider, datastore.namespace))
        try:
            report = await provider.examine_index(datastore.namespace)
            if repair and not report.sound and report.mode is IndexMode.SHARDS:
                shards = await provider.migrate_index(datastore.namespace, lock_options(datastore))
                repairs.append(f"index rebuilt from the objects: {len(shards.partitions)} shards")
                report = await provider.examine_index(datastore.namespace)
            findings.append(_of_index(report))
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
    return environment.finding("writing", "conditional writes are honoured", passed=True)


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
    service = datastore.provider.create_sync_service(_repo_dir(datastore), str(datastore.cache_path))
    look = partial(service.repair_namespace_contamination, namespace=datastore.namespace)
    report = await look(dry_run=True)
    if repair and report.total_foreign_objects:
        done = await _locked(datastore, partial(look, dry_run=False))
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
