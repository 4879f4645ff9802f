"""A model of more than 2 GB, which no protobuf message can hold: its weights stay in the file beside it."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph.models import exposing, with_tensor_fed
from onnx import TensorProto, helper

import onnxcare
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch

WIDTH, LAYERS = 8192, 8
SIDECAR = "weights.bin"


def write(folder: Path) -> Path:
    """Write x [N, 8] -> nine products with Relu between -> y [N, 4], all weights in a sidecar."""
    rng = np.random.default_rng(0)
    sizes = [8, *[WIDTH] * (LAYERS + 1), 4]
    nodes, weights, offset = [], [], 0
    with (folder / SIDECAR).open("wb") as sidecar:
        for index, (inputs, outputs) in enumerate(pairwise(sizes)):
            values = rng.standard_normal((inputs, outputs), dtype=np.float32) * np.float32(np.sqrt(2 / inputs))
            sidecar.write(values.tobytes())
            tensor = TensorProto(name=f"W{index}", dims=values.shape, data_type=TensorProto.FLOAT)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in {"location": SIDECAR, "offset": offset, "length": values.nbytes}.items():
                tensor.external_data.add(key=key, value=str(value))
            weights.append(tensor)
            offset += values.nbytes
            x, y = f"h{index - 1}" if index else "x", f"z{index}" if outputs == WIDTH else "y"
            nodes.append(helper.make_node("MatMul", [x, f"W{index}"], [y], name=f"fc{index}"))
            if outputs == WIDTH:
                nodes.append(helper.make_node("Relu", [y], [f"h{index}"], name=f"relu{index}"))
    assert offset > 1 << 31
    graph = helper.make_graph(
        nodes,
        "large",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        weights,
    )
    path = folder / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def plain(proto: onnx.ModelProto, folder: Path) -> ort.InferenceSession:
    path = folder / "plain.onnx"
    path.write_bytes(proto.SerializeToString())
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.slow
def test_it_is_inspected_intervened_on_and_patched(tmp_path: Path) -> None:
    path = write(tmp_path)
    before = hashlib.sha256((tmp_path / SIDECAR).read_bytes()).hexdigest()
    shown = onnxcare.inspect(path)
    assert shown.parameters == 8 * WIDTH + LAYERS * WIDTH**2 + WIDTH * 4
    assert [layer.refusal for layer in shown.layers] == [None] * (LAYERS + 2)
    model = load_model(path)
    x = {"x": np.random.default_rng(1).standard_normal((4, 8)).astype(np.float32)}
    experiment = Experiment(model, "cpu", 1 << 30, x)
    h, expected = plain(exposing(model.proto, "h7", "y"), tmp_path).run(None, x)
    np.testing.assert_allclose(experiment.scores(x), expected, rtol=1e-5, atol=1e-5)

    suffix = experiment.suffix("h7", "affine")
    keep = np.ones((1, 1, WIDTH))
    keep[..., 5] = 0
    found = suffix.affine(suffix.cache(x), keep, np.full((1, 1, 1), 2.5))[0]
    h[:, 5] = 2.5
    by_hand = plain(exposing(with_tensor_fed(model.proto, "h7"), "y"), tmp_path).run(None, x | {"h7": h})[0]
    np.testing.assert_allclose(found, by_hand, rtol=1e-5, atol=1e-5)

    layer = experiment.layers[4]
    new = experiment.read(layer.weight).copy()
    old, new[3, 7] = new[3, 7], 0.5
    out = tmp_path / "patched.onnx"
    out.write_bytes(Patch({layer.weight: new}).apply(model))
    patched = load_model(out)
    (tensor,) = (item for item in patched.proto.graph.initializer if item.name == layer.weight.name)
    values = np.frombuffer(tensor.raw_data, np.float32).reshape(WIDTH, WIDTH)
    held = np.memmap(tmp_path / SIDECAR, np.float32, "r", (8 + 3 * WIDTH) * WIDTH * 4, (WIDTH, WIDTH))
    assert np.argwhere(values != held).tolist() == [[3, 7]]
    assert (values[3, 7], held[3, 7]) == (0.5, old)
    tensor.CopyFrom(next(item for item in model.proto.graph.initializer if item.name == layer.weight.name))
    assert patched.proto == model.proto
    assert hashlib.sha256((tmp_path / SIDECAR).read_bytes()).hexdigest() == before
