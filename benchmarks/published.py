"""AI-Lancet exactly as published, beside what onnxcare makes of it, on the backdoored samples: one table, and JSON.

    python benchmarks/published.py [--seeds 1 2 3] [--only residual ...] [--json FILE]

As published (Zhao et al., CCS 2021, and the authors' released procedure): weights of the last dense layer alone, by
votes of 100 pairs; flip and mute of a given share (0.4 % and 0.9 % are those used for one and for several corner
triggers); neuron-fine-tuning of the most voted 1 % from the original weights, 300 steps of Adam (0.01) on batches of
128 clean images and 32 triggered ones with their true labels. One per cent of the last layer is few weights here, so 55
are tuned as well, about one per cent of a layer with 512 inputs. Beside it the methods of onnxcare, same data, same
judge. The worst of the seeds counts; rates and changes are in points; onnxcare does not write what breaks a limit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

import onnxcare
from onnxcare.case import Case
from onnxcare.graph.layers import Layer
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch
from onnxcare.judge import Court, Witness, judge
from onnxcare.locators.differential import WeightVotes, vote_weights
from onnxcare.locators.pairs import find_pairs
from onnxcare.measures import Verdict
from onnxcare.prepare import prepare
from onnxcare.properties.backdoor import ATTACK_SUCCESS, EXCESS
from onnxcare.repair.bench import changed, matrix_of
from onnxcare.repair.flip import change_of

Array = np.ndarray

SAMPLES = Path(__file__).parents[1] / "sample_models"
CASES = [
    ("mnist-square-pytorch", "model.onnx", "care.yaml"),
    ("mnist-blend-keras", "model.onnx", "care.yaml"),
    ("mnist-networks-pytorch", "model-sigmoid.onnx", "care.yaml"),
    ("mnist-networks-pytorch", "model-tanh.onnx", "care.yaml"),
    ("mnist-networks-pytorch", "model-gelu.onnx", "care.yaml"),
    ("mnist-networks-pytorch", "model-residual.onnx", "care.yaml"),
    ("mnist-networks-pytorch", "model-residual-blend.onnx", "care-blend.yaml"),
]
METHODS = ("ai-lancet-flip", "ai-lancet-finetune", "care", "auto")
PAIRS, STEPS, RATE, CLEAN, TRIGGERED = 100, 300, 1e-2, 128, 32


@dataclass(frozen=True)
class Line:
    """What one recipe reached on one model with one seed, on held-out data."""

    model: str
    recipe: str
    seed: int
    attack_success: float
    excess: float
    accuracy_drop: float
    recall_drop: float
    passed: bool
    seconds: float


def flip(case: Case, votes: WeightVotes, share: float, mode: str) -> Array:
    """Return the change that flips or mutes a share of the layer's weights, most voted first."""
    matrix = matrix_of(case, votes.layer)
    mask = np.zeros(votes.votes.shape, bool)
    mask.reshape(-1)[votes.ranking()[: round(share * mask.size)]] = True
    return change_of(matrix, _with_bias(votes.layer, mask), mode)


