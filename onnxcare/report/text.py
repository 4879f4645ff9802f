"""Results as text, for people and logs."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxcare.inspection import Inspection
from onnxcare.judge import Guards, PropertyFinding, Rate, Verdict
from onnxcare.results import Fix, Location

_SHOWN = 20


def show_fix(fix: Fix, console: Console) -> None:
    """Print the verdict, what was changed, and how it ended; the conclusion stands last."""
    samples = fix.run.samples
    console.print(
        f"[bold]{escape(fix.run.model)}[/bold]  method {fix.method}, seed {fix.run.seed}, device {fix.run.device}; "
        f"{samples['repair']} + {samples['search']} samples to repair with, {samples['validation']} to choose with, "
        f"{samples['holdout']} held out"
    )
    for note in fix.run.notes:
        console.print(f"note: {escape(note)}")
    _show_verdict(fix.verdict, console)
    if fix.patch:
        _show_patch(fix, console)
    console.print(_conclusion(fix))


def _show_verdict(verdict: Verdict, console: Console) -> None:
    table = Table(title="Held-out data", title_justify="left")
    table.add_column("measure", overflow="fold")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    table.add_column("95 % interval", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("")
    for finding in verdict.properties:
        _add_property(table, finding)
    _add_guards(table, verdict.guards)
    console.print(table)
    for finding in verdict.properties:
        for note in finding.notes:
            console.print(f"note: {escape(finding.name)}: {escape(note)}")


def _add_property(table: Table, finding: PropertyFinding) -> None:
    before, after = finding.before, finding.after
    table.add_row(f"{escape(finding.name)}: attack success", _rate(before), _rate(after), _interval(after))
    clean = finding.baseline_after
    table.add_row("  clean confusion rate", _rate(finding.baseline_before), _rate(clean), _interval(clean))
    table.add_row(
        "  excess attack success",
        _points(finding.excess_before),
        _points(finding.excess),
        "",
        f"<= {_points(finding.limit)}",
        _mark(finding.passed),
    )
    if finding.restored is not None:
        table.add_row("  true answer restored", "", _rate(finding.restored), _interval(finding.restored))


def _add_guards(table: Table, guards: Guards) -> None:
    drop, worst = guards.accuracy_drop, guards.worst_recall
    table.add_row(
        "accuracy",
        _rate(guards.before),
        _rate(guards.after),
        _interval(guards.after),
        f">= -{_points(guards.accuracy_limit)}",
        _mark(drop <= guards.accuracy_limit + 1e-12),
    )
    table.add_row(
        f"recall of class {worst.label} (worst change)",
        _rate(worst.before),
        _rate(worst.after),
        _interval(worst.after),
        f">= -{_points(guards.recall_limit)}",
        _mark(worst.drop <= guards.recall_limit + 1e-12),
    )
    table.add_row("clean decisions changed", "", _rate(guards.changed), _interval(guards.changed))


def _show_patch(fix: Fix, console: Console) -> None:
    table = Table(title="Patched tensors", title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    table.add_column("values changed", justify="right")
    table.add_column("relative norm", justify="right")
    for change in fix.patch:
        shape = " x ".join(str(length) for length in change.shape)
        counts = f"{change.changed} of {change.size}"
        table.add_row(escape(change.name), shape, counts, f"{change.relative:.3g}")
    console.print(table)
    if fix.chosen is not None:
        console.print(f"chosen of {len(fix.candidates)} candidates: {escape(fix.chosen.label)}")


def _conclusion(fix: Fix) -> str:
    seconds = f"in {fix.seconds:.1f} s"
    if fix.status == "nothing to repair":
        return f"[green]nothing to repair[/green]: every property holds already; nothing was written ({seconds})"
    if fix.status == "repaired":
        return f"[green]repaired[/green] {seconds}: {escape(str(fix.output))}"
    where = f"written all the same: {escape(fix.output)}" if fix.output else "nothing was written"
    return f"[red]not repaired[/red] within the limits {seconds}; {where}"


def show_location(location: Location, console: Console) -> None:
    """Print the sites by the effect of their top units, and the strongest units."""
    sites = Table(title="Sites, by the effect of setting their top units to the clean mean", title_justify="left")
    for name in ("site", "units", "dead", "set", "by", "excess left", "accuracy", "worst recall"):
        sites.add_column(name, justify="left" if name == "site" else "right", overflow="fold")
    for site in location.sites:
        sites.add_row(
            escape(site.site),
            str(site.units),
            str(site.dead),
            str(len(site.chosen)),
            site.locator,
            ", ".join(_points(value) for value in site.excess),
            _points(-site.accuracy_drop),
            _points(-site.recall_drop),
        )
    console.print(sites)
    units = Table(title=f"Units, by {location.method}", title_justify="left")
    units.add_column("site", overflow="fold")
    units.add_column("unit", justify="right")
    units.add_column("effect", justify="right")
    for unit in location.units[:_SHOWN]:
        units.add_row(escape(unit.site), str(unit.unit), f"{unit.score:.4f}")
    console.print(units)
    rest = len(location.units) - _SHOWN
    if rest > 0:
        console.print(f"and {rest} more; --json lists all")


def show_inspection(inspection: Inspection, console: Console) -> None:
    """Print signature, layers and sites."""
    console.print(
        f"[bold]{escape(inspection.path)}[/bold]  IR {inspection.ir_version}, opset {inspection.opset}, "
        f"{inspection.nodes} nodes, {inspection.parameters:,} constant values"
        + (f", from {escape(inspection.producer)}" if inspection.producer else "")
    )
    for word, signatures in (("input", inspection.inputs), ("output", inspection.outputs)):
        for item in signatures:
            shape = ", ".join(str(length) for length in item.shape)
            console.print(f"{word} {escape(item.name)}: {item.dtype or 'not a tensor'} \\[{escape(shape)}]")
    layers = Table(title="Layers", title_justify="left")
    for name in ("layer", "operator", "in", "out", "values", "repairable"):
        layers.add_column(name, overflow="fold", justify="right" if name in ("in", "out", "values") else "left")
    for layer in inspection.layers:
        layers.add_row(
            escape(layer.name),
            layer.operator,
            str(layer.inputs),
            str(layer.outputs),
            f"{layer.parameters:,}",
            escape(layer.refusal or "yes"),
        )
    console.print(layers)
    sites = Table(title="Sites", title_justify="left")
    for name in ("site", "units", "kind", "read by", "multipliers fold"):
        sites.add_column(name, overflow="fold", justify="right" if name == "units" else "left")
    for site in inspection.sites:
        readers = ", ".join(site.readers)
        sites.add_row(escape(site.site), str(site.units), site.kind, escape(readers), escape(site.refusal or "yes"))
    console.print(sites)


def _rate(rate: Rate) -> str:
    if not rate.total:
        return "no samples"
    return f"{100 * rate.value:.2f} % ({rate.count}/{rate.total})"


def _interval(rate: Rate) -> str:
    return f"{100 * rate.low:.2f} - {100 * rate.high:.2f} %" if rate.total else ""


def _points(share: float) -> str:
    return f"{100 * share + 0.0:.2f}"


def _mark(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[red]fail[/red]"
