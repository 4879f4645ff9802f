"""Derivatives through rounded activations: those of clipping, at the values that rounding leaves."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph.models import Array, build, random, run

from onnxcare.graph.gradients import Gradients
from onnxcare.graph.straight_through import pass_through_rounding

W = random(6, 3)
SCALE = np.float32(0.05)
X = random(64, 6, seed=3) * np.float32(3)


def rounding(zero: Array | None) -> onnx.ModelProto:
    operands = "(x, s)" if zero is None else "(x, s, z)"
    weights = {"W": W, "s": SCALE} | ({} if zero is None else {"z": zero})
    return build(
        f"""g (float[N, 6] x) => (float[N, 3] y) {{
            q = QuantizeLinear {operands} h = DequantizeLinear {operands.replace("x", "q")}
            t = Tanh (h) y = MatMul (t, W) }}""",
        weights,
        ir_version=10,
        opset=21,
    )


def least_and_greatest(zero: Array | None) -> tuple[float, float]:
    kind = np.uint8 if zero is None else zero.dtype
    offset = 0 if zero is None else int(zero)
    return (np.iinfo(kind).min - offset) * float(SCALE), (np.iinfo(kind).max - offset) * float(SCALE)


@pytest.mark.parametrize("zero", [None, np.uint8(128), np.int8(-20), np.int16(5)])
def test_the_derivative_is_that_of_clipping_at_the_rounded_value(zero: Array | None) -> None:
    proto = rounding(zero)
    seed = random(64, 3, seed=4)
    values, found = Gradients(proto, ["x"], "y", {"x": (6,)}, "cpu", 16, "the model")({"x": X}, seed)
    np.testing.assert_allclose(values, run(proto, {"x": X})[0], atol=1e-3)
    least, greatest = least_and_greatest(zero)
    h = np.rint(np.clip(X, least, greatest) / SCALE) * SCALE
    inside = (least < X) & (greatest > X)
    np.testing.assert_allclose(found["x"], (seed @ W.T) * (1 - np.tanh(h) ** 2) * inside, atol=2e-3)
    assert zero is None or inside.any()


def test_values_stay_what_they_are() -> None:
    proto = rounding(np.uint8(128))
    before = run(proto, {"x": X})[0]
    pass_through_rounding(proto)
    np.testing.assert_allclose(run(proto, {"x": X})[0], before, atol=1e-3)


@pytest.mark.parametrize("scale", [np.float32([0.05, 0.1, 0.2, 0.05, 0.05, 0.05]), None])
def test_what_varies_is_left_alone(scale: Array | None) -> None:
    if scale is None:  # it comes with the samples
        text = "g (float[N, 6] x, float s) => (float[N, 6] y) { q = QuantizeLinear (x, s) y = DequantizeLinear (q, s) }"
    else:
        text = "g (float[N, 6] x) => (float[N, 6] y) { q = QuantizeLinear (x, s) y = DequantizeLinear (q, s) }"
    proto = build(text, {} if scale is None else {"s": scale}, opset=19)
    before = proto.SerializeToString()
    pass_through_rounding(proto)
    assert proto.SerializeToString() == before
