"""Differential localisation: the weights, or units, that part a wrong answer from a right one (AI-Lancet).

Source: Zhao et al., AI-Lancet: Locating Error-inducing Neurons to Optimize Neural Networks, CCS 2021.

For a pair of a sample x' that misbehaves and its reference x, with f a layer's features (its output, or what its
activation function and pooling make of it) and y the right answer:

    d  = f(x') - f(x)                                  the difference
    w  = |g| / max |g|,  g = d CE(N(x'), y) / d f      what of it matters
    d~ = d * (w + 1/2)
    score of a weight = |d ||d~|| / d W|               with f(x) and w constant
    score of a unit   = ||d~ of the unit||

*Progressive ablation* takes the share of highest score out, growing from 1e-6 to 0.9, until the right answer is back:
weights are set to zero, units to their values on the reference. What had to go gets a vote; a pair that no share
brings back gives none. Shares are refined in ten steps. Weights and units come in order of their votes, equals by
their mean score.

Where an operator behind the features has no derivative, w comes from interventions instead: how much the cross-entropy
falls when one unit takes its value on the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from onnxcare.backward import Backward
from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.experiment import Experiment
from onnxcare.graph import surgery
from onnxcare.graph.gradients import Gradients, NoGradient
from onnxcare.graph.layers import Layer
from onnxcare.graph.sites import Site
from onnxcare.locators.attribution import Attribution, activations, ranges
from onnxcare.locators.pairs import Pairs
from onnxcare.properties.base import log_softmax
from onnxcare.runtime import batches
from onnxcare.suffix import Activations, Suffix
from onnxcare.sweep import spread_units

Array = np.ndarray

_SHARES = [digit * 10.0**power for power in range(-6, 0) for digit in range(1, 10)]
_REFINED = 10
# Where none of so many pairs gets its answer back, none of the others is asked.
_PATIENCE = 10
# Bytes of the activations that one run of ablations may take.
_ABLATION_BYTES = 64 << 20


@dataclass(frozen=True)
class WeightVotes:
    """Votes for the single weights of a layer.

    Attributes:
        layer: the layer.
        votes: [groups, d, outputs / groups] pairs for which the weight had to go; the bias has none.
        scores: likewise, the mean score, at most 1.
        pairs: how many pairs were looked at; few, where none of the first ones got its answer back.
        located: how many of them got their right answer back.
        share: median share of the layer's weights that had to go for it.
        gradient: whether w came from a gradient.
    """

    layer: Layer
    votes: Array
    scores: Array
    pairs: int
    located: int
    share: float
    gradient: bool

    def ranking(self) -> Array:
        """Return the voted weights as positions in the flattened matrix, most voted first."""
        order = np.lexsort((-self.scores.reshape(-1), -self.votes.reshape(-1)))
        found: Array = order[self.votes.reshape(-1)[order] > 0]
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return it for a report."""
        return {
            "layer": self.layer.name,
            "pairs": self.pairs,
            "located": self.located,
            "median_share": self.share,
            "gradient": self.gradient,
        }


