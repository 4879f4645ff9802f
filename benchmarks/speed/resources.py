"""Rows about what it takes: share of the machine's peak, memory, and how time grows with the work."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from benchmarks.speed import machine, memory, nets, ours
from benchmarks.speed.measure import Result, Setting
from benchmarks.speed.nets import Twin
from onnxcare.experiment import Experiment
from onnxcare.graph.sites import Site
from onnxcare.sweep import spread_units

GIB = 1 << 30
TURNS, GROWN = 3, 4


def peak_share(setting: Setting) -> list[Result]:
    """Multiply-adds a second of the parts behind all cuts, against those of a large product of matrices."""
    twin = nets.make(setting, "peak", nets.large_cnn(setting.padding, setting.quick), nets.IMAGE)
    members, samples = setting.pick(8, 2), setting.pick(128, 8)
    sites = twin.experiment.sites
    operations = np.array([2.0 * _multiply_adds(twin.experiment, site) * members * samples for site in sites])
    families = [_family(twin, site, members, samples) for site in sites]
    for family in families:
        family()
    rates, peaks = [], []
    for _ in range(TURNS):
        rates.append(operations / [_seconds(family) for family in families])
        peaks.append(machine.peak(setting))
        taken = operations / rates[-1]
        setting.say(f"peak-share: {operations.sum() / taken.sum() / 1e9:.1f} of {peaks[-1] / 1e9:.1f} GFLOP/s")
    shares = [operations.sum() / (operations / rate).sum() / peak for rate, peak in zip(rates, peaks, strict=True)]
    by_site = np.median(np.array(rates) / np.array(peaks)[:, None], axis=0)
    return [
        Result(
            name="peak-share",
            what=f"suffixes of the CNN ({setting.padding}): {members} members x {samples} samples at every site",
            against="the fastest product of two large float32 matrices here",
            value=100 * float(np.median(shares)),
            unit="%",
            goal=60,
            details={
                "peak GFLOP/s": round(float(np.median(peaks)) / 1e9, 1),
                "GFLOP": round(operations.sum() / 1e9, 1),
                "% by site": [round(100 * share, 1) for share in by_site.tolist()],
                "turns": TURNS,
            },
        )
    ]


def _multiply_adds(experiment: Experiment, site: Site) -> int:
    """Return the multiply-adds of all layers behind a site of a chain, for one sample."""
    first = min(layer.node for layer in site.readers)
    layers = [layer for layer in experiment.layers if layer.node >= first]
    outputs = experiment.tensors([layer.output for layer in layers], experiment.probe)
    return sum(layer.features * values[0].size for layer, values in zip(layers, outputs, strict=True))


def _family(twin: Twin, site: Site, members: int, samples: int) -> Callable[[], object]:
    """Return a run of the suffix behind a site, one unit of every member set to zero."""
    suffix = twin.experiment.suffix(site.tensor, "affine")
    at = suffix.cache(nets.samples(twin.shape, samples, 1).inputs)
    keep = np.ones((members, site.units), at.base.dtype)
    keep[np.arange(members), np.arange(members) % site.units] = 0
    rank = at.base.ndim - 1
    spread = spread_units(keep, site, rank)
    zero = np.zeros_like(spread[:1])
    return lambda: suffix.affine(at, spread, zero)


def _seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def peak_memory(setting: Setting) -> list[Result]:
    """The most memory that `locate` and `fix` hold on a large dense network, each in a process of its own."""
    folder = setting.folder / "large"
    folder.mkdir()
    size = memory.write(folder, setting.pick(3328, 256))
    setting.say(f"memory: model of {size / 1e6:.0f} MB")
    found = []
    for command in ("locate", "fix"):
        arguments = [sys.executable, "-m", memory.__name__, command, str(folder), setting.device, str(setting.patience)]
        child = subprocess.run(arguments, stdout=subprocess.PIPE, text=True, check=True)
        told = json.loads(child.stdout.splitlines()[-1])
        setting.say(f"memory: {command} {told['peak'] / GIB:.2f} GiB in {told['seconds']:.1f} s, {told['outcome']}")
        found.append(
            Result(
                name=f"memory-{command}",
                what=f"largest resident memory of {command}, model of {size / 1e6:.0f} MB",
                against="three times the model, and 1 GiB",
                value=told["peak"] / GIB,
                unit="GiB",
                # What was stopped might have taken more.
                goal=(3 * size + GIB) / GIB if told["finished"] else None,
                ours=told["seconds"],
                details={
                    "outcome": told["outcome"],
                    "before any work, GiB": round(told["idle"] / GIB, 3),
                    "times the model": round(told["peak"] / size, 2),
                },
            )
        )
    return found


def growth(setting: Setting) -> list[Result]:
    """How the time of exact effects grows with units, samples and values: the exponent, by doubling each."""
    few, sizes = setting.pick(64, 8), [2**step for step in range(4)]
    samples, values = setting.pick(128, 64), 16
    series = {
        "units": [(few * size, samples, values) for size in sizes],
        "samples": [(few, samples * size, values) for size in sizes],
        "values": [(few, samples, values * size) for size in sizes],
    }
    return [_growth(setting, name, works) for name, works in series.items()]


def _growth(setting: Setting, name: str, works: list[tuple[int, int, int]]) -> Result:
    runs = []
    for units, samples, values in works:
        twin = _bottleneck(setting, units)
        clean, bad = (nets.samples(twin.shape, samples, seed) for seed in (1, 2))
        site = twin.experiment.sites[0]
        runs.append(functools.partial(ours.effects, twin.experiment, site, clean, bad, ours.probability, values))
    # The first run of each also makes its session; the fastest of the others was disturbed least.
    taken = np.array([[_seconds(run) for run in runs] for _ in range(GROWN + 1)])[1:].min(axis=0)
    sizes = np.array(works, float).prod(axis=1)
    exponent = float(np.polyfit(np.log(sizes), np.log(taken), 1)[0])
    setting.say(f"growth-{name}: exponent {exponent:.3f}; {', '.join(f'{seconds:.3g} s' for seconds in taken)}")
    units, samples, values = works[0]
    return Result(
        name=f"growth-{name}",
        what=f"time of exact effects, {name} doubled {len(works) - 1} times",
        against=f"from {units} units, {samples} samples, {values} values",
        value=exponent,
        unit="exponent",
        goal=1.05,
        details={"seconds": [round(seconds, 4) for seconds in taken.tolist()]},
    )


@functools.cache
def _bottleneck(setting: Setting, units: int) -> Twin:
    """Return a dense net whose first hidden layer is read by few, so that its width hardly changes the work behind."""
    return nets.make(setting, f"bottleneck-{units}", nets.dense(64, [units, 8, 128, 128]), (64,))


ROWS: dict[str, Callable[[Setting], list[Result]]] = {
    "peak-share": peak_share,
    "memory": peak_memory,
    "growth": growth,
}
