"""onnxcare finds the hidden units that make an ONNX model misbehave, and rewrites only the weights that carry it.

    >>> import onnxcare
    >>> result = onnxcare.fix("model.onnx", "care.yaml", "repaired.onnx")
    >>> result.status
    'repaired'

The functions are imported on first use, so that importing the package, and `onnxcare --help`, stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from onnxcare._version import __version__

if TYPE_CHECKING:
    from onnxcare.api import check, fix, inspect, load, locate
    from onnxcare.pool import Pool

__all__ = ["Pool", "__version__", "check", "fix", "inspect", "load", "locate"]


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for."""
    if name in __all__:
        return getattr(import_module("onnxcare.pool" if name == "Pool" else "onnxcare.api"), name)
    raise AttributeError(f"module 'onnxcare' has no attribute {name!r}")
