"""Sites and numbers of units are chosen by what an intervention does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cases import sample_case
from helpers import dense, write_case
from kinds import opened

from onnxcare.errors import OnnxcareError
from onnxcare.locators import LOCATORS
from onnxcare.locators.causal import average_causal_effects
from onnxcare.locators.differential import vote_units
from onnxcare.locators.pairs import find_pairs
from onnxcare.locators.select import ablate, attribute_sites, select_units
from onnxcare.properties.base import Evidence

NAMES = ["average causal effect", "interchange effect", "differential votes"]


def test_top_units_do_clearly_more_than_random_ones():
    case = sample_case()
    sites = [case.experiment.sites[-1]]
    (selection,) = select_units(case, attribute_sites(case, sites))
    panel = case.panel("search")
    live = selection.ranking
    rng = np.random.default_rng(7)
    random = [rng.choice(live, selection.size, replace=False) for _ in range(10)]
    chosen = ablate(case, panel, selection.site, [selection.units])[0]
    controls = ablate(case, panel, selection.site, random)
    before = panel.outcomes(case.experiment.scores(panel.inputs)[None])[0]
    assert chosen.excess[0] < before.excess[0] - 0.2
    assert chosen.loss < 0.7 * np.mean([control.loss for control in controls])
    assert chosen.excess[0] < np.mean([control.excess[0] for control in controls]) - 0.1


def test_ablation_sets_units_to_their_clean_mean():
    case = sample_case()
    site = case.experiment.sites[-1]
    panel = case.panel("search")
    outcome = ablate(case, panel, site, [np.array([3, 5])])[0]
    hidden = case.experiment.tensors([site.tensor], panel.inputs)[0].copy()
    hidden[:, [3, 5]] = hidden[panel.clean_rows][:, [3, 5]].mean(axis=0)
    reader = site.readers[0]
    weight, bias = case.read(reader.weight), case.read(reader.bias)
    expected = panel.outcomes((hidden @ weight.T + bias)[None])[0]
    assert outcome.excess == expected.excess
    np.testing.assert_allclose(outcome.cost, expected.cost, rtol=1e-4)


def test_sites_come_best_first_and_larger_sets_grow():
    case = sample_case()
    selections = select_units(case, attribute_sites(case, case.experiment.sites))
    costs = [selection.outcome.cost for selection in selections]
    assert costs == sorted(costs)
    for selection in selections:
        sizes = [len(units) for units in selection.larger()]
        assert sizes[0] == selection.size
        assert sizes == sorted(set(sizes))
        assert sizes[-1] == len(selection.ranking)


def test_with_little_memory_samples_come_piece_by_piece_and_rank_alike():
    case, poor = sample_case(), sample_case.__wrapped__()
    poor.experiment.memory = 1 << 20
    sites = case.experiment.sites
    found, expected = attribute_sites(poor, poor.experiment.sites), attribute_sites(case, sites)
    assert [(item.site.tensor, item.locator) for item in found] == [
        (item.site.tensor, item.locator) for item in expected
    ]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    chosen, best = select_units(poor, found), select_units(case, expected)
    assert [(item.site.tensor, item.size) for item in chosen] == [(item.site.tensor, item.size) for item in best]


def test_every_locator_has_a_say_and_of_several_properties_the_strongest_counts():
    case = sample_case()
    site = case.experiment.sites[-1]
    everyone = attribute_sites(case, [site])
    assert [item.locator for item in everyone] == NAMES
    (item,) = case.properties
    harmless = Silent(item)
    both = attribute_sites(replace(case, properties=[harmless, item], _panels={}), [site])
    assert [found.locator for found in both] == NAMES
    for found, alone in zip(both, everyone, strict=True):
        np.testing.assert_array_equal(found.scores, alone.scores)


def test_locators_that_are_asked_for_are_the_ones_that_rank():
    case = sample_case()
    sites = case.experiment.sites[-1:]
    everyone = attribute_sites(case, sites, samples=30)
    for locator, alone in zip(LOCATORS, everyone, strict=True):
        (found,) = attribute_sites(case, sites, samples=30, locators=(locator,))
        assert found.locator == alone.locator
        np.testing.assert_array_equal(found.scores, alone.scores)
    assert [item.locator for item in attribute_sites(case, sites, 30, locators=LOCATORS[::2])] == NAMES[::2]


def test_votes_are_those_of_the_pairs_of_the_repair_part():
    case = sample_case()
    site = case.experiment.sites[-1]
    (found,) = attribute_sites(case, [site], samples=30, locators=("differential",))
    (pairs,) = find_pairs(case, 30)
    clean = case.panel("repair", 30).clean
    expected = vote_units(case.experiment, site, clean, pairs)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert found.samples == len(pairs)


def test_without_a_reference_that_behaves_it_is_not_said_that_units_are_constant(tmp_path):
    """Nothing shows the backdoor, so there is no pair; the units move all the same."""
    case = opened(write_case(tmp_path, dense(backdoored=False)).spec)
    with pytest.raises(OnnxcareError, match="seventh"):
        attribute_sites(case, case.experiment.sites, locators=("differential",))


def test_for_fairness_the_ranking_by_mean_competes_too():
    case = sample_case()
    fair = Silent(case.properties[0])
    fair.kind = "fairness"
    found = attribute_sites(replace(case, properties=[fair], _panels={}), [case.experiment.sites[-1]])
    assert [item.locator for item in found] == [
        "average causal effect",
        "mean interventional expectation",
        "interchange effect",
        "differential votes",
    ]


class Silent:
    """A property whose response and margin are hardly moved by anything."""

    def __init__(self, item) -> None:
        self._item = item

    def __getattr__(self, name):
        return getattr(self._item, name)

    def response(self, scores, samples):
        return 1e-6 * self._item.response(scores, samples)

    def margin(self, scores, samples):
        return 1e-6 * self._item.margin(scores, samples)


class Nothing(Silent):
    """A property without any sample that shows it."""

    def evidence(self, part):
        found = self._item.evidence(part)
        return Evidence(found.bad.take(slice(0, 0)), found.twins.take(slice(0, 0)))


def test_a_property_that_nothing_shows_is_passed_over():
    case = sample_case()
    site, (item,) = case.experiment.sites[-1], case.properties
    found = attribute_sites(replace(case, properties=[Nothing(item), item], _panels={}), [site])
    for one, alone in zip(found, attribute_sites(case, [site]), strict=True):
        np.testing.assert_array_equal(one.scores, alone.scores)
    with pytest.raises(OnnxcareError, match="white-square"):
        attribute_sites(replace(case, properties=[Nothing(item)], _panels={}), [site])


def test_effects_are_averaged_over_the_samples_that_the_property_observes():
    case = sample_case()
    site = case.experiment.sites[-1]
    (causal,) = attribute_sites(case, [site], samples=25, locators=("causal",))
    panel = case.panel("repair", 25)
    (item,), (evidence,) = case.properties, panel.evidence
    expected = average_causal_effects(case.experiment, site, panel.clean, evidence.bad, item.response, 8)
    np.testing.assert_array_equal(causal.scores, expected.scores)
    other = Silent(item)
    other.observed = lambda clean, bad: bad
    other.response = item.response
    asked = replace(case, properties=[other], _panels={})
    (causal,) = attribute_sites(asked, [site], samples=25, locators=("causal",))
    expected = average_causal_effects(case.experiment, site, evidence.bad, evidence.bad, item.response, 8)
    np.testing.assert_array_equal(causal.scores, expected.scores)
