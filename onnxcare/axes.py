"""Inputs whose samples lie on another axis than the first, or that take one value for all samples.

Everything works with samples on axis 0. An input with samples on axis a has that axis moved to the front, and one that
holds no samples has its value repeated for each. Only what runs the file itself (`Session`) lays them out as the model
takes them; the copy of experiments does so inside (`graph.batch`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

Array = np.ndarray
Axes = Mapping[str, int | None]
Shape = tuple[int | str | None, ...]


def samples_first(shape: Shape, axis: int | None) -> Shape:
    """Return the shape that an input has with its samples on axis 0, where the model has them on `axis`, or none."""
    if axis is None:
        return (None, *shape)
    return (shape[axis], *shape[:axis], *shape[axis + 1 :]) if axis else shape


def as_given(values: Array, axis: int | None) -> Array:
    """Return values with samples on axis 0 as the model takes them."""
    return np.asarray(values[0]) if axis is None else np.moveaxis(values, 0, axis)
