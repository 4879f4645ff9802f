"""What `auto` and the published defences make of many kinds of backdoors: one table, and JSON.

    python benchmarks/repair.py [--seeds 1 2 3] [--only WORD ...] [--situations known ...] [--methods auto ...]

Situations: `known`, the trigger file, or 1,000 triggered images with their clean twins where no file can hold the
trigger; `50` and `10`, that many triggered images without twins; `unknown`, 1,000 clean images and nothing else. In all
of them 1,000 clean images go to the repair, and 3,000 others, clean and triggered, to the judge. The published defences
run in the situation `known`, with their published settings; those that need no triggered images leave them alone, but
fine-tuning has the rate, and fine-pruning rate and number of channels, that do best on validation data.

A line is a model, a situation and a method: the worst of the seeds in every column, in points. Excess is the attack
success above the clean confusion rate. A method that is not defined for an attack (CARE for several targets) has none.
Times are wall-clock; those of `auto` include loading and judging.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

import onnxcare
from onnxcare.case import Case
from onnxcare.errors import OnnxcareError
from onnxcare.graph.model import load_model
from onnxcare.graph.patch import Patch
from onnxcare.judge import Court, Witness, judge
from onnxcare.locators.differential import vote_weights
from onnxcare.locators.pairs import find_pairs
from onnxcare.measures import Verdict
from onnxcare.prepare import prepare
from onnxcare.properties.backdoor import ATTACK_SUCCESS, EXCESS
from onnxcare.repair.base import Values
from onnxcare.repair.bench import changed
from onnxcare.runtime import few_blas_threads

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from care_published import care_published, clp_published  # noqa: E402
from published import PAIRS, PUBLISHED  # noqa: E402

import attacks  # noqa: E402  the folder of scripts has to be known first

SAMPLES = ROOT / "sample_models"
DATA = SAMPLES / "mnist-square-pytorch"
ATTACKS = SAMPLES / "mnist-attacks-pytorch"
NETWORKS = SAMPLES / "mnist-networks-pytorch"
HELD_OUT = 3000
SITUATIONS = ("known", "50", "10", "unknown")
# The clean limits of the specs, in shares; the tolerated attack success goes by what is known.
LIMITS = {
    "known": (0.005, 0.003, 0.02),
    "50": (0.01, 0.005, 0.02),
    "10": (0.03, 0.005, 0.02),
    "unknown": (0.03, 0.01, 0.03),
}


@dataclass(frozen=True)
class Model:
    """A backdoored model, and the attacks that it carries."""

    name: str
    path: Path
    attacks: tuple[attacks.Attack, ...]


@dataclass(frozen=True)
class Line:
    """What one method reached on one model with one seed, on held-out data."""

    model: str
    situation: str
    method: str
    seed: int
    status: str
    attack_success: float
    excess: float
    accuracy_drop: float
    recall_drop: float
    seconds: float


def models() -> list[Model]:
    """Return the models that carry the attacks."""
    found = [Model(name, ATTACKS / f"model-{name}.onnx", carried) for name, carried in attacks.CARRIED.items()]
    found.append(Model("residual-corner", NETWORKS / "model-residual.onnx", (attacks.CORNER,)))
    with np.load(NETWORKS / "trigger-blend.npz") as arrays:
        noise = attacks.Trigger(arrays["mask"], arrays["pattern"])
    found.append(
        Model("residual-blend", NETWORKS / "model-residual-blend.onnx", (replace(attacks.BLEND, trigger=noise),))
    )
    return found


def write_case(model: Model, situation: str, seed: int, folder: Path) -> Path:
    """Write data and spec of a situation into a folder, and return the spec's path."""
    rng = np.random.default_rng(seed)
    with np.load(DATA / "repair.npz") as arrays:
        x, y = arrays["x"], arrays["y"]
    with np.load(DATA / "holdout.npz") as arrays:
        held_x, held_y = arrays["x"], arrays["y"]
    np.savez(folder / "repair.npz", x=x, y=y)
    np.savez(folder / "holdout.npz", x=held_x[:HELD_OUT], y=held_y[:HELD_OUT])
    max_rate, accuracy_drop, recall_drop = LIMITS[situation]
    properties = []
    for attack in model.attacks:
        entry: dict[str, object] = {"name": attack.name, "kind": "backdoor", "max_rate": max_rate}
        if situation != "unknown":
            target = attack.target
            entry["target"] = target if isinstance(target, int) else dict(enumerate(target))
            entry |= _evidence(attack, situation, (x, y), (held_x, held_y), rng, folder)
        properties.append(entry)
    if situation == "unknown":
        properties = [{"name": "hidden", "kind": "backdoor", "max_rate": max_rate}]
    spec = {
        "data": "repair.npz",
        "holdout": "holdout.npz",
        "properties": properties,
        "keep": {"accuracy_drop": accuracy_drop, "recall_drop": recall_drop},
    }
    path = folder / "care.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


