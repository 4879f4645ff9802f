"""Choosing between candidates on validation data: by the limits, by a paired test, and then by the size of the edit.

1. The candidate of best rank (`Outcome.rank`) leads; no change at all competes.
2. It has to be told from chance: an exact paired test (McNemar) over the cases that it mends and spoils.
3. Of all that lose nothing against it on validation data, the smallest edit is taken; or the largest one, where the
   evidence only stands in for what nobody has seen, which a small edit that just does for the evidence would leave.

What is better in one respect only by being worse in another makes up the Pareto front: misbehaviour, accuracy, worst
recall, size of the edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from onnxcare.case import Case
from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Outcome
from onnxcare.repair.base import Candidate, Edit, Found, Repair, Values
from onnxcare.repair.bench import patched_outcome

Array = np.ndarray

# A change that is kept mends so much more than it spoils with at most this probability by chance alone.
_SIGNIFICANT = 0.05
# Costs within this factor, or this distance, are alike: divergences of a few hundred samples are no more exact.
_ALIKE, _CLOSE = 1.25, 1e-3
# Of larger matrices the rank of a change is not worked out.
_LARGEST_MATRIX = 1 << 18


@dataclass(frozen=True)
class Choice:
    """What was chosen.

    Attributes:
        candidate: the chosen one, or no change.
        values: its values, empty for no change.
        candidates: everything that was compared, with the sizes of the edits.
        note: why nothing was chosen, where something looked better than no change.
    """

    candidate: Candidate
    values: Values
    candidates: Sequence[Candidate]
    note: str | None = None


def choose(case: Case, found: Sequence[Found], unchanged: Candidate, earlier: Values | None = None) -> Choice:
    """Choose a candidate, see the module's docstring.

    Args:
        case: the model, and the original that edits are measured against.
        found: the candidates.
        unchanged: the model as it is.
        earlier: values that were changed before, which every candidate comes on top of.
    """
    known = [sized(case, item, earlier or {}) for item in found]
    allowed = [item for item in known if fits(case, item.candidate)]
    candidates = [item.candidate for item in allowed]
    if not allowed:
        return Choice(unchanged, {}, candidates, _too_large(case, known))
    best = min(allowed, key=lambda item: item.candidate.outcome.rank)
    outcome = best.candidate.outcome
    if unchanged.outcome.rank <= outcome.rank:
        return Choice(unchanged, {}, candidates)
    if outcome.luck is not None and outcome.luck > _SIGNIFICANT:
        note = f"The best change cannot be told from chance on validation data (paired test, p = {outcome.luck:.2g})."
        return Choice(unchanged, {}, candidates, note)
    alike = [item for item in allowed if _loses_nothing(item.candidate.outcome, outcome)]
    if any(item.stand_in for item in case.properties):
        taken = max(alike, key=lambda item: _norm(item.candidate))
    else:
        taken = min(alike, key=lambda item: _size(item.candidate))
    touched = taken.candidate.edit.tensors if taken.candidate.edit is not None else ()
    before = earlier or {}
    # A value that was changed before may have to be put back to the original's.
    values = {
        parameter: new for parameter, new in taken.make().items() if parameter.name in touched or parameter in before
    }
    return Choice(taken.candidate, values, candidates)


def best_of(
    method: str, case: Case, found: Sequence[Found], details: Mapping[str, Any], notes: Sequence[str] = ()
) -> Repair:
    """Return the chosen candidate as a repair; no change at all competes too."""
    unchanged = Candidate("no change", case.before)
    choice = choose(case, found, unchanged)
    candidates = [unchanged, *choice.candidates]
    told = [*notes, *([choice.note] if choice.note else [])]
    return Repair(method, choice.values, choice.candidate, candidates, details, pareto_front(candidates), told)


def pareto_front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the candidates that no other one beats or equals in everything, least misbehaviour first."""
    points = {id(item): _objectives(item) for item in candidates}
    front: list[Candidate] = []
    for item in candidates:
        mine = points[id(item)]
        beaten = any(
            all(theirs <= own for theirs, own in zip(points[id(other)], mine, strict=True))
            and (points[id(other)] != mine or other in front)
            for other in candidates
            if other is not item
        )
        if not beaten:
            front.append(item)
    return sorted(front, key=lambda item: points[id(item)])


