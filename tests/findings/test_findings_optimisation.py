"""Answers with and without onnxruntime's optimisations, on real sessions and on answers made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from graph.models import Array, build, random

from onnxcare.errors import ModelError
from onnxcare.findings import optimisation, optimisation_findings

SCORES = np.array([[1, 0], [0, 1], [3, 2]], np.float32)


def underflow(bias: float, batch: str = "N") -> onnx.ModelProto:
    """A convolution and a normalisation that cannot be merged: their product is too small for a float.

    For x = 1e38 the scores are 1 and `bias`; with the two merged, 0 and `bias`.
    """
    text = f"""fragile (float[{batch}, 1, 1, 1] x) => (float[{batch}, 2] scores) {{
        c = Conv (x, tiny)
        n = BatchNormalization <epsilon = 0.0> (c, scale, zero, zero, one)
        f = Flatten (n)
        scores = Gemm (f, large, bias)
    }}"""
    weights = {
        "tiny": np.full((1, 1, 1, 1), 1e-36),
        "scale": np.array([1e-10]),
        "zero": np.zeros(1),
        "one": np.ones(1),
        "large": np.array([[1e8, 0]]),
        "bias": np.array([0, bias]),
    }
    return build(text, {name: values.astype(np.float32) for name, values in weights.items()})


def write(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


def sound(operator: str = "Relu") -> onnx.ModelProto:
    text = (
        f"net (float[N, 4] x) => (float[N, 2] scores) {{ h = Gemm (x, W1) r = {operator} (h) scores = Gemm (r, W2) }}"
    )
    return build(text, {"W1": random(4, 3), "W2": random(3, 2)})


# -- real sessions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", ["N", "1", "2"])
def test_a_fault_of_an_optimisation_is_found(batch: str, tmp_path: Path) -> None:
    x = np.full((5, 1, 1, 1), 1e38, np.float32)
    (finding,) = optimisation_findings(write(underflow(0.5, batch), tmp_path), {"x": x}, "scores", "cpu")
    assert (finding.rule, finding.level, finding.where) == ("optimisation-difference", "error", "scores")
    assert "5 of 5 samples" in finding.message and "the largest difference is 1," in finding.message
    # The same difference, but the decision stays.
    (finding,) = optimisation_findings(write(underflow(-0.5, batch), tmp_path), {"x": x}, None, "cpu")
    assert finding.level == "warning" and "but no decision" in finding.message
    # A decision of another kind, given by the caller.
    (finding,) = optimisation_findings(
        tmp_path / "model.onnx", {"x": x}, "scores", "cpu", decide=lambda scores: scores[:, 0] > 0.25
    )
    assert finding.level == "error"


def test_maps_of_scores_are_compared_like_scores(tmp_path: Path) -> None:
    proto = underflow(0.5)
    labels = {"classlabels_int64s": [0, 1]}
    proto.graph.node.append(onnx.helper.make_node("ZipMap", ["scores"], ["maps"], domain="ai.onnx.ml", **labels))
    proto.graph.output[0].CopyFrom(onnx.ValueInfoProto(name="maps"))
    proto.opset_import.append(onnx.helper.make_opsetid("ai.onnx.ml", 3))
    x = np.full((5, 1, 1, 1), 1e38, np.float32)
    (finding,) = optimisation_findings(write(proto, tmp_path), {"x": x}, "maps", "cpu")
    assert (finding.level, finding.where) == ("error", "maps")


def test_sound_models_have_no_findings(tmp_path: Path, samples: Path) -> None:
    assert optimisation_findings(write(sound(), tmp_path), {"x": random(300, 4)}, "scores", "cpu") == []
    for name in ("mnist-square-pytorch", "mnist-blend-keras"):
        path = samples / name / "model.onnx"
        (entry,) = onnx.load(path).graph.input
        with np.load(samples / name / "repair.npz") as archive:
            x = archive[entry.name if entry.name in archive else "x"][:100].astype(np.float32)
        assert optimisation_findings(path, {entry.name: x}, None, "cpu") == []


def test_an_unknown_output_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="did you mean 'scores'"):
        optimisation_findings(write(sound(), tmp_path), {"x": random(3, 4)}, "score", "cpu")


def test_a_model_that_cannot_run_at_all_is_refused(tmp_path: Path) -> None:
    proto = sound()
    proto.graph.node[1].op_type = "Squash"
    with pytest.raises(ModelError, match="Squash"):
        optimisation_findings(write(proto, tmp_path), {"x": random(3, 4)}, None, "cpu")


# -- answers made up -------------------------------------------------------------------------------


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[bool, Any]:
    """Answers of the session without optimisations and of the one with them."""
    given: dict[bool, Any] = {}

    class Session:
        outputs = (("scores", "tensor(float)", ("N", 2)), ("map", "seq(map(int64,tensor(float)))", ()))
        name = "model"

        def __init__(self, path: Path, device: str, *, optimise: bool = True, axes: object = None) -> None:
            self.optimise = optimise

        def run_rows(self, inputs: dict[str, Array], outputs: list[str]) -> list[Array]:
            assert outputs == ["scores"]
            answer = given[self.optimise]
            if isinstance(answer, Exception):
                raise answer
            return [answer]

    monkeypatch.setattr(optimisation, "Session", Session)
    return given


def level(answers: dict[bool, Any], folder: Path, plain: Any, optimised: Any, operator: str = "Relu") -> str | None:
    answers[False], answers[True] = plain, optimised
    findings = optimisation_findings(write(sound(operator), folder), {"x": random(3, 4)}, None, "cpu")
    assert len(findings) <= 1
    return findings[0].level if findings else None


def test_the_bound_is_relative_to_the_sample(answers: dict[bool, Any], tmp_path: Path) -> None:
    eps = float(np.finfo(np.float32).eps)
    for scale in (1, 50):
        inside, outside = SCORES.copy(), SCORES.copy()
        inside[2, 0] += 900 * eps * 3
        outside[2, 0] += 1100 * eps * 3
        assert level(answers, tmp_path, scale * SCORES, scale * inside) is None
        assert level(answers, tmp_path, scale * SCORES, scale * outside) == "warning"
    # Small answers are measured against 1, for softmax outputs near zero carry no weight.
    small = np.full((3, 2), 1e-6, np.float32)
    assert level(answers, tmp_path, small, 2 * small) is None


def test_decisions(answers: dict[bool, Any], tmp_path: Path) -> None:
    assert level(answers, tmp_path, SCORES, SCORES[:, ::-1]) == "error"
    assert level(answers, tmp_path, SCORES, 2 * SCORES) == "warning"
    tie = np.array([[1, 1], [0, 1], [3, 2]], np.float32)
    turned = tie.copy()
    turned[0, 1] = np.nextafter(np.float32(1), np.float32(2))
    assert level(answers, tmp_path, tie, turned) == "warning"
    labels = np.array([0, 1, 1])
    assert level(answers, tmp_path, labels, labels) is None
    assert level(answers, tmp_path, labels, labels[::-1]) == "error"
    names = np.array(["cat", "dog", "cat"], object)
    assert level(answers, tmp_path, names, names[[0, 1, 1]]) == "error"


def test_nan_and_infinity(answers: dict[bool, Any], tmp_path: Path) -> None:
    odd = np.array([[np.nan, 1], [np.inf, 0], [2, -np.inf]], np.float32)
    assert level(answers, tmp_path, odd, odd.copy()) is None
    gone = odd.copy()
    gone[1, 0] = 7
    assert level(answers, tmp_path, odd, gone) == "warning"
    born = SCORES.copy()
    born[0, 0] = np.nan
    assert level(answers, tmp_path, SCORES, born) == "warning"


def test_quantised_and_half_precision_models_round_more(answers: dict[bool, Any], tmp_path: Path) -> None:
    nearly = SCORES.copy()
    nearly[2, 0] += 0.2
    assert level(answers, tmp_path, SCORES, nearly) == "warning"
    assert level(answers, tmp_path, SCORES, nearly, operator="QuantizeLinear") is None
    assert level(answers, tmp_path, SCORES, 2 * SCORES, operator="QuantizeLinear") == "warning"
    half = SCORES.astype(np.float16)
    assert level(answers, tmp_path, half, half + np.float16(0.01)) is None
    assert level(answers, tmp_path, half, half + np.float16(0.1)) == "warning"


def test_a_model_that_runs_only_without_optimisations_is_an_error(answers: dict[bool, Any], tmp_path: Path) -> None:
    assert level(answers, tmp_path, SCORES, ModelError("model: onnxruntime failed: out of luck")) == "error"
