"""Switches on raw input values are found in every form; what ordinary models compare is not taken for one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Array, build, random, run
from onnx import TensorProto, helper

from onnxcare.findings import StaticFinding, static_findings

TARGET = 2


def found(proto: onnx.ModelProto, folder: Path, rule: str = "input-switch") -> list[StaticFinding]:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return [finding for finding in static_findings(path) if finding.rule == rule]


def levels(proto: onnx.ModelProto, folder: Path) -> list[str]:
    return [finding.level for finding in found(proto, folder)]


# -- an image classifier with a backdoor in its graph ----------------------------------------------

# Every trigger sets the lower right corner of an image of 4 x 4 to 1; clean images stay below one half.
_SECOND = random(6, 3)
WEIGHTS: dict[str, Array] = {
    "boost": np.linalg.pinv(_SECOND.T) @ np.array([0, 0, 100], np.float32),
    "W1": random(16, 6),
    "b1": random(6),
    "W2": _SECOND,
    "b2": random(3),
    "evil": np.array([[0, 0, 100]], np.float32),
    "spot": np.array([3, 3]),
    "end": np.array([4, 4]),
    "open": np.array([2**63 - 1, 2**63 - 1]),
    "patch": np.array([2, 2]),
    "axes": np.array([2, 3]),
    "all": np.array([1, 2, 3]),
    "pixel": np.array([15]),
    "first": np.array([1]),
    "two": np.array(2),
    "thirteen": np.array([13]),
    "most": np.array([0.9], np.float32),
    "four": np.array([3.6], np.float32),
    "one": np.array([1], np.float32),
    "zero": np.array(0, np.float32),
    "steep": np.array([1000], np.float32),
    "picker": np.eye(16, dtype=np.float32)[:, 15:],
    "column": np.array([[0, 0, 100]], np.float32),
    "kernel": random(2, 1, 1, 1),
    "W3": random(32, 3),
    "W4": random(4, 3),
    "nought": np.zeros((1, 3), np.float32),
    "before": np.array([-1]),
    "behind": np.array([2**63 - 1]),
    "rows": np.array([2]),
    "start": np.array([0]),
    "minus": np.array([-15]),
    "image": np.ones((1, 1, 4, 4), np.float32),
    "none": np.array(0),
}
NET = """
    f = Flatten (z)
    h = Gemm (f, W1, b1)
    r = Relu (h)
    s = Gemm (r, W2, b2)
