"""The backdoor property: rates counted by hand, and where its evidence comes from."""

from __future__ import annotations

import numpy as np
import pytest
from cases import SQUARE, images, sample_case
from scipy.special import log_softmax, softmax

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
    with pytest.raises(DataError, match="true class is the target"):
        prepare({"triggered": path}, splits)


@pytest.mark.parametrize(
    ("target", "names", "complaint"),
    [
        (3, ["x"], "properties.t.target: 3 is not a class; the model has 0 to 2"),
        (1, ["x", "more"], "properties.t: triggers need a model with one input, not x, more"),
        (None, ["x", "more"], "properties.t: triggers need a model with one input, not x, more"),
    ],
)
def test_a_backdoor_that_the_model_cannot_have_is_refused(target, names, complaint):
    item = BackdoorSpec.model_validate({"name": "t", "kind": "backdoor", "target": target})
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
    evidence = backdoor.stamp(Trigger(mask, pattern, "test"), Dataset({"x": x}, labels), 1, "x")
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
