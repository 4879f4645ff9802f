"""Gradients of a piece of a graph: the only module that knows onnx-ad.

onnx-ad writes the vector-Jacobian product of a graph as a graph of its own, and onnxruntime runs it:

    x, dLoss/dy  ->  y, dLoss/dx          and, where the weights w are fed,  x, w, dLoss/dy  ->  y, dLoss/dw

Its rules need static shapes, explicit pads and a recent operator set, and without them some refuse and some are wrong.
So a copy of the graph is made to fit first: the batch is fixed, an old operator set raised, ``auto_pad`` spelled out, a
grouped convolution whose kernel is asked for written without groups. What onnx-ad returns is corrected in one place
(`_exact_pads`), cut down to what is asked for, and tried once.
"""

from __future__ import annotations

import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ad
import onnx_ad.rules
from onnx import inliner, numpy_helper, shape_inference, version_converter

from onnxcare.errors import DataError, ModelError
from onnxcare.graph.light import HEAVY, feeding, with_initializers
from onnxcare.graph.model import numpy_dtype
from onnxcare.graph.paths import FLOATS, Paths, described, element_types, reads
from onnxcare.graph.straight_through import pass_through_rounding
from onnxcare.graph.view import attribute, operator
from onnxcare.runtime import Array, Device, Session, batches

_ADJOINT, _SEEDS = "onnxcare_adjoint_", "onnxcare_seeds"
# The adjoints of MaxPool and Gather scatter with addition, from opset 16 on. Before opset 11, Clip and Pad have their
# operands in attributes, where the rules do not look for them.
_OLDEST_OPSET, _RAISED_OPSET = 16, 17
_WINDOWED = {"Conv", "MaxPool", "AveragePool", "LpPool"}
# The derivative computes the same values on the way as the part itself, up to the rounding of other kernels, which
# half precision makes large.
_TOLERANCE = 1e-2


class NoGradient(Exception):
    """A gradient cannot be computed, or is zero wherever it exists.

    Attributes:
        why: one plain sentence that names the operator and the node in the way.
    """

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


class _Derivative(ABC):
    """A piece of a graph and what onnx-ad makes of it, loaded and tried on random samples."""

    def __init__(
        self,
        part: onnx.ModelProto,
        inputs: Sequence[str],
        weights: Sequence[str],
        output: str,
        shapes: Mapping[str, tuple[int, ...]],
        device: Device,
        rows: int,
        what: str,
    ) -> None:
        self._wanted, self._output, self._rows, self._what = (*inputs, *weights), output, rows, what
        answering = _pruned(part, [output])
        self._names = [info.name for info in answering.graph.input]
        known = {tensor.name: tensor for tensor in answering.graph.initializer}
        for name in self._wanted:
            if name not in (known if name in weights else self._names):
                raise NoGradient(f"{output!r} does not depend on {name!r}")
        fed = [known[name] for name in weights]
        self._forward = _session(feeding(answering, fed), device, what)
        self._dtype = numpy_dtype(self._forward.outputs[0][1])
        if self._dtype is None or not np.issubdtype(self._dtype, np.floating):
            raise NoGradient(f"{output!r} does not hold floating-point numbers")
        heavy = [tensor for name, tensor in known.items() if name not in weights and _is_heavy(tensor)]
        fitted = _fitted(answering, [*heavy, *fed], shapes, rows, self._dtype)
        _ungroup(fitted, set(weights))
        _check_paths(fitted, self._wanted, output)
        derivative = _reversed(fitted, self._wanted, output)
        _hold(derivative, heavy)
        content = derivative.SerializeToString()
        tried = {tensor.name: numpy_helper.to_array(tensor) for tensor in fed}
        del answering, known, fed, heavy, fitted, derivative  # onnxruntime makes copies of its own
        self._reverse = _session(content, device, what)
        self._try(shapes, tried)

    @abstractmethod
    def _answers(self, feeds: Mapping[str, Array]) -> Array:
        """Return the output, from the part itself."""

    @abstractmethod
    def _products(self, feeds: Mapping[str, Array], seed: Array) -> tuple[Array, dict[str, Array]]:
        """Return the output and what is wanted, from the derivative."""

    def _adjoints(self) -> list[str]:
        return [_ADJOINT + name for name in self._wanted]

    def _fed(self, feeds: Mapping[str, Array], seed: Array) -> dict[str, Array]:
        """Return what the derivative takes."""
        # The last axis of seeds and adjoints is one that onnx-ad has for several seeds.
        known = {**feeds, _ADJOINT + self._output: np.asarray(seed, self._dtype)[..., None]}
        # An input whose shape alone matters may be gone.
        return {name: known[name] for name, _, _ in self._reverse.inputs}

    def _try(self, shapes: Mapping[str, tuple[int, ...]], weights: Mapping[str, Array]) -> None:
        """Run the derivative once, and compare the values that it computes on the way with those of the part."""
        random, samples = np.random.default_rng(0), min(2, self._rows)
        feeds = dict(weights)
        for name, kind, _ in self._forward.inputs:
            if name in weights:
                continue
            drawn = random.normal(size=(samples, *shapes[name]))
            dtype = numpy_dtype(kind) or np.dtype(np.float32)
            # Zero is a valid index, whatever it is looked up in.
            feeds[name] = drawn.astype(dtype) if np.issubdtype(dtype, np.floating) else np.zeros_like(drawn, dtype)
        try:
            expected = self._answers(feeds)
        except ModelError:
            return  # the part does not take random samples: there is nothing to compare with
        try:
            found = self._products(feeds, np.ones_like(expected))[0]
        except ModelError as error:
            raise NoGradient(f"the derivative cannot be run: {error}") from error
        scale = max(1.0, float(np.max(np.abs(expected), where=np.isfinite(expected), initial=0)))
        if not np.allclose(found, expected, rtol=0, atol=_TOLERANCE * scale, equal_nan=True):
            raise NoGradient(f"the derivative of {self._output!r} that onnx-ad writes is that of another function")


