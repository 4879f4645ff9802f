"""Copies without large weights: the same shapes follow, and nothing of the original is touched or held twice."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import build, random
from onnx import helper, numpy_helper

from onnxcare.graph.light import inferred


def large() -> onnx.ModelProto:
    return build(
        """large (float[N, 80] x) => (float[N, 10] y) {
            [first] h = MatMul (x, W)
            [shape] s = Reshape (h, target)
            [second] y = MatMul (s, V)
        }""",
        {"W": random(80, 90), "V": random(90, 10), "target": np.array([0, 90])},
    )


def shapes(proto: onnx.ModelProto) -> dict[str, list[int | str]]:
    return {
        info.name: [dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim]
        for info in proto.graph.value_info
    }


def test_shapes_follow_without_the_values_of_weights() -> None:
    proto = large()
    before = proto.SerializeToString()
    found = inferred(proto)
    assert (
        shapes(found)
        == shapes(onnx.shape_inference.infer_shapes(proto, data_prop=True))
        == {"h": ["N", 90], "s": ["N", 90]}
    )
    assert {tensor.name for tensor in found.graph.initializer} == {"V", "target"}
    assert found.ByteSize() < proto.ByteSize() / 5
    assert proto.SerializeToString() == before


def test_external_weights_are_left_where_they_are(tmp_path: Path) -> None:
    onnx.save(large(), tmp_path / "model.onnx", save_as_external_data=True, location="gone.bin", size_threshold=100)
    (tmp_path / "gone.bin").unlink()
    found = inferred(onnx.load(tmp_path / "model.onnx", load_external_data=False))
    assert shapes(found) == {"h": ["N", 90], "s": ["N", 90]}
    assert [tensor.name for tensor in found.graph.initializer] == ["target"]


@pytest.mark.parametrize("listed", [False, True])
def test_initializers_that_are_inputs_already_are_no_second_ones(listed: bool) -> None:
    proto = large()
    if listed:
        proto.ir_version = 3
        for tensor in proto.graph.initializer:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    names = [info.name for info in inferred(proto).graph.input]
    assert len(names) == len(set(names)) and {"x", "W"} <= set(names)


def test_what_cannot_be_inferred_stays_as_it_is_declared() -> None:
    proto = large()
    # Two declarations of one tensor that cannot both be true.
    proto.graph.value_info.append(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 7, 7]))
    proto.graph.initializer.append(numpy_helper.from_array(random(2, 2, 2), "bad"))
    assert "h" in shapes(inferred(proto))
