"""Cutting protected columns: nothing is left of them, they are imputed by least squares, and obstacles are named."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from graph.models import build
from kinds import CENSUS, ORIGIN, SEX, model, opened, patched, people, run, thinned, weights, write

import onnxcare
from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.influence import certify
from onnxcare.repair import cut
from onnxcare.repair.base import Found, Proposals

Array = np.ndarray
BOTH = {"sex": SEX, "origin": ORIGIN}
LENIENT = {"accuracy_drop": 0.2, "recall_drop": 0.2, "balanced_accuracy_drop": 0.2}


def case_of(
    folder: Path,
    proto: onnx.ModelProto | None = None,
    protected: Mapping[str, Any] | None = None,
    keep: Mapping[str, float] = LENIENT,
    more: tuple[dict, ...] = (),
    decision: object = None,
    seed: int = 1,
) -> Case:
    item = {"name": "fair", "kind": "fairness", "protected": dict(protected or BOTH), "max_rate": 0.0}
    spec = {"decision": decision or {"threshold": 0.5}, "properties": [item, *more], "keep": dict(keep), "seed": seed}
    return opened(write(folder, proto or model(), spec, data=people(800, 1), holdout=people(300, 2)))


def labelled(found: Proposals, words: str) -> Found:
    (item,) = [item for item in found.found if re.search(words, item.candidate.label)]
    return item


WHOLE = ("cut, imputed from the others$", "cut, not imputed$", "cut, imputed, then .* fine-tuned$")


def varied(rows: Array, columns: list[int], rng: np.random.Generator) -> Array:
    """Return the rows with anything whatever in some columns."""
    other = rows.copy()
    other[:, columns] = rng.normal(size=(len(rows), len(columns))) * rng.choice([1, -30, 1e4], (len(rows), 1))
    return other


# -- the census ----------------------------------------------------------------------------------


@functools.cache
def census(folder: Path) -> Case:
    folder.mkdir()
    return opened(thinned(CENSUS, folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("census") / "case"


@functools.cache
def proposed(folder: Path) -> Proposals:
    return cut.propose(census(folder))


@pytest.mark.parametrize("words", WHOLE)
def test_the_patched_file_discriminates_nobody(folder, tmp_path, words):
    case = census(folder)
    path = patched(case, labelled(proposed(folder), words).make(), tmp_path / "out.onnx")
    session = ort.InferenceSession(path)
    rng = np.random.default_rng(3)
    protected, rows = [5, *range(7, 12)], case.splits.holdout.inputs["person"]
    extreme = np.concatenate([rows, rng.uniform(-1e3, 1e5, (500, 40)).astype(np.float32)])
    before = session.run(None, {"person": extreme})[0]
    assert before.std() > 0.1
    for _ in range(3):
        # Bit for bit the same answer, not only the same decision.
        np.testing.assert_array_equal(session.run(None, {"person": varied(extreme, protected, rng)})[0], before)
    original = ort.InferenceSession(CENSUS / "model.onnx")
    moved = original.run(None, {"person": varied(rows, protected, rng)})[0]
    assert (moved != original.run(None, {"person": rows})[0]).mean() > 0.9
    assert certify(onnx.load(path), "person", protected, case.experiment.output)


@pytest.mark.parametrize("words", WHOLE)
def test_only_the_layer_that_reads_the_columns_is_changed_and_their_rows_are_zero(folder, words):
    case, values = census(folder), labelled(proposed(folder), words).make()
    first = case.experiment.layers[0]
    names = {parameter.name for parameter in values}
    assert names == {first.weight.name, first.bias.name}
    weight = values[first.weight]
    assert not weight[[5, *range(7, 12)]].any()
    assert weight[[0, 6, 12]].any(axis=1).all()


def test_what_was_measured_is_what_the_file_does(folder, tmp_path):
    case = census(folder)
    panel = case.panel("validation")
    for words in WHOLE:
        found = labelled(proposed(folder), words)
        path = patched(case, found.make(), tmp_path / "out.onnx")
        p = run(path, panel.inputs)[:, 0]
        right = (p[panel.clean_rows] > 0.5) == panel.clean.truth
        before = (run(CENSUS / "model.onnx", panel.clean.inputs)[:, 0] > 0.5) == panel.clean.truth
        assert found.candidate.outcome.excess == (0.0,)
        assert found.candidate.outcome.accuracy_drop == pytest.approx(before.mean() - right.mean(), abs=1e-9)


def test_imputation_keeps_more_than_none(folder):
    imputed, not_imputed = (labelled(proposed(folder), words).candidate.outcome for words in WHOLE[:2])
    assert imputed.drift < not_imputed.drift


def test_imputation_is_least_squares(folder):
    """With the rest of the layer's input, and a one for its bias, in numpy's own least squares."""
    case = census(folder)
    values = labelled(proposed(folder), WHOLE[0]).make()
    first = case.experiment.layers[0]
    weight, bias = case.read(first.weight).astype(np.float64), case.read(first.bias).astype(np.float64)
    x = case.experiment.tensors([first.input], case.splits.repair.inputs)[0].astype(np.float64)
    protected = [5, *range(7, 12)]
    others = np.setdiff1d(np.arange(40), protected)
    design = np.concatenate([x[:, others], np.ones((len(x), 1))], axis=1)
    told, *_ = np.linalg.lstsq(design, x[:, protected], rcond=None)
    # One-hot columns add up to one, so the coefficients are not unique; what the layer answers is.
    expected = x @ weight + bias - (x[:, protected] - design @ told) @ weight[protected]
    found = x @ values[first.weight] + values[first.bias]
    np.testing.assert_allclose(found, expected, atol=2e-3 * np.abs(expected).std())
    assert np.abs(found - (x @ weight + bias)).max() > 0.1


# -- people --------------------------------------------------------------------------------------


def test_coefficients_are_those_of_least_squares(tmp_path):
    """One attribute, and columns that are not collinear without it."""
    case = case_of(tmp_path, protected={"sex": SEX})
    found = cut.propose(case)
    values = labelled(found, WHOLE[0]).make()
    x = case.splits.repair.inputs["x"].astype(np.float64)
    design = np.concatenate([x[:, [0, 1, 3, 4, 5]]], axis=1)  # origin adds up to one: it holds the constant
    told, *_ = np.linalg.lstsq(design, x[:, 2], rcond=None)
    before = weights()
    expected = x @ before["W1"] + before["b1"] - np.outer(x[:, 2] - design @ told, before["W1"][2])
    by_name = {parameter.name: new for parameter, new in values.items()}
    np.testing.assert_allclose(x @ by_name["W1"] + by_name["b1"], expected, atol=1e-4)
    assert not by_name["W1"][2].any()
    assert found.details == {"layers": ["first"], "attributes": ["sex"]}
    none = {parameter.name: new for parameter, new in labelled(found, WHOLE[1]).make().items()}
    np.testing.assert_array_equal(none["W1"], np.where(np.arange(6)[:, None] == 2, 0, before["W1"]))
    np.testing.assert_array_equal(none["b1"], before["b1"])


def test_one_hot_columns_go_together(tmp_path):
    case = case_of(tmp_path, protected={"origin": ORIGIN})
    for words in WHOLE:
        values = labelled(cut.propose(case), words).make()
        (weight,) = [new for parameter, new in values.items() if parameter.name == "W1"]
        assert not weight[3:].any() and weight[:3].any(axis=1).all()


def check_nothing_is_left(case: Case, columns: list[int], path: Path) -> None:
    for words in ("not imputed", "imputed from the others"):
        values = labelled(cut.propose(case), f"cut, {words}$").make()
        patched(case, values, path)
        x = people(300, 7).inputs["x"]
        other = varied(x, columns, np.random.default_rng(1))
        np.testing.assert_array_equal(run(path, {"x": x}), run(path, {"x": other}))
        assert (run(case.experiment.model.path, {"x": x}) != run(case.experiment.model.path, {"x": other})).any()


LAYOUTS = {
    "stored the other way round": "[first] z1 = Gemm <transB = 1> (x, T1, b1)",
    "with a factor": "[first] z1 = Gemm <alpha = 2.0, beta = 0.5> (x, W1, b1)",
    "without a bias": "[first] z1 = MatMul (x, W1)",
    "read by two layers": "[left] l = Gemm (x, W1, b1) [right] r = MatMul (x, V1) [sum] z1 = Add (l, r)",
    "scaled before": "[scale] s = Mul (x, k) [shift] t = Sub (s, m) [first] z1 = Gemm (t, W1, b1)",
    "moved before": "[moved] g = Gather <axis = 1> (x, order) [first] z1 = Gemm (g, W1, b1)",
    "one row more": "[row] u = Unsqueeze (x, one) [first] p1 = MatMul (u, W1) [drop] q = Squeeze (p1, one)"
    " [bias] z1 = Add (q, b1)",
}
HELD: dict[str, Array] = {
    "k": np.linspace(0.5, 1.5, 6, dtype=np.float32),
    "m": np.linspace(-1, 1, 6, dtype=np.float32),
    "order": np.array([5, 4, 3, 2, 1, 0]),
    "one": np.array([1]),
}


def laid_out(name: str) -> onnx.ModelProto:
    held: dict[str, Array] = {**HELD, **weights()}
    held["T1"], held["V1"] = held["W1"].T.copy(), 0.3 * held["W1"][:, ::-1].copy()
    if name == "moved before":
        held["W1"] = held["W1"][::-1].copy()
    rest = "h = Relu (z1) z = Gemm (h, W2, b2) y = Sigmoid (z)"
    text = f"people (float[N, 6] x) => (float[N, 1] y) {{ {LAYOUTS[name]} {rest} }}"
    return build(text, {key: values for key, values in held.items() if re.search(rf"\b{key}\b", text)})


@pytest.mark.parametrize("name", LAYOUTS)
def test_wherever_the_columns_are_read_they_are_cut(tmp_path, name):
    case = case_of(tmp_path, laid_out(name))
    check_nothing_is_left(case, [2, 3, 4, 5], tmp_path / "out.onnx")


def test_every_layer_that_reads_them_is_cut(tmp_path):
    found = cut.propose(case_of(tmp_path, laid_out("read by two layers")))
    assert found.details["layers"] == ["left", "right"]
    names = {parameter.name for parameter in labelled(found, WHOLE[0]).make()}
    assert {"W1", "V1"} <= names
    # Each of them is fine-tuned by itself.
    tuned = [item.candidate.label for item in found.found if "fine-tuned" in item.candidate.label]
    assert all(any(f"then {layer} fine-tuned" in label for layer in ("left", "right")) for label in tuned) and tuned


OBSTACLES = {
    "carried around every layer": (
        "[one] s = Gather <axis = 1> (x, column) [first] h = MatMul (x, W1) [second] m = MatMul (h, W2) "
        "[skip] z = Add (m, s)",
        r"protected columns cannot be cut: 'skip' \(Add\) carries it to 'y' with no layer in between",
    ),
    "mixed before the first layer": (
        "[total] s = ReduceSum (x, axis) [mix] t = Mul (x, s) [first] h = MatMul (t, W1) [second] z = MatMul (h, W2)",
        r"protected columns cannot be cut: 'total' \(ReduceSum\) reads it too",
    ),
}


@pytest.mark.parametrize(("text", "message"), OBSTACLES.values(), ids=OBSTACLES)
def test_an_obstacle_is_named(tmp_path, text, message):
    held = {"W1": np.eye(6, dtype=np.float32) + 0.1, "W2": np.array([[2], [0.4], [1], [0.5], [-0.5], [-1]], np.float32)}
    held |= {"column": np.array([2])} if "column" in text else {"axis": np.array([1])}
    proto = build(f"people (float[N, 6] x) => (float[N, 1] y) {{ {text} y = Sigmoid (z) }}", held)
    with pytest.raises(ModelError, match=message):
        cut.propose(case_of(tmp_path, proto, {"sex": SEX}, decision={"threshold": 0.9}))


def test_a_layer_that_may_not_be_rewritten_is_named(tmp_path):
    """Its weights are used a second time."""
    proto = build(
        """people (float[N, 6] x) => (float[N, 1] y) {
            [first] p = MatMul (x, W1)
            r = Relu (p)
            [again] q = MatMul (r, W1)
            h = Relu (q)
            [second] z = MatMul (h, W2)
            y = Sigmoid (z)
        }""",
        {
            "W1": np.eye(6, dtype=np.float32) + 0.1,
            "W2": np.array([[2], [0.4], [1], [0.5], [-0.5], [-1]], np.float32),
        },
    )
    with pytest.raises(ModelError, match=r"'?first'?.*W1"):
        cut.propose(case_of(tmp_path, proto, {"sex": SEX}, decision={"threshold": 0.9}))


def test_what_is_not_read_needs_no_cut(tmp_path):
    values = weights()
    values["W1"][2:] = 0
    proto = model()
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(values[tensor.name], tensor.name))
    assert cut.propose(case_of(tmp_path, proto)).found == ()


@pytest.mark.parametrize(("limits", "fits"), [({"max_rate": 0.1}, True), ({"max_gap": 0.1}, False)])
def test_cuts_are_for_individuals(tmp_path, limits, fits):
    item = {"name": "fair", "kind": "fairness", "protected": {"sex": SEX}, **limits}
    spec = {"decision": {"threshold": 0.5}, "properties": [item]}
    assert cut.applies(opened(write(tmp_path, model(), spec, data=people(200, 1), holdout=people(100, 2)))) == fits


# -- in part -------------------------------------------------------------------------------------


def biased_people(folder: Path, keep: Mapping[str, float], max_rate: float = 0.05) -> Case:
    """Return people whose labels are the unfair model's own answers: every cut costs accuracy."""
    proto = model(unfair=0.5)
    data, holdout = people(800, 1), people(300, 2)
    for item in (data, holdout):
        object.__setattr__(item, "labels", (run(proto, item.inputs)[:, 0] > 0.5).astype(np.int64))
    fair = {"name": "fair", "kind": "fairness", "protected": BOTH, "max_rate": max_rate}
    spec = {"decision": {"threshold": 0.5}, "properties": [fair], "keep": dict(keep), "seed": 1}
    return opened(write(folder, proto, spec, data=data, holdout=holdout))


