"""Everything a user can get wrong ends with an exit code and a plain sentence, and leaves every file as it was."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hidden
import kinds
import numpy as np
import onnx
import pytest
from helpers import (
    CARRIERS,
    CLASSES,
    FEATURES,
    SPEC,
    TARGET,
    Paths,
    check_refusal,
    clean_samples,
    contents,
    dense,
    fix,
    onnxcare,
    trigger_arrays,
    triggered_samples,
    weights,
    write_case,
)
from onnx import TensorProto, helper, numpy_helper

from onnxcare.errors import ModelError
from onnxcare.graph.model import load_model

Spoil = Callable[[Paths], object]
Array = np.ndarray


def refuses(paths: Paths, spoil: Spoil, code: int, *words: object, args: tuple[object, ...] = ()) -> None:
    """Spoil a case, run `fix` on it and check the refusal."""
    spoil(paths)
    before = contents(paths.folder)
    check_refusal(fix(paths, *args), code, *words)
    assert contents(paths.folder) == before


def bad(name: str, spoil: Spoil, *words: str) -> Any:
    return pytest.param(spoil, words, id=name)


# -- models --------------------------------------------------------------------------------------


def holding(content: bytes) -> Spoil:
    return lambda paths: paths.model.write_bytes(content)


def cut(share: float) -> Spoil:
    def spoil(paths: Paths) -> None:
        whole = paths.model.read_bytes()
        paths.model.write_bytes(whole[: int(share * len(whole))])

    return spoil


def edited(change: Callable[[onnx.ModelProto], object]) -> Spoil:
    return lambda paths: paths.edit_model(change)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


def opset(version: int) -> Spoil:
    return edited(lambda proto: setattr(proto.opset_import[0], "version", version))


def foreign_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].op_type, proto.graph.node[1].domain = "Squash", "com.acme"
    proto.opset_import.append(helper.make_opsetid("com.acme", 1))


def set_weight(proto: onnx.ModelProto, name: str, values: Array) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), name))


def infinite_weights(proto: onnx.ModelProto) -> None:
    values = weights()["second.weight"]
    values[:, 0], values[:, 2] = np.inf, -np.inf
    set_weight(proto, "second.weight", values)


def overflowing_weights(proto: onnx.ModelProto) -> None:
    values = weights()["second.weight"]
    values[:, CARRIERS] = 3e38  # silent on clean samples, infinite on triggered ones
    set_weight(proto, "second.weight", values)


def one_score(proto: onnx.ModelProto) -> None:
    set_weight(proto, "second.weight", weights()["second.weight"][:1])
    set_weight(proto, "second.bias", weights()["second.bias"][:1])
    proto.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 1


def two_value_fields(proto: onnx.ModelProto) -> None:
    proto.graph.initializer[0].float_data.extend([0.0] * proto.graph.initializer[0].dims[0] * FEATURES)


def shorter_raw(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "first.weight")
    tensor.raw_data = tensor.raw_data[:-4]


def shapeless_typed(proto: onnx.ModelProto) -> None:
    tensor = next(tensor for tensor in proto.graph.initializer if tensor.name == "first.bias")
    values = numpy_helper.to_array(tensor)
    tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, tensor.dims, values.tolist()))
    del tensor.dims[:]


def external(paths: Paths) -> Path:
    sidecar = paths.folder / "weights.bin"
    onnx.save_model(
        onnx.load(paths.model), paths.model, save_as_external_data=True, location=sidecar.name, size_threshold=16
    )
    return sidecar


def external_by_no_text(paths: Paths) -> None:
    external(paths)
    content = paths.model.read_bytes()
    assert b"weights.bin" in content
    paths.model.write_bytes(content.replace(b"weights.bin", b"weights.\xff\xfe\xff"))


def external_at(key: str, value: str) -> Spoil:
    def spoil(paths: Paths) -> None:
        external(paths)
        proto = onnx.load(paths.model, load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == key:
                    entry.value = value
        paths.model.write_bytes(proto.SerializeToString())

    return spoil


MODELS = [
    bad("missing", lambda paths: paths.model.unlink(), "no such file"),
    bad("folder", lambda paths: folder_instead(paths.model), "is a folder"),
    bad("empty", holding(b""), "the file is empty"),
    bad("text", holding(b"model: this is not onnx\n"), "not an ONNX"),
    bad("yaml", lambda paths: shutil.copy(paths.spec, paths.model), "not an ONNX"),
    bad("npz", lambda paths: shutil.copy(paths.data, paths.model), "not an ONNX"),
    bad("random bytes", holding(np.random.default_rng(3).bytes(2000)), "not an ONNX"),
    *[bad(f"cut at {share}", cut(share), "truncated") for share in (0.05, 0.3, 0.6, 0.9, 0.999)],
    bad("IR 14", edited(lambda proto: setattr(proto, "ir_version", 14)), "IR version 14", "at most"),
    bad("opset 28", opset(28), "opset 28", "at most"),
    bad("opset 6", opset(6), "cannot load", "Gemm"),
    bad("unknown operator", edited(foreign_operator), "Squash", "com.acme"),
    bad("unknown input", edited(lambda proto: proto.graph.node.pop(0)), "'first'"),
    bad("operator that is no text", holding(dense().SerializeToString().replace(b"Relu", b"Re\xffu")), "cannot load"),
    bad("input that is no text", holding(dense().SerializeToString().replace(b"input", b"inp\xfft")), "cannot load"),
    bad("node that is no text", holding(dense().SerializeToString().replace(b"relu", b"re\xffu")), "taken apart"),
    bad("one score", edited(one_score), "no output with one score per class", "scores"),
    bad("fewer values than the shape says", edited(shorter_raw), "first.weight", "damaged", "[16, 8]"),
    bad("more values than the shape says", edited(shapeless_typed), "first.bias", "damaged", "[]"),
    bad("external data missing", lambda paths: external(paths).unlink(), "weights.bin", "missing"),
    bad("external data cut", lambda paths: external(paths).write_bytes(b"1234"), "cannot load", "External"),
    bad("external data nowhere", external_at("offset", "banana"), "external data"),
    bad("external data without a name", external_at("location", ""), "missing"),
    bad("external data with a zero byte", external_at("location", "weights\0.bin"), "no name of a file"),
    bad("external data with a long name", external_at("location", "w" * 5000), "no name of a file"),
    bad("external data that is no text", external_by_no_text, "no name of a file"),
    bad("external data outside", external_at("location", "../weights.bin"), "outside", "../weights.bin"),
]


@pytest.mark.parametrize(("spoil", "words"), MODELS)
def test_model(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 3, tiny.model, *words)


@pytest.mark.parametrize("command", ["inspect", "locate"])
def test_other_commands_explain_models_too(tiny: Paths, command: str) -> None:
    tiny.model.write_bytes(tiny.model.read_bytes()[:500])
    spec = () if command == "inspect" else ("--spec", tiny.spec, "--device", "cpu")
    check_refusal(onnxcare(command, tiny.model, *spec), 3, tiny.model, "truncated")


def test_model_cut_anywhere(tmp_path: Path) -> None:
    whole, path = dense().SerializeToString(), tmp_path / "model.onnx"
    for size in range(1, len(whole), 41):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=r"model\.onnx: "):
            load_model(path)


def test_values_in_two_fields(tiny: Paths) -> None:
    refuses(tiny, edited(two_value_fields), 3, tiny.model, "'first.weight'", "two fields")
    check_refusal(onnxcare("inspect", tiny.model), 3, tiny.model, "'first.weight'", "two fields")


def test_answers_of_nan(tiny: Paths) -> None:
    refuses(tiny, edited(infinite_weights), 3, tiny.model, "NaN or infinity", tiny.data)


def test_answers_of_infinity_on_triggered_samples(tiny: Paths) -> None:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        refuses(tiny, edited(overflowing_weights), 3, tiny.model, "NaN or infinity")
    assert not seen


def unrepairable(nodes: list[onnx.NodeProto], tensors: dict[str, Array], ml: bool = False) -> onnx.ModelProto:
    """Return a model with the tiny one's signature."""
    domains = [helper.make_opsetid("", 17)] + [helper.make_opsetid("ai.onnx.ml", 3)] * ml
    graph = helper.make_graph(
        nodes,
        "unrepairable",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", FEATURES])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=domains)


def tree() -> onnx.ModelProto:
    """Feature 7 above 1.5 leads to class 1, everything else to class 0."""
    node = helper.make_node(
        "TreeEnsembleClassifier",
        ["input"],
        ["label", "scores"],
        domain="ai.onnx.ml",
        name="tree",
        classlabels_int64s=list(range(CLASSES)),
        class_ids=[0, 1],
        class_nodeids=[1, 2],
        class_treeids=[0, 0],
        class_weights=[1.0, 1.0],
        nodes_falsenodeids=[2, 0, 0],
        nodes_truenodeids=[1, 0, 0],
        nodes_featureids=[7, 0, 0],
        nodes_modes=["BRANCH_LEQ", "LEAF", "LEAF"],
        nodes_nodeids=[0, 1, 2],
        nodes_treeids=[0, 0, 0],
        nodes_values=[1.5, 0.0, 0.0],
        post_transform="NONE",
    )
    return unrepairable([node], {}, ml=True)


def no_layer() -> onnx.ModelProto:
    """Classes are features 0 and 7 and two more: nothing is multiplied."""
    node = helper.make_node("Gather", ["input", "columns"], ["scores"], name="gather", axis=1)
    return unrepairable([node], {"columns": np.array([0, 7, 2, 3])})


def shared_weights() -> onnx.ModelProto:
    """One matrix in both layers, so that neither can be rewritten alone."""
    square = np.eye(FEATURES, dtype=np.float32)
    nodes = [
        helper.make_node("MatMul", ["input", "square"], ["first"], name="first"),
        helper.make_node("MatMul", ["first", "square"], ["second"], name="second"),
        helper.make_node("Gather", ["second", "columns"], ["scores"], name="gather", axis=1),
    ]
    return unrepairable(nodes, {"square": square, "columns": np.array([0, 7, 2, 3])})


@pytest.mark.parametrize("method", ["auto", "care"])
@pytest.mark.parametrize(
    ("model", "why"), [(tree, "trees compare"), (no_layer, "Gemm, MatMul or Conv")], ids=["tree ensemble", "no layer"]
)
def test_nothing_that_can_be_repaired(
    tmp_path: Path, model: Callable[[], onnx.ModelProto], why: str, method: str
) -> None:
    paths = write_case(tmp_path, model())
    refuses(paths, lambda paths: None, 3, paths.model, why, args=("--method", method))


@pytest.mark.parametrize("method", ["care", "ai-lancet-flip", "ai-lancet-finetune", "clp", "fine-pruning"])
def test_shared_weights_are_refused_by_methods_that_change_one_layer(tmp_path: Path, method: str) -> None:
    paths = write_case(tmp_path, shared_weights())
    refuses(paths, lambda paths: None, 3, paths.model, "is also used by", args=("--method", method))


def test_shared_weights_are_repaired_for_both_layers_together(tmp_path: Path) -> None:
    paths = write_case(tmp_path, shared_weights())
    assert fix(paths).exit_code == 0
    before, after = ({t.name: t for t in onnx.load(path).graph.initializer} for path in (paths.model, paths.out))
    assert [name for name in before if before[name] != after[name]] == ["square"]


# -- data ----------------------------------------------------------------------------------------


def array(name: str, change: Callable[[Array], Array | None], of: str = "data") -> Spoil:
    """Spoil one array of a data file."""

    def spoil(paths: Paths) -> None:
        path = getattr(paths, of)
        with np.load(path) as archive:
            held = archive[name]
        paths.edit(path, **{name: change(held)})

    return spoil


def one_row(value: float) -> Callable[[Array], Array]:
    def change(x: Array) -> Array:
        x[17] = value
        return x

    return change


def one_label(value: int) -> Callable[[Array], Array]:
    def change(y: Array) -> Array:
        y[17] = value
        return y

    return change


def renamed(paths: Paths) -> None:
    with np.load(paths.data) as archive:
        np.savez(paths.data, inputs=archive["input"], y=archive["y"])


def first_samples(count: int) -> Spoil:
    def spoil(paths: Paths) -> None:
        with np.load(paths.data) as archive:
            np.savez(paths.data, input=archive["input"][:count], y=archive["y"][:count])

    return spoil


def only_target(paths: Paths) -> None:
    samples = clean_samples(600, seed=1)
    rows = np.flatnonzero(samples["y"] == TARGET)
    np.savez(paths.data, **{name: values[rows] for name, values in samples.items()})


def single_array(paths: Paths) -> None:
    with paths.data.open("wb") as file:
        np.save(file, clean_samples(600, seed=1)["input"])


def cut_data(bytes_left_out: int) -> Spoil:
    return lambda paths: paths.data.write_bytes(paths.data.read_bytes()[:-bytes_left_out])


DATA = [
    bad("missing", lambda paths: paths.data.unlink(), "no such file"),
    bad("folder", lambda paths: folder_instead(paths.data), "is a folder"),
    bad("empty", lambda paths: paths.data.write_bytes(b""), "not an npz file"),
    bad("text", lambda paths: paths.data.write_text("x,y\n1,2\n"), "npz"),
    bad("random bytes", lambda paths: paths.data.write_bytes(np.random.default_rng(4).bytes(999)), "npz"),
    bad("model", lambda paths: shutil.copy(paths.model, paths.data), "npz"),
    bad("npy", single_array, "a single array", "numpy.savez"),
    *[bad(f"cut by {count}", cut_data(count), "truncated") for count in (1, 100, 9000)],
    bad("objects", array("y", lambda y: np.array([{}] * len(y))), "Python objects"),
    bad("no arrays", lambda paths: np.savez(paths.data), "'input'", "it holds nothing"),
    bad("input named otherwise", renamed, "'input'", "did you mean 'inputs'?"),
    bad("too few features", array("input", lambda x: x[:, :7]), "input", "[600, 7]", "8]"),
    bad("flat", array("input", lambda x: x.reshape(-1)), "input", "[4800]"),
    bad("too many axes", array("input", lambda x: x[:, :, None]), "input", "[600, 8, 1]"),
    bad("scalar", array("input", lambda x: np.float32(3)), "input", "[]"),
    bad("uint8", array("input", lambda x: x.astype(np.uint8)), "input", "uint8", "float32"),
    bad("float64", array("input", lambda x: x.astype(np.float64)), "input", "float64", "float32"),
    bad("strings", array("input", lambda x: x.astype(str)), "input", "float32"),
    bad("NaN", array("input", one_row(np.nan)), "input", "8 NaN or infinite values"),
    bad("infinity", array("input", one_row(-np.inf)), "input", "8 NaN or infinite values"),
    bad("no labels", array("y", lambda y: None), "no labels", "labels:"),
    bad("labels of fewer samples", array("y", lambda y: y[1:]), "y", "[599]", "[600]"),
    bad("labels in a column", array("y", lambda y: y[:, None]), "y", "[600, 1]"),
    bad("one-hot labels", array("y", lambda y: np.eye(CLASSES)[y]), "y", "[600, 4]"),
    bad("one label for all", array("y", lambda y: y[0]), "y", "[]"),
    bad("float labels", array("y", lambda y: y.astype(np.float32)), "y", "float32", "integers"),
    bad("bool labels", array("y", lambda y: y == 1), "y", "bool", "integers"),
    bad("text labels", array("y", lambda y: y.astype(str)), "y", "integers"),
    bad("label too high", array("y", one_label(CLASSES)), "0 to 4", "classes 0 to 3"),
    bad("label below 0", array("y", one_label(-1)), "-1 to 3", "classes 0 to 3"),
    bad("no samples", first_samples(0), "no samples"),
    bad("too few samples", first_samples(80), "only 16 samples", "at least 20"),
]


@pytest.mark.parametrize(("spoil", "words"), DATA)
def test_data(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 3, tiny.data, *words)


HOLDOUT = [
    bad("missing", lambda paths: paths.holdout.unlink(), "no such file"),
    bad("no labels", array("y", lambda y: None, "holdout"), "no labels"),
    bad("label too high", array("y", one_label(9), "holdout"), "0 to 9"),
    bad("other shape", array("input", lambda x: x[:, 1:], "holdout"), "[600, 7]"),
    bad("NaN", array("input", one_row(np.nan), "holdout"), "NaN"),
    bad("same as data", lambda paths: shutil.copy(paths.data, paths.holdout), "only 0 samples", "holdout"),
]


@pytest.mark.parametrize(("spoil", "words"), HOLDOUT)
def test_holdout(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 3, tiny.holdout, *words)


def test_data_without_a_sample_that_a_trigger_could_turn(tiny: Paths) -> None:
    refuses(tiny, only_target, 3, "no samples of other classes than 1")


def test_labels_of_another_name(tiny: Paths) -> None:
    tiny.rewrite("seed: 1", "labels: truth")
    refuses(tiny, lambda paths: None, 3, tiny.data, "no labels", "labels:")


def test_labels_that_are_the_input(tiny: Paths) -> None:
    tiny.rewrite("seed: 1", "labels: input")
    refuses(tiny, lambda paths: None, 3, tiny.data, "input", "one label a sample")


# -- triggers ------------------------------------------------------------------------------------


def trigger(**arrays: Array | None) -> Spoil:
    return lambda paths: paths.edit(paths.trigger, **arrays)


MASK = trigger_arrays()["mask"]

TRIGGERS = [
    bad("missing", lambda paths: paths.trigger.unlink(), "no such file"),
    bad("data instead", lambda paths: shutil.copy(paths.data, paths.trigger), "'mask'", "input, y"),
    bad("no mask", trigger(mask=None), "'mask'", "found pattern"),
    bad("no pattern", trigger(pattern=None), "'pattern'", "found mask"),
    bad("other shape", trigger(mask=np.ones(7, np.float32)), "mask", "[7]", "[8]"),
    bad("pattern of other shape", trigger(pattern=np.ones((2, 8), np.float32)), "pattern", "[2, 8]", "[8]"),
    bad("scalar", trigger(mask=np.float32(1)), "mask", "[]", "[8]"),
    bad("text", trigger(mask=MASK.astype(str)), "mask", "expected numbers"),
    bad("complex", trigger(pattern=MASK.astype(complex)), "pattern", "expected numbers"),
    bad("mask below 0", trigger(mask=-MASK), "mask", "-1", "0 to 1"),
    bad("mask of 255", trigger(mask=(255 * MASK).astype(np.uint8)), "mask", "255", "0 to 1"),
    bad("mask of zeros", trigger(mask=np.zeros(8, np.float32)), "mask is zero everywhere"),
    bad("mask of NaN", trigger(mask=np.full(8, np.nan, np.float32)), "mask", "NaN"),
    bad("infinite pattern", trigger(pattern=np.full(8, np.inf, np.float32)), "pattern", "infinite"),
    bad("pattern too large", trigger(pattern=np.full(8, 1e300)), "pattern", "infinite"),
    bad("added beside them", trigger(added=MASK), "added beside mask, pattern", "either added or stamped"),
    bad("nothing added", trigger(mask=None, pattern=None, added=0 * MASK), "added is zero everywhere"),
    bad("added of other shape", trigger(mask=None, pattern=None, added=MASK[:7]), "added", "[7]", "[8]"),
    bad("added of NaN", trigger(mask=None, pattern=None, added=np.nan * MASK), "added", "NaN"),
]


@pytest.mark.parametrize(("spoil", "words"), TRIGGERS)
def test_trigger(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 3, tiny.trigger, *words)


def test_trigger_is_not_asked_to_drop_samples(tiny: Paths) -> None:
    trigger(mask=np.full(8, np.nan, np.float32))(tiny)
    assert "samples" not in fix(tiny).stderr


def triggered(count: int = 60, **arrays: Array | None) -> Spoil:
    """Give triggered samples instead of the trigger."""

    def spoil(paths: Paths) -> None:
        np.savez(paths.folder / "bad.npz", **triggered_samples(count, seed=3))
        paths.edit(paths.folder / "bad.npz", **arrays)
        paths.rewrite("trigger: trigger.npz", "triggered: bad.npz")

    return spoil


TRIGGERED = [
    bad("all of the target", triggered(y=np.full(60, TARGET)), "true class is the target 1"),
    bad("label too high", triggered(y=np.full(60, 7)), "7 to 7", "classes 0 to 3"),
    bad("float labels", triggered(y=np.zeros(60)), "y", "float64"),
    bad("too few", triggered(5), "4 triggered samples", "at least 5"),
    bad("NaN", triggered(input=np.full((60, 8), np.nan, np.float32)), "input", "NaN"),
    bad("other shape", triggered(input=np.zeros((60, 7), np.float32)), "input", "[60, 7]"),
    bad("a trigger instead", triggered(input=None, mask=MASK), "'input'", "mask"),
]


@pytest.mark.parametrize(("spoil", "words"), TRIGGERED)
def test_triggered_samples(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 3, tiny.folder / "bad.npz", *words)


def with_twins(count: int = 60, **arrays: Array | None) -> Spoil:
    """Give the triggered samples' twins, too."""

    def spoil(paths: Paths) -> None:
        triggered()(paths)
        np.savez(paths.folder / "good.npz", **clean_samples(count, seed=3))
        paths.edit(paths.folder / "good.npz", **arrays)
        paths.rewrite("triggered: bad.npz", "triggered: bad.npz\n    twins: good.npz")

    return spoil


TWINS = [
    bad("fewer", with_twins(59), "59 samples", "bad.npz holds 60", "row by row"),
    bad("other labels", with_twins(y=np.full(60, 2)), "the label of sample 0 is 2, in", "bad.npz", "row by row"),
    bad("label too high", with_twins(y=np.full(60, 7)), "7 to 7", "classes 0 to 3"),
    bad("the trigger on them", with_twins(**triggered_samples(60, seed=3)), "bad.npz", "changes nothing"),
    bad("other shape", with_twins(input=np.zeros((60, 7), np.float32)), "input", "[60, 7]"),
    bad("missing", lambda paths: (with_twins()(paths), (paths.folder / "good.npz").unlink()), "no such file"),
]


@pytest.mark.parametrize(("spoil", "words"), TWINS)
def test_twins(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 3, tiny.folder / "good.npz", *words)


def test_triggered_samples_without_labels_and_a_target_for_every_class(tiny: Paths) -> None:
    triggered(y=None)(tiny)
    tiny.rewrite("target: 1", "target: {0: 1, 2: 1}")
    refuses(tiny, lambda paths: None, 3, tiny.folder / "bad.npz", "no labels", "'seventh'")


def test_triggered_holdout_is_missing(tiny: Paths) -> None:
    triggered()(tiny)
    tiny.rewrite("triggered: bad.npz", "triggered: bad.npz\n    triggered_holdout: unseen.npz")
    refuses(tiny, lambda paths: None, 3, tiny.folder / "unseen.npz", "no such file")


# -- the spec ------------------------------------------------------------------------------------


def spec(text: str) -> Spoil:
    return lambda paths: paths.spec.write_text(text)


def line(old: str, new: str) -> Spoil:
    return lambda paths: paths.rewrite(old, new)


SPECS = [
    bad("missing", lambda paths: paths.spec.unlink(), "no such file"),
    bad("folder", lambda paths: folder_instead(paths.spec), "directory"),
    bad("binary", lambda paths: shutil.copy(paths.data, paths.spec), "not a text file"),
    bad("NUL byte", lambda paths: paths.spec.write_bytes(b"data: a\0b\n"), "not valid YAML"),
    bad("empty", spec(""), "data:", "properties:"),
    bad("list", spec("- data: repair.npz\n"), "data:", "properties:"),
    bad("tab", line("    kind", "\tkind"), "not valid YAML in line 5"),
    bad("bracket", line("seed: 1", "seed: [1"), "not valid YAML in line"),
    bad("deeply nested", spec("[" * 3000), "not valid YAML"),
    bad("unknown key", line("holdout:", "hold_out:"), "'hold_out'", "did you mean 'holdout'?"),
    bad("unknown key of a property", line("target:", "tarket:"), "properties.0.tarket", "'target'"),
    bad("unknown key of keep", line("recall_drop:", "recal_drop:"), "keep.recal_drop", "'recall_drop'"),
    bad("unknown key like nothing", line("seed: 1", "qqq: 1"), "unknown key 'qqq'"),
    bad("number as key", line("seed: 1", "1: 1"), "1"),
    bad("key twice", line("seed: 1", "seed: 1\nseed: 2"), "line 11", "'seed'", "twice"),
    bad("key of a property twice", line("target: 1", "target: 1\n    target: 2"), "line 8", "'target'"),
    bad("no data", line("data: repair.npz\n", ""), "data: this key is needed"),
    bad("no properties", spec("data: repair.npz\n"), "properties: this key is needed"),
    bad("no target", line("    target: 1\n", ""), "properties.0", "target: this key is needed"),
    bad("target beyond the model", line("target: 1", "target: 4"), "properties.seventh.target: 4", "0 to 3"),
    bad("a target beyond the model", line("target: 1", "target: {0: 4}"), "properties.seventh.target: 4", "0 to 3"),
    bad("target of itself", line("target: 1", "target: {0: 1, 2: 2}"), "properties.0.target: class 2", "itself"),
    bad("targets of no trigger", line("    trigger: trigger.npz\n    target: 1", "    target: {0: 1}"), "one class"),
    bad("twins of a trigger", line("target: 1", "target: 1\n    twins: repair.npz"), "properties.0", "twins goes with"),
    bad("bounds too short", line("seed: 1", "seed: 1\nbounds: {low: [0], high: [1]}"), "bounds: 1 values", "8"),
    bad("no kind", line("    kind: backdoor\n", ""), "properties.0.kind: this key is needed"),
    bad("unknown kind", line("kind: backdoor", "kind: backdor"), "properties.0.kind", "'backdor'", "did you mean"),
    bad("properties empty", spec("data: repair.npz\nproperties: []\n"), "properties:", "at least one"),
    bad("properties of text", spec("data: repair.npz\nproperties: [backdoor]\n"), "properties.0:", "'backdoor'"),
    bad("properties as mapping", spec("data: repair.npz\nproperties: {name: a}\n"), "properties:", "list"),
    bad(
        "no target of triggered samples",
        line("trigger: trigger.npz\n    target: 1", "triggered: bad.npz"),
        "properties.0",
        "target: this key is needed",
    ),
    bad(
        "trigger and triggered",
        line("trigger: trigger.npz", "trigger: trigger.npz\n    triggered: bad.npz"),
        "properties.0",
        "either trigger or triggered",
    ),
    bad(
        "trigger and triggered_holdout",
        line("trigger: trigger.npz", "trigger: trigger.npz\n    triggered_holdout: bad.npz"),
        "properties.0",
        "triggered_holdout",
    ),
    bad("target below 0", line("target: 1", "target: -1"), "properties.0.target", "-1"),
    bad("target of text", line("target: 1", "target: cat"), "properties.0.target", "expected a class", "'cat'"),
    bad("target true", line("target: 1", "target: true"), "properties.0.target", "True"),
    bad("max_rate 5", line("max_rate: 0.01", "max_rate: 5"), "properties.0.max_rate", "5"),
    bad("max_rate in percent", line("max_rate: 0.01", "max_rate: 1%"), "properties.0.max_rate", "'1%'"),
    bad("max_rate NaN", line("max_rate: 0.01", "max_rate: .nan"), "properties.0.max_rate", "nan"),
    bad("keep as list", line("keep: {accuracy_drop: 0.01, recall_drop: 0.05}", "keep: []"), "keep:", "[]"),
    bad("drop of text", line("accuracy_drop: 0.01", "accuracy_drop: lots"), "keep.accuracy_drop", "'lots'"),
    bad("drop below 0", line("accuracy_drop: 0.01", "accuracy_drop: -1"), "keep.accuracy_drop", "-1"),
    bad("seed 0", line("seed: 1", "seed: 0"), "seed:", "0"),
    bad("seed of text", line("seed: 1", "seed: one"), "seed:", "'one'"),
    bad("seed too large", line("seed: 1", "seed: 99999999999"), "seed:", "99999999999"),
    bad("data is a number", line("data: repair.npz", "data: 5"), "data:", "path", "5"),
    bad("data is null", line("data: repair.npz", "data:"), "data: this key is needed"),
    bad("name empty", line("name: seventh", "name: ''"), "properties.0.name"),
    bad("value without end", line("seed: 1", f"seed: {list(range(5000))}"), "seed:"),
]


@pytest.mark.parametrize(("spoil", "words"), SPECS)
def test_spec(tiny: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    refuses(tiny, spoil, 2, tiny.spec, *words)


def test_spec_messages_speak_of_keys_and_not_of_python(tiny: Paths) -> None:
    for old, new in [("data: repair.npz", "data: 5"), ("- name: seventh", "- backdoor\n  - name: seventh")]:
        tiny.spec.write_text(SPEC.replace(old, new))
        message = fix(tiny).stderr
        assert "class" not in message and "backdoorspec" not in message.lower()


def test_two_properties_of_one_name(tiny: Paths) -> None:
    second = "  - {name: seventh, kind: backdoor, trigger: trigger.npz, target: 2}\n"
    refuses(tiny, line("keep:", f"{second}keep:"), 2, tiny.spec, "'seventh'")


def test_target_is_no_class(tiny: Paths) -> None:
    refuses(tiny, line("target: 1", "target: 4"), 2, tiny.spec, "properties.seventh.target", "4", "0 to 3")


def test_two_inputs(tiny: Paths) -> None:
    def second_input(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["batch", FEATURES]))
        proto.graph.node.insert(0, helper.make_node("Add", ["input", "more"], ["both"], name="both"))
        proto.graph.node[1].input[0] = "both"

    tiny.edit_model(second_input)
    for path in (tiny.data, tiny.holdout):
        tiny.edit(path, more=np.zeros((600, FEATURES), np.float32))
    refuses(tiny, lambda paths: None, 2, "properties.seventh", "input, more")


def scaled(proto: onnx.ModelProto) -> None:
    """Multiply the input by a further one, which takes one value."""
    proto.graph.input.append(helper.make_tensor_value_info("factor", TensorProto.FLOAT, []))
    proto.graph.node.insert(0, helper.make_node("Mul", ["input", "factor"], ["more"], name="more"))
    proto.graph.node[1].input[0] = "more"


def test_an_input_without_an_axis_for_the_samples(tiny: Paths) -> None:
    tiny.edit_model(scaled)
    for path in (tiny.data, tiny.holdout):
        tiny.edit(path, factor=np.float32(1))
    refuses(tiny, lambda paths: None, 3, tiny.model, "'factor'", "sample_axes: {factor: null}")


@pytest.mark.parametrize(
    ("axes", "words"), [("{state: 1}", ["sample_axes.state", "no such input"]), ("{input: 2}", ["axis 2", "8]"])]
)
def test_axes_that_are_not_there(tiny: Paths, axes: str, words: list[str]) -> None:
    refuses(tiny, line("seed: 1", f"seed: 1\nsample_axes: {axes}"), 2, tiny.spec, *words)


def test_an_input_of_unknown_rank(tiny: Paths) -> None:
    tiny.edit_model(lambda proto: proto.graph.input[0].type.tensor_type.ClearField("shape"))
    assert fix(tiny).exit_code == 0


# -- triggers that are restored ------------------------------------------------------------------


def of_whole_numbers(paths: Paths) -> None:
    def cast(proto: onnx.ModelProto) -> None:
        proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
        proto.graph.node.insert(0, helper.make_node("Cast", ["x"], ["real"], to=TensorProto.FLOAT, name="cast"))
        proto.graph.node[1].input[0] = "real"

    paths.edit_model(cast)
    for path in (paths.data, paths.holdout):
        with np.load(path) as held:
            paths.edit(path, x=(9 * held["x"]).astype(np.int64))


def of_two_inputs(paths: Paths) -> None:
    def join(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, ["N", 64]))
        proto.graph.node.insert(0, helper.make_node("Add", ["x", "more"], ["both"], name="both"))
        proto.graph.node[1].input[0] = "both"

    paths.edit_model(join)
    for path, size in ((paths.data, 600), (paths.holdout, 900)):
        paths.edit(path, more=np.zeros((size, 64), np.float32))


