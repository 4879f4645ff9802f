"""How far protected attributes decide: one person at a time, and between groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Decide = Callable[[np.ndarray], np.ndarray]
"""Maps a batch of inputs to the decision about each, as booleans."""


@dataclass(frozen=True)
class Attribute:
    """A protected attribute.

    Attributes:
        names: what its values are called.
        columns: the input's columns that hold it.
        values: [values, columns] what the columns hold for each value.
    """

    names: tuple[str, ...]
    columns: tuple[int, ...]
    values: np.ndarray

    def members(self, x: np.ndarray, value: int) -> np.ndarray:
        """Return who has a value, as booleans."""
        found: np.ndarray = (x[:, self.columns] == self.values[value]).all(axis=1)
        return found


@dataclass(frozen=True)
class Group:
    """What the decisions look like in one group.

    Attributes:
        size: rows.
        truth: share that is truly positive.
        positive: share that is decided positive.
        accuracy: share of right decisions.
        true_positive: share of the truly positive that is decided positive.
        false_positive: share of the truly negative that is decided positive.
    """

    size: int
    truth: float
    positive: float
    accuracy: float
    true_positive: float
    false_positive: float


def discrimination(decide: Decide, x: np.ndarray, attributes: Sequence[Attribute]) -> float:
    """Return the share of rows whose decision changes with some combination of the attributes' values."""
    before = decide(x)
    changed = np.zeros(len(x), dtype=bool)
    for values in itertools.product(*(attribute.values for attribute in attributes)):
        other = x.copy()
        for attribute, value in zip(attributes, values, strict=True):
            other[:, attribute.columns] = value
        changed |= decide(other) != before
    return float(changed.mean())


def describe(decided: np.ndarray, y: np.ndarray) -> Group:
    """Return what decisions look like next to the truth."""
    truth = y == 1
    return Group(
        size=len(y),
        truth=float(truth.mean()),
        positive=float(decided.mean()),
        accuracy=float((decided == truth).mean()),
        true_positive=float(decided[truth].mean()),
        false_positive=float(decided[~truth].mean()),
    )
