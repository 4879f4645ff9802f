"""Repair directions on the sample models: they work, they agree with the file, random directions do not work."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from cases import BLEND, SQUARE, sample_case

from onnxcare.errors import ModelError
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.patch import Patch
from onnxcare.panel import Outcome
from onnxcare.repair import directions
from onnxcare.repair.base import Found, Proposals


@functools.cache
def proposed(folder: Path = SQUARE) -> Proposals:
    return directions.propose(sample_case(folder))


@functools.cache
def searched(folder: Path = SQUARE) -> Proposals:
    """Return what is proposed where no closed form is good enough."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Outcome, "comfortable", False)
        return directions.propose(sample_case(folder))


@functools.cache
def best(folder: Path = SQUARE) -> Found:
    return min(proposed(folder).found, key=lambda item: item.candidate.outcome.rank)


def file_scores(folder: Path, values, inputs) -> np.ndarray:
    session = ort.InferenceSession(Patch(values).apply(sample_case(folder).experiment.model))
    scores = session.run(None, dict(inputs))[0]
    # One model answers logits, the other one probabilities.
    return scores if folder == SQUARE else np.log(np.maximum(scores, 1e-30))


def test_changes_of_a_large_layer_are_solved_for_again(monkeypatch):
    case = sample_case()
    layer = next(layer for layer in case.experiment.layers if layer.name == "/dense2/Gemm")
    monkeypatch.setattr(directions.closed_form, "_ALPHAS", (1.0,))
    kept = directions._refine(case, layer)
    monkeypatch.setattr(directions, "_SOLVED_AGAIN", 0)
    again = directions._refine(case, layer)
    assert [item.candidate for item in again] == [item.candidate for item in kept]
    for one, other in zip(again, kept, strict=True):
        assert one.solve is not other.solve
        np.testing.assert_allclose(one.solve(), other.solve(), atol=1e-9)


@pytest.mark.parametrize(
    "folder", [pytest.param(SQUARE, id=SQUARE.name), pytest.param(BLEND, id=BLEND.name, marks=pytest.mark.slow)]
)
def test_the_patched_file_does_what_was_measured(folder):
    found = best(folder)
    panel = sample_case(folder).panel("validation")
    outcome = panel.outcomes(file_scores(folder, found.make(), panel.inputs)[None])[0]
    assert outcome.excess == found.candidate.outcome.excess
    assert outcome.accuracy_drop == pytest.approx(found.candidate.outcome.accuracy_drop)
    np.testing.assert_allclose(outcome.cost, found.candidate.outcome.cost, rtol=1e-2, atol=1e-5)
    assert outcome.violation == 0


@pytest.mark.parametrize("pick", ["from closed form", "from zero", "alpha 1, rho 0.001, rank 1", "rank full", " rows"])
def test_every_candidate_can_be_made(pick):
    found = next(item for item in searched().found if pick in item.candidate.label)
    panel = sample_case().panel("validation")
    outcome = panel.outcomes(file_scores(SQUARE, found.make(), panel.inputs)[None])[0]
    np.testing.assert_allclose(outcome.cost, found.candidate.outcome.cost, rtol=1e-2, atol=1e-5)
    assert outcome.excess == pytest.approx(found.candidate.outcome.excess, abs=2 / len(panel.evidence[0].bad))


def test_one_layer_is_changed_and_cma_es_competed_from_both_starts():
    assert {parameter.name for parameter in best().make()} == {"dense1.weight", "dense1.bias"}
    labels = [item.candidate.label for item in searched().found]
    assert sum("CMA-ES" in label and "from closed form" in label for label in labels) == 1
    assert sum("CMA-ES" in label and "from zero" in label for label in labels) == 1
    # Two layers, by two weights: three ridges with four ranks each, and three shares of the rows with the last one.
    assert len(labels) == len(set(labels)) == 2 * 2 * (3 * 4 + 3) + 2
    assert {label.split(":")[0] for label in labels} == {"/dense1/Gemm", "/dense2/Gemm"}


