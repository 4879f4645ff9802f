"""Strategy: closed-form repair directions of one layer, and CMA-ES in their span; for evidence with twins.

1. Scan: twin regression with one moderate setting at every layer, on a few samples; layers are ranked by the cost
   of the repaired model on samples the regression did not see.
2. Refine: the best layers again on all repair samples, over settings alpha x rho x rank.
3. Weigh, where none of them keeps every limit with ease: both again, with positions weighed by how much the answers
   depend on them. In a transformer a token may matter ten times as much as another one.
4. Search, where no closed form keeps every limit with ease: CMA-ES over the coefficients of the best layer's
   directions, from the closed-form point and from zero, on the search part, where the directions were not fitted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import numpy as np

from onnxcare import cmaes
from onnxcare.backward import position_weights
from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.layers import Layer
from onnxcare.panel import Outcome, Panel
from onnxcare.repair import closed_form
from onnxcare.repair.base import Candidate, Found, Proposals, Values
from onnxcare.repair.bench import Bench, changed

Array = np.ndarray

_SCAN_SAMPLES = 150
_REFINED_LAYERS = 2
# Positions are weighed by so many samples. Layers are refined with weights where these bring their cost on few samples
# below so many times the least.
_WEIGHED_SAMPLES, _PROMISING = 64, 4.0
_RANKS = (1, 2, 4, None)
# Shares of a layer's rows that a small change touches.
_ROWS = (0.02, 0.05, 0.2)
_SEARCH_RANK = 4
# Solving for more takes minutes on two cores, over all settings.
_MANY_FEATURES = 2048
# A change of more bytes is not kept beside the others.
_SOLVED_AGAIN = 8 << 20
# Generations of CMA-ES, and the multiply-adds of forward passes that its candidates may take: about ten seconds on two
# cores, so that larger networks get fewer.
_GENERATIONS, _PER_GENERATION, _SEARCH_WORK = 60, 9, 2e11


@dataclass(frozen=True)
class _Change:
    """A change of a layer that was measured; of a large layer, it is solved for again when it is needed."""

    layer: Layer
    solve: Callable[[], Array]
    candidate: Candidate


def applies(case: Case) -> bool:
    """Return whether some property's bad samples could take their activations from elsewhere, in some layer."""
    return bool(case.experiment.open_layers) and any(item.transplantable for item in case.properties)


def propose(case: Case) -> Proposals:
    """Return changes of one layer, see the module's docstring.

    Raises:
        ModelError: no layer could be cut open.
    """
    scan, skipped = _scan(case, case.experiment.open_layers, {})
    found = _refine_best(case, [layer for layer, _ in scan], skipped, {})
    if not found:
        raise _nothing_left(case, skipped)
    weighed: list[tuple[Layer, Outcome]] = []
    if not _comfortable(found):
        weights = _weights(case)
        weighed, _ = _scan(case, [layer for layer, _ in scan if layer.name in weights], weights)
        limit = _PROMISING * scan[0][1].cost
        found += _refine_best(case, [layer for layer, outcome in weighed if outcome.cost <= limit], {}, weights)
    evaluations = 0
    if not _comfortable(found):
        best = min(found, key=lambda item: item.candidate.outcome.cost)
        case.progress(f"searching the directions of {best.layer.name} with CMA-ES")
        searched, evaluations = _search(case, best, [f for f in found if f.layer is best.layer])
        found += searched
    details = {
        "scan": [{"layer": layer.name, "cost": outcome.cost} for layer, outcome in scan],
        "weighed scan": [{"layer": layer.name, "cost": outcome.cost} for layer, outcome in weighed],
        "skipped": skipped,
        "cmaes_evaluations": evaluations,
    }
    return Proposals([Found(item.candidate, partial(_values, case, item)) for item in found], details)


def _comfortable(found: Sequence[_Change]) -> bool:
    return any(item.candidate.outcome.comfortable for item in found)


def _weights(case: Case) -> dict[str, Array]:
    """Return, by layer, how much the answers depend on the positions of its output; nothing where that is not known."""
    experiment = case.experiment
    layers = experiment.open_layers
    outputs = {closed_form.aimed_at(experiment, layer)[0]: layer for layer in layers}
    probes = experiment.tensors(list(outputs), experiment.probe)
    several = {
        tensor: layer
        for (tensor, layer), probe in zip(outputs.items(), probes, strict=True)
        if tensor != experiment.logits and layer.output_rows(probe).shape[2] > 1
    }
    if not several:
        return {}
    case.progress("asking which positions the answers depend on")
    few = case.panel("repair", _WEIGHED_SAMPLES)
    try:
        weights = position_weights(experiment, several, few.inputs, case.seed)
    except (NoGradient, ModelError):
        return {}  # all positions count alike then, as they have before
    tensors = {layer.name: closed_form.aimed_at(experiment, layer)[0] for layer in layers}
    return {name: weights[tensor] for name, tensor in tensors.items() if tensor in weights}


def _scan(
    case: Case, layers: Sequence[Layer], weights: Mapping[str, Array]
) -> tuple[list[tuple[Layer, Outcome]], dict[str, str]]:
    """Rank the layers by what a regression on a few samples does to unseen ones; say why some were skipped."""
    fit, unseen = case.panel("repair", _SCAN_SAMPLES), case.panel("search", _SCAN_SAMPLES)
    ranked, skipped = [], {}
    for index, layer in enumerate(layers):
        case.progress(f"scanning layer {layer.name} ({index + 1} of {len(layers)})")
        if closed_form.memory_needed(layer) > case.experiment.memory:
            skipped[layer.name] = "its regression does not fit into the memory allowed; see --memory"
            continue
        try:
            outcome = _tried(case, layer, fit, unseen, weights.get(layer.name))
        except (ModelError, np.linalg.LinAlgError) as error:
            skipped[layer.name] = str(error)  # it is no candidate, but another layer may be
            continue
        ranked.append((layer, outcome))
    return sorted(ranked, key=lambda item: item[1].cost), skipped


