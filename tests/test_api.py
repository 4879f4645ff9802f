"""`fix` from Python on one model written in several ways: each is repaired, and no input file changes."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
from helpers import write_case
from onnx import helper

import onnxcare


def as_exported(model: onnx.ModelProto, folder: Path) -> None:
    """Leave the model as it is."""


def batch_of_one(model: onnx.ModelProto, folder: Path) -> None:
    for info in [*model.graph.input, *model.graph.output]:
        info.type.tensor_type.shape.dim[0].dim_value = 1


def old_format(model: onnx.ModelProto, folder: Path) -> None:
    """IR 3 lists every initializer as an input, too."""
    batch_of_one(model, folder)
    model.ir_version = 3
    model.opset_import[0].version = 8
    for tensor in model.graph.initializer:
        info = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
        model.graph.input.append(info)


def constant_nodes(model: onnx.ModelProto, folder: Path) -> None:
    tensors = list(model.graph.initializer)
    del model.graph.initializer[:]
    for tensor in reversed(tensors):
        model.graph.node.insert(0, helper.make_node("Constant", [], [tensor.name], value=tensor))


def external_data(model: onnx.ModelProto, folder: Path) -> None:
    onnx.external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)


def softmax_inside(model: onnx.ModelProto, folder: Path) -> None:
    model.graph.node[-1].output[0] = "logits"
    model.graph.node.append(helper.make_node("Softmax", ["logits"], ["scores"], axis=-1))


WAYS = [as_exported, batch_of_one, old_format, constant_nodes, external_data, softmax_inside]


@pytest.mark.parametrize("method", ["auto", "care"])
@pytest.mark.parametrize("write", WAYS, ids=lambda write: write.__name__)
def test_every_way_to_write_the_model_is_repaired(tmp_path, write, method):
    case = write_case(tmp_path)
    model = onnx.load(case.model)
    write(model, tmp_path)
    onnx.save(model, case.model)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fix = onnxcare.fix(case.model, case.spec, case.out, method=method, device="cpu")
    (finding,) = fix.verdict.properties
    assert fix.status == "repaired"
    assert finding.excess_before > 0.9
    assert finding.excess <= 0.01
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert {path.name for path in tmp_path.iterdir()} == {*before, case.out.name}
    written = onnx.load(case.out)
    assert [node.op_type for node in written.graph.node] == [node.op_type for node in model.graph.node]
