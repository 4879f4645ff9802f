"""Results of `diff` and `apply` as text."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from onnxcare.comparison import Behaviour, Diff
from onnxcare.measures import Verdict
from onnxcare.report.text import RECALL, changes_table, show_verdict
from onnxcare.results import Applied

_SHOWN = 20


def show_applied(applied: Applied, console: Console) -> None:
    """Print what was changed, and which file was written."""
    if applied.tensors:
        console.print(changes_table("Changed tensors", applied.tensors))
    word = "reverted" if applied.reverted else "patched"
    console.print(f"[green]{word}[/green]: {escape(applied.output)}  SHA-256 {applied.output_sha256}")


def show_diff(diff: Diff, console: Console) -> None:
    """Print what differs, and how differently both files answer; the conclusion stands last."""
    for path, sha256 in ((diff.model, diff.sha256), (diff.other, diff.other_sha256)):
        console.print(f"[bold]{escape(path)}[/bold]  SHA-256 {sha256}")
    if diff.tensors:
        console.print(changes_table("Tensors that differ", diff.tensors[:_SHOWN], largest=True))
        _show_rest(len(diff.tensors), "tensors", console)
    _show_lines(diff.parts, "differences", console)
    if diff.behaviour is not None:
        _show_behaviour(diff.behaviour, console)
    if diff.check is not None and diff.check.verdict is not None:
        show_verdict(diff.check.verdict, console, title=f"{escape(diff.check.spec)}, held-out data")
    console.print(_conclusion(diff))


def _show_lines(lines: Sequence[str], what: str, console: Console) -> None:
    for line in lines[:_SHOWN]:
        console.print(escape(line))
    _show_rest(len(lines), what, console)


def _show_rest(count: int, what: str, console: Console) -> None:
    if count > _SHOWN:
        console.print(f"... and {count - _SHOWN} more {what}; --format json has all of them")


def _show_behaviour(behaviour: Behaviour, console: Console) -> None:
    console.print(f"{escape(behaviour.data)}, {behaviour.samples} samples")
    if behaviour.answers is not None:
        rate = behaviour.answers
        console.print(f"answers that differ: {100 * rate.value:.2f} % ({rate.count}/{rate.total})")
    for output, largest in behaviour.largest.items():
        console.print(f"largest difference of a value of {escape(output)}: {largest:.3g}")
    if behaviour.kept is not None:
        changed = [
            f"{item.name}: {100 * item.value_before:.2f} % -> {100 * item.value:.2f} %"
            for item in behaviour.kept.measures
            if item.name.startswith(RECALL) and item.value_before not in (None, item.value)
        ]
        _show_lines(changed, "classes", console)
        show_verdict(Verdict((), behaviour.kept), console, title=f"{escape(behaviour.data)}, by its labels")


def _conclusion(diff: Diff) -> str:
    if not diff.same:
        found = [f"{len(diff.tensors)} of {diff.places} tensors"] * bool(diff.tensors)
        found += ["other parts"] * bool(diff.parts)
        return f"[yellow]they differ[/yellow]: {' and '.join(found)}"
    alike = "" if diff.sha256 == diff.other_sha256 else "; only how they are written differs"
    return f"[green]they hold the same[/green]{alike}"
