"""Graphs that are hard to cut: what crosses a cut, what is computed behind it, and what the graph is written with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Subject, attention, build, random, residual, run, save
from graph.operating import PLENTY, SIZE, W1, W2, W3, assert_close, assert_cuts, dense_subject
from onnx import helper, numpy_helper

from onnxcare.experiment import Experiment


def test_a_skip_connection_crosses_the_cut(tmp_path: Path) -> None:
    boundary = {"s": set(), "h": set(), "c1": {"h"}, "r1": {"h"}, "c2": {"h"}, "r2": set(), "g": set()}
    assert_cuts(residual(), tmp_path, boundary)


def test_the_input_itself_may_cross_the_cut(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = MatMul (x, W1) h = Relu (z) p = MatMul (h, W2) s = Add (p, x) y = MatMul (s, W3)",
        {"W1": W1, "W2": W2, "W3": W3},
    )
    assert_cuts(subject, tmp_path, {"z": {"x"}, "h": {"x"}, "p": {"x"}, "s": set()})


def test_tensors_of_any_rank_and_type_cross_the_cut(tmp_path: Path) -> None:
    proto = build(
        """g (double[N, 6] x) => (double[N, 4] y) <int64[1] last = {1}> {
            z = MatMul (x, W1)
            h = Relu (z)
            s = ReduceMax <axes = [1], keepdims = 0> (x)
            u = Unsqueeze (s, last)
            positive = Greater (u, zero)
            a = Add (h, u)
            w = Where (positive, a, h)
            y = MatMul (w, V)
        }""",
        {"W1": W1.astype(np.float64), "V": random(8, 4, dtype=np.float64), "zero": np.float64(1)},
    )
    assert_cuts(Subject(proto, "x", (6,), "y", np.float64), tmp_path, {"h": {"u", "positive"}})


def test_tokens_are_part_of_a_sample(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 3, 6] x) => (float[N, 4] y) {
            p = MatMul (x, W1)
            z = Add (p, b)
            h = Relu (z)
            q = MatMul (h, W2)
            m = ReduceMean <axes = [1], keepdims = 0> (q)
            y = Gemm (m, W3)
        }""",
        {"W1": W1, "b": random(8), "W2": W2, "W3": W3},
    )
    experiment = assert_cuts(Subject(proto, "x", (3, 6), "y"), tmp_path)
    assert [(site.tensor, site.axis, site.units) for site in experiment.sites] == [("h", -1, 8), ("m", -1, 6)]


