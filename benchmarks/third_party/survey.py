"""The steps that are taken with one model, and what each one found.

    python -m benchmarks.third_party.survey NAME CACHE

takes them with a model of the catalogue and prints a line of JSON for each, so that what was found before a crash, or
before patience ran out, is not lost.
"""

from __future__ import annotations

import collections
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import onnxcare
from benchmarks.speed.memory import peak
from benchmarks.third_party.by_hand import ByHand
from benchmarks.third_party.catalogue import SUBJECTS, Subject
from onnxcare.decision import Decision
from onnxcare.errors import ModelError, OnnxcareError
from onnxcare.experiment import Experiment
from onnxcare.graph import surgery
from onnxcare.graph.layers import find_layers
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.sites import Site, find_sites
from onnxcare.graph.view import GraphView
from onnxcare.runtime import Session
from onnxcare.suffix import Activations, crossing, crossing_shapes

Array = np.ndarray
Facts = dict[str, Any]

TOLERANCE = 1e-5
SEED = 1
# So many units of a site are forced, one at a time, to so many standard deviations above their mean.
_UNITS, _FAR = 2, 3.0
# The owner's samples, and the share of the least certain answers that are said to be wrong.
_OWNED, _WRONG = 240, 0.25
_MEMORY = 2 << 30


@dataclass(frozen=True)
class Step:
    """What came of a step.

    Attributes:
        name: `load`, `copy`, `intervene`, `experiment`, `locate` or `fix`.
        outcome: `done`; `refused`, by an error that is made for the user; `defect`, where anything else was raised.
        reason: why it was refused, or what was raised and where.
        seconds: how long it took.
        peak: the most bytes that the process has held so far.
        facts: what was found.
    """

    name: str
    outcome: str
    reason: str
    seconds: float
    peak: int
    facts: Facts = field(default_factory=dict)


def steps(path: Path, subject: Subject, folder: Path) -> Iterator[Step]:
    """Take all steps with a model; those after a load that failed are left out."""
    bench = Bench(path, subject)
    places = f"{path}: ", f"{folder}/", f"{path.parent}/"
    for name, function in (
        ("load", bench.load),
        ("copy", bench.copy),
        ("intervene", bench.intervene),
        ("experiment", bench.experiment),
        ("locate", lambda: owner(bench, folder, "locate")),
        ("fix", lambda: owner(bench, folder, "fix")),
    ):
        step = taken(name, function, places)
        yield step
        if name == "load" and step.outcome != "done":
            return


def taken(name: str, function: Callable[[], Facts], places: Sequence[str]) -> Step:
    """Take a step; reasons are told without the folders `places`, which are others everywhere."""
    started = time.monotonic()
    outcome, reason, facts = "done", "", {}
    try:
        facts = function()
    except OnnxcareError as error:
        outcome, reason = "refused", _placeless(str(error), places)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = _placeless(" ".join(str(error).split())[:200], places)
        outcome, reason = "defect", f"{type(error).__name__} in {Path(where.filename).name}:{where.lineno}: {text}"
    if "refusals" in facts:
        facts["refusals"] = {_placeless(reason, places): count for reason, count in facts["refusals"].items()}
    return Step(name, outcome, reason, time.monotonic() - started, peak(), facts)


def _placeless(text: str, places: Sequence[str]) -> str:
    for place in places:
        text = text.replace(place, "")
    return text


