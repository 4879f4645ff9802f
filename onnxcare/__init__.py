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
    from onnxcare.files import apply, diff
    from onnxcare.pool import Pool

__all__ = ["Pool", "__version__", "apply", "check", "diff", "fix", "inspect", "load", "locate"]

_MODULES = {"Pool": "onnxcare.pool", "apply": "onnxcare.files", "diff": "onnxcare.files"}


def __getattr__(name: str) -> Any:
    """Import what is public when it is asked for."""
    if name in __all__:
        return getattr(import_module(_MODULES.get(name, "onnxcare.api")), name)
    raise AttributeError(f"module 'onnxcare' has no attribute {name!r}")
