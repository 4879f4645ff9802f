"""What is measured about a model: rates with exact intervals, drops, gaps; and what was found against their limits.

The measured value decides, unless the spec asks for a confidence: then the far end of the exact interval has to keep
the limit, and where it does not although the value does, the answer is *undecided*, which never passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import scipy.special

Array = np.ndarray
Status = Literal["pass", "fail", "undecided", "info"]
Unit = Literal["rate", "points", "number"]

# The level of the intervals that are only shown.
CONFIDENCE = 0.95
# Shares of integers: a value of exactly the limit must pass in spite of rounding.
_ROUNDING = 1e-12
# Beyond so many samples nobody is told to collect them.
_MOST_NEEDED = 10**9
# Bins of the confidence in which accuracy and confidence are compared.
_BINS = 15


@dataclass(frozen=True)
class Rate:
    """A measured share, with its counts and its exact (Clopper-Pearson) interval."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, happened: Array, confidence: float = CONFIDENCE) -> Rate:
        """Count a bool array."""
        count, total = int(happened.sum()), int(happened.size)
        low, high = clopper_pearson(count, total, confidence)
        return cls(count, total, low, high)

    @property
    def value(self) -> float:
        """The share itself; NaN of nothing."""
        return self.count / self.total if self.total else math.nan


@dataclass(frozen=True)
class Measure:
    """One quantity, measured on the model, and on the one it is compared with where there is one.

    Attributes:
        name: what it is, in the field's terms.
        unit: `rate` for counted shares, `points` for differences of shares, `number` for anything else.
        before: the value of the model it is compared with, or None.
        after: the value of the model that is judged.
        limit: what `after` must not exceed (or, where higher is better, fall below); None if it is only told.
        higher_is_better: whether the limit is a lower one.
        low: lower end of the interval of `after`; None where there is none.
        high: upper end.
        status: how it ended.
        needed: how many samples would decide an undecided one, if it stays as it is.
        worse: exact paired test (McNemar, one-sided): probability of so many changes for the worse if the models were
            equally good; None where there is nothing to pair.
    """

    name: str
    unit: Unit
    before: Rate | float | None
    after: Rate | float
    limit: float | None = None
    higher_is_better: bool = False
    low: float | None = None
    high: float | None = None
    status: Status = "info"
    needed: int | None = None
    worse: float | None = None

    @property
    def value(self) -> float:
        """The measured number itself."""
        return self.after.value if isinstance(self.after, Rate) else self.after

    @property
    def value_before(self) -> float | None:
        """The number of the model it is compared with."""
        return self.before.value if isinstance(self.before, Rate) else self.before


@dataclass(frozen=True)
class Finding:
    """What was found about one property, or about the guards.

    Attributes:
        name: the property.
        kind: its kind; `guards` for what has to be kept.
        measures: what was measured, in the order in which it is to be read.
        notes: what the reader should know, in whole sentences.
    """

    name: str
    kind: str
    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = ()

    @property
    def status(self) -> Status:
        """The worst of the measures' answers."""
        return worst(item.status for item in self.measures)

    @property
    def passed(self) -> bool:
        """Whether nothing failed and nothing is undecided."""
        return self.status in ("pass", "info")

    def measure(self, name: str) -> Measure:
        """Return a measure by its name.

        Raises:
            KeyError: there is none of that name.
        """
        for item in self.measures:
            if item.name == name:
                return item
        raise KeyError(name)


