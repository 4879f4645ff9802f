"""Influence: masks against what onnxruntime changes when the columns change, and cuts that leave nothing of them."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Array, build, layers_of, random, run_single
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcare.errors import ModelError
from onnxcare.graph.influence import Influence, certify, trace
from onnxcare.graph.storage import Source

# -- the oracle: run the model, change the columns, run it again -------------------------------------


def feeds_of(proto: onnx.ModelProto, rows: int, rng: np.random.Generator) -> dict[str, Array]:
    """Return random values for every input that must be fed."""
    held = {tensor.name for tensor in proto.graph.initializer}
    feeds = {}
    for info in proto.graph.input:
        if info.name in held:
            continue
        kind = info.type.tensor_type
        shape = (rows, *(dim.dim_value for dim in kind.shape.dim[1:]))
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        feeds[info.name] = rng.integers(0, 3, shape) if dtype.kind == "i" else rng.normal(size=shape)
        feeds[info.name] = feeds[info.name].astype(dtype)
    return feeds


def both(proto: onnx.ModelProto, columns: Sequence[int], output: str = "y", source: str = "x") -> tuple[Array, Array]:
    """Return the answers to random samples, and to the same ones with other values in the columns."""
    rows, rng = 64, np.random.default_rng(5)
    before = feeds_of(proto, rows, rng)
    after = {name: values.copy() for name, values in before.items()}
    values = after[source].reshape(rows, -1)
    fresh = feeds_of(proto, rows, rng)[source].reshape(rows, -1)[:, list(columns)]
    if values.dtype.kind == "f":
        fresh *= np.resize([1, -1, 30, 0.1], (rows, 1))
    values[:, list(columns)] = fresh
    return run_single(proto, before, output)[0], run_single(proto, after, output)[0]


def changed(proto: onnx.ModelProto, columns: Sequence[int], output: str = "y", source: str = "x") -> Array:
    """Return which elements of the output changed for some sample; samples lie on axis 0."""
    one, other = both(proto, columns, output, source)
    same = (one == other) | ((one != one) & (other != other))
    return np.asarray(~same.all(axis=0))


def zeroed(proto: onnx.ModelProto, found: Influence) -> onnx.ModelProto:
    """Return a copy in which the weight rows of the entries are zero."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for entry in found.entries:
        tensor = Source(copy, Path()).message(entry.layer.weight.path)
        weight = numpy_helper.to_array(tensor).copy()
        (weight.T if entry.layer.transposed else weight)[entry.columns] = 0
        tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    return copy


def check(proto: onnx.ModelProto, columns: Sequence[int], output: str = "y", source: str = "x") -> Influence:
    """Trace, and hold everything that is claimed against onnxruntime."""
    found = trace(proto, source, columns, output)
    hit = changed(proto, columns, output, source)
    assert not (hit & ~found.outputs).any()
    assert [entry.layer.node for entry in found.entries] == sorted(entry.layer.node for entry in found.entries)
    assert found.reaches == found.outputs.any() == (not certify(proto, source, columns, output))
    if not found.reaches:
        assert (found.entries, found.obstacle) == ((), None)
        return found
    cut = zeroed(proto, found)
    assert certify(cut, source, columns, output) == (found.obstacle is None)
    if found.obstacle is None:
        assert not changed(cut, columns, output, source).any()
    return found


def entries(found: Influence) -> dict[str, list[int]]:
    return {entry.layer.name: entry.columns.tolist() for entry in found.entries}


# -- single operators: the mask is what changes, no more and no less ---------------------------------

