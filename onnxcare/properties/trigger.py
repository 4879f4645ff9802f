"""Triggers that are the same for every input: stamping them on, reading and saving them."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxcare.data import check_fits, load_arrays
from onnxcare.errors import DataError
from onnxcare.graph.model import Signature

Array = np.ndarray
# Least and largest value of an input: of all its values together (scalars), or of each.
Range = tuple[Array, Array]

_ANY: Range = (np.array(-np.inf), np.array(np.inf))


@dataclass(frozen=True)
class Trigger:
    """A pattern that takes the place of the input, or of a share of it: x' = x * (1 - mask) + pattern * mask.

    Attributes:
        mask: share of the pattern in each value of the input, without the batch axis, in [0, 1].
        pattern: the values that are stamped.
        source: the file it was read from, or how it was found: estimated from samples (`patch`, `blend`), or
            restored from the model (`restored patch`, `restored blend`).
    """

    mask: Array
    pattern: Array
    source: str

    @property
    def size(self) -> int:
        """How many values of an input it changes."""
        return int((self.mask > 0).sum())

    def stamp(self, x: Array) -> Array:
        """Return the inputs with the trigger stamped on, same dtype."""
        stamped = x * (1 - self.mask) + self.pattern * self.mask
        return stamped.astype(x.dtype, copy=False)

    def to_bytes(self) -> bytes:
        """Return the trigger as the npz file that `load_trigger` reads."""
        return _npz(mask=self.mask, pattern=self.pattern)


@dataclass(frozen=True)
class Added:
    """A pattern that is added to the input: x' = clip(x + added, low, high).

    Attributes:
        added: what is added to each value of the input, without the batch axis.
        range: where values are cut off.
        source: the file it was read from, or `added pattern` where it was estimated from samples.
    """

    added: Array
    range: Range
    source: str

    @property
    def size(self) -> int:
        """How many values of an input it changes."""
        return int((self.added != 0).sum())

    def stamp(self, x: Array) -> Array:
        """Return the inputs with the pattern added, same dtype."""
        return np.clip(x + self.added, *self.range).astype(x.dtype, copy=False)

    def to_bytes(self) -> bytes:
        """Return the trigger as the npz file that `load_trigger` reads."""
        return _npz(added=self.added)


Static = Trigger | Added


def load_trigger(path: Path, signature: Signature, values: Range = _ANY) -> Static:
    """Read a trigger file: mask and pattern, or what is added.

    Args:
        path: the npz file.
        signature: the model's input.
        values: where the values of an input are cut off, for what is added to them.

    Raises:
        DataError: arrays are missing, or do not fit the model's input.
    """
    arrays = load_arrays(path)
    beside = sorted(arrays.keys() & {"mask", "pattern"})
    if "added" in arrays and beside:
        raise DataError(f"{path}: holds added beside {', '.join(beside)}; a trigger is either added or stamped")
    if "added" in arrays:
        # What is taken away from whole numbers without a sign is below their range.
        kind = signature.dtype if signature.dtype is not None and signature.dtype.kind == "f" else np.dtype(np.float64)
        added = _read(path, arrays, "added", replace(signature, dtype=kind))
        if not added.any():
            raise DataError(f"{path}: added is zero everywhere, so the trigger changes nothing")
        return Added(added, values, str(path))
    mask, pattern = (_read(path, arrays, name, signature) for name in ("mask", "pattern"))
    if mask.min() < 0 or mask.max() > 1:
        raise DataError(f"{path}: mask runs from {mask.min():g} to {mask.max():g}; expected 0 to 1")
    if not mask.any():
        raise DataError(f"{path}: mask is zero everywhere, so the trigger changes nothing")
    return Trigger(mask, pattern, str(path))


def _read(path: Path, arrays: dict[str, Array], name: str, signature: Signature) -> Array:
    """Return an array of a trigger file in the dtype of the model's input, without a batch axis."""
    if name not in arrays:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"{path}: no array {name!r}; a trigger holds mask and pattern, or added (found {held})")
    values = arrays[name]
    if values.dtype.kind not in "fiub":
        raise DataError(f"{path}: {name} is {values.dtype}; expected numbers")
    if values.ndim == len(signature.shape) and values.shape[0] == 1:
        values = values[0]
    values = values.astype(signature.dtype or np.float32)
    check_fits(values, signature, f"{path}: {name}", batched=False)
    return values


def _npz(**arrays: Array) -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, allow_pickle=False, **arrays)
    return stream.getvalue()
