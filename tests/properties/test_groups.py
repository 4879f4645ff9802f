"""Gaps between groups: against plain loops and fairlearn, with it and without; gradients against finite differences."""

from __future__ import annotations

import importlib.util
import sys

import numpy as np
import pytest
from fairlearn import metrics
from kinds import slopes

from onnxcare.properties.groups import GAPS, Groups, judged_gap

Array = np.ndarray
FAIRLEARN = {
    "demographic_parity": metrics.demographic_parity_difference,
    "equal_opportunity": metrics.equal_opportunity_difference,
    "equalized_odds": metrics.equalized_odds_difference,
}


def drawn(seed: int, size: int = 500, groups: int = 3) -> tuple[Array, Array, Array]:
    """Return group numbers, labels, and decisions that differ between the groups."""
    rng = np.random.default_rng(seed)
    group, labels = rng.integers(0, groups, size), rng.integers(0, 2, size)
    favoured = rng.uniform(size=size) < 0.3 + 0.2 * labels + 0.15 * group
    return group, labels, favoured


def by_hand(kind: str, group: Array, labels: Array, favoured: Array) -> float:
    """Return the gap as `groups` defines it, by plain loops."""
    gaps = []
    for truth in {"demographic_parity": [None], "equal_opportunity": [1], "equalized_odds": [1, 0]}[kind]:
        rates = []
        for number in sorted(set(group.tolist())):
            mine = [f for g, y, f in zip(group, labels, favoured, strict=True) if g == number and truth in (None, y)]
            if number >= 0 and mine:
                rates.append(sum(mine) / len(mine))
        gaps.append(max(rates) - min(rates))
    return max(gaps)


@pytest.mark.parametrize("kind", GAPS)
@pytest.mark.parametrize("seed", range(5))
def test_gaps_equal_a_plain_loop_and_fairlearn(kind, seed):
    group, labels, favoured = drawn(seed)
    found = Groups.of(group, labels, 1).gap(kind, favoured.astype(float))
    assert found == pytest.approx(by_hand(kind, group, labels, favoured))
    assert found == pytest.approx(FAIRLEARN[kind](labels, favoured, sensitive_features=group))
    assert found > 0.1


@pytest.fixture
def no_fairlearn(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "fairlearn" else plain(name))
    monkeypatch.setitem(sys.modules, "fairlearn", None)


@pytest.mark.parametrize("kind", GAPS)
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", ["usual", "outsiders", "other favourable class"])
def test_the_judge_needs_no_fairlearn(kind, seed, case, request):
    group, labels, favoured = drawn(seed, groups=4)
    if case == "outsiders":
        group[::4] = -1
    groups = Groups.of(group, labels, 0 if case == "other favourable class" else 1)
    with_it = judged_gap(kind, groups, favoured)
    request.getfixturevalue("no_fairlearn")
    assert judged_gap(kind, groups, favoured) == pytest.approx(with_it)
    right = 1 - labels if case == "other favourable class" else labels
    assert with_it == pytest.approx(by_hand(kind, group, right, favoured))


@pytest.mark.parametrize("kind", GAPS)
@pytest.mark.parametrize("missing", [0, 1])
def test_a_group_without_such_labels_has_no_rate_of_them(kind, missing, request):
    """Nobody in group 2 has one of the labels: there is nothing to be treated unequally in."""
    group, labels, favoured = drawn(1)
    labels[group == 2] = 1 - missing
    groups = Groups.of(group, labels, 1)
    expected = by_hand(kind, group, labels, favoured)
    assert groups.gap(kind, favoured.astype(float)) == pytest.approx(expected)
    assert judged_gap(kind, groups, favoured) == pytest.approx(expected)
    request.getfixturevalue("no_fairlearn")
    assert judged_gap(kind, groups, favoured) == pytest.approx(expected)


@pytest.mark.parametrize("kind", GAPS)
def test_soft_decisions_of_a_family(kind):
    group, labels, _ = drawn(2, size=200)
    soft = np.random.default_rng(3).uniform(size=(2, 4, 200))
    found = Groups.of(group, labels, 1).gap(kind, soft)
    assert found.shape == (2, 4)
    for member in np.ndindex(2, 4):
        assert found[member] == pytest.approx(by_hand(kind, group, labels, soft[member]))


@pytest.mark.parametrize("kind", GAPS)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_of_a_gap(kind, seed):
    group, labels, _ = drawn(seed, size=150)
    soft = np.random.default_rng(seed).uniform(size=150)
    groups = Groups.of(group, labels, 1)
    expected = slopes(lambda family: groups.gap(kind, family), soft)
    assert (expected != 0).sum() > 30
    np.testing.assert_allclose(groups.gap_gradient(kind, soft), expected, atol=1e-8)


def test_small_groups_and_those_of_no_group_are_left_out():
    group = np.repeat([0, 1, 2, -1], [40, 30, 29, 500])
    labels = np.tile([0, 1], 300)[: len(group)]
    groups = Groups.of(group, labels, 1)
    assert groups.count == 2
    np.testing.assert_array_equal(groups.member, [group == 0, group == 1])
    favoured = np.where(group == 2, 1.0, 0.0) + (group == 0) * 0.5
    assert groups.gap("demographic_parity", favoured) == pytest.approx(0.5)


@pytest.mark.parametrize("numbers", [[], [0]])
@pytest.mark.parametrize("kind", GAPS)
def test_fewer_than_two_groups_have_no_gap(kind, numbers):
    group = np.full(50, numbers[0] if numbers else -1)
    groups = Groups.of(group, np.tile([0, 1], 25), 1)
    assert groups.count == len(numbers)
    soft = np.random.default_rng(1).uniform(size=(3, 50))
    assert groups.gap(kind, soft).tolist() == [0, 0, 0]
    assert not groups.gap_gradient(kind, soft[0]).any()
    assert not groups.signs(np.zeros(50)).any()


def test_signs_tell_the_preferred_group_from_the_other_one():
    group = np.repeat([0, 1, 2, -1], [50, 50, 50, 10])
    labels = np.zeros(160, int)
    labels[:20], labels[50:90], labels[100:110] = 1, 1, 1
    signs = Groups.of(group, labels, 1).signs(labels)
    np.testing.assert_array_equal(signs, np.repeat([0, 1, -1, 0], [50, 50, 50, 10]))
    other = Groups.of(group, labels, 0).signs(labels)
    np.testing.assert_array_equal(other, -signs)
