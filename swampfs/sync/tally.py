"""How far a long piece of work is, for whoever waits for it. Work that nobody watches counts nothing."""

from __future__ import annotations

from contextvars import ContextVar


class Tally:
    """The piece under way: ``done`` of ``total`` ``what``, such as files. ``total`` 0: nothing is known yet."""

    def __init__(self) -> None:
        self.what = ""
        self.done = 0
        self.total = 0

    def begin(self, what: str, total: int) -> None:
        """A new piece."""
        self.what, self.done, self.total = what, 0, total


watched: ContextVar[Tally | None] = ContextVar("tally", default=None)
"""Set by whoever waits; tasks and worker threads inherit it."""


def begin(what: str, total: int) -> Tally:
    """For who works: ``done`` is to be counted up."""
    tally = watched.get() or Tally()
    tally.begin(what, total)
    return tally