def edit_of(case: Case, values: Values) -> Edit:
    """Return how large the change from the original to new values is."""
    experiment = case.original or case.experiment
    tensors: list[str] = []
    changed, rank, squares, total = 0, 0, 0.0, 0.0
    for parameter, new in values.items():
        old = experiment.read(parameter).astype(np.float64)
        difference = new.astype(parameter.dtype).astype(np.float64) - old
        if not difference.any():
            continue
        tensors.append(parameter.name)
        changed += int(np.count_nonzero(difference))
        squares += float((difference**2).sum())
        total += float((old**2).sum())
        # Rounding to the file's format errs by at most half a last digit of each value that is changed.
        rounding = float(np.finfo(parameter.dtype).eps / 2 * np.linalg.norm((old + difference)[difference != 0]))
        rank = max(rank, _rank(difference, rounding))
    return Edit(tuple(tensors), changed, rank, float(np.sqrt(squares / max(total, 1e-30))))


def _rank(difference: Array, rounding: float) -> int:
    """Return the rank of a change as a matrix, apart from what rounding (of such a norm) adds to it; 1 for vectors."""
    matrix = difference.reshape(len(difference), -1) if difference.ndim > 1 else difference.reshape(1, -1)
    if matrix.size > _LARGEST_MATRIX:
        return min(matrix.shape)
    values = np.linalg.svd(matrix, compute_uv=False)
    # The change itself is worked out in float32 in places.
    inexact = values.max(initial=0) * max(matrix.shape) * np.finfo(np.float32).eps
    return max(1, int((values > max(rounding, inexact)).sum()))


def sized(case: Case, item: Found, earlier: Values) -> Found:
    """Return a candidate as the file will hold it, and with the size of its edit.

    Where the file rounds what a candidate changes, it is measured again with what is left of it.

    Args:
        case: the model on the table.
        item: the candidate.
        earlier: values that were changed before, which it comes on top of.
    """
    if item.candidate.edit is not None:
        return item
    values = item.make()
    if not all(parameter.storage.exact for parameter in values):
        values = case.experiment.as_stored(values)
        outcome = patched_outcome(case, values, case.panel("validation"))
        item = Found(replace(item.candidate, outcome=outcome), partial(dict, values))
    together: Mapping[Parameter, Array] = {**earlier, **values}
    return replace(item, candidate=replace(item.candidate, edit=edit_of(case, together)))


def fits(case: Case, candidate: Candidate) -> bool:
    """Return whether a candidate changes no more values than is allowed."""
    return case.max_changed is None or (candidate.edit is not None and candidate.edit.values <= case.max_changed)


def _too_large(case: Case, found: Sequence[Found]) -> str | None:
    sizes = [item.candidate.edit.values for item in found if item.candidate.edit is not None]
    if not sizes:
        return None
    return f"No change of at most {case.max_changed} values was found; the smallest takes {min(sizes)}."


def _loses_nothing(one: Outcome, best: Outcome) -> bool:
    """Return whether an outcome is as good as the best one on everything that is counted, and about as close."""
    counted = [*zip(one.excess, best.excess, strict=True), (one.recall_drop, best.recall_drop)]
    counted += [(one.accuracy_drop, best.accuracy_drop), (one.broken, best.broken)]
    return all(mine <= other for mine, other in counted) and one.cost <= max(_ALIKE * best.cost, best.cost + _CLOSE)


def _size(candidate: Candidate) -> tuple[int, int, float]:
    assert candidate.edit is not None
    return candidate.edit.values, candidate.edit.rank, candidate.edit.norm


def _norm(candidate: Candidate) -> float:
    assert candidate.edit is not None
    return candidate.edit.norm


def _objectives(candidate: Candidate) -> tuple[float, ...]:
    outcome = candidate.outcome
    size = 0 if candidate.edit is None else candidate.edit.values
    return (sum(max(0.0, item) for item in outcome.excess), outcome.accuracy_drop, outcome.recall_drop, size)
