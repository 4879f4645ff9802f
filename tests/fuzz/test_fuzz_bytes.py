"""Damaged files: whatever is in them, a command ends with an exit code that stands for something, and leaves no trace.

onnxruntime itself may crash on a damaged model, so the commands run in a process of their own. Such crashes are
counted and shown; all else is a failure.
"""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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

_JUDGED = ("model.onnx", "care.yaml", "repair.npz", "holdout.npz", "trigger.npz")
# Command lines, the files they read, and how often they come.
_COMMANDS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("inspect model.onnx", ("model.onnx",), 8),
    ("inspect model.onnx --format json --picture graph.svg", ("model.onnx",), 4),
    ("check model.onnx --spec care.yaml --device cpu", _JUDGED, 6),
    ("locate model.onnx --spec care.yaml --device cpu", _JUDGED, 1),
    *(
        (f"fix model.onnx --spec care.yaml --device cpu -o out.onnx --method {method}", _JUDGED, 1)
        for method in ("ai-lancet-flip", "ai-lancet-finetune", "clp", "fine-pruning", "fine-tuning", "auto")
    ),
    ("diff model.onnx other.onnx --device cpu", ("model.onnx", "other.onnx"), 4),
    ("diff model.onnx other.onnx --device cpu --data repair.npz", ("model.onnx", "other.onnx", "repair.npz"), 2),
    ("apply model.onnx change.safetensors -o out.onnx", ("change.safetensors", "model.onnx"), 4),
    ("apply --revert other.onnx change.safetensors -o out.onnx", ("change.safetensors", "other.onnx"), 2),
)
pytestmark = pytest.mark.skipif(os.name != "posix", reason="memory and time are limited as POSIX systems do it")
# Of so many commands one may end in a crash of native code.
_CRASHES = 200


@dataclass(frozen=True)
class Case:
    """A command line with names of files in it, and the files."""

    args: list[str]
    held: dict[str, bytes]

    def __repr__(self) -> str:
        return f"{' '.join(self.args)} on {' '.join(f'{name} ({len(data)} bytes)' for name, data in self.held.items())}"


@st.composite
def cases(draw: Callable[..., Any]) -> Case:
    """Draw a command line and files, one of which is damaged."""
    sound = files(draw(st.sampled_from(sorted(MAKERS))))
    line, read, _ = draw(st.sampled_from([command for command in _COMMANDS for _ in range(command[2])]))
    beside = [name for name in sound if name == "weights.bin"]
    return Case(line.split(), draw(damaged({name: sound[name] for name in (*read, *beside)})))


class Tried:
    """A check of one command on damaged files after another, and how they ended."""

    def __init__(self, worker: Worker) -> None:
        self.seen: Counter[tuple[str, str]] = Counter()
        self.crashes: list[str] = []
        self._worker = worker

    def __call__(self, case: Case) -> None:
        args = case.args
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for file, data in case.held.items():
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
            meant = {args[args.index(flag) + 1] for flag in ("-o", "--picture") if flag in args}
            # Where there is nothing to repair, nothing is written.
            allowed = (meant, set()) if args[0] == "fix" else (meant,)
            assert made in (allowed if outcome.code == 0 else (set(),)), f"{made} is there after {outcome}"

    def table(self) -> str:
        commands = sorted({command for command, _ in self.seen})
        endings = sorted({ending for _, ending in self.seen})
        rows = [[command, *(str(self.seen[command, ending]) for ending in endings)] for command in commands]
        return "\n".join([aligned([["on damaged files", *endings], *rows]), *self.crashes])

    def check(self) -> None:
        total = sum(self.seen.values())
        assert len(self.crashes) <= 1 + total // _CRASHES, self.table()
        assert all(self.seen["inspect", ending] > total / 50 for ending in ("0", "3"))


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


@pytest.mark.slow
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
