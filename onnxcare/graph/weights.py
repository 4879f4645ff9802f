"""Weights that training has set beside those of the layers: of recurrent networks, normalisations and embeddings.

A layer (`graph.layers`) is one matrix product, which a repair can solve for. What other operators hold can still be
moved along a gradient, and in a recurrent network it is nearly all there is.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import numpy as np

from onnxcare.graph.parameters import Parameter
from onnxcare.graph.view import GraphView, operator

# Which inputs of an operator are weights; the first one gives the size of those that are zero.
_SLOTS = {
    **dict.fromkeys(("LSTM", "GRU", "RNN"), (1, 2, 3)),
    **dict.fromkeys(("LayerNormalization", "InstanceNormalization", "GroupNormalization"), (1, 2)),
    "RMSNormalization": (1,),
    "ConvTranspose": (1, 2),
    "PRelu": (1,),
    "Gather": (0,),
}


@dataclass(frozen=True)
class Weights:
    """The weights of a node.

    Attributes:
        name: label of the node.
        parameters: its weights, the largest first.
    """

    name: str
    parameters: tuple[Parameter, ...]


def find_weights(view: GraphView, parameters: Mapping[str, Parameter], known: Container[str] = ()) -> list[Weights]:
    """Return the weights of the main graph's nodes, in graph order, each tensor once.

    Args:
        view: the graph.
        parameters: its constants, by name.
        known: tensors to leave out.
    """
    seen: set[str] = set()
    found = []
    for index, node in enumerate(view.nodes):
        mine = []
        for slot in _SLOTS.get(operator(node), ()):
            name = _origin(view, node.input[slot]) if slot < len(node.input) else ""
            parameter = parameters.get(name)
            if parameter is None or name in known or name in seen or not _floating(parameter):
                continue
            seen.add(name)
            mine.append(parameter)
        if mine:
            found.append(Weights(view.label(index), tuple(mine)))
    return found


def _origin(view: GraphView, tensor: str) -> str:
    """Follow Identity nodes back from a tensor."""
    while tensor in view.producer and operator(view.nodes[view.producer[tensor]]) == "Identity":
        tensor = view.nodes[view.producer[tensor]].input[0]
    return tensor


def _floating(parameter: Parameter) -> bool:
    return parameter.dtype in (np.float32, np.float64) and parameter.storage.refusal is None
