"""Patch files: one file out of the other, byte for byte, however numbers are stored and files are laid out."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import build, random, save
from helpers import Paths, check_refusal, contents, dense, fix, onnxcare, write_case
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

import onnxcare as api
from onnxcare.errors import DataError, ModelError
from onnxcare.graph import wire
from onnxcare.graph.model import VALUE_FIELDS, Model, load_model
from onnxcare.graph.patch import with_metadata
from onnxcare.graph.places import Place, find_places
from onnxcare.patchfile.apply import patched
from onnxcare.patchfile.format import PatchFile, parse
from onnxcare.patchfile.make import make_patch

FEATURES = 60
X = f"float[N, {FEATURES}] x"
W = random(FEATURES)


# -- models that hold the numbers of `place` in every way --------------------------------------------


def cast(tensor: TensorProto) -> onnx.ModelProto:
    """A model that adds a tensor, cast to float32."""
    text = f"g ({X}) => (float[N, {FEATURES}] y) {{ w = Cast <to = 1> (W)  y = Add (x, w) }}"
    proto = build(text, ir_version=9, opset=19)
    tensor.name = "W"
    proto.graph.initializer.append(tensor)
    return proto


def typed(data_type: int, values: list[float]) -> Callable[[], onnx.ModelProto]:
    """Numbers in the field of their type, such as float_data."""

    def make() -> onnx.ModelProto:
        tensor = helper.make_tensor("W", data_type, [FEATURES], values)
        assert not tensor.HasField("raw_data")
        return cast(tensor)

    return make


def raw(data_type: int, values: list[float]) -> Callable[[], onnx.ModelProto]:
    def make() -> onnx.ModelProto:
        array = np.array(values).astype(helper.tensor_dtype_to_np_dtype(data_type))
        tensor = numpy_helper.from_array(array)
        assert tensor.data_type == data_type and tensor.HasField("raw_data")
        return cast(tensor)

    return make


def four_bits() -> onnx.ModelProto:
    proto = build(
        f"g ({X}) => (float[N, {FEATURES}] y) {{ w = DequantizeLinear (W, s)  y = Add (x, w) }}",
        {"s": np.float32(0.5)},
        opset=21,
        ir_version=10,
    )
    proto.graph.initializer.append(
        helper.make_tensor("W", TensorProto.INT4, [FEATURES], [k % 15 - 7 for k in range(60)])
    )
    return proto


def constant_node() -> onnx.ModelProto:
    proto = build(f"g ({X}) => (float[N, {FEATURES}] y) {{ y = Add (x, W) }}")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(W)))
    return proto


def constant_list() -> onnx.ModelProto:
    proto = build(f"g ({X}) => (float[N, {FEATURES}] y) {{ y = Add (x, W) }}")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value_floats=W.tolist()))
    return proto


def constant_number() -> onnx.ModelProto:
    return build(f"g ({X}) => (float[N, {FEATURES}] y) {{ w = Constant <value_float = 0.5> ()  y = Add (x, w) }}")


def constant_whole_numbers() -> onnx.ModelProto:
    proto = build(f"g ({X}) => (float[N, {FEATURES}] y) {{ w = Cast <to = 1> (W)  y = Add (x, w) }}")
    proto.graph.node.insert(0, helper.make_node("Constant", [], ["W"], value_ints=list(range(-30, 30))))
    return proto


def linear_classifier() -> onnx.ModelProto:
    proto = build(f"g ({X}) => (int64[N] label, float[N, 2] y) {{ label, y = ai.onnx.ml.LinearClassifier (x) }}")
    for name, value in {
        "coefficients": random(2 * FEATURES).tolist(),
        "intercepts": [0.5, -0.5],
        "classlabels_ints": [0, 1],
    }.items():
        proto.graph.node[0].attribute.append(helper.make_attribute(name, value))
    return proto


def sparse() -> onnx.ModelProto:
    proto = build(f"g ({X}) => (float[N, {FEATURES}] y) {{ y = Add (x, W) }}")
    values, where = numpy_helper.from_array(random(20), "W"), numpy_helper.from_array(np.arange(20) * 3)
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, [FEATURES]))
    return proto


def subgraph() -> onnx.ModelProto:
    proto = build(
        f"g ({X}, bool c) => (float[N, {FEATURES}] y) {{ y = If (c) <then_branch = t () => (float[N, {FEATURES}] o) "
        f"{{ o = Add (x, W) }}, else_branch = e () => (float[N, {FEATURES}] p) {{ p = Identity (x) }}> }}"
    )
    (branch,) = (item.g for item in proto.graph.node[0].attribute if item.name == "then_branch")
    branch.initializer.append(numpy_helper.from_array(W, "W"))
    return proto


def function() -> onnx.ModelProto:
    proto = build(f"g ({X}) => (float[N, {FEATURES}] y) {{ y = com.acme.shift (x) }}")
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))
    body = [
        helper.make_node("Constant", [], ["W"], value=numpy_helper.from_array(W)),
        helper.make_node("Add", ["a", "W"], ["r"]),
    ]
    proto.functions.append(helper.make_function("com.acme", "shift", ["a"], ["r"], body, [helper.make_opsetid("", 17)]))
    return proto


SMALL = [float(k % 50) for k in range(FEATURES)]
SIGNED = [float(k % 50 - 25) for k in range(FEATURES)]
STORED: dict[str, Callable[[], onnx.ModelProto]] = {
    "float_data": typed(TensorProto.FLOAT, W.tolist()),
    "double_data": typed(TensorProto.DOUBLE, W.tolist()),
    "int64_data": typed(TensorProto.INT64, SIGNED),
    "uint64_data": typed(TensorProto.UINT64, SMALL),
    "uint32 in uint64_data": typed(TensorProto.UINT32, SMALL),
    "float16 in int32_data": typed(TensorProto.FLOAT16, W.tolist()),
    "bfloat16 in int32_data": typed(TensorProto.BFLOAT16, W.tolist()),
    "int8 in int32_data": typed(TensorProto.INT8, SIGNED),
    "uint8 in int32_data": typed(TensorProto.UINT8, SMALL),
    "int16 in int32_data": typed(TensorProto.INT16, SIGNED),
    "int32_data": typed(TensorProto.INT32, SIGNED),
    "bool in int32_data": typed(TensorProto.BOOL, [k % 2 for k in range(FEATURES)]),
    "float32": raw(TensorProto.FLOAT, W.tolist()),
    "float64": raw(TensorProto.DOUBLE, W.tolist()),
    "float16": raw(TensorProto.FLOAT16, W.tolist()),
    "bfloat16": raw(TensorProto.BFLOAT16, W.tolist()),
    "float8": raw(TensorProto.FLOAT8E4M3FN, SMALL),
    "int8": raw(TensorProto.INT8, SIGNED),
    "uint8": raw(TensorProto.UINT8, SMALL),
    "int16": raw(TensorProto.INT16, SIGNED),
    "int32": raw(TensorProto.INT32, SIGNED),
    "int64": raw(TensorProto.INT64, SIGNED),
    "bool": raw(TensorProto.BOOL, [k % 2 for k in range(FEATURES)]),
    "int4": four_bits,
    "Constant": constant_node,
    "Constant, value_floats": constant_list,
    "Constant, value_float": constant_number,
    "Constant, value_ints": constant_whole_numbers,
    "LinearClassifier": linear_classifier,
    "sparse": sparse,
    "subgraph": subgraph,
    "function": function,
}


# -- other files, written by protobuf alone ------------------------------------------------------


def changed(place: Place, folder: Path, share: float) -> bytes:
    """Return the message with other numbers in a share of its places, in `raw_data` where it is a tensor."""
    message = type(place.message)()
    message.CopyFrom(place.message)
    values = place.values(folder).copy()
    flat = values.reshape(-1)
    for index in range(0, flat.size, max(1, round(1 / share))):
        flat[index] = 1 - flat[index] if values.dtype == np.bool_ else flat[index] + flat.dtype.type(1)
    if isinstance(message, onnx.AttributeProto):
        message.ClearField(place.field)
        if values.ndim:
            getattr(message, place.field).extend(values.tolist())
        else:
            setattr(message, place.field, values.item())
    else:
        for name in (*VALUE_FIELDS, "external_data", "data_location"):
            message.ClearField(name)
        message.raw_data = numpy_helper.from_array(values).raw_data
    return message.SerializeToString(deterministic=True)


def repaired(model: Model, share: float = 0.1) -> bytes:
    """Return the bytes of the model with other numbers everywhere but in what it needs to run."""
    edits = {
        place.path: changed(place, model.path.parent, share)
        for place in find_places(model.proto)
        if place.label not in ("s", "W.indices") and not place.label.endswith("classlabels_ints")
    }
    assert edits
    return with_metadata(wire.splice(model.data, edits), {"version": "1", "method": "by hand", "verdict": "repaired"})


def written(patch: PatchFile) -> PatchFile:
    """Return a patch as it is read back from a file."""
    return parse(patch.to_bytes(), "p.safetensors")


def there_and_back(model: Model, result: bytes, folder: Path) -> PatchFile:
    """Make a patch file and check both directions, by bytes and on files."""
    patch = written(make_patch(model, result))
    assert patched(model, patch) == result
    (folder / "repaired.onnx").write_bytes(result)
    assert patched(load_model(folder / "repaired.onnx"), patch, revert=True) == model.data
    assert patch.manifest.old_sha256 == hashlib.sha256(model.data).hexdigest()
    assert patch.manifest.new_sha256 == hashlib.sha256(result).hexdigest()
    return patch


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["some", "all"])
@pytest.mark.parametrize("name", STORED)
def test_every_way_to_store_numbers(name: str, share: float, tmp_path: Path) -> None:
    model = save(STORED[name](), tmp_path)
    result = repaired(model, share)
    assert result != model.data
    there_and_back(model, result, tmp_path)


@pytest.mark.parametrize("name", [name for name in STORED if name != "LinearClassifier"])
def test_a_patch_is_no_larger_than_what_changes(name: str, tmp_path: Path) -> None:
    """Numbers are kept as numbers, in whatever field: nothing as large as the tensor goes in by the side."""
    model = save(STORED[name](), tmp_path)
    patch = written(make_patch(model, repaired(model)))
    assert patch.arrays["literal"].size < 150
    assert {tensor.label for tensor in patch.manifest.tensors} <= {place.label for place in find_places(model.proto)}


def external(folder: Path) -> Model:
    values = random(FEATURES)
    (folder / "w.bin").write_bytes(b"beside" + values.tobytes())
    proto = build(f"g ({X}) => (float[N, {FEATURES}] y) {{ v = Add (x, V)  y = Add (v, W) }}", {"V": W, "W": values})
    tensor = proto.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": 6, "length": values.nbytes}.items():
        tensor.external_data.add(key=key, value=str(value))
    return save(proto, folder)


@pytest.mark.parametrize("share", [0.1, 1.0], ids=["some", "all"])
def test_external_data_that_moves_into_the_file(share: float, tmp_path: Path) -> None:
    model = external(tmp_path)
    result = repaired(model, share)
    assert b"w.bin" in model.data and b"w.bin" not in result
    there_and_back(model, result, tmp_path)


# -- files that are laid out in unusual ways -----------------------------------------------------


def padded(content: bytes, number: int, width: int = 5) -> bytes:
    """Write a field whose length takes more bytes than it needs."""
    length = wire.write_varint(len(content))
    length = bytes([*(byte | 0x80 for byte in length), *[0x80] * (width - len(length) - 1), 0])
    return wire.write_varint(number << 3 | 2) + length + content


def with_graph(data: bytes, write: Callable[[bytes], bytes], *, first: bool = False) -> bytes:
    """Write the graph of a model in another way, or in front of everything else."""
    (graph,) = [(b, c, e) for n, b, c, e in wire.fields(data, 0, len(data)) if n == 7]
    rest = data[: graph[0]], write(data[graph[1] : graph[2]]), data[graph[2] :]
    return rest[1] + rest[0] + rest[2] if first else b"".join(rest)


def with_tensor(data: bytes, write: Callable[[bytes], bytes]) -> bytes:
    """Write the only initializer of a model in another way."""

    def graph(content: bytes) -> bytes:
        ((begin, start, stop),) = [(b, c, e) for n, b, c, e in wire.fields(content, 0, len(content)) if n == 5]
        return content[:begin] + write(content[start:stop]) + content[stop:]

    return with_graph(data, lambda content: wire.embed(7, graph(content)))


def fields_of(content: bytes) -> list[bytes]:
    return [content[begin:end] for _, begin, _, end in wire.fields(content, 0, len(content))]


def raw_padded(content: bytes) -> bytes:
    parts = [
        padded(content[c:e], n) if n == 9 else content[b:e] for n, b, c, e in wire.fields(content, 0, len(content))
    ]
    return wire.embed(5, b"".join(parts))


def unpacked(content: bytes) -> bytes:
    """Give every number of float_data a key of its own, as protobuf 2 did."""
    tensor = TensorProto.FromString(content)
    numbers = b"".join(bytes([4 << 3 | 5]) + np.float32(value).tobytes() for value in tensor.float_data)
    tensor.ClearField("float_data")
    return wire.embed(5, tensor.SerializeToString() + numbers)


def reverse(content: bytes) -> bytes:
    return wire.embed(5, b"".join(fields_of(content)[::-1]))


def unknown(data: bytes) -> bytes:
    """Add fields that no version of ONNX has."""
    return with_tensor(data + wire.embed(99, b"?"), lambda content: wire.embed(5, content + wire.embed(98, b"!")))


LAYOUTS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "length of the graph padded": ("float32", lambda data: with_graph(data, lambda graph: padded(graph, 7))),
    "length of the tensor padded": ("float32", lambda data: with_tensor(data, lambda content: padded(content, 5))),
    "length of the values padded": ("float32", lambda data: with_tensor(data, raw_padded)),
    "length of the graph padded, typed": ("float_data", lambda data: with_graph(data, lambda graph: padded(graph, 7))),
    "fields in reverse": ("float_data", lambda data: with_tensor(data, reverse)),
    "graph in front": ("float_data", lambda data: with_graph(data, lambda graph: wire.embed(7, graph), first=True)),
    "unknown fields": ("float_data", unknown),
    "not packed": ("float_data", lambda data: with_tensor(data, unpacked)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_way_to_lay_out_a_file(name: str, tmp_path: Path) -> None:
    stored, write = LAYOUTS[name]
    path = tmp_path / "model.onnx"
    plain = STORED[stored]().SerializeToString()
    path.write_bytes(write(plain))
    model = load_model(path)
    assert model.data != plain
    there_and_back(model, repaired(model), tmp_path)


def test_older_metadata_comes_back_where_it_was(tmp_path: Path) -> None:
    proto = STORED["float32"]()
    entries = [("onnxcare.version", "0"), ("author", "x"), ("onnxcare.seed", "é"), ("empty", ""), ("onnxcare.note", "")]
    for key, value in entries:
        proto.metadata_props.add(key=key, value=value)
    path = tmp_path / "model.onnx"
    # A file that protobuf has written again has the functions behind the metadata; here an unknown field is.
    path.write_bytes(proto.SerializeToString() + wire.embed(99, b"behind"))
    model = load_model(path)
    result = repaired(model)
    keys = [entry.key for entry in onnx.ModelProto.FromString(result).metadata_props]
    assert keys == ["author", "empty", "onnxcare.version", "onnxcare.method", "onnxcare.verdict"]
    there_and_back(model, result, tmp_path)


def test_metadata_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    odd = wire.embed(14, wire.embed(1, b"\xff\xfe") + wire.embed(2, b"\xfd"))
    ours = wire.embed(14, wire.embed(1, b"onnxcare.x") + wire.embed(2, b"\xfd"))
    path.write_bytes(STORED["float32"]().SerializeToString() + odd + ours)
    model = load_model(path)
    there_and_back(model, repaired(model), tmp_path)


def test_numbers_that_are_none_keep_their_bits(tmp_path: Path) -> None:
    proto = STORED["float_data"]()
    tensor = proto.graph.initializer[0]
    odd = np.array([0x7FC00001, 0xFFC12345, 0x80000000, 0x00000001], np.uint32).view(np.float32)
    tensor.raw_data = np.concatenate([odd, W[4:]]).tobytes()
    tensor.ClearField("float_data")
    model = save(proto, tmp_path)
    there_and_back(model, repaired(model, 1 / 60), tmp_path)
    there_and_back(model, repaired(model, 1.0), tmp_path)


def test_files_that_differ_in_more_than_numbers_are_refused(tmp_path: Path) -> None:
    model = save(STORED["float32"](), tmp_path)
    edits: list[Callable[[onnx.ModelProto], object]] = [
        lambda proto: setattr(proto, "producer_name", "me"),
        lambda proto: setattr(proto.graph.node[1], "op_type", "Sub"),
        lambda proto: proto.metadata_props.add(key="author", value="me"),
        lambda proto: proto.graph.node.append(helper.make_node("Relu", ["y"], ["z"])),
        lambda proto: proto.graph.initializer[0].dims.insert(0, 1),
    ]
    for edit in edits:
        other = onnx.ModelProto()
        other.CopyFrom(model.proto)
        edit(other)
        with pytest.raises(ModelError, match="more than values and metadata"):
            make_patch(model, other.SerializeToString())


def test_a_patch_that_does_not_lead_back_is_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file may come up with: that both directions are exact is tried, not believed."""
    model = save(STORED["float32"](), tmp_path)
    result = repaired(model)
    for wrong in ("new", "old"):
        made = {"new": result, "old": model.data, wrong: b"something else"}
        monkeypatch.setattr("onnxcare.patchfile.make.rebuilt", lambda *args, made=made: made[args[-1]])
        with pytest.raises(ModelError, match="no patch file can restore"):
            make_patch(model, result)


