"""CMA-ES (Hansen), through the package `cma`: ask for a generation, measure it in one run, tell the costs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Array = np.ndarray

# The covariance matrix of more dimensions costs more than the candidates: only its diagonal is adapted then.
_FULL_COVARIANCE = 200


@dataclass(frozen=True)
class SearchResult:
    """The best point of a search.

    Attributes:
        best: [K] coordinates.
        cost: its cost.
        evaluations: candidates measured.
        start: cost of the starting point.
    """

    best: Array
    cost: float
    evaluations: int
    start: float


def minimise(
    costs: Callable[[Array], Array],
    start: Array,
    *,
    sigma: float,
    seed: int,
    bounds: tuple[float, float] | None = None,
    generations: int = 60,
    patience: int = 12,
    tolerance: float = 1e-4,
    diagonal: bool = False,
) -> SearchResult:
    """Minimise a cost over K coordinates; the start itself stays a candidate.

    Args:
        costs: maps a generation [P, K] to its costs [P].
        start: [K] where the search begins.
        sigma: first step size.
        seed: at least 1; numpy's global random state is left as it was.
        bounds: the same box for every coordinate.
        generations: at most so many.
        patience: stop after so many generations without an improvement of more than `tolerance`, relative to
            the best cost.
        tolerance: see `patience`.
        diagonal: adapt the diagonal of the covariance matrix alone, as is done in many dimensions.
    """
    first = float(costs(start[None])[0])
    best, best_cost = start.copy(), first
    options = {
        "seed": seed,
        "verbose": -9,
        "bounds": list(bounds) if bounds else None,
        "maxiter": generations,
        "CMA_diagonal": diagonal or len(start) > _FULL_COVARIANCE,
    }
    state = np.random.get_state()
    stale = evaluations = 0
    try:
        with warnings.catch_warnings():
            # cma warns at import where matplotlib is missing, and later of steps that leave a box far behind.
            warnings.simplefilter("ignore")
            import cma

            # cma refuses one dimension; a second coordinate that the cost ignores makes it two.
            search = cma.CMAEvolutionStrategy(_padded(start), sigma, options)
            while not search.stop() and stale < patience:
                generation = search.ask()
                measured = _finite(costs(np.array(generation)[:, : len(start)]))
                search.tell(generation, measured.tolist())
                evaluations += len(generation)
                index = int(measured.argmin())
                improved = measured[index] < best_cost - tolerance * abs(best_cost)
                stale = 0 if improved else stale + 1
                if measured[index] < best_cost:
                    best, best_cost = np.array(generation[index])[: len(start)], float(measured[index])
    finally:
        np.random.set_state(state)
    return SearchResult(best, best_cost, evaluations, first)


def best_of(results: Sequence[SearchResult]) -> SearchResult:
    """Return the result of lowest cost, the first of equals."""
    return min(results, key=lambda result: result.cost)


def _padded(start: Array) -> Array:
    return np.concatenate([start, [0.0]]) if len(start) == 1 else start


def _finite(costs: Array) -> Array:
    """Replace NaN and infinity, which cma would accept without a word, by a large cost."""
    return np.where(np.isfinite(costs), costs, 1e12)
