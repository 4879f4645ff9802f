"""The part of a graph behind a cut, run for families of interventions.

No session is made per intervention or per candidate: a family of P interventions is fed to one session as arrays, a
block of its members at a time. What the part needs of the samples is computed once (`Activations`); where that would
not fit into the memory allowed, piece by piece (`Suffix.pieces`). Blocks are the same on one machine and on many, so
that results are, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from onnxcare.data import Inputs
from onnxcare.errors import ModelError
from onnxcare.graph import surgery
from onnxcare.runtime import Device, Session, batches

if TYPE_CHECKING:
    from onnxcare.experiment import Experiment

Array = np.ndarray

# Share of the memory that the activations cached at one cut may take.
_CACHED = 0.25
# So many members of a family, if there are, go through one run.
_MEMBERS = 16


@dataclass(frozen=True)
class Activations:
    """Cached tensors at a cut: the cut tensor and those that cross it, samples on axis 0."""

    base: Array
    boundary: Mapping[str, Array]

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self.base)

    def take(self, rows: slice | Array) -> Activations:
        """Return the activations of some of the samples."""
        return Activations(self.base[rows], {k: v[rows] for k, v in self.boundary.items()})


class Suffix:
    """The part of the graph behind a cut.

    Attributes:
        tensor: where the graph is cut.
        part: the piece of the graph.
        rows: how many rows, samples times members of a family, one run takes.
        nbytes: about how many bytes its session holds.
    """

    def __init__(self, experiment: Experiment, make: Callable[[], surgery.Cut]) -> None:
        """Load the part behind a cut of the experiment's copy, which `make` makes."""
        cut = make()
        self._experiment, self._boundary, self.tensor = experiment, cut.boundary, cut.tensor
        self.rows, content = experiment.rows_of(cut.suffix), cut.suffix.SerializeToString()
        del cut  # onnxruntime makes copies of its own
        # Runs go side by side, one thread each.
        session = Session(content, experiment.device, what=str(experiment.model.path), threads=1)
        self.nbytes = len(content)
        self.part = Part(session, lambda: make().suffix.SerializeToString())
        one = experiment.tensors([self.tensor, *self._boundary], experiment.first(1))
        self._sample_bytes = sum(value.nbytes for value in one)

    # -- what it needs of the samples ------------------------------------------------------------

    def cache(self, inputs: Inputs) -> Activations:
        """Run the part in front of the cut once and return what the suffix needs of it.

        Raises:
            ModelError: that takes more than its share of the memory.
        """
        self.need_room(inputs)
        ((_, at, _),) = self.pieces(inputs)
        return at

    def need_room(self, inputs: Inputs) -> None:
        """Make sure that the activations of so many samples fit into their share of the memory.

        Raises:
            ModelError: they do not.
        """
        samples = len(next(iter(inputs.values())))
        if samples > self._fitting:
            raise ModelError(
                f"{self._experiment.model.path}: the activations of {samples} samples at {self.tensor!r} take about "
                f"{samples * self._sample_bytes >> 20} MiB; allow four times as much with --memory, or give less data"
            )

    def pieces(
        self, inputs: Inputs, multiple: int = 1, beside: Sequence[str] = ()
    ) -> Iterator[tuple[slice, Activations, list[Array]]]:
        """Yield the activations of all samples, as many at a time as fit into their share of the memory.

        Args:
            inputs: the samples.
            multiple: so many samples belong together.
            beside: further tensors to compute in the same run.

        Yields:
            Which samples, what the suffix needs of them, and the further tensors.
        """
        step = max(1, self._fitting // multiple) * multiple
        names = list(dict.fromkeys([self.tensor, *self._boundary, *beside]))
        for rows in batches(len(next(iter(inputs.values()))), step):
            part = {name: values[rows] for name, values in inputs.items()}
            known = dict(zip(names, self._experiment.tensors(names, part), strict=True))
            at = Activations(known[self.tensor], {name: known[name] for name in self._boundary})
            yield rows, at, [known[name] for name in beside]

    @property
    def _fitting(self) -> int:
        return int(_CACHED * self._experiment.memory) // max(1, self._sample_bytes)

    # -- families --------------------------------------------------------------------------------

    def affine(self, at: Activations, keep: Array, reference: Array) -> Array:
        """Return the scores [P, N, classes] under ``h * keep + reference * (1 - keep)``.

        Args:
            at: cached activations of N samples.
            keep: [P, 1 or N, ...] broadcastable to the activations.
            reference: [P or 1, 1 or N, ...] likewise.
        """
        dtype = at.base.dtype
        varying = {surgery.KEEP: keep.astype(dtype, copy=False)}
        constant: dict[str, Array] = {}
        (constant if len(reference) == 1 else varying)[surgery.REFERENCE] = reference.astype(dtype, copy=False)
        return self._run(at, constant, varying)

    def span(self, at: Activations, coefficients: Array, directions: Array) -> Array:
        """Return the scores [P, N, classes] under ``h + sum_k coefficients[p, k] * directions[k]``.

        Args:
            at: cached activations of N samples.
            coefficients: [P, K].
            directions: [K, N, ...] with the shape of the activations.
        """
        dtype = at.base.dtype
        constant = {surgery.DIRECTIONS: directions.astype(dtype, copy=False)}
        return self._run(at, constant, {surgery.COEFFICIENTS: coefficients.astype(dtype, copy=False)})

    def _run(self, at: Activations, constant: Mapping[str, Array], varying: Mapping[str, Array]) -> Array:
        # Only the latest family is kept, whichever suffix it belongs to: it holds on to its samples.
        family = self._experiment.family
        if family is None or not family.rests_on(self.part, at, constant):
            family = self._experiment.family = Family(self.part, at, constant)
        members = len(next(iter(varying.values())))
        # Several members on a few samples share what they read of these.
        together = max(min(members, self.rows, _MEMBERS), self.rows // len(at))
        tiles = list(batches(len(at), max(1, self.rows // together)))
        blocks = [{name: values[part] for name, values in varying.items()} for part in batches(members, together)]
        jobs = [(block, rows) for block in blocks for rows in tiles]
        answers = iter(self._experiment.map(family, jobs, self._experiment.decision.scores))
        return np.concatenate([np.concatenate([next(answers) for _ in tiles], axis=1) for _ in blocks])


class Part:
    """A piece of a graph in a session, which is opened anew in every process that this is sent to."""

    def __init__(self, session: Session, model: Callable[[], bytes]) -> None:
        """Hold a session; `model` makes its model again when it has to be sent, so that it need not be held twice."""
        self.session, self._model = session, model

    def __getstate__(self) -> tuple[bytes, Device, str]:
        return self._model(), self.session.device, self.session.name

    def __setstate__(self, state: tuple[bytes, Device, str]) -> None:
        model, device, name = state
        # There is one worker a core.
        self.session = Session(model, device, what=name, threads=1)
        self._model = lambda: model


class Family:
    """Interventions on the same samples that differ in a few arrays."""

    def __init__(self, part: Part, at: Activations, constant: Mapping[str, Array]) -> None:
        """Lay out what all members share.

        Args:
            part: the suffix.
            at: activations of the samples.
            constant: inputs of the suffix that are the same for all members, [1 or K, 1 or samples, ...].
        """
        self._part, self._at, self._constant = part, at, constant
        self._tiles: dict[tuple[int, int], dict[str, Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_tiles": {}}

    def rests_on(self, part: Part, at: Activations, constant: Mapping[str, Array]) -> bool:
        """Return whether this is the very suffix, and these are the very arrays, that it was made of."""
        same = part is self._part and at is self._at and constant.keys() == self._constant.keys()
        return same and all(self._constant[name] is values for name, values in constant.items())

    def __call__(self, varying: Mapping[str, Array], rows: slice) -> Array:
        """Return the answers [members, samples, ...] of some members on some samples."""
        members = len(next(iter(varying.values())))
        feeds = {name: values if values.ndim < 3 else _samples(values, rows) for name, values in varying.items()}
        y = self._part.session.run(self._shared(rows, members) | feeds)[0]
        return y.reshape(members, rows.stop - rows.start, *y.shape[1:])

    def _shared(self, rows: slice, members: int) -> dict[str, Any]:
        """Return what a run on some samples takes beside what varies; it is laid out, or sent to the GPU, once."""
        key = rows.start, rows.stop
        if key not in self._tiles:
            tile = {surgery.BASE: self._at.base[None, rows]}
            for name, values in self._constant.items():
                part = _samples(values, rows)
                tile[name] = part.reshape(len(part), -1) if name == surgery.DIRECTIONS else part
            self._tiles[key] = self._part.session.resident(tile | crossing(self._at, rows))
        return self._tiles[key] | crossing_shapes(self._at, rows, members)


def _samples(values: Array, rows: slice) -> Array:
    """Return some of the samples on axis 1, leaving an axis of length one as it is."""
    return values if values.shape[1] == 1 else values[:, rows]


def crossing(at: Activations, rows: slice) -> dict[str, Array]:
    """Return, as a suffix takes them, the tensors that cross the cut beside the cut one."""
    return {surgery.boundary_input(name): values[None, rows] for name, values in at.boundary.items()}


def crossing_shapes(at: Activations, rows: slice, members: int) -> dict[str, Array]:
    """Return the inputs that say how far these tensors are repeated for the members of a family."""
    shapes = {}
    samples = rows.stop - rows.start
    for name, values in at.boundary.items():
        shapes[surgery.boundary_shape(name)] = np.array([members, samples, *values.shape[1:]], np.int64)
        shapes[surgery.merged_shape(name)] = np.array([members * samples, *values.shape[1:]], np.int64)
    return shapes
