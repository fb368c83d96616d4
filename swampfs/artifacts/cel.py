"""The syntax of CEL expressions, as far as it takes to know what one refers to and which part of it SQL can answer.

The library that evaluates them shows no tree. Here is the grammar of the CEL specification, without evaluation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

_TOKEN = re.compile(
    r"""\s+|//[^\n]*
    |(?P<string>[bB]?[rR]?(?:\"{3}(?:\\.|[^\\])*?\"{3}|'{3}(?:\\.|[^\\])*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')
        |[rR][bB](?:"[^"\n]*"|'[^'\n]*'))
    |(?P<double>\d+\.\d+(?:[eE][+-]?\d+)?|\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+)
    |(?P<uint>(?:0[xX][0-9a-fA-F]+|\d+)[uU])
    |(?P<int>0[xX][0-9a-fA-F]+|\d+)
    |(?P<name>[_a-zA-Z][_a-zA-Z0-9]*)
    |(?P<sign>&&|\|\||[<>=!]=|[-+*/%<>!?:.,()\[\]{}])""",
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|([0-3][0-7]{2})|(.))", re.DOTALL)
_SIMPLE = {"a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t", "v": "\v"}
MACROS = {"all", "exists", "exists_one", "map", "filter"}
_RELATIONS = {"<", "<=", ">=", ">", "==", "!=", "in"}
_DEEPEST = 100


@dataclass(slots=True)
class Term:
    """A node. ``kind``: ``literal``, ``name``, ``select``, ``index``, ``call``, ``list``, ``map``, or a sign."""

    kind: str
    value: Any = None
    parts: list[Term] = field(default_factory=list)


class SyntaxTrouble(ValueError):
    """The text is no expression of this grammar."""


class _Parser:
    def __init__(self, text: str) -> None:
        self._tokens: list[tuple[str, str]] = []
        at = 0
        while at < len(text):
            found = _TOKEN.match(text, at)
            if found is None:
                raise SyntaxTrouble(f"unexpected {text[at]!r}")
            if found.lastgroup:
                self._tokens.append((found.lastgroup, found.group()))
            at = found.end()
        self._at = 0
        self._depth = 0

    def whole(self) -> Term:
        term = self._expression()
        if self._at < len(self._tokens):
            raise SyntaxTrouble(f"unexpected {self._tokens[self._at][1]!r}")
        return term

    def _peek(self) -> str:
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def _take(self) -> tuple[str, str]:
        if self._at >= len(self._tokens):
            raise SyntaxTrouble("it ends too early")
        self._at += 1
        return self._tokens[self._at - 1]

    def _is(self, *signs: str) -> bool:
        return self._peek() in signs and self._tokens[self._at][0] != "string"

    def _accept(self, *signs: str) -> str:
        return self._take()[1] if self._is(*signs) else ""

    def _expect(self, sign: str) -> None:
        if not self._accept(sign):
            raise SyntaxTrouble(f"{sign!r} is missing")

    def _expression(self) -> Term:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise SyntaxTrouble("it nests too deeply")
        term = self._joined("||", self._and)
        if self._accept("?"):
            then = self._joined("||", self._and)
            self._expect(":")
            term = Term("?:", parts=[term, then, self._expression()])
        self._depth -= 1
        return term

    def _and(self) -> Term:
        return self._joined("&&", self._relation)

    def _joined(self, sign: str, below: Any) -> Term:
        parts = [below()]
        while self._accept(sign):
            parts.append(below())
        return parts[0] if len(parts) == 1 else Term(sign, parts=parts)

    def _relation(self) -> Term:
        term = self._binary(("+", "-"), lambda: self._binary(("*", "/", "%"), self._unary))
        while sign := self._accept(*_RELATIONS):
            right = self._binary(("+", "-"), lambda: self._binary(("*", "/", "%"), self._unary))
            term = Term(sign, parts=[term, right])
        return term

    def _binary(self, signs: tuple[str, ...], below: Any) -> Term:
        term: Term = below()
        while sign := self._accept(*signs):
            term = Term(sign, parts=[term, below()])
        return term

    def _unary(self) -> Term:
        signs = []
        while sign := self._accept("!", "-"):
            signs.append(sign)
        term = self._member()
        for sign in reversed(signs):
            is_number = sign == "-" and term.kind == "literal" and type(term.value) is int
            term = Term("literal", -term.value) if is_number else Term(sign, parts=[term])
        return term

    def _member(self) -> Term:
        term = self._primary()
        while sign := self._accept(".", "["):
            if sign == "[":
                term = Term("index", parts=[term, self._expression()])
                self._expect("]")
                continue
            kind, name = self._take()
            if kind != "name":
                raise SyntaxTrouble(f"{name!r} is no name of a field")
            if self._accept("("):
                term = Term("call", name, [term, *self._arguments(")")])
            else:
                term = Term("select", name, [term])
        return term

    def _arguments(self, end: str) -> list[Term]:
        found: list[Term] = []
        while not self._accept(end):
            if found:
                self._expect(",")
                if self._accept(end):
                    break
            found.append(self._expression())
        return found

    def _primary(self) -> Term:
        kind, text = self._take()
        if kind == "name":
            if text in ("true", "false", "null"):
                return Term("literal", {"true": True, "false": False, "null": None}[text])
            return (
                Term("call", text, [Term("none"), *self._arguments(")")]) if self._accept("(") else Term("name", text)
            )
        if kind == "sign":
            return self._bracketed(text)
        if kind == "int":
            return Term("literal", int(text, 0) if text[:2] in ("0x", "0X") else int(text))
        if kind == "string" and text[0] not in "bB" and text[:2].lower() not in ("rb", "br"):
            return Term("literal", _unquoted(text))
        return Term("other")  # a double, an unsigned number, bytes

    def _bracketed(self, sign: str) -> Term:
        if sign == "(":
            term = self._expression()
            self._expect(")")
            return term
        if sign == "[":
            return Term("list", parts=self._arguments("]"))
        if sign == "{":
            pairs: list[Term] = []
            while not self._accept("}"):
                if pairs:
                    self._expect(",")
                    if self._accept("}"):
                        break
                pairs.append(self._expression())
                self._expect(":")
                pairs.append(self._expression())
            return Term("map", parts=pairs)
        raise SyntaxTrouble(f"unexpected {sign!r}")


def _unquoted(text: str) -> str:
    is_raw = text[0] in "rR"
    body = text[1:] if is_raw else text
    quotes = 3 if body[:3] in ('"""', "'''") and len(body) >= 6 else 1
    body = body[quotes:-quotes]
    return body if is_raw else _ESCAPE.sub(_character, body)


def _character(found: re.Match[str]) -> str:
    for number, base in ((1, 16), (2, 16), (3, 16), (4, 8)):
        if found.group(number):
            return chr(int(found.group(number), base))
    return _SIMPLE.get(found.group(5), found.group(5))


def parse(text: str) -> Term:
    """Raises SyntaxTrouble."""
    try:
        return _Parser(text).whole()
    except SyntaxTrouble:
        raise
    except (ValueError, OverflowError, RecursionError) as error:  # of a character that there is none, too
        raise SyntaxTrouble(str(error)) from None


def free_names(term: Term, bound: frozenset[str] = frozenset()) -> set[str]:
    """What an expression refers to, without what its macros bind."""
    if term.kind == "name":
        return set() if term.value in bound else {str(term.value)}
    if term.kind == "call" and term.value in MACROS and len(term.parts) > 2 and term.parts[1].kind == "name":
        inner = bound | {str(term.parts[1].value)}
        return free_names(term.parts[0], bound).union(*(free_names(part, inner) for part in term.parts[2:]))
    return set().union(*(free_names(part, bound) for part in term.parts))


def functions(term: Term) -> set[str]:
    """Names of what an expression calls."""
    own = {str(term.value)} if term.kind == "call" else set()
    return own.union(*(functions(part) for part in term.parts))