def _tried(case: Case, layer: Layer, fit: Panel, unseen: Panel, weights: Array | None) -> Outcome:
    """Return what a regression on some samples does to others."""
    regression = closed_form.accumulate(case.experiment, layer, fit.clean, fit, weights=weights)
    changes = list(regression.solve(alpha=1.0, rho=1e-2, ranks=[None]))
    del regression  # a large layer's takes more than the model
    return Bench(case, layer).outcomes(unseen, changes)[0]


def _nothing_left(case: Case, skipped: dict[str, str]) -> ModelError:
    name, reason = next(iter(skipped.items()))
    return ModelError(f"{case.experiment.model.path}: no layer could be cut open for a repair; {name}: {reason}")


def _refine_best(
    case: Case, layers: Sequence[Layer], skipped: dict[str, str], weights: Mapping[str, Array]
) -> list[_Change]:
    """Refine the first layers for which that is possible; add the others to those skipped."""
    found: list[_Change] = []
    refined = 0
    for layer in layers:
        if refined == _REFINED_LAYERS or (_comfortable(found) and _takes_long(layer)):
            break
        case.progress(f"refining {layer.name}")
        try:
            found += _refine(case, layer, weights.get(layer.name))
            refined += 1
        except (ModelError, np.linalg.LinAlgError) as error:
            skipped[layer.name] = str(error)
    return found


def _takes_long(layer: Layer) -> bool:
    """Return whether solving for a layer is a matter of minutes, so that it has to be worth it."""
    return layer.features > _MANY_FEATURES


def _refine(case: Case, layer: Layer, weights: Array | None = None) -> list[_Change]:
    """Solve every setting on all repair samples and measure each on the validation part."""
    clean, panel = case.splits.repair, case.panel("repair")
    regression = closed_form.accumulate(case.experiment, layer, clean, panel, weights=weights)
    told = "" if weights is None else ", positions weighed"
    bench, validation = Bench(case, layer), case.panel("validation")
    some = _some_rows(case, layer)
    found: list[_Change] = []

    def measure(label: str, change: Array, solve: Callable[[], Array]) -> None:
        (outcome,) = bench.outcomes(validation, [change])
        again = solve if change.nbytes > _SOLVED_AGAIN else partial(np.asarray, change)
        found.append(_Change(layer, again, Candidate(f"{layer.name}: {label}{told}", outcome)))

    for alpha, rho in product(closed_form.alphas(case.properties), closed_form.RHOS):
        for rank, change in zip(_RANKS, regression.solve(alpha, rho, _RANKS), strict=True):
            again = partial(_only, regression.solve, alpha, rho, rank)
            measure(f"alpha {alpha:g}, rho {rho:g}, rank {rank or 'full'}", change, again)
        if rho == closed_form.RHOS[-1]:
            for rows, change in zip(some, regression.solve_some(alpha, rho, some), strict=True):
                again = partial(_only, regression.solve_some, alpha, rho, rows)
                measure(f"alpha {alpha:g}, rho {rho:g}, {rows} of {layer.matrix_shape[1]} rows", change, again)
    return found


def _only(solve: Callable[..., Iterator[Array]], alpha: float, rho: float, which: int | None) -> Array:
    return next(solve(alpha, rho, [which]))


def _values(case: Case, item: _Change) -> Values:
    return changed(case, item.layer, item.solve())


def _some_rows(case: Case, layer: Layer) -> list[int]:
    """Return how many rows of a layer's matrix a small change may touch: shares of them, and what is allowed."""
    everything = layer.matrix_shape[1]
    counts = {round(share * everything) for share in _ROWS}
    if case.max_changed is not None:
        counts.add(case.max_changed // layer.outputs)
    return sorted(count for count in counts if 0 < count < everything)


def _search(case: Case, best: _Change, of_layer: list[_Change]) -> tuple[list[_Change], int]:
    """Search the span of the layer's directions from the closed-form point and from zero."""
    basis, closed = _basis(best.solve(), [item.solve() for item in of_layer])
    bench, panel = Bench(case, best.layer), case.panel("search")
    directions = bench.directions(panel, basis)

    def costs(coefficients: Array) -> Array:
        return panel.costs(bench.scores(panel, coefficients, directions))

    rows = len(next(iter(panel.inputs.values())))
    generations = int(_SEARCH_WORK / (case.experiment.multiply_adds * rows * _PER_GENERATION))
    generations = max(1, min(_GENERATIONS, generations))
    runs = {
        "closed form": cmaes.minimise(costs, closed, sigma=0.2, seed=case.seed, generations=generations),
        "zero": cmaes.minimise(costs, np.zeros(len(basis)), sigma=0.5, seed=case.seed + 1, generations=generations),
    }
    found = []
    for start, run in runs.items():
        change = sum(c * b for c, b in zip(run.best, basis, strict=True))
        outcome = bench.outcomes(case.panel("validation"), [change])[0]
        label = f"{best.layer.name}: CMA-ES over {len(basis)} directions from {start}"
        found.append(_Change(best.layer, partial(np.asarray, change), Candidate(label, outcome)))
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
