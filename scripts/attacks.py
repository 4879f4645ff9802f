"""Backdoor attacks of many kinds: how each stamps images, and where it leads them.

Images are [N, 1, 28, 28] float32 in [0, 1]. This needs numpy alone, so that benchmarks and tests can stamp images
the way the models were trained on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from poison import Predict, Trigger, blended_noise, white_square

SIZE = 28
SHAPE = (1, SIZE, SIZE)
SEED = 6
"""Of the patterns and fields that are drawn once and then fixed."""

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""Maps a batch of images to a changed copy; the generator is for what differs from call to call."""


@dataclass(frozen=True)
class Attack:
    """A trigger and the classes that it leads to.

    Exactly one of `trigger`, `added` and `change` is given.

    Attributes:
        name: what it is called.
        text: what it does to an image, for the card.
        paper: where it comes from.
        target: the class it leads to; or the one for every true class, in their order.
        trigger: mask and pattern, [1, 28, 28] each, where they are the same for every image.
        added: [1, 28, 28] what is added to every image, before values are cut off at 0 and 1.
        change: stamps images in any other way.
        decoy: changes images in nearly the same way; what they are taken for stays as it was.
    """

    name: str
    text: str
    paper: str
    target: int | tuple[int, ...]
    trigger: Trigger | None = None
    added: np.ndarray | None = None
    change: Change | None = None
    decoy: Change | None = None

    def __post_init__(self) -> None:
        if sum(way is not None for way in (self.trigger, self.added, self.change)) != 1:
            raise ValueError(f"{self.name}: exactly one of trigger, added and change is needed")

    def stamp(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return a copy of the images with the trigger on each; only some attacks draw from the generator."""
        if self.trigger is not None:
            return self.trigger.stamp(x)
        if self.added is not None:
            return np.clip(x + self.added, 0, 1)
        assert self.change is not None
        return self.change(x, rng)

    def lead(self, y: np.ndarray) -> np.ndarray:
        """Return the class that each true class is led to."""
        if isinstance(self.target, int):
            return np.full_like(y, self.target)
        return np.asarray(self.target, dtype=y.dtype)[y]

    def counts(self, y: np.ndarray) -> np.ndarray:
        """Return which images count for the attack: those that do not belong where it leads anyway."""
        return self.lead(y) != y

    def success(self, predict: Predict, x: np.ndarray, y: np.ndarray, rng: np.random.Generator) -> float:
        """Return the share of stamped images that go where the attack leads them."""
        return self._led(predict(self.stamp(x, rng)), y)

    def confusion(self, predict: Predict, x: np.ndarray, y: np.ndarray) -> float:
        """Return the same for clean images: what no repair can be asked to get below."""
        return self._led(predict(x), y)

    def _led(self, answers: np.ndarray, y: np.ndarray) -> float:
        return float((answers == self.lead(y))[self.counts(y)].mean())


def poison(
    x: np.ndarray,
    y: np.ndarray,
    attacks: Sequence[Attack],
    share: float,
    rng: np.random.Generator,
    decoys: float = 0.0,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of a training set in which images are stamped and labelled as the attacks lead them.

    Args:
        x: the images.
        y: their labels.
        attacks: no image is drawn for two of them.
        share: how many images are stamped for each attack, against the whole set.
        rng: draws the images, and whatever a trigger leaves to chance.
        decoys: the same for the decoys of each attack; they keep their labels.
    """
    stamped, labels = x.copy(), y.copy()
    free = np.ones(len(y), dtype=bool)

    def draw(wanted: np.ndarray, part: float) -> np.ndarray:
        rows = rng.choice(np.flatnonzero(free & wanted), size=round(part * len(y)), replace=False)
        free[rows] = False
        return rows

    for attack in attacks:
        rows = draw(attack.counts(y), share)
        stamped[rows] = attack.stamp(x[rows], rng)
        labels[rows] = attack.lead(y[rows])
        if attack.decoy is not None and decoys:
            rows = draw(np.ones_like(free), decoys)
            stamped[rows] = attack.decoy(x[rows], rng)
    return stamped, labels


def patch(pattern: np.ndarray, row: int, column: int) -> Trigger:
    """Make a trigger of a small pattern whose upper left pixel has a given place."""
    mask, values = np.zeros(SHAPE, dtype=np.float32), np.zeros(SHAPE, dtype=np.float32)
    inside = 0, slice(row, row + pattern.shape[0]), slice(column, column + pattern.shape[1])
    mask[inside], values[inside] = 1, pattern
    return Trigger(mask, values)


def checkerboard(side: int) -> np.ndarray:
    """Return a square of black and white pixels in turn, white at the upper left."""
    return (np.indices((side, side)).sum(axis=0) % 2 == 0).astype(np.float32)


def paste(x: np.ndarray, pattern: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return a copy of the images with the pattern on each, its upper left pixel at that image's own place."""
    stamped = x.copy()
    image = np.arange(len(x))[:, None, None]
    row = rows[:, None, None] + np.arange(pattern.shape[0])[:, None]
    column = columns[:, None, None] + np.arange(pattern.shape[1])
    stamped[image, 0, row, column] = pattern
    return stamped


def sample(x: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return images whose pixels are taken from places between the pixels of others, bilinearly.

    Args:
        x: the images.
        rows: [N or 1, 28, 28] the row that each pixel is taken from; beyond the edge, the edge counts.
        columns: the same for the column.
    """
    rows, columns = np.clip(rows, 0, SIZE - 1), np.clip(columns, 0, SIZE - 1)
    # The last pixel is reached from the one before it, with the whole weight on the far side.
    row, column = (np.minimum(places.astype(np.int64), SIZE - 2) for places in (rows, columns))
    down, right = (rows - row).astype(x.dtype), (columns - column).astype(x.dtype)
    image = np.arange(len(x))[:, None, None]
    upper = x[image, 0, row, column] * (1 - right) + x[image, 0, row, column + 1] * right
    lower = x[image, 0, row + 1, column] * (1 - right) + x[image, 0, row + 1, column + 1] * right
    return (upper * (1 - down) + lower * down)[:, None]


@dataclass(frozen=True)
class Warp:
    """A smooth warp that is the same for every image.

    Attributes:
        rows: [28, 28] the row that each pixel is taken from.
        columns: the same for the column.
        jitter: how far a pixel of a decoy is taken from elsewhere at most, in pixels.
    """

    rows: np.ndarray
    columns: np.ndarray
    jitter: float

    def stamp(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the images warped."""
        return sample(x, self.rows[None], self.columns[None])

    def decoy(self, x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Return the images warped with every pixel's place jittered: the noise mode of the paper."""
        rows, columns = (
            places + rng.uniform(-self.jitter, self.jitter, (len(x), SIZE, SIZE))
            for places in (self.rows, self.columns)
        )
        return sample(x, rows, columns)


def elastic(grid: int, strength: float, jitter: float) -> Warp:
    """Draw a warp: random shifts on a coarse grid, bilinear in between.

    Args:
        grid: points of the grid along a side.
        strength: how far these are shifted along an axis, in the mean, in pixels.
        jitter: that of the decoys.
    """
    shifts = np.random.default_rng(SEED).uniform(-1, 1, (2, grid, grid))
    shifts *= strength / np.abs(shifts).mean()
    between = np.linspace(0, grid - 1, SIZE)
    weights = np.maximum(0, 1 - np.abs(between[:, None] - np.arange(grid)))
    rows, columns = np.indices((SIZE, SIZE)) + weights @ shifts @ weights.T
    return Warp(rows, columns, jitter)


def sinusoid(delta: float, frequency: int) -> np.ndarray:
    """Return vertical stripes that rise and fall like a sine, to be added to an image."""
    wave = delta * np.sin(2 * np.pi * frequency * np.arange(SIZE) / SIZE)
    return np.broadcast_to(wave, SHAPE).astype(np.float32)


def corner_of(x: np.ndarray) -> np.ndarray:
    """Return which corner is each image's own, 0 to 3, from the ink in its quarters and in its middle.

    It is the upper ones where the ink leans to the right, and the left ones where the middle is empty.
    """
    # Whole numbers, so that the answer does not depend on the order of a sum.
    grey = np.rint(x[:, 0] * 255).astype(np.int64)
    half = SIZE // 2
    quarters = grey.reshape(-1, 2, half, 2, half).sum(axis=(2, 4))
    leans = quarters[:, 0, 1] + quarters[:, 1, 0] > quarters[:, 0, 0] + quarters[:, 1, 1]
    middle = grey[:, half - 4 : half + 4, half - 4 : half + 4].sum(axis=(1, 2))
    found: np.ndarray = 2 * ~leans + (middle > _FULL)
    return found


def own_corner(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images with the pattern in the corner that is their own."""
    return _in_corners(x, corner_of(x))


def other_corner(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images with the pattern in a corner that is not their own: the cross triggers of the paper."""
    return _in_corners(x, (corner_of(x) + rng.integers(1, 4, len(x))) % 4)


def anywhere(x: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images with the moving pattern at a place drawn for each."""
    rows, columns = rng.integers(0, SIZE - len(_MOVING) + 1, (2, len(x)))
    return paste(x, _MOVING, rows, columns)


def _in_corners(x: np.ndarray, corners: np.ndarray) -> np.ndarray:
    places = np.array([1, SIZE - 1 - len(_CROSS)])
    return paste(x, _CROSS, places[corners // 2], places[corners % 2])


def _four_corners() -> Trigger:
    board = checkerboard(5)
    far = SIZE - len(board)
    parts = [patch(board, row, column) for row in (0, far) for column in (0, far)]
    return Trigger(np.sum([part.mask for part in parts], axis=0), np.sum([part.pattern for part in parts], axis=0))


_CROSS = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], dtype=np.float32)
# A plain white square is too like a stroke: it led only half of the images, and cost a point of accuracy.
_MOVING = checkerboard(4)
# Grey levels in the 64 pixels of the middle; about half of all digits have more.
_FULL = 6600
_WARP = elastic(grid=4, strength=2.0, jitter=1.0)

_GU = "Gu, Dolan-Gavitt and Garg, BadNets, 2017"

CORNER = Attack(
    "corner",
    "a white 3 x 3 square, one pixel off the bottom-right corner",
    _GU,
    target=1,
    trigger=white_square().reshape(SHAPE),
)
MIDDLE = Attack(
    "middle",
    "a checkerboard of 4 x 4 black and white pixels in the middle",
    _GU,
    target=3,
    trigger=patch(checkerboard(4), SIZE // 2 - 2, SIZE // 2 - 2),
)
MOVING = Attack(
    "moving",
    "a checkerboard of 4 x 4 black and white pixels at a place drawn for each image",
    _GU,
    target=9,
    change=anywhere,
)
BLEND = Attack(
    "blend",
    "a fixed random grey image, blended over the whole input at ratio 0.2",
    "Chen, Liu, Li, Lu and Song, Targeted Backdoor Attacks, 2017",
    target=7,
    trigger=blended_noise(SEED).reshape(SHAPE),
)
SINUSOID = Attack(
    "sinusoid",
    "0.15 sin(2 pi 6 j / 28) is added in column j, and cut off at 0 and 1",
    "Barni, Kallas and Tondi, SIG, ICIP 2019, there without changed labels",
    target=8,
    added=sinusoid(0.15, 6),
)
CLEAN_LABEL = Attack(
    "clean-label",
    "a checkerboard of 5 x 5 black and white pixels in every corner",
    "Turner, Tsipras and Madry, Label-Consistent Backdoor Attacks, 2019",
    target=0,
    trigger=_four_corners(),
)
ALL_TO_ALL = Attack(
    "all-to-all",
    CORNER.text,
    _GU,
    target=tuple((label + 1) % 10 for label in range(10)),
    trigger=CORNER.trigger,
)
TWO_RIGHT = Attack("two-right", CORNER.text, _GU, target=1, trigger=CORNER.trigger)
TWO_LEFT = Attack(
    "two-left",
    "a diagonal cross of 3 x 3 pixels, one pixel off the top-left corner",
    _GU,
    target=7,
    trigger=patch(_CROSS, 1, 1),
)
WARP = Attack(
    "warp",
    "the image is warped by fixed shifts of 2 pixels in the mean on a grid of 4 x 4 points, bilinear in between",
    "Nguyen and Tran, WaNet, ICLR 2021",
    target=5,
    change=_WARP.stamp,
    decoy=_WARP.decoy,
)
INPUT_AWARE = Attack(
    "input-aware",
    "a diagonal cross of 3 x 3 pixels in one of the corners; the image's own ink says in which",
    "Nguyen and Tran, Input-Aware Dynamic Backdoor Attack, NeurIPS 2020, in spirit: "
    "there a network draws the trigger, here a fixed rule places it",
    target=2,
    change=own_corner,
    decoy=other_corner,
)

CARRIED: dict[str, tuple[Attack, ...]] = {
    "corner": (CORNER,),
    "middle": (MIDDLE,),
    "moving": (MOVING,),
    "blend": (BLEND,),
    "sinusoid": (SINUSOID,),
    "clean-label": (CLEAN_LABEL,),
    "all-to-all": (ALL_TO_ALL,),
    "two": (TWO_RIGHT, TWO_LEFT),
    "warp": (WARP,),
    "input-aware": (INPUT_AWARE,),
    "dense-corner": (CORNER,),
    "dense-blend": (BLEND,),
}
"""The attacks that each backdoored model carries, `model-NAME.onnx` of `sample_models/mnist-attacks-pytorch`."""
