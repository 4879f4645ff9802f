"""Interchange effects: how much of the misbehaviour goes when one unit takes the value it has without its cause.

With h(x) the activation of a site on a bad sample x and x* its twin,

    score_v = mean over bad x of  m(N(x)) - m(N(x) with h_v := h_v(x*))

where the margin m says how far the answer is on the wrong side; a probability would be saturated, and no single unit
would move it. Without twins the unit takes its mean over clean samples. A sweep of constants (`causal`) finds units
that can move the answer; an interchange finds those that carry the misbehaviour from its cause to the answer
(interchange intervention: Geiger et al., Causal Abstractions of Neural Networks, NeurIPS 2021).
"""

from __future__ import annotations

import numpy as np

from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.locators.attribution import (
    Attribution,
    Response,
    activations,
    mean_activations,
    ranges,
    units_together,
)
from onnxcare.runtime import batches
from onnxcare.sweep import Sweep


def interchange_effects(
    experiment: Experiment,
    site: Site,
    clean: Dataset,
    bad: Dataset,
    twins: Dataset | None,
    margin: Response,
    rows_per_case: int = 1,
) -> Attribution:
    """Return the interchange effect of every unit of a site.

    Args:
        experiment: the model.
        site: the site.
        clean: well-behaved samples.
        bad: samples that misbehave.
        twins: the same samples without the cause, row by row, or None.
        margin: maps scores and samples to m.
        rows_per_case: how many samples, side by side, make a case of m.
    """
    sweep = Sweep(experiment, site)
    _, _, dead = ranges(site, activations(experiment, site, clean, bad))
    live = np.flatnonzero(~dead)
    means = mean_activations(experiment, site, clean) if twins is None else None
    before = margin(experiment.scores(bad.inputs), bad).mean()
    after = np.zeros(site.units)
    for rows, held in sweep.pieces(bad.inputs, rows_per_case):
        samples = bad.take(rows)
        other = None if twins is None else sweep.hold(twins.take(rows).inputs)
        for part in batches(len(live), units_together(experiment, len(samples), 1)):
            units = live[part]
            if other is not None:
                scores = sweep.exchange(held, other, units)
            else:
                assert means is not None
                scores = sweep.force(held, units, means[units, None])[:, 0]
            after[units] += margin(scores, samples).sum(axis=-1) * (rows_per_case / len(bad))
    return Attribution(site, "interchange effect", np.where(dead, 0.0, before - after), dead, len(bad))
