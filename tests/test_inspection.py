"""What `inspect` finds in a file: every number counts once, whoever holds it, and nothing keeps it from an answer."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import jsonschema
import numpy as np
import onnx
import onnx.parser
import pytest
from google.protobuf.descriptor import FieldDescriptor
from graph.models import SUBJECTS, build, random, save
from onnx import TensorProto, helper, numpy_helper

from onnxcare.graph.model import load_model
from onnxcare.inspection import Inspection, LayerInfo, inspect_model
from onnxcare.report.json import render_inspection

Array = np.ndarray


def inspected(proto: onnx.ModelProto, folder: Path) -> Inspection:
    return inspect_model(save(proto, folder))


def row(found: Inspection, name: str) -> LayerInfo:
    (one,) = [layer for layer in found.layers if layer.name == name]
    return one


# -- an oracle: every number of a file, by protobuf's own reflection ---------------------------------


def stored_numbers(message: object, domain: str = "", operator: str = "") -> int:
    """Return how many numbers a message and all in it store, whatever the message is."""
    if isinstance(message, onnx.TensorProto):
        return 0 if message.data_type == TensorProto.STRING else int(np.prod(message.dims, dtype=np.int64))
    if isinstance(message, onnx.SparseTensorProto):
        return stored_numbers(message.values)  # where they stand is no number of its own
    if isinstance(message, onnx.NodeProto):
        domain, operator = message.domain, message.op_type
    count = 0
    if isinstance(message, onnx.AttributeProto) and (domain == "ai.onnx.ml" or operator == "Constant"):
        count += len(message.floats) + len(message.ints)
        count += message.name in ("value_float", "value_int")
    for field, value in message.ListFields():
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            # Message fields of protobuf are repeated or not; both are gone through.
            for item in value if hasattr(value, "__len__") else [value]:
                count += stored_numbers(item, domain, operator)
    return count


NESTED = """<ir_version: 10, opset_import: ["": 17, "my": 1]>
nested (float[N, 4] x, seq(float[N]) s) => (float[N, 3] y, seq(float[N]) t)
<float[4, 4] W = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4, 3] V = {1,2,3, 4,5,6, 7,8,9, 1,2,3},
 int64 n = {3}, bool c = {1}, string[2] unused = {"a", "b"}> {
    a = my.Double (x)
    b = MatMul (a, W)
    [loop] l = Loop (n, c, b) <body = body (int64 i, bool cc, float[N, 4] q) => (bool co, float[N, 4] r) {
        co = Identity (cc)
        k = Constant <value = float[4, 4] {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}> ()
        [within] p = MatMul (q, k)
        [choice] r = If (cc) <
            then_branch = yes () => (float[N, 4] u) { [tied] u = MatMul (p, W) },
            else_branch = no () => (float[N, 4] v) { v = Relu (p) }>
    }>
    [last] y = MatMul (l, V)
    t = Identity (s)
}
<domain: "my", opset_import: ["": 17]>
Double (X) => (Y) {
    two = Constant <value = float[4, 4] {2,0,0,0, 0,2,0,0, 0,0,2,0, 0,0,0,2}> ()
    [twice] Y = MatMul (X, two)
}
"""


def nested() -> onnx.ModelProto:
    return onnx.parser.parse_model(NESTED)


def constants_of_all_sorts() -> onnx.ModelProto:
    """Sparse weights, numbers of Constant nodes without a tensor, a stored shape, and a weight that nothing reads."""
    proto = build(
        """sorts (float[N, 4] x) => (float[N, 4] y) {
            one = Constant <value_float = 1.5> ()
            some = Constant <value_floats = [1.0, 2.0, 3.0, 4.0]> ()
            shape = Constant <value_ints = [-1, 4]> ()
            a = Mul (x, one)
            b = Add (a, some)
            c = Reshape (b, shape)
            y = MatMul (c, W)
        }""",
        {"unread": random(5, 2)},
    )
    values = helper.make_tensor("W", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0])
    indices = helper.make_tensor("at", TensorProto.INT64, [3], [0, 5, 10])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4, 4]))
    return proto


def quantised() -> onnx.ModelProto:
    return build(
        """quantised (float[N, 3, 8, 8] x) => (float[N, 4] y) {
            [in] q = QuantizeLinear (x, sx, zx)
            [conv] c = QLinearConv (q, sx, zx, W, sw, zw, sy, zx, B)
            [out] f = DequantizeLinear (c, sy, zx)
            [pool] g = GlobalAveragePool (f)
            [flat] h = Flatten (g)
            [weights] v = DequantizeLinear (V, sv, zv)
            [dense] y = Gemm <transB = 1> (h, v, b)
        }""",
        {
            "sx": np.float32(0.1),
            "zx": np.uint8(128),
            "sw": np.float32(0.01),
            "zw": np.int8(0),
            "sy": np.float32(0.1),
            "W": np.ones((6, 3, 3, 3), np.int8),
            "B": np.ones(6, np.int32),
            "V": np.ones((4, 6), np.int8),
            "sv": np.float32(0.01),
            "zv": np.int8(0),
            "b": random(4),
        },
    )


def trees() -> onnx.ModelProto:
    return build(
        """trees (float[N, 2] x) => (float[N, 1] y) {
            [forest] y = ai.onnx.ml.TreeEnsembleRegressor <n_targets = 1, nodes_treeids = [0, 0, 0],
                nodes_nodeids = [0, 1, 2], nodes_featureids = [0, 0, 0], nodes_modes = ["BRANCH_LEQ", "LEAF", "LEAF"],
                nodes_values = [0.5, 0.0, 0.0], nodes_truenodeids = [1, 0, 0], nodes_falsenodeids = [2, 0, 0],
                nodes_missing_value_tracks_true = [0, 0, 0], nodes_hitrates = [1.0, 1.0, 1.0],
                target_treeids = [0, 0], target_nodeids = [1, 2], target_ids = [0, 0], target_weights = [1.0, 2.0]> (x)
        }"""
    )


WHOLE = {
    **{name: lambda make=make: make().proto for name, make in SUBJECTS.items()},
    "nested": nested,
    "sorts": constants_of_all_sorts,
    "quantised": quantised,
    "trees": trees,
}


@pytest.mark.parametrize("name", WHOLE)
def test_every_number_counts_once(tmp_path: Path, name: str) -> None:
    proto = WHOLE[name]()
    found = inspected(proto, tmp_path)
    assert found.numbers == stored_numbers(proto)
    assert sum(item.weights + item.biases for item in found.layers) + found.other == found.numbers
    for item in found.layers:
        here = [held for held in item.constants if held.counted_at is None]
        assert sum(held.numbers for held in here) == item.weights + item.biases


def test_every_number_of_the_samples_counts_once(samples: Path) -> None:
    for file in ("mnist-four-sklearn/model.onnx", "census-keras/model.onnx", "mnist-square-pytorch/model-dynamo.onnx"):
        found = inspect_model(load_model(samples / file))
        assert found.numbers == stored_numbers(onnx.load(samples / file))
        assert sum(item.weights + item.biases for item in found.layers) + found.other == found.numbers


def test_nodes_inside_others_and_functions_count_for_themselves(tmp_path: Path) -> None:
    found = inspected(nested(), tmp_path)
    told = {item.name: (item.inside, item.weights, item.layer) for item in found.layers}
    assert told == {
        "twice__1": ((), 16, True),  # where the function is called
        "MatMul#1": ((), 16, True),
        "within": (("loop",), 16, False),
        "tied": (("loop", "choice"), 0, False),
        "last": ((), 12, True),
    }
    assert [item.name for item in found.layers][:2] == ["twice__1", "MatMul#1"]
    (tied,) = row(found, "tied").constants
    assert (tied.name, tied.numbers, tied.counted_at) == ("W", 16, "MatMul#1")
    assert found.other == 2  # how often the loop runs, and whether at all; strings are no numbers
    assert set(row(found, "tied").methods.values()) == {"it lies inside choice"}
    assert row(found, "within").input.shape == ("N", 4)


def test_nodes_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    proto = build(
        """twins (float[N, 4] x, bool c) => (float[N, 4] y) {
            a = MatMul (x, W)
            y = If (c) <
                then_branch = yes () => (float[N, 4] u) { u = MatMul (a, W) },
                else_branch = no () => (float[N, 4] v) { v = MatMul (a, V) }>
        }""",
        {"W": random(4, 4), "V": random(4, 4)},
    )
    assert [(item.name, item.weights) for item in inspected(proto, tmp_path).layers] == [
        ("MatMul#0", 16), ("MatMul#0", 0), ("MatMul#0", 16)
    ]  # fmt: skip


# What a node holds: its inputs behind x, the weights, and how many of them are weights and biases.
HOLDERS: dict[str, tuple[str, dict[str, Array], str, tuple[int, int]]] = {
    "batch normalisation": (
        "y = BatchNormalization (x, s, b, m, v)",
        {"s": random(4), "b": random(4), "m": random(4), "v": np.ones(4, np.float32)},
        "float[N, 4, 6]",
        (12, 4),
    ),
    "layer normalisation": (
        "y = LayerNormalization (x, s, b)",
        {"s": random(6), "b": random(6)},
        "float[N, 4, 6]",
        (6, 6),
    ),
    "instance normalisation": (
        "y = InstanceNormalization (x, s, b)",
        {"s": random(4), "b": random(4)},
        "float[N, 4, 6]",
        (4, 4),
    ),
    "lookup": ("y = Gather (E, x)", {"E": random(10, 3)}, "int64[N]", (30, 0)),
    "lstm": (
        "y = LSTM <hidden_size = 5> (x, W, R, B)",
        {"W": random(1, 20, 6), "R": random(1, 20, 5), "B": random(1, 40)},
        "float[4, N, 6]",
        (220, 40),
    ),
    "gru": (
        "y = GRU <hidden_size = 5> (x, W, R)",
        {"W": random(1, 15, 6), "R": random(1, 15, 5)},
        "float[4, N, 6]",
        (165, 0),
    ),
    "transposed convolution": (
        "y = ConvTranspose (x, W, B)",
        {"W": random(4, 3, 2), "B": random(3)},
        "float[N, 4, 6]",
        (24, 3),
    ),
    "slopes": ("y = PRelu (x, s)", {"s": random(4, 1)}, "float[N, 4, 6]", (4, 0)),
    "positions": ("y = Add (x, p)", {"p": random(1, 4, 6)}, "float[N, 4, 6]", (24, 0)),
    "whole products": (
        "y = MatMulInteger (x, W, zx, zw)",
        {"W": np.ones((6, 3), np.int8), "zx": np.uint8(3), "zw": np.int8(0)},
        "uint8[N, 6]",
        (20, 0),
    ),
    "two products": (
        'v = Transpose <perm = [1, 0]> (W) y = Einsum <equation = "ni,io->no"> (x, v)',
        {"W": random(3, 6)},
        "float[N, 6]",
        (18, 0),
    ),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_weights_and_biases_of_what_is_no_layer(tmp_path: Path, name: str) -> None:
    nodes, weights, kind, expected = HOLDERS[name]
    found = inspected(build(f"held ({kind} x) => (y) {{ {nodes} }}", weights), tmp_path)
    (only,) = found.layers
    assert not only.layer and (only.weights, only.biases) == expected
    assert found.other == 0
    for method in ("care", "ai-lancet-flip", "ai-lancet-finetune", "clp"):
        assert only.methods[method] == f"a node of {only.operator} is no layer"


def test_what_only_shows_inside_a_function_has_its_numbers_there(tmp_path: Path) -> None:
    """A function that is called by nobody whose nodes are layers keeps its numbers to itself."""
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "my": 1]>
        called (float[N, 4] x) => (float[N, 4] y) { [call] y = my.Shift (x) }
        <domain: "my", opset_import: ["": 17]>
        Shift (X) => (Y) {
            by = Constant <value = float[4] {1, 2, 3, 4}> ()
            [add] Y = Add (X, by)
        }"""
    )
    found = inspected(proto, tmp_path)
    (only,) = found.layers
    assert (only.name, only.inside, only.weights) == ("add", ("function Shift",), 4)
    assert set(only.methods.values()) == {"it lies inside function Shift"}