def vote_weights(case: Case, layer: Layer, everything: Sequence[Pairs]) -> WeightVotes:
    """Return the votes of all pairs for the weights of one layer.

    Raises:
        ModelError: the layer cannot be cut open.
    """
    experiment = case.experiment
    features = _features(experiment, layer)
    matrix = layer.matrix(case.read(layer.weight), None)
    votes, scores = np.zeros(matrix.shape), np.zeros(matrix.shape)
    shares: list[float] = []
    suffix = experiment.suffix(layer.output, "affine")
    gradient, looked_at = True, 0
    for pairs in everything:
        slopes, smooth = _slopes(experiment, layer, features, pairs)
        gradient &= smooth
        rows = layer.rows(experiment.tensors([layer.input], pairs.wrong.inputs)[0])[..., : matrix.shape[1]]
        at = suffix.cache(pairs.wrong.inputs)
        outputs = layer.output_rows(slopes)
        for index in range(len(pairs)):
            if looked_at >= _PATIENCE and not shares:
                break  # this is not a layer whose ablation brings answers back
            looked_at += 1
            score = np.abs(rows[:, index].transpose(0, 2, 1) @ outputs[:, index]).astype(np.float64)
            scores += score / max(float(score.max()), 1e-30)
            order = np.argsort(-score, axis=None, kind="stable")
            one = slice(index, index + 1)
            count = _Ablation(layer, matrix, rows[:, one], order, suffix, at.take(one)).first(int(pairs.right[index]))
            if count:
                votes.reshape(-1)[order[:count]] += 1
                shares.append(count / matrix.size)
    share = float(np.median(shares)) if shares else 0.0
    return WeightVotes(layer, votes, scores / max(1, looked_at), looked_at, len(shares), share, gradient)


