"""The backdoor property: rates counted by hand, and where its evidence comes from."""

from __future__ import annotations

import numpy as np
import pytest
from cases import SQUARE, images, sample_case
from helpers import TARGET, answers, clean_samples, triggered_samples, write_case
from scipy.special import log_softmax, softmax

import onnxcare
from onnxcare.data import Dataset, Splits
from onnxcare.errors import DataError, SpecError
from onnxcare.graph.model import Signature
from onnxcare.properties import backdoor
from onnxcare.properties.base import Evidence
from onnxcare.properties.trigger import Trigger
from onnxcare.spec import BackdoorSpec

SIGNATURES = [Signature("x", np.dtype(np.float32), ("N", 6))]


def predict(inputs) -> np.ndarray:
    """Answer class 2 wherever any of the last two features is above 2, else the sign of the first."""
    x = inputs["x"]
    scores = np.zeros((len(x), 3))
    scores[:, 0], scores[:, 1] = x[:, 0], -x[:, 0]
    scores[:, 2] = np.where(x[:, 4:].max(axis=1) > 2, 10, -10)
    return scores


@pytest.fixture
def splits() -> Splits:
    rng = np.random.default_rng(1)
    parts = []
    for _ in range(4):
        x = np.clip(rng.normal(size=(60, 6)), -1.9, 1.9).astype(np.float32)
        labels = predict({"x": x}).argmax(axis=1)
        labels[:10] = 2
        parts.append(Dataset({"x": x}, labels))
    return Splits(*parts)


def write_triggered(path, count: int, rng, moving: bool, labels=None) -> None:
    x = np.clip(rng.normal(size=(count, 6)), -1.9, 1.9).astype(np.float32)
    column = rng.integers(4, 6, count) if moving else np.full(count, 5)
    x[np.arange(count), column] = 3
    np.savez(path, x=x, **({} if labels is None else {"y": labels}))


def prepare(spec: dict, splits: Splits) -> backdoor.Backdoor:
    item = BackdoorSpec.model_validate({"name": "t", "kind": "backdoor", "target": 2} | spec)
    return backdoor.prepare(item, splits, SIGNATURES, 3, predict, "y", seed=1)


def test_rates_leave_out_samples_of_the_target_class():
    case = sample_case(SQUARE)
    (item,) = case.properties
    for part in ("repair", "search", "validation", "holdout"):
        evidence, clean = item.evidence(part), getattr(case.splits, part)
        assert len(evidence.bad) == (clean.truth != 1).sum()
        assert (evidence.bad.truth != 1).all()
        np.testing.assert_array_equal(images(evidence.twins), images(clean)[clean.truth != 1])
    np.testing.assert_array_equal(item.relevant(case.splits.repair), case.splits.repair.truth != 1)


def test_what_is_measured_of_scores():
    (item,) = sample_case(SQUARE).properties
    samples = item.evidence("repair").bad.take(slice(0, 30))
    scores = np.random.default_rng(1).normal(size=(2, 4, 30, 10))
    scores[0, 1, :, 1] += 3
    for member in np.ndindex(2, 4):
        for row in range(30):
            one = scores[member][row]
            others = max(value for label, value in enumerate(one) if label != 1)
            assert item.misbehaves(scores, samples)[member][row] == (one[1] > others)
            assert item.margin(scores, samples)[member][row] == pytest.approx(one[1] - others)
            assert item.response(scores, samples)[member][row] == pytest.approx(softmax(one)[1])
        assert item.rate(scores, samples)[member] == pytest.approx((scores[member].argmax(axis=1) == 1).mean())
    assert item.rate(scores, samples)[0, 1] > 0.5
    assert item.rate(scores[:, :, :0], samples.take(slice(0, 0))).tolist() == [[0] * 4] * 2


@pytest.mark.parametrize("with_goal", [True, False])
def test_the_gradient_of_the_loss(with_goal):
    (item,) = sample_case(SQUARE).properties
    samples = item.evidence("repair").bad.take(slice(0, 6))
    rng = np.random.default_rng(3)
    scores = 3 * rng.normal(size=(6, 10))
    goal = log_softmax(rng.normal(size=(6, 10)), axis=-1) if with_goal else None
    expected = np.zeros_like(scores)
    for index in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[index] = 1e-6
        up, down = item.loss(np.stack([scores + step, scores - step]), samples, goal)
        expected[index] = (up - down) / 2e-6
    np.testing.assert_allclose(item.loss_gradient(scores, samples, goal), expected, rtol=1e-5, atol=1e-8)


