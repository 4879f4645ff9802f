"""Choosing between candidates: on outcomes made up for it, against the rules spelled out in plain loops."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph.models import build, random
from helpers import CARRIERS, Paths, dense, write_case
from kinds import opened
from onnx import numpy_helper

from onnxcare.case import Case
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.patch import Patch
from onnxcare.panel import Outcome
from onnxcare.repair import auto
from onnxcare.repair.base import Candidate, Edit, Found, Proposals
from onnxcare.repair.bench import patched_outcome
from onnxcare.repair.choice import best_of, choose, edit_of, fits, pareto_front, sized

Array = np.ndarray
CHANCE = "The best change cannot be told from chance on validation data (paired test, p = 0.062)."


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return opened(write_case(tmp_path_factory.mktemp("tiny")).spec)


def parameters(case: Case) -> dict[str, Parameter]:
    return {p.name: p for layer in case.experiment.layers for p in (layer.weight, layer.bias)}


def outcome(
    excess: float = 0.0,
    accuracy: float = 0.0,
    recall: float = 0.0,
    broken: float = 0.0,
    drift: float = 0.01,
    violation: float = 0.0,
    strain: float | None = None,
    luck: float | None = 1e-6,
) -> Outcome:
    kept = 0.4 if violation == 0 else 2.0
    return Outcome((excess,), accuracy, recall, broken, drift, 0.0, violation, kept if strain is None else strain,
                   luck=luck)  # fmt: skip


BEFORE = Candidate("no change", outcome(0.9, drift=0.5, violation=0.9, luck=1.0))


def found(case: Case, label: str, how: Outcome, size: int, rank_of: int = 1) -> Found:
    """Return a candidate that changes so many values, of the second weight, [4, 16], in so many rows."""
    weight = parameters(case)["second.weight"]
    new = case.read(weight).copy()
    for row in range(rank_of):
        new[row, : size // rank_of] += 1 + np.arange(size // rank_of) * (row + 1)
    return Found(Candidate(label, how), lambda: {weight: new})


# -- the rules -----------------------------------------------------------------------------------


def test_the_best_rank_leads(case):
    near, far, broken = outcome(drift=0.01), outcome(drift=0.3), outcome(0.2, drift=0.0, violation=0.2)
    offered = [found(case, "far", far, 3), found(case, "near", near, 9), found(case, "broken", broken, 1)]
    choice = choose(case, offered, BEFORE)
    assert choice.candidate.label == "near" and choice.note is None
    assert [item.label for item in choice.candidates] == ["far", "near", "broken"]
    assert [item.edit.values for item in choice.candidates] == [3, 9, 1]
    (new,) = choice.values.values()
    np.testing.assert_array_equal(new, next(iter(offered[1].make().values())))


@pytest.mark.parametrize("best", [outcome(0.9, drift=0.5, violation=0.9), outcome(0.95, drift=0.6, violation=0.95)])
def test_no_change_competes(case, best):
    choice = choose(case, [found(case, "other", best, 3)], BEFORE)
    assert choice.candidate is BEFORE
    assert choice.values == {} and choice.note is None
    assert [item.label for item in choice.candidates] == ["other"]


@pytest.mark.parametrize(
    ("luck", "chosen"), [(None, True), (0.0, True), (0.05, True), (0.0501, False), (0.0625, False), (1.0, False)]
)
def test_the_best_has_to_be_told_from_chance(case, luck, chosen):
    choice = choose(case, [found(case, "change", outcome(luck=luck), 3)], BEFORE)
    assert (choice.candidate.label == "change") is bool(choice.values) is chosen
    if luck == 0.0625:
        assert choice.note == CHANCE
    assert (choice.note is None) is chosen
    assert [item.label for item in choice.candidates] == ["change"]


def test_a_lesser_one_does_not_step_in_for_one_that_chance_may_have_made(case):
    lucky, worse = outcome(drift=0.01, luck=0.2), outcome(drift=0.4, luck=1e-9)
    choice = choose(case, [found(case, "lucky", lucky, 3), found(case, "worse", worse, 3)], BEFORE)
    assert choice.candidate is BEFORE and "p = 0.2)" in choice.note


def test_of_those_that_lose_nothing_the_smallest_edit_is_taken(case):
    best = outcome(0.01, 0.002, 0.01, 0.003, drift=0.010)
    offered = [
        found(case, "best", best, 12),
        found(case, "as good and smaller", replace(best, drift=0.0124), 8),
        found(case, "better and smaller still", replace(best, excess=(0.0,), accuracy_drop=-0.1, drift=0.0123), 6),
        found(case, "more misbehaviour", replace(best, excess=(0.011,)), 1),
        found(case, "less accuracy", replace(best, accuracy_drop=0.0021), 1),
        found(case, "less recall", replace(best, recall_drop=0.011), 1),
        found(case, "more broken", replace(best, broken=0.0031), 1),
        found(case, "farther away", replace(best, drift=0.0126), 1),
    ]
    assert choose(case, offered, BEFORE).candidate.label == "better and smaller still"
    assert choose(case, offered[:2] + offered[3:], BEFORE).candidate.label == "as good and smaller"
    assert choose(case, offered[:1] + offered[3:], BEFORE).candidate.label == "best"


def test_tiny_costs_are_all_alike(case):
    best = outcome(drift=1e-6)
    near, far = found(case, "near", outcome(drift=0.9e-3), 4), found(case, "far", outcome(drift=1.1e-3), 1)
    assert choose(case, [found(case, "best", best, 9), near, far], BEFORE).candidate.label == "near"


def test_of_equally_many_values_the_lower_rank_and_the_smaller_norm_decide(case):
    offered = [found(case, "rank 2", outcome(), 6, rank_of=2), found(case, "rank 1", outcome(), 6)]
    assert [sized(case, item, {}).candidate.edit.rank for item in offered] == [2, 1]
    assert choose(case, offered, BEFORE).candidate.label == "rank 1"
    weight = parameters(case)["second.weight"]
    (new,) = offered[1].make().values()
    nearer = {weight: (new + case.read(weight)) / 2}
    offered.append(Found(Candidate("nearer", outcome()), lambda: nearer))
    assert choose(case, offered, BEFORE).candidate.label == "nearer"


@pytest.mark.parametrize(
    ("most", "label"), [(64, "best"), (12, "best"), (11, "smaller"), (5, "smaller"), (4, "no change")]
)
def test_no_more_values_change_than_are_allowed(case, most, label):
    offered = [found(case, "best", outcome(), 12), found(case, "smaller", outcome(drift=0.2), 5)]
    limited = replace(case, max_changed=most)
    choice = choose(limited, offered, BEFORE)
    assert choice.candidate.label == label
    assert [item.label for item in choice.candidates] == [
        name for name, size in (("best", 12), ("smaller", 5)) if size <= most
    ]
    note = f"No change of at most {most} values was found; the smallest takes 5."
    assert choice.note == (note if label == "no change" else None)


def test_what_fits(case):
    edited = Candidate("a", outcome(), Edit(("t",), 7, 1, 0.1))
    assert fits(case, edited) and fits(case, BEFORE)
    assert fits(replace(case, max_changed=7), edited)
    assert not fits(replace(case, max_changed=6), edited)
    # A size that is not known may be too large.
    assert not fits(replace(case, max_changed=6), BEFORE)


def test_of_nothing_nothing_is_chosen(case):
    choice = choose(case, [], BEFORE)
    assert (choice.candidate, choice.values, list(choice.candidates), choice.note) == (BEFORE, {}, [], None)


# -- what is written -----------------------------------------------------------------------------


def test_tensors_that_stay_the_same_are_left_out(case):
    held = parameters(case)
    new = case.read(held["second.weight"]).copy()
    new[0, 0] += 1
    values = {
        held["first.weight"]: case.read(held["first.weight"]).astype(np.float64),
        # Less than its format can hold.
        held["first.bias"]: case.read(held["first.bias"]).astype(np.float64) + 1e-12,
        held["second.weight"]: new,
    }
    choice = choose(case, [Found(Candidate("one value", outcome()), lambda: values)], BEFORE)
    assert choice.candidate.edit.tensors == ("second.weight",)
    assert choice.candidate.edit.values == 1
    assert set(choice.values) == {held["second.weight"]}


def test_what_was_changed_before_counts_and_may_be_put_back(case):
    held = parameters(case)
    weight, bias = held["second.weight"], held["second.bias"]
    before = case.read(weight)
    moved = before.copy()
    moved[:, 0] += 1
    earlier = {weight: moved}
    current = case.patched(earlier)
    more = {bias: case.read(bias) + 1}
    behind = sized(current, Found(Candidate("more", outcome()), lambda: more), earlier)
    assert behind.candidate.edit.values == 8  # four of the weight, four of the bias
    assert set(behind.candidate.edit.tensors) == {"second.weight", "second.bias"}
    back = Found(Candidate("back", outcome()), lambda: {weight: before, **more})
    choice = choose(current, [back], BEFORE, earlier)
    assert choice.candidate.edit.values == 4 and choice.candidate.edit.tensors == ("second.bias",)
    np.testing.assert_array_equal(({**earlier, **choice.values})[weight], before)
    # A limit holds for all changes together.
    assert choose(replace(current, max_changed=7), [behind], BEFORE, earlier).candidate is BEFORE


# -- the size of an edit -------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 100.0])
def test_the_size_of_an_edit_by_hand(case, rank, size):
    held = parameters(case)
    weight, bias = held["first.weight"], held["second.bias"]
    rng = np.random.default_rng(rank)
    change = size * rng.normal(size=(16, rank)) @ rng.normal(size=(rank, 8))
    change[:, 5] = 0
    moved = np.float64([0, 0.5, 0, -0.25])
    # Rounded to the format of the file, a change of low rank has all ranks, but only just.
    new = (case.read(weight) + change).astype(np.float32)
    assert np.linalg.matrix_rank(new.astype(np.float64) - case.read(weight), tol=0) > rank
    edit = edit_of(case, {weight: new, bias: case.read(bias) + moved})
    assert edit.tensors == ("first.weight", "second.bias")
    assert edit.rank == rank
    untouched = (new == case.read(weight)).sum()
    assert untouched >= 16
    assert edit.values == 16 * 8 - untouched + 2
    before = np.concatenate([case.read(weight).ravel(), case.read(bias)])
    after = np.concatenate([new.ravel(), case.read(bias) + moved])
    assert edit.norm == pytest.approx(np.linalg.norm(after - before) / np.linalg.norm(before), rel=1e-6)


def test_the_rank_of_a_convolutions_change(tmp_path):
    """As the matrix [outputs, everything else]."""
    proto = build(
        """g (float[N, 2, 3, 3] x) => (float[N, 4] scores) {
            [conv] c = Conv (x, W1) r = Relu (c) f = Flatten (r) [fc] scores = MatMul (f, W2)
        }""",
        {"W1": random(5, 2, 2, 2), "W2": random(20, 4)},
    )
    x = random(400, 2, 3, 3)
    model = ort.InferenceSession(proto.SerializeToString())
    labels = model.run(None, {"x": x})[0].argmax(axis=1)
    labels[::4] = (labels[::4] + 1) % 4
    tmp_path.joinpath("model.onnx").write_bytes(proto.SerializeToString())
    np.savez(tmp_path / "data.npz", x=x, y=labels)
    tmp_path.joinpath("care.yaml").write_text("data: data.npz\nproperties: [{name: wrong, kind: errors}]\n")
    case = opened(tmp_path / "care.yaml")
    weight = case.experiment.layers[0].weight
    rng = np.random.default_rng(1)
    change = np.einsum("or,rcij->ocij", rng.normal(size=(5, 2)), rng.normal(size=(2, 2, 2, 2)))
    assert edit_of(case, {weight: case.read(weight) + change}).rank == 2


def test_the_size_is_measured_from_the_original(case):
    weight = parameters(case)["second.weight"]
    new = case.read(weight).copy()
    new[1, 2] += 1
    candidate = case.patched({weight: 2 * case.read(weight)})
    assert edit_of(candidate, {weight: new}) == edit_of(case, {weight: new})
    assert edit_of(candidate, {weight: new}).values == 1


def test_a_size_that_is_known_is_not_worked_out_again(case):
    known = Edit(("t",), 3, 2, 0.5)
    item = Found(Candidate("known", outcome(), known), lambda: pytest.fail("nobody should have asked"))
    assert sized(case, item, {}) is item


def test_the_size_is_what_the_file_tells(case, tmp_path):
    weight = parameters(case)["second.weight"]
    item = found(case, "some", outcome(), 6, rank_of=2)
    edit = sized(case, item, {}).candidate.edit
    before, after = (
        {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(source).graph.initializer}
        for source in (case.experiment.model.path.read_bytes(), Patch(item.make()).apply(case.experiment.model))
    )
    assert {name for name in before if (before[name] != after[name]).any()} == set(edit.tensors) == {weight.name}
    assert sum((before[name] != after[name]).sum() for name in before) == edit.values == 6


# -- the Pareto front ----------------------------------------------------------------------------


def points_of(candidate: Candidate) -> tuple[float, ...]:
    how = candidate.outcome
    misbehaviour = sum(item for item in how.excess if item > 0)
    return misbehaviour, how.accuracy_drop, how.recall_drop, candidate.edit.values if candidate.edit else 0


def beats(one: Candidate, other: Candidate) -> bool:
    pairs = list(zip(points_of(one), points_of(other), strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@pytest.mark.parametrize("seed", range(5))
def test_the_front_is_what_nobody_beats(seed):
    rng = np.random.default_rng(seed)
    candidates = [
        Candidate(
            str(number),
            replace(outcome(), excess=tuple(rng.integers(-1, 3, 2) / 10), accuracy_drop=rng.integers(0, 3) / 100,
                    recall_drop=rng.integers(0, 3) / 100),
            Edit(("t",), int(rng.integers(1, 4)), 1, 0.1),
        )
        for number in range(40)
    ]  # fmt: skip
    front = pareto_front([BEFORE, *candidates])
    unbeaten = [one for one in (BEFORE, *candidates) if not any(beats(other, one) for other in candidates)]
    # Of several that are equal in everything, there is one.
    assert {points_of(item) for item in front} == {points_of(item) for item in unbeaten}
    assert len(front) == len({points_of(item) for item in front})
    firsts = {}
    for item in unbeaten:
        firsts.setdefault(points_of(item), item)
    assert {item.label for item in front} == {item.label for item in firsts.values()}
    assert [points_of(item) for item in front] == sorted(points_of(item) for item in front)
    assert BEFORE in front  # nothing is smaller


def test_gains_below_the_baseline_are_none():
    lower, zero = (Candidate(name, outcome(value), Edit((), 3, 1, 0.1)) for name, value in (("a", -0.2), ("b", 0.0)))
    assert [item.label for item in pareto_front([zero, lower])] == ["b"]
    assert pareto_front([]) == []


# -- methods -------------------------------------------------------------------------------------


def test_a_method_gives_back_what_was_chosen(case):
    offered = [found(case, "good", outcome(), 9), found(case, "good and small", outcome(), 4)]
    offered.append(found(case, "bad", outcome(0.5, drift=0.2, violation=0.5), 6))
    repair = best_of("mine", case, offered, {"told": 1}, ["A note."])
    assert (repair.method, repair.chosen.label, repair.details) == ("mine", "good and small", {"told": 1})
    assert [item.label for item in repair.candidates] == ["no change", "good", "good and small", "bad"]
    assert repair.candidates[0].outcome == case.before and repair.candidates[0].edit is None
    assert [item.label for item in repair.front] == ["good and small", "no change"]
    assert list(repair.notes) == ["A note."]
    assert {parameter.name for parameter in repair.values} == {"second.weight"}


def test_a_method_tells_why_nothing_was_chosen(case):
    repair = best_of("mine", case, [found(case, "lucky", outcome(luck=0.0625), 9)], {}, ["A note."])
    assert repair.values == {} and repair.chosen is repair.candidates[0]
    assert list(repair.notes) == ["A note.", CHANCE]


# -- a real one ----------------------------------------------------------------------------------


@pytest.fixture
def few(tiny: Paths, monkeypatch: pytest.MonkeyPatch) -> Paths:
    """Let `auto` only know how to cut units off, those that carry the backdoor among them."""

    def cutting(case: Case) -> Proposals:
        weight = parameters(case)["second.weight"]
        offered = []
        for units in ((*CARRIERS, 15), CARRIERS, CARRIERS[:1]):
            new = case.read(weight).copy()
            new[:, list(units)] = 0
            values: Mapping[Parameter, Array] = {weight: new}
            how = patched_outcome(case, values, case.panel("validation"))
            offered.append(Found(Candidate(f"{len(units)} units", how), lambda values=values: values))
        return Proposals(offered)

    strategy = SimpleNamespace(__name__="onnxcare.repair.own", applies=lambda case: True, propose=cutting)
    monkeypatch.setattr(auto, "_STRATEGIES", [strategy])
    return tiny


def test_the_smallest_of_the_real_ones(few):
    case = opened(few.spec)
    repair = auto.repair(case)
    carried = dense().graph
    weight = next(numpy_helper.to_array(t) for t in carried.initializer if t.name == "second.weight")
    assert repair.chosen.label == "3 units"
    assert repair.chosen.edit.values == np.count_nonzero(weight[:, CARRIERS]) == 3
    assert repair.chosen.edit.tensors == ("second.weight",)
    by_label = {item.label: item for item in repair.candidates}
    assert by_label["3 units"].outcome.luck < 1e-9
    assert by_label["1 units"].edit.values == 1
    limited = auto.repair(replace(case, max_changed=2))
    assert all(item.edit is None or item.edit.values <= 2 for item in limited.candidates)
