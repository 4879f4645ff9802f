"""From files to a case: what becomes of data, labels, bounds and properties, for every kind."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import build, random
from kinds import ORIGIN, SEX, corner, model, people, plane, points, run, vnnlib, with_context, write

from onnxcare import __version__
from onnxcare.data import PARTS, Dataset, joined
from onnxcare.errors import DataError, ModelError, SpecError, UsageError
from onnxcare.prepare import Setup, prepare

Array = np.ndarray
FAIR: dict[str, Any] = {"name": "fair", "kind": "fairness", "protected": {"sex": SEX, "origin": ORIGIN}}
WRONG = {"name": "wrong", "kind": "errors"}
FAR = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": 1000}
TRAP = {"name": "trap", "kind": "backdoor", "trigger": "t.npz", "target": 1}
UNIT = {"low": [0.0, 0.0], "high": [1.0, 1.0]}
THRESHOLD = {"threshold": 0.5}


def prepared(spec: Path, seed: int | None = None, **given: Any) -> Setup:
    said = given.get("said", [])
    return prepare(spec.parent / "model.onnx", spec, seed, "cpu", given.get("memory", "1GiB"), said.append)


def of_people(
    folder: Path, *properties: dict, proto: onnx.ModelProto | None = None, labelled: bool = True, **spec: Any
) -> Path:
    data, holdout = (
        Dataset(item.inputs, item.labels if labelled else None) for item in (people(400, 1), people(200, 2))
    )
    whole = {"decision": THRESHOLD, "properties": list(properties), **spec}
    return write(folder, proto or model(), whole, data=data, holdout=holdout)


def of_plane(folder: Path, *assertions: str, data: int | None = None, **spec: Any) -> Path:
    vnnlib(folder / "f.vnnlib", *(assertions or ("(>= Y_0 0.8)",)))
    files = {} if data is None else {"data": points(data, 1, False), "holdout": points(data, 2, False)}
    return write(folder, plane(), {"properties": [FAR], **spec}, **files)


def rows_of(setup: Setup, part: str) -> set[bytes]:
    (values,) = setup.case.splits.part(part).inputs.values()
    return {row.tobytes() for row in values}


# -- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "shares"), [(True, (0.5, 0.2, 0.3)), (False, (0.35, 0.14, 0.21, 0.3))])
def test_data_is_shared_out_class_by_class(tmp_path, given, shares):
    spec = of_people(tmp_path, WRONG)
    if not given:
        spec.write_text(spec.read_text().replace("holdout: holdout.npz\n", ""))
    setup = prepared(spec)
    data = people(400, 1)
    for part, share in zip(PARTS, shares, strict=False):
        samples = setup.case.splits.part(part)
        for label in (0, 1):
            assert (samples.truth == label).sum() == pytest.approx(share * (data.truth == label).sum(), abs=1)
    held = {row.tobytes() for row in people(200, 2).inputs["x"]}
    assert (rows_of(setup, "holdout") == held) == given
    parts = [rows_of(setup, part) for part in PARTS]
    assert len(set.union(*parts)) == sum(map(len, parts))
    assert setup.run.samples == {part: len(setup.case.splits.part(part)) for part in PARTS}


def test_samples_that_are_known_already_are_not_the_judges(tmp_path):
    spec = of_people(tmp_path, WRONG)
    known, fresh = people(400, 1).take(slice(0, 30)), people(200, 2)
    whole = {name: np.concatenate([known.inputs[name], fresh.inputs[name]]) for name in ("x",)}
    np.savez(tmp_path / "holdout.npz", **whole, y=np.concatenate([known.truth, fresh.truth]))
    setup = prepared(spec)
    assert len(setup.case.splits.holdout) == 200
    (note,) = setup.run.notes
    assert note.startswith("30 samples of ") and "also occur in" in note


def test_samples_that_occur_twice_are_not_the_judges_either(tmp_path):
    """Where the judge's samples are a part of the data itself."""
    data = people(600, 1)
    twice = joined(data, data.take(slice(0, 200)))
    spec = write(tmp_path, model(), {"decision": THRESHOLD, "properties": [WRONG]}, data=twice)
    spec.write_text(spec.read_text().replace("holdout: holdout.npz\n", ""))
    setup = prepared(spec)
    seen = set().union(*(rows_of(setup, part) for part in ("repair", "search", "validation")))
    assert len(setup.case.splits.holdout) > 100
    assert not rows_of(setup, "holdout") & seen