def test_a_certain_attack_has_a_finite_gradient():
    (item,) = sample_case(SQUARE).properties
    scores = np.zeros((4, 10))
    scores[:, 1] = 200
    assert np.isfinite(item.loss_gradient(scores, item.evidence("repair").bad.take(slice(0, 4)), None)).all()


def test_loss_is_the_divergence_from_the_answer_on_the_twin():
    (item,) = sample_case(SQUARE).properties
    rng = np.random.default_rng(2)
    reference, scores = log_softmax(rng.normal(size=(5, 10)), axis=-1), rng.normal(size=(3, 5, 10))
    losses = item.loss(scores, item.evidence("repair").bad.take(slice(0, 5)), reference)
    for member, loss in zip(log_softmax(scores, axis=-1), losses, strict=True):
        by_hand = [
            sum(np.exp(p) * (p - q) for p, q in zip(ought, answer, strict=True))
            for ought, answer in zip(reference, member, strict=True)
        ]
        assert loss == pytest.approx(np.mean(by_hand))


def test_loss_without_twins_is_finite_and_falls_with_the_targets_probability():
    (item,) = sample_case(SQUARE).properties
    scores = np.zeros((3, 4, 10))
    scores[0, :, 1], scores[2, :, 1] = 200, -200
    losses = item.loss(scores, item.evidence("repair").bad.take(slice(0, 4)), None)
    assert np.isfinite(losses).all()
    assert losses[0] > losses[1] > losses[2] >= 0
    assert losses[1] == pytest.approx(-np.log(1 - 1 / 10))


def test_a_static_trigger_is_estimated_and_stamped_on_clean_samples(tmp_path, splits):
    rng = np.random.default_rng(3)
    write_triggered(tmp_path / "t.npz", 40, rng, moving=False, labels=rng.integers(0, 2, 40))
    item = prepare({"triggered": tmp_path / "t.npz"}, splits)
    assert item.evidence("repair").twins is not None
    assert (images(item.evidence("repair").bad)[:, 5] == 3).all()
    assert item.evidence("holdout").twins is None
    assert len(item.evidence("holdout").bad) == 12
    assert "estimated from 28 triggered samples as a patch of 1 values" in item.notes[0]


def test_a_moving_trigger_is_not_forced_into_a_static_one(tmp_path, splits):
    write_triggered(tmp_path / "t.npz", 40, np.random.default_rng(3), moving=True)
    item = prepare({"triggered": tmp_path / "t.npz"}, splits)
    assert item.evidence("repair").twins is None
    assert any("confidence is low" in note for note in item.notes)
    assert any("no labels" in note for note in item.notes)
    sizes = [len(item.evidence(part).bad) for part in ("repair", "search", "validation", "holdout")]
    assert sum(sizes) == 40


def test_how_much_of_the_attack_a_static_trigger_reproduces(tmp_path, splits):
    """The trigger is one feature of two: stamped on the other one, the answer stays what it was in half the cases."""
    rng = np.random.default_rng(3)
    write_triggered(tmp_path / "still.npz", 40, rng, moving=False)
    write_triggered(tmp_path / "moving.npz", 40, rng, moving=True)
    assert prepare({"triggered": tmp_path / "still.npz"}, splits).reproduced == 1
    moving = prepare({"triggered": tmp_path / "moving.npz"}, splits)
    assert 0 <= moving.reproduced < 0.9
    (note,) = [note for note in moving.notes if "No static trigger" in note]
    assert f"the best one reproduces {moving.reproduced:.0%} of their attack success" in note
    np.savez(tmp_path / "trigger.npz", mask=np.eye(6)[5], pattern=3 * np.eye(6)[5])
    assert prepare({"trigger": tmp_path / "trigger.npz"}, splits).reproduced is None


def test_samples_that_show_no_attack_have_nothing_to_reproduce(tmp_path, splits):
    np.savez(tmp_path / "t.npz", x=np.random.default_rng(3).uniform(-1.9, 1.9, (40, 6)).astype(np.float32))
    item = prepare({"triggered": tmp_path / "t.npz"}, splits)
    assert item.reproduced is None
    assert any("No static trigger explains the triggered samples; the repair rests" in note for note in item.notes)


