"""Gradients through an experiment: of a cost by the activations at a cut, by weights, and by the model's own inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from onnxcare.data import Inputs
from onnxcare.errors import ModelError
from onnxcare.experiment import Experiment
from onnxcare.graph import surgery
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.gradients import Gradients, NoGradient, WeightGradients
from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.sites import Site
from onnxcare.runtime import Session, batches
from onnxcare.suffix import Activations

Array = np.ndarray
Slope = Callable[[Array], Array]  # scores [samples, classes] -> gradient of a cost with respect to them

# A derivative runs on a fixed number of rows, fastest on as many as stay in the caches: 16 for convolutions, hundreds
# for dense layers. That is this part of the rows that the memory of a run would bear, within bounds.
_PART, _FEWEST, _MOST = 32, 16, 512


class Backward:
    """The part behind a tensor, forward and backward.

    Attributes:
        tensor: where the graph is cut.
        boundary: names of the other tensors that cross the cut.
    """

    def __init__(self, experiment: Experiment, tensor: str) -> None:
        """Write and load the derivative.

        Raises:
            NoGradient: an operator behind the tensor has no derivative.
            ModelError: the scores do not depend on the tensor.
        """
        self._experiment = experiment
        self._decision = experiment.decision
        self.tensor = tensor
        self.boundary: tuple[str, ...] = ()
        self._gradients: Gradients | None = None
        if tensor == experiment.logits:
            return
        what = str(experiment.model.path)
        part, crossing = surgery.part_behind(experiment.copy, tensor, experiment.logits, what)
        self.boundary = tuple(crossing)
        names = [tensor, *crossing]
        shapes = {
            name: value.shape[1:]
            for name, value in zip(names, experiment.tensors(names, experiment.probe), strict=True)
        }
        self._forward = Session(part, experiment.device, what=what)
        self._rows = experiment.rows_of(part)
        rows = _derivative_rows(self._rows)
        experiment.make_room()
        self._gradients = Gradients(part, [tensor], experiment.logits, shapes, experiment.device, rows, what)

    def cache(self, inputs: Inputs) -> Activations:
        """Run the part in front of the cut once and return what is needed of it."""
        base, *boundary = self._experiment.tensors([self.tensor, *self.boundary], inputs)
        return Activations(base, dict(zip(self.boundary, boundary, strict=True)))

    def scores(self, at: Activations) -> Array:
        """Return the scores that activations lead to."""
        if self._gradients is None:
            return self._decision.scores(at.base)
        return self._decision.scores(self._forward.run_rows(self._feeds(at), rows_per_run=self._rows)[0])

    def slope(self, at: Activations, of: Slope) -> tuple[Array, Array]:
        """Return the scores, and the gradient of a cost with respect to the activations at the cut."""
        scores = self.scores(at)
        seed = self._decision.pull_back(of(scores)).astype(at.base.dtype)
        if self._gradients is None:
            return scores, seed.reshape(at.base.shape)
        return scores, self._gradients(self._feeds(at), seed)[1][self.tensor]

    def _feeds(self, at: Activations) -> dict[str, Array]:
        return {self.tensor: at.base, **at.boundary}


class Network:
    """A network, or the part of it behind a tensor, that takes its weights as it takes samples.

    Attributes:
        layers: its layers that can be rewritten.
        groups: weights and biases, those of a node together, of the layers and of other operators that hold some.
        parameters: all of them.
    """

    def __init__(self, experiment: Experiment, tensor: str | None = None) -> None:
        """Write and load the derivative.

        Args:
            experiment: where the other weights come from, and those of the layers where no values are given.
            tensor: where the graph is cut; None for all of it.

        Raises:
            NoGradient: there are no weights that may change, or an operator behind some has no derivative.
            ModelError: the scores do not depend on the tensor.
        """
        self._experiment = experiment
        self._decision = experiment.decision
        what = str(experiment.model.path)
        if tensor is None:
            part = surgery.expose(experiment.copy, [experiment.logits], what)
        else:
            part, _ = surgery.part_behind(experiment.copy, tensor, experiment.logits, what)
        held = {item.name for item in part.graph.initializer}
        reads = Counter(name for node in part.graph.node for name in node.input)
        self.layers = [layer for layer in experiment.open_layers if layer.weight.name in held]
        # What is read in front of the cut as well, or by another branch, would change more than is seen here.
        self.groups = [
            group
            for group in tunable(experiment)
            if all(item.name in held and reads[item.name] == len(item.users) for item in group)
        ]
        if not self.groups:
            raise NoGradient("no weights can be rewritten")
        self.parameters = tuple(parameter for group in self.groups for parameter in group)
        self._present = {parameter: experiment.read(parameter) for parameter in self.parameters}
        self._names = [info.name for info in part.graph.input]
        probe = experiment.tensors(self._names, experiment.probe)
        shapes = {name: value.shape[1:] for name, value in zip(self._names, probe, strict=True)}
        rows = _derivative_rows(experiment.rows_of(part))
        wanted = [parameter.name for parameter in self.parameters]
        experiment.make_room()
        self._gradients = WeightGradients(part, wanted, experiment.logits, shapes, experiment.device, rows, what)

    def cache(self, inputs: Inputs) -> Inputs:
        """Run the part in front of the cut once, and return what the network takes of these samples."""
        return dict(zip(self._names, self._experiment.tensors(self._names, inputs), strict=True))

    def scores(self, values: Mapping[Parameter, Array], at: Inputs) -> Array:
        """Return the scores of cached samples.

        Args:
            values: new values of some of the parameters.
            at: what `cache` returned for the samples, or some rows of it.
        """
        return self._decision.scores(self._gradients.values(self._fed(values), at))

    def slope(self, values: Mapping[Parameter, Array], at: Inputs, of: Slope) -> tuple[Array, dict[Parameter, Array]]:
        """Return the scores of cached samples, and the gradient of a cost by every parameter."""
        weights = self._fed(values)
        scores = self._decision.scores(self._gradients.values(weights, at))
        _, found = self._gradients(weights, at, self._decision.pull_back(of(scores)))
        return scores, {parameter: found[parameter.name] for parameter in self.parameters}

    def _fed(self, values: Mapping[Parameter, Array]) -> dict[str, Array]:
        known = {**self._present, **values}
        return {parameter.name: known[parameter].astype(parameter.dtype) for parameter in self.parameters}


def tunable(experiment: Experiment) -> list[tuple[Parameter, ...]]:
    """Return the weights that a gradient may move, those of a node together and the largest first."""
    form = experiment.form
    return Anatomy(form.view, form.parameters, experiment.layers, experiment.sites).groups


def input_gradients(experiment: Experiment) -> Gradients:
    """Return gradients of the logits with respect to the model's floating-point inputs.

    Raises:
        NoGradient: an operator on the way has no derivative, or no input is a floating-point one.
    """
    what = str(experiment.model.path)
    part = surgery.expose(experiment.copy, [experiment.logits], what)
    probe = experiment.probe
    wanted = [name for name, value in probe.items() if np.issubdtype(value.dtype, np.floating)]
    if not wanted:
        raise NoGradient("the model has no floating-point input")
    shapes = {name: value.shape[1:] for name, value in probe.items()}
    rows = _derivative_rows(experiment.rows_of(part))
    return Gradients(part, wanted, experiment.logits, shapes, experiment.device, rows, what)


def _derivative_rows(allowed: int) -> int:
    return min(allowed, max(_FEWEST, min(_MOST, allowed // _PART)))


def position_weights(
    experiment: Experiment, outputs: Mapping[str, Layer], inputs: Inputs, seed: int
) -> dict[str, Array]:
    """Return how much the scores depend on every position of layers' outputs.

    That is the mean square of the derivative of the scores, in a direction drawn anew for every sample.

    Args:
        experiment: the model.
        outputs: tensors in the shape of a layer's output, with that layer.
        inputs: samples.
        seed: of the directions.

    Returns:
        By tensor, [positions] with a mean of one.

    Raises:
        NoGradient: an operator behind a tensor has no derivative.
    """
    what = str(experiment.model.path)
    try:
        part = surgery.pushed(experiment.copy, list(outputs), experiment.logits, what)
    except ModelError as error:
        raise NoGradient(str(error)) from error
    values = dict(zip(outputs, experiment.tensors(list(outputs), experiment.probe), strict=True))
    shapes = {name: value.shape[1:] for name, value in experiment.probe.items()}
    shapes |= {surgery.push_input(name): value.shape[1:] for name, value in values.items()}
    rows = _derivative_rows(experiment.rows_of(part))
    wanted = [surgery.push_input(name) for name in outputs]
    experiment.make_room()
    gradients = Gradients(part, wanted, experiment.logits, shapes, experiment.device, rows, what)
    scores = experiment.scores(inputs)
    directions = experiment.decision.pull_back(np.random.default_rng(seed).normal(size=scores.shape))
    totals: dict[str, Array] = {}
    for batch in batches(len(scores), rows):
        feeds = {name: array[batch] for name, array in inputs.items()}
        count = len(scores[batch])
        feeds |= {surgery.push_input(n): np.zeros((count, *v.shape[1:]), v.dtype) for n, v in values.items()}
        found = gradients(feeds, directions[batch])[1]
        for name, layer in outputs.items():
            slopes = layer.output_rows(found[surgery.push_input(name)]).astype(np.float64)
            totals[name] = totals.get(name, 0) + (slopes**2).sum(axis=(0, 1, 3))
    return {name: total / np.mean(total) for name, total in totals.items() if np.any(total)}


class UnitSlopes:
    """Derivatives of the scores by the units of sites, summed over positions."""

    def __init__(self, experiment: Experiment, sites: Sequence[Site]) -> None:
        """Write and load the derivative.

        Raises:
            NoGradient: an operator behind a site has no derivative.
        """
        what = str(experiment.model.path)
        try:
            part = surgery.probed(experiment.copy, sites, experiment.logits, what)
        except ModelError as error:
            raise NoGradient(str(error)) from error
        self._experiment = experiment
        self._sites = sites
        self._shapes: dict[str, tuple[int, ...]] = {}
        probe = experiment.probe
        shapes = {name: value.shape[1:] for name, value in probe.items()}
        for site, value in zip(sites, experiment.tensors([s.tensor for s in sites], probe), strict=True):
            shape = tuple(site.units if axis == site.axis % value.ndim else 1 for axis in range(1, value.ndim))
            self._shapes |= {name(site.tensor): shape for name in (surgery.push_input, surgery.stretch_input)}
            self._dtype = value.dtype
        rows = _derivative_rows(experiment.rows_of(part))
        wanted = list(self._shapes)
        experiment.make_room()
        self._gradients = Gradients(
            part, wanted, experiment.logits, shapes | self._shapes, experiment.device, rows, what
        )

    def __call__(self, inputs: Inputs) -> tuple[Array, list[tuple[Array, Array]]]:
        """Return the scores [samples, classes], and for every site two slopes [units, samples, classes].

        The first is the derivative summed over a unit's positions, the second the same with its activation as a factor.
        """
        decision, samples = self._experiment.decision, len(next(iter(inputs.values())))
        scores = self._experiment.scores(inputs)
        nothing = {name: np.zeros((samples, *shape), self._dtype) for name, shape in self._shapes.items()}
        feeds = {**inputs, **nothing}
        by_class: list[dict[str, Array]] = []
        for index in range(scores.shape[-1]):
            seed = np.zeros_like(scores)
            seed[:, index] = 1
            found = self._gradients(feeds, decision.pull_back(seed))[1]
            by_class.append({name: values.reshape(samples, -1).T for name, values in found.items()})
        stacked = {name: np.stack([one[name] for one in by_class], axis=-1) for name in self._shapes}
        return scores, [
            (stacked[surgery.push_input(site.tensor)], stacked[surgery.stretch_input(site.tensor)])
            for site in self._sites
        ]
