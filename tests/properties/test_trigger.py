"""Triggers: stamping, saving and reading them."""

from __future__ import annotations

import numpy as np
import pytest

from onnxcare.errors import DataError
from onnxcare.graph.model import Signature
from onnxcare.properties.trigger import Added, Trigger, load_trigger

SIGNATURE = Signature("x", np.dtype(np.float32), ("N", 2, 3))


def test_stamping_follows_the_formula_and_keeps_the_dtype():
    rng = np.random.default_rng(1)
    x, mask, pattern = rng.uniform(size=(3, 4, 2, 3)).astype(np.float32)
    stamped = Trigger(mask[0], pattern[0], "test").stamp(x)
    assert stamped.dtype == np.float32
    for sample, result in zip(x, stamped, strict=True):
        np.testing.assert_allclose(result, sample * (1 - mask[0]) + pattern[0] * mask[0], rtol=1e-6)


def test_what_is_added_is_cut_off_at_the_ends_of_the_range():
    rng = np.random.default_rng(2)
    x, added = rng.uniform(size=(4, 2, 3)).astype(np.float32), rng.normal(size=(2, 3)).astype(np.float32)
    high = rng.uniform(0.5, 1, (2, 3))
    stamped = Added(added, (np.zeros((2, 3)), high), "test").stamp(x)
    assert stamped.dtype == np.float32
    cut = 0
    for place in np.ndindex(4, 2, 3):
        whole = x[place] + added[place[1:]]
        cut += not 0 <= whole <= high[place[1:]]
        assert stamped[place] == pytest.approx(min(max(whole, 0), high[place[1:]]), rel=1e-6)
    assert 0 < cut < 24


@pytest.mark.parametrize(("pixel", "added", "expected"), [(3, -5, 0), (250, 9, 255), (100, -5, 95), (100, 9, 109)])
def test_what_is_added_to_whole_numbers_does_not_wrap_around(tmp_path, pixel, added, expected):
    np.savez(tmp_path / "t.npz", added=np.full((2, 3), added))
    read = load_trigger(tmp_path / "t.npz", Signature("x", np.dtype(np.uint8), ("N", 2, 3)), (0, 255))
    stamped = read.stamp(np.full((1, 2, 3), pixel, np.uint8))
    assert stamped.dtype == np.uint8 and (stamped == expected).all()


def test_how_many_values_a_trigger_changes():
    mask = np.array([[0, 0.1, 1], [0, 0, 0.5]])
    assert Trigger(mask, np.zeros((2, 3)), "test").size == 3
    assert Added(np.array([[0, -0.1, 1], [0, 0, 0]]), (0, 1), "test").size == 2


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


def test_what_is_added_is_saved_and_reads_back_equal(tmp_path):
    added = np.random.default_rng(6).normal(size=(2, 3)).astype(np.float32)
    path = tmp_path / "saved.npz"
    path.write_bytes(Added(added, (-1, 1), "added pattern").to_bytes())
    read = load_trigger(path, SIGNATURE, (-2, 2))
    assert isinstance(read, Added) and (read.range, read.source) == ((-2, 2), str(path))
    np.testing.assert_array_equal(read.added, added)
    assert read.added.dtype == np.float32


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
        ({"shape": np.ones((2, 3))}, r"no array 'mask'; a trigger holds mask and pattern, or added \(found shape\)"),
        ({"added": np.ones((2, 4))}, "added has shape"),
        ({"added": np.zeros((2, 3))}, "added is zero everywhere, so the trigger changes nothing"),
        ({"added": np.full((2, 3), np.inf)}, "added holds 6 NaN or infinite"),
        ({"added": np.ones((2, 3), complex)}, "added is complex128; expected numbers"),
        (
            {"added": np.ones((2, 3)), "mask": np.ones((2, 3))},
            "added beside mask; a trigger is either added or stamped",
        ),
    ],
)
def test_a_trigger_that_does_not_fit_is_refused(tmp_path, arrays, complaint):
    path = tmp_path / "trigger.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=complaint) as caught:
        load_trigger(path, SIGNATURE)
    assert str(path) in str(caught.value)
