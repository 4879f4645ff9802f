"""What tensors hold: twice, not at all, or numbers that no layer can use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Array, build, random, run
from onnx import TensorProto, helper, numpy_helper

from onnxcare.errors import ModelError
from onnxcare.findings import RULES, StaticFinding, static_findings
from onnxcare.graph.model import load_model


def model(**weights: Array) -> onnx.ModelProto:
    """A network of two layers, the second within a branch."""
    text = """net (float[N, 4] x) => (float[N, 2] y) {
        h = Gemm (x, W1, b1)
        masked = Add (h, mask)
        n = Size (x)
        c = Equal (n, none)
        y = If (c) <
            then_branch = then () => (float[N, 2] a) { a = MatMul (masked, W2) },
            else_branch = other () => (float[N, 2] b) { [inner] V = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> ()
                b = MatMul (masked, V) }>
    }"""
    values = {"W1": random(4, 3), "b1": random(3), "mask": np.zeros(3, np.float32), "W2": random(3, 2)} | weights
    return build(text, values | {"none": np.array(0)})


def write(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def found(proto: onnx.ModelProto, folder: Path) -> list[tuple[str, str, str]]:
    return [(finding.rule, finding.level, finding.where) for finding in static_findings(write(proto, folder))]


def initializer(proto: onnx.ModelProto, name: str) -> TensorProto:
    return next(tensor for tensor in proto.graph.initializer if tensor.name == name)


def test_a_sound_model_has_no_findings(tmp_path: Path) -> None:
    proto = model()
    assert run(proto, {"x": random(2, 4)})[0].shape == (2, 2)
    assert found(proto, tmp_path) == []


def test_every_rule_is_described() -> None:
    ids = [rule.id for rule in RULES]
    assert len(set(ids)) == len(ids)
    for rule in RULES:
        assert rule.id == rule.id.lower() and " " not in rule.id
        assert rule.title and not rule.title.endswith(".")
        assert rule.help.endswith(".")


# -- two value fields ------------------------------------------------------------------------------


def in_initializer(proto: onnx.ModelProto) -> tuple[TensorProto, str]:
    return initializer(proto, "W1"), "W1"


def in_sparse_initializer(proto: onnx.ModelProto) -> tuple[TensorProto, str]:
    sparse = helper.make_sparse_tensor(
        numpy_helper.from_array(np.ones(1, np.float32), "S"), numpy_helper.from_array(np.zeros(1, np.int64)), [3]
    )
    proto.graph.sparse_initializer.append(sparse)
    proto.graph.node[1].input[1] = "S"
    return proto.graph.sparse_initializer[0].values, "S"


def in_branch(proto: onnx.ModelProto) -> tuple[TensorProto, str]:
    return proto.graph.node[-1].attribute[1].g.node[0].attribute[0].t, "V"


def in_initializer_of_branch(proto: onnx.ModelProto) -> tuple[TensorProto, str]:
    branch = proto.graph.node[-1].attribute[0].g
    branch.initializer.append(numpy_helper.from_array(random(3, 2), "U"))
    branch.node[0].input[1] = "U"
    return branch.initializer[0], "U"


def in_function(proto: onnx.ModelProto) -> tuple[TensorProto, str]:
    constant = helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(3, np.float32)))
    add = helper.make_node("Add", ["a", "k"], ["b"])
    opset = proto.opset_import[0]
    proto.functions.append(helper.make_function("acme", "Shift", ["a"], ["b"], [constant, add], [opset]))
    proto.opset_import.append(helper.make_opsetid("acme", 1))
    proto.graph.node[1].CopyFrom(helper.make_node("Shift", ["h"], ["masked"], domain="acme"))
    return proto.functions[0].node[0].attribute[0].t, "k"


def in_default_of_function(proto: onnx.ModelProto) -> tuple[TensorProto, str]:
    in_function(proto)
    default = helper.make_attribute("scale", numpy_helper.from_array(np.ones(3, np.float32)))
    proto.functions[0].attribute_proto.append(default)
    return proto.functions[0].attribute_proto[0].t, "Shift.scale"


@pytest.mark.parametrize(
    "place",
    [in_initializer, in_sparse_initializer, in_branch, in_initializer_of_branch, in_function, in_default_of_function],
)
def test_two_value_fields_are_an_error(
    place: Callable[[onnx.ModelProto], tuple[TensorProto, str]], tmp_path: Path
) -> None:
    proto = model()
    tensor, name = place(proto)
    kept = numpy_helper.to_array(tensor)
    del tensor.float_data[:]
    tensor.raw_data = kept.tobytes()
    assert "two-value-fields" not in {rule for rule, *_ in found(proto, tmp_path)}
    tensor.float_data.extend([0.0] * kept.size)
    assert ("two-value-fields", "error", name) in found(proto, tmp_path)


def test_findings_come_for_files_that_are_refused(tmp_path: Path) -> None:
    proto = model()
    initializer(proto, "W1").float_data.extend([0.0] * 12)
    with pytest.raises(ModelError):
        load_model(write(proto, tmp_path))
    (finding,) = static_findings(tmp_path / "model.onnx")
    assert "raw_data and float_data" in finding.message


# -- numbers ---------------------------------------------------------------------------------------


def spoiled(values: Array, number: float) -> Array:
    values = values.copy()
    values.reshape(-1)[1] = number
    return values


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("name", "shape"), [("W1", (4, 3)), ("b1", (3,)), ("W2", (3, 2))])
def test_weights_that_are_not_finite_are_an_error(
    number: float, name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    proto = model(**{name: spoiled(random(*shape), number)})
    assert found(proto, tmp_path) == [("non-finite-weights", "error", name)]


def test_a_mask_of_infinities_is_a_note_and_of_nan_an_error(tmp_path: Path) -> None:
    zeros = np.zeros(3, np.float32)
    assert found(model(mask=spoiled(zeros, -np.inf)), tmp_path) == [("non-finite-weights", "note", "mask")]
    assert found(model(mask=spoiled(zeros, np.nan)), tmp_path) == [("non-finite-weights", "error", "mask")]


def test_a_nan_that_is_only_looked_at_is_a_note(tmp_path: Path) -> None:
    text = "gaps (float[N, 4] x) => (float[N, 4] y) { c = IsNaN (x) y = Where (c, filler, x) }"
    proto = build(text, {"filler": np.array(np.nan, np.float32)})
    assert found(proto, tmp_path) == [("non-finite-weights", "note", "filler")]


def test_constants_reach_layers_through_other_operators(tmp_path: Path) -> None:
    text = """net (float[N, 4] x) => (float[N, 2] y) {
        flat = Constant <value_floats = [1.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]> ()
        W = Reshape (flat, shape)
        y = MatMul (x, W)
    }"""
    proto = build(text, {"shape": np.array([4, 2])})
    assert found(proto, tmp_path) == []
    proto.graph.node[0].attribute[0].floats[1] = np.inf
    assert found(proto, tmp_path) == [("non-finite-weights", "error", "flat")]


def test_attributes_of_classical_models_are_read(tmp_path: Path) -> None:
    text = """linear (float[N, 4] x) => (float[N, 1] y) {
        [regression] y = ai.onnx.ml.LinearRegressor <coefficients = [1.0, 2.0, 3.0, 4.0]> (x)
    }"""
    proto = build(text)
    assert found(proto, tmp_path) == []
    proto.graph.node[0].attribute[0].floats[2] = np.nan
    assert found(proto, tmp_path) == [("non-finite-weights", "error", "regression.coefficients")]


@pytest.mark.parametrize("kind", ["half", "bfloat16", "double", "sparse", "branch", "external"])
def test_numbers_are_read_wherever_they_are_held(kind: str, tmp_path: Path) -> None:
    values = spoiled(random(4, 3), np.nan)
    proto = model(W1=values)
    if kind == "sparse":
        del proto.graph.initializer[0]
        index = numpy_helper.from_array(np.arange(12))
        dense = numpy_helper.from_array(values.reshape(-1), "W1")
        proto.graph.sparse_initializer.append(helper.make_sparse_tensor(dense, index, [4, 3]))
    elif kind == "branch":
        initializer(proto, "W1").CopyFrom(numpy_helper.from_array(random(4, 3), "W1"))
        tensor = proto.graph.node[-1].attribute[1].g.node[0].attribute[0].t
        tensor.CopyFrom(numpy_helper.from_array(spoiled(random(3, 2), np.nan)))
        assert found(proto, tmp_path) == [("non-finite-weights", "error", "V")]
        return
    elif kind == "external":
        proto = model(W1=spoiled(random(4000, 300), np.nan))  # more than is read for the search for switches
        onnx.save_model(proto, tmp_path / "model.onnx", save_as_external_data=True, location="w.bin")
        findings = static_findings(tmp_path / "model.onnx")
        assert [(finding.rule, finding.where) for finding in findings] == [("non-finite-weights", "W1")]
        assert "1 NaN value." in findings[0].message
        return
    else:
        number = {"half": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16, "double": TensorProto.DOUBLE}[kind]
        dtype = helper.tensor_dtype_to_np_dtype(number)
        initializer(proto, "W1").CopyFrom(numpy_helper.from_array(values.astype(dtype), "W1"))
    assert ("non-finite-weights", "error", "W1") in found(proto, tmp_path)


# -- initializers ----------------------------------------------------------------------------------


def test_two_initializers_of_one_name_are_a_warning(tmp_path: Path) -> None:
    proto = model()
    proto.graph.initializer.append(numpy_helper.from_array(np.full((4, 3), 7, np.float32), "W1"))
    assert found(proto, tmp_path) == [("duplicate-initializer", "warning", "W1")]
    # The message says which one counts for onnxruntime.
    x = np.ones((1, 4), np.float32)
    assert np.allclose(run(proto, {"x": x}, "h")[0], 28 + numpy_helper.to_array(initializer(proto, "b1")))
    assert "the last one" in static_findings(tmp_path / "model.onnx")[0].message


def test_unused_initializers_are_one_note(tmp_path: Path) -> None:
    proto = model(spare=random(2), other=random(2))
    assert found(proto, tmp_path) == [("unused-initializer", "note", "spare")]
    assert "2 initializers" in static_findings(tmp_path / "model.onnx")[0].message


def test_long_series_are_cut(tmp_path: Path) -> None:
    proto = model(mask=np.array([-np.inf, 0, 0], np.float32))
    for number in range(50):
        proto.graph.initializer.append(numpy_helper.from_array(np.full(2, np.nan, np.float32), f"bad{number}"))
        proto.graph.node.append(helper.make_node("Relu", [f"bad{number}"], [f"dead{number}"]))
    findings = [f for f in static_findings(write(proto, tmp_path)) if f.rule == "non-finite-weights"]
    assert [finding.level for finding in findings[:20]] == ["error"] * 20
    assert findings[20:] == [StaticFinding("non-finite-weights", "error", "", "31 more of this kind are not listed.")]
