"""``swampfs``: the command group, and the one line every failure ends with."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any

import click

from swampfs import __version__
from swampfs.errors import EXIT_SYSTEM, EXIT_USAGE, SwampfsError

_HOMES = {
    "conflicts": "conflicts",
    "control": "compact flush status umount",
    "doctor": "doctor",
    "explain": "explain",
    "keeping": "evict hydrate info pin unpin",
    "locks": "lock",
    "manual": "completion",
    "mount": "mount",
    "namespace": "namespace",
    "query": "latest query",
    "structural": "delete gc prune",
    "sync": "migrate-index sync",
}
"""Module → its commands. Imported when asked for: the SDKs cost half a second that `status` does without."""
_COMMANDS = {name: module for module, names in _HOMES.items() for name in names.split()}


class _Group(click.Group):
    """Turns our errors into one line and their exit code; click's own usage errors become 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*super().list_commands(ctx), *_COMMANDS})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return super().get_command(ctx, cmd_name)
        home = importlib.import_module(f"swampfs.cli.{_COMMANDS[cmd_name]}")
        found: click.Command = getattr(home, cmd_name.replace("-", "_"))
        return found

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            super().main(*args, **{**kwargs, "standalone_mode": False})
        except click.exceptions.Exit as done:
            sys.exit(done.exit_code)
        except click.Abort:
            sys.exit(130)
        except click.ClickException as error:
            error.show()
            sys.exit(EXIT_USAGE)
        except SwampfsError as error:
            if "--debug" in sys.argv:
                traceback.print_exc()
            click.echo(f"swampfs: {error.line()}", err=True)
            sys.exit(error.exit_code)
        except OSError as error:  # this machine's disk, where no command has more to say about it
            if "--debug" in sys.argv:
                traceback.print_exc()
            where = f" {error.filename}" if error.filename else ""
            click.echo(f"swampfs: {error.strerror or error}:{where} — check space and permissions", err=True)
            sys.exit(EXIT_SYSTEM)
        except Exception as error:  # ours to mend; the operator gets one line all the same
            if "--debug" in sys.argv:
                traceback.print_exc()
            what = " ".join(f"{type(error).__name__}: {error}".split())
            click.echo(f"swampfs: unexpected {what} — run it with `swampfs --debug …` and report it", err=True)
            sys.exit(EXIT_SYSTEM)
        except BaseExceptionGroup as group:
            if group.subgroup(KeyboardInterrupt) is None:
                raise
            sys.exit(130)  # interrupted while several things were under way


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def main(debug: bool) -> None:
    """A swamp datastore as a file system.

    \b
    Example: swampfs mount s3://ops-runtime/team ~/repo/.swamp
    """


@main.command()
def version() -> None:
    """Print the version.

    \b
    Example: swampfs version
    """
    click.echo(f"swampfs {__version__}")
