"""What `inspect` finds, as text."""

from __future__ import annotations

import os
import re
from pathlib import Path

import onnx
import pytest
from graph.models import SUBJECTS, build, random, save
from rich.console import Console

from onnxcare.inspection import Inspection, inspect_model
from onnxcare.report.inspection import show_inspection


def printed(inspection: Inspection, width: int = 120) -> str:
    with open(os.devnull, "w", encoding="utf-8") as nowhere:  # noqa: PTH123
        console = Console(width=width, highlight=False, record=True, file=nowhere)
        show_inspection(inspection, console)
        return console.export_text()


def of(proto: onnx.ModelProto, folder: Path) -> Inspection:
    return inspect_model(save(proto, folder))


def tied() -> onnx.ModelProto:
    return build(
        """tied (int64[N] x) => (float[N, 9] y) {
            [embed] e = Gather (E, x)
            [turn] t = Transpose <perm = [1, 0]> (E)
            [first] a = Gemm (e, W, b)
            [relu] h = Relu (a)
            [score] y = MatMul (h, t)
        }""",
        {"E": random(9, 4), "W": random(4, 4), "b": random(4)},
    )


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", ["mlp", "residual", "acas"])
def test_columns_sum_to_what_is_printed_and_fit_the_terminal(tmp_path: Path, name: str, width: int) -> None:
    found = of(SUBJECTS[name]().proto, tmp_path)
    shown = printed(found, width)
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= width
    table = shown[: shown.index("numbers are stored in all")]
    (other,) = re.findall(r"other constants +([\d,]+)", table)
    weights, biases = (int(text.replace(",", "")) for text in re.findall(r"all together +([\d,]+) +([\d,]+)", table)[0])
    assert weights == sum(item.weights for item in found.layers) + int(other)
    assert biases == sum(item.biases for item in found.layers)
    assert f"{weights + biases:,} numbers are stored in all." in shown


def test_a_layer_has_one_line_where_there_is_room_and_else_several(tmp_path: Path) -> None:
    found = of(SUBJECTS["cnn"]().proto, tmp_path)
    wide, narrow = printed(found, 140), printed(found, 80)
    assert re.search(r"conv2 +Conv +\[N, 4, 4, 4\] -> \[N, 6, 4, 4\] +216 +6 +all", wide)
    assert re.search(r"conv2 +\[N,4,4,4\] +216 +6 +all *\n Conv +-> \[N,6,4,4\]", narrow)


def test_reasons_stand_below_and_are_told_once(tmp_path: Path) -> None:
    shown = printed(of(SUBJECTS["residual"]().proto, tmp_path))
    reason = "'h' is also read by Add add"
    assert shown.count(reason) == 1
    (mark,) = re.findall(rf"(\[\d+\]) {re.escape(reason)}", shown)
    lines = [line for line in shown.splitlines() if mark in line]
    assert len(lines) == 3  # the layer, the site, and the reason
    assert "all but care" in next(line for line in lines if line.startswith(" conv1"))


def test_what_is_tied_says_where_it_is_counted(tmp_path: Path) -> None:
    shown = printed(of(tied(), tmp_path))
    (mark,) = re.findall(r"(\[\d+\]) 'E' is counted at embed", shown)
    assert re.search(rf"score +MatMul .* 0 {re.escape(mark)} +0 ", shown)
    assert re.search(r"embed +Gather +\[N\] -> \[N, 4\] +36 +0 +none", shown)


def test_names_are_shown_as_they_are(tmp_path: Path) -> None:
    proto = tied()
    proto.graph.node[2].name = "[red]first[/nothing]"
    proto.graph.node[4].name = "bell\x07\x1b[31m"
    shown = printed(of(proto, tmp_path), 200)
    assert "[red]first[/nothing]" in shown and "bell\\x07\\x1b[31m" in shown
    assert "\x1b" not in shown and "\x07" not in shown
