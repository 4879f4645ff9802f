"""Fine-tuning of all layers: the step that is kept, what stays, training on clean samples, and what it is for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Subject, build, random, run
from helpers import Paths, answers, triggered_samples
from kinds import ORIGIN, SEX, model, opened, patched, people, write

from onnxcare import repair
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.properties.base import log_softmax
from onnxcare.repair import network_finetune
from onnxcare.repair.bench import patched_outcome
from onnxcare.repair.network_finetune import epochs_within, fine_tuned, tune

Array = np.ndarray
WRONG = {"name": "wrong", "kind": "errors", "max_rate": 0.5}


def case_of(subject: Subject, folder: Path, spoilt: int = 50) -> Case:
    """Return a case of errors: so many of 200 labels are not the model's answer."""
    rows = subject.samples(200)
    labels = run(subject.proto, rows, subject.logits)[0].argmax(axis=1)
    wrong = np.random.default_rng(1).permutation(200)[:spoilt]
    labels[wrong] = (labels[wrong] + 1) % 4
    whole = Dataset(rows, labels)
    spec = {"properties": [WRONG], "keep": {"recall_drop": 1.0}}
    data, holdout = whole.take(slice(0, 140)), whole.take(slice(140, 200))
    return opened(write(folder, subject.proto, spec, data=data, holdout=holdout))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return case_of(SUBJECTS["residual"](), tmp_path)


def cross_entropy(scores: Array, labels: Array) -> float:
    return -float(log_softmax(scores)[np.arange(len(labels)), labels].mean())


# -- the strategy --------------------------------------------------------------------------------


def test_the_best_step_on_the_search_part_is_kept(case):
    tuned = tune(case, steps=40)
    panel = case.panel("search")
    outcome = patched_outcome(case, tuned.values, panel)
    before = panel.outcomes(case.experiment.scores(panel.inputs)[None])[0]
    assert 0 < tuned.steps <= 40 and tuned.steps % 10 == 0
    assert tuned.rank[1] == pytest.approx(outcome.cost, rel=1e-3)
    assert outcome.rank < before.rank
    # All layers have moved, and all that can be rewritten is among the values.
    assert len(tuned.values) == 9
    assert all((new != case.read(parameter)).any() for parameter, new in tuned.values.items())
    again = tune(case, steps=40)
    assert all((again.values[parameter] == new).all() for parameter, new in tuned.values.items())


def test_steps_are_as_large_as_the_tensors_are(tmp_path, monkeypatch):
    """The first step of Adam moves every value by its step size, however steep it is; a bias of zeros moves too."""
    subject = SUBJECTS["mlp"]()
    for tensor in subject.proto.graph.initializer:
        if tensor.name == "b1":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(8, np.float32), "b1"))
    case = case_of(subject, tmp_path)
    ranks = iter([(2.0, 0.0), (1.0, 0.0)])
    monkeypatch.setattr(network_finetune, "_EVERY", 1)
    monkeypatch.setattr(network_finetune, "_rank", lambda *args: next(ranks))
    values = {
        parameter.name: (case.read(parameter), new) for parameter, new in tune(case, width=0.02, steps=1).values.items()
    }
    sizes = {name: np.sqrt(np.mean(old.astype(np.float64) ** 2)) for name, (old, _) in values.items()}
    sizes["b1"] = sizes["W1"]
    assert set(sizes) == {"W1", "b1", "W2", "b2", "W3", "b3"}
    for name, (old, new) in values.items():
        np.testing.assert_allclose(np.median(np.abs(new - old)), 0.02 * sizes[name], rtol=1e-3)


def test_it_begins_at_a_candidate_that_stays_one(case):
    start = tune(case, steps=20).values
    rank = patched_outcome(case, start, case.panel("search")).rank
    assert tune(case, start, steps=20).rank < rank
    # With steps that lead nowhere, the start is what comes back, whole.
    kept = tune(case, start, width=1e3, steps=10)
    assert kept.steps == 0 and kept.values is start


def test_no_change_stays_a_candidate(tmp_path):
    """Nothing is wrong, so every step away from the original costs."""
    case = case_of(SUBJECTS["mlp"](), tmp_path, spoilt=0)
    tuned = tune(case, width=0.5, steps=20)
    assert tuned.steps == 0 and tuned.values == {}


def test_weights_of_protected_attributes_stay(tmp_path):
    fair = {"name": "fair", "kind": "fairness", "protected": {"sex": SEX, "origin": ORIGIN}, "max_rate": 0.01}
    spec = {"decision": {"threshold": 0.5}, "properties": [fair, {**WRONG, "max_rate": 0.1}]}
    data = people(600, 1)
    data.truth[::7] ^= 1
    case = opened(write(tmp_path, model(), spec, data=data, holdout=people(300, 2)))
    tuned = tune(case, steps=30)
    assert tuned.steps > 0
    by_name = {parameter.name: (case.read(parameter), new) for parameter, new in tuned.values.items()}
    moved = (by_name["W1"][0] != by_name["W1"][1]).any(axis=1)
    assert moved[:2].all() and not moved[2:].any()


def test_candidates_are_what_the_file_does(case, tmp_path, monkeypatch):
    monkeypatch.setattr(network_finetune, "_STEPS", 30)
    assert network_finetune.applies(case)
    panel = case.panel("validation")
    for item in network_finetune.propose(case).found:
        scores = run(patched(case, item.make(), tmp_path / "out.onnx"), panel.inputs)[0]
        outcome = panel.outcomes(scores[None])[0]
        assert outcome.cost == pytest.approx(item.candidate.outcome.cost, rel=1e-3)
        assert outcome.rank < case.before.rank


