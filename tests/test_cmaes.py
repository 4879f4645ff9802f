"""The CMA-ES wrapper: it finds minima, is reproducible, and leaves numpy's random state alone."""

from __future__ import annotations

import subprocess
import sys
import warnings

import numpy as np
import pytest

from onnxcare.cmaes import minimise


def bowl(points: np.ndarray) -> np.ndarray:
    return ((points - np.arange(1, points.shape[1] + 1)) ** 2).sum(axis=1)


@pytest.mark.parametrize("size", [1, 2, 6])
def test_finds_the_minimum_of_a_bowl(size):
    result = minimise(bowl, np.zeros(size), sigma=0.5, seed=1, generations=200)
    np.testing.assert_allclose(result.best, np.arange(1, size + 1), atol=0.02)
    assert result.cost == pytest.approx(bowl(result.best[None])[0])
    assert result.start == pytest.approx(bowl(np.zeros((1, size)))[0])


def test_same_seed_same_result_and_other_seed_another():
    runs = [minimise(bowl, np.zeros(4), sigma=0.5, seed=seed, generations=15) for seed in (3, 3, 4)]
    np.testing.assert_array_equal(runs[0].best, runs[1].best)
    assert (runs[0].best != runs[2].best).any()


def test_the_start_stays_a_candidate():
    result = minimise(bowl, np.arange(1.0, 5.0), sigma=0.5, seed=1, generations=5)
    np.testing.assert_array_equal(result.best, np.arange(1.0, 5.0))
    assert result.cost == 0


def test_bounds_hold():
    result = minimise(bowl, np.zeros(3), sigma=0.5, seed=1, bounds=(-1, 1), generations=100)
    assert (np.abs(result.best) <= 1).all()
    np.testing.assert_allclose(result.best, 1, atol=0.05)


def test_nan_costs_are_survived():
    def holey(points):
        costs = bowl(points)
        costs[points[:, 0] < 0] = np.nan
        return costs

    result = minimise(holey, np.ones(3), sigma=0.5, seed=1, generations=100)
    np.testing.assert_allclose(result.best, [1, 2, 3], atol=0.05)


def test_the_global_random_state_is_left_as_it_was():
    np.random.seed(5)
    expected = np.random.random(3)
    np.random.seed(5)
    minimise(bowl, np.zeros(2), sigma=0.5, seed=1, generations=3)
    np.testing.assert_array_equal(np.random.random(3), expected)


@pytest.mark.parametrize("rotated", [True, False])
def test_the_diagonal_alone_follows_a_valley_along_an_axis_and_no_other(rotated):
    rng = np.random.default_rng(2)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0] if rotated else np.eye(6)
    steepness = np.logspace(0, 4, 6)

    def valley(points: np.ndarray) -> np.ndarray:
        return (steepness * ((points - 1) @ turn) ** 2).sum(axis=1)

    options = {"sigma": 0.5, "seed": 1, "generations": 150, "patience": 150}
    full, diagonal = (minimise(valley, np.zeros(6), **options, diagonal=way) for way in (False, True))
    assert full.cost < 1e-4
    assert diagonal.cost > 0.1 if rotated else diagonal.cost < full.cost


def test_many_dimensions_are_searched_by_the_diagonal_alone_anyway():
    options = {"sigma": 0.5, "seed": 1, "generations": 5}
    runs = [minimise(bowl, np.zeros(201), **options, diagonal=way).best for way in (False, True)]
    np.testing.assert_array_equal(*runs)


def test_warnings_of_cma_are_kept_to_itself(monkeypatch):
    minimise(bowl, np.zeros(2), sigma=0.5, seed=1, generations=1)
    strategy = sys.modules["cma"].CMAEvolutionStrategy
    tell, told = strategy.tell, []

    def warning(self, *args):
        told.append(1)
        warnings.warn("a step has left the box far behind", UserWarning, stacklevel=2)
        tell(self, *args)

    monkeypatch.setattr(strategy, "tell", warning)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        minimise(bowl, np.zeros(2), sigma=0.5, seed=1, generations=3)
        assert told and heard == []
        warnings.warn("what comes later is heard again", UserWarning, stacklevel=1)
        assert len(heard) == 1


def test_nothing_is_said_where_cma_misses_matplotlib():
    """cma warns of it when it is imported; nobody asked for a plot."""
    code = """
import sys
sys.modules["matplotlib"] = None
import numpy
from onnxcare.cmaes import minimise
assert "cma" not in sys.modules
minimise(lambda points: (points**2).sum(axis=1), numpy.ones(2), sigma=0.5, seed=1, generations=2)
"""
    result = subprocess.run([sys.executable, "-W", "always::UserWarning", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
