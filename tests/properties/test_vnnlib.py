"""VNN-LIB: both versions, against an evaluator of the formula as it is written."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from onnxcare.errors import SpecError
from onnxcare.properties.vnnlib import Formula, load_formula

# Property 2 of ACAS Xu: far away and slow, "clear of conflict" must not be the worst advice (scores are costs).
ACAS_BOX = [(0.6, 0.679857769), (-0.5, 0.5), (-0.5, 0.5), (0.45, 0.5), (-0.5, -0.45)]


def acas(version: str) -> str:
    """Property 2 in either version."""
    x, y = ("X_{}", "Y_{}") if version == "1.0" else ("X[0,0,0,{}]", "Y[0,{}]")
    if version == "1.0":
        lines = [f"(declare-const {name}_{i} Real)" for name in "XY" for i in range(5)]
    else:
        tensors = "(declare-input X float32 [1, 1, 1, 5]) (declare-output Y float32 [1,5])"
        lines = ["(vnnlib-version <2.0>)", f"(declare-network acas {tensors})"]
    for i, (low, high) in enumerate(ACAS_BOX):
        lines += [f"; input {i}", f"(assert (<= {x.format(i)} {high}))", f"(assert (>= {x.format(i)} {low}))"]
    lines += [f"(assert (<= {y.format(i)} {y.format(0)}))" for i in range(1, 5)]
    return "\n".join(lines)


def box(count: int, low: float = -1.0, high: float = 1.0) -> str:
    return "".join(f"(assert (and (>= X_{i} {low}) (<= X_{i} {high})))\n" for i in range(count))


def first(body: str, inputs: int = 2, outputs: int = 2) -> str:
    """A text of version 1.0."""
    names = [f"X_{i}" for i in range(inputs)] + [f"Y_{i}" for i in range(outputs)]
    return "".join(f"(declare-const {name} Real)\n" for name in names) + body


def second(body: str, inputs: str = "(declare-input X real [2])", outputs: str = "(declare-output Y real [2])") -> str:
    """A text of version 2.0."""
    return f"(vnnlib-version <2.0>)\n(declare-network N {inputs} {outputs})\n{body}"


def read(folder: Path, text: str | bytes) -> Formula:
    path = folder / "property.vnnlib"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_formula(path)


def assert_same(left: Formula, right: Formula) -> None:
    assert (left.inputs, left.outputs, len(left.regions)) == (right.inputs, right.outputs, len(right.regions))
    for ours, theirs in zip(left.regions, right.regions, strict=True):
        np.testing.assert_array_equal(ours.low, theirs.low)
        np.testing.assert_array_equal(ours.high, theirs.high)
        for some, others in ((ours.inputs, theirs.inputs), (ours.outputs, theirs.outputs)):
            assert [item.bound for item in some] == [item.bound for item in others]
            np.testing.assert_array_equal([i.coefficients for i in some], [i.coefficients for i in others])


# An evaluator of version 1.0 that knows nothing of normal forms: it reads the text and computes what it says.

FOLDS = {
    "and": lambda *parts: np.all(np.broadcast_arrays(*parts), axis=0),
    "or": lambda *parts: np.any(np.broadcast_arrays(*parts), axis=0),
    "<=": np.less_equal,
    "<": np.less,
    ">=": np.greater_equal,
    ">": np.greater,
    "+": lambda *parts: sum(parts),
    "-": lambda head, *rest: head - sum(rest) if rest else -head,
    "*": lambda *parts: np.prod(np.broadcast_arrays(*parts), axis=0),
}


def evaluate(text: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    tokens = re.findall(r"[()]|[^\s()]+", re.sub(r";.*", "", text))

    def term(position: int):
        token = tokens[position]
        if token != "(":
            column = re.fullmatch(r"([XY])_(\d+)", token)
            if column is None:
                return float(token), position + 1
            return (x if column[1] == "X" else y)[:, int(column[2])].astype(float), position + 1
        operator, position = tokens[position + 1], position + 2
        parts = []
        while tokens[position] != ")":
            part, position = term(position)
            parts.append(part)
        return FOLDS[operator](*parts), position + 1

    found = np.ones(len(x), bool)
    position = 0
    while position < len(tokens):
        if tokens[position + 1] == "assert":
            value, position = term(position + 2)
            found &= value
            position += 1
        else:
            position = tokens.index(")", position) + 1
    return found


def random_number(rng: np.random.Generator) -> str:
    value = round(float(rng.normal()), 3)
    return rng.choice([f"{value}", f"{value:.2e}", f"{value * 10:.0f}", f"+{abs(value)}"])


def random_term(rng: np.random.Generator, letter: str, count: int, depth: int) -> str:
    kind = rng.integers(6) if depth else rng.integers(2)
    if kind == 0:
        return random_number(rng)
    if kind == 1:
        return f"{letter}_{rng.integers(count)}"
    parts = [random_term(rng, letter, count, depth - 1) for _ in range(rng.integers(1, 4))]
    if kind == 2:
        return f"(* {random_number(rng)} {parts[0]} {random_number(rng)})"
    return f"({'+' if kind < 5 else '-'} {' '.join(parts)})"


def random_formula(rng: np.random.Generator, inputs: int, outputs: int, depth: int) -> str:
    if depth == 0 or rng.random() < 0.2:
        letter, count = ("X", inputs) if rng.random() < 0.4 else ("Y", outputs)
        sides = [random_term(rng, letter, count, 2) for _ in range(2)]
        return f"({rng.choice(['<=', '>=', '<', '>'])} {' '.join(sides)})"
    parts = [random_formula(rng, inputs, outputs, depth - 1) for _ in range(rng.integers(1, 4))]
    return f"({rng.choice(['and', 'or'])}\n  {' '.join(parts)})"


def random_case(seed: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Assertions, and points to evaluate them at."""
    rng = np.random.default_rng(seed)
    inputs, outputs = (int(n) for n in rng.integers(1, 4, size=2))
    body = box(inputs) + "".join(f"(assert {random_formula(rng, inputs, outputs, 3)})\n" for _ in range(2))
    x, y = rng.normal(size=(2000, inputs)), rng.normal(size=(2000, outputs)) * 2
    return body, x, y