def test_where_a_closed_form_keeps_every_limit_with_ease_nothing_is_searched():
    assert best().candidate.outcome.comfortable
    closed = [item.candidate for item in searched().found if "CMA-ES" not in item.candidate.label]
    assert [item.candidate for item in proposed().found] == closed
    assert proposed().details["cmaes_evaluations"] == 0


def test_positions_are_weighed_where_there_are_several_and_no_closed_form_is_good_enough(monkeypatch):
    case = sample_case()
    weights = directions._weights(case)
    assert {name: len(values) for name, values in weights.items()} == {"/conv1/Conv": 28**2, "/conv2/Conv": 14**2}
    assert all(values.mean() == pytest.approx(1) and (values >= 0).all() for values in weights.values())
    assert proposed().details["weighed scan"] == []
    assert {entry["layer"] for entry in searched().details["weighed scan"]} == set(weights)
    assert not any("weighed" in item.candidate.label for item in searched().found)
    # What is made of them is measured as what it is.
    monkeypatch.setattr(directions.closed_form, "_ALPHAS", (1.0,))
    monkeypatch.setattr(directions.closed_form, "RHOS", (1e-3,))
    monkeypatch.setattr(directions, "_RANKS", (None,))
    layer = next(layer for layer in case.experiment.layers if layer.name == "/conv2/Conv")
    plain, found = (directions._refine(case, layer, kind)[0] for kind in (None, weights[layer.name]))
    assert found.candidate.label == f"{plain.candidate.label}, positions weighed"
    assert found.candidate.outcome.cost != plain.candidate.outcome.cost
    panel = case.panel("validation")
    outcome = panel.outcomes(file_scores(SQUARE, directions._values(case, found), panel.inputs)[None])[0]
    np.testing.assert_allclose(outcome.cost, found.candidate.outcome.cost, rtol=1e-2, atol=1e-5)


def test_without_a_derivative_all_positions_count_alike(monkeypatch):
    def fail(*args):
        raise NoGradient("Sign 'sign' has no derivative")

    monkeypatch.setattr(directions, "position_weights", fail)
    assert directions._weights(sample_case()) == {}


def test_a_larger_network_gets_fewer_generations(monkeypatch):
    case, few = sample_case(), []
    change = next(item for item in searched().found if "rank 1" in item.candidate.label)

    def run(costs, start, sigma, seed, generations):
        few.append(generations)
        return SimpleNamespace(best=start, evaluations=1)

    monkeypatch.setattr(directions.cmaes, "minimise", run)
    layer = next(layer for layer in case.experiment.layers if layer.name == "/dense1/Gemm")
    shape = layer.matrix_shape
    drawn = 0.01 * np.random.default_rng(1).normal(size=shape)
    closed = directions._Change(layer, lambda: drawn, change.candidate)
    work = (
        case.experiment.multiply_adds
        * len(next(iter(case.panel("search").inputs.values())))
        * directions._PER_GENERATION
    )
    for wanted, allowed in ((60, 1e3), (60, 60.5), (7, 7.5), (1, 0.1)):
        monkeypatch.setattr(directions, "_SEARCH_WORK", allowed * work)
        found, _ = directions._search(case, closed, [closed, closed])
        assert few[-2:] == [wanted, wanted] and len(found) == 2


def test_the_scan_ranks_every_layer():
    details = proposed().details
    costs = [item["cost"] for item in details["scan"]]
    assert costs == sorted(costs)
    assert {item["layer"] for item in details["scan"]} == {
        layer.name for layer in sample_case().experiment.layers if layer.refusal is None
    }
    assert details["scan"][0]["layer"] == "/dense1/Gemm"
    assert details["skipped"] == {}
    assert searched().details["cmaes_evaluations"] > 100


def test_cma_es_from_zero_finds_a_repair_within_the_limits():
    (found,) = [item.candidate for item in searched().found if "from zero" in item.candidate.label]
    assert found.outcome.violation == 0


