"""Integer arithmetic written as floating-point arithmetic on what the integers stand for.

* `MatMulInteger` and `ConvInteger` behind a `DynamicQuantizeLinear` become MatMul and Conv on what was quantised: the
  rounding of activations as they come, which depends on all samples of a batch, is left out;
* `QLinearMatMul` and `QLinearConv` become the same with DequantizeLinear in front and QuantizeLinear behind;
* rounding that repeats what was done before is left out, so that channels are seen behind it as well.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import helper

from onnxcare.graph.view import GraphView, operator, subgraph_inputs

_PER_AXIS = 13  # the operator set from which on DequantizeLinear has an axis
_ARITHMETIC = frozenset("QuantizeLinear DynamicQuantizeLinear DequantizeLinear Mul Sub Cast".split())
# Whatever these return, it was among what they were given.
_MOVING = frozenset("Flatten Reshape Transpose Squeeze Unsqueeze Identity Dropout MaxPool".split())


def to_floating_point(proto: onnx.ModelProto) -> bool:
    """Rewrite integer operators; return whether the rounding of activations was left out."""
    view = GraphView(proto)
    builders: dict[str, Callable[[GraphView, int], _Rewritten | None]] = {
        "MatMulInteger": _dynamic,
        "ConvInteger": _dynamic,
        "QLinearMatMul": _static_product,
        "QLinearConv": _static_convolution,
    }
    replaced: dict[int, list[onnx.NodeProto]] = {}
    dynamic = False
    for index, node in enumerate(view.nodes):
        build = builders.get(operator(node))
        rewritten = build(view, index) if build is not None else None
        if rewritten is not None:
            replaced |= {gone: [] for gone in rewritten[0]}
            replaced[rewritten[0][-1]] = rewritten[1]
            dynamic |= build is _dynamic
    if replaced:
        nodes = [new for index, node in enumerate(view.nodes) for new in replaced.get(index, [node])]
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
    return dynamic


def drop_unknown_axes(proto: onnx.ModelProto) -> None:
    """Take the axis off what is dequantised with one scale, where the operator set does not know it yet."""
    opset = next((item.version for item in proto.opset_import if item.domain in ("", "ai.onnx")), _PER_AXIS)
    single = {tensor.name for tensor in proto.graph.initializer if np.prod(tensor.dims, dtype=np.int64) == 1}
    for node in proto.graph.node if opset < _PER_AXIS else ():
        if operator(node) == "DequantizeLinear" and node.input[1] in single:
            del node.attribute[:]


def drop_unread(proto: onnx.ModelProto) -> None:
    """Drop the arithmetic of quantisation that nothing reads any more."""
    read = {output.name for output in proto.graph.output}
    kept = []
    for node in reversed(proto.graph.node):
        if operator(node) in _ARITHMETIC and not read.intersection(node.output):
            continue
        read.update((*node.input, *subgraph_inputs(node)))
        kept.append(node)
    if len(kept) < len(proto.graph.node):
        kept.reverse()
        del proto.graph.node[:]
        proto.graph.node.extend(kept)


def drop_repeated_rounding(proto: onnx.ModelProto) -> None:
    """Turn rounding into nothing where the same rounding went before, and values were only moved about since."""
    view = GraphView(proto)
    for node in view.nodes:
        quantise = _maker(view, node.input[0]) if operator(node) == "DequantizeLinear" else None
        if quantise is None or operator(quantise) != "QuantizeLinear" or not _same_grid(view, quantise, node):
            continue
        before = _maker(view, quantise.input[0])
        while before is not None and operator(before) in _MOVING:
            before = _maker(view, before.input[0])
        if before is not None and operator(before) == "DequantizeLinear" and _same_grid(view, before, node):
            node.op_type = "Identity"
            del node.attribute[:]
            del node.input[:]
            node.input.append(quantise.input[0])


def _maker(view: GraphView, tensor: str) -> onnx.NodeProto | None:
    index = view.producer.get(tensor)
    return None if index is None else view.nodes[index]


def _same_grid(view: GraphView, one: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """Return whether two nodes have one and the same scale and zero point for all values."""
    if len(one.input) != len(other.input):
        return False
    for pair in zip(one.input[1:], other.input[1:], strict=True):
        a, b = (view.small_constant(name) for name in pair)
        if a is None or b is None or a.size != 1 or a.dtype != b.dtype or not np.array_equal(a, b):
            return False
    return True


# The nodes that go, in graph order, and what takes the place of the last one.
_Rewritten = tuple[list[int], list[onnx.NodeProto]]


def _dynamic(view: GraphView, index: int) -> _Rewritten | None:
    """Cast(op(quantised x, W)) * (scale of x * scale of W) -> op(x, dequantised W)."""
    node = view.nodes[index]
    source = view.producer.get(node.input[0])
    if source is None or operator(view.nodes[source]) != "DynamicQuantizeLinear":
        return None
    quantise = view.nodes[source]
    cast = view.sole_consumer(node.output[0])
    if cast is None or operator(view.nodes[cast]) != "Cast":
        return None
    scaled = view.sole_consumer(view.nodes[cast].output[0])
    if scaled is None or operator(view.nodes[scaled]) != "Mul":
        return None
    factors = [name for name in view.nodes[scaled].input if name != view.nodes[cast].output[0]]
    made = view.producer.get(factors[0]) if factors else None
    if made is None or operator(view.nodes[made]) != "Mul" or quantise.output[1] not in view.nodes[made].input:
        return None
    scales = [name for name in view.nodes[made].input if name != quantise.output[1]]
    weight = node.input[1]
    if len(scales) != 1 or scales[0] not in view.constants or weight not in view.constants:
        return None
    zero = node.input[3:4]
    convolution = node.op_type == "ConvInteger"
    axis = 0 if convolution else len(view.constants[weight].dims) - 1
    name = f"{weight}__dequantized__{index}"
    product = helper.make_node(
        "Conv" if convolution else "MatMul", [quantise.input[0], name], view.nodes[scaled].output, name=node.name
    )
    product.attribute.extend(node.attribute)
    return [index, cast, scaled], [_dequantise(weight, scales[0], zero, name, axis), product]


def _static_product(view: GraphView, index: int) -> _Rewritten:
    node = view.nodes[index]
    a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero = node.input
    left, right, product = (f"{node.output[0]}__{part}" for part in ("a", "b", "product"))
    return [index], [
        _dequantise(a, a_scale, [a_zero], left, -2),
        _dequantise(b, b_scale, [b_zero], right, -1),
        helper.make_node("MatMul", [left, right], [product], name=node.name),
        helper.make_node("QuantizeLinear", [product, y_scale, y_zero], node.output, name=f"{node.name}__quantized"),
    ]


def _static_convolution(view: GraphView, index: int) -> _Rewritten | None:
    node = view.nodes[index]
    x, x_scale, x_zero, w, w_scale, w_zero, y_scale, y_zero, *bias = node.input
    image, kernel, whole, found = (f"{node.output[0]}__{part}" for part in ("x", "w", "bias", "conv"))
    nodes = [_dequantise(x, x_scale, [x_zero], image, 1), _dequantise(w, w_scale, [w_zero], kernel, 0)]
    inputs = [image, kernel]
    if bias and bias[0]:
        scale = f"{whole}__scale"
        # Its scale is the product of the others', by definition of the operator.
        nodes += [
            helper.make_node("Mul", [x_scale, w_scale], [scale], name=scale),
            helper.make_node("Cast", [bias[0]], [f"{whole}__float"], name=f"{whole}__float", to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", [f"{whole}__float", scale], [whole], name=whole),
        ]
        inputs.append(whole)
    convolution = helper.make_node("Conv", inputs, [found], name=node.name)
    convolution.attribute.extend(node.attribute)
    quantised = helper.make_node(
        "QuantizeLinear", [found, y_scale, y_zero], node.output, name=f"{node.name}__quantized"
    )
    return [index], [*nodes, convolution, quantised]


def _dequantise(whole: str, scale: str, zero: list[str], name: str, axis: int) -> onnx.NodeProto:
    inputs = [whole, scale, *[item for item in zero if item]]
    return helper.make_node("DequantizeLinear", inputs, [name], name=name, axis=axis)