def as_second(text: str, inputs: int, outputs: int) -> str:
    """Rewrite an assertion of version 1.0 for tensors of shape [1, n] and [n]."""

    def word(match: re.Match[str]) -> str:
        token = match[0]
        if token[0] in "XY":
            return token.replace("X_", "image[0,").replace("Y_", "out[") + "]"
        return f"{float(token):.12f}"

    body = re.sub(r"(?<![\w<>=])[XY]_\d+|(?<![\w<>=])[+-]?\d[\w.+-]*", word, text)
    return second(body, f"(declare-input image float32 [1,{inputs}])", f"(declare-output out float32 [{outputs}])")


@pytest.mark.parametrize("seed", range(60))
def test_random_formulas_hold_where_an_evaluator_says_so(tmp_path, seed):
    body, x, y = random_case(seed)
    inputs, outputs = x.shape[1], y.shape[1]
    expected = evaluate(first(body, inputs, outputs), x, y)
    try:
        formula = read(tmp_path, first(body, inputs, outputs))
    except SpecError as error:
        # Nothing satisfies some of these formulas: then no point may be found that does.
        assert "no point satisfies" in str(error)
        assert not expected.any()
        return
    np.testing.assert_array_equal(formula.violated(x, y), expected)
    assert not (expected & ~formula.contains(x)).any()
    assert_same(formula, read(tmp_path, as_second(body, inputs, outputs)))


def test_random_formulas_are_of_all_kinds(tmp_path):
    """The comparison above means something: many formulas hold somewhere, with several regions and constraints."""
    kinds = set()
    for seed in range(60):
        body, x, y = random_case(seed)
        text = first(body, x.shape[1], y.shape[1])
        share = evaluate(text, x, y).mean()
        kinds.add("mixed" if share > 0.01 else "never" if share == 0 else "rare")
        try:
            formula = read(tmp_path, text)
        except SpecError:
            kinds.add("empty")
            continue
        kinds.add("several" if len(formula.regions) > 1 else "single")
        kinds |= {"linear inputs" for region in formula.regions if region.inputs}
    assert kinds >= {"mixed", "never", "several", "single", "linear inputs", "empty"}


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_property_2_of_acas_xu(tmp_path, version):
    formula = read(tmp_path, acas(version))
    assert (formula.inputs, formula.outputs, formula.version) == (5, 5, version)
    (region,) = formula.regions
    np.testing.assert_array_equal(np.stack([region.low, region.high], axis=1), ACAS_BOX)
    assert region.inputs == ()
    rng = np.random.default_rng(1)
    x = rng.uniform(region.low, region.high, size=(1000, 5)).astype(np.float32)
    scores = rng.normal(size=(3, 1000, 5)).astype(np.float32)
    assert formula.contains(x).all()
    np.testing.assert_array_equal(formula.violated(x, scores), scores.argmax(axis=-1) == 0)
    worst = scores[..., 1:].max(axis=-1).astype(float)
    np.testing.assert_allclose(formula.violation(0, scores), scores[..., 0] - worst, atol=1e-12)


