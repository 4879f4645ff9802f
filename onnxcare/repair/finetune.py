"""Strategy: gradient fine-tuning of one layer, for any property with a smooth loss.

The cost of a panel is differentiated with respect to the layer's output by the part behind it (`backward`), and with
respect to the layer's matrix by its own input rows. Adam (Kingma and Ba, ICLR 2015) follows it, in batches where the
layer is large, with steps relative to the size of the weights. The cost itself holds the change back: it asks for the
original's answers on clean samples. The best step is that of best rank on the search part, which the gradient does not
see; on the validation part the candidates compete, whole and shrunk. Layers are scanned with few steps, the best ones
get many.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxcare.adam import Adam
from onnxcare.backward import Backward
from onnxcare.case import Case
from onnxcare.data import PartName
from onnxcare.errors import ModelError
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.layers import Layer
from onnxcare.panel import Outcome, Panel
from onnxcare.repair.base import Candidate, Found, Proposals
from onnxcare.repair.bench import changed, matrix_of, protected_rows, without_rows
from onnxcare.suffix import Activations

Array = np.ndarray

_SCAN_SAMPLES, _SCAN_STEPS = 400, 40
_STEPS, _EVERY, _PATIENCE = 400, 10, 8
_TUNED_LAYERS = 2
# Step sizes in terms of the root mean square of the layer's weights.
_RATES = (0.01, 0.03)
# How much of a tuned change is tried: less of it mends less, and breaks less.
_SHARES = (0.25, 0.4, 0.55, 0.7, 0.85, 1.0)
# Rows and activations of a step; with more the samples go into batches.
_STEP_BYTES = 16 << 20
# Share of the memory that the rows of a layer's product may take.
_ROWS_SHARE = 0.25


@dataclass(frozen=True)
class Tuned:
    """A change of one layer, and where it was best."""

    layer: Layer
    change: Array
    rank: tuple[float, float]
    steps: int


class _Table:
    """One layer and one panel: inputs of the layer as rows, activations behind it."""

    def __init__(self, case: Case, layer: Layer, backward: Backward, panel: Panel) -> None:
        rows = layer.rows(case.experiment.tensors([layer.input], case.experiment.probe)[0])
        samples = len(panel.inputs[next(iter(panel.inputs))])
        if rows.nbytes // rows.shape[1] * samples > _ROWS_SHARE * case.experiment.memory:
            raise ModelError(f"layer {layer.name}: its inputs do not fit into the memory allowed; see --memory")
        self.layer, self.panel, self._backward = layer, panel, backward
        self.rows = layer.rows(case.experiment.tensors([layer.input], panel.inputs)[0])
        self.at = backward.cache(panel.inputs)

    def batches(self) -> int:
        """Return into how many batches the samples go so that a step stays short."""
        return max(1, -(-(self.rows.nbytes + self.at.base.nbytes) // _STEP_BYTES))

    def batch(self, number: int, of: int) -> _Table:
        """Return the table of a batch."""
        if of == 1:
            return self
        part, rows = self.panel.batch(number % of, of)
        found = copy.copy(self)
        found.panel, found.rows, found.at = part, self.rows[:, rows], self.at.take(rows)
        return found

    def moved(self, change: Array) -> Activations:
        added = self.layer.product(self.rows, change.astype(self.rows.dtype))
        return Activations(self.at.base + self.layer.from_rows(added, self.at.base.shape), self.at.boundary)

    def slope(self, change: Array) -> Array:
        """Return the gradient of the panel's cost with respect to the change."""
        _, at_output = self._backward.slope(self.moved(change), self.panel.gradient)
        wanted = self.layer.output_rows(at_output)
        groups, d = self.rows.shape[0], self.rows.shape[-1]
        flat = self.rows.reshape(groups, -1, d)
        return flat.transpose(0, 2, 1) @ wanted.reshape(groups, -1, wanted.shape[-1])

    def scores(self, change: Array) -> Array:
        return self._backward.scores(self.moved(change))


def applies(case: Case) -> bool:
    """Return whether there is a layer, evidence whose loss can be followed, and no better way than to follow it.

    Where activations can be transplanted, closed-form directions reach more in a fraction of the time.
    """
    followed = any(len(item.evidence("repair").bad) and not item.transplantable for item in case.properties)
    return followed and bool(case.experiment.open_layers)


