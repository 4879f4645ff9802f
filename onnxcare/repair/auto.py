"""`--method auto`: closed-form repair directions of one layer, and CMA-ES in their span.

1. Scan: twin regression with one moderate setting at every layer, on a few samples; layers are ranked by the cost
   of the repaired model on samples the regression did not see.
2. Refine: the best layers again on all repair samples, over settings alpha x rho x rank.
3. Search: CMA-ES over the coefficients of the best layer's directions, from the closed-form point and from zero, on
   the search part, where the directions were not fitted.
4. Choose: everything that was found competes on the validation part; no change at all competes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.experiment import Activations, Suffix
from onnxcare.graph.layers import Layer
from onnxcare.panel import Outcome, Panel
from onnxcare.repair import closed_form, cmaes
from onnxcare.repair.base import Candidate, Repair
from onnxcare.runtime import batches

Array = np.ndarray

_SCAN_SAMPLES = 150
_REFINED_LAYERS = 2
_ALPHAS = (1.0, 10.0)
_RHOS = (1e-3, 1e-2, 1e-1)
_RANKS = (1, 2, 4, None)
_SEARCH_RANK = 4
# Directions are kept as the activations they add; at most so many bytes of them at a time.
_DIRECTION_BYTES = 256 << 20


@dataclass(frozen=True)
class _Found:
    layer: Layer
    change: Array
    candidate: Candidate


class _Bench:
    """One layer's suffix with the activations of the panels cached."""

    def __init__(self, case: Case, layer: Layer) -> None:
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


def repair(case: Case) -> Repair:
    """Find the best change of one layer, see the module's docstring.

    Raises:
        ModelError: the model has no layer whose weights can be rewritten.
    """
    layers = [layer for layer in case.experiment.layers if layer.refusal is None]
    if not layers:
        reasons = [f"{layer.name}: {layer.refusal}" for layer in case.experiment.layers]
        why = "; ".join(reasons[:3]) or "it has no Gemm, MatMul or Conv with constant weights"
        raise ModelError(f"{case.experiment.model.path}: no layer can be repaired: {why}")
    scan, skipped = _scan(case, layers)
    found = _refine_best(case, [layer for layer, _ in scan], skipped)
    best = min(found, key=lambda item: item.candidate.outcome.cost)
    case.progress(f"searching the directions of {best.layer.name} with CMA-ES")
    searched, evaluations = _search(case, best, [f for f in found if f.layer is best.layer])
    found += searched
    unchanged = Candidate("no change", case.before)
    best = min(found, key=lambda item: item.candidate.outcome.cost)
    candidates = [unchanged, *(item.candidate for item in found)]
    details = {
        "scan": [{"layer": layer.name, "cost": outcome.cost} for layer, outcome in scan],
        "skipped": skipped,
        "layer": best.layer.name,
        "cmaes_evaluations": evaluations,
    }
    if unchanged.outcome.cost <= best.candidate.outcome.cost:
        return Repair("auto", {}, unchanged, candidates, details)
    known = [p for p in (best.layer.weight, best.layer.bias) if p is not None]
    new = best.layer.add(best.change, {p.name: case.read(p) for p in known})
    details["rank"] = int(np.linalg.matrix_rank(best.change).max())
    return Repair("auto", {p: new[p.name] for p in known}, best.candidate, candidates, details)


def _scan(case: Case, layers: list[Layer]) -> tuple[list[tuple[Layer, Outcome]], dict[str, str]]:
    """Rank the layers by what a regression on a few samples does to unseen ones; say why some were skipped."""
    fit, unseen = case.panel("repair", _SCAN_SAMPLES), case.panel("search", _SCAN_SAMPLES)
    ranked, skipped = [], {}
    for index, layer in enumerate(layers):
        case.progress(f"scanning layer {layer.name} ({index + 1} of {len(layers)})")
        if closed_form.memory_needed(layer) > case.experiment.memory:
            skipped[layer.name] = "its regression does not fit into the memory allowed; see --memory"
            continue
        try:
            regression = closed_form.accumulate(case.experiment, layer, fit.clean, fit)
            changes = regression.solve(alpha=1.0, rho=1e-2, ranks=[None])
            outcome = _Bench(case, layer).outcomes(unseen, changes)[0]
        except (ModelError, np.linalg.LinAlgError) as error:
            skipped[layer.name] = str(error)  # it is no candidate, but another layer may be
            continue
        ranked.append((layer, outcome))
    if not ranked:
        raise _nothing_left(case, skipped)
    return sorted(ranked, key=lambda item: item[1].cost), skipped


