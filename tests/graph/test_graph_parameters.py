"""Weights wherever they live: found, read as onnxruntime reads them, and rewritten in place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Array, build, layer_of, layers_of, random, run, save
from onnx import TensorProto, helper, numpy_helper

from onnxcare.errors import ModelError
from onnxcare.graph import wire
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.parameters import Parameter, find_parameters
from onnxcare.graph.patch import Patch
from onnxcare.graph.storage import Source
from onnxcare.graph.view import GraphView

W = random(6, 4)
B = random(4, seed=1)
X = {"x": random(5, 6, seed=2)}
TEXT = "g (float[N, 6] x) => (float[N, 4] y) { [fc] y = Gemm (x, W, b) }"
DOUBLE = "g (double[N, 6] x) => (double[N, 4] y) { [fc] y = Gemm (x, W, b) }"


def initializers() -> onnx.ModelProto:
    return build(TEXT, {"W": W, "b": B})


def overridable(ir_version: int) -> onnx.ModelProto:
    """Initializers that are also listed as inputs: needed in IR 3, a default value from IR 4."""
    proto = build(TEXT, {"W": W, "b": B}, ir_version=ir_version, opset=8)
    for name, values in (("W", W), ("b", B)):
        proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, values.shape))
    return proto


def constant_nodes() -> onnx.ModelProto:
    proto = build(TEXT)
    for name, values in (("b", B), ("W", W)):
        node = helper.make_node("Constant", [], [name], name=f"constant {name}", value=numpy_helper.from_array(values))
        proto.graph.node.insert(0, node)
    return proto


def typed_fields() -> onnx.ModelProto:
    """Values in float_data instead of raw_data."""
    proto = build(TEXT)
    for name, values in (("W", W), ("b", B)):
        tensor = helper.make_tensor(name, TensorProto.FLOAT, values.shape, values.reshape(-1).tolist())
        assert tensor.float_data
        proto.graph.initializer.append(tensor)
    return proto


def float64() -> onnx.ModelProto:
    return build(DOUBLE, {"W": W.astype(np.float64), "b": B.astype(np.float64)})


def float64_typed_fields() -> onnx.ModelProto:
    proto = build(DOUBLE)
    for name, values in (("W", W), ("b", B)):
        tensor = helper.make_tensor(name, TensorProto.DOUBLE, values.shape, values.reshape(-1).tolist())
        assert tensor.double_data
        proto.graph.initializer.append(tensor)
    return proto


STORED: dict[str, Callable[[], onnx.ModelProto]] = {
    "initializers": initializers,
    "overridable": lambda: overridable(8),
    "ir 3": lambda: overridable(3),
    "constant nodes": constant_nodes,
    "float_data": typed_fields,
    "float64": float64,
    "double_data": float64_typed_fields,
}


def externalise(tensor: TensorProto, folder: Path, location: str) -> None:
    """Move a tensor's values to the end of a sidecar file."""
    path = folder / location
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_bytes() if path.exists() else b"beside others"
    values = tensor.raw_data
    path.write_bytes(before + values)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": len(before), "length": len(values)}.items():
        tensor.external_data.add(key=key, value=str(value))


