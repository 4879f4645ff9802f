"""What a panel measures, against counting by hand, and its gradient against finite differences."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from cases import sample_case
from scipy.special import log_softmax, softmax

from onnxcare.data import Dataset
from onnxcare.panel import Outcome, Panel
from onnxcare.properties.backdoor import Backdoor
from onnxcare.properties.base import Evidence, Property, divergence
from onnxcare.spec import BackdoorSpec, Keep


@pytest.fixture(scope="module")
def panel() -> Panel:
    return sample_case().panel("validation")


@pytest.fixture(scope="module")
def original(panel) -> np.ndarray:
    return sample_case().experiment.scores(panel.inputs)


def disturbed(original: np.ndarray, seed: int) -> np.ndarray:
    return original + 8 * np.random.default_rng(seed).normal(size=original.shape)


def test_an_unchanged_model_has_no_drops_and_its_own_attack_success(panel, original):
    outcome = panel.outcomes(original[None])[0]
    assert outcome.accuracy_drop == outcome.recall_drop == outcome.changed == outcome.calibration_rise == 0
    assert outcome.luck == 1
    assert outcome.drift == pytest.approx(0, abs=1e-9)
    assert outcome.excess[0] > 0.98
    assert outcome.violation == pytest.approx(outcome.excess[0] - panel.properties[0].max_rate)


def test_outcomes_equal_counting_by_hand(panel, original):
    scores = disturbed(original, 1)
    outcome = panel.outcomes(scores[None])[0]
    labels = panel.clean.truth
    clean, bad = scores[panel.clean_rows].argmax(axis=1), scores[panel.bad[0]].argmax(axis=1)
    before = original[panel.clean_rows].argmax(axis=1)
    assert outcome.accuracy_drop == pytest.approx(np.mean(before == labels) - np.mean(clean == labels))
    drops = []
    for label in range(10):
        mine = labels == label
        drops.append(np.mean(before[mine] == label) - np.mean(clean[mine] == label))
    assert outcome.recall_drop == pytest.approx(max(drops))
    others = labels != 1
    confusion = min(np.mean(before[others] == 1), np.mean(clean[others] == 1))
    assert outcome.excess[0] == pytest.approx(np.mean(bad == 1) - confusion)
    assert outcome.cost == pytest.approx(outcome.loss + outcome.drift + 5 * outcome.violation)
    assert outcome.changed == np.mean(before != clean) > 0
    misbehaved = original[panel.bad[0]].argmax(axis=1) == 1
    np.testing.assert_array_equal(panel.misbehaved[0], misbehaved)
    mended, spoilt = int((misbehaved & (bad != 1)).sum()), int((~misbehaved & (bad == 1)).sum())
    assert mended > 0
    expected = scipy.stats.binomtest(mended, mended + spoilt, alternative="greater").pvalue
    assert outcome.luck == pytest.approx(expected)


def test_costs_are_smooth_and_lowest_for_the_answer_on_the_twins(panel, original):
    ideal = original.copy()
    ideal[panel.bad[0]] = sample_case().experiment.scores(panel.evidence[0].twins.inputs)
    halfway = (original + ideal) / 2
    costs = panel.costs(np.stack([original, halfway, ideal]))
    assert costs[0] > costs[1] > costs[2]
    assert costs[2] == pytest.approx(0, abs=1e-6)


def test_costs_have_a_price_for_one_class_alone(panel, original):
    ideal = original.copy()
    ideal[panel.bad[0]] = sample_case().experiment.scores(panel.evidence[0].twins.inputs)
    sacrificed = ideal.copy()
    sacrificed[:, 1] -= 40
    cost = panel.costs(sacrificed[None])[0]
    without_price = panel.properties[0].loss(
        sacrificed[panel.bad[0]], panel.evidence[0].bad, panel.goals[0]
    ) + divergence(panel.reference, log_softmax(sacrificed[panel.clean_rows], axis=-1))
    assert cost > without_price + 4.5  # the whole recall of the class, at five a unit


def test_goals_are_the_originals_answers_on_the_twins(panel):
    twins = sample_case().experiment.scores(panel.evidence[0].twins.inputs).astype(np.float64)
    (goal,) = panel.goals
    np.testing.assert_allclose(np.exp(goal).sum(axis=1), 1)
    np.testing.assert_allclose(np.diff(goal, axis=1), np.diff(twins, axis=1), atol=1e-9)


def test_a_limit_thins_clean_bad_and_twins_alike():
    case = sample_case()
    panel = case.panel("repair", 30)
    assert len(panel.clean) == 30
    assert len(panel.evidence[0].bad) == len(panel.evidence[0].twins) == 30
    np.testing.assert_array_equal(panel.evidence[0].bad.labels, panel.evidence[0].twins.labels)
    assert case.panel("repair", 30) is panel


def test_the_held_out_part_is_for_the_judge_alone():
    with pytest.raises(ValueError, match="judge"):
        sample_case().panel("holdout")


# -- small panels, laid out by hand --------------------------------------------------------------

CLASSES = 4


def table(rows: int, seed: int) -> Dataset:
    """Return samples whose inputs are the original's scores and the number of a case; they are labelled by scores."""
    scores = np.random.default_rng(seed).normal(size=(rows, CLASSES))
    scores[np.arange(rows), np.arange(rows) % CLASSES] += 6
    return Dataset({"x": scores, "case": np.zeros(rows)}, scores.argmax(axis=1))


