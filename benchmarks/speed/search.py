"""Rows about searching for a repair of the sample model for digits: candidates a second."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.care_published import ALPHA, BOX, UNITS, particle_swarm
from benchmarks.care_published import STEPS as CARE_VALUES
from benchmarks.speed import nets, ours, theirs
from benchmarks.speed.measure import Array, Job, Result, Setting, compare
from onnxcare import cmaes
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.graph.layers import Layer
from onnxcare.panel import Panel
from onnxcare.prepare import prepare
from onnxcare.properties.backdoor import Backdoor
from onnxcare.repair.bench import Bench, changed, matrix_of

# Of the largest score; sums are rounded in another order where the model is run in another way.
TOLERANCE = 1e-5
LAYERS = ("dense1", "conv2")
DIRECTIONS, GENERATIONS = 8, 5
CARE_GENERATIONS, SWARMED = 50, 200
ALL = 10_000

Costs = Callable[[Array], Array]
Scores = Callable[[Sequence[theirs.Weights], theirs.Weights], Array]


@dataclass(frozen=True)
class Search:
    """A search in the span of some directions of a layer's weights.

    Attributes:
        panel: samples and objective.
        scores: of a generation of coefficients, as onnxcare computes them.
        old: the weights of the layer, by name.
        steps: what every direction adds to them, [directions, ...].
    """

    panel: Panel
    scores: Callable[[Array], Array]
    old: theirs.Weights
    steps: theirs.Weights

    @classmethod
    def of(cls, case: Case, layer: Layer, samples: int) -> Search:
        """Draw directions of rank one, each a tenth as large as the layer's matrix."""
        rng, matrix = np.random.default_rng(nets.SEED), matrix_of(case, layer)
        groups, rows, columns = matrix.shape
        normal = rng.standard_normal
        products = [normal((groups, rows, 1)) @ normal((groups, 1, columns)) for _ in range(DIRECTIONS)]
        changes = [0.1 * np.linalg.norm(matrix) / np.linalg.norm(product) * product for product in products]
        panel, bench = case.panel("repair", samples), Bench(case, layer)
        directions = bench.directions(panel, changes)
        old = {p.name: case.read(p) for p in (layer.weight, layer.bias) if p is not None}
        new = [{p.name: values for p, values in changed(case, layer, change).items()} for change in changes]
        steps = {name: np.stack([weights[name] - values for weights in new]) for name, values in old.items()}
        return cls(panel, lambda generation: bench.scores(panel, generation, directions), old, steps)

    def weights(self, coefficients: Array) -> theirs.Weights:
        """Return the layer's weights under some coefficients."""
        moved = {name: values + np.tensordot(coefficients, self.steps[name], 1) for name, values in self.old.items()}
        return {name: values.astype(np.float32) for name, values in moved.items()}

    def run(self, scores: Callable[[Array], Array]) -> cmaes.SearchResult:
        """Search for some generations by the scores of either side."""
        return cmaes.minimise(
            lambda generation: self.panel.costs(scores(generation)),
            np.zeros(DIRECTIONS),
            sigma=0.5,
            seed=nets.SEED,
            generations=GENERATIONS,
            patience=GENERATIONS + 1,
        )


def _case(setting: Setting) -> Case:
    model, spec = nets.MNIST / "model.onnx", nets.MNIST / "care.yaml"
    return prepare(model, spec, None, setting.device, None, lambda text: None).case


def _difference(setting: Setting, name: str, mine: Array, yours: Array) -> float:
    """Return the largest difference of scores, as a share of the largest score."""
    found = float(np.abs(mine - yours).max() / np.abs(yours).max())
    setting.say(f"{name}: largest difference of scores {found:.2g} of the largest score")
    return found


def _at(setting: Setting, name: str, layer: str, against: str, goal: float, rival: Callable[..., Scores]) -> Result:
    """Let both sides search the weights of a layer."""
    case = _case(setting)
    found = next(item for item in case.experiment.layers if item.weight.name.startswith(layer))
    search, other = Search.of(case, found, setting.pick(ALL, 40)), rival(setting, case, found)

    def scores(generation: Array) -> Array:
        return other([search.weights(member) for member in generation], search.panel.inputs)

    some = np.random.default_rng(nets.SEED).standard_normal((DIRECTIONS, DIRECTIONS))
    difference = _difference(setting, f"{name} at {layer}", search.scores(some), scores(some))
    job = Job(lambda: search.run(search.scores), lambda: search.run(scores))
    timing = compare(setting, f"{name} at {layer}", [job], lambda _, __: difference)
    candidates = job.ours().evaluations + 1
    rows = len(next(iter(search.panel.inputs.values())))
    return Result.timed(
        timing,
        name=name,
        what=f"CMA-ES over {DIRECTIONS} directions of {layer}: {candidates} candidates on {rows} images",
        against=against,
        goal=goal,
        difference=difference,
        tolerance=TOLERANCE,
        details=_rates(candidates, timing.ours, timing.theirs) | {"turns": timing.turns},
    )


