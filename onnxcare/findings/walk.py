"""Every graph, node and tensor of a model file: the main graph, branches and loop bodies, and functions.

Nothing here trusts the file: nodes may be out of order or form a cycle, and names may be missing or doubled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import numpy_helper

from onnxcare.graph.view import label, operator


@dataclass(frozen=True)
class Scope:
    """A graph or the body of a function.

    Attributes:
        nodes: its nodes, as listed.
        initializers: its tensors, the values of sparse ones included.
        unit: the main graph or function that it is a part of: branches see the names of what surrounds them.
    """

    nodes: list[onnx.NodeProto]
    initializers: list[onnx.TensorProto]
    unit: Unit


@dataclass
class Unit:
    """The main graph or a function, with everything nested in it.

    Attributes:
        nodes: all its nodes.
        read: the names that some node reads, or that leave a graph.
    """

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    read: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Held:
    """A tensor and where it is held.

    Attributes:
        name: of the tensor; for a node's attribute, of the Constant's output, or of node and attribute.
        tensor: the tensor.
        unit: where its readers are.
        node: the node whose attribute it is, None for an initializer.
    """

    name: str
    tensor: onnx.TensorProto
    unit: Unit
    node: onnx.NodeProto | None = None


def integer(node: onnx.NodeProto, name: str, default: int) -> int:
    """Return an attribute that holds a whole number."""
    return next((int(item.i) for item in node.attribute if item.name == name and item.HasField("i")), default)


def real(node: onnx.NodeProto, name: str, default: float) -> float:
    """Return an attribute that holds a number."""
    return next((float(item.f) for item in node.attribute if item.name == name and item.HasField("f")), default)


def integers(node: onnx.NodeProto, name: str) -> np.ndarray | None:
    """Return an attribute that holds whole numbers, or None."""
    for item in node.attribute:
        if item.name == name and item.ints:
            return np.array(item.ints)
    return None


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the branches and bodies of a node."""
    for item in node.attribute:
        if item.HasField("g"):
            yield item.g
        yield from item.graphs


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """Yield the names a node reads, those that its branches may read from outside included."""
    stack = [node]
    while stack:
        inner = stack.pop()
        yield from (name for name in inner.input if name)
        for graph in subgraphs(inner):
            yield from (output.name for output in graph.output)
            stack += graph.node


def scopes(proto: onnx.ModelProto) -> list[Scope]:
    """Return the main graph, the functions, and every graph nested in them."""
    stack: list[tuple[onnx.GraphProto | onnx.FunctionProto, Unit]] = [(proto.graph, Unit())]
    stack += [(function, Unit()) for function in proto.functions]
    found = []
    while stack:
        body, unit = stack.pop()
        if isinstance(body, onnx.FunctionProto):
            initializers, outputs = [], list(body.output)
        else:
            initializers = [*body.initializer, *(sparse.values for sparse in body.sparse_initializer)]
            outputs = [output.name for output in body.output]
        unit.read.update(outputs)
        unit.nodes += body.node
        for node in body.node:
            unit.read.update(node.input)
            stack += [(graph, unit) for graph in subgraphs(node)]
        found.append(Scope(list(body.node), initializers, unit))
    return found


def all_text(proto: onnx.ModelProto, found: Iterable[Scope]) -> bool:
    """Return whether all names are text: protobuf hands over what is not UTF-8 as bytes."""
    names: list[object] = [info.name for info in proto.graph.input]
    for function in proto.functions:
        names += [function.name, function.domain, *function.input, *(item.name for item in function.attribute_proto)]
    for scope in found:
        names += [tensor.name for tensor in scope.initializers]
        for node in scope.nodes:
            names += [node.name, node.op_type, node.domain, *node.input, *node.output]
            names += [item.name for item in node.attribute]
            names += [info.name for graph in subgraphs(node) for info in graph.input]
        names += scope.unit.read
    return all(isinstance(name, str) for name in names)


def tensors(proto: onnx.ModelProto, found: Iterable[Scope]) -> Iterator[Held]:
    """Yield every tensor of these scopes and of the defaults of functions: initializers and attributes, sparse too."""
    for scope in found:
        for tensor in scope.initializers:
            yield Held(tensor.name, tensor, scope.unit)
        for node in scope.nodes:
            for item in node.attribute:
                for tensor in _attribute_tensors(item):
                    constant = operator(node) == "Constant" and len(node.output) > 0
                    name = node.output[0] if constant else f"{label(node)}.{item.name}"
                    yield Held(name, tensor, scope.unit, node)
    for function in proto.functions:
        for item in function.attribute_proto:
            for tensor in _attribute_tensors(item):
                yield Held(f"{function.name}.{item.name}", tensor, Unit())


def values_of(tensor: onnx.TensorProto, most: int | None = None) -> np.ndarray | None:
    """Return the values a tensor holds inside the file, flat; None if it is damaged, or has more than `most`."""
    if most is not None and not 0 < math.prod(tensor.dims) <= most:
        return None
    try:
        return numpy_helper.to_array(tensor).reshape(-1)
    except Exception:  # dimensions, types and fields that do not fit fail in many ways; onnxruntime refuses them, too
        return None


def _attribute_tensors(item: onnx.AttributeProto) -> Iterator[onnx.TensorProto]:
    if item.HasField("t"):
        yield item.t
    yield from item.tensors
    for sparse in ([item.sparse_tensor] if item.HasField("sparse_tensor") else []) + list(item.sparse_tensors):
        yield sparse.values
        yield sparse.indices


def ordered(nodes: list[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that the wanted tensors need, producers first; onnxruntime sorts what a file leaves unsorted."""
    producer = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    order: list[onnx.NodeProto] = []
    seen: set[int] = set()
    stack = [(producer[name], False) for name in wanted if name in producer]
    while stack:
        index, complete = stack.pop()
        if complete:
            order.append(nodes[index])
        elif index not in seen:
            seen.add(index)
            stack.append((index, True))
            stack += [(producer[name], False) for name in names_read(nodes[index]) if name in producer]
    return order