class Gradients(_Derivative):
    """Vector-Jacobian products of a piece of a graph by its inputs, run by onnxruntime."""

    def __init__(
        self,
        part: onnx.ModelProto,
        wanted: Sequence[str],
        output: str,
        shapes: Mapping[str, tuple[int, ...]],
        device: Device,
        rows: int,
        what: str,
    ) -> None:
        """Write the derivative, load it and try it on random samples.

        Args:
            part: a model whose inputs, other than initializers, have the samples on axis 0.
            wanted: the inputs to differentiate with respect to.
            output: the tensor that is differentiated, [samples, ...].
            shapes: the shape of one sample, without the batch axis, of every input.
            device: where to run.
            rows: samples per run; a last batch that is shorter is padded.
            what: how to call the model in errors.

        Raises:
            NoGradient: no differentiable path leads from a wanted input to the output, or there is no derivative that
                onnxruntime can run.
        """
        super().__init__(part, wanted, (), output, shapes, device, rows, what)

    def __call__(
        self, inputs: Mapping[str, Array], seed: Array | Callable[[Array, slice], Array]
    ) -> tuple[Array, dict[str, Array]]:
        """Return the output, [N, ...], and the gradient of a loss by every wanted input.

        Args:
            inputs: the values of N samples for every input.
            seed: dLoss/dOutput, in the shape of the output; or a function that returns it for some of the samples, from
                the output for these samples and the slice they are.

        Raises:
            ModelError: onnxruntime failed while running.
            DataError: there are no samples.
        """
        inputs = {name: inputs[name] for name in self._names}
        if not callable(seed):
            return self._products(inputs, seed)
        samples = len(inputs[self._names[0]])
        if not samples:
            raise DataError(f"{self._what}: no rows to run on")
        values, gradients = [], []
        for rows in batches(samples, self._rows):
            batch = {name: array[rows] for name, array in inputs.items()}
            # The part alone runs in a fraction of the time of its derivative, which a zero seed would waste.
            values.append(self._answers(batch))
            gradients.append(self._products(batch, seed(values[-1], rows))[1])
        return np.concatenate(values), {name: np.concatenate([g[name] for g in gradients]) for name in self._wanted}

    def _answers(self, feeds: Mapping[str, Array]) -> Array:
        return self._forward.run_rows(feeds, rows_per_run=self._rows)[0]

    def _products(self, feeds: Mapping[str, Array], seed: Array) -> tuple[Array, dict[str, Array]]:
        values, *adjoints = self._reverse.run_rows(self._fed(feeds, seed), [self._output, *self._adjoints()])
        return values, {name: adjoint[..., 0] for name, adjoint in zip(self._wanted, adjoints, strict=True)}