def test_where_the_whole_cut_costs_too_much_a_part_of_it_is_searched(tmp_path):
    case = biased_people(tmp_path, {"accuracy_drop": 0.02, "recall_drop": 0.1})
    found = cut.propose(case)
    part = labelled(found, "cut in part")
    whole = [labelled(found, words).candidate.outcome for words in WHOLE[:2]]
    shares = [int(share) / 100 for share in re.findall(r"(\d+)% of", part.candidate.label)]
    assert re.search(r"cut in part: \d+% of sex, \d+% of origin$", part.candidate.label)
    assert all(0 <= share <= 1 for share in shares) and min(shares) < 1
    assert min(item.violation for item in whole) > 0
    assert part.candidate.outcome.cost <= min(item.cost for item in whole)
    # So much of the rows is gone.
    (weight,) = [new for parameter, new in part.make().items() if parameter.name == "W1"]
    before = weights()["W1"]
    np.testing.assert_allclose(weight[2], (1 - shares[0]) * before[2], atol=0.006)
    np.testing.assert_allclose(weight[3:], (1 - shares[1]) * before[3:], atol=0.006)
    assert case.before.cost > part.candidate.outcome.cost


def test_no_part_is_searched_where_the_whole_cut_is_good_enough(tmp_path):
    labels = [item.candidate.label for item in cut.propose(case_of(tmp_path)).found]
    assert not [label for label in labels if "in part" in label]
    assert min(item.candidate.outcome.violation for item in cut.propose(case_of(tmp_path)).found) == 0


