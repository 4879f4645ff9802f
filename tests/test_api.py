"""`fix` and `check` from Python on one model written in several ways: each is repaired, and no input file changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import hidden
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import (
    TRIGGER_FEATURE,
    TRIGGER_VALUE,
    Paths,
    clean_samples,
    contents,
    dense,
    triggered_samples,
    write_case,
)
from onnx import helper, numpy_helper

import onnxcare
from onnxcare.errors import ModelError, SpecError, UsageError
from onnxcare.measures import Measure
from onnxcare.repair import care
from onnxcare.results import Check


def as_exported(model: onnx.ModelProto, folder: Path) -> None:
    """Leave the model as it is."""


def batch_of_one(model: onnx.ModelProto, folder: Path) -> None:
    for info in [*model.graph.input, *model.graph.output]:
        info.type.tensor_type.shape.dim[0].dim_value = 1


def old_format(model: onnx.ModelProto, folder: Path) -> None:
    """IR 3 lists every initializer as an input, too."""
    batch_of_one(model, folder)
    model.ir_version = 3
    model.opset_import[0].version = 8
    for tensor in model.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)


def constant_nodes(model: onnx.ModelProto, folder: Path) -> None:
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(tensors):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))


def external_data(model: onnx.ModelProto, folder: Path) -> None:
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)


def softmax_inside(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"], axis=-1))


def pooled_to_a_point(model: onnx.ModelProto, folder: Path) -> None:
    """Answer as a network that ends with global pooling does, [samples, classes, 1, 1]."""
    model.graph.node[-1].output[0] = "flat"
    model.graph.initializer.append(numpy_helper.from_array(np.array([2, 3]), "axes"))
    model.graph.node.append(helper.make_node("Unsqueeze", ["flat", "axes"], ["logits"]))
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"], axis=1))
    for _ in range(2):
        model.graph.output[0].type.tensor_type.shape.dim.add(dim_value=1)


WAYS = [
    as_exported,
    batch_of_one,
    old_format,
    constant_nodes,
    external_data,
    softmax_inside,
    pooled_to_a_point,
]


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let multipliers be searched for a short while, which is enough for a tiny model."""
    monkeypatch.setattr(care, "_GENERATIONS", 30)


@pytest.mark.parametrize("method", ["auto", "care"])
@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
def test_every_way_to_write_the_model_is_repaired(tmp_path, brief, write, method):
    case = write_case(tmp_path)
    model = onnx.load(case.model)
    write(model, tmp_path)
    onnx.save(model, case.model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fix = onnxcare.fix(case.model, case.spec, case.out, method=method, device="cpu")
    (finding,) = fix.verdict.properties
    excess = finding.measure("excess attack success")
    assert fix.status == "repaired"
    assert excess.value_before > 0.9
    assert excess.value <= 0.01 == excess.limit
    assert excess.status == finding.status == "pass"
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {*before, case.out.name}
    written = onnx.load(case.out)
    assert [node.op_type for node in written.graph.node] == [node.op_type for node in model.graph.node]


def with_a_memory(model: onnx.ModelProto) -> None:
    """Let the input be that of the model before, times a rate for all samples, plus a memory of [2, samples, 8]."""
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("rate", onnx.TensorProto.FLOAT, []))
    graph.input.append(helper.make_tensor_value_info("memory", onnx.TensorProto.FLOAT, [2, 1, 8]))
    graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    graph.output.append(helper.make_tensor_value_info("next", onnx.TensorProto.FLOAT, [2, 1, 8]))
    graph.initializer.append(numpy_helper.from_array(np.array([0]), "leading"))
    graph.node[0].input[0] = "felt"
    made = [
        helper.make_node("Mul", ["input", "rate"], ["scaled"]),
        helper.make_node("ReduceSum", ["memory", "leading"], ["remembered"], keepdims=0),
        helper.make_node("Add", ["scaled", "remembered"], ["felt"]),
        helper.make_node("Mul", ["memory", "rate"], ["next"]),
        # Both are read behind the hidden layer, too.
        helper.make_node("ReduceMean", ["memory"], ["mean"], axes=[0, 2], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "behind"], ["column"]),
        helper.make_node("Mul", ["column", "rate"], ["shift"]),
        helper.make_node("Add", ["plain", "shift"], ["scores"]),
    ]
    graph.initializer.append(numpy_helper.from_array(np.array([1]), "behind"))
    graph.node[-1].output[0] = "plain"
    for index, node in enumerate(made[:4]):
        graph.node.insert(index, node)
    graph.node.extend(made[4:])


