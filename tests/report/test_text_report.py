"""Results as text: the figures, the limits and the conclusion, and no accident with markup in names."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from cases import SQUARE
from rich.console import Console

import onnxcare
from onnxcare.measures import Finding, Gauge, Measure, Verdict
from onnxcare.panel import Outcome
from onnxcare.repair.base import Candidate, Edit
from onnxcare.report import text
from onnxcare.results import Check, Fix, LayerVotes, Location, Race, SavedTrigger, UnitScore


@pytest.fixture(scope="module")
def fix(tmp_path_factory) -> Fix:
    out = tmp_path_factory.mktemp("report") / "out.onnx"
    return onnxcare.fix(SQUARE / "model.onnx", SQUARE / "care.yaml", out, device="cpu")


def printed(show, result) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show(result, console)
    return console.export_text()


def test_a_repair_shows_rates_limits_and_the_file(fix):
    shown = printed(text.show_fix, fix)
    success = fix.verdict.properties[0].measure("attack success rate")
    for rate in (success.before, success.after):
        assert f"{100 * rate.value:.2f} % ({rate.count}/{rate.total})" in shown
    assert f"{100 * success.low:.2f} - {100 * success.high:.2f} %" in shown
    assert "<= 0.50" in shown
    assert "dense1.weight" in shown
    assert "fail" not in shown
    assert shown.rstrip().splitlines()[-1].startswith("repaired in")
    assert fix.output is not None
    assert fix.output in shown


CONCLUSIONS = {
    ("not repaired", None): "not repaired: nothing that was tried is better than no change, in 1.5 s; nothing was "
    "written",
    ("improved", None): "not repaired: improved, but not within the limits, in 1.5 s; nothing was written",
    ("improved", "o[1].onnx"): "not repaired: improved, but not within the limits, in 1.5 s; written all the same: "
    "o[1].onnx",
    ("repaired", "o[1].onnx"): "repaired in 1.5 s: o[1].onnx",
    ("nothing to repair", None): "nothing to repair: every property holds already; nothing was written (in 1.5 s)",
}


@pytest.mark.parametrize(("status", "output"), CONCLUSIONS)
def test_the_conclusion_stands_last(fix, status, output):
    ended = dataclasses.replace(fix, status=status, output=output, seconds=1.5)
    assert printed(text.show_fix, ended).rstrip().splitlines()[-1] == CONCLUSIONS[status, output]


def test_what_the_original_does_comes_first(fix):
    lines = printed(text.show_fix, fix).splitlines()
    table = next(index for index, line in enumerate(lines) if "Held-out data" in line)
    shown = " ".join(lines[:table])
    before = {item.name: item for item in fix.verdict.guards.measures}
    recalls = sorted((before[f"recall of class {label}"].before.value, str(label)) for label in range(10))
    worst = ", ".join(f"{label}: {100 * value:.1f}" for value, label in recalls)
    accuracy = before["accuracy"].before
    assert f"original, accuracy {100 * accuracy.value:.2f} %, recall by class in %, worst first: {worst}" in shown
    confusion = fix.verdict.properties[0].measure("clean confusion rate").before
    assert (
        f"original, white-square: clean confusion rate {100 * confusion.value:.2f} % ({confusion.count}/"
        f"{confusion.total})"
    ) in shown


def candidate(label: str, excess: float, drop: float, recall: float, edit: Edit | None) -> Candidate:
    return Candidate(label, Outcome((excess,), drop, recall, 0.0, 0.0, 0.0, 0.0, 0.0), edit)


def test_the_pareto_front(fix):
    front = [
        candidate("[b]all[/x]", -0.001, 0.0021, 0.05, Edit(("t",), 1234, 7, 0.5)),
        candidate("some", 0.25, -0.01, 0.0, Edit(("t",), 3, 1, 0.0321)),
        candidate("no change", 1.0, 0.0, 0.0, None),
    ]
    shown = printed(text.show_fix, dataclasses.replace(fix, front=front))
    assert "Pareto front on validation data, in points" in shown
    assert row(shown, "[b]all[/x]") == ["[b]all[/x]", "-0.10", "0.21", "5.00", "1234", "7", "0.5"]
    assert row(shown, "some") == ["some", "25.00", "-1.00", "0.00", "3", "1", "0.032"]
    assert row(shown, "no change") == ["no change", "100.00", "0.00", "0.00", "0", "0", "0"]
    header = next(line for line in shown.splitlines() if "candidate" in line and "┃" in line)
    assert [cell.strip() for cell in header.strip("┃").split("┃")] == [
        "candidate", "white-square above baseline", "accuracy drop", "worst recall drop", "values", "rank", "norm",
    ]  # fmt: skip
    # One alone is no choice.
    assert "Pareto" not in printed(text.show_fix, dataclasses.replace(fix, front=front[:1]))


def test_of_a_long_front_both_ends_and_some_between_are_shown(fix):
    front = [candidate(f"number {n};", n / 100, 0.0, 0.0, Edit(("t",), 99 - n, 1, 0.1)) for n in range(50)]
    shown = printed(text.show_fix, dataclasses.replace(fix, front=front))
    numbers = [int(part.partition(";")[0]) for part in shown.split("number ")[1:]]
    assert numbers == [0, 7, 14, 21, 28, 35, 42, 49]


def test_the_chosen_one_is_told_with_its_size(fix):
    chosen = candidate("[b]mine[/x]", 0.0, 0.0, 0.0, Edit(("t",), 12, 3, 0.0123))
    shown = printed(text.show_fix, dataclasses.replace(fix, chosen=chosen, candidates=[chosen] * 4))
    assert "chosen of 4 candidates: [b]mine[/x] (12 values of rank 3, relative norm 0.012)" in shown


def test_notes_of_the_repair_stand_in_front_of_the_conclusion(fix):
    noted = dataclasses.replace(fix, notes=["[b]One[/x].", "Two."], status="improved", output=None)
    *_, first, second, last = printed(text.show_fix, noted).rstrip().splitlines()
    assert (first, second) == ("note: [b]One[/x].", "note: Two.")
    assert last.startswith("not repaired: improved")


def test_names_with_brackets_are_printed_as_they_are(fix):
    finding = dataclasses.replace(fix.verdict.properties[0], name="[red]x[/nothing]")
    verdict = dataclasses.replace(fix.verdict, properties=(finding,))
    assert "[red]x[/nothing]" in printed(text.show_fix, dataclasses.replace(fix, verdict=verdict))


# -- measures ------------------------------------------------------------------------------------


def verdict(*measures: Measure, kept: tuple[Measure, ...] = ()) -> Verdict:
    return Verdict((Finding("p", "kind", measures, ("A note.",)),), Finding("kept", "guards", kept))


def check(found: Verdict, baseline: str | None = None) -> Check:
    return Check(None, "m.onnx", "care.yaml", baseline, 0.95, found, [], 1.25)


def happened(count: int, total: int) -> np.ndarray:
    return np.arange(total) < count


def row(shown: str, name: str) -> list[str]:
    """Return the cells of the row of a measure."""
    (line,) = [line for line in shown.splitlines() if line.startswith("│") and name in line]
    return [cell.strip() for cell in line.strip("│").split("│")]


def test_a_rate_its_interval_its_limit_and_its_mark():
    gauge = Gauge()
    found = verdict(
        gauge.rate("wrong", happened(3, 200), happened(9, 200), limit=0.01),
        gauge.rate("right", happened(199, 200), limit=0.9, higher_is_better=True),
        gauge.rate("of none", happened(0, 0)),
        gauge.points("gap", 0.0325, 0.05, limit=0.04, interval=(0.01, 0.06)),
        gauge.points("score", 0.25, None, unit="number"),
    )
    shown = printed(text.show_check, check(found, "base.onnx"))
    assert row(shown, "wrong") == ["p: wrong", "4.50 % (9/200)", "1.50 % (3/200)", "0.31 - 4.32 %", "<= 1.00 %", "fail"]
    assert row(shown, "right") == ["right", "", "99.50 % (199/200)", "97.25 - 99.99 %", ">= 90.00 %", "pass"]
    assert row(shown, "of none") == ["of none", "", "no samples", "", "", ""]
    assert row(shown, "gap") == ["gap", "5.00", "3.25", "1.00 - 6.00", "<= 4.00", "pass"]
    assert row(shown, "score") == ["score", "", "0.25", "", "", ""]
    assert "note: p: A note." in shown
    assert shown.rstrip().splitlines()[-1] == "failed in 1.2 s"
    assert "4.50 %" not in printed(text.show_check, check(verdict(gauge.rate("wrong", happened(3, 200)))))


def test_what_is_undecided_says_how_many_samples_would_do():
    gauge = Gauge(0.95)
    rate = gauge.rate("wrong", happened(0, 50), limit=0.01)
    assert rate.needed is not None
    shown = printed(text.show_check, check(verdict(rate, gauge.points("gap", 0.0, limit=0.1))))
    assert row(shown, "wrong")[-1] == "undecided"
    assert f"undecided: p: wrong: too few samples; {rate.needed:,} samples like these would decide" in shown
    assert "undecided: p: gap: too few samples\n" in shown
    assert shown.rstrip().splitlines()[-1].startswith("undecided, which is no pass")


def test_what_got_worse_than_chance_explains_is_named():
    gauge = Gauge()
    found = verdict(
        gauge.rate("clearly", happened(40, 200), happened(10, 200)),
        gauge.rate("by luck", happened(11, 200), happened(10, 200)),
        gauge.rate("better", happened(1, 200), happened(40, 200)),
    )
    shown = printed(text.show_check, check(found, "base.onnx"))
    (line,) = [line for line in shown.splitlines() if line.startswith("worse than the baseline")]
    assert line.startswith(
        "worse than the baseline: p: clearly, 5.00 % (10/200) -> 20.00 % (40/200) (paired test, p = "
    )


def recalls(gauge: Gauge, wrong: dict[int, int], before: bool, least: float | None = None) -> tuple[Measure, ...]:
    """Return the guards on four classes of 100 samples, of which so many are lost."""
    found = []
    for label in range(4):
        right, was = ~happened(wrong.get(label, 0), 100), np.ones(100, bool)
        found.append(
            gauge.rate(f"recall of class {label}", right, was if before else None, limit=least, higher_is_better=True)
        )
        if before:
            found.append(gauge.drop(f"recall drop of class {label}", was, right, 0.05))
    return tuple(found)


@pytest.mark.parametrize(
    ("wrong", "before", "least", "shown"),
    [
        ({1: 2, 2: 4}, True, None, ["recall of class 2", "recall drop of class 2"]),
        ({1: 7, 2: 9}, True, None, ["recall drop of class 1", "recall of class 2", "recall drop of class 2"]),
        ({1: 2, 2: 4}, False, None, ["recall of class 2"]),
        ({1: 7, 2: 9, 3: 2}, False, 0.95, ["recall of class 1", "recall of class 2"]),
        ({1: 3, 2: 4}, True, 0.965, ["recall of class 2", "recall drop of class 2"]),
    ],
)
def test_of_the_recalls_the_worst_and_all_that_fail_are_shown(wrong, before, least, shown):
    found = verdict(kept=recalls(Gauge(), wrong, before, least))
    lines = printed(text.show_check, check(found, "base.onnx" if before else None)).splitlines()
    assert [line.split("│")[1].strip() for line in lines if line.startswith("│ recall")] == shown


def test_measures_with_brackets_are_printed_as_they_are():
    name = "gap by [red]age[/nothing] [years]"
    gauge = Gauge(0.99)
    found = verdict(
        gauge.points("first", 0.0),
        gauge.rate(name, happened(40, 400), happened(1, 400), limit=0.11),
        kept=(gauge.rate(name, happened(0, 10), limit=0.1),),
    )
    shown = printed(text.show_check, check(found, "[bold]base[/nothing].onnx"))
    assert shown.count(name) == 5  # both in the table and among what is undecided, one among what got worse
    assert "[bold]base[/nothing].onnx" in shown


def test_location_lists_sites_and_units():
    location = onnxcare.locate(SQUARE / "model.onnx", SQUARE / "care.yaml", device="cpu", samples=30, values=3)
    shown = printed(text.show_location, location)
    assert location.units[0].site in shown
    assert f"{location.units[0].score:.4f}" in shown
    assert "more; --json lists all" in shown
    assert [unit.score for unit in location.units] == sorted((u.score for u in location.units), reverse=True)


def test_location_tells_how_far_votes_for_weights_got():
    located = onnxcare.inspect(SQUARE / "model.onnx").layers[0].name
    votes = [
        LayerVotes("[red]first[/nothing]", 12_544, 1_096, 20, 19, 0.00125, True),
        LayerVotes(located, 64, 6, 1_000, 200, 0.4, False),
        LayerVotes("nothing", 5, 0, 20, 0, 0.0, True),
    ]
    shown = printed(text.show_location, Location(None, "differential votes", [], [], votes, None))
    assert "Weights that had to go for the right answer, by layer" in shown
    assert row(shown, "first") == ["[red]first[/nothing]", "12,544", "1,096", "19 of 20", "0.12%", "gradient"]
    assert row(shown, located) == [located, "64", "6", "200 of 1000", "40.00%", "interventions"]
    # A share of nothing is none.
    assert row(shown, "nothing  ") == ["nothing", "5", "0", "0 of 20", "", "gradient"]
    assert "by layer" not in printed(text.show_location, Location(None, "interchange effect", [], [], [], None))


def test_location_tells_how_units_raced():
    rounds = [{"units": 1_200, "cases": 8}, {"units": 40, "cases": 16}, {"units": 10, "cases": 30}]
    units = [UnitScore("[b]site[/nothing]", unit, 1 / (1 + unit), 30_000 if unit < 3 else 8) for unit in range(30)]
    location = Location(None, "interchange effect", units, [], [], Race(3, 0.95, True, rounds))
    shown = printed(text.show_location, location)
    assert row(shown, "│    0 │") == ["[b]site[/nothing]", "0", "1.0000", "30,000"]
    assert row(shown, "│    3 │") == ["[b]site[/nothing]", "3", "0.2500", "8"]
    line, rest = shown.rstrip().splitlines()[-2:]
    assert line == (
        "Raced for the top 3 at 0.95 confidence (units on cases: 1200 on 8, 40 on 16, 10 on 30); "
        "--exact measures every unit on all of them."
    )
    assert rest == "and 10 more; --json lists all"
    assert "Raced" not in printed(text.show_location, dataclasses.replace(location, race=None))


@pytest.mark.parametrize(("confidence", "told"), [(0.9, "0.9"), (0.99999, "1"), (0.999, "0.999")])
def test_the_confidence_of_a_race_is_told(confidence, told):
    location = Location(None, "average causal effect", [], [], [], Race(10, confidence, False, []))
    assert f"Raced for the top 10 at {told} confidence" in printed(text.show_location, location)


def test_restored_triggers_stand_in_front_of_the_conclusion(fix):
    triggers = [
        SavedTrigger("hidden", 3, "restored patch", "out.trigger-3-1.npz", "out.trigger-3-1.png"),
        SavedTrigger("hidden", 3, "restored blend", "[b]out[/nothing].trigger-3-2.npz", None),
    ]
    *_, first, second, last = printed(text.show_fix, dataclasses.replace(fix, triggers=triggers)).rstrip().splitlines()
    assert first == "restored patch of class 3: out.trigger-3-1.npz, shown in out.trigger-3-1.png"
    assert second == "restored blend of class 3: [b]out[/nothing].trigger-3-2.npz"
    assert last.startswith("repaired in")
