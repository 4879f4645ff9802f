"""A process that runs one command line after another, so that a crash of native code ends it and not the tests.

Run as a script it takes command lines, one JSON list a line, from standard input.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_ROOT = Path(__file__).parent.parent.parent
# A damaged file may ask for any amount of memory, or loop for ever.
_MEMORY, _SECONDS = 8 << 30, 60


@dataclass(frozen=True)
class Outcome:
    """How a command line ended.

    Attributes:
        code: its exit code; None where the process died or was stopped.
        stdout: what it printed.
        stderr: what it complained about; the reason, where the process died.
    """

    code: int | None
    stdout: str
    stderr: str


class Worker:
    """Runs command lines in another process, which is started again where it died."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None

    def run(self, *args: object) -> Outcome:
        """Run `onnxcare` with these arguments."""
        process = self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([str(arg) for arg in args]) + "\n")
        process.stdin.flush()
        ready, _, _ = select.select([process.stdout], [], [], _SECONDS)
        line = process.stdout.readline() if ready else ""
        if line:
            return Outcome(**json.loads(line))
        if not ready:
            process.kill()
        status = process.wait()
        self._process = None
        return Outcome(None, "", f"ended with {status}" if ready else f"still running after {_SECONDS} s")

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env={**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"},
            )
        return self._process


def _serve(commands: IO[str], answers: IO[str]) -> None:
    from click.testing import CliRunner

    from onnxcare.cli import main

    for line in commands:
        result: Any = CliRunner().invoke(main, json.loads(line))
        answer = {"code": result.exit_code, "stdout": result.stdout, "stderr": result.stderr}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    _serve(sys.stdin, sys.stdout)
