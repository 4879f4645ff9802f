"""The sample that `onnxcare demo` repairs."""

from __future__ import annotations

from pathlib import Path

from onnxcare.errors import ModelError

_SAMPLE = "mnist-square-pytorch"


def sample() -> Path:
    """Return the folder of the sample: inside an installed package, or beside it in a checkout.

    Raises:
        ModelError: the installation lacks it.
    """
    package = Path(__file__).parent
    for folder in (package / "_demo", package.parent / "sample_models" / _SAMPLE):
        if (folder / "model.onnx").is_file():
            return folder
    raise ModelError(f"the sample model {_SAMPLE} is missing from this installation of onnxcare")
