"""Strategy: cutting protected columns out of the layers that read them, with imputation; for individual fairness.

At a layer that reads the protected columns P beside others O, with C, c the least squares of x_P on x_O and a constant,

    W_O += C W_P        b += c W_P        W_P = 0

so the layer does on average what it did, and no path of the graph leads from P to the answer any more: individual
discrimination is zero on every input, which `graph.influence` proves. Where the accuracy does not bear it, a share of
the cut is searched for every attribute by CMA-ES. Afterwards the other weights of the layer may make up for the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxcare import cmaes
from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.influence import Entry, trace
from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.properties.fairness import IndividualFairness
from onnxcare.properties.variation import Attribute
from onnxcare.repair.base import Candidate, Found, Proposals
from onnxcare.repair.bench import changed, matrix_of, patched_outcome, without_rows
from onnxcare.repair.finetune import Tuner

Array = np.ndarray

# Least squares on few, collinear columns: a little of the mean square on the diagonal keeps it steady.
_RIDGE = 1e-6
_SEARCHED_SAMPLES = 500
_TUNED_RATE, _TUNED_STEPS = 0.01, 200


@dataclass(frozen=True)
class _Cut:
    """What takes one attribute out of one layer."""

    attribute: Attribute
    layer: Layer
    columns: Array
    change: Array


def applies(case: Case) -> bool:
    """Return whether some property is about individuals."""
    return any(isinstance(item, IndividualFairness) for item in case.properties)


def propose(case: Case) -> Proposals:
    """Return the whole cut with and without imputation, partial cuts, and the whole cut fine-tuned.

    Raises:
        ModelError: something else than a Gemm or MatMul reads a protected column.
    """
    cuts, plain = _cuts(case, impute=True), _cuts(case, impute=False)
    if not cuts:
        return Proposals()
    panel = case.panel("validation")
    everything = np.ones(len(_names(cuts)))
    found = []
    for label, offered in (("imputed from the others", cuts), ("not imputed", plain)):
        values = _values(case, offered, everything)
        candidate = Candidate(f"{_where(cuts)} cut, {label}", patched_outcome(case, values, panel))
        found.append(Found(candidate, partial(_values, case, offered, everything)))
    found += _tuned(case, cuts, everything)
    details = {"layers": sorted({cut.layer.name for cut in cuts}), "attributes": _names(cuts)}
    if min(item.candidate.outcome.violation for item in found) > 0:
        shares = _search(case, cuts)
        told = ", ".join(f"{share:.0%} of {name}" for name, share in zip(_names(cuts), shares, strict=True))
        values = _values(case, cuts, shares)
        candidate = Candidate(f"{_where(cuts)} cut in part: {told}", patched_outcome(case, values, panel))
        found.append(Found(candidate, partial(_values, case, cuts, shares)))
    return Proposals(found, details)


def _cuts(case: Case, *, impute: bool) -> list[_Cut]:
    """Return what takes every protected attribute out of every layer that reads it."""
    by_input: dict[str, list[Attribute]] = {}
    for item in case.properties:
        if isinstance(item, IndividualFairness):
            known = by_input.setdefault(item.variation.input, [])
            for attribute in item.variation.attributes:
                # A column that several properties name is cut once, for the first of them.
                taken = np.concatenate([np.zeros(0, np.int64), *(other.columns for other in known)])
                fresh = ~np.isin(attribute.columns, taken)
                if fresh.any():
                    known.append(Attribute(attribute.name, attribute.columns[fresh], attribute.values[:, fresh]))
    return [cut for name, attributes in by_input.items() for cut in _cuts_of_input(case, name, attributes, impute)]


def _cuts_of_input(case: Case, name: str, attributes: Sequence[Attribute], impute: bool) -> list[_Cut]:
    experiment = case.experiment
    found = []
    everything = np.concatenate([item.columns for item in attributes]).tolist()
    together = trace(experiment.copy, name, everything, experiment.output)
    if together.reaches and together.obstacle is not None:
        raise ModelError(f"{experiment.model.path}: protected columns cannot be cut: {together.obstacle}")
    protected = {entry.layer.name: entry.columns for entry in together.entries}
    for attribute in attributes:
        for entry in trace(experiment.copy, name, attribute.columns.tolist(), experiment.output).entries:
            layer = _own(case, entry)
            change = _change(case, layer, entry.columns, protected[layer.name], impute)
            found.append(_Cut(attribute, layer, entry.columns, change))
    return found


def _own(case: Case, entry: Entry) -> Layer:
    """Return the experiment's layer of that name, after making sure that it can be rewritten."""
    layer = next(layer for layer in case.experiment.layers if layer.name == entry.layer.name)
    if layer.refusal is not None:
        raise ModelError(f"{case.experiment.model.path}: layer {layer.name} cannot be cut: {layer.refusal}")
    return layer


