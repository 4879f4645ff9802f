"""care.yaml: what the model must not do, the data that shows it, and what a repair must keep.

    data: repair.npz            # arrays named like the model's inputs, or x; labels y
    holdout: test.npz           # optional; otherwise a part of data is held out
    labels: y                   # optional: the key of the labels
    output: scores              # optional: the output that is judged, where there are several
    sample_axes: {state: 1, rate: null}      # optional: inputs with samples on another axis than 0, or without samples
    decision: argmax            # or argmin (scores are costs), or {threshold: 0.5} (one score)
    bounds: {low: [0, 0], high: [1, 90]}     # optional: the range of every input value
    confidence: 0.99            # optional: intervals, not measured rates, have to keep the limits
    properties:
      - {name: white-square, kind: backdoor, trigger: trigger.npz, target: 1, max_rate: 0.01}
      - {name: swap, kind: backdoor, triggered: bad.npz, twins: good.npz, target: {0: 1, 1: 0}}
      - {name: sex, kind: fairness, protected: {sex: {column: 8, values: [0, 1]}}, max_rate: 0.01}
      - {name: far, kind: safety, vnnlib: far.vnnlib}
      - {name: fours, kind: errors, label: 4, max_rate: 0.5}
    keep: {accuracy_drop: 0.01, recall_drop: 0.05}
    seed: 1

Paths are relative to the spec. Rates and drops are shares: 0.01 is one point. The README explains every kind.
"""

from __future__ import annotations

import re
import reprlib
import unicodedata
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from onnxcare.errors import SpecError, nearest


def _relative(path: Path, info: ValidationInfo) -> Path:
    if path == Path():
        raise ValueError("expected the path of a file")
    folder = (info.context or {}).get("folder", Path())
    return path if path.is_absolute() else folder / path


def _one_line(name: str) -> str:
    """Refuse what would break or disguise a line of a report."""
    if not name.strip() or any(unicodedata.category(c) in _NO_TEXT or c in _REORDERING for c in name):
        raise ValueError(f"expected a name on one line, without control characters, not {reprlib.repr(name)}")
    return name


# Controls, lone surrogates, separators of lines and of paragraphs.
_NO_TEXT = ("Cc", "Cs", "Zl", "Zp")
_REORDERING = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

