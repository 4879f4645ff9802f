"""The collision-avoidance sample, judged by onnxruntime and numpy alone."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from cases import SAMPLES

import onnxcare
from onnxcare.properties.vnnlib import load_formula

FOLDER = SAMPLES / "avoidance-pytorch"
BOXES = {"care.yaml": -0.1, "care-rare.yaml": 0.2}


def costs(path, states: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(path).run(None, {"state": states})[0]


def test_both_versions_of_the_property_say_the_same():
    first, second = (load_formula(FOLDER / name) for name in ("away.vnnlib", "away-2.0.vnnlib"))
    (one,), (other,) = first.regions, second.regions
    np.testing.assert_allclose((one.low, one.high), (other.low, other.high))
    points = np.random.default_rng(1).normal(size=(1000, 5))
    np.testing.assert_array_equal(first.violation(0, points) >= 0, second.violation(0, points) >= 0)


@pytest.mark.parametrize("spec", ["care.yaml", pytest.param("care-rare.yaml", marks=pytest.mark.slow)])
def test_clear_of_conflict_is_never_the_worst_advice_any_more(spec, tmp_path):
    out = tmp_path / "out.onnx"
    result = onnxcare.fix(FOLDER / "model.onnx", FOLDER / spec, out, device="cpu")
    assert result.status == "repaired"
    rng = np.random.default_rng(123)
    region = rng.uniform([BOXES[spec], -0.5, -0.5, -0.5, -0.5], 0.5, (300_000, 5)).astype(np.float32)
    assert (costs(out, region).argmax(axis=1) != 0).all()
    domain = rng.uniform(-0.5, 0.5, (100_000, 5)).astype(np.float32)
    changed = costs(FOLDER / "model.onnx", domain).argmin(axis=1) != costs(out, domain).argmin(axis=1)
    assert changed.mean() < 0.005