# -- what the file holds -------------------------------------------------------------------------


def test_the_file_holds_the_changed_values_in_their_type(tmp_path: Path) -> None:
    model = save(STORED["float16"](), tmp_path)
    old = W.astype(np.float16)
    arrays = load_safetensors(make_patch(model, repaired(model)).to_bytes())
    index = arrays["W/index"]
    np.testing.assert_array_equal(index, np.arange(0, FEATURES, 10))
    assert (index.dtype, arrays["W/old"].dtype) == (np.int32, np.float16)
    np.testing.assert_array_equal(arrays["W/old"], old[index])
    np.testing.assert_array_equal(arrays["W/new"], old[index] + np.float16(1))


def test_where_all_changes_there_are_no_indices(tmp_path: Path) -> None:
    proto = build(f"g ({X}) => (float[N, 4] y) {{ y = MatMul (x, W) }}", {"W": random(FEATURES, 4)})
    model = save(proto, tmp_path)
    arrays = load_safetensors(make_patch(model, repaired(model, 1.0)).to_bytes())
    assert sorted(arrays) == ["W/new", "W/old", "literal"]
    np.testing.assert_array_equal(arrays["W/old"], random(FEATURES, 4))
    np.testing.assert_array_equal(arrays["W/new"], random(FEATURES, 4) + 1)


