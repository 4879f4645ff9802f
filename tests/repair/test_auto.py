"""The default method on the sample models: it works, its parts agree with the file, random directions do not work."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
from cases import BLEND, SQUARE, sample_case

from onnxcare.graph.patch import Patch
from onnxcare.repair import auto
from onnxcare.repair.base import Repair


@functools.cache
def repaired(folder: Path = SQUARE) -> Repair:
    return auto.repair(sample_case(folder))


@pytest.mark.parametrize("folder", [SQUARE, BLEND], ids=lambda path: path.name)
def test_the_patched_file_does_what_the_search_measured(folder):
    case, found = sample_case(folder), repaired(folder)
    data = Patch(found.values).apply(case.experiment.model)
    panel = case.panel("validation")
    session = ort.InferenceSession(data)
    scores = session.run(None, dict(panel.inputs))[0]
    if folder == BLEND:  # this one answers probabilities
        scores = np.log(np.maximum(scores, 1e-30))
    outcome = panel.outcomes(scores[None])[0]
    assert outcome.excess == found.chosen.outcome.excess
    assert outcome.accuracy_drop == pytest.approx(found.chosen.outcome.accuracy_drop)
    np.testing.assert_allclose(outcome.cost, found.chosen.outcome.cost, rtol=1e-2, atol=1e-5)
    assert outcome.violation == 0


def test_one_layer_is_changed_and_cma_es_competed_from_both_starts():
    found = repaired()
    assert {parameter.name for parameter in found.values} == {"dense1.weight", "dense1.bias"}
    labels = [candidate.label for candidate in found.candidates]
    assert sum("CMA-ES" in label and "from closed form" in label for label in labels) == 1
    assert sum("CMA-ES" in label and "from zero" in label for label in labels) == 1
    assert "no change" in labels
    assert found.chosen.outcome.cost == min(candidate.outcome.cost for candidate in found.candidates)


def test_cma_es_from_zero_finds_a_repair_within_the_limits():
    (searched,) = [c for c in repaired().candidates if "from zero" in c.label]
    assert searched.outcome.violation == 0


def test_random_directions_of_the_same_norm_do_not_repair():
    case, found = sample_case(), repaired()
    panel = case.panel("validation")
    rng = np.random.default_rng(11)
    for _ in range(5):
        values = {}
        for parameter, new in found.values.items():
            old = case.read(parameter)
            direction = rng.normal(size=old.shape)
            values[parameter] = old + direction * np.linalg.norm(new - old) / np.linalg.norm(direction)
        session = ort.InferenceSession(Patch(values).apply(case.experiment.model))
        outcome = panel.outcomes(session.run(None, dict(panel.inputs))[0][None])[0]
        assert outcome.excess[0] > 0.5
        assert outcome.cost > 100 * found.chosen.outcome.cost


def test_same_seed_same_bytes():
    case = sample_case()
    again = auto.repair(sample_case.__wrapped__())
    first, second = (Patch(found.values).apply(case.experiment.model) for found in (repaired(), again))
    assert first == second


def test_layers_that_do_not_fit_into_the_memory_are_skipped_with_a_reason():
    case = sample_case.__wrapped__()
    # The largest activations and the largest system of equations do not fit, the others do.
    case.experiment.memory = 48 << 20
    found = auto.repair(case)
    skipped = found.details["skipped"]
    assert set(skipped) == {"/conv1/Conv", "/conv2/Conv", "/dense1/Gemm"}
    assert all("--memory" in reason for reason in skipped.values())
    assert found.details["layer"] == "/dense2/Gemm"


@pytest.mark.parametrize("rank", [1, 2, 4, 6])
def test_the_search_starts_at_the_closed_form_whatever_its_rank(rank):
    rng = np.random.default_rng(rank)
    best = rng.normal(size=(2, 9, rank)) @ rng.normal(size=(2, rank, 8))
    others = [3 * rng.normal(size=best.shape), 0.1 * rng.normal(size=best.shape)]
    basis, start = auto._basis(best, [best, *others])
    np.testing.assert_allclose(sum(c * b for c, b in zip(start, basis, strict=True)), best, atol=1e-10)
    assert len(basis) == min(rank, 4) + (rank > 4) + 2
    assert all(np.linalg.norm(direction) > 1e-6 * np.linalg.norm(best) for direction in basis)