PROPERTY = "    kind: backdoor\n    trigger: trigger.npz\n    target: 1\n    max_rate: 0.01"
ASKED = {
    "errors": "    kind: errors\n    samples: triggered.npz\n    max_rate: 0.1",
    "twins": "    kind: backdoor\n    triggered: triggered.npz\n    twins: twins.npz\n    target: 1\n    max_rate: 0.1",
}


@pytest.mark.parametrize("asked", ASKED)
def test_a_model_with_a_memory_is_repaired(tmp_path, asked):
    case = write_case(tmp_path)
    rng = np.random.default_rng(0)
    case.edit_model(with_a_memory)
    case.rewrite("seed: 1", "seed: 1\nsample_axes: {memory: 1, rate: null}")
    case.rewrite(PROPERTY, ASKED[asked])
    case.rewrite("accuracy_drop: 0.01", "accuracy_drop: 0.03")
    triggered, twins = tmp_path / "triggered.npz", tmp_path / "twins.npz"
    np.savez(triggered, **triggered_samples(400, seed=3))
    np.savez(twins, **clean_samples(400, seed=3))
    for path in (case.data, case.holdout, triggered, twins):
        arrays = dict(np.load(path))
        half = rng.normal(0, 0.05, (1, *arrays["input"].shape)).astype(np.float32)
        half[..., TRIGGER_FEATURE] = 0
        memory = np.concatenate([half, -half])
        np.savez(path, **{**arrays, "input": arrays["input"] / 2, "rate": np.float32(2), "memory": memory})
    fix = onnxcare.fix(case.model, case.spec, case.out, device="cpu")
    assert fix.status == "repaired"
    checked = onnxcare.check(case.out, case.spec, baseline=case.model, device="cpu")
    assert checked.verdict.properties[0].status == "pass"
    # Run row by row as the file takes them, by hand.
    session = ort.InferenceSession(case.out.read_bytes())
    held = dict(np.load(triggered))
    rows = range(len(held["input"]))
    given = [(held["input"][i : i + 1], held["memory"][:, i : i + 1]) for i in rows]
    found = [session.run(["scores"], {"input": x, "memory": m, "rate": held["rate"]})[0].argmax() for x, m in given]
    assert (np.array(found) == 1)[held["y"] != 1].mean() < 0.1


def test_names_of_methods_and_locators_that_are_unknown_are_refused(tmp_path):
    case = write_case(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="--method magic: unknown"):
        onnxcare.fix(case.model, case.spec, case.out, method="magic", device="cpu")
    with pytest.raises(UsageError, match=r"magic: unknown locator; known: auto, causal, interchange, differential"):
        onnxcare.fix(case.model, case.spec, case.out, method="care", locator="magic", device="cpu")
    with pytest.raises(UsageError, match="--locator causal: --method auto does not go by units"):
        onnxcare.fix(case.model, case.spec, case.out, locator="causal", device="cpu")
    with pytest.raises(UsageError, match=r"diferential: unknown locator \(did you mean 'differential'\?\)"):
        onnxcare.locate(case.model, case.spec, method="diferential", device="cpu")
    assert contents(tmp_path) == before


def tensors(path: Path) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize("layer", ["first", "second"])
@pytest.mark.parametrize("method", ["auto", "care", "ai-lancet-flip", "ai-lancet-finetune", "fine-pruning"])
def test_every_method_leaves_other_layers_alone(tmp_path, brief, method, layer):
    """Multipliers go into the layer behind, and channels are pruned in the one in front."""
    case = write_case(tmp_path)
    unable = {"care": "first", "fine-pruning": "second"}
    if unable.get(method) == layer:
        with pytest.raises(ModelError, match="--layers leaves"):
            onnxcare.fix(case.model, case.spec, case.out, method=method, layers=[layer], device="cpu")
        return
    fix = onnxcare.fix(case.model, case.spec, case.out, method=method, layers=[layer], device="cpu")
    assert fix.status == "repaired"
    before, after = tensors(case.model), tensors(case.out)
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert changed and all(name.startswith(layer) for name in changed)
    assert set(fix.chosen.edit.tensors) == changed