def of_one_class(name: str, label: int) -> Spoil:
    """Keep one class, often enough for every part of the data to have samples."""

    def spoil(paths: Paths) -> None:
        path = getattr(paths, name)
        with np.load(path) as held:
            rows = held["y"] == label
            paths.edit(path, x=held["x"][rows], y=held["y"][rows])

    return spoil


def unlabelled(paths: Paths) -> None:
    for path in (paths.data, paths.holdout):
        paths.edit(path, y=None)


def known(*keys: str) -> Spoil:
    """Let the spec know something of the backdoor."""
    return line("kind: backdoor", "\n  ".join(["kind: backdoor", *keys]))


def bounds(count: int) -> Spoil:
    return line("seed: 1", f"seed: 1\nbounds: {{low: {[0] * count}, high: {[1] * count}}}")


def named_like_a_trigger(name: str) -> Spoil:
    """Let the held-out data have a name under which a restored trigger may be saved."""

    def spoil(paths: Paths) -> None:
        paths.holdout.rename(paths.folder / name)
        paths.rewrite("holdout: holdout.npz", f"holdout: {name}")

    return spoil


def linked_to_a_trigger(paths: Paths) -> None:
    paths.holdout.rename(paths.folder / "repaired.trigger-2-1.npz")
    paths.holdout.symlink_to(paths.folder / "repaired.trigger-2-1.npz")


