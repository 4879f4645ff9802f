"""How answers are read: scores against decisions made by hand, gradients against finite differences."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from onnxcare.decision import Decision

Array = np.ndarray
STEP = 1e-6

RULES = {
    "argmax": Decision(),
    "argmax behind Softmax": Decision(final="Softmax"),
    "argmin": Decision("argmin"),
    "argmin scaled": Decision("argmin", scale=400.0),
    "threshold": Decision("threshold", 0.3),
    "threshold scaled": Decision("threshold", -1.2, scale=0.02),
    "threshold without a column": Decision("threshold", 0.3, column=False, scale=3.0),
    "threshold behind Sigmoid": Decision("threshold", 0.7, "Sigmoid"),
    "threshold behind Sigmoid without a column": Decision("threshold", 0.2, "Sigmoid", column=False),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest) -> Decision:
    return RULES[request.param]


def drawn(rule: Decision, *leading: int, seed: int = 0) -> Array:
    """Return values of y: [..., 9 samples, 4 or 1 values], or [..., 9 samples] without a column."""
    rng = np.random.default_rng(seed)
    if rule.rule != "threshold":
        return rng.normal(size=(*leading, 9, 4))
    return rng.normal(size=(*leading, 9, 1) if rule.column else (*leading, 9)) * 2


def answer(rule: Decision, y: Array) -> Array:
    """Return what the model answers, by hand."""
    if rule.final == "Softmax":
        return np.exp(y) / np.exp(y).sum(axis=-1, keepdims=True)
    return 1 / (1 + np.exp(-y)) if rule.final == "Sigmoid" else y


def by_hand(rule: Decision, output: Array) -> Array:
    """Return the decisions that an output stands for."""
    if rule.rule == "threshold":
        values = output[..., 0] if rule.column else output
        return (values > rule.threshold).astype(int)
    return output.argmin(axis=-1) if rule.rule == "argmin" else output.argmax(axis=-1)


def slopes(function: Any, at: Array) -> Array:
    """Return the gradient of a function that returns a number, by central differences."""
    found = np.zeros_like(at)
    for index in np.ndindex(at.shape):
        step = np.zeros_like(at)
        step[index] = STEP
        found[index] = (function(at + step) - function(at - step)) / (2 * STEP)
    return found


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_the_highest_score_is_the_decision(rule, leading):
    y = drawn(rule, *leading)
    scores = rule.scores(y)
    decisions = by_hand(rule, answer(rule, y))
    assert scores.shape == (*leading, 9, 2 if rule.rule == "threshold" else 4)
    np.testing.assert_array_equal(scores.argmax(axis=-1), decisions)
    assert len(np.unique(decisions)) > 1


def test_the_output_is_read_as_what_stands_in_front_of_it(rule):
    y = drawn(rule)
    output = answer(rule, y)
    plain = rule.of_output()
    assert (plain.rule, plain.threshold, plain.column) == (rule.rule, rule.threshold, rule.column)
    np.testing.assert_array_equal(plain.scores(output).argmax(axis=-1), rule.scores(y).argmax(axis=-1))
    # As it stands, not scaled.
    scores, column = plain.scores(output), output if rule.column else output[:, None]
    if rule.rule == "threshold":
        np.testing.assert_array_equal(scores, np.concatenate([np.full_like(column, rule.threshold), column], axis=1))
    else:
        np.testing.assert_array_equal(scores, -output if rule.rule == "argmin" else output)
    np.testing.assert_allclose(plain.outputs(scores), column, rtol=1e-12)


@pytest.mark.parametrize("leading", [(), (3,)])
def test_outputs_are_what_the_model_answers(rule, leading):
    y = drawn(rule, *leading)
    found = rule.outputs(rule.scores(y))
    output = answer(rule, y)
    np.testing.assert_allclose(found, output if rule.column else output[..., None], rtol=1e-12)


def test_a_value_of_exactly_the_threshold_is_not_above_it():
    for y in (np.array([[0.25], [0.5], [0.75]], np.float32), np.array([0.25, 0.5, 0.75], np.float32)):
        rule = Decision("threshold", 0.5, column=y.ndim == 2)
        assert rule.scores(y).argmax(axis=-1).tolist() == [0, 0, 1]
        assert dataclasses.replace(rule, scale=7.0).scores(y).argmax(axis=-1).tolist() == [0, 0, 1]
    behind = Decision("threshold", 0.5, "Sigmoid")
    assert behind.scores(np.array([[-0.1], [0.0], [0.1]])).argmax(axis=-1).tolist() == [0, 0, 1]


@pytest.mark.parametrize("leading", [(), (3,)])
def test_axes_of_length_one_behind_the_classes_are_looked_through(leading):
    for rule in (item for item in RULES.values() if item.column):
        pooled, y = dataclasses.replace(rule, ones=2), drawn(rule, *leading)
        scores = rule.scores(y)
        np.testing.assert_array_equal(pooled.scores(y[..., None, None]), scores)
        np.testing.assert_array_equal(pooled.outputs(scores), rule.outputs(scores))
        np.testing.assert_array_equal(pooled.pull_back(scores), rule.pull_back(scores)[..., None, None])
        assert pooled.of_output().ones == 2


def test_of_equal_values_the_first_is_decided_for():
    y = np.array([[3.0, 1.0, 1.0, 3.0]])
    assert Decision().scores(y).argmax(axis=-1) == [0]
    assert Decision("argmin", scale=2.0).scores(y).argmax(axis=-1) == [1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scores_keep_the_type_of_the_answers(rule, dtype):
    assert rule.scores(drawn(rule).astype(dtype)).dtype == dtype


# -- gradients -----------------------------------------------------------------------------------


def test_gradients_are_pulled_back_to_the_tensor(rule):
    y = drawn(rule)
    weights = np.random.default_rng(1).normal(size=rule.scores(y).shape)
    # A cost that bends, so that its gradient differs from place to place.
    gradient = weights * np.cos(rule.scores(y))
    expected = slopes(lambda at: float((weights * np.sin(rule.scores(at))).sum()), y)
    found = rule.pull_back(gradient)
    assert found.shape == y.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("leading", [(), (2,)])
def test_gradients_are_pulled_back_from_the_output(rule, leading):
    scores = rule.scores(drawn(rule, *leading))
    weights = np.random.default_rng(2).normal(size=rule.outputs(scores).shape)
    gradient = weights * np.cos(rule.outputs(scores))
    expected = slopes(lambda at: float((weights * np.sin(rule.outputs(at))).sum()), scores)
    found = rule.pull_back_outputs(scores, gradient)
    assert found.shape == scores.shape
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6 * np.abs(expected).max())


def test_both_ways_back_from_the_output_to_the_tensor(rule):
    y = drawn(rule)
    output = answer(rule, y)
    weights = np.random.default_rng(3).normal(size=output.shape)
    through = rule.pull_back_outputs(rule.scores(y), weights if rule.column else weights[..., None])
    expected = slopes(lambda at: float((weights * answer(rule, at)).sum()), y)
    np.testing.assert_allclose(rule.pull_back(through), expected, rtol=1e-4, atol=1e-8)


# -- scale ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e5])
@pytest.mark.parametrize("name", ["argmin", "threshold", "threshold without a column"])
def test_scores_that_are_no_logits_are_brought_to_their_order_of_magnitude(name, size):
    rule = dataclasses.replace(RULES[name], threshold=0.3 * size, scale=1.0)
    y = size * drawn(rule, seed=4)
    scaled = rule.scaled(y)
    margins = np.sort(scaled.scores(y), axis=-1)
    assert np.median(margins[:, -1] - margins[:, -2]) == pytest.approx(5)
    np.testing.assert_array_equal(scaled.scores(y).argmax(axis=-1), by_hand(rule, y))
    np.testing.assert_allclose(scaled.outputs(scaled.scores(y)), y if rule.column else y[:, None], rtol=1e-9)


def test_scaling_again_changes_nothing():
    rule = Decision("argmin")
    y = 1e3 * drawn(rule)
    assert rule.scaled(y).scaled(y).scale == pytest.approx(rule.scaled(y).scale)


@pytest.mark.parametrize("name", ["argmax", "argmax behind Softmax", "threshold behind Sigmoid"])
def test_logits_are_left_as_they_are(name):
    rule = RULES[name]
    assert rule.scaled(1e3 * drawn(rule)) == rule


def test_answers_that_are_all_alike_have_no_scale():
    assert Decision("argmin").scaled(np.ones((5, 3))).scale == 1
    assert Decision("threshold", 2.0).scaled(np.full((5, 1), 2.0)).scale == 1


def test_only_operators_that_leave_the_decision_as_it_is_are_taken_off():
    assert Decision().finals == ("Softmax",)
    assert Decision("argmin").finals == ()
    assert Decision("threshold", 0.5).finals == ("Sigmoid",)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, 1.5])
def test_no_tensor_in_front_of_a_sigmoid_stands_for_a_threshold_it_never_reaches(threshold):
    assert Decision("threshold", threshold).finals == ()
