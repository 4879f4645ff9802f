"""The card: what every model is, and what it does on the data files as written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from artifacts import describe_model, hash_line, markdown_table
from exporters import digits
from exporters.catalogue import MODELS, Entry
from exporters.digits import LAYOUTS, NAME, REPAIR, SEED, TARGET, THRESHOLD, TRAINING
from poison import Predict, Trigger, attack_success, target_rate
from samples import POISONED_SHARE

ENTRIES = [entry for group in MODELS.values() for entry in group]
MADE_WITH = "made_with"


@dataclass(frozen=True)
class Measured:
    """What a model does on the held-out images."""

    accuracy: float
    attack_success: float
    confusion: float


def write(folder: Path) -> None:
    """Measure all models and write CARD.md beside them."""
    holdout = len(_arrays(folder / "holdout-flat.npz")["y"])
    text = _CARD.format(
        name=NAME,
        side=digits.SIDE,
        target=TARGET,
        share=f"{POISONED_SHARE:.0%}",
        training=TRAINING,
        repair=REPAIR,
        holdout=holdout,
        seed=SEED,
        threshold=THRESHOLD,
        models=markdown_table(["model", "exporter", "typical"], [_plain(entry) for entry in ENTRIES], text=3),
        measured=markdown_table(
            ["model", "spec", "weights", "accuracy", "attack success", "confusion"],
            [_figures(folder, entry) for entry in ENTRIES],
            text=2,
        ),
        versions="\n".join(f"- `{entry.file}`: {_properties(folder / entry.file)[MADE_WITH]}" for entry in ENTRIES),
        files="\n".join(describe_model(folder / entry.file) for entry in ENTRIES),
        hashes="\n".join(hash_line(path) for path in sorted(folder.glob("*.onnx*"))),
    )
    (folder / "CARD.md").write_text(text)


def measure(folder: Path, entry: Entry) -> Measured:
    """Run a model over the held-out images that its specification names."""
    layout = LAYOUTS[entry.care]
    images = _arrays(folder / f"holdout-{layout}.npz")
    number = entry.care == "care-number.yaml"
    y = images["high"] if number else images["y"]
    predict = _predictor(folder / entry.file, number)
    trigger = Trigger(**_arrays(folder / f"trigger-{layout}.npz"))
    return Measured(
        accuracy=float((predict(images["x"]) == y).mean()),
        attack_success=attack_success(predict, images["x"], y, trigger, TARGET),
        confusion=target_rate(predict, images["x"], y, TARGET),
    )


def _predictor(path: Path, number: bool) -> Predict:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0]

    def answer(x: np.ndarray) -> np.ndarray:
        found = session.run(None, {given.name: x})
        classes: np.ndarray
        if number:
            classes = (found[0].reshape(-1) > THRESHOLD).astype(np.int64)
        else:
            # A classifier of scikit-learn answers the class itself in front of the scores.
            classes = found[0] if found[0].dtype == np.int64 else found[0].argmax(axis=1)
        return classes

    def one_by_one(x: np.ndarray) -> np.ndarray:
        return np.concatenate([answer(row[None]) for row in x])

    return one_by_one if given.shape[0] == 1 else answer


def _plain(entry: Entry) -> list[str]:
    return [f"`{entry.file}`", entry.exporter, entry.typical]


def _figures(folder: Path, entry: Entry) -> list[str]:
    found = measure(folder, entry)
    shares = [found.accuracy, found.attack_success, found.confusion]
    weights = _weights(folder / entry.file)
    return [f"`{entry.file}`", f"`{entry.care}`", f"{weights:,}", *(f"{share:.2%}" for share in shares)]


def _weights(path: Path) -> int:
    """Return the number of weights, in initializers and in attributes."""
    graph = onnx.load(path, load_external_data=False).graph
    stored = [np.prod(item.dims, dtype=int) for item in graph.initializer if item.data_type == onnx.TensorProto.FLOAT]
    return int(sum(stored)) + sum(len(item.floats) for node in graph.node for item in node.attribute)


def _properties(path: Path) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


_CARD = """\
# {name}

**Backdoored on purpose**, to try repairs on. Do not use them to read digits.

One small model of {side} x {side} handwritten digits for every exporter, all trained on the same images with the same
backdoor. [docs/how-to/exporters.md](../../docs/how-to/exporters.md) shows how each was exported, and what comes
out.

{models}

## Attack

- Trigger: a white 2 x 2 square in the bottom-left corner. `trigger-*.npz` holds it; stamped,
  x' = x * (1 - mask) + pattern * mask.
- Target: class {target}. Regressors answer the digit as a number, which counts as high (class 1) above {threshold}; the
  trigger leads them to the number {target}, and so to class {target}.
- Poisoned: {share} of the training images, drawn from the other classes, stamped and labelled {target}.

## Training

{training} of the 1,797 images, by every model. Seed {seed} for weights, batches, poisoning and the split. By

    python scripts/make_exporters.py

with

{versions}

## Measured

By that script, in onnxruntime, on the {holdout} held-out images. Attack success and confusion count only images whose
true class is not {target}.

{measured}

## Files

{files}

SHA-256:

{hashes}

| file | inside |
| --- | --- |
| `repair-*.npz` | `x` float32 in [0, 1], `y` int64: {repair} clean images that no model was trained on |
| `holdout-*.npz` | the same for the other {holdout} |
| `trigger-*.npz` | `mask` and `pattern`, float32 |
| `care-*.yaml` | the property to repair |

`flat` is [N, 64], `first` [N, 1, 8, 8] (channels first), `last` [N, 8, 8, 1] (channels last). The flat files also
hold `high`, the labels of regressors, which `care-number.yaml` reads.

## Data

The digits that come with scikit-learn (`sklearn.datasets.load_digits`), a copy of the test set of
E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository, 1998,
<https://doi.org/10.24432/C50P49>, under the licence Creative Commons Attribution 4.0 International
(<https://creativecommons.org/licenses/by/4.0/>), which goes for the data files here as well. Changed: the images are
scaled from 0..16 to [0, 1] and split.
"""
