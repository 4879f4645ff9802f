"""Trying out changes of one layer: the same scores and outcomes as the patched file, whatever the layer is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from graph.models import SUBJECTS, Subject, run
from kinds import model, opened, patched, people, write

from onnxcare.case import Case
from onnxcare.data import Dataset
from onnxcare.graph.layers import Layer
from onnxcare.graph.patch import Patch
from onnxcare.repair.bench import Bench, changed, matrix_of, patched_outcome

Array = np.ndarray


def case_of(name: str, folder: Path) -> tuple[Case, Subject]:
    """Return a case in which errors of a random model are to be mended: every fifth label is not its answer."""
    subject = SUBJECTS[name]()
    rows = subject.samples(300)
    answers = run(subject.proto, rows, subject.logits)[0]
    labels = answers.argmax(axis=1)
    labels[::5] = (labels[::5] + 1) % answers.shape[1]
    whole = Dataset(rows, labels)
    spec = {"properties": [{"name": "wrong", "kind": "errors"}], "keep": {"recall_drop": 1.0}}
    data, holdout = whole.take(slice(0, 220)), whole.take(slice(220, 300))
    return opened(write(folder, subject.proto, spec, data=data, holdout=holdout)), subject


def random_change(case: Case, layer: Layer, seed: int, size: float = 0.2) -> Array:
    matrix = matrix_of(case, layer)
    return size * np.random.default_rng(seed).normal(size=matrix.shape) * matrix.std()


@pytest.mark.parametrize("name", ["mlp", "mlp-float64", "cnn", "residual", "keras"])
def test_every_layer_is_tried_out_as_the_file_would_be(tmp_path, name):
    case, subject = case_of(name, tmp_path)
    panel = case.panel("validation")
    for number, layer in enumerate(case.experiment.layers):
        changes = [random_change(case, layer, seed) for seed in (number, 10 + number)]
        bench = Bench(case, layer)
        outcomes = bench.outcomes(panel, changes)
        coefficients = np.array([[1, 0], [0, 1], [2, -0.5]])
        scores = bench.scores(panel, coefficients, bench.directions(panel, changes))
        for index, member in enumerate(coefficients):
            whole = sum(c * change for c, change in zip(member, changes, strict=True))
            values = changed(case, layer, whole)
            written = onnx.load_from_string(Patch(values).apply(case.experiment.model))
            (answers,) = run(written, panel.inputs, subject.logits)
            np.testing.assert_allclose(np.diff(scores[index]), np.diff(answers), rtol=1e-3, atol=1e-3)
            if index < 2:
                ours, files = outcomes[index], panel.outcomes(answers[None])[0]
                for key in ("loss", "drift"):
                    assert getattr(ours, key) == pytest.approx(getattr(files, key), rel=1e-3, abs=1e-5)
                assert ours.accuracy_drop == files.accuracy_drop and ours.excess == files.excess
                again = patched_outcome(case, values, panel)
                assert again.loss == pytest.approx(files.loss, rel=1e-3)


def test_a_change_is_one_of_the_layers_matrix(tmp_path):
    case, _ = case_of("mlp", tmp_path)
    for layer in case.experiment.layers:
        change = random_change(case, layer, 3)
        values = changed(case, layer, change)
        assert set(values) == {layer.weight, layer.bias}
        candidate = case.patched(values)
        np.testing.assert_allclose(matrix_of(candidate, layer), matrix_of(case, layer) + change, atol=1e-6)
        assert matrix_of(case, layer).dtype == np.float64
        assert matrix_of(case, layer).shape == (1, layer.inputs + 1, layer.outputs)


def test_a_candidate_is_changed_further(tmp_path):
    """Changes of a case with a candidate on the table are added to those of the candidate."""
    case, _ = case_of("mlp", tmp_path)
    layer = case.experiment.layers[1]
    one, other = random_change(case, layer, 1), random_change(case, layer, 2)
    candidate = case.patched(changed(case, layer, one))
    panel = case.panel("search")
    both = Bench(case, layer).outcomes(panel, [one + other])[0]
    further = Bench(candidate, layer).outcomes(candidate.panel("search"), [other])[0]
    assert further.cost == pytest.approx(both.cost, rel=1e-4)
    assert candidate.panel("search") is panel


def test_little_memory_gives_the_same_outcomes(tmp_path):
    case, _ = case_of("cnn", tmp_path)
    layer, panel = case.experiment.layers[1], case.panel("validation")
    changes = [random_change(case, layer, seed) for seed in range(5)]
    plenty = Bench(case, layer).outcomes(panel, changes)
    case.experiment.memory = 1 << 20
    little = Bench(case, layer).outcomes(panel, changes)
    assert [item.cost for item in little] == pytest.approx([item.cost for item in plenty], rel=1e-5)


def test_panels_are_not_mixed_up(tmp_path):
    case, _ = case_of("mlp", tmp_path)
    layer = case.experiment.layers[0]
    bench, change = Bench(case, layer), random_change(case, layer, 4)
    for part in ("repair", "search", "validation", "repair"):
        panel = case.panel(part)
        expected = patched_outcome(case, changed(case, layer, change), panel)
        assert bench.outcomes(panel, [change])[0].cost == pytest.approx(expected.cost, rel=1e-4)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mlp", 6 * 8 + 8 * 7 + 7 * 4),
        # Every output of a convolution takes a kernel's weights: 8 x 8 positions, and 4 x 4 behind the pooling.
        ("cnn", 64 * 4 * (2 * 9) + 16 * 6 * (4 * 9) + 24 * 5),
    ],
)
def test_multiply_adds_are_counted_for_one_sample(tmp_path, name, count):
    case, _ = case_of(name, tmp_path)
    assert case.experiment.multiply_adds == count


def test_a_threshold_is_read_like_any_decision(tmp_path):
    spec = {"decision": {"threshold": 0.3}, "properties": [{"name": "wrong", "kind": "errors"}]}
    case = opened(write(tmp_path, model(), spec, data=people(400, 1), holdout=people(200, 2)))
    panel = case.panel("validation")
    for layer in case.experiment.layers:
        change = random_change(case, layer, 5)
        outcome = Bench(case, layer).outcomes(panel, [change])[0]
        path = patched(case, changed(case, layer, change), tmp_path / "out.onnx")
        (answers,) = run(path, panel.clean.inputs)
        (before,) = run(case.experiment.model.path, panel.clean.inputs)
        right = [((y[:, 0] > 0.3) == panel.clean.truth).mean() for y in (before, answers)]
        assert outcome.accuracy_drop == pytest.approx(right[0] - right[1])
