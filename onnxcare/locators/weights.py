"""Rankings of a layer's weights, by whichever locator: what repairs that change single weights choose from.

Differential localisation votes for single weights. Every locator ranks units, and a unit stands for all the weights
that write it, its bias included. So any locator goes with any repair.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.layers import Layer
from onnxcare.locators.attribution import Attribution
from onnxcare.locators.differential import WeightVotes, vote_weights
from onnxcare.locators.pairs import need_pairs
from onnxcare.locators.select import attribute_sites

Array = np.ndarray

_PAIRS = 100


@dataclass(frozen=True)
class WeightRanking:
    """Weights of one layer, most guilty first.

    Attributes:
        layer: the layer.
        locator: what they are ranked by.
        order: positions in the layer's flattened matrix, [groups, d (+ 1), outputs / groups].
        step: how many positions belong together: one for single weights, all of a unit's for units.
    """

    layer: Layer
    locator: str
    order: Array
    step: int = 1

    def sizes(self, shares: Sequence[float], most: int) -> list[int]:
        """Return how many weights shares of the layer stand for, each number once, and none beyond those ranked."""
        counts = {max(1, round(share * most / self.step)) * self.step for share in shares}
        return sorted({min(count, len(self.order)) for count in counts})

    def mask(self, size: int, shape: tuple[int, ...]) -> Array:
        """Return which values of the matrix are among the first `size`, bool."""
        found = np.zeros(shape, bool)
        found.reshape(-1)[self.order[:size]] = True
        return found


def rank_weights(case: Case, locators: Sequence[str]) -> tuple[list[WeightRanking], list[WeightVotes], dict[str, str]]:
    """Return rankings of the weights of every layer.

    Returns:
        The rankings, the votes for single weights, and why some layers have none.

    Raises:
        DataError: no sample misbehaves and has a reference that does not.
        ModelError: no layer could be ranked.
    """
    layers = case.experiment.open_layers
    rankings: list[WeightRanking] = []
    votes: list[WeightVotes] = []
    skipped: dict[str, str] = {}
    if "differential" in locators:
        pairs = need_pairs(case, _PAIRS)
        for index, layer in enumerate(layers):
            case.progress(f"differences at {layer.name} ({index + 1} of {len(layers)})")
            try:
                found = vote_weights(case, layer, pairs)
            except ModelError as error:
                skipped[layer.name] = str(error)
                continue
            votes.append(found)
            if found.located:
                rankings.append(WeightRanking(layer, "differential, weights", _with_bias(layer, found.ranking())))
            else:
                skipped[layer.name] = "no share of its weights brings any right answer back"
    try:
        attributions = attribute_sites(case, case.experiment.sites, locators=locators)
    except ModelError as error:
        attributions = []
        skipped["hidden units"] = str(error)
    by_name = {layer.name: layer for layer in layers}
    rankings += [
        _of_units(by_name[name], item)
        for item in attributions
        for name in item.site.writers
        if name in by_name and by_name[name].outputs == item.site.units
    ]
    if not rankings:
        refused = {layer.name: layer.refusal for layer in case.experiment.layers if layer.refusal}
        why = "; ".join(f"{name}: {reason}" for name, reason in list((skipped | refused).items())[:3])
        raise ModelError(f"{case.experiment.model.path}: nothing could be located in any layer: {why}")
    return rankings, votes, skipped


def _with_bias(layer: Layer, order: Array) -> Array:
    """Return positions in the product's matrix as positions in the one with a row for the bias."""
    if layer.bias is None:
        return order
    groups, d, outputs = layer.matrix_shape
    group, feature, output = np.unravel_index(order, (groups, d - 1, outputs))
    found: Array = np.ravel_multi_index((group, feature, output), (groups, d, outputs))
    return found


def _of_units(layer: Layer, attribution: Attribution) -> WeightRanking:
    shape = layer.matrix_shape
    units = attribution.ranking()
    group, output = np.divmod(units, shape[2])
    features = np.arange(shape[1])
    order = np.ravel_multi_index((group[:, None], features[None], output[:, None]), shape).reshape(-1)
    return WeightRanking(layer, f"{attribution.locator}, units", order, shape[1])
