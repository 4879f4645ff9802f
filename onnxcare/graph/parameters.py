"""Parameters: the weight tensors of a graph, who uses them, and how the file holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx

from onnxcare.graph import wire
from onnxcare.graph.storage import Alike, Numbers, Sparse, Storage, Tensor
from onnxcare.graph.view import GraphView, operator

# Field numbers of onnx.proto on the way from a ModelProto to a tensor.
GRAPH, NODE, INITIALIZER, SPARSE = 7, 1, 5, 15
ATTRIBUTE, TENSOR = 5, 5
FUNCTION, NODE_OF_FUNCTION = 25, 7
VALUES, _INDICES = 1, 2
# Their weights are lists in attributes.
_LINEAR_MODELS = {("ai.onnx.ml", "LinearClassifier"), ("ai.onnx.ml", "LinearRegressor")}


@dataclass(frozen=True)
class Parameter:
    """A weight tensor, as the nodes of a graph read it.

    Attributes:
        name: name of the tensor.
        storage: where and how the file holds it.
        shape: its dimensions.
        dtype: numpy dtype of its elements as they are read: float32 also where the file holds less.
        users: labels of the nodes that read it, under any name, in graph order.
    """

    name: str
    storage: Storage
    shape: tuple[int, ...]
    dtype: np.dtype
    users: tuple[str, ...]

    @property
    def path(self) -> wire.Path:
        """Where the message that holds its values lies in the serialized model."""
        return self.storage.path


def find_parameters(view: GraphView, stored: Mapping[str, Storage] | None = None) -> dict[str, Parameter]:
    """Return every tensor constant of the main graph, by name.

    Args:
        view: the graph.
        stored: how the file holds each of them, where the graph is not that of the file; None where it is.
    """
    stored = storages(view) if stored is None else stored
    constants = view.constants
    users: dict[wire.Path, list[str]] = {}
    for name, storage in stored.items():
        mine = users.setdefault(storage.path, [])
        mine += [view.label(index) for index in view.consumers.get(name, [])]
        if name in view.captured:
            mine.append(view.captured[name])
        if name in view.outputs:
            mine.append("the model's outputs")
    return {
        name: Parameter(name, storage, *_layout(storage, constants.get(name)), tuple(users[storage.path]))
        for name, storage in stored.items()
    }


def storages(view: GraphView) -> dict[str, Storage]:
    """Return how a file holds the constants of its main graph, by name."""
    graph = view.proto.graph
    found: dict[str, Storage] = {
        tensor.name: Tensor(((GRAPH, 0), (INITIALIZER, index)), tensor.name, tensor.data_type)
        for index, tensor in enumerate(graph.initializer)
    }
    for index, sparse in enumerate(graph.sparse_initializer):
        path = ((GRAPH, 0), (SPARSE, index))
        found[sparse.values.name] = Sparse(
            (*path, (VALUES, 0)),
            sparse.values.name,
            (*path, (_INDICES, 0)),
            tuple(sparse.dims),
            sparse.values.data_type,
        )
    for index, node in enumerate(graph.node):
        if (node.domain, node.op_type) in _LINEAR_MODELS:
            for position, item in enumerate(node.attribute):
                if item.name in ("coefficients", "intercepts"):
                    at = ((GRAPH, 0), (NODE, index), (ATTRIBUTE, position))
                    name = numbers_name(node, item.name)
                    found[name] = Numbers(at, name, (len(item.floats),))
        elif operator(node) == "Constant":
            held = _in_constant(node, ((GRAPH, 0), (NODE, index)))
            if held is not None:
                found[node.output[0]] = held
        elif operator(node) == "ConstantOfShape":
            shape = view.small_constant(node.input[0])
            if shape is not None:
                lengths = tuple(int(length) for length in shape)
                found[node.output[0]] = Alike(((GRAPH, 0), (NODE, index)), node.output[0], lengths)
    return found


def numbers_name(node: onnx.NodeProto, attribute: str) -> str:
    """Return how the numbers in an attribute of a linear model are called: after what it answers, which is unique."""
    return f"{node.output[-1]}.{attribute}"


def _in_constant(node: onnx.NodeProto, path: wire.Path) -> Storage | None:
    for position, item in enumerate(node.attribute):
        at = (*path, (ATTRIBUTE, position))
        if item.name == "value":
            return Tensor((*at, (TENSOR, 0)), node.output[0], item.t.data_type)
        if item.name == "value_floats":
            return Numbers(at, node.output[0], (len(item.floats),))
    return None


def _layout(storage: Storage, tensor: onnx.TensorProto | None) -> tuple[tuple[int, ...], np.dtype]:
    if tensor is not None:
        return tuple(tensor.dims), onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return storage.shape if isinstance(storage, Numbers | Sparse | Alike) else (), np.dtype(np.float32)
