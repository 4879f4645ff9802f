"""`diff`: what differs between two files, in their tensors, their other parts and their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import build, random
from helpers import CARRIERS, Paths, answers, check_refusal, clean_samples, contents, dense, onnxcare, weights
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import onnxcare as api
from onnxcare.comparison import Diff

Array = np.ndarray
WEAKER = np.float32(0.5)


def written(folder: Path, name: str, proto: onnx.ModelProto) -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def weakened(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Take half of what speaks for class 0 in the tiny model, so that some answers change."""
    (tensor,) = (item for item in proto.graph.initializer if item.name == "second.weight")
    values = numpy_helper.to_array(tensor).copy()
    values[0, 0] *= WEAKER
    values[0, 1] = np.nextafter(values[0, 1], np.float32(9))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return proto


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """The tiny model, and one with two other values."""
    return written(tmp_path, "a.onnx", dense()), written(tmp_path, "b.onnx", weakened(dense()))


# -- tensors -------------------------------------------------------------------------------------


def test_a_file_and_its_copy_hold_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(pair[0].read_bytes())
    found = api.diff(pair[0], copy)
    assert (found.same, found.exit_code, found.tensors, found.parts, found.places) == (True, 0, [], [], 4)
    result = onnxcare("diff", pair[0], copy)
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1] == "they hold the same"


def test_how_much_a_tensor_differs(pair: tuple[Path, Path]) -> None:
    old = weights()["second.weight"].astype(float)
    new = old.copy()
    new[0, 0] *= 0.5
    new[0, 1] = np.nextafter(weights()["second.weight"][0, 1], np.float32(9))
    found = api.diff(*pair)
    (change,) = found.tensors
    assert (change.name, change.shape, change.changed, change.size) == ("second.weight", (4, 16), 2, 64)
    assert change.largest == old[0, 0] / 2
    assert change.norm == pytest.approx(np.sqrt(((new - old) ** 2).sum()), rel=1e-12)
    assert change.relative == pytest.approx(change.norm / np.sqrt((old**2).sum()), rel=1e-12)
    assert (found.parts, found.behaviour, found.check, found.exit_code) == ([], None, None, 1)
    result = onnxcare("diff", *pair)
    assert result.exit_code == 1
    assert "2 of 64" in result.stdout and "they differ: 1 of 4 tensors" in result.stdout


def stored_otherwise(proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        values = numpy_helper.to_array(tensor)
        tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, values.shape, values.reshape(-1).tolist()))


def test_only_how_a_file_is_written_differs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    proto = dense()
    stored_otherwise(proto)
    other = written(tmp_path, "other.onnx", proto)
    assert other.read_bytes() != pair[0].read_bytes()
    result = onnxcare("diff", pair[0], other)
    assert result.exit_code == 0
    assert "they hold the same; only how they are written differs" in result.stdout


def test_values_beside_the_files_are_compared(tmp_path: Path) -> None:
    paths = []
    for name, values in (("a", [1, 2, 3]), ("b", [1, 5, 3]), ("c", [1, 2, 3])):
        folder = tmp_path / name
        folder.mkdir()
        proto = build("g (float[N, 3] x) => (float[N, 3] y) { y = Add (x, W) }", {"W": np.float32(values)})
        path = folder / "model.onnx"
        onnx.save_model(proto, path, save_as_external_data=True, location="w.bin", size_threshold=0)
        paths.append(path)
    (change,) = api.diff(paths[0], paths[1]).tensors
    assert (change.name, change.changed, change.largest) == ("W", 1, 3)
    assert api.diff(paths[0], paths[2]).same
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_no_number_is_the_same_as_itself(tmp_path: Path) -> None:
    def holding(*values: float) -> onnx.ModelProto:
        return build("g (float[N, 3] x) => (float[N, 3] y) { y = Add (x, W) }", {"W": np.float32(values)})

    a, b, c = (
        written(tmp_path, name, holding(*values))
        for name, values in (("a", (np.nan, np.inf, 0)), ("b", (np.nan, np.inf, 0)), ("c", (np.nan, np.inf, -0.0)))
    )
    assert api.diff(a, b).same
    (change,) = api.diff(a, c).tensors
    assert change.changed == 1
    shown = json.loads(onnxcare("diff", a, c, "--format", "json").stdout)["tensors"][0]
    assert (shown["changed"], shown["norm"], shown["largest"], shown["relative"]) == (1, 0, 0, None)


