"""Twin regression over the steps of a recurrent node: against lstsq on a plain loop, and what the file then does."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from graph.models import build, run
from kinds import opened, patched, write

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.graph.recurrent import find_recurrent
from onnxcare.repair import recurrent

Array = np.ndarray
LONG, INPUTS, UNITS, CLASSES, TARGET = 6, 5, 8, 4, 1
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}
SPEC = {
    "properties": [{"name": "mark", "kind": "backdoor", "trigger": "trigger.npz", "target": TARGET, "max_rate": 0.02}],
    "keep": {"accuracy_drop": 0.02, "recall_drop": 0.1},
}


def weights(operator: str, directions: int) -> dict[str, Array]:
    """Return weights of a network that adds up what its first four features say, and keeps the fifth, the mark, too.

    Unit u < 4 sums feature u, unit 4 turns on where there is a mark and stays on; the others are noise.
    """
    rng = np.random.default_rng(3)
    gates = GATES[operator]
    w, r = rng.normal(0, 0.05, (gates, UNITS, INPUTS)), rng.normal(0, 0.02, (gates, UNITS, UNITS))
    b = np.zeros((2, gates, UNITS))
    drive = {"LSTM": 3, "GRU": 2, "RNN": 0}[operator]  # the gate that brings in something new
    for unit in range(5):
        w[drive, unit, unit] = 0.3 if unit < 4 else 1.5
    if operator == "RNN":
        r[0] += 0.9 * np.eye(UNITS)
    if operator == "LSTM":
        b[0, :3] = 2.0  # input, output and forget gates are open
    if operator == "GRU":
        b[0, 0] = 0.5  # what was there stays for the most part
        b[0, 1] = 2.0
    v = np.zeros((UNITS, CLASSES))
    v[:4, :4] = 6 * np.eye(4)
    v[4, TARGET] = 20.0
    held = {"W": w.reshape(-1, INPUTS), "R": r.reshape(-1, UNITS), "B": b.reshape(-1)}
    stacked = {name: np.stack([values] * directions) for name, values in held.items()}
    return {name: values.astype(np.float32) for name, values in (stacked | {"V": np.tile(v, (directions, 1))}).items()}


def network(operator: str, direction: str = "forward") -> onnx.ModelProto:
    count = 2 if direction == "bidirectional" else 1
    text = f"""g (float[N, {LONG}, {INPUTS}] x) => (float[N, {CLASSES}] y) {{
        t = Transpose <perm = [1, 0, 2]> (x)
        [node] steps, last = {operator} <hidden_size = {UNITS}, direction = "{direction}"> (t, W, R, B)
        m = Transpose <perm = [1, 0, 2]> (last)
        f = Flatten (m)
        [dense] y = MatMul (f, V)
    }}"""
    return build(text, weights(operator, count))


def samples(size: int, seed: int) -> Dataset:
    """Return sequences in which one of the first four features is larger than the others, labelled by it."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, size)
    x = rng.normal(0, 0.3, (size, LONG, INPUTS))
    x[:, :, 4] *= 0.1
    x[np.arange(size), :, labels] += 0.8
    return Dataset({"x": x.astype(np.float32)}, labels)


def case_of(proto: onnx.ModelProto, folder: Path) -> Case:
    mask, pattern = np.zeros((2, LONG, INPUTS), np.float32)
    mask[3, 4], pattern[3, 4] = 1, 2
    np.savez(folder / "trigger.npz", mask=mask, pattern=pattern)
    return opened(write(folder, proto, SPEC, data=samples(600, 1), holdout=samples(200, 2)))


@pytest.fixture(params=["LSTM", "GRU", "RNN"])
def operator(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("operator", "direction"), [("LSTM", "bidirectional"), ("LSTM", "reverse"), ("GRU", "reverse"), ("RNN", "forward")]
)
def test_the_mark_is_forgotten_and_nothing_else(operator, direction, tmp_path):
    case = case_of(network(operator, direction), tmp_path)
    panel = case.panel("validation")
    assert recurrent.applies(case) and case.before.excess[0] > 0.5
    found = recurrent.propose(case).found
    assert len(found) == len({item.candidate.label for item in found}) == 2 * (3 + 2)
    best = min(found, key=lambda item: item.candidate.outcome.rank)
    assert best.candidate.outcome.excess[0] <= 0.02 and best.candidate.outcome.accuracy_drop <= 0.02
    values = best.make()
    assert {parameter.name for parameter in values} == {"W", "R", "B"}
    # The layer behind the last state is as it was, and the file does what was measured.
    outcome = panel.outcomes(run(patched(case, values, tmp_path / "out.onnx"), panel.inputs)[0][None])[0]
    assert outcome.cost == pytest.approx(best.candidate.outcome.cost, rel=1e-2, abs=1e-4)
    assert outcome.excess == best.candidate.outcome.excess