def propose(case: Case) -> Proposals:
    """Return tuned layers, see the module's docstring.

    Raises:
        ModelError: no layer has a derivative behind it.
    """
    layers = case.experiment.open_layers
    holds = {name: without_rows(rows) for name, rows in protected_rows(case).items()}
    scan: list[Tuned] = []
    skipped: dict[str, str] = {}
    for index, layer in enumerate(layers):
        case.progress(f"trying gradients at {layer.name} ({index + 1} of {len(layers)})")
        try:
            tuner = Tuner(case, layer)
            scan.append(tuner.tune(_RATES[-1], _SCAN_STEPS, _SCAN_SAMPLES, holds.get(layer.name)))
        except (NoGradient, ModelError) as error:
            skipped[layer.name] = str(error)
    if not scan:
        name, why = next(iter(skipped.items()))
        raise ModelError(f"{case.experiment.model.path}: no layer can be fine-tuned; {name}: {why}")
    scan.sort(key=lambda item: item.rank)
    found = []
    for item in scan[:_TUNED_LAYERS]:
        tuner = Tuner(case, item.layer)
        for rate in _RATES:
            case.progress(f"fine-tuning {item.layer.name}")
            tuned = tuner.tune(rate, _STEPS, hold=holds.get(item.layer.name))
            changes = [share * tuned.change for share in _SHARES]
            for share, change, outcome in zip(_SHARES, changes, tuner.outcomes("validation", changes), strict=True):
                label = f"{item.layer.name}: {share:.0%} of {tuned.steps} steps of {rate:g}"
                found.append(Found(Candidate(label, outcome), partial(changed, case, item.layer, change)))
    details = {"scan": [{"layer": item.layer.name, "cost": item.rank[1]} for item in scan], "skipped": skipped}
    return Proposals(found, details)


class Tuner:
    """Gradient steps on one layer's weights; the derivative is written once, however often it is followed.

    Attributes:
        layer: the layer.
    """

    def __init__(self, case: Case, layer: Layer) -> None:
        """Write the derivative of the part behind the layer.

        Raises:
            NoGradient: an operator behind the layer has no derivative.
        """
        self.layer = layer
        self._case = case
        self._backward = Backward(case.experiment, layer.output)
        self._tables: dict[tuple[PartName, int | None], _Table] = {}

    def tune(
        self,
        rate: float,
        steps: int,
        limit: int | None = None,
        hold: Callable[[Array], Array] | None = None,
        start: Array | None = None,
    ) -> Tuned:
        """Follow the gradient of the repair part's cost, and return the step of lowest cost on the search part.

        Args:
            rate: step size, in terms of the root mean square of the layer's weights.
            steps: at most so many.
            limit: at most so many clean and bad samples.
            hold: maps a gradient to the part of it that may be followed; None for all of it.
            start: the change to begin with; it stays a candidate. None for no change.

        Raises:
            ModelError: the layer's inputs do not fit into the memory.
        """
        fit, unseen = self._table("repair", limit), self._table("search", limit)
        weights = matrix_of(self._case, self.layer)
        width = rate * float(np.sqrt(np.mean(weights**2)))
        change = np.zeros_like(weights) if start is None else start
        adam = Adam(width)
        batches = fit.batches()
        best = Tuned(self.layer, change, _rank(unseen, change), 0)
        stale = 0
        for step in range(1, steps + 1):
            slope = fit.batch(step, batches).slope(change)
            change = change + adam.step(slope if hold is None else hold(slope))
            if step % _EVERY == 0:
                rank = _rank(unseen, change)
                stale = 0 if rank < best.rank else stale + 1
                if rank < best.rank:
                    best = Tuned(self.layer, change, rank, step)
                if stale >= _PATIENCE:
                    break
        return best

    def outcomes(self, part: PartName, changes: Sequence[Array]) -> list[Outcome]:
        """Return what changes do on a part."""
        table = self._table(part, None)
        return [table.panel.outcomes(table.scores(change)[None])[0] for change in changes]

    def _table(self, part: PartName, limit: int | None) -> _Table:
        key = (part, limit)
        if key not in self._tables:
            self._tables[key] = _Table(self._case, self.layer, self._backward, self._case.panel(part, limit))
        return self._tables[key]


def _rank(table: _Table, change: Array) -> tuple[float, float]:
    return table.panel.outcomes(table.scores(change)[None])[0].rank
