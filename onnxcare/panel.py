"""Panels: the samples of one part on which candidate repairs are measured, and what is measured there.

A panel joins the clean samples and the bad samples of every property into one batch, so that a family of
candidates needs one run. Everything is compared with what the original model answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcare.data import Dataset, Inputs, PartName
from onnxcare.experiment import Experiment
from onnxcare.properties.base import (
    Evidence,
    Property,
    divergence,
    log_softmax,
)
from onnxcare.spec import Keep

Array = np.ndarray

# What one unit of a broken limit costs in the smooth objective. Divergences are around 0.01 for good repairs, so a
# lost point of recall outweighs any gain in closeness.
_PENALTY = 5.0


@dataclass(frozen=True)
class Outcome:
    """What one candidate does on a panel, against the original model.

    Attributes:
        excess: for every property, its rate above the baseline (the worse of two, see `excess`).
        accuracy_drop: loss of accuracy on clean samples.
        recall_drop: largest loss of recall of any class.
        drift: KL(original || candidate) on clean samples.
        loss: sum of the properties' smooth losses.
        violation: sum of all broken limits.
    """

    excess: tuple[float, ...]
    accuracy_drop: float
    recall_drop: float
    drift: float
    loss: float
    violation: float

    @property
    def cost(self) -> float:
        """The number by which candidates are ranked: closeness, plus a price for every broken limit."""
        return self.loss + self.drift + _PENALTY * self.violation


@dataclass(frozen=True)
class Panel:
    """Samples to measure candidates on, and the original's answers there.

    Attributes:
        inputs: clean samples first, then the bad samples of each property.
        clean: the clean samples.
        bad: rows of each property's bad samples.
        evidence: the evidence of each property.
        reference: log-probabilities of the original on the clean samples.
        twins: log-probabilities of the original on each property's twins, or None.
    """

    properties: Sequence[Property]
    keep: Keep
    inputs: Inputs
    clean: Dataset
    bad: tuple[slice, ...]
    evidence: tuple[Evidence, ...]
    reference: Array
    twins: tuple[Array | None, ...]

    @classmethod
    def build(
        cls,
        experiment: Experiment,
        properties: Sequence[Property],
        keep: Keep,
        clean: Dataset,
        part: PartName,
        limit: int | None = None,
    ) -> Panel:
        """Lay out a panel; `limit` keeps only that many clean and bad samples, evenly spaced."""
        clean = _thin(clean, limit)
        evidence = []
        for item in properties:
            found = item.evidence(part)
            twins = None if found.twins is None else _thin(found.twins, limit)
            evidence.append(Evidence(_thin(found.bad, limit), twins))
        start = len(clean)
        rows = []
        for found in evidence:
            rows.append(slice(start, start + len(found.bad)))
            start += len(found.bad)
        everything = [clean.inputs, *(found.bad.inputs for found in evidence)]
        inputs = {name: np.concatenate([p[name] for p in everything]) for name in clean.inputs}
        return cls(
            properties,
            keep,
            inputs,
            clean,
            tuple(rows),
            tuple(evidence),
            log_softmax(experiment.scores(clean.inputs)),
            tuple(
                None if found.twins is None else log_softmax(experiment.scores(found.twins.inputs))
                for found in evidence
            ),
        )

    @property
    def clean_rows(self) -> slice:
        """Rows of the clean samples."""
        return slice(0, len(self.clean))

    def costs(self, scores: Array) -> Array:
        """Return the smooth objective of a family, scores [P, rows, classes] -> [P].

        Hard rates are flat almost everywhere; here accuracy and recall count by the probability given to the
        true class, so that every candidate has a slope.
        """
        log_probs = log_softmax(scores)
        clean = log_probs[:, self.clean_rows]
        total = divergence(self.reference, clean)
        for item, rows, twins in zip(self.properties, self.bad, self.twins, strict=True):
            total = total + item.loss(log_probs[:, rows], twins)
        labels = self.clean.truth
        picked = np.exp(clean[:, np.arange(len(labels)), labels])
        before = np.exp(self.reference[np.arange(len(labels)), labels])
        lost = before - picked
        total = total + _PENALTY * np.maximum(0, lost.mean(axis=1) - self.keep.accuracy_drop)
        for label in np.unique(labels):
            drop = lost[:, labels == label].mean(axis=1)
            total = total + _PENALTY * np.maximum(0, drop - self.keep.recall_drop)
        return total

    def outcomes(self, scores: Array) -> list[Outcome]:
        """Return the measured outcome of every member of a family, scores [P, rows, classes]."""
        return [self._outcome(member) for member in scores]

    def _outcome(self, scores: Array) -> Outcome:
        log_probs = log_softmax(scores)
        clean = scores[self.clean_rows]
        before = self.reference.argmax(axis=-1) == self.clean.labels
        after = clean.argmax(axis=-1) == self.clean.labels
        accuracy_drop = float(before.mean() - after.mean())
        recall_drop = float(max(recalls(self.clean, before) - recalls(self.clean, after)))
        excesses, loss, violation = [], 0.0, 0.0
        for item, rows, twins in zip(self.properties, self.bad, self.twins, strict=True):
            found = excess(item, scores[rows], self.clean, self.reference, clean)
            excesses.append(found)
            loss += float(item.loss(log_probs[rows], twins))
            violation += max(0.0, found - item.max_rate)
        violation += max(0.0, accuracy_drop - self.keep.accuracy_drop)
        violation += max(0.0, recall_drop - self.keep.recall_drop)
        drift = float(divergence(self.reference, log_probs[self.clean_rows]))
        return Outcome(tuple(excesses), accuracy_drop, recall_drop, drift, loss, violation)


def recalls(clean: Dataset, right: Array) -> Array:
    """Return the recall of every class that occurs, in order of the classes."""
    return np.array([right[clean.truth == label].mean() for label in np.unique(clean.truth)])


def excess(item: Property, bad: Array, clean: Dataset, before: Array, after: Array) -> float:
    """Return a property's rate above its baseline.

    The baseline is the share of relevant clean samples that are answered like bad ones, for the original (`before`)
    or the candidate (`after`); the smaller one is taken off, so that the worse excess counts.
    """
    rate = float(item.misbehaves(bad).mean())
    relevant = item.relevant(clean)
    if not relevant.any():
        return rate
    baselines = [float(item.misbehaves(scores)[relevant].mean()) for scores in (before, after)]
    return rate - min(baselines)


def _thin(dataset: Dataset, limit: int | None) -> Dataset:
    if limit is None or len(dataset) <= limit:
        return dataset
    return dataset.take(np.linspace(0, len(dataset) - 1, limit).astype(int))