WITHOUT_TRIGGER = [
    bad("whole numbers", (of_whole_numbers, 3), "'x'", "int64", "real numbers"),
    bad("two inputs", (of_two_inputs, 2), "properties.hidden", "one input", "x, more"),
    bad("all of one class", (of_one_class("data", 3), 3), "repair.npz", "one class"),
    bad("all of the target", (of_one_class("data", hidden.TARGET), 3), "repair.npz", "one class"),
    bad("held-out data of one class", (of_one_class("holdout", 3), 3), "holdout.npz", "one class"),
    bad("held-out data of the target", (of_one_class("holdout", hidden.TARGET), 3), "'hidden'", "holdout"),
    bad("bounds too short", (bounds(63), 2), "care.yaml: bounds: 63 values", "64"),
    bad("bounds too long", (bounds(65), 2), "care.yaml: bounds: 65 values", "64"),
    bad(
        "target is no class", (line("kind: backdoor", "kind: backdoor\n  target: 6"), 2), "hidden.target", "6", "0 to 5"
    ),
    bad("no labels", (unlabelled, 3), "repair.npz", "no labels", "'hidden'"),
    bad("data named like a trigger", (named_like_a_trigger("repaired.trigger-2-1.npz"), 2), "trigger-2-1.npz", "saved"),
    bad("data named like a picture", (named_like_a_trigger("repaired.trigger-0-2.png"), 2), "trigger-0-2.png", "saved"),
    bad("data behind a link to such a name", (linked_to_a_trigger, 2), "holdout.npz", "saved"),
    bad(
        "trigger and triggered",
        (known("trigger: t.npz", "triggered: s.npz", "target: 1"), 2),
        "properties.0",
        "either trigger or triggered",
        "neither",
    ),
    bad(
        "trigger without a target", (line("kind: backdoor", "kind: backdoor\n  trigger: t.npz"), 2), "target: this key"
    ),
]


