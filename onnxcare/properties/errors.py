"""The errors property: labelled samples that the model gets wrong are to become right, without breaking right ones.

Which errors are meant may be narrowed to a true class (`label`) or to a wrong answer (`answered`); a file of further
samples may be added. Counted are the errors of the original: the share of them that stays wrong is the rate. Beside it
stand the error rate on all samples of the kind and, among the guards, the share of right answers that broke. What
counts is errors that were not used for the repair: AI-Lancet (CCS 2021) and Arachne report misclassification like that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.data import (
    PARTS,
    Dataset,
    Inputs,
    PartName,
    Splits,
    check_labels,
    joined,
    load_dataset,
    split,
    without_overlap,
)
from onnxcare.errors import DataError, SpecError
from onnxcare.graph.model import Signature
from onnxcare.measures import Finding, Measure
from onnxcare.properties.base import Array, Evidence, Property, divergence, divergence_gradient, log_softmax
from onnxcare.spec import ErrorsSpec

if TYPE_CHECKING:
    from onnxcare.judge import Court

Predict = Callable[[Inputs], Array]

# The goal on a wrong sample: the true label with this probability, the rest evenly.
_SURE = 0.95
# Fewer errors than this in a part say nothing about others.
_FEWEST = 5
_SHARES = (0.35, 0.14, 0.21, 0.3)

REPAIRED = "errors that stay wrong"


class Errors(Property):
    """Labelled samples that the original gets wrong."""

    kind = "errors"

    def __init__(self, spec: ErrorsSpec, evidence: dict[PartName, Evidence], kind_samples: Dataset) -> None:
        """Wrap prepared evidence; use `prepare` to make it.

        Args:
            spec: the property as the user wrote it.
            evidence: the original's errors in every part.
            kind_samples: all held-out samples of the kind, right ones included.
        """
        self.name = spec.name
        self.max_rate: float = spec.max_rate
        self._spec = spec
        self._evidence = evidence
        self._kind_samples = kind_samples

    def evidence(self, part: PartName) -> Evidence:
        """Return the samples of a part that the original gets wrong."""
        return self._evidence[part]

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which samples are answered wrongly."""
        return scores.argmax(axis=-1) != samples.truth

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return the highest wrong score above the true one."""
        rows = np.arange(len(samples))
        true = scores[..., rows, samples.truth]
        others = scores.astype(np.float64)
        others[..., rows, samples.truth] = -np.inf
        return others.max(axis=-1) - true

    def goal(self, bad: Array, twins: Array | None, labels: Array | None) -> Array:
        """Return the true label, nearly."""
        assert labels is not None
        classes = bad.shape[-1]
        p = np.full(bad.shape, (1 - _SURE) / max(1, classes - 1))
        p[np.arange(len(labels)), labels] = _SURE
        return np.log(p)

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return KL from the goal."""
        assert goal is not None
        return divergence(goal, log_softmax(scores))

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss with respect to the scores."""
        assert goal is not None
        return divergence_gradient(goal, log_softmax(scores))

    def lacking(self) -> str | None:
        """Return which part has too few errors to say something about others."""
        for part in PARTS:
            found = len(self.evidence(part).bad)
            if found < _FEWEST:
                return (
                    f"property {self.name!r}: the model gets only {found} samples of {part} wrong; at least {_FEWEST} "
                    "are needed to tell whether a repair reaches errors it has not seen"
                )
        return None

    def measure(self, court: Court) -> Finding:
        """Return how many of the first file's errors stay wrong, and the error rate on samples of the kind."""
        samples, gauge = self._kind_samples, court.gauge
        wrong = [item.decide(samples.inputs) != samples.truth for item in court.witnesses]
        found: list[Measure] = []
        notes: tuple[str, ...] = ()
        if court.before is not None:
            errors = wrong[0] & _answered(court.before.decide(samples.inputs), self._spec.answered)
            found.append(gauge.rate(REPAIRED, wrong[-1][errors], errors[errors], limit=self.max_rate))
        elif self._spec.max_error_rate is None:
            nothing = np.zeros(0, bool)
            found.append(gauge.rate(REPAIRED, nothing, limit=self.max_rate))
            notes = ("Whose errors? Name the original with --baseline, or give max_error_rate in the spec.",)
        found.append(gauge.rate("error rate on such samples", wrong[-1], *wrong[:-1], limit=self._spec.max_error_rate))
        return Finding(self.name, self.kind, tuple(found), (*self.notes, *notes))


def prepare(
    spec: ErrorsSpec,
    splits: Splits,
    signatures: Sequence[Signature],
    classes: int,
    predict: Predict,
    labels: str,
    seed: int,
) -> Errors:
    """Find the original's errors in every part of the data, and in the samples that the property names.

    Raises:
        SpecError: a class is not one of the model's.
        DataError: a file does not fit, or there are too few errors.
    """
    for key in ("label", "answered"):
        value = getattr(spec, key)
        if value is not None and value >= classes:
            raise SpecError(f"properties.{spec.name}.{key}: {value} is not a class; the model has 0 to {classes - 1}")
    parts, known = {part: _of_kind(splits.part(part), spec) for part in PARTS}, 0
    if spec.samples is not None:
        further = load_dataset(spec.samples, signatures, labels)
        check_labels(further, classes, str(spec.samples))
        further = _of_kind(further, spec)
        if not len(further):
            raise DataError(f"{spec.samples}: no sample has label {spec.label}, as property {spec.name!r} wants")
        # Samples of the data have their part: in another one, the judge would see what a repair was fitted on.
        for part in PARTS:
            further, overlap = without_overlap(further, splits.part(part))
            known += overlap
        for part, rows in zip(PARTS, split(further, _SHARES, seed) if len(further) else (), strict=False):
            parts[part] = joined(parts[part], rows)
    if not len(parts["holdout"]):
        raise DataError(
            f"property {spec.name!r}: no held-out sample has label {spec.label}; give more data, or samples"
        )
    evidence = {part: Evidence(_wrong(samples, spec, predict), None) for part, samples in parts.items()}
    found = Errors(spec, evidence, parts["holdout"])
    if known:
        found.notes = (f"{known} samples of {spec.samples} also occur in the data, where they count already.",)
    return found


def _of_kind(samples: Dataset, spec: ErrorsSpec) -> Dataset:
    return samples if spec.label is None else samples.take(np.flatnonzero(samples.truth == spec.label))


def _wrong(samples: Dataset, spec: ErrorsSpec, predict: Predict) -> Dataset:
    if not len(samples):
        return samples
    decisions = predict(samples.inputs).argmax(axis=-1)
    return samples.take(np.flatnonzero((decisions != samples.truth) & _answered(decisions, spec.answered)))


def _answered(decisions: Array, wanted: int | None) -> Array:
    return np.ones(len(decisions), bool) if wanted is None else decisions == wanted