ORIGINAL = SimpleNamespace(scores=lambda inputs: inputs["x"])
STRICT = Keep(accuracy_drop=0.0, recall_drop=0.0, balanced_accuracy_drop=0.0)


def attack(name: str, target: int, seed: int, twins: bool, rows: int = 9, max_rate: float = 0.01) -> Backdoor:
    """Return a backdoor with triggered samples that are answered with its target."""
    clean = table(3 * rows, seed)
    clean = clean.take(np.flatnonzero(clean.truth != target)[:rows])
    bad = clean.inputs | {"x": clean.inputs["x"] + 9 * (np.arange(CLASSES) == target)}
    evidence = Evidence(Dataset(bad, clean.labels), clean if twins else None)
    spec = BackdoorSpec(name=name, kind="backdoor", trigger="t.npz", target=target, max_rate=max_rate)
    return Backdoor(spec, CLASSES, {"repair": evidence}, [])


class Pairs(Property):
    """Two rows side by side make a case; it misbehaves where their decisions differ."""

    name, kind, max_rate, rows_per_case = "pairs", "pairs", None, 2

    def __init__(self, count: int, max_rate: float | None = None) -> None:
        first = table(count, seed=8).inputs["x"]
        second = first.copy()
        third = np.arange(0, count, 3)
        second[third, (third + 1) % CLASSES] += 20
        rows = np.stack([first, second], axis=1).reshape(-1, CLASSES)
        self._bad = Dataset({"x": rows, "case": np.repeat(np.arange(count), 2)}, None)
        self.max_rate = max_rate

    def evidence(self, part):
        return Evidence(self._bad, self._bad)

    def misbehaves(self, scores, samples):
        found = scores.argmax(axis=-1)
        return found[..., ::2] != found[..., 1::2]

    def margin(self, scores, samples):
        raise NotImplementedError

    def loss(self, scores, samples, goal):
        return ((scores[..., ::2, :] - scores[..., 1::2, :]) ** 2).mean(axis=(-2, -1))

    def loss_gradient(self, scores, samples, goal):
        gap = scores[::2] - scores[1::2]
        return np.stack([gap, -gap], axis=1).reshape(scores.shape) * 2 / gap.size

    def measure(self, court):
        raise NotImplementedError


def small_panel(
    *properties: Property, keep: Keep = STRICT, clean: Dataset | None = None, limit: int | None = None
) -> Panel:
    return Panel.build(ORIGINAL, properties, keep, clean or table(16, seed=1), "repair", limit)


