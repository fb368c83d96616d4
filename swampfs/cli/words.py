"""Types of arguments that several commands have."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


def printable(text: str) -> str:
    """For a terminal: names come from other machines, and shall move no cursor."""
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


class FileName(click.ParamType):  # type: ignore[type-arg]
    """A path, completed by the shell. Not looked at: what is mounted there may be dead, and would hold us."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


FILE_NAME = FileName()