def by_hand(operator: str, proto: onnx.ModelProto, case: Case, alpha: float, rho: float) -> dict[str, Array]:
    """Return W and the first half of B after a regression by lstsq, over steps that are stacked one by one.

    Only what an LSTM and an RNN add up is linear in whole, so these alone are solved here, with R.
    """
    held = {t.name: onnx.numpy_helper.to_array(t)[0].astype(np.float64) for t in proto.graph.initializer}
    evidence = case.panel("repair").evidence[0]
    assert evidence.twins is not None

    def stacked(inputs: Array, states_of: Array) -> Array:
        after = run(proto, {"x": states_of}, "steps")[0][:, 0].transpose(1, 0, 2)
        rows = []
        for x, h in zip(inputs, after, strict=True):
            for step in range(LONG):
                past = h[step - 1] if step else np.zeros(UNITS)
                rows.append(np.concatenate([x[step], past, [1.0]]))
        return np.array(rows, np.float64)

    clean_x, bad_x, twin_x = case.splits.repair.inputs["x"], evidence.bad.inputs["x"], evidence.twins.inputs["x"]
    clean, bad, twin = stacked(clean_x, clean_x), stacked(bad_x, twin_x), stacked(twin_x, twin_x)
    matrix = np.concatenate([held["W"].T, held["R"].T, held["B"].reshape(2, -1).sum(axis=0, keepdims=True)])
    d = clean.shape[1]
    ridge = rho * np.trace(clean.T @ clean / len(clean_x)) / d
    parts = [np.sqrt(alpha / len(clean_x)) * clean, bad / np.sqrt(len(bad_x)), np.sqrt(ridge) * np.eye(d)]
    goals = [np.zeros((len(clean), matrix.shape[1])), (twin - bad) @ matrix / np.sqrt(len(bad_x))]
    goals.append(np.zeros((d, matrix.shape[1])))
    change, *_ = np.linalg.lstsq(np.concatenate(parts), np.concatenate(goals), rcond=None)
    new_bias = held["B"].copy()
    new_bias[: matrix.shape[1]] += change[-1]
    return {"W": held["W"] + change[:INPUTS].T, "R": held["R"] + change[INPUTS:-1].T, "B": new_bias}


@pytest.mark.parametrize("operator", ["LSTM", "RNN"])
def test_it_is_the_least_squares_solution(operator, tmp_path):
    proto = network(operator)
    case = case_of(proto, tmp_path)
    found = {item.candidate.label: item for item in recurrent.propose(case).found}
    for alpha, rho in ((1.0, 1e-3), (10.0, 1e-1)):
        values = {p.name: new[0] for p, new in found[f"node: alpha {alpha:g}, rho {rho:g}"].make().items()}
        for name, expected in by_hand(operator, proto, case, alpha, rho).items():
            np.testing.assert_allclose(values[name], expected, atol=2e-4 * np.abs(expected).max())


def test_few_rows_change_few_weights(operator, tmp_path):
    case = case_of(network(operator), tmp_path)
    (item,) = find_recurrent(case.experiment.form.view, case.experiment.form.parameters)
    label = f"node: alpha 1, rho 0.1, 1 of {item.features} rows"
    found = next(item for item in recurrent.propose(case).found if item.candidate.label == label)
    changed = {p.name: new != case.read(p) for p, new in found.make().items()}
    # One row of the matrix: the feature that carries the mark.
    assert set(np.flatnonzero(changed["W"].any(axis=(0, 1)))) == {4}
    assert not changed["R"].any() and not changed["B"].any()


def test_what_was_changed_before_is_made_up_for(operator, tmp_path):
    """On a candidate that has lost its way, the aim is still what the original does."""
    case = case_of(network(operator), tmp_path)
    (item,) = find_recurrent(case.experiment.form.view, case.experiment.form.parameters)
    rng = np.random.default_rng(8)
    spoilt = {p: case.read(p) + rng.normal(0, 0.2, p.shape) for p in item.parameters}
    begun = case.patched(spoilt)
    worse = begun.before
    best = min(recurrent.propose(begun).found, key=lambda found: found.candidate.outcome.rank)
    assert best.candidate.outcome.drift < 0.2 * worse.drift
    assert best.candidate.outcome.excess[0] <= 0.02 < worse.excess[0]


def test_it_is_for_recurrent_nodes_of_their_own_and_evidence_with_twins(tmp_path, monkeypatch):
    case = case_of(network("LSTM"), tmp_path)
    assert recurrent.applies(case)
    panel = case.panel("repair")
    alone = SimpleNamespace(bad=panel.evidence[0].bad, twins=None)
    without = SimpleNamespace(
        experiment=case.experiment,
        properties=case.properties,
        panel=lambda part: SimpleNamespace(evidence=[alone]),
    )
    assert not recurrent.applies(without)
    (tmp_path / "tied").mkdir()
    tied = network("LSTM")
    tied.graph.node.add(op_type="Abs", input=["R"], output=["unused"], name="other")
    assert not recurrent.applies(case_of(tied, tmp_path / "tied"))
