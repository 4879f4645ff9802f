"""What onnxcare makes of one model file after another, counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from corpus.compare import around, differing, differing_numbers, float_tensors, without
from corpus.sources import Entry
from helpers import contents
from onnx import numpy_helper

from onnxcare.errors import OnnxcareError
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.parameters import Parameter, find_parameters
from onnxcare.graph.patch import Patch, publish, staged, with_metadata
from onnxcare.graph.storage import Numbers, Source, Tensor
from onnxcare.graph.surgery import import_graph
from onnxcare.graph.view import GraphView
from onnxcare.graph.working import experiment_form, working_form
from onnxcare.inspection import inspect_model

# What a refusal says, and what it is called in the table.
_REASONS = (
    ("IR version", "newer IR version"),
    ("this onnxruntime takes", "newer opset"),
    ("has no kernel for", "unknown operator"),
    ("implementation for", "no kernel for these types"),
    ("Failed to find kernel", "no kernel for these types"),
    ("Type Error", "types that do not fit"),
    ("invalid model", "types that do not fit"),
    ("ShapeInferenceError", "types that do not fit"),
    ("during initialization", "fails while it is opened"),
)
# What is counted, and what stands above it in the table.
_COLUMNS = (
    "models", "loaded", "refused", "identical", "floats", "reached", "tensors", "coded", "patched", "inspected",
    "layers", "open", "sites", "copied", "no copy",
)  # fmt: skip
_LEGEND = """\
loaded: by onnxruntime; refused: in one line that says why; identical: written back unchanged, and again with metadata
floats: models that hold float values; reached: as parameters; tensors: how many parameters; coded: how many more, in
whole numbers, lists or sparse; patched: one element of them changed (of a tensor, one bit) and nothing else, left out
where none is finite; layers, open, sites: models that have them; copied: for experiments; no copy: refused to be"""


@dataclass
class Survey:
    """Counts by source, reasons of refusals by source, and everything that went wrong.

    Attributes:
        folder: where the files go; empty.
        most: at most so many tensors of a model are patched, None for all.
        counts: how often what happened, by (source, what).
        reasons: how often a model, or its copy for experiments, was refused for what reason, by (source, reason).
        problems: the source, the model, and what is wrong with it.
    """

    folder: Path
    most: int | None = None
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def add(self, entry: Entry) -> None:
        """Take one model through everything."""
        path = self.folder / "model.onnx"
        held = {path.name: entry.data, **entry.beside}
        for name, content in held.items():
            (self.folder / name).write_bytes(content)

        def count(what: str, number: int = 1) -> None:
            self.counts[entry.source, what] += number

        def refused(error: OnnxcareError, what: str) -> None:
            text = str(error)
            count(what)
            self.reasons[entry.source, reason(text) if what == "refused" else "copy: older opset"] += 1
            plain = text.startswith(f"{path}: ") and len(text.splitlines()) == 1 and len(text) < 600
            if not plain or (what == "no copy" and "opset" not in text):
                self.problems.append(f"{entry.source}, {entry.name}: {text}")

        count("models")
        try:
            try:
                model = load_model(path)
            except OnnxcareError as error:
                return refused(error, "refused")
            count("loaded")
            self._look(model, count)
            try:
                import_graph(experiment_form(model).proto, str(path))
                count("copied")
            except OnnxcareError as error:
                refused(error, "no copy")
            self._no_op(model, entry.data, count)
            self._patch(model, entry.data, count)
            assert contents(self.folder) == held, "a file has changed, or is left behind"
        except Exception as error:
            self.problems.append(f"{entry.source}, {entry.name}: {type(error).__name__}: {error}")
        finally:
            for name in held:
                (self.folder / name).unlink()

    def _look(self, model: Model, count: Callable[[str], None]) -> None:
        form, seen = working_form(model), inspect_model(model)
        assert len(seen.layers) >= len(form.layers)  # normalisations and the like are shown as well
        assert [item.tensor for item in seen.sites] == [site.tensor for site in form.sites]
        assert all(site.units > 0 for site in form.sites)
        count("inspected")
        opened = [layer for layer in form.layers if layer.refusal is None]
        for what, found in (("layers", form.layers), ("open", opened), ("sites", form.sites)):
            if found:
                count(what)

    def _no_op(self, model: Model, data: bytes, count: Callable[[str], None]) -> None:
        same = Patch({}).apply(model)
        assert with_metadata(same, {}) == data
        told = _written(model, with_metadata(same, {"version": "1", "seed": "2"}))
        assert told.startswith(data), "a byte of the original has changed"
        entries = [(item.key, item.value) for item in onnx.ModelProto.FromString(told).metadata_props]
        assert entries[-2:] == [("onnxcare.version", "1"), ("onnxcare.seed", "2")]
        assert with_metadata(told, {}) == data
        count("identical")

    def _patch(self, model: Model, data: bytes, count: Callable[..., None]) -> None:
        held = {item.path: item.tensor for item in float_tensors(model.proto)}
        known = [*find_parameters(GraphView(model.proto)).values(), *working_form(model).parameters.values()]
        found = {parameter.path: parameter for parameter in known if parameter.storage.refusal is None}
        if held:
            count("floats")
        if held.keys() & found.keys():
            count("reached")
        for path, parameter in list(found.items())[: self.most]:
            plain = isinstance(parameter.storage, Tensor) and path in held
            changed = _flip(model, data, parameter, held[path]) if plain else _clear(model, data, parameter)
            count("tensors" if plain else "coded")
            if changed:
                count("patched")


def _flip(model: Model, data: bytes, parameter: Parameter, tensor: onnx.TensorProto) -> bool:
    """Flip the lowest bit of a finite value near the middle of a tensor, if there is one."""
    values = numpy_helper.to_array(tensor, str(model.path.parent))
    finite = np.flatnonzero(np.isfinite(values.reshape(-1)))
    if not len(finite):
        return False
    at = int(finite[len(finite) // 2])
    bits = np.array(values).reshape(-1).view(f"u{values.dtype.itemsize}")
    bits[at] ^= 1
    old, new = _patched(model, data, parameter, bits.view(values.dtype).reshape(values.shape))
    assert differing(old, new, model.path.parent) == [at]
    return True


def _clear(model: Model, data: bytes, parameter: Parameter) -> bool:
    """Set one weight to zero, if there is one that is not: whole numbers, lists and sparse tensors can hold that."""
    values = parameter.storage.read(Source(model.proto, model.path.parent)).copy()
    others = np.flatnonzero(values)
    if not len(others):
        return False
    at = int(others[len(others) // 2])
    values.flat[at] = 0
    old, new = _patched(model, data, parameter, values)
    if isinstance(parameter.storage, Numbers):
        assert differing_numbers(old, new) == [at]
    else:
        assert len(differing(old, new, model.path.parent)) == 1
    return True


def _patched(model: Model, data: bytes, parameter: Parameter, values: np.ndarray) -> tuple[bytes, bytes]:
    """Write a file with new values and read it again; nothing but the message that holds them may differ."""
    after = _written(model, Patch({parameter: values}).apply(model))
    (change,) = Patch({parameter: values}).summary(model)
    assert (change.changed, change.size) == (1, values.size)
    assert without(model.proto, parameter.path) == without(onnx.ModelProto.FromString(after), parameter.path)
    return around(data, after, parameter.path)


def _written(model: Model, data: bytes) -> bytes:
    """Write a model beside the original as a repair is written, load it, and return what lies there then."""
    out = model.path.with_name("repaired.onnx")
    with staged(model, data, out) as path:
        publish(model, path, data, out)
    try:
        assert load_model(out).proto.SerializeToString() == onnx.ModelProto.FromString(data).SerializeToString()
        return out.read_bytes()
    finally:
        out.unlink()


def reason(text: str) -> str:
    """Return what kind of a reason a refusal gives, its own words where it is of no known kind."""
    kinds = (kind for words, kind in _REASONS if words in text)
    return next(kinds, re.sub(r"^\S+: ", "", text))


def table(survey: Survey) -> str:
    """Return the counts as a table with one row a source, and the reasons of refusals below."""
    sources = list(dict.fromkeys(source for source, _ in survey.counts))
    head = ["source", *_COLUMNS]
    rows = [[source, *(str(survey.counts[source, column]) for column in _COLUMNS)] for source in sources]
    totals = [sum(survey.counts[source, column] for source in sources) for column in _COLUMNS]
    lines = aligned([head, *rows, ["all", *map(str, totals)]])
    reasons = Counter()
    for (_, what), number in survey.reasons.items():
        reasons[what] += number
    return "\n".join(
        [
            lines,
            _LEGEND,
            "refused because of:",
            aligned([[what, str(number)] for what, number in reasons.most_common()]),
        ]
    )


def aligned(rows: list[list[str]]) -> str:
    """Lay out rows of text, the first column to the left and numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [row[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    )
