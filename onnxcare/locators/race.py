"""Racing: the top units without the full table.

Ranking needs the top of the list, not every number. All contenders are measured on a few cases; those that are below
the k-th best by more than chance explains drop out, and the others go on with twice as many cases, until k are left or
all cases are in. What decides is a paired t test on the differences, case by case, between the k-th best and each
contender, with the correction for a finite population: once all cases are in, nothing is left to chance. The level is
shared out so that, over all rounds, a true member of the top k drops out with a probability of at most 1 - confidence
(the union bound; Mnih, Szepesvari, Audibert: Empirical Bernstein stopping, ICML 2008, race with a bound that holds for
any distribution and needs many more cases). The t test takes means of that many cases to be near enough to normal.

The caller may know who is likely (`locators.screen`). Then the others stay out, but for a few drawn at random: if one
of these gets to the top, the screen is not to be trusted, and everyone starts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

Array = np.ndarray

# A race begins with so many cases.
_CASES = 8
# Of those that are not likely, this share is drawn, but no fewer than so many.
_DRAWN, _FEWEST_DRAWN = 0.05, 16
# As many times the top as these are likely, or this share of all.
_LIKELY, _LIKELY_SHARE = 4, 0.35


@dataclass(frozen=True)
class Rules:
    """What a race is about.

    Attributes:
        top: how many units are looked for, of all sites together.
        confidence: the probability with which none of them is dropped.
        seed: fixes the order of the cases, and who is drawn.
    """

    top: int = 10
    confidence: float = 0.95
    seed: int = 1


# A site's number, some of its units, and cases -> what each case answers to interventions, [units, values, cases].
Measure = Callable[[int, Array, Array], Array]
# All that is known of some units, [units, values, cases] -> each unit's effect on each case, [units, cases].
Effect = Callable[[Array], Array]


@dataclass(frozen=True)
class Finish:
    """How a race ended.

    Attributes:
        scores: [units] of every site: the mean effect on the cases that were measured; 0 for who was screened out.
        cases: [units] of every site: how many cases each score rests on.
        finalists: [units] of every site: who belongs to the top.
        rounds: contenders and cases of every round.
        screened: whether the screen was trusted.
    """

    scores: list[Array]
    cases: list[Array]
    finalists: list[Array]
    rounds: list[dict[str, int]]
    screened: bool


def race(
    measure: Measure,
    effect: Effect,
    live: Sequence[Array],
    units: Sequence[int],
    cases: int,
    rules: Rules,
    likely: Sequence[Array] | None = None,
) -> Finish:
    """Find the top units of all sites together.

    Args:
        measure: returns what cases answer to interventions on units.
        effect: makes effects of it; their mean is the score.
        live: the units of every site that take part.
        units: how many units every site has.
        cases: how many cases there are.
        rules: who is looked for.
        likely: [units] of every site, a first estimate of the scores, infinite for units of which nothing is known;
            None where nothing is known of any.
    """
    random = np.random.default_rng(rules.seed)
    track = _Track(measure, effect, units, random.permutation(cases), rules)
    numbers = [(site, unit) for site, members in enumerate(live) for unit in members]
    everyone = np.array(numbers, np.int64).reshape(-1, 2)
    started, drawn = _start(everyone, likely, rules.top, random)
    track.run(started)
    trusted = len(started) < len(everyone)
    if trusted and track.keeps_any(drawn):
        trusted = False
        track.run(everyone)
    return track.finish(trusted)


def _start(
    everyone: Array, likely: Sequence[Array] | None, top: int, random: np.random.Generator
) -> tuple[Array, Array]:
    """Return who takes part in the first round, and who of them only stands for those that do not."""
    if likely is None:
        return everyone, everyone[:0]
    first = np.array([likely[site][unit] for site, unit in everyone])
    count = int(np.isposinf(first).sum()) + max(_LIKELY * top, round(_LIKELY_SHARE * len(everyone)))
    if count >= len(everyone):
        return everyone, everyone[:0]
    ranked = np.argsort(-first, kind="stable")
    rest = ranked[count:]
    chance = random.choice(rest, min(len(rest), max(_FEWEST_DRAWN, round(_DRAWN * len(rest)))), replace=False)
    return everyone[np.sort(np.concatenate([ranked[:count], chance]))], everyone[chance]


class _Track:
    """Who is left in a race, and what is known of everyone so far."""

    def __init__(self, measure: Measure, effect: Effect, units: Sequence[int], order: Array, rules: Rules) -> None:
        self._measure, self._effect, self._order, self._top = measure, effect, order, rules.top
        rounds = 1 + max(0, math.ceil(math.log2(len(order) / _CASES)))
        self._level = (1 - rules.confidence) / (rules.top * rounds)
        self._scores = [np.zeros(count) for count in units]
        self._cases = [np.zeros(count, np.int64) for count in units]
        self._rounds: list[dict[str, int]] = []
        self._left = np.zeros((0, 2), np.int64)
        self._answers: dict[tuple[int, int], Array] = {}  # [values, cases] of everyone who is left
        self._seen = 0

    def run(self, contenders: Array) -> None:
        """Measure the contenders on more and more cases until the top is settled; what is known already is kept."""
        self._left, self._seen = contenders, 0
        while not self._seen or (len(self._left) > self._top and self._seen < len(self._order)):
            self._seen = min(2 * self._seen or _CASES, len(self._order))
            self._ask()
            self._drop()

    def keeps_any(self, some: Array) -> bool:
        """Return whether any of these is left."""
        return not {(site, unit) for site, unit in some.tolist()}.isdisjoint(self._keys())

    def _ask(self) -> None:
        """Measure who is left on the cases that are new to them."""
        known = np.array([self._answers[key].shape[1] if key in self._answers else 0 for key in self._keys()])
        for site, count in sorted({*zip(self._left[:, 0].tolist(), known.tolist(), strict=True)}):
            if count >= self._seen:
                continue
            units = self._left[(self._left[:, 0] == site) & (known == count), 1]
            answers = self._measure(site, units, self._order[count : self._seen])
            for unit, new in zip(units.tolist(), answers, strict=True):
                old = self._answers.get((site, unit))
                self._answers[site, unit] = new if old is None else np.concatenate([old, new], axis=1)

    def _keys(self) -> list[tuple[int, int]]:
        return [(site, unit) for site, unit in self._left.tolist()]

    def _drop(self) -> None:
        """Score who is left, and drop who is below the top by more than chance explains."""
        effects = self._effect(np.stack([self._answers[key][:, : self._seen] for key in self._keys()]))
        means = effects.mean(axis=1)
        for (site, unit), mean in zip(self._keys(), means, strict=True):
            self._scores[site][unit], self._cases[site][unit] = mean, self._seen
        self._rounds.append({"units": len(self._left), "cases": self._seen})
        if len(means) > self._top:
            self._left = self._left[self._stays(effects, means)]

    def _stays(self, effects: Array, means: Array) -> Array:
        """Return which contenders may belong to the top, bool."""
        ranked = np.argsort(-means, kind="stable")
        behind = effects[ranked[self._top - 1]] - effects
        stays = np.zeros(len(means), bool)
        if self._seen < len(self._order):
            # Of a finite population, so many have been seen.
            error = behind.std(axis=1, ddof=1) * np.sqrt((1 - self._seen / len(self._order)) / self._seen)
            stays = behind.mean(axis=1) <= scipy.special.stdtrit(self._seen - 1, 1 - self._level) * error
        stays[ranked[: self._top]] = True
        return stays

    def finish(self, screened: bool) -> Finish:
        """Return the result."""
        finalists = [np.zeros(len(scores), bool) for scores in self._scores]
        for site, unit in self._keys():
            finalists[site][unit] = True
        return Finish(self._scores, self._cases, finalists, self._rounds, screened)
