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


def _each_mount(paths: Sequence[str], cmd: str, *, shows: str | None = None) -> dict[str, Any]:
    """Send a command for paths of any mounts; counts are added up. ``shows`` as of :func:`ask`."""
    total: dict[str, Any] = {}
    for registration, relatives in by_mount(paths).items():
        for name, value in ask(registration, {"cmd": cmd, "paths": relatives}, _LONGEST_S, shows=shows).items():
            total[name] = total[name] + value if isinstance(total.get(name), int) else value
    return total


def _fetched(answer: dict[str, Any]) -> None:
    click.echo(f"{answer['files']} file(s), {answer['bytes']} bytes fetched")
    for path, why in answer["errors"].items():
        click.echo(f"swampfs: {path}: {why}", err=True)
    if answer["failed"]:
        click.echo(f"swampfs: {answer['failed']} file(s) could not be fetched — run it again", err=True)
        sys.exit(EXIT_SYSTEM)


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
def hydrate(paths: tuple[str, ...]) -> None:
    """Fetch the content of files and directories to this machine.

    \b
    Example: swampfs hydrate ~/repo/.swamp/outputs
    """
    _fetched(_each_mount(paths, "hydrate", shows="hydrate"))


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
def evict(paths: tuple[str, ...]) -> None:
    """Remove content from this machine that is in the datastore, and that nobody has open or pinned.

    \b
    Example: swampfs evict ~/repo/.swamp/outputs
    """
    answer = _each_mount(paths, "evict")
    kept = f"; {answer['kept']} kept (open, pinned or linked)" if answer["kept"] else ""
    click.echo(f"{answer['files']} file(s), {answer['bytes']} bytes removed from this machine{kept}")


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
def pin(paths: tuple[str, ...]) -> None:
    """Fetch files and directories and keep them here, also when others change them.

    \b
    Example: swampfs pin ~/repo/.swamp/data/aws/ec2/vpc
    """
    _fetched(_each_mount(paths, "pin", shows="hydrate"))


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1, required=True)
def unpin(paths: tuple[str, ...]) -> None:
    """Let content go again when there is too much.

    \b
    Example: swampfs unpin ~/repo/.swamp/data/aws/ec2/vpc
    """
    click.echo(f"{_each_mount(paths, 'unpin')['unpinned']} path(s) unpinned")


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
