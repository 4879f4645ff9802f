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

# For every gap, of which samples rates are compared: of those with (un)favourable labels, or of all (None).
_CONDITIONS: dict[str, tuple[bool | None, ...]] = {
    "demographic_parity": (None,),
    "equal_opportunity": (True,),
    "equalized_odds": (True, False),
}
GAPS = tuple(_CONDITIONS)

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
        found = []
        for favourable in _CONDITIONS[kind]:
            condition = np.ones_like(self.favourable) if favourable is None else self.favourable == favourable
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

    gaps = []
    for favourable in _CONDITIONS[kind]:
        # Only groups with samples of the condition have a rate there.
        wanted = np.ones_like(groups.favourable) if favourable is None else groups.favourable == favourable
        member = groups.member[(groups.member & wanted).any(axis=1)]
        inside = member.any(axis=0)
        if len(member) < 2:
            continue
        decisions, feature = favoured[inside].astype(int), member[:, inside].argmax(axis=0)
        if favourable is None:
            gap = metrics.demographic_parity_difference(decisions, decisions, sensitive_features=feature)
        else:
            # The true positive rate of those for whom the condition holds: for favourable=False the false positive one.
            gap = metrics.equal_opportunity_difference(wanted[inside], decisions, sensitive_features=feature)
        gaps.append(float(gap))
    return max(gaps, default=0.0)
