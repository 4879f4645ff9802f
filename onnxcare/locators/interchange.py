"""Interchange effects: how much of the misbehaviour goes when one unit takes the value it has without its cause.

With h(x) the activation of a site on a bad sample x and x* its twin,

    score_v = mean over bad x of  m(N(x)) - m(N(x) with h_v := h_v(x*))

where the margin m says how far the answer is on the wrong side; a probability would be saturated, and no single unit
would move it. Without twins the unit takes its mean over clean samples. A sweep of constants (`causal`) finds units
that can move the answer; an interchange finds those that carry the misbehaviour from its cause to the answer
(interchange intervention: Geiger et al., Causal Abstractions of Neural Networks, NeurIPS 2021).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    mean_activations,
    ranges,
    rows_of_cases,
    units_together,
)
from onnxcare.locators.race import Rules, race
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
    means, dead = _ordinary(experiment, site, clean, bad, twins)
    scores = np.zeros(site.units)
    before = margin(experiment.scores(bad.inputs), bad)
    live = np.flatnonzero(~dead)
    for units, cases, after in _exchanged(experiment, site, live, means, bad, twins, margin, rows_per_case):
        scores[units] += (before[cases] - after).sum(axis=-1) / len(before)
    return Attribution(site, "interchange effect", scores, dead, len(bad))


def raced_exchanges(
    experiment: Experiment,
    sites: Sequence[Site],
    clean: Dataset,
    bad: Dataset,
    twins: Dataset | None,
    margin: Response,
    rows_per_case: int,
    rules: Rules,
) -> list[Raced]:
    """Return interchange effects of which the top ones alone are settled, see `locators.race`.

    Args:
        experiment: the model.
        sites: where to look; the top is that of all of them together.
        clean: well-behaved samples.
        bad: samples that misbehave.
        twins: the same samples without the cause, row by row, or None.
        margin: maps scores and samples to m.
        rows_per_case: how many samples, side by side, make a case of m.
        rules: who is looked for.
    """
    ordinary = [_ordinary(experiment, site, clean, bad, twins) for site in sites]
    before = margin(experiment.scores(bad.inputs), bad)

    def measure(index: int, units: Array, chosen: Array) -> Array:
        rows = rows_of_cases(chosen, rows_per_case)
        some, other = bad.take(rows), None if twins is None else twins.take(rows)
        means = ordinary[index][0]
        effects = np.empty((len(units), 1, len(chosen)))
        place = np.zeros(sites[index].units, np.int64)
        place[units] = np.arange(len(units))
        for part, cases, after in _exchanged(
            experiment, sites[index], units, means, some, other, margin, rows_per_case
        ):
            effects[place[part], 0, cases] = before[chosen[cases]] - after
        return effects

    live = [np.flatnonzero(~dead) for _, dead in ordinary]
    counts = [site.units for site in sites]
    finish = race(measure, lambda effects: effects[:, 0], live, counts, len(before), rules)
    return [
        Raced(site, "interchange effect", scores, dead, len(bad), cases, finalists, finish.rounds, finish.screened)
        for site, (_, dead), scores, cases, finalists in zip(
            sites, ordinary, finish.scores, finish.cases, finish.finalists, strict=True
        )
    ]


def _ordinary(
    experiment: Experiment, site: Site, clean: Dataset, bad: Dataset, twins: Dataset | None
) -> tuple[Array | None, Array]:
    """Return the mean of every unit over clean samples, which twins make needless, and which units are dead."""
    _, _, dead = ranges(site, activations(experiment, site, clean, bad))
    return (mean_activations(experiment, site, clean) if twins is None else None), dead


def _exchanged(
    experiment: Experiment,
    site: Site,
    units: Array,
    means: Array | None,
    bad: Dataset,
    twins: Dataset | None,
    margin: Response,
    rows_per_case: int,
) -> Iterator[tuple[Array, slice, Array]]:
    """Yield some of the units, some of the cases, and the margins [units, cases] without what the units carry."""
    sweep = Sweep(experiment, site)
    for rows, held in sweep.pieces(bad.inputs, rows_per_case):
        samples = bad.take(rows)
        other = None if twins is None else sweep.hold(twins.take(rows).inputs)
        for part in batches(len(units), units_together(experiment, len(samples), 1)):
            some, of = units[part], partial(margin, samples=samples)
            if other is not None:
                after = sweep.exchange(held, other, some, of)
            else:
                assert means is not None
                after = sweep.force(held, some, means[some, None], of)[:, 0]
            yield some, slice(rows.start // rows_per_case, rows.stop // rows_per_case), after
