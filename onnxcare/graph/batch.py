"""As many samples as one likes, on axis 0 of every input: a fixed batch size made free, other axes moved there."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcare.axes import Axes
from onnxcare.graph.model import Model
from onnxcare.graph.view import GraphView, operator

AS_GIVEN = "onnxcare_as_given__"
_BATCH = "onnxcare_batch"


def with_free_batch(model: Model) -> onnx.ModelProto:
    """Return a copy of the file with all weights inside and, where the file fixes it, the batch size made free."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model.proto)
    onnx.load_external_data_for_model(copy, str(model.path.parent))
    free_batch(copy, {signature.name: signature.axis for signature in model.inputs})
    return copy


def free_batch(proto: onnx.ModelProto, inputs: Axes) -> None:
    """Make the axis of the samples symbolic in inputs and outputs, and let Reshape nodes follow it.

    Args:
        proto: the graph; it is changed.
        inputs: names of the inputs that are fed, and the axis on which each has its samples.
    """
    fixed = _relax_shapes(proto, inputs)
    if fixed:
        _relax_reshapes(proto, fixed)


def _relax_shapes(copy: onnx.ModelProto, inputs: Axes) -> int:
    """Make the axis of the samples symbolic in inputs and outputs; return the size it was fixed at, or 0."""
    fixed = 0
    for info in [i for i in copy.graph.input if i.name in inputs] + list(copy.graph.output):
        shape, axis = info.type.tensor_type.shape, inputs.get(info.name, 0)
        if axis is None or not info.type.HasField("tensor_type") or axis >= len(shape.dim):
            continue
        if shape.dim[axis].HasField("dim_value"):
            if info.name in inputs:
                fixed = shape.dim[axis].dim_value
            shape.dim[axis].dim_param = _BATCH
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


def put_samples_first(proto: onnx.ModelProto, axes: Axes) -> None:
    """Let these inputs of a graph have their samples on axis 0; what reads them stays as it is.

    Args:
        proto: the graph; it is changed.
        axes: where the samples lie, by name.
    """
    inserted = []
    for info in proto.graph.input:
        if info.name not in axes or axes[info.name] == 0:
            continue
        axis, given = axes[info.name], f"{AS_GIVEN}{info.name}"
        _rename(proto.graph.node, info.name, given)
        dims = list(info.type.tensor_type.shape.dim)
        front = onnx.TensorShapeProto.Dimension(dim_param=_BATCH) if axis is None else dims.pop(axis)
        if axis is None:
            first = f"{given}__first"
            proto.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), first))
            inserted.append(helper.make_node("Gather", [info.name, first], [given], given, axis=0))
        else:
            perm = [*range(1, axis + 1), 0, *range(axis + 1, len(dims) + 1)]
            inserted.append(helper.make_node("Transpose", [info.name], [given], given, perm=perm))
        del info.type.tensor_type.shape.dim[:]
        info.type.tensor_type.shape.dim.extend([front, *dims])
    nodes = list(proto.graph.node)
    del proto.graph.node[:]
    proto.graph.node.extend([*inserted, *nodes])


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Let nodes read a tensor under another name, in their subgraphs too, where it does not stand for another one."""
    for node in nodes:
        node.input[:] = [new if name == old else name for name in node.input]
        for item in node.attribute:
            for graph in [item.g] if item.type == onnx.AttributeProto.GRAPH else item.graphs:
                own = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
                if old not in own | {name for inner in graph.node for name in inner.output}:
                    _rename(graph.node, old, new)
                    for output in graph.output:
                        output.name = new if output.name == old else output.name
