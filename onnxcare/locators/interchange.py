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
from onnxcare.locators.attribution import Attribution, Response, by_unit, ranges, spread_units
from onnxcare.runtime import batches

# Scores are averaged as they come: at most so many interventions are held at once.
_FAMILY = 64


def interchange_effects(
    experiment: Experiment, site: Site, clean: Dataset, bad: Dataset, twins: Dataset | None, margin: Response
) -> Attribution:
    """Return the interchange effect of every unit of a site.

    Args:
        experiment: the model.
        site: the site.
        clean: well-behaved samples.
        bad: samples that misbehave.
        twins: the same samples without the cause, row by row, or None.
        margin: maps scores [..., samples, classes] to m, [..., samples].
    """
    suffix = experiment.suffix(site.tensor, "affine")
    at, ordinary = suffix.cache(bad.inputs), suffix.cache(clean.inputs)
    rank = at.base.ndim - 1
    if twins is not None:
        reference = suffix.cache(twins.inputs).base[None]
    else:
        reference = spread_units(by_unit(ordinary, site).mean(axis=1)[None], site, rank)
    _, _, dead = ranges(site, ordinary, at)
    live = np.flatnonzero(~dead)
    scores = np.zeros(site.units)
    nothing = spread_units(np.ones((1, site.units), at.base.dtype), site, rank)
    before = margin(suffix.affine(at, nothing, np.zeros_like(nothing))).mean()
    for part in batches(len(live), _FAMILY):
        keep = np.ones((part.stop - part.start, site.units), at.base.dtype)
        keep[np.arange(len(keep)), live[part]] = 0
        answers = suffix.affine(at, spread_units(keep, site, rank), reference)
        scores[live[part]] = before - margin(answers).mean(axis=-1)
    return Attribution(site, "interchange effect", scores, dead, len(bad))
