"""Pruning: which output channels of a layer stand out, or do nothing for clean samples, and setting them to zero.

Two published orders, neither of which needs a sample that misbehaves:

- *Channel Lipschitz bounds* (CLP; Zheng, Tang, Li, Liu: Data-free Backdoor Removal Based on Channel Lipschitzness, ECCV
  2022). With K_c the kernel of output channel c as a matrix [input channels, kernel positions], and gamma, var of the
  BatchNormalization right behind the layer (1 where there is none, or where it was folded into the kernel):

      sigma_c = |gamma_c| / sqrt(var_c + epsilon) * (largest singular value of K_c)

  A channel that a trigger drives is far more sensitive than its neighbours: sigma_c > mean + u * std over its layer.

- *Dormancy* (Liu, Dolan-Gavitt, Garg: Fine-Pruning, RAID 2018): channels in order of their mean absolute activation on
  clean samples, lowest first. A channel that only a trigger wakes sleeps on clean samples.

A pruned channel is exactly zero in front of its activation function, whatever the input.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxcare.case import Case
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.view import attribute, operator
from onnxcare.repair.bench import matrix_of
from onnxcare.runtime import batches

Array = np.ndarray

# Steps between an activation function and the reader that blur how active a channel is.
_POOLING = frozenset("MaxPool AveragePool LpPool GlobalMaxPool GlobalAveragePool GlobalLpPool".split())


@dataclass(frozen=True)
class Normalisation:
    """The BatchNormalization right behind a layer.

    Attributes:
        output: the tensor it writes.
        scale: its gamma.
        shift: its beta.
        deviation: [outputs] sqrt(var + epsilon).
    """

    output: str
    scale: Parameter
    shift: Parameter
    deviation: Array


def prunable(case: Case) -> tuple[list[Layer], dict[str, str]]:
    """Return the hidden layers whose channels can be pruned: convolutions, or dense layers where there are none.

    Returns:
        The layers in graph order, and why others cannot be pruned.

    Raises:
        ModelError: no layer can be pruned.
    """
    anatomy = _anatomy(case)
    found, skipped = [], {}
    for layer in _hidden(anatomy):
        reason = hindrance(anatomy, layer)
        if reason is None:
            found.append(layer)
        else:
            skipped[layer.name] = reason
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ModelError(f"{case.experiment.model.path}: no channel can be pruned: {why or 'it has no hidden layer'}")
    return found, skipped


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why no channel of a layer can be pruned; None if they can."""
    if layer.refusal is not None:
        return layer.refusal
    if all(layer.name != other.name for other in _hidden(anatomy)):
        if layer.convolution or not any(other.convolution for other in _hidden(anatomy)):
            return "no other layer reads its units where they could be pruned"
        return "channels of convolutions are pruned where there are some"
    try:
        behind = _normalisation(anatomy, layer)
    except ModelError as error:
        return str(error)
    if behind is None and layer.bias is None and layer.beta != 0 and _leaves_something(anatomy, layer):
        return "its bias cannot be changed alone"
    return None


def last_prunable(anatomy: Anatomy) -> Layer | None:
    """Return the last layer whose channels can be pruned, None where there is none."""
    return next((layer for layer in reversed(_hidden(anatomy)) if hindrance(anatomy, layer) is None), None)


def normalised_behind(anatomy: Anatomy, layer: Layer) -> str | None:
    """Return what the BatchNormalization writes whose channels are pruned with those of a layer; None for none."""
    found = _normalisation(anatomy, layer) if hindrance(anatomy, layer) is None else None
    return None if found is None else found[0]


def _hidden(anatomy: Anatomy) -> list[Layer]:
    """Return the hidden convolutions, or the hidden dense layers where there are none."""

    def find() -> list[Layer]:
        written = {name for site in anatomy.sites for name in site.writers}
        hidden = [layer for layer in anatomy.layers if layer.name in written]
        return [layer for layer in hidden if layer.convolution] or hidden

    return anatomy.once(__name__, find)


def _anatomy(case: Case) -> Anatomy:
    experiment = case.experiment
    return Anatomy(experiment.form.view, experiment.form.parameters, experiment.layers, experiment.sites)