@pytest.mark.slow
def test_same_seed_same_shares(tmp_path):
    case = biased_people(tmp_path, {"accuracy_drop": 0.02, "recall_drop": 0.1})
    labels = [[item.candidate.label for item in cut.propose(case).found] for _ in range(2)]
    assert labels[0] == labels[1]


# -- several properties --------------------------------------------------------------------------


def weight_of(case: Case, words: str) -> dict[str, Array]:
    return {parameter.name: new for parameter, new in labelled(cut.propose(case), words).make().items()}


def test_an_attribute_of_two_properties_is_cut_once(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    again = {"name": "again", "kind": "fairness", "protected": {"sex": SEX}, "max_rate": 0.0}
    expected = weight_of(case_of(one, protected={"sex": SEX}), WHOLE[0])
    found = weight_of(case_of(two, protected={"sex": SEX}, more=(again,)), WHOLE[0])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


def test_a_column_of_two_attributes_is_cut_once(tmp_path):
    """Somebody's origin, and whether it is a certain one."""
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    certain = {"name": "certain", "kind": "fairness", "protected": {"four": {"column": 4, "values": [0, 1]}}}
    expected = weight_of(case_of(one, protected={"origin": ORIGIN}), WHOLE[0])
    found = weight_of(case_of(two, protected={"origin": ORIGIN}, more=(certain,)), WHOLE[0])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


def test_attributes_of_two_properties_are_not_imputed_from_each_other(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    origin = {"name": "origin", "kind": "fairness", "protected": {"origin": ORIGIN}, "max_rate": 0.0}
    expected = weight_of(case_of(one), WHOLE[0])
    found = weight_of(case_of(two, protected={"sex": SEX}, more=(origin,)), WHOLE[0])
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6)


# -- whole repairs -------------------------------------------------------------------------------

RATE = "individual discrimination rate"


def decided(path: Path, x: Array) -> Array:
    return ort.InferenceSession(path).run(None, {"person": x})[0][:, 0] > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_census_model_judges_nobody_by_sex_or_race(tmp_path, seed):
    out = tmp_path / "out.onnx"
    check_census(onnxcare.fix(CENSUS / "model.onnx", CENSUS / "care.yaml", out, seed=seed, device="cpu"), out)


@pytest.mark.slow
def test_the_census_model_on_less_data(tmp_path):
    spec, out = thinned(CENSUS, tmp_path, data=2500, holdout=2000), tmp_path / "out.onnx"
    check_census(onnxcare.fix(CENSUS / "model.onnx", spec, out, seed=1, device="cpu"), out)


def check_census(fix: onnxcare.Fix, out: Path) -> None:
    assert fix.status == "repaired"
    held = np.load(CENSUS / "holdout.npz")
    x, y = held["x"], held["y"]
    answers = [decided(path, x) for path in (CENSUS / "model.onnx", out)]
    changed = np.zeros((2, len(x)), bool)
    for sex in (0, 1):
        for race in np.eye(5):
            other = x.copy()
            other[:, 5], other[:, 7:12] = sex, race
            for index, path in enumerate((CENSUS / "model.onnx", out)):
                changed[index] |= decided(path, other) != answers[index]
    before, after = changed.mean(axis=1)
    assert before > 0.15 and after <= 0.1 * before
    recalls = [[(answer[y == label] == label).mean() for label in (0, 1)] for answer in answers]
    assert (answers[0] == y).mean() - (answers[1] == y).mean() <= 0.01
    assert np.mean(recalls[0]) - np.mean(recalls[1]) <= 0.02
    (finding,) = fix.verdict.properties
    assert finding.measure(RATE).after.count == 0
    assert sum(note.startswith("Certificate") for note in finding.notes) == 2
