"""Put a random model on the operating table, and compare all that is done there with the model edited by hand."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import onnx
import onnxruntime as ort
from corpus.compare import around, differing
from fuzz.graphs import Array, Drawn
from graph.models import exposing, with_tensor_fed
from graph.operating import PLENTY, assert_close
from helpers import onnxcare

from onnxcare.errors import ModelError, OnnxcareError
from onnxcare.experiment import Experiment
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import Model, load_model
from onnxcare.graph.patch import Patch, publish, staged
from onnxcare.graph.sites import Site
from onnxcare.suffix import Suffix
from onnxcare.sweep import Sweep, features_of, spread_units

ROWS = 3
TOLERANCE = 2e-4


class ByHand:
    """The file in a plain session, row by row, edited with nothing but protobuf."""

    def __init__(self, folder: Path, proto: onnx.ModelProto) -> None:
        """Hold a model whose sidecar lies in a folder."""
        self._folder, self._proto = folder, proto

    def run(self, x: dict[str, Array], *tensors: str) -> list[Array]:
        """Return tensors of the model, rows joined."""
        return self._run(exposing(self._proto, *tensors), x)

    def replaced(self, x: dict[str, Array], tensor: str, values: Array, scores: str) -> Array:
        """Return the scores with values in place of a tensor."""
        if tensor == scores:
            return values
        proto = exposing(with_tensor_fed(self._proto, tensor), scores)
        return self._run(proto, x | {tensor: values})[0]

    def _run(self, proto: onnx.ModelProto, x: dict[str, Array]) -> list[Array]:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self._folder))
        session = ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
        names = {item.name for item in session.get_inputs()}
        rows = [{k: v[i : i + 1] for k, v in x.items() if k in names} for i in range(ROWS)]
        return [np.concatenate(parts) for parts in zip(*(session.run(None, row) for row in rows), strict=True)]


def examine(drawn: Drawn, folder: Path, seen: Counter[str]) -> None:
    """Do to a random model all that can be done to a model; only refusals with a reason may come out.

    Args:
        drawn: the model.
        folder: an empty folder.
        seen: counts what could be done.
    """
    path = folder / "model.onnx"
    path.write_bytes(drawn.proto.SerializeToString())
    if drawn.outside:
        (folder / "weights.bin").write_bytes(drawn.outside)
    before = {item.name: item.read_bytes() for item in folder.iterdir()}
    seen["models"] += 1
    try:
        model = load_model(path)
        seen["loaded"] += 1
        _show(model)
        _operate(model, drawn.samples(ROWS), seen)
    except OnnxcareError as error:
        message = str(error)
        assert 0 < len(message) < 600 and len(message.splitlines()) <= 2, message
        seen[f"refused: {_kind(message)}"] += 1
    finally:
        assert {item.name: item.read_bytes() for item in folder.iterdir()} == before, "a file has changed"


def _kind(message: str) -> str:
    """Return the beginning of a refusal, without what is different in every model."""
    return re.sub(r"/\S+|'[^']*'|\d+", "...", message)[:100]


def _show(model: Model) -> None:
    """Look at a model as users do; what is meant for machines has to be well-formed, whatever names it holds."""
    drawn = model.path.with_name("graph.svg")
    told = onnxcare("inspect", model.path, "--format", "json", "--picture", drawn)
    assert told.exit_code == 0 and json.loads(told.stdout), told.output
    ElementTree.parse(drawn)
    drawn.unlink()
    if len(model.proto.graph.node) % 4 == 0:  # slower
        seen = onnxcare("inspect", model.path)
        assert seen.exit_code == 0 and seen.stdout, seen.output


def _operate(model: Model, x: dict[str, Array], seen: Counter[str]) -> None:
    experiment = Experiment(model, "cpu", PLENTY, x)
    by_hand = ByHand(model.path.parent, model.proto)
    logits = experiment.logits
    (scores,) = by_hand.run(x, logits)
    if not np.isfinite(scores).all() or np.abs(scores).max() > 1e6:
        return
    seen["operated"] += 1
    _close(experiment.scores(x), scores)
    for site in experiment.sites:
        _force(experiment, site, x, by_hand, seen)
    opened = experiment.open_layers
    for layer in {layer.name: layer for layer in (*opened[:1], *opened[len(opened) // 2 :][:1], *opened[-1:])}.values():
        _change(experiment, layer, x, by_hand, seen)


def _close(scores: Array, expected: Array) -> None:
    """Compare scores with the tensor that holds them, which may have further axes of length one."""
    assert scores.size == expected.size
    assert_close(scores, expected.reshape(scores.shape), TOLERANCE)


def _force(experiment: Experiment, site: Site, x: dict[str, Array], by_hand: ByHand, seen: Counter[str]) -> None:
    """Set one unit, at the site and through its reader; multiply it, at the site and folded into its readers."""
    (h,) = by_hand.run(x, site.tensor)
    assert h.shape[site.axis] == site.units, f"{site.tensor} has not {site.units} units on axis {site.axis}"
    unit, value, rank = site.units // 2, 0.75, h.ndim - 1
    try:
        suffix = experiment.suffix(site.tensor, "affine")
    except ModelError:
        seen["no cut"] += 1
        return
    one = np.ones((1, site.units), np.float32)
    one[0, unit] = 0
    keep, put = spread_units(one, site, rank), np.full((1, 1, *[1] * rank), value, np.float32)
    changed = h * keep[0] + value * (1 - keep[0])
    expected = by_hand.replaced(x, site.tensor, changed.astype(h.dtype), experiment.logits)
    _close(suffix.affine(suffix.cache(x), keep, put)[0], expected)
    seen["sites"] += 1
    sweep = Sweep(experiment, site)
    swept = sweep.force(sweep.hold(x), np.array([unit]), np.array([[value]]))
    _close(swept[0, 0], expected)
    if site.refusal is None:
        _fold(experiment, site, suffix, x, unit, rank, seen)


def _fold(
    experiment: Experiment, site: Site, suffix: Suffix, x: dict[str, Array], unit: int, rank: int, seen: Counter[str]
) -> None:
    model, factors = experiment.model, np.ones(site.units, np.float32)
    factors[unit] = -1.5
    values = {}
    for layer in site.readers:
        features = features_of(experiment, site, layer)
        if features is None:
            return
        by_feature = np.empty(layer.inputs)
        by_feature[features] = factors[:, None]
        values[layer.weight] = layer.scale_inputs(by_feature, experiment.read(layer.weight))
    if not all(parameter.storage.exact for parameter in values):
        return
    proto = onnx.ModelProto.FromString(Patch(values).apply(model))
    (folded,) = ByHand(model.path.parent, proto).run(x, experiment.logits)
    zero = np.zeros((1, 1, *[1] * rank), np.float32)
    _close(suffix.affine(suffix.cache(x), spread_units(factors[None], site, rank), zero)[0], folded)
    seen["folded"] += 1


def _change(experiment: Experiment, layer: Layer, x: dict[str, Array], by_hand: ByHand, seen: Counter[str]) -> None:
    """Change one weight: in the file, where nothing else may differ, and as an intervention on the layer's output."""
    model, weight = experiment.model, layer.weight
    old = experiment.read(weight)
    new = old.copy()
    at = old.size // 2
    # The value of another weight can be held wherever this one is.
    new.flat[at] = old.flat[int(np.abs(old - old.flat[at]).argmax())]
    if new.flat[at] == old.flat[at]:
        return
    after = _written(model, Patch({weight: new}).apply(model))
    assert differing(*around(model.data, after, weight.path), model.path.parent) == [at]
    patched = ByHand(model.path.parent, onnx.ModelProto.FromString(after))
    read_in, out, before = by_hand.run(x, layer.input, layer.output, experiment.logits)
    z, expected = patched.run(x, layer.output, experiment.logits)
    bias = None if layer.bias is None else np.zeros(layer.bias.shape)
    change = layer.matrix(new - old, bias)
    added = layer.from_rows(layer.product(layer.rows(read_in), change), out.shape)
    assert_close(out + added, z, TOLERANCE)
    seen["layers"] += 1
    try:
        suffix = experiment.suffix(layer.output, "span")
    except ModelError:
        seen["no cut"] += 1
        return
    moved = suffix.span(suffix.cache(x), np.array([[0.0], [1.0]]), added[None])
    if np.isfinite(expected).all() and np.abs(expected).max() < 1e6:
        _close(moved[0], before)
        _close(moved[1], expected)


def _written(model: Model, data: bytes) -> bytes:
    """Write a file as a repair is written, load it, and return what lies there then."""
    out = model.path.with_name("repaired.onnx")
    with staged(model, data, out) as path:
        publish(model, path, data, out)
    try:
        load_model(out)
        return out.read_bytes()
    finally:
        out.unlink()
