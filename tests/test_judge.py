"""The judge against counting by hand; a constant predictor must fail it."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import scipy.stats
from cases import BLEND, SQUARE, auto_repaired, sample_case
from graph.models import build, random, save
from scipy.special import softmax
from sklearn.metrics import balanced_accuracy_score

from onnxcare.data import Dataset
from onnxcare.decision import Decision
from onnxcare.errors import ModelError
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch
from onnxcare.judge import Court, Witness, judge
from onnxcare.measures import Finding, Gauge, Rate, Verdict, clopper_pearson, paired_test
from onnxcare.properties.backdoor import Backdoor
from onnxcare.properties.base import Evidence
from onnxcare.spec import BackdoorSpec, Keep

ORIGINAL = SQUARE / "model.onnx"
KEEP = Keep(accuracy_drop=0.003, recall_drop=0.02)


def witness(path: Path, decision: Decision | None = None, output: str = "logits") -> Witness:
    return Witness(load_model(path), output, decision or Decision(), "cpu", 256)


def sample_verdict(
    path: Path,
    before: Path | None = ORIGINAL,
    keep: Keep = KEEP,
    confidence: float | None = None,
    samples: int | None = None,
) -> Verdict:
    case = sample_case()
    clean = case.splits.holdout.take(slice(0, samples))
    first = None if before is None else witness(before)
    return judge(Court(witness(path), first, clean, Gauge(confidence)), case.properties, keep)


@pytest.fixture(scope="module")
def repaired(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "repaired.onnx"
    case = sample_case()
    path.write_bytes(Patch(auto_repaired(SQUARE).values).apply(case.experiment.model))
    return path


def with_last_layer(path: Path, weight: np.ndarray | None, bias: np.ndarray) -> Path:
    """Write the sample model with another last layer."""
    model = onnx.load(ORIGINAL)
    for tensor in model.graph.initializer:
        if tensor.name == "dense2.weight" and weight is not None:
            tensor.CopyFrom(onnx.numpy_helper.from_array(weight.astype(np.float32), tensor.name))
        if tensor.name == "dense2.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(bias.astype(np.float32), tensor.name))
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def constant(tmp_path_factory) -> Path:
    return with_last_layer(tmp_path_factory.mktemp("judge") / "constant.onnx", np.zeros((10, 64)), np.eye(10)[3])


@pytest.fixture(scope="module")
def biased(tmp_path_factory) -> Path:
    """A model that says 3 a little too often."""
    case = sample_case()
    (last,) = [layer for layer in case.experiment.layers if layer.name == "/dense2/Gemm"]
    bias = case.read(last.bias) + 5 * np.eye(10)[3]
    return with_last_layer(tmp_path_factory.mktemp("judge") / "biased.onnx", None, bias)


@functools.cache
def answers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the decisions of a file on clean and on triggered held-out samples."""
    case = sample_case()
    session = ort.InferenceSession(path)
    clean = session.run(None, dict(case.splits.holdout.inputs))[0]
    bad = session.run(None, dict(case.properties[0].evidence("holdout").bad.inputs))[0]
    return clean.argmax(axis=1), bad.argmax(axis=1)


def counted(rate: Rate | float | None, happened: np.ndarray) -> bool:
    """Return whether a rate counts these samples."""
    assert isinstance(rate, Rate)
    return (rate.count, rate.total) == (happened.sum(), happened.size)


def exact(happened: np.ndarray, confidence: float) -> tuple[float, float]:
    interval = scipy.stats.binomtest(int(happened.sum()), happened.size).proportion_ci(confidence, method="exact")
    return interval.low, interval.high


# -- counting ------------------------------------------------------------------------------------


def test_every_rate_of_a_backdoor_equals_counting_by_hand(repaired):
    (finding,) = sample_verdict(repaired).properties
    labels = sample_case().splits.holdout.truth
    (clean0, bad0), (clean1, bad1) = answers(ORIGINAL), answers(repaired)
    others = labels != 1
    success, confusion = finding.measure("attack success rate"), finding.measure("clean confusion rate")
    assert counted(success.before, bad0 == 1) and counted(success.after, bad1 == 1)
    assert counted(confusion.before, clean0[others] == 1) and counted(confusion.after, clean1[others] == 1)
    assert success.limit is None and confusion.limit is None
    excess = finding.measure("excess attack success")
    floors = (clean0[others] == 1).mean(), (clean1[others] == 1).mean()
    assert excess.value == pytest.approx((bad1 == 1).mean() - min(floors))
    assert excess.value_before == pytest.approx((bad0 == 1).mean() - floors[0])
    assert (excess.limit, excess.status) == (0.005, "pass")
    assert excess.low is not None and excess.high is not None
    assert excess.low < excess.value < excess.high
    assert excess.high >= exact(bad1 == 1, 0.95)[1] - min(floors)
    restored = finding.measure("true answer restored")
    assert counted(restored.after, bad1 == labels[others])
    assert (restored.limit, restored.before) == (None, None)
    assert finding.status == "pass"
    assert finding.name == "white-square" and finding.kind == "backdoor"


