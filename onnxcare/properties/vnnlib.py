"""VNN-LIB properties: reading the file, and telling which points violate it.

A VNN-LIB file asserts a formula over the inputs x and outputs y of a network. What it asserts is the *unsafe* set: a
point that satisfies the formula is a counterexample. In disjunctive normal form,

    violated(x, y) = any over regions of: low <= x <= high, and A x <= a, and B y <= b

Tensors are flattened in C order, several of them one after the other as they are declared. `vnnlib_text` parses the
text.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from onnxcare.errors import SpecError
from onnxcare.properties.vnnlib_text import parse

Array = np.ndarray

_MOST_REGIONS = 10_000
_MOST_VALUES = 10_000_000
# A value drawn in float32 between two bounds is off by a few roundings, relative to the larger bound.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)

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
        query, version = parse(path)
        reader = _Reader(query, version)
        return Formula(reader.regions(), reader.inputs, reader.size - reader.inputs, version)
    except SpecError as error:
        raise SpecError(f"{path}: {error}") from None


def _slack(size: Array) -> Array:
    return _ROUNDING * size + np.finfo(np.float32).tiny


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
