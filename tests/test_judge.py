"""The judge against counting by hand; a constant predictor must fail it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import scipy.stats
from cases import SQUARE, sample_case

from onnxcare.errors import ModelError
from onnxcare.graph.patch import Patch
from onnxcare.judge import Rate, Verdict, clopper_pearson, judge
from onnxcare.repair import auto
from onnxcare.runtime import Session
from onnxcare.spec import Keep

KEEP = Keep(accuracy_drop=0.003, recall_drop=0.02)


@pytest.mark.parametrize(("count", "total"), [(0, 10), (10, 10), (3, 20), (5, 3557), (1, 1)])
def test_intervals_are_exact(count, total):
    expected = scipy.stats.binomtest(count, total).proportion_ci(0.95, method="exact")
    np.testing.assert_allclose(clopper_pearson(count, total), (expected.low, expected.high), atol=1e-12)


def test_nothing_counted_says_nothing():
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    assert np.isnan(Rate.of(np.zeros(0, bool)).value)


def sample_verdict(path: Path) -> Verdict:
    case = sample_case()
    sessions = Session(SQUARE / "model.onnx"), Session(path)
    return judge(*sessions, "logits", case.splits.holdout, case.properties, KEEP, 256)


@pytest.fixture(scope="module")
def repaired(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("judge") / "repaired.onnx"
    case = sample_case()
    path.write_bytes(Patch(auto.repair(case).values).apply(case.experiment.model))
    return path


@functools.cache
def answers(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the decisions of a file on clean and on triggered held-out samples."""
    case = sample_case()
    session = ort.InferenceSession(path)
    clean = session.run(None, dict(case.splits.holdout.inputs))[0]
    bad = session.run(None, dict(case.properties[0].evidence("holdout").bad.inputs))[0]
    return clean.argmax(axis=1), bad.argmax(axis=1)


def test_every_number_equals_counting_by_hand(repaired):
    verdict = sample_verdict(repaired)
    finding, guards = verdict.properties[0], verdict.guards
    labels = sample_case().splits.holdout.truth
    (clean0, bad0), (clean1, bad1) = answers(SQUARE / "model.onnx"), answers(repaired)
    others = labels != 1
    assert (finding.before.count, finding.before.total) == ((bad0 == 1).sum(), others.sum())
    assert finding.after.count == (bad1 == 1).sum()
    assert finding.baseline_before.count == (clean0[others] == 1).sum()
    assert finding.baseline_after.count == (clean1[others] == 1).sum()
    floor = min((clean0[others] == 1).mean(), (clean1[others] == 1).mean())
    assert finding.excess == pytest.approx((bad1 == 1).mean() - floor)
    assert finding.restored is not None
    assert finding.restored.count == (bad1 == labels[others]).sum()
    assert guards.before.count == (clean0 == labels).sum()
    assert guards.after.count == (clean1 == labels).sum()
    assert guards.changed.count == (clean0 != clean1).sum()
    for item in guards.recalls:
        mine = labels == item.label
        assert item.before.count == (clean0[mine] == item.label).sum()
        assert item.after.count == (clean1[mine] == item.label).sum()
    assert guards.worst_recall.drop == max(item.drop for item in guards.recalls)
    assert verdict.passed


def test_the_original_against_itself_fails_for_its_backdoor_alone():
    verdict = sample_verdict(SQUARE / "model.onnx")
    assert verdict.guards.passed
    assert verdict.guards.accuracy_drop == 0
    assert not verdict.properties[0].passed
    assert not verdict.passed


def test_a_constant_predictor_fails(tmp_path):
    model = onnx.load(SQUARE / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "dense2.weight":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((10, 64), np.float32), tensor.name))
        if tensor.name == "dense2.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.eye(10, dtype=np.float32)[3], tensor.name))
    onnx.save(model, tmp_path / "constant.onnx")
    verdict = sample_verdict(tmp_path / "constant.onnx")
    assert verdict.properties[0].passed  # it never says 1, so the attack is gone
    assert verdict.guards.worst_recall.drop > 0.9
    assert not verdict.passed


def test_nan_answers_are_refused(tmp_path):
    model = onnx.load(SQUARE / "model.onnx")
    for tensor in model.graph.initializer:
        if tensor.name == "dense2.bias":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.full(10, np.nan, np.float32), tensor.name))
    onnx.save(model, tmp_path / "nan.onnx")
    with pytest.raises(ModelError, match=r"NaN or infinity for 1000 of 1000"):
        sample_verdict(tmp_path / "nan.onnx")


def test_a_held_out_part_too_small_for_its_threshold_says_so():
    case = sample_case(SQUARE, "care-50.yaml")
    session = Session(SQUARE / "model.onnx")
    few = case.splits.holdout.take(slice(0, 100))
    (item,) = case.properties
    (finding,) = judge(session, session, "logits", few, case.properties, KEEP, 256).properties
    assert not any("cannot tell" in note for note in finding.notes)  # 1,000 triggered samples are enough
    item = sample_case().properties[0]
    stub = type("Few", (), {})()
    for name in ("name", "kind", "notes", "misbehaves", "relevant"):
        setattr(stub, name, getattr(item, name))
    stub.max_rate = 0.005
    bad = item.evidence("holdout").bad.take(slice(0, 100))
    stub.evidence = lambda part: type(item.evidence("holdout"))(bad, None)
    (finding,) = judge(session, session, "logits", few, [stub], KEEP, 256).properties
    (note,) = [note for note in finding.notes if "cannot tell" in note]
    needed = int(note.split(";")[1].split()[0])
    assert clopper_pearson(0, needed)[1] <= 0.005 < clopper_pearson(0, needed - 1)[1]
