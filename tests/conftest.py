from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Paths, write_case


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    from onnxcare.runtime import resolve_device

    if resolve_device("auto") != "cuda":
        pytest.skip("no GPU that onnxruntime can use")


@pytest.fixture(scope="session")
def samples() -> Path:
    """The folder of the sample models."""
    return Path(__file__).parent.parent / "sample_models"


@pytest.fixture
def tiny(tmp_path: Path) -> Paths:
    """A fresh copy of the tiny backdoored case."""
    return write_case(tmp_path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the tables that tests recorded; with several processes they arrive with the reports."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, text in getattr(report, "user_properties", []):
                if name == "table":
                    terminalreporter.write_sep("-", report.nodeid)
                    terminalreporter.write_line(text)
