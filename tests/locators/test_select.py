"""Sites and numbers of units are chosen by what an intervention does."""

from __future__ import annotations

import numpy as np
import pytest
from cases import sample_case

from onnxcare.errors import ModelError
from onnxcare.locators.select import ablate, attribute_sites, select_units


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


def test_sites_that_do_not_fit_into_the_memory_are_left_out_as_long_as_one_does():
    case = sample_case.__wrapped__()
    case.experiment.memory = 4 << 20
    found = attribute_sites(case, case.experiment.sites)
    assert {item.site.tensor for item in found} == {"/pool2/MaxPool_output_0", "/relu3/Relu_output_0"}
    # The search part has more samples than were attributed with.
    assert [item.site.tensor for item in select_units(case, found)] == ["/relu3/Relu_output_0"]
    case.experiment.memory = 1 << 10
    with pytest.raises(ModelError, match="--memory"):
        attribute_sites(case, case.experiment.sites)
