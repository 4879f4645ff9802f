"""The sweep over single operators: about a thousand tiny models with inputs, from Debian's `libonnx-testdata`.

    python -m benchmarks.third_party.operators CACHE FIRST

works on one after another, from the given one on, and prints a line of JSON for each. Should one of them take the
process down with it, a new one goes on behind it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from benchmarks.third_party.catalogue import Subject
from benchmarks.third_party.compare import TOLERANCE
from benchmarks.third_party.packages import PACKAGES, fetch
from benchmarks.third_party.survey import Bench, Facts, Step, taken

PACKAGE = "libonnx-testdata"
_DATA = "usr/share/libonnx-testdata/data"
_PATIENCE = 120


def models(cache: Path) -> list[Path]:
    """Return the files of all models, in a fixed order."""
    return sorted((fetch(PACKAGES[PACKAGE], cache) / _DATA).glob("*/*/model.onnx"))


def sweep(cache: Path) -> list[dict[str, Any]]:
    """Return the steps taken with every model, each as a dictionary with the keys `model` and `steps`."""
    files = models(cache)
    found: list[dict[str, Any]] = []
    while len(found) < len(files):
        command = [sys.executable, "-m", "benchmarks.third_party.operators", str(cache), str(len(found))]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            found += [json.loads(line) for line in process.stdout]
        if len(found) < len(files) and process.returncode:
            crash = asdict(Step("load", "defect", f"the process ended with {process.returncode}", 0.0, 0))
            found.append({"model": _name(files[len(found)]), "steps": [crash]})
    return found


def tried(path: Path) -> list[Step]:
    """Take the steps of the sweep with one model."""
    try:
        inputs = _inputs(path)
    except ValueError as error:
        return [Step("load", "left out", str(error), 0.0, 0)]
    rows = next((len(values) for values in inputs.values() if values.ndim), 1)
    axes = {name: None for name, values in inputs.items() if not values.ndim}
    subject = Subject(_name(path), PACKAGE, str(path), lambda rng, size: inputs, axes, rows=rows)
    bench = Bench(path, subject)
    places = [f"{path}: ", f"{path.parent}/"]
    found = []
    for name, function in (("load", bench.load), ("copy", bench.copy), ("intervene", bench.intervene)):
        found.append(taken(name, function, places))
        if found[-1].outcome != "done":
            break
    return found


def _inputs(path: Path) -> dict[str, np.ndarray]:
    graph = onnx.load(path).graph
    known = {item.name for item in graph.initializer}
    inputs = {}
    for index, info in enumerate(item for item in graph.input if item.name not in known):
        if not info.type.HasField("tensor_type"):
            raise ValueError("its inputs are no tensors")
        file = path.parent / "test_data_set_0" / f"input_{index}.pb"
        inputs[info.name] = numpy_helper.to_array(onnx.TensorProto.FromString(file.read_bytes()))
    return inputs


def _name(path: Path) -> str:
    return f"{path.parents[1].name}/{path.parent.name}"


def summary(found: list[dict[str, Any]]) -> Facts:
    """Return how many models came how far, and the reasons why others did not, those of one kind together."""
    ended: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    differences = {}
    for item in found:
        last = item["steps"][-1]
        if last["outcome"] != "done":
            # Names and numbers differ from model to model.
            kind = re.sub(r"'[^']*'|[0-9]+|for operator [A-Za-z]+|for [A-Z][A-Za-z]+", "", last["reason"])
            ended.setdefault((last["name"], last["outcome"], kind), []).append((item["model"], last["reason"]))
        for step in item["steps"]:
            if step["name"] == "copy" and step["outcome"] == "done":
                differences[item["model"]] = step["facts"]["difference"]
    different = {name: value for name, value in differences.items() if not value <= TOLERANCE}
    groups = sorted(ended.items(), key=lambda group: -len(group[1]))
    return {
        "models": len(found),
        "same": len(differences) - len(different),
        "difference": max((value for name, value in differences.items() if name not in different), default=0.0),
        "different": different,
        "ended": [
            {"step": step, "outcome": outcome, "count": len(items), "example": items[0][0], "reason": items[0][1]}
            for (step, outcome, _), items in groups
        ],
    }


def main(cache: Path, first: int) -> None:
    """Work on all models from one on."""
    for path in models(cache)[first:]:
        told = {"model": _name(path), "steps": [asdict(step) for step in tried(path)]}
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
