"""The reports of `check`: JSON, JUnit and SARIF hold what was found, and are what their formats say they are."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import junitparser
import numpy as np
import pytest
from jsonschema import Draft202012Validator
from rich.console import Console

from onnxcare._version import __version__
from onnxcare.data import PARTS
from onnxcare.findings import RULES, StaticFinding
from onnxcare.measures import Finding, Gauge, Measure, Verdict
from onnxcare.report import render_check, sarif, text, words
from onnxcare.results import Check, Run
from onnxcare.spec import KINDS

SHA = "0123456789abcdef" * 4
SWITCH = StaticFinding("input-switch", "error", "/trap/Greater", "Node '/trap/Greater' compares input values.")
UNUSED = StaticFinding("unused-initializer", "note", "spare", "No node reads 1 initializer ('spare').")
DOMAIN = StaticFinding("custom-domain", "warning", "", "2 nodes are custom operators.")
TWICE = StaticFinding("two-value-fields", "error", "w", "Tensor 'w' carries values in raw_data and float_data.")


def happened(count: int, total: int) -> np.ndarray:
    return np.arange(total) < count


def make(
    *properties: Finding,
    guards: tuple[Measure, ...] = (),
    static: tuple[StaticFinding, ...] = (),
    baseline: str | None = None,
    model: str = "models/digits.onnx",
    notes: tuple[str, ...] = (),
) -> Check:
    run = Run(__version__, model, SHA, "cpu", 7, dict.fromkeys(PARTS, 120), notes)
    verdict = Verdict(properties, Finding("kept", "guards", guards))
    return Check(run, model, "models/care.yaml", baseline, 0.95, verdict, static, 1.23456)


def backdoor(rate: int, name: str = "square", gauge: Gauge | None = None, total: int = 200) -> Finding:
    gauge = gauge or Gauge()
    measures = (
        gauge.rate("attack success rate", happened(rate, total)),
        gauge.rate("excess", happened(rate, total), limit=0.05),
    )
    return Finding(name, "backdoor", measures, ("The trigger is known.",))


def passing() -> Check:
    accuracy = Gauge().rate("accuracy", happened(199, 200), limit=0.9, higher_is_better=True)
    return make(backdoor(2), guards=(accuracy,), static=(UNUSED, DOMAIN), notes=("3 samples were left out.",))


def failing() -> Check:
    gauge = Gauge()
    before, after = happened(198, 200), happened(150, 200)
    guards = (
        gauge.rate("accuracy", after, before, limit=0.9, higher_is_better=True),
        gauge.drop("accuracy drop", before, after, 0.01),
        gauge.points("balanced accuracy", 0.75, 0.99),
    )
    return make(backdoor(190), guards=guards, static=(SWITCH,), baseline="models/old.onnx")


def undecided() -> Check:
    gauge = Gauge(0.95)
    empty = gauge.rate("recall of class 3", happened(0, 0), limit=0.5, higher_is_better=True)
    number = gauge.points("largest violation", math.nan, unit="number")
    return make(backdoor(2, gauge=gauge, total=50), guards=(empty, number))


def unsafe() -> Check:
    return Check(None, "models/digits.onnx", "models/care.yaml", None, 0.95, None, (TWICE, SWITCH), 0.01)


CHECKS = {"passing": passing, "failing": failing, "undecided": undecided, "unsafe": unsafe}


@pytest.fixture(params=CHECKS, scope="module")
def check(request: pytest.FixtureRequest) -> Check:
    return CHECKS[request.param]()


def test_the_samples_of_this_test_are_what_they_are_called():
    assert [make().status for make in CHECKS.values()] == ["pass", "fail", "undecided", "fail"]


# -- in words ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (
            Gauge().rate("accuracy", happened(3, 4), limit=0.8, higher_is_better=True),
            "accuracy: 75 % (3 of 4), 95 % interval 19.412 to 99.369 %; the limit is at least 80 %; fails",
        ),
        (
            Gauge().points("gap", 0.0125, 0.3, limit=0.02, interval=(0.0, 0.015)),
            "gap: 1.25 points, 95 % interval 0 to 1.5 points; the baseline has 30 points; the limit is at most 2 "
            "points; passes",
        ),
        (Gauge().points("largest", math.nan, unit="number"), "largest: not a number"),
        (Gauge().points("largest", 1e-7, unit="number"), "largest: 1e-07"),
        (Gauge().points("gap", 0.1 + 0.2 - 0.3), "gap: 0 points"),
        (Gauge().rate("nobody", happened(0, 0)), "nobody: no samples"),
        (
            Gauge(0.95).rate("attack", happened(0, 100), limit=0.01),
            "attack: 0 % (0 of 100), 95 % interval 0 to 3.6217 %; the limit is at most 1 %; undecided, which is no "
            # ln(40) / -ln(0.99) samples without a single success
            "pass: the interval does not keep the limit; 368 samples like these would decide",
        ),
    ],
)
def test_a_measure_in_words(item, expected):
    assert words.described(item, 0.95) == expected


def test_names_lose_nothing_but_what_cannot_be_written():
    assert words.one_line("a\x00b\tc\nd\x7fe\ud800f\uffff ü 漢 \U0001f600") == (
        "a\\x00b\\tc\\nd\\x7fe\\ud800f\\uffff ü 漢 \U0001f600"
    )
    assert words.writable("a\x1b\nb\ud800") == "a\\x1b\nb\\ud800"


# -- JSON ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    content = json.loads(resources.files("onnxcare.report").joinpath("check.schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)


def document(check: Check) -> Any:
    return json.loads(render_check(check, "json"), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        if "object" in schema.get("type", ()) and isinstance(schema.get("properties"), dict):
            yield schema
        for item in schema.values():
            yield from objects(item)
    elif isinstance(schema, list):
        for item in schema:
            yield from objects(item)


def test_the_schema_allows_nothing_it_does_not_name(schema):
    found = list(objects(schema.schema))
    assert len(found) == 8
    for item in found:
        assert item["additionalProperties"] is False
        assert set(item["required"]) == set(item["properties"])


def test_json_is_what_the_schema_says(check, schema):
    schema.validate(document(check))


def test_json_holds_what_was_found():
    found = document(failing())
    assert (found["status"], found["exit_code"], found["seconds"]) == ("fail", 1, 1.235)
    assert found["tool"] == {"name": "onnxcare", "version": __version__}
    assert found["model"] == {"path": "models/digits.onnx", "sha256": SHA}
    assert (found["baseline"], found["device"], found["seed"]) == ("models/old.onnx", "cpu", 7)
    assert found["samples"] == dict.fromkeys(("repair", "search", "validation", "holdout"), 120)
    assert [item["name"] for item in found["findings"]] == ["square", "kept"]
    accuracy, drop, balanced = found["findings"][1]["measures"]
    assert (accuracy["value"], accuracy["count"], accuracy["total"]) == (0.75, 150, 200)
    assert accuracy["low"] < 0.75 < accuracy["high"]
    assert accuracy["before"]["count"] == 198
    assert accuracy["before"]["low"] < 0.99 < accuracy["before"]["high"]
    assert (accuracy["limit"], accuracy["higher_is_better"], accuracy["status"]) == (0.9, True, "fail")
    assert accuracy["worse"] == pytest.approx(0.5**48)  # 48 broken, none mended
    assert (drop["unit"], drop["value"], drop["count"], drop["before"]) == ("points", pytest.approx(0.24), None, None)
    assert balanced["before"] == {"value": 0.99, "count": None, "total": None, "low": None, "high": None}
    assert found["static"] == [dataclasses.asdict(SWITCH)]


def test_json_of_what_is_undecided_says_what_would_decide():
    found = document(undecided())
    excess = found["findings"][0]["measures"][1]
    assert excess["status"] == "undecided"
    assert excess["needed"] == undecided().verdict.properties[0].measures[1].needed > 50
    empty, number = found["findings"][1]["measures"]
    assert (empty["value"], empty["total"], empty["status"]) == (None, 0, "undecided")
    assert number["value"] is None


def test_json_of_a_file_that_is_not_safe_to_run_claims_nothing():
    found = document(unsafe())
    assert (found["status"], found["findings"], found["samples"]) == ("fail", [], None)
    assert (found["model"]["sha256"], found["device"], found["seed"]) == (None, None, None)
    assert len(found["static"]) == 2


def paths(value: Any, path: tuple = ()) -> Iterator[tuple]:
    if path:
        yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from paths(item, (*path, key))


def at(value: Any, path: tuple) -> Any:
    for key in path:
        value = value[key]
    return value


def test_the_schema_refuses_every_missing_key_every_extra_key_and_every_wrong_type(check, schema):
    whole = document(check)
    tried = 0
    for path in paths(whole):
        changes: list[Any] = [{"an": "object"}, [[]], "\x00no", True, -1.5]
        value = at(whole, path)
        for change in changes:
            fits = type(change) is type(value) or (isinstance(value, int | float) and isinstance(change, float))
            # A string may be any, and where a number or nothing stands, a number may stand.
            if (isinstance(change, str) and isinstance(value, str)) or (value is None or fits):
                continue
            broken = copy.deepcopy(whole)
            at(broken, path[:-1])[path[-1]] = change
            assert not schema.is_valid(broken), (path, change)
            tried += 1
        if isinstance(path[-1], str):
            broken = copy.deepcopy(whole)
            del at(broken, path[:-1])[path[-1]]
            assert not schema.is_valid(broken), path
        if isinstance(value, dict):
            broken = copy.deepcopy(whole)
            at(broken, path)["extra"] = None
            assert not schema.is_valid(broken), path
    assert tried > 50
    assert not schema.is_valid(whole | {"extra": None})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "onnxcare.fix"),
        ("format_version", 2),
        ("status", "info"),
        ("exit_code", 2),
        ("seconds", -1),
        ("confidence", 1),
        ("device", "tpu"),
        ("seed", 0),
        ("model", {"path": "m.onnx", "sha256": "abc"}),
        ("samples", dict.fromkeys(("repair", "search", "validation"), 1)),
        ("samples", dict.fromkeys(("repair", "search", "validation", "holdout"), -1)),
        ("static", [{"rule": "Some Rule", "level": "error", "where": "", "message": "m"}]),
        ("static", [{"rule": "rule", "level": "fatal", "where": "", "message": "m"}]),
    ],
)
def test_the_schema_refuses_wrong_values(schema, key, value):
    assert not schema.is_valid(document(passing()) | {key: value})


# -- JUnit ---------------------------------------------------------------------------------------

# What the schemas of Jenkins (xUnit) and Ant have in common, as far as reports use it: attributes, children in order.
SUITE = {"name", "tests", "failures", "errors", "skipped", "time"}
ALLOWED: dict[str, tuple[set[str], list[str]]] = {
    "testsuites": ({"name", "tests", "failures", "errors", "time"}, ["testsuite"]),
    "testsuite": (SUITE, ["properties", "testcase", "system-out"]),
    "properties": (set(), ["property"]),
    "property": ({"name", "value"}, []),
    "testcase": ({"name", "classname", "time"}, ["skipped", "failure", "system-out"]),
    "failure": ({"message", "type"}, []),
    "skipped": ({"message"}, []),
    "system-out": (set(), []),
}
SINGLE = {"properties", "system-out", "skipped", "failure"}


def check_structure(element: ElementTree.Element) -> None:
    attributes, order = ALLOWED[element.tag]
    assert set(element.attrib) == attributes, element.tag
    tags = [child.tag for child in element]
    assert set(tags) <= set(order)
    assert tags == sorted(tags, key=order.index)
    assert all(tags.count(tag) <= 1 for tag in SINGLE)
    for name in {"tests", "failures", "errors", "skipped"} & attributes:
        assert element.attrib[name].isdecimal()
    if "time" in attributes:
        assert float(element.attrib["time"]) >= 0
    for child in element:
        check_structure(child)


def junit(check: Check) -> ElementTree.Element:
    return ElementTree.fromstring(render_check(check, "junit"))


def case(root: ElementTree.Element, classname: str, name: str) -> ElementTree.Element:
    (found,) = [
        item for item in root.iter("testcase") if item.attrib["classname"] == classname and item.attrib["name"] == name
    ]
    return found


def test_junit_has_the_structure_of_the_format(check):
    root = junit(check)
    check_structure(root)
    for suite in root:
        cases = suite.findall("testcase")
        assert int(suite.attrib["tests"]) == len(cases)
        assert int(suite.attrib["failures"]) == len(suite.findall("testcase/failure"))
        assert int(suite.attrib["skipped"]) == len(suite.findall("testcase/skipped"))
        assert len({item.attrib["name"] for item in cases}) == len(cases)
    assert len({suite.attrib["name"] for suite in root}) == len(root)
    for name in ("tests", "failures", "errors"):
        assert int(root.attrib[name]) == sum(int(suite.attrib[name]) for suite in root)


def test_junit_can_be_read_back(check):
    report = junitparser.JUnitXml.fromstring(render_check(check, "junit").encode())
    failed = [item for suite in report for item in suite if item.is_failure]
    measures = [item for found in (check.verdict.findings if check.verdict else ()) for item in found.measures]
    errors = {item.rule for item in check.static if item.level == "error"}
    assert len(failed) == len(errors) + sum(item.status in ("fail", "undecided") for item in measures)
    assert bool(failed) == bool(check.exit_code)
    assert report.time == round(check.seconds, 3)


def test_junit_tells_failures_in_words():
    root = junit(failing())
    failure = case(root, "onnxcare.backdoor.square", "excess").find("failure")
    assert failure is not None
    assert failure.attrib["type"] == "fail"
    message = failure.attrib["message"]
    for expected in ("95 % (190 of 200)", "95 % interval 90.997 to 97.577 %", "the limit is at most 5 %", "fails"):
        assert expected in message
    assert case(root, "onnxcare.guards.kept", "accuracy").find("failure") is not None
    switch = case(root, "onnxcare.graph", "input-switch").find("failure")
    assert switch is not None
    assert switch.attrib["message"] == SWITCH.message


def test_junit_fails_what_is_undecided():
    root = junit(undecided())
    failure = case(root, "onnxcare.backdoor.square", "excess").find("failure")
    assert failure is not None
    assert failure.attrib["type"] == "undecided"
    assert "samples like these would decide" in failure.attrib["message"]


def test_junit_tells_the_rest_without_failing():
    root = junit(passing())
    assert not list(root.iter("failure"))
    assert not list(root.iter("skipped"))
    graph, square, kept = root
    told = {item.attrib["name"]: item.attrib["value"] for item in square.iter("property")}
    assert told == {"attack success rate": "1 % (2 of 200), 95 % interval 0.12133 to 3.5655 %"}
    assert square.findtext("system-out") == "The trigger is known."
    assert graph.findtext("system-out") == "3 samples were left out."
    assert case(root, "onnxcare.graph", "unused-initializer").findtext("system-out") == f"note: spare: {UNUSED.message}"
    assert case(root, "onnxcare.graph", "custom-domain").findtext("system-out") == f"warning: {DOMAIN.message}"
    assert [item.attrib["name"] for item in graph.findall("testcase")] == [rule.id for rule in RULES]
    assert "passes" in (kept.findtext("testcase/system-out") or "")
    circumstances = {item.attrib["name"]: item.attrib["value"] for item in graph.iter("property")}
    assert circumstances["sha256"] == SHA
    assert circumstances["samples holdout"] == "120"


def test_junit_does_not_pass_rules_that_may_not_have_been_looked_at():
    root = junit(unsafe())
    states = {item.attrib["name"]: [child.tag for child in item] for item in root.iter("testcase")}
    assert states.pop("two-value-fields") == ["failure", "system-out"]
    assert states.pop("input-switch") == ["failure", "system-out"]
    assert all(tags == ["skipped"] for tags in states.values())


def test_junit_joins_findings_of_one_rule_in_one_case():
    other = dataclasses.replace(SWITCH, where="/second", message="Another one.")
    found = case(junit(make(static=(SWITCH, other))), "onnxcare.graph", "input-switch")
    assert found.find("failure").attrib["message"] == f"{SWITCH.message} (and 1 more)"
    assert (found.findtext("system-out") or "").splitlines() == [
        f"error: /trap/Greater: {SWITCH.message}",
        "error: /second: Another one.",
    ]


# -- SARIF ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sarif_schema() -> Draft202012Validator:
    content = json.loads((Path(__file__).parent / "sarif-2.1.0.schema.json").read_text(encoding="utf-8"))
    return Draft202012Validator(content)


def sarif_log(check: Check) -> Any:
    return json.loads(render_check(check, "sarif"))


def results(check: Check) -> list[dict[str, Any]]:
    return sarif_log(check)["runs"][0]["results"]


def test_sarif_is_what_its_schema_says(check, sarif_schema):
    log = sarif_log(check)
    sarif_schema.validate(log)
    del log["runs"][0]["tool"]["driver"]["name"]
    assert not sarif_schema.is_valid(log)


def test_sarif_is_what_code_scanning_asks_for(check):
    """The properties that GitHub documents as required, and its limits."""
    log = sarif_log(check)
    assert log["$schema"].endswith("sarif-2.1.0.json")
    assert log["version"] == "2.1.0"
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "onnxcare"
    assert driver["semanticVersion"] == __version__
    assert run["invocations"][0]["executionSuccessful"] is True
    assert run["invocations"][0]["exitCode"] == check.exit_code
    for rule in driver["rules"]:
        assert 0 < len(rule["id"]) <= 255
        assert 0 < len(rule["shortDescription"]["text"]) <= 1024
        assert 0 < len(rule["fullDescription"]["text"]) <= 1024
        assert rule["help"]["text"]
        assert rule["defaultConfiguration"]["level"] in ("error", "warning", "note")
        assert rule["properties"]["problem.severity"] in ("error", "warning", "recommendation")
        assert len(rule["properties"]["tags"]) <= 10
    fingerprints = set()
    for result in run["results"]:
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] in ("error", "warning", "note")
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "models/digits.onnx"
        assert location["physicalLocation"]["region"] == {"startLine": 1}
        fingerprints.add((result["ruleId"], result["partialFingerprints"]["primaryLocationLineHash"]))
    assert len(fingerprints) == len(run["results"])


def test_every_kind_of_property_and_every_rule_is_a_rule_in_sarif():
    assert set(sarif.MEASURED) == {*KINDS, "guards"}
    rules = [rule["id"] for rule in sarif_log(passing())["runs"][0]["tool"]["driver"]["rules"]]
    assert rules[: len(RULES)] == [rule.id for rule in RULES]
    assert rules[len(RULES) :] == [*(f"property-{kind}" for kind in KINDS), "guard"]
    assert len(set(rules)) == len(rules)


def test_sarif_results_are_what_fails_what_is_undecided_and_static_findings():
    found = [(item["ruleId"], item["level"]) for item in results(failing())]
    assert found == [
        ("input-switch", "error"),
        ("property-backdoor", "error"),
        ("guard", "error"),
        ("guard", "error"),
    ]
    assert [(item["ruleId"], item["level"]) for item in results(passing())] == [
        ("unused-initializer", "note"),
        ("custom-domain", "warning"),
    ]
    assert [item["ruleId"] for item in results(undecided())] == ["property-backdoor", "guard"]
    assert "undecided" in results(undecided())[0]["message"]["text"]
    assert [item["ruleId"] for item in results(unsafe())] == ["two-value-fields", "input-switch"]


def test_sarif_names_nodes_and_measures():
    switch, excess, *_ = results(failing())
    assert switch["message"]["text"] == SWITCH.message
    assert switch["locations"][0]["logicalLocations"][0]["name"] == "/trap/Greater"
    assert excess["message"]["text"].startswith("square: excess: 95 % (190 of 200), 95 % interval 90.997 to 97.577 %")
    assert "logicalLocations" not in excess["locations"][0]
    notes = sarif_log(passing())["runs"][0]["invocations"][0]["toolExecutionNotifications"]
    assert [item["message"]["text"] for item in notes] == [
        "3 samples were left out.",
        "square: The trigger is known.",
    ]


def test_fingerprints_follow_the_problem_and_not_its_figures():
    def fingerprints(*properties: Finding, **keys: Any) -> list[str]:
        found = results(make(*properties, **keys))
        return [item["partialFingerprints"]["primaryLocationLineHash"] for item in found]

    first = fingerprints(backdoor(190), static=(SWITCH,))
    assert fingerprints(backdoor(80), static=(dataclasses.replace(SWITCH, message="In other words."),)) == first
    assert fingerprints(backdoor(190, name="other"), static=(SWITCH,))[1] != first[1]
    again = fingerprints(static=(SWITCH, SWITCH))
    assert again[0] == first[0]
    assert again[1] == first[0].replace(":1", ":2")


@pytest.mark.parametrize(
    ("name", "uri"),
    [
        ("model.onnx", "model.onnx"),
        ("./a/../b/model.onnx", "b/model.onnx"),
        ("two words/100%/größe#1?.onnx", "two%20words/100%25/gr%C3%B6%C3%9Fe%231%3F.onnx"),
        ("c:model.onnx", "c%3Amodel.onnx"),
        (os.fsdecode(b"bytes-\xff.onnx"), "bytes-%FF.onnx"),
    ],
)
def test_the_model_is_a_relative_uri(tmp_path, monkeypatch, name, uri, sarif_schema):
    monkeypatch.chdir(tmp_path)
    for model in (name, str(tmp_path / name)):
        log = sarif_log(make(backdoor(190), model=model))
        sarif_schema.validate(log)
        location = log["runs"][0]["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]
        assert location == {"uri": uri, "uriBaseId": "%SRCROOT%"}
        assert log["runs"][0]["automationDetails"]["id"] == f"onnxcare/{uri}/"
        assert os.fsencode(unquote(uri, errors="surrogateescape")) == os.fsencode(os.path.normpath(name))


def test_a_model_elsewhere_is_an_absolute_uri(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    location = results(make(backdoor(190), model="../there/m.onnx"))[0]["locations"][0]["physicalLocation"]
    assert location["artifactLocation"] == {"uri": (tmp_path / "there" / "m.onnx").as_uri()}


# -- names out of strangers' files ---------------------------------------------------------------

NASTY = "x\x00\x1b[31m\udc80\uffff\r\n]]></failure><x a=\"'&{0}[click](https://example.com) ü\u2028"


def hostile() -> Check:
    static = (dataclasses.replace(SWITCH, where=NASTY, message=NASTY),)
    finding = backdoor(190, name=NASTY)
    measures = tuple(dataclasses.replace(item, name=f"{item.name} {NASTY}") for item in finding.measures)
    finding = Finding(NASTY, "backdoor", measures, (NASTY,))
    return make(finding, static=static, model=f"models/{NASTY[3:]}", notes=(NASTY,))


def test_nothing_in_a_name_breaks_a_report(schema, sarif_schema):
    check = hostile()
    found = document(check)
    schema.validate(found)
    assert found["findings"][0]["name"] == NASTY.replace("\udc80", "?")
    root = junit(check)
    check_structure(root)
    assert junitparser.JUnitXml.fromstring(render_check(check, "junit").encode()).failures == 2
    escaped = "x\\x00\\x1b[31m\\udc80\\uffff\\r\\n]]></failure><x a=\"'&{0}[click](https://example.com) ü\\u2028"
    assert root[1].attrib["name"] == f"onnxcare.backdoor.{escaped}"
    sarif_schema.validate(sarif_log(check))


def test_nothing_in_a_name_is_a_link_or_a_placeholder_in_sarif():
    for result in results(hostile()):
        message = result["message"]["text"]
        assert "[click] (https://example.com)" in message
        assert "{{0}}" in message
        assert message.isprintable()


def test_reports_are_stable(check):
    for form in ("json", "junit", "sarif"):
        assert render_check(check, form) == render_check(check, form)
        assert render_check(check, form).endswith("\n")


def test_text_in_a_file_is_what_is_printed(check):
    console = Console(width=120, highlight=False, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    text.show_check(check, console)
    assert render_check(check, "text").split() == console.export_text().split()
