"""Strategy: twin regression for recurrent nodes (LSTM, GRU, RNN); for evidence with twins.

A recurrent node meets its own outputs again, so a change that only mends the last state comes late: what a trigger
brought in has been mixed with what has to stay for as many steps as came behind it. Here every step is mended where
the trigger comes in. What a step adds up in front of its activation functions is linear (`graph.recurrent`), and if it
is what the original adds up on the twin, so are the states that follow from it. So the states of the original are
taken for granted, those on twins for bad samples, and the change of the weights

    D = argmin  alpha * E|A_c D - T_c|^2 + E|A_t D - T_t|^2 + ridge        A = [x[t], h[t - 1], 1],  h of the original
        T_c = gates of the original - gates now, on clean samples; T_t the same, of twins and of bad samples

follows as in `closed_form`: it is a regression over single steps, however long the sequences are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from onnxcare.case import Case
from onnxcare.data import Inputs
from onnxcare.errors import ModelError
from onnxcare.experiment import Experiment
from onnxcare.graph import surgery
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.recurrent import LENGTHS, START, STATES, STEPS, Recurrent, find_recurrent, with_steps
from onnxcare.repair.base import Candidate, Found, Proposals, Values
from onnxcare.repair.bench import patched_outcome
from onnxcare.repair.closed_form import RHOS, Regression, alphas
from onnxcare.runtime import Session, batches

Array = np.ndarray

# Shares of a matrix's rows that a small change touches.
_ROWS = (0.05, 0.2)
# Samples whose rows are made at a time take about this many bytes.
_PIECE = 32 << 20


@dataclass(frozen=True)
class _Run:
    """What a recurrent node reads and keeps on some samples; samples on axis 0, see `graph.recurrent.with_steps`."""

    steps: Array
    states: Array
    start: Array
    lengths: Array

    def take(self, samples: slice) -> _Run:
        return _Run(self.steps[samples], self.states[samples], self.start[samples], self.lengths[samples])


@dataclass
class _Sums:
    """Sums over the steps of samples, means over the samples: Gram matrices and what is aimed at, [d, d] and [d, o]."""

    gram: Array
    right: Array

    @classmethod
    def zero(cls, item: Recurrent) -> _Sums:
        return cls(np.zeros((item.features, item.features)), np.zeros((item.features, item.weight.shape[1])))


def applies(case: Case) -> bool:
    """Return whether there are recurrent nodes that can be rewritten, and evidence with twins."""
    return bool(_open(case)) and any(_twinned(case))


def propose(case: Case) -> Proposals:
    """Return changes of one recurrent node each, see the module's docstring.

    Raises:
        ModelError: what no recurrent node reads can be computed.
    """
    found: list[Found] = []
    skipped: dict[str, str] = {}
    for item in _open(case):
        case.progress(f"repairing {item.name} step by step")
        try:
            found += _changes(case, item)
        except (ModelError, np.linalg.LinAlgError) as error:
            skipped[item.name] = str(error)
    if not found:
        name, why = next(iter(skipped.items()))
        raise ModelError(f"{case.experiment.model.path}: no recurrent node could be changed; {name}: {why}")
    return Proposals(found, {"skipped": skipped})


def _open(case: Case) -> list[Recurrent]:
    form = case.experiment.form
    return [item for item in find_recurrent(form.view, form.parameters) if item.refusal is None]


def _twinned(case: Case) -> list[bool]:
    return [
        item.transplantable and found.twins is not None and len(found.bad) > 0
        for item, found in zip(case.properties, case.panel("repair").evidence, strict=True)
    ]


def _changes(case: Case, item: Recurrent) -> Iterator[Found]:
    """Yield a candidate for every setting, measured on validation data."""
    blocks = _regressions(case, item)

    def measured(label: str, changes: Sequence[Array]) -> Found:
        values = _values(case, item, changes)
        outcome = patched_outcome(case, values, case.panel("validation"))
        return Found(Candidate(f"{item.name}: {label}", outcome), partial(dict, values))

    for alpha, rho in product(alphas(case.properties), RHOS):
        changes = [next(block.solve(alpha, rho, [None])) for block in blocks]
        yield measured(f"alpha {alpha:g}, rho {rho:g}", changes)
        if rho == RHOS[-1]:
            for count in sorted({max(1, round(share * item.features)) for share in _ROWS}):
                changes = [next(block.solve_some(alpha, rho, [count])) for block in blocks]
                yield measured(f"alpha {alpha:g}, rho {rho:g}, {count} of {item.features} rows", changes)


def _values(case: Case, item: Recurrent, changes: Sequence[Array]) -> Values:
    """Return the new weights after the change of every block, [directions, rows, columns]."""
    whole = np.zeros((len(item.backwards), item.features, item.weight.shape[1]))
    for (rows, columns), change in zip(item.blocks(), changes, strict=True):
        whole[:, rows, columns] = change
    return item.add(whole, _weights(case.experiment, item))


def _weights(experiment: Experiment, item: Recurrent) -> dict[Parameter, Array]:
    return {parameter: experiment.read(parameter).astype(np.float64) for parameter in item.parameters}


def _regressions(case: Case, item: Recurrent) -> list[Regression]:
    """Return the regression of every block, the directions being its groups."""
    clean = [_Sums.zero(item) for _ in item.backwards]
    bad = [_Sums.zero(item) for _ in item.backwards]
    _accumulate(case, item, case.splits.repair.inputs, case.splits.repair.inputs, clean)
    for wanted, found in zip(_twinned(case), case.panel("repair").evidence, strict=True):
        if wanted and found.twins is not None:
            _accumulate(case, item, found.bad.inputs, found.twins.inputs, bad)
    drifted = any(sums.right.any() for sums in clean)

    def stacked(parts: Sequence[Array], rows: Array, columns: Array | slice) -> Array:
        return np.stack([part[rows][:, columns] for part in parts])

    return [
        Regression(
            stacked([sums.gram for sums in clean], rows, rows),
            stacked([sums.gram for sums in bad], rows, rows),
            stacked([sums.right for sums in bad], rows, columns),
            stacked([sums.right for sums in clean], rows, columns) if drifted else None,
        )
        for rows, columns in item.blocks()
    ]


def _accumulate(case: Case, item: Recurrent, samples: Inputs, twins: Inputs, into: Sequence[_Sums]) -> None:
    """Add the steps of samples to the sums of every direction; the aim is what the original does on their twins."""
    original = case.original or case.experiment
    ought = _run(original, item, twins)
    now = ought if samples is twins and original is case.experiment else _run(case.experiment, item, samples)
    before, after = _weights(original, item), _weights(case.experiment, item)
    count, steps = now.steps.shape[:2]
    each = max(1, _PIECE // (steps * item.features * np.dtype(np.float64).itemsize))
    for part in batches(count, each):
        here, aim = now.take(part), ought.take(part)
        there = (np.arange(steps) < np.minimum(here.lengths, aim.lengths)[:, None])[..., None]
        for direction, sums in enumerate(into):
            states = item.before(aim.states, aim.start, aim.lengths, direction)
            rows, wanted = (
                np.where(there, item.rows(run.steps, states), 0).reshape(-1, item.features).astype(np.float64)
                for run in (here, aim)
            )
            missing = wanted @ item.matrix(before, direction) - rows @ item.matrix(after, direction)
            sums.gram += rows.T @ rows / count
            sums.right += rows.T @ missing / count


def _run(experiment: Experiment, item: Recurrent, inputs: Inputs) -> _Run:
    """Return what the node reads and keeps.

    Raises:
        ModelError: it cannot be computed.
    """
    what = str(experiment.model.path)
    shown, names = with_steps(experiment.copy, item)
    part = surgery.expose(shown, names, what)
    session = Session(part, experiment.device, what=what)
    fed = {name: inputs[name] for name, _, _ in session.inputs}
    found = dict(zip(names, session.run_rows(fed, names, rows_per_run=experiment.rows_of(part)), strict=True))
    steps, states = found[STEPS], found[STATES]
    start = found.get(START, np.zeros_like(states[:, 0]))
    lengths = found.get(LENGTHS, np.full(len(steps), steps.shape[1]))
    return _Run(steps, states, start, lengths)
