"""What differs between two model files beside their numbers, in plain words.

Every field of every message is compared, so that nothing is overlooked. Nodes, tensors, functions and the like are
matched by name, so that one that is inserted does not make everything behind it different.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from onnxcare.graph.model import VALUE_FIELDS
from onnxcare.graph.places import plain_field
from onnxcare.graph.view import label

# What an element of a list is called, and what tells it from the others.
_ELEMENTS: dict[str, tuple[str, Callable[[Any], object]]] = {
    "NodeProto": ("node", label),
    "TensorProto": ("tensor", lambda item: item.name),
    "SparseTensorProto": ("sparse tensor", lambda item: item.values.name),
    "ValueInfoProto": ("value", lambda item: item.name),
    "AttributeProto": ("attribute", lambda item: item.name),
    "StringStringEntryProto": ("entry", lambda item: item.key),
    "OperatorSetIdProto": ("operator set", lambda item: item.domain or "ai.onnx"),
    "FunctionProto": ("function", lambda item: ".".join(filter(None, (item.domain, item.name, item.overload)))),
    "TensorAnnotation": ("quantization of", lambda item: item.tensor_name),
}
# Lists that say more about their elements than the type does.
_LISTS = {
    "initializer": "initializer",
    "sparse_initializer": "sparse initializer",
    "input": "input",
    "output": "output",
    "value_info": "declared type of",
    "metadata_props": "metadata",
}
# Messages that need no name of their own in a sentence.
_TRANSPARENT = {"g", "t", "type"}
# The numbers of a tensor, and where they are.
_NUMBERS = frozenset({*VALUE_FIELDS, "external_data", "data_location"})
# Training information is no part of what answers, and may be as large as the model.
_OPAQUE = "training_info"
_GRAPH = "graph"

_words = reprlib.Repr()
_words.maxstring = _words.maxother = 60
_words.maxlist = 8


def other_differences(old: onnx.ModelProto, new: onnx.ModelProto) -> list[str]:
    """Return what differs between two models beside the numbers in their places (see `graph.places`)."""
    return list(_messages(old, new, ""))


def _messages(old: Any, new: Any, where: str, plain: str = "") -> Iterator[str]:
    """Yield how two messages of the same type differ.

    Args:
        old: one message.
        new: the other one.
        where: what they are, in words; nothing for the model itself.
        plain: the field of an attribute that holds numbers.
    """
    if isinstance(old, onnx.TypeProto) and _type_words(old) != _type_words(new):
        yield _said(where, f"{_type_words(old)} -> {_type_words(new)}")
        return
    numbers = _NUMBERS if isinstance(old, onnx.TensorProto) and old.data_type != onnx.TensorProto.STRING else {plain}
    for field in old.DESCRIPTOR.fields:
        name = field.name
        mine, yours = getattr(old, name), getattr(new, name)
        if name in numbers:
            # Only the lists of attributes say by themselves how many numbers there are.
            if name == plain and _repeated(mine) and len(mine) != len(yours):
                yield _said(where, f"{len(mine)} numbers -> {len(yours)}")
        elif name == _OPAQUE:
            if list(mine) != list(yours):
                yield _said(where, f"{name} differs")
        elif field.message_type is None:
            if repr(mine) != repr(yours):  # NaN is not equal to itself
                yield _said(where, f"{name} {_value(field, mine)} -> {_value(field, yours)}")
        elif _repeated(mine):
            yield from _lists(mine, yours, where, field, old)
        elif old.HasField(name) and new.HasField(name):
            yield from _messages(mine, yours, where if name in _TRANSPARENT else _inner(where, name))
        elif old.HasField(name) or new.HasField(name):
            yield _said(where, f"{name} {'removed' if old.HasField(name) else 'added'}")


def _lists(old: Sequence[Any], new: Sequence[Any], where: str, field: FieldDescriptor, owner: Any) -> Iterator[str]:
    """Yield how two lists of messages differ; `owner` is the message that holds the old one."""
    kind = field.message_type.name if field.message_type is not None else ""
    word, key = _ELEMENTS.get(kind, (kind, lambda item: ""))
    word = _LISTS.get(field.name, word)
    mine, yours = _keyed(old, key), _keyed(new, key)
    for name, item in mine.items():
        here = _inner(where, _element(word, name, item))
        if name not in yours:
            yield _said(here, _told("removed", item))
        else:
            weights = isinstance(item, onnx.AttributeProto) and isinstance(owner, onnx.NodeProto)
            yield from _messages(item, yours[name], here, plain_field(owner, item) if weights else "")
    for name, item in yours.items():
        if name not in mine:
            yield _said(_inner(where, _element(word, name, item)), _told("added", item))
    if [name for name in mine if name in yours] != [name for name in yours if name in mine]:
        yield _said(where, f"{field.name} in another order")


def _keyed(items: Sequence[Any], key: Callable[[Any], object]) -> dict[tuple[object, int], Any]:
    """Return elements by name, and by their number among those of the same name."""
    found: dict[tuple[object, int], Any] = {}
    seen: dict[object, int] = {}
    for item in items:
        name = key(item)
        seen[name] = seen.get(name, 0) + 1
        found[name, seen[name]] = item
    return found


def _element(word: str, name: tuple[object, int], item: Any) -> str:
    number = f" #{name[1]}" if name[1] > 1 else ""
    kind = f" ({item.op_type})" if isinstance(item, onnx.NodeProto) else ""
    return f"{word} {_words.repr(name[0])}{number}{kind}"


def _told(what: str, item: Any) -> str:
    """Say what came or went; of metadata also what it says, of an operator set its version."""
    if isinstance(item, onnx.StringStringEntryProto):
        return f"{what}, {_words.repr(item.value)}"
    return f"{what}, version {item.version}" if isinstance(item, onnx.OperatorSetIdProto) else what


def _inner(where: str, what: str) -> str:
    # That something is in the main graph goes without saying.
    return f"{where}, {what}" if where not in ("", _GRAPH) else what


def _said(where: str, what: str) -> str:
    return f"{where}: {what}" if where else what


def _repeated(value: object) -> bool:
    return not isinstance(value, str | bytes | int | float | Message)


def _value(field: FieldDescriptor, value: Any) -> str:
    if field.enum_type is not None and value in field.enum_type.values_by_number:
        return str(field.enum_type.values_by_number[value].name)
    if field.name == "data_type":
        return _type_name(value)
    return _words.repr(list(value) if _repeated(value) else value)


def _type_name(number: int) -> str:
    known = number in onnx.TensorProto.DataType.values()
    return onnx.TensorProto.DataType.Name(number).lower() if known else f"type {number}"


def _type_words(kind: onnx.TypeProto) -> str:
    """Return a type as it is usually written, such as float[N, 3]."""
    if not kind.HasField("tensor_type"):
        return " ".join(str(kind).split())
    if not kind.tensor_type.HasField("shape"):
        return _type_name(kind.tensor_type.elem_type)
    dims = (
        str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in kind.tensor_type.shape.dim
    )
    return f"{_type_name(kind.tensor_type.elem_type)}[{', '.join(dims)}]"