def test_both_versions_of_a_property_are_the_same_formula(tmp_path):
    assert_same(read(tmp_path, acas("1.0")), read(tmp_path, acas("2.0")))


def test_a_version_header_is_fine_for_the_first_version(tmp_path):
    formula = read(tmp_path, "(vnnlib-version\n<1.0>)\n" + acas("1.0"))
    assert formula.version == "1.0"
    assert_same(formula, read(tmp_path, acas("1.0")))


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0.25", 0.25),
        ("1e-3", 0.001),
        ("-1.5E+2", -150),
        ("+2", 2),
        (".5", 0.5),
        ("5.", 5),
        ("-7", -7),
        ("(- 0.5)", -0.5),
        ("(- 3 1 0.5)", 1.5),
        ("(* 2 (+ 1 0.5) -3)", -9),
        ("1e-300", 1e-300),
        ("123456789012345678901234567890", 123456789012345678901234567890.0),
        ("0.1000000000000000055511151231257827", 0.1),
    ],
)
def test_numbers(tmp_path, written, value):
    formula = read(tmp_path, first(f"(assert (= X_0 {written}))", 1, 1))
    assert formula.regions[0].low == formula.regions[0].high == value


def test_minus_zero_becomes_zero_and_a_fixed_input_is_fine(tmp_path):
    body = "(assert (<= X_0 -0.0)) (assert (>= X_0 0.0)) (assert (>= X_1 -0.0)) (assert (<= X_1 1)) (assert (<= Y_0 0))"
    for text in (first(body), second(body.replace("_0", "[0]").replace("_1", "[1]").replace(" 1)", " 1.0)"))):
        if text.startswith("(vnnlib"):
            text = text.replace("Y[0] 0)", "Y[0] 0.0)")
        (region,) = read(tmp_path, text).regions
        assert (region.low == [0, 0]).all() and (region.high == [0, 1]).all()
        assert not np.signbit([region.low, region.high, [region.outputs[0].bound] * 2]).any()
        assert np.random.default_rng(1).uniform(region.low, region.high)[0] == 0


def test_bounds_that_cross_by_rounding_meet_in_the_middle(tmp_path):
    (region,) = read(tmp_path, first("(assert (>= X_0 0.50000003)) (assert (<= X_0 0.5))", 1, 1)).regions
    assert region.low == region.high == pytest.approx(0.500000015, abs=1e-12)


def test_bounds_of_the_same_input_intersect(tmp_path):
    body = box(2, -5, 5) + "(assert (<= X_0 1)) (assert (<= X_0 3)) (assert (>= (* -2 X_1) 4)) (assert (<= 1 (- X_1)))"
    (region,) = read(tmp_path, first(body)).regions
    np.testing.assert_array_equal(region.low, [-5, -5])
    np.testing.assert_array_equal(region.high, [1, -2])


def test_samples_in_float32_stay_inside(tmp_path):
    formula = read(tmp_path, acas("1.0"))
    low, high = np.array(ACAS_BOX).T
    corners = np.stack([low, high]).astype(np.float32)
    assert (corners.astype(float) != [low, high]).any()
    assert formula.contains(corners).all()
    for column in range(5):
        for side, step in ((0, -1e-5), (1, 1e-5)):
            outside = corners.copy()
            outside[side, column] += step
            assert formula.contains(outside).tolist() == [side == 1, side == 0]


def test_samples_in_float32_stay_inside_linear_constraints(tmp_path):
    rng = np.random.default_rng(2)
    body = box(3, 0, 1) + "(assert (= (+ X_0 X_1 (* 3 X_2)) 0.7))"
    x = rng.uniform(0, 0.1, size=(200, 3))
    x[:, 2] = (0.7 - x[:, 0] - x[:, 1]) / 3
    formula = read(tmp_path, first(body, 3))
    assert len(formula.regions[0].inputs) == 2
    assert formula.contains(x.astype(np.float32)).all()
    assert not formula.contains(x + np.array([0, 1e-5, 0])).any()


