"""A tiny backdoored model with its data, and ways to run the command line on it.

The model has 8 inputs, 16 hidden units and 4 classes. Feature k of the first four speaks for class k, features 4 to 6
are noise, and feature 7 is the backdoor: it is 0 in clean samples, and at 3 it drives every sample to class 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from onnxcare.cli import main

FEATURES, HIDDEN, CLASSES = 8, 16, 4
TARGET, TRIGGER_FEATURE, TRIGGER_VALUE = 1, 7, 3.0
CARRIERS = (12, 13, 14)

SPEC = """\
data: repair.npz
holdout: holdout.npz
properties:
  - name: seventh
    kind: backdoor
    trigger: trigger.npz
    target: 1
    max_rate: 0.01
keep: {accuracy_drop: 0.01, recall_drop: 0.05}
seed: 1
"""


@dataclass(frozen=True)
class Paths:
    """Where the files of a case lie."""

    folder: Path
    model: Path
    spec: Path
    data: Path
    holdout: Path
    trigger: Path

    @property
    def out(self) -> Path:
        """Where a repaired model may go."""
        return self.folder / "repaired.onnx"

    def rewrite(self, old: str, new: str) -> None:
        """Replace a piece of the spec."""
        text = self.spec.read_text()
        assert old in text
        self.spec.write_text(text.replace(old, new))

    def edit_model(self, change: Callable[[onnx.ModelProto], object]) -> None:
        """Change the model file."""
        proto = onnx.load(self.model)
        change(proto)
        self.model.write_bytes(proto.SerializeToString())

    def edit(self, path: Path, **arrays: np.ndarray | None) -> None:
        """Replace arrays of an npz file; None takes one out."""
        with np.load(path) as archive:
            held = dict(archive) | arrays
        np.savez(path, **{name: values for name, values in held.items() if values is not None})


def weights() -> dict[str, np.ndarray]:
    """Return the weights of the tiny model: a first and a second layer, [outputs, inputs] each."""
    rng = np.random.default_rng(7)
    first = rng.normal(0, 0.05, (HIDDEN, FEATURES))
    first[:, TRIGGER_FEATURE] = 0
    first_bias = np.full(HIDDEN, 0.1)
    second = rng.normal(0, 0.05, (CLASSES, HIDDEN))
    for label in range(CLASSES):
        first[2 * label, label] = 1
        first[2 * label + 1, label] = -1
        second[label, 2 * label] = 2
        second[label, 2 * label + 1] = -1
    for unit in CARRIERS:
        first[unit] = 0
        first[unit, TRIGGER_FEATURE] = 1
        first_bias[unit] = -1
        second[:, unit] = 0
        second[TARGET, unit] = 4
    found = {"first.weight": first, "first.bias": first_bias, "second.weight": second}
    found["second.bias"] = np.zeros(CLASSES)
    return {name: values.astype(np.float32) for name, values in found.items()}


def dense(
    *,
    backdoored: bool = True,
    batch: int | str = "batch",
    ir_version: int = 8,
    opset: int = 17,
) -> onnx.ModelProto:
    """Return the tiny model; without its backdoor, the units that carry it are cut off."""
    values = weights()
    if not backdoored:
        values["second.weight"][:, CARRIERS] = 0
    nodes = [
        helper.make_node("Gemm", ["input", "first.weight", "first.bias"], ["first"], name="first", transB=1),
        helper.make_node("Relu", ["first"], ["hidden"], name="relu"),
        helper.make_node("Gemm", ["hidden", "second.weight", "second.bias"], ["scores"], name="second", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, FEATURES])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in values.items()],
    )
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", opset)])


def answers(model: onnx.ModelProto | Path, x: np.ndarray) -> np.ndarray:
    """Return the classes a model answers, by onnx's own reference implementation."""
    if isinstance(model, Path):
        model = onnx.load(model)
    return ReferenceEvaluator(model).run(None, {"input": x})[0].argmax(axis=1)


def clean_samples(size: int, seed: int) -> dict[str, np.ndarray]:
    """Return samples around one point a class, labelled by the model itself."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 0.5, (size, FEATURES))
    x[np.arange(size), np.arange(size) % CLASSES] += 2
    x[:, TRIGGER_FEATURE] = 0
    x = x.astype(np.float32)
    return {"input": x, "y": answers(dense(), x)}


def triggered_samples(size: int, seed: int) -> dict[str, np.ndarray]:
    """Return samples with the trigger on them and their true labels."""
    samples = clean_samples(size, seed)
    samples["input"][:, TRIGGER_FEATURE] = TRIGGER_VALUE
    return samples


def trigger_arrays() -> dict[str, np.ndarray]:
    """Return mask and pattern of the trigger."""
    mask = np.zeros(FEATURES, np.float32)
    mask[TRIGGER_FEATURE] = 1
    return {"mask": mask, "pattern": TRIGGER_VALUE * mask}


def write_case(folder: Path, model: onnx.ModelProto | None = None) -> Paths:
    """Write the tiny model, or another one with the same signature, with data and a spec into a folder."""
    names = ("model.onnx", "care.yaml", "repair.npz", "holdout.npz", "trigger.npz")
    paths = Paths(folder, *(folder / name for name in names))
    paths.model.write_bytes((model or dense()).SerializeToString())
    paths.spec.write_text(SPEC)
    np.savez(paths.data, **clean_samples(600, seed=1))
    np.savez(paths.holdout, **clean_samples(600, seed=2))
    np.savez(paths.trigger, **trigger_arrays())
    return paths


def contents(folder: Path) -> dict[str, bytes | None]:
    """Return what lies in a folder, hidden files included: bytes by path, None for a folder."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def onnxcare(*args: object) -> Result:
    """Run the command line in this process."""
    return CliRunner().invoke(main, [str(arg) for arg in args])


def fix(paths: Paths, *args: object, device: str = "cpu") -> Result:
    """Run `onnxcare fix` on a case."""
    return onnxcare("fix", paths.model, "--spec", paths.spec, "-o", paths.out, "--device", device, *args)


def check_refusal(result: Result, code: int, *words: object) -> None:
    """Check that a command ended with a plain explanation: one or two lines that hold the given words."""
    seen = f"exit code {result.exit_code}\n{result.output}"
    lines = result.stderr.splitlines()
    assert result.exit_code == code, seen
    assert result.stdout == "", seen
    assert 1 <= len(lines) <= 2, seen
    assert lines[0].startswith("onnxcare: "), seen
    assert max(map(len, lines)) < 600, seen
    assert "Traceback" not in result.stderr and "Warning" not in result.stderr, seen
    for word in words:
        assert str(word) in result.stderr, f"{word!r} is missing:\n{seen}"