def test_bfloat16_is_called_so_and_the_same_patch_is_the_same_file(tmp_path: Path) -> None:
    model = save(STORED["bfloat16"](), tmp_path)
    content = make_patch(model, repaired(model)).to_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert {header[f"W/{side}"]["dtype"] for side in ("old", "new")} == {"BF16"}
    manifest = json.loads(header["__metadata__"]["onnxcare.patch"])
    assert manifest["tensors"] == [{"label": "W", "path": [[7, 0], [5, 0]], "type": "BFLOAT16", "shape": [FEATURES]}]
    assert manifest["hunks"][-1]["new"] == [
        {"metadata": [["onnxcare.version", "1"], ["onnxcare.method", "by hand"], ["onnxcare.verdict", "repaired"]]}
    ]
    assert make_patch(model, repaired(model)).to_bytes() == content


# -- fix, apply, revert --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def patch_of_tiny(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """The tiny case, its repaired file and the patch in `p.safetensors`."""
    paths = write_case(tmp_path_factory.mktemp("patched"))
    assert fix(paths, "--patch", paths.folder / "p.safetensors").exit_code == 0
    return paths


def typed_fields(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values.reshape(-1).tolist()))


def constants(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        proto.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))
    del proto.graph.initializer[:]


def repaired_before(proto: onnx.ModelProto) -> None:
    for key in ("onnxcare.version", "author", "onnxcare.parent_sha256"):
        proto.metadata_props.add(key=key, value=f"of {key}")


