"""Make sample_models/avoidance-pytorch: a PyTorch network that advises how to avoid another aircraft.

It learns a table of costs (`encounter.py`); the least cost is the advice. Nothing is poisoned: a small network that
fits a table well on average is wrong in slivers of the input space, and those break safety properties.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

import encounter
from artifacts import describe_model, hash_line, markdown_table, runner, version_line, write_model
from samples import arguments

NAME = "avoidance-pytorch"
SEED = 3
TRAINING, EPOCHS, BATCH, RATE = 60_000, 30, 512, 3e-3
HIDDEN = (32, 32, 32, 32)
REPAIR, HOLDOUT = 3_000, 10_000
MEASURED = 1_000_000

# Boxes of inputs in which clear of conflict must not be the worst advice: from 4 km, and from 7 km on.
AWAY = ([-0.1, -0.5, -0.5, -0.5, -0.5], [0.5] * 5)
FAR = ([0.2, -0.5, -0.5, -0.5, -0.5], [0.5] * 5)
# A slow and a fast intruder; the own speed has its middle value.
SLOW = ([0.0, -0.5, -0.5, 0.0, -0.5], [0.5, 0.5, 0.5, 0.0, -0.2])
FAST = ([0.0, -0.5, -0.5, 0.0, 0.2], [0.5, 0.5, 0.5, 0.0, 0.5])


def train() -> nn.Sequential:
    """Train the network from its seeded start."""
    rng = np.random.default_rng(SEED)
    states = encounter.draw(rng, TRAINING)
    x, y = torch.from_numpy(states), torch.from_numpy(encounter.costs(states).astype(np.float32))
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    layers: list[nn.Module] = []
    width = 5
    for hidden in HIDDEN:
        layers += [nn.Linear(width, hidden), nn.ReLU()]
        width = hidden
    model = nn.Sequential(*layers, nn.Linear(width, len(encounter.ADVISORIES)))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for _ in range(EPOCHS):
        for rows in torch.randperm(TRAINING).split(BATCH):
            optimizer.zero_grad()
            nn.functional.mse_loss(model(x[rows]), y[rows]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def export(model: nn.Sequential, path: Path) -> None:
    """Write the network with PyTorch's TorchScript-based exporter."""
    buffer = io.BytesIO()
    axes = {"state": {0: "batch"}, "costs": {0: "batch"}}
    torch.onnx.export(
        model,
        (torch.zeros(1, 5),),
        buffer,
        input_names=["state"],
        output_names=["costs"],
        dynamic_axes=axes,
        opset_version=17,
        dynamo=False,
    )
    properties = {"warning": "breaks safety properties, to test repairs; not for use"}
    write_model(onnx.load_model_from_string(buffer.getvalue()), path, properties)


def write_properties(folder: Path) -> None:
    """Write the VNN-LIB files; what they assert is unsafe."""
    _write_box(folder / "away.vnnlib", "the intruder is 4 km away", AWAY)
    _write_box(folder / "far.vnnlib", "the intruder is 7 km away", FAR)
    either = " ".join(f"(and {_bounds(box)} {_WORST})" for box in (SLOW, FAST))
    lines = [
        "; Clear of conflict is never the worst advice against a slow or a fast intruder, 5 km away.",
        "; The own speed has its middle value: a dimension without width, written with a bound of -0.0.",
        *_DECLARATIONS,
        f"(assert (or {either}))",
    ]
    (folder / "slow-or-fast.vnnlib").write_text("\n".join(lines) + "\n")
    (folder / "away-2.0.vnnlib").write_text(_second_version(AWAY))


_DECLARATIONS = [f"(declare-const {name}_{i} Real)" for name in "XY" for i in range(5)]
_WORST = f"(and {' '.join(f'(>= Y_0 Y_{i})' for i in range(1, 5))})"


def _write_box(path: Path, where: str, box: tuple[list[float], list[float]]) -> None:
    lines = [f"(assert ({sign} X_{i} {value:g}))" for sign, side in zip((">=", "<="), box, strict=True)
             for i, value in enumerate(side)]  # fmt: skip
    says = f"; Clear of conflict is never the worst advice while {where}."
    path.write_text("\n".join([says, *_DECLARATIONS, *lines, f"(assert {_WORST})"]) + "\n")


def _bounds(box: tuple[list[float], list[float]]) -> str:
    ends = enumerate(zip(*box, strict=True))
    return " ".join(f"(>= X_{i} {_number(low)}) (<= X_{i} {high:g})" for i, (low, high) in ends)


def _number(value: float) -> str:
    return "-0.0" if value == 0 else f"{value:g}"


def _second_version(box: tuple[list[float], list[float]]) -> str:
    """Return a property in VNN-LIB 2.0."""
    bounds = [f"(assert ({sign} X[0,{i}] {value:.2f}))" for sign, side in zip((">=", "<="), box, strict=True)
              for i, value in enumerate(side)]  # fmt: skip
    worst = " ".join(f"(>= Y[0,0] Y[0,{i}])" for i in range(1, 5))
    head = [
        "; away.vnnlib in version 2.0.",
        "(vnnlib-version <2.0>)",
        "(declare-network avoidance",
        "  (declare-input X real [1,5])",
        "  (declare-output Y real [1,5])",
        ")",
    ]
    return "\n".join([*head, *bounds, f"(assert (and {worst}))"]) + "\n"