def test_a_function_of_the_models_own(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 6] x) => (float[N, 4] y) {
            z = Gemm (x, W1)
            h = own.Relu (z)
            y = Gemm (h, V)
        }
        <domain: "own", opset_import: ["": 17]>
        Relu (a) => (c) { b = Neg (a) c = Abs (b) }"""
    )
    for name, values in (("W1", W1), ("V", random(8, 4))):
        proto.graph.initializer.append(numpy_helper.from_array(values, name))
    experiment = assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)
    assert [(site.tensor, site.writers) for site in experiment.sites] == [("h", ("Gemm#0",))]


def test_quantised_weights_are_weights(tmp_path: Path) -> None:
    subject = dense_subject(
        "v = DequantizeLinear (W, scale) z = MatMul (x, v) h = Relu (z) y = MatMul (h, V)",
        {"W": np.int8(W1 * 20), "scale": np.float32(0.05), "V": random(8, 4)},
        opset=19,
    )
    experiment = assert_cuts(subject, tmp_path)
    assert [layer.weight.name for layer in experiment.layers] == ["v", "V"]


def test_a_mask_that_is_an_output(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) r = Relu (z) h, mask = Dropout (r) y = Gemm (h, V)", {"W1": W1, "V": random(8, 4)}
    )
    subject.proto.graph.output.append(helper.make_tensor_value_info("mask", onnx.TensorProto.BOOL, ["N", 8]))
    experiment = assert_cuts(subject, tmp_path)
    assert [(site.tensor, site.refusal) for site in experiment.sites] == [("r", None)]


def test_a_shape_taken_from_the_input(tmp_path: Path) -> None:
    # What PyTorch writes for h.view(x.size(0), -1).
    proto = build(
        """g (float[N, 1, 4, 4] x) => (float[N, 4] y) <int64 zero = {0}, int64[1] rest = {-1}, int64[1] first = {0}> {
            c = Conv (x, W1, b1)
            h = Relu (c)
            shape = Shape (x)
            samples = Gather <axis = 0> (shape, zero)
            batch = Unsqueeze (samples, first)
            target = Concat <axis = 0> (batch, rest)
            f = Reshape (h, target)
            y = Gemm (f, W2)
        }""",
        {"W1": random(2, 1, 3, 3), "b1": random(2), "W2": random(8, 4)},
    )
    subject = Subject(proto, "x", (1, 4, 4), "y")
    experiment = assert_cuts(subject, tmp_path, {"h": {"x"}})
    sent = random(2, 2, 2, 2, seed=22)
    np.testing.assert_array_equal(experiment.between("h", "f", sent), sent.reshape(2, 8))


def test_shapes_in_floating_point(tmp_path: Path) -> None:
    # The scale of attention: the square root of a dimension.
    proto = build(
        """g (float[N, 3, 4] x) => (float[N, 4] y) <int64 last = {2}, int64[1] tokens = {1}> {
            q = MatMul (x, W1)
            k = MatMul (x, W2)
            shape = Shape (q)
            size = Gather <axis = 0> (shape, last)
            width = Cast <to = 1> (size)
            root = Sqrt (width)
            t = Transpose <perm = [0, 2, 1]> (k)
            products = MatMul (q, t)
            scaled = Div (products, root)
            weights = Softmax (scaled)
            v = MatMul (x, W3)
            mixed = MatMul (weights, v)
            pooled = ReduceMean <axes = [1], keepdims = 0> (mixed)
            y = MatMul (pooled, W4)
        }""",
        {"W1": random(4, 5), "W2": random(4, 5, seed=1), "W3": random(4, 6), "W4": random(6, 4)},
    )
    assert_cuts(Subject(proto, "x", (3, 4), "y"), tmp_path, {"k": {"q", "v"}, "v": {"weights"}})


def test_attention_has_a_site_of_heads_beside_that_of_features(tmp_path: Path) -> None:
    experiment = assert_cuts(attention(), tmp_path)
    by_reader = [(site.tensor, site.axis, site.units, site.kind) for site in experiment.sites if site.refusal is None]
    assert ("heads", 1, 2, "head") in by_reader
    assert ("joined", -1, 8, "neuron") in by_reader


def test_weights_that_are_computed_do_not_cross_the_cut(tmp_path: Path) -> None:
    # Weight normalisation, and a weight that is transposed before its use: neither has samples on axis 0.
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        squares = Mul (V, V)
        sums = ReduceSum <keepdims = 1> (squares, first)
        norms = Sqrt (sums)
        direction = Div (V, norms)
        p = MatMul (h, direction)
        t = Transpose (U)
        y = MatMul (p, t)""",
        {"W1": W1, "V": W2, "U": W3.T.copy(), "first": np.int64([0])},
    )
    experiment = assert_cuts(subject, tmp_path, {"z": set(), "h": set()})
    assert [layer.name for layer in experiment.layers] == ["MatMul#0", "MatMul#8"]


def test_tensors_made_for_every_sample_cross_the_cut(tmp_path: Path) -> None:
    # An initial state as large as the batch, and a mask computed from the input.
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        shape = Shape (x)
        samples = Gather <axis = 0> (shape, zero)
        batch = Unsqueeze (samples, first)
        size = Concat <axis = 0> (batch, width)
        state = ConstantOfShape <value = float[1] {0.5}> (size)
        some = ReduceMax <axes = [1], keepdims = 1> (x)
        mask = Greater (some, bound)
        a = Add (h, state)
        m = Where (mask, a, h)
        p = MatMul (m, W2)
        y = MatMul (p, W3)""",
        {
            "W1": W1,
            "W2": W2,
            "W3": W3,
            "zero": np.int64(0),
            "first": np.int64([0]),
            "width": np.int64([8]),
            "bound": np.float32(1),
        },
    )
    assert_cuts(subject, tmp_path, {"h": {"mask", "x"}})


def test_whole_numbers_computed_from_the_input_cross_the_cut(tmp_path: Path) -> None:
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        class = ArgMax <axis = 1, keepdims = 0> (x)
        shift = Gather (table, class)
        s = Add (h, shift)
        p = MatMul (s, W2)
        y = MatMul (p, W3)""",
        {"W1": W1, "W2": W2, "W3": W3, "table": random(6, 8)},
    )
    assert_cuts(subject, tmp_path)