@pytest.mark.parametrize("form", [typed_fields, constants, repaired_before])
def test_apply_gives_what_fix_wrote_and_revert_what_it_was_given(
    form: Callable[[onnx.ModelProto], None], tiny: Paths
) -> None:
    tiny.edit_model(form)
    patch, again, back = (tiny.folder / name for name in ("p.safetensors", "again.onnx", "back.onnx"))
    assert fix(tiny, "--patch", patch).exit_code == 0
    applied = api.apply(tiny.model, patch, again)
    assert again.read_bytes() == tiny.out.read_bytes()
    reverted = api.apply(tiny.out, patch, back, revert=True)
    assert back.read_bytes() == tiny.model.read_bytes()
    assert (applied.output_sha256, reverted.output_sha256) == tuple(
        hashlib.sha256(path.read_bytes()).hexdigest() for path in (again, back)
    )
    assert [item.name for item in applied.tensors] == [item.name for item in reverted.tensors]
    assert [item.largest for item in applied.tensors] == [item.largest for item in reverted.tensors]


def with_sidecar(paths: Paths) -> Path:
    """Move the weights of a case into a file beside it."""
    proto = onnx.load(paths.model)
    onnx.save_model(proto, paths.model, save_as_external_data=True, location="weights.bin", size_threshold=0)
    return paths.folder / "weights.bin"


