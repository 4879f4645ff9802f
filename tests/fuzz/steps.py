"""What random models are made of: steps from one activation to the next, by the number of axes a sample of it has.

A step takes the model in the making and a tensor, and returns the next tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from fuzz.graphs import FUNCTIONS, Builder, Drawn
from hypothesis import strategies as st
from onnx import helper, numpy_helper

Step = Callable[[Builder, str], str]

_WIDEST = 6
_FLAT = "Relu Sigmoid Tanh LeakyRelu Elu Softplus Softsign Abs Neg Identity Clip Selu HardSigmoid Erf Floor".split()


# -- on any activation -------------------------------------------------------------------------------


def activation(b: Builder, x: str) -> str:
    known = [*_FLAT, *(["HardSwish"] if b.opset >= 14 else []), *(["Mish"] if b.opset >= 18 else [])]
    known += ["Gelu"] if b.opset >= 20 else []
    op = b.pick([op for op in known if op != "Erf" or b.opset >= 9])
    if op != "Clip":
        return b.node(op, [x], b.shapes[x])
    if b.opset < 11:
        return b.node(op, [x], b.shapes[x], min=0.0, max=6.0)
    return b.node(op, [x, b.constant(0, np.float32), b.constant(6, np.float32)], b.shapes[x])


def chain(b: Builder, x: str) -> str:
    """Identities and the like."""
    for _ in range(b.number(1, 2)):
        x = b.node(b.pick(["Identity", "Dropout"]), [x], b.shapes[x])
    return x


def skip(b: Builder, x: str) -> str:
    """Join an earlier activation of the same shape, maybe the tensor itself."""
    alike = [name for name, shape in b.shapes.items() if shape == b.shapes[x] and not b.inputs.get(name, ((), 0))[1]]
    op = b.pick(["Add", "Mul", "Sub", "Max", "Sum", "Mean", "Where"])
    pair = [x, b.pick(alike)] if b.chance(2) else [b.pick(alike), x]
    if op == "Where":
        if b.opset < 9:
            op = "Add"
        else:
            zero = b.constant(0, np.float32)
            above = b.node("Greater", [pair[0], zero], b.shapes[x])
            del b.shapes[above]  # its values are no numbers
            return b.node("Where", [above, *pair], b.shapes[x])
    return b.node(op, pair, b.shapes[x])


def gate(b: Builder, x: str) -> str:
    return b.node("Mul", [x, b.node("Sigmoid", [x], b.shapes[x])], b.shapes[x])


def joined(b: Builder, x: str) -> str:
    """Concat with an activation that differs at most on the first axis."""
    shape = b.shapes[x]
    alike = [
        name
        for name, other in b.shapes.items()
        if len(other) == len(shape) and other[1:] == shape[1:] and not b.inputs.get(name, ((), 0))[1]
    ]
    other = b.pick(alike)
    if len(shape) > 1 or b.chance(2):
        axis = 1
    else:
        axis = -1
    return b.node("Concat", [x, other], (shape[0] + b.shapes[other][0], *shape[1:]), axis=axis)


def shifted(b: Builder, x: str) -> str:
    """Add or multiply with constants that broadcast."""
    shape = b.shapes[x]
    bias = b.weight(*b.pick([shape[-1:], (1,), (), (1, *shape), (shape[0], *[1] * (len(shape) - 1))]), scale=1.0)
    pair = [x, bias] if b.chance(2) else [bias, x]
    return b.node(b.pick(["Add", "Mul", "Sub"]), pair, shape)


def branch(b: Builder, x: str) -> str:
    """An If whose branches read the tensor from outside, with or without weights of their own."""
    shape = b.shapes[x]
    inner = helper.make_node("Mul", [x, "inside"], ["then_out"], name="in branch")
    weight = numpy_helper.from_array(b.rng.normal(size=shape).astype(np.float32), "inside")
    given = [helper.make_tensor_value_info(f"{word}_out", 1, None) for word in ("then", "else")]
    then = helper.make_graph([inner], "then", [], [given[0]], [weight])
    other = helper.make_graph([helper.make_node("Tanh", [x], ["else_out"])], "else", [], [given[1]])
    condition = b.constant(b.chance(2), np.bool_)
    return b.node("If", [condition], shape, then_branch=then, else_branch=other)


def called(b: Builder, x: str) -> str:
    """A function of the model's own: a gate, with a constant of its own."""
    if b.opset < 13:
        return gate(b, x)
    inner = [
        helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.float32([0.5]))),
        helper.make_node("Mul", ["v", "c"], ["m"], name="halved"),
        helper.make_node("Tanh", ["m"], ["y"]),
    ]
    if not b.functions:
        imports = [helper.make_opsetid("", b.opset)]
        b.functions.append(helper.make_function(FUNCTIONS, "Squash", ["v"], ["y"], inner, imports))
    return b.node("Squash", [x], b.shapes[x], domain=FUNCTIONS)