def test_the_seed_of_the_spec_unless_another_is_given(tmp_path):
    spec = of_people(tmp_path, WRONG, seed=5)
    first, again, other = prepared(spec), prepared(spec, 5), prepared(spec, 6)
    assert [item.run.seed for item in (first, again, other)] == [5, 5, 6] == [first.case.seed, 5, other.case.seed]
    assert rows_of(first, "repair") == rows_of(again, "repair") != rows_of(other, "repair")
    with pytest.raises(UsageError, match="seed 0"):
        prepared(spec, 0)


def test_what_is_said_about_a_run(tmp_path):
    said: list[str] = []
    spec = of_people(tmp_path, WRONG, {**FAIR, "max_gap": 0.1, "max_rate": 0.1})
    setup = prepared(spec, said=said)
    file = tmp_path / "model.onnx"
    assert setup.run.sha256 == hashlib.sha256(file.read_bytes()).hexdigest() == setup.model.sha256
    assert (setup.run.version, setup.run.model, setup.run.device) == (__version__, str(file), "cpu")
    assert said == [f"loading {file}", "gathering evidence for wrong", "gathering evidence for fair"]
    assert [item.name for item in setup.case.properties] == ["wrong", "fair", "fair: equalized odds"]
    assert setup.case.keep == setup.spec.keep
    assert setup.run.notes == []


def test_labels_may_have_another_name(tmp_path):
    spec = of_people(tmp_path, WRONG, labels="income")
    for name in ("data", "holdout"):
        with np.load(tmp_path / f"{name}.npz") as archive:
            np.savez(tmp_path / f"{name}.npz", x=archive["x"], income=archive["y"])
    assert prepared(spec).case.splits.repair.labels is not None


# -- without labels ------------------------------------------------------------------------------


def test_without_labels_what_the_original_answers_is_the_reference(tmp_path):
    parity = {**FAIR, "max_rate": 0.1, "max_gap": 0.1, "gap": "demographic_parity"}
    setup = prepared(of_people(tmp_path, parity, labelled=False))
    assert setup.run.notes == [
        "The data has no labels: what the model answers where the properties hold is the reference."
    ]
    for part in PARTS:
        samples = setup.case.splits.part(part)
        answers = run(tmp_path / "model.onnx", samples.inputs)[:, 0] > 0.5
        np.testing.assert_array_equal(samples.truth, answers)
    assert len(setup.case.splits.holdout) == 200
    group = setup.case.properties[1].evidence("search").bad
    np.testing.assert_array_equal(group.truth, run(tmp_path / "model.onnx", group.inputs)[:, 0] > 0.5)
    assert setup.case.before.accuracy_drop == 0


def test_where_it_misbehaves_the_original_is_no_reference(tmp_path):
    """Beside fairness, which looks at everybody."""
    vnnlib(tmp_path / "f.vnnlib", "(>= Y_0 0.8)")
    half = {"column": 0, "values": [0.25, 0.75]}
    fair = {"name": "fair", "kind": "fairness", "protected": {"first": half}, "max_rate": 1.0}
    data, holdout = points(500, 1, False), points(300, 2, False)
    data.inputs["x"][::4, 0] = 0.25
    spec = write(tmp_path, plane(), {"properties": [FAR, fair]}, data=data, holdout=holdout)
    setup = prepared(spec)
    for part in PARTS:
        x = setup.case.splits.part(part).inputs["x"]
        assert (corner(x) < 0.8).all()
        np.testing.assert_array_equal(setup.case.splits.part(part).truth, corner(x) <= 0.25)
    sizes = [sum(len(setup.case.splits.part(part)) for part in PARTS[:3]), len(setup.case.splits.holdout)]
    assert sizes == [(corner(item.inputs["x"]) < 0.8).sum() for item in (data, holdout)]
    assert sum(len(setup.case.properties[1].evidence(part).bad) for part in PARTS[:3]) == 3 * 500


ODDS = {**FAIR, "max_gap": 0.1, "gap": "equalized_odds"}


@pytest.mark.parametrize("item", [WRONG, TRAP, ODDS], ids=["errors", "backdoor", "equalized odds"])
def test_some_properties_need_labels(tmp_path, item):
    np.savez(tmp_path / "t.npz", mask=np.eye(6, dtype=np.float32)[0], pattern=np.eye(6, dtype=np.float32)[0])
    with pytest.raises(DataError, match=rf"data\.npz: holds no labels, which property '{item['name']}' needs.*\(y at"):
        prepared(of_people(tmp_path, item, labelled=False))


