"""Pairs of a wrong and a right answer, against plain loops over what a plain session answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import build
from helpers import TARGET, TRIGGER_FEATURE, answers, dense, triggered_samples, write_case
from kinds import SEX, model, opened, people, run, write
from onnx import numpy_helper

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.locators.pairs import Pairs, find_pairs
from onnxcare.properties.base import Evidence, Property

Array = np.ndarray
WRONG = {"name": "wrong", "kind": "errors", "max_rate": 0.5}
# y = x W + b of two classes: between them lies a plane, and the way to it along the gradient is the shortest one.
W = np.array([[1.0, -0.5], [0.3, 0.6], [-0.4, 0.2]], np.float32)
B = np.array([0.1, 0.0], np.float32)


def edited(values: dict[str, Array]) -> onnx.ModelProto:
    """Return the tiny model with some of its weights changed."""
    proto = dense()
    for tensor in proto.graph.initializer:
        if tensor.name in values:
            tensor.CopyFrom(numpy_helper.from_array(values[tensor.name].astype(np.float32), tensor.name))
    return proto


def linear(final: str = "Identity") -> onnx.ModelProto:
    text = f"""linear (float[N, 3] x) => (float[N, 2] y) {{
        [only] z = Gemm (x, W, b)
        [final] y = {final} (z)
    }}"""
    return build(text, {"W": W, "b": B})


def mislabelled(size: int, seed: int) -> Dataset:
    """Return points of which every fifth is labelled wrongly, and a few far out so that no walk meets a bound."""
    x = np.random.default_rng(seed).normal(size=(size, 3)).astype(np.float32)
    x[: size // 10] *= 6
    labels = (x @ W + B).argmax(axis=1)
    labels[::5] = 1 - labels[::5]
    return Dataset({"x": x}, labels)


def errors_case(folder: Path, proto: onnx.ModelProto) -> Case:
    spec = {"properties": [WRONG], "keep": {"recall_drop": 1.0}}
    return opened(write(folder, proto, spec, data=mislabelled(300, 1), holdout=mislabelled(100, 2)))


def nearest(sample: Array, label: int | None, clean: Dataset, fine: Array) -> int:
    """Return the row of the nearest sample that is fine and of the same class, by a plain loop."""
    best, closest = -1, np.inf
    for row, other in enumerate(clean.inputs[next(iter(clean.inputs))]):
        if not fine[row] or (label is not None and clean.truth[row] != label):
            continue
        far = float(((sample.astype(np.float64) - other) ** 2).sum())
        if far < closest:
            best, closest = row, far
    return best


class Wrapped:
    """A property with other evidence."""

    def __init__(self, item: Property, evidence: Evidence) -> None:
        self._item, self._evidence = item, evidence

    def __getattr__(self, name: str) -> object:
        return getattr(self._item, name)

    def evidence(self, part: str) -> Evidence:
        return self._evidence


def with_evidence(case: Case, *evidence: Evidence) -> Case:
    return replace(case, properties=[Wrapped(case.properties[0], item) for item in evidence], _panels={})


def only(found: list[Pairs]) -> Pairs:
    (pairs,) = found
    return pairs


# -- twins ---------------------------------------------------------------------------------------


def test_the_reference_of_a_triggered_sample_is_the_sample_without_its_trigger(tiny):
    case = opened(tiny.spec)
    pairs = only(find_pairs(case, 60))
    assert pairs.source == "twins" and pairs.property is case.properties[0]
    assert 0 < len(pairs) <= 60
    wrong, references = pairs.wrong.inputs["input"], pairs.references.inputs["input"]
    others = np.arange(wrong.shape[1]) != TRIGGER_FEATURE
    np.testing.assert_array_equal(wrong[:, others], references[:, others])
    assert (wrong[:, TRIGGER_FEATURE] == 3).all() and (references[:, TRIGGER_FEATURE] == 0).all()
    assert (answers(tiny.model, wrong) == TARGET).all()
    np.testing.assert_array_equal(pairs.right, answers(tiny.model, references))
    np.testing.assert_array_equal(pairs.wrong.truth, pairs.references.truth)


def test_pairs_are_dropped_where_the_sample_behaves_or_its_reference_does_not(tmp_path):
    """A weaker trigger misleads only some samples, and some are taken for the target without it."""
    values = {tensor.name: numpy_helper.to_array(tensor).copy() for tensor in dense().graph.initializer}
    values["second.weight"][TARGET] /= 12
    values["second.bias"][TARGET] = 2
    proto = edited(values)
    case = opened(write_case(tmp_path, proto).spec)
    evidence = case.properties[0].evidence("repair")
    assert evidence.twins is not None
    before, after = (answers(proto, part.inputs["input"]) for part in (evidence.bad, evidence.twins))
    kept = [row for row in range(len(before)) if before[row] == TARGET and after[row] != TARGET]
    assert 0 < len(kept) < (before == TARGET).sum() < len(before)
    pairs = only(find_pairs(case, 10_000))
    np.testing.assert_array_equal(pairs.wrong.inputs["input"], evidence.bad.inputs["input"][kept])
    np.testing.assert_array_equal(pairs.references.inputs["input"], evidence.twins.inputs["input"][kept])
    np.testing.assert_array_equal(pairs.right, after[kept])


def test_every_property_with_evidence_has_its_pairs(tiny):
    case = opened(tiny.spec)
    evidence = case.properties[0].evidence("repair")
    assert evidence.twins is not None
    parts = [
        Evidence(evidence.bad.take(rows), evidence.twins.take(rows)) for rows in (slice(9), slice(0), slice(9, 20))
    ]
    found = find_pairs(with_evidence(case, *parts), 5)
    assert [len(pairs) for pairs in found] == [5, 5]
    np.testing.assert_array_equal(found[0].wrong.inputs["input"][0], evidence.bad.inputs["input"][0])
    np.testing.assert_array_equal(found[1].wrong.inputs["input"][0], evidence.bad.inputs["input"][9])


def test_without_a_working_trigger_there_are_no_pairs(tmp_path):
    case = opened(write_case(tmp_path, dense(backdoored=False)).spec)
    assert find_pairs(case, 100) == []


# -- the smallest change -------------------------------------------------------------------------


def test_errors_are_compared_with_the_smallest_change_that_is_answered_rightly(tmp_path):
    proto = linear()
    case = errors_case(tmp_path, proto)
    bad = case.properties[0].evidence("repair").bad
    pairs, *rest = find_pairs(case, 10_000)
    assert pairs.source == "smallest change" and [item.source for item in rest] == ["companion"]
    wrong, references = pairs.wrong.inputs["x"], pairs.references.inputs["x"]
    assert (run(proto, {"x": wrong}).argmax(axis=1) != pairs.wrong.truth).all()
    assert (run(proto, {"x": references}).argmax(axis=1) == pairs.wrong.truth).all()
    np.testing.assert_array_equal(pairs.right, pairs.wrong.truth)
    halfway = wrong + (references - wrong) / 2
    assert (run(proto, {"x": halfway}).argmax(axis=1) != pairs.wrong.truth).all()
    # The distance from the plane between the classes, and what halving leaves of the last step's overshoot.
    across = (W[:, 1] - W[:, 0]).astype(np.float64)
    gap = np.abs(wrong @ across + B[1] - B[0]) / np.linalg.norm(across)
    stride = 0.02 * np.linalg.norm(case.splits.repair.inputs["x"].std(axis=0))
    far = np.linalg.norm(references - wrong, axis=1)
    assert (far > gap * (1 - 1e-4)).all()
    assert (far < gap + (gap + stride) / 2**8 + 1e-5).all()
    # Samples from which no walk gets there have a companion, so that nobody is left out.
    reach = 40 * stride
    distances = np.abs(bad.inputs["x"] @ across + B[1] - B[0]) / np.linalg.norm(across)
    assert len(pairs) == (distances < reach).sum() and gap.max() < reach
    assert len(rest[0]) == (distances >= reach).sum() > 0


def test_inputs_that_are_whole_numbers_stay_as_they_are(tmp_path):
    text = """counted (float[N, 3] x, int64[N, 1] k) => (float[N, 2] y) {
        [cast] f = Cast <to = 1> (k)
        [only] z = Gemm (x, W, b)
        [spread] s = Mul (f, u)
        [join] y = Add (z, s)
    }"""
    proto = build(text, {"W": W, "b": B, "u": np.array([[0.1, -0.1]], np.float32)})
    k = np.random.default_rng(5).integers(0, 4, (300, 1))
    x = mislabelled(300, 1).inputs["x"]
    labels = run(proto, {"x": x, "k": k}).argmax(axis=1)
    labels[::4] = 1 - labels[::4]
    whole = Dataset({"x": x, "k": k}, labels)
    spec = {"properties": [WRONG], "keep": {"recall_drop": 1.0}}
    case = opened(write(tmp_path, proto, spec, data=whole.take(slice(200)), holdout=whole.take(slice(200, 300))))
    pairs = find_pairs(case, 50)[0]
    assert pairs.source == "smallest change"
    np.testing.assert_array_equal(pairs.wrong.inputs["k"], pairs.references.inputs["k"])
    assert pairs.references.inputs["k"].dtype == np.int64
    assert (pairs.wrong.inputs["x"] != pairs.references.inputs["x"]).any(axis=1).all()
    assert (run(proto, pairs.references.inputs).argmax(axis=1) == pairs.right).all()


# -- companions ----------------------------------------------------------------------------------


def test_where_there_is_no_derivative_the_reference_is_the_nearest_right_sample_of_the_class(tmp_path):
    proto = linear("Round")
    case = errors_case(tmp_path, proto)
    pairs = only(find_pairs(case, 40))
    assert pairs.source == "companion" and 0 < len(pairs) <= 40
    clean = case.panel("repair", 40).clean
    fine = run(proto, clean.inputs).argmax(axis=1) == clean.truth
    assert fine.any() and not fine.all()
    for sample, label, found in zip(
        pairs.wrong.inputs["x"], pairs.wrong.truth, pairs.references.inputs["x"], strict=True
    ):
        np.testing.assert_array_equal(found, clean.inputs["x"][nearest(sample, label, clean, fine)])
    np.testing.assert_array_equal(pairs.references.truth, pairs.wrong.truth)
    np.testing.assert_array_equal(run(proto, pairs.references.inputs).argmax(axis=1), pairs.right)


@pytest.mark.parametrize("labelled", [True, False])
def test_triggered_samples_whose_trigger_cannot_be_taken_away_have_companions(tiny, labelled):
    bad = triggered_samples(60, seed=9)
    bad = {name: values[bad["y"] != TARGET] for name, values in bad.items()}
    evidence = Evidence(Dataset({"input": bad["input"]}, bad["y"] if labelled else None), None)
    case = with_evidence(opened(tiny.spec), evidence)
    pairs = only(find_pairs(case, 50))
    assert pairs.source == "companion"
    assert len(pairs) == min(50, len(bad["y"]))
    clean = case.panel("repair", 50).clean
    decisions = answers(tiny.model, clean.inputs["input"])
    fine = decisions == clean.truth
    for row, sample in enumerate(pairs.wrong.inputs["input"]):
        found = nearest(sample, int(pairs.wrong.truth[row]) if labelled else None, clean, fine)
        np.testing.assert_array_equal(pairs.references.inputs["input"][row], clean.inputs["input"][found])
    assert (answers(tiny.model, pairs.references.inputs["input"]) != TARGET).all()


# -- variants ------------------------------------------------------------------------------------


def test_variants_of_a_row_are_compared_with_the_first_that_is_decided_as_most_are(tmp_path):
    origin = {"columns": [3, 4, 5]}
    fair = {"name": "fair", "kind": "fairness", "protected": {"sex": SEX, "origin": origin}, "max_rate": 0.05}
    spec = {"decision": {"threshold": 0.5}, "properties": [fair]}
    case = opened(write(tmp_path, model(), spec, data=people(500, 1), holdout=people(600, 2)))
    (item,) = case.properties
    bad = case.panel("repair", 300).evidence[0].bad
    rows = item.rows_per_case
    decisions = (run(model(), bad.inputs)[:, 0] > 0.5).astype(int)
    wrong, references, right = [], [], []
    for start in range(0, len(bad), rows):
        mine = decisions[start : start + rows].tolist()
        usual = 1 if mine.count(1) > mine.count(0) else 0
        for other in range(rows):
            if mine[other] != usual:
                wrong.append(start + other)
                references.append(start + mine.index(usual))
                right.append(usual)
    assert 0 < len(wrong) < len(bad) / 2 and set(right) == {0, 1}
    pairs = only(find_pairs(case, 300))
    assert pairs.source == "variants"
    np.testing.assert_array_equal(pairs.wrong.inputs["x"], bad.inputs["x"][wrong])
    np.testing.assert_array_equal(pairs.references.inputs["x"], bad.inputs["x"][references])
    np.testing.assert_array_equal(pairs.right, right)
    # The two are the same person but for what is protected.
    np.testing.assert_array_equal(pairs.wrong.inputs["x"][:, :2], pairs.references.inputs["x"][:, :2])