def test_nodes_without_a_name_are_told_apart_once_functions_are_inlined(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(NESTED.replace("[twice] ", ""))
    names = [item.name for item in inspected(proto, tmp_path).layers]
    assert len(names) == len(set(names)) == 5 and "MatMul#1" in names


def test_a_linear_model_is_a_layer_that_holds_its_weights_itself(tmp_path: Path) -> None:
    model = "ai.onnx.ml.LinearRegressor <coefficients = [1.0, 2.0, 3.0], intercepts = [4.0], targets = 1>"
    (only,) = inspected(build(f"linear (float[N, 3] x) => (float[N, 1] y) {{ [it] y = {model} (x) }}"), tmp_path).layers
    assert (only.name, only.operator) == ("it", "ai.onnx.ml.LinearRegressor")
    assert only.layer and (only.weights, only.biases) == (3, 1) and only.methods["auto"] is None


def test_what_says_how_to_go_about_it_is_no_weight(tmp_path: Path) -> None:
    proto = build(
        """resized (float[N, 2, 4, 4] x) => (float[N, 2, 8, 8] y) {
            [up] r = Resize <mode = "nearest"> (x, , scales)
            [clip] y = Clip (r, low, high)
        }""",
        {"scales": np.array([1, 1, 2, 2], np.float32), "low": np.float32(0), "high": np.float32(6)},
    )
    found = inspected(proto, tmp_path)
    assert found.layers == () and found.other == found.numbers == 6


def test_quantised_weights_belong_to_what_computes_with_them(tmp_path: Path) -> None:
    found = inspected(quantised(), tmp_path)
    assert found.file.quantised == {"DequantizeLinear": 2, "QuantizeLinear": 1, "QLinearConv": 1}
    conv, dense = found.layers
    assert (conv.name, conv.operator, conv.biases) == ("conv", "QLinearConv", 6)
    # Its own scales and zero points, five of them, count with it: nothing in front of it counts as holding weights.
    assert conv.weights == 6 * 3 * 9 + 5
    assert [(held.role, held.numbers) for held in dense.constants] == [
        ("W", 24), ("W x_scale", 1), ("W x_zero_point", 1), ("B", 4)
    ]  # fmt: skip
    assert inspected(SUBJECTS["mlp"]().proto, tmp_path).file.quantised == {}


# -- shapes ------------------------------------------------------------------------------------------


def test_shapes_are_inferred_and_symbolic_ones_stay(tmp_path: Path) -> None:
    found = inspected(SUBJECTS["residual"]().proto, tmp_path)
    assert [(item.input.shape, item.output.shape) for item in found.layers if item.operator == "Conv"] == [
        (("N", 2, 6, 6), ("N", 4, 6, 6)),
        (("N", 4, 6, 6), ("N", 3, 6, 6)),
        (("N", 3, 6, 6), ("N", 4, 6, 6)),
        (("N", 4, 6, 6), ("N", 6, 3, 3)),
    ]
    assert {site.tensor: site.shape for site in found.sites}["g"] == ("N", 6, 1, 1)
    assert found.inputs[0].shape == ("N", 2, 6, 6) and found.outputs[0].shape == ("N", 5)


def test_lengths_that_inference_invents_are_not_known(tmp_path: Path) -> None:
    proto = build(
        """unknown (float[N, 6] x, int64[2] target) => (float[A, 3] y) {
            [turn] r = Reshape (x, target)
            [dense] y = MatMul (r, W)
        }""",
        {"W": random(6, 3)},
    )
    assert row(inspected(proto, tmp_path), "dense").input.shape == (None, None)


def test_a_bias_in_an_add_of_its_own_belongs_to_its_layer(tmp_path: Path) -> None:
    found = inspected(SUBJECTS["mlp"]().proto, tmp_path)
    assert [(item.name, item.weights, item.biases) for item in found.layers] == [
        ("fc1", 48, 8), ("fc2", 56, 7), ("fc3", 28, 4)
    ]  # fmt: skip
    assert row(found, "fc2").output.name == "z2"
    assert found.other == 0


# -- any model ---------------------------------------------------------------------------------------


def with_odd_names() -> onnx.ModelProto:
    names = ["<b>&\"'", "a\tb\nc", "[red]x[/red]", "\x01\x1b[31m", "ünïcödé", 300 * "x"]
    nodes, before = [], "in"
    for name in names:
        nodes.append(helper.make_node("Relu", [before], [name], name=f"{name} node"))
        before = name
    nodes.append(helper.make_node("MatMul", [before, "W<&>"], ["out"], name="]]>"))
    graph = helper.make_graph(
        nodes,
        "odd",
        [helper.make_tensor_value_info("in", TensorProto.FLOAT, ["N<>", 4])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["N<>", 3])],
        [numpy_helper.from_array(random(4, 3), "W<&>")],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])
    helper.set_model_props(proto, {"a\x00b": "]]>\x1b[31m"})
    return proto