def test_external_data_goes_along(tiny: Paths, tmp_path: Path) -> None:
    sidecar = with_sidecar(tiny)
    patch, elsewhere = tiny.folder / "p.safetensors", tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert fix(tiny, "--patch", patch, "--max-changed", 5).exit_code == 0
    api.apply(tiny.model, patch, elsewhere / "again.onnx")
    assert (elsewhere / "again.onnx").read_bytes() == tiny.out.read_bytes()
    assert (elsewhere / "weights.bin").read_bytes() == sidecar.read_bytes()
    api.apply(elsewhere / "again.onnx", patch, elsewhere / "again.onnx", revert=True, in_place=True)
    assert (elsewhere / "again.onnx").read_bytes() == tiny.model.read_bytes()
    (elsewhere / "weights.bin").unlink()
    before = contents(tmp_path)
    third = tmp_path / "third.onnx"
    result = onnxcare("apply", tiny.out, patch, "-o", third)
    check_refusal(result, 3, "is patched already")
    sidecar.rename(tiny.folder / "other.bin")
    result = onnxcare("apply", tiny.out, patch, "-o", third, "--revert")
    check_refusal(result, 3, "external data file weights.bin is missing")
    (tiny.folder / "other.bin").rename(sidecar)
    # The fingerprint of a model says nothing about what lies beside it.
    original = sidecar.read_bytes()
    sidecar.write_bytes(bytes(byte ^ 1 for byte in original))
    result = onnxcare("apply", tiny.model, patch, "-o", third)
    check_refusal(result, 3, "does not hold the values", "external data")
    sidecar.write_bytes(original)
    assert contents(tmp_path) == before


