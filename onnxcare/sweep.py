"""Forcing the units of a site, many units and values in one run.

Where all that reads a site is one linear layer, setting a unit changes the layer's output by what that unit alone
brings to it (one row of a product, one input channel of a convolution). So the graph is cut behind the layer, whose
output is computed once per data set, and an intervention takes one contribution out and puts another one in: the layer
itself never runs again. This is exact up to the rounding of the layer's output. Where a skip connection or another
operator reads the site too, the graph is cut at the site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxcare.data import Inputs
from onnxcare.experiment import Experiment
from onnxcare.graph import surgery
from onnxcare.graph.layers import Layer
from onnxcare.graph.sites import Site
from onnxcare.runtime import batches
from onnxcare.suffix import Activations, Part, crossing, crossing_shapes

Array = np.ndarray
# Makes something of scores, [..., samples, classes] -> [...].
Reading = Callable[[Array], Array]


def _scores(scores: Array) -> Array:
    return scores


@dataclass(frozen=True)
class Held:
    """What a sweep needs of some samples, samples on axis 0.

    Attributes:
        site: the site's activations.
        read: what the reader reads: the same values, maybe in another shape.
        at: the activations at the cut.
    """

    site: Array
    read: Array
    at: Activations

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.site)


class Sweep:
    """Interventions on single units of one site.

    Attributes:
        site: the site.
    """

    def __init__(self, experiment: Experiment, site: Site) -> None:
        """Cut the graph behind the layer that reads the site, or at the site.

        Raises:
            ModelError: the graph cannot be cut there.
        """
        self._experiment = experiment
        self._reader = experiment.once(("reader", site.tensor), lambda: Reader.of(experiment, site))
        if self._reader is None:
            self._suffix = experiment.suffix(site.tensor, "affine")
        else:
            self._suffix = experiment.suffix(self._reader.layer.output, "sweep", self._reader.layer)
        self._forcing: Forcing | None = None
        self.site = site

    def pieces(self, inputs: Inputs, multiple: int = 1) -> Iterator[tuple[slice, Held]]:
        """Yield what is needed of all samples, as many at a time as fit into their share of the memory.

        Args:
            inputs: the samples.
            multiple: so many samples belong together.
        """
        read = self.site.tensor if self._reader is None else self._reader.layer.input
        names = list(dict.fromkeys([self.site.tensor, read]))
        for rows, at, values in self._suffix.pieces(inputs, multiple, names):
            yield rows, Held(values[0], values[-1], at)

    def hold(self, inputs: Inputs) -> Held:
        """Return what is needed of the samples.

        Raises:
            ModelError: that takes more than its share of the memory.
        """
        self._suffix.need_room(inputs)
        ((_, held),) = self.pieces(inputs)
        return held

    def force(self, held: Held, units: Array, values: Array, of: Reading = _scores) -> Array:
        """Return the scores [U, V, N, classes] under do(units[u] := values[u, v]), or what is read of them.

        Args:
            held: N samples.
            units: [U] indices of units; a unit of a convolution is set at all positions.
            values: [U, V].
            of: what to make of scores [..., N, classes].
        """
        if self._reader is None:
            count = values.shape[1]
            each = np.repeat(units, count)
            scores = self._suffix.affine(held.at, self._kept(held, each), self._spread(held, values.reshape(-1, 1)))
            return of(scores.reshape(len(units), count, *scores.shape[1:]))
        return self._swept(held, units, values, of)

    def exchange(self, held: Held, other: Held, units: Array, of: Reading = _scores) -> Array:
        """Return the scores [U, N, classes] where units[u] has the values it has on other samples, row by row.

        `of` says what to make of scores [..., N, classes].
        """
        if self._reader is None:
            return of(self._suffix.affine(held.at, self._kept(held, units), other.site[None]))
        difference = replace(held, read=held.read - other.read)
        return self._swept(difference, units, np.zeros((len(units), 1)), of)[:, 0]

    def _swept(self, held: Held, units: Array, values: Array, of: Reading) -> Array:
        assert self._reader is not None
        if self._forcing is None or not self._forcing.rests_on(held):
            self._forcing = Forcing(self._suffix.part, self._reader, held, self._suffix.rows)
        step = self._forcing.units_per_run(values.shape[1])
        jobs = [(units[part], values[part]) for part in batches(len(units), step)]
        decision = self._experiment.decision
        return np.concatenate(self._experiment.map(self._forcing, jobs, lambda y: of(decision.scores(y))))

    def _kept(self, held: Held, units: Array) -> Array:
        keep = np.ones((len(units), self.site.units), held.site.dtype)
        keep[np.arange(len(units)), units] = 0
        return self._spread(held, keep)

    def _spread(self, held: Held, values: Array) -> Array:
        return spread_units(values, self.site, held.site.ndim - 1)


class Reader:
    """A linear layer as the units of a site are seen by it: what each of them alone brings to its output.

    Attributes:
        layer: the layer.
    """

    def __init__(self, layer: Layer, matrix: Array, features: Array) -> None:
        """Lay out the weights by units.

        Args:
            layer: the layer.
            matrix: [groups, d, outputs / groups] its matrix without the bias.
            features: [units, m] the input features, or channels, that hold each unit.
        """
        self.layer, self._matrix, self._features = layer, matrix, features

    @classmethod
    def of(cls, experiment: Experiment, site: Site) -> Reader | None:
        """Return the layer that alone reads a site; None where there is none, or its inputs mix units or samples."""
        if site.other is not None or len(site.readers) != 1:
            return None
        (layer,) = site.readers
        if not np.issubdtype(layer.weight.dtype, np.floating) or layer.input in experiment.lost:
            return None
        features = features_of(experiment, site, layer)
        return None if features is None else cls(layer, layer.matrix(experiment.read(layer.weight), None), features)

    def feeds(self, read: Array, units: Array, values: Array) -> tuple[Array, Array, Array]:
        """Return what units hold, their weights, and the shifts that values bring: inputs of a `sweep` suffix.

        Args:
            read: what the layer reads, [N, ...].
            units: [U]; a convolution takes one at a time.
            values: [U, V].
        """
        features = self._features[units]
        if self.layer.convolution is None:
            weight = self._matrix[0][features]  # [U, m, o]
            held = np.moveaxis(read[..., features], -2, 0)[:, None]  # [U, 1, N, ..., m]
            inner = [1] * (read.ndim - 1)
            shift = values[:, :, None] * weight.sum(axis=1)[:, None]  # [U, V, o]
            return (
                held,
                weight.reshape(len(units), 1, *inner[1:], *weight.shape[1:]),
                shift.reshape(*shift.shape[:2], *inner, shift.shape[-1]),
            )
        (channels,) = features
        weight = self._kernel(channels)
        slope = self._slope(weight, read.shape[2:])
        return read[:, channels], weight, values[0].reshape(-1, *[1] * (slope.ndim + 1)) * slope

    def _kernel(self, channels: Array) -> Array:
        """Return the weights of some input channels, [outputs, m, ...]; other groups' outputs do not see them."""
        geometry = self.layer.convolution
        assert geometry is not None
        inputs, outputs = self.layer.inputs // geometry.groups, self.layer.outputs // geometry.groups
        taps = self._matrix.reshape(geometry.groups, inputs, *geometry.kernel, outputs)
        kernel = np.zeros((self.layer.outputs, len(channels), *geometry.kernel), self._matrix.dtype)
        for index, channel in enumerate(channels):
            group, inner = divmod(int(channel), inputs)
            kernel[group * outputs : (group + 1) * outputs, index] = np.moveaxis(taps[group, inner], -1, 0)
        return kernel

    def _slope(self, kernel: Array, size: tuple[int, ...]) -> Array:
        """Return what a one everywhere in the channels adds to the output, [outputs, positions ...], 1 if all alike."""
        inside, shape = self.layer.inside(size)  # [positions, taps]
        per_tap = kernel.sum(axis=1).reshape(len(kernel), -1)
        if inside.all():
            return per_tap.sum(axis=1).reshape(-1, *[1] * len(size))
        return (per_tap @ inside.T.astype(kernel.dtype)).reshape(-1, *shape)


