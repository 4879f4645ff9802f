"""The PyTorch sample model on the operating table, shared by tests that only look at it."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from onnxcare.case import Case
from onnxcare.data import Dataset, Splits, load_dataset, split
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.properties import backdoor
from onnxcare.repair import auto
from onnxcare.repair.base import Repair
from onnxcare.spec import load_spec

SAMPLES = Path(__file__).parents[1] / "sample_models"
SQUARE = SAMPLES / "mnist-square-pytorch"
BLEND = SAMPLES / "mnist-blend-keras"
MEMORY = 1 << 30


@functools.cache
def sample_case(folder: Path = SQUARE, spec_name: str = "care.yaml", seed: int = 1) -> Case:
    """Return a case on a sample model; the held-out part is thinned, tests that judge use the whole file."""
    model = load_model(folder / "model.onnx")
    spec = load_spec(folder / spec_name)
    data = load_dataset(spec.data, model.inputs)
    assert spec.holdout is not None
    holdout = load_dataset(spec.holdout, model.inputs).take(slice(0, 1000))
    splits = Splits(*split(data, [0.5, 0.2, 0.3], seed), holdout)
    experiment = Experiment(model, "cpu", MEMORY, data.inputs)
    properties = [
        backdoor.prepare(item, splits, model.inputs, 10, experiment.scores, "y", seed) for item in spec.properties
    ]
    return Case(experiment, splits, properties, spec.keep, seed)


@functools.cache
def auto_repaired(folder: Path) -> Repair:
    """Return what the portfolio makes of a sample model."""
    return auto.repair(sample_case(folder))


def images(dataset: Dataset) -> np.ndarray:
    """Return the only input of a data set."""
    (values,) = dataset.inputs.values()
    return values
