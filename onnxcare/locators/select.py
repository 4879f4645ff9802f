"""Choosing site, ranking and number of units by the measured effect of an intervention.

A high score says little by itself, and a fixed number of units at a fixed layer may do nothing at all. So the top k
units of every site, by every locator, are set to their mean over clean samples, for k = 1, 2, 5, 10 ..., and what that
does to bad and to clean samples decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import DataError, ModelError
from onnxcare.graph.outside import why_none
from onnxcare.graph.sites import Site
from onnxcare.locators import LOCATORS
from onnxcare.locators.attribution import Attribution, mean_activations
from onnxcare.locators.causal import average_causal_effects, raced_effects
from onnxcare.locators.differential import vote_units
from onnxcare.locators.interchange import interchange_effects, raced_exchanges
from onnxcare.locators.pairs import find_pairs, need_pairs
from onnxcare.locators.race import Rules
from onnxcare.panel import Outcome, Panel
from onnxcare.sweep import Sweep, spread_units

Array = np.ndarray

_SAMPLES = 128
_VALUES = 8
# Multiply-adds of full forward passes that the full table stands for: a few seconds on two cores, with what is saved.
_NO_RACE = 1e12
_NOTHING = "all hidden units are constant over the data"
_NO_SITES = "it has no hidden layer in front of a Gemm, MatMul or Conv"


@dataclass(frozen=True)
class Selection:
    """The units of one site that a repair should work on.

    Attributes:
        site: the site.
        locator: what the units are ranked by.
        ranking: the live units that were considered, strongest first.
        size: how many of them were best to set to their clean mean.
        outcome: what setting them to their clean mean does on the search part.
    """

    site: Site
    locator: str
    ranking: Array
    size: int
    outcome: Outcome

    @property
    def units(self) -> Array:
        """The chosen units, strongest first."""
        return self.ranking[: self.size]

    def larger(self) -> list[Array]:
        """Return the chosen units, and the larger sets that were considered."""
        return [self.ranking[:size] for size in _sizes(len(self.ranking)) if size >= self.size]

    def as_dict(self) -> dict[str, Any]:
        """Return it for a report."""
        return {
            "site": self.site.tensor,
            "locator": self.locator,
            "units": [int(unit) for unit in self.units],
            "excess": list(self.outcome.excess),
            "accuracy_drop": self.outcome.accuracy_drop,
            "recall_drop": self.outcome.recall_drop,
            "cost": self.outcome.cost,
        }


def attribute_sites(
    case: Case,
    sites: Sequence[Site],
    samples: int = _SAMPLES,
    values: int = _VALUES,
    locators: Sequence[str] = LOCATORS,
    rules: Rules | None = None,
) -> list[Attribution]:
    """Return the scores of every locator at every site, for the property they move most.

    Args:
        case: the model and the evidence.
        sites: where to look; those that cannot be cut open are left out as long as one can.
        samples: at most so many clean and bad samples of the repair part.
        values: how many values each unit is forced to for its average causal effect.
        locators: what to rank by.
        rules: race for these units only, instead of measuring every unit in full, where that would take long.

    Raises:
        ModelError: none of the sites can be cut open, or no unit of them ever changes.
    """
    panel = case.panel("repair", samples)
    if not any(len(evidence.bad) for evidence in panel.evidence):
        names = ", ".join(item.name for item in case.properties)
        raise DataError(f"no sample of the data shows {names}, so there is nothing to be located")
    pairs = []
    if "differential" in locators:
        pairs = need_pairs(case, samples) if len(locators) == 1 else find_pairs(case, samples)
    usable, failure = _usable(case, sites)
    work = sum(site.units for site in usable) * values * len(panel.clean) * case.experiment.multiply_adds
    if work <= _NO_RACE:
        rules = None
    found = _effects(case, panel, usable, values, locators, rules)
    for index, site in enumerate(usable if pairs else ()):
        case.progress(f"differences at {site.tensor} ({index + 1} of {len(usable)})")
        found += [vote_units(case.experiment, site, panel.clean, part) for part in pairs]
    found = [item for item in found if not item.dead.all()]
    if not found:
        raise failure
    strongest: dict[tuple[str, str], Attribution] = {}
    for item in found:
        key = (item.site.tensor, item.locator)
        if key not in strongest or item.scores.max() > strongest[key].scores.max():
            strongest[key] = item
    order = {site.tensor: number for number, site in enumerate(usable)}
    return sorted(strongest.values(), key=lambda item: order[item.site.tensor])


def _usable(case: Case, sites: Sequence[Site]) -> tuple[list[Site], ModelError]:
    """Return the sites that can be cut open, and what to say where nothing is found at them."""
    usable = []
    experiment = case.experiment
    why = _NOTHING if sites else _NO_SITES
    if not experiment.layers:
        why = f"no unit can be intervened on: {why_none(experiment.form.view, (), _NO_SITES)}"
    failure = ModelError(f"{experiment.model.path}: {why}")
    for site in sites:
        try:
            Sweep(case.experiment, site)
        except ModelError as error:
            failure = error
        else:
            usable.append(site)
    return usable, failure


def _effects(
    case: Case, panel: Panel, sites: Sequence[Site], values: int, locators: Sequence[str], rules: Rules | None
) -> list[Attribution]:
    """Return the effects that every property's evidence shows at every site."""
    experiment = case.experiment
    found: list[Attribution] = []
    for item, evidence in zip(case.properties, panel.evidence, strict=True):
        bad, twins, per_case = evidence.bad, evidence.twins, item.rows_per_case
        if not len(bad):
            continue
        over = item.observed(panel.clean, bad)
        # CARE's released code ranks by the mean for fairness; which ranking is better, its measured effect decides.
        by_mean = item.kind == "fairness"
        if rules is not None:
            case.progress(f"racing the units of {len(sites)} sites")
            if "causal" in locators:
                for mean in (False, True) if by_mean else (False,):
                    found += raced_effects(
                        experiment, sites, over, bad, item.response, values, per_case, rules, by_mean=mean
                    )
            if "interchange" in locators:
                found += raced_exchanges(experiment, sites, panel.clean, bad, twins, item.margin, per_case, rules)
            continue
        for index, site in enumerate(sites):
            case.progress(f"effects at {site.tensor} ({index + 1} of {len(sites)})")
            if "causal" in locators:
                causal = average_causal_effects(experiment, site, over, bad, item.response, values, per_case)
                found.append(causal)
                if by_mean:
                    found.append(causal.by_mean())
            if "interchange" in locators:
                found.append(interchange_effects(experiment, site, panel.clean, bad, twins, item.margin, per_case))
    return found