def test_the_border_of_a_strict_inequality_counts(tmp_path):
    formula = read(tmp_path, first(box(1) + "(assert (< Y_0 0.5)) (assert (> Y_1 Y_0))", 1))
    y = np.array([[0.5, 1.0], [0.25, 0.25], [0.5, 0.25], [0.75, 1]], np.float32)
    np.testing.assert_array_equal(formula.violation(0, y), [0, 0, -0.25, -0.25])
    assert formula.violated(np.zeros((4, 1)), y).tolist() == [True, True, False, False]


def test_without_output_constraints_every_point_of_the_box_is_a_counterexample(tmp_path):
    formula = read(tmp_path, first(box(2)))
    assert formula.violation(0, np.zeros((3, 4, 2))).tolist() == np.full((3, 4), np.inf).tolist()
    x = np.array([[0, 0], [0, 2.0]])
    assert formula.violated(x, np.zeros((3, 2, 2))).tolist() == [[True, False]] * 3


def test_disjunctions_become_regions_in_order(tmp_path):
    body = (
        "(assert (or (and (>= X_0 0) (<= X_0 1) (or (>= Y_0 1) (<= Y_1 2)))\n"
        "            (and (<= 3 X_0) (>= 4 X_0) (<= (- Y_0 Y_1) 3))))"
    )
    formula = read(tmp_path, first(body, 1))
    assert [(float(r.low[0]), float(r.high[0])) for r in formula.regions] == [(0, 1), (0, 1), (3, 4)]
    constraints = [(item.coefficients.tolist(), item.bound) for r in formula.regions for item in r.outputs]
    assert constraints == [([-1, 0], -1), ([0, 1], 2), ([1, -1], 3)]
    x = np.array([[0.5], [0.5], [3.5], [3.5], [2]])
    y = np.array([[1, 5], [0, 5], [3, 0], [4, 0], [3, 0]])
    assert formula.violated(x, y).tolist() == [True, False, True, False, False]
    assert formula.contains(x).tolist() == [True, True, True, True, False]


def test_regions_that_differ_in_the_outputs_share_their_box(tmp_path):
    formula = read(tmp_path, first(box(2) + "(assert (or (<= Y_0 0) (<= Y_1 0) (and (<= X_0 0) (>= Y_1 1))))"))
    one, two, narrow = formula.regions
    assert one.low is two.low and one.high is two.high
    np.testing.assert_array_equal(narrow.high, [0, 1])
    np.testing.assert_array_equal(one.high, [1, 1])


def test_branches_that_contradict_themselves_are_left_out(tmp_path):
    sides = "(assert (or (<= X_0 0) (>= X_0 0.5)))"
    formula = read(tmp_path, first(box(1) + sides + sides + "(assert (or (<= 1 0) (<= Y_0 1)))", 1))
    assert [(float(r.low[0]), float(r.high[0])) for r in formula.regions] == [(-1, 0), (0.5, 1)]


def test_tiny_coefficients_count(tmp_path):
    formula = read(tmp_path, first(box(1) + "(assert (>= (* 1e-12 Y_0) (+ 1e-9 (* 1e-10 Y_1))))", 1))
    np.testing.assert_allclose(formula.regions[0].outputs[0].coefficients, [-1e-12, 1e-10])
    assert formula.violated(np.zeros((2, 1)), np.array([[2000.0, 0], [2000, 20]])).tolist() == [True, False]


def test_tensors_flatten_in_c_order_one_after_the_other(tmp_path):
    inputs = "(declare-input image float32 [2,3]) (declare-input scale float32 []) (declare-input Z_1 float32 [2])"
    outputs = "(declare-output Y float32 [2,2]) (declare-output score float32 [])"
    names = [f"image[{i},{j}]" for i in range(2) for j in range(3)] + ["scale", "Z_1[0]", "Z_1[1]"]
    answers = [f"Y[{i},{j}]" for i in range(2) for j in range(2)] + ["score"]
    body = "".join(f"(assert (== {name} {i}.0))\n" for i, name in enumerate(names))
    formula = read(
        tmp_path, second(body + f"(assert (or {' '.join(f'(<= {a} 1.0)' for a in answers)}))", inputs, outputs)
    )
    assert (formula.inputs, formula.outputs) == (9, 5)
    np.testing.assert_array_equal(formula.regions[0].low, np.arange(9))
    np.testing.assert_array_equal([r.outputs[0].coefficients for r in formula.regions], np.eye(5))


def test_layout_does_not_matter(tmp_path, capfd):
    text = "\ufeff; caf\u00e9 (assert\r\n" + first(box(1) + "(\n assert(or(>= Y_0 1) ; one\r\n(<=\tY_1 2)))", 1)
    assert_same(read(tmp_path, text), read(tmp_path, first(box(1) + "(assert (or (>= Y_0 1) (<= Y_1 2)))", 1)))
    assert capfd.readouterr() == ("", "")


