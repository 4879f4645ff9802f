"""Restored triggers as pictures: every dot of the PNG, read back by PIL, against plain loops."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from onnxcare.properties.trigger import Trigger
from onnxcare.report.picture import picture

Array = np.ndarray


def trigger(*shape: int, dtype: type = np.float32) -> Trigger:
    rng = np.random.default_rng([4, *shape])
    return Trigger(rng.uniform(0, 0.6, shape).astype(dtype), rng.normal(2, 3, shape).astype(dtype), "test")


def dots(content: bytes | None) -> Array:
    """Return the dots of a PNG, [height, width, 1 or 3]."""
    assert content is not None
    with Image.open(io.BytesIO(content)) as image:
        assert image.format == "PNG" and image.mode in ("L", "RGB")
        values = np.asarray(image)
    return values if values.ndim == 3 else values[..., None]


def value_at(values: Array, row: int, column: int, channel: int, layout: str) -> float:
    if layout == "plain":
        return float(values[row, column])
    return float(values[channel, row, column] if layout == "first" else values[row, column, channel])


@pytest.mark.parametrize(
    ("shape", "layout", "size", "factor"),
    [
        ((6, 5), "plain", (6, 5, 1), 45),
        ((1, 28, 28), "first", (28, 28, 1), 8),
        ((3, 6, 5), "first", (6, 5, 3), 45),
        ((6, 5, 1), "last", (6, 5, 1), 45),
        ((32, 40, 3), "last", (32, 40, 3), 7),
        ((1, 224, 230), "first", (224, 230, 1), 1),
        ((300, 2), "plain", (300, 2, 1), 112),
        ((1, 1), "plain", (1, 1, 1), 224),
    ],
)
def test_mask_and_pattern_stand_side_by_side(shape, layout, size, factor):
    given = trigger(*shape)
    found = dots(picture(given))
    height, width, channels = size
    assert found.shape == (height * factor, (2 * width + 1) * factor, channels)
    assert min(height, width) * factor >= 224 > min(height, width) * (factor - 1)
    strongest = float(given.mask.max())
    low, high = float(given.pattern.min()), float(given.pattern.max())
    for row in range(0, height, max(1, height // 12)):
        for column in range(0, width, max(1, width // 12)):
            for channel in range(channels):
                share = value_at(given.mask, row, column, channel, layout) / strongest
                value = value_at(given.pattern, row, column, channel, layout)
                shown = share if high == low else share * (value - low) / (high - low)
                for place, expected in ((column, share), (width + 1 + column, shown)):
                    block = found[row * factor : (row + 1) * factor, place * factor : (place + 1) * factor, channel]
                    assert block.min() == block.max()
                    assert abs(int(block[0, 0]) - 255 * expected) <= 0.51
    assert (found[:, width * factor : (width + 1) * factor] == 255).all()


def test_the_strongest_share_is_white_none_is_black_and_a_pattern_of_one_value_white_where_the_mask_is():
    mask = np.zeros((1, 8, 8), np.float32)
    mask[0, 2, 3], mask[0, 5, 6] = 0.01, 0.005
    found = dots(picture(Trigger(mask, np.full((1, 8, 8), 5, np.float32), "test")))
    factor = found.shape[0] // 8
    assert (found[:, 8 * factor : 9 * factor] == 255).all()
    for side in (found[:, : 8 * factor], found[:, 9 * factor :]):
        assert (side[2 * factor : 3 * factor, 3 * factor : 4 * factor] == 255).all()
        assert (side[5 * factor : 6 * factor, 6 * factor : 7 * factor] == 128).all()
        assert (side == 0).sum() == 62 * factor**2


@pytest.mark.parametrize("shape", [(7,), (2, 6, 6), (6, 6, 4), (4, 6, 6), (6, 6, 2), (1, 3, 6, 6)], ids=str)
def test_what_is_no_image_has_no_picture(shape):
    assert picture(trigger(*shape)) is None


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_other_precisions_give_a_picture_too(dtype):
    assert dots(picture(trigger(1, 6, 6, dtype=dtype))).shape == (6 * 38, 13 * 38, 1)


def test_the_same_trigger_gives_the_same_bytes():
    assert picture(trigger(3, 6, 6)) == picture(trigger(3, 6, 6))
