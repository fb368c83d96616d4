"""Is a state directory what it says? For ``swampfs doctor``, beside a mount or without one. Changes nothing."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import NamedTuple, TypeVar

from swampfs.records import Kind, Op
from swampfs.state.schema import is_damaged

T = TypeVar("T")

_DATABASES = ("journal.db", "catalog.db", "artifacts.db")
_WAIT_S = 0.5  # for a database that somebody writes to


class StateReport(NamedTuple):
    """What was found. Paths are relative to the namespace."""

    is_mounted: bool  # then only its databases were judged
    damaged: tuple[str, ...]  # databases
    unreadable: tuple[str, ...]  # those that could not be looked at, and why
    pending: int  # changes that are not pushed
    lost: tuple[str, ...]  # those of them whose content is not there any more
    conflicts: int  # contents that are kept because another machine won


def examine_state(home: str) -> StateReport:
    """Raises OSError where the directory cannot be looked into."""
    state = os.path.join(home, "state")
    is_mounted = _is_mounted(os.path.join(state, "lock"))
    work = _Examination(state, is_mounted=is_mounted)
    for name in _DATABASES:
        work.ask(name, _check)
    pending: list[tuple[str, str]] = []
    lost: tuple[str, ...] = ()
    if not is_mounted:
        pending = work.ask("journal.db", _pending) or []
        missing = [path for path, op in pending if op == Op.WRITE.value and not _is_there(home, path)]
        lost = work.ask("catalog.db", lambda db: _files_of(db, missing)) or ()
    kept = os.path.join(state, "conflicts")
    conflicts = len(os.listdir(kept)) if os.path.isdir(kept) else 0
    damaged, unreadable = tuple(sorted(work.damaged)), tuple(sorted(work.unreadable.values()))
    return StateReport(is_mounted, damaged, unreadable, len(pending), lost, conflicts)


class _DamagedError(Exception):
    pass


class _Examination:
    """Of the databases of one state directory."""

    def __init__(self, state: str, *, is_mounted: bool) -> None:
        self._state = state
        self._is_mounted = is_mounted
        self.damaged: set[str] = set()
        self.unreadable: dict[str, str] = {}

    def ask(self, name: str, question: Callable[[sqlite3.Connection], T]) -> T | None:
        """``None`` where it is not there, or was found to be no good."""
        path = os.path.join(self._state, name)
        if name in self.damaged or name in self.unreadable or not os.path.lexists(path):
            return None  # it is made when it is needed
        try:
            with closing(_open(path, is_still=not self._is_mounted)) as db:
                return question(db)
        except _DamagedError:
            self.damaged.add(name)
        except sqlite3.Error as error:
            if is_damaged(error):
                self.damaged.add(name)
            else:
                self.unreadable[name] = f"{name}: {error}"
        return None


def _is_mounted(lock: str) -> bool:
    """As the mount itself sees it: its process holds the lock of the directory."""
    try:
        descriptor = os.open(lock, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _open(path: str, *, is_still: bool) -> sqlite3.Connection:
    """Of a database that nobody writes to, without making the files that a write-ahead log needs."""
    wal = f"{path}-wal"
    has_log = os.path.exists(wal) and os.path.getsize(wal) > 0
    name = path.replace("%", "%25").replace("?", "%3F").replace("#", "%23")
    how = "mode=ro&immutable=1" if is_still and not has_log else "mode=ro"
    return sqlite3.connect(f"file:{name}?{how}", uri=True, timeout=_WAIT_S)


def _check(db: sqlite3.Connection) -> None:
    if db.execute("PRAGMA quick_check(1)").fetchone()[0] != "ok":
        raise _DamagedError


def _pending(db: sqlite3.Connection) -> list[tuple[str, str]]:
    return [(str(name), str(op)) for name, op in db.execute("SELECT path, op FROM dirty ORDER BY path")]


def _files_of(db: sqlite3.Connection, names: Sequence[str]) -> tuple[str, ...]:
    """Those that are files: a symbolic link has no content of its own."""
    look = "SELECT 1 FROM node WHERE path = ? AND kind = ?"
    return tuple(name for name in names if db.execute(look, (name, Kind.FILE.value)).fetchone())


def _is_there(home: str, path: str) -> bool:
    return os.path.lexists(os.path.join(home, "files", path))
