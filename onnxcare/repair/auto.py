"""`--method auto`: a portfolio of strategies, and rounds of them.

A round asks the strategies that fit the case, the cheap and exact ones first, until one offers a candidate that keeps
every limit on validation data; where one settles a property and others are left, the next ones go on from there. The
best of all candidates is taken. What it leaves (limits that are still broken, or
counterexamples that a fresh search finds) is worked on in the next round, on the changed model, but still compared
with the original. No change at all competes too.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import DataError, ModelError
from onnxcare.panel import Outcome
from onnxcare.repair import cut, directions, finetune, last_layer, neuron_finetune
from onnxcare.repair.base import Candidate, Found, Repair, Values

_STRATEGIES = (cut, last_layer, directions, finetune, neuron_finetune)
_ROUNDS = 3
# A further round has to keep every limit, or to bring the cost down to this share.
_WORTH = 0.5


def repair(case: Case) -> Repair:
    """Find the best change, see the module's docstring.

    Raises:
        ModelError: the model has no layer whose weights can be rewritten, or no strategy could be tried.
    """
    if all(layer.refusal is not None for layer in case.experiment.layers):
        reasons = [f"{layer.name}: {layer.refusal}" for layer in case.experiment.layers]
        why = "; ".join(reasons[:3]) or "it has no Gemm, MatMul or Conv with constant weights"
        raise ModelError(f"{case.experiment.model.path}: no layer can be repaired: {why}")
    chosen = Candidate("no change", case.before)
    candidates, rounds, labels = [chosen], [], []
    values: dict[Any, np.ndarray] = {}
    current = case
    for _ in range(_ROUNDS):
        try:
            found, details = _round(current)
        except ModelError:
            if not values:
                raise
            break  # what was found so far stands
        candidates += [item.candidate for item in found]
        rounds.append(details)
        best = min(found, key=lambda item: item.candidate.outcome.rank)
        if not _better(best.candidate.outcome, current.before, further=bool(values)):
            break
        values |= best.make()
        labels.append(best.candidate.label)
        current = case.patched(values)
        chosen = Candidate("; then ".join(labels), best.candidate.outcome)
        if best.candidate.outcome.violation == 0 and current.hunt() == 0:
            break
        current = case.patched(values)  # with what was found to be left
    # Strategies may have found evidence that was not known before.
    candidates[0] = Candidate("no change", case.before)
    chosen = chosen if values else candidates[0]
    return Repair("auto", values, chosen, candidates, {"rounds": rounds}, _notes(case, values))


def _better(found: Outcome, before: Outcome, further: bool) -> bool:
    """Return whether a change was worth it; what a further round gains on the same few samples may be luck."""
    if further and found.strain > 1 and found.cost > _WORTH * before.cost:
        return False
    return found.rank < before.rank


def _round(case: Case) -> tuple[list[Found], dict[str, Any]]:
    """Ask the strategies that fit, until one keeps every limit; behind one that settles a property, go on from it."""
    found: list[Found] = []
    details: dict[str, Any] = {}
    failure = ModelError(f"{case.experiment.model.path}: nothing is known that could repair such a property")
    start, settled = case, None
    for strategy in _STRATEGIES:
        if not strategy.applies(start):
            continue
        name = strategy.__name__.rpartition(".")[2]
        start.progress(f"repairing by {name.replace('_', ' ')}")
        try:
            offered = strategy.propose(start)
        except (ModelError, DataError, np.linalg.LinAlgError) as error:
            details[name] = {"failed": str(error)}  # another strategy may do without what this one needs
            failure = error if isinstance(error, ModelError) else failure
            continue
        details[name] = dict(offered.details)
        here = [_behind(settled, item) for item in offered.found]
        found += here
        if any(item.candidate.outcome.violation == 0 for item in here):
            break
        settling = [item for item in here if _settles(case, start.before, item.candidate.outcome)]
        if settling:
            settled = min(settling, key=lambda item: item.candidate.outcome.rank)
            start = case.patched(settled.make())
    if not found:
        raise failure
    return found, details


def _behind(first: Found | None, second: Found) -> Found:
    """Return a candidate that was worked out on top of another one, with the values of both."""
    if first is None:
        return second
    label = f"{first.candidate.label}; then {second.candidate.label}"
    return Found(Candidate(label, second.candidate.outcome), partial(_merged, first.make, second.make))


def _merged(first: Callable[[], Values], second: Callable[[], Values]) -> Values:
    return {**first(), **second()}


def _settles(case: Case, before: Outcome, after: Outcome) -> bool:
    """Return whether a property that broke its limit keeps it now."""
    limits = [item.max_rate for item in case.properties]
    return any(
        limit is not None and was > limit >= now
        for limit, was, now in zip(limits, before.excess, after.excess, strict=True)
    )


def _notes(case: Case, values: Values) -> list[str]:
    """Say how far the change reaches samples of the same kind that it was not fitted on, where it does not."""
    if not values:
        return []
    notes = []
    experiment = case.experiment.patched(values)
    for item in case.properties:
        if item.kind != "errors":
            continue
        rates = []
        for part in ("repair", "validation"):
            bad = item.evidence(part).bad
            rates.append(1 - float(item.rate(experiment.scores(bad.inputs), bad)))
        if item.max_rate is not None and 1 - rates[1] > item.max_rate:
            notes.append(
                f"{item.name}: these errors have no common cause that a change of weights could reach: the best change "
                f"mends {rates[0]:.0%} of the errors it was fitted on and {rates[1]:.0%} of others."
            )
    return notes