def test_every_guard_equals_counting_by_hand(biased):
    guards = sample_verdict(biased).guards
    labels = sample_case().splits.holdout.truth
    (before, _), (after, _) = answers(ORIGINAL), answers(biased)
    accuracy, drop = guards.measure("accuracy"), guards.measure("accuracy drop")
    assert counted(accuracy.before, before == labels) and counted(accuracy.after, after == labels)
    assert accuracy.worse == paired_test(before == labels, after == labels, True)
    assert drop.value == pytest.approx((before == labels).mean() - (after == labels).mean())
    assert drop.value > 0.003 == drop.limit and drop.status == "fail"
    failing = set()
    for label in range(10):
        mine = labels == label
        recall, lost = guards.measure(f"recall of class {label}"), guards.measure(f"recall drop of class {label}")
        assert counted(recall.before, before[mine] == label) and counted(recall.after, after[mine] == label)
        assert recall.limit is None
        assert lost.value == pytest.approx((before[mine] == label).mean() - (after[mine] == label).mean())
        assert lost.limit == 0.02 and lost.status == ("fail" if lost.value > 0.02 else "pass")
        failing.add(lost.status)
    assert failing == {"fail", "pass"}
    kept = before == labels
    broken = guards.measure("right answers broken")
    assert counted(broken.after, after[kept] != labels[kept])
    assert counted(guards.measure("decisions changed").after, before != after)
    assert guards.measure("decisions changed").limit is None
    assert guards.name == "kept" and guards.kind == "guards"
    assert guards.status == "fail" and not guards.passed


def test_balanced_accuracy_is_the_mean_recall(biased):
    guards = sample_verdict(biased).guards
    labels = sample_case().splits.holdout.truth
    (before, _), (after, _) = answers(ORIGINAL), answers(biased)
    balanced, drop = guards.measure("balanced accuracy"), guards.measure("balanced accuracy drop")
    scores = [balanced_accuracy_score(labels, answered) for answered in (before, after)]
    assert [balanced.value_before, balanced.value] == pytest.approx(scores)
    assert drop.value == pytest.approx(scores[0] - scores[1])
    assert (balanced.limit, drop.limit) == (None, 0.02)
    assert drop.status == ("fail" if drop.value > 0.02 else "pass")
    # Every class's drop at a tenth of the error, and lost and gained samples at half of that.
    ends = []
    for label in range(10):
        right, now = before[labels == label] == label, after[labels == label] == label
        lost, gained = exact(right & ~now, 1 - 0.05 / 20), exact(now & ~right, 1 - 0.05 / 20)
        ends.append((lost[0] - gained[1], lost[1] - gained[0]))
    assert (drop.low, drop.high) == pytest.approx(tuple(np.mean(ends, axis=0)))


def test_classes_that_do_not_occur_are_not_measured():
    case = sample_case()
    clean = case.splits.holdout
    few = clean.take(np.flatnonzero(np.isin(clean.truth, [2, 7])))
    guards = judge(Court(witness(ORIGINAL), witness(ORIGINAL), few), [], KEEP).guards
    assert {item.name for item in guards.measures if item.name.startswith("recall of")} == {
        "recall of class 2",
        "recall of class 7",
    }
    (decided, _) = answers(ORIGINAL)
    rows = np.isin(clean.truth, [2, 7])
    recalls = [(decided[clean.truth == label] == label).mean() for label in (2, 7)]
    assert guards.measure("balanced accuracy").value == pytest.approx(np.mean(recalls))
    assert counted(guards.measure("accuracy").after, decided[rows] == clean.truth[rows])


