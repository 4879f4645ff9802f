"""What a user can get wrong about fairness, safety, errors and `onnxcare check` ends with a plain sentence, too."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest
from helpers import (
    CLASSES,
    FEATURES,
    Paths,
    answers,
    check_refusal,
    clean_samples,
    contents,
    dense,
    fix,
    onnxcare,
    trigger_arrays,
    triggered_samples,
)
from onnx import TensorProto, helper, numpy_helper

import onnxcare as package
from onnxcare.errors import DataError, ModelError, UsageError

Array = np.ndarray
Spoil = Callable[[Paths], object]

FORMS = ("text", "json", "junit", "sarif")
FLOAT = TensorProto.FLOAT
SIZE = 400
# Column 6 is noise to the model: here it is somebody's sex. Every eighth label is wrong.
SEX = 6

FAIR = "{name: sex, kind: fairness, protected: {sex: {column: 6, values: [0, 1]}}}"
FAR = "{name: far, kind: safety, vnnlib: far.vnnlib, samples: 1000}"
WRONG = "{name: wrong, kind: errors, max_error_rate: 0.5}"
BOUNDS = "bounds: {low: [-3, -3, -3, -3, -3, -3, 0, 0], high: [5, 5, 5, 5, 5, 5, 1, 3]}\n"
FILES = "data: repair.npz\nholdout: holdout.npz\n"


def formula(inputs: int = FEATURES, outputs: int = CLASSES, unsafe: str = "(assert (>= Y_0 100.0))") -> str:
    """Return what must not happen within [-1, 1]: by default what the model never answers there."""
    declared = [f"(declare-const X_{i} Real)" for i in range(inputs)]
    declared += [f"(declare-const Y_{i} Real)" for i in range(outputs)]
    box = [f"(assert (>= X_{i} -1.0))(assert (<= X_{i} 1.0))" for i in range(inputs)]
    return "\n".join([*declared, *box, unsafe]) + "\n"


@functools.cache
def samples(seed: int) -> tuple[Array, Array]:
    """Return samples with a sex, of which the model gets every eighth one wrong."""
    x = clean_samples(SIZE, seed)["input"]
    x[:, SEX] = np.arange(SIZE) // CLASSES % 2
    y = answers(dense(), x)
    y[::8] = (y[::8] + 1) % CLASSES
    return x, y


def written(*properties: str, top: str = "", files: str = FILES) -> str:
    """Return a spec."""
    listed = "".join(f"  - {item}\n" for item in properties)
    return f"{files}{top}properties:\n{listed}"


@pytest.fixture
def case(tmp_path: Path) -> Paths:
    """A model and data for every kind of property; the spec asks for the errors."""
    names = ("model.onnx", "care.yaml", "repair.npz", "holdout.npz", "trigger.npz")
    paths = Paths(tmp_path, *(tmp_path / name for name in names))
    paths.model.write_bytes(dense().SerializeToString())
    for path, seed in ((paths.data, 1), (paths.holdout, 2)):
        x, y = samples(seed)
        np.savez(path, input=x, y=y)
    np.savez(paths.trigger, **trigger_arrays())
    (tmp_path / "far.vnnlib").write_text(formula())
    paths.spec.write_text(written(WRONG))
    return paths


def check(paths: Paths, *args: object, device: str = "cpu") -> Any:
    return onnxcare("check", paths.model, "--spec", paths.spec, "--device", device, *args)


def refuses(paths: Paths, code: int, *words: object, args: tuple[object, ...] = (), command: Any = check) -> None:
    """Check that a command explains itself and leaves every file as it was."""
    before = contents(paths.folder)
    check_refusal(command(paths, *args), code, *words)
    assert contents(paths.folder) == before


def bad(name: str, what: object, *words: str) -> Any:
    return pytest.param(what, words, id=name)


def both(change: Callable[[Array, Array], dict[str, Array | None]]) -> Spoil:
    """Change data and holdout: inputs and labels lead to the arrays that take their place."""

    def spoil(paths: Paths) -> None:
        for path in (paths.data, paths.holdout):
            with np.load(path) as archive:
                held = dict(archive)
            paths.edit(path, **change(held["input"], held["y"]))

    return spoil


unlabelled = both(lambda x, y: {"y": None})


def to_check(paths: Paths, *properties: str, top: str = "", files: str = FILES) -> Paths:
    paths.spec.write_text(written(*properties, top=top, files=files))
    return paths


# -- the spec ------------------------------------------------------------------------------------


def fair(protected: str, more: str = "") -> str:
    return f"{{name: sex, kind: fairness, protected: {protected}{more}}}"


def sex(attribute: str) -> str:
    return fair(f"{{sex: {attribute}}}")


def far(more: str) -> str:
    return f"{{name: far, kind: safety, vnnlib: far.vnnlib, {more}}}"


def wrong(more: str) -> str:
    return f"{{name: wrong, kind: errors, {more}}}"


HUGE = "1" + "0" * 400

PROPERTIES = [
    bad("no protected", "{name: sex, kind: fairness}", "properties.0.protected: this key is needed"),
    bad("protected misspelt", FAIR.replace("protected", "protekted"), "'properties.0.protekted'", "'protected'"),
    bad("protected null", fair("null"), "properties.0.protected", "keys with values"),
    bad("protected list", fair("[sex]"), "properties.0.protected", "keys with values", "['sex']"),
    bad("protected empty", fair("{}"), "properties.0.protected", "at least one"),
    bad("attribute number", sex("6"), "properties.0.protected.sex", "keys with values"),
    bad("attribute empty", sex("{}"), "properties.0.protected.sex", "either column"),
    bad("attribute misspelt", sex("{colum: 6, values: [0, 1]}"), "protected.sex.colum", "did you mean 'column'?"),
    bad("attribute twice", fair("{sex: {columns: [5, 6]}, sex: {columns: [4, 5]}}"), "line 4", "'sex'", "twice"),
    bad("attribute called yes", fair("{yes: {columns: [5, 6]}}"), "properties.0.protected", "text", "quotes", "True"),
    bad("attribute called 1", fair("{1: {columns: [5, 6]}}"), "properties.0.protected.1", "text", "quotes"),
    bad("attribute without a name", fair("{'': {columns: [5, 6]}}"), "properties.0.protected", "1 character"),
    bad("attribute of blanks", fair("{' ': {columns: [5, 6]}}"), "properties.0.protected", "name"),
    bad("attribute of two lines", fair('{"a\\nb": {columns: [5, 6]}}'), "properties.0.protected.a\\nb", "one line"),
    bad("column alone", sex("{column: 6}"), "properties.0.protected.sex", "values go with column"),
    bad("values alone", sex("{values: [0, 1]}"), "properties.0.protected.sex", "either column"),
    bad("columns and values", sex("{columns: [5, 6], values: [0, 1]}"), "protected.sex", "one-hot columns need none"),
    bad("column and columns", sex("{column: 4, values: [0, 1], columns: [5, 6]}"), "protected.sex", "either column"),
    bad("column below 0", sex("{column: -1, values: [0, 1]}"), "protected.sex.column", "-1"),
    bad("column of text", sex("{column: age, values: [0, 1]}"), "protected.sex.column", "integer", "'age'"),
    bad("column float", sex("{column: 6.0, values: [0, 1]}"), "protected.sex.column", "integer", "6.0"),
    bad("column true", sex("{column: true, values: [0, 1]}"), "protected.sex.column", "integer", "True"),
    bad("column list", sex("{column: [6], values: [0, 1]}"), "protected.sex.column", "integer"),
    bad("column not there", sex("{column: 8, values: [0, 1]}"), "protected.sex", "no column 8", "columns 0 to 7"),
    bad("column of 401 digits", sex(f"{{column: {HUGE}, values: [0, 1]}}"), "protected.sex", "column"),
    bad("one value", sex("{column: 6, values: [0]}"), "protected.sex.values", "at least 2 items"),
    bad("value alone", sex("{column: 6, values: 1}"), "protected.sex.values", "list"),
    bad("values of text", sex("{column: 6, values: [female, male]}"), "protected.sex.values.0", "'female'"),
    bad("values true and false", sex("{column: 6, values: [true, false]}"), "protected.sex.values.0", "True"),
    bad("values NaN", sex("{column: 6, values: [0, .nan]}"), "protected.sex.values.1", "finite", "nan"),
    bad("values infinite", sex("{column: 6, values: [0, -.inf]}"), "protected.sex.values.1", "finite", "-inf"),
    bad("values twice", sex("{column: 6, values: [0, 1, 1.0]}"), "protected.sex", "twice"),
    bad("values beyond float64", sex("{column: 6, values: [0, 1e999]}"), "protected.sex.values.1", "finite"),
    bad("values beyond float32", sex("{column: 6, values: [0, 1e300]}"), "protected.sex", "1e+300", "float32"),
    bad("values not in the data", sex("{column: 6, values: [7, 8]}"), "protected.sex", "none of its values"),
    bad("columns of one", sex("{columns: [6]}"), "protected.sex.columns", "at least 2 items"),
    bad("columns twice", sex("{columns: [6, 6]}"), "protected.sex", "twice"),
    bad("columns float", sex("{columns: [5, 6.5]}"), "protected.sex.columns.1", "6.5"),
    bad("columns not there", sex("{columns: [6, 80]}"), "protected.sex", "no column 80", "columns 0 to 7"),
    bad("columns not one-hot", sex("{columns: [0, 1]}"), "protected.sex", "none of its values"),
    bad(
        "columns shared", fair("{a: {column: 6, values: [0, 1]}, b: {columns: [5, 6]}}"), "protected.b", "two protected"
    ),
    bad("favourable not there", fair("{sex: {column: 6, values: [0, 1]}}", ", favourable: 4"), "favourable", "0 to 3"),
    bad("favourable of text", fair("{sex: {columns: [5, 6]}}", ", favourable: yes"), "properties.0.favourable"),
    bad("favorable", fair("{sex: {columns: [5, 6]}}", ", favorable: 1"), "did you mean 'favourable'?"),
    bad("gap misspelt", fair("{sex: {columns: [5, 6]}}", ", gap: demografic_parity"), "0.gap", "'demographic_parity'"),
    bad("max_gap in percent", fair("{sex: {columns: [5, 6]}}", ", max_gap: 5"), "properties.0.max_gap", "5"),
    bad("max_rate of text", fair("{sex: {columns: [5, 6]}}", ", max_rate: '0.1'"), "properties.0.max_rate", "'0.1'"),
    bad("input not there", fair("{sex: {columns: [5, 6]}}", ", input: x"), "properties.sex.input", "input"),
    bad("target of fairness", fair("{sex: {columns: [5, 6]}}", ", target: 1"), "'properties.0.target'"),
    bad("no vnnlib", "{name: far, kind: safety}", "properties.0.vnnlib: this key is needed"),
    bad("vnnlib is a number", "{name: far, kind: safety, vnnlib: 5}", "properties.0.vnnlib", "path", "5"),
    bad("vnnlib empty", "{name: far, kind: safety, vnnlib: ''}", "properties.0.vnnlib", "path"),
    bad("vnnlib missing", "{name: far, kind: safety, vnnlib: no.vnnlib}", "no.vnnlib", "no such file"),
    bad("samples too few", far("samples: 99"), "properties.0.samples", "100", "99"),
    bad("samples too many", far("samples: 1000000000"), "properties.0.samples", "100000000"),
    bad("samples float", far("samples: 1e3"), "properties.0.samples", "integer", "1000.0"),
    bad("samples of a file", far("samples: more.npz"), "properties.0.samples", "integer", "'more.npz'"),
    bad("safety max_rate NaN", far("max_rate: .nan"), "properties.0.max_rate", "nan"),
    bad("safety label", far("label: 1"), "'properties.0.label'"),
    bad("label below 0", wrong("label: -1"), "properties.0.label", "-1"),
    bad("label float", wrong("label: 1.0"), "properties.0.label", "1.0"),
    bad("label true", wrong("label: true"), "properties.0.label", "True"),
    bad("label not there", wrong("label: 4"), "properties.wrong.label", "4 is not a class", "0 to 3"),
    bad("answer not there", wrong("answered: 9"), "properties.wrong.answered", "9 is not a class", "0 to 3"),
    bad("right answers", wrong("label: 2, answered: 2"), "properties.0", "both 2", "right"),
    bad("labels misspelt", wrong("lable: 1"), "'properties.0.lable'", "did you mean 'label'?"),
    bad("samples of a number", wrong("samples: 100"), "properties.0.samples", "path", "100"),
    bad("max_error_rate 50", wrong("max_error_rate: 50"), "properties.0.max_error_rate", "50"),
    bad("kind in capitals", FAIR.replace("fairness", "Fairness"), "properties.0.kind", "did you mean 'fairness'?"),
    bad("kind null", "{name: a, kind: null}", "properties.0.kind", "unknown kind"),
    bad("kind list", "{name: a, kind: [errors]}", "properties.0.kind", "unknown kind"),
    bad("name missing", "{kind: errors}", "properties.0.name: this key is needed"),
    bad("name is a number", "{name: 5, kind: errors}", "properties.0.name", "text", "quotes", "5"),
    bad("name of blanks", "{name: '  ', kind: errors}", "properties.0.name", "name on one line"),
    bad("name of two lines", '{name: "a\\nb", kind: errors}', "properties.0.name", "one line", "'a\\nb'"),
    bad("name that colours", '{name: "\\e[31ma", kind: errors}', "properties.0.name", "control characters", "\\x1b"),
    bad("name with a zero", '{name: "a\\0", kind: errors}', "properties.0.name", "control characters"),
    bad("name of half a character", '{name: "\\uD800", kind: errors}', "properties.0.name", "expected text"),
    bad("name that runs backwards", '{name: "a\\u202eb", kind: errors}', "properties.0.name", "control characters"),
    bad("name without end", "{name: " + 300 * "n" + ", kind: errors}", "properties.0.name", "at most 200"),
    bad("path of a name that colours", '{name: a, kind: errors, "\\e[31m": 1}', "unknown key", "\\x1b"),
]


@pytest.mark.parametrize(("item", "words"), PROPERTIES)
def test_property(case: Paths, item: str, words: tuple[str, ...]) -> None:
    refuses(to_check(case, item), 2, case.spec, *words)


EIGHT = "[0, 0, 0, 0, 0, 0, 0, 0]"


def bounds(last: str, high: str = "1") -> str:
    ones = ", ".join(["1"] * 7)
    return f"bounds: {{low: [0, 0, 0, 0, 0, 0, 0, {last}], high: [{ones}, {high}]}}"


TOPS = [
    *[
        bad(f"decision {text}", f"decision: {text}", "decision: expected argmax, argmin or {threshold: number}")
        for text in ("max", "Argmin", "null", "0.5", "[argmax]", "{}", "threshold", "{threshold: half}")
    ],
    *[
        bad(f"threshold {text}", f"decision: {{threshold: {text}}}", "decision: expected argmax, argmin or {threshold")
        for text in ("null", ".nan", "-.inf", "true", "[0.5]", "'0.5'", HUGE)
    ],
    bad("threshold misspelt", "decision: {treshold: 0.5}", "decision.treshold", "did you mean 'threshold'?"),
    bad("threshold with more", "decision: {threshold: 0.5, above: 1}", "'decision.above'"),
    bad("threshold outside", "threshold: 0.5", "'threshold'"),
    bad("output not there", "output: score", "output: ", "model.onnx", "'score'", "did you mean 'scores'?"),
    bad("output hidden", "output: hidden", "output: ", "no output 'hidden'", "scores ['batch', 4]"),
    bad("output input", "output: input", "no output 'input'"),
    bad("output empty", "output: ''", "no output ''"),
    bad("output is a number", "output: 5", "output: ", "text", "5"),
    bad("bounds list", "bounds: [0, 1]", "bounds: ", "keys with values"),
    bad("bounds half", f"bounds: {{low: {EIGHT}}}", "bounds.high: this key is needed"),
    bad("bounds misspelt", "bounds: {min: [0], max: [1]}", "'bounds.min'"),
    bad("bounds of numbers", "bounds: {low: 0, high: 1}", "bounds.low", "list"),
    bad("bounds empty", "bounds: {low: [], high: []}", "bounds.low", "at least one item"),
    bad("bounds of different length", "bounds: {low: [0, 0], high: [1]}", "bounds: low has 2 values, high has 1"),
    bad("bounds too short", "bounds: {low: [0, 0], high: [1, 1]}", "bounds: 2 values", "8"),
    bad("bounds too long", f"bounds: {{low: {EIGHT[:-1]}, 0], high: {EIGHT[:-1]}, 0]}}", "bounds: 9 values", "8"),
    bad("bounds nested", "bounds: {low: [[0]], high: [[1]]}", "bounds.low.0", "[0]"),
    bad("bounds reversed", bounds("9"), "bounds: low 9 is above high 1 at value 7"),
    bad("bounds NaN", bounds(".nan"), "bounds.low.7", "finite", "nan"),
    bad("bounds infinite", bounds("0", ".inf"), "bounds.high.7", "finite", "inf"),
    bad("bounds of text", bounds("a"), "bounds.low.7", "number", "'a'"),
    bad("bounds true", bounds("0", "true"), "bounds.high.7", "number", "True"),
    bad("bounds beyond float32", bounds("-1e300", "1e300"), "bounds: -1e+300 to 1e+300 at value 7", "float32"),
    bad("confidence 1", "confidence: 1", "confidence: ", "less than 1"),
    bad("confidence 99", "confidence: 99", "confidence: ", "less than 1"),
    bad("confidence in percent", "confidence: 99%", "confidence: ", "number", "'99%'"),
    bad("confidence 0.05", "confidence: 0.05", "confidence: ", "0.5"),
    bad("confidence NaN", "confidence: .nan", "confidence: ", "nan"),
    bad("confidence true", "confidence: true", "confidence: ", "True"),
    bad("keep null", "keep: null", "keep: ", "keys with values"),
    bad("keep misspelt", "keep: {acuracy: 0.9}", "'keep.acuracy'", "did you mean 'accuracy'?"),
    bad("accuracy 90", "keep: {accuracy: 90}", "keep.accuracy", "90"),
    bad("recall of text", "keep: {recall: high}", "keep.recall", "'high'"),
    bad("broken below 0", "keep: {broken: -0.1}", "keep.broken", "-0.1"),
    bad("broken true", "keep: {broken: true}", "keep.broken", "True"),
    bad("balanced NaN", "keep: {balanced_accuracy_drop: .nan}", "keep.balanced_accuracy_drop", "nan"),
    bad("drop null", "keep: {accuracy_drop: null}", "keep.accuracy_drop", "None"),
    bad("labels empty", "labels: ''", "labels: ", "1 character"),
    bad("labels null", "labels: null", "labels: ", "text"),
    bad("baseline in the spec", "baseline: other.onnx", "'baseline'"),
]


@pytest.mark.parametrize("kind", [FAIR, FAR], ids=["fairness", "safety"])
@pytest.mark.parametrize(("top", "words"), TOPS)
def test_whole(case: Paths, top: str, words: tuple[str, ...], kind: str) -> None:
    refuses(to_check(case, kind, top=f"{top}\n"), 2, case.spec, *words)


def test_other_commands_refuse_such_specs_too(case: Paths) -> None:
    to_check(case, sex("{column: 8, values: [0, 1]}"))
    refuses(case, 2, case.spec, "no column 8", command=fix)
    located = onnxcare("locate", case.model, "--spec", case.spec, "--device", "cpu")
    check_refusal(located, 2, case.spec, "no column 8")


def test_numbers_with_an_exponent_are_numbers(case: Paths) -> None:
    """YAML 1.1, and with it PyYAML, would read 1e-3 as text."""
    refuses(to_check(case, wrong("max_rate: 2e0")), 2, "properties.0.max_rate", "less than or equal to 1", "2.0")
    assert check(to_check(case, wrong("max_error_rate: 5e-1"))).exit_code == 0


NO_DATA = [
    bad("fairness", (FAIR, BOUNDS), "data: this key is needed"),
    bad("errors", (WRONG, BOUNDS), "data: this key is needed"),
    bad("safety and fairness", (f"{FAR}\n  - {FAIR}", BOUNDS), "data: this key is needed"),
    bad("safety without bounds", (FAR, ""), "data: this key is needed", "bounds"),
    bad("holdout alone", (FAR, f"holdout: holdout.npz\n{BOUNDS}"), "data: this key is needed", "holdout"),
    bad("bounds too short", (FAR, "bounds: {low: [0], high: [1]}\n"), "bounds: 1 values", "takes 8"),
    bad("bounds too far", (FAR, bounds("0", "1e39") + "\n"), "bounds: 0 to 1e+39 at value 7", "float32"),
]


@pytest.mark.parametrize(("parts", "words"), NO_DATA)
def test_without_data(case: Paths, parts: tuple[str, str], words: tuple[str, ...]) -> None:
    item, top = parts
    refuses(to_check(case, item, top=top, files=""), 2, case.spec, *words)


def test_within_bounds_nothing_is_safe(case: Paths) -> None:
    (case.folder / "far.vnnlib").write_text(formula(unsafe="(assert (>= Y_0 -100.0))"))
    inside = "bounds: {low: " + EIGHT.replace("0", "-1") + ", high: " + EIGHT.replace("0", "1") + "}\n"
    to_check(case, FAR, top=inside, files="")
    for command in (check, fix):
        refuses(case, 3, "bounds: only 0 samples", "does not hold", command=command)


# -- data ----------------------------------------------------------------------------------------


def first(count: int, of: str = "data") -> Spoil:
    def spoil(paths: Paths) -> None:
        path = getattr(paths, of)
        with np.load(path) as archive:
            paths.edit(path, **{name: values[:count] for name, values in archive.items()})

    return spoil


def array(name: str, change: Callable[[Array], Array | None], of: str = "data") -> Spoil:
    def spoil(paths: Paths) -> None:
        path = getattr(paths, of)
        with np.load(path) as archive:
            held = archive[name]
        paths.edit(path, **{name: change(held)})

    return spoil


DATA = [
    bad("missing", lambda paths: paths.data.unlink(), "repair.npz", "no such file"),
    bad("text", lambda paths: paths.data.write_text("x,y\n"), "repair.npz", "npz"),
    bad("cut", lambda paths: paths.data.write_bytes(paths.data.read_bytes()[:-500]), "repair.npz", "truncated"),
    bad("too narrow", array("input", lambda x: x[:, 1:]), "repair.npz", "[400, 7]"),
    bad("NaN", array("input", lambda x: np.where(x > 2, np.nan, x)), "repair.npz", "NaN"),
    bad("too few", first(30), "repair.npz", "only 16 samples", "at least 20"),
    bad("holdout missing", lambda paths: paths.holdout.unlink(), "holdout.npz", "no such file"),
    bad("holdout too few", first(10, "holdout"), "holdout.npz", "only 10 samples", "at least 20"),
    bad(
        "holdout the same",
        lambda paths: paths.holdout.write_bytes(paths.data.read_bytes()),
        "holdout.npz",
        "only 0 samples",
        "400 also occur in",
        "repair.npz",
    ),
    bad("holdout without labels", array("y", lambda y: None, "holdout"), "holdout.npz", "no labels"),
    bad("label too high", array("y", lambda y: y + 1), "repair.npz", "1 to 4", "classes 0 to 3"),
]


@pytest.mark.parametrize("kind", [FAIR, FAR, WRONG], ids=["fairness", "safety", "errors"])
@pytest.mark.parametrize(("spoil", "words"), DATA)
def test_data(case: Paths, spoil: Spoil, words: tuple[str, ...], kind: str) -> None:
    to_check(case, kind)
    spoil(case)
    refuses(case, 3, *words)


@pytest.mark.parametrize("command", [check, fix])
def test_errors_need_labels(case: Paths, command: Any) -> None:
    unlabelled(case)
    refuses(case, 3, case.data, "no labels", "'wrong'", "labels:", command=command)


@pytest.mark.parametrize("kind", [FAIR, FAR], ids=["fairness", "safety"])
def test_labels_that_the_spec_names_have_to_be_there(case: Paths, kind: str) -> None:
    """A misspelt key would make the model's own answers the reference, and every drop zero."""
    refuses(to_check(case, kind, top="labels: truth\n"), 3, case.data, "no labels 'truth'", "labels:")