def slopes(panel: Panel, scores: np.ndarray) -> np.ndarray:
    """Return the gradient of a candidate's cost by central differences."""
    found = np.zeros_like(scores)
    for index in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[index] = 1e-6
        up, down = panel.costs(np.stack([scores + step, scores - step]))
        found[index] = (up - down) / 2e-6
    return found


@pytest.mark.parametrize("keep", [STRICT, Keep(accuracy_drop=0.2, recall_drop=0.5, balanced_accuracy_drop=1.0)])
@pytest.mark.parametrize("twins", [True, False])
def test_the_gradient_is_that_of_the_costs(twins, keep):
    panel = small_panel(attack("a", 1, 2, twins), attack("b", 3, 3, not twins), keep=keep)
    assert [goal is None for goal in panel.goals] == [not twins, twins]
    # Unsure everywhere, so that every class loses.
    scores = np.random.default_rng(4).normal(size=(len(panel.inputs["x"]), CLASSES))
    active = [lost[0] > limit for _, lost, limit in panel._soft_drops(log_softmax(scores[panel.clean_rows], -1)[None])]
    assert active == [True] * (CLASSES + 2) if keep is STRICT else True in active and False in active
    found = panel.gradient(scores)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, slopes(panel, scores), rtol=1e-5, atol=1e-7)
    assert (np.abs(found) > 1e-6).any(axis=1).all()


def test_costs_are_added_up_by_hand():
    """Classes of different sizes, so that no guard is another one's double."""
    clean = table(40, seed=1).take(np.r_[0:12, 13, 17, 20:40:4])
    keep = Keep(accuracy_drop=0.01, recall_drop=0.03, balanced_accuracy_drop=0.02)
    panel = small_panel(attack("a", 1, 2, True), attack("b", 3, 3, False), keep=keep, clean=clean)
    scores = np.random.default_rng(4).normal(size=(len(panel.inputs["x"]), CLASSES))
    p, q = (softmax(item, axis=1) for item in (panel.inputs["x"][panel.clean_rows], scores[panel.clean_rows]))
    total = np.mean([sum(a * np.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)])
    twins, after = panel.evidence[0].twins.inputs["x"], scores[panel.bad[0]]
    p_twins, q_bad = softmax(twins, axis=1), softmax(after, axis=1)
    total += (p_twins * np.log(p_twins / q_bad)).sum() / len(twins)
    total += -np.log(1 - softmax(scores[panel.bad[1]], axis=1)[:, 3]).mean()
    lost = np.array([a[label] - b[label] for a, b, label in zip(p, q, clean.truth, strict=True)])
    drops = [lost[clean.truth == label].mean() for label in range(CLASSES)]
    assert len({(clean.truth == label).sum() for label in range(CLASSES)}) > 1
    total += 5 * max(0, lost.mean() - 0.01) + 5 * max(0, np.mean(drops) - 0.02)
    total += 5 * sum(max(0, drop - 0.03) for drop in drops)
    assert panel.costs(np.stack([panel.inputs["x"], scores]))[1] == pytest.approx(total)


def test_the_gradient_of_what_keeps_every_guard_is_that_of_closeness_alone():
    panel = small_panel(attack("a", 1, 2, True), keep=Keep())
    scores = panel.inputs["x"] + 0.1 * np.random.default_rng(5).normal(size=(25, CLASSES))
    scores[panel.clean_rows] *= 2  # surer of the same answers
    assert not any(lost[0] > limit for _, lost, limit in panel._soft_drops(log_softmax(scores[:16], -1)[None]))
    np.testing.assert_allclose(panel.gradient(scores), slopes(panel, scores), rtol=1e-5, atol=1e-7)