@pytest.mark.parametrize(("spoil", "words"), WITHOUT_TRIGGER)
def test_what_triggers_cannot_be_restored_from(
    tmp_path: Path, spoil: tuple[Spoil, int], words: tuple[str, ...]
) -> None:
    change, code = spoil
    refuses(hidden.write(tmp_path), change, code, *words)


@pytest.mark.parametrize("command", ["check", "locate"])
def test_other_commands_explain_what_triggers_cannot_be_restored_from(tmp_path: Path, command: str) -> None:
    paths = hidden.write(tmp_path)
    of_whole_numbers(paths)
    before = contents(tmp_path)
    check_refusal(onnxcare(command, paths.model, "--spec", paths.spec, "--device", "cpu"), 3, "'x'", "int64")
    assert contents(tmp_path) == before


def test_four_classes_are_too_few_to_compare(tmp_path: Path) -> None:
    paths = write_case(tmp_path)
    paths.rewrite("    trigger: trigger.npz\n    target: 1\n", "")
    before = contents(tmp_path)
    result = fix(paths)
    words = ("'seventh'", "at least 5", f"{paths.model} has 4", "give a trigger, or triggered samples")
    check_refusal(result, 3, *words)
    assert len(result.stderr.splitlines()) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["check", "fix", "locate"])
