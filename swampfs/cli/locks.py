"""``swampfs lock``: who holds the locks of a datastore, breaking one, running a command under one. No mount needed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click
import trio

from swampfs.cli.control import ask, pick
from swampfs.cli.sync import lock_options
from swampfs.datastore.object_store import ObjectStoreProvider
from swampfs.datastore.repository import OpenDatastore, open_for_command
from swampfs.errors import NotMountedError, UsageError
from swampfs.names import Keyspace, ModelRef
from swampfs.provider import DistributedLock
from swampfs.records import LockInfo
from swampfs.settings import find_repo

T = TypeVar("T")

_PLACE = [
    click.option("--source", help="A URL or a repository; default: the repository here, or the only mount."),
    click.option("--namespace", default="", help="Instead of the repository's own."),
]


def _placed(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(_PLACE):
        command = option(command)
    return command


@click.group()
def lock() -> None:
    """The locks that all machines of a datastore share."""


@lock.command()
@click.option("--json", "as_json", is_flag=True, help="One document per lock, models first, as the swamp CLI prints.")
@_placed
def status(source: str | None, namespace: str, as_json: bool) -> None:
    """Show who holds the global lock and, on an object store, the models' locks.

    \b
    Example: swampfs lock status --source s3://ops-runtime/team
    """
    datastore = _open(source, namespace)

    async def look() -> tuple[dict[str, LockInfo], LockInfo | None]:
        held = {}
        if isinstance(datastore.provider, ObjectStoreProvider):
            held = await datastore.provider.model_locks(datastore.namespace).held(all_of_them=True)
        return held, await _lock(datastore, None).inspect()

    models, global_holder = trio.run(look)
    documents: list[dict[str, Any]] = [
        {"held": True, "info": info.as_json(), "datastoreType": datastore.type, "lockScope": scope}
        for scope, info in sorted(models.items())
    ]
    documents.append({"held": global_holder is not None})
    if global_holder is not None:
        documents[-1]["info"] = global_holder.as_json()
    documents[-1] |= {"datastoreType": datastore.type, "lockScope": "global"}
    for document in documents:
        click.echo(json.dumps(document, indent=2) if as_json else _text(document))


def _text(document: dict[str, Any]) -> str:
    if not document["held"]:
        return f"{document['lockScope']}: free"
    info = document["info"]
    return f"{document['lockScope']}: held by {info['holder']} (pid {info['pid']}) since {info['acquiredAt']}"


@lock.command()
@click.option("--force", is_flag=True, help="Required: whoever holds it is not asked.")
@click.option("--model", help="TYPE/ID of the model whose lock it is; default: the global lock.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@_placed
def release(source: str | None, namespace: str, model: str | None, force: bool, as_json: bool) -> None:
    """Break a lock whose holder is gone. The holder of this moment: one that comes after is left alone.

    \b
    Example: swampfs lock release --force --model aws/ec2/vpc/6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a20
    """
    if not force:
        raise UsageError("a lock is only released with --force", remedy="see `swampfs lock status` first")
    datastore = _open(source, namespace)
    held = _lock(datastore, model)

    async def break_it() -> tuple[LockInfo | None, bool]:
        holder = await held.inspect()
        return holder, holder is not None and await held.force_release(holder.nonce or "")

    holder, released = trio.run(break_it)
    answer: dict[str, Any] = {"released": released}
    if not released:
        answer["reason"] = "not held" if holder is None else "it changed hands just now"
    if holder is not None:
        answer["previousHolder"] = holder.as_json()
    if as_json:
        click.echo(json.dumps(answer, indent=2))
    else:
        click.echo("released" if released else f"not released: {answer['reason']}")
    sys.exit(0 if released or holder is None else 1)


@lock.command(context_settings={"ignore_unknown_options": True})
@click.argument("model")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@_placed
def run(source: str | None, namespace: str, model: str, command: tuple[str, ...]) -> None:
    """Run a command while holding a model's lock; ends with the command's exit code.

    What it starts may write to the model through a mount: it works on behalf of the lock's holder.

    \b
    Example: swampfs lock run aws/ec2/vpc/6f1c2a54-77a0-4a57-8f0e-1d1f3b5f9a20 -- ./edit.sh
    """
    datastore = _open(source, namespace)
    reference = model_reference(model)

    async def work() -> int:
        env = {**os.environ, "SWAMP_LOCK_HOLDER_PID": str(os.getpid())}
        done = await trio.run_process(list(command), env=env, check=False, stdin=None)
        return done.returncode

    sys.exit(trio.run(partial(_as_writer, datastore, reference, work)))


async def _as_writer(datastore: OpenDatastore, model: ModelRef, work: Callable[[], Awaitable[int]]) -> int:
    try:
        if isinstance(datastore.provider, ObjectStoreProvider):
            return await datastore.provider.as_writer(datastore.namespace, model, lock_options(datastore), work)
        return await _lock(datastore, str(model)).with_lock(work)
    except (FileNotFoundError, PermissionError) as error:
        raise UsageError(f"{error.filename} cannot be run: {error.strerror}") from None
    except subprocess.SubprocessError as error:
        raise UsageError(f"the command failed: {error}") from None


def _open(source: str | None, namespace: str) -> OpenDatastore:
    if source is None and not os.environ.get("SWAMP_DATASTORE") and find_repo(Path.cwd()) is None:
        with suppress(NotMountedError):  # then it is a repository that is missing
            mounted = ask(pick(None), {"cmd": "status"})
            source, namespace = mounted["source"], namespace or mounted["namespace"] or ""
    return open_for_command(source, os.environ, Path.cwd(), namespace=namespace, cache=Path("/nonexistent"))


def model_reference(text: str) -> ModelRef:
    kind, slash, name = text.rpartition("/")
    if not slash or not kind or not name:
        raise UsageError(f"{text!r} is no model", remedy="write TYPE/ID, such as aws/ec2/vpc/6f1c2a54-…")
    return ModelRef(kind, name)


def _lock(datastore: OpenDatastore, model: str | None) -> DistributedLock:
    keys = Keyspace("", datastore.namespace)
    key = keys.global_lock if model is None else keys.model_lock(model_reference(model))
    return datastore.provider.create_lock("", lock_options(datastore)._replace(lock_key=key))
