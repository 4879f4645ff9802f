"""Rows about the effects of units: exact tables, the strongest units, and setting channels to zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from benchmarks.speed import nets, ours, theirs
from benchmarks.speed.measure import Array, Job, Result, Setting, Timing, apart, compare
from benchmarks.speed.nets import Twin
from onnxcare.data import Dataset
from onnxcare.locators.causal import CausalEffects

TOLERANCE = 1e-5
VALUES, TOP, ENOUGH = 16, 10, 9
LOOP = "hook loop in PyTorch, a full forward pass each"


@dataclass(frozen=True)
class Measured:
    """The exact table of a network, as it was measured against the hook loop on a part.

    Attributes:
        twin: the network.
        clean: samples that the effects are averaged over.
        bad: samples that widen the range of values.
        table: the effects at every site.
        loops: what was measured at every site.
        passes: how many of the loop's forward passes that took.
        timing: how long it took.
        details: what was measured, in numbers.
    """

    twin: Twin
    clean: Dataset
    bad: Dataset
    table: list[CausalEffects]
    loops: list[Job]
    passes: list[int]
    timing: Timing
    details: dict[str, int | float]


def _measure(setting: Setting, name: str, twin: Twin, samples: int, part: int) -> Measured:
    """Measure the exact table of a network, the two sides in turns at every site.

    Args:
        setting: what all rows go by.
        name: of the row.
        twin: the network.
        samples: how many the effects are averaged over; as many others widen the range of values.
        part: units of every site that the hook loop does.
    """
    clean, bad = (nets.samples(twin.shape, samples, seed) for seed in (1, 2))
    x = twin.tensor(clean)
    table: dict[int, CausalEffects] = {}

    def chosen(index: int) -> Array:
        live = np.flatnonzero(~table[index].dead)
        return live[np.linspace(0, len(live) - 1, min(part, len(live))).astype(int)]

    def exact(index: int) -> Array:
        site = twin.experiment.sites[index]
        table[index] = ours.effects(twin.experiment, site, clean, bad, ours.probability, VALUES)
        return table[index].effects[chosen(index)]

    def loop(index: int) -> Array:
        units = chosen(index)
        forced = [(int(unit), float(value)) for unit in units for value in table[index].values[unit]]
        means = theirs.hooked_means(twin, twin.places[index], x, forced).reshape(len(units), -1)
        return means - means.mean(axis=1, keepdims=True)

    def share(index: int) -> float:
        return len(chosen(index)) / int((~table[index].dead).sum())

    places = range(len(twin.experiment.sites))
    jobs = [Job(*(functools.partial(side, index) for side in (exact, loop, share))) for index in places]
    timing = compare(setting, name, jobs, apart)
    passes = [VALUES * len(chosen(index)) for index in places]
    details = {
        "units": sum(site.units for site in twin.experiment.sites),
        "values": VALUES,
        "samples": samples,
        "forward passes": VALUES * sum(int((~table[index].dead).sum()) for index in places),
        "of them measured": sum(passes),
        "largest effect": round(max(float(table[index].scores.max()) for index in places), 4),
        "turns": timing.turns,
    }
    return Measured(twin, clean, bad, [table[index] for index in places], jobs, passes, timing, details)


def dense_effects(setting: Setting) -> list[Result]:
    """Exact effects of all hidden units of a dense network."""
    results = []
    # The more a network reads, the more is in front of every cut: digits of 28 x 28, and images of 3 x 32 x 32.
    for inputs in (784, 3072):
        name = f"dense-effects-{inputs}"
        net = nets.dense(inputs, [setting.pick(50, 8)] * 6)
        twin = nets.make(setting, name, net, (inputs,))
        found = _measure(setting, name, twin, setting.pick(1000, 64), part=setting.pick(4, 2))
        results.append(_exact(name, f"exact effects, dense network of {inputs} inputs", found, goal=20))
    return results


@functools.cache
def _large_cnn(setting: Setting) -> Measured:
    twin = nets.make(setting, "cnn", nets.large_cnn(setting.padding, setting.quick), nets.IMAGE)
    return _measure(setting, "cnn-effects", twin, setting.pick(128, 8), part=1)


def cnn_effects(setting: Setting) -> list[Result]:
    """Exact effects of all channels of a network of six convolutions."""
    return [_exact("cnn-effects", f"exact effects, CNN ({setting.padding})", _large_cnn(setting), goal=30)]


def _exact(name: str, what: str, found: Measured, goal: float) -> Result:
    timing = found.timing
    return Result.timed(
        timing,
        name=name,
        what=f"{what}: {found.details['units']} units x {VALUES} values, {found.details['samples']} samples",
        against=LOOP,
        goal=goal,
        tolerance=TOLERANCE,
        details=found.details,
    )


def cnn_top(setting: Setting) -> list[Result]:
    """The strongest units of all channels of that network, which need no exact table."""
    known = _large_cnn(setting)
    exact = ours.exact_top(known.table, TOP)

    def raced() -> list[tuple[str, int]]:
        return ours.raced_top(known.twin.experiment, known.clean, known.bad, ours.probability, TOP, VALUES)

    # A pass takes the same time wherever the unit is, so two sites will do.
    loops = [known.loops[0], known.loops[-1]]

    def loop() -> list[Array]:
        return [job.theirs() for job in loops]

    def missed(found: list[list[tuple[str, int]]], _: object) -> float:
        return len(set(exact) - set(found[0]))

    passes = known.passes[0] + known.passes[-1]
    timing = compare(setting, "cnn-top", [Job(raced, loop, lambda: passes / known.details["forward passes"])], missed)
    return [
        Result.timed(
            timing,
            name="cnn-top",
            what=f"strongest {TOP} of the {known.details['units']} units, {TOP - timing.difference:.0f} of them right",
            against=LOOP,
            goal=300,
            tolerance=TOP - ENOUGH,
            details=known.details
            | {
                "of them measured": passes,
                "turns": timing.turns,
                "difference": f"how many of the strongest {TOP} are missed",
            },
        )
    ]


def zeroing(setting: Setting) -> list[Result]:
    """The effect of setting each channel of a layer to zero, for the last two layers of a small CNN."""
    twin = nets.make(setting, "small", nets.small_cnn(setting.quick), nets.IMAGE)
    data = nets.samples(nets.IMAGE, setting.pick(256, 16), 1)
    rivals: list[tuple[str, Callable[..., Array], float | None]] = [
        ("captum LayerFeatureAblation", theirs.captum_zeroed, 20),
        ("suffix loop in PyTorch", theirs.suffix_zeroed, None),
    ]
    found = []
    for index in (1, 2):
        for against, rival, goal in rivals:
            found.append(_zeroing(setting, twin, index, data, against, rival, goal))
    return found


def _zeroing(
    setting: Setting,
    twin: Twin,
    index: int,
    data: Dataset,
    against: str,
    rival: Callable[..., Array],
    goal: float | None,
) -> Result:
    site, x, target = twin.experiment.sites[index], twin.tensor(data), 0

    def falls() -> Array:
        before = twin.experiment.scores(data.inputs)
        return (before - ours.zeroed(twin.experiment, site, data.inputs))[..., target]

    job = Job(falls, functools.partial(rival, twin, twin.places[index], x, target))
    name = f"zeroing-{site.units}"
    timing = compare(setting, f"{name} against {against}", [job], apart)
    return Result.timed(
        timing,
        name=name,
        what=f"each of {site.units} channels set to zero, {len(data)} images",
        against=against,
        goal=goal,
        tolerance=TOLERANCE,
        details={"turns": timing.turns},
    )


ROWS: dict[str, Callable[[Setting], list[Result]]] = {
    "dense-effects": dense_effects,
    "cnn-effects": cnn_effects,
    "cnn-top": cnn_top,
    "zeroing": zeroing,
}
