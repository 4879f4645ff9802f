"""Splicing serialized messages, against protobuf's own reading and an encoder written for these tests."""

from __future__ import annotations

import onnx
import pytest
from graph import models
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcare.graph import wire

GRAPH, INITIALIZER, NODE, METADATA = 7, 5, 1, 14

repeatable = settings(deadline=None, derandomize=True)

# A message is a list of (field number, value): int for a varint, bytes for text, ("fixed", bytes) for a number of
# 4 or 8 bytes, a list for a message inside.


def varint(value: int, padding: int = 0) -> bytes:
    """Encode a varint; padding adds needless continuation bytes, which readers accept."""
    out = []
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    for _ in range(padding):
        out[-1] |= 0x80
        out.append(0)
    return bytes(out)


def encode(message: list, padding: int = 0) -> bytes:
    out = b""
    for number, value in message:
        if isinstance(value, int):
            out += varint(number << 3) + varint(value, padding)
        elif isinstance(value, tuple):
            out += varint(number << 3 | (5 if len(value[1]) == 4 else 1)) + value[1]
        else:
            content = encode(value, padding) if isinstance(value, list) else value
            out += varint(number << 3 | 2) + varint(len(content), padding) + content
    return out


def paths_of(message: list, prefix: wire.Path = ()) -> list[wire.Path]:
    """Return the path of every length-delimited field, outer ones first."""
    found, seen = [], {}
    for number, value in message:
        if isinstance(value, (bytes, list)):
            path = (*prefix, (number, seen.get(number, 0)))
            seen[number] = seen.get(number, 0) + 1
            found.append(path)
            if isinstance(value, list):
                found += paths_of(value, path)
    return found


def replaced(message: list, edits: dict[wire.Path, bytes], prefix: wire.Path = ()) -> list:
    """Do in the tree what splice does in the bytes."""
    out, seen = [], {}
    for number, value in message:
        if isinstance(value, (bytes, list)):
            path = (*prefix, (number, seen.get(number, 0)))
            seen[number] = seen.get(number, 0) + 1
            if path in edits:
                value = edits[path]
            elif isinstance(value, list):
                value = replaced(value, edits, path)
        out.append((number, value))
    return out


numbers = st.sampled_from([1, 2, 5, 7, 15, 16, 2000])
scalars = st.one_of(
    st.integers(0, 2**64 - 1),
    st.tuples(st.just("fixed"), st.one_of(st.binary(min_size=4, max_size=4), st.binary(min_size=8, max_size=8))),
    st.binary(max_size=200),
)
messages = st.recursive(
    st.lists(st.tuples(numbers, scalars), max_size=5),
    lambda inner: st.lists(st.tuples(numbers, st.one_of(scalars, inner)), max_size=5),
    max_leaves=20,
)


@repeatable
@given(messages, st.data())
def test_splice_replaces_what_is_named_and_nothing_else(message: list, data: st.DataObject) -> None:
    paths = paths_of(message)
    chosen = data.draw(st.lists(st.sampled_from(paths), unique=True, max_size=4)) if paths else []
    # An edit inside a replaced message would have nowhere to go.
    outer = [p for p in chosen if not any(p != q and p[: len(q)] == q for q in chosen)]
    edits = {path: data.draw(st.binary(max_size=300)) for path in outer}
    assert wire.splice(encode(message), edits) == encode(replaced(message, edits))


@repeatable
@given(messages, st.integers(0, 3))
def test_a_splice_of_nothing_is_the_same_bytes(message: list, padding: int) -> None:
    data = encode(message, padding)
    assert wire.splice(data, {}) == data


@repeatable
@given(messages, st.integers(0, 3), st.data())
def test_writing_the_old_content_back_gives_the_same_bytes(message: list, padding: int, data: st.DataObject) -> None:
    paths = [path for path in paths_of(message) if len(path) == 1]
    if not paths:
        return
    path = data.draw(st.sampled_from(paths))
    whole = encode(message, padding)
    assert wire.splice(whole, {path: content_at(whole, path)}) == whole


def content_at(data: bytes, path: wire.Path) -> bytes:
    for number, occurrence in path:
        held = [data[c:e] for n, b, c, e in wire.fields(data, 0, len(data)) if n == number and data[b] & 7 == 2]
        data = held[occurrence]
    return data


