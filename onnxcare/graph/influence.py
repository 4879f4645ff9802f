"""Influence: which elements of which tensors can depend on given columns of an input, proved from the graph alone.

Every tensor gets a mask over its elements; an element is *tainted* when it may depend on the columns. What an operator
does to a mask is said in `masks`; an operator without a rule there, a branch or a loop taints everything as soon as
anything that it reads is tainted.

Shapes do not depend on values, so Shape and Size stop a mask wherever the shape is known in advance.

An untainted output is the same, bit for bit but for the sign of a zero, whatever finite numbers the columns hold.
0 * x counts as 0, which infinity and NaN break: what is proved takes for granted that tainted values stay finite up to
where they meet a weight 0. It is proved for one sample alone, or for a whole batch where the file fixes its size.
Weights are read as the file stores them; an initializer that is also an input counts with its default.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import uses_external_data
from onnx.reference import ReferenceEvaluator

from onnxcare.errors import ModelError, nearest
from onnxcare.graph.layers import Layer, find_layers
from onnxcare.graph.masks import RULES, Masks, Unclear
from onnxcare.graph.storage import read_tensor
from onnxcare.graph.view import GraphView, attribute, operator

Array = np.ndarray

_OLDEST_OPSET = 7  # before, broadcasting was written with attributes, and normalisation could be in training mode

# What is computed in advance: what weights go through on the way to a layer, which makes nothing larger and rounds
# nothing, and what the shapes that Reshape and others are given are made with, on whole numbers.
_FOLDED = frozenset("Identity Transpose Reshape Flatten Squeeze Unsqueeze Shape Size".split())
_FOLDED_SMALL = frozenset("Cast Concat Gather Slice Split ConstantOfShape Add Sub Mul Div Equal Where".split())
_SMALL = 256  # elements


@dataclass(frozen=True)
class Entry:
    """A layer that the columns enter.

    Attributes:
        layer: a Gemm or MatMul that can be rewritten. On the way to it the columns were moved about, treated element by
            element or looked up, so that each still has positions of its own.
        columns: the positions on the last axis of the layer's input that depend on them, in ascending order.
    """

    layer: Layer
    columns: Array


@dataclass(frozen=True)
class Influence:
    """What the columns of an input can do to an output.

    Attributes:
        reaches: whether the output may depend on them.
        outputs: which elements may, as a mask over one sample of the output; one value for all of it where its shape is
            not known in advance.
        entries: where they enter, in graph order; none if the output does not depend on them. With the weight rows
            `columns` of all these layers set to zero, the output does not depend on them any more, unless there is an
            obstacle.
        obstacle: why that would not be enough, in one sentence that names a node; None if it is enough.
    """

    reaches: bool
    outputs: Array
    entries: tuple[Entry, ...]
    obstacle: str | None


def trace(
    model: onnx.ModelProto, source: str, columns: Sequence[int], output: str, folder: Path | None = None
) -> Influence:
    """Follow columns of an input through the graph to a tensor.

    Args:
        model: the model, which is not changed.
        source: the input.
        columns: positions on its axes behind the first one, flattened.
        output: an output, or any other tensor of the main graph.
        folder: where the files of external data lie; may be left out if there are none.

    Raises:
        ModelError: there is no such input, column or tensor, or weights cannot be read.
    """
    graph = _Graph(model, output, folder)
    start = graph.start(source, columns)
    reached = _Walk(graph, source, start).taints.get(output)
    if reached is None:
        return Influence(False, np.zeros((graph.shapes.get(output) or ())[1:], bool), (), None)
    mask = np.ones(1, bool) if reached.mask is None else reached.mask
    cut = _Walk(graph, source, start, cut=True)
    left = cut.taints.get(output)
    return Influence(
        reaches=True,
        outputs=np.asarray(mask.any(axis=0) if mask.ndim else mask),
        entries=tuple(sorted(cut.entries, key=lambda entry: entry.layer.node)),
        obstacle=None if left is None else graph.explain(left, output),
    )


def certify(
    model: onnx.ModelProto, source: str, columns: Sequence[int], output: str, folder: Path | None = None
) -> bool:
    """Return whether a tensor provably does not depend on the columns of an input; see `trace` for the arguments."""
    graph = _Graph(model, output, folder)
    return output not in _Walk(graph, source, graph.start(source, columns)).taints


@dataclass(frozen=True)
class _Taint:
    """A tensor with tainted elements.

    Attributes:
        mask: which ones; None for all elements of a tensor of unknown shape.
        mixed: whether a node on the way spread the columns over the positions of others.
        blame: that node, or the last one at which the columns met something else.
    """

    mask: Array | None
    mixed: bool
    blame: int | None


class _Graph:
    """The part of a model that a tensor is computed from, with what is known about it in advance."""

    def __init__(self, model: onnx.ModelProto, output: str, folder: Path | None) -> None:
        self.view = GraphView(model)
        self.layers = {layer.node: layer for layer in find_layers(self.view)}
        self._functions = {(_plain(function.domain), function.name) for function in model.functions}
        self._inputs = {info.name for info in model.graph.input} - set(self.view.constants)
        self._folder = folder
        self._constants: dict[str, Array | None] = {}
        known = self._inputs | set(self.view.producer) | set(self.view.constants)
        if output not in known:
            raise ModelError(f"the model has no tensor {output!r}{nearest(output, known)}")
        self.order = _upstream(self.view, output)

    def standard(self, node: onnx.NodeProto) -> bool:
        """Return whether a node does what the rules say: it is no function of the model's own, nor too old."""
        versions = [item.version for item in self.view.proto.opset_import if not _plain(item.domain)]
        own = (_plain(node.domain), node.op_type) in self._functions
        return not own and min(versions, default=_OLDEST_OPSET) >= _OLDEST_OPSET

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes that are fixed by the graph, for one sample where the batch size is free."""
        # Declared types inside branches and functions would be believed, so nothing is inferred from those.
        nodes = [node for node in self.view.nodes if self.standard(node) and not _subgraphs(node)]
        shapes = _infer_shapes(self.view.proto, self._inputs, nodes)
        return shapes | {name: tuple(tensor.dims) for name, tensor in self.view.constants.items()}

    def start(self, source: str, columns: Sequence[int]) -> Array:
        """Return the mask of the input."""
        if source not in self._inputs:
            raise ModelError(f"the model has no input {source!r}{nearest(source, self._inputs)}")
        shape = self.shapes.get(source)
        if not shape:
            raise ModelError(f"the columns of input {source!r} cannot be counted: the file does not fix its shape")
        mask = np.zeros((shape[0], int(np.prod(shape[1:], dtype=np.int64))), bool)
        for column in columns:
            if not 0 <= column < mask.shape[1]:
                raise ModelError(f"input {source!r} has {mask.shape[1]} columns, so there is no column {column}")
            mask[:, column] = True
        return mask.reshape(shape)

    def constant(self, name: str) -> Array | None:
        """Return the value of an initializer or Constant node as the file stores it, or None."""
        if name not in self._constants:
            self._constants[name] = self._read(name)
        return self._constants[name]

    def _read(self, name: str) -> Array | None:
        tensor = self.view.constants.get(name)
        if tensor is None:
            return None
        if self._folder is None and uses_external_data(tensor):
            raise ModelError(f"tensor {name!r} is stored outside the model: name the folder that its file lies in")
        return read_tensor(tensor, self._folder or Path())

    def explain(self, left: _Taint, output: str) -> str:
        """Say why the columns arrive at the output although every entry is cut."""
        index = self.view.producer.get(output) if left.blame is None else left.blame
        if index is None:
            return f"{output!r} is the input itself"
        what = f"{self.view.label(index)!r} ({self.view.nodes[index].op_type})"
        if not left.mixed:
            return f"{what} carries it to {output!r} with no layer in between"
        refusal = self.layers[index].refusal if index in self.layers else None
        return f"{what} reads it too" + (f" and cannot be rewritten: {refusal}" if refusal else "")


class _Walk:
    """One walk through the graph, from the input to the tensor.

    With `cut`, the weight rows of every entry count as zero from the moment it is met.
    """

    def __init__(self, graph: _Graph, source: str, start: Array, *, cut: bool = False) -> None:
        self.graph = graph
        self.entries: list[Entry] = []
        self._cut = cut
        self._values: dict[str, Array] = {}
        self._shapes = dict(graph.shapes)
        self.taints = {source: _Taint(start, False, None)} if start.any() else {}
        for index in graph.order:
            self._visit(index)

    # -- what the rules ask --------------------------------------------------------------------------

    def tainted(self, names: Iterable[str]) -> bool:
        """Return whether any of the tensors is tainted."""
        return any(name in self.taints for name in names)

    def value(self, name: str) -> Array | None:
        """Return the value of a tensor if it is known in advance."""
        return self._values[name] if name in self._values else self.graph.constant(name)

    def known(self, name: str) -> Array:
        """Return a value that must be known."""
        value = self.value(name)
        if value is None:
            raise Unclear(name)
        return value

    def varies(self, name: str) -> bool:
        """Return whether a tensor may depend on any input."""
        return self.graph.view.is_activation(name) and self.value(name) is None

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a shape that must be known."""
        if name not in self._shapes:
            raise Unclear(name)
        return self._shapes[name]

    def mask(self, name: str) -> Array:
        """Return which elements of a tensor are tainted."""
        taint = self.taints.get(name)
        mask = np.broadcast_to(np.False_, self.shape(name)) if taint is None else taint.mask
        if mask is None:
            raise Unclear(name)
        return mask

    def support(self, name: str) -> Array:
        """Return which elements of a tensor may differ from zero."""
        value = self.value(name)
        if value is None:
            return np.ones(self.shape(name), bool)
        return np.asarray(value != 0)

    def evaluate(self, node: onnx.NodeProto, feeds: dict[str, Array]) -> list[Array]:
        """Run a single node; whatever goes wrong, its result is not known."""
        inputs, outputs = ([onnx.ValueInfoProto(name=name) for name in names] for names in (feeds, _outputs(node)))
        single = onnx.helper.make_graph([node], "step", inputs, outputs)
        model = onnx.helper.make_model(single, opset_imports=self.graph.view.proto.opset_import)
        try:
            return [np.asarray(result) for result in ReferenceEvaluator(model).run(None, feeds)]
        except Exception as error:  # it raises whatever comes up in its kernels
            raise Unclear(node.op_type) from error

    # -- the walk ------------------------------------------------------------------------------------

    def _visit(self, index: int) -> None:
        node = self.graph.view.nodes[index]
        reached = [self.taints[name] for name in dict.fromkeys(_reads(node)) if name in self.taints]
        if not reached or (operator(node) in ("Shape", "Size") and self._fold(node)):
            self._pass_clean(node)
            return
        if self._cut:
            self._enter(index, node)
        masks, mixes = self._apply(node)
        first = max(reached, key=lambda taint: (taint.mixed, taint.blame is not None))
        meets = sum(self.varies(name) for name in set(node.input)) > 1
        blame = index if not first.mixed and (mixes or meets) else first.blame
        for name, mask in zip(_outputs(node), masks, strict=True):
            if mask is None or mask.any():
                self.taints[name] = _Taint(mask, mixes or first.mixed, blame)
            if mask is not None:
                self._shapes[name] = mask.shape

    def _apply(self, node: onnx.NodeProto) -> Masks:
        rule = RULES.get((_plain(node.domain), node.op_type))
        if rule is not None and self.graph.standard(node):
            # The last two errors come up where shapes do not fit together.
            with contextlib.suppress(Unclear, ValueError, IndexError):
                return rule(self, node)
        shapes = [self.graph.shapes.get(name, (0,)) for name in _outputs(node)]
        # Where one sample leaves nothing, more of them may: such a tensor counts as one of unknown shape.
        return [None if 0 in shape else np.ones(shape, bool) for shape in shapes], True

    def _pass_clean(self, node: onnx.NodeProto) -> None:
        """Note the values of a node's outputs if they are known, and their shapes if onnx could not infer them."""
        if not self._fold(node) and any(name not in self._shapes for name in _outputs(node)):
            masks, _ = self._apply(node)
            self._shapes |= {n: m.shape for n, m in zip(_outputs(node), masks, strict=True) if m is not None}

    def _fold(self, node: onnx.NodeProto) -> bool:
        """Compute a node whose result is known in advance; return whether it is."""
        kind = operator(node)
        held = {name: self.value(name) for name in node.input if name}
        if kind in ("Shape", "Size") and node.input[0] in self._shapes:
            held = {node.input[0]: np.broadcast_to(np.float32(0), self._shapes[node.input[0]])}
        feeds = {name: value for name, value in held.items() if value is not None}
        if len(feeds) < len(held) or not self.graph.standard(node):
            return False
        if kind not in _FOLDED and not (kind in _FOLDED_SMALL and _small_numbers(kind, feeds.values())):
            return False
        try:
            results = dict(zip(_outputs(node), self.evaluate(node, feeds), strict=True))
        except Unclear:
            return False
        self._values |= results
        self._shapes |= {name: value.shape for name, value in results.items()}
        return True

    def _enter(self, index: int, node: onnx.NodeProto) -> None:
        """Cut the weight rows that the columns meet, if this node is a layer and they are still apart."""
        layer = self.graph.layers.get(index)
        taint = self.taints.get(node.input[0]) if node.input else None
        if layer is None or layer.convolution or layer.refusal or taint is None or taint.mixed or taint.mask is None:
            return
        weight = self.value(node.input[1])
        if weight is None:
            return
        columns = np.flatnonzero(taint.mask.reshape(-1, taint.mask.shape[-1]).any(axis=0)).astype(np.int64)
        weight = weight.copy()
        rows = weight.T if attribute(node, "transB", 0) else weight
        if not rows[columns].any():
            return
        rows[columns] = 0
        self._values[node.input[1]] = weight
        self.entries.append(Entry(layer, columns))


