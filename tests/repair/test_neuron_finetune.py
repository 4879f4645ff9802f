"""Fine-tuning of chosen weights: which of them move, where they start, and what is done without a derivative."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from helpers import TARGET, answers, clean_samples, dense, write_case
from kinds import ORIGIN, SEX, model, opened, people, run, write

from onnxcare.case import Case
from onnxcare.graph.patch import Patch
from onnxcare.locators.weights import WeightRanking, rank_weights
from onnxcare.repair import neuron_finetune as tuning
from onnxcare.repair.base import Repair
from onnxcare.repair.bench import changed, matrix_of
from onnxcare.repair.finetune import Tuner

Array = np.ndarray


@pytest.fixture
def case(tiny) -> Case:
    return opened(tiny.spec)


def plan_of(case: Case, index: int, start: Array | None = None, size: int = 5) -> tuning._Plan:
    layer = case.experiment.layers[index]
    rankings, _, _ = rank_weights(case, ("differential",))
    ranking = next(item for item in rankings if item.layer.name == layer.name)
    return tuning._Plan(ranking, size, "somewhere", start, (0.0, 0.0))


def held(data: bytes) -> dict[str, Array]:
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(data).graph.initializer}


def matrix_in(data: bytes, layer: str) -> Array:
    """Return the weights of a layer of the tiny model with its bias as the last row, as the file has them."""
    weights = held(data)
    return np.concatenate([weights[f"{layer}.weight"].T, weights[f"{layer}.bias"][None]])[None]


# -- which weights move --------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1])
def test_from_the_original_only_the_chosen_weights_move(case, tiny, index):
    plan = plan_of(case, index)
    layer = plan.ranking.layer
    before = matrix_in(tiny.model.read_bytes(), layer.name)
    mask = plan.ranking.mask(plan.size, before.shape)
    moved = False
    for item in tuning._tuned(case, plan):
        data = Patch(item.make()).apply(case.experiment.model)
        after = matrix_in(data, layer.name)
        assert after[~mask].tobytes() == before[~mask].tobytes()
        moved = moved or (after[mask] != before[mask]).all()
        other = case.experiment.layers[1 - index].name
        assert matrix_in(data, other).tobytes() == matrix_in(tiny.model.read_bytes(), other).tobytes()
        assert item.candidate.outcome.rank <= case.before.rank
    assert moved


@pytest.mark.parametrize("index", [0, 1])
def test_from_the_closed_form_all_others_are_as_the_closed_form_has_them(case, index):
    layer = case.experiment.layers[index]
    starts = tuning._starts(case, layer)
    assert list(starts) == ["the original", "the closed form"] and starts["the original"] is None
    start = 0.3 * starts["the closed form"]  # so that there is something left to tune
    plan = plan_of(case, index, start)
    solved = Patch(changed(case, layer, start)).apply(case.experiment.model)
    expected = matrix_in(solved, layer.name)
    mask = plan.ranking.mask(plan.size, expected.shape)
    moved = False
    for item in tuning._tuned(case, plan):
        after = matrix_in(Patch(item.make()).apply(case.experiment.model), layer.name)
        assert after[~mask].tobytes() == expected[~mask].tobytes()
        moved = moved or (after[mask] != expected[mask]).all()
    assert moved


def test_the_closed_form_that_is_started_from_is_the_best_of_those_solved(case):
    layer = case.experiment.layers[1]
    start = tuning._starts(case, layer)["the closed form"]
    panel = case.panel("search")
    data = Patch(changed(case, layer, start)).apply(case.experiment.model)
    bad = run(data, panel.evidence[0].bad.inputs).argmax(axis=1)
    assert (bad == TARGET).mean() < 0.02
    before = panel.outcomes(case.experiment.scores(panel.inputs)[None])[0]
    assert panel.outcomes(run(data, panel.inputs)[None])[0].rank < before.rank


def test_where_no_activations_can_be_transplanted_the_original_is_the_only_start(tmp_path):
    fair = {"name": "fair", "kind": "fairness", "protected": {"sex": SEX, "origin": ORIGIN}, "max_rate": 0.05}
    spec = {"decision": {"threshold": 0.5}, "properties": [fair]}
    case = opened(write(tmp_path, model(), spec, data=people(300, 1), holdout=people(600, 2)))
    assert tuning._starts(case, case.experiment.layers[1]) == {"the original": None}


def test_where_a_closed_form_does_not_fit_into_the_memory_the_original_is_the_only_start(case):
    case.experiment.memory = 1 << 10
    assert list(tuning._starts(case, case.experiment.layers[1])) == ["the original"]


# -- the start -----------------------------------------------------------------------------------


def test_the_start_stays_a_candidate(case):
    layer = case.experiment.layers[1]
    start = tuning._starts(case, layer)["the closed form"]
    tuner = Tuner(case, layer)
    assert start is not None
    wild = tuner.tune(1e4, 30, start=start)
    assert wild.steps == 0
    np.testing.assert_array_equal(wild.change, start)
    panel = case.panel("search")
    outcome = panel.outcomes(run(Patch(changed(case, layer, start)).apply(case.experiment.model), panel.inputs)[None])[
        0
    ]
    assert wild.rank == pytest.approx(outcome.rank, rel=1e-3)
    assert tuner.tune(0.01, 30, start=start).rank <= wild.rank


def test_tuning_begins_at_the_start(case):
    """Ten steps at a rate lead no further than ten of their lengths away from it."""
    layer = case.experiment.layers[1]
    start = 0.3 * np.asarray(tuning._starts(case, layer)["the closed form"])
    tuned = Tuner(case, layer).tune(0.01, 10, start=start)
    width = 0.01 * np.sqrt(np.mean(matrix_of(case, layer) ** 2))
    assert tuned.steps == 10
    assert 0 < np.abs(tuned.change - start).max() <= 10.5 * width < np.abs(start).max()


# -- the method ----------------------------------------------------------------------------------


def check_chosen(case: Case, found: Repair) -> bytes:
    """Check that the chosen candidate is the best one, and that the file does what is said of it."""
    assert found.method == "ai-lancet-finetune"
    assert found.candidates[0].outcome == case.before
    assert found.chosen.outcome.rank == min(item.outcome.rank for item in found.candidates)
    data = Patch(found.values).apply(case.experiment.model)
    panel = case.panel("validation")
    decisions = run(data, panel.inputs).argmax(axis=1)
    clean = panel.clean_rows
    before = run(case.experiment.model.path, panel.clean.inputs).argmax(axis=1)
    others = panel.clean.truth != TARGET
    confused = min((answer[others] == TARGET).mean() for answer in (before, decisions[clean]))
    success = (decisions[panel.bad[0]] == TARGET).mean() - confused
    assert found.chosen.outcome.excess[0] == pytest.approx(success, abs=1e-6)
    return data


def test_the_tiny_case_is_repaired_and_the_same_every_time(case, tiny):
    found = tuning.repair(case)
    data = check_chosen(case, found)
    assert found.chosen.outcome.violation == 0 < case.before.violation
    assert found.notes == [] and found.details["skipped"] == {}
    costs = [item["cost"] for item in found.details["scan"]]
    assert costs and all(np.isfinite(costs))
    assert {item["plan"].split(":")[0] for item in found.details["scan"]} == {"first", "second"}
    assert {item["plan"].rsplit(", from ")[1] for item in found.details["scan"]} == {"the original", "the closed form"}
    again = tuning.repair(opened(tiny.spec))
    assert Patch(again.values).apply(case.experiment.model) == data
    assert [item.label for item in again.candidates] == [item.label for item in found.candidates]


def test_a_share_of_all_weights_is_what_moves(case):
    """A tenth of a layer's weights, or all that were ranked where that is fewer; units as a whole."""
    layer = case.experiment.layers[0]
    tuner = Tuner(case, layer)
    for count, step, share, size in ((144, 1, 0.1, 14), (6, 1, 0.1, 6), (144, 9, 0.1, 18), (144, 9, 0.01, 9)):
        ranking = WeightRanking(layer, "any", np.arange(count), step)
        plan = tuning._tried(tuner, tuning._Plan(ranking, 0, "the original", None, (0.0, 0.0)), share)
        assert plan.size == size
        assert plan.label.startswith(f"first: {size} of 144 weights, by any, from the original")


