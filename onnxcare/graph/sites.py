"""Sites: the hidden activations that can be intervened on, and the layers that write and read them.

The units of a layer lie on one axis of its output: channels of a convolution, features of a product. That axis is
followed forward through element-wise steps, normalisation, pooling, transposes and additions. A site is the last
tensor in front of a reading layer on which the axis is still there: behind it come only steps that
move values about (Flatten, Reshape, Transpose ...), so a multiplier on a unit can be folded into the reader. In front
of the output projection of an attention there is a second site, whose units are whole heads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from onnx import NodeProto

from onnxcare.graph.layers import Layer
from onnxcare.graph.view import GraphView, attribute, operator

# Steps that treat every value by itself, or all values of a unit alike.
_UNIT_WISE = frozenset(
    "Relu LeakyRelu Elu Selu Celu Gelu Sigmoid HardSigmoid HardSwish Swish Mish Tanh Softplus Softsign "
    "ThresholdedRelu Clip Erf Exp Log Sqrt Abs Neg Sign Floor Ceil Round Pow Reciprocal "
    "BatchNormalization Dropout Identity Cast Shrink QuantizeLinear DequantizeLinear".split()
)
# Steps over the positions of a map: they keep channels apart, and mix units on any other axis.
_CHANNEL_WISE = frozenset(
    "InstanceNormalization LRN MaxPool AveragePool LpPool GlobalAveragePool GlobalMaxPool GlobalLpPool "
    "Resize Upsample".split()
)
# Steps that join several tensors, position by position.
_JOINING = frozenset("Add Sub Mul Div Sum Max Min Mean Where PRelu".split())
# Steps that move values about without changing them.
_REARRANGING = frozenset("Flatten Reshape Transpose Squeeze Unsqueeze Identity Dropout".split())
_REDUCING = frozenset("ReduceMean ReduceMax ReduceSum".split())


@dataclass(frozen=True)
class Site:
    """A hidden activation tensor.

    Attributes:
        tensor: its name.
        axis: the axis its units lie on (axis 0 holds the samples).
        units: how many there are.
        kind: `channel`, `neuron` or `head`.
        writers: names of the layers whose outputs arrive here.
        readers: the layers that read it.
        other: what else reads it, so that its units reach the scores beside the readers; None if nothing does.
        refusal: why multipliers on its units cannot be folded into the readers; None if they can.
    """

    tensor: str
    axis: int
    units: int
    kind: str
    writers: tuple[str, ...]
    readers: tuple[Layer, ...]
    other: str | None = None
    refusal: str | None = None


@dataclass(frozen=True)
class _Units:
    axis: int
    count: int
    kind: str
    writers: tuple[str, ...]


def find_sites(
    view: GraphView, layers: list[Layer], shapes: Mapping[str, tuple[int | None, ...]] | None = None
) -> list[Site]:
    """Return the sites of the main graph, in the order in which they are computed.

    Args:
        view: the graph.
        layers: its layers.
        shapes: as far as they are known, by tensor; without them no attention heads are found.
    """
    units = _follow_units(view, layers)
    hidden = _behind_layers(view, layers)
    readers: dict[str, list[Layer]] = {}
    for layer in layers:
        tensor = _source(view, layer.input)
        if tensor not in units:
            # The axis was lost on the way (a reduction, an attention product ...): the reader's own inputs
            # are the units then.
            tensor = layer.input
            if tensor not in hidden:
                continue
            axis, kind = (1, "channel") if layer.convolution else (-1, "neuron")
            units.setdefault(tensor, _Units(axis, layer.inputs, kind, ()))
        readers.setdefault(tensor, []).append(layer)
        heads = _heads(view, layer, shapes or {})
        if heads is not None:
            units[heads[0]] = _Units(1, heads[1], "head", ())
            readers.setdefault(heads[0], []).append(layer)
    order = view.producer
    sites = []
    for tensor, found in sorted(readers.items(), key=lambda item: order[item[0]]):
        refused = (f"layer {layer.name}: {layer.refusal}" for layer in found if layer.refusal)
        other = _read_beside(view, tensor, found)
        sites.append(
            Site(
                tensor=tensor,
                axis=units[tensor].axis,
                units=units[tensor].count,
                kind=units[tensor].kind,
                writers=units[tensor].writers,
                readers=tuple(found),
                other=other,
                refusal=next(refused, other),
            )
        )
    return sites


def _heads(view: GraphView, layer: Layer, shapes: Mapping[str, tuple[int | None, ...]]) -> tuple[str, int] | None:
    """Return the attention heads that a layer reads side by side, [N, heads, tokens, size], and how many there are."""
    tensor = layer.input
    for step, wanted in (("Reshape", None), ("Transpose", [0, 2, 1, 3])):
        index = view.producer.get(tensor)
        if index is None or operator(view.nodes[index]) != step:
            return None
        if wanted is not None and attribute(view.nodes[index], "perm") != wanted:
            return None
        tensor = view.nodes[index].input[0]
    shape = shapes.get(tensor, ())
    heads = shape[1] if len(shape) == 4 else None
    return (tensor, heads) if heads and layer.inputs % heads == 0 and tensor in view.producer else None


def _behind_layers(view: GraphView, layers: list[Layer]) -> set[str]:
    """Return every tensor that depends on the output of some layer."""
    found = {layer.output for layer in layers}
    for node in view.nodes:
        if any(name in found for name in node.input):
            found.update(name for name in node.output if name)
    return found


def _source(view: GraphView, tensor: str) -> str:
    """Walk back from a tensor through steps that only move values about."""
    while True:
        index = view.producer.get(tensor)
        if index is None or operator(view.nodes[index]) not in _REARRANGING:
            return tensor
        tensor = view.nodes[index].input[0]


def _read_beside(view: GraphView, tensor: str, readers: list[Layer]) -> str | None:
    """Say what reads a tensor beside these layers, other than through steps that only move values about."""
    allowed = {layer.node for layer in readers}
    pending = [tensor]
    while pending:
        name = pending.pop()
        if name in view.outputs:
            return f"{name!r} is an output of the model"
        if name in view.captured:
            return f"{name!r} is also read inside {view.captured[name]}"
        for index in view.consumers.get(name, []):
            node = view.nodes[index]
            if index in allowed and node.input[0] == name and list(node.input).count(name) == 1:
                continue
            if operator(node) in _REARRANGING and node.input[0] == name:
                pending.append(node.output[0])
            elif operator(node) not in ("Shape", "Size"):
                return f"{name!r} is also read by {node.op_type} {view.label(index)}"
    return None


def _follow_units(view: GraphView, layers: list[Layer]) -> dict[str, _Units]:
    written = {
        layer.output: _Units(
            layer.unit_axis,
            layer.outputs,
            "channel" if layer.convolution else "neuron",
            (layer.name,),
        )
        for layer in layers
    }
    units: dict[str, _Units] = {}
    for node in view.nodes:
        if not node.output:
            continue
        output = node.output[0]
        if output in written:
            units[output] = written[output]
            continue
        if not node.input:
            continue
        for operators, step in _STEPS:
            if operator(node) in operators:
                followed = step(view, node, units)
                if followed is not None:
                    units[output] = followed
                break
    return units


def _same(view: GraphView, node: NodeProto, units: dict[str, _Units]) -> _Units | None:
    return units.get(node.input[0])


def _same_channels(view: GraphView, node: NodeProto, units: dict[str, _Units]) -> _Units | None:
    item = units.get(node.input[0])
    return item if item is not None and item.axis == 1 else None


def _joined(view: GraphView, node: NodeProto, units: dict[str, _Units]) -> _Units | None:
    """Units survive a join if every tensor that has units has them on the same axis."""
    known = [units[name] for name in node.input if name in units]
    unknown = [n for n in node.input if view.is_activation(n) and n not in units]
    if not known or unknown:
        return None
    first = known[0]
    if any((other.axis, other.count) != (first.axis, first.count) for other in known[1:]):
        return None
    writers = dict.fromkeys(writer for item in known for writer in item.writers)
    return replace(first, writers=tuple(writers))


def _concatenated(view: GraphView, node: NodeProto, units: dict[str, _Units]) -> _Units | None:
    known = [units.get(name) for name in node.input]
    first = known[0]
    if first is None or any(item is None or item.axis != first.axis for item in known):
        return None
    parts = [item for item in known if item is not None]
    axis = attribute(node, "axis")
    if not isinstance(axis, int) or (axis < 0) != (first.axis < 0):
        return None  # counted from different ends, so it takes the rank to tell whether they are the same
    along = axis == first.axis
    if not along and any(part.count != first.count for part in parts):
        return None
    writers = dict.fromkeys(writer for part in parts for writer in part.writers)
    count = sum(part.count for part in parts) if along else first.count
    return replace(first, count=count, writers=tuple(writers))


def _transposed(view: GraphView, node: NodeProto, units: dict[str, _Units]) -> _Units | None:
    item = units.get(node.input[0])
    perm = attribute(node, "perm")
    if item is None or not isinstance(perm, list) or perm[0] != 0:
        return None
    return replace(item, axis=perm.index(item.axis % len(perm)))


def _reduced(view: GraphView, node: NodeProto, units: dict[str, _Units]) -> _Units | None:
    item = units.get(node.input[0])
    axes = attribute(node, "axes")
    if axes is None and len(node.input) > 1:
        constant = view.small_constant(node.input[1])
        axes = None if constant is None else constant.tolist()
    if item is None or not isinstance(axes, list) or item.axis < 0 or min(axes) < 0:
        return None
    if item.axis in axes or 0 in axes:
        return None
    if attribute(node, "keepdims", 1):
        return item
    return replace(item, axis=item.axis - sum(axis < item.axis for axis in axes))


_Step = Callable[[GraphView, NodeProto, dict[str, _Units]], _Units | None]
_STEPS: tuple[tuple[frozenset[str], _Step], ...] = (
    (_UNIT_WISE, _same),
    (_CHANNEL_WISE, _same_channels),
    (_JOINING, _joined),
    (frozenset({"Concat"}), _concatenated),
    (frozenset({"Transpose"}), _transposed),
    (_REDUCING, _reduced),
)
