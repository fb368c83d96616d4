"""A CEL predicate over artifacts: what is wrong with it, which part of it SQL answers, and whether a record meets it.

SQL's three truth values are CEL's: what is ``NULL`` there is an error here, which ``true ||`` and ``false &&`` outdo
and nothing else does. So a part that compares a field with a literal of its type means the same in both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cel

from swampfs.artifacts.cel import SyntaxTrouble, Term, free_names, functions, parse
from swampfs.errors import UsageError
from swampfs.state.artifacts import INDEXED

TEXTS = {
    "id": "uuid",
    "name": "data_name",
    "createdAt": "created_at",
    "ns": "namespace",
    "modelName": "model_name",
    "modelType": "type_normalized",
    "specName": "spec_name",
    "dataType": "data_type",
    "contentType": "content_type",
    "lifetime": "lifetime",
    "ownerType": "owner_type",
    "ownerRef": "owner_ref",
    "workflowRunId": "workflow_run_id",
    "workflowName": "workflow_name",
    "jobName": "job_name",
    "stepName": "step_name",
    "source": "source",
}
"""Field of a record → column of the catalog."""
NUMBERS = {"version": "version", "size": "size"}
TRUTHS = {"isLatest": "is_latest", "streaming": "streaming"}
CONTENT = {"attributes", "content"}
FIELDS = {*TEXTS, *NUMBERS, *TRUTHS, *CONTENT, "tags"}
"""What a predicate may refer to (data-model spec §6.1)."""
_TYPES = {
    "int",
    "uint",
    "double",
    "string",
    "bool",
    "bytes",
    "list",
    "map",
    "type",
    "null_type",
    "duration",
    "timestamp",
}
_FUNCTIONS = {
    "has", "size", "int", "uint", "double", "string", "bool", "bytes", "type", "list", "map", "duration", "timestamp",
    "matches", "contains", "startsWith", "endsWith", "all", "exists", "exists_one", "filter", "dyn", "max", "min",
    "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours", "getMilliseconds",
    "getMinutes", "getMonth", "getSeconds",
}  # fmt: skip
_VALUES = _TYPES - {"bool"} | {"size", "filter"} | {name for name in _FUNCTIONS if name.startswith("get")}
_NO_TRUTHS = {"+", "-", "*", "/", "%", "list", "map"}
_LONGEST = 4096
_MOST = 1 << 63

Sql = tuple[str, tuple[object, ...]]
ANY: Sql = ("1", ())


class Expression:
    """A CEL expression over the fields of a record."""

    def __init__(self, text: str, what: str = "predicate") -> None:
        """Raises UsageError: what is wrong with it, and where."""
        if len(text) > _LONGEST:
            raise UsageError(f"the {what} has {len(text)} characters", remedy=f"{_LONGEST} are the most")
        try:
            self.term = parse(text)
            self.names = free_names(self.term)
            self.calls = functions(self.term)
        except (SyntaxTrouble, RecursionError) as error:
            why = str(error) if isinstance(error, SyntaxTrouble) else "it nests too deeply"
            raise UsageError(f"the {what} {text!r} is no CEL expression: {why}") from None
        strange = self.names - FIELDS - _TYPES
        if strange:
            hint = "; a namespace is called ns" if "namespace" in strange else ""
            raise UsageError(
                f"unknown field {', '.join(sorted(strange))} in the {what}{hint}",
                remedy=f"there are {', '.join(sorted(FIELDS))}",
            )
        unknown = self.calls - _FUNCTIONS
        if unknown:
            raise UsageError(
                f"unknown function {', '.join(sorted(unknown))} in the {what}",
                remedy=f"there are {', '.join(sorted(_FUNCTIONS))}",
            )
        try:
            self._program = cel.compile(text)
        except ValueError as error:
            why = str(error).partition("ERROR: ")[2].partition("\n")[0] or str(error)
            raise UsageError(f"the {what} {text!r} is no CEL expression: {why}") from None
        self.needs_content = bool(self.names & CONTENT)

    def value(self, record: Callable[[str], Any]) -> Any:
        """Of one record, asked for its fields by name. Raises ValueError where CEL has an error."""
        try:
            return self._program.execute({name: record(name) for name in self.names if name in FIELDS})
        except Exception as error:  # of many classes, by what went wrong
            raise ValueError(str(error)) from None


class Predicate(Expression):
    """Which artifacts are wanted; ``""`` is all that are the latest."""

    def __init__(self, text: str) -> None:
        super().__init__(text.strip() or "true")
        if _is_no_condition(self.term):
            raise UsageError(
                f"the predicate {text!r} is neither true nor false", remedy="""compare it, as in name == "vpc-main\""""
            )
        self.latest_only = not self.names & {"version", "isLatest"}
        parts = self.term.parts if self.term.kind == "&&" else [self.term]
        known = [(part, sql) for part in parts if (sql := _sql(part)) is not None]
        self.is_sql = len(known) == len(parts)
        """Whether what SQL finds is the answer; otherwise each of that must be looked at."""
        self._scan = [sql for _, sql in known]
        self._leads = {at: sql for at, (part, _) in enumerate(known) if (sql := _leading(part)) is not None}

    def where(self, has_few: Callable[[str, Sequence[object]], bool]) -> Sql:
        """What SQL is asked; ``has_few`` says of a table and a condition whether an index finds few rows by it."""
        parts = list(self._scan)
        at = next((at for at, (text, values) in self._leads.items() if has_few(_rows_of(text), values)), None)
        if at is not None:
            parts[at] = self._leads[at]
        if self.latest_only:
            parts.append(("is_latest = 1" if at is None else "+is_latest = 1", ()))
        parts.sort(key=lambda part: "json_" in part[0])  # SQLite looks at them in this order: the dear ones last
        return _all(parts, " AND ") if parts else ANY

    def holds(self, record: Callable[[str], Any]) -> bool:
        """An error is no match."""
        try:
            return self.value(record) is True
        except ValueError:
            return False