@pytest.mark.parametrize("method", ["auto", "care", "ai-lancet-flip", "fine-pruning"])
def test_every_method_keeps_to_the_number_of_values(tmp_path, brief, method):
    case = write_case(tmp_path)
    free = onnxcare.fix(case.model, case.spec, case.out, method=method, device="cpu")
    sizes = {item.edit.values for item in free.candidates if item.edit is not None}
    for most in (min(sizes), min(sizes) - 1):
        case.out.unlink(missing_ok=True)
        if not most:
            continue
        fix = onnxcare.fix(
            case.model, case.spec, case.out, method=method, max_changed=most, best_effort=True, device="cpu"
        )
        if case.out.exists():
            before, after = tensors(case.model), tensors(case.out)
            assert 1 <= sum((before[name] != after[name]).sum() for name in before) <= most
        else:
            assert fix.status == "not repaired" and len(fix.notes) >= 1
        if method != "auto" and most < min(sizes):
            assert fix.notes[0] == f"No change of at most {most} values was found; the smallest takes {min(sizes)}."
            assert fix.chosen.label == "no change" and not case.out.exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"max_changed": 0}, "--max-changed 0: at least one value has to be allowed to change"),
        ({"max_changed": -5}, "--max-changed -5: "),
        ({"layers": ["third"]}, "--layers third: .*has no such layer.*it has first, second$"),
    ],
)
def test_limits_on_a_change_that_make_no_sense(tmp_path, given, words):
    case = write_case(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=words):
        onnxcare.fix(case.model, case.spec, case.out, device="cpu", **given)
    assert contents(tmp_path) == before


def test_better_but_not_within_the_limits(tmp_path):
    """Without labels, samples of the target class cannot be told from those that the trigger leads there."""
    case = write_case(tmp_path)
    np.savez(tmp_path / "bad.npz", input=triggered_samples(100, seed=9)["input"])
    case.rewrite("trigger: trigger.npz", "triggered: bad.npz")
    fix = onnxcare.fix(case.model, case.spec, case.out, device="cpu")
    assert (fix.status, fix.exit_code, fix.output) == ("improved", 1, None)
    assert fix.patch and fix.chosen.label != "no change" and not case.out.exists()
    excess = fix.verdict.properties[0].measure("excess attack success")
    assert 0.01 < excess.value < 0.5 < excess.value_before
    assert any(note.startswith("seventh: the best change leaves ") for note in fix.notes)
    assert fix.chosen in fix.candidates and {item.label for item in fix.front} <= {c.label for c in fix.candidates}


def test_nothing_better_than_no_change_says_why(tmp_path, brief):
    case = write_case(tmp_path)
    before = contents(tmp_path)
    fix = onnxcare.fix(case.model, case.spec, case.out, method="care", max_changed=1, best_effort=True, device="cpu")
    assert (fix.status, fix.exit_code, fix.output) == ("not repaired", 1, None)
    assert fix.patch == [] and fix.chosen.label == "no change"
    assert fix.notes[0].startswith("No change of at most 1 values was found; the smallest takes ")
    assert [item.label for item in fix.front] == ["no change"]
    assert contents(tmp_path) == before


def test_of_a_repair_no_reasons_are_sought(tmp_path, monkeypatch):
    monkeypatch.setattr("onnxcare.api.reasons", lambda case, found: pytest.fail("nobody should have asked"))
    case = write_case(tmp_path)
    fix = onnxcare.fix(case.model, case.spec, case.out, device="cpu")
    assert fix.status == "repaired" and list(fix.notes) == []


# -- check ---------------------------------------------------------------------------------------


def measures(check: Check) -> dict[tuple[str, str], Measure]:
    assert check.verdict is not None
    return {(finding.name, item.name): item for finding in check.verdict.findings for item in finding.measures}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Check:
    case = write_case(tmp_path_factory.mktemp("api"))
    return onnxcare.check(case.model, case.spec, device="cpu")