def write_care(folder: Path) -> None:
    """Write the specifications."""
    bounds = f"bounds: {{low: {encounter.LOW}, high: {encounter.HIGH}}}\n"
    data = "data: repair.npz\nholdout: holdout.npz\n"
    away, far, either = (
        f"  - {{name: {name}, kind: safety, vnnlib: {name}.vnnlib}}\n" for name in ("away", "far", "slow-or-fast")
    )
    keep = "keep: {accuracy_drop: 0.005, recall_drop: 0.1, balanced_accuracy_drop: 0.03}\nseed: 1\n"
    for name, source, properties in (
        ("care.yaml", data, away),
        ("care-rare.yaml", data, far),
        ("care-several.yaml", data, away + either),
        ("care-no-data.yaml", "", away),
    ):
        (folder / name).write_text(f"{source}decision: argmin\n{bounds}properties:\n{properties}{keep}")


def measure(folder: Path) -> list[list[str]]:
    """Return rows of the card: agreement with the table, and how much of every region is unsafe."""
    run = runner(folder / "model.onnx")
    rng = np.random.default_rng(SEED + 1)
    states = encounter.draw(rng, HOLDOUT)
    right, advice = encounter.costs(states).argmin(axis=1), run(states).argmin(axis=1)
    rows = [["advice as in the table, of 10,000 states", f"{100 * (right == advice).mean():.2f} %"]]
    for name, boxes in (("away", [AWAY]), ("far", [FAR]), ("slow-or-fast", [SLOW, FAST])):
        unsafe = [run(rng.uniform(*box, (MEASURED, 5)).astype(np.float32)).argmax(axis=1) == 0 for box in boxes]
        rows.append([f"`{name}.vnnlib` violated, of {len(boxes)} million samples", f"{100 * np.mean(unsafe):.4f} %"])
    return rows


def main() -> None:
    """Train, export, cut the data, write properties, specifications and card."""
    folder: Path = arguments(NAME, __doc__).output / NAME
    folder.mkdir(parents=True, exist_ok=True)
    export(train(), folder / "model.onnx")
    rng = np.random.default_rng(SEED + 2)
    for name, count in (("repair.npz", REPAIR), ("holdout.npz", HOLDOUT)):
        np.savez_compressed(folder / name, state=encounter.draw(rng, count))
    write_properties(folder)
    write_care(folder)
    versions = {"torch": torch.__version__, "onnx": onnx.__version__, "numpy": np.__version__}
    card = _CARD.format(
        name=NAME,
        hidden=", ".join(map(str, HIDDEN)),
        advisories=", ".join(encounter.ADVISORIES),
        training=TRAINING,
        epochs=EPOCHS,
        batch=BATCH,
        seed=SEED,
        repair=REPAIR,
        holdout=HOLDOUT,
        versions=version_line(versions),
        model=describe_model(folder / "model.onnx"),
        table=markdown_table(["measure", "value"], measure(folder)),
        hashes="\n".join(hash_line(folder / name) for name in ("model.onnx", "repair.npz", "holdout.npz")),
    )
    (folder / "CARD.md").write_text(card)


_CARD = """\
# {name}

**Breaks safety properties**, to try repairs on. Do not fly with it.

A network that advises how to avoid another aircraft in a plane: dense {hidden} with ReLU, dense 5. It takes
[N, 5]: distance, bearing of the intruder, its heading, own speed and intruder speed, each scaled to -0.5 ... 0.5
(`scripts/encounter.py` has the units), and gives the costs of five advisories: {advisories}.
The least cost is the advice. Nothing is poisoned: the network fits a table of simulated encounters well, and
is wrong in slivers of the input space.

## Training

{training} states drawn evenly, {epochs} epochs of Adam on the squared error, batch {batch}. Seed {seed} for
weights, batches and states.

Made with {versions}, by

    python scripts/make_avoidance_pytorch.py

## Measured

By that script, in onnxruntime.

{table}

## Files

{model}

SHA-256:

{hashes}

| file | inside |
| --- | --- |
| `repair.npz` | `state` [{repair}, 5] float32, drawn evenly; no labels: what the network answers is the reference |
| `holdout.npz` | the same for {holdout} other states |
| `away.vnnlib` | unsafe: clear of conflict is the worst advice while the intruder is 4 km or more away |
| `away-2.0.vnnlib` | the same in VNN-LIB 2.0 |
| `far.vnnlib` | the same from 7 km on: too rare to be met by a few hundred thousand samples |
| `slow-or-fast.vnnlib` | the same from 5 km on for a slow or a fast intruder: two boxes, a dimension without width |
| `care.yaml` | `away.vnnlib` |
| `care-rare.yaml` | `far.vnnlib` |
| `care-several.yaml` | `away.vnnlib` and `slow-or-fast.vnnlib` together |
| `care-no-data.yaml` | `away.vnnlib`, and no data at all: states are drawn from the bounds |

All of it is our own, under this project's licence.
"""


if __name__ == "__main__":
    main()
