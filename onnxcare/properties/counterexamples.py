"""Searching the input region of a formula for counterexamples: sampling, boundaries, and gradient descent.

Violations may be too rare to be met by chance. So the samples that came nearest to violating start a descent:
projected gradient steps on the margin, scaled to the region, whose widths shrink from a tenth of it to nothing. What a
repair left lies near what it took away, so the neighbourhood of known counterexamples is sampled as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcare.data import Inputs
from onnxcare.errors import DataError
from onnxcare.graph.model import Signature
from onnxcare.properties.vnnlib import Formula, Region

Array = np.ndarray
Outputs = Callable[[Inputs], Array]
# inputs, gradient with respect to the outputs (a function of them) -> outputs, gradient with respect to every input
Descent = Callable[[Inputs, Callable[[Array, slice], Array]], tuple[Array, dict[str, Array]]]

_WIDEST, _STEPS = 0.1, 40
# Spreads of the samples around known counterexamples, in powers of ten of the region's widths.
_SPREADS = (-2.5, -0.5)
# Rejection sampling of further input constraints gives up after so many draws a sample that is wanted.
_PATIENCE, _FEWEST = 200, 256


@dataclass(frozen=True)
class Space:
    """How the flat points of a formula become the inputs of the model.

    Attributes:
        signatures: the model's inputs, whose values follow each other.
        shapes: the shape of one sample of each.
    """

    signatures: tuple[Signature, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of values of a point."""
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in self.shapes)

    def inputs(self, points: Array) -> Inputs:
        """Return points [samples, values] as inputs."""
        found, start = {}, 0
        for signature, shape in zip(self.signatures, self.shapes, strict=True):
            width = int(np.prod(shape, dtype=np.int64))
            part = points[:, start : start + width]
            found[signature.name] = part.reshape(len(points), *shape).astype(signature.dtype)
            start += width
        return found

    def points(self, inputs: Inputs) -> Array:
        """Return inputs as points, float64."""
        sizes = [int(np.prod(shape, dtype=np.int64)) for shape in self.shapes]
        arrays = [inputs[item.name] for item in self.signatures]
        parts = [values.reshape(len(values), size) for values, size in zip(arrays, sizes, strict=True)]
        return np.concatenate(parts, axis=1).astype(np.float64)


def draw(region: Region, count: int, rng: np.random.Generator) -> Array:
    """Return points drawn evenly from a region, [count, values] float64, each a float32 number inside its box.

    Raises:
        DataError: its further constraints leave too little of the box to be found by chance.
    """
    low, high = _as_stored(region)
    found: list[Array] = []
    missing, patience = count, _PATIENCE * max(count, _FEWEST)
    while missing > 0:
        if patience <= 0:
            raise DataError("the formula's constraints on the inputs leave too little of their box to sample from")
        points = rng.uniform(low, high, (max(missing, _FEWEST), len(low)))
        patience -= len(points)
        points = points[_inside(region, points)]
        found.append(points[:missing])
        missing -= len(found[-1])
    return _rounded(np.concatenate(found), low, high) if found else np.zeros((0, len(low)))


