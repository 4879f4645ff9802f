"""Compare two model files without a line of onnxcare: as protobuf reads them, and field by field on the wire."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np
import onnx
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import Message
from google.protobuf.unknown_fields import UnknownFieldSet
from onnx import numpy_helper

Array = np.ndarray
Path = tuple[tuple[int, int], ...]

_VARINT, _LENGTH = 0, 2
_WIDTHS = {1: 8, 5: 4}
_VALUES = (
    "raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data", "string_data", "external_data",
    "data_location",
)  # fmt: skip


@dataclass(frozen=True)
class Held:
    """A tensor of numbers with a fraction, and the field numbers and positions that lead to it."""

    path: Path
    tensor: onnx.TensorProto


def float_tensors(proto: onnx.ModelProto) -> list[Held]:
    """Return every such tensor that has values: in attributes, branches, functions and sparse tensors too."""
    return [held for held in _tensors(proto, ()) if _has_fractions(held.tensor) and 0 not in held.tensor.dims]


def _tensors(message: Message, path: Path) -> Iterator[Held]:
    if isinstance(message, onnx.TensorProto):
        yield Held(path, message)
        return
    for descriptor, value in message.ListFields():
        if descriptor.message_type is not None:
            parts = value if descriptor.is_repeated else [value]
            for position, part in enumerate(parts):
                yield from _tensors(part, (*path, (descriptor.number, position)))


def _has_fractions(tensor: onnx.TensorProto) -> bool:
    name = onnx.TensorProto.DataType.Name(tensor.data_type)
    return name.startswith(("FLOAT", "BFLOAT", "DOUBLE"))


def fields(data: bytes) -> list[tuple[int, int, Any]]:
    """Return (number, wire type, value) of every field in file order, read as a message of which nothing is known."""
    found = [(item.field_number, item.wire_type, item.data) for item in UnknownFieldSet(Empty.FromString(data))]
    # Written again they are the same bytes, so that two files with the same fields are the same.
    assert b"".join(_encoded(*item) for item in found) == data
    return found


def _encoded(number: int, kind: int, value: Any) -> bytes:
    tag = _varint(number << 3 | kind)
    if kind == _LENGTH:
        return tag + _varint(len(value)) + value
    return tag + (_varint(value) if kind == _VARINT else value.to_bytes(_WIDTHS[kind], "little"))


def _varint(value: int) -> bytes:
    groups = [value >> shift & 0x7F for shift in range(0, max(1, value.bit_length()), 7)]
    return bytes([*(group | 0x80 for group in groups[:-1]), groups[-1]])


def around(before: bytes, after: bytes, path: Path) -> tuple[bytes, bytes]:
    """Check that two files are the same but for the message at `path`, and lengths of what encloses it; return both."""
    for number, position in path:
        old, new = fields(before), fields(after)
        at = [index for index, item in enumerate(old) if item[:2] == (number, _LENGTH)][position]
        assert old[:at] == new[:at] and old[at + 1 :] == new[at + 1 :], f"something beside {path} differs"
        assert old[at][:2] == new[at][:2]
        before, after = old[at][2], new[at][2]
    return before, after


def differing(before: bytes, after: bytes, folder: FilePath) -> list[int]:
    """Check that two serialized tensors are the same but for their values; return the flat positions that differ."""
    old, new = onnx.TensorProto.FromString(before), onnx.TensorProto.FromString(after)
    values = [numpy_helper.to_array(onnx.TensorProto.FromString(data), str(folder)) for data in (before, after)]
    for tensor in (old, new):
        for name in _VALUES:
            tensor.ClearField(name)
    assert old.SerializeToString() == new.SerializeToString()
    bits = [np.frombuffer(np.ascontiguousarray(v).tobytes(), np.uint8).reshape(v.size, -1) for v in values]
    return np.flatnonzero((bits[0] != bits[1]).any(axis=1)).tolist()


def differing_numbers(before: bytes, after: bytes) -> list[int]:
    """Check that two serialized attributes are the same but for their numbers; return the positions that differ."""
    old, new = onnx.AttributeProto.FromString(before), onnx.AttributeProto.FromString(after)
    values = [np.array(attribute.floats, np.float32).view(np.uint32) for attribute in (old, new)]
    del old.floats[:], new.floats[:]
    assert old.SerializeToString() == new.SerializeToString()
    return np.flatnonzero(values[0] != values[1]).tolist()


def without(proto: onnx.ModelProto, path: Path) -> bytes:
    """Return a model, serialized, with the message at `path` emptied."""
    copy = onnx.ModelProto.FromString(proto.SerializeToString())
    message: Message = copy
    for number, position in path:
        descriptor = message.DESCRIPTOR.fields_by_number[number]
        value = getattr(message, descriptor.name)
        message = value[position] if descriptor.is_repeated else value
    message.Clear()
    return copy.SerializeToString(deterministic=True)
