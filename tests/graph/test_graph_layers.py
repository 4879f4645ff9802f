"""Layers as matrix products: the product, changes of it and scaled inputs, against onnxruntime on the file itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import Array, Weights, build, layer_of, layers_of, random, run, save
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper

from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.patch import Patch
from onnxcare.graph.storage import Source


@dataclass(frozen=True)
class Form:
    """One way to write a layer that reads the model's input, and what onnxcare should make of it."""

    nodes: str
    weights: Weights
    x: tuple[int, ...]
    output: str = "y"
    bias: str | None = "b"
    kind: str = "float"

    @property
    def proto(self) -> onnx.ModelProto:
        inner = ", ".join(["N", *map(str, self.x)])
        axes = ", ".join(f"d{axis}" for axis in range(len(self.x) + 1))
        return build(f"g ({self.kind}[{inner}] x) => ({self.kind}[{axes}] y) {{ {self.nodes} }}", self.weights)

    def samples(self) -> dict[str, Array]:
        dtype = {"float": np.float32, "double": np.float64}[self.kind]
        return {"x": random(5, *self.x, seed=7, dtype=dtype)}


def gemm(options: str = "", *, weight: tuple[int, ...] = (6, 4), bias: Array | None, **kept: str | None) -> Form:
    """`y = Gemm(x, W, b)`."""
    weights = {"W": random(*weight)} | ({} if bias is None else {"b": bias})
    inputs = "x, W" if bias is None else "x, W, b"
    attributes = f"<{options}> " if options else ""
    found = kept.get("found", "b" if bias is not None else None)
    return Form(f"[layer] y = Gemm {attributes}({inputs})", weights, (6,), bias=found)


def conv(options: str, weight: tuple[int, ...], x: tuple[int, ...], *, bias: bool = True) -> Form:
    """`y = Conv(x, W, b)`."""
    weights = {"W": random(*weight)} | ({"b": random(weight[0], seed=1)} if bias else {})
    attributes = f"<{options}> " if options else ""
    inputs = "x, W, b" if bias else "x, W"
    return Form(f"[layer] y = Conv {attributes}({inputs})", weights, x, bias="b" if bias else None)


B = random(4, seed=1)
MATMUL = "[layer] p = MatMul (x, W) [add] y = Add"
CONV = "[layer] p = Conv <pads = [1, 1, 1, 1]> (x, W) [add] y = Add"

