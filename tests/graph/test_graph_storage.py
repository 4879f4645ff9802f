"""However a file holds weights, they are found, read, searched as numbers, and written the way the file holds them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Array, build, layers_of, random, run, save
from graph.stored import STORED, B, W
from onnx import helper, numpy_helper

from onnxcare.errors import ModelError
from onnxcare.experiment import Experiment
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import Model
from onnxcare.graph.patch import Patch
from onnxcare.graph.storage import Source
from onnxcare.graph.working import experiment_form, working_form

NEW = random(6, 4, seed=8) * np.float32(0.9)


def x_of(proto: onnx.ModelProto, rows: int = 5) -> dict[str, Array]:
    kind = proto.graph.input[0].type.tensor_type.elem_type
    return {"x": random(rows, 6, seed=2).astype(onnx.helper.tensor_dtype_to_np_dtype(kind))}


def the_layer(model: Model) -> Layer:
    (layer,) = working_form(model).layers
    assert layer.refusal is None
    return layer


def matrix(layer: Layer, values: Array) -> Array:
    """Return [6, 4] values as the layer holds them."""
    return values.T if layer.transposed else values


def close(found: Array, expected: Array, tolerance: float) -> None:
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("name", STORED)
def test_the_working_form_answers_as_the_file_does(name: str, tmp_path: Path) -> None:
    stored = STORED[name]()
    model = save(stored.proto, tmp_path)
    x = x_of(stored.proto)
    expected = x["x"].astype(np.float32) @ stored.read(stored.write(W)) + B
    close(run(stored.proto, x)[0].astype(np.float32), expected, stored.tolerance)
    experiment = Experiment(model, "cpu", 1 << 26, x)
    close(experiment.scores(x), expected, stored.tolerance)
    layer = the_layer(model)
    held = layer.weight.storage.read(Source(model.proto, tmp_path))
    np.testing.assert_allclose(matrix(layer, held), stored.read(stored.write(W)), rtol=1e-6)


@pytest.mark.parametrize("name", STORED)
def test_new_values_are_rounded_as_the_file_holds_them(name: str, tmp_path: Path) -> None:
    stored = STORED[name]()
    model = save(stored.proto, tmp_path)
    layer = the_layer(model)
    new = matrix(layer, NEW).astype(layer.weight.dtype)
    data = Patch({layer.weight: new}).apply(model)
    kept = layer.weight.storage.rounded(Source(model.proto, tmp_path), new)
    expected = stored.read(stored.write(NEW))
    np.testing.assert_allclose(matrix(layer, kept), expected, rtol=1e-6)
    x = x_of(stored.proto)
    close(run(data, x)[0].astype(np.float32), x["x"].astype(np.float32) @ expected + B, stored.tolerance)
    onnx.checker.check_model(onnx.ModelProto.FromString(data))


@pytest.mark.parametrize("name", STORED)
def test_only_the_tensor_that_holds_the_weights_is_another_one(name: str, tmp_path: Path) -> None:
    stored = STORED[name]()
    model = save(stored.proto, tmp_path)
    layer = the_layer(model)
    assert layer.weight.storage.name == stored.tensor
    data = Patch({layer.weight: matrix(layer, NEW).astype(layer.weight.dtype)}).apply(model)
    restored = layer.weight.storage
    path, before = restored.path, Source(model.proto, tmp_path).message(restored.path)
    after = onnx.ModelProto.FromString(data)
    assert Source(after, tmp_path).message(path) != before
    Source(after, tmp_path).message(path).CopyFrom(before)
    assert after == model.proto


@pytest.mark.parametrize("name", STORED)
def test_what_the_file_holds_is_written_back_as_it_was(name: str, tmp_path: Path) -> None:
    stored = STORED[name]()
    model = save(stored.proto, tmp_path)
    storage = the_layer(model).weight.storage
    source = Source(model.proto, tmp_path)
    np.testing.assert_array_equal(storage.rounded(source, storage.read(source)), storage.read(source))


def test_values_beyond_the_range_become_its_ends(tmp_path: Path) -> None:
    model = save(STORED["per_tensor"]().proto, tmp_path)
    layer = the_layer(model)
    kept = layer.weight.storage.rounded(Source(model.proto, tmp_path), np.full((6, 4), -9.0, np.float32))
    np.testing.assert_allclose(kept, -127 * 0.02, rtol=1e-6)


@pytest.mark.parametrize("name", ["half", "bfloat16_cast", "linear_regressor"])
def test_what_overflows_is_refused(name: str, tmp_path: Path) -> None:
    model = save(STORED[name]().proto, tmp_path)
    layer = the_layer(model)
    with pytest.raises(ModelError, match="the repair does not fit into"):
        Patch({layer.weight: np.full(layer.weight.shape, 1e39)}).apply(model)


def test_a_function_called_twice_ties_its_weights(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["": 19, "own": 1]>
        g (float[N, 4] x) => (float[N, 4] y) { h = own.Twist (x) y = own.Twist (h) }
        <domain: "own", opset_import: ["": 19]>
        Twist (x) => (y) { W = Constant () [fc] y = MatMul (x, W) }"""
    )
    proto.functions[0].node[0].attribute.append(helper.make_attribute("value", numpy_helper.from_array(random(4, 4))))
    layers = working_form(save(proto, tmp_path)).layers
    assert len(layers) == 2
    assert all("is also used by" in (layer.refusal or "") for layer in layers)


