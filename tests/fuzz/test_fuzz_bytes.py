"""Damaged files: whatever is in them, a command ends with an exit code that stands for something, and leaves no trace.

onnxruntime itself may crash on a damaged model, so the commands run in a process of their own. Such crashes are counted and
shown; all else is a failure.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus.survey import aligned
from fuzz.damage import damaged
from fuzz.rounds import fresh, same
from fuzz.seeds import MAKERS, files
from fuzz.worker import Outcome, Worker
from helpers import contents
from hypothesis import strategies as st

_METHODS = ("ai-lancet-flip", "ai-lancet-finetune", "clp", "fine-pruning", "fine-tuning", "auto")
# Of so many commands one may end in a crash of native code.
_CRASHES = 200


@st.composite
def cases(draw: Callable[..., Any]) -> tuple[list[str], dict[str, bytes]]:
    """Draw a command line, with names of files in it, and the files."""
    held = draw(damaged(files(draw(st.sampled_from(sorted(MAKERS))))))
    command = draw(st.sampled_from(["inspect"] * 5 + ["check"] * 3 + ["fix"] * 2))
    args = [command, "model.onnx"]
    if command != "inspect":
        args += ["--device", "cpu", "--spec", "care.yaml"]
    if command == "fix":
        args += ["-o", "out.onnx", "--method", draw(st.sampled_from(_METHODS))]
    return args, held


class Tried:
    """A check of one command on damaged files after another, and how they ended."""

    def __init__(self, worker: Worker) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.crashes: list[str] = []
        self._worker = worker

    def __call__(self, case: tuple[list[str], dict[str, bytes]]) -> None:
        args, held = case
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in held.items():
                (folder / file).write_bytes(data)
            before = contents(folder)
            outcome = self._worker.run(*(folder / arg if "." in arg else arg for arg in args))
            self.seen[args[0], "crash" if outcome.code is None else str(outcome.code)] += 1
            if outcome.code is None:
                self.crashes.append(f"{outcome.stderr}: {' '.join(args)}")
            else:
                check_ending(outcome)
            after = contents(folder)
            made = {file for file in after if file not in before}
            assert {file: data for file, data in after.items() if file in before} == before, "an input has changed"
            assert made == ({"out.onnx"} if outcome.code == 0 and args[0] == "fix" else set()), f"{made} is left behind"

    def table(self) -> str:
        commands = sorted({command for command, _ in self.seen})
        endings = sorted({ending for _, ending in self.seen})
        rows = [[command, *(str(self.seen[command, ending]) for ending in endings)] for command in commands]
        return "\n".join([aligned([["on damaged files", *endings], *rows]), *self.crashes])

    def check(self) -> None:
        total = sum(self.seen.values())
        assert len(self.crashes) <= 1 + total // _CRASHES, self.table()
        assert self.seen["inspect", "0"] > total / 50 and self.seen["inspect", "3"] > total / 50


def check_ending(outcome: Outcome) -> None:
    """Check that a command answered, or explained in a line or two why not."""
    seen = f"exit code {outcome.code}\n{outcome.stdout}\n{outcome.stderr}"
    assert outcome.code in (0, 1, 2, 3), seen
    assert "Traceback" not in seen and "Warning" not in outcome.stderr, seen
    if outcome.code in (0, 1):
        assert outcome.stdout and not outcome.stderr, seen
        return
    lines = outcome.stderr.splitlines()
    assert not outcome.stdout and 1 <= len(lines) <= 2 and max(map(len, lines)) < 600, seen
    assert lines[0].startswith("onnxcare: "), seen


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.close()


def test_damaged_files(worker: Worker, record_property) -> None:  # type: ignore[no-untyped-def]
    tried = Tried(worker)
    same(tried, cases(), 500)
    record_property("table", tried.table())
    tried.check()


@pytest.mark.slow
def test_many_damaged_files(worker: Worker, record_property) -> None:  # type: ignore[no-untyped-def]
    tried = Tried(worker)
    fresh(tried, cases(), seconds=240)
    record_property("table", tried.table())
    tried.check()
