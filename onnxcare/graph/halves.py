"""Half precision written as float32, which is what onnxruntime computes with on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from onnxcare.graph.storage import HALVES
from onnxcare.graph.view import operator

# Attributes that name the element type of what a node makes.
_TYPES = ("to", "dtype", "output_dtype")


def to_single_precision(proto: onnx.ModelProto) -> bool:
    """Turn half precision into float32 throughout; return whether there was any.

    Inputs stay as they are, and are cast: a model is fed what the file is fed. Outputs become float32.
    """
    found = False
    for graph in _graphs(proto.graph):
        for tensor in _tensors(graph):
            if tensor.data_type in HALVES:
                _widen(tensor)
                found = True
        for node in graph.node:
            for item in node.attribute:
                if item.name in _TYPES and item.i in HALVES:
                    item.i = TensorProto.FLOAT
                    found = True
        main = graph is proto.graph
        for info in [*graph.output, *([] if main else graph.input), *graph.value_info]:
            if info.type.tensor_type.elem_type in HALVES:
                info.type.tensor_type.elem_type = TensorProto.FLOAT
                found = True
    constants = {tensor.name for tensor in proto.graph.initializer}
    for info in proto.graph.input:
        if info.type.tensor_type.elem_type not in HALVES:
            continue
        found = True
        if info.name in constants:
            info.type.tensor_type.elem_type = TensorProto.FLOAT
        else:
            _cast_input(proto.graph, info.name)
    return found


def _cast_input(graph: onnx.GraphProto, name: str) -> None:
    widened = f"onnxcare_float__{name}"
    for inner in _graphs(graph):
        for node in inner.node:
            for position, read in enumerate(node.input):
                if read == name:
                    node.input[position] = widened
    node = helper.make_node("Cast", [name], [widened], name=widened, to=TensorProto.FLOAT)
    graph.node.insert(0, node)


def _widen(tensor: onnx.TensorProto) -> None:
    """Turn a tensor into float32; one whose values are not here keeps its name and shape alone."""
    held = tensor.data_location != TensorProto.EXTERNAL and (tensor.raw_data or tensor.int32_data)
    wide = numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32)) if held else None
    for name in ("raw_data", "int32_data"):
        tensor.ClearField(name)
    tensor.data_type = TensorProto.FLOAT
    if wide is not None:
        tensor.raw_data = wide.raw_data


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield a graph and the graphs inside its nodes."""
    yield graph
    for node in graph.node:
        for item in node.attribute:
            for inner in [item.g] if item.type == onnx.AttributeProto.GRAPH else item.graphs:
                yield from _graphs(inner)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        if operator(node) in ("Constant", "ConstantOfShape"):
            yield from (item.t for item in node.attribute if item.HasField("t"))
