"""`--method ai-lancet-finetune`: neuron-fine-tuning (AI-Lancet; Zhao et al., CCS 2021).

Only the most voted weights of one layer move. As published they start where they are; they may also start at a closed
form (`closed_form`), which changes the whole layer. The loss pulls bad samples to what the original says about their
references and holds the answers to clean samples where they were; Adam follows it in batches, and the step that does
best on the search part counts, the start included. Layers and starts are tried with few steps and a tenth of the
weights, then shares and rankings at the best ones; the best plans are tuned on all samples and compete on validation
data.

Behind some layers there may be no derivative (Sign, ArgMax ...). There CMA-ES searches the most voted weights instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np

from onnxcare import cmaes
from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.layers import Layer
from onnxcare.locators import DEFAULT_OF_WEIGHTS
from onnxcare.locators.weights import WeightRanking, rank_weights
from onnxcare.panel import Outcome
from onnxcare.repair import closed_form
from onnxcare.repair.base import Candidate, Found, Proposals, Repair
from onnxcare.repair.bench import Bench, changed, matrix_of, only
from onnxcare.repair.choice import best_of
from onnxcare.repair.finetune import Tuner

Array = np.ndarray

# Shares of a layer's weights that move; the first one is tried everywhere.
_SHARES = (0.1, 0.01, 1.0)
_SCAN_SAMPLES, _SCAN_STEPS = 200, 10
_WIDENED, _TUNED, _STEPS = 2, 2, 250
# Step sizes in terms of the root mean square of the layer's weights: few weights have to go far, all of them need not.
_SCAN_RATE, _RATES = 0.05, (0.01, 0.05)
_ALPHAS, _RHO, _RANKS = (1.0, 10.0), 0.1, (4, None)
_SEARCHED_WEIGHTS, _SEARCH_SAMPLES, _SEARCH_BYTES, _GENERATIONS = 64, 200, 256 << 20, 150


@dataclass(frozen=True)
class _Plan:
    """Which weights move, where they start, and what a few steps reached on the search part."""

    ranking: WeightRanking
    size: int
    start: str
    change: Array | None
    rank: tuple[float, float]

    @property
    def label(self) -> str:
        layer = self.ranking.layer
        return f"{_weights(layer, self.size)}, by {self.ranking.locator}, from {self.start}"


def repair(case: Case, locators: Sequence[str] = DEFAULT_OF_WEIGHTS) -> Repair:
    """Tune the most guilty weights of the best layers.

    Raises:
        DataError: no sample misbehaves and has a reference that does not.
        ModelError: nothing could be located, or no layer could be cut open.
    """
    offered = propose(case, locators)
    notes: list[str] = offered.details["notes"]
    return best_of("ai-lancet-finetune", case, offered.found, offered.details, notes)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why the weights of a layer cannot be tuned; None if they can, by CMA-ES where they have no derivative."""
    return layer.refusal


def applies(case: Case) -> bool:
    """Return whether some property has bad samples that could take their activations from elsewhere, in some layer."""
    taken = any(item.transplantable and len(item.evidence("repair").bad) for item in case.properties)
    return taken and bool(case.experiment.open_layers)


def propose(case: Case, locators: Sequence[str] = DEFAULT_OF_WEIGHTS) -> Proposals:
    """Return tuned layers, see the module's docstring.

    Raises:
        DataError: no sample misbehaves and has a reference that does not.
        ModelError: nothing could be located, or no layer could be cut open.
    """
    rankings, votes, skipped = rank_weights(case, locators)
    notes: list[str] = []
    plans: list[_Plan] = []
    found: list[Found] = []
    rankings.sort(key=lambda item: item.layer.node)
    by_layer = {layer.name: list(mine) for layer, mine in groupby(rankings, key=lambda item: item.layer)}
    for name, here in by_layer.items():
        case.progress(f"trying gradients at {name}")
        try:
            try:
                plans += _plans(case, here[0])
            except NoGradient as error:
                notes.append(f"{error}: the weights of {name} were searched by CMA-ES instead of by gradient.")
                found.append(_searched(case, here[0]))
        except ModelError as error:
            skipped[name] = str(error)
    plans.sort(key=lambda plan: plan.rank)
    for plan in plans[:_WIDENED]:
        tuner = Tuner(case, plan.ranking.layer)
        plans += [_tried(tuner, plan, share) for share in _SHARES[1:]]
        others = by_layer[plan.ranking.layer.name][1:]
        plans += [_tried(tuner, replace(plan, ranking=other), _SHARES[0]) for other in others]
    plans.sort(key=lambda plan: plan.rank)
    for plan in plans[:_TUNED]:
        case.progress(f"fine-tuning {plan.ranking.layer.name}")
        found += _tuned(case, plan)
    if not found:
        name, why = next(iter(skipped.items()))
        raise ModelError(f"{case.experiment.model.path}: no layer can be fine-tuned; {name}: {why}")
    details = {
        "votes": [item.as_dict() for item in votes],
        "scan": [{"plan": plan.label, "cost": plan.rank[1]} for plan in plans],
        "skipped": skipped,
        "notes": notes,
    }
    return Proposals(found, details)


