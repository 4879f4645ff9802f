"""The working form of a model: one that layers, sites and experiments can be found in, whoever exported it.

It computes what the file computes, in a flat graph of standard operators whose weights are initializers of
floating-point numbers, each with a note of where and how the file holds it (`storage`). So everything behind it knows
one form only:

* functions are inlined, tensors of Constant nodes become initializers;
* weights that constants are scaled, cast or filled to (quantised, half precision, sparse) become what they amount to;
* linear models of ai.onnx.ml become Gemm, ZipMap becomes the scores it is made of (`classical`);
* integer products become products of what the integers stand for (`quantised`);
* half precision becomes float32 (`halves`), which is what onnxruntime computes with on a CPU.

The file itself is never rewritten: `storage` encodes new values into its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx
from onnx import inliner, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxcare.errors import ModelError
from onnxcare.graph import classical, halves, quantised, wire
from onnxcare.graph.batch import free_batch, put_samples_first
from onnxcare.graph.layers import Layer, find_layers
from onnxcare.graph.light import inferred
from onnxcare.graph.model import Model
from onnxcare.graph.parameters import (
    ATTRIBUTE,
    FUNCTION,
    NODE_OF_FUNCTION,
    TENSOR,
    Parameter,
    find_parameters,
    storages,
)
from onnxcare.graph.places import tensors
from onnxcare.graph.sites import Site, find_sites
from onnxcare.graph.storage import EIGHTHS, FLOATS, PACKED, WHOLE, Scaled, Source, Storage, Tensor
from onnxcare.graph.view import GraphView, attribute, operator

# Constants of at most so many elements are worked out even where values are not asked for: shapes and axes.
_SMALL = 64
# Broadcasting is from opset 7, Expand, which is inserted, from opset 8.
_OLDEST_OPSET, _INSERTED = 7, 8
# How far answers may be from the file's, relative to the largest: rounding of fused operators, of half precision, of
# activations that are quantised as they come.
EXACT, _HALF, _DYNAMIC = 1e-4, 2e-2, 1e-1
# External data of more bytes stays where it is, but for small tensors; what is held inside may be 2 GB at most.
_MANY, _LARGE, _MOST = 1 << 30, 1 << 20, (1 << 31) - (1 << 20)
_TAG = "onnxcare:"


@dataclass(frozen=True)
class WorkingForm:
    """A model as experiments see it.

    Attributes:
        proto: the graph.
        stored: how the file holds its constants, by name; those that are not in the file are missing.
        tolerance: how far its answers may be from the file's, relative to the largest.
        quantised: whether weights or activations are whole numbers, so that a runtime may compute with them.
    """

    proto: onnx.ModelProto
    stored: Mapping[str, Storage]
    tolerance: float
    quantised: bool

    @cached_property
    def view(self) -> GraphView:
        """Who produces and who reads each tensor."""
        return GraphView(self.proto)

    @cached_property
    def parameters(self) -> dict[str, Parameter]:
        """The constants that the file holds, by name."""
        return find_parameters(self.view, self.stored)

    @cached_property
    def layers(self) -> list[Layer]:
        """What may be rewritten, refused ones included, in graph order."""
        return find_layers(self.view, self.parameters)

    @cached_property
    def sites(self) -> list[Site]:
        """What can be intervened on, in the order of computation."""
        return find_sites(self.view, self.layers, self.shapes)

    @cached_property
    def shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Shapes as far as they can be inferred, by tensor; None for a length that is not known."""
        known = inferred(self.proto).graph
        types = {info.name: info.type.tensor_type for info in (*known.value_info, *known.input, *known.output)}
        return {
            name: tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in kind.shape.dim)
            for name, kind in types.items()
            if kind.HasField("shape")
        }


def working_form(model: Model, *, values: bool = True) -> WorkingForm:
    """Return the working form of a model.

    Args:
        model: the file.
        values: False leaves large weights without values, and external data where it is: enough to find layers and
            sites.

    Raises:
        ModelError: a tensor of weights is damaged.
    """
    proto = onnx.ModelProto()
    proto.CopyFrom(model.proto)
    # Nodes keep their position in the file as a name, wherever they end up.
    for index, node in enumerate(proto.graph.node):
        if not node.name:
            node.name = f"{node.op_type}#{index}"
    stored = storages(GraphView(proto))
    if proto.functions:
        proto, inside = _inlined(proto)
        stored |= inside
    if values:
        _take_inside(proto, model)
    source = Source(model.proto, model.path.parent)
    _as_initializers(proto, stored, source)
    classical.to_standard_operators(proto, stored)
    dynamic = quantised.to_floating_point(proto)
    _fold(proto, stored, source, values)
    quantised.drop_repeated_rounding(proto)
    quantised.drop_unread(proto)
    quantised.drop_unknown_axes(proto)
    half = halves.to_single_precision(proto)
    tolerance = _DYNAMIC if dynamic else _HALF if half else EXACT
    held = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    if held > _MOST:
        raise ModelError(
            f"{model.path}: its weights come to {held / 1e9:.1f} GB as float32, and more than 2 GB can be held only "
            "where the file has them as float32 in external data"
        )
    rounded = any(operator(node) == "QuantizeLinear" for node in proto.graph.node)
    rounded |= any(isinstance(storage, Scaled) for storage in stored.values())
    return WorkingForm(proto, stored, tolerance, rounded)


