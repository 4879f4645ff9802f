"""Results as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np


def render(result: Any) -> str:
    """Return a result object as indented JSON; NaN and infinity become null."""
    return json.dumps(_plain(result), indent=2, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        # What a result derives from its fields belongs to it: drops, costs, whether it passed.
        for name, item in vars(type(value)).items():
            if isinstance(item, property):
                found[name] = _plain(getattr(value, name))
        return found
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
