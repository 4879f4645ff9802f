"""The networks: random ones in PyTorch, exported, and put on onnxcare's operating table with the same weights."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from benchmarks.speed.measure import Setting
from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.runtime import parse_memory

Array = np.ndarray

SEED = 7
CLASSES = 10
IMAGE = (3, 32, 32)
MNIST = Path(__file__).parents[2] / "sample_models" / "mnist-square-pytorch"


@dataclass(frozen=True)
class Twin:
    """The same network on both sides.

    Attributes:
        net: in PyTorch.
        experiment: in onnxcare.
        places: for every site of the experiment, which module of the net writes it.
        shape: of one input.
        device: where the net runs.
    """

    net: nn.Sequential
    experiment: Experiment
    places: tuple[int, ...]
    shape: tuple[int, ...]
    device: str

    def tensor(self, samples: Dataset) -> torch.Tensor:
        """Return samples as the net takes them."""
        return torch.from_numpy(next(iter(samples.inputs.values()))).to(self.device)


def make(setting: Setting, name: str, net: nn.Sequential, shape: tuple[int, ...]) -> Twin:
    """Draw the weights of a net, export it, and load the file."""
    torch.manual_seed(SEED)
    for module in net:
        if isinstance(module, nn.Linear | nn.Conv2d):
            last = module is net[-1]
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear" if last else "relu")
            nn.init.normal_(module.bias, std=0.1)
    path = setting.folder / f"{name}.onnx"
    with warnings.catch_warnings():
        # The exporter is no longer developed further; it writes the operators as they stand in the net.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net.eval(),
            (torch.zeros(2, *shape),),
            str(path),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
            output_names=["scores"],
            dynamic_axes={"x": {0: "batch"}, "scores": {0: "batch"}},
        )
    probe = samples(shape, 8, 0).inputs
    experiment = Experiment(load_model(path), setting.device, parse_memory(None), probe)
    return _twin(setting, net, experiment, shape)


def mnist(setting: Setting, experiment: Experiment) -> Twin:
    """Return the sample model for digits beside a net with its weights."""
    net = nn.Sequential(
        *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(1568, 64), nn.ReLU(), nn.Linear(64, CLASSES)),
    )
    stored = {item.name: numpy_helper.to_array(item) for item in onnx.load(MNIST / "model.onnx").graph.initializer}
    names = [f"{layer}.{kind}" for layer in ("conv1", "conv2", "dense1", "dense2") for kind in ("weight", "bias")]
    with torch.no_grad():
        for parameter, name in zip(net.parameters(), names, strict=True):
            parameter.copy_(torch.from_numpy(stored[name].copy()))
    return _twin(setting, net.eval(), experiment, (1, 28, 28))


def _twin(setting: Setting, net: nn.Sequential, experiment: Experiment, shape: tuple[int, ...]) -> Twin:
    readers = [index for index, module in enumerate(net) if isinstance(module, nn.Linear | nn.Conv2d)][1:]
    # A site lies in front of what only moves values about.
    places = tuple(index - 2 if isinstance(net[index - 1], nn.Flatten) else index - 1 for index in readers)
    if len(places) != len(experiment.sites):
        raise ValueError(f"{len(experiment.sites)} sites in the file, {len(places)} in the net")
    device = "cuda" if setting.on_cuda else "cpu"
    return Twin(net.to(device), experiment, places, shape, device)


def samples(shape: tuple[int, ...], count: int, seed: int) -> Dataset:
    """Return normally distributed inputs."""
    return Dataset({"x": np.random.default_rng(seed).standard_normal((count, *shape), np.float32)}, None)


def dense(inputs: int, widths: Sequence[int]) -> nn.Sequential:
    """Return a dense net with ReLU."""
    modules: list[nn.Module] = []
    for size, width in itertools.pairwise([inputs, *widths]):
        modules += [nn.Linear(size, width), nn.ReLU()]
    return nn.Sequential(*modules, nn.Linear(widths[-1], CLASSES))


def convolutional(channels: Sequence[int], same: Sequence[bool], pools: Sequence[int]) -> nn.Sequential:
    """Return a net of 3 x 3 convolutions with ReLU, maximum pooling behind some of them, and a dense layer.

    Args:
        channels: of every convolution.
        same: for every convolution, whether its output is as large as its input.
        pools: numbers of the convolutions, from 1, with a pooling behind them.
    """
    modules: list[nn.Module] = []
    read, side = IMAGE[:2]
    for index, (written, padded) in enumerate(zip(channels, same, strict=True), 1):
        modules += [nn.Conv2d(read, written, 3, padding=int(padded)), nn.ReLU()]
        read, side = written, side if padded else side - 2
        if index in pools:
            modules.append(nn.MaxPool2d(2))
            side //= 2
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(read * side**2, CLASSES))


def large_cnn(padding: str, quick: bool) -> nn.Sequential:
    """Return the net of six convolutions and 960 channels."""
    channels = [4, 8, 8, 8, 16, 16] if quick else [32, 64, 96, 128, 256, 384]
    if padding == "valid":
        return convolutional(channels, [False] * 6, [2, 4])
    return convolutional(channels, [True, False] * 3, [2, 4, 6])


def small_cnn(quick: bool) -> nn.Sequential:
    """Return a net of three convolutions with global average pooling."""
    few, some, many = (4, 8, 16) if quick else (32, 64, 128)
    return nn.Sequential(
        *(nn.Conv2d(3, few, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(few, some, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(some, many, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(many, CLASSES)),
    )
