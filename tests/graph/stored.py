"""The same product y = x W + b with W held in many ways, and what each of them makes of new values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
from graph.models import Array, build, random
from onnx import helper, numpy_helper

W, B = random(6, 4), random(4, seed=1)
SCALE = np.float32(0.02)
SCALES = np.array([0.02, 0.01, 0.03, 0.025], np.float32)
ZEROS = np.array([120, 128, 131, 100], np.uint8)
# onnxruntime rounds what such weights are multiplied with.
ROUNDED = 1e-2
FLOAT = "g (float[N, 6] x) => (float[N, 4] y)"


def symmetric(values: Array, scale: Array | np.float32) -> Array:
    """Round to int8 without a zero point, -128 left out."""
    return np.clip(np.rint(values / scale), -127, 127).astype(np.int8)


def shifted(values: Array) -> Array:
    """Round to uint8 with a zero point for each column."""
    return np.clip(np.rint(values / SCALES) + ZEROS, 0, 255).astype(np.uint8)


def bfloat16(values: Array) -> Array:
    return values.astype(ml_dtypes.bfloat16)


@dataclass(frozen=True)
class Stored:
    """A way to hold W.

    Attributes:
        proto: the model.
        tensor: the tensor of the file that holds the weights.
        write: what the file holds of new values.
        read: what that amounts to, [6, 4].
        tolerance: how far answers may be from x W + b, relative to the largest.
    """

    proto: onnx.ModelProto
    tensor: str
    write: Callable[[Array], Array]
    read: Callable[[Array], Array]
    tolerance: float = 1e-5


def _exactly(values: Array) -> Array:
    return values


def _float32(values: Array) -> Array:
    return values.astype(np.float32)


def _build(text: str, weights: Mapping[str, Array], opset: int = 19) -> onnx.ModelProto:
    return build(text, weights, opset=opset, ir_version=9)


def half() -> Stored:
    weights = {"W": W.astype(np.float16), "b": B.astype(np.float16)}
    proto = _build("g (float16[N, 6] x) => (float16[N, 4] y) { [fc] y = Gemm (x, W, b) }", weights)
    return Stored(proto, "W", lambda v: v.astype(np.float16), _float32, 5e-3)


def half_inside() -> Stored:
    text = f"{FLOAT} {{ h = Cast <to = 10> (x) z = MatMul (h, W) c = Add (z, b) y = Cast <to = 1> (c) }}"
    weights = {"W": W.astype(np.float16), "b": B.astype(np.float16)}
    return Stored(_build(text, weights), "W", lambda v: v.astype(np.float16), _float32, 5e-3)


def half_cast() -> Stored:
    proto = _build(f"{FLOAT} {{ w = Cast <to = 1> (W) y = Gemm (x, w, b) }}", {"W": W.astype(np.float16), "b": B})
    return Stored(proto, "W", lambda v: v.astype(np.float16), _float32)


def bfloat16_cast() -> Stored:
    proto = _build(f"{FLOAT} {{ w = Cast <to = 1> (W) y = Gemm (x, w, b) }}", {"W": bfloat16(W), "b": B})
    return Stored(proto, "W", bfloat16, _float32)


def double_cast() -> Stored:
    proto = _build(f"{FLOAT} {{ w = Cast <to = 1> (W) y = Gemm (x, w, b) }}", {"W": W.astype(np.float64), "b": B})
    return Stored(proto, "W", lambda v: v.astype(np.float64), _float32)


def per_tensor() -> Stored:
    weights = {"W": symmetric(W, SCALE), "s": SCALE, "b": B}
    proto = _build(f"{FLOAT} {{ w = DequantizeLinear (W, s) y = Gemm (x, w, b) }}", weights)
    return Stored(proto, "W", lambda v: symmetric(v, SCALE), lambda q: q * SCALE, ROUNDED)


def per_channel() -> Stored:
    weights = {"W": shifted(W), "s": SCALES, "z": ZEROS, "b": B}
    proto = _build(f"{FLOAT} {{ w = DequantizeLinear <axis = 1> (W, s, z) y = Gemm (x, w, b) }}", weights)
    return Stored(proto, "W", shifted, lambda q: (q.astype(np.float32) - ZEROS) * SCALES, ROUNDED)


def per_channel_transposed() -> Stored:
    weights = {"W": symmetric(W, SCALES).T.copy(), "s": SCALES, "b": B}
    text = f"{FLOAT} {{ w = DequantizeLinear <axis = 0> (W, s) y = Gemm <transB = 1> (x, w, b) }}"
    return Stored(
        _build(text, weights), "W", lambda v: symmetric(v, SCALES).T, lambda q: q.T.astype(np.float32) * SCALES
    )


def in_blocks() -> Stored:
    scales = np.abs(random(3, 4, seed=5)) / 40 + np.float32(0.01)
    spread = np.repeat(scales, 2, axis=0)
    weights = {"W": symmetric(W, spread), "s": scales, "b": B}
    text = f"{FLOAT} {{ w = DequantizeLinear <axis = 0, block_size = 2> (W, s) y = Gemm (x, w, b) }}"
    return Stored(_build(text, weights, 21), "W", lambda v: symmetric(v, spread), lambda q: q * spread)


def cast_and_scaled() -> Stored:
    weights = {"W": symmetric(W, SCALES), "s": SCALES, "b": B}
    text = f"{FLOAT} {{ f = Cast <to = 1> (W) w = Mul (f, s) y = Gemm (x, w, b) }}"
    return Stored(_build(text, weights), "W", lambda v: symmetric(v, SCALES), lambda q: q * SCALES)


def cast_shifted_and_scaled() -> Stored:
    weights = {"W": shifted(W), "s": SCALES, "z": ZEROS, "b": B}
    text = f"""{FLOAT} {{
        f = Cast <to = 1> (W) g = Cast <to = 1> (z) d = Sub (f, g) w = Mul (s, d) y = Gemm (x, w, b) }}"""
    return Stored(_build(text, weights), "W", shifted, lambda q: (q.astype(np.float32) - ZEROS) * SCALES)


def dynamic() -> Stored:
    weights = {"W": symmetric(W, SCALES), "s": SCALES, "z": np.zeros(4, np.int8), "b": B}
    text = f"""{FLOAT} {{
        q, xs, xz = DynamicQuantizeLinear (x)
        i = MatMulInteger (q, W, xz, z)
        f = Cast <to = 1> (i) s2 = Mul (xs, s) p = Mul (f, s2) y = Add (p, b) }}"""
    return Stored(_build(text, weights), "W", lambda v: symmetric(v, SCALES), lambda q: q * SCALES, 5e-2)


def integer_product() -> Stored:
    one = np.float32(0.05)
    weights = {
        "W": symmetric(W, SCALES), "s": SCALES, "z": np.zeros(4, np.int8), "xs": one, "xz": np.uint8(128),
        "ys": one, "yz": np.uint8(128), "b": B,
    }  # fmt: skip
    text = f"""{FLOAT} {{
        q = QuantizeLinear (x, xs, xz)
        p = QLinearMatMul (q, xs, xz, W, s, z, ys, yz)
        f = DequantizeLinear (p, ys, yz) y = Add (f, b) }}"""
    return Stored(_build(text, weights), "W", lambda v: symmetric(v, SCALES), lambda q: q * SCALES, 1e-1)


def sparse() -> Stored:
    kept = np.abs(W) > 0.5
    proto = _build(f"{FLOAT} {{ y = Gemm (x, W, b) }}", {"b": B})
    values = numpy_helper.from_array(W[kept], "W")
    indices = numpy_helper.from_array(np.flatnonzero(kept).astype(np.int64), "W_indices")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [6, 4]))

    def whole(values: Array) -> Array:
        full = np.zeros((6, 4), np.float32)
        full[kept] = values
        return full

    return Stored(proto, "W", lambda v: v[kept].astype(np.float32), whole)


def linear_regressor() -> Stored:
    proto = _build(f"{FLOAT} {{ [fit] y = ai.onnx.ml.LinearRegressor (x) }}", {})
    proto.graph.node[0].attribute.extend(
        [
            helper.make_attribute("coefficients", W.T.reshape(-1).tolist()),
            helper.make_attribute("intercepts", B.tolist()),
            helper.make_attribute("targets", 4),
        ]
    )
    return Stored(proto, "y.coefficients", lambda v: v.T.astype(np.float32), lambda q: q.T)


def in_function() -> Stored:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 9, opset_import: ["": 19, "own": 1]>
        {FLOAT} {{ y = own.Affine (x, b) }}
        <domain: "own", opset_import: ["": 19]>
        Affine (x, b) => (y) {{ W = Constant () [fc] y = Gemm (x, W, b) }}"""
    )
    proto.functions[0].node[0].attribute.append(helper.make_attribute("value", numpy_helper.from_array(W, "W")))
    proto.graph.initializer.append(numpy_helper.from_array(B, "b"))
    return Stored(proto, "Affine/W", _float32, _exactly)


STORED: dict[str, Callable[[], Stored]] = {
    make.__name__: make
    for make in (
        half, half_inside, half_cast, bfloat16_cast, double_cast, per_tensor, per_channel, per_channel_transposed,
        in_blocks, cast_and_scaled, cast_shifted_and_scaled, dynamic, integer_product, sparse, linear_regressor,
        in_function,
    )
}  # fmt: skip
