"""What every repair method gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Outcome

Array = np.ndarray


@dataclass(frozen=True)
class Candidate:
    """One candidate repair, as measured on validation data."""

    label: str
    outcome: Outcome


@dataclass(frozen=True)
class Repair:
    """What a method found.

    Attributes:
        method: its name.
        values: new values of the parameters it changes; empty if nothing was better than no change.
        chosen: the candidate the values stand for.
        candidates: everything that was compared on validation data, the chosen one included.
        details: what else the report should say about how it was found.
    """

    method: str
    values: Mapping[Parameter, Array]
    chosen: Candidate
    candidates: Sequence[Candidate]
    details: Mapping[str, Any]
