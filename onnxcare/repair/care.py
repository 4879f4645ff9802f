"""`--method care`: one multiplier per guilty unit, found by CMA-ES (CARE, ICSE 2022).

As published, the guilty units of a layer are those of highest average causal effect, their activations are multiplied
by r, and r is searched. Three things are done differently, because they were measured to decide the outcome: site
and number of units are chosen by the effect of an actual intervention, not fixed; the objective is smooth and has
a price for every class's recall; and CMA-ES takes the place of particle swarms. Multipliers, often negative, are folded
into the outgoing weights, which is exact for any factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxcare import cmaes
from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.graph.outside import why_none
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.sites import Site
from onnxcare.locators import LOCATORS
from onnxcare.locators.select import attribute_sites, select_units
from onnxcare.panel import Panel
from onnxcare.repair.base import Candidate, Found, Repair
from onnxcare.repair.choice import best_of
from onnxcare.suffix import Activations
from onnxcare.sweep import features_of, spread_units

Array = np.ndarray

_BOX = (-10.0, 10.0)
_MOST_UNITS = 100
_GENERATIONS, _PATIENCE = 400, 30
# A second site is searched only if ablating its units cost at most so many times what it cost at the best site.
_COMPARABLE = 1.5


@dataclass(frozen=True)
class _Searched:
    site: Site
    factors: Array
    candidate: Candidate


def repair(case: Case, locators: Sequence[str] = LOCATORS) -> Repair:
    """Search multipliers for the guilty units.

    Raises:
        ModelError: no site's multipliers can be folded into weights.
    """
    sites = [site for site in case.experiment.sites if hindrance_at(site) is None]
    if not sites:
        experiment = case.experiment
        reasons = [reason for reason in map(hindrance_at, experiment.sites) if reason]
        nothing = "it has no hidden layer in front of a Gemm, MatMul or Conv"
        why = "; ".join(reasons[:3]) or why_none(experiment.form.view, experiment.layers, nothing)
        raise ModelError(f"{experiment.model.path}: no multiplier can be folded into weights: {why}")
    attributions = attribute_sites(case, sites, locators=locators)
    selections = select_units(case, attributions, most=_MOST_UNITS)
    found, evaluations = [], 0
    limit = _COMPARABLE * selections[0].outcome.cost
    for selection in [item for item in selections if item.outcome.cost <= limit][:2]:
        # Ablation finds the units that matter; multipliers may need further ones to make up for their loss.
        for units in selection.larger():
            case.progress(f"searching {len(units)} multipliers at {selection.site.tensor}")
            item, count = _search(case, selection.site, units)
            found.append(item)
            evaluations += count
    best = min(found, key=lambda item: item.candidate.outcome.rank)
    details = {
        "selections": [selection.as_dict() for selection in selections],
        "site": best.site.tensor,
        "cmaes_evaluations": evaluations,
        "multipliers": {int(unit): float(best.factors[unit]) for unit in np.flatnonzero(best.factors != 1)},
    }
    offered = [Found(item.candidate, partial(fold, case, item.site, item.factors)) for item in found]
    return best_of("care", case, offered, details)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why no multiplier can be folded into a layer; None if one can."""
    read = [site for site in anatomy.sites if any(reader.name == layer.name for reader in site.readers)]
    if not read:
        return layer.refusal or f"it reads no hidden units: nothing hidden stands in front of {layer.input!r}"
    reasons = [hindrance_at(site) for site in read]
    return None if None in reasons else reasons[0]


def hindrance_at(site: Site) -> str | None:
    """Say why multipliers on a site's units cannot be folded into what reads them; None if they can."""
    return site.refusal


def _search(case: Case, site: Site, units: Array) -> tuple[_Searched, int]:
    suffix = case.experiment.suffix(site.tensor, "affine")

    def scores(panel: Panel, at: Activations, factors: Array) -> Array:
        keep = np.ones((len(factors), site.units), at.base.dtype)
        keep[:, units] = factors
        zero = np.zeros((1, site.units), at.base.dtype)
        rank = at.base.ndim - 1
        return suffix.affine(at, spread_units(keep, site, rank), spread_units(zero, site, rank))

    panel = case.panel("repair")
    at = suffix.cache(panel.inputs)

    def costs(factors: Array) -> Array:
        return panel.costs(scores(panel, at, factors))

    starts = (np.ones(len(units)), np.zeros(len(units)))
    runs = [
        cmaes.minimise(
            costs,
            start,
            sigma=0.5,
            seed=case.seed + index,
            bounds=_BOX,
            generations=_GENERATIONS,
            patience=_PATIENCE,
        )
        for index, start in enumerate(starts)
    ]
    best = cmaes.best_of(runs)
    validation = case.panel("validation")
    outcome = validation.outcomes(scores(validation, suffix.cache(validation.inputs), best.best[None]))[0]
    factors = np.ones(site.units)
    factors[units] = best.best
    label = f"{site.tensor}: {len(units)} multipliers"
    return _Searched(site, factors, Candidate(label, outcome)), sum(run.evaluations for run in runs)


def fold(case: Case, site: Site, factors: Array) -> dict[Parameter, Array]:
    """Return the readers' weights with one factor per unit of the site folded in.

    Raises:
        ModelError: a step between site and reader mixes units.
    """
    changed = {}
    for layer in site.readers:
        features = features_of(case.experiment, site, layer)
        if features is None:
            raise ModelError(f"layer {layer.name}: its inputs mix units of {site.tensor!r}, so nothing can be folded")
        by_feature = np.empty(layer.inputs)
        by_feature[features] = factors[:, None]
        changed[layer.weight] = layer.scale_inputs(by_feature, case.read(layer.weight))
    return changed
