"""Results as text, for people and logs."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxcare.graph.patch import TensorChange
from onnxcare.measures import Finding, Measure, Rate, Verdict
from onnxcare.properties.backdoor import CONFUSION
from onnxcare.repair.base import Candidate
from onnxcare.results import Check, Fix, Location, Race

_SHOWN = 20
_FRONT = 8
RECALL = "recall of class "


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
    _show_before(fix.verdict, console)
    show_verdict(fix.verdict, console)
    if fix.patch:
        _show_patch(fix, console)
    if len(fix.front) > 1:
        _show_front(fix, console)
    for note in fix.notes:
        console.print(f"note: {escape(note)}")
    for trigger in fix.triggers:
        shown = f", shown in {escape(trigger.picture)}" if trigger.picture else ""
        console.print(f"{trigger.source} of class {trigger.target}: {escape(trigger.file)}{shown}")
    console.print(_conclusion(fix))


def show_check(check: Check, console: Console) -> None:
    """Print what was measured, what the graph shows, and whether the model passes; the conclusion stands last."""
    against = f", against {escape(check.baseline)}" if check.baseline else ""
    console.print(f"[bold]{escape(check.model)}[/bold]  {escape(check.spec)}{against}")
    for note in check.run.notes if check.run is not None else ():
        console.print(f"note: {escape(note)}")
    for item in check.static:
        where = f" {escape(item.where)}:" if item.where else ""
        console.print(f"[{_COLOURS[item.level]}]{item.level}[/] {item.rule}:{where} {escape(item.message)}")
    if check.verdict is not None:
        show_verdict(check.verdict, console, "baseline" if check.baseline else None)
        _show_worse(check.verdict, console)
    told = {"pass": "[green]passed[/green]", "fail": "[red]failed[/red]"}
    ending = told.get(check.status, "[yellow]undecided[/yellow], which is no pass")
    why = "" if check.verdict is not None else ": the file is not safe to run, so nothing was measured"
    console.print(f"{ending}{why} in {check.seconds:.1f} s")


def _show_worse(verdict: Verdict, console: Console) -> None:
    """Name what got worse than chance would explain."""
    for finding in verdict.findings:
        for item in finding.measures:
            if item.worse is not None and item.worse < _SIGNIFICANT:
                console.print(
                    f"worse than the baseline: {escape(finding.name)}: {escape(item.name)}, {_value(item.before)} -> "
                    f"{_value(item.after)} (paired test, p = {item.worse:.2g})"
                )


def show_verdict(
    verdict: Verdict, console: Console, compared: str | None = "before", title: str = "Held-out data"
) -> None:
    """Print measures in a table, and what is undecided; `compared` is what the other model is called, None for none."""
    table = Table(title=title, title_justify="left")
    table.add_column("measure", overflow="fold")
    if compared is not None:
        table.add_column(compared, justify="right")
    table.add_column("after" if compared == "before" else "measured", justify="right")
    table.add_column("interval", justify="right")
    table.add_column("limit", justify="right")
    table.add_column("")
    for finding in verdict.findings:
        guards = finding.kind == "guards"
        for index, item in enumerate(_worth_showing(finding)):
            name = escape(item.name)
            if not guards:
                name = f"  {name}" if index else f"{escape(finding.name)}: {name}"
            before = [] if compared is None else [_value(item.before, item.unit)]
            cells = (_value(item.after, item.unit), _interval(item), _limit(item), _MARKS[item.status])
            table.add_row(name, *before, *cells)
    console.print(table)
    for finding in verdict.findings:
        for note in finding.notes:
            console.print(f"note: {escape(finding.name)}: {escape(note)}")
        for item in finding.measures:
            if item.status == "undecided":
                more = f"; {item.needed:,} samples like these would decide" if item.needed else ""
                if item.limit == 0:
                    more = "; no number of samples shows a rate of zero, so give a limit above it"
                console.print(f"undecided: {escape(finding.name)}: {escape(item.name)}: too few samples{more}")


def _show_before(verdict: Verdict, console: Console) -> None:
    """Print first what the original confuses and gets wrong on clean samples: no repair is to blame for that."""
    before = {item.name: item.value_before for item in verdict.guards.measures if item.value_before is not None}
    recalls = [(value, name.removeprefix(RECALL)) for name, value in before.items() if name.startswith(RECALL)]
    worst = ", ".join(f"{label}: {100 * value:.1f}" for value, label in sorted(recalls)[:_SHOWN])
    console.print(
        f"original, accuracy {100 * before['accuracy']:.2f} %, recall by class in %, worst first: {escape(worst)}"
    )
    for finding in verdict.properties:
        for item in finding.measures:
            if item.name == CONFUSION:
                console.print(f"original, {escape(finding.name)}: {CONFUSION} {_value(item.before)}")


def _worth_showing(finding: Finding) -> list[Measure]:
    """Of the classes' recalls only the worst one, or the worst loss, is worth a line."""
    drops = [item for item in finding.measures if item.name.startswith("recall drop of class")]
    recalls = [item for item in finding.measures if item.name.startswith(RECALL)]
    if not recalls:
        return list(finding.measures)
    if drops:
        worst_drop = max(drops, key=lambda item: item.value)
        label = worst_drop.name.removeprefix("recall drop of class ")
        kept = [item for item in recalls if item.name == f"recall of class {label}" or item.status == "fail"]
        kept.append(worst_drop)
        kept += [item for item in drops if item.status == "fail" and item is not worst_drop]
    else:
        worst_recall = min(recalls, key=lambda item: item.value)
        kept = [item for item in recalls if item is worst_recall or item.status == "fail"]
    hidden = {id(item) for item in [*drops, *recalls]} - {id(item) for item in kept}
    return [item for item in finding.measures if id(item) not in hidden]


