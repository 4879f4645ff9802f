"""What the owner of a model would do: write a spec, gather data, and call `locate` and `fix`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import onnxcare
from benchmarks.third_party.by_hand import ByHand
from benchmarks.third_party.catalogue import Subject

Array = np.ndarray

_SEED = 2
_SAMPLES = 240
# The share of the least certain answers that are said to be wrong, where the owner knows of no other property.
_WRONG = 0.25


def locate(path: Path, subject: Subject, folder: Path) -> dict[str, Any]:
    """Rank units, with little effort."""
    found = onnxcare.locate(path, _spec(path, subject, folder), device="cpu", samples=32, values=4)
    return {"units": len(found.units), "sites": len(found.sites), "method": found.method}


def fix(path: Path, subject: Subject, folder: Path) -> dict[str, Any]:
    """Repair the model."""
    fixed = onnxcare.fix(path, _spec(path, subject, folder), folder / "out.onnx", device="cpu")
    return {"status": fixed.status, "tensors": len(fixed.patch)}


def _spec(path: Path, subject: Subject, folder: Path) -> Path:
    """Return the spec; it is written, with its data, where it is not there yet."""
    spec = folder / "care.yaml"
    if spec.exists():
        return spec
    asked = dict(subject.asked or {"name": "least certain", "kind": "errors"})
    if "vnnlib" in asked:
        asked["vnnlib"] = str(path.parent / asked["vnnlib"])
    content = {**subject.spec, "properties": [asked]}
    if subject.axes:
        content["sample_axes"] = dict(subject.axes)
    if "bounds" not in content:
        content["data"] = "data.npz"
        arrays = subject.draw(np.random.default_rng(_SEED), _SAMPLES)
        labels = {} if subject.asked else {"y": _labels(path, subject, arrays)}
        np.savez(folder / "data.npz", **arrays, **labels)
    spec.write_text(yaml.safe_dump(content), encoding="utf-8")
    return spec


def _labels(path: Path, subject: Subject, feeds: Mapping[str, Array]) -> Array:
    """Return the model's answers, and the second best ones where they are least certain."""
    hand = ByHand(path, subject.axes)
    y = hand.answer(feeds, subject.spec.get("output", hand.outputs[0]))
    y = y.reshape(len(y), -1).astype(np.float64)
    decision = subject.spec.get("decision", "argmax")
    if isinstance(decision, dict):
        y = np.stack([np.full(len(y), decision["threshold"]), y[:, 0]], axis=1)
    scores = -y if decision == "argmin" else y
    best = np.argsort(-scores, axis=1, kind="stable")[:, :2]
    first, second = np.take_along_axis(scores, best, axis=1).T
    wrong = np.argsort(first - second, kind="stable")[: int(_WRONG * len(y))]
    labels = best[:, 0].copy()
    labels[wrong] = best[wrong, 1]
    return labels
