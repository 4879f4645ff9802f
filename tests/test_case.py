"""The case: panels, candidates on the table and fresh evidence."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from helpers import CARRIERS, Paths, answers

from onnxcare.case import Case
from onnxcare.data import joined
from onnxcare.experiment import Experiment
from onnxcare.graph.patch import Patch
from onnxcare.prepare import prepare
from onnxcare.properties.base import Evidence


@pytest.fixture
def case(tiny: Paths) -> Case:
    return prepare(tiny.model, tiny.spec, None, "cpu", None, lambda text: None).case


def cut(case: Case, *units: int) -> dict:
    """Return weights of the second layer with units of the hidden layer cut off."""
    layer = case.experiment.layers[1]
    weight = case.read(layer.weight).copy()
    weight[:, list(units)] = 0
    return {layer.weight: weight}


# -- panels --------------------------------------------------------------------------------------


def test_a_panel_is_made_once(case):
    panel = case.panel("search")
    assert case.panel("search") is panel
    assert case.panel("search", 10) is case.panel("search", 10) is not panel
    assert case.panel("validation") is not panel
    assert len(panel.clean) == len(case.splits.search) == 120


def test_the_held_out_part_is_for_the_judge_alone(case):
    for held in (case, case.patched(cut(case, 0))):
        with pytest.raises(ValueError, match="judge"):
            held.panel("holdout")


# -- candidates ----------------------------------------------------------------------------------


def test_a_patched_case_works_on_the_candidate(case, tiny):
    values = cut(case, *CARRIERS)
    candidate = case.patched(values)
    (parameter, weight), *_ = values.items()
    np.testing.assert_array_equal(candidate.read(parameter), weight)
    assert (case.read(parameter) != weight).any()
    x = case.splits.holdout.inputs
    tiny.out.write_bytes(Patch(values).apply(case.experiment.model))
    np.testing.assert_array_equal(candidate.experiment.scores(x).argmax(axis=1), answers(tiny.out, x["input"]))
    for name in ("splits", "properties", "keep", "seed", "progress"):
        assert getattr(candidate, name) is getattr(case, name)


def test_a_patched_case_is_still_compared_with_the_original(case):
    assert case.original is None
    candidate = case.patched(cut(case, *CARRIERS))
    assert candidate.original is case.experiment
    assert case.before.excess == (1.0,)
    assert candidate.before.excess == (0.0,)
    assert case.before.drift == 0
    # A harmful further change: everything is counted from the original on, not from the candidate.
    further = candidate.patched(cut(candidate, 0, 1, 2, 3))
    assert further.original is case.experiment
    assert not further.read(case.experiment.layers[1].weight)[:, [*CARRIERS, 0, 1, 2, 3]].any()
    labels = case.splits.validation.truth
    right = [item.experiment.scores(case.splits.validation.inputs).argmax(axis=1) == labels for item in (case, further)]
    assert further.before.accuracy_drop == pytest.approx(right[0].mean() - right[1].mean())
    assert further.before.accuracy_drop > 0.1 and further.before.drift > 0.1


@pytest.mark.parametrize("first", [True, False])
def test_panels_of_a_candidate_hold_the_originals_answers(case, first):
    """Whichever of the two asks first."""
    candidate = case.patched(cut(case, *CARRIERS, 0, 1))
    asked = (case, candidate) if first else (candidate, case)
    panels = [item.panel("validation") for item in asked]
    assert panels[0] is panels[1]
    scores = case.experiment.scores(case.splits.validation.inputs).astype(np.float64)
    np.testing.assert_allclose(np.diff(panels[0].reference, axis=1), np.diff(scores, axis=1), atol=1e-6)


def test_no_change_is_the_same_model(case):
    assert case.patched({}).before == case.before


# -- fresh evidence ------------------------------------------------------------------------------


def hunted(case: Case, counts: list[int], monkeypatch: pytest.MonkeyPatch) -> list[Experiment]:
    """Let every hunt bring so many samples of the search part into the validation part; return what was hunted on."""
    (item,) = case.properties
    asked: list[Experiment] = []
    known = {part: item.evidence(part) for part in ("repair", "search", "validation")}

    def hunt(experiment: Experiment) -> int:
        count = counts[len(asked)]
        asked.append(experiment)
        old, fresh = known["validation"], known["search"]
        bad, twins = (part.take(slice(0, count)) for part in (fresh.bad, fresh.twins))
        known["validation"] = Evidence(joined(old.bad, bad), joined(old.twins, twins))
        return count

    monkeypatch.setattr(item, "hunt", hunt, raising=False)
    monkeypatch.setattr(item, "evidence", known.__getitem__)
    return asked


def test_what_a_hunt_finds_is_laid_out_in_new_panels(case, monkeypatch):
    asked = hunted(case, [7, 0, 0], monkeypatch)
    candidate = case.patched(cut(case, *CARRIERS))
    panel, search = candidate.panel("validation"), candidate.panel("search", 5)
    before = len(panel.evidence[0].bad)
    assert candidate.hunt() == 7
    assert asked == [candidate.experiment]
    for item in (case, candidate, candidate.patched({})):
        found = item.panel("validation")
        assert found is not panel and found is case.panel("validation")
        assert len(found.evidence[0].bad) == len(found.evidence[0].twins) == before + 7
        assert found.bad == (slice(180, 180 + before + 7),)
        assert len(found.goals[0]) == before + 7
    assert case.panel("search", 5) is not search
    # Nothing found, nothing forgotten.
    panel = case.panel("validation")
    assert candidate.hunt() == case.hunt() == 0
    assert asked[1:] == [candidate.experiment, case.experiment]
    assert case.panel("validation") is panel


def test_every_property_hunts(case, monkeypatch):
    (item,) = case.properties
    hunted(case, [2, 3], monkeypatch)
    assert replace(case, properties=[item, item]).hunt() == 5


def test_most_properties_know_all_their_evidence_from_the_start(case):
    panel = case.panel("validation")
    assert case.hunt() == 0
    assert case.panel("validation") is panel