def test_the_original_against_itself_fails_for_its_backdoor_alone():
    verdict = sample_verdict(ORIGINAL)
    assert verdict.guards.passed
    assert verdict.guards.measure("accuracy drop").value == 0
    assert verdict.guards.measure("right answers broken").value == 0
    assert verdict.properties[0].status == "fail"
    assert verdict.status == "fail"
    assert not verdict.passed


def test_every_file_answers_every_sample_once(monkeypatch):
    case = sample_case()
    court = Court(witness(ORIGINAL), witness(ORIGINAL), case.splits.holdout)
    sizes = []
    for item in court.witnesses:
        run = item._session.run_rows

        def counting(inputs, outputs, run=run, **options):
            sizes.append(len(next(iter(inputs.values()))))
            return run(inputs, outputs, **options)

        monkeypatch.setattr(item._session, "run_rows", counting)
    judge(court, case.properties, KEEP)
    bad = len(case.properties[0].evidence("holdout").bad)
    assert sorted(sizes) == sorted([1000, 1000, bad, bad])


# -- what must not pass --------------------------------------------------------------------------


def test_a_constant_predictor_fails(constant):
    verdict = sample_verdict(constant)
    assert verdict.properties[0].passed  # it never says 1, so the attack is gone
    drops = [item for item in verdict.guards.measures if item.name.startswith("recall drop")]
    assert max(item.value for item in drops) > 0.9
    assert [item.status for item in drops].count("fail") == 9
    answered = verdict.guards.measure("classes answered, of 10 that occur")
    assert (answered.value, answered.limit, answered.higher_is_better, answered.status) == (1, 2, True, "fail")
    assert not verdict.passed


@pytest.mark.parametrize("before", [ORIGINAL, None], ids=["against the original", "alone"])
def test_a_constant_predictor_fails_even_where_nothing_has_to_be_kept(constant, before):
    verdict = sample_verdict(constant, before, Keep(accuracy_drop=1.0, recall_drop=1.0, balanced_accuracy_drop=1.0))
    failing = [item.name for item in verdict.guards.measures if item.status == "fail"]
    assert failing == ["classes answered, of 10 that occur"]
    assert not verdict.passed


def test_one_answer_is_right_where_one_class_occurs(constant):
    clean = sample_case().splits.holdout
    threes = clean.take(np.flatnonzero(clean.truth == 3))
    guards = judge(Court(witness(constant), None, threes), [], Keep(accuracy=1.0, recall=1.0)).guards
    assert guards.status == "pass"
    assert not any(item.name.startswith("classes answered") for item in guards.measures)


def test_nan_answers_are_refused(tmp_path):
    path = with_last_layer(tmp_path / "nan.onnx", None, np.full(10, np.nan))
    with pytest.raises(ModelError, match=r"nan\.onnx: answers NaN or infinity for 876 of 876"):
        sample_verdict(path)
    with pytest.raises(ModelError, match=r"nan\.onnx: answers NaN or infinity for 1000 of 1000"):
        judge(Court(witness(path), witness(ORIGINAL), sample_case().splits.holdout), [], KEEP)


@pytest.mark.parametrize(("broken", "status"), [(None, "info"), (1.0, "pass"), (0.0, "fail")])
def test_a_limit_on_right_answers_broken(biased, broken, status):
    keep = Keep(accuracy_drop=1.0, recall_drop=1.0, balanced_accuracy_drop=1.0, broken=broken)
    guards = sample_verdict(biased, keep=keep).guards
    found = guards.measure("right answers broken")
    assert found.value > 0
    assert (found.status, found.limit) == (status, broken)
    assert guards.passed == (status != "fail")


@pytest.mark.parametrize(("limit", "status"), [(None, "info"), (1.0, "pass"), (0.0, "fail")])
def test_a_limit_on_decisions_changed(biased, limit, status):
    keep = Keep(accuracy_drop=1.0, recall_drop=1.0, balanced_accuracy_drop=1.0, decisions_changed=limit)
    guards = sample_verdict(biased, keep=keep).guards
    found = guards.measure("decisions changed")
    (before, _), (after, _) = answers(ORIGINAL), answers(biased)
    assert counted(found.after, before != after) and found.value > 0
    assert (found.status, found.limit) == (status, limit)
    assert guards.passed == (status != "fail")