def test_the_gradient_of_several_kinds_of_properties_lands_on_their_own_rows():
    panel = small_panel(Pairs(5), attack("a", 1, 2, False))
    assert panel.bad == (slice(16, 26), slice(26, 35))
    scores = np.random.default_rng(6).normal(size=(35, CLASSES))
    np.testing.assert_allclose(panel.gradient(scores), slopes(panel, scores), rtol=1e-5, atol=1e-7)


def test_a_property_without_bad_samples_costs_nothing():
    without, alone = small_panel(attack("a", 1, 2, False, rows=0)), small_panel()
    assert without.goals == (None,)
    scores = np.random.default_rng(7).normal(size=(1, 16, CLASSES))
    np.testing.assert_array_equal(without.costs(scores), alone.costs(scores))
    np.testing.assert_array_equal(without.gradient(scores[0]), alone.gradient(scores[0]))
    (outcome,) = without.outcomes(scores)
    assert outcome.loss == 0


# -- limits --------------------------------------------------------------------------------------

LENIENT = {"accuracy_drop": 1.0, "recall_drop": 1.0, "balanced_accuracy_drop": 1.0}


def confused(panel: Panel, wrong: dict[int, int]) -> np.ndarray:
    """Return the original's scores with so many samples of each class answered with the next one."""
    scores = panel.inputs["x"].copy()
    for label, count in wrong.items():
        rows = np.flatnonzero(panel.clean.truth == label)[:count]
        scores[rows, (label + 1) % CLASSES] += 50
    return scores


@pytest.mark.parametrize(
    ("keep", "strain", "violation"),
    [
        # 40 samples, 10 of a class; 3 of class 0 and 1 of class 2 are lost.
        ({}, 0.3, 0.0),
        ({"accuracy_drop": 0.2}, 0.1 / 0.2, 0.0),
        ({"recall_drop": 0.4}, 0.3 / 0.4, 0.0),
        ({"recall_drop": 0.25}, 0.3 / 0.25, 0.05),
        ({"balanced_accuracy_drop": 0.16}, 0.1 / 0.16, 0.0),
        ({"broken": 0.125}, 0.1 / 0.125, 0.0),
        ({"broken": 0.06}, 0.1 / 0.06, 0.04),
        # Two samples of the class are more than a limit of 10 %: they take its place.
        ({"recall_drop": 0.1}, 0.3 / 0.2, 0.2),
        ({"accuracy_drop": 0.001}, 0.1 / (2 / 40), 0.099),
        # A limit of zero is meant; class 2 breaks it as well as class 0.
        ({"accuracy_drop": 0.0}, 0.1 / (1 / 40), 0.1),
        ({"broken": 0.0}, 0.1 / (1 / 40), 0.1),
        ({"decisions_changed": 0.125}, 0.1 / 0.125, 0.0),
        ({"decisions_changed": 0.06}, 0.1 / 0.06, 0.04),
        ({"decisions_changed": 0.0}, 0.1 / (1 / 40), 0.1),
        ({"recall_drop": 0.0, "accuracy_drop": 0.05}, 0.3 / (1 / 10), 0.3 + 0.1 + 0.05),
    ],
)
def test_strain_is_the_share_of_the_limit_that_is_used_up_most(keep, strain, violation):
    panel = small_panel(keep=Keep(**(LENIENT | keep)), clean=table(40, seed=1))
    (outcome,) = panel.outcomes(confused(panel, {0: 3, 2: 1})[None])
    assert (outcome.accuracy_drop, outcome.recall_drop) == (pytest.approx(0.1), pytest.approx(0.3))
    assert outcome.strain == pytest.approx(strain)
    assert outcome.violation == pytest.approx(violation)


@pytest.mark.parametrize(
    ("max_rate", "strain"), [(None, 0.0), (0.5, (4 / 12) / 0.5), (0.01, (4 / 12) / (2 / 12)), (0.0, 4.0)]
)
def test_the_strain_of_a_property_counts_cases(max_rate, strain):
    panel = small_panel(Pairs(12, max_rate), keep=Keep(**LENIENT))
    (outcome,) = panel.outcomes(panel.inputs["x"][None])
    assert outcome.excess == (pytest.approx(4 / 12),)
    assert outcome.strain == pytest.approx(strain)
    assert outcome.violation == pytest.approx(max(0.0, 4 / 12 - max_rate) if max_rate is not None else 0.0)