def test_labels_that_are_named_have_to_be_there(tmp_path):
    with pytest.raises(DataError, match=r"data\.npz: holds no labels 'income'"):
        prepared(of_people(tmp_path, FAIR, labels="income"))


def test_labels_of_held_out_samples_alone_do_not_count(tmp_path):
    spec = of_people(tmp_path, FAIR, labelled=False)
    other = people(200, 2)
    np.savez(tmp_path / "holdout.npz", x=other.inputs["x"], y=1 - other.truth)
    setup = prepared(spec)
    answers = run(tmp_path / "model.onnx", setup.case.splits.holdout.inputs)[:, 0] > 0.5
    np.testing.assert_array_equal(setup.case.splits.holdout.truth, answers)


def test_held_out_samples_need_labels_where_the_data_has_some(tmp_path):
    spec = of_people(tmp_path, WRONG)
    np.savez(tmp_path / "holdout.npz", x=people(200, 2).inputs["x"])
    with pytest.raises(DataError, match=r"holdout\.npz: holds no labels"):
        prepared(spec)


def test_labels_are_classes_of_the_model(tmp_path):
    spec = of_people(tmp_path, WRONG)
    data = people(400, 1)
    np.savez(tmp_path / "data.npz", x=data.inputs["x"], y=data.truth + 1)
    with pytest.raises(DataError, match=r"data\.npz: labels run from 1 to 2, but the model has classes 0 to 1"):
        prepared(spec)


# -- bounds beside a backdoor --------------------------------------------------------------------


@pytest.mark.parametrize("bounded", [False, True])
def test_what_a_trigger_adds_stays_within_the_bounds_or_the_data(tmp_path, bounded):
    added = np.full(len(people(1, 1).inputs["x"][0]), 1e3, np.float32)
    np.savez(tmp_path / "t.npz", added=added)
    x = people(400, 1).inputs["x"]
    high = x.max(axis=0) + np.arange(x.shape[1])
    bounds = {"bounds": {"low": x.min(axis=0).tolist(), "high": high.tolist()}} if bounded else {}
    setup = prepared(of_people(tmp_path, TRAP, **bounds))
    (item,) = setup.case.properties
    (bad,) = item.evidence("repair").bad.inputs.values()
    (clean,) = setup.case.splits.repair.inputs.values()
    np.testing.assert_array_equal(bad, np.broadcast_to(high if bounded else clean.max(), bad.shape).astype(np.float32))


# -- bounds in place of data ---------------------------------------------------------------------


def test_points_of_the_bounds_are_drawn_by_the_seed(tmp_path):
    spec = of_plane(tmp_path, bounds=UNIT)
    first, again, other = prepared(spec), prepared(spec), prepared(spec, 2)
    assert rows_of(first, "search") == rows_of(again, "search") != rows_of(other, "search")
    assert all(len(first.case.splits.part(part)) > 1000 for part in PARTS)


def test_an_open_shape_needs_data(tmp_path):
    spec = of_plane(tmp_path, bounds=UNIT)
    proto = plane()
    proto.graph.input[0].type.tensor_type.shape.dim[1].dim_param = "columns"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(
        SpecError, match=r"care\.yaml: data: needed, because .* does not fix the shape of its input 'x'"
    ):
        prepared(spec)


@pytest.mark.parametrize("data", [None, 300], ids=["bounds", "data"])
def test_where_the_whole_domain_is_unsafe_nothing_is_left(tmp_path, data):
    """The message names what there is too little of."""
    spec = of_plane(tmp_path, "(>= Y_0 -1.0)", data=data, bounds=UNIT)
    source = "bounds" if data is None else r"\S*data\.npz"
    with pytest.raises(DataError, match=rf"^{source}: only 0 samples are left for repair; at least 20 are needed"):
        prepared(spec)


def test_too_little_data(tmp_path):
    spec = of_plane(tmp_path, data=60)
    with pytest.raises(DataError, match=r"data\.npz: only \d+ samples are left for search; at least 20"):
        prepared(spec)


# -- models --------------------------------------------------------------------------------------


