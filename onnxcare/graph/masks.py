"""Masks: how the elements that may depend on something (the tainted ones) pass through a single operator.

* Element-wise steps pass them on as they are, joined over the operands after broadcasting. A constant factor 0 stops
  them, and a constant condition of Where chooses between two masks.
* Steps that move values about move the mask: it goes through the operator itself, in place of the values.
* A look-up in a constant table (an embedding, a one-hot code) taints all that is looked up with a tainted index.
* Products taint y[i, j] if there is a k with x[i, k] tainted and W[k, j] != 0; convolutions likewise, by channels.

A rule returns the masks of the node's outputs, and whether elements were spread over the positions of others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np
import onnx

from onnxcare.graph.view import attribute, operator

Array = np.ndarray

# Every element of the output depends on the element of the first input at its place, and on whole other inputs.
_ELEMENT_WISE = (
    "Relu LeakyRelu Elu Selu Celu Gelu Sigmoid HardSigmoid HardSwish Swish Mish Tanh Softplus Softsign PRelu "
    "ThresholdedRelu Clip Shrink Erf Exp Log Sqrt Reciprocal Abs Neg Sign Floor Ceil Round "
    "Sin Cos Tan Asin Acos Atan Sinh Cosh Asinh Acosh Atanh Not BitwiseNot IsNaN IsInf "
    "Identity Cast CastLike Dropout BatchNormalization QuantizeLinear DequantizeLinear".split()
)
_ELEMENT_WISE_ML = "Scaler Imputer Binarizer LabelEncoder".split()
# Every element of the output depends on the elements of the inputs at its place, after broadcasting.
_JOINING = (
    "Add Sub Mul Div Pow Mod Sum Mean Min Max Where Equal Greater GreaterOrEqual Less LessOrEqual "
    "And Or Xor BitwiseAnd BitwiseOr BitwiseXor BitShift".split()
)
# Every element of the output is an element of the first input (of any input, for Concat).
_MOVING = "Flatten Reshape Transpose Squeeze Unsqueeze Concat Split Slice Gather GatherElements Expand Tile Pad".split()
_MOVING_ML = ["ArrayFeatureExtractor"]


class Unclear(Exception):
    """A shape or value that a rule needs is not known; the node is taken to mix everything."""


class Facts(Protocol):
    """What a rule may ask about the tensors around a node."""

    def tainted(self, names: Iterable[str]) -> bool:
        """Return whether any of the tensors is tainted."""

    def value(self, name: str) -> Array | None:
        """Return the value of a tensor if it is known in advance."""

    def known(self, name: str) -> Array:
        """Return a value that must be known."""

    def varies(self, name: str) -> bool:
        """Return whether a tensor may depend on any input."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a shape that must be known."""

    def mask(self, name: str) -> Array:
        """Return which elements of a tensor are tainted."""

    def support(self, name: str) -> Array:
        """Return which elements of a tensor may differ from zero."""

    def evaluate(self, node: onnx.NodeProto, feeds: dict[str, Array]) -> list[Array]:
        """Run a single node; whatever goes wrong, its result is not known."""


Masks = tuple[Sequence[Array | None], bool]
Rule = Callable[[Facts, onnx.NodeProto], Masks]


def _element_wise(facts: Facts, node: onnx.NodeProto) -> Masks:
    # In training mode, normalisation averages over the samples.
    if facts.tainted(node.input[1:]) or attribute(node, "training_mode", 0) or len(node.output) > 1:
        raise Unclear(node.op_type)
    return [facts.mask(node.input[0])], False


def _joined(facts: Facts, node: onnx.NodeProto) -> Masks:
    masks = {name: facts.mask(name) for name in node.input}
    shape = np.broadcast_shapes(*(mask.shape for mask in masks.values()))
    mixes = any(mask.any() and mask.size < np.prod(shape) for mask in masks.values())
    parts = list(masks.values())
    if operator(node) == "Where" and (condition := facts.value(node.input[0])) is not None:
        parts = [np.where(condition, masks[node.input[1]], masks[node.input[2]])]
    joined = np.zeros(shape, bool)
    for part in parts:
        joined |= part
    if operator(node) == "Mul":
        for name in masks:
            if (factor := facts.value(name)) is not None:
                joined &= factor != 0
    # A column that is broadcast against constants (categories it is compared with) is spread over nothing but itself.
    return [joined], mixes and sum(facts.varies(name) for name in masks) > 1