def _plans(case: Case, ranking: WeightRanking) -> list[_Plan]:
    """Try a layer's weights from every start.

    Raises:
        NoGradient: there is no derivative behind the layer.
        ModelError: its inputs do not fit into the memory.
    """
    tuner = Tuner(case, ranking.layer)
    starts = _starts(case, ranking.layer).items()
    return [_tried(tuner, _Plan(ranking, 0, start, change, (0.0, 0.0)), _SHARES[0]) for start, change in starts]


def _starts(case: Case, layer: Layer) -> dict[str, Array | None]:
    """Return where a layer's weights may start: where they are, and at the best of a few closed forms."""
    starts: dict[str, Array | None] = {"the original": None}
    fits = closed_form.memory_needed(layer) <= case.experiment.memory
    if fits and any(item.transplantable for item in case.properties):
        try:
            regression = closed_form.accumulate(case.experiment, layer, case.splits.repair, case.panel("repair"))
            solved = [list(regression.solve(alpha, _RHO, _RANKS)) for alpha in _ALPHAS]
            changes = [change for several in solved for change in several]
            ranks = [outcome.rank for outcome in Bench(case, layer).outcomes(case.panel("search"), changes)]
            starts["the closed form"] = changes[ranks.index(min(ranks))]
        except (ModelError, np.linalg.LinAlgError):
            pass  # then the original is the only start
    return starts


def _tried(tuner: Tuner, plan: _Plan, share: float) -> _Plan:
    """Return the plan for another share, with what a few steps reach."""
    shape = tuner.layer.matrix_shape
    (size,) = plan.ranking.sizes([share], int(np.prod(shape)))
    hold = only(plan.ranking.mask(size, shape))
    tuned = tuner.tune(_SCAN_RATE, _SCAN_STEPS, _SCAN_SAMPLES, hold, plan.change)
    return replace(plan, size=size, rank=tuned.rank)


def _tuned(case: Case, plan: _Plan) -> list[Found]:
    """Tune on all samples at several rates, and measure on validation data."""
    layer = plan.ranking.layer
    tuner = Tuner(case, layer)
    hold = only(plan.ranking.mask(plan.size, layer.matrix_shape))
    found = []
    for rate in _RATES:
        tuned = tuner.tune(rate, _STEPS, hold=hold, start=plan.change)
        (outcome,) = tuner.outcomes("validation", [tuned.change])
        found.append(_found(case, layer, tuned.change, outcome, f"{plan.label}, {tuned.steps} steps of {rate:g}"))
    return found


def _searched(case: Case, ranking: WeightRanking) -> Found:
    """Search the most guilty weights by CMA-ES, one coordinate a weight."""
    layer = ranking.layer
    bench, panel = Bench(case, layer), case.panel("repair", _SEARCH_SAMPLES)
    matrix = matrix_of(case, layer)
    each = bench.directions(panel, [np.zeros_like(matrix)]).nbytes
    count = max(1, min(_SEARCHED_WEIGHTS, len(ranking.order), _SEARCH_BYTES // max(1, each)))
    basis = np.zeros((count, matrix.size))
    basis[np.arange(count), ranking.order[:count]] = np.sqrt(np.mean(matrix**2))
    basis = basis.reshape(count, *matrix.shape)
    directions = bench.directions(panel, list(basis))

    def costs(coefficients: Array) -> Array:
        return panel.costs(bench.scores(panel, coefficients, directions))

    case.progress(f"searching {count} weights of {layer.name} with CMA-ES")
    run = cmaes.minimise(costs, np.zeros(count), sigma=1.0, seed=case.seed, generations=_GENERATIONS)
    change = np.tensordot(run.best, basis, axes=1)
    (outcome,) = bench.outcomes(case.panel("validation"), [change])
    return _found(case, layer, change, outcome, f"{_weights(layer, count)}, by {ranking.locator}, CMA-ES")


def _found(case: Case, layer: Layer, change: Array, outcome: Outcome, label: str) -> Found:
    return Found(Candidate(label, outcome), partial(changed, case, layer, change))


def _weights(layer: Layer, size: int) -> str:
    return f"{layer.name}: {size} of {int(np.prod(layer.matrix_shape))} weights"
