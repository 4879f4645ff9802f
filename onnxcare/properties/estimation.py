"""Estimating a static trigger from triggered samples whose clean twins nobody has.

What can be compared are the values at each position, in ascending order: those of the triggered samples with those
that clean samples of the same classes have at the same ranks. A static trigger that never turns the order of two
values around maps the one to the other, and a median over the ranks is exact already where half of the values agree:
on images, where much is background, a handful of samples is often enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcare.data import Dataset
from onnxcare.properties.trigger import Added, Array, Range, Static, Trigger

# A value of a patch hardly varies over triggered samples: by less than this share of the range.
_CONSTANT = 0.02
# How likely it may be that a value of any clean input stays that constant over as many samples by chance.
_CHANCE = 1e-3
# Shares of a blend that are told from none and from all.
_SHARES = (0.02, 0.98)
# How close a form comes is measured on each of so many parts of the triggered samples.
_FOLDS = 5
# A patch leaves all other values alone, where the other forms take up whatever else tells the clean samples at hand
# from the triggered ones: they are preferred to it only where they come this much closer.
_ALLOWANCE = 0.9
# How many ranks, clean samples and positions are looked at; more do not give better estimates.
_RANKS, _CLEAN, _POSITIONS = 200, 2000, 2000
# Samples are sorted this many values at a time.
_PIECE = 1 << 22
# Values so close to an end of the range (in shares of it) were cut off there.
_CUT_OFF = 1e-6


def estimate_triggers(triggered: Dataset, clean: Dataset, name: str, values: Range) -> list[Static]:
    """Return static triggers that could have turned clean samples into the triggered ones, the closest first.

    Three forms are tried: a patch, whose values are so constant over the triggered samples as clean ones would not be
    by chance; an even blend, of the same share everywhere; and a pattern that is added. The last two follow the noise
    of every value, so how close they come is measured on samples that they were not estimated from.

    Args:
        triggered: inputs with the trigger; labels are the true ones, if known.
        clean: inputs without it.
        name: the model input to look at.
        values: the range of inputs.
    """
    if len(triggered) < 2:
        return []
    whole = _Ranked.of(triggered, clean, name)
    fold = np.arange(len(triggered)) % _FOLDS
    parts = [
        [_Ranked.of(triggered.take(rows), clean, name) for rows in (fold != number, fold == number)]
        for number in np.unique(fold)
    ]
    patch = _patch(triggered.inputs[name], clean.inputs[name])
    forms: list[Callable[[_Ranked], Static | None]] = [
        lambda pairs: patch,
        lambda pairs: _blend(pairs, values),
        lambda pairs: _added(pairs, values),
    ]
    found = []
    for form in forms:
        trigger = form(whole)
        if trigger is not None:
            distance = sum(held_out.distance(form(others)) for others, held_out in parts)
            found.append((distance * (_ALLOWANCE if trigger is patch else 1), trigger))
    return [trigger for _, trigger in sorted(found, key=lambda item: item[0])]


@dataclass(frozen=True)
class _Ranked:
    """Values at every position in ascending order.

    Attributes:
        bad: [ranks, *shape] those of the triggered samples.
        good: [ranks, *shape] those of clean samples at the same ranks.
    """

    bad: Array
    good: Array

    @classmethod
    def of(cls, triggered: Dataset, clean: Dataset, name: str) -> _Ranked:
        """Sort triggered samples, and clean ones of the same classes."""
        ranks = min(len(triggered), _RANKS)
        everything = np.arange(len(triggered))
        return cls(
            _in_order(triggered.inputs[name], everything, ranks),
            _in_order(clean.inputs[name], _alike(triggered, clean), ranks),
        )

    def some(self) -> tuple[Array, Array]:
        """Return both with the positions flattened and thinned out, [ranks, positions]."""
        bad, good = self.bad.reshape(len(self.bad), -1), self.good.reshape(len(self.good), -1)
        step = -(-bad.shape[1] // _POSITIONS)
        return bad[:, ::step], good[:, ::step]

    def distance(self, trigger: Static | None) -> float:
        """Return how far clean values with the trigger on them are from the triggered ones, in the mean.

        Stamping keeps the order of values, so what was sorted before is sorted afterwards.
        """
        return math.inf if trigger is None else float(np.abs(self.bad - trigger.stamp(self.good)).mean())


def _in_order(values: Array, rows: Array, ranks: int) -> Array:
    """Return the values of some samples at evenly spaced ranks, [ranks, *shape]; real numbers."""
    flat = values.reshape(len(values), -1)
    at = ((np.arange(ranks) + 0.5) / ranks * len(rows)).astype(int)
    width = max(1, _PIECE // len(rows))
    pieces = [np.sort(flat[:, i : i + width][rows], axis=0)[at] for i in range(0, flat.shape[1], width)]
    found = np.concatenate(pieces, axis=1).reshape(ranks, *values.shape[1:])
    return found.astype(np.result_type(values.dtype, np.float32), copy=False)


def _alike(triggered: Dataset, clean: Dataset) -> Array:
    """Return rows of clean samples that have the class shares of the triggered ones, where labels allow it."""
    if triggered.labels is None or clean.labels is None:
        return np.arange(len(clean))
    labels, counts = np.unique(triggered.labels, return_counts=True)
    of_class = [np.flatnonzero(clean.labels == label) for label in labels]
    if not all(map(len, of_class)):
        return np.arange(len(clean))
    each = max(1, _CLEAN // len(triggered))
    return np.concatenate([np.resize(rows, count * each) for rows, count in zip(of_class, counts, strict=True)])


def _patch(bad: Array, good: Array) -> Trigger | None:
    span = float(good.max() - good.min()) or 1.0
    value = np.median(bad, axis=0)
    constant = np.abs(bad - value).max(axis=0) < _CONSTANT * span
    share = (np.abs(good - value) < _CONSTANT * span).mean(axis=0)
    by_chance = share ** len(bad) * share.size
    mask = (constant & (by_chance < _CHANCE)).astype(good.dtype)
    if not mask.any():
        return None
    return Trigger(mask, (value * mask).astype(good.dtype), "patch")


def _blend(pairs: _Ranked, values: Range) -> Trigger | None:
    """Estimate an even blend: of all shares m the one at which x' - (1 - m) x varies least at every position.

    At each position m * pattern is the median of that difference over the ranks.
    """
    bad, good = pairs.some()

    def misfit(share: float) -> float:
        rest = bad - (1 - share) * good
        return float(np.abs(rest - np.median(rest, axis=0)).mean())

    low, high = _SHARES
    share = min(np.linspace(low, high, 49), key=misfit)
    share = float(min(np.linspace(max(low, share - 0.02), min(high, share + 0.02), 41), key=misfit))
    if not low < share < high:
        return None
    pattern = np.median(pairs.bad - (1 - share) * pairs.good, axis=0) / share
    kind = pairs.bad.dtype
    return Trigger(np.full(pattern.shape, share, kind), np.clip(pattern, *values).astype(kind), "blend")


def _added(pairs: _Ranked, values: Range) -> Added | None:
    """Estimate a pattern that is added: the median over the ranks of x' - x, or what is closer to zero by chance.

    Where x' lies at an end of the range, the clip hides how far x + added went beyond it: x' - x is a bound on one
    side there, and the middle of the ends of all such intervals takes the place of the median. The rank of a median
    varies by half the root of the number of samples: of the values within that, the one nearest to zero is taken, so
    that where nothing is added little is seen.
    """
    low, high = values
    margin = _CUT_OFF * np.asarray(high - low)
    shift = pairs.bad - pairs.good
    below = np.where(pairs.bad <= low + margin, -np.inf, shift)
    above = np.where(pairs.bad >= high - margin, np.inf, shift)
    ends = np.sort(np.concatenate([below, above]), axis=0)
    ranks = len(shift)
    by_chance = round(ranks**0.5 / 2)
    added = np.clip(0, ends[ranks - 1 - by_chance], ends[ranks + by_chance]).astype(shift.dtype)
    return Added(added, values, "added pattern") if added.any() else None
