"""The judge: what a repaired file does on data that neither localisation nor search has seen.

It knows nothing of how a repair was found. It opens the original and the repaired file in fresh sessions, measures both
on the held-out part, and lets the measured rates decide; exact (Clopper-Pearson) intervals and counts stand beside
them, and a held-out part too small to tell a threshold from zero is said to be so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from onnxcare.data import Dataset
from onnxcare.errors import ModelError
from onnxcare.properties.base import Property
from onnxcare.runtime import Session
from onnxcare.spec import Keep

Array = np.ndarray

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Rate:
    """A measured share, with its counts and exact 95 % interval."""

    count: int
    total: int
    low: float
    high: float

    @classmethod
    def of(cls, happened: Array) -> Rate:
        """Count a bool array."""
        count, total = int(happened.sum()), int(happened.size)
        low, high = clopper_pearson(count, total)
        return cls(count, total, low, high)

    @property
    def value(self) -> float:
        """The share itself; NaN of nothing."""
        return self.count / self.total if self.total else math.nan


@dataclass(frozen=True)
class PropertyFinding:
    """What was found about one property.

    Attributes:
        name: the property.
        kind: its kind.
        before: rate of the original on bad samples (for a backdoor: attack success).
        after: rate of the repaired model there.
        baseline_before: rate of the original on relevant clean samples (for a backdoor: confusion).
        baseline_after: rate of the repaired model there.
        excess_before: `before` above the original's baseline.
        excess: `after` above the smaller baseline: the worse of the two counts.
        restored: bad samples that get their true label after the repair; None without labels.
        limit: the excess that is tolerated.
        passed: whether `excess` is within the limit.
        notes: what the reader should know.
    """

    name: str
    kind: str
    before: Rate
    after: Rate
    baseline_before: Rate
    baseline_after: Rate
    excess_before: float
    excess: float
    restored: Rate | None
    limit: float
    passed: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ClassRecall:
    """Recall of one class before and after."""

    label: int
    before: Rate
    after: Rate

    @property
    def drop(self) -> float:
        """Loss of recall; negative for a gain."""
        return self.before.value - self.after.value


@dataclass(frozen=True)
class Guards:
    """What must be kept on clean samples.

    Attributes:
        before: accuracy of the original.
        after: accuracy of the repaired model.
        recalls: recall of every class that occurs.
        changed: clean samples whose decision changed.
        accuracy_limit: largest tolerated loss of accuracy.
        recall_limit: largest tolerated loss of any class's recall.
    """

    before: Rate
    after: Rate
    recalls: tuple[ClassRecall, ...]
    changed: Rate
    accuracy_limit: float
    recall_limit: float

    @property
    def accuracy_drop(self) -> float:
        """Loss of accuracy; negative for a gain."""
        return self.before.value - self.after.value

    @property
    def worst_recall(self) -> ClassRecall:
        """The class that lost most."""
        return max(self.recalls, key=lambda item: item.drop)

    @property
    def passed(self) -> bool:
        """Whether accuracy and every class's recall stayed within their limits."""
        # Shares of integers: a drop of exactly the limit must pass in spite of rounding.
        return self.accuracy_drop <= self.accuracy_limit + 1e-12 and self.worst_recall.drop <= self.recall_limit + 1e-12


@dataclass(frozen=True)
class Verdict:
    """The judge's finding on held-out data."""

    properties: tuple[PropertyFinding, ...]
    guards: Guards

    @property
    def passed(self) -> bool:
        """Whether every property and every guard passed."""
        return self.guards.passed and all(finding.passed for finding in self.properties)


def judge(
    original: Session,
    repaired: Session,
    output: str,
    holdout: Dataset,
    properties: Sequence[Property],
    keep: Keep,
    rows_per_run: int,
) -> Verdict:
    """Compare two files on held-out data.

    Args:
        original: a fresh session on the original file.
        repaired: a fresh session on the repaired file.
        output: the output that is judged.
        holdout: clean held-out samples with labels.
        properties: each brings its own held-out bad samples.
        keep: the limits for clean samples.
        rows_per_run: how many samples fit into memory at once.

    Raises:
        ModelError: a model answers NaN or infinity.
    """
    truth = holdout.truth
    sessions = original, repaired

    def answers(dataset: Dataset) -> tuple[Array, Array]:
        first, second = (_answers(session, output, dataset, rows_per_run) for session in sessions)
        return first, second

    before, after = answers(holdout)
    findings = []
    for item in properties:
        bad = item.evidence("holdout").bad
        findings.append(_finding(item, answers(bad), bad, (before, after), holdout))
    right_before = before.argmax(axis=1) == truth
    right_after = after.argmax(axis=1) == truth
    recalls = []
    for label in np.unique(truth):
        mine = truth == label
        recalls.append(ClassRecall(int(label), Rate.of(right_before[mine]), Rate.of(right_after[mine])))
    guards = Guards(
        before=Rate.of(right_before),
        after=Rate.of(right_after),
        recalls=tuple(recalls),
        changed=Rate.of(before.argmax(axis=1) != after.argmax(axis=1)),
        accuracy_limit=keep.accuracy_drop,
        recall_limit=keep.recall_drop,
    )
    return Verdict(tuple(findings), guards)


def _finding(
    item: Property,
    bad_scores: tuple[Array, Array],
    bad: Dataset,
    clean_scores: tuple[Array, Array],
    holdout: Dataset,
) -> PropertyFinding:
    relevant = item.relevant(holdout)
    before, after = (Rate.of(item.misbehaves(scores)) for scores in bad_scores)
    baselines = [Rate.of(item.misbehaves(scores)[relevant]) for scores in clean_scores]
    floors = [rate.value if rate.total else 0.0 for rate in baselines]
    excess = after.value - min(floors)
    restored = None
    if bad.labels is not None:
        restored = Rate.of(bad_scores[1].argmax(axis=1) == bad.labels)
    return PropertyFinding(
        name=item.name,
        kind=item.kind,
        before=before,
        after=after,
        baseline_before=baselines[0],
        baseline_after=baselines[1],
        excess_before=before.value - floors[0],
        excess=excess,
        restored=restored,
        limit=item.max_rate,
        passed=excess <= item.max_rate + 1e-12,
        notes=(*item.notes, *_too_small(after.total, item.max_rate)),
    )


def _too_small(total: int, limit: float) -> tuple[str, ...]:
    """Say when not even zero misbehaving samples would put the interval below the limit."""
    if limit <= 0 or limit >= 1 or clopper_pearson(0, total)[1] <= limit:
        return ()
    needed = math.ceil(math.log((1 - CONFIDENCE) / 2) / math.log1p(-limit))
    return (
        f"{total} held-out samples cannot tell {limit:.2%} from zero with {CONFIDENCE:.0%} confidence; {needed} would.",
    )


def _answers(session: Session, output: str, dataset: Dataset, rows_per_run: int) -> Array:
    feeds = {name: dataset.inputs[name] for name, _, _ in session.inputs}
    scores = session.run_rows(feeds, [output], rows_per_run=rows_per_run)[0]
    if not np.isfinite(scores).all():
        bad = int((~np.isfinite(scores).all(axis=1)).sum())
        raise ModelError(f"{session.name}: answers NaN or infinity for {bad} of {len(scores)} samples")
    return scores


def clopper_pearson(count: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact two-sided confidence interval of a share (Clopper and Pearson, 1934)."""
    from scipy.special import betaincinv

    if total == 0:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = 0.0 if count == 0 else float(betaincinv(count, total - count + 1, tail))
    high = 1.0 if count == total else float(betaincinv(count + 1, total - count, 1 - tail))
    return low, high
