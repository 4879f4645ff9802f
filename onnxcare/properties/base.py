"""The interface of a property: what must (not) happen, with samples, a hard rate and a smooth loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import scipy.special

from onnxcare.data import Dataset, PartName

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

    Attributes:
        name: how reports call it.
        kind: which kind it is.
        max_rate: the rate above the baseline that is tolerated.
        notes: what the user should know about the evidence, in whole sentences.
    """

    name: str
    kind: str
    max_rate: float
    notes: tuple[str, ...] = ()

    @abstractmethod
    def evidence(self, part: PartName) -> Evidence:
        """Return the samples of a part that show the misbehaviour."""

    @abstractmethod
    def misbehaves(self, scores: Array) -> Array:
        """Return for scores [..., samples, classes] which samples misbehave, [..., samples] bool."""

    @abstractmethod
    def relevant(self, clean: Dataset) -> Array:
        """Return the clean samples whose ordinary errors look like the misbehaviour, [samples] bool."""

    @abstractmethod
    def response(self, probabilities: Array) -> Array:
        """Return the quantity whose causal effects are measured, [..., samples, classes] -> [..., samples]."""

    @abstractmethod
    def margin(self, scores: Array) -> Array:
        """Return how far each answer is on the wrong side, [..., samples, classes] -> [..., samples].

        Positive where a sample misbehaves; unlike a probability it does not saturate.
        """

    @abstractmethod
    def loss(self, log_probs: Array, reference: Array | None) -> Array:
        """Return the smooth loss of the bad samples, averaged over them.

        Args:
            log_probs: [..., samples, classes] of the candidate on the bad samples.
            reference: [samples, classes] of the original model on their twins, or None.
        """


def log_softmax(scores: Array) -> Array:
    """Return log-probabilities along the last axis, in float64."""
    found: Array = scipy.special.log_softmax(scores.astype(np.float64), axis=-1)
    return found


def divergence(reference: Array, log_probs: Array) -> Array:
    """Return KL(reference || candidate) of log-probabilities, averaged over the samples: [...] ."""
    return (np.exp(reference) * (reference - log_probs)).sum(axis=-1).mean(axis=-1)