@pytest.mark.parametrize("gap", ["equal_opportunity", "equalized_odds"])
@pytest.mark.parametrize("command", [check, fix])
def test_gaps_among_those_who_deserve_it_need_labels(case: Paths, gap: str, command: Any) -> None:
    unlabelled(case)
    to_check(case, fair("{sex: {column: 6, values: [0, 1]}}", f", max_gap: 0.1, gap: {gap}"))
    refuses(case, 3, case.data, "no labels", "'sex'", gap, "demographic_parity", command=command)


def test_a_gap_between_all_needs_no_labels(case: Paths) -> None:
    unlabelled(case)
    to_check(case, fair("{sex: {column: 6, values: [0, 1]}}", ", max_gap: 0.5, gap: demographic_parity"))
    assert check(case).exit_code == 0


def of_one_sex(x: Array, y: Array) -> dict[str, Array | None]:
    x[:, SEX] = 0
    return {"input": x}


def of_hardly_any_women(x: Array, y: Array) -> dict[str, Array | None]:
    x[:, SEX] = np.arange(len(x)) < 10
    return {"input": x}


GAPS = [
    bad("one group", ("demographic_parity", both(of_one_sex)), "held-out samples are of fewer"),
    bad("one large group", ("demographic_parity", both(of_hardly_any_women)), "held-out samples are of fewer"),
    bad("nobody deserves it", ("equal_opportunity", both(lambda x, y: {"y": y % 1})), "of label 1"),
    bad("everybody deserves it", ("equalized_odds", both(lambda x, y: {"y": y % 1 + 1})), "of other labels"),
]


