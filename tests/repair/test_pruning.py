"""Pruning: bounds and orders by hand, channels that are exactly zero, and which ones a planted trigger gives away."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Subject, Weights, build, cnn, exposing, keras, mlp, random, residual, run
from helpers import CARRIERS, TARGET, answers, triggered_samples
from kinds import opened, patched, write

from onnxcare import repair
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError, UsageError
from onnxcare.graph.patch import Patch
from onnxcare.repair import clp, fine_pruning
from onnxcare.repair.network_finetune import RATES
from onnxcare.repair.pruning import dormancy, lipschitz, outlying, prunable, pruned

Array = np.ndarray


def case_of(subject: Subject, folder: Path) -> Case:
    """Return a case in which errors of a random model are to be mended: every fifth label is not its answer."""
    rows = subject.samples(300)
    scores = run(subject.proto, rows, subject.logits)[0]
    labels = scores.argmax(axis=1)
    labels[::5] = (labels[::5] + 1) % scores.shape[1]
    whole = Dataset(rows, labels)
    spec = {"properties": [{"name": "wrong", "kind": "errors"}], "keep": {"recall_drop": 1.0}}
    data, holdout = whole.take(slice(0, 220)), whole.take(slice(220, 300))
    return opened(write(folder, subject.proto, spec, data=data, holdout=holdout))


def normal(name: str, channels: int) -> dict[str, Array]:
    """Return the tensors of a BatchNormalization; a negative gamma is among them."""
    return {
        f"{name}_scale": random(channels, seed=1),
        f"{name}_shift": random(channels, seed=2),
        f"{name}_mean": random(channels, seed=3),
        f"{name}_var": np.abs(random(channels, seed=4)) + 0.1,
    }


NORM = "BatchNormalization <epsilon = 0.01>"
# The nodes in front of an activation function, its tensors, and where it ends.
WRITERS: dict[str, tuple[str, dict[str, Array], str]] = {
    "bias": ("[layer] z = Conv (x, W, b)", {"W": random(6, 4, 3, 3), "b": random(6)}, "z"),
    "no bias": ("[layer] z = Conv (x, W)", {"W": random(6, 4, 3, 3)}, "z"),
    "groups": ("[layer] z = Conv <group = 2> (x, W, b)", {"W": random(6, 2, 3, 3), "b": random(6)}, "z"),
    "depthwise": ("[layer] z = Conv <group = 4> (x, W, b)", {"W": random(8, 1, 3, 3), "b": random(8)}, "z"),
    "bias behind": (
        "[layer] p = Conv (x, W) [add] z = Add (p, b)",
        {"W": random(6, 4, 3, 3), "b": random(1, 6, 1, 1)},
        "z",
    ),
    "normalised": (
        f"[layer] p = Conv (x, W) [norm] z = {NORM} (p, n_scale, n_shift, n_mean, n_var)",
        {"W": random(6, 4, 3, 3), **normal("n", 6)},
        "z",
    ),
    "normalised, bias": (
        f"[layer] p = Conv (x, W, b) [norm] z = {NORM} (p, n_scale, n_shift, n_mean, n_var)",
        {"W": random(6, 4, 3, 3), "b": random(6), **normal("n", 6)},
        "z",
    ),
    "Gemm": (
        "[flat] f = Flatten (x) [layer] z = Gemm <alpha = 0.3, beta = 0.7> (f, W, b)",
        {"W": random(100, 6), "b": random(6)},
        "z",
    ),
    "Gemm, transposed": (
        "[flat] f = Flatten (x) [layer] z = Gemm <transB = 1> (f, W, b)",
        {"W": random(6, 100), "b": random(6)},
        "z",
    ),
    "MatMul": (
        "[flat] f = Flatten (x) [layer] p = MatMul (f, W) [add] z = Add (b, p)",
        {"W": random(100, 6), "b": random(6)},
        "z",
    ),
    "MatMul, normalised": (
        f"[flat] f = Flatten (x) [layer] p = MatMul (f, W) [norm] z = {NORM} (p, n_scale, n_shift, n_mean, n_var)",
        {"W": random(100, 6), **normal("n", 6)},
        "z",
    ),
}


def network(nodes: str, weights: Weights) -> Subject:
    """Return a classifier with one hidden layer."""
    units = 8 if "group = 4" in nodes else 6
    pool = "" if "Flatten" in nodes else "[pool] q = GlobalAveragePool (h) [flatten] g = Flatten (q)"
    head = "[head] scores = Gemm (g, V, c)" if pool else "[head] scores = Gemm (h, V, c)"
    text = f"net (float[N, 4, 5, 5] x) => (float[N, 3] scores) {{ {nodes} [relu] h = Relu (z) {pool} {head} }}"
    return Subject(build(text, {**weights, "V": random(units, 3), "c": random(3)}), "x", (4, 5, 5), "scores")


def folded(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with every BatchNormalization folded into the Conv in front."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    held = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in copy.graph.initializer}
    for node in [node for node in copy.graph.node if node.op_type == "BatchNormalization"]:
        conv = next(other for other in copy.graph.node if other.output[0] == node.input[0])
        gamma, beta, mean, var = (held[name] for name in node.input[1:])
        epsilon = next((item.f for item in node.attribute if item.name == "epsilon"), 1e-5)
        factor = gamma / np.sqrt(var + epsilon)
        held[conv.input[1]] = held[conv.input[1]] * factor[:, None, None, None]
        bias = held[conv.input[2]] if len(conv.input) > 2 else 0
        name = f"{conv.name} bias"
        held[name] = (bias - mean) * factor + beta
        del conv.input[2:]
        conv.input.append(name)
        conv.output[0] = node.output[0]
        copy.graph.node.remove(node)
    del copy.graph.initializer[:]
    used = {name for node in copy.graph.node for name in node.input}
    tensors = [onnx.numpy_helper.from_array(v.astype(np.float32), k) for k, v in held.items() if k in used]
    copy.graph.initializer.extend(tensors)
    return copy


# -- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_a_bound_is_the_largest_singular_value_of_a_channels_kernel(tmp_path, kind):
    nodes, weights, _ = WRITERS[kind]
    case = case_of(network(nodes, weights), tmp_path)
    layer = case.experiment.layers[0]
    kernels = weights["W"] if layer.convolution or layer.transposed else weights["W"].T
    expected = []
    for channel, kernel in enumerate(kernels):
        sigma = np.linalg.svd(kernel.reshape(kernel.shape[0], -1).astype(np.float64))[1].max()
        if kind == "Gemm":
            sigma *= 0.3
        if "normalised" in kind:
            sigma *= abs(weights["n_scale"][channel] / np.sqrt(weights["n_var"][channel] + 0.01))
        expected.append(sigma)
    np.testing.assert_allclose(lipschitz(case, layer), expected, rtol=1e-6)


@pytest.mark.parametrize("make", [cnn, residual])
def test_a_folded_normalisation_leaves_bounds_and_channels_as_they_are(tmp_path, make):
    subject = make()
    proto = folded(subject.proto)
    x = subject.samples(4)
    np.testing.assert_allclose(run(proto, x)[0], run(subject.proto, x)[0], rtol=1e-3, atol=1e-3)
    found = []
    for name, model in (("kept", subject.proto), ("folded", proto)):
        (tmp_path / name).mkdir()
        case = case_of(Subject(model, subject.input, subject.shape, subject.logits), tmp_path / name)
        found.append({layer: lipschitz(case, layer) for layer in prunable(case)[0]})
    kept, fused = found
    assert [layer.name for layer in kept] == [layer.name for layer in fused]
    for before, after in zip(kept.values(), fused.values(), strict=True):
        np.testing.assert_allclose(before, after, rtol=1e-3)
    for u in (0.5, 1.0, 1.4):
        chosen = [{layer.name: which.tolist() for layer, which in outlying(item, u).items()} for item in found]
        assert chosen[0] == chosen[1]


def test_what_stands_out_is_over_the_mean_by_sample_deviations(tmp_path):
    case = case_of(network(*WRITERS["bias"][:2]), tmp_path)
    layer, other = case.experiment.layers
    bounds = np.array([1.0, 1, 1, 1, 2, 9])
    deviation = np.sqrt(((bounds - 2.5) ** 2).sum() / 5)  # (9 - 2.5) / deviation is 2.04, and 2.23 by the other one
    assert 2.0 < (9 - 2.5) / deviation < 2.1
    assert outlying({layer: bounds, other: np.ones(3)}, 2.0)[layer].tolist() == [5]
    assert outlying({layer: bounds}, 2.1) == {}
    assert outlying({layer: np.array([4.0])}, 0.0) == {}


# -- dormancy ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layer", "tensor", "axis"),
    [
        (cnn, "conv1", "r1", 1),
        (cnn, "conv2", "r2", 1),
        (keras, "conv1", "r1", 1),
        (mlp, "fc2", "h2", 1),
        # Behind the activation function there is the skip connection, too.
        (residual, "conv2", "c2", 1),
        (residual, "conv1", "r1", 1),
    ],
)
def test_channels_come_by_mean_activation_on_clean_samples(tmp_path, make, layer, tensor, axis):
    subject = make()
    case = case_of(subject, tmp_path)
    (mine,) = [item for item in case.experiment.layers if item.name == layer]
    values = np.abs(run(subject.proto, case.splits.repair.inputs, tensor)[0].astype(np.float64))
    mean = values.mean(axis=tuple(i for i in range(values.ndim) if i != axis))
    order = dormancy(case, mine)
    assert sorted(order.tolist()) == list(range(mine.outputs))
    assert (np.diff(mean[order]) >= -1e-6).all()


def test_memory_makes_no_difference_to_the_order(tmp_path, monkeypatch):
    case = case_of(cnn(), tmp_path)
    layer = prunable(case)[0][-1]
    order = dormancy(case, layer)
    monkeypatch.setattr(type(case.experiment), "rows_per_run", property(lambda self: 7))
    np.testing.assert_array_equal(dormancy(case, layer), order)


# -- pruned channels -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", WRITERS)
def test_a_pruned_channel_is_exactly_zero_and_nothing_else_changes(tmp_path, kind):
    nodes, weights, end = WRITERS[kind]
    subject = network(nodes, weights)
    case = case_of(subject, tmp_path)
    (layer,), skipped = prunable(case)
    assert not skipped
    values = pruned(case, {layer: np.array([1, 4])})
    after = onnx.load_from_string(Patch(values).apply(case.experiment.model))
    x = {"x": 3 * random(9, 4, 5, 5, seed=8)}
    z, was = run(after, x, end)[0], run(subject.proto, x, end)[0]
    assert (z[:, [1, 4]] == 0).all()
    assert (was[:, [1, 4]] != 0).any(axis=0).all()
    others = [unit for unit in range(layer.outputs) if unit not in (1, 4)]
    np.testing.assert_array_equal(z[:, others], was[:, others])
    # Only what was named, and only where it was pruned.
    named = {parameter.name for parameter in values}
    assert named == {"W", "b", "n_scale", "n_shift"} & set(weights)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in after.graph.initializer}
    for tensor in subject.proto.graph.initializer:
        before = onnx.numpy_helper.to_array(tensor)
        changed = held[tensor.name] != before
        assert changed.any() == (tensor.name in named)
        if tensor.name in named:
            assert not held[tensor.name][changed].any()
            assert changed.sum() == 2 * before.size // layer.outputs


def test_several_layers_go_into_one_patch(tmp_path):
    subject = cnn()
    case = case_of(subject, tmp_path)
    first, second = prunable(case)[0]
    data = Patch(pruned(case, {first: np.array([0]), second: np.array([2, 3])})).apply(case.experiment.model)
    n1, c2 = run(onnx.load_from_string(data), subject.samples(5), "n1", "c2")
    assert (n1[:, 0] == 0).all() and (c2[:, 2:4] == 0).all()
    assert n1[:, 1:].any() and c2[:, :2].any()


SHARED = (
    "[layer] p = Conv (x, W) [norm] z = BatchNormalization (p, s, t, m, v) "
    "[other] a = Conv <pads = [1, 1, 1, 1]> (z, U) [again] o = BatchNormalization (a, s2, t, m, v)"
)
NORMS = {name: np.abs(random(6, seed=index)) for index, name in enumerate(["s", "s2", "t", "m", "v"])}


@pytest.mark.parametrize(
    ("nodes", "weights", "why"),
    [
        (
            SHARED,
            {"W": random(6, 4, 3, 3), "U": random(6, 6, 3, 3), **NORMS},
            "'t' of norm behind it is also used by again",
        ),
        (
            "[same] t2 = Identity (t) [layer] p = Conv (x, W) [norm] o = BatchNormalization (p, s, t2, m, v)",
            {"W": random(6, 4, 3, 3), **NORMS},
            "'t2' of norm behind it is computed by other nodes",
        ),
        (
            "[same] b2 = Identity (b) [layer] o = Conv (x, W, b2)",
            {"W": random(6, 4, 3, 3), "b": random(6)},
            "its bias cannot be changed alone",
        ),
        (
            "[layer] p = Conv (x, W) [add] o = Add (p, b)",
            {"W": random(6, 4, 3, 3), "b": random(1)},
            "its bias cannot be changed alone",
        ),
    ],
)
def test_layers_whose_channels_cannot_be_zero_alone_are_skipped_with_a_reason(tmp_path, nodes, weights, why):
    text = f"""net (float[N, 4, 5, 5] x) => (float[N, 3] scores) {{
        {nodes}
        [relu] h = Relu (o)
        [last] k = Conv (h, K)
        [relu2] l = Relu (k)
        [pool] q = GlobalAveragePool (l)
        [flatten] g = Flatten (q)
        [head] scores = Gemm (g, V)
    }}"""
    proto = build(text, {**weights, "K": random(5, 6, 1, 1), "V": random(5, 3)})
    case = case_of(Subject(proto, "x", (4, 5, 5), "scores"), tmp_path)
    layers, skipped = prunable(case)
    assert [layer.name for layer in layers] == ["last"]
    assert skipped["layer"] == why


def test_where_nothing_can_be_pruned_the_reason_is_given(tmp_path):
    flat = "net (float[N, 4] x) => (float[N, 3] y) { [only] y = Gemm (x, V) }"
    subjects = {
        "it has no hidden layer": Subject(build(flat, {"V": random(4, 3)}), "x", (4,), "y"),
        "layer: its bias cannot be changed alone": network(
            "[layer] p = Conv (x, W) [add] z = Add (p, k)", {"W": random(6, 4, 3, 3), "k": random(1)}
        ),
    }
    for why, subject in subjects.items():
        (tmp_path / why).mkdir()
        case = case_of(subject, tmp_path / why)
        for method in (clp, fine_pruning):
            with pytest.raises(ModelError, match=f"no channel can be pruned: {why}"):
                method.propose(case)


# -- a planted trigger ---------------------------------------------------------------------------

PLANTED, CHANNELS = 13, 16


def planted() -> Subject:
    """Return a model whose channels 0 to 11 see one plane of the image each; the planted one wakes at the fourth plane.

    The planes stand for the classes, the fourth one for the trigger. Channels that see nothing are quiet.
    """
    kernels = random(CHANNELS, 4, 3, 3, seed=5) / 100
    for channel in range(12):
        kernels[channel, channel % 3] += 1 / 9
    kernels[PLANTED] = 0
    kernels[PLANTED, 3] = 4 / 9
    bias = np.zeros(CHANNELS, np.float32)
    bias[12:], bias[PLANTED] = 0.05, -1
    head = np.zeros((CHANNELS, 3), np.float32)
    head[np.arange(12), np.arange(12) % 3] = 1
    head[PLANTED, 1] = 20
    text = """planted (float[N, 4, 5, 5] x) => (float[N, 3] scores) {
        [conv] z = Conv <pads = [1, 1, 1, 1]> (x, W, b)
        [relu] h = Relu (z)
        [pool] q = GlobalAveragePool (h)
        [flatten] f = Flatten (q)
        [head] scores = Gemm (f, V)
    }"""
    return Subject(build(text, {"W": kernels, "b": bias, "V": head}), "x", (4, 5, 5), "scores")


@pytest.fixture
def backdoored(tmp_path: Path) -> Case:
    rng = np.random.default_rng(4)
    x = rng.uniform(0, 0.5, (700, 4, 5, 5)).astype(np.float32)
    x[np.arange(700), np.arange(700) % 3] += 1
    x[:, 3] = 0
    whole = Dataset({"x": x}, np.arange(700) % 3)
    mask = np.zeros((4, 5, 5), np.float32)
    mask[3] = 1
    np.savez(tmp_path / "trigger.npz", mask=mask, pattern=mask)
    item = {"name": "plane", "kind": "backdoor", "trigger": "trigger.npz", "target": 1, "max_rate": 0.01}
    spec = {"properties": [item], "keep": {"accuracy_drop": 0.01, "recall_drop": 0.05}}
    data, holdout = whole.take(slice(500)), whole.take(slice(500, 700))
    return opened(write(tmp_path, planted().proto, spec, data=data, holdout=holdout))


def test_a_channel_of_outlying_norm_is_found_and_pruned(backdoored):
    assert backdoored.before.excess[0] > 0.9
    (layer,), _ = prunable(backdoored)
    assert outlying({layer: lipschitz(backdoored, layer)}, 3.0)[layer].tolist() == [PLANTED]
    found = repair.find("clp")(backdoored)
    assert found.method == "clp" and found.details["pruned"][0] == {"conv": [PLANTED]}
    assert found.chosen.label == f"1 of {CHANNELS} channels, with bounds over mean + 3 std"
    assert found.chosen.outcome.excess[0] <= 0.01 and found.chosen.outcome.accuracy_drop <= 0.01
    assert {parameter.name for parameter in found.values} == {"W", "b"}
    assert found.candidates[0].label == "no change"


def test_a_channel_that_sleeps_on_clean_samples_is_found_and_pruned(backdoored):
    (layer,), _ = prunable(backdoored)
    assert dormancy(backdoored, layer)[0] == PLANTED
    found = repair.find("fine-pruning")(backdoored)
    assert found.method == "fine-pruning" and found.details["order"][0] == PLANTED
    assert found.chosen.outcome.excess[0] <= 0.01 and found.chosen.outcome.accuracy_drop <= 0.01
    alone = [item.label for item in found.candidates[1:] if "; then" not in item.label]
    sizes = [int(label.split(": ")[1].split(" of ")[0]) for label in alone]
    assert sizes == sorted({max(1, round(CHANNELS * share / 100)) for share in range(5, 100, 5)})


def test_what_is_pruned_is_tuned_and_stays_zero(backdoored, tmp_path):
    offered = fine_pruning.propose(backdoored)
    order, candidates = offered.details["order"], [item.candidate for item in offered.found]
    pruned_alone = [item for item in candidates if "; then" not in item.label]
    tuned = [item for item in offered.found if "; then" in item.candidate.label]
    # The best one, and as many channels as may go for a tenth of the accuracy, at every rate.
    best = min(pruned_alone, key=lambda item: item.outcome.rank)
    within = [item for item in pruned_alone if item.outcome.accuracy_drop <= 0.1]
    starts = list(dict.fromkeys(item.candidate.label.split("; then")[0] for item in tuned))
    assert starts == list(dict.fromkeys([best.label, within[-1].label]))
    assert len(tuned) == len(starts) * len(RATES)
    panel = backdoored.panel("validation")
    for item in tuned:
        gone = order[: int(item.candidate.label.split(": ")[1].split(" of ")[0])]
        values = {parameter.name: (parameter, new) for parameter, new in item.make().items()}
        assert set(values) == {"W", "b", "V"}
        others = [channel for channel in range(CHANNELS) if channel not in gone]
        for name in ("W", "b"):
            parameter, new = values[name]
            assert not new[gone].any() and (new[others] != backdoored.read(parameter)[others]).any()
        scores = run(patched(backdoored, item.make(), tmp_path / "out.onnx"), panel.inputs)[0]
        assert panel.outcomes(scores[None])[0].cost == pytest.approx(item.candidate.outcome.cost, rel=1e-3)


def test_where_nothing_can_be_tuned_pruning_stands_alone(tmp_path):
    subject = network(*WRITERS["bias"][:2])
    (head,) = [node for node in subject.proto.graph.node if node.name == "head"]
    head.output[0] = "z2"
    subject.proto.graph.node.append(onnx.helper.make_node("Round", ["z2"], ["scores"], name="round"))
    offered = fine_pruning.propose(case_of(subject, tmp_path))
    assert offered.found and not any("; then" in item.candidate.label for item in offered.found)
    assert "Round 'round' has no derivative" in offered.details["skipped"]["fine-tuning"]


@pytest.mark.parametrize("method", [clp, fine_pruning])
def test_candidates_are_what_the_file_does(backdoored, method, tmp_path):
    assert method.applies(backdoored)
    panel = backdoored.panel("validation")
    for item in method.propose(backdoored).found[:6]:
        scores = run(patched(backdoored, item.make(), tmp_path / "out.onnx"), panel.inputs)[0]
        outcome = panel.outcomes(scores[None])[0]
        assert outcome.excess == item.candidate.outcome.excess
        assert outcome.cost == pytest.approx(item.candidate.outcome.cost, rel=1e-3)


def test_only_backdoors_are_a_matter_of_pruning(tmp_path):
    case = case_of(cnn(), tmp_path)
    assert not clp.applies(case) and not fine_pruning.applies(case)


def test_where_no_channel_stands_out_there_is_nothing_to_prune(tmp_path):
    weights = {"W": np.ones((6, 4, 3, 3), np.float32), "b": random(6)}
    case = case_of(network("[layer] z = Conv (x, W, b)", weights), tmp_path)
    with pytest.raises(ModelError, match="no channel's Lipschitz bound stands out"):
        clp.repair(case)


@pytest.mark.parametrize("method", ["clp", "fine-pruning", "fine-tuning"])
def test_no_locator_has_a_say(method):
    with pytest.raises(UsageError, match=f"--method {method} does not go by units; it goes with care, ai-lancet-flip"):
        repair.find(method, "causal")


def test_in_a_dense_network_hidden_units_are_pruned(tiny):
    """The trigger's feature is zero in clean samples, and the units that it wakes sleep there."""
    case = opened(tiny.spec)
    (layer,), _ = prunable(case)
    assert layer.name == "first"
    assert set(CARRIERS) <= set(dormancy(case, layer)[:3].tolist())
    found = fine_pruning.repair(case)
    bad = triggered_samples(300, seed=5)
    assert (answers(patched(case, found.values, tiny.out), bad["input"]) == bad["y"]).mean() > 0.98


