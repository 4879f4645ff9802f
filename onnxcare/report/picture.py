"""Restored triggers as pictures."""

from __future__ import annotations

import io

import numpy as np

from onnxcare.properties.trigger import Trigger

Array = np.ndarray

# The shorter side of a picture is at least this many dots: triggers are small.
_LEAST = 224


def picture(trigger: Trigger) -> bytes | None:
    """Return a PNG of the mask and, beside it, the pattern where the mask is; None where the input is no image.

    The mask runs from black (0) to white (its largest value), the pattern from black to white over its own range,
    and is white where it has one value only.
    """
    mask, pattern = _pixels(trigger.mask), _pixels(trigger.pattern)
    if mask is None or pattern is None:
        return None
    from PIL import Image

    visible = mask / mask.max()
    span = float(pattern.max() - pattern.min())
    shown = visible * ((pattern - pattern.min()) / span if span else 1.0)
    gap = np.ones((mask.shape[0], 1, mask.shape[2]))
    joined = np.round(255 * np.concatenate([visible, gap, shown], axis=1)).astype(np.uint8)
    image = Image.fromarray(joined[..., 0] if joined.shape[2] == 1 else joined)
    factor = max(1, -(-_LEAST // min(mask.shape[:2])))
    image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _pixels(values: Array) -> Array | None:
    """Return an image as [height, width, 1 or 3], or None where the shape is that of no image."""
    if values.ndim == 2:
        return values[..., None].astype(np.float64)
    if values.ndim != 3:
        return None
    if values.shape[0] in (1, 3):
        return np.moveaxis(values, 0, -1).astype(np.float64)
    return values.astype(np.float64) if values.shape[-1] in (1, 3) else None
