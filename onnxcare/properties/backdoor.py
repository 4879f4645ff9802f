"""The backdoor property: a trigger must not lead to the target class, or each class to a target of its own.

Attack success rate: share of triggered samples whose true class is not the target and that are answered with it.
Where every class has a target of its own, samples of classes that have none count as little as those of the target do.
Confusion rate: the same share among clean samples, which no repair has to go below. The excess attack success is
the rate above the smaller of two confusion rates, the original's and the repaired model's own: the worse counts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.data import PARTS, Dataset, Inputs, PartName, Splits, check_labels, load_dataset, split
from onnxcare.errors import DataError, SpecError
from onnxcare.graph.model import Signature
from onnxcare.measures import Finding, Rate
from onnxcare.properties.base import Array, Evidence, Property, divergence, divergence_gradient, log_softmax, softmax
from onnxcare.properties.estimation import estimate_triggers
from onnxcare.properties.trigger import Added, Range, Static, load_trigger
from onnxcare.spec import BackdoorSpec

if TYPE_CHECKING:
    from onnxcare.judge import Court

Predict = Callable[[Inputs], Array]

# An estimated trigger has to reproduce this share of the attack success of the given samples.
_REPRODUCED = 0.9
# With labels in a smooth loss, probabilities of exactly one would be infinitely wrong.
_TINY = 1e-7
_SEARCHING: tuple[PartName, ...] = ("repair", "search", "validation")

ATTACK_SUCCESS, CONFUSION, EXCESS = "attack success rate", "clean confusion rate", "excess attack success"


class Backdoor(Property):
    """A hidden trigger leads to a target class, or from each class to another one.

    Attributes:
        target: the one class that it leads to; None where that depends on the true class.
        leads_to: [classes] the class that it leads samples of each class to; a class that is not attacked to itself.
        reproduced: the share of the given samples' attack success that the best static trigger reproduces, stamped on
            clean samples; None where none had to be estimated, or the original answers no given sample wrongly.
    """

    kind = "backdoor"
    transplantable = True

    def __init__(
        self,
        spec: BackdoorSpec,
        classes: int,
        evidence: dict[PartName, Evidence],
        notes: Sequence[str],
        reproduced: float | None = None,
    ) -> None:
        """Wrap prepared evidence; use `prepare` to make it from files."""
        self.name = spec.name
        self.target = spec.target if isinstance(spec.target, int) else None
        self.leads_to = targets_of(spec, classes)
        self.max_rate: float = spec.max_rate
        self.notes = tuple(notes)
        self.reproduced = reproduced
        self._evidence = evidence

    def evidence(self, part: PartName) -> Evidence:
        """Return the triggered samples of a part whose true class is attacked."""
        return self._evidence[part]

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return which samples are answered with what the trigger leads them to."""
        return scores.argmax(axis=-1) == wrong_answers(self.leads_to, samples)

    def relevant(self, clean: Dataset) -> Array:
        """Return the clean samples of attacked classes: those answered like triggered ones are the confusion rate."""
        return attacked(self.leads_to, clean)

    def observed(self, clean: Dataset, bad: Dataset) -> Dataset:
        """Return the clean samples: the question is what drives them to the target."""
        # A single target is asked about over all samples, but a class that is not attacked has no target of its own.
        return clean if self.target is not None else clean.take(self.relevant(clean))

    def response(self, scores: Array, samples: Dataset) -> Array:
        """Return the probability of what the trigger leads to."""
        return _at(softmax(scores), wrong_answers(self.leads_to, samples))

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return the score of what the trigger leads to above the highest other one."""
        wrong = wrong_answers(self.leads_to, samples)
        others = np.where(_one_hot(wrong, scores.shape[-1]), -np.inf, scores)
        return _at(scores, wrong) - others.max(axis=-1)

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return KL from the original's answer on the twin, or -log(1 - p) of the wrong answer without twins.

        True labels as goal would push the target class down: its recall pays for it.
        """
        log_probs = log_softmax(scores)
        if goal is not None:
            return divergence(goal, log_probs)
        wrong = np.exp(_at(log_probs, wrong_answers(self.leads_to, samples)))
        return -np.log(np.maximum(1 - wrong, _TINY)).mean(axis=-1)

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return the gradient of the loss with respect to the scores."""
        log_probs = log_softmax(scores)
        if goal is not None:
            return divergence_gradient(goal, log_probs)
        p = np.exp(log_probs)
        answers = wrong_answers(self.leads_to, samples)
        wrong = _at(p, answers)
        # d p_wrong / d scores = p_wrong (onehot - p)
        slope = wrong / np.maximum(1 - wrong, _TINY) / len(p)
        return slope[:, None] * (_one_hot(answers, p.shape[1]) - p)

    def measure(self, court: Court) -> Finding:
        """Return attack success, confusion, their difference, and how many true answers came back."""
        bad = self.evidence("holdout").bad
        relevant = self.relevant(court.clean)
        hits = [self.misbehaves(item.scores(bad.inputs), bad) for item in court.witnesses]
        confused = [self.misbehaves(item.scores(court.clean.inputs), court.clean)[relevant] for item in court.witnesses]
        gauge = court.gauge
        success = gauge.rate(ATTACK_SUCCESS, hits[-1], *hits[:-1])
        confusion = gauge.rate(CONFUSION, confused[-1], *confused[:-1])
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


def targets_of(spec: BackdoorSpec, classes: int) -> Array:
    """Return the class that a trigger leads samples of each class to, [classes].

    A class that is not attacked, such as a single target itself, is led to itself.
    """
    assert spec.target is not None
    if isinstance(spec.target, int):
        return np.full(classes, spec.target)
    found = np.arange(classes)
    found[list(spec.target)] = list(spec.target.values())
    return found


def wrong_answers(leads_to: Array, samples: Dataset) -> Array:
    """Return the class that the trigger leads each sample to, [samples]; without labels there is one for all."""
    if samples.labels is None:
        return np.broadcast_to(leads_to[0], len(samples))
    return leads_to[samples.labels]


def attacked(leads_to: Array, samples: Dataset) -> Array:
    """Return which labelled samples the trigger leads away from their class, [samples] bool."""
    return wrong_answers(leads_to, samples) != samples.truth


def _at(values: Array, classes: Array) -> Array:
    """Return each row's value of its class, [..., rows, classes] -> [..., rows]."""
    return values[..., np.arange(len(classes)), classes]