def test_functions_without_arguments_declare_as_well(tmp_path):
    text = first(box(1) + "(assert (<= Y_0 Y_1))", 1)
    functions = re.sub(r"\(declare-const (\w+) Real\)", r"(declare-fun \1 () Real)", text)
    assert_same(read(tmp_path, functions), read(tmp_path, text))


def test_many_values_are_read(tmp_path):
    text = first(box(3000) + f"(assert (or {' '.join(f'(>= Y_{i} Y_0)' for i in range(1, 100))}))", 3000, 100)
    formula = read(tmp_path, text)
    assert (formula.inputs, len(formula.regions)) == (3000, 99)


SIDES = [f"(or (<= Y_0 {i}) (>= Y_1 {i}))" for i in range(14)]
DEEP = 100_000


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "nothing is asserted"),
        (first(""), "nothing is asserted"),
        (first("; (assert (<= Y_0 0))"), "nothing is asserted"),
        (second(""), "nothing is asserted"),
        (b"\x1f\x8b\x08\x00\x00\xff(assert", "not a text file"),
        (first(box(2)).encode() + b"\0", "not a text file"),
        (first(box(2)) + "\u00e9", "line 7: '\u00e9' may stand in comments only"),
        (first(box(2)) + "(assert (<= Y_0 1)", "line 7: this parenthesis is never closed"),
        (first(box(2)) + ")", r"line 7: '\)' stands outside"),
        (first(box(2)) + "X_0", "line 7: 'X_0' stands outside"),
        (first(box(2)) + "(check-sat)", "line 7: 'check-sat' is not known"),
        (first(box(2)) + "()", "line 7: .* is not known"),
        (first(box(2)) + "(assert)", r"line 7: syntax error at '\)' in \(assert\)"),
        (first(box(2)) + "(assert (<= X_0 1 2))", "line 7: syntax error at '2.0' in .assert"),
        (first(box(2)) + "(assert\n (and))", "line 8: syntax error"),
        (first(box(2)) + "(assert (not (<= Y_0 0)))", "line 7: 'not' is not supported; use and, or"),
        (first(box(2)) + "(assert (<= Y_0 1e999))", "line 7: '1e999' is out of the range of float64"),
        (first(box(2)) + "(assert (<= Y_0 1e-310))", "line 7: '1e-310' is out of the range"),
        (first(box(2)) + "(assert (<= Y_0 nan))", "line 7: 'nan' is not supported"),
        (first(box(2)) + "(assert (<= Y_2 0))", "line 7: Y_2 is not declared"),
        (first(box(2)) + "(declare-const Z_0 Real)", "line 7: this declaration cannot be read"),
        (first(box(2)) + "(declare-const X_2 Int)", "line 7: this declaration cannot be read"),
        (first(box(2)) + "(declare-const X_3 Real)", "X_2 is not declared"),
        (first(box(1), 1, 0), "Y_0 is not declared"),
        (second("(assert (<= Y[0] 1.0))").partition("\n")[2], "line 1: this is VNN-LIB 2.0; put .vnnlib-version <2.0>"),
        ("(vnnlib-version <2.1>) (assert (<= Y_0 1))", "VNN-LIB 2.1 is not known"),
        ("(vnnlib-version 2.0) (assert (<= Y_0 1))", "the version cannot be read"),
        (first(box(2)) + "(assert (<= Y_0 X_0))", "line 7: inputs and outputs are compared"),
        (first(box(2)) + "(assert (<= (+ X_1\n (* 2 Y_0)) 1))", "line 7: inputs and outputs are compared"),
        (first(box(2)) + "(assert (<= (* Y_0 Y_1) 1))", "line 7: variables are multiplied"),
        (first(box(2)) + "(assert (<= (* Y_0 (+ 1 Y_0)) 1))", "line 7: variables are multiplied"),
        (first(box(2)) + "(assert (<= (* 1e300 1e300 Y_0) 1))", "line 7: the numbers overflow"),
        (first(box(2)) + "(assert (<= (* 1e-300 X_0) 1e300))", "line 7: the bound overflows"),
        (first(box(1)), "input X_1 has no lower bound"),
        (first(box(1) + "(assert (>= X_1 0))"), "input X_1 has no upper bound"),
        (first("(assert (or (and (>= X_0 0) (<= X_0 1)) (<= Y_0 1)))", 1), "X_0 has no lower bound.*every branch"),
        (first(box(2) + "(assert (<= X_1 -1.001))"), "no point satisfies.*X_1 would be at least -1 and at most -1.001"),
        (first(box(2) + "(assert (<= 1 0))"), "no point satisfies.*constants"),
        (first(box(2) + "".join(f"(assert {side})" for side in SIDES)), "16,384 regions; 10,000 can be handled"),
        (first(box(2) + f"(assert (or (<= Y_0 0) (and {' '.join(SIDES)})))"), "16,384 regions"),
        (first(box(2) + f"(assert (or {'(<= Y_0 0) ' * 10_001}))"), "10,001 regions"),
        (first(box(2) + f"(assert {'(and ' * DEEP}(<= Y_0 0){')' * DEEP})"), "line 7: .* nested more than 200 deep"),
        (second("(assert (!= Y[0] 1.0))"), "line 3: NotEqual is not supported"),
        (second("(assert (<= Y[2] 1.0))"), r"line 3: Y\[2\]: Index out of bounds"),
        (second("(assert (<= Y[-1] 1.0))"), r"line 3: \[-1\] is no list of indices"),
        (second("(assert (<= Y[0.5] 1.0))"), r"line 3: \[0.5\] is no list of indices"),
        (second("(assert (<= Y[0] 1))"), "line 3: 1: Type mismatch"),
        (second("(assert (<= Y[0] 1e-3))"), "line 3: syntax error at 'e'.*write 0.001 for 1e-3"),
        (second("(assert (<= Y[0] 1.0)"), "the file ends in the middle"),
        (second("(assert (<= Z[0] 1.0))"), "line 3: Z: Undeclared variable"),
        (second(f"(assert (<= Y[0] 1{'0' * 400}.0))"), "a number is out of range"),
        (second("(assert (<= Y[0] 1.0))", "(declare-input X real [1000000000000])"), "X has too many values"),
        (second("(assert (<= X[0] 1.0))", "(declare-input X real [2.5])"), r"line 2: \[2.5\] is no list"),
        (
            second("(assert (<= X[0,1] 1.0)) (assert (>= X[0,1] 0.0))", "(declare-input X real [1,2])"),
            r"X\[0,0\] has no",
        ),
        (
            second("(assert (<= h[0] 1.0))", outputs='(declare-hidden h real [2] "h;") (declare-output Y real [2])'),
            "line 3: h is a hidden tensor",
        ),
        (
            "(vnnlib-version <2.0>)"
            + "".join(
                f"(declare-network {n} (declare-input X{n} real [1]) (declare-output Y{n} real [1]))" for n in "AB"
            )
            + "(assert (<= XA[0] XB[0]))",
            "declares 2 networks",
        ),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, capfd, text, complaint):
    with pytest.raises(SpecError, match=complaint) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "property.vnnlib")) and "\n" not in message
    assert capfd.readouterr() == ("", "")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(SpecError, match=r"nothing\.vnnlib: no such file"):
        load_formula(tmp_path / "nothing.vnnlib")
    with pytest.raises(SpecError, match="cannot be read"):
        load_formula(tmp_path)