@pytest.mark.parametrize("command", [check, fix])
@pytest.mark.parametrize(("gap_and_data", "words"), GAPS)
def test_a_gap_needs_two_groups(
    case: Paths, gap_and_data: tuple[str, Spoil], words: tuple[str, ...], command: Any
) -> None:
    """Between fewer there is no gap to be measured, which must not pass."""
    gap, spoil = gap_and_data
    spoil(case)
    to_check(case, fair("{sex: {column: 6, values: [0, 1]}}", f", max_gap: 0.5, gap: {gap}"))
    refuses(case, 3, "'sex'", "by sex", "two groups", "give more data", *words, command=command)


def test_values_that_the_data_does_not_know_are_told(case: Paths) -> None:
    def scaled(x: Array, y: Array) -> dict[str, Array | None]:
        x[:, SEX] /= 2
        return {"input": x}

    both(scaled)(case)
    result = check(to_check(case, FAIR))
    assert "sex: 1 does not occur in the data, but 0.5 does" in " ".join(result.stdout.split())


def all_right(x: Array, y: Array) -> dict[str, Array | None]:
    return {"y": answers(dense(), x)}


def two_wrong(x: Array, y: Array) -> dict[str, Array | None]:
    y = answers(dense(), x)
    y[:2] = (y[:2] + 1) % CLASSES
    return {"y": y}


