"""Fine-tuning of all layers at once: a strategy for any property, and the plain defence, `--method fine-tuning`.

As a strategy (`tune`), Adam follows the cost of a panel, by the weights and biases of all layers that can be rewritten.
What one layer cannot undo, because others have mixed it up or handed it past over a skip connection, many small changes
may. Steps are relative to the root mean square of each tensor, the best one on the search part counts, and it may begin
at any candidate.

As a defence (`fine_tuned`), nothing is known but clean samples and their labels: the network is trained on for a fixed
number of epochs with cross-entropy, as in Liu, Xie, Srivastava: Neural Trojans (ICCD 2017), in the second stage of
Fine-Pruning (RAID 2018), and in BackdoorBench (`ft`; NeurIPS 2022). Evidence only chooses the learning rate.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx

from onnxcare.adam import Adam
from onnxcare.backward import Network, tunable
from onnxcare.case import Case
from onnxcare.data import Inputs
from onnxcare.errors import ModelError
from onnxcare.graph.anatomy import Anatomy
from onnxcare.graph.gradients import NoGradient
from onnxcare.graph.layers import Layer
from onnxcare.graph.parameters import Parameter
from onnxcare.graph.paths import reads
from onnxcare.panel import Panel
from onnxcare.properties.base import log_softmax
from onnxcare.repair.base import Candidate, Found, Proposals, Repair, Values
from onnxcare.repair.bench import patched_outcome, protected_rows
from onnxcare.repair.choice import best_of

Array = np.ndarray

# As a strategy: step sizes in terms of the root mean square of each tensor. All layers together need smaller ones than
# a single layer.
_WIDTHS = (0.005, 0.02)
_STEPS, _EVERY, _PATIENCE, _BATCH = 200, 10, 8, 64
# As a defence: learning rates of Adam.
RATES = (1e-3, 3e-3, 1e-2)
_EPOCHS, _CLEAN_BATCH = 10, 32
# Multiply-adds of all forward passes, beside which the derivative takes about five times as long; larger networks get
# fewer steps. With as many a run takes half a minute on one core, and a defence at one rate ten seconds.
_WORK, _CLEAN_WORK = 6e10, 2e10


@dataclass(frozen=True)
class Tuned:
    """New values of many parameters, and where they were best.

    Attributes:
        values: those of the start included.
        rank: theirs on the search part.
        steps: after how many steps; 0 is the start.
    """

    values: Values
    rank: tuple[float, float]
    steps: int


# -- the strategy --------------------------------------------------------------------------------


def applies(case: Case) -> bool:
    """Return whether there is evidence whose loss can be followed, and more to change than one layer."""
    groups = tunable(case.experiment)
    more = len(groups) > 1 or (len(groups) == 1 and not case.experiment.open_layers)
    return more and any(len(item.evidence("repair").bad) for item in case.properties)


def propose(case: Case) -> Proposals:
    """Return the network, tuned as a whole with small steps, and with larger ones where these do not reach far enough.

    Raises:
        ModelError: no layer has a derivative behind it.
    """
    steps = max(_EVERY, min(_STEPS, int(_WORK / (_BATCH * case.experiment.multiply_adds))))
    found = []
    for width in _WIDTHS:
        case.progress("fine-tuning all layers")
        tuned = tune(case, width=width, steps=steps)
        outcome = patched_outcome(case, tuned.values, case.panel("validation"))
        label = f"all layers: {tuned.steps} steps of {width:g}"
        found.append(Found(Candidate(label, outcome), partial(dict, tuned.values)))
        if outcome.kept:
            break
    return Proposals(found)


def tune(case: Case, start: Values | None = None, width: float = _WIDTHS[0], steps: int = _STEPS) -> Tuned:
    """Follow the gradient of the repair part's cost, and return the step of best rank on the search part.

    Args:
        case: the case.
        start: the values of the candidate to begin with; it stays one. None for no change.
        width: step size, in terms of the root mean square of each tensor.
        steps: at most so many.

    Raises:
        ModelError: no layer has a derivative behind it.
    """
    start = start or {}
    begun = case.patched(start)
    network = _network(begun)
    fit, unseen = case.panel("repair"), case.panel("search")
    seen, other = network.cache(fit.inputs), network.cache(unseen.inputs)
    held = _protected(case, network.layers)
    values = {parameter: begun.read(parameter).astype(np.float64) for parameter in network.parameters}
    descents = {parameter: Adam(width * size) for parameter, size in _sizes(network.groups, values).items()}
    best = Tuned(start, _rank(network, unseen, other, values), 0)
    stale, batches = 0, -(-len(fit.inputs[next(iter(fit.inputs))]) // _BATCH)
    for step in range(1, steps + 1):
        panel, rows = fit.batch(step % batches, batches)
        _, slopes = network.slope(values, _rows(seen, rows), panel.gradient)
        values = _moved(values, slopes, descents, _falling(step, steps), held)
        if step % _EVERY == 0:
            rank = _rank(network, unseen, other, values)
            stale = 0 if rank < best.rank else stale + 1
            if rank < best.rank:
                best = Tuned({**start, **values}, rank, step)
            if stale >= _PATIENCE:
                break
    return best


def _rank(network: Network, panel: Panel, at: Inputs, values: Values) -> tuple[float, float]:
    return panel.outcomes(network.scores(values, at)[None])[0].rank


def _sizes(groups: Sequence[Sequence[Parameter]], values: Values) -> dict[Parameter, float]:
    """Return the root mean square of every tensor; a bias of zeros counts as large as the weights beside it."""
    return {parameter: _size(values[parameter]) or _size(values[group[0]]) for group in groups for parameter in group}


def _size(values: Array) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _protected(case: Case, layers: list[Layer]) -> dict[Parameter, Array]:
    """Return where weights take in protected attributes: these stay as they are."""
    rows = protected_rows(case)
    found: dict[Parameter, Array] = {}
    for layer in layers:
        if layer.name in rows:
            mask = np.zeros(layer.matrix_shape, bool)
            mask[:, rows[layer.name]] = True
            found |= where(layer, mask)
    return found


def where(layer: Layer, mask: Array) -> dict[Parameter, Array]:
    """Return where in the layer's parameters the masked values of its matrix are, bool in their shapes."""
    known = [parameter for parameter in (layer.weight, layer.bias) if parameter is not None]
    marked = layer.add(mask.astype(float), {parameter.name: np.zeros(parameter.shape) for parameter in known})
    return {parameter: marked[parameter.name] != 0 for parameter in known}


