"""Places: every message of a model file that holds numbers, where it lies, and what to call it.

A place is a TensorProto, or an AttributeProto that holds numbers without a tensor. Labels are made of the names in the
file, so that the same place of two files has the same label:

    W                                 an initializer
    S.values, S.indices               the tensors of a sparse one
    Constant c                        the Constant node that writes c
    classifier.coefficients           an attribute of the node `classifier`
    branch/then_branch/W              W in a branch, or in the body of a loop
    function com.acme.scale/W         W in the body of a function

Training information is left out: nothing that answers reads it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from onnx.external_data_helper import uses_external_data

from onnxcare.graph import wire
from onnxcare.graph.view import label, operator

# Attributes in which a Constant node holds numbers without a tensor, and the fields they are in.
_CONSTANTS = {"value_float": "f", "value_floats": "floats", "value_int": "i", "value_ints": "ints"}
_FLOAT_FIELDS = ("f", "floats")

_GRAPH, _FUNCTION = onnx.ModelProto.GRAPH_FIELD_NUMBER, onnx.ModelProto.FUNCTIONS_FIELD_NUMBER
_NODE, _BODY = onnx.GraphProto.NODE_FIELD_NUMBER, onnx.FunctionProto.NODE_FIELD_NUMBER
_INITIALIZER, _SPARSE = onnx.GraphProto.INITIALIZER_FIELD_NUMBER, onnx.GraphProto.SPARSE_INITIALIZER_FIELD_NUMBER
_ATTRIBUTE, _DEFAULT = onnx.NodeProto.ATTRIBUTE_FIELD_NUMBER, onnx.FunctionProto.ATTRIBUTE_PROTO_FIELD_NUMBER


@dataclass(frozen=True)
class Place:
    """A message that holds numbers.

    Attributes:
        label: its name, unique in the file.
        path: where it lies in the serialized model.
        message: the message itself.
        field: the field of an attribute that holds the numbers; nothing for a tensor.
    """

    label: str
    path: wire.Path
    message: onnx.TensorProto | onnx.AttributeProto
    field: str = ""

    @property
    def data_type(self) -> int:
        """Type of the numbers, as a TensorProto names it."""
        if isinstance(self.message, onnx.TensorProto):
            return self.message.data_type
        return onnx.TensorProto.FLOAT if self.field in _FLOAT_FIELDS else onnx.TensorProto.INT64

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions; those of a list are its length, and a single number has none."""
        if isinstance(self.message, onnx.TensorProto):
            return tuple(self.message.dims)
        held = getattr(self.message, self.field)
        return () if self.field in ("f", "i") else (len(held),)

    @property
    def external(self) -> bool:
        """Whether the numbers lie in another file."""
        return isinstance(self.message, onnx.TensorProto) and uses_external_data(self.message)

    def values(self, folder: Path) -> np.ndarray:
        """Return the numbers in their shape and type; `folder` is that of the model's file, for external data."""
        if isinstance(self.message, onnx.AttributeProto):
            return np.array(getattr(self.message, self.field), np.float32 if self.field in _FLOAT_FIELDS else np.int64)
        tensor = self.message
        if uses_external_data(tensor):
            # Older releases of onnx leave the values they read in the tensor.
            tensor = copy.deepcopy(tensor)
        return numpy_helper.to_array(tensor, str(folder))


def find_places(proto: onnx.ModelProto) -> list[Place]:
    """Return every place of a model that holds numbers, in file order of its graphs."""
    found: dict[str, Place] = {}
    count: dict[str, int] = {}
    for place in _in_model(proto):
        if place.data_type == onnx.TensorProto.STRING:
            continue
        name = place.label
        while name in found:
            count[place.label] = count.get(place.label, 1) + 1
            name = f"{place.label}#{count[place.label]}"
        found[name] = replace(place, label=name)
    return list(found.values())


def tensors(proto: onnx.ModelProto) -> list[onnx.TensorProto]:
    """Return every tensor, those that hold text included."""
    return [place.message for place in _in_model(proto) if isinstance(place.message, onnx.TensorProto)]


def plain_field(node: onnx.NodeProto, item: onnx.AttributeProto) -> str:
    """Return the field in which an attribute holds weights without a tensor; nothing where it does not."""
    if item.ref_attr_name:
        return ""
    if operator(node) == "Constant" and item.name in _CONSTANTS:
        return _CONSTANTS[item.name]
    if node.domain == "ai.onnx.ml":
        return "floats" if item.floats else "ints" if item.ints else ""
    return ""