def test_positions_in_the_whole_batch_are_counted_again(tmp_path: Path) -> None:
    # One token of every sample is picked by its position in the flattened batch, which a family makes longer.
    proto = build(
        """g (float[N, 3, 6] x) => (float[N, 4] y)
        <int64 zero = {0}, int64 one = {1}, int64 three = {3}, int64[1] last = {2}, int64[2] flat = {-1, 8}> {
            z = MatMul (x, W1)
            h = Relu (z)
            sums = ReduceSum <keepdims = 0> (x, last)
            best = ArgMax <axis = 1, keepdims = 0> (sums)
            shape = Shape (x)
            samples = Gather <axis = 0> (shape, zero)
            numbers = Range (zero, samples, one)
            starts = Mul (numbers, three)
            index = Add (best, starts)
            tokens = Reshape (h, flat)
            chosen = Gather (tokens, index)
            y = MatMul (chosen, V)
        }""",
        {"W1": W1, "V": random(8, 4)},
    )
    assert_cuts(Subject(proto, "x", (3, 6), "y"), tmp_path, {"h": {"sums", "x"}})


def test_tokens_as_inputs(tmp_path: Path) -> None:
    proto = build(
        """g (int64[N, 5] tokens) => (float[N, 4] y) <int64[1] last = {2}> {
            e = Gather (table, tokens)
            z = MatMul (e, W1)
            h = Relu (z)
            used = Greater (tokens, nothing)
            ones = Cast <to = 1> (used)
            weights = Unsqueeze (ones, last)
            kept = Mul (h, weights)
            m = ReduceMean <axes = [1], keepdims = 0> (kept)
            y = MatMul (m, V)
        }""",
        {"table": random(9, 6), "W1": W1, "nothing": np.int64(0), "V": random(8, 4)},
    )
    x = {"tokens": np.random.default_rng(3).integers(0, 9, (SIZE, 5))}
    experiment = Experiment(save(proto, tmp_path), "cpu", PLENTY, x)
    suffix = experiment.suffix("h", "affine")
    at = suffix.cache(x)
    assert set(at.boundary) == {"weights"}
    halved = suffix.affine(at, np.float32([1, 0.5]).reshape(2, 1, 1, 1), np.zeros((1, 1, 1, 1)))
    expected = run(proto, x)[0]
    assert_close(halved, np.stack([expected, expected / 2]))


IF = """g (float[N, 6] x) => (float[N, 4] y) {
    z = MatMul (x, W1)
    h = Relu (z)
    c = Greater (two, one)
    p = MatMul (h, W2)
    i = If (c) <
        then_branch = then () => (float[N, 6] t) { m = MatMul (h, V) t = Add (m, p) },
        else_branch = else () => (float[N, 6] e) { e = Identity (p) }
    >
    y = MatMul (i, W3)
}"""


def branching(two: float) -> Subject:
    weights = {"W1": W1, "W2": W2, "W3": W3, "V": W2 * 2, "one": np.float32(1), "two": np.float32(two)}
    return Subject(build(IF, weights), "x", (6,), "y")


@pytest.mark.parametrize("two", [0, 2])
def test_a_branch_that_captures_tensors(two: float, tmp_path: Path) -> None:
    assert_cuts(branching(two), tmp_path, {"z": set(), "h": set(), "p": {"h"}})


def test_a_loop_that_captures_tensors(tmp_path: Path) -> None:
    subject = dense_subject(
        """z = MatMul (x, W1)
        h = Relu (z)
        p = MatMul (h, W2)
        s = Loop (times, yes, p) <
            body = step (int64 i, bool c, float[N, 6] before) => (bool on, float[N, 6] after) {
                on = Identity (c)
                m = MatMul (h, V)
                scaled = Mul (m, tenth)
                after = Add (before, scaled)
            }
        >
        y = MatMul (s, W3)""",
        {
            "W1": W1,
            "W2": W2,
            "W3": W3,
            "V": W2 * 2,
            "times": np.int64(3),
            "yes": np.bool_(True),
            "tenth": np.float32(0.1),
        },
    )
    assert_cuts(subject, tmp_path, {"p": {"h"}})


def test_names_that_are_empty_or_hold_colons(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) h = Relu (z) p = Gemm (h, W2) r = Relu (p) y = Gemm (r, W3)", {"W1": W1, "W2": W2, "W3": W3}
    )
    # onnxruntime itself refuses a name that two nodes share.
    rename = {"z": "model/z:0", "h": "model/h:0", "p": "/p/out put", "W1": "kernel:0"}
    for node, name in zip(subject.proto.graph.node, ("fc", "", "", "a b", "fc:0"), strict=True):
        node.name = name
        node.input[:] = [rename.get(n, n) for n in node.input]
        node.output[:] = [rename.get(n, n) for n in node.output]
    subject.proto.graph.initializer[0].name = "kernel:0"
    experiment = assert_cuts(subject, tmp_path)
    assert [layer.name for layer in experiment.layers] == ["fc", "Gemm#2", "fc:0"]