@pytest.mark.parametrize(("labels", "few"), [(all_right, "0 samples"), (two_wrong, " samples")], ids=["none", "two"])
def test_a_model_without_errors(case: Paths, labels: Any, few: str) -> None:
    both(labels)(case)
    refuses(case, 3, "'wrong'", "gets only", few, "at least 5", command=fix)
    assert check(case).exit_code == 0
    # Without a baseline nobody knows whose errors are meant: that is no pass.
    result = check(to_check(case, "{name: wrong, kind: errors}"))
    assert result.exit_code == 1 and "undecided" in result.stdout and "--baseline" in result.stdout


def more(**arrays: Array | None) -> Spoil:
    def spoil(paths: Paths) -> None:
        held = {**clean_samples(60, seed=9), **arrays}
        np.savez(paths.folder / "more.npz", **{name: values for name, values in held.items() if values is not None})

    return spoil


FURTHER = [
    bad("missing", lambda paths: None, "no such file"),
    bad("text", lambda paths: (paths.folder / "more.npz").write_text("x"), "npz"),
    bad("no labels", more(y=None), "no labels"),
    bad("label too high", more(y=np.full(60, 9)), "9 to 9", "classes 0 to 3"),
    bad("float labels", more(y=np.zeros(60)), "y", "float64"),
    bad("NaN", more(input=np.full((60, 8), np.nan, np.float32)), "NaN"),
    bad("too narrow", more(input=np.zeros((60, 7), np.float32)), "[60, 7]"),
    bad("none of the kind", more(y=np.zeros(60, int)), "no sample has label 2", "'wrong'"),
]


@pytest.mark.parametrize(("spoil", "words"), FURTHER)
def test_further_samples(case: Paths, spoil: Spoil, words: tuple[str, ...]) -> None:
    spoil(case)
    to_check(case, wrong("label: 2, samples: more.npz"))
    refuses(case, 3, case.folder / "more.npz", *words)


@pytest.mark.parametrize("file", ["repair.npz", "holdout.npz"])
def test_further_samples_that_are_known_already_count_once(case: Paths, file: str) -> None:
    """Samples of the holdout must not become evidence that a repair is fitted on."""
    plain = json.loads(check(to_check(case, WRONG), "--format", "json").stdout)
    again = json.loads(check(to_check(case, wrong(f"max_error_rate: 0.5, samples: {file}")), "--format", "json").stdout)
    before, after = plain["findings"][0], again["findings"][0]
    assert before["measures"] == after["measures"]
    assert any("400 samples" in note and file in note for note in after["notes"])


def test_no_held_out_sample_of_the_kind(case: Paths) -> None:
    both(lambda x, y: {"y": np.where(y == 2, 0, y)})(case)
    for command in (check, fix):
        refuses(to_check(case, wrong("label: 2")), 3, "'wrong'", "no held-out sample has label 2", command=command)


def test_triggered_samples_that_are_held_out_too(case: Paths) -> None:
    np.savez(case.folder / "bad.npz", **triggered_samples(60, seed=3))
    item = "{name: a, kind: backdoor, target: 1, triggered: bad.npz, triggered_holdout: bad.npz}"
    refuses(to_check(case, item), 2, case.spec, "properties.0", "triggered_holdout", "same file")


# -- formulas ------------------------------------------------------------------------------------


def holding(content: str | bytes) -> Spoil:
    def spoil(paths: Paths) -> None:
        (paths.folder / "far.vnnlib").write_bytes(content if isinstance(content, bytes) else content.encode())

    return spoil


def folder_instead(paths: Paths) -> None:
    (paths.folder / "far.vnnlib").unlink()
    (paths.folder / "far.vnnlib").mkdir()


THIN = "(assert (<= (+ X_0 X_1 X_2 X_3 X_4 X_5 X_6 X_7) -7.9999))(assert (>= Y_0 1))"

FORMULAS = [
    bad("missing", lambda paths: (paths.folder / "far.vnnlib").unlink(), "no such file"),
    bad("folder", folder_instead, "directory"),
    bad("empty", holding(""), "nothing is asserted"),
    bad("comments", holding("; nothing\n"), "nothing is asserted"),
    bad("garbage", holding("safe: yes\n"), "nothing is asserted"),
    bad("random bytes", holding(np.random.default_rng(1).bytes(2000)), "not a text file"),
    bad("npz", lambda paths: holding(paths.data.read_bytes())(paths), "not a text file"),
    bad("model", lambda paths: holding(paths.model.read_bytes())(paths), "not a text file"),
    bad("packed", holding(b"\x1f\x8b\x08" + bytes(50)), "not a text file", "unpack"),
    bad("UTF-16", holding(formula().encode("utf-16")), "not a text file"),
    bad("cut", holding(formula()[:-5]), "line 21", "never closed"),
    bad("deep", holding("(" * 5000 + "(assert"), "nested"),
    bad("of another model", holding(formula(5)), "5 input values", "takes 8", "model.onnx"),
    bad("of other answers", holding(formula(8, 5)), "5 output values", "'scores'", "4"),
    bad("no point", holding(formula(unsafe="(assert (<= X_0 -5))(assert (>= Y_0 1))")), "no point", "X_0"),
    bad("no bounds", holding(formula().replace("(assert (<= X_7 1.0))", "")), "X_7", "no upper bound"),
    bad("no outputs", holding(formula(unsafe="")), "nothing about the outputs"),
    bad("outputs in one branch", holding(formula(unsafe="(assert (or (>= Y_0 1) (<= X_0 0)))")), "one of its branches"),
    bad("too thin", holding(formula(unsafe=THIN)), "too little of their box"),
    bad("an even thinner one", holding(formula(unsafe=THIN.replace("<=", "="))), "too little of their box"),
    bad("beyond float32", holding(formula().replace("X_7 1.0", "X_7 1e39")), "input value 7", "float32"),
    bad("product", holding(formula(unsafe="(assert (>= (* Y_0 Y_1) 0))")), "line 21", "multiplied"),
    bad("inputs against outputs", holding(formula(unsafe="(assert (>= Y_0 X_0))")), "line 21", "keep them apart"),
]


