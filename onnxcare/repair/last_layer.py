"""Strategy: a linear programme on the last affine layer, in rounds; for safety.

With h the input of the last layer and a column of ones for its bias, the output y' = y + h D is linear in the change D,
so every wish about a sample is a linear inequality:

    a counterexample breaks one condition A_j y <= b_j of its region     A_j y' >= b_j + eps      hard
    a safe sample of a region keeps one condition broken                 likewise                 hard
    another sample keeps its decision a before its rival r               s_a' - s_r' >= eps'      at a price

    minimise  sum |D|  +  price * sum of slacks          (scipy's HiGHS)

The idea is PRDNN's pointwise repair (Sotoudeh and Thakur, PLDI 2021), on one layer, so that the graph stays as it is.
Which condition to break decides about the price: every condition is tried for all counterexamples of its region at
once, and the one that is nearest for each by itself, and what changes fewest decisions is taken. Rivals are added as
they take over, and counterexamples as a search of the changed model finds them, until several searches in a row find
none. It rests on samples and is no proof.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import scipy.optimize
import scipy.sparse

from onnxcare.case import Case
from onnxcare.data import Inputs
from onnxcare.decision import Decision
from onnxcare.errors import ModelError
from onnxcare.experiment import Experiment
from onnxcare.graph.layers import Layer
from onnxcare.properties.safety import Safety
from onnxcare.repair.base import Candidate, Found, Proposals
from onnxcare.repair.bench import changed, patched_outcome

Array = np.ndarray
Matrix: TypeAlias = Any  # a scipy.sparse matrix, which has no types
Pairs = frozenset[tuple[int, int]]

_ROUNDS, _RIVAL_ROUNDS = 20, 8
# So many fresh searches in a row have to find nothing.
_CLEAN = 3
# Margins, in terms of the mean absolute output: what a condition has to be broken by, and a kept decision to lead by.
_EPSILON, _LEAD = 1e-3, 1e-4
_PRICE = 1.0
# How many samples of the domain are watched for changed decisions, and how many of them enter from the start.
_WATCHED, _ENTERED = 20_000, 2000
# Rare decisions are looked for among so many samples, until there are so many of each.
_SOUGHT, _RARE = 200_000, 100
# Safe samples of every region, and counterexamples of every round, that enter the programme.
_GUARDED, _ADDED = 1000, 300
# Between choices that change equally many decisions, the smaller change is taken.
_SIZE_PRICE = 1e-6


@dataclass(frozen=True)
class _Samples:
    """Input rows of the last layer, [samples, d (+ 1)], and its outputs [samples, outputs]; float64."""

    rows: Array
    y: Array

    @classmethod
    def of(cls, experiment: Experiment, layer: Layer, inputs: Inputs) -> _Samples:
        x, y = experiment.tensors([layer.input, layer.output], inputs)
        return cls(layer.rows(x)[0, :, 0].astype(np.float64), y.astype(np.float64))

    def take(self, mine: Array) -> _Samples:
        return _Samples(self.rows[mine], self.y[mine])

    def joined(self, other: _Samples) -> _Samples:
        return _Samples(np.concatenate([self.rows, other.rows]), np.concatenate([self.y, other.y]))

    def inequalities(self, coefficients: Array) -> Matrix:
        """Return rows over the flattened D that give sum_o coefficients[o] * (row @ D)[o] for every sample."""
        return scipy.sparse.csr_matrix((self.rows[:, :, None] * coefficients[:, None, :]).reshape(len(self.rows), -1))


@dataclass
class _Region:
    """A region of a property, with the counterexamples and safe samples of it that are in the programme.

    Attributes:
        matrix: its conditions, [conditions, outputs].
        bounds: their bounds; a counterexample has matrix @ y <= bounds.
        bad: counterexamples.
        safe: safe samples.
        broken: the condition that all counterexamples are to break; None for the nearest one of each.
    """

    matrix: Array
    bounds: Array
    bad: _Samples
    safe: _Samples
    broken: int | None = None

    def inequalities(self, change: Array, epsilon: float) -> tuple[Matrix, Array]:
        """Return the hard rows over D and their lower bounds."""
        samples = self.bad.joined(self.safe)
        past = (samples.y + samples.rows @ change) @ self.matrix.T - self.bounds
        nearest = past.argmax(axis=1)
        if self.broken is not None:
            nearest[: len(self.bad.rows)] = self.broken
        chosen = self.matrix[nearest]
        wanted = self.bounds[nearest] + epsilon - (samples.y * chosen).sum(axis=1)
        return samples.inequalities(chosen), wanted


@dataclass(frozen=True)
class _Domain:
    """Samples whose decisions are to be kept.

    Attributes:
        samples: the samples.
        decision: how their outputs are read.
        weights: what part of all samples each stands for; those drawn for being rare stand for less.
    """

    samples: _Samples
    decision: Decision
    weights: Array

    def decisions(self, change: Array | float = 0.0) -> Array:
        moved = self.samples.rows @ change if isinstance(change, np.ndarray) else 0.0
        found: Array = self.decision.scores(self.samples.y + moved).argmax(axis=1)
        return found

    def rivals(self, rows: Array) -> Pairs:
        """Return some samples, each with the strongest rival of its decision."""
        order = np.argsort(-self.decision.scores(self.samples.y[rows]), axis=1, kind="stable")
        return frozenset(zip(rows.tolist(), order[:, 1].tolist(), strict=True))

    def inequalities(self, pairs: Sequence[tuple[int, int]], before: Array, lead: float) -> tuple[Matrix, Array]:
        """Return the rows that keep decisions before rivals, or no further behind than they were; in output units."""
        rows, rivals = np.array([row for row, _ in pairs]), np.array([rival for _, rival in pairs])
        samples = self.samples.take(rows)
        scores = self.decision.scores(samples.y)
        each = np.arange(len(rows))
        ahead = np.zeros(scores.shape)
        ahead[each, before[rows]], ahead[each, rivals] = 1, -1
        scale = self.decision.scale
        leads = (ahead * scores).sum(axis=1) / scale
        return samples.inequalities(self.decision.pull_back(ahead) / scale), np.minimum(lead, leads) - leads


class _Programme:
    """What is to hold, and the change that makes it hold at the least price."""

    def __init__(self, regions: Sequence[_Region], domain: _Domain, seed: int) -> None:
        self.regions, self.domain = regions, domain
        self._before = domain.decisions()
        self._scale = float(np.abs(domain.samples.y).mean())
        chosen = np.random.default_rng(seed).permutation(len(self._before))[:_ENTERED]
        rare = [np.flatnonzero(self._before == label)[:_RARE] for label in np.unique(self._before)]
        self._pairs = domain.rivals(np.unique(np.concatenate([chosen, *rare])))
        self.change: Array = np.zeros((domain.samples.rows.shape[1], domain.samples.y.shape[1]))

    def choose_conditions(self) -> None:
        """Choose for every region which condition its counterexamples are to break; see the module's docstring."""
        best, kept = self._price()
        for region in self.regions:
            for condition in range(len(region.matrix)) if len(region.matrix) > 1 else ():
                previous, region.broken = region.broken, condition
                price, pairs = self._price()
                if price < best:
                    best, kept = price, pairs
                else:
                    region.broken = previous
        self._pairs = kept

    def solve(self) -> float | None:
        """Find the change; return the share of decisions it changes, or None where nothing can make it all hold."""
        found = self._fit()
        if found is None:
            return None
        self.change, self._pairs, flipped = found
        return float(self.domain.weights @ flipped)

    def _price(self) -> tuple[float, Pairs]:
        found = self._fit()
        if found is None:
            return np.inf, self._pairs
        change, pairs, flipped = found
        return float(self.domain.weights @ flipped) + _SIZE_PRICE * float(np.abs(change).sum()), pairs

    def _fit(self) -> tuple[Array, Pairs, Array] | None:
        """Solve, add the rivals that took over, solve again; return the change, the pairs and what still flipped."""
        pairs = self._pairs
        hard = [region.inequalities(self.change, _EPSILON * self._scale) for region in self.regions]
        change, flipped = self.change, np.zeros(len(self._before), bool)
        for _ in range(_RIVAL_ROUNDS):
            soft = self.domain.inequalities(sorted(pairs), self._before, _LEAD * self._scale)
            solved = _solve(hard, soft, self.change.shape)
            if solved is None:
                return None
            change = solved
            now = self.domain.decisions(change)
            flipped = now != self._before
            taken_over = {(int(row), int(now[row])) for row in np.flatnonzero(flipped)} - pairs
            if not taken_over:
                break
            pairs |= taken_over
        return change, pairs, flipped


