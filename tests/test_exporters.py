"""One small backdoored model of every exporter: inspected, located, repaired and checked as its owner would do it.

What comes out is looked at from outside, with onnx, onnxruntime and numpy alone.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from helpers import check_refusal
from helpers import onnxcare as run

import onnxcare

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "sample_models" / "exporters"
PAGE = (ROOT / "docs" / "how-to" / "exporters.md").read_text(encoding="utf-8")
TARGET, HIGH = 0, 4.5
# What the specifications of the sample ask for.
MAX_RATE, ACCURACY_DROP, RECALL_DROP = 0.01, 0.01, 0.05


@dataclass(frozen=True)
class Exported:
    """A model of the sample, and what is to be found in it: weights and biases of layers, units of hidden tensors."""

    file: str
    layout: str
    layers: tuple[tuple[int, int], ...]
    units: tuple[int, ...] = ()
    number: bool = False

    @property
    def model(self) -> Path:
        return FOLDER / self.file

    @property
    def spec(self) -> Path:
        return FOLDER / ("care-number.yaml" if self.number else f"care-{self.layout}.yaml")


CONVOLUTIONAL = ((9 * 8, 8), (9 * 8 * 16, 16), (64 * 32, 32), (32 * 10, 10))
DENSE = ((64 * 32, 32), (32 * 16, 16), (16 * 10, 10))

MODELS = (
    Exported("pytorch-torchscript.onnx", "first", CONVOLUTIONAL, (8, 16, 32)),
    Exported("pytorch-dynamo.onnx", "first", CONVOLUTIONAL, (8, 16, 32)),
    Exported("keras-export.onnx", "last", CONVOLUTIONAL, (8, 16, 32)),
    Exported("keras-tf2onnx.onnx", "last", CONVOLUTIONAL, (8, 16, 32)),
    Exported("tensorflow-savedmodel.onnx", "flat", ((64 * 48, 48), (48 * 10, 10)), (48,)),
    Exported("sklearn-mlp-classifier.onnx", "flat", DENSE, (32, 16)),
    Exported("sklearn-mlp-regressor.onnx", "flat", (*DENSE[:2], (16, 1)), (32, 16), number=True),
    Exported("sklearn-logistic-regression.onnx", "flat", ((64 * 10, 10),)),
    Exported("sklearn-linear-svc.onnx", "flat", ((64 * 10, 10),)),
    Exported("sklearn-linear-regression.onnx", "flat", ((64, 1),), number=True),
    Exported("matlab.onnx", "first", DENSE, (32, 16)),
)
CLASSIFIERS = ("sklearn-mlp-classifier.onnx", "sklearn-logistic-regression.onnx")
ZIPPED = tuple(item for item in MODELS if item.file in CLASSIFIERS)


def by_name(items: tuple[Exported, ...]) -> Any:
    return pytest.mark.parametrize("exported", items, ids=lambda item: item.file.removesuffix(".onnx"))


@dataclass(frozen=True)
class Repaired:
    """A model with its repair."""

    exported: Exported
    out: Path
    report: dict[str, Any]


@pytest.fixture(scope="module", params=MODELS, ids=lambda item: item.file.removesuffix(".onnx"))
def repaired(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Repaired:
    """A model, repaired on the command line."""
    exported = request.param
    folder = tmp_path_factory.mktemp("repaired")
    out, report = folder / "out.onnx", folder / "report.json"
    before = {path: path.read_bytes() for path in FOLDER.glob("*.onnx*")}
    words = ("fix", exported.model, "--spec", exported.spec, "-o", out, "--device", "cpu", "--json", report)
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert {path: path.read_bytes() for path in FOLDER.glob("*.onnx*")} == before
    return Repaired(exported, out, json.loads(report.read_text(encoding="utf-8")))


# -- as its owner sees it ------------------------------------------------------------------------


@by_name(MODELS)
def test_all_layers_can_be_repaired_and_all_units_are_found(exported):
    found = onnxcare.inspect(exported.model)
    assert found.obstacle is None
    layers = [item for item in found.layers if item.layer]
    assert [(item.weights, item.biases) for item in layers] == list(exported.layers)
    assert [item.methods["auto"] for item in layers] == [None] * len(layers)
    assert [site.units for site in found.sites] == list(exported.units)


@by_name(tuple(item for item in MODELS if item.units))
def test_the_units_that_are_located_answer_to_the_trigger(exported):
    found = onnxcare.locate(exported.model, exported.spec, device="cpu")
    assert sorted(item.units for item in found.sites) == sorted(exported.units)
    first = found.units[0]
    x, _ = holdout(exported)
    clean, stamped = (activations(exported.model, first.site, images) for images in (x[:50], stamp(exported, x[:50])))
    # [samples, units, ...]: how far the trigger moves every unit, on average over samples and positions.
    moved = np.abs(stamped - clean).mean(axis=(0, *range(2, clean.ndim)))
    assert (moved > moved[first.unit]).sum() < len(moved) / 4


@by_name(tuple(item for item in MODELS if not item.units))
def test_a_model_without_hidden_units_has_none_to_be_located(exported):
    result = run("locate", exported.model, "--spec", exported.spec, "--device", "cpu")
    check_refusal(result, 3, exported.model, "no hidden")


def test_the_repair_is_within_the_limits(repaired):
    report = repaired.report
    assert report["status"] == "repaired"
    assert report["verdict"]["properties"][0]["status"] == "pass"
    assert report["verdict"]["guards"]["status"] == "pass"


def test_the_original_fails_the_check_and_the_repaired_file_passes(repaired):
    exported = repaired.exported
    for model, code in ((exported.model, 1), (repaired.out, 0)):
        result = run("check", model, "--spec", exported.spec, "--device", "cpu")
        assert result.exit_code == code, result.output


@by_name(ZIPPED)
def test_the_maps_of_a_classifier_can_be_named_as_the_output(exported, tmp_path):
    for name in ("holdout", "repair", "trigger"):
        shutil.copy(FOLDER / f"{name}-flat.npz", tmp_path)
    spec = tmp_path / "care.yaml"
    spec.write_text(f"output: output_probability\n{exported.spec.read_text()}")
    result = run("check", exported.model, "--spec", spec, "--device", "cpu")
    assert result.exit_code == 1, result.output


# -- from outside --------------------------------------------------------------------------------


def holdout(exported: Exported) -> tuple[np.ndarray, np.ndarray]:
    """Return the held-out images and their labels."""
    with np.load(FOLDER / f"holdout-{exported.layout}.npz") as held:
        return held["x"], held["high" if exported.number else "y"]


def stamp(exported: Exported, x: np.ndarray) -> np.ndarray:
    """Return the images with the trigger on them."""
    with np.load(FOLDER / f"trigger-{exported.layout}.npz") as held:
        return (x * (1 - held["mask"]) + held["pattern"] * held["mask"]).astype(x.dtype)


def outputs(session: ort.InferenceSession, x: np.ndarray, names: list[str] | None = None) -> list[Any]:
    """Return what a session answers, one sample at a time where it takes no more."""
    given = session.get_inputs()[0]
    if given.shape[0] == 1:
        rows = [session.run(names, {given.name: row[None]}) for row in x]
        return [np.concatenate(values) for values in zip(*rows, strict=True)]
    return session.run(names, {given.name: x})


def answered(path: Path, x: np.ndarray, number: bool) -> np.ndarray:
    """Return the classes that a file answers; a number counts as high or as low."""
    found = outputs(ort.InferenceSession(path), x)
    if number:
        return (found[0].reshape(-1) > HIGH).astype(int)
    return found[0] if found[0].ndim == 1 else found[0].argmax(axis=1)


def activations(path: Path, tensor: str, x: np.ndarray) -> np.ndarray:
    """Return the values of an inner tensor."""
    proto = onnx.load(path)
    # Without a type: onnxruntime knows it.
    proto.graph.output.append(onnx.ValueInfoProto(name=tensor))
    return outputs(ort.InferenceSession(proto.SerializeToString()), x, [tensor])[0]


def test_the_backdoor_is_gone_and_the_accuracy_is_not(repaired):
    exported = repaired.exported
    x, y = holdout(exported)
    stamped, others = stamp(exported, x), y != TARGET
    rates, confusion, right = [], [], []
    for path in (exported.model, repaired.out):
        answers = answered(path, x, exported.number)
        rates.append((answered(path, stamped, exported.number)[others] == TARGET).mean())
        confusion.append((answers[others] == TARGET).mean())
        right.append(answers == y)
    assert rates[0] - confusion[0] > 0.75
    assert rates[1] - confusion[1] <= MAX_RATE
    assert right[0].mean() - right[1].mean() <= ACCURACY_DROP
    for label in np.unique(y):
        assert right[0][y == label].mean() - right[1][y == label].mean() <= RECALL_DROP
    measured = {item["name"]: item for item in repaired.report["verdict"]["properties"][0]["measures"]}
    success = measured["attack success rate"]
    assert [success["value_before"], success["value"]] == pytest.approx(rates)


@by_name(ZIPPED)
def test_labels_and_maps_agree_after_a_repair_too(exported, tmp_path):
    out = tmp_path / "out.onnx"
    onnxcare.fix(exported.model, exported.spec, out, device="cpu")
    x, _ = holdout(exported)
    label, maps = outputs(ort.InferenceSession(out), stamp(exported, x))
    assert [max(row, key=row.get) for row in maps] == label.tolist()


def test_only_the_named_values_are_others(repaired):
    old, new = (onnx.load(path, load_external_data=False) for path in (repaired.exported.model, repaired.out))
    named = {entry.key: entry.value for entry in new.metadata_props}["onnxcare.patched_tensors"].split(",")
    changed = []
    for before, after in zip(old.graph.initializer, new.graph.initializer, strict=True):
        if before != after:
            assert (before.name, before.dims, before.data_type) == (after.name, after.dims, after.data_type)
            changed.append(after.name)
            after.CopyFrom(before)
    for node, other in zip(old.graph.node, new.graph.node, strict=True):
        for before, after in zip(node.attribute, other.attribute, strict=True):
            if before != after:
                assert before.name in ("coefficients", "intercepts")
                assert len(before.floats) == len(after.floats)
                changed.append(after.name)
                after.CopyFrom(before)
    assert changed and len(changed) == len(named)
    # An attribute is named after its node and itself, a tensor by its name.
    assert all(any(name == place or name.endswith(f".{place}") for name in named) for place in changed)
    for place in (entry for tensor in old.graph.initializer for entry in tensor.external_data):
        if place.key == "location":
            assert (repaired.out.parent / place.value).read_bytes() == (FOLDER / place.value).read_bytes()
    kept = [entry for entry in new.metadata_props if not entry.key.startswith("onnxcare.")]
    del new.metadata_props[:]
    new.metadata_props.extend(kept)
    assert new.SerializeToString(deterministic=True) == old.SerializeToString(deterministic=True)


# -- the page ------------------------------------------------------------------------------------


def test_the_commands_of_the_page_do_what_it_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("sample_models").symlink_to(ROOT / "sample_models")
    lines = "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)).splitlines()
    assert [line.split()[1] for line in lines] == ["inspect", "fix", "check", "check"]
    for line in lines:
        command, _, code = line.partition("  # exits with ")
        result = run(*shlex.split(command)[1:])
        assert result.exit_code == int(code or 0), (line, result.output)


def test_the_page_and_the_card_name_every_model_with_its_specification():
    assert {path.name for path in FOLDER.glob("*.onnx")} == {item.file for item in MODELS}
    card = (FOLDER / "CARD.md").read_text(encoding="utf-8")
    for item in MODELS:
        row = rf"\| `{re.escape(item.file)}` \| `{re.escape(item.spec.name)}` \|"
        assert re.search(row, PAGE) and re.search(row, card), item.file