@repeatable
@given(st.integers(0, 2**64 - 1), st.integers(0, 3))
def test_varints_read_back(value: int, padding: int) -> None:
    assert wire.write_varint(value) == varint(value)
    padded = varint(value, padding)
    assert wire.read_varint(b"\xff" + padded + b"\x01", 1) == (value, 1 + len(padded))


@repeatable
@given(messages)
def test_fields_cover_the_message_without_gaps(message: list) -> None:
    data = encode(message)
    found = list(wire.fields(data, 0, len(data)))
    assert [number for number, *_ in found] == [number for number, _ in message]
    starts = [begin for _, begin, _, _ in found] + [len(data)]
    assert [end for *_, end in found] == starts[1:]
    assert starts[0] == 0


# -- models --------------------------------------------------------------------------------------


def test_a_spliced_model_is_what_protobuf_would_have_written() -> None:
    proto = models.cnn().proto
    data = proto.SerializeToString(deterministic=True)
    edits = {}
    for index in (0, 3):
        tensor = proto.graph.initializer[index]
        tensor.raw_data = bytes(len(tensor.raw_data))
        edits[((GRAPH, 0), (INITIALIZER, index))] = tensor.SerializeToString(deterministic=True)
    node = proto.graph.node[1]
    node.doc_string = "longer than before"
    edits[((GRAPH, 0), (NODE, 1))] = node.SerializeToString(deterministic=True)
    assert wire.splice(data, edits) == proto.SerializeToString(deterministic=True)


def test_a_path_into_a_constant_node_reaches_its_tensor() -> None:
    proto = models.build("g (float[N] x) => (float[N] y) { c = Constant <value = float[1] {2}> () y = Mul (x, c) }")
    tensor = onnx.numpy_helper.from_array(models.random(3))
    path = ((GRAPH, 0), (NODE, 0), (5, 0), (5, 0))
    spliced = onnx.ModelProto.FromString(wire.splice(proto.SerializeToString(), {path: tensor.SerializeToString()}))
    assert spliced.graph.node[0].attribute[0].t == tensor


def test_unknown_fields_and_an_odd_order_survive() -> None:
    initializers = [onnx.numpy_helper.from_array(models.random(2, seed=i), f"w{i}") for i in range(2)]
    first, second = (tensor.SerializeToString() for tensor in initializers)
    graph = [(INITIALIZER, first), (999, b"from a later format"), (2, b"name"), (INITIALIZER, second), (998, 7)]
    model = [(METADATA, [(1, b"key"), (2, b"value")]), (GRAPH, graph), (777, ("fixed", b"12345678")), (1, 8)]
    new = onnx.numpy_helper.from_array(models.random(5), "w1").SerializeToString()
    spliced = wire.splice(encode(model), {((GRAPH, 0), (INITIALIZER, 1)): new})
    graph[3] = (INITIALIZER, new)
    assert spliced == encode(model)
    read = onnx.ModelProto.FromString(spliced)
    assert [tensor.dims[0] for tensor in read.graph.initializer] == [2, 5]


def test_a_field_of_another_wire_type_does_not_count() -> None:
    # Readers treat a known field number with a foreign wire type as an unknown field.
    tensor = onnx.TensorProto(name="weight", dims=[1], data_type=1, raw_data=b"1234")
    data = encode([(GRAPH, 3), (GRAPH, [(INITIALIZER, 9), (INITIALIZER, tensor.SerializeToString())])])
    assert onnx.ModelProto.FromString(data).graph.initializer[0] == tensor
    new = onnx.TensorProto(name="weight", dims=[1], data_type=1, raw_data=b"5678")
    spliced = wire.splice(data, {((GRAPH, 0), (INITIALIZER, 0)): new.SerializeToString()})
    assert onnx.ModelProto.FromString(spliced).graph.initializer[0] == new
    assert len(spliced) == len(data)