def test_in_place_and_back(patch_of_tiny: Paths, tmp_path: Path) -> None:
    patch, model = patch_of_tiny.folder / "p.safetensors", tmp_path / "model.onnx"
    model.write_bytes(patch_of_tiny.model.read_bytes())
    model.chmod(0o640)
    assert onnxcare("apply", model, patch, "--in-place").exit_code == 0
    assert model.read_bytes() == patch_of_tiny.out.read_bytes()
    result = onnxcare("apply", model, patch, "--in-place", "--revert")
    assert result.exit_code == 0
    assert f"reverted: {model}" in result.stdout
    assert model.read_bytes() == patch_of_tiny.model.read_bytes()
    assert model.stat().st_mode & 0o777 == 0o640


def test_a_repair_in_place_can_be_taken_back(tiny: Paths) -> None:
    patch, original = tiny.folder / "p.safetensors", tiny.model.read_bytes()
    result = onnxcare("fix", tiny.model, "--spec", tiny.spec, "--in-place", "--patch", patch, "--device", "cpu")
    assert result.exit_code == 0 and str(patch) in result.stdout
    assert tiny.model.read_bytes() != original
    assert onnxcare("apply", tiny.model, patch, "--in-place", "--revert").exit_code == 0
    assert tiny.model.read_bytes() == original


def test_no_patch_where_no_model_is_written(tmp_path: Path) -> None:
    paths = write_case(tmp_path, dense(backdoored=False))
    before = contents(tmp_path)
    result = fix(paths, "--patch", tmp_path / "p.safetensors", "--json", "-")
    assert json.loads(result.stdout)["patch_file"] is None
    assert contents(tmp_path) == before


