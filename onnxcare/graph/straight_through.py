"""Derivatives that pass straight through the rounding of activations.

QuantizeLinear is flat wherever it has a derivative. What follows it is written with a term that is zero but for its
derivative, which is that of clipping x to the range of the whole numbers (the straight-through estimator; Bengio,
Léonard, Courville: Estimating or Propagating Gradients Through Stochastic Neurons, 2013):

    DequantizeLinear(QuantizeLinear(x))  +  clip(x) - round(clip(x) / fine) * fine
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper

from onnxcare.graph.storage import WHOLE
from onnxcare.graph.view import GraphView, operator

# How much finer than the steps of the activations the term is rounded.
_FINER = 256


def pass_through_rounding(proto: onnx.ModelProto) -> None:
    """Write every QuantizeLinear with a DequantizeLinear behind it so that derivatives pass; `proto` is changed."""
    view = GraphView(proto)
    nodes: list[onnx.NodeProto] = []
    for node in view.nodes:
        source = view.producer.get(node.input[0]) if operator(node) == "DequantizeLinear" else None
        quantise = None if source is None else view.nodes[source]
        span = None if quantise is None or operator(quantise) != "QuantizeLinear" else _range(view, quantise)
        if quantise is None or span is None:
            nodes.append(node)
            continue
        nodes += _with_derivative(proto, node, quantise.input[0], *span)
    if len(nodes) > len(view.nodes):
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)


def _with_derivative(
    proto: onnx.ModelProto, node: onnx.NodeProto, x: str, least: float, greatest: float, step: float
) -> list[onnx.NodeProto]:
    y = node.output[0]
    names = [f"{y}__{part}" for part in ("rounded", "clipped", "times", "whole", "near", "zero")]
    rounded, clipped, times, whole, near, zero = names
    constants = {"least": least, "greatest": greatest, "per_fine": _FINER / step, "fine": step / _FINER}
    for name, value in constants.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(value, np.float32), f"{y}__{name}"))
    same = onnx.NodeProto()
    same.CopyFrom(node)
    same.output[0] = rounded
    steps = (
        ("Clip", [x, f"{y}__least", f"{y}__greatest"], clipped),
        ("Mul", [clipped, f"{y}__per_fine"], times),
        ("Round", [times], whole),
        ("Mul", [whole, f"{y}__fine"], near),
        ("Sub", [clipped, near], zero),
        ("Add", [rounded, zero], y),
    )
    return [same, *(helper.make_node(op, inputs, [output], name=output) for op, inputs, output in steps)]


def _range(view: GraphView, node: onnx.NodeProto) -> tuple[float, float, float] | None:
    """Return the least and greatest number that a QuantizeLinear can say, and its step; None if it varies."""
    scale = view.small_constant(node.input[1])
    zero = view.small_constant(node.input[2]) if len(node.input) > 2 and node.input[2] else np.zeros((), np.uint8)
    if scale is None or zero is None or scale.size != 1 or zero.size != 1 or str(zero.dtype) not in WHOLE.values():
        return None
    info, step, offset = np.iinfo(zero.dtype), float(scale.reshape(-1)[0]), int(zero.reshape(-1)[0])
    return (info.min - offset) * step, (info.max - offset) * step, step
