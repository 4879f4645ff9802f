"""`--method fine-pruning`: pruning what sleeps on clean samples (Liu, Dolan-Gavitt, Garg: Fine-Pruning, RAID 2018).

Channels of the last convolution that can be pruned, or of the last hidden dense layer where there is none, become zero
in order of their mean absolute activation on clean samples, lowest first (`pruning`). As published pruning goes on
until the accuracy has fallen by a given amount; here shares of the channels compete on validation data.
"""

from __future__ import annotations

from functools import partial

from onnxcare.case import Case
from onnxcare.graph.layers import Layer
from onnxcare.repair.base import Array, Candidate, Found, Proposals, Repair
from onnxcare.repair.bench import patched_outcome
from onnxcare.repair.choice import best_of
from onnxcare.repair.pruning import dormancy, prunable, pruned

_PERCENTAGES = range(5, 100, 5)


def repair(case: Case) -> Repair:
    """Prune the most dormant channels, by the share that does best.

    Raises:
        ModelError: no channel can be pruned.
    """
    offered = propose(case)
    return best_of("fine-pruning", case, offered.found, offered.details)


def applies(case: Case) -> bool:
    """Return whether some property is about a backdoor: it is triggers that wake channels which sleep otherwise."""
    return any(item.kind == "backdoor" for item in case.properties)


def propose(case: Case) -> Proposals:
    """Return the last layer with shares of its channels pruned.

    Raises:
        ModelError: no channel can be pruned.
    """
    layers, skipped = prunable(case)
    layer = layers[-1]
    order = dormancy(case, layer)
    case.progress(f"pruning dormant channels of {layer.name}")
    found = [_pruned(case, layer, order[:count]) for count in _counts(layer.outputs)]
    return Proposals(found, {"layer": layer.name, "order": order.tolist(), "skipped": skipped})


def _counts(channels: int) -> list[int]:
    """Return the numbers of channels that the shares stand for, each once."""
    return sorted({max(1, round(channels * percentage / 100)) for percentage in _PERCENTAGES})


def _pruned(case: Case, layer: Layer, channels: Array) -> Found:
    """Return the candidate without some channels."""
    values = pruned(case, {layer: channels})
    outcome = patched_outcome(case, values, case.panel("validation"))
    label = f"{layer.name}: {len(channels)} of {layer.outputs} channels, most dormant first"
    return Found(Candidate(label, outcome), partial(dict, values))