def find(
    formula: Formula,
    space: Space,
    outputs: Outputs,
    descent: Descent | None,
    count: int,
    starts: int,
    rng: np.random.Generator,
    known: Array | None = None,
) -> Array:
    """Return counterexamples, [found, values].

    Args:
        formula: the unsafe set.
        space: how points become inputs.
        outputs: what the model answers.
        descent: gradients through the model; None where it has none, then only samples are tried.
        count: how many samples are drawn, over all regions.
        starts: how many descents are made, over all regions.
        rng: where samples come from.
        known: counterexamples of another model, whose neighbourhood is worth a look.
    """
    found = [np.zeros((0, space.size))]
    regions = len(formula.regions)
    for index, region in enumerate(formula.regions):
        points = draw(region, max(1, count // regions), rng)
        points = np.concatenate([points, _corners(region, points[: max(1, len(points) // 10)], rng)])
        if known is not None and len(known):
            points = np.concatenate([points, _near(region, known, max(1, count // regions), rng)])
        margin = formula.violation(index, outputs(space.inputs(points)))
        found.append(points[margin >= 0])
        if descent is None:
            continue
        # Half of the descents start where samples came nearest, the others anywhere.
        nearest = np.argsort(-np.where(margin >= 0, -np.inf, margin))[: max(1, starts // regions // 2)]
        begin = np.concatenate([points[nearest], points[rng.integers(0, len(points), len(nearest))]])
        found.append(_descend(formula, index, space, outputs, descent, begin))
    return np.concatenate(found)


def _descend(formula: Formula, index: int, space: Space, outputs: Outputs, descent: Descent, points: Array) -> Array:
    region = formula.regions[index]
    low, high = _as_stored(region)
    matrix = np.array([item.coefficients for item in region.outputs]).reshape(len(region.outputs), -1)
    bounds = np.array([item.bound for item in region.outputs])
    if not len(matrix):
        return np.zeros((0, len(low)))

    def seed(answers: Array, rows: slice) -> Array:
        flat = answers.reshape(len(answers), -1)
        # The margin is the least slack: its gradient is that of the constraint that is furthest from holding.
        tightest = (bounds - flat @ matrix.T).argmin(axis=1)
        return (-matrix[tightest]).reshape(answers.shape)

    points, left = points.copy(), np.arange(len(points))
    for step in np.linspace(_WIDEST, 0, _STEPS, endpoint=False):
        answers, gradients = descent(space.inputs(points[left]), seed)
        still = formula.violation(index, answers.reshape(len(answers), -1)) < 0
        slope = (space.points(gradients) * (high - low))[still]
        left = left[still]
        if not len(left):
            break
        # By the largest coordinate: the direction stays, and the scale of the gradient does not matter.
        size = np.abs(slope).max(axis=1, keepdims=True)
        way = np.divide(slope, size, out=np.zeros_like(slope), where=size > 0)
        moved = _rounded(points[left] + step * (high - low) * way, low, high)
        allowed = _inside(region, moved)
        points[left[allowed]] = moved[allowed]
    # The gradient's own graph may round differently: what counts is what the model answers.
    violating = formula.violation(index, outputs(space.inputs(points))) >= 0
    return points[violating]


def _near(region: Region, known: Array, count: int, rng: np.random.Generator) -> Array:
    """Return points around known counterexamples, and around the lines between two of them."""
    low, high = _as_stored(region)
    first, second = known[rng.integers(0, len(known), count)], known[rng.integers(0, len(known), count)]
    between = rng.uniform(0, 1, (count, 1)) * (rng.uniform(size=(count, 1)) < 0.5)
    spread = 10.0 ** rng.uniform(*_SPREADS, (count, 1)) * (high - low)
    points = _rounded(first + between * (second - first) + spread * rng.standard_normal(first.shape), low, high)
    return points[_inside(region, points)]


def _corners(region: Region, points: Array, rng: np.random.Generator) -> Array:
    """Push some coordinates of each point to an end of the box: networks misbehave near boundaries."""
    low, high = _as_stored(region)
    where = rng.integers(0, 3, points.shape)
    pushed = np.where(where == 0, low, np.where(where == 1, high, points))
    return pushed[_inside(region, pushed)]


def _inside(region: Region, points: Array) -> Array:
    kept = np.ones(len(points), bool)
    for item in region.inputs:
        kept &= points @ item.coefficients <= item.bound
    return kept


def _as_stored(region: Region) -> tuple[Array, Array]:
    """Return the ends of the box as float32 numbers inside it; where none lies inside, the nearest one."""
    low, high = region.low.astype(np.float32), region.high.astype(np.float32)
    low = np.where(low < region.low, np.nextafter(low, np.float32(np.inf)), low)
    high = np.where(high > region.high, np.nextafter(high, np.float32(-np.inf)), high)
    narrow = low > high
    low = np.where(narrow, region.low.astype(np.float32), low)
    return low.astype(np.float64), np.where(narrow, low, high).astype(np.float64)


def _rounded(points: Array, low: Array, high: Array) -> Array:
    """Return points as float32 numbers that lie in the box, in float64."""
    return np.clip(np.clip(points, low, high).astype(np.float32).astype(np.float64), low, high)