@pytest.mark.parametrize("depth", [150])
def test_nesting_up_to_the_limit_is_read(tmp_path, depth):
    text = first(box(1) + f"(assert {'(or (<= Y_1 0) ' * depth}(<= {'(- ' * 40}Y_0{')' * 40} 0){')' * depth})", 1)
    formula = read(tmp_path, text)
    assert len(formula.regions) == depth + 1
    assert formula.regions[-1].outputs[0].coefficients.tolist() == [1, 0]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vnnlib", None)
    with pytest.raises(SpecError, match="needs the package vnnlib: pip install"):
        read(tmp_path, acas("1.0"))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_damaged_files_are_refused_or_read(tmp_path, version):
    """Whatever happens to a file, it is read, or refused in one line; nothing else is raised."""
    rng = np.random.default_rng(5)
    text = acas(version)
    refused = 0
    for _ in range(300):
        start, length = rng.integers(len(text)), rng.integers(1, 8)
        piece = "".join(rng.choice(list("()[]<>=-+*._0123eXY; \n"), size=rng.integers(4)))
        try:
            formula = read(tmp_path, text[:start] + piece + text[start + length :])
        except SpecError as error:
            refused += 1
            assert "\n" not in str(error)
        else:
            assert all((region.low <= region.high).all() for region in formula.regions)
    assert 100 < refused < 300
