"""The command line: fetch, take the steps with every model in a process of its own, show and save what was found."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import benchmarks.third_party
from benchmarks.speed.machine import cores
from benchmarks.third_party import operators, report
from benchmarks.third_party.catalogue import SUBJECTS, Subject
from benchmarks.third_party.packages import PACKAGES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "third-party.json"
PAGE = ROOT / "docs" / "third-party.md"
VERSIONS = ("onnxcare", "onnx", "onnxruntime-gpu", "onnxruntime", "numpy")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.third_party",
        description=benchmarks.third_party.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only",
        nargs="+",
        default=[],
        metavar="WORD",
        help="models whose names hold a word; other rows stay",
    )
    parser.add_argument("--no-operators", action="store_true", help="leave out the sweep over operators")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "onnxcare-third-party")
    parser.add_argument("--patience", type=int, default=900, metavar="S", help="for all steps of a model")
    parser.add_argument("--json", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--page", type=Path, default=PAGE, metavar="FILE")
    return parser.parse_args()


def examine(subject: Subject, cache: Path, patience: int) -> dict[str, Any]:
    """Take the steps with a model in a process of its own, and return what is saved of them."""
    package = PACKAGES[subject.package]
    path = subject.path(cache)
    command = [sys.executable, "-m", "benchmarks.third_party.survey", subject.name, str(cache)]
    ended = None
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=patience)
        told = run.stdout
        if run.returncode:
            ended = ("defect", f"the process ended with {run.returncode}: {run.stderr.strip()[-200:]}")
    except subprocess.TimeoutExpired as late:
        told = (late.stdout or b"").decode()
        ended = ("out of time", f"not done after {patience} s")
    steps = [json.loads(line) for line in told.splitlines()]
    if ended is not None:
        reached = NAMES[len(steps)]
        steps.append({"name": reached, "outcome": ended[0], "reason": ended[1], "seconds": 0.0, "peak": 0, "facts": {}})
    return {
        "name": subject.name,
        "package": f"{package.name} {package.version}",
        "licence": package.licence,
        "file": subject.file,
        "bytes": path.stat().st_size,
        "steps": steps,
    }


NAMES = ("load", "copy", "intervene", "experiment", "locate", "fix")


def main() -> int:
    """Examine the models; return 1 if something answers otherwise than the file itself, or fails without a reason."""
    arguments = _arguments()
    arguments.cache.mkdir(parents=True, exist_ok=True)
    old = json.loads(arguments.json.read_text(encoding="utf-8")) if arguments.json.is_file() else {}
    known = {found["name"]: found for found in old.get("models", [])}
    models, swept = list(known.values()), old.get("operators")
    for subject in SUBJECTS:
        if not arguments.only or any(word in subject.name for word in arguments.only):
            print(f"{subject.name} ...", file=sys.stderr, flush=True)
            known[subject.name] = examine(subject, arguments.cache, arguments.patience)
            # Whatever happens to the next one.
            models = [known[item.name] for item in SUBJECTS if item.name in known]
            report.save(models, swept, header(), arguments.json)
    if not arguments.no_operators and not arguments.only:
        swept = operators.summary(operators.sweep(arguments.cache))
    report.show(models, swept)
    report.save(models, swept, header(), arguments.json)
    report.write_page(models, swept, arguments.page)
    return int(any(_wrong(step) for found in models for step in found["steps"]) or bool(swept and swept["different"]))


def _wrong(step: dict[str, Any]) -> bool:
    facts = step["facts"]
    differs = step["name"] == "copy" and bool(facts) and not report.same(facts["difference"])
    return differs or bool(facts.get("differing")) or step["outcome"] == "defect"


def header() -> dict[str, Any]:
    """Return what the figures depend on."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    today = datetime.date.today().isoformat()
    return {"date": today, "cores": cores(), "python": platform.python_version(), "versions": versions}


if __name__ == "__main__":
    raise SystemExit(main())
