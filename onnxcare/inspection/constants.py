"""Every constant number of a file, and the node that reads it first.

Numbers lie in tensors (initializers, Constant nodes, tensors in attributes, everywhere in the file) and in the lists of
numbers that operators of ai.onnx.ml are made of. What constants alone are computed to, such as a transposed or scaled
weight, stands for the constants it comes from.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from onnx import defs

from onnxcare.findings.walk import subgraphs
from onnxcare.graph import wire
from onnxcare.graph.parameters import ATTRIBUTE, FUNCTION, GRAPH, INITIALIZER, NODE, NODE_OF_FUNCTION, SPARSE, VALUES
from onnxcare.graph.places import attribute_places
from onnxcare.graph.view import as_text, operator
from onnxcare.inspection.base import Value
from onnxcare.inspection.values import declared_values, element_type

_ML = "ai.onnx.ml"
# Floating-point numbers, and whole ones of few bits, are weights; longer ones are shapes, axes, positions.
_WEIGHTS = frozenset(
    number
    for name, number in onnx.TensorProto.DataType.items()
    if "FLOAT" in name or name in ("DOUBLE", "INT2", "UINT2", "INT4", "UINT4", "INT8", "UINT8", "INT16", "UINT16")
)
# The numbers that these read beside their data say how to go about it.
_CONFIGURED = frozenset({"Resize", "Upsample", "OneHot"})
# ONNX calls the operands of a product A and B, and of most steps that treat every value by itself.
_ROLES = {"MatMul": ["W", "W"], "MatMulInteger": ["W", "W"], "Gemm": ["W", "W", "B"]}
_NAMELESS = frozenset("Add Sub Mul Div Pow Mod Max Min Mean Sum Where Equal Greater Less Concat Einsum".split())
_BIASES = frozenset({"B", "bias", "beta", "intercepts"})
# What classifiers of ai.onnx.ml call their classes: nothing is computed with that.
_LABELS = "classlabels"


@dataclass(frozen=True, eq=False)
class Held:
    """Numbers that the file stores.

    Attributes:
        name: the tensor, or the attribute that holds them.
        type: type of the elements.
        shape: their axes.
        numbers: how many are stored.
        weight: whether they look like weights.
        path: where they lie in the serialized model; nothing for those inside branches and loops.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    numbers: int
    weight: bool
    path: wire.Path = ()


@dataclass(frozen=True)
class Read:
    """Numbers as a node reads them, under the name that it has for them."""

    held: Held
    role: str

    @property
    def bias(self) -> bool:
        """Whether they are a bias, or belong to one."""
        return self.role.split(" ")[0] in _BIASES


@dataclass
class Reader:
    """A node that computes with activations, and the constants it reads.

    Attributes:
        label: its name, or its operator and position.
        node: the node.
        inside: labels of the nodes and functions that it lies in.
        reads: what it reads, in order.
        values: what is known of tensors here, by name.
        activation: the first activation it reads, if any.
    """

    label: str
    node: onnx.NodeProto
    inside: tuple[str, ...]
    reads: list[Read]
    values: Mapping[str, Value]
    activation: str | None

    @property
    def holds_weights(self) -> bool:
        """Whether it reads something that looks like weights."""
        return operator(self.node) not in _CONFIGURED and any(item.held.weight for item in self.reads)


@dataclass
class Constants:
    """All constants of a file.

    Attributes:
        held: the numbers it stores, wherever.
        readers: the nodes that compute with activations, in graph order, those of a body behind the node it belongs to.
        functions: likewise, those of the bodies of functions.
    """

    held: list[Held] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    functions: list[Reader] = field(default_factory=list)

    @property
    def numbers(self) -> int:
        """How many numbers the file stores."""
        return sum(item.numbers for item in self.held)


def find_constants(proto: onnx.ModelProto, typed: onnx.ModelProto) -> Constants:
    """Return every constant of a file, and who reads it.

    Args:
        proto: the file; of its tensors only types and shapes are looked at.
        typed: the same graph with the types and shapes that are known.
    """
    found = Constants()
    _Scope(found, found.readers, (), {}, {}, ((GRAPH, 0),)).graph(proto.graph, typed.graph)
    for number, function in enumerate(proto.functions):
        inside = (f"function {as_text(function.name)}",)
        scope = _Scope(found, found.functions, inside, {}, {}, ((FUNCTION, number),))
        scope.nodes(function.node, function.node, NODE_OF_FUNCTION)
        found.held += _in_node(onnx.NodeProto(attribute=function.attribute_proto), ())
    for info in proto.training_info:
        for graph in (info.initialization, info.algorithm):
            # Nothing that runs reads them, so they only count.
            aside = Constants()
            _Scope(aside, [], (), {}, {}).graph(graph, graph)
            found.held += aside.held
    return found


