"""Fairness: variants, rates, gaps, proxies and certificates against plain loops; gradients by finite differences."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import build
from kinds import ORIGIN, SEX, court, model, opened, people, run, slopes, weights, with_context, write
from scipy.special import log_softmax, softmax

from onnxcare.data import Dataset, Splits, split
from onnxcare.decision import Decision
from onnxcare.errors import SpecError
from onnxcare.graph.model import Signature
from onnxcare.judge import Court, judge
from onnxcare.measures import Finding
from onnxcare.properties import fairness
from onnxcare.properties.fairness import GroupFairness, IndividualFairness
from onnxcare.spec import Bounds, FairnessSpec, Keep

Array = np.ndarray
SIGNATURES = [Signature("x", np.dtype(np.float32), ("N", 6))]
BOTH = {"sex": SEX, "origin": ORIGIN}
THRESHOLD = Decision("threshold", 0.5)
RATE = "individual discrimination rate"


def splits(size: int = 400, data: Dataset | None = None) -> Splits:
    return Splits(*split(people(size, seed=1) if data is None else data, [0.4, 0.2, 0.2, 0.2], seed=1))


def prepared(
    protected: dict[str, Any],
    parts: Splits | None = None,
    classes: int = 2,
    bounds: Bounds | None = None,
    signatures: Sequence[Signature] = SIGNATURES,
    **given: object,
) -> list[Any]:
    spec = FairnessSpec.model_validate({"name": "fair", "kind": "fairness", "protected": protected, **given})
    return fairness.prepare(spec, splits() if parts is None else parts, signatures, classes, bounds)


# -- variants by plain loops ---------------------------------------------------------------------


def choices(given: dict[str, Any]) -> list[dict[int, float]]:
    """Return what an attribute may be, as columns with values."""
    if "columns" in given:
        columns = given["columns"]
        return [{column: float(column == one) for column in columns} for one in columns]
    return [{given["column"]: value} for value in given["values"]]


def settings(protected: dict[str, Any]) -> list[dict[int, float]]:
    """Return all combinations, or each attribute by itself where they are more than 64."""
    each = [choices(given) for given in protected.values()]
    if len(each) > 1 and np.prod([len(item) for item in each]) > 64:
        return [setting for item in each for setting in item]
    return [dict(kv for part in parts for kv in part.items()) for parts in itertools.product(*each)]


def varied(x: Array, protected: dict[str, Any]) -> list[Array]:
    """Return for every setting all rows with it."""
    found = []
    for setting in settings(protected):
        rows = x.copy()
        for column, value in setting.items():
            rows[:, column] = value
        found.append(rows)
    return found


def grades(count: int, column: int) -> dict[str, Any]:
    return {"column": column, "values": [float(value) for value in range(count)]}


PROTECTED = {
    "one column": ({"sex": SEX}, 2),
    "three values": ({"sex": {"column": 2, "values": [0, 0.5, 1]}}, 3),
    "one-hot": ({"origin": ORIGIN}, 3),
    "together": (BOTH, 6),
    "64 together": ({"years": grades(8, 1), "sex": grades(8, 2)}, 64),
    "65 one by one": ({"years": grades(13, 1), "sex": grades(5, 2)}, 18),
    "65 values of one": ({"years": grades(65, 1)}, 65),
}


@pytest.mark.parametrize(("protected", "count"), PROTECTED.values(), ids=PROTECTED)
@pytest.mark.parametrize("part", ["repair", "search", "validation"])
def test_a_case_is_a_row_with_its_variants(protected, count, part):
    parts = splits()
    (item,) = prepared(protected, parts)
    bad, rows = item.evidence(part).bad, parts.part(part)
    assert item.rows_per_case == 1 + count
    assert item.evidence(part).twins is None
    cases = bad.inputs["x"].reshape(len(rows), 1 + count, 6)
    np.testing.assert_array_equal(cases[:, 0], rows.inputs["x"])
    np.testing.assert_array_equal(cases[:, 1:].transpose(1, 0, 2), varied(rows.inputs["x"], protected))
    np.testing.assert_array_equal(bad.truth, np.repeat(rows.truth, 1 + count))
    assert bad.inputs["x"].dtype == np.float32


@pytest.mark.parametrize(("protected", "count"), PROTECTED.values(), ids=PROTECTED)
@pytest.mark.parametrize("classes", [2, 4])
def test_what_is_measured_of_scores(protected, count, classes):
    (item,) = prepared(protected, classes=classes, favourable=classes - 1)
    cases = 20
    samples = item.evidence("search").bad.take(slice(0, cases * (1 + count)))
    scores = np.random.default_rng(1).normal(size=(2, len(samples), classes))
    scores += 3 * np.random.default_rng(2).normal(size=(2, cases, classes)).repeat(1 + count, axis=1)
    found = [getattr(item, name)(scores, samples) for name in ("misbehaves", "margin", "response")]
    assert all(values.shape == (2, cases) for values in found)
    for member, case in np.ndindex(2, cases):
        rows = scores[member, case * (1 + count) : (case + 1) * (1 + count)]
        decisions = {int(np.argmax(row)) for row in rows}
        ahead = [row[-1] - max(row[:-1]) for row in rows]
        p = [softmax(row)[-1] for row in rows]
        misbehaves, margin, response = (values[member, case] for values in found)
        assert misbehaves == (len(decisions) > 1)
        assert margin == pytest.approx(min(max(ahead), -min(ahead)))
        assert (margin > 0) == (max(ahead) > 0 > min(ahead))
        assert response == pytest.approx(max(abs(other - p[0]) for other in p))
    assert 0 < found[0].mean() < 1
    np.testing.assert_allclose(item.rate(scores, samples), found[0].mean(axis=1))


def test_no_rows_no_rate():
    (item,) = prepared(BOTH)
    nothing = item.evidence("search").bad.take(slice(0, 0))
    assert item.rate(np.zeros((3, 0, 2)), nothing).tolist() == [0, 0, 0]


def test_variants_count_as_often_as_they_occur():
    parts = splits()
    (item,) = prepared(BOTH, parts)
    x = parts.repair.inputs["x"]
    often = [
        sum(all(row[column] == value for column, value in setting.items()) for row in x) for setting in settings(BOTH)
    ]
    assert sum(often) == len(x) and len(set(often)) > 3
    scores = np.random.default_rng(3).normal(size=(5 * 7, 2))
    found = item.goal(scores, None, None)
    for case in range(5):
        variants = [softmax(row) for row in scores[case * 7 + 1 : case * 7 + 7]]
        mean = sum(count * p for count, p in zip(often, variants, strict=True)) / len(x)
        np.testing.assert_allclose(np.exp(found[case * 7 : case * 7 + 7]), np.tile(mean, (7, 1)), rtol=1e-9)


def test_values_that_never_occur_do_not_count():
    """Whoever has a value that is not listed is varied, too, but says nothing of how often values occur."""
    data = people(300, seed=4)
    data.inputs["x"][::3, 2] = 7
    parts = splits(data=data)
    (item,) = prepared({"sex": {"column": 2, "values": [0, 1, 2]}}, parts)
    scores = np.random.default_rng(3).normal(size=(4, 2))
    sex = parts.repair.inputs["x"][:, 2]
    zeros, ones = (sex == 0).sum(), (sex == 1).sum()
    mean = (zeros * softmax(scores[1]) + ones * softmax(scores[2])) / (zeros + ones)
    np.testing.assert_allclose(np.exp(item.goal(scores, None, None)), np.tile(mean, (4, 1)), rtol=1e-9)
    bad = item.evidence("repair").bad.inputs["x"].reshape(-1, 4, 6)
    assert (bad[:, 0, 2] == 7).any()
    assert (bad[:, 1:, 2] == [0, 1, 2]).all()
    (note,) = item.notes
    assert note.startswith("sex: 2 does not occur in the data, but 7 does")


def test_rows_that_are_varied_are_like_the_others():
    """Whatever the order of the file: here all women come first."""
    data = people(9000, seed=2)
    order = np.argsort(data.inputs["x"][:, 2], kind="stable")
    parts = splits(data=data.take(order))
    (item,) = prepared(BOTH, parts)
    for part in ("repair", "search", "validation"):
        varied_rows = item.evidence(part).bad.inputs["x"][:: item.rows_per_case]
        assert varied_rows[:, 2].mean() == pytest.approx(parts.part(part).inputs["x"][:, 2].mean(), abs=0.05)


def test_loss_is_the_divergence_from_the_goal_and_its_gradient_that_of_finite_differences():
    (item,) = prepared({"origin": ORIGIN}, classes=3)
    rng = np.random.default_rng(5)
    samples = item.evidence("search").bad.take(slice(0, 8))
    goal = item.goal(rng.normal(size=(8, 3)), None, None)
    scores = 2 * rng.normal(size=(8, 3))
    by_hand = [
        sum(np.exp(p) * (p - q) for p, q in zip(ought, answer, strict=True))
        for ought, answer in zip(goal, log_softmax(scores, axis=-1), strict=True)
    ]
    assert item.loss(scores, samples, goal) == pytest.approx(np.mean(by_hand))
    expected = slopes(lambda family: item.loss(family, samples, goal), scores)
    np.testing.assert_allclose(item.loss_gradient(scores, samples, goal), expected, rtol=1e-5, atol=1e-8)


# -- the judge -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A model of people, and how it decides, by hand."""

    proto: onnx.ModelProto
    decision: Decision
    classes: int
    context: bool = False

    def inputs(self, x: Array) -> dict[str, Array]:
        numbers = np.linspace(-2, 2, len(x), dtype=np.float32)[:, None]
        return {"context": numbers, "x": x} if self.context else {"x": x}

    def answers(self, x: Array) -> Array:
        return run(self.proto, self.inputs(x))

    def decide(self, x: Array) -> Array:
        y = self.answers(x)
        return (y[:, 0] > self.decision.threshold).astype(int) if self.classes == 1 else y.argmax(axis=1)


