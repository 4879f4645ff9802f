"""The experiment copy and its parts; interventions on it are tested with experiments."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Array, acas, build, cnn, keras, mlp, random, residual, run, save

from onnxcare.decision import Final
from onnxcare.errors import ModelError
from onnxcare.graph import surgery
from onnxcare.graph.model import Model, Signature
from onnxcare.graph.working import experiment_form
from onnxcare.runtime import Session

WHAT = "model.onnx"


def held(proto: onnx.ModelProto) -> Model:
    """A model whose file does not matter."""
    inputs = tuple(Signature(name, None, shape) for name, _, shape in Session(proto, optimise=False).inputs)
    return Model(Path(WHAT), proto, "", inputs, ())


def feeds(part: onnx.ModelProto, values: Mapping[str, Array]) -> dict[str, Array]:
    return {info.name: values[info.name] for info in part.graph.input}


# -- the copy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_copy_leaves_the_model_alone(name: str) -> None:
    model = held(SUBJECTS[name]().proto)
    before = model.proto.SerializeToString()
    copy = experiment_form(model).proto
    surgery.expose(copy, [model.proto.graph.node[1].output[0]], WHAT)
    assert model.proto.SerializeToString() == before


def test_a_free_batch_stays_as_it_is() -> None:
    copy = experiment_form(held(mlp().proto)).proto
    assert [d.dim_param for d in copy.graph.input[0].type.tensor_type.shape.dim][:1] == ["N"]


def test_a_fixed_batch_is_free_in_the_copy_and_its_weights_are_not_touched() -> None:
    subject = acas()
    copy = experiment_form(held(subject.proto)).proto
    first = {info.name: info.type.tensor_type.shape.dim[0] for info in copy.graph.input}
    assert first["input"].dim_param
    assert [first[name].dim_value for name in ("W1", "b1", "mean")] == [5, 8, 1]
    assert copy.graph.output[0].type.tensor_type.shape.dim[0].dim_param
    assert list(copy.graph.initializer) == list(subject.proto.graph.initializer)


def test_stale_shapes_inside_do_not_survive_a_relaxed_batch() -> None:
    subject = acas()
    model = held(onnx.shape_inference.infer_shapes(subject.proto))
    stale = {info.name: info.type.tensor_type.shape.dim[0].dim_value for info in model.proto.graph.value_info}
    assert stale["h1"] == 1
    fresh = {i.name: i.type.tensor_type.shape.dim for i in experiment_form(model).proto.graph.value_info}
    assert not fresh["h1"][0].HasField("dim_value")
    assert fresh["h1"][1].dim_value == 8


@pytest.mark.parametrize(
    ("target", "relaxed"),
    [
        ([1, -1], [0, -1]),
        ([1, 8], [-1, 8]),
        ([1, 2, 4], [-1, 2, 4]),
        ([1, 0], [-1, 0]),
        ([2, 4], None),
        ([-1, 8], None),
    ],
)
def test_targets_of_reshapes(target: list[int], relaxed: list[int] | None) -> None:
    text = "g (float[1, 8] x) => (float[k] y) { r = Reshape (x, target) y = Flatten (r) }"
    proto = build(text, {"target": np.int64(target)})
    proto.graph.node.pop()
    proto.graph.output[0].name = "r"
    proto.graph.output[0].ClearField("type")
    copy = experiment_form(held(proto)).proto
    name = copy.graph.node[0].input[1]
    used = next(onnx.numpy_helper.to_array(t) for t in copy.graph.initializer if t.name == name)
    assert used.tolist() == (relaxed or target)
    kept = next(onnx.numpy_helper.to_array(t) for t in copy.graph.initializer if t.name == "target")
    assert kept.tolist() == target


def test_a_target_shared_by_two_reshapes_is_relaxed_where_activations_are_reshaped() -> None:
    proto = build(
        """g (float[1, 8] x) => (float[1, 8] y) {
            a = Reshape (x, target) b = Reshape (w, target) s = Add (a, b) y = Reshape (s, target)
        }""",
        {"target": np.int64([1, 8]), "w": random(8)},
    )
    copy = experiment_form(held(proto)).proto
    assert [node.input[1] == "target" for node in copy.graph.node if node.op_type == "Reshape"] == [False, True, False]
    x = random(3, 8, seed=5)
    np.testing.assert_allclose(run(copy, {"x": x})[0], x + random(8), rtol=1e-6)


# -- parts ---------------------------------------------------------------------------------------


def test_exposed_tensors_come_in_the_order_asked_for() -> None:
    subject = cnn()
    copy = experiment_form(held(subject.proto)).proto
    names = ["scores", "q1", "r2"]
    x = subject.samples(3)
    part = surgery.expose(copy, names, WHAT)
    for found, expected in zip(run(part, x), run(subject.proto, x, *names), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_an_exposed_part_holds_no_more_than_it_needs() -> None:
    part = surgery.expose(experiment_form(held(cnn().proto)).proto, ["q1"], WHAT)
    assert [node.op_type for node in part.graph.node] == ["Conv", "BatchNormalization", "Relu", "MaxPool"]
    assert "W3" not in {tensor.name for tensor in part.graph.initializer}


@pytest.mark.parametrize(
    ("make", "tensor", "boundary"),
    [
        (mlp, "h1", ()),
        (cnn, "q1", ()),
        (residual, "r1", ("h",)),
        (residual, "h", ()),
        (keras, "q1", ()),
        (keras, "f", ()),
        (acas, "f", ()),
    ],
)
def test_what_crosses_a_cut(make, tensor: str, boundary: tuple[str, ...]) -> None:  # type: ignore[no-untyped-def]
    subject = make()
    copy = experiment_form(held(subject.proto)).proto
    shape = run(subject.proto, subject.samples(1), tensor)[0].shape[1:]
    cut = surgery.cut(copy, tensor, subject.logits, shape, "affine", WHAT)
    assert (cut.tensor, cut.boundary) == (tensor, boundary)
    names = {info.name for info in cut.suffix.graph.input}
    crossing = {f(b) for b in boundary for f in (surgery.boundary_input, surgery.boundary_shape, surgery.merged_shape)}
    assert names == {surgery.BASE, surgery.KEEP, surgery.REFERENCE} | crossing


def test_scores_that_do_not_depend_on_the_cut_are_an_error() -> None:
    copy = experiment_form(held(mlp().proto)).proto
    with pytest.raises(ModelError, match="'h1' does not depend on 'scores'"):
        surgery.cut(copy, "scores", "h1", (4,), "affine", WHAT)


def test_upstream_follows_branches() -> None:
    proto = build(
        """g (float[N, 6] x, bool c) => (float[N, 6] y) {
            a = Relu (x) b = Neg (x) d = Exp (x) o = Abs (b)
            y = If (c) <
                then_branch = then () => (float[N, 6] t) { t = Neg (a) },
                else_branch = else () => (float[N, 6] e) {
                    e = If (c) <
                        then_branch = inner () => (float[N, 6] i) { i = Identity (b) },
                        else_branch = other () => (float[N, 6] j) { j = Identity (d) }
                    >
                }
            >
        }"""
    )
    assert surgery.upstream(surgery.import_graph(proto, WHAT), "y") == {"y", "c", "a", "b", "d", "x"}


@pytest.mark.parametrize(
    ("nodes", "finals", "found"),
    [
        ("z = Relu (x) y = Softmax (z)", ("Softmax",), ("z", "Softmax")),
        ("z = Relu (x) y = LogSoftmax (z)", ("Softmax",), ("y", "")),
        ("z = Softmax (x) y = Relu (z)", ("Softmax",), ("y", "")),
        ("y = Softmax (x)", ("Softmax",), ("x", "Softmax")),
        ("z = Relu (x) s = Softmax (z) t = Identity (s) y = Identity (t)", ("Softmax",), ("z", "Softmax")),
        ("z = Relu (x) y = Identity (z)", ("Softmax",), ("y", "")),
        ("z = Relu (x) y = Softmax (z)", (), ("y", "")),
        ("z = Relu (x) y = Softmax (z)", ("Sigmoid",), ("y", "")),
        ("z = Relu (x) y = Sigmoid (z)", ("Sigmoid",), ("z", "Sigmoid")),
        ("z = Relu (x) y = Sigmoid (z)", ("Softmax",), ("y", "")),
    ],
)
def test_the_logits_stand_in_front_of_a_final_operator(
    nodes: str, finals: tuple[Final, ...], found: tuple[str, str]
) -> None:
    proto = build(f"g (float[N, 6] x) => (float[N, 6] y) {{ {nodes} }}")
    assert surgery.find_logits(surgery.import_graph(proto, WHAT), "y", finals) == found


def test_between_computes_from_a_tensor_on() -> None:
    subject = keras()
    copy = experiment_form(held(subject.proto)).proto
    part = surgery.between(copy, "q1", "f", WHAT)
    sent = random(2, 3, 3, 3)
    values = subject.samples(2) | {"q1": sent}
    np.testing.assert_array_equal(run(part, feeds(part, values))[0], sent.transpose(0, 2, 3, 1).reshape(2, 27))


# -- onnx-graphsurgeon ---------------------------------------------------------------------------


def test_what_graphsurgeon_cannot_carry_is_said_with_the_models_name() -> None:
    proto = build("g (float[N, 6] x) => (float[N, 6] y) { y = Relu (x) }")
    proto.graph.node[0].attribute.add(name="nothing", type=onnx.AttributeProto.INTS)
    with pytest.raises(ModelError, match=r"model\.onnx: the graph cannot be taken apart: .*nothing"):
        surgery.expose(proto, ["y"], WHAT)


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 4] x) => (float[N, 4] y, int64[N] label) {
            y = Relu (x)
            label = ArgMax <axis = 1, keepdims = 0> (y)
            maps = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1, 2, 3]> (y)
        }"""
    )
    maps = onnx.helper.make_map_type_proto(onnx.TensorProto.INT64, onnx.helper.make_tensor_type_proto(1, []))
    proto.graph.output.append(onnx.helper.make_value_info("maps", onnx.helper.make_sequence_type_proto(maps)))
    copy = experiment_form(save(proto, tmp_path)).proto
    surgery.expose(copy, ["y"], WHAT)
    surgery.cut(copy, "y", "y", (4,), "span", WHAT)
    assert capfd.readouterr() == ("", "")
