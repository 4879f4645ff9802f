"""Twin regression against a direct minimisation and a plain loop."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from cases import BLEND, SQUARE, sample_case
from graph.models import Subject, build, random, residual, run
from graph.operating import operate

from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.layers import Layer
from onnxcare.panel import Panel
from onnxcare.properties.backdoor import Backdoor
from onnxcare.properties.base import Evidence
from onnxcare.repair import closed_form
from onnxcare.repair.closed_form import Aim, Regression, accumulate, effects
from onnxcare.spec import BackdoorSpec, Keep


def random_regression(rng: np.random.Generator, groups: int = 1, d: int = 7, o: int = 4):
    clean = rng.normal(size=(groups, 60, d))
    bad = rng.normal(size=(groups, 40, d))
    target = rng.normal(size=(groups, 40, o))
    sums = Regression(
        clean.transpose(0, 2, 1) @ clean / 60,
        bad.transpose(0, 2, 1) @ bad / 40,
        bad.transpose(0, 2, 1) @ target / 40,
    )
    return sums, clean, bad, target


def objective(change, clean, bad, target, alpha, rho):
    ridge = rho * np.trace(clean.T @ clean / len(clean)) / clean.shape[1]
    moved = ((clean @ change) ** 2).sum() / len(clean)
    missed = ((bad @ change - target) ** 2).sum() / len(bad)
    return alpha * moved + missed + ridge * (change**2).sum()


@pytest.mark.parametrize(("alpha", "rho"), [(1.0, 1e-2), (10.0, 1e-1)])
def test_the_solution_is_the_least_squares_solution(alpha, rho):
    sums, clean, bad, target = random_regression(np.random.default_rng(1), groups=2)
    (change,) = sums.solve(alpha, rho, [None])
    for group in range(2):
        ridge = rho * np.trace(clean[group].T @ clean[group] / 60) / 7
        stacked = np.concatenate(
            [np.sqrt(alpha / 60) * clean[group], bad[group] / np.sqrt(40), np.sqrt(ridge) * np.eye(7)]
        )
        wanted = np.concatenate([np.zeros((60, 4)), target[group] / np.sqrt(40), np.zeros((7, 4))])
        expected, *_ = np.linalg.lstsq(stacked, wanted, rcond=None)
        np.testing.assert_allclose(change[group], expected, atol=1e-10)


def test_no_change_of_the_same_rank_is_better():
    rng = np.random.default_rng(2)
    sums, clean, bad, target = random_regression(rng)
    (change,) = sums.solve(1.0, 1e-2, [1])
    best = objective(change[0], clean[0], bad[0], target[0], 1.0, 1e-2)
    assert np.linalg.matrix_rank(change[0]) == 1
    for _ in range(200):
        nearby = np.outer(
            change[0] @ np.ones(4) + 0.05 * rng.normal(size=7),
            np.ones(7) @ change[0] + 0.05 * rng.normal(size=4),
        )
        scale = (nearby * change[0]).sum() / (nearby**2).sum()
        assert objective(scale * nearby, clean[0], bad[0], target[0], 1.0, 1e-2) >= best - 1e-12


def test_a_large_layer_has_the_same_top_directions(monkeypatch):
    sums, *_ = random_regression(np.random.default_rng(5))
    expected = list(sums.solve(1.0, 1e-2, [1, 2, None]))
    monkeypatch.setattr(closed_form, "_DENSE", 3)
    for found, change in zip(sums.solve(1.0, 1e-2, [1, 2, None]), expected, strict=True):
        np.testing.assert_allclose(found, change, atol=1e-10)


def test_a_dead_input_leaves_the_system_solvable():
    rng = np.random.default_rng(3)
    clean, bad = rng.normal(size=(60, 7)), rng.normal(size=(40, 7))
    clean[:, 2] = bad[:, 2] = 0
    target = rng.normal(size=(40, 4))
    sums = Regression((clean.T @ clean)[None], (bad.T @ bad)[None], (bad.T @ target)[None])
    (change,) = sums.solve(1.0, 1e-3, [None])
    assert np.isfinite(change).all()
    np.testing.assert_allclose(change[0, 2], 0, atol=1e-12)


@pytest.mark.parametrize(("alpha", "rho"), [(1.0, 1e-2), (10.0, 1e-1)])
def test_drift_of_clean_samples_is_made_good(alpha, rho):
    rng = np.random.default_rng(5)
    sums, clean, bad, target = random_regression(rng, groups=2)
    drifted = rng.normal(size=(2, 60, 4))
    sums = Regression(sums.clean, sums.bad, sums.right, clean.transpose(0, 2, 1) @ drifted / 60)
    (change,) = sums.solve(alpha, rho, [None])
    for group in range(2):
        ridge = rho * np.trace(clean[group].T @ clean[group] / 60) / 7
        stacked = np.concatenate(
            [np.sqrt(alpha / 60) * clean[group], bad[group] / np.sqrt(40), np.sqrt(ridge) * np.eye(7)]
        )
        wanted = np.concatenate([np.sqrt(alpha / 60) * drifted[group], target[group] / np.sqrt(40), np.zeros((7, 4))])
        expected, *_ = np.linalg.lstsq(stacked, wanted, rcond=None)
        np.testing.assert_allclose(change[group], expected, atol=1e-10)
    still = Regression(sums.clean, sums.bad, sums.right, np.zeros_like(sums.right))
    without = Regression(sums.clean, sums.bad, sums.right)
    np.testing.assert_array_equal(*(next(part.solve(alpha, rho, [None])) for part in (still, without)))


@pytest.mark.parametrize("rows", [1, 3, 6])
def test_some_rows_are_refitted_by_themselves(rows):
    sums, clean, bad, target = random_regression(np.random.default_rng(6), groups=2)
    (full,) = sums.solve(1.0, 1e-2, [None])
    (some,) = sums.solve_some(1.0, 1e-2, [rows])
    for group in range(2):
        # What a row of the change adds to the outputs, over clean and bad samples.
        added = [
            ((np.outer(clean[group][:, row], full[group][row])) ** 2).sum() / 60
            + ((np.outer(bad[group][:, row], full[group][row])) ** 2).sum() / 40
            for row in range(7)
        ]
        kept = np.sort(np.argsort(added)[::-1][:rows])
        assert np.flatnonzero(some[group].any(axis=1)).tolist() == kept.tolist()
        ridge = 1e-2 * np.trace(clean[group].T @ clean[group] / 60) / 7
        stacked = np.concatenate(
            [clean[group][:, kept] / np.sqrt(60), bad[group][:, kept] / np.sqrt(40), np.sqrt(ridge) * np.eye(rows)]
        )
        wanted = np.concatenate([np.zeros((60, 4)), target[group] / np.sqrt(40), np.zeros((rows, 4))])
        expected, *_ = np.linalg.lstsq(stacked, wanted, rcond=None)
        np.testing.assert_allclose(some[group][kept], expected, atol=1e-10)
        # Better than what the unlimited change leaves of itself in these rows.
        cut = np.where(np.isin(np.arange(7), kept)[:, None], full[group], 0)
        case = clean[group], bad[group], target[group], 1.0, 1e-2
        assert objective(some[group], *case) < objective(cut, *case)


def test_all_rows_are_the_whole_change():
    sums, *_ = random_regression(np.random.default_rng(7), groups=2)
    some, full = (next(solve(3.0, 1e-1, [which])) for solve, which in ((sums.solve_some, 7), (sums.solve, None)))
    np.testing.assert_allclose(some, full, atol=1e-12)


@pytest.mark.parametrize("folder", [SQUARE, BLEND], ids=lambda path: path.name)
@pytest.mark.parametrize("index", [1, 2])
def test_sums_and_effects_equal_a_plain_loop(folder, index):
    case = sample_case(folder)
    layer = case.experiment.layers[index]
    panel = case.panel("search", 20)
    sums = accumulate(case.experiment, layer, panel.clean, panel)
    tensors = case.experiment.tensors
    x = tensors([layer.input], panel.clean.inputs)[0]
    expected = np.zeros_like(sums.clean)
    for sample in x:
        rows = layer.rows(sample[None]).astype(np.float64)[0, 0]
        expected[0] += rows.T @ rows / len(x)
    np.testing.assert_allclose(sums.clean, expected, rtol=1e-6, atol=1e-9)

    evidence = panel.evidence[0]
    bad_x = tensors([layer.input], evidence.bad.inputs)[0]
    is_now, ought = (tensors([layer.output], part.inputs)[0] for part in (evidence.bad, evidence.twins))
    right = np.zeros_like(sums.right)
    for sample, gap in zip(bad_x, ought - is_now, strict=True):
        rows = layer.rows(sample[None]).astype(np.float64)[0, 0]
        right[0] += rows.T @ layer.output_rows(gap[None])[0, 0] / len(bad_x)
    np.testing.assert_allclose(sums.right, right, rtol=1e-5, atol=1e-7)

    change = 0.01 * np.random.default_rng(4).normal(size=sums.right.shape)
    at = case.experiment.suffix(layer.output, "span").cache(panel.inputs)
    (added,) = effects(case.experiment, layer, panel.inputs, [change], at)
    rows = layer.rows(tensors([layer.input], panel.inputs)[0])
    np.testing.assert_allclose(layer.output_rows(added), rows @ change[:, None], atol=1e-5)


# -- aims ----------------------------------------------------------------------------------------


def normed() -> Subject:
    """A residual block whose convolution goes through a BatchNormalization before it is added to the skip."""
    proto = build(
        """normed (float[N, 2, 4, 4] x) => (float[N, 3] scores) {
            [stem] s = Conv <pads = [1, 1, 1, 1]> (x, W1, b1)
            [relu1] h = Relu (s)
            [inner] c = Conv <pads = [1, 1, 1, 1]> (h, W2, b2)
            [norm] n = BatchNormalization <epsilon = 0.25> (c, scale, shift, mean, var)
            [add] a = Add (n, h)
            [relu2] r = Relu (a)
            [pool] g = GlobalAveragePool (r)
            [flatten] f = Flatten (g)
            [fc] scores = Gemm <transB = 1> (f, W3, b3)
        }""",
        {
            "W1": random(4, 2, 3, 3),
            "b1": random(4),
            "W2": random(4, 4, 3, 3),
            "b2": random(4),
            "scale": np.float32([0.5, -2, 1, 1e-5]),  # the last channel hardly goes on
            "shift": random(4, seed=2),
            "mean": random(4, seed=3),
            "var": np.float32([0.25, 1, 2, 0.5]),
            "W3": random(3, 4),
            "b3": random(3),
        },
    )
    return Subject(proto, "x", (2, 4, 4), "scores")


# 1 / factor by hand, gamma / sqrt(var + 0.25); what hardly goes on is not aimed through.
UNDONE = np.array([np.sqrt(0.5) / 0.5, -np.sqrt(1.25) / 2, 1.5, 0]).reshape(4, 1, 1)


def triggered(subject: Subject, twins: bool) -> tuple[Dataset, Panel]:
    """Return clean samples, and a panel with samples to which the same is added; labels go round."""
    clean, good = (Dataset(subject.samples(12, seed), np.arange(12) % 3) for seed in (1, 2))
    bad = Dataset({"x": good.inputs["x"] + random(1, *subject.shape, seed=4)}, good.labels)
    spec = BackdoorSpec(name="added", kind="backdoor", trigger="t.npz", target=1)
    item = Backdoor(spec, 3, {"repair": Evidence(bad, good if twins else None)}, [])
    original = SimpleNamespace(scores=lambda inputs: run(subject.proto, inputs, subject.logits)[0])
    return clean, Panel.build(original, [item], Keep(), clean, "repair")


def drifted(experiment: Experiment, layer: Layer) -> Experiment:
    """Return the experiment with another layer's weights changed."""
    old = experiment.read(layer.weight)
    return experiment.patched({layer.weight: old + 0.1 * random(*old.shape, seed=9)})


