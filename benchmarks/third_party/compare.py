"""How answers are compared, and what units are forced to."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from onnxcare.errors import OnnxcareError
from onnxcare.graph.sites import Site

Array = np.ndarray

TOLERANCE = 1e-5
# So many units of a site are forced, one at a time, to so many standard deviations above their mean.
_UNITS, _FAR = 2, 3.0


def spread(sites: Sequence[Site], most: int) -> list[Site]:
    """Return at most so many of the sites, evenly spaced."""
    return [sites[index] for index in sorted(set(np.linspace(0, len(sites) - 1, most).astype(int)))] if sites else []


class Forcing:
    """A few units of a site, each forced far above what it is.

    Attributes:
        masks: [P, 1, ...] 1 at the unit of the member.
        values: [P, 1, ...] what it is forced to.
    """

    def __init__(self, base: Array, site: Site) -> None:
        """Choose the units that vary most."""
        axis = site.axis % base.ndim
        others = tuple(index for index in range(base.ndim) if index != axis)
        mean, spread = (function(base, axis=others, dtype=np.float64) for function in (np.mean, np.std))
        units = np.argsort(-spread, kind="stable")[:_UNITS]
        shape = [len(units), *[1] * base.ndim]
        shape[1 + axis] = base.shape[axis]
        self.masks, self.values = np.zeros(shape, base.dtype), np.zeros(shape, base.dtype)
        for member, unit in enumerate(units):
            where = (member, *[0] * axis, unit)
            self.masks[where] = 1
            self.values[where] = mean[unit] + _FAR * max(float(spread[unit]), 0.1)


class Tally:
    """Comparisons at many sites."""

    def __init__(self) -> None:
        """Begin with none."""
        self._differences: dict[str, float] = {}
        self._moved: dict[str, float] = {}
        self._refused: dict[str, str] = {}

    def add(self, name: str, compare: Callable[[], tuple[float, float]]) -> None:
        """Make a comparison, and note it or the reason why it is refused."""
        try:
            self._differences[name], self._moved[name] = compare()
        except OnnxcareError as error:
            self._refused[name] = str(error)

    def facts(self) -> dict[str, Any]:
        """Return how many there were, the largest difference, and what was refused."""
        return {
            "compared": len(self._differences),
            "difference": max(self._differences.values(), default=None),
            "moved": sum(value > TOLERANCE for value in self._moved.values()),
            "differing": {name: value for name, value in self._differences.items() if not value <= TOLERANCE},
            "refused": len(self._refused),
            "refusals": counted(self._refused.values()),
        }


def difference(found: Array, wanted: Array, usual: float = 0.0) -> float:
    """Return the largest difference relative to the largest value, wanted or usual; infinity for other shapes."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if not found.size or np.array_equal(found, wanted):
        return 0.0
    if not np.issubdtype(found.dtype, np.number):
        return float("inf")
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return float("inf")
    finite = np.isfinite(wanted)
    scale = np.abs(wanted[finite]).max(initial=max(usual, np.finfo(np.float32).tiny))
    return float(np.abs(found[finite] - wanted[finite]).max(initial=0.0) / scale)


def counted(reasons: Iterable[str | None]) -> dict[str, int]:
    """Return how often each reason is given; None is none."""
    return dict(collections.Counter(reason for reason in reasons if reason))
