"""Safety properties over boxes of inputs: written as VNN-LIB, sampled and counted.

A property describes what is unsafe: the input lies in one of the boxes, and the outputs satisfy one of the conditions.
A condition is a list of pairs (lesser, greater) of outputs, all of which have to hold as lesser <= greater.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Run = Callable[[np.ndarray], np.ndarray]
Bounds = tuple[float, float]
Condition = tuple[tuple[int, int], ...]

_ROWS_AT_ONCE = 1_000_000


def least(output: int, outputs: int) -> Condition:
    """Return the condition that no other output is below this one."""
    return tuple((output, other) for other in range(outputs) if other != output)


def greatest(output: int, outputs: int) -> Condition:
    """Return the condition that no other output is above this one."""
    return tuple((other, output) for other in range(outputs) if other != output)


@dataclass(frozen=True)
class Property:
    """What must not happen.

    Attributes:
        name: how specifications call it.
        says: what holds where the property is kept, in words.
        common: lower and upper bound of every input, for all boxes; None where the boxes differ.
        boxes: the bounds of the inputs that are None in `common`, for every box; empty for a single box.
        conditions: any of them is unsafe.
        outputs: number of outputs.
    """

    name: str
    says: tuple[str, ...]
    common: tuple[Bounds | None, ...]
    boxes: tuple[tuple[Bounds, ...], ...]
    conditions: tuple[Condition, ...]
    outputs: int

    def full_boxes(self) -> list[list[Bounds]]:
        """Return the bounds of every input, box by box."""
        boxes = []
        for box in self.boxes or ((),):
            own = iter(box)
            boxes.append([bounds if bounds is not None else next(own) for bounds in self.common])
        return boxes

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw points evenly from the boxes, each of which gets the same number."""
        parts = []
        for box, share in zip(self.full_boxes(), np.array_split(np.arange(count), len(self.full_boxes())), strict=True):
            # Fixed inputs may have 0.0 and -0.0 as bounds; in float32 a point must not leave the box.
            low, high = np.sort(np.array(box), axis=1).T
            points = rng.uniform(low, high, (len(share), len(box))).astype(np.float32)
            parts.append(np.clip(points, _float32_above(low), _float32_below(high)))
        return np.concatenate(parts)

    def unsafe(self, y: np.ndarray) -> np.ndarray:
        """Return which outputs [N, outputs] are unsafe."""
        found = np.zeros(len(y), dtype=bool)
        for condition in self.conditions:
            lesser, greater = np.array(condition).T
            found |= (y[:, lesser] <= y[:, greater]).all(axis=1)
        return found

    def count(self, run: Run, count: int, seed: int) -> int:
        """Return how many of so many points are unsafe."""
        rng = np.random.default_rng(seed)
        found = 0
        for start in range(0, count, _ROWS_AT_ONCE):
            found += int(self.unsafe(run(self.draw(rng, min(_ROWS_AT_ONCE, count - start)))).sum())
        return found


def vnnlib(item: Property) -> str:
    """Write a property in VNN-LIB 1.0."""
    declared = [f"(declare-const X_{index} Real)" for index in range(len(item.common))]
    declared += [f"(declare-const Y_{index} Real)" for index in range(item.outputs)]
    return _text(item, declared, "X_{}".format, "Y_{}".format)


def vnnlib2(item: Property) -> str:
    """Write a property in VNN-LIB 2.0, for a network that takes one sample, [1, inputs], and gives [1, outputs]."""
    declared = [
        "(vnnlib-version <2.0>)",
        "",
        "(declare-network N",
        f"    (declare-input  X float32 [1, {len(item.common)}])",
        f"    (declare-output Y float32 [1, {item.outputs}])",
        ")",
    ]
    return _text(item, declared, "X[0,{}]".format, "Y[0,{}]".format)


def _text(item: Property, declared: Sequence[str], x: Callable[[int], str], y: Callable[[int], str]) -> str:
    def within(index: int, bounds: Bounds) -> list[str]:
        return [f"(>= {x(index)} {bounds[0]})", f"(<= {x(index)} {bounds[1]})"]

    lines = [*declared, ""]
    for index, bounds in enumerate(item.common):
        if bounds is not None:
            lines += [f"(assert {term})" for term in within(index, bounds)]
    differing = [index for index, bounds in enumerate(item.common) if bounds is None]
    if item.boxes:
        terms = [
            [term for index, bounds in zip(differing, box, strict=True) for term in within(index, bounds)]
            for box in item.boxes
        ]
        lines += ["", *_any(terms)]
    outputs = [[f"(<= {y(lesser)} {y(greater)})" for lesser, greater in condition] for condition in item.conditions]
    lines += ["", *(_any(outputs) if len(outputs) > 1 else [f"(assert {term})" for term in outputs[0]])]
    notes = [f"; {line}".rstrip() for line in item.says]
    # The version has to come first in 2.0; a comment may.
    return "\n".join([*notes, *lines]) + "\n"


def _any(conjunctions: Sequence[Sequence[str]]) -> list[str]:
    return ["(assert (or", *(f"    (and {' '.join(terms)})" for terms in conjunctions), "))"]


def _float32_above(values: np.ndarray) -> np.ndarray:
    near = values.astype(np.float32)
    return np.where(near < values, np.nextafter(near, np.float32(np.inf)), near)


def _float32_below(values: np.ndarray) -> np.ndarray:
    return -_float32_above(-values)