def _rates(candidates: int, mine: float, yours: float) -> dict[str, float]:
    return {"candidates a second": round(candidates / mine, 1), "theirs": round(candidates / yours, 1)}


def _session_each(setting: Setting, case: Case, layer: Layer) -> Scores:
    """Return whichever is faster: every candidate's session with its graph optimised, or with the graph as it is."""
    inputs = case.panel("repair", setting.pick(ALL, 40)).inputs
    same = [{layer.weight.name: case.read(layer.weight)}] * 3
    optimised, plain = (theirs.SessionEach(setting, case.experiment.model.proto, wanted) for wanted in (True, False))
    job = Job(lambda: optimised.scores(same, inputs), lambda: plain.scores(same, inputs))
    timing = compare(setting, "sessions optimised, and not", [job], lambda a, b: float(np.abs(a[0] - b[0]).max()))
    return (optimised if timing.ratio >= 1 else plain).scores


def _fed(setting: Setting, case: Case, layer: Layer) -> Scores:
    names = [p.name for p in (layer.weight, layer.bias) if p is not None]
    return theirs.FedWeights(setting, case.experiment.model.proto, names).scores


def sessions(setting: Setting) -> list[Result]:
    """Against an onnxruntime session for every candidate."""
    against = "a new onnxruntime session for every candidate"
    return [_at(setting, "search-sessions", layer, against, 50, _session_each) for layer in LAYERS]


def fed_weights(setting: Setting) -> list[Result]:
    """Against one session that takes the weights of the layer as inputs."""
    against = "full forward passes, the layer's weights fed as inputs"
    return [_at(setting, "search-fed", layer, against, 5, _fed) for layer in LAYERS]


def care_published(setting: Setting) -> list[Result]:
    """The search of `care` against CARE's own: a particle swarm, with full forward passes."""
    case = _case(setting)
    panel, site = case.panel("repair", setting.pick(ALL, 40)), case.experiment.sites[-1]
    twin = nets.mnist(setting, case.experiment)
    table = ours.effects(case.experiment, site, panel.clean, panel.evidence[0].bad, ours.probability, CARE_VALUES)
    units = table.ranking()[:UNITS]
    mine = ours.Multipliers(case, site, units, panel.inputs)
    yours = theirs.HookedMultipliers(twin, twin.places[-1], units, twin.tensor(Dataset(panel.inputs, None)))
    some = np.random.default_rng(nets.SEED).uniform(*BOX, (8, UNITS))
    difference = _difference(setting, "care-published", mine.scores(some), yours.scores(some))
    searching = _Counted(lambda factors: panel.costs(mine.scores(factors)))
    # All of its candidates take the same time, so the first ones will do.
    swarming = _Counted(lambda factors: _published_costs(case, panel, yours.scores(factors)), most=SWARMED)
    start = np.ones(UNITS)

    def search() -> object:
        searching.count = 0
        settings = {"sigma": 0.5, "seed": nets.SEED, "generations": CARE_GENERATIONS, "patience": CARE_GENERATIONS + 1}
        return cmaes.minimise(searching, start, bounds=BOX, **settings)

    def swarm() -> None:
        swarming.count = 0
        with contextlib.suppress(_EnoughError):
            particle_swarm(swarming, start, BOX, np.random.default_rng(nets.SEED))

    job = Job(search, swarm, lambda: swarming.count / searching.count)
    timing = compare(setting, "care-published", [job], lambda _, __: difference)
    rates = _rates(searching.count, timing.ours, timing.theirs)
    rows = len(next(iter(panel.inputs.values())))
    return [
        Result.timed(
            timing,
            name="care-published",
            what=f"search of {UNITS} multipliers behind the last hidden layer: a candidate on {rows} images",
            against="CARE as published: particle swarm, full forward passes in PyTorch",
            difference=difference,
            tolerance=TOLERANCE,
            details=rates
            | {"candidates": searching.count, "of the swarm, measured": swarming.count, "turns": timing.turns},
        )
    ]


class _EnoughError(Exception):
    """So many candidates were measured as were to be."""


class _Counted:
    """A cost function that counts the candidates, and ends a search that asks for more."""

    def __init__(self, costs: Costs, most: int | None = None) -> None:
        self._costs, self._most, self.count = costs, most, 0

    def __call__(self, points: Array) -> Array:
        if self._most is not None and self.count >= self._most:
            raise _EnoughError
        self.count += len(points)
        return self._costs(points)


def _published_costs(case: Case, panel: Panel, scores: Array) -> Array:
    """Return CARE's objective: the share led to the target, and the share of wrong answers on clean samples."""
    (item,) = case.properties
    assert isinstance(item, Backdoor)
    answers = scores.argmax(axis=-1)
    unwanted = (answers[:, panel.bad[0]] == item.target).mean(axis=-1)
    right = (answers[:, panel.clean_rows] == panel.clean.truth).mean(axis=-1)
    return (1 - ALPHA) * unwanted + ALPHA * (1 - right)


ROWS: dict[str, Callable[[Setting], list[Result]]] = {
    "search-sessions": sessions,
    "search-fed": fed_weights,
    "care-published": care_published,
}
