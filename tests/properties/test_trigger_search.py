"""The searches for one class: the gradient of their objective, what CMA-ES may move, and what they find."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import hidden
import numpy as np
import pytest
from graph.models import build
from hidden import CHANNEL_FIRST, CHANNEL_LAST, FLAT, GREY, TARGET
from kinds import slopes
from scipy.special import log_softmax

from onnxcare.backward import input_gradients
from onnxcare.data import Dataset
from onnxcare.decision import Decision
from onnxcare.experiment import Experiment
from onnxcare.properties import trigger_search
from onnxcare.properties.trigger_search import Blind, Descent, Form, Goal, Restored, Search

Array = np.ndarray


# -- the gradient --------------------------------------------------------------------------------


class Chosen(np.random.Generator):
    """Draws a batch that the test has chosen."""

    batch: Array

    def integers(self, low: int, high: int, size: int | None = None) -> Array:
        """Return the chosen rows, or a number like any other generator."""
        return super().integers(low, high) if size is None else self.batch


def smooth_model(shape: tuple[int, ...], sign: int = 1) -> tuple[str, dict[str, Array]]:
    """Return a network of tanh units in double precision, so that central differences are exact."""
    rng = np.random.default_rng(5)
    size = int(np.prod(shape))
    text = f"""g (double[N, {", ".join(map(str, shape))}] x) => (double[N, 4] y) {{
        f = Flatten (x)
        z = MatMul (f, W1)
        h = Tanh (z)
        y = MatMul (h, W2)
    }}"""
    return text, {"W1": rng.normal(size=(size, 5)) / 2, "W2": sign * rng.normal(size=(5, 4))}


def opened(folder: Path, text: str, tensors: dict[str, Array], data: Dataset, decision: Decision) -> Experiment:
    return hidden.opened(build(text, tensors), data, folder, decision)


@pytest.mark.parametrize("rule", ["argmax", "argmin"])
@pytest.mark.parametrize("form", ["patch", "blend"])
@pytest.mark.parametrize("shape", [(6,), (3, 2, 2), (2, 2, 3)], ids=str)
def test_a_step_follows_the_gradient_of_the_documented_objective(tmp_path, monkeypatch, shape, form, rule):
    """Mask and pattern move by the slope of E[-log p_t(x (1 - m) + p m)] + price mean(m), mean over the whole input."""
    text, tensors = smooth_model(shape, 1 if rule == "argmax" else -1)
    rng = np.random.default_rng(8)
    x, price, target = rng.uniform(-1, 2, (50, *shape)), 0.7, 2
    experiment = opened(tmp_path, text, tensors, Dataset({"x": x}, np.zeros(50, np.int64)), Decision(rule))
    chance = Chosen(np.random.PCG64(1))
    chance.batch = rng.integers(0, 50, 32)
    low, high = np.full(shape, -1.0), np.linspace(1, 3, x[0].size).reshape(shape)
    samples = Dataset({"x": x}, np.zeros(50, np.int64))
    search = Descent(Goal(experiment, samples, target, form, (low, high)), input_gradients(experiment), chance)
    mask, share = search._mask.value, search._pattern.value
    slope_of = {}
    monkeypatch.setattr(trigger_search._Squashed, "move", lambda self, slope: slope_of.__setitem__(id(self), slope))
    search._step(mask, low + (high - low) * share, price)

    factor = 1.0 if rule == "argmax" else -experiment.decision.scale

    def objective(mask: Array, share: Array) -> float:
        costs = []
        for row in chance.batch:
            pattern = low + (high - low) * share
            stamped = x[row] * (1 - mask) + pattern * mask
            y = np.tanh(stamped.reshape(-1) @ tensors["W1"]) @ tensors["W2"]
            costs.append(-log_softmax(factor * y)[target])
        return float(np.mean(costs) + price * np.mean(np.broadcast_to(mask, shape)))

    by_mask = slopes(lambda family: [objective(item, share) for item in family], mask)
    by_pattern = slopes(lambda family: [objective(mask, item) for item in family], share)
    assert np.abs(by_mask).max() > 0.01 and np.abs(by_pattern).max() > 0.001
    np.testing.assert_allclose(slope_of[id(search._mask)], by_mask, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(slope_of[id(search._pattern)], by_pattern, rtol=1e-5, atol=1e-8)


def test_squashed_numbers_move_as_adam_moves_what_is_squashed():
    start, rate = np.array([-1.0, 0.0, 2.0]), 0.1
    squashed = trigger_search._Squashed(start.copy(), rate)
    rng = np.random.default_rng(2)
    slopes_of = rng.normal(size=(6, 3))
    w, first, second = start.copy(), np.zeros(3), np.zeros(3)
    for step, slope in enumerate(slopes_of, 1):
        squashed.move(slope)
        for i in range(3):
            gradient = slope[i] * (1 - math.tanh(w[i]) ** 2) / 2
            first[i] = 0.5 * first[i] + 0.5 * gradient
            second[i] = 0.9 * second[i] + 0.1 * gradient**2
            w[i] -= rate * (first[i] / (1 - 0.5**step)) / math.sqrt(second[i] / (1 - 0.9**step))
    np.testing.assert_allclose(squashed.value, [(math.tanh(item) + 1) / 2 for item in w], rtol=1e-9)


def test_squashed_numbers_without_a_slope_stay_where_they_are():
    squashed = trigger_search._Squashed(np.array([-1.0, 30.0]), 0.1)
    before = squashed.value
    for _ in range(3):
        squashed.move(np.zeros(2))
    np.testing.assert_array_equal(squashed.value, before)


@pytest.mark.parametrize(
    ("shape", "shared"),
    [
        ((1, 5, 4), (1, 5, 4)),
        ((3, 5, 4), (1, 5, 4)),
        ((4, 5, 6), (1, 5, 6)),
        ((5, 4, 1), (5, 4, 1)),
        ((5, 4, 3), (5, 4, 1)),
        ((5, 6, 4), (5, 6, 1)),
        ((2, 5, 6), (2, 5, 6)),
        ((5, 4), (5, 4)),
        ((7,), (7,)),
        ((1, 1, 1, 5), (1, 1, 1, 5)),
    ],
    ids=str,
)
def test_what_counts_as_channels(shape, shared):
    assert trigger_search._positions(shape) == shared


# -- without a gradient --------------------------------------------------------------------------


def goal_on(folder: Path, shape: tuple[int, ...], form: Form = "patch", target: int = TARGET, top: float = 1.0) -> Goal:
    """Return a goal on the model with a hidden trigger; the pattern may hold 0 to `top`, 0 alone in its first row."""
    data = hidden.samples(300, 1, shape)
    high = hidden.shaped(np.concatenate([np.zeros((1, 8)), np.full((7, 8), top)]), shape)
    others = data.take(np.flatnonzero(data.truth != target))
    experiment = hidden.opened(hidden.model(shape=shape), data, folder)
    return Goal(experiment, others, target, form, (np.zeros(shape), high))


def searched(goal: Goal, seed: int = 3, steps: int = 60) -> Blind:
    found = Blind(goal, np.random.default_rng(seed))
    found.run(steps)
    return found


def fine(length: int, cells: int) -> list[list[int]]:
    """Return the positions that share a cell, for cells as even as they can be, the first ones never the smaller."""
    edges = [math.ceil(cell * length / cells) for cell in range(cells + 1)]
    return [list(range(*pair)) for pair in itertools.pairwise(edges)]


@pytest.mark.parametrize("form", ["patch", "blend"])
@pytest.mark.parametrize("shape", [FLAT, GREY, CHANNEL_LAST], ids=["flat", "grey", "channel last"])
def test_what_is_found_without_a_gradient_sends_its_batch_to_the_class(tmp_path, shape, form):
    goal = goal_on(tmp_path, shape, form)
    chance = Chosen(np.random.PCG64(3))
    chance.batch = np.random.default_rng(5).integers(0, len(goal.samples), 32)
    search = Blind(goal, chance)
    search.run(60)
    trigger = search.best.trigger
    assert trigger is not None and trigger.source == f"restored {form}"
    assert (search.best.target, search.best.form) == (TARGET, form)
    x = goal.samples.inputs["x"][chance.batch]
    proto = hidden.model(shape=shape)
    assert (hidden.answers(proto, x) != TARGET).all()
    stamped = np.stack([row * (1 - trigger.mask) + trigger.pattern * trigger.mask for row in x]).astype(np.float32)
    # All of them, in the arithmetic of the search; one may be lost where the trigger is rounded to that of the input.
    assert (hidden.answers(proto, stamped) == TARGET).sum() >= 31


@pytest.mark.parametrize("form", ["patch", "blend"])
@pytest.mark.parametrize("shape", [(70,), (2, 15, 9), (3, 9, 16), (9, 16, 3)], ids=str)
def test_positions_of_a_cell_share_mask_and_pattern(tmp_path, shape, form):
    """An image has 7 x 7 cells and channels of their own, anything else 64 cells at most."""
    text, tensors = smooth_model(shape)
    x = np.random.default_rng(8).uniform(-1, 2, (50, *shape))
    experiment = opened(tmp_path, text, tensors, Dataset({"x": x}, np.zeros(50, np.int64)), Decision())
    low, high = np.full(shape, -1.0), np.full(shape, 2.0)
    found = []
    for target in range(4):
        goal = Goal(experiment, Dataset({"x": x}, None), target, form, (low, high))
        found += [searched(goal, steps=8).best]
    triggers = [item.trigger for item in found if item.trigger is not None]
    assert triggers
    cells = [fine(length, min(length, 64 if len(shape) == 1 else 7)) for length in shape]
    for trigger in triggers:
        values = 0
        for cell in np.ndindex(*map(len, cells)):
            block = np.ix_(*(axis[i] for axis, i in zip(cells, cell, strict=True)))
            assert len(np.unique(trigger.mask[block])) == len(np.unique(trigger.pattern[block])) == 1
            values += 1
        assert len(np.unique(trigger.pattern)) == values < trigger.pattern.size
        channels = shape[0] if shape[0] == 3 else shape[-1] if shape[-1] == 3 else 1
        assert len(np.unique(trigger.mask)) == (1 if form == "blend" else values // channels)


@pytest.mark.parametrize("form", ["patch", "blend"])
@pytest.mark.parametrize("shape", [FLAT, CHANNEL_FIRST], ids=["flat", "channel first"])
def test_what_is_found_without_a_gradient_keeps_to_bounds_and_has_the_size_of_its_mask(tmp_path, shape, form):
    best = searched(goal_on(tmp_path, shape, form, top=0.75)).best
    trigger = best.trigger
    assert trigger is not None
    assert trigger.mask.shape == trigger.pattern.shape == shape
    assert trigger.mask.dtype == trigger.pattern.dtype == np.float32
    assert trigger.mask.min() >= 0 and trigger.mask.max() <= 1
    assert trigger.pattern.min() >= 0 and trigger.pattern.max() <= 0.75
    first = trigger.pattern.reshape(-1)[:8] if shape == FLAT else trigger.pattern[:, 0]
    assert (first == 0).all() and (trigger.pattern.max() > 0.3)
    total = sum(float(value) for value in trigger.mask.reshape(-1))
    assert best.size == pytest.approx(total / int(np.prod(shape)), rel=1e-5)


def test_the_same_seed_finds_the_same_bytes_without_a_gradient_and_global_chance_is_left_alone(tmp_path):
    goal = goal_on(tmp_path, GREY)
    np.random.seed(99)
    before = np.random.get_state()
    first, again, other = (searched(goal, seed).best for seed in (3, 3, 4))
    after = np.random.get_state()
    assert before[0] == after[0] and before[2:] == after[2:]
    np.testing.assert_array_equal(before[1], after[1])
    assert first.trigger is not None and again.trigger is not None and other.trigger is not None
    assert first.size == again.size
    assert first.trigger.mask.tobytes() == again.trigger.mask.tobytes()
    assert first.trigger.pattern.tobytes() == again.trigger.pattern.tobytes()
    assert first.trigger.mask.tobytes() != other.trigger.mask.tobytes()


def test_a_search_without_a_gradient_that_is_carried_further_finds_a_smaller_trigger(tmp_path):
    search = searched(goal_on(tmp_path, GREY), steps=20)
    sizes = [search.best.size]
    for _ in range(2):
        search.run(60)
        sizes.append(search.best.size)
    assert sizes[0] > sizes[1] >= sizes[2]


@pytest.mark.parametrize("way", ["by gradient", "without"])
def test_where_no_trigger_leads_to_a_class_there_is_none_and_its_size_is_one(tmp_path, way):
    """Class 3 stays behind class 0 whatever the input is."""
    text, tensors = smooth_model((6,))
    tensors["W2"][:, 3] = tensors["W2"][:, 0]
    x = np.random.default_rng(8).uniform(-1, 2, (50, 6))
    samples = Dataset({"x": x}, np.zeros(50, np.int64))
    experiment = opened(tmp_path, text, tensors, samples, Decision())
    goal = Goal(experiment, samples, 3, "patch", (np.full(6, -1.0), np.full(6, 2.0)))
    rng = np.random.default_rng(1)
    search: Search = Blind(goal, rng) if way == "without" else Descent(goal, input_gradients(experiment), rng)
    search.run(20)
    assert search.best == Restored(3, "patch", None, 1.0)