KINDS = {
    "threshold behind a Sigmoid": Kind(model(), Decision("threshold", 0.5), 1),
    "another threshold": Kind(model(), Decision("threshold", 0.8), 1),
    "two logits": Kind(model(2, ""), Decision(), 2),
    "three probabilities": Kind(model(3, "Softmax"), Decision(), 3),
    "two inputs": Kind(with_context(model()), Decision("threshold", 0.5), 1, context=True),
}


def measured(
    kind: Kind, folder: Path, protected: dict[str, Any], rows: int = 300, bounds: Bounds | None = None, **given: object
) -> tuple[Finding, Array]:
    """Return what the judge says of a model that is compared with itself, with the rows it was judged on."""
    spec = {"name": "fair", "kind": "fairness", "protected": protected, "input": "x", **given}
    data, holdout = people(200, seed=6), people(rows, seed=7)
    numbered = [Dataset(kind.inputs(item.inputs["x"]), item.labels) for item in (data, holdout)]
    decision = {"threshold": kind.decision.threshold} if kind.classes == 1 else "argmax"
    whole: dict[str, Any] = {"decision": decision, "properties": [spec]}
    if bounds is not None:
        whole["bounds"] = bounds.model_dump()
    path = write(folder, kind.proto, whole, data=numbered[0], holdout=numbered[1])
    case = opened(path)
    against_itself = court(folder / "model.onnx", numbered[1], folder / "model.onnx", case.experiment.decision)
    return judge(against_itself, case.properties, Keep()).properties[0], holdout.inputs["x"]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Finding, Array]]:
    """What the judge says of a model, and the rows it was judged on; made once."""
    return functools.cache(lambda name: measured(KINDS[name], tmp_path_factory.mktemp("judged"), BOTH))


