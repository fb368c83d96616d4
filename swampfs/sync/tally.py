"""How far a long piece of work is, for whoever waits for it. Work that nobody watches counts nothing."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(slots=True)
class Piece:
    """``done`` of ``total`` ``what``, such as files. ``total`` 0: nothing is known yet."""

    what: str = ""
    total: int = 0
    done: int = 0


class Tally:
    """The piece that was begun last."""

    def __init__(self) -> None:
        self.piece = Piece()


watched: ContextVar[Tally | None] = ContextVar("tally", default=None)
"""Set by whoever waits; tasks and worker threads inherit it."""


def begin(what: str, total: int) -> Piece:
    """For who works: ``done`` is to be counted up. ``""``: it is not worth to be shown."""
    piece, tally = Piece(what, total), watched.get()
    if tally is not None and what:
        tally.piece = piece
    return piece
