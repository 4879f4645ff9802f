"""Panels: the samples of one part on which candidate repairs are measured, and what is measured there.

A panel joins the clean samples and the bad samples of every property into one batch, so that a family of
candidates needs one run. Everything is compared with what the original model answers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from onnxcare.data import Dataset, Inputs, PartName, evenly
from onnxcare.experiment import Experiment
from onnxcare.measures import expected_calibration_error, paired_test
from onnxcare.properties.base import (
    Evidence,
    Property,
    divergence,
    divergence_gradient,
    log_softmax,
)
from onnxcare.spec import Keep

Array = np.ndarray

# What one unit of a broken limit costs in the smooth objective. Divergences are around 0.01 for good repairs, so a
# lost point of recall outweighs any gain in closeness.
_PENALTY = 5.0
# Limits that are used up by less than this on validation data are safe on other data.
_COMFORT = 0.5
# Fewer cases that misbehave cannot tell a repair from chance at one in twenty, even if all of them are mended.
_TELLING = 5


@dataclass(frozen=True)
class Outcome:
    """What one candidate does on a panel, against the original model.

    Attributes:
        excess: for every property, its rate above the baseline (the worse of two, see `excess`).
        accuracy_drop: loss of accuracy on clean samples.
        recall_drop: largest loss of recall of any class.
        broken: share of right answers that became wrong.
        changed: share of decisions on clean samples that changed.
        calibration_rise: rise of the expected calibration error on clean samples.
        drift: KL(original || candidate) on clean samples.
        loss: sum of the properties' smooth losses.
        violation: sum of all broken limits.
        strain: the share of a limit that is used up, of the limit that is used up most; more than 1 breaks it.
        luck: exact paired test: the probability that so many more cases are mended than spoilt by chance alone; None
            where too few misbehaved before for any number to tell.
    """

    excess: tuple[float, ...]
    accuracy_drop: float
    recall_drop: float
    broken: float
    drift: float
    loss: float
    violation: float
    strain: float
    changed: float = 0.0
    calibration_rise: float = 0.0
    luck: float | None = None

    @property
    def cost(self) -> float:
        """Closeness to the original, plus a price for every broken limit: what searches minimise."""
        return self.loss + self.drift + _PENALTY * self.violation

    @property
    def kept(self) -> bool:
        """Whether every limit is kept, as far as so many samples can tell."""
        return self.strain <= 1

    @property
    def comfortable(self) -> bool:
        """Whether every limit is kept with ease, so that nothing better need be looked for."""
        return self.strain <= _COMFORT

    @property
    def rank(self) -> tuple[float, float]:
        """The order in which candidates are chosen: away from every limit first, then at the least cost.

        Whoever stays within half of every limit is as good as another who does, and among those who break one the
        cost decides, in which every broken limit has its price.
        """
        return (max(_COMFORT, self.strain) if self.kept else math.inf), self.cost


@dataclass(frozen=True)
class Panel:
    """Samples to measure candidates on, and the original's answers there.

    Attributes:
        inputs: clean samples first, then the bad samples of each property.
        clean: the clean samples.
        bad: rows of each property's bad samples.
        evidence: the evidence of each property.
        reference: log-probabilities of the original on the clean samples.
        goals: log-probabilities that each property's bad samples should get, or None.
        misbehaved: which cases of each property misbehave in the original.
    """

    properties: Sequence[Property]
    keep: Keep
    inputs: Inputs
    clean: Dataset
    bad: tuple[slice, ...]
    evidence: tuple[Evidence, ...]
    reference: Array
    goals: tuple[Array | None, ...]
    misbehaved: tuple[Array, ...]

    @classmethod
    def build(
        cls,
        original: Experiment,
        properties: Sequence[Property],
        keep: Keep,
        clean: Dataset,
        part: PartName,
        limit: int | None = None,
    ) -> Panel:
        """Lay out a panel; `limit` keeps only that many clean and bad samples, evenly spaced."""
        clean = evenly(clean, limit)
        evidence = []
        for item in properties:
            found = item.evidence(part)
            # Rows of one case lie side by side, so that a case is kept whole or not at all.
            twins = None if found.twins is None else evenly(found.twins, limit, item.rows_per_case)
            evidence.append(Evidence(evenly(found.bad, limit, item.rows_per_case), twins))
        start = len(clean)
        rows, goals, misbehaved = [], [], []
        for item, found in zip(properties, evidence, strict=True):
            rows.append(slice(start, start + len(found.bad)))
            start += len(found.bad)
            goal, wrong = _answered(original, item, found)
            goals.append(goal)
            misbehaved.append(wrong)
        everything = [clean.inputs, *(found.bad.inputs for found in evidence)]
        inputs = {name: np.concatenate([p[name] for p in everything]) for name in clean.inputs}
        reference = log_softmax(original.scores(clean.inputs))
        return cls(
            properties, keep, inputs, clean, tuple(rows), tuple(evidence), reference, tuple(goals), tuple(misbehaved)
        )

    @property
    def clean_rows(self) -> slice:
        """Rows of the clean samples."""
        return slice(0, len(self.clean))

    @cached_property
    def _per_class(self) -> Array:
        """Return the weights with which right answers add up to every class's recall, [classes, samples]."""
        labels = self.clean.truth
        member = (labels == np.unique(labels)[:, None]).astype(float)
        return member / member.sum(axis=1, keepdims=True)

    def batch(self, number: int, of: int) -> tuple[Panel, Array]:
        """Return one of several panels that share out the samples evenly, and the rows of this one that it has."""
        rows = [np.arange(len(self.clean))[number::of]]
        evidence, goals, bad, misbehaved = [], [], [], []
        start = len(rows[0])
        for (item, where, found, goal), wrong in zip(self._parts(), self.misbehaved, strict=True):
            cases = np.arange(len(found.bad) // item.rows_per_case)[number::of]
            mine = (cases[:, None] * item.rows_per_case + np.arange(item.rows_per_case)).reshape(-1)
            rows.append(where.start + mine)
            twins = None if found.twins is None else found.twins.take(mine)
            evidence.append(Evidence(found.bad.take(mine), twins))
            goals.append(None if goal is None else goal[mine])
            misbehaved.append(wrong[cases])
            bad.append(slice(start, start + len(mine)))
            start += len(mine)
        taken = np.concatenate(rows)
        inputs = {name: values[taken] for name, values in self.inputs.items()}
        clean = self.clean.take(rows[0])
        reference = self.reference[rows[0]]
        part = replace(
            self,
            inputs=inputs,
            clean=clean,
            bad=tuple(bad),
            evidence=tuple(evidence),
            reference=reference,
            goals=tuple(goals),
            misbehaved=tuple(misbehaved),
        )
        return part, taken

    def costs(self, scores: Array) -> Array:
        """Return the smooth objective of a family, scores [P, rows, classes] -> [P].

        Hard rates are flat almost everywhere; here accuracy and recall count by the probability given to the
        true class, so that every candidate has a slope.
        """
        log_probs = log_softmax(scores[:, self.clean_rows])
        total = divergence(self.reference, log_probs)
        for item, rows, found, goal in self._parts():
            if len(found.bad):
                total = total + item.loss(scores[:, rows], found.bad, goal)
        for _, lost, limit in self._soft_drops(log_probs):
            total = total + _PENALTY * np.maximum(0, lost - limit)
        return total

    def gradient(self, scores: Array) -> Array:
        """Return the gradient of one candidate's cost, scores [rows, classes] -> [rows, classes]."""
        log_probs = log_softmax(scores[self.clean_rows])
        found = np.zeros(scores.shape)
        clean = found[self.clean_rows]
        clean += divergence_gradient(self.reference, log_probs)
        for item, rows, evidence, goal in self._parts():
            if len(evidence.bad):
                found[rows] += item.loss_gradient(scores[rows], evidence.bad, goal)
        p = np.exp(log_probs)
        labels = self.clean.truth
        rows_of = np.arange(len(labels))
        # d p_true / d scores = p_true (onehot - p)
        slope = -p[rows_of, labels][:, None] * p
        slope[rows_of, labels] += p[rows_of, labels]
        for weights, lost, limit in self._soft_drops(log_probs[None]):
            if lost[0] > limit:
                clean -= _PENALTY * weights[:, None] * slope
        return found

    def _soft_drops(self, log_probs: Array) -> Iterator[tuple[Array, Array, float]]:
        """Yield for every guard the weights of the samples, the smooth drop [P] of the family, and its limit."""
        labels = self.clean.truth
        rows_of = np.arange(len(labels))
        lost = np.exp(self.reference[rows_of, labels]) - np.exp(log_probs[:, rows_of, labels])
        even = np.full(len(labels), 1 / len(labels))
        per_class = self._per_class
        yield even, lost @ even, self.keep.accuracy_drop
        for weights in per_class:
            yield weights, lost @ weights, self.keep.recall_drop
        balanced = per_class.mean(axis=0)
        yield balanced, lost @ balanced, self.keep.balanced_accuracy_drop

    def _parts(self) -> Iterator[tuple[Property, slice, Evidence, Array | None]]:
        yield from zip(self.properties, self.bad, self.evidence, self.goals, strict=True)

    @cached_property
    def _calibrated(self) -> float:
        return self._calibration_error(self.reference)

    def _calibration_error(self, log_probs: Array) -> float:
        return expected_calibration_error(np.exp(log_probs), self.clean.truth)

    def _luck(self, scores: Array) -> float | None:
        """Return the probability that so many more cases were mended than spoilt by chance alone."""
        parts = [part for part in zip(self._parts(), self.misbehaved, strict=True) if part[0][0].counted]
        before = np.concatenate([np.zeros(0, bool), *(wrong for _, wrong in parts)])
        if before.sum() < _TELLING:
            return None
        cases = [item.misbehaves(scores[rows], found.bad) for (item, rows, found, _), _ in parts]
        return paired_test(np.concatenate([np.zeros(0, bool), *cases]), before, higher_is_better=False)

    def outcomes(self, scores: Array) -> list[Outcome]:
        """Return the measured outcome of every member of a family, scores [P, rows, classes]."""
        return [self._outcome(member) for member in scores]

    def _outcome(self, scores: Array) -> Outcome:
        clean = scores[self.clean_rows]
        before = self.reference.argmax(axis=-1) == self.clean.labels
        after = clean.argmax(axis=-1) == self.clean.labels
        per_class, sizes = self._per_class, np.unique(self.clean.truth, return_counts=True)[1]
        drops = per_class @ before - per_class @ after
        broken = float((before & ~after).sum() / max(1, before.sum()))
        accuracy_drop = float(before.mean() - after.mean())
        held = [
            _Held(accuracy_drop, self.keep.accuracy_drop, len(after)),
            *(_Held(float(drop), self.keep.recall_drop, size) for drop, size in zip(drops, sizes, strict=True)),
            _Held(float(drops.mean()), self.keep.balanced_accuracy_drop, len(after)),
        ]
        changed = float((clean.argmax(axis=-1) != self.reference.argmax(axis=-1)).mean())
        log_probs = log_softmax(clean)
        rise = self._calibration_error(log_probs) - self._calibrated
        if self.keep.broken is not None:
            held.append(_Held(broken, self.keep.broken, int(before.sum())))
        if self.keep.decisions_changed is not None:
            held.append(_Held(changed, self.keep.decisions_changed, len(after)))
        if self.keep.calibration_rise is not None:
            held.append(_Held(rise, self.keep.calibration_rise, len(after)))
        excesses, loss = [], 0.0
        for item, rows, evidence, goal in self._parts():
            above = excess(item, scores[rows], evidence.bad, self.clean, self.reference, clean)
            excesses.append(above)
            if len(evidence.bad):
                loss += float(item.loss(scores[rows], evidence.bad, goal))
            if item.max_rate is not None:
                held.append(_Held(above, item.max_rate, max(1, len(evidence.bad) // item.rows_per_case)))
        return Outcome(
            excess=tuple(excesses),
            accuracy_drop=accuracy_drop,
            recall_drop=float(drops.max()),
            broken=broken,
            changed=changed,
            calibration_rise=rise,
            luck=self._luck(scores),
            drift=float(divergence(self.reference, log_probs)),
            loss=loss,
            violation=sum(max(0.0, item.value - item.limit) for item in held),
            strain=max(item.strain for item in held),
        )


@dataclass(frozen=True)
class _Held:
    """A value that has to keep a limit, and the number of samples it was measured on."""

    value: float
    limit: float
    samples: int

    @property
    def strain(self) -> float:
        """The share of the limit that is used up; what a sample or two decide is not told from chance.

        A limit of zero is meant: there a single sample counts.
        """
        return self.value / max(self.limit, (2 if self.limit else 1) / self.samples)


def excess(item: Property, scores: Array, bad: Dataset, clean: Dataset, before: Array, after: Array) -> float:
    """Return a property's rate above its baseline.

    The baseline is the share of relevant clean samples that are answered like bad ones, for the original (`before`)
    or the candidate (`after`); the smaller one is taken off, so that the worse excess counts.
    """
    rate = float(item.rate(scores, bad))
    relevant = item.relevant(clean)
    if not relevant.any():
        return rate
    baselines = [float(item.misbehaves(answers, clean)[relevant].mean()) for answers in (before, after)]
    return rate - min(baselines)


def _answered(original: Experiment, item: Property, found: Evidence) -> tuple[Array | None, Array]:
    """Return what a property's bad samples should get, and which cases misbehave in the original."""
    if not len(found.bad):
        return None, np.zeros(0, bool)
    scores = original.scores(found.bad.inputs)
    twins = None if found.twins is None else original.scores(found.twins.inputs)
    return item.goal(scores, twins, found.bad.labels), item.misbehaves(scores, found.bad)