@pytest.mark.parametrize("name", KINDS)
def test_rates_equal_those_of_a_plain_loop(judged, name):
    (finding, x), kind = judged(name), KINDS[name]
    decisions = kind.decide(x)
    alone = {f"{RATE} by sex": {"sex": SEX}, f"{RATE} by origin": {"origin": ORIGIN}}
    for told, protected in {RATE: BOTH, **alone}.items():
        hit = np.zeros(len(x), bool)
        for rows in varied(x, protected):
            hit |= kind.decide(rows) != decisions
        for rate in (finding.measure(told).before, finding.measure(told).after):
            assert (rate.count, rate.total) == (hit.sum(), len(x))
        assert hit.any()


@pytest.mark.parametrize("name", KINDS)
def test_the_mean_largest_change_is_that_of_the_probability(judged, name):
    """The mean over the rows of the largest |N(x) - N(x')|; logits stand for the probabilities of their softmax."""
    (finding, x), kind = judged(name), KINDS[name]

    def probability(rows: Array) -> Array:
        y = kind.answers(rows)
        return (softmax(y, axis=1) if name == "two logits" else y)[:, 1 if kind.classes > 1 else 0]

    largest = np.max([np.abs(probability(rows) - probability(x)) for rows in varied(x, BOTH)], axis=0)
    change = finding.measure("mean largest change of the score")
    assert change.value == change.value_before
    assert change.value == pytest.approx(largest.mean(), rel=1e-4)


