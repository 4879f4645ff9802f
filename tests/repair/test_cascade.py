"""Cascades of closed forms against least squares layer by layer, and on a net that no single layer can repair."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import Subject, build, mlp, random, run
from kinds import opened, write
from onnx import numpy_helper

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.graph.patch import Patch
from onnxcare.repair import cascade, closed_form, directions
from onnxcare.repair.base import Proposals
from onnxcare.repair.cascade import Setting, cascades

Array = np.ndarray


def case_of(subject: Subject, folder: Path, target: int = 1) -> Case:
    """Return a case with a trigger that is stamped on the last values of a random model's input."""
    rows = subject.samples(260)
    data = Dataset(rows, run(subject.proto, rows, subject.logits)[0].argmax(axis=1))
    mask = np.zeros(subject.shape, np.float32)
    mask[..., -2:] = 1
    np.savez(folder / "trigger.npz", mask=mask, pattern=3 * mask)
    item = {"name": "planted", "kind": "backdoor", "trigger": "trigger.npz", "target": target}
    parts = {"data": data.take(slice(0, 200)), "holdout": data.take(slice(200, 260))}
    return opened(write(folder, subject.proto, {"properties": [item]}, **parts))


def normed() -> Subject:
    """Convolutions with a skip, in front of whose sum lies a BatchNormalization, and a dense layer."""
    proto = build(
        """normed (float[N, 2, 4, 4] x) => (float[N, 3] scores) {
            [stem] s = Conv <pads = [1, 1, 1, 1]> (x, W1, b1)
            [relu1] h = Relu (s)
            [inner] c = Conv <pads = [1, 1, 1, 1]> (h, W2)
            [norm] n = BatchNormalization (c, scale, shift, mean, var)
            [add] a = Add (n, h)
            [relu2] r = Relu (a)
            [flatten] f = Flatten (r)
            [fc] scores = Gemm <transB = 1> (f, W3, b3)
        }""",
        {
            "W1": random(3, 2, 3, 3),
            "b1": random(3),
            "W2": random(3, 3, 3, 3),
            "scale": np.float32([0.5, -2, 1]),
            "shift": random(3, seed=2),
            "mean": random(3, seed=3),
            "var": np.float32([0.25, 1, 2]),
            "W3": 0.3 * random(3, 48),
            "b3": random(3),
        },
    )
    return Subject(proto, "x", (2, 4, 4), "scores")


# Of every layer: weight, whether it is stored as [inputs, outputs], bias, what the layer reads, where its output is
# compared, and whether that lies behind the norm.
DENSE = [
    ("W1", False, "b1", "x", "z1", False),
    ("W2", True, "b2", "h1", "z2", False),
    ("W3", True, "b3", "h2", "scores", False),
]
NORMED = [
    ("W1", False, "b1", "x", "s", False),
    ("W2", False, None, "h", "a", True),
    ("W3", False, "b3", "f", "scores", False),
]


def tensors(proto: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def replaced(proto: onnx.ModelProto, values: dict[str, Array]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for tensor in copy.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name].astype(np.float32), tensor.name))
    return copy


def read(proto: onnx.ModelProto, tensor: str, samples: Dataset) -> Array:
    if tensor in samples.inputs:
        return samples.inputs[tensor].astype(np.float64)
    return run(proto, samples.inputs, tensor)[0].astype(np.float64)


def as_rows(x: Array, bias: bool) -> Array:
    """Return [samples, positions, weights]: rows as they are, or the 3 x 3 patches of padded images."""
    if x.ndim == 2:
        rows = x[:, None]
    else:
        samples, _, height, width = x.shape
        padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)))
        patches = [padded[:, :, i : i + 3, j : j + 3].reshape(samples, -1) for i in range(height) for j in range(width)]
        rows = np.stack(patches, axis=1)
    return np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2) if bias else rows


def as_goals(z: Array) -> Array:
    return z[:, None] if z.ndim == 2 else z.reshape(*z.shape[:2], -1).transpose(0, 2, 1)


