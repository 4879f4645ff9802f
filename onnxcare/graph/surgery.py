"""Surgery on an experiment copy, through onnx-graphsurgeon: cut the graph, expose tensors, insert interventions.

The copy is never written out, so nothing that onnx-graphsurgeon drops on the way can be lost from a user's
file. A cut splits the copy at one tensor h into

* a *prefix*, model inputs -> h and the other tensors that cross the cut, which runs once per data set, and
* a *suffix*, h -> scores, whose inputs let a whole family of P interventions run in one call:

      affine   h'[p] = h * keep[p] + reference[p] * (1 - keep[p])
      span     h'[p] = h + sum_k coefficients[p, k] * directions[k]
      sweep    h'[u, v] = h - reader(unit[u]; weight[u]) + shift[u, v]

  `affine` with keep 0 is do(unit := reference), with reference 0 it is a multiplier; `span` is a change of the
  weights of the layer that writes h, along K directions. For `sweep`, h is the output of a linear layer and what it
  reads a site: what unit u brings to h is taken out, and what it would bring under do(u := v) is put in, so that the
  layer itself does not run again. The family is merged into the batch: row p * N + n of the scores belongs to
  intervention p and sample n.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.logger import G_LOGGER

from onnxcare.decision import Final
from onnxcare.errors import ModelError
from onnxcare.graph.batch import AS_GIVEN
from onnxcare.graph.layers import Layer
from onnxcare.graph.sites import Site

BASE, KEEP, REFERENCE = "onnxcare_base", "onnxcare_keep", "onnxcare_reference"
COEFFICIENTS, DIRECTIONS = "onnxcare_coefficients", "onnxcare_directions"
UNIT, WEIGHT, SHIFT = "onnxcare_unit", "onnxcare_weight", "onnxcare_shift"


def boundary_input(tensor: str) -> str:
    """Return the name under which a suffix takes a tensor that crosses the cut beside h."""
    return f"onnxcare_base__{tensor}"


def boundary_shape(tensor: str) -> str:
    """Return the name of the suffix input that says how far to expand that tensor."""
    return f"onnxcare_shape__{tensor}"


@contextlib.contextmanager
def _taking_apart(what: str) -> Iterator[None]:
    """Keep onnx-graphsurgeon silent, which prints where results go, and explain what it cannot carry."""
    try:
        with G_LOGGER.suppress():
            yield
    except Exception as error:  # it raises whatever comes up in its code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{what}: the graph cannot be taken apart: {reason}") from error


def import_graph(copy: onnx.ModelProto, what: str) -> gs.Graph:
    """Hand a copy to onnx-graphsurgeon.

    Raises:
        ModelError: onnx-graphsurgeon cannot carry something in the model.
    """
    # Importing aliases the values of the proto, and exporting renames it: work on a copy of its own.
    own = onnx.ModelProto()
    own.CopyFrom(copy)
    with _taking_apart(what):
        return gs.import_onnx(own)


def find_logits(graph: gs.Graph, output: str, finals: Sequence[Final]) -> tuple[str, Final]:
    """Return the tensor in front of a final operator of the given kinds, and that operator; else the output and "".

    The decision is the same, and a search on logits does not saturate.
    """
    tensor = graph.tensors()[output]
    while tensor.inputs and tensor.inputs[0].op == "Identity":
        tensor = tensor.inputs[0].inputs[0]
    for final in finals:
        if tensor.inputs and tensor.inputs[0].op == final:
            return tensor.inputs[0].inputs[0].name, final
    return output, ""


def upstream(graph: gs.Graph, tensor: str) -> set[str]:
    """Return the names of the tensors that a tensor is computed from, itself included."""
    known = graph.tensors()
    found: set[str] = set()
    pending = [known[tensor]]
    while pending:
        item = pending.pop()
        if item.name not in found:
            found.add(item.name)
            for producer in item.inputs:
                pending += _read_by(producer, known)
    return found


@dataclass(frozen=True)
class Cut:
    """A graph that was cut at `tensor`.

    Attributes:
        tensor: where it was cut.
        boundary: the other tensors that cross the cut (skip connections), model inputs among them.
        suffix: interventions, boundary -> scores.
    """

    tensor: str
    boundary: tuple[str, ...]
    suffix: onnx.ModelProto


def expose(copy: onnx.ModelProto, tensors: Sequence[str], what: str) -> onnx.ModelProto:
    """Return the part of the graph that computes the given tensors, as its outputs."""
    graph = import_graph(copy, what)
    known = graph.tensors()
    graph.outputs = [_untyped(known[name]) for name in tensors]
    return _export(graph, what)


def between(copy: onnx.ModelProto, start: str, stop: str, what: str) -> onnx.ModelProto:
    """Return the part of the graph that computes `stop` from `start`, and from model inputs where shapes need them."""
    graph = import_graph(copy, what)
    known = graph.tensors()
    known[start].inputs.clear()
    graph.inputs = [_typed(known[start], np.dtype(np.float32)), *graph.inputs]
    graph.outputs = [_untyped(known[stop])]
    return _export(graph, what)


def cut(
    copy: onnx.ModelProto,
    tensor: str,
    scores: str,
    shape: tuple[int, ...],
    kind: str,
    what: str,
    reader: Layer | None = None,
) -> Cut:
    """Cut the graph at `tensor` and insert the inputs of an intervention family.

    Args:
        copy: the experiment copy.
        tensor: the activation to intervene on.
        scores: the tensor to compute behind it.
        shape: shape of the tensor for one sample, without the batch axis.
        kind: `affine`, `span` or `sweep`, see the module's docstring.
        what: name of the model, for errors.
        reader: the layer that writes the tensor, for `sweep`.

    Raises:
        ModelError: the scores do not depend on the tensor, or the graph cannot be cut there.
    """
    graph = import_graph(copy, what)
    known = graph.tensors()
    behind = _behind(graph, [known[tensor]])
    if known[scores] not in _outputs_of(behind) and scores != tensor:
        raise ModelError(f"{what}: {scores!r} does not depend on {tensor!r}")
    crossing = _crossing(graph, known[tensor], known[scores], behind)
    h = known[tensor]
    dtype = np.dtype(h.dtype) if h.dtype is not None else np.dtype(np.float32)
    h.inputs.clear()
    if kind == "sweep":
        assert reader is not None
        inputs = _insert_sweep(graph, h, shape, dtype, reader)
    else:
        insert = {"affine": _insert_affine, "span": _insert_span}[kind]
        inputs = insert(graph, h, shape, dtype)
    for name in crossing:
        inputs += _expand_boundary(graph, known[name], name)
    graph.inputs = inputs
    graph.outputs = [_untyped(known[scores])]
    _multiply_whole_maps(graph, behind)
    return Cut(tensor, tuple(crossing), _export(graph, what))


def part_behind(copy: onnx.ModelProto, tensor: str, output: str, what: str) -> tuple[onnx.ModelProto, list[str]]:
    """Return the part of the graph that computes `output` from `tensor` and what else crosses a cut there.

    Returns:
        The part, and the names of its other inputs: skip connections, and model inputs that are used behind the cut.

    Raises:
        ModelError: the output does not depend on the tensor, or the graph cannot be cut there.
    """
    graph = import_graph(copy, what)
    known = graph.tensors()
    behind = _behind(graph, [known[tensor]])
    if known[output] not in _outputs_of(behind):
        raise ModelError(f"{what}: {output!r} does not depend on {tensor!r}")
    crossing = _crossing(graph, known[tensor], known[output], behind)
    for name in (tensor, *crossing):
        known[name].inputs.clear()
    graph.inputs = [_typed(known[name], np.dtype(np.float32)) for name in (tensor, *crossing)]
    graph.outputs = [_untyped(known[output])]
    return _export(graph, what), crossing


def _multiply_whole_maps(graph: gs.Graph, nodes: Iterable[gs.Node]) -> None:
    """Write every convolution whose kernel covers its whole input as a product.

    onnxruntime convolves sample by sample and reads all weights for each; a product reads them once for many samples,
    which is several times faster.
    """
    for node in nodes:
        kernel = node.inputs[1] if node.op == "Conv" else None
        if not isinstance(kernel, gs.Constant) or node.attrs.get("group", 1) != 1:
            continue
        shape, size = node.inputs[0].shape, kernel.shape[2:]
        geometry = [set(node.attrs.get(name, [usual])) - {usual} for name, usual in (("pads", 0), ("dilations", 1))]
        fixed = node.attrs.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and not any(geometry)
        if not fixed or shape is None or list(shape[2:]) != list(size):
            continue
        weight = gs.Constant(f"{kernel.name}__flat", kernel.values.reshape(len(kernel.values), -1))
        target = gs.Constant(
            f"{node.outputs[0].name}__map", np.array([-1, len(kernel.values), *[1] * len(size)], np.int64)
        )
        flat, product = (
            gs.Variable(f"{node.outputs[0].name}__{name}", node.outputs[0].dtype) for name in ("flat", "product")
        )
        (output,) = node.outputs
        graph.nodes += [
            gs.Node("Flatten", flat.name, {"axis": 1}, [node.inputs[0]], [flat]),
            gs.Node("Gemm", product.name, {"transB": 1}, [flat, weight, *node.inputs[2:]], [product]),
            gs.Node("Reshape", target.name, {}, [product, target], [output]),
        ]
        node.outputs.clear()


def probed(copy: onnx.ModelProto, sites: Sequence[Site], scores: str, what: str) -> onnx.ModelProto:
    """Return the part that computes the scores, with every site h replaced by ``h + h * stretch + push``.

    Stretch and push are inputs of one value a unit, [N, 1 ... units ... 1], zero for the model as it is: derivatives by
    them are those by a unit's activation, summed over its positions, with and without the activation as a factor.
    """
    graph = import_graph(copy, what)
    known = graph.tensors()
    for site in sites:
        h = known[site.tensor]
        dtype = np.dtype(h.dtype) if h.dtype is not None else np.dtype(np.float32)
        readers, inner = list(h.outputs), _readers_inside(graph).get(site.tensor, [])
        if inner:
            raise ModelError(f"{what}: {site.tensor!r} is read inside a subgraph")
        stretch, push = (gs.Variable(name(site.tensor), dtype=dtype) for name in (stretch_input, push_input))
        stretched, pushed = (gs.Variable(f"{i.name}__applied", dtype=dtype) for i in (stretch, push))
        summed = gs.Variable(f"{stretched.name}__sum", dtype=dtype)
        for node in readers:
            node.inputs = [pushed if item is h else item for item in node.inputs]
        for op, pair, output in (
            ("Mul", [h, stretch], stretched),
            ("Add", [h, stretched], summed),
            ("Add", [summed, push], pushed),
        ):
            graph.nodes.append(gs.Node(op, output.name, inputs=pair, outputs=[output]))
        graph.inputs += [stretch, push]
    graph.outputs = [_untyped(known[scores])]
    return _export(graph, what)


def pushed(copy: onnx.ModelProto, tensors: Sequence[str], scores: str, what: str) -> onnx.ModelProto:
    """Return the part that computes the scores, with something added to every given tensor: inputs in their shapes."""
    graph = import_graph(copy, what)
    known = graph.tensors()
    inner = _readers_inside(graph)
    for name in tensors:
        h = known[name]
        if name in inner:
            raise ModelError(f"{what}: {name!r} is read inside a subgraph")
        dtype = np.dtype(h.dtype) if h.dtype is not None else np.dtype(np.float32)
        readers = list(h.outputs)
        push, summed = gs.Variable(push_input(name), dtype), gs.Variable(f"{push_input(name)}__applied", dtype)
        for node in readers:
            node.inputs = [summed if item is h else item for item in node.inputs]
        graph.nodes.append(gs.Node("Add", summed.name, inputs=[h, push], outputs=[summed]))
        graph.inputs.append(push)
    graph.outputs = [_untyped(known[scores])]
    return _export(graph, what)


def stretch_input(tensor: str) -> str:
    """Return the name of the input that stretches the units of a probed site."""
    return f"onnxcare_stretch__{tensor}"


def push_input(tensor: str) -> str:
    """Return the name of the input that is added to a tensor, or to the units of a probed site."""
    return f"onnxcare_push__{tensor}"


def _insert_affine(graph: gs.Graph, h: gs.Variable, shape: tuple[int, ...], dtype: np.dtype) -> list[gs.Variable]:
    """Base [1, N, ...], keep and reference [P | 1, N | 1, ...] -> h [P * N, ...]."""
    rank = 2 + len(shape)
    base, keep, reference = (_input(name, dtype, rank) for name in (BASE, KEEP, REFERENCE))
    one = gs.Constant("onnxcare_one", np.ones(1, dtype))
    kept = _node(graph, "Mul", [base, keep], "kept", dtype)
    rest = _node(graph, "Sub", [one, keep], "rest", dtype)
    forced = _node(graph, "Mul", [reference, rest], "forced", dtype)
    family = _node(graph, "Add", [kept, forced], "family", dtype)
    _merge(graph, family, h, shape)
    return [base, keep, reference]


def _insert_span(graph: gs.Graph, h: gs.Variable, shape: tuple[int, ...], dtype: np.dtype) -> list[gs.Variable]:
    """Base [1, N, ...], coefficients [P, K], directions [K, N * size] -> h [P * N, ...]."""
    base = _input(BASE, dtype, 2 + len(shape))
    coefficients, directions = _input(COEFFICIENTS, dtype, 2), _input(DIRECTIONS, dtype, 2)
    flat = _node(graph, "MatMul", [coefficients, directions], "combined", dtype)
    # 0 keeps the axis of the family, -1 becomes the samples.
    target = gs.Constant("onnxcare_unflatten", np.array([0, -1, *shape], np.int64))
    change = _node(graph, "Reshape", [flat, target], "change", dtype)
    family = _node(graph, "Add", [base, change], "family", dtype)
    _merge(graph, family, h, shape)
    return [base, coefficients, directions]


def _insert_sweep(
    graph: gs.Graph, h: gs.Variable, shape: tuple[int, ...], dtype: np.dtype, reader: Layer
) -> list[gs.Variable]:
    """Base [1, N, ...], and what stands for units and values -> h [U * V * N, ...].

    A product takes the features of U units, [U, 1, N, ..., m], and their weights, [U, 1, ..., m, o]; the shift is
    [U, V, 1, ..., o]. A convolution takes the channels of one unit, [N, m, ...], and their weights [o, m, ...]; the
    shift is [V, 1, o, ...].
    """
    geometry = reader.convolution
    rank = 2 + len(shape)
    base = _input(BASE, dtype, rank)
    if geometry is None:
        unit, weight, shift = (_input(name, dtype, 1 + rank) for name in (UNIT, WEIGHT, SHIFT))
        brought = _node(graph, "MatMul", [unit, weight], "brought", dtype)
    else:
        unit, weight = (_input(name, dtype, 1 + len(shape)) for name in (UNIT, WEIGHT))
        shift = _input(SHIFT, dtype, rank)
        brought = _node(graph, "Conv", [unit, weight], "brought", dtype)
        brought.inputs[0].attrs = {
            "kernel_shape": list(geometry.kernel),
            "strides": list(geometry.strides),
            "dilations": list(geometry.dilations),
            **({"pads": list(geometry.pads)} if geometry.explicit else {"auto_pad": geometry.auto_pad}),
        }
    without = _node(graph, "Sub", [base, brought], "without", dtype)
    family = _node(graph, "Add", [without, shift], "family", dtype)
    _merge(graph, family, h, shape)
    return [base, unit, weight, shift]


def _merge(graph: gs.Graph, family: gs.Variable, h: gs.Variable, shape: tuple[int, ...]) -> None:
    target = gs.Constant("onnxcare_merge", np.array([-1, *shape], np.int64))
    graph.nodes.append(gs.Node("Reshape", "onnxcare_merge", inputs=[family, target], outputs=[h]))


def _expand_boundary(graph: gs.Graph, tensor: gs.Variable, name: str) -> list[gs.Variable]:
    """Repeat a tensor that crosses the cut for every member of the family: [N, ...] -> [P * N, ...]."""
    base = gs.Variable(boundary_input(name), dtype=tensor.dtype)
    shape = gs.Variable(boundary_shape(name), dtype=np.int64, shape=[None])
    merged = gs.Variable(f"{boundary_shape(name)}__merged", dtype=np.int64, shape=[None])
    expanded = gs.Variable(f"{boundary_input(name)}__expanded", dtype=tensor.dtype)
    tensor.inputs.clear()
    graph.nodes += [
        gs.Node("Expand", f"{expanded.name}", inputs=[base, shape], outputs=[expanded]),
        gs.Node("Reshape", f"{expanded.name}_merge", inputs=[expanded, merged], outputs=[tensor]),
    ]
    return [_typed(base, np.dtype(np.float32)), shape, merged]


def merged_shape(tensor: str) -> str:
    """Return the name of the suffix input that gives the tensor's shape after the merge."""
    return f"{boundary_shape(tensor)}__merged"


