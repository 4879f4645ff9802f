"""Types and shapes as people read them."""

from __future__ import annotations

import re

import onnx

from onnxcare.inspection.base import Shape, Value

# What inference calls a length that it knows nothing of.
_INVENTED = re.compile(r"unk__\d+")
_USUAL = {"float": "float32", "double": "float64"}


def element_type(number: int) -> str:
    """Return the name of an element type, such as `float32`."""
    try:
        name = onnx.TensorProto.DataType.Name(number).lower()
    except ValueError:
        return "unknown"
    return "unknown" if name == "undefined" else _USUAL.get(name, name)


def type_name(declared: onnx.TypeProto) -> str:
    """Return a declared type in words, shapes left out."""
    which = declared.WhichOneof("value")
    if which == "tensor_type":
        return element_type(declared.tensor_type.elem_type)
    if which == "sparse_tensor_type":
        return f"sparse {element_type(declared.sparse_tensor_type.elem_type)}"
    if which == "sequence_type":
        return f"sequence of {type_name(declared.sequence_type.elem_type)}"
    if which == "optional_type":
        return f"optional {type_name(declared.optional_type.elem_type)}"
    if which == "map_type":
        return f"map of {element_type(declared.map_type.key_type)} to {type_name(declared.map_type.value_type)}"
    return "unknown"


def declared_value(info: onnx.ValueInfoProto) -> Value:
    """Return what a declaration says about a name."""
    return Value(info.name, type_name(info.type), _shape(info.type))


def declared_values(graph: onnx.GraphProto) -> dict[str, Value]:
    """Return what a graph declares about its tensors, by name."""
    return {info.name: declared_value(info) for info in [*graph.value_info, *graph.input, *graph.output]}


def _shape(declared: onnx.TypeProto) -> Shape | None:
    which = declared.WhichOneof("value")
    if which not in ("tensor_type", "sparse_tensor_type"):
        return None
    kind = getattr(declared, which)
    return tuple(_length(dim) for dim in kind.shape.dim) if kind.HasField("shape") else None


def _length(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return None if _INVENTED.fullmatch(dim.dim_param) else dim.dim_param or None