def _one_hot(classes: Array, count: int) -> Array:
    return np.arange(count) == classes[:, None]


def check(spec: BackdoorSpec, signatures: Sequence[Signature], classes: int) -> None:
    """Make sure that the model can have such a backdoor.

    Raises:
        SpecError: a target is not a class, or the model has several inputs, and a trigger is to be known or found.
    """
    named = [*spec.target, *spec.target.values()] if isinstance(spec.target, dict) else [spec.target]
    for label in named:
        if label is not None and label >= classes:
            raise SpecError(f"properties.{spec.name}.target: {label} is not a class; the model has 0 to {classes - 1}")
    if len(signatures) != 1 and spec.twins is None:
        names = ", ".join(signature.name for signature in signatures)
        raise SpecError(
            f"properties.{spec.name}: triggers need a model with one input, not {names}; give triggered samples with "
            "their twins instead"
        )


def prepare(
    spec: BackdoorSpec,
    splits: Splits,
    signatures: Sequence[Signature],
    classes: int,
    predict: Predict,
    labels: str,
    seed: int,
    bounds: Range | None = None,
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
        bounds: the range of inputs; where there is none, it is that of the data.

    Raises:
        DataError: a file does not fit.
    """
    # Where there are several inputs, there are twins, and nothing is stamped.
    name = signatures[0].name
    leads_to = targets_of(spec, classes)
    clean = splits.repair.inputs[name]
    if spec.trigger is not None:
        trigger = load_trigger(spec.trigger, signatures[0], bounds or _range(clean))
        stamped = {part: stamp(trigger, splits.part(part), leads_to, name) for part in PARTS}
        need_samples(spec, stamped)
        return Backdoor(spec, classes, stamped, ())

    def read(path: Path) -> Dataset:
        found = load_dataset(path, signatures, labels)
        if found.labels is not None:
            check_labels(found, classes, str(path))
        return found

    assert spec.triggered is not None
    given = Evidence(read(spec.triggered), None)
    if spec.twins is not None:
        given = _paired(given.bad, read(spec.twins), spec.triggered, spec.twins)
    given = _usable(spec, given, spec.triggered, leads_to)
    evidence: dict[PartName, Evidence] = {}
    if spec.triggered_holdout is not None:
        holdout = Evidence(read(spec.triggered_holdout), None)
        evidence["holdout"] = _usable(spec, holdout, spec.triggered_holdout, leads_to)
    else:
        if len(given.bad) < 5:
            raise DataError(f"{spec.triggered}: {len(given.bad)} triggered samples; at least 5 are needed")
        given, evidence["holdout"] = _split_rows(given, [0.7, 0.3], seed)
    notes = []
    if given.bad.labels is None:
        notes.append("Triggered samples have no labels: all are counted as if their true class were another one.")
    found = None
    if given.twins is None:
        values = bounds or _range(clean, given.bad.inputs[name])
        found = _estimate(given.bad, splits.repair, name, leads_to, values, predict)
        notes.append(found.note)
    for part, rows in zip(_SEARCHING, _split_rows(given, [0.5, 0.2, 0.3], seed), strict=True):
        static = None if found is None else found.trigger
        evidence[part] = rows if static is None else stamp(static, splits.part(part), leads_to, name)
    need_samples(spec, evidence)
    return Backdoor(spec, classes, evidence, notes, None if found is None else found.reproduced)


def _range(*values: Array) -> Range:
    return min(item.min() for item in values), max(item.max() for item in values)


def _paired(bad: Dataset, twins: Dataset, path: Path, beside: Path) -> Evidence:
    """Make sure that two files hold the same samples with and without the trigger, as far as can be seen."""
    if len(bad) != len(twins):
        raise DataError(f"{beside}: {len(twins)} samples, but {path} holds {len(bad)}; twins stand row by row")
    if bad.labels is not None and twins.labels is not None and (differs := bad.labels != twins.labels).any():
        row = int(differs.argmax())
        raise DataError(
            f"{beside}: the label of sample {row} is {twins.labels[row]}, in {path} {bad.labels[row]}; twins are the "
            "same samples row by row, and labels are the true ones"
        )
    if all(np.array_equal(values, twins.inputs[name]) for name, values in bad.inputs.items()):
        raise DataError(f"{beside}: the same samples as in {path}, so the trigger changes nothing")
    labels = twins.labels if bad.labels is None else bad.labels
    return Evidence(replace(bad, labels=labels), replace(twins, labels=labels))


def _usable(spec: BackdoorSpec, given: Evidence, path: Path, leads_to: Array) -> Evidence:
    """Leave out samples of classes that are not attacked."""
    if given.bad.labels is None:
        if isinstance(spec.target, dict):
            raise DataError(f"{path}: holds no labels, on which it depends where the trigger of {spec.name!r} leads")
        return given
    rows = np.flatnonzero(attacked(leads_to, given.bad))
    if not rows.size:
        why = f"the target {spec.target}" if isinstance(spec.target, int) else "one that target does not name"
        raise DataError(f"{path}: every sample's true class is {why}")
    return _take(given, rows)


@dataclass(frozen=True)
class _Estimate:
    """What came of looking for a static trigger.

    Attributes:
        trigger: the closest one that reproduces the attack, or None.
        reproduced: the share of the attack success that is reproduced, by it or by the best one; None of nothing.
        note: the same in words.
    """

    trigger: Static | None
    reproduced: float | None
    note: str


def _estimate(
    triggered: Dataset, clean: Dataset, name: str, leads_to: Array, values: Range, predict: Predict
) -> _Estimate:
    observed = _success(predict, triggered, leads_to)
    best = 0.0
    for trigger in estimate_triggers(triggered, clean, name, values):
        stamped = stamp(trigger, clean, leads_to, name).bad
        success = _success(predict, stamped, leads_to) if len(stamped) else 0.0
        best = max(best, success)
        if success and success >= _REPRODUCED * observed:
            article = "an" if isinstance(trigger, Added) else "a"
            note = (
                f"The trigger was estimated from {len(triggered)} triggered samples as {article} {trigger.source} of "
                f"{trigger.size} values; stamped on clean samples it reaches {success:.1%} attack success, the given "
                f"ones {observed:.1%}."
            )
            return _Estimate(trigger, min(1.0, success / observed) if observed else None, note)
    reproduced = best / observed if observed else None
    share = "" if reproduced is None else f" (the best one reproduces {reproduced:.0%} of their attack success)"
    note = (
        f"No static trigger explains the triggered samples{share}; the repair rests on their mean shift alone, so "
        "confidence is low."
    )
    return _Estimate(None, reproduced, note)


def _success(predict: Predict, triggered: Dataset, leads_to: Array) -> float:
    return float((predict(triggered.inputs).argmax(axis=-1) == wrong_answers(leads_to, triggered)).mean())


def _split_rows(given: Evidence, shares: list[float], seed: int) -> list[Evidence]:
    """Split without regard to classes: there may be only a few samples of each."""
    parts = split(Dataset({"row": np.arange(len(given.bad))}, None), shares, seed)
    return [_take(given, part.inputs["row"]) for part in parts]


def _take(given: Evidence, rows: Array) -> Evidence:
    return Evidence(given.bad.take(rows), None if given.twins is None else given.twins.take(rows))


def stamp(trigger: Static, clean: Dataset, leads_to: Array, name: str) -> Evidence:
    """Return the clean samples of attacked classes with the trigger on them, and as they were."""
    twins = clean.take(np.flatnonzero(attacked(leads_to, clean)))
    stamped = Dataset({name: trigger.stamp(twins.inputs[name])}, twins.labels)
    return Evidence(stamped, twins)


def need_samples(spec: BackdoorSpec, evidence: dict[PartName, Evidence]) -> None:
    """Make sure that every part has samples that a trigger could mislead.

    Raises:
        DataError: one has none.
    """
    classes = (
        f"the classes {', '.join(map(str, spec.target))}"
        if isinstance(spec.target, dict)
        else f"other classes than {spec.target}"
    )
    for part, found in evidence.items():
        if not len(found.bad):
            raise DataError(f"property {spec.name!r}: no samples of {classes} are left for {part}; give more data")
