"""The main job on the sample models: what the README promises, judged on held-out data."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest
from cases import BLEND, SQUARE

import onnxcare

LIMITS = {"care.yaml": (0.005, 0.003, 0.02), "care-50.yaml": (0.01, 0.005, 0.02)}


CASES = [
    *((folder, "model.onnx", spec, seed) for folder in (SQUARE, BLEND) for spec in LIMITS for seed in (1, 2, 3)),
    # The same weights in another exporter's graph: one run shows that it works.
    (SQUARE, "model-dynamo.onnx", "care.yaml", 1),
]


@pytest.mark.parametrize(
    ("folder", "model", "spec", "seed"),
    [pytest.param(*case, id=f"{case[0].name}/{case[1]}-{case[2]}-{case[3]}") for case in CASES],
)
def test_auto_takes_the_backdoor_out(tmp_path, folder, model, spec, seed):
    out = tmp_path / "out.onnx"
    original = (folder / model).read_bytes()
    fix = onnxcare.fix(folder / model, folder / spec, out, seed=seed, device="cpu")
    excess, accuracy, recall = LIMITS[spec]
    (finding,), guards = fix.verdict.properties, fix.verdict.guards
    assert fix.status == "repaired"
    assert finding.before.value >= 0.98
    assert finding.excess <= excess
    assert guards.accuracy_drop <= accuracy
    assert guards.worst_recall.drop <= recall
    assert guards.before.total == 4000
    assert (folder / model).read_bytes() == original

    written = onnx.load(out)
    metadata = {entry.key: entry.value for entry in written.metadata_props}
    assert metadata["onnxcare.parent_sha256"] == hashlib.sha256(original).hexdigest()
    assert metadata["onnxcare.verdict"] == "repaired"
    assert metadata["onnxcare.seed"] == str(seed)
    assert fix.output_sha256 == hashlib.sha256(out.read_bytes()).hexdigest()

    patched = set(metadata["onnxcare.patched_tensors"].split(","))
    before = onnx.ModelProto.FromString(original)
    for old, new in zip(before.graph.initializer, written.graph.initializer, strict=True):
        same = np.array_equal(onnx.numpy_helper.to_array(old), onnx.numpy_helper.to_array(new))
        assert same == (old.name not in patched)
        new.CopyFrom(old)
    kept = [entry for entry in written.metadata_props if not entry.key.startswith("onnxcare.")]
    del written.metadata_props[:]
    written.metadata_props.extend(kept)
    assert written.SerializeToString(deterministic=True) == before.SerializeToString(deterministic=True)


def test_same_seed_same_file(tmp_path):
    for name in ("a.onnx", "b.onnx"):
        onnxcare.fix(SQUARE / "model.onnx", SQUARE / "care.yaml", tmp_path / name, device="cpu")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_repaired_model_has_nothing_left_to_repair(tmp_path):
    first = tmp_path / "first.onnx"
    onnxcare.fix(SQUARE / "model.onnx", SQUARE / "care.yaml", first, device="cpu")
    again = onnxcare.fix(first, SQUARE / "care.yaml", tmp_path / "second.onnx", device="cpu")
    assert again.status == "nothing to repair"
    assert again.exit_code == 0
    assert not (tmp_path / "second.onnx").exists()


@pytest.mark.gpu
def test_the_same_repair_on_a_gpu(tmp_path):
    fix = onnxcare.fix(SQUARE / "model.onnx", SQUARE / "care.yaml", tmp_path / "out.onnx", device="cuda")
    assert fix.status == "repaired"
    assert fix.run.device == "cuda"
