"""Unknown triggers: who is suspected, and what a repair with the restored trigger leaves of the true one.

    python benchmarks/triggers.py [--seeds 1 2 3] [--only WORD ...] [--models FOLDER] [--json FILE]

Every backdoored sample and every clean twin, with clean data alone. `gap` is how many times larger the next class's
patch is than the smallest one, `MAD` the outlier index of Neural Cleanse (it flags above 2). The attack success of the
true trigger, which nothing else here sees, is measured by onnxruntime on the written file. With --models the networks
of a folder (input and classes as in mnist-square-pytorch) are scanned as well.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from rich.console import Console
from rich.table import Table

import onnxcare
from onnxcare.data import load_dataset
from onnxcare.experiment import Experiment
from onnxcare.graph.model import load_model
from onnxcare.properties.inversion import scan

SAMPLES = Path(__file__).parents[1] / "sample_models"
SQUARE, BLEND, NETWORKS = "mnist-square-pytorch", "mnist-blend-keras", "mnist-networks-pytorch"
SPEC = """\
data: {data}/repair.npz
holdout: {data}/holdout.npz
properties:
  - {{name: hidden, kind: backdoor, max_rate: 0.01}}
keep: {{accuracy_drop: 0.01, recall_drop: 0.03}}
"""


@dataclass(frozen=True)
class Subject:
    """A model, the folder of its data, and the trigger that was planted in it."""

    model: Path
    data: Path
    trigger: Path | None = None
    target: int | None = None


@dataclass(frozen=True)
class Line:
    """What was found in one model with one seed."""

    model: str
    seed: int
    target: int | None
    suspects: list[int]
    nearest: int
    gap: float
    index: float
    mad: float
    status: str
    true_before: float | None
    true_after: float | None
    accuracy_drop: float | None
    scan_seconds: float
    seconds: float | None


def subjects(further: Path | None) -> list[Subject]:
    """Return everything that is looked at."""
    square = SAMPLES / SQUARE
    found = [
        Subject(square / "model.onnx", square, square / "trigger.npz", 1),
        Subject(square / "model-clean.onnx", square),
        Subject(SAMPLES / BLEND / "model.onnx", SAMPLES / BLEND, SAMPLES / BLEND / "trigger.npz", 7),
        Subject(SAMPLES / BLEND / "model-clean.onnx", SAMPLES / BLEND),
    ]
    for name in ("sigmoid", "tanh", "gelu", "residual"):
        path = SAMPLES / NETWORKS / f"model-{name}.onnx"
        found += [
            Subject(path, square, square / "trigger.npz", 1),
            Subject(path.with_name(f"model-{name}-clean.onnx"), square),
        ]
    blended = SAMPLES / NETWORKS / "model-residual-blend.onnx"
    found.append(Subject(blended, square, blended.with_name("trigger-blend.npz"), 7))
    return found + [Subject(path, square) for path in sorted(further.glob("*.onnx"))] if further else found


def look(subject: Subject, seed: int) -> Line:
    """Scan a model, and repair it if a class is suspected and the true trigger is known to this benchmark."""
    model = load_model(subject.model)
    data = load_dataset(subject.data / "repair.npz", model.inputs)
    experiment = Experiment(model, "cpu", 1 << 30, data.inputs)
    started = time.monotonic()
    found = scan(experiment, data, seed)
    scanning = time.monotonic() - started
    sizes = np.sort([patch.size for patch in found.patches])
    median = float(np.median(sizes))
    nearest, standing = found.nearest()
    status, rates, drop, seconds = "", (None, None), None, None
    if found.suspects and subject.trigger is not None:
        with tempfile.TemporaryDirectory() as scratch:
            spec, out = Path(scratch) / "care.yaml", Path(scratch) / "out.onnx"
            spec.write_text(SPEC.format(data=subject.data))
            fix = onnxcare.fix(subject.model, spec, out, seed=seed, best_effort=True)
            status, seconds = fix.status, fix.seconds
            drop = fix.verdict.guards.measure("accuracy drop").value
            rates = tuple(success(path, subject) for path in (subject.model, out))
    return Line(
        model=f"{subject.model.parent.name} {subject.model.name}",
        seed=seed,
        target=subject.target,
        suspects=[suspect.target for suspect in found.suspects],
        nearest=nearest.target,
        gap=float(sizes[1] / sizes[0]),
        index=standing.index,
        mad=(median - float(sizes[0])) / (1.4826 * float(np.median(np.abs(sizes - median)))),
        status=status,
        true_before=rates[0],
        true_after=rates[1],
        accuracy_drop=drop,
        scan_seconds=scanning,
        seconds=seconds,
    )


def success(path: Path, subject: Subject) -> float:
    """Return the attack success of the true trigger on held-out images of other classes."""
    assert subject.trigger is not None
    session = onnxruntime.InferenceSession(path)
    with np.load(subject.trigger) as trigger, np.load(subject.data / "holdout.npz") as holdout:
        x = holdout["x"][holdout["y"] != subject.target]
        stamped = (x * (1 - trigger["mask"]) + trigger["pattern"] * trigger["mask"]).astype(np.float32)
    (scores,) = session.run(None, {session.get_inputs()[0].name: stamped})
    return float((scores.argmax(axis=1) == subject.target).mean())


def table(lines: list[Line]) -> Table:
    """Return a line for every run."""
    found = Table()
    for name in ("model", "seed", "planted", "suspects", "nearest", "gap", "index", "MAD", "scan s"):
        found.add_column(name, justify="left" if name == "model" else "right")
    for name in ("repair", "true ASR before", "after", "accuracy", "s"):
        found.add_column(name, justify="right")
    for line in lines:
        share = [
            "" if value is None else f"{sign * 100 * value + 0.0:.2f}"
            for value, sign in ((line.true_before, 1), (line.true_after, 1), (line.accuracy_drop, -1))
        ]
        found.add_row(
            line.model,
            str(line.seed),
            "" if line.target is None else str(line.target),
            ", ".join(map(str, line.suspects)) or "none",
            str(line.nearest),
            f"{line.gap:.2f}",
            f"{line.index:.1f}",
            f"{line.mad:.1f}",
            f"{line.scan_seconds:.1f}",
            line.status,
            *share,
            "" if line.seconds is None else f"{line.seconds:.1f}",
        )
    return found


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="models whose paths end on a word")
    parser.add_argument("--models", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines = []
    for subject in subjects(arguments.models):
        if not any(str(subject.model).endswith(word) for word in arguments.only):
            continue
        for seed in arguments.seeds:
            lines.append(look(subject, seed))
            print(json.dumps(asdict(lines[-1])), file=sys.stderr)  # it takes long: what is known should be seen
    Console(width=190).print(table(lines))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