class Bench:
    """A model on the bench: everything here goes into onnxcare, below `locate` and `fix`.

    Attributes:
        path: its file.
        subject: what is known about it.
    """

    def __init__(self, path: Path, subject: Subject) -> None:
        """Draw inputs; nothing is loaded yet."""
        self.path, self.subject = path, subject
        self._feeds = subject.draw(np.random.default_rng(SEED), subject.rows)

    def load(self) -> Facts:
        """Load the file, and list layers and sites."""
        self.model: Model = load_model(self.path)
        found = onnxcare.inspect(self.path)
        self._hand = ByHand(self.path, self.subject.axes)
        self._answers = dict(zip(self._hand.outputs, self._hand.answers(self._feeds), strict=True))
        return {
            "nodes": found.nodes,
            "parameters": found.parameters,
            "layers": len(found.layers),
            "open_layers": sum(layer.refusal is None for layer in found.layers),
            "layer_refusals": _counted(layer.refusal for layer in found.layers),
            "sites": len(found.sites),
            "folding_sites": sum(site.refusal is None for site in found.sites),
            "outputs": {name: list(value.shape) for name, value in self._answers.items()},
            "single": self._hand.single,
        }

    def copy(self) -> Facts:
        """Compare the experiment copy with the file, on several samples in one run."""
        self._copy = surgery.experiment_copy(self.model)
        names = list(self._answers)
        copied = self._exposed(names)
        differences = {name: difference(copied[name], self._answers[name]) for name in names}
        return {"rows": self.subject.rows, "difference": max(differences.values()), "differences": differences}

    def _exposed(self, names: list[str]) -> dict[str, Array]:
        """Return tensors as the experiment copy computes them."""
        inner = [name for name in names if name not in self._feeds]
        session = Session(surgery.expose(self._copy, inner, str(self.path)), what=str(self.path))
        computed = session.run({name: self._feeds[name] for name, _, _ in session.inputs})
        return {name: self._feeds[name] for name in names if name in self._feeds} | dict(
            zip(inner, computed, strict=True)
        )

    def intervene(self) -> Facts:
        """Force units of every site behind a cut, for every output that depends on it."""
        graph = surgery.import_graph(self._copy, str(self.path))
        view = GraphView(self.model.proto)
        tally = Tally()
        for output in self._answers:
            reached = surgery.upstream(graph, output)
            for site in find_sites(view, find_layers(view)):
                if site.tensor in reached:
                    tally.add(f"{site.tensor} -> {output}", lambda site=site, output=output: self._force(site, output))
        return tally.facts()

    def _force(self, site: Site, output: str) -> tuple[float, float]:
        """Return the difference from the run by hand, and how far the output moved, both relative to its scale."""
        what = str(self.path)
        shape = self._exposed([site.tensor])[site.tensor].shape
        cut = surgery.cut(self._copy, site.tensor, output, shape[1:], "affine", what)
        known = self._exposed([site.tensor, *cut.boundary])
        rows = self.subject.rows
        for name, values in [*known.items(), (output, self._answers[output])]:
            if values.shape[:1] != (rows,):
                raise ModelError(f"{what}: axis 0 of {name!r} does not hold the samples")
        base = known.pop(site.tensor)
        forced = Forcing(base, site)
        session = Session(cut.suffix, what=what, threads=1)
        at = Activations(base, known)
        feeds = {surgery.BASE: base[None], surgery.KEEP: 1 - forced.masks, surgery.REFERENCE: forced.values}
        feeds |= crossing(at, slice(0, rows)) | crossing_shapes(at, slice(0, rows), len(forced.masks))
        (found,) = session.run(feeds)
        return self._compared(forced, site, output, found.reshape(len(forced.masks), rows, *found.shape[1:]))

    def _compared(self, forced: Forcing, site: Site, output: str, found: Array) -> tuple[float, float]:
        changed = self._hand.forcing(site.tensor, forced.values.dtype)
        position = self._hand.outputs.index(output)
        by_hand = [
            changed.answers(self._feeds, mask, value)[position]
            for mask, value in zip(forced.masks, forced.values, strict=True)
        ]
        moved = max(difference(item, self._answers[output]) for item in by_hand)
        return difference(found, np.stack(by_hand)), moved

    def experiment(self) -> Facts:
        """Make an `Experiment` for the owner's decision, and force units of every site through it."""
        wanted = self.subject.spec.get("decision", "argmax")
        decision = Decision("threshold", wanted["threshold"]) if isinstance(wanted, dict) else Decision(wanted)
        output = self.subject.spec.get("output")
        experiment = Experiment(self.model, "cpu", _MEMORY, self._feeds, output, decision)
        tally = Tally()

        def force(site: Site) -> tuple[float, float]:
            suffix = experiment.suffix(site.tensor, "affine")
            at = suffix.cache(self._feeds)
            forced = Forcing(at.base, site)
            scores = suffix.affine(at, 1 - forced.masks, forced.values)
            # As a model answers: without the column of the threshold, and behind the last operator.
            found = experiment.decision.outputs(scores)
            return self._compared(forced, site, experiment.output, found.reshape(*found.shape[:2], *self._tail(output)))

        output = experiment.output
        for site in experiment.sites:
            tally.add(site.tensor, lambda site=site: force(site))
        facts = tally.facts()
        facts["open_layers"] = len(experiment.open_layers)
        facts["classes"] = experiment.classes
        return facts

    def _tail(self, output: str) -> tuple[int, ...]:
        return self._answers[output].shape[1:]


class Forcing:
    """A few units of a site, each forced far above what it is.

    Attributes:
        masks: [P, 1, ...] 1 at the unit of the member.
        values: [P, 1, ...] what it is forced to.
    """

    def __init__(self, base: Array, site: Site) -> None:
        """Choose the units that vary most."""
        axis = site.axis % base.ndim
        others = tuple(index for index in range(base.ndim) if index != axis)
        mean, spread = (function(base, axis=others, dtype=np.float64) for function in (np.mean, np.std))
        units = np.argsort(-spread, kind="stable")[:_UNITS]
        shape = [len(units), *[1] * base.ndim]
        shape[1 + axis] = base.shape[axis]
        self.masks, self.values = np.zeros(shape, base.dtype), np.zeros(shape, base.dtype)
        for member, unit in enumerate(units):
            where = (member, *[0] * axis, unit)
            self.masks[where] = 1
            self.values[where] = mean[unit] + _FAR * max(float(spread[unit]), 0.1)


