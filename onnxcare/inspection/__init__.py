"""What a model consists of, and which parts of it can be repaired by which method: the result of `onnxcare inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx

from onnxcare import repair
from onnxcare.decision import Decision
from onnxcare.errors import ModelError
from onnxcare.experiment import judged_output
from onnxcare.findings.walk import scopes
from onnxcare.graph import wire
from onnxcare.graph.anatomy import Anatomy, anatomy_of
from onnxcare.graph.layers import Layer
from onnxcare.graph.light import inferred
from onnxcare.graph.model import Model, Signature
from onnxcare.graph.view import as_text
from onnxcare.inspection.base import Constant, File, Inspection, LayerInfo, SiteInfo, Value
from onnxcare.inspection.constants import Constants, Held, Read, Reader, find_constants
from onnxcare.inspection.values import declared_value, declared_values, type_name
from onnxcare.prepare import check_inputs

__all__ = ["Constant", "File", "Inspection", "LayerInfo", "SiteInfo", "Value", "inspect_model"]

# Operators that compute with quantised numbers, by what their names begin with.
_QUANTISED = (
    "QuantizeLinear DequantizeLinear DynamicQuantize MatMulInteger ConvInteger QLinear QGemm QAttention QEmbed QMoE "
    "QOrdered MatMulNBits MatMulBnb4 GatherBlockQuantized"
).split()
# Of these a constant matrix would make a layer.
_LINEAR = ("Gemm", "MatMul", "Conv")


def inspect_model(model: Model) -> Inspection:
    """Return what the model consists of; external data is left where it is."""
    anatomy = anatomy_of(model)
    typed = inferred(model.proto)
    constants = find_constants(model.proto, typed)
    layers = _layers(anatomy, constants)
    nodes = [node for scope in scopes(model.proto) for node in scope.nodes]
    numbers = constants.numbers
    return Inspection(
        file=_file(model, nodes),
        inputs=tuple(_signatures(model.inputs, model.proto.graph.input)),
        outputs=tuple(_signatures(model.outputs, model.proto.graph.output)),
        nodes=len(nodes),
        operators=dict(Counter(operator_name(node) for node in nodes).most_common()),
        layers=tuple(layers),
        other=numbers - sum(item.weights + item.biases for item in layers),
        numbers=numbers,
        sites=tuple(_sites(anatomy, declared_values(typed.graph))),
        obstacle=_obstacle(model),
    )


def operator_name(node: onnx.NodeProto) -> str:
    """Return a node's operator, with its domain where that is not ONNX's own."""
    name = as_text(node.op_type)
    return name if node.domain in ("", "ai.onnx") else f"{as_text(node.domain)}.{name}"


# -- the file ------------------------------------------------------------------------------------


def _file(model: Model, nodes: Iterable[onnx.NodeProto]) -> File:
    proto = model.proto
    quantised = Counter(operator_name(node) for node in nodes if as_text(node.op_type).startswith(tuple(_QUANTISED)))
    return File(
        path=str(model.path),
        sha256=model.sha256,
        bytes=model.path.stat().st_size,
        external={str(path): path.stat().st_size for path in model.external_files()},
        ir_version=proto.ir_version,
        opsets={item.domain or "ai.onnx": item.version for item in proto.opset_import},
        producer=" ".join(part for part in (proto.producer_name, proto.producer_version) if part),
        metadata={entry.key: entry.value for entry in proto.metadata_props},
        functions={f"{item.domain}.{item.name}".lstrip("."): len(item.node) for item in proto.functions},
        quantised=dict(quantised.most_common()),
    )


def _signatures(known: Sequence[Signature], declared: Iterable[onnx.ValueInfoProto]) -> Iterable[Value]:
    """Yield inputs or outputs: tensors as onnxruntime sees them, which infers shapes, others as they are declared."""
    types = {info.name: info for info in declared}
    for item in known:
        value = declared_value(types[item.name])
        kind = types[item.name].type.WhichOneof("value")
        # A map of scores to every class counts as scores elsewhere; here it is what the file says.
        tensor = kind in (None, "tensor_type")
        plain = item.dtype is not None and tensor
        name = str(item.dtype) if plain else type_name(types[item.name].type)
        yield Value(item.name, name, item.shape if tensor and item.ranked else value.shape)


def _obstacle(model: Model) -> str | None:
    """Say what keeps the whole model from being repaired; None for nothing that the file shows."""
    try:
        check_inputs(model)
        if not any(_fits(model, rule) for rule in (Decision(), Decision("threshold"))):
            judged_output(model, None, Decision())
    except ModelError as error:
        return str(error).removeprefix(f"{model.path}: ")
    return None


def _fits(model: Model, decision: Decision) -> bool:
    try:
        judged_output(model, None, decision)
    except ModelError:
        return False
    return True


# -- layers and sites ----------------------------------------------------------------------------


def _layers(anatomy: Anatomy, constants: Constants) -> list[LayerInfo]:
    """Return the layers and the other nodes that hold weights; every number counts where it is read first."""
    layers = {layer.name: layer for layer in anatomy.layers}
    # An Add that holds a layer's bias is a part of the layer.
    parts = {layer.output for layer in anatomy.layers if layer.output not in anatomy.view.nodes[layer.node].output}
    held = {item.path: item for item in constants.held if item.path}
    counted: dict[Held, Reader] = {}
    found: list[tuple[int, LayerInfo]] = []
    place = 0
    for reader in constants.readers:
        layer = None if reader.inside else layers.pop(reader.label, None)
        if layer is None and (not reader.holds_weights or not parts.isdisjoint(reader.node.output)):
            continue
        if layer is not None:
            place = layer.node
            _claim(layer, reader, held)
        found.append((place, _info(reader, layer, anatomy, counted)))
    for layer in layers.values():
        reader = _inlined(layer, anatomy)
        _claim(layer, reader, held)
        found.append((layer.node, _info(reader, layer, anatomy, counted)))
    found.sort(key=lambda item: item[0])
    for reader in constants.functions:
        # What a layer reads that is seen where the function is called is counted there.
        if reader.holds_weights and any(item.held not in counted for item in reader.reads):
            found.append((place, _info(reader, None, anatomy, counted)))
    return [info for _, info in found]


def _claim(layer: Layer, reader: Reader, held: Mapping[wire.Path, Held]) -> None:
    """Let a layer also read what its node does not read itself, such as the bias that an Add behind it adds."""
    for parameter, role in ((layer.weight, "W"), (layer.bias, "B")):
        for path in parameter.storage.paths if parameter is not None else ():
            if path in held and all(item.held is not held[path] for item in reader.reads):
                reader.reads.append(Read(held[path], role))


def _inlined(layer: Layer, anatomy: Anatomy) -> Reader:
    """Return the node of a layer that only shows once functions are inlined."""
    values = anatomy.once("values", lambda: declared_values(inferred(anatomy.view.proto).graph))
    return Reader(layer.name, anatomy.view.nodes[layer.node], (), [], values, layer.input)


def _info(reader: Reader, layer: Layer | None, anatomy: Anatomy, counted: dict[Held, Reader]) -> LayerInfo:
    held, weights, biases = [], 0, 0
    for item in reader.reads:
        first = counted.setdefault(item.held, reader)
        mine = first is reader
        if mine:
            weights += 0 if item.bias else item.held.numbers
            biases += item.held.numbers if item.bias else 0
        held.append(
            Constant(
                name=item.held.name,
                role=item.role,
                type=item.held.type,
                shape=item.held.shape,
                numbers=item.held.numbers,
                counted_at=None if mine else first.label,
            )
        )
    output = next(iter(reader.node.output), None)
    if layer is not None and layer.output in reader.values:
        output = layer.output  # behind its bias
    return LayerInfo(
        name=reader.label,
        operator=operator_name(reader.node),
        inside=reader.inside,
        layer=layer is not None,
        input=_value(reader.activation, reader.values),
        output=_value(output, reader.values),
        weights=weights,
        biases=biases,
        constants=tuple(held),
        methods=repair.hindrances(anatomy, layer) if layer is not None else _refused(reader, anatomy),
    )


def _refused(reader: Reader, anatomy: Anatomy) -> dict[str, str | None]:
    """Say why methods do not change a node that holds weights and is no layer."""
    if reader.inside:
        reason = f"it lies inside {reader.inside[-1]}"
    elif operator_name(reader.node) in _LINEAR:
        reason = "it is no product of what it reads with one constant matrix"
    else:
        reason = f"a node of {operator_name(reader.node)} is no layer"
    beside = () if reader.inside else repair.changing_beside_layers(anatomy, list(reader.node.output))
    return {method: None if method in beside else reason for method in repair.METHODS}


def _value(name: str | None, known: Mapping[str, Value]) -> Value | None:
    return known.get(name, Value(name)) if name else None


def _sites(anatomy: Anatomy, known: Mapping[str, Value]) -> Iterable[SiteInfo]:
    for site in anatomy.sites:
        yield SiteInfo(
            tensor=site.tensor,
            kind=site.kind,
            axis=site.axis,
            units=site.units,
            shape=known.get(site.tensor, Value(site.tensor)).shape,
            writers=site.writers,
            readers=tuple(layer.name for layer in site.readers),
            methods=repair.hindrances_at(anatomy, site),
        )
