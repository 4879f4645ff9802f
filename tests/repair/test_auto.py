"""The default method: which strategies it asks, in which order, and what it does with their offers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnxruntime as ort
import pytest
from cases import BLEND, SQUARE, auto_repaired, sample_case
from helpers import CARRIERS, TRIGGER_FEATURE, Paths

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.patch import Patch
from onnxcare.panel import Outcome, Panel
from onnxcare.prepare import prepare
from onnxcare.repair import auto
from onnxcare.repair.base import Candidate, Found, Proposals, Values
from onnxcare.repair.bench import patched_outcome

# -- on the sample models ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "folder", [pytest.param(SQUARE, id=SQUARE.name), pytest.param(BLEND, id=BLEND.name, marks=pytest.mark.slow)]
)
def test_the_patched_file_does_what_was_measured(folder):
    case, found = sample_case(folder), auto_repaired(folder)
    panel = case.panel("validation")
    session = ort.InferenceSession(Patch(found.values).apply(case.experiment.model))
    scores = session.run(None, dict(panel.inputs))[0]
    if folder == BLEND:  # this one answers probabilities
        scores = np.log(np.maximum(scores, 1e-30))
    outcome = panel.outcomes(scores[None])[0]
    assert outcome.excess == found.chosen.outcome.excess
    np.testing.assert_allclose(outcome.cost, found.chosen.outcome.cost, rtol=1e-2, atol=1e-5)
    assert outcome.violation == 0


def test_the_best_of_all_candidates_is_chosen():
    found = auto_repaired(SQUARE)
    assert found.method == "auto"
    assert found.candidates[0].label == "no change"
    assert found.candidates[0].outcome == sample_case().before
    assert found.chosen in found.candidates
    best = min((candidate.outcome for candidate in found.candidates), key=lambda outcome: outcome.rank)

    def counted(outcome: Outcome) -> tuple[float, ...]:
        return (*outcome.excess, outcome.accuracy_drop, outcome.recall_drop, outcome.broken)

    def loses_nothing(outcome: Outcome) -> bool:
        worse = any(mine > other for mine, other in zip(counted(outcome), counted(best), strict=True))
        return not worse and (outcome.cost <= 1.25 * best.cost or outcome.cost <= best.cost + 1e-3)

    # It does all that the best one does, and no smaller one does.
    alike = [item for item in found.candidates[1:] if loses_nothing(item.outcome)]
    assert found.chosen in alike and len(alike) > 1
    sizes = [(item.edit.values, item.edit.rank, item.edit.norm) for item in alike]
    edit = found.chosen.edit
    assert (edit.values, edit.rank, edit.norm) == min(sizes)
    before = {parameter: sample_case().read(parameter) for parameter in found.values}
    assert edit.values == sum(
        np.count_nonzero(new.astype(np.float32) != before[parameter]) for parameter, new in found.values.items()
    )
    assert set(edit.tensors) == {parameter.name for parameter in found.values}
    assert found.chosen.outcome.luck < 1e-9
    assert found.candidates[0] in found.front or best.cost == 0
    (only,) = found.details["rounds"]
    assert set(only) == {"directions"}
    assert found.notes == []


@pytest.mark.slow
def test_same_seed_same_bytes():
    case = sample_case()
    again = auto.repair(sample_case.__wrapped__())
    first, second = (Patch(found.values).apply(case.experiment.model) for found in (auto_repaired(SQUARE), again))
    assert first == second


# -- with strategies of our own ------------------------------------------------------------------

Propose = Callable[[Case], Proposals]


@pytest.fixture
def case(tiny: Paths) -> Case:
    return prepare(tiny.model, tiny.spec, None, "cpu", None, lambda text: None).case


def strategies(monkeypatch: pytest.MonkeyPatch, **proposals: Propose) -> None:
    """Let `auto` know these strategies alone."""
    found = [
        SimpleNamespace(__name__=f"onnxcare.repair.{name}", applies=lambda case: True, propose=propose)
        for name, propose in proposals.items()
    ]
    monkeypatch.setattr(auto, "_STRATEGIES", found)


def without(case: Case, *units: int, label: str = "cut", rest: float = 1.0) -> Found:
    """Return a candidate that cuts units of the hidden layer off: some or all of those that carry the backdoor.

    So much of the others that carry it is left: at a sixth of all of it, half of the triggered samples are mended.
    """
    layer = case.experiment.layers[1]
    weight = case.read(layer.weight).copy()
    weight[:, CARRIERS] *= rest
    weight[:, list(units)] = 0
    values = {layer.weight: weight}
    outcome = patched_outcome(case, values, case.panel("validation"))
    return Found(Candidate(label, outcome), lambda: values)


def cutting(*units: int, label: str = "cut", rest: float = 1.0) -> Propose:
    return lambda case: Proposals([without(case, *units, label=label, rest=rest)], {"units": list(units)})


def never(case: Case) -> Proposals:
    raise AssertionError("nobody should have asked")


def failing(error: Exception) -> Propose:
    def propose(case: Case) -> Proposals:
        raise error

    return propose


def test_what_keeps_every_limit_ends_the_round(case, monkeypatch):
    strategies(monkeypatch, first=cutting(CARRIERS[0]), second=cutting(*CARRIERS, label="all"), third=never)
    found = auto.repair(case)
    assert found.chosen.label == "all"
    assert found.chosen.outcome.violation == 0
    assert [item.label for item in found.candidates] == ["no change", "cut", "all"]
    assert found.details["rounds"] == [{"first": {"units": [12]}, "second": {"units": [12, 13, 14]}}]
    (weight,) = found.values.values()
    assert not weight[:, CARRIERS].any() and weight[:, 0].any()


def test_what_keeps_every_limit_but_only_just_does_not_end_the_round(case, monkeypatch):
    """Further ones may keep them with ease, but those that take long are not asked any more."""
    just = without(case, *CARRIERS, label="just")
    outcome = replace(just.candidate.outcome, strain=0.9)
    just = replace(just, candidate=replace(just.candidate, outcome=outcome))
    strategies(monkeypatch, first=lambda case: Proposals([just]), second=cutting(0, label="harmful"), third=never)
    monkeypatch.setattr(auto, "_COSTLY", (auto._STRATEGIES[2],))
    found = auto.repair(case)
    assert set(found.details["rounds"][0]) == {"first", "second"}
    assert found.chosen.label == "just"


def test_those_that_take_long_are_asked_where_no_other_one_keeps_the_limits(case, monkeypatch):
    strategies(monkeypatch, first=cutting(12, label="one"), second=cutting(*CARRIERS, label="all"))
    monkeypatch.setattr(auto, "_COSTLY", (auto._STRATEGIES[1],))
    assert auto.repair(case).chosen.label == "all"


@pytest.mark.parametrize(("most", "label"), [(3, "large"), (2, "small"), (0, "no change")])
def test_what_changes_too_many_values_does_not_end_the_round(case, monkeypatch, most, label):
    def small(case: Case) -> Proposals:
        found = without(case, *CARRIERS, label="small")
        weight = case.read(case.experiment.layers[1].weight).copy()
        weight[1, [12, 13]] *= [0, -1]  # two of the three values, one of them turned over
        values = {case.experiment.layers[1].weight: weight}
        outcome = patched_outcome(case, values, case.panel("validation"))
        assert outcome.excess[0] < 0.9 and outcome.luck < 0.05
        return Proposals([replace(found, candidate=Candidate("small", outcome), make=lambda: values)])

    strategies(monkeypatch, first=cutting(*CARRIERS, label="large"), second=small)
    found = auto.repair(replace(case, max_changed=most))
    assert found.chosen.label == label
    assert set(found.details["rounds"][0]) == ({"first"} if most == 3 else {"first", "second"})
    assert all(item.edit is None or item.edit.values <= most for item in found.candidates)
    assert (found.notes != []) == (most == 0)


def test_only_strategies_that_fit_are_asked(case, monkeypatch):
    strategies(monkeypatch, first=never, second=cutting(*CARRIERS))
    auto._STRATEGIES[0].applies = lambda case: False
    assert set(auto.repair(case).details["rounds"][0]) == {"second"}


@pytest.mark.parametrize("error", [ModelError("no such tensor"), np.linalg.LinAlgError("singular")])
def test_another_strategy_may_do_without_what_one_needs(case, monkeypatch, error):
    strategies(monkeypatch, first=failing(error), second=cutting(*CARRIERS))
    found = auto.repair(case)
    assert found.chosen.outcome.violation == 0
    assert found.details["rounds"][0]["first"] == {"failed": str(error)}


def test_where_every_strategy_fails_a_reason_is_given(case, monkeypatch):
    strategies(monkeypatch, first=failing(ModelError("the reason")), second=failing(np.linalg.LinAlgError("singular")))
    with pytest.raises(ModelError, match=r"^the reason$"):
        auto.repair(case)
    strategies(monkeypatch, first=lambda case: Proposals())
    with pytest.raises(ModelError, match=r"model\.onnx: nothing is known that could repair such a property"):
        auto.repair(case)


def test_a_defect_is_not_taken_for_a_failure(case, monkeypatch):
    strategies(monkeypatch, first=failing(ZeroDivisionError()), second=cutting(*CARRIERS))
    with pytest.raises(ZeroDivisionError):
        auto.repair(case)


def test_no_change_competes(case, monkeypatch):
    strategies(monkeypatch, first=cutting(0, 1, label="harmful"))
    found = auto.repair(case)
    assert found.values == {}
    assert (found.chosen.label, found.chosen.outcome) == ("no change", case.before)
    assert [item.label for item in found.candidates] == ["no change", "harmful"]


def test_behind_a_strategy_that_settles_a_property_the_next_one_goes_on(case, monkeypatch):
    """The first one takes the backdoor out and breaks a class; the second one mends the class."""
    before = case.read(case.experiment.layers[1].weight)
    given_to_second = []

    def mending(given: Case) -> Proposals:
        given_to_second.append(given)
        layer = given.experiment.layers[1]
        weight = given.read(layer.weight).copy()
        weight[:, [2, 3]] = before[:, [2, 3]]
        values = {layer.weight: weight}
        outcome = patched_outcome(given, values, given.panel("validation"))
        return Proposals([Found(Candidate("mended", outcome), lambda: values)])

    rough = cutting(*CARRIERS, 2, 3, label="rough")
    outcome = rough(case).found[0].candidate.outcome
    assert outcome.excess[0] <= 0.01 and outcome.violation > 0
    strategies(monkeypatch, first=rough, second=mending, third=never)
    found = auto.repair(case)
    assert found.chosen.label == "rough; then mended"
    assert found.chosen.outcome.violation == 0
    assert len(found.details["rounds"]) == 1
    (given,) = given_to_second
    assert given.original is case.experiment and given.before == outcome
    (weight,) = found.values.values()
    assert not weight[:, CARRIERS].any()
    np.testing.assert_array_equal(weight[:, [2, 3]], before[:, [2, 3]])


def test_behind_a_strategy_that_settles_nothing_the_next_one_starts_from_the_beginning(case, monkeypatch):
    given_to_second = []

    def second(given: Case) -> Proposals:
        given_to_second.append(given)
        return cutting(*CARRIERS, label="all")(given)

    strategies(monkeypatch, first=cutting(12, 13, label="two"), second=second)
    assert auto.repair(case).chosen.label == "all"
    assert given_to_second == [case]


def test_another_way_to_the_same_end_begins_where_the_one_in_front_began(case, monkeypatch):
    """Whatever settles a property, the next one that is no alternative goes on from the last one that did."""
    given = []

    def watched(propose: Propose) -> Propose:
        return lambda case: (given.append(case), propose(case))[1]

    rough = watched(cutting(*CARRIERS, 2, 3, label="rough"))
    rougher = watched(cutting(*CARRIERS, 2, 3, 4, 5, label="rougher"))
    strategies(monkeypatch, first=rough, second=rougher, third=watched(cutting(0, label="on top")))
    monkeypatch.setattr(auto, "_ALTERNATIVE", (auto._STRATEGIES[1],))
    found = auto.repair(case)
    labels = [item.label for item in found.candidates]
    assert labels[:4] == ["no change", "rough", "rougher", "rougher; then on top"]
    assert given[0] is given[1] is case
    weight = given[2].read(case.experiment.layers[1].weight)
    assert given[2].original is case.experiment
    assert not weight[:, [*CARRIERS, 2, 3, 4, 5]].any() and weight[:, 0].any()


def by_round(*rounds: Propose) -> Propose:
    asked = iter(rounds)
    return lambda case: next(asked)(case)


def test_what_is_left_is_worked_on_in_the_next_round(case, monkeypatch):
    seen = []

    def watched(propose: Propose) -> Propose:
        def watching(given: Case) -> Proposals:
            seen.append((given, given.read(given.experiment.layers[1].weight)))
            return propose(given)

        return watching

    # Halfway first, and then the rest, which only finishes what has been begun.
    halfway, rest = cutting(12, 13, label="two", rest=0.5), cutting(14, label="the third")
    strategies(monkeypatch, any=by_round(watched(halfway), watched(rest)))
    before = case.read(case.experiment.layers[1].weight)
    found = auto.repair(case)
    assert found.chosen.label == "two; then the third"
    assert [item.label for item in found.candidates] == ["no change", "two", "the third"]
    assert found.chosen.outcome.violation == 0
    assert len(found.details["rounds"]) == 2
    (weight,) = found.values.values()
    assert not weight[:, CARRIERS].any()
    (first, at_first), (second, later) = seen
    assert first is case
    np.testing.assert_array_equal(at_first, before)
    assert not later[:, 12].any() and later[:, 14].any()
    # On the changed model, but compared with the original.
    assert second.original is case.experiment
    assert second.panel("validation") is case.panel("validation")
    assert second.before == found.candidates[1].outcome
    np.testing.assert_array_equal(case.read(case.experiment.layers[1].weight), before)


def test_a_round_that_finds_nothing_better_is_the_last(case, monkeypatch):
    strategies(monkeypatch, any=by_round(cutting(12, 13, label="two", rest=0.5), cutting(0, label="harmful"), never))
    found = auto.repair(case)
    assert found.chosen.label == "two"
    assert [item.label for item in found.candidates] == ["no change", "two", "harmful"]


def test_a_further_round_that_gains_little_is_not_taken(case, monkeypatch):
    def little(given: Case) -> Proposals:
        layer = given.experiment.layers[1]
        weight = given.read(layer.weight).copy()
        weight[:, CARRIERS] *= 0.95
        values = {layer.weight: weight}
        outcome = patched_outcome(given, values, given.panel("validation"))
        assert outcome.rank < given.before.rank and outcome.violation > 0
        return Proposals([Found(Candidate("little", outcome), lambda: values)])

    strategies(monkeypatch, any=by_round(cutting(12, 13, label="two", rest=0.5), little, never))
    assert auto.repair(case).chosen.label == "two"
    # A first round may gain little, if chance does not bring it about.
    first = cutting(label="a few", rest=0.25)
    outcome = first(case).found[0].candidate.outcome
    assert outcome.excess[0] > 0.9 and outcome.luck < 0.05
    strategies(monkeypatch, any=by_round(first, cutting(0, label="harmful"), never))
    assert auto.repair(case).chosen.label == "a few"


def test_what_chance_may_have_brought_about_is_no_change(case, monkeypatch):
    """It lowers the cost, but no sample is mended by it."""
    strategies(monkeypatch, any=by_round(cutting(12, label="one"), never))
    found = auto.repair(case)
    cost = found.candidates[1].outcome.cost
    assert found.candidates[1].label == "one" and cost < case.before.cost
    assert (found.chosen, found.values) == (found.candidates[0], {})
    (note,) = found.notes
    assert note == "The best change cannot be told from chance on validation data (paired test, p = 1)."


def test_rounds_end(case, monkeypatch):
    """Every round offers something better, and every search finds counterexamples."""

    def weaker(given: Case) -> Proposals:
        layer = given.experiment.layers[1]
        weight = given.read(layer.weight).copy()
        weight[:, CARRIERS] *= 0.15
        values = {layer.weight: weight}
        outcome = patched_outcome(given, values, given.panel("validation"))
        return Proposals([Found(Candidate("weaker", outcome), lambda: values)])

    case = without_limits(case)
    strategies(monkeypatch, any=weaker)
    asked = counterexamples(monkeypatch, case, [1] * 99)
    found = auto.repair(case)
    assert len(found.details["rounds"]) == len(asked) == auto._ROUNDS
    assert found.chosen.label == "; then ".join(auto._ROUNDS * ["weaker"])
    costs = [candidate.outcome.cost for candidate in found.candidates]
    assert costs == sorted(costs, reverse=True)
    (weight,) = found.values.values()
    before = case.read(case.experiment.layers[1].weight)
    np.testing.assert_allclose(weight[:, CARRIERS], 0.15**auto._ROUNDS * before[:, CARRIERS], rtol=1e-5)


def without_limits(case: Case) -> Case:
    """Return the case with a property that tolerates everything."""
    (item,) = case.properties
    item.max_rate = 1.0
    return case


def counterexamples(monkeypatch: pytest.MonkeyPatch, case: Case, counts: list[int]) -> list[int]:
    """Let the property find so many new counterexamples from round to round; return how often it was asked."""
    (item,) = case.properties
    found = iter(counts)
    asked: list[int] = []

    def hunt(experiment: object) -> int:
        asked.append(next(found))
        return asked[-1]

    monkeypatch.setattr(item, "hunt", hunt, raising=False)
    return asked


def test_counterexamples_of_a_fresh_search_lead_to_another_round(case, monkeypatch):
    case = without_limits(case)
    asked = counterexamples(monkeypatch, case, [3, 0])
    strategies(monkeypatch, any=by_round(cutting(12, label="one", rest=0.25), cutting(13, label="other"), never))
    panels: list[Panel] = []
    plain = Case.forget
    monkeypatch.setattr(Case, "forget", lambda self: (panels.append(self.panel("validation")), plain(self)))
    found = auto.repair(case)
    assert asked == [3, 0]
    assert found.chosen.label == "one; then other"
    # Panels are laid out anew, with what was found.
    assert len(panels) == 1 and case.panel("validation") is not panels[0]


def test_values_of_several_layers_add_up(case, monkeypatch):
    def first_layer(given: Case) -> Proposals:
        layer = given.experiment.layers[0]
        weight = given.read(layer.weight).copy()
        weight[CARRIERS, TRIGGER_FEATURE] *= 0.45
        values: Values = {layer.weight: weight}
        outcome = patched_outcome(given, values, given.panel("validation"))
        return Proposals([Found(Candidate("shrunk", outcome), lambda: values)])

    hunted = []
    monkeypatch.setattr(case.properties[0], "hunt", lambda experiment: hunted.append(experiment) or 0, raising=False)
    strategies(monkeypatch, any=by_round(first_layer, cutting(*CARRIERS, label="all"), never))
    found = auto.repair(case)
    assert {parameter.name for parameter in found.values} == {"first.weight", "second.weight"}
    panel = case.panel("validation")
    session = ort.InferenceSession(Patch(found.values).apply(case.experiment.model))
    outcome = panel.outcomes(session.run(None, dict(panel.inputs))[0][None])[0]
    assert outcome.cost == pytest.approx(found.chosen.outcome.cost, rel=1e-4)
    # What is left is looked for on the model with all the changes.
    for parameter, new in found.values.items():
        np.testing.assert_array_equal(hunted[-1].read(parameter), new)
