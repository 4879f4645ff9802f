"""Gradients against central differences of the reference implementation, in double precision."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ad
import pytest
from graph.models import (
    SUBJECTS,
    Array,
    Weights,
    build,
    exposing,
    random,
    residual,
    run,
    run_single,
    save,
    with_tensor_fed,
)
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcare.errors import DataError, ModelError
from onnxcare.graph import surgery
from onnxcare.graph.gradients import Gradients, NoGradient, WeightGradients
from onnxcare.graph.model import load_model
from onnxcare.graph.surgery import part_behind
from onnxcare.graph.working import experiment_form

Values = Callable[[Array], Array]

# -- the oracle ----------------------------------------------------------------------------------


def double(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the same model in double precision."""

    def widen(tensor: TensorProto) -> None:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))

    wide = onnx.ModelProto()
    wide.CopyFrom(proto)
    del wide.graph.value_info[:]
    for tensor in wide.graph.initializer:
        widen(tensor)
    for node in wide.graph.node:
        for item in node.attribute:
            widen(item.t)
            if item.name == "to" and item.i == TensorProto.FLOAT:
                item.i = TensorProto.DOUBLE
    for info in [*wide.graph.input, *wide.graph.output]:
        if info.type.tensor_type.elem_type == TensorProto.FLOAT:
            info.type.tensor_type.elem_type = TensorProto.DOUBLE
    return wide


def reference(proto: onnx.ModelProto, output: str, name: str, others: Mapping[str, Array] | None = None) -> Values:
    """Return the output as a function of one input; the others are those of one sample, or none."""
    evaluator = ReferenceEvaluator(exposing(double(proto), output))

    def values(rows: Array) -> Array:
        repeated = {k: np.repeat(v, len(rows), 0) for k, v in (others or {}).items()}
        wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in repeated.items()}
        return evaluator.run(None, {name: rows, **wide})[0]

    return values


def slopes(values: Values, sample: Array, seed: Array, step: float, at: Array | None = None) -> Array:
    """Return central differences of ``sum(seed * values)`` by the elements of a sample, or by those at some places."""
    at = np.arange(sample.size) if at is None else at
    change = np.zeros((len(at), sample.size))
    change[np.arange(len(at)), at] = step
    rows = np.concatenate([sample.reshape(1, -1) + change, sample.reshape(1, -1) - change])
    found = values(rows.reshape(-1, *sample.shape)) * seed
    ahead, behind = found.reshape(2, len(at), -1).sum(axis=2)
    return (ahead - behind) / (2 * step)


def differences(values: Values, x: Array, seed: Array, step: float = 1e-6) -> Array:
    rows = [slopes(values, sample.astype(np.float64), one, step) for sample, one in zip(x, seed, strict=True)]
    return np.array(rows).reshape(x.shape)