def test_lengths_written_with_spare_bytes_are_kept_where_the_size_stays() -> None:
    # Writers that do not know a size beforehand reserve room for its varint.
    graph = [(INITIALIZER, b"old weight"), (2, b"name")]
    data = encode([(1, 8), (GRAPH, graph)], padding=3)
    path = ((GRAPH, 0), (INITIALIZER, 0))
    spliced = wire.splice(data, {path: b"new weight"})
    assert spliced == data.replace(b"old weight", b"new weight")
    longer = wire.splice(data, {path: b"a longer weight"})
    assert content_at(longer, path) == b"a longer weight"
    assert content_at(longer, ((GRAPH, 0), (2, 0))) == b"name"


@pytest.mark.parametrize(
    "path",
    [
        ((9, 0),),
        ((GRAPH, 1),),
        ((GRAPH, 0), (INITIALIZER, 99)),
        ((GRAPH, 0), (3000, 0)),
        ((GRAPH, 0), (NODE, 0), (5, 0), (5, 0)),
        ((1, 0),),
        ((1, 0), (5, 0)),
    ],
)
def test_a_path_that_leads_nowhere_is_an_error(path: wire.Path) -> None:
    with pytest.raises(KeyError, match="no message at"):
        wire.splice(models.acas().proto.SerializeToString(), {path: b""})


def test_an_edit_inside_a_replaced_message_is_an_error() -> None:
    inner = ((GRAPH, 0), (INITIALIZER, 0))
    with pytest.raises(KeyError, match="no message at"):
        wire.splice(models.acas().proto.SerializeToString(), {inner[:1]: b"", inner: b""})


def test_truncated_bytes_are_an_error_at_every_cut_inside_a_field() -> None:
    data = models.acas().proto.SerializeToString()
    boundaries = {end for *_, end in wire.fields(data, 0, len(data))} | {0}
    for size in range(len(data)):
        if size in boundaries:
            assert wire.splice(data[:size], {}) == data[:size]
            continue
        with pytest.raises((ValueError, IndexError)):
            wire.splice(data[:size], {})


def test_a_message_that_runs_past_its_parent_is_an_error() -> None:
    data = encode([(GRAPH, varint(INITIALIZER << 3 | 2) + varint(50) + b"short"), (2, b"x" * 100)])
    with pytest.raises(ValueError, match="runs past the end"):
        wire.splice(data, {((GRAPH, 0), (INITIALIZER, 0)): b""})


@pytest.mark.parametrize("kind", [3, 4, 6, 7])
def test_wire_types_onnx_never_uses_are_an_error(kind: int) -> None:
    data = encode([(1, 8)]) + varint(3 << 3 | kind) + b"\x00"
    with pytest.raises(ValueError, match=f"wire type {kind} at byte 2"):
        wire.splice(data, {})


# -- entries of a repeated field -----------------------------------------------------------------

entries = st.lists(st.tuples(st.sampled_from([1, 2, METADATA]), st.binary(max_size=20)), max_size=8)


@repeatable
@given(entries, st.lists(st.binary(max_size=20), max_size=3), st.sets(st.integers(0, 7)))
def test_entries_are_dropped_and_added_by_content(message: list, added: list[bytes], dropped_at: set[int]) -> None:
    dropped = {content for index, (_, content) in enumerate(message) if index in dropped_at}
    kept = [(number, content) for number, content in message if number != METADATA or content not in dropped]
    expected = encode([*kept, *((METADATA, content) for content in added)])
    assert wire.replace_entries(encode(message), METADATA, lambda c: c in dropped, added) == expected


def test_an_entry_of_another_wire_type_is_left_alone() -> None:
    data = encode([(METADATA, 3), (METADATA, b"entry")])
    assert wire.replace_entries(data, METADATA, lambda content: True, []) == encode([(METADATA, 3)])


@repeatable
@given(st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=200), max_size=5))
def test_metadata_reads_back_through_protobuf(metadata: dict[str, str]) -> None:
    added = [onnx.StringStringEntryProto(key=k, value=v).SerializeToString() for k, v in metadata.items()]
    data = models.acas().proto.SerializeToString()
    read = onnx.ModelProto.FromString(wire.replace_entries(data, METADATA, lambda content: True, added))
    assert {entry.key: entry.value for entry in read.metadata_props} == metadata
    assert wire.replace_entries(read.SerializeToString(), METADATA, lambda content: True, []) == data
