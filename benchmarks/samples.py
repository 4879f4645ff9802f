"""What every method reaches on the sample models, on held-out data, for several seeds: one table, and JSON.

    python benchmarks/samples.py [--seeds 1 2 3] [--methods auto care] [--json FILE]

Each row is the worst of the seeds. Rates are in points; a negative accuracy or recall change is a loss. `restored` is
the share of triggered samples that get their true label back. Times are wall-clock, the whole command included.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

import onnxcare

SAMPLES = Path(__file__).parents[1] / "sample_models"
CASES = [
    ("mnist-square-pytorch", "model.onnx", "care.yaml"),
    ("mnist-square-pytorch", "model.onnx", "care-50.yaml"),
    ("mnist-square-pytorch", "model-dynamo.onnx", "care.yaml"),
    ("mnist-blend-keras", "model.onnx", "care.yaml"),
    ("mnist-blend-keras", "model.onnx", "care-50.yaml"),
]


@dataclass(frozen=True)
class Row:
    """One run, as the judge saw it; shares, and seconds."""

    sample: str
    spec: str
    method: str
    seed: int
    status: str
    before: float
    after: float
    excess: float
    restored: float
    accuracy_change: float
    worst_recall_change: float
    values_changed: int
    seconds: float


def run(sample: str, model: str, spec: str, method: str, seed: int) -> Row:
    """Repair one sample once."""
    folder = SAMPLES / sample
    with tempfile.TemporaryDirectory() as scratch:
        fix = onnxcare.fix(folder / model, folder / spec, Path(scratch) / "out.onnx", method=method, seed=seed)
    finding, guards = fix.verdict.properties[0], fix.verdict.guards
    return Row(
        sample=f"{sample}/{model}",
        spec=spec,
        method=method,
        seed=seed,
        status=fix.status,
        before=finding.before.value,
        after=finding.after.value,
        excess=finding.excess,
        restored=finding.restored.value if finding.restored else float("nan"),
        accuracy_change=-guards.accuracy_drop,
        worst_recall_change=-guards.worst_recall.drop,
        values_changed=sum(change.changed for change in fix.patch),
        seconds=fix.seconds,
    )


def table(rows: list[Row], seeds: list[int]) -> Table:
    """Return one line for each case and method: the worst of the seeds."""
    shown = Table(title=f"Worst of seeds {', '.join(map(str, seeds))}, held-out data", title_justify="left")
    columns = ("model", "spec", "method", "repaired", "ASR before", "ASR after", "excess", "restored", "accuracy")
    for name in (*columns, "worst recall", "s"):
        shown.add_column(name, justify="left" if name in ("model", "spec", "method") else "right")
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.sample, row.spec, row.method), []).append(row)
    for (sample, spec, method), group in groups.items():
        shown.add_row(
            sample,
            spec,
            method,
            f"{sum(row.status == 'repaired' for row in group)}/{len(group)}",
            f"{100 * min(row.before for row in group):.2f}",
            f"{100 * max(row.after for row in group):.2f}",
            f"{100 * max(row.excess for row in group):.2f}",
            f"{100 * min(row.restored for row in group):.2f}",
            f"{100 * min(row.accuracy_change for row in group):+.2f}",
            f"{100 * min(row.worst_recall_change for row in group):+.2f}",
            f"{max(row.seconds for row in group):.1f}",
        )
    return shown


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--methods", nargs="+", default=["auto", "care"])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    console = Console(width=150)
    rows = []
    for sample, model, spec in CASES:
        for method in arguments.methods:
            for seed in arguments.seeds:
                rows.append(run(sample, model, spec, method, seed))
    console.print(table(rows, arguments.seeds))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
