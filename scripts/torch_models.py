"""Train PyTorch classifiers of digits, and write them with the TorchScript-based exporter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from samples import Data


@dataclass(frozen=True)
class Recipe:
    """How to train a classifier with Adam and cross-entropy."""

    seed: int
    epochs: int
    batch: int
    rate: float


def train(build: Callable[[], nn.Module], data: Data, recipe: Recipe) -> nn.Module:
    """Train a network from its seeded start."""
    torch.manual_seed(recipe.seed)
    torch.use_deterministic_algorithms(True)
    model = build()
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.rate)
    # The rate falls to nearly zero, so that the last few batches do not decide the outcome.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    for epoch in range(recipe.epochs):
        losses = []
        for rows in torch.randperm(len(y)).split(recipe.batch):
            loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        schedule.step()
        print(f"epoch {epoch + 1}/{recipe.epochs}: loss {np.mean(losses):.4f}")
    return model.eval()


def export(model: nn.Module, shape: tuple[int, ...], path: Path, opset: int = 17, fold: bool = True) -> None:
    """Write a network as it stands.

    Args:
        model: the network, in evaluation mode.
        shape: of one input.
        path: the file to write.
        opset: the version of the operators.
        fold: let the exporter compute constants and fold normalisation into convolutions.
    """
    # In evaluation mode the exporter folds; told to preserve the mode it finds, it does not.
    mode = torch.onnx.TrainingMode.EVAL if fold else torch.onnx.TrainingMode.PRESERVE
    torch.onnx.export(
        model,
        (torch.zeros(2, *shape),),
        path,
        dynamo=False,
        opset_version=opset,
        dynamic_axes={"image": {0: "batch"}, "logits": {0: "batch"}},
        input_names=["image"],
        output_names=["logits"],
        training=mode,
        do_constant_folding=fold,
    )
