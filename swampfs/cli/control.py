"""Commands that talk to a running mount: ``umount``, ``status``, ``flush``."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from swampfs import registry
from swampfs.cli.mount import seconds
from swampfs.cli.words import FILE_NAME
from swampfs.errors import NotMountedError, SwampfsError, UsageError
from swampfs.fuse import mountpoint as mountpoints

_ANSWER_S = 10.0
_EXIT_S = 15.0
_COMPACT_S = 600.0
_SHORTEST_S = 0.1  # between two looks


def where(text: str) -> Path:
    """Absolute path with links resolved, without touching what is mounted there."""
    if os.path.islink(text):  # asks about the link itself, so a dead mount cannot hold us
        return Path(os.path.realpath(text))
    head, tail = os.path.split(os.path.abspath(text))
    return Path(os.path.realpath(head)) / tail if tail else Path(head)


def ask(
    registration: registry.Registration,
    message: dict[str, Any],
    timeout_s: float = _ANSWER_S,
    *,
    shows: str | None = None,
    as_json: bool = False,
) -> dict[str, Any]:
    """Send a request; an error in the answer ends the command with the mount's words and exit code.

    ``shows``: whose progress to show meanwhile (:func:`swampfs.cli.progress.of_mount`), ``as_json`` or for people.
    """
    with contextlib.ExitStack() as at_end:
        shown: list[Callable[[], None]] = []

        def meanwhile() -> None:
            if shows is not None:
                if not shown:  # what draws is not worth its import for what takes a moment
                    from swampfs.cli import progress

                    shown.append(at_end.enter_context(progress.of_mount(registration, shows, as_json=as_json)))
                shown[0]()

        answer = registry.request(registration, message, timeout_s, meanwhile)
    if "error" in answer:
        click.echo(f"swampfs: {answer['error']}", err=True)
        sys.exit(int(str(answer.get("exitCode", 2))))
    return answer


@click.command()
@click.argument("mountpoint", type=FILE_NAME)
@click.option("--timeout", callback=seconds, default="60s", show_default=True, help="Longest to wait for pushes.")
@click.option("--lazy", is_flag=True, help="Unmount whatever is pending or open; the journal keeps it.")
@click.option("--json", "as_json", is_flag=True, help="As JSON; progress on standard error, too.")
def umount(mountpoint: str, timeout: float, lazy: bool, as_json: bool) -> None:
    """Push what is pending, then unmount.

    \b
    Example: swampfs umount ~/repo/.swamp
    """
    path = where(mountpoint)

    def done(how: str, says: str = "") -> None:
        if as_json:
            click.echo(json.dumps({"mountpoint": str(path), "done": how}, ensure_ascii=False))
        elif says:
            click.echo(says)

    if lazy:
        mountpoints.unmount(str(path), lazy=True)
        says = f"detached {path}; its process ends with the last open file, and the journal keeps what is pending"
        done("detached", says)
        return
    if mountpoints.is_stale(str(path)):
        mountpoints.clear_stale(str(path))
        says = f"cleared the mount a dead process left at {path}; mount it again to push what is journaled"
        done("cleared", says)
        return
    registration = registry.find(os.environ, path)
    if Path(registration.mountpoint) != path:
        raise NotMountedError(f"{path} is inside the mount at {registration.mountpoint}", remedy="name that directory")
    ask(registration, {"cmd": "flush", "timeout": timeout}, timeout + _ANSWER_S, shows="push", as_json=as_json)
    mountpoints.unmount(str(path))
    _wait_for_exit(registration.pid)
    done("unmounted")


def _wait_for_exit(pid: int) -> None:
    """The state directory is free for the next mount when this returns."""
    until = time.monotonic() + _EXIT_S
    while time.monotonic() < until:
        try:
            if registry.has_ended(pid):
                return
        except PermissionError:
            return
        time.sleep(0.02)
    raise SwampfsError(f"unmounted, but process {pid} has not ended yet")


@click.command()
@click.argument("mountpoint", type=FILE_NAME, required=False)
@click.option("--json", "as_json", is_flag=True, help="Every field, as JSON; with --watch an object per line.")
@click.option("--watch", is_flag=True, help="Go on showing it, until interrupted.")
@click.option("--every", callback=seconds, default="1s", show_default=True, help="How often, with --watch.")
def status(mountpoint: str | None, as_json: bool, watch: bool, every: float) -> None:
    """Show the health of a mount: backend, sizes, what is pending, last error.

    \b
    Example: swampfs status --json ~/repo/.swamp
    """
    if every < _SHORTEST_S:
        raise UsageError(f"--every must be {_SHORTEST_S:g}s or longer")
    registration = pick(mountpoint)
    if watch:
        _watch(registration, as_json, every)
        return
    answer = ask(registration, {"cmd": "status"})
    if as_json:
        click.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    health = "healthy" if answer["healthy"] else f"NOT HEALTHY: {answer['lastError']}"
    age = answer["refreshAgeMs"]
    click.echo(f"{answer['source']} at {answer['mountpoint']} — {health}")
    click.echo(f"  files      {answer['files']} ({answer['bytes']} bytes), {answer['hydrated']} on this machine")
    click.echo(f"  to push    {answer['dirty']}" + (f", such as {answer['pending'][0]}" if answer["pending"] else ""))
    click.echo(f"  refreshed  {'never' if age is None else f'{age / 1000:.1f} s ago'}")
    if "namespaces" in answer:
        followed = [one["namespace"] for one in answer["namespaces"] if one["followed"]]
        also = f", following {', '.join(followed)}" if followed else ""
        click.echo(f"  others     {len(answer['namespaces'])} namespaces{also}")
    if answer["conflicts"]:
        click.echo(f"  conflicts  {answer['conflicts']} kept in {answer['stateDir']}/state/conflicts")
    for finding in answer["findings"][:10]:
        click.echo(f"  finding    {finding['path']!r}: {finding['detail']}")


def _watch(registration: registry.Registration, as_json: bool, every_s: float) -> None:
    from rich.console import Console

    from swampfs.cli import screen

    def status() -> dict[str, Any]:
        return ask(registration, {"cmd": "status"})

    with contextlib.suppress(KeyboardInterrupt):  # how it is meant to end
        while as_json:
            click.echo(json.dumps(status(), ensure_ascii=False))
            time.sleep(every_s)
        screen.watch(status, every_s, Console(markup=False, emoji=False, highlight=False))


def by_mount(paths: Sequence[str]) -> dict[registry.Registration, list[str]]:
    """The mount of each path, and what the path is called there (``""``: its root). Raises NotMountedError."""
    found: dict[registry.Registration, list[str]] = {}
    for text in paths:
        path = where(text)
        registration = registry.find(os.environ, path)
        relative = os.path.relpath(path, registration.mountpoint)
        found.setdefault(registration, []).append("" if relative == "." else relative)
    return found


def pick(mountpoint: str | None) -> registry.Registration:
    if mountpoint is not None:
        return registry.find(os.environ, where(mountpoint))
    try:
        return registry.find(os.environ, Path.cwd())
    except NotMountedError:
        found = registry.registrations(os.environ)
        if len(found) == 1:
            return found[0]
        if not found:
            raise NotMountedError("nothing is mounted") from None
        names = ", ".join(registration.mountpoint for registration in found)
        raise NotMountedError(f"{len(found)} datastores are mounted", remedy=f"name one of {names}") from None


@click.command()
@click.argument("mountpoint", type=FILE_NAME, required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def compact(mountpoint: str | None, as_json: bool) -> None:
    """Make the databases of a mount as small as what is in them.

    \b
    Example: swampfs compact ~/repo/.swamp
    """
    done = ask(pick(mountpoint), {"cmd": "compact"}, _COMPACT_S)
    if as_json:
        click.echo(json.dumps(done, indent=2))
        return
    click.echo(
        f"{done['dbBytesReclaimed']} bytes given back, {done['walPagesCheckpointed']} pages of logs written down"
    )
    if done["vacuumSkipped"]:
        click.echo("the catalog is too large to be rewritten while it is in use; only its log was emptied")


@click.command()
@click.argument("paths", type=FILE_NAME, nargs=-1)
@click.option("--timeout", callback=seconds, default="60s", show_default=True, help="Longest to wait.")
@click.option("--json", "as_json", is_flag=True, help="As JSON; progress on standard error, too.")
def flush(paths: tuple[str, ...], timeout: float, as_json: bool) -> None:
    """Return when the given paths (default: the whole mount here) are committed remotely.

    \b
    Example: swampfs flush ~/repo/.swamp/data
    """
    pending = 0
    for registration, relatives in by_mount(paths).items() if paths else [(pick(None), None)]:
        message = {"cmd": "flush", "paths": relatives, "timeout": timeout}
        answer = ask(registration, message, timeout + _ANSWER_S, shows="push", as_json=as_json)
        pending += answer["pending"]
    if as_json:
        click.echo(json.dumps({"pending": pending}))
