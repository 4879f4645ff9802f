"""Pairs: a sample that misbehaves, and a reference as like it as can be had that is answered rightly.

AI-Lancet (Zhao et al., CCS 2021) looks at what differs inside the model between the two. For a backdoor the reference
is the sample without its trigger. Elsewhere it is, in this order, another variant of the same row (fairness), the
smallest change of the sample that brings a right answer, found along the gradient of the property's loss, or a
companion: the nearest clean sample of the same class that is answered rightly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxcare.backward import input_gradients
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.errors import DataError
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import NoGradient
from onnxcare.panel import Panel
from onnxcare.properties.base import Evidence, Property

Array = np.ndarray

# A walk along the gradient: so many steps, of this share of the norm of the spread of clean samples.
_STEPS, _STRIDE = 40, 0.02
# The way back to where the answer turns is halved so many times.
_HALVINGS = 8


@dataclass(frozen=True)
class Pairs:
    """Samples of one property with their references, row by row.

    Attributes:
        property: the property.
        wrong: samples that misbehave.
        references: the samples they are compared with.
        right: [pairs] what the model answers to the references: the answers to be brought back.
        source: where the references come from.
    """

    property: Property
    wrong: Dataset
    references: Dataset
    right: Array
    source: str

    def __len__(self) -> int:
        """Return the number of pairs."""
        return len(self.wrong)

    def take(self, rows: slice | Array) -> Pairs:
        """Return some of the pairs."""
        parts = (self.wrong.take(rows), self.references.take(rows), self.right[rows])
        return Pairs(self.property, *parts, self.source)


def find_pairs(case: Case, limit: int) -> list[Pairs]:
    """Return the pairs of every property that the repair part has evidence of; at most `limit` of each."""
    panel = case.panel("repair", limit)
    found = []
    for item, evidence in zip(case.properties, panel.evidence, strict=True):
        if not len(evidence.bad):
            continue
        for references, rows, source in _references(case, panel, item, evidence):
            wrong = evidence.bad.take(rows)
            pairs = _checked(case.experiment, item, wrong, references, source)
            if len(pairs):
                found.append(pairs)
    return found


def _references(case: Case, panel: Panel, item: Property, evidence: Evidence) -> list[tuple[Dataset, Array, str]]:
    """Return references, the rows of the bad samples that they belong to, and where they come from."""
    everything = np.arange(len(evidence.bad))
    if evidence.twins is not None:
        return [(evidence.twins, everything, "twins")]
    if item.rows_per_case > 1:
        rows, which = _variants(case.experiment, item, evidence.bad)
        return [(evidence.bad.take(which), rows, "variants")]
    found = []
    left = everything
    if not item.transplantable:  # where a cause can be taken away, the nearest way past the boundary is not that way
        try:
            changed, rows = _smallest_changes(case, item, evidence.bad)
            found.append((changed, rows, "smallest change"))
            left = np.setdiff1d(everything, rows)
        except NoGradient:
            pass  # companions do without
    if len(left):
        companions, rows = _companions(case.experiment, item, panel.clean, evidence.bad.take(left))
        found.append((companions, left[rows], "companion"))
    return found


def _checked(experiment: Experiment, item: Property, wrong: Dataset, references: Dataset, source: str) -> Pairs:
    """Keep the pairs of which one side misbehaves and the other one does not."""
    if not len(wrong):
        return Pairs(item, wrong, references, np.zeros(0, np.int64), source)
    before, after = experiment.scores(wrong.inputs), experiment.scores(references.inputs)
    right = after.argmax(axis=-1)
    if item.rows_per_case > 1:
        kept = np.flatnonzero(before.argmax(axis=-1) != right)
    else:
        kept = np.flatnonzero(item.misbehaves(before, wrong) & ~item.misbehaves(after, wrong))
    return Pairs(item, wrong.take(kept), references.take(kept), right[kept], source)


def _variants(experiment: Experiment, item: Property, bad: Dataset) -> tuple[Array, Array]:
    """Pair every variant of a row with the first one that is decided as most of them are."""
    decisions = experiment.scores(bad.inputs).argmax(axis=-1).reshape(-1, item.rows_per_case)
    rows, which = [], []
    for case, answers in enumerate(decisions):
        values, counts = np.unique(answers, return_counts=True)
        usual = values[counts.argmax()]
        start = case * item.rows_per_case
        for other in np.flatnonzero(answers != usual):
            rows.append(start + other)
            which.append(start + int(np.flatnonzero(answers == usual)[0]))
    return np.array(rows, np.int64), np.array(which, np.int64)


def _smallest_changes(case: Case, item: Property, bad: Dataset) -> tuple[Dataset, Array]:
    """Walk along the gradient until a right answer comes, then back to where it turned; return rows that got there.

    Raises:
        NoGradient: an operator has no derivative, or an input holds no real numbers.
    """
    experiment = case.experiment
    gradients = input_gradients(experiment)
    clean = case.splits.repair.inputs
    names = [name for name, value in bad.inputs.items() if np.issubdtype(value.dtype, np.floating)]
    strides = {name: _STRIDE * float(np.linalg.norm(clean[name].std(axis=0))) for name in names}
    goal = item.goal(experiment.scores(bad.inputs), None, bad.labels)

    def slope(y: Array, rows: slice) -> Array:
        scores = experiment.decision.scores(y)
        part = bad.take(rows)
        of_rows = item.loss_gradient(scores, part, None if goal is None else goal[rows])
        return experiment.decision.pull_back(of_rows)

    def right(inputs: dict[str, Array]) -> Array:
        return ~item.misbehaves(experiment.scores(inputs), bad)

    at, found = dict(bad.inputs), np.zeros(len(bad), bool)
    for _ in range(_STEPS):
        slopes = gradients(at, slope)[1]
        for name in names:
            step = slopes[name].astype(np.float64)
            step *= strides[name] / np.maximum(_norms(step), 1e-30)
            moved = np.clip(at[name] - step, clean[name].min(), clean[name].max()).astype(at[name].dtype)
            at[name] = np.where(_spread(found, moved), at[name], moved)
        found = right(at)
        if found.all():
            break
    # Between the sample itself (0) and where the walk ended (1).
    low, high = np.zeros(len(bad)), np.ones(len(bad))

    def between(shares: Array) -> dict[str, Array]:
        return {
            name: values
            if name not in names
            else (values + _spread(shares, values) * (at[name] - values)).astype(values.dtype)
            for name, values in bad.inputs.items()
        }

    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        there = right(between(middle))
        low, high = np.where(there, low, middle), np.where(there, middle, high)
    rows = np.flatnonzero(found)
    return Dataset(between(high), bad.labels).take(rows), rows


def _companions(experiment: Experiment, item: Property, clean: Dataset, bad: Dataset) -> tuple[Dataset, Array]:
    """Return for every bad sample the nearest clean one of its class that is answered rightly, where there is one."""
    scores = experiment.scores(clean.inputs)
    decisions, fine = scores.argmax(axis=-1), ~item.misbehaves(scores, clean)
    if clean.labels is not None:
        fine &= decisions == clean.labels
    far = np.zeros((len(bad), len(clean)))
    for name, values in clean.inputs.items():
        far += _squared_distances(bad.inputs[name], values)
    allowed = np.broadcast_to(fine, far.shape)
    if bad.labels is not None and clean.labels is not None:
        allowed = allowed & (bad.labels[:, None] == clean.labels)
    far = np.where(allowed, far, np.inf)
    rows = np.flatnonzero(np.isfinite(far.min(axis=1)))
    return clean.take(far[rows].argmin(axis=1)), rows


def _squared_distances(a: Array, b: Array) -> Array:
    a, b = a.reshape(len(a), -1).astype(np.float64), b.reshape(len(b), -1).astype(np.float64)
    found: Array = (a**2).sum(axis=1)[:, None] - 2 * a @ b.T + (b**2).sum(axis=1)
    return found


def _norms(values: Array) -> Array:
    """Return the norm of every sample, in a shape that divides the samples."""
    return _spread(np.linalg.norm(values.reshape(len(values), -1), axis=1), values)


def _spread(per_sample: Array, like: Array) -> Array:
    return per_sample.reshape(-1, *[1] * (like.ndim - 1))


def need_pairs(case: Case, limit: int) -> list[Pairs]:
    """Return the pairs, at most `limit` of every property.

    Raises:
        DataError: there are none.
    """
    found = find_pairs(case, limit)
    if not found:
        names = ", ".join(item.name for item in case.properties)
        raise DataError(f"no sample of the data shows {names} and has a reference that does not")
    return found