def test_two_sides_of_a_threshold_are_too_few_to_compare(tmp_path: Path, command: str) -> None:
    spec = {"decision": {"threshold": 0.5}, "properties": [{"name": "hidden", "kind": "backdoor"}]}
    spec = kinds.write(tmp_path, kinds.model(), spec, data=kinds.people(200, 1), holdout=kinds.people(200, 2))
    before = contents(tmp_path)
    to = ("-o", tmp_path / "repaired.onnx") if command == "fix" else ()
    result = onnxcare(command, tmp_path / "model.onnx", "--spec", spec, "--device", "cpu", *to)
    check_refusal(result, 3, "'hidden'", "at least 5", "has 2")
    assert len(result.stderr.splitlines()) == 1
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["repaired.trigger-2-1.npz", "repaired.trigger-0-12.png"])
def test_no_input_named_like_a_trigger_is_replaced_be_it_a_link_to_another_folder(tmp_path: Path, name: str) -> None:
    paths = hidden.write(tmp_path)
    (tmp_path / "far").mkdir()
    paths.holdout.rename(tmp_path / "far" / "unseen.npz")
    (tmp_path / name).symlink_to(tmp_path / "far" / "unseen.npz")
    paths.rewrite("holdout: holdout.npz", f"holdout: {name}")
    refuses(paths, lambda paths: None, 2, name, "saved")
    assert (tmp_path / name).is_symlink()


