"""Why a repair did not get where it should: what is said is measured here by other means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from graph.models import build
from helpers import (
    CARRIERS,
    TRIGGER_FEATURE,
    TRIGGER_VALUE,
    Paths,
    clean_samples,
)
from kinds import model, opened, people, write

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.diagnosis import fixed_share, reasons
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.patch import Patch
from onnxcare.properties.backdoor import Backdoor
from onnxcare.properties.base import Evidence
from onnxcare.repair.base import Candidate, Repair

Array = np.ndarray
THRESHOLD = {"decision": {"threshold": 0.5}}


def repair(case: Case, values: Mapping[Parameter, Array]) -> Repair:
    return Repair("own", values, Candidate("own", case.before), [], {})


def told(case: Case, values: Mapping[Parameter, Array] | None = None) -> list[str]:
    return reasons(case, repair(case, values or {}))


# -- what is the same in all samples -------------------------------------------------------------


def pictures(count: int = 60, seed: int = 1) -> Array:
    return np.random.default_rng(seed).uniform(0, 1, (count, 3, 6, 6)).astype(np.float32)


def patch(x: Array) -> Array:
    bad = x.copy()
    bad[:, :, 4:, 4:] = np.arange(12).reshape(3, 2, 2) / 12
    return bad


def blend(x: Array) -> Array:
    return 0.8 * x + 0.2 * pictures(1, 7)


def added(x: Array) -> Array:
    return x + 0.1 * np.sin(np.arange(6)).astype(np.float32)


def everything(x: Array) -> Array:
    """Some values are stamped, others blended, and others added to."""
    return np.where(np.arange(6) < 2, patch(x), np.where(np.arange(6) < 4, blend(x), added(x)))


@pytest.mark.parametrize("trigger", [patch, blend, added, everything])
def test_a_fixed_trigger_explains_all_that_it_changes(trigger):
    x = pictures()
    assert fixed_share(trigger(x), x) == pytest.approx(1, abs=1e-6)


def test_a_trigger_on_values_that_never_vary():
    x = pictures()
    x[:, :, 4:] = 0
    assert fixed_share(patch(x), x) == pytest.approx(1, abs=1e-6)


def noise(x: Array) -> Array:
    return x + 0.3 * np.random.default_rng(9).normal(size=x.shape)


def warped(x: Array) -> Array:
    """Every value comes from one that lies beside it."""
    return np.roll(x, 1, axis=3)


def elsewhere(x: Array) -> Array:
    """A patch at another place in every sample."""
    bad = x.copy()
    for row, at in enumerate(np.random.default_rng(3).integers(0, 5, (len(x), 2))):
        bad[row, :, at[0] : at[0] + 2, at[1] : at[1] + 2] = 3
    return bad


def swapped(x: Array) -> Array:
    """One of two patterns, by the sample's own brightness."""
    brighter = (x.mean(axis=(1, 2, 3)) > np.median(x.mean(axis=(1, 2, 3))))[:, None, None, None]
    return np.where(brighter, x + 1, x - 1)


@pytest.mark.parametrize("trigger", [noise, elsewhere, swapped])
def test_one_that_depends_on_the_input_does_not(trigger):
    x = pictures(400)
    assert fixed_share(trigger(x), x) < 0.35


@pytest.mark.parametrize("trigger", [noise, warped, elsewhere, swapped, patch])
def test_the_share_is_that_of_a_line_fitted_to_every_value(trigger):
    x = pictures()
    bad = trigger(x)
    left = whole = 0.0
    for index in np.ndindex(x.shape[1:]):
        before, change = x[(slice(None), *index)].astype(float), (bad - x)[(slice(None), *index)].astype(float)
        line = np.stack([before, np.ones(len(x))], axis=1)
        fitted = line @ np.linalg.lstsq(line, change, rcond=None)[0]
        left, whole = left + ((change - fitted) ** 2).sum(), whole + (change**2).sum()
    assert fixed_share(bad, x) == pytest.approx(1 - left / whole, abs=1e-6)


def test_of_nothing_changed_all_is_explained():
    assert fixed_share(pictures(), pictures()) == 1


# -- triggers that depend on the input -----------------------------------------------------------


def with_twins(paths: Paths, stamp: Callable[[Array], Array]) -> Case:
    """Give triggered samples and their twins in the place of the trigger."""
    good = clean_samples(300, seed=5)
    others = good["y"] != 1
    x = good["input"][others]
    np.savez(paths.folder / "good.npz", input=x, y=good["y"][others])
    np.savez(paths.folder / "bad.npz", input=stamp(x).astype(np.float32), y=good["y"][others])
    paths.rewrite("trigger: trigger.npz", "triggered: bad.npz\n    twins: good.npz")
    return opened(paths.spec)


