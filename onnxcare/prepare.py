"""From files to a case: load model, spec and data, split, and lay out the evidence of every property."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxcare._version import __version__
from onnxcare.case import Case, Progress
from onnxcare.data import PARTS, Dataset, Splits, check_labels, load_dataset, split, without_overlap
from onnxcare.decision import Decision
from onnxcare.errors import DataError, ModelError, SpecError, UsageError
from onnxcare.experiment import Experiment
from onnxcare.graph.model import Model, Signature, load_model
from onnxcare.properties import backdoor, errors, fairness, safety, suspicion
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
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device}: unknown; known: auto, cpu, cuda")
    chosen = resolve_device(device)
    progress(f"loading {model}")
    try:
        loaded = load_model(model, wanted.sample_axes)
        check_inputs(loaded)
        _check_kinds(wanted, loaded)
        data = _data(wanted, loaded, seed)
        experiment = Experiment(loaded, chosen, bound, data.inputs, wanted.output, decision_of(wanted))
        _check_threshold(experiment)
        splits, notes = _split(wanted, loaded, experiment, data, seed)
        _need_samples(wanted, splits)
        properties: list[Property] = []
        for item in wanted.properties:
            progress(f"gathering evidence for {item.name}")
            properties += _property(item, wanted, splits, loaded, experiment, seed, progress)
    except SpecError as error:
        raise SpecError(f"{spec}: {error}") from None
    if data.labels is None:
        if wanted.keep.accuracy is not None or wanted.keep.recall is not None:
            raise SpecError(f"{spec}: keep: least accuracy and recall need labels, and the data has none")
        splits = _as_the_original_answers(splits, experiment, properties)
        notes.append("The data has no labels: what the model answers where the properties hold is the reference.")
        _need_samples(wanted, splits, "; samples on which a property does not hold are no reference")
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


def check_inputs(model: Model) -> None:
    """Make sure that a model can be fed with samples.

    Raises:
        ModelError: it has no input, or one without values or without an axis for the samples.
    """
    if not model.inputs:
        raise ModelError(f"{model.path}: it has no input, so it answers the same to every sample")
    for signature in model.inputs:
        if not signature.shape and signature.ranked and signature.dtype is not None:
            raise ModelError(
                f"{model.path}: its input {signature.name!r} takes one value for all samples; the spec has to say so: "
                f"sample_axes: {{{signature.name}: null}}"
            )
        if 0 in signature.shape:
            raise ModelError(
                f"{model.path}: its input {signature.name!r} has shape {list(signature.shape)}, which holds no values; "
                "export it again for one sample or more"
            )


def _check_kinds(spec: Spec, model: Model) -> None:
    """Make sure that bounds are numbers of the model, and that it takes what its properties work on."""
    if spec.bounds is not None:
        (beyond,) = np.nonzero(np.abs([spec.bounds.low, spec.bounds.high]).max(axis=0) > np.finfo(np.float32).max)
        if beyond.size:
            low, high = spec.bounds.low[beyond[0]], spec.bounds.high[beyond[0]]
            raise SpecError(f"bounds: {low:g} to {high:g} at value {beyond[0]} goes beyond float32")
    for item in spec.properties:
        for signature in model.inputs:
            if item.kind == "safety" and (signature.dtype is None or not np.issubdtype(signature.dtype, np.floating)):
                raise SpecError(
                    f"properties.{item.name}: a formula speaks of real numbers, but input {signature.name!r} of "
                    f"{model.path} takes {signature.dtype or 'no numbers'}"
                )
            if item.kind == "backdoor" and signature.dtype is None:
                raise SpecError(
                    f"properties.{item.name}: triggers are numbers, but input {signature.name!r} of {model.path} takes "
                    "none"
                )


def _check_threshold(experiment: Experiment) -> None:
    """Make sure that the judged output can lie on both sides of a threshold."""
    decision = experiment.decision
    last = next((node for node in experiment.model.proto.graph.node if experiment.output in node.output), None)
    sigmoid = last is not None and last.op_type == "Sigmoid"
    if decision.rule == "threshold" and sigmoid and not 0 < decision.threshold < 1:
        raise SpecError(
            f"decision: {experiment.output!r} of {experiment.model.path} is a sigmoid; the threshold has to lie "
            f"between 0 and 1, and {decision.threshold:g} does not"
        )
    if decision.rule == "threshold" and abs(decision.threshold) > np.finfo(np.float32).max:
        raise SpecError(f"decision: the threshold {decision.threshold:g} is beyond float32")


def decision_of(spec: Spec) -> Decision:
    """Return how a spec says that an answer is read."""
    if isinstance(spec.decision, Threshold):
        return Decision("threshold", spec.decision.threshold)
    return Decision(spec.decision)


def _data(spec: Spec, model: Model, seed: int) -> Dataset:
    if spec.data is not None:
        data = load_dataset(spec.data, model.inputs, spec.labels)
        if data.labels is None and "labels" in spec.model_fields_set:
            raise DataError(f"{spec.data}: holds no labels {spec.labels!r}; labels: in the spec names their array")
        return data
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
    spec: PropertySpec,
    whole: Spec,
    splits: Splits,
    model: Model,
    experiment: Experiment,
    seed: int,
    progress: Progress,
) -> list[Property]:
    classes = experiment.classes
    match spec:
        case BackdoorSpec():
            _need_labels(whole, splits.repair, spec.name)
            backdoor.check(spec, model.inputs, classes)
            bounds = _bounds(whole, splits, model)
            if spec.unknown:
                _need_classes(whole, splits, spec.name)
                return suspicion.prepare(spec, splits, experiment, bounds, seed, progress)
            return [
                backdoor.prepare(spec, splits, model.inputs, classes, experiment.scores, whole.labels, seed, bounds)
            ]  # fmt: skip
        case FairnessSpec():
            if spec.max_gap is not None and spec.gap != "demographic_parity":
                _need_labels(whole, splits.repair, spec.name, f" for {spec.gap} (demographic_parity does without)")
            labelled = _as_the_original_answers(splits, experiment, []) if splits.repair.labels is None else splits
            return fairness.prepare(spec, labelled, model.inputs, classes, whole.bounds)
        case SafetySpec():
            return [safety.prepare(spec, experiment, whole.bounds, seed)]
        case ErrorsSpec():
            _need_labels(whole, splits.repair, spec.name)
            return [errors.prepare(spec, splits, model.inputs, classes, experiment.scores, whole.labels, seed)]


def _bounds(spec: Spec, splits: Splits, model: Model) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the bounds of the spec in the shape of a sample, or None where it has none."""
    if spec.bounds is None:
        return None
    (values,) = splits.repair.inputs.values()
    shape = values.shape[1:]
    if len(spec.bounds.low) != np.prod(shape, dtype=np.int64):
        raise SpecError(
            f"bounds: {len(spec.bounds.low)} values, but {model.path} takes {np.prod(shape, dtype=np.int64)}"
        )
    return np.array(spec.bounds.low).reshape(shape), np.array(spec.bounds.high).reshape(shape)