def attribute_places(node: onnx.NodeProto, item: onnx.AttributeProto, name: str, path: wire.Path) -> Iterator[Place]:
    """Yield what an attribute of a node holds itself, its branches and bodies left out.

    Args:
        node: the node.
        item: the attribute.
        name: what to call it; what is called `.indices` behind it says where the numbers of a sparse tensor stand.
        path: where the attribute lies in the serialized model.
    """
    field = plain_field(node, item)
    if field and (item.HasField(field) if field in ("f", "i") else len(getattr(item, field))):
        yield Place(name, path, item, field)
    yield from _in_attribute(item, name, path)


def _in_model(proto: onnx.ModelProto) -> Iterator[Place]:
    yield from _in_graph(proto.graph, "", ((_GRAPH, 0),))
    for index, function in enumerate(proto.functions):
        path = ((_FUNCTION, index),)
        overload = f":{function.overload}" if function.overload else ""
        name = f"function {function.domain}.{function.name}{overload}"
        for position, item in enumerate(function.attribute_proto):
            yield from _in_attribute(item, f"{name}.{item.name}", (*path, (_DEFAULT, position)))
        yield from _in_nodes(function.node, f"{name}/", path, _BODY)


def _in_graph(graph: onnx.GraphProto, prefix: str, path: wire.Path) -> Iterator[Place]:
    for index, tensor in enumerate(graph.initializer):
        yield Place(f"{prefix}{tensor.name}", (*path, (_INITIALIZER, index)), tensor)
    for index, sparse in enumerate(graph.sparse_initializer):
        yield from _in_sparse(sparse, f"{prefix}{sparse.values.name}", (*path, (_SPARSE, index)))
    yield from _in_nodes(graph.node, prefix, path, _NODE)


def _in_nodes(nodes: Iterable[onnx.NodeProto], prefix: str, path: wire.Path, number: int) -> Iterator[Place]:
    for index, node in enumerate(nodes):
        for position, item in enumerate(node.attribute):
            here = (*path, (number, index), (_ATTRIBUTE, position))
            name = f"{prefix}{label(node)}.{item.name}"
            if operator(node) == "Constant" and len(node.output):
                name = f"{prefix}Constant {node.output[0]}"
            yield from attribute_places(node, item, name, here)
            for step, graph, suffix in _subgraphs(item):
                yield from _in_graph(graph, f"{prefix}{label(node)}/{item.name}{suffix}/", (*here, step))


def _subgraphs(item: onnx.AttributeProto) -> Iterator[tuple[tuple[int, int], onnx.GraphProto, str]]:
    if item.HasField("g"):
        yield (onnx.AttributeProto.G_FIELD_NUMBER, 0), item.g, ""
    for index, graph in enumerate(item.graphs):
        yield (onnx.AttributeProto.GRAPHS_FIELD_NUMBER, index), graph, f"[{index}]"


def _in_attribute(item: onnx.AttributeProto, name: str, path: wire.Path) -> Iterator[Place]:
    """Yield the tensors of an attribute."""
    if item.HasField("t"):
        yield Place(name, (*path, (onnx.AttributeProto.T_FIELD_NUMBER, 0)), item.t)
    for index, tensor in enumerate(item.tensors):
        step = (onnx.AttributeProto.TENSORS_FIELD_NUMBER, index)
        yield Place(f"{name}[{index}]", (*path, step), tensor)
    if item.HasField("sparse_tensor"):
        step = (onnx.AttributeProto.SPARSE_TENSOR_FIELD_NUMBER, 0)
        yield from _in_sparse(item.sparse_tensor, name, (*path, step))
    for index, sparse in enumerate(item.sparse_tensors):
        step = (onnx.AttributeProto.SPARSE_TENSORS_FIELD_NUMBER, index)
        yield from _in_sparse(sparse, f"{name}[{index}]", (*path, step))


def _in_sparse(sparse: onnx.SparseTensorProto, name: str, path: wire.Path) -> Iterator[Place]:
    if sparse.HasField("values"):
        step = (onnx.SparseTensorProto.VALUES_FIELD_NUMBER, 0)
        yield Place(f"{name}.values", (*path, step), sparse.values)
    if sparse.HasField("indices"):
        step = (onnx.SparseTensorProto.INDICES_FIELD_NUMBER, 0)
        yield Place(f"{name}.indices", (*path, step), sparse.indices)