class Forcing:
    """Runs a suffix with units forced to values."""

    def __init__(self, part: Part, reader: Reader, held: Held, rows: int) -> None:
        """Take what all jobs share.

        Args:
            part: the suffix, cut behind the reader.
            reader: the reader.
            held: the samples.
            rows: how many rows one run takes.
        """
        self._part, self._reader, self._rows = part, reader, rows
        self._read, self._at = held.read, held.at

    def rests_on(self, held: Held) -> bool:
        """Return whether these are the very arrays that it was made of."""
        return held.read is self._read and held.at is self._at

    def units_per_run(self, values: int) -> int:
        """Return how many units go through one run at so many values."""
        if self._reader.layer.convolution is not None:
            return 1
        return max(1, self._rows // (values * len(self._at)))

    def __call__(self, units: Array, values: Array) -> Array:
        """Return the answers [U, V, N, ...] for as many units as go through one run."""
        dtype = self._at.base.dtype
        held, weight, shift = self._reader.feeds(self._read, units, values.astype(dtype))
        by_unit = self._reader.layer.convolution is None  # then units and values have an axis each
        size = values.shape
        values_together = min(size[1], self._rows)
        step = max(1, self._rows // (len(units) * values_together))
        answers = []
        for rows in batches(len(self._at), step):
            across = []
            for part in batches(size[1], values_together):
                members, samples = len(units) * (part.stop - part.start), rows.stop - rows.start
                y = self._part.session.run(
                    {
                        surgery.BASE: self._at.base[None, rows],
                        surgery.UNIT: held[:, :, rows] if by_unit else held[rows],
                        surgery.WEIGHT: weight,
                        surgery.SHIFT: shift[:, part] if by_unit else shift[part],
                        **crossing(self._at, rows),
                        **crossing_shapes(self._at, rows, members),
                    }
                )[0]
                across.append(y.reshape(len(units), part.stop - part.start, samples, *y.shape[1:]))
            answers.append(np.concatenate(across, axis=1) if len(across) > 1 else across[0])
        return np.concatenate(answers, axis=2) if len(answers) > 1 else answers[0]


def features_of(experiment: Experiment, site: Site, layer: Layer) -> Array | None:
    """Return the features, or channels, of a layer's input that hold each unit of a site, [units, m].

    The steps in between only move values, so sending unit numbers through them shows where each one goes.

    Returns:
        The indices; None where positions of the layer's input hold different units in the same feature.
    """
    shape = experiment.tensors([site.tensor], experiment.first(1))[0].shape
    numbers = np.arange(site.units, dtype=np.float32)
    axis = site.axis % len(shape)
    sent = np.broadcast_to(numbers.reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)
    arrived = sent if layer.input == site.tensor else experiment.between(site.tensor, layer.input, sent)
    units = np.rint(arrived[0]).astype(int)
    # One row for every place at which the layer reads all its inputs: positions of a map, tokens.
    places = units.reshape(layer.inputs, -1).T if layer.convolution else units.reshape(-1, layer.inputs)
    if (places != places[0]).any():
        return None
    return np.argsort(places[0], kind="stable").reshape(site.units, -1)


def spread_units(values: Array, site: Site, rank: int) -> Array:
    """Place [P, units or 1] values on the unit axis of [P, 1, ...] arrays with `rank` axes behind the samples."""
    axis = site.axis if site.axis > 0 else rank + 1 + site.axis
    shape = [1] * (rank + 2)
    shape[0], shape[axis + 1] = values.shape
    return values.reshape(shape)
