"""Searching the smallest trigger that leads to a class: by gradient, and by CMA-ES where there is none.

    minimise over m, p    E[-log p_t(N(x * (1 - m) + p * m))] + price * mean(m)

with m in [0, 1] and p in the range of the input, both squashed by tanh. As in Neural Cleanse (Wang et al., S&P 2019)
Adam follows the gradient over batches, and the price doubles while the trigger works and falls while it does not.

Without a gradient CMA-ES (its diagonal form) searches a coarse grid of m and p on a fixed batch, with a price that
grows from one run to the next. It sees a trigger as large as a cell of its grid, or larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np

from onnxcare import cmaes
from onnxcare.adam import Adam
from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import Gradients
from onnxcare.properties.base import log_softmax
from onnxcare.properties.trigger import Trigger

Array = np.ndarray
Form = Literal["patch", "blend"]
FORMS: tuple[Form, ...] = get_args(Form)
# Lowest and highest value of every input value, in the shape of a sample.
Bounds = tuple[Array, Array]

_BATCH, _PATIENCE = 32, 40
_BETAS = (0.5, 0.9)
# Step sizes of the squashed pattern, and of the squashed mask; one number for the whole input moves with care.
_RATE, _MASK_RATES = 0.1, {"patch": 0.1, "blend": 0.05}
# Where the squashed mask starts: large enough for the gradient to be felt.
_STARTS = {"patch": -1.0, "blend": -0.5}
_WORKS = 0.99
# The price of a mask over everything: where it starts, and how far it may rise.
_PRICE, _DEAREST = 0.5, 1000.0
_STREAK = 5
# A trigger is smaller only if it is so by more than this share.
_SMALLER = 0.01
# Cells of the coarse grid along every axis of an image, and of any other input; generations for a step of the gradient.
_CELLS, _FLAT_CELLS, _GENERATIONS, _SIGMA = 7, 64, 0.4, 0.5
_RISE = 4.0
# Beyond this a squashed value is 0 or 1 but for one part in ten thousand.
_BOX = (-5.0, 5.0)


@dataclass(frozen=True)
class Restored:
    """The smallest trigger of one form that was found for a class.

    Attributes:
        target: the class.
        form: `patch` or `blend`.
        trigger: the trigger; None where none sends the samples to the class.
        size: mean of the mask, in (0, 1]; 1 where there is no trigger.
    """

    target: int
    form: Form
    trigger: Trigger | None
    size: float


@dataclass(frozen=True)
class Goal:
    """What is searched for.

    Attributes:
        experiment: the model.
        samples: clean samples of other classes than the target.
        target: the class that a trigger is to lead to.
        form: the shape of its mask.
        bounds: what its pattern may hold.
    """

    experiment: Experiment
    samples: Dataset
    target: int
    form: Form
    bounds: Bounds

    @property
    def name(self) -> str:
        """The model's only input."""
        (name,) = self.samples.inputs
        return name

    @property
    def values(self) -> Array:
        """The samples' values."""
        return self.samples.inputs[self.name]

    @property
    def mask_shape(self) -> tuple[int, ...]:
        """The shape of the mask, which broadcasts to a sample."""
        shape = self.values.shape[1:]
        return _positions(shape) if self.form == "patch" else (1,) * len(shape)

    def restored(self, mask: Array, pattern: Array) -> Restored:
        """Return a trigger in the type of the input."""
        values = self.values
        whole = np.broadcast_to(mask, values.shape[1:]).astype(values.dtype)
        trigger = Trigger(whole, pattern.astype(values.dtype), f"restored {self.form}")
        return Restored(self.target, self.form, trigger, float(mask.mean()))


class Search(Protocol):
    """A search that can be carried further.

    Attributes:
        goal: what it is for.
        best: the smallest trigger so far.
    """

    goal: Goal
    best: Restored

    def run(self, steps: int) -> None:
        """Search for so many steps of the gradient, or about as much work."""


class Descent:
    """The search by gradient; see `Search`."""

    def __init__(self, goal: Goal, gradients: Gradients, rng: np.random.Generator) -> None:
        """Start from a mask over everything.

        Args:
            goal: what is searched for.
            gradients: of the model's logits by its input.
            rng: draws start and batches.
        """
        self.goal, self._gradients, self._rng = goal, gradients, rng
        self._price, self._streak = 0.0, 0
        self.best = Restored(goal.target, goal.form, None, 1.0)
        noise = 0.1 if goal.form == "patch" else 0.0
        self._mask = _Squashed(_STARTS[goal.form] + noise * rng.normal(size=goal.mask_shape), _MASK_RATES[goal.form])
        self._pattern = _Squashed(0.1 * rng.normal(size=goal.values.shape[1:]), _RATE)

    def run(self, steps: int) -> None:
        """Follow the gradient for so many steps, fewer where triggers stop getting smaller; another call goes on.

        The smallest trigger that sent a whole batch to the target is kept.
        """
        since = 0
        for _ in range(steps):
            mask, pattern = self._mask.value, _within(self.goal.bounds, self._pattern.value)
            works = self._step(mask, pattern, self._price)
            size, since = float(mask.mean()), since + 1
            if works and size < self.best.size:
                since = 0 if size < (1 - _SMALLER) * self.best.size else since
                self.best = self.goal.restored(mask, pattern)
            if self.best.trigger is not None and since > _PATIENCE:
                break
            # Above zero it counts batches in a row on which the trigger worked, below zero those on which it did not.
            self._streak = max(self._streak, 0) + 1 if works else min(self._streak, 0) - 1
            if self._streak == _STREAK:
                self._price, self._streak = min(max(_PRICE, 2 * self._price), _DEAREST), 0
            if self._streak == -_STREAK:
                self._price, self._streak = self._price / 2**1.5, 0

    def _step(self, mask: Array, pattern: Array, price: float) -> bool:
        """Take one step on a random batch; return whether the trigger worked on it."""
        goal, decision = self.goal, self.goal.experiment.decision
        x = goal.values[self._rng.integers(0, len(goal.values), _BATCH)]
        stamped = (x + mask * (pattern - x)).astype(x.dtype)
        hits: list[Array] = []

        def slope(y: Array, rows: slice) -> Array:
            scores = decision.scores(y)
            hits.append(scores.argmax(axis=-1) == goal.target)
            by_scores = np.exp(log_softmax(scores))
            by_scores[:, goal.target] -= 1
            return decision.pull_back(by_scores / _BATCH)

        by_input = self._gradients({goal.name: stamped}, slope)[1][goal.name].astype(np.float64)
        by_mask = _summed((by_input * (pattern - x)).sum(axis=0), mask.shape) + price / mask.size
        self._mask.move(by_mask)
        self._pattern.move((by_input * mask).sum(axis=0) * (goal.bounds[1] - goal.bounds[0]))
        return float(np.concatenate(hits).mean()) >= _WORKS


