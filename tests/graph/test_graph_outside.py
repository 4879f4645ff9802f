"""What holds weights and is no layer is told, with the reason; what holds none is not."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from models import build, layers_of, random
from onnx import helper

from onnxcare.graph.outside import Outside, find_outside, why_none
from onnxcare.graph.view import GraphView

SHAPES = {"on the left": (2, 3), "three axes": (5, 3, 2), "other operators": (3, 2, 1), "no weights": (3, 3)}
CASES = {
    "computed": (
        """g (float[N, 3] x) => (float[N, 2] y) <int64[2] shape = {3, 2}> {
            [ones] w = ConstantOfShape (shape)
            [scaled] v = Mul (w, w)
            [product] y = MatMul (x, v)
        }""",
        [Outside("product", "MatMul", "its weight 'v' is computed by Mul scaled")],
    ),
    "computed kernel": (
        """g (float[N, 1, 4, 4] x) => (float[N, 1, 4, 4] y) <int64[4] shape = {1, 1, 1, 1}> {
            [ones] w = ConstantOfShape (shape)
            [scaled] v = Mul (w, w)
            [conv] y = Conv (x, v)
        }""",
        [Outside("conv", "Conv", "its weight 'v' is computed by Mul scaled")],
    ),
    "on the left": (
        "g (float[3, N] x) => (float[2, N] y) { [product] y = MatMul (W, x) }",
        [Outside("product", "MatMul", "its weight 'W' stands on the left of the product")],
    ),
    "three axes": (
        "g (float[5, N, 3] x) => (float[5, N, 2] y) { [product] y = MatMul (x, W) }",
        [Outside("product", "MatMul", "its weight 'W' has 3 axes")],
    ),
    "other operators": (
        "g (float[N, 3, 4] x) => (float[N, 2, 4] y) { [up] y = ConvTranspose (x, W) }",
        [Outside("up", "ConvTranspose", "weights of ConvTranspose cannot be rewritten")],
    ),
    "no weights": (
        """g (float[N, 3] x) => (float[N, N] y) {
            [constant] c = MatMul (W, W)
            [turned] t = Transpose (x)
            [attention] y = MatMul (x, t)
        }""",
        [],
    ),
    "a layer": ("g (float[N, 3] x) => (float[N, 2] y) { [product] y = MatMul (x, W) }", []),
}


def outside(proto: onnx.ModelProto) -> list[Outside]:
    return find_outside(GraphView(proto), layers_of(proto))


def case(name: str) -> onnx.ModelProto:
    return build(CASES[name][0], {"W": random(*SHAPES.get(name, (3, 2)))})


@pytest.mark.parametrize("name", CASES)
def test_what_lies_outside(name: str) -> None:
    assert outside(case(name)) == CASES[name][1]


def branches() -> onnx.ModelProto:
    """A choice between a product with its own weights and one with captured ones; the latter inside another choice."""
    deeper = build("g () => (float[N, 2] d) { [captured] d = MatMul (x, W) }").graph
    plain = build("g () => (float[N, 2] p) { [squared] p = Mul (z, z) }").graph
    own = build(
        "g () => (float[N, 2] a) { [own] a = MatMul (x, V) [attention] b = MatMul (a, a) }", {"V": random(3, 2)}
    )
    inner = helper.make_node("If", ["also"], ["b"], name="inner", then_branch=deeper, else_branch=plain)
    other = build("g () => (float[N, 2] b) { q = Identity (z) }").graph
    other.node.append(inner)
    proto = build(
        "g (float[N, 3] x, float[N, 2] z, bool which, bool also) => (float[N, 2] y) { y = Identity (z) }",
        {"W": random(3, 2)},
    )
    choice = helper.make_node("If", ["which"], ["y"], name="outer", then_branch=own.graph, else_branch=other)
    proto.graph.node[0].CopyFrom(choice)
    return proto


def test_inside_branches() -> None:
    assert outside(branches()) == [
        Outside("captured", "MatMul", "it lies in else_branch of If outer"),
        Outside("own", "MatMul", "it lies in then_branch of If outer"),
    ]


def test_trees_and_attributes() -> None:
    nodes = [
        helper.make_node("TreeEnsembleRegressor", ["x"], ["t"], name="trees", domain="ai.onnx.ml"),
        helper.make_node("LinearRegressor", ["t"], ["u"], name="linear", domain="ai.onnx.ml", coefficients=[1.0]),
        helper.make_node("Scaler", ["u"], ["y"], name="scaler", domain="ai.onnx.ml", scale=[1.0]),
    ]
    proto = build("g (float[N, 3] x) => (float[N, 1] y) { y = Identity (x) }")
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    found = find_outside(GraphView(proto), ())
    assert [(item.name, item.refusal) for item in found] == [
        ("trees", "trees compare, they hold no weights"),
        ("linear", "its weights are attributes of the node"),
    ]


def test_why_there_is_no_layer() -> None:
    assert why_none(GraphView(case("three axes")), (), "nothing") == "product (MatMul): its weight 'W' has 3 axes"
    assert why_none(GraphView(case("no weights")), (), "nothing") == "nothing"
    shared = build(
        "g (float[N, 3] x) => (float[N, 3] y) { "
        + " ".join(f"[m{i}] h{i} = MatMul ({f'h{i - 1}' if i else 'x'}, W)" for i in range(5))
        + " y = Identity (h4) }",
        {"W": np.eye(3, dtype=np.float32)},
    )
    told = why_none(GraphView(shared), layers_of(shared), "nothing")
    assert told.startswith("m0: its weight 'W' is also used by m1; m1: ") and told.endswith("; 2 more like that")
