"""What onnxcare does in the rows: the calls that are measured, one function each."""

from __future__ import annotations

import numpy as np

from onnxcare.case import Case
from onnxcare.data import Dataset, Inputs
from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.locators.attribution import Response
from onnxcare.locators.causal import CausalEffects, average_causal_effects, raced_effects
from onnxcare.locators.race import Rules
from onnxcare.properties.base import softmax
from onnxcare.sweep import Sweep, spread_units

Array = np.ndarray
Named = tuple[str, int]


def probability(scores: Array, samples: Dataset) -> Array:
    """Return the probability of the first class, [..., samples], whatever the samples are."""
    return softmax(scores)[..., 0]


def effects(
    experiment: Experiment, site: Site, clean: Dataset, bad: Dataset, response: Response, values: int
) -> CausalEffects:
    """Return the exact average causal effects of all units of a site."""
    return average_causal_effects(experiment, site, clean, bad, response, values)


def exact_top(table: list[CausalEffects], top: int) -> list[Named]:
    """Return the strongest units of a table, (tensor, unit), strongest first."""
    scored = [(item.scores[unit], item.site.tensor, int(unit)) for item in table for unit in item.ranking()[:top]]
    return [(tensor, unit) for _, tensor, unit in sorted(scored, reverse=True)[:top]]


def raced_top(
    experiment: Experiment,
    clean: Dataset,
    bad: Dataset,
    response: Response,
    top: int = 10,
    values: int = 16,
    confidence: float = 0.95,
) -> list[Named]:
    """Return the strongest units of all sites, (tensor, unit), strongest first, by the race of `locate`."""
    rules = Rules(top, confidence)
    found = raced_effects(experiment, experiment.sites, clean, bad, response, values, 1, rules)
    scored = [
        (item.scores[unit], item.site.tensor, int(unit)) for item in found for unit in np.flatnonzero(item.finalists)
    ]
    return [(tensor, unit) for _, tensor, unit in sorted(scored, reverse=True)[:top]]


def zeroed(experiment: Experiment, site: Site, inputs: Inputs) -> Array:
    """Return the scores with every unit of a site set to zero, one after the other, [units, samples, classes]."""
    sweep = Sweep(experiment, site)
    return sweep.force(sweep.hold(inputs), np.arange(site.units), np.zeros((site.units, 1)))[:, 0]


class Multipliers:
    """The scores of some inputs under multipliers on units of a site, as the search of `care` computes them."""

    def __init__(self, case: Case, site: Site, units: Array, inputs: Inputs) -> None:
        """Cut the graph at the site and cache what is in front of it."""
        self._suffix = case.experiment.suffix(site.tensor, "affine")
        self._at = self._suffix.cache(inputs)
        self._site, self._units, self._rank = site, units, self._at.base.ndim - 1
        self._zero = spread_units(np.zeros((1, site.units), self._at.base.dtype), site, self._rank)

    def scores(self, factors: Array) -> Array:
        """Return the scores [P, rows, classes] of factors [P, K]."""
        keep = np.ones((len(factors), self._site.units), self._at.base.dtype)
        keep[:, self._units] = factors
        return self._suffix.affine(self._at, spread_units(keep, self._site, self._rank), self._zero)