def finetune(case: Case, votes: WeightVotes, size: int) -> Array:
    """Return the change that the published fine-tuning of so many of the last layer's weights comes to."""
    layer, experiment = votes.layer, case.experiment
    mask = np.zeros(votes.votes.shape, bool)
    mask.reshape(-1)[votes.ranking()[:size]] = True
    mask = _with_bias(layer, mask)[0]
    triggered = [(item.evidence("repair").bad, TRIGGERED // len(case.properties)) for item in case.properties]
    parts = []
    for data, size in ((case.splits.repair, CLEAN), *triggered):
        rows = layer.rows(experiment.tensors([layer.input], data.inputs)[0])[0, :, 0].astype(np.float64)
        parts.append((rows, data.truth, size))
    weights = matrix_of(case, layer)[0]
    start, rng = weights.copy(), np.random.default_rng(case.seed)
    first, second = np.zeros_like(weights), np.zeros_like(weights)
    for step in range(1, STEPS + 1):
        chosen = [(rows, truth, rng.choice(len(rows), size)) for rows, truth, size in parts]
        h = np.concatenate([rows[which] for rows, _, which in chosen])
        labels = np.concatenate([truth[which] for _, truth, which in chosen])
        z = h @ weights
        p = np.exp(z - z.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(labels)), labels] -= 1
        slope = np.where(mask, h.T @ p / len(labels), 0)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        weights = weights - RATE * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
    return (weights - start)[None]


def _with_bias(layer: Layer, mask: Array) -> Array:
    """Return a mask of the product's weights with a row for the bias, which stays as it is."""
    if layer.bias is None:
        return mask
    return np.concatenate([mask, np.zeros((mask.shape[0], 1, mask.shape[2]), bool)], axis=1)


PUBLISHED: dict[str, Callable[[Case, WeightVotes], Array]] = {
    "published flip 0.4 %": lambda case, votes: flip(case, votes, 0.004, "flip"),
    "published flip 0.9 %": lambda case, votes: flip(case, votes, 0.009, "flip"),
    "published mute 0.4 %": lambda case, votes: flip(case, votes, 0.004, "mute"),
    "published mute 0.9 %": lambda case, votes: flip(case, votes, 0.009, "mute"),
    "published fine-tuning 1 %": lambda case, votes: finetune(case, votes, round(0.01 * votes.votes.size)),
    "published fine-tuning, 55 weights": lambda case, votes: finetune(case, votes, 55),
}


def published(sample: str, model: str, spec: str, seed: int) -> Iterable[Line]:
    """Carry out the published recipes on one model."""
    folder = SAMPLES / sample
    setup = prepare(folder / model, folder / spec, seed, "cpu", None, lambda text: None)
    case = setup.case
    started = time.monotonic()
    last = [layer for layer in case.experiment.layers if layer.refusal is None and not layer.convolution][-1]
    votes = vote_weights(case, last, find_pairs(case, PAIRS))
    locating = time.monotonic() - started
    for recipe, change in PUBLISHED.items():
        started = time.monotonic()
        values = changed(case, last, change(case, votes))
        seconds = locating + time.monotonic() - started
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "out.onnx"
            path.write_bytes(Patch(values).apply(setup.model))
            verdict = judge(_court(case, path, seed), case.properties, case.keep)
        yield _line(f"{sample} {model}", recipe, seed, verdict, seconds)


def _court(case: Case, path: Path, seed: int) -> Court:
    experiment = case.experiment
    after, before = (
        Witness(item, experiment.output, experiment.decision, experiment.device, experiment.rows_per_run)
        for item in (load_model(path), experiment.model)
    )
    return Court(after, before, case.splits.holdout, seed=seed)


def ours(sample: str, model: str, spec: str, method: str, seed: int) -> Line:
    """Carry out a method of onnxcare on one model."""
    folder = SAMPLES / sample
    with tempfile.TemporaryDirectory() as scratch:
        fix = onnxcare.fix(folder / model, folder / spec, Path(scratch) / "out.onnx", method=method, seed=seed)
    return _line(f"{sample} {model}", method, seed, fix.verdict, fix.seconds)


def _line(model: str, recipe: str, seed: int, verdict: Verdict, seconds: float) -> Line:
    (found,) = verdict.properties
    drops = [item.value for item in verdict.guards.measures if item.name.startswith("recall drop of class")]
    return Line(
        model=model,
        recipe=recipe,
        seed=seed,
        attack_success=found.measure(ATTACK_SUCCESS).value,
        excess=found.measure(EXCESS).value,
        accuracy_drop=verdict.guards.measure("accuracy drop").value,
        recall_drop=max(drops),
        passed=verdict.passed,
        seconds=seconds,
    )


def table(lines: list[Line], seeds: list[int]) -> Table:
    """Return one line for each model and recipe: the worst of the seeds in every column."""
    found = Table(title=f"Worst of seeds {', '.join(map(str, seeds))}, held-out data", title_justify="left")
    for name in ("model", "recipe", "within limits", "ASR", "excess", "accuracy", "worst recall", "s"):
        found.add_column(name, justify="left" if name in ("model", "recipe") else "right")
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line.model, line.recipe), []).append(line)
    for (model, recipe), group in groups.items():
        worst = [
            max(getattr(line, name) for line in group)
            for name in ("attack_success", "excess", "accuracy_drop", "recall_drop")
        ]
        cells = [
            f"{100 * worst[0]:.2f}",
            f"{100 * worst[1]:.2f}",
            *(f"{-100 * value + 0.0:+.2f}" for value in worst[2:]),
        ]
        passed = f"{sum(line.passed for line in group)}/{len(group)}"
        found.add_row(model, recipe, passed, *cells, f"{max(line.seconds for line in group):.1f}")
    return found


def main() -> None:
    """Run everything and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="models whose names hold a word")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    lines: list[Line] = []
    for sample, model, spec in CASES:
        if not any(word in f"{sample}/{model}" for word in arguments.only):
            continue
        for seed in arguments.seeds:
            lines += published(sample, model, spec, seed)
            lines += [ours(sample, model, spec, method, seed) for method in METHODS]
    Console(width=150).print(table(lines, arguments.seeds))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