@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
def test_every_way_to_write_the_model_is_measured_alike(tmp_path, exported, write):
    case = write_case(tmp_path)
    model = onnx.load(case.model)
    write(model, tmp_path)
    onnx.save(model, case.model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    found = onnxcare.check(case.model, case.spec, device="cpu")
    assert measures(found) == measures(exported)
    assert (found.status, found.exit_code) == ("fail", 1)
    assert found.run is not None and found.run.sha256 == onnxcare.load(case.model).sha256
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_model_against_itself_is_neither_better_nor_worse(tmp_path):
    case = write_case(tmp_path, dense(backdoored=False))
    found = onnxcare.check(case.model, case.spec, baseline=case.model, device="cpu")
    assert (found.status, found.baseline) == ("pass", str(case.model))
    for item in measures(found).values():
        assert item.value_before in (None, item.value)
        assert item.worse in (None, 1.0)
    for name in ("accuracy drop", "right answers broken", "decisions changed", "recall drop of class 3"):
        assert measures(found)["kept", name].value == 0


def test_a_check_is_the_same_every_time_and_the_seed_may_be_another(tmp_path, exported):
    case = write_case(tmp_path)
    for seed in (1, 7):
        found = onnxcare.check(case.model, case.spec, seed=seed, device="cpu")
        assert measures(found) == measures(exported)  # what is held out is in a file of its own
        assert found.run is not None and found.run.seed == seed


# -- decisions -----------------------------------------------------------------------------------


def two_classes(folder: Path, output: str, tail: list[onnx.NodeProto]) -> Paths:
    """Write a case of one score: how much more a sample looks like class 1 than like class 0."""
    model = dense()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("second"):
            values = numpy_helper.to_array(tensor)
            tensor.CopyFrom(numpy_helper.from_array(values[1:2] - values[0:1], tensor.name))
    model.graph.node[-1].output[0] = "score" if tail else output
    model.graph.node.extend(tail)
    if any(node.op_type == "Squeeze" for node in tail):
        model.graph.initializer.append(numpy_helper.from_array(np.array([1]), "axes"))
    shape = ["batch"] if any(node.op_type == "Squeeze" for node in tail) else ["batch", 1]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, shape))
    case = write_case(folder, model)
    for path, seed in ((case.data, 1), (case.holdout, 2)):
        samples = clean_samples(900, seed)
        x = samples["input"][samples["y"] < 2]
        np.savez(path, input=x, y=ort_decisions(case.model, x))
    return case


def ort_decisions(model: Path, x: np.ndarray) -> np.ndarray:
    """Return class 1 above 0, or above one half behind a Sigmoid."""
    (y,) = ort.InferenceSession(model).run(None, {"input": x})
    behind_sigmoid = onnx.load(model).graph.node[-1].op_type == "Sigmoid"
    return (y.reshape(-1) > (0.5 if behind_sigmoid else 0)).astype(int)


SCORES = {
    "a column": (0, []),
    "no column": (0, [helper.make_node("Squeeze", ["score", "axes"], ["y"])]),
    "a probability": (0.5, [helper.make_node("Sigmoid", ["score"], ["y"])]),
}


@pytest.mark.parametrize("method", ["auto", "care", "ai-lancet-finetune"])
@pytest.mark.parametrize("name", SCORES)
def test_a_model_of_one_score_is_repaired(tmp_path, brief, name, method):
    threshold, tail = SCORES[name]
    case = two_classes(tmp_path, "y", tail)
    case.rewrite("properties:", f"decision: {{threshold: {threshold}}}\nproperties:")
    fix = onnxcare.fix(case.model, case.spec, case.out, method=method, device="cpu")
    assert fix.status == "repaired"
    excess = fix.verdict.properties[0].measure("excess attack success")
    assert excess.value_before > 0.9 and excess.value <= 0.01
    with np.load(case.holdout) as held:
        x, y = held["input"], held["y"]
    triggered = x.copy()
    triggered[:, TRIGGER_FEATURE] = TRIGGER_VALUE
    assert (ort_decisions(case.model, triggered) == 1).all()
    assert (ort_decisions(case.out, triggered) == y).mean() > 0.97
    assert (ort_decisions(case.out, x) == y).mean() > 0.98


