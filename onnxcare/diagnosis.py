"""Why a repair did not get where it should: reasons that were measured, not guessed.

Asked only after the judge has said no. Nothing here looks at held-out data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import numpy as np

from onnxcare.case import Case
from onnxcare.data import Dataset, evenly
from onnxcare.errors import ModelError
from onnxcare.properties.backdoor import Backdoor
from onnxcare.properties.base import Property
from onnxcare.repair.base import Repair

Array = np.ndarray

# A trigger that does not depend on the input explains at least this share of what it changes.
_STATIC = 0.5
# Where an interchange of a whole layer leaves more than this share of the misbehaviour, the layer does not carry it.
_CARRIED = 0.5
_SAMPLES = 200


def reasons(case: Case, found: Repair) -> list[str]:
    """Return what can be measured about why no repair was good enough, in whole sentences."""
    told = [*_contradictions(case)]
    for item in case.properties:
        told += [*_reach(case, item, found), *_input_dependence(item), *_not_carried(case, item)]
    return told


def _reach(case: Case, item: Property, found: Repair) -> Iterator[str]:
    """Say what the best change does to samples that it was fitted on, and to others."""
    if not found.values:
        return
    experiment = case.experiment.patched(found.values)
    rates = []
    for part in ("repair", "validation"):
        bad = item.evidence(part).bad
        if not len(bad):
            return
        rates.append(float(item.rate(experiment.scores(bad.inputs), bad)))
    if item.kind == "errors":
        if item.max_rate is not None and rates[1] > item.max_rate:
            yield (
                f"{item.name}: these errors have no common cause that a change of weights could reach: the best change "
                f"mends {1 - rates[0]:.0%} of the errors it was fitted on and {1 - rates[1]:.0%} of others."
            )
        return
    yield (
        f"{item.name}: the best change leaves {rates[0]:.1%} of the samples it was fitted on misbehaving, and "
        f"{rates[1]:.1%} of others."
    )


def _input_dependence(item: Property) -> Iterator[str]:
    """Say whether the trigger depends on the input, where samples tell."""
    if not isinstance(item, Backdoor):
        return
    if item.reproduced is not None and item.reproduced < _STATIC:
        yield (
            f"{item.name}: the trigger seems to depend on the input: the best fixed one that the samples suggest "
            f"reproduces {item.reproduced:.0%} of their attack success."
        )
    evidence = item.evidence("repair")
    if evidence.twins is None or not len(evidence.bad):
        return
    (name,) = evidence.bad.inputs
    explained = fixed_share(evidence.bad.inputs[name], evidence.twins.inputs[name])
    if explained < _STATIC:
        yield (
            f"{item.name}: the trigger depends on the input: what is the same in all samples explains {explained:.0%} "
            "of what it changes."
        )


def fixed_share(bad: Array, twins: Array) -> float:
    """Return the share of the change from twins to bad samples that a fixed trigger explains.

    A fixed trigger is x' = a * x + b with the same a and b, value by value, in all samples: a patch, a blend, an added
    pattern. The share is that of the squared change.

    Args:
        bad: [samples, ...] with the trigger.
        twins: [samples, ...] without it.
    """
    flat_bad, flat = (values.reshape(len(values), -1).astype(np.float64) for values in (bad, twins))
    change = flat_bad - flat
    centred = flat - flat.mean(axis=0)
    spread = (centred**2).sum(axis=0)
    slope = np.divide((centred * change).sum(axis=0), spread, out=np.zeros_like(spread), where=spread > 0)
    left = change - change.mean(axis=0) - centred * slope
    return float(1 - (left**2).sum() / max((change**2).sum(), 1e-30))


def _not_carried(case: Case, item: Property) -> Iterator[str]:
    """Say if the right answers do not come back at any one place where they could be fetched from the twins."""
    evidence = item.evidence("validation")
    if not item.transplantable or evidence.twins is None or not len(evidence.bad):
        return
    bad, twins = evenly(evidence.bad, _SAMPLES), evenly(evidence.twins, _SAMPLES)
    before = float(item.rate(case.experiment.scores(bad.inputs), bad))
    left: dict[str, float] = {}
    for site in case.experiment.sites:
        try:
            left[site.tensor] = _left(case, item, site.tensor, bad, twins)
        except ModelError:
            continue
    if left and min(left.values()) > _CARRIED * before:
        place = min(left, key=left.__getitem__)
        yield (
            f"{item.name}: no one layer carries it: with all activations of the twins at {place!r}, the best of "
            f"{len(left)} places, {left[place]:.0%} of the samples still misbehave."
        )


def _left(case: Case, item: Property, tensor: str, bad: Dataset, twins: Dataset) -> float:
    """Return the rate with a whole tensor as it is on the twins."""
    suffix = case.experiment.suffix(tensor, "affine")
    at, reference = suffix.cache(bad.inputs), suffix.cache(twins.inputs).base[None]
    keep = np.zeros((1, 1, *[1] * (at.base.ndim - 1)), at.base.dtype)
    return float(item.rate(suffix.affine(at, keep, reference)[0], bad))


def _contradictions(case: Case) -> Iterator[str]:
    """Say if equal samples have different labels: no model answers both as it should."""
    parts = [case.splits.repair, case.splits.search, case.splits.validation]
    seen: dict[bytes, int] = {}
    count = 0
    for part in parts:
        rows = np.concatenate([values.reshape(len(part), -1) for values in part.inputs.values()], axis=1)
        for row, label in zip(rows, part.truth, strict=True):
            count += seen.setdefault(hashlib.blake2b(row.tobytes(), digest_size=16).digest(), int(label)) != label
    if count:
        yield f"The labels contradict each other: {count} samples equal another one that has a different label."
