"""Estimating static triggers from triggered samples without twins: of every form, from many samples and from few."""

from __future__ import annotations

import numpy as np
import pytest
from cases import BLEND, SQUARE, images, sample_case

from onnxcare.data import Dataset, load_arrays, load_dataset
from onnxcare.graph.model import load_model
from onnxcare.properties import backdoor
from onnxcare.properties.estimation import estimate_triggers
from onnxcare.properties.trigger import Added, Static, Trigger
from onnxcare.spec import load_spec

Array = np.ndarray
UNIT = (np.float32(0), np.float32(1))


def random_images(rng: np.random.Generator, count: int) -> Array:
    return rng.uniform(size=(count, 6, 6)).astype(np.float32)


def strokes(rng: np.random.Generator, count: int) -> Array:
    """Return images that are black but for one place in three."""
    return random_images(rng, count) * (rng.random((count, 6, 6)) < 0.3)


def estimate(bad: Array, good: Array, labels: tuple[Array, Array] | None = None) -> list[Static]:
    of_bad, of_good = (None, None) if labels is None else labels
    return estimate_triggers(Dataset({"x": bad}, of_bad), Dataset({"x": good}, of_good), "x", UNIT)


def of(kind: str, found: list[Static]) -> Static:
    (trigger,) = [item for item in found if item.source == kind]
    return trigger


def test_a_patch_is_found_exactly_and_comes_first():
    rng = np.random.default_rng(2)
    trigger = Trigger(np.zeros((6, 6), np.float32), np.zeros((6, 6), np.float32), "test")
    trigger.mask[4:, 4:] = 1
    trigger.pattern[4:, 4:] = [[1, 0], [0.5, 1]]
    patch, *_ = estimate(trigger.stamp(random_images(rng, 20)), random_images(rng, 300))
    assert patch.source == "patch" and patch.size == 4
    np.testing.assert_array_equal(patch.mask, trigger.mask)
    np.testing.assert_allclose(patch.pattern, trigger.pattern, atol=1e-6)


@pytest.mark.parametrize(("count", "share", "least"), [(400, 0.3, 0.97), (50, 0.3, 0.9), (400, 0.1, 0.8)])
def test_a_blend_is_found_roughly_where_every_value_varies(count, share, least):
    rng = np.random.default_rng(3)
    pattern = random_images(rng, 1)[0]
    trigger = Trigger(np.full((6, 6), share, np.float32), pattern, "test")
    found = estimate(trigger.stamp(random_images(rng, count)), random_images(rng, 400))
    blend = of("blend", found)
    assert blend.mask.max() == blend.mask.min() == pytest.approx(share, abs=0.05)
    assert np.corrcoef(blend.pattern.ravel(), pattern.ravel())[0, 1] > least


def test_a_blend_is_found_to_the_point_on_a_background_from_twenty_samples():
    rng = np.random.default_rng(4)
    pattern = random_images(rng, 1)[0]
    trigger = Trigger(np.full((6, 6), 0.2, np.float32), pattern, "test")
    blend, *_ = estimate(trigger.stamp(strokes(rng, 20)), strokes(rng, 300))
    assert blend.source == "blend"
    assert blend.mask.max() == pytest.approx(0.2, abs=0.05)
    assert np.median(np.abs(blend.mask * blend.pattern - 0.2 * pattern)) < 1e-6


@pytest.mark.parametrize("count", [10, 50])
def test_an_added_pattern_is_found_where_the_clip_does_not_hide_it(count):
    rng = np.random.default_rng(5)
    added = rng.uniform(-0.3, 0.3, (6, 6)).astype(np.float32)
    bad = Added(added, UNIT, "test").stamp(strokes(rng, count))
    first, *_ = estimate(bad, strokes(rng, 300))
    assert isinstance(first, Added) and first.source == "added pattern" and first.range == UNIT
    up = added > 0
    assert np.median(np.abs(first.added - added)[up]) < 1e-6
    # What is taken from a black background is not seen there.
    assert (first.added[~up] <= 1e-6).all()
    fresh = strokes(rng, 200)
    off = np.abs(first.stamp(fresh) - Added(added, UNIT, "test").stamp(fresh)).mean()
    assert off < 0.2 * np.abs(fresh - Added(added, UNIT, "test").stamp(fresh)).mean()


def test_what_is_added_is_the_order_statistic_nearest_to_zero_within_chance():
    """Nine values, of which some lie at an end of the range, counted by hand."""
    good = np.linspace(0.1, 0.9, 9).astype(np.float32)[:, None]
    shifts = np.array([0.3, 0.25, 0.2, 0.15, 0.1, 0.2, 0.25, 0.3, 0.4])
    bad = np.clip(np.sort(good[:, 0] + shifts), 0, 1).astype(np.float32)[:, None]
    (found,) = [item for item in estimate(bad, good) if isinstance(item, Added)]
    lows, highs = [], []
    for theirs, ours in zip(bad[:, 0], good[:, 0], strict=True):
        lows.append(theirs - ours)
        highs.append(np.inf if theirs == 1 else theirs - ours)
    ends = sorted([*lows, *highs])
    assert sum(np.isinf(ends)) == 2
    # Half the root of nine is 1.5, rounded to 2: from the seventh end to the twelfth.
    assert found.added[0] == pytest.approx(ends[9 - 1 - 2])
    assert 0 < ends[6] < ends[11]