def test_random_directions_of_the_same_norm_do_not_repair():
    case, found = sample_case(), best()
    panel = case.panel("validation")
    rng = np.random.default_rng(11)
    for _ in range(5):
        values = {}
        for parameter, new in found.make().items():
            old = case.read(parameter)
            direction = rng.normal(size=old.shape)
            values[parameter] = old + direction * np.linalg.norm(new - old) / np.linalg.norm(direction)
        outcome = panel.outcomes(file_scores(SQUARE, values, panel.inputs)[None])[0]
        assert outcome.excess[0] > 0.5
        assert outcome.cost > 100 * found.candidate.outcome.cost


def test_layers_that_do_not_fit_into_the_memory_are_skipped_with_a_reason():
    case = sample_case.__wrapped__()
    # The largest activations and the largest system of equations do not fit, the others do.
    case.experiment.memory = 48 << 20
    found = directions.propose(case)
    skipped = found.details["skipped"]
    assert set(skipped) == {"/conv1/Conv", "/conv2/Conv", "/dense1/Gemm"}
    assert all("--memory" in reason for reason in skipped.values())
    assert {parameter.name for item in found.found for parameter in item.make()} == {"dense2.weight", "dense2.bias"}


def test_where_no_layer_fits_the_first_reason_is_given():
    case = sample_case.__wrapped__()
    case.experiment.memory = 1 << 10
    with pytest.raises(ModelError, match=r"no layer could be cut open for a repair; /conv1/Conv: .*--memory"):
        directions.propose(case)


def test_a_small_change_touches_some_rows_or_as_many_as_are_allowed():
    case = sample_case()
    layer = next(layer for layer in case.experiment.layers if layer.name == "/dense2/Gemm")
    everything = layer.matrix_shape[1]
    shares = {round(share * everything) for share in (0.02, 0.05, 0.2)}
    assert directions._some_rows(case, layer) == sorted(shares)
    for most, rows in ((9, None), (10, 1), (79, 7), (10 * everything, None)):
        expected = sorted(shares | ({rows} if rows else set()))
        assert directions._some_rows(replace(case, max_changed=most), layer) == expected
    touched = [
        (item.candidate.label, item.make()) for item in proposed().found if item.candidate.label.endswith("rows")
    ]
    assert len(touched) == 2 * 2 * 3
    for label, values in touched:
        count = int(label.rpartition(", ")[2].split()[0])
        changed = {}
        for parameter, new in values.items():
            differs = new != case.read(parameter)
            # [outputs, inputs], and the bias is a row of its own.
            changed[parameter.name] = differs.any(axis=0).sum() if new.ndim == 2 else int(differs.any())
        assert 0 < sum(changed.values()) <= count


def test_directions_are_for_evidence_that_can_be_transplanted():
    assert directions.applies(sample_case())
    layers, other = SimpleNamespace(open_layers=["layer"]), SimpleNamespace(transplantable=False)
    assert not directions.applies(SimpleNamespace(experiment=layers, properties=[]))
    assert not directions.applies(SimpleNamespace(experiment=layers, properties=[other]))
    assert directions.applies(SimpleNamespace(experiment=layers, properties=[other, *sample_case().properties]))
    none = SimpleNamespace(open_layers=[])
    assert not directions.applies(SimpleNamespace(experiment=none, properties=sample_case().properties))


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_the_search_starts_at_the_closed_form_whatever_its_rank(rank):
    rng = np.random.default_rng(rank)
    change = rng.normal(size=(2, 9, rank)) @ rng.normal(size=(2, rank, 8))
    others = [3 * rng.normal(size=change.shape), 0.1 * rng.normal(size=change.shape)]
    basis, start = directions._basis(change, [change, *others])
    np.testing.assert_allclose(sum(c * b for c, b in zip(start, basis, strict=True)), change, atol=1e-10)
    assert len(basis) == min(rank, 4) + (rank > 4) + 2
    assert all(np.linalg.norm(direction) > 1e-6 * np.linalg.norm(change) for direction in basis)