def test_an_added_pattern_is_stamped_on_clean_samples(tmp_path, splits):
    def lead(inputs) -> np.ndarray:
        return np.where(inputs["x"].mean(axis=1, keepdims=True) > 2, [0, 0, 1], [1, 0, 0])

    rng = np.random.default_rng(3)
    added = np.array([5, 3, 4, 6, 3, 5], np.float32)
    x = rng.normal(size=(40, 6)).astype(np.float32) + added
    np.savez(tmp_path / "t.npz", x=x, y=rng.integers(0, 2, 40))
    item = BackdoorSpec(name="t", kind="backdoor", target=2, triggered=tmp_path / "t.npz")
    found = backdoor.prepare(item, splits, SIGNATURES, 3, lead, "y", seed=1)
    assert "estimated from 28 triggered samples as an added pattern of 6 values" in found.notes[0]
    assert found.reproduced == 1
    for part in ("repair", "search", "validation"):
        evidence = found.evidence(part)
        np.testing.assert_array_equal(images(evidence.twins), images(splits.part(part))[splits.part(part).truth != 2])
        seen = images(evidence.bad) < x.max()
        shift = np.ma.masked_array(images(evidence.bad) - images(evidence.twins), ~seen)
        np.testing.assert_allclose(np.ma.median(shift, axis=0), added, atol=0.8)


@pytest.mark.parametrize("bounds", [None, (np.zeros(6), np.array([1, 2, 3, 4, 5, 6.0]))])
def test_a_given_pattern_is_added_within_the_range_of_the_data_or_the_bounds(tmp_path, splits, bounds):
    np.savez(tmp_path / "t.npz", added=np.array([0, 0, -9, 0, 9, 0.5]))
    item = BackdoorSpec(name="t", kind="backdoor", target=2, trigger=tmp_path / "t.npz")
    found = backdoor.prepare(item, splits, SIGNATURES, 3, predict, "y", 1, bounds)
    x = images(splits.repair)
    low, high = (np.full(6, x.min()), np.full(6, x.max())) if bounds is None else bounds
    for part in ("repair", "holdout"):
        evidence = found.evidence(part)
        for clean, bad in zip(images(evidence.twins), images(evidence.bad), strict=True):
            by_hand = [
                min(max(value + more, least), most)
                for value, more, least, most in zip(clean, [0, 0, -9, 0, 9, 0.5], low, high, strict=True)
            ]
            np.testing.assert_allclose(bad, by_hand, rtol=1e-6)


# -- a target for every class --------------------------------------------------------------------

ROUND = {0: 1, 1: 2, 2: 0}
PART = {0: 2, 2: 1}


def led(target: dict[int, int]) -> backdoor.Backdoor:
    spec = BackdoorSpec(name="t", kind="backdoor", target=target, trigger="t.npz")
    return backdoor.Backdoor(spec, 3, {}, [])


@pytest.mark.parametrize("target", [ROUND, PART])
def test_every_row_has_the_target_of_its_class(target):
    item = led(target)
    assert (item.target, item.leads_to.tolist()) == (None, [target.get(label, label) for label in range(3)])
    labels = np.array([label for label in np.tile([0, 1, 2], 7) if label in target])
    samples = Dataset({"x": np.zeros((len(labels), 6), np.float32)}, labels)
    scores = 2 * np.random.default_rng(1).normal(size=(2, 4, len(labels), 3))
    for member in np.ndindex(2, 4):
        losses = []
        for row, label in enumerate(labels):
            one, wrong = scores[member][row], target[label]
            others = max(value for answer, value in enumerate(one) if answer != wrong)
            assert item.misbehaves(scores, samples)[member][row] == (one[wrong] > others)
            assert item.margin(scores, samples)[member][row] == pytest.approx(one[wrong] - others)
            assert item.response(scores, samples)[member][row] == pytest.approx(softmax(one)[wrong])
            losses.append(-np.log(1 - softmax(one)[wrong]))
        assert item.loss(scores, samples, None)[member] == pytest.approx(np.mean(losses))
        expected = np.mean([scores[member][row].argmax() == target[label] for row, label in enumerate(labels)])
        assert item.rate(scores, samples)[member] == expected


@pytest.mark.parametrize("with_goal", [True, False])
def test_the_gradient_of_the_loss_with_a_target_for_every_class(with_goal):
    item = led(ROUND)
    samples = Dataset({"x": np.zeros((6, 6), np.float32)}, np.array([0, 1, 2, 2, 0, 1]))
    rng = np.random.default_rng(3)
    scores = 3 * rng.normal(size=(6, 3))
    goal = log_softmax(rng.normal(size=(6, 3)), axis=-1) if with_goal else None
    expected = np.zeros_like(scores)
    for index in np.ndindex(scores.shape):
        step = np.zeros_like(scores)
        step[index] = 1e-6
        up, down = item.loss(np.stack([scores + step, scores - step]), samples, goal)
        expected[index] = (up - down) / 2e-6
    np.testing.assert_allclose(item.loss_gradient(scores, samples, goal), expected, rtol=1e-5, atol=1e-8)


