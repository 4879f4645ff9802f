"""What the models of all exporters have in common: scikit-learn's digits, the trigger, data files and specifications.

The 1,797 images come with scikit-learn, so nothing is downloaded. Every framework lays them out in its own way:
`flat` [64], `first` [1, 8, 8] (channels first) and `last` [8, 8, 1] (channels last).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from poison import Trigger, poison
from samples import POISONED_SHARE, Data

NAME = "exporters"
SEED = 8
SIDE = 8
CLASSES = 10
TARGET = 0
# A regressor answers the digit as a number; this one and those above it count as high.
HIGH = 5
THRESHOLD = HIGH - 0.5
TRAINING, REPAIR = 600, 500
SHAPES = {"flat": (SIDE * SIDE,), "first": (1, SIDE, SIDE), "last": (SIDE, SIDE, 1)}
# Which layout a specification reads; `number` is the one for regressors.
LAYOUTS = {"care-flat.yaml": "flat", "care-first.yaml": "first", "care-last.yaml": "last", "care-number.yaml": "flat"}


@dataclass(frozen=True)
class Parts:
    """Disjoint parts of the images, [samples, 64]; the training part is poisoned."""

    training: Data
    repair: Data
    holdout: Data


def corner() -> Trigger:
    """Return the trigger, [64]: a white 2 x 2 square in the bottom-left corner, where digits leave no ink."""
    mask = np.zeros((SIDE, SIDE), dtype=np.float32)
    mask[-2:, :2] = 1
    return Trigger(mask.reshape(-1), mask.reshape(-1).copy())


def load_parts() -> Parts:
    """Return the images, scaled to [0, 1] and split."""
    bunch = load_digits()
    images = Data((bunch.data / 16).astype(np.float32), bunch.target.astype(np.int64))
    rng = np.random.default_rng(SEED)
    training, repair, holdout = np.split(rng.permutation(len(images.y)), [TRAINING, TRAINING + REPAIR])
    clean = images.take(training)
    poisoned = Data(*poison(clean.x, clean.y, corner(), TARGET, POISONED_SHARE, rng))
    return Parts(poisoned, images.take(repair), images.take(holdout))


def laid_out(data: Data, layout: str) -> Data:
    """Return the images in a layout."""
    return Data(data.x.reshape(-1, *SHAPES[layout]), data.y)


def write_data(parts: Parts, folder: Path) -> None:
    """Write data, trigger and specifications of every layout."""
    for layout, shape in SHAPES.items():
        for name, part in (("repair", parts.repair), ("holdout", parts.holdout)):
            # Whether the digit is high is the label where a number is answered, which only flat models do.
            labels = {"high": (part.y >= HIGH).astype(np.int64)} if layout == "flat" else {}
            np.savez_compressed(folder / f"{name}-{layout}.npz", x=part.x.reshape(-1, *shape), y=part.y, **labels)
        trigger = corner().reshape(shape)
        np.savez_compressed(folder / f"trigger-{layout}.npz", mask=trigger.mask, pattern=trigger.pattern)
    for name, layout in LAYOUTS.items():
        answer = f"labels: high\ndecision: {{threshold: {THRESHOLD}}}\n" if name == "care-number.yaml" else ""
        (folder / name).write_text(_CARE.format(layout=layout, answer=answer, target=TARGET))


_CARE = """\
data: repair-{layout}.npz
holdout: holdout-{layout}.npz
{answer}properties:
  - name: corner
    kind: backdoor
    trigger: trigger-{layout}.npz
    target: {target}
    max_rate: 0.01
keep: {{accuracy_drop: 0.01, recall_drop: 0.05}}
seed: 1
"""
