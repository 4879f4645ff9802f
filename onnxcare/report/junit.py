"""A check as JUnit XML, for the test reports of CI servers.

The first suite is the graph, with a case for each rule; then comes a suite for each property and one for the guards,
with a case for each measure that has a limit. Measures without one are properties of their suite. Suites and cases
keep their names from run to run, so that a server can tell what is new.
"""

# mypy: untyped-calls-exclude=junitparser

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from junitparser import Failure, Skipped
from junitparser.xunit2 import JUnitXml, TestCase, TestSuite

from onnxcare._version import __version__
from onnxcare.findings import RULES, StaticFinding
from onnxcare.measures import Finding, Measure
from onnxcare.report.words import amount, described, one_line, writable
from onnxcare.results import Check


def render(check: Check) -> str:
    """Return a check as JUnit XML; what fails is a failure, and so is what is undecided."""
    report = JUnitXml(one_line(f"onnxcare check {check.model}"))
    report.add_testsuite(_graph(check))
    for finding in check.verdict.findings if check.verdict is not None else ():
        report.add_testsuite(_suite(finding, check.confidence))
    report.update_statistics()
    report.time = round(check.seconds, 3)
    root = ElementTree.fromstring(report.tostring())
    ElementTree.indent(root)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{ElementTree.tostring(root, encoding="unicode")}\n'


def _graph(check: Check) -> TestSuite:
    suite = TestSuite("onnxcare.graph")
    for name, value in _circumstances(check).items():
        suite.add_property(name, one_line(value))
    by_rule: dict[str, list[StaticFinding]] = {rule.id: [] for rule in RULES}
    for item in check.static:
        by_rule.setdefault(item.rule, []).append(item)
    suite.add_testcases([_rule(rule, found, check.verdict is not None) for rule, found in by_rule.items()])
    _tell(suite, check.run.notes if check.run is not None else ())
    return suite


def _circumstances(check: Check) -> dict[str, str]:
    found = {"version": __version__, "model": check.model, "spec": check.spec, "status": check.status}
    if check.baseline is not None:
        found["baseline"] = check.baseline
    if check.run is not None:
        found |= {"sha256": check.run.sha256, "device": check.run.device, "seed": str(check.run.seed)}
        found |= {f"samples {part}": str(count) for part, count in check.run.samples.items()}
    return found


def _rule(rule: str, found: Sequence[StaticFinding], completed: bool) -> TestCase:
    # Time is measured for the whole check alone.
    case = TestCase(rule, "onnxcare.graph", time=0)
    lines = [f"{item.level}: {f'{item.where}: ' if item.where else ''}{item.message}" for item in found]
    errors = [item for item in found if item.level == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
        case.result = Failure(one_line(errors[0].message) + more, "error")
    elif not found and not completed:
        case.result = Skipped("the file is not safe to run, so not every rule was looked at")
    _tell(case, lines)
    return case


def _suite(finding: Finding, confidence: float) -> TestSuite:
    name = one_line(f"onnxcare.{finding.kind}.{finding.name}")
    suite = TestSuite(name)
    for item in finding.measures:
        if item.status == "info":
            suite.add_property(one_line(item.name), one_line(amount(item, confidence)))
    suite.add_testcases([_case(name, item, confidence) for item in finding.measures if item.status != "info"])
    _tell(suite, finding.notes)
    return suite


def _case(suite: str, item: Measure, confidence: float) -> TestCase:
    case = TestCase(one_line(item.name), suite, time=0)
    text = described(item, confidence)
    if item.status != "pass":
        case.result = Failure(text, item.status)
    _tell(case, [text])
    return case


def _tell(element: TestSuite | TestCase, lines: Sequence[str]) -> None:
    if lines:
        element.system_out = writable("\n".join(lines))
