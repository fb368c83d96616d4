"""Commands without a mount: ``sync``, ``migrate-index``. Beside a mount, ``sync`` goes through it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from swampfs import registry
from swampfs.cli import progress
from swampfs.cli.words import FILE_NAME
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.repository import OpenDatastore, open_for_command
from swampfs.errors import (
    NotMountedError,
    SwampfsError,
    SyncNotSupportedError,
    SyncTimeoutError,
)
from swampfs.names import Keyspace
from swampfs.provider import AbortSignal, DatastoreSyncService, LockOptions

_DEFAULT_TIMEOUT_S = 300.0
_MOUNT_ANSWER_S = 30.0
_LONGEST_S = 21_600.0
_TOO_SLOW = "too slow"
_INTERRUPTED = "interrupted"
_SHOWN = 5

source_argument = click.argument("source", type=FILE_NAME, required=False)
namespace_option = click.option("--namespace", envvar="SWAMPFS_NAMESPACE", default="", help="Bind one namespace.")
json_option = click.option("--json", "as_json", is_flag=True, help="Every field, as JSON.")
_cache = click.option("--cache", type=click.Path(path_type=Path), help="Cache directory.  [default: the repository's]")


@click.command()
@source_argument
@click.option("--pull", "mode", flag_value="pull", help="Only fetch what others changed.")
@click.option("--push", "mode", flag_value="push", help="Only publish what was changed here.")
@click.option("--dry-run", is_flag=True, help="Say what a push would do, and do nothing.")
@click.option(
    "--timeout", type=click.FloatRange(1, 21600), help="Longest for each direction, in seconds.  [default: 300]"
)
@namespace_option
@_cache
@json_option
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
        service = datastore.provider.create_sync_service(repo_dir(datastore), str(datastore.cache_path))
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
@source_argument
@namespace_option
@json_option
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

    answer = progress.run("migrate", partial(patiently, datastore, "migration", migrate), as_json=as_json)
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
    else:
        click.echo(
            f"index version {answer['version']}: {len(answer['partitions'])} shards, commit {answer['commitSeq']}"
        )


# --- sync --------------------------------------------------------------------------------------------------


async def _sync(datastore: OpenDatastore, service: DatastoreSyncService, mode: str, timeout_s: float) -> dict[str, Any]:
    answer: dict[str, Any] = {"mode": mode}
    namespace = datastore.namespace or None
    if mode != "push":
        pull = partial(service.pull_changed, namespace=namespace, metadata_only=datastore.lazy)
        answer["filesPulled"] = await _within(timeout_s, "pull", datastore, pull)
    if mode != "pull":

        async def push(signal: AbortSignal) -> Any:
            return await locked(datastore, partial(service.push_changed, namespace=namespace, signal=signal))

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


async def patiently(datastore: OpenDatastore, what: str, call: Callable[[], Awaitable[Any]]) -> Any:
    """Run the whole of a command that has no deadline of its own; it can be interrupted."""

    async def run(signal: AbortSignal) -> Any:
        return await call()

    return await _within(_LONGEST_S, what, datastore, run)


async def locked(datastore: OpenDatastore, fn: Callable[[], Awaitable[Any]]) -> Any:
    """Under the namespace's global lock, as swamp pushes (spec §9.4). Raises LockTimeoutError."""
    place = datastore.provider.resolve_datastore_path(repo_dir(datastore))
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


def repo_dir(datastore: OpenDatastore) -> str:
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
