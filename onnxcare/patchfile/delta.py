"""Where two model files differ, byte by byte, and that it is nowhere but at their numbers and in our own metadata.

Both files are walked side by side on the level of the wire format, so that lengths written in an unusual way, fields in
an unusual order and the like are seen as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from onnxcare.graph import wire

Span = tuple[int, int]


@dataclass(frozen=True)
class Hunk:
    """Bytes of the old file, and those of the new file that take their place.

    Attributes:
        old: first byte in the old file and the one behind the last.
        new: the same in the new file.
        path: the message they are the content of; None where they lie between messages.
    """

    old: Span
    new: Span
    path: wire.Path | None = None


def differences(
    old: bytes, new: bytes, places: Collection[wire.Path], number: int, ours: Callable[[bytes], bool]
) -> list[Hunk]:
    """Return where two files differ, in file order: in the messages at some places, and around them.

    Args:
        old: one file.
        new: the other one.
        places: paths of messages that may differ.
        number: a field of the outermost message whose occurrences may come and go.
        ours: picks those of them that may.

    Raises:
        ValueError: they also differ elsewhere.
    """
    return _Walk(old, new, places, number, ours).hunks


class _Walk:
    def __init__(
        self, old: bytes, new: bytes, places: Collection[wire.Path], number: int, ours: Callable[[bytes], bool]
    ) -> None:
        self.hunks: list[Hunk] = []
        self._data, self._places, self._number, self._ours = (old, new), places, number, ours
        # Slices of these are no copies.
        self._old, self._new = memoryview(old), memoryview(new)
        self._ancestors = {path[:depth] for path in places for depth in range(1, len(path))}
        self._message((0, len(old)), (0, len(new)), ())

    def _message(self, old: Span, new: Span, prefix: wire.Path) -> None:
        mine, yours = self._fields(0, old, prefix), self._fields(1, new, prefix)
        if [item[0] for item in mine] != [item[0] for item in yours]:
            raise ValueError(f"{prefix}: other fields")
        seen: dict[int, int] = {}
        behind_old, behind_new = old[0], new[0]
        for (number, begin_old, content_old, end_old), (_, begin_new, content_new, end_new) in zip(
            mine, yours, strict=True
        ):
            self._between((behind_old, begin_old), (behind_new, begin_new))
            behind_old, behind_new = end_old, end_new
            path = None
            if wire.is_message(self._data[0], begin_old) and wire.is_message(self._data[1], begin_new):
                path = (*prefix, (number, seen.get(number, 0)))
                seen[number] = path[-1][1] + 1
            if self._same((begin_old, end_old), (begin_new, end_new)):
                continue
            if path not in self._places and path not in self._ancestors:
                raise ValueError(f"field {number} of {prefix}")
            assert path is not None
            self._between((begin_old, content_old), (begin_new, content_new))
            if path in self._places:
                self._add((content_old, end_old), (content_new, end_new), path)
            else:
                self._message((content_old, end_old), (content_new, end_new), path)
        self._between((behind_old, old[1]), (behind_new, new[1]))

    def _fields(self, which: int, span: Span, prefix: wire.Path) -> list[tuple[int, int, int, int]]:
        data = self._data[which]
        found = list(wire.fields(data, *span))
        if prefix:
            return found
        return [
            (kind, begin, content, end)
            for kind, begin, content, end in found
            if not (kind == self._number and wire.is_message(data, begin) and self._ours(data[content:end]))
        ]

    def _between(self, old: Span, new: Span) -> None:
        """Compare what lies in front of, between or behind fields: their keys and lengths, and what is ours."""
        self._add(old, new, None)

    def _add(self, old: Span, new: Span, path: wire.Path | None) -> None:
        if not self._same(old, new):
            self.hunks.append(Hunk(old, new, path))

    def _same(self, old: Span, new: Span) -> bool:
        return self._old[slice(*old)] == self._new[slice(*new)]
