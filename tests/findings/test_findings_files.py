"""Files that are no models, external data in wrong places, and operators that are no part of ONNX."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from graph.models import build, random
from onnx import helper

from onnxcare.findings import StaticFinding, static_findings


def model() -> onnx.ModelProto:
    text = "net (float[N, 4] x) => (float[N, 2] y) { h = Gemm (x, W1) [act] r = Relu (h) y = Gemm (r, W2) }"
    return build(text, {"W1": random(4, 3), "W2": random(3, 2)})


def write(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def only(path: Path) -> StaticFinding:
    (finding,) = static_findings(path)
    return finding


# -- no models -------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(model().SerializeToString()[:-20])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK\x03\x04 not a model at all"),
        truncated,
        lambda path: os.mkfifo(path),
    ],
    ids=["missing", "folder", "empty", "archive", "truncated", "pipe"],
)
def test_what_is_no_model_is_said_to_be_none(spoil: Callable[[Path], object], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    spoil(path)
    finding = only(path)
    assert (finding.rule, finding.level, finding.where) == ("not-onnx", "error", "")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = write(model(), tmp_path)
    path.write_bytes(path.read_bytes().replace(b"act", b"\xff\xfe\xfd"))
    assert only(path).rule == "not-onnx"


def test_a_model_without_nodes_is_an_error(tmp_path: Path) -> None:
    proto = model()
    del proto.graph.node[:]
    finding = only(write(proto, tmp_path))
    assert (finding.rule, finding.level) == ("no-graph", "error")


def test_names_cannot_steer_a_terminal(tmp_path: Path) -> None:
    proto = model()
    proto.graph.initializer[0].name = "W\x1b[2J\n1" + 3000 * "x"
    proto.graph.initializer[0].float_data.extend([0.0] * 12)
    findings = static_findings(write(proto, tmp_path))
    assert {finding.rule for finding in findings} == {"two-value-fields", "unused-initializer"}
    for finding in findings:
        assert finding.message.isprintable() and len(finding.message) < 600
        assert finding.where.isprintable() and len(finding.where) <= 1000


# -- external data ---------------------------------------------------------------------------------


def external(folder: Path) -> onnx.ModelProto:
    path = folder / "model.onnx"
    onnx.save_model(model(), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    return onnx.load(path, load_external_data=False)


def relocate(proto: onnx.ModelProto, key: str, value: str) -> None:
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == key:
                entry.value = value


def test_external_data_beside_the_model_is_fine(tmp_path: Path) -> None:
    external(tmp_path)
    assert static_findings(tmp_path / "model.onnx") == []
    (tmp_path / "sub").mkdir()
    proto = external(tmp_path)
    shutil.move(tmp_path / "w.bin", tmp_path / "sub/w.bin")
    relocate(proto, "location", "sub/w.bin")
    assert static_findings(write(proto, tmp_path)) == []


@pytest.mark.parametrize(
    "location", ["{folder}/w.bin", "../w.bin", "sub/../../w.bin", "C:\\w.bin", "..\\w.bin", "\\\\server\\share\\w.bin"]
)
def test_paths_that_leave_the_folder_are_an_error(location: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    proto = external(folder)
    shutil.copy(folder / "w.bin", tmp_path)
    relocate(proto, "location", location.replace("{folder}", str(folder)))
    finding = only(write(proto, folder))
    assert (finding.rule, finding.level, finding.where) == ("external-data-outside", "error", "W1")
    assert "and of 1 other" in finding.message


def test_links_that_leave_the_folder_are_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    external(folder)
    shutil.move(folder / "w.bin", tmp_path / "elsewhere.bin")
    (folder / "w.bin").symlink_to(tmp_path / "elsewhere.bin")
    finding = only(folder / "model.onnx")
    assert finding.rule == "external-data-outside"
    assert "link" in finding.message


def short(folder: Path, proto: onnx.ModelProto) -> None:
    (folder / "w.bin").write_bytes(b"1234")


def short_without_length(folder: Path, proto: onnx.ModelProto) -> None:
    for tensor in proto.graph.initializer:
        kept = [entry for entry in tensor.external_data if entry.key != "length"]
        del tensor.external_data[:]
        tensor.external_data.extend(kept)
    short(folder, proto)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda folder, proto: (folder / "w.bin").unlink(),
        short,
        short_without_length,
        lambda folder, proto: relocate(proto, "location", ""),
        lambda folder, proto: relocate(proto, "location", "w\0.bin"),
        lambda folder, proto: relocate(proto, "location", 5000 * "w"),
        lambda folder, proto: relocate(proto, "location", "."),
        lambda folder, proto: relocate(proto, "offset", "-4"),
        lambda folder, proto: relocate(proto, "length", "many"),
    ],
    ids=["gone", "short", "no length", "no name", "zero byte", "long name", "folder", "offset", "length"],
)
def test_data_that_is_not_there_is_an_error(spoil: Callable[[Path, onnx.ModelProto], object], tmp_path: Path) -> None:
    proto = external(tmp_path)
    spoil(tmp_path, proto)
    findings = static_findings(write(proto, tmp_path))
    assert {(finding.rule, finding.level) for finding in findings} == {("external-data-missing", "error")}


# -- operators -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("domain", "level"), [("com.acme", "warning"), ("com.microsoft", "note"), ("com.microsoft.nchwc", "note")]
)
def test_operators_of_other_domains_are_told_once(domain: str, level: str, tmp_path: Path) -> None:
    proto = model()
    proto.opset_import.append(helper.make_opsetid(domain, 1))
    proto.graph.node.insert(2, helper.make_node("Squash", ["r"], ["q"], domain=domain))
    proto.graph.node[1].CopyFrom(helper.make_node("Squash", ["h"], ["r"], name="act", domain=domain))
    finding = only(write(proto, tmp_path))
    assert (finding.rule, finding.level, finding.where) == ("custom-domain", level, "act")
    assert domain in finding.message and "Squash" in finding.message and "2 nodes" in finding.message


def test_operators_within_branches_and_functions_are_seen(tmp_path: Path) -> None:
    proto = model()
    call = helper.make_node("Squash", ["a"], ["b"], name="deep", domain="com.acme")
    opsets = [proto.opset_import[0], helper.make_opsetid("com.acme", 1), helper.make_opsetid("own", 1)]
    proto.functions.append(helper.make_function("own", "Act", ["a"], ["b"], [call], opsets))
    proto.opset_import.append(opsets[2])
    proto.graph.node[1].CopyFrom(helper.make_node("Act", ["h"], ["r"], domain="own"))
    finding = only(write(proto, tmp_path))  # of a function that the file defines, only the inside is foreign
    assert (finding.rule, finding.where) == ("custom-domain", "deep")


def test_operators_of_onnx_itself_are_silent(tmp_path: Path) -> None:
    text = 'net (float[N, 4] x) => (float[N, 2] y) { s = ai.onnx.ml.Normalizer <norm = "L2"> (x) y = Gemm (s, W) }'
    proto = build(text, {"W": random(4, 2)})
    proto.graph.node[1].domain = "ai.onnx"
    assert static_findings(write(proto, tmp_path)) == []
