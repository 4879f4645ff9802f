"""What repair methods, and the strategies that `auto` combines, give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Outcome

Array = np.ndarray
Values = Mapping[Parameter, Array]


@dataclass(frozen=True)
class Edit:
    """How large a change is.

    Attributes:
        tensors: the tensors it touches.
        values: how many of their values differ from the original's.
        rank: the largest rank of a tensor's change, seen as a matrix [outputs, everything else].
        norm: Euclidean norm of the change, relative to that of the tensors' original values.
    """

    tensors: tuple[str, ...]
    values: int
    rank: int
    norm: float


@dataclass(frozen=True)
class Candidate:
    """One candidate repair, as measured on validation data.

    Attributes:
        label: how it was made.
        outcome: how it did.
        edit: its size; None for no change, and until candidates are compared.
    """

    label: str
    outcome: Outcome
    edit: Edit | None = None


@dataclass(frozen=True)
class Found:
    """A candidate, and how to get the values it stands for.

    Attributes:
        candidate: how it did.
        make: returns the new values of the parameters it changes; only the chosen candidate is asked.
    """

    candidate: Candidate
    make: Callable[[], Values]


@dataclass(frozen=True)
class Proposals:
    """What a strategy offers.

    Attributes:
        found: the candidates; none where the strategy cannot help.
        details: what the report should say about how they were found.
    """

    found: Sequence[Found] = ()
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Repair:
    """What a method found.

    Attributes:
        method: its name.
        values: new values of the parameters it changes; empty if nothing was better than no change.
        chosen: the candidate the values stand for.
        candidates: everything that was compared on validation data, the chosen one included.
        details: what else the report should say about how it was found.
        front: the candidates that no other one beats in everything.
        notes: what the user should know, in whole sentences.
    """

    method: str
    values: Values
    chosen: Candidate
    candidates: Sequence[Candidate]
    details: Mapping[str, Any]
    front: Sequence[Candidate] = ()
    notes: Sequence[str] = ()
