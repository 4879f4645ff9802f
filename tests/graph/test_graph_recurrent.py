"""Recurrent nodes as matrix products: against plain loops over the formulas of ONNX, and onnxruntime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from graph.models import Subject, build, random, run

from onnxcare.graph.parameters import Parameter, find_parameters
from onnxcare.graph.recurrent import LENGTHS, START, STATES, STEPS, Recurrent, find_recurrent, with_steps
from onnxcare.graph.view import GraphView

Array = np.ndarray
SAMPLES, LONG, INPUTS, UNITS = 4, 5, 3, 2
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
DIRECTIONS = {"forward": 1, "reverse": 1, "bidirectional": 2}


def network(
    operator: str,
    direction: str = "forward",
    reset: int = 0,
    bias: bool = True,
    start: bool = False,
    lengths: bool = False,
    outputs: str = "y, h",
) -> Subject:
    """Return a network that reads [samples, steps, inputs] and answers by a layer on the states in the end."""
    count, gates = DIRECTIONS[direction], GATES[operator]
    behind = ", B" if bias else ", "
    behind += ", L" if lengths else ", "
    behind += ", S" if start else ""
    attributes = f'hidden_size = {UNITS}, direction = "{direction}"'
    attributes += f", linear_before_reset = {reset}" if operator == "GRU" else ""
    text = f"""g (float[N, {LONG}, {INPUTS}] x{", int32[N] L" if lengths else ""}) => (float[N, 4] scores) {{
        t = Transpose <perm = [1, 0, 2]> (x)
        {"n = Shape <start = 0, end = 1> (x)" if start else ""}
        {"w = Concat <axis = 0> (d, n, u)" if start else ""}
        {"S = Expand (s, w)" if start else ""}
        [node] {outputs} = {operator} <{attributes}> (t, W, R{behind})
        m = Transpose <perm = [1, 0, 2]> (h)
        f = Flatten (m)
        [dense] scores = MatMul (f, V)
    }}"""
    weights = {"W": random(count, gates * UNITS, INPUTS), "R": random(count, gates * UNITS, UNITS)}
    weights |= {"B": random(count, 2 * gates * UNITS)} if bias else {}
    weights |= {"s": random(count, 1, UNITS, seed=3), "d": np.array([count]), "u": np.array([UNITS])} if start else {}
    return Subject(build(text, weights | {"V": random(count * UNITS, 4)}), "x", (LONG, INPUTS), "scores", np.float32)


def items_of(subject: Subject) -> list[Recurrent]:
    view = GraphView(subject.proto)
    return find_recurrent(view, find_parameters(view))


def weights_of(proto: onnx.ModelProto, item: Recurrent) -> dict[Parameter, Array]:
    held = {tensor.name: onnx.numpy_helper.to_array(tensor).astype(np.float64) for tensor in proto.graph.initializer}
    return {parameter: held[parameter.name] for parameter in item.parameters}


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def sums(operator: str, reset: int, w: Array, r: Array, b: Array, x: Array, h: Array) -> Array:
    """Return what one step adds up for every gate of one direction, [samples, gates * units], as ONNX defines it."""
    gates = GATES[operator]
    wb, rb = np.split(b, 2)
    plain = x @ w.T + h @ r.T + wb + rb
    if operator != "GRU":
        return plain
    mine = slice((gates - 1) * UNITS, None)
    reset_gate = sigmoid(plain[:, UNITS : 2 * UNITS])
    past = reset_gate * (h @ r[mine].T + rb[mine]) if reset else (reset_gate * h) @ r[mine].T + rb[mine]
    return np.concatenate([plain[:, : 2 * UNITS], x @ w[mine].T + wb[mine] + past], axis=1)


def states(operator: str, reset: int, w: Array, r: Array, b: Array, x: Array, h: Array) -> Array:
    """Return the states after every step, [samples, steps, units]."""
    c, found = np.zeros_like(h), []
    for step in range(x.shape[1]):
        a = np.split(sums(operator, reset, w, r, b, x[:, step], h), GATES[operator], axis=1)
        if operator == "LSTM":  # input, output, forget, cell
            c = sigmoid(a[2]) * c + sigmoid(a[0]) * np.tanh(a[3])
            h = sigmoid(a[1]) * np.tanh(c)
        elif operator == "GRU":  # update, reset, hidden
            h = (1 - sigmoid(a[0])) * np.tanh(a[2]) + sigmoid(a[0]) * h
        else:
            h = np.tanh(a[0])
        found.append(h)
    return np.stack(found, axis=1)


@pytest.mark.parametrize(("operator", "reset"), [("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0)])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_matrix_gives_what_a_step_adds_up(operator, reset, direction):
    """With states of onnxruntime in front of every step; the past of a GRU's candidate state is left to its gate."""
    subject = network(operator, direction, reset)
    (item,) = items_of(subject)
    x = random(SAMPLES, LONG, INPUTS, seed=1)
    shown, names = with_steps(subject.proto, item)
    found = dict(zip(names, run(shown, {"x": x}, *names), strict=True))
    np.testing.assert_array_equal(found[STEPS], x)
    values = weights_of(subject.proto, item)
    start, lengths = np.zeros((SAMPLES, len(item.backwards), UNITS)), np.full(SAMPLES, LONG)
    for index, backwards in enumerate(item.backwards):
        w, r, b = (values[parameter][index] for parameter in item.parameters)
        way = slice(None, None, -1 if backwards else 1)
        expected = states(operator, reset, w, r, b, x[:, way].astype(np.float64), np.zeros((SAMPLES, UNITS)))
        np.testing.assert_allclose(found[STATES][:, way, index], expected, atol=1e-5)
        before = item.before(found[STATES], start, lengths, index)
        product = item.rows(x, before) @ item.matrix(values, index)
        for step in range(LONG):
            wanted = sums(operator, reset, w, r, b, x[:, step], before[:, step])
            linear = 2 * UNITS if operator == "GRU" else None
            np.testing.assert_allclose(product[:, step, :linear], wanted[:, :linear], atol=1e-5)


