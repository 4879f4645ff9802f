"""Triggers: stamping them on inputs, and estimating a static one from triggered samples alone."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxcare.data import Dataset, check_fits, load_arrays
from onnxcare.errors import DataError
from onnxcare.graph.model import Signature

Array = np.ndarray

# A value of a patch hardly varies over triggered samples: by less than this share of the range.
_CONSTANT = 0.02
# How likely it may be that a value of any clean input stays that constant over as many samples by chance.
_CHANCE = 1e-3


@dataclass(frozen=True)
class Trigger:
    """A static trigger: x' = x * (1 - mask) + pattern * mask.

    Attributes:
        mask: share of the pattern in each value of the input, without the batch axis, in [0, 1].
        pattern: the values that are stamped.
        source: the file it was read from, or how it was found: estimated from samples (`patch`, `blend`), or
            restored from the model (`restored patch`, `restored blend`).
    """

    mask: Array
    pattern: Array
    source: str

    def stamp(self, x: Array) -> Array:
        """Return the inputs with the trigger stamped on, same dtype."""
        stamped = x * (1 - self.mask) + self.pattern * self.mask
        return stamped.astype(x.dtype, copy=False)

    def to_bytes(self) -> bytes:
        """Return the trigger as the npz file that `load_trigger` reads."""
        stream = io.BytesIO()
        np.savez_compressed(stream, mask=self.mask, pattern=self.pattern)
        return stream.getvalue()


def load_trigger(path: Path, signature: Signature) -> Trigger:
    """Read a trigger file.

    Raises:
        DataError: arrays are missing, or do not fit the model's input.
    """
    arrays = load_arrays(path)
    found = []
    for name in ("mask", "pattern"):
        if name not in arrays:
            held = ", ".join(sorted(arrays)) or "nothing"
            raise DataError(f"{path}: no array {name!r}; a trigger holds mask and pattern (found {held})")
        values = arrays[name]
        if values.dtype.kind not in "fiub":
            raise DataError(f"{path}: {name} is {values.dtype}; expected numbers")
        if values.ndim == len(signature.shape) and values.shape[0] == 1:
            values = values[0]
        values = values.astype(signature.dtype or np.float32)
        check_fits(values, signature, f"{path}: {name}", batched=False)
        found.append(values)
    mask, pattern = found
    if mask.min() < 0 or mask.max() > 1:
        raise DataError(f"{path}: mask runs from {mask.min():g} to {mask.max():g}; expected 0 to 1")
    if not mask.any():
        raise DataError(f"{path}: mask is zero everywhere, so the trigger changes nothing")
    return Trigger(mask, pattern, str(path))


def estimate_triggers(triggered: Dataset, clean: Dataset, name: str) -> list[Trigger]:
    """Return static triggers that could have turned clean samples into the triggered ones.

    The triggered samples need no clean twins. Two kinds are tried: a patch, whose values are so constant over the
    triggered samples as clean ones would not be by chance; and an even blend, where triggered values vary less
    than clean ones by the same factor 1 - m everywhere, so that mean(x') = (1 - m) mean(x) + m * pattern.

    Args:
        triggered: inputs with the trigger; labels are the true ones, if known.
        clean: inputs without it.
        name: the model input to look at.
    """
    bad, good = triggered.inputs[name], clean.inputs[name]
    span = float(good.max() - good.min()) or 1.0
    candidates = [_patch(bad, good, span), _blend(triggered, clean, name)]
    return [trigger for trigger in candidates if trigger is not None]


def _patch(bad: Array, good: Array, span: float) -> Trigger | None:
    value = np.median(bad, axis=0)
    constant = np.abs(bad - value).max(axis=0) < _CONSTANT * span
    share = (np.abs(good - value) < _CONSTANT * span).mean(axis=0)
    by_chance = share ** len(bad) * share.size
    mask = (constant & (by_chance < _CHANCE)).astype(good.dtype)
    if not mask.any():
        return None
    return Trigger(mask, (value * mask).astype(good.dtype), "patch")


def _blend(triggered: Dataset, clean: Dataset, name: str) -> Trigger | None:
    bad, good = triggered.inputs[name], clean.inputs[name]
    spread = good.std(axis=0)
    varied = spread > 0.1 * spread.max()
    if not varied.any():
        return None
    share = 1 - float(np.median(bad.std(axis=0)[varied] / spread[varied]))
    if not 0.02 < share < 0.98:
        return None
    pattern = (bad.mean(axis=0) - (1 - share) * _matching_mean(triggered, clean, name)) / share
    low, high = min(good.min(), bad.min()), max(good.max(), bad.max())
    mask = np.full(good.shape[1:], share, good.dtype)
    return Trigger(mask, np.clip(pattern, low, high).astype(good.dtype), "blend")


def _matching_mean(triggered: Dataset, clean: Dataset, name: str) -> Array:
    """Return the mean clean input with the class shares of the triggered samples, where labels allow it."""
    good = clean.inputs[name]
    if triggered.labels is None or clean.labels is None:
        return good.mean(axis=0)
    known = [label for label in triggered.labels if (clean.labels == label).any()]
    if len(known) < len(triggered):
        return good.mean(axis=0)
    means = {label: good[clean.labels == label].mean(axis=0) for label in set(known)}
    return np.mean([means[label] for label in known], axis=0)
