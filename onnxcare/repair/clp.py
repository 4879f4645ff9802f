"""`--method clp`: channel Lipschitz pruning (CLP; Zheng, Tang, Li, Liu, ECCV 2022).

Channels whose Lipschitz bound stands out of their layer (`pruning`) become zero, in all convolutions at once; where
there is no convolution, in the hidden dense layers. No data is needed to choose them. As published they are those over
mean + 3 std; here several multiples of the standard deviation compete on validation data.
"""

from __future__ import annotations

from functools import partial

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.repair import pruning
from onnxcare.repair.base import Candidate, Found, Proposals, Repair
from onnxcare.repair.bench import patched_outcome
from onnxcare.repair.choice import best_of
from onnxcare.repair.pruning import lipschitz, outlying, prunable, pruned

# How many standard deviations above the mean are too far; the first one is as published.
_MULTIPLES = (3.0, 2.5, 2.0, 1.5, 1.0)


def repair(case: Case) -> Repair:
    """Prune what stands out, by the multiple that does best.

    Raises:
        ModelError: no channel can be pruned, or none stands out.
    """
    offered = propose(case)
    return best_of("clp", case, offered.found, offered.details)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why no channel of a layer can be pruned; None if they can."""
    return pruning.hindrance(anatomy, layer)


def beside_layers(anatomy: Anatomy) -> list[str | None]:
    """Return what nodes write that are changed beside layers."""
    return [pruning.normalised_behind(anatomy, layer) for layer in anatomy.layers]


def applies(case: Case) -> bool:
    """Return whether some property is about a backdoor: single channels that stand out are the mark of a trigger."""
    return any(item.kind == "backdoor" for item in case.properties)


def propose(case: Case) -> Proposals:
    """Return what stands out pruned, by every multiple that takes further channels.

    Raises:
        ModelError: no channel can be pruned, or none stands out.
    """
    layers, skipped = prunable(case)
    bounds = {layer: lipschitz(case, layer) for layer in layers}
    found: list[Found] = []
    told: list[dict[str, list[int]]] = [{}]
    for u in _MULTIPLES:
        channels = outlying(bounds, u)
        by_name = {layer.name: which.tolist() for layer, which in channels.items()}
        if by_name == told[-1]:
            continue
        told.append(by_name)
        case.progress(f"pruning channels over mean + {u:g} std")
        outcome = patched_outcome(case, pruned(case, channels), case.panel("validation"))
        count, of = sum(map(len, channels.values())), sum(layer.outputs for layer in layers)
        label = f"{count} of {of} channels, with bounds over mean + {u:g} std"
        found.append(Found(Candidate(label, outcome), partial(pruned, case, channels)))
    if not found:
        raise ModelError(f"{case.experiment.model.path}: no channel's Lipschitz bound stands out of its layer")
    return Proposals(found, {"pruned": told[1:], "skipped": skipped})
