"""Layers: the linear operators of a model whose weights a repair may rewrite.

Every layer is looked at as one matrix product, whatever operator it is written with:

    output rows = input rows @ M (+ bias)        M of shape [groups, d, o]

Gemm and MatMul have one row a sample (or a token). A convolution has one row a sample and output position, the
row being the patch of the input under the kernel (im2col); its groups are independent products.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx

from onnxcare.errors import ModelError
from onnxcare.graph.parameters import Parameter, find_parameters
from onnxcare.graph.view import GraphView, attribute, operator

Array = np.ndarray


@dataclass(frozen=True)
class Convolution:
    """Geometry of a Conv node; spatial lists have one entry a spatial dimension."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    groups: int

    @property
    def explicit(self) -> bool:
        """Whether the padding is given by numbers."""
        return self.auto_pad in ("NOTSET", "")


@dataclass(frozen=True)
class Layer:
    """A Gemm, MatMul or Conv node with constant weights, and the Add behind it that holds its bias.

    Attributes:
        name: label of the node.
        operator: `Gemm`, `MatMul`, `Conv`, or the name of one that cannot be rewritten.
        node: index of the node in the graph.
        input: the tensor it reads.
        output: the tensor it writes, bias included.
        weight: its weights.
        bias: its bias of one value an output, or None where it has none that could be patched alone.
        inputs: features (or input channels) it reads.
        outputs: features (or output channels) it writes.
        transposed: whether the weight is stored as [outputs, inputs] (Gemm and MatMul).
        alpha: factor on the product (Gemm).
        beta: factor on the bias (Gemm).
        convolution: geometry, for Conv.
        refusal: why its weights cannot be rewritten; None if they can.
        tied: whether that is because other nodes of the graph read the same weight, and for nothing else: it can be
            changed for all of them together.
    """

    name: str
    operator: str
    node: int
    input: str
    output: str
    weight: Parameter
    bias: Parameter | None
    inputs: int
    outputs: int
    transposed: bool = False
    alpha: float = 1.0
    beta: float = 1.0
    convolution: Convolution | None = None
    refusal: str | None = None
    tied: bool = False

    @property
    def groups(self) -> int:
        """Number of independent products: the groups of a convolution, else 1."""
        return self.convolution.groups if self.convolution else 1

    @property
    def unit_axis(self) -> int:
        """Axis of the output on which the layer's units lie."""
        return 1 if self.convolution else -1

    # -- the matrix form -------------------------------------------------------------------------

    @property
    def features(self) -> int:
        """Number of weights that go into each output: the rows of a group's product, the bias left out."""
        taps = int(np.prod(self.convolution.kernel, dtype=np.int64)) if self.convolution else 1
        return self.inputs // self.groups * taps

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """The shape of its matrix, [groups, d (+ 1), outputs / groups], with a row for the bias where it has one."""
        return self.groups, self.features + (self.bias is not None), self.outputs // self.groups

    def rows(self, x: Array) -> Array:
        """Return the input as rows of the matrix product, [groups, samples, positions, d (+ 1)].

        The last column is one where the layer has a bias. `x` has the samples on axis 0.
        """
        if self.convolution:
            rows = _patches(x, self.convolution)
        else:
            rows = x.reshape(1, len(x), -1, x.shape[-1])
        if self.bias is None:
            return rows
        ones = np.ones((*rows.shape[:-1], 1), rows.dtype)
        return np.concatenate([rows, ones], axis=-1)

    def inside(self, size: tuple[int, ...]) -> tuple[Array, tuple[int, ...]]:
        """Return which taps of a convolution's kernel lie inside a map of this size, and the size of its output.

        Returns:
            [positions, taps] bool, and the spatial shape of the output.
        """
        assert self.convolution is not None
        conv = replace(self.convolution, groups=1)
        rows = _patches(np.ones((1, 1, *size), bool), conv)
        lengths = zip(size, _padding(size, conv), conv.kernel, conv.strides, conv.dilations, strict=True)
        shape = tuple((n + sum(pad) - d * (k - 1) - 1) // stride + 1 for n, pad, k, stride, d in lengths)
        return rows[0, 0], shape

    def output_rows(self, z: Array) -> Array:
        """Return the layer's output as rows, [groups, samples, positions, outputs / groups]."""
        if not self.convolution:
            return z.reshape(1, len(z), -1, z.shape[-1])
        flat = z.reshape(len(z), self.groups, self.outputs // self.groups, -1)
        return flat.transpose(1, 0, 3, 2)

    def from_rows(self, rows: Array, shape: tuple[int, ...]) -> Array:
        """Undo `output_rows` for an output of the given shape."""
        if not self.convolution:
            return rows.reshape(shape)
        return np.ascontiguousarray(rows.transpose(1, 0, 3, 2)).reshape(shape)

    def product(self, rows: Array, change: Array) -> Array:
        """Return `rows @ change`: what a change of the weights adds to the output rows."""
        groups, samples, positions, d = rows.shape
        flat = rows.reshape(groups, samples * positions, d) @ change
        return flat.reshape(groups, samples, positions, -1)

    def matrix(self, weight: Array, bias: Array | None) -> Array:
        """Return the layer's own matrix M, with the bias as its last row where it has one."""
        if self.convolution:
            m = weight.reshape(self.groups, self.outputs // self.groups, -1).transpose(0, 2, 1)
        else:
            m = (weight.T if self.transposed else weight)[None] * self.alpha
        if self.bias is None or bias is None:
            return m
        row = bias.reshape(self.groups, 1, -1) * self.beta
        return np.concatenate([m, row], axis=1)

    def add(self, change: Array, values: Mapping[str, Array]) -> dict[str, Array]:
        """Return the new values of the layer's parameters after `M += change`.

        Args:
            change: [groups, d (+ 1), outputs / groups].
            values: the present values of the parameters, by name.
        """
        product = change if self.bias is None else change[:, :-1]
        weight = values[self.weight.name]
        if self.convolution:
            delta = product.transpose(0, 2, 1).reshape(weight.shape)
        else:
            delta = (product[0].T if self.transposed else product[0]) / self.alpha
        new = {self.weight.name: weight + delta}
        if self.bias is not None:
            bias = values[self.bias.name]
            new[self.bias.name] = bias + change[:, -1].reshape(bias.shape) / self.beta
        return new

    def scale_inputs(self, factors: Array, weight: Array) -> Array:
        """Return the weight after each input feature (or input channel) was multiplied by its factor.

        This folds multipliers on the units in front into the outgoing weights; it is exact for any factor,
        negative ones included, whatever activation function stands in front.
        """
        if self.convolution:
            per_group = factors.reshape(self.groups, -1)
            rows_of = np.repeat(per_group, self.outputs // self.groups, axis=0)
            return weight * rows_of.reshape(*rows_of.shape, *[1] * (weight.ndim - 2))
        return weight * (factors[None, :] if self.transposed else factors[:, None])


def find_layers(view: GraphView, parameters: Mapping[str, Parameter] | None = None) -> list[Layer]:
    """Return the layers of the main graph in graph order, those that cannot be rewritten included.

    Args:
        view: the graph.
        parameters: its constants, by name; None where they are held as they are read.
    """
    parameters = find_parameters(view) if parameters is None else parameters
    builders = {"Gemm": _gemm, "MatMul": _matmul, "Conv": _conv}
    layers = []
    for index, node in enumerate(view.nodes):
        build = _packed if _is_packed(node) else builders.get(operator(node))
        if build is None:
            continue
        layer = build(view, parameters, index)
        if layer is not None:
            layers.append(_with_refusal(view, layer))
    return layers


def _with_refusal(view: GraphView, layer: Layer) -> Layer:
    """Refuse shared and non-float weights by name; drop a bias that cannot be patched alone."""
    if layer.refusal is None and layer.weight.storage.refusal is not None:
        return replace(layer, refusal=f"its weight {layer.weight.name!r} {layer.weight.storage.refusal}")
    if len(layer.weight.users) > 1:
        # The same numbers may be read under other names, in branches, or as an output of the model.
        here = len(view.consumers[layer.weight.name]) == len(layer.weight.users)
        others = [user for user in layer.weight.users if user != layer.name]
        who = others[0] if others else f"{layer.name} again"
        return replace(layer, refusal=f"its weight {layer.weight.name!r} is also used by {who}", tied=here)
    bias = layer.bias
    if bias is not None and (len(bias.users) > 1 or bias.dtype != layer.weight.dtype or bias.storage.refusal):
        return replace(layer, bias=None)
    return layer


def _is_packed(node: onnx.NodeProto) -> bool:
    return (node.domain, node.op_type) == ("com.microsoft", "MatMulNBits")


def _packed(view: GraphView, parameters: Mapping[str, Parameter], index: int) -> Layer | None:
    """Return a product with a weight of a few bits a value, which is shown but not rewritten."""
    node = view.nodes[index]
    weight = parameters.get(node.input[1])
    if weight is None:
        return None
    return Layer(
        name=view.label(index),
        operator=node.op_type,
        node=index,
        input=node.input[0],
        output=node.output[0],
        weight=weight,
        bias=None,
        inputs=int(attribute(node, "K")),
        outputs=int(attribute(node, "N")),
        transposed=True,
        refusal=f"its weight {weight.name!r} is packed, {attribute(node, 'bits', 4)} bits a value",
    )


def _weight(view: GraphView, parameters: Mapping[str, Parameter], name: str) -> tuple[Parameter, bool] | None:
    """Follow Identity and Transpose nodes from a weight input to its matrix; return also whether it is flipped."""
    flipped = False
    while name not in parameters:
        index = view.producer.get(name)
        if index is None:
            return None
        node = view.nodes[index]
        perm = attribute(node, "perm")
        if operator(node) == "Transpose" and perm in (None, [1, 0]):
            flipped = not flipped
        elif operator(node) != "Identity":
            return None
        if view.sole_consumer(name) is None:
            return None
        name = node.input[0]
    return (parameters[name], flipped) if len(parameters[name].shape) == 2 else None


def _bias_behind(
    view: GraphView, parameters: Mapping[str, Parameter], tensor: str, outputs: int, tail: int
) -> tuple[Parameter, str] | None:
    """Return the constant that the Add behind a bare product adds to each output, and the Add's output.

    `tail` is the number of axes behind the unit axis: 0 for a product, the spatial ones for a Conv.
    """
    reader = view.sole_consumer(tensor)
    if reader is None or operator(view.nodes[reader]) != "Add":
        return None
    node = view.nodes[reader]
    other = node.input[1] if node.input[0] == tensor else node.input[0]
    bias = parameters.get(other)
    if bias is None:
        return None
    fitting = (outputs, *[1] * tail)
    leading = bias.shape[: max(0, len(bias.shape) - len(fitting))]
    # A constant with more axes than a batch of rows or maps would give the sum one more in front of the samples.
    if bias.shape[len(leading) :] != fitting or leading not in ((), (1,)):
        return None
    return bias, node.output[0]


def _gemm(view: GraphView, parameters: Mapping[str, Parameter], index: int) -> Layer | None:
    node = view.nodes[index]
    found = _weight(view, parameters, node.input[1])
    if found is None or not view.is_activation(node.input[0]):
        return None
    weight, flipped = found
    transposed = bool(attribute(node, "transB", 0)) != flipped
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    bias = parameters.get(node.input[2]) if len(node.input) > 2 else None
    if bias is not None and bias.shape not in ((outputs,), (1, outputs)):
        bias = None
    beta = float(attribute(node, "beta", 1.0))
    alpha = float(attribute(node, "alpha", 1.0))
    refusal = None
    if attribute(node, "transA", 0):
        refusal = "it transposes its input (transA=1)"
    elif alpha == 0:
        refusal = "its alpha is 0"
    return Layer(
        name=view.label(index),
        operator="Gemm",
        node=index,
        input=node.input[0],
        output=node.output[0],
        weight=weight,
        bias=bias if beta != 0 else None,
        inputs=inputs,
        outputs=outputs,
        transposed=transposed,
        alpha=alpha,
        beta=beta,
        refusal=refusal,
    )


def _matmul(view: GraphView, parameters: Mapping[str, Parameter], index: int) -> Layer | None:
    node = view.nodes[index]
    found = _weight(view, parameters, node.input[1])
    if found is None or not view.is_activation(node.input[0]):
        return None
    weight, transposed = found
    outputs, inputs = weight.shape if transposed else weight.shape[::-1]
    behind = _bias_behind(view, parameters, node.output[0], outputs, 0)
    bias, output = behind if behind else (None, node.output[0])
    return Layer(
        name=view.label(index),
        operator="MatMul",
        node=index,
        input=node.input[0],
        output=output,
        weight=weight,
        bias=bias,
        inputs=inputs,
        outputs=outputs,
        transposed=transposed,
    )


def _conv(view: GraphView, parameters: Mapping[str, Parameter], index: int) -> Layer | None:
    node = view.nodes[index]
    weight = parameters.get(node.input[1])
    if weight is None or not view.is_activation(node.input[0]):
        return None
    spatial = len(weight.shape) - 2
    groups = int(attribute(node, "group", 1))
    geometry = Convolution(
        kernel=weight.shape[2:],
        strides=tuple(attribute(node, "strides", [1] * spatial)),
        dilations=tuple(attribute(node, "dilations", [1] * spatial)),
        pads=tuple(attribute(node, "pads", [0] * 2 * spatial)),
        auto_pad=str(attribute(node, "auto_pad", "NOTSET")),
        groups=groups,
    )
    outputs = weight.shape[0]
    output = node.output[0]
    bias = parameters.get(node.input[2]) if len(node.input) > 2 else None
    if bias is None:
        behind = _bias_behind(view, parameters, output, outputs, spatial)
        if behind:
            bias, output = behind
    return Layer(
        name=view.label(index),
        operator="Conv",
        node=index,
        input=node.input[0],
        output=output,
        weight=weight,
        bias=bias,
        inputs=weight.shape[1] * groups,
        outputs=outputs,
        convolution=geometry,
    )


def _padding(size: tuple[int, ...], conv: Convolution) -> list[tuple[int, int]]:
    """Return the (before, after) padding of each spatial dimension."""
    dims = len(conv.kernel)
    if conv.explicit:
        return [(conv.pads[i], conv.pads[i + dims]) for i in range(dims)]
    if conv.auto_pad == "VALID":
        return [(0, 0)] * dims
    padding = []
    for length, kernel, stride, dilation in zip(size, conv.kernel, conv.strides, conv.dilations, strict=True):
        reach = dilation * (kernel - 1) + 1
        total = max(0, (-(-length // stride) - 1) * stride + reach - length)
        less, more = total // 2, total - total // 2
        padding.append((less, more) if conv.auto_pad == "SAME_UPPER" else (more, less))
    return padding


def _patches(x: Array, conv: Convolution) -> Array:
    """Return im2col rows [groups, samples, positions, channels / groups * kernel size]."""
    if x.ndim != 2 + len(conv.kernel):
        raise ModelError(f"a convolution reads an input with {x.ndim} axes, which is not supported")
    padded = np.pad(x, [(0, 0), (0, 0), *_padding(x.shape[2:], conv)])
    reach = [d * (k - 1) + 1 for k, d in zip(conv.kernel, conv.dilations, strict=True)]
    dims = len(conv.kernel)
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, stride) for stride in conv.strides]
    taps = [slice(None, None, dilation) for dilation in conv.dilations]
    windows = windows[(slice(None), slice(None), *steps, *taps)]
    samples, channels = x.shape[:2]
    grouped = windows.reshape(samples, conv.groups, channels // conv.groups, *windows.shape[2:])
    positions = grouped.shape[3 : 3 + dims]
    # [samples, groups, c, *positions, *kernel] -> [groups, samples, *positions, c, *kernel]
    order = (1, 0, *range(3, 3 + dims), 2, *range(3 + dims, 3 + 2 * dims))
    rows = grouped.transpose(order)
    return rows.reshape(conv.groups, samples, int(np.prod(positions)), -1)
