"""First-order screening: what forcing every unit would do, were the scores linear in it.

With J the derivative of the scores by a unit's activation, summed over its positions, the scores under do(v := b) are
about

    s(x) + b * sum_pos J(x) - sum_pos J(x) * h_v(x)

(attribution by Taylor expansion: Molchanov et al., Importance Estimation for Neural Network Pruning, CVPR 2019). The
response itself is not linearised: probabilities saturate where scores do not. All units of all sites come out of one
backward pass a class, so this costs next to nothing beside interventions; it only says where to look.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from onnxcare.backward import UnitSlopes
from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.sites import Site
from onnxcare.locators.attribution import Array, Response

# One backward pass a class is made, so many at most.
_MOST_CLASSES = 32


def first_order(
    experiment: Experiment, sites: Sequence[Site], grids: Sequence[Array], over: Dataset, response: Response
) -> list[Array] | None:
    """Return a first-order estimate of every unit's score: the span over its values of the mean response.

    Args:
        experiment: the model.
        sites: the sites.
        grids: [units, values] of every site: what its units are forced to.
        over: samples that the response is averaged over; few will do.
        response: maps scores and samples to a quantity of every case.

    Returns:
        [units] of every site, infinite for units whose derivative is zero everywhere, of which it says nothing (Sign,
        saturation); None where the scores have no derivative, or too many classes.
    """
    if experiment.classes > _MOST_CLASSES:
        return None
    try:
        slopes = UnitSlopes(experiment, sites)
    except NoGradient:
        return None
    scores, by_site = slopes(over.inputs)
    found = []
    for grid, (push, stretch) in zip(grids, by_site, strict=True):
        # [values, units, samples, classes]
        moved = scores + grid.T[:, :, None, None] * push - stretch
        mean = response(moved, over).mean(axis=-1)
        silent = ~push.any(axis=(1, 2)) & ~stretch.any(axis=(1, 2))
        found.append(np.where(silent, np.inf, mean.max(axis=0) - mean.min(axis=0)))
    return found