def test_clean_means_are_those_of_the_same_classes():
    """One class is dark and one bright; the triggered samples are nearly all bright."""
    rng = np.random.default_rng(6)
    dark, bright = 0.3 * random_images(rng, 200), 0.3 * random_images(rng, 200) + 0.5
    labels = np.repeat([0, 1], 200)
    bad = np.concatenate([0.3 * random_images(rng, 3), 0.3 * random_images(rng, 37) + 0.5]) + np.float32(0.1)
    good = np.concatenate([dark, bright])
    matched = of("added pattern", estimate(bad, good, (np.repeat([0, 1], [3, 37]), labels)))
    assert matched.added.mean() == pytest.approx(0.1, abs=0.03)
    unmatched = of("added pattern", estimate(bad, good))
    assert unmatched.added.mean() > 0.2
    # Where a class has no clean sample, all clean samples are what is left.
    unknown = of("added pattern", estimate(bad, good, (np.repeat([0, 2], [3, 37]), labels)))
    np.testing.assert_array_equal(unknown.added, unmatched.added)


def test_clean_samples_show_no_patch_and_next_to_nothing_that_is_added():
    rng = np.random.default_rng(4)
    found = estimate(random_images(rng, 50), random_images(rng, 300))
    assert all(item.source != "patch" for item in found)
    assert all(np.abs(item.added).mean() < 0.05 for item in found if isinstance(item, Added))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_few_samples_give_an_answer(count):
    rng = np.random.default_rng(8)
    for item in estimate(strokes(rng, count), strokes(rng, 40)):
        assert np.isfinite(item.stamp(strokes(rng, 5))).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float64])
def test_other_types_of_numbers(dtype):
    rng = np.random.default_rng(9)
    scale = 255 if dtype == np.uint8 else 1
    good, bad = ((scale * strokes(rng, count)).astype(dtype) for count in (200, 30))
    added = np.full((6, 6), 0.2 * scale)
    stamped = Added(added, (good.min(), good.max()), "test").stamp(bad)
    assert stamped.dtype == dtype
    found = estimate_triggers(Dataset({"x": stamped}, None), Dataset({"x": good}, None), "x", (good.min(), good.max()))
    assert np.median(of("added pattern", found).added) == pytest.approx(0.2 * scale, rel=0.01)
    assert all(item.stamp(good).dtype == dtype for item in found)


@pytest.mark.parametrize(("folder", "kind"), [(SQUARE, "patch"), (BLEND, "blend")])
def test_fifty_samples_without_twins_reproduce_the_attack(folder, kind):
    case = sample_case(folder, "care-50.yaml")
    (item,) = case.properties
    assert any(f"50 triggered samples as a {kind}" in note for note in item.notes)
    assert item.reproduced > 0.98
    evidence = item.evidence("repair")
    assert evidence.twins is not None
    scores = case.experiment.scores(evidence.bad.inputs)
    assert item.rate(scores, evidence.bad) > 0.98
    assert images(evidence.bad).shape == images(evidence.twins).shape


@pytest.mark.parametrize(("folder", "kind"), [(SQUARE, "patch"), (BLEND, "blend")])
@pytest.mark.parametrize("count", [5, 10])
def test_five_or_ten_samples_do_too(tmp_path, folder, kind, count):
    case = sample_case(folder, "care-50.yaml")
    model, (spec,) = load_model(folder / "model.onnx"), load_spec(folder / "care-50.yaml").properties
    given = load_dataset(spec.triggered, model.inputs).take(slice(0, count))
    np.savez(tmp_path / "few.npz", x=images(given), y=given.labels)
    few = spec.model_copy(update={"triggered": tmp_path / "few.npz"})
    item = backdoor.prepare(few, case.splits, model.inputs, 10, case.experiment.scores, "y", 1)
    assert f"estimated from {count} triggered samples as a {kind}" in item.notes[0]
    fresh = item.evidence("search")
    assert item.rate(case.experiment.scores(fresh.bad.inputs), fresh.bad) > 0.98
    true = load_arrays(folder / "trigger.npz")
    stamped = Trigger(true["mask"], true["pattern"], "true").stamp(images(fresh.twins))
    off = np.abs(images(fresh.bad) - stamped).mean()
    assert off < {("patch", 5): 1e-6, ("patch", 10): 1e-6, ("blend", 5): 0.02, ("blend", 10): 0.005}[kind, count]
