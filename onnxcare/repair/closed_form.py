"""Twin regression: an interchange intervention turned into a closed-form change of one layer's weights.

Setting one layer's output on triggered samples to its output on their clean twins restores the answer at the
layers that carry the misbehaviour. With A_c, A_t the layer's inputs on clean and triggered samples (rows
of its matrix product, a column of ones for the bias) and T = output(twin) - output(triggered), the change

    D = argmin  alpha * E|A_c D|^2 + E|A_t D - T|^2 + rho * tr(G_c) / d * |D|^2
      = (alpha * G_c + G_t + rho * tr(G_c) / d * I)^-1 R           G = E[A' A],  R = E[A_t' T]

makes the layer do it by itself and moves it least on clean samples. Expectations are over samples, with sums over the
positions of a convolution. The best change of rank r is D V V' with V the top r eigenvectors of D' H D, H the matrix
that is inverted above. Where the layer's only consumer adds it to a skip connection, T is taken behind the addition,
so that the layer also cancels what arrives over the skip. Kin to causal tracing and rank-one editing (Meng et al.,
ROME, NeurIPS 2022).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse.linalg

from onnxcare.data import Dataset, Inputs
from onnxcare.experiment import Experiment
from onnxcare.graph.layers import Layer
from onnxcare.panel import Panel
from onnxcare.properties.base import Property
from onnxcare.runtime import batches
from onnxcare.suffix import Activations

Array = np.ndarray

# Rows of a matrix product are made in pieces of about this many bytes; in float64 they take twice as many.
_PIECE = 32 << 20
# A channel whose part in a sum is smaller than this share of the largest one's cannot be aimed through.
_FAINT = 1e-3
# Up to so many outputs all eigenvectors are computed.
_DENSE = 256
# The settings that are tried: alpha and rho. What only stands in for the true trigger is weighed more, so that a change
# reaches beyond it.
_ALPHAS, _REACHING = (1.0, 10.0), (0.1, 1.0)
RHOS = (1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class Regression:
    """The sums that every setting's solution follows from; matrices are [groups, d, d] or [groups, d, o].

    Attributes:
        clean: G_c.
        bad: G_t.
        right: R, of the bad samples.
        drift: the same of the clean samples, E[A_c' T_c] with T_c = output(original) - output, where the layers in
            front have been changed already; None where they have not.
    """

    clean: Array
    bad: Array
    right: Array
    drift: Array | None = None

    def solve(self, alpha: float, rho: float, ranks: Sequence[int | None]) -> Iterator[Array]:
        """Yield the change D of the layer's matrix for each rank, [groups, d, o], float64.

        Args:
            alpha: weight of staying put on clean samples.
            rho: ridge, relative to the mean squared clean input.
            ranks: largest rank of each change; None for no limit.
        """
        most = max((rank for rank in ranks if rank is not None), default=0)
        solved = []
        for system, right in self._systems(alpha, rho):
            full = _solution(system, right)
            solved.append((full, _top_directions(full, right, most)))
        for rank in ranks:
            parts = [full if rank is None else _project(full, top[:, :rank]) for full, top in solved]
            yield parts[0][None] if len(parts) == 1 else np.stack(parts)

    def solve_some(self, alpha: float, rho: float, counts: Sequence[int]) -> Iterator[Array]:
        """Yield, for each count, the change that touches only so many rows of each group's matrix, [groups, d, o].

        They are those that add most to the outputs in the unlimited change. The change is solved anew for them: cutting
        the unlimited one down to its largest values would leave most of the misbehaviour.
        """
        orders = []
        for group, (system, right) in enumerate(self._systems(alpha, rho)):
            power = np.diagonal(self.clean[group] + self.bad[group]) * (_solution(system, right) ** 2).sum(axis=1)
            orders.append(np.argsort(-power, kind="stable"))
        for count in counts:
            change = np.zeros(self.right.shape)
            for group, (system, right) in enumerate(self._systems(alpha, rho)):
                kept = np.sort(orders[group][:count])
                change[group, kept] = _solution(system[np.ix_(kept, kept)], right[kept])
            yield change

    def _systems(self, alpha: float, rho: float) -> Iterator[tuple[Array, Array]]:
        """Yield every group's matrix H and right-hand side."""
        d = self.clean.shape[-1]
        wanted = self.right if self.drift is None else self.right + alpha * self.drift
        for clean, bad, right in zip(self.clean, self.bad, wanted, strict=True):
            system = alpha * clean + bad
            # A unit that is dead on all samples leaves a zero row; the floor keeps the system solvable.
            floor = 1e-9 * np.trace(system) / d + 1e-12
            system[np.diag_indices(d)] += max(rho * np.trace(clean) / d, floor)
            yield system, right


def _solution(system: Array, right: Array) -> Array:
    """Solve a positive definite system, whose matrix is used up."""
    # Columns first, as LAPACK has it, a matrix can be factorised where it is.
    return scipy.linalg.cho_solve(scipy.linalg.cho_factor(system.T, overwrite_a=True), right)


def _top_directions(change: Array, right: Array, count: int) -> Array:
    """Return the top eigenvectors of D' H D, [o, count], highest first; H D = R, so it is D' R.

    Of a large matrix they are found by Lanczos iterations, which need no more than products with vectors.
    """
    outputs = change.shape[1]
    count = min(count, outputs)
    if not count:
        return np.zeros((outputs, 0))
    if outputs <= _DENSE:
        return np.linalg.eigh((change.T @ right + right.T @ change) / 2)[1][:, ::-1][:, :count]

    def times(vector: Array) -> Array:
        return (change.T @ (right @ vector) + right.T @ (change @ vector)) / 2

    form = scipy.sparse.linalg.LinearOperator((outputs, outputs), matvec=times, dtype=np.float64)
    values, vectors = scipy.sparse.linalg.eigsh(form, k=count, which="LA", v0=np.ones(outputs))
    found: Array = vectors[:, np.argsort(-values)]
    return found


def _project(change: Array, top: Array) -> Array:
    return change @ top @ top.T


def alphas(properties: Sequence[Property]) -> tuple[float, ...]:
    """Return the weights of staying put on clean samples that are tried."""
    return _REACHING if any(item.stand_in for item in properties) else _ALPHAS


def memory_needed(layer: Layer) -> int:
    """Return the bytes that the sums of a layer take, with one system being solved."""
    d = layer.features
    matrices = 2 * layer.groups + 2
    return matrices * d * d * np.dtype(np.float64).itemsize


def aimed_at(original: Experiment, layer: Layer) -> tuple[str, Array | None]:
    """Return the tensor at which a layer's output is aimed, and the factor of the output there; None for one."""
    behind = original.sum_behind(layer)
    return (layer.output, None) if behind is None else behind


class Aim:
    """What a layer's output should be: what the original computes there, on clean samples and on twins.

    Attributes:
        tensor: where output and aim are compared: the layer's output, or the sum that it goes into.
    """

    def __init__(self, original: Experiment, layer: Layer, clean: Dataset) -> None:
        """Say where to look; what is needed is computed once.

        Args:
            original: the model whose activations are aimed at.
            layer: the layer to change.
            clean: clean samples.
        """
        self.tensor, self._factor = aimed_at(original, layer)
        self._original, self._clean = original, clean
        self._known: list[tuple[Dataset, Array]] = []

    def shift(self, is_now: Array, samples: Dataset, twins: Dataset | None) -> Array:
        """Return T: what is to be added to the layer's output on every sample.

        Without twins, the shift between the mean bad and the mean clean output (of the same class, where labels
        are known) stands in for it.
        """
        if twins is not None:
            shift = self._ought(twins) - is_now
        else:
            shift = _mean_shift(is_now, samples, self._ought(self._clean), self._clean)
        return shift if self._factor is None else shift * _inverse(self._factor).astype(shift.dtype)

    def _ought(self, samples: Dataset) -> Array:
        for dataset, known in self._known:
            if dataset is samples:
                return known
        values = self._original.tensors([self.tensor], samples.inputs)[0]
        self._known.append((samples, values))
        return values


def accumulate(
    experiment: Experiment,
    layer: Layer,
    clean: Dataset,
    panel: Panel,
    aim: Aim | None = None,
    weights: Array | None = None,
) -> Regression:
    """Run the layer's inputs and targets through the sums, piece by piece.

    Args:
        experiment: the model.
        layer: the layer to change.
        clean: clean samples.
        panel: gives the bad samples of every property that can be transplanted to, and their twins.
        aim: what the layer's output should be, where layers in front of it have been changed, so that clean samples
            have drifted too; None for what the model itself computes.
        weights: of the positions, [positions] with a mean of one; None where all count alike.
    """
    clean_sum = right_sum = bad_sum = drift = None
    if aim is None:
        aim = Aim(experiment, layer, clean)
        for x in _pieces(experiment, layer, experiment.tensors([layer.input], clean.inputs)[0]):
            clean_sum = _plus(clean_sum, _gram(_weighed(layer.rows(x), weights)), len(clean))
    else:
        for rows, wanted in _aimed(experiment, layer, aim, clean, clean, weights):
            clean_sum = _plus(clean_sum, _gram(rows), len(clean))
            drift = _plus(drift, _across(rows, wanted), len(clean))
    for item, found in zip(panel.properties, panel.evidence, strict=True):
        if not item.transplantable:
            continue
        for rows, wanted in _aimed(experiment, layer, aim, found.bad, found.twins, weights):
            bad_sum = _plus(bad_sum, _gram(rows), len(found.bad))
            right_sum = _plus(right_sum, _across(rows, wanted), len(found.bad))
    assert clean_sum is not None and bad_sum is not None and right_sum is not None
    return Regression(clean_sum, bad_sum, right_sum, drift)


def effects(experiment: Experiment, layer: Layer, inputs: Inputs, changes: Sequence[Array], at: Activations) -> Array:
    """Return what each change of the weights adds to the layer's output, [K, samples, ...]."""
    found = np.empty((len(changes), *at.base.shape), at.base.dtype)
    start = 0
    for x in _pieces(experiment, layer, experiment.tensors([layer.input], inputs)[0]):
        here = slice(start, start + len(x))
        start += len(x)
        rows = layer.rows(x)
        for index, change in enumerate(changes):
            added = layer.product(rows, change.astype(x.dtype))
            found[index, here] = layer.from_rows(added, at.base[here].shape)
    return found


def _inverse(factor: Array) -> Array:
    """Return one over a factor; a channel that hardly goes on is left alone."""
    alive = np.abs(factor) > _FAINT * np.abs(factor).max()
    return np.divide(1, factor, out=np.zeros_like(factor), where=alive)


def _mean_shift(is_now: Array, bad: Dataset, ought: Array, clean: Dataset) -> Array:
    """Return for every bad sample the shift from the mean bad to the mean clean output, per class if known."""
    if bad.labels is None or clean.labels is None:
        return np.broadcast_to(ought.mean(axis=0) - is_now.mean(axis=0), is_now.shape)
    shift = np.empty_like(is_now)
    for label in np.unique(bad.labels):
        mine, same = bad.labels == label, clean.labels == label
        goal = ought[same].mean(axis=0) if same.any() else ought.mean(axis=0)
        shift[mine] = goal - is_now[mine].mean(axis=0)
    return shift


def _aimed(
    experiment: Experiment,
    layer: Layer,
    aim: Aim,
    samples: Dataset,
    twins: Dataset | None,
    weights: Array | None,
) -> Iterator[tuple[Array, Array]]:
    """Yield the layer's input rows in pieces, with the rows of what is to be added to its output, both weighed."""
    inputs, is_now = experiment.tensors([layer.input, aim.tensor], samples.inputs)
    target = aim.shift(is_now, samples, twins)
    start = 0
    for x in _pieces(experiment, layer, inputs):
        here = slice(start, start + len(x))
        start += len(x)
        yield _weighed(layer.rows(x), weights), _weighed(layer.output_rows(target[here]), weights)


def _weighed(rows: Array, weights: Array | None) -> Array:
    """Return rows [groups, samples, positions, ...] times the roots of the positions' weights."""
    return rows if weights is None else rows * np.sqrt(weights)[:, None].astype(rows.dtype)


def _pieces(experiment: Experiment, layer: Layer, inputs: Array) -> Iterator[Array]:
    """Yield the layer's input in pieces whose rows stay within bounds."""
    per_sample = layer.rows(inputs[:1]).nbytes
    step = max(1, min(_PIECE, experiment.memory // 8) // max(1, per_sample))
    for rows in batches(len(inputs), step):
        yield inputs[rows]


def _flat(rows: Array) -> Array:
    """Join samples and positions: [groups, samples, positions, d] -> [groups, rows, d], float64."""
    return rows.reshape(rows.shape[0], -1, rows.shape[-1]).astype(np.float64)


def _gram(rows: Array) -> Array:
    flat = _flat(rows)
    return flat.transpose(0, 2, 1) @ flat


def _across(rows: Array, wanted: Array) -> Array:
    return _flat(rows).transpose(0, 2, 1) @ _flat(wanted)


def _plus(total: Array | None, part: Array, samples: int) -> Array:
    """Add a part of a mean to it, in place: these may be the largest arrays of all."""
    part /= samples
    if total is None:
        return part
    total += part
    return total