def _need_classes(spec: Spec, splits: Splits, name: str) -> None:
    """Make sure that triggers can be searched, by the repair and by the judge: on samples of other classes."""
    for source, part in ((spec.data, splits.repair), (spec.holdout or spec.data, splits.holdout)):
        if len(np.unique(part.truth)) < 2:
            raise DataError(
                f"{source}: all samples are of one class, but property {name!r} needs samples of others, to restore "
                "triggers on"
            )


def _need_labels(spec: Spec, data: Dataset, name: str, what_for: str = "") -> None:
    if data.labels is None:
        raise DataError(
            f"{spec.data}: holds no labels, which property {name!r} needs{what_for}; the spec's labels: names the "
            f"array that holds them ({spec.labels} at present)"
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
        repair, search, validation, holdout = split(data, _SHARES_WITH_HOLDOUT, seed)
        twice = 0
        for part in (repair, search, validation):
            holdout, overlap = without_overlap(holdout, part)
            twice += overlap
        if twice:
            notes.append(f"{twice} held-out samples occur in {source} more than once; the judge leaves them out.")
        return Splits(repair, search, validation, holdout), notes
    repair, search, validation = split(data, _SHARES, seed)
    everything = load_dataset(spec.holdout, model.inputs, spec.labels)
    if data.labels is not None:
        check_labels(everything, experiment.classes, str(spec.holdout))
    holdout, overlap = without_overlap(everything, data)
    if overlap and len(holdout) < _FEWEST:
        raise DataError(
            f"{spec.holdout}: only {len(holdout)} samples are left for holdout, because {overlap} also occur in "
            f"{spec.data}; at least {_FEWEST} are needed"
        )
    if overlap:
        notes.append(f"{overlap} samples of {spec.holdout} also occur in {spec.data}; the judge leaves them out.")
    if data.labels is None:
        holdout = replace(holdout, labels=None)
    return Splits(repair, search, validation, holdout), notes


def _check_labels(data: Dataset, classes: int, source: str) -> None:
    if data.labels is not None:
        check_labels(data, classes, source)


def _need_samples(spec: Spec, splits: Splits, why: str = "") -> None:
    for part in PARTS:
        size = len(splits.part(part))
        if size < _FEWEST:
            source = spec.holdout if part == "holdout" and spec.holdout else spec.data or "bounds"
            raise DataError(f"{source}: only {size} samples are left for {part}; at least {_FEWEST} are needed{why}")
