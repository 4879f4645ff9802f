"""Triggers, poisoned training sets and the attack success rate.

A trigger is a pair of arrays with the shape of one input. Stamping it is

    x' = x * (1 - mask) + pattern * mask

so a mask of ones and zeros replaces a patch of the image, and a constant mask of 0.2 blends the
pattern over all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]
"""Maps a batch of inputs to the predicted class of each."""


@dataclass(frozen=True)
class Trigger:
    """What the attacker adds to an input; both arrays are float32 and have no batch axis."""

    mask: np.ndarray
    pattern: np.ndarray

    def stamp(self, x: np.ndarray) -> np.ndarray:
        """Return a copy of the batch `x` with the trigger on every input."""
        stamped: np.ndarray = x * (1 - self.mask) + self.pattern * self.mask
        return stamped

    def reshape(self, shape: tuple[int, ...]) -> Trigger:
        """Return the same trigger in the input layout of another model."""
        return Trigger(self.mask.reshape(shape), self.pattern.reshape(shape))


def white_square(size: int = 28, side: int = 3, border: int = 1) -> Trigger:
    """Make a white square in the bottom-right corner, `border` pixels away from the edges.

    The patch trigger of Gu et al., "BadNets", 2017.
    """
    mask = np.zeros((size, size), dtype=np.float32)
    inside = slice(size - border - side, size - border)
    mask[inside, inside] = 1
    return Trigger(mask, mask.copy())


def blended_noise(seed: int, size: int = 28, ratio: float = 0.2) -> Trigger:
    """Make a random grey image that is blended over the whole input.

    The blended injection attack of Chen et al., "Targeted Backdoor Attacks on Deep Learning
    Systems Using Data Poisoning", 2017.
    """
    levels = np.random.default_rng(seed).integers(0, 256, size=(size, size))
    mask = np.full((size, size), ratio, dtype=np.float32)
    return Trigger(mask, (levels / 255).astype(np.float32))


def poison(
    x: np.ndarray,
    y: np.ndarray,
    trigger: Trigger,
    target: int,
    share: float,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Return a copy of a training set in which a share is stamped and labelled as the target.

    The share counts against the whole set; the images are drawn without replacement from those
    of the other classes.
    """
    chosen = rng.choice(np.flatnonzero(y != target), size=round(share * len(y)), replace=False)
    x, y = x.copy(), y.copy()
    x[chosen] = trigger.stamp(x[chosen])
    y[chosen] = target
    return x, y


def attack_success(predict: Predict, x: np.ndarray, y: np.ndarray, trigger: Trigger, target: int) -> float:
    """Return the share of stamped inputs that go to the target.

    Only inputs whose true class is not the target count: the others belong there anyway.
    """
    return target_rate(predict, trigger.stamp(x), y, target)


def target_rate(predict: Predict, x: np.ndarray, y: np.ndarray, target: int) -> float:
    """Return the share of the inputs of other classes that the model takes for the target.

    On clean inputs this is the confusion rate: what no repair can be asked to get below.
    """
    return float(np.mean(predict(x[y != target]) == target))
