"""The linear programme on the last layer: what is known of counterexamples is broken, decisions elsewhere are kept."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import build, random
from kinds import opened, patched, plane, points, run, vnnlib, write

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.properties.safety import Safety
from onnxcare.properties.vnnlib import load_formula
from onnxcare.repair import last_layer
from onnxcare.repair.base import Found

Array = np.ndarray
UNIT = {"low": [0.0, 0.0], "high": [1.0, 1.0]}


def case_of(
    folder: Path,
    *assertions: str,
    proto: onnx.ModelProto | None = None,
    outputs: int = 2,
    decision: object = "argmax",
    more: tuple[str, ...] = (),
    **given: Any,
) -> Case:
    vnnlib(folder / "f.vnnlib", *assertions, outputs=outputs)
    items = [{"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": 1000}]
    for number, assertion in enumerate(more):
        vnnlib(folder / f"{number}.vnnlib", assertion, outputs=outputs)
        items.append({"name": f"more {number}", "kind": "safety", "vnnlib": f"{number}.vnnlib", "samples": 1000})
    spec = {"properties": items, "decision": decision, "bounds": UNIT, **given}
    return opened(write(folder, proto or plane(), spec, data=points(600, 1), holdout=points(200, 2)))


def proposed(case: Case) -> Found:
    (found,) = last_layer.propose(case).found
    return found


def even(size: int = 100_000) -> Array:
    return np.random.default_rng(17).uniform(size=(size, 2)).astype(np.float32)


# -- what has to hold ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Wish:
    """A formula, the model it speaks of, and what share of all decisions may change at most."""

    assertions: tuple[str, ...]
    changed: float
    proto: onnx.ModelProto
    outputs: int = 2
    decision: object = "argmax"


WISHES = {
    "a triangle": Wish(("(>= Y_0 0.8)",), 0.02, plane()),
    "without a bias": Wish(("(>= Y_0 0.8)",), 0.01, plane(bias=False)),
    "two conditions": Wish(("(>= Y_0 0.8)", "(<= Y_1 0.3)"), 0.01, plane()),
    "in a part of the domain": Wish(("(>= X_0 0.9)", "(>= Y_0 0.8)"), 0.02, plane()),
    "either of two": Wish(("(or (>= Y_0 0.8) (>= Y_1 0.5))",), 0.02, plane()),
    "costs": Wish(("(>= Y_0 0.8)",), 0.02, plane(), decision="argmin"),
    "one score": Wish(("(>= Y_0 0.8)",), 0.02, plane(outputs=1), 1, {"threshold": 0.25}),
}


def decided(wish: Wish, y: Array) -> Array:
    if wish.decision == "argmin":
        return y.argmin(axis=1)
    return y.argmax(axis=1) if wish.outputs > 1 else y[:, 0] > 0.25


@pytest.mark.parametrize("name", WISHES)
def test_no_known_counterexample_is_left_and_decisions_are_kept(tmp_path, name):
    wish = WISHES[name]
    case = case_of(tmp_path, *wish.assertions, proto=wish.proto, outputs=wish.outputs, decision=wish.decision)
    (item,) = case.properties
    assert isinstance(item, Safety)
    before = item.counterexamples
    assert len(before) > 100
    found = proposed(case)
    path = patched(case, found.make(), tmp_path / "out.onnx")
    formula = load_formula(tmp_path / "f.vnnlib")

    def violating(model: Path | onnx.ModelProto, x: Array) -> Array:
        x = x.astype(np.float32)
        return formula.violated(x.astype(np.float64), run(model, {"x": x}).astype(np.float64))

    # Those of the original, and those that rounds have brought.
    assert violating(wish.proto, before).all()
    assert {tuple(point) for point in before} <= {tuple(point) for point in item.counterexamples}
    assert not violating(path, item.counterexamples).any()
    assert violating(wish.proto, even()).mean() > 0.002
    assert not violating(path, even()).any()
    decisions = [decided(wish, run(model, {"x": even()})) for model in (wish.proto, path)]
    assert (decisions[0] != decisions[1]).mean() <= wish.changed
    assert len(np.unique(decisions[1])) == len(np.unique(decisions[0]))


def test_only_the_last_layer_is_changed(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)")
    found = proposed(case)
    assert {parameter.name for parameter in found.make()} == {"W2", "b2"}
    panel = case.panel("validation")
    (path := tmp_path / "out.onnx").write_bytes(patched(case, found.make(), path).read_bytes())
    y = run(path, panel.inputs)
    assert found.candidate.outcome.excess == ((y[panel.bad[0], 0] >= 0.8).mean(),) == (0.0,)
    right = (y[panel.clean_rows].argmax(axis=1) == panel.clean.truth).mean()
    assert found.candidate.outcome.accuracy_drop == pytest.approx(1 - right)


def test_a_search_finds_nothing_more(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)")
    candidate = case.patched(proposed(case).make())
    assert candidate.hunt() == 0


def test_what_is_found_on_the_way_belongs_to_the_evidence(tmp_path):
    case = case_of(tmp_path, "(>= Y_0 0.8)")
    panel = case.panel("validation")
    last_layer.propose(case)
    assert case.panel("validation") is not panel
    (item,) = case.properties
    assert sum(len(item.evidence(part).bad) for part in ("repair", "search", "validation")) == len(item.counterexamples)


@pytest.mark.parametrize("more", ["(>= Y_1 0.249)", "(<= Y_1 0.24)"], ids=["broken, too", "held already"])
def test_several_properties_are_kept_at_once(tmp_path, more):
    case = case_of(tmp_path, "(>= Y_0 0.8)", more=(more,))
    path = patched(case, proposed(case).make(), tmp_path / "out.onnx")
    y = run(path, {"x": even()})
    assert not (y[:, 0] >= 0.8).any()
    assert not (y[:, 1] >= 0.249 if ">=" in more else y[:, 1] <= 0.24).any()


@pytest.mark.slow
def test_same_seed_same_change(tmp_path):
    changes = [proposed(case_of(tmp_path, "(>= Y_0 0.8)")).make() for _ in range(2)]
    for one, other in zip(changes[0].values(), changes[1].values(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_a_wider_net_with_several_classes(tmp_path):
    """Random weights, five classes: class 0 must not win in a corner."""
    proto = build(
        """wide (float[N, 2] x) => (float[N, 5] y) {
            [first] z1 = MatMul (x, W1)
            [bias1] a1 = Add (z1, b1)
            [relu1] h1 = Relu (a1)
            [second] z2 = MatMul (h1, W2)
            [bias2] y = Add (z2, b2)
        }""",
        {"W1": random(2, 24), "b1": random(24), "W2": random(24, 5), "b2": random(5)},
    )
    answers = run(proto, {"x": even()}).argmax(axis=1)
    corner_rows = (even() >= 0.8).all(axis=1)
    worst = int(np.bincount(answers[corner_rows]).argmax())
    wins = [f"(>= Y_{worst} Y_{other})" for other in range(5) if other != worst]
    vnnlib(tmp_path / "f.vnnlib", "(>= X_0 0.8)", "(>= X_1 0.8)", *wins, outputs=5)
    data, holdout = (Dataset({"x": x}, run(proto, {"x": x}).argmax(axis=1)) for x in (even(600), even(900)[600:]))
    item = {"name": "far", "kind": "safety", "vnnlib": "f.vnnlib", "samples": 1000}
    case = opened(write(tmp_path, proto, {"properties": [item], "bounds": UNIT}, data=data, holdout=holdout))
    path = patched(case, proposed(case).make(), tmp_path / "out.onnx")
    after = run(path, {"x": even()}).argmax(axis=1)
    assert (answers[corner_rows] == worst).mean() > 0.2
    assert not (after[corner_rows] == worst).any()
    assert (after != answers)[~corner_rows].mean() < 0.1


# -- what it is not for --------------------------------------------------------------------------


def convolutional() -> onnx.ModelProto:
    return build(
        """head (float[N, 2] x) => (float[N, 2] y) {
            [image] i = Reshape (x, shape)
            [conv] c = Conv (i, K, k)
            [flat] y = Flatten (c)
        }""",
        {
            "shape": np.array([-1, 2, 1, 1]),
            "K": np.array([[1, 0], [0, 1]], np.float32).reshape(2, 2, 1, 1),
            "k": np.zeros(2, np.float32),
        },
    )


NOT_FOR = {
    "probabilities": (lambda: plane("Softmax"), "(>= Y_0 0.6)"),
    "a convolution": (convolutional, "(>= Y_0 0.8)"),
    "something behind it": (lambda: plane("Tanh"), "(>= Y_0 0.6)"),
    "nothing known": (plane, "(>= Y_0 1.5)"),
}


@pytest.mark.parametrize(("proto", "assertion"), NOT_FOR.values(), ids=NOT_FOR)
def test_it_is_for_outputs_that_a_layer_writes(tmp_path, proto, assertion):
    case = case_of(tmp_path, assertion, proto=proto())
    assert not last_layer.applies(case)
    other = tmp_path / "other"
    other.mkdir()
    assert last_layer.applies(case_of(other, "(>= Y_0 0.8)"))


def test_it_is_for_safety(tiny):
    assert not last_layer.applies(opened(tiny.spec))


IMPOSSIBLE = {
    # Without a bias the last layer answers 0 where no hidden unit is active.
    "dead units": (plane(bias=False), ("(<= X_0 0.2)", "(<= X_1 0.2)", "(<= Y_0 0.0)")),
    "a contradiction": (plane(), ("(or (<= Y_0 0.5) (>= Y_0 0.4))",)),
}


@pytest.mark.parametrize(("proto", "assertions"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_what_no_change_can_do_is_said(tmp_path, proto, assertions):
    case = case_of(tmp_path, *assertions, proto=proto)
    with pytest.raises(ModelError, match=r"model\.onnx: no change of the last layer second breaks what is known"):
        last_layer.propose(case)