class Tally:
    """Comparisons at many sites."""

    def __init__(self) -> None:
        """Begin with none."""
        self._differences: dict[str, float] = {}
        self._moved: dict[str, float] = {}
        self._refused: dict[str, str] = {}

    def add(self, name: str, compare: Callable[[], tuple[float, float]]) -> None:
        """Make a comparison, and note it or the reason why it is refused."""
        try:
            self._differences[name], self._moved[name] = compare()
        except OnnxcareError as error:
            self._refused[name] = str(error)

    def facts(self) -> Facts:
        """Return how many there were, the largest difference, and what was refused."""
        return {
            "compared": len(self._differences),
            "difference": max(self._differences.values(), default=None),
            "moved": sum(value > TOLERANCE for value in self._moved.values()),
            "differing": {name: value for name, value in self._differences.items() if not value <= TOLERANCE},
            "refused": len(self._refused),
            "refusals": _counted(self._refused.values()),
        }


def owner(bench: Bench, folder: Path, command: str) -> Facts:
    """Run a command of onnxcare with the spec and the data of the model's owner."""
    subject = bench.subject
    spec = folder / "care.yaml"
    if not spec.exists():
        content = dict(subject.spec) | {"seed": SEED}
        asked = dict(subject.asked or {"name": "least certain", "kind": "errors"})
        if "vnnlib" in asked:
            asked["vnnlib"] = str(bench.path.parent / asked["vnnlib"])
        content["properties"] = [asked]
        if "bounds" not in content:
            content["data"] = str(folder / "data.npz")
            arrays = subject.draw(np.random.default_rng(SEED + 1), _OWNED)
            labels = {} if subject.asked else {"y": _labels(bench, arrays)}
            np.savez(folder / "data.npz", **arrays, **labels)
        spec.write_text(yaml.safe_dump(content), encoding="utf-8")
    if command == "locate":
        found = onnxcare.locate(bench.path, spec, device="cpu", samples=32, values=4)
        return {"units": len(found.units), "sites": len(found.sites), "method": found.method}
    fixed = onnxcare.fix(bench.path, spec, folder / "out.onnx", device="cpu")
    return {"status": fixed.status, "tensors": len(fixed.patch)}


def _labels(bench: Bench, feeds: Mapping[str, Array]) -> Array:
    """Return the model's answers, and the second best ones where they are least certain."""
    hand = ByHand(bench.path, bench.subject.axes)
    wanted = bench.subject.spec.get("output", hand.outputs[0])
    y = hand.answers(feeds)[hand.outputs.index(wanted)]
    y = y.reshape(len(y), -1).astype(np.float64)
    decision = bench.subject.spec.get("decision", "argmax")
    if isinstance(decision, dict):
        y = np.stack([np.full(len(y), decision["threshold"]), y[:, 0]], axis=1)
    order = np.argsort(-y if decision != "argmin" else y, axis=1)
    sorted_ = np.take_along_axis(y, order, axis=1)
    margin = np.abs(sorted_[:, 0] - sorted_[:, 1])
    labels = order[:, 0].copy()
    wrong = np.argsort(margin, kind="stable")[: int(_WRONG * len(y))]
    labels[wrong] = order[wrong, 1]
    return labels


def difference(found: Array, wanted: Array) -> float:
    """Return the largest difference, relative to the largest value that is wanted; infinity for other shapes."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    if not found.size or np.array_equal(found, wanted):
        return 0.0
    if not np.issubdtype(found.dtype, np.number):
        return float("inf")
    found, wanted = found.astype(np.float64), wanted.astype(np.float64)
    if not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return float("inf")
    finite = np.isfinite(wanted)
    scale = np.abs(wanted[finite]).max(initial=np.finfo(np.float32).tiny)
    return float(np.abs(found[finite] - wanted[finite]).max(initial=0.0) / scale)


def _counted(reasons: Iterable[str | None]) -> dict[str, int]:
    return dict(collections.Counter(reason for reason in reasons if reason))


def main(name: str, cache: Path) -> None:
    """Take the steps with one model of the catalogue."""
    subject = next(item for item in SUBJECTS if item.name == name)
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(subject.path(cache), subject, Path(folder)):
            print(json.dumps(asdict(step)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
