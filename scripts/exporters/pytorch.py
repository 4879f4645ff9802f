"""PyTorch: one convolutional network, written by the TorchScript-based exporter and by the dynamo exporter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import torch_models
from exporters.catalogue import files
from exporters.digits import CLASSES, SEED, SHAPES, Parts, laid_out
from torch_models import Recipe

VERSIONS = {"torch": torch.__version__}
MODELS = files("pytorch")
RECIPE = Recipe(seed=SEED, epochs=30, batch=32, rate=1e-2)
# What the exporter of this version takes where nothing is said.
OPSET = 20


def build() -> nn.Module:
    """Return the untrained network."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, CLASSES),
    )


def write(parts: Parts, folder: Path) -> None:
    """Train the network, and write it twice."""
    torch.set_num_threads(1)
    network = torch_models.train(build, laid_out(parts.training, "first"), RECIPE)
    torchscript, dynamo = (folder / name for name in MODELS)
    torch_models.export(network, SHAPES["first"], torchscript, opset=OPSET)
    # The weights go into a file of their own beside the model: that is what this exporter does unless told otherwise.
    torch.onnx.export(
        network,
        (torch.zeros(2, *SHAPES["first"]),),
        dynamo,
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
