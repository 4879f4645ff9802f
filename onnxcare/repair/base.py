"""What repair methods, and the strategies that `auto` combines, give back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcare.case import Case
from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Outcome

Array = np.ndarray
Values = Mapping[Parameter, Array]


@dataclass(frozen=True)
class Candidate:
    """One candidate repair, as measured on validation data."""

    label: str
    outcome: Outcome


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
        notes: what the user should know, in whole sentences.
    """

    method: str
    values: Values
    chosen: Candidate
    candidates: Sequence[Candidate]
    details: Mapping[str, Any]
    notes: Sequence[str] = ()


def best_of(
    method: str, case: Case, found: Sequence[Found], details: Mapping[str, Any], notes: Sequence[str] = ()
) -> Repair:
    """Return the best candidate as a repair; no change at all competes too."""
    unchanged = Candidate("no change", case.before)
    best = min(found, key=lambda item: item.candidate.outcome.rank)
    candidates = [unchanged, *(item.candidate for item in found)]
    if unchanged.outcome.rank <= best.candidate.outcome.rank:
        return Repair(method, {}, unchanged, candidates, details, notes)
    return Repair(method, best.make(), best.candidate, candidates, details, notes)
