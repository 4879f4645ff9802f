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

from dataclasses import dataclass

import numpy as np

from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.locators.attribution import Array, Attribution, Response, activations, ranges, units_together
from onnxcare.runtime import batches
from onnxcare.sweep import Sweep


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
    low, high, dead = ranges(site, activations(experiment, site, over, bad))
    grid = np.linspace(low, high, values, axis=1)
    live = np.flatnonzero(~dead)
    expectation = np.zeros((site.units, values))
    for rows, held in sweep.pieces(over.inputs, rows_per_case):
        samples = over.take(rows)
        for part in batches(len(live), units_together(experiment, len(samples), values)):
            units = live[part]
            y = response(sweep.force(held, units, grid[units]), samples)
            expectation[units] += y.sum(axis=-1) * (rows_per_case / len(over))
    means = expectation.mean(axis=1)
    effects = expectation - means[:, None]
    scores = effects.max(axis=1) - effects.min(axis=1)
    return CausalEffects(site, "average causal effect", scores, dead, len(over), effects, grid, means)