Name = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_one_line)]
DataPath = Annotated[Path, AfterValidator(_relative)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Class = Annotated[int, Field(ge=0, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keep(_Section):
    """What a repair must keep on clean held-out data.

    Attributes:
        accuracy_drop: largest loss of accuracy.
        recall_drop: largest loss of recall of any class.
        balanced_accuracy_drop: largest loss of the mean recall.
        broken: largest share of right answers that may become wrong; None for no limit.
        decisions_changed: largest share of decisions that may change, right or wrong; None for no limit.
        calibration_rise: largest rise of the expected calibration error; None for no limit.
        accuracy: least accuracy, whatever it was before; None for no limit.
        recall: least recall of any class; None for no limit.
    """

    accuracy_drop: Share = 0.01
    recall_drop: Share = 0.05
    balanced_accuracy_drop: Share = 0.02
    broken: Share | None = None
    decisions_changed: Share | None = None
    calibration_rise: Share | None = None
    accuracy: Share | None = None
    recall: Share | None = None


class Threshold(_Section):
    """One score decides: class 1 above the threshold, class 0 else."""

    threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Bounds(_Section):
    """The range of every value of the model's input, flattened, samples left out."""

    low: Annotated[list[Number], Field(min_length=1)]
    high: Annotated[list[Number], Field(min_length=1)]

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if len(self.low) != len(self.high):
            raise ValueError(f"low has {len(self.low)} values, high has {len(self.high)}")
        for index, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if low > high:
                raise ValueError(f"low {low:g} is above high {high:g} at value {index}")
        return self


class _PropertySpec(_Section):
    name: Name

    def files(self) -> list[Path]:
        """Return the files that the property names."""
        return [value for name in type(self).model_fields if isinstance(value := getattr(self, name), Path)]


def _target(given: object) -> int | dict[int, int] | None:
    """Read a class, or true classes and the ones that they are led to."""
    if given is None or _is_class(given):
        return given
    if not isinstance(given, dict):
        wanted = "expected a class, or true classes with the ones that they are led to ({0: 1, 1: 2})"
        raise ValueError(f"{wanted}, not {reprlib.repr(given)}")
    if not given:
        raise ValueError("names no class that is led to another one")
    for true, wrong in given.items():
        if not _is_class(true) or not _is_class(wrong):
            raise ValueError(f"expected a class that is led to a class, not {reprlib.repr({true: wrong})}")
        if true == wrong:
            raise ValueError(f"class {true} is led to itself; leave out classes that are not attacked")
    return given


def _is_class(given: object) -> TypeGuard[int]:
    return isinstance(given, int) and not isinstance(given, bool) and given >= 0


class BackdoorSpec(_PropertySpec):
    """A hidden trigger makes the model answer `target`.

    Attributes:
        name: how reports call the property.
        trigger: npz with arrays `mask` and `pattern` in the model's input space, or with what is `added` to it.
        triggered: npz with triggered samples, where the trigger itself is not known. Where neither is given, the
            trigger is restored from the model, if there is one.
        triggered_holdout: further triggered samples that only the judge may see.
        twins: npz with the samples of `triggered` without the trigger, row by row. No static trigger has to explain
            them then.
        target: the class the trigger leads to, or the one for every true class that is attacked; None, where it is
            to be found out together with the trigger.
        max_rate: attack success that is tolerated above the clean confusion rate.
    """

    kind: Literal["backdoor"]
    trigger: DataPath | None = None
    triggered: DataPath | None = None
    triggered_holdout: DataPath | None = None
    twins: DataPath | None = None
    target: Annotated[int | dict[int, int] | None, PlainValidator(_target)] = None
    max_rate: Share = 0.01

    @property
    def unknown(self) -> bool:
        """Whether the trigger has to be restored."""
        return self.trigger is None and self.triggered is None

    @model_validator(mode="after")
    def _one_source(self) -> BackdoorSpec:
        if self.trigger is not None and self.triggered is not None:
            raise ValueError("give either trigger or triggered (or neither, to have the trigger restored)")
        if self.target is None and (self.trigger is not None or self.triggered is not None):
            raise ValueError("target: this key is needed; it may only be left out together with the trigger")
        if self.unknown and isinstance(self.target, dict):
            raise ValueError("target: a trigger is restored for one class; give it, or triggered samples, for several")
        if self.triggered_holdout is not None and self.triggered is None:
            raise ValueError("triggered_holdout goes with triggered")
        if self.triggered is not None and self.triggered == self.triggered_holdout:
            raise ValueError("triggered_holdout is the same file as triggered; the judge needs samples of its own")
        if self.twins is not None and self.triggered is None:
            raise ValueError("twins goes with triggered")
        if self.twins is not None and self.twins in (self.triggered, self.triggered_holdout):
            raise ValueError("twins is a file with triggered samples; it has to hold the same ones without the trigger")
        return self


class Protected(_Section):
    """A protected attribute: one column and its values, or one column for each of its values (one-hot).

    Attributes:
        column: position on the last axis of the input.
        values: what the column may hold.
        columns: the columns of a one-hot attribute; exactly one of them is 1.
    """

    column: Annotated[int, Field(ge=0, strict=True)] | None = None
    values: Annotated[list[Number], Field(min_length=2)] | None = None
    columns: Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(min_length=2)] | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Protected:
        if (self.column is None) == (self.columns is None):
            raise ValueError("give either column (with values) or columns (one-hot)")
        if (self.column is None) != (self.values is None):
            raise ValueError("values go with column; one-hot columns need none")
        given = self.columns or self.values or []
        if len(set(given)) < len(given):
            raise ValueError("a column or value stands twice")
        return self


Gap = Literal["demographic_parity", "equal_opportunity", "equalized_odds"]


class FairnessSpec(_PropertySpec):
    """Protected attributes must not decide.

    Attributes:
        name: how reports call the property.
        protected: the protected attributes, by name.
        input: the input that holds them, where there are several.
        max_rate: share of individuals whose decision changes with a protected attribute; where neither this nor
            `max_gap` is given it is 0.01.
        max_gap: largest tolerated gap between groups.
        gap: how the gap between groups is measured.
        favourable: the class that is a benefit.
    """

    kind: Literal["fairness"]
    protected: Annotated[dict[Name, Protected], Field(min_length=1)]
    input: str | None = None
    max_rate: Share | None = None
    max_gap: Share | None = None
    gap: Gap = "equalized_odds"
    favourable: Class = 1

    @property
    def individual_limit(self) -> float | None:
        """The limit on the share of individuals, with its default."""
        return 0.01 if self.max_rate is None and self.max_gap is None else self.max_rate


class SafetySpec(_PropertySpec):
    """The model must not answer in a way that a VNN-LIB formula describes.

    Attributes:
        name: how reports call the property.
        vnnlib: the formula; a point that satisfies it is a counterexample.
        max_rate: share of the formula's input region that may violate it.
        samples: how many fresh samples of the region the judge takes.
    """

    kind: Literal["safety"]
    vnnlib: DataPath
    max_rate: Share = 0.0
    samples: Annotated[int, Field(ge=100, le=10**8, strict=True)] = 1_000_000


class ErrorsSpec(_PropertySpec):
    """Samples that the model gets wrong are to become right.

    Attributes:
        name: how reports call the property.
        samples: npz with further labelled samples of the kind; what the model gets wrong in `data` counts too.
        label: only errors on samples of this true class.
        answered: only errors in which the model answers this class.
        max_rate: share of unseen errors of the kind that may stay wrong.
        max_error_rate: share of all samples of the kind that may be wrong; None for no limit.
    """

    kind: Literal["errors"]
    samples: DataPath | None = None
    label: Class | None = None
    answered: Class | None = None
    max_rate: Share = 0.5
    max_error_rate: Share | None = None

    @model_validator(mode="after")
    def _can_be_wrong(self) -> ErrorsSpec:
        if self.label is not None and self.label == self.answered:
            raise ValueError(f"label and answered are both {self.label}: such an answer is right")
        return self


PropertySpec = Annotated[BackdoorSpec | FairnessSpec | SafetySpec | ErrorsSpec, Field(discriminator="kind")]
_SECTIONS: dict[str, type[_PropertySpec]] = {
    "backdoor": BackdoorSpec,
    "fairness": FairnessSpec,
    "safety": SafetySpec,
    "errors": ErrorsSpec,
}
KINDS = tuple(_SECTIONS)


class Spec(_Section):
    """A whole care.yaml; paths are resolved against the file's folder."""

    data: DataPath | None = None
    holdout: DataPath | None = None
    labels: Annotated[str, Field(min_length=1)] = "y"
    output: str | None = None
    sample_axes: dict[str, Annotated[int, Field(ge=0, strict=True)] | None] = {}
    decision: Literal["argmax", "argmin"] | Threshold = "argmax"
    bounds: Bounds | None = None
    confidence: Annotated[float, Field(ge=0.5, lt=1, strict=True)] | None = None
    properties: Annotated[list[PropertySpec], Field(min_length=1)]
    keep: Keep = Keep()
    seed: Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)] = 1

    @model_validator(mode="after")
    def _names_differ(self) -> Spec:
        names = [item.name for item in self.properties]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two properties are called {name!r}")
        return self

    @model_validator(mode="after")
    def _has_data(self) -> Spec:
        if self.data is None:
            if self.holdout is not None:
                raise ValueError("data: this key is needed; holdout goes with data")
            if self.bounds is None or any(item.kind != "safety" for item in self.properties):
                raise ValueError("data: this key is needed (only safety properties do without, where bounds are given)")
        return self

    def files(self) -> list[Path]:
        """Return every file the spec names."""
        found = [path for path in (self.data, self.holdout) if path is not None]
        return [*found, *(path for item in self.properties for path in item.files())]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, of which YAML would keep the last one without a word; reads 1e-3 as a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_spec(path: str | Path) -> Spec:
    """Read a care.yaml.

    Raises:
        SpecError: the file is missing or malformed; the message names the file and the key.
    """
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise SpecError(f"{path}: is a pipe or a device; a spec is read more than once, so put it into a file")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file") from None
    except UnicodeDecodeError:
        raise SpecError(f"{path}: not a text file; a spec is YAML, see the README") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        content = yaml.load(text, _Loader)
    except Exception as error:  # yaml raises whatever int, float and datetime raise, and RecursionError
        mark = getattr(error, "problem_mark", None)
        where = f" in line {mark.line + 1}" if mark else ""
        problem = " ".join(str(getattr(error, "problem", error)).split())
        raise SpecError(f"{path}: not valid YAML{where}: {problem}") from None
    if not isinstance(content, dict):
        raise SpecError(f"{path}: expected keys such as data: and properties:, see the README")
    try:
        return Spec.model_validate(content, context={"folder": path.parent})
    except ValidationError as error:
        raise SpecError(f"{path}: {_explain(error, content)}") from None


