"""Average causal effects of hidden units (CARE; Sun, Sun, Pham, Shi: Causality-Based Neural Network Repair, ICSE 2022).

The network is read as a structural causal model: a unit v is forced to a value b for every input, everything behind it
is computed again, and the response y is averaged over well-behaved inputs X:

    IE_v(b)  = mean over x in X of y(N(x) with h_v := b)          interventional expectation
    ACE_v(b) = IE_v(b) - mean over b' of IE_v(b')                 average causal effect at b
    score_v  = max over b of ACE_v(b) - min over b of ACE_v(b)

The values b are evenly spaced over the range that the unit takes on clean and on bad inputs together. For a backdoor y
is the probability of the target class and X the clean samples; for the other properties y is how far a case is on the
wrong side, and X the bad samples. CARE's released code ranks for fairness by mean over b of IE_v(b), highest first;
`by_mean` gives that ranking. A unit on a convolution is a whole channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.locators.attribution import (
    Array,
    Attribution,
    Raced,
    Response,
    activations,
    ranges,
    rows_of_cases,
    units_together,
)
from onnxcare.locators.race import Rules, race
from onnxcare.locators.screen import first_order
from onnxcare.runtime import batches
from onnxcare.sweep import Sweep

# Derivatives are taken on so many cases.
_SCREENED_ON = 8
# At so many values the response is measured in a race.
_NODES = 3


@dataclass(frozen=True)
class CausalEffects(Attribution):
    """Average causal effects; the score of a unit is the span of its effects.

    Attributes:
        effects: [units, values] ACE at every value; 0 for dead units.
        values: [units, values] the values each unit was forced to.
        means: [units] mean interventional expectation; 0 for dead units.
    """

    effects: Array
    values: Array
    means: Array

    def by_mean(self) -> Attribution:
        """Return the ranking by the mean interventional expectation, highest first, for live units."""
        low = float(self.means[~self.dead].min(initial=np.inf))
        scores = np.where(self.dead, 0.0, self.means - low)
        return Attribution(self.site, "mean interventional expectation", scores, self.dead, self.samples)


def average_causal_effects(
    experiment: Experiment,
    site: Site,
    over: Dataset,
    bad: Dataset,
    response: Response,
    values: int = 8,
    rows_per_case: int = 1,
) -> CausalEffects:
    """Return the average causal effect of every unit of a site.

    Args:
        experiment: the model.
        site: the site.
        over: samples that the expectation is over.
        bad: samples that widen the range of values.
        response: maps scores and samples to y.
        values: how many evenly spaced values, at least 2.
        rows_per_case: how many samples, side by side, make a case of y.
    """
    sweep = Sweep(experiment, site)
    grid, dead = _grid(experiment, site, over, bad, values)
    live = np.flatnonzero(~dead)
    expectation = np.zeros((site.units, values))
    for rows, held in sweep.pieces(over.inputs, rows_per_case):
        samples = over.take(rows)
        for part in batches(len(live), units_together(experiment, len(samples), values)):
            units = live[part]
            y = sweep.force(held, units, grid[units], partial(response, samples=samples))
            expectation[units] += y.sum(axis=-1) * (rows_per_case / len(over))
    means = expectation.mean(axis=1)
    effects = expectation - means[:, None]
    scores = effects.max(axis=1) - effects.min(axis=1)
    return CausalEffects(site, "average causal effect", scores, dead, len(over), effects, grid, means)


def raced_effects(
    experiment: Experiment,
    sites: Sequence[Site],
    over: Dataset,
    bad: Dataset,
    response: Response,
    values: int,
    rows_per_case: int,
    rules: Rules,
    by_mean: bool = False,
) -> list[Raced]:
    """Return average causal effects of which the top ones alone are settled, see `locators.race`.

    Args:
        experiment: the model.
        sites: where to look; the top is that of all of them together.
        over: samples that the expectation is over.
        bad: samples that widen the range of values.
        response: maps scores and samples to y.
        values: how many evenly spaced values, at least 2.
        rows_per_case: how many samples, side by side, make a case of y.
        rules: who is looked for.
        by_mean: rank by the mean interventional expectation instead of the span of the effects.
    """
    laid_out = [_grid(experiment, site, over, bad, values) for site in sites]
    grids, dead = [grid for grid, _ in laid_out], [gone for _, gone in laid_out]
    cases = len(over) // rows_per_case

    nodes, full = quadrature(values)

    def measure(index: int, units: Array, chosen: Array) -> Array:
        samples = over.take(rows_of_cases(chosen, rows_per_case))
        sweep = Sweep(experiment, sites[index])
        answers = np.empty((len(units), len(nodes), len(chosen)))
        held = list(sweep.pieces(samples.inputs, rows_per_case))
        for part in batches(len(units), units_together(experiment, len(samples), len(nodes))):
            forced = grids[index][units[part]][:, nodes]
            y = [sweep.force(h, units[part], forced, partial(response, samples=samples.take(r))) for r, h in held]
            answers[part] = np.concatenate(y, axis=-1)
        return answers

    def effect(answers: Array) -> Array:
        if by_mean:
            return np.einsum("v,uvc->uc", full.mean(axis=0), answers)
        means = answers.mean(axis=2) @ full.T
        weights = full[means.argmax(axis=1)] - full[means.argmin(axis=1)]
        return np.einsum("uv,uvc->uc", weights, answers)

    few = over.take(rows_of_cases(np.arange(min(cases, _SCREENED_ON)), rows_per_case))
    live = [np.flatnonzero(~gone) for gone in dead]
    likely = None if by_mean else first_order(experiment, sites, grids, few, response)
    finish = race(measure, effect, live, [site.units for site in sites], cases, rules, likely)
    name = "mean interventional expectation" if by_mean else "average causal effect"
    return [
        Raced(site, name, scores, gone, len(over), rested, finalists, finish.rounds, finish.screened)
        for site, gone, scores, rested, finalists in zip(
            sites, dead, finish.scores, finish.cases, finish.finalists, strict=True
        )
    ]


def quadrature(values: int) -> tuple[Array, Array]:
    """Return a few of so many evenly spaced values, and how the response at all follows from that at these.

    Between them it is taken to be a polynomial: averaged over many cases it is smooth, and mostly monotone.

    Returns:
        [nodes] indices, the ends among them, and the weights [values, nodes] of Lagrange's interpolation.
    """
    nodes = np.unique(np.linspace(0, values - 1, _NODES).round().astype(int))
    full = np.ones((values, len(nodes)))
    for column, node in enumerate(nodes):
        for other in nodes[nodes != node]:
            full[:, column] *= (np.arange(values) - other) / (node - other)
    return nodes, full


def _grid(experiment: Experiment, site: Site, over: Dataset, bad: Dataset, values: int) -> tuple[Array, Array]:
    """Return the values that units are forced to, [units, values], and which units are dead."""
    low, high, dead = ranges(site, activations(experiment, site, over, bad))
    return np.linspace(low, high, values, axis=1), dead