@pytest.mark.parametrize("command", [check, fix])
@pytest.mark.parametrize(("spoil", "words"), FORMULAS)
def test_formula(case: Paths, spoil: Spoil, words: tuple[str, ...], command: Any) -> None:
    to_check(case, FAR)
    spoil(case)
    refuses(case, 2, case.spec, case.folder / "far.vnnlib", *words, command=command)


def test_answers_of_infinity_in_the_region(case: Paths) -> None:
    holding(formula().replace("X_7 1.0", "X_7 3e38"))(case)
    refuses(to_check(case, FAR), 3, case.model, "NaN or infinity", "the region of", case.folder / "far.vnnlib")


# -- models --------------------------------------------------------------------------------------


def info(name: str, kind: int, shape: list[object] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def node(operator: str, inputs: str, outputs: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), name=operator, **attributes)


def model(
    *nodes: onnx.NodeProto,
    inputs: list[onnx.ValueInfoProto] | None = None,
    outputs: list[onnx.ValueInfoProto] | None = None,
    classes: int = CLASSES,
    **tensors: Array,
) -> onnx.ModelProto:
    """Return a model that multiplies by w; nodes stand in front of it."""
    rng = np.random.default_rng(3)
    held = {"w": rng.normal(size=(FEATURES, classes)).astype(np.float32), **tensors}
    source = nodes[-1].output[0] if nodes else "input"
    last = [] if any("scores" in item.output for item in nodes) else [node("MatMul", f"{source} w", "scores")]
    graph = helper.make_graph(
        [*nodes, *last],
        "kinds",
        [info("input", FLOAT, ["batch", FEATURES])] if inputs is None else inputs,
        [info("scores", FLOAT, ["batch", classes])] if outputs is None else outputs,
        [numpy_helper.from_array(values, name) for name, values in held.items()],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, ir_version=8, opset_imports=opsets)


def typed(kind: int) -> onnx.ModelProto:
    return model(node("Cast", "input", "real", to=FLOAT), inputs=[info("input", kind, ["batch", FEATURES])])


def of_text() -> onnx.ModelProto:
    coded = node("LabelEncoder", "input", "real", domain="ai.onnx.ml", keys_strings=["a"], values_floats=[1.0])
    return model(coded, inputs=[info("input", TensorProto.STRING, ["batch", FEATURES])])


def image() -> onnx.ModelProto:
    return model(node("Flatten", "input", "flat"), inputs=[info("input", FLOAT, ["batch", 1, 2, 4])])


def sigmoid() -> onnx.ModelProto:
    shape = [info("scores", FLOAT, ["batch", 1])]
    return model(node("MatMul", "input w", "z"), node("Sigmoid", "z", "scores"), outputs=shape, classes=1)


def labelled() -> onnx.ModelProto:
    """Scores, and the class as a whole number, which is listed first."""
    nodes = [node("MatMul", "input w", "scores"), node("ArgMax", "scores", "label", axis=1, keepdims=0)]
    outputs = [info("label", TensorProto.INT64, ["batch"]), info("scores", FLOAT, ["batch", CLASSES])]
    return model(*nodes, outputs=outputs)


def only_labels() -> onnx.ModelProto:
    proto = labelled()
    del proto.graph.output[1]
    return proto


def sequence() -> onnx.ModelProto:
    proto = model()
    proto.graph.node.append(node("SequenceConstruct", "scores", "several"))
    proto.graph.output[0].CopyFrom(helper.make_tensor_sequence_value_info("several", FLOAT, None))
    return proto


def two_inputs() -> onnx.ModelProto:
    inputs = [info(name, FLOAT, ["batch", FEATURES]) for name in ("input", "more")]
    return model(node("Add", "input more", "both"), inputs=inputs)


def no_input() -> onnx.ModelProto:
    return model(node("Identity", "w", "scores"), inputs=[], outputs=[info("scores", FLOAT, [FEATURES, CLASSES])])


def empty_batch() -> onnx.ModelProto:
    return model(inputs=[info("input", FLOAT, [0, FEATURES])])


def mixing() -> onnx.ModelProto:
    """Takes the mean of the batch off, as a model does that was exported while it was trained."""
    return model(node("ReduceMean", "input", "mean", axes=[0], keepdims=1), node("Sub", "input mean", "centred"))


def as_type(kind: object) -> Spoil:
    return both(lambda x, y: {"input": np.abs(np.round(x)).astype(kind)})


def as_text(x: Array, y: Array) -> dict[str, Array | None]:
    return {"input": np.where(x > 0.5, "a", "b")}


def as_image(x: Array, y: Array) -> dict[str, Array | None]:
    return {"input": x.reshape(-1, 1, 2, 4)}


def with_more(x: Array, y: Array) -> dict[str, Array | None]:
    return {"more": np.zeros_like(x)}


nothing = both(lambda x, y: {})
BACKDOOR = "{name: seventh, kind: backdoor, trigger: trigger.npz, target: 1}"
HALF = sex("{column: 6, values: [0, 0.5]}")
I64, U8, BOOL = TensorProto.INT64, TensorProto.UINT8, TensorProto.BOOL

MODELS = [
    bad("no input, fairness", (no_input(), nothing, FAIR, "", 3), "model.onnx", "no input"),
    bad("no input, safety", (no_input(), nothing, FAR, "", 3), "model.onnx", "no input"),
    bad("no values, errors", (empty_batch(), nothing, WRONG, "", 3), "model.onnx", "'input'", "[0, 8]"),
    bad("no values, safety", (empty_batch(), nothing, FAR, "", 3), "model.onnx", "'input'", "[0, 8]"),
    bad("mixes rows", (mixing(), nothing, WRONG, "", 3), "model.onnx", "mixes the rows"),
    bad("fairness on images", (image(), both(as_image), FAIR, "", 2), "properties.sex", "['batch', 1, 2, 4]"),
    bad("int64, half a value", (typed(I64), as_type(np.int64), HALF, "", 2), "protected.sex", "0.5", "int64"),
    bad("bool, half a value", (typed(BOOL), as_type(bool), HALF, "", 2), "protected.sex", "0.5", "bool"),
    bad(
        "uint8, a value below 0",
        (typed(U8), as_type(np.uint8), sex("{column: 6, values: [0, 1, -7]}"), "", 2),
        "protected.sex",
        "-7",
        "uint8",
    ),
    bad(
        "uint8, bounds below 0", (typed(U8), as_type(np.uint8), FAIR, BOUNDS, 2), "bounds: -3 to 5 at value 0", "uint8"
    ),
    bad("int64, safety", (typed(I64), as_type(np.int64), FAR, "", 2), "properties.far", "real numbers", "int64"),
    bad("bool, safety", (typed(BOOL), as_type(bool), FAR, "", 2), "properties.far", "real numbers", "bool"),
    bad("int64, data of floats", (typed(I64), nothing, FAIR, "", 3), "repair.npz", "float32", "int64"),
    bad("text, fairness", (of_text(), both(as_text), FAIR, "", 2), "properties.sex", "numbers", "'input'"),
    bad("text, safety", (of_text(), both(as_text), FAR, "", 2), "properties.far", "real numbers", "no numbers"),
    bad("text, backdoor", (of_text(), both(as_text), BACKDOOR, "", 2), "properties.seventh", "triggers are numbers"),
    bad("sequence", (sequence(), nothing, WRONG, "", 3), "model.onnx", "several holds no tensor"),
    bad("only labels", (only_labels(), nothing, FAR, "", 3), "model.onnx", "one score per class", "label holds int64"),
    bad("labels by name", (labelled(), nothing, FAIR, "output: label\n", 3), "'label'", "label holds int64"),
    bad(
        "threshold of four classes",
        (dense(), nothing, FAIR, "decision: {threshold: 0.5}\n", 3),
        "model.onnx",
        "one score a sample",
        "decision: argmax",
    ),
    bad("argmax of one score", (sigmoid(), nothing, FAIR, "", 3), "one score per class", "decision: {threshold: 0.5}"),
    bad(
        "argmin of one score",
        (sigmoid(), nothing, FAIR, "decision: argmin\n", 3),
        "one score per class",
        "decision: {threshold: 0.5}",
    ),
    bad(
        "labels beyond a threshold",
        (sigmoid(), nothing, WRONG, "decision: {threshold: 0.5}\n", 3),
        "repair.npz",
        "0 to 3",
        "classes 0 to 1",
    ),
    *[
        bad(
            f"sigmoid above {threshold}",
            (sigmoid(), nothing, FAIR, f"decision: {{threshold: {threshold}}}\n", 2),
            "decision: ",
            "'scores'",
            "sigmoid",
            "between 0 and 1",
        )
        for threshold in ("0", "1", "50", "-0.5", "0.99999999999999999999")
    ],
    bad(
        "threshold beyond float32",
        (
            model(classes=1, outputs=[info("scores", FLOAT, ["batch", 1])]),
            nothing,
            FAIR,
            "decision: {threshold: 1e39}\n",
            2,
        ),
        "decision: ",
        "1e+39",
        "float32",
    ),
    bad("which input", (two_inputs(), both(with_more), FAIR, "", 2), "properties.sex.input", "input, more"),
    bad("input missing", (two_inputs(), nothing, FAIR, "", 3), "repair.npz", "'more'"),
    bad("formula of one input", (two_inputs(), both(with_more), FAR, "", 2), "far.vnnlib", "8 input", "takes 16"),
]