def softmax(b: Builder, x: str) -> str:
    # Up to opset 12 its axis splits the tensor in two.
    return b.node("Softmax", [x], b.shapes[x], axis=len(b.shapes[x]))


def cast(b: Builder, x: str) -> str:
    wide = b.node("Cast", [x], b.shapes[x], to=11)
    del b.shapes[wide]
    return b.node("Cast", [wide], b.shapes[x], to=1)


def normalised_layer(b: Builder, x: str) -> str:
    shape = b.shapes[x]
    if b.opset < 17:
        return activation(b, x)
    scale, bias = b.weight(shape[-1], scale=0.2, positive=True), b.weight(shape[-1], scale=0.2)
    return b.node("LayerNormalization", [x, scale, *([bias] if b.chance(2) else [])], shape, axis=-1)


def normalised_batch(b: Builder, x: str) -> str:
    width = b.shapes[x][0]
    scale, bias, mean = (b.weight(width, scale=0.5, positive=positive) for positive in (True, False, False))
    variance = b.weight(width, scale=0.5, positive=True)
    attributes = {"epsilon": 1e-3} if b.chance(2) else {}
    return b.node("BatchNormalization", [x, scale, bias, mean, variance], b.shapes[x], **attributes)


def halves(b: Builder, x: str) -> str:
    """Split on the first axis of a sample, and join the parts again or let one open the other."""
    first, *rest = b.shapes[x]
    if first % 2:
        return activation(b, x)
    shape = (first // 2, *rest)
    sizes = [first // 2] * 2
    inputs, attributes = ([x, b.constant(sizes)], {}) if b.opset >= 13 else ([x], {"split": sizes})
    left = b.node("Split", inputs, shape, outputs=2, axis=1, **attributes)
    right = b.nodes[-1].output[1]
    if b.chance(2):
        return b.node("Concat", [right, left], (first, *rest), axis=1)
    b.shapes[right] = shape
    return b.node("Mul", [left, b.node("Sigmoid", [right], shape)], shape)


def sliced(b: Builder, x: str) -> str:
    shape = b.shapes[x]
    axis = b.number(1, len(shape))
    least = b.number(0, shape[axis - 1] - 1)
    ends = {"starts": [least], "ends": [b.pick([shape[axis - 1], 2**31 - 1])], "axes": [axis]}
    after = tuple(n - least if i == axis - 1 else n for i, n in enumerate(shape))
    if b.opset < 10:
        return b.node("Slice", [x], after, **ends)
    return b.node("Slice", [x, *(b.constant(values) for values in ends.values())], after)


def padded(b: Builder, x: str) -> str:
    shape = b.shapes[x]
    before, behind = b.number(0, 1), b.number(0, 1)
    pads = [*[0] * len(shape), before, *[0] * len(shape), behind]
    after = (*shape[:-1], shape[-1] + before + behind)
    if b.opset < 11:
        return b.node("Pad", [x], after, pads=pads, value=0.5)
    return b.node("Pad", [x, b.constant(pads), b.constant(0.5, np.float32)], after)


# -- on rows -----------------------------------------------------------------------------------------


def gemm(b: Builder, x: str, outputs: int | None = None) -> str:
    (inputs,) = b.shapes[x]
    outputs = outputs or b.number(2, _WIDEST)
    attributes: dict[str, Any] = {}
    transposed = b.chance(2)
    if transposed:
        attributes["transB"] = 1
    if b.chance(4):
        attributes["alpha"] = b.pick([0.5, -2.0, 0.0])
    if b.chance(4):
        attributes["beta"] = b.pick([0.5, -2.0, 0.0])
    weight = b.weight(outputs, inputs) if transposed else b.weight(inputs, outputs)
    if b.chance(6):
        weight = b.node("Transpose", [weight], (), perm=[1, 0])
        del b.shapes[weight]
        attributes["transB"] = 0 if transposed else 1
    bias: list[str] = []
    if b.opset < 11 or b.chance(2):
        bias = [b.weight(*b.pick([(outputs,), (1, outputs), (1,), ()]), scale=0.3)]
    if b.chance(10):
        x = b.node("Transpose", [x], (), perm=[1, 0])
        del b.shapes[x]
        attributes["transA"] = 1
    return b.node("Gemm", [x, weight, *bias], (outputs,), **attributes)


def matmul(b: Builder, x: str, outputs: int | None = None) -> str:
    """On the last axis, with or without an Add behind it."""
    *front, inputs = b.shapes[x]
    outputs = outputs or b.number(2, _WIDEST)
    product = b.node("MatMul", [x, b.weight(inputs, outputs)], (*front, outputs))
    if b.chance(3):
        return product
    bias = b.weight(*b.pick([(outputs,), (1, outputs), (1,)]), scale=0.3)
    return b.node("Add", [product, bias] if b.chance(2) else [bias, product], (*front, outputs))


def multiplied_from_the_left(b: Builder, x: str) -> str:
    """Weights times activations: the units lie on the first axis of a sample."""
    first, last = b.shapes[x]
    outputs = b.number(2, _WIDEST)
    return b.node("MatMul", [b.weight(outputs, first), x], (outputs, last))


def unfolded(b: Builder, x: str) -> str:
    """Rows to tokens or maps."""
    (width,) = b.shapes[x]
    shapes = [(width, 1), (1, width), (width, 1, 1), (1, 1, width)]
    shapes += [(2, width // 2)] if width % 2 == 0 else []
    shape = b.pick(shapes)
    if shape == (width, 1) and b.chance(2):
        return _with_axes(b, "Unsqueeze", x, [2], shape)
    return _reshaped(b, x, shape)


# -- on tokens and maps --------------------------------------------------------------------------------


def convolution(b: Builder, x: str) -> str:
    channels, *size = b.shapes[x]
    groups = b.pick([g for g in (1, 1, 2, channels) if channels % g == 0])
    outputs = groups * b.number(1, 2) if groups > 1 else b.number(2, _WIDEST)
    kernel, strides, dilations, pads = [], [], [], []
    attributes: dict[str, Any] = {}
    auto = b.pick(["", "", "SAME_UPPER", "SAME_LOWER", "VALID"])
    for length in size:
        taps = b.number(1, min(3, length))
        dilation = b.pick([1, 1, 2]) if 2 * (taps - 1) < length and not auto.startswith("SAME") else 1
        kernel.append(taps)
        dilations.append(dilation)
        strides.append(b.pick([1, 1, 2]))
        pads.append((b.number(0, taps - 1), b.number(0, taps - 1)) if not auto else (0, 0))
    if auto:
        attributes["auto_pad"] = auto
    elif any(map(sum, pads)) or b.chance(2):
        attributes["pads"] = [before for before, _ in pads] + [after for _, after in pads]
    for name, values, usual in (("strides", strides, 1), ("dilations", dilations, 1)):
        if set(values) != {usual} or b.chance(2):
            attributes[name] = values
    if b.chance(2):
        attributes["kernel_shape"] = kernel
    if groups > 1 or b.chance(2):
        attributes["group"] = groups
    shape = [
        -(-n // s) if auto.startswith("SAME") else (n + sum(p) - d * (k - 1) - 1) // s + 1
        for n, k, s, d, p in zip(size, kernel, strides, dilations, pads, strict=True)
    ]
    inputs = [x, b.weight(outputs, channels // groups, *kernel), *([b.weight(outputs)] if b.chance(2) else [])]
    y = b.node("Conv", inputs, (outputs, *shape), **attributes)
    if len(inputs) == 2 and b.chance(2):
        y = b.node("Add", [y, b.weight(*b.pick([(outputs, *[1] * len(size)), (1, outputs, *[1] * len(size))]))],
                   b.shapes[y])  # fmt: skip
    return y


def transposed_convolution(b: Builder, x: str) -> str:
    channels, *size = b.shapes[x]
    outputs, stride = b.number(1, 3), b.pick([1, 2])
    shape = tuple((n - 1) * stride + 2 for n in size)
    weight = b.weight(channels, outputs, *[2] * len(size))
    return b.node("ConvTranspose", [x, weight], (outputs, *shape), strides=[stride] * len(size))


def pool(b: Builder, x: str) -> str:
    channels, *size = b.shapes[x]
    op = b.pick(["MaxPool", "AveragePool", "LpPool"])
    kernel = [min(2, n) for n in size]
    strides = [b.pick([1, 2]) for _ in size]
    shape = [(n - k) // s + 1 for n, k, s in zip(size, kernel, strides, strict=True)]
    return b.node(op, [x], (channels, *shape), kernel_shape=kernel, strides=strides)


def global_pool(b: Builder, x: str) -> str:
    channels, *size = b.shapes[x]
    return b.node(b.pick(["GlobalAveragePool", "GlobalMaxPool"]), [x], (channels, *[1] * len(size)))


def normalised_map(b: Builder, x: str) -> str:
    width = b.shapes[x][0]
    if b.chance(2):
        return b.node("LRN", [x], b.shapes[x], size=3)
    return b.node("InstanceNormalization", [x, b.weight(width, scale=0.5), b.weight(width, scale=0.5)], b.shapes[x])


def slopes(b: Builder, x: str) -> str:
    width, *size = b.shapes[x]
    return b.node("PRelu", [x, b.weight(*b.pick([(width, *[1] * len(size)), (1,)]))], b.shapes[x])


def exchanged(b: Builder, x: str) -> str:
    """A Transpose that leaves the samples in front."""
    shape = b.shapes[x]
    order = b.pick([[2, 1], [1, 2]] if len(shape) == 2 else [[2, 3, 1], [3, 1, 2], [1, 3, 2], [3, 2, 1]])
    return b.node("Transpose", [x], tuple(shape[axis - 1] for axis in order), perm=[0, *order])


def reduced(b: Builder, x: str) -> str:
    """A mean over one axis."""
    shape = b.shapes[x]
    axis = b.number(1, len(shape))
    kept = b.chance(2)
    given = axis if b.chance(2) else axis - len(shape) - 1
    after = tuple(1 if i == axis - 1 else n for i, n in enumerate(shape) if kept or i != axis - 1)
    op = b.pick(["ReduceMean", "ReduceMax", "ReduceSum"])
    inside = b.opset >= (13 if op == "ReduceSum" else 18)
    if given < 0 and b.opset < 11:
        given = axis
    inputs, attributes = ([x, b.constant([given])], {}) if inside else ([x], {"axes": [given]})
    return b.node(op, inputs, after, keepdims=int(kept), **attributes)


def flat(b: Builder, x: str) -> str:
    """To rows, in one of the ways to say so."""
    shape = b.shapes[x]
    width = int(np.prod(shape))
    way = b.pick(["Flatten", "zero", "free", "Squeeze", "counted"])
    if way == "Squeeze" and 1 in shape and len(shape) == 2:
        return _with_axes(b, "Squeeze", x, [shape.index(1) + 1], (width,))
    if way == "counted" and b.opset >= 13:
        return _counted(b, x, width)
    target = {"zero": [0, -1], "free": [-1, width]}.get(way)
    if b.fixed and target is not None and b.chance(2):
        target = b.pick([[1, -1], [1, width]])
    if target is None:
        return b.node("Flatten", [x], (width,), **({"axis": 1} if b.chance(2) else {}))
    return b.node("Reshape", [x, b.constant(target)], (width,))


def _counted(b: Builder, x: str, width: int) -> str:
    """Take the number of samples from the shape of the tensor, as exporters do."""
    names = [
        b.node("Shape", [x], ()),
    ]
    names.append(b.node("Gather", [names[0], b.constant(0)], ()))
    names.append(b.node("Unsqueeze", [names[1], b.constant([0])], ()))
    names.append(b.node("Concat", [names[2], b.constant([-1])], (), axis=0))
    for name in names:
        del b.shapes[name]
    return b.node("Reshape", [x, names[3]], (width,))


def grown(b: Builder, x: str) -> str:
    """Each point of a map twice."""
    channels, *size = b.shapes[x]
    if b.opset < 9:
        return pool(b, x)
    shape = (channels, *(2 * n for n in size))
    scales = b.constant([1, 1, *[2] * len(size)], np.float32)
    if b.opset < 11:
        return b.node("Upsample" if b.opset == 9 else "Resize", [x, scales], shape, mode="nearest")
    return b.node("Resize", [x, "", scales], shape, mode="nearest")


def first_of(b: Builder, x: str) -> str:
    """Leave one place of the first axis, such as the first token."""
    first, *rest = b.shapes[x]
    return b.node("Gather", [x, b.constant(b.number(0, first - 1))], tuple(rest), axis=1)


def attention(b: Builder, x: str) -> str:
    """One head: softmax(q k^T) v, each of them a product of the tokens."""
    tokens, width = b.shapes[x]
    query, key, value = (b.node("MatMul", [x, b.weight(width, width)], (tokens, width)) for _ in range(3))
    turned = b.node("Transpose", [key], (width, tokens), perm=[0, 2, 1])
    weights = softmax(b, b.node("MatMul", [query, turned], (tokens, tokens)))
    return b.node("MatMul", [weights, value], (tokens, width))


def recurrent(b: Builder, x: str) -> str:
    """An LSTM or GRU over the tokens; its output is [tokens, directions, samples, hidden]."""
    tokens, width = b.shapes[x]
    hidden, op = b.number(2, 3), b.pick(["LSTM", "GRU", "RNN"])
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    first = b.node("Transpose", [x], (), perm=[1, 0, 2])
    weights = [b.weight(1, gates * hidden, width), b.weight(1, gates * hidden, hidden)]
    bias = [b.weight(1, 2 * gates * hidden)] if b.chance(2) else []
    y = b.node(op, [first, *weights, *bias], (), hidden_size=hidden)
    squeezed = _with_axes(b, "Squeeze", y, [1], ())
    for name in (first, y, squeezed):
        del b.shapes[name]
    return b.node("Transpose", [squeezed], (tokens, hidden), perm=[1, 0, 2])


def _with_axes(b: Builder, op: str, x: str, axes: list[int], shape: tuple[int, ...]) -> str:
    if b.opset >= 13:
        return b.node(op, [x, b.constant(axes)], shape)
    return b.node(op, [x], shape, axes=axes)


def _reshaped(b: Builder, x: str, shape: tuple[int, ...]) -> str:
    first = b.pick([0, -1, 1]) if b.fixed else b.pick([0, -1])
    return b.node("Reshape", [x, b.constant([first, *shape])], shape)


# -- whole models ----------------------------------------------------------------------------------------

_ANYWHERE: tuple[Step, ...] = (
    activation, chain, skip, gate, joined, shifted, branch, called, softmax, cast, normalised_layer, normalised_batch,
    halves, sliced, padded,
)  # fmt: skip
_ROWS: tuple[Step, ...] = (gemm, gemm, gemm, matmul, matmul, unfolded)
_TOKENS: tuple[Step, ...] = (
    matmul, convolution, multiplied_from_the_left, exchanged, reduced, flat, attention, recurrent, pool,
    first_of,
)  # fmt: skip
_MAPS: tuple[Step, ...] = (
    convolution, convolution, convolution, matmul, transposed_convolution, pool, global_pool, normalised_map, slopes,
    exchanged, reduced, flat, grown, first_of,
)  # fmt: skip


def _start(b: Builder) -> str:
    kind = b.pick(["rows", "maps", "tokens", "words"])
    if kind == "rows":
        return b.input(b.number(2, _WIDEST))
    if kind == "maps":
        return b.input(b.number(1, 3), b.number(3, 6), b.number(3, 6))
    if kind == "tokens":
        return b.input(b.number(2, 4), b.number(2, 5))
    words = b.input(b.number(2, 4), most=5)
    return b.node("Gather", [b.weight(5, 4, scale=1.0), words], (*b.shapes[words], 4), axis=0)


@st.composite
def models(draw: Callable[..., Any]) -> Drawn:
    """Draw a classifier."""
    b = Builder(draw)
    x = _start(b)
    if b.chance(6):
        side = b.input(3)
        x = joined(b, gemm(b, side)) if len(b.shapes[x]) == 1 else x
    for _ in range(b.number(1, 7)):
        own = {1: _ROWS, 2: _TOKENS, 3: _MAPS}[len(b.shapes[x])]
        x = b.pick(own if b.number(0, 2) else _ANYWHERE)(b, x)
    if len(b.shapes[x]) > 1:
        x = flat(b, x)
    x = b.pick([gemm, matmul])(b, x, b.number(2, 4))
    final = b.pick(["", "", "Softmax", "Sigmoid", "LogSoftmax", "Identity"])
    if final:
        attributes = {"axis": 1} if "Softmax" in final else {}
        x = b.node(final, [x], b.shapes[x], **attributes)
    return b.finish(x)
