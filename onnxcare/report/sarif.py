"""A check as SARIF 2.1.0, in the form that code scanning services such as GitHub's accept.

Static findings, and measures that fail or are undecided, are results; what passes is none. A model has no lines, so
every result stands at the first one, and what tells it from the others is its fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any
from urllib.parse import quote

from onnxcare._version import __version__
from onnxcare.findings import RULES, Rule
from onnxcare.measures import Finding
from onnxcare.report.json import dump
from onnxcare.report.words import described, one_line
from onnxcare.results import Check

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_CANNOT_PASS = (
    "A measure with a limit fails where the measured value breaks the limit; it is undecided, which is no pass, where "
    "the spec asks for a confidence and the interval does not keep the limit."
)

# One rule for each kind of property, and one for what has to be kept.
MEASURED: dict[str, Rule] = {
    "backdoor": Rule(
        "property-backdoor",
        "error",
        "A trigger makes the model answer what an attacker wants",
        f"Held-out samples were given the trigger of the spec. {_CANNOT_PASS} `onnxcare fix` takes the backdoor out.",
    ),
    "fairness": Rule(
        "property-fairness",
        "error",
        "Protected attributes decide",
        "Held-out individuals were given other values of the protected attributes, or groups were compared. "
        f"{_CANNOT_PASS} `onnxcare fix` makes the model look less at what it must not look at.",
    ),
    "safety": Rule(
        "property-safety",
        "error",
        "The model answers what the formula forbids",
        "Fresh samples of the input region of a VNN-LIB formula were tried, and counterexamples searched. "
        f"{_CANNOT_PASS} `onnxcare fix` repairs the answers in that region.",
    ),
    "errors": Rule(
        "property-errors",
        "error",
        "Samples of a kind are answered wrongly",
        f"Held-out samples of the kind that the spec names were counted. {_CANNOT_PASS} `onnxcare fix` repairs them.",
    ),
    "guards": Rule(
        "guard",
        "error",
        "What has to be kept is not kept",
        "Accuracy, the recall of a class or another figure under `keep` of the spec was measured on clean held-out "
        f"samples. {_CANNOT_PASS}",
    ),
}
_PLACEHOLDER = re.compile(r"\{(\d+)\}")
_SEVERITY = {"error": "error", "warning": "warning", "note": "recommendation"}


def render(check: Check) -> str:
    """Return a check as a SARIF log with one run."""
    rules = [*RULES, *MEASURED.values()]
    location = _location(check.model)
    return dump(
        {
            "$schema": _SCHEMA,
            "version": "2.1.0",
            "runs": [
                {
                    "tool": {
                        "driver": {
                            "name": "onnxcare",
                            "fullName": f"onnxcare {__version__}",
                            "semanticVersion": __version__,
                            "rules": [_rule(rule) for rule in rules],
                        }
                    },
                    # Services replace the results of the same category: each model needs one of its own.
                    "automationDetails": {"id": f"onnxcare/{location['uri']}/"},
                    "invocations": [
                        {
                            "executionSuccessful": True,
                            "exitCode": check.exit_code,
                            "toolExecutionNotifications": _notifications(check),
                        }
                    ],
                    "artifacts": [_artifact(check, location)],
                    "results": _results(check, rules, location),
                    "properties": {"status": check.status, "spec": check.spec, "baseline": check.baseline},
                }
            ],
        }
    )


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "id": rule.id,
        "shortDescription": {"text": rule.title},
        "fullDescription": {"text": rule.help},
        "help": {"text": rule.help},
        "defaultConfiguration": {"level": rule.level},
        "properties": {"tags": ["onnx"], "problem.severity": _SEVERITY[rule.level]},
    }


def _results(check: Check, rules: list[Rule], location: dict[str, str]) -> list[dict[str, Any]]:
    index = {rule.id: position for position, rule in enumerate(rules)}
    seen: Counter[str] = Counter()

    def result(rule: str, level: str, message: str, where: str, *identity: str) -> dict[str, Any]:
        place: dict[str, Any] = {"physicalLocation": {"artifactLocation": location, "region": {"startLine": 1}}}
        if where:
            place["logicalLocations"] = [{"name": one_line(where), "fullyQualifiedName": one_line(where)}]
        fingerprint = hashlib.sha256("\0".join([rule, *identity]).encode("utf-8", "replace")).hexdigest()[:16]
        seen[fingerprint] += 1
        return {
            "ruleId": rule,
            "ruleIndex": index[rule],
            "level": level,
            "message": {"text": _text(message)},
            "locations": [place],
            # The only fingerprint that GitHub compares; without it, it takes one of the first line of the file,
            # which is the same for all results and changes with every model.
            "partialFingerprints": {"primaryLocationLineHash": f"{fingerprint}:{seen[fingerprint]}"},
        }

    found = [result(item.rule, item.level, item.message, item.where, item.where) for item in check.static]
    for finding in check.verdict.findings if check.verdict is not None else ():
        for item in finding.measures:
            if item.status in ("fail", "undecided"):
                # What is undecided never passes, so both are errors.
                message = f"{finding.name}: {described(item, check.confidence)}."
                found.append(result(MEASURED[finding.kind].id, "error", message, "", finding.name, item.name))
    return found


def _notifications(check: Check) -> list[dict[str, Any]]:
    findings: tuple[Finding, ...] = check.verdict.findings if check.verdict is not None else ()
    notes = list(check.run.notes) if check.run is not None else []
    notes += [f"{finding.name}: {note}" for finding in findings for note in finding.notes]
    return [{"level": "note", "message": {"text": _text(note)}} for note in notes]


def _artifact(check: Check, location: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"location": location, "roles": ["analysisTarget"]}
    if check.run is not None:
        found["hashes"] = {"sha-256": check.run.sha256}
    return found


def _location(model: str) -> dict[str, str]:
    """Return where the model lies: relative to the current folder, which is the repository's in a CI run."""
    path = Path(os.path.normpath(Path(model).absolute()))
    if not path.is_relative_to(Path.cwd()):
        return {"uri": path.as_uri()}
    relative = path.relative_to(Path.cwd()).as_posix()
    return {"uri": quote(os.fsencode(relative)), "uriBaseId": "%SRCROOT%"}


def _text(message: str) -> str:
    """Return a message in which nothing out of a stranger's file reads as a link, or as a placeholder."""
    return _PLACEHOLDER.sub(r"{{\1}}", one_line(message).replace("](", "] ("))
