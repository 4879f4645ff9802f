"""Put a patch file to use: the bytes of one file out of those of the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import onnx

from onnxcare.errors import ModelError
from onnxcare.graph import wire
from onnxcare.graph.model import Model
from onnxcare.graph.patch import METADATA_PROPS
from onnxcare.graph.places import Place, find_places
from onnxcare.patchfile import payload
from onnxcare.patchfile.format import (
    LITERAL,
    LiteralPiece,
    MetadataPiece,
    PatchFile,
    Piece,
    Side,
    Tensor,
    damaged,
)

Array = np.ndarray


def patched(model: Model, patch: PatchFile, *, revert: bool = False) -> bytes:
    """Return the bytes of the file that a patch makes of a model.

    Args:
        model: the model that the patch was made for; the one that it gives, where it is reverted.
        patch: the patch.
        revert: go back.

    Raises:
        ModelError: it is another model, or its external data is not what it was.
        DataError: the patch is damaged.
    """
    known = {"old": patch.manifest.old_sha256, "new": patch.manifest.new_sha256}
    have: Side = "new" if revert else "old"
    want: Side = "old" if revert else "new"
    if model.sha256 != known[have]:
        word = "reverts a file" if revert else "is for a model"
        why = f"{model.path}: its SHA-256 is {model.sha256}, but {patch.name} {word} with {known[have]}"
        already = "; it is reverted already" if revert else "; it is patched already"
        raise ModelError(why + (already if model.sha256 == known[want] else ""))
    try:
        data = rebuilt(model.data, model.proto, model.path, patch, want)
    except (IndexError, KeyError, ValueError) as error:
        raise damaged(patch.name, error) from None
    found = hashlib.sha256(data).hexdigest()
    if found != known[want]:
        raise damaged(patch.name, f"what it gives has SHA-256 {found}, not {known[want]}")
    return data


def rebuilt(data: bytes, proto: onnx.ModelProto, path: Path, patch: PatchFile, want: Side) -> bytes:
    """Return the bytes of one file made out of those of the other.

    Args:
        data: bytes of the other file.
        proto: what they hold.
        path: where that file lies; external data is read from beside it.
        patch: the patch.
        want: which of its two files to make.

    Raises:
        ModelError: external data is not what it was.
        IndexError: the patch names what it does not hold.
        KeyError: an array is missing.
        ValueError: something else does not fit.
    """
    return b"".join(_Patching(proto, path, patch, want).pieces(data))


def metadata_bytes(entries: Iterable[tuple[str, str]]) -> bytes:
    """Return metadata entries as fields of a ModelProto."""
    written = (onnx.StringStringEntryProto(key=key, value=value).SerializeToString() for key, value in entries)
    return b"".join(wire.embed(METADATA_PROPS, entry) for entry in written)


class _Patching:
    def __init__(self, proto: onnx.ModelProto, path: Path, patch: PatchFile, want: Side) -> None:
        self._path, self._patch, self._want = path, patch, want
        self._have: Side = "old" if want == "new" else "new"
        self._places = {place.path: place for place in find_places(proto)}

    def pieces(self, data: bytes) -> Iterator[bytes]:
        at = 0
        for hunk in self._patch.manifest.hunks:
            start, stop = hunk.old_at if self._have == "old" else hunk.new_at
            if not at <= start <= stop <= len(data):
                raise ValueError(f"bytes {start} to {stop} are not in the model")
            yield data[at:start]
            at = stop
            for piece in hunk.old if self._want == "old" else hunk.new:
                yield self._bytes(piece)
        yield data[at:]

    def _bytes(self, piece: Piece) -> bytes:
        if isinstance(piece, LiteralPiece):
            return self._patch.arrays[LITERAL][slice(*piece.literal)].tobytes()
        if isinstance(piece, MetadataPiece):
            return metadata_bytes(piece.metadata)
        tensor = self._patch.manifest.tensors[piece.values]
        if tensor.path not in self._places:
            raise ValueError(f"there is no tensor where {tensor.label} should be")
        place = self._places[tensor.path]
        kind = onnx.TensorProto.DataType.Name(place.data_type)
        if (kind, place.shape) != (tensor.type, tensor.shape):
            raise ValueError(
                f"{tensor.label} is {tensor.type} {list(tensor.shape)}, but in the model {kind} {list(place.shape)}"
            )
        return payload.write_field(piece.field, place.data_type, self._values(tensor, place))

    def _values(self, tensor: Tensor, place: Place) -> Array:
        """Return the bits of all values of a tensor in the other file."""
        wanted, index = self._patch.values(tensor, self._want), self._patch.index(tensor)
        if index is None:
            return wanted
        found = payload.read_bits(place, self._path.parent).copy()
        # The fingerprint of a model says nothing about the files beside it.
        if not np.array_equal(found[index], self._patch.values(tensor, self._have)):
            raise ModelError(
                f"{self._path}: {tensor.label} does not hold the values that {self._patch.name} changes; if the "
                "model has external data, put back the file that belongs to it"
            )
        found[index] = wanted
        return found
