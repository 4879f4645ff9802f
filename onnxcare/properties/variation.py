"""Protected attributes, and what a row becomes when they change: the variants that individual fairness compares."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcare.data import Dataset
from onnxcare.properties.base import Array
from onnxcare.spec import Protected

# More combinations than this are not enumerated: then one attribute changes at a time.
_MOST_VARIANTS = 64
# Values of a column that are as near as this are the same.
SAME = 1e-4


@dataclass(frozen=True)
class Attribute:
    """A protected attribute: its columns, and the values they take together, one row each.

    Attributes:
        name: what it is called.
        columns: [k] positions on the last axis of the input.
        values: [values, k].
    """

    name: str
    columns: Array
    values: Array

    @classmethod
    def of(cls, name: str, given: Protected) -> Attribute:
        """Read the spec's form."""
        if given.columns is not None:
            return cls(name, np.array(given.columns), np.eye(len(given.columns)))
        return cls(name, np.array([given.column]), np.array(given.values)[:, None])

    def groups(self, rows: Array) -> Array:
        """Return which value each row has, -1 for none of them, [rows]."""
        distance = np.abs(rows[:, None, self.columns] - self.values).max(axis=-1)
        return np.where(distance.min(axis=1) < SAME, distance.argmin(axis=1), -1)


@dataclass(frozen=True)
class Variation:
    """What protected attributes may be set to, in one input of the model.

    Attributes:
        input: the input.
        attributes: the protected attributes.
        settings: [variants, columns] every combination, the columns of all attributes side by side.
    """

    input: str
    attributes: tuple[Attribute, ...]
    settings: Array

    @classmethod
    def of(cls, input_name: str, attributes: Sequence[Attribute]) -> Variation:
        """Enumerate the combinations."""
        count = int(np.prod([len(item.values) for item in attributes]))
        if count > _MOST_VARIANTS and len(attributes) > 1:
            return cls(input_name, tuple(attributes), np.zeros((0, 0)))
        combined = itertools.product(*(item.values for item in attributes))
        return cls(input_name, tuple(attributes), np.array([np.concatenate(values) for values in combined]))

    @property
    def columns(self) -> Array:
        """The columns of all attributes."""
        return np.concatenate([item.columns for item in self.attributes])

    @property
    def rows_per_case(self) -> int:
        """A row, and all its variants."""
        return 1 + sum(len(part) for _, part in self._parts())

    def apply(self, clean: Dataset) -> Dataset:
        """Return every row, followed by its variants, case by case."""
        rows = clean.inputs[self.input]
        varied = np.repeat(rows[:, None], self.rows_per_case, axis=1)
        start = 1
        for columns, values in self._parts():
            for value in values:
                varied[:, start, columns] = value
                start += 1
        inputs = {
            name: np.repeat(values, self.rows_per_case, axis=0) for name, values in clean.inputs.items()
        } | {self.input: varied.reshape(-1, *rows.shape[1:])}  # fmt: skip
        labels = None if clean.labels is None else np.repeat(clean.labels, self.rows_per_case)
        return Dataset(inputs, labels)

    def frequencies(self, clean: Dataset) -> Array:
        """Return how often each variant's setting occurs in the data, [variants]; evenly where none does."""
        rows = clean.inputs[self.input]
        found = np.zeros(self.rows_per_case - 1)
        start = 0
        for columns, values in self._parts():
            for value in values:
                found[start] = (np.abs(rows[:, columns] - value).max(axis=1) < SAME).sum()
                start += 1
        return found / found.sum() if found.any() else np.full(len(found), 1 / len(found))

    def alone(self, attribute: Attribute) -> Variation:
        """Return the variation of one attribute."""
        return Variation.of(self.input, [attribute])

    def _parts(self) -> list[tuple[Array, Array]]:
        """Columns, and the values they take: all attributes together, or one after the other where that is too much."""
        if len(self.settings):
            return [(self.columns, self.settings)]
        return [(item.columns, item.values) for item in self.attributes]