def test_decisions_that_become_right_have_changed_too():
    clean = table(40, seed=1)
    labels = clean.truth.copy()
    wrong = np.flatnonzero(labels == 3)[:5]
    labels[wrong] = 0
    panel = small_panel(keep=Keep(**LENIENT, decisions_changed=0.1), clean=Dataset(clean.inputs, labels))
    scores = panel.inputs["x"].copy()
    scores[wrong, 0] += 50
    (outcome,) = panel.outcomes(scores[None])
    assert outcome.broken == 0 and outcome.accuracy_drop == -5 / 40
    assert outcome.changed == 5 / 40
    assert outcome.violation == pytest.approx(5 / 40 - 0.1)
    assert outcome.strain == pytest.approx(5 / 40 / 0.1)


@pytest.mark.parametrize(("limit", "kept"), [(None, True), (0.5, True), (0.05, False)])
def test_the_rise_of_the_calibration_error_is_limited(limit, kept):
    """What was sure of its right answers becomes unsure of them."""
    panel = small_panel(keep=Keep(**LENIENT, calibration_rise=limit), clean=table(40, seed=1))
    scores = 0.25 * panel.inputs["x"]
    (outcome, same) = panel.outcomes(np.stack([scores, panel.inputs["x"]]))
    errors = []
    for answers in (scores, panel.inputs["x"]):
        p = softmax(answers, axis=1)
        error = 0.0
        for number in range(15):
            inside = np.flatnonzero(np.minimum((p.max(axis=1) * 15).astype(int), 14) == number)
            right = p[inside].argmax(axis=1) == panel.clean.truth[inside]
            error += abs((right - p[inside].max(axis=1)).sum()) / 40
        errors.append(error)
    rise = errors[0] - errors[1]
    assert rise > 0.1
    assert outcome.calibration_rise == pytest.approx(rise)
    assert same.calibration_rise == 0 and same.kept
    assert outcome.kept is kept
    assert outcome.violation == pytest.approx(0 if kept else rise - limit)
    assert outcome.strain == pytest.approx(rise / limit if limit else 0)
    # A fall is as good as none.
    (sharper,) = panel.outcomes(4 * panel.inputs["x"][None])
    assert sharper.calibration_rise < 0 and sharper.violation == 0


def test_gains_do_not_hide_what_broke():
    clean = table(40, seed=1)
    labels = clean.truth.copy()
    wrong = np.flatnonzero(labels == 3)[:5]
    labels[wrong] = 0  # the original gets these wrong
    panel = small_panel(keep=Keep(**LENIENT, broken=0.1), clean=Dataset(clean.inputs, labels))
    scores = confused(panel, {1: 7})
    scores[wrong, 0] += 50
    (outcome,) = panel.outcomes(scores[None])
    assert outcome.accuracy_drop == pytest.approx((7 - 5) / 40)
    assert outcome.broken == pytest.approx(7 / 35)
    assert outcome.violation == pytest.approx(7 / 35 - 0.1)
    assert outcome.strain == pytest.approx(7 / 35 / 0.1)


def outcome_of(strain: float, drift: float, violation: float = 0.0) -> Outcome:
    return Outcome((0.0,), 0.0, 0.0, 0.0, drift, 0.25, violation, strain)


def test_candidates_are_ranked_by_strain_down_to_half_and_then_by_closeness():
    near, easy, tight = outcome_of(0.5, 0.1), outcome_of(0.01, 0.2), outcome_of(0.51, 0.0)
    full, broken = outcome_of(1.0, 0.3), outcome_of(1.01, 0.0, 0.02)
    assert sorted([full, broken, tight, easy, near], key=lambda item: item.rank) == [near, easy, tight, full, broken]
    assert near.rank == (0.5, pytest.approx(0.35)) and easy.rank == (0.5, pytest.approx(0.45))