def _behind(graph: gs.Graph, tensors: Iterable[gs.Variable], stop: tuple[str, ...] = ()) -> list[gs.Node]:
    """Return every node that depends on the tensors other than through a `stop` operator, in no particular order."""
    found: dict[int, gs.Node] = {}
    inner = _readers_inside(graph)
    pending = list(tensors)
    while pending:
        tensor = pending.pop()
        for node in list(tensor.outputs) + inner.get(tensor.name, []):
            if id(node) not in found and node.op not in stop:
                found[id(node)] = node
                pending += node.outputs
    return list(found.values())


def _readers_inside(graph: gs.Graph) -> dict[str, list[gs.Node]]:
    """Return the nodes of this graph whose subgraphs read a tensor of this graph, by tensor name."""
    found: dict[str, list[gs.Node]] = {}
    for node in graph.nodes:
        for name in _captured(node):
            found.setdefault(name, []).append(node)
    return found


def _read_by(node: gs.Node, known: Mapping[str, gs.Tensor]) -> list[gs.Tensor]:
    """Return the tensors of this graph that a node reads, in its subgraphs too."""
    return list(node.inputs) + [known[name] for name in _captured(node) if name in known]


def _captured(node: gs.Node) -> set[str]:
    names: set[str] = set()
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            own = {output.name for inner in value.nodes for output in inner.outputs}
            for inner in value.nodes:
                names |= {i.name for i in inner.inputs if i.name not in own}
                names |= _captured(inner)
            names |= {output.name for output in value.outputs if output.name not in own}
    return names


