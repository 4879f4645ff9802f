"""Rates, drops and their limits against counting by hand, scipy's tests and brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from onnxcare.measures import (
    Finding,
    Gauge,
    Measure,
    Rate,
    Verdict,
    clopper_pearson,
    expected_calibration_error,
    paired_test,
    samples_needed,
    worst,
)

Array = np.ndarray


def sample(count: int, total: int) -> Array:
    """Return `total` samples of which the first `count` happened."""
    return np.arange(total) < count


# -- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 20), (5, 3557), (1, 1), (2, 1_000_000)])
def test_intervals_are_exact(count, total, confidence):
    expected = scipy.stats.binomtest(count, total).proportion_ci(confidence, method="exact")
    np.testing.assert_allclose(clopper_pearson(count, total, confidence), (expected.low, expected.high), atol=1e-12)


@pytest.mark.parametrize(("count", "total"), [(0, 12), (12, 12), (4, 30)])
def test_the_ends_leave_half_the_error_on_either_side(count, total):
    low, high = clopper_pearson(count, total, 0.9)
    assert scipy.stats.binom.sf(count - 1, total, low) == pytest.approx(0.05 if count else 1)
    assert scipy.stats.binom.cdf(count, total, high) == pytest.approx(0.05 if count < total else 1)


def test_nothing_counted_says_nothing():
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    nothing = Rate.of(np.zeros(0, bool))
    assert math.isnan(nothing.value)
    assert (nothing.count, nothing.total, nothing.low, nothing.high) == (0, 0, 0.0, 1.0)


def test_a_rate_counts():
    rate = Rate.of(np.array([[True, False], [False, False], [True, True]]), 0.8)
    assert (rate.count, rate.total, rate.value) == (3, 6, 0.5)
    assert (rate.low, rate.high) == clopper_pearson(3, 6, 0.8)


# -- rates and limits ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "limit", "status"),
    [(0, 0.0, "pass"), (1, 0.0, "fail"), (3, 0.03, "pass"), (4, 0.03, "fail"), (100, 1.0, "pass"), (7, None, "info")],
)
def test_without_a_confidence_the_measured_rate_decides(count, limit, status):
    found = Gauge().rate("x", sample(count, 100), limit=limit)
    assert found.status == status
    assert found.needed is None
    assert (found.value, found.unit, found.value_before, found.worse) == (count / 100, "rate", None, None)
    assert (found.low, found.high) == clopper_pearson(count, 100, 0.95)


@pytest.mark.parametrize(
    ("count", "limit", "status"),
    [
        (100, 1.0, "pass"),
        (99, 1.0, "fail"),
        (93, 0.93, "pass"),
        (92, 0.93, "fail"),
        (0, 0.0, "pass"),
        (7, None, "info"),
    ],
)
def test_a_lower_limit_is_not_to_be_fallen_below(count, limit, status):
    assert Gauge().rate("x", sample(count, 100), limit=limit, higher_is_better=True).status == status


@pytest.mark.parametrize("total", [7, 30, 41, 1000, 4000])
@pytest.mark.parametrize("higher", [False, True])
def test_a_value_of_exactly_the_limit_passes_in_spite_of_rounding(total, higher):
    for count in range(0, total + 1, max(1, total // 40)):
        for limit in (count / total, 1 - (total - count) / total, round(count / total, 15)):
            assert Gauge().rate("x", sample(count, total), limit=limit, higher_is_better=higher).status == "pass"


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize(("count", "total"), [(0, 60), (1, 200), (5, 400), (19, 1000), (0, 1), (30, 30)])
def test_with_a_confidence_the_far_end_of_the_interval_decides(count, total, higher):
    rng = np.random.default_rng([count, total])
    happened = sample(count, total)
    high = scipy.stats.binomtest(count, total).proportion_ci(0.99, method="exact").high
    for limit in [*rng.uniform(0, 1, 20), *rng.uniform(0, 0.1, 20), high * (1 + 1e-9), high * (1 - 1e-9)]:
        if limit > 1:
            continue
        if higher:  # the same question about the opposite
            found = Gauge(0.99).rate("x", ~happened, limit=1 - limit, higher_is_better=True)
        else:
            found = Gauge(0.99).rate("x", happened, limit=limit)
        expected = "fail" if count / total > limit else "undecided" if high > limit else "pass"
        assert found.status == expected, limit


def test_nothing_measured_is_undecided_where_there_is_a_limit():
    nothing = np.zeros(0, bool)
    for gauge in (Gauge(), Gauge(0.95)):
        for limit in (0.0, 0.5, 1.0):
            found = gauge.rate("x", nothing, limit=limit)
            assert (found.status, found.needed) == ("undecided", None)
            assert gauge.rate("x", nothing, limit=limit, higher_is_better=True).status == "undecided"
        assert gauge.rate("x", nothing).status == "info"


def test_the_model_it_is_compared_with_stands_beside_it():
    before, after = sample(8, 20), sample(5, 20)[::-1]
    found = Gauge(0.9).rate("x", after, before, limit=0.5)
    assert found.value_before == 0.4
    assert found.before == Rate(8, 20, *clopper_pearson(8, 20, 0.9))
    assert found.worse == paired_test(before, after, False)


# -- how many samples would do -------------------------------------------------------------------


def keeps(count: int, total: int, limit: float, confidence: float = 0.95) -> bool:
    return scipy.stats.binomtest(count, total).proportion_ci(confidence, method="exact").high <= limit


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("limit", [0.9, 0.3, 0.05, 0.005])
def test_the_number_of_faultless_samples_is_the_smallest(limit, confidence):
    needed = samples_needed(0.0, limit, confidence)
    assert needed == next(n for n in itertools.count(1) if (1 - limit) ** n <= (1 - confidence) / 2)
    assert keeps(0, needed, limit, confidence) and (needed == 1 or not keeps(0, needed - 1, limit, confidence))


UNDECIDED = [(1, 50, 0.05), (1, 700, 0.0075), (2, 300, 0.01), (3, 1000, 0.005), (29, 100, 0.35), (7, 10, 0.9)]


@pytest.mark.parametrize(("count", "total", "limit"), UNDECIDED)
@pytest.mark.parametrize("higher", [False, True])
def test_as_many_samples_like_these_would_decide_and_no_fewer(count, total, limit, higher):
    happened = sample(count, total)
    if higher:
        found = Gauge(0.95).rate("x", ~happened, limit=1 - limit, higher_is_better=True)
    else:
        found = Gauge(0.95).rate("x", happened, limit=limit)
    assert found.status == "undecided"
    assert found.needed is not None
    assert found.needed > total
    # Whole repetitions of the sample have its share exactly.
    step = math.gcd(count, total)
    one, size = count // step, total // step
    decided = [keeps(k * one, k * size, limit) for k in range(1, 2 + found.needed // size)]
    assert decided == [k * size >= found.needed for k in range(1, 2 + found.needed // size)]


def test_no_number_of_samples_decides_where_the_measured_share_is_the_limit():
    assert samples_needed(0.05, 0.05, 0.95) is None
    assert samples_needed(0.0, 0.0, 0.95) is None
    found = Gauge(0.95).rate("x", sample(5, 100), limit=0.05)
    assert (found.status, found.needed) == ("undecided", None)


# -- differences ---------------------------------------------------------------------------------


def points(after: float, limit: float | None, high: float | None, confidence: float | None) -> str:
    interval = None if high is None else (-1.0, high)
    return Gauge(confidence).points("x", after, limit=limit, interval=interval).status


@pytest.mark.parametrize(
    ("after", "limit", "high", "without", "demanded"),
    [
        (0.02, 0.05, 0.04, "pass", "pass"),
        (0.02, 0.05, 0.06, "pass", "undecided"),
        (0.02, 0.05, None, "pass", "undecided"),
        (0.06, 0.05, 0.08, "fail", "fail"),
        (0.06, None, 0.08, "info", "info"),
        (1 / 3 - 1 / 7, 4 / 21, 4 / 21, "pass", "pass"),
        (-0.2, 0.0, -0.1, "pass", "pass"),
        (math.nan, 0.05, None, "fail", "fail"),
    ],
)
def test_a_difference_must_not_exceed_its_limit(after, limit, high, without, demanded):
    assert points(after, limit, high, None) == without
    assert points(after, limit, high, 0.95) == demanded


def test_a_difference_keeps_what_it_is_given():
    found = Gauge().points("x", 0.2, 0.4, limit=0.3, interval=(0.1, 0.35), unit="number")
    assert (found.value, found.value_before, found.limit, found.low, found.high) == (0.2, 0.4, 0.3, 0.1, 0.35)
    assert found.unit == "number"


def drawn(total: int, seed: int, changes: float = 0.2) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    before = rng.random(total) < 0.7
    return before, before ^ (rng.random(total) < changes)


@pytest.mark.parametrize("seed", range(5))
def test_a_drop_is_counted_by_hand(seed):
    before, after = drawn(150, seed)
    found = Gauge(0.9).drop("x", before, after, 0.05)
    lost = sum(bool(a) and not b for a, b in zip(before, after, strict=True))
    gained = sum(bool(b) and not a for a, b in zip(before, after, strict=True))
    assert found.unit == "points"
    assert found.value == pytest.approx((lost - gained) / 150)
    assert found.value == pytest.approx(before.mean() - after.mean())
    # Both shares at half the error: 0.05 each, a quarter of the whole on every side.
    (lost_low, lost_high), (gained_low, gained_high) = (
        scipy.stats.binomtest(count, 150).proportion_ci(0.95, method="exact") for count in (lost, gained)
    )
    assert found.low == pytest.approx(lost_low - gained_high)
    assert found.high == pytest.approx(lost_high - gained_low)
    expected = "fail" if found.value > 0.05 else "undecided" if found.high > 0.05 else "pass"
    assert found.status == expected


def test_a_drop_of_exactly_the_limit_passes():
    for lost in range(1, 60):
        before, after = np.ones(60, bool), ~sample(lost, 60)
        for limit in (lost / 60, 1 - (60 - lost) / 60):
            assert Gauge().drop("x", before, after, limit).status == "pass"
        assert Gauge().drop("x", before, after, (lost - 1) / 60).status == "fail"


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize(("lost", "gained"), [(0.1, 0.02), (0.3, 0.3), (0.0, 0.05), (0.5, 0.4)])
def test_the_interval_of_a_drop_covers_the_truth_often_enough(lost, gained, confidence):
    """Exact: the probabilities of all outcomes of 25 samples whose interval misses the true drop are added up."""
    total, missed = 25, 0.0
    for n_lost in range(total + 1):
        for n_gained in range(total + 1 - n_lost):
            p = scipy.stats.multinomial.pmf(
                [n_lost, n_gained, total - n_lost - n_gained], total, [lost, gained, 1 - lost - gained]
            )
            if p < 1e-7:
                continue
            before = sample(n_lost, total)
            after = sample(n_gained, total)[::-1]
            found = Gauge(confidence).drop("x", before, after, None)
            missed += p * (not found.low <= lost - gained <= found.high)
    assert missed <= 1 - confidence + 1e-4


# -- paired tests --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("higher", [False, True])
def test_the_paired_test_is_mcnemars(seed, higher):
    before, after = drawn(12, seed, changes=0.5)
    worse, better = before & ~after, after & ~before
    if not higher:
        worse, better = better, worse
    found = paired_test(before, after, higher)
    changed = int(worse.sum() + better.sum())
    # By hand: of all ways to give the changes a sign, those with at least so many for the worse.
    ways = [sum(signs) >= worse.sum() for signs in itertools.product((0, 1), repeat=changed)]
    assert found == pytest.approx(np.mean(ways))
    if changed:
        expected = scipy.stats.binomtest(int(worse.sum()), changed, alternative="greater").pvalue
        assert found == pytest.approx(expected)


def test_the_paired_test_of_many_changes():
    before, after = sample(3000, 10_000), sample(3400, 10_000)
    assert paired_test(before, after, False) == pytest.approx(0.5**400)
    assert paired_test(before, after, True) == 1
    assert paired_test(before, before, False) == 1
    assert paired_test(before, after[:50], False) is None


# -- calibration ---------------------------------------------------------------------------------


def by_bins(probabilities: Array, truth: Array) -> float:
    """Return the expected calibration error, bin by bin; the last bin has both its ends."""
    total = 0.0
    for number in range(15):
        inside = [
            (max(p), int(np.argmax(p)) == label)
            for p, label in zip(probabilities, truth, strict=True)
            if number / 15 <= max(p) < (number + 1) / 15 or (number == 14 and max(p) == 1)
        ]
        if inside:
            confidence, right = np.mean(inside, axis=0)
            total += len(inside) / len(truth) * abs(right - confidence)
    return total


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_the_expected_calibration_error_bin_by_bin(classes):
    rng = np.random.default_rng(classes)
    p = rng.dirichlet(np.full(classes, 0.5), size=300)
    p[:5] = np.eye(classes)[rng.integers(0, classes, 5)]
    truth = np.where(rng.uniform(size=300) < 0.6, p.argmax(axis=1), rng.integers(0, classes, 300))
    found = expected_calibration_error(p, truth)
    assert found == pytest.approx(by_bins(p, truth))
    assert found > 0.05


def test_the_expected_calibration_error_of_what_is_known():
    sure, half = np.tile([1.0, 0.0], (8, 1)), np.tile([0.5, 0.5], (8, 1))
    zeros, mixed = np.zeros(8, int), np.arange(8) % 2
    assert expected_calibration_error(sure, zeros) == 0
    assert expected_calibration_error(sure, 1 - zeros) == 1
    assert expected_calibration_error(sure, mixed) == 0.5
    assert expected_calibration_error(half, mixed) == 0
    # Too sure in one bin is not made up for by too little in another one.
    both = np.concatenate([np.tile([0.9, 0.1], (10, 1)), np.tile([0.6, 0.4], (10, 1))])
    truth = np.r_[np.arange(10) < 4, np.zeros(10)].astype(int)
    assert expected_calibration_error(both, truth) == pytest.approx((0.3 + 0.4) / 2)
    assert expected_calibration_error(np.zeros((0, 3)), np.zeros(0, int)) == 0


# -- findings ------------------------------------------------------------------------------------


def measure(name: str, status: str) -> Measure:
    return Measure(name, "number", None, 1.0, status=status)


def test_the_worst_answer():
    for statuses in itertools.product(("info", "pass", "undecided", "fail"), repeat=3):
        for answer in ("fail", "undecided", "pass", "info"):
            if answer in statuses:
                assert worst(statuses) == answer
                break
    assert worst([]) == "info"


@pytest.mark.parametrize(
    ("statuses", "status", "passed"),
    [
        (["pass", "info"], "pass", True),
        (["info"], "info", True),
        ([], "info", True),
        (["pass", "undecided"], "undecided", False),
        (["undecided", "fail", "pass"], "fail", False),
    ],
)
def test_a_finding_is_as_good_as_its_worst_measure(statuses, status, passed):
    finding = Finding("a", "kind", tuple(measure(str(index), given) for index, given in enumerate(statuses)))
    assert (finding.status, finding.passed) == (status, passed)
    good = Finding("b", "kind", (measure("x", "pass"),))
    for verdict in (Verdict((finding, good), good), Verdict((good,), finding)):
        assert verdict.passed == passed
        assert verdict.status == worst([status, "pass"])
    assert [item.name for item in Verdict((finding,), good).findings] == ["a", "b"]


def test_measures_are_found_by_name():
    first, second = measure("first", "pass"), measure("second", "fail")
    finding = Finding("a", "kind", (first, second))
    assert finding.measure("second") is second
    with pytest.raises(KeyError, match="third"):
        finding.measure("third")