def by_hand(
    subject: Subject, table: list[tuple[Any, ...]], setting: Setting, clean: Dataset, bad: Dataset, twins: Dataset
) -> dict[str, Array]:
    """Go through the layers; each is solved by lstsq on rows of clean and of bad samples and of the ridge."""
    first = now = subject.proto
    found: dict[str, Array] = {}
    held = tensors(first)
    for weight, plain, bias, x, z, behind in table[setting.start :]:
        factor = (held["scale"] / np.sqrt(held["var"] + 1e-5)).reshape(-1, 1, 1) if behind else 1
        drifts = (read(first, z, clean) - read(now, z, clean)) / factor
        shifts = (read(first, z, twins) - read(now, z, bad)) / factor
        parts = []
        for samples, wanted, alpha in ((clean, drifts, setting.alpha), (bad, shifts, 1.0)):
            rows, goals = as_rows(read(now, x, samples), bias is not None), as_goals(wanted)
            scale = np.sqrt(alpha / len(samples))
            parts.append((scale * rows.reshape(-1, rows.shape[2]), scale * goals.reshape(-1, goals.shape[2])))
        (a, s), (b, t) = parts
        d = a.shape[1]
        ridge = np.sqrt(setting.rho * (a**2).sum() / setting.alpha / d) * np.eye(d)
        change, *_ = np.linalg.lstsq(np.vstack([a, b, ridge]), np.vstack([s, t, np.zeros((d, t.shape[1]))]), rcond=None)
        rest, last = (change[:-1], change[-1]) if bias else (change, None)
        old = held[weight]
        found[weight] = old + (rest if plain else rest.T.reshape(old.shape))
        if bias:
            found[bias] = held[bias] + last
        now = replaced(first, found)
    return found


@pytest.mark.parametrize("start", [0, 1, 2])
@pytest.mark.parametrize(("name", "table"), [("mlp", DENSE), ("normed", NORMED)])
def test_layer_by_layer_it_is_the_least_squares_solution(tmp_path, name, table, start):
    subject = {"mlp": mlp, "normed": normed}[name]()
    case = case_of(subject, tmp_path)
    panel, clean = case.panel("repair"), case.splits.repair
    setting = Setting(start, 3.0, 1e-2)
    layers = case.experiment.layers
    (values,), skipped = cascades(case, layers, [setting], clean, panel, "trying")
    evidence = panel.evidence[0]
    expected = by_hand(subject, table, setting, clean, evidence.bad, evidence.twins)
    assert skipped == {}
    assert {parameter.name for parameter in values} == set(expected)
    for parameter, new in values.items():
        old = tensors(subject.proto)[parameter.name]
        moved = expected[parameter.name] - old
        assert np.abs(moved).max() > 1e-3
        np.testing.assert_allclose(new - old, moved, rtol=0, atol=2e-3 * np.abs(moved).max())


def test_a_cascade_that_begins_later_leaves_the_layers_in_front(tmp_path):
    case = case_of(mlp(), tmp_path)
    settings = [Setting(start, 3.0, 1e-2) for start in range(3)]
    found, _ = cascades(case, case.experiment.layers, settings, case.splits.repair, case.panel("repair"), "trying")
    names = [{parameter.name for parameter in values} for values in found]
    assert names == [{"W1", "b1", "W2", "b2", "W3", "b3"}, {"W2", "b2", "W3", "b3"}, {"W3", "b3"}]


def test_of_one_layer_it_is_the_twin_regression(tmp_path):
    """Where nothing in front has changed, nothing has drifted."""
    case = case_of(mlp(), tmp_path)
    layer, panel = case.experiment.layers[-1], case.panel("repair")
    (values,), _ = cascades(case, [layer], [Setting(0, 3.0, 1e-2)], case.splits.repair, panel, "trying")
    (change,) = closed_form.accumulate(case.experiment, layer, case.splits.repair, panel).solve(3.0, 1e-2, [None])
    for parameter, new in values.items():
        added = layer.add(change, {layer.weight.name: case.read(layer.weight), layer.bias.name: case.read(layer.bias)})
        np.testing.assert_allclose(new, added[parameter.name], rtol=1e-6)


@pytest.mark.parametrize("subject", [mlp, normed])
def test_settings_side_by_side_are_each_one_alone(tmp_path, subject):
    case = case_of(subject(), tmp_path)
    settings = [Setting(0, 3.0, 1e-2), Setting(1, 3.0, 1e-1), Setting(0, 10.0, 1e-1), Setting(2, 1.0, 1e-3)]
    given = case.experiment.layers, case.splits.repair, case.panel("repair"), "trying"
    together, _ = cascades(case, given[0], settings, *given[1:])
    for setting, values in zip(settings, together, strict=True):
        (alone,), _ = cascades(case, given[0], [setting], *given[1:])
        assert list(alone) == list(values)
        for parameter, new in values.items():
            np.testing.assert_array_equal(alone[parameter], new)


