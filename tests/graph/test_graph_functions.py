"""How many nodes functions stand for, against onnx's own inliner, and models that would stand for too many."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import onnx
import onnx.inliner
import pytest
from graph.models import build
from onnx import helper

from onnxcare.errors import ModelError
from onnxcare.graph.functions import inlined_size
from onnxcare.graph.model import load_model


def doubling(levels: int) -> onnx.ModelProto:
    """A chain of functions each of which calls the next one twice, the last one an operator."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 6] x) => (float[N, 6] y) { y = own.F0 (x) }"""
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("own", 1)]
    for level in range(levels):
        op, domain = (f"F{level + 1}", "own") if level < levels - 1 else ("Relu", "")
        nodes = [helper.make_node(op, [a], [b], domain=domain) for a, b in (("v", "a"), ("a", "o"))]
        proto.functions.append(helper.make_function("own", f"F{level}", ["v"], ["o"], nodes, imports))
    return proto


@pytest.mark.parametrize("levels", [1, 2, 5, 8])
def test_functions_count_as_what_the_inliner_makes_of_them(levels: int) -> None:
    proto = doubling(levels)
    assert inlined_size(proto, 1000) == len(onnx.inliner.inline_local_functions(proto).graph.node) == 2**levels


def test_calls_inside_branches_count_as_well() -> None:
    proto = doubling(3)
    calling = helper.make_graph([helper.make_node("F1", ["x"], ["t"], domain="own")], "then", [], [])
    other = helper.make_graph([helper.make_node("Neg", ["x"], ["e"])], "else", [], [])
    proto.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=calling, else_branch=other))
    assert inlined_size(proto, 1000) == 8 + 1 + 4 + 1


def test_an_operator_that_is_no_function_counts_once() -> None:
    proto = build("g (float[N] x) => (float[N] y) { a = Relu (x) b = com.acme.F (a) y = Relu (b) }")
    assert inlined_size(proto, 1000) == 3


def test_functions_that_call_themselves_are_left_to_the_runtime(tmp_path: Path) -> None:
    proto = doubling(3)
    last = proto.functions[2].node[0]
    last.op_type, last.domain = "F1", "own"
    assert inlined_size(proto, 1000) < 1000
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="recursive"):
        load_model(path)


@pytest.mark.parametrize("levels", [30, 1000])
def test_functions_that_stand_for_too_many_nodes_are_refused_at_once(levels: int, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(doubling(levels).SerializeToString())
    started = time.monotonic()
    with pytest.raises(ModelError, match=r"model\.onnx: its functions call each other so often"):
        load_model(path)
    assert time.monotonic() - started < 5


def test_many_functions_are_no_hindrance(tmp_path: Path) -> None:
    proto = doubling(1)
    for number in range(200):
        function = proto.functions.add()
        function.CopyFrom(proto.functions[0])
        function.name = f"G{number}"
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    assert load_model(path).inputs[0].dtype == np.float32