def test_a_model_that_cannot_be_published_leaves_no_patch(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("onnxcare.api.publish", broken)
    before = contents(tiny.folder)
    check_refusal(fix(tiny, "--patch", tiny.folder / "p.safetensors"), 2, "No space left on device")
    assert contents(tiny.folder) == before


# -- refusals ------------------------------------------------------------------------------------


def test_the_wrong_model_is_named_with_both_fingerprints(patch_of_tiny: Paths, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(dense(backdoored=False).SerializeToString())
    shas = {
        path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (other, patch_of_tiny.model, patch_of_tiny.out)
    }
    patch, out = patch_of_tiny.folder / "p.safetensors", tmp_path / "out.onnx"
    for wrong, revert, expected in [
        (other, [], patch_of_tiny.model),
        (other, ["--revert"], patch_of_tiny.out),
        (patch_of_tiny.out, [], patch_of_tiny.model),
        (patch_of_tiny.model, ["--revert"], patch_of_tiny.out),
    ]:
        result = onnxcare("apply", wrong, patch, "-o", out, *revert)
        check_refusal(result, 3, wrong, patch, shas[wrong], shas[expected])
        assert ("already" in result.stderr) == (wrong != other)
    assert sorted(contents(tmp_path)) == ["other.onnx"]


def metadata_of(content: bytes) -> dict[str, str]:
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    """Return what changes the manifest of a patch file."""

    def damage(content: bytes) -> bytes:
        found = json.loads(metadata_of(content)["onnxcare.patch"])
        change(found)
        return save_safetensors(load_safetensors(content), {"onnxcare.patch": json.dumps(found)})

    return damage


def arrays(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[bytes], bytes]:
    """Return what changes the arrays of a patch file."""

    def damage(content: bytes) -> bytes:
        found = {name: values.copy() for name, values in load_safetensors(content).items()}
        change(found)
        return save_safetensors(found, metadata_of(content))

    return damage


def pieces(*new: dict[str, Any]) -> Callable[[bytes], bytes]:
    """Return what puts the first hunk of a patch file together of other pieces."""
    return manifest(lambda m: m["hunks"][0].update(new=new))


def tensor(**new: object) -> Callable[[bytes], bytes]:
    """Return what says something else about the first tensor of a patch file."""
    return manifest(lambda m: m["tensors"][0].update(new))


def first_index(arrays: dict[str, np.ndarray], value: int) -> None:
    next(values for name, values in arrays.items() if name.endswith("/index"))[0] = value


def shift(arrays: dict[str, np.ndarray]) -> None:
    next(values for name, values in arrays.items() if name.endswith("/new"))[0] += 1


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "not a patch file"),
    "truncated": (lambda content: content[:-3], "not a patch file"),
    "text": (lambda content: b"patch, please" * 9, "not a patch file"),
    "other tensors": (lambda content: save_safetensors({"a": np.zeros(3)}), "no patch that onnxcare has written"),
    "future": (manifest(lambda m: m.update(format_version=2)), "format version is 2"),
    "version in words": (manifest(lambda m: m.update(format_version="1")), "format version is '1'"),
    "no version": (manifest(lambda m: m.pop("format_version")), "'format_version' is missing"),
    "no json": (lambda content: save_safetensors(load_safetensors(content), {"onnxcare.patch": "{"}), "damaged"),
    "a list": (lambda content: save_safetensors(load_safetensors(content), {"onnxcare.patch": "[1]"}), "damaged"),
    "unknown key": (manifest(lambda m: m.update(extra=1)), "extra of its manifest"),
    "unknown piece": (pieces({"shell": "rm"}), "damaged"),
    "unknown field": (pieces({"values": 0, "field": "name"}), "damaged"),
    "no such tensor": (pieces({"values": 9, "field": "raw_data"}), "damaged"),
    "elsewhere": (tensor(path=[[7, 0], [5, 77]]), "there is no tensor where"),
    "behind the end": (manifest(lambda m: m["hunks"][0].update(old_at=[0, 10**9])), "not in the model"),
    "backwards": (manifest(lambda m: m["hunks"].reverse()), "not in the model"),
    "other shape": (tensor(shape=[3]), "damaged"),
    "other type": (tensor(type="DOUBLE"), "do not fit together"),
    "fewer hunks": (manifest(lambda m: m["hunks"].pop()), "SHA-256"),
    "other values": (arrays(shift), "SHA-256"),
    "no values": (arrays(lambda a: a.pop(next(name for name in a if name.endswith("/new")))), "damaged"),
    "no literal": (arrays(lambda a: a.pop("literal")), "'literal' is missing"),
    "index behind the end": (arrays(lambda a: first_index(a, 10**6)), "damaged"),
    "negative index": (arrays(lambda a: first_index(a, -1)), "negative"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_patch_is_explained(name: str, patch_of_tiny: Paths, tmp_path: Path) -> None:
    damage, words = DAMAGES[name]
    patch = tmp_path / "p.safetensors"
    patch.write_bytes(damage((patch_of_tiny.folder / "p.safetensors").read_bytes()))
    result = onnxcare("apply", patch_of_tiny.model, patch, "-o", tmp_path / "out.onnx")
    check_refusal(result, 3, patch, words)
    assert sorted(contents(tmp_path)) == ["p.safetensors"]


def test_no_bit_of_a_patch_can_change_unseen(patch_of_tiny: Paths, tmp_path: Path) -> None:
    """Whatever becomes of the file, what is written is the repaired file, or nothing."""
    content = (patch_of_tiny.folder / "p.safetensors").read_bytes()
    model, expected = load_model(patch_of_tiny.model), patch_of_tiny.out.read_bytes()
    refused = 0
    for at in np.random.default_rng(5).integers(len(content), size=120):
        spoilt = bytearray(content)
        spoilt[at] ^= 4
        try:
            assert patched(model, parse(bytes(spoilt), "p")) == expected
        except (DataError, ModelError):
            refused += 1
    assert refused > 60


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (["apply", "{model}", "nowhere.safetensors", "-o", "x.onnx"], 3, "nowhere.safetensors: no such file"),
        (["apply", "{model}", "{folder}", "-o", "x.onnx"], 3, "is a folder"),
        (["apply", "nowhere.onnx", "{patch}", "-o", "x.onnx"], 3, "nowhere.onnx: no such file"),
        (["apply", "{model}", "{patch}", "-o", "{patch}"], 2, "is an input of this run"),
        (["apply", "{model}", "{patch}", "-o", "{model}"], 2, "use --in-place"),
        (["apply", "{model}", "{patch}", "-o", "{folder}/no/x.onnx"], 2, "does not exist"),
    ],
)
def test_apply_says_what_cannot_be_done(args: list[str], code: int, words: str, patch_of_tiny: Paths) -> None:
    before = contents(patch_of_tiny.folder)
    known = {
        "model": patch_of_tiny.model,
        "folder": patch_of_tiny.folder,
        "patch": patch_of_tiny.folder / "p.safetensors",
    }
    check_refusal(onnxcare(*(arg.format(**known) for arg in args)), code, words)
    assert contents(patch_of_tiny.folder) == before