class _Squashed:
    """Numbers in [0, 1] that Adam moves: tanh(w) / 2 + 1 / 2."""

    def __init__(self, start: Array, rate: float) -> None:
        self._w, self._adam = start, Adam(rate, _BETAS)

    @property
    def value(self) -> Array:
        found: Array = np.tanh(self._w) / 2 + 0.5
        return found

    def move(self, slope: Array) -> None:
        """Take a step against a gradient with respect to the numbers."""
        self._w = self._w + self._adam.step(slope * 2 * self.value * (1 - self.value))


class Blind:
    """The search without a gradient; see `Search`."""

    def __init__(self, goal: Goal, rng: np.random.Generator) -> None:
        """Start from a mask over everything.

        Args:
            goal: what is searched for.
            rng: draws the batch, and the seed of CMA-ES.
        """
        self.goal = goal
        self._x = goal.values[rng.integers(0, len(goal.values), _BATCH)]
        self._seed = int(rng.integers(1, 2**31 - 1))
        self._price = _PRICE
        self.best = Restored(goal.target, goal.form, None, 1.0)
        shape = goal.values.shape[1:]
        self._mask_cells = _cells(goal.mask_shape)
        self._pattern_cells = _cells(shape)
        masks = int(np.prod(self._mask_cells))
        self._at = np.concatenate([np.full(masks, _STARTS[goal.form]), np.zeros(int(np.prod(self._pattern_cells)))])
        self._masks = masks

    def run(self, steps: int) -> None:
        """Search three times, for a third of the generations each, at a price that grows as long as triggers work."""
        for _ in range(3):
            found = cmaes.minimise(
                self._costs,
                self._at,
                sigma=_SIGMA,
                seed=self._seed,
                bounds=_BOX,
                generations=max(1, round(steps * _GENERATIONS)),
                diagonal=True,
            )
            self._at = found.best
            if self.best.trigger is not None:
                self._price = min(_RISE * self._price, _DEAREST)

    def _costs(self, generation: Array) -> Array:
        masks, patterns = self._unfolded(generation)
        x = self._x
        stamped = x + masks[:, None] * (patterns[:, None] - x)
        flat = stamped.reshape(-1, *x.shape[1:]).astype(x.dtype)
        scores = self.goal.experiment.scores({self.goal.name: flat}).reshape(len(generation), len(x), -1)
        sizes = masks.reshape(len(masks), -1).mean(axis=1)
        works = (scores.argmax(axis=-1) == self.goal.target).mean(axis=1) >= _WORKS
        for index in np.flatnonzero(works & (sizes < self.best.size)):
            if sizes[index] < self.best.size:
                self.best = self.goal.restored(masks[index], patterns[index])
        return -log_softmax(scores)[..., self.goal.target].mean(axis=1) + self._price * sizes

    def _unfolded(self, generation: Array) -> tuple[Array, Array]:
        """Return masks and patterns, each value of a cell repeated over the cell."""
        shares = np.tanh(generation) / 2 + 0.5
        masks = shares[:, : self._masks].reshape(-1, *self._mask_cells)
        patterns = shares[:, self._masks :].reshape(-1, *self._pattern_cells)
        masks, patterns = _spread(masks, self.goal.mask_shape), _spread(patterns, self.goal.values.shape[1:])
        return masks, np.stack([_within(self.goal.bounds, pattern) for pattern in patterns])


def _cells(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the coarse grid: channels stay, positions of an image share cells."""
    if len(shape) == 1:
        return (min(shape[0], _FLAT_CELLS),)
    return tuple(min(length, _CELLS) for length in shape)


def _spread(coarse: Array, shape: tuple[int, ...]) -> Array:
    """Repeat the values of cells over the positions they stand for, along every axis but the first."""
    for axis, length in enumerate(shape, start=1):
        cell_of = np.arange(length) * coarse.shape[axis] // length
        coarse = np.take(coarse, cell_of, axis=axis)
    return coarse


def _within(bounds: Bounds, shares: Array) -> Array:
    found: Array = bounds[0] + (bounds[1] - bounds[0]) * shares
    return found


def _positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a mask that is shared by the channels of an image; any other input has no channels."""
    if len(shape) != 3:
        return shape
    if shape[0] in (1, 3, 4):
        return (1, *shape[1:])
    return (*shape[:2], 1) if shape[2] in (1, 3, 4) else shape


def _summed(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which a mask was broadcast."""
    axes = tuple(axis for axis, length in enumerate(shape) if length == 1 < gradient.shape[axis])
    found: Array = gradient.sum(axis=axes, keepdims=True)
    return found