def _outputs_of(nodes: Iterable[gs.Node]) -> list[gs.Variable]:
    return [output for node in nodes for output in node.outputs]


def _crossing(graph: gs.Graph, h: gs.Variable, scores: gs.Variable, behind: list[gs.Node]) -> list[str]:
    """Return the tensors beside h that the suffix needs from the prefix.

    What is computed from constants has no samples to be repeated for, and what is computed from shapes carries the
    batch size of the prefix: their producers are pulled into the suffix until only activations cross. So are those of
    what is computed from inputs alone that have no samples on axis 0.
    """
    suffix = {id(node) for node in behind}
    laid_out = [tensor for tensor in graph.inputs if not any(node.name.startswith(AS_GIVEN) for node in tensor.outputs)]
    activations = {id(node) for node in _behind(graph, laid_out, stop=("Shape", "Size"))}
    known = graph.tensors()
    crossing: dict[str, gs.Variable] = {}
    pending = [scores]
    seen: set[str] = set()
    while pending:
        tensor = pending.pop()
        if tensor.name in seen or isinstance(tensor, gs.Constant) or tensor is h:
            continue
        seen.add(tensor.name)
        producer = tensor.inputs[0] if tensor.inputs else None
        # Whole numbers are pulled as well: positions (NonZero ...) are not laid out by samples.
        whole = tensor.dtype is not None and np.dtype(tensor.dtype) == np.int64
        if producer is not None and (id(producer) in suffix or id(producer) not in activations or whole):
            pending += _read_by(producer, known)
        elif tensor.name:
            crossing[tensor.name] = tensor
    return sorted(crossing)


