"""Sites: where the units of a layer are seen last before another layer reads them, and what hinders folding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Array, build, layers_of, random, run, save, sites_of
from onnx import helper

from onnxcare.graph.patch import Patch
from onnxcare.graph.storage import Source

# tensor, axis, units, kind, writers, readers, refusal
Found = tuple[str, int, int, str, tuple[str, ...], tuple[str, ...], str | None]


def found(proto: onnx.ModelProto) -> list[Found]:
    return [
        (s.tensor, s.axis, s.units, s.kind, s.writers, tuple(reader.name for reader in s.readers), s.refusal)
        for s in sites_of(proto)
    ]


def neurons(tensor: str, units: int, writers: str, readers: str, refusal: str | None = None, axis: int = -1) -> Found:
    return (tensor, axis, units, "neuron", tuple(writers.split()), tuple(readers.split()), refusal)


def channels(tensor: str, units: int, writers: str, readers: str, refusal: str | None = None, axis: int = 1) -> Found:
    return (tensor, axis, units, "channel", tuple(writers.split()), tuple(readers.split()), refusal)


OF_SUBJECTS: dict[str, list[Found]] = {
    "mlp": [neurons("h1", 8, "fc1", "fc2"), neurons("h2", 7, "fc2", "fc3")],
    "mlp-float64": [neurons("h1", 8, "fc1", "fc2"), neurons("h2", 7, "fc2", "fc3")],
    "cnn": [channels("q1", 4, "conv1", "conv2"), channels("q2", 6, "conv2", "fc")],
    "residual": [
        channels("h", 4, "stem", "conv1", "'h' is also read by Add add"),
        channels("r1", 3, "conv1", "conv2"),
        channels("r2", 4, "conv2 stem", "down"),
        channels("g", 6, "down", "fc"),
    ],
    "keras": [channels("q1", 3, "conv1", "dense1"), neurons("r2", 6, "dense1", "dense2")],
    "acas": [neurons("h1", 8, "mul1", "mul2"), neurons("h2", 6, "mul2", "mul3")],
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_sites_of_whole_models(name: str) -> None:
    assert found(SUBJECTS[name]().proto) == OF_SUBJECTS[name]


def test_sites_of_the_samples(samples: Path) -> None:
    proto = onnx.load(samples / "mnist-blend-keras/model.onnx")
    assert [(kind, units, refusal) for _, _, units, kind, _, _, refusal in found(proto)] == [
        ("channel", 16, None),
        ("channel", 32, None),
        ("neuron", 64, None),
    ]


# -- what the units of a dense layer pass through ------------------------------------------------

DENSE = {"W1": random(6, 8), "W2": random(8, 4), "b": random(8, seed=1)}


def dense(middle: str, *, weights: dict[str, Array] | None = None, width: int = 8, opset: int = 17) -> onnx.ModelProto:
    """A Gemm, something in between that makes `h` of `z`, and a Gemm that reads `h`."""
    held = {"W1": DENSE["W1"], "W2": random(width, 4)} | (weights or {})
    return build(
        f"g (float[N, 6] x) => (float[N, 4] y) {{ [one] z = Gemm (x, W1) {middle} [two] y = Gemm (h, W2) }}",
        held,
        opset=opset,
    )


BN = {name: np.abs(random(8, seed=i)) + 1 for i, name in enumerate(("scale", "shift", "mean", "var"))}


@pytest.mark.parametrize(
    ("middle", "weights", "site"),
    [
        ("h = Relu (z)", {}, "h"),
        ("a = Relu (z) b = Sigmoid (a) h = Tanh (b)", {}, "h"),
        ("h = Clip (z, low, high)", {"low": np.float32(-50), "high": np.float32(50)}, "h"),
        ("h = BatchNormalization (z, scale, shift, mean, var)", BN, "h"),
        ("h = PRelu (z, slope)", {"slope": random(8)}, "h"),
        ("h = Mul (z, c)", {"c": random(8)}, "h"),
        ("h = Sub (c, z)", {"c": random(1)}, "h"),
        ("c = Constant <value_float = 2.0> () h = Mul (z, c)", {}, "h"),
        ("c = Constant <value_floats = [1.0]> () h = Add (z, c)", {}, "h"),
        ("c = Identity (b) h = Add (z, c)", {"b": random(8)}, "h"),
        ("c = Neg (b) d = Exp (c) h = Div (z, d)", {"b": random(8)}, "h"),
        ("r = Relu (z) h, mask = Dropout (r)", {}, "r"),
        ("r = Relu (z) h = Identity (r)", {}, "r"),
        ("r = Relu (z) u = Unsqueeze (r, last) h = Squeeze (u, last)", {"last": np.int64([2])}, "r"),
        ("r = Relu (z) t = Transpose <perm = [1, 0]> (r) h = Transpose <perm = [1, 0]> (t)", {}, "r"),
        ("s = Sigmoid (z) h = Mul (z, s)", {}, "h"),
        ("r = Relu (z) s = Neg (z) t = Relu (s) h = Sub (r, t)", {}, "h"),
    ],
)
def test_units_of_a_dense_layer_are_followed(middle: str, weights: dict[str, Array], site: str) -> None:
    proto = dense(middle, weights=weights)
    assert [(s.tensor, s.units, s.kind, s.writers, s.refusal) for s in sites_of(proto)] == [
        (site, 8, "neuron", ("one",), None)
    ]
    assert_only_its_own_units_move(proto)


@pytest.mark.parametrize(
    ("middle", "weights", "width"),
    [
        ("h = Softmax (z)", {}, 8),
        ("h = LayerNormalization (z, scale)", {"scale": random(8)}, 8),
        ("h = CumSum (z, axis)", {"axis": np.int64(1)}, 8),
        ("s = Softmax (z) h = Add (z, s)", {}, 8),
        ("h = Concat <axis = 1> (z, z)", {}, 16),
        ("h = Concat <axis = 1> (z, x)", {}, 14),
        ("h = Concat <axis = -1> (z, x)", {}, 14),
        ("a = Gemm (x, W3) h = Concat <axis = 1> (z, a)", {"W3": random(6, 8, seed=5)}, 16),
        ("u = Unsqueeze (z, one) p = MaxPool <kernel_shape = [2], strides = [2]> (u) h = Squeeze (p, one)",
         {"one": np.int64([1])}, 4),
        ("h = Pad (z, pads)", {"pads": np.int64([0, 1, 0, 1])}, 10),
        ("h = Gather <axis = 1> (z, order)", {"order": np.int64([3, 1, 2])}, 3),
        ("a = Transpose (z) b = Relu (a) h = Transpose (b)", {}, 8),
    ],
)  # fmt: skip
def test_where_units_are_lost_the_readers_inputs_are_the_units(
    middle: str, weights: dict[str, Array], width: int
) -> None:
    sites = sites_of(dense(middle, weights=weights, width=width))
    site = sites[-1]
    assert (site.units, site.kind, site.writers, site.refusal) == (width, "neuron", (), None)
    assert [reader.name for reader in site.readers] == ["two"]
    proto = dense(middle, weights=weights, width=width)
    h = run(proto, {"x": random(3, 6)}, site.tensor)[0]
    assert h.shape[site.axis] == site.units


@pytest.mark.parametrize("axis", [1, -1])
def test_units_joined_along_their_axis_count_together(axis: int) -> None:
    proto = dense(
        f"a = MatMul (x, W3) b = MatMul (x, W4) h = Concat <axis = {axis}> (a, b) n = Neg (z)",
        weights={"W3": random(6, 8), "W4": random(6, 8, seed=1)},
        width=16,
    )
    (site,) = sites_of(proto)
    assert (site.tensor, site.units) == ("h", 16)
    assert run(proto, {"x": random(3, 6)}, "h")[0].shape[site.axis] == 16


def test_units_behind_a_changed_order_of_samples_are_not_followed() -> None:
    proto = build(
        """g (float[N, 3, 6] x) => (float[3, N, 4] y) {
            [one] z = MatMul (x, W1)
            t = Transpose <perm = [1, 0, 2]> (z)
            r = Relu (t)
            [two] y = MatMul (r, W2)
        }""",
        {"W1": random(6, 8), "W2": random(8, 4)},
    )
    (site,) = sites_of(proto)
    assert (site.tensor, site.axis, site.units, site.writers) == ("r", -1, 8, ())


# -- what the channels of a convolution pass through ---------------------------------------------

CONV = "[one] c = Conv <pads = [1, 1, 1, 1]> (x, W1)"


def maps(middle: str, reader: str, weights: dict[str, Array], opset: int = 17) -> onnx.ModelProto:
    return build(
        f"g (float[N, 2, 6, 6] x) => (float[N, k] y) {{ {CONV} {middle} {reader} f = Flatten (q) y = Identity (f) }}",
        {"W1": random(4, 2, 3, 3)} | weights,
        opset=opset,
    )


@pytest.mark.parametrize(
    ("middle", "units"),
    [
        ("h = Relu (c)", 4),
        ("h = MaxPool <kernel_shape = [2, 2]> (c)", 4),
        ("h = AveragePool <kernel_shape = [2, 2]> (c)", 4),
        ("h = GlobalMaxPool (c)", 4),
        ("h = ReduceMean <axes = [2, 3]> (c)", 4),
        ("r = Relu (c) g = GlobalAveragePool (r) s = Sigmoid (g) h = Mul (r, s)", 4),
        ("r = Relu (c) n = Neg (c) h = Concat <axis = 1> (r, n)", 8),
        ("r = Relu (c) n = Neg (c) h = Concat <axis = 2> (r, n)", 4),
        ("r = Relu (c) h = Add (r, bias)", 4),
        ("h = Resize (c, , scales)", 4),
    ],
)
def test_channels_are_followed_to_the_next_convolution(middle: str, units: int) -> None:
    weights = {
        "W2": random(3, units, 1, 1),
        "bias": random(4, 1, 1),
        "scales": np.float32([1, 1, 2, 2]),
    }
    proto = maps(middle, "[two] q = Conv (h, W2)", weights)
    (site,) = sites_of(proto)
    assert (site.tensor, site.axis, site.units, site.kind, site.writers) == ("h", 1, units, "channel", ("one",))
    assert site.refusal is None
    if units == 4:
        assert_only_its_own_units_move(proto)


@pytest.mark.parametrize(
    ("middle", "site", "axis"),
    [
        ("g = GlobalAveragePool (c) h = Flatten (g)", "g", 1),
        ("g = GlobalAveragePool (c) h = Squeeze (g, maps)", "g", 1),
        ("h = ReduceMean <axes = [2, 3], keepdims = 0> (c)", "h", 1),
        ("t = Transpose <perm = [0, 2, 3, 1]> (c) h = ReduceMean <axes = [1, 2], keepdims = 0> (t)", "h", 1),
        (
            "t = Transpose <perm = [0, 2, 3, 1]> (c) r = Relu (t) h = ReduceMax <axes = [1, 2], keepdims = 0> (r)",
            "h",
            1,
        ),
    ],
)
def test_channels_are_followed_through_reductions(middle: str, site: str, axis: int) -> None:
    proto = maps(middle, "[two] q = MatMul (h, W2)", {"W2": random(4, 3), "maps": np.int64([2, 3])})
    assert found(proto) == [channels(site, 4, "one", "two", axis=axis)]
    assert_only_its_own_units_move(proto)


def test_axes_of_a_reduction_may_be_a_constant() -> None:
    middle = "h = ReduceMean <keepdims = 0> (c, axes)"
    proto = maps(middle, "[two] q = MatMul (h, W2)", {"W2": random(4, 3), "axes": np.int64([2, 3])}, opset=18)
    assert found(proto) == [channels("h", 4, "one", "two")]
    middle = "axes = Constant <value_ints = [2, 3]> () h = ReduceMean <keepdims = 0> (c, axes)"
    proto = maps(middle, "[two] q = MatMul (h, W2)", {"W2": random(4, 3)}, opset=18)
    assert found(proto) == [channels("h", 4, "one", "two")]


@pytest.mark.parametrize(
    "middle",
    [
        "r = ReduceMean <axes = [1]> (c) h = Concat <axis = 1> (r, r, r, r)",
        "t = Transpose <perm = [0, 2, 3, 1]> (c) p = MaxPool <kernel_shape = [1, 4]> (t) "
        "s = Concat <axis = 3> (p, p, p, p) h = Transpose <perm = [0, 3, 1, 2]> (s)",
        "h = Pad (c, pads)",
        "h = ReduceMean <axes = [0]> (c)",
        "h = ReduceMean <axes = [-1]> (c)",
        "h = ReduceMean (c, order)",
    ],
)
def test_where_channels_are_lost_the_readers_inputs_are_the_units(middle: str) -> None:
    weights = {"W2": random(3, 4, 1, 1), "pads": np.int64([0, 0, 1, 1] * 2)}
    proto = maps(middle, "[two] q = Conv (h, W2)", weights)
    assert found(proto) == [channels("h", 4, "", "two")]


def test_channels_in_the_last_axis_keep_it() -> None:
    proto = maps(
        "t = Transpose <perm = [0, 2, 3, 1]> (c) a = Relu (t)",
        "[two] q = MatMul (a, W2)",
        {"W2": random(4, 3)},
    )
    assert found(proto) == [channels("a", 4, "one", "two", axis=3)]
    assert_only_its_own_units_move(proto)


# -- what hinders folding ------------------------------------------------------------------------


def refusals(proto: onnx.ModelProto) -> list[str | None]:
    return [site.refusal for site in sites_of(proto)]


def test_two_readers_share_a_site() -> None:
    proto = build(
        """g (float[N, 6] x) => (float[N, 4] y) {
            [one] z = Gemm (x, W1)
            h = Relu (z)
            [two] a = Gemm (h, W2)
            [three] b = MatMul (h, W3)
            y = Add (a, b)
        }""",
        {"W1": random(6, 8), "W2": random(8, 4), "W3": random(8, 4, seed=1)},
    )
    assert found(proto) == [neurons("h", 8, "one", "two three")]


@pytest.mark.parametrize(
    ("nodes", "refusal"),
    [
        ("h = Relu (z) [other] o = Neg (h) [two] p = Gemm (h, W2) y = Sum (p, p)", "'h' is also read by Neg other"),
        ("h = Relu (z) o = Neg (h) [two] y = Gemm (h, W2)", "'h' is also read by Neg Neg#2"),
        ("h = Relu (z) f = Flatten (h) [o] p = Neg (f) [two] y = Gemm (f, W2)", "'f' is also read by Neg o"),
        ("h = Relu (z) [o] n = Reshape (W3, h) [two] y = Gemm (h, W2)", "'h' is also read by Reshape o"),
        ("h = Relu (z) s = Shape (h) [two] y = Gemm (h, W2)", None),
        ("h = Relu (z) [two] y = Gemm <transA = 1> (h, W2)", "layer two: it transposes its input (transA=1)"),
        ("h = Relu (z) [two] y = Gemm (h, W2, h)", "'h' is also read by Gemm two"),
        ("h = Relu (z) f = Flatten (h) [two] y = Gemm (h, W2, f)", "'f' is also read by Gemm two"),
    ],
)
def test_a_reader_that_cannot_take_a_factor_hinders_by_name(nodes: str, refusal: str | None) -> None:
    proto = build(
        f"g (float[N, 6] x) => (float[N, 8] y) {{ [one] z = Gemm (x, W1) {nodes} }}",
        {"W1": random(6, 8), "W2": random(8, 8), "W3": random(1)},
    )
    assert refusals(proto) == [refusal]


def test_an_activation_that_is_an_output_hinders() -> None:
    proto = dense("h = Relu (z)")
    proto.graph.output.append(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 8]))
    assert refusals(proto) == ["'h' is an output of the model"]


def test_an_activation_that_is_an_output_behind_a_rearrangement_hinders() -> None:
    proto = dense("r = Relu (z) h = Flatten (r)")
    proto.graph.output.append(helper.make_tensor_value_info("h", onnx.TensorProto.FLOAT, ["N", 8]))
    assert found(proto) == [neurons("r", 8, "one", "two", "'h' is an output of the model")]


def test_an_activation_that_a_branch_reads_hinders() -> None:
    proto = build(
        """g (float[N, 6] x, bool c) => (float[N, 4] y) {
            [one] z = Gemm (x, W1)
            h = Relu (z)
            [two] a = Gemm (h, W2)
            [choice] b = If (c) <
                then_branch = then () => (float[N, 4] t) { t = MatMul (h, W3) },
                else_branch = else () => (float[N, 4] e) { e = MatMul (h, W3) }
            >
            y = Add (a, b)
        }""",
        {"W1": random(6, 8), "W2": random(8, 4), "W3": random(8, 4)},
    )
    assert refusals(proto) == ["'h' is also read inside choice"]


def test_a_layer_on_the_models_input_has_no_site_in_front() -> None:
    assert sites_of(build("g (float[N, 6] x) => (float[N, 4] y) { y = Gemm (x, W) }", {"W": random(6, 4)})) == []
    proto = build(
        "g (float[N, 2, 3] x) => (float[N, 4] y) { f = Flatten (x) r = Relu (f) y = Gemm (r, W) }", {"W": random(6, 4)}
    )
    assert sites_of(proto) == []


def test_a_layer_whose_output_is_read_at_once_is_a_site() -> None:
    proto = dense("h = Identity (z)")
    assert found(proto) == [neurons("z", 8, "one", "two")]


def test_an_operator_of_another_domain_is_not_looked_through() -> None:
    proto = dense("h = Relu (z)")
    proto.graph.node[1].domain = "com.example"
    assert found(proto) == [neurons("h", 8, "", "two")]
    proto = dense("r = Relu (z) h = Flatten (r)")
    proto.graph.node[2].domain = "com.example"
    assert found(proto) == [neurons("h", 8, "", "two")]


# -- the meaning of a unit -----------------------------------------------------------------------


def assert_only_its_own_units_move(proto: onnx.ModelProto) -> None:
    """Change the weights behind one unit of a layer: nothing but that unit may move at the site it writes."""
    layers = {layer.name: layer for layer in layers_of(proto)}
    x = {"x": random(3, *[d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim[1:]], seed=9)}
    for site in sites_of(proto):
        (writer,) = site.writers
        layer = layers[writer]
        assert layer.bias is None
        weight = layer.weight.storage.read(Source(proto, Path()))
        before = np.moveaxis(run(proto, x, site.tensor)[0], site.axis, 0)
        assert len(before) == site.units
        for unit in (0, site.units - 1):
            change = np.zeros_like(layer.matrix(weight, None))
            change[0, :, unit] = 1
            new = layer.add(change, {layer.weight.name: weight})
            changed = onnx.ModelProto()
            changed.CopyFrom(proto)
            held = next(t for t in changed.graph.initializer if t.name == layer.weight.name)
            held.CopyFrom(onnx.numpy_helper.from_array(new[layer.weight.name], held.name))
            after = np.moveaxis(run(changed, x, site.tensor)[0], site.axis, 0)
            moved = [(a != b).any() for a, b in zip(after, before, strict=True)]
            assert moved == [index == unit for index in range(site.units)]


def test_units_of_the_samples_move_alone(samples: Path, tmp_path: Path) -> None:
    model = save(onnx.load(samples / "mnist-blend-keras/model.onnx"), tmp_path)
    site = sites_of(model.proto)[1]
    layer = next(layer for layer in layers_of(model.proto) if layer.name in site.writers)
    assert layer.bias is not None
    values = {p.name: p.storage.read(Source(model.proto, tmp_path)) for p in (layer.weight, layer.bias)}
    change = np.zeros_like(layer.matrix(values[layer.weight.name], values[layer.bias.name]))
    change[0, -1, 7] = 5
    data = Patch({layer.bias: layer.add(change, values)[layer.bias.name]}).apply(model)
    x = {"input": random(2, 28, 28, 1)}
    before, after = (run(proto, x, site.tensor)[0] for proto in (model.proto, onnx.ModelProto.FromString(data)))
    np.testing.assert_array_equal(np.flatnonzero((before != after).any(axis=(0, 2, 3))), [7])
