"""A model's graph as a layered drawing: what nodes are and hold, what can be repaired, and where the sites are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby

import onnx

from onnxcare.findings.walk import subgraphs
from onnxcare.graph.anatomy import anatomy_of
from onnxcare.graph.light import inferred
from onnxcare.graph.model import Model
from onnxcare.graph.view import as_text
from onnxcare.inspection import operator_name
from onnxcare.inspection.base import Inspection, LayerInfo, Methods, Shape, SiteInfo, Value
from onnxcare.inspection.constants import formal_name
from onnxcare.inspection.values import declared_values
from onnxcare.report import svg
from onnxcare.report.boxes import Boxes, Group, boxes_of, without_arrows
from onnxcare.report.svg import Arrow, Box, Line

# So many constants are listed in a box, so many values of a short one, so many operators of a folded one.
_LISTED, _VALUES, _STEPS = 5, 4, 3
_REASON, _PRODUCER = 40, 60
_TIMES = "\N{MULTIPLICATION SIGN}"

_LEGEND = {
    "port": "input or output of the model",
    "open": "layer: its weights can be repaired",
    "refused": "layer that is refused; the box says why",
    "holder": "other node with weights",
    "plain": "other node",
    "stack": "several nodes in one box",
    "site": "site, with the number of its units",
    "closed": "site whose units cannot be scaled in what reads them",
}


def draw(model: Model, inspection: Inspection) -> str:
    """Return a drawing of the main graph as SVG.

    Args:
        model: the model.
        inspection: what was found out about it.
    """
    return _Picture(model, inspection).render()


class _Picture:
    def __init__(self, model: Model, inspection: Inspection) -> None:
        anatomy = anatomy_of(model)
        self._inspection = inspection
        self._view = view = anatomy.view
        self._values: Mapping[str, Value] = declared_values(inferred(model.proto).graph)
        mine = [row for row in inspection.layers if not row.inside]
        self._layers = {row.name: row for row in mine if row.layer}
        self._rows = {row.output.name: row for row in mine if row.output is not None and not row.layer}
        self._sites = {site.tensor: site for site in inspection.sites}
        self._functions = {(item.domain, item.name): len(item.node) for item in model.proto.functions}
        tables = {view.producer[name] for name, row in self._rows.items() if row.operator == "Gather"}
        self._named: set[tuple[int, int, str]] = set()
        self._boxes: Boxes = boxes_of(view, anatomy.layers, self._sites, tables)

    def render(self) -> str:
        """Return the drawing."""
        groups, inputs, outputs = self._boxes.groups, self._inspection.inputs, self._inspection.outputs
        made = {value.name: index for index, value in enumerate(inputs)}
        for number, group in enumerate(groups, len(inputs)):
            made |= {name: number for index in group.nodes for name in self._view.nodes[index].output if name}
        pairs = list(self._pairs(made, len(inputs)))
        for number, value in enumerate(outputs, len(inputs) + len(groups)):
            if value.name in made:
                pairs.append((made[value.name], number, value.name))
        self._named = without_arrows(pairs, self._sites)
        drawn = [_port(value, "input") for value in inputs]
        for group in groups:
            drawn.append(self._with_names(len(drawn), self._box(group)))
        drawn += [_port(value, "output") for value in outputs]
        pairs = [pair for pair in pairs if pair not in self._named]
        return svg.render(
            svg.Sheet(
                title=self._inspection.file.path.rpartition("/")[2],
                subtitle=self._facts(),
                boxes=drawn,
                arrows=list(self._arrows(pairs, drawn)),
                legend=self._legend(drawn),
                notes=self._notes(),
            )
        )

    # -- boxes -----------------------------------------------------------------------------------

    def _with_names(self, number: int, box: Box) -> Box:
        """Return a box with the names of what it reads without an arrow."""
        names = [as_text(name) for _, target, name in sorted(self._named) if target == number]
        return replace(box, lines=[*box.lines, *(Line("name", f"reads {name}") for name in names)]) if names else box

    def _box(self, group: Group) -> Box:
        nodes = [(index, self._view.nodes[index]) for index in group.nodes]
        if len(nodes) > 1 and group.layer is None:
            return self._folded(nodes)
        _, node = nodes[0]
        row = self._row(nodes) if group.layer is None else self._layers.get(group.layer.name)
        head = " + ".join(operator_name(item) for _, item in nodes)
        lines = [Line("head", head)]
        if node.name:
            lines.append(Line("name", as_text(node.name)))
        lines += self._held(nodes, row)
        lines += [Line("word", text) for text in self._inside(node)]
        kind = "plain"
        if row is not None and row.layer:
            reason = row.methods["auto"]
            kind = "open" if reason is None else "refused"
            lines += [Line("word", text) for text in _wrapped(reason or "")]
        elif row is not None:
            kind = "holder"
        return Box(kind, lines, self._told(nodes, row))

    def _folded(self, nodes: Sequence[tuple[int, onnx.NodeProto]]) -> Box:
        runs = ((name, len(list(same))) for name, same in groupby(operator_name(node) for _, node in nodes))
        steps = [f"{count} {name}" if count > 1 else name for name, count in runs]
        shown = steps if len(steps) <= _STEPS + 1 else [*steps[: _STEPS - 1], "…", steps[-1]]
        lines = [Line("head", " · ".join(shown)), Line("name", f"{len(nodes)} nodes")]
        scope = _common_scope([node.name for _, node in nodes])
        if scope:
            lines[1] = Line("name", f"{scope}: {len(nodes)} nodes")
        rows = [row for item in nodes if (row := self._row([item])) is not None]
        held = [
            Line("data", f"{item.role or item.name} {_product(item.shape)}")
            for row in rows
            for item in row.constants
            if item.numbers > 1
        ]
        lines += _limited(held)
        told = [f"{operator_name(node)} {self._view.label(index)}" for index, node in nodes]
        return Box("holder" if held else "plain", lines, "\n".join(told), stacked=True)

    def _row(self, nodes: Sequence[tuple[int, onnx.NodeProto]]) -> LayerInfo | None:
        """Return what was found out about nodes that hold weights, None for others."""
        written = (name for _, node in nodes for name in node.output)
        return next((self._rows[name] for name in written if name in self._rows), None)

    def _held(self, nodes: Sequence[tuple[int, onnx.NodeProto]], row: LayerInfo | None) -> list[Line]:
        """Return a line for each constant of a box: shapes of tensors, values of short ones."""
        if row is not None:
            return _limited(
                [Line("data", _constant(item.role or item.name, item.type, item.shape)) for item in row.constants]
            )
        found = []
        for _, node in nodes:
            for position, name in enumerate(node.input):
                if name and not self._view.is_activation(name):
                    found.append(Line("data", self._short(formal_name(node, position) or name, name)))
        return _limited(found)

    def _short(self, role: str, name: str) -> str:
        values = self._view.small_constant(name, limit=_VALUES)
        if values is not None and values.dtype.kind in "iufb":
            return f"{role} {', '.join(f'{value:g}' for value in values.reshape(-1).tolist())}".strip()
        tensor = self._view.constants.get(name)
        if tensor is None:
            return f"{role} computed from constants"
        return _constant(role, "", tuple(tensor.dims))

    def _inside(self, node: onnx.NodeProto) -> Iterator[str]:
        counts = [len(graph.node) for graph in subgraphs(node)]
        if counts:
            yield f"{' + '.join(map(str, counts))} nodes inside"
        if (node.domain, node.op_type) in self._functions:
            yield f"function of {self._functions[node.domain, node.op_type]} nodes"

    def _told(self, nodes: Sequence[tuple[int, onnx.NodeProto]], row: LayerInfo | None) -> str:
        index, node = nodes[0]
        lines = [f"{operator_name(node)} {self._view.label(index)}"]
        if row is not None:
            lines.append(f"{row.weights:,} weights, {row.biases:,} biases")
            lines += _methods(row.methods)
        for item in node.attribute:
            if item.type not in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS, onnx.AttributeProto.TENSOR):
                lines.append(_shortened(str(onnx.helper.printable_attribute(item))))
        return "\n".join(lines)

    # -- arrows ----------------------------------------------------------------------------------

    def _pairs(self, made: Mapping[str, int], first: int) -> Iterator[tuple[int, int, str]]:
        """Yield source, target and tensor of every arrow between boxes."""
        for number, group in enumerate(self._boxes.groups, first):
            names = dict.fromkeys(name for index in group.nodes for name in _reads(self._view.nodes[index]))
            for name in names:
                if made.get(name, number) != number:
                    yield made[name], number, name

    def _arrows(self, pairs: Sequence[tuple[int, int, str]], boxes: Sequence[Box]) -> Iterator[Arrow]:
        labelled: set[str] = set()
        for source, target, name in pairs:
            site, fresh = self._sites.get(name), name not in labelled
            labelled.add(name)
            value = self._values.get(name, Value(name))
            if source < len(self._inspection.inputs) or boxes[target].kind == "port":
                fresh &= site is not None  # the port itself tells
            yield Arrow(
                source,
                target,
                label=_product(value.shape) if fresh and value.shape is not None else "",
                mark=_units(site) if fresh and site is not None else "",
                kind="wire" if site is None else "closed" if site.methods["care"] else "site",
                told="\n".join([f"{name}: {value.type}", *([] if site is None else _site_told(site))]),
            )

    # -- around ----------------------------------------------------------------------------------

    def _facts(self) -> str:
        file = self._inspection.file
        opset = file.opsets.get("ai.onnx")
        parts = [f"{self._inspection.nodes:,} nodes", f"{self._inspection.numbers:,} numbers"]
        parts += [f"opset {opset}"] if opset is not None else []
        parts += [f"from {as_text(file.producer)[:_PRODUCER]}"] if file.producer else []
        return ", ".join(parts)

    def _legend(self, boxes: Iterable[Box]) -> list[tuple[str, str]]:
        kinds = {box.kind for box in boxes}
        kinds |= {"stack"} if self._boxes.folded else set()
        kinds |= {"closed" if site.methods["care"] else "site" for site in self._sites.values()}
        return [(kind, text) for kind, text in _LEGEND.items() if kind in kinds]

    def _notes(self) -> list[str]:
        boxes, found = self._boxes, list[str]()
        if self._inspection.file.functions or self._inspection.file.quantised:
            found.append("Functions are drawn as what is in them, quantised operators as what they compute.")
        if boxes.folded:
            nodes = sum(len(group.nodes) for group in boxes.folded)
            found.append(f"{nodes:,} nodes are folded into {len(boxes.folded):,} boxes.")
        if boxes.shapes:
            found.append(f"{boxes.shapes:,} nodes that only work out shapes are left out.")
        if self._named:
            found.append(f"{len(self._named):,} long arrows are left out; the boxes they lead to name what they read.")
        if boxes.beyond:
            found.append(f"The drawing ends here; {boxes.beyond:,} further nodes are left out.")
        return found


def _reads(node: onnx.NodeProto) -> list[str]:
    found = [name for name in node.input if name]
    for graph in subgraphs(node):
        found += (name for inner in graph.node for name in _reads(inner))
        found += (output.name for output in graph.output)
    return found


def _port(value: Value, what: str) -> Box:
    shape = "" if value.shape is None else f" {_product(value.shape)}"
    name = as_text(value.name)
    return Box("port", [Line("head", name), Line("data", f"{value.type}{shape}")], f"{what} {name}")


def _limited(lines: list[Line]) -> list[Line]:
    if len(lines) <= _LISTED:
        return lines
    return [*lines[: _LISTED - 1], Line("data", f"and {len(lines) - _LISTED + 1} more")]


def _constant(role: str, kind: str, shape: Shape) -> str:
    usual = kind in ("", "float32", "int64")
    return f"{role} {_product(shape)}{'' if usual else f' {kind}'}"


def _product(shape: Shape) -> str:
    return _TIMES.join("?" if length is None else str(length) for length in shape) or "scalar"


def _units(site: SiteInfo) -> str:
    return f"{site.units:,} {site.kind}{'s' if site.units != 1 else ''}"


def _site_told(site: SiteInfo) -> list[str]:
    writers = f"written by {', '.join(site.writers)}" if site.writers else "written by no layer alone"
    return [
        f"site: {_units(site)} on axis {site.axis}",
        writers,
        f"read by {', '.join(site.readers)}",
        *_methods(site.methods),
    ]


def _methods(methods: Methods) -> list[str]:
    able = [name for name, reason in methods.items() if reason is None]
    lines = [f"changed by {', '.join(able)}"] if able else []
    refusing: dict[str, list[str]] = {}
    for name, reason in methods.items():
        if reason is not None:
            refusing.setdefault(reason, []).append(name)
    return lines + [f"not by {', '.join(names)}: {reason}" for reason, names in refusing.items()]


def _wrapped(reason: str) -> list[str]:
    """Return a reason in lines that fit a box."""
    lines, line = [], ""
    for word in reason.split():
        if line and len(line) + 1 + len(word) > _REASON:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return [*lines, line] if line else lines


def _common_scope(names: Sequence[str]) -> str:
    """Return what the names of nodes have in common, up to a separator."""
    if not all(names):
        return ""
    parts = [as_text(name).split("/")[:-1] for name in names]
    shared = []
    for same in zip(*parts, strict=False):
        if len(set(same)) > 1:
            break
        shared.append(same[0])
    return "/".join(shared)


def _shortened(text: str) -> str:
    return text if len(text) <= 120 else f"{text[:117]}..."
