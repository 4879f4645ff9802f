"""Flipping and muting: what the file holds afterwards, what it answers, and which candidate is chosen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import build
from helpers import TARGET, answers, clean_samples, dense, write_case
from kinds import opened, run, write

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.graph.patch import Patch
from onnxcare.locators import LOCATORS
from onnxcare.locators.weights import rank_weights
from onnxcare.repair import flip
from onnxcare.repair.bench import matrix_of

Array = np.ndarray


@pytest.fixture
def case(tiny) -> Case:
    return opened(tiny.spec)


def without_derivative(operator: str, folder: Path) -> Case:
    """Return the tiny case with signs inside, or with rounded scores: its labels are what it answers."""
    proto = dense()
    if operator == "Sign":
        proto.graph.node[1].op_type = "Sign"
    else:
        proto.graph.node[2].output[0] = "raw"
        proto.graph.node.append(onnx.helper.make_node(operator, ["raw"], ["scores"], name="steps"))
    paths = write_case(folder, proto)
    for path, seed in ((paths.data, 1), (paths.holdout, 2)):
        x = clean_samples(600, seed)["input"]
        np.savez(path, input=x, y=answers(proto, x))
    return opened(paths.spec)


# -- values --------------------------------------------------------------------------------------


def test_flipped_weights_change_their_sign_and_muted_ones_are_gone():
    matrix = np.random.default_rng(1).normal(size=(2, 5, 3))
    mask = np.random.default_rng(2).uniform(size=matrix.shape) < 0.3
    for mode, factor in (("flip", -1), ("mute", 0)):
        after = matrix + flip.change_of(matrix, mask, mode)
        np.testing.assert_allclose(after[mask], factor * matrix[mask])
        np.testing.assert_array_equal(after[~mask], matrix[~mask])


@pytest.mark.parametrize("locator", LOCATORS)
def test_the_file_has_other_weights_where_the_mask_says_so_and_the_same_ones_elsewhere(case, locator):
    rankings, _, _ = rank_weights(case, (locator,))
    seen = set()
    for ranking in rankings:
        layer = ranking.layer
        matrix = matrix_of(case, layer)
        for item in flip._tries(case, ranking)[::7]:
            mask = ranking.mask(item.size, matrix.shape)
            values = flip._found(case, item).make()
            written = onnx.load_from_string(Patch(values).apply(case.experiment.model))
            held = {t.name: onnx.numpy_helper.to_array(t) for t in written.graph.initializer}
            expected = matrix.astype(np.float32)
            expected[mask] *= -1 if item.mode == "flip" else 0
            np.testing.assert_array_equal(held[f"{layer.name}.weight"], expected[0, :-1].T)
            np.testing.assert_array_equal(held[f"{layer.name}.bias"], expected[0, -1])
            seen.add(item.mode)
    assert seen == {"flip", "mute"}


# -- candidates ----------------------------------------------------------------------------------


def test_every_try_is_measured_as_the_file_answers(case, tiny):
    """Attack success and accuracy, counted by hand from a plain session on the edited file."""
    panel, validation = case.panel("search"), case.panel("validation")
    rankings, _, _ = rank_weights(case, ("differential",))
    for ranking in rankings:
        for item in flip._tries(case, ranking)[::5]:
            found = flip._found(case, item)
            data = Patch(found.make()).apply(case.experiment.model)
            for outcome, part in ((item.outcome, panel), (found.candidate.outcome, validation)):
                decisions = run(data, part.inputs).argmax(axis=1)
                clean, bad = decisions[part.clean_rows], decisions[part.bad[0]]
                before = run(tiny.model, part.clean.inputs).argmax(axis=1)
                others = part.clean.truth != TARGET
                confused = min((answer[others] == TARGET).mean() for answer in (before, clean))
                assert outcome.excess[0] == pytest.approx((bad == TARGET).mean() - confused)
                dropped = (before == part.clean.truth).mean() - (clean == part.clean.truth).mean()
                assert outcome.accuracy_drop == pytest.approx(dropped)


def test_the_backdoor_is_gone_and_the_best_on_validation_is_chosen(case):
    found = flip.repair(case)
    assert found.method == "ai-lancet-flip"
    assert found.candidates[0].label == "no change" and found.candidates[0].outcome == case.before
    assert found.chosen.outcome.rank == min(item.outcome.rank for item in found.candidates)
    assert found.chosen.outcome.excess[0] <= 0.01 < case.before.excess[0]
    bad = case.panel("validation").evidence[0].bad.inputs
    data = Patch(found.values).apply(case.experiment.model)
    assert (run(data, bad).argmax(axis=1) == TARGET).mean() < 0.02
    # Of all that was tried, those of best rank on the search part competed.
    rankings, votes, _ = rank_weights(case, ("differential",))
    tries = [item for ranking in rankings for item in flip._tries(case, ranking)]
    assert found.details["tried"] == len(tries) >= len(found.candidates) - 1
    assert len(found.candidates) == 13
    best = sorted(tries, key=lambda item: item.outcome.rank)[:12]
    assert [item.label.split(" of ")[0] for item in found.candidates[1:]] == [
        f"{item.ranking.layer.name}: {item.mode} {item.size}" for item in best
    ]
    assert found.details["votes"] == [item.as_dict() for item in votes]


def test_no_change_wins_where_nothing_helps(tmp_path):
    """What leads triggered samples to class 1 is the only thing that tells the classes apart."""
    proto = build(
        "one (float[N, 2] x) => (float[N, 2] y) { [only] y = Gemm (x, W) }",
        {"W": np.array([[0, 2], [0, 0]], np.float32)},
    )
    rng = np.random.default_rng(3)
    x = rng.normal(0, 0.1, (500, 2)).astype(np.float32)
    x[:, 0] += np.where(np.arange(500) % 2, 1, -1)
    whole = Dataset({"x": x}, (x[:, 0] > 0).astype(np.int64))
    np.savez(tmp_path / "trigger.npz", mask=np.array([1, 0], np.float32), pattern=np.array([1, 0], np.float32))
    item = {"name": "first", "kind": "backdoor", "trigger": "trigger.npz", "target": 1, "max_rate": 0.01}
    spec = {"properties": [item], "keep": {"accuracy_drop": 0.01, "recall_drop": 0.05}}
    case = opened(write(tmp_path, proto, spec, data=whole.take(slice(400)), holdout=whole.take(slice(400, 500))))
    found = flip.repair(case)
    assert found.chosen.label == "no change" and not found.values
    assert len(found.candidates) > 2
    assert all(item.outcome.rank >= case.before.rank for item in found.candidates)
    assert any(item.outcome.excess[0] <= 0.01 for item in found.candidates)


@pytest.mark.parametrize("operator", ["Round", "Sign"])
def test_no_derivative_is_needed(tmp_path, operator):
    case = without_derivative(operator, tmp_path)
    found = flip.repair(case)
    assert found.chosen.outcome.rank < case.before.rank and found.values
    data = Patch(found.values).apply(case.experiment.model)
    bad = case.panel("validation").evidence[0].bad.inputs
    before, after = (
        (run(source, bad).argmax(axis=1) == TARGET).mean() for source in (case.experiment.model.path, data)
    )
    assert before > 0.9 and after < 0.5 * before
    assert any(not item["gradient"] for item in found.details["votes"])