def test_one_attribute_alone_needs_no_rate_of_its_own(tmp_path):
    finding, _ = measured(KINDS["two logits"], tmp_path, {"sex": SEX})
    assert [item.name for item in finding.measures if RATE in item.name] == [RATE]


def test_too_many_combinations_are_judged_one_attribute_at_a_time(tmp_path):
    kind, protected = KINDS["threshold behind a Sigmoid"], {"years": grades(13, 1), "sex": grades(5, 2)}
    finding, x = measured(kind, tmp_path, protected, rows=100)
    hit = np.any([kind.decide(rows) != kind.decide(x) for rows in varied(x, protected)], axis=0)
    assert finding.measure(RATE).after.count == hit.sum()


# -- random rows ---------------------------------------------------------------------------------

BOUNDS = Bounds(low=[-3.5, 0, 0, 0, 0, 0], high=[3.5, 12, 1, 1, 1, 1])


def test_random_rows_fill_the_bounds_and_are_whole_where_the_data_is():
    clean = people(200, seed=1)
    rows = fairness.random_rows(clean, "x", BOUNDS, seed=3).inputs["x"]
    assert rows.dtype == np.float32 and len(rows) == 10_000
    assert (rows >= BOUNDS.low).all() and (rows <= BOUNDS.high).all()
    whole = rows == np.round(rows)
    assert whole[:, 1:].all() and whole[:, 0].mean() < 0.01
    assert [np.unique(rows[:, column]).tolist() for column in (1, 2)] == [list(range(13)), [0, 1]]
    np.testing.assert_allclose(rows[:, 0].mean(), 0, atol=0.1)
    np.testing.assert_allclose(rows[:, 0].std(), 7 / np.sqrt(12), rtol=0.05)
    counts = np.bincount(rows[:, 1].astype(int))
    assert counts.min() > 0.8 * counts.mean()
    again, other = (fairness.random_rows(clean, "x", BOUNDS, seed=seed).inputs["x"] for seed in (3, 4))
    np.testing.assert_array_equal(rows, again)
    assert (rows != other).any()


def test_bounds_that_are_no_whole_numbers_hold_for_whole_columns():
    bounds = Bounds(low=[-1, 2.5, 0, 0, 0, 0], high=[1, 4.9, 1, 1, 1, 1])
    rows = fairness.random_rows(people(200, seed=1), "x", bounds, seed=3).inputs["x"]
    assert set(np.unique(rows[:, 1])) == {3, 4}