def test_two_inputs_and_the_name_of_one(tmp_path):
    data, holdout = people(400, 1), people(200, 2)
    both = [
        Dataset({"context": np.zeros((len(item), 1), np.float32), **item.inputs}, item.labels)
        for item in (data, holdout)
    ]
    whole = {"decision": THRESHOLD, "properties": [{**FAIR, "input": "x"}]}
    spec = write(tmp_path, with_context(model()), whole, data=both[0], holdout=both[1])
    evidence = prepared(spec).case.properties[0].evidence("search").bad
    assert {name: values.shape[1] for name, values in evidence.inputs.items()} == {"context": 1, "x": 6}
    spec.write_text(spec.read_text().replace("input: x", "input: person"))
    with pytest.raises(SpecError, match=r"care\.yaml: properties\.fair\.input: name one of .*: context, x"):
        prepared(spec)


DECISIONS: dict[str, tuple[object, str | None, list[int]]] = {
    "highest of the first": ("argmax", None, [2, 0]),
    "highest of another": ("argmax", "costs", [0, 1]),
    "lowest of another": ("argmin", "costs", [1, 2]),
    "one score": ({"threshold": 2.5}, "score", [1, 0]),
    "the only one that fits": ({"threshold": 3.5}, None, [0, 0]),
}


@pytest.mark.parametrize(("decision", "output", "expected"), DECISIONS.values(), ids=DECISIONS)
def test_the_answer_is_read_as_the_spec_says(tmp_path, decision, output, expected):
    proto = build(
        """several (float[N, 3] x) => (float[N, 3] first, float[N, 3] costs, float[N, 1] score) {
            first = MatMul (x, W)
            costs = Mul (x, k)
            score = ReduceMax <axes = [1]> (x)
        }""",
        {"W": np.eye(3, dtype=np.float32), "k": np.array([2, 1, 0.1], np.float32)},
    )
    rows = np.array([[1, 0.5, 3], [2, 1, 0]], np.float32)
    costs = rows * [2, 1, 0.1]
    assert [costs.argmax(axis=1).tolist(), costs.argmin(axis=1).tolist()] == [[0, 0], [2, 2]]
    x = np.concatenate([rows, random(198, 3)])
    labels = np.zeros(200, np.int64)
    whole = {"decision": decision, "properties": [WRONG], **({} if output is None else {"output": output})}
    spec = write(tmp_path, proto, whole, data=Dataset({"x": x}, labels), holdout=Dataset({"x": x[::-1] + 1}, labels))
    experiment = prepared(spec).case.experiment
    answers = experiment.scores({"x": rows}).argmax(axis=1).tolist()
    y = {"first": rows, "costs": costs, "score": rows.max(axis=1, keepdims=True)}[experiment.output]
    by_hand = {"argmax": lambda: y.argmax(axis=1), "argmin": lambda: y.argmin(axis=1)}.get(
        str(decision), lambda: y[:, 0] > decision["threshold"]
    )
    assert answers == by_hand().tolist()
    assert experiment.output == (output or ("first" if decision == "argmax" else "score"))


def test_errors_of_the_spec_name_the_spec_and_others_their_file(tmp_path):
    spec = of_people(tmp_path, {**WRONG, "label": 2})
    with pytest.raises(SpecError, match=rf"^{spec}: properties\.wrong\.label"):
        prepared(spec)
    spec = of_people(tmp_path, WRONG, decision="argmax")
    with pytest.raises(ModelError, match=r"^\S*model\.onnx: no output with one score per class"):
        prepared(spec)
    spec = of_people(tmp_path, WRONG, output="q")
    with pytest.raises(SpecError, match=rf"^{spec}: output: .*has no output 'q'"):
        prepared(spec)
    spec = of_people(tmp_path, WRONG)
    (tmp_path / "data.npz").unlink()
    with pytest.raises(DataError, match=r"^\S*data\.npz: no such file"):
        prepared(spec)


def test_a_model_that_answers_no_numbers_is_refused(tmp_path):
    proto = build(
        "odd (float[N, 6] x) => (float[N, 2] y) { l = Log (x) y = MatMul (l, W) }", {"W": np.ones((6, 2), np.float32)}
    )
    spec = of_people(tmp_path, WRONG, proto=proto, decision="argmax")
    with pytest.raises(ModelError, match=r"answers NaN or infinity for \d+ of \d+ samples of .*data\.npz"):
        prepared(spec)