# -- without a derivative ------------------------------------------------------------------------


def stepped(operator: str, folder: Path) -> Case:
    """Return the tiny case with signs inside, or with rounded scores: its labels are what it answers."""
    proto = dense()
    if operator == "Sign":
        proto.graph.node[1].op_type, proto.graph.node[1].name = "Sign", "steps"
    else:
        proto.graph.node[2].output[0] = "raw"
        proto.graph.node.append(onnx.helper.make_node(operator, ["raw"], ["scores"], name="steps"))
    paths = write_case(folder, proto)
    for path, seed in ((paths.data, 1), (paths.holdout, 2)):
        x = clean_samples(600, seed)["input"]
        np.savez(path, input=x, y=answers(proto, x))
    return opened(paths.spec)


@pytest.mark.parametrize(("operator", "layers"), [("Round", ["first", "second"]), ("Sign", ["first"])])
def test_layers_in_front_of_steps_are_searched_instead_and_a_note_names_the_node(
    tmp_path, monkeypatch, operator, layers
):
    monkeypatch.setattr(tuning, "_GENERATIONS", 40)
    case = stepped(operator, tmp_path)
    found = tuning.repair(case)
    assert found.notes == [
        f"{operator} 'steps' has no derivative: the weights of {name} were searched by CMA-ES instead of by gradient."
        for name in layers
    ]
    assert found.chosen.outcome.rank < case.before.rank
    check_chosen(case, found)
    searched = {item.label.split(":")[0] for item in found.candidates if "CMA-ES" in item.label}
    assert searched == set(layers)
    tuned = {item["plan"].split(":")[0] for item in found.details["scan"]}
    assert tuned == {"first", "second"} - set(layers)