def test_bounds_without_a_whole_number_between_them_hold_for_whole_columns():
    bounds = Bounds(low=[-1, 2.2, 0, 0, 0, 0], high=[1, 2.8, 1, 1, 1, 1])
    rows = fairness.random_rows(people(200, seed=1), "x", bounds, seed=3).inputs["x"]
    assert (rows[:, 1] >= 2.2).all() and (rows[:, 1] <= 2.8).all()


def test_other_inputs_of_random_rows_are_those_of_the_data():
    clean = people(200, seed=1)
    both = Dataset({"context": np.arange(200.0)[:, None], "x": clean.inputs["x"]}, clean.labels)
    rows = fairness.random_rows(both, "x", BOUNDS, seed=3)
    assert set(rows.inputs) == {"context", "x"}
    assert set(rows.inputs["context"][:, 0]) <= set(range(200))
    assert rows.labels is None


def test_random_rows_are_judged_where_there_are_bounds(tmp_path):
    kind = KINDS["threshold behind a Sigmoid"]
    finding, _ = measured(kind, tmp_path, {"sex": SEX}, bounds=BOUNDS)
    rate = finding.measure(f"{RATE} on random rows").after
    rows = fairness.random_rows(people(300, seed=7), "x", BOUNDS, seed=1).inputs["x"]
    decisions = [kind.decide(rows), *(kind.decide(item) for item in varied(rows, {"sex": SEX}))]
    assert (rate.count, rate.total) == ((np.ptp(decisions, axis=0) > 0).sum(), 10_000)
    assert finding.measure(f"{RATE} on random rows").limit == finding.measure(RATE).limit == 0.01
    other, _ = measured(kind, tmp_path, {"sex": SEX})
    assert all("random" not in item.name for item in other.measures)


# -- proxies and certificates --------------------------------------------------------------------


def notes(finding: Finding, word: str) -> list[str]:
    return [note for note in finding.notes if note.startswith(word)]


def test_proxies_are_columns_by_correlation(tmp_path):
    finding, x = measured(KINDS["two logits"], tmp_path, BOTH)
    sex = [abs(np.corrcoef(x[:, column], x[:, 2])[0, 1]) for column in (0, 1, 3, 4, 5)]
    assert sorted(sex)[-2] < 0.2 < sex[1]
    (proxies,) = notes(finding, "Proxies of sex")
    assert proxies == f"Proxies of sex, columns by correlation with it: 1 ({sex[1]:.2f})."
    assert notes(finding, "No other column") == ["No other column is correlated with origin by 0.2 or more."]


def test_a_proxy_of_one_value_of_a_one_hot_attribute_counts(tmp_path):
    clean = people(400, seed=1)
    clean.inputs["x"][:, 0] = clean.inputs["x"][:, 4] + 0.5 * clean.inputs["x"][:, 0]
    (item,) = prepared({"origin": ORIGIN})
    (note,) = fairness._proxies(clean, "x", item.variation.attributes[0])
    strength = np.corrcoef(clean.inputs["x"][:, 0], clean.inputs["x"][:, 4])[0, 1]
    assert note == f"Proxies of origin, columns by correlation with it: 0 ({strength:.2f})."


@pytest.mark.parametrize("cut", [(), (2,), (3, 4), (3, 4, 5), (2, 3, 4, 5)])
def test_the_certificate_is_there_exactly_when_the_columns_are_cut(tmp_path, cut):
    values = weights()
    values["W1"][list(cut)] = 0
    proto = model()
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    finding, _ = measured(Kind(proto, THRESHOLD, 1), tmp_path, BOTH)
    certified = {note.split(" leads from ")[1].split(" ")[0] for note in notes(finding, "Certificate")}
    expected = {name for name, columns in (("sex", {2}), ("origin", {3, 4, 5})) if columns <= set(cut)}
    assert certified == expected
    for name in expected:
        assert finding.measure(f"{RATE} by {name}").after.count == 0
    far = people(50, seed=8).inputs["x"]
    for column in cut:
        changed = far.copy()
        changed[:, column] = 1e6 * (-1) ** np.arange(50)
        np.testing.assert_array_equal(run(proto, {"x": changed}), run(proto, {"x": far}))


