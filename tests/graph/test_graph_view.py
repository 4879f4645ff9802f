"""Who produces and who reads a tensor, and what is constant."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph.models import build, random
from onnx import helper

from onnxcare.graph.view import GraphView, attribute, operator


def view_of(nodes: str, **weights: np.ndarray) -> GraphView:
    return GraphView(build(f"g (float[N, 6] x, bool c) => (float[N, 6] y) {{ {nodes} }}", weights))


def test_nodes_without_a_name_are_called_by_operator_and_position() -> None:
    view = view_of("[first] a = Relu (x) b = Neg (a) y = Relu (b)")
    assert [view.label(index) for index in range(3)] == ["first", "Neg#1", "Relu#2"]


def test_a_sole_consumer_is_the_only_way_out() -> None:
    view = view_of("a = Relu (x) b = Neg (a) d = Add (b, b) e = Abs (d) y = Add (e, d)")
    assert view.sole_consumer("a") == 1
    assert view.sole_consumer("b") is None  # read twice by one node
    assert view.sole_consumer("d") is None  # read by two nodes
    assert view.sole_consumer("y") is None  # an output
    assert view.sole_consumer("nowhere") is None


def test_a_tensor_that_a_branch_reads_has_no_sole_consumer() -> None:
    view = view_of(
        """a = Relu (x) b = Neg (a)
        [choice] t = If (c) <
            then_branch = then () => (float[N, 6] p) { p = Identity (a) },
            else_branch = else () => (float[N, 6] q) {
                q = If (c) <
                    then_branch = inner () => (float[N, 6] r) { r = Identity (b) },
                    else_branch = other () => (float[N, 6] s) { s = Identity (x) }
                >
            }
        >
        d = Abs (b) y = Add (t, d)"""
    )
    assert view.sole_consumer("a") is None
    assert view.sole_consumer("b") is None
    assert view.sole_consumer("d") == 4
    assert {name: view.captured[name] for name in ("a", "b", "x")} == dict.fromkeys("abx", "choice")


def test_names_left_out_are_no_tensors() -> None:
    view = view_of("a = Clip (x, , high) y, mask = Dropout (a)", high=np.float32(1))
    assert "" not in view.consumers
    assert "" not in view.producer
    assert not view.is_activation("")


CONSTANTS = """
    a = Constant <value = float[2] {1, 2}> ()
    b = Constant <value_float = 3.0> ()
    d = Constant <value_ints = [4, 5]> ()
    e = Constant <value_floats = [6.0]> ()
    f = Constant <value_int = 7> ()
    g = Identity (d)
    i = Identity (g)
    j = Neg (w)
    k = Add (j, b)
    y = Relu (x)
"""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", [1, 2]),
        ("b", 3),
        ("d", [4, 5]),
        ("e", [6]),
        ("f", 7),
        ("i", [4, 5]),
        ("w", [8, 9]),
        ("j", None),
        ("x", None),
    ],
)
def test_small_constants_are_read_wherever_they_are_written(name: str, value: object) -> None:
    found = view_of(CONSTANTS, w=np.float32([8, 9])).small_constant(name)
    assert (None if found is None else found.tolist()) == value


def test_large_and_external_constants_are_not_small() -> None:
    proto = build("g (float[N, 6] x) => (float[N, 6] y) { y = Relu (x) }", {"w": random(65), "v": random(64)})
    assert GraphView(proto).small_constant("w") is None
    assert GraphView(proto).small_constant("v") is not None
    proto.graph.initializer[1].data_location = onnx.TensorProto.EXTERNAL
    assert GraphView(proto).small_constant("v") is None


def test_activations_are_what_depends_on_an_input() -> None:
    view = view_of(CONSTANTS, w=np.float32([8, 9]))
    assert [name for name in "abdefgijkwxy" if view.is_activation(name)] == ["x", "y"]


def test_what_a_branch_computes_from_an_input_is_an_activation() -> None:
    view = view_of(
        """y = If (yes) <
            then_branch = then () => (float[N, 6] p) { p = Identity (x) },
            else_branch = else () => (float[N, 6] q) { q = Neg (x) }
        >""",
        yes=np.bool_(True),
    )
    assert view.is_activation("y")


def test_attributes_are_python_values() -> None:
    node = helper.make_node("N", [], [], text="some", number=3, ratio=0.5, many=[1, 2])
    assert attribute(node, "text") == "some"
    assert attribute(node, "number") == 3
    assert attribute(node, "ratio") == 0.5
    assert attribute(node, "many") == [1, 2]
    assert attribute(node, "missing") is None
    assert attribute(node, "missing", 4) == 4


@pytest.mark.parametrize(("domain", "name"), [("", "Add"), ("ai.onnx", "Add"), ("com.example", "")])
def test_operators_of_another_domain_have_no_standard_name(domain: str, name: str) -> None:
    assert operator(helper.make_node("Add", ["a"], ["b"], domain=domain)) == name
