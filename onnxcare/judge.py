"""The judge: what a file does on data that neither localisation nor search has seen.

It knows nothing of how a repair was found. It opens every file in a fresh session and lets properties and guards
measure it on the held-out part; exact intervals and counts stand beside the measured values. A repair is judged
against the original; `check` judges a file alone, or against a baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.data import Dataset, Inputs
from onnxcare.decision import Decision
from onnxcare.errors import ModelError
from onnxcare.graph.batch import with_free_batch
from onnxcare.graph.model import Model
from onnxcare.measures import Finding, Gauge, Measure, Rate, Verdict, expected_calibration_error
from onnxcare.properties.base import log_softmax
from onnxcare.runtime import Device, Session
from onnxcare.spec import Keep

if TYPE_CHECKING:
    from onnxcare.properties.base import Property

Array = np.ndarray

# A file whose batch size is fixed runs as it is on so many samples. On more of them a copy with a free batch size runs,
# if it answers the same on some of them.
_ROW_BY_ROW, _COMPARED, _SAME = 20_000, 256, 1e-5
_RESAMPLED = 200


class Witness:
    """One file in a fresh session.

    Attributes:
        model: the file.
        decision: how its output is read.
        output: that output.
        device: where it runs.
        rows_per_run: how many samples fit into memory at once.
    """

    def __init__(self, model: Model, output: str, decision: Decision, device: Device, rows_per_run: int) -> None:
        """Open the file; `decision` may be that of an experiment, here the output itself is read."""
        self.model = model
        self.decision = decision.of_output()
        self._final = decision.final
        self.device: Device = device
        self.rows_per_run = rows_per_run
        self.output = output
        self._session = Session(model.path, device, axes=model.axes)
        self._free: Session | None = None
        self._recent: list[tuple[Inputs, Array]] = []

    def scores(self, inputs: Inputs) -> Array:
        """Return the scores [samples, classes]; those of the last two inputs are kept.

        Raises:
            ModelError: the model answers NaN or infinity.
        """
        for known, scores in self._recent:
            if known is inputs:
                return scores
        found = self.decision.scores(self._answers(inputs))
        self._recent = [*self._recent[-1:], (inputs, found)]
        return found

    def _freed(self, inputs: Inputs) -> Session | None:
        """Return a session on the file with its fixed batch size made free, or None if it does not answer the same.

        A million samples one by one would take minutes.
        """
        sizes = [shape[0] for _, _, shape in self._session.inputs if shape and isinstance(shape[0], int)]
        if not sizes or max(sizes) >= self.rows_per_run:
            return None
        if self._free is None:
            free, axes = with_free_batch(self.model), self.model.axes
            self._free = Session(free, self.device, what=str(self.model.path), axes=axes)
        few = {name: values[:_COMPARED] for name, values in inputs.items()}
        expected, found = (
            item.run_rows(few, [self.output], rows_per_run=self.rows_per_run)[0] for item in (self._session, self._free)
        )
        same = expected.shape == found.shape and np.allclose(expected, found, rtol=_SAME, atol=_SAME)
        return self._free if same else None

    def probabilities(self, inputs: Inputs) -> Array:
        """Return a probability per class, [samples, classes]: the output itself where it holds them."""
        scores = self.scores(inputs)
        if self._final == "Softmax":
            return scores
        if self._final == "Sigmoid":
            return np.stack([1 - scores[..., 1], scores[..., 1]], axis=-1)
        return np.exp(log_softmax(scores))

    def decide(self, inputs: Inputs) -> Array:
        """Return the decisions, [samples]."""
        found: Array = self.scores(inputs).argmax(axis=-1)
        return found

    def _answers(self, inputs: Inputs) -> Array:
        samples = len(next(iter(inputs.values())))
        session = self._session
        if samples > _ROW_BY_ROW:
            session = self._freed(inputs) or session
        answers = session.run_rows(inputs, [self.output], rows_per_run=self.rows_per_run)[0]
        bad = int((~np.isfinite(answers).reshape(len(answers), -1).all(axis=1)).sum())
        if bad:
            raise ModelError(f"{self._session.name}: answers NaN or infinity for {bad} of {len(answers)} samples")
        return answers


@dataclass(frozen=True)
class Court:
    """What a property or a guard is measured on.

    Attributes:
        after: the file that is judged.
        before: the file it is compared with, or None.
        clean: clean held-out samples; labels are the true ones, or the answers of the first file where the data has
            none.
        gauge: makes measures.
        seed: fixes fresh samples; no search has used the same ones.
        memory: bytes that a search for violations may take.
    """

    after: Witness
    before: Witness | None
    clean: Dataset
    gauge: Gauge = field(default_factory=Gauge)
    seed: int = 1
    memory: int = 1 << 30

    @property
    def witnesses(self) -> list[Witness]:
        """The files, the one that is judged last."""
        return [item for item in (self.before, self.after) if item is not None]


def judge(court: Court, properties: Sequence[Property], keep: Keep) -> Verdict:
    """Measure properties and guards.

    Args:
        court: the files and the held-out data.
        properties: each brings its own samples.
        keep: the limits for clean samples.

    Raises:
        ModelError: a model answers NaN or infinity.
    """
    findings = []
    for item in properties:
        found = item.measure(court)
        findings.append(replace(found, notes=(*found.notes, *_too_small(found.measures, court.gauge))))
    return Verdict(tuple(findings), _guards(court, keep))


def _guards(court: Court, keep: Keep) -> Finding:
    """Measure what has to be kept: accuracy, every class's recall, and more than one answer."""
    truth, gauge = court.clean.truth, court.gauge
    decisions = court.after.decide(court.clean.inputs)
    before = None if court.before is None else court.before.decide(court.clean.inputs)
    right = decisions == truth
    right_before = None if before is None else before == truth
    measures = [gauge.rate("accuracy", right, right_before, limit=keep.accuracy, higher_is_better=True)]
    if right_before is not None:
        measures.append(gauge.drop("accuracy drop", right_before, right, keep.accuracy_drop))
    measures += _recalls(gauge, keep, truth, right, right_before)
    if before is not None and right_before is not None:
        broken = right_before & ~right
        measures.append(gauge.rate("right answers broken", broken[right_before], limit=keep.broken))
        measures.append(gauge.rate("decisions changed", before != decisions, limit=keep.decisions_changed))
        measures.append(_calibration(court, keep))
    classes = len(np.unique(truth))
    answered = len(np.unique(decisions))
    if classes > 1 and answered == 1:
        measures.append(_collapsed(float(answered), classes))
    return Finding("kept", "guards", tuple(measures))