def _solve(
    hard_rows: Sequence[tuple[Matrix, Array]], soft_rows: tuple[Matrix, Array], shape: tuple[int, ...]
) -> Array | None:
    """Return the cheapest D, or None where the hard rows contradict each other."""
    hard, (soft, soft_bounds) = scipy.sparse.vstack([rows for rows, _ in hard_rows]).tocsc(), soft_rows
    # What no hard row sees can only cost.
    columns = np.flatnonzero(np.asarray(abs(hard).sum(axis=0)).ravel() > 0)
    hard, soft = hard[:, columns], soft.tocsc()[:, columns]
    slacks = soft.shape[0]
    upper = scipy.sparse.vstack(
        [
            scipy.sparse.hstack([-hard, hard, scipy.sparse.csr_matrix((hard.shape[0], slacks))]),
            scipy.sparse.hstack([-soft, soft, -scipy.sparse.identity(slacks)]),
        ]
    )
    bounds = -np.concatenate([*(bound for _, bound in hard_rows), soft_bounds])
    costs = np.concatenate([np.ones(2 * len(columns)), np.full(slacks, _PRICE)])
    found = scipy.optimize.linprog(costs, A_ub=upper.tocsr(), b_ub=bounds, bounds=(0, None), method="highs")
    if found.status != 0:
        return None
    change = np.zeros(int(np.prod(shape)))
    change[columns] = found.x[: len(columns)] - found.x[len(columns) : 2 * len(columns)]
    return change.reshape(shape)


