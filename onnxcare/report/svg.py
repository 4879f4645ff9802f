"""Boxes and arrows as an SVG drawing: graphlay places them, and this module writes them down.

The drawing is plain text: no script, no font or picture from elsewhere, colours for light and dark pages. Coordinates
are rounded to tenths, so that the same graph gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from xml.sax.saxutils import escape

import graphlay

from onnxcare.report.words import one_line, writable

Point = tuple[float, float]

_SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
# Kinds of lines: size of the font, height of the line, and the width of a character in terms of the size. Widths are
# those of wide fonts, for nobody knows which one a reader has.
_LINES = {
    "head": (13.0, 18.0, 0.66),
    "name": (10.5, 14.5, 0.605),
    "data": (11.0, 15.0, 0.605),
    "word": (11.0, 15.0, 0.58),
}
_PAD_X, _PAD_Y, _LEAST = 12.0, 7.0, 72.0
_LABEL_HEIGHT, _MARK_HEIGHT, _MARK_PAD = 15.0, 18.0, 9.0
# Around a mark the arrow it stands on has to be seen.
_CLEAR = 26.0
_MARGIN, _HEADER, _ROUND, _ARROW = 28.0, 58.0, 7.0, 7.0
_SPACING = {"layer_gap": 34.0, "node_gap": 30.0, "dummy_gap": 24.0, "edge_label_margin": 10.0}
_LONGEST = 44

_LIGHT = {
    "page": "#ffffff", "ink": "#1c2733", "dim": "#5c6b7a", "wire": "#8796a5",
    "plain": "#f4f6f8 #c2cbd4", "port": "#ffffff #5c6b7a", "open": "#e2f0fb #2476b5", "refused": "#fdeede #cf6d1f",
    "holder": "#efebfa #8570c4", "site": "#12805a #ffffff", "closed": "#cf6d1f #ffffff",
}  # fmt: skip
_DARK = {
    "page": "#12171d", "ink": "#e4eaf0", "dim": "#98a6b4", "wire": "#62717f",
    "plain": "#1c232b #3a4652", "port": "#12171d #98a6b4", "open": "#11304a #5aa9e3", "refused": "#3b2612 #e79a56",
    "holder": "#282240 #a693e4", "site": "#35c08b #08130e", "closed": "#e79a56 #1d1105",
}  # fmt: skip
_FILLED = ("plain", "port", "open", "refused", "holder")
_MARKED = ("site", "closed")


@dataclass(frozen=True)
class Line:
    """A line of text in a box; kinds are `head`, `name`, `data` and `word`."""

    kind: str
    text: str


@dataclass(frozen=True)
class Box:
    """A box.

    Attributes:
        kind: `plain`, `port`, `open`, `refused` or `holder`, which give it its colours.
        lines: what stands in it.
        told: what a reader is told who points at it.
        stacked: whether it stands for several.
    """

    kind: str
    lines: Sequence[Line]
    told: str
    stacked: bool = False


@dataclass(frozen=True)
class Arrow:
    """An arrow from a box to another one, each known by its position.

    Attributes:
        source: where it starts.
        target: where it ends.
        label: what stands beside it; nothing where it is empty.
        mark: what stands on it in a coloured field, likewise.
        kind: `wire`, or `site` or `closed`, which give it and its mark their colours.
        told: what a reader is told who points at it.
    """

    source: int
    target: int
    label: str = ""
    mark: str = ""
    kind: str = "wire"
    told: str = ""


@dataclass(frozen=True)
class Sheet:
    """A drawing.

    Attributes:
        title: what stands above it.
        subtitle: what stands below the title.
        boxes: the boxes.
        arrows: the arrows.
        legend: kinds of boxes and arrows that need an explanation, with it.
        notes: sentences below it.
    """

    title: str
    subtitle: str
    boxes: Sequence[Box]
    arrows: Sequence[Arrow]
    legend: Sequence[tuple[str, str]]
    notes: Sequence[str] = field(default_factory=tuple)


def render(sheet: Sheet) -> str:
    """Return a drawing as SVG."""
    placed = graphlay.layout(_request(sheet), preset="process_map", options=_OPTIONS)
    low, high = placed.bounds["min"], placed.bounds["max"]
    lowest = min([low["x"], *(point[0] for edge in placed.edges for point in _points(edge))])
    highest = max([high["x"], *(point[0] for edge in placed.edges for point in _points(edge))])
    across = max(highest - lowest, _width_of_header(sheet), _legend_width(sheet.legend))
    shift = (_MARGIN - lowest + (across - (highest - lowest)) / 2, _MARGIN + _HEADER - low["y"])
    bottom = high["y"] + shift[1]
    parts = [*_arrows(sheet, placed, shift), *_boxes(sheet, placed, shift), *_labels(sheet, placed, shift)]
    foot, height = _foot(sheet, bottom + _MARGIN)
    width = across + 2 * _MARGIN
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(width)} {_n(height)}" width="{_n(width)}" '
            f'height="{_n(height)}" role="img">',
            f"<title>{_text(sheet.title)}</title>",
            f"<style>\n{_style()}</style>",
            f'<rect class="page" width="{_n(width)}" height="{_n(height)}"/>',
            f'<text class="title" x="{_n(_MARGIN)}" y="{_n(_MARGIN + 13)}">{_text(_cut(sheet.title))}</text>',
            f'<text class="note" x="{_n(_MARGIN)}" y="{_n(_MARGIN + 33)}">{_text(sheet.subtitle)}</text>',
            *parts,
            *foot,
            "</svg>",
            "",
        ]
    )


_OPTIONS = {"direction": "topbottom", "spacing": _SPACING, "routing": {"style": "orthogonal"}}


def _request(sheet: Sheet) -> dict[str, object]:
    nodes = []
    for box in sheet.boxes:
        width, height = _size(box)
        nodes.append({"size": {"width": width, "height": height}, "shape": "box", "key": ""})
    edges: list[dict[str, object]] = []
    for arrow in sheet.arrows:
        edge: dict[str, object] = {"source": arrow.source, "target": arrow.target, "weight": 1.0}
        if arrow.label or arrow.mark:
            width, height = _label_size(arrow)
            edge["label_size"] = {"width": width, "height": height + (_CLEAR if arrow.mark else 0.0)}
        edges.append(edge)
    return {"nodes": nodes, "edges": edges}


# -- sizes ---------------------------------------------------------------------------------------


def _size(box: Box) -> tuple[float, float]:
    width = max((_width(line.kind, _cut(line.text)) for line in box.lines), default=0.0)
    height = sum(_LINES[line.kind][1] for line in box.lines)
    # Whole pairs of units keep centres on a grid.
    return max(_LEAST, 2 * math.ceil((width + 2 * _PAD_X) / 2)), height + 2 * _PAD_Y


def _label_size(arrow: Arrow) -> tuple[float, float]:
    width = max(
        _width("data", _cut(arrow.label)) + 6 if arrow.label else 0.0,
        _width("word", arrow.mark) + 2 * _MARK_PAD if arrow.mark else 0.0,
    )
    return width, (_LABEL_HEIGHT if arrow.label else 0.0) + (_MARK_HEIGHT if arrow.mark else 0.0)


def _width(kind: str, text: str) -> float:
    size, _, share = _LINES[kind]
    return size * share * len(text)


def _width_of_header(sheet: Sheet) -> float:
    lines = [_cut(sheet.title), sheet.subtitle, *sheet.notes]
    return max(_width("word", line) for line in lines)


def _cut(text: str) -> str:
    """Return a text in one line that is not too long: ends of names tell more than beginnings."""
    text = one_line(text)
    return text if len(text) <= _LONGEST else f"…{text[1 - _LONGEST :]}"


# -- parts ---------------------------------------------------------------------------------------


def _boxes(sheet: Sheet, placed: graphlay.Layout, shift: Point) -> Iterable[str]:
    for box, node in zip(sheet.boxes, placed.nodes, strict=True):
        width, height = node["size"]["width"], node["size"]["height"]
        x = node["center"]["x"] - width / 2 + shift[0]
        y = node["center"]["y"] - height / 2 + shift[1]
        round_ = height / 2 if box.kind == "port" else 6
        yield f'<g class="{box.kind}"><title>{_text(box.told)}</title>'
        if box.stacked:
            yield _rect(x + 4, y + 4, width, height, round_)
        yield _rect(x, y, width, height, round_)
        at = y + _PAD_Y
        for line in box.lines:
            size, step, _ = _LINES[line.kind]
            baseline = at + step / 2 + 0.36 * size
            middle = _n(x + width / 2)
            yield f'<text class="{line.kind}" x="{middle}" y="{_n(baseline)}">{_text(_cut(line.text))}</text>'
            at += step
        yield "</g>"


def _arrows(sheet: Sheet, placed: graphlay.Layout, shift: Point) -> Iterable[str]:
    for arrow, edge in zip(sheet.arrows, placed.edges, strict=True):
        points = [(x + shift[0], y + shift[1]) for x, y in _points(edge)]
        told = f"<title>{_text(arrow.told)}</title>" if arrow.told else ""
        yield f'<g class="{arrow.kind}">{told}<path class="line" d="{_path(points)}"/>{_head(points)}</g>'


def _labels(sheet: Sheet, placed: graphlay.Layout, shift: Point) -> Iterable[str]:
    for arrow, edge in zip(sheet.arrows, placed.edges, strict=True):
        anchor = edge.get("label_anchor")
        if anchor is None or not (arrow.label or arrow.mark):
            continue
        x, top = anchor["x"] + shift[0], anchor["y"] + shift[1] - _label_size(arrow)[1] / 2
        told = f"<title>{_text(arrow.told)}</title>" if arrow.told else ""
        yield f'<g class="{arrow.kind}">{told}'
        if arrow.label:
            width = _width("data", _cut(arrow.label)) + 6
            yield _rect(x - width / 2, top, width, _LABEL_HEIGHT, 0, "page")
            yield f'<text class="shape" x="{_n(x)}" y="{_n(top + 11.5)}">{_text(_cut(arrow.label))}</text>'
            top += _LABEL_HEIGHT
        if arrow.mark:
            yield _mark(x, top, arrow.mark)
        yield "</g>"


def _mark(x: float, top: float, text: str) -> str:
    width = _width("word", text) + 2 * _MARK_PAD
    ground = _rect(x - width / 2, top + 1, width, _MARK_HEIGHT - 2, 8, "mark")
    return f'{ground}<text class="mark" x="{_n(x)}" y="{_n(top + 12.8)}">{_text(text)}</text>'


def _legend_width(legend: Sequence[tuple[str, str]]) -> float:
    return max((34 + _width("word", text) for _, text in legend), default=0.0)


def _foot(sheet: Sheet, top: float) -> tuple[list[str], float]:
    """Return legend and notes, and where the drawing ends."""
    found, y = [], top + 6
    for kind, text in sheet.legend:
        middle = y + 8
        if kind in _MARKED:
            sample = f'<g class="{kind}">{_rect(_MARGIN, y, 24, 16, 8, "mark")}</g>'
        elif kind == "stack":
            sample = f'<g class="plain">{_rect(_MARGIN + 3, y + 3, 21, 13, 3)}{_rect(_MARGIN, y, 21, 13, 3)}</g>'
        else:
            sample = f'<g class="{kind}">{_rect(_MARGIN, y, 24, 16, 8 if kind == "port" else 4)}</g>'
        found.append(sample)
        found.append(f'<text class="note" x="{_n(_MARGIN + 34)}" y="{_n(middle + 4)}">{_text(text)}</text>')
        y += 23
    for note in sheet.notes:
        found.append(f'<text class="note" x="{_n(_MARGIN)}" y="{_n(y + 12)}">{_text(note)}</text>')
        y += 19
    return found, y + _MARGIN - 6


def _rect(x: float, y: float, width: float, height: float, round_: float, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    return f'<rect{named} x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="{_n(round_)}"/>'


# -- lines ---------------------------------------------------------------------------------------


def _points(edge: dict[str, list[dict[str, float]]]) -> list[Point]:
    return [(point["x"], point["y"]) for point in edge["points"]]


def _path(points: Sequence[Point]) -> str:
    """Return a polyline with round corners; it stops short of its end, where the head is."""
    end = _short_of(points[-2], points[-1], _ARROW - 1)
    parts = [f"M{_n(points[0][0])} {_n(points[0][1])}"]
    for before, corner, behind in zip(points, points[1:], [*points[2:-1], end], strict=False):
        if corner is points[-1]:
            break
        reach = min(_ROUND, math.dist(before, corner) / 2, math.dist(corner, behind) / 2)
        start, stop = _short_of(before, corner, reach), _short_of(behind, corner, reach)
        parts.append(f"L{_n(start[0])} {_n(start[1])}Q{_n(corner[0])} {_n(corner[1])} {_n(stop[0])} {_n(stop[1])}")
    return "".join([*parts, f"L{_n(end[0])} {_n(end[1])}"])


def _short_of(start: Point, end: Point, by: float) -> Point:
    length = math.dist(start, end)
    share = 0.0 if length == 0 else min(1.0, by / length)
    return end[0] + share * (start[0] - end[0]), end[1] + share * (start[1] - end[1])


def _head(points: Sequence[Point]) -> str:
    (x, y), back = points[-1], _short_of(points[-2], points[-1], _ARROW)
    length = math.dist(back, (x, y)) or 1.0
    sideways = (_ARROW / 2 * (y - back[1]) / length, _ARROW / 2 * (back[0] - x) / length)
    corners = ((x, y), (back[0] + sideways[0], back[1] + sideways[1]), (back[0] - sideways[0], back[1] - sideways[1]))
    return f'<path class="tip" d="M{"L".join(f"{_n(a)} {_n(b)}" for a, b in corners)}Z"/>'


def _n(number: float) -> str:
    """Return a coordinate, to a tenth."""
    text = f"{number + 0.0:.1f}"
    return text.removesuffix(".0") if text != "-0.0" else "0"


def _text(text: str) -> str:
    return escape(writable(text))


# -- colours -------------------------------------------------------------------------------------


def _style() -> str:
    return (
        f"text{{font-family:{_SANS};text-anchor:middle}}\n"
        ".title,.note{text-anchor:start}.title{font-size:16px;font-weight:600}.note{font-size:12px}\n"
        ".head{font-size:13px;font-weight:600}.word,.mark{font-size:11px}text.mark{font-weight:600}\n"
        f".name,.data,.shape{{font-family:{_MONO};font-size:11px}}.name{{font-size:10.5px}}\n"
        ".line{fill:none;stroke-width:1.4}.site .line,.closed .line{stroke-width:2.2}\n"
        ".refused rect{stroke-dasharray:5 3}rect{stroke-width:1.3}.page{stroke:none}\n"
        + _colours(_LIGHT)
        + "@media (prefers-color-scheme:dark){\n"
        + _colours(_DARK)
        + "}\n"
    )


def _colours(colours: dict[str, str]) -> str:
    rules = [
        f"rect.page{{fill:{colours['page']}}}",
        f"text{{fill:{colours['ink']}}}.name,.shape,.note,.word{{fill:{colours['dim']}}}",
        f".line{{stroke:{colours['wire']}}}.tip{{fill:{colours['wire']}}}",
    ]
    for kind in _FILLED:
        fill, stroke = colours[kind].split()
        rules.append(f".{kind} rect{{fill:{fill};stroke:{stroke}}}")
    for kind in _MARKED:
        fill, ink = colours[kind].split()
        rules.append(f".{kind} .line{{stroke:{fill}}}.{kind} .tip,rect.mark,.{kind} rect.mark{{fill:{fill}}}")
        rules.append(f".{kind} text.mark{{fill:{ink}}}")
    return "".join(f"{rule}\n" for rule in rules)
