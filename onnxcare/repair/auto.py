"""`--method auto`: a portfolio of strategies, and rounds of them.

A round asks the strategies that fit the case, the cheap and exact ones first, until one offers a candidate that keeps
every limit on validation data with ease; costly ones only where none keeps them at all. Where one settles a property
and others are left, the next ones go on from there. One of all candidates is chosen (`choice`). What it leaves (limits
that are still broken, or counterexamples that a fresh search finds) is worked on in the next round, on the changed
model, but still compared with the original. No change at all competes too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from onnxcare.backward import tunable
from onnxcare.case import Case
from onnxcare.errors import DataError, ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.graph.outside import why_none
from onnxcare.panel import Outcome
from onnxcare.repair import cascade, cut, directions, finetune, last_layer, network_finetune, neuron_finetune, recurrent
from onnxcare.repair.base import Candidate, Found, Repair, Values
from onnxcare.repair.choice import choose, fits, pareto_front, sized

_STRATEGIES = (cut, last_layer, recurrent, directions, cascade, finetune, network_finetune, neuron_finetune)
# They take minutes, where the others take seconds.
_COSTLY = (network_finetune, neuron_finetune)
# Another way to the same end as the strategy in front of it: it begins where that one began.
_ALTERNATIVE = (cascade,)
_ROUNDS = 3
# A further round has to keep every limit, or to bring the cost down to this share.
_WORTH = 0.5


def repair(case: Case) -> Repair:
    """Find the best change, see the module's docstring.

    Raises:
        ModelError: the model has no weights that can be rewritten, or no strategy could be tried.
    """
    if not tunable(case.experiment):
        experiment = case.experiment
        why = why_none(experiment.form.view, experiment.layers, "it has no Gemm, MatMul or Conv with constant weights")
        raise ModelError(f"{experiment.model.path}: no layer can be repaired: {why}")
    chosen = Candidate("no change", case.before)
    candidates, rounds, labels, notes = [chosen], [], [], []
    values: dict[Any, np.ndarray] = {}
    current = case
    for _ in range(_ROUNDS):
        try:
            found, details = _round(current, values)
        except ModelError:
            if not values:
                raise
            break  # what was found so far stands
        rounds.append(details)
        choice = choose(current, found, Candidate("unchanged", current.before), values)
        candidates += choice.candidates
        if choice.note is not None:
            notes.append(choice.note)
        if not choice.values or not _worth_it(choice.candidate.outcome, current.before, further=bool(values)):
            break
        values |= choice.values
        labels.append(choice.candidate.label)
        current = case.patched(values)
        chosen = replace(choice.candidate, label="; then ".join(labels))
        if chosen.outcome.kept and current.hunt() == 0:
            break
        current = case.patched(values)  # with what was found to be left
    # Strategies may have found evidence that was not known before.
    candidates[0] = Candidate("no change", case.before)
    chosen = chosen if values else candidates[0]
    return Repair("auto", values, chosen, candidates, {"rounds": rounds}, pareto_front(candidates), notes)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why no strategy can change a layer; None if one can."""
    return network_finetune.hindrance(anatomy, layer) if layer.tied else layer.refusal


def beside_layers(anatomy: Anatomy) -> list[str | None]:
    """Return what nodes write that some strategy changes beside layers."""
    return network_finetune.beside_layers(anatomy)


def _worth_it(found: Outcome, before: Outcome, further: bool) -> bool:
    """Return whether a change gains enough: what a further round gains on the same few samples may be luck."""
    return not further or found.kept or found.cost <= _WORTH * before.cost


def _round(case: Case, earlier: Values) -> tuple[list[Found], dict[str, Any]]:
    """Ask the strategies that fit, until one keeps every limit; behind one that settles a property, go on from it."""
    found: list[Found] = []
    details: dict[str, Any] = {}
    failure = ModelError(f"{case.experiment.model.path}: nothing is known that could repair such a property")
    after: tuple[Case, Found | None] = (case, None)
    before = after
    for strategy in _STRATEGIES:
        start, settled = before if strategy in _ALTERNATIVE else after
        if not strategy.applies(start) or (strategy in _COSTLY and any(_kept(case, item) for item in found)):
            continue
        before = start, settled
        name = strategy.__name__.rpartition(".")[2]
        start.progress(f"repairing by {name.replace('_', ' ')}")
        try:
            offered = strategy.propose(start)
        except (ModelError, DataError, np.linalg.LinAlgError) as error:
            details[name] = {"failed": str(error)}  # another strategy may do without what this one needs
            failure = error if isinstance(error, ModelError) else failure
            continue
        details[name] = dict(offered.details)
        here = [sized(case, _behind(settled, item), earlier) for item in offered.found]
        found += here
        if any(item.candidate.outcome.comfortable and fits(case, item.candidate) for item in here):
            break
        settling = [
            item for item in here if fits(case, item.candidate) and _settles(case, start.before, item.candidate.outcome)
        ]
        if settling:
            best = min(settling, key=lambda item: item.candidate.outcome.rank)
            after = case.patched(best.make()), best
    if not found:
        raise failure
    return found, details


def _kept(case: Case, item: Found) -> bool:
    return item.candidate.outcome.kept and fits(case, item.candidate)


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
