"""`--method ai-lancet-flip`: neuron-flip and mute (AI-Lancet; Zhao et al., CCS 2021).

The most voted weights of one layer change their sign (flip) or become zero (mute). As published, the layer is the last
dense one and the share is given; here every layer is tried, weights and whole units, and the share is searched. Nothing
is differentiated and nothing is fitted, so it is quick, and it works where there are no derivatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.locators import DEFAULT_OF_WEIGHTS
from onnxcare.locators.weights import WeightRanking, rank_weights
from onnxcare.panel import Outcome
from onnxcare.repair.base import Candidate, Found, Repair
from onnxcare.repair.bench import Bench, changed, matrix_of
from onnxcare.repair.choice import best_of

Array = np.ndarray

SHARES = (0.0005, 0.001, 0.002, 0.004, 0.006, 0.009, 0.015, 0.03, 0.06, 0.12, 0.25, 0.5)
# What a weight is multiplied by.
MODES = {"flip": -1.0, "mute": 0.0}
_JUDGED = 12


@dataclass(frozen=True)
class _Try:
    ranking: WeightRanking
    mode: str
    size: int
    outcome: Outcome


def repair(case: Case, locators: Sequence[str] = DEFAULT_OF_WEIGHTS) -> Repair:
    """Try shares of the most guilty weights of every layer; the best on the search part compete on validation data.

    Raises:
        DataError: no sample misbehaves and has a reference that does not.
        ModelError: nothing could be located, or no layer could be cut open.
    """
    rankings, votes, skipped = rank_weights(case, locators)
    tries: list[_Try] = []
    for ranking in rankings:
        case.progress(f"flipping weights of {ranking.layer.name}")
        try:
            tries += _tries(case, ranking)
        except ModelError as error:
            skipped[ranking.layer.name] = str(error)
    if not tries:
        name, why = next(iter(skipped.items()))
        raise ModelError(f"{case.experiment.model.path}: no layer could be cut open for a repair; {name}: {why}")
    tries.sort(key=lambda item: item.outcome.rank)
    found = [_found(case, item) for item in tries[:_JUDGED]]
    details = {
        "votes": [item.as_dict() for item in votes],
        "skipped": skipped,
        "tried": len(tries),
    }
    return best_of("ai-lancet-flip", case, found, details)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why the weights of a layer cannot be flipped or muted; None if they can."""
    return layer.refusal


def change_of(matrix: Array, mask: Array, mode: str) -> Array:
    """Return the change of a layer's matrix that flips or mutes the masked weights."""
    return np.where(mask, (MODES[mode] - 1) * matrix, 0.0)


def _tries(case: Case, ranking: WeightRanking) -> list[_Try]:
    matrix = matrix_of(case, ranking.layer)
    plans = [(mode, size) for mode in MODES for size in ranking.sizes(SHARES, matrix.size)]
    changes = [change_of(matrix, ranking.mask(size, matrix.shape), mode) for mode, size in plans]
    outcomes = Bench(case, ranking.layer).outcomes(case.panel("search"), changes)
    return [_Try(ranking, mode, size, outcome) for (mode, size), outcome in zip(plans, outcomes, strict=True)]


def _found(case: Case, item: _Try) -> Found:
    layer = item.ranking.layer
    matrix = matrix_of(case, layer)
    change = change_of(matrix, item.ranking.mask(item.size, matrix.shape), item.mode)
    (outcome,) = Bench(case, layer).outcomes(case.panel("validation"), [change])
    label = f"{layer.name}: {item.mode} {item.size} of {matrix.size} weights, by {item.ranking.locator}"
    return Found(Candidate(label, outcome), lambda: changed(case, layer, change))
