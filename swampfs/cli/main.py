"""``swampfs``: the command group, and the one line every failure ends with."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import click

from swampfs import __version__
from swampfs.cli.conflicts import conflicts
from swampfs.cli.control import flush, status, umount
from swampfs.cli.locks import lock
from swampfs.cli.mount import mount
from swampfs.cli.namespace import namespace
from swampfs.cli.structural import delete, gc, prune
from swampfs.cli.sync import doctor, migrate_index, sync
from swampfs.errors import EXIT_SYSTEM, EXIT_USAGE, SwampfsError


class _Group(click.Group):
    """Turns our errors into one line and their exit code; click's own usage errors become 1."""

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
    """Print the version."""
    click.echo(f"swampfs {__version__}")


for command in (
    mount,
    umount,
    status,
    flush,
    sync,
    lock,
    conflicts,
    namespace,
    gc,
    prune,
    delete,
    migrate_index,
    doctor,
):
    main.add_command(command)
