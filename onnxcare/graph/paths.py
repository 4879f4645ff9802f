"""Paths through a graph along which a derivative can be taken, as far as its operators tell."""

from __future__ import annotations

from collections.abc import Collection, Container

import onnx

from onnxcare.graph.view import operator, subgraph_inputs

# The results of these depend on shapes, not on values.
SHAPE_ONLY = frozenset({"Shape", "Size", "ConstantOfShape", "EyeLike", "RandomNormalLike", "RandomUniformLike"})
FLOATS = frozenset(
    {
        onnx.TensorProto.UNDEFINED,  # what inference could not type may be one
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.DOUBLE,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.BFLOAT16,
    }
)


class Paths:
    """Which tensors of a graph depend on which, and whether smoothly."""

    def __init__(self, model: onnx.ModelProto, flat: Container[str]) -> None:
        """Look through the graph once.

        Args:
            model: the graph, with the types of its tensors where they are known.
            flat: operators whose derivative is zero wherever they have one.
        """
        self._kinds = element_types(model)
        self._flat = flat
        self._nodes = [(node, reads(node)) for node in model.graph.node if operator(node) not in SHAPE_ONLY]

    def clear(self, outputs: Collection[str]) -> set[str]:
        """Return the tensors that have no `obstacle`, all in one pass."""
        smooth, blocked = set(outputs), set[str]()
        for node, read in reversed(self._nodes):
            floats = [result for result in node.output if self._kinds.get(result, 0) in FLOATS]
            if not floats or operator(node) in self._flat:
                continue
            if not operator(node) or not blocked.isdisjoint(floats):
                blocked |= read
            if not smooth.isdisjoint(floats):
                smooth |= read
        return smooth - blocked

    def obstacle(self, tensor: str, outputs: Collection[str]) -> str | None:
        """Say what stands between a tensor and the outputs; None if a smooth path leads to one of them."""
        depending, carried = {tensor}, {tensor}
        hindrance = ""
        for node, read in self._nodes:
            if not read & depending:
                continue
            depending.update(node.output)
            if not read & carried:
                continue
            floats = [result for result in node.output if self._kinds.get(result, 0) in FLOATS]
            if not operator(node) and floats:
                return f"{described(node)} of domain {node.domain} has no known derivative"
            if floats and operator(node) not in self._flat:
                carried.update(floats)
            else:
                hindrance = hindrance or f"{described(node)} has no derivative"
        if carried.intersection(outputs):
            return None
        if depending.intersection(outputs):
            return hindrance
        return f"{' and '.join(map(repr, outputs))} {_verb(outputs)} not depend on {tensor!r}"


def _verb(outputs: Collection[str]) -> str:
    return "does" if len(outputs) == 1 else "do"


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the element types that are known, by tensor."""
    graph = model.graph
    return {i.name: i.type.tensor_type.elem_type for i in [*graph.value_info, *graph.input, *graph.output]}


def reads(node: onnx.NodeProto) -> set[str]:
    """Return the tensors that a node reads, in its branches and loop bodies too."""
    return {name for name in (*node.input, *subgraph_inputs(node)) if name}


def described(node: onnx.NodeProto) -> str:
    """Return a node's operator and name, or what it writes where it has none."""
    return f"{node.op_type} {node.name or node.output[0]!r}"
