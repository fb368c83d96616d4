"""``swampfs query`` and ``swampfs latest``: artifacts by what is known of them (data-model spec §6).

The mount keeps the catalog; it is read here, so that a costly question costs its asker's time and nobody else's.
Content is read through the mount, like any file: where it is not on this machine, that would fetch it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml

from swampfs import registry
from swampfs.artifacts.predicate import Expression, Predicate
from swampfs.artifacts.query import LARGEST, Record, search, selected
from swampfs.cli.control import ask, pick
from swampfs.cli.words import FILE_NAME, printable
from swampfs.errors import SwampfsError, UsageError
from swampfs.state.artifacts import Artifact, Artifacts
from swampfs.state.schema import is_damaged

_FILL_S = 24 * 3600.0  # the first time all metadata is read; it shows how far it is
_AHEAD = 64  # contents that are fetched at once
_WIDTHS = (28, 28, 7)  # of model, name and version in a table
_DIGITS = 1024
_MOST_RENAMES = 6  # the first name, and five more (data-model spec §3)
_METADATA = (
    "id", "name", "version", "contentType", "lifetime", "garbageCollection", "streaming", "createdAt", "size",
    "checksum",
)  # fmt: skip


class _Source(NamedTuple):
    """Where the answers come from."""

    artifacts: Artifacts
    directory: Callable[[Artifact], Path | None]
    """Of a version, if the mount shows it."""


def _open(registration: registry.Registration, **message: Any) -> _Source:
    as_json = bool(click.get_current_context().params.get("as_json"))
    answer = ask(registration, {"cmd": "artifacts", **message}, _FILL_S, shows="metadata", as_json=as_json)
    root, own, shows_all = Path(registration.mountpoint), answer["namespace"], answer["allNamespaces"]

    def directory(artifact: Artifact) -> Path | None:
        if artifact.namespace != own and not shows_all:
            return None
        above = root / artifact.namespace if shows_all else root
        return above / artifact.place / str(artifact.version)

    return _Source(Artifacts(answer["database"], read_only=True), directory)


def _answered(registration: registry.Registration, question: Callable[[_Source], Any], **message: Any) -> Any:
    """What the catalog says; one that is damaged is made anew, once."""
    for attempt in range(2):
        try:
            source = _open(registration, **message, anew=attempt > 0)
            with closing(source.artifacts):
                return question(source)
        except Exception as error:
            if attempt or not is_damaged(error.__cause__ if isinstance(error.__cause__, Exception) else error):
                raise
    raise AssertionError("the second attempt ends the loop")


def _reader(source: _Source, *, fetch: bool) -> Callable[[Artifact], bytes | None]:
    """How content is read: where it is not on this machine, only if it is to be fetched."""

    def read(artifact: Artifact) -> bytes | None:
        directory = source.directory(artifact)
        if directory is None:
            return None
        try:
            with open(directory / "raw", "rb") as file:
                return file.read() if os.fstat(file.fileno()).st_size <= LARGEST else None
        except (FileNotFoundError, NotADirectoryError):
            return None  # being written, or removed
        except OSError as error:
            if not fetch:
                return None
            raise SwampfsError(f"{directory}/raw could not be read: {error.strerror}") from None

    def read_here(artifact: Artifact) -> bytes | None:
        directory = source.directory(artifact)
        with suppress(OSError):
            found = None if directory is None else os.stat(directory / "raw")
            if found is not None and (found.st_blocks or not found.st_size):
                return read(artifact)
        return None

    return read if fetch else read_here


def _together(records: Iterator[Record]) -> Iterator[Record]:
    """Read contents side by side, for each may have to be fetched."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        while batch := list(islice(records, _AHEAD)):
            list(pool.map(Record.load, batch))
            yield from batch


@click.command()
@click.argument("predicate", default="")
@click.option("--select", help="A CEL expression: what to show of each.")
@click.option("--limit", type=click.IntRange(min=1), help="Show no more than so many.")
@click.option("--hydrate", is_flag=True, help="Fetch content that is looked at and not on this machine.")
@click.option("--paths", is_flag=True, help="Only the paths of the contents, one per line.")
@click.option("-0", "--null", is_flag=True, help="With --paths: each ends with a NUL, for `xargs -0`.")
@click.option("--mount", "mountpoint", type=FILE_NAME, help="Which mount is asked. Default: the one here.")
@click.option("--json", "as_json", is_flag=True, help="Whole records, as JSON.")
def query(
    predicate: str,
    *,
    select: str | None,
    limit: int | None,
    hydrate: bool,
    paths: bool,
    null: bool,
    mountpoint: str | None,
    as_json: bool,
) -> None:
    """Find artifacts: PREDICATE is a CEL expression over their fields. Without one, the latest of all.

    Only the latest versions are looked at unless it refers to version or isLatest. What refers to attributes or
    content finds only what is on this machine, unless --hydrate is given.

    \b
    Example: swampfs query 'modelName == "net-eu" && size > 1000' --limit 10
    """
    if paths and (as_json or select):
        raise UsageError("--paths goes with neither --json nor --select")
    wanted = Predicate(predicate)
    selection = None if select is None else Expression(select, "selection")
    shows_content = as_json if selection is None else selection.needs_content

    def question(source: _Source) -> tuple[list[tuple[Record, Path | None]], bool]:
        found = search(source.artifacts, wanted, _reader(source, fetch=hydrate), _together)
        few = list(found if limit is None else islice(found, limit + 1))
        kept = _together(iter(few[:limit])) if shows_content else few[:limit]
        return [(record, source.directory(record.artifact)) for record in kept], len(few) > (limit or len(few))

    found, is_limited = _answered(pick(mountpoint), question)
    if paths:
        for _, directory in found:
            if directory is not None:
                click.echo(f"{directory}/raw", nl=not null)
                click.echo("\0" if null else "", nl=False)
    elif as_json:
        results = [selected(record, selection) for record, _ in found]
        told = {} if selection is not None else {"predicate": predicate}
        click.echo(_json({**told, "results": results, "total": len(results), "limited": is_limited}))
    elif selection is not None:
        for record, _ in found:
            value = selected(record, selection)
            click.echo(printable(value) if isinstance(value, str) else _json(value, indent=None))
    else:
        _table([record.artifact for record, _ in found], is_limited)


