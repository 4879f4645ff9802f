"""Races over tables of effects that are known in full."""

from __future__ import annotations

import numpy as np
import pytest
from cases import sample_case

from onnxcare.locators.causal import average_causal_effects, quadrature, raced_effects
from onnxcare.locators.interchange import interchange_effects, raced_exchanges
from onnxcare.locators.race import Finish, Rules, race

CASES, TOP = 512, 10


class Table:
    """Effects of the units of two sites on every case; counts what is asked for."""

    def __init__(self, seed: int, noise: float = 0.3) -> None:
        random = np.random.default_rng(seed)
        self.means = np.abs(random.normal(size=300)) ** 3
        effects = self.means[:, None] + noise * random.standard_t(4, size=(300, CASES))
        self.sites = [effects[:200], effects[200:]]
        self.asked = 0

    def measure(self, site: int, units: np.ndarray, cases: np.ndarray) -> np.ndarray:
        self.asked += len(units) * len(cases)
        return self.sites[site][np.ix_(units, cases)][:, None]

    def run(self, seed: int = 1, likely: list[np.ndarray] | None = None, top: int = TOP) -> Finish:
        live = [np.arange(200), np.arange(100)]
        rules = Rules(top, 0.95, seed)
        return race(self.measure, lambda answers: answers[:, 0], live, [200, 100], CASES, rules, likely)

    @property
    def best(self) -> set[tuple[int, int]]:
        exact = np.concatenate(self.sites).mean(axis=1)
        return {(int(unit >= 200), int(unit % 200)) for unit in np.argsort(-exact)[:TOP]}


def finalists(finish: Finish) -> set[tuple[int, int]]:
    return {(site, int(unit)) for site, mine in enumerate(finish.finalists) for unit in np.flatnonzero(mine)}


def test_the_top_is_found_at_the_stated_confidence_for_a_part_of_the_work():
    missed, share = 0, []
    for seed in range(200):
        table = Table(seed)
        found = finalists(table.run())
        assert len(found) == TOP
        missed += found != table.best
        share.append(table.asked / (300 * CASES))
    assert missed <= 0.05 * 200
    assert np.mean(share) < 0.25


def test_equals_go_on_until_all_cases_are_in_and_nothing_is_left_to_chance():
    table = Table(3)
    table.sites[0][:20] = 5 + np.random.default_rng(0).normal(size=(20, CASES))
    finish = table.run()
    assert finalists(finish) == table.best
    assert finish.rounds[-1]["cases"] == CASES
    for site, mine in enumerate(finish.finalists):
        np.testing.assert_allclose(finish.scores[site][mine], table.sites[site][mine].mean(axis=1))
        assert (finish.cases[site][mine] == CASES).all()


def test_those_who_drop_out_keep_what_they_had_then():
    table = Table(4)
    finish = table.run(seed=7)
    order = np.random.default_rng(7).permutation(CASES)
    for site, effects in enumerate(table.sites):
        for unit in (0, 50, 99):
            seen = order[: finish.cases[site][unit]]
            assert finish.scores[site][unit] == pytest.approx(effects[unit, seen].mean())
    assert len({int(count) for counts in finish.cases for count in counts}) > 1
    again = Table(4).run(seed=7)
    for one, other in zip(finish.scores, again.scores, strict=True):
        np.testing.assert_array_equal(one, other)


def test_no_case_is_asked_for_twice():
    table = Table(5)
    seen: set[tuple[int, int, int]] = set()

    def measure(site: int, units: np.ndarray, cases: np.ndarray) -> np.ndarray:
        asked = {(site, int(unit), int(case)) for unit in units for case in cases}
        assert not asked & seen
        seen.update(asked)
        return table.sites[site][np.ix_(units, cases)][:, None]

    live, rules = [np.arange(200), np.arange(100)], Rules(TOP)
    wrong = [np.arange(200.0), np.zeros(100)]
    race(measure, lambda answers: answers[:, 0], live, [200, 100], CASES, rules, wrong)
    assert seen