class WeightGradients(_Derivative):
    """A piece of a graph whose weights are fed, and gradients of a loss by these, run by onnxruntime."""

    def __init__(
        self,
        part: onnx.ModelProto,
        wanted: Sequence[str],
        output: str,
        shapes: Mapping[str, tuple[int, ...]],
        device: Device,
        rows: int,
        what: str,
    ) -> None:
        """Write the derivative, load it and try it on random samples.

        Args:
            part: a model whose inputs, other than initializers, have the samples on axis 0.
            wanted: the initializers to differentiate with respect to; from now on they are fed.
            output: the tensor that is differentiated, [samples, ...].
            shapes: the shape of one sample, without the batch axis, of every input.
            device: where to run.
            rows: samples per run.
            what: how to call the model in errors.

        Raises:
            NoGradient: no differentiable path leads from a wanted weight to the output, or there is no derivative that
                onnxruntime can run.
        """
        super().__init__(part, (), wanted, output, shapes, device, rows, what)

    def values(self, weights: Mapping[str, Array], inputs: Mapping[str, Array]) -> Array:
        """Return the output, [N, ...].

        Args:
            weights: the values of every wanted weight.
            inputs: the values of N samples for every input.

        Raises:
            ModelError: onnxruntime failed while running.
            DataError: there are no samples.
        """
        return self._answers({**inputs, **weights})

    def __call__(
        self, weights: Mapping[str, Array], inputs: Mapping[str, Array], seed: Array
    ) -> tuple[Array, dict[str, Array]]:
        """Return the output, [N, ...], and the gradient of a loss by every wanted weight, summed over the samples.

        Args:
            weights: the values of every wanted weight.
            inputs: the values of N samples for every input.
            seed: dLoss/dOutput, in the shape of the output.

        Raises:
            ModelError: onnxruntime failed while running.
            DataError: there are no samples.
        """
        return self._products({**inputs, **weights}, seed)

    def _answers(self, feeds: Mapping[str, Array]) -> Array:
        weights = {name: feeds[name] for name in self._wanted}
        return np.concatenate([self._forward.run({**weights, **part})[0] for _, part in self._batches(feeds)])

    def _products(self, feeds: Mapping[str, Array], seed: Array) -> tuple[Array, dict[str, Array]]:
        weights = {name: feeds[name] for name in self._wanted}
        total = {name: np.zeros(weight.shape) for name, weight in weights.items()}
        values = []
        for rows, part in self._batches(feeds):
            # What fills a batch up repeats its last sample, which may count only once: the seeds there are zero.
            short = self._rows - (rows.stop - rows.start)
            filled = {name: np.concatenate([x, np.repeat(x[-1:], short, axis=0)]) for name, x in part.items()}
            seeds = np.concatenate([seed[rows], np.zeros((short, *seed.shape[1:]), seed.dtype)])
            fed = self._fed({**weights, **filled}, seeds)
            found, *adjoints = self._reverse.run(fed, [self._output, *self._adjoints()])
            values.append(found[: rows.stop - rows.start])
            for name, adjoint in zip(self._wanted, adjoints, strict=True):
                total[name] += adjoint[..., 0]
        return np.concatenate(values), total

    def _batches(self, feeds: Mapping[str, Array]) -> Iterator[tuple[slice, dict[str, Array]]]:
        """Yield the samples of every run, and the inputs there."""
        samples = len(feeds[self._names[0]])
        if not samples:
            raise DataError(f"{self._what}: no rows to run on")
        for rows in batches(samples, self._rows):
            yield rows, {name: feeds[name][rows] for name in self._names}


