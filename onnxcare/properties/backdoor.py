"""The backdoor property: a trigger must not lead to the target class.

Attack success rate: share of triggered samples whose true class is not the target and that are answered with it.
Confusion rate: the same share among clean samples, which no repair has to go below. The excess attack success is
the rate above the smaller of two confusion rates, the original's and the repaired model's own: the worse counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.data import PARTS, Dataset, Inputs, PartName, Splits, check_labels, load_dataset, split
from onnxcare.errors import DataError, SpecError
from onnxcare.graph.model import Signature
from onnxcare.measures import Finding, Rate
from onnxcare.properties.base import Array, Evidence, Property, divergence, divergence_gradient, log_softmax
from onnxcare.properties.trigger import Trigger, estimate_triggers, load_trigger
from onnxcare.spec import BackdoorSpec

if TYPE_CHECKING:
    from onnxcare.judge import Court

Predict = Callable[[Inputs], Array]

# An estimated trigger has to reproduce this share of the attack success of the given samples.
_REPRODUCED = 0.9
# With labels in a smooth loss, probabilities of exactly one would be infinitely wrong.
_TINY = 1e-7

ATTACK_SUCCESS, EXCESS = "attack success rate", "excess attack success"


class Backdoor(Property):
    """A hidden trigger leads to a target class."""

    kind = "backdoor"
    transplantable = True

    def __init__(self, spec: BackdoorSpec, evidence: dict[PartName, Evidence], notes: Sequence[str]) -> None:
        """Wrap prepared evidence; use `prepare` to make it from files."""
        self.name = spec.name
        self.target = target_of(spec)
        self.max_rate: float = spec.max_rate
        self.notes = tuple(notes)
        self._evidence = evidence

    def evidence(self, part: PartName) -> Evidence:
        """Return the triggered samples of a part whose true class is not the target."""
        return self._evidence[part]

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which samples are answered with the target."""
        return scores.argmax(axis=-1) == self.target

    def relevant(self, clean: Dataset) -> Array:
        """Return the clean samples of other classes: those called target are the confusion rate."""
        return clean.truth != self.target

    def observed(self, clean: Dataset, bad: Dataset) -> Dataset:
        """Return the clean samples: the question is what drives them to the target."""
        return clean

    def response(self, scores: Array, samples: Dataset) -> Array:
        """Return the probability of the target."""
        return np.exp(log_softmax(scores))[..., self.target]

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return the score of the target above the highest other one."""
        others = np.delete(scores, self.target, axis=-1)
        return scores[..., self.target] - others.max(axis=-1)

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return KL from the original's answer on the twin, or -log(1 - p_target) without twins.

        True labels as goal would push the target class down: its recall pays for it.
        """
        log_probs = log_softmax(scores)
        if goal is not None:
            return divergence(goal, log_probs)
        wrong = np.exp(log_probs[..., self.target])
        return -np.log(np.maximum(1 - wrong, _TINY)).mean(axis=-1)

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss with respect to the scores."""
        log_probs = log_softmax(scores)
        if goal is not None:
            return divergence_gradient(goal, log_probs)
        p = np.exp(log_probs)
        wrong = p[:, self.target]
        # d p_target / d scores = p_target (onehot - p)
        slope = wrong / np.maximum(1 - wrong, _TINY) / len(p)
        onehot = np.arange(p.shape[1]) == self.target
        return slope[:, None] * (onehot - p)

    def measure(self, court: Court) -> Finding:
        """Return attack success, confusion, their difference, and how many true answers came back."""
        bad = self.evidence("holdout").bad
        relevant = self.relevant(court.clean)
        hits = [self.misbehaves(item.scores(bad.inputs), bad) for item in court.witnesses]
        confused = [self.misbehaves(item.scores(court.clean.inputs), court.clean)[relevant] for item in court.witnesses]
        gauge = court.gauge
        success = gauge.rate(ATTACK_SUCCESS, hits[-1], *hits[:-1])
        confusion = gauge.rate("clean confusion rate", confused[-1], *confused[:-1])
        floors = [float(item.mean()) if item.size else 0.0 for item in confused]
        # The smaller of the two confusion rates: the worse excess counts.
        before = float(hits[0].mean()) - floors[0] if court.before is not None else None
        # Each of the three rates at a third of the error, so that all intervals hold together.
        third = 1 - (1 - gauge.confidence) / 3
        high = Rate.of(hits[-1], third).high - min(Rate.of(item, third).low if item.size else 0.0 for item in confused)
        low = Rate.of(hits[-1], third).low - max(Rate.of(item, third).high if item.size else 0.0 for item in confused)
        excess = gauge.points(
            EXCESS, float(hits[-1].mean()) - min(floors), before, limit=self.max_rate, interval=(low, high)
        )
        found = [success, confusion, excess]
        if bad.labels is not None:
            restored = court.after.decide(bad.inputs) == bad.labels
            found.append(gauge.rate("true answer restored", restored, higher_is_better=True))
        # The excess is a difference; the samples that it rests on are those of the attack success.
        note = gauge.too_small(len(bad), self.max_rate)
        return Finding(self.name, self.kind, tuple(found), (*self.notes, *([note] if note else [])))


def target_of(spec: BackdoorSpec) -> int:
    """Return the target of a backdoor whose trigger is known, or was restored."""
    assert spec.target is not None
    return spec.target


def check(spec: BackdoorSpec, signatures: Sequence[Signature], classes: int) -> None:
    """Make sure that the model can have such a backdoor.

    Raises:
        SpecError: the target is not a class, or the model has several inputs.
    """
    if spec.target is not None and spec.target >= classes:
        raise SpecError(
            f"properties.{spec.name}.target: {spec.target} is not a class; the model has 0 to {classes - 1}"
        )
    if len(signatures) != 1:
        names = ", ".join(signature.name for signature in signatures)
        raise SpecError(f"properties.{spec.name}: triggers need a model with one input, not {names}")


def prepare(
    spec: BackdoorSpec,
    splits: Splits,
    signatures: Sequence[Signature],
    classes: int,
    predict: Predict,
    labels: str,
    seed: int,
) -> Backdoor:
    """Read the trigger or the triggered samples and lay out the evidence of every part.

    Args:
        spec: the property as the user wrote it.
        splits: the clean data.
        signatures: the model's inputs.
        classes: number of classes.
        predict: scores of the original model.
        labels: key of the labels in data files.
        seed: fixes how given triggered samples are split.

    Raises:
        DataError: a file does not fit.
    """
    (name,) = (signature.name for signature in signatures)
    if spec.trigger is not None:
        trigger = load_trigger(spec.trigger, signatures[0])
        stamped = {part: stamp(trigger, splits.part(part), target_of(spec), name) for part in PARTS}
        need_samples(spec, stamped)
        return Backdoor(spec, stamped, ())
    assert spec.triggered is not None
    triggered = _load_triggered(spec, spec.triggered, signatures, classes, labels)
    holdout = None
    if spec.triggered_holdout is not None:
        holdout = _load_triggered(spec, spec.triggered_holdout, signatures, classes, labels)
    return _from_triggered(spec, splits, triggered, holdout, name, predict, seed)


def _load_triggered(
    spec: BackdoorSpec, path: Path, signatures: Sequence[Signature], classes: int, labels: str
) -> Dataset:
    """Read triggered samples and leave out those whose true class is the target."""
    dataset = load_dataset(path, signatures, labels)
    if dataset.labels is None:
        return dataset
    check_labels(dataset, classes, str(path))
    others = dataset.take(np.flatnonzero(dataset.truth != spec.target))
    if not len(others):
        raise DataError(f"{path}: every sample's true class is the target {spec.target}")
    return others


def _from_triggered(
    spec: BackdoorSpec,
    splits: Splits,
    usable: Dataset,
    holdout: Dataset | None,
    name: str,
    predict: Predict,
    seed: int,
) -> Backdoor:
    if holdout is None:
        if len(usable) < 5:
            raise DataError(f"{spec.triggered}: {len(usable)} triggered samples; at least 5 are needed")
        usable, holdout = _split_rows(usable, [0.7, 0.3], seed)
    notes = []
    if usable.labels is None:
        notes.append("Triggered samples have no labels: all are counted as if their true class were another one.")
    evidence: dict[PartName, Evidence] = {"holdout": Evidence(holdout, None)}
    searching: tuple[PartName, ...] = ("repair", "search", "validation")
    observed = _success(predict, usable, target_of(spec))
    trigger, success = _best_trigger(spec, usable, splits.repair, name, predict)
    if trigger is not None and success >= _REPRODUCED * observed:
        notes.append(
            f"The trigger was estimated from {len(usable)} triggered samples as a {trigger.source} of "
            f"{int((trigger.mask > 0).sum())} values; stamped on clean samples it reaches {success:.1%} attack "
            f"success, the given ones {observed:.1%}."
        )
        for part in searching:
            evidence[part] = stamp(trigger, splits.part(part), target_of(spec), name)
    else:
        notes.append(
            "No static trigger explains the triggered samples; the repair rests on their mean shift "
            "alone, so confidence is low."
        )
        for part, rows in zip(searching, _split_rows(usable, [0.5, 0.2, 0.3], seed), strict=True):
            evidence[part] = Evidence(rows, None)
    need_samples(spec, evidence)
    return Backdoor(spec, evidence, notes)


def _best_trigger(
    spec: BackdoorSpec, triggered: Dataset, clean: Dataset, name: str, predict: Predict
) -> tuple[Trigger | None, float]:
    """Return the estimated trigger of highest attack success on clean samples, and that success."""
    best, highest = None, 0.0
    for trigger in estimate_triggers(triggered, clean, name):
        stamped = stamp(trigger, clean, target_of(spec), name)
        if not len(stamped.bad):
            continue
        success = _success(predict, stamped.bad, target_of(spec))
        if success > highest:
            best, highest = trigger, success
    return best, highest


def _success(predict: Predict, triggered: Dataset, target: int) -> float:
    return float((predict(triggered.inputs).argmax(axis=-1) == target).mean())


def _split_rows(dataset: Dataset, shares: list[float], seed: int) -> list[Dataset]:
    """Split without regard to classes: there may be only a few samples of each."""
    parts = split(Dataset({"row": np.arange(len(dataset))}, None), shares, seed)
    return [dataset.take(part.inputs["row"]) for part in parts]


def stamp(trigger: Trigger, clean: Dataset, target: int, name: str) -> Evidence:
    """Return the clean samples of other classes with the trigger on them, and as they were."""
    twins = clean.take(np.flatnonzero(clean.truth != target))
    stamped = Dataset({name: trigger.stamp(twins.inputs[name])}, twins.labels)
    return Evidence(stamped, twins)


def need_samples(spec: BackdoorSpec, evidence: dict[PartName, Evidence]) -> None:
    """Make sure that every part has samples that a trigger could mislead.

    Raises:
        DataError: one has none.
    """
    for part, found in evidence.items():
        if not len(found.bad):
            raise DataError(
                f"property {spec.name!r}: no samples of other classes than {spec.target} are left for {part}; "
                "give more data"
            )
