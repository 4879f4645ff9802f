"""The backdoor property where nobody knows the trigger, and perhaps not even whether there is one.

Triggers are restored for every class (`inversion`). A class whose trigger is far smaller than those of the others is
the suspected target, and its restored triggers, stamped on clean samples, are the evidence. The judge stamps them on
held-out samples, and looks for small triggers itself, in the judged file, with held-out samples and a seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from onnxcare.data import PARTS, Dataset, PartName, Splits, evenly, joined
from onnxcare.errors import DataError
from onnxcare.experiment import Experiment
from onnxcare.measures import Finding, Measure
from onnxcare.properties.backdoor import Backdoor, attacked, need_samples, stamp
from onnxcare.properties.base import Array, Evidence, Property
from onnxcare.properties.inversion import FEWEST_CLASSES, Scan, Suspect, reinforced, scan, smallest_patch, stand_out
from onnxcare.properties.trigger import Trigger
from onnxcare.properties.trigger_search import Bounds
from onnxcare.spec import BackdoorSpec

if TYPE_CHECKING:
    from onnxcare.judge import Court

# More samples do not restore better triggers.
_SAMPLES = 1000
SMALL_TRIGGERS = "classes that a suspiciously small trigger leads to"


@dataclass(frozen=True)
class _Search:
    """How triggers are looked for, in the model at first, in candidates and in the judged file later.

    Attributes:
        target: the class that is suspected by the user, or None.
        bounds: see `inversion.scan`.
        splits: the clean data.
        seed: fixes starts and batches.
    """

    target: int | None
    bounds: Bounds | None
    splits: Splits
    seed: int

    @property
    def clean(self) -> Dataset:
        """The samples that triggers are restored on."""
        return evenly(joined(self.splits.repair, self.splits.search), _SAMPLES)

    def suspects(self, found: Scan) -> list[Suspect]:
        """Return the classes that stand out, of those that are asked about."""
        return [item for item in found.suspects if self.target in (None, item.target)]

    def measure(self, court: Court, before: int) -> tuple[Measure, list[str]]:
        """Look for small triggers in the judged file; return what was found and what should be said about it."""
        witness = court.after
        clean = evenly(court.clean, _SAMPLES)
        experiment = Experiment(
            witness.model, witness.device, court.memory, clean.inputs, witness.output, witness.decision
        )
        suspects = self.suspects(scan(experiment, clean, court.seed, bounds=self.bounds))
        count = float(len(suspects))
        return (
            court.gauge.points(
                SMALL_TRIGGERS,
                count,
                None if court.before is None else float(before),
                limit=0.0,
                interval=(count, count),
                unit="number",
            ),
            [f"A fresh search found that {describe(item)}." for item in suspects],
        )


class RestoredBackdoor(Backdoor):
    """A backdoor that was found by restoring its trigger.

    Attributes:
        suspect: the class, and the restored triggers.
    """

    stand_in = True

    def __init__(self, spec: BackdoorSpec, suspect: Suspect, found: Scan, search: _Search) -> None:
        """Stamp the restored triggers on the clean samples of every part.

        Args:
            spec: the property with its target.
            suspect: what was found out about it.
            found: the scan that this is from.
            search: how it was looked for.

        Raises:
            DataError: a part has no samples of other classes.
        """
        told = describe(suspect)
        notes = (
            f"{told[0].upper()}{told[1:]}.",
            "The true trigger was not available: attack success is that of the restored one.",
            *_without_gradient(found),
        )
        super().__init__(spec, len(found.patches), {}, notes)
        self.suspect = suspect
        self._found, self._search, self._hunts = found, search, 0
        self._stamp()
        need_samples(spec, self._evidence)

    def _stamp(self) -> None:
        """Stamp what was restored on held-out samples, and on others what is stronger as well, each sample once."""
        known, search = self.suspect.triggers, self._search
        (values,) = search.clean.inputs.values()
        stronger = reinforced(known, values, search.bounds)
        for part in PARTS:
            clean = search.splits.part(part)
            if part == "holdout":
                self._evidence[part] = _stamped(known, clean, self.leads_to)
            else:
                self._evidence[part] = _in_turn(stronger, clean, self.leads_to)

    def hunt(self, experiment: Experiment) -> int:
        """Restore the target's patch again: a candidate may have closed one short cut and left another."""
        self._hunts += 1
        seed = self._search.seed + self._hunts
        again = smallest_patch(experiment, self._search.clean, self.suspect.target, seed, self._search.bounds)
        patches = [again if item.target == again.target else item for item in self._found.patches]
        if again.trigger is None or again not in stand_out(patches)[0]:
            return 0
        self.suspect = replace(self.suspect, triggers=(*self.suspect.triggers, again.trigger))
        self._stamp()
        return 1

    def measure(self, court: Court) -> Finding:
        """Return what a known trigger's finding says, for the restored ones, and what a fresh search finds."""
        found = super().measure(court)
        measure, notes = self._search.measure(court, before=1)
        return replace(found, measures=(*found.measures, measure), notes=(*found.notes, *notes))