def test_an_output_behind_a_link_does_not_let_triggers_overwrite_data(tmp_path: Path) -> None:
    """Triggers must not overwrite an input, whether they are saved beside the link or beside the file behind it."""
    paths = hidden.write(tmp_path)
    (tmp_path / "far").mkdir()
    paths.out.symlink_to(tmp_path / "far" / "other.onnx")
    named_like_a_trigger("repaired.trigger-2-1.npz")(paths)
    data = (tmp_path / "repaired.trigger-2-1.npz").read_bytes()
    result = fix(paths)
    assert (tmp_path / "repaired.trigger-2-1.npz").read_bytes() == data, result.output


def test_a_known_trigger_may_be_named_like_a_restored_one(tmp_path: Path) -> None:
    """Nothing is restored, so nothing would be overwritten: what a first run saved may be given to a second one."""
    paths = write_case(tmp_path)
    paths.trigger.rename(tmp_path / "repaired.trigger-1-1.npz")
    paths.rewrite("trigger.npz", "repaired.trigger-1-1.npz")
    assert fix(paths).exit_code == 0


def test_triggered_samples_may_be_named_like_a_restored_trigger(tmp_path: Path) -> None:
    paths = write_case(tmp_path)
    triggered(300)(paths)
    (tmp_path / "bad.npz").rename(tmp_path / "repaired.trigger-1-1.npz")
    paths.rewrite("bad.npz", "repaired.trigger-1-1.npz")
    assert fix(paths).exit_code == 0