def _moved(facts: Facts, node: onnx.NodeProto) -> Masks:
    kind = node.op_type
    data = list(node.input) if kind == "Concat" else [node.input[0]]
    rest = [name for name in node.input if name and name not in data]
    if kind == "Gather" and facts.tainted(rest):
        return _looked_up(facts, node)
    # Numbers are used, for not every kernel takes booleans.
    feeds: dict[str, Array] = {name: facts.mask(name).astype(np.float32) for name in data}
    for name in rest:
        fills = kind == "Pad" and name in node.input[2:3] and not facts.tainted([name])
        feeds[name] = np.zeros((), np.float32) if fills else facts.known(name)
    results = facts.evaluate(node, feeds)
    moved = [result > 0.5 for result in results]
    if any(mask.size == 0 for mask in moved):
        raise Unclear(kind)
    mixes = kind in ("Expand", "Tile") and moved[0].size > feeds[data[0]].size
    return moved, mixes


def _looked_up(facts: Facts, node: onnx.NodeProto) -> Masks:
    """Gather with tainted indices: what an index finds depends on that index."""
    table, indices = node.input
    if facts.tainted([table]):
        raise Unclear(table)
    shape, mask = facts.shape(table), facts.mask(indices)
    axis = int(attribute(node, "axis", 0)) % len(shape)
    before, behind = shape[:axis], shape[axis + 1 :]
    mask = mask.reshape(*[1] * len(before), *mask.shape, *[1] * len(behind))
    return [np.broadcast_to(mask, (*before, *facts.shape(indices), *behind))], facts.varies(table)


def _one_hot(facts: Facts, node: onnx.NodeProto) -> Masks:
    if facts.tainted(node.input[1:]):
        raise Unclear(node.op_type)
    mask = facts.mask(node.input[0])
    axis = int(attribute(node, "axis", -1)) % (mask.ndim + 1)
    depth = int(facts.known(node.input[1]).reshape(-1)[0])
    return [np.repeat(np.expand_dims(mask, axis), depth, axis)], any(facts.varies(name) for name in node.input[1:])


def _one_hot_ml(facts: Facts, node: onnx.NodeProto) -> Masks:
    categories = attribute(node, "cats_int64s") or attribute(node, "cats_strings") or []
    return [np.repeat(facts.mask(node.input[0])[..., None], len(categories), axis=-1)], False


def _product(facts: Facts, node: onnx.NodeProto) -> Masks:
    """MatMul and Gemm, whose factor alpha and beta count as other than zero."""
    left, right = node.input[:2]
    flip_left, flip_right = (bool(attribute(node, name, 0)) for name in ("transA", "transB"))

    def meets(first: Array, second: Array) -> Array:
        first, second = (first.T if flip_left else first), (second.T if flip_right else second)
        # BLAS may raise the flag for invalid numbers over lanes that it does not use.
        with np.errstate(invalid="ignore"):
            return first.astype(np.float32) @ second.astype(np.float32) != 0

    hits: Array = np.zeros((), bool)
    if facts.tainted([left]) or not facts.tainted([right]):
        hits = meets(facts.mask(left), facts.support(right))
    if facts.tainted([right]):
        hits = hits | meets(facts.support(left), facts.mask(right))
    if len(node.input) > 2 and facts.tainted([node.input[2]]):
        hits = hits | np.broadcast_to(facts.mask(node.input[2]), hits.shape)
    return [hits], True


def _convolved(facts: Facts, node: onnx.NodeProto) -> Masks:
    """Conv, by channels: wherever a tainted one is read with a weight other than zero, all positions are tainted."""
    if facts.tainted(node.input[1:]):
        raise Unclear(node.op_type)
    mask, kernel = facts.mask(node.input[0]), facts.known(node.input[1])
    groups = int(attribute(node, "group", 1))
    channels = mask.any(axis=(0, *range(2, mask.ndim))).reshape(groups, 1, -1)
    reads = (kernel != 0).any(axis=tuple(range(2, kernel.ndim))).reshape(groups, -1, channels.shape[-1])
    written = (reads & channels).any(axis=-1).reshape(1, -1, *[1] * (mask.ndim - 2))
    return [np.broadcast_to(written, facts.shape(node.output[0]))], True


_ML = "ai.onnx.ml"
RULES: dict[tuple[str, str], Rule] = {
    **{("", kind): _element_wise for kind in _ELEMENT_WISE},
    **{(_ML, kind): _element_wise for kind in _ELEMENT_WISE_ML},
    **{("", kind): _joined for kind in _JOINING},
    **{("", kind): _moved for kind in _MOVING},
    **{(_ML, kind): _moved for kind in _MOVING_ML},
    ("", "OneHot"): _one_hot,
    (_ML, "OneHotEncoder"): _one_hot_ml,
    ("", "MatMul"): _product,
    ("", "Gemm"): _product,
    ("", "Conv"): _convolved,
}
