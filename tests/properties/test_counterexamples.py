"""Searching for counterexamples: what is drawn lies in the region, what is found is a counterexample, rare ones too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kinds import vnnlib

from onnxcare.errors import DataError
from onnxcare.graph.model import Signature
from onnxcare.properties.counterexamples import Descent, Space, draw, find
from onnxcare.properties.vnnlib import Formula, Linear, Region, load_formula

Array = np.ndarray
FLAT = Space((Signature("x", np.dtype(np.float32), ("N", 2)),), ((2,),))


def box(*ends: tuple[float, float], inputs: tuple[Linear, ...] = (), outputs: tuple[Linear, ...] = ()) -> Region:
    return Region(np.array([low for low, _ in ends]), np.array([high for _, high in ends]), inputs, outputs)


def rng(seed: int = 1) -> np.random.Generator:
    return np.random.default_rng(seed)


# -- drawing -------------------------------------------------------------------------------------


def check_drawn(low: float, high: float, values: Array) -> None:
    """Check that values are float32 numbers in a range, or the nearest one where none lies in it."""
    stored = values.astype(np.float32)
    np.testing.assert_array_equal(stored.astype(np.float64), values)
    inside = (values >= low) & (values <= high)
    if inside.all():
        return
    # Nothing in the range can be stored: the float32 numbers on its two sides are neighbours.
    assert len(np.unique(stored)) == 1
    here, below, above = (float(np.nextafter(stored[0], np.float32(end))) for end in (stored[0], -np.inf, np.inf))
    assert (here < low and above > high) or (here > high and below < low)


@pytest.mark.parametrize(
    ("low", "high"),
    [
        (0.0, 1.0),
        (-0.0, 0.0),
        (-0.0, 1.0),
        (0.5, 0.5),
        (0.1, 0.1),
        (-0.1, -0.1),
        (0.1, 0.1 + 1e-12),
        (0.1, 0.10000001),
        (1 / 3, 2 / 3),
        (-0.3, -0.1),
        (1e10 + 1, 1e10 + 5000),
        (-1e-44, 1e-44),
        (1e-50, 1e-46),
        (-3e38, 3e38),
    ],
)
def test_points_are_float32_numbers_inside_the_box(low, high):
    points = draw(box((0.0, 1.0), (low, high)), 3000, rng())
    assert points.shape == (3000, 2) and points.dtype == np.float64
    check_drawn(low, high, points[:, 1])
    check_drawn(0.0, 1.0, points[:, 0])
    assert points[:, 0].std() > 0.25
    fed = FLAT.inputs(points)["x"]
    assert fed.dtype == np.float32
    np.testing.assert_array_equal(fed, points)


FINITE = st.floats(-1e30, 1e30)


@settings(max_examples=200, deadline=None)
@given(FINITE, FINITE)
def test_points_of_any_box_can_be_stored(one, other):
    low, high = min(one, other), max(one, other)
    check_drawn(low, high, draw(box((low, high)), 20, rng())[:, 0])


def test_points_are_drawn_evenly():
    points = draw(box((-1.0, 3.0), (0.1, 0.2)), 20_000, rng())
    for column, low, high in ((0, -1.0, 3.0), (1, 0.1, 0.2)):
        counts, _ = np.histogram(points[:, column], 10, (low, high))
        assert abs(counts - 2000).max() < 250
    assert abs(np.corrcoef(points.T)[0, 1]) < 0.05


@pytest.mark.parametrize("count", [0, 1, 7, 1000])
def test_as_many_points_as_are_asked_for(count):
    below = Linear(np.array([1.0, 1.0]), 0.7)
    assert draw(box((0.0, 1.0), (0.0, 1.0), inputs=(below,)), count, rng()).shape == (count, 2)


def test_further_constraints_of_the_inputs_hold():
    inputs = (Linear(np.array([1.0, 1.0]), 1.0), Linear(np.array([1.0, -2.0]), 0.0))
    points = draw(box((0.0, 1.0), (0.0, 1.0), inputs=inputs), 10_000, rng())
    # Rounding to float32 may move a point by one part in ten million.
    assert (points.sum(axis=1) <= 1 + 1e-6).all()
    assert (points[:, 0] <= 2 * points[:, 1] + 1e-6).all()
    # The triangle (0, 0), (0, 1), (2/3, 1/3), evenly.
    np.testing.assert_allclose(points.mean(axis=0), [2 / 9, 4 / 9], atol=0.01)
    assert points[:, 0].max() > 0.64 and points[:, 1].max() > 0.97


class Patient(np.random.Generator):
    """A generator that does not go on for ever."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(1))
        self.left = 5_000_000

    def uniform(self, low=0.0, high=1.0, size=None):
        self.left -= int(np.prod(size))
        assert self.left > 0, "it never gives up"
        return super().uniform(low, high, size)


