"""Which models there are, who writes them, and what is typical of them; no framework is imported for that."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A model of the sample.

    Attributes:
        file: its name.
        care: the specification that fits its inputs and outputs.
        exporter: who writes it.
        typical: what models of that exporter have in common.
    """

    file: str
    care: str
    exporter: str
    typical: str


MODELS: dict[str, tuple[Entry, ...]] = {
    "pytorch": (
        Entry(
            "pytorch-torchscript.onnx",
            "care-first.yaml",
            "PyTorch, `torch.onnx.export(..., dynamo=False)`",
            "Gemm and Conv, logits out",
        ),
        Entry(
            "pytorch-dynamo.onnx",
            "care-first.yaml",
            "PyTorch, `torch.onnx.export(...)`",
            "the same network with its weights in a file beside it, and a flatten to a fixed width",
        ),
    ),
    "tensorflow": (
        Entry(
            "keras-export.onnx",
            "care-last.yaml",
            'Keras 3, `model.export(..., format="onnx")`',
            "channels last in, MatMul and Add, a flatten that computes its shape, softmax inside",
        ),
        Entry(
            "keras-tf2onnx.onnx",
            "care-last.yaml",
            "the same network, `python -m tf2onnx.convert --keras`",
            "the same with colons in the names of inputs and outputs",
        ),
        Entry(
            "tensorflow-savedmodel.onnx",
            "care-flat.yaml",
            "TensorFlow, `python -m tf2onnx.convert --saved-model`",
            "MatMul and Add, names of TensorFlow's functions",
        ),
    ),
    "sklearn": (
        Entry(
            "sklearn-mlp-classifier.onnx",
            "care-flat.yaml",
            "scikit-learn `MLPClassifier`, skl2onnx",
            "a label, and probabilities as a list of maps (ZipMap)",
        ),
        Entry(
            "sklearn-mlp-regressor.onnx",
            "care-number.yaml",
            "scikit-learn `MLPRegressor`, skl2onnx",
            "one number, and a Reshape at the end",
        ),
        Entry(
            "sklearn-logistic-regression.onnx",
            "care-flat.yaml",
            "scikit-learn `StandardScaler` and `LogisticRegression`, skl2onnx",
            "weights in attributes (Scaler, LinearClassifier), softmax as a setting, ZipMap",
        ),
        Entry(
            "sklearn-linear-svc.onnx",
            "care-flat.yaml",
            "scikit-learn `StandardScaler` and `LinearSVC`, skl2onnx",
            "weights in attributes (Scaler, LinearClassifier), raw scores, an opset that is named twice",
        ),
        Entry(
            "sklearn-linear-regression.onnx",
            "care-number.yaml",
            "scikit-learn `LinearRegression`, skl2onnx",
            "weights in attributes (LinearRegressor), one number, a single node",
        ),
    ),
    "matlab": (
        Entry(
            "matlab.onnx",
            "care-first.yaml",
            "laid out as MATLAB's exporter does it",
            "IR 3, opset 8, weights listed as inputs, a batch of one sample, a mean image subtracted in front",
        ),
    ),
}
"""The models, by the environment that makes them."""


def files(group: str) -> tuple[str, ...]:
    """Return the names of the models of an environment."""
    return tuple(entry.file for entry in MODELS[group])
