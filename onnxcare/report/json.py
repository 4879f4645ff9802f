"""Results as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np

from onnxcare._version import __version__
from onnxcare.graph.view import as_text
from onnxcare.inspection.base import Inspection
from onnxcare.measures import Finding, Measure, Rate
from onnxcare.results import Check

# What `check` writes is a published format: check.schema.json, beside this module, describes it. Whoever takes
# something out of it, or changes what something means, raises the version.
CHECK_FORMAT = "onnxcare.check"
CHECK_VERSION = 1
# So is what `inspect` writes, and inspect.schema.json.
INSPECT_FORMAT = "onnxcare.inspect"
INSPECT_VERSION = 1


def render(result: Any) -> str:
    """Return a result object as indented JSON; NaN and infinity become null."""
    return dump(result)


def render_check(check: Check) -> str:
    """Return a check as a document of the published format."""
    run = check.run
    verdict = check.verdict
    return dump(
        {
            "format": CHECK_FORMAT,
            "format_version": CHECK_VERSION,
            "tool": {"name": "onnxcare", "version": run.version if run is not None else __version__},
            "model": {"path": check.model, "sha256": run.sha256 if run is not None else None},
            "spec": check.spec,
            "baseline": check.baseline,
            "status": check.status,
            "exit_code": check.exit_code,
            "seconds": round(check.seconds, 3),
            "confidence": check.confidence,
            "device": run.device if run is not None else None,
            "seed": run.seed if run is not None else None,
            "samples": run.samples if run is not None else None,
            "notes": list(run.notes) if run is not None else [],
            "findings": [_finding(item) for item in verdict.findings] if verdict is not None else [],
            "static": [
                {"rule": item.rule, "level": item.level, "where": item.where, "message": item.message}
                for item in check.static
            ],
        }
    )


def render_inspection(inspection: Inspection) -> str:
    """Return what a model consists of as a document of the published format."""
    file = inspection.file
    return dump(
        {
            "format": INSPECT_FORMAT,
            "format_version": INSPECT_VERSION,
            "tool": {"name": "onnxcare", "version": __version__},
            "model": {
                "path": file.path,
                "sha256": file.sha256,
                "bytes": file.bytes,
                "external_data": [{"path": path, "bytes": size} for path, size in file.external.items()],
                "ir_version": file.ir_version,
                "opsets": file.opsets,
                "producer": file.producer,
                "metadata": file.metadata,
                "functions": file.functions,
                "quantised": file.quantised,
                "nodes": inspection.nodes,
                "operators": inspection.operators,
            },
            "inputs": inspection.inputs,
            "outputs": inspection.outputs,
            "numbers": {
                "all": inspection.numbers,
                "weights": sum(layer.weights for layer in inspection.layers),
                "biases": sum(layer.biases for layer in inspection.layers),
                "other": inspection.other,
            },
            "layers": inspection.layers,
            "sites": inspection.sites,
            "obstacle": inspection.obstacle,
        }
    )


def dump(value: Any) -> str:
    """Return anything as indented JSON; NaN and infinity become null, what is no Unicode a question mark."""
    text = json.dumps(_plain(value), indent=2, ensure_ascii=False) + "\n"
    # Names of files may hold bytes that are no text.
    return text.encode("utf-8", "replace").decode("utf-8")


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "kind": finding.kind,
        "status": finding.status,
        "notes": list(finding.notes),
        "measures": [_measure(item) for item in finding.measures],
    }


def _measure(item: Measure) -> dict[str, Any]:
    return {
        "name": item.name,
        "unit": item.unit,
        **_quantity(item.after),
        "low": item.low,
        "high": item.high,
        "before": None if item.before is None else _before(item.before),
        "limit": item.limit,
        "higher_is_better": item.higher_is_better,
        "status": item.status,
        "needed": item.needed,
        "worse": item.worse,
    }


def _before(value: Rate | float) -> dict[str, Any]:
    interval = (value.low, value.high) if isinstance(value, Rate) else (None, None)
    return {**_quantity(value), "low": interval[0], "high": interval[1]}


def _quantity(value: Rate | float) -> dict[str, Any]:
    if isinstance(value, Rate):
        return {"value": value.value, "count": value.count, "total": value.total}
    return {"value": value, "count": None, "total": None}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        # What a result derives from its fields belongs to it: drops, costs, whether it passed.
        for name, item in vars(type(value)).items():
            if isinstance(item, property):
                found[name] = _plain(getattr(value, name))
        return found
    if isinstance(value, dict) or hasattr(value, "items"):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return as_text(value)
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