def assert_close(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def gradients_of(proto: onnx.ModelProto, wanted: str, shape: tuple[int, ...], output: str, rows: int = 2) -> Gradients:
    return Gradients(proto, [wanted], output, {wanted: shape}, "cpu", rows, "the model")


def graph(nodes: str, shape: tuple[int, ...], weights: Weights | None = None, opset: int = 17) -> onnx.ModelProto:
    dims = ", ".join(map(str, shape))
    proto = build(f"g (float[N, {dims}] x) => (float y) {{ {nodes} }}", weights, opset=opset)
    return exposing(proto, "y")


def assert_gradient(
    proto: onnx.ModelProto,
    shape: tuple[int, ...],
    output: str = "y",
    wanted: str = "x",
    dtype: type = np.float32,
    tolerance: float = 1e-5,
) -> None:
    """Check the gradient of three samples, in runs of two."""
    x = random(3, *shape, seed=5, dtype=dtype)
    values, found = gradients_of(proto, wanted, shape, output)({wanted: x}, lambda y, rows: seed_like(y, rows))
    expected = reference(proto, output, wanted)
    assert_close(values, expected(x.astype(np.float64)), tolerance)
    assert found[wanted].dtype == x.dtype
    assert_close(found[wanted], differences(expected, x, seed_like(values, slice(0, 3))), tolerance)


def seed_like(values: Array, rows: slice) -> Array:
    """Return seeds that depend on the sample alone."""
    every = random(16, *values.shape[1:], seed=9)
    return every[rows]


# -- operators -----------------------------------------------------------------------------------

STATISTICS = {"g": random(4) + 2, "b": random(4, seed=1), "m": random(4, seed=2), "v": np.abs(random(4, seed=3)) + 0.5}
HALF, ONE = np.float32(0.5), np.float32(1)

FAMILIES: dict[str, tuple[str, tuple[int, ...], Weights]] = {
    "gemm": (
        "y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, W, b)",
        (6,),
        {"W": random(4, 6), "b": random(4)},
    ),
    "gemm without bias": ("y = Gemm <alpha = 3.0> (x, W)", (6,), {"W": random(6, 4)}),
    "matmul and add": ("p = MatMul (x, W) y = Add (b, p)", (3, 6), {"W": random(6, 4), "b": random(4)}),
    "transposed convolution": (
        "y = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 0]> (x, W)",
        (2, 4, 5),
        {"W": random(2, 3, 3, 3)},
    ),
    "batch normalisation": ("y = BatchNormalization (x, g, b, m, v)", (4, 3, 2), STATISTICS),
    "max pooling": ("y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 1, 1]> (x)", (2, 6, 6), {}),
    "global average": ("y = GlobalAveragePool (x)", (3, 4, 4), {}),
    "relu": ("y = Relu (x)", (9,), {}),
    "leaky relu": ("y = LeakyRelu <alpha = 0.2> (x)", (9,), {}),
    "sigmoid": ("y = Sigmoid (x)", (9,), {}),
    "tanh": ("y = Tanh (x)", (9,), {}),
    "softmax": ("y = Softmax (x)", (3, 4), {}),
    "softmax of channels": ("y = Softmax <axis = 1> (x)", (3, 4), {}),
    "log softmax": ("y = LogSoftmax (x)", (5,), {}),
    "layer normalisation": ("y = LayerNormalization (x, g, b)", (3, 4), {"g": random(4), "b": random(4)}),
    "layer normalisation in pieces": (
        """m = ReduceMean <axes = [-1]> (x) c = Sub (x, m) s = Mul (c, c) v = ReduceMean <axes = [-1]> (s)
        e = Add (v, small) d = Sqrt (e) n = Div (c, d) y = Mul (n, g)""",
        (3, 4),
        {"small": np.float32(1e-5), "g": random(4)},
    ),
    "residual": ("p = MatMul (x, W) t = Tanh (p) y = Add (t, x)", (6,), {"W": random(6, 6)}),
    "concat": ("a = Tanh (x) y = Concat <axis = 1> (x, a, x)", (3, 4), {}),
    "flatten": ("t = Tanh (x) f = Flatten (t) y = MatMul (f, W)", (3, 4), {"W": random(12, 2)}),
    "reshape and transpose": (
        "r = Reshape (x, target) t = Transpose <perm = [0, 2, 1]> (r) y = Mul (t, t)",
        (12,),
        {"target": np.array([-1, 3, 4])},
    ),
    "reshape that copies the batch": ("r = Reshape (x, target) y = Mul (r, r)", (3, 4), {"target": np.array([0, -1])}),
    "clip": ("y = Clip (x, low, high)", (9,), {"low": -HALF, "high": HALF}),
    "clip on one side": ("y = Clip (x, , high)", (9,), {"high": HALF}),
    "where": ("c = Greater (x, W) s = Mul (x, x) y = Where (c, s, x)", (9,), {"W": random(9)}),
    "mean": ("m = ReduceMean <axes = [2], keepdims = 0> (x) y = Mul (m, m)", (3, 4), {}),
    "max of two": ("t = Tanh (x) y = Max (t, W)", (9,), {"W": random(9)}),
    "attention": (
        """q = MatMul (x, Q) k = MatMul (x, K) v = MatMul (x, V) t = Transpose <perm = [0, 2, 1]> (k)
        s = MatMul (q, t) p = Softmax (s) y = MatMul (p, v)""",
        (3, 6),
        {"Q": random(6, 4), "K": random(6, 4, seed=1), "V": random(6, 5)},
    ),
    "gather and slice": (
        "t = Tanh (x) s = Slice (t, one, four, two) y = Gather <axis = 1> (s, twice)",
        (3, 5),
        {"one": np.array([1]), "two": np.array([2]), "four": np.array([4]), "twice": np.array([0, -1, 0])},
    ),
    "cast and back": ("d = Cast <to = 11> (x) s = Mul (d, d) y = Cast <to = 1> (s)", (9,), {}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_of_an_operator_is_its_slope(family: str) -> None:
    nodes, shape, weights = FAMILIES[family]
    assert_gradient(graph(nodes, shape, weights), shape)


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "pads", "dilation", "groups"),
    [
        (7, 3, 1, (1, 1), 1, 1),
        (7, 3, 2, (1, 1), 1, 1),
        (8, 3, 2, (0, 1), 1, 1),  # the pads of TensorFlow's SAME
        (8, 4, 1, (1, 2), 1, 1),
        (8, 5, 4, (2, 2), 1, 1),  # the last window stops short of the padding
        (9, 2, 3, (0, 0), 1, 1),  # the last window stops short of the end
        (8, 1, 2, (0, 0), 1, 1),
        (9, 3, 2, (2, 1), 2, 1),
        (6, 3, 1, (1, 1), 1, 2),
        (6, 3, 2, (0, 1), 1, 4),
    ],
)
def test_a_convolution_of_any_geometry(
    size: int, kernel: int, stride: int, pads: tuple[int, int], dilation: int, groups: int
) -> None:
    attributes = (
        f"pads = [{pads[0]}, 1, {pads[1]}, 0], strides = [{stride}, 1], dilations = [{dilation}, 1], group = {groups}"
    )
    proto = graph(
        f"y = Conv <{attributes}> (x, W, b)", (4, size, 3), {"W": random(4, 4 // groups, kernel, 2), "b": random(4)}
    )
    assert_gradient(proto, (4, size, 3))


def test_convolutions_of_sequences_and_volumes() -> None:
    assert_gradient(graph("y = Conv <pads = [2, 0]> (x, W)", (2, 7), {"W": random(3, 2, 3)}), (2, 7))
    volume = graph(
        "y = Conv <pads = [0, 1, 1, 1, 1, 0], strides = [2, 1, 2]> (x, W)", (1, 4, 3, 4), {"W": random(2, 1, 3, 2, 2)}
    )
    assert_gradient(volume, (1, 4, 3, 4))


@pytest.mark.parametrize("where", ["SAME_UPPER", "SAME_LOWER"])
@pytest.mark.parametrize("nodes", ["Conv <strides = [2, 2], AUTO> (x, W)", "MaxPool <kernel_shape = [2, 2], AUTO> (x)"])
def test_pads_that_the_file_leaves_to_the_runtime(nodes: str, where: str) -> None:
    weights = {"W": random(3, 2, 3, 3)} if "W" in nodes else {}
    proto = graph("y = " + nodes.replace("AUTO", f'auto_pad = "{where}"'), (2, 6, 5), weights)
    assert_gradient(proto, (2, 6, 5))


@pytest.mark.parametrize("counted", [0, 1])
@pytest.mark.parametrize(("kernel", "stride", "pads"), [(2, 2, (0, 0)), (3, 2, (0, 1)), (3, 3, (1, 0)), (3, 1, (1, 1))])
def test_average_pooling_of_any_geometry(kernel: int, stride: int, pads: tuple[int, int], counted: int) -> None:
    proto = graph(
        f"y = AveragePool <kernel_shape = [{kernel}, {kernel}], strides = [{stride}, {stride}], "
        f"pads = [{pads[0]}, {pads[0]}, {pads[1]}, {pads[1]}], count_include_pad = {counted}> (x)",
        (2, 6, 6),
    )
    assert_gradient(proto, (2, 6, 6))


@pytest.mark.parametrize(
    ("nodes", "opset"),
    [
        ("y = Gelu (x)", 20),
        ('y = Gelu <approximate = "tanh"> (x)', 20),
        ("d = Div (x, root) e = Erf (d) f = Add (e, one) p = Mul (x, f) y = Mul (p, half)", 17),
    ],
)
def test_gelu_in_one_node_and_in_pieces(nodes: str, opset: int) -> None:
    """The reference implementation has Erf in single precision only, so the slope is worked out by hand."""
    from scipy.stats import norm

    names = {"root": np.float32(np.sqrt(2)), "one": ONE, "half": HALF}
    proto = graph(nodes, (9,), {k: v for k, v in names.items() if k in nodes}, opset)
    x = random(3, 9, seed=5)
    seed = random(3, 9, seed=9)
    found = gradients_of(proto, "x", (9,), "y")({"x": x}, seed)[1]["x"]
    slope = norm.cdf(x) + x * norm.pdf(x)
    assert_close(found, seed * slope, 2e-3 if "tanh" in nodes else 1e-5)


# -- models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_gradient_of_whole_models(name: str) -> None:
    subject = SUBJECTS[name]()
    exact = subject.dtype is np.float64
    assert_gradient(
        subject.proto,
        subject.shape,
        subject.logits,
        subject.input,
        dtype=subject.dtype,
        tolerance=1e-8 if exact else 1e-5,
    )


def classifier(opset: int, ir_version: int) -> onnx.ModelProto:
    """Return a model whose operators were defined differently in almost every operator set."""
    clip = "Clip <min = -3.0, max = 3.0> (n)" if opset < 11 else "Clip (n, low, high)"
    bounds = {"low": np.float32(-3), "high": np.float32(3)} if opset >= 11 else {}
    proto = build(
        f"""g (float[N, 2, 6, 6] x) => (float y) {{
            c = Conv <pads = [0, 0, 1, 1], strides = [2, 2]> (x, W)
            n = BatchNormalization (c, g, b, m, v)
            r = {clip}
            q = MaxPool <kernel_shape = [2, 2]> (r)
            y = Softmax <axis = 1> (q)
        }}""",
        {"W": random(4, 2, 3, 3) / 4, **STATISTICS, **bounds},
        opset=opset,
        ir_version=ir_version,
    )
    return exposing(proto, "y")


@pytest.mark.parametrize(("opset", "ir_version"), [(8, 3), (9, 4), (11, 6), (12, 7), (13, 7), (15, 8), (26, 13)])
def test_operator_sets_old_and_new(opset: int, ir_version: int) -> None:
    proto = classifier(opset, ir_version)
    if ir_version == 3:  # every initializer is listed among the inputs
        proto.graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            for tensor in proto.graph.initializer
        )
    x = random(3, 2, 6, 6, seed=5)
    values, found = gradients_of(proto, "x", (2, 6, 6), "y")({"x": x}, seed_like)
    assert_close(values, run(proto, {"x": x})[0])
    # The reference implementation normalises batches of new models only; before opset 13, Softmax flattened.
    modern = classifier(17, 8)
    whole = reference(modern, "q", "x")

    def expected(rows: Array) -> Array:
        q = np.exp(whole(rows))
        return q / q.sum(axis=(1, 2, 3) if opset < 13 else 1, keepdims=True)

    assert_close(values, expected(x.astype(np.float64)))
    assert_close(found["x"], differences(expected, x, seed_like(values, slice(0, 3))))


@pytest.mark.parametrize(
    ("folder", "name", "output"),
    [
        ("mnist-square-pytorch", "model.onnx", "logits"),
        ("mnist-square-pytorch", "model-dynamo.onnx", "logits"),
        ("mnist-blend-keras", "model.onnx", "digits_1/dense2_1/BiasAdd:0"),
        ("mnist-blend-keras", "model.onnx", "Identity:0"),
    ],
)
def test_the_sample_models(samples: Path, folder: str, name: str, output: str) -> None:
    model = load_model(samples / folder / name)
    with np.load(samples / folder / "repair.npz") as archive:
        x = archive["x"][:2]
    # An even background ties in MaxPool, and has no slope there.
    x = x + np.random.default_rng(1).uniform(0, 0.1, x.shape).astype(np.float32)
    wanted = model.inputs[0].name
    # Of the class that is next: the likeliest one saturates behind Softmax.
    seed = np.eye(10)[run(model.proto, {wanted: x}, output)[0].argsort(axis=1)[:, -2]]
    values, found = gradients_of(model.proto, wanted, x.shape[1:], output, rows=8)({wanted: x}, seed)
    np.testing.assert_allclose(values, run(model.proto, {wanted: x}, output)[0], atol=1e-5)
    expected = reference(model.proto, output, wanted)
    for sample, one, gradient in zip(x, seed, found[wanted], strict=True):
        at = np.argsort(np.abs(gradient).ravel())[-6:]
        slope = slopes(expected, sample.astype(np.float64), one, 1e-6, at)
        assert np.abs(slope).max() > 1e-5
        np.testing.assert_allclose(gradient.ravel()[at], slope, rtol=1e-3)


def test_shapes_that_the_file_does_not_state_or_states_for_one_sample() -> None:
    proto = graph(
        """s = Shape (x) n = Gather (s, zero) u = Unsqueeze (n, axis) t = Concat <axis = 0> (u, rest)
        c = Conv (x, W) r = Relu (c) f = Reshape (r, t) y = MatMul (f, V)""",
        (2, 6),
        {"zero": np.int64(0), "axis": np.array([0]), "rest": np.array([-1]), "W": random(3, 2, 3), "V": random(12, 2)},
    )
    proto.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [1, 3, 4]))
    assert_gradient(proto, (2, 6))