def _session(part: onnx.ModelProto | bytes, device: Device, what: str) -> Session:
    try:
        return Session(part, device, what=what)
    except ModelError as error:
        raise NoGradient(f"the derivative cannot be run: {error}") from error


# -- making a graph fit --------------------------------------------------------------------------


def _pruned(model: onnx.ModelProto, outputs: Iterable[str]) -> onnx.ModelProto:
    """Return a copy that computes these outputs and nothing else; onnxruntime would run nodes that nobody reads."""
    needed, kept = set(outputs), []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed |= reads(node)
    copy = with_initializers(model, (tensor for tensor in model.graph.initializer if tensor.name in needed))
    graph = copy.graph
    _replace(graph.node, reversed(kept))
    held = {tensor.name for tensor in graph.initializer} | {t.values.name for t in graph.sparse_initializer}
    _replace(graph.input, (info for info in model.graph.input if info.name in needed - held))
    _replace(graph.output, (onnx.ValueInfoProto(name=name) for name in outputs))
    # IR 3 wants every initializer among the inputs, where it would be no constant.
    copy.ir_version = max(copy.ir_version, 4)
    return copy


def _replace(field: Any, items: Iterable[Any]) -> None:
    """Give a repeated field of a protobuf message other items."""
    found = list(items)
    del field[:]
    field.extend(found)


def _is_heavy(tensor: onnx.TensorProto) -> bool:
    return tensor.data_type in FLOATS and int(np.prod(tensor.dims, dtype=np.int64)) > HEAVY


def _hold(model: onnx.ModelProto, weights: Iterable[onnx.TensorProto]) -> None:
    """Turn inputs of a model back into the constants they were."""
    fed = {info.name for info in model.graph.input}
    held = [tensor for tensor in weights if tensor.name in fed]
    model.graph.initializer.extend(held)
    names = {tensor.name for tensor in held}
    _replace(model.graph.input, [info for info in model.graph.input if info.name not in names])


def _fitted(
    part: onnx.ModelProto,
    weights: Sequence[onnx.TensorProto],
    shapes: Mapping[str, tuple[int, ...]],
    rows: int,
    dtype: np.dtype,
) -> onnx.ModelProto:
    """Return the part in the form that the rules of onnx-ad need, for `rows` samples in every run.

    Only the shapes of weights matter here, and they are copied dozens of times on the way: they become inputs.
    """
    info = onnx.helper.make_tensor_value_info
    copy = feeding(part, weights)
    for item in copy.graph.input:
        if item.name in shapes:
            item.CopyFrom(info(item.name, item.type.tensor_type.elem_type, [rows, *shapes[item.name]]))
    try:
        copy = inliner.inline_local_functions(copy)
        kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
        _replace(copy.graph.output, [info(part.graph.output[0].name, kind, None)])
        copy = _inferred(copy)
        if next(o.version for o in copy.opset_import if o.domain in ("", "ai.onnx")) < _OLDEST_OPSET:
            copy = _inferred(version_converter.convert_version(copy, _RAISED_OPSET))
    except Exception as error:  # onnx raises whatever comes up in its converters
        raise NoGradient(f"the graph cannot be prepared for a derivative: {_line(error)}") from error
    known = _shapes(copy)
    for node in copy.graph.node:
        _spell_out_pads(node, known)
    pass_through_rounding(copy)
    return copy


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the types and shapes that follow from those of its inputs.

    What lies behind an operator of another domain only onnxruntime can tell.
    """
    del model.graph.value_info[:]
    model = _infer(model)
    known = element_types(model)
    foreign = [name for node in model.graph.node if not operator(node) for name in node.output if name]
    unknown = [name for name in foreign if not known.get(name)]
    if unknown:
        for name, kind, shape in Session(_pruned(model, unknown), optimise=False).outputs:
            dtype = numpy_dtype(kind)
            if dtype is not None:
                kind = onnx.helper.np_dtype_to_tensor_dtype(dtype)
                model.graph.value_info.append(onnx.helper.make_tensor_value_info(name, kind, shape))
        model = _infer(model)
    return model


def _infer(model: onnx.ModelProto) -> onnx.ModelProto:
    return shape_inference.infer_shapes(model, strict_mode=False, data_prop=True)


def _shapes(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Return the shapes that are known to the last axis, by tensor."""
    graph = model.graph
    found = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    for info in [*graph.value_info, *graph.input, *graph.output]:
        shape = info.type.tensor_type.shape
        if info.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in shape.dim):
            found[info.name] = [dim.dim_value for dim in shape.dim]
    return found


