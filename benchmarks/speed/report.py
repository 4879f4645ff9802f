"""What is shown and saved: a table, JSON, and a chart of the ratios."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.speed.measure import Result

# Readable on white and on black, and told apart by all eyes.
MET, MISSED, TEXT = "#2b8cbe", "#d95f02", "#808080"

# Cores that others may keep busy without spoiling the figures.
IDLE = 0.1


def show(results: Sequence[Result], header: Mapping[str, Any]) -> None:
    """Print the table."""
    title = f"{header['machine']}, {header['threads']} threads, {header['device']}, {header['peak_gflops']} GFLOP/s"
    table = Table(title=title, title_justify="left")
    for name in ("row", "what", "against"):
        table.add_column(name)
    for name in ("ours, s", "theirs, s", "largest difference", "result", "goal"):
        table.add_column(name, justify="right")
    table.add_column("")
    for result in results:
        goal = "" if result.goal is None else f"{result.goal:.3g} {result.unit}"
        verdict = {None: "", True: "met", False: "DIFFERENT" if result.differs else "missed"}[result.met]
        cells = (_number(result.ours), _number(result.theirs), _number(result.difference, 2))
        table.add_row(result.name, result.what, result.against, *cells, _value(result), goal, verdict)
    console = Console(width=190)
    console.print(table)
    if header["others_cores"] > IDLE:
        console.print(
            f"Other processes kept {header['others_cores']} cores busy meanwhile: run this on an idle machine."
        )


def save(results: Sequence[Result], header: Mapping[str, Any], path: Path) -> None:
    """Write the JSON file and, where there are ratios, the chart beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {**header, "rows": [result.as_dict() for result in results]}
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    ratios = [result for result in results if result.unit == "x"]
    if ratios:
        _draw(ratios, header, path.with_suffix(".svg"))


def _draw(results: Sequence[Result], header: Mapping[str, Any], path: Path) -> None:
    """Draw a bar for every ratio, with a mark at its goal."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    colours = {"text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT}
    with plt.rc_context(colours | {"ytick.color": TEXT, "svg.hashsalt": "speed", "font.size": 9}):
        figure, axes = plt.subplots(figsize=(9, 0.8 + 0.55 * len(results)))
        for row, result in enumerate(results):
            good = result.met is not False
            axes.barh(row, result.value, height=0.55, color=MET if good else MISSED, hatch=None if good else "//")
            axes.annotate(
                f" {_value(result)}",
                (max(result.value, 1), row),
                va="center",
                xytext=(4, 0),
                textcoords="offset points",
            )
            if result.goal is not None:
                axes.plot([result.goal] * 2, [row - 0.42, row + 0.42], color=TEXT, linewidth=2.5)
        axes.set_yticks(range(len(results)), [f"{result.what}\nagainst {result.against}" for result in results])
        axes.invert_yaxis()
        axes.set_xscale("log")
        axes.set_xlim(left=min(1, *(result.value for result in results)), right=4 * max(r.value for r in results))
        axes.set_xlabel("times as fast; the grey marks are the goals, hatched bars miss them")
        axes.set_title(f"{header['machine']}, {header['threads']} threads, {header['device']}", loc="left", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
        figure.savefig(path, bbox_inches="tight", transparent=True, metadata={"Date": None})
        plt.close(figure)


def _value(result: Result) -> str:
    text = f"{result.value:.3g}" if result.value < 100 else f"{result.value:.0f}"
    return f"{text} {result.unit}"


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}g}"