def test_a_screen_that_is_right_spares_the_others():
    table = Table(6)
    exact = [effects.mean(axis=1) for effects in table.sites]
    finish = table.run(likely=exact)
    assert finish.screened
    assert finalists(finish) == table.best
    assert finish.rounds[0]["units"] < 150
    assert sum(int((counts == 0).sum()) for counts in finish.cases) > 150


def test_a_screen_that_is_wrong_is_not_trusted():
    table = Table(6)
    wrong = [-effects.mean(axis=1) for effects in table.sites]
    finish = table.run(likely=wrong)
    assert not finish.screened
    assert 300 in [item["units"] for item in finish.rounds][1:]
    assert finalists(finish) == table.best


def test_fewer_units_than_places_need_no_race():
    table = Table(8)
    finish = table.run(top=400)
    assert [item["units"] for item in finish.rounds] == [300]
    assert all(mine.all() for mine in finish.finalists)


def test_of_whom_nothing_is_known_takes_part():
    table = Table(9)
    likely = [effects.mean(axis=1) for effects in table.sites]
    likely[1][:] = np.inf
    finish = table.run(likely=likely)
    assert finish.screened
    assert (finish.cases[1] > 0).all() and (finish.cases[0] == 0).any()
    assert finalists(finish) == table.best


@pytest.mark.parametrize("values", [2, 3, 4, 5, 8, 16])
def test_a_few_values_give_all_where_the_response_is_a_parabola(values):
    nodes, full = quadrature(values)
    assert len(nodes) == min(values, 3) and nodes[0] == 0 and nodes[-1] == values - 1
    b = np.linspace(-1, 2, values)
    response = 0.3 * b**2 - b + 2
    np.testing.assert_allclose(full @ response[nodes], response, atol=1e-12)


@pytest.mark.parametrize("by_mean", [False, True])
def test_raced_effects_have_the_top_of_the_full_table(by_mean):
    case = sample_case()
    sites = case.experiment.sites
    (item,) = case.properties
    clean = case.splits.repair.take(slice(0, 60))
    bad = item.evidence("repair").bad.take(slice(0, 60))
    full = [average_causal_effects(case.experiment, site, clean, bad, item.response, 8) for site in sites]
    raced = raced_effects(case.experiment, sites, clean, bad, item.response, 8, 1, Rules(5), by_mean)
    assert_same_top(raced, [one.by_mean() if by_mean else one for one in full], 5)


@pytest.mark.parametrize("with_twins", [True, False])
def test_raced_exchanges_have_the_top_of_the_full_table(with_twins):
    case = sample_case()
    sites = case.experiment.sites
    (item,) = case.properties
    evidence = item.evidence("repair")
    clean, bad, twins = (part.take(slice(0, 60)) for part in (case.splits.repair, evidence.bad, evidence.twins))
    twins = twins if with_twins else None
    full = [interchange_effects(case.experiment, site, clean, bad, twins, item.margin) for site in sites]
    raced = raced_exchanges(case.experiment, sites, clean, bad, twins, item.margin, 1, Rules(5))
    assert_same_top(raced, full, 5)


def assert_same_top(raced, full, top: int) -> None:
    exact = np.concatenate([item.scores for item in full])
    found = np.concatenate([item.finalists for item in raced])
    assert found.sum() == top
    # Who is about as good as the last of the top may stand for it: a race asks for few of the values.
    assert (exact[found] >= np.sort(exact)[-top] * 0.9 - 1e-9).all()
    assert found[np.argsort(-exact)[: top // 2]].all()
    for one, other in zip(raced, full, strict=True):
        assert one.locator == other.locator
        np.testing.assert_array_equal(one.dead, other.dead)
        assert not one.scores[one.dead].any()
        ranked = one.ranking()
        assert one.finalists[ranked[: one.finalists.sum()]].all()