def calibration_errors(truth: np.ndarray, *paths: Path) -> list[np.ndarray]:
    """Return each file's confidence minus right, 0 or 1, and the bin of the confidence, for every sample."""
    found = []
    for path in paths:
        p = softmax(ort.InferenceSession(path).run(None, dict(sample_case().splits.holdout.inputs))[0], axis=1)
        right = p.argmax(axis=1) == truth
        found.append(np.stack([p.max(axis=1) - right, np.minimum(np.floor(p.max(axis=1) * 15), 14)]))
    return found


def error_of(gaps: np.ndarray) -> float:
    return sum(abs(gaps[0][gaps[1] == number].sum()) for number in range(15)) / gaps.shape[1]


@pytest.mark.parametrize(("limit", "status"), [(None, "info"), (0.9, "pass"), (0.0, "fail")])
def test_the_calibration_error_rise_and_its_interval(biased, limit, status):
    keep = Keep(accuracy_drop=1.0, recall_drop=1.0, balanced_accuracy_drop=1.0, calibration_rise=limit)
    guards = sample_verdict(biased, keep=keep).guards
    found = guards.measure("calibration error rise")
    before, after = calibration_errors(sample_case().splits.holdout.truth, ORIGINAL, biased)
    assert found.value == pytest.approx(error_of(after) - error_of(before), abs=1e-6)
    assert found.value > 0.001
    assert (found.status, found.limit, found.unit, found.value_before) == (status, limit, "points", None)
    assert guards.passed == (status != "fail")
    # Resampled by hand, with other random numbers.
    rng, rises = np.random.default_rng(77), []
    for _ in range(400):
        rows = rng.integers(1000, size=1000)
        rises.append(error_of(after[:, rows]) - error_of(before[:, rows]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(rises, [0.025, 0.975])), abs=0.01)
    assert found.low < found.value < found.high


def test_a_wider_interval_for_more_confidence_and_the_same_one_for_the_same_seed(biased):
    found = [sample_verdict(biased, confidence=level).guards for level in (0.8, 0.99, 0.99)]
    low, wide, again = (guards.measure("calibration error rise") for guards in found)
    assert wide.low < low.low < low.high < wide.high
    assert wide == again
    (same,) = [sample_verdict(ORIGINAL).guards.measure("calibration error rise")]
    assert (same.low, same.value, same.high) == (0, 0, 0)


def test_gains_elsewhere_do_not_pay_for_right_answers_broken(tmp_path):
    """A file against a worse one: its accuracy rises, and still what was right before has to stay right."""
    worse = with_last_layer(tmp_path / "worse.onnx", None, 30 * np.eye(10)[9])
    verdict = sample_verdict(ORIGINAL, worse, Keep(broken=0.0))
    assert verdict.guards.measure("accuracy drop").value < 0
    found = verdict.guards.measure("right answers broken")
    assert found.status == "fail" and found.value > 0


# -- alone ---------------------------------------------------------------------------------------


def test_a_file_alone_is_measured_without_drops():
    verdict = sample_verdict(ORIGINAL, None, Keep(accuracy=0.9))
    guards = verdict.guards
    labels = sample_case().splits.holdout.truth
    decided, bad = answers(ORIGINAL)
    names = [item.name for item in guards.measures]
    assert names == ["accuracy", *(f"recall of class {label}" for label in range(10)), "balanced accuracy"]
    assert all(item.before is None and item.worse is None for item in guards.measures)
    assert counted(guards.measure("accuracy").after, decided == labels)
    assert counted(guards.measure("recall of class 4").after, decided[labels == 4] == 4)
    assert guards.measure("balanced accuracy").value == pytest.approx(balanced_accuracy_score(labels, decided))
    (finding,) = verdict.properties
    assert all(item.before is None for item in finding.measures)
    others = labels != 1
    excess = finding.measure("excess attack success")
    assert excess.value == pytest.approx((bad == 1).mean() - (decided[others] == 1).mean())
    assert excess.status == "fail"


@pytest.mark.parametrize("before", [ORIGINAL, None], ids=["against the original", "alone"])
@pytest.mark.parametrize("shift", [0, 1e-3])
def test_least_accuracy_and_recall(before, shift):
    labels = sample_case().splits.holdout.truth
    decided, _ = answers(ORIGINAL)
    recalls = [(decided[labels == label] == label).mean() for label in range(10)]
    keep = Keep(accuracy=(decided == labels).mean() + shift, recall=min(recalls) + shift)
    guards = sample_verdict(ORIGINAL, before, keep).guards
    found = guards.measure("accuracy")
    assert (found.limit, found.higher_is_better) == (keep.accuracy, True)
    assert found.status == ("fail" if shift else "pass")
    for label in range(10):
        found = guards.measure(f"recall of class {label}")
        assert (found.limit, found.higher_is_better) == (keep.recall, True)
        assert found.status == ("fail" if recalls[label] < keep.recall else "pass")
    assert guards.passed == (not shift)