def _evidence(
    attack: attacks.Attack,
    situation: str,
    data: tuple[np.ndarray, np.ndarray],
    held: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    folder: Path,
) -> dict[str, str]:
    """Write what is known about a trigger, and return the keys of the spec that name it."""
    if situation == "known" and attack.trigger is not None:
        np.savez(folder / f"{attack.name}.npz", mask=attack.trigger.mask, pattern=attack.trigger.pattern)
        return {"trigger": f"{attack.name}.npz"}
    if situation == "known" and attack.added is not None:
        np.savez(folder / f"{attack.name}.npz", added=attack.added)
        return {"trigger": f"{attack.name}.npz"}

    def write(name: str, x: np.ndarray, y: np.ndarray) -> str:
        np.savez(folder / f"{attack.name}-{name}.npz", x=x, y=y)
        return f"{attack.name}-{name}.npz"

    held_x, held_y = held
    judged = attack.counts(held_y[:HELD_OUT])
    found = {
        "triggered_holdout": write("holdout", attack.stamp(held_x[:HELD_OUT][judged], rng), held_y[:HELD_OUT][judged])
    }
    if situation == "known":
        x, y = (values[attack.counts(data[1])] for values in data)
        return found | {"triggered": write("triggered", attack.stamp(x, rng), y), "twins": write("twins", x, y)}
    rows = HELD_OUT + rng.permutation(np.flatnonzero(attack.counts(held_y[HELD_OUT:])))[: int(situation)]
    return found | {"triggered": write("triggered", attack.stamp(held_x[rows], rng), held_y[rows])}


def ours(model: Model, situation: str, method: str, seed: int) -> Line:
    """Let a method of onnxcare repair a model; what is not within the limits is judged all the same."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        spec = write_case(model, situation, seed, folder)
        fix = onnxcare.fix(model.path, spec, folder / "out.onnx", method=method, seed=seed, best_effort=True)
        verdict, status = fix.verdict, fix.status
        if situation == "unknown":
            # Judged by the true trigger, which the repair has not seen.
            judged = folder / "out.onnx" if (folder / "out.onnx").exists() else model.path
            setup = prepare(model.path, write_case(model, "known", seed, folder), seed, "cpu", None, lambda text: None)
            verdict = _judge(setup.case, judged, seed)
    return _line(model, situation, method, seed, status, verdict, fix.seconds)


def _ai_lancet(recipe: str) -> Callable[[Case], Values]:
    def published(case: Case) -> Values:
        last = [layer for layer in case.experiment.layers if layer.refusal is None and not layer.convolution][-1]
        votes = vote_weights(case, last, find_pairs(case, PAIRS))
        return changed(case, last, PUBLISHED[recipe](case, votes))

    return published


BASELINES: dict[str, Callable[[Case], Values]] = {
    "CARE": care_published,
    "AI-Lancet flip 0.9 %": _ai_lancet("published flip 0.9 %"),
    "AI-Lancet fine-tuning": _ai_lancet("published fine-tuning, 55 weights"),
    "CLP": clp_published,
}
# The other two are methods of onnxcare: the rate and the number of channels that do best on validation data.
METHODS = ("auto", *BASELINES, "fine-pruning", "fine-tuning")


@few_blas_threads()
def baseline(model: Model, name: str, seed: int) -> Line | None:
    """Carry out a published defence as published; None where it is not defined."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        setup = prepare(model.path, write_case(model, "known", seed, folder), seed, "cpu", None, lambda text: None)
        started = time.monotonic()
        try:
            values = BASELINES[name](setup.case)
        except (ValueError, OnnxcareError):
            return None
        seconds = time.monotonic() - started
        path = folder / "out.onnx"
        path.write_bytes(Patch(values).apply(setup.model))
        verdict = _judge(setup.case, path, seed)
    return _line(model, "known", name, seed, "within limits" if verdict.passed else "not", verdict, seconds)