FORMS: dict[str, Form] = {
    "gemm": gemm(bias=B),
    "gemm transB": gemm("transB = 1", weight=(4, 6), bias=B),
    "gemm transB=0 given": gemm("transB = 0", bias=B),
    "gemm alpha": gemm("alpha = 0.5", bias=B),
    "gemm beta": gemm("beta = -2.0", bias=B),
    "gemm alpha beta transB": gemm("alpha = -0.25, beta = 3.0, transB = 1", weight=(4, 6), bias=B),
    "gemm without C": gemm(bias=None),
    "gemm alpha without C": gemm("alpha = 2.0", bias=None),
    "gemm C [1, n]": gemm("beta = 0.5", bias=B[None]),
    "gemm C scalar": gemm(bias=np.float32(3), found=None),
    "gemm C [1]": gemm(bias=np.float32([3]), found=None),
    "gemm beta 0": gemm("beta = 0.0", bias=B, found=None),
    "gemm one output": gemm(weight=(6, 1), bias=np.float32([3])),
    "gemm float64": Form(
        "[layer] y = Gemm <alpha = 0.5> (x, W, b)",
        {"W": random(6, 4, dtype=np.float64), "b": random(4, dtype=np.float64)},
        (6,),
        kind="double",
    ),
    "gemm behind Transpose": Form("t = Transpose (W) [layer] y = Gemm (x, t, b)", {"W": random(4, 6), "b": B}, (6,)),
    "gemm transB behind Transpose": Form(
        "t = Transpose <perm = [1, 0]> (W) [layer] y = Gemm <transB = 1> (x, t, b)", {"W": random(6, 4), "b": B}, (6,)
    ),
    "gemm behind Identity": Form("i = Identity (W) [layer] y = Gemm (x, i, b)", {"W": random(6, 4), "b": B}, (6,)),
    "matmul": Form("[layer] y = MatMul (x, W)", {"W": random(6, 4)}, (6,), bias=None),
    "matmul add": Form(f"{MATMUL} (p, b)", {"W": random(6, 4), "b": B}, (6,)),
    "matmul add in front": Form(f"{MATMUL} (b, p)", {"W": random(6, 4), "b": B}, (6,)),
    "matmul add [1, n]": Form(f"{MATMUL} (p, b)", {"W": random(6, 4), "b": B[None]}, (6,)),
    "matmul 3-D": Form(f"{MATMUL} (p, b)", {"W": random(6, 4), "b": B}, (3, 6)),
    "matmul 4-D": Form(f"{MATMUL} (p, b)", {"W": random(6, 4), "b": B}, (2, 3, 6)),
    "matmul one output": Form(f"{MATMUL} (p, b)", {"W": random(6, 1), "b": np.float32([2])}, (6,)),
    "matmul behind Transposes and Identity": Form(
        "t = Transpose (W) i = Identity (t) u = Transpose (i) v = Transpose (u) [layer] y = MatMul (x, v)",
        {"W": random(4, 6)},
        (6,),
        bias=None,
    ),
    "matmul behind two Transposes": Form(
        "t = Transpose (W) u = Transpose (t) [layer] y = MatMul (x, u)", {"W": random(6, 4)}, (6,), bias=None
    ),
    # Something is added that cannot be patched as a bias of one value an output.
    "matmul add scalar": Form(
        f"{MATMUL} (p, c)", {"W": random(6, 4), "c": np.float32([2])}, (6,), output="p", bias=None
    ),
    "matmul add of more axes": Form(
        "[layer] p = MatMul (x, W) s = Add (p, c) y = Squeeze (s, first)",
        {"W": random(6, 4), "c": B[None, None], "first": np.int64([0])},
        (6,),
        output="p",
        bias=None,
    ),
    "matmul add per token": Form(
        f"{MATMUL} (p, c)", {"W": random(6, 4), "c": random(3, 4)}, (3, 6), output="p", bias=None
    ),
    "matmul add itself": Form(f"{MATMUL} (p, p)", {"W": random(6, 4)}, (6,), output="p", bias=None),
    "matmul sub": Form(
        "[layer] p = MatMul (x, W) y = Sub (p, c)", {"W": random(6, 4), "c": B}, (6,), output="p", bias=None
    ),
    "conv": conv("", (4, 3, 3, 3), (3, 7, 6)),
    "conv without bias": conv("kernel_shape = [3, 3]", (4, 3, 3, 3), (3, 7, 6), bias=False),
    "conv 1x1": conv("", (4, 3, 1, 1), (3, 4, 4)),
    "conv 1-D": conv("pads = [1, 2], strides = [2]", (4, 3, 5), (3, 11)),
    "conv 3-D": conv(
        "pads = [0, 1, 0, 1, 0, 1], strides = [1, 2, 1], dilations = [1, 1, 2]", (4, 2, 2, 3, 2), (2, 4, 6, 5)
    ),
    "conv strides": conv("strides = [2, 3]", (4, 3, 3, 2), (3, 8, 9)),
    "conv dilations": conv("dilations = [2, 3], pads = [2, 2, 2, 2]", (4, 3, 3, 2), (3, 8, 9)),
    "conv groups": conv("group = 2, pads = [1, 1, 1, 1]", (6, 2, 3, 3), (4, 5, 5)),
    "conv depthwise": conv("group = 3, strides = [2, 2]", (3, 1, 3, 3), (3, 7, 7)),
    "conv depthwise twice as wide": conv("group = 3", (6, 1, 3, 3), (3, 5, 5)),
    "conv asymmetric": conv("pads = [0, 2, 1, 3]", (4, 3, 3, 3), (3, 5, 4)),
    "conv SAME_UPPER": conv('auto_pad = "SAME_UPPER", strides = [2, 2]', (4, 3, 4, 3), (3, 7, 8)),
    "conv SAME_LOWER": conv('auto_pad = "SAME_LOWER", strides = [2, 3]', (4, 3, 4, 3), (3, 7, 8)),
    "conv VALID": conv('auto_pad = "VALID", strides = [2, 2]', (4, 3, 3, 3), (3, 7, 8)),
    "conv kernel larger than stride": conv('auto_pad = "SAME_UPPER", strides = [5, 5]', (4, 3, 2, 2), (3, 7, 8)),
    "conv add [n, 1, 1]": Form(f"{CONV} (p, b)", {"W": random(4, 3, 3, 3), "b": B.reshape(4, 1, 1)}, (3, 5, 5)),
    "conv add [1, n, 1, 1]": Form(f"{CONV} (b, p)", {"W": random(4, 3, 3, 3), "b": B.reshape(1, 4, 1, 1)}, (3, 5, 5)),
    "conv add per column": Form(
        f"{CONV} (p, c)", {"W": random(4, 3, 3, 3), "c": random(5)}, (3, 5, 5), output="p", bias=None
    ),
}

