"""What is on this machine: ``hydrate``, ``evict``, ``pin``, ``unpin``, and ``info`` about one path."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import click

from swampfs.cli.control import ask, by_mount
from swampfs.cli.words import FILE_NAME
from swampfs.errors import EXIT_SYSTEM

_LONGEST_S = 7 * 24 * 3600.0


_json = click.option("--json", "as_json", is_flag=True, help="As JSON; progress on standard error, too.")


def _each_mount(paths: Sequence[str], cmd: str, *, shows: str | None = None, as_json: bool = False) -> dict[str, Any]:
    """Send a command for paths of any mounts; counts are added up. ``shows`` and ``as_json`` as of :func:`ask`."""
    total: dict[str, Any] = {}
    for registration, relatives in by_mount(paths).items():
        message = {"cmd": cmd, "paths": relatives}
        for name, value in ask(registration, message, _LONGEST_S, shows=shows, as_json=as_json).items():
            total[name] = total[name] + value if isinstance(total.get(name), int) else value
    return total


def _fetched(answer: dict[str, Any], as_json: bool) -> None:
    click.echo(_text(answer) if as_json else f"{answer['files']} file(s), {answer['bytes']} bytes fetched")
    for path, why in answer["errors"].items():
        click.echo(f"swampfs: {path}: {why}", err=True)
    if answer["failed"]:
        click.echo(f"swampfs: {answer['failed']} file(s) could not be fetched — run it again", err=True)
        sys.exit(EXIT_SYSTEM)


def _text(answer: dict[str, Any]) -> str:
    return json.dumps(answer, indent=2, ensure_ascii=False)


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
@_json
def hydrate(paths: tuple[str, ...], as_json: bool) -> None:
    """Fetch the content of files and directories to this machine.

    \b
    Example: swampfs hydrate ~/repo/.swamp/outputs
    """
    _fetched(_each_mount(paths, "hydrate", shows="hydrate", as_json=as_json), as_json)


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
@_json
def evict(paths: tuple[str, ...], as_json: bool) -> None:
    """Remove content from this machine that is in the datastore, and that nobody has open or pinned.

    \b
    Example: swampfs evict ~/repo/.swamp/outputs
    """
    answer = _each_mount(paths, "evict")
    kept = f"; {answer['kept']} kept (open, pinned or linked)" if answer["kept"] else ""
    said = f"{answer['files']} file(s), {answer['bytes']} bytes removed from this machine{kept}"
    click.echo(_text(answer) if as_json else said)


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
@_json
def pin(paths: tuple[str, ...], as_json: bool) -> None:
    """Fetch files and directories and keep them here, also when others change them.

    \b
    Example: swampfs pin ~/repo/.swamp/data/aws/ec2/vpc
    """
    _fetched(_each_mount(paths, "pin", shows="hydrate", as_json=as_json), as_json)


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
@_json
def unpin(paths: tuple[str, ...], as_json: bool) -> None:
    """Let content go again when there is too much.

    \b
    Example: swampfs unpin ~/repo/.swamp/data/aws/ec2/vpc
    """
    answer = _each_mount(paths, "unpin")
    click.echo(_text(answer) if as_json else f"{answer['unpinned']} path(s) unpinned")


@click.command()
@click.argument("path", type=FILE_NAME)
@click.option("--json", "as_json", is_flag=True, help="Every field, as JSON.")
def info(path: str, as_json: bool) -> None:
    """Tell what is known of a path: state, hash, model, lock, last error. Asks the datastore nothing.

    \b
    Example: swampfs info ~/repo/.swamp/outputs/a/b.yaml
    """
    answer = _each_mount([path], "info")
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    for name, value in answer.items():
        if value is not None:
            shown = value["by"] or "this mount" if isinstance(value, dict) else value
            click.echo(f"{name:<17} {shown}")
