"""VNN-LIB properties: reading the file, and telling which points violate it.

A VNN-LIB file asserts a formula over the inputs x and outputs y of a network. What it asserts is the *unsafe* set: a
point that satisfies the formula is a counterexample. In disjunctive normal form,

    violated(x, y) = any over regions of: low <= x <= high, and A x <= a, and B y <= b

The package `vnnlib` parses version 2.0. Version 1.0 is rewritten as 2.0 before, token by token, on the same lines:

    (declare-const X_0 Real)    one network with X real [inputs] and Y real [outputs]
    X_3, Y_0                    X[3], Y[0]
    1e-3, 5, +.5                0.001, 5.0, 0.5
    =                           ==

Tensors are flattened in C order, several of them one after the other as they are declared.
"""

from __future__ import annotations

import json
import math
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from onnxcare.errors import SpecError

Array = np.ndarray

_MOST_REGIONS = 10_000
_MOST_VALUES = 10_000_000
# The parser recurses, and takes the whole process down where a hostile file nests deeper than its stack.
_DEEPEST = 200
# A value drawn in float32 between two bounds is off by a few roundings, relative to the larger bound.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)

_COMMENT = re.compile(r'("[^"\n]*")|;[^\n]*')
_VERSION = re.compile(r"\(\s*vnnlib-version\s+<(\d+\.\d+)>\s*\)")
# Indices and sizes such as -1 and 0.5, which the package takes without a word.
_ODD_INDICES = re.compile(r"\[(?!\s*(?:\d+\s*(?:,\s*\d+\s*)*)?\])[^\]\n]*\]?")
_DECLARATION = re.compile(r"\( declare-(?:const|fun) ([XY])_(\d{1,9})(?: \( \))? Real \)")
_NAME = re.compile(r"([XY])_(\d{1,9})")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
_SAME_IN_BOTH = frozenset("( ) and or <= >= < > + - * ==".split())
_SYNTAX_ERROR = re.compile(r"Parse error: .* at line (\d+), column \d+: '(.*)'", re.DOTALL)
# How often, and with which sign, a comparison of left - right with zero becomes terms <= bound.
_SIGNS = {"LessEqual": (1,), "LessThan": (1,), "GreaterEqual": (-1,), "GreaterThan": (-1,), "Equal": (1, -1)}


@dataclass(frozen=True)
class Linear:
    """A linear constraint: coefficients @ values <= bound.

    Strict inequalities are read as non-strict ones: a point on the border counts as satisfying them.

    Attributes:
        coefficients: one for each input, or for each output; [n] float64.
        bound: the largest value allowed.
    """

    coefficients: Array
    bound: float


@dataclass(frozen=True)
class Region:
    """One conjunction of the formula in disjunctive normal form.

    Attributes:
        low: smallest values of the inputs, [inputs] float64.
        high: largest values of the inputs; never below `low`, and equal to it where an input is fixed.
        inputs: further constraints on the inputs, other than bounds of a single one.
        outputs: constraints on the outputs; where all of them hold, the property is violated.
    """

    low: Array
    high: Array
    inputs: tuple[Linear, ...]
    outputs: tuple[Linear, ...]

    @cached_property
    def _stacked(self) -> tuple[Array, Array, Array]:
        """Which outputs the constraints read, their coefficients [outputs read, constraints], and the bounds."""
        coefficients = np.array([item.coefficients for item in self.outputs])
        read = np.flatnonzero(coefficients.any(axis=0))
        return read, coefficients[:, read].T, np.array([item.bound for item in self.outputs])