def test_half_precision() -> None:
    weights = {"W": random(6, 8), "V": random(8, 3)}
    nodes = "h = MatMul (x, W) t = Tanh (h) y = MatMul (t, V)"
    half = build(
        f"g (float16[N, 6] x) => (float16[N, 3] y) {{ {nodes} }}", {k: v.astype(np.float16) for k, v in weights.items()}
    )
    x, seed = random(3, 6), random(3, 3, seed=1)
    found = gradients_of(half, "x", (6,), "y")({"x": x.astype(np.float16)}, seed)[1]["x"]
    assert found.dtype == np.float16
    assert_close(found, differences(reference(graph(nodes, (6,), weights), "y", "x"), x, seed), 1e-2)


def test_functions_of_the_model_itself() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 4] x) => (float[N, 4] y) { h = own.twice (x) y = Tanh (h) }
        <domain: "own", opset_import: ["": 17]> twice (a) => (b) { b = Add (a, a) }"""
    )
    x = random(3, 4)
    found = gradients_of(proto, "x", (4,), "y")({"x": x}, np.ones((3, 4)))[1]["x"]
    assert_close(found, 2 / np.cosh(2 * x.astype(np.float64)) ** 2)


def test_a_branch_that_reads_from_outside() -> None:
    proto = build(
        """g (float[N, 4] x) => (float[N, 4] y) {
            flag = Constant <value = bool {1}> ()
            t = Tanh (x)
            y = If (flag) <
                then_branch = a () => (float[N, 4] p) { p = Mul (t, t) },
                else_branch = b () => (float[N, 4] q) { q = Neg (t) }
            >
        }"""
    )
    assert_gradient(proto, (4,))


# -- inputs and batches --------------------------------------------------------------------------


def two_inputs() -> onnx.ModelProto:
    """Words are looked up in a table, and added to features."""
    return build(
        """g (float[N, 4] x, int64[N] word, float[N, 4] z) => (float[N, 3] y) {
            e = Gather (table, word) s = Add (x, e) p = Mul (s, z) t = Tanh (p) y = MatMul (t, W)
        }""",
        {"table": random(5, 4), "W": random(4, 3)},
    )


def test_several_inputs_of_which_some_are_whole_numbers() -> None:
    proto = two_inputs()
    x = {"x": random(4, 4), "word": np.array([0, 4, 2, 2]), "z": random(4, 4, seed=1)}
    found = Gradients(proto, ["x", "z"], "y", {"x": (4,), "word": (), "z": (4,)}, "cpu", 3, "the model")
    seed = random(4, 3, seed=2)
    values, gradient = found(x, seed)
    assert_close(values, run(proto, x)[0])
    assert set(gradient) == {"x", "z"}
    for name in gradient:
        for row in range(4):
            one = {k: v[row : row + 1] for k, v in x.items()}
            values_of = reference(proto, "y", name, {k: v for k, v in one.items() if k != name})
            assert_close(gradient[name][row], slopes(values_of, one[name][0].astype(np.float64), seed[row], 1e-6))


@pytest.mark.parametrize("rows", [1, 3, 7, 16])
def test_batches_answer_as_single_rows_do(rows: int) -> None:
    subject = residual()
    x = subject.samples(7)[subject.input]
    seed = random(7, 5, seed=4)
    single = gradients_of(subject.proto, subject.input, subject.shape, "scores", rows=1)
    expected = [single({"x": x[i : i + 1]}, seed[i : i + 1]) for i in range(7)]
    values, found = gradients_of(subject.proto, subject.input, subject.shape, "scores", rows)({"x": x}, seed)
    assert_close(values, np.concatenate([v for v, _ in expected]), 1e-6)
    assert_close(found["x"], np.concatenate([g["x"] for _, g in expected]), 1e-6)


def test_seeds_that_need_the_output_first() -> None:
    """Cross-entropy: its seed is softmax(y) - target, and its slope that of the loss itself."""
    subject = SUBJECTS["cnn"]()
    x = subject.samples(5)[subject.input]
    # Of the classes that are least likely, the loss does not saturate.
    labels = run(subject.proto, {"x": x})[0].argmin(axis=1)
    asked: list[tuple[tuple[int, ...], slice]] = []

    def seed(y: Array, rows: slice) -> Array:
        asked.append((y.shape, rows))
        odds = np.exp(y - y.max(axis=1, keepdims=True))
        return odds / odds.sum(axis=1, keepdims=True) - np.eye(5)[labels[rows]]

    found = gradients_of(subject.proto, "x", subject.shape, "scores")({"x": x}, seed)[1]["x"]
    assert asked == [((2, 5), slice(0, 2)), ((2, 5), slice(2, 4)), ((1, 5), slice(4, 5))]
    scores = reference(subject.proto, "scores", "x")
    for row, label in enumerate(labels):

        def loss(rows: Array, label: int = label) -> Array:
            y = scores(rows)
            return np.log(np.exp(y).sum(axis=1)) - y[:, label]

        assert_close(found[row].ravel(), slopes(loss, x[row].astype(np.float64), np.float64(1), 1e-6))


def test_inputs_that_matter_little() -> None:
    """Only the shape of z matters to y; w matters to another output, and what is no input is passed over."""
    proto = build(
        """g (float[N, 12] x, float[N, 3, 4] z, float[N, 2] w) => (float y, float v) {
            s = Shape (z) t = Tanh (x) y = Reshape (t, s) v = Sqrt (w)
        }"""
    )
    x = {"x": random(3, 12), "z": random(3, 3, 4), "w": random(3, 2), "other": random(3, 1)}
    found = Gradients(proto, ["x"], "y", {"x": (12,), "z": (3, 4)}, "cpu", 2, "the model")
    for seed in (np.ones((3, 3, 4)), lambda y, rows: np.ones_like(y)):
        assert_close(found(x, seed)[1]["x"], 1 / np.cosh(x["x"]) ** 2)
    with pytest.raises(NoGradient, match=r"^'y' does not depend on 'z'$"):
        Gradients(proto, ["x", "z"], "y", {"x": (12,), "z": (3, 4)}, "cpu", 2, "the model")


def test_no_samples() -> None:
    found = gradients_of(SUBJECTS["mlp"]().proto, "x", (6,), "scores")
    for seed in (np.zeros((0, 4)), lambda y, rows: y):
        with pytest.raises(DataError, match="no rows"):
            found({"x": np.zeros((0, 6), np.float32)}, seed)


def test_the_part_stays_as_it_is() -> None:
    proto = SUBJECTS["acas"]().proto
    before = proto.SerializeToString()
    gradients_of(proto, "input", (1, 1, 5), "costs")
    assert proto.SerializeToString() == before


# -- parts of a graph ----------------------------------------------------------------------------


def behind(proto: onnx.ModelProto, tensor: str, output: str, x: dict[str, Array]) -> tuple[Array, Array]:
    """Return values of an inner tensor, and the slopes of the sum of the output by it, row by row."""
    name = next(iter(x))
    h = run_single(proto, x, tensor)[0]
    replaced = with_tensor_fed(proto, tensor)
    found = []
    for row in range(len(h)):
        values = reference(replaced, output, tensor, {name: x[name][row : row + 1]})
        found.append(slopes(values, h[row].astype(np.float64), np.float64(1), 1e-6).reshape(h[row].shape))
    return h, np.array(found)


@pytest.mark.parametrize(("tensor", "others"), [("r1", ["h"]), ("c2", ["h"]), ("h", []), ("r3", []), ("f", [])])
def test_the_part_behind_a_tensor(tmp_path: Path, tensor: str, others: list[str]) -> None:
    subject = residual()
    copy = experiment_form(save(subject.proto, tmp_path)).proto
    x = subject.samples(3)
    part, crossing = part_behind(copy, tensor, "scores", "the model")
    assert crossing == others
    assert {info.name for info in part.graph.input} == {tensor, *others}
    expected = behind(subject.proto, tensor, "scores", x)[1]
    inputs = dict(zip([tensor, *others], run_single(subject.proto, x, tensor, *others), strict=True))
    shapes = {name: values.shape[1:] for name, values in inputs.items()}
    found = Gradients(part, [tensor], "scores", shapes, "cpu", 2, "the model")(inputs, np.ones((3, 5)))
    assert_close(found[0], run(subject.proto, x)[0])
    assert_close(found[1][tensor], expected)


def test_a_model_input_that_crosses_the_cut(tmp_path: Path) -> None:
    proto = build(
        "g (float[N, 6] x) => (float[N, 2] y) { z = MatMul (x, W) h = Tanh (z) s = Mul (h, x) y = MatMul (s, V) }",
        {"W": random(6, 6), "V": random(6, 2)},
    )
    part, crossing = part_behind(experiment_form(save(proto, tmp_path)).proto, "h", "y", "the model")
    assert crossing == ["x"]
    x = {"x": random(3, 6)}
    h, expected = behind(proto, "h", "y", x)
    both = Gradients(part, ["h", "x"], "y", {"h": (6,), "x": (6,)}, "cpu", 2, "the model")
    found = both(x | {"h": h}, np.ones((3, 2)))[1]
    assert_close(found["h"], expected)
    assert_close(found["x"], h * proto_weights(proto)["V"].sum(axis=1))


def proto_weights(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def test_parts_that_surgery_cuts_out(tmp_path: Path) -> None:
    subject = SUBJECTS["keras"]()
    copy = experiment_form(save(subject.proto, tmp_path)).proto
    x = subject.samples(3)
    front = surgery.expose(copy, ["r1", "z1"], "the model")
    found = gradients_of(front, "image", subject.shape, "z1")(x, np.ones((3, 6)))[1]["image"]
    assert_close(found, differences(reference(subject.proto, "z1", "image"), x["image"], np.ones((3, 6))))
    back = surgery.between(copy, "c1", "z2", "the model")
    h, expected = behind(subject.proto, "c1", "z2", x)
    found = gradients_of(back, "c1", h.shape[1:], "z2")({"c1": h} | x, np.ones((3, 4)))[1]["c1"]
    assert_close(found, expected)
    whole, crossing = part_behind(copy, "image", "z2", "the model")
    assert not crossing
    found = gradients_of(whole, "image", subject.shape, "z2")(x, np.ones((3, 4)))[1]["image"]
    assert_close(found, differences(reference(subject.proto, "z2", "image"), x["image"], np.ones((3, 4))))


def test_a_part_that_is_none(tmp_path: Path) -> None:
    copy = experiment_form(save(residual().proto, tmp_path)).proto
    with pytest.raises(ModelError, match="'h' does not depend on 'c1'"):
        part_behind(copy, "c1", "h", "the model")


# -- by weights ----------------------------------------------------------------------------------


def sum_by(proto: onnx.ModelProto, name: str, x: Mapping[str, Array], seed: Array) -> Values:
    """Return ``sum(seed * output)`` as a function of a family of values of an initializer, in double precision."""
    wide = double(proto)
    kept = [tensor for tensor in wide.graph.initializer if tensor.name != name]
    del wide.graph.initializer[:]
    wide.graph.initializer.extend(kept)
    wide.graph.input.append(helper.make_tensor_value_info(name, TensorProto.DOUBLE, None))
    evaluator = ReferenceEvaluator(wide)
    feeds = {key: value.astype(np.float64) for key, value in x.items()}
    return lambda family: np.array([[(evaluator.run(None, {**feeds, name: w})[0] * seed).sum()] for w in family])


def by_weights(proto: onnx.ModelProto, wanted: list[str], shape: tuple[int, ...], rows: int = 2) -> WeightGradients:
    return WeightGradients(proto, wanted, "y", {"x": shape}, "cpu", rows, "the model")


def assert_weight_gradients(proto: onnx.ModelProto, shape: tuple[int, ...], wanted: list[str]) -> None:
    """Check the gradients over five samples, in runs of two and in one that they do not fill."""
    x, weights = {"x": random(5, *shape, seed=5)}, proto_weights(proto)
    fed = {name: weights[name] for name in wanted}
    y = run(proto, x)[0]
    seed = random(*y.shape, seed=9)
    expected = {
        name: slopes(sum_by(proto, name, x, seed), fed[name].astype(np.float64), np.ones(1), 1e-6) for name in wanted
    }
    for rows in (2, 8):
        values, found = by_weights(proto, wanted, shape, rows)(fed, x, seed)
        assert_close(values, y)
        for name in wanted:
            assert_close(found[name], expected[name].reshape(fed[name].shape))


BEHIND: dict[str, Array] = {"W": random(3, 4, 3, 2), "b": random(1, 3, 1, 1)}
BY_WEIGHTS: dict[str, tuple[str, tuple[int, ...], Weights]] = {
    "gemm": FAMILIES["gemm"],
    "gemm, not transposed": (
        "y = Gemm <alpha = 3.0, beta = 0.5> (x, W, b)",
        (6,),
        {"W": random(6, 4), "b": random(1, 4)},
    ),
    "matmul and add": FAMILIES["matmul and add"],
    "transposed matmul": (
        "t = Transpose <perm = [1, 0]> (W) i = Identity (t) p = MatMul (x, i) y = Add (p, b)",
        (3, 6),
        {"W": random(4, 6), "b": random(1, 4)},
    ),
    "convolution, bias behind": (
        "p = Conv <pads = [1, 0, 0, 1], strides = [2, 1]> (x, W) y = Add (p, b)",
        (4, 7, 5),
        BEHIND,
    ),
    "pads of SAME_UPPER": (
        'y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, W, b)',
        (2, 6, 5),
        {"W": random(3, 2, 3, 3), "b": random(3)},
    ),
    "pads of SAME_LOWER": (
        'y = Conv <auto_pad = "SAME_LOWER", strides = [2, 2]> (x, W, b)',
        (2, 6, 5),
        {"W": random(3, 2, 3, 3), "b": random(3)},
    ),
    "windows that stop short": (
        "y = Conv <strides = [3, 4], pads = [2, 2, 2, 2], kernel_shape = [2, 3]> (x, W, b)",
        (2, 9, 8),
        {"W": random(3, 2, 2, 3), "b": random(3)},
    ),
    "groups": (
        "y = Conv <group = 2, pads = [1, 1, 0, 1], strides = [2, 1], dilations = [1, 2]> (x, W, b)",
        (4, 8, 7),
        {"W": random(6, 2, 3, 2), "b": random(6)},
    ),
    "depthwise": ("y = Conv <group = 4> (x, W, b)", (4, 6, 5), {"W": random(8, 1, 3, 2), "b": random(8)}),
    "groups of a sequence": ("y = Conv <group = 2, pads = [2, 0]> (x, W)", (4, 7), {"W": random(6, 2, 3)}),
    "normalised": (
        """c = Conv <pads = [1, 1, 1, 1]> (x, W) n = BatchNormalization (c, g, t, m, v) r = Relu (n)
        y = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r)""",
        (2, 6, 6),
        {"W": random(4, 2, 3, 3), "t": STATISTICS["b"], **{name: STATISTICS[name] for name in "gmv"}},
    ),
    "residual": (
        """c = Conv <pads = [1, 1, 1, 1]> (x, W, b) t = Tanh (c) a = Add (t, x) d = Conv <group = 3> (a, V)
        s = Sigmoid (d) y = GlobalAveragePool (s)""",
        (3, 5, 5),
        {"W": random(3, 3, 3, 3), "b": random(3), "V": random(6, 1, 2, 2)},
    ),
    "average": (
        "c = Conv (x, W, b) y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], pads = [0, 0, 1, 1]> (c)",
        (3, 8, 8),
        {"W": random(3, 3, 3, 3), "b": random(3)},
    ),
    "two layers": (
        "p = MatMul (x, W) z = Add (p, b) h = Sigmoid (z) y = Gemm <transB = 1> (h, V, c)",
        (6,),
        {"W": random(6, 5), "b": random(5), "V": random(3, 5), "c": random(3)},
    ),
}


@pytest.mark.parametrize("family", BY_WEIGHTS)
def test_the_gradient_by_weights_is_the_slope(family: str) -> None:
    nodes, shape, weights = BY_WEIGHTS[family]
    assert_weight_gradients(graph(nodes, shape, weights), shape, [name for name in weights if name in "WbVc"])


def test_the_gradient_by_the_weights_of_gelu() -> None:
    """The reference implementation has Erf in single precision only, so the slope is worked out by hand."""
    from scipy.stats import norm

    proto = graph("z = MatMul (x, W) y = Gelu (z)", (6,), {"W": random(6, 4)}, 20)
    x, seed, weight = random(5, 6, seed=5), random(5, 4, seed=9), random(6, 4)
    _, found = by_weights(proto, ["W"], (6,))({"W": weight}, {"x": x}, seed)
    z = x @ weight
    assert_close(found["W"], x.T @ (seed * (norm.cdf(z) + z * norm.pdf(z))))


def test_weights_that_are_fed_need_not_be_those_of_the_file() -> None:
    subject = SUBJECTS["cnn"]()
    x = subject.samples(5)
    found = WeightGradients(subject.proto, ["W1", "b3"], "scores", {"x": subject.shape}, "cpu", 2, "the model")
    weights = {"W1": random(4, 2, 3, 3, seed=7), "b3": random(5, seed=7)}
    changed = onnx.ModelProto()
    changed.CopyFrom(subject.proto)
    for tensor in changed.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name], tensor.name))
    expected = run(changed, x)[0]
    assert_close(found.values(weights, {**x, "other": np.ones(1)}), expected)
    assert_close(found(weights, x, np.ones((5, 5)))[0], expected)
    assert found(weights, x, np.ones((5, 5)))[1]["b3"].tolist() == [5] * 5


def test_weights_without_a_gradient() -> None:
    weights = {"W": random(4, 4), "V": random(4, 4), "U": random(4, 4)}
    proto = graph("p = MatMul (x, W) [sign] s = Sign (p) y = MatMul (s, V) o = MatMul (x, U)", (4,), weights)
    with pytest.raises(NoGradient, match=r"^Sign 'sign' has no derivative$"):
        by_weights(proto, ["W"], (4,))
    for name in ("U", "x"):
        with pytest.raises(NoGradient, match=f"^'y' does not depend on '{name}'$"):
            by_weights(proto, [name], (4,))
    found = by_weights(proto, ["V"], (4,))
    x = random(3, 4)
    assert_close(
        found({"V": weights["V"]}, {"x": x}, np.ones((3, 4)))[1]["V"], run(proto, {"x": x}, "s")[0].T @ np.ones((3, 4))
    )
    with pytest.raises(DataError, match="no rows"):
        found({"V": weights["V"]}, {"x": x[:0]}, np.ones((0, 4)))


# -- no gradient ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ("s = Sign (x) y = Mul (s, two)", "Sign 's' has no derivative"),
        ("a = Tanh (x) [down] s = Floor (a) y = Mul (s, s)", "Floor 'down' has no derivative"),
        ("[best] i = ArgMax (x) y = Cast <to = 1> (i)", "ArgMax 'best' has no derivative"),
        ("[whole] i = Cast <to = 7> (x) y = Cast <to = 1> (i)", "Cast 'whole' has no derivative"),
        ("[above] c = Greater (x, two) y = Where (c, two, one)", "Greater 'above' has no derivative"),
        ("[size] s = Shape (x) y = Expand (two, s)", "'y' does not depend on 'x'"),
        ("n = Shape (x) r = Round (x) y = Reshape (r, n)", "Round 'r' has no derivative"),
        ("d = Hardmax (x) y = MatMul (d, W)", "Hardmax 'd' has no derivative"),
    ],
)
def test_a_gradient_that_is_zero_everywhere(nodes: str, why: str) -> None:
    weights = {"two": np.float32(2), "one": ONE, "W": random(4, 4)}
    proto = graph(nodes, (4,), {k: v for k, v in weights.items() if k in nodes})
    with pytest.raises(NoGradient) as caught:
        gradients_of(proto, "x", (4,), "y")
    assert caught.value.why == str(caught.value) == why


def test_a_gradient_flows_around_operators_without_one() -> None:
    proto = graph("f = Floor (x) a = Sign (x) m = Mul (a, x) y = Add (m, f)", (5,))
    x = random(3, 5)
    found = gradients_of(proto, "x", (5,), "y")({"x": x}, np.ones((3, 5)))[1]["x"]
    np.testing.assert_array_equal(found, np.sign(x))


def foreign(op_type: str) -> onnx.ModelProto:
    proto = build("g (float[N, 4] x) => (float[N, 4] y) { h = Tanh (x) y = Relu (h) }")
    proto.graph.node[0].CopyFrom(helper.make_node(op_type, ["x"], ["h"], name="own", domain="com.microsoft"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


@pytest.mark.parametrize("op_type", ["Gelu", "QuickGelu"])
def test_an_operator_of_another_domain(op_type: str) -> None:
    """Also where one of the same name is known."""
    with pytest.raises(NoGradient, match=f"^{op_type} 'own' of domain com.microsoft has no known derivative$"):
        gradients_of(foreign(op_type), "x", (4,), "y")


def test_an_operator_of_another_domain_beside_the_path() -> None:
    proto = build("g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y) { h = Tanh (z) y = Mul (x, h) }")
    proto.graph.node[0].CopyFrom(helper.make_node("QuickGelu", ["z"], ["h"], domain="com.microsoft"))
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    x = {"x": random(3, 4), "z": random(3, 4, seed=1)}
    found = Gradients(proto, ["x"], "y", {"x": (4,), "z": (4,)}, "cpu", 2, "the model")(x, np.ones((3, 4)))
    assert_close(found[1]["x"], run(proto, x, "h")[0])


@pytest.mark.parametrize(
    ("nodes", "why"),
    [
        ('[mirror] y = Pad <mode = "reflect"> (x, pads)', "^Pad 'mirror' cannot be differentiated: .*reflect"),
        ("[every] y = Slice (x, zero, four, one, two)", "^Slice 'every' cannot be differentiated: .*step"),
        ("y = Pad (x, less)", "^the derivative cannot be run: .*Expand"),
        ("i = Cast <to = 6> (x) y = ReduceSum (i, one)", "^'y' does not hold floating-point numbers$"),
    ],
)
def test_what_onnx_ad_or_onnxruntime_cannot_do(nodes: str, why: str) -> None:
    names = {"zero": 0, "one": 1, "two": 2, "four": 4}
    weights: dict[str, Array] = {k: np.array([v]) for k, v in names.items()}
    weights |= {"pads": np.array([0, 1, 0, 1]), "less": np.array([0, -1, 0, 0])}
    proto = graph(nodes, (4,), {k: v for k, v in weights.items() if k in nodes})
    with pytest.raises(NoGradient, match=why):
        gradients_of(proto, "x", (4,), "y")


def test_a_derivative_of_another_function_is_noticed() -> None:
    """onnx-ad takes a GRU without a bias for one that resets its state before the product, not behind it."""
    proto = graph(
        """t = Transpose <perm = [1, 0, 2]> (x) o, h = GRU <hidden_size = 3, linear_before_reset = 1> (t, W, R)
        y = Transpose <perm = [1, 0, 2]> (h)""",
        (5, 4),
        {"W": random(1, 9, 4), "R": random(1, 9, 3)},
    )
    with pytest.raises(NoGradient, match="that of another function"):
        gradients_of(proto, "x", (5, 4), "y")


def test_a_defect_of_onnx_ad_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(ctx: object, node: onnx.NodeProto, grads: object) -> None:
        raise KeyError("rank")

    monkeypatch.setitem(onnx_ad.rules.REVERSE, "Tanh", broken)
    with pytest.raises(NoGradient, match=r"^onnx-ad failed at Tanh 'act': 'rank'$"):
        gradients_of(graph("[act] y = Tanh (x)", (4,)), "x", (4,), "y")


def test_an_operator_without_a_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(onnx_ad.rules.REVERSE, "Tanh")
    with pytest.raises(NoGradient, match=r"^Tanh 'act' has no known derivative$"):
        gradients_of(graph("[act] y = Tanh (x)", (4,)), "x", (4,), "y")


def test_inputs_that_cannot_be_differentiated_by() -> None:
    shapes = {"x": (4,), "word": (), "z": (4,)}
    with pytest.raises(NoGradient, match="'word' is not of a floating-point type"):
        Gradients(two_inputs(), ["word"], "y", shapes, "cpu", 2, "the model")
    with pytest.raises(NoGradient, match=r"^'e' does not depend on 'x'$"):
        Gradients(two_inputs(), ["x"], "e", shapes, "cpu", 2, "the model")
