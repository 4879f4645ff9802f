"""The safety property: inside a region of inputs the model must not answer in a way that a VNN-LIB formula describes.

The formula is the unsafe set: a point that satisfies it is a counterexample. Counterexamples are searched for
(`properties.counterexamples`), not only sampled, and the set that a repair works on grows: `hunt` adds what a candidate
still violates. The judge reports the rate on fresh samples, what a fresh search finds, and the *drawdown*: how many
decisions changed where the property already held, and over the whole input domain.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.backward import input_gradients
from onnxcare.data import Dataset, Inputs, PartName
from onnxcare.errors import DataError, SpecError
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import NoGradient
from onnxcare.measures import Finding
from onnxcare.properties import counterexamples
from onnxcare.properties.base import Array, Evidence, Property
from onnxcare.properties.counterexamples import Descent, Space
from onnxcare.properties.vnnlib import Formula, Region, load_formula
from onnxcare.runtime import batches
from onnxcare.spec import Bounds, SafetySpec

if TYPE_CHECKING:
    from onnxcare.judge import Court, Witness

# How many samples and descents a search takes, and how many counterexamples a repair works on at most.
_SAMPLES, _STARTS, _MOST = 100_000, 2000, 4000
_SHARES: tuple[tuple[PartName, float], ...] = (("repair", 0.5), ("search", 0.2), ("validation", 0.3))
_DOMAIN_SAMPLES = 100_000
_PIECE = 1 << 17
# Points with which a region is tried out.
_PROBED = 100
# Margins are to be kept by this share of the spread of margins over the region.
_SLACK = 0.02


class Safety(Property):
    """A VNN-LIB formula must not be satisfied."""

    kind = "safety"

    def __init__(
        self, spec: SafetySpec, formula: Formula, space: Space, bounds: Bounds | None, experiment: Experiment, seed: int
    ) -> None:
        """Search the original for counterexamples; use `prepare`, which checks that formula and model fit."""
        self.name = spec.name
        self.max_rate: float = spec.max_rate
        self.formula = formula
        self.space = space
        self._spec = spec
        self._bounds = bounds
        self._decision = experiment.decision
        self._rng = np.random.default_rng(seed)
        self._points: dict[PartName, Array] = {}
        descent, why = descent_through(experiment)
        if descent is None:
            self.notes = (f"Counterexamples are only sampled, not searched for by gradient: {why}.",)
        self._scale = self._spread(experiment)
        self.add(self.find(experiment))

    def evidence(self, part: PartName) -> Evidence:
        """Return the counterexamples of a part that are known so far."""
        return Evidence(Dataset(self.space.inputs(self._points[part]), None), None)

    @property
    def counterexamples(self) -> Array:
        """All counterexamples that are known so far, [points, values]."""
        return np.concatenate(list(self._points.values()))

    def domain_samples(self, count: int) -> Inputs | None:
        """Return fresh points of the whole domain, or None where no bounds are known."""
        if self._bounds is None:
            return None
        return self.space.inputs(counterexamples.draw(_box(self._bounds), count, self._rng))

    def safe_samples(self, experiment: Experiment, count: int) -> Array:
        """Return fresh points of every region that a model does not violate, at most `count` of each."""
        found = []
        for region in self.formula.regions:
            points = counterexamples.draw(region, count, self._rng)
            outputs = experiment.decision.outputs(experiment.scores(self.space.inputs(points)))
            found.append(points[~self.formula.violated(points, outputs.astype(np.float64))])
        return np.concatenate(found)

    def inside(self, points: Array, region: int) -> Array:
        """Return which points lie in a region's input set, [points] bool."""
        return replace(self.formula, regions=(self.formula.regions[region],)).contains(points)

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which samples are counterexamples."""
        return self.margin(scores, samples) >= 0

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return by how much all conditions of a region that a sample lies in hold; -inf outside of all regions."""
        return self._margins(self._decision.outputs(scores), samples).max(axis=0)

    def response(self, scores: Array, samples: Dataset) -> Array:
        """Return the margin in terms of its spread over the region; samples outside of all regions do not count."""
        margin = self.margin(scores, samples) / self._scale
        return np.where(np.isfinite(margin), margin, 0.0)

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return how far the margins are from being kept with some slack, averaged, in terms of their spread."""
        return np.maximum(0, self.response(scores, samples) + _SLACK).mean(axis=-1)

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss with respect to the scores."""
        outputs = self._decision.outputs(scores)
        margins = self._margins(outputs, samples)
        worst = margins.argmax(axis=0)
        slope = np.zeros(outputs.shape)
        for index, region in enumerate(self.formula.regions):
            mine = (worst == index) & (margins[index] / self._scale + _SLACK > 0) & np.isfinite(margins[index])
            if not mine.any() or not region.outputs:
                continue
            matrix = np.array([item.coefficients for item in region.outputs])
            bound = np.array([item.bound for item in region.outputs])
            tightest = (bound - outputs[mine] @ matrix.T).argmin(axis=1)
            slope[mine] = -matrix[tightest]
        return self._decision.pull_back_outputs(scores, slope / self._scale / len(scores))

    def spoils(self, scores: Array, samples: Dataset) -> Array:
        """Return which samples violate the formula: what the original answers there is no reference."""
        return self.misbehaves(scores, samples)

    def hunt(self, experiment: Experiment) -> int:
        """Search a candidate for counterexamples and add them to those of the original."""
        found = self.find(experiment)
        self.add(found)
        return len(found)

    def measure(self, court: Court) -> Finding:
        """Return the violation rate on fresh samples, what a search finds, and the drawdown."""
        rng = np.random.default_rng([court.seed, 1])
        regions = self.formula.regions
        each = max(1, self._spec.samples // len(regions))
        violated: list[list[Array]] = [[] for _ in court.witnesses]
        changed = []
        for region in regions:
            points = counterexamples.draw(region, each, rng)
            for rows in batches(len(points), _PIECE):
                inputs = self.space.inputs(points[rows])
                scores = [item.scores(inputs) for item in court.witnesses]
                for witness, answers, hits in zip(court.witnesses, scores, violated, strict=True):
                    hits.append(self._violated(points[rows], witness, answers))
                held = ~violated[0][-1]
                changed.append((scores[0].argmax(axis=-1) != scores[-1].argmax(axis=-1))[held])
        gauge = court.gauge
        hits_of = [np.concatenate(hits) for hits in violated]
        name = f"violation rate on {len(hits_of[-1]):,} fresh samples"
        found = [gauge.rate(name, hits_of[-1], *hits_of[:-1], limit=self.max_rate)]
        searched = [self._search(court, item) for item in court.witnesses]
        limit = 0.0 if self.max_rate == 0 else None
        found.append(
            gauge.points("counterexamples found by search", searched[-1], *searched[:-1], limit=limit, interval=None
                         if limit is None else (searched[-1], searched[-1]), unit="number")
        )  # fmt: skip
        if court.before is not None:
            found.append(gauge.rate("decisions changed where it held", np.concatenate(changed)))
            if self._bounds is not None:
                inputs = self.space.inputs(counterexamples.draw(_box(self._bounds), _DOMAIN_SAMPLES, rng))
                moved = court.before.decide(inputs) != court.after.decide(inputs)
                found.append(gauge.rate("decisions changed over the whole domain", moved))
        return Finding(self.name, self.kind, tuple(found), self.notes)

    def _search(self, court: Court, witness: Witness) -> float:
        """Return how many counterexamples a fresh search of a file finds."""
        probe = self.space.inputs(counterexamples.draw(self.formula.regions[0], 8, np.random.default_rng(court.seed)))
        experiment = Experiment(witness.model, witness.device, court.memory, probe, witness.output, witness.decision)
        rng = np.random.default_rng([court.seed, 2])
        return float(len(self.find(experiment, rng)))

    def find(self, experiment: Experiment, rng: np.random.Generator | None = None) -> Array:
        """Return what a fresh search of a model finds, [points, values]."""

        def outputs(inputs: Inputs) -> Array:
            return experiment.decision.outputs(experiment.scores(inputs))

        descent, _ = descent_through(experiment)
        known = self.counterexamples if self._points else None
        rng = self._rng if rng is None else rng
        return counterexamples.find(self.formula, self.space, outputs, descent, _SAMPLES, _STARTS, rng, known)

    def add(self, found: Array) -> None:
        """Deal new counterexamples out to the parts, as many as there is room for."""
        found = found[self._rng.permutation(len(found))][:_MOST]
        start = 0
        for name, share in _SHARES:
            stop = len(found) if name == "validation" else start + int(np.ceil(share * len(found)))
            known = self._points.get(name, np.zeros((0, self.space.size)))
            self._points[name] = np.concatenate([known, found[start:stop]])
            start = stop

    def _violated(self, points: Array, witness: Witness, scores: Array) -> Array:
        return self.formula.violated(points, witness.decision.outputs(scores).astype(np.float64))

    def _margins(self, outputs: Array, samples: Dataset) -> Array:
        """Return the margin of every region, -inf for the samples that do not lie in it, [regions, ..., samples]."""
        points = self.space.points(samples.inputs)
        found = []
        for index, region in enumerate(self.formula.regions):
            inside = Formula((region,), self.formula.inputs, self.formula.outputs, self.formula.version).contains(
                points
            )
            found.append(np.where(inside, self.formula.violation(index, outputs), -np.inf))
        return np.array(found)

    def _spread(self, experiment: Experiment) -> float:
        """Return the standard deviation of the margins over the regions."""
        margins = []
        for index, region in enumerate(self.formula.regions):
            points = counterexamples.draw(region, 1000, self._rng)
            outputs = experiment.decision.outputs(experiment.scores(self.space.inputs(points)))
            margins.append(self.formula.violation(index, outputs))
        values = np.concatenate(margins)
        spread = float(values[np.isfinite(values)].std()) if np.isfinite(values).any() else 0.0
        return spread if spread > 0 else 1.0


def prepare(spec: SafetySpec, experiment: Experiment, bounds: Bounds | None, seed: int) -> Safety:
    """Read the formula, check that it speaks of this model, and search for counterexamples.

    Raises:
        SpecError: the formula cannot be read, or has another number of inputs or outputs than the model.
    """
    formula = load_formula(spec.vnnlib)
    space = Space(
        experiment.model.inputs,
        tuple(experiment.probe[signature.name].shape[1:] for signature in experiment.model.inputs),
    )
    if formula.inputs != space.size:
        raise SpecError(
            f"{spec.vnnlib}: speaks of {formula.inputs} input values, but {experiment.model.path} takes {space.size}"
        )
    outputs = experiment.decision.outputs(experiment.scores(experiment.probe))
    if formula.outputs != outputs.shape[-1]:
        raise SpecError(
            f"{spec.vnnlib}: speaks of {formula.outputs} output values, but {experiment.output!r} of "
            f"{experiment.model.path} has {outputs.shape[-1]}"
        )
    if bounds is not None and len(bounds.low) != space.size:
        raise SpecError(f"bounds: {len(bounds.low)} values, but {experiment.model.path} takes {space.size}")
    _check_regions(spec, formula, space, experiment, seed)
    return Safety(spec, formula, space, bounds, experiment, seed)


def _check_regions(spec: SafetySpec, formula: Formula, space: Space, experiment: Experiment, seed: int) -> None:
    """Make sure that every region can be sampled, that the model answers there, and that the answers count."""
    rng = np.random.default_rng([seed, 4])
    for region in formula.regions:
        if not region.outputs:
            branch = " in one of its branches" if len(formula.regions) > 1 else ""
            raise SpecError(f"{spec.vnnlib}: asserts nothing about the outputs{branch}, so no model could keep it")
        (beyond,) = np.nonzero(np.maximum(np.abs(region.low), np.abs(region.high)) > np.finfo(np.float32).max)
        if beyond.size:
            raise SpecError(f"{spec.vnnlib}: the bounds of input value {beyond[0]} go beyond float32")
        try:
            points = counterexamples.draw(region, _PROBED, rng)
        except DataError as error:
            raise SpecError(f"{spec.vnnlib}: {error}; assert narrower bounds of the single inputs") from None
        experiment.scores(space.inputs(points), f"the region of {spec.vnnlib}")


def domain_samples(space: Space, bounds: Bounds, count: int, seed: int) -> Dataset:
    """Return points drawn evenly from the whole domain, without labels."""
    return Dataset(space.inputs(counterexamples.draw(_box(bounds), count, np.random.default_rng([seed, 3]))), None)


def descent_through(experiment: Experiment) -> tuple[Descent | None, str]:
    """Return gradients of the model's outputs with respect to its inputs, or None and the reason why there are none."""
    try:
        gradients = input_gradients(experiment)
    except NoGradient as error:
        return None, str(error)
    decision = experiment.decision

    def descend(inputs: Inputs, seed: Callable[[Array, slice], Array]) -> tuple[Array, dict[str, Array]]:
        def of_y(y: Array, rows: slice) -> Array:
            scores = decision.scores(y)
            return decision.pull_back(decision.pull_back_outputs(scores, seed(decision.outputs(scores), rows)))

        y, slopes = gradients(inputs, of_y)
        return decision.outputs(decision.scores(y)), slopes

    return descend, ""


def _box(bounds: Bounds) -> Region:
    return Region(np.array(bounds.low), np.array(bounds.high), (), ())
