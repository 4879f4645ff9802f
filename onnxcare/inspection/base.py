"""What `onnxcare inspect` finds out about a model file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

# Lengths of the axes: numbers, names of symbolic ones, None for what is not known.
Shape = tuple[int | str | None, ...]
# Why each method cannot change something; None for those that can.
Methods = Mapping[str, str | None]


@dataclass(frozen=True)
class Value:
    """What a name of the graph stands for.

    Attributes:
        name: the name.
        type: such as `float32`, `string` or `sequence of map of int64 to float32`; `unknown` where it is not known.
        shape: its axes; None where they are not known, or where it is no tensor.
    """

    name: str
    type: str = "unknown"
    shape: Shape | None = None


@dataclass(frozen=True)
class Constant:
    """A constant that a node reads.

    Attributes:
        name: the tensor, or the attribute that holds it.
        role: what the node calls it, such as `W` or `scale`.
        type: type of its elements.
        shape: its axes.
        numbers: how many numbers the file stores for it.
        counted_at: the row in which it is counted, where another node reads it first; None where it is counted here.
    """

    name: str
    role: str
    type: str
    shape: tuple[int, ...]
    numbers: int
    counted_at: str | None = None


@dataclass(frozen=True)
class LayerInfo:
    """A layer, or another node that holds weights.

    Attributes:
        name: label of the node.
        operator: its operator, with the domain where that is not ONNX's own.
        inside: the nodes and functions that it lies in, outermost first; none for a node of the main graph.
        layer: whether it is a layer: one matrix product whose weights a repair may rewrite.
        input: the first activation it reads.
        output: what it writes, the bias included.
        weights: how many of its numbers are weights.
        biases: how many of them are biases.
        constants: what it holds.
        methods: why each repair method cannot change it.
    """

    name: str
    operator: str
    inside: tuple[str, ...]
    layer: bool
    input: Value | None
    output: Value | None
    weights: int
    biases: int
    constants: tuple[Constant, ...]
    methods: Methods


@dataclass(frozen=True)
class SiteInfo:
    """A hidden tensor whose units can be intervened on.

    Attributes:
        tensor: its name.
        kind: what its units are, such as `channel` or `neuron`.
        axis: the axis they lie on.
        units: how many there are.
        shape: the axes of the tensor, where they are known.
        writers: the layers whose outputs arrive here.
        readers: the layers that read it.
        methods: why each repair method cannot change what its units do.
    """

    tensor: str
    kind: str
    axis: int
    units: int
    shape: Shape | None
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    methods: Methods


@dataclass(frozen=True)
class File:
    """The file itself.

    Attributes:
        path: where it lies.
        sha256: its fingerprint.
        bytes: its size.
        external: size of the files that hold its external data, by path.
        ir_version: version of the file format.
        opsets: version of the operators it uses, by domain; `ai.onnx` is ONNX's own.
        producer: the tool that wrote it, with its version.
        metadata: metadata_props.
        functions: number of nodes of each function it defines, by domain and name.
        quantised: number of nodes of each operator that computes with quantised numbers.
    """

    path: str
    sha256: str
    bytes: int
    external: Mapping[str, int]
    ir_version: int
    opsets: Mapping[str, int]
    producer: str
    metadata: Mapping[str, str]
    functions: Mapping[str, int]
    quantised: Mapping[str, int]


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` shows.

    Attributes:
        file: the file itself.
        inputs: what it takes.
        outputs: what it answers.
        nodes: number of nodes, those inside other nodes and functions included.
        operators: number of nodes of each operator, the most frequent first.
        layers: layers, and other nodes that hold weights, in graph order.
        other: numbers in other constants: shapes, axes, factors, what nothing reads.
        numbers: all numbers that the file stores: those of all layers and the other ones.
        sites: what can be intervened on.
        obstacle: what keeps the model as a whole from being repaired; None for nothing that the file shows.
    """

    file: File
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    nodes: int
    operators: Mapping[str, int]
    layers: tuple[LayerInfo, ...]
    other: int
    numbers: int
    sites: tuple[SiteInfo, ...]
    obstacle: str | None
