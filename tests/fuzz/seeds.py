"""A dozen models, each with all that commands may be given beside it, that random damage is done to."""

from __future__ import annotations

import functools
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from graph.models import SUBJECTS, Array, build, random, run_single
from onnx import TensorProto, helper, numpy_helper

from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch, with_metadata
from onnxcare.graph.storage import Source
from onnxcare.graph.working import working_form
from onnxcare.patchfile.make import make_patch

ROWS = 240
SPEC = """\
data: repair.npz
holdout: holdout.npz
properties:
  - name: patch
    kind: backdoor
    trigger: trigger.npz
    target: 1
    max_rate: 0.01
keep: {accuracy_drop: 0.01, recall_drop: 0.05}
seed: 1
"""

Files = dict[str, bytes]


@dataclass(frozen=True)
class Seed:
    """A model, the name and shape of its input, and what lies in a file beside it."""

    proto: onnx.ModelProto
    input: str
    shape: tuple[int, ...]
    dtype: type = np.float32
    outside: bytes = b""
    spec: str = SPEC


def _dense(nodes: str, weights: dict[str, Array], *, kind: str = "float", opset: int = 17) -> Seed:
    dtype = {"float": np.float32, "float16": np.float16}[kind]
    held = {name: values.astype(dtype) if values.dtype == np.float32 else values for name, values in weights.items()}
    proto = build(f"g ({kind}[N, 6] x) => ({kind}[N, 4] y) {{ {nodes} }}", held, opset=opset)
    return Seed(proto, "x", (6,), dtype)


W1, W2, B1, B2 = random(6, 8), random(8, 4, seed=1), random(8, seed=2), random(4, seed=3)
_TWO = "z = Gemm (x, W1, b1) h = Relu (z) y = Gemm (h, W2, b2)"
_HELD = {"W1": W1, "b1": B1, "W2": W2, "b2": B2}


def _constants() -> Seed:
    seed = _dense(_TWO, {})
    for name, values in _HELD.items():
        seed.proto.graph.node.insert(0, helper.make_node("Constant", [], [name], value=numpy_helper.from_array(values)))
    return seed


def _outside() -> Seed:
    seed, held = _dense(_TWO, _HELD), b""
    for tensor in seed.proto.graph.initializer:
        where = {"location": "weights.bin", "offset": str(len(held)), "length": str(len(tensor.raw_data))}
        for key, value in where.items():
            tensor.external_data.add(key=key, value=value)
        held += tensor.raw_data
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
    return Seed(seed.proto, seed.input, seed.shape, outside=held)


def _branch() -> Seed:
    return _dense(
        """z = Gemm (x, W1, b1) h = If (c) <
            then_branch = then () => (float[N, 8] t) { t = Relu (z) },
            else_branch = else () => (float[N, 8] e) { m = MatMul (z, V) e = Tanh (m) }
        > y = Gemm (h, W2, b2)""",
        {**_HELD, "V": random(8, 8), "c": np.bool_(True)},
    )