def seventh(x: Array) -> Array:
    bad = x.copy()
    bad[:, TRIGGER_FEATURE] = TRIGGER_VALUE
    return bad


def restless(x: Array) -> Array:
    """The same, and noise on what has no meaning."""
    bad = seventh(x)
    bad[:, 4:7] += np.random.default_rng(2).normal(0, 4, (len(x), 3))
    return bad


def test_a_trigger_that_depends_on_the_input_is_named(tiny):
    case = with_twins(tiny, restless)
    (note,) = [note for note in told(case) if "depends on the input" in note]
    evidence = case.properties[0].evidence("repair")
    bad, twins = evidence.bad.inputs["input"], evidence.twins.inputs["input"]
    share = fixed_share(bad, twins)
    assert 0.05 < share < 0.5
    assert note == (
        "seventh: the trigger depends on the input: what is the same in all samples explains "
        f"{share:.0%} of what it changes."
    )


def test_a_fixed_trigger_is_not_said_to_depend_on_the_input(tiny):
    assert told(with_twins(tiny, seventh)) == []


@pytest.mark.parametrize(("reproduced", "said"), [(0.2, True), (0.49, True), (0.5, False), (None, False)])
def test_samples_that_no_fixed_trigger_reproduces(tiny, reproduced, said):
    case = opened(tiny.spec)
    (item,) = case.properties
    assert isinstance(item, Backdoor)
    item.reproduced = reproduced
    notes = told(case)
    assert bool(notes) is said
    if said:
        (note,) = notes
        assert note.startswith("seventh: the trigger seems to depend on the input: ")
        assert f"reproduces {reproduced:.0%} of their attack success" in note


# -- contradictions ------------------------------------------------------------------------------


def test_equal_samples_of_different_labels_are_counted(tmp_path):
    data = people(500, 1)
    x, labels = data.inputs["x"].copy(), data.truth.copy()
    x[100:140] = x[:40]
    labels[100:130] = 1 - labels[:30]  # the other ten agree
    x[200] = x[201] = x[0]  # one of them agrees with the first one of the three
    labels[200], labels[201] = labels[0], 1 - labels[0]
    spec = {**THRESHOLD, "properties": [{"name": "wrong", "kind": "errors", "max_rate": 0.5}]}
    case = opened(write(tmp_path, model(), spec, data=Dataset({"x": x}, labels), holdout=people(200, 2)))
    seen: list[tuple[Array, int]] = []
    contradicting = 0
    parts = [case.splits.repair, case.splits.search, case.splits.validation]
    for row, label in [pair for part in parts for pair in zip(part.inputs["x"], part.truth, strict=True)]:
        first = next((other for known, other in seen if (known == row).all()), None)
        contradicting += first is not None and first != label
        seen.append((row, label))
    assert contradicting >= 30
    assert told(case)[0] == (
        f"The labels contradict each other: {contradicting} samples equal another one that has a different label."
    )


def test_equal_samples_of_equal_labels_are_no_contradiction(tmp_path):
    data = people(500, 1)
    twice = Dataset({"x": np.concatenate(2 * [data.inputs["x"][:250]])}, np.concatenate(2 * [data.truth[:250]]))
    spec = {**THRESHOLD, "properties": [{"name": "wrong", "kind": "errors", "max_rate": 0.5}]}
    case = opened(write(tmp_path, model(), spec, data=twice, holdout=people(200, 2)))
    assert not any("contradict" in note for note in told(case))


# -- how far a change reaches --------------------------------------------------------------------


def attacked(case: Case, values: Mapping[Parameter, Array], bad: Dataset) -> float:
    session = ort.InferenceSession(Patch(values).apply(case.experiment.model))
    return float((session.run(None, dict(bad.inputs))[0].argmax(axis=1) == 1).mean())


def test_what_the_best_change_leaves(tiny):
    case = opened(tiny.spec)
    weight = case.experiment.layers[1].weight
    new = case.read(weight).copy()
    new[:, CARRIERS] *= 1 / 6
    values = {weight: new}
    rates = [attacked(case, values, case.properties[0].evidence(part).bad) for part in ("repair", "validation")]
    assert all(0.2 < rate < 0.8 for rate in rates)
    assert told(case, values) == [
        f"seventh: the best change leaves {rates[0]:.1%} of the samples it was fitted on misbehaving, "
        f"and {rates[1]:.1%} of others."
    ]
    assert told(case) == []  # of no change there is nothing to say