def test_optional_inputs_left_out_and_outputs_not_used(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 6] x) => (float[N, 4] y) {
            z = Gemm (x, W1)
            c = Clip (z, , high)
            h, mask = Dropout (c)
            y = Gemm (h, W4)
        }""",
        {"W1": W1, "W4": random(8, 4), "high": np.float32(1), "unused": random(3)},
    )
    assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)


def test_an_activation_that_is_also_an_output(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) h = Relu (z) p = Gemm (h, W2) r = Relu (p) y = Gemm (r, W3)", {"W1": W1, "W2": W2, "W3": W3}
    )
    for name, size in (("z", 8), ("r", 6)):
        subject.proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size]))
    assert_cuts(subject, tmp_path)


def test_a_model_of_one_layer_can_be_cut_at_its_scores(tmp_path: Path) -> None:
    experiment = assert_cuts(dense_subject("y = Gemm (x, W3, b)", {"W3": W3, "b": random(4)}), tmp_path)
    assert experiment.sites == []


def test_weights_in_constant_nodes(tmp_path: Path) -> None:
    subject = dense_subject("z = Gemm (x, W1) h = Relu (z) y = Gemm (h, V)", {})
    for name, values in (("V", random(8, 4)), ("W1", W1)):
        node = helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values))
        subject.proto.graph.node.insert(0, node)
    assert_cuts(subject, tmp_path)


def test_several_inputs(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 6] a, float[N, 2] b) => (float[N, 4] y) {
            z = MatMul (a, W1)
            r = Relu (z)
            j = Concat <axis = 1> (r, b)
            y = MatMul (j, W4)
        }""",
        {"W1": W1, "W4": random(10, 4)},
    )
    x = {"a": random(SIZE, 6, seed=3), "b": random(SIZE, 2, seed=4)}
    experiment = Experiment(save(proto, tmp_path), "cpu", PLENTY, x)
    suffix = experiment.suffix("z", "affine")
    at = suffix.cache(x)
    assert set(at.boundary) == {"b"}
    keep = np.float32([1, 0.5]).reshape(2, 1, 1)
    expected = run(proto, x)[0]
    found = suffix.affine(at, keep, np.zeros((1, 1, 1)))
    assert_close(found[0], expected)
    halved = np.concatenate([np.maximum(x["a"] @ W1 * 0.5, 0), x["b"]], axis=1) @ random(10, 4)
    assert_close(found[1], halved)
    assert_close(experiment.tensors(["b", "z", "a"], x)[1], x["a"] @ W1)


WHOLE = """g (float[N, 2, 5, 4] x) => (float[N, 4] y) {{
    z = Conv (x, K)
    h = Relu (z)
    c = Conv <{attributes}> (h, L{bias})
    r = Relu (c)
    f = Flatten (r)
    y = MatMul (f, V)
}}"""


@pytest.mark.parametrize(
    ("attributes", "bias", "written"),
    [
        ("pads = [0, 0, 0, 0]", True, "Gemm"),
        ('auto_pad = "VALID"', False, "Gemm"),
        ("strides = [2, 3]", True, "Gemm"),
        ("pads = [1, 1, 0, 0]", True, "Conv"),
        ("group = 2", True, "Conv"),
    ],
)
def test_a_convolution_over_the_whole_map_runs_as_a_product(
    attributes: str, bias: bool, written: str, tmp_path: Path
) -> None:
    grouped = 2 if "group" in attributes else 1
    weights = {"K": random(6, 2, 3, 3), "L": random(4, 6 // grouped, 3, 2, seed=1), "b": random(4, seed=2)}
    positions = 4 if "pads = [1" in attributes else 1
    weights |= {"V": random(4 * positions, 4, seed=3)}
    if not bias:
        del weights["b"]
    proto = build(WHOLE.format(attributes=attributes, bias=", b" if bias else ""), weights)
    experiment = assert_cuts(Subject(proto, "x", (2, 5, 4), "y"), tmp_path)
    model = onnx.load_from_string(experiment.suffix("h", "affine").part.__getstate__()[0])
    assert written in [node.op_type for node in model.graph.node]
    assert (written == "Conv") == ("Conv" in [node.op_type for node in model.graph.node])