@pytest.mark.parametrize(("parts", "words"), MODELS)
def test_model(case: Paths, parts: tuple[onnx.ModelProto, Spoil, str, str, int], words: tuple[str, ...]) -> None:
    proto, spoil, item, top, code = parts
    case.model.write_bytes(proto.SerializeToString())
    spoil(case)
    refuses(to_check(case, item, top=top), code, *words)


def test_scores_read_as_costs(case: Paths) -> None:
    """Nobody can tell that the rule is the wrong one, but the verdict shows it."""
    result = check(to_check(case, WRONG, top="decision: argmin\n"), "--format", "json")
    (rate, *_) = json.loads(result.stdout)["findings"][0]["measures"]
    assert (result.exit_code, result.stderr, rate["status"]) == (1, "", "fail")
    assert rate["value"] > 0.9


OPEN = [info("input", FLOAT, ["batch", "columns"])]


def test_without_data_the_shape_has_to_be_known(case: Paths) -> None:
    case.model.write_bytes(model(inputs=OPEN).SerializeToString())
    refuses(to_check(case, FAR, top=BOUNDS, files=""), 2, case.spec, "data: needed", case.model, "'input'")


@pytest.mark.parametrize(
    ("proto", "kind"),
    [(typed(I64), np.int64), (typed(U8), np.uint8), (typed(BOOL), bool), (typed(TensorProto.DOUBLE), np.float64)],
    ids=["int64", "uint8", "bool", "float64"],
)
def test_other_numbers_can_be_checked(case: Paths, proto: onnx.ModelProto, kind: object) -> None:
    """A whole run over inputs of other types, drawn from bounds too, ends with a verdict."""
    case.model.write_bytes(proto.SerializeToString())
    rng = np.random.default_rng(8)
    for path in (case.data, case.holdout):
        case.edit(path, input=rng.integers(0, 2, (SIZE, FEATURES)).astype(kind))
    ends = f"bounds: {{low: {EIGHT}, high: {EIGHT.replace('0', '1')}}}\n"
    result = check(to_check(case, FAIR, WRONG, top=ends))
    assert result.exit_code in (0, 1) and "random rows" in result.stdout, result.stderr


# -- files that are not safe to run --------------------------------------------------------------


def two_value_fields(paths: Paths) -> None:
    def twice(proto: onnx.ModelProto) -> None:
        proto.graph.initializer[0].float_data.extend([0.0] * int(np.prod(proto.graph.initializer[0].dims)))

    paths.edit_model(twice)


