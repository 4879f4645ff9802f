"""The interface of a property: what must (not) happen, with samples, a hard rate, a smooth loss, and what is judged.

Searching works on *evidence*, samples that show the misbehaviour, laid out for every part of the data but the
held-out one. Judging works on files: `measure` asks one or two of them and says in the field's terms what it saw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import scipy.special

from onnxcare.data import Dataset, PartName
from onnxcare.measures import Finding

if TYPE_CHECKING:
    from onnxcare.experiment import Experiment
    from onnxcare.judge import Court

Array = np.ndarray


@dataclass(frozen=True)
class Evidence:
    """Samples of one part that show the misbehaviour.

    Attributes:
        bad: the samples; labels, where there are any, are the true ones.
        twins: the same samples without the cause of the misbehaviour, row by row; None where they are unknown.
    """

    bad: Dataset
    twins: Dataset | None


class Property(ABC):
    """Something the model must (not) do.

    Scores are [..., rows, classes], the highest is the decision; leading axes are members of a family of candidates.

    Attributes:
        name: how reports call it.
        kind: which kind it is.
        max_rate: the rate above the baseline that is tolerated; None for no limit.
        stand_in: whether the evidence only stands in for what nobody has seen, so that a repair should reach beyond it.
        transplantable: whether the activations of twins, or of ordinary samples, are what the bad samples should have.
        rows_per_case: how many rows of the bad samples, side by side, make a case.
        counted: whether its rate is the share of cases that misbehave.
        notes: what the user should know about the evidence, in whole sentences.
    """

    name: str
    kind: ClassVar[str]
    max_rate: float | None
    stand_in: ClassVar[bool] = False
    transplantable: ClassVar[bool] = False
    rows_per_case: int = 1
    counted: ClassVar[bool] = True
    notes: tuple[str, ...] = ()

    # -- searching -------------------------------------------------------------------------------

    @abstractmethod
    def evidence(self, part: PartName) -> Evidence:
        """Return the samples of a part that show the misbehaviour."""

    @abstractmethod
    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which cases among the samples misbehave, bool [..., cases].

        A case is a row, unless `rows_per_case` says otherwise.
        """

    @abstractmethod
    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return how far each case is on the wrong side, [..., cases].

        Positive where a case misbehaves; unlike a probability it does not saturate.
        """

    @abstractmethod
    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the smooth loss on bad samples, [...]; `goal` is what `goal` returned for them."""

    @abstractmethod
    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss of one candidate, scores [rows, classes] -> [rows, classes]."""

    @abstractmethod
    def measure(self, court: Court) -> Finding:
        """Return what the files before the court do, on held-out data or on fresh samples."""

    def rate(self, scores: Array, samples: Dataset) -> Array:
        """Return the share of cases that misbehave, [...]."""
        cases = self.misbehaves(scores, samples)
        found: Array = cases.mean(axis=-1) if cases.shape[-1] else np.zeros(cases.shape[:-1])
        return found

    def response(self, scores: Array, samples: Dataset) -> Array:
        """Return the quantity whose causal effects are measured, [..., cases]."""
        return self.margin(scores, samples)

    def observed(self, clean: Dataset, bad: Dataset) -> Dataset:
        """Return the samples over which causal effects are averaged: the bad ones, unless the property differs."""
        return bad

    def goal(self, bad: Array, twins: Array | None, labels: Array | None) -> Array | None:
        """Return log-probabilities [rows, classes] that the bad samples should get, or None.

        Args:
            bad: scores of the original on the bad samples.
            twins: scores of the original on their twins, or None.
            labels: their true labels, or None.
        """
        return None if twins is None else log_softmax(twins)

    def relevant(self, clean: Dataset) -> Array:
        """Return the clean samples whose ordinary errors look like the misbehaviour, [samples] bool."""
        return np.zeros(len(clean), bool)

    def spoils(self, scores: Array, samples: Dataset) -> Array:
        """Return which unlabelled samples misbehave, so that what the original answers there is no reference."""
        return np.zeros(len(samples), bool)

    def lacking(self) -> str | None:
        """Return what evidence is missing for a repair, in one sentence, or None."""
        return None

    def hunt(self, experiment: Experiment) -> int:
        """Look for evidence that a candidate still leaves, add it to what is known, and return how much it was."""
        return 0


def log_softmax(scores: Array) -> Array:
    """Return log-probabilities along the last axis, in float64."""
    found: Array = scipy.special.log_softmax(scores.astype(np.float64), axis=-1)
    return found


def softmax(scores: Array) -> Array:
    """Return probabilities along the last axis, in the scores' own precision: for many interventions at once."""
    # Reducing a short last axis is slow; in front, whole arrays are added and compared.
    by_class = np.ascontiguousarray(np.moveaxis(scores, -1, 0))
    p = np.exp(by_class - by_class.max(axis=0))
    p /= p.sum(axis=0)
    found: Array = np.moveaxis(p, 0, -1)
    return found


def divergence(reference: Array, log_probs: Array) -> Array:
    """Return KL(reference || candidate) of log-probabilities, averaged over the samples: [...] ."""
    return (np.exp(reference) * (reference - log_probs)).sum(axis=-1).mean(axis=-1)


def divergence_gradient(reference: Array, log_probs: Array) -> Array:
    """Return the gradient of `divergence` with respect to the candidate's scores, [samples, classes]."""
    return (np.exp(log_probs) - np.exp(reference)) / len(reference)
