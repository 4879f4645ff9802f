"""The text of VNN-LIB files, parsed by the package `vnnlib`.

The package parses version 2.0. Version 1.0 is rewritten as 2.0 before, token by token, on the same lines:

    (declare-const X_0 Real)    one network with X real [inputs] and Y real [outputs]
    X_3, Y_0                    X[3], Y[0]
    1e-3, 5, +.5                0.001, 5.0, 0.5
    =                           ==
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

from onnxcare.errors import SpecError

# The parser recurses, and takes the whole process down where a hostile file nests deeper than its stack.
_DEEPEST = 200
_COMMENT = re.compile(r'("[^"\n]*")|;[^\n]*')
_VERSION = re.compile(r"\(\s*vnnlib-version\s+<(\d+\.\d+)>\s*\)")
# Indices and sizes such as -1 and 0.5, which the package takes without a word.
_ODD_INDICES = re.compile(r"\[(?!\s*(?:\d+\s*(?:,\s*\d+\s*)*)?\])[^\]\n]*\]?")
_DECLARATION = re.compile(r"\( declare-(?:const|fun) ([XY])_(\d{1,9})(?: \( \))? Real \)")
_NAME = re.compile(r"([XY])_(\d{1,9})")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SAME_IN_BOTH = frozenset("( ) and or <= >= < > + - * ==".split())
_SYNTAX_ERROR = re.compile(r"Parse error: .* at line (\d+), column \d+: '(.*)'", re.DOTALL)


def parse(path: Path) -> tuple[Any, str]:
    """Return the package's tree of a file, and the version of the file.

    Raises:
        SpecError: the file is missing or not VNN-LIB, or the package vnnlib is not installed.
    """
    text = _read(path)
    header = _VERSION.search(text)
    if header is None and "vnnlib-version" in text:
        raise SpecError("the version cannot be read; write (vnnlib-version <2.0>)")
    version = header[1] if header else "1.0"
    if version not in ("1.0", "2.0"):
        raise SpecError(f"VNN-LIB {version} is not known; versions 1.0 and 2.0 can be read")
    if not re.search(r"\(\s*assert\b", text):
        raise SpecError("nothing is asserted; a property needs at least one (assert ...)")
    if version == "1.0":
        plain = _VERSION.sub(lambda found: "\n" * found[0].count("\n"), text)
        return _parse(_translate(plain), text), version
    if odd := _ODD_INDICES.search(text):
        raise SpecError(f"{_line(text, odd.start())}: {odd[0]} is no list of indices; write them as in X[0,3]")
    return _parse(text, text), version


def _line(text: str, position: int) -> str:
    return f"line {text.count(chr(10), 0, position) + 1}"


def _read(path: Path) -> str:
    """Return the text of a file without its comments, checked for what no parser should be fed."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise SpecError("no such file") from None
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise SpecError("not a text file; unpack it first if it is compressed")
    text = _COMMENT.sub(r"\1", text)
    if odd := re.search(r"[^\x00-\x7f]", text):
        raise SpecError(f"{_line(text, odd.start())}: {odd[0]!r} may stand in comments only")
    depth = 0
    for bracket in re.finditer(r"[()]", text):
        depth += 1 if bracket[0] == "(" else -1
        if depth > _DEEPEST:
            where = _line(text, bracket.start())
            raise SpecError(f"{where}: parentheses are nested more than {_DEEPEST} deep; flatten the term")
    return text


def _statements(text: str) -> Iterator[list[tuple[int, str]]]:
    """Yield the tokens of each top-level expression, with their lines."""
    statement: list[tuple[int, str]] = []
    depth = 0
    for number, line in enumerate(text.split("\n"), start=1):
        for token in re.findall(r"[()]|[^\s()]+", line):
            depth += {"(": 1, ")": -1}.get(token, 0)
            if depth < 0 or (depth == 0 and not statement):
                raise SpecError(f"line {number}: {token!r} stands outside of any parentheses")
            statement.append((number, token))
            if depth == 0:
                yield statement
                statement = []
    if statement:
        raise SpecError(f"line {statement[0][0]}: this parenthesis is never closed")


