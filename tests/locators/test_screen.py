"""First-order estimates where they are exact, and where there are none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from graph.models import SUBJECTS, build, random, save
from graph.operating import dense_subject, operate

from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.locators.causal import average_causal_effects
from onnxcare.locators.screen import first_order
from onnxcare.properties.base import log_softmax

CONV = """g (float[N, 2, 6, 5] x) => (float[N, 3] y) {
    a = Conv <pads = [1, 1, 1, 1]> (x, K)
    h = Relu (a)
    b = Conv <strides = [2, 1]> (h, L)
    m = GlobalAveragePool (b)
    f = Flatten (m)
    y = MatMul (f, V)
}"""


def response(scores: np.ndarray, samples: Dataset) -> np.ndarray:
    return np.exp(log_softmax(scores))[..., 1]


def assert_exact(experiment, sites, x) -> None:
    data = Dataset(x, None)
    full = [average_causal_effects(experiment, site, data, data, response, 5) for site in sites]
    found = first_order(experiment, sites, [item.values for item in full], data, response)
    assert found is not None
    for one, other in zip(found, full, strict=True):
        live = ~other.dead
        assert live.any()
        np.testing.assert_allclose(one[live], other.scores[live], rtol=1e-4, atol=1e-6)


def test_it_is_exact_where_everything_behind_a_unit_is_linear(tmp_path: Path) -> None:
    """The response may bend: only the scores are taken to be linear."""
    subject = SUBJECTS["mlp"]()
    experiment = operate(subject, tmp_path)
    assert_exact(experiment, experiment.sites[-1:], subject.samples(12))


def test_it_sums_over_the_positions_of_a_channel(tmp_path: Path) -> None:
    weights = {"K": random(4, 2, 3, 3), "L": random(5, 4, 3, 3, seed=2), "V": random(5, 3, seed=3)}
    x = {"x": random(9, 2, 6, 5, seed=4)}
    experiment = Experiment(save(build(CONV, weights), tmp_path), "cpu", 1 << 30, x)
    (first,) = [site for site in experiment.sites if site.tensor == "h"]
    assert_exact(experiment, [first], x)


@pytest.mark.parametrize("name", SUBJECTS)
def test_it_takes_all_sites_at_once(name: str, tmp_path: Path) -> None:
    subject = SUBJECTS[name]()
    experiment = operate(subject, tmp_path)
    sites = experiment.sites
    data = Dataset(subject.samples(6), None)
    grids = [random(site.units, 3, seed=7) for site in sites]
    found = first_order(experiment, sites, grids, data, response)
    if found is None:
        pytest.skip("the scores have no derivative")
    alone = [first_order(experiment, [site], [grid], data, response) for site, grid in zip(sites, grids, strict=True)]
    for site, one, (other,) in zip(sites, found, alone, strict=True):
        assert one.shape == (site.units,)
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


def test_a_derivative_of_zero_says_nothing(tmp_path: Path) -> None:
    weights = {"W1": random(6, 8), "W2": random(8, 5), "V": random(5, 4)}
    text = "z = MatMul (x, W1) h = Relu (z) a = MatMul (h, W2) s = Sign (a) y = MatMul (s, V)"
    subject = dense_subject(text, weights)
    experiment = operate(subject, tmp_path)
    data = Dataset(subject.samples(6), None)
    found = first_order(
        experiment, experiment.sites, [random(site.units, 3) for site in experiment.sites], data, response
    )
    if found is not None:
        hidden, behind = found
        assert np.isposinf(hidden).all() and np.isfinite(behind).all() and behind.any()


def test_too_many_classes_are_not_screened(tmp_path: Path) -> None:
    subject = dense_subject("h = MatMul (x, W1) y = MatMul (h, V)", {"W1": random(6, 8), "V": random(8, 33)})
    experiment = operate(subject, tmp_path)
    assert (
        first_order(experiment, experiment.sites, [random(8, 3)], Dataset(subject.samples(6), None), response) is None
    )


TOKENS = """g (int64[N, 5] tokens) => (float[N, 3] y) {
    e = Gather (table, tokens)
    z = MatMul (e, W)
    h = Relu (z)
    p = MatMul (h, V)
    y = ReduceMean <axes = [1], keepdims = 0> (p)
}"""


def test_inputs_may_be_whole_numbers(tmp_path: Path) -> None:
    weights = {"table": random(9, 6), "W": random(6, 4, seed=2), "V": random(4, 3, seed=3)}
    x = {"tokens": np.random.default_rng(3).integers(0, 9, (7, 5))}
    experiment = Experiment(save(build(TOKENS, weights), tmp_path), "cpu", 1 << 30, x)
    (site,) = [site for site in experiment.sites if site.tensor == "h"]
    assert_exact(experiment, [site], x)