def with_names_that_are_no_text() -> bytes:
    content = with_odd_names().SerializeToString()
    return content.replace("ünï".encode(), b"\xff\xfen\xc3\xaf")


ODD: dict[str, onnx.ModelProto | bytes] = {
    "names": with_odd_names(),
    "no text": with_names_that_are_no_text(),
    "sequences": nested(),
    "maps": build(
        """maps (float[N, 2] x) => (seq(map(int64, float)) y) {
            p = Softmax (x)
            y = ai.onnx.ml.ZipMap <classlabels_int64s = [3, 4]> (p)
        }"""
    ),
    "optional": build("maybe (float[2] x) => (optional(float[2]) y) { y = Optional (x) }"),
    "strings": build(
        """words (string[N] x) => (int64[N] y) {
            y = ai.onnx.ml.LabelEncoder <keys_strings = ["a", "b"], values_int64s = [1, 2]> (x)
        }"""
    ),
    "a string constant": build(
        """words (string[N] x) => (bool[N] y) <string[1] a = {"a"}> { y = Equal (x, a) }""", opset=19
    ),
    "another domain": onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>
        foreign (float[N, 4] x) => (float[N, 3] y) <float[4, 3] W = {1,2,3, 4,5,6, 7,8,9, 1,2,3}> {
            h = com.microsoft.FusedGemm <activation = "Relu"> (x, W)
            y = com.microsoft.Gelu (h)
        }"""
    ),
    "no weights": build("plain (float[N] x) => (float[N] y) { y = Relu (x) }"),
    "constant answer": build("same (float[N] x) => (float[2] y) <float[2] c = {1, 2}> { y = Identity (c) }"),
    "bfloat16": build("half (bfloat16[N] x) => (bfloat16[N] y) { y = Identity (x) }"),
}
SCHEMA = json.loads(resources.files("onnxcare.report").joinpath("inspect.schema.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ODD)
def test_any_model_gets_an_answer_of_the_published_form(tmp_path: Path, name: str) -> None:
    proto = ODD[name]
    path = tmp_path / "model.onnx"
    path.write_bytes(proto if isinstance(proto, bytes) else proto.SerializeToString())
    document = json.loads(render_inspection(inspect_model(load_model(path))))
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    assert document["numbers"]["all"] == sum(document["numbers"][key] for key in ("weights", "biases", "other"))


def test_types_that_are_no_tensors_are_told_in_words(tmp_path: Path) -> None:
    types = {
        name: inspected(ODD[name], tmp_path).outputs[0].type for name in ("maps", "optional", "strings", "bfloat16")
    }
    assert types == {
        "maps": "sequence of map of int64 to float32",
        "optional": "optional float32",
        "strings": "int64",
        "bfloat16": "bfloat16",
    }
    assert inspected(ODD["maps"], tmp_path).outputs[0].shape is None


def test_what_keeps_the_whole_model_from_being_repaired(tmp_path: Path) -> None:
    assert inspected(SUBJECTS["mlp"]().proto, tmp_path).obstacle is None
    assert inspected(ODD["maps"], tmp_path).obstacle is None  # scores of every class
    assert "no output with one score per class" in inspected(ODD["strings"], tmp_path).obstacle
    nothing = build("fed (float[0, 3] x) => (float[0, 2] y) { y = MatMul (x, W) }", {"W": random(3, 2)})
    assert "holds no values" in inspected(nothing, tmp_path).obstacle


def test_the_file_itself(tmp_path: Path) -> None:
    proto = nested()
    proto.producer_name, proto.producer_version = "writer", "3"
    helper.set_model_props(proto, {"who": "me"})
    proto.graph.initializer.append(numpy_helper.from_array(random(64, 64), "outside"))
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="data.bin", size_threshold=1000)
    found = inspect_model(load_model(path))
    assert found.file.bytes == path.stat().st_size
    assert found.file.external == {str(tmp_path / "data.bin"): 64 * 64 * 4}
    assert (found.file.ir_version, found.file.opsets) == (10, {"ai.onnx": 17, "my": 1})
    assert (found.file.producer, found.file.metadata) == ("writer 3", {"who": "me"})
    assert found.file.functions == {"my.Double": 2}
    assert found.nodes == 13 and found.operators["MatMul"] == 5 and found.operators["my.Double"] == 1


def test_external_data_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(SUBJECTS["cnn"]().proto, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    model = load_model(path)
    # Nothing in there can be read any more; how large the file is, still can.
    with (tmp_path / "data.bin").open("r+b") as file:
        file.truncate(0)
    monkeypatch.setattr(numpy_helper, "to_array", lambda *args: pytest.fail("values were looked at"))
    found = inspect_model(model)
    assert found.numbers == stored_numbers(model.proto) and found.layers[-1].output.shape == ("N", 5)