# -- the defence ---------------------------------------------------------------------------------


def repair(case: Case) -> Repair:
    """Fine-tune on clean samples, by the rate that does best.

    Raises:
        ModelError: no layer has a derivative behind it.
    """
    count = epochs_within(case)
    found = [retrained(case, rate, count) for rate in RATES]
    return best_of("fine-tuning", case, found, {"epochs": count})


def retrained(
    case: Case,
    rate: float,
    epochs: int,
    start: Values | None = None,
    held: Mapping[Parameter, Array] | None = None,
) -> Found:
    """Return what `fine_tuned` makes of a case as a candidate."""
    case.progress(f"fine-tuning on clean samples at a rate of {rate:g}")
    values = fine_tuned(case, start, rate, epochs, held)
    outcome = patched_outcome(case, values, case.panel("validation"))
    return Found(Candidate(f"all layers: {epochs} epochs at a rate of {rate:g}", outcome), partial(dict, values))


def epochs_within(case: Case) -> int:
    """Return how many epochs `fine_tuned` may have: as many as are usual here, or fewer where the network is large."""
    return max(1, min(_EPOCHS, int(_CLEAN_WORK / (case.experiment.multiply_adds * len(case.splits.repair)))))


def fine_tuned(
    case: Case,
    start: Values | None = None,
    rate: float = RATES[0],
    epochs: int = _EPOCHS,
    held: Mapping[Parameter, Array] | None = None,
) -> Values:
    """Return all layers, trained with cross-entropy on the clean repair samples and their labels.

    Args:
        case: the case; its evidence is not looked at.
        start: the values of the candidate to begin with; None for no change.
        rate: learning rate of Adam, which falls to zero along a cosine.
        epochs: how often every sample is seen; the last step counts.
        held: where parameters stay as they are, by the parameter.

    Raises:
        ModelError: no layer has a derivative behind it.
    """
    start = start or {}
    begun = case.patched(start)
    network = _network(begun)
    clean = case.splits.repair
    at = network.cache(clean.inputs)
    values = {parameter: begun.read(parameter).astype(np.float64) for parameter in network.parameters}
    descents = {parameter: Adam(rate) for parameter in network.parameters}
    order = list(_shuffled(len(clean), epochs, case.seed))
    for step, rows in enumerate(order, 1):
        _, slopes = network.slope(values, _rows(at, rows), partial(_cross_entropy_slope, clean.truth[rows]))
        values = _moved(values, slopes, descents, _falling(step, len(order)), held or {})
    return {**start, **values}