def test_a_trigger_that_cannot_be_saved_is_told_in_plain_words(tmp_path: Path) -> None:
    """Either all is written or nothing: an error does not leave the repaired model behind."""
    paths = hidden.write(tmp_path)
    (tmp_path / f"repaired.trigger-{hidden.TARGET}-1.npz").mkdir()
    refuses(paths, lambda paths: None, 2, f"repaired.trigger-{hidden.TARGET}-1.npz")


# -- outputs -------------------------------------------------------------------------------------


OUTPUTS = {
    "folder missing": ("nowhere/repaired.onnx", "nowhere does not exist"),
    "parent is a file": ("care.yaml/repaired.onnx", "care.yaml does not exist"),
    "folder": ("folder", "is a folder"),
    "model": ("model.onnx", "--in-place"),
    "model by another way": ("folder/../model.onnx", "--in-place"),
    "model by a hard link": ("linked.onnx", "--in-place"),
    "spec": ("care.yaml", "is an input"),
    "data": ("repair.npz", "is an input"),
    "holdout": ("holdout.npz", "is an input"),
    "trigger": ("trigger.npz", "is an input"),
    "data by a link": ("link.npz", "is an input"),
}


@pytest.mark.parametrize(("name", "words"), OUTPUTS.values(), ids=OUTPUTS.keys())
def test_output(tiny: Paths, name: str, words: str) -> None:
    (tiny.folder / "folder").mkdir()
    (tiny.folder / "linked.onnx").hardlink_to(tiny.model)
    (tiny.folder / "link.npz").symlink_to(tiny.data)
    before = contents(tiny.folder)
    result = onnxcare("fix", tiny.model, "--spec", tiny.spec, "-o", tiny.folder / name, "--device", "cpu")
    check_refusal(result, 2, name, words)
    assert contents(tiny.folder) == before


