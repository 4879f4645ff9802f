"""Safety: rates against closed forms, losses and gradients by hand, searches that find what sampling misses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import acas, build, run_single
from kinds import corner, court, opened, plane, points, run, slopes, vnnlib, write
from scipy.special import expit, softmax

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.decision import Decision
from onnxcare.errors import SpecError
from onnxcare.measures import Finding
from onnxcare.properties import counterexamples
from onnxcare.properties.safety import Safety
from onnxcare.repair.base import Values

Array = np.ndarray
UNIT = {"low": [0.0, 0.0], "high": [1.0, 1.0]}
FRESH = "violation rate on {:,} fresh samples"
SEARCHED = "counterexamples found by search"


def case_of(
    folder: Path,
    *assertions: str,
    proto: onnx.ModelProto | None = None,
    data: bool = True,
    labelled: bool = True,
    outputs: int = 2,
    decision: object = "argmax",
    unit: bool = True,
    **given: Any,
) -> Case:
    """Return the case of the plane, or of another model, and a formula."""
    vnnlib(folder / "f.vnnlib", *assertions, outputs=outputs, unit=unit)
    item = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": given.pop("samples", 20_000)}
    if "max_rate" in given:
        item["max_rate"] = given.pop("max_rate")
    spec = {"properties": [item], "decision": decision, **given}
    files = {"data": points(400, 1, labelled), "holdout": points(300, 2, labelled)} if data else {}
    return opened(write(folder, proto or plane(), spec, **files))


def only(case: Case) -> Safety:
    (item,) = case.properties
    assert isinstance(item, Safety)
    return item


def measured(case: Case, before: Path | None = None, model: Path | None = None) -> Finding:
    path = case.experiment.model.path
    return only(case).measure(court(model or path, case.splits.holdout, before, case.experiment.decision))


# -- closed forms --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Closed:
    """A formula whose share of the region is known."""

    assertions: tuple[str, ...]
    share: float
    margin: Callable[[Array], Array]
    proto: Callable[[], onnx.ModelProto] = plane
    outputs: int = 2
    decision: object = "argmax"
    unit: bool = True


BAND = 0.5 * 0.2**2
LINE = ("(>= X_0 0.0)", "(<= X_0 1.0)", "(>= X_1 0.75)", "(<= X_1 0.75)")
CLOSED = {
    "a triangle": Closed(("(>= Y_0 0.8)",), BAND, lambda x: corner(x) - 0.8),
    "two conditions": Closed(
        ("(>= Y_0 0.8)", "(<= Y_0 0.9)"),
        BAND - 0.5 * 0.1**2,
        lambda x: np.minimum(corner(x) - 0.8, 0.9 - corner(x)),
    ),
    "a disjunction": Closed(
        ("(or (>= Y_0 0.8) (<= Y_0 0.0))",), BAND + 0.25, lambda x: np.maximum(corner(x) - 0.8, -corner(x))
    ),
    # Two strips of width 1/4, and the triangle between them.
    "outputs compared": Closed(("(<= Y_1 Y_0)",), 1 - (0.75**2 - 0.5 * 0.25**2), lambda x: corner(x) - 0.25),
    "a line": Closed((*LINE, "(>= Y_0 0.7)"), 0.05, lambda x: corner(x) - 0.7, unit=False),
    "probabilities": Closed(
        (f"(>= Y_0 {expit(0.55):.9f})",),
        BAND,
        lambda x: expit(corner(x) - 0.25) - expit(0.55),
        lambda: plane("Softmax"),
    ),
    "costs": Closed(("(>= Y_0 0.8)",), BAND, lambda x: corner(x) - 0.8, decision="argmin"),
    "one score": Closed(
        ("(>= Y_0 0.8)",), BAND, lambda x: corner(x) - 0.8, lambda: plane(outputs=1), 1, {"threshold": 0.25}
    ),
    "one probability": Closed(
        (f"(>= Y_0 {expit(0.8):.9f})",),
        BAND,
        lambda x: expit(corner(x)) - expit(0.8),
        lambda: plane("Sigmoid", 1),
        1,
        {"threshold": 0.6},
    ),
}


@pytest.fixture(scope="module")
def closed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """The case of a closed form, made once."""

    @functools.cache
    def make(name: str) -> Case:
        item, folder = CLOSED[name], tmp_path_factory.mktemp("closed")
        rest = {"outputs": item.outputs, "decision": item.decision, "unit": item.unit, "samples": 50_000}
        return case_of(folder, *item.assertions, proto=item.proto(), **rest)

    return make


@pytest.mark.parametrize("name", CLOSED)
def test_the_violation_rate_is_that_of_the_closed_form(closed, name):
    samples, share = 50_000, CLOSED[name].share
    finding = measured(closed(name))
    rate = finding.measure(FRESH.format(samples)).after
    assert rate.total == samples
    assert abs(rate.value - share) < 5 * np.sqrt(share * (1 - share) / samples)
    assert finding.measure(SEARCHED).after > 0
    assert finding.status == "fail"


@pytest.mark.parametrize("name", CLOSED)
def test_margins_are_those_of_the_closed_form(closed, name):
    item, case = CLOSED[name], closed(name)
    x = points(300, 4).inputs["x"]
    x[:, 1] = 0.75 if name == "a line" else x[:, 1]
    samples = Dataset({"x": x}, None)
    scores = case.experiment.scores(samples.inputs)
    margin = only(case).margin(scores, samples)
    np.testing.assert_allclose(margin, item.margin(x), atol=1e-6)
    np.testing.assert_array_equal(only(case).misbehaves(scores, samples), margin >= 0)
    assert 0 < (margin >= 0).mean() < 1
    family = np.stack([scores, scores])[None]
    np.testing.assert_array_equal(only(case).margin(family, samples), [[margin, margin]])
    np.testing.assert_array_equal(only(case).spoils(scores, samples), margin >= 0)


@pytest.mark.parametrize("name", CLOSED)
def test_the_loss_and_its_gradient(closed, name):
    """On average over the samples, how far margins are from being kept with some slack."""
    item = only(case := closed(name))
    bad = item.evidence("repair").bad
    samples = bad.take(np.arange(0, len(bad), max(1, len(bad) // 12)))
    far = points(12, 5).inputs["x"]
    far[:, 1] = 0.75 if name == "a line" else far[:, 1]
    samples = Dataset({"x": np.concatenate([samples.inputs["x"], far])}, None)
    scores = case.experiment.scores(samples.inputs).astype(np.float64)
    margin, response = item.margin(scores, samples), item.response(scores, samples)
    counts = np.abs(response) > 1e-6
    scale = np.median(margin[counts] / response[counts])
    assert scale > 0
    np.testing.assert_allclose(response, margin / scale, rtol=1e-6, atol=1e-9)
    slack = 0.02
    assert item.loss(scores, samples, None) == pytest.approx(np.mean(np.maximum(0, margin / scale + slack)))
    assert (margin / scale > slack).any() and (margin / scale < -slack).any()
    expected = slopes(lambda family: item.loss(family, samples, None), scores)
    np.testing.assert_allclose(item.loss_gradient(scores, samples, None), expected, rtol=1e-4, atol=1e-7)


def test_samples_outside_of_the_region_do_not_count(tmp_path):
    case = case_of(tmp_path, "(<= X_0 0.9)", "(>= Y_0 0.8)")
    x = np.array([[1.0, 1.0], [0.9, 0.95]], np.float32)
    samples = Dataset({"x": x}, None)
    scores = case.experiment.scores(samples.inputs)
    item = only(case)
    assert item.margin(scores, samples).tolist() == [-np.inf, pytest.approx(0.05, abs=1e-6)]
    assert item.misbehaves(scores, samples).tolist() == [False, True]
    assert item.response(scores, samples)[0] == 0
    assert not item.loss_gradient(scores, samples, None)[0].any()
    np.testing.assert_array_equal(item.inside(x.astype(float), 0), [False, True])


# -- what is known, and what is hunted -----------------------------------------------------------


def test_what_is_known_are_counterexamples_of_the_original(tmp_path):
    item = only(case := case_of(tmp_path, "(>= Y_0 0.8)"))
    known = item.counterexamples
    assert len(known) > 500
    assert (corner(known) >= 0.8 - 1e-6).all()
    sizes = {part: len(item.evidence(part).bad) for part in ("repair", "search", "validation")}
    assert sum(sizes.values()) == len(known)
    for part, share in (("repair", 0.5), ("search", 0.2), ("validation", 0.3)):
        assert sizes[part] == pytest.approx(share * len(known), abs=2)
        bad = item.evidence(part).bad
        assert bad.inputs["x"].dtype == np.float32
        assert item.rate(case.experiment.scores(bad.inputs), bad) == 1
        assert (run(case.experiment.model.path, bad.inputs)[:, 0] >= 0.8).all()
        assert item.evidence(part).twins is None
    assert case.before.excess == (1.0,)
    assert not item.transplantable


def lifted(case: Case, bound: float) -> Values:
    """Return the plane with another bias of y_0: what remains of the triangle is smaller."""
    layer = case.experiment.layers[-1]
    return {layer.bias: np.array([bound, 0.25], np.float32)}


def test_a_hunt_adds_what_a_candidate_leaves(tmp_path):
    item = only(case := case_of(tmp_path, "(>= Y_0 0.8)"))
    before = item.counterexamples
    candidate = case.patched(lifted(case, -0.15))
    found = item.hunt(candidate.experiment)
    assert found > 0
    old, known = ({tuple(point) for point in points} for points in (before.tolist(), item.counterexamples.tolist()))
    assert old <= known
    fresh = np.array(sorted(known - old))
    assert 0 < len(fresh) <= found
    # The triangle of the candidate has legs of 0.05.
    assert (corner(fresh) >= 0.95 - 1e-6).all()
    safe = case.patched(lifted(case, -0.25))
    assert item.hunt(safe.experiment) == 0
    assert {tuple(point) for point in item.counterexamples.tolist()} == known


def test_fresh_counterexamples_are_laid_out_in_new_panels(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)")
    candidate = case.patched(lifted(case, -0.1))
    panel = case.panel("validation")
    found = candidate.hunt()
    assert found > 0
    assert len(case.panel("validation").evidence[0].bad) > len(panel.evidence[0].bad)
    assert case.panel("validation").evidence[0].bad.inputs["x"].shape[1:] == (2,)


def test_safe_samples_of_every_region(tmp_path):
    item = only(case := case_of(tmp_path, "(or (and (<= X_0 0.4) (>= Y_0 0.4)) (and (>= X_0 0.6) (>= Y_0 0.8)))"))
    safe = item.safe_samples(case.experiment, 200)
    left = safe[:, 0] <= 0.4
    assert 100 < left.sum() <= 200 and 100 < (~left).sum() <= 200
    assert (safe[~left, 0] >= 0.6).all()
    assert (corner(safe) < np.where(left, 0.4, 0.8)).all()


def pyramid() -> onnx.ModelProto:
    """y_0 = 1 - |x_0 - 0.3| - |x_1 - 0.62|, y_1 = 0."""
    return build(
        """hat (float[N, 2] x) => (float[N, 2] y) {
            [first] z = Gemm (x, W1, b1)
            [relu] h = Relu (z)
            [second] y = Gemm (h, W2, b2)
        }""",
        {
            "W1": np.array([[1, -1, 0, 0], [0, 0, 1, -1]], np.float32),
            "b1": np.array([-0.3, 0.3, -0.62, 0.62], np.float32),
            "W2": np.array([[-1, 0]] * 4, np.float32),
            "b2": np.array([1, 0], np.float32),
        },
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_a_violation_of_one_in_a_million_is_found(tmp_path, seed):
    """A diamond with diagonals of 1/700; a million even samples bring one of it on average."""
    half = 1 / 1400
    case = case_of(tmp_path, f"(>= Y_0 {1 - half})", proto=pyramid(), samples=20_000, seed=seed)
    known = only(case).counterexamples
    assert len(known) > 0
    assert (np.abs(known - [0.3, 0.62]).sum(axis=1) <= half + 1e-6).all()
    even = np.random.default_rng(seed).uniform(size=(20_000, 2))
    assert (np.abs(even - [0.3, 0.62]).sum(axis=1) > half).all()
    finding = measured(case)
    assert finding.measure(FRESH.format(20_000)).after.count == 0
    assert finding.measure(SEARCHED).after > 0
    assert finding.status == "fail"


def stepped() -> onnx.ModelProto:
    """The plane, but its answers jump: y_0 is a tenth of 0 to 10."""
    return build(
        """stepped (float[N, 2] x) => (float[N, 2] y) {
            [first] z = Gemm (x, W1, b1)
            [relu] h = Relu (z)
            [floor] f = Floor (h)
            [second] y = Gemm (f, W2, b2)
        }""",
        {
            "W1": np.array([[10], [0]], np.float32),
            "b1": np.zeros(1, np.float32),
            "W2": np.array([[0.1, 0]], np.float32),
            "b2": np.array([0, 0.25], np.float32),
        },
    )


def test_without_a_gradient_it_is_said_that_only_samples_were_tried(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.85)", proto=stepped(), bounds=UNIT, data=False)
    (note,) = only(case).notes
    assert note.startswith("Counterexamples are only sampled, not searched for by gradient:") and "Floor" in note
    assert (only(case).counterexamples[:, 0] >= 0.9 - 1e-6).all()
    assert len(only(case).counterexamples) > 1000
    assert measured(case).notes == (note,)


def test_a_safe_model_has_nothing_to_be_repaired(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 1.5)")
    item = only(case)
    assert item.counterexamples.shape == (0, 2)
    for part in ("repair", "search", "validation"):
        assert len(item.evidence(part).bad) == 0
    assert case.before.excess == (0.0,)
    assert case.before.violation == 0
    finding = measured(case)
    assert finding.status == "pass"
    assert finding.measure(SEARCHED).after == 0


# -- the judge -----------------------------------------------------------------------------------


@pytest.fixture
def grid(monkeypatch: pytest.MonkeyPatch) -> Array:
    """Take the points of a grid in place of random ones."""
    ticks = (np.arange(100) + 0.37) / 100  # no sum of two of them decides by a rounding
    even = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2).astype(np.float32).astype(np.float64)

    def on_grid(region, count, rng):
        inside = ((even >= region.low) & (even <= region.high)).all(axis=1)
        return even[inside]

    monkeypatch.setattr(counterexamples, "draw", on_grid)
    return even


def test_drawdown_is_counted_where_the_property_held(tmp_path, monkeypatch, request):
    case = case_of(tmp_path, "(<= X_0 0.8)", "(>= Y_0 0.6)", bounds=UNIT)
    even = request.getfixturevalue("grid")
    path, after = case.experiment.model.path, tmp_path / "after.onnx"
    proto = onnx.load(path)
    for tensor in proto.graph.initializer:
        if tensor.name == "b2":
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.array([-0.1, 0.25], np.float32), "b2"))
    after.write_bytes(proto.SerializeToString())
    finding = measured(case, path, after)

    def decisions(bias: float, x: Array) -> list[int]:
        return [0 if value + bias > 0.25 else 1 for value in corner(x)]

    region = even[even[:, 0] <= 0.8]
    held = [point for point in region if corner(point[None])[0] < 0.6]
    fresh = next(item for item in finding.measures if "fresh samples" in item.name)
    assert (fresh.before.count, fresh.before.total) == (len(region) - len(held), len(region))
    assert fresh.after.count == sum(corner(region) - 0.1 >= 0.6)
    assert fresh.before.count > fresh.after.count > 0
    moved = finding.measure("decisions changed where it held").after
    kept = np.array(held)
    expected = sum(a != b for a, b in zip(decisions(0, kept), decisions(-0.1, kept), strict=True))
    assert (moved.count, moved.total) == (expected, len(held)) and expected > 0
    whole = finding.measure("decisions changed over the whole domain").after
    expected = sum(a != b for a, b in zip(decisions(0, even), decisions(-0.1, even), strict=True))
    assert (whole.count, whole.total) == (expected, len(even))


def test_drawdown_needs_another_file_and_the_domain_bounds(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)", samples=1000)
    path = case.experiment.model.path
    names = [[item.name for item in measured(case, before).measures] for before in (None, path)]
    assert names[0] == [FRESH.format(1000), SEARCHED]
    assert names[1] == [*names[0], "decisions changed where it held"]
    assert measured(case, path).measure("decisions changed where it held").after.count == 0


def test_a_rate_that_is_tolerated(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)", max_rate=0.03, samples=50_000)
    finding = measured(case)
    assert finding.measure(FRESH.format(50_000)).status == "pass"
    assert finding.measure(SEARCHED).limit is None and finding.measure(SEARCHED).after > 0
    assert finding.status == "pass"
    assert case.before.excess[0] > 0.03


def test_fresh_samples_are_those_of_the_seed(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)", samples=10_000)
    name = FRESH.format(10_000)
    first, again = (measured(case).measure(name).after.count for _ in range(2))
    other = court(case.experiment.model.path, case.splits.holdout, None, case.experiment.decision)
    object.__setattr__(other, "seed", 99)
    assert first == again != only(case).measure(other).measure(name).after.count


def test_every_region_gets_its_part_of_the_samples(tmp_path):
    either = "(or (and (<= X_0 0.5) (>= Y_0 0.4)) (and (>= X_0 0.5) (>= Y_0 0.8)))"
    finding = measured(case_of(tmp_path, either, samples=60_000))
    rate = finding.measure(FRESH.format(60_000)).after
    # A tenth of the left half, and 0.02 of the right one, whose area is 1/2.
    assert rate.value == pytest.approx((0.1 + 0.04) / 2, abs=0.004)


# -- data and models -----------------------------------------------------------------------------


def test_values_of_several_inputs_follow_each_other(tmp_path):
    """y_0 = a_0 - b_0 + 10 b_1, where X_0 is a_0, and X_1 and X_2 are b."""
    proto = build(
        """two (float[N, 1] a, float[N, 2] b) => (float[N, 2] y) {
            [both] c = Concat <axis = 1> (a, b)
            [fc] y = Gemm (c, W, v)
        }""",
        {"W": np.array([[1, 0], [-1, 0], [10, 0]], np.float32), "v": np.array([0, 5], np.float32)},
    )
    vnnlib(tmp_path / "f.vnnlib", "(>= Y_0 10.5)", inputs=3)
    item = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": 50_000}
    bounds = {"low": [0.0] * 3, "high": [1.0] * 3}
    case = opened(write(tmp_path, proto, {"properties": [item], "bounds": bounds}))
    known = only(case).counterexamples
    assert len(known) > 100
    assert (known @ [1, -1, 10] >= 10.5 - 1e-5).all()
    bad = only(case).evidence("repair").bad
    assert {name: values.shape[1] for name, values in bad.inputs.items()} == {"a": 1, "b": 2}
    # u = 1 - a_0, v = b_0, w = 10 (1 - b_1): u + v + w <= 1/2, a corner of a box of 1 x 1 x 10.
    share = 0.5**3 / 6 / 10
    rate = measured(case).measure(FRESH.format(50_000)).after.value
    assert abs(rate - share) < 5 * np.sqrt(share / 50_000)


def test_a_published_shape_with_a_fixed_batch(tmp_path):
    """Inputs of [1, 1, 1, 5], costs of which the least counts."""
    subject = acas()
    held = np.random.default_rng(1).uniform(-1, 1, (500, 1, 1, 5)).astype(np.float32)
    costs = run_single(subject.proto, {"input": held}, "costs")[0]
    bound = float(np.quantile(costs[:, 0], 0.97))
    box = [f"(>= X_{i} -1.0) (<= X_{i} 1.0)" for i in range(5)]
    vnnlib(tmp_path / "f.vnnlib", f"(and {' '.join(box)} (>= Y_0 {bound}))", inputs=5, outputs=5, unit=False)
    item = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": 5000}
    spec = {"properties": [item], "decision": "argmin", "bounds": {"low": [-1.0] * 5, "high": [1.0] * 5}}
    case = opened(write(tmp_path, subject.proto, spec))
    known = only(case).evidence("search").bad.inputs["input"]
    assert known.shape[1:] == (1, 1, 5) and len(known) > 100
    assert (run_single(subject.proto, {"input": known}, "costs")[0][:, 0] >= bound - 1e-4).all()
    x = case.splits.search.inputs["input"][:50]
    answers = run_single(subject.proto, {"input": x}, "costs")[0].argmin(axis=1)
    np.testing.assert_array_equal(case.splits.search.truth[:50], answers)
    assert measured(case).measure(FRESH.format(5000)).after.value == pytest.approx(0.03, abs=0.02)


def test_bounds_take_the_place_of_data(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)", data=False, bounds={"low": [0.0, 0.5], "high": [1.0, 1.0]})
    for part in ("repair", "search", "validation", "holdout"):
        samples = case.splits.part(part)
        x = samples.inputs["x"]
        assert x.dtype == np.float32 and len(x) > 1000
        assert (x >= [0, 0.5]).all() and (x <= 1).all()
        np.testing.assert_array_equal(samples.truth, (corner(x) <= 0.25).astype(int))
        assert (corner(x) < 0.8).all()
    drawn = sum(len(case.splits.part(part)) for part in ("repair", "search", "validation", "holdout"))
    assert drawn == pytest.approx(20_000 * (1 - BAND / 0.5), abs=100)


@pytest.mark.parametrize("labelled", [True, False])
def test_labels_are_taken_where_there_are_any(tmp_path, labelled):
    data = points(400, 1)
    case = case_of(tmp_path, "(>= Y_0 0.8)", labelled=labelled)
    whole = np.concatenate([case.splits.part(part).inputs["x"] for part in ("repair", "search", "validation")])
    violating = corner(data.inputs["x"]) >= 0.8
    assert violating.any()
    assert len(whole) == len(data) - (0 if labelled else violating.sum())
    assert (corner(whole) >= 0.8).any() == labelled
    for part in ("repair", "search", "validation", "holdout"):
        samples = case.splits.part(part)
        np.testing.assert_array_equal(samples.truth, (corner(samples.inputs["x"]) <= 0.25).astype(int))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": 3}, "speaks of 3 input values, but .*model.onnx takes 2"),
        ({"outputs": 3}, "speaks of 3 output values, but 'y' of .*model.onnx has 2"),
    ],
)
def test_a_formula_of_another_model_is_refused(tmp_path, given, message):
    vnnlib(tmp_path / "f.vnnlib", "(>= Y_0 0.8)", **given)
    item = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib"}
    spec = write(tmp_path, plane(), {"properties": [item]}, data=points(100, 1), holdout=points(100, 2))
    with pytest.raises(SpecError, match=message) as caught:
        opened(spec)
    assert "care.yaml" in str(caught.value) and "f.vnnlib" in str(caught.value)


@pytest.mark.parametrize("assertion", ["(<= X_0 0.5)", "(or (>= Y_0 0.8) (<= X_0 0.1))"])
def test_what_no_model_could_keep_is_refused(tmp_path, assertion):
    with pytest.raises(SpecError, match=r"f\.vnnlib: asserts nothing about the outputs"):
        case_of(tmp_path, assertion)


@pytest.mark.parametrize("data", [True, False])
def test_bounds_of_another_model_are_refused(tmp_path, data):
    with pytest.raises(SpecError, match=r"care\.yaml: bounds: 3 values, but .*model\.onnx takes 2"):
        case_of(tmp_path, "(>= Y_0 0.8)", data=data, bounds={"low": [0] * 3, "high": [1] * 3})


def test_probabilities_of_the_experiment_are_those_of_the_file(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.6)", proto=plane("Softmax"))
    x = points(50, 3).inputs
    assert case.experiment.decision.final == "Softmax"
    outputs = case.experiment.decision.outputs(case.experiment.scores(x))
    np.testing.assert_allclose(outputs, run(plane("Softmax"), x), atol=1e-6)
    np.testing.assert_allclose(outputs, softmax(run(plane(), x), axis=1), atol=1e-6)
    assert Decision("argmax").outputs(np.eye(2)).tolist() == np.eye(2).tolist()