def _shuffled(samples: int, epochs: int, seed: int) -> Iterator[Array]:
    """Yield the rows of every batch; those of an epoch are about as large as each other."""
    random = np.random.default_rng(seed)
    for _ in range(epochs):
        yield from np.array_split(random.permutation(samples), -(-samples // _CLEAN_BATCH))


def _cross_entropy_slope(labels: Array, scores: Array) -> Array:
    """Return the gradient of the mean cross-entropy, scores [rows, classes] -> [rows, classes]."""
    slope = np.exp(log_softmax(scores))
    slope[np.arange(len(labels)), labels] -= 1
    return slope / len(labels)


def hindrance(anatomy: Anatomy, layer: Layer) -> str | None:
    """Say why a layer is not tuned; None if it is, as far as operators tell."""
    if layer.refusal is not None and not layer.tied:
        return layer.refusal
    name = layer.weight.name
    if name in anatomy.once(__name__, lambda: _reached(anatomy)):
        return None
    others = [reason for reason in anatomy.obstacles.values() if reason]
    beside = f"gradients do not reach back to it beside another branch: {others[0]}" if others else layer.refusal
    return anatomy.obstacles[name] or beside


def beside_layers(anatomy: Anatomy) -> list[str | None]:
    """Return what nodes write that are tuned beside layers."""
    reached = anatomy.once(__name__, lambda: _reached(anatomy))
    tuned = {item.name for item in anatomy.weights if any(held.name in reached for held in item.parameters)}
    return [node.output[0] for index, node in enumerate(anatomy.view.nodes) if anatomy.view.label(index) in tuned]


def _reached(anatomy: Anatomy) -> frozenset[str]:
    """Return the weights in as large a part of the network as has a derivative, see `_network`."""
    for start in dict.fromkeys([None, *(layer.input for layer in anatomy.open_layers)]):
        nodes = anatomy.view.nodes if start is None else _behind(anatomy, start)
        counts = Counter(name for node in nodes for name in node.input)
        whole = (group for group in anatomy.groups if all(counts[item.name] == len(item.users) for item in group))
        part = {item.name for group in whole for item in group}
        if part and not any(anatomy.obstacles[name] for name in part):
            return frozenset(part)
    return frozenset()


def _behind(anatomy: Anatomy, tensor: str) -> list[onnx.NodeProto]:
    """Return the nodes that depend on a tensor."""
    found, behind = [], {tensor}
    for node in anatomy.view.nodes:
        if reads(node) & behind:
            found.append(node)
            behind.update(node.output)
    return found


# -- both -----------------------------------------------------------------------------------------


def _network(case: Case) -> Network:
    """Return the network, or as large a part of it as has a derivative.

    Raises:
        ModelError: no layer has a derivative behind it.
    """
    layers = case.experiment.open_layers
    why = "it has no layer that can be rewritten"
    for tensor in dict.fromkeys([None, *(layer.input for layer in layers)]):
        try:
            return Network(case.experiment, tensor)
        except NoGradient as error:
            why = error.why
    raise ModelError(f"{case.experiment.model.path}: no layer can be fine-tuned: {why}")


def _moved(
    values: Values, slopes: Values, descents: Mapping[Parameter, Adam], share: float, held: Mapping[Parameter, Array]
) -> dict[Parameter, Array]:
    """Return the values after a share of a step."""
    free = {parameter: np.where(held.get(parameter, False), 0.0, slope) for parameter, slope in slopes.items()}
    return {parameter: value + share * descents[parameter].step(free[parameter]) for parameter, value in values.items()}


def _falling(step: int, steps: int) -> float:
    """Return the share of the step size that is left, along a cosine."""
    return (1 + math.cos(math.pi * (step - 1) / steps)) / 2


def _rows(at: Inputs, rows: Array) -> Inputs:
    return {name: values[rows] for name, values in at.items()}
