"""What a model consists of, and which parts of it can be repaired: the result of `onnxcare inspect`."""

from __future__ import annotations

from dataclasses import dataclass

from onnxcare.graph.model import Model, Signature
from onnxcare.graph.outside import Outside, find_outside
from onnxcare.graph.working import working_form


@dataclass(frozen=True)
class LayerInfo:
    """A layer: its shape, its parameters, and why its weights cannot be rewritten (None if they can)."""

    name: str
    operator: str
    inputs: int
    outputs: int
    parameters: int
    weight: str
    bias: str | None
    refusal: str | None


@dataclass(frozen=True)
class SiteInfo:
    """A site: its units, and why multipliers on them cannot be folded (None if they can)."""

    site: str
    kind: str
    units: int
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    refusal: str | None


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` shows.

    Attributes:
        path: the file.
        sha256: its fingerprint.
        ir_version: version of the file format.
        opset: version of the default operator set.
        producer: the tool that wrote it.
        inputs: what it takes.
        outputs: what it answers.
        nodes: number of nodes.
        parameters: number of constant values.
        layers: what can be rewritten, and what not.
        outside: what holds weights and is none of the layers, and why.
        sites: what can be intervened on.
        metadata: metadata_props.
    """

    path: str
    sha256: str
    ir_version: int
    opset: int
    producer: str
    inputs: tuple[Signature, ...]
    outputs: tuple[Signature, ...]
    nodes: int
    parameters: int
    layers: tuple[LayerInfo, ...]
    outside: tuple[Outside, ...]
    sites: tuple[SiteInfo, ...]
    metadata: dict[str, str]


def inspect_model(model: Model) -> Inspection:
    """Return what the model consists of."""
    form = working_form(model, values=False)
    layers = form.layers
    sizes = {name: _size(p.shape) for name, p in form.parameters.items()}
    proto = model.proto
    return Inspection(
        path=str(model.path),
        sha256=model.sha256,
        ir_version=proto.ir_version,
        opset=model.opset,
        producer=" ".join(part for part in (proto.producer_name, proto.producer_version) if part),
        inputs=model.inputs,
        outputs=model.outputs,
        nodes=len(proto.graph.node),
        parameters=sum(sizes.values()),
        layers=tuple(
            LayerInfo(
                name=layer.name,
                operator=layer.operator,
                inputs=layer.inputs,
                outputs=layer.outputs,
                parameters=sum(sizes[p.name] for p in (layer.weight, layer.bias) if p is not None),
                weight=layer.weight.name,
                bias=layer.bias.name if layer.bias is not None else None,
                refusal=layer.refusal,
            )
            for layer in layers
        ),
        outside=tuple(find_outside(form.view, layers)),
        sites=tuple(
            SiteInfo(
                site=site.tensor,
                kind=site.kind,
                units=site.units,
                writers=site.writers,
                readers=tuple(layer.name for layer in site.readers),
                refusal=site.refusal,
            )
            for site in form.sites
        ),
        metadata={entry.key: entry.value for entry in proto.metadata_props},
    )


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size