def _calibration(court: Court, keep: Keep) -> Measure:
    """Measure the rise of the expected calibration error, with a bootstrap interval over the samples."""
    assert court.before is not None
    truth = court.clean.truth
    before, after = (item.probabilities(court.clean.inputs) for item in (court.before, court.after))

    def rise(rows: Array | slice) -> float:
        errors = [expected_calibration_error(p[rows], truth[rows]) for p in (after, before)]
        return errors[0] - errors[1]

    rng = np.random.default_rng(court.seed)
    drawn = [rise(rng.integers(len(truth), size=len(truth))) for _ in range(_RESAMPLED)]
    tail = (1 - court.gauge.confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return court.gauge.points(
        "calibration error rise", rise(slice(None)), None, limit=keep.calibration_rise, interval=(low, high)
    )


def _collapsed(answered: float, classes: int) -> Measure:
    """A model that gives one answer only keeps many properties for the wrong reason."""
    return Measure(
        f"classes answered, of {classes} that occur",
        "number",
        None,
        answered,
        2.0,
        higher_is_better=True,
        status="fail",
    )


def _recalls(gauge: Gauge, keep: Keep, truth: Array, right: Array, before: Array | None) -> list[Measure]:
    labels = np.unique(truth)
    found = []
    for label in labels:
        mine = truth == label
        name = f"recall of class {label}"
        was = None if before is None else before[mine]
        found.append(gauge.rate(name, right[mine], was, limit=keep.recall, higher_is_better=True))
        if before is not None:
            found.append(gauge.drop(f"recall drop of class {label}", before[mine], right[mine], keep.recall_drop))
    recall = np.mean([right[truth == label].mean() for label in labels])
    if before is None:
        return [*found, gauge.points("balanced accuracy", float(recall), unit="rate")]
    recall_before = np.mean([before[truth == label].mean() for label in labels])
    # The mean of every class's interval holds wherever all of them do; each class gets its part of the error.
    shared = Gauge(1 - (1 - gauge.confidence) / len(labels))
    drops = [shared.drop("", before[truth == label], right[truth == label], None) for label in labels]
    interval = tuple(float(np.mean([getattr(item, end) for item in drops])) for end in ("low", "high"))
    drop = float(recall_before - recall)
    limit = keep.balanced_accuracy_drop
    return [
        *found,
        gauge.points("balanced accuracy", float(recall), float(recall_before), unit="rate"),
        gauge.points("balanced accuracy drop", drop, None, limit=limit, interval=(interval[0], interval[1])),
    ]


def _too_small(measures: Sequence[Measure], gauge: Gauge) -> tuple[str, ...]:
    """Say when not even zero misbehaving samples would put an interval below its limit."""
    for item in measures:
        if item.limit is not None and not item.higher_is_better and isinstance(item.after, Rate):
            note = gauge.too_small(item.after.total, item.limit)
            if note:
                return (note,)
    return ()
