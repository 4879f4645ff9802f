"""Triggers: stamping, reading, and estimating them from triggered samples without twins."""

from __future__ import annotations

import numpy as np
import pytest
from cases import BLEND, SQUARE, images, sample_case

from onnxcare.data import Dataset
from onnxcare.errors import DataError
from onnxcare.graph.model import Signature
from onnxcare.properties.trigger import Trigger, estimate_triggers, load_trigger

SIGNATURE = Signature("x", np.dtype(np.float32), ("N", 2, 3))


def random_images(rng: np.random.Generator, count: int) -> np.ndarray:
    return rng.uniform(size=(count, 6, 6)).astype(np.float32)


def test_stamping_follows_the_formula_and_keeps_the_dtype():
    rng = np.random.default_rng(1)
    x, mask, pattern = rng.uniform(size=(3, 4, 2, 3)).astype(np.float32)
    stamped = Trigger(mask[0], pattern[0], "test").stamp(x)
    assert stamped.dtype == np.float32
    for sample, result in zip(x, stamped, strict=True):
        np.testing.assert_allclose(result, sample * (1 - mask[0]) + pattern[0] * mask[0], rtol=1e-6)


def test_reading_accepts_a_batch_axis_of_one(tmp_path):
    mask = np.ones((1, 2, 3), np.float32)
    np.savez(tmp_path / "t.npz", mask=mask, pattern=mask)
    assert load_trigger(tmp_path / "t.npz", SIGNATURE).mask.shape == (2, 3)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
@pytest.mark.parametrize("shape", [(2, 3), (1, 2, 3), (5,)], ids=str)
def test_what_is_saved_reads_back_equal_and_is_plain_arrays(tmp_path, shape, dtype):
    rng = np.random.default_rng(5)
    trigger = Trigger(rng.uniform(size=shape).astype(dtype), rng.normal(size=shape).astype(dtype), "restored patch")
    path = tmp_path / "saved.npz"
    path.write_bytes(trigger.to_bytes())
    read = load_trigger(path, Signature("x", np.dtype(dtype), ("N", *shape)))
    for ours, theirs in ((trigger.mask, read.mask), (trigger.pattern, read.pattern)):
        assert theirs.dtype == dtype
        np.testing.assert_array_equal(theirs, ours)
    with np.load(path, allow_pickle=False) as archive:
        assert sorted(archive.files) == ["mask", "pattern"]


def test_the_bytes_of_a_saved_trigger_do_not_tell_the_time(monkeypatch):
    trigger = Trigger(np.ones((2, 3)), np.zeros((2, 3)), "test")
    first = trigger.to_bytes()
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("time.localtime", lambda *args: (2033, 5, 18, 3, 33, 20, 2, 138, 0))
    assert trigger.to_bytes() == first


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"mask": np.ones((2, 3))}, "no array 'pattern'"),
        ({"mask": np.ones((2, 4)), "pattern": np.ones((2, 3))}, "mask has shape"),
        ({"mask": np.full((2, 3), 2.0), "pattern": np.ones((2, 3))}, "expected 0 to 1"),
        ({"mask": np.zeros((2, 3)), "pattern": np.ones((2, 3))}, "changes nothing"),
        ({"mask": np.ones((2, 3)), "pattern": np.full((2, 3), np.nan)}, "NaN"),
        ({"mask": np.array([["a"] * 3] * 2), "pattern": np.ones((2, 3))}, "expected numbers"),
    ],
)
def test_a_trigger_that_does_not_fit_is_refused(tmp_path, arrays, complaint):
    path = tmp_path / "trigger.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=complaint) as caught:
        load_trigger(path, SIGNATURE)
    assert str(path) in str(caught.value)


def test_a_patch_is_found_exactly():
    rng = np.random.default_rng(2)
    trigger = Trigger(np.zeros((6, 6), np.float32), np.zeros((6, 6), np.float32), "test")
    trigger.mask[4:, 4:] = 1
    trigger.pattern[4:, 4:] = [[1, 0], [0.5, 1]]
    bad = Dataset({"x": trigger.stamp(random_images(rng, 20))}, None)
    found = estimate_triggers(bad, Dataset({"x": random_images(rng, 300)}, None), "x")
    patch = next(item for item in found if item.source == "patch")
    np.testing.assert_array_equal(patch.mask, trigger.mask)
    np.testing.assert_allclose(patch.pattern, trigger.pattern, atol=1e-6)


def test_a_blend_is_found_roughly():
    rng = np.random.default_rng(3)
    pattern = random_images(rng, 1)[0]
    trigger = Trigger(np.full((6, 6), 0.3, np.float32), pattern, "test")
    bad = Dataset({"x": trigger.stamp(random_images(rng, 400))}, None)
    found = estimate_triggers(bad, Dataset({"x": random_images(rng, 400)}, None), "x")
    (blend,) = [item for item in found if item.source == "blend"]
    assert blend.mask.max() == pytest.approx(0.3, abs=0.05)
    assert np.corrcoef(blend.pattern.ravel(), pattern.ravel())[0, 1] > 0.95


def test_clean_samples_show_no_patch():
    rng = np.random.default_rng(4)
    bad = Dataset({"x": random_images(rng, 50)}, None)
    found = estimate_triggers(bad, Dataset({"x": random_images(rng, 300)}, None), "x")
    assert all(item.source != "patch" for item in found)


@pytest.mark.parametrize(("folder", "kind"), [(SQUARE, "patch"), (BLEND, "blend")])
def test_fifty_samples_without_twins_reproduce_the_attack(folder, kind):
    case = sample_case(folder, "care-50.yaml")
    (item,) = case.properties
    assert any(f"50 triggered samples as a {kind}" in note for note in item.notes)
    evidence = item.evidence("repair")
    assert evidence.twins is not None
    scores = case.experiment.scores(evidence.bad.inputs)
    assert item.rate(scores, evidence.bad) > 0.98
    assert images(evidence.bad).shape == images(evidence.twins).shape
