"""Repaired files: byte for byte the original outside of patched tensors, and published whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Array, build, layer_of, random, run, save
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto

from onnxcare.errors import ModelError, UsageError
from onnxcare.graph import wire
from onnxcare.graph.layers import find_layers
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.parameters import Parameter, find_parameters
from onnxcare.graph.patch import Patch, publish, staged, with_metadata, write_atomically
from onnxcare.graph.storage import Source
from onnxcare.graph.view import GraphView

SAMPLE_FILES = (
    "mnist-square-pytorch/model.onnx",
    "mnist-square-pytorch/model-dynamo.onnx",
    "mnist-blend-keras/model.onnx",
)
W, B = random(6, 4), random(4, seed=1)
X = {"x": random(5, 6, seed=2)}


def simple() -> onnx.ModelProto:
    return build("g (float[N, 6] x) => (float[N, 4] y) { [fc] y = Gemm (x, W, b) }", {"W": W, "b": B})


def parameters_of(model: Model) -> list[Parameter]:
    return [p for layer in find_layers(GraphView(model.proto)) for p in (layer.weight, layer.bias) if p is not None]


def moved(model: Model, parameter: Parameter) -> Array:
    """Return new values for a parameter."""
    old = parameter.storage.read(Source(model.proto, model.path.parent))
    return old + random(*old.shape, seed=5, dtype=old.dtype.type)


def metadata(data: bytes) -> list[tuple[str, str]]:
    return [(entry.key, entry.value) for entry in onnx.ModelProto.FromString(data).metadata_props]


def undone(model: Model, data: bytes, patched: list[Parameter]) -> bytes:
    """Take out our metadata and put the old tensors back, on the level of bytes."""

    def ours(content: bytes) -> bool:
        return onnx.StringStringEntryProto.FromString(content).key.startswith("onnxcare.")

    def old(path: wire.Path) -> bytes:
        content = model.data
        for number, occurrence in path:
            content = [content[c:e] for n, _, c, e in wire.fields(content, 0, len(content)) if n == number][occurrence]
        return content

    return wire.splice(wire.replace_entries(data, 14, ours, []), {p.path: old(p.path) for p in patched})


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_a_repaired_sample_is_the_original_outside_of_its_patched_tensors(samples: Path, name: str) -> None:
    model = load_model(samples / name)
    everything = parameters_of(model)
    for patched in ([p] for p in everything), [everything]:
        for parameters in patched:
            data = Patch({p: moved(model, p) for p in parameters}).apply(model)
            data = with_metadata(data, {"version": "1", "seed": "2"})
            assert undone(model, data, parameters) == model.data
            names = {p.name for p in parameters}
            for before, after in zip(
                model.proto.graph.initializer, onnx.ModelProto.FromString(data).graph.initializer, strict=True
            ):
                assert (before == after) == (before.name not in names)


@pytest.mark.parametrize("name", SAMPLE_FILES)
def test_protobuf_sees_no_other_difference_either(samples: Path, name: str) -> None:
    model = load_model(samples / name)
    parameter = parameters_of(model)[2]
    values = moved(model, parameter)
    read_back = onnx.ModelProto.FromString(Patch({parameter: values}).apply(model))
    tensor = next(t for t in read_back.graph.initializer if t.name == parameter.name)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), values)
    tensor.CopyFrom(next(t for t in model.proto.graph.initializer if t.name == parameter.name))
    assert read_back == model.proto


def test_metadata_of_nodes_values_and_the_graph_stays(samples: Path) -> None:
    model = load_model(samples / "mnist-square-pytorch/model-dynamo.onnx")
    assert any(node.metadata_props for node in model.proto.graph.node)
    assert any(info.metadata_props for info in model.proto.graph.value_info)
    assert model.proto.graph.metadata_props
    parameter = parameters_of(model)[0]
    after = onnx.ModelProto.FromString(Patch({parameter: moved(model, parameter)}).apply(model))
    assert list(after.graph.node) == list(model.proto.graph.node)
    assert list(after.graph.value_info) == list(model.proto.graph.value_info)
    assert list(after.graph.metadata_props) == list(model.proto.graph.metadata_props)


def test_an_empty_patch_is_the_original(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    assert Patch({}).apply(model) == model.data
    assert Patch({}).summary(model) == []


def test_wider_values_are_stored_in_the_type_of_the_tensor(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    weight = layer_of(model.proto).weight
    patch = Patch({weight: W.astype(np.float64) + 1e-3})
    np.testing.assert_array_equal(run(patch.apply(model), X)[0], run(_with(model, W + np.float32(1e-3)), X)[0])


def _with(model: Model, weight: Array) -> bytes:
    return Patch({layer_of(model.proto).weight: weight}).apply(model)


@pytest.mark.parametrize("value", [np.inf, np.nan, 1e39])
def test_values_that_do_not_fit_are_refused_by_name(tmp_path: Path, value: float) -> None:
    model = save(simple(), tmp_path)
    values = W.astype(np.float64)
    values[0, 0] = value
    with (
        np.errstate(over="ignore"),
        pytest.raises(ModelError, match="W: the repair does not fit into float32"),
    ):
        Patch({layer_of(model.proto).weight: values}).apply(model)


def test_infinities_that_were_there_before_may_stay(tmp_path: Path) -> None:
    mask = np.array([0, -np.inf, np.nan, 2], np.float32)
    model = save(build("g (float[N, 4] x) => (float[N, 4] y) { y = Add (x, m) }", {"m": mask}), tmp_path)
    parameter = find_parameters(GraphView(model.proto))["m"]
    new = np.array([0, -np.inf, np.nan, 5], np.float32)
    (tensor,) = onnx.ModelProto.FromString(Patch({parameter: new}).apply(model)).graph.initializer
    assert tensor.raw_data == new.tobytes()
    (change,) = Patch({parameter: new}).summary(model)
    assert (change.changed, change.norm) == (1, 3)
    for value in (np.inf, np.nan):
        with pytest.raises(ModelError, match="m: the repair does not fit into float32"):
            Patch({parameter: np.array([0, value, -np.inf, 2], np.float32)}).apply(model)


def test_the_summary_counts_and_measures_what_is_stored(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    layer = layer_of(model.proto)
    assert layer.bias is not None
    new = W.copy()
    new[0, :2] += np.float32([3, 4])
    tiny = B.astype(np.float64) + 1e-12  # rounds back to the old values
    weight, bias = Patch({layer.weight: new, layer.bias: tiny}).summary(model)
    assert (weight.name, weight.shape, weight.changed, weight.size) == ("W", (6, 4), 2, 24)
    assert weight.norm == pytest.approx(5, rel=1e-6)
    assert weight.relative == pytest.approx(5 / np.linalg.norm(W), rel=1e-6)
    assert (bias.name, bias.changed, bias.norm, bias.relative) == ("b", 0, 0, 0)


# -- metadata ------------------------------------------------------------------------------------


def test_a_second_repair_replaces_only_our_own_metadata(tmp_path: Path) -> None:
    proto = simple()
    foreign = {"author": "someone", "onnxcare": "no prefix", "onnxcare_note": "no prefix", "Onnxcare.version": "7"}
    for key, value in foreign.items():
        proto.metadata_props.add(key=key, value=value)
    model = save(proto, tmp_path)
    first = with_metadata(model.data, {"version": "1", "method": "auto"})
    second = with_metadata(first, {"version": "2", "seed": "3"})
    assert metadata(first) == [*foreign.items(), ("onnxcare.version", "1"), ("onnxcare.method", "auto")]
    assert metadata(second) == [*foreign.items(), ("onnxcare.version", "2"), ("onnxcare.seed", "3")]
    assert with_metadata(second, {}) == model.data


@settings(deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text(max_size=5), st.text(max_size=200), max_size=4),
    st.dictionaries(st.text(max_size=5), st.text(max_size=200), max_size=4),
)
def test_writing_metadata_twice_is_writing_the_second(first: Mapping[str, str], second: Mapping[str, str]) -> None:
    data = simple().SerializeToString()
    once = with_metadata(data, second)
    assert with_metadata(with_metadata(data, first), second) == once
    assert dict(metadata(once)) == {f"onnxcare.{key}": value for key, value in second.items()}


# -- publishing ----------------------------------------------------------------------------------


def external(folder: Path, location: str = "weights.bin") -> Model:
    """A model with its weight in a sidecar and its bias inside."""
    proto = simple()
    tensor = proto.graph.initializer[0]
    sidecar = folder / location
    sidecar.parent.mkdir(parents=True, exist_ok=True)
    sidecar.write_bytes(tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    return save(proto, folder)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def write(model: Model, data: bytes, out: Path) -> None:
    with staged(model, data, out) as path:
        publish(model, path, data, out)


def test_staging_shows_the_whole_model_and_leaves_nothing(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    model = external(source, "below/weights.bin")
    with staged(model, model.data, target / "out.onnx") as path:
        assert path.name == "out.onnx"
        assert path.parent.parent == target
        np.testing.assert_allclose(run(path, X)[0], X["x"] @ W + B, atol=1e-5)
    assert listing(target) == []
    assert listing(source) == ["below", "below/weights.bin", "model.onnx"]


def test_a_failure_while_staged_leaves_the_old_file(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"as it was")
    with pytest.raises(ZeroDivisionError), staged(model, model.data, out):
        raise ZeroDivisionError
    assert out.read_bytes() == b"as it was"
    assert listing(tmp_path) == ["model.onnx", "out.onnx"]


def test_publishing_replaces_the_file_with_the_final_bytes(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    out = tmp_path / "out.onnx"
    out.write_bytes(b"as it was")
    final = with_metadata(model.data, {"verdict": "repaired"})
    with staged(model, model.data, out) as path:
        assert path.read_bytes() == model.data
        assert out.read_bytes() == b"as it was"
        publish(model, path, final, out)
    assert out.read_bytes() == final
    assert listing(tmp_path) == ["model.onnx", "out.onnx"]


def test_who_has_the_old_file_open_keeps_it_whole(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    out, opened = tmp_path / "out.onnx", tmp_path / "opened.onnx"
    out.write_bytes(b"as it was")
    opened.hardlink_to(out)
    write(model, model.data, out)
    assert opened.read_bytes() == b"as it was"
    assert out.read_bytes() == model.data


@pytest.mark.parametrize("location", ["weights.bin", "below/weights.bin"])
def test_a_sidecar_comes_along_into_another_folder(tmp_path: Path, location: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    model = external(source, location)
    bias = parameters_of(model)[1]
    data = Patch({bias: B + 1}).apply(model)
    write(model, data, target / "out.onnx")
    np.testing.assert_allclose(run(target / "out.onnx", X)[0], X["x"] @ W + B + 1, atol=1e-5)
    assert (target / location).read_bytes() == (source / location).read_bytes() == W.tobytes()
    assert load_model(target / "out.onnx").external_files() == (target / location,)


def test_a_sidecar_in_the_same_folder_stays_untouched(tmp_path: Path) -> None:
    model = external(tmp_path)
    before = (tmp_path / "weights.bin").stat()
    weight = parameters_of(model)[0]
    data = Patch({weight: W * 2}).apply(model)
    write(model, data, tmp_path / "out.onnx")
    after = (tmp_path / "weights.bin").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
    np.testing.assert_allclose(run(tmp_path / "out.onnx", X)[0], X["x"] @ W * 2 + B, atol=1e-5)
    np.testing.assert_allclose(run(tmp_path / "model.onnx", X)[0], X["x"] @ W + B, atol=1e-5)


def test_an_equal_sidecar_in_the_other_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    model = external(source)
    (target / "weights.bin").write_bytes(W.tobytes())
    before = (target / "weights.bin").stat()
    write(model, model.data, target / "out.onnx")
    assert (target / "weights.bin").stat().st_ino == before.st_ino


def test_another_sidecar_of_the_same_name_is_refused(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    model = external(source)
    (target / "weights.bin").write_bytes(b"another model's weights")
    with pytest.raises(UsageError, match=r"weights\.bin: exists and differs"):
        write(model, model.data, target / "out.onnx")
    assert listing(target) == ["weights.bin"]
    assert (target / "weights.bin").read_bytes() == b"another model's weights"


@pytest.mark.parametrize("folder", ["source", "target"])
def test_an_output_named_like_a_sidecar_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "target").mkdir()
    model = external(tmp_path / "source")
    with pytest.raises(UsageError, match=r"weights\.bin: is the name of the model's external data"):
        write(model, model.data, tmp_path / folder / "weights.bin")
    assert (tmp_path / "source" / "weights.bin").read_bytes() == W.tobytes()
    assert listing(tmp_path / "target") == []


def test_in_place_the_model_is_replaced_and_its_sidecar_is_not(tmp_path: Path) -> None:
    model = external(tmp_path)
    data = Patch({parameters_of(model)[0]: W * 2}).apply(model)
    write(model, data, tmp_path / "model.onnx")
    np.testing.assert_allclose(run(tmp_path / "model.onnx", X)[0], X["x"] @ W * 2 + B, atol=1e-5)
    assert (tmp_path / "weights.bin").read_bytes() == W.tobytes()


def test_an_unwritable_folder_is_a_usage_error(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    with (
        pytest.raises(UsageError, match="cannot be written"),
        staged(model, model.data, tmp_path / "missing" / "out.onnx"),
    ):
        raise AssertionError
    with pytest.raises(UsageError, match="cannot be written"):
        write_atomically(tmp_path / "missing" / "report.txt", "text")


def test_text_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.txt"
    for text in ("first", "zweites, mit Umlaut: ä"):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert listing(tmp_path) == ["report.txt"]


@pytest.mark.parametrize("content", ["Glück\nzwei\r\n", b"\x00\xff\r\n\x89PNG"], ids=["text", "bytes"])
def test_text_and_bytes_are_written_as_they_are(tmp_path, content):
    path = tmp_path / "report"
    path.write_text("before")
    write_atomically(path, content)
    assert path.read_bytes() == (content.encode("utf-8") if isinstance(content, str) else content)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_has_changed_since_it_was_read_is_not_patched(tmp_path: Path) -> None:
    model = save(simple(), tmp_path)
    patch = Patch({parameter: moved(model, parameter) for parameter in parameters_of(model)})
    whole = patch.apply(model)
    model.path.write_bytes(whole)
    for read_again in (lambda: model.data, lambda: patch.apply(model)):
        with pytest.raises(ModelError, match=r"model\.onnx: the file has changed since it was read; run again$"):
            read_again()
    assert model.path.read_bytes() == whole
    model.path.unlink()
    with pytest.raises(ModelError, match=r"model\.onnx: no such file$"):
        patch.apply(model)
    save(simple(), tmp_path)  # as it was
    assert patch.apply(model) == whole
