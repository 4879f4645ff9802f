"""Attributions: a score for every unit of a site, whichever locator gave it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcare.experiment import Activations
from onnxcare.graph.sites import Site

Array = np.ndarray
Response = Callable[[Array], Array]

# A unit whose range is below this share of the site's largest range does not move: it has no effect.
_DEAD = 1e-6


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


def spread_units(values: Array, site: Site, rank: int) -> Array:
    """Place [P, units] values on the unit axis of [P, 1, ...] arrays with `rank` axes behind the samples."""
    axis = site.axis if site.axis > 0 else rank + 1 + site.axis
    shape = [1] * (rank + 2)
    shape[0], shape[axis + 1] = values.shape
    return values.reshape(shape)


def by_unit(at: Activations, site: Site) -> Array:
    """Return the activations as [units, samples times positions]."""
    return np.moveaxis(at.base, site.axis, 0).reshape(site.units, -1)


def ranges(site: Site, *parts: Activations) -> tuple[Array, Array, Array]:
    """Return the smallest and largest activation of every unit over all parts, and which units are dead."""
    low = np.min([by_unit(at, site).min(axis=1) for at in parts], axis=0)
    high = np.max([by_unit(at, site).max(axis=1) for at in parts], axis=0)
    dead = high - low <= _DEAD * max(float((high - low).max()), 1e-30)
    return low, high, dead
