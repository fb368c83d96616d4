"""What ``status --watch`` shows: a screen on a terminal, plain lines in a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from swampfs.cli.words import printable

Status = Mapping[str, Any]

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_ROWS = 8  # of anything that may be long


def size(count: float) -> str:
    """Bytes for people: ``3.2 GiB``."""
    for unit in _UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {_UNITS[-1]}"


def watch(ask: Callable[[], Status], every_s: float, console: Console) -> None:
    """Ask and show, until interrupted. On a terminal the screen is drawn anew, in a pipe a line is added."""
    before, asked_at = ask(), time.monotonic()
    if not console.is_terminal:
        while True:
            console.print(line(before), soft_wrap=True)
            time.sleep(every_s)
            before = ask()
    with Live(screen(before, before, every_s), console=console, auto_refresh=False) as live:
        live.refresh()
        while True:
            time.sleep(every_s)
            now, at = ask(), time.monotonic()
            live.update(screen(now, before, at - asked_at), refresh=True)
            before, asked_at = now, at


def line(status: Status) -> str:
    """One status in one line."""
    health = "healthy" if status["healthy"] else "NOT HEALTHY"
    why = f": {printable(status['lastError'])}" if status["lastError"] else ""
    return (
        f"{time.strftime('%H:%M:%S')} {health} files {status['files']} here {status['hydrated']} "
        f"to push {status['dirty']} locks {len(status['locks'])} refreshed {_age(status)}{why}"
    )


def screen(status: Status, before: Status, seconds: float) -> RenderableType:
    """``before``: the status of so many seconds ago, for what happened since."""
    healthy = Text("healthy", "bold green") if status["healthy"] else Text("NOT HEALTHY", "bold red")
    title = Text.assemble(printable(f"{status['source']} at {status['mountpoint']}  "), healthy)
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    cache = status["cache"]
    table.add_row("refreshed", f"{_age(status)}, backend answers in {_milliseconds(status['latencyMs'])}")
    table.add_row("requests", _rates(status["requests"], before["requests"], seconds))
    table.add_row("files", f"{status['files']} ({size(status['bytes'])}), {status['hydrated']} on this machine")
    bar = ProgressBar(total=max(cache["limit"], 1), completed=min(cache["bytes"], cache["limit"]), width=30)
    fill = Table.grid(padding=(0, 1))
    fill.add_row(bar, f"{size(cache['bytes'])} of {size(cache['limit'])}")
    table.add_row("cache", fill)
    table.add_row("open", f"{status['openFiles']} handles")
    table.add_row("to push", str(status["dirty"]))
    for model, count in list(status.get("pendingByModel", {}).items())[:_ROWS]:
        table.add_row("", f"{count:>6}  {printable(model)}")
    for lock in status["locks"][:_ROWS]:
        who = f", held by {lock['by']} on {lock['hostname']}" if lock["state"] == "waiting" and lock["by"] else ""
        table.add_row("lock", printable(f"{lock['lock']} ({lock['state']}{who})"))
    if status["conflicts"]:
        table.add_row("conflicts", Text(f"{status['conflicts']}: `swampfs conflicts list`", "yellow"))
    if status["lastError"]:
        table.add_row("error", Text(printable(status["lastError"]), "red"))
    return Group(title, table)


def _age(status: Status) -> str:
    age = status["refreshAgeMs"]
    return "never" if age is None else f"{age / 1000:.1f} s ago"


def _milliseconds(value: float | None) -> str:
    return "—" if value is None else f"{value:.0f} ms"


def _rates(now: Mapping[str, int], before: Mapping[str, int], seconds: float) -> str:
    since = {name: count - before.get(name, 0) for name, count in now.items()}
    told = [f"{name} {count / max(seconds, 0.001):.1f}/s" for name, count in since.items() if count]
    return ", ".join(told) or "none"