def _change(case: Case, layer: Layer, columns: Array, protected: Array, impute: bool) -> Array:
    """Return the change of the layer's matrix that takes columns out; `protected` are not imputed from."""
    weights = matrix_of(case, layer)[0]
    change = np.zeros_like(weights)
    change[columns] = -weights[columns]
    if not impute:
        return change[None]
    x = case.experiment.tensors([layer.input], case.splits.repair.inputs)[0].astype(np.float64)
    x = x.reshape(-1, layer.inputs)
    others = np.setdiff1d(np.arange(layer.inputs), protected)
    design = x[:, others]
    if layer.bias is not None:
        design = np.concatenate([design, np.ones((len(x), 1))], axis=1)
        others = np.append(others, layer.inputs)  # the last row of the matrix is the bias
    gram = design.T @ design / len(x)
    gram[np.diag_indices(len(gram))] += _RIDGE * max(np.trace(gram) / len(gram), 1e-12)
    told = np.linalg.solve(gram, design.T @ x[:, columns] / len(x))
    change[others] += told @ weights[columns]
    return change[None]


def _values(case: Case, cuts: Sequence[_Cut], shares: Array) -> dict[Parameter, Array]:
    """Return the parameters after a share of every attribute's cut; a whole cut leaves exact zeros."""
    share_of = dict(zip(_names(cuts), shares, strict=True))
    values: dict[Parameter, Array] = {}
    for layer in {cut.layer.name: cut.layer for cut in cuts}.values():
        mine = [cut for cut in cuts if cut.layer.name == layer.name]
        values |= changed(case, layer, sum(share_of[cut.attribute.name] * cut.change for cut in mine))
        factors = np.ones(layer.inputs)
        for cut in mine:
            if share_of[cut.attribute.name] == 1:
                factors[cut.columns] = 0
        values[layer.weight] = layer.scale_inputs(factors, values[layer.weight])
    return values


def _tuned(case: Case, cuts: Sequence[_Cut], shares: Array) -> list[Found]:
    """Let the other weights of the layers that were cut make up for it."""
    values = _values(case, cuts, shares)
    patched = case.patched(values)
    found = []
    for layer in {cut.layer.name: cut.layer for cut in cuts}.values():
        gone = np.concatenate([cut.columns for cut in cuts if cut.layer.name == layer.name])
        try:
            tuned = Tuner(patched, layer).tune(_TUNED_RATE, _TUNED_STEPS, hold=without_rows(gone))
        except (NoGradient, ModelError):
            continue
        if not tuned.steps:
            continue
        both = values | changed(patched, layer, tuned.change)
        outcome = patched_outcome(case, both, case.panel("validation"))
        label = f"{_where(cuts)} cut, imputed, then {layer.name} fine-tuned"
        found.append(Found(Candidate(label, outcome), partial(dict, both)))
    return found


def _search(case: Case, cuts: Sequence[_Cut]) -> Array:
    """Return the share of every attribute's cut that costs least on the search part."""
    panel = case.panel("search", _SEARCHED_SAMPLES)

    def costs(generation: Array) -> Array:
        found = [patched_outcome(case, _values(case, cuts, shares), panel).cost for shares in generation]
        return np.array(found)

    start = np.full(len(_names(cuts)), 0.9)
    case.progress("searching how much of every protected attribute to cut with CMA-ES")
    return cmaes.minimise(costs, start, sigma=0.2, seed=case.seed, bounds=(0.0, 1.0), generations=25).best


def _names(cuts: Sequence[_Cut]) -> list[str]:
    return list(dict.fromkeys(cut.attribute.name for cut in cuts))


def _where(cuts: Sequence[_Cut]) -> str:
    return f"{' and '.join(_names(cuts))} of {', '.join(dict.fromkeys(cut.layer.name for cut in cuts))}"