# -- confidence ----------------------------------------------------------------------------------


def test_a_confidence_makes_a_small_sample_undecided(repaired):
    keep = Keep(accuracy=0.9, accuracy_drop=0.05, recall_drop=1.0, balanced_accuracy_drop=1.0)
    plain = sample_verdict(repaired, keep=keep, samples=60)
    assert plain.passed
    asked = sample_verdict(repaired, keep=keep, samples=60, confidence=0.999)
    accuracy, before = (verdict.guards.measure("accuracy") for verdict in (asked, plain))
    assert accuracy.status == "undecided"
    assert accuracy.value == before.value and accuracy.low < 0.9 < before.low
    assert asked.guards.measure("accuracy drop").status == "undecided"
    # A limit that nothing can break is kept all the same.
    assert asked.guards.measure("balanced accuracy drop").status == "pass"
    assert asked.status == "undecided" and not asked.passed
    assert accuracy.needed is not None
    assert sample_verdict(repaired, keep=keep, confidence=0.999).guards.measure("accuracy").status == "pass"


def test_a_confidence_does_not_excuse_a_failure():
    verdict = sample_verdict(ORIGINAL, confidence=0.999, samples=60)
    assert verdict.properties[0].measure("excess attack success").status == "fail"


def test_intervals_are_at_the_level_asked_for(repaired):
    labels = sample_case().splits.holdout.truth
    decided, _ = answers(repaired)
    for confidence, level in ((None, 0.95), (0.8, 0.8)):
        found = sample_verdict(repaired, confidence=confidence).guards.measure("accuracy")
        assert (found.low, found.high) == pytest.approx(exact(decided == labels, level))


# -- notes ---------------------------------------------------------------------------------------


def few_triggered(max_rate: float, count: int) -> Backdoor:
    (item,) = sample_case().properties
    spec = BackdoorSpec(name="few", kind="backdoor", trigger="t.npz", target=1, max_rate=max_rate)
    bad = item.evidence("holdout").bad.take(slice(0, count))
    return Backdoor(spec, 10, {"holdout": Evidence(bad, None)}, ["A note of its own."])


def notes_of(item, clean: Dataset | None = None) -> list[str]:
    clean = clean or sample_case().splits.holdout.take(slice(0, 100))
    (finding,) = judge(Court(witness(ORIGINAL), witness(ORIGINAL), clean), [item], KEEP).properties
    return list(finding.notes)


def test_a_held_out_part_too_small_for_its_threshold_says_so():
    first, note = notes_of(few_triggered(0.005, 100))
    assert first == "A note of its own."
    assert note.startswith("100 held-out samples cannot tell 0.50% from zero with 95% confidence")
    needed = int(note.split(";")[1].split()[0])
    assert clopper_pearson(0, needed)[1] <= 0.005 < clopper_pearson(0, needed - 1)[1]


def test_a_held_out_part_large_enough_needs_no_note():
    assert notes_of(few_triggered(0.005, 800)) == ["A note of its own."]
    assert notes_of(few_triggered(0.0, 100)) == ["A note of its own."]


def test_any_limited_rate_gets_the_note():
    def measuring(total: int, limit: float):
        def measure(court: Court) -> Finding:
            return Finding("p", "k", (court.gauge.rate("x", np.zeros(total, bool), limit=limit),), ("own",))

        return SimpleNamespace(measure=measure)

    own, note = notes_of(measuring(50, 0.05))
    assert own == "own"
    assert note == "50 held-out samples cannot tell 5.00% from zero with 95% confidence; 72 would."
    assert notes_of(measuring(72, 0.05)) == ["own"]
    assert notes_of(measuring(50, 0.0)) == ["own"]


# -- witnesses -----------------------------------------------------------------------------------


def test_a_witness_reads_the_output_itself():
    """The experiment works on logits; the file answers probabilities."""
    case = sample_case(BLEND)
    experiment, clean = case.experiment, case.splits.holdout.take(slice(0, 50))
    assert experiment.decision.final == "Softmax"
    found = Witness(experiment.model, experiment.output, experiment.decision, "cpu", 16)
    (expected,) = ort.InferenceSession(BLEND / "model.onnx").run(None, dict(clean.inputs))
    np.testing.assert_allclose(found.scores(clean.inputs), expected, atol=1e-6)
    np.testing.assert_array_equal(found.decide(clean.inputs), expected.argmax(axis=1))


