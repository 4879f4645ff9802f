"""The steps that are taken with one model, and what each one found.

    python -m benchmarks.third_party.survey NAME CACHE

takes them with a model of the catalogue and prints a line of JSON for each, so that what was found before a crash, or
before patience ran out, is not lost.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import onnxcare
from benchmarks.speed.memory import peak
from benchmarks.third_party import owner
from benchmarks.third_party.by_hand import ByHand
from benchmarks.third_party.catalogue import SUBJECTS, Subject
from benchmarks.third_party.compare import Forcing, Tally, counted, difference, spread
from onnxcare.decision import Decision
from onnxcare.errors import ModelError, OnnxcareError
from onnxcare.experiment import Experiment
from onnxcare.graph import surgery
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.sites import Site
from onnxcare.graph.working import experiment_form
from onnxcare.runtime import Session
from onnxcare.suffix import Activations, crossing, crossing_shapes

Array = np.ndarray
Facts = dict[str, Any]

SEED = 1
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
        ("locate", lambda: owner.locate(path, subject, folder)),
        ("fix", lambda: owner.fix(path, subject, folder)),
    ):
        if name in ("locate", "fix") and not subject.owned:
            continue
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
        """Remember them; nothing is loaded yet."""
        self.path, self.subject = path, subject

    def load(self) -> Facts:
        """Load the file, and list layers and sites."""
        subject = self.subject
        self._feeds = subject.draw(np.random.default_rng(SEED), subject.rows)
        # As onnxcare works with them, with samples on axis 0.
        self._rows = {name: _samples_first(name, values, subject) for name, values in self._feeds.items()}
        self.model: Model = load_model(self.path, subject.axes)
        found = onnxcare.inspect(self.path)
        self._hand = ByHand(self.path, self.subject.axes)
        self._answers = dict(zip(self._hand.outputs, self._hand.answers(self._feeds), strict=True))
        refusals = [item.methods["auto"] for item in found.layers if item.layer]
        outside = [item for item in found.layers if not item.layer]
        return {
            "nodes": found.nodes,
            "numbers": found.numbers,
            "layers": len(refusals),
            "open_layers": refusals.count(None),
            "layer_refusals": counted(refusals),
            "outside": counted(item.operator for item in outside),
            "outside_refusals": [f"{item.name} ({item.operator}): {item.methods['auto']}" for item in outside[:1]],
            "sites": len(found.sites),
            "obstacle": found.obstacle,
            "outputs": {name: list(value.shape) for name, value in self._answers.items()},
            "single": self._hand.single,
        }

    def copy(self) -> Facts:
        """Compare the experiment copy with the file, on several samples in one run."""
        self._form = experiment_form(self.model)
        self._copy = self._form.proto
        names = list(self._answers)
        copied = self._exposed(names)
        differences = {}
        for name, answer in self._answers.items():
            found = copied[name]
            # Half precision is looked at in single precision.
            half = answer.dtype == np.float16 and found.dtype == np.float32
            differences[name] = difference(found.astype(answer.dtype) if half else found, answer)
        return {"rows": self.subject.rows, "difference": max(differences.values()), "differences": differences}

    def _exposed(self, names: list[str]) -> dict[str, Array]:
        """Return tensors as the experiment copy computes them."""
        inner = [name for name in names if name not in self._rows]
        session = Session(surgery.expose(self._copy, inner, str(self.path)), what=str(self.path))
        computed = session.run({name: self._rows[name] for name, _, _ in session.inputs})
        return {name: self._rows[name] for name in names if name in self._rows} | dict(
            zip(inner, computed, strict=True)
        )

    def intervene(self) -> Facts:
        """Force units of every site behind a cut, for every output that depends on it."""
        if self._form.sites and not self._hand.independent(self._feeds, list(self._answers.values())):
            raise ModelError(f"{self.path}: the samples of a run depend on each other")
        graph = surgery.import_graph(self._copy, str(self.path))
        tally = Tally()
        for output in self._answers:
            reached = surgery.upstream(graph, output)
            for site in spread([site for site in self._form.sites if site.tensor in reached], self.subject.sites):
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
        plain = self._answers[output]
        moved = max(difference(item, plain) for item in by_hand)
        return difference(found, np.stack(by_hand), float(np.abs(plain).max())), moved

    def experiment(self) -> Facts:
        """Make an `Experiment` for the owner's decision, and force units of every site through it."""
        wanted = self.subject.spec.get("decision", "argmax")
        decision = Decision("threshold", wanted["threshold"]) if isinstance(wanted, dict) else Decision(wanted)
        output = self.subject.spec.get("output")
        experiment = Experiment(self.model, "cpu", _MEMORY, self._rows, output, decision)
        tally = Tally()

        def force(site: Site) -> tuple[float, float]:
            suffix = experiment.suffix(site.tensor, "affine")
            at = suffix.cache(self._rows)
            forced = Forcing(at.base, site)
            scores = suffix.affine(at, 1 - forced.masks, forced.values)
            # As a model answers: without the column of the threshold, and behind the last operator.
            found = experiment.decision.outputs(scores)
            return self._compared(forced, site, experiment.output, found.reshape(*found.shape[:2], *self._tail(output)))

        output = experiment.output
        for site in spread(experiment.sites, self.subject.sites):
            tally.add(site.tensor, lambda site=site: force(site))
        facts = tally.facts()
        facts["open_layers"] = len(experiment.open_layers)
        facts["classes"] = experiment.classes
        return facts

    def _tail(self, output: str) -> tuple[int, ...]:
        return self._answers[output].shape[1:]


def _samples_first(name: str, values: Array, subject: Subject) -> Array:
    axis = subject.axes.get(name, 0)
    return np.repeat(values[None], subject.rows, axis=0) if axis is None else np.moveaxis(values, axis, 0)


def main(name: str, cache: Path) -> None:
    """Take the steps with one model of the catalogue."""
    subject = next(item for item in SUBJECTS if item.name == name)
    with tempfile.TemporaryDirectory() as folder:
        for step in steps(subject.path(cache), subject, Path(folder)):
            print(json.dumps(asdict(step)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