class NoBackdoor(Property):
    """No class is reached by a suspiciously small trigger: there is no evidence, and nothing to repair."""

    kind = "backdoor"

    def __init__(self, spec: BackdoorSpec, nothing: Dataset, notes: Sequence[str], search: _Search) -> None:
        """Say that nothing was found.

        Args:
            spec: the property as the user wrote it.
            nothing: a data set without samples.
            notes: what was looked at.
            search: how it was looked for.
        """
        self.name = spec.name
        self.max_rate = None
        self.notes = tuple(notes)
        self._nothing = nothing
        self._search = search

    def evidence(self, part: PartName) -> Evidence:
        """Return no samples."""
        return Evidence(self._nothing, None)

    def misbehaves(self, scores: Array, samples: Dataset) -> Array:
        """Return that none does."""
        return np.zeros(scores.shape[:-1], bool)

    def margin(self, scores: Array, samples: Dataset) -> Array:
        """Return that none is on the wrong side."""
        return np.zeros(scores.shape[:-1])

    def loss(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return zero."""
        return np.zeros(scores.shape[:-2])

    def loss_gradient(self, scores: Array, samples: Dataset, goal: Array | None) -> Array:
        """Return zero."""
        return np.zeros(scores.shape)

    def measure(self, court: Court) -> Finding:
        """Return what a fresh search finds."""
        measure, notes = self._search.measure(court, before=0)
        return Finding(self.name, self.kind, (measure,), (*self.notes, *notes))


def prepare(
    spec: BackdoorSpec,
    splits: Splits,
    experiment: Experiment,
    bounds: Bounds | None,
    seed: int,
    progress: Callable[[str], None],
) -> list[Property]:
    """Restore triggers, and return a property for every class that stands out, or one that says that none does.

    Raises:
        DataError: the model's input holds no real numbers, or it has too few classes to compare.
    """
    if experiment.classes < FEWEST_CLASSES:
        raise DataError(
            f"property {spec.name!r}: an unknown trigger is found by comparing classes, at least {FEWEST_CLASSES}, and "
            f"{experiment.model.path} has {experiment.classes}; give a trigger, or triggered samples"
        )
    assert not isinstance(spec.target, dict)
    search = _Search(spec.target, bounds, splits, seed)
    found = scan(experiment, search.clean, seed, progress, bounds)
    suspects = search.suspects(found)
    if not suspects:
        return [NoBackdoor(spec, splits.repair.take(slice(0, 0)), [_nothing(found), *_without_gradient(found)], search)]
    several = len(suspects) > 1
    properties: list[Property] = []
    for suspect in suspects:
        name = f"{spec.name}: class {suspect.target}" if several else spec.name
        known = spec.model_copy(update={"name": name, "target": suspect.target})
        properties.append(RestoredBackdoor(known, suspect, found, search))
    return properties


def describe(suspect: Suspect) -> str:
    """Say which class is suspected, and why."""
    trigger = suspect.triggers[0]
    return (
        f"class {suspect.target} is the suspected target of a hidden trigger: a {trigger.source} over "
        f"{trigger.mask.mean():.2%} of the input leads to it, {suspect.ratio:.0%} of what other classes need (outlier "
        f"index {suspect.index:.1f}, confidence {suspect.confidence:.1%})"
    )


def _nothing(found: Scan) -> str:
    patch, standing = found.nearest()
    return (
        f"No backdoor was found: no class stands out by a small trigger. The nearest is class {patch.target}, with a "
        f"patch of {standing.ratio:.0%} of what other classes need (outlier index {standing.index:.1f})."
    )


def _without_gradient(found: Scan) -> list[str]:
    if found.hindrance is None:
        return []
    return [f"There is no gradient ({found.hindrance}): triggers were searched by CMA-ES, which sees large ones only."]


def _stamped(triggers: Sequence[Trigger], clean: Dataset, leads_to: Array) -> Evidence:
    """Return the samples with every trigger on them, one after the other, and their twins."""
    (name,) = clean.inputs
    return _joined([stamp(trigger, clean, leads_to, name) for trigger in triggers])


def _in_turn(triggers: Sequence[Trigger], clean: Dataset, leads_to: Array) -> Evidence:
    """Return the samples with one of the triggers each, in turn, and their twins."""
    (name,) = clean.inputs
    usable = clean.take(np.flatnonzero(attacked(leads_to, clean)))
    shares = [usable.take(np.arange(len(usable))[index :: len(triggers)]) for index in range(len(triggers))]
    return _joined([stamp(*pair, leads_to, name) for pair in zip(triggers, shares, strict=True)])


def _joined(parts: Sequence[Evidence]) -> Evidence:
    bad, twins = parts[0].bad, parts[0].twins
    for part in parts[1:]:
        assert twins is not None and part.twins is not None
        bad, twins = joined(bad, part.bad), joined(twins, part.twins)
    return Evidence(bad, twins)
