"""What the values of a tensor rest on, followed through one operator at a time.

A tensor is *fixed* (computed from constants and shapes alone), *raw* (computed from model inputs by moving data, by
arithmetic and by reductions, without a learned layer in between) or *learned* (anything else). A raw tensor may be a
*truth*: the result of a comparison, carried on by logic, casts and arithmetic with constants. A truth that is *single*
does not speak of every position of the input, as a padding mask does, but of a sample as a whole: a value was picked
from a fixed position, or a reduction came before or after the comparison. Single truths that decide about learned
values are what backdoors in a graph are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data

from onnxcare.findings import extent
from onnxcare.findings.extent import Extents
from onnxcare.findings.families import (
    CARRIERS,
    ELEMENTWISE,
    LINEAR,
    LOGIC,
    PICKS,
    POSITIONS,
    SAME_SHAPE,
    SHAPES,
    STEPS,
    TRUTHFUL_REDUCTIONS,
    is_known,
    kind,
    reduces,
)
from onnxcare.findings.walk import integer, integers, real, values_of
from onnxcare.graph.view import label

Array = np.ndarray

_SMALL = 1 << 16
# Indices are few; broadcasting makes more of them.
_FEW = 1 << 10
# A comparison with at most this much guards a division or a logarithm.
_NEARLY_ZERO = 1e-5
# Clip often has the largest float in place of a missing bound.
_NO_BOUND = 1e9

_FOLDED: dict[str, Callable[[Sequence[Array]], Array]] = {
    "Concat": lambda values: np.concatenate([value.reshape(-1) for value in values]),
    "Add": lambda values: values[0] + values[1],
    "Sub": lambda values: values[0] - values[1],
    "Mul": lambda values: values[0] * values[1],
    "Div": lambda values: values[0] / values[1],
    "Neg": lambda values: -values[0],
}


@dataclass(frozen=True)
class Flow:
    """What a tensor rests on.

    Attributes:
        inputs: the model inputs that a raw tensor is computed from; empty for the other two kinds.
        learned: whether a learned layer, or an operator that is not known here, stands in front.
        truth: `test` for a truth, `step` for one made by arithmetic (a steep ramp, a sign), else empty.
        test: the node that compared.
        picked: whether a fixed part of the input was picked.
        single: whether it speaks of a sample as a whole instead of its positions.
        guard: whether the truth is a comparison with zero, or a test for NaN.
        tally: whether it counts truths that are more than guards: more than none of them is no guard, either.
        counted: whether its shape depends on the values of the input.
        root: the tensor of which this one is an element-wise function.
        extents: the shape of a raw tensor, where it is known.
        positions: for fixed tensors, whether they number positions: 0, 1, 2, ...
        varying: for fixed tensors, whether they rest on shapes or on the number of a loop's turn.
        constant: for fixed tensors, their values or the tensor in the file, where they are known.
    """

    inputs: frozenset[str] = frozenset()
    learned: bool = False
    truth: Literal["", "test", "step"] = ""
    test: str = ""
    picked: bool = False
    single: bool = False
    guard: bool = False
    tally: bool = False
    counted: bool = False
    root: str = ""
    extents: Extents | None = None
    positions: bool = False
    varying: bool = False
    constant: onnx.TensorProto | Array | None = field(default=None, compare=False)

    @property
    def raw(self) -> bool:
        """Whether it rests on model inputs with no learned layer in between."""
        return bool(self.inputs)


FIXED = Flow()
SHAPED = Flow(varying=True)
LEARNED = Flow(learned=True)


def follow(node: onnx.NodeProto, operands: Sequence[Flow], output: str) -> Flow:
    """Return what an output of a node without branches rests on."""
    name = kind(node)
    if name in SHAPES and not any(flow.counted for flow in operands):
        return SHAPED
    if not any(flow.raw or flow.learned for flow in operands):
        return _fixed(node, name, operands)
    if any(flow.learned for flow in operands) or not is_known(node):
        return LEARNED
    if name in LINEAR:
        return _linear(name, operands, output)
    if name in PICKS:
        return _picked(node, name, operands, output)
    raw = [flow for flow in operands if flow.raw]
    flow = _joined(raw, output)
    if reduces(name) or name in SHAPES:
        return _reduced(node, name, operands, flow, output)
    if name in LOGIC or (name == "Cast" and integer(node, "to", 0) == onnx.TensorProto.BOOL):
        return _compared(node, name, operands, flow)
    if name in STEPS:
        steep = flow.single and not flow.truth and (name != "Clip" or _bounded(node, operands))
        return replace(flow, truth="step", test=label(node), guard=False) if steep else flow
    if name == "NonZero":
        tally = bool(flow.truth) and not flow.guard
        return replace(flow, truth="", tally=tally, counted=True, root=output, extents=None)
    if name not in ELEMENTWISE | SAME_SHAPE:
        flow = replace(flow, extents=None)
    return replace(flow, root=output) if name == "Concat" and len(raw) > 1 else flow


def joined(flows: Sequence[Flow], output: str) -> Flow:
    """Return what a tensor rests on that may be any of these."""
    if any(flow.learned for flow in flows):
        return LEARNED
    raw = [flow for flow in flows if flow.raw]
    return _joined(raw, output) if raw else FIXED


def numbers(flow: Flow) -> Array | None:
    """Return the values of a small constant, or None."""
    constant = flow.constant
    if not isinstance(constant, onnx.TensorProto):
        return constant
    values = None if uses_external_data(constant) else values_of(constant, _SMALL)
    if values is None or values.dtype.kind not in "biuf":
        return None
    return values.astype(np.float64).reshape(tuple(constant.dims))


def _whole_numbers(flow: Flow) -> Array | None:
    values = numbers(flow)
    whole = values is not None and bool((np.isfinite(values) & (values == np.round(values))).all())
    return values if whole else None


def _joined(raw: Sequence[Flow], output: str) -> Flow:
    # Broadcast to positions, a single value no longer is one.
    truths = [flow for flow in raw if flow.truth]
    all_truths = len(truths) == len(raw)
    roots = {flow.root for flow in raw}
    extents = {flow.extents for flow in raw}
    return Flow(
        inputs=frozenset().union(*(flow.inputs for flow in raw)),
        truth=("step" if any(flow.truth == "step" for flow in truths) else "test") if all_truths else "",
        test=truths[0].test if truths else "",
        picked=any(flow.picked for flow in raw),
        single=all(flow.single for flow in raw),
        guard=all_truths and all(flow.guard for flow in truths),
        tally=any(flow.tally for flow in raw),
        counted=any(flow.counted for flow in raw),
        root=roots.pop() if len(roots) == 1 else output,
        extents=extents.pop() if len(extents) == 1 else None,
    )


def _fixed(node: onnx.NodeProto, name: str, operands: Sequence[Flow]) -> Flow:
    if name == "Constant":
        return Flow(constant=_constant(node))
    # One entry of a list of positions is a number like any other.
    counts = name in POSITIONS or (name not in PICKS - {"Slice"} and any(flow.positions for flow in operands))
    constant: onnx.TensorProto | Array | None = None
    if operands and name in CARRIERS:
        constant = operands[0].constant
    elif name in _FOLDED:
        constant = _folded(name, [numbers(flow) for flow in operands])
    return Flow(positions=counts, varying=any(flow.varying for flow in operands), constant=constant)


def _folded(name: str, values: Sequence[Array | None]) -> Array | None:
    """Compute with small constants: exporters leave indices unfolded, and others may hide them."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values) or sum(value.size for value in known) > _FEW:
        return None
    try:
        folded = _FOLDED[name](known)
    except (IndexError, ValueError):  # shapes that do not fit
        return None
    return folded