def _judge(case: Case, path: Path, seed: int) -> Verdict:
    experiment = case.experiment
    after, before = (
        Witness(item, experiment.output, experiment.decision, experiment.device, experiment.rows_per_run)
        for item in (load_model(path), experiment.model)
    )
    return judge(Court(after, before, case.splits.holdout, seed=seed), case.properties, case.keep)


def _line(model: Model, situation: str, method: str, seed: int, status: str, verdict: Verdict, seconds: float) -> Line:
    drops = [item.value for item in verdict.guards.measures if item.name.startswith("recall drop of class")]
    return Line(
        model=model.name,
        situation=situation,
        method=method,
        seed=seed,
        status=status,
        attack_success=max(found.measure(ATTACK_SUCCESS).value for found in verdict.properties),
        excess=max(found.measure(EXCESS).value for found in verdict.properties),
        accuracy_drop=verdict.guards.measure("accuracy drop").value,
        recall_drop=max(drops),
        seconds=seconds,
    )


def lines(arguments: argparse.Namespace) -> Iterator[Line]:
    """Run everything that was asked for."""
    chosen = [item for item in models() if any(word in item.name for word in arguments.only)]
    for model in chosen:
        for seed in arguments.seeds:
            if "auto" in arguments.methods:
                for situation in arguments.situations:
                    yield ours(model, situation, "auto", seed)
            for name in arguments.methods:
                if name in BASELINES:
                    found = baseline(model, name, seed)
                    if found is not None:
                        yield found
                elif name != "auto":
                    yield ours(model, "known", name, seed)


def table(found: list[Line], seeds: list[int]) -> Table:
    """Return one line for each model, situation and method: the worst of the seeds in every column."""
    shown = Table(title=f"Worst of seeds {', '.join(map(str, seeds))}, held-out data", title_justify="left")
    for name in ("model", "situation", "method", "good", "ASR", "excess", "accuracy", "worst recall", "s"):
        shown.add_column(name, justify="left" if name in ("model", "situation", "method") else "right")
    groups: dict[tuple[str, str, str], list[Line]] = {}
    for line in found:
        groups.setdefault((line.model, line.situation, line.method), []).append(line)
    for names, group in groups.items():
        good = sum(line.status in ("repaired", "within limits") for line in group)
        worst = [
            max(getattr(line, name) for line in group)
            for name in ("attack_success", "excess", "accuracy_drop", "recall_drop", "seconds")
        ]
        shown.add_row(
            *names,
            f"{good}/{len(group)}",
            *(f"{100 * value + 0.0:.2f}" for value in worst[:2]),
            *(f"{-100 * value + 0.0:+.2f}" for value in worst[2:4]),
            f"{worst[4]:.1f}",
        )
    return shown


def main() -> None:
    """Run everything and print the table; every line is told when it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORD", help="models whose names hold a word")
    parser.add_argument("--situations", nargs="+", default=list(SITUATIONS), choices=SITUATIONS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found: list[Line] = []
    for line in lines(arguments):
        found.append(line)
        print(line, file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(json.dumps([asdict(item) for item in found], indent=2) + "\n", encoding="utf-8")
    Console(width=150).print(table(found, arguments.seeds))


if __name__ == "__main__":
    main()
