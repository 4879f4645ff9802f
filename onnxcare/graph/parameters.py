"""Parameters: where the weights of a model live, who uses them, and how to read them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnxcare.errors import ModelError
from onnxcare.graph import wire
from onnxcare.graph.model import VALUE_FIELDS, value_fields
from onnxcare.graph.view import GraphView, operator

# Field numbers of onnx.proto on the way from a ModelProto to a tensor.
_GRAPH, _INITIALIZER, _NODE, _ATTRIBUTE, _TENSOR = 7, 5, 1, 5, 5


@dataclass(frozen=True)
class Parameter:
    """A weight tensor of the model.

    Attributes:
        name: name of the tensor.
        path: where its TensorProto lies in the serialized model.
        shape: its dimensions.
        dtype: numpy dtype of its elements.
        users: labels of the nodes that read it, in graph order.
    """

    name: str
    path: wire.Path
    shape: tuple[int, ...]
    dtype: np.dtype
    users: tuple[str, ...]


def find_parameters(view: GraphView) -> dict[str, Parameter]:
    """Return every tensor constant of the main graph: initializers and Constant nodes, by name."""
    graph = view.proto.graph
    found: dict[str, Parameter] = {}

    def add(tensor: onnx.TensorProto, name: str, path: wire.Path) -> None:
        users = [view.label(index) for index in view.consumers.get(name, [])]
        if name in view.captured:
            users.append(view.captured[name])
        if name in view.outputs:
            users.append("the model's outputs")
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
        found[name] = Parameter(name, path, tuple(tensor.dims), dtype, tuple(users))

    for index, tensor in enumerate(graph.initializer):
        add(tensor, tensor.name, ((_GRAPH, 0), (_INITIALIZER, index)))
    for index, node in enumerate(graph.node):
        if operator(node) != "Constant":
            continue
        for position, item in enumerate(node.attribute):
            if item.name == "value":
                path = ((_GRAPH, 0), (_NODE, index), (_ATTRIBUTE, position), (_TENSOR, 0))
                add(item.t, node.output[0], path)
    return found


def tensor_at(proto: onnx.ModelProto, path: wire.Path) -> onnx.TensorProto:
    """Return the TensorProto that a parameter's path leads to."""
    if path[1][0] == _INITIALIZER:
        return proto.graph.initializer[path[1][1]]
    return proto.graph.node[path[1][1]].attribute[path[2][1]].t


def read(proto: onnx.ModelProto, parameter: Parameter, folder: Path) -> np.ndarray:
    """Return the values of a parameter, external data included, as onnxruntime reads them.

    Raises:
        ModelError: the tensor carries values in two fields, so that readers disagree about the weights.
    """
    tensor = tensor_at(proto, parameter.path)
    filled = value_fields(tensor)
    if len(filled) > 1:
        raise ModelError(
            f"tensor {parameter.name!r} carries values in two fields ({' and '.join(filled)}): "
            "readers disagree about its weights, so it cannot be repaired"
        )
    if uses_external_data(tensor):
        # Older releases of onnx leave the values they read in the tensor.
        tensor = copy.deepcopy(tensor)
    return numpy_helper.to_array(tensor, str(folder))


def encode(proto: onnx.ModelProto, parameter: Parameter, values: np.ndarray) -> bytes:
    """Return the serialized TensorProto of a parameter with new values; name and metadata stay."""
    tensor = onnx.TensorProto()
    tensor.CopyFrom(tensor_at(proto, parameter.path))
    # Not ascontiguousarray: it would give a single number an axis.
    payload = numpy_helper.from_array(np.asarray(values, dtype=parameter.dtype, order="C"))
    if tuple(payload.dims) != parameter.shape or payload.data_type != tensor.data_type:
        raise ValueError(f"{parameter.name}: {values.shape} does not fit {parameter.shape}")
    for name in (*VALUE_FIELDS, "external_data", "data_location"):
        tensor.ClearField(name)
    tensor.raw_data = payload.raw_data
    return tensor.SerializeToString(deterministic=True)