@dataclass(frozen=True)
class Verdict:
    """The judge's finding on held-out data: the properties, and the guards on what has to be kept."""

    properties: tuple[Finding, ...]
    guards: Finding

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Properties first, guards last."""
        return (*self.properties, self.guards)

    @property
    def status(self) -> Status:
        """The worst answer of all."""
        return worst(finding.status for finding in self.findings)

    @property
    def passed(self) -> bool:
        """Whether every property and every guard passed."""
        return all(finding.passed for finding in self.findings)


def worst(statuses: Iterable[Status]) -> Status:
    """Return the worst of several answers; `info` of none."""
    order: tuple[Status, ...] = ("info", "pass", "undecided", "fail")
    return max(statuses, key=order.index, default="info")


class Gauge:
    """Makes measures, at the confidence that the spec asks for."""

    def __init__(self, confidence: float | None = None) -> None:
        """Take the spec's confidence; None lets measured values decide."""
        self._demanded = confidence is not None
        self.confidence = CONFIDENCE if confidence is None else confidence

    def rate(
        self,
        name: str,
        after: Array,
        before: Array | None = None,
        *,
        limit: float | None = None,
        higher_is_better: bool = False,
    ) -> Measure:
        """Return a share of samples; bool arrays, `before` of the same samples or None."""
        found = Rate.of(after, self.confidence)
        status, needed = self._decide(found, limit, higher_is_better)
        return Measure(
            name=name,
            unit="rate",
            before=None if before is None else Rate.of(before, self.confidence),
            after=found,
            limit=limit,
            higher_is_better=higher_is_better,
            low=found.low,
            high=found.high,
            status=status,
            needed=needed,
            worse=None if before is None else paired_test(before, after, higher_is_better),
        )

    def points(
        self,
        name: str,
        after: float,
        before: float | None = None,
        *,
        limit: float | None = None,
        interval: tuple[float, float] | None = None,
        unit: Unit = "points",
    ) -> Measure:
        """Return a difference of shares (or another number) that must not exceed its limit."""
        low, high = interval if interval is not None else (None, None)
        status: Status = "info"
        if limit is not None:
            status = "pass" if after <= limit + _ROUNDING else "fail"
            if status == "pass" and self._demanded and (high is None or high > limit):
                status = "undecided"
        return Measure(name, unit, before, after, limit, False, low, high, status)

    def drop(self, name: str, before: Array, after: Array, limit: float | None) -> Measure:
        """Return the loss of a share of the same samples, with a conservative interval.

        Lost minus gained samples: each share has an exact interval at half the error, so both hold together.
        """
        lost, gained = before & ~after, after & ~before
        value = (int(lost.sum()) - int(gained.sum())) / max(1, lost.size)
        half = 1 - (1 - self.confidence) / 2
        one, other = Rate.of(lost, half), Rate.of(gained, half)
        return self.points(name, value, None, limit=limit, interval=(one.low - other.high, one.high - other.low))

    def too_small(self, total: int, limit: float) -> str | None:
        """Say, where not even zero of so many samples would put the interval below the limit, how many would."""
        if not 0 < limit < 1 or clopper_pearson(0, total, self.confidence)[1] <= limit:
            return None
        needed = samples_needed(0.0, limit, self.confidence)
        return (
            f"{total} held-out samples cannot tell {limit:.2%} from zero with {self.confidence:.0%} confidence; "
            f"{needed} would."
        )

    def _decide(self, found: Rate, limit: float | None, higher_is_better: bool) -> tuple[Status, int | None]:
        if limit is None:
            return "info", None
        if not found.total:
            return "undecided", None
        # A lower limit is an upper one for the opposite.
        count = found.total - found.count if higher_is_better else found.count
        bound = 1 - limit if higher_is_better else limit
        if count / found.total > bound + _ROUNDING:
            return "fail", None
        high = 1 - found.low if higher_is_better else found.high
        if not self._demanded or high <= bound:
            return "pass", None
        return "undecided", samples_needed(count / found.total, bound, self.confidence)


def clopper_pearson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact two-sided interval of a binomial share (Clopper and Pearson, Biometrika 1934)."""
    if not total:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = scipy.special.betaincinv(count, total - count + 1, tail) if count else 0.0
    high = scipy.special.betainccinv(count + 1, total - count, tail) if count < total else 1.0
    return float(low), float(high)


def samples_needed(share: float, limit: float, confidence: float) -> int | None:
    """Return the fewest samples with this measured share whose interval ends at or below the limit; None if never."""
    if share >= limit or limit <= 0:
        return None
    tail = (1 - confidence) / 2
    # The interval's end for a count between whole numbers: so more samples never decide less.
    return _first(lambda total: scipy.special.betainccinv(share * total + 1, (1 - share) * total, tail) <= limit)


def paired_test(before: Array, after: Array, higher_is_better: bool) -> float | None:
    """Return McNemar's exact one-sided p-value for `after` being worse than `before` on the same samples."""
    if before.shape != after.shape:
        return None
    good_before, good_after = (before, after) if higher_is_better else (~before, ~after)
    broken, mended = int((good_before & ~good_after).sum()), int((good_after & ~good_before).sum())
    if broken + mended == 0:
        return 1.0
    return float(scipy.special.bdtrc(broken - 1, broken + mended, 0.5)) if broken else 1.0


def expected_calibration_error(probabilities: Array, truth: Array) -> float:
    """Return the expected calibration error (Guo et al., ICML 2017), in 15 bins of equal width.

    ECE = sum over bins of (samples in the bin / samples) * |accuracy in the bin - mean confidence in the bin|

    Args:
        probabilities: [samples, classes].
        truth: [samples] the true classes.
    """
    confidence = probabilities.max(axis=-1)
    right = probabilities.argmax(axis=-1) == truth
    which = np.minimum((confidence * _BINS).astype(int), _BINS - 1)
    gaps = np.bincount(which, right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / max(1, len(truth)))


def _first(holds: Callable[[int], bool]) -> int | None:
    """Return the smallest number for which a (nearly) monotone statement holds."""
    high = 1
    while not holds(high):
        high *= 2
        if high > _MOST_NEEDED:
            return None
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