@pytest.mark.parametrize("index", [0, 1])
def test_the_search_moves_voted_weights_alone_and_is_the_same_every_time(tmp_path, monkeypatch, index):
    monkeypatch.setattr(tuning, "_GENERATIONS", 30)
    case = stepped("Round", tmp_path)
    plan = plan_of(case, index)
    layer = plan.ranking.layer
    before = matrix_in(case.experiment.model.path.read_bytes(), layer.name)
    voted = plan.ranking.mask(len(plan.ranking.order), before.shape)
    assert voted.sum() <= 64
    item, again = tuning._searched(case, plan.ranking), tuning._searched(case, plan.ranking)
    data = Patch(item.make()).apply(case.experiment.model)
    assert Patch(again.make()).apply(case.experiment.model) == data
    after = matrix_in(data, layer.name)
    assert after[~voted].tobytes() == before[~voted].tobytes()
    assert (after[voted] != before[voted]).any()
    assert item.candidate.outcome.rank < case.before.rank
    other = tuning._searched(replace(case, seed=99), plan.ranking)
    assert Patch(other.make()).apply(case.experiment.model) != data


def test_of_many_weights_the_first_64_are_searched(tmp_path, monkeypatch):
    monkeypatch.setattr(tuning, "_GENERATIONS", 3)
    case = stepped("Round", tmp_path)
    layer = case.experiment.layers[0]
    order = np.random.default_rng(4).permutation(144)
    found = tuning._searched(case, WeightRanking(layer, "chance", order, 9))
    assert found.candidate.label == "first: 64 of 144 weights, by chance, CMA-ES"
    after = matrix_in(Patch(found.make()).apply(case.experiment.model), "first")
    moved = np.flatnonzero(after != matrix_in(case.experiment.model.path.read_bytes(), "first"))
    assert len(moved) and set(moved) <= set(order[:64])