def test_what_the_file_does_not_fix_cannot_be_certified(tmp_path):
    """Where the number of columns is left open, the judge still measures."""
    proto = model()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "columns"
    finding, _ = measured(Kind(proto, THRESHOLD, 1), tmp_path, {"sex": SEX})
    assert finding.measure(RATE).after.count > 0
    assert not notes(finding, "Certificate")


# -- gaps between groups -------------------------------------------------------------------------

GAPS = {
    "demographic_parity": [lambda right: np.ones_like(right)],
    "equal_opportunity": [lambda right: right],
    "equalized_odds": [lambda right: right, lambda right: ~right],
}


def gap_by_hand(gap: str, groups: Array, right: Array, favoured: Array) -> float:
    """Return a gap by plain loops; groups of fewer than 30 and samples of group -1 do not count."""
    found = [0.0]
    for condition in GAPS[gap]:
        rates = []
        for group in set(groups.tolist()) - {-1}:
            rows = (groups == group) & condition(right)
            if (groups == group).sum() >= 30 and rows.any():
                rates.append(sum(favoured[rows]) / rows.sum())
        found.append(max(rates) - min(rates) if rates else 0.0)
    return max(found)


def group_of(x: Array, name: str) -> Array:
    return x[:, 2].astype(int) if name == "sex" else x[:, 3:6].argmax(axis=1)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("favourable", [0, 1])
def test_the_rate_of_a_gap_is_the_largest_of_all_attributes(gap, favourable):
    parts = splits(2000)
    (item,) = prepared(BOTH, parts, max_gap=0.1, gap=gap, favourable=favourable)
    assert isinstance(item, GroupFairness) and item.max_rate == 0.1
    samples = item.evidence("search").bad
    np.testing.assert_array_equal(samples.inputs["x"], parts.search.inputs["x"])
    scores = np.random.default_rng(1).normal(size=(3, len(samples), 2))
    scores[1, :, 1] += 2 * samples.inputs["x"][:, 2]
    for member, rate in zip(scores, item.rate(scores, samples), strict=True):
        favoured = member.argmax(axis=1) == favourable
        gaps = [
            gap_by_hand(gap, group_of(samples.inputs["x"], name), samples.truth == favourable, favoured)
            for name in BOTH
        ]
        assert rate == pytest.approx(max(gaps))
    np.testing.assert_array_equal(item.misbehaves(scores, samples), scores.argmax(axis=-1) != samples.truth)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("classes", [2, 3])
def test_the_loss_of_a_gap_and_its_gradient(gap, classes):
    parts = splits(1000)
    (item,) = prepared(BOTH, parts, max_gap=0.04, gap=gap, classes=classes)
    samples = item.evidence("validation").bad.take(slice(0, 130))
    x = samples.inputs["x"]
    scores = np.random.default_rng(1).normal(size=(130, classes))
    scores[:, 1] += 2 * x[:, 2] + x[:, 4]
    p = softmax(scores, axis=1)[:, 1]
    gaps = [gap_by_hand(gap, group_of(x, name), samples.truth == 1, p) for name in BOTH]
    assert min(gaps) > 0.04
    assert item.loss(scores, samples, None) > 0
    slope = item.loss_gradient(scores, samples, None)
    expected = slopes(lambda family: item.loss(family, samples, None), scores)
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=1e-8)
    assert item.loss(scores - 0.1 * slope, samples, None) < item.loss(scores, samples, None)


@pytest.mark.parametrize("gap", GAPS)
def test_a_counted_gap_that_breaks_its_limit_has_a_slope(gap):
    """However little the probabilities of the groups differ: decisions are what is counted."""
    (item,) = prepared({"sex": SEX}, splits(1000), max_gap=0.2, gap=gap)
    samples = item.evidence("repair").bad
    men = samples.inputs["x"][:, 2] == 1
    scores = np.where(men, 0.2, -0.2)[:, None] * [-0.5, 0.5] + np.random.default_rng(1).normal(0, 0.02, (len(men), 2))
    assert item.rate(scores, samples) > 0.9
    p = softmax(scores, axis=1)[:, 1]
    assert gap_by_hand(gap, men.astype(int), samples.truth == 1, p) < 0.15
    assert item.loss(scores, samples, None) > 0
    assert item.loss_gradient(scores, samples, None).any()


