"""Places: every message that holds numbers, where the bytes of the file have it, under a label of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import build, random
from onnx import TensorProto, helper, numpy_helper

from onnxcare.graph import wire
from onnxcare.graph.places import find_places, tensors

BRANCH = "b (float[2] c) => (float[2] y) <float[2] W = {1, 2}> { y = Add (c, W) }"


def sparse(name: str) -> onnx.SparseTensorProto:
    return helper.make_sparse_tensor(
        numpy_helper.from_array(random(2), name), numpy_helper.from_array(np.array([1, 5]), ""), [6]
    )


def branch(text: str, prefix: str) -> onnx.GraphProto:
    """Return a branch that writes its own tensors, and reads nothing."""
    graph = onnx.parser.parse_graph(f"{prefix} () => (float[2] out) {{ {text} }}")
    graph.initializer.append(numpy_helper.from_array(random(2), "W"))
    return graph


def everything() -> onnx.ModelProto:
    """A model that holds numbers in every way there is, and things that look like numbers and are none."""
    proto = build(
        "g (float[N, 2] x, bool c) => (float[N, 2] y) "
        "{ k = Constant <value = float[2] {1, 2}> ()  f = Constant <value_floats = [1.5, 2.5]> ()"
        "  i = Constant <value_ints = [1, 2]> ()  one = Constant <value_float = 0.5> ()"
        '  two = Constant <value_int = 0> ()  word = Constant <value_string = "text"> ()'
        "  [classifier] label, s = ai.onnx.ml.LinearClassifier <coefficients = [1.0, 2.0], classlabels_ints = [0, 1],"
        '  post_transform = "NONE"> (x)  t = Transpose <perm = [1, 0]> (x)  e = Elu <alpha = 0.5> (x) }',
        {"W": random(2), "b": random(2)},
    )
    graph = proto.graph
    graph.initializer.append(helper.make_tensor("names", TensorProto.STRING, [2], ["a", "b"]))
    graph.sparse_initializer.append(sparse("S"))
    graph.node.append(helper.make_node("Constant", [], ["sc"], sparse_value=sparse("")))
    inner = branch("out = Identity (W)", "inner")
    outer = branch("k = Constant <value = float[2] {3, 4}> ()", "outer")
    outer.node.append(helper.make_node("If", ["c"], ["out"], "deep", then_branch=inner, else_branch=inner))
    graph.node.append(helper.make_node("If", ["c"], ["z"], "If_3", then_branch=outer, else_branch=inner))
    many = helper.make_node("Odd", [], ["odd"], domain="com.acme")
    many.attribute.append(helper.make_attribute("lists", [numpy_helper.from_array(random(1)) for _ in range(2)]))
    many.attribute.append(helper.make_attribute("bodies", [inner, inner]))
    many.attribute.append(helper.make_attribute("places", [sparse("q")]))
    graph.node.append(many)
    body = [
        helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(random(2))),
        helper.make_node("Constant", [], ["v"]),
        helper.make_node("Mul", ["a", "w"], ["r"]),
    ]
    body[1].attribute.add(name="value_floats", ref_attr_name="v", type=onnx.AttributeProto.FLOATS)
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("com.acme", "scale", ["a"], ["r"], body, imports, attributes=["v"])
    function.attribute_proto.append(helper.make_attribute("gain", numpy_helper.from_array(random(1))))
    proto.functions.append(function)
    # Nothing that answers reads what a training uses.
    proto.training_info.add().initialization.initializer.append(numpy_helper.from_array(random(3), "T"))
    return proto


LABELS = [
    "W",
    "b",
    "S.values",
    "S.indices",
    "Constant k",
    "Constant f",
    "Constant i",
    "Constant one",
    "Constant two",
    "classifier.classlabels_ints",
    "classifier.coefficients",
    "Constant sc.values",
    "Constant sc.indices",
    "If_3/then_branch/W",
    "If_3/then_branch/Constant k",
    "If_3/then_branch/deep/then_branch/W",
    "If_3/then_branch/deep/else_branch/W",
    "If_3/else_branch/W",
    "odd.lists[0]",
    "odd.lists[1]",
    "odd/bodies[0]/W",
    "odd/bodies[1]/W",
    "odd.places[0].values",
    "odd.places[0].indices",
    "function com.acme.scale.gain",
    "function com.acme.scale/Constant w",
]


def content(data: bytes, path: wire.Path) -> bytes:
    """Follow a path through the bytes, field by field."""
    for number, occurrence in path:
        data = [data[c:e] for n, _, c, e in wire.fields(data, 0, len(data)) if n == number][occurrence]
    return data


def test_every_place_has_a_label_that_says_where_it_is() -> None:
    assert sorted(place.label for place in find_places(everything())) == sorted(LABELS)


def test_paths_lead_to_the_messages_in_the_bytes() -> None:
    proto = everything()
    data = proto.SerializeToString()
    for place in find_places(proto):
        assert type(place.message).FromString(content(data, place.path)) == place.message, place.label


def walked(message: object) -> Iterator[TensorProto]:
    """Yield every tensor below a message, by reflection."""
    if isinstance(message, TensorProto):
        yield message
        return
    for field, value in message.ListFields():
        if field.message_type is not None and field.name != "training_info":
            for item in value if isinstance(value, list) or hasattr(value, "add") else [value]:
                yield from walked(item)


def test_no_tensor_is_overlooked() -> None:
    proto = everything()
    found = tensors(proto)
    expected = list(walked(proto))
    assert len(found) == len(expected) == 21
    assert sorted(t.SerializeToString() for t in found) == sorted(t.SerializeToString() for t in expected)


@pytest.mark.parametrize(
    ("label", "values"),
    [
        ("Constant k", np.float32([1, 2])),
        ("Constant f", np.float32([1.5, 2.5])),
        ("Constant i", np.int64([1, 2])),
        ("Constant one", np.float32(0.5)),
        ("Constant two", np.int64(0)),
        ("classifier.coefficients", np.float32([1, 2])),
        ("If_3/then_branch/Constant k", np.float32([3, 4])),
        ("S.indices", np.int64([1, 5])),
    ],
)
def test_values(label: str, values: np.ndarray, tmp_path: Path) -> None:
    (place,) = (place for place in find_places(everything()) if place.label == label)
    found = place.values(tmp_path)
    np.testing.assert_array_equal(found, values)
    assert found.dtype == helper.tensor_dtype_to_np_dtype(place.data_type) == np.asarray(values).dtype
    assert found.shape == place.shape == values.shape


def test_names_that_stand_twice_are_told_apart() -> None:
    proto = build("g (float[2] x) => (float[2] y) { y = Identity (x) }")
    for name in ("W", "W#2", "W", "W", ""):
        proto.graph.initializer.append(numpy_helper.from_array(random(1), name))
    assert [place.label for place in find_places(proto)] == ["W", "W#2", "W#3", "W#4", ""]


def test_external_values_are_read_and_not_kept(tmp_path: Path) -> None:
    values = random(3)
    (tmp_path / "w.bin").write_bytes(b"1234" + values.tobytes())
    proto = build("g (float[3] x) => (float[3] y) { y = Add (x, W) }", {"W": values})
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "4"), ("length", "12")):
        tensor.external_data.add(key=key, value=value)
    before = proto.SerializeToString()
    (place,) = find_places(proto)
    assert place.external
    np.testing.assert_array_equal(place.values(tmp_path), values)
    assert proto.SerializeToString() == before
