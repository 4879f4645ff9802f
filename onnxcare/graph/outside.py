"""What holds weights and is no layer, and why: told to whoever looks for it among the layers.

Layers are Gemm, MatMul and Conv nodes of the main graph whose weights are constants. Outside lie

* the same operators with weights that are computed, or laid out in another way,
* other operators with weights (recurrent ones, transposed convolutions, products of whole numbers, tree ensembles),
* nodes inside branches and loops.

Products of two activations hold no weights; they are not told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import onnx

from onnxcare.graph.layers import Layer
from onnxcare.graph.view import GraphView, operator

# Which inputs hold the weights.
_LAYERS = {"Gemm": (1,), "MatMul": (0, 1), "Conv": (1,)}
_OTHERS = {
    "ConvTranspose": (1,),
    "ConvInteger": (1,),
    "MatMulInteger": (0, 1),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
    "DeformConv": (1,),
    "Einsum": (0, 1),
    "LSTM": (1, 2),
    "GRU": (1, 2),
    "RNN": (1, 2),
}
_ML = "ai.onnx.ml"
_LEARNT = frozenset("LinearClassifier LinearRegressor SVMClassifier SVMRegressor".split())
_TREES = frozenset("TreeEnsemble TreeEnsembleClassifier TreeEnsembleRegressor".split())
# So many are named in an error.
_NAMED = 3

_Fixed = Callable[[str], bool]


@dataclass(frozen=True)
class Outside:
    """A node that holds weights and is no layer.

    Attributes:
        name: label of the node.
        operator: its operator.
        refusal: why it is no layer.
    """

    name: str
    operator: str
    refusal: str


def find_outside(view: GraphView, layers: Iterable[Layer]) -> list[Outside]:
    """Return what holds weights and is none of these layers, in graph order."""
    known = {layer.node for layer in layers}
    found = []
    for index, node in enumerate(view.nodes):
        if index not in known and _holds_weights(node, lambda name: not view.is_activation(name)):
            found.append(Outside(view.label(index), node.op_type, _reason(view, node)))
        for inner, branch in _inside(node, lambda name: not view.is_activation(name)):
            place = f"it lies in {branch} of {node.op_type} {view.label(index)}"
            found.append(Outside(inner.name or inner.op_type, inner.op_type, place))
    return found


def why_none(view: GraphView, layers: Sequence[Layer], nothing: str) -> str:
    """Say why there is no layer that can be rewritten; `nothing` is said where the model holds no weights at all."""
    reasons = [f"{layer.name}: {layer.refusal}" for layer in layers if layer.refusal]
    if not layers:
        reasons = [f"{item.name} ({item.operator}): {item.refusal}" for item in find_outside(view, ())]
    more = [f"{len(reasons) - _NAMED} more like that"] if len(reasons) > _NAMED else []
    return "; ".join(reasons[:_NAMED] + more) or nothing


def _weights(node: onnx.NodeProto) -> list[str]:
    """Return the inputs of a node that may be weights."""
    kind = operator(node)
    positions = _LAYERS.get(kind) or _OTHERS.get(kind, ())
    return [node.input[position] for position in positions if position < len(node.input) and node.input[position]]


def _holds_weights(node: onnx.NodeProto, fixed: _Fixed) -> bool:
    if node.domain == _ML:
        return node.op_type in _TREES | _LEARNT
    # What is computed from constants alone is a constant itself.
    return any(map(fixed, _weights(node))) and not all(fixed(name) for name in node.input if name)


def _reason(view: GraphView, node: onnx.NodeProto) -> str:
    if node.domain == _ML:
        trees = node.op_type in _TREES
        return "trees compare, they hold no weights" if trees else "its weights are attributes of the node"
    if operator(node) in _OTHERS:
        return f"weights of {node.op_type} cannot be rewritten"
    weight = next(name for name in _weights(node) if not view.is_activation(name))
    if operator(node) == "MatMul" and weight == node.input[0]:
        return f"its weight {weight!r} stands on the left of the product"
    maker = view.producer.get(weight)
    if weight in view.constants or maker is None:
        return f"its weight {weight!r} has {len(view.constants[weight].dims)} axes"
    return f"its weight {weight!r} is computed by {view.nodes[maker].op_type} {view.label(maker)}"


def _inside(node: onnx.NodeProto, fixed: _Fixed) -> Iterator[tuple[onnx.NodeProto, str]]:
    """Yield the nodes with weights in the subgraphs of a node, and the names of these subgraphs."""
    for item in node.attribute:
        for graph in [item.g] if item.type == onnx.AttributeProto.GRAPH else item.graphs:
            own = {info.name: False for info in graph.input}
            own |= {tensor.name: True for tensor in graph.initializer}

            def known(name: str, own: dict[str, bool] = own) -> bool:
                return own[name] if name in own else fixed(name)

            for inner in graph.node:
                deeper = list(_inside(inner, known))
                if _holds_weights(inner, known):
                    yield inner, item.name
                yield from ((found, item.name) for found, _ in deeper)
                constant = not deeper and all(known(name) for name in inner.input if name)
                own |= dict.fromkeys(inner.output, constant)