def test_larger_networks_get_fewer_steps(case, monkeypatch):
    """By hand: 36 positions of 2 * 9 * 4, 4 * 9 * 3 and 3 * 9 * 4 products, 9 of 4 * 9 * 6, and 6 * 5."""
    each = 36 * (72 + 108 + 108) + 9 * 216 + 30
    asked = []
    monkeypatch.setattr(network_finetune, "tune", lambda case, width, steps: asked.append(steps) or tune(case, steps=0))
    monkeypatch.setattr(network_finetune, "_WORK", 64 * each * 12.5)
    network_finetune.propose(case)
    assert set(asked) == {12}
    monkeypatch.setattr(network_finetune, "_CLEAN_WORK", len(case.splits.repair) * each * 3.5)
    assert epochs_within(case) == 3
    monkeypatch.setattr(network_finetune, "_CLEAN_WORK", 1)
    assert epochs_within(case) == 1


def test_it_is_for_several_layers_and_evidence(case, tmp_path):
    single = build("g (float[N, 4] x) => (float[N, 4] y) { y = MatMul (x, W) }", {"W": random(4, 4)})
    folder = tmp_path / "single"
    folder.mkdir()
    assert not network_finetune.applies(case_of(Subject(single, "x", (4,), "y"), folder))
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert not network_finetune.applies(case_of(SUBJECTS["mlp"](), nothing, spoilt=0))


# -- the defence ---------------------------------------------------------------------------------


@pytest.fixture
def dense(tmp_path: Path) -> Case:
    return case_of(SUBJECTS["mlp"](), tmp_path, spoilt=40)


def test_training_lowers_the_cross_entropy_of_the_clean_samples(dense):
    clean = dense.splits.repair
    values = fine_tuned(dense, rate=1e-2)
    before, after = (item.scores(clean.inputs) for item in (dense.experiment, dense.experiment.patched(values)))
    assert cross_entropy(after, clean.truth) < 0.7 * cross_entropy(before, clean.truth)
    assert {parameter.name for parameter in values} == {"W1", "b1", "W2", "b2", "W3", "b3"}
    again = fine_tuned(dense, rate=1e-2)
    assert all((again[parameter] == new).all() for parameter, new in values.items())


def test_evidence_has_no_say(case, monkeypatch):
    values = fine_tuned(case, epochs=1)
    monkeypatch.setattr(Case, "panel", None)
    monkeypatch.setattr(type(case.properties[0]), "evidence", None)
    assert all((new == values[parameter]).all() for parameter, new in fine_tuned(case, epochs=1).items())


def test_what_is_held_stays_and_the_start_counts(dense):
    first, second, third = dense.experiment.layers
    awake = int(dense.read(second.bias).argmax())
    new = dense.read(second.weight).copy()
    new[:, awake] = 0
    start = {second.weight: new}
    held, free = (fine_tuned(dense, start, epochs=1, held=item) for item in ({second.weight: new == 0}, None))
    assert not held[second.weight][:, awake].any() and free[second.weight][:, awake].any()
    for values in (held, free):
        assert (np.delete(values[second.weight] != new, awake, axis=1)).any()
        assert all((values[layer.weight] != dense.read(layer.weight)).any() for layer in (first, third))
        np.testing.assert_allclose(values[second.weight], new, atol=0.01)


def test_clean_samples_alone_do_not_undo_a_backdoor_that_harms_none(tiny: Paths):
    """The trigger's feature is zero in clean samples: what it does has no slope there."""
    case = opened(tiny.spec)
    found = repair.find("fine-tuning")(case)
    assert found.method == "fine-tuning" and found.details["epochs"] == 10
    bad = triggered_samples(300, seed=5)
    assert [item.label.split(" at ")[0] for item in found.candidates[1:]] == ["all layers: 10 epochs"] * 3
    out = patched(case, found.values, tiny.out)
    assert (answers(out, bad["input"]) == bad["y"]).mean() < 0.9


# -- what cannot be tuned ------------------------------------------------------------------------


def signed(behind: str = "") -> Subject:
    """Return a network whose first half ends in signs."""
    end = f"[end] y = {behind} (z3)" if behind else "[end] y = Identity (z3)"
    proto = build(
        f"""signed (float[N, 6] x) => (float[N, 4] y) {{
            [first] z1 = Gemm (x, W1, b1)
            [sign] s = Sign (z1)
            [second] z2 = Gemm (s, W2, b2)
            [relu] h = Relu (z2)
            [third] z3 = Gemm (h, W3, b3)
            {end}
        }}""",
        {
            "W1": random(6, 16),
            "b1": random(16),
            "W2": random(16, 8),
            "b2": random(8),
            "W3": random(8, 4),
            "b3": random(4),
        },
    )
    return Subject(proto, "x", (6,), "y")


def test_layers_in_front_of_what_has_no_derivative_stay(tmp_path):
    case = case_of(signed(), tmp_path)
    for values in (fine_tuned(case, epochs=2), tune(case, steps=20).values):
        assert {parameter.name for parameter in values} == {"W2", "b2", "W3", "b3"}
        assert all((new != case.read(parameter)).any() for parameter, new in values.items())


def test_without_any_derivative_the_reason_is_given(tmp_path):
    case = case_of(signed("Round"), tmp_path)
    for method in (fine_tuned, tune):
        with pytest.raises(ModelError, match=r"no layer can be fine-tuned: Round 'end' has no derivative"):
            method(case)
