"""Measuring two sides in turns, and what a row tells."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from onnxcare.runtime import Device

Array = np.ndarray

REPEATS = 5
# Seconds after which a comparison takes no further turn; a first turn longer than this stays the only one.
LIMIT = 12.0


@dataclass(frozen=True)
class Setting:
    """What all rows go by.

    Attributes:
        device: where both sides run.
        threads: of both sides.
        quick: whether tiny sizes are wanted.
        padding: of the large CNN, `valid` or `alternating`.
        folder: for models and data.
        patience: seconds after which a command is stopped whose memory is measured.
    """

    device: Device
    threads: int
    quick: bool
    padding: str
    folder: Path
    patience: int

    @property
    def on_cuda(self) -> bool:
        """Whether PyTorch runs on a GPU as well."""
        return self.device == "cuda" and torch.cuda.is_available()

    def pick(self, full: int, quick: int) -> int:
        """Return a size."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Tell how far things are."""
        print(text, flush=True)


@dataclass(frozen=True)
class Job:
    """The same piece of work for both sides.

    Attributes:
        ours: onnxcare's side.
        theirs: the other side, which may do a part of it.
        share: tells that part, once both have run.
    """

    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    share: Callable[[], float] = lambda: 1.0


@dataclass(frozen=True)
class Timing:
    """What was measured in turns.

    Attributes:
        ratio: how many times as long the other side took, the median of all turns.
        ours: median of the seconds onnxcare took.
        theirs: median of the seconds the other side took, scaled to all of the work.
        difference: the largest difference between the results of the two sides.
        turns: how many were counted.
    """

    ratio: float
    ours: float
    theirs: float
    difference: float
    turns: int


# Units in which more is better; in the others less is.
_RISING = ("x", "%")


@dataclass(frozen=True)
class Result:
    """One line of the table.

    Attributes:
        name: of the row.
        what: was done.
        against: whom or what.
        value: what came out: a ratio (`x`), or a number in another unit.
        unit: `x`, `%`, `GiB` or `exponent`.
        goal: what the value should reach; None where it is only told.
        ours: seconds onnxcare took.
        theirs: seconds the other side took, or would have taken for all of the work.
        difference: the largest difference between the results of the two sides.
        tolerance: what it may be.
        details: sizes, parts, and whatever else one should know.
    """

    name: str
    what: str
    against: str
    value: float
    unit: str = "x"
    goal: float | None = None
    ours: float | None = None
    theirs: float | None = None
    difference: float | None = None
    tolerance: float | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def timed(cls, timing: Timing, **about: Any) -> Result:
        """Return the line of what two sides took turns at; `about` has the other attributes, or takes their place."""
        measured = {"ours": timing.ours, "theirs": timing.theirs, "difference": timing.difference}
        return cls(value=timing.ratio, **(measured | about))

    @property
    def differs(self) -> bool:
        """Whether the two sides did not compute the same."""
        return self.difference is not None and not self.difference <= (self.tolerance or 0.0)

    @property
    def met(self) -> bool | None:
        """Whether the goal is met, with the same results on both sides."""
        if self.goal is None:
            return None
        good = self.value >= self.goal if self.unit in _RISING else self.value <= self.goal
        return bool(good) and not self.differs

    def as_dict(self) -> dict[str, Any]:
        """Return it for the JSON file."""
        found = asdict(self)
        found["ratio" if self.unit == "x" else "value"] = found.pop("value")
        found["ours_seconds"], found["theirs_seconds"] = found.pop("ours"), found.pop("theirs")
        return found | {"met": self.met}


def compare(
    setting: Setting,
    name: str,
    jobs: Sequence[Job],
    check: Callable[[list[Any], list[Any]], float],
    repeats: int = REPEATS,
) -> Timing:
    """Let two sides take turns at some jobs.

    The first turn shows whether both compute the same and warms both up; it counts only if there is no time for more.

    Args:
        setting: what all rows go by.
        name: what to call the comparison.
        jobs: what is done in a turn, ours and theirs after each other for every job.
        check: returns the largest difference between the results of all jobs, ours and theirs.
        repeats: at most so many turns are counted.
    """
    started = time.monotonic()
    outputs, times = _turn(jobs)
    difference = float(check(*outputs))
    setting.say(f"{name}: largest difference {difference:.2g}; {_pace(times)}")
    turns = []
    while len(turns) < repeats and (time.monotonic() - started < LIMIT):
        turns.append(_turn(jobs)[1])
    turns = turns or [times]
    ours, theirs = np.array(turns).T
    found = Timing(
        float(np.median(theirs / ours)), float(np.median(ours)), float(np.median(theirs)), difference, len(turns)
    )
    setting.say(f"{name}: {found.ratio:.1f} x in {found.turns} turns; {_pace((found.ours, found.theirs))}")
    return found


def _turn(jobs: Iterable[Job]) -> tuple[tuple[list[Any], list[Any]], tuple[float, float]]:
    """Return the results of both sides, and the seconds they took, theirs scaled."""
    results: tuple[list[Any], list[Any]] = [], []
    ours = theirs = 0.0
    for job in jobs:
        started = time.perf_counter()
        results[0].append(job.ours())
        between = time.perf_counter()
        results[1].append(job.theirs())
        ours += between - started
        theirs += (time.perf_counter() - between) / job.share()
    return results, (ours, theirs)


def _pace(times: Sequence[float]) -> str:
    return f"ours {times[0]:.3g} s, theirs {times[1]:.3g} s"


def apart(first: Iterable[Array], second: Iterable[Array]) -> float:
    """Return the largest absolute difference between pairs of arrays."""
    return max(float(np.abs(a - b).max()) for a, b in zip(first, second, strict=True))