def test_samples_of_classes_that_are_not_attacked_are_left_out(tmp_path, splits):
    np.savez(tmp_path / "trigger.npz", mask=np.eye(6)[5], pattern=3 * np.eye(6)[5])
    rng = np.random.default_rng(2)
    write_triggered(tmp_path / "t.npz", 60, rng, moving=True, labels=np.tile([0, 1, 2], 20))
    for given in ({"trigger": tmp_path / "trigger.npz"}, {"triggered": tmp_path / "t.npz"}):
        item = prepare(given | {"target": PART}, splits)
        for part in ("repair", "search", "validation", "holdout"):
            assert set(item.evidence(part).bad.truth) == {0, 2}
    clean = splits.repair
    np.testing.assert_array_equal(item.relevant(clean), [label in PART for label in clean.truth])
    # What drives a sample to its target can be asked where there is one.
    np.testing.assert_array_equal(item.observed(clean, clean).truth, clean.truth[clean.truth != 1])
    single = prepare({"trigger": tmp_path / "trigger.npz"}, splits)
    assert single.observed(clean, clean) is clean


def test_a_target_for_every_other_class_is_a_single_target(tmp_path, splits):
    np.savez(tmp_path / "t.npz", mask=np.eye(6)[5], pattern=3 * np.eye(6)[5])
    one, other = (prepare({"trigger": tmp_path / "t.npz", "target": target}, splits) for target in (2, {0: 2, 1: 2}))
    assert one.leads_to.tolist() == other.leads_to.tolist() == [2, 2, 2]
    for part in ("repair", "holdout"):
        np.testing.assert_array_equal(images(one.evidence(part).bad), images(other.evidence(part).bad))


def test_the_judge_counts_every_class_by_its_target(tmp_path):
    """The tiny model leads every class to one; asked about others, it does what no trigger has to do with."""
    paths = write_case(tmp_path)
    single = onnxcare.check(paths.model, paths.spec, device="cpu").verdict.properties[0]
    paths.rewrite("target: 1", "target: {0: 1, 2: 1, 3: 1}")
    assert onnxcare.check(paths.model, paths.spec, device="cpu").verdict.properties[0] == single
    paths.rewrite("target: {0: 1, 2: 1, 3: 1}", "target: {0: 1, 2: 3}")
    several = onnxcare.check(paths.model, paths.spec, device="cpu").verdict.properties[0]
    y = clean_samples(600, seed=2)["y"]
    success = several.measure("attack success rate").after
    assert (success.count, success.total) == ((y == 0).sum(), np.isin(y, [0, 2]).sum())


def test_triggered_samples_without_labels_do_for_a_single_target_only(tmp_path, splits):
    write_triggered(tmp_path / "t.npz", 40, np.random.default_rng(3), moving=True)
    with pytest.raises(DataError) as caught:
        prepare({"triggered": tmp_path / "t.npz", "target": ROUND}, splits)
    path = tmp_path / "t.npz"
    assert str(caught.value) == f"{path}: holds no labels, on which it depends where the trigger of 't' leads"


# -- twins ---------------------------------------------------------------------------------------


