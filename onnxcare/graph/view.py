"""A read-only view of a graph: who produces and who consumes each tensor."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

# Attributes in which a Constant node may hold numbers without a tensor.
_PLAIN_VALUES = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


class GraphView:
    """Producers, consumers and constants of the main graph of a model."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        """Index the main graph of `proto`, which must not change afterwards."""
        graph = proto.graph
        self.proto = proto
        self.nodes = list(graph.node)
        self.outputs = {output.name for output in graph.output}
        self.producer: dict[str, int] = {}
        self.consumers: dict[str, list[int]] = defaultdict(list)
        # Tensors that a branch or loop body reads from here: they have consumers this view does not show.
        self.captured: dict[str, str] = {}
        for index, node in enumerate(self.nodes):
            for name in node.output:
                if name:
                    self.producer[name] = index
            for name in node.input:
                if name:
                    self.consumers[name].append(index)
            for inner in subgraph_inputs(node):
                self.captured.setdefault(inner, self.label(index))
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}

    def label(self, index: int) -> str:
        """Return the node's name, or its operator and position where it has none."""
        node = self.nodes[index]
        return node.name or f"{node.op_type}#{index}"

    def sole_consumer(self, tensor: str) -> int | None:
        """Return the only node that reads the tensor; None if there are several, or it leaves the graph."""
        readers = self.consumers.get(tensor, [])
        if len(readers) != 1 or tensor in self.outputs or tensor in self.captured:
            return None
        return readers[0]

    @cached_property
    def constants(self) -> dict[str, onnx.TensorProto]:
        """Initializers and the tensors of Constant nodes, by name."""
        found = dict(self._tensors)
        for node in self.nodes:
            if operator(node) == "Constant":
                for item in node.attribute:
                    if item.name == "value":
                        found[node.output[0]] = item.t
                    elif item.name in _PLAIN_VALUES:
                        value = np.array(onnx.helper.get_attribute_value(item), _PLAIN_VALUES[item.name])
                        found[node.output[0]] = numpy_helper.from_array(value)
        return found

    @cached_property
    def _fixed(self) -> set[str]:
        """Constants, and what is computed from constants alone."""
        found = set(self.constants)
        for node in self.nodes:
            if all(name in found for name in (*node.input, *subgraph_inputs(node)) if name):
                found.update(node.output)
        return found

    def small_constant(self, name: str, limit: int = 64) -> np.ndarray | None:
        """Return a constant of at most `limit` elements (shapes, axes), behind Identity nodes too, or None."""
        while name in self.producer and operator(self.nodes[self.producer[name]]) == "Identity":
            name = self.nodes[self.producer[name]].input[0]
        tensor = self.constants.get(name)
        if tensor is None or int(np.prod(tensor.dims, dtype=np.int64)) > limit:
            return None
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            return None
        return numpy_helper.to_array(tensor)

    def is_activation(self, name: str) -> bool:
        """Return whether the tensor may depend on the model's input."""
        return bool(name) and name not in self._fixed


def label(node: onnx.NodeProto) -> str:
    """Return the name of a node, or of what it writes where it has none."""
    return node.name or next((name for name in node.output if name), "") or node.op_type


def as_text(name: str | bytes) -> str:
    """Return a name as text: protobuf hands over what is not UTF-8 as bytes."""
    return name if isinstance(name, str) else name.decode("utf-8", "backslashreplace")


def operator(node: onnx.NodeProto) -> str:
    """Return the name of a node's standard operator, or nothing for one of another domain."""
    return node.op_type if node.domain in ("", "ai.onnx") else ""


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """Return the value of a node attribute, or `default`."""
    for item in node.attribute:
        if item.name == name:
            value = onnx.helper.get_attribute_value(item)
            return value.decode() if isinstance(value, bytes) else value
    return default


def subgraph_inputs(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names that the subgraphs of a node read, those of their own tensors included."""
    for item in node.attribute:
        graphs = [item.g] if item.type == onnx.AttributeProto.GRAPH else list(item.graphs)
        for graph in graphs:
            for inner in graph.node:
                yield from (name for name in inner.input if name)
                yield from subgraph_inputs(inner)
            yield from (output.name for output in graph.output)
