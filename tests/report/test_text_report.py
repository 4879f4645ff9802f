"""Results as text: the figures, the limits and the conclusion, and no accident with markup in names."""

from __future__ import annotations

import dataclasses

import pytest
from cases import SQUARE
from rich.console import Console

import onnxcare
from onnxcare.report import text
from onnxcare.results import Fix


@pytest.fixture(scope="module")
def fix(tmp_path_factory) -> Fix:
    out = tmp_path_factory.mktemp("report") / "out.onnx"
    return onnxcare.fix(SQUARE / "model.onnx", SQUARE / "care.yaml", out, device="cpu")


def printed(show, result) -> str:
    console = Console(width=160, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115, PTH123
    show(result, console)
    return console.export_text()


def test_a_repair_shows_rates_limits_and_the_file(fix):
    shown = printed(text.show_fix, fix)
    finding = fix.verdict.properties[0]
    assert f"({finding.before.count}/{finding.before.total})" in shown
    assert f"({finding.after.count}/{finding.after.total})" in shown
    assert "<= 0.50" in shown
    assert "dense1.weight" in shown
    assert "fail" not in shown
    assert shown.rstrip().splitlines()[-1].startswith("repaired in")
    assert fix.output is not None
    assert fix.output in shown


def test_a_failure_says_so_last(fix):
    failed = dataclasses.replace(fix, status="not repaired", output=None)
    assert "nothing was written" in printed(text.show_fix, failed).rstrip().splitlines()[-1]


def test_names_with_brackets_are_printed_as_they_are(fix):
    finding = dataclasses.replace(fix.verdict.properties[0], name="[red]x[/nothing]")
    verdict = dataclasses.replace(fix.verdict, properties=(finding,))
    assert "[red]x[/nothing]" in printed(text.show_fix, dataclasses.replace(fix, verdict=verdict))


def test_inspection_names_layers_and_reasons():
    shown = printed(text.show_inspection, onnxcare.inspect(SQUARE / "model.onnx"))
    for expected in ("/dense1/Gemm", "/pool2/MaxPool_output_0", "opset 17", "input image: float32"):
        assert expected in shown


def test_location_lists_sites_and_units():
    location = onnxcare.locate(SQUARE / "model.onnx", SQUARE / "care.yaml", device="cpu", samples=30, values=3)
    shown = printed(text.show_location, location)
    assert location.units[0].site in shown
    assert f"{location.units[0].score:.4f}" in shown
    assert "more; --json lists all" in shown
    assert [unit.score for unit in location.units] == sorted((u.score for u in location.units), reverse=True)
