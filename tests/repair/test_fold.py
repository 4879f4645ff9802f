"""Folding multipliers where a layer reads its inputs at several places."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxcare.errors import ModelError
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch
from onnxcare.graph.storage import Source
from onnxcare.repair import care


def case_of(text: str, weights: dict[str, np.ndarray], x: np.ndarray, path: Path) -> SimpleNamespace:
    """Return as much of a case as folding needs."""
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> {text}')
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(values.astype(np.float32), name))
    path.write_bytes(proto.SerializeToString())
    model = load_model(path)
    return SimpleNamespace(
        experiment=Experiment(model, "cpu", 1 << 28, {"x": x}),
        read=lambda parameter: parameter.storage.read(Source(model.proto, model.path.parent)),
    )


def test_a_product_over_tokens_takes_one_factor_a_feature(tmp_path):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(5, 3, 4)).astype(np.float32)
    weights = {"W": rng.normal(size=(4, 6)), "V": rng.normal(size=(6, 2))}
    text = """g (float[N, 3, 4] x) => (float[N, 2] y) {
        a = MatMul (x, W)
        h = Relu (a)
        b = MatMul (h, V)
        y = ReduceMean <axes = [1], keepdims = 0> (b)
    }"""
    case = case_of(text, weights, x, tmp_path / "model.onnx")
    (site,) = case.experiment.sites
    factors = np.array([1, -2, 0.5, 0, 3, -1])
    patched = Patch(care.fold(case, site, factors)).apply(case.experiment.model)
    hidden = np.maximum(x @ weights["W"], 0) * factors
    expected = (hidden @ weights["V"]).mean(axis=1)
    np.testing.assert_allclose(ort.InferenceSession(patched).run(None, {"x": x})[0], expected, rtol=1e-4, atol=1e-5)


def test_units_that_are_mixed_on_the_way_are_refused(tmp_path):
    rng = np.random.default_rng(2)
    x = rng.normal(size=(5, 6)).astype(np.float32)
    weights = {"W": rng.normal(size=(6, 6)), "V": rng.normal(size=(3, 2)), "shape": np.array([0, 2, 3])}
    text = """g (float[N, 6] x) => (float[N, 2] y) <int64[3] target = {0, 2, 3}> {
        a = MatMul (x, W)
        h = Relu (a)
        r = Reshape (h, target)
        b = MatMul (r, V)
        y = ReduceMean <axes = [1], keepdims = 0> (b)
    }"""
    weights.pop("shape")
    case = case_of(text, weights, x, tmp_path / "model.onnx")
    (site,) = case.experiment.sites
    assert site.units == 6
    with pytest.raises(ModelError, match="mix units of 'h'"):
        care.fold(case, site, np.ones(6))
