"""Attributions: a score for every unit of a site, whichever locator gave it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.runtime import batches

Array = np.ndarray


class Response(Protocol):
    """A quantity of every case: of scores [..., rows, classes] and the samples that the rows are, [..., cases]."""

    def __call__(self, scores: Array, samples: Dataset) -> Array:
        """Return it."""


# A unit whose range is below this share of the site's largest range does not move: it has no effect.
_DEAD = 1e-6
# At most so many scores are held at once, and activations of so many samples looked at.
_SCORES, _ROWS = 1 << 22, 256


@dataclass(frozen=True)
class Attribution:
    """A score for every unit of a site, with what it rests on.

    Attributes:
        site: the site.
        locator: what the scores are.
        scores: [units]; 0 for dead units.
        dead: [units] which units are constant over all samples.
        samples: how many samples the scores are averaged over.
    """

    site: Site
    locator: str
    scores: Array
    dead: Array
    samples: int

    def ranking(self) -> Array:
        """Return the live units, strongest first; equal scores keep their order."""
        live = np.flatnonzero(~self.dead)
        return live[np.argsort(-self.scores[live], kind="stable")]


@dataclass(frozen=True)
class Raced(Attribution):
    """Scores of which the top ones alone are sure.

    Attributes:
        cases: [units] how many cases each score rests on; 0 for who was screened out.
        finalists: [units] who belongs to the top of all sites together.
        rounds: units and cases of every round, over all sites.
        screened: whether units were screened by their derivatives before.
    """

    cases: Array
    finalists: Array
    rounds: Sequence[Mapping[str, int]]
    screened: bool

    def ranking(self) -> Array:
        """Return the live units, finalists first, strongest first."""
        live = np.flatnonzero(~self.dead)
        return live[np.lexsort((-self.scores[live], -self.cases[live], ~self.finalists[live]))]


def by_unit(activations: Array, site: Site) -> Array:
    """Return a site's activations as [units, samples times positions]."""
    return np.moveaxis(activations, site.axis, 0).reshape(site.units, -1)


def ranges(site: Site, parts: Iterable[Array]) -> tuple[Array, Array, Array]:
    """Return the smallest and largest activation of every unit over all parts, and which units are dead."""
    low, high = np.full(site.units, np.inf), np.full(site.units, -np.inf)
    for part in parts:
        axes = tuple(axis for axis in range(part.ndim) if axis != site.axis % part.ndim)
        low, high = np.minimum(low, part.min(axis=axes)), np.maximum(high, part.max(axis=axes))
    dead = high - low <= _DEAD * max(float((high - low).max()), 1e-30)
    return low, high, dead


def activations(experiment: Experiment, site: Site, *parts: Dataset) -> Iterator[Array]:
    """Yield a site's activations on all samples, as many at a time as a run takes."""
    for part in parts:
        for rows in batches(len(part), _ROWS):
            yield experiment.tensors([site.tensor], part.take(rows).inputs)[0]


def mean_activations(experiment: Experiment, site: Site, samples: Dataset) -> Array:
    """Return the mean activation of every unit over samples and positions, [units]."""
    parts = [(by_unit(part, site).mean(axis=1), len(part)) for part in activations(experiment, site, samples)]
    return np.average([mean for mean, _ in parts], axis=0, weights=[count for _, count in parts])


def units_together(experiment: Experiment, samples: int, values: int) -> int:
    """Return for how many units the scores under so many values may be held at once: they are averaged as they come."""
    return max(1, _SCORES // (samples * values * experiment.classes))


def rows_of_cases(cases: Array, rows_per_case: int) -> Array:
    """Return the rows of some cases, whose rows lie side by side."""
    rows: Array = (cases[:, None] * rows_per_case + np.arange(rows_per_case)).reshape(-1)
    return rows
