"""Gaps between groups in how often they get the favourable answer.

With g the group, y the true label (favourable or not) and d the decision,

    demographic parity   max_g P(d | g)      - min_g P(d | g)
    equal opportunity    max_g P(d | g, y=1) - min_g P(d | g, y=1)
    equalized odds       the larger of that and of the same for y=0

Where the package fairlearn is installed, the judge has it compute the gaps; searching needs them for soft decisions
and their gradients, which are computed here.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

GAPS = ("demographic_parity", "equal_opportunity", "equalized_odds")

# The rate of a group with fewer samples says more about chance than about the model.
_FEWEST = 30


@dataclass(frozen=True)
class Groups:
    """Which samples belong to which group.

    Attributes:
        member: [groups, samples] bool; samples of no group are in none.
        favourable: [samples] bool, whether the favourable answer would be right.
    """

    member: Array
    favourable: Array

    @classmethod
    def of(cls, groups: Array, labels: Array, favourable: int) -> Groups:
        """Sort samples by group number; -1 is no group, and groups too small to say anything are left out."""
        numbers = [number for number in np.unique(groups[groups >= 0]) if (groups == number).sum() >= _FEWEST]
        member = groups == np.array(numbers, dtype=groups.dtype).reshape(-1, 1)
        return cls(member, labels == favourable)

    @property
    def count(self) -> int:
        """How many groups there are."""
        return len(self.member)

    def gap(self, kind: str, favoured: Array) -> Array:
        """Return the gap for (soft) decisions [..., samples] -> [...]."""
        found = []
        for weights in self._weights(kind):
            rates = favoured @ weights.T
            found.append(rates.max(axis=-1) - rates.min(axis=-1))
        return np.max(found, axis=0) if found else np.zeros(favoured.shape[:-1])

    def gap_gradient(self, kind: str, favoured: Array) -> Array:
        """Return the (sub)gradient of the gap with respect to soft decisions, [samples] -> [samples]."""
        best, slope = -1.0, np.zeros(len(favoured))
        for weights in self._weights(kind):
            rates = weights @ favoured
            gap = float(rates.max() - rates.min())
            if gap > best:
                best, slope = gap, weights[rates.argmax()] - weights[rates.argmin()]
        return slope

    def signs(self, labels: Array) -> Array:
        """Return +1 for samples of the group with the most favourable labels, -1 for those of the one with fewest."""
        rates = [float(self.favourable[item].mean()) for item in self.member]
        found = np.zeros(len(labels))
        if self.count > 1:
            found[self.member[int(np.argmax(rates))]] = 1
            found[self.member[int(np.argmin(rates))]] = -1
        return found

    def _weights(self, kind: str) -> Sequence[Array]:
        """Return for every condition the weights that turn decisions into the rates of the groups."""
        conditions = {
            "demographic_parity": [np.ones_like(self.favourable)],
            "equal_opportunity": [self.favourable],
            "equalized_odds": [self.favourable, ~self.favourable],
        }[kind]
        found = []
        for condition in conditions:
            chosen = (self.member & condition).astype(float)
            sizes = chosen.sum(axis=1)
            usable = sizes > 0
            if usable.sum() > 1:
                found.append(chosen[usable] / sizes[usable, None])
        return found


def judged_gap(kind: str, groups: Groups, favoured: Array) -> float:
    """Return the gap of hard decisions, computed by fairlearn where it is installed."""
    if importlib.util.find_spec("fairlearn") is None:
        return float(groups.gap(kind, favoured.astype(float)))
    from fairlearn import metrics

    inside = groups.member.any(axis=0)
    truth, decisions = groups.favourable[inside].astype(int), favoured[inside].astype(int)
    feature = groups.member[:, inside].argmax(axis=0)
    measure = {
        "demographic_parity": metrics.demographic_parity_difference,
        "equal_opportunity": metrics.equal_opportunity_difference,
        "equalized_odds": metrics.equalized_odds_difference,
    }[kind]
    return float(measure(truth, decisions, sensitive_features=feature))