def test_a_gap_that_is_small_enough_costs_nothing():
    (item,) = prepared(BOTH, splits(1000), max_gap=0.5)
    samples = item.evidence("repair").bad
    scores = np.random.default_rng(1).normal(size=(len(samples), 2))
    assert 0 < item.rate(scores, samples) < 0.3
    assert item.loss(scores, samples, None) == 0
    assert not item.loss_gradient(scores, samples, None).any()


def test_margins_of_a_gap_have_the_sign_of_the_group():
    (item,) = prepared({"sex": SEX}, splits(1000), classes=3, max_gap=0.1)
    samples = item.evidence("repair").bad
    women, men = (samples.truth[samples.inputs["x"][:, 2] == sex].mean() for sex in (0, 1))
    assert men > women + 0.1
    scores = np.random.default_rng(1).normal(size=(2, len(samples), 3))
    ahead = scores[..., 1] - np.maximum(scores[..., 0], scores[..., 2])
    np.testing.assert_allclose(item.margin(scores, samples), np.where(samples.inputs["x"][:, 2] == 1, ahead, -ahead))


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_the_judge_measures_all_gaps_and_limits_one_of_each_attribute(tmp_path, kind):
    finding, x = measured(kind, tmp_path, BOTH, rows=1000, max_gap=0.01, gap="equal_opportunity", favourable=1)
    assert finding.name == "fair: equal opportunity"
    right, favoured = people(1000, seed=7).labels == 1, kind.decide(x) == 1
    for name, gap in itertools.product(BOTH, GAPS):
        measure = finding.measure(f"{gap.replace('_', ' ')} gap by {name}")
        assert measure.value == measure.value_before
        assert measure.value == pytest.approx(gap_by_hand(gap, group_of(x, name), right, favoured))
        assert measure.limit == (0.01 if gap == "equal_opportunity" else None)
        assert measure.status == ("fail" if gap == "equal_opportunity" else "info")


def test_gaps_are_told_beside_individual_rates_without_a_limit(tmp_path):
    finding, _ = measured(KINDS["two logits"], tmp_path, {"sex": SEX})
    told = [item for item in finding.measures if "gap" in item.name]
    assert [item.name for item in told] == [f"{gap.replace('_', ' ')} gap by sex" for gap in GAPS]
    assert {item.status for item in told} == {"info"}


def test_small_groups_are_left_out(tmp_path):
    kind = KINDS["two logits"]
    holdout = people(400, seed=9)
    x = holdout.inputs["x"]
    few = np.flatnonzero(x[:, 5] == 1)[29:]
    x[few, 5], x[few, 3] = 0, 1
    (item,) = prepared({"origin": ORIGIN})
    path = tmp_path / "model.onnx"
    path.write_bytes(kind.proto.SerializeToString())
    finding = item.measure(court(path, holdout))
    assert (x[:, 5] == 1).sum() == 29
    two = np.where(x[:, 5] == 1, -1, group_of(x, "origin"))
    expected = gap_by_hand("demographic_parity", two, holdout.truth == 1, kind.decide(x) == 1)
    assert finding.measure("demographic parity gap by origin").value == pytest.approx(expected)
    x[:, 3:6] = [0, 0, 1]
    x[:29, 3:6] = [1, 0, 0]
    assert not [measure for measure in item.measure(court(path, holdout)).measures if "gap" in measure.name]


# -- which properties a spec makes, and what it may not say ----------------------------------------


