"""Average causal effects of hidden units (CARE; Sun, Sun, Pham, Shi: Causality-Based Neural Network Repair, ICSE 2022).

The network is read as a structural causal model: a unit v is forced to a value b for every input, everything behind it
is computed again, and the response y is averaged over well-behaved inputs X:

    IE_v(b)  = mean over x in X of y(N(x) with h_v := b)          interventional expectation
    ACE_v(b) = IE_v(b) - mean over b' of IE_v(b')                 average causal effect at b
    score_v  = max over b of ACE_v(b) - min over b of ACE_v(b)

The values b are evenly spaced over the range that the unit takes on clean and on bad inputs together. For a backdoor y
is the probability of the target class and X the clean samples. A unit on a convolution is a whole channel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcare.data import Dataset
from onnxcare.experiment import Activations, Experiment, Suffix
from onnxcare.graph.sites import Site
from onnxcare.runtime import batches

Array = np.ndarray
Response = Callable[[Array], Array]

# A unit whose range is below this share of the site's largest range does not move: it has no effect.
_DEAD = 1e-6
# Scores are averaged as they come: at most so many interventions are held at once.
_FAMILY = 64


@dataclass(frozen=True)
class Attribution:
    """A score for every unit of a site, with what it rests on.

    Attributes:
        site: the site.
        scores: [units] causal effect; 0 for dead units.
        effects: [units, values] ACE at every value; 0 for dead units.
        values: [units, values] the values each unit was forced to.
        dead: [units] which units are constant over all samples.
        samples: how many samples the expectations are over.
    """

    site: Site
    scores: Array
    effects: Array
    values: Array
    dead: Array
    samples: int

    def ranking(self) -> Array:
        """Return the live units, strongest first; equal scores keep their order."""
        live = np.flatnonzero(~self.dead)
        return live[np.argsort(-self.scores[live], kind="stable")]


def spread_units(values: Array, site: Site, rank: int) -> Array:
    """Place [P, units] values on the unit axis of [P, 1, ...] arrays with `rank` axes behind the samples."""
    axis = site.axis if site.axis > 0 else rank + 1 + site.axis
    shape = [1] * (rank + 2)
    shape[0], shape[axis + 1] = values.shape
    return values.reshape(shape)


def unit_range(at: Activations, site: Site) -> tuple[Array, Array]:
    """Return the smallest and largest activation of every unit, [units] each."""
    moved = np.moveaxis(at.base, site.axis, 0).reshape(site.units, -1)
    return moved.min(axis=1), moved.max(axis=1)


def average_causal_effects(
    experiment: Experiment,
    site: Site,
    clean: Dataset,
    bad: Dataset,
    response: Response,
    values: int = 8,
) -> Attribution:
    """Return the average causal effect of every unit of a site.

    Args:
        experiment: the model.
        site: the site.
        clean: well-behaved samples: the expectation is over them.
        bad: samples that widen the range of values.
        response: maps scores [..., samples, classes] to y, [..., samples].
        values: how many evenly spaced values, at least 2.
    """
    suffix = experiment.suffix(site.tensor, "affine")
    at = suffix.cache(clean.inputs)
    lows, highs = zip(unit_range(at, site), unit_range(suffix.cache(bad.inputs), site), strict=True)
    low, high = np.minimum(*lows), np.maximum(*highs)
    grid = np.linspace(low, high, values, axis=1)
    dead = high - low <= _DEAD * max(float((high - low).max()), 1e-30)
    live = np.flatnonzero(~dead)
    expectation = np.zeros((site.units, values))
    units, forced = np.repeat(live, values), grid[live].reshape(-1)
    means = [_responses(suffix, at, site, units[part], forced[part], response) for part in batches(len(units), _FAMILY)]
    if means:
        expectation[live] = np.concatenate(means).reshape(len(live), values)
    effects = expectation - expectation.mean(axis=1, keepdims=True)
    scores = effects.max(axis=1) - effects.min(axis=1)
    return Attribution(site, scores, effects, grid, dead, len(clean))


def _responses(suffix: Suffix, at: Activations, site: Site, units: Array, forced: Array, response: Response) -> Array:
    """Return the mean response under do(units[p] := forced[p]), [P]."""
    keep = np.ones((len(units), site.units), at.base.dtype)
    reference = np.zeros_like(keep)
    members = np.arange(len(units))
    keep[members, units] = 0
    reference[members, units] = forced
    rank = at.base.ndim - 1
    scores = suffix.affine(at, spread_units(keep, site, rank), spread_units(reference, site, rank))
    return response(scores).mean(axis=-1)
