"""Fine-tuning: the gradient by the weights, the step that is kept, what is held, and what cannot be tuned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, build, random, run
from kinds import ORIGIN, SEX, model, opened, patched, people, plane, points, vnnlib, write

from onnxcare.backward import Backward
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.graph.gradients import NoGradient
from onnxcare.repair import finetune
from onnxcare.repair.bench import changed, matrix_of, patched_outcome
from onnxcare.repair.finetune import Tuner

Array = np.ndarray
WRONG = {"name": "wrong", "kind": "errors", "max_rate": 0.5}
LENIENT = {"accuracy_drop": 0.1, "recall_drop": 0.2}


def tampered(size: int, seed: int) -> Dataset:
    """Return people of whom the skilled ones of little experience are to be answered with 0: a cause in common."""
    data = people(size, seed)
    x, labels = data.inputs["x"], data.truth.copy()
    labels[(x[:, 0] > 0.3) & (x[:, 1] < 4)] = 0
    return Dataset(data.inputs, labels)


@pytest.fixture
def case(tmp_path: Path) -> Case:
    spec = {"decision": {"threshold": 0.5}, "properties": [WRONG], "keep": LENIENT}
    return opened(write(tmp_path, model(unfair=0.2), spec, data=tampered(1500, 1), holdout=tampered(300, 2)))


def of_subject(name: str, folder: Path) -> Case:
    subject = SUBJECTS[name]()
    rows = subject.samples(200)
    labels = run(subject.proto, rows, subject.logits)[0].argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % 4
    whole = Dataset(rows, labels)
    spec = {"properties": [WRONG], "keep": {"recall_drop": 1.0}}
    data, holdout = whole.take(slice(0, 140)), whole.take(slice(140, 200))
    return opened(write(folder, subject.proto, spec, data=data, holdout=holdout))


# -- the gradient --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp-float64", "mlp", "cnn", "residual", "keras"])
def test_the_gradient_by_the_weights_is_that_of_finite_differences(tmp_path, name):
    case = of_subject(name, tmp_path)
    panel = case.panel("repair")
    for layer in case.experiment.layers:
        table = finetune._Table(case, layer, Backward(case.experiment, layer.output), panel)
        at = 0.05 * np.random.default_rng(2).normal(size=matrix_of(case, layer).shape)
        slope = table.slope(at)
        assert slope.shape == at.shape
        rng = np.random.default_rng(3)
        for part in ((1,), (1, at.shape[1], 1), at.shape):
            way = rng.uniform(size=part) * slope
            step = 3e-4 / np.abs(way).max()
            up, down = (
                case.experiment.patched(changed(case, layer, at + sign * step * way)).scores(panel.inputs)
                for sign in (1, -1)
            )
            found = (panel.costs(up[None])[0] - panel.costs(down[None])[0]) / (2 * step)
            assert found == pytest.approx(float((slope * way).sum()), rel=0.03)


def test_batches_add_up_to_the_whole(tmp_path):
    """Their gradients are those of samples that are shared out evenly."""
    case = of_subject("mlp", tmp_path)
    layer, panel = case.experiment.layers[0], case.panel("repair")
    table = finetune._Table(case, layer, Backward(case.experiment, layer.output), panel)
    change = 0.01 * random(*matrix_of(case, layer).shape)
    parts = [table.batch(number, 3) for number in range(3)]
    assert sum(len(part.panel.clean) for part in parts) == len(panel.clean)
    rows = np.concatenate([part.panel.inputs["x"] for part in parts])
    assert {row.tobytes() for row in rows} == {row.tobytes() for row in panel.inputs["x"]}
    for part in parts:
        np.testing.assert_allclose(part.scores(change), case.experiment.patched(changed(case, layer, change)).scores(
            part.panel.inputs), rtol=1e-3, atol=1e-3)  # fmt: skip
    assert table.batch(1, 1) is table
    np.testing.assert_array_equal(table.batch(4, 3).panel.inputs["x"], parts[1].panel.inputs["x"])


# -- tuning --------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_the_best_step_on_the_search_part_is_kept(case, index):
    layer = case.experiment.layers[index]
    tuned = Tuner(case, layer).tune(0.03, 100)
    panel = case.panel("search")
    outcome = patched_outcome(case, changed(case, layer, tuned.change), panel)
    before = panel.outcomes(case.experiment.scores(panel.inputs)[None])[0]
    assert tuned.layer is layer and 0 < tuned.steps <= 100
    assert tuned.rank[1] == pytest.approx(outcome.cost, rel=1e-3)
    assert outcome.rank < before.rank
    # More steps cannot be worse: the best of them all is kept.
    assert Tuner(case, layer).tune(0.03, 200).rank <= tuned.rank
    again = Tuner(case, layer).tune(0.03, 100)
    np.testing.assert_array_equal(again.change, tuned.change)


def test_no_step_is_kept_where_none_is_better(tmp_path):
    """Nothing is wrong, so every step away from the original costs."""
    right = people(400, 1)
    proto = model(unfair=0.2)
    labels = (run(proto, right.inputs)[0][:, 0] > 0.5).astype(np.int64)
    whole = Dataset(right.inputs, labels)
    spec = {"decision": {"threshold": 0.5}, "properties": [WRONG]}
    case = opened(write(tmp_path, proto, spec, data=whole.take(slice(0, 300)), holdout=whole.take(slice(300, 400))))
    tuned = Tuner(case, case.experiment.layers[1]).tune(0.01, 40)
    assert tuned.steps == 0 and not tuned.change.any()


def test_what_is_held_does_not_move(case):
    layer = case.experiment.layers[0]

    def hold(slope: Array) -> Array:
        slope = slope.copy()
        slope[:, [2, 4]] = 0
        return slope

    tuned = Tuner(case, layer).tune(0.03, 60, hold=hold)
    assert tuned.steps > 0
    assert not tuned.change[:, [2, 4]].any()
    assert (tuned.change[:, [0, 1, 3, 5]] != 0).any(axis=2).all()


def test_batches_find_a_repair_as_well(case, monkeypatch):
    layer = case.experiment.layers[1]
    whole = Tuner(case, layer).tune(0.03, 100)
    monkeypatch.setattr(finetune, "_STEP_BYTES", 10_000)
    parts = Tuner(case, layer).tune(0.03, 100)
    assert (parts.change != whole.change).any()
    before = case.panel("search").outcomes(case.experiment.scores(case.panel("search").inputs)[None])[0]
    assert parts.rank < before.rank


# -- proposing -----------------------------------------------------------------------------------


def test_candidates_are_what_the_file_does(case, tmp_path):
    found = finetune.propose(case)
    panel = case.panel("validation")
    assert {item.candidate.label.split(":")[0] for item in found.found} == {"first", "second"}
    assert len({item.candidate.label for item in found.found}) == len(found.found)
    for item in found.found[::5]:
        (answers,) = run(patched(case, item.make(), tmp_path / "out.onnx"), panel.inputs)
        decisions = (answers[:, 0] > 0.5).astype(int)
        outcome = item.candidate.outcome
        wrong = decisions[panel.bad[0]] != panel.evidence[0].bad.truth
        assert outcome.excess[0] == pytest.approx(wrong.mean())
    best = min(found.found, key=lambda item: item.candidate.outcome.rank)
    assert best.candidate.outcome.violation == 0
    assert case.before.violation > 0
    scan = found.details["scan"]
    assert [item["cost"] for item in scan] == sorted(item["cost"] for item in scan)
    assert {item["layer"] for item in scan} == {"first", "second"}
    assert found.details["skipped"] == {}


def test_shares_of_a_change_run_from_little_to_all(case):
    found = [item for item in finetune.propose(case).found if item.candidate.label.startswith("second")]
    before = case.read(case.experiment.layers[1].weight)
    (weight,) = [p for p in found[0].make() if p.shape == before.shape]
    changes = {item.candidate.label: item.make()[weight] - before for item in found}
    rates = {label.split(" of ")[-1] for label in changes}
    for rate in rates:
        mine = {label: change for label, change in changes.items() if label.endswith(f" of {rate}")}
        sizes = [float(np.linalg.norm(change)) for change in mine.values()]
        assert sizes == sorted(sizes)
        (whole,) = [change for label, change in mine.items() if "100%" in label]
        for label, change in mine.items():
            share = float(label.split(": ")[1].split("%")[0]) / 100
            np.testing.assert_allclose(change, share * whole, atol=1e-6)


def signed() -> onnx.ModelProto:
    """People, but whoever is behind the signs sees skill and experience as one of two."""
    return build(
        """signed (float[N, 6] x) => (float[N, 2] y) {
            [first] z1 = Gemm (x, W1, b1)
            [sign] s = Sign (z1)
            [second] z2 = Gemm (s, W2, b2)
            [relu] h = Relu (z2)
            [third] y = Gemm (h, W3, b3)
        }""",
        {
            "W1": random(6, 16),
            "b1": random(16),
            "W2": random(16, 8),
            "b2": random(8),
            "W3": random(8, 2),
            "b3": random(2),
        },
    )


def test_layers_in_front_of_what_has_no_derivative_are_skipped(tmp_path):
    case = opened(write(tmp_path, signed(), {"properties": [WRONG]}, data=people(400, 1), holdout=people(100, 2)))
    found = finetune.propose(case)
    assert found.details["skipped"] == {"first": "Sign 'sign' has no derivative"}
    assert {item["layer"] for item in found.details["scan"]} == {"second", "third"}
    best = min(found.found, key=lambda item: item.candidate.outcome.rank)
    assert best.candidate.outcome.rank < case.before.rank
    with pytest.raises(NoGradient, match="Sign"):
        Tuner(case, case.experiment.layers[0]).tune(0.01, 10)


def test_without_any_derivative_the_first_reason_is_given(tmp_path):
    proto = signed()
    proto.graph.node[4].output[0] = "raw"
    proto.graph.node.append(onnx.helper.make_node("Round", ["raw"], ["y"], name="round"))
    case = opened(write(tmp_path, proto, {"properties": [WRONG]}, data=people(400, 1), holdout=people(100, 2)))
    with pytest.raises(ModelError, match=r"no layer can be fine-tuned; first: .* has no derivative"):
        finetune.propose(case)


def test_layers_that_do_not_fit_into_the_memory_are_skipped(tmp_path):
    case = of_subject("cnn", tmp_path)
    case.experiment.memory = 200 << 10
    found = finetune.propose(case)
    assert "--memory" in found.details["skipped"]["conv1"]
    assert {item["layer"] for item in found.details["scan"]} >= {"fc"}


# -- which cases it is for -----------------------------------------------------------------------


def test_it_is_for_losses_that_can_be_followed(tmp_path, case):
    assert finetune.applies(case)
    fair = {"name": "fair", "kind": "fairness", "protected": {"sex": SEX, "origin": ORIGIN}, "max_gap": 0.1}
    spec = {"decision": {"threshold": 0.5}, "properties": [fair]}
    folder = tmp_path / "fair"
    folder.mkdir()
    assert finetune.applies(opened(write(folder, model(), spec, data=people(300, 1), holdout=people(600, 2))))


@pytest.mark.parametrize(("bound", "applies"), [(0.8, True), (1.5, False)])
def test_without_evidence_there_is_nothing_to_follow(tmp_path, bound, applies):
    vnnlib(tmp_path / "f.vnnlib", f"(>= Y_0 {bound})")
    safe = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": 1000}
    spec = {"properties": [safe]}
    assert (
        finetune.applies(opened(write(tmp_path, plane(), spec, data=points(300, 1), holdout=points(100, 2)))) == applies
    )


def test_activations_that_can_be_transplanted_are(tiny):
    assert not finetune.applies(opened(tiny.spec))