each_form = pytest.mark.parametrize("form", [pytest.param(form, id=name) for name, form in FORMS.items()])


def parameters_of(layer: Layer) -> list[Parameter]:
    return [p for p in (layer.weight, layer.bias) if p is not None]


def values_of(proto: onnx.ModelProto, layer: Layer) -> dict[str, Array]:
    return {p.name: p.storage.read(Source(proto, Path())) for p in parameters_of(layer)}


def matrix_of(proto: onnx.ModelProto, layer: Layer) -> Array:
    values = values_of(proto, layer)
    return layer.matrix(values[layer.weight.name], None if layer.bias is None else values[layer.bias.name])


def expected_output(layer: Layer, x: Array, change: Array, like: Array) -> Array:
    return layer.from_rows(layer.product(layer.rows(x), change.astype(x.dtype)), like.shape)


def assert_close(found: Array, expected: Array) -> None:
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=1e-5)


@each_form
def test_what_is_found(form: Form) -> None:
    layer = layer_of(form.proto)
    assert layer.name == "layer"
    assert (layer.input, layer.output) == ("x", form.output)
    assert layer.weight.name == "W"
    assert (layer.bias.name if layer.bias else None) == form.bias
    assert layer.refusal is None
    z = run(form.proto, form.samples(), layer.output)[0]
    assert z.shape[layer.unit_axis] == layer.outputs
    assert form.x[0 if layer.convolution else -1] == layer.inputs


@each_form
def test_the_product_is_the_layers_output(form: Form) -> None:
    layer = layer_of(form.proto)
    x = form.samples()
    z = run(form.proto, x, layer.output)[0]
    product = expected_output(layer, x["x"], matrix_of(form.proto, layer), z)
    if layer.bias is None:
        # A bias that is not the layer's adds the same to every sample.
        zero = {"x": np.zeros_like(x["x"])}
        product = product + run(form.proto, zero, layer.output)[0]
    assert_close(product, z)


@each_form
def test_rows_of_the_output_go_back(form: Form) -> None:
    layer = layer_of(form.proto)
    z = run(form.proto, form.samples(), layer.output)[0]
    rows = layer.output_rows(z)
    assert rows.shape[:2] == (layer.groups, len(z))
    assert rows.shape[-1] == layer.outputs // layer.groups
    np.testing.assert_array_equal(layer.from_rows(rows, z.shape), z)


@each_form
def test_a_change_in_the_file_adds_rows_times_change(form: Form, tmp_path: Path) -> None:
    model = save(form.proto, tmp_path)
    layer = layer_of(form.proto)
    x = form.samples()
    before = run(form.proto, x, layer.output)[0]
    shape = matrix_of(form.proto, layer).shape
    change = random(*shape, seed=11, dtype=np.float64)
    new = layer.add(change, values_of(form.proto, layer))
    assert set(new) == {p.name for p in parameters_of(layer)}
    data = Patch({p: new[p.name] for p in parameters_of(layer)}).apply(model)
    after = run(onnx.ModelProto.FromString(data), x, layer.output)[0]
    assert_close(after, before + expected_output(layer, x["x"], change, before))


@each_form
def test_scaled_inputs_of_the_weight_are_a_scaled_input(form: Form, tmp_path: Path) -> None:
    model = save(form.proto, tmp_path)
    layer = layer_of(form.proto)
    x = form.samples()
    factors = np.linspace(-3, 2, layer.inputs)
    weight = values_of(form.proto, layer)[layer.weight.name]
    data = Patch({layer.weight: layer.scale_inputs(factors, weight)}).apply(model)
    after = run(onnx.ModelProto.FromString(data), x, layer.output)[0]
    axis = 1 if layer.convolution else x["x"].ndim - 1
    spread = factors.reshape([-1 if i == axis else 1 for i in range(x["x"].ndim)])
    scaled = {"x": (x["x"] * spread).astype(x["x"].dtype)}
    assert_close(after, run(form.proto, scaled, layer.output)[0])