def applies(case: Case) -> bool:
    """Return whether some property is about safety and the last layer's output is what its formula speaks of."""
    safety = [item for item in case.properties if isinstance(item, Safety)]
    return any(len(item.counterexamples) for item in safety) and _last(case) is not None


def propose(case: Case) -> Proposals:
    """Return the change of the last layer after which a search finds no counterexample any more.

    Raises:
        ModelError: no change of the last layer breaks what is known of all counterexamples.
    """
    layer = _last(case)
    assert layer is not None
    safety = [item for item in case.properties if isinstance(item, Safety)]
    rng = np.random.default_rng(case.seed)
    of_item = {id(item): _regions(case, layer, item, rng) for item in safety}
    programme = _Programme(
        [region for regions in of_item.values() for _, region in regions], _domain(case, layer, safety, rng), case.seed
    )
    case.progress(f"linear programme on {layer.name}: which conditions to break")
    programme.choose_conditions()
    history: list[dict[str, float]] = []
    clean = 0
    for number in range(_ROUNDS):
        case.progress(f"linear programme on {layer.name}, round {number + 1}")
        # After a search that found nothing there is nothing new to solve.
        share = history[-1]["decisions changed"] if clean else programme.solve()
        if share is None:
            raise ModelError(
                f"{case.experiment.model.path}: no change of the last layer {layer.name} breaks what is known of all "
                "counterexamples"
            )
        candidate = case.experiment.patched(changed(case, layer, programme.change[None]))
        left = 0
        for item in safety:
            found = item.find(candidate)
            item.add(found)
            left += len(found)
            for index, region in of_item[id(item)]:
                mine = _thinned(found[item.inside(found, index)], rng)
                if len(mine):
                    region.bad = region.bad.joined(_Samples.of(case.experiment, layer, item.space.inputs(mine)))
        history.append({"counterexamples left": left, "decisions changed": share})
        clean = 0 if left else clean + 1
        if clean == _CLEAN:
            break
    case.forget()
    values = changed(case, layer, programme.change[None])
    outcome = patched_outcome(case, values, case.panel("validation"))
    label = f"{layer.name}: linear programme, {len(history)} rounds"
    details = {"layer": layer.name, "rounds": history, "nonzero": int((programme.change != 0).sum())}
    return Proposals([Found(Candidate(label, outcome), partial(dict, values))], details)


def _last(case: Case) -> Layer | None:
    """Return the layer that writes the judged output itself, one row a sample."""
    experiment = case.experiment
    if experiment.decision.final:
        return None
    for layer in experiment.layers:
        if layer.output == experiment.logits and layer.convolution is None and layer.refusal is None:
            return layer
    return None


def _regions(case: Case, layer: Layer, item: Safety, rng: np.random.Generator) -> list[tuple[int, _Region]]:
    """Return the regions of a property that have conditions on the outputs, with samples, by their number."""
    found = []
    guarded = item.safe_samples(case.experiment, _GUARDED)
    for index, region in enumerate(item.formula.regions):
        if not region.outputs:
            continue
        bad = _thinned(item.counterexamples[item.inside(item.counterexamples, index)], rng)
        safe = guarded[item.inside(guarded, index)]
        if not len(bad) and not len(safe):
            continue
        matrix = np.array([condition.coefficients for condition in region.outputs])
        bounds = np.array([condition.bound for condition in region.outputs])
        samples = _Samples.of(case.experiment, layer, item.space.inputs(np.concatenate([bad, safe])))
        split = np.arange(len(bad) + len(safe)) < len(bad)
        found.append((index, _Region(matrix, bounds, samples.take(split), samples.take(~split))))
    return found


def _domain(case: Case, layer: Layer, safety: Sequence[Safety], rng: np.random.Generator) -> _Domain:
    """Return samples of the whole domain where it is known, else those of the data; rare decisions are sought."""
    experiment = case.experiment
    inputs = case.splits.repair.inputs
    for item in safety[:1]:
        drawn = item.domain_samples(_SOUGHT)
        inputs = inputs if drawn is None else drawn
    decided = experiment.scores(inputs).argmax(axis=1)
    labels, counts = np.unique(decided, return_counts=True)
    taken = np.zeros(len(decided), bool)
    taken[rng.permutation(len(decided))[:_WATCHED]] = True
    for label in labels:
        taken[np.flatnonzero(decided == label)[:_RARE]] = True
    chosen = np.flatnonzero(taken)
    present = {int(label): int((decided[chosen] == label).sum()) for label in labels}
    share = dict(zip(labels.tolist(), (counts / len(decided)).tolist(), strict=True))
    weights = np.array([share[int(label)] / present[int(label)] for label in decided[chosen]])
    few = {name: values[chosen] for name, values in inputs.items()}
    return _Domain(_Samples.of(experiment, layer, few), experiment.decision, weights)


def _thinned(points: Array, rng: np.random.Generator) -> Array:
    """Return at most so many counterexamples; which ones does not matter, others come back in later rounds."""
    return points if len(points) <= _ADDED else points[rng.permutation(len(points))[:_ADDED]]