@dataclass(frozen=True)
class Formula:
    """What a VNN-LIB file asserts: the property is violated where any region is satisfied.

    Attributes:
        regions: the conjunctions, in the order of the file.
        inputs: number of input values, flattened.
        outputs: number of output values, flattened.
        version: version of VNN-LIB in which the file is written, `1.0` or `2.0`.
    """

    regions: tuple[Region, ...]
    inputs: int
    outputs: int
    version: str

    def violation(self, region: int, outputs: Array) -> Array:
        """Return how far all output constraints of a region hold, [..., samples, outputs] -> [..., samples].

        This is the smallest of bound - coefficients @ y: negative where at least one constraint does not hold, and
        at least zero at a counterexample. It is infinite if the region constrains no output.
        """
        if not self.regions[region].outputs:
            return np.full(outputs.shape[:-1], np.inf)
        read, coefficients, bounds = self.regions[region]._stacked
        return (bounds - outputs[..., read].astype(np.float64) @ coefficients).min(axis=-1)

    def violated(self, inputs: Array, outputs: Array) -> Array:
        """Return which points are counterexamples.

        Bounds and constraints of the inputs are taken with a tolerance of a few float32 roundings, so that a
        sample drawn inside a box does not fall out of it; those of the outputs are taken exactly.

        Args:
            inputs: [samples, inputs].
            outputs: what a network, or several, answers to them: [..., samples, outputs].

        Returns:
            [..., samples] bool.
        """
        found = np.zeros(outputs.shape[:-1], bool)
        for index, inside in enumerate(self._inside(inputs)):
            if inside.any():
                found[..., inside] |= self.violation(index, outputs[..., inside, :]) >= 0
        return found

    def contains(self, inputs: Array) -> Array:
        """Return which inputs [samples, inputs] lie in the input set of any region, [samples] bool."""
        found = np.zeros(len(inputs), bool)
        for inside in self._inside(inputs):
            found |= inside
        return found

    def _inside(self, inputs: Array) -> Iterator[Array]:
        """Yield for each region which inputs lie in its input set."""
        values = inputs.astype(np.float64)
        # Regions that differ in the outputs alone share their box.
        boxes: dict[tuple[int, int], Array] = {}
        for region in self.regions:
            box = (id(region.low), id(region.high))
            if box not in boxes:
                slack = _slack(np.maximum(np.abs(region.low), np.abs(region.high)))
                boxes[box] = ((values >= region.low - slack) & (values <= region.high + slack)).all(axis=-1)
            inside = boxes[box]
            for item in region.inputs:
                size = np.abs(values) @ np.abs(item.coefficients) + abs(item.bound)
                inside = inside & (values @ item.coefficients <= item.bound + _slack(size))
            yield inside


def load_formula(path: Path) -> Formula:
    """Read a VNN-LIB file, version 1.0 or 2.0.

    Branches of the formula that no input satisfies, because its bounds contradict each other, are left out.

    Raises:
        SpecError: the file is missing or not VNN-LIB, or asserts what is no union of linear constraints on the inputs
            and on the outputs within bounded boxes; or the package vnnlib is not installed.
    """
    try:
        return _formula(_read(path))
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _formula(text: str) -> Formula:
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
        query = _parse(_translate(plain), text)
    elif odd := _ODD_INDICES.search(text):
        raise SpecError(f"{_line(text, odd.start())}: {odd[0]} is no list of indices; write them as in X[0,3]")
    else:
        query = _parse(text, text)
    reader = _Reader(query, version)
    return Formula(reader.regions(), reader.inputs, reader.size - reader.inputs, version)


def _slack(size: Array) -> Array:
    return _ROUNDING * size + np.finfo(np.float32).tiny


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


@dataclass(frozen=True)
class _Bound:
    """A bound of a single input, to one side."""

    index: int
    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True)
class _Constraint:
    """Any other constraint on inputs, or on outputs."""

    linear: Linear
    outputs: bool


_Clause = list[_Bound | _Constraint]


def _intersect(low: Array, high: Array, bounds: Iterable[_Bound]) -> tuple[Array, Array]:
    low, high = low.copy(), high.copy()
    for bound in bounds:
        low[bound.index] = max(low[bound.index], bound.low)
        high[bound.index] = min(high[bound.index], bound.high)
    return low, high