def _translate(text: str) -> str:
    """Return a text of version 1.0 as one of version 2.0, its assertions on the same lines."""
    declared: dict[str, set[int]] = {"X": set(), "Y": set()}
    body: list[str] = []
    written = 1
    for statement in _statements(text):
        words = [token for _, token in statement]
        line, head = statement[0][0], words[1]
        if head == "assert":
            # The grammar of 2.0 takes the parenthesis and the word as one token.
            for number, word in [(line, "(assert"), *((n, _word(n, t, declared)) for n, t in statement[2:])]:
                body += ["\n" * (number - written), word, " "]
                written = number
        elif head in ("declare-const", "declare-fun"):
            found = _DECLARATION.fullmatch(" ".join(words))
            if found is None:
                example = "(declare-const X_0 Real), with X for inputs and Y for outputs"
                raise SpecError(f"line {line}: this declaration cannot be read; write {example}")
            declared[found[1]].add(int(found[2]))
        elif head == "declare-network":
            raise SpecError(f"line {line}: this is VNN-LIB 2.0; put (vnnlib-version <2.0>) in front")
        else:
            raise SpecError(f"line {line}: {head!r} is not known; expected declare-const or assert")
    for letter, indices in declared.items():
        gap = next((index for index in range(max(1, len(indices))) if index not in indices), None)
        if gap is not None:
            raise SpecError(f"{letter}_{gap} is not declared; write (declare-const {letter}_{gap} Real)")
    tensors = f"(declare-input X real [{len(declared['X'])}]) (declare-output Y real [{len(declared['Y'])}])"
    return f"(vnnlib-version <2.0>) (declare-network N {tensors}) {''.join(body)}"


def _word(line: int, token: str, declared: dict[str, set[int]]) -> str:
    """Return one token of an assertion as version 2.0 writes it."""
    if token in _SAME_IN_BOTH:
        return token
    if token == "=":
        return "=="
    if name := _NAME.fullmatch(token):
        if int(name[2]) not in declared[name[1]]:
            raise SpecError(f"line {line}: {token} is not declared; write (declare-const {token} Real) before")
        return f"{name[1]}[{int(name[2])}]"
    if _NUMBER.fullmatch(token):
        value = float(token)
        if not math.isfinite(value) or 0 < abs(value) < sys.float_info.min:
            raise SpecError(f"line {line}: {reprlib.repr(token)} is out of the range of float64")
        digits = format(Decimal(repr(value)), "f")
        return digits if "." in digits else digits + ".0"
    raise SpecError(
        f"line {line}: {reprlib.repr(token)} is not supported; "
        "use and, or, <=, >=, <, >, =, +, -, *, numbers, and names such as X_0 and Y_0"
    )


def _parse(text: str, source: str) -> Any:
    """Return the package's tree of a text of version 2.0; errors quote the lines of the source."""
    try:
        from vnnlib import VNNLibException, parse_query_string
    except ImportError:
        raise SpecError("reading VNN-LIB needs the package vnnlib: pip install 'vnnlib>=1.0.2'") from None
    try:
        return parse_query_string(text)
    except IndexError:
        raise SpecError("a number is out of range; float64 and int64 hold all that may be written") from None
    except VNNLibException as error:
        raise SpecError(f"{_explain(str(error), source)}") from None


def _explain(message: str, source: str) -> str:
    """Return what the package complains about, in one line."""
    if syntax := _SYNTAX_ERROR.fullmatch(message):
        number, token = int(syntax[1]), syntax[2]
        if not token:
            return "the file ends in the middle of an expression; close the parentheses"
        line = source.split("\n")[number - 1].strip()
        advice = "; VNN-LIB 2.0 has no exponents: write 0.001 for 1e-3" if token[0] in "eE" else ""
        return f"line {number}: syntax error at {token!r} in {line[:80]}{advice}"
    try:
        first = json.loads(message)["errors"][0]
        return f"line {first['line']}: {first['offendingSymbol']}: {first['message']}. {first['hint']}"
    except (ValueError, LookupError, TypeError):
        return " ".join(message.split())