def external(paths: Paths, location: str = "w.bin") -> None:
    save = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 16}
    onnx.save_model(onnx.load(paths.model), paths.model, **save)
    proto = onnx.load(paths.model, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    paths.model.write_bytes(proto.SerializeToString())


UNSAFE = [
    bad("two value fields", two_value_fields, "two-value-fields", "first.weight"),
    bad("external data outside", lambda paths: external(paths, "../w.bin"), "external-data-outside", "../w.bin"),
    bad("external data anywhere", lambda paths: external(paths, "/etc/hosts"), "external-data-outside", "/etc/hosts"),
    bad("external data missing", lambda paths: external(paths, "gone.bin"), "external-data-missing", "gone.bin"),
    bad("empty", lambda paths: paths.model.write_bytes(b""), "not-onnx", "empty"),
    bad("text", lambda paths: paths.model.write_text("model: none\n"), "not-onnx", "something else"),
    bad("random", lambda paths: paths.model.write_bytes(np.random.default_rng(1).bytes(999)), "not-onnx", "something"),
    bad("cut", lambda paths: paths.model.write_bytes(paths.model.read_bytes()[:-9]), "not-onnx", "truncated"),
    bad("data", lambda paths: paths.model.write_bytes(paths.data.read_bytes()), "not-onnx", "something else"),
    bad("no graph", lambda paths: paths.model.write_bytes(b"\x08\x08"), "no-graph", "no graph"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("spoil", "words"), UNSAFE)
def test_what_is_not_safe_to_run_is_a_finding(case: Paths, spoil: Spoil, words: tuple[str, ...], form: str) -> None:
    """The report itself tells, in every format; onnxruntime sees nothing of the file."""
    spoil(case)
    before = contents(case.folder)
    result = check(case, "--format", form)
    assert (result.exit_code, result.stderr) == (1, "")
    read = {"json": json.loads, "sarif": json.loads, "junit": ElementTree.fromstring, "text": str}[form]
    assert read(result.stdout)
    text = " ".join(result.stdout.split())
    assert all(word in text for word in words), result.stdout
    assert contents(case.folder) == before


NOT_LOADED = [
    bad("missing", lambda paths: paths.model.unlink(), "no such file"),
    bad("folder", lambda paths: (paths.model.unlink(), paths.model.mkdir()), "is a folder"),
    bad("opset", lambda paths: paths.edit_model(lambda p: setattr(p.opset_import[0], "version", 28)), "opset 28"),
    bad("operator", lambda paths: paths.edit_model(lambda p: setattr(p.graph.node[1], "op_type", "Squash")), "Squash"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("spoil", "words"), NOT_LOADED)
def test_what_cannot_be_run_is_refused(case: Paths, spoil: Spoil, words: tuple[str, ...], form: str) -> None:
    spoil(case)
    refuses(case, 3, case.model, *words, args=("--format", form, "-o", case.folder / "report"))


def test_answers_of_nan(case: Paths) -> None:
    case.model.write_bytes(model(w=np.full((FEATURES, CLASSES), np.nan, np.float32)).SerializeToString())
    refuses(case, 3, case.model, "NaN or infinity", case.data)


# -- baselines -----------------------------------------------------------------------------------


def wide(columns: int) -> onnx.ModelProto:
    w = np.ones((columns, CLASSES), np.float32)
    return model(inputs=[info("input", FLOAT, ["batch", columns])], w=w)


def named(inside: str, outside: str) -> onnx.ModelProto:
    inputs, outputs = [info(inside, FLOAT, ["batch", FEATURES])], [info(outside, FLOAT, ["batch", CLASSES])]
    proto = model(inputs=inputs, outputs=outputs)
    proto.graph.node[0].input[0], proto.graph.node[0].output[0] = inside, outside
    return proto


def five_classes(declared: object = 5) -> onnx.ModelProto:
    return model(classes=5, outputs=[info("scores", FLOAT, ["batch", declared])])


def one_class() -> onnx.ModelProto:
    return model(classes=1)


BASELINES = [
    bad("other input", (named("x", "scores"), None), "model.onnx", "inputs input", "base.onnx has x"),
    bad("other output", (named("input", "probs"), None), "model.onnx", "outputs scores", "base.onnx has probs"),
    bad("more outputs", (labelled(), None), "model.onnx", "outputs scores", "base.onnx has label, scores"),
    bad("narrower", (wide(7), None), "model.onnx", "'input'", "['batch', 8]", "base.onnx", "['batch', 7]"),
    bad("images", (image(), None), "model.onnx", "'input'", "base.onnx", "['batch', 1, 2, 4]"),
    bad("float64", (typed(TensorProto.DOUBLE), None), "model.onnx", "float32", "base.onnx", "float64"),
    bad("five classes", (five_classes(), None), "model.onnx", "4 classes", "base.onnx has 5"),
    bad("four against five classes", (dense(), five_classes()), "model.onnx", "5 classes", "base.onnx has 4"),
    bad("an open number of classes", (dense(), five_classes("classes")), "model.onnx", "5 classes", "base.onnx has 4"),
    bad("one score", (dense(), one_class()), "model.onnx", "'scores'", "one score per class"),
    bad("mixes rows", (mixing(), None), "base.onnx", "mixes the rows"),
    bad("model mixes rows", (dense(), mixing()), "model.onnx", "mixes the rows"),
    bad("no values", (empty_batch(), None), "base.onnx", "[0, 8]"),
    bad("model without values", (dense(), empty_batch()), "model.onnx", "[0, 8]"),
]


@pytest.mark.parametrize(("pair", "words"), BASELINES)
def test_baseline_of_another_kind(
    case: Paths, pair: tuple[onnx.ModelProto, onnx.ModelProto | None], words: tuple[str, ...]
) -> None:
    baseline, judged = pair
    (case.folder / "base.onnx").write_bytes(baseline.SerializeToString())
    if judged is not None:
        case.model.write_bytes(judged.SerializeToString())
    refuses(case, 3, *words, args=("--baseline", case.folder / "base.onnx"))


BASELINE_FILES = [
    bad("missing", None, "no such file"),
    bad("empty", b"", "the file is empty"),
    bad("text", b"hello", "not an ONNX"),
    bad("random", np.random.default_rng(1).bytes(999), "not an ONNX"),
    bad("cut", dense().SerializeToString()[:-9], "truncated"),
]


@pytest.mark.parametrize(("content", "words"), BASELINE_FILES)
def test_baseline_that_is_no_model(case: Paths, content: bytes | None, words: tuple[str, ...]) -> None:
    baseline = case.folder / "base.onnx"
    if content is not None:
        baseline.write_bytes(content)
    refuses(case, 3, baseline, *words, args=("--baseline", baseline))


def test_other_files_as_baseline(case: Paths) -> None:
    refuses(case, 3, case.folder, "is a folder", args=("--baseline", case.folder))
    refuses(case, 3, case.spec, "not an ONNX", args=("--baseline", case.spec))
    two_value_fields(Paths(case.folder, *[case.folder / "model.onnx"] * 5))
    clean = case.folder / "clean.onnx"
    clean.write_bytes(dense().SerializeToString())
    swapped = onnxcare("check", clean, "--spec", case.spec, "--device", "cpu", "--baseline", case.model)
    check_refusal(swapped, 3, case.model, "two fields")


# -- reports -------------------------------------------------------------------------------------


REPORTS = {
    "folder missing": ("nowhere/report", "nowhere does not exist"),
    "parent is a file": ("care.yaml/report", "care.yaml does not exist"),
    "folder": ("folder", "is a folder"),
    "model": ("model.onnx", "model.onnx"),
    "model by another way": ("folder/../model.onnx", "model.onnx"),
    "model by a hard link": ("linked.onnx", "is an input"),
    "baseline": ("base.onnx", "base.onnx"),
    "spec": ("care.yaml", "is an input"),
    "data": ("repair.npz", "is an input"),
    "holdout": ("holdout.npz", "is an input"),
    "data by a link": ("link.npz", "is an input"),
    "formula": ("far.vnnlib", "is an input"),
    "further samples": ("more.npz", "is an input"),
    "weights of the model": ("w.bin", "is an input"),
    "a name too long": (300 * "a", "too long"),
}


@pytest.mark.parametrize(("name", "words"), REPORTS.values(), ids=REPORTS.keys())
@pytest.mark.parametrize("form", ["text", "sarif"])
def test_report(case: Paths, name: str, words: str, form: str) -> None:
    """A report never takes the place of what the check reads."""
    external(case)
    more()(case)
    to_check(case, FAR, wrong("samples: more.npz"))
    (case.folder / "folder").mkdir()
    (case.folder / "linked.onnx").hardlink_to(case.model)
    (case.folder / "link.npz").symlink_to(case.data)
    (case.folder / "base.onnx").write_bytes(dense().SerializeToString())
    args = ("--format", form, "-o", case.folder / name, "--baseline", case.folder / "base.onnx")
    refuses(case, 2, name, words, args=args)


def test_report_of_a_repair_spares_the_weights_too(case: Paths) -> None:
    external(case)
    refuses(case, 2, "w.bin", "is an input", args=("--json", case.folder / "w.bin"), command=fix)


def test_report_into_a_pipe(case: Paths) -> None:
    pipe = case.folder / "pipe"
    os.mkfifo(pipe)
    check_refusal(check(case, "-o", pipe), 2, pipe, "not a file")
    assert pipe.is_fifo()


def test_report_on_standard_output_by_name(case: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.folder)
    before = contents(case.folder)
    result = check(case, "--format", "json", "-o", "-")
    assert result.exit_code == 0 and json.loads(result.stdout)["status"] == "pass"
    assert contents(case.folder) == before


@pytest.mark.parametrize("form", FORMS)
def test_report_into_a_read_only_folder(case: Paths, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refuses(case, 2, case.folder, "not writable", args=("--format", form, "-o", case.folder / "report"))


@pytest.mark.parametrize("form", FORMS)
def test_disk_becomes_full(case: Paths, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    def full(path: Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    report = case.folder / "report"
    report.write_text("an older one")
    monkeypatch.setattr(Path, "write_bytes", full)
    refuses(case, 2, report, "No space left on device", args=("--format", form, "-o", report))


# -- usage ---------------------------------------------------------------------------------------


CHECK = ("check", "MODEL", "--spec", "SPEC")
USAGE = {
    "no model": (("check", "--spec", "SPEC"), "MODEL"),
    "no spec": (("check", "MODEL"), "--spec"),
    "two models": ((*CHECK, "MODEL"), "model.onnx"),
    "unknown format": ((*CHECK, "--format", "xml"), "--format", "'xml'", "'sarif'"),
    "empty format": ((*CHECK, "--format", ""), "--format", "'text'"),
    "option misspelt": ((*CHECK, "--formt", "json"), "--formt", "--format"),
    "option of fix": ((*CHECK, "--in-place"), "--in-place"),
    "json": ((*CHECK, "--json", "x.json"), "--json"),
    "unknown device": ((*CHECK, "--device", "tpu"), "--device", "tpu"),
    "seed 0": ((*CHECK, "--seed", "0"), "--seed"),
    "seed of text": ((*CHECK, "--seed", "x"), "--seed"),
}


@pytest.mark.parametrize(("args", "words"), [(args, words) for args, *words in USAGE.values()], ids=USAGE.keys())
def test_usage(case: Paths, args: tuple[str, ...], words: list[str]) -> None:
    before = contents(case.folder)
    result = onnxcare(*({"MODEL": case.model, "SPEC": case.spec}.get(arg, arg) for arg in args))
    lines = result.stderr.splitlines()
    assert (result.exit_code, result.stdout) == (2, "")
    assert lines[0].startswith("Usage: ") and lines[-1].startswith("Error: ")
    assert all(word in lines[-1] for word in words), result.stderr
    assert contents(case.folder) == before


def test_memory_and_gpu(case: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    refuses(case, 2, "--memory lots", args=("--memory", "lots"))
    monkeypatch.setattr("onnxcare.runtime._cuda_works", lambda: False)
    check_refusal(check(case, device="cuda"), 2, "--device cuda", "--device cpu")


@pytest.mark.parametrize("form", FORMS)
def test_files_in_the_wrong_places(case: Paths, form: str) -> None:
    last = ("--device", "cpu", "--format", form)
    check_refusal(onnxcare("check", case.model, "--spec", case.model, *last), 2, case.model, "not a text file")
    check_refusal(onnxcare("check", case.model, "--spec", case.folder, *last), 2, case.folder, "directory")
    absent = case.folder / "no.yaml"
    check_refusal(onnxcare("check", case.model, "--spec", absent, *last), 2, absent, "no such file")


def test_a_spec_out_of_a_pipe(case: Paths) -> None:
    """As of a shell's <(...): it would be empty when it is read again."""
    os.mkfifo(case.folder / "pipe")
    for command in ("check", "locate"):
        result = onnxcare(command, case.model, "--spec", case.folder / "pipe", "--device", "cpu")
        check_refusal(result, 2, case.folder / "pipe", "pipe or a device", "file")


def test_nothing_to_locate(case: Paths) -> None:
    to_check(case, FAR)
    located = onnxcare("locate", case.model, "--spec", case.spec, "--device", "cpu")
    check_refusal(located, 3, "far", "nothing to be located")


WRONG_ARGUMENTS: list[tuple[Callable[..., object], dict[str, Any], type[Exception], str]] = [
    (package.check, {"device": "tpu"}, UsageError, "device tpu"),
    (package.check, {"seed": 0}, UsageError, "seed 0"),
    (package.check, {"memory": "lots"}, UsageError, "lots"),
    (package.check, {"baseline": "nowhere.onnx"}, ModelError, r"nowhere\.onnx: no such file"),
    (package.locate, {"samples": 0}, UsageError, "samples 0"),
    (package.locate, {"values": 1}, UsageError, "values 1"),
    (package.locate, {"device": "gpu"}, UsageError, "device gpu"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "words"), WRONG_ARGUMENTS)
def test_arguments_from_python(
    case: Paths, function: Callable[..., object], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        function(case.model, case.spec, **{"device": "cpu", **arguments})


def test_data_errors_from_python(case: Paths) -> None:
    unlabelled(case)
    with pytest.raises(DataError, match="'wrong'"):
        package.check(case.model, case.spec, device="cpu")


# -- names ---------------------------------------------------------------------------------------


MARKUP = ["[red]x[/red]", "[/red]", "[link=http://x]a", 'a"<&>b', "{0} ](x) `", "größe 模型 👩‍🔬", "a/b\\c", "guards"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MARKUP)
def test_names_that_read_like_markup(case: Paths, name: str, form: str) -> None:
    quoted = json.dumps(name, ensure_ascii=False)
    result = check(to_check(case, WRONG.replace("name: wrong", f"name: {quoted}")), "--format", form)
    assert (result.exit_code, result.stderr) == (0, "")
    if form == "text":
        assert f"{name}: error rate" in result.stdout
    elif form == "json":
        assert json.loads(result.stdout)["findings"][0]["name"] == name
    elif form == "junit":
        names = {suite.get("name") for suite in ElementTree.fromstring(result.stdout)}
        assert f"onnxcare.errors.{name}" in names
    else:
        assert json.loads(result.stdout)["runs"][0]["results"] == []


@pytest.mark.parametrize("name", MARKUP[:3])
def test_attributes_that_read_like_markup(case: Paths, name: str) -> None:
    both_kinds = fair(f"{{{json.dumps(name)}: {{column: 6, values: [0, 1]}}}}", ", max_gap: 0.5, max_rate: 0.5")
    result = check(to_check(case, both_kinds))
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"gap by {name}" in result.stdout


@pytest.mark.parametrize("form", FORMS)
def test_paths_with_blanks_and_other_letters(case: Paths, form: str) -> None:
    folder = case.folder / "modèles [red] 模型 'q'"
    folder.mkdir()
    for path in (case.model, case.spec, case.data, case.holdout):
        path.rename(folder / path.name)
    report = folder / "ré [port] 1"
    args = ("--format", form, "-o", report, "--device", "cpu")
    result = onnxcare("check", folder / "model.onnx", "--spec", folder / "care.yaml", *args)
    assert (result.exit_code, result.stderr) == (0, "")
    assert str(folder) in result.stdout.replace("\n", "")
    assert report.read_text(encoding="utf-8")
    (folder / "repair.npz").unlink()
    result = onnxcare("check", folder / "model.onnx", "--spec", folder / "care.yaml", *args)
    check_refusal(result, 3, folder / "repair.npz", "no such file")


def test_fifty_properties(case: Paths) -> None:
    many = [f"{{name: n{index}, kind: errors, label: {index % CLASSES}, max_error_rate: 0.5}}" for index in range(50)]
    found = json.loads(check(to_check(case, *many), "--format", "json").stdout)
    assert [item["name"] for item in found["findings"][:-1]] == [f"n{index}" for index in range(50)]
    assert found["status"] == "pass"
    refuses(to_check(case, *many, many[7]), 2, case.spec, "two properties", "'n7'")
    refuses(to_check(case, *many, FAIR.replace("name: sex", "name: n9")), 2, case.spec, "'n9'")


def test_the_first_broken_property_is_named(case: Paths) -> None:
    broken = "{name: gone, kind: safety, vnnlib: gone.vnnlib}"
    refuses(to_check(case, WRONG, FAIR, broken), 2, case.spec, "gone.vnnlib", "no such file")
    refuses(to_check(case, WRONG, FAIR, "{name: a, kind: errors, answerd: 1}"), 2, "properties.2.answerd", "'answered'")


# -- interrupts and the world outside ------------------------------------------------------------


def interrupt(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


PLACES = ["api.static_findings", "api.prepare", "api.optimisation_findings", "api.judge", "runtime.Session.run_rows"]


@pytest.mark.parametrize("where", [*PLACES, "report.render_check"])
def test_interrupt(case: Paths, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    report = case.folder / "report.sarif"
    report.write_text("an older one")
    before = contents(case.folder)
    monkeypatch.setattr(f"onnxcare.{where}", interrupt)
    result = check(case, "--format", "sarif", "-o", report)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.split("\n")[-2:] == ["onnxcare: interrupted; no half-written file is left", ""]
    assert contents(case.folder) == before


def test_interrupt_while_the_report_is_written(case: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(case.folder)
    monkeypatch.setattr(Path, "replace", interrupt)
    assert check(case, "-o", case.folder / "report").exit_code == 130
    assert contents(case.folder) == before


def run(paths: Paths, *args: str) -> list[str]:
    command = [sys.executable, "-m", "onnxcare", "check", str(paths.model), "--spec", str(paths.spec)]
    return [*command, "--device", "cpu", *args]


def test_interrupt_by_a_signal(case: Paths) -> None:
    to_check(case, *(FAR.replace("name: far", f"name: far{index}") for index in range(50)))
    before = contents(case.folder)
    command = run(case, "-o", str(case.folder / "report.json"), "--format", "json")
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(2.5)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.split() == "onnxcare: interrupted; no half-written file is left".split()
    assert out == "" and contents(case.folder) == before


@pytest.mark.parametrize("form", ["text", "sarif"])
def test_reader_goes_away(case: Paths, form: str) -> None:
    command = run(case, "--format", form)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        err = process.stderr.read()
    assert (process.returncode, err) == (1, "")


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(case: Paths, closed: str) -> None:
    """As in a cron job: what nobody reads is not printed, and the exit code says the rest."""
    command = " ".join(f"'{part}'" for part in run(case))
    done = subprocess.run(f"{command} {closed}", shell=True, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_memory_left(case: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    def unaffordable(*args: object, **kwargs: object) -> None:
        raise np._core._exceptions._ArrayMemoryError((10**9, 784), np.dtype(np.float64))

    monkeypatch.setattr("onnxcare.api.judge", unaffordable)
    refuses(case, 3, "not enough memory", "5.70 TiB", "fewer samples")
