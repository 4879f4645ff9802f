"""The survey of models by others, on tiny models: what it compares with, what it notices, and what it tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph import models

from benchmarks.third_party import packages, report
from benchmarks.third_party.by_hand import ByHand
from benchmarks.third_party.catalogue import Subject
from benchmarks.third_party.compare import difference
from benchmarks.third_party.packages import Package
from benchmarks.third_party.survey import Bench, taken
from onnxcare.errors import ModelError
from onnxcare.graph import surgery

Array = np.ndarray


def bench(folder: Path, name: str, rows: int = 5) -> Bench:
    subject = models.SUBJECTS[name]()
    path = folder / "model.onnx"
    path.write_bytes(subject.proto.SerializeToString())
    known = Subject(name, "none", path.name, lambda rng, size: subject.samples(size), rows=rows)
    return Bench(path, known)


@pytest.mark.parametrize("name", ["acas", "keras"])
def test_copies_and_interventions_answer_as_by_hand(tmp_path: Path, name: str) -> None:
    tried = bench(tmp_path, name)
    facts = tried.load()
    assert facts["single"] == (name == "acas")
    assert facts["open_layers"] == facts["layers"] > 2
    assert tried.copy()["difference"] < 1e-6
    for found in (tried.intervene(), tried.experiment()):
        assert found["compared"] == found["moved"] == facts["sites"] > 1
        assert found["refused"] == 0 and found["difference"] < 1e-5


def test_a_cut_that_answers_otherwise_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = surgery.cut

    def doubled(copy: onnx.ModelProto, *args: object) -> surgery.Cut:
        found = honest(copy, *args)
        for tensor in found.suffix.graph.initializer:
            if tensor.name == "W3":
                tensor.CopyFrom(onnx.numpy_helper.from_array(1.01 * onnx.numpy_helper.to_array(tensor), "W3"))
        return found

    tried = bench(tmp_path, "mlp")
    tried.load()
    tried.copy()
    monkeypatch.setattr(surgery, "cut", doubled)
    found = tried.intervene()
    assert set(found["differing"]) == {"h1 -> scores", "h2 -> scores"}


@pytest.mark.parametrize(("name", "tensor", "axis"), [("acas", "h1", 1), ("residual", "r2", 1)])
def test_by_hand_is_what_the_reference_implementation_says(tmp_path: Path, name: str, tensor: str, axis: int) -> None:
    subject = models.SUBJECTS[name]()
    path = tmp_path / "model.onnx"
    path.write_bytes(subject.proto.SerializeToString())
    feeds = subject.samples(3)
    (h,) = models.run_single(subject.proto, feeds, tensor)
    mask, value = np.zeros((1, *h.shape[1:]), np.float32), np.full((1, *h.shape[1:]), 2.5, np.float32)
    mask[:, 1] = 1
    (found,) = ByHand(path, {}).forcing(tensor, h.dtype).answers(feeds, mask, value)

    def force(values: Array, row: int) -> Array:
        values[:, 1] = 2.5
        return values

    output = subject.proto.graph.output[0].name
    expected = models.Reference(subject.proto, tensor, output).scores(feeds, force)
    assert difference(found, expected) < 1e-5
    assert difference(found, models.run_single(subject.proto, feeds)[0]) > 1e-3


def test_differences() -> None:
    x = np.array([1.0, -4.0, np.nan], np.float32)
    assert difference(x, x.copy()) == 0
    assert difference(x + np.float32(0.5), x) == pytest.approx(0.125)
    assert difference(np.nan_to_num(x), x) == difference(x[:2], x) == difference(x.astype(np.float64), x) == np.inf
    assert difference(np.array(["a"]), np.array(["a"])) == 0 < difference(np.array(["a"]), np.array(["b"]))


def test_what_a_step_ends_with() -> None:
    def refuse() -> dict[str, object]:
        raise ModelError("/there/model.onnx: no")

    def fail() -> dict[str, object]:
        raise KeyError("/there/x")

    ended = [taken("load", function, ["/there/"]) for function in (dict, refuse, fail)]
    assert [step.outcome for step in ended] == ["done", "refused", "defect"]
    assert ended[1].reason == "model.onnx: no"
    assert ended[2].reason.startswith("KeyError in test_third_party.py:") and ended[2].reason.endswith(": 'x'")


def test_other_bytes_than_the_known_ones_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = {"sha256": "0" * 64}
    monkeypatch.setattr(packages, "_run", lambda command, folder, package: (folder / "a.whl").write_bytes(b"other"))
    package = Package("a", "1", served["sha256"], ("*",), "MIT")
    with pytest.raises(RuntimeError, match=r"a\.whl: its SHA-256 is"):
        packages.fetch(package, tmp_path)
    assert not (tmp_path / "a-1").exists()


def test_the_page_keeps_what_stands_around_the_table(tmp_path: Path) -> None:
    tried = bench(tmp_path, "mlp")
    steps = [vars(taken(name, getattr(tried, name), [])) for name in ("load", "copy", "intervene", "experiment")]
    refused = vars(taken("fix", lambda: (_ for _ in ()).throw(ModelError("a_b | c")), []))
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n\n{report._BEGIN}\nold\n{report._END}\n\nBehind\n")
    report.write_page([{"name": "tiny", "steps": [*steps, refused]}], None, page)
    text = page.read_text()
    assert text.startswith("# Before\n") and text.endswith("\n\nBehind\n") and "old" not in text
    (row,) = [line for line in text.splitlines() if line.startswith("| tiny ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["6", "3/3", "", "2"]
    assert cells[5].startswith("same ") and cells[6].startswith("2/2 ") and cells[9] == "refused [1]"
    assert r"1. a\_b \| c" in text
