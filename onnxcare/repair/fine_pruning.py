"""`--method fine-pruning`: pruning what sleeps on clean samples, then fine-tuning on these.

The recipe is that of Liu, Dolan-Gavitt, Garg: Fine-Pruning (RAID 2018). Channels of the last convolution that can be
pruned, or of the last hidden dense layer where there is none, become zero in order of their mean absolute activation on
clean samples, lowest first (`pruning`). As published pruning goes on until the accuracy has fallen by a given amount;
here shares of the channels compete on validation data. The best of them, and the one with as much pruned as published,
are then fine-tuned (`network_finetune`) in all layers, while pruned channels stay zero.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from itertools import takewhile

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.repair import network_finetune, pruning
from onnxcare.repair.base import Array, Candidate, Found, Proposals, Repair
from onnxcare.repair.bench import patched_outcome
from onnxcare.repair.choice import best_of
from onnxcare.repair.network_finetune import RATES, epochs_within, retrained, where
from onnxcare.repair.pruning import dormancy, prunable, pruned

_PERCENTAGES = range(5, 100, 5)
# So much of the accuracy may be lost before fine-tuning, as in BackdoorBench (NeurIPS 2022).
_LOST = 0.1


def repair(case: Case) -> Repair:
    """Prune the most dormant channels and fine-tune, by the share and the rate that do best.

    Raises:
        ModelError: no channel can be pruned.
    """
    offered = propose(case)
    return best_of("fine-pruning", case, offered.found, offered.details)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why a layer is neither pruned nor tuned; None if it is."""
    last = pruning.last_prunable(anatomy)
    if last is None:
        return pruning.hindrance(anatomy, layer) or "no channel of the model can be pruned"
    return None if layer.name == last.name else network_finetune.hindrance(anatomy, layer)


def beside_layers(anatomy: Anatomy) -> list[str | None]:
    """Return what nodes write that are changed beside layers."""
    last = pruning.last_prunable(anatomy)
    if last is None:
        return []
    return [pruning.normalised_behind(anatomy, last), *network_finetune.beside_layers(anatomy)]


def applies(case: Case) -> bool:
    """Return whether some property is about a backdoor: it is triggers that wake channels which sleep otherwise."""
    return any(item.kind == "backdoor" for item in case.properties)


def propose(case: Case) -> Proposals:
    """Return the last layer with shares of its channels pruned, and what fine-tuning makes of some of them.

    Raises:
        ModelError: no channel can be pruned.
    """
    layers, skipped = prunable(case)
    layer = layers[-1]
    order = dormancy(case, layer)
    case.progress(f"pruning dormant channels of {layer.name}")
    alone = {count: _pruned(case, layer, order[:count]) for count in _counts(layer.outputs)}
    found = list(alone.values())
    try:
        for count in _worth_tuning(alone):
            found += [_tuned(case, layer, order[:count], alone[count], rate) for rate in RATES]
    except ModelError as error:
        skipped["fine-tuning"] = str(error)
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


def _worth_tuning(alone: Mapping[int, Found]) -> list[int]:
    """Return the number of channels of the best candidate, and how far the accuracy lets pruning go, each once."""
    best = min(alone, key=lambda count: alone[count].candidate.outcome.rank)
    within = list(takewhile(lambda count: alone[count].candidate.outcome.accuracy_drop <= _LOST, alone))
    return list(dict.fromkeys([best, *within[-1:]]))


def _tuned(case: Case, layer: Layer, channels: Array, item: Found, rate: float) -> Found:
    """Return a pruned candidate after fine-tuning."""
    gone = np.zeros(layer.outputs, bool)
    gone[channels] = True
    mask = np.broadcast_to(gone.reshape(layer.groups, 1, -1), layer.matrix_shape)
    tuned = retrained(case, rate, epochs_within(case), item.make(), where(layer, mask))
    label = f"{item.candidate.label}; then {tuned.candidate.label}"
    return replace(tuned, candidate=replace(tuned.candidate, label=label))