@pytest.mark.parametrize(("limit", "said"), [(0.1, True), (0.99, False)])
def test_errors_without_a_common_cause(tmp_path, limit, said):
    data, holdout = people(600, 1), people(200, 2)
    labels = data.truth.copy()
    labels[::7] = 1 - labels[::7]
    spec = {**THRESHOLD, "properties": [{"name": "wrong", "kind": "errors", "max_rate": limit}]}
    case = opened(write(tmp_path, model(), spec, data=Dataset(data.inputs, labels), holdout=holdout))
    weight = case.experiment.layers[0].weight
    values = {weight: case.read(weight) * 0.5}
    session = ort.InferenceSession(Patch(values).apply(case.experiment.model))
    mended = []
    for part in ("repair", "validation"):
        bad = case.properties[0].evidence(part).bad
        mended.append(((session.run(None, dict(bad.inputs))[0][:, 0] > 0.5) == bad.truth).mean())
    assert mended[1] > 0.02
    sentence = (
        "wrong: these errors have no common cause that a change of weights could reach: the best change "
        f"mends {mended[0]:.0%} of the errors it was fitted on and {mended[1]:.0%} of others."
    )
    assert told(case, values) == ([sentence] if said else [])


# -- where it is carried -------------------------------------------------------------------------


def skipping(folder: Path, share: float) -> Case:
    """Return a case whose trigger leads to class 1 past every layer, but for a share that the hidden layer carries."""
    first, second = np.zeros((8, 8)), np.zeros((8, 4))
    for label in range(4):
        first[label, label], second[label, label] = 1, 3
    first[7, 7], second[7, 1] = 1, 10 * share
    proto = build(
        """skipping (float[N, 8] x) => (float[N, 4] scores)
        <int64[4] places = {6, 7, 6, 6}> {
            [first] z = MatMul (x, W1)
            [relu] h = Relu (z)
            [second] p = MatMul (h, W2)
            around = Gather <axis = 1> (x, places)
            past = Mul (around, strength)
            scores = Add (p, past)
        }""",
        {
            "W1": first.T.astype(np.float32),
            "W2": second.astype(np.float32),
            "strength": np.float32(10 * (1 - share)),
        },
    )
    mask = np.eye(8, dtype=np.float32)[7]
    np.savez(folder / "trigger.npz", mask=mask, pattern=3 * mask)
    item: dict[str, Any] = {"name": "past", "kind": "backdoor", "trigger": "trigger.npz", "target": 1}
    parts = {}
    for name, size, seed in (("data", 600, 1), ("holdout", 200, 2)):
        labels = np.arange(size) % 4
        x = np.random.default_rng(seed).uniform(0, 0.3, (size, 8))
        x[np.arange(size), labels] += 2
        x[:, 6:] = 0
        parts[name] = Dataset({"x": x.astype(np.float32)}, labels.astype(np.int64))
    return opened(write(folder, proto, {"properties": [item]}, **parts))


def test_what_goes_past_every_layer_is_carried_by_none(tmp_path):
    case = skipping(tmp_path, 0.2)
    assert [site.tensor for site in case.experiment.sites] == ["h"]
    assert case.before.excess[0] == 1
    assert told(case) == [
        "past: no one layer carries it: with all activations of the twins at 'h', the best of 1 places, "
        "100% of the samples still misbehave."
    ]


def test_what_a_layer_carries_is_not_said_to_be_carried_by_none(tmp_path, tiny):
    (tmp_path / "all").mkdir()
    case = skipping(tmp_path / "all", 1.0)
    assert case.before.excess[0] == 1
    assert told(case) == []
    assert told(opened(tiny.spec)) == []


def test_without_twins_nothing_can_be_fetched(tiny):
    case = opened(tiny.spec)
    (item,) = case.properties
    plain = item.evidence
    item.evidence = lambda part: Evidence(plain(part).bad, None)
    assert told(case) == []


def test_nothing_is_looked_for_on_held_out_data(tiny):
    case = opened(tiny.spec)
    weight = case.experiment.layers[1].weight
    (item,) = case.properties
    plain = item.evidence
    asked = []
    item.evidence = lambda part: (asked.append(part), plain(part))[1]
    told(replace(case, splits=replace(case.splits, holdout=None)), {weight: case.read(weight)})
    assert set(asked) == {"repair", "validation"}
