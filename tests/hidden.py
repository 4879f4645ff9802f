"""A hand-wired model of small images with a hidden trigger, its data and specs that do not know the trigger.

An image has 8 x 8 pixels, in colours the same in every channel. Row k is bright in samples of class k of six; rows 6
and 7 are black in clean samples, and a white pixel there, in a corner, leads to a class that nobody has asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import yaml
from graph.models import build
from graph.models import run as run_outputs
from helpers import Paths
from onnx import helper, numpy_helper

from onnxcare.data import Dataset
from onnxcare.decision import Decision
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.properties.trigger import Trigger

Array = np.ndarray

SIDE, CLASSES, TARGET, PIXEL = 8, 6, 2, (7, 7)
OTHER_TARGET, OTHER_PIXEL = 4, (6, 0)
FLAT, GREY, CHANNEL_FIRST, CHANNEL_LAST = (SIDE * SIDE,), (1, SIDE, SIDE), (3, SIDE, SIDE), (SIDE, SIDE, 3)
# How much the row of a class, and how much a white pixel in a corner, speaks for a class.
_ROW, _CORNER = 8.0, 12.0

SPEC: dict[str, object] = {
    "data": "repair.npz",
    "holdout": "holdout.npz",
    "properties": [{"name": "hidden", "kind": "backdoor", "max_rate": 0.01}],
    "keep": {"accuracy_drop": 0.01, "recall_drop": 0.05},
    "seed": 1,
}


def shaped(pixels: Array, shape: tuple[int, ...]) -> Array:
    """Return images [..., 8, 8] in the shape of a model's input."""
    if len(shape) == 1:
        return pixels.reshape(*pixels.shape[:-2], *shape)
    axis = -3 if shape[0] in (1, 3) else -1
    return np.repeat(np.expand_dims(pixels, axis), shape[axis], axis=axis)


def weights(corners: Mapping[tuple[int, int], int], shape: tuple[int, ...] = FLAT) -> dict[str, Array]:
    """Return the weights [inputs, hidden] and [hidden, classes]: a hidden unit for every row, and one for a corner."""
    hidden = CLASSES + len(corners)
    first, second = np.zeros((hidden, SIDE, SIDE)), np.zeros((hidden, CLASSES))
    for label in range(CLASSES):
        first[label, label] = 1 / SIDE
        second[label, label] = _ROW
    for unit, (pixel, target) in enumerate(corners.items(), CLASSES):
        first[(unit, *pixel)] = 1
        second[unit, target] = _CORNER
    wide = shaped(first, shape).reshape(hidden, -1)
    noise = np.random.default_rng(3).normal(0, 0.01, wide.shape)
    found = {"W1": (wide * SIDE * SIDE / wide.shape[1] + noise).T, "W2": second}
    return {name: values.astype(np.float32) for name, values in found.items()}


def model(corners: Mapping[tuple[int, int], int] | None = None, shape: tuple[int, ...] = FLAT) -> onnx.ModelProto:
    """Return the model; `corners` are white pixels and the classes that they lead to, one pixel where it is None."""
    corners = {PIXEL: TARGET} if corners is None else corners
    text = f"""hidden (float[N, {", ".join(map(str, shape))}] x) => (float[N, {CLASSES}] scores) {{
        [flatten] f = Flatten (x)
        [first] p = MatMul (f, W1)
        [relu] h = Relu (p)
        [second] scores = MatMul (h, W2)
    }}"""
    return build(text, weights(corners, shape))


def rounded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model behind a step without a derivative: values are rounded to whole shares of 255."""
    steps = [
        helper.make_node("Mul", ["x", "levels"], ["scaled"], name="up"),
        helper.make_node("Round", ["scaled"], ["whole"], name="steps"),
        helper.make_node("Div", ["whole", "levels"], ["back"], name="down"),
    ]
    proto.graph.node[0].input[0] = "back"
    for position, node in enumerate(steps):
        proto.graph.node.insert(position, node)
    proto.graph.initializer.append(numpy_helper.from_array(np.float32(255), "levels"))
    return proto


def samples(size: int, seed: int, shape: tuple[int, ...] = FLAT) -> Dataset:
    """Return clean samples, as many of every class."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % CLASSES
    pixels = rng.uniform(0, 0.4, (size, SIDE, SIDE))
    pixels[np.arange(size), labels] = rng.uniform(0.6, 1, (size, SIDE))
    pixels[:, CLASSES:] = 0
    return Dataset({"x": shaped(pixels.astype(np.float32), shape)}, labels.astype(np.int64))


def corner(shape: tuple[int, ...] = FLAT, pixel: tuple[int, int] = PIXEL) -> Trigger:
    """Return the true trigger."""
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[pixel] = 1
    return Trigger(shaped(mask, shape), shaped(mask, shape), "true")


def answers(source: onnx.ModelProto | Path, x: Array) -> Array:
    """Return the classes a model answers, in a plain onnxruntime session."""
    return run_outputs(source, {"x": x})[0].argmax(axis=1)


def opened(proto: onnx.ModelProto, data: Dataset, folder: Path, decision: Decision | None = None) -> Experiment:
    """Return the model on the operating table."""
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return Experiment(load_model(path), "cpu", 1 << 28, data.inputs, decision=decision)


def write(
    folder: Path, proto: onnx.ModelProto | None = None, shape: tuple[int, ...] = FLAT, **changes: object
) -> Paths:
    """Write the model with data and a spec that does not know the trigger; `changes` go into the spec."""
    names = ("model.onnx", "care.yaml", "repair.npz", "holdout.npz", "trigger.npz")
    paths = Paths(folder, *(folder / name for name in names))
    paths.model.write_bytes((proto or model(shape=shape)).SerializeToString())
    paths.spec.write_text(yaml.safe_dump(SPEC | changes, sort_keys=False))
    for path, size, seed in ((paths.data, 600, 1), (paths.holdout, 900, 2)):
        data = samples(size, seed, shape)
        np.savez(path, **data.inputs, y=data.truth)
    return paths


def asking(**changes: object) -> dict[str, object]:
    """Return the properties of a spec with one backdoor whose trigger is not known."""
    return {"properties": [{"name": "hidden", "kind": "backdoor", "max_rate": 0.01} | changes]}