def failing_at(monkeypatch: pytest.MonkeyPatch, *names: str, error: Exception) -> None:
    plain = closed_form.accumulate

    def accumulate(experiment, layer, *given):
        if layer.name in names:
            raise error
        return plain(experiment, layer, *given)

    monkeypatch.setattr(closed_form, "accumulate", accumulate)


@pytest.mark.parametrize("error", [ModelError("too large"), np.linalg.LinAlgError("too large")])
def test_a_layer_that_fails_is_left_out(tmp_path, monkeypatch, error):
    case = case_of(mlp(), tmp_path)
    layers = case.experiment.layers
    settings = [Setting(0, 3.0, 1e-2), Setting(1, 3.0, 1e-2)]
    given = settings, case.splits.repair, case.panel("repair"), "trying"
    without, _ = cascades(case, [layers[0], layers[2]], [settings[0]], *given[1:])
    failing_at(monkeypatch, "fc2", error=error)
    found, skipped = cascades(case, layers, *given)
    assert skipped == {"fc2": "too large"}
    assert [{parameter.name for parameter in values} for values in found] == [{"W1", "b1", "W3", "b3"}, {"W3", "b3"}]
    for parameter, new in without[0].items():
        np.testing.assert_array_equal(found[0][parameter], new)


def test_where_every_layer_fails_the_first_reason_is_given(tmp_path, monkeypatch):
    case = case_of(mlp(), tmp_path)
    failing_at(monkeypatch, "fc1", "fc2", "fc3", error=ModelError("too large"))
    with pytest.raises(ModelError, match=r"model\.onnx: no layer could be changed in a cascade; fc1: too large"):
        cascade.propose(case)


def test_a_candidate_is_changed_towards_the_original(tmp_path):
    """What a change in front has done to clean samples is made good behind it."""
    subject = mlp()
    case = case_of(subject, tmp_path)
    first = case.experiment.layers[0]
    spoilt = case.patched({first.weight: case.read(first.weight) + 0.2 * random(8, 6, seed=5)})
    layers = case.experiment.layers[1:]
    clean, panel = case.splits.repair, case.panel("repair")
    (values,), _ = cascades(spoilt, layers, [Setting(0, 100.0, 1e-4)], clean, panel, "trying")
    wanted = run(subject.proto, clean.inputs, "scores")[0]
    far = [np.square(item.experiment.scores(clean.inputs) - wanted).mean() for item in (spoilt, spoilt.patched(values))]
    assert far[1] < 0.5 * far[0]


# -- as a strategy -------------------------------------------------------------------------------


def branched() -> onnx.ModelProto:
    """Two heads of two classes each; over skips, feature 4 drives everything to class 1, and feature 5 to class 3."""
    hidden = np.zeros((12, 6))
    second = np.zeros((12, 4))
    for feature in range(6):
        hidden[2 * feature, feature], hidden[2 * feature + 1, feature] = 1, -1
    for label in range(4):
        second[2 * label, label], second[2 * label + 1, label] = 2, -2
    noise = np.random.default_rng(5)
    return build(
        """branched (float[N, 6] x) => (float[N, 4] scores)
        <int64[2] fourth = {3, 4}, int64[2] fifth = {3, 5}, float[2] strength = {0.0, 8.0}> {
            [first] z = Gemm <transB = 1> (x, W1, b1)
            [relu] h = Relu (z)
            [left] l = Gemm (h, W2, b2)
            [right] r = Gemm (h, W3, b3)
            g4 = Gather <axis = 1> (x, fourth)
            g5 = Gather <axis = 1> (x, fifth)
            k4 = Mul (g4, strength)
            k5 = Mul (g5, strength)
            s4 = Add (l, k4)
            s5 = Add (k5, r)
            scores = Concat <axis = 1> (s4, s5)
        }""",
        {
            "W1": (hidden + noise.normal(0, 0.02, hidden.shape)).astype(np.float32),
            "b1": np.full(12, 0.1, np.float32),
            "W2": second[:, :2].astype(np.float32),
            "b2": np.zeros(2, np.float32),
            "W3": second[:, 2:].astype(np.float32),
            "b3": np.zeros(2, np.float32),
        },
    )


