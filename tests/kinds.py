"""Tiny hand-wired models of people and of a plane, with data and specs, for every kind of property.

People have 6 columns: skill, years (whole numbers, which tell of sex), sex (0 or 1), and origin, one-hot (3 to 5). What
is right depends on skill and years alone; the model has learned to count sex and origin in.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import yaml
from graph.models import build

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.decision import Decision
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch
from onnxcare.judge import Court, Witness
from onnxcare.prepare import prepare
from onnxcare.repair.base import Values

SAMPLES = Path(__file__).parents[1] / "sample_models"
CENSUS, FOUR = SAMPLES / "census-keras", SAMPLES / "mnist-four-sklearn"
Array = np.ndarray

SEX, ORIGIN = {"column": 2, "values": [0, 1]}, {"columns": [3, 4, 5]}
_SKILL, _YEARS = 0, 1


def people(size: int, seed: int) -> Dataset:
    """Return people, labelled by what is right."""
    rng = np.random.default_rng(seed)
    x = np.zeros((size, 6), np.float32)
    sex, origin = rng.integers(0, 2, size), rng.choice(3, size, p=[0.5, 0.3, 0.2])
    x[:, _SKILL] = rng.normal(size=size)
    x[:, _YEARS] = np.clip(np.round(rng.normal(4 + 2 * sex, 1.5)), 0, 12)
    x[:, 2] = sex
    x[np.arange(size), 3 + origin] = 1
    return Dataset({"x": x}, (2 * x[:, _SKILL] + 0.4 * (x[:, _YEARS] - 5) > 0).astype(np.int64))


def weights(classes: int = 1, unfair: float = 1.0) -> dict[str, Array]:
    """Return the weights of the model of people: pairs of hidden units carry one thing each, positive and negative."""
    first = np.zeros((6, 10))
    for unit, sign in ((0, 1), (1, -1)):
        first[_SKILL, unit] = 2 * sign
        first[_YEARS, 2 + unit] = 0.4 * sign
        first[2, 4 + unit] = sign
        first[3:, 6 + unit] = sign * np.array([0.5, -0.5, -1.0])
        first[:, 8 + unit] = sign * np.array([0.1, 0.02, 0.3, 0.1, 0.0, -0.2])
    bias = np.zeros(10)
    bias[2:4], bias[4:6] = (-2, 2), (-0.5, 0.5)
    total = np.array([1, -1, 1, -1, unfair, -unfair, unfair, -unfair, 0.5, -0.5])
    second = total[:, None] if classes == 1 else np.outer(total, np.linspace(-1, 1, classes))
    bend = np.where(np.arange(classes) == classes // 2, 0.6, 0.0) if classes > 2 else np.zeros(classes)
    found = {"W1": first, "b1": bias, "W2": second, "b2": bend}
    return {name: values.astype(np.float32) for name, values in found.items()}


def model(classes: int = 1, final: str = "Sigmoid", unfair: float = 1.0) -> onnx.ModelProto:
    """Return the model of people; without a final operator it answers logits."""
    end = f"[final] y = {final} (z)" if final else "[final] y = Identity (z)"
    text = f"""people (float[N, 6] x) => (float[N, {classes}] y) {{
        [first] p1 = MatMul (x, W1)
        [bias] z1 = Add (p1, b1)
        [relu] h = Relu (z1)
        [second] z = Gemm (h, W2, b2)
        {end}
    }}"""
    return build(text, weights(classes, unfair))


def with_context(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with one more input, a number that is added to its logits."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    nodes = [node for node in copy.graph.node if node.name != "final"]
    (final,) = [node for node in copy.graph.node if node.name == "final"]
    final.input[0] = "moved"
    add = onnx.helper.make_node("Add", ["z", "context"], ["moved"], name="join")
    del copy.graph.node[:]
    copy.graph.node.extend([*nodes, add, final])
    copy.graph.input.insert(0, onnx.helper.make_tensor_value_info("context", onnx.TensorProto.FLOAT, ["N", 1]))
    return copy


def run(source: onnx.ModelProto | bytes | Path, inputs: Mapping[str, Array]) -> Array:
    """Return the first output, in a plain onnxruntime session."""
    if isinstance(source, onnx.ModelProto):
        source = source.SerializeToString()
    session = ort.InferenceSession(source if isinstance(source, bytes) else str(source))
    return session.run(None, dict(inputs))[0]


def write(folder: Path, proto: onnx.ModelProto, spec: Mapping, **files: Dataset) -> Path:
    """Write model.onnx, care.yaml and data files into a folder, and return the path of the spec."""
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    for name, data in files.items():
        np.savez(folder / f"{name}.npz", **data.inputs, **({} if data.labels is None else {"y": data.labels}))
    named = {"data": "data.npz", "holdout": "holdout.npz"} if files else {}
    (folder / "care.yaml").write_text(yaml.safe_dump({**named, **spec}, sort_keys=False))
    return folder / "care.yaml"


def opened(spec: Path, seed: int | None = None, model: str = "model.onnx") -> Case:
    """Return the case that a spec, with the model beside it, makes."""
    return prepare(spec.parent / model, spec, seed, "cpu", "1GiB", lambda text: None).case


def thinned(source: Path, folder: Path, spec: str = "care.yaml", data: int = 1500, holdout: int = 1000) -> Path:
    """Copy a sample model with less of its data, and return the path of the spec."""
    for name in ("model.onnx", spec):
        shutil.copy(source / name, folder / name)
    if (source / "trigger.npz").exists():
        shutil.copy(source / "trigger.npz", folder / "trigger.npz")
    for name, size in (("repair", data), ("holdout", holdout)):
        with np.load(source / f"{name}.npz") as archive:
            np.savez(folder / f"{name}.npz", x=archive["x"][:size], y=archive["y"][:size])
    return folder / spec


def patched(case: Case, values: Values, path: Path) -> Path:
    """Write the file with new values for some parameters."""
    path.write_bytes(Patch(values).apply(case.experiment.model))
    return path


def court(path: Path, clean: Dataset, before: Path | None = None, decision: Decision | None = None) -> Court:
    """Return a court on the first output of a file, and of one that it is compared with."""

    def witness(file: Path) -> Witness:
        loaded = load_model(file)
        return Witness(loaded, loaded.outputs[0].name, decision or Decision(), "cpu", 256)

    return Court(witness(path), None if before is None else witness(before), clean)


def slopes(function, at: Array, step: float = 1e-6) -> Array:
    """Return the gradient of a function of a family of arrays, [P, ...] -> [P], by central differences."""
    found = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        moved = np.stack([at, at])
        moved[(0, *index)] += step
        moved[(1, *index)] -= step
        up, down = function(moved)
        found[index] = (up - down) / (2 * step)
    return found


# -- the plane -----------------------------------------------------------------------------------


def plane(final: str = "", outputs: int = 2, bias: bool = True) -> onnx.ModelProto:
    """Return a ReLU network over [0, 1]^2: y_0 = (x_0 - 1/2)+ + (x_1 - 1/2)+, and y_1 = 1/4.

    So y_0 >= 0.8 holds in a triangle of legs 0.2 at the corner (1, 1).
    """
    first = np.array([[1, 0, 1, 0], [0, 1, 0, 1]], np.float32)
    second = np.array([[1, 0], [1, 0], [0, 0], [0, 0]], np.float32)[:, :outputs]
    held = {"W1": first, "b1": np.array([-0.5, -0.5, 0, 0], np.float32), "W2": second}
    if bias:
        held["b2"] = np.array([0, 0.25], np.float32)[:outputs]
    end = f"[final] y = {final} (z)" if final else "[final] y = Identity (z)"
    text = f"""plane (float[N, 2] x) => (float[N, {outputs}] y) {{
        [first] z1 = Gemm (x, W1, b1)
        [relu] h = Relu (z1)
        [second] z = Gemm (h, W2{", b2" if bias else ""})
        {end}
    }}"""
    return build(text if final else text.replace("[final] y = Identity (z)", "").replace("] z = ", "] y = "), held)


def corner(x: Array) -> Array:
    """Return y_0 of the plane, by hand."""
    return np.maximum(x[:, 0].astype(np.float64) - 0.5, 0) + np.maximum(x[:, 1].astype(np.float64) - 0.5, 0)


def vnnlib(path: Path, *assertions: str, inputs: int = 2, outputs: int = 2, unit: bool = True) -> Path:
    """Write a formula over the unit box, or over what the assertions say."""
    lines = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    lines += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    if unit:
        lines += [f"(assert (>= X_{i} 0.0)) (assert (<= X_{i} 1.0))" for i in range(inputs)]
    path.write_text("\n".join([*lines, *(f"(assert {item})" for item in assertions)]))
    return path


def points(size: int, seed: int, labelled: bool = True) -> Dataset:
    """Return points of the plane, labelled as the plane decides."""
    x = np.random.default_rng(seed).uniform(size=(size, 2)).astype(np.float32)
    return Dataset({"x": x}, (corner(x) <= 0.25).astype(np.int64) if labelled else None)
