"""The format of patch files.

A patch file is a safetensors file. For every changed tensor LABEL (see `graph.places`) it holds

    LABEL/old, LABEL/new      the changed values before and after, in the type of the tensor
    LABEL/index               where they are in the flattened tensor; without it, old and new are the whole tensor
    literal                   the other bytes in which the two files differ, and those around the values

and in its metadata, under `onnxcare.patch`, a manifest in JSON: the fingerprints of both files, the tensors, and a list
of *hunks*, the spans of the two files that are not the same. What a span holds is put together of pieces: literal
bytes, all values of a tensor in the protobuf field that holds them, or entries of `metadata_props`. So a file that was
written in an unusual way comes back as it was: whatever no field of values explains is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict, ValidationError

from onnxcare._version import __version__
from onnxcare.errors import DataError
from onnxcare.graph import wire
from onnxcare.patchfile import payload

Array = np.ndarray
Side = Literal["old", "new"]
Span = tuple[int, int]

FORMAT_VERSION = 1
LITERAL = "literal"
_MANIFEST = "onnxcare.patch"
# Types of tensors as numpy and safetensors name them; all others are stored as bytes.
_STORED = {
    "FLOAT": ("float32", "F32"),
    "DOUBLE": ("float64", "F64"),
    "FLOAT16": ("float16", "F16"),
    "BFLOAT16": ("bfloat16", "BF16"),
    "BOOL": ("bool", "BOOL"),
    "INT8": ("int8", "I8"),
    "INT16": ("int16", "I16"),
    "INT32": ("int32", "I32"),
    "INT64": ("int64", "I64"),
    "UINT8": ("uint8", "U8"),
    "UINT16": ("uint16", "U16"),
    "UINT32": ("uint32", "U32"),
    "UINT64": ("uint64", "U64"),
}
_BYTES = ("uint8", "U8")
_BITS = {tag: payload.unit(onnx.TensorProto.DataType.Value(name)) for name, (_, tag) in _STORED.items()}
_INDEX = {"I32": np.int32, "I64": np.int64}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Tensor(_Section):
    """A tensor that changes.

    Attributes:
        label: what it is called.
        path: where its message lies, in both files.
        type: name of its data type.
        shape: its dimensions.
    """

    label: str
    path: wire.Path
    type: str
    shape: tuple[int, ...]


class LiteralPiece(_Section):
    """Bytes as they are: a span of the array `literal`."""

    literal: Span


class ValuesPiece(_Section):
    """All values of a tensor, given by its number, in a protobuf field."""

    values: int
    field: payload.Field


class MetadataPiece(_Section):
    """Entries of `metadata_props`, in protobuf's own writing."""

    metadata: tuple[tuple[str, str], ...]


Piece = LiteralPiece | ValuesPiece | MetadataPiece


class Hunk(_Section):
    """A span of both files that is not the same, and what it is put together of."""

    old_at: Span
    new_at: Span
    old: tuple[Piece, ...]
    new: tuple[Piece, ...]


class Manifest(_Section):
    """What a patch file says about itself.

    Attributes:
        format_version: version of the format.
        onnxcare: version of onnxcare that wrote it.
        old_sha256: fingerprint of the file it was made for.
        new_sha256: fingerprint of the file that it gives.
        tensors: what changes.
        hunks: where, in file order.
    """

    format_version: int
    onnxcare: str
    old_sha256: str
    new_sha256: str
    tensors: tuple[Tensor, ...]
    hunks: tuple[Hunk, ...]


@dataclass(frozen=True)
class PatchFile:
    """A patch file.

    Attributes:
        name: how to call it in errors.
        manifest: what it says about itself.
        arrays: the bits of the values it holds, and indices, all of them flat.
    """

    name: str
    manifest: Manifest
    arrays: Mapping[str, Array]

    def values(self, tensor: Tensor, side: Side) -> Array:
        """Return the bits of the stored values of a tensor on one side."""
        return self.arrays[f"{tensor.label}/{side}"]

    def index(self, tensor: Tensor) -> Array | None:
        """Return where they are in the flattened tensor, or None where all of it is stored."""
        return self.arrays.get(f"{tensor.label}/index")

    def to_bytes(self) -> bytes:
        """Return the content of the file."""
        import ml_dtypes
        from safetensors.numpy import save

        stored = {}
        for tensor in self.manifest.tensors:
            kind = _STORED.get(tensor.type, _BYTES)[0]
            dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
            index = self.index(tensor)
            if index is not None:
                stored[f"{tensor.label}/index"] = index
            shape = tensor.shape if index is None and tensor.type in _STORED else (-1,)
            for side in ("old", "new"):
                stored[f"{tensor.label}/{side}"] = self.arrays[f"{tensor.label}/{side}"].view(dtype).reshape(shape)
        stored[LITERAL] = self.arrays[LITERAL]
        # One entry alone: safetensors writes several in an order that is another one every time.
        return bytes(save(stored, {_MANIFEST: self.manifest.model_dump_json()}))