def lipschitz(case: Case, layer: Layer) -> Array:
    """Return the Lipschitz bound sigma of every output channel, [outputs].

    Raises:
        ModelError: the BatchNormalization behind the layer has tensors that cannot be changed alone.
    """
    product = matrix_of(case, layer)[:, : layer.features]
    kernels = product.transpose(0, 2, 1).reshape(layer.outputs, layer.inputs // layer.groups, -1)
    bounds = np.linalg.norm(kernels, ord=2, axis=(1, 2))
    behind = normalisation(case, layer)
    return bounds if behind is None else bounds * np.abs(case.read(behind.scale)) / behind.deviation


def outlying(bounds: Mapping[Layer, Array], u: float) -> dict[Layer, Array]:
    """Return the channels whose bound is more than `u` sample standard deviations above the mean, where there are any.

    Args:
        bounds: [outputs] for every layer.
        u: 3 as published.
    """
    limits = {layer: sigma.mean() + u * sigma.std(ddof=1) for layer, sigma in bounds.items() if len(sigma) > 1}
    over = {layer: np.flatnonzero(bounds[layer] > limit) for layer, limit in limits.items()}
    return {layer: channels for layer, channels in over.items() if len(channels)}


def dormancy(case: Case, layer: Layer) -> Array:
    """Return the channels by their mean absolute activation on the clean repair samples, lowest first.

    Activations are read behind the activation function, in front of pooling; where another layer's output is added in
    front of it, at what this layer contributes.

    Raises:
        ModelError: the BatchNormalization behind the layer has tensors that cannot be changed alone.
    """
    tensor, axis = _activations(case, layer)
    samples = case.splits.repair
    total = np.zeros(layer.outputs)
    for part in batches(len(samples), case.experiment.rows_per_run):
        values = np.abs(case.experiment.tensors([tensor], samples.take(part).inputs)[0])
        per_channel = np.moveaxis(values, axis, 0).reshape(layer.outputs, len(values), -1)
        total += per_channel.mean(axis=2, dtype=np.float64).sum(axis=1)
    return np.argsort(total, kind="stable")


def pruned(case: Case, channels: Mapping[Layer, Array]) -> dict[Parameter, Array]:
    """Return the values of the layers' parameters, and of their normalisations', after some channels were set to zero.

    Raises:
        ModelError: the BatchNormalization behind a layer has tensors that cannot be changed alone.
    """
    values: dict[Parameter, Array] = {}
    for layer, which in channels.items():
        gone = np.zeros(layer.outputs, bool)
        gone[which] = True
        weight = case.read(layer.weight)
        by_output = [1] * weight.ndim
        by_output[0 if layer.convolution or layer.transposed else 1] = layer.outputs
        values[layer.weight] = np.where(gone.reshape(by_output), 0, weight)
        behind = normalisation(case, layer)
        for parameter in (layer.bias, *((behind.scale, behind.shift) if behind else ())):
            if parameter is not None:
                values[parameter] = np.where(gone.reshape(parameter.shape), 0, case.read(parameter))
    return values


def normalisation(case: Case, layer: Layer) -> Normalisation | None:
    """Return the BatchNormalization that alone reads the layer's output, or None.

    Raises:
        ModelError: its gamma, beta or variance is computed by other nodes, or its gamma or beta has other users.
    """
    found = _normalisation(_anatomy(case), layer)
    if found is None:
        return None
    output, scale, shift, variance, epsilon = found
    return Normalisation(output, scale, shift, np.sqrt(case.read(variance).astype(np.float64) + epsilon))


def _normalisation(anatomy: Anatomy, layer: Layer) -> tuple[str, Parameter, Parameter, Parameter, float] | None:
    """Return output, gamma, beta, variance and epsilon of the BatchNormalization behind a layer, see above."""
    view, known = anatomy.view, anatomy.parameters
    index = view.sole_consumer(layer.output)
    if index is None or operator(view.nodes[index]) != "BatchNormalization":
        return None
    node = view.nodes[index]
    _, scale, shift, _, variance = node.input
    for name in (scale, shift, variance):
        if name not in known:
            raise ModelError(f"{name!r} of {view.label(index)} behind it is computed by other nodes")
    for name in (scale, shift):
        if len(known[name].users) > 1:
            others = [user for user in known[name].users if user != view.label(index)]
            who = others[0] if others else f"{view.label(index)} again"
            raise ModelError(f"{name!r} of {view.label(index)} behind it is also used by {who}")
    epsilon = float(attribute(node, "epsilon", 1e-5))
    return node.output[0], known[scale], known[shift], known[variance], epsilon


def _leaves_something(anatomy: Anatomy, layer: Layer) -> bool:
    """Return whether something constant is added to a layer's product that cannot be changed alone."""
    view = anatomy.view
    node, reader = view.nodes[layer.node], view.sole_consumer(layer.output)
    left = layer.output != node.output[0] or any(node.input[2:])
    if reader is not None and operator(view.nodes[reader]) == "Add":
        left |= not all(view.is_activation(name) for name in view.nodes[reader].input)
    return left


def _activations(case: Case, layer: Layer) -> tuple[str, int]:
    """Return the tensor at which the layer's channels are active, and their axis."""
    view = case.experiment.form.view
    for site in case.experiment.sites:
        if site.writers == (layer.name,):
            tensor = site.tensor
            while operator(view.nodes[view.producer[tensor]]) in _POOLING:
                tensor = view.nodes[view.producer[tensor]].input[0]
            return tensor, site.axis
    behind = normalisation(case, layer)
    return (layer.output if behind is None else behind.output), layer.unit_axis