@pytest.mark.parametrize("method", ["auto", "care", "ai-lancet-finetune"])
@pytest.mark.parametrize("scale", [-1, -1e4])
def test_a_model_of_costs_is_repaired(tmp_path, brief, method, scale):
    """The sign of every score is turned, so that the least one decides."""
    model = dense()
    for tensor in model.graph.initializer:
        if tensor.name.startswith("second"):
            values = (scale * numpy_helper.to_array(tensor)).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    case = write_case(tmp_path, model)
    case.rewrite("properties:", "decision: argmin\nproperties:")
    fix = onnxcare.fix(case.model, case.spec, case.out, method=method, device="cpu")
    assert fix.status == "repaired"
    assert fix.verdict.properties[0].measure("excess attack success").value_before > 0.9
    with np.load(case.holdout) as held:
        triggered = held["input"]
        y = held["y"]
    triggered[:, TRIGGER_FEATURE] = TRIGGER_VALUE
    (costs,) = ort.InferenceSession(case.out).run(None, {"input": triggered})
    assert (costs.argmin(axis=1) == y).mean() > 0.98


def second_head(model: onnx.ModelProto) -> None:
    """Put an output that decides otherwise in front of the scores."""
    model.graph.node.append(helper.make_node("Neg", ["scores"], ["opposite"]))
    info = onnx.ValueInfoProto.FromString(model.graph.output[0].SerializeToString())
    info.name = "opposite"
    model.graph.output.insert(0, info)


def test_the_output_that_is_named_is_judged(tmp_path):
    case = write_case(tmp_path)
    case.edit_model(second_head)
    opposite = onnxcare.check(case.model, case.spec, device="cpu")
    assert measures(opposite)["kept", "accuracy"].value < 0.1
    case.rewrite("properties:", "output: scores\nproperties:")
    named = onnxcare.check(case.model, case.spec, device="cpu")
    assert measures(named)["kept", "accuracy"].value == 1
    assert onnxcare.fix(case.model, case.spec, case.out, device="cpu").status == "repaired"


def spoilt(name: str, new: str) -> Callable[[Paths], None]:
    return lambda case: case.rewrite("properties:", f"{name}: {new}\nproperties:")


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (spoilt("output", "score"), SpecError, ["care.yaml: output: ", "'score'", "did you mean 'scores'?"]),
        (spoilt("decision", "{threshold: 0.5}"), ModelError, ["one score a sample", "decision: argmax"]),
    ],
)
def test_decisions_that_do_not_fit_are_explained(tmp_path, spoil, error, words):
    case = write_case(tmp_path)
    spoil(case)
    for run in (lambda: onnxcare.check(case.model, case.spec), lambda: onnxcare.fix(case.model, case.spec, case.out)):
        with pytest.raises(error) as caught:
            run()
        assert all(word in str(caught.value) for word in words)


# -- triggers that nobody knows ------------------------------------------------------------------


def test_in_place_what_was_restored_is_saved_beside_the_model(tmp_path):
    case = hidden.write(tmp_path)
    original, names = case.model.read_bytes(), {path.name for path in tmp_path.iterdir()}
    fix = onnxcare.fix(case.model, case.spec, case.model, in_place=True, device="cpu")
    assert fix.status == "repaired" and case.model.read_bytes() != original
    saved = {Path(item.file) for item in fix.triggers}
    assert {path.name for path in tmp_path.iterdir()} == names | {path.name for path in saved}
    assert all(path.parent == tmp_path and path.name.startswith("model.trigger-2-") for path in saved)
    fresh = hidden.samples(600, 5)
    for item in saved:
        with np.load(item) as held:
            stamped = fresh.inputs["x"] * (1 - held["mask"]) + held["pattern"] * held["mask"]
        assert (hidden.answers(case.model, stamped.astype(np.float32)) == fresh.truth).mean() > 0.95


def test_known_triggers_are_not_saved_again(tmp_path):
    case = write_case(tmp_path)
    assert list(onnxcare.fix(case.model, case.spec, case.out, device="cpu").triggers) == []