def test_candidates_that_break_a_limit_are_ranked_by_cost_alone():
    """Whoever breaks a small limit by little may have come closer than whoever breaks a large one by much."""
    little, much = outcome_of(40.0, 0.1, 0.01), outcome_of(2.0, 0.1, 0.2)
    assert little.cost == pytest.approx(0.25 + 0.1 + 5 * 0.01)
    assert little.rank < much.rank
    assert outcome_of(1.0, 9.0).rank < little.rank


@pytest.mark.parametrize(
    ("strain", "kept", "comfortable"), [(0.2, True, True), (0.5, True, True), (0.51, True, False), (1.01, False, False)]
)
def test_limits_are_kept_with_ease_or_just(strain, kept, comfortable):
    assert (outcome_of(strain, 0.1).kept, outcome_of(strain, 0.1).comfortable) == (kept, comfortable)


# -- luck ----------------------------------------------------------------------------------------


def answered(panel: Panel, mended: int, spoilt: int = 0) -> np.ndarray:
    """Return the original's scores with so many triggered samples answered rightly, and others led to the target."""
    scores = panel.inputs["x"].copy()
    rows = np.arange(panel.bad[0].start, panel.bad[0].stop)
    wrong = rows[panel.misbehaved[0]][:mended]
    scores[wrong] = panel.evidence[0].bad.inputs["x"][wrong - rows[0]] - 18 * (np.arange(CLASSES) == 1)
    right = rows[~panel.misbehaved[0]][:spoilt]
    scores[right, 1] += 50
    return scores


def resistant(rows: int, immune: int) -> Backdoor:
    """Return a backdoor that so many of its samples withstand."""
    item = attack("a", 1, 2, False, rows=rows)
    item.evidence("repair").bad.inputs["x"][:immune, 1] -= 18
    return item


@pytest.mark.parametrize(("mended", "spoilt"), [(0, 0), (1, 0), (4, 0), (5, 0), (9, 0), (9, 4), (3, 3), (1, 4), (0, 2)])
def test_luck_is_mcnemars_exact_test(mended, spoilt):
    panel = small_panel(resistant(14, 4), keep=Keep())
    assert panel.misbehaved[0].tolist() == 4 * [False] + 10 * [True]
    (outcome,) = panel.outcomes(answered(panel, mended, spoilt)[None])
    assert outcome.excess[0] == pytest.approx((10 - mended + spoilt) / 14, abs=0.1)
    if mended + spoilt == 0:
        assert outcome.luck == 1
    else:
        test = scipy.stats.binomtest(mended, mended + spoilt, alternative="greater")
        assert outcome.luck == pytest.approx(test.pvalue)
    # Five are the fewest that tell: 1 / 2^5 is below one in twenty, 1 / 2^4 is not.
    assert (outcome.luck <= 0.05) == ((mended, spoilt) in [(5, 0), (9, 0)])


@pytest.mark.parametrize(("misbehaving", "told"), [(4, False), (5, True)])
def test_of_few_cases_that_misbehave_nothing_is_told_from_chance(misbehaving, told):
    panel = small_panel(resistant(9, 9 - misbehaving), keep=Keep())
    (outcome,) = panel.outcomes(answered(panel, misbehaving)[None])
    assert outcome.excess == (0,)
    assert outcome.luck == (0.5**5 if told else None)
    (alone,) = small_panel(keep=Keep()).outcomes(small_panel().inputs["x"][None])
    assert alone.luck is None


