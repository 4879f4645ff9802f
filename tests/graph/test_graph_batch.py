"""Samples on axis 0: batches fixed in the file, rows that mix, and tensors that hold something else there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Array, Subject, build, random, run, save, with_tensor_fed
from graph.operating import PLENTY, SIZE, W1, W2, W3, assert_close, assert_cuts, dense_subject, operate, original
from onnx import helper

from onnxcare.errors import ModelError, SpecError
from onnxcare.experiment import Experiment
from onnxcare.graph.batch import put_samples_first
from onnxcare.graph.model import load_model
from onnxcare.runtime import Session

# -- samples that do not lie on axis 0 -----------------------------------------------------------


def test_tokens_merged_into_the_batch_are_refused_by_name(tmp_path: Path) -> None:
    # How tf2onnx writes a dense layer over tokens.
    proto = build(
        """g (float[N, 3, 6] x) => (float[N, 4] y)
        <int64[2] merged = {-1, 6}, int64[3] apart = {-1, 3, 8}, int64[1] one = {1}> {
            [first] f = MatMul (x, W0)
            e = Relu (f)
            m = Reshape (e, merged)
            [tokens] z = MatMul (m, W1)
            r = Relu (z)
            h = Reshape (r, apart)
            s = ReduceSum <keepdims = 0> (h, one)
            [last] y = MatMul (s, V)
        }""",
        {"W0": random(6, 6), "W1": W1, "V": random(8, 4)},
    )
    subject = Subject(proto, "x", (3, 6), "y")
    experiment = operate(subject, tmp_path)
    reason = "axis 0 of 'm' does not hold the samples"
    assert {layer.name: layer.refusal for layer in experiment.layers} == {"first": None, "tokens": reason, "last": None}
    assert {site.tensor: site.refusal for site in experiment.sites} == {"e": f"layer tokens: {reason}", "s": None}
    with pytest.raises(ModelError, match="axis 0 of 'z' does not hold the samples"):
        experiment.suffix("z", "span").cache(subject.samples(3))


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_tokens_in_front_of_the_samples_are_refused_by_name(tokens: int, tmp_path: Path) -> None:
    # [tokens, samples, features] is what recurrent networks have; no number of tokens may hide it.
    proto = build(
        f"""g (float[N, {tokens}, 6] x) => (float[N, 4] y) <int64[1] zero = {{0}}> {{
            m = Transpose <perm = [1, 0, 2]> (x)
            [tokens] z = MatMul (m, W1)
            r = Relu (z)
            [again] q = MatMul (r, W2)
            s = ReduceSum <keepdims = 0> (q, zero)
            [last] y = MatMul (s, V)
        }}""",
        {"W1": W1, "W2": W2, "V": random(6, 4)},
    )
    experiment = operate(Subject(proto, "x", (tokens, 6), "y"), tmp_path)
    assert {layer.name: layer.refusal for layer in experiment.layers} == {
        "tokens": "axis 0 of 'm' does not hold the samples",
        "again": "axis 0 of 'r' does not hold the samples",
        "last": None,
    }
    assert [site.tensor for site in experiment.sites] == ["s"]


def test_layers_of_another_head_are_set_aside(tmp_path: Path) -> None:
    subject = dense_subject(
        """[first] z = Gemm (x, W1) h = Relu (z) [second] y = Gemm (h, W2)
        [other] a = Gemm (x, W3) r = Relu (a) [last] o = Gemm (r, W4)""",
        {"W1": W1, "W2": random(8, 4), "W3": W1 * 2, "W4": random(8, 4, seed=1)},
    )
    subject.proto.graph.output.append(helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, ["N", 4]))
    experiment = operate(subject, tmp_path)
    assert [site.tensor for site in experiment.sites] == ["h"]
    unread = "'y' does not depend on it"
    refusals = {layer.name: layer.refusal for layer in experiment.layers}
    assert refusals == {"first": None, "second": None, "other": unread, "last": unread}


# -- the batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 3])
def test_a_fixed_batch_is_relaxed_in_the_copy_alone(size: int, tmp_path: Path) -> None:
    proto = build(
        f"""g (float[{size}, 2, 3] x) => (float[{size}, 4] y)
        <int64[2] flat = {{{size}, -1}}, int64[2] wide = {{{size}, 8}}> {{
            f = Reshape (x, flat)
            z = Gemm (f, W1)
            r = Relu (z)
            g = Reshape (r, wide)
            y = Gemm (g, V)
        }}""",
        {"W1": W1, "V": random(8, 4)},
    )
    model = save(proto, tmp_path)
    before = model.path.read_bytes()
    x = {"x": random(7, 2, 3, seed=3)}
    experiment = Experiment(model, "cpu", PLENTY, x)
    assert_close(experiment.scores(x), np.maximum(x["x"].reshape(7, 6) @ W1, 0) @ random(8, 4))
    suffix = experiment.suffix("r", "affine")
    at = suffix.cache(x)
    assert_close(suffix.affine(at, np.ones((4, 1, 1)), np.ones((1, 1, 1))), np.stack([experiment.scores(x)] * 4))
    assert model.path.read_bytes() == before == model.data
    assert model.proto == onnx.ModelProto.FromString(before)


FIXED = """g (float[1, 6] x) => (float[1, 4] y) {{ z = Gemm (x, W1) h = Relu (z) {nodes} y = Gemm (f, V) }}"""


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("c = Constant <value_ints = [1, -1]> () f = Reshape (h, c)", {}),
        ("c = Constant <value = int64[2] {1, -1}> () f = Reshape (h, c)", {}),
        ("f = Reshape <allowzero = 1> (h, c)", {"c": np.int64([1, -1])}),
        ("f = Reshape (h, c)", {"c": np.int64([-1, 8])}),
        ("c = Identity (d) f = Reshape (h, c)", {"d": np.int64([1, -1])}),
        ("b = Reshape (k, c) f = Add (h, b)", {"k": random(8), "c": np.int64([1, 8])}),
        ("b = Reshape (k, c) a = Add (h, b) f = Reshape (a, c)", {"k": random(8), "c": np.int64([1, -1])}),
        ("f = Add (h, b)", {"b": random(1, 8)}),
    ],
)
def test_reshapes_with_the_batch_in_their_target(nodes: str, weights: dict[str, Array], tmp_path: Path) -> None:
    proto = build(FIXED.format(nodes=nodes), {"W1": W1, "V": random(8, 4)} | weights)
    assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)


def test_shapes_declared_in_branches_hold_the_batch_as_well(tmp_path: Path) -> None:
    nodes = """f = If (c) <
        then_branch = then () => (float[1, 8] t) { t = Relu (h) },
        else_branch = else () => (float[1, 8] e) <float[1, 8] d> {
            e = If (c) <
                then_branch = deep () => (float[1, 8] i) { i = Relu (h) },
                else_branch = deeper () => (float[1, 8] j) { d = Tanh (h) j = Neg (d) }
            >
        }
    >"""
    proto = build(FIXED.format(nodes=nodes), {"W1": W1, "V": random(8, 4), "c": np.bool_(False)})
    assert_cuts(Subject(proto, "x", (6,), "y"), tmp_path)


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("m = ReduceMax <keepdims = 1> (h) f = Sub (h, m)", {}),
        ("r = Reshape (h, c) f = Unsqueeze (r, first)", {"c": np.int64([8]), "first": np.int64([0])}),
        ("t = Squeeze (h, c) f = Unsqueeze (t, c)", {"c": np.int64([0])}),
        ("s = Softmax <axis = 0> (h) f = Add (s, h)", {}),
        ("t = Transpose (h) m = MatMul (h, t) f = Mul (h, m)", {}),
    ],
)
def test_rows_that_mix_cannot_be_relaxed(nodes: str, weights: dict[str, Array], tmp_path: Path) -> None:
    proto = build(FIXED.format(nodes=nodes), {"W1": W1, "V": random(8, 4)} | weights)
    with pytest.raises(ModelError, match=r"model\.onnx: .*batch"):
        operate(Subject(proto, "x", (6,), "y"), tmp_path)


def test_a_computed_target_that_fits_by_chance_is_refused(tmp_path: Path) -> None:
    # With as many rows as the file fixes, the target [3, -1] would look as if it were free.
    proto = build(
        """g (float[3, 6] x) => (float[3, 4] y) {
            z = Gemm (x, W1)
            target = Concat <axis = 0> (three, rest)
            h = Reshape (z, target)
            y = Gemm (h, V)
        }""",
        {"W1": W1, "V": random(8, 4), "three": np.int64([3]), "rest": np.int64([-1])},
    )
    with pytest.raises(ModelError, match=r"model\.onnx: its batch size is fixed in a way that cannot be relaxed"):
        operate(Subject(proto, "x", (6,), "y"), tmp_path)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rows", [1, 3, 7])
@pytest.mark.parametrize("per_run", [1, 2, 3, 1024])
def test_rows_of_a_fixed_batch_are_padded(size: int, rows: int, per_run: int, tmp_path: Path) -> None:
    proto = build(f"g (float[{size}, 6] x) => (float[{size}, 4] y) {{ y = Gemm (x, W) }}", {"W": W3})
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    x = random(rows, 6, seed=3)
    (found,) = Session(path).run_rows({"x": x}, rows_per_run=per_run)
    assert_close(found, x @ W3)


def test_rows_that_mix_unless_they_are_as_many_as_the_file_fixes_are_refused(tmp_path: Path) -> None:
    proto = build(
        """g (float[3, 6] x) => (float[3, 4] y) <int64[2] apart = {-1, 24}> {
            z = Gemm (x, W1)
            target = Concat <axis = 0> (three, rest)
            h = Reshape (z, target)
            s = Softmax <axis = 1> (h)
            b = Reshape (s, apart)
            y = Gemm (b, V)
        }""",
        {"W1": random(6, 24), "V": random(24, 4), "three": np.int64([3]), "rest": np.int64([-1])},
    )
    with pytest.raises(ModelError, match="do not answer as single rows do"):
        operate(Subject(proto, "x", (6,), "y"), tmp_path)


def test_rows_that_mix_in_a_free_batch_are_refused_as_well(tmp_path: Path) -> None:
    subject = dense_subject(
        "z = Gemm (x, W1) m = ReduceMax <keepdims = 1> (z) f = Sub (z, m) y = Gemm (f, V)",
        {"W1": W1, "V": random(8, 4)},
    )
    with pytest.raises(ModelError, match=r"model\.onnx: several rows in one run do not answer as single rows do"):
        operate(subject, tmp_path)


def test_a_free_batch_is_not_blamed_for_what_else_fails(tmp_path: Path) -> None:
    # onnxruntime takes an empty list, onnx-graphsurgeon cannot write one.
    subject = dense_subject(
        "z = Gemm (x, W1) h = Unsqueeze (z) y = Gemm (h, V)", {"W1": W1, "V": random(8, 4)}, opset=11
    )
    subject.proto.graph.node[1].attribute.add(name="axes", type=onnx.AttributeProto.INTS)
    with pytest.raises(ModelError, match=r"^[^:]*model\.onnx: the graph cannot be taken apart: .*axes"):
        operate(subject, tmp_path)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_few_probe_rows_are_enough(rows: int, tmp_path: Path) -> None:
    subject = SUBJECTS["acas"]()
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", PLENTY, subject.samples(rows))
    assert_close(experiment.scores(subject.samples(4)), original(subject, subject.samples(4), "costs")[0])


def test_an_old_operator_set_is_refused(tmp_path: Path) -> None:
    subject = dense_subject("y = MatMul (x, W3)", {"W3": W3}, opset=6)
    with pytest.raises(ModelError, match="opset 6; experiments need opset 7"):
        operate(subject, tmp_path)


def test_the_first_operator_set_that_broadcasts_will_do(tmp_path: Path) -> None:
    nodes = "a = Gemm (x, W1, b) h = Relu (a) q = Gemm (h, V, d) s = Relu (x) t = Gemm (s, U, d) y = Sum (q, t)"
    weights = {"W1": W1, "b": random(8), "V": random(8, 4), "d": random(4), "U": random(6, 4)}
    assert_cuts(dense_subject(nodes, weights, opset=7), tmp_path)


def test_external_data_is_taken_inside(tmp_path: Path) -> None:
    subject = SUBJECTS["mlp"]()
    x = subject.samples(SIZE)
    expected = run(subject.proto, x)[0]
    path = tmp_path / "model.onnx"
    onnx.save(subject.proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    experiment = Experiment(load_model(path), "cpu", PLENTY, x)
    assert len(experiment.model.external_files()) == 1
    assert_close(experiment.scores(x), expected)
    suffix = experiment.suffix("h1", "affine")
    assert_close(suffix.affine(suffix.cache(x), np.ones((2, 1, 1)), np.ones((1, 1, 1)))[1], expected)


# -- inputs whose samples lie elsewhere ----------------------------------------------------------


def remembering() -> onnx.ModelProto:
    """Samples on axis 1 of `state`, none in `rate`; both are read in front of the site, behind it and in branches."""
    branch = build(
        "g () => (float[N, 4] a) { s = ReduceSum <keepdims = 0> (state, zero) t = MatMul (s, W2) a = Mul (t, rate) }"
    ).graph
    other = build("g () => (float[N, 4] b) { b = Mul (q, also) }").graph
    proto = build(
        """g (float[N, 6] x, float[2, N, 8] state, float rate, bool which) => (float[N, 4] y, float[2, N, 8] next)
        <float also = {3}, int64[1] zero = {0}> {
            f = MatMul (x, W1)
            m = ReduceMax <axes = [0], keepdims = 0> (state)
            e = Add (f, m)
            h = Relu (e)
            q = MatMul (h, V)
            y = Identity (q)
            next = Mul (state, rate)
        }""",
        {"W1": W1, "V": random(8, 4), "W2": random(8, 4, seed=5)},
    )
    choice = helper.make_node("If", ["which"], ["chosen"], name="choice", then_branch=branch, else_branch=other)
    proto.graph.node[5].CopyFrom(helper.make_node("Add", ["q", "chosen"], ["y"], name="sum"))
    proto.graph.node.insert(5, choice)
    return proto


AXES = {"state": 1, "rate": None, "which": None}


def remembered(size: int = SIZE) -> dict[str, Array]:
    """Inputs as experiments take them."""
    rate, which = np.full(size, 1.5, np.float32), np.ones(size, bool)
    return {"x": random(size, 6), "state": random(size, 2, 8, seed=2), "rate": rate, "which": which}


def given(rows: dict[str, Array], which: bool = True) -> dict[str, Array]:
    """The same as the file takes them."""
    state = np.stack([rows["state"][:, 0], rows["state"][:, 1]])
    return {"x": rows["x"], "state": state, "rate": np.array(rows["rate"][0]), "which": np.array(which)}


@pytest.mark.parametrize("which", [True, False])
def test_samples_are_put_first(which: bool) -> None:
    proto, rows = remembering(), remembered()
    expected = run(proto, given(rows, which))
    put_samples_first(proto, AXES)
    rows["which"][:] = which
    for found, wanted in zip(run(proto, rows), expected, strict=True):
        assert_close(found, wanted)
    shapes = {info.name: info.type.tensor_type.shape.dim for info in proto.graph.input}
    assert [dim.dim_value for dim in shapes["state"]] == [0, 2, 8] and len(shapes["rate"]) == 1


def test_a_session_lays_samples_out_as_the_file_takes_them() -> None:
    proto, rows = remembering(), remembered()
    session = Session(proto, axes=AXES)
    assert [shape for _, _, shape in session.inputs] == [("N", 6), ("N", 2, 8), (None,), (None,)]
    for found in (session.run(rows)[0], session.run_rows(rows, ["y"], rows_per_run=2)[0]):
        assert_close(found, run(proto, given(rows))[0])


def test_interventions_on_a_model_with_a_memory(tmp_path: Path) -> None:
    proto, rows = remembering(), remembered()
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    experiment = Experiment(load_model(path, AXES), "cpu", PLENTY, rows, "y")
    (site,) = experiment.sites
    suffix = experiment.suffix(site.tensor, "affine")
    keep, reference = np.ones((2, 1, 8), np.float32), np.full((1, 1, 8), 2.5, np.float32)
    keep[0, 0, 1] = keep[1, 0, 6] = 0
    found = suffix.affine(suffix.cache(rows), keep, reference)
    for member, unit in enumerate((1, 6)):
        (h,) = run(proto, given(rows), site.tensor)
        h[:, unit] = 2.5
        fed = with_tensor_fed(proto, site.tensor)
        assert_close(found[member], run(fed, given(rows) | {site.tensor: h}, "y")[0])


@pytest.mark.parametrize(
    ("axes", "words"), [({"stat": 1}, r"sample_axes\.stat: .*did you mean 'state'"), ({"x": 2}, "axis 2")]
)
def test_axes_that_are_not_there(axes: dict[str, int | None], words: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(remembering().SerializeToString())
    with pytest.raises(SpecError, match=words):
        load_model(path, axes)