I64 = np.int64
EXACT: dict[str, tuple[str, Mapping[str, Array | Sequence[int]], int]] = {
    "flatten": ("y = Flatten (x)", {}, 17),
    "flatten behind": ("y = Flatten <axis = 2> (x)", {}, 17),
    "reshape": ("y = Reshape (x, s)", {"s": [0, -1, 2]}, 17),
    "reshape by shape": ("d = Shape (x) b = Gather (d, i) t = Concat <axis = 0> (b, m) y = Reshape (x, t)",
                         {"i": [0], "m": [-1]}, 17),
    "transpose": ("y = Transpose <perm = [0, 2, 1]> (x)", {}, 17),
    "unsqueeze, squeeze": ("u = Unsqueeze (x, a) y = Squeeze (u, b)", {"a": [1, 4], "b": [1]}, 17),
    "unsqueeze, squeeze of opset 11": ("u = Unsqueeze <axes = [1]> (x) y = Squeeze <axes = [1]> (u)", {}, 11),
    "concat": ("n = Neg (x) y = Concat <axis = -1> (c, n, x)", {"c": np.ones((1, 3, 2), np.float32)}, 17),
    "split": ("a, b = Split <axis = 2> (x, s) y = Concat <axis = 1> (b, b)", {"s": [2, 2]}, 17),
    "split of opset 11": ("a, y = Split <axis = 2, split = [1, 3]> (x)", {}, 11),
    "split in equal parts": ("a, y, c = Split <axis = 1, num_outputs = 3> (x)", {}, 18),
    "slice": ("y = Slice (x, b, e, a, s)", {"b": [-1], "e": [-9], "a": [2], "s": [-2]}, 17),
    "slice of opset 9": ("y = Slice <starts = [1], ends = [3], axes = [1]> (x)", {}, 9),
    "gather": ("y = Gather <axis = 2> (x, i)", {"i": [3, -3, 3]}, 17),
    "gather one": ("y = Gather <axis = 1> (x, i)", {"i": np.int64(1)}, 17),
    "gather elements": ("y = GatherElements <axis = 2> (x, i)", {"i": [[[0, 3], [1, 1], [2, 0]]]}, 17),
    "features": ("y = ai.onnx.ml.ArrayFeatureExtractor (x, i)", {"i": [2, 1]}, 17),
    "expand": ("u = Unsqueeze (x, a) y = Expand (u, s)", {"a": [2], "s": [1, 3, 2, 4]}, 17),
    "tile": ("y = Tile (x, s)", {"s": [1, 2, 1]}, 17),
    "pad": ("y = Pad (x, p, f)", {"p": [0, 1, 0, 0, 0, 2], "f": np.float32(7)}, 17),
    "pad by edges": ('y = Pad <mode = "edge"> (x, p)', {"p": [0, 0, 2, 0, 1, 0]}, 17),
    "pad some axes": ('y = Pad <mode = "reflect"> (x, p, , a)', {"p": [1, 1], "a": [2]}, 18),
    "element-wise": ("c = Cast <to = 11> (x) t = Tanh (c) f = Cast <to = 1> (t) e = Erf (f) y = Softplus (e)", {}, 17),
    "clip": ("y = Clip (x, low, high)", {"low": np.float32(-1), "high": np.float32(1)}, 17),
    "prelu": ("y = PRelu (x, s)", {"s": np.full((3, 1), 0.5, np.float32)}, 17),
    "dropout": ("y = Dropout (x)", {}, 17),
    "quantise": ("q = QuantizeLinear (x, s) y = DequantizeLinear (q, s)", {"s": np.float32(0.01)}, 17),
    "normalise": ("y = BatchNormalization (x, o, z, z, o)",
                  {"o": np.ones(3, np.float32), "z": np.zeros(3, np.float32)}, 17),
    "scaler": ("f = Flatten (x) y = ai.onnx.ml.Scaler <offset = [1.0], scale = [2.0]> (f)", {}, 17),
    "centre": ("s = Sub (x, m) y = Div (s, d)", {"m": random(1, 1, 4), "d": random(4)}, 17),
    "join": ("t = Transpose <perm = [0, 1, 2]> (x) s = Sum (x, t, c) y = Max (s, x)", {"c": random(4)}, 17),
    "broadcast": ("g = Gather <axis = 2> (x, i) y = Add (g, x)", {"i": [3]}, 17),
    "factor": ("y = Mul (x, f)", {"f": np.array([[1, 0, -0.0, 2]] * 2 + [[0, 1, 1, 1]], np.float32)}, 17),
    "choice": ("n = Neg (x) g = Gather <axis = 1> (n, i) y = Where (c, x, g)",
               {"i": [0], "c": np.eye(3, 4, dtype=bool)}, 17),
    "switch": ("p = Greater (x, z) y = Where (p, a, b)",
               {"z": np.float32(0), "a": np.float32(1), "b": np.float32(2)}, 17),
    "embedding": ("k = Abs (x) m = Clip (k, , h) i = Cast <to = 7> (m) y = Gather <axis = 1> (t, i)",
                  {"h": np.float32(2), "t": random(2, 3, 3)}, 17),
    "one-hot": ("k = Abs (x) i = Cast <to = 7> (k) y = OneHot <axis = 1> (i, d, v)",
                {"d": np.int64(3), "v": np.array([0, 1], np.float32)}, 17),
    "one-hot of sklearn": ("k = Abs (x) i = Cast <to = 7> (k)"
                           "y = ai.onnx.ml.OneHotEncoder <cats_int64s = [0, 1, 2], zeros = 1> (i)", {}, 17),
    "one-hot by hand": ("k = Abs (x) i = Cast <to = 7> (k) u = Unsqueeze (i, a) e = Equal (u, c) y = Cast <to = 1> (e)",
                        {"a": [3], "c": [0, 1, 2]}, 17),
    "product": ("y = MatMul (x, W)", {"W": random(4, 5) * (random(4, 5, seed=1) > 0)}, 17),
    "product with a vector": ("y = MatMul (x, W)", {"W": np.array([1, 0, 2, 0], np.float32)}, 17),
    "product of many": ("y = MatMul (x, W)", {"W": random(3, 4, 5)[:, None] * np.eye(4, 5, dtype=np.float32)}, 17),
    "product from the left": ("y = MatMul (W, x)", {"W": np.eye(5, 3, k=-1, dtype=np.float32)}, 17),
    "product with itself": ("t = Transpose <perm = [0, 2, 1]> (x) y = MatMul (t, x)", {}, 17),
    "gemm": ("f = Flatten (x) y = Gemm <alpha = 0.5> (f, W, b)",
             {"W": random(12, 5) * (random(12, 5, seed=1) > 1), "b": random(5)}, 17),
    "gemm, transposed": ("f = Flatten (x) y = Gemm <transB = 1> (f, W)",
                         {"W": random(5, 12) * (random(5, 12, seed=1) > 1)}, 17),
    "gemm, input transposed": ("f = Flatten (x) t = Transpose (f) y = Gemm <transA = 1> (t, W)",
                               {"W": random(12, 5) * (random(12, 5, seed=1) > 1)}, 17),
    "gemm, added": ("f = Flatten (x) s = Slice (f, b, e, a) y = Gemm (c, W, s)",
                    {"b": [0], "e": [5], "a": [1], "c": random(1, 2), "W": random(2, 5)}, 17),
    "shape": ("d = Shape (x) f = Cast <to = 1> (d) y = Unsqueeze (f, a)", {"a": [0]}, 17),
}  # fmt: skip