def external(folder: Path, location: str = "weights.bin") -> Model:
    """A model whose tensors all lie in a sidecar file."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = initializers()
    for tensor in proto.graph.initializer:
        externalise(tensor, folder, location)
    return save(proto, folder)


def repaired(model: Model) -> tuple[bytes, Array, Array]:
    """Patch weight and bias of the only layer; return the file and the new values."""
    layer = layer_of(model.proto)
    assert layer.bias is not None
    new_weight = random(*layer.weight.shape, seed=8, dtype=layer.weight.dtype.type)
    new_bias = random(*layer.bias.shape, seed=9, dtype=layer.weight.dtype.type)
    return Patch({layer.weight: new_weight, layer.bias: new_bias}).apply(model), new_weight, new_bias


@pytest.mark.parametrize("name", STORED)
def test_values_read_and_patch_wherever_they_are_stored(name: str, tmp_path: Path) -> None:
    model = save(STORED[name](), tmp_path)
    layer = layer_of(model.proto)
    assert layer.bias is not None
    np.testing.assert_array_equal(
        layer.weight.storage.read(Source(model.proto, tmp_path)), W.astype(layer.weight.dtype)
    )
    np.testing.assert_array_equal(layer.bias.storage.read(Source(model.proto, tmp_path)), B.astype(layer.weight.dtype))
    data, weight, bias = repaired(model)
    x = {"x": X["x"].astype(weight.dtype)}
    np.testing.assert_allclose(run(data, x)[0], x["x"] @ weight + bias, atol=1e-5)
    patched = onnx.ModelProto.FromString(data)
    again = layer_of(patched)
    assert again.weight.path == layer.weight.path
    np.testing.assert_array_equal(again.weight.storage.read(Source(patched, tmp_path)), weight)
    onnx.checker.check_model(patched, full_check=True)


@pytest.mark.parametrize("name", STORED)
def test_restoring_the_old_tensors_gives_the_original_file(name: str, tmp_path: Path) -> None:
    model = save(STORED[name](), tmp_path)
    data, _, _ = repaired(model)
    assert data != model.data
    assert restored(model, data, find_parameters(GraphView(model.proto)).values()) == model.data


def restored(model: Model, data: bytes, parameters) -> bytes:  # type: ignore[no-untyped-def]
    return wire.splice(data, {p.path: original_tensor(model.data, p.path) for p in parameters})


def original_tensor(data: bytes, path: wire.Path) -> bytes:
    for number, occurrence in path:
        data = [data[c:e] for n, _, c, e in wire.fields(data, 0, len(data)) if n == number][occurrence]
    return data


def test_names_and_notes_of_a_patched_tensor_stay(tmp_path: Path) -> None:
    proto = typed_fields()
    tensor = proto.graph.initializer[0]
    tensor.doc_string = "as trained"
    tensor.metadata_props.add(key="origin", value="trainer")
    data, weight, _ = repaired(save(proto, tmp_path))
    after = onnx.ModelProto.FromString(data).graph.initializer[0]
    assert (after.name, after.doc_string) == ("W", "as trained")
    assert [(entry.key, entry.value) for entry in after.metadata_props] == [("origin", "trainer")]
    assert not after.float_data
    assert after.raw_data == weight.tobytes()


def test_a_single_number_is_patched(tmp_path: Path) -> None:
    # All values of a PReLU and the like may be one, without an axis.
    model = save(build("g (float[N] x) => (float[N] y) { y = Mul (x, s) }", {"s": np.float32(2)}), tmp_path)
    parameter = find_parameters(GraphView(model.proto))["s"]
    assert parameter.shape == ()
    data = Patch({parameter: np.array(3, np.float32)}).apply(model)
    np.testing.assert_array_equal(run(data, {"x": B})[0], 3 * B)


def test_initializers_listed_as_inputs_are_no_inputs(tmp_path: Path) -> None:
    for index, ir_version in enumerate((3, 8)):
        model = save(overridable(ir_version), tmp_path, f"{index}.onnx")
        assert [signature.name for signature in model.inputs] == ["x"]


# -- external data -------------------------------------------------------------------------------


@pytest.mark.parametrize("location", ["weights.bin", "below/weights.bin"])
def test_a_patched_external_tensor_moves_into_the_model(tmp_path: Path, location: str) -> None:
    model = external(tmp_path, location)
    assert model.external_files() == (tmp_path / location,)
    before = (tmp_path / location).read_bytes()
    layer = layer_of(model.proto)
    np.testing.assert_array_equal(layer.weight.storage.read(Source(model.proto, tmp_path)), W)
    new = random(6, 4, seed=8)
    data = Patch({layer.weight: new}).apply(model)
    inside, beside = onnx.ModelProto.FromString(data).graph.initializer
    assert inside.raw_data == new.tobytes()
    assert not inside.external_data
    assert inside.data_location == TensorProto.DEFAULT
    assert beside == model.proto.graph.initializer[1]
    patched = tmp_path / "patched.onnx"
    patched.write_bytes(data)
    np.testing.assert_allclose(run(patched, X)[0], X["x"] @ new + B, atol=1e-5)
    assert (tmp_path / location).read_bytes() == before


def test_reading_external_data_leaves_the_model_as_it_was_read(tmp_path: Path) -> None:
    model = external(tmp_path)
    layer = layer_of(model.proto)
    for _ in range(2):
        np.testing.assert_array_equal(layer.weight.storage.read(Source(model.proto, tmp_path)), W)
    assert model.proto == onnx.ModelProto.FromString(model.data)


def in_constant_node(folder: Path) -> Model:
    proto = constant_nodes()
    externalise(proto.graph.node[0].attribute[0].t, folder, "inner.bin")
    return save(proto, folder)


def branching() -> tuple[onnx.ModelProto, onnx.GraphProto]:
    """A model with a branch that reads V, which is yet to be made."""
    proto = build(
        """g (float[N, 6] x, bool c) => (float[N, 4] y) {
            y = If (c) <
                then_branch = then () => (float[N, 4] a) { a = MatMul (x, V) },
                else_branch = else () => (float[N, 4] b) { b = MatMul (x, W) }
            >
        }""",
        {"W": W},
    )
    return proto, next(item.g for item in proto.graph.node[0].attribute if item.name == "then_branch")


def in_branch(folder: Path) -> Model:
    proto, branch = branching()
    branch.initializer.append(numpy_helper.from_array(W, "V"))
    externalise(branch.initializer[0], folder, "inner.bin")
    return save(proto, folder)


def in_constant_node_of_a_branch(folder: Path) -> Model:
    proto, branch = branching()
    branch.node.insert(0, helper.make_node("Constant", [], ["V"], value=numpy_helper.from_array(W)))
    externalise(branch.node[0].attribute[0].t, folder, "inner.bin")
    return save(proto, folder)


@pytest.mark.parametrize("make", [in_constant_node, in_branch, in_constant_node_of_a_branch])
def test_external_data_inside_nodes_counts_as_well(make: Callable[[Path], Model], tmp_path: Path) -> None:
    model = make(tmp_path)
    assert model.external_files() == (tmp_path / "inner.bin",)
    (tmp_path / "inner.bin").unlink()
    with pytest.raises(ModelError, match=r"external data file inner\.bin is missing"):
        load_model(model.path)


# -- what cannot be repaired ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["FLOAT8E4M3FN", "INT4"])
def test_other_types_are_refused_by_name(kind: str) -> None:
    proto = build("g (float[N, 2] x) => (float[N, 1] y) { w = Cast <to = 1> (W) [fc] y = MatMul (x, w) }", opset=21)
    proto.graph.initializer.append(helper.make_tensor("W", getattr(TensorProto, kind), [2, 1], [1.0, 2.0]))
    storage = find_parameters(GraphView(proto))["W"].storage
    assert storage.refusal == f"is stored as {kind.lower()}"


def test_values_in_two_fields_are_refused_by_name() -> None:
    proto = initializers()
    proto.graph.initializer[0].float_data.extend([0.0] * W.size)
    with pytest.raises(ModelError, match=r"'W' carries values in two fields \(raw_data and float_data\)"):
        layer_of(proto).weight.storage.read(Source(proto, Path()))


def test_values_inside_and_outside_are_refused_by_name(tmp_path: Path) -> None:
    proto = initializers()
    tensor = proto.graph.initializer[0]
    values = tensor.raw_data
    externalise(tensor, tmp_path, "weights.bin")
    tensor.raw_data = values
    with pytest.raises(ModelError, match=r"'W' carries values in two fields \(raw_data and external_data\)"):
        layer_of(proto).weight.storage.read(Source(proto, tmp_path))


def test_values_of_the_wrong_shape_are_a_defect() -> None:
    proto = initializers()
    layer = layer_of(proto)
    model = Model(Path("model.onnx"), proto, "", (), ())
    with pytest.raises(ValueError, match=r"W: \(4, 6\) does not fit \(6, 4\)"):
        Patch({layer.weight: W.T}).apply(model)


# -- users ---------------------------------------------------------------------------------------


def parameter_of(proto: onnx.ModelProto, name: str) -> Parameter:
    return find_parameters(GraphView(proto))[name]


def test_users_are_every_node_that_reads_a_tensor() -> None:
    proto = build(
        """g (float[N, 4] x, bool c) => (float[N, 4] y, float[4, 4] W) {
            [first] a = MatMul (x, W)
            b = MatMul (a, W)
            [choice] y = If (c) <
                then_branch = then () => (float[N, 4] t) { t = MatMul (b, W) },
                else_branch = else () => (float[N, 4] e) { e = Identity (b) }
            >
        }""",
        {"W": random(4, 4), "unused": B},
    )
    assert parameter_of(proto, "W").users == ("first", "MatMul#1", "choice", "the model's outputs")
    assert parameter_of(proto, "unused").users == ()
    assert layers_of(proto)[0].refusal == "its weight 'W' is also used by MatMul#1"


def test_a_foreign_operator_called_constant_holds_no_parameter() -> None:
    proto = build(TEXT, {"b": B})
    node = helper.make_node("Constant", [], ["W"], domain="com.example", value=numpy_helper.from_array(W))
    proto.graph.node.insert(0, node)
    assert set(find_parameters(GraphView(proto))) == {"b"}
    assert layers_of(proto) == []


def test_a_file_with_its_graph_in_two_pieces_is_refused(tmp_path: Path) -> None:
    # Readers merge the pieces; a position in the merged graph is no position in the file.
    proto = initializers()
    rest = onnx.GraphProto(initializer=[proto.graph.initializer.pop()])
    data = proto.SerializeToString() + wire.embed(7, rest.SerializeToString())
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    model = load_model(path)
    layer = layer_of(model.proto)
    assert layer.bias is not None
    with pytest.raises(ModelError, match="save it again"):
        Patch({layer.bias: B}).apply(model)