def _json(value: Any, indent: int | None = 2) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False)


def _table(found: Sequence[Artifact], is_limited: bool) -> None:
    if not found:
        click.echo("nothing found", err=True)
        return
    model, name, version = _WIDTHS
    click.echo(f"{'MODEL':<{model}} {'NAME':<{name}} {'VERSION':>{version}} {'SIZE':>8} CREATED")
    for one in found:
        who = printable(one.model_name or one.model_id)
        line = f"{who:<{model}} {printable(one.data_name):<{name}} {one.version:>{version}} {_size(one.size):>8} "
        click.echo(line + printable(one.created_at))
    if is_limited:
        click.echo(f"and more: only {len(found)} were asked for", err=True)


def _size(count: float) -> str:
    for unit in ("", "K", "M"):
        if count < _DIGITS:
            return f"{count:.0f}{unit}" if not unit else f"{count:.1f}{unit}"
        count /= _DIGITS
    return f"{count:.1f}G"


@click.command()
@click.argument("model")
@click.argument("name")
@click.option("--mount", "mountpoint", type=FILE_NAME, help="Which mount is asked. Default: the one here.")
@click.option("--json", "as_json", is_flag=True, help="Its metadata and its content, as JSON.")
def latest(model: str, name: str, mountpoint: str | None, as_json: bool) -> None:
    """Print the path of the latest version of NAME of MODEL, a model's name or id. Of another namespace: NS:MODEL.

    \b
    Example: cat "$(swampfs latest net-eu vpc-main)"
    """
    for text in (model, name):
        if not text.isprintable():
            raise UsageError(f"{text!r} is no name")
    registration = pick(mountpoint)
    own = str(ask(registration, {"cmd": "status"})["namespace"] or "")
    is_of_others = ":" in model and model.partition(":")[0] != own
    wanted = name
    for _ in range(_MOST_RENAMES):

        def question(source: _Source, name: str = wanted) -> tuple[Artifact | None, Path | None, str | None]:
            return _latest(source, model, name, own)

        artifact, directory, renamed = _answered(registration, question, **({} if is_of_others else {"name": wanted}))
        if renamed is None:
            break
        wanted = renamed
    if artifact is None:
        raise UsageError(f"{model} has no artifact {name}", remedy="`swampfs query` lists what there is")
    if directory is None:
        raise UsageError(
            f"{name} is in namespace {artifact.namespace}, which is not mounted here",
            remedy="mount with --all-namespaces",
        )
    click.echo(_json(_described(artifact, directory)) if as_json else f"{directory}/raw")


def _described(artifact: Artifact, directory: Path) -> dict[str, Any]:
    """As ``swamp data get`` has it."""
    try:
        metadata, body = (directory / "metadata.yaml").read_bytes(), (directory / "raw").read_bytes()
        described = None if b"<<" in metadata else yaml.safe_load(metadata)  # what merges may grow without end
    except (OSError, yaml.YAMLError, ValueError) as error:
        raise SwampfsError(f"{directory} could not be read: {error}") from None
    if not isinstance(described, dict):
        raise SwampfsError(f"{directory}/metadata.yaml is no metadata of swamp's")
    known = {key: _scalar(described[key]) for key in _METADATA if key in described}
    owner = described.get("ownerDefinition")
    return {
        **known,
        "tags": dict(artifact.tags),
        "ownerDefinition": {str(key): _scalar(value) for key, value in owner.items()}
        if isinstance(owner, dict)
        else {},
        "modelId": artifact.model_id,
        "modelName": artifact.model_name,
        "modelType": artifact.type_normalized,
        "contentPath": f"{directory}/raw",
        "content": Record(artifact, lambda _: body)("content"),
    }


def _scalar(value: Any) -> Any:
    """As JSON has it, which knows no times; of what is none of swamp's, nothing."""
    if isinstance(value, dict | list | set | bytes):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _latest(source: _Source, model: str, name: str, own: str) -> tuple[Artifact | None, Path | None, str | None]:
    """It and its directory, or what it is called now. Raises UsageError if more than one model is called that."""
    namespace, colon, rest = model.partition(":")
    of = rest if colon else model
    values: list[object] = [name, of, of, of]
    is_named = "model_name = ? OR model_id = ? OR type_normalized || '/' || model_id = ?"
    where = f"data_name = ? AND ({is_named})"
    if not (colon and namespace == "*"):
        where += " AND artifact.namespace = ?"
        values.append(namespace if colon else own)
    found = list(source.artifacts.select(f"is_latest = 1 AND {where}", values))
    if not found:
        return None, None, source.artifacts.renamed(where, values)
    models = {(one.namespace, one.type_normalized, one.model_id) for one in found}
    if len(models) > 1:
        names = ", ".join(sorted(f"{kind}/{id}" + (f" in {where}" if where else "") for where, kind, id in models))
        raise UsageError(f"{len(models)} models are called {model}", remedy=f"name one by its id: {names}")
    return found[-1], source.directory(found[-1]), None