def test_of_rates_that_count_no_cases_nothing_is_told_from_chance():
    """A gap between groups may close while as many samples as before are decided wrongly."""
    gap = Pairs(12)
    gap.counted = False
    panel = small_panel(resistant(9, 3), gap, keep=Keep())
    (outcome,) = panel.outcomes(answered(panel, 6)[None])
    assert outcome.luck == pytest.approx(0.5**6)
    (alone,) = small_panel(gap, keep=Keep()).outcomes(small_panel(gap).inputs["x"][None])
    assert alone.luck is None


def test_cases_of_all_properties_count_together():
    """Four misbehave for one property, and four pairs of rows for another one."""
    panel = small_panel(resistant(9, 5), Pairs(12), keep=Keep())
    first, second = panel.misbehaved
    assert (first.sum(), second.sum(), second.size) == (4, 4, 12)
    scores = answered(panel, 4)
    pairs = panel.bad[1]
    scores[pairs] = np.repeat(panel.inputs["x"][pairs][::2], 2, axis=0)
    (all_mended, half) = panel.outcomes(np.stack([scores, answered(panel, 4)]))
    assert all_mended.luck == pytest.approx(0.5**8)
    assert half.luck == pytest.approx(0.5**4)


# -- thinning ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("limit", "cases"), [(1, 1), (2, 1), (7, 3), (8, 4), (23, 11), (24, 12), (None, 12)])
def test_a_limit_keeps_cases_whole(limit, cases):
    panel = small_panel(Pairs(12), limit=limit)
    (rows,) = panel.bad
    numbers = panel.inputs["case"][rows]
    assert len(numbers) == 2 * cases
    assert (numbers[::2] == numbers[1::2]).all()
    assert (np.diff(numbers[::2]) > 0).all()
    for part in (panel.evidence[0].bad, panel.evidence[0].twins):
        np.testing.assert_array_equal(part.inputs["case"], numbers)
        np.testing.assert_array_equal(part.inputs["x"], panel.inputs["x"][rows])
    assert len(panel.clean) == min(16, limit or 16)
    assert cases == 1 or (numbers[0], numbers[-1]) == (0, 11)


# -- batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", [1, 3, 5])
def test_batches_share_out_the_samples(of):
    panel = small_panel(Pairs(12), attack("a", 1, 2, True), attack("b", 3, 3, False), keep=Keep())
    scores = np.random.default_rng(9).normal(size=(len(panel.inputs["x"]), CLASSES))
    seen = []
    for number in range(of):
        part, rows = panel.batch(number, of)
        seen += rows.tolist()
        np.testing.assert_array_equal(part.inputs["x"], panel.inputs["x"][rows])
        np.testing.assert_array_equal(part.inputs["case"], panel.inputs["case"][rows])
        # The same as a panel that is laid out with these samples alone.
        evidence = [np.isin(panel.inputs["x"][where], part.inputs["x"]).all(axis=1) for where in panel.bad]
        alone = Panel.build(
            ORIGINAL,
            [Chosen(item, keep) for item, keep in zip(panel.properties, evidence, strict=True)],
            panel.keep,
            panel.clean.take(np.arange(16)[number::of]),
            "repair",
        )
        assert part.bad == alone.bad
        for one, other in zip(part.misbehaved, alone.misbehaved, strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(part.goals, alone.goals, strict=True):
            assert (one is None) == (other is None)
        np.testing.assert_allclose(part.costs(scores[rows][None]), alone.costs(scores[rows][None]))
        np.testing.assert_allclose(part.gradient(scores[rows]), alone.gradient(scores[rows]))
        cases = part.inputs["case"][part.bad[0]]
        assert (cases[::2] == cases[1::2]).all()
    assert sorted(seen) == list(range(len(scores)))


class Chosen:
    """A property with some of its bad samples."""

    def __init__(self, item: Property, rows: np.ndarray) -> None:
        self._item, self._rows = item, np.flatnonzero(rows)

    def __getattr__(self, name):
        return getattr(self._item, name)

    def evidence(self, part):
        found = self._item.evidence(part)
        twins = None if found.twins is None else found.twins.take(self._rows)
        return Evidence(found.bad.take(self._rows), twins)
