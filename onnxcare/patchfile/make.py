"""Make a patch file out of two model files, however the second one came about."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from onnxcare._version import __version__
from onnxcare.errors import ModelError
from onnxcare.graph import wire
from onnxcare.graph.model import Model
from onnxcare.graph.patch import METADATA_PROPS, is_ours
from onnxcare.graph.places import Place, find_places
from onnxcare.patchfile import delta, payload
from onnxcare.patchfile.apply import metadata_bytes, rebuilt
from onnxcare.patchfile.format import (
    FORMAT_VERSION,
    LITERAL,
    Hunk,
    LiteralPiece,
    Manifest,
    MetadataPiece,
    PatchFile,
    Piece,
    Tensor,
    ValuesPiece,
)

Array = np.ndarray


def make_patch(model: Model, result: bytes) -> PatchFile:
    """Return the patch file that turns a model into another one, and back.

    Args:
        model: the model.
        result: the bytes of the other one. It may differ in numbers and in `onnxcare.*` metadata, and where it has
            external data, that is the model's.

    Raises:
        ModelError: the two differ in more than that, or cannot be made out of each other.
    """
    old, proto = model.data, onnx.ModelProto.FromString(result)
    places = _shared(model.proto, proto)
    try:
        found = delta.differences(old, result, places, METADATA_PROPS, is_ours)
    except ValueError as error:
        raise ModelError(
            f"{model.path}: the other file differs from it in more than values and metadata, which no patch file holds "
            f"({error})"
        ) from None
    builder = _Builder(model, old, result, places)
    hunks = tuple(builder.hunk(item) for item in found)
    manifest = Manifest(
        format_version=FORMAT_VERSION,
        onnxcare=__version__,
        old_sha256=model.sha256,
        new_sha256=hashlib.sha256(result).hexdigest(),
        tensors=tuple(builder.tensors),
        hunks=hunks,
    )
    arrays = builder.arrays | {LITERAL: np.frombuffer(bytes(builder.literal), np.uint8)}
    patch = PatchFile("the patch", manifest, arrays)
    there = rebuilt(old, model.proto, model.path, patch, "new") == result
    if not (there and rebuilt(result, proto, model.path, patch, "old") == old):
        raise ModelError(
            f"{model.path}: it is laid out in a way that no patch file can restore; save it with onnx.save"
        )
    return patch


def _shared(old: onnx.ModelProto, new: onnx.ModelProto) -> dict[wire.Path, tuple[Place, Place]]:
    """Return the places that lie in both files, and hold as many numbers of the same type there."""
    mine = {place.path: place for place in find_places(old)}
    return {
        place.path: (mine[place.path], place)
        for place in find_places(new)
        if place.path in mine and (place.data_type, place.shape) == (mine[place.path].data_type, mine[place.path].shape)
    }


class _Builder:
    """Describes hunks, and gathers what they are put together of."""

    def __init__(self, model: Model, old: bytes, new: bytes, places: dict[wire.Path, tuple[Place, Place]]) -> None:
        self.tensors: list[Tensor] = []
        self.arrays: dict[str, Array] = {}
        self.literal = bytearray()
        self._old, self._new, self._places, self._folder = old, new, places, model.path.parent

    def hunk(self, found: delta.Hunk) -> Hunk:
        old, new = self._old[slice(*found.old)], self._new[slice(*found.new)]
        if found.path is None:
            pieces = self._plain(old), self._plain(new)
        else:
            before, after = self._places[found.path]
            values = tuple(payload.read_bits(place, self._folder) for place in (before, after))
            number = self._tensor(before, *values)
            pieces = self._framed(old, before, values[0], number), self._framed(new, after, values[1], number)
        return Hunk(old_at=found.old, new_at=found.new, old=pieces[0], new=pieces[1])

    def _plain(self, content: bytes) -> tuple[Piece, ...]:
        """Describe bytes that hold no numbers."""
        if not content:
            return ()
        try:
            entries = [(item.key, item.value) for item in onnx.ModelProto.FromString(content).metadata_props]
        except DecodeError:
            entries = []
        text = all(isinstance(part, str) for entry in entries for part in entry)
        if text and metadata_bytes(entries) == content:
            return (MetadataPiece(metadata=tuple(entries)),)
        start = len(self.literal)
        self.literal += content
        return (LiteralPiece(literal=(start, len(self.literal))),)

    def _framed(self, content: bytes, place: Place, bits: Array, number: int) -> tuple[Piece, ...]:
        """Describe a message: what is in front of its values, the values, and what is behind them."""
        field = payload.field_of(place)
        if field is not None:
            wanted = payload.number_of(field)
            spans = [(start, stop) for kind, start, _, stop in wire.fields(content, 0, len(content)) if kind == wanted]
            start, stop = spans[0][0], spans[-1][1]
            # The field may be in several pieces, or its length written in an unusual way.
            if content[start:stop] == payload.write_field(field, place.data_type, bits):
                values = ValuesPiece(values=number, field=field)
                return (*self._plain(content[:start]), values, *self._plain(content[stop:]))
        return self._plain(content)

    def _tensor(self, place: Place, old: Array, new: Array) -> int:
        """Keep the values that change, or all of them where that takes less, and return the number of the tensor."""
        (index,) = np.nonzero(old != new)
        index = index.astype(np.int32 if old.size < 1 << 31 else np.int64)
        if len(index) * (index.itemsize + 2 * old.itemsize) < 2 * old.nbytes:
            self.arrays[f"{place.label}/index"] = index
            old, new = old[index], new[index]
        self.arrays[f"{place.label}/old"], self.arrays[f"{place.label}/new"] = old, new
        kind = onnx.TensorProto.DataType.Name(place.data_type)
        self.tensors.append(Tensor(label=place.label, path=place.path, type=kind, shape=place.shape))
        return len(self.tensors) - 1