@pytest.mark.parametrize("columns", [[0], [7], [5, 6, 11]], ids=str)
@pytest.mark.parametrize("name", EXACT)
def test_masks_of_single_operators(name: str, columns: list[int]) -> None:
    text, constants, opset = EXACT[name]
    weights = {key: np.asarray(value, I64 if isinstance(value, list) else None) for key, value in constants.items()}
    proto = build(f"g (float[N, 3, 4] x) => (float[] y) {{ {text} }}", weights, opset=opset)
    np.testing.assert_array_equal(check(proto, columns).outputs, changed(proto, columns))


def test_convolutions_by_channel() -> None:
    kernel = random(4, 2, 3, 3)
    kernel[1, 0] = kernel[2, 1] = 0
    proto = build(
        "g (float[N, 4, 5, 5] x) => (float[] y) { y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, W, b) }",
        {"W": kernel, "b": random(4)},
    )
    written = {0: [0], 25: [0, 1], 50: [2, 3], 75: [3]}
    for column, channels in written.items():
        mask = check(proto, [column]).outputs
        assert mask.shape == (4, 5, 5)
        assert np.flatnonzero(mask.any(axis=(1, 2))).tolist() == channels
        assert mask[channels].all()


EVERYTHING = {
    "softmax": "y = Softmax (x)",
    "normalisation over features": "y = LayerNormalization (x, o)",
    "reduction": "r = ReduceMean <axes = [2]> (x) y = Sub (x, r)",
    "scale that depends on the columns": "r = ReduceMax <axes = [0, 2], keepdims = 0> (x) y = BatchNormalization"
    " (x, r, v, v, v)",
    "bound that depends on the columns": "r = ReduceMax <keepdims = 0> (x) y = Clip (x, r)",
    "fill that depends on the columns": "r = ReduceMax <keepdims = 0> (x) y = Pad (x, p, r)",
    "index into what it indexes": "m = Clip (x, z, o1) i = Cast <to = 7> (m) y = Gather <axis = 1> (x, i)",
    "number of things found": "k = NonZero (x) d = Shape (k) y = Cast <to = 1> (d)",
    "length that depends on the columns": "r = ReduceMax <keepdims = 0> (x) a = Abs (r) i = Cast <to = 7> (a)"
    "s = Unsqueeze (i, zero) y = ConstantOfShape (s)",
    "normalisation over samples": "y = BatchNormalization <training_mode = 1> (x, v, v, v, v)",
    "normalisation with statistics": "y, m, s = BatchNormalization <training_mode = 1> (x, v, v, v, v)",
    "operator with a second output": "y, m = Dropout (x)",
    "operator of another domain": "y = com.microsoft.Gelu (x)",
    "table that varies": "m = Clip (x, z, o1) i = Cast <to = 7> (m) f = Flatten (x) y = Gather <axis = 1> (f, i)",
}


# Their answers have no shape, or no meaning, that two runs on single samples could be compared by.
UNSTEADY = (
    "number of things found",
    "length that depends on the columns",
    "normalisation over samples",
    "normalisation with statistics",
)


@pytest.mark.parametrize("name", EVERYTHING)
def test_what_is_not_understood_taints_everything(name: str) -> None:
    proto = build(
        f"g (float[N, 3, 4] x) => (float[] y) {{ {EVERYTHING[name]} }}",
        {
            "o": np.ones(4, np.float32),
            "v": np.ones(3, np.float32),
            "z": np.float32(0),
            "o1": np.float32(1),
            "p": np.array([0, 1, 0, 0, 0, 2]),
            "zero": np.array([0]),
        },
    )
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = trace(proto, "x", [7], "y")
    assert found.reaches
    assert found.outputs.all()
    if name not in UNSTEADY:
        check(proto, [7])