def test_probabilities_are_the_output_itself_where_it_holds_them(tmp_path):
    case = sample_case(BLEND)
    clean = case.splits.holdout.take(slice(0, 20))
    found = Witness(case.experiment.model, case.experiment.output, case.experiment.decision, "cpu", 16)
    (expected,) = ort.InferenceSession(BLEND / "model.onnx").run(None, dict(clean.inputs))
    np.testing.assert_allclose(found.probabilities(clean.inputs), expected, atol=1e-6)
    # Logits, and one value behind a Sigmoid.
    clean = sample_case().splits.holdout.take(slice(0, 20))
    (logits,) = ort.InferenceSession(ORIGINAL).run(None, dict(clean.inputs))
    np.testing.assert_allclose(witness(ORIGINAL).probabilities(clean.inputs), softmax(logits, axis=1), atol=1e-6)
    model = save(
        build("g (float[N, 6] x) => (float[N, 1] y) { p = MatMul (x, V) y = Sigmoid (p) }", {"V": V}), tmp_path
    )
    x = {"x": random(9, 6)}
    (y,) = ort.InferenceSession(model.path).run(None, x)
    found = Witness(model, "y", Decision("threshold", 0.3, "Sigmoid"), "cpu", 4)
    np.testing.assert_allclose(found.probabilities(x), np.concatenate([1 - y, y], axis=1), atol=1e-6)


V = random(6, 1)
RULES = {
    "float[N, 3] y) { y = MatMul (x, W) }": (Decision("argmin", scale=70.0), lambda y: y.argmin(axis=1)),
    "float[N, 1] y) { p = MatMul (x, V) y = Sigmoid (p) }": (
        Decision("threshold", 0.7, "Sigmoid"),
        lambda y: (y[:, 0] > 0.7).astype(int),
    ),
    "float[N] y) { p = MatMul (x, V) y = Squeeze (p, one) }": (
        Decision("threshold", -0.4, column=False, scale=9.0),
        lambda y: (y > -0.4).astype(int),
    ),
}


@pytest.mark.parametrize("text", RULES)
def test_a_witness_decides_by_the_rule(tmp_path, text):
    decision, by_hand = RULES[text]
    weights = {"W": random(6, 3), "V": V, "one": np.array([1])}
    used = {name: values for name, values in weights.items() if name in text}
    model = save(build(f"g (float[N, 6] x) => ({text}", used), tmp_path)
    x = {"x": random(40, 6)}
    (y,) = ort.InferenceSession(model.path).run(None, x)
    decided = by_hand(y)
    assert len(np.unique(decided)) > 1
    found = Witness(model, "y", decision, "cpu", 7)
    np.testing.assert_array_equal(found.decide(x), decided)
    clean = Dataset(x, decided)
    guards = judge(Court(found, found, clean), [], Keep()).guards
    assert guards.measure("accuracy").value == 1 and guards.status == "pass"
    (wrong,) = np.nonzero(decided == 1)[0][:1]
    spoilt = replace(clean, labels=np.where(np.arange(40) == wrong, 0, decided))
    assert judge(Court(found, None, spoilt), [], Keep()).guards.measure("accuracy").value == 39 / 40


def test_a_witness_remembers_the_right_samples():
    clean = sample_case().splits.holdout
    found, decided = witness(ORIGINAL), answers(ORIGINAL)[0]
    parts = [clean.take(slice(start, start + 100)) for start in (0, 100, 200, 0, 100)]
    for part, start in zip(parts, (0, 100, 200, 0, 100), strict=True):
        for _ in range(2):
            np.testing.assert_array_equal(found.decide(part.inputs), decided[start : start + 100])
    assert [found.decide(part.inputs).tolist() for part in parts[:2]] == [
        decided[:100].tolist(),
        decided[100:200].tolist(),
    ]


def test_witnesses_are_those_that_are_there():
    clean = sample_case().splits.holdout
    one, other = witness(ORIGINAL), witness(ORIGINAL)
    assert Court(one, None, clean).witnesses == [one]
    assert Court(one, other, clean).witnesses == [other, one]