# -- any geometry of a convolution ---------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> Form:
    dims = draw(st.integers(1, 3))
    groups = draw(st.integers(1, 3))

    def each(low: int, high: int) -> list[int]:
        return [draw(st.integers(low, high)) for _ in range(dims)]

    kernel, strides, dilations, size = each(1, 3), each(1, 3), each(1, 2), each(3, 6)
    auto_pad = draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    options = [f"strides = {strides}", f"group = {groups}", f'auto_pad = "{auto_pad}"']
    if auto_pad == "NOTSET":
        options += [f"pads = {each(0, 2) + each(0, 2)}"]
    if auto_pad in ("NOTSET", "VALID"):
        # onnxruntime takes dilations with SAME_*, other runtimes do not.
        options += [f"dilations = {dilations}"]
        assume(all(s > d * (k - 1) for s, d, k in zip(size, dilations, kernel, strict=True)))
    inputs, outputs = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    weight = (outputs * groups, inputs, *kernel)
    return conv(", ".join(options), weight, (inputs * groups, *size))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions())
def test_the_product_of_any_convolution(form: Form) -> None:
    layer = layer_of(form.proto)
    x = form.samples()
    z = run(form.proto, x)[0]
    assert_close(expected_output(layer, x["x"], matrix_of(form.proto, layer), z), z)


def test_the_rows_of_a_convolution_by_plain_loops() -> None:
    form = conv("group = 2, strides = [2, 1], dilations = [1, 2], pads = [1, 0, 0, 2]", (4, 2, 2, 2), (4, 4, 3))
    layer = layer_of(form.proto)
    x = form.samples()["x"]
    padded = np.zeros((len(x), 4, 5, 5), np.float32)
    padded[:, :, 1:, :3] = x
    rows = layer.rows(x)
    positions = [(i, j) for i in (0, 2) for j in (0, 1, 2)]
    assert rows.shape == (2, len(x), len(positions), 2 * 2 * 2 + 1)
    for group in range(2):
        for position, (i, j) in enumerate(positions):
            patch = [
                padded[:, channel, i + di, j + dj]
                for channel in (2 * group, 2 * group + 1)
                for di in (0, 1)
                for dj in (0, 2)
            ]
            np.testing.assert_array_equal(rows[group, :, position, :-1], np.stack(patch, axis=1))
            np.testing.assert_array_equal(rows[group, :, position, -1], 1)


# -- what is refused, and what is no layer -------------------------------------------------------


def graph(nodes: str, weights: Weights, x: str = "float[N, 6]", y: str = "float[N, 6]") -> onnx.ModelProto:
    return build(f"g ({x} x) => ({y} y) {{ {nodes} }}", weights)


def refusal_of(proto: onnx.ModelProto) -> str | None:
    return layers_of(proto)[0].refusal


def test_a_transposed_input_is_refused() -> None:
    proto = graph("[fc] y = Gemm <transA = 1> (x, W)", {"W": random(6, 6)}, x="float[6, N]")
    assert refusal_of(proto) == "it transposes its input (transA=1)"


def test_alpha_zero_is_refused() -> None:
    assert refusal_of(graph("y = Gemm <alpha = 0.0> (x, W)", {"W": random(6, 6)})) == "its alpha is 0"


@pytest.mark.parametrize(
    ("nodes", "refusal"),
    [
        ("[one] h = MatMul (x, W) [two] y = MatMul (h, W)", "its weight 'W' is also used by two"),
        ("[one] h = MatMul (x, W) y = MatMul (h, W)", "its weight 'W' is also used by MatMul#1"),
        ("[one] h = MatMul (x, W) [norm] n = ReduceMax (W) y = Add (h, n)", "its weight 'W' is also used by norm"),
        ("[one] h = MatMul (x, W) [one] y = MatMul (h, W)", "its weight 'W' is also used by one again"),
        ("[one] y = Gemm (x, W, W)", "its weight 'W' is also used by one again"),
    ],
)
def test_shared_weights_are_refused_by_the_other_users_name(nodes: str, refusal: str) -> None:
    assert refusal_of(graph(nodes, {"W": random(6, 6)})) == refusal


def test_a_weight_that_is_an_output_is_refused() -> None:
    proto = graph("[one] y = MatMul (x, W)", {"W": random(6, 6)})
    proto.graph.output.append(helper.make_tensor_value_info("W", onnx.TensorProto.FLOAT, [6, 6]))
    assert refusal_of(proto) == "its weight 'W' is also used by the model's outputs"


def test_weights_shared_behind_identities_are_refused() -> None:
    proto = graph(
        "[copy] i = Identity (W) [one] h = MatMul (x, W) [two] y = MatMul (h, i)",
        {"W": random(6, 6)},
    )
    one, two = layers_of(proto)
    assert one.refusal == "its weight 'W' is also used by copy"
    assert two.refusal