def _function() -> Seed:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 6] x) => (float[N, 4] y) { h = own.Dense (x, W1, b1) p = MatMul (h, W2) y = Add (p, b2) }
        <domain: "own", opset_import: ["": 17]>
        Dense (v, w, b) => (out) { p = MatMul (v, w) s = Add (p, b) out = Relu (s) }"""
    )
    proto.graph.initializer.extend(numpy_helper.from_array(values, name) for name, values in _HELD.items())
    return Seed(proto, "x", (6,))


def _quantised() -> Seed:
    whole = {
        name: np.clip(np.rint(values * 40), -127, 127).astype(np.int8) for name, values in _HELD.items() if "W" in name
    }
    return _dense(
        """W1 = DequantizeLinear (Q1, s, o) W2 = DequantizeLinear <axis = 1> (Q2, v, w)
        z = Gemm (x, W1, b1) h = Relu (z) y = Gemm (h, W2, b2)""",
        {
            "Q1": whole["W1"], "s": np.float32(0.025), "o": np.int8(0), "Q2": whole["W2"],
            "v": np.full(4, 0.025, np.float32), "w": np.zeros(4, np.int8), "b1": B1, "b2": B2,
        },
    )  # fmt: skip


def _classical() -> Seed:
    proto = build(
        """g (float[N, 6] x) => (int64[N] label, float[N, 4] y) {
            s = ai.onnx.ml.Scaler <offset = [0.0, 0.1, 0.2, 0.0, 0.0, 0.0], scale = [1.0, 1.0, 2.0, 1.0, 1.0, 1.0]> (x)
            label, y = ai.onnx.ml.LinearClassifier <classlabels_ints = [0, 1, 2, 3], post_transform = "SOFTMAX"> (s)
        }"""
    )
    for name, values in (("coefficients", W1[:, :4].T), ("intercepts", B2)):
        proto.graph.node[1].attribute.append(helper.make_attribute(name, values.reshape(-1).tolist()))
    return Seed(proto, "x", (6,))


def _recurrent() -> Seed:
    proto = build(
        """g (float[N, 3, 4] x) => (float[N, 4] y) <int64[1] one = {1}, int64[1] zero = {0}> {
            t = Transpose <perm = [1, 0, 2]> (x)
            a, last, cell = LSTM <hidden_size = 5> (t, W, R, B)
            h = Squeeze (last, zero)
            y = Gemm (h, V, b2)
        }""",
        {"W": random(1, 20, 4), "R": random(1, 20, 5), "B": random(1, 40), "V": random(5, 4), "b2": B2},
    )
    return Seed(proto, "x", (3, 4))


def _of_subject(name: str) -> Callable[[], Seed]:
    def make() -> Seed:
        subject = SUBJECTS[name]()
        return Seed(subject.proto, subject.input, subject.shape, subject.dtype)

    return make


MAKERS: dict[str, Callable[[], Seed]] = {
    **{name: _of_subject(name) for name in SUBJECTS},
    "dense": lambda: _dense(_TWO, _HELD),
    "half": lambda: _dense(_TWO, _HELD, kind="float16"),
    "constants": _constants,
    "outside": _outside,
    "branch": _branch,
    "function": _function,
    "quantised": _quantised,
    "classical": _classical,
    "recurrent": _recurrent,
}


@functools.cache
def files(name: str) -> Files:
    """Return the files of a seed, by their names."""
    seed = MAKERS[name]()
    output = "y" if any(info.name == "y" for info in seed.proto.graph.output) else seed.proto.graph.output[0].name
    found = {"model.onnx": seed.proto.SerializeToString(), "care.yaml": seed.spec.encode()}
    for number, file in enumerate(("repair.npz", "holdout.npz")):
        x = random(ROWS, *seed.shape, seed=number, dtype=seed.dtype)
        if seed.outside:
            answers = np.maximum(x @ W1 + B1, 0) @ W2 + B2
        else:
            (answers,) = run_single(seed.proto, {seed.input: x}, output)
        # Some labels are wrong, so that there are errors to repair.
        found[file] = _npz(**{seed.input: x}, y=np.where(np.arange(ROWS) % 9, answers.argmax(axis=-1), 1))
    mask = np.zeros(seed.shape, seed.dtype)
    mask.flat[0] = 1
    found["trigger.npz"] = _npz(mask=mask, pattern=3 * mask)
    found |= {"weights.bin": seed.outside} if seed.outside else {}
    return found | dict(zip(("other.onnx", "change.safetensors"), _another(found), strict=True))


def _another(held: Files) -> tuple[bytes, bytes]:
    """Return the model with one number changed and a note of it, and the patch file that makes it of the model."""
    with tempfile.TemporaryDirectory() as folder:
        for name, data in held.items():
            (Path(folder) / name).write_bytes(data)
        model = load_model(Path(folder) / "model.onnx")
        parameter = next(item for item in working_form(model).parameters.values() if item.storage.refusal is None)
        values = parameter.storage.read(Source(model.proto, model.path.parent)).copy()
        values.flat[-1] = 0
        other = with_metadata(Patch({parameter: values}).apply(model), {"version": "1", "method": "by hand"})
        return other, make_patch(model, other).to_bytes()


def _npz(**arrays: Array) -> bytes:
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()