def test_folder_that_cannot_be_written(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refuses(tiny, lambda paths: None, 2, tiny.out, "not writable")


def test_output_that_cannot_be_written(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.out.write_bytes(b"precious")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tiny.out)
    refuses(tiny, lambda paths: None, 2, tiny.out, "not writable")


def test_disk_becomes_full(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    before = contents(tiny.folder)
    monkeypatch.setattr(Path, "write_bytes", full)
    result = fix(tiny)
    monkeypatch.undo()
    check_refusal(result, 2, tiny.out, "No space left on device")
    assert contents(tiny.folder) == before


def test_older_output_and_no_model(tiny: Paths) -> None:
    tiny.out.write_bytes(b"precious")
    refuses(tiny, lambda paths: paths.model.unlink(), 3, tiny.model, "no such file")


def test_output_that_is_no_file(tiny: Paths) -> None:
    """Moving a file over a device or a pipe would take it away from everybody else."""
    os.mkfifo(tiny.out)
    check_refusal(fix(tiny), 2, tiny.out, "not a file")
    assert tiny.out.is_fifo()


REPORTS = {
    "folder missing": "nowhere/report.json",
    "parent is a file": "care.yaml/report.json",
    "folder": "folder",
    "model": "model.onnx",
    "spec": "care.yaml",
    "data": "repair.npz",
    "trigger": "trigger.npz",
    "output": "repaired.onnx",
    "output by another way": "folder/../repaired.onnx",
}


@pytest.mark.parametrize("name", REPORTS.values(), ids=REPORTS.keys())
def test_report(tiny: Paths, name: str) -> None:
    (tiny.folder / "folder").mkdir()
    before = contents(tiny.folder)
    check_refusal(fix(tiny, "--json", tiny.folder / name), 2, name)
    assert contents(tiny.folder) == before


# -- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["lots", "0", "-1GiB", "1e3", "2GiB please", "", "inf"])
def test_memory(tiny: Paths, size: str) -> None:
    refuses(tiny, lambda paths: None, 2, "--memory", size, args=("--memory", size))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("frist", ["did you mean 'first'?", "it has first, second"]),
        ("block*", ["no such layer", "it has first, second"]),
        ("FIRST", ["no such layer"]),
        ("", ["no such layer"]),
        ("first,second", ["no such layer"]),
    ],
)
def test_layers_that_the_model_does_not_have(tiny: Paths, name: str, words: list[str]) -> None:
    for args in (("--layers", name), ("--layers", "second", "--layers", name)):
        refuses(tiny, lambda paths: None, 2, f"--layers {name}: ", tiny.model, *words, args=args)
        assert len(fix(tiny, *args).stderr.splitlines()) == 1


def test_a_layer_that_a_method_cannot_change(tiny: Paths) -> None:
    refuses(tiny, lambda paths: None, 3, "no multiplier", "--layers", args=("--method", "care", "--layers", "first"))


def test_no_gpu(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcare.runtime._cuda_works", lambda: False)
    before = contents(tiny.folder)
    check_refusal(fix(tiny, device="cuda"), 2, "--device cuda", "--device cpu")
    assert contents(tiny.folder) == before


FIX = ("fix", "MODEL", "--spec", "SPEC", "-o", "OUT")
LOCATE = ("locate", "MODEL", "--spec", "SPEC")

USAGE = {
    "unknown command": (("fixx", "MODEL"), "fixx"),
    "no model": (("fix", "--spec", "SPEC"), "MODEL"),
    "no spec": (("fix", "MODEL", "-o", "OUT"), "--spec"),
    "no output": (("fix", "MODEL", "--spec", "SPEC"), "-o", "--in-place"),
    "two outputs": ((*FIX, "--in-place"), "-o", "--in-place"),
    "two models": ((*FIX, "more.onnx"), "more.onnx"),
    "unknown method": ((*FIX, "--method", "magic"), "--method", "magic", "care"),
    "unknown device": ((*FIX, "--device", "tpu"), "--device", "tpu", "cuda"),
    "unknown option": ((*FIX, "--sead", "1"), "--sead", "--seed"),
    "seed 0": ((*FIX, "--seed", "0"), "--seed"),
    "seed of text": ((*FIX, "--seed", "x"), "--seed"),
    "seed too large": ((*FIX, "--seed", str(2**32)), "--seed"),
    "no change allowed": ((*FIX, "--max-changed", "0"), "--max-changed", "0"),
    "fewer changes than none": ((*FIX, "--max-changed", "-3"), "--max-changed", "-3"),
    "changes of text": ((*FIX, "--max-changed", "few"), "--max-changed", "few"),
    "one value": ((*LOCATE, "--values", "1"), "--values"),
    "no sample": ((*LOCATE, "--samples", "0"), "--samples"),
}


@pytest.mark.parametrize(("args", "words"), [(args, words) for args, *words in USAGE.values()], ids=USAGE.keys())
def test_usage(tiny: Paths, args: tuple[str, ...], words: list[str]) -> None:
    before = contents(tiny.folder)
    places = {"MODEL": tiny.model, "SPEC": tiny.spec, "OUT": tiny.out}
    result = onnxcare(*(places.get(arg, arg) for arg in args))
    lines = result.stderr.splitlines()
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert lines[0].startswith("Usage: ") and lines[-1].startswith("Error: ") and len(lines) <= 4
    assert all(word in lines[-1] for word in words), result.stderr
    assert contents(tiny.folder) == before