@pytest.mark.parametrize(("operator", "reset"), [("LSTM", 0), ("GRU", 0), ("GRU", 1), ("RNN", 0)])
def test_a_change_of_the_matrix_adds_its_product(operator, reset):
    """Block by block, since the reset gate of a GRU scales what its candidate state takes of the past."""
    subject = network(operator, "bidirectional", reset)
    (item,) = items_of(subject)
    values = weights_of(subject.proto, item)
    x, h = random(SAMPLES, INPUTS, seed=1).astype(np.float64), random(SAMPLES, UNITS, seed=2).astype(np.float64)
    covered = np.zeros(GATES[operator] * UNITS, int)
    for rows, columns in item.blocks():
        covered[columns] += 1
        change = np.zeros((2, item.features, GATES[operator] * UNITS))
        block = change[:, rows, columns].shape
        change[:, rows, columns] = np.random.default_rng(4).normal(size=block)
        new = item.add(change, values)
        for index in range(2):
            np.testing.assert_allclose(item.matrix(new, index) - item.matrix(values, index), change[index], atol=1e-12)
            old_sums, new_sums = (
                sums(operator, reset, *(known[parameter][index] for parameter in item.parameters), x, h)
                for known in (values, new)
            )
            added = item.rows(x[:, None], h[:, None])[:, 0] @ change[index]
            np.testing.assert_allclose((new_sums - old_sums)[:, columns], added[:, columns], atol=1e-10)
    assert (covered == 1).all()


def test_without_a_bias_there_is_no_row_for_it():
    subject = network("LSTM", bias=False)
    (item,) = items_of(subject)
    assert item.bias is None and item.features == INPUTS + UNITS == len(item.matrix(weights_of(subject.proto, item), 0))
    new = item.add(np.ones((1, item.features, 4 * UNITS)), weights_of(subject.proto, item))
    assert set(new) == {item.weight, item.recurrence}


def test_start_and_lengths_are_shown_and_states_before_follow_from_them():
    """Both ways: what is in front of a sample's first step is the start, and padding is never looked at."""
    subject = network("GRU", "bidirectional", start=True, lengths=True)
    (item,) = items_of(subject)
    x, lengths = random(SAMPLES, LONG, INPUTS, seed=1), np.array([5, 1, 3, 4], np.int32)
    shown, names = with_steps(subject.proto, item)
    found = dict(zip(names, run(shown, {"x": x, "L": lengths}, *names), strict=True))
    assert names == [STEPS, STATES, START, LENGTHS]
    assert found[STATES].shape == (SAMPLES, LONG, 2, UNITS) and found[START].shape == (SAMPLES, 2, UNITS)
    np.testing.assert_array_equal(found[LENGTHS], lengths)
    forward, reverse = (item.before(found[STATES], found[START], lengths, index) for index in range(2))
    for sample, length in enumerate(lengths):
        np.testing.assert_array_equal(forward[sample, 0], found[START][sample, 0])
        np.testing.assert_array_equal(forward[sample, 1:length], found[STATES][sample, : length - 1, 0])
        np.testing.assert_array_equal(reverse[sample, length - 1], found[START][sample, 1])
        np.testing.assert_array_equal(reverse[sample, : length - 1], found[STATES][sample, 1:length, 1])


def test_states_are_shown_where_the_node_gives_the_last_one_alone():
    subject = network("LSTM", outputs=", h")
    (item,) = items_of(subject)
    shown, names = with_steps(subject.proto, item)
    x = random(SAMPLES, LONG, INPUTS)
    last = run(subject.proto, {"x": x}, "h")[0]
    found = dict(zip(names, run(shown, {"x": x}, *names), strict=True))
    np.testing.assert_array_equal(found[STATES][:, -1, 0], last[0])


def test_shared_and_computed_weights_are_no_ones_to_change():
    subject = network("RNN")
    subject.proto.graph.node.add(op_type="Abs", input=["W"], output=["unused"], name="other")
    (item,) = items_of(subject)
    assert item.refusal == "its weight 'W' is also used by other"
    computed = network("RNN")
    node = next(node for node in computed.proto.graph.node if node.op_type == "RNN")
    computed.proto.graph.node.insert(0, onnx.helper.make_node("Relu", ["R"], ["r"]))
    node.input[2] = "r"
    assert items_of(computed) == []
