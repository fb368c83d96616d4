"""Manual pages and shell completion, from the commands themselves: what `--help` says is their one source."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Iterator

import click
from click.shell_completion import get_completion_class

from swampfs.errors import SwampfsError

_SEE = {
    "swampfs.1": "mount.fuse.swampfs(8), swampfs(5), fusermount3(1)",
    "mount.fuse.swampfs.8": "swampfs(1), swampfs(5), mount(8), fstab(5), systemd.automount(5)",
    "swampfs.5": "swampfs(1), mount.fuse.swampfs(8)",
}
_EXIT = (
    ("0", "done"),
    ("1", "usage, settings, or nothing is mounted there"),
    ("2", "system error; also changes that are still pending after a wait"),
    ("32", "mount failure"),
    ("75", "a lock was held for longer than the command waits: try again"),
    ("130", "interrupted"),
)
_FILES = (
    (".swamp.yaml", "of a repository: its datastore, if no SOURCE is given (key datastore: type and config)"),
    ("~/.swamp/swampfs/NAME-HASH", "state directory: what this machine keeps of one datastore, and its log"),
    ("MOUNTPOINT/.swampfs", "status.json, metrics, pending, locks, errors, events: what the mount says of itself"),
)
_ENVIRONMENT = (
    ("SWAMP_DATASTORE", "The datastore, if no SOURCE is given: s3:BUCKET/PREFIX, filesystem:DIR, TYPE:JSON, or a URL."),
    ("SWAMP_HOME", "Where state directories are, instead of ~/.swamp."),
)
_NOT_SETTINGS = ("help", "options", "foreground", "fake")


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print what a shell needs to complete commands, options and paths.

    \b
    Example: swampfs completion bash > /etc/bash_completion.d/swampfs
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise SwampfsError(f"there is no completion for {shell}")
    click.echo(kind(ctx.find_root().command, {}, "swampfs", "_SWAMPFS_COMPLETE").source())


def pages(program: click.Group, mount: click.Command, version: str) -> dict[str, str]:
    """File name → text of each manual page, for man(7)."""
    commands = dict(_commands(program, "swampfs"))
    return {
        "swampfs.1": _page("swampfs.1", version, "a swamp datastore as a file system", _of_commands(commands)),
        "mount.fuse.swampfs.8": _page("mount.fuse.swampfs.8", version, "mount a swamp datastore", _of_mount(mount)),
        "swampfs.5": _page("swampfs.5", version, "settings of swampfs", _of_settings(mount)),
    }


def _commands(group: click.Group, path: str) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _commands(command, f"{path} {name}")
        elif command is not None and not command.hidden:
            yield f"{path} {name}", command


# --- pages ----------------------------------------------------------------------------------------------------


def _page(name: str, version: str, what: str, body: Iterable[str]) -> str:
    title, _, section = name.rpartition(".")
    lines = [f'.TH {title.upper()} {section} "" "swampfs {version}"', ".SH NAME", f"{_text(title)} \\- {_text(what)}"]
    lines += body
    lines += [".SH SEE ALSO", _text(_SEE[name])]
    return "\n".join(lines) + "\n"


def _of_commands(commands: dict[str, click.Command]) -> Iterator[str]:
    yield from (".SH SYNOPSIS", ".B swampfs", "[\\-\\-debug]", ".I COMMAND", "[ARGUMENT\\&...]")
    yield ".SH COMMANDS"
    for path, command in commands.items():
        context = click.Context(command, info_name=path)
        yield from (f".SS {_text(path)} " + _text(" ".join(command.collect_usage_pieces(context))),)
        yield from _prose(command.help or "")
        yield from _options(command, context)
    yield ".SH EXIT STATUS"
    yield from _list(_EXIT)
    yield ".SH FILES"
    yield from _list(_FILES)


def _of_mount(mount: click.Command) -> Iterator[str]:
    yield from (".SH SYNOPSIS", ".B mount \\-t fuse.swampfs", ".I SOURCE DIRECTORY", "[\\-o OPTION[,OPTION\\&...]]")
    yield ".SH DESCRIPTION"
    yield _text(
        "Called by mount(8). SOURCE is s3://bucket/prefix, gs://bucket/prefix, file:///dir or the directory of a "
        "repository. Each option is a flag of `swampfs mount`, with or without a value; - and _ mean the same. Of "
        "mount(8)'s own, ro, noexec and noatime are obeyed; rw, _netdev, nofail, x-… and others change nothing; "
        "nosuid and nodev hold always; remount, sync and SELinux contexts are refused. Flags: -f looks at source and "
        "options and mounts nothing, -v says where it mounts, -s, -n and -N are ignored."
    )
    yield ".SH OPTIONS"
    for option in _settings(mount):
        value = "" if option.is_flag else f"={option.make_metavar(click.Context(mount))}"
        yield from (".TP", f".B {_text((option.name or '') + value)}", _text(_help(option)))
    yield from (".SH EXAMPLE", ".nf")
    yield _text("s3://ops-runtime/team /srv/swamp fuse.swampfs _netdev,nofail,state_dir=/var/lib/swampfs/ops 0 0")
    yield ".fi"


def _of_settings(mount: click.Command) -> Iterator[str]:
    yield ".SH DESCRIPTION"
    yield _text(
        "A setting is taken from the command line, else from the environment, else from the repository's .swamp.yaml, "
        "else it has its default. Durations are 500ms, 2s, 1m; sizes 64M, 10G. Credentials come from where the SDK of "
        "the store looks for them, never from here."
    )
    yield ".SH ENVIRONMENT"
    yield from _list(_ENVIRONMENT)
    for option in _settings(mount):
        if option.envvar:
            yield from (".TP", f".B {_text(str(option.envvar))}", _text(f"{option.opts[-1]}: {_help(option)}"))
    yield ".SH FILES"
    yield from _list(_FILES)


def _settings(mount: click.Command) -> Iterator[click.Option]:
    for option in mount.params:
        if isinstance(option, click.Option) and option.name not in _NOT_SETTINGS:
            yield option


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and "--help" not in parameter.opts:
            yield from (".TP", f".B {_text(record[0])}", _text(record[1]))


def _help(option: click.Option) -> str:
    has_default = option.show_default and not option.is_flag and option.default is not None
    return " ".join((option.help or "").split()) + (f" Default: {option.default}." if has_default else "")


def _prose(text: str) -> Iterator[str]:
    """Paragraphs; what follows a ``\\b`` keeps its lines, as on the screen."""
    for paragraph in re.split(r"\n\s*\n", textwrap.dedent(text).strip()):
        yield ".PP"
        if paragraph.lstrip().startswith("\b"):
            yield from (".nf", *(_text(line) for line in paragraph.replace("\b", "").strip().splitlines()), ".fi")
        else:
            yield _text(" ".join(paragraph.split()))


def _list(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for head, text in rows:
        yield from (".TP", f".B {_text(head)}", _text(text))


def _text(text: str) -> str:
    """So that man(7) takes none of it for a request or a sign of its own."""
    safe = text.replace("\\", "\\e").replace("-", "\\-").replace("…", "\\&...").replace("`", "\\(ga")
    return f"\\&{safe}" if safe.startswith((".", "'")) else safe
