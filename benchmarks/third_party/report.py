"""What is shown and saved: a table for the terminal, JSON, and the table of the page of the docs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.third_party.compare import TOLERANCE
from onnxcare.report.json import dump

Found = Mapping[str, Any]

COLUMNS = ("model", "nodes", "layers", "outside", "sites", "copy", "below", "experiment", "locate", "fix", "MiB", "s")
_BEGIN, _END = "<!-- written by make bench-third-party -->", "<!-- until here -->"


class Reasons:
    """Reasons why something was refused, each told once and numbered."""

    def __init__(self) -> None:
        """Begin with none."""
        self._numbers: dict[str, int] = {}

    def mark(self, *reasons: str) -> str:
        """Return the numbers under which the reasons are told, in brackets."""
        numbers = [self._numbers.setdefault(reason, len(self._numbers) + 1) for reason in reasons if reason]
        return f" [{', '.join(map(str, numbers))}]" if numbers else ""

    def __iter__(self) -> Any:
        """Yield numbers with their reasons."""
        return iter((number, reason) for reason, number in self._numbers.items())


def line(found: Found, reasons: Reasons) -> tuple[str, ...]:
    """Return the cells of one model."""
    steps = {step["name"]: step for step in found["steps"]}
    load = steps["load"]
    known = load["facts"]
    memory = max(step["peak"] for step in found["steps"]) >> 20
    seconds = sum(step["seconds"] for step in found["steps"])
    if load["outcome"] != "done":
        return (found["name"], *_ended(load, reasons), *[""] * 8, str(memory), f"{seconds:.0f}")
    return (
        found["name"],
        str(known["nodes"]),
        # One reason of many that differ in names.
        f"{known['open_layers']}/{known['layers']}{reasons.mark(*list(known['layer_refusals'])[:1])}",
        _outside(known["outside"]) + reasons.mark(*known["outside_refusals"]),
        str(known["sites"]),
        *(_cell(steps.get(name), show, reasons) for name, show in _CELLS.items()),
        str(memory),
        f"{seconds:.0f}",
    )


def _outside(operators: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {operator}" for operator, count in operators.items())


def _cell(step: Found | None, show: Any, reasons: Reasons) -> str:
    if step is None:
        return ""
    return str(show(step, reasons)) if step["outcome"] == "done" else " ".join(_ended(step, reasons))


def _ended(step: Found, reasons: Reasons) -> tuple[str]:
    return (f"{step['outcome']}{reasons.mark(step['reason'])}",)


def same(difference: float | None) -> bool:
    """Return whether answers are the same; JSON has nothing for infinity."""
    return difference is not None and difference <= TOLERANCE


def _copied(step: Found, reasons: Reasons) -> str:
    difference = step["facts"]["difference"]
    return f"same {difference:.0e}" if same(difference) else "DIFFERENT"


def _forced(step: Found, reasons: Reasons) -> str:
    facts = step["facts"]
    tried = facts["compared"] + facts["refused"]
    if not tried:
        return "no site"
    same = facts["compared"] - len(facts["differing"])
    largest = "" if facts["difference"] is None else f" {facts['difference']:.0e}"
    if facts["compared"] and not facts["moved"]:
        largest += ", nothing moves"
    return f"{same}/{tried}{largest}{reasons.mark(*facts['refusals'])}"


def _located(step: Found, reasons: Reasons) -> str:
    return f"{step['facts']['units']} units, {step['seconds']:.0f} s"


def _fixed(step: Found, reasons: Reasons) -> str:
    return f"{step['facts']['status']}, {step['seconds']:.0f} s"


_CELLS = {"copy": _copied, "intervene": _forced, "experiment": _forced, "locate": _located, "fix": _fixed}


def show(models: Sequence[Found], operators: Found | None) -> None:
    """Print the table, the reasons, and what came of the operators."""
    reasons, table = Reasons(), Table(title="Models by others", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("model", "locate", "fix") else "right")
    for found in models:
        # Brackets would be taken for markup.
        table.add_row(*(cell.replace("[", r"\[") for cell in line(found, reasons)))
    console = Console(width=200)
    console.print(table)
    for number, reason in reasons:
        console.print(f"[{number}] {reason}", markup=False)
    for text in _about_operators(operators):
        console.print(text, markup=False)


def _about_operators(operators: Found | None) -> list[str]:
    if operators is None:
        return []
    found = [
        f"Of {operators['models']} models of single operators, {operators['same']} copies answer as the file does"
        f" (largest difference {operators['difference']:.0e}) and {len(operators['different'])} do not."
    ]
    for item in operators["ended"]:
        found.append(
            f"{item['count']} {item['outcome']} at `{item['step']}`, such as {item['example']}: {item['reason']}"
        )
    return found


def save(models: Sequence[Found], operators: Found | None, header: Found, path: Path) -> None:
    """Write the JSON file."""
    content = {**header, "models": models, "operators": operators}
    path.write_text(dump(content), encoding="utf-8")


def write_page(models: Sequence[Found], operators: Found | None, path: Path) -> None:
    """Put the table and the reasons between the marks of the page."""
    text = path.read_text(encoding="utf-8")
    before, rest = text.split(_BEGIN)
    _, behind = rest.split(_END)
    reasons = Reasons()
    rows = [COLUMNS, tuple("---" for _ in COLUMNS), *(line(found, reasons) for found in models)]
    parts = ["\n".join(f"| {' | '.join(row)} |" for row in rows)]
    parts.append("\n".join(f"{number}. {_plain(reason)}" for number, reason in reasons))
    told = _about_operators(operators)
    parts += told[:1]
    parts.append("\n".join(f"- {_plain(text)}" for text in told[1:]))
    content = "\n\n".join(part for part in parts if part)
    path.write_text(f"{before}{_BEGIN}\n\n{content}\n\n{_END}{behind}", encoding="utf-8")


def _plain(text: str) -> str:
    """Keep what Markdown would take for marks."""
    return text.replace("|", r"\|").replace("<", r"\<").replace("_", r"\_").replace("*", r"\*")