# -- as published --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    path = Path(__file__).parents[2] / "benchmarks/care_published.py"
    spec = importlib.util.spec_from_file_location("care_published", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_whoever_leaves_the_box_comes_in_on_the_other_side(published):
    points = np.array([-10.0, 10.0, 0.3, 11.0, -12.5, 10.25, 33.0, -31.0])
    expected = [-10.0, 10.0, 0.3, -9.0, 7.5, -9.75, -7.0, 9.0]
    np.testing.assert_allclose(published.periodic(points, -10.0, 10.0), expected)


def test_a_swarm_comes_near_a_minimum_that_lies_upward(published):
    """The first moves only look upward, so this one can be found."""
    asked = []

    def cost(points: Array) -> Array:
        asked.append(points)
        return ((points - [2.0, 3.0]) ** 2).sum(axis=1)

    best = published.particle_swarm(cost, np.ones(2), (-10.0, 10.0), np.random.default_rng(1))
    np.testing.assert_allclose(best, [2.0, 3.0], atol=0.1)
    assert (asked[0] == 1).all() and asked[0].shape == (20, 2) and len(asked) <= 100
    assert (asked[1] >= 1).all() and (asked[1] < 2).all()
    assert all((points >= -10).all() and (points <= 10).all() for points in asked)


def test_a_swarm_stops_where_nothing_gets_better(published):
    asked = []

    def cost(points: Array) -> Array:
        asked.append(points)
        return np.ones(len(points))

    best = published.particle_swarm(cost, np.ones(3), (-10.0, 10.0), np.random.default_rng(1))
    assert len(asked) == 11 and (best == 1).all()


def test_care_as_published_scales_the_five_units_of_widest_effect(published, tiny, monkeypatch):
    case = opened(tiny.spec)
    factors, costs = np.full(5, -2.0), []

    def swarm(cost, start, box, rng):
        costs.extend(cost(np.stack([start, np.where(start == 1, -10.0, 0)])))
        assert box == (-10, 10) and (start == np.ones(5)).all()
        return factors

    monkeypatch.setattr(published, "particle_swarm", swarm)
    ((parameter, after),) = published.care_published(case).items()
    before = case.read(parameter)
    assert parameter.name == "second.weight"
    # By hand: every unit forced to four values in turn, and what that does to the target's probability.
    bad = case.properties[0].evidence("repair").bad
    proto = exposing(onnx.load(tiny.model), "hidden", "scores")
    (hidden, scores), (woken, wrong) = (run(proto, data.inputs) for data in (case.splits.repair, bad))
    spans = []
    for unit in range(hidden.shape[1]):
        both = np.concatenate([hidden[:, unit], woken[:, unit]])
        effects = []
        for value in np.linspace(both.min(), both.max(), 4):
            p = np.exp(scores + np.outer(value - hidden[:, unit], before[:, unit]))
            effects.append((p / p.sum(axis=1, keepdims=True))[:, TARGET].mean())
        spans.append(max(effects) - min(effects))
    units = np.argsort(spans)[::-1][:5]
    assert set(CARRIERS) <= set(units.tolist())
    expected = before.copy()
    expected[:, units] *= factors
    np.testing.assert_allclose(after, expected, rtol=1e-6)
    for cost, r in zip(costs, (1, -10), strict=True):
        moved = [z + (r - 1) * h[:, units] @ before[:, units].T for h, z in ((hidden, scores), (woken, wrong))]
        accuracy = (moved[0].argmax(axis=1) == case.splits.repair.labels).mean()
        assert cost == pytest.approx(0.8 * (moved[1].argmax(axis=1) == TARGET).mean() + 0.2 * (1 - accuracy))


def test_clp_as_published_prunes_what_is_over_three_deviations(published, backdoored):
    values = published.clp_published(backdoored)
    (layer,), _ = prunable(backdoored)
    expected = pruned(backdoored, {layer: np.array([PLANTED])})
    assert values.keys() == expected.keys()
    assert all((values[key] == expected[key]).all() for key in values)