@pytest.mark.parametrize("bound", [-1.0, 1e-4])
@pytest.mark.parametrize("count", [1, 1000])
def test_constraints_that_leave_next_to_nothing_are_said_to(bound, count):
    """Nothing at all, or one in two hundred million."""
    corner = Linear(np.array([1.0, 1.0]), bound)
    with pytest.raises(DataError, match="too little of their box"):
        draw(box((0.0, 1.0), (0.0, 1.0), inputs=(corner,)), count, Patient())


def test_same_seed_same_points():
    one, same, other = (draw(box((0.0, 1.0)), 100, rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


# -- points and inputs ---------------------------------------------------------------------------


def test_points_are_the_inputs_one_after_the_other_in_c_order():
    signatures = (Signature("image", np.dtype(np.float32), ("N", 2, 3)), Signature("t", np.dtype(np.float64), ("N",)))
    space = Space((*signatures, Signature("k", np.dtype(np.int64), ("N", 1))), ((2, 3), (), (1,)))
    assert space.size == 8
    points = np.arange(16.0).reshape(2, 8)
    inputs = space.inputs(points)
    assert {name: (values.shape, values.dtype.name) for name, values in inputs.items()} == {
        "image": ((2, 2, 3), "float32"),
        "t": ((2,), "float64"),
        "k": ((2, 1), "int64"),
    }
    assert inputs["image"][1, 1].tolist() == [11, 12, 13] and inputs["t"][1] == 14 and inputs["k"][1, 0] == 15
    np.testing.assert_array_equal(space.points(inputs), points)
    assert space.points(space.inputs(points[:0])).shape == (0, 8)


# -- finding -------------------------------------------------------------------------------------


Function = Callable[[Array], Array]


def searched(
    formula: Formula, y: Function, slope: Function | None, seed: int = 1, count: int = 20_000, starts: int = 64
) -> Array:
    """Search with a function of points [N, 2] -> [N, outputs] and its Jacobian [N, outputs, 2]."""
    descent: Descent | None = None
    if slope is not None:

        def descent(inputs, at):
            answers = y(inputs["x"].astype(np.float64))
            seeds = at(answers, slice(0, len(answers)))
            return answers, {"x": np.einsum("no,noi->ni", seeds, slope(inputs["x"].astype(np.float64)))}

    return find(formula, FLAT, lambda inputs: y(inputs["x"].astype(np.float64)), descent, count, starts, rng(seed))


def waves(x: Array) -> Array:
    return np.stack([np.sin(7 * x[:, 0]) * np.cos(5 * x[:, 1]), x[:, 0] - x[:, 1] ** 2], axis=1)


def waves_slope(x: Array) -> Array:
    u, v = x.T
    first = [7 * np.cos(7 * u) * np.cos(5 * v), -5 * np.sin(7 * u) * np.sin(5 * v)]
    return np.stack([np.stack(first, axis=1), np.stack([np.ones(len(x)), -2 * v], axis=1)], axis=1)


FORMULAS: dict[str, tuple[tuple[str, ...], Callable[[Array, Array], Array]]] = {
    "one condition": (("(>= Y_0 0.9)",), lambda x, y: y[:, 0] >= 0.9),
    "several": (
        ("(>= Y_0 0.3)", "(<= Y_1 Y_0)", "(>= Y_1 -0.1)"),
        lambda x, y: (y[:, 0] >= 0.3) & (y[:, 1] <= y[:, 0]) & (y[:, 1] >= -0.1),
    ),
    "either": (("(or (>= Y_0 0.95) (<= Y_1 -0.9))",), lambda x, y: (y[:, 0] >= 0.95) | (y[:, 1] <= -0.9)),
    "regions of their own": (
        ("(or (and (<= X_0 0.4) (>= Y_0 0.9)) (and (>= X_0 0.7) (<= Y_0 -0.9)))",),
        lambda x, y: (x[:, 0] <= 0.4) & (y[:, 0] >= 0.9) | (x[:, 0] >= 0.7) & (y[:, 0] <= -0.9),
    ),
    "constrained inputs": (
        ("(<= (+ X_0 X_1) 0.5)", "(>= Y_0 0.8)"),
        lambda x, y: (x.sum(axis=1) <= 0.5 + 1e-6) & (y[:, 0] >= 0.8),
    ),
    "a line": (
        ("(<= X_1 0.1)", "(>= X_1 0.1)", "(>= Y_0 0.5)"),
        lambda x, y: (x[:, 1] == np.float32(0.1)) & (y[:, 0] >= 0.5),
    ),
}


@pytest.mark.parametrize(("assertions", "holds"), FORMULAS.values(), ids=FORMULAS)
@pytest.mark.parametrize("gradients", [True, False])
def test_what_is_found_is_a_counterexample(tmp_path, assertions, holds, gradients):
    formula = load_formula(vnnlib(tmp_path / "f.vnnlib", *assertions))
    found = searched(formula, waves, waves_slope if gradients else None)
    assert len(found) > 100
    assert found.shape[1] == 2
    np.testing.assert_array_equal(found, found.astype(np.float32))
    assert ((found >= 0) & (found <= 1)).all()
    assert holds(found, waves(found)).all()
    np.testing.assert_array_equal(found, searched(formula, waves, waves_slope if gradients else None))


def test_every_region_is_searched(tmp_path):
    assertions, _ = FORMULAS["regions of their own"]
    found = searched(load_formula(vnnlib(tmp_path / "f.vnnlib", *assertions)), waves, waves_slope)
    assert (found[:, 0] <= 0.4).sum() > 50 and (found[:, 0] >= 0.7).sum() > 50


def hat(x: Array) -> Array:
    """A pyramid with its peak, of height 1, at a point inside."""
    return 1 - np.abs(x - [0.3, 0.62]).sum(axis=1, keepdims=True)


def hat_slope(x: Array) -> Array:
    return -np.sign(x - [0.3, 0.62])[:, None, :]


def rare(folder: Path, *more: str) -> Formula:
    """Return a formula that holds in a diamond of half-diagonals 1/1400: one point in a million."""
    return load_formula(vnnlib(folder / "f.vnnlib", f"(>= Y_0 {1 - 1 / 1400})", *more, outputs=1))


@pytest.mark.parametrize("seed", range(3))
def test_gradients_find_what_samples_miss(tmp_path, seed):
    formula = rare(tmp_path)
    assert len(searched(formula, hat, None, seed)) == 0
    found = searched(formula, hat, hat_slope, seed)
    assert len(found) > 0
    assert (np.abs(found - [0.3, 0.62]).sum(axis=1) <= 1 / 1400 + 1e-9).all()


def test_gradients_stay_inside(tmp_path):
    """The peak is out of reach: behind a constraint, or outside of the box."""
    beyond = rare(tmp_path, "(>= X_0 (+ X_1 0.1))")
    assert len(searched(beyond, hat, hat_slope)) == 0
    smaller = load_formula(vnnlib(tmp_path / "g.vnnlib", "(<= X_1 0.5)", f"(>= Y_0 {1 - 1 / 1400})", outputs=1))
    assert len(searched(smaller, hat, hat_slope)) == 0
    # Nothing is lost by it: the best that can be reached is.
    reached = load_formula(vnnlib(tmp_path / "h.vnnlib", "(<= X_1 0.5)", f"(>= Y_0 {0.88 - 1e-3})", outputs=1))
    assert len(searched(reached, hat, hat_slope)) > 0


def test_what_the_gradients_graph_says_does_not_count(tmp_path):
    """Its answers may be rounded differently; here they are plainly wrong."""
    formula = load_formula(vnnlib(tmp_path / "f.vnnlib", "(>= Y_0 0.5)", outputs=1))

    def lying(inputs, at):
        answers = np.ones((len(inputs["x"]), 1))
        return answers, {"x": np.zeros((len(answers), 2), np.float32)}

    found = find(formula, FLAT, lambda inputs: np.zeros((len(inputs["x"]), 1)), lying, 1000, 16, rng())
    assert found.shape == (0, 2)