def _is_no_condition(term: Term) -> bool:
    """Whether its value, or that of a part that has to be one, is surely neither true nor false."""
    if term.kind in ("&&", "||", "!"):
        return any(map(_is_no_condition, term.parts))
    if term.kind == "name":
        return term.value in TEXTS or term.value in NUMBERS or term.value == "tags"
    is_value = term.kind == "call" and term.value in _VALUES
    return is_value or term.kind in _NO_TRUTHS or (term.kind == "literal" and type(term.value) is not bool)


def _all(parts: list[Sql], sign: str) -> Sql:
    return sign.join(f"({text})" for text, _ in parts), tuple(value for _, values in parts for value in values)


def _leading(term: Term) -> Sql | None:
    """A condition as an index answers it, if one does; of several, one each."""
    if term.kind == "||":
        parts = [_leading(part) for part in term.parts]
        found = [part for part in parts if part is not None]
        return _all(found, " OR ") if len(found) == len(parts) else None
    if term.kind not in ("==", "in", "<", "<=", ">", ">="):
        return None
    is_tag = term.kind == "==" and any(_tag(part) is not None for part in term.parts)
    is_column = {**TEXTS, **NUMBERS}.get(str(_named(term))) in INDEXED
    return _sql(term, is_asked=True) if is_tag or is_column else None


def _rows_of(condition: str) -> str:
    """Where those are counted for which a condition holds."""
    return _TAGGED_ROWS if condition == _TAGGED else f"artifact WHERE {condition}"


def _named(term: Term) -> object:
    return next((part.value for part in term.parts if part.kind == "name"), None)


def _sql(term: Term, *, is_asked: bool = False) -> Sql | None:
    """The same in SQL; ``None`` where it may not be the same.

    ``is_asked``: whatever index can answer is to be used, and only whether it is true matters: it may be false where
    CEL fails. Elsewhere a column is written ``+column``, which keeps SQLite from using an index.
    """
    if term.kind in ("&&", "||"):
        parts = [_sql(part) for part in term.parts]
        found = [part for part in parts if part is not None]
        return _all(found, " AND " if term.kind == "&&" else " OR ") if len(found) == len(parts) else None
    if term.kind == "!":
        inner = _sql(term.parts[0])
        return None if inner is None else (f"NOT ({inner[0]})", inner[1])
    if term.kind == "literal" and type(term.value) is bool:
        return str(int(term.value)), ()
    if term.kind == "name" and term.value in TRUTHS:
        return f"+{TRUTHS[term.value]} = 1", ()
    handler = _HANDLERS.get(term.kind)
    return None if handler is None else handler(term, is_asked)