def test_a_weight_that_a_branch_reads_is_refused() -> None:
    proto = build(
        """g (float[N, 6] x, bool c) => (float[N, 6] y) {
            [one] h = MatMul (x, W)
            [choice] y = If (c) <
                then_branch = then () => (float[N, 6] t) { t = MatMul (h, W) },
                else_branch = else () => (float[N, 6] e) { e = Identity (h) }
            >
        }""",
        {"W": random(6, 6)},
    )
    assert refusal_of(proto) == "its weight 'W' is also used by choice"


def test_a_shared_bias_is_left_alone(tmp_path: Path) -> None:
    proto = graph(
        "[one] h = Gemm (x, W, b) [two] p = MatMul (h, V) y = Add (p, b)",
        {"W": random(6, 6), "V": random(6, 6, seed=1), "b": random(6)},
    )
    one, two = layers_of(proto)
    assert [(layer.bias, layer.refusal) for layer in (one, two)] == [(None, None)] * 2
    assert two.output == "y"
    model = save(proto, tmp_path)
    weight = values_of(proto, one)["W"]
    data = Patch({one.weight: one.add(np.ones((1, 6, 6)), {"W": weight})["W"]}).apply(model)
    x = {"x": random(3, 6, seed=4)}
    change = run(onnx.ModelProto.FromString(data), x, "h")[0] - run(proto, x, "h")[0]
    assert_close(change, np.repeat(x["x"].sum(axis=1, keepdims=True), 6, axis=1))


@pytest.mark.parametrize(
    ("nodes", "weights"),
    [
        ("y = MatMul (W, x)", {"W": random(6, 6)}),
        ("p = MatMul (A, B) y = Add (p, x)", {"A": random(1, 6), "B": random(6, 6)}),
        ("y = MatMul (x, x)", {}),
        ("y = MatMul (x, W)", {"W": random(2, 6, 6)}),
        ("y = MatMul (x, v)", {"v": random(6)}),
        ("t = Transpose (W) p = MatMul (x, t) y = Add (p, t)", {"W": random(6, 6)}),
        ("t = Mul (W, W) y = MatMul (x, t)", {"W": random(6, 6)}),
        ("y = Gemm (x, t)", {"W": random(6, 6)}),
        ("y = Gemm (x, W)", {"W": random(2, 6, 6)}),
        ("n = Neg (b) y = MatMul (n, W)", {"b": random(1, 6), "W": random(6, 6)}),
    ],
)
def test_products_without_a_weight_of_their_own_are_no_layers(nodes: str, weights: Weights) -> None:
    assert layers_of(graph(nodes, weights)) == []


def test_operators_of_another_domain_are_no_layers() -> None:
    proto = graph("y = MatMul (x, W)", {"W": random(6, 6)})
    proto.graph.node[0].domain = "com.example"
    assert layers_of(proto) == []


@pytest.mark.parametrize(
    "edit",
    [
        lambda node: node.input.append(""),
        lambda node: setattr(node, "domain", "ai.onnx"),
        lambda node: setattr(node, "name", ""),
        lambda node: setattr(node, "name", "model/layer:0"),
    ],
    ids=["empty C", "ai.onnx", "no name", "colon"],
)
def test_ways_to_write_the_same_node(edit: Callable[[onnx.NodeProto], None]) -> None:
    proto = graph("[fc] y = Gemm (x, W)", {"W": random(6, 4)}, y="float[N, 4]")
    edit(proto.graph.node[0])
    layer = layer_of(proto)
    assert layer.name == (proto.graph.node[0].name or "Gemm#0")
    assert (layer.inputs, layer.outputs, layer.bias, layer.refusal) == (6, 4, None, None)


def test_a_bias_that_leaves_the_graph_in_front_of_its_add_is_no_bias() -> None:
    proto = graph("[fc] p = MatMul (x, W) y = Add (p, b)", {"W": random(6, 6), "b": random(6)})
    proto.graph.output.append(helper.make_tensor_value_info("p", onnx.TensorProto.FLOAT, ["N", 6]))
    layer = layer_of(proto)
    assert (layer.output, layer.bias) == ("p", None)


def test_layers_come_in_graph_order_refused_ones_included() -> None:
    proto = graph(
        "[a] h = MatMul (x, W) [b] i = Gemm <transA = 1> (h, V) [c] y = MatMul (i, U)",
        {"W": random(6, 6), "V": random(6, 6), "U": random(6, 6)},
    )
    assert [(layer.name, layer.refusal is None) for layer in layers_of(proto)] == [
        ("a", True),
        ("b", False),
        ("c", True),
    ]
