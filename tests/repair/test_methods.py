"""Methods and locators by name, and every method on what every locator finds."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from helpers import Paths
from kinds import opened, patched, run

from onnxcare import repair
from onnxcare.errors import UsageError
from onnxcare.locators import LOCATORS, chosen
from onnxcare.repair import care, neuron_finetune

ABLE = [name for name in repair.METHODS if name not in repair.WITHOUT_LOCATOR]
# What candidates and reports call a locator's ranking of units.
NAMES = {
    "causal": "average causal effect",
    "interchange": "interchange effect",
    "differential": "differential votes",
}


@pytest.mark.parametrize("locator", LOCATORS)
@pytest.mark.parametrize("method", ABLE)
def test_every_method_goes_by_every_locator(tiny: Paths, monkeypatch: pytest.MonkeyPatch, method, locator):
    monkeypatch.setattr(care, "_GENERATIONS", 15)
    monkeypatch.setattr(neuron_finetune, "_STEPS", 60)
    case = opened(tiny.spec)
    found = repair.find(method, locator)(case)
    assert found.method == method
    assert len(found.candidates) > 1
    for candidate in found.candidates:
        for field in fields(candidate.outcome):
            assert np.isfinite(getattr(candidate.outcome, field.name)).all()
    assert found.chosen.outcome.rank == min(item.outcome.rank for item in found.candidates)
    assert found.chosen.outcome.cost < case.before.cost
    # What the file answers is what was measured.
    panel = case.panel("validation")
    answers = run(patched(case, found.values, tiny.out), panel.inputs)
    assert panel.outcomes(answers[None])[0].cost == pytest.approx(found.chosen.outcome.cost, rel=1e-3)
    # Nobody else had a say.
    if method == "care":
        assert {item["locator"] for item in found.details["selections"]} == {NAMES[locator]}
    else:
        said = {item.label.split(", by ")[1].split(", from")[0] for item in found.candidates[1:]}
        assert said <= {f"{NAMES[locator]}, units", "differential, weights"}
        assert ("differential, weights" in said) == (locator == "differential")
        assert bool(found.details["votes"]) == (locator == "differential")


def test_left_to_themselves_methods_go_by_their_own_locators(tiny: Paths):
    case = opened(tiny.spec)
    flip = repair.find("ai-lancet-flip")(case)
    asked = repair.find("ai-lancet-flip", "differential")(case)
    assert [item.label for item in flip.candidates] == [item.label for item in asked.candidates]
    assert chosen("auto") == LOCATORS and chosen("auto", ("causal",)) == ("causal",)
    assert [chosen(name) for name in LOCATORS] == [(name,) for name in LOCATORS]


def test_names_that_are_unknown_or_do_not_go_together_are_refused():
    with pytest.raises(
        UsageError, match=r"--method ai-lancet: unknown.*did you mean.*known: auto, care, ai-lancet-flip"
    ):
        repair.find("ai-lancet")
    with pytest.raises(UsageError, match=r"casual: unknown locator \(did you mean 'causal'\?\); known: auto, causal"):
        repair.find("care", "casual")
    with pytest.raises(UsageError, match=r"casual: unknown locator"):
        repair.find("auto", "casual")
    for locator in LOCATORS:
        with pytest.raises(UsageError, match="--method auto does not go by units") as caught:
            repair.find("auto", locator)
        assert all(name in str(caught.value) for name in ABLE)