def read(path: Path) -> PatchFile:
    """Read a patch file.

    Raises:
        DataError: it is missing, no patch file, damaged, or of a format that is not known.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a patch file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
    return parse(content, str(path))


def parse(content: bytes, name: str) -> PatchFile:
    """Return what a patch file holds.

    Args:
        content: its bytes.
        name: how to call it in errors.

    Raises:
        DataError: it is no patch file, damaged, or of a format that is not known.
    """
    from safetensors import SafetensorError, deserialize

    try:
        held: dict[str, dict[str, Any]] = dict(deserialize(content))
    except SafetensorError:
        raise DataError(f"{name}: not a patch file (safetensors), or a truncated one") from None
    text = _metadata(content).get(_MANIFEST)
    if text is None:
        raise DataError(f"{name}: a safetensors file, but no patch that onnxcare has written")
    try:
        version = json.loads(text)["format_version"]
        if version != FORMAT_VERSION:
            raise DataError(
                f"{name}: its format version is {version!r:.20}, but onnxcare {__version__} reads version "
                f"{FORMAT_VERSION}; use the onnxcare that wrote it"
            )
        manifest = Manifest.model_validate_json(text)
        _check(manifest, held)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"])
        raise damaged(name, f"{where} of its manifest: {first['msg']}") from None
    except KeyError as error:
        raise damaged(name, f"{error} is missing") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise damaged(name, error) from None
    return PatchFile(name, manifest, {key: _array(key, item) for key, item in held.items()})


def damaged(name: str, why: object) -> DataError:
    """Return the error for a patch file that is not what it was when it was written."""
    return DataError(f"{name}: the patch file is damaged ({str(why)[:200]}); take another copy of it")


def _metadata(content: bytes) -> Mapping[str, str]:
    """Return the metadata of a safetensors file that has been found to be one."""
    length = int.from_bytes(content[:8], "little")
    found: Mapping[str, str] = json.loads(content[8 : 8 + length]).get("__metadata__") or {}
    return found


def _check(manifest: Manifest, held: Mapping[str, Mapping[str, Any]]) -> None:
    """Make sure that there are arrays for all that the manifest names, and that they fit together.

    Raises:
        KeyError: an array is missing.
        ValueError: one does not fit.
    """
    if held[LITERAL]["dtype"] != "U8":
        raise ValueError(f"{LITERAL} is {held[LITERAL]['dtype']}")
    for tensor in manifest.tensors:
        old, new = (held[f"{tensor.label}/{side}"] for side in ("old", "new"))
        tag = _STORED.get(tensor.type, _BYTES)[1]
        if {old["dtype"], new["dtype"]} != {tag} or old["shape"] != new["shape"]:
            raise ValueError(f"the values of {tensor.label} do not fit together")
        index = held.get(f"{tensor.label}/index")
        if index is None:
            if tensor.type in _STORED and tuple(old["shape"]) != tensor.shape:
                raise ValueError(f"{tensor.label} has shape {list(tensor.shape)}, but values {old['shape']}")
        elif index["dtype"] not in _INDEX or len(index["shape"]) != 1 or index["shape"] != old["shape"]:
            raise ValueError(f"the indices of {tensor.label} do not fit its values")
        elif _array(f"{tensor.label}/index", index).min(initial=0) < 0:
            raise ValueError(f"an index of {tensor.label} is negative")


def _array(key: str, item: Mapping[str, Any]) -> Array:
    """Return indices as they are, and values as their bits."""
    kinds = _INDEX if key.endswith("/index") else _BITS
    return np.frombuffer(item["data"], kinds.get(item["dtype"], np.uint8))