class _Ablation:
    """Taking the highest weights of one layer out, for one sample."""

    def __init__(self, layer: Layer, matrix: Array, rows: Array, order: Array, suffix: Suffix, at: Activations) -> None:
        self._layer, self._matrix, self._rows, self._order = layer, matrix, rows, order
        self._suffix, self._at = suffix, at

    def first(self, right: int) -> int:
        """Return how many weights have to go for the right answer, or 0 where no share brings it back."""
        sizes = _counts(_SHARES, len(self._order))
        reached = self._reached(sizes, right)
        if reached is None:
            return 0
        before = sizes[reached - 1] if reached else 0
        finer = np.unique(np.linspace(before, sizes[reached], _REFINED + 1).astype(int))[1:]
        again = self._reached(finer, right)
        return int(finer[again]) if again is not None else int(sizes[reached])

    def _reached(self, sizes: Array, right: int) -> int | None:
        """Return the position of the first size at which the right answer is back."""
        together = max(1, _ABLATION_BYTES // max(1, self._at.base.nbytes))
        for part in batches(len(sizes), together):
            decisions = self._decisions(sizes[part])
            back = np.flatnonzero(decisions == right)
            if len(back):
                return part.start + int(back[0])
        return None

    def _decisions(self, sizes: Array) -> Array:
        groups, _, outputs = self._matrix.shape
        positions = self._rows.shape[2]
        lost = np.zeros((groups, len(sizes), positions, outputs), self._rows.dtype)
        flat, start = self._matrix.reshape(-1), 0
        for index, size in enumerate(sizes):
            taken = self._order[start:size]
            group, feature, output = np.unravel_index(taken, self._matrix.shape)
            if positions == 1:
                weighted = self._rows[group, 0, 0, feature] * flat[taken]
                np.add.at(lost[:, index, 0], (group, output), weighted)
            else:
                only = np.zeros(self._matrix.shape, self._matrix.dtype)  # in C order, so that its flat form is a view
                only.reshape(-1)[taken] = flat[taken]
                lost[:, index] = self._rows[:, 0] @ only
            start = size
        np.cumsum(lost, axis=1, out=lost)
        base = self._at.base - self._layer.from_rows(lost, (len(sizes), *self._at.base.shape[1:]))
        crossing = {name: np.repeat(values, len(sizes), axis=0) for name, values in self._at.boundary.items()}
        return _unchanged(self._suffix, Activations(base, crossing)).argmax(axis=-1)


def vote_units(experiment: Experiment, site: Site, clean: Dataset, pairs: Pairs) -> Attribution:
    """Return the votes of pairs for the units of a site, as shares of the pairs.

    Args:
        experiment: the model.
        site: the site.
        clean: well-behaved samples, which tell with the pairs which units are dead.
        pairs: the pairs.
    """
    _, _, dead = ranges(site, activations(experiment, site, clean, pairs.wrong, pairs.references))
    sizes = _unit_counts(int((~dead).sum()))
    suffix = experiment.suffix(site.tensor, "affine")
    votes, mean = np.zeros(site.units), np.zeros(site.units)
    for rows, at, _ in suffix.pieces(pairs.wrong.inputs):
        per_unit, place, count = _needed(experiment, site, suffix, at, pairs.take(rows), sizes)
        votes += (place < count[:, None]).sum(axis=0) / len(pairs)
        mean += (per_unit / np.maximum(per_unit.max(axis=1, keepdims=True), 1e-30)).sum(axis=0) / len(pairs)
    # Half a vote at most, so that scores decide between equals alone.
    scores = np.where(dead, 0.0, votes + mean / (2 * len(pairs)))
    return Attribution(site, "differential votes", scores, dead, len(pairs))


def _needed(
    experiment: Experiment, site: Site, suffix: Suffix, at: Activations, pairs: Pairs, sizes: Sequence[int]
) -> tuple[Array, Array, Array]:
    """Return every pair's scores of the units, their places in its order, and how many of them had to go."""
    (reference,) = experiment.tensors([site.tensor], pairs.references.inputs)
    difference = (at.base - reference).astype(np.float64)
    weighted = difference * (_importance(experiment, site.tensor, site.axis, pairs)[0] + 0.5)
    rank = at.base.ndim - 1
    per_unit = _by_sample_and_unit(weighted, site)
    order = np.argsort(-per_unit, axis=1, kind="stable")
    place = np.argsort(order, axis=1)
    count = np.zeros(len(pairs), int)
    for size in sizes:  # one size after the other: most pairs need few
        left = np.flatnonzero(count == 0)
        if not len(left):
            break
        keep = (place[left] >= size).astype(at.base.dtype)
        axis = site.axis if site.axis > 0 else rank + 1 + site.axis
        shape = [1] * (rank + 1)
        shape[0], shape[axis] = keep.shape
        scores = suffix.affine(at.take(left), keep.reshape(1, *shape), reference[left][None])[0]
        count[left[scores.argmax(axis=-1) == pairs.right[left]]] = size
    return per_unit, place, count


# -- the difference ------------------------------------------------------------------------------


def _features(experiment: Experiment, layer: Layer) -> tuple[str, int]:
    """Return the tensor that a layer's features are read at, and the axis of its units."""
    for site in experiment.sites:
        if site.writers == (layer.name,):
            return site.tensor, site.axis
    return layer.output, layer.unit_axis


def _slopes(experiment: Experiment, layer: Layer, features: tuple[str, int], pairs: Pairs) -> tuple[Array, bool]:
    """Return the gradient of the norm of the re-weighted difference with respect to the layer's output.

    Where the features lie behind a step without a derivative, the layer's output takes their place.
    """
    tensor, axis = features
    try:
        between = None if tensor == layer.output else _Between(experiment, layer.output, tensor, len(pairs))
    except NoGradient:
        return _slopes(experiment, layer, (layer.output, layer.unit_axis), pairs)
    is_now, ought = (experiment.tensors([tensor], part.inputs)[0] for part in (pairs.wrong, pairs.references))
    importance, smooth = _importance(experiment, tensor, axis, pairs)
    weighted = (is_now - ought) * (importance + 0.5)
    norms = np.linalg.norm(weighted.reshape(len(weighted), -1), axis=1)
    unit = weighted / np.maximum(norms, 1e-30).reshape(-1, *[1] * (weighted.ndim - 1)) * (importance + 0.5)
    seed = unit.astype(is_now.dtype)
    return (seed if between is None else between.pull_back(pairs, seed)), smooth


class _Between:
    """The steps from a layer's output to its features, backward."""

    def __init__(self, experiment: Experiment, start: str, stop: str, samples: int) -> None:
        """Write the derivative.

        Raises:
            NoGradient: a step has none.
        """
        what = str(experiment.model.path)
        part, crossing = surgery.part_behind(experiment.copy, start, stop, what)
        self._experiment, self._names = experiment, [start, *crossing]
        probe = experiment.tensors(self._names, experiment.probe)
        shapes = {name: value.shape[1:] for name, value in zip(self._names, probe, strict=True)}
        rows = min(samples, experiment.rows_of(part))
        self._gradients = Gradients(part, [start], stop, shapes, experiment.device, rows, what)

    def pull_back(self, pairs: Pairs, seed: Array) -> Array:
        """Return the gradient by the layer's output of one by the features."""
        values = self._experiment.tensors(self._names, pairs.wrong.inputs)
        inputs = dict(zip(self._names, values, strict=True))
        return self._gradients(inputs, seed)[1][self._names[0]]


def _importance(experiment: Experiment, tensor: str, axis: int, pairs: Pairs) -> tuple[Array, bool]:
    """Return w, in the shape of the features or of their units, and whether it came from a gradient."""
    right = pairs.right

    def of_cross_entropy(scores: Array) -> Array:
        slope = np.exp(log_softmax(scores))
        slope[np.arange(len(right)), right] -= 1
        return slope

    try:
        backward = Backward(experiment, tensor)
        found = np.abs(backward.slope(backward.cache(pairs.wrong.inputs), of_cross_entropy)[1]).astype(np.float64)
        smooth = True
    except NoGradient:
        found, smooth = _by_intervention(experiment, tensor, axis, pairs), False
    largest = found.reshape(len(found), -1).max(axis=1)
    return found / np.maximum(largest, 1e-30).reshape(-1, *[1] * (found.ndim - 1)), smooth


def _by_intervention(experiment: Experiment, tensor: str, axis: int, pairs: Pairs) -> Array:
    """Return how much the cross-entropy moves when each unit takes its value on the reference, [pairs, 1 ... units]."""
    suffix = experiment.suffix(tensor, "affine")
    at, reference = suffix.cache(pairs.wrong.inputs), suffix.cache(pairs.references.inputs).base[None]
    units, rank = at.base.shape[axis], at.base.ndim - 1
    site = Site(tensor, axis, units, "", (), ())
    before = _cross_entropy(_unchanged(suffix, at)[None], pairs.right)
    moved = np.zeros((units, len(pairs)))
    for part in batches(units, 64):
        keep = np.ones((part.stop - part.start, units), at.base.dtype)
        keep[np.arange(len(keep)), np.arange(part.start, part.stop)] = 0
        scores = suffix.affine(at, spread_units(keep, site, rank), reference)
        moved[part] = np.abs(before - _cross_entropy(scores, pairs.right))
    shape = [1] * (rank + 1)
    shape[0], shape[axis if axis > 0 else rank + 1 + axis] = len(pairs), units
    return moved.T.reshape(shape)


def _cross_entropy(scores: Array, right: Array) -> Array:
    found: Array = -log_softmax(scores)[:, np.arange(len(right)), right]
    return found


def _unchanged(suffix: Suffix, at: Activations) -> Array:
    """Return the scores that activations lead to."""
    ones = np.ones((1, 1, *[1] * (at.base.ndim - 1)), at.base.dtype)
    return suffix.affine(at, ones, np.zeros_like(ones))[0]


def _by_sample_and_unit(values: Array, site: Site) -> Array:
    """Return the norm over positions of every sample and unit, [samples, units]."""
    moved = np.moveaxis(values, site.axis, 1)
    found: Array = np.linalg.norm(moved.reshape(len(values), site.units, -1), axis=2)
    return found


def _counts(shares: Sequence[float], size: int) -> Array:
    """Return the numbers that shares of a size stand for, each once."""
    counts = np.unique(np.round(np.array(shares) * size).astype(int))
    found: Array = counts[counts > 0]
    return found


def _unit_counts(live: int) -> list[int]:
    steps = [1, 2, 3, 5, 7]
    sizes = [step * 10**power for power in range(7) for step in steps]
    return [size for size in sizes if size < live] + [live]
