"""How the numbers of a place are written in the file: their bits, and the protobuf field that holds them.

Numbers are handled as bits, unsigned integers of their width, so that nothing is rounded and no NaN loses its payload.
Types that take no whole number of bytes, or more than eight, are handled byte by byte, as they lie in `raw_data`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_tensor, uses_external_data

from onnxcare.graph import wire
from onnxcare.graph.model import value_fields
from onnxcare.graph.places import Place

Array = np.ndarray
Field = Literal[
    "raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "floats", "ints", "f", "i"
]  # fmt: skip

_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_WIDTHS = {
    **dict.fromkeys(["INT8", "UINT8", "BOOL"], 1),
    **dict.fromkeys(["INT16", "UINT16", "FLOAT16", "BFLOAT16"], 2),
    **dict.fromkeys(["INT32", "UINT32", "FLOAT"], 4),
    **dict.fromkeys(["INT64", "UINT64", "DOUBLE"], 8),
}
# What numpy makes of the content of a field.
_FIELDS: dict[str, type] = {
    "float_data": np.float32,
    "double_data": np.float64,
    "int32_data": np.int32,
    "int64_data": np.int64,
    "uint64_data": np.uint64,
    "floats": np.float32,
    "ints": np.int64,
    "f": np.float32,
    "i": np.int64,
}
# Types that int32_data holds with their sign; of all others it holds the bits.
_SIGNED = {"INT8": np.int8, "INT16": np.int16, "INT32": np.int32}
_FIXED32 = 5


def unit(data_type: int) -> type[np.unsignedinteger]:
    """Return the unsigned integer that the bits of one number are handled as, or that of a byte."""
    return _UNSIGNED[_WIDTHS.get(onnx.TensorProto.DataType.Name(data_type), 1)]  # type: ignore[return-value]


def whole(data_type: int) -> bool:
    """Return whether every number of this type is handled by itself, not as bytes."""
    return onnx.TensorProto.DataType.Name(data_type) in _WIDTHS


def read_bits(place: Place, folder: Path) -> Array:
    """Return the bits of the numbers of a place, flat; `folder` is that of the model's file, for external data."""
    message, kind = place.message, unit(place.data_type)
    if isinstance(message, onnx.AttributeProto):
        return np.array(getattr(message, place.field), _FIELDS[place.field]).reshape(-1).view(kind)
    if uses_external_data(message):
        copied = onnx.TensorProto()
        copied.CopyFrom(message)
        load_external_data_for_tensor(copied, str(folder))
        return np.frombuffer(copied.raw_data, kind)
    name = field_of(place)
    if name is None or name == "raw_data":
        return np.frombuffer(message.raw_data, kind)
    values: Array = np.array(getattr(message, name), _FIELDS[name])
    # A cast to a narrower integer keeps the bits at the low end.
    return values.view(kind) if name in ("float_data", "double_data") else values.astype(kind)


def field_of(place: Place) -> Field | None:
    """Return the field that holds the numbers; None where there are none, or they lie in another file."""
    if isinstance(place.message, onnx.AttributeProto):
        return place.field  # type: ignore[return-value]
    filled = value_fields(place.message)
    return filled[0] if len(filled) == 1 and filled[0] != "external_data" else None  # type: ignore[return-value]


def number_of(field: Field) -> int:
    """Return the number of a field in its message."""
    message = onnx.AttributeProto if field in ("floats", "ints", "f", "i") else onnx.TensorProto
    return int(message.DESCRIPTOR.fields_by_name[field].number)


def write_field(field: Field, data_type: int, bits: Array) -> bytes:
    """Return the field with these numbers as protobuf writes it: its key, its length where it has one, its content."""
    if field in ("raw_data", "float_data", "double_data"):
        return wire.embed(number_of(field), bits.tobytes())
    if field in ("f", "floats"):
        # Not packed: every number has a key of its own.
        items = np.empty(len(bits), [("key", np.uint8), ("bits", "<u4")])
        items["key"], items["bits"] = number_of(field) << 3 | _FIXED32, bits
        return items.tobytes()
    if field == "i":
        return onnx.AttributeProto(i=int(bits.view(np.int64)[0])).SerializeToString()
    if field == "ints":
        return onnx.AttributeProto(ints=bits.view(np.int64).tolist()).SerializeToString()
    if field == "int64_data":
        return onnx.TensorProto(int64_data=bits.view(np.int64).tolist()).SerializeToString()
    if field == "uint64_data":
        return onnx.TensorProto(uint64_data=bits.tolist()).SerializeToString()
    kind = _SIGNED.get(onnx.TensorProto.DataType.Name(data_type), bits.dtype)
    return onnx.TensorProto(int32_data=bits.view(kind).tolist()).SerializeToString()
