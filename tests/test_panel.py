"""What a panel measures, against counting by hand."""

from __future__ import annotations

import numpy as np
import pytest
from cases import sample_case

from onnxcare.panel import Panel
from onnxcare.properties.base import divergence, log_softmax


@pytest.fixture(scope="module")
def panel() -> Panel:
    return sample_case().panel("validation")


@pytest.fixture(scope="module")
def original(panel) -> np.ndarray:
    return sample_case().experiment.scores(panel.inputs)


def disturbed(original: np.ndarray, seed: int) -> np.ndarray:
    return original + 8 * np.random.default_rng(seed).normal(size=original.shape)


def test_an_unchanged_model_has_no_drops_and_its_own_attack_success(panel, original):
    outcome = panel.outcomes(original[None])[0]
    assert outcome.accuracy_drop == outcome.recall_drop == 0
    assert outcome.drift == pytest.approx(0, abs=1e-9)
    assert outcome.excess[0] > 0.98
    assert outcome.violation == pytest.approx(outcome.excess[0] - panel.properties[0].max_rate)


def test_outcomes_equal_counting_by_hand(panel, original):
    scores = disturbed(original, 1)
    outcome = panel.outcomes(scores[None])[0]
    labels = panel.clean.truth
    clean, bad = scores[panel.clean_rows].argmax(axis=1), scores[panel.bad[0]].argmax(axis=1)
    before = original[panel.clean_rows].argmax(axis=1)
    assert outcome.accuracy_drop == pytest.approx(np.mean(before == labels) - np.mean(clean == labels))
    drops = []
    for label in range(10):
        mine = labels == label
        drops.append(np.mean(before[mine] == label) - np.mean(clean[mine] == label))
    assert outcome.recall_drop == pytest.approx(max(drops))
    others = labels != 1
    confusion = min(np.mean(before[others] == 1), np.mean(clean[others] == 1))
    assert outcome.excess[0] == pytest.approx(np.mean(bad == 1) - confusion)
    assert outcome.cost == pytest.approx(outcome.loss + outcome.drift + 5 * outcome.violation)


def test_costs_are_smooth_and_lowest_for_the_answer_on_the_twins(panel, original):
    ideal = original.copy()
    ideal[panel.bad[0]] = sample_case().experiment.scores(panel.evidence[0].twins.inputs)
    halfway = (original + ideal) / 2
    costs = panel.costs(np.stack([original, halfway, ideal]))
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] == pytest.approx(0, abs=1e-6)


def test_costs_have_a_price_for_one_class_alone(panel, original):
    ideal = original.copy()
    ideal[panel.bad[0]] = sample_case().experiment.scores(panel.evidence[0].twins.inputs)
    sacrificed = ideal.copy()
    sacrificed[:, 1] -= 40
    cost = panel.costs(sacrificed[None])[0]
    without_price = panel.properties[0].loss(log_softmax(sacrificed[panel.bad[0]]), panel.twins[0]) + divergence(
        panel.reference, log_softmax(sacrificed[panel.clean_rows])
    )
    assert cost > without_price + 4.5  # the whole recall of the class, at five a unit


def test_a_limit_thins_clean_bad_and_twins_alike():
    case = sample_case()
    panel = case.panel("repair", 30)
    assert len(panel.clean) == 30
    assert len(panel.evidence[0].bad) == len(panel.evidence[0].twins) == 30
    np.testing.assert_array_equal(panel.evidence[0].bad.labels, panel.evidence[0].twins.labels)
    assert case.panel("repair", 30) is panel


def test_the_held_out_part_is_for_the_judge_alone():
    with pytest.raises(ValueError, match="judge"):
        sample_case().panel("holdout")