def _spell_out_pads(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> None:
    """Replace ``auto_pad = SAME_...``, which onnx-ad refuses, by the pads it stands for."""
    mode = str(attribute(node, "auto_pad", ""))
    windows = _windows(node, shapes) if operator(node) in _WINDOWED and mode.startswith("SAME") else None
    if windows is None or node.input[0] not in shapes:
        return
    first, last = [], []
    for size, (kernel, stride) in zip(shapes[node.input[0]][2:], windows, strict=True):
        total = max(0, (-(-size // stride) - 1) * stride + kernel - size)
        first.append(total // 2 if mode == "SAME_UPPER" else total - total // 2)
        last.append(total - first[-1])
    _set(node, auto_pad=None, pads=first + last)


def _ungroup(part: onnx.ModelProto, kernels: Container[str]) -> None:
    """Write grouped convolutions with these kernels as ones without groups, whose kernels are zero between the groups.

    onnx-ad has no derivative by the kernels of a grouped convolution.
    """
    known, kinds = _shapes(part), element_types(part)
    nodes: list[onnx.NodeProto] = []
    for node in part.graph.node:
        groups = attribute(node, "group", 1)
        if operator(node) == "Conv" and groups > 1 and node.input[1] in kernels:
            kernel = node.input[1]
            whole, steps, constants = _spread(kernel, known[kernel], kinds[kernel], groups)
            node.input[1] = whole.name
            _set(node, group=None)
            nodes += steps
            part.graph.initializer.extend(constants)
            part.graph.value_info.append(whole)
        nodes.append(node)
    _replace(part.graph.node, nodes)


def _spread(
    kernel: str, shape: list[int], kind: int, groups: int
) -> tuple[onnx.ValueInfoProto, list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the kernel of a convolution without groups, and the nodes and constants that make it of a grouped one."""
    outputs, inputs, *window = shape
    own = np.repeat(np.eye(groups), outputs // groups, axis=0).reshape(outputs, groups, 1, *[1] * len(window))
    dims = [outputs, groups * inputs, *window]
    constants = {
        "apart": np.array([outputs, 1, inputs, *window]),
        "own": own.astype(onnx.helper.tensor_dtype_to_np_dtype(kind)),
        "together": np.array(dims),
    }
    apart, mask, together, row, spread, whole = (
        f"onnxcare_{name}__{kernel}" for name in (*constants, "row", "spread", "whole")
    )
    node = onnx.helper.make_node
    steps = [
        node("Reshape", [kernel, apart], [row]),
        node("Mul", [row, mask], [spread]),
        node("Reshape", [spread, together], [whole]),
    ]
    tensors = [numpy_helper.from_array(array, f"onnxcare_{name}__{kernel}") for name, array in constants.items()]
    return onnx.helper.make_tensor_value_info(whole, kind, dims), steps, tensors


def _windows(node: onnx.NodeProto, shapes: Mapping[str, list[int]]) -> list[tuple[int, int]] | None:
    """Return the length of a convolution's or pooling's window, dilated, and its stride, along every spatial axis."""
    kernel = attribute(node, "kernel_shape") or (shapes.get(node.input[1], [])[2:] if len(node.input) > 1 else None)
    if not kernel:
        return None
    ones = [1] * len(kernel)
    strides, dilations = attribute(node, "strides", ones), attribute(node, "dilations", ones)
    return [((k - 1) * d + 1, s) for k, d, s in zip(kernel, dilations, strides, strict=True)]


def _set(node: onnx.NodeProto, **values: list[int] | None) -> None:
    """Set attributes of a node; None takes one away."""
    _replace(node.attribute, [item for item in node.attribute if item.name not in values])
    node.attribute.extend(onnx.helper.make_attribute(name, v) for name, v in values.items() if v is not None)


# -- the derivative ------------------------------------------------------------------------------


def smooth_paths(model: onnx.ModelProto) -> Paths:
    """Return the paths through a graph along which a derivative can be taken, as far as its operators tell.

    What onnx-ad has no rule for in other respects, only an attempt shows.
    """
    return Paths(model, onnx_ad.rules.ZERO_DERIVATIVE)


def _check_paths(part: onnx.ModelProto, wanted: Iterable[str], output: str) -> None:
    """Raise NoGradient unless a path of differentiable operators leads from each wanted input to the output.

    For what lies behind operators such as Sign and ArgMax, onnx-ad answers zero without a word.
    """
    paths = smooth_paths(part)
    for name in wanted:
        hindrance = paths.obstacle(name, [output])
        if hindrance is not None:
            raise NoGradient(hindrance)


def _reversed(part: onnx.ModelProto, wanted: Sequence[str], output: str) -> onnx.ModelProto:
    """Return a model that computes the output and, from one more input, the adjoints of the wanted inputs."""
    try:
        model = onnx_ad.reverse(part, inputs=list(wanted), outputs=[output], prefix=_ADJOINT, dim=_SEEDS, layout="onnx")
        shapes = _shapes(part)
        _exact_pads(model, part, shapes)
        model = _pruned(model, [output, *(_ADJOINT + name for name in wanted)])
    except Exception as error:  # young software: its own refusals, and whatever comes up in its code
        raise NoGradient(_refusal(error)) from error
    for info in model.graph.input:
        if info.name == _ADJOINT + output:
            shape = [*shapes[output], 1] if output in shapes else None
            info.CopyFrom(onnx.helper.make_tensor_value_info(info.name, info.type.tensor_type.elem_type, shape))
    return model


def _exact_pads(derivative: onnx.ModelProto, part: onnx.ModelProto, shapes: Mapping[str, list[int]]) -> None:
    """Let transposed convolutions undo the pads that a convolution or pooling has.

    onnx-ad states their output shape, beside which ONNX ignores pads: it spreads what is missing evenly, which shifts
    the adjoint wherever the pads of both ends differ or the last window stops short of the end. The shape follows from
    the pads and from that overhang just as well.
    """
    own = {name for node in part.graph.node for name in node.output}
    known = {**shapes, **{tensor.name: list(tensor.dims) for tensor in derivative.graph.initializer}}
    for node in derivative.graph.node:
        target = attribute(node, "output_shape")
        if operator(node) != "ConvTranspose" or node.output[0] in own or target is None:
            continue
        windows = _windows(node, known)
        if windows is None:
            raise ValueError(f"the kernel {node.input[1]!r} of a convolution has no known shape")
        pads = attribute(node, "pads", [0] * 2 * len(target))
        padded = [size + a + b for size, a, b in zip(target, pads[: len(target)], pads[len(target) :], strict=True)]
        overhang = [(size - kernel) % stride for size, (kernel, stride) in zip(padded, windows, strict=True)]
        _set(node, output_shape=None, output_padding=overhang)


def _refusal(error: Exception) -> str:
    """Say why onnx-ad wrote no derivative, and which node it was at."""
    # Its messages seldom name the node; its functions call it `node`.
    frames = (frame.f_locals.get("node") for frame, _ in traceback.walk_tb(error.__traceback__))
    nodes = [node for node in frames if isinstance(node, onnx.NodeProto)]
    if not isinstance(error, onnx_ad.UnsupportedOperator):
        place = f" at {described(nodes[-1])}" if nodes else ""
        return f"onnx-ad failed{place}: {_line(error)}"
    if not nodes:
        return f"no derivative: {_line(error)}"
    if "no reverse rule" in str(error):
        return f"{described(nodes[-1])} has no known derivative"
    return f"{described(nodes[-1])} cannot be differentiated: {_line(error)}"


def _line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
