"""CARE's multipliers: the folded file does what the interventions did, negative factors included."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from cases import BLEND, SQUARE, sample_case
from kinds import opened

from onnxcare.graph.patch import Patch
from onnxcare.locators import LOCATORS
from onnxcare.locators.select import attribute_sites
from onnxcare.repair import care
from onnxcare.sweep import spread_units


@pytest.mark.parametrize("folder", [SQUARE, BLEND], ids=lambda path: path.name)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_folded_multipliers_equal_the_intervention(folder, index):
    case = sample_case(folder)
    site = case.experiment.sites[index]
    factors = np.random.default_rng(index).normal(size=site.units) * 2
    assert (factors < 0).any()
    inputs = case.panel("search", 50).inputs
    suffix = case.experiment.suffix(site.tensor, "affine")
    at = suffix.cache(inputs)
    rank = at.base.ndim - 1
    expected = suffix.affine(
        at, spread_units(factors[None], site, rank), spread_units(np.zeros((1, site.units)), site, rank)
    )[0]
    data = Patch(care.fold(case, site, factors)).apply(case.experiment.model)
    scores = ort.InferenceSession(data).run(None, dict(inputs))[0]
    if folder == BLEND:
        expected = np.exp(expected - expected.max(axis=1, keepdims=True))
        expected /= expected.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_multipliers_lower_the_attack_success_but_not_without_a_price(monkeypatch):
    monkeypatch.setattr(care, "_GENERATIONS", 60)
    case = sample_case()
    found = care.repair(case)
    assert found.chosen.outcome.excess[0] < 0.5 * case.before.excess[0]
    assert found.chosen.outcome.cost < case.before.cost
    assert found.details["multipliers"]
    data = Patch(found.values).apply(case.experiment.model)
    panel = case.panel("validation")
    scores = ort.InferenceSession(data).run(None, dict(panel.inputs))[0]
    outcome = panel.outcomes(scores[None])[0]
    assert outcome.excess[0] == pytest.approx(found.chosen.outcome.excess[0], abs=5e-3)


def test_multipliers_are_those_of_the_units_that_the_locator_puts_first(tiny, monkeypatch):
    monkeypatch.setattr(care, "_GENERATIONS", 15)
    case = opened(tiny.spec)
    (site,) = case.experiment.sites
    for locator in LOCATORS:
        found = care.repair(case, (locator,))
        (attribution,) = attribute_sites(case, [site], locators=(locator,))
        (selection,) = found.details["selections"]
        assert selection["locator"] == attribution.locator
        assert selection["units"] == attribution.ranking()[: len(selection["units"])].tolist()
        count = int(found.chosen.label.split(": ")[1].split()[0])
        assert set(found.details["multipliers"]) <= set(attribution.ranking()[:count].tolist())