def experiment_form(model: Model) -> WorkingForm:
    """Return the working form with all values, samples on axis 0, as many as one likes, and what can be inferred.

    Raises:
        ModelError: the model's operator set is too old for the inserted nodes, or a tensor is damaged.
    """
    if model.opset < _OLDEST_OPSET:
        raise ModelError(
            f"{model.path}: it uses opset {model.opset}; experiments need opset {_OLDEST_OPSET} or newer "
            "(onnx.version_converter can raise it)"
        )
    form = working_form(model)
    for item in form.proto.opset_import:
        # All that opset 8 changed is that some operators may do more.
        if item.domain in ("", "ai.onnx"):
            item.version = max(item.version, _INSERTED)
    free_batch(form.proto, {signature.name: signature.axis for signature in model.inputs})
    put_samples_first(form.proto, model.axes)
    try:
        return replace(form, proto=onnx.shape_inference.infer_shapes(form.proto))
    except Exception:  # inference is a help for dtypes, not a need; custom operators make it fail
        return form


def _take_inside(proto: onnx.ModelProto, model: Model) -> None:
    """Read external data, but for floating-point weights that are too many to be held several times.

    Raises:
        ModelError: it cannot be read.
    """
    outside = [tensor for tensor in tensors(proto) if uses_external_data(tensor)]
    many = sum(_nbytes(tensor) for tensor in outside) > _MANY
    for tensor in outside:
        if many and tensor.data_type in (onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE) and _nbytes(tensor) > _LARGE:
            continue
        try:
            load_external_data_for_tensor(tensor, str(model.path.parent))
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ModelError(f"{model.path}: its external data cannot be read: {reason}") from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _nbytes(tensor: onnx.TensorProto) -> int:
    size = int(np.prod(tensor.dims, dtype=np.int64))
    return size * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _inlined(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, Storage]]:
    """Return the model without functions, and where the constants of their bodies are held."""
    known = dict[str, Storage]()
    for number, function in enumerate(proto.functions):
        for index, node in enumerate(function.node):
            for position, item in enumerate(node.attribute):
                if operator(node) == "Constant" and item.name == "value":
                    path = ((FUNCTION, number), (NODE_OF_FUNCTION, index), (ATTRIBUTE, position), (TENSOR, 0))
                    item.t.doc_string = f"{_TAG}{number}/{index}"
                    known[item.t.doc_string] = Tensor(path, f"{function.name}/{node.output[0]}", item.t.data_type)
    # The inliner sends the model through bytes, which may be 2 GB at most.
    held = [tensor for tensor in proto.graph.initializer if len(tensor.raw_data) > _SMALL]
    payloads = {tensor.name: tensor.raw_data for tensor in held}
    for tensor in held:
        tensor.ClearField("raw_data")
    try:
        flat = inliner.inline_local_functions(proto)
    except Exception:  # whatever stands in its way, layers in functions are just not seen
        flat = proto
    for tensor in flat.graph.initializer:
        if tensor.name in payloads:
            tensor.raw_data = payloads[tensor.name]
    found: dict[str, Storage] = {}
    for index, node in enumerate(flat.graph.node):
        if not node.name:  # a node of the file may well be called after this position
            node.name = f"inlined {node.op_type}#{index}"
        for item in node.attribute:
            if item.t.doc_string in known:
                found[node.output[0]] = known[item.t.doc_string]
                item.t.doc_string = ""
    return flat, found


def _as_initializers(proto: onnx.ModelProto, stored: Mapping[str, Storage], source: Source) -> None:
    """Turn Constant nodes and sparse initializers into initializers."""
    constants = GraphView(proto).constants
    outputs = {output.name for output in proto.graph.output}
    kept = []
    for node in proto.graph.node:
        name = node.output[0] if node.output else ""
        if operator(node) == "Constant" and name in constants and name not in outputs:
            tensor = proto.graph.initializer.add()
            tensor.CopyFrom(constants[name])
            tensor.name = name
        else:
            kept.append(node)
    if len(kept) < len(proto.graph.node):
        del proto.graph.node[:]
        proto.graph.node.extend(kept)
    for sparse in proto.graph.sparse_initializer:
        name = sparse.values.name
        if name in stored:
            proto.graph.initializer.append(numpy_helper.from_array(stored[name].read(source), name))
    del proto.graph.sparse_initializer[:]


