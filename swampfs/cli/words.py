"""Types of arguments that several commands have."""

from __future__ import annotations

import click
from click.shell_completion import CompletionItem


class FileName(click.ParamType):  # type: ignore[type-arg]
    """A path, completed by the shell. Not looked at: what is mounted there may be dead, and would hold us."""

    name = "path"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]


FILE_NAME = FileName()