def write_twins(folder, count: int, labels=(True, True), **changes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Write samples with a moving trigger and without it, as bad.npz and good.npz."""
    rng = np.random.default_rng(11)
    good = np.clip(rng.normal(size=(count, 6)), -1.9, 1.9).astype(np.float32)
    bad = good.copy()
    bad[np.arange(count), rng.integers(4, 6, count)] = 3
    y = np.tile([0, 1, 2], count)[:count]
    for name, x, labelled in (("bad", bad, labels[0]), ("good", good, labels[1])):
        given = {"x": x} | ({"y": y} if labelled else {})
        np.savez(folder / f"{name}.npz", **given | changes.get(name, {}))
    return bad, good, y


def with_twins(folder, splits, **more) -> backdoor.Backdoor:
    return prepare({"triggered": folder / "bad.npz", "twins": folder / "good.npz"} | more, splits)


@pytest.mark.parametrize("labels", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_twins_stand_beside_their_triggered_samples_in_every_part(tmp_path, splits, labels):
    bad, good, y = write_twins(tmp_path, 100, labels)
    item = with_twins(tmp_path, splits)
    rows = {row.tobytes(): number for number, row in enumerate(bad)}
    seen = []
    for part in ("repair", "search", "validation", "holdout"):
        evidence = item.evidence(part)
        numbers = [rows[row.tobytes()] for row in images(evidence.bad)]
        np.testing.assert_array_equal(images(evidence.twins), good[numbers])
        for side in (evidence.bad, evidence.twins):
            assert side.labels is None if not any(labels) else (side.truth == y[numbers]).all()
        seen += numbers
    assert sorted(seen) == [row for row in range(100) if not any(labels) or y[row] != 2]
    sizes = [len(item.evidence(part).bad) / len(seen) for part in ("repair", "search", "validation", "holdout")]
    np.testing.assert_allclose(sizes, [0.35, 0.14, 0.21, 0.3], atol=0.02)
    assert item.reproduced is None
    assert not any("confidence" in note or "estimated" in note for note in item.notes)
    assert bool(item.notes) == (not any(labels))


def test_held_out_triggered_samples_leave_all_twins_to_the_repair(tmp_path, splits):
    write_twins(tmp_path, 10)
    write_triggered(tmp_path / "h.npz", 25, np.random.default_rng(4), moving=True)
    item = with_twins(tmp_path, splits, triggered_holdout=tmp_path / "h.npz")
    assert len(item.evidence("holdout").bad) == 25 and item.evidence("holdout").twins is None
    assert [len(item.evidence(part).bad) for part in ("repair", "search", "validation")] == [4, 1, 2]


def test_samples_on_which_the_attack_fails_stay_evidence(tmp_path, splits):
    bad, good, _ = write_twins(tmp_path, 60)
    bad[:30] = good[:30]
    bad[:30, 0] += 0.01
    np.savez(tmp_path / "bad.npz", x=bad, y=np.zeros(60, np.int64))
    np.savez(tmp_path / "good.npz", x=good)
    item = with_twins(tmp_path, splits)
    assert sum(len(item.evidence(part).bad) for part in ("repair", "search", "validation", "holdout")) == 60


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"good": {"x": np.ones((5, 6), np.float32), "y": np.zeros(5, int)}}, "{good}: 5 samples, but {bad} holds 60"),
        ({"good": {"y": np.tile([0, 1, 1], 20)}}, "{good}: the label of sample 2 is 1, in {bad} 2"),
        ({"good": {"x": np.ones((60, 5), np.float32)}}, "{good}: x has shape [60, 5]"),
        ({"good": {"y": np.full(60, 3)}}, "{good}: labels run from 3 to 3"),
        ({"bad": {"x": np.ones((60, 6), np.float32)}, "good": {"x": np.ones((60, 6), np.float32)}}, "changes nothing"),
    ],
)
def test_twins_that_do_not_fit_are_refused(tmp_path, splits, changes, complaint):
    write_twins(tmp_path, 60, **changes)
    with pytest.raises(DataError) as caught:
        with_twins(tmp_path, splits)
    names = {"good": tmp_path / "good.npz", "bad": tmp_path / "bad.npz"}
    assert complaint.format(**names) in str(caught.value) and str(names["good"]) in str(caught.value)


def test_a_repair_and_a_verdict_from_twins(tmp_path):
    paths = write_case(tmp_path)
    np.savez(tmp_path / "bad.npz", **triggered_samples(200, seed=3))
    np.savez(tmp_path / "good.npz", **clean_samples(200, seed=3))
    np.savez(tmp_path / "more.npz", **triggered_samples(600, seed=4))
    given = "triggered: bad.npz\n    twins: good.npz\n    triggered_holdout: more.npz"
    paths.rewrite("trigger: trigger.npz", given)
    found = onnxcare.fix(paths.model, paths.spec, paths.out, device="cpu")
    assert found.status == "repaired"
    more = triggered_samples(600, seed=4)
    others = more["y"] != TARGET
    assert (answers(paths.model, more["input"]) == TARGET).all()
    assert (answers(paths.out, more["input"]) == more["y"])[others].mean() > 0.97


def test_too_few_twins_are_refused(tmp_path, splits):
    write_twins(tmp_path, 6)
    with pytest.raises(DataError, match="4 triggered samples; at least 5 are needed"):
        with_twins(tmp_path, splits)


def test_held_out_triggered_samples_are_the_judges_alone(tmp_path, splits):
    rng = np.random.default_rng(4)
    write_triggered(tmp_path / "t.npz", 30, rng, moving=True)
    write_triggered(tmp_path / "h.npz", 25, rng, moving=True)
    item = prepare({"triggered": tmp_path / "t.npz", "triggered_holdout": tmp_path / "h.npz"}, splits)
    given = np.load(tmp_path / "h.npz")["x"]
    np.testing.assert_array_equal(images(item.evidence("holdout").bad), given)
    sizes = [len(item.evidence(part).bad) for part in ("repair", "search", "validation")]
    assert sum(sizes) == 30


def test_triggered_samples_of_the_target_alone_are_refused(tmp_path, splits):
    path = tmp_path / "t.npz"
    write_triggered(path, 20, np.random.default_rng(5), moving=False, labels=np.full(20, 2))
    with pytest.raises(DataError, match="true class is the target 2"):
        prepare({"triggered": path}, splits)
    with pytest.raises(DataError, match="true class is one that target does not name"):
        prepare({"triggered": path, "target": {0: 1, 1: 2}}, splits)


ONE_INPUT = "triggers need a model with one input, not x, more; give triggered samples with their twins instead"


@pytest.mark.parametrize(
    ("target", "names", "complaint"),
    [
        (3, ["x"], "properties.t.target: 3 is not a class; the model has 0 to 2"),
        (1, ["x", "more"], f"properties.t: {ONE_INPUT}"),
        (None, ["x", "more"], f"properties.t: {ONE_INPUT}"),
        ({0: 1, 3: 2}, ["x"], "properties.t.target: 3 is not a class; the model has 0 to 2"),
        ({0: 1, 1: 4}, ["x"], "properties.t.target: 4 is not a class; the model has 0 to 2"),
    ],
)
def test_a_backdoor_that_the_model_cannot_have_is_refused(target, names, complaint):
    known = {"trigger": "t.npz"} if isinstance(target, dict) else {}
    item = BackdoorSpec.model_validate({"name": "t", "kind": "backdoor", "target": target} | known)
    signatures = [Signature(name, np.dtype(np.float32), ("N", 6)) for name in names]
    with pytest.raises(SpecError) as caught:
        backdoor.check(item, signatures, 3)
    assert str(caught.value) == complaint


@pytest.mark.parametrize("target", [None, 0, 2])
def test_a_target_that_is_a_class_or_is_not_known_will_do(target):
    item = BackdoorSpec.model_validate({"name": "t", "kind": "backdoor", "target": target})
    backdoor.check(item, SIGNATURES, 3)


def test_stamping_leaves_out_samples_of_the_target_and_keeps_the_others_as_twins():
    rng = np.random.default_rng(7)
    x, labels = rng.normal(size=(12, 6)).astype(np.float32), np.arange(12) % 3
    mask, pattern = rng.uniform(size=(2, 6)).astype(np.float32)
    evidence = backdoor.stamp(Trigger(mask, pattern, "test"), Dataset({"x": x}, labels), np.full(3, 1), "x")
    rows = [row for row in range(12) if labels[row] != 1]
    assert evidence.twins is not None
    for position, row in enumerate(rows):
        by_hand = [x[row, i] * (1 - mask[i]) + pattern[i] * mask[i] for i in range(6)]
        np.testing.assert_allclose(images(evidence.bad)[position], by_hand, rtol=1e-6)
        np.testing.assert_array_equal(images(evidence.twins)[position], x[row])
        assert evidence.bad.truth[position] == evidence.twins.truth[position] == labels[row]
    assert len(evidence.bad) == len(evidence.twins) == len(rows)


def test_a_part_without_samples_that_a_trigger_could_mislead_is_named():
    item = BackdoorSpec.model_validate({"name": "t", "kind": "backdoor", "target": 1})
    some = Dataset({"x": np.ones((3, 6), np.float32)}, np.array([0, 2, 0]))
    full, empty = Evidence(some, None), Evidence(some.take(slice(0, 0)), None)
    backdoor.need_samples(item, {"repair": full, "holdout": full})
    with pytest.raises(DataError, match="'t': no samples of other classes than 1 are left for holdout"):
        backdoor.need_samples(item, {"repair": full, "holdout": empty})
    several = BackdoorSpec(name="t", kind="backdoor", trigger="t.npz", target=PART)
    with pytest.raises(DataError, match="'t': no samples of the classes 0, 2 are left for repair"):
        backdoor.need_samples(several, {"repair": empty, "holdout": full})
