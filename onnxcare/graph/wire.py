"""Replace parts of a serialized protobuf message and leave every other byte as it is.

A repaired file has to equal the original wherever no tensor was patched. Parsing and serializing again would
rewrite the file in protobuf's own field order and rely on nothing being lost on the way; splicing the
wire format cannot touch what it does not replace. The format: https://protobuf.dev/programming-guides/encoding/

A *path* names one embedded message: a tuple of (field number, occurrence) steps from the outermost message, so
``((7, 0), (5, 2))`` is the third `initializer` (field 5) of the `graph` (field 7) of a ModelProto.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

Path = tuple[tuple[int, int], ...]

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint that starts at `at` and the position behind it."""
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7


def write_varint(value: int) -> bytes:
    """Encode a non-negative integer as a varint."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (field number, start of the field, start of its content, end) in file order.

    Raises:
        ValueError: the bytes are not a protobuf message (group fields, which ONNX never uses, included).
    """
    at = start
    while at < end:
        begin = at
        key, at = read_varint(data, at)
        number, kind = key >> 3, key & 7
        content = at
        if kind == _LENGTH:
            size, content = read_varint(data, at)
            at = content + size
        elif kind == _VARINT:
            _, at = read_varint(data, at)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {begin}")
        if at > end:
            raise ValueError(f"field {number} at byte {begin} runs past the end of its message")
        yield number, begin, content, at


def is_message(data: bytes, begin: int) -> bool:
    """Return whether a field holds bytes: readers take any other wire type for an unknown field and do not count it."""
    return data[begin] & 7 == _LENGTH


def embed(number: int, content: bytes) -> bytes:
    """Encode `content` as a length-delimited field."""
    return write_varint(number << 3 | _LENGTH) + write_varint(len(content)) + content


def splice(data: bytes, edits: Mapping[Path, bytes]) -> bytes:
    """Return `data` with the messages at the given paths replaced by the given serialized messages.

    Raises:
        KeyError: a path leads nowhere.
    """
    parts: list[bytes] = []
    found: set[Path] = set()
    _splice(data, 0, len(data), (), edits, parts.append, found)
    missing = set(edits) - found
    if missing:
        raise KeyError(f"no message at {sorted(missing)[0]}")
    return b"".join(parts)


def _splice(
    data: bytes,
    start: int,
    end: int,
    prefix: Path,
    edits: Mapping[Path, bytes],
    emit: Callable[[bytes], None],
    found: set[Path],
) -> None:
    seen: dict[int, int] = {}
    unchanged_from = start
    depth = len(prefix)
    # Only ancestors of an edit are opened: the large rest of the file is copied in whole slices.
    inner = {path[: depth + 1] for path in edits if len(path) > depth and path[:depth] == prefix}
    for number, begin, content, stop in fields(data, start, end):
        if not is_message(data, begin):
            continue
        occurrence = seen.get(number, 0)
        seen[number] = occurrence + 1
        path = (*prefix, (number, occurrence))
        if path not in inner:
            continue
        if path in edits:
            replacement = edits[path]
            found.add(path)
        else:
            parts: list[bytes] = []
            _splice(data, content, stop, path, edits, parts.append, found)
            replacement = b"".join(parts)
        if len(replacement) == stop - content:
            # The length stays as it was written: some writers pad it, because they reserve room for it.
            emit(data[unchanged_from:content])
            emit(replacement)
        else:
            emit(data[unchanged_from:begin])
            emit(embed(number, replacement))
        unchanged_from = stop
    emit(data[unchanged_from:end])


def replace_entries(data: bytes, number: int, drop: Callable[[bytes], bool], add: list[bytes]) -> bytes:
    """Return the message without the occurrences of field `number` that `drop` picks, and `add` appended."""
    parts: list[bytes] = []
    unchanged_from = 0
    for found, begin, content, stop in fields(data, 0, len(data)):
        if found == number and is_message(data, begin) and drop(data[content:stop]):
            parts.append(data[unchanged_from:begin])
            unchanged_from = stop
    parts.append(data[unchanged_from:])
    parts.extend(embed(number, entry) for entry in add)
    return b"".join(parts)