def select_units(case: Case, attributions: Sequence[Attribution], most: int | None = None) -> list[Selection]:
    """Return the best locator and number of top units for every site, the best site first.

    Raises:
        ModelError: no site can be cut open for the samples of the search part.
    """
    found: dict[str, Selection] = {}
    failure: ModelError | None = None
    for attribution in attributions:
        site = attribution.site
        case.progress(f"measuring the top units of {site.tensor}")
        try:
            selection = _select(case, attribution, most)
        except ModelError as error:
            failure = error
            continue
        rival = found.get(site.tensor)
        if rival is None or selection.outcome.cost < rival.outcome.cost:
            found[site.tensor] = selection
    if failure is not None and not found:
        raise failure
    return sorted(found.values(), key=lambda selection: selection.outcome.cost)


def _select(case: Case, attribution: Attribution, most: int | None) -> Selection:
    ranking = attribution.ranking()[:most]
    sizes = _sizes(len(ranking))
    outcomes = ablate(case, case.panel("search"), attribution.site, [ranking[:k] for k in sizes])
    best = min(range(len(sizes)), key=lambda index: outcomes[index].cost)
    return Selection(attribution.site, attribution.locator, ranking, sizes[best], outcomes[best])


def ablate(case: Case, panel: Panel, site: Site, sets: Sequence[Array]) -> list[Outcome]:
    """Return what setting each set of units to their mean over clean samples does on a panel."""
    suffix = case.experiment.suffix(site.tensor, "affine")
    means = mean_activations(case.experiment, site, panel.clean)
    keep = np.ones((len(sets), site.units))
    for row, units in zip(keep, sets, strict=True):
        row[units] = 0
    scores = []
    for _, at, _ in suffix.pieces(panel.inputs):
        rank = at.base.ndim - 1
        scores.append(suffix.affine(at, spread_units(keep, site, rank), spread_units(means[None], site, rank)))
    return panel.outcomes(np.concatenate(scores, axis=1))


def _sizes(live: int) -> list[int]:
    """Return 1, 2, 5, 10, 20, 50 ... and the number of live units itself."""
    sizes = [base * 10**power for power in range(7) for base in (1, 2, 5)]
    return [size for size in sizes if size < live] + [live]