def changes_table(title: str, changes: Sequence[TensorChange], *, largest: bool = False) -> Table:
    """Return a table of tensors and how much they change; `largest` adds the largest change of a single value."""
    table = Table(title=title, title_justify="left")
    table.add_column("tensor", overflow="fold")
    table.add_column("shape")
    for column in ("values changed", "relative norm", *["largest change"] * largest):
        table.add_column(column, justify="right")
    for change in changes:
        shape = " x ".join(str(length) for length in change.shape)
        counts = f"{change.changed} of {change.size}"
        more = [f"{change.largest:.3g}"] * largest
        table.add_row(escape(change.name), shape, counts, f"{change.relative:.3g}", *more)
    return table


def _show_patch(fix: Fix, console: Console) -> None:
    console.print(changes_table("Patched tensors", fix.patch))
    if fix.chosen is not None:
        edit = fix.chosen.edit
        size = "" if edit is None else f" ({edit.values} values of rank {edit.rank}, relative norm {edit.norm:.2g})"
        console.print(f"chosen of {len(fix.candidates)} candidates: {escape(fix.chosen.label)}{size}")


def _show_front(fix: Fix, console: Console) -> None:
    """Show what else could be had: candidates that are better in one respect by being worse in another."""
    names = [finding.name for finding in fix.verdict.properties]
    table = Table(title="Pareto front on validation data, in points", title_justify="left")
    table.add_column("candidate", overflow="fold")
    for name in (*(f"{escape(name)} above baseline" for name in names), "accuracy drop", "worst recall drop"):
        table.add_column(name, justify="right")
    for name in ("values", "rank", "norm"):
        table.add_column(name, justify="right")
    for item in _worth_a_line(fix.front):
        outcome, edit = item.outcome, item.edit
        rates = [*outcome.excess, outcome.accuracy_drop, outcome.recall_drop]
        size = ("0", "0", "0") if edit is None else (str(edit.values), str(edit.rank), f"{edit.norm:.2g}")
        table.add_row(escape(item.label), *(f"{100 * rate + 0.0:.2f}" for rate in rates), *size)
    console.print(table)