def _nothing_left(case: Case, skipped: dict[str, str]) -> ModelError:
    name, reason = next(iter(skipped.items()))
    return ModelError(f"{case.experiment.model.path}: no layer could be cut open for a repair; {name}: {reason}")


def _refine_best(case: Case, layers: list[Layer], skipped: dict[str, str]) -> list[_Found]:
    """Refine the first layers for which that is possible; add the others to those skipped."""
    found: list[_Found] = []
    refined = 0
    for layer in layers:
        if refined == _REFINED_LAYERS:
            break
        case.progress(f"refining {layer.name}")
        try:
            found += _refine(case, layer)
            refined += 1
        except (ModelError, np.linalg.LinAlgError) as error:
            skipped[layer.name] = str(error)
    if not found:
        raise _nothing_left(case, skipped)
    return found


def _refine(case: Case, layer: Layer) -> list[_Found]:
    """Solve every setting on all repair samples and measure each on the validation part."""
    regression = closed_form.accumulate(case.experiment, layer, case.splits.repair, case.panel("repair"))
    labels, changes = [], []
    for alpha, rho in product(_ALPHAS, _RHOS):
        changes += regression.solve(alpha, rho, _RANKS)
        labels += [f"alpha {alpha:g}, rho {rho:g}, rank {rank or 'full'}" for rank in _RANKS]
    outcomes = _Bench(case, layer).outcomes(case.panel("validation"), changes)
    return [
        _Found(layer, change, Candidate(f"{layer.name}: {label}", outcome))
        for label, change, outcome in zip(labels, changes, outcomes, strict=True)
    ]


def _search(case: Case, best: _Found, of_layer: list[_Found]) -> tuple[list[_Found], int]:
    """Search the span of the layer's directions from the closed-form point and from zero."""
    basis, closed = _basis(best.change, [item.change for item in of_layer])
    bench, panel = _Bench(case, best.layer), case.panel("search")
    directions = bench.directions(panel, basis)

    def costs(coefficients: Array) -> Array:
        return panel.costs(bench.scores(panel, coefficients, directions))

    runs = {
        "closed form": cmaes.minimise(costs, closed, sigma=0.2, seed=case.seed),
        "zero": cmaes.minimise(costs, np.zeros(len(basis)), sigma=0.5, seed=case.seed + 1),
    }
    found = []
    for start, run in runs.items():
        change = sum(c * b for c, b in zip(run.best, basis, strict=True))
        outcome = bench.outcomes(case.panel("validation"), [change])[0]
        label = f"{best.layer.name}: CMA-ES over {len(basis)} directions from {start}"
        found.append(_Found(best.layer, change, Candidate(label, outcome)))
    return found, sum(run.evaluations for run in runs.values())


def _basis(best: Array, others: list[Array]) -> tuple[list[Array], Array]:
    """Return directions, and the coefficients that add up to the best change.

    The first directions are the best change split by singular vectors; the further ones, the differences to the
    largest and the smallest other change, let the search move towards other settings.
    """
    u, s, vt = np.linalg.svd(best, full_matrices=False)
    parts = [
        u[:, :, r : r + 1] * s[:, None, r : r + 1] @ vt[:, r : r + 1, :] for r in range(min(_SEARCH_RANK, s.shape[-1]))
    ]
    split = [*parts, best - sum(parts)]
    by_size = sorted(others, key=lambda change: float(np.linalg.norm(change)))
    apart = [by_size[-1] - best, by_size[0] - best]
    # A change of low rank leaves no rest, and it may itself be the largest or the smallest.
    scale = np.linalg.norm(best)
    split = [direction for direction in split if np.linalg.norm(direction) > 1e-6 * scale]
    apart = [direction for direction in apart if np.linalg.norm(direction) > 1e-3 * scale]
    return [*split, *apart], np.array([1.0] * len(split) + [0.0] * len(apart))