# Where pydantic would speak of its own classes.
_PLAINLY = {
    "list_type": "expected a list",
    "dict_type": "expected keys with values",
    "model_type": "expected keys with values",
    "model_attributes_type": "expected keys with values",
    "path_type": "expected a path",
    "string_type": "expected text, in quotes where it looks like something else",
    "string_unicode": "expected text",
}


def _explain(error: ValidationError, content: dict[str, Any]) -> str:
    """Say the first problem in one line, with the key and the nearest known one."""
    # An unknown key is usually the misspelling behind a missing one: it is the more helpful of the two.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    path = _plain_path(problem["loc"])
    key = ".".join(path)
    match problem["type"]:
        case "extra_forbidden":
            return f"unknown key {key!r}{nearest(path[-1], _keys_beside(problem['loc']))}"
        case "missing":
            return f"{key}: this key is needed"
        case "union_tag_not_found":
            return f"{key}.kind: this key is needed; known kinds: {', '.join(KINDS)}"
        case "union_tag_invalid":
            given = str(problem["ctx"]["tag"])
            return f"{key}.kind: unknown kind {given!r}{nearest(given, KINDS)}; known: {', '.join(KINDS)}"
        case "value_error":
            text = problem["msg"].removeprefix("Value error, ")
            return f"{key}: {text}" if key else text
        case _ if path == ["decision"]:
            given = reprlib.repr(problem["input"])
            return f"decision: expected argmax, argmin or {{threshold: number}}, not {given}"
        case "too_short":
            least = problem["ctx"]["min_length"]
            wanted = "one item" if least == 1 else f"{least} items"
            return f"{key}: expected at least {wanted}, not {reprlib.repr(problem['input'])}"
        case kind:
            plainly = _PLAINLY.get(kind, problem["msg"].lower().removeprefix("input "))
            return f"{key}: {plainly}, not {reprlib.repr(problem['input'])}"


def _plain_path(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that lead to a place, without the names that pydantic gives to alternatives."""
    path = [name if name.isprintable() else repr(name)[1:-1] for name in map(str, location)]
    if path[:1] == ["properties"]:
        return [part for part in path[:2] + path[3:] if part != "[key]"]
    return [part for part in path if part != "Threshold" and not part.startswith("literal[")]


def _keys_beside(location: tuple[int | str, ...]) -> Iterable[str]:
    """Return the keys that are known where an unknown one stands."""
    sections: dict[str, type[BaseModel]] = {"keep": Keep, "bounds": Bounds, "decision": Threshold}
    first = str(location[0])
    if first == "properties" and len(location) > 4:
        return Protected.model_fields
    if first == "properties":
        return _SECTIONS[str(location[2])].model_fields
    return (sections[first] if len(location) > 1 else Spec).model_fields
