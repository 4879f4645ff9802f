"""care.yaml: what the model must not do, the data that shows it, and what a repair must keep.

    data: repair.npz            # arrays named like the model's inputs, or x; labels y
    holdout: test.npz           # optional; otherwise a part of data is held out
    labels: y                   # optional: the key of the labels
    properties:
      - name: white-square
        kind: backdoor
        trigger: trigger.npz    # arrays mask and pattern: x' = x * (1 - mask) + pattern * mask
        target: 1
        max_rate: 0.01          # attack success above the clean confusion rate
    keep: {accuracy_drop: 0.01, recall_drop: 0.05}
    seed: 1

Paths are relative to the spec. Instead of `trigger`, `triggered: file.npz` gives triggered samples directly, and
`triggered_holdout: file.npz` those that only the judge may see. Rates and drops are shares: 0.01 is one point.
"""

from __future__ import annotations

import reprlib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from onnxcare.errors import SpecError, nearest


def _relative(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path())
    return path if path.is_absolute() else folder / path


DataPath = Annotated[Path, AfterValidator(_relative)]
Share = Annotated[float, Field(ge=0, le=1, strict=True)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Keep(_Section):
    """What a repair must keep on clean held-out data.

    Attributes:
        accuracy_drop: largest loss of accuracy.
        recall_drop: largest loss of recall of any class.
    """

    accuracy_drop: Share = 0.01
    recall_drop: Share = 0.05


class BackdoorSpec(_Section):
    """A hidden trigger makes the model answer `target`.

    Attributes:
        name: how reports call the property.
        trigger: npz with arrays `mask` and `pattern` in the model's input space.
        triggered: npz with triggered samples, where the trigger itself is not known.
        triggered_holdout: further triggered samples that only the judge may see.
        target: the class the trigger leads to.
        max_rate: attack success that is tolerated above the clean confusion rate.
    """

    name: Annotated[str, Field(min_length=1)]
    kind: Literal["backdoor"]
    trigger: DataPath | None = None
    triggered: DataPath | None = None
    triggered_holdout: DataPath | None = None
    target: Annotated[int, Field(ge=0, strict=True)]
    max_rate: Share = 0.01

    @model_validator(mode="after")
    def _one_source(self) -> BackdoorSpec:
        if (self.trigger is None) == (self.triggered is None):
            raise ValueError("give either trigger or triggered")
        if self.triggered_holdout is not None and self.triggered is None:
            raise ValueError("triggered_holdout goes with triggered")
        return self


KINDS = ("backdoor",)


class Spec(_Section):
    """A whole care.yaml; paths are resolved against the file's folder."""

    data: DataPath
    holdout: DataPath | None = None
    labels: str = "y"
    properties: Annotated[list[BackdoorSpec], Field(min_length=1)]
    keep: Keep = Keep()
    seed: Annotated[int, Field(ge=1, le=2**31 - 1, strict=True)] = 1

    @model_validator(mode="after")
    def _names_differ(self) -> Spec:
        names = [item.name for item in self.properties]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two properties are called {name!r}")
        return self

    def files(self) -> list[Path]:
        """Return every file the spec names."""
        found = [self.data, self.holdout]
        for item in self.properties:
            found += [item.trigger, item.triggered, item.triggered_holdout]
        return [path for path in found if path is not None]


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice; YAML itself would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = []
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
            seen.append(key.value)
        return super().construct_mapping(node, deep)


def load_spec(path: str | Path) -> Spec:
    """Read a care.yaml.

    Raises:
        SpecError: the file is missing or malformed; the message names the file and the key.
    """
    path = Path(path)
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
    "model_type": "expected keys with values",
    "path_type": "expected a path",
    "too_short": "expected at least one item",
}


def _explain(error: ValidationError, content: dict[str, Any]) -> str:
    """Say the first problem in one line, with the key and the nearest known one."""
    # An unknown key is usually the misspelling behind a missing one: it is the more helpful of the two.
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"])
    match problem["type"]:
        case "extra_forbidden":
            section: type[BaseModel] = Spec
            if problem["loc"][0] == "properties":
                section = BackdoorSpec
            elif problem["loc"][0] == "keep":
                section = Keep
            return f"unknown key {key!r}{nearest(str(problem['loc'][-1]), section.model_fields)}"
        case "missing":
            return f"{key}: this key is needed"
        case "literal_error" if problem["loc"][-1] == "kind":
            given = str(problem["input"])
            return f"{key}: unknown kind {given!r}{nearest(given, KINDS)}; known: {', '.join(KINDS)}"
        case "value_error":
            text = problem["msg"].removeprefix("Value error, ")
            return f"{key}: {text}" if key else text
        case kind:
            return f"{key}: {_PLAINLY.get(kind, problem['msg'].lower())}, not {reprlib.repr(problem['input'])}"
