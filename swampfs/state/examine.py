"""Is a state directory what it says? For ``swampfs doctor``, beside a mount or without one. Writes nothing."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from typing import NamedTuple

from swampfs.records import Kind, Op

_DATABASES = ("journal.db", "catalog.db", "artifacts.db")


class StateReport(NamedTuple):
    """What was found. Paths are relative to the namespace."""

    damaged: tuple[str, ...]  # databases
    pending: int  # changes that are not pushed
    lost: tuple[str, ...]  # those of them whose content is not there any more
    conflicts: int  # contents that are kept because another machine won


def examine_state(home: str, *, is_mounted: bool) -> StateReport:
    """``is_mounted``: a mount is at work there, so that only its databases can be judged."""
    state = os.path.join(home, "state")
    damaged = tuple(name for name in _DATABASES if not _is_sound(os.path.join(state, name)))
    pending = [] if is_mounted or "journal.db" in damaged else _pending(os.path.join(state, "journal.db"))
    missing = [path for path, op in pending if op == Op.WRITE.value and not _is_there(home, path)]
    lost = () if "catalog.db" in damaged else _files_of(os.path.join(state, "catalog.db"), missing)
    kept = os.path.join(state, "conflicts")
    return StateReport(damaged, len(pending), lost, len(os.listdir(kept)) if os.path.isdir(kept) else 0)


def _open(path: str) -> sqlite3.Connection:
    return sqlite3.connect(f"file:{path.replace('%', '%25').replace('?', '%3F').replace('#', '%23')}?mode=ro", uri=True)


def _is_sound(path: str) -> bool:
    if not os.path.exists(path):
        return True  # it is made when it is needed
    try:
        with closing(_open(path)) as db:
            return bool(db.execute("PRAGMA quick_check(1)").fetchone()[0] == "ok")
    except sqlite3.DatabaseError:
        return False


def _pending(path: str) -> list[tuple[str, str]]:
    if not os.path.exists(path):
        return []
    with closing(_open(path)) as db:
        return [(str(name), str(op)) for name, op in db.execute("SELECT path, op FROM dirty ORDER BY path")]


def _files_of(path: str, names: Sequence[str]) -> tuple[str, ...]:
    """Those that are files: a symbolic link has no content of its own."""
    if not names or not os.path.exists(path):
        return ()
    with closing(_open(path)) as db:
        look = "SELECT 1 FROM node WHERE path = ? AND kind = ?"
        return tuple(name for name in names if db.execute(look, (name, Kind.FILE.value)).fetchone())


def _is_there(home: str, path: str) -> bool:
    return os.path.lexists(os.path.join(home, "files", path))
