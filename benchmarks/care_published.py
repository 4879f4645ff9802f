"""CARE and channel Lipschitz pruning exactly as published, for benchmarks: what `--method care` and `clp` came from.

CARE (Sun, Sun, Pham, Shi: Causality-Based Neural Network Repair, ICSE 2022, and the authors' released code): the last
hidden dense layer, the five units whose average causal effect has the widest span over four values, one multiplier for
each, folded into the outgoing weights. With r the multipliers,

    minimise  (1 - alpha) * share of triggered samples called target  +  alpha * (1 - accuracy)        alpha = 0.2

by the particle swarm of pyswarms (`GlobalBestPSO`), at its defaults where CARE sets nothing. Logits are linear in the
units, so everything runs on cached activations.

CLP (Zheng, Tang, Li, Liu, ECCV 2022): every channel whose Lipschitz bound is over mean + 3 std of its layer is pruned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from onnxcare.case import Case
from onnxcare.data import Dataset, evenly
from onnxcare.graph.layers import Layer
from onnxcare.properties.backdoor import Backdoor
from onnxcare.repair.base import Values
from onnxcare.repair.bench import matrix_of
from onnxcare.repair.pruning import lipschitz, outlying, prunable, pruned

Array = np.ndarray

SAMPLES, UNITS, STEPS, BOX, ALPHA = 1000, 5, 4, (-10.0, 10.0), 0.2
PARTICLES, ITERATIONS, COGNITIVE, SOCIAL, INERTIA = 20, 100, 0.41, 0.41, 0.8
TOLERANCE, PATIENCE = 1e-3, 10
DEVIATIONS = 3.0


def care_published(case: Case) -> Values:
    """Return the outgoing weights of the last hidden dense layer with CARE's multipliers folded in.

    Raises:
        ValueError: the scores are not those of a dense layer, or the case is not about one backdoor with one target.
    """
    layer = _head(case)
    (item,) = case.properties
    target = item.target if isinstance(item, Backdoor) else None
    if target is None:
        raise ValueError("CARE's recipe for backdoors is for one target")
    clean = _cached(case, layer, evenly(case.splits.repair, SAMPLES))
    bad = _cached(case, layer, evenly(item.evidence("repair").bad, SAMPLES))
    weights = matrix_of(case, layer)[0][: layer.inputs]
    units = np.argsort(-spans(clean, bad, weights, target), kind="stable")[:UNITS]

    def cost(swarm: Array) -> Array:
        accuracy = (clean.answers(swarm, units, weights) == clean.labels).mean(axis=-1)
        unwanted = (bad.answers(swarm, units, weights) == target).mean(axis=-1)
        return (1 - ALPHA) * unwanted + ALPHA * (1 - accuracy)

    factors = np.ones(layer.inputs)
    factors[units] = particle_swarm(cost, np.ones(len(units)), BOX, np.random.default_rng(case.seed))
    return {layer.weight: layer.scale_inputs(factors, case.read(layer.weight))}


def clp_published(case: Case) -> Values:
    """Return all convolutions without the channels whose Lipschitz bound is over mean + 3 std of their layer.

    Raises:
        ModelError: no channel can be pruned.
    """
    layers, _ = prunable(case)
    return pruned(case, outlying({layer: lipschitz(case, layer) for layer in layers}, DEVIATIONS))


@dataclass(frozen=True)
class Cached:
    """Samples at the last layer.

    Attributes:
        hidden: [samples, units] its inputs.
        logits: [samples, classes] its outputs.
        labels: [samples] true classes, or None.
    """

    hidden: Array
    logits: Array
    labels: Array | None

    def answers(self, swarm: Array, units: Array, weights: Array) -> Array:
        """Return what is answered under every particle's multipliers of some units, [particles, samples]."""
        logits = self.logits + (self.hidden[:, units] * (swarm - 1)[:, None]) @ weights[units]
        return logits.argmax(axis=-1)


def _head(case: Case) -> Layer:
    """Return the dense layer that writes the scores."""
    for layer in case.experiment.layers:
        if layer.output == case.experiment.logits and not layer.convolution and layer.refusal is None:
            return layer
    raise ValueError("the scores are not those of a dense layer")


def _cached(case: Case, layer: Layer, samples: Dataset) -> Cached:
    hidden, logits = case.experiment.tensors([layer.input, layer.output], samples.inputs)
    return Cached(hidden.astype(np.float64), logits.astype(np.float64), samples.labels)


def spans(clean: Cached, bad: Cached, weights: Array, target: int) -> Array:
    """Return the span of every unit's average causal effect on the target's probability, [units].

    A unit is forced to evenly spaced values of the range it takes on clean and triggered samples together; the
    expectation is over clean samples.
    """
    everything = np.concatenate([clean.hidden, bad.hidden])
    grid = np.linspace(everything.min(axis=0), everything.max(axis=0), STEPS)
    found = np.zeros(len(weights))
    for unit, outgoing in enumerate(weights):
        forced = clean.logits + (grid[:, unit, None] - clean.hidden[:, unit])[..., None] * outgoing
        p = np.exp(forced - forced.max(axis=-1, keepdims=True))
        effects = (p[..., target] / p.sum(axis=-1)).mean(axis=-1)
        found[unit] = effects.max() - effects.min()
    return found


def particle_swarm(
    cost: Callable[[Array], Array], start: Array, box: tuple[float, float], rng: np.random.Generator
) -> Array:
    """Return the best point that a swarm comes across.

    All particles start at one point, with velocities uniform in [0, 1); whoever leaves the box comes in on the other
    side. The swarm stops when the best cost has stood still for as long as the patience lasts.

    Args:
        cost: maps points [particles, dimensions] to costs [particles].
        start: [dimensions] where all particles start.
        box: bounds of every coordinate.
        rng: where velocities and pulls come from.
    """
    at = np.tile(start, (PARTICLES, 1))
    velocity = rng.uniform(size=at.shape)
    own, own_cost = at, np.full(PARTICLES, np.inf)
    best, best_cost, stale = start, np.inf, 0
    for _ in range(ITERATIONS):
        costs = cost(at)
        better = costs < own_cost
        own, own_cost = np.where(better[:, None], at, own), np.where(better, costs, own_cost)
        before, leader = best_cost, int(own_cost.argmin())
        if own_cost[leader] < best_cost:
            best, best_cost = own[leader], float(own_cost[leader])
        stale = stale + 1 if abs(best_cost - before) < TOLERANCE * (1 + abs(before)) else 0
        if stale >= PATIENCE:
            break
        pulls = COGNITIVE * rng.uniform(size=at.shape) * (own - at) + SOCIAL * rng.uniform(size=at.shape) * (best - at)
        velocity = INERTIA * velocity + pulls
        at = periodic(at + velocity, *box)
    return best


def periodic(points: Array, low: float, high: float) -> Array:
    """Return points with those beyond one bound as far inside the other one."""
    inside = np.where(points < low, high - np.mod(low - points, high - low), points)
    return np.where(points > high, low + np.mod(points - high, high - low), inside)
