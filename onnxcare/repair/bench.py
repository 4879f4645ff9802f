"""Trying out changes of one layer's weights: the part behind the layer runs, its cached output plus what is added."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxcare.case import Case
from onnxcare.graph.influence import trace
from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.panel import Outcome, Panel
from onnxcare.properties.fairness import IndividualFairness
from onnxcare.repair import closed_form
from onnxcare.runtime import batches
from onnxcare.suffix import Activations, Suffix

Array = np.ndarray

# Directions are kept as the activations they add; at most so many bytes of them at a time.
_DIRECTION_BYTES = 256 << 20


class Bench:
    """One layer's suffix with the activations of the panels cached.

    Changes are those of the layer's matrix, [groups, d (+ 1), outputs / groups], see `graph.layers`.
    """

    def __init__(self, case: Case, layer: Layer) -> None:
        """Cut the graph behind the layer."""
        self._case = case
        self._suffix: Suffix = case.experiment.suffix(layer.output, "span")
        self._cached: dict[int, tuple[Panel, Activations]] = {}
        self.layer = layer

    def _at(self, panel: Panel) -> Activations:
        if id(panel) not in self._cached:
            self._cached[id(panel)] = panel, self._suffix.cache(panel.inputs)
        return self._cached[id(panel)][1]

    def directions(self, panel: Panel, changes: Sequence[Array]) -> Array:
        """Return what each change adds to the layer's output on the panel, [K, rows, ...]."""
        at = self._at(panel)
        return closed_form.effects(self._case.experiment, self.layer, panel.inputs, changes, at)

    def scores(self, panel: Panel, coefficients: Array, directions: Array) -> Array:
        """Return the scores of a family of combinations of the directions."""
        return self._suffix.span(self._at(panel), coefficients, directions)

    def outcomes(self, panel: Panel, changes: Sequence[Array]) -> list[Outcome]:
        """Return what each change of the layer does on a panel."""
        allowed = min(_DIRECTION_BYTES, self._case.experiment.memory // 4)
        together = max(1, allowed // max(1, self._at(panel).base.nbytes))
        found = []
        for part in batches(len(changes), together):
            directions = self.directions(panel, changes[part])
            for index in range(len(directions)):
                scores = self.scores(panel, np.ones((1, 1)), directions[index : index + 1])
                found += panel.outcomes(scores)
        return found


def changed(case: Case, layer: Layer, change: Array) -> dict[Parameter, Array]:
    """Return the values of the layer's parameters after a change of its matrix."""
    known = [p for p in (layer.weight, layer.bias) if p is not None]
    new = layer.add(change, {p.name: case.read(p) for p in known})
    return {p: new[p.name] for p in known}


def matrix_of(case: Case, layer: Layer) -> Array:
    """Return the layer's present matrix, float64."""
    bias = None if layer.bias is None else case.read(layer.bias)
    return layer.matrix(case.read(layer.weight), bias).astype(np.float64)


def only(mask: Array) -> Callable[[Array], Array]:
    """Return what keeps the masked values of a gradient alone."""
    return lambda slope: np.where(mask, slope, 0.0)


def without_rows(rows: Array) -> Callable[[Array], Array]:
    """Return what takes rows of a layer's matrix out of a gradient."""

    def hold(slope: Array) -> Array:
        held = slope.copy()
        held[:, rows] = 0
        return held

    return hold


def protected_rows(case: Case) -> dict[str, Array]:
    """Return the rows, by layer, through which protected attributes enter the original: only cutting touches them."""
    found: dict[str, Array] = {}
    experiment = case.original or case.experiment
    for item in case.properties:
        if isinstance(item, IndividualFairness):
            columns = item.variation.columns.tolist()
            for entry in trace(experiment.copy, item.variation.input, columns, experiment.output).entries:
                known = found.get(entry.layer.name, np.zeros(0, np.int64))
                found[entry.layer.name] = np.union1d(known, entry.columns)
    return found


def patched_outcome(case: Case, values: Mapping[Parameter, Array], panel: Panel) -> Outcome:
    """Return what new values of any parameters do on a panel."""
    return panel.outcomes(case.experiment.patched(values).scores(panel.inputs)[None])[0]
