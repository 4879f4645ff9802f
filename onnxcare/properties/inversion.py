"""Restoring triggers that nobody has seen, from clean samples and the model's gradients.

For a class t, the smallest trigger that sends samples of the other classes to it,

    minimise over m, p    E[-log p_t(N(x * (1 - m) + p * m))] + price * mean(m)

with m in [0, 1] and p in the range of the input. A backdoor is a short cut: the trigger of its target is far smaller
than that of any other class. As in Neural Cleanse (Wang et al., S&P 2019) m and p are squashed to their ranges by tanh,
Adam follows the gradient over batches, and the price doubles while the trigger works and falls while it does not.

Two forms differ in the shape of m alone. A *patch* has a value for every position, shared by the channels; it tells
which classes are suspected. A *blend* has one value for the whole input. A pattern that was blended over everything
comes back as a patch of a few pixels, which gives the class away and is not the trigger; so for a suspected class a
blend is restored as well, and belongs to the evidence where it is far smaller than those of a few other classes. By
itself it is none: networks with normalisation answer faint grey over anything with one class, and nobody planted that.

Sizes s_t = mean(m_t) of ordinary classes differ by factors, so they are compared by their logarithms. The k smallest
are suspected, for the k <= classes / 3 with the widest gap to the next one, if that gap is more than a factor 2 k and

    index_t = (median of log s over the rest - log s_t) / sqrt((prior^2 + spread^2) / 2)  >  3

where the spread is 1.4826 times the median deviation of those of the rest that lie below its median: classes that
are hard to reach are no measure of how easy one may be. The prior goes in because a few classes may agree by chance.
Neural Cleanse compares sizes themselves, by median and MAD over all classes, which flags ordinary ones among ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import scipy.special

from onnxcare.backward import input_gradients
from onnxcare.data import Dataset
from onnxcare.errors import DataError
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import Gradients
from onnxcare.properties.base import log_softmax
from onnxcare.properties.trigger import Trigger

Array = np.ndarray
Form = Literal["patch", "blend"]
FORMS: tuple[Form, ...] = get_args(Form)
# Lowest and highest value of every input value, in the shape of a sample.
Bounds = tuple[Array, Array]

# So many steps for every class, and as many more for the smallest triggers.
_STEPS, _FURTHER, _BATCH, _PATIENCE = 100, 3, 32, 40
_BETAS, _EPSILON = (0.5, 0.9), 1e-12
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
# By how much the logarithms of trigger sizes of ordinary classes differ, however equal a few of them may seem.
_PRIOR = 0.5
_GAP, _SUSPICIOUS = 2.0, 3.0
# A blend is compared with those of so many other classes; it has to be smaller than this share of the smallest.
_COMPARED, _FAR_SMALLER = 3, 0.5
# Nothing is known about the far tails of trigger sizes.
_SUREST = 0.999


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
class Suspect:
    """A class to which a trigger leads that is far smaller than those of other classes.

    Attributes:
        target: the class.
        triggers: the restored triggers that give it away, the patch first.
        index: the outlier index of the patch.
        confidence: probability that ordinary classes show no such outlier, if the logarithms of sizes were normal.
        ratio: the size of the patch in terms of the median size of the other classes.
    """

    target: int
    triggers: tuple[Trigger, ...]
    index: float
    confidence: float
    ratio: float


@dataclass(frozen=True)
class Standing:
    """How small the patch of a class is beside those of others: outlier index, and size in terms of their median."""

    index: float
    ratio: float


@dataclass(frozen=True)
class Scan:
    """What was found in a model.

    Attributes:
        patches: the smallest patch of every class.
        suspects: the classes that stand out, the most suspicious one first.
    """

    patches: Sequence[Restored]
    suspects: Sequence[Suspect]

    def nearest(self) -> tuple[Restored, Standing]:
        """Return the class with the smallest patch, and how it stands beside all others."""
        smallest = min(self.patches, key=lambda item: item.size)
        return smallest, _standing(smallest, [item for item in self.patches if item is not smallest])


def scan(
    experiment: Experiment,
    clean: Dataset,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    bounds: Bounds | None = None,
) -> Scan:
    """Restore the smallest patch of every class, and blends of those that stand out.

    Args:
        experiment: the model.
        clean: labelled samples; those of a class itself are left out of the search for its trigger.
        seed: fixes starts and batches.
        progress: told in a few words what is being done.
        bounds: what a trigger may hold; None takes the range of the data.

    Raises:
        NoGradient: an operator has no derivative.
        DataError: the input does not hold real numbers, or all samples are of one class.
    """
    search = _opened(experiment, clean, seed, bounds)
    searches = []
    for target in range(experiment.classes):
        progress(f"restoring triggers: class {target} of {experiment.classes}")
        searches.append(search(target, "patch"))
    for item in sorted(searches, key=lambda item: item.best.size)[:_FURTHER]:
        item.run(_STEPS)
    patches = [item.best for item in searches]
    suspected, rest = stand_out(patches)
    others = [item.target for item in rest][:: max(1, len(rest) // _COMPARED)][:_COMPARED]
    blends = {target: search(target, "blend").best for target in others} if suspected else {}
    suspects = []
    for patch in suspected:
        progress(f"restoring a blend of class {patch.target}")
        assert patch.trigger is not None
        blend = search(patch.target, "blend").best
        telling = blend.size < _FAR_SMALLER * min(item.size for item in blends.values())
        triggers = (patch.trigger, blend.trigger) if telling and blend.trigger is not None else (patch.trigger,)
        standing = _standing(patch, rest)
        chance = experiment.classes * float(scipy.special.ndtr(-standing.index))
        confidence = float(np.clip(1 - chance, 0, _SUREST))
        suspects.append(Suspect(patch.target, triggers, standing.index, confidence, standing.ratio))
    return Scan(patches, sorted(suspects, key=lambda suspect: -suspect.index))


def smallest_patch(
    experiment: Experiment, clean: Dataset, target: int, seed: int, bounds: Bounds | None = None
) -> Restored:
    """Return the smallest patch of one class, searched as long as the smallest ones of a scan are; see `scan`."""
    found = _opened(experiment, clean, seed, bounds)(target, "patch")
    found.run(_STEPS)
    return found.best


def _opened(experiment: Experiment, clean: Dataset, seed: int, bounds: Bounds | None) -> Callable[[int, Form], _Search]:
    """Return what carries out the first steps of a search for a class and form."""
    ((name, values),) = clean.inputs.items()
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"input {name!r} holds {values.dtype}: triggers can only be restored for real numbers")
    if len(np.unique(clean.truth)) < 2:
        raise DataError("all samples are of one class; to restore triggers, samples of others are needed")
    gradients = input_gradients(experiment)
    within = bounds if bounds is not None else _range(values)

    def search(target: int, form: Form) -> _Search:
        rng = np.random.default_rng([seed, target, FORMS.index(form)])
        found = _Search(experiment, gradients, name, values[clean.truth != target], target, form, within, rng)
        found.run(_STEPS)
        return found

    return search


def stand_out(patches: Sequence[Restored]) -> tuple[list[Restored], list[Restored]]:
    """Return the patches that are suspiciously small, and the rest; see the module's docstring for the rule."""
    order = sorted(patches, key=lambda item: item.size)
    gaps = {k: order[k].size / order[k - 1].size / k for k in range(1, max(1, len(order) // 3) + 1)}
    k = max(gaps, key=lambda k: gaps[k])
    few, rest = order[:k], order[k:]
    if gaps[k] <= _GAP or any(_standing(item, rest).index <= _SUSPICIOUS for item in few):
        return [], order
    return few, rest


def _standing(item: Restored, rest: Sequence[Restored]) -> Standing:
    logarithms = np.log([other.size for other in rest])
    median = float(np.median(logarithms))
    below = 1.4826 * float(np.median(median - logarithms[logarithms <= median]))
    spread = float(np.hypot(_PRIOR, below)) / np.sqrt(2)
    return Standing(float((median - np.log(item.size)) / spread), item.size / float(np.exp(median)))


class _Search:
    """The search for one class and form.

    Attributes:
        best: the smallest trigger so far.
    """

    def __init__(
        self,
        experiment: Experiment,
        gradients: Gradients,
        name: str,
        samples: Array,
        target: int,
        form: Form,
        bounds: Bounds,
        rng: np.random.Generator,
    ) -> None:
        self._decision, self._gradients, self._name = experiment.decision, gradients, name
        self._samples, self._rng = samples, rng
        self._price, self._streak = 0.0, 0
        self.best = Restored(target, form, None, 1.0)
        self._low, self._width = bounds[0], bounds[1] - bounds[0]
        shape = samples.shape[1:]
        mask_shape = _positions(shape) if form == "patch" else (1,) * len(shape)
        noise = 0.1 if form == "patch" else 0.0
        self._mask = _Squashed(_STARTS[form] + noise * rng.normal(size=mask_shape), _MASK_RATES[form])
        self._pattern = _Squashed(0.1 * rng.normal(size=shape), _RATE)

    def run(self, steps: int) -> None:
        """Follow the gradient for so many steps, fewer where triggers stop getting smaller; another call goes on.

        The smallest trigger that sent a whole batch to the target is kept.
        """
        since = 0
        for _ in range(steps):
            mask, pattern = self._mask.value, self._low + self._width * self._pattern.value
            works = self._step(mask, pattern, self._price)
            size, since = float(mask.mean()), since + 1
            if works and size < self.best.size:
                since = 0 if size < (1 - _SMALLER) * self.best.size else since
                self.best = Restored(self.best.target, self.best.form, self._trigger(mask, pattern), size)
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
        x = self._samples[self._rng.integers(0, len(self._samples), _BATCH)]
        stamped = (x + mask * (pattern - x)).astype(x.dtype)
        hits: list[Array] = []

        def slope(y: Array, rows: slice) -> Array:
            scores = self._decision.scores(y)
            hits.append(scores.argmax(axis=-1) == self.best.target)
            by_scores = np.exp(log_softmax(scores))
            by_scores[:, self.best.target] -= 1
            return self._decision.pull_back(by_scores / _BATCH)

        by_input = self._gradients({self._name: stamped}, slope)[1][self._name].astype(np.float64)
        by_mask = _summed((by_input * (pattern - x)).sum(axis=0), mask.shape) + price / mask.size
        self._mask.move(by_mask)
        self._pattern.move((by_input * mask).sum(axis=0) * self._width)
        return float(np.concatenate(hits).mean()) >= _WORKS

    def _trigger(self, mask: Array, pattern: Array) -> Trigger:
        dtype = self._samples.dtype
        whole = np.broadcast_to(mask, self._samples.shape[1:]).astype(dtype)
        return Trigger(whole, pattern.astype(dtype), f"restored {self.best.form}")


class _Squashed:
    """Numbers in [0, 1] that Adam (Kingma and Ba, ICLR 2015) moves: tanh(w) / 2 + 1 / 2."""

    def __init__(self, start: Array, rate: float) -> None:
        self._w, self._rate = start, rate
        self._first, self._second, self._steps = np.zeros_like(start), np.zeros_like(start), 0

    @property
    def value(self) -> Array:
        found: Array = np.tanh(self._w) / 2 + 0.5
        return found

    def move(self, slope: Array) -> None:
        """Take a step against a gradient with respect to the numbers."""
        slope = slope * 2 * self.value * (1 - self.value)
        self._steps += 1
        self._first = _BETAS[0] * self._first + (1 - _BETAS[0]) * slope
        self._second = _BETAS[1] * self._second + (1 - _BETAS[1]) * slope**2
        unbiased = self._first / (1 - _BETAS[0] ** self._steps)
        scale = np.sqrt(self._second / (1 - _BETAS[1] ** self._steps))
        self._w = self._w - self._rate * unbiased / (scale + _EPSILON)


def _positions(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a mask that is shared by the channels of an image; any other input has no channels."""
    if len(shape) != 3:
        return shape
    if shape[0] in (1, 3, 4):
        return (1, *shape[1:])
    return (*shape[:2], 1) if shape[2] in (1, 3, 4) else shape


def _range(values: Array) -> Bounds:
    """Return lowest and highest values of an input.

    A pixel that is black in all the data may be white in a trigger, so all values share one range; columns of a table
    that are measured on scales of their own do not.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    whole = float(high.max() - low.min())
    varying = (high - low)[high > low]
    if values.ndim == 2 and varying.size and np.median(varying) < whole / 2:
        return low, high
    return np.full_like(low, low.min()), np.full_like(high, high.max())


def _summed(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Sum a gradient over the axes along which a mask was broadcast."""
    axes = tuple(axis for axis, length in enumerate(shape) if length == 1 < gradient.shape[axis])
    found: Array = gradient.sum(axis=axes, keepdims=True)
    return found
