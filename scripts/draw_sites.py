"""Draw the pictures of docs/sites.md: small models of many forms, with their layers and sites as onnxcare finds them.

    python scripts/draw_sites.py

A test makes them again and compares, so whoever changes what counts as a site has to run this.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
from onnx import numpy_helper

import onnxcare

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"

# Graphs as ONNX text, with the shapes of their weights, whose values do not matter, and the values of short constants.
MODELS = {
    "dense": """
        (float[N, 6] x) => (float[N, 3] scores)
        weights: W1[6, 16] b1[16] W2[16, 12] b2[12] W3[12, 3] b3[3]
        [first] z1 = Gemm (x, W1, b1)
        [relu1] h1 = Relu (z1)
        [second] p2 = MatMul (h1, W2)
        [bias] z2 = Add (p2, b2)
        [relu2] h2 = Relu (z2)
        [third] z3 = Gemm (h2, W3, b3)
        [answer] scores = Softmax (z3)
    """,
    "cnn": """
        (float[N, 3, 16, 16] image) => (float[N, 10] scores)
        weights: W1[8, 3, 3, 3] s1[8] t1[8] m1[8] v1[8] W2[16, 8, 3, 3] b2[16] W3[10, 256] b3[10]
        [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (image, W1)
        [norm1] n1 = BatchNormalization (c1, s1, t1, m1, v1)
        [relu1] r1 = Relu (n1)
        [pool1] q1 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r1)
        [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (q1, W2, b2)
        [relu2] r2 = Relu (c2)
        [pool2] q2 = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r2)
        [flatten] f = Flatten (q2)
        [dense] scores = Gemm <transB = 1> (f, W3, b3)
    """,
    "residual": """
        (float[N, 3, 16, 16] image) => (float[N, 10] scores)
        weights: W0[8, 3, 3, 3] b0[8] W1[8, 8, 3, 3] b1[8] W2[8, 8, 3, 3] b2[8] W3[10, 8] b3[10]
        [stem] c0 = Conv <pads = [1, 1, 1, 1]> (image, W0, b0)
        [relu0] h = Relu (c0)
        [conv1] c1 = Conv <pads = [1, 1, 1, 1]> (h, W1, b1)
        [relu1] r1 = Relu (c1)
        [conv2] c2 = Conv <pads = [1, 1, 1, 1]> (r1, W2, b2)
        [add] a = Add (c2, h)
        [relu2] r2 = Relu (a)
        [pool] g = GlobalAveragePool (r2)
        [flatten] f = Flatten (g)
        [dense] scores = Gemm <transB = 1> (f, W3, b3)
    """,
    "separable": """
        (float[N, 8, 16, 16] image) => (float[N, 10] scores)
        weights: W1[24, 8, 1, 1] b1[24] W2[24, 1, 3, 3] b2[24] W3[12, 12, 1, 1] b3[12] W4[10, 12] b4[10]
        [expand] c1 = Conv (image, W1, b1)
        [clip1] r1 = Relu (c1)
        [depthwise] c2 = Conv <group = 24, pads = [1, 1, 1, 1]> (r1, W2, b2)
        [clip2] r2 = Relu (c2)
        [grouped] c3 = Conv <group = 2> (r2, W3, b3)
        [pool] g = GlobalAveragePool (c3)
        [flatten] f = Flatten (g)
        [dense] scores = Gemm <transB = 1> (f, W4, b4)
    """,
    "signal": """
        (float[N, 2, 64] signal) => (float[N, 2, 64] restored)
        weights: W1[8, 2, 5] b1[8] W2[16, 8, 5] b2[16] W3[16, 8, 4] b3[8] W4[2, 8, 5] b4[2]
        [down1] c1 = Conv <pads = [2, 2]> (signal, W1, b1)
        [relu1] r1 = Relu (c1)
        [down2] c2 = Conv <strides = [2], pads = [2, 2]> (r1, W2, b2)
        [relu2] r2 = Relu (c2)
        [up] c3 = ConvTranspose <strides = [2], pads = [1, 1]> (r2, W3, b3)
        [relu3] r3 = Relu (c3)
        [last] restored = Conv <pads = [2, 2]> (r3, W4, b4)
    """,
    "recurrent": """
        (float[N, 12, 6] steps) => (float[N, 4] scores)
        weights: W[1, 64, 6] R[1, 64, 16] B[1, 128] V[4, 16] b[4]
        integers: direction = 1; last = -1
        [first] s = Transpose <perm = [1, 0, 2]> (steps)
        [lstm] y, state, cell = LSTM <hidden_size = 16> (s, W, R, B)
        [squeeze] q = Squeeze (y, direction)
        [turn] t = Transpose <perm = [1, 0, 2]> (q)
        [take] l = Gather <axis = 1> (t, last)
        [flatten] f = Flatten (l)
        [dense] scores = Gemm <transB = 1> (f, V, b)
    """,
    "transformer": """
        (int64[N, 8] tokens) => (float[N, 2] scores)
        weights: E[100, 16] s1[16] t1[16] Q[16, 16] K[16, 16] V[16, 16] O[16, 16]
        weights: s2[16] t2[16] U[16, 64] u[64] D[64, 16] d[16] S[16, 2] c[2]
        integers: heads = 0, 8, 4, 4; flat = 0, 8, 16; middle = 1
        numbers: root = 2
        [embed] x = Gather (E, tokens)
        [norm1] n1 = LayerNormalization (x, s1, t1)
        [query] q = MatMul (n1, Q)
        [key] k = MatMul (n1, K)
        [value] v = MatMul (n1, V)
        [split_q] q4 = Reshape (q, heads)
        [split_k] k4 = Reshape (k, heads)
        [split_v] v4 = Reshape (v, heads)
        [turn_q] qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        [turn_k] kh = Transpose <perm = [0, 2, 3, 1]> (k4)
        [turn_v] vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        [compare] w = MatMul (qh, kh)
        [scale] ws = Div (w, root)
        [attend] p = Softmax (ws)
        [mix] a = MatMul (p, vh)
        [turn] at = Transpose <perm = [0, 2, 1, 3]> (a)
        [join] af = Reshape (at, flat)
        [output] o = MatMul (af, O)
        [add1] x1 = Add (x, o)
        [norm2] n2 = LayerNormalization (x1, s2, t2)
        [up] m = MatMul (n2, U)
        [up_bias] mb = Add (m, u)
        [relu] h = Relu (mb)
        [down] e = MatMul (h, D)
        [down_bias] eb = Add (e, d)
        [add2] x2 = Add (x1, eb)
        [mean] g = ReduceMean <axes = [1], keepdims = 0> (x2)
        [dense] scores = Gemm (g, S, c)
    """,
    "patches": """
        (float[N, 3, 32, 32] image) => (float[N, 10] scores)
        weights: P[16, 3, 8, 8] p[16] L[1, 16, 16] U[16, 64] u[64] D[64, 16] d[16] S[16, 10] c[10]
        integers: tokens = 0, 16, -1
        [patch] x = Conv <strides = [8, 8]> (image, P, p)
        [flat] f = Reshape (x, tokens)
        [turn] t = Transpose <perm = [0, 2, 1]> (f)
        [place] e = Add (t, L)
        [up] m = MatMul (e, U)
        [up_bias] mb = Add (m, u)
        [relu] h = Relu (mb)
        [down] y = MatMul (h, D)
        [down_bias] yb = Add (y, d)
        [skip] z = Add (e, yb)
        [mean] g = ReduceMean <axes = [1], keepdims = 0> (z)
        [dense] scores = Gemm (g, S, c)
    """,
    "embedding": """
        (int64[N, 20] words) => (float[N, 2] scores)
        weights: E[500, 24] W1[24, 16] b1[16] W2[16, 2] b2[2]
        [embed] e = Gather (E, words)
        [mean] m = ReduceMean <axes = [1], keepdims = 0> (e)
        [first] z = Gemm (m, W1, b1)
        [relu] h = Relu (z)
        [second] scores = Gemm (h, W2, b2)
    """,
    "inputs": """
        (float[N, 3, 8, 8] image, float[N, 5] table) => (float[N, 2] scores)
        weights: W1[8, 3, 3, 3] b1[8] W2[5, 8] b2[8] W3[16, 12] b3[12] W4[12, 2] b4[2]
        [conv] c = Conv (image, W1, b1)
        [relu1] r = Relu (c)
        [pool] g = GlobalAveragePool (r)
        [flatten] f = Flatten (g)
        [dense] z = Gemm (table, W2, b2)
        [relu2] h = Relu (z)
        [join] j = Concat <axis = 1> (f, h)
        [both] k = Gemm (j, W3, b3)
        [relu3] l = Relu (k)
        [last] scores = Gemm (l, W4, b4)
    """,
    "outputs": """
        (float[N, 6] x) => (float[N, 3] kind, float[N, 1] price)
        weights: W1[6, 16] b1[16] W2[16, 3] b2[3] W3[16, 8] b3[8] W4[8, 1] b4[1]
        [trunk] z = Gemm (x, W1, b1)
        [relu1] h = Relu (z)
        [kind_head] kind = Gemm (h, W2, b2)
        [price_1] p = Gemm (h, W3, b3)
        [relu2] r = Relu (p)
        [price_2] price = Gemm (r, W4, b4)
    """,
}


def model(name: str) -> onnx.ModelProto:
    """Return one of the models."""
    signature, *lines = [line.strip() for line in MODELS[name].strip().splitlines()]
    held = {"weights:": [], "integers:": [], "numbers:": []}
    nodes = []
    for line in lines:
        word, _, rest = line.partition(" ")
        if word in held:
            held[word].append(rest)
        else:
            nodes.append(line)
    text = f'<ir_version: 8, opset_import: ["": 17]>\n{name} {signature} {{\n' + "\n".join(nodes) + "\n}"
    proto = onnx.parser.parse_model(text)
    tensors = proto.graph.initializer
    for label, lengths in re.findall(r"(\w+)\[([\d, ]+)\]", " ".join(held["weights:"])):
        shape = [int(length) for length in lengths.split(",")]
        tensors.append(numpy_helper.from_array(np.ones(shape, np.float32), label))
    for kind, dtype in (("integers:", np.int64), ("numbers:", np.float32)):
        for item in filter(None, "; ".join(held[kind]).split("; ")):
            label, values = item.split(" = ")
            tensors.append(numpy_helper.from_array(np.array([float(v) for v in values.split(",")], dtype), label))
    onnx.checker.check_model(proto, full_check=True)
    return proto


def draw(name: str, folder: Path) -> Path:
    """Draw one of the models into a folder, and return the file."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / f"{name}.onnx"
        file.write_bytes(model(name).SerializeToString())
        onnxcare.inspect(file, picture=folder / f"{name}.svg")
    return folder / f"{name}.svg"


if __name__ == "__main__":
    PICTURES.mkdir(exist_ok=True)
    for known in MODELS:
        print(draw(known, PICTURES))