# -- what is read from the file ------------------------------------------------------------------------


def _plain(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _outputs(node: onnx.NodeProto) -> list[str]:
    return [name for name in node.output if name]


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    own = [item.g for item in node.attribute if item.HasField("g")]
    return own + [graph for item in node.attribute for graph in item.graphs]


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return what a node reads, in its branches and bodies too; names from inside them do no harm."""
    names = [name for name in node.input if name]
    for graph in _subgraphs(node):
        names += [name for inner in graph.node for name in _reads(inner)]
        names += [output.name for output in graph.output]
    return names


def _upstream(view: GraphView, output: str) -> list[int]:
    """Return the nodes that a tensor is computed from, each behind those it reads; files need not be sorted."""
    order: list[int] = []
    seen: set[int] = set()
    pending = [(view.producer[output], False)] if output in view.producer else []
    while pending:
        index, done = pending.pop()
        if done:
            order.append(index)
        elif index not in seen:
            seen.add(index)
            pending.append((index, True))
            pending += [(view.producer[name], False) for name in _reads(view.nodes[index]) if name in view.producer]
    return order


def _small_numbers(kind: str, values: Iterable[Array]) -> bool:
    """Return whether values are like those that shapes are made of: few, and whole."""
    held = list(values)
    if any(value.size > _SMALL or value.dtype.kind not in "ib" for value in held):
        return False
    return kind != "ConstantOfShape" or int(np.prod(held[0].astype(object))) <= _SMALL


def _infer_shapes(
    model: onnx.ModelProto, inputs: set[str], nodes: Iterable[onnx.NodeProto]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes that follow from the inputs, with one sample where the batch size is free.

    Shapes that the file notes for other tensors are not believed.
    """
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    graph = light.graph
    graph.name = "shapes"
    graph.node.extend(nodes)
    graph.output.extend(onnx.ValueInfoProto(name=info.name) for info in model.graph.output)
    graph.input.extend(info for info in model.graph.input if info.name in inputs)
    for info in graph.input:
        dims = info.type.tensor_type.shape.dim
        if dims and dims[0].dim_value < 1:
            dims[0].dim_value = 1
    for tensor in model.graph.initializer:
        if int(np.prod(tensor.dims, dtype=np.int64)) > _SMALL:
            # Only the shape of weights is needed; models over 2 GB could not be handed over with them.
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            graph.initializer.append(tensor)
    try:
        inferred = onnx.shape_inference.infer_shapes(light, data_prop=True).graph
    except Exception:  # custom operators make it fail; the inputs alone are known then
        inferred = graph
    shapes = {}
    for info in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = info.type.tensor_type
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in kind.shape.dim):
            shapes[info.name] = tuple(dim.dim_value for dim in kind.shape.dim)
    return shapes
