"""Restoring triggers that nobody has seen, from clean samples and the model's gradients.

A backdoor is a short cut: the trigger of its target is far smaller than that of any other class. So the smallest
trigger of every class is searched (`trigger_search`), after Neural Cleanse (Wang et al., S&P 2019), and those are
compared.

Two forms differ in the shape of the mask m alone. A *patch* has a value for every position, shared by the channels; it
tells which classes are suspected. A *blend* has one value for the whole input. A pattern that was blended over
everything comes back as a patch of a few pixels, which gives the class away and is not the trigger; so for a suspected
class a blend is restored as well, and belongs to the evidence where it is far smaller than those of a few other
classes. By itself it is none: networks with normalisation answer faint grey over anything with one class, and nobody
planted that. The smallest patch is not the true trigger either, and a repair may remove the one and leave the other; so
the patch of a suspected class is restored from other starts as well.

Sizes s_t = mean(m_t) of ordinary classes differ by factors, so they are compared by their logarithms. The k smallest
are suspected, for the k <= classes / 3 with the widest gap to the next one, if at least four are left, the gap is wider
than a factor 2 k, and

    index_t = (median of log s over the rest - log s_t) / sqrt((prior^2 + spread^2) / 2)  >  3

where the spread is 1.4826 times the median deviation of those of the rest that lie below its median: classes that
are hard to reach are no measure of how easy one may be. The prior goes in because a few classes may agree by chance.
Neural Cleanse compares sizes themselves, by median and MAD over all classes, which misses and flags more among ten.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.special

from onnxcare.backward import input_gradients
from onnxcare.data import Dataset
from onnxcare.errors import DataError
from onnxcare.experiment import Experiment
from onnxcare.graph.gradients import NoGradient
from onnxcare.properties.trigger import Trigger
from onnxcare.properties.trigger_search import FORMS, Blind, Bounds, Descent, Form, Goal, Restored, Search

Array = np.ndarray

# So many steps for every class, and as many more for the smallest triggers.
_STEPS, _FURTHER = 100, 3
# By how much the logarithms of trigger sizes of ordinary classes differ, however equal a few of them may seem.
_PRIOR = 0.5
_GAP, _SUSPICIOUS = 2.0, 3.0
# Fewer of the rest than this tell nothing about how sizes of ordinary classes differ.
_FEWEST = 4
# So one class of so many may stand out.
FEWEST_CLASSES = _FEWEST + 1
# The patch of a suspected class is restored so many times more; those that are nearly as small are evidence as well.
_AGAIN, _ALIKE = 2, 2.0
# A blend is compared with those of so many other classes; it has to be smaller than this share of the smallest.
_COMPARED, _FAR_SMALLER = 3, 0.5
# What is fainter than this in a restored mask is left out of an opaque one.
_FAINT = 0.2
# Nothing is known about the far tails of trigger sizes.
_SUREST = 0.999


@dataclass(frozen=True)
class Suspect:
    """A class to which a trigger leads that is far smaller than those of other classes.

    Attributes:
        target: the class.
        triggers: the restored triggers that give it away, the smallest patch first.
        index: the outlier index of the patch.
        confidence: probability that ordinary classes show no such outlier, if the logarithms of sizes were normal.
        ratio: the size of the patch in terms of the median size of the other classes.
    """

    target: int
    triggers: tuple[Trigger, ...]
    index: float
    confidence: float
    ratio: float


@dataclass(frozen=True)
class Standing:
    """How small the patch of a class is beside those of others: outlier index, and size in terms of their median."""

    index: float
    ratio: float


@dataclass(frozen=True)
class Scan:
    """What was found in a model.

    Attributes:
        patches: the smallest patch of every class.
        suspects: the classes that stand out, the most suspicious one first.
        hindrance: why triggers were searched without a gradient; None where there was one.
    """

    patches: Sequence[Restored]
    suspects: Sequence[Suspect]
    hindrance: str | None = None

    def nearest(self) -> tuple[Restored, Standing]:
        """Return the class with the smallest patch, and how it stands beside all others."""
        smallest = min(self.patches, key=lambda item: item.size)
        return smallest, _standing(smallest, [item for item in self.patches if item is not smallest])


def scan(
    experiment: Experiment,
    clean: Dataset,
    seed: int,
    progress: Callable[[str], None] = lambda text: None,
    bounds: Bounds | None = None,
) -> Scan:
    """Restore the smallest patch of every class, and blends of those that stand out.

    Args:
        experiment: the model.
        clean: labelled samples; those of a class itself are left out of the search for its trigger.
        seed: fixes starts and batches.
        progress: told in a few words what is being done.
        bounds: what a trigger may hold; None takes the range of the data.

    Raises:
        DataError: the input does not hold real numbers, or all samples are of one class.
    """
    search, hindrance = _opened(experiment, clean, seed, bounds)
    searches = []
    for target in range(experiment.classes):
        progress(f"restoring triggers: class {target} of {experiment.classes}")
        searches.append(search(target, "patch"))
    for item in sorted(searches, key=lambda item: item.best.size)[:_FURTHER]:
        item.run(_STEPS)
    patches = [item.best for item in searches]
    suspected, rest = stand_out(patches)
    others = [item.target for item in rest][:: max(1, len(rest) // _COMPARED)][:_COMPARED]
    blends = {target: search(target, "blend").best for target in others} if suspected else {}
    suspects = []
    for patch in suspected:
        progress(f"restoring a blend of class {patch.target}")
        assert patch.trigger is not None
        again = [search(patch.target, "patch", attempt).best for attempt in range(1, _AGAIN + 1)]
        blend = search(patch.target, "blend").best
        telling = blend.size < _FAR_SMALLER * min(item.size for item in blends.values())
        chosen = [*(item for item in again if item.size < _ALIKE * patch.size), *([blend] if telling else [])]
        triggers = (patch.trigger, *(item.trigger for item in chosen if item.trigger is not None))
        standing = _standing(patch, rest)
        chance = experiment.classes * float(scipy.special.ndtr(-standing.index))
        confidence = float(np.clip(1 - chance, 0, _SUREST))
        suspects.append(Suspect(patch.target, triggers, standing.index, confidence, standing.ratio))
    return Scan(patches, sorted(suspects, key=lambda suspect: -suspect.index), hindrance)


def reinforced(triggers: Sequence[Trigger], values: Array, bounds: Bounds | None = None) -> list[Trigger]:
    """Return the triggers, and what is nearer to the true one than they are, because it is stronger.

    A restored patch is as faint and small as will just do. So each is also made opaque, with its values at the ends of
    the range; and, as several patches of one class are views of one trigger, all of them are put together as well.

    Args:
        triggers: restored triggers of one class.
        values: clean inputs, whose range counts where there are no bounds.
        bounds: what a trigger may hold.
    """
    low, high = bounds if bounds is not None else _range(values)
    patches = [item for item in triggers if item.source == "restored patch"]
    opaque = [_opaque(item, low, high) for item in patches]
    together = [_together(patches, opaque)] if len(opaque) > 1 else []
    return [*triggers, *opaque, *together]


def _opaque(trigger: Trigger, low: Array, high: Array) -> Trigger:
    mask = (trigger.mask > _FAINT).astype(trigger.mask.dtype)
    pattern = np.where(trigger.pattern > (low + high) / 2, high, low).astype(trigger.pattern.dtype)
    return Trigger(mask, pattern, "opaque patch")


def _together(patches: Sequence[Trigger], opaque: Sequence[Trigger]) -> Trigger:
    """Return opaque patches on top of each other: at every value the one that was least faint."""
    strongest = np.argmax([item.mask for item in patches], axis=0)
    patterns = np.stack([item.pattern for item in opaque])
    pattern = np.take_along_axis(patterns, strongest[None], axis=0)[0]
    mask = np.max([item.mask for item in opaque], axis=0)
    return Trigger(mask, pattern, "patches together")


def smallest_patch(
    experiment: Experiment, clean: Dataset, target: int, seed: int, bounds: Bounds | None = None
) -> Restored:
    """Return the smallest patch of one class, searched as long as the smallest ones of a scan are; see `scan`."""
    found = _opened(experiment, clean, seed, bounds)[0](target, "patch")
    found.run(_STEPS)
    return found.best


def _opened(
    experiment: Experiment, clean: Dataset, seed: int, bounds: Bounds | None
) -> tuple[Callable[..., Search], str | None]:
    """Return what carries out the first steps of a search for a class and form, and why there is no gradient, if so."""
    ((name, values),) = clean.inputs.items()
    if not np.issubdtype(values.dtype, np.floating):
        raise DataError(f"input {name!r} holds {values.dtype}: triggers can only be restored for real numbers")
    if len(np.unique(clean.truth)) < 2:
        raise DataError("all samples are of one class; to restore triggers, samples of others are needed")
    within = bounds if bounds is not None else _range(values)
    gradients, hindrance = None, None
    try:
        gradients = input_gradients(experiment)
    except NoGradient as error:
        hindrance = error.why

    def search(target: int, form: Form, attempt: int = 0) -> Search:
        rng = np.random.default_rng([seed, target, FORMS.index(form), attempt])
        goal = Goal(experiment, clean.take(np.flatnonzero(clean.truth != target)), target, form, within)
        found: Search = Blind(goal, rng) if gradients is None else Descent(goal, gradients, rng)
        found.run(_STEPS)
        return found

    return search, hindrance


def stand_out(patches: Sequence[Restored]) -> tuple[list[Restored], list[Restored]]:
    """Return the patches that are suspiciously small, and the rest; see the module's docstring for the rule."""
    order = sorted(patches, key=lambda item: item.size)
    most = min(len(order) // 3, len(order) - _FEWEST)
    if most < 1:
        return [], order
    gaps = {k: order[k].size / order[k - 1].size / k for k in range(1, most + 1)}
    k = max(gaps, key=lambda k: gaps[k])
    few, rest = order[:k], order[k:]
    if gaps[k] <= _GAP or any(_standing(item, rest).index <= _SUSPICIOUS for item in few):
        return [], order
    return few, rest


def _standing(item: Restored, rest: Sequence[Restored]) -> Standing:
    logarithms = np.log([other.size for other in rest])
    median = float(np.median(logarithms))
    below = 1.4826 * float(np.median(median - logarithms[logarithms <= median]))
    spread = float(np.hypot(_PRIOR, below)) / np.sqrt(2)
    return Standing(float((median - np.log(item.size)) / spread), item.size / float(np.exp(median)))


def _range(values: Array) -> Bounds:
    """Return lowest and highest values of an input.

    A pixel that is black in all the data may be white in a trigger, so all values share one range; columns of a table
    that are measured on scales of their own do not.
    """
    low, high = values.min(axis=0), values.max(axis=0)
    whole = float(high.max() - low.min())
    varying = (high - low)[high > low]
    if values.ndim == 2 and varying.size and np.median(varying) < whole / 2:
        return low, high
    return np.full_like(low, low.min()), np.full_like(high, high.max())