def test_a_cut_along_the_samples_is_not_taken_for_a_stop() -> None:
    # One sample alone leaves nothing here; the last one of many is read.
    proto = build(
        "g (float[N, 4] x) => (float[] y) { s = Slice (x, b, e) r = ReduceSum <keepdims = 0> (s) y = Relu (r) }",
        {"b": np.array([1]), "e": np.array([9])},
    )
    assert not certify(proto, "x", [2], "y")


def test_operators_before_broadcasting_are_not_trusted() -> None:
    # In opset 6, `axis` says along which axis the second operand lies.
    proto = build(
        "g (float[1, 2, 2] x) => (float[] y) { y = Add <broadcast = 1, axis = 1> (x, c) }", {"c": random(2)}, opset=6
    )
    assert trace(proto, "x", [0], "y").outputs.all()


def test_a_function_of_the_models_own_is_not_mistaken_for_an_operator() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]>
        g (float[N, 4] x) => (float[N, 4] y) { y = own.Relu (x) }
        <domain: "own", opset_import: ["": 17]> Relu (a) => (b) { b = Softmax (a) }"""
    )
    assert check(proto, [1]).outputs.all()
    proto.graph.node[0].domain = ""
    proto.functions[0].domain = ""
    assert trace(proto, "x", [1], "y").outputs.all()


def test_branches_read_what_they_capture() -> None:
    proto = build(
        """g (float[N, 4] x, bool[1] c) => (float[] y) {
            p = Slice (x, b, e, a)
            q = Slice (x, zero, b, a)
            y = If (c) <then_branch = t () => (float[N, 1] u) { u = Neg (p) },
                        else_branch = f () => (float[N, 2] v) { v = Abs (q) }>
        }""",
        {"b": np.array([2]), "e": np.array([3]), "a": np.array([1]), "zero": np.array([0])},
    )
    found = trace(proto, "x", [2], "y")
    assert found.reaches and found.outputs.all()
    assert found.obstacle == "'If#2' (If) reads it too"
    assert certify(proto, "x", [3], "y")
    branch = proto.graph.node[2].attribute[0].g
    del branch.node[:]
    branch.output[0].name = "p"
    assert not certify(proto, "x", [2], "y")


def test_declared_shapes_are_not_believed() -> None:
    # The file says that the branches give 2 columns, but they give 4: the last ones come from there.
    proto = build(
        """g (float[N, 4] x, bool[1] c) => (float[] y) {
            h = If (c) <then_branch = t () => (float[1, 2] u) { u = Neg (x) },
                        else_branch = f () => (float[1, 2] v) { v = Abs (x) }>
            w = Concat <axis = 1> (h, k)
            y = Slice (w, b, e, a)
        }""",
        {"k": random(1, 2), "b": np.array([2]), "e": np.array([4]), "a": np.array([1])},
    )
    for name, width in {"h": 2, "w": 4, "y": 2}.items():
        proto.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]))
    assert not certify(proto, "x", [2], "y")


# -- whole models: where the columns enter, and what stands in the way -------------------------------

CONSTANTS: dict[str, Array] = {
    "W1": random(6, 8), "T1": random(8, 6), "b1": random(8), "W2": random(8, 6), "W3": random(6, 3), "W8": random(8, 3),
    "W10": random(10, 3), "W14": random(14, 3), "V1": random(6, 1), "square": random(6, 6), "pair": random(2, 2),
    "kernel": random(2, 1, 2), "table": random(4, 2), "none8": np.zeros((8, 3), np.float32),
    "but2": random(6, 8) * (np.arange(6) != 2).astype(np.float32)[:, None],
    "mean": random(1, 6), "std": np.abs(random(1, 6)) + 1, "ones": np.ones(6, np.float32),
    "nothing": np.zeros(6, np.float32), "cases": np.array([0, 1, 2], np.float32), "zero": np.float32(0),
    "two": np.float32(2), "three": np.int64(3), "on": np.array([0, 1], np.float32),
    "one_row": random(1, 3), "first": np.array([0]), "last": np.array([-1]),
    "i1": np.array([1]), "i2": np.array([2]), "i3": np.array([3]), "i6": np.array([6]), "ends": np.array([2, 5]),
    "rest": np.array([0, 1, 3, 4]), "pairs": np.array([0, 3, 2]), "maps": np.array([0, 1, 6]), "wide": np.array([1, 6]),
}  # fmt: skip
COLUMN_2 = "p = Slice (x, i2, i3, i1)"

# text, columns, entries, obstacle
MODELS: dict[str, tuple[str, list[int], dict[str, list[int]], str | None]] = {
    "normalised": (
        "c = Sub (x, mean) s = Div (c, std) [in] z = MatMul (s, W1) a = Add (z, b1) h = Tanh (a) y = MatMul (h, W8)",
        [2], {"in": [2]}, None,
    ),
    "transposed": (
        "[in] z = Gemm <transB = 1, alpha = 2.0> (x, T1, b1) h = Relu (z) y = Gemm (h, W8)",
        [0, 4], {"in": [0, 4]}, None,
    ),
    "transposed by a node": (
        "t = Transpose (T1) i = Identity (t) [in] z = MatMul (x, i) y = MatMul (z, W8)",
        [3], {"in": [3]}, None,
    ),
    "batch normalisation first": (
        "n = BatchNormalization (x, ones, ones, ones, ones) [in] z = Gemm (n, W1) y = Gemm (z, W8)",
        [2], {"in": [2]}, None,
    ),
    "one-hot": (
        f"{COLUMN_2} a = Abs (p) i = Cast <to = 7> (a) o = OneHot (i, three, on) k = Flatten (o)"
        "q = Gather <axis = 1> (x, rest) l = Slice (x, i3, i6, i1) f = Concat <axis = 1> (q, k, l)"
        "[in] y = MatMul (f, W10)",
        [2], {"in": [4, 5, 6]}, None,
    ),
    "one-hot by comparison": (
        f"{COLUMN_2} e = Equal (p, cases) o = Cast <to = 1> (e) q = Gather <axis = 1> (x, rest)"
        "l = Slice (x, i1, i2, i1) f = Concat <axis = -1> (l, q, p, o, p) [in] y = MatMul (f, W10)",
        [2], {"in": [5, 6, 7, 8, 9]}, None,
    ),
    "embedding": (
        f"{COLUMN_2} a = Abs (p) m = Min (a, two) i = Cast <to = 7> (m) e = Gather (table, i) k = Flatten (e)"
        "f = Concat <axis = 1> (k, x) [in] y = MatMul (f, W8)",
        [2], {"in": [0, 1, 4]}, None,
    ),
    "missing values": ("n = IsNaN (x) f = Where (n, mean, x) [in] y = Gemm (f, W3)", [2], {"in": [2]}, None),
    "another order": (
        "q = Gather <axis = 1> (x, ends) r = Gather <axis = 1> (x, rest) f = Concat <axis = 1> (q, r)"
        "[in] y = Gemm (f, W3)",
        [2, 3], {"in": [0, 4]}, None,
    ),
    "two readers": (
        "[a] z = Gemm (x, W1) h = Relu (z) [b] u = MatMul (x, square) [c] v = MatMul (h, W2) s = Add (u, v)"
        "y = Gemm (s, W3)",
        [1], {"a": [1], "b": [1]}, None,
    ),
    "residual": (
        "[in] z = Gemm (x, W1) h = Relu (z) [back] r = Gemm (h, W2) s = Add (r, x) [out] y = Gemm (s, W3)",
        [1], {"in": [1], "out": [1]}, None,
    ),
    "dense connections": (
        "[in] z = Gemm (x, W1) h = Relu (z) f = Concat <axis = 1> (h, x) [out] y = Gemm (f, W14)",
        [1, 5], {"in": [1, 5], "out": [9, 13]}, None,
    ),
    "per position": (
        "r = Reshape (x, pairs) [in] z = MatMul (r, pair) f = Flatten (z) y = MatMul (f, W3)",
        [2, 4], {"in": [0]}, None,
    ),
    "beside another output": ("other = Softmax (x) [in] y = Gemm (x, W3)", [2], {"in": [2]}, None),
    "multiplied by zero": (
        "s = Softmax (x) g = Mul (s, nothing) f = Add (g, x) [in] y = Gemm (f, W3)", [2], {"in": [2]}, None,
    ),
    "softmax": (
        "[mix] s = Softmax (x) [in] z = Gemm (s, W1) y = Gemm (z, W8)", [2], {}, "'mix' (Softmax) reads it too",
    ),
    "softmax beside a layer": (
        "[mix] s = Softmax (x) [in] u = Gemm (x, square) f = Add (s, u) y = Gemm (f, W3)",
        [2], {"in": [2]}, "'mix' (Softmax) reads it too",
    ),
    "switch": (
        f"[in] z = Gemm (x, W1, b1) h = Relu (z) {COLUMN_2} q = Greater (p, zero) n = Neg (h)"
        "[which] s = Where (q, h, n) y = MatMul (s, W8)",
        [2], {"in": [2]}, "'which' (Where) reads it too",
    ),
    "switch at the end": (
        f"[in] z = Gemm (x, V1) n = Neg (z) {COLUMN_2} q = Greater (p, zero)"
        "[which] s = Where (q, z, n) y = Sigmoid (s)",
        [2], {"in": [2]}, "'which' (Where) carries it to 'y' with no layer in between",
    ),
    "gate": (
        f"{COLUMN_2} g = Sigmoid (p) [gate] s = Mul (x, g) [in] y = Gemm (s, W3)", [2], {}, "'gate' (Mul) reads it too",
    ),
    "gate of full size": (
        f"{COLUMN_2} g = Sigmoid (p) [spread] e = Expand (g, wide) s = Mul (x, e) [in] y = Gemm (s, W3)",
        [2], {}, "'spread' (Expand) reads it too",
    ),
    "convolution": (
        "r = Reshape (x, maps) [conv] c = Conv (r, kernel) f = Flatten (c) y = MatMul (f, W10)",
        [2], {}, "'conv' (Conv) reads it too",
    ),
    "shared weight": (
        "[a] u = MatMul (x, square) h = Tanh (u) [b] v = MatMul (h, square) y = MatMul (v, W3)",
        [2], {}, "'a' (MatMul) reads it too and cannot be rewritten: its weight 'square' is also used by b",
    ),
    "product of activations": (
        "t = Transpose (x) [both] y = MatMul (x, t)", [2], {}, "'both' (MatMul) reads it too",
    ),
    "straight to the output": (
        f"[in] z = Gemm (x, W3) {COLUMN_2} [end] y = Concat <axis = 1> (z, p)",
        [2], {"in": [2]}, "'end' (Concat) carries it to 'y' with no layer in between",
    ),
    "only moved": (
        "s = Slice (x, i2, i3, i1) [end] y = Relu (s)",
        [2], {}, "'end' (Relu) carries it to 'y' with no layer in between",
    ),
    "look-up among other inputs": (
        f"{COLUMN_2} s = Sigmoid (p) r = Round (s) i = Cast <to = 7> (r) q = Gather <axis = 1> (x, rest)"
        "[find] e = Gather <axis = 1> (q, i) f = Flatten (e) [in] y = MatMul (f, one_row)",
        [2], {}, "'find' (Gather) reads it too",
    ),
    "second reader without weights": (
        "[a] z = Gemm (x, but2) [b] u = MatMul (x, W1) s = Add (z, u) y = Gemm (s, W8)", [2], {"b": [2]}, None,
    ),
    "bias of a layer": (
        f"[in] z = Gemm (x, V1) {COLUMN_2} h = Relu (z) [out] y = Gemm (h, one_row, p)",
        [2], {"in": [2]}, "'out' (Gemm) reads it too",
    ),
    "shape behind a scaler": (
        "c = ai.onnx.ml.Scaler <offset = [1.0], scale = [2.0]> (x) d = Shape (c) b = Gather (d, first)"
        "t = Concat <axis = 0> (b, last) r = Reshape (c, t) [in] y = MatMul (r, W3)",
        [2], {"in": [2]}, None,
    ),
    "not read": ("q = Gather <axis = 1> (x, rest) y = MatMul (q, table)", [2], {}, None),
    "no weight on it": ("z = Gemm (x, but2) h = Relu (z) y = MatMul (h, W8)", [2], {}, None),
    "no weight behind it": ("z = Gemm (x, W1) h = Relu (z) y = MatMul (h, none8)", [2], {}, None),
}  # fmt: skip


def model(name: str) -> onnx.ModelProto:
    text = MODELS[name][0]
    used = {key: value for key, value in CONSTANTS.items() if re.search(rf"[(,] *{key}\b", text)}
    return build(f"g (float[N, 6] x) => (float[] y) {{ {text} }}", used)


@pytest.mark.parametrize("name", MODELS)
def test_where_columns_enter(name: str) -> None:
    _, columns, expected, obstacle = MODELS[name]
    found = check(model(name), columns)
    assert entries(found) == expected
    assert found.obstacle == obstacle
    if obstacle is None:
        one, other = both(zeroed(model(name), found), columns)
        assert one.tobytes() == other.tobytes()


def test_a_column_that_no_layer_has_weights_for_is_cut_with_the_others() -> None:
    # Both positions belong to the column; a repair that only saw the first would predict it from the second.
    weight = CONSTANTS["W1"] * (np.arange(6) != 4).astype(np.float32)[:, None]
    proto = build(
        "g (float[N, 3] x) => (float[] y) { f = Concat <axis = 1> (x, x) [in] y = Gemm (f, W) }", {"W": weight}
    )
    assert entries(check(proto, [1])) == {"in": [1, 4]}


@pytest.mark.parametrize("name", SUBJECTS)
def test_whole_models(name: str) -> None:
    subject = SUBJECTS[name]()
    assert check(subject.proto, [1, 3], subject.logits, subject.input).reaches


def test_the_input_itself() -> None:
    found = trace(model("normalised"), "x", [2, 4], "x")
    assert found.outputs.tolist() == [False, False, True, False, True, False]
    assert found.obstacle == "'x' is the input itself"


def test_hidden_tensors_can_be_asked_for() -> None:
    assert check(model("dense connections"), [1], "f").outputs.tolist() == [True] * 8 + [False, True] + [False] * 4


def test_no_columns_have_no_influence() -> None:
    assert check(model("softmax"), []).outputs.tolist() == [False] * 3


def test_several_inputs() -> None:
    proto = build(
        """g (float[N, 2] age, string[N, 1] sex, float[N, 3] x) => (float[] y) {
            a = ai.onnx.ml.Scaler <offset = [1.0], scale = [2.0]> (age)
            o = ai.onnx.ml.OneHotEncoder <cats_strings = ["a", "b"]> (sex)
            s = Flatten (o)
            f = Concat <axis = 1> (a, s, x)
            [in] y = Gemm (f, W)
        }""",
        {"W": random(7, 2)},
    )
    assert entries(trace(proto, "sex", [0], "y")) == {"in": [2, 3]}
    assert entries(trace(proto, "x", [1], "y")) == {"in": [5]}


def test_a_fixed_batch_is_looked_at_as_a_whole() -> None:
    mixing = np.zeros((2, 2), np.float32)
    mixing[0, 1] = 1
    text = "[samples] m = MatMul (M, x) [in] y = Gemm (m, W) }"
    proto = build(f"g (float[2, 3] x) => (float[] y) {{ {text}", {"M": mixing, "W": np.eye(3, dtype=np.float32)})
    found = trace(proto, "x", [1], "y")
    assert found.outputs.tolist() == [False, True, False]
    assert found.obstacle == "'samples' (MatMul) reads it too"


def test_files_need_not_be_sorted() -> None:
    proto = model("dense connections")
    nodes = [*proto.graph.node]
    del proto.graph.node[:]
    proto.graph.node.extend(reversed(nodes))
    assert entries(trace(proto, "x", [1], "y")) == {"in": [1], "out": [9]}


def test_weights_in_constant_nodes_and_external_files(tmp_path: Path) -> None:
    proto = model("no weight on it")
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    stored = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    assert certify(stored, "x", [2], "y", tmp_path)
    assert not certify(stored, "x", [1], "y", tmp_path)
    with pytest.raises(ModelError, match="tensor 'but2' is stored outside the model: name the folder"):
        certify(stored, "x", [2], "y")

    sketch = model("per position")
    onnx.save(sketch, tmp_path / "p.onnx", save_as_external_data=True, location="p.data", size_threshold=0)
    stored = onnx.load(tmp_path / "p.onnx", load_external_data=False)
    assert entries(trace(stored, "x", [2, 4], "y", tmp_path)) == {"in": [0]}

    proto = model("no weight on it")
    nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in proto.graph.initializer]
    nodes += proto.graph.node
    del proto.graph.node[:], proto.graph.initializer[:]
    proto.graph.node.extend(nodes)
    assert not check(proto, [2]).reaches
    assert check(proto, [1]).reaches


def test_the_model_is_left_alone() -> None:
    proto = model("residual")
    before = proto.SerializeToString(deterministic=True)
    trace(proto, "x", [1], "y")
    assert proto.SerializeToString(deterministic=True) == before


def test_what_is_proved_holds_for_finite_numbers() -> None:
    proto = model("no weight on it")
    assert certify(proto, "x", [2], "y")
    x = np.zeros((1, 6), np.float32)
    x[0, 2] = np.inf
    assert np.isnan(run_single(proto, {"x": x})[0]).all()


@pytest.mark.parametrize(
    ("source", "columns", "output", "message"),
    [
        ("X", [0], "y", "the model has no input 'X'"),
        ("W3", [0], "y", "the model has no input 'W3'"),
        ("x", [6], "y", "input 'x' has 6 columns, so there is no column 6"),
        ("x", [-1], "y", "input 'x' has 6 columns, so there is no column -1"),
        ("x", [0], "z", "the model has no tensor 'z'"),
    ],
)
def test_what_is_not_there(source: str, columns: list[int], output: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        trace(model("missing values"), source, columns, output)


def test_weights_listed_as_inputs_are_weights() -> None:
    proto = SUBJECTS["acas"]().proto
    with pytest.raises(ModelError, match="the model has no input 'W1'"):
        trace(proto, "W1", [0], "costs")


def test_columns_of_an_input_of_any_length_cannot_be_counted() -> None:
    proto = build("g (float[N, T] x) => (float[] y) { y = Relu (x) }")
    with pytest.raises(ModelError, match="columns of input 'x' cannot be counted: the file does not fix its shape"):
        trace(proto, "x", [0], "y")


def test_a_scikit_learn_pipeline() -> None:
    pytest.importorskip("skl2onnx")
    from skl2onnx import to_onnx
    from sklearn.compose import ColumnTransformer
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import OneHotEncoder, StandardScaler

    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6)).astype(np.float32)
    x[:, 3] = rng.integers(0, 3, 80)
    prepare = ColumnTransformer(
        [("numbers", StandardScaler(), [0, 1, 2]), ("group", OneHotEncoder(handle_unknown="ignore"), [3])],
        remainder="passthrough",
    )
    network = MLPClassifier((5,), max_iter=1, random_state=0)
    pipeline = make_pipeline(prepare, network)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline.fit(x, (x[:, 0] + x[:, 3] > 1).astype(int))
        proto = to_onnx(pipeline, x[:1], options={"zipmap": False}, target_opset={"": 17, "ai.onnx.ml": 3})
    first = layers_of(proto)[0].name
    for output in ("label", "probabilities"):
        assert entries(check(proto, [3], output, "X")) == {first: [3, 4, 5]}
        assert entries(check(proto, [1, 5], output, "X")) == {first: [1, 7]}


# -- random graphs -----------------------------------------------------------------------------------

Tensor = tuple[str, int]


class Sketch:
    """A graph of tensors [N, width] that grows step by step."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.nodes: list[str] = []
        self.weights: dict[str, Array] = {}
        self.tensors: list[Tensor] = [("x", 5)]

    def node(self, text: str) -> str:
        self.nodes.append(f"t{len(self.nodes)} = {text}")
        return f"t{len(self.nodes) - 1}"

    def number(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def other(self, *widths: int) -> str:
        return self.draw(st.sampled_from([name for name, width in self.tensors if width in widths]))

    def constant(self, values: Array | list[int]) -> str:
        self.weights[f"c{len(self.weights)}"] = np.asarray(values)
        return f"c{len(self.weights) - 1}"

    def sparse(self, *shape: int) -> str:
        rng = np.random.default_rng(self.number(0, 999))
        return self.constant((rng.normal(size=shape) * rng.integers(0, 2, shape)).astype(np.float32))


def dense(s: Sketch, a: str, width: int) -> Tensor:
    out = s.number(1, 5)
    if s.number(0, 1):
        return s.node(f"Add ({s.node(f'MatMul ({a}, {s.sparse(width, out)})')}, {s.sparse(out)})"), out
    return s.node(f"Gemm <transB = 1> ({a}, {s.sparse(out, width)}, {s.sparse(out)})"), out


def joined(s: Sketch, a: str, width: int) -> Tensor:
    operand = s.other(1, width) if s.number(0, 1) else s.sparse(1, width)
    operator = s.draw(st.sampled_from(["Add", "Mul", "Sub", "Max"]))
    return s.node(f"Tanh ({s.node(f'{operator} ({a}, {operand})')})"), width


def chosen(s: Sketch, a: str, width: int) -> Tensor:
    condition = s.other(1, width) if s.number(0, 1) else s.sparse(width)
    return s.node(f"Where ({s.node(f'Cast <to = 9> ({condition})')}, {a}, {s.other(width)})"), width


def concatenated(s: Sketch, a: str, width: int) -> Tensor:
    other, more = s.draw(st.sampled_from(s.tensors))
    return s.node(f"Concat <axis = 1> ({a}, {other})"), width + more


def gathered(s: Sketch, a: str, width: int) -> Tensor:
    indices = s.draw(st.lists(st.integers(-width, width - 1), min_size=1, max_size=5))
    return s.node(f"Gather <axis = 1> ({a}, {s.constant(indices)})"), len(indices)


def turned(s: Sketch, a: str, width: int) -> Tensor:
    maps = s.node(f"Reshape ({a}, {s.constant([0, 1, -1])})")
    tiles = s.node(f"Tile ({maps}, {s.constant([1, 2, 1])})")
    return s.node(f"Flatten ({s.node(f'Transpose <perm = [0, 2, 1]> ({tiles})')})"), 2 * width


def compared(s: Sketch, a: str, width: int) -> Tensor:
    one = s.node(f"Gather <axis = 1> ({a}, {s.constant([s.number(0, width - 1)])})")
    return s.node(f"Cast <to = 1> ({s.node(f'Greater ({one}, {s.sparse(3)})')})"), 3


STEPS = {
    "dense": dense,
    "joined": joined,
    "chosen": chosen,
    "concatenated": concatenated,
    "gathered": gathered,
    "turned": turned,
    "compared": compared,
    "activated": lambda s, a, width: (s.node(f"Relu ({a})"), width),
    "mixed": lambda s, a, width: (s.node(f"Softmax ({a})"), width),
    "reduced": lambda s, a, width: (s.node(f"ReduceMax <axes = [1]> ({a})"), 1),
}


@st.composite
def graphs(draw: st.DrawFn) -> onnx.ModelProto:
    sketch = Sketch(draw)
    for _ in range(sketch.number(1, 9)):
        # Dense steps come often: what is in front of them, beside them and behind them is what matters.
        step = draw(st.sampled_from([*STEPS, "dense", "dense"]))
        sketch.tensors.append(STEPS[step](sketch, *draw(st.sampled_from(sketch.tensors[-3:]))))
    text = " ".join(sketch.nodes)
    return build(
        f"g (float[N, 5] x) => (float[] y) {{ {text} y = Identity ({sketch.tensors[-1][0]}) }}", sketch.weights
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(graphs(), st.sets(st.integers(0, 4), min_size=1, max_size=2))
def test_random_graphs(proto: onnx.ModelProto, columns: set[int]) -> None:
    check(proto, sorted(columns))
