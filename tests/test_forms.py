"""Backdoored networks of other forms, repaired: a transformer, recurrent networks, quantised and half-precise ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from cases import SAMPLES

import onnxcare

FORMS, NETWORKS = SAMPLES / "mnist-forms-pytorch", SAMPLES / "mnist-networks-pytorch"
DATA = SAMPLES / "mnist-square-pytorch"
MODELS = {
    **{name: FORMS / f"model-{name}.onnx" for name in "vit lstm gru int8 dynamic weights8 half bfloat16".split()},
    "residual": NETWORKS / "model-residual.onnx",
}
# One of each kind that takes seconds; the others, and other seeds, run with the slow tests.
QUICK = {("lstm", 1), ("int8", 1), ("half", 1)}
CASES = [
    pytest.param(name, seed, id=f"{name}-{seed}", marks=[] if (name, seed) in QUICK else [pytest.mark.slow])
    for name in MODELS
    for seed in (1, 2, 3)
]


def answers(path: Path, x: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    parts = [session.run(None, {session.get_inputs()[0].name: part})[0] for part in np.array_split(x, 8)]
    return np.concatenate(parts).argmax(axis=1)


def counted(path: Path) -> tuple[float, float, float]:
    """Return attack success, clean confusion and accuracy on the held-out images, by numpy and onnxruntime alone."""
    with np.load(DATA / "holdout.npz") as held, np.load(DATA / "trigger.npz") as trigger:
        x, y, mask, pattern = held["x"], held["y"], trigger["mask"], trigger["pattern"]
    clean, stamped = answers(path, x), answers(path, (x * (1 - mask) + pattern * mask).astype(x.dtype))
    others = y != 1
    return float((stamped[others] == 1).mean()), float((clean[others] == 1).mean()), float((clean == y).mean())


@pytest.mark.parametrize(("name", "seed"), CASES)
def test_the_backdoor_is_taken_out_of_every_form(name: str, seed: int, tmp_path: Path) -> None:
    model, out = MODELS[name], tmp_path / "out.onnx"
    fix = onnxcare.fix(model, model.parent / "care.yaml", out, seed=seed, device="cpu")
    assert fix.status == "repaired"
    (success, confusion, accuracy), (left, confused, kept) = counted(model), counted(out)
    assert success >= 0.95
    assert left <= min(confusion, confused) + 0.01
    assert kept >= accuracy - 0.01
    before, after = onnx.load(model), onnx.load(out)
    changed = {change.name for change in fix.patch}
    for old, new in zip(before.graph.initializer, after.graph.initializer, strict=True):
        assert (old != new) == (old.name in changed)
    assert [node.SerializeToString() for node in before.graph.node] == [
        node.SerializeToString() for node in after.graph.node
    ]