def test_numbers_everywhere_are_compared(tmp_path: Path) -> None:
    def model(value: float) -> onnx.ModelProto:
        proto = build(
            "g (float[N, 2] x, bool c) => (float[N, 2] y) { k = Constant <value_floats = [1.0, 2.0]> ()"
            "  a = Add (x, k)  b = com.acme.shift (a)  y = If (c) <then_branch = t () => (float[N, 2] o)"
            " { w = Constant <value = float[2] {1, 2}> ()  o = Add (b, w) },"
            " else_branch = e () => (float[N, 2] p) { p = Identity (b) }> }"
        )
        proto.opset_import.append(helper.make_opsetid("com.acme", 1))
        body = [
            helper.make_node("Constant", [], ["s"], value=numpy_helper.from_array(np.float32([value]))),
            helper.make_node("Add", ["a", "s"], ["r"]),
        ]
        imports = [helper.make_opsetid("", 17)]
        proto.functions.append(helper.make_function("com.acme", "shift", ["a"], ["r"], body, imports))
        proto.graph.node[0].attribute[0].floats[1] = value
        (branch,) = (item.g for item in proto.graph.node[3].attribute if item.name == "then_branch")
        branch.node[0].attribute[0].t.CopyFrom(numpy_helper.from_array(np.float32([1, value])))
        return proto

    found = api.diff(written(tmp_path, "a", model(2)), written(tmp_path, "b", model(5)))
    assert {change.name: (change.changed, change.largest) for change in found.tensors} == {
        "Constant k": (1, 3),
        "y/then_branch/Constant w": (1, 3),
        "function com.acme.shift/Constant s": (1, 3),
    }
    assert found.parts == []


# -- other parts ---------------------------------------------------------------------------------


def node(proto: onnx.ModelProto, name: str) -> onnx.NodeProto:
    (found,) = (item for item in proto.graph.node if item.name == name)
    return found


def swap(proto: onnx.ModelProto) -> None:
    first = proto.graph.initializer[0]
    copied = TensorProto()
    copied.CopyFrom(first)
    del proto.graph.initializer[0]
    proto.graph.initializer.append(copied)


def insert(proto: onnx.ModelProto) -> None:
    proto.graph.node.insert(2, helper.make_node("Identity", ["hidden"], ["again"]))
    node(proto, "second").input[0] = "again"


def reshape(proto: onnx.ModelProto) -> None:
    bias = proto.graph.initializer[1]
    bias.dims.insert(0, 1)


def narrow(proto: onnx.ModelProto) -> None:
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 5


EDITS: dict[str, tuple[Callable[[onnx.ModelProto], object], list[str]]] = {
    "format": (lambda p: setattr(p, "ir_version", 9), ["ir_version 8 -> 9"]),
    "producer": (lambda p: setattr(p, "producer_name", "me"), ["producer_name '' -> 'me'"]),
    "documentation": (lambda p: setattr(p.graph, "doc_string", "hi"), ["graph: doc_string '' -> 'hi'"]),
    "opset": (lambda p: setattr(p.opset_import[0], "version", 18), ["operator set 'ai.onnx': version 17 -> 18"]),
    "another opset": (
        lambda p: p.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3)),
        ["operator set 'ai.onnx.ml': added, version 3"],
    ),
    "metadata": (lambda p: p.metadata_props.add(key="who", value="me"), ["metadata 'who': added, 'me'"]),
    "operator": (lambda p: setattr(node(p, "relu"), "op_type", "Elu"), ["node 'relu' (Relu): op_type 'Relu' -> 'Elu'"]),
    "attribute": (
        lambda p: node(p, "first").attribute.append(helper.make_attribute("alpha", 0.5)),
        ["node 'first' (Gemm), attribute 'alpha': added"],
    ),
    "value of an attribute": (
        lambda p: setattr(p.graph.node[3].attribute[0], "f", 2.0),
        ["node 'elu' (Elu), attribute 'alpha': f 1.0 -> 2.0"],
    ),
    "node": (
        insert,
        ["node 'second' (Gemm): input ['hidden', 'second.weight', 'second.bias'] -> ['again', 'second.weight', "
         "'second.bias']", "node 'again' (Identity): added"],
    ),
    "order": (swap, ["graph: initializer in another order"]),
    "shape": (reshape, ["initializer 'first.bias': dims [16] -> [1, 16]"]),
    "signature": (narrow, ["input 'input': float[batch, 8] -> float[5, 8]"]),
    "a tensor more": (
        lambda p: p.graph.initializer.append(numpy_helper.from_array(random(2), "extra")),
        ["initializer 'extra': added"],
    ),
    "more numbers": (lambda p: p.graph.node[4].attribute[0].floats.append(3), ["node 'unused' (Constant), attribute "
        "'value_floats': 2 numbers -> 3"]),
    "training": (
        lambda p: p.training_info.add().initialization.initializer.append(numpy_helper.from_array(random(3), "T")),
        ["training_info differs"],
    ),
    "text": (lambda p: p.graph.initializer[4].string_data.append(b"b"), ["initializer 'words': string_data [b'a'] -> "
        "[b'a', b'b']"]),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_other_parts_are_named(name: str, tmp_path: Path) -> None:
    edit, words = EDITS[name]
    proto = dense()
    proto.graph.node.append(helper.make_node("Elu", ["hidden"], ["more"], "elu", alpha=1.0))
    proto.graph.node.append(helper.make_node("Constant", [], ["numbers"], "unused", value_floats=[1.0, 2.0]))
    proto.graph.initializer.append(
        TensorProto(name="words", data_type=TensorProto.STRING, dims=[1], string_data=[b"a"])
    )
    a = written(tmp_path, "a.onnx", proto)
    edit(proto)
    if name == "text":
        proto.graph.initializer[4].dims[0] = 2
        words = ["initializer 'words': dims [1] -> [2]", *words]
    b = written(tmp_path, "b.onnx", proto)
    found = api.diff(a, b)
    assert (found.parts, found.tensors) == (words, [])
    if name == "node":
        words = ["node 'again' (Identity): added"]  # the other line is folded
    result = onnxcare("diff", a, b)
    assert result.exit_code == 1
    assert all(word in result.stdout for word in words), result.stdout
    removed = [part for part in api.diff(b, a).parts if "removed" in part]
    assert len(removed) == sum("added" in word for word in words)