class _Reader:
    """Turns the package's tree of a formula into regions.

    Inputs and outputs are numbered through, outputs behind inputs.
    """

    def __init__(self, query: Any, version: str) -> None:
        if len(query.networks) != 1:
            raise SpecError(f"declares {len(query.networks)} networks; only properties of one can be repaired")
        self._query = query
        self._version = version
        self._tensors: dict[str, tuple[int, tuple[int, ...]]] = {}
        (network,) = query.networks
        self.inputs = self._declare(network.inputs, 0)
        self.size = self._declare(network.outputs, self.inputs)
        # The first input whose bounds contradict each other, with these.
        self._contradiction = ""

    def _declare(self, definitions: Iterable[Any], start: int) -> int:
        for definition in definitions:
            self._tensors[definition.name] = start, tuple(definition.shape)
            start += math.prod(definition.shape)
            if start > _MOST_VALUES:
                raise SpecError(f"{definition.name} has too many values; up to {_MOST_VALUES:,} will do")
        return start

    def regions(self) -> tuple[Region, ...]:
        shared, alternatives = self._conjunction(assertion.expr for assertion in self._query.assertions)
        everywhere = np.full(self.inputs, -np.inf), np.full(self.inputs, np.inf)
        common = _intersect(*everywhere, (item for item in shared if isinstance(item, _Bound)))
        constraints = [item for item in shared if isinstance(item, _Constraint)]
        boxes: dict[tuple[_Bound, ...], tuple[Array, Array] | None] = {}
        found = []
        for clause in alternatives:
            bounds = tuple(item for item in clause if isinstance(item, _Bound))
            if bounds not in boxes:
                boxes[bounds] = self._box(*_intersect(*common, bounds))
            box = boxes[bounds]
            if box is not None:
                linear = constraints + [item for item in clause if isinstance(item, _Constraint)]
                inputs = tuple(item.linear for item in linear if not item.outputs)
                outputs = tuple(item.linear for item in linear if item.outputs)
                found.append(Region(*box, inputs, outputs))
        if not found:
            reason = self._contradiction or "a comparison of constants is false"
            raise SpecError(f"no point satisfies what is asserted: {reason}")
        return tuple(found)

    def _box(self, low: Array, high: Array) -> tuple[Array, Array] | None:
        """Return the box that two sides span, or nothing where it is empty by more than rounding."""
        gap = low - high
        (crossed,) = np.nonzero(gap > _slack(np.maximum(np.abs(low), np.abs(high))))
        if crossed.size:
            index = int(crossed[0])
            bounds = f"at least {low[index]:.9g} and at most {high[index]:.9g}"
            self._contradiction = self._contradiction or f"{self._name(index)} would be {bounds}"
            return None
        for side, values in (("lower", low), ("upper", high)):
            (open_ends,) = np.nonzero(np.isinf(values))
            if open_ends.size:
                name = self._name(int(open_ends[0]))
                raise SpecError(f"input {name} has no {side} bound; assert one in every branch")
        middle = low + (high - low) / 2
        # Adding zero turns -0.0 into 0.0.
        return np.where(gap > 0, middle, low) + 0.0, np.where(gap > 0, middle, high) + 0.0

    def _name(self, index: int) -> str:
        """Return how the file calls an input."""
        if self._version == "1.0":
            return f"X_{index}"
        name = max((start, name) for name, (start, _) in self._tensors.items() if start <= index)[1]
        start, shape = self._tensors[name]
        return f"{name}[{','.join(str(i) for i in np.unravel_index(index - start, shape))}]" if shape else name

    def _conjunction(self, nodes: Iterable[Any]) -> tuple[_Clause, list[_Clause]]:
        """Return what all clauses of a conjunction share, and what each has besides."""
        shared: _Clause = []
        alternatives: list[_Clause] = [[]]
        for node in nodes:
            clauses = self._clauses(node)
            if len(clauses) == 1:
                shared += clauses[0]
            else:
                self._check_count(len(alternatives) * len(clauses))
                alternatives = [first + second for first in alternatives for second in clauses]
        return shared, alternatives

    def _clauses(self, node: Any) -> list[_Clause]:
        """Return the disjunctive normal form of a node."""
        kind = type(node).__name__
        if kind == "And":
            shared, alternatives = self._conjunction(node.args)
            return [shared + clause for clause in alternatives]
        if kind != "Or":
            return self._comparison(node)
        clauses: list[_Clause] = []
        for argument in node.args:
            clauses += self._clauses(argument)
        self._check_count(len(clauses))
        return clauses

    def _check_count(self, count: int) -> None:
        if count > _MOST_REGIONS:
            raise SpecError(
                f"written out, the formula is a disjunction of {count:,} regions; "
                f"{_MOST_REGIONS:,} can be handled, so split it into several files"
            )

    def _comparison(self, node: Any) -> list[_Clause]:
        kind = type(node).__name__
        if kind not in _SIGNS:
            raise self._refusal(node, f"{kind} is not supported; use <=, >=, <, > or ==")
        terms, constant = self._sum([(1.0, node.lhs), (-1.0, node.rhs)])
        terms = {index: value for index, value in terms.items() if value}
        if not all(map(math.isfinite, (constant, *terms.values()))):
            raise self._refusal(node, "the numbers overflow float64; scale them down")
        if not terms:
            # Of a comparison that depends on no value, all is border: here strict means strict.
            holds = all(sign * constant <= 0 for sign in _SIGNS[kind]) and (constant != 0 or not kind.endswith("Than"))
            return [[]] if holds else []
        return [[self._atom(node, terms, sign, -sign * constant) for sign in _SIGNS[kind]]]

    def _atom(self, node: Any, terms: dict[int, float], sign: int, bound: float) -> _Bound | _Constraint:
        """Return sign * terms <= bound as a bound, or as a constraint."""
        outputs = max(terms) >= self.inputs
        if outputs and min(terms) < self.inputs:
            raise self._refusal(node, "inputs and outputs are compared with each other; keep them apart")
        if not outputs and len(terms) == 1:
            ((index, value),) = terms.items()
            limit = bound / (sign * value)
            if not math.isfinite(limit):
                raise self._refusal(node, "the bound overflows float64; scale the numbers")
            return _Bound(index, high=limit) if sign * value > 0 else _Bound(index, low=limit)
        start = self.inputs if outputs else 0
        coefficients = np.zeros(self.size - self.inputs if outputs else self.inputs)
        for index, value in terms.items():
            coefficients[index - start] = sign * value
        return _Constraint(Linear(coefficients, bound + 0.0), outputs)

    def _sum(self, parts: Iterable[tuple[float, Any]]) -> tuple[dict[int, float], float]:
        """Return the coefficients and the constant of a weighted sum of nodes."""
        terms: dict[int, float] = {}
        constant = 0.0
        for weight, part in parts:
            more, number = self._linear(part)
            constant += weight * number
            for index, value in more.items():
                terms[index] = terms.get(index, 0.0) + weight * value
        return terms, constant

    def _linear(self, node: Any) -> tuple[dict[int, float], float]:
        """Return the coefficients and the constant of an arithmetic node.

        The package could do this, but drops coefficients below 1e-9.
        """
        kind = type(node).__name__
        if kind == "Var":
            return {self._position(node): 1.0}, 0.0
        if kind in ("Float", "Int"):
            return {}, float(node.lexeme)
        if kind == "Negate":
            return self._sum([(-1.0, node.expr)])
        if kind == "Plus":
            return self._sum([(1.0, part) for part in node.args])
        if kind == "Minus":
            return self._sum([(1.0, node.head), *((-1.0, part) for part in node.rest)])
        if kind != "Multiply":
            raise self._refusal(node, f"{kind} is not supported; use +, - and *")
        terms: dict[int, float] = {}
        constant = 1.0
        for part in node.args:
            more, number = self._linear(part)
            if terms and more:
                raise self._refusal(node, "variables are multiplied with each other; only linear terms can be read")
            terms = {index: value * (number if terms else constant) for index, value in (terms or more).items()}
            constant *= number
        return terms, constant

    def _position(self, node: Any) -> int:
        if node.name not in self._tensors:
            raise self._refusal(node, f"{node.name} is a hidden tensor; only inputs and outputs can be constrained")
        start, shape = self._tensors[node.name]
        flat = 0
        for index, size in zip(node.indices, shape, strict=True):
            flat = flat * size + index
        return start + flat

    def _refusal(self, node: Any, reason: str) -> SpecError:
        while type(node).__name__ not in ("Var", "Float", "Int"):
            node = node.children()[0]
        return SpecError(f"line {node.line}: {reason}")
