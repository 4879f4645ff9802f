"""Twin regression against a direct minimisation and a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
from cases import BLEND, SQUARE, sample_case

from onnxcare.repair.closed_form import Regression, accumulate, effects


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


def test_a_dead_input_leaves_the_system_solvable():
    rng = np.random.default_rng(3)
    clean, bad = rng.normal(size=(60, 7)), rng.normal(size=(40, 7))
    clean[:, 2] = bad[:, 2] = 0
    target = rng.normal(size=(40, 4))
    sums = Regression((clean.T @ clean)[None], (bad.T @ bad)[None], (bad.T @ target)[None])
    (change,) = sums.solve(1.0, 1e-3, [None])
    assert np.isfinite(change).all()
    np.testing.assert_allclose(change[0, 2], 0, atol=1e-12)


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