def test_many_differences_are_counted(tmp_path: Path) -> None:
    a = written(tmp_path, "a.onnx", dense())
    proto = dense()
    for number in range(30):
        proto.metadata_props.add(key=f"key {number}", value="[bold]")
    b = written(tmp_path, "b.onnx", proto)
    shown = onnxcare("diff", a, b).stdout
    assert "metadata 'key 19': added, '[bold]'" in shown and "key 20" not in shown
    assert "... and 10 more differences" in shown
    assert len(json.loads(onnxcare("diff", a, b, "--format", "json").stdout)["parts"]) == 30


# -- answers -------------------------------------------------------------------------------------


def scores(path: Path, x: Array) -> Array:
    return ReferenceEvaluator(onnx.load(path)).run(None, {"input": x})[0]


def compared(pair: tuple[Path, Path], data: Path) -> Diff:
    return api.diff(*pair, data=data, device="cpu")


def test_answers_on_labelled_data(pair: tuple[Path, Path], tmp_path: Path) -> None:
    samples = clean_samples(300, seed=9)
    np.savez(tmp_path / "data.npz", **samples)
    x, y = samples["input"], samples["y"]
    before, after = (answers(path, x) for path in pair)
    assert 0 < (before != after).sum() < 300
    found = compared(pair, tmp_path / "data.npz").behaviour
    assert found is not None and found.answers is not None and found.kept is not None
    assert (found.samples, found.answers.count, found.answers.total) == (300, (before != after).sum(), 300)
    largest = np.abs(scores(pair[0], x) - scores(pair[1], x)).max()
    assert found.largest == {"scores": pytest.approx(largest, rel=1e-5)}
    accuracy = found.kept.measure("accuracy")
    assert accuracy.value_before == (before == y).mean()
    assert accuracy.value == (after == y).mean()
    for label in range(4):
        recall = found.kept.measure(f"recall of class {label}")
        assert recall.value_before == (before == y)[y == label].mean()
        assert recall.value == (after == y)[y == label].mean()
    assert {item.status for item in found.kept.measures} == {"info"}
    shown = onnxcare("diff", *pair, "--data", tmp_path / "data.npz", "--device", "cpu").stdout
    changed = [k for k in range(4) if ((before == y) != (after == y))[y == k].any()]
    assert [f"recall of class {k}: " in shown for k in range(4)] == [k in changed for k in range(4)]
    assert f"({(before != after).sum()}/300)" in shown


def test_answers_on_data_without_labels(pair: tuple[Path, Path], tmp_path: Path) -> None:
    x = clean_samples(100, seed=9)["input"]
    np.savez(tmp_path / "data.npz", x=x)
    found = compared(pair, tmp_path / "data.npz").behaviour
    assert found is not None and found.answers is not None
    assert found.answers.count == (answers(pair[0], x) != answers(pair[1], x)).sum()
    assert found.kept is None