@pytest.mark.parametrize(
    ("given", "kinds", "limits"),
    [
        ({}, [IndividualFairness], [0.01]),
        ({"max_rate": 0.2}, [IndividualFairness], [0.2]),
        ({"max_gap": 0.1}, [GroupFairness], [0.1]),
        ({"max_rate": 0.0, "max_gap": 0.1}, [IndividualFairness, GroupFairness], [0.0, 0.1]),
    ],
)
def test_rates_and_gaps_are_properties_of_their_own(given, kinds, limits):
    found = prepared({"sex": SEX}, **given)
    assert [type(item) for item in found] == kinds
    assert [item.max_rate for item in found] == limits
    assert all(item.kind == "fairness" and not item.transplantable for item in found)


FOUR_AXES = [Signature("x", np.dtype(np.float32), ("N", 1, 2, 3))]
TWO_INPUTS = [Signature("context", np.dtype(np.float32), ("N", 1)), *SIGNATURES]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "column out of range": (
        {"protected": {"sex": {"column": 6, "values": [0, 1]}}},
        r"sex: there is no column 6; .*0 to 5",
    ),
    "one-hot out of range": ({"protected": {"origin": {"columns": [4, 9]}}}, r"origin: there is no column 9"),
    "values in other units": (
        {"protected": {"sex": {"column": 2, "values": [-1.3, 1.7]}}},
        r"sex: none of its values occurs in the data",
    ),
    "a column of two attributes": (
        {"protected": {"sex": SEX, "origin": {"columns": [2, 3]}}},
        r"origin: a column belongs to two protected attributes",
    ),
    "no such class": ({"favourable": 2}, r"favourable: 2 is not a class; the model has 0 to 1"),
    "bounds of another length": (
        {"bounds": Bounds(low=[0] * 5, high=[1] * 5)},
        r"bounds: 5 values, but input 'x' has 6",
    ),
    "no columns": ({"signatures": FOUR_AXES}, r"need an input of \[samples, columns\], not \['N', 1, 2, 3\]"),
    "no such input": ({"input": "person"}, r"input: name one of the model's inputs: x$"),
    "several inputs": ({"signatures": TWO_INPUTS}, r"input: name one of the model's inputs: context, x$"),
}


@pytest.mark.parametrize(("given", "message"), WRONG.values(), ids=WRONG)
def test_what_a_spec_may_not_say(given, message):
    with pytest.raises(SpecError, match=r"properties\.fair|bounds") as caught:
        prepared(**({"protected": {"sex": SEX}} | given))
    assert caught.match(message)


def test_the_number_of_columns_may_be_left_open():
    open_width = [Signature("x", np.dtype(np.float32), ("N", "columns"))]
    assert len(prepared({"sex": SEX}, signatures=open_width)) == 1
    with pytest.raises(SpecError, match="columns 0 to 5"):
        prepared({"sex": {"column": 6, "values": [0, 1]}}, signatures=open_width)


def test_whole_numbers_are_columns_like_others():
    """A model that takes int64, as encoders of categories do."""
    proto = build(
        """coded (int64[N, 6] x) => (float[N, 2] y) {
            [cast] f = Cast <to = 1> (x)
            [fc] y = Gemm (f, W, b)
        }""",
        {"W": np.ones((6, 2), np.float32) * [1, -1], "b": np.zeros(2, np.float32)},
    )
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.INT64
    data = people(200, seed=1)
    whole = Dataset({"x": np.round(data.inputs["x"]).astype(np.int64)}, data.labels)
    signatures = [Signature("x", np.dtype(np.int64), ("N", 6))]
    (item,) = prepared({"sex": SEX}, splits(data=whole), signatures=signatures)
    bad = item.evidence("repair").bad.inputs["x"].reshape(-1, 3, 6)
    assert bad.dtype == np.int64
    assert (bad[:, 1:, 2] == [0, 1]).all()


def test_a_court_of_one_file(tmp_path):
    (item,) = prepared({"sex": SEX})
    path = tmp_path / "model.onnx"
    path.write_bytes(model(2, "").SerializeToString())
    alone: Court = court(path, people(200, seed=7))
    finding = item.measure(alone)
    assert all(measure.value_before is None for measure in finding.measures)
    assert finding.measure(RATE).after.count > 0
