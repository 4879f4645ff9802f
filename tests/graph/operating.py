"""Models on the operating table, and the check that every cut through one is right."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from graph.models import Array, Reference, Subject, build, random, run_single, save

from onnxcare.experiment import Experiment

PLENTY = 1 << 26
SIZE = 7
W1, W2, W3 = random(6, 8), random(8, 6, seed=1), random(6, 4, seed=2)


def operate(subject: Subject, folder: Path, memory: int = PLENTY) -> Experiment:
    return Experiment(save(subject.proto, folder), "cpu", memory, subject.samples(SIZE))


def original(subject: Subject, x: dict[str, Array], *tensors: str) -> list[Array]:
    """Run the untouched model."""
    return run_single(subject.proto, x, *tensors)


def assert_close(found: Array, expected: Array, tolerance: float = 1e-5) -> None:
    assert found.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)


def assert_identical(found: Array, expected: Array) -> None:
    """Check that two arrays are the same to the last bit."""
    assert (found.dtype, found.shape, found.tobytes()) == (expected.dtype, expected.shape, expected.tobytes())


class Sent:
    """A pool that runs every job here and on a runner that travelled, once and twice, and finds them identical."""

    def __init__(self) -> None:
        self.jobs = 0

    def share(self, runner: Callable[..., Array], jobs: Sequence[tuple[Any, ...]]) -> list[Array]:
        packed = pickle.dumps(runner)
        answers = [runner(*job) for job in jobs]
        assert pickle.dumps(runner) == packed, "what a run lays out does not travel"
        away = runner
        for _ in range(2):
            away = pickle.loads(pickle.dumps(away))
            opened = away._part.session
            assert opened is not runner._part.session and opened.name == runner._part.session.name
            assert opened._session.get_session_options().intra_op_num_threads == 1
            for job, answer in zip(jobs, answers, strict=True):
                assert_identical(away(*job), answer)
        self.jobs += len(jobs)
        return answers


def assert_cuts(subject: Subject, folder: Path, boundary: dict[str, set[str]] | None = None) -> Experiment:
    """Check identity, forced values and a span at every layer output and site, two members at once."""
    experiment = operate(subject, folder)
    x = subject.samples(3)
    scores = original(subject, x, subject.logits)[0]
    cuts = [layer.output for layer in experiment.layers] + [site.tensor for site in experiment.sites]
    assert cuts
    for tensor in dict.fromkeys(cuts):
        suffix = experiment.suffix(tensor, "affine")
        at = suffix.cache(x)
        if boundary and tensor in boundary:
            assert set(at.boundary) == boundary[tensor]
        forced = random(*at.base.shape, seed=21, dtype=subject.dtype)
        keep = np.stack([np.ones_like(forced), np.zeros_like(forced)])
        found = suffix.affine(at, keep, forced[None])
        by_hand = Reference(subject.proto, tensor, subject.logits)
        assert_close(found[0], scores)
        assert_close(found[1], by_hand.scores(x, lambda h, row, forced=forced: forced[row : row + 1]))
        span = experiment.suffix(tensor, "span")
        found = span.span(span.cache(x), np.array([[1.0], [2.0]]), forced[None])
        expected = by_hand.scores(x, lambda h, row, forced=forced: h + 2 * forced[row : row + 1])
        assert_close(found[1], expected)
    return experiment


def dense_subject(nodes: str, weights: dict[str, Array], *, opset: int = 17, width: int = 6) -> Subject:
    proto = build(f"g (float[N, {width}] x) => (float[N, 4] y) {{ {nodes} }}", weights, opset=opset)
    return Subject(proto, "x", (width,), "y")