def test_outputs_that_are_no_scores(tmp_path: Path) -> None:
    def model(shift: float) -> onnx.ModelProto:
        text = (
            "g (float[N, 3] x) => (float[N, 1, 3] y, int64[N, 1] z) { a = Add (x, W)  y = Unsqueeze (a, axis)"
            "  z = ArgMax <axis = 1> (a) }"
        )
        return build(text, {"W": np.float32([shift, 0, 0]), "axis": np.int64([1])})

    a, b = written(tmp_path, "a.onnx", model(0)), written(tmp_path, "b.onnx", model(1.5))
    np.savez(tmp_path / "data.npz", x=np.float32([[0, 1, 3], [1, 2, 0]]), y=np.float32([0.5, 0.5]))
    found = api.diff(a, b, data=tmp_path / "data.npz", device="cpu").behaviour
    assert found is not None
    # The second row answers 0 instead of 1 with 1.5 more.
    assert (found.largest, found.answers, found.kept) == ({"y": 1.5, "z": 1}, None, None)


def test_with_a_spec_the_judge_measures_both(tiny: Paths) -> None:
    better = written(tiny.folder, "better.onnx", dense(backdoored=False))
    found = api.diff(tiny.model, better, spec=tiny.spec, data=tiny.data, device="cpu")
    assert [change.changed for change in found.tensors] == [len(CARRIERS)]
    assert found.check is not None and found.check.verdict is not None
    expected = api.check(better, tiny.spec, baseline=tiny.model, device="cpu")
    assert found.check.verdict == expected.verdict
    success = found.check.verdict.properties[0].measure("attack success rate")
    assert (success.value_before, success.value) == (1, 0)
    result = onnxcare("diff", tiny.model, better, "--spec", tiny.spec, "--format", "json", "--device", "cpu")
    shown = json.loads(result.stdout)
    assert result.exit_code == 1
    assert (shown["same"], shown["check"]["status"], shown["behaviour"]) == (False, "pass", None)
    result = onnxcare("diff", tiny.model, better, "--spec", tiny.spec, "--device", "cpu")
    assert "attack success rate" in result.stdout and "they differ" in result.stdout


def test_a_spec_says_how_answers_are_read(tiny: Paths, pair: tuple[Path, Path]) -> None:
    tiny.rewrite("seed: 1", "seed: 1\nlabels: truth\ndecision: argmin")
    samples = clean_samples(100, seed=9)
    for path in (tiny.data, tiny.holdout):
        with np.load(path) as held:
            lowest = scores(pair[0], held["input"]).argmin(axis=1)
        tiny.edit(path, truth=lowest)
    tiny.rewrite("target: 1", "target: 0")
    np.savez(tiny.folder / "data.npz", input=samples["input"], truth=scores(pair[0], samples["input"]).argmin(axis=1))
    found = api.diff(*pair, spec=tiny.spec, data=tiny.folder / "data.npz", device="cpu").behaviour
    assert found is not None and found.kept is not None
    assert found.kept.measure("accuracy").value_before == 1


@pytest.mark.parametrize(
    ("other", "code", "words"),
    [
        ("missing.onnx", 3, ["missing.onnx", "no such file"]),
        ("text.onnx", 3, ["text.onnx", "not an ONNX file"]),
        ("wide.onnx", 3, ["cannot be compared"]),
        ("more.onnx", 3, ["more.onnx", "[600, 5]", "[600, 4]"]),
    ],
)
def test_models_whose_answers_cannot_be_compared(other: str, code: int, words: list[str], tiny: Paths) -> None:
    (tiny.folder / "text.onnx").write_text("hello")
    wide = build(
        "g (float[batch, 9] input) => (float[batch, 4] scores) { scores = MatMul (input, W) }", {"W": random(9, 4)}
    )
    written(tiny.folder, "wide.onnx", wide)
    more = build(
        "g (float[batch, 8] input) => (float[batch, k] scores) { scores = MatMul (input, W) }", {"W": random(8, 5)}
    )
    written(tiny.folder, "more.onnx", more)
    before = contents(tiny.folder)
    check_refusal(
        onnxcare("diff", tiny.model, tiny.folder / other, "--data", tiny.data, "--device", "cpu"), code, *words
    )
    assert contents(tiny.folder) == before
    if other in ("wide.onnx", "more.onnx"):
        assert onnxcare("diff", tiny.model, tiny.folder / other).exit_code == 1


def test_data_that_does_not_fit(tiny: Paths) -> None:
    other = written(tiny.folder, "other.onnx", weakened(dense()))
    np.savez(tiny.folder / "bad.npz", input=np.zeros((5, 7), np.float32))
    check_refusal(
        onnxcare("diff", tiny.model, other, "--data", tiny.folder / "bad.npz", "--device", "cpu"),
        3,
        "bad.npz",
        "[5, 7]",
    )
    np.savez(tiny.folder / "bad.npz", input=np.zeros((5, 8), np.float32), y=np.arange(5))
    check_refusal(
        onnxcare("diff", tiny.model, other, "--data", tiny.folder / "bad.npz", "--device", "cpu"), 3, "classes 0 to 3"
    )
