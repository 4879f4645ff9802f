"""Two model files beside each other: what differs in them, and in what they answer."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxcare.axes import Axes
from onnxcare.data import Dataset, check_labels, load_dataset
from onnxcare.decision import Decision
from onnxcare.errors import ModelError
from onnxcare.experiment import judged_output
from onnxcare.graph.model import Model, check_same_signature, load_model
from onnxcare.graph.patch import TensorChange
from onnxcare.graph.places import Place, find_places
from onnxcare.graph.structure import other_differences
from onnxcare.judge import Court, Witness, judge
from onnxcare.measures import Finding, Rate
from onnxcare.prepare import check_inputs
from onnxcare.results import Check
from onnxcare.runtime import Device, Session
from onnxcare.spec import Keep

Array = np.ndarray

# Nothing is known here about what a sample takes while a model runs.
_ROWS_PER_RUN = 64


@dataclass(frozen=True)
class Behaviour:
    """How differently two models answer some data.

    Attributes:
        data: the file.
        samples: how many samples it holds.
        answers: share of the samples that are answered differently; None where no output holds answers.
        largest: the largest difference of a single value of an output, by its name; of the output that holds the
            answers alone where there is one.
        kept: accuracy and recalls before and after, and what got worse; None where the data has no labels.
    """

    data: str
    samples: int
    answers: Rate | None
    largest: Mapping[str, float]
    kept: Finding | None


@dataclass(frozen=True)
class Diff:
    """Result of `diff`.

    Attributes:
        model: the one file.
        other: the other file.
        sha256: fingerprint of the one.
        other_sha256: fingerprint of the other.
        places: how many tensors, and lists of weights in attributes, both have under the same name.
        tensors: those of them that hold other values.
        parts: what else differs, in words.
        behaviour: what differs in the answers, where data was given.
        check: what the judge finds about the other file, against the one, where a spec was given.
    """

    model: str
    other: str
    sha256: str
    other_sha256: str
    places: int
    tensors: Sequence[TensorChange]
    parts: Sequence[str]
    behaviour: Behaviour | None = None
    check: Check | None = None

    @property
    def same(self) -> bool:
        """Whether both hold the same; their bytes may differ all the same."""
        return not self.tensors and not self.parts

    @property
    def exit_code(self) -> int:
        """0 where both hold the same, else 1."""
        return 0 if self.same else 1


def compare_files(old: Model, new: Model) -> Diff:
    """Return what differs between two files."""
    pairs = _shared(old, new)
    return Diff(
        model=str(old.path),
        other=str(new.path),
        sha256=old.sha256,
        other_sha256=new.sha256,
        places=len(pairs),
        tensors=_changes(pairs, old, new),
        parts=other_differences(old.proto, new.proto),
    )


def tensor_changes(old: Model, new: Model, labels: Collection[str]) -> list[TensorChange]:
    """Return which of these tensors hold other values in another file, and how much they differ."""
    return _changes([pair for pair in _shared(old, new) if pair[0].label in labels], old, new)


def _shared(old: Model, new: Model) -> list[tuple[Place, Place]]:
    """Return the places of the same label, type and shape; other differences are those of structure."""
    theirs = {place.label: place for place in find_places(new.proto)}
    return [
        (place, theirs[place.label])
        for place in find_places(old.proto)
        if place.label in theirs
        and (place.data_type, place.shape) == (theirs[place.label].data_type, theirs[place.label].shape)
    ]


def _changes(pairs: Sequence[tuple[Place, Place]], old: Model, new: Model) -> list[TensorChange]:
    found = []
    for mine, yours in pairs:
        # The same message holds the same values, unless they lie in another file.
        if mine.message != yours.message or mine.external:
            values = mine.values(old.path.parent), yours.values(new.path.parent)
            found.append(TensorChange.between(mine.label, *values))
    return [change for change in found if change.changed]


def comparable(model: str | Path, baseline: str | Path, axes: Axes | None = None) -> tuple[Model, Model]:
    """Return two models after checking that they take and give the same, so that one data set fits both.

    Args:
        model: the one file.
        baseline: the other one.
        axes: where samples lie in inputs that do not have them on axis 0.

    Raises:
        ModelError: they do not.
        SpecError: there is no such input, or it has no such axis.
    """
    judged, other = load_model(model, axes), load_model(baseline, axes)
    check_inputs(judged)
    for mine in judged.inputs:
        for yours in other.inputs:
            fixed = zip(mine.shape[1:], yours.shape[1:], strict=False)
            same = len(mine.shape) == len(yours.shape) and all(
                here == there for here, there in fixed if isinstance(here, int) and isinstance(there, int)
            )
            if mine.name == yours.name and not (same and mine.dtype == yours.dtype):
                raise ModelError(
                    f"{judged.path}: its input {mine.name!r} takes {mine.dtype} {list(mine.shape)}, but that of "
                    f"{other.path} {yours.dtype} {list(yours.shape)}; they cannot be compared"
                )
    check_same_signature(judged, other)
    return judged, other


def compare_answers(
    old: Model,
    new: Model,
    path: Path,
    device: Device,
    *,
    labels: str = "y",
    output: str | None = None,
    decision: Decision | None = None,
) -> Behaviour:
    """Return how differently two models answer.

    Args:
        old: the one model.
        new: the other one; it takes and gives the same.
        path: an npz file with the inputs, and labels if it has any.
        device: where to run.
        labels: the array with the labels.
        output: the output that holds the answers; None takes the first that may.
        decision: how an answer is read; None for the highest score, where there is an output with scores.

    Raises:
        DataError: the data does not fit.
        ModelError: a model answers NaN or infinity, or the two have different numbers of classes.
    """
    try:
        output = judged_output(old, output, decision or Decision())
    except ModelError:
        if decision is not None:
            raise
        data = load_dataset(path, old.inputs, labels=None)
        return Behaviour(str(path), len(data), None, _largest(old, new, data, device), None)
    data = load_dataset(path, old.inputs, labels)
    (shape,) = (item.shape for item in old.outputs if item.name == output)
    rule = replace(decision or Decision(), column=len(shape) == 2)
    before, after = (Witness(model, output, rule, device, _ROWS_PER_RUN) for model in (old, new))
    mine, yours = before.scores(data.inputs), after.scores(data.inputs)
    if mine.shape != yours.shape:
        raise ModelError(f"{new.path}: answers {list(yours.shape)}, but {old.path} {list(mine.shape)}")
    differ = Rate.of(before.decide(data.inputs) != after.decide(data.inputs))
    largest = {output: float(np.abs(mine.astype(np.float64) - yours).max())}
    kept = None
    if data.labels is not None:
        check_labels(data, mine.shape[-1], str(path))
        guards = judge(Court(after, before, data), [], Keep()).guards
        # Nobody has set a limit here.
        kept = replace(guards, measures=tuple(replace(item, limit=None, status="info") for item in guards.measures))
    return Behaviour(str(path), len(data), differ, largest, kept)


def _largest(old: Model, new: Model, data: Dataset, device: Device) -> dict[str, float]:
    """Return the largest difference of every output of numbers."""
    names = [item.name for item in old.outputs if item.dtype is not None and item.dtype != np.bool_]
    if not names:
        return {}
    mine, yours = (
        Session(model.path, device, axes=model.axes).run_rows(data.inputs, names, rows_per_run=_ROWS_PER_RUN)
        for model in (old, new)
    )
    found = {}
    for name, one, other in zip(names, mine, yours, strict=True):
        if one.shape != other.shape:
            raise ModelError(f"{new.path}: {name} has shape {list(other.shape)}, but {list(one.shape)} in {old.path}")
        found[name] = float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max(initial=0))
    return found
