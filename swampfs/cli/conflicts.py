"""``swampfs conflicts``: contents kept on this machine because another one won."""

from __future__ import annotations

import json
import os
import shutil
import sys
import uuid
from pathlib import Path
from typing import Any

import click

from swampfs import registry
from swampfs.cli.control import ask, pick
from swampfs.cli.words import FILE_NAME
from swampfs.errors import SettingsError, UsageError


@click.group()
def conflicts() -> None:
    """Local contents that were kept aside when another machine's change of the same file won."""


@conflicts.command("list")
@click.argument("mountpoint", type=FILE_NAME, required=False)
@click.option("--json", "as_json", is_flag=True, help="Every field, as JSON.")
def list_conflicts(mountpoint: str | None, as_json: bool) -> None:
    """List them, newest last.

    \b
    Example: swampfs conflicts list ~/repo/.swamp
    """
    found = _all(pick(mountpoint))
    if as_json:
        click.echo(json.dumps({"conflicts": found}, indent=2, ensure_ascii=False))
        return
    for one in found:
        what = f"{one['size']} bytes" if one["operation"] == "write" else "removed here"
        click.echo(f"{one['id']}  {one['keptAt']}  {one['path']}  ({what})")
    if not found:
        click.echo("no conflicts")


@conflicts.command()
@click.argument("conflict")
@click.option("--mountpoint", help="The mount that has it, if there are several.")
@click.option("--json", "as_json", is_flag=True, help="The report, as JSON; without it, the content itself.")
def show(conflict: str, mountpoint: str | None, as_json: bool) -> None:
    """Print the content that was kept, or the report of what happened.

    CONFLICT is an id of `conflicts list`, or the beginning of one.

    \b
    Example: swampfs conflicts show 1f3a | diff - data/…/raw
    """
    one = _one(pick(mountpoint), conflict)
    if as_json:
        click.echo(json.dumps(one, indent=2, ensure_ascii=False))
    elif one["content"] is None:
        click.echo(f"{one['path']} was removed here; the other version is in the tree", err=True)
    else:
        sys.stdout.buffer.write(Path(one["content"]).read_bytes())


@conflicts.command()
@click.argument("conflict")
@click.option("--keep", type=click.Choice(["ours", "theirs"]), required=True,
              help="ours: put the kept content in place of the file; theirs: drop it.")  # fmt: skip
@click.option("--mountpoint", help="The mount that has it, if there are several.")
def resolve(conflict: str, keep: str, mountpoint: str | None) -> None:
    """Decide which version stays. Nothing is dropped before the other is in place.

    \b
    Example: swampfs conflicts resolve 1f3a --keep ours
    """
    mount = pick(mountpoint)
    one = _one(mount, conflict)
    if keep == "ours":
        _put_in_place(Path(mount.mountpoint) / one["path"], one["content"])
    ask(mount, {"cmd": "drop_conflict", "id": one["id"]})
    click.echo(f"{one['path']}: kept {keep}")


def _put_in_place(target: Path, content: str | None) -> None:
    """Through the mount, like any other change: under the lock, journaled, pushed."""
    if content is None:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{uuid.uuid4()}.tmp")
    try:
        with open(content, "rb") as kept, open(temporary, "xb") as file:
            shutil.copyfileobj(kept, file)
            file.flush()
            os.fsync(file.fileno())  # the kept copy is dropped next
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _all(mount: registry.Registration) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = ask(mount, {"cmd": "conflicts"})["conflicts"]
    return found


def _one(mount: registry.Registration, start: str) -> dict[str, Any]:
    found = [one for one in _all(mount) if one["id"].startswith(start)]
    if not found:
        raise SettingsError(f"there is no conflict {start!r}", remedy="`swampfs conflicts list` shows them")
    if len(found) > 1:
        raise UsageError(f"{start!r} is the beginning of {len(found)} conflicts", remedy="write more of it")
    return found[0]