class _Scope:
    """A graph or body, with what it sees of the graphs around it."""

    def __init__(
        self,
        found: Constants,
        readers: list[Reader],
        inside: tuple[str, ...],
        known: Mapping[str, list[Read]],
        values: Mapping[str, Value],
        path: wire.Path = (),
    ) -> None:
        self._found, self._readers, self._inside, self._path = found, readers, inside, path
        self._known, self._values = dict(known), dict(values)

    def graph(self, graph: onnx.GraphProto, typed: onnx.GraphProto) -> None:
        """Walk through a graph."""
        self._values |= declared_values(typed)
        for index, tensor in enumerate(graph.initializer):
            self._hold(tensor.name, _tensor(tensor.name, tensor, self._at((INITIALIZER, index))))
        for index, sparse in enumerate(graph.sparse_initializer):
            path = self._at((SPARSE, index), (VALUES, 0))
            self._hold(sparse.values.name, _sparse(sparse.values.name, sparse, path))
        self.nodes(graph.node, typed.node)

    def nodes(self, nodes: Iterable[onnx.NodeProto], typed: Iterable[onnx.NodeProto], number: int = NODE) -> None:
        """Walk through nodes, and those of their bodies; `number` is that of the field that holds them."""
        for index, (node, shown) in enumerate(zip(nodes, typed, strict=True)):
            self._node(node, shown, node.name or f"{node.op_type}#{index}", self._at((number, index)))

    def _at(self, *steps: tuple[int, int]) -> wire.Path:
        """Return the path of something in this graph or body; nothing inside branches and loops."""
        return (*self._path, *steps) if self._path else ()

    def _hold(self, name: str, held: Held) -> None:
        self._found.held.append(held)
        self._known[name] = [Read(held, "")]

    def _node(self, node: onnx.NodeProto, typed: onnx.NodeProto, label: str, path: wire.Path) -> None:
        constant = operator(node) == "Constant" and bool(node.output)
        own = list(_in_node(node, path))
        self._found.held += own
        if constant:
            self._known[node.output[0]] = [Read(held, "") for held in own]
            return
        inputs = [name for name in node.input if name]
        bodies = list(zip(subgraphs(node), subgraphs(typed), strict=True))
        if inputs and not bodies and all(name in self._known for name in inputs):
            reads = [Read(held, held.name) for held in own]
            for position, name in enumerate(node.input):
                role = formal_name(node, position) if position and name else ""
                reads += (_named(read, role) for read in self._known.get(name, ()) if name)
            for name in filter(None, node.output):
                self._known[name] = _once(reads)
            return
        for name in filter(None, node.output):
            self._known.pop(name, None)  # in a body it hides what has the same name outside
        reads = [Read(held, held.name) for held in own if not held.name.startswith(_LABELS)]
        for position, name in enumerate(node.input):
            reads += (_named(read, formal_name(node, position)) for read in self._known.get(name, ()) if name)
        activation = next((name for name in inputs if name not in self._known), None)
        self._readers.append(Reader(label, node, self._inside, _once(reads), self._values, activation))
        for graph, shown in bodies:
            inner = _Scope(self._found, self._readers, (*self._inside, label), self._known, self._values)
            inner.graph(graph, shown)


def formal_name(node: onnx.NodeProto, position: int) -> str:
    """Return what an operator calls one of its inputs; nothing where it does not say."""
    names = _formal_names("" if node.domain == "ai.onnx" else as_text(node.domain), as_text(node.op_type))
    return names[min(position, len(names) - 1)] if names else ""


@functools.cache
def _formal_names(domain: str, op_type: str) -> list[str]:
    if not domain and op_type in _ROLES:
        return _ROLES[op_type]
    if not defs.has(op_type, domain) or (not domain and op_type in _NAMELESS):
        return []
    return [item.name for item in defs.get_schema(op_type, domain).inputs]


def _named(read: Read, role: str) -> Read:
    return Read(read.held, " ".join(filter(None, (role, read.role))))


def _once(reads: Iterable[Read]) -> list[Read]:
    found: dict[int, Read] = {}
    for read in reads:
        found.setdefault(id(read.held), read)
    return list(found.values())


# -- numbers -------------------------------------------------------------------------------------


def _tensor(name: str, tensor: onnx.TensorProto, path: wire.Path = ()) -> Held:
    return _held(name, tensor.data_type, tuple(tensor.dims), path, weight=tensor.data_type in _WEIGHTS)


def _sparse(name: str, sparse: onnx.SparseTensorProto, path: wire.Path = ()) -> Held:
    stored = _tensor(name, sparse.values, path)
    return replace(stored, type=f"sparse {stored.type}", shape=tuple(sparse.dims))


def _in_node(node: onnx.NodeProto, path: wire.Path) -> Iterator[Held]:
    """Yield the numbers in the attributes of a node: tensors, plain values of a Constant node, lists of ai.onnx.ml."""
    constant = operator(node) == "Constant" and bool(node.output)
    for position, item in enumerate(node.attribute):
        name = node.output[0] if constant else item.name
        for place in attribute_places(node, item, "", (*path, (ATTRIBUTE, position)) if path else ()):
            if not place.label.endswith(".indices"):
                # Whole numbers in a list are a part of a model of ai.onnx.ml, and a shape or axes elsewhere.
                weight = place.data_type in _WEIGHTS or (node.domain == _ML and bool(place.field))
                yield _held(name, place.data_type, place.shape, place.path if path else (), weight=weight)


def _held(name: str, data_type: int, shape: tuple[int, ...], path: wire.Path, *, weight: bool) -> Held:
    count = 0 if data_type == onnx.TensorProto.STRING else int(np.prod(shape, dtype=np.int64))
    return Held(name, element_type(data_type), shape, count, weight and bool(shape) and count > 1, path)