def _input(name: str, dtype: np.dtype, rank: int) -> gs.Variable:
    return gs.Variable(name, dtype=dtype, shape=[f"{name}_{axis}" for axis in range(rank)])


def _node(graph: gs.Graph, op: str, inputs: list[gs.Tensor], name: str, dtype: np.dtype) -> gs.Variable:
    output = gs.Variable(f"onnxcare_{name}", dtype=dtype)
    graph.nodes.append(gs.Node(op, f"onnxcare_{name}", inputs=inputs, outputs=[output]))
    return output


def _typed(tensor: gs.Variable, default: np.dtype) -> gs.Variable:
    """Give an input a dtype and no shape, so that any number of rows may be fed."""
    tensor.dtype = tensor.dtype if tensor.dtype is not None else default
    tensor.shape = None
    return tensor


def _untyped(tensor: gs.Tensor) -> gs.Tensor:
    """Take the type off an output: onnxruntime fills it in, and a stale shape cannot contradict it."""
    if isinstance(tensor, gs.Variable):
        tensor.shape = None
        tensor.dtype = None
    return tensor


def _export(graph: gs.Graph, what: str) -> onnx.ModelProto:
    for tensor in graph.tensors().values():
        # Shapes inferred for the whole graph may name the batch; in a part of it they only mislead.
        if isinstance(tensor, gs.Variable) and tensor not in graph.inputs:
            tensor.shape = None
    with _taking_apart(what):
        graph.cleanup().toposort()
        return gs.export_onnx(graph, do_type_check=False)