def _constant(node: onnx.NodeProto) -> onnx.TensorProto | None:
    for item in node.attribute:
        if item.name == "value":
            return item.t
        if item.name in ("value_float", "value_floats", "value_int", "value_ints"):
            return onnx.numpy_helper.from_array(np.array(onnx.helper.get_attribute_value(item)))
    return None


def _linear(name: str, operands: Sequence[Flow], output: str) -> Flow:
    """Follow a product: learned, unless its matrix merely picks and adds values, or scales a truth."""
    raw = [flow for flow in operands if flow.raw]
    if len(raw) != 1:
        return LEARNED
    (flow,) = raw
    if flow.single and flow.truth == "test":
        return replace(flow, truth="step", root=output, extents=None)
    weights = [numbers(other) for other in operands[:2] if not other.raw]
    if len(weights) != 1 or weights[0] is None or set(np.unique(weights[0])) != {0.0, 1.0}:
        return LEARNED
    single = not name.startswith("Conv")
    return replace(flow, truth="", picked=True, single=single, root=output, extents=None)


def _picked(node: onnx.NodeProto, name: str, operands: Sequence[Flow], output: str) -> Flow:
    data = operands[0]
    if not data.raw:
        # A look-up in a table: of learned vectors, unless it only turns one truth into another.
        flow = _joined([flow for flow in operands if flow.raw], output)
        return replace(flow, extents=None) if flow.truth and flow.single else LEARNED
    known = [_whole_numbers(flow) for flow in operands[1:]]
    if name == "Compress":
        return replace(data, counted=True, root=output, extents=None)
    if name == "Slice":
        bounds = known if known else [integers(node, name) for name in ("starts", "ends", "axes")]
        if not any(values is None for given, values in zip(node.input[1:], known, strict=False) if given):
            return _sliced(data, bounds, output)
    elif name == "Split":
        sizes = known[0] if known else integers(node, "split")
        return _part(data, output, None, sizes is not None and bool((sizes == 1).all()))
    elif known and known[0] is not None:
        extents = None
        if name == "Gather" and data.extents is not None:
            extents = extent.gathered(data.extents, integer(node, "axis", 0), known[0].size, known[0].ndim)
        return _part(data, output, extents, known[0].size == 1)
    # Indices made of constants that are not known here are hidden; those made of shapes are usual.
    if any(flow.raw or flow.varying for flow in operands[1:]):
        return replace(data, root=output, extents=None)
    return _part(data, output, None, True)


