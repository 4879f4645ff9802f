"""A fixed batch size made free, so that many samples run at once."""

from __future__ import annotations

from collections.abc import Collection

import onnx

from onnxcare.graph.model import Model
from onnxcare.graph.view import GraphView, operator


def with_free_batch(model: Model) -> onnx.ModelProto:
    """Return a copy of the file with all weights inside and, where the file fixes it, the batch size made free."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model.proto)
    onnx.load_external_data_for_model(copy, str(model.path.parent))
    free_batch(copy, {signature.name for signature in model.inputs})
    return copy


def free_batch(proto: onnx.ModelProto, inputs: Collection[str]) -> None:
    """Make axis 0 of inputs and outputs symbolic, and let Reshape nodes follow it.

    Args:
        proto: the graph; it is changed.
        inputs: names of the inputs that are fed.
    """
    fixed = _relax_shapes(proto, inputs)
    if fixed:
        _relax_reshapes(proto, fixed)


def _relax_shapes(copy: onnx.ModelProto, inputs: Collection[str]) -> int:
    """Make axis 0 of inputs and outputs symbolic; return the size it was fixed at, or 0."""
    fixed = 0
    for info in [i for i in copy.graph.input if i.name in inputs] + list(copy.graph.output):
        shape = info.type.tensor_type.shape
        if info.type.HasField("tensor_type") and shape.dim and shape.dim[0].HasField("dim_value"):
            if info.name in inputs:
                fixed = shape.dim[0].dim_value
            shape.dim[0].dim_param = "onnxcare_batch"
    if fixed:
        del copy.graph.value_info[:]
        _forget_shapes_inside(copy.graph)
    return fixed


def _forget_shapes_inside(graph: onnx.GraphProto) -> None:
    """Take the declared shapes out of branches and bodies: the batch may be in any of them."""
    attributes = [item for node in graph.node for item in node.attribute]
    for inner in [item.g for item in attributes if item.HasField("g")] + [
        g for item in attributes for g in item.graphs
    ]:
        del inner.value_info[:]
        for info in (*inner.input, *inner.output):
            if info.type.HasField("tensor_type"):
                info.type.tensor_type.ClearField("shape")
        _forget_shapes_inside(inner)


def _relax_reshapes(copy: onnx.ModelProto, fixed: int) -> None:
    """Let Reshape nodes with the batch size in their target copy it from their input instead.

    [1, -1] would otherwise merge the whole batch into one row without a word.
    """
    view = GraphView(copy)
    for node in copy.graph.node:
        if operator(node) != "Reshape" or not view.is_activation(node.input[0]):
            continue
        target = view.small_constant(node.input[1])
        if target is None or target.size < 2 or target[0] != fixed:
            continue
        relaxed = target.copy()
        # 0 copies the first axis; where -1 is free, the samples may also have been merged with another one before.
        relaxed[0] = 0 if -1 in target else -1
        name = f"onnxcare_relaxed__{node.input[1]}__{len(copy.graph.initializer)}"
        copy.graph.initializer.append(onnx.numpy_helper.from_array(relaxed, name))
        node.input[1] = name
        kept = [item for item in node.attribute if item.name != "allowzero"]
        del node.attribute[:]
        node.attribute.extend(kept)
