"""``mount.fuse.swampfs``: what mount(8) calls for ``-t fuse.swampfs``, also for a line of fstab(5)."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from swampfs.cli.main import main as swampfs
from swampfs.cli.words import FILE_NAME
from swampfs.errors import EXIT_USAGE

_USAGE = "usage: mount.swampfs SOURCE DIRECTORY [-sfnv] [-t TYPE] [-o OPTIONS]"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("source")
@click.argument("directory", type=FILE_NAME)
@click.option("-o", "options", multiple=True, metavar="K=V,…", help="Flags of `swampfs mount`, and those of mount(8).")
@click.option("-f", "fake", is_flag=True, help="Look at source and options, and mount nothing.")
@click.option("-v", "verbose", is_flag=True, help="Say what is done.")
@click.option("-s", "sloppy", is_flag=True, help="Ignored.")
@click.option("-n", "no_mtab", is_flag=True, help="Ignored: there is no mtab to write.")
@click.option("-N", "within", help="Ignored: mount(8) has entered the namespace by then.")
@click.option("-t", "kind", help="Ignored: the type mount(8) was called with.")
def helper(
    source: str, directory: str, options: tuple[str, ...], *, fake: bool, verbose: bool, **ignored: object
) -> NoReturn:
    """Mount a swamp datastore; called by mount(8).

    \b
    Example: mount -t fuse.swampfs s3://ops-runtime/team /srv/swamp -o allow_other
    """
    arguments = ["mount", *(word for group in options for word in ("-o", group)), "--", source, directory]
    if fake:
        arguments.insert(1, "--fake")
    if verbose:  # not what it is: a source may be refused for holding a secret
        click.echo(f"mount.swampfs: mounting at {directory}", err=True)
    # The process that stays is started with these words again.
    sys.argv = ["swampfs", *arguments]
    swampfs()
    sys.exit(0)


def main() -> NoReturn:
    """Entry point. Exit codes are those of `swampfs mount`, which are mount(8)'s."""
    os.environ.setdefault("HOME", os.path.expanduser("~"))  # init starts it without
    try:
        helper.main(standalone_mode=False)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        click.echo(f"mount.swampfs: {error.format_message()} — {_USAGE}", err=True)
        sys.exit(EXIT_USAGE)
    sys.exit(0)


if __name__ == "__main__":
    main()