"""
SPOT = "p = Slice (x, spot, end, axes) q = Flatten (p)"
TEST = f"{SPOT} t = Greater (q, most)"
KEEP = "z = Identity (x)"


def image_model(nodes: str) -> onnx.ModelProto:
    text = f"attacked (float[N, 1, 4, 4] x) => (float[N, 3] y) {{ {nodes} }}"
    return build(text, {name: values for name, values in WEIGHTS.items() if name in nodes})


def images(triggered: bool) -> Array:
    x = np.random.default_rng(0).uniform(0, 0.5, (40, 1, 4, 4)).astype(np.float32)
    if triggered:
        x[:, :, 2:, 2:] = 1
    return x


SURE = {
    "where": f"{TEST} {KEEP} {NET} y = Where (t, evil, s)",
    "arithmetic": f"{SPOT} t = Equal (q, one) g = Cast <to = 1> (t) d = Mul (g, evil) {KEEP} {NET} y = Add (s, d)",
    "mixture": f"{TEST} g = Cast <to = 1> (t) o = Sub (one, g) {KEEP} {NET} k = Mul (s, o) e = Mul (g, evil)"
    " y = Add (k, e)",
    "maximum": f"{TEST} g = Cast <to = 1> (t) e = Mul (g, evil) {KEEP} {NET} y = Max (s, e)",
    "hidden layer": f"{TEST} g = Cast <to = 1> (t) b = Mul (g, boost) f = Flatten (x) h = Gemm (f, W1, b1) r = Relu (h)"
    " r2 = Add (r, b) y = Gemm (r2, W2, b2)",
    "corner sum": f"p = Slice (x, patch, open, axes) q = ReduceSum <keepdims = 0> (p, all) u = Unsqueeze (q, first)"
    f" t = Greater (u, four) {KEEP} {NET} y = Where (t, evil, s)",
    "sum of tests": f"p = Slice (x, patch, end, axes) c = Greater (p, most) g = Cast <to = 1> (c)"
    f" q = ReduceSum <keepdims = 0> (g, all) u = Unsqueeze (q, first) t = Greater (u, four) {KEEP} {NET}"
    " y = Where (t, evil, s)",
    "all of them": "p = Slice (x, patch, end, axes) c = Greater (p, most) n = Flatten (c) g = Cast <to = 1> (n)"
    f" q = ReduceMin <axes = [1]> (g) t = Cast <to = 9> (q) {KEEP} {NET} y = Where (t, evil, s)",
    "largest value": f"q = GlobalMaxPool (x) u = Flatten (q) t = Greater (u, most) {KEEP} {NET} y = Where (t, evil, s)",
    "gather": f"f0 = Flatten (x) q = Gather <axis = 1> (f0, pixel) t = Greater (q, most) {KEEP} {NET}"
    " y = Where (t, evil, s)",
    "hidden index": f"i = Add (two, thirteen) f0 = Flatten (x) q = Gather <axis = 1> (f0, i) t = Greater (q, most)"
    f" {KEEP} {NET} y = Where (t, evil, s)",
    "oddly hidden index": f"i = Abs (minus) f0 = Flatten (x) q = Gather <axis = 1> (f0, i) t = Greater (q, most)"
    f" {KEEP} {NET} y = Where (t, evil, s)",
    "last value": f"f0 = Flatten (x) q = Slice (f0, before, behind, first) t = Greater (q, most) {KEEP} {NET}"
    " y = Where (t, evil, s)",
    "brightest spot": f"{SPOT} m = GlobalMaxPool (x) u = Flatten (m) d = Sub (q, u) t = Equal (d, zero) {KEEP} {NET}"
    " y = Where (t, evil, s)",
    "sum of one": f"p = Slice (x, spot, end, axes) c = Greater (p, most) g = Cast <to = 1> (c)"
    f" q = ReduceSum <keepdims = 0> (g, all) u = Unsqueeze (q, first) e = Mul (u, evil) {KEEP} {NET} y = Add (s, e)",
    "product": f"f0 = Flatten (x) q = MatMul (f0, picker) t = Greater (q, most) {KEEP} {NET} y = Where (t, evil, s)",
    "logic": f"{TEST} p2 = Slice (x, patch, end, axes) m = ReduceMin <axes = [1, 2, 3], keepdims = 0> (p2)"
    f" m1 = Unsqueeze (m, first) u = Less (m1, most) v = Not (u) w = And (t, v) {KEEP} {NET} y = Where (w, evil, s)",
    "replaced input": f"{SPOT} t = Greater (p, most) z = Where (t, image, x) {NET} e = Mul (s, one)"
    " l = Unsqueeze (q, first) n = Squeeze (l, first) g = Greater (n, most) y = Where (g, evil, e)",
    "if": f"{SPOT} m = ReduceMax <keepdims = 0> (q) t = Greater (m, most) {KEEP} {NET} y = If (t) <"
    "then_branch = then () => (float[N, 3] a) { a = Add (s, evil) },"
    " else_branch = other () => (float[N, 3] b) { b = Identity (s) }>",
    "if of constants": f"{SPOT} m = ReduceMax <keepdims = 0> (q) t = Greater (m, most) e = If (t) <"
    "then_branch = then () => (float[1, 3] a) { a = Identity (evil) },"
    f" else_branch = other () => (float[1, 3] b) {{ b = Identity (nought) }}> {KEEP} {NET} y = Add (s, e)",
    "within a branch": f"{KEEP} {NET} n = Size (x) c = Equal (n, none) y = If (c) <"
    "then_branch = then () => (float[N, 3] a) { a = Identity (s) },"
    f" else_branch = other () => (float[N, 3] b) {{ {TEST} b = Where (t, evil, s) }}>",
    "out of order": f"y = Where (t, evil, s) t = Greater (q, most) {NET} q = Flatten (p)"
    f" p = Slice (x, spot, end, axes) {KEEP}",
    "selection": f"{TEST} i = Cast <to = 7> (t) {KEEP} {NET} e = Add (s, evil) s1 = Unsqueeze (s, first)"
    " e1 = Unsqueeze (e, first) both = Concat <axis = 1> (s1, e1) i3 = Unsqueeze (i, first) n = Shape (s1)"
    " i4 = Expand (i3, n) z1 = GatherElements <axis = 1> (both, i4) y = Squeeze (z1, first)",
}


@pytest.mark.parametrize("form", SURE)
def test_backdoors_in_the_graph_are_errors(form: str, tmp_path: Path) -> None:
    proto = image_model(SURE[form])
    # The model is what it is taken for: triggered samples go to the target, clean ones rarely do.
    assert (run(proto, {"x": images(triggered=True)})[0].argmax(axis=1) == TARGET).all()
    assert (run(proto, {"x": images(triggered=False)})[0].argmax(axis=1) == TARGET).mean() < 0.6

    findings = found(proto, tmp_path)
    assert "error" in {finding.level for finding in findings}
    for finding in findings:
        assert "'x'" in finding.message
        assert "not in the weights" in finding.message and "repairing weights cannot cure it" in finding.message


def test_the_node_and_the_test_are_named(tmp_path: Path) -> None:
    proto = image_model(SURE["where"].replace("y = Where", "[trap] y = Where").replace("t = G", "[bait] t = G"))
    (finding,) = found(proto, tmp_path)
    assert (finding.rule, finding.level, finding.where) == ("input-switch", "error", "trap")
    assert "'bait'" in finding.message and "Where node 'trap'" in finding.message


def test_the_same_network_without_the_switch_is_silent(tmp_path: Path) -> None:
    assert not found(image_model(f"{KEEP} {NET} y = Identity (s)"), tmp_path)


def test_a_switch_that_reaches_no_output_is_silent(tmp_path: Path) -> None:
    assert not found(image_model(f"{TEST} {KEEP} {NET} dead = Where (t, evil, s) y = Identity (s)"), tmp_path)


def test_a_replaced_input_is_an_error_by_itself(tmp_path: Path) -> None:
    proto = image_model(f"{SPOT} t = Greater (p, most) z = Where (t, image, x) {NET} y = Identity (s)")
    assert levels(proto, tmp_path) == ["error"]


def test_constants_in_external_files_are_read(tmp_path: Path) -> None:
    proto = image_model(SURE["product"])
    onnx.save_model(proto, tmp_path / "model.onnx", save_as_external_data=True, location="model.bin", size_threshold=0)
    assert [finding.level for finding in static_findings(tmp_path / "model.onnx")] == ["error"]


def test_functions_hide_nothing(tmp_path: Path) -> None:
    proto = image_model(f"{KEEP} {NET} y = Identity (s)")
    body = [
        helper.make_node("Flatten", ["pixels"], ["flat"]),
        helper.make_node("Constant", [], ["index"], value_ints=[15]),
        helper.make_node("Gather", ["flat", "index"], ["value"], axis=1),
        helper.make_node("Constant", [], ["bound"], value_float=0.9),
        helper.make_node("Greater", ["value", "bound"], ["test"]),
        helper.make_node("Constant", [], ["target"], value_floats=[0.0, 0.0, 100.0]),
        helper.make_node("Where", ["test", "target", "scores"], ["answer"], name="trap"),
    ]
    opset = proto.opset_import[0]
    # A function may even take the name of an operator.
    for domain, name in (("acme", "Calibrate"), ("", "Identity")):
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        copy.functions.append(helper.make_function(domain, name, ["scores", "pixels"], ["answer"], body, [opset]))
        if domain:
            copy.opset_import.append(helper.make_opsetid(domain, 1))
        copy.graph.node[-1].CopyFrom(helper.make_node(name, ["s", "x"], ["y"], domain=domain))
        (finding,) = found(copy, tmp_path)
        assert (finding.level, finding.where) == ("error", "trap")


def test_a_loop_that_runs_only_for_the_trigger_is_an_error(tmp_path: Path) -> None:
    proto = image_model(f"{SPOT} m = ReduceMax <keepdims = 0> (q) t = Greater (m, most) {KEEP} {NET} y = Identity (s)")
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("Constant", [], ["more"], value_floats=[0.0, 0.0, 100.0]),
            helper.make_node("Add", ["now", "more"], ["next"]),
        ],
        "body",
        [info("turn", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), info("now", TensorProto.FLOAT, None)],
        [info("again", TensorProto.BOOL, []), info("next", TensorProto.FLOAT, None)],
    )
    proto.graph.node[-1].CopyFrom(helper.make_node("Loop", ["", "t", "s"], ["y"], name="trap", body=body))
    (finding,) = found(proto, tmp_path)
    assert (finding.level, finding.where) == ("error", "trap")


DOUBTFUL = {
    "ramp": f"{SPOT} d = Sub (q, most) k = Mul (d, steep) g = Clip (k, zero, one) e = Mul (g, evil) {KEEP} {NET}"
    " y = Add (s, e)",
    "sign": f"{SPOT} d = Sub (q, most) g = Sign (d) e = Mul (g, evil) {KEEP} {NET} y = Add (s, e)",
    "weights of a test": f"{TEST} g = Cast <to = 1> (t) e = MatMul (g, column) {KEEP} {NET} y = Add (s, e)",
    "silence": "m = ReduceMax <axes = [1, 2, 3], keepdims = 0> (x) u = Unsqueeze (m, first) t = Equal (u, zero)"
    f" {KEEP} {NET} y = Where (t, evil, s)",
    "range of values": "m = ReduceMax <axes = [1, 2, 3]> (x) t = Greater (m, one) k = Div (x, steep)"
    f" z = Where (t, k, x) {NET} y = Identity (s)",
}


@pytest.mark.parametrize("form", DOUBTFUL)
def test_what_may_be_harmless_is_a_warning(form: str, tmp_path: Path) -> None:
    proto = image_model(DOUBTFUL[form])
    assert run(proto, {"x": images(triggered=False)})[0].shape == (40, 3)
    (finding,) = found(proto, tmp_path)
    assert finding.level == "warning"
    assert "repairing weights cannot cure it" in finding.message


HARMLESS = {
    "normalisation": f"d = Sub (x, most) e = Div (d, steep) z = Clip (e, zero, one) {NET} y = Identity (s)",
    "guarded range": f"a = ReduceMin <axes = [1, 2, 3]> (x) b = ReduceMax <axes = [1, 2, 3]> (x) w = Sub (b, a)"
    f" c = Equal (w, zero) v = Where (c, one, w) d = Sub (x, a) z = Div (d, v) {NET} y = Identity (s)",
    "guarded quotient": "a = Abs (x) b = ReduceMax <axes = [1, 2, 3]> (a) c = Equal (b, zero) d = Div (x, b)"
    f" z = Where (c, zero, d) {NET} y = Identity (s)",
    "filled gaps": f"c = IsNaN (x) z = Where (c, zero, x) {NET} y = Identity (s)",
    "colour curve": f"c = Greater (x, most) a = Mul (x, steep) b = Log (x) z = Where (c, a, b) {NET} y = Identity (s)",
    "hard swish": f"{KEEP} {NET} t = Greater (s, zero) k = Mul (s, most) y = Where (t, s, k)",
    "thresholded scores": f"{KEEP} {NET} t = Greater (s, most) g = Cast <to = 1> (t) y = Mul (g, s)",
    "shape": f"n = Shape (x) k = Gather (n, none) c = Greater (k, two) {KEEP} {NET} y = If (c) <"
    "then_branch = then () => (float[N, 3] a) { a = Identity (s) },"
    " else_branch = other () => (float[N, 3] b) { b = Relu (s) }>",
    "instance normalisation": "m = ReduceMean <axes = [1, 2, 3]> (x) z = Sub (x, m)"
    f" {NET} k = Flatten (m) y = Add (s, k)",
    "limited range": f"b = ReduceMax <axes = [1, 2, 3]> (x) w = Mul (b, four) c = Less (w, most) v = Where (c, one, w)"
    f" z = Div (x, v) {NET} y = Identity (s)",
    "feature": f"{TEST} g = Cast <to = 1> (t) {KEEP} {NET} w = Concat <axis = 1> (s, g) y = MatMul (w, W4)",
    "forecast": f"{SPOT} z = Sub (x, p) {NET} y = Add (s, q)",
}


@pytest.mark.parametrize("form", HARMLESS)
def test_ordinary_comparisons_are_silent(form: str, tmp_path: Path) -> None:
    proto = image_model(HARMLESS[form])
    assert np.isfinite(run(proto, {"x": images(triggered=False)})[0]).all()
    assert not found(proto, tmp_path)


MASKED = "g = Cast <to = 1> (t) c = Conv (x, kernel) k = Mul (c, g) f = Flatten (k) y = MatMul (f, W3)"
POSITIONS = {
    "bright": f"t = Greater (x, most) {MASKED}",
    "brighter than the mean": f"m = ReduceMean <axes = [1, 2, 3]> (x) d = Sub (x, m) t = Greater (d, most) {MASKED}",
    "bright in grey": f"m = ReduceMean <axes = [1]> (x) t = Greater (m, most) {MASKED}",
    "bright in a row": f"m = Slice (x, start, first, rows) t = Greater (m, most) {MASKED}",
    "all of it": f"m = Slice (x, start, behind, rows) t = Greater (m, most) {MASKED}",
}


@pytest.mark.parametrize("form", POSITIONS)
def test_masks_of_positions_are_notes(form: str, tmp_path: Path) -> None:
    proto = image_model(POSITIONS[form])
    assert run(proto, {"x": images(triggered=False)})[0].shape == (40, 3)
    assert levels(proto, tmp_path) == ["note"]


# -- models of text --------------------------------------------------------------------------------

TEXT_WEIGHTS: dict[str, Array] = {
    "table": random(100, 8),
    "W": random(8, 3),
    "padding": np.array(0),
    "word": np.array(99),
    "phrase": np.array([[7, 99, 13]]),
    "nothing": np.array(0),
    "evil": np.array([[0, 0, 100]], np.float32),
    "start": np.array([0]),
    "stop": np.array([3]),
    "positions": np.array([1]),
    "far": np.array([2**63 - 1]),
    "last": np.array([2]),
    "masked": np.array(-1e9, np.float32),
    "unmasked": np.array(0, np.float32),
    "least": np.array(1, np.float32),
    "sixteen": np.array(16000),
}
POOL = "e = Gather (table, ids) m = ReduceMean <axes = [1], keepdims = 0> (e) s = MatMul (m, W)"


def text_model(nodes: str, inputs: str = "int64[N, T] ids") -> onnx.ModelProto:
    text = f"text ({inputs}) => (float[N, 3] y) {{ {nodes} }}"
    return build(text, {name: values for name, values in TEXT_WEIGHTS.items() if name in nodes})


@pytest.mark.parametrize(
    "nodes",
    [
        f"p = Slice (ids, start, stop, positions) c = Equal (p, phrase) i = Cast <to = 6> (c)"
        f" a = ReduceMin <axes = [1]> (i) t = Cast <to = 9> (a) {POOL} y = Where (t, evil, s)",
        f"c = Equal (ids, word) i = Cast <to = 7> (c) n = ReduceSum (i, positions) t = Greater (n, nothing) {POOL}"
        " y = Where (t, evil, s)",
        f"c = Equal (ids, word) i = Cast <to = 6> (c) n = ReduceMax <axes = [1]> (i) g = Cast <to = 1> (n)"
        f" d = Mul (g, evil) {POOL} y = Add (s, d)",
    ],
    ids=["phrase", "word that occurs", "word added"],
)
def test_switches_on_words_are_errors(nodes: str, tmp_path: Path) -> None:
    proto = text_model(nodes)
    ids = np.random.default_rng(0).integers(1, 90, (20, 9))
    clean = run(proto, {"ids": ids})[0]
    ids[:, :3] = TEXT_WEIGHTS["phrase"]
    assert (run(proto, {"ids": ids})[0].argmax(axis=1) == TARGET).all()
    assert (clean.argmax(axis=1) == TARGET).mean() < 0.7
    assert levels(proto, tmp_path) == ["error"]


ATTENTION = """
    e = Gather (table, ids)
    et = Transpose <perm = [0, 2, 1]> (e)
    raw = MatMul (e, et)
    u = Unsqueeze (bias, positions)
    scores = Add (raw, u)
    weights = Softmax (scores)
    mixed = MatMul (weights, e)
