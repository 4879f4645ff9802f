"""From files to a case: load model, spec and data, split, and lay out the evidence of every property."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxcare._version import __version__
from onnxcare.case import Case, Progress
from onnxcare.data import PARTS, Dataset, Splits, check_labels, load_dataset, split, without_overlap
from onnxcare.decision import Decision
from onnxcare.errors import DataError, SpecError, UsageError
from onnxcare.experiment import Experiment
from onnxcare.graph.model import Model, Signature, load_model
from onnxcare.properties import backdoor, errors, fairness, safety
from onnxcare.properties.base import Property
from onnxcare.properties.counterexamples import Space
from onnxcare.results import Run
from onnxcare.runtime import parse_memory, resolve_device
from onnxcare.spec import BackdoorSpec, ErrorsSpec, FairnessSpec, PropertySpec, SafetySpec, Spec, Threshold, load_spec

# Shares of `data` for repair, search and validation; the last share is held out where the spec names no file.
_SHARES = (0.5, 0.2, 0.3)
_SHARES_WITH_HOLDOUT = (0.35, 0.14, 0.21, 0.3)
# A part with fewer samples says nothing about any class.
_FEWEST = 20
# Drawn from the bounds where the spec names no data.
_DRAWN = 20_000


@dataclass(frozen=True)
class Setup:
    """Everything that a command works on.

    Attributes:
        model: the model as it was read.
        spec: what must not happen.
        case: the model on the operating table.
        run: what to say about it in reports.
    """

    model: Model
    spec: Spec
    case: Case
    run: Run


def prepare(
    model: str | Path,
    spec: str | Path,
    seed: int | None,
    device: str,
    memory: str | None,
    progress: Progress,
) -> Setup:
    """Load everything, split the data and put the model on the operating table.

    Raises:
        OnnxcareError: spec, model or data cannot be used.
    """
    wanted = load_spec(spec)
    seed = wanted.seed if seed is None else seed
    if seed < 1:
        raise UsageError(f"seed {seed}: must be at least 1")
    bound = parse_memory(memory)
    chosen = resolve_device(device)
    progress(f"loading {model}")
    loaded = load_model(model)
    try:
        data = _data(wanted, loaded, seed)
        experiment = Experiment(loaded, chosen, bound, data.inputs, wanted.output, _decision(wanted))
        splits, notes = _split(wanted, loaded, experiment, data, seed)
        properties: list[Property] = []
        for item in wanted.properties:
            progress(f"gathering evidence for {item.name}")
            properties += _property(item, wanted, splits, loaded, experiment, seed)
    except SpecError as error:
        raise SpecError(f"{spec}: {error}") from None
    if data.labels is None:
        splits = _as_the_original_answers(splits, experiment, properties)
        notes.append("The data has no labels: what the model answers where the properties hold is the reference.")
    _need_samples(wanted, splits)
    case = Case(experiment, splits, properties, wanted.keep, seed, progress)
    run = Run(
        version=__version__,
        model=str(model),
        sha256=loaded.sha256,
        device=chosen,
        seed=seed,
        samples={part: len(splits.part(part)) for part in PARTS},
        notes=notes,
    )
    return Setup(loaded, wanted, case, run)


def _decision(spec: Spec) -> Decision:
    if isinstance(spec.decision, Threshold):
        return Decision("threshold", spec.decision.threshold)
    return Decision(spec.decision)


def _data(spec: Spec, model: Model, seed: int) -> Dataset:
    if spec.data is not None:
        return load_dataset(spec.data, model.inputs, spec.labels)
    assert spec.bounds is not None
    space = Space(model.inputs, tuple(_shape(model, signature) for signature in model.inputs))
    if len(spec.bounds.low) != space.size:
        raise SpecError(f"bounds: {len(spec.bounds.low)} values, but {model.path} takes {space.size}")
    return safety.domain_samples(space, spec.bounds, _DRAWN, seed)


def _shape(model: Model, signature: Signature) -> tuple[int, ...]:
    shape = tuple(length for length in signature.shape[1:] if isinstance(length, int))
    if len(shape) != len(signature.shape) - 1:
        raise SpecError(f"data: needed, because {model.path} does not fix the shape of its input {signature.name!r}")
    return shape


def _property(
    spec: PropertySpec, whole: Spec, splits: Splits, model: Model, experiment: Experiment, seed: int
) -> list[Property]:
    classes = experiment.classes
    match spec:
        case BackdoorSpec():
            _need_labels(whole, splits.repair, spec.name)
            return [
                backdoor.prepare(spec, splits, model.inputs, classes, experiment.scores, whole.labels, seed)
            ]  # fmt: skip
        case FairnessSpec():
            labelled = _as_the_original_answers(splits, experiment, []) if splits.repair.labels is None else splits
            return fairness.prepare(spec, labelled, model.inputs, classes, whole.bounds)
        case SafetySpec():
            return [safety.prepare(spec, experiment, whole.bounds, seed)]
        case ErrorsSpec():
            _need_labels(whole, splits.repair, spec.name)
            return [errors.prepare(spec, splits, model.inputs, classes, experiment.scores, whole.labels, seed)]


def _need_labels(spec: Spec, data: Dataset, name: str) -> None:
    if data.labels is None:
        raise DataError(
            f"{spec.data}: holds no labels, which property {name!r} needs; the spec's labels: names the array that "
            f"holds them ({spec.labels} at present)"
        )


def _as_the_original_answers(splits: Splits, experiment: Experiment, properties: list[Property]) -> Splits:
    """Label every part with the original's decisions, without the samples on which it misbehaves."""

    def labelled(part: Dataset) -> Dataset:
        scores = experiment.scores(part.inputs)
        spoilt = np.zeros(len(part), bool)
        for item in properties:
            spoilt |= item.spoils(scores, part)
        return replace(part, labels=scores.argmax(axis=-1)).take(np.flatnonzero(~spoilt))

    return Splits(*(labelled(splits.part(part)) for part in PARTS))


def _split(spec: Spec, model: Model, experiment: Experiment, data: Dataset, seed: int) -> tuple[Splits, list[str]]:
    source = str(spec.data) if spec.data is not None else "bounds"
    experiment.scores(data.inputs, source)
    _check_labels(data, experiment.classes, source)
    notes: list[str] = []
    if spec.holdout is None:
        return Splits(*split(data, _SHARES_WITH_HOLDOUT, seed)), notes
    repair, search, validation = split(data, _SHARES, seed)
    everything = load_dataset(spec.holdout, model.inputs, spec.labels)
    if data.labels is not None:
        check_labels(everything, experiment.classes, str(spec.holdout))
    holdout, overlap = without_overlap(everything, data)
    if overlap:
        notes.append(f"{overlap} samples of {spec.holdout} also occur in {spec.data}; the judge leaves them out.")
    if data.labels is None:
        holdout = replace(holdout, labels=None)
    return Splits(repair, search, validation, holdout), notes


def _check_labels(data: Dataset, classes: int, source: str) -> None:
    if data.labels is not None:
        check_labels(data, classes, source)


def _need_samples(spec: Spec, splits: Splits) -> None:
    for part in PARTS:
        size = len(splits.part(part))
        if size < _FEWEST:
            source = spec.holdout if part == "holdout" and spec.holdout else spec.data
            raise DataError(f"{source}: only {size} samples are left for {part}; at least {_FEWEST} are needed")