def test_quantised_weights_that_two_nodes_scale_are_tied(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 4] x) => (float[N, 4] y) {
            v = DequantizeLinear (W, s) h = MatMul (x, v) w = DequantizeLinear (W, s) y = MatMul (h, w) }""",
        {"W": np.int8(random(4, 4) * 40), "s": np.float32(0.02)},
    )
    layers = working_form(save(proto, tmp_path)).layers
    assert [layer.refusal for layer in layers] == [
        "its weight 'v' is also used by MatMul#3",
        "its weight 'w' is also used by MatMul#1",
    ]


def test_one_value_for_all_is_refused(tmp_path: Path) -> None:
    proto = build("g (float[N, 6] x) => (float[N, 4] y) { W = ConstantOfShape (n) y = MatMul (x, W) }", {"n": [6, 4]})
    (layer,) = working_form(save(proto, tmp_path)).layers
    assert layer.weight.shape == (6, 4)
    assert layer.refusal == "its weight 'W' is one value for all, written by ConstantOfShape"


@pytest.mark.parametrize(
    ("kind", "step", "said"),
    [
        ("INT4", "DequantizeLinear (W, s)", "int4 with a scale"),
        ("UINT4", "DequantizeLinear (W, s)", "uint4 with a scale"),
        ("FLOAT8E4M3FN", "DequantizeLinear (W, s)", "float8e4m3fn with a scale"),
        ("FLOAT8E5M2", "Cast <to = 1> (W)", "float8e5m2"),
    ],
)
def test_types_that_cannot_be_patched_are_read_and_refused_by_name(
    kind: str, step: str, said: str, tmp_path: Path
) -> None:
    text = f"g (float[N, 2] x) => (float[N, 4] y) {{ w = {step} z = MatMul (x, w) h = Relu (z) y = MatMul (h, V) }}"
    proto = build(text, {"s": np.float32(0.5), "V": random(4, 4)}, opset=21, ir_version=10)
    numbers = [1, 2, 3, 0, 4, 1, 2, 3]
    proto.graph.initializer.append(helper.make_tensor("W", getattr(onnx.TensorProto, kind), [2, 4], numbers))
    model = save(proto, tmp_path)
    x = {"x": random(5, 2)}
    experiment = Experiment(model, "cpu", 1 << 26, x)
    assert [layer.refusal for layer in experiment.layers] == [f"its weight 'w' is stored as {said}", None]
    np.testing.assert_allclose(experiment.scores(x), run(proto, x)[0], atol=1e-2)


def test_packed_products_are_refused_by_name() -> None:
    proto = build("g (float[N, 32] x) => (float[N, 4] y) { y = MatMul (x, W) }", {"W": np.zeros((4, 1, 16), np.uint8)})
    node = proto.graph.node[0]
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    node.attribute.extend(helper.make_attribute(name, value) for name, value in {"K": 32, "N": 4, "bits": 4}.items())
    (layer,) = layers_of(proto)
    assert (layer.inputs, layer.outputs, layer.refusal) == (32, 4, "its weight 'W' is packed, 4 bits a value")


def test_structure_needs_no_values(tmp_path: Path) -> None:
    for name, make in STORED.items():
        model = save(make().proto, tmp_path, f"{name}.onnx")
        with_values, without = working_form(model), working_form(model, values=False)
        assert with_values.layers == without.layers
        assert with_values.sites == without.sites


CLASSIFIERS = {"NONE": lambda z: z, "LOGISTIC": lambda z: 1 / (1 + np.exp(-z))}


@pytest.mark.parametrize("post", [*CLASSIFIERS, "SOFTMAX"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_linear_classifier_is_a_layer(post: str, mapped: bool, tmp_path: Path) -> None:
    """Its weights are attributes of the node, and the scores may be wrapped in maps."""
    text = """g (float[N, 6] x) => (int64[N] label, float[N, 4] y) {
        label, y = ai.onnx.ml.LinearClassifier <classlabels_ints = [0, 1, 2, 3]> (x) }"""
    if mapped:
        text = """g (float[N, 6] x) => (int64[N] label, seq(map(int64, float)) y) {
            label, p = ai.onnx.ml.LinearClassifier <classlabels_ints = [0, 1, 2, 3]> (x)
            y = ai.onnx.ml.ZipMap <classlabels_int64s = [0, 1, 2, 3]> (p) }"""
    proto = build(text)
    proto.graph.node[0].attribute.extend(
        [
            helper.make_attribute("coefficients", W.T.reshape(-1).tolist()),
            helper.make_attribute("intercepts", B.tolist()),
            helper.make_attribute("post_transform", post),
        ]
    )
    model = save(proto, tmp_path)
    x = x_of(proto)
    experiment = Experiment(model, "cpu", 1 << 26, x)
    (layer,) = experiment.layers
    data = Patch({layer.weight: NEW.T}).apply(model)
    z = x["x"] @ NEW + B
    softmax = np.exp(z) / np.exp(z).sum(axis=1, keepdims=True)
    expected = CLASSIFIERS.get(post, lambda z: softmax)(z)
    answers = run(data, x)[1]
    found = np.array([[one[label] for label in range(4)] for one in answers]) if mapped else answers
    np.testing.assert_allclose(found, expected, atol=1e-5)
    decided = experiment.patched({layer.weight: NEW.T}).scores(x).argmax(axis=1)
    np.testing.assert_array_equal(decided, expected.argmax(axis=1))


@pytest.mark.parametrize("labels", ["classlabels_int64s = [7, 2, 9, 4]", 'classlabels_strings = ["d", "a", "c", "b"]'])
def test_maps_come_in_the_order_of_their_keys(labels: str, tmp_path: Path) -> None:
    key = "int64" if "int64s" in labels else "string"
    proto = build(
        f"""g (float[N, 6] x) => (seq(map({key}, float)) y) {{
            z = MatMul (x, W) p = Softmax (z) y = ai.onnx.ml.ZipMap <{labels}> (p) }}""",
        {"W": W},
    )
    x = x_of(proto)
    expected = [[one[label] for label in sorted(one)] for one in run(proto, x)[0]]
    experiment = Experiment(save(proto, tmp_path), "cpu", 1 << 26, x)
    np.testing.assert_allclose(experiment.scores(x).argmax(axis=1), np.argmax(expected, axis=1))


def test_a_scaler_and_a_normalizer_are_steps_like_others(tmp_path: Path) -> None:
    proto = build(
        """g (float[N, 6] x) => (float[N, 4] y) {
            s = ai.onnx.ml.Scaler <offset = [1.0], scale = [0.5]> (x)
            z = MatMul (s, W) p = Sigmoid (z) y = ai.onnx.ml.Normalizer <norm = "L1"> (p) }""",
        {"W": W},
    )
    form = experiment_form(save(proto, tmp_path))
    assert not any(node.domain for node in form.proto.graph.node)
    x = x_of(proto)
    np.testing.assert_allclose(run(form.proto, x)[0], run(proto, x)[0], atol=1e-6)


@pytest.mark.parametrize("opset", [10, 12, 13])
def test_integer_products_of_every_operator_set_are_taken_apart(opset: int, tmp_path: Path) -> None:
    scale, step = np.float32(0.05), np.float32(0.02)
    whole = np.clip(np.rint(W / step), -127, 127).astype(np.int8)
    proto = build(
        """g (float[N, 6] x) => (float[N, 4] y) {
            q = QuantizeLinear (x, xs, xz)
            p = QLinearMatMul (q, xs, xz, W, s, z, ys, yz)
            y = DequantizeLinear (p, ys, yz)
        }""",
        {"W": whole, "s": step, "z": np.int8(0), "xs": scale, "xz": np.uint8(128), "ys": scale, "yz": np.uint8(128)},
        opset=opset,
    )
    x = {"x": random(5, 6, seed=2)}
    experiment = Experiment(save(proto, tmp_path), "cpu", 1 << 26, x)
    close(experiment.scores(x), run(proto, x)[0], 1e-1)
