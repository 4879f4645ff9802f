"""Average causal effects against a plain loop over full forward passes."""

from __future__ import annotations

import numpy as np
import pytest
from by_hand import intervened, unit_mask
from cases import BLEND, SQUARE, images, sample_case

from onnxcare.graph.sites import Site
from onnxcare.locators.causal import average_causal_effects
from onnxcare.properties.base import log_softmax

TARGET = {SQUARE: 1, BLEND: 7}


def plain_loop(path, site: Site, x: np.ndarray, values: np.ndarray, units: list[int], target: int) -> np.ndarray:
    session = intervened(path, site)
    (first, *_) = session.get_inputs()
    table = np.zeros((len(units), values.shape[1]))
    for row, unit in enumerate(units):
        for column in range(values.shape[1]):
            feeds = {first.name: x, "mask": unit_mask(site, unit), "value": np.array(values[unit, column], np.float32)}
            scores = session.run(None, feeds)[0].astype(np.float64)
            if path.parent == SQUARE:  # this one answers logits, the other one probabilities
                scores = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
            table[row, column] = scores[:, target].mean()
    return table


@pytest.mark.parametrize("folder", [SQUARE, BLEND], ids=lambda path: path.name)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_effects_equal_a_loop_over_full_forward_passes(folder, index):
    case = sample_case(folder)
    site = case.experiment.sites[index]
    clean = case.splits.repair.take(slice(0, 40))
    bad = case.properties[0].evidence("repair").bad.take(slice(0, 40))
    target = TARGET[folder]
    found = average_causal_effects(
        case.experiment, site, clean, bad, lambda scores, samples: np.exp(log_softmax(scores))[..., target], values=5
    )
    units = [unit for unit in range(site.units) if not found.dead[unit]][:6]
    expected = plain_loop(folder / "model.onnx", site, images(clean), found.values, units, target)
    np.testing.assert_allclose(found.effects[units], expected - expected.mean(axis=1, keepdims=True), atol=1e-5)
    np.testing.assert_allclose(found.scores[units], np.ptp(expected, axis=1), atol=1e-5)
    np.testing.assert_allclose(found.means[units], expected.mean(axis=1), atol=1e-5)


def test_the_ranking_by_mean_puts_the_highest_expectation_first():
    case = sample_case()
    clean = case.splits.repair.take(slice(0, 40))
    bad = case.properties[0].evidence("repair").bad.take(slice(0, 40))
    found = average_causal_effects(
        case.experiment,
        case.experiment.sites[-1],
        clean,
        bad,
        lambda scores, samples: log_softmax(scores)[..., 1],
        values=3,
    )
    ranked = found.by_mean()
    assert ranked.locator != found.locator
    live = np.flatnonzero(~found.dead)
    assert found.dead.any() and (found.means[found.dead] == 0).all()
    # Log-probabilities are negative: dead units would come first if their 0 counted.
    assert (found.means[live] < 0).all()
    assert ranked.ranking().tolist() == live[np.argsort(-found.means[live], kind="stable")].tolist()
    np.testing.assert_allclose(np.diff(ranked.scores[live]), np.diff(found.means[live]), atol=1e-9)
    assert (ranked.scores >= 0).all() and (ranked.scores[found.dead] == 0).all()


def test_values_span_the_range_over_clean_and_bad_samples_and_dead_units_are_dropped():
    case = sample_case()
    site = case.experiment.sites[-1]
    clean = case.splits.repair.take(slice(0, 60))
    bad = case.properties[0].evidence("repair").bad.take(slice(0, 60))
    found = average_causal_effects(
        case.experiment, site, clean, bad, lambda scores, samples: log_softmax(scores)[..., 1], values=4
    )
    both = np.concatenate([case.experiment.tensors([site.tensor], part.inputs)[0] for part in (clean, bad)])
    np.testing.assert_allclose(found.values[:, 0], both.min(axis=0), atol=1e-6)
    np.testing.assert_allclose(found.values[:, -1], both.max(axis=0), atol=1e-6)
    np.testing.assert_allclose(np.diff(found.values, 2, axis=1), 0, atol=1e-5)
    np.testing.assert_array_equal(found.dead, np.ptp(both, axis=0) == 0)
    assert found.dead.any()
    assert not set(found.ranking()) & set(np.flatnonzero(found.dead))
    assert (np.diff(found.scores[found.ranking()]) <= 0).all()