def _compared(term: Term, is_asked: bool) -> Sql | None:
    left, right = term.parts
    sign, plus = term.kind, "" if is_asked else "+"
    if left.kind == "literal":
        left, right, sign = right, left, _MIRRORED[sign]
    if right.kind != "literal":
        return None
    value = right.value
    if left.kind == "name" and left.value in TRUTHS:
        return (f"+{TRUTHS[left.value]} {sign} ?", (int(value),)) if type(value) is bool and sign in _EQUAL else None
    if left.kind == "name" and left.value in NUMBERS:
        is_fit = type(value) is int and -_MOST <= value < _MOST
        return (f"{plus}{NUMBERS[left.value]} {sign} ?", (value,)) if is_fit else None
    if not _is_text(value):
        return None
    if left.kind == "name" and left.value in TEXTS:
        return f"{plus}{TEXTS[left.value]} {sign} ?", (value,)
    key = _tag(left)
    if key is None:
        return None
    if is_asked and sign == "==":
        return _TAGGED, (key, value)
    path = _json_path(key)
    return None if path is None else (f"json_extract(tags, ?) {sign} ?", (path, value))


def _contained(term: Term, is_asked: bool) -> Sql | None:
    """``field in ["a", "b"]``, ``"key" in tags``."""
    what, where = term.parts
    if what.kind == "literal" and _is_text(what.value) and where.kind == "name" and where.value == "tags":
        return _has_tag(what.value)
    if where.kind != "list" or not where.parts or what.kind != "name":
        return None
    values = [part.value for part in where.parts if part.kind == "literal"]
    column = TEXTS.get(str(what.value)) if all(_is_text(value) for value in values) else None
    if column is None or len(values) < len(where.parts):
        return None
    plus = "" if is_asked else "+"
    return f"{plus}{column} IN ({', '.join('?' * len(values))})", tuple(values)


def _called(term: Term, is_asked: bool) -> Sql | None:
    target, *arguments = term.parts
    if term.value == "has" and len(arguments) == 1 and arguments[0].kind == "select":
        inner = arguments[0]
        is_tag = inner.parts[0].kind == "name" and inner.parts[0].value == "tags"
        return _has_tag(str(inner.value)) if is_tag else None
    if len(arguments) != 1 or arguments[0].kind != "literal" or not _is_text(arguments[0].value):
        return None
    sought = arguments[0].value
    if target.kind != "name" or target.value not in TEXTS or term.value not in _SEARCHES:
        return None
    if not sought:
        return ANY
    column = TEXTS[str(target.value)]
    if term.value == "startsWith":
        return f"substr({column}, 1, ?) = ?", (len(sought), sought)
    if term.value == "endsWith":
        return f"substr({column}, ?) = ?", (-len(sought), sought)
    return f"instr({column}, ?) > 0", (sought,)


def _has_tag(key: str) -> Sql | None:
    path = _json_path(key)
    return None if path is None else ("json_type(tags, ?) IS NOT NULL", (path,))


def _tag(term: Term) -> str | None:
    """Key of ``tags.key`` and ``tags["key"]``."""
    if term.kind not in ("select", "index") or term.parts[0].kind != "name" or term.parts[0].value != "tags":
        return None
    if term.kind == "select":
        return str(term.value)
    key = term.parts[1]
    return str(key.value) if key.kind == "literal" and _is_text(key.value) else None


def _json_path(key: str) -> str | None:
    return None if '"' in key or "\\" in key or not key.isprintable() else f'$."{key}"'


def _is_text(value: object) -> bool:
    """Text that a database can be asked for."""
    return isinstance(value, str) and not any(one == "\0" or "\ud800" <= one <= "\udfff" for one in value)


_EQUAL = ("==", "!=")
_MIRRORED = {"==": "==", "!=": "!=", "<": ">", ">": "<", "<=": ">=", ">=": "<="}
_SEARCHES = ("startsWith", "endsWith", "contains")
_TAGGED_ROWS = "tagged WHERE tag = (SELECT id FROM tag WHERE key = ? AND value = ?)"
_TAGGED = f"id IN (SELECT artifact FROM {_TAGGED_ROWS})"
_HANDLERS: Mapping[str, Callable[[Term, bool], Sql | None]] = {
    **dict.fromkeys(_MIRRORED, _compared),
    "in": _contained,
    "call": _called,
}