def _fold(proto: onnx.ModelProto, stored: dict[str, Storage], source: Source, values: bool) -> None:
    """Turn what constants are scaled or cast to into initializers, and note how the file holds them."""
    view = GraphView(proto)
    folding = _Folding(view, stored)
    outputs = {output.name for output in proto.graph.output}
    kept = []
    for node in view.nodes:
        storage = folding.made_by(node)
        if storage is None or node.output[0] in outputs:
            kept.append(node)
            continue
        name, shape = node.output[0], folding.shapes[node.output[0]]
        stored[name] = storage
        tensor = onnx.TensorProto(name=name, dims=shape, data_type=folding.types[name])
        if values or np.prod(shape, dtype=np.int64) <= _SMALL:
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            tensor.raw_data = numpy_helper.from_array(storage.read(source).astype(dtype)).raw_data
        proto.graph.initializer.append(tensor)
    if len(kept) < len(proto.graph.node):
        del proto.graph.node[:]
        proto.graph.node.extend(kept)


class _Folding:
    """Follows constants through the nodes that make weights of them.

    Attributes:
        shapes: shape of every tensor that was followed, by name.
        types: its element type.
    """

    def __init__(self, view: GraphView, stored: Mapping[str, Storage]) -> None:
        self._held = {name: item for name, item in stored.items() if isinstance(item, Tensor)}
        constants = view.constants
        self.shapes = {name: tuple(constants[name].dims) for name in self._held if name in constants}
        self.types = {name: constants[name].data_type for name in self._held if name in constants}
        # Whole numbers as floating-point ones, with their zero point, on the way to their scale.
        self._whole: dict[str, tuple[Tensor, wire.Path | None]] = {}

    def made_by(self, node: onnx.NodeProto) -> Storage | None:
        """Return how the file holds what a node makes of constants, if that is a tensor of weights."""
        step = {"Cast": self._cast, "Sub": self._shifted, "Mul": self._scaled, "DequantizeLinear": self._dequantised}
        follow = step.get(operator(node))
        return None if follow is None else follow(node)

    def _cast(self, node: onnx.NodeProto) -> Storage | None:
        held, target = self._held.get(node.input[0]), attribute(node, "to")
        if held is None or node.input[0] not in self.shapes or target not in FLOATS:
            return None
        self._note(node, self.shapes[node.input[0]], target)
        if held.refusal is None or held.data_type in EIGHTHS:
            self._held[node.output[0]] = held
            return held
        if held.data_type in WHOLE:
            self._whole[node.output[0]] = held, None
        return None

    def _shifted(self, node: onnx.NodeProto) -> Storage | None:
        x, y = node.input
        zero = self._whole[y][0] if y in self._whole else self._held.get(y)
        if x in self._whole and zero is not None and y in self.shapes and self._spreads(y, x):
            self._whole[node.output[0]] = self._whole[x][0], zero.path
            self._note(node, self.shapes[x], self.types[x])
        return None

    def _scaled(self, node: onnx.NodeProto) -> Storage | None:
        x, y = node.input if node.input[0] in self._whole else reversed(node.input)
        scale = self._held.get(y)
        if x not in self._whole or scale is None or scale.refusal is not None or not self._spreads(y, x):
            return None
        whole, zero = self._whole[x]
        self._note(node, self.shapes[x], self.types[x])
        return Scaled(whole.path, whole.name, scale.path, zero, whole.data_type)

    def _dequantised(self, node: onnx.NodeProto) -> Storage | None:
        whole, scale, *rest = (self._held.get(name) for name in node.input if name)
        x = node.input[0]
        if whole is None or scale is None or None in rest or x not in self.shapes:
            return None
        if whole.data_type not in (*WHOLE, *PACKED, *EIGHTHS):
            return None
        zero = rest[0].path if rest and rest[0] is not None else None
        self._note(node, self.shapes[x], self.types[node.input[1]])
        axis, block = attribute(node, "axis", 1), attribute(node, "block_size", 0)
        return Scaled(whole.path, whole.name, scale.path, zero, whole.data_type, axis, block)

    def _spreads(self, other: str, whole: str) -> bool:
        """Return whether a constant broadcasts to the shape of whole numbers."""
        shape = self.shapes[whole]
        return other in self.shapes and np.broadcast_shapes(self.shapes[other], shape) == shape

    def _note(self, node: onnx.NodeProto, shape: tuple[int, ...], data_type: int) -> None:
        self.shapes[node.output[0]], self.types[node.output[0]] = shape, data_type
