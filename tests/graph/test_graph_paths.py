"""Smooth paths through random graphs: one pass backwards finds what a walk from every tensor finds."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from onnxcare.graph.paths import Paths

FLAT = {"Sign", "ArgMax"}


def random_graph(seed: int) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    nodes, names = [], ["x"]
    for index in range(40):
        kind = rng.choice(
            ["Relu", "Add", "Add", "Sign", "ArgMax", "Own", "Shape"], p=[0.3, 0.2, 0.2, 0.1, 0.08, 0.04, 0.08]
        )
        reads = [names[int(i)] for i in rng.integers(max(0, len(names) - 6), len(names), 2 if kind == "Add" else 1)]
        domain = "mine" if kind == "Own" else ""
        nodes.append(helper.make_node(str(kind), reads, [f"t{index}"], name=f"n{index}", domain=domain))
        names.append(f"t{index}")
    whole = {node.output[0] for node in nodes if node.op_type in ("ArgMax", "Shape")}
    info = [
        helper.make_tensor_value_info(name, onnx.TensorProto.INT64 if name in whole else onnx.TensorProto.FLOAT, None)
        for name in names
    ]
    graph = helper.make_graph(nodes, "random", info[:1], info[-3:], value_info=info[1:-3])
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.parametrize("seed", range(30))
def test_both_ways_agree(seed: int) -> None:
    proto = random_graph(seed)
    paths = Paths(proto, FLAT)
    outputs = [info.name for info in proto.graph.output]
    clear = paths.clear(outputs)
    names = ["x", *(node.output[0] for node in proto.graph.node)]
    obstacles = {name: paths.obstacle(name, outputs) for name in names}
    assert {name for name in names if obstacles[name] is None} == clear & set(names)
    labels = {node.name for node in proto.graph.node} | set(outputs)
    for obstacle in filter(None, obstacles.values()):
        assert any(label in obstacle for label in labels), obstacle
