"""Random damage to files: to any bytes, to the fields of a protobuf message, and to text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.descriptor import Descriptor
from hypothesis import strategies as st

from onnxcare.graph import wire

Draw = Callable[..., Any]

# Lengths, numbers and field keys at the ends of their ranges.
_EXTREMES = (
    0,
    1,
    2,
    3,
    7,
    127,
    128,
    255,
    2**15,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**40,
    2**63 - 1,
    2**63,
    2**64 - 1,
    2**70,
)
_WORDS = (
    ".nan", ".inf", "-1", "0", "1e309", "null", "true", "[]", "{}", "''", "!!python/object:os.system x", "&a [*a]",
    "*b", "\t", "'", "\x00", "- - -", "? x", "<<: {}", "9" * 21, "/", "../../etc/passwd", "model.onnx", "care.yaml",
)  # fmt: skip


@dataclass(frozen=True)
class Field:
    """A field of a serialized message: where it begins, where its content lies, and the fields it lies in."""

    number: int
    begin: int
    content: int
    end: int
    parents: tuple[Field, ...]

    @property
    def kind(self) -> tuple[int, ...]:
        """The field numbers that lead to it."""
        return (*(parent.number for parent in self.parents), self.number)


def fields(data: bytes) -> list[Field]:
    """Return the fields of a model file at every depth, as far as it can be read."""
    return list(_fields(data, 0, len(data), onnx.ModelProto.DESCRIPTOR, ()))


def _fields(data: bytes, start: int, end: int, kind: Descriptor, parents: tuple[Field, ...]) -> Iterator[Field]:
    try:
        for number, begin, content, stop in wire.fields(data, start, end):
            found = Field(number, begin, content, stop, parents)
            yield found
            known = kind.fields_by_number.get(number)
            if known is not None and known.message_type is not None and len(parents) < 8:
                yield from _fields(data, content, stop, known.message_type, (*parents, found))
    except (IndexError, ValueError):
        return


def _put(data: bytes, field: Field, new: bytes, *, lengths: bool) -> bytes:
    """Put bytes in the place of a field, and correct the lengths of what it lies in, or leave them wrong."""
    start, stop = field.begin, field.end
    for parent in reversed(field.parents if lengths else ()):
        inner = data[parent.content : start] + new + data[stop : parent.end]
        new = wire.embed(parent.number, inner)
        start, stop = parent.begin, parent.end
    return data[:start] + new + data[stop:]


def _seldom(draw: Draw) -> bool:
    return draw(st.sampled_from([False] * 9 + [True]))


# -- any bytes ---------------------------------------------------------------------------------------


def _span(draw: Draw, data: bytes) -> tuple[int, int]:
    start = draw(st.integers(0, max(0, len(data) - 1)))
    return start, min(len(data), start + draw(st.integers(1, 64)))


def _flip(draw: Draw, data: bytes) -> bytes:
    at = draw(st.integers(0, max(0, len(data) - 1)))
    return data[:at] + bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) + data[at + 1 :] if data else data


def _truncate(draw: Draw, data: bytes) -> bytes:
    return data[: draw(st.integers(0, len(data)))]


def _remove(draw: Draw, data: bytes) -> bytes:
    start, stop = _span(draw, data)
    return data[:start] + data[stop:]


def _repeat(draw: Draw, data: bytes) -> bytes:
    start, stop = _span(draw, data)
    return data[:stop] + data[start:stop] * draw(st.sampled_from([1, 2, 100])) + data[stop:]


def _overwrite(draw: Draw, data: bytes) -> bytes:
    start, stop = _span(draw, data)
    return data[:start] + draw(st.binary(min_size=stop - start, max_size=stop - start)) + data[stop:]


def _exchange(draw: Draw, data: bytes) -> bytes:
    (a, b), (c, d) = sorted([_span(draw, data), _span(draw, data)])
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:] if b <= c else data


# -- fields of a message -----------------------------------------------------------------------------


def _in_field(draw: Draw, data: bytes) -> bytes:
    known = fields(data)
    if not known:
        return _flip(draw, data)
    field = draw(st.sampled_from(known))
    way = draw(st.sampled_from(_FIELD_WAYS))
    return _put(data, field, way(draw, data, field, known), lengths=not _seldom(draw))


def _dropped(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    return b""


def _doubled(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    return data[field.begin : field.end] * draw(st.sampled_from([2, 3, 50]))


def _another(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    """Some other field in its place."""
    other = draw(st.sampled_from(known))
    return data[other.begin : other.end]


def _content_of_another(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    """Its own number with the content of another field of its kind, such as another name."""
    other = draw(st.sampled_from([item for item in known if item.kind == field.kind]))
    return data[field.begin : field.content] + data[other.content : other.end]


def _extreme(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    """A number, or the length of what is no number, at the end of its range."""
    value = wire.write_varint(draw(st.sampled_from(_EXTREMES)))
    key, _ = wire.read_varint(data, field.begin)
    if key & 7 == 2 and not _seldom(draw):
        return _shuffled(draw, data, field, known)  # a wrong length makes most files no message at all
    return wire.write_varint(key) + value + (data[field.content : field.end] if key & 7 == 2 else b"")


def _other_key(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    """Another field number or wire type."""
    key, at = wire.read_varint(data, field.begin)
    new = draw(st.sampled_from([key ^ 1 << draw(st.integers(0, 6)), *_EXTREMES]))
    return wire.write_varint(new) + data[at : field.end]


def _text(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    """A name, or what else is there, replaced by text that nobody expects."""
    new = draw(
        st.sampled_from([b"", b"\xff\xfe", b"a" * 2000, b"../../etc/passwd", b"\x00", "é\u2028\U0001f600".encode()])
    )
    return wire.embed(field.number, new)


def _shuffled(draw: Draw, data: bytes, field: Field, known: list[Field]) -> bytes:
    """The bytes of a small field in another order; of a large one, flipped bits at both ends."""
    content = bytearray(data[field.content : field.end])
    for at in (0, len(content) // 2, -1):
        if content:
            content[at] ^= draw(st.integers(1, 255))
    return data[field.begin : field.content] + bytes(content)


_FIELD_WAYS = (
    _content_of_another, _content_of_another, _content_of_another, _dropped, _dropped, _doubled, _extreme, _extreme,
    _shuffled, _shuffled, _another, _other_key, _text,
)  # fmt: skip
_BYTE_WAYS = (_flip, _truncate, _remove, _repeat, _overwrite, _exchange)


# -- text ---------------------------------------------------------------------------------------------


def _in_text(draw: Draw, data: bytes) -> bytes:
    """Drop, double or indent a line, or replace what stands behind its colon."""
    lines = data.decode("utf-8", "replace").splitlines()
    if not lines:
        return draw(st.sampled_from(_WORDS)).encode()
    at = draw(st.integers(0, len(lines) - 1))
    line = lines[at]
    key = line.split(":", 1)[0]
    new = draw(
        st.sampled_from([[], [line] * 2, ["  " + line], [line.strip()], [line.replace(":", "")], [line * 40]])
        | st.sampled_from(_WORDS).map(lambda word: [f"{key}: {word}"])
        | st.sampled_from(_WORDS).map(lambda word: [f"{word}: {line}"])
    )
    return "\n".join([*lines[:at], *new, *lines[at + 1 :], ""]).encode("utf-8", "replace")


@st.composite
def damaged(draw: Draw, files: dict[str, bytes]) -> dict[str, bytes]:
    """Draw the same files, one of which is damaged, mostly in one place: half of the time the first."""
    first, *others = files
    name = draw(st.sampled_from([first] * max(1, len(others)) + others))
    data = files[name]
    own = {".onnx": _in_field, ".yaml": _in_text}.get(Path(name).suffix)
    for _ in range(draw(st.sampled_from([1, 1, 1, 1, 2, 3]))):
        way = draw(st.sampled_from(_BYTE_WAYS)) if own is None or _seldom(draw) else own
        data = way(draw, data)
    return {**files, name: data}
