"""How much of an input is left after slicing and reducing it, as far as the file tells.

Extents are the dimensions of a tensor, the first of which counts samples; None stands for an unknown one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

Array = np.ndarray
Extents = tuple[int | None, ...]

_OPEN = 1 << 31


def is_single(extents: Extents) -> bool:
    """Return whether a sample has one value. Where a dimension is left open, it has many."""
    return all(extent == 1 for extent in extents[1:])


def sliced(extents: Extents, starts: Array, ends: Array, axes: Array | None, steps: Array | None) -> Extents:
    """Return what a Slice with constant bounds leaves."""
    found = list(extents)
    axes = np.arange(len(starts)) if axes is None else axes
    steps = np.ones(len(starts)) if steps is None else steps
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=False):
        if -len(found) <= axis < len(found):
            found[int(axis)] = kept(int(start), int(end), int(step), found[int(axis)])
    return tuple(found)


def kept(start: int, end: int, step: int, extent: int | None) -> int | None:
    """Return the length of a slice, where both ends count from the same side or the extent is known."""
    if extent is not None:
        return len(range(*slice(start, end if abs(end) < _OPEN - 1 else None, step or 1).indices(extent)))
    if start < 0 and end >= _OPEN - 1:
        end = 0
    if abs(end) >= _OPEN - 1 or (start < 0) != (end <= 0):
        return None
    return len(range(start, end, step or 1))


def reduced(extents: Extents, axes: Array | Sequence[int] | None, keep: bool) -> Extents:
    """Return what a reduction over some axes, or over all, leaves."""
    rank = len(extents)
    gone = set(range(rank)) if axes is None else {int(axis) % rank for axis in axes} if rank else set()
    return tuple(1 if axis in gone else extent for axis, extent in enumerate(extents) if keep or axis not in gone)


def gathered(extents: Extents, axis: int, indices: int, rank: int) -> Extents | None:
    """Return what a Gather of that many indices leaves; None for samples, and for indices in a table."""
    if rank > 1 or not -len(extents) <= axis < len(extents) or axis % len(extents) == 0:
        return None
    axis %= len(extents)
    return extents[:axis] + (indices,) * rank + extents[axis + 1 :]
