"""Copies of a model without its large weights: what follows from types and shapes alone follows from them, too."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import shape_inference
from onnx.external_data_helper import uses_external_data

# Tensors with more numbers than this hold weights; shapes and axes, which inference reads, are far smaller.
HEAVY = 1 << 12


def with_initializers(model: onnx.ModelProto, kept: Iterable[onnx.TensorProto]) -> onnx.ModelProto:
    """Return a copy with some of the initializers; the others are not even copied, for they may be large."""
    copy = onnx.ModelProto()
    for original, target, left_out in ((model, copy, "graph"), (model.graph, copy.graph, "initializer")):
        for field, value in original.ListFields():
            if field.name == left_out:
                continue
            if field.is_repeated:
                getattr(target, field.name).extend(value)
            else:
                setattr(target, field.name, value)
    copy.graph.initializer.extend(kept)
    return copy


def feeding(model: onnx.ModelProto, weights: Iterable[onnx.TensorProto]) -> onnx.ModelProto:
    """Return the model with some of its initializers as inputs."""
    fed = {tensor.name: tensor for tensor in weights}
    if not fed:
        return model
    copy = with_initializers(model, (tensor for tensor in model.graph.initializer if tensor.name not in fed))
    info = onnx.helper.make_tensor_value_info
    listed = {item.name for item in copy.graph.input}
    copy.graph.input.extend(
        info(tensor.name, tensor.data_type, tensor.dims) for tensor in fed.values() if tensor.name not in listed
    )
    return copy


def inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with the types and shapes that can be inferred, large and external weights among its inputs.

    Where inference fails, which custom operators and damaged declarations make it do, there are those that the file
    declares.
    """
    light = feeding(model, (tensor for tensor in model.graph.initializer if _is_large(tensor)))
    try:
        return shape_inference.infer_shapes(light, strict_mode=False, data_prop=True)
    except Exception:  # onnx raises whatever comes up
        return light


def _is_large(tensor: onnx.TensorProto) -> bool:
    return uses_external_data(tensor) or int(np.prod(tensor.dims, dtype=np.int64)) > HEAVY