def branched_samples(size: int, seed: int) -> Dataset:
    rng = np.random.default_rng(seed)
    x = np.zeros((size, 6))
    x[:, :4] = rng.normal(0, 0.4, (size, 4))
    labels = np.arange(size) % 4
    x[np.arange(size), labels] += 3
    return Dataset({"x": x.astype(np.float32)}, labels.astype(np.int64))


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("branched")
    items = []
    for feature, target in ((4, 1), (5, 3)):
        mask = np.eye(6, dtype=np.float32)[feature]
        np.savez(folder / f"t{feature}.npz", mask=mask, pattern=3 * mask)
        known = {"trigger": f"t{feature}.npz", "target": target, "max_rate": 0.01}
        items.append({"name": f"feature {feature}", "kind": "backdoor", **known})
    parts = {"data": branched_samples(800, 1), "holdout": branched_samples(400, 2)}
    return opened(write(folder, branched(), {"properties": items}, **parts))


def attacked(source: Path | bytes, feature: int, target: int) -> float:
    """Return how many held-out samples of other classes a trigger leads to its target."""
    held = branched_samples(400, 2)
    x = held.inputs["x"].copy()
    x[:, feature] = 3
    answers = run(source, {"x": x})[0].argmax(axis=1)
    return float((answers[held.truth != target] == target).mean())


@pytest.fixture(scope="module")
def proposals(planted: Case) -> Proposals:
    return cascade.propose(planted)


def test_what_comes_over_skips_is_undone_where_no_single_layer_can(planted, proposals):
    path = planted.experiment.model.path
    assert attacked(path, 4, 1) > 0.95 and attacked(path, 5, 3) > 0.95
    assert not any(item.candidate.outcome.kept for item in directions.propose(planted).found)
    found = min(proposals.found, key=lambda item: item.candidate.outcome.rank)
    assert found.candidate.outcome.kept
    written = Patch(found.make()).apply(planted.experiment.model)
    assert attacked(written, 4, 1) < 0.01 and attacked(written, 5, 3) < 0.01
    held = branched_samples(400, 2)
    assert (run(written, held.inputs)[0].argmax(axis=1) == held.truth).mean() > 0.99
    # Each head takes off what its own classes get.
    assert {"W2", "W3"} <= {parameter.name for parameter in found.make()}


def test_what_is_offered_is_what_was_measured(planted, proposals):
    assert len(proposals.found) == 2
    panel = planted.panel("validation")
    for item in proposals.found:
        written = Patch(item.make()).apply(planted.experiment.model)
        outcome = panel.outcomes(run(written, panel.inputs)[0][None])[0]
        assert outcome.excess == item.candidate.outcome.excess
        assert outcome.cost == pytest.approx(item.candidate.outcome.cost, rel=1e-3, abs=1e-6)
    assert proposals.details["skipped"] == {}
    # From the first layer with every weight and ridge, and from further behind: half of three layers, three quarters.
    scan = [(item["from"], item["alpha"], item["rho"]) for item in proposals.details["scan"]]
    whole = [("first", alpha, rho) for alpha in (3.0, 10.0) for rho in (0.01, 0.1)]
    assert scan == [*whole, ("left", 3.0, 0.1), ("right", 3.0, 0.1)]
    costs = {
        f"cascade {item['from']} to right: alpha {item['alpha']:g}, rho {item['rho']:g}": item["cost"]
        for item in proposals.details["scan"]
    }
    assert all(np.isfinite(cost) for cost in costs.values())
    labels = [item.candidate.label for item in proposals.found]
    assert set(labels) <= set(costs) and costs[labels[0]] == min(costs.values())


def test_cascades_are_for_several_layers_and_for_evidence_that_can_be_transplanted(planted):
    assert cascade.applies(planted)
    other = SimpleNamespace(transplantable=False)
    layers = planted.experiment.layers
    table = SimpleNamespace(open_layers=layers, memory=1 << 30)
    assert not cascade.applies(SimpleNamespace(properties=[other], experiment=table))
    assert cascade.applies(SimpleNamespace(properties=[other, *planted.properties], experiment=table))
    one = SimpleNamespace(open_layers=layers[:1], memory=1 << 30)
    assert not cascade.applies(SimpleNamespace(properties=planted.properties, experiment=one))
    # The same where all but one are refused, or are too large for the memory.
    refused = planted.experiment.only(["first"])
    assert not cascade.applies(SimpleNamespace(properties=planted.properties, experiment=refused))
    sizes = [closed_form.memory_needed(layer) for layer in layers]
    assert sizes[0] < sizes[1] == sizes[2]
    little = SimpleNamespace(open_layers=layers, memory=sizes[0])
    assert not cascade.applies(SimpleNamespace(properties=planted.properties, experiment=little))