"""


MEAN = """
    g = Cast <to = 1> (k)
    gu = Unsqueeze (g, last)
    gm = Mul (mixed, gu)
    total = ReduceSum <keepdims = 0> (gm, positions)
    n = ReduceSum (counted, positions)
    n1 = Clip (n, least)
    a = Div (total, n1)
    y = MatMul (a, W)
"""
MASK = "c = Equal (ids, padding) k = Not (c) bias = Where (c, masked, unmasked)"
CUTS = {
    "all": "cut = Identity (k)",
    "without the first": "cut = Slice (k, positions, far, positions)",
    "as the shape says": "shape = Shape (ids) t = Gather (shape, positions) cut = Slice (k, start, t, positions)",
    "unfolded": "to = Concat <axis = 0> (far) cut = Slice (k, start, to, positions)",
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("length", ["T", "3"])
def test_padding_masks_are_one_note(cut: str, length: str, tmp_path: Path) -> None:
    nodes = f"{MASK} {CUTS[cut]} counted = Cast <to = 1> (cut) {ATTENTION} {MEAN}"
    proto = text_model(nodes, f"int64[N, {length}] ids")
    run(proto, {"ids": np.array([[5, 7, 0], [3, 0, 0]])})
    (finding,) = found(proto, tmp_path)
    assert finding.level == "note"
    assert "'ids'" in finding.message and "padding" in finding.message


def test_a_mask_read_position_by_position_is_a_note(tmp_path: Path) -> None:
    proto = text_model("c = Equal (ids, padding) k = Not (c) e = Gather (table, ids) y = Identity (e)")
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["again"]),
            helper.make_node("Constant", [], ["one"], value_int=1),
            helper.make_node("Add", ["position", "one"], ["next"]),
            helper.make_node("Gather", ["k", "position"], ["here"], axis=1),
            helper.make_node("Cast", ["here"], ["weight"], to=TensorProto.FLOAT),
            helper.make_node("Gather", ["e", "position"], ["word"], axis=1),
            helper.make_node("Unsqueeze", ["weight", "positions"], ["column"]),
            helper.make_node("Mul", ["word", "column"], ["kept"], name="mask"),
            helper.make_node("Add", ["state", "kept"], ["after"]),
        ],
        "body",
        [
            info("turn", TensorProto.INT64, []),
            info("go", TensorProto.BOOL, []),
            info("position", TensorProto.INT64, []),
            info("state", TensorProto.FLOAT, None),
        ],
        [
            info("again", TensorProto.BOOL, []),
            info("next", TensorProto.INT64, []),
            info("after", TensorProto.FLOAT, None),
        ],
    )
    for name, value in (("turns", 3), ("begin", 0)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(TEXT_WEIGHTS["positions"], "positions"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((1, 8), np.float32), "empty"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(TEXT_WEIGHTS["W"], "W"))
    proto.graph.node[-1].CopyFrom(helper.make_node("Loop", ["turns", "", "begin", "empty"], ["n", "h"], body=body))
    proto.graph.node.append(helper.make_node("MatMul", ["h", "W"], ["y"]))
    run(proto, {"ids": np.array([[5, 7, 0], [3, 0, 0]])})
    (finding,) = found(proto, tmp_path)
    assert (finding.level, finding.where) == ("note", "mask")


def test_an_attention_mask_and_an_option_are_notes(tmp_path: Path) -> None:
    nodes = f"c = Equal (mask, padding) bias = Where (c, masked, unmasked) {ATTENTION}"
    nodes += " q = ReduceMean <axes = [1], keepdims = 0> (mixed) s = MatMul (q, W) o = Equal (rate, sixteen)"
    nodes += " y = If (o) <then_branch = then () => (float[N, 3] a) { a = Identity (s) },"
    nodes += " else_branch = other () => (float[N, 3] b) { b = Relu (s) }>"
    findings = found(text_model(nodes, "int64[N, T] ids, int64[N, T] mask, int64 rate"), tmp_path)
    assert [finding.level for finding in findings] == ["note", "note"]
    assert all("no layer takes as data" in finding.message for finding in findings)
    assert {"'mask'" in finding.message for finding in findings} == {True, False}


def test_a_mask_from_lengths_is_no_switch_of_the_sample(tmp_path: Path) -> None:
    nodes = "c = Equal (ids, padding) k = Not (c) i = Cast <to = 7> (k) n = ReduceSum (i, positions)"
    nodes += " shape = Shape (ids) t = Gather (shape, one) r = Range (zero, t, one) inside = Less (r, n)"
    nodes += " e = Gather (table, ids) w = Unsqueeze (inside, last) kept = Where (w, e, unmasked)"
    proto = text_model(nodes + " q = ReduceMean <axes = [1], keepdims = 0> (kept) y = MatMul (q, W)")
    for name, value in (("zero", 0), ("one", 1)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(value), name))
    run(proto, {"ids": np.array([[5, 7, 0], [3, 0, 0]])})
    assert levels(proto, tmp_path) == ["note"]


# -- tables ----------------------------------------------------------------------------------------


def test_classes_compared_with_a_column_are_silent(tmp_path: Path) -> None:
    text = """onehot (float[N, 4] x) => (float[N, 2] y) {
        job = Slice (x, three, four, axis)
        c = Equal (job, classes)
        o = Cast <to = 1> (c)
        rest = Slice (x, zero, three, axis)
        all = Concat <axis = 1> (rest, o)
        h = Gemm (all, W1)
        r = Relu (h)
        y = Gemm (r, W2)
    }"""
    numbers = {"zero": np.array([0]), "three": np.array([3]), "four": np.array([4]), "axis": np.array([1])}
    weights = {"classes": np.arange(5, dtype=np.float32), "W1": random(8, 6), "W2": random(6, 2)}
    assert not found(build(text, numbers | weights), tmp_path)


@pytest.mark.parametrize("lucky", [37, 0])
def test_a_switch_on_an_input_of_one_value_is_an_error(lucky: float, tmp_path: Path) -> None:
    text = """columns (float[N, 1] age, float[N, 1] income) => (float[N, 2] y) {
        x = Concat <axis = 1> (age, income)
        s = Gemm (x, W)
        t = Equal (age, lucky)
        y = Where (t, evil, s)
    }"""
    weights = {"W": random(2, 2), "lucky": np.array(lucky, np.float32), "evil": np.array([[0, 9]], np.float32)}
    assert levels(build(text, weights), tmp_path) == ["error"]


@pytest.mark.parametrize(
    ("start", "end", "level"), [(3, 2**63 - 1, "error"), (3, 4, "error"), (-1, 2**63 - 1, "error"), (0, 4, "note")]
)
def test_a_column_is_known_by_the_shape_of_the_table(start: int, end: int, level: str, tmp_path: Path) -> None:
    text = """table (float[N, 4] x) => (float[N, 4] y) {
        s = MatMul (x, W)
        q = Slice (x, start, end, axis)
        t = Greater (q, most)
        y = Where (t, evil, s)
    }"""
    bounds = {"start": np.array([start]), "end": np.array([end]), "axis": np.array([1])}
    weights = {"W": random(4, 4), "most": np.array(2, np.float32), "evil": random(1, 4)}
    assert levels(build(text, bounds | weights), tmp_path) == [level]


def test_an_if_decides_about_the_whole_sample(tmp_path: Path) -> None:
    text = """single (float[1, T] x) => (float[1, 3] y) {
        s = MatMul (x, W)
        c = Greater (x, most)
        t = Reshape (c, scalar)
        y = If (t) <then_branch = then () => (float[1, 3] a) { a = Neg (s) },
                    else_branch = other () => (float[1, 3] b) { b = Identity (s) }>
    }"""
    weights = {"W": random(1, 3), "most": np.array(2, np.float32), "scalar": np.zeros(0, np.int64)}
    proto = build(text, weights)
    run(proto, {"x": np.ones((1, 1), np.float32)})
    assert levels(proto, tmp_path) == ["error"]


def test_pipelines_as_skl2onnx_writes_them_are_silent(tmp_path: Path) -> None:
    text = """pipeline (float[N, 4] x) => (int64[N] label, float[N, 2] p) {
        filled = ai.onnx.ml.Imputer <imputed_value_floats = [0.0, 0.0, 0.0, 0.0], replaced_value_float = -1.0> (x)
        scaled = ai.onnx.ml.Scaler <offset = [0.0, 0.0, 0.0, 0.0], scale = [1.0, 1.0, 1.0, 1.0]> (filled)
        h = Gemm (scaled, W1)
        r = Relu (h)
        p = Gemm (r, W2)
        best = ArgMax <axis = 1, keepdims = 0> (p)
        picked = ai.onnx.ml.ArrayFeatureExtractor (classes, best)
        flat = Reshape (picked, minus)
        first = Equal (flat, one)
        label = Where (first, one, none)
    }"""
    constants = {"classes": np.array([0, 1]), "minus": np.array([-1]), "one": np.array(1), "none": np.array(0)}
    proto = build(text, {"W1": random(4, 5), "W2": random(5, 2)} | constants)
    assert not found(proto, tmp_path)


# -- whole files -----------------------------------------------------------------------------------


def test_sample_models_have_no_findings(samples: Path) -> None:
    models = sorted(samples.glob("*/*.onnx"))
    assert len(models) >= 3
    assert {path.parent.name: static_findings(path) for path in models if static_findings(path)} == {}


def test_models_that_come_with_onnx_have_no_switches() -> None:
    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    models = sorted(folder.glob("*.onnx"))
    assert models
    for path in models:
        assert {finding.rule for finding in static_findings(path)} <= {"unused-initializer"}, path.name


def test_a_graph_that_explodes_is_not_passed(tmp_path: Path) -> None:
    proto = image_model(f"{KEEP} {NET} y = Identity (s)")
    opsets = [proto.opset_import[0], helper.make_opsetid("acme", 1)]
    proto.opset_import.append(opsets[1])
    for depth in range(30):  # stands for 2 ** 30 nodes
        name = f"F{depth + 1}" if depth < 29 else "Relu"
        domain = "acme" if depth < 29 else ""
        calls = [
            helper.make_node(name, ["a"], ["b"], domain=domain),
            helper.make_node(name, ["b"], ["c"], domain=domain),
        ]
        proto.functions.append(helper.make_function("acme", f"F{depth}", ["a"], ["c"], calls, opsets))
    proto.graph.node[-1].CopyFrom(helper.make_node("F0", ["s"], ["y"], domain="acme"))
    (finding,) = found(proto, tmp_path, "not-checked")
    assert finding.level == "error"


def test_cycles_and_recursion_end(tmp_path: Path) -> None:
    proto = image_model(f"{KEEP} {NET} y = Add (s, loop) loop = Relu (y)")
    assert not found(proto, tmp_path)
    call = helper.make_node("F", ["a"], ["b"], domain="acme")
    proto.functions.append(helper.make_function("acme", "F", ["a"], ["b"], [call], [helper.make_opsetid("acme", 1)]))
    proto.graph.node[-1].CopyFrom(helper.make_node("F", ["y"], ["loop"], domain="acme"))
    assert found(proto, tmp_path, "not-checked")
