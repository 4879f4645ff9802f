"""Gradients at every layer and of the inputs, against finite differences; and what is said where there are none."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cases import BLEND, SQUARE
from graph.models import SUBJECTS, build, random, residual, save
from kinds import CENSUS, model, opened, people, thinned

from onnxcare.backward import Backward, Network, input_gradients, position_weights
from onnxcare.case import Case
from onnxcare.decision import Decision
from onnxcare.errors import ModelError
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import NoGradient
from onnxcare.suffix import Activations

Array = np.ndarray
# Differences in float32, over kinks of ReLU and pooling: this part of the slope may be lost.
TOLERANCE = 0.03


@functools.cache
def sample(folder: Path) -> Case:
    with tempfile.TemporaryDirectory() as place:
        return opened(thinned(folder, Path(place), data=400, holdout=100))


def check_slopes(cost: Callable[[Array], float], at: Array, slope: Array, scale: Array | float = 1.0) -> None:
    """Check a gradient along itself, and with random weights for the samples, for the units and for all numbers."""
    assert slope.shape == at.shape
    rng = np.random.default_rng(5)
    parts = [(1,), (len(at), *[1] * (at.ndim - 1)), (1, at.shape[1], *[1] * (at.ndim - 2)), at.shape]
    for part in parts:
        way = rng.uniform(size=part) * slope * np.square(scale)
        assert way.any()
        # No number moves by more than a thousandth of what is usual.
        step = 1e-3 * np.sqrt(np.mean((at / scale) ** 2)) / np.abs(way / scale).max()
        up, down = ((at + sign * step * way).astype(at.dtype) for sign in (1, -1))
        found = (cost(up) - cost(down)) / (2 * step)
        assert found == pytest.approx(float((slope * way).sum()), rel=TOLERANCE)


def untied(values: Array, share: float = 0.05) -> Array:
    """Return values among which no two are equal: where the largest of several is taken twice, there is no slope."""
    noise = np.random.default_rng(7).normal(size=values.shape)
    return (values + share * values.std() * noise).astype(values.dtype)


LAYERS = [(SQUARE, 4), (BLEND, 4), (CENSUS, 4)]


@pytest.mark.parametrize(
    ("folder", "index"),
    [pytest.param(folder, index, id=f"{folder.name}-{index}") for folder, count in LAYERS for index in range(count)],
)
def test_gradients_of_the_cost_at_every_layer(folder, index):
    case = sample(folder)
    assert len(case.experiment.layers) == 4
    panel = case.panel("repair", 60)
    backward = Backward(case.experiment, case.experiment.layers[index].output)
    plain = backward.cache(panel.inputs)
    np.testing.assert_allclose(backward.scores(plain), case.experiment.scores(panel.inputs), rtol=1e-4, atol=1e-4)
    at = Activations(untied(plain.base), plain.boundary)
    scores, slope = backward.slope(at, panel.gradient)
    np.testing.assert_allclose(scores, backward.scores(at), atol=1e-5)

    def cost(base: Array) -> float:
        return float(panel.costs(backward.scores(Activations(base, at.boundary))[None])[0])

    check_slopes(cost, at.base, slope)


def weighted(experiment: Experiment, seed: int = 3) -> tuple[Callable[[Array], float], Callable]:
    """Return a sum over scores with fixed random weights, as a function of scores, and its gradient."""

    def of(scores: Array) -> Array:
        return np.random.default_rng(seed).normal(size=scores.shape)

    return lambda scores: float((scores.astype(np.float64) * of(scores)).sum()), of


def behind(backward: Backward, at: Activations, total: Callable[[Array], float]) -> Callable[[Array], float]:
    """Return the sum as a function of the activations at a cut."""
    return lambda base: total(backward.scores(Activations(base, at.boundary)))


@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_of_many_kinds_of_graphs(tmp_path, name):
    subject = SUBJECTS[name]()
    inputs = subject.samples(12)
    decision = Decision("argmin") if name == "acas" else Decision()
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", 1 << 28, inputs, decision=decision)
    total, of = weighted(experiment)
    for layer in experiment.layers:
        backward = Backward(experiment, layer.output)
        at = backward.cache(inputs)
        _, slope = backward.slope(at, of)
        check_slopes(behind(backward, at, total), at.base, slope)


def test_what_crosses_the_cut_stays_as_it_is(tmp_path):
    subject = residual()
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", 1 << 28, subject.samples(6))
    backward = Backward(experiment, "c1")
    assert backward.boundary == ("h",)
    at = backward.cache(subject.samples(6))
    np.testing.assert_array_equal(at.boundary["h"], experiment.tensors(["h"], subject.samples(6))[0])
    assert len(at.take(slice(0, 2))) == 2
    np.testing.assert_allclose(backward.scores(at), experiment.scores(subject.samples(6)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("decision", [Decision("threshold", 0.3), Decision("threshold", 0.9)])
@pytest.mark.parametrize("final", ["Sigmoid", "", "Tanh"])
def test_gradients_through_a_threshold(tmp_path, decision, final):
    experiment = Experiment(save(model(final=final), tmp_path), "cpu", 1 << 28, people(50, 1).inputs, decision=decision)
    assert experiment.decision.final == ("Sigmoid" if final == "Sigmoid" else "")
    total, of = weighted(experiment)
    for layer in experiment.layers:
        backward = Backward(experiment, layer.output)
        at = backward.cache(people(20, 2).inputs)
        scores, slope = backward.slope(at, of)
        assert scores.shape == (20, 2)
        check_slopes(behind(backward, at, total), at.base, slope)


def test_the_logits_themselves_need_no_derivative(tmp_path):
    experiment = Experiment(save(model(2, ""), tmp_path), "cpu", 1 << 28, people(50, 1).inputs)
    backward = Backward(experiment, experiment.logits)
    at = backward.cache(people(9, 2).inputs)
    seed = np.random.default_rng(1).normal(size=(9, 2))
    scores, slope = backward.slope(at, lambda scores: seed)
    np.testing.assert_array_equal(scores, at.base)
    np.testing.assert_allclose(slope, seed, rtol=1e-6)


def test_gradients_are_those_of_the_candidate_on_the_table(tmp_path):
    experiment = Experiment(save(model(2, ""), tmp_path), "cpu", 1 << 28, people(50, 1).inputs)
    first, second = experiment.layers
    candidate = experiment.patched({second.weight: 3 * experiment.read(second.weight)})
    x, seed = people(9, 2).inputs, np.ones((9, 2)) * [1, -1]
    slopes = []
    for held in (experiment, candidate):
        backward = Backward(held, first.output)
        slopes.append(backward.slope(backward.cache(x), lambda scores: seed)[1])
    assert np.abs(slopes[0]).max() > 0.1
    np.testing.assert_allclose(slopes[1], 3 * slopes[0], rtol=1e-5)


@pytest.mark.parametrize("folder", [SQUARE, BLEND, CENSUS], ids=lambda path: path.name)
def test_gradients_of_the_inputs(folder):
    case = sample(folder)
    (name,) = case.experiment.probe
    x = case.splits.repair.inputs[name][:40]
    # Columns of the census run from 0 to 1 and from 0 to 99,999: each is changed in its own measure.
    scale = np.maximum(case.splits.repair.inputs[name].std(axis=0, keepdims=True), 1e-2) if folder == CENSUS else 1.0
    x = (x + 0.05 * scale * np.random.default_rng(7).normal(size=x.shape)).astype(np.float32)
    gradients = input_gradients(case.experiment)
    total, of = weighted(case.experiment)

    def logits(values: Array) -> Array:
        return case.experiment.tensors([case.experiment.logits], {name: values})[0]

    def cost(values: Array) -> float:
        return total(logits(values))

    y, slopes = gradients({name: x}, of(logits(x)))
    np.testing.assert_allclose(y, logits(x), rtol=1e-4, atol=1e-4)
    check_slopes(cost, x, slopes[name], scale)


def test_every_floating_point_input_has_a_gradient(tmp_path):
    proto = build(
        """two (float[N, 3] a, int64[N, 2] k, double[N, 2] b) => (float[N, 2] y) {
            [cast] f = Cast <to = 1> (b)
            [whole] w = Cast <to = 1> (k)
            [both] c = Concat <axis = 1> (a, f, w)
            [fc] y = MatMul (c, W)
        }""",
        {"W": random(7, 2)},
    )
    rng = np.random.default_rng(1)
    inputs = {
        "a": rng.normal(size=(8, 3)).astype(np.float32),
        "k": rng.integers(0, 3, (8, 2)),
        "b": rng.normal(size=(8, 2)),
    }
    experiment = Experiment(save(proto, tmp_path), "cpu", 1 << 28, inputs)
    seed = rng.normal(size=(8, 2)).astype(np.float32)
    _, slopes = input_gradients(experiment)(inputs, seed)
    expected = seed @ random(7, 2).T
    assert set(slopes) == {"a", "b"}
    np.testing.assert_allclose(slopes["a"], expected[:, :3], rtol=1e-5)
    np.testing.assert_allclose(slopes["b"], expected[:, 3:5], rtol=1e-5)


# -- by weights ----------------------------------------------------------------------------------


def by_layers(experiment: Experiment, inputs: dict[str, Array], of: Callable) -> dict[str, Array]:
    """Return the gradient by the parameters of every layer, from that by its output and the rows of its input."""
    found = {}
    for layer in experiment.layers:
        backward = Backward(experiment, layer.output)
        wanted = layer.output_rows(backward.slope(backward.cache(inputs), of)[1].astype(np.float64))
        rows = layer.rows(experiment.tensors([layer.input], inputs)[0])
        slope = np.einsum("gspd,gspo->gdo", rows, wanted)
        known = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
        assert layer.alpha == layer.beta == 1  # so the matrix is the weights themselves
        found |= layer.add(slope, {parameter.name: np.zeros(parameter.shape) for parameter in known})
    return found


@pytest.mark.parametrize("name", SUBJECTS)
def test_gradients_by_all_weights_at_once(tmp_path, name):
    subject = SUBJECTS[name]()
    inputs = subject.samples(9)
    decision = Decision("argmin") if name == "acas" else Decision()
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", 1 << 28, inputs, decision=decision)
    _, of = weighted(experiment)
    network = Network(experiment)
    scores, slopes = network.slope({}, network.cache(inputs), of)
    np.testing.assert_allclose(scores, experiment.scores(inputs), rtol=1e-4, atol=1e-4)
    assert network.layers == experiment.layers and set(slopes) == set(network.parameters)
    expected = by_layers(experiment, inputs, of)
    for parameter, slope in slopes.items():
        scale = np.abs(expected[parameter.name]).max()
        np.testing.assert_allclose(slope / scale, expected[parameter.name] / scale, atol=1e-4)
    assert len(slopes) == len(expected)


def test_new_values_of_weights_need_no_new_session(tmp_path, monkeypatch):
    subject = residual()
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", 1 << 28, subject.samples(6))
    inputs = subject.samples(7, seed=8)
    network = Network(experiment)
    at = network.cache(inputs)
    first, *_, last = network.parameters
    values = {first: random(*first.shape, seed=8), last: random(*last.shape, seed=8, dtype=np.float64)}
    changed = experiment.patched(values)
    expected = changed.scores(inputs)
    total, of = weighted(experiment)
    slopes = Network(changed).slope({}, at, of)[1]
    with monkeypatch.context() as patch:
        patch.setattr("onnxcare.runtime._open", None)
        np.testing.assert_allclose(network.scores(values, at), expected, rtol=1e-4, atol=1e-4)
        found = network.slope(values, at, of)[1]
    for parameter in network.parameters:
        np.testing.assert_allclose(found[parameter], slopes[parameter], rtol=1e-6)
    # Along the slope the cost rises as it says.
    way = found[first] / np.linalg.norm(found[first])
    up, down = (network.scores({**values, first: values[first] + step * way}, at) for step in (1e-3, -1e-3))
    assert (total(up) - total(down)) / 2e-3 == pytest.approx(np.linalg.norm(found[first]), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("tensor", "layers"), [("r1", ["conv2", "down", "fc"]), ("h", ["conv1", "conv2", "down", "fc"])]
)
def test_a_network_may_begin_behind_a_tensor(tmp_path, tensor, layers):
    subject = residual()
    inputs = subject.samples(7)
    experiment = Experiment(save(subject.proto, tmp_path), "cpu", 1 << 28, inputs)
    whole, part = Network(experiment), Network(experiment, tensor)
    assert [layer.name for layer in part.layers] == layers
    at = part.cache(inputs)
    assert set(at) == {tensor, "h"} and set(whole.cache(inputs)) == {"x"}
    _, of = weighted(experiment)
    (scores, slopes), (expected, known) = part.slope({}, at, of), whole.slope({}, whole.cache(inputs), of)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)
    for parameter, slope in slopes.items():
        np.testing.assert_allclose(slope, known[parameter], rtol=1e-3, atol=1e-3)


def test_shared_weights_move_for_all_their_users_together(tmp_path):
    proto = build(
        """tied (float[N, 5] x) => (float[N, 3] y) {
            [once] z = MatMul (x, W) h = Relu (z) [twice] p = MatMul (h, W) t = Tanh (p) y = MatMul (t, V) }""",
        {"W": random(5, 5), "V": random(5, 3)},
    )
    inputs = {"x": random(7, 5, seed=2)}
    experiment = Experiment(save(proto, tmp_path), "cpu", 1 << 28, inputs)
    assert [layer.tied for layer in experiment.layers] == [True, True, False]
    network = Network(experiment)
    assert [parameter.name for parameter in network.parameters] == ["W", "V"]
    total, of = weighted(experiment)
    found = network.slope({}, network.cache(inputs), of)[1]
    shared = network.parameters[0]
    assert shared.users == ("once", "twice")

    def cost(values: Array) -> float:
        return total(experiment.patched({shared: values}).scores(inputs))

    check_slopes(cost, experiment.read(shared), found[shared])


# -- where there are none ------------------------------------------------------------------------


def signed() -> Experiment:
    """A net whose first half ends in signs."""
    proto = build(
        """signed (float[N, 4] x) => (float[N, 3] y) {
            [first] z1 = Gemm (x, W1, b1)
            [sign] s = Sign (z1)
            [second] z2 = Gemm (s, W2, b2)
            [relu] h = Relu (z2)
            [third] y = Gemm (h, W3, b3)
        }""",
        {"W1": random(4, 6), "b1": random(6), "W2": random(6, 5), "b2": random(5), "W3": random(5, 3), "b3": random(3)},
    )
    with tempfile.TemporaryDirectory() as folder:
        return Experiment(save(proto, Path(folder)), "cpu", 1 << 28, {"x": random(9, 4)})


def test_an_operator_without_a_derivative_is_named():
    experiment = signed()
    first, second, third = experiment.layers
    with pytest.raises(NoGradient, match="Sign 'sign' has no derivative"):
        Backward(experiment, first.output)
    with pytest.raises(NoGradient, match="Sign 'sign' has no derivative"):
        input_gradients(experiment)
    total, of = weighted(experiment)
    for layer in (second, third):
        backward = Backward(experiment, layer.output)
        at = backward.cache({"x": random(9, 4)})
        _, slope = backward.slope(at, of)
        check_slopes(behind(backward, at, total), at.base, slope)


def test_weights_of_which_there_is_no_derivative(tmp_path):
    experiment = signed()
    with pytest.raises(NoGradient, match="Sign 'sign' has no derivative"):
        Network(experiment)
    assert [layer.name for layer in Network(experiment, "s").layers] == ["second", "third"]
    proto = build("g (float[N, 4] x) => (float[N, 3] y) { h = MatMul (x, W) y = Tanh (h) }", {"W": random(4, 3)})
    with pytest.raises(NoGradient, match="no weights can be rewritten"):
        Network(Experiment(save(proto, tmp_path), "cpu", 1 << 28, {"x": random(9, 4)}), "h")


def test_whole_numbers_have_no_gradient(tmp_path):
    proto = build(
        "whole (int64[N, 2] k) => (float[N, 2] y) { f = Cast <to = 1> (k) y = MatMul (f, W) }", {"W": random(2, 2)}
    )
    experiment = Experiment(save(proto, tmp_path), "cpu", 1 << 28, {"k": np.ones((4, 2), np.int64)})
    with pytest.raises(NoGradient, match="no floating-point input"):
        input_gradients(experiment)


def test_a_tensor_that_does_not_matter_is_refused(tmp_path):
    proto = build(
        "side (float[N, 2] x) => (float[N, 2] y, float[N, 2] other) { y = MatMul (x, W) other = MatMul (x, V) }",
        {"W": random(2, 2), "V": random(2, 2, seed=1)},
    )
    experiment = Experiment(save(proto, tmp_path), "cpu", 1 << 28, {"x": random(4, 2)})
    with pytest.raises((ModelError, NoGradient), match="other"):
        Backward(experiment, "other")


# -- positions -----------------------------------------------------------------------------------


def tokens() -> Experiment:
    """Return a network of five tokens, mixed between two layers, and read in the end with weights 3, 1, 0, 0, 0."""
    proto = build(
        """g (float[N, 5, 4] x) => (float[N, 3] y) {
            [first] a = MatMul (x, W1)
            [tanh] b = Tanh (a)
            [turn] c = Transpose <perm = [0, 2, 1]> (b)
            [mix] d = MatMul (c, M)
            [back] e = Transpose <perm = [0, 2, 1]> (d)
            [second] f = MatMul (e, W2)
            [read] g = Mul (f, r)
            [sum] h = ReduceSum <keepdims = 0> (g, axes)
            [third] y = Gemm (h, W3)
        }""",
        {"W1": random(4, 6), "M": random(5, 5), "W2": random(6, 5), "W3": random(5, 3)}
        | {"r": np.array([[[3.0], [1.0], [0.0], [0.0], [0.0]]], np.float32), "axes": np.array([1])},
    )
    with tempfile.TemporaryDirectory() as folder:
        return Experiment(save(proto, Path(folder)), "cpu", 1 << 28, {"x": random(9, 5, 4)})


def test_positions_count_by_how_much_the_scores_depend_on_them():
    """Against derivatives at one tensor at a time, along the same directions."""
    experiment = tokens()
    layers = {layer.name: layer for layer in experiment.layers}
    outputs = {layers[name].output: layers[name] for name in ("first", "second")}
    inputs = {"x": random(40, 5, 4, seed=2)}
    found = position_weights(experiment, outputs, inputs, seed=6)
    directions = np.random.default_rng(6).normal(size=(40, 3))
    assert set(found) == set(outputs)
    for tensor in outputs:
        backward = Backward(experiment, tensor)
        slope = backward.slope(backward.cache(inputs), lambda scores: directions)[1].astype(np.float64)
        expected = (slope**2).sum(axis=(0, 2))
        np.testing.assert_allclose(found[tensor], expected / expected.mean(), rtol=1e-4)
    # Nothing is between the second layer and the answer but the weights with which its tokens are read.
    np.testing.assert_allclose(found[layers["second"].output], [4.5, 0.5, 0, 0, 0], rtol=1e-4)


def test_positions_without_a_derivative():
    experiment = signed()
    with pytest.raises(NoGradient, match="Sign 'sign' has no derivative"):
        position_weights(experiment, {experiment.layers[0].output: experiment.layers[0]}, {"x": random(9, 4)}, 1)
