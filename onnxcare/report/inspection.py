"""What a model consists of, as text."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxcare.graph.view import as_text
from onnxcare.inspection.base import File, Inspection, LayerInfo, Methods, Shape, Value
from onnxcare.report.words import one_line

# From so many columns on, name and operator, input and output stand side by side.
_WIDE = 110
_SHOWN_OPERATORS = 6


class _Notes:
    """Reasons that many rows share, numbered in the order in which they come up."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, reason: str) -> str:
        """Return the mark that stands for a reason."""
        return escape(f"[{self._numbers.setdefault(reason, len(self._numbers) + 1)}]")

    def show(self, console: Console) -> None:
        """Print the reasons."""
        table = Table.grid(padding=(0, 1))
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        for reason, number in self._numbers.items():
            table.add_row(escape(f"[{number}]"), _plain(reason))
        console.print(table)


def show_inspection(inspection: Inspection, console: Console) -> None:
    """Print file, signature, layers and sites; reasons that come up in the tables stand below them."""
    _show_file(inspection, console)
    for word, values in (("input", inspection.inputs), ("output", inspection.outputs)):
        for value in values:
            console.print(f"{word} {_plain(value.name)}: {_described(value)}")
    if inspection.obstacle is not None:
        console.print(f"[yellow]not to be repaired as it is[/yellow]: {_plain(inspection.obstacle)}")
    notes = _Notes()
    _show_layers(inspection, console, notes)
    if inspection.sites:
        _show_sites(inspection, console, notes)
    notes.show(console)


def _show_file(inspection: Inspection, console: Console) -> None:
    file = inspection.file
    console.print(f"[bold]{_plain(file.path)}[/bold]  {_size(file.bytes)}, sha256 {file.sha256[:12]}")
    operators = [f"{count} {_plain(name)}" for name, count in inspection.operators.items()]
    if len(operators) > _SHOWN_OPERATORS:
        rest = len(operators) - _SHOWN_OPERATORS
        operators[_SHOWN_OPERATORS:] = [f"{rest} other kind{'s' if rest > 1 else ''}"]
    console.print(f"{inspection.nodes:,} nodes: {', '.join(operators)}")
    console.print("; ".join(_facts(file)))
    for path, size in file.external.items():
        console.print(f"external data {_plain(path)}: {_size(size)}")
    for name, nodes in file.functions.items():
        console.print(f"function {_plain(name)}: {nodes} nodes")
    if file.quantised:
        console.print(f"quantised: {', '.join(f'{count} {_plain(name)}' for name, count in file.quantised.items())}")
    for key, value in file.metadata.items():
        console.print(f"metadata {_plain(key)}: {_plain(value)}")


def _facts(file: File) -> list[str]:
    opsets = dict(file.opsets)
    own = opsets.pop("ai.onnx", None)
    found = [f"IR {file.ir_version}"]
    if own is not None:
        found.append(f"opset {own}")
    found += [f"{_plain(domain)} {version}" for domain, version in opsets.items()]
    if file.producer:
        found.append(f"from {_plain(file.producer)}")
    return found


def _show_layers(inspection: Inspection, console: Console, notes: _Notes) -> None:
    wide = console.width >= _WIDE
    table = Table(
        title="Layers, and other nodes that hold weights",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        show_footer=True,
    )
    weights = sum(layer.weights for layer in inspection.layers)
    biases = sum(layer.biases for layer in inspection.layers)
    table.add_column("name" if wide else "name and operator", footer="other constants\nall together", overflow="fold")
    if wide:
        table.add_column("operator", overflow="fold")
    table.add_column("input -> output", overflow="fold")
    table.add_column("weights", f"{inspection.other:,}\n{weights + inspection.other:,}", justify="right", no_wrap=True)
    table.add_column("biases", f"\n{biases:,}", justify="right", no_wrap=True)
    table.add_column("changed by", overflow="fold")
    for layer in inspection.layers:
        name = "  " * len(layer.inside) + _plain(layer.name)
        operator = _plain(layer.operator)
        first = [name, operator] if wide else [f"{name}\n[dim]{operator}[/dim]"]
        table.add_row(
            *first,
            f"{_axes(layer.input, wide)}{' ' if wide else chr(10)}-> {_axes(layer.output, wide)}",
            f"{layer.weights:,}{_tied(layer, notes)}",
            f"{layer.biases:,}",
            _methods(layer.methods, notes),
        )
    console.print(table)
    console.print(f"{inspection.numbers:,} numbers are stored in all.")


def _show_sites(inspection: Inspection, console: Console, notes: _Notes) -> None:
    wide = console.width >= _WIDE
    table = Table(title="Sites", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("tensor", overflow="fold")
    table.add_column("units", justify="right", overflow="fold")
    table.add_column("written by", overflow="fold")
    table.add_column("read by", overflow="fold")
    table.add_column("changed by", overflow="fold")
    for site in inspection.sites:
        shape = f"{_shape(site.shape, ', ' if wide else ',')}, " if site.shape is not None else ""
        kind = f"{site.units:,} {site.kind}{'s' if site.units != 1 else ''}"
        table.add_row(
            f"{_plain(site.tensor)}\n[dim]{shape}axis {site.axis}[/dim]",
            kind,
            ", ".join(map(_plain, site.writers)),
            ", ".join(map(_plain, site.readers)),
            _methods(site.methods, notes),
        )
    console.print(table)


def _methods(methods: Methods, notes: _Notes) -> str:
    """Say which methods can change something, with marks for the reasons of those that cannot."""
    able = [name for name, reason in methods.items() if reason is None]
    refusing: dict[str, list[str]] = {}
    for name, reason in methods.items():
        if reason is not None:
            refusing.setdefault(reason, []).append(name)
    if not refusing:
        return "[green]all[/green]"
    marks = [notes.mark(reason) for reason in refusing]
    if not able:
        return f"[red]none[/red] {' '.join(marks)}"
    if len(able) < len(methods) - len(able):
        return f"[yellow]{', '.join(able)}[/yellow] only {' '.join(marks)}"
    told = (f"{', '.join(names)} {mark}" for names, mark in zip(refusing.values(), marks, strict=True))
    return f"[green]all[/green] but {', '.join(told)}"


def _tied(layer: LayerInfo, notes: _Notes) -> str:
    """Return marks for what is counted elsewhere."""
    shared: dict[str, list[str]] = {}
    for item in layer.constants:
        if item.counted_at is not None and item.numbers > 1:
            shared.setdefault(item.counted_at, []).append(repr(item.name))
    told = (
        f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} counted at {where}"
        for where, names in shared.items()
    )
    return "".join(f" {notes.mark(reason)}" for reason in told)


def _described(value: Value) -> str:
    shape = "" if value.shape is None else f" {_shape(value.shape)}"
    return f"{_plain(value.type)}{shape}"


def _axes(value: Value | None, wide: bool) -> str:
    return "?" if value is None or value.shape is None else _shape(value.shape, ", " if wide else ",")


def _shape(shape: Shape, between: str = ", ") -> str:
    return _plain(f"[{between.join('?' if length is None else str(length) for length in shape)}]")


def _size(count: int) -> str:
    amount, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{count} bytes" if units[0] == "bytes" else f"{amount:.1f} {units[0]}"


def _plain(name: str | bytes) -> str:
    return escape(one_line(as_text(name)))