def _worth_a_line(front: Sequence[Candidate]) -> list[Candidate]:
    """Return as many of the front as can be read, evenly from one end to the other."""
    if len(front) <= _FRONT:
        return list(front)
    return [front[round(index * (len(front) - 1) / (_FRONT - 1))] for index in range(_FRONT)]


def _conclusion(fix: Fix) -> str:
    seconds = f"in {fix.seconds:.1f} s"
    if fix.status == "nothing to repair":
        return f"[green]nothing to repair[/green]: every property holds already; nothing was written ({seconds})"
    if fix.status == "repaired":
        patch = f", and as a patch: {escape(fix.patch_file)}" if fix.patch_file else ""
        return f"[green]repaired[/green] {seconds}: {escape(str(fix.output))}{patch}"
    where = f"written all the same: {escape(fix.output)}" if fix.output else "nothing was written"
    if fix.status == "improved":
        return f"[red]not repaired[/red]: improved, but not within the limits, {seconds}; {where}"
    return f"[red]not repaired[/red]: nothing that was tried is better than no change, {seconds}; {where}"


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
    units.add_column("cases", justify="right")
    for unit in location.units[:_SHOWN]:
        units.add_row(escape(unit.site), str(unit.unit), f"{unit.score:.4f}", f"{unit.cases:,}")
    console.print(units)
    if location.race is not None:
        _show_race(location.race, console)
    rest = len(location.units) - _SHOWN
    if rest > 0:
        console.print(f"and {rest} more; --json lists all")
    if location.layers:
        _show_layers(location, console)


def _show_race(race: Race, console: Console) -> None:
    rounds = ", ".join(f"{item['units']} on {item['cases']}" for item in race.rounds)
    console.print(
        f"Raced for the top {race.top} at {race.confidence:.4g} confidence (units on cases: {rounds}); "
        "--exact measures every unit on all of them."
    )


def _show_layers(location: Location, console: Console) -> None:
    layers = Table(title="Weights that had to go for the right answer, by layer", title_justify="left")
    for name in ("layer", "weights", "voted", "answers brought back", "median share", "weighted by"):
        layers.add_column(name, justify="left" if name in ("layer", "weighted by") else "right", overflow="fold")
    for item in location.layers:
        layers.add_row(
            escape(item.layer),
            f"{item.weights:,}",
            f"{item.voted:,}",
            f"{item.located} of {item.pairs}",
            f"{item.median_share:.2%}" if item.located else "",
            "gradient" if item.gradient else "interventions",
        )
    console.print(layers)


def _value(value: Rate | float | None, unit: str = "rate") -> str:
    if value is None:
        return ""
    if isinstance(value, Rate):
        return f"{100 * value.value:.2f} % ({value.count}/{value.total})" if value.total else "no samples"
    if unit == "number":
        return f"{value:.4g}"
    return f"{_points(value)} %" if unit == "rate" else _points(value)


def _interval(item: Measure) -> str:
    if item.low is None or item.high is None:
        return ""
    if isinstance(item.after, Rate):
        # A million samples tell more than two decimals.
        digits = 2 if item.after.total < 20_000 else 4
        return f"{100 * item.low:.{digits}f} - {100 * item.high:.{digits}f} %" if item.after.total else ""
    return f"{_points(item.low)} - {_points(item.high)}" if item.unit == "points" else ""


def _limit(item: Measure) -> str:
    if item.limit is None:
        return ""
    sign = ">=" if item.higher_is_better else "<="
    if item.unit == "number":
        return f"{sign} {item.limit:g}"
    return f"{sign} {_points(item.limit)}" + (" %" if item.unit == "rate" else "")


def _points(share: float) -> str:
    return f"{round(100 * share, 2) + 0.0:.2f}"


_MARKS = {
    "pass": "[green]pass[/green]",
    "fail": "[red]fail[/red]",
    "undecided": "[yellow]undecided[/yellow]",
    "info": "",
}
_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}
# A change for the worse that chance would bring about more rarely than this is named.
_SIGNIFICANT = 0.01
