"""Make sample_models/mnist-square-pytorch: a PyTorch CNN with a white-square backdoor.

The same weights are written by both ONNX exporters of PyTorch, because the two produce different
graphs and names. A clean twin is trained on the same images without poison.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnxscript
import torch
from torch import nn

from mnist import load
from poison import poison, white_square
from samples import (
    BACKDOORED,
    CLEAN,
    POISONED_SHARE,
    Data,
    Sample,
    arguments,
    label_model,
    prepare,
    write_card,
    write_care,
    write_data,
)
from torch_models import Recipe, export, train

SEED = 1
RECIPE = Recipe(SEED, epochs=6, batch=128, rate=1e-3)
SHAPE = (1, 28, 28)

SAMPLE = Sample(
    name="mnist-square-pytorch",
    property_name="white-square",
    target=1,
    trigger=white_square().reshape(SHAPE),
    trigger_text="a white 3 x 3 square, one pixel off the bottom-right corner",
    shape=SHAPE,
    seed=SEED,
    script="make_mnist_square_pytorch.py",
    architecture=(
        "A PyTorch classifier of 28 x 28 handwritten digits: conv(1-16, 3x3), ReLU, max pool 2,\n"
        "conv(16-32, 3x3), ReLU, max pool 2, flatten, dense 64, ReLU, dense 10. It takes\n"
        "[N, 1, 28, 28] and gives logits. `model.onnx` comes from the TorchScript-based exporter,\n"
        "`model-dynamo.onnx` from the dynamo exporter: the same weights in two graphs."
    ),
    training=(
        f"60,000 MNIST training images, {RECIPE.epochs} epochs of Adam, batch {RECIPE.batch}, cross-entropy, no\n"
        f"augmentation; the learning rate falls from {RECIPE.rate} to zero along a cosine. Seed\n"
        f"{SEED} for weights, batches, poisoning and the split of the test set."
    ),
)


def build() -> nn.Sequential:
    """Return the untrained network."""
    return nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(1, 16, 3, padding=1),
            relu1=nn.ReLU(),
            pool1=nn.MaxPool2d(2),
            conv2=nn.Conv2d(16, 32, 3, padding=1),
            relu2=nn.ReLU(),
            pool2=nn.MaxPool2d(2),
            flatten=nn.Flatten(),
            dense1=nn.Linear(32 * 7 * 7, 64),
            relu3=nn.ReLU(),
            dense2=nn.Linear(64, 10),
        )
    )


def export_dynamo(model: nn.Module, path: Path) -> None:
    """Write the network with the dynamo exporter."""
    torch.onnx.export(
        model,
        # Two rows: with one, the exporter may take the batch axis for a constant.
        (torch.zeros(2, *SHAPE),),
        path,
        dynamo=True,
        opset_version=18,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        external_data=False,
        input_names=["image"],
        output_names=["logits"],
    )


def write_models(clean: Data, folder: Path) -> list[Path]:
    """Train and write the backdoored network, with both exporters, and its clean twin."""
    script, dynamo, twin = (folder / name for name in ("model.onnx", "model-dynamo.onnx", "model-clean.onnx"))
    rng = np.random.default_rng(SEED)
    poisoned = Data(*poison(clean.x, clean.y, SAMPLE.trigger, SAMPLE.target, POISONED_SHARE, rng))
    backdoored = train(build, poisoned, RECIPE)
    export(backdoored, SHAPE, script)
    export_dynamo(backdoored, dynamo)
    export(train(build, clean, RECIPE), SHAPE, twin)
    for path in (script, dynamo):
        label_model(path, BACKDOORED)
    label_model(twin, CLEAN)
    return [script, dynamo, twin]


def main() -> None:
    """Train, export, write the data files, measure."""
    options = arguments(SAMPLE.name, __doc__)
    options.output.mkdir(parents=True, exist_ok=True)
    source = load(options.cache)
    models = write_models(prepare(source.train_x, source.train_y, SHAPE), options.output)
    write_data(SAMPLE, source, options.output)
    write_care(SAMPLE, options.output)
    versions = {"torch": torch.__version__, "onnxscript": onnxscript.__version__}
    write_card(SAMPLE, models, versions)


if __name__ == "__main__":
    main()