def _sliced(data: Flow, bounds: list[Array | None], output: str) -> Flow:
    starts, ends, axes, steps = (None if values is None else values.reshape(-1) for values in (bounds + [None] * 4)[:4])
    if starts is None or ends is None or len(starts) != len(ends):
        return replace(data, extents=None)
    lengths = [extent.kept(int(a), int(b), 1, None) for a, b in zip(starts, ends, strict=True)]
    extents = None if data.extents is None else extent.sliced(data.extents, starts, ends, axes, steps)
    if extents is not None and extents == data.extents:
        return data
    part = _part(data, output, extents, set(lengths) == {1})
    # To drop the first or the last position is no picking.
    shifts = all(n is None and abs(a) <= 1 and b >= -1 for n, a, b in zip(lengths, starts, ends, strict=True))
    return replace(part, picked=data.picked) if shifts and not part.single else part


def _part(data: Flow, output: str, extents: Extents | None, one: bool) -> Flow:
    """Return a picked part of raw data; `one` says whether it is a single value where the extents do not."""
    single = data.single or (one if extents is None else extent.is_single(extents))
    return replace(data, picked=True, single=single, root=output, extents=extents)


def _reduced(node: onnx.NodeProto, name: str, operands: Sequence[Flow], flow: Flow, output: str) -> Flow:
    axes = _whole_numbers(operands[1]) if len(operands) > 1 else integers(node, "axes")
    extents = None
    if flow.extents is not None and name.startswith("Reduce"):
        extents = extent.reduced(flow.extents, axes, bool(integer(node, "keepdims", 1)))
    keeps = name in TRUTHFUL_REDUCTIONS or (flow.picked and not name.startswith("Arg"))
    tally = flow.tally or (bool(flow.truth) and not keeps and not flow.guard)
    single = flow.single or extents is None or extent.is_single(extents)
    truth = flow.truth if keeps else ""
    return replace(flow, single=single, root=output, truth=truth, tally=tally, extents=extents)


def _compared(node: onnx.NodeProto, name: str, operands: Sequence[Flow], flow: Flow) -> Flow:
    if flow.truth:
        return replace(flow, truth="test")
    fixed = [other for other in operands if not other.raw]
    known = [numbers(other) for other in fixed]
    small = all(values is not None and bool((np.abs(values) <= _NEARLY_ZERO).all()) for values in known)
    zero = small if fixed else name in ("IsNaN", "IsInf", "Cast")
    flow = replace(flow, truth="test", test=label(node), guard=zero and not flow.tally, tally=False)
    if name == "OneHot" or any(_counts(other) for other in fixed):
        return replace(flow, picked=False, single=False, extents=None)
    return flow


def _counts(flow: Flow) -> bool:
    """Return whether a fixed tensor numbers positions or classes."""
    values = None if flow.positions else numbers(flow)
    return flow.positions or (values is not None and values.size > 1 and bool((np.diff(values.reshape(-1)) == 1).all()))


def _bounded(node: onnx.NodeProto, operands: Sequence[Flow]) -> bool:
    """Return whether a Clip has both bounds."""
    if len(operands) > 1:
        bounds = [numbers(flow) for flow in operands[1:3]]
    else:
        bounds = [np.array([real(node, name, np.inf)]) for name in ("min", "max")]
    return len(bounds) == 2 and all(b is not None and bool((np.abs(b) < _NO_BOUND).all()) for b in bounds)