def summed(
    layer: Layer, x: np.ndarray, wanted: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return E[A' A] and E[A' T], sample by sample and position by position."""
    gram, across = np.zeros((1, *2 * [layer.matrix_shape[1]])), np.zeros(layer.matrix_shape)
    for sample, goal in zip(x, wanted, strict=True):
        rows, goals = layer.rows(sample[None])[0, 0], layer.output_rows(goal[None])[0, 0]
        counts = np.ones(len(rows)) if weights is None else weights
        for row, one, count in zip(rows.astype(np.float64), goals.astype(np.float64), counts, strict=True):
            gram[0] += count * np.outer(row, row) / len(x)
            across[0] += count * np.outer(row, one) / len(x)
    return gram, across


@pytest.mark.parametrize(("name", "tensor"), [("stem", "s"), ("inner", "a"), ("fc", "scores")])
def test_sums_behind_changed_layers_equal_a_plain_loop(tmp_path, name, tensor):
    subject = normed()
    original = operate(subject, tmp_path)
    layers = {layer.name: layer for layer in original.layers}
    changed = drifted(original, layers["stem"])
    clean, panel = triggered(subject, twins=True)
    layer = layers[name]
    aim = Aim(original, layer, clean)
    assert aim.tensor == tensor
    sums = accumulate(changed, layer, clean, panel, aim)
    undo = UNDONE if name == "inner" else 1
    now, first = changed.copy, subject.proto

    def read(samples: Dataset) -> np.ndarray:
        return samples.inputs["x"] if layer.input == "x" else run(now, samples.inputs, layer.input)[0]

    goal = run(first, clean.inputs, tensor)[0] - run(now, clean.inputs, tensor)[0]
    gram, drift = summed(layer, read(clean), goal * undo)
    np.testing.assert_allclose(sums.clean, gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums.drift, drift, rtol=1e-3, atol=1e-4)
    bad, twins = panel.evidence[0].bad, panel.evidence[0].twins
    goal = run(first, twins.inputs, tensor)[0] - run(now, bad.inputs, tensor)[0]
    gram, right = summed(layer, read(bad), goal * undo)
    np.testing.assert_allclose(sums.bad, gram, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(sums.right, right, rtol=1e-3, atol=1e-4)
    if name == "inner":
        assert not sums.right[0, :, 3].any() and np.abs(sums.right[0, :, :3]).max() > 0.1


@pytest.mark.parametrize("again", [False, True])
def test_positions_may_count_more_or_less(tmp_path, again):
    """Of the model as it is, and behind layers that were changed; a position of weight zero does not count at all."""
    subject = normed()
    original = operate(subject, tmp_path)
    layers = {layer.name: layer for layer in original.layers}
    now = drifted(original, layers["stem"]) if again else original
    clean, panel = triggered(subject, twins=True)
    layer, weights = layers["inner"], np.random.default_rng(5).uniform(size=16)
    weights[3] = 0
    aim = Aim(original, layer, clean) if again else None
    sums = accumulate(now, layer, clean, panel, aim, weights)
    bad, twins = panel.evidence[0].bad, panel.evidence[0].twins
    for samples, wanted, found, right in (
        (clean, clean, sums.clean, sums.drift),
        (bad, twins, sums.bad, sums.right),
    ):
        goal = run(subject.proto, wanted.inputs, "a")[0] - run(now.copy, samples.inputs, "a")[0]
        gram, across = summed(layer, run(now.copy, samples.inputs, layer.input)[0], goal * UNDONE, weights)
        np.testing.assert_allclose(found, gram, rtol=1e-4, atol=1e-5)
        if right is not None:
            np.testing.assert_allclose(right, across, rtol=1e-3, atol=1e-4)
    assert (sums.drift is None) != again


def test_of_an_unchanged_model_nothing_has_drifted(tmp_path):
    subject = normed()
    experiment = operate(subject, tmp_path)
    clean, panel = triggered(subject, twins=True)
    for layer in experiment.layers:
        plain = accumulate(experiment, layer, clean, panel)
        aimed = accumulate(experiment, layer, clean, panel, Aim(experiment, layer, clean))
        assert plain.drift is None and not aimed.drift.any()
        for one, other in ((plain.clean, aimed.clean), (plain.bad, aimed.bad), (plain.right, aimed.right)):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("labelled", [True, False])
def test_without_twins_the_mean_shift_stands_in_for_them(tmp_path, labelled):
    subject = normed()
    original = operate(subject, tmp_path)
    inner = next(layer for layer in original.layers if layer.name == "inner")
    changed = drifted(original, original.layers[0])
    clean, panel = triggered(subject, twins=False)
    bad = panel.evidence[0].bad
    if not labelled:
        bad = Dataset(bad.inputs, None)
    is_now = run(changed.copy, bad.inputs, "a")[0]
    ought = run(subject.proto, clean.inputs, "a")[0]
    shift = Aim(original, inner, clean).shift(is_now, bad, None)
    assert shift.shape == is_now.shape
    for row, label in enumerate(panel.evidence[0].bad.truth):
        alike = np.arange(12) % 3 == label if labelled else np.ones(12, bool)
        expected = (ought[alike].mean(axis=0) - is_now[alike].mean(axis=0)) * UNDONE
        np.testing.assert_allclose(shift[row], expected, rtol=1e-4, atol=1e-4)


def test_a_layer_in_front_of_a_sum_is_aimed_at_the_sum(tmp_path):
    """Without any normalisation in between: what comes over the skip is cancelled, too."""
    subject = residual()
    experiment = operate(subject, tmp_path)
    layer = next(layer for layer in experiment.layers if layer.name == "conv2")
    clean, good = (Dataset(subject.samples(5, seed), None) for seed in (1, 2))
    is_now = run(subject.proto, clean.inputs, "a")[0]
    expected = run(subject.proto, good.inputs, "a")[0] - is_now
    np.testing.assert_allclose(Aim(experiment, layer, clean).shift(is_now, clean, good), expected, atol=1e-4)