@pytest.mark.parametrize("name", ["model.onnx", "care.yaml", "repair.npz", "repaired.onnx", "report.json", "no/p", "."])
def test_a_patch_file_overwrites_nothing_of_the_run(name: str, tiny: Paths) -> None:
    before = contents(tiny.folder)
    result = fix(tiny, "--patch", tiny.folder / name, "--json", tiny.folder / "report.json")
    check_refusal(result, 2)
    assert contents(tiny.folder) == before


def test_a_patch_file_overwrites_no_external_data(tiny: Paths) -> None:
    sidecar = with_sidecar(tiny)
    before = contents(tiny.folder)
    check_refusal(fix(tiny, "--patch", sidecar), 2, sidecar)
    assert contents(tiny.folder) == before


# -- the page about them -------------------------------------------------------------------------


def test_the_page_about_patches_is_true(patch_of_tiny: Paths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[1] / "docs/how-to/patches.md").read_text(encoding="utf-8")
    lines = "".join(re.findall(r"```sh\n(.*?)```", page, re.DOTALL)).splitlines()
    assert "--patch repair.safetensors" in lines[0]  # that has been done
    shutil.copytree(patch_of_tiny.folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    Path("p.safetensors").rename("repair.safetensors")
    for line in lines[1:]:
        command, _, code = line.partition("  # exits with ")
        result = onnxcare(*shlex.split(command)[1:])
        assert result.exit_code == int(code or 0), (line, result.output)
    assert Path("again.onnx").read_bytes() == Path("repaired.onnx").read_bytes()
    assert Path("original.onnx").read_bytes() == Path("model.onnx").read_bytes()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(example, {})
    assert "second.weight/old float32" in shown.getvalue()
